#!/bin/sh
# A shared library of several files keeps its copy to itself with VKP_API: it exports no name of the
# library's, backend included, compiles without a warning, and loads: check_visibility.sh ROOT WORK
set -eu
root=$1 work=$2
cc=${CC:-cc}

mkdir -p "$work"
cat >"$work/one.c" <<'END'
#define VKP_IMPLEMENTATION
#include "valkey_push.h"
uint64_t two(void);
__attribute__((visibility("default"))) int plugin(void);
int plugin(void)
{
    vkp_loop_config config = VKP_ZERO;
    vkp_loop *loop;
    config.backend = &vkp_backend_poll;
    if (two() == 0 || vkp_loop_open(&config, &loop) != VKP_OK) {
        return 1;
    }
    vkp_loop_unref(loop);
    return 0;
}
END
cat >"$work/two.c" <<'END'
#include "valkey_push.h"
__attribute__((visibility("hidden"))) uint64_t two(void);
uint64_t two(void) { return vkp_after_ms(5); }
END
cat >"$work/main.c" <<'END'
#include <dlfcn.h>
#include <stdio.h>
int main(int argc, char **argv)
{
    void *library = argc > 1 ? dlopen(argv[1], RTLD_NOW) : NULL;
    int (*plugin)(void);
    if (library == NULL) {
        fprintf(stderr, "%s\n", dlerror());
        return 1;
    }
    *(void **)&plugin = dlsym(library, "plugin");
    return plugin == NULL || plugin() != 0;
}
END
for source in "$work/one.c" "$work/two.c" "$root/backends/vkp_backend_poll.c"; do
    "$cc" -std=c99 -fPIC -Wall -Wextra -Werror -I"$root" \
        '-DVKP_API=extern __attribute__((visibility("hidden")))' -c "$source" \
        -o "$work/$(basename "$source" .c).o"
done
"$cc" -shared -pthread "$work/one.o" "$work/two.o" "$work/vkp_backend_poll.o" -o "$work/plugin.so"
"$cc" -std=c99 "$work/main.c" -ldl -o "$work/main"
"$work/main" "$work/plugin.so"
nm -g -P "$work/plugin.so" >"$work/names.txt"
awk '$2 != "U" && $2 != "w" { print $1 }' "$work/names.txt" >"$work/exported.txt"
if ! grep -Eq '^_?plugin$' "$work/exported.txt"; then
    echo "plugin is not exported"
    exit 1
fi
if grep -E '^_?vkp_' "$work/exported.txt"; then
    echo "these are visible outside of the library"
    exit 1
fi
echo "one name is exported: plugin"
