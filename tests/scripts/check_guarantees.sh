#!/bin/sh
# The tests that docs/guarantees.md names exist: check_guarantees.sh ROOT WORK
set -eu
root=$1 work=$2

mkdir -p "$work"
# "FILE NAME" for each quoted name behind a `FILE.cpp`: in a row of the table.
LC_ALL=C awk '
    /^\| G[0-9]+ \|/ {
        count = split($0, part, "`")
        for (i = 2; i < count; i++) {
            if (part[i] !~ /^[a-z_]+\.cpp$/) continue
            names = split(part[i + 1], name, "\"")
            for (j = 2; j <= names; j += 2) print part[i] " " name[j]
        }
    }' "$root/docs/guarantees.md" >"$work/named"
bad=0 count=0
while read -r file name; do
    count=$((count + 1))
    if ! grep -qF "TEST_CASE(\"$name\"" "$root/tests/$file"; then
        echo "docs/guarantees.md names a test that is not in tests/$file: $name"
        bad=1
    fi
done <"$work/named"
if [ "$count" = 0 ]; then
    echo "docs/guarantees.md names no tests"
    bad=1
fi
[ $bad = 1 ] || echo "$count names"
exit $bad
