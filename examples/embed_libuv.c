/* cc -I. examples/embed_libuv.c backends/vkp_backend_libuv.c -luv -pthread -o embed_libuv
   SPDX-License-Identifier: MIT

   A loop inside libuv's, as a guest: embed_libuv [unix:PATH | tcp:HOST:PORT]
   A timer of libuv counts from the first client on, and the newest client receives each count.
   After three counts the program closes what is open, and uv_run returns by itself.           */
#define VKP_IMPLEMENTATION
#include "valkey_push.h"

#include <stdio.h>
#include <uv.h>

#define COUNTS 3
#define PERIOD_MS 10
#define DRAIN_MS 1000

typedef struct program {
    uv_timer_t timer; /* libuv's; its data is the program */
    vkp_loop *loop;
    vkp_listener *listener;
    vkp_conn *newest; /* NULL: there is none */
    int counted;
} program;

static void on_count(uv_timer_t *timer)
{
    program *self = (program *)timer->data;
    char text[16];
    vkp_bytes line;
    int len = snprintf(text, sizeof text, "%d\n", ++self->counted);
    if (self->newest != NULL && vkp_bytes_copy(NULL, text, (size_t)len, &line) == VKP_OK) {
        (void)!vkp_conn_push(self->newest, &line, 0); /* written in a round of its own */
        vkp_bytes_unref(&line);
    }
    if (self->counted == COUNTS) {
        (void)uv_timer_stop(timer);
        if (vkp_listener_drain(self->listener, NULL, NULL, NULL, vkp_after_ms(DRAIN_MS)) !=
            VKP_OK) {
            vkp_loop_close(self->loop);
        }
    }
}

static void on_accept(void *user, vkp_conn *conn)
{
    program *self = (program *)user;
    self->newest = conn;
    if (!uv_is_active((const uv_handle_t *)&self->timer)) {
        (void)uv_timer_start(&self->timer, on_count, PERIOD_MS, PERIOD_MS);
    }
}

static void on_close(vkp_conn *conn, void *user, vkp_close_reason reason, int sys_error)
{
    program *self = (program *)user;
    (void)reason;
    (void)sys_error;
    self->newest = self->newest == conn ? NULL : self->newest;
}

int main(int argc, char **argv)
{
    static const vkp_conn_ops ops = {.on_close = on_close};
    program self = VKP_ZERO;
    uv_loop_t uv;
    vkp_loop_config on = {.backend = &vkp_backend_libuv, .foreign = &uv};
    vkp_listener_config at = {.address =
                                  vkp_str_of(argc > 1 ? argv[1] : "unix:/tmp/embed_libuv.sock"),
                              .on_accept = on_accept,
                              .conn = {.ops = &ops, .user = &self}};
    if (uv_loop_init(&uv) != 0 || uv_timer_init(&uv, &self.timer) != 0) {
        return 1;
    }
    self.timer.data = &self;
    if (vkp_loop_open(&on, &self.loop) != VKP_OK ||
        vkp_listener_open(self.loop, &at, &self.listener) != VKP_OK) {
        fprintf(stderr, "cannot listen on %.*s\n", VKP_FMT(at.address));
        return 1;
    }
    printf("listening on %s\n", vkp_listener_get_address(self.listener));
    fflush(stdout);

    (void)uv_run(&uv, UV_RUN_DEFAULT); /* returns when nothing is open on either loop */

    vkp_listener_unref(self.listener);
    vkp_loop_close(self.loop);
    vkp_loop_unref(self.loop);
    uv_close((uv_handle_t *)&self.timer, NULL);
    (void)uv_run(&uv, UV_RUN_DEFAULT); /* libuv closes handles, ours too, in an iteration */
    printf("%s\n", uv_loop_close(&uv) == 0 ? "closed" : "busy");
    return 0;
}
