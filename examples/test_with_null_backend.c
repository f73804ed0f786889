/* cc -I. examples/test_with_null_backend.c backends/vkp_backend_null.c -pthread -o null_test
   SPDX-License-Identifier: MIT

   A unit test of a program's own code, without a server, sleeps and threads. The code under test: a
   dialer that connects again with a back-off, and a handler that adds up what a channel brings.
   docs/testing-your-code.md explains each step. Exit code: 0, or 1 when a check failed.       */
#define VKP_IMPLEMENTATION
#include "valkey_push.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

/* ---- the code under test: in a real program this is another file ---- */

typedef struct dialer {
    vkp_loop *loop;
    vkp_conn *conn; /* NULL between two attempts */
    vkp_timer retry;
    uint64_t wait_ms; /* before the next attempt: 100, 200, 400, 800, 800 ... */
    unsigned attempts;
} dialer;

static void dial(vkp_timer *retry);

static void dial_later(dialer *self)
{
    (void)!vkp_timer_start(&self->retry, self->loop, dial, 0,
                           vkp_loop_after_ms(self->loop, self->wait_ms));
    self->wait_ms = self->wait_ms < 800 ? self->wait_ms * 2 : 800;
}

static void on_open(vkp_conn *conn, void *user)
{
    (void)conn;
    ((dialer *)user)->wait_ms = 100;
}

static void on_close(vkp_conn *conn, void *user, vkp_close_reason reason, int sys_error)
{
    dialer *self = (dialer *)user;
    (void)sys_error;
    vkp_conn_unref(conn);
    self->conn = NULL;
    if (reason != VKP_CLOSE_LOOP) {
        dial_later(self);
    }
}

static void dial(vkp_timer *retry)
{
    static const vkp_conn_ops ops = {.on_open = on_open, .on_close = on_close};
    dialer *self = VKP_CONTAINER(retry, dialer, retry);
    vkp_conn_config config = {.ops = &ops, .user = self};
    vkp_str to = vkp_str_of("unix:/upstream");
    self->attempts++;
    if (vkp_conn_connect(self->loop, to, &config, &self->conn) != VKP_OK) {
        dial_later(self); /* refused immediately: on_close does not follow */
    }
}

typedef struct adder {
    vkp_mpsc_rx *numbers; /* of int */
    int sum;
} adder;

static void on_number(void *user)
{
    adder *self = (adder *)user;
    int number;
    if (vkp_mpsc_try_recv(self->numbers, &number) == VKP_OK) {
        self->sum += number;
    }
}

/* ---- what the tests put in place of memory and of two system calls ---- */

static size_t live_bytes;
static unsigned refusals; /* of the next calls of connect */
static int peer_fd = -1;  /* the other end of the newest socket */

static void *counted(void *user, void *ptr, size_t old_bytes, size_t new_bytes)
{
    void *moved = new_bytes > 0 ? realloc(ptr, new_bytes) : NULL;
    (void)user;
    if (new_bytes == 0) {
        free(ptr);
    }
    live_bytes += new_bytes == 0 || moved != NULL ? new_bytes - old_bytes : 0;
    return moved;
}

static int fake_socket(int family, int type)
{
    int fds[2];
    if (socketpair(family, type, 0, fds) != 0 || vkp_sys_get_default()->prepare(fds[0]) < 0) {
        return -EMFILE;
    }
    if (peer_fd >= 0) {
        (void)close(peer_fd);
    }
    peer_fd = fds[1];
    return fds[0];
}

static int fake_connect(int fd, const void *address, uint32_t bytes)
{
    (void)fd;
    (void)address;
    (void)bytes;
    return refusals > 0 && refusals-- > 0 ? -ECONNREFUSED : 0;
}

/* ---- the tests ---- */

static unsigned failed;

static void check(bool is_so, const char *what, int line)
{
    if (!is_so) {
        printf("line %d: not so: %s\n", line, what);
        failed++;
    }
}
#define CHECK(x) check(x, #x, __LINE__)

/* Runs one round and returns the virtual milliseconds that passed in it. A round ends at an event,
   at a timer, or a virtual minute later: a test that waits for nothing fails, and does not hang. */
static unsigned round_ms(vkp_loop *loop)
{
    uint64_t before_ns = vkp_loop_get_now_ns(loop);
    CHECK(vkp_loop_run_once(loop, vkp_loop_after_ms(loop, 60000)) == VKP_OK);
    return (unsigned)((vkp_loop_get_now_ns(loop) - before_ns) / 1000000);
}

static vkp_sys sys;
static vkp_env env = {.alloc = counted, .sys = &sys};

static void test_dialer(vkp_loop *loop)
{
    static const unsigned waits_ms[] = {100, 200, 400, 800, 800};
    dialer self = {.loop = loop, .wait_ms = 100};
    unsigned i;
    refusals = 5;
    dial(&self.retry);
    for (i = 0; i < 5; i++) {
        CHECK(self.attempts == i + 1 && self.conn == NULL);
        CHECK(round_ms(loop) == waits_ms[i]);
    }
    CHECK(self.attempts == 6 && self.conn != NULL);
    CHECK(round_ms(loop) == 0 && self.wait_ms == 100); /* on_open */
    (void)close(peer_fd);
    peer_fd = -1;
    CHECK(round_ms(loop) == 0 && self.conn == NULL); /* on_close, with VKP_CLOSE_PEER */
    CHECK(round_ms(loop) == 100 && self.attempts == 7);
    vkp_loop_close(loop); /* on_close, with VKP_CLOSE_LOOP */
    CHECK(self.conn == NULL);
    (void)close(peer_fd);
    peer_fd = -1;
}

static void test_adder(vkp_loop *loop)
{
    vkp_mpsc_config config = {.elem_bytes = sizeof(int), .env = &env};
    adder self = VKP_ZERO;
    vkp_handler *handler;
    vkp_mpsc_tx *tx;
    vkp_case receive;
    int number;
    CHECK(vkp_mpsc_open(&config, &tx, &self.numbers) == VKP_OK);
    receive = vkp_case_mpsc_recv(self.numbers, NULL);
    CHECK(vkp_handler_open(loop, &receive, on_number, &self, &handler) == VKP_OK);
    for (number = 1; number <= 3; number++) {
        CHECK(vkp_mpsc_try_send(tx, &number) == VKP_OK);
    }
    CHECK(round_ms(loop) == 0 && self.sum == 1); /* the handler, once in a round */
    CHECK(round_ms(loop) == 0 && self.sum == 3);
    CHECK(round_ms(loop) == 0 && self.sum == 6);
    CHECK(round_ms(loop) == 60000); /* nothing is ready, no timer runs */
    vkp_handler_unref(handler);
    vkp_mpsc_tx_unref(tx);
    vkp_mpsc_rx_unref(self.numbers);
}

static void run(void (*test)(vkp_loop *loop))
{
    vkp_loop_config config = {.backend = &vkp_backend_null, .env = &env};
    vkp_loop *loop = NULL;
    sys = *vkp_sys_get_default();
    sys.socket = fake_socket;
    sys.connect = fake_connect;
    failed += vkp_loop_open(&config, &loop) != VKP_OK;
    if (failed == 0) {
        test(loop);
        vkp_loop_close(loop);
        vkp_loop_unref(loop);
        CHECK(live_bytes == 0); /* a leak is a failed check */
    }
}

int main(void)
{
    run(test_dialer);
    run(test_adder);
    printf("%s\n", failed == 0 ? "all checks passed" : "checks FAILED");
    return failed > 0;
}
