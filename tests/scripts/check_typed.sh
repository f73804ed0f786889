#!/bin/sh
# The typed macros compile without a warning as C99 and as C++11, and a value or a handle of another
# type does not compile: check_typed.sh ROOT WORK
set -eu
root=$1 work=$2
here=$(dirname "$0")
compiler=${CC:-cc}
warnings="-Werror -Wall -Wextra -Wpedantic -Wconversion -Wsign-conversion -Wshadow -Wcast-qual
    -Wcast-align -Wundef -Wvla -Wformat=2 -Wswitch-enum"
bad=0 refused=0

mkdir -p "$work"
compile() { # LANGUAGE DIALECT SOURCE [option]
    "$compiler" -x "$1" -std="$2" -O2 $warnings ${4:-} -I"$root" -I"$here/.." -c "$3" \
        -o "$work/unit.o" 2>"$work/log"
}
for pair in c:c99 c:c11 c++:c++11 c++:c++17; do
    if ! compile "${pair%:*}" "${pair#*:}" "$here/../typed_unit.c"; then
        echo "typed: tests/typed_unit.c does not compile as ${pair#*:}:"
        cat "$work/log"
        bad=1
    fi
done

# A type may have any name, also one that the macros use themselves, and may be a pointer.
typed() { # HEAD TYPE
    {
        echo '#include "valkey_push.h"'
        echo "$1"
        for kind in MPSC ONESHOT BROADCAST WATCH; do
            echo "VKP_${kind}_TYPED(of_$kind, $2);"
        done
    } >"$work/unit.c"
    for pair in c:c99 c++:c++11; do
        if ! compile "${pair%:*}" "${pair#*:}" "$work/unit.c" -Wno-shadow; then
            echo "typed: does not compile as ${pair#*:} with the type $2"
            bad=1
        fi
    done
}
for name in value values item out count sent raw status typed config tx rx permit self slot; do
    typed "typedef struct $name { int a; } $name;" "$name"
done
typed '' 'const char *'
typed 'struct job;' 'struct job *'

# Each body is right with the first argument, and wrong with the second alone.
try() { # RIGHT WRONG BODY, in which @ stands for either
    for pair in c:c99 c++:c++11; do
        for expression in "$1" "$2"; do
            {
                cat "$work/head"
                echo "$3" | sed "s/@/$expression/"
                echo "}"
            } >"$work/unit.c"
            if compile "${pair%:*}" "${pair#*:}" "$work/unit.c"; then
                compiled=yes
            else
                compiled=no
            fi
            if [ "$expression" = "$1" ] && [ $compiled = no ]; then
                echo "typed: does not compile as ${pair#*:}: $expression in: $3"
                cat "$work/log"
                bad=1
            elif [ "$expression" = "$2" ] && [ $compiled = yes ]; then
                echo "typed: compiles as ${pair#*:}, which it should not: $expression in: $3"
                bad=1
            elif [ "$expression" = "$2" ]; then
                refused=$((refused + 1))
            fi
        done
    done
}
cat >"$work/head" <<'END'
#include "valkey_push.h"
struct job { int a; };
struct other { int a; };
VKP_MPSC_TYPED(jobs, struct job);
VKP_MPSC_TYPED(others, struct other);
VKP_ONESHOT_TYPED(slot, struct job);
VKP_BROADCAST_TYPED(cast, struct job);
VKP_WATCH_TYPED(watch, struct job);
vkp_status use(jobs_tx *tx, jobs_rx *rx, others_tx *other_tx, others_rx *other_rx, slot *s,
               cast_tx *ctx, cast_rx *crx, watch_tx *wtx, watch_rx *wrx, struct job *job,
               struct other *other, vkp_mpsc_permit *permit, size_t *n);
vkp_status use(jobs_tx *tx, jobs_rx *rx, others_tx *other_tx, others_rx *other_rx, slot *s,
               cast_tx *ctx, cast_rx *crx, watch_tx *wtx, watch_rx *wrx, struct job *job,
               struct other *other, vkp_mpsc_permit *permit, size_t *n)
{
    (void)tx, (void)rx, (void)other_tx, (void)other_rx, (void)s, (void)ctx, (void)crx;
    (void)wtx, (void)wrx, (void)job, (void)other, (void)permit, (void)n;
END
try '*job' '*other' 'return jobs_send(tx, @, 0);'
try '*job' 'job' 'return jobs_try_send(tx, @);'
try tx other_tx 'return jobs_try_send(@, *job);'
try tx rx 'return jobs_try_send(@, *job);'
try job other 'return jobs_send_many(tx, @, 1, 0, n);'
try '\&job' '\&other' 'return jobs_reserve(tx, 0, permit, @);'
try job other 'return jobs_recv(rx, 0, @);'
try job other 'return jobs_try_recv(rx, @);'
try rx other_rx 'return jobs_try_recv(@, job);'
try job other 'return jobs_recv_many(rx, 0, @, 1, n);'
try 'jobs_raw_rx(rx)' rx 'return vkp_mpsc_try_recv(@, job);'
try job other 'return jobs_case_recv(rx, @).status;'
try job other 'return jobs_case_send(tx, @).status;'
try 'return jobs_try_send(tx, *job)' 'jobs_try_send(tx, *job); return VKP_OK' '@;'
try '*job' '*other' 'return slot_send(s, @);'
try job other 'return slot_recv(s, 0, @);'
try '*job' '*other' 'return cast_send(ctx, @);'
try job other 'return cast_recv(crx, 0, @);'
try crx wrx 'return cast_try_recv(@, job);'
try '*job' '*other' 'return watch_send(wtx, @);'
try job other 'return watch_get(wrx, @);'
try 'struct job' 'struct other' 'const @ *seen = watch_borrow(wrx); return seen ? VKP_OK : VKP_OK;'
[ $bad = 1 ] || echo "typed: 4 dialects without a warning, $refused wrong uses refused"
exit $bad
