/* cc -I. examples/timer_signal.c backends/vkp_backend_poll.c -pthread -o timer_signal
   SPDX-License-Identifier: MIT

   A server that ends in good order: timer_signal [unix:PATH | tcp:HOST:PORT [PERIOD_MS]]
   Each client receives "tick 1", "tick 2" ... one line per period. SIGTERM or SIGINT: the server
   stops accepting, sends "bye" to each client, writes what is queued for at most two seconds, and
   exits with 0. A second signal ends it immediately.                                          */
#define VKP_IMPLEMENTATION
#include "valkey_push.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>

#define DRAIN_MS 2000

typedef struct client {
    vkp_timer tick; /* VKP_CONTAINER finds the client from its timer */
    vkp_conn *conn; /* valid until on_close */
    unsigned ticks;
} client;

static vkp_loop *loop; /* a signal handler has no argument */
static uint64_t period_ms = 1000;

static void on_signal(int number)
{
    (void)number;
    vkp_loop_stop(loop); /* allowed here; does not change errno */
}

static void on_tick(vkp_timer *timer)
{
    client *self = VKP_CONTAINER(timer, client, tick);
    char text[32];
    vkp_bytes line;
    int len = snprintf(text, sizeof text, "tick %u\n", ++self->ticks);
    if (vkp_bytes_copy(NULL, text, (size_t)len, &line) == VKP_OK) {
        (void)!vkp_conn_push(self->conn, &line, 0); /* a slow client loses its oldest lines */
        vkp_bytes_unref(&line);
    }
}

static void on_accept(void *user, vkp_conn *conn)
{
    client *self = (client *)calloc(1, sizeof *self);
    (void)user;
    vkp_conn_set_user(conn, self); /* before any close: on_close receives this pointer */
    if (self != NULL) {
        self->conn = conn;
    }
    if (self == NULL || vkp_timer_start(&self->tick, loop, on_tick, period_ms * 1000000,
                                        vkp_loop_after_ms(loop, period_ms)) != VKP_OK) {
        vkp_conn_close(conn);
    }
}

static void on_close(vkp_conn *conn, void *user, vkp_close_reason reason, int sys_error)
{
    client *self = (client *)user;
    (void)conn;
    (void)reason;
    (void)sys_error;
    if (self != NULL) {
        vkp_timer_stop(&self->tick);
        free(self);
    }
}

/* Every client is gone, or the deadline passed. */
static void on_drained(void *user)
{
    *(bool *)user = true;
    vkp_loop_stop(loop);
}

int main(int argc, char **argv)
{
    static const vkp_conn_ops ops = {.on_close = on_close};
    struct sigaction action = {.sa_handler = on_signal};
    vkp_loop_config on = {.backend = &vkp_backend_poll};
    vkp_listener_config at = {.address =
                                  vkp_str_of(argc > 1 ? argv[1] : "unix:/tmp/timer_signal.sock"),
                              .on_accept = on_accept,
                              .conn = {.ops = &ops, .on_full = VKP_ON_FULL_DROP_OLDEST}};
    vkp_bytes bye = vkp_bytes_static("bye\n", 4);
    vkp_listener *listener;
    vkp_status status;
    bool drained = false;
    if (argc > 2 && strtoul(argv[2], NULL, 10) > 0) {
        period_ms = strtoul(argv[2], NULL, 10);
    }
    if (vkp_loop_open(&on, &loop) != VKP_OK || vkp_listener_open(loop, &at, &listener) != VKP_OK) {
        fprintf(stderr, "cannot listen on %.*s\n", VKP_FMT(at.address));
        return 1;
    }
    (void)sigaction(SIGTERM, &action, NULL); /* from here on: the loop is open */
    (void)sigaction(SIGINT, &action, NULL);
    printf("listening on %s\n", vkp_listener_get_address(listener));
    fflush(stdout);

    status = vkp_loop_run(loop); /* until a signal */
    if (status == VKP_OK) {
        status = vkp_listener_drain(listener, &bye, on_drained, &drained, vkp_after_ms(DRAIN_MS));
    }
    if (status == VKP_OK) {
        status = vkp_loop_run(loop); /* until on_drained, or another signal */
    }
    printf("%s\n", drained ? "drained" : "not drained");
    (void)signal(SIGTERM, SIG_IGN); /* the handler must not find a loop that is freed */
    (void)signal(SIGINT, SIG_IGN);
    vkp_listener_unref(listener);
    vkp_loop_close(loop); /* after a second signal: the connections that are left */
    vkp_loop_unref(loop);
    return status != VKP_OK;
}
