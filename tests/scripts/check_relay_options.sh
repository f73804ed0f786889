#!/bin/sh
# The relay's options are the same in --help, in its manual page and in docs/relay.md, with the
# same arguments, and the same defaults where two of them give one; and the program reads them:
# check_relay_options.sh ROOT WORK
set -eu
export LC_ALL=C
root=$1 work=$2

mkdir -p "$work"
source=examples/relay.c manual=packaging/valkey-push-relay.1 document=docs/relay.md

# Each of these writes lines "OPTION|ARGUMENT|TEXT"; a default stands in the text behind
# "default: ", up to a full stop, a comma, a semicolon or a parenthesis.

# The string literals of the usage texts. An option begins in column 3, its text goes on below.
from_help() {
    awk '
        /^static const char usage_[a-z_]*\[\]/ { inside = 1; next }
        !inside { next }
        {
            line = ""
            count = split($0, part, "\"")
            for (i = 2; i <= count; i += 2) line = line part[i]
            sub(/\\n$/, "", line)
        }
        line ~ /^  --/ {
            if (option != "") print option "|" argument "|" text
            split(line, word, " ")
            option = word[1]
            argument = word[2] ~ /^[A-Z]+$/ ? word[2] : ""
            text = ""
        }
        line !~ /^  / && option != "" { print option "|" argument "|" text; option = "" }
        { sub(/^ +/, "", line); text = text " " line }
        /;$/ {
            if (option != "") print option "|" argument "|" text
            option = ""
            inside = 0
        }' "$root/$source"
}

# .TP, then .B or .BI with the option, then its text.
from_manual() {
    awk '
        { gsub(/\\-/, "-") }
        /^\.S[HS] / && option != "" { print option "|" argument "|" text; option = "" }
        /^\.BI? --/ && tagged {
            if (option != "") print option "|" argument "|" text
            gsub(/"/, "")
            option = $2
            argument = $3
            text = ""
        }
        { tagged = /^\.TP/ }
        /^\.[A-Z]+ / { sub(/^\.[A-Z]+ /, "") }
        { sub(/Default: /, "default: "); text = text " " $0 }
        END { if (option != "") print option "|" argument "|" text }' "$root/$manual"
}

# Rows of tables whose first cell is an option: | `--name ARG` | default | unit | meaning |
from_document() {
    awk -F ' *[|] *' '
        /^\| `--/ {
            gsub(/`/, "")
            split($2, word, " ")
            print word[1] "|" word[2] "|" ($3 != "" ? "default: " $3 : "")
        }' "$root/$document"
}

# "OPTION|ARGUMENT|DEFAULT", sorted.
table() {
    awk -F '|' '{
        given = ""
        if (match($3, /default: [^.,;()]*/)) given = substr($3, RSTART + 9, RLENGTH - 9)
        sub(/ +$/, "", given)
        print $1 "|" $2 "|" given
    }' | sort -t '|' -k 1,1 >"$work/$1.txt"
}

# compare FILE TABLE: FILE has the options of --help, each once.
compare() {
    awk -F '|' -v file="$1" '
        function complain(text) { print file ": " text; bad = 1 }
        NR == FNR { known[$1] = 1; argument[$1] = $2; default_[$1] = $3; next }
        count[$1]++ { complain($1 " is listed twice"); next }
        !($1 in known) { complain($1 " is not in --help"); next }
        $2 != argument[$1] {
            complain($1 " takes \"" $2 "\", in --help \"" argument[$1] "\"")
        }
        $3 != "" && default_[$1] != "" && $3 != default_[$1] {
            complain("default of " $1 ": \"" $3 "\", in --help \"" default_[$1] "\"")
        }
        END {
            for (option in known) if (!(option in count)) complain(option " is missing")
            exit bad
        }' "$work/help.txt" "$2"
}

bad=0
from_help | table help
if ! [ "$(wc -l <"$work/help.txt")" -gt 10 ]; then
    echo "$source: no usage text with options"
    exit 1
fi
for option in $(cut -d '|' -f 1 "$work/help.txt" | uniq -d); do
    echo "$source: $option is listed twice in --help"
    bad=1
done

from_manual | table manual
from_document | table document
compare "$manual" "$work/manual.txt" || bad=1
compare "$document" "$work/document.txt" || bad=1
# Two files that agree with --help may still differ where --help gives no default.
join -t '|' -o 1.1,1.3,2.3 "$work/manual.txt" "$work/document.txt" |
    awk -F '|' -v files="$manual and $document" '
        $2 != "" && $3 != "" && $2 != $3 {
            print files ": default of " $1 ": \"" $2 "\" and \"" $3 "\""
            bad = 1
        }
        END { exit bad }' || bad=1

# What the program compares an argument with, and what it has a message for.
sed -n -e 's/.*strcmp([^"]*, "\(--[a-z-]*\)").*/\1/p' -e 's/^ *{"\(--[a-z-]*\)", &.*/\1/p' \
    "$root/$source" | sort -u >"$work/read.txt"
sed -n 's/^ *{"\(--[a-z-]*\)", [^&].*/\1/p' "$root/$source" | sort -u >"$work/expected.txt"
printf -- '--help\n--version\n' | sort - "$work/expected.txt" -o "$work/expected.txt"
cut -d '|' -f 1 "$work/help.txt" | sort -u >"$work/options.txt"
for option in $(comm -13 "$work/options.txt" "$work/read.txt"); do
    echo "$source: $option is read, and is not in --help"
    bad=1
done
for option in $(comm -23 "$work/options.txt" "$work/read.txt"); do
    echo "$source: $option is in --help, and is not read"
    bad=1
done
for option in $(comm -3 "$work/options.txt" "$work/expected.txt"); do
    echo "$source: option_values and --help differ in $option"
    bad=1
done
[ $bad = 1 ] || echo "$(wc -l <"$work/options.txt") options"
exit $bad
