#!/bin/sh
# Runs a Catch2 program again and again, each time with its tests in another order, and under load:
# repeat.sh ROUNDS PROGRAM [arguments]. In each round twice as many copies as there are processors
# run at once. The seeds of copies that fail are printed.
set -eu
rounds=$1
shift
jobs=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

seed=$(date +%s)
round=0 failed=0
while [ $round -lt "$rounds" ]; do
    copies=''
    for _ in $(seq $((jobs * 2))); do
        seed=$((seed + 1))
        "$@" --order rand --rng-seed $seed >"$work/$seed" 2>&1 &
        copies="$copies $!:$seed"
    done
    for copy in $copies; do
        wait "${copy%:*}" || {
            failed=$((failed + 1))
            echo "failed: $* --order rand --rng-seed ${copy#*:}"
            cat "$work/${copy#*:}"
        }
    done
    round=$((round + 1))
done
echo "$((rounds * jobs * 2)) runs, $failed failed"
[ $failed = 0 ]
