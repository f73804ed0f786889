#!/bin/sh
# Builds the models with the header as it is and runs them, in a folder of their own:
#   run.sh [--build-dir DIR] [--minutes N] [--more N] [--only PART]
#          [--mutants | --no-faults | --sweep PREFIX]
# Ordinary: every model within its bounds, then the faults that must be noticed. --minutes goes on
# with wider bounds for N minutes in all; --more N begins N preemptions further on. --mutants: only
# the faults. --no-faults: of those only whether they fit the header's text. --sweep weakens each
# order in functions whose names begin with PREFIX (vkp_ for all), and says what no model noticed.
# Exit 77: not for this system.
set -eu

root=$(cd "$(dirname "$0")/../.." && pwd)
here=$root/tests/model
compiler=${CC:-cc} build='' mutants='' faults=yes sweep='' only='' arguments=''
while [ $# -gt 0 ]; do
    case $1 in
    --mutants) mutants=only ;;
    --no-faults) faults=no ;;
    --build-dir | --minutes | --more | --only | --sweep)
        [ $# -ge 2 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
        case $1 in
        --build-dir) build=$2 ;;
        --sweep) sweep=$2 ;;
        --only) only=$2 ;;
        *) arguments="$arguments $1 $2" ;;
        esac
        shift
        ;;
    *)
        sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
        exit 2
        ;;
    esac
    shift
done

case $(uname -s):$(uname -m) in
Linux:x86_64 | Linux:aarch64) ;;
*)
    echo "model: not run: needs Linux on x86-64 or 64-bit ARM (ucontext, the linker's --wrap)"
    exit 77
    ;;
esac
work=${build:-$root/build/model}
mkdir -p "$work"

common="-std=gnu11 -D_GNU_SOURCE -Wall -Wextra -Werror -g -fno-pie -U_FORTIFY_SOURCE
    -I$here -I$root"
# What accesses the library's memory tells the checker so, by way of what ThreadSanitizer would ask.
watched="-O2 -fsanitize=thread -fno-builtin -Wno-ignored-qualifiers"
if ! echo 'int main(void) { return 0; }' | "$compiler" -x c -std=gnu11 -fsanitize=thread -c - \
    -o "$work/probe.o" 2>"$work/probe.log"; then
    cat "$work/probe.log"
    echo "model: not run: $compiler does not know -fsanitize=thread"
    exit 77
fi
link() { # into $1
    "$compiler" -no-pie -g "$work"/*.o \
        -Wl,--wrap=memcmp,--wrap=memcpy,--wrap=memmove,--wrap=memset -pthread -o "$1"
}
rm -f "$work"/*.o
for source in "$here"/*.c; do
    name=$(basename "$source" .c)
    case $name in
    model | runner) options="-O3 $common" ;;
    *) options="$watched $common" ;;
    esac
    # The words of the options are meant to be split.
    # shellcheck disable=SC2086
    "$compiler" $options -c "$source" -o "$work/$name.o"
done
link "$work/model"

if [ -n "$sweep" ]; then
    # shellcheck disable=SC2086
    exec "$work/model" ${only:+--only "$only"} $arguments --sweep "$sweep"
fi
if [ -z "$mutants" ]; then
    # shellcheck disable=SC2086
    if ! "$work/model" ${only:+--only "$only"} $arguments >"$work/models.log"; then
        grep -v '^model ' "$work/models.log" || true
        exit 1
    fi
    grep -v '^model ' "$work/models.log"
    echo "model: each model and its executions: $work/models.log"
fi
if [ -n "$only" ] && [ -z "$mutants" ]; then
    exit 0
fi
[ $faults = no ] || "$work/model" ${only:+--only "$only"} --mutants

# seed PART WHAT SED-PROGRAM [SOURCE]: the models with PART in their names notice that fault in the
# header, as SOURCE compiles it: models_socket, which has a library of its own, or header.
seed() {
    mkdir -p "$work/seeded"
    sed "$3" "$root/valkey_push.h" >"$work/seeded/valkey_push.h"
    if cmp -s "$root/valkey_push.h" "$work/seeded/valkey_push.h"; then
        echo "model: the fault was not seeded: $2"
        exit 1
    fi
    [ $faults = yes ] || return 0
    # shellcheck disable=SC2086
    "$compiler" $watched "-I$work/seeded" $common -O1 -g0 -w -c "$here/${4:-models_socket}.c" \
        -o "$work/${4:-models_socket}.o"
    link "$work/seeded/model"
    "$work/seeded/model" --only "$1" --seeded "$2"
}
# shellcheck source=/dev/null
case $only in
'' | socket*) . "$here/socket_faults.sh" ;;
esac
# shellcheck source=/dev/null
case $only in
'' | mpsc* | select* | oneshot*) . "$here/channel_faults.sh" ;;
esac
