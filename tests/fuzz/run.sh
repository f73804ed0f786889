#!/bin/sh
# Runs one libFuzzer program: run.sh PROGRAM FUZZ-FOLDER NAME FOUND-FOLDER SECONDS
# Fails when it finds something, and when it did not really run: the corpus must reach code.
set -eu
program=$1 folder=$2 name=$3 found=$4 seconds=$5

mkdir -p "$found"
set -- -max_total_time="$seconds" -timeout=10 -rss_limit_mb=1024 -print_final_stats=1 \
    -artifact_prefix="$found/"
if [ -f "$folder/$name.dict" ]; then
    set -- "$@" -dict="$folder/$name.dict"
fi
set -- "$@" "$found"
if [ -d "$folder/corpus/$name" ]; then
    set -- "$@" "$folder/corpus/$name"
fi

log=$found/../fuzz_$name.log
if ! "$program" "$@" >"$log" 2>&1; then
    tail -n 60 "$log"
    echo "fuzz.$name: failed; the input is in $found"
    exit 1
fi
runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
edges=$(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' "$log" | tail -n 1)
echo "fuzz.$name: ${runs:-0} runs, ${edges:-0} edges"
[ "${runs:-0}" -ge 1000 ] && [ "${edges:-0}" -ge 20 ]
