#!/bin/sh
# Builds and runs all tests; installs what is missing first (Debian and its family, or macOS).
# Ends with ctest's summary and its exit code.
set -eu

usage() {
    cat <<'END'
sh tests/run.sh [options]
  --compiler gcc|clang    instead of the system's own
  --sanitize LIST         address,undefined or thread: the whole build
  --all                   the suite three times: as it is, with ASan + UBSan, with TSan
  --fuzz-seconds N        each libFuzzer target for N seconds (needs clang; 0 = none)
  --build-dir DIR         instead of build, build-clang, build-thread, ...
  --label LABEL           only feature, compile, script, corpus, model, fuzz or nested tests
  --no-install            fail instead of installing
END
}

compiler='' sanitize='' all=OFF fuzz_seconds=0 build='' label='' install=yes
while [ $# -gt 0 ]; do
    case $1 in
    --all) all=ON ;;
    --no-install) install=no ;;
    --help | -h)
        usage
        exit 0
        ;;
    --compiler | --sanitize | --fuzz-seconds | --build-dir | --label)
        [ $# -ge 2 ] || { usage >&2; exit 2; }
        case $1 in
        --compiler) compiler=$2 ;;
        --sanitize) sanitize=$2 ;;
        --fuzz-seconds) fuzz_seconds=$2 ;;
        --build-dir) build=$2 ;;
        --label) label=$2 ;;
        esac
        shift
        ;;
    *)
        usage >&2
        exit 2
        ;;
    esac
    shift
done
case $compiler in
'' | gcc | clang) ;;
*)
    usage >&2
    exit 2
    ;;
esac
case $fuzz_seconds in
*[!0-9]* | '')
    usage >&2
    exit 2
    ;;
esac

root=$(cd "$(dirname "$0")/.." && pwd)
system=$(uname -s)
has() { command -v "$1" >/dev/null 2>&1; }

# ---------------------------------------------------------------------------------------------
# What is missing

wants_clang=no
if [ "$compiler" = clang ] || [ $all = ON ] || [ "$fuzz_seconds" -gt 0 ]; then
    wants_clang=yes
fi

has_catch2() {
    if [ "$system" = Darwin ]; then
        brew list catch2 >/dev/null 2>&1
    else
        [ -e /usr/include/catch2/catch.hpp ] || [ -e /usr/include/catch2/catch_all.hpp ] ||
            [ -e /usr/local/include/catch2/catch.hpp ] ||
            [ -e /usr/local/include/catch2/catch_all.hpp ]
    fi
}

clang_links() { # OPTIONS: whether clang's runtime library for them is there
    probe=$(mktemp -d)
    printf 'int LLVMFuzzerTestOneInput(const unsigned char *d, unsigned long n);\n%s\n' \
        'int LLVMFuzzerTestOneInput(const unsigned char *d, unsigned long n)
         { (void)d; (void)n; return 0; }' >"$probe/p.c"
    links=0
    clang "$1" "$probe/p.c" -o "$probe/p" >/dev/null 2>&1 || links=1
    rm -rf "$probe"
    return $links
}

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif has sudo; then
        sudo "$@"
    else
        echo "tests/run.sh: neither root nor sudo: please have that done first" >&2
        exit 1
    fi
}

apt_updated=no
apt_install() {
    if [ $install = no ]; then
        echo "tests/run.sh: missing: $*" >&2
        exit 1
    fi
    echo "tests/run.sh: installing $*"
    if [ $apt_updated = no ]; then
        as_root apt-get update -q
        apt_updated=yes
    fi
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "$@"
}

install_debian() {
    missing=''
    wanted_cc=cc wanted_cxx=c++
    if [ "$compiler" = gcc ] || [ $all = ON ]; then
        wanted_cc=gcc wanted_cxx=g++
    fi
    has $wanted_cc || missing="$missing gcc libc6-dev"
    has $wanted_cxx || missing="$missing g++"
    has cmake || missing="$missing cmake"
    has make || missing="$missing make"
    has_catch2 || missing="$missing catch2"
    has redis-cli || missing="$missing redis-tools"
    has redis-server || has valkey-server || missing="$missing redis-server"
    if [ $wants_clang = yes ]; then
        { has clang && has clang++; } || missing="$missing clang"
        # so that its sanitizers name functions and lines
        has llvm-symbolizer || missing="$missing llvm"
    fi
    [ -z "$missing" ] || apt_install $missing
    # Debian keeps clang's sanitizers and libFuzzer in a package of their own.
    if [ $wants_clang = yes ] && ! clang_links -fsanitize=fuzzer,address; then
        major=$(clang -dumpversion | sed 's/\..*//')
        [ $apt_updated = yes ] || [ $install = no ] || as_root apt-get update -q
        apt_updated=yes
        if apt-cache show "libclang-rt-$major-dev" >/dev/null 2>&1; then
            apt_install "libclang-rt-$major-dev"
        fi
    fi
}

install_macos() {
    if ! xcode-select -p >/dev/null 2>&1; then
        echo "tests/run.sh: there is no compiler; please run: xcode-select --install" >&2
        exit 1
    fi
    missing=''
    has cmake || missing="$missing cmake"
    has redis-server || has valkey-server || missing="$missing redis"
    if ! has brew; then
        echo "tests/run.sh: missing catch2$missing, and Homebrew (brew), which installs them" >&2
        exit 1
    fi
    has_catch2 || missing="$missing catch2"
    [ -z "$missing" ] && return
    if [ $install = no ]; then
        echo "tests/run.sh: missing:$missing" >&2
        exit 1
    fi
    echo "tests/run.sh: installing$missing"
    brew install --quiet $missing
}

if [ "$system" = Darwin ]; then
    install_macos
elif has apt-get; then
    install_debian
else
    for tool in cc c++ cmake make; do
        has $tool || { echo "tests/run.sh: please install $tool" >&2; exit 1; }
    done
    echo "tests/run.sh: no apt-get here: Catch2 and redis-server must be there already"
fi

# ---------------------------------------------------------------------------------------------
# Configure, build, run

set -- -DVKP_TESTS=ON -DVKP_NESTED=$all -DVKP_SANITIZE="$sanitize"
case $compiler in
gcc) set -- "$@" -DCMAKE_C_COMPILER=gcc -DCMAKE_CXX_COMPILER=g++ ;;
clang) set -- "$@" -DCMAKE_C_COMPILER=clang -DCMAKE_CXX_COMPILER=clang++ ;;
esac
if [ "$fuzz_seconds" -gt 0 ] && clang_links -fsanitize=fuzzer,address,undefined; then
    set -- "$@" -DVKP_FUZZ=ON -DVKP_FUZZ_SECONDS="$fuzz_seconds"
else
    [ "$fuzz_seconds" = 0 ] || echo "tests/run.sh: no fuzzing, this clang has no libFuzzer"
    set -- "$@" -DVKP_FUZZ=OFF
fi
if [ -z "$build" ]; then
    build=$root/build${compiler:+-$compiler}${sanitize:+-$(echo "$sanitize" | tr , -)}
fi

jobs=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
cmake -S "$root" -B "$build" "$@"
cmake --build "$build" --parallel "$jobs"
cd "$build"
exec ctest --output-on-failure --no-tests=error -j "$jobs" ${label:+-L "$label"}
