#!/bin/sh
# Makes valkey_push.h of the parts that order.txt lists: their text, one after the other, an empty
# line between two.
#   amalgamate.sh           writes ../valkey_push.h
#   amalgamate.sh --check   compares instead: exit 1, and what to do, unless they are equal
set -eu
here=$(cd "$(dirname "$0")" && pwd)
header=$here/../valkey_push.h

join() {
    first=yes
    sed -e '/^#/d' -e '/^$/d' "$here/order.txt" | while read -r part; do
        [ $first = yes ] || echo
        first=no
        cat "$here/$part"
    done
}

case ${1:-} in
'')
    join >"$header.new"
    mv "$header.new" "$header"
    ;;
--check)
    if ! join | cmp - "$header"; then
        echo "valkey_push.h is not made of src/ as it is: edit src/, then run: sh src/amalgamate.sh"
        exit 1
    fi
    ;;
*)
    sed -n '2,5s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
