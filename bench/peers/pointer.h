/* For queues of pointers: 8 bytes travel as the pointer (plus one, as NULL is not taken), larger
   messages in a block of their own.
   SPDX-License-Identifier: MIT                                                               */
#ifndef VKP_BENCH_POINTER_H
#define VKP_BENCH_POINTER_H

#include "worker.h"

WORK_INLINE void *pointer_from(const void *message, size_t bytes)
{
    void *block;
    if (bytes == 8) {
        uint64_t value;
        memcpy(&value, message, sizeof value);
        return (void *)(uintptr_t)(value + 1);
    }
    block = malloc(bytes);
    memcpy(block, message, bytes);
    return block;
}

WORK_INLINE void pointer_into(void *pointer, void *message, size_t bytes)
{
    if (bytes == 8) {
        uint64_t value = (uint64_t)(uintptr_t)pointer - 1;
        memcpy(message, &value, sizeof value);
        return;
    }
    memcpy(message, pointer, bytes);
    free(pointer);
}

#endif
