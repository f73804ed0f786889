#!/bin/sh
# Builds and runs the whole suite in a folder of its own: nested.sh SOURCE BUILD [cmake options]
# The text checks are left out (they do not depend on the build); no tests at all is a failure.
set -eu
source=$1 build=$2
shift 2

jobs=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
cmake -S "$source" -B "$build" -DVKP_DEVELOPER=OFF -DVKP_TESTS=ON -DVKP_CHECKS=OFF \
    -DVKP_NESTED=OFF "$@"
cmake --build "$build" --parallel "$jobs"
exec sh "$source/tests/scripts/ctest.sh" "$build"
