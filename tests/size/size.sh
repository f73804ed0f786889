#!/bin/sh
# A program has at most that many bytes of text, and works: size.sh PROGRAM BYTES
set -eu
program=$1 most=$2

"$program"
text=$(size "$program" | awk 'NR == 2 { print $1 }')
echo "$(basename "$program"): $text bytes of text, at most $most"
[ "$text" -le "$most" ]
