#!/bin/sh
# One version everywhere: the header's numbers, its text, CMake's project, the newest entry of the
# changelog: check_version.sh ROOT WORK, with VKP_CMAKE_VERSION in the environment.
set -eu
root=$1

number() {
    sed -n "s/^#define VKP_VERSION_$1 \([0-9]*\)\$/\1/p" "$root/valkey_push.h"
}
version=$(number MAJOR).$(number MINOR).$(number PATCH)
text=$(sed -n 's/^#define VKP_VERSION_STR "\(.*\)"$/\1/p' "$root/valkey_push.h")
newest=$(sed -n 's/^## \[\{0,1\}\([0-9][0-9.]*\).*/\1/p' "$root/CHANGELOG.md" | sed 1q)

bad=0
expect() {
    if [ "$2" != "$version" ]; then
        echo "$1 says '$2', the header's numbers say '$version'"
        bad=1
    fi
}
expect VKP_VERSION_STR "$text"
expect CMakeLists.txt "${VKP_CMAKE_VERSION:-unset}"
expect CHANGELOG.md "$newest"
[ $bad = 1 ] || echo "$version"
exit $bad
