#!/bin/sh
# Every VKP_API declaration has a comment of its own, directly above it, which names the threads it
# may be called from: check_contracts.sh ROOT WORK
set -eu
LC_ALL=C awk '
    /^#endif \/\* VALKEY_PUSH_H/ { exit }
    /^\/\*/ { text = ""; inside = 1 }
    inside {
        text = text " " $0
        if (/\*\/ *$/) { inside = 0; comment = FNR }
        next
    }
    /^VKP_API / {
        count++
        if (comment != FNR - 1) {
            print FILENAME ":" FNR ": no contract of its own: " $0
            bad = 1
        } else if (text !~ /[Tt]hread/) {
            print FILENAME ":" FNR ": the contract names no thread: " $0
            bad = 1
        }
    }
    END {
        if (count == 0) { print "no VKP_API declarations"; bad = 1 }
        if (!bad) print count " declarations"
        exit bad
    }' "$1/valkey_push.h"
