#!/bin/sh
# The prose of the header's parts and of the documents is spelled right (codespell, with the words
# of tests/words/known.txt), and has none of the words of tests/words/banned.txt, which says what to
# write instead: check_words.sh ROOT WORK
set -eu
root=$1 work=$2
here=$(cd "$(dirname "$0")/.." && pwd)/words

mkdir -p "$work"
bad=0
# Comments of the parts, as "FILE:LINE: text"; documents whole, but for their code and quoted names.
: >"$work/prose.txt"
for file in "$root"/src/*.[ch] "$root"/backends/*.[ch]; do
    LC_ALL=C awk -v file="${file#"$root"/}" '
        {
            line = $0
            text = ""
            while (line != "") {
                if (!inside) {
                    at = index(line, "/*")
                    if (!at) break
                    line = substr(line, at + 2)
                    inside = 1
                }
                at = index(line, "*/")
                if (at) {
                    text = text " " substr(line, 1, at - 1)
                    line = substr(line, at + 2)
                    inside = 0
                } else {
                    text = text " " line
                    line = ""
                }
            }
            if (text != "") print file ":" FNR ": " text
        }' "$file" >>"$work/prose.txt"
done
for file in "$root"/*.md "$root"/docs/*.md "$root"/docs/recipes/*.md; do
    case $file in
    "$root"/CHANGELOG.md | "$root"/docs/benchmarks*.md | *'*'*) continue ;; # old names; tables
    esac
    LC_ALL=C awk -v file="${file#"$root"/}" '
        /^```/ { code = !code; next }
        !code {
            gsub(/`[^`]*`/, "")
            gsub(/"[^"]*"/, "")
            print file ":" FNR ": " $0
        }' "$file" >>"$work/prose.txt"
done

sed -e '/^#/d' -e '/^$/d' "$here/banned.txt" >"$work/banned.txt"
tab=$(printf '\t')
while IFS=$tab read -r words better; do
    if LC_ALL=C grep -iE "^[^ ]*: (.*[^a-z_])?($words)([^a-z_].*)?\$" "$work/prose.txt" \
        >"$work/found"; then
        cut -c1-150 "$work/found"
        echo "not: $words; but: $better"
        bad=1
    else
        [ $? = 1 ] || bad=1 # no expression
    fi
done <"$work/banned.txt"

if command -v codespell >/dev/null 2>&1; then
    if ! codespell --ignore-words "$here/known.txt" "$work/prose.txt"; then
        echo "misspelled, or a word for tests/words/known.txt (lines of $work/prose.txt)"
        bad=1
    fi
else
    echo "codespell is not here: spelling was not checked"
    [ $bad = 1 ] || exit 77
fi
[ $bad = 1 ] || echo "$(wc -l <"$work/prose.txt") lines of prose"
exit $bad
