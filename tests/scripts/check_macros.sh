#!/bin/sh
# Including the header's declarations defines no macros but VKP_*, VALKEY_PUSH_H, and those of the
# four standard headers it needs, and reads no other file; private macros (VKP_I_*) are gone again:
# check_macros.sh ROOT WORK
set -eu
root=$1 work=$2
cc=${CC:-cc}

mkdir -p "$work"
standard='#include <stdbool.h>\n#include <stddef.h>\n#include <stdint.h>\n#include <stdarg.h>\n'
printf "$standard" >"$work/without.c"
printf "$standard"'#include "valkey_push.h"\n' >"$work/with.c"

# The names alone: the compiler may number a macro's value by unit.
names() {
    "$cc" -std=c99 -I"$root" -E -dM "$1" | awk '{ sub(/\(.*/, "", $2); print $2 }' | LC_ALL=C sort
}
names "$work/without.c" >"$work/without.txt"
names "$work/with.c" >"$work/with.txt"
LC_ALL=C comm -13 "$work/without.txt" "$work/with.txt" >"$work/added.txt"

bad=0
if grep -Ev '^(VKP_|VALKEY_PUSH_H$)' "$work/added.txt" || grep '^VKP_I_' "$work/added.txt"; then
    echo "these macros leak out of the header"
    bad=1
fi
if ! grep -q '^VKP_VERSION_MAJOR$' "$work/added.txt"; then
    echo "the header defined nothing"
    bad=1
fi

# The files that each reads, one per line.
files() {
    "$cc" -std=c99 -I"$root" -M "$1" | tr ' ' '\n' | grep '\.h$' | LC_ALL=C sort -u
}
files "$work/without.c" >"$work/files_without.txt"
files "$work/with.c" >"$work/files_with.txt"
if LC_ALL=C comm -13 "$work/files_without.txt" "$work/files_with.txt" |
    grep -v '/valkey_push\.h$'; then
    echo "these files are read besides"
    bad=1
fi
[ $bad = 1 ] || echo "$(wc -l <"$work/added.txt") macros"
exit $bad
