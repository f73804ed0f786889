#!/bin/sh
# Builds and runs test programs of the suite for another processor: units.sh PREFIX EMULATOR ROOT
# WORK TEST..., where the compilers are PREFIX-gcc and PREFIX-g++. Tests that start the relay or a
# server are not for it: an emulator runs one program. Exit 77: a tool is not here.
set -eu
prefix=$1 emulator=$2 root=$3 work=$4
shift 4
. "$root/tests/compile/target.sh"

for tool in "$prefix-gcc" "$prefix-g++"; do
    command -v "$tool" >/dev/null 2>&1 || { echo "$tool is not here"; exit 77; }
done
mkdir -p "$work"
find_runner "$prefix-g++" "$emulator" "$work" || { echo "$emulator is not here"; exit 77; }

link_flags=-static
case $prefix in
# The linker takes minutes to shorten the calls in programs as large as Catch2 makes them.
riscv*) link_flags='-static -Wl,--no-relax' ;;
esac
cmake -S "$root" -B "$work" -DCMAKE_BUILD_TYPE=Release -DCMAKE_SYSTEM_NAME=Linux \
    -DCMAKE_SYSTEM_PROCESSOR="${prefix%%-*}" \
    -DCMAKE_C_COMPILER="$prefix-gcc" -DCMAKE_CXX_COMPILER="$prefix-g++" \
    -DCMAKE_EXE_LINKER_FLAGS="$link_flags" -DCMAKE_CROSSCOMPILING_EMULATOR="$runner" \
    -DCMAKE_C_FLAGS="${FLAGS:-}" -DCMAKE_CXX_FLAGS="${FLAGS:-}" -DVKP_TESTS=ON -DVKP_CHECKS=OFF \
    -DVKP_EXAMPLES=OFF -DVKP_INSTALL=OFF -DVKP_DEVELOPER=OFF >"$work/configure.log" 2>&1 || {
    cat "$work/configure.log"
    exit 1
}
targets='' names=''
for test in "$@"; do
    case $test in
    corpus.*) targets="$targets fuzz_${test#*.}_corpus" ;;
    backend_conformance) targets="$targets $test" ;;
    *) targets="$targets test_$test" ;;
    esac
    names="$names${names:+|}$test"
done
cmake --build "$work" --target $targets >"$work/build.log" 2>&1 || {
    cat "$work/build.log"
    exit 1
}
cd "$work"
VKP_TEST_PATIENCE=${VKP_TEST_PATIENCE:-180} \
    ctest --output-on-failure --no-tests=error -R "^($names)\$" >"$work/tests.log" 2>&1 || {
    cat "$work/tests.log"
    exit 1
}
# A test that was not built would be missing, not failing.
if [ "$(grep -c ' Passed ' "$work/tests.log")" != $# ]; then
    cat "$work/tests.log"
    echo "$# tests were expected"
    exit 1
fi
echo "$("$prefix-gcc" --version | sed 1q)${runner:+, $runner}: $# test programs passed"
