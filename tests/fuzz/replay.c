/* Runs a fuzz target over its corpus, for builds without libFuzzer: replay FILE-OR-FOLDER...
   Each input stands in a block of its exact size, so that sanitizers see an over-read.
   SPDX-License-Identifier: MIT */
#include "support/internal.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void run_file(const char *path)
{
    FILE *file = fopen(path, "rb");
    if (!file) {
        vkp_test_fail("cannot open %s", path);
    }
    fseek(file, 0, SEEK_END);
    size_t size = (size_t)ftell(file);
    rewind(file);
    uint8_t *data = (uint8_t *)vkp_test_i_alloc(NULL, size ? size : 1);
    if (fread(data, 1, size, file) != size) {
        vkp_test_fail("cannot read %s", path);
    }
    fclose(file);
    LLVMFuzzerTestOneInput(data, size);
    free(data);
}

static size_t run_folder(DIR *dir, const char *path)
{
    size_t count = 0;
    for (struct dirent *entry = readdir(dir); entry; entry = readdir(dir)) {
        if (entry->d_name[0] == '.') {
            continue;
        }
        char *inner = vkp_test_i_format("%s/%s", path, entry->d_name);
        run_file(inner);
        free(inner);
        count++;
    }
    return count;
}

int main(int argc, char **argv)
{
    size_t count = 0;
    for (int i = 1; i < argc; i++) {
        DIR *dir = opendir(argv[i]);
        if (dir) {
            count += run_folder(dir, argv[i]);
            closedir(dir);
        } else {
            run_file(argv[i]);
            count++;
        }
    }
    printf("%lu inputs\n", (unsigned long)count);
    return count > 0 ? 0 : 1;
}
