#!/bin/sh
# valkey_push.h is its parts, byte for byte; each is listed once, and none is longer than a reader
# can keep in mind: check_parts.sh ROOT WORK
set -eu
root=$1 work=$2

mkdir -p "$work"
bad=0
sh "$root/src/amalgamate.sh" --check || bad=1
sed -e '/^#/d' -e '/^$/d' "$root/src/order.txt" | LC_ALL=C sort >"$work/listed.txt"
(cd "$root/src" && ls ./*.[ch]) | sed 's,^\./,,' | LC_ALL=C sort >"$work/there.txt"
if ! diff "$work/listed.txt" "$work/there.txt"; then
    echo "< is listed in src/order.txt, > is in src/"
    bad=1
fi
while read -r part; do
    lines=$(wc -l <"$root/src/$part")
    if [ "$lines" -gt 1200 ]; then
        echo "src/$part: $lines lines, at most 1200: split it by concern"
        bad=1
    fi
done <"$work/listed.txt"
[ $bad = 1 ] || echo "$(wc -l <"$work/listed.txt") parts"
exit $bad
