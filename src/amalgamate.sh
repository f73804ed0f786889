#!/bin/sh
# Makes valkey_push.h of the parts that order.txt lists: their text, one after the other, an empty
# line between two.
#   amalgamate.sh           writes ../valkey_push.h
#   amalgamate.sh --check   compares instead: exit 1, and what to do, unless they are equal
set -eu
here=$(cd "$(dirname "$0")" && pwd)
header=$here/../valkey_push.h
made=$header.new
trap 'rm -f "$made"' EXIT

parts=$(sed -e '/^#/d' -e '/^$/d' "$here/order.txt")
first=yes
for part in $parts; do
    [ $first = yes ] || echo
    first=no
    cat "$here/$part"
done >"$made"
[ -s "$made" ] || { echo "src/order.txt lists no part" >&2; exit 1; }

case ${1:-} in
'')
    mv "$made" "$header"
    ;;
--check)
    if ! cmp "$made" "$header"; then
        echo "valkey_push.h is not made of src/ as it is: edit src/, then run: sh src/amalgamate.sh"
        exit 1
    fi
    ;;
*)
    sed -n '2,5s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
