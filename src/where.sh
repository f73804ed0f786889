#!/bin/sh
# Where a line of valkey_push.h is edited.
#   where.sh LINE...            prints PART:LINE of each
#   make 2>&1 | where.sh        copies its input, with src/PART:LINE in place of valkey_push.h:LINE
set -eu
here=$(cd "$(dirname "$0")" && pwd)

# "FIRST PART" for each part: the line of the header at which it begins.
starts() {
    first=1
    sed -e '/^#/d' -e '/^$/d' "$here/order.txt" | while read -r part; do
        echo "$first $part"
        first=$((first + $(wc -l <"$here/$part") + 1))
    done
}

STARTS=$(starts)
export STARTS
if [ $# -gt 0 ]; then
    printf 'valkey_push.h:%s\n' "$@"
else
    cat
fi | LC_ALL=C awk '
    BEGIN {
        count = split(ENVIRON["STARTS"], each, "\n")
        for (i = 1; i <= count; i++) {
            split(each[i], field, " ")
            first[i] = field[1]
            part[i] = field[2]
        }
    }
    match($0, /[^ :"(]*valkey_push\.h:[0-9]+/) {
        place = substr($0, RSTART, RLENGTH)
        line = place
        sub(/.*:/, "", line)
        for (i = count; i > 1 && first[i] > line + 0; i--) {}
        $0 = substr($0, 1, RSTART - 1) "src/" part[i] ":" (line - first[i] + 1) \
            substr($0, RSTART + RLENGTH)
    }
    { print }'
