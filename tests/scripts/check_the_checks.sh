#!/bin/sh
# Each check finds the defect it is there for: a copy of the tree's text gets one, and the check
# must fail, with the file or name in its message: check_the_checks.sh ROOT WORK
set -eu
root=$1 work=$2
here=$root/tests/scripts
failures=$work/failures

mkdir -p "$work"
: >"$failures"
: >"$work/seeded"
complain() {
    echo "$1" | tee -a "$failures"
}

# seed_in FILE CHECK EXPECTED [ARGUMENTS of the check]: FILE of the tree, with a defect, comes on
# standard input
seed_in() {
    file=$1 check=$2 expected=$3
    shift 3
    rm -rf "$work/tree"
    mkdir -p "$work/tree/packaging"
    cp -R "$root/backends" "$root/docs" "$root/examples" "$root/src" "$root/packaging" \
        "$root/tests" "$root/bench" "$work/tree/"
    cp "$root"/packaging/*.1 "$work/tree/packaging/"
    cp "$root/CHANGELOG.md" "$root/CMakeLists.txt" "$root/README.md" "$root/valkey_push.h" \
        "$work/tree/"
    cat >"$work/tree/$file"
    if cmp -s "$root/$file" "$work/tree/$file"; then
        complain "$check: the defect was not seeded ($expected)"
    elif sh "$here/check_$check.sh" "$work/tree" "$work/$check" "$@" >"$work/output" 2>&1; then
        complain "$check: missed the defect ($expected)"
    elif ! grep -qF -- "$expected" "$work/output"; then
        complain "$check: failed, but not for $expected:"
        cat "$work/output"
    fi
    echo "$check" >>"$work/seeded"
}
# seed CHECK EXPECTED: the same for the header
seed() {
    seed_in valkey_push.h "$@"
}
header=$root/valkey_push.h
before_end='#endif /* VALKEY_PUSH_H */'

# Code put behind the includes of the implementation.
implement() {
    CODE=$1 awk '{ print }
        /^#define VKP_I_IMPLEMENTED/ { print "extern int vkp_seed_declared;\n" ENVIRON["CODE"] }' \
        "$header"
}
lines() { awk "BEGIN { for (i = 0; i < $1; i++) print \"    ;\" }"; }

sed 's/^       >>config .*/& >>nowhere/' "$header" | seed toc '>>nowhere: 0 sections'
awk -v end="$before_end" '$0 == end { print "/* >>surplus */" } { print }' "$header" |
    seed toc '>>surplus: not in the table'
awk -v end="$before_end" '$0 == end { print "\nVKP_API int vkp_seed(void);\n" } { print }' \
    "$header" | seed contracts 'no contract of its own: VKP_API int vkp_seed(void);'
implement 'int seed(void); int seed(void) { return 0; }' | seed symbols 'seed'
implement 'int vkp_i_seed(void); int vkp_i_seed(void) { return 0; }' | seed symbols 'vkp_i_seed'
awk -v end="$before_end" '$0 == end { print "#define SEED 1" } { print }' "$header" |
    seed macros 'SEED'
awk -v end="$before_end" '$0 == end { print "#define VKP_I_SEED 1" } { print }' "$header" |
    seed macros 'VKP_I_SEED'
implement "static int vkp_i_seed(int a)
{
$(lines 90)
}
" | seed lengths 'static int vkp_i_seed(int a)'
implement "static int vkp_i_seed(int a,
    int b) {
$(lines 90)
}
" | seed lengths 'static int vkp_i_seed(int a,'
awk '{ print } NR == 3 { printf "%101s\n", "x" }' "$header" | seed lengths '101 columns'
awk '{ print } NR == 3 { print "x " }' "$header" | seed lengths 'blanks at the end'
awk -v end="$before_end" '$0 == end { print "#include <signal.h>" } { print }' "$header" |
    seed macros 'signal.h'
sed "s/needs GCC or Clang/seed/" "$header" | seed errors 'needs GCC or Clang'
sed 's/vkp_oneshot_is_closed/vkp_oneshot_seed/g' "$header" |
    seed docs_names 'docs/tokio-to-c.md: there is no vkp_oneshot_is_closed'
awk '{ print } NR == 3 { print "seed" }' "$header" | seed parts 'edit src/, then run'
awk '/^static void vkp_i_map_deinit/ { print "static void seed(void) { vkp_conn_close(NULL); }" }
    { print }' "$root/src/map.c" | seed_in src/map.c layers 'vkp_conn_close' map.c
awk '/^static void vkp_i_waiters_init/ {
        print "static void seed(vkp_loop *loop) { vkp_loop_close(loop); }" }
    { print }' "$root/src/park.c" | seed_in src/park.c layers 'vkp_loop_close' park.c
sed 's/VKP_RESP_PUSH/VKP_RESP_SEED/' "$header" | seed enums 'VKP_RESP_PUSH'
sed 's/((vkp_resp_type)VKP_RESP_PUSH)/((int)VKP_RESP_PUSH)/' "$header" |
    seed enums 'no warning for: status == VKP_RESP_PUSH'
if command -v clang >/dev/null 2>&1; then # gcc warns of a bare enumerator too
    sed 's/((vkp_resp_type)VKP_RESP_PUSH)/VKP_RESP_PUSH/' "$header" |
        seed enums 'no warning for: status == VKP_RESP_PUSH'
fi
sed 's/^#define VKP_API_DATA VKP_API$/#define VKP_API_DATA extern/' "$header" |
    seed visibility 'vkp_backend_poll'
awk '{ print } /^\/\* Give/ && !n++ { print "   a census of it is in the"; }' "$root/src/loop.h" |
    seed_in src/loop.h words 'not: census'
sed 's,(docs/relay.md),(docs/seed.md),' "$root/README.md" |
    seed_in README.md readme 'README.md links to docs/seed.md'
sed 's/^  - "mpsc: /&seed /' "$root/docs/guarantees.md" |
    seed_in docs/guarantees.md guarantees 'names a test that is not in'
sed 's/name##_value value) /int value) /' "$header" |
    seed typed 'does not compile as c99: *job in: return watch_send'
awk '{ print } /^#include <unistd.h>/ { print "typedef int seed;" }' "$root/src/platform.c" |
    seed_in src/platform.c parts 'edit src/, then run'
VKP_CMAKE_VERSION=$(sed -n 's/^#define VKP_VERSION_STR "\(.*\)"$/\1/p' "$header")
export VKP_CMAKE_VERSION
sed 's/^#define VKP_VERSION_PATCH .*/#define VKP_VERSION_PATCH 999/' "$header" |
    seed version 'VKP_VERSION_STR says'

usage=examples/relay.c manual=packaging/valkey-push-relay.1 reference=docs/relay.md
sed '/^\.BI \\-\\-linger/d' "$root/$manual" |
    seed_in "$manual" relay_options "$manual: --linger is missing"
sed 's/\\-\\-user " NAME"/\\-\\-user " USER"/' "$root/$manual" |
    seed_in "$manual" relay_options "$manual: --user takes \"USER\""
sed 's/^Default: 16384\./Default: 16385./' "$root/$manual" |
    seed_in "$manual" relay_options "$manual: default of --max-clients: \"16385\""
sed '/^| `--check-files MS`/d' "$root/$reference" |
    seed_in "$reference" relay_options "$reference: --check-files is missing"
sed 's/^| `--log LEVEL` | warn/| `--log LEVEL` | info/' "$root/$reference" |
    seed_in "$reference" relay_options "$reference: default of --log: \"info\""
sed 's/^| `--on-full POLICY`/| `--on-seed POLICY`/' "$root/$reference" |
    seed_in "$reference" relay_options "$reference: --on-seed is not in --help"
sed 's/strcmp(name, "--user")/strcmp(name, "--seed")/' "$root/$usage" |
    seed_in "$usage" relay_options "$usage: --seed is read, and is not in --help"
sed 's/"  --threads N /"  --strands N /' "$root/$usage" |
    seed_in "$usage" relay_options "$reference: --threads is not in --help"
sed 's/{"--backend", BACKENDS, false}/{"--seed", BACKENDS, false}/' "$root/$usage" |
    seed_in "$usage" relay_options "option_values and --help differ in --backend"

# The excuse counts.
implement "/* long: a table */
static int vkp_i_seed(int a)
{
$(lines 90)
}
" >"$work/tree/valkey_push.h"
if sh "$here/check_lengths.sh" "$work/tree" "$work/lengths" | grep -F 'vkp_i_seed'; then
    complain "lengths: does not accept long:"
fi
for file in "$here"/check_*.sh; do
    name=$(basename "$file" .sh)
    name=${name#check_}
    [ "$name" = the_checks ] || grep -qx "$name" "$work/seeded" ||
        complain "$name: no defect is seeded here"
done
[ ! -s "$failures" ]
echo "$(wc -l <"$work/seeded") defects found"
