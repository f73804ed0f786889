/* cc -I. examples/push_channel.c backends/vkp_backend_poll.c -pthread -o push_channel
   SPDX-License-Identifier: MIT

   A thread receives pushes from a channel: push_channel [tcp:HOST:PORT | unix:PATH [NAME]]
   The loop never waits for this thread: when the channel is full, pushes are dropped, and a LAGGED
   with their number follows. The message "stop" ends the program.                              */
#define VKP_IMPLEMENTATION
#include "valkey_push.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

static void *run_loop(void *loop)
{
    return vkp_loop_run((vkp_loop *)loop) == VKP_OK ? NULL : loop;
}

/* Prints one push. Returns true after the message "stop". */
static bool use(const vkp_push *push)
{
    bool stop = push->payload.len == 4 && memcmp(push->payload.ptr, "stop", 4) == 0;
    if (push->kind == VKP_PUSH_LAGGED) {
        printf("missed %" PRIu64 "\n", push->missed);
    } else {
        printf("%s %.*s %.*s\n", vkp_push_kind_str(push->kind), VKP_FMT(push->channel),
               VKP_FMT(push->payload));
    }
    fflush(stdout);
    return push->kind == VKP_PUSH_MESSAGE && stop;
}

int main(int argc, char **argv)
{
    /* Two bounds, in pushes and in bytes. `drop` frees pushes that are never received. */
    vkp_mpsc_config kept = {.elem_bytes = sizeof(vkp_push),
                            .capacity_items = 1024,
                            .capacity_bytes = 8u << 20,
                            .cost = vkp_push_get_cost,
                            .drop = vkp_push_drop};
    vkp_loop_config on = {.backend = &vkp_backend_poll};
    vkp_client_config to = {.address = vkp_str_of(argc > 1 ? argv[1] : "tcp:127.0.0.1:6379")};
    vkp_str name = vkp_str_of(argc > 2 ? argv[2] : "news");
    vkp_mpsc_tx *tx;
    vkp_mpsc_rx *rx;
    vkp_loop *loop;
    vkp_client *client;
    vkp_push push;
    pthread_t thread;
    if (vkp_mpsc_open(&kept, &tx, &rx) != VKP_OK || vkp_loop_open(&on, &loop) != VKP_OK) {
        return 1;
    }
    to.pushes = tx;
    if (vkp_client_open(loop, &to, &client) != VKP_OK ||
        vkp_client_subscribe(client, VKP_SUB_CHANNEL, name) != VKP_OK ||
        pthread_create(&thread, NULL, run_loop, loop) != 0) {
        fprintf(stderr, "no client to %.*s\n", VKP_FMT(to.address));
        return 1;
    }
    vkp_mpsc_tx_unref(tx); /* the client has a reference: when it closes, recv returns CLOSED */
    while (vkp_mpsc_recv(rx, VKP_FOREVER, &push) == VKP_OK) {
        if (use(&push)) {
            vkp_client_close(client);
        }
        vkp_push_unref(&push);
    }
    vkp_loop_stop(loop);
    (void)pthread_join(thread, NULL);
    vkp_client_unref(client);
    vkp_loop_close(loop);
    vkp_loop_unref(loop);
    vkp_mpsc_rx_unref(rx);
    return 0;
}
