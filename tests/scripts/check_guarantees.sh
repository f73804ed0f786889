#!/bin/sh
# The tests that docs/guarantees.md and docs/sockets.md name exist:
# check_guarantees.sh ROOT WORK
set -eu
root=$1 work=$2

mkdir -p "$work"
bad=0 count=0
for document in guarantees.md sockets.md; do
    # "FILE NAME" for each quoted name behind a `FILE.cpp`: in the same line (a table's row), or in
    # the list below it.
    LC_ALL=C awk '
        !/^ *[-|]/ { file = "" }
        {
            count = split($0, part, "`")
            for (i = 1; i <= count; i++) {
                if (part[i] ~ /^[a-z_]+\.cpp$/) { file = part[i]; continue }
                if (file == "") continue
                names = split(part[i], name, "\"")
                for (j = 2; j <= names; j += 2) print file " " name[j]
            }
        }' "$root/docs/$document" >"$work/named"
    while read -r file name; do
        count=$((count + 1))
        if ! grep -qF "TEST_CASE(\"$name\"" "$root/tests/$file"; then
            echo "docs/$document names a test that is not in tests/$file: $name"
            bad=1
        fi
    done <"$work/named"
    if ! [ -s "$work/named" ]; then
        echo "docs/$document names no tests"
        bad=1
    fi
done
[ $bad = 1 ] || echo "$count names"
exit $bad
