#!/bin/sh
# sh bench/run.sh reader|subscriber|fanout|all [rounds [part of a group's name]]
# Builds ours and every peer that is installed (on Debian as root it installs those that are
# missing), and prints one table per program. VKP_BENCH_BUILD names the build folder,
# VKP_BENCH_SERVER another server than redis-server.
set -eu

usage() {
    sed -n '2,5s/^# //p' "$0" >&2
    exit 2
}

root=$(cd "$(dirname "$0")/.." && pwd)
build=${VKP_BENCH_BUILD:-$root/build-bench}
[ $# -ge 1 ] || usage
case $1 in
reader | subscriber | fanout) programs=$1 ;;
all) programs='reader subscriber fanout' ;;
*) usage ;;
esac
shift
rounds=${1:-7}
[ $# -eq 0 ] || shift

install_peers() {
    command -v apt-get >/dev/null 2>&1 && [ "$(id -u)" -eq 0 ] || return 0
    missing=
    for package in cmake libhiredis-dev libevent-dev libev-dev libuv1-dev redis-server strace; do
        dpkg -s "$package" >/dev/null 2>&1 || missing="$missing $package"
    done
    [ -z "$missing" ] && return 0
    # One word per package: the list must be split.
    # shellcheck disable=SC2086
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $missing; } >&2 ||
        echo "run.sh: could not install:$missing; their rows are left out" >&2
}

install_peers
{
    cmake -S "$root" -B "$build" -DCMAKE_BUILD_TYPE=Release -DVKP_BENCH=ON -DVKP_TESTS=OFF \
        -DVKP_EXAMPLES=OFF
    cmake --build "$build"
} >&2

commit=$(git -C "$root" rev-parse --short HEAD 2>/dev/null || echo 'not committed')
load=$(uptime | sed 's/.*average[s]*: //')
echo "commit $commit, $(date -u +%Y-%m-%d), load average $load"
for program in $programs; do
    if [ "$program" != reader ] &&
        ! command -v "${VKP_BENCH_SERVER:-redis-server}" >/dev/null 2>&1; then
        echo "run.sh: $program needs redis-server" >&2
        exit 1
    fi
    "$build/bench/$program" "$rounds" "$@"
done
