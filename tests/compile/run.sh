#!/bin/sh
# Compiles the header in one dialect, every way in which programs use it, without a warning, and
# runs the programs: run.sh COMPILER DIALECT ROOT WORK. Exit 77: the compiler lacks the dialect.
# -O2, because -Wnull-dereference sees nothing without it.
set -eu
compiler=$1 dialect=$2 root=$3 work=$4

rm -rf "$work"
mkdir -p "$work"
here=$root/tests/compile

warnings="-Werror -Wall -Wextra -Wpedantic -Wconversion -Wsign-conversion -Wshadow -Wcast-qual
    -Wcast-align -Wundef -Wvla -Wformat=2 -Wswitch-enum -Wnull-dereference"
case $dialect in
*++*) language="-x c++" ;;
*)
    language="-x c"
    warnings="$warnings -Wstrict-prototypes -Wmissing-prototypes"
    ;;
esac

echo 'int main(void) { return 0; }' >"$work/probe.c"
if ! "$compiler" $language -std="$dialect" -c "$work/probe.c" -o "$work/probe.o" 2>"$work/probe.log"
then
    cat "$work/probe.log"
    echo "$compiler does not know $dialect"
    exit 77
fi

count=0
compile() { # SOURCE NAME [macros]
    source=$1 name=$2
    shift 2
    "$compiler" $language -std="$dialect" -O2 $warnings "$@" -I"$root" -c "$source" \
        -o "$work/$name.o"
    count=$((count + 1))
}
link_and_run() { # PROGRAM OBJECTS
    program=$work/$1
    shift
    "$compiler" "$@" -pthread -o "$program"
    "$program"
}

compile "$here/unit.c" unit
compile "$here/main.c" main
compile "$here/implementation.c" implementation
link_and_run two_units "$work/main.o" "$work/unit.o" "$work/implementation.o"

compile "$here/unit.c" static_unit -DVKP_STATIC -DVKP_IMPLEMENTATION
compile "$here/main.c" static_main -DVKP_STATIC -DVKP_IMPLEMENTATION
link_and_run two_copies "$work/static_main.o" "$work/static_unit.o"

compile "$here/implementation.c" channels -DVKP_NO_IO
link_and_run channels_only "$work/main.o" "$work/unit.o" "$work/channels.o"

for backend in "$root"/backends/*.c; do
    name=$(basename "$backend" .c)
    case $name:$(uname -s) in
    vkp_backend_epoll:Linux) ;;
    vkp_backend_epoll:*) continue ;;
    esac
    compile "$backend" "$name"
done
echo "$("$compiler" --version | sed 1q), $dialect: $count units without a warning, 3 programs run"
