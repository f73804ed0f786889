#!/bin/sh
# A status compared with a bit of readiness, a type of RESP or a flag of a value is a warning of
# -Wall, in C and C++; the same with a status is none: check_enums.sh ROOT WORK
set -eu
root=$1 work=$2

mkdir -p "$work"
bad=0 count=0
try() { # COMPILER LANGUAGE DIALECT EXPRESSION
    echo "#include \"valkey_push.h\"
int probe(vkp_status status);
int probe(vkp_status status) { return $4; }" >"$work/probe.c"
    "$1" -x "$2" -std="$3" -Wall -Werror -I"$root" -c "$work/probe.c" -o "$work/probe.o" \
        >"$work/log" 2>&1
}
for compiler in gcc clang; do
    command -v $compiler >/dev/null 2>&1 || continue
    for dialect in c99 c17 c++11 c++17; do
        language=c
        case $dialect in *++*) language=c++ ;; esac
        if ! try $compiler $language $dialect 'status == VKP_ERR_SYS'; then
            cat "$work/log"
            echo "$compiler, $dialect: a status cannot be compared with a status"
            bad=1
        fi
        for other in VKP_IO_READ VKP_IO_ERROR VKP_RESP_ERROR VKP_RESP_NULL VKP_RESP_PUSH; do
            count=$((count + 1))
            if try $compiler $language $dialect "status == $other"; then
                echo "$compiler, $dialect: no warning for: status == $other"
                bad=1
            elif ! grep -q 'enum-compare' "$work/log"; then
                cat "$work/log"
                echo "$compiler, $dialect: another error for: status == $other"
                bad=1
            fi
        done
    done
done
if [ $count = 0 ]; then
    echo "neither gcc nor clang is here"
    bad=1
fi
[ $bad = 1 ] || echo "$count comparisons warn"
exit $bad
