#!/bin/sh
# The names that README.md and docs/*.md give exist: in the header, in a backend, as an option in
# CMakeLists.txt, as a metric of the relay, or in bench/run.sh. check_docs_names.sh ROOT WORK
set -eu
root=$1 work=$2

mkdir -p "$work"
# What ends in an underscore, or mixes its cases (vkp_backend_NAME), stands for many names.
names() {
    cat "$@" | LC_ALL=C tr -cs 'A-Za-z0-9_' '\n' |
        LC_ALL=C sed -n -e '/^vkp_[a-z0-9_]*[a-z0-9]$/p' -e '/^VKP_[A-Z0-9_]*[A-Z0-9]$/p' |
        LC_ALL=C sort -u
}

names "$root/valkey_push.h" "$root"/backends/*.c "$root/CMakeLists.txt" "$root/bench/run.sh" \
    "$root"/examples/*.h \
    >"$work/there.txt"
bad=0 count=0
for file in "$root/README.md" "$root"/docs/*.md "$root"/docs/recipes/*.md; do
    [ -e "$file" ] || continue
    names "$file" >"$work/given.txt"
    count=$((count + $(wc -l <"$work/given.txt")))
    for name in $(LC_ALL=C comm -23 "$work/given.txt" "$work/there.txt"); do
        echo "${file#"$root"/}: there is no $name"
        bad=1
    done
done
if [ "$count" = 0 ]; then
    echo "README.md and docs/ give no names"
    bad=1
fi
[ $bad = 1 ] || echo "$count names"
exit $bad
