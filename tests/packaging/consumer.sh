#!/bin/sh
# Builds and runs a program from outside the tree: consumer.sh WAY ROOT BUILD WORK, where WAY is
# find_package, pkg_config, add_subdirectory or FetchContent, and BUILD a build of the tree, from
# which the first two are installed; with GUESTS ("libev libuv") in the environment, what BUILD
# found, also a program for each. Exit 77: there is no pkg-config.
set -eu
way=$1 root=$2 build=$3 work=$4
cc=${CC:-cc} cxx=${CXX:-c++}
here=$root/tests/packaging/consumer programs_of_guests=''

rm -rf "$work"
mkdir -p "$work"
cp -R "$here" "$work/source"
# The prefix is moved once it is there: what is installed must not know where it was.
install_tree() {
    DESTDIR='' cmake --install "$build" --prefix "$work/first" >"$work/install.log"
    mv "$work/first" "$work/prefix"
    if grep -rlF "$root" "$work/prefix/lib"*/cmake "$work/prefix/lib"*/pkgconfig; then
        echo "these files name the source folder"
        exit 1
    fi
}
run_all() { # FOLDER
    for program in library_c library_cpp header_c header_cpp $programs_of_guests; do
        "$1/$program" >"$work/$program.txt" || {
            cat "$work/$program.txt"
            echo "$program failed"
            exit 1
        }
    done
    cmp "$work/library_c.txt" "$work/header_c.txt"
    cat "$work"/*.txt
}

by_cmake() {
    for guest in ${GUESTS:-}; do
        programs_of_guests="$programs_of_guests guest_$guest"
    done
    cmake -S "$work/source" -B "$work/build" -DVKP_CONSUMER="$way" -DCMAKE_BUILD_TYPE=Debug \
        -DCMAKE_C_COMPILER="$cc" -DCMAKE_CXX_COMPILER="$cxx" \
        -DVKP_CONSUMER_GUESTS="$(echo "${GUESTS:-}" | tr ' ' ';')" "$@" >"$work/configure.log" || {
        cat "$work/configure.log"
        exit 1
    }
    cmake --build "$work/build" >"$work/build.log" || { cat "$work/build.log"; exit 1; }
    run_all "$work/build"
}

# A parent's build gets the library and nothing else: no relay, no examples, no tests; its
# installation nothing at all, until it asks for it.
check_parent() {
    extra=$(find "$work/build" -name 'valkey-push-relay' -o -name 'test_*' -o -name '*.deb' \
        -o -path '*examples/*' -type f -perm -u+x)
    tests=$(cd "$work/build" && ctest -N | sed -n 's/^Total Tests: //p')
    DESTDIR='' cmake --install "$work/build" --prefix "$work/parent" >"$work/install.log"
    installed=$(cd "$work/parent" && find . -type f)
    if [ -n "$extra" ] || [ "$tests" != 0 ] || [ "$installed" != ./bin/library_c ]; then
        echo "extra: $extra; tests: $tests; installed: $installed"
        exit 1
    fi
    cmake -S "$work/source" -B "$work/build" -DVKP_INSTALL=ON >"$work/configure.log"
    DESTDIR='' cmake --install "$work/build" --prefix "$work/asked" >"$work/install.log"
    [ -f "$work/asked/include/valkey_push.h" ]
}

case $way in
find_package)
    install_tree
    by_cmake -DCMAKE_PREFIX_PATH="$work/prefix"
    # The next minor version may have other contracts.
    sed 's/find_package(valkey_push 0\.1 /find_package(valkey_push 0.999 /' \
        "$here/CMakeLists.txt" >"$work/source/CMakeLists.txt"
    if cmake -S "$work/source" -B "$work/newer" -DVKP_CONSUMER="$way" \
        -DCMAKE_PREFIX_PATH="$work/prefix" >"$work/newer.log" 2>&1; then
        echo "it is taken for a version that does not exist"
        exit 1
    fi
    grep -q 'valkey_push-config.cmake, version' "$work/newer.log"
    ;;
add_subdirectory | FetchContent)
    by_cmake -DVKP_CONSUMER_SOURCE="$root"
    check_parent
    ;;
pkg_config)
    if ! command -v pkg-config >/dev/null 2>&1; then
        echo "pkg-config is not here"
        exit 77
    fi
    install_tree
    PKG_CONFIG_PATH=$(dirname "$(find "$work/prefix" -name valkey_push.pc)")
    export PKG_CONFIG_PATH
    backends=$(pkg-config --variable=backendsdir valkey_push)
    mkdir "$work/build"
    cd "$work/source"
    set -- "$backends/vkp_backend_poll.c"
    [ "$(uname -s)" != Linux ] || set -- "$@" "$backends/vkp_backend_epoll.c"
    header=$(pkg-config --cflags --libs valkey_push)
    library=$(pkg-config --cflags --libs valkey_push_impl)
    "$cc" -std=c99 program.c implementation.c "$@" $header -o "$work/build/header_c"
    "$cc" -std=c99 program.c $library -o "$work/build/library_c"
    "$cc" -std=c99 -c implementation.c $(pkg-config --cflags valkey_push) -o "$work/build/impl.o"
    "$cxx" -std=c++11 program.cpp "$work/build/impl.o" $header -o "$work/build/header_cpp"
    "$cxx" -std=c++11 program.cpp $library -o "$work/build/library_cpp"
    run_all "$work/build"
    ;;
*)
    echo "consumer.sh: no such way: $way" >&2
    exit 2
    ;;
esac
