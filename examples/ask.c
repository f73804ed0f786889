/* cc -I. examples/ask.c backends/vkp_backend_poll.c -pthread -o ask
   SPDX-License-Identifier: MIT

   One command and its reply, without an event loop: ask ADDRESS COMMAND [ARGUMENT ...]         */
#define VKP_IMPLEMENTATION
#include "valkey_push.h"

#include <stdio.h>

static int fail(vkp_sync *client, const char *what, vkp_status status)
{
    char why[160];
    vkp_client_get_error(vkp_sync_get_client(client), why, sizeof why);
    fprintf(stderr, "%s: %s %s\n", what, vkp_status_str(status), why);
    vkp_sync_unref(client);
    return 1;
}

int main(int argc, char **argv)
{
    vkp_sync_config config = {.backend = &vkp_backend_poll};
    vkp_str words[32];
    uint64_t deadline = vkp_after_ms(5000);
    vkp_sync *client;
    vkp_reply *reply;
    vkp_bytes frame;
    vkp_status status;
    int i;
    for (i = 2; i < argc && i < 34; i++) {
        words[i - 2] = vkp_str_of(argv[i]);
    }
    config.client.address = vkp_str_of(argc > 1 ? argv[1] : "");
    if (argc < 3 || argc > 34 || vkp_sync_open(&config, &client) != VKP_OK) {
        fprintf(stderr, "ask tcp:HOST:PORT|unix:PATH COMMAND [ARGUMENT ...]\n");
        return 2;
    }
    status = vkp_sync_wait_ready(client, deadline);
    if (status != VKP_OK) {
        return fail(client, argv[1], status);
    }
    status = vkp_sync_command_argv(client, (size_t)argc - 2, words, deadline, &reply);
    if (status != VKP_OK) {
        return fail(client, argv[2], status);
    }
    frame = vkp_reply_get_frame(reply);
    (void)fwrite(frame.data, 1, frame.len, stdout); /* as it came, in RESP */
    vkp_reply_unref(reply);
    vkp_sync_unref(client);
    return 0;
}
