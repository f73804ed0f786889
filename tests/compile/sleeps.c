/* A thread that waits until a deadline asks the kernel about once, not again and again until it is
   there: what a 32-bit kernel takes for the time is not what every libc does. The channels stand
   alone here.
   SPDX-License-Identifier: MIT */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include <stdio.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/syscall.h>
#endif

static unsigned long calls;
#define syscall(...) (calls++, syscall(__VA_ARGS__))

#define VKP_IMPLEMENTATION
#define VKP_NO_IO
#include "valkey_push.h"

int main(void)
{
    vkp_mpsc_config config = VKP_ZERO;
    vkp_mpsc_tx *tx;
    vkp_mpsc_rx *rx;
    int value;
    vkp_status status;
    config.elem_bytes = sizeof value;
    if (vkp_mpsc_open(&config, &tx, &rx) != VKP_OK) {
        return 1;
    }
    status = vkp_mpsc_recv(rx, vkp_after_ms(100), &value);
    vkp_mpsc_tx_unref(tx);
    vkp_mpsc_rx_unref(rx);
    if (status != VKP_ERR_TIMEOUT || calls > 100) {
        printf("%s after %lu system calls\n", vkp_status_str(status), calls);
        return 1;
    }
    return 0;
}
