#!/bin/sh
# Every >>token of the header's table of contents stands below it exactly once, and no other does:
# check_toc.sh ROOT WORK
set -eu
LC_ALL=C awk '
    /^\*\// && !below { below = 1 }
    {
        line = $0
        while (match(line, />>[a-z]+(-[a-z]+)*/)) {
            token = substr(line, RSTART, RLENGTH)
            line = substr(line, RSTART + RLENGTH)
            if (below) { found[token]++ } else { listed[token]++; count++ }
        }
    }
    END {
        if (count == 0) { print "there is no table of contents"; bad = 1 }
        for (token in listed) {
            if (listed[token] > 1) { print token ": listed twice"; bad = 1 }
            if (found[token] != 1) { print token ": " found[token] + 0 " sections"; bad = 1 }
        }
        for (token in found)
            if (!(token in listed)) { print token ": not in the table of contents"; bad = 1 }
        if (!bad) print count " sections"
        exit bad
    }' "$1/valkey_push.h"
