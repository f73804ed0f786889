#!/bin/sh
# Compiles the header in one dialect, every way in which programs use it, without a warning, and
# runs the programs: run.sh COMPILER DIALECT ROOT WORK. Exit 77: the compiler is not here, or lacks
# the dialect. In the environment: OPTIMISE, an option of the compiler (with -O2, which
# -Wnull-dereference needs to see anything, the object's size and the time it took go into
# WORK/figures.txt; with -fsyntax-only nothing is linked or run); FLAGS of a target and its
# EMULATOR, which runs programs that cannot run as they are.
set -eu
compiler=$1 dialect=$2 root=$3 work=$4
optimise=${OPTIMISE:--O2} flags=${FLAGS:-}
. "$root/tests/compile/target.sh"

rm -rf "$work"
mkdir -p "$work"
here=$root/tests/compile

if ! command -v "$compiler" >/dev/null 2>&1; then
    echo "$compiler is not here"
    exit 77
fi
warnings="-Werror -Wall -Wextra -Wpedantic -Wconversion -Wsign-conversion -Wshadow -Wcast-qual
    -Wcast-align -Wundef -Wvla -Wformat=2 -Wswitch-enum -Wnull-dereference"
c_warnings="-Wstrict-prototypes -Wmissing-prototypes"
case $dialect in
*++*) language="-x c++" ;;
*)
    language="-x c"
    warnings="$warnings $c_warnings"
    ;;
esac

knows() { # a line of source
    echo "$1" >"$work/probe.c"
    "$compiler" $language -std="$dialect" $flags -c "$work/probe.c" -o "$work/probe.o" \
        >"$work/probe.log" 2>&1
}
if ! knows 'int main(void) { return 0; }'; then
    cat "$work/probe.log"
    echo "$compiler does not know $dialect"
    exit 77
fi

runner=''
if [ -n "${EMULATOR:-}" ] && [ "$optimise" != -fsyntax-only ]; then
    find_runner "$compiler" "$EMULATOR" "$work" || { echo "$EMULATOR is not here"; exit 77; }
fi

count=0 programs=0
compile() { # SOURCE NAME [macros]
    source=$1 name=$2
    shift 2
    set -- $language -std="$dialect" $optimise $flags $warnings "$@" -I"$root"
    if [ "$optimise" = -fsyntax-only ]; then
        "$compiler" "$@" "$source"
    else
        "$compiler" "$@" -c "$source" -o "$work/$name.o"
    fi
    count=$((count + 1))
}
link_and_run() { # PROGRAM OBJECTS
    [ "$optimise" != -fsyntax-only ] || return 0
    program=$work/$1
    shift
    "$compiler" $flags "$@" -pthread -o "$program"
    $runner "$program"
    programs=$((programs + 1))
}
# Processor seconds of this shell's children so far; in a subshell there would be none.
spent() {
    times >"$work/times"
    awk 'END {
        split($1, own, "[ms]")
        split($2, kernel, "[ms]")
        print (own[1] + kernel[1]) * 60 + own[2] + kernel[2]
    }' "$work/times"
}

compile "$here/unit.c" unit
compile "$here/main.c" main
spent >"$work/before"
compile "$here/implementation.c" implementation
spent >"$work/after"
link_and_run two_units "$work/main.o" "$work/unit.o" "$work/implementation.o"

# What users set: their own linkage, feature macros that were set already, assertions.
compile "$here/implementation.c" configured -D_GNU_SOURCE -D_DARWIN_C_SOURCE \
    '-DVKP_API=extern __attribute__((visibility("default")))' -fvisibility=hidden \
    '-DVKP_ASSERT(x)=((x) ? (void)0 : __builtin_trap())'
link_and_run configured "$work/main.o" "$work/unit.o" "$work/configured.o"

compile "$here/unit.c" static_unit -DVKP_STATIC -DVKP_IMPLEMENTATION
compile "$here/main.c" static_main -DVKP_STATIC -DVKP_IMPLEMENTATION
link_and_run two_copies "$work/static_main.o" "$work/static_unit.o"

compile "$here/implementation.c" channels -DVKP_NO_IO
link_and_run channels_only "$work/main.o" "$work/unit.o" "$work/channels.o"
compile "$here/implementation.c" static_channels -DVKP_NO_IO -DVKP_STATIC
compile "$here/sleeps.c" sleeps
link_and_run sleeps "$work/sleeps.o"

case $dialect in
*++*) # the implementation in C, its users in C++
    language="-x c" dialect=c99
    compile "$here/implementation.c" implementation_in_c $c_warnings
    language="-x c++" dialect=$2
    link_and_run two_languages "$work/main.o" "$work/unit.o" "$work/implementation_in_c.o"
    ;;
esac

# Guests are compiled where their library's header is.
for backend in "$root"/backends/*.c; do
    name=$(basename "$backend" .c)
    header=$(sed -n 's/^#include \(<[^>]*>\).*/\1/p' "$backend" | sed -n 1p)
    case $name:$(uname -s) in
    vkp_backend_epoll:Linux) ;;
    vkp_backend_epoll:*) continue ;;
    vkp_backend_kqueue:Linux) # empty here, unless for the tests' emulation
        emulated="-DVKP_KQUEUE_EMULATED -I$root/tests/support/kqueue"
        compile "$backend" "${name}_emulated" $emulated
        compile "$backend" "${name}_no_user" $emulated -DVKP_KQUEUE_WITHOUT_USER
        ;;
    vkp_backend_lib*) knows "#define _GNU_SOURCE 1
#include $header" || continue ;;
    esac
    compile "$backend" "$name"
done

about="$("$compiler" --version | sed 1q), $2 $optimise"
echo "$about: $count units without a warning, $programs programs run${runner:+ by $runner}"
if [ "$optimise" = -O2 ]; then
    size "$work/implementation.o" 2>/dev/null |
        awk -v about="$about" -v before="$(cat "$work/before")" -v after="$(cat "$work/after")" '
            NR == 2 { printf "%-70s %7d bytes of code, %4.1f s\n", about, $1, after - before }' \
            >"$work/figures.txt"
    cat "$work/figures.txt"
fi
