#!/bin/sh
# Links programs with link time optimisation, without a warning: lto.sh COMPILER ROOT WORK
# [EXAMPLE...]. The compiler then sees the sizes of the program's objects inside of the library.
# Without names: all examples that need no other library. Exit 77: the compiler cannot do it here.
set -eu
compiler=$1 root=$2 work=$3
shift 3
rm -rf "$work"
mkdir -p "$work"

if ! command -v "$compiler" >/dev/null 2>&1; then
    echo "$compiler is not here"
    exit 77
fi
lto=-flto
case $("$compiler" --version | sed 1q) in
*clang*) ;;
*) lto=-flto=2 ;; # without a number gcc's driver warns that it works serially
esac
echo 'int main(void) { return 0; }' >"$work/probe.c"
if ! "$compiler" $lto "$work/probe.c" -o "$work/probe" >"$work/probe.log" 2>&1; then
    cat "$work/probe.log"
    echo "$compiler has no link time optimisation here"
    exit 77
fi
options="-O2 $lto -Wall -Wextra -Werror -std=gnu99 -I$root"

count=0
link() { # NAME SOURCES
    name=$1
    shift
    "$compiler" $options "$@" -pthread -o "$work/$name" >"$work/log" 2>&1 || {
        cat "$work/log"
        exit 1
    }
    if [ -s "$work/log" ]; then # a warning of the link is not an error of the compiler
        cat "$work/log"
        exit 1
    fi
    count=$((count + 1))
}

here=$root/tests/compile
"$compiler" $options -c "$here/implementation.c" -o "$work/implementation.o"
link sizes "$here/lto.c" "$work/implementation.o"
"$work/sizes"
link one_channel "$root/tests/size/one_channel.c" "$work/implementation.o"
"$work/one_channel"

backends=
for name in null poll epoll; do
    case $name:$(uname -s) in
    epoll:Linux | null:* | poll:*) ;;
    *) continue ;;
    esac
    "$compiler" $options -c "$root/backends/vkp_backend_$name.c" -o "$work/$name.o"
    backends="$backends $work/$name.o"
done
if [ $# = 0 ]; then
    for source in "$root"/examples/*.c; do
        name=$(basename "$source" .c)
        case $name in
        embed_glib | embed_libuv) continue ;; # need their library
        embed_poll) [ "$(uname -s)" = Linux ] || continue ;;
        esac
        set -- "$@" "$name"
    done
fi
for name in "$@"; do
    link "$name" "$root/examples/$name.c" $backends
done
echo "$compiler $lto: $count programs without a warning"
