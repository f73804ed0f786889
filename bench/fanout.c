/* fanout [rounds [part of a group's name]]: 64-byte messages, one publisher, many subscribers.
   SPDX-License-Identifier: MIT

   Servers, each a process on core 0: the relay as a stand-alone broker, the relay behind a server
   (which then runs on core 1), redis-server, and the limit: a loop that writes the messages that
   came in one read to each subscriber in one call; and the same loop with io_uring, where one
   submit writes to up to 256 of them. This process, on core 1, publishes a window of messages in
   one write and reads until all subscribers have all of them; then the next window. What is
   compared is the server's CPU time for each delivered message. System calls are counted by
   strace, in the first round, off the clock.                                                   */
#include "uring.h"

#define SUBSCRIBERS_MOST 1000
#define MEMORY_CONNECTIONS 2000
#define RUN_NS 100000000u
#define WARM_UP 3
#define CALLS_WINDOWS 4

static const char push[] =
    ">3\r\n$7\r\nmessage\r\n$2\r\nch\r\n$32\r\nxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\r\n";
static const char publish[] =
    "*3\r\n$7\r\nPUBLISH\r\n$2\r\nch\r\n$32\r\nxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\r\n";
static const char confirmed[] = ">3\r\n$9\r\nsubscribe\r\n$2\r\nch\r\n:1\r\n";
#define PUSH_BYTES (sizeof push - 1)
#define PUBLISH_BYTES (sizeof publish - 1)

typedef struct server {
    const char *name;
    pid_t pid;
    char address[96];   /* subscribers */
    char publisher[96]; /* where PUBLISH goes */
} server;

enum { RELAY, RELAY_BEHIND, REDIS, RAW, RAW_URING, SERVERS };
static server servers[2][SERVERS]; /* by transport */
static const char *const transports[2] = {"unix", "tcp"};
static char folder[64];

/* ---- readiness of many descriptors ---- */

#ifdef __linux__
typedef struct set {
    int fd;
} set;

static void set_open(set *self)
{
    self->fd = epoll_create1(EPOLL_CLOEXEC);
}

static void set_add(set *self, int fd)
{
    struct epoll_event event = {EPOLLIN, {.fd = fd}};
    epoll_ctl(self->fd, EPOLL_CTL_ADD, fd, &event);
}

/* How many of `ready` were filled; 0 after so many milliseconds (-1: never). */
static size_t set_wait(set *self, int *ready, size_t capacity, int wait_ms)
{
    struct epoll_event events[512];
    int count;
    int i;
    do {
        count = epoll_wait(self->fd, events, (int)(capacity < 512 ? capacity : 512), wait_ms);
    } while (count < 0 && errno == EINTR);
    for (i = 0; i < count; i++) {
        ready[i] = events[i].data.fd;
    }
    return count > 0 ? (size_t)count : 0;
}

static void set_close(set *self)
{
    close(self->fd);
}
#else
typedef struct set {
    struct pollfd fds[SUBSCRIBERS_MOST + 16];
    size_t count;
} set;

static void set_open(set *self)
{
    self->count = 0;
}

static void set_add(set *self, int fd)
{
    struct pollfd one = {fd, POLLIN, 0};
    self->fds[self->count++] = one;
}

static size_t set_wait(set *self, int *ready, size_t capacity, int wait_ms)
{
    size_t count = 0;
    size_t i;
    while (poll(self->fds, (nfds_t)self->count, wait_ms) < 0 && errno == EINTR) {
    }
    for (i = 0; i < self->count && count < capacity; i++) {
        if (self->fds[i].revents != 0) {
            ready[count++] = self->fds[i].fd;
        }
    }
    return count;
}

static void set_close(set *self)
{
    self->count = 0;
}
#endif

/* ---- the limit ---- */

static void raw_answer(int fd, const char *text, size_t times)
{
    while (times-- > 0) {
        bench_write(fd, text, strlen(text));
    }
}

#if VKP_BENCH_URING
static uring ring;

static bool ring_open(void)
{
    return uring_open(&ring, IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN);
}

static void ring_know(int fd, bool on)
{
    if (ring.has_files) {
        uring_set_file(&ring, fd, on);
    }
}

/* What a full socket does not take goes the other way. */
static void ring_write(const int *fds, size_t count, const char *data, size_t len)
{
    while (count > 0 && len > 0) {
        unsigned part = count < URING_ENTRIES ? (unsigned)count : URING_ENTRIES;
        const struct io_uring_cqe *cqe;
        unsigned i;
        for (i = 0; i < part; i++) {
            uring_send(&ring, fds[i], data, len, (uint64_t)fds[i]);
        }
        uring_submit(&ring, part);
        while ((cqe = uring_peek(&ring)) != NULL) {
            size_t put = cqe->res > 0 ? (size_t)cqe->res : 0;
            bench_write((int)cqe->user_data, data + put, len - put);
            uring_took(&ring);
        }
        fds += part;
        count -= part;
    }
}
#endif

/* The same to each. */
static void raw_write(const int *fds, size_t count, const char *data, size_t len)
{
    size_t at;
#if VKP_BENCH_URING
    if (ring.has_files) {
        ring_write(fds, count, data, len);
        return;
    }
#endif
    for (at = 0; at < count; at++) {
        bench_write(fds[at], data, len);
    }
}

/* Subscribers begin with HELLO, the publisher with PUBLISH. It holds what it counts, no more. */
static void raw_serve(const char *address)
{
    static int subscribers[SUBSCRIBERS_MOST + 16];
    static char in[65536];
    static char joined[65536];
    static char replies[65536];
    static size_t torn[16384]; /* bytes of a PUBLISH not whole yet, by descriptor */
    int ready[512];
    size_t subscriber_count = 0;
    size_t i;
    int listener = bench_listen(address);
    set self;
    for (i = 0; i + PUSH_BYTES <= sizeof joined; i += PUSH_BYTES) {
        memcpy(joined + i, push, PUSH_BYTES);
    }
    set_open(&self);
    set_add(&self, listener);
    for (;;) {
        size_t count = set_wait(&self, ready, 512, -1);
        for (i = 0; i < count; i++) {
            int fd = ready[i];
            size_t whole;
            size_t at;
            ssize_t got;
            if (fd == listener) {
                fd = accept(listener, NULL, NULL);
                bench_nodelay(fd);
                fcntl(fd, F_SETFL, O_NONBLOCK);
                torn[fd] = 0;
                set_add(&self, fd);
                continue;
            }
            got = read(fd, in, sizeof in);
            if (got <= 0) {
                for (at = 0; at < subscriber_count; at++) {
                    if (subscribers[at] == fd) {
                        subscribers[at] = subscribers[--subscriber_count];
                    }
                }
#if VKP_BENCH_URING
                ring_know(fd, false);
#endif
                close(fd);
            } else if (in[0] == 'P' && torn[fd] == 0) {
                raw_answer(fd, "+PONG\r\n", 1);
            } else if (in[0] == 'H' && torn[fd] == 0) {
                subscribers[subscriber_count++] = fd;
#if VKP_BENCH_URING
                ring_know(fd, true);
#endif
                raw_answer(fd, confirmed, 1);
            } else {
                torn[fd] += (size_t)got;
                whole = torn[fd] / PUBLISH_BYTES;
                torn[fd] %= PUBLISH_BYTES;
                raw_write(subscribers, subscriber_count, joined, whole * PUSH_BYTES);
                for (at = 0; at < whole; at++) {
                    memcpy(replies + at * 4, ":1\r\n", 4);
                }
                bench_write(fd, replies, whole * 4);
            }
        }
    }
}

/* ---- ours ---- */

static void relay_serve(const char *upstream, const char *address)
{
    vkp_loop_config loop_config = VKP_ZERO;
    vkp_relay_config config = VKP_ZERO;
    vkp_loop *loop;
    vkp_relay *relay;
#ifdef __linux__
    loop_config.backend = &vkp_backend_epoll;
#else
    loop_config.backend = &vkp_backend_poll;
#endif
    bench_raise_descriptors();
    if (vkp_loop_open(&loop_config, &loop) != VKP_OK) {
        bench_fail("no loop");
    }
    config.server = vkp_str_of(upstream);
    config.loops = &loop;
    config.queue_bytes = (size_t)256 << 20;
    config.on_full = VKP_ON_FULL_DISCONNECT;
    if (vkp_relay_open(&config, &relay) != VKP_OK ||
        vkp_relay_listen(relay, vkp_str_of(address), NULL) != VKP_OK) {
        bench_fail("no relay at %s: %s", address, strerror(errno));
    }
    exit(vkp_loop_run(loop) == VKP_OK ? 0 : 1);
}

/* ---- starting servers ---- */

static void place(server *self, const char *name, int transport, int which)
{
    int port = 20000 + (int)(getpid() % 10000) + which; /* below what the system gives out */
    self->name = name;
    if (transport == 0) {
        snprintf(self->address, sizeof self->address, "unix:%s/%d.sock", folder, which);
    } else {
        snprintf(self->address, sizeof self->address, "tcp:127.0.0.1:%d", port);
    }
    memcpy(self->publisher, self->address, sizeof self->address);
}

static pid_t start_redis(const server *self, int core, int which)
{
    char path[96];
    char port[16] = "0";
    snprintf(path, sizeof path, "%s/redis%d.sock", folder, which);
    if (strncmp(self->address, "unix:", 5) == 0) {
        snprintf(path, sizeof path, "%s", self->address + 5);
    } else {
        snprintf(port, sizeof port, "%s", strrchr(self->address, ':') + 1);
    }
    return bench_start_server(core, port, path);
}

static void start(int transport, int kind)
{
    static const char *const names[SERVERS] = {"relay, stand-alone", "relay behind a server",
                                               "redis-server", "limit: joined write",
                                               "limit, by io_uring"};
    server *self = &servers[transport][kind];
    int which = transport * 10 + kind;
    int fd;
    place(self, names[kind], transport, which);
    if (kind == REDIS) {
        self->pid = start_redis(self, 0, which);
    } else if (kind == RELAY_BEHIND) {
        server upstream;
        place(&upstream, "upstream", transport, transport * 10 + 8);
        (void)start_redis(&upstream, 1, transport * 10 + 8);
        memcpy(self->publisher, upstream.address, sizeof self->publisher);
        close(bench_dial(upstream.address));
        self->pid = bench_fork(0);
        if (self->pid == 0) {
            relay_serve(upstream.address, self->address);
        }
    } else {
        self->pid = bench_fork(0);
        if (self->pid == 0 && kind == RELAY) {
            relay_serve(NULL, self->address);
        } else if (self->pid == 0) {
#if VKP_BENCH_URING
            if (kind == RAW_URING) {
                if (!ring_open()) {
                    bench_fail("io_uring: %s", strerror(errno));
                }
                uring_open_files(&ring);
            }
#endif
            raw_serve(self->address);
        }
    }
    fd = bench_dial(self->address);
    if (kind < RAW) { /* a relay answers once its server does */
        bench_write(fd, "PING\r\n", 6);
        bench_expect(fd, "PONG\r\n");
    }
    close(fd);
}

/* ---- one run ---- */

typedef struct crowd {
    set set;
    int fds[SUBSCRIBERS_MOST];
    size_t count;
    int publisher;
    char *window;
    size_t window_count;
    uint64_t received; /* bytes of messages */
    uint64_t answered; /* bytes of replies */
} crowd;

static crowd the_crowd;

static void crowd_subscribe(int fd)
{
    static const char hello[] = "HELLO 3\r\nSUBSCRIBE ch\r\n";
    bench_write(fd, hello, sizeof hello - 1);
}

static void crowd_open(crowd *self, const server *to, size_t count, size_t window)
{
    size_t i;
    memset(self, 0, sizeof *self);
    set_open(&self->set);
    self->count = count;
    for (i = 0; i < count; i++) {
        self->fds[i] = bench_dial(to->address);
        crowd_subscribe(self->fds[i]);
    }
    for (i = 0; i < count; i++) {
        bench_expect(self->fds[i], confirmed);
        set_add(&self->set, self->fds[i]);
    }
    self->publisher = bench_dial(to->publisher);
    set_add(&self->set, self->publisher);
    self->window_count = window;
    self->window = (char *)malloc(window * PUBLISH_BYTES);
    for (i = 0; i < window; i++) {
        memcpy(self->window + i * PUBLISH_BYTES, publish, PUBLISH_BYTES);
    }
}

static void crowd_close(crowd *self)
{
    size_t i;
    set_close(&self->set);
    for (i = 0; i < self->count; i++) {
        close(self->fds[i]);
    }
    close(self->publisher);
    free(self->window);
}

static size_t count_lines(const char *in, size_t len)
{
    size_t lines = 0;
    while (len > 0) {
        lines += in[--len] == '\n';
    }
    return lines;
}

/* One window, from the first byte out to the last one in. */
static void crowd_round(crowd *self)
{
    static char in[65536];
    int ready[512];
    uint64_t due = (uint64_t)self->window_count * self->count * PUSH_BYTES;
    size_t answers = 0;
    self->received = 0;
    bench_write(self->publisher, self->window, self->window_count * PUBLISH_BYTES);
    while (self->received < due || answers < self->window_count) {
        size_t count = set_wait(&self->set, ready, 512, 10000);
        size_t i;
        if (count == 0) {
            bench_fail("no message for ten seconds");
        }
        for (i = 0; i < count; i++) {
            ssize_t got = read(ready[i], in, sizeof in);
            if (got <= 0) {
                bench_fail("a connection ended: %s", got < 0 ? strerror(errno) : "end of file");
            }
            if (ready[i] == self->publisher) {
                answers += count_lines(in, (size_t)got);
            } else {
                self->received += (uint64_t)got;
            }
        }
    }
    if (self->received != due) {
        bench_fail("%llu bytes instead of %llu", (unsigned long long)self->received,
                   (unsigned long long)due);
    }
}

static void run(bench_row *row, double *values)
{
    const server *to = (const server *)row->context;
    crowd *self = &the_crowd;
    bench_trace trace;
    double cpu;
    double frames = 0;
    uint64_t begun;
    uint64_t spent;
    int i;
    crowd_open(self, to, (size_t)row->a, (size_t)row->b);
    for (i = 0; i < WARM_UP; i++) {
        crowd_round(self);
    }
    cpu = bench_proc_cpu_ns(to->pid);
    begun = bench_now_ns();
    do {
        crowd_round(self);
        frames += (double)self->window_count * (double)self->count;
        spent = bench_now_ns() - begun;
    } while (spent < RUN_NS);
    values[0] = (bench_proc_cpu_ns(to->pid) - cpu) / frames;
    values[1] = frames * 1e3 / (double)spent;
    values[2] = NAN;
    if (row->samples == values && bench_trace_start(&trace, to->pid)) { /* in the first round */
        for (i = 0; i < CALLS_WINDOWS; i++) {
            crowd_round(self);
        }
        values[2] = bench_trace_end(&trace) /
                    (CALLS_WINDOWS * (double)self->window_count * (double)self->count);
    }
    crowd_close(self);
}

/* ---- memory: of fresh processes, for what was freed does not go back to the system ---- */

static void memory(int kind)
{
    server *self = &servers[0][kind];
    static int fds[MEMORY_CONNECTIONS];
    double before;
    double idle;
    double subscribed;
    size_t i;
    start(0, kind);
    crowd_open(&the_crowd, self, 16, 1); /* touches all code once */
    crowd_round(&the_crowd);
    crowd_close(&the_crowd);
    before = bench_proc_rss(self->pid);
    for (i = 0; i < MEMORY_CONNECTIONS; i++) {
        fds[i] = bench_dial(self->address);
        bench_write(fds[i], "PING\r\n", 6);
        bench_expect(fds[i], "PONG\r\n");
    }
    idle = bench_proc_rss(self->pid);
    for (i = 0; i < MEMORY_CONNECTIONS; i++) {
        crowd_subscribe(fds[i]);
        bench_expect(fds[i], confirmed);
    }
    subscribed = bench_proc_rss(self->pid);
    printf("| %s | %.0f | %.0f |\n", self->name, (idle - before) / MEMORY_CONNECTIONS,
           (subscribed - before) / MEMORY_CONNECTIONS);
    for (i = 0; i < MEMORY_CONNECTIONS; i++) {
        close(fds[i]);
    }
    bench_stop(self->pid);
}

static void forget_folder(void)
{
    char path[128];
    int i;
    for (i = 0; i < 20; i++) {
        snprintf(path, sizeof path, "%s/%d.sock", folder, i);
        unlink(path);
        snprintf(path, sizeof path, "%s/%d.sock.lock", folder, i);
        unlink(path);
        snprintf(path, sizeof path, "%s/redis%d.sock", folder, i);
        unlink(path);
    }
    rmdir(folder);
}

int main(int argc, char **argv)
{
    static const long crowds[3] = {1, 100, 1000};
    static const long windows[4] = {1, 16, 64, 512};
    static bench_row rows[2 * 3 * 4 * SERVERS];
    static char groups[2 * 3 * 4][48];
    bench_table table = {"fanout: server CPU, ns for each delivered 64-byte message",
                         {"ns/message", "M messages/s", "system calls/message"},
                         {0, 2, 3},
                         3,
                         true,
                         rows,
                         0};
    size_t rounds = bench_rounds(argc, argv);
    size_t group = 0;
    size_t i;
    size_t j;
    int transport;
    int kind;
    int kinds = RAW_URING;
#if VKP_BENCH_URING
    if (ring_open()) { /* the kernel has what it takes, and lets us */
        close(ring.fd);
        kinds = SERVERS;
    }
#endif
    bench_raise_descriptors();
    snprintf(folder, sizeof folder, "/tmp/vkp-bench-XXXXXX");
    if (mkdtemp(folder) == NULL) {
        bench_fail("no folder in /tmp");
    }
    signal(SIGPIPE, SIG_IGN);
    bench_print_machine();
    bench_pin(1);
    printf("\n### fanout: memory of a connection, bytes of the server's resident set (unix, %d "
           "connections)\n\n| | idle | subscribed |\n|---|---|---|\n",
           MEMORY_CONNECTIONS);
    for (kind = 0; kind <= RAW; kind++) {
        memory(kind);
    }
    fflush(stdout);
    bench_stop_children(); /* the memory table's upstream too */
    for (transport = 0; transport < 2; transport++) {
        for (kind = 0; kind < kinds; kind++) {
            start(transport, kind);
        }
        for (i = 0; i < 3; i++) {
            for (j = 0; j < 4; j++, group++) {
                bool joins = windows[j] >= 16;
                bool small = windows[j] == 16;
                snprintf(groups[group], sizeof groups[group], "%s, %ld clients, window %ld",
                         transports[transport], crowds[i], windows[j]);
                for (kind = 0; kind < kinds; kind++) {
                    bench_row row = {
                        groups[group], servers[transport][kind].name, BENCH_OTHER, run, crowds[i],
                        windows[j],    &servers[transport][kind],     {{NULL, 0}}, NULL};
                    if (kind == REDIS) {
                        row.role = BENCH_PEER;
                    } else if (kind == RAW) {
                        row.role = BENCH_LIMIT;
                    } else {
                        row.role = BENCH_OURS;
                    }
                    if (kind == RELAY && crowds[i] > 1) {
                        bench_goal peer = {"redis-server", !joins           ? 1.0
                                                           : small          ? 0.65
                                                           : transport == 0 ? 0.3
                                                                            : 0.5};
                        bench_goal limit = {"limit: joined write", joins ? 1.1 : 1.05};
                        row.goals[0] = peer;
                        row.goals[1] = limit;
                    }
                    rows[table.count++] = row;
                }
            }
        }
    }
    bench_keep(&table, argc, argv);
    bench_run(&table, rounds);
    bench_stop_children();
    forget_folder();
    return 0;
}
