/* A stand-alone relay under the bytes of one client. An input is a head of six bytes and what that
   client sends:
       0     bit 0: small limits; bits 1 and up: 0, or every n-th allocation fails
       1..5  the lengths, less one, of the pieces in which the bytes arrive, over and over
   The client sends, ends its side, and must then be served to an end. What it hears must be RESP,
   and the same whether its bytes came whole or in pieces. Another client must notice nothing.
   Sockets come from socketpair through a table of system calls of our own: no file, no port.
   SPDX-License-Identifier: MIT                                                                  */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE 1
#elif defined(__APPLE__) && !defined(_DARWIN_C_SOURCE)
#define _DARWIN_C_SOURCE 1
#endif
#include "valkey_push.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define HEAD 6u
#define MOST_ROUNDS 100000

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void require(bool condition, const char *what)
{
    if (!condition) {
        fprintf(stderr, "fuzz_relay: %s\n", what);
        abort();
    }
}

/* ---- memory: counted, and failing on demand ---- */

typedef struct memory {
    vkp_env env;
    size_t live_bytes;
    size_t peak_bytes;
    size_t asked;
    size_t fail_every;
} memory;

static void *memory_alloc(void *user, void *ptr, size_t old_bytes, size_t new_bytes)
{
    memory *self = (memory *)user;
    void *grown;
    if (new_bytes == 0) {
        self->live_bytes -= old_bytes;
        free(ptr);
        return NULL;
    }
    self->asked++;
    if (new_bytes > old_bytes && self->fail_every != 0 && self->asked % self->fail_every == 0) {
        return NULL;
    }
    grown = realloc(ptr, new_bytes);
    require(grown != NULL, "the machine has no memory");
    self->live_bytes = self->live_bytes - old_bytes + new_bytes;
    if (self->live_bytes > self->peak_bytes) {
        self->peak_bytes = self->live_bytes;
    }
    return grown;
}

/* ---- sockets: the listener is a pair, a byte in it announces a client ---- */

static int bell[2];
static int waiting_fd;

/* The same hash seeds each time: PUBSUB CHANNELS names them in the order of a hash table. */
static uint64_t give_random(void)
{
    return 4;
}

static int give_listener(int family, int type)
{
    (void)family;
    (void)type;
    return bell[0];
}

static int accept_bind(int fd, const void *address, uint32_t bytes, uint32_t mode)
{
    (void)fd;
    (void)address;
    (void)bytes;
    (void)mode;
    return 0;
}

static int accept_listen(int fd, int backlog)
{
    (void)fd;
    (void)backlog;
    return 0;
}

static int give_port(int fd)
{
    (void)fd;
    return 4242;
}

static int accept_nodelay(int fd)
{
    (void)fd;
    return 0;
}

static int give_client(int fd)
{
    char byte;
    return read(fd, &byte, 1) == 1 ? waiting_fd : -EAGAIN;
}

static void make_pair(int fds[2])
{
    require(socketpair(AF_UNIX, SOCK_STREAM, 0, fds) == 0, "no socketpair");
    require(vkp_sys_get_default()->prepare(fds[0]) == 0 &&
                vkp_sys_get_default()->prepare(fds[1]) == 0,
            "a socket cannot be prepared");
}

/* ---- a relay, and its clients ---- */

typedef struct client {
    int fd; /* -1 when ended */
    uint8_t *heard;
    size_t heard_len;
    size_t heard_capacity;
} client;

typedef struct world {
    vkp_sys sys;
    memory mem;
    vkp_loop *loop;
    vkp_relay *relay;
    client hostile;
    client calm;
} world;

static void hear(client *self)
{
    while (self->fd >= 0) {
        ssize_t got;
        if (self->heard_capacity - self->heard_len < 4096) {
            self->heard_capacity = self->heard_capacity * 2 + 8192;
            self->heard = (uint8_t *)realloc(self->heard, self->heard_capacity);
            require(self->heard != NULL, "the machine has no memory");
        }
        got = read(self->fd, self->heard + self->heard_len, 4096);
        if (got > 0) {
            self->heard_len += (size_t)got;
        } else if (got == 0 || (errno != EAGAIN && errno != EWOULDBLOCK)) {
            close(self->fd);
            self->fd = -1;
        } else {
            break;
        }
    }
}

static void run_round(world *self)
{
    require(vkp_loop_run_once(self->loop, 0) == VKP_OK, "a round failed");
    hear(&self->hostile);
    hear(&self->calm);
}

static void connect_client(world *self, client *who)
{
    int fds[2];
    int i;
    make_pair(fds);
    who->fd = fds[0];
    waiting_fd = fds[1];
    require(write(bell[1], "c", 1) == 1, "the bell is full");
    for (i = 0; i < 4; i++) {
        run_round(self);
    }
}

/* Whether all was sent; the relay may have hung up before. */
static bool say(world *self, client *who, const uint8_t *bytes, size_t len)
{
    int rounds = 0;
    while (len > 0 && who->fd >= 0) {
        ssize_t sent = write(who->fd, bytes, len);
        if (sent > 0) {
            bytes += sent;
            len -= (size_t)sent;
        } else if (errno != EAGAIN && errno != EWOULDBLOCK) {
            break;
        }
        run_round(self);
        require(++rounds < MOST_ROUNDS, "the relay does not read");
    }
    return len == 0;
}

static bool has_heard(const client *who, const char *text)
{
    size_t len = strlen(text);
    size_t at;
    for (at = who->heard_len; at >= len; at--) {
        if (memcmp(who->heard + at - len, text, len) == 0) {
            return true;
        }
    }
    return false;
}

/* What the other client says must be answered, whatever the hostile one does. */
static void ask_calmly(world *self, const char *command, const char *answer)
{
    int rounds = 0;
    bool sent = say(self, &self->calm, (const uint8_t *)command, strlen(command));
    while (self->mem.fail_every == 0 && !has_heard(&self->calm, answer)) {
        run_round(self);
        require(sent && self->calm.fd >= 0, "another client was cut off");
        require(++rounds < MOST_ROUNDS, "another client gets no answer");
    }
}

static void open_world(world *self, bool small, size_t fail_every)
{
    vkp_loop_config loop = VKP_ZERO;
    vkp_relay_config relay = VKP_ZERO;
    memset(self, 0, sizeof *self);
    self->sys = *vkp_sys_get_default();
    self->sys.random_u64 = give_random;
    self->sys.socket = give_listener;
    self->sys.bind = accept_bind;
    self->sys.listen = accept_listen;
    self->sys.local_port = give_port;
    self->sys.set_nodelay = accept_nodelay;
    self->sys.accept = give_client;
    self->mem.env.alloc = memory_alloc;
    self->mem.env.user = &self->mem;
    self->mem.env.sys = &self->sys;
    self->hostile.fd = -1;
    self->calm.fd = -1;
    make_pair(bell);
    loop.backend = &vkp_backend_poll;
    loop.env = &self->mem.env;
    require(vkp_loop_open(&loop, &self->loop) == VKP_OK, "no loop");
    relay.loops = &self->loop;
    relay.env = &self->mem.env;
    if (small) {
        relay.max_request_bytes = 300;
        relay.max_reply_bytes = 2000;
        relay.max_subscriptions = 4;
        relay.queue_frames = 4;
        relay.queue_bytes = 500;
        relay.on_full = VKP_ON_FULL_DROP_OLDEST;
    }
    require(vkp_relay_open(&relay, &self->relay) == VKP_OK, "no relay");
    require(vkp_relay_listen(self->relay, vkp_str_of("tcp:127.0.0.1:0"), NULL) == VKP_OK,
            "no listener");
    connect_client(self, &self->calm);
    ask_calmly(self, "PSUBSCRIBE news*\r\nPING begin\r\n", "begin\r\n");
    self->mem.fail_every = fail_every;
    connect_client(self, &self->hostile);
}

static void close_world(world *self, size_t size)
{
    self->mem.fail_every = 0;
    vkp_relay_unref(self->relay);
    vkp_loop_close(self->loop);
    vkp_loop_unref(self->loop);
    hear(&self->hostile);
    hear(&self->calm);
    require(self->hostile.fd < 0 && self->calm.fd < 0, "a descriptor leaked");
    require(self->mem.live_bytes == 0, "memory leaked");
    require(self->mem.peak_bytes <= ((size_t)1 << 20) + 256 * size,
            "memory out of proportion to the input");
    close(bell[1]);
    free(self->calm.heard);
}

/* ---- what is promised ---- */

static void check_heard(const client *who)
{
    vkp_resp_reader *reader = NULL;
    const vkp_value *value = NULL;
    size_t at = 0;
    size_t used = 0;
    vkp_status status;
    require(vkp_resp_reader_open(NULL, &reader) == VKP_OK, "no reader");
    do {
        status = vkp_resp_reader_scan(reader, who->heard + at, who->heard_len - at, &value, &used);
        at += status == VKP_OK ? used : 0;
    } while (status == VKP_OK);
    require(status == VKP_ERR_EMPTY && at == who->heard_len, "an answer is no RESP");
    vkp_resp_reader_unref(reader);
}

/* The client's whole life; gives what it heard. */
static client live(const uint8_t *head, const uint8_t *stream, size_t size, size_t fail_every,
                   bool whole)
{
    world all;
    size_t at = 0;
    size_t index = 0;
    int rounds = 0;
    bool going = true;
    open_world(&all, (head[0] & 1u) != 0, fail_every);
    while (going && at < size) {
        size_t len = whole ? size : (size_t)head[1 + index++ % (HEAD - 1)] + 1;
        len = len < size - at ? len : size - at;
        going = say(&all, &all.hostile, stream + at, len);
        at += len;
    }
    if (all.hostile.fd >= 0) {
        (void)shutdown(all.hostile.fd, SHUT_WR);
    }
    while (all.hostile.fd >= 0) {
        run_round(&all);
        require(++rounds < MOST_ROUNDS, "a client that ended is not let go");
    }
    ask_calmly(&all, "PING end\r\n", "end\r\n");
    if (fail_every == 0) {
        check_heard(&all.hostile);
        check_heard(&all.calm);
    }
    close_world(&all, size);
    return all.hostile;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    client whole;
    client pieces;
    size_t fail_every;
    if (size < HEAD || size > 4096) {
        return 0;
    }
    (void)signal(SIGPIPE, SIG_IGN);
    fail_every = data[0] >> 1;
    fail_every = fail_every == 1 ? 2 : fail_every;
    size -= HEAD;
    whole = live(data, data + HEAD, size, 0, true);
    pieces = live(data, data + HEAD, size, 0, false);
    require(whole.heard_len == pieces.heard_len &&
                (whole.heard_len == 0 || memcmp(whole.heard, pieces.heard, whole.heard_len) == 0),
            "in pieces it is answered differently");
    free(whole.heard);
    free(pieces.heard);
    if (fail_every != 0) {
        free(live(data, data + HEAD, size, fail_every, false).heard);
    }
    return 0;
}
