#!/bin/sh
# The build files and programs that docs/recipes/ shows, built and run as they stand on the pages;
# and line 1 of each recipe's program, as its reader runs it. Exit 0, or 1. A part whose tool
# (meson, rustc, libuv) is not installed is left out, with a line that names the tool.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d "${TMPDIR:-/tmp}/vkp-recipes.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
CC=${CC:-cc} CXX=${CXX:-c++}

has() { command -v "$1" >/dev/null 2>&1; }
fail() {
    echo "recipes: $*" >&2
    exit 1
}

# Writes into FOLDER each block of the page whose first line is a comment that names a file.
files_of() { # PAGE FOLDER
    mkdir -p "$2"
    awk -v folder="$2" '
        /^```/ { inside = !inside; first = inside; file = ""; next }
        first {
            first = 0
            if ($0 ~ /^(#|\/\/|\/\*) [A-Za-z_.]+( \*\/)?$/) { # "/* app.c */"
                file = folder "/" $2
            }
        }
        file != "" { print > file }' "$root/docs/recipes/$1"
}

project() { # FOLDER: the files of make.md, and vendor/
    files_of make.md "$1"
    mkdir "$1/vendor"
    cp "$root/valkey_push.h" "$root/backends/vkp_backend_poll.c" "$1/vendor"
    [ -f "$1/app.c" ] && [ -f "$1/vkp.c" ] && [ -f "$1/Makefile" ] || fail "make.md lost a file"
}

quietly() { # COMMAND...: its output only when it fails
    "$@" >"$work/log" 2>&1 || {
        cat "$work/log"
        fail "$* failed"
    }
}

prints() { # EXPECTED COMMAND...
    expected=$1
    shift
    found=$("$@") || fail "$* ended with exit code $?"
    [ "$found" = "$expected" ] || fail "$* printed: $found"
}

# ---------------------------------------------------------------------------------------------
# make. The flags of a strict project, so that no page teaches what such a project refuses.

strict='-std=c99 -O0 -Wall -Wextra -Wpedantic -Wconversion -Wsign-conversion -Wshadow -Werror'
project "$work/make"
cd "$work/make"
quietly make CC="$CC" CFLAGS="$strict"
prints 'the loop works' ./app
make -q CC="$CC" CFLAGS="$strict" || fail "make.md: a second make builds again"
quietly make clean
[ ! -e app ] && [ ! -e vkp.o ] || fail "make.md: make clean leaves files"
echo "make.md: built and run"

# ---------------------------------------------------------------------------------------------
# Meson

if has meson && has ninja; then
    project "$work/meson"
    files_of meson.md "$work/meson"
    cd "$work/meson"
    quietly env CC="$CC" meson setup build
    quietly meson compile -C build
    prints 'the loop works' build/app
    echo "meson.md: built and run"
else
    echo "meson.md: left out, there is no meson (or no ninja)"
fi

# ---------------------------------------------------------------------------------------------
# One archive for C++ and Rust

project "$work/cxx"
files_of cxx.md "$work/cxx"
files_of rust-ffi.md "$work/cxx"
cd "$work/cxx"
quietly "$CC" -c vkp.c vendor/vkp_backend_poll.c -Ivendor
quietly "$CXX" -std=c++17 -Wall -Wextra -Wpedantic -Wconversion -Werror -Ivendor app.cpp vkp.o \
    vkp_backend_poll.o -pthread -o app
prints 5050 ./app
echo "cxx.md: built and run"

if has rustc && rustc --version >/dev/null 2>&1; then
    quietly ar rcs libvalkey_push.a vkp.o vkp_backend_poll.o
    quietly rustc --edition 2021 -D warnings -L . -l static=valkey_push main.rs -o rust
    prints 5050 ./rust
    echo "rust-ffi.md: built and run"
else
    echo "rust-ffi.md: left out, there is no rustc"
fi

# ---------------------------------------------------------------------------------------------
# Line 1 of each program. tests/test_recipe_programs.cpp runs them all.

mkdir "$work/examples"
cd "$work/examples"
ln -s "$root/valkey_push.h" "$root/backends" "$root/examples" .
for name in worker_pool timer_signal three_servers test_with_null_backend embed_libuv; do
    if [ $name = embed_libuv ] && ! echo '#include <uv.h>' | "$CC" -E - >/dev/null 2>&1; then
        echo "$name.c: left out, there is no libuv"
        continue
    fi
    line=$(sed -n '1s|^/\* cc ||p' "examples/$name.c")
    [ -n "$line" ] || fail "$name.c: line 1 is no build line"
    quietly sh -c "$CC $line"
    echo "$name.c: line 1 builds it"
done
prints 'all checks passed' ./null_test

# ---------------------------------------------------------------------------------------------
# The pages: each is in the list, each link leads to a file, each name is in the header.

cd "$root/docs/recipes"
for page in *.md ../testing-your-code.md; do
    [ "$page" = README.md ] || grep -q "($page)" README.md || fail "README.md lacks $page"
    for link in $(grep -o '](\([^)#]*\)' "$page" | sed 's/^](//'); do
        [ -e "$(dirname "$page")/$link" ] || fail "$page: there is no $link"
    done
    for name in $(LC_ALL=C tr -cs 'A-Za-z0-9_' '\n' <"$page" |
        grep -E '^(vkp|VKP)_[A-Za-z0-9_]*[A-Za-z0-9]$' | sort -u); do
        grep -qw "$name" "$root/valkey_push.h" || [ -e "$root/backends/$name.c" ] ||
            [ -e "$root/backends/$name.h" ] || fail "$page: there is no $name"
    done
    if awk 'length($0) > 120 { print FILENAME ":" FNR; found = 1 } END { exit !found }' "$page"
    then
        fail "$page: a line of more than 120 columns"
    fi
done
echo "the pages: links, names and lines"
