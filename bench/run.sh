#!/bin/sh
# sh bench/run.sh PROGRAM|all [rounds [part of a group's name]]
# PROGRAM: channels oneshot broadcast watch loop reader subscriber fanout sockets uring
# Builds ours and every peer that is installed (on Debian as root it installs those that are
# missing), and prints the program's tables. VKP_BENCH_BUILD names the build folder,
# VKP_BENCH_SERVER another server than redis-server, VKP_BENCH_FOLDER where sockets has its files
# (default: /dev/shm, else /tmp).
set -eu

usage() {
    sed -n '2,7s/^# //p' "$0" >&2
    exit 2
}

root=$(cd "$(dirname "$0")/.." && pwd)
build=${VKP_BENCH_BUILD:-$root/build-bench}
[ $# -ge 1 ] || usage
case $1 in
channels | oneshot | broadcast | watch | loop | reader | subscriber | fanout | sockets | uring)
    programs=$1
    ;;
all) programs='channels oneshot broadcast watch loop reader subscriber fanout sockets uring' ;;
*) usage ;;
esac
shift
rounds=${1:-7}
[ $# -eq 0 ] || shift

install_peers() {
    command -v apt-get >/dev/null 2>&1 && [ "$(id -u)" -eq 0 ] || return 0
    missing=
    packages='cmake pkg-config libhiredis-dev libevent-dev libev-dev libuv1-dev redis-server strace'
    case $programs in
    reader | subscriber | fanout | uring) ;;
    *)
        packages="$packages librust-tokio-dev librust-parking-lot-dev"
        packages="$packages librust-crossbeam-channel-dev librust-flume-dev"
        packages="$packages librust-async-channel-dev librust-async-broadcast-dev"
        command -v cargo >/dev/null 2>&1 || packages="$packages cargo"
        ;;
    esac
    case $programs in
    reader | subscriber | fanout | sockets | uring) ;;
    *)
        packages="$packages g++ libck-dev libglib2.0-dev libaprutil1-dev libapr1-dev libzmq3-dev"
        packages="$packages libnng-dev libconcurrentqueue-dev golang-go"
        ;;
    esac
    for package in $packages; do
        dpkg -s "$package" >/dev/null 2>&1 || missing="$missing $package"
    done
    [ -z "$missing" ] && return 0
    # One word per package: the list must be split.
    # shellcheck disable=SC2086
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $missing; } >&2 ||
        echo "run.sh: could not install:$missing; their rows are left out" >&2
}

# Rust's sources come from Debian's packages (peers/rust/.cargo), so nothing is fetched; built in
# the build folder, as cargo writes beside its manifest.
build_rust() {
    command -v cargo >/dev/null 2>&1 && [ -d /usr/share/cargo/registry ] || return 0
    rm -rf "$build/rust/src" "$build/bench/peers/rust" # nothing of an older state
    mkdir -p "$build/rust"
    cp -R "$root/bench/peers/rust/." "$build/rust/"
    if (cd "$build/rust" && cargo build --release --offline); then
        cp "$build/rust/target/release/rust" "$build/bench/peers/rust"
    else
        echo "run.sh: could not build Rust's peers; their rows are left out" >&2
    fi
}

build_go() {
    command -v go >/dev/null 2>&1 || return 0
    rm -f "$build/bench/peers/go"
    (cd "$root/bench/peers/go" && go build -buildvcs=false -o "$build/bench/peers/go" .) ||
        echo "run.sh: could not build Go's peer; its rows are left out" >&2
}

install_peers
{
    cmake -S "$root" -B "$build" -DVKP_DEVELOPER=OFF -DCMAKE_BUILD_TYPE=Release \
        -DVKP_BENCH=ON -DVKP_TESTS=OFF -DVKP_EXAMPLES=OFF
    cmake --build "$build"
    case $programs in
    reader | subscriber | fanout | uring) ;;
    sockets) build_rust ;;
    *)
        build_rust
        build_go
        ;;
    esac
} >&2

commit=$(git -C "$root" rev-parse --short HEAD 2>/dev/null || echo 'not committed')
load=$(uptime | sed 's/.*average[s]*: //')
echo "commit $commit, $(date -u +%Y-%m-%d), load average $load"
for program in $programs; do
    case $program in
    subscriber | fanout)
        command -v "${VKP_BENCH_SERVER:-redis-server}" >/dev/null 2>&1 || {
            echo "run.sh: $program needs redis-server" >&2
            exit 1
        }
        ;;
    esac
    "$build/bench/$program" "$rounds" "$@"
done
