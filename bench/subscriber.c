/* subscriber [rounds [part of a group's name]]: what one subscriber costs.
   SPDX-License-Identifier: MIT

   Messages of 64 bytes, 98 bytes as a frame. Each row is a fresh process on core 1. Three tables:
   at the rate of redis-server on core 0, fed by a publisher on core 1; saturated, by a process on
   core 0 that writes frames it made before; and one message at a time, from the PUBLISH to the
   callback in the same thread. hiredis before 1.0 knows no RESP3: it gets arrays.             */
#include "bench.h"

#if VKP_HAVE_HIREDIS
#include <hiredis/hiredis.h>
#if VKP_HAVE_LIBEV
#include <ev.h>
#include <hiredis/adapters/libev.h>
#endif
#endif

#define SERVER_MESSAGES 300000u
#define LATENCY_MESSAGES 2000u
#define LATENCY_WARM_UP 200u
#define WINDOW 512

#define PAYLOAD "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"
static const char push[] = ">3\r\n$7\r\nmessage\r\n$4\r\nchan\r\n$64\r\n" PAYLOAD "\r\n";
static const char publish[] = "*3\r\n$7\r\nPUBLISH\r\n$4\r\nchan\r\n$64\r\n" PAYLOAD "\r\n";
static const char confirmed[] = "3\r\n$9\r\nsubscribe\r\n$4\r\nchan\r\n:1\r\n"; /* its rest */
#define PUSH_BYTES (sizeof push - 1)
#define PUBLISH_BYTES (sizeof publish - 1)

typedef enum kind { RAW, VKP_EPOLL, VKP_POLL, HIREDIS_SYNC, HIREDIS_EV, KINDS } kind;
static const char *const names[KINDS] = {"limit: raw read", "vkp client, epoll", "vkp client, poll",
                                         "hiredis, sync", "hiredis, libev"};

static const bool available[KINDS] = {true,
#ifdef __linux__
                                      true,
#else
                                      false,
#endif
                                      true,
#if VKP_HAVE_HIREDIS
                                      true,
#else
                                      false,
#endif
#if VKP_HAVE_HIREDIS && VKP_HAVE_LIBEV
                                      true
#else
                                      false
#endif
};

/* What a row's process tells. */
typedef struct report {
    double rate; /* M messages/s */
    double cpu;  /* ns/message */
    double p50;  /* us */
    double p99;
} report;

/* State of a row's process. */
static struct {
    uint64_t wanted;
    uint64_t seen;
    uint64_t payload_bytes;
    uint64_t begun_ns;
    double begun_cpu;
    int out;       /* the parent's pipe */
    int publisher; /* one at a time: where PUBLISH goes; else -1 */
    uint64_t sent_ns;
    double *latencies; /* us */
} here;

static void tell_ready(void)
{
    bench_write(here.out, "r", 1);
}

static void tell_end(void)
{
    report told;
    size_t taken = here.seen > LATENCY_WARM_UP ? (size_t)(here.seen - LATENCY_WARM_UP) : 0;
    told.rate = (double)here.wanted * 1e3 / (double)(bench_now_ns() - here.begun_ns);
    told.cpu = (bench_cpu_ns() - here.begun_cpu) / (double)here.wanted;
    told.p50 = NAN;
    told.p99 = NAN;
    if (here.publisher >= 0) {
        told.p50 = bench_percentile(here.latencies + LATENCY_WARM_UP, taken, 0.5);
        told.p99 = bench_percentile(here.latencies + LATENCY_WARM_UP, taken, 0.99);
    }
    bench_write(here.out, &told, sizeof told);
    _exit(0);
}

static void send_one(void)
{
    here.sent_ns = bench_now_ns();
    bench_write(here.publisher, publish, PUBLISH_BYTES);
}

/* Messages arrived. */
static void saw(uint64_t count)
{
    if (here.seen == 0) {
        here.begun_ns = bench_now_ns();
        here.begun_cpu = bench_cpu_ns();
    }
    if (here.publisher >= 0) {
        here.latencies[here.seen] = (double)(bench_now_ns() - here.sent_ns) * 1e-3;
    }
    here.seen += count;
    if (here.seen >= here.wanted) {
        tell_end();
    }
    if (here.publisher >= 0) {
        send_one();
    }
}

static void subscribed(void)
{
    tell_ready();
    if (here.publisher >= 0) {
        send_one();
    }
}

/* ---- the subscribers ---- */

static void subscribe_raw(const char *address)
{
    static char in[65536];
    static const char hello[] =
        "*2\r\n$5\r\nHELLO\r\n$1\r\n3\r\n*2\r\n$9\r\nSUBSCRIBE\r\n$4\r\nchan\r\n";
    int fd = bench_dial(address);
    size_t torn = 0;
    bench_write(fd, hello, sizeof hello - 1);
    bench_expect(fd, "subscribe\r\n$4\r\nchan\r\n:1\r\n");
    subscribed();
    for (;;) {
        ssize_t got = read(fd, in, sizeof in);
        if (got <= 0) {
            bench_fail("the server ended");
        }
        torn += (size_t)got;
        if (torn >= PUSH_BYTES) {
            saw(torn / PUSH_BYTES);
            torn %= PUSH_BYTES;
        }
    }
}

static void on_push(void *user, const vkp_push *got)
{
    (void)user;
    if (got->kind == VKP_PUSH_MESSAGE) {
        here.payload_bytes += got->payload.len;
        saw(1);
    } else if (got->kind == VKP_PUSH_SUBSCRIBED) {
        subscribed();
    }
}

static void subscribe_vkp(const char *address, const vkp_backend *backend)
{
    vkp_loop_config loop_config = VKP_ZERO;
    vkp_client_config config = VKP_ZERO;
    vkp_loop *loop;
    vkp_client *client;
    loop_config.backend = backend;
    config.address = vkp_str_of(address);
    config.on_push = on_push;
    if (vkp_loop_open(&loop_config, &loop) != VKP_OK ||
        vkp_client_open(loop, &config, &client) != VKP_OK ||
        vkp_client_subscribe(client, VKP_SUB_CHANNEL, vkp_str_of("chan")) != VKP_OK ||
        vkp_loop_run(loop) != VKP_OK) {
        bench_fail("no client");
    }
}

#if VKP_HAVE_HIREDIS
static void on_reply(const redisReply *reply)
{
    if (reply->elements == 3 && reply->element[2]->type == REDIS_REPLY_STRING) {
        here.payload_bytes += reply->element[2]->len;
        saw(1);
    } else {
        subscribed();
    }
}

static void subscribe_hiredis(const char *address)
{
    redisContext *context = strncmp(address, "unix:", 5) == 0
                                ? redisConnectUnix(address + 5)
                                : redisConnect("127.0.0.1", atoi(strrchr(address, ':') + 1));
    void *reply = NULL;
    redisAppendCommand(context, "SUBSCRIBE chan");
    while (redisGetReply(context, &reply) == REDIS_OK) {
        on_reply((redisReply *)reply);
        freeReplyObject(reply);
    }
    bench_fail("hiredis: %s", context->errstr);
}

#if VKP_HAVE_LIBEV
static void on_async(redisAsyncContext *context, void *reply, void *user)
{
    (void)context;
    (void)user;
    if (reply != NULL) {
        on_reply((redisReply *)reply);
    }
}

static void subscribe_hiredis_ev(const char *address)
{
    redisAsyncContext *context =
        strncmp(address, "unix:", 5) == 0
            ? redisAsyncConnectUnix(address + 5)
            : redisAsyncConnect("127.0.0.1", atoi(strrchr(address, ':') + 1));
    redisLibevAttach(ev_default_loop(0), context);
    redisAsyncCommand(context, on_async, NULL, "SUBSCRIBE chan");
    ev_run(ev_default_loop(0), 0);
    bench_fail("hiredis: %s", context->errstr);
}
#endif
#endif

static void subscribe(kind which, const char *address)
{
    switch ((int)which) {
    case RAW:
        subscribe_raw(address);
        break;
#ifdef __linux__
    case VKP_EPOLL:
        subscribe_vkp(address, &vkp_backend_epoll);
        break;
#endif
    case VKP_POLL:
        subscribe_vkp(address, &vkp_backend_poll);
        break;
#if VKP_HAVE_HIREDIS
    case HIREDIS_SYNC:
        subscribe_hiredis(address);
        break;
#if VKP_HAVE_LIBEV
    case HIREDIS_EV:
        subscribe_hiredis_ev(address);
        break;
#endif
#endif
    }
    bench_fail("%s: left its loop", names[which]);
}

/* ---- a row's process, from the parent's side ---- */

typedef struct subscriber {
    pid_t pid;
    int in;
} subscriber;

static void forget(int fd)
{
    if (fd >= 0) {
        close(fd);
    }
}

/* `publisher` dials where one-at-a-time messages go; NULL for the other tables. */
static subscriber subscriber_start(kind which, const char *address, uint64_t messages,
                                   const char *publisher)
{
    static const char off[] = "CLIENT REPLY OFF\r\n";
    subscriber self;
    int ends[2];
    if (pipe(ends) != 0) {
        bench_fail("pipe: %s", strerror(errno));
    }
    self.pid = bench_fork(1);
    self.in = ends[0];
    if (self.pid != 0) {
        close(ends[1]);
        return self;
    }
    close(ends[0]);
    alarm(60); /* a row that hangs ends the program */
    here.out = ends[1];
    here.wanted = messages;
    here.publisher = -1;
    if (publisher != NULL) {
        here.latencies = (double *)calloc((size_t)messages, sizeof *here.latencies);
        here.publisher = bench_dial(publisher);
        bench_write(here.publisher, off, sizeof off - 1);
    }
    subscribe(which, address);
    return self;
}

static void subscriber_read(const subscriber *self, void *data, size_t len)
{
    char *at = (char *)data;
    while (len > 0) {
        ssize_t got = read(self->in, at, len);
        if (got <= 0) {
            bench_fail("a subscriber ended early");
        }
        at += got;
        len -= (size_t)got;
    }
}

static void subscriber_wait(const subscriber *self)
{
    char ready;
    subscriber_read(self, &ready, 1);
}

static report subscriber_end(subscriber *self)
{
    report told;
    subscriber_read(self, &told, sizeof told);
    forget(self->in);
    bench_stop(self->pid);
    return told;
}

/* ---- at the server's rate ---- */

static char folder[64];
static char server_address[2][96]; /* unix, tcp */

static void publish_all(const char *address, uint64_t messages)
{
    static const char off[] = "CLIENT REPLY OFF\r\n";
    static char window[WINDOW * PUBLISH_BYTES];
    int fd = bench_dial(address);
    uint64_t sent;
    size_t i;
    for (i = 0; i < WINDOW; i++) {
        memcpy(window + i * PUBLISH_BYTES, publish, PUBLISH_BYTES);
    }
    bench_write(fd, off, sizeof off - 1);
    for (sent = 0; sent < messages; sent += WINDOW) {
        bench_write(fd, window, sizeof window);
    }
    close(fd);
}

static void run_server(bench_row *row, double *values)
{
    subscriber self = subscriber_start((kind)row->a, server_address[row->b], SERVER_MESSAGES, NULL);
    bench_trace trace;
    report told;
    bench_pin(1);
    subscriber_wait(&self);
    publish_all(server_address[row->b], SERVER_MESSAGES);
    told = subscriber_end(&self);
    values[0] = told.cpu;
    values[1] = told.rate;
    values[2] = NAN;
    if (row->samples == values) {
        self = subscriber_start((kind)row->a, server_address[row->b], SERVER_MESSAGES, NULL);
        subscriber_wait(&self);
        if (bench_trace_start(&trace, self.pid)) {
            publish_all(server_address[row->b], SERVER_MESSAGES);
            (void)subscriber_end(&self);
            values[2] = bench_trace_end(&trace) / SERVER_MESSAGES;
        } else {
            forget(self.in);
            bench_stop(self.pid);
        }
    }
}

/* ---- saturated ---- */

/* Answer HELLO and SUBSCRIBE as the client in hand understands it, then write. */
static void blast(int listener, bool arrays, uint64_t messages)
{
    static const char hello[] = "%2\r\n$5\r\nproto\r\n:3\r\n$4\r\nmode\r\n$10\r\nstandalone\r\n";
    static char frames[WINDOW * 2 * PUSH_BYTES];
    char asked[4096];
    size_t len = 0;
    size_t i;
    uint64_t sent;
    bool greeted = false;
    int fd = accept(listener, NULL, NULL);
    bench_nodelay(fd);
    for (i = 0; i < WINDOW * 2; i++) {
        memcpy(frames + i * PUSH_BYTES, push, PUSH_BYTES);
        frames[i * PUSH_BYTES] = arrays ? '*' : '>';
    }
    for (;;) {
        ssize_t got = read(fd, asked + len, sizeof asked - 1 - len);
        if (got <= 0) {
            bench_fail("the subscriber ended early");
        }
        len += (size_t)got;
        asked[len] = '\0';
        if (!greeted && strstr(asked, "HELLO") != NULL) {
            greeted = true;
            bench_write(fd, hello, sizeof hello - 1);
        }
        if (strstr(asked, "SUBSCRIBE") != NULL && strstr(asked, "chan\r\n") != NULL) {
            bench_write(fd, arrays ? "*" : ">", 1);
            bench_write(fd, confirmed, sizeof confirmed - 1);
            break;
        }
    }
    /* One write more than is wanted: some may arrive with the confirmation, before it counts. */
    for (sent = 0; sent < messages + WINDOW * 2; sent += WINDOW * 2) {
        if (write(fd, frames, sizeof frames) != (ssize_t)sizeof frames) {
            break; /* it has what it wants */
        }
    }
    (void)read(fd, asked, 1); /* until it ends */
    close(fd);
}

static bool needs_arrays(kind which)
{
#if VKP_HAVE_HIREDIS
    return (which == HIREDIS_SYNC || which == HIREDIS_EV) && HIREDIS_MAJOR < 1;
#else
    (void)which;
    return false;
#endif
}

static void run_saturated(bench_row *row, double *values)
{
    kind which = (kind)row->a;
    uint64_t messages = which == HIREDIS_SYNC || which == HIREDIS_EV ? 1000000u : 6000000u;
    char address[96];
    subscriber self;
    report told;
    int listener;
    bench_pin(0);
    if (row->b == 0) {
        snprintf(address, sizeof address, "unix:%s/blast.sock", folder);
    } else {
        snprintf(address, sizeof address, "tcp:127.0.0.1:%d", 20000 + (int)(getpid() % 10000) + 1);
    }
    listener = bench_listen(address);
    self = subscriber_start(which, address, messages, NULL);
    blast(listener, needs_arrays(which), messages);
    close(listener);
    subscriber_wait(&self);
    told = subscriber_end(&self);
    values[0] = told.rate;
    values[1] = told.cpu;
    bench_pin(1);
}

/* ---- one at a time ---- */

static void run_latency(bench_row *row, double *values)
{
    const char *address = server_address[row->b];
    subscriber self =
        subscriber_start((kind)row->a, address, LATENCY_MESSAGES + LATENCY_WARM_UP, address);
    report told;
    subscriber_wait(&self);
    told = subscriber_end(&self);
    values[0] = told.p50;
    values[1] = told.p99;
}

/* ---- the tables ---- */

static const char *const transports[2] = {"unix", "tcp"};

static void add_rows(bench_table *table, void (*run)(bench_row *row, double *values),
                     const bench_goal *goals, double limit_unix)
{
    int transport;
    int which;
    for (transport = 0; transport < 2; transport++) {
        for (which = 0; which < KINDS; which++) {
            bench_row row = {
                transports[transport], names[which], BENCH_PEER, run, which, transport, NULL,
                {{NULL, 0}},           NULL};
            if (!available[which]) {
                continue;
            }
            if (which == RAW) {
                row.role = BENCH_LIMIT;
            } else if (which == VKP_EPOLL || which == VKP_POLL) {
                row.role = BENCH_OURS;
                memcpy(row.goals, goals, 3 * sizeof *goals);
                if (transport == 0 && limit_unix > 0) {
                    row.goals[0].ratio = limit_unix;
                }
            }
            table->rows[table->count++] = row;
        }
    }
}

int main(int argc, char **argv)
{
    static bench_row rows[3][2 * KINDS];
    static const bench_goal goals[3][3] = {
        {{"limit: raw read", 1.25}, {"hiredis, sync", 0.4}, {"hiredis, libev", 0.3}},
        {{"limit: raw read", 0.9}, {"hiredis, sync", 4}, {"hiredis, libev", 5}},
        {{"limit: raw read", 1.05}, {"hiredis, sync", 1.0}, {NULL, 0}}};
    bench_table tables[3] = {
        {"subscriber: CPU for each message, at redis-server's rate",
         {"ns/message", "M messages/s", "system calls/message"},
         {0, 2, 4},
         3,
         true,
         rows[0],
         0},
        {"subscriber: saturated", {"M messages/s", "ns/message"}, {2, 0}, 2, false, rows[1], 0},
        {"subscriber: PUBLISH to callback, one at a time",
         {"p50 us", "p99 us"},
         {1, 1},
         2,
         true,
         rows[2],
         0}};
    size_t rounds = bench_rounds(argc, argv);
    char port[16];
    size_t i;
    snprintf(folder, sizeof folder, "/tmp/vkp-bench-XXXXXX");
    if (mkdtemp(folder) == NULL) {
        bench_fail("no folder in /tmp");
    }
    signal(SIGPIPE, SIG_IGN);
    bench_print_machine();
    snprintf(port, sizeof port, "%d", 20000 + (int)(getpid() % 10000));
    snprintf(server_address[0], sizeof server_address[0], "unix:%s/redis.sock", folder);
    snprintf(server_address[1], sizeof server_address[1], "tcp:127.0.0.1:%s", port);
    (void)bench_start_server(0, port, server_address[0] + 5);
    close(bench_dial(server_address[0])); /* it is there */
    close(bench_dial(server_address[1]));
    add_rows(&tables[0], run_server, goals[0], 0);
    add_rows(&tables[1], run_saturated, goals[1], 0.7);
    add_rows(&tables[2], run_latency, goals[2], 0);
    for (i = 0; i < 3; i++) {
        bench_keep(&tables[i], argc, argv);
        bench_run(&tables[i], rounds);
    }
    bench_stop_children();
    unlink(server_address[0] + 5);
    {
        char path[96];
        snprintf(path, sizeof path, "%s/blast.sock", folder);
        unlink(path);
    }
    rmdir(folder);
    return 0;
}
