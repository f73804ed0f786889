/* cc -I. examples/subscribe.c backends/vkp_backend_poll.c -pthread -o subscribe
   SPDX-License-Identifier: MIT

   Prints what is published on "news": subscribe [tcp:HOST:PORT | unix:PATH]                    */
#define VKP_IMPLEMENTATION
#include "valkey_push.h"

#include <stdio.h>

static void on_push(void *user, const vkp_push *push)
{
    (void)user;
    printf("%s: %.*s\n", vkp_push_kind_str(push->kind), VKP_FMT(push->payload));
    if (push->gap != NULL) {
        printf("perhaps lost: since Unix time %.3f\n", (double)push->gap->from_unix_ms / 1000);
    }
    fflush(stdout);
}

int main(int argc, char **argv)
{
    vkp_loop *loop;
    vkp_client *client;
    vkp_loop_config on = {.backend = &vkp_backend_poll};
    vkp_client_config to = {.address = vkp_str_of(argc > 1 ? argv[1] : "tcp:127.0.0.1:6379"),
                            .on_push = on_push};
    if (vkp_loop_open(&on, &loop) != VKP_OK || vkp_client_open(loop, &to, &client) != VKP_OK ||
        vkp_client_subscribe(client, VKP_SUB_CHANNEL, vkp_str_of("news")) != VKP_OK) {
        fprintf(stderr, "no client to %.*s\n", VKP_FMT(to.address));
        return 1;
    }
    return vkp_loop_run(loop) != VKP_OK;
}
