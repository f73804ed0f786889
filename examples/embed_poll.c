/* cc -I. examples/embed_poll.c backends/vkp_backend_epoll.c -pthread -o embed_poll
   SPDX-License-Identifier: MIT

   A loop inside the program's own poll: the program polls the loop's descriptor beside its own, and
   waits until the loop's deadline at most. Standard input is sent to every client of a listener,
   the input of clients is printed; the program ends with standard input:
   embed_poll [unix:PATH | tcp:HOST:PORT]
   On systems other than Linux the backend is backends/vkp_backend_kqueue.c.                   */
#define VKP_IMPLEMENTATION
#include "valkey_push.h"

#include <limits.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#ifdef __linux__
#define BACKEND vkp_backend_epoll
#else
#define BACKEND vkp_backend_kqueue
#endif

typedef struct client {
    vkp_conn *conn;
    struct client *next;
} client;

typedef struct program {
    client *clients;
    bool ended;
} program;

static void on_accept(void *user, vkp_conn *conn)
{
    program *self = (program *)user;
    client *more = (client *)malloc(sizeof *more);
    if (more == NULL) {
        vkp_conn_close(conn);
        return;
    }
    more->conn = conn;
    more->next = self->clients;
    self->clients = more;
    puts("a client came");
    fflush(stdout);
}

static size_t on_data(vkp_conn *conn, void *user, const vkp_bytes *in)
{
    (void)conn;
    (void)user;
    fwrite(in->data, 1, in->len, stdout);
    fflush(stdout);
    return in->len;
}

static void on_close(vkp_conn *conn, void *user, vkp_close_reason reason, int sys_error)
{
    program *self = (program *)user;
    client **at = &self->clients;
    (void)reason;
    (void)sys_error;
    while (*at != NULL && (*at)->conn != conn) {
        at = &(*at)->next;
    }
    if (*at != NULL) {
        client *gone = *at;
        *at = gone->next;
        free(gone);
    }
}

static void on_end(void *user)
{
    ((program *)user)->ended = true;
}

/* All clients share one copy of the text. A slow client loses its oldest lines. */
static void tell(const program *self, const char *text, size_t len)
{
    const client *each;
    vkp_bytes frame;
    if (vkp_bytes_copy(NULL, text, len, &frame) != VKP_OK) {
        return;
    }
    for (each = self->clients; each != NULL; each = each->next) {
        (void)!vkp_conn_push(each->conn, &frame, 0);
    }
    vkp_bytes_unref(&frame);
}

/* Rounded up: rounded down, poll would return before the deadline, again and again. */
static int timeout_ms(uint64_t deadline_ns)
{
    const uint64_t now_ns = vkp_now_ns();
    const uint64_t ms = deadline_ns > now_ns ? (deadline_ns - now_ns + 999999) / 1000000 : 0;
    return deadline_ns == VKP_FOREVER ? -1 : ms > INT_MAX ? INT_MAX : (int)ms;
}

int main(int argc, char **argv)
{
    static const vkp_conn_ops ops = {.on_data = on_data, .on_close = on_close};
    program self = VKP_ZERO;
    vkp_loop *loop;
    vkp_listener *listener;
    vkp_status status;
    vkp_loop_config on = {.backend = &BACKEND};
    vkp_listener_config at = {
        .address = vkp_str_of(argc > 1 ? argv[1] : "unix:/tmp/embed_poll.sock"),
        .on_accept = on_accept,
        .conn = {.ops = &ops, .user = &self, .on_full = VKP_ON_FULL_DROP_OLDEST}};
    if (vkp_loop_open(&on, &loop) != VKP_OK || vkp_listener_open(loop, &at, &listener) != VKP_OK) {
        fprintf(stderr, "cannot listen on %.*s\n", VKP_FMT(at.address));
        return 1;
    }
    printf("listening on %s\n", vkp_listener_get_address(listener));
    fflush(stdout);

    struct pollfd fds[2] = {{.fd = STDIN_FILENO, .events = POLLIN},
                            {.fd = vkp_loop_get_fd(loop), .events = POLLIN}};
    do {
        poll(fds, 2, timeout_ms(vkp_loop_get_deadline_ns(loop)));
        if (fds[0].revents != 0) {
            char text[4096];
            ssize_t got = read(STDIN_FILENO, text, sizeof text);
            if (got > 0) {
                tell(&self, text, (size_t)got);
            } else { /* write what is queued, then close all connections */
                fds[0].fd = -1;
                self.ended =
                    vkp_listener_drain(listener, NULL, on_end, &self, vkp_after_ms(1000)) != VKP_OK;
            }
        }
        status = vkp_loop_run_once(loop, 0); /* after each poll: writes what was pushed above */
    } while (status == VKP_OK && !self.ended);

    vkp_listener_unref(listener);
    vkp_loop_unref(loop);
    return status != VKP_OK;
}
