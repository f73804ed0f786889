/* cc -I. examples/three_servers.c backends/vkp_backend_poll.c -pthread -o three_servers
   SPDX-License-Identifier: MIT

   Three servers in one loop, in one thread: three_servers [ECHO [LINES [COUNT]]]
   ECHO (a Unix socket) sends back what it receives. LINES (TCP) answers each line in capitals,
   until "quit". COUNT (TCP) sends how many clients the three have had, and closes. The arguments
   are addresses: unix:PATH or tcp:HOST:PORT. SIGTERM or SIGINT ends the program.             */
#define VKP_IMPLEMENTATION
#include "valkey_push.h"

#include <signal.h>
#include <stdio.h>
#include <string.h>

/* More than the input of one round: with that much queued the kernel has refused bytes, and so
   on_drain follows.                                                                           */
#define QUEUE_BYTES ((size_t)1 << 20)
#define LINE_BYTES 512 /* the longest line */

static vkp_loop *loop; /* a signal handler has no argument */
static unsigned long clients;

static void on_signal(int number)
{
    (void)number;
    vkp_loop_stop(loop);
}

static void on_accept(void *user, vkp_conn *conn)
{
    (void)user;
    (void)conn;
    clients++;
}

/* A client that does not read its answers is not read either, and cannot fill the memory. */
static vkp_status answer(vkp_conn *conn, const vkp_bytes *bytes)
{
    vkp_conn_stats stats;
    vkp_status status = vkp_conn_send(conn, bytes);
    vkp_conn_get_stats(conn, &stats);
    if (stats.queued_bytes > QUEUE_BYTES) {
        vkp_conn_pause(conn);
    }
    return status;
}

static void on_drain(vkp_conn *conn, void *user)
{
    (void)user;
    vkp_conn_resume(conn);
}

/* ---- echo ---- */

static size_t echo_data(vkp_conn *conn, void *user, const vkp_bytes *in)
{
    (void)user;
    if (answer(conn, in) != VKP_OK) { /* shares the bytes: no copy */
        vkp_conn_close(conn);
    }
    return in->len;
}

/* The client shut down its writing side: it still receives what is queued. */
static bool echo_end(vkp_conn *conn, void *user)
{
    (void)user;
    vkp_conn_drain(conn);
    return true;
}

/* ---- lines ---- */

static vkp_status answer_in_capitals(vkp_conn *conn, const uint8_t *line, size_t len)
{
    char text[LINE_BYTES];
    vkp_bytes capitals;
    vkp_status status;
    size_t i;
    for (i = 0; i < len; i++) {
        text[i] = (char)(line[i] >= 'a' && line[i] <= 'z' ? line[i] - 'a' + 'A' : line[i]);
    }
    status = vkp_bytes_copy(NULL, text, len, &capitals);
    if (status == VKP_OK) {
        status = answer(conn, &capitals);
        vkp_bytes_unref(&capitals);
    }
    return status;
}

/* Uses whole lines only: an incomplete one comes again, with more bytes behind it. */
static size_t lines_data(vkp_conn *conn, void *user, const vkp_bytes *in)
{
    size_t used = 0;
    const uint8_t *end;
    (void)user;
    while ((end = (const uint8_t *)memchr(in->data + used, '\n', in->len - used)) != NULL) {
        const uint8_t *line = in->data + used;
        size_t len = (size_t)(end - line) + 1;
        used += len;
        if (len == 5 && memcmp(line, "quit\n", 5) == 0) {
            vkp_conn_drain(conn); /* writes the answers that are queued, then closes */
            return in->len;
        }
        if (len > LINE_BYTES || answer_in_capitals(conn, line, len) != VKP_OK) {
            vkp_conn_close(conn);
            return in->len;
        }
    }
    if (in->len - used >= LINE_BYTES) {
        vkp_conn_close(conn);
    }
    return used;
}

/* ---- count ---- */

static void count_open(vkp_conn *conn, void *user)
{
    char text[32];
    vkp_bytes line;
    int len = snprintf(text, sizeof text, "%lu clients\n", clients);
    (void)user;
    if (vkp_bytes_copy(NULL, text, (size_t)len, &line) == VKP_OK) {
        (void)!vkp_conn_send(conn, &line);
        vkp_bytes_unref(&line);
    }
    vkp_conn_drain(conn);
}

int main(int argc, char **argv)
{
    static const vkp_conn_ops ops[3] = {
        {.on_data = echo_data, .on_drain = on_drain, .on_end = echo_end},
        {.on_data = lines_data, .on_drain = on_drain},
        {.on_open = count_open}};
    static const char *const names[3] = {"echo", "lines", "count"};
    const char *addresses[3] = {"unix:/tmp/three_servers.sock", "tcp:127.0.0.1:0",
                                "tcp:127.0.0.1:0"}; /* port 0: the system chooses one */
    struct sigaction action = {.sa_handler = on_signal};
    vkp_loop_config on = {.backend = &vkp_backend_poll};
    vkp_listener *listeners[3];
    vkp_status status = vkp_loop_open(&on, &loop);
    int i;
    for (i = 0; i < 3 && status == VKP_OK; i++) {
        vkp_listener_config at = {.on_accept = on_accept, .conn = {.ops = &ops[i]}};
        at.address = vkp_str_of(argc > i + 1 ? argv[i + 1] : addresses[i]);
        status = vkp_listener_open(loop, &at, &listeners[i]);
        if (status == VKP_OK) {
            printf("%s on %s\n", names[i], vkp_listener_get_address(listeners[i]));
        }
    }
    if (status != VKP_OK) {
        fprintf(stderr, "three_servers: %s\n", vkp_status_str(status));
        return 1;
    }
    (void)sigaction(SIGTERM, &action, NULL);
    (void)sigaction(SIGINT, &action, NULL);
    fflush(stdout);
    status = vkp_loop_run(loop);
    (void)signal(SIGTERM, SIG_IGN); /* the handler must not find a loop that is freed */
    (void)signal(SIGINT, SIG_IGN);
    for (i = 0; i < 3; i++) {
        vkp_listener_unref(listeners[i]);
    }
    vkp_loop_close(loop); /* the connections that are left */
    vkp_loop_unref(loop);
    return status != VKP_OK;
}
