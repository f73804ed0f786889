#!/bin/sh
# Where the header cannot work it says so in one line of its own: check_errors.sh ROOT WORK
set -eu
root=$1 work=$2
cc=${CC:-cc}

mkdir -p "$work"
bad=0
# says TEXT SOURCE [options]: it does not compile, and the header's message is the first one that
# the header is the place of
says() {
    text=$1
    printf "$2" >"$work/error.c"
    shift 2
    if "$cc" -std=c99 "$@" -I"$root" -c "$work/error.c" -o "$work/error.o" 2>"$work/error.log"; then
        echo "compiles, and should say: $text"
        bad=1
    elif ! grep 'valkey_push\.h.*error:' "$work/error.log" | sed 1q | grep -qF "$text"; then
        cat "$work/error.log"
        echo "does not say first: $text"
        bad=1
    fi
}

include='#include "valkey_push.h"\n'
says 'needs GCC or Clang' "#undef __GNUC__\n#undef __clang__\n$include"
says 'supports Linux, macOS and the BSDs' "#define VKP_IMPLEMENTATION\n$include" \
    -U__linux__ -U__APPLE__ -U__FreeBSD__ -U__OpenBSD__ -U__NetBSD__ -U__DragonFly__
# The C library has already been asked for less than the implementation takes.
case $(echo '#include <stdio.h>' | "$cc" -E -dM - | grep -c '^#define __GLIBC__ ') in
1)
    for dialect in c99 gnu99 c17 gnu17 gnu2x; do
        says 'define VKP_IMPLEMENTATION before the FIRST include' \
            "#include <stdio.h>\n#define VKP_IMPLEMENTATION\n$include" "-std=$dialect"
    done
    ;;
esac
says 'VKP_STATIC is for the one file' "#define VKP_STATIC\n$include"
[ $bad = 1 ] || echo "each says why"
exit $bad
