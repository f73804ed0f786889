#!/bin/sh
# Every VKP_API declaration has its contract: a comment that opens the paragraph it stands in, or
# one behind it (accessors): check_contracts.sh ROOT WORK
set -eu
LC_ALL=C awk '
    /^#endif \/\* VALKEY_PUSH_H/ { exit }
    /^$/ && !comment { covered = 0 }
    /^\/\*/ { comment = 1 }
    comment {
        if (/\*\/$/) { comment = 0; covered = 1 }
        next
    }
    /^VKP_API / { count++; name = $0; line = FNR; open = 1 }
    open && /;/ {
        open = 0
        if (!covered && !/; *\/\*/) {
            print FILENAME ":" line ": no contract: " name
            bad = 1
        }
    }
    END {
        if (count == 0) { print "no VKP_API declarations"; bad = 1 }
        if (!bad) print count " declarations"
        exit bad
    }' "$1/valkey_push.h"
