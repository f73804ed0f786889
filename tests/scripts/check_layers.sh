#!/bin/sh
# Each part of src/ compiles behind the parts that layers.txt allows it and no others, calls nothing
# that they do not define, and has one line there: check_layers.sh ROOT WORK [PART...], by default
# all parts.
set -eu
root=$1 work=$2
shift 2
cc=${CC:-cc}

mkdir -p "$work"
bad=0 count=0
# gcc drops static functions that nothing calls, and with them what they call.
keep=-fkeep-static-functions
echo 'int main(void) { return 0; }' >"$work/probe.c"
"$cc" $keep -c "$work/probe.c" -o "$work/probe.o" 2>/dev/null || keep=
sed -e '/^#/d' -e '/^$/d' "$root/src/order.txt" |
    grep -Ev '^(begin|end)\.|^(title|manual|config|api|handles|licence)\.h$|^platform\.c$' \
        >"$work/parts.txt"
sed -n 's/^\([a-z0-9_]*\.[ch]\):.*/\1/p' "$root/src/layers.txt" | LC_ALL=C sort >"$work/lines.txt"
LC_ALL=C sort "$work/parts.txt" | diff - "$work/lines.txt" >"$work/log" || {
    cat "$work/log"
    echo "src/layers.txt: < has no line, > is no part, or has two lines"
    exit 1
}
[ $# = 0 ] || printf '%s\n' "$@" >"$work/parts.txt"
while read -r part; do
    count=$((count + 1))
    : >"$work/log"
    # A static function that is called and never defined is in a part that may not be used.
    if ! sh "$root/src/layers.sh" "$part" >"$work/prelude.h" 2>"$work/log" ||
        ! "$cc" -std=c99 -Wall -Wextra -Werror -Wno-unused-function -Wno-unused-variable \
            -Wno-unused-const-variable $keep -include "$work/prelude.h" -x c \
            -c "$root/src/$part" -o "$work/part.o" 2>"$work/log"; then
        sed 12q "$work/log"
        echo "src/$part needs more than src/layers.txt allows it"
        bad=$((bad + 1))
        [ $bad -lt 3 ] || exit 1 # a wrong line is everybody's error
        continue
    fi
    # The same for public ones, whose declaration may be used without their part.
    nm -P -u "$work/part.o" >"$work/names.txt"
    if sed -n 's/^_\{0,1\}\(vkp_[a-z0-9_]*\).*/\1/p' "$work/names.txt" |
        grep -v '^vkp_backend_'; then
        echo "src/$part calls these, which are in parts that src/layers.txt does not allow it"
        bad=$((bad + 1))
    fi
done <"$work/parts.txt"
[ $bad != 0 ] || echo "$count parts behind their own preludes"
[ $bad = 0 ]
