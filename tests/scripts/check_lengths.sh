#!/bin/sh
# No function of the header or of a backend is longer than 80 lines, unless the comment above it
# says "long:" and why; no line of any source is longer than 100 columns, ends in blanks or holds a
# tab: check_lengths.sh ROOT WORK
set -eu
export LC_ALL=C
root=$1
bad=0

# A function: a text in column 1 with a parenthesis, then a line that ends in its opening brace,
# until the closing brace in column 1.
awk '
    FNR == 1 { start = head = excused = 0 }
    !start && /^[A-Za-z_].*\(/ { head = FNR; name = $0 }
    !start && head && /(^|\) *)\{$/ { start = head }
    !start && /long:/ { excused = 1 }
    !start && /^$/ { head = excused = 0 }
    !start && /;$/ { head = 0 }
    start && /^}/ {
        functions++
        if (FNR - start + 1 > 80 && !excused) {
            print FILENAME ":" start ": " FNR - start + 1 " lines: " name
            bad = 1
        }
        start = head = excused = 0
    }
    END { print functions + 0 " functions"; exit bad }' \
    "$root/valkey_push.h" "$root"/backends/*.c || bad=1

# Columns, not bytes: the later bytes of a UTF-8 character do not count.
find "$root" -path "$root/build*" -prune -o -path "$root/.git" -prune -o \
    -type f \( -name '*.[ch]' -o -name '*.cpp' -o -name '*.sh' -o -name '*.cmake' -o \
    -name CMakeLists.txt -o -path "$root/.ci/run" \) -exec awk '
        { gsub(/[\200-\277]/, "") }
        length($0) > 100 { print FILENAME ":" FNR ": " length($0) " columns"; bad = 1 }
        /[ \t]$/ { print FILENAME ":" FNR ": blanks at the end"; bad = 1 }
        /\t/ { print FILENAME ":" FNR ": a tab"; bad = 1 }
        END { exit bad }' {} + || bad=1
exit $bad
