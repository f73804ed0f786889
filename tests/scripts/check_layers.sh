#!/bin/sh
# Each part of src/ compiles behind the parts that layers.txt allows it and no others, and each has
# a line there: check_layers.sh ROOT WORK
set -eu
root=$1 work=$2
cc=${CC:-cc}

mkdir -p "$work"
bad=0 count=0
for part in $(sed -e '/^#/d' -e '/^$/d' "$root/src/order.txt"); do
    case $part in
    begin.* | end.* | title.h | manual.h | config.h | api.h | handles.h | licence.h | platform.c)
        continue
        ;;
    esac
    count=$((count + 1))
    # A function that is called and never defined is a call to a part that may not be used.
    if ! sh "$root/src/layers.sh" "$part" >"$work/prelude.h" ||
        ! "$cc" -std=c99 -Wall -Wextra -Werror -Wno-unused-function -Wno-unused-variable \
            -Wno-unused-const-variable -include "$work/prelude.h" -x c -c "$root/src/$part" \
            -o "$work/part.o" 2>"$work/log"; then
        sed 12q "$work/log"
        echo "src/$part needs more than src/layers.txt allows it"
        bad=1
    fi
done
[ $bad = 1 ] || echo "$count parts behind their own preludes"
exit $bad
