#!/bin/sh
# The implementation's object defines only vkp_ names, none of them private (vkp_i_), and none at
# all with VKP_STATIC; a backend's defines its one struct, or nothing, on other systems:
# check_symbols.sh ROOT WORK
set -eu
root=$1 work=$2
cc=${CC:-cc}

mkdir -p "$work"
printf '#define VKP_IMPLEMENTATION\n#include "valkey_push.h"\n' >"$work/impl.c"
"$cc" -std=c99 -w -I"$root" -c "$work/impl.c" -o "$work/shared.o"
"$cc" -std=c99 -w -DVKP_STATIC -I"$root" -c "$work/impl.c" -o "$work/static.o"

# The names that an object defines; macOS puts an underscore in front of each.
defined() {
    nm -g -P "$1" | awk '$2 != "U" && $2 != "w" && $2 != "v" { print $1 }' |
        if [ "$(uname -s)" = Darwin ]; then sed 's/^_//'; else cat; fi
}

defined "$work/shared.o" | LC_ALL=C sort >"$work/shared.txt"
defined "$work/static.o" >"$work/static.txt"
bad=0
if grep -v '^vkp_' "$work/shared.txt" || grep '^vkp_i_' "$work/shared.txt"; then
    echo "these must be static, or be named vkp_*"
    bad=1
fi
if [ -s "$work/static.txt" ]; then
    cat "$work/static.txt"
    echo "these are visible in spite of VKP_STATIC"
    bad=1
fi

# A guest is compiled where its library's header is.
backends=0
for file in "$root"/backends/vkp_backend_*.c; do
    name=$(basename "$file" .c)
    if ! "$cc" -std=c99 -w -I"$root" -c "$file" -o "$work/backend.o" 2>"$work/backend.log"; then
        grep -q "$(sed -n 's/^#include <\([^>]*\)>.*/\1/p' "$file" | sed 1q)" "$work/backend.log" &&
            continue
        cat "$work/backend.log"
        bad=1
        continue
    fi
    symbols=$(defined "$work/backend.o")
    backends=$((backends + 1))
    if [ "$symbols" != "$name" ] && [ -n "$symbols" ]; then
        echo "$name defines: $symbols"
        bad=1
    fi
    case $name in
    *_poll | *_null) [ -n "$symbols" ] || { echo "$name defines nothing"; bad=1; } ;;
    esac
done

# What is declared is defined, and the other way round.
awk '/^#endif \/\* VALKEY_PUSH_H/ { exit }
    /^VKP_API / { text = "" ; inside = 1 }
    inside {
        text = text " " $0
        if (match(text, /vkp_[a-z0-9_]*\(/)) {
            print substr(text, RSTART, RLENGTH - 1)
            inside = 0
        }
    }' "$root/valkey_push.h" | LC_ALL=C sort -u >"$work/declared.txt"
if ! diff "$work/declared.txt" "$work/shared.txt"; then
    echo "< is declared and not defined, > is defined and not declared"
    bad=1
fi
[ $bad = 1 ] || echo "$(wc -l <"$work/shared.txt") functions, $backends backends"
exit $bad
