/* cc -I. examples/commands.c backends/vkp_backend_poll.c -pthread -o commands
   SPDX-License-Identifier: MIT

   Two threads send commands over one connection: commands [tcp:HOST:PORT | unix:PATH]
   A third thread runs the loop. The reply to each command arrives in a slot on the stack of the
   thread that sent the command. After the deadline the slot is closed, its memory may be reused,
   and a late reply is dropped.                                                                 */
#define VKP_IMPLEMENTATION
#include "valkey_push.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>

#define QUESTIONS 1000
#define PATIENCE_MS 250

typedef struct asker {
    pthread_t thread;
    vkp_client *client;
    unsigned answered;
    unsigned failed;
    int64_t last; /* the last value of the counter that this thread received */
} asker;

static void *run_loop(void *loop)
{
    return vkp_loop_run((vkp_loop *)loop) == VKP_OK ? NULL : loop;
}

static bool increment(vkp_client *client, int64_t *now)
{
    vkp_oneshot slot;
    vkp_reply *reply;
    const vkp_value *value;
    bool good;
    if (vkp_client_command(client, &slot, "INCR", "vkp:example:hits", NULL) != VKP_OK ||
        vkp_oneshot_recv(&slot, vkp_after_ms(PATIENCE_MS), &reply) != VKP_OK) {
        return false; /* not connected, or no reply in time */
    }
    value = vkp_reply_get_value(reply);
    good = value->type == VKP_RESP_INTEGER; /* an error of the server is a reply too */
    if (good) {
        *now = value->u.integer;
    }
    vkp_reply_unref(reply);
    return good;
}

static void *ask(void *user)
{
    asker *self = (asker *)user;
    unsigned i;
    for (i = 0; i < QUESTIONS; i++) {
        if (increment(self->client, &self->last)) {
            self->answered++;
        } else {
            self->failed++;
        }
    }
    return NULL;
}

int main(int argc, char **argv)
{
    vkp_loop_config on = {.backend = &vkp_backend_poll};
    vkp_client_config to = {.address = vkp_str_of(argc > 1 ? argv[1] : "tcp:127.0.0.1:6379")};
    vkp_loop *loop;
    vkp_client *client;
    pthread_t loop_thread;
    asker askers[2] = {{.answered = 0}, {.answered = 0}};
    unsigned failed = 0;
    int i;
    if (vkp_loop_open(&on, &loop) != VKP_OK || vkp_client_open(loop, &to, &client) != VKP_OK ||
        pthread_create(&loop_thread, NULL, run_loop, loop) != 0) {
        fprintf(stderr, "no client to %.*s\n", VKP_FMT(to.address));
        return 1;
    }
    for (i = 0; i < 2; i++) {
        askers[i].client = client;
        if (pthread_create(&askers[i].thread, NULL, ask, &askers[i]) != 0) {
            return 1;
        }
    }
    for (i = 0; i < 2; i++) {
        (void)pthread_join(askers[i].thread, NULL);
        printf("thread %d: %u answered, %u failed, the last answer was %" PRId64 "\n", i,
               askers[i].answered, askers[i].failed, askers[i].last);
        failed += askers[i].failed;
    }
    vkp_loop_stop(loop);
    (void)pthread_join(loop_thread, NULL);
    vkp_client_unref(client);
    vkp_loop_close(loop);
    vkp_loop_unref(loop);
    return failed != 0;
}
