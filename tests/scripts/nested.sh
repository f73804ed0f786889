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
cd "$build"

# ThreadSanitizer of some releases cannot live with the address randomization of newer kernels.
case "$* " in
*-DVKP_SANITIZE=thread*)
    if setarch "$(uname -m)" -R true 2>/dev/null; then
        exec setarch "$(uname -m)" -R ctest --output-on-failure --no-tests=error -j "$jobs"
    fi
    ;;
esac
exec ctest --output-on-failure --no-tests=error -j "$jobs"
