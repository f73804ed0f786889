#!/bin/sh
# The README's first C program is an example of this tree, verbatim, the README is short, and files
# that it and docs/ link to exist: check_readme.sh ROOT WORK
set -eu
root=$1 work=$2

mkdir -p "$work"
lines=$(wc -l <"$root/README.md")
if [ "$lines" -gt 170 ]; then
    echo "README.md has $lines lines, at most 170: references belong into docs/"
    exit 1
fi
find "$root" -path "$root/build*" -prune -o -path "$root/.git" -prune -o -name '*.md' -print |
    while read -r file; do
        grep -o ']([^)#:]*[)#]' "$file" | sed 's/^](//; s/[)#]$//' | while read -r link; do
            [ -z "$link" ] || [ -e "$(dirname "$file")/$link" ] ||
                echo "${file#"$root"/} links to $link, which is not there"
        done
    done >"$work/links.txt"
if [ -s "$work/links.txt" ]; then
    cat "$work/links.txt"
    exit 1
fi
awk '/^```c$/ { inside = 1; next } /^```$/ && inside { exit } inside' "$root/README.md" \
    >"$work/program.c"
if ! grep -q '^int main(' "$work/program.c"; then
    echo "README.md has no C program"
    exit 1
fi
for example in "$root"/examples/*.c; do
    # Whether the program's lines stand in the example, one after the other.
    if awk 'NR == FNR { want[++count] = $0; next }
        { have[FNR] = $0 }
        END {
            for (start = 1; start + count - 1 <= FNR; start++) {
                for (i = 1; i <= count && have[start + i - 1] == want[i]; i++) {}
                if (i > count) exit 0
            }
            exit 1
        }' "$work/program.c" "$example"; then
        echo "README.md shows ${example#"$root"/}"
        exit 0
    fi
done
echo "the README's first program is not in examples/"
exit 1
