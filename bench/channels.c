/* channels [rounds [part of a group's name]]: messages from thread to thread, and on one thread.
   SPDX-License-Identifier: MIT

   Throughput by one sender and by four (on two cores those show what happens when threads outnumber
   cores), the cost of a message that meets nobody, round trips with and without spinning, memory.
   ck_ring has one sender and no way to wait: it is shown, and no peer of what may sleep.       */
#include "drive.h"

#define MANY 256

/* ---- ours ---- */

typedef struct ours_receiver {
    vkp_mpsc_rx *rx;
    size_t next;
    size_t count;
    unsigned char held[MANY * 64];
} ours_receiver;

typedef struct ours_channel {
    vkp_mpsc_tx *tx;
    ours_receiver *receiver;
} ours_channel;

static void *ours_open(const work_order *order)
{
    ours_channel *self = (ours_channel *)work_alloc(sizeof *self);
    vkp_mpsc_config config = VKP_ZERO;
    config.elem_bytes = (size_t)order->b;
    config.capacity_items = (size_t)order->a;
    config.lanes = strstr(order->kind, "lanes") != NULL;
    config.env = drive_env(order);
    self->receiver = (ours_receiver *)work_alloc(sizeof *self->receiver);
    drive_check(vkp_mpsc_open(&config, &self->tx, &self->receiver->rx), "open");
    return self;
}

/* The first sender is the channel's own, as in a program with one. */
static void *ours_sender(void *channel, long index)
{
    ours_channel *self = (ours_channel *)channel;
    vkp_mpsc_tx *tx = self->tx;
    if (index > 0) {
        drive_check(vkp_mpsc_tx_clone(self->tx, &tx), "clone");
    }
    return tx;
}

static void *ours_get_receiver(void *channel)
{
    return ((ours_channel *)channel)->receiver;
}

WORK_INLINE void ours_send(void *sender, const void *message, size_t bytes)
{
    (void)bytes;
    if (vkp_mpsc_send((vkp_mpsc_tx *)sender, message, VKP_FOREVER) != VKP_OK) {
        bench_fail("send");
    }
}

WORK_INLINE void ours_receive(void *receiver, void *message, size_t bytes)
{
    (void)bytes;
    if (vkp_mpsc_recv(((ours_receiver *)receiver)->rx, VKP_FOREVER, message) != VKP_OK) {
        bench_fail("recv");
    }
}

WORK_INLINE void ours_receive_many(void *receiver, void *message, size_t bytes)
{
    ours_receiver *self = (ours_receiver *)receiver;
    if (self->next == self->count) {
        self->next = 0;
        if (vkp_mpsc_recv_many(self->rx, VKP_FOREVER, self->held, MANY, &self->count) != VKP_OK) {
            bench_fail("recv_many");
        }
    }
    memcpy(message, self->held + self->next++ * bytes, bytes);
}

static void ours_end(void *sender)
{
    (void)sender;
}

static const work_channel ours = {ours_open, ours_sender,  ours_get_receiver,
                                  ours_send, ours_receive, ours_end};
static const work_channel ours_many = {ours_open, ours_sender,       ours_get_receiver,
                                       ours_send, ours_receive_many, ours_end};
WORK_CHANNEL(ours)
WORK_CHANNEL(ours_many)

static const work_entry entries[] = {
    {"recv", ours_work},      {"recv-fence", ours_work},      {"recv-sleep", ours_work},
    {"lanes", ours_work},     {"lanes-fence", ours_work},     {"lanes-sleep", ours_work},
    {"many", ours_many_work}, {"lanes-many", ours_many_work},
};

/* ---- throughput ---- */

static void run_flow(bench_row *row, double *values)
{
    work_figures figures;
    double messages;
    values[0] = values[1] = values[2] = values[3] = NAN;
    if (drive_round(row, &figures, &messages)) {
        values[0] = messages / figures.seconds / 1e6;
        values[1] = figures.cpu_seconds * 1e9 / messages;
        values[2] = figures.sleeps * 1e3 / messages;
        values[3] = drive_calls_each(row, &figures, messages) * 1e3;
    }
}

static bench_table flow = {"channels: throughput",
                           {"M messages/s", "CPU ns/message", "sleeps/1000", "system calls/1000"},
                           {1, 0, 2, 2},
                           4,
                           false,
                           NULL,
                           0};

typedef struct named {
    const char *name;
    const char *program;
    const char *kind;
} named;

static const named our_flows[] = {
    {"vkp recv", NULL, "recv"},
    {"vkp recv_many", NULL, "many"},
    {"vkp lanes, recv", NULL, "lanes"},
    {"vkp lanes, recv_many", NULL, "lanes-many"},
};
static const named fenced_flows[] = {
    {"vkp recv, without membarrier", NULL, "recv-fence"},
    {"vkp lanes, recv, without membarrier", NULL, "lanes-fence"},
};
static const named rust_threads[] = {
    {"std", "rust", "std"},
    {"crossbeam", "rust", "crossbeam"},
    {"flume", "rust", "flume"},
    {"async-channel, blocking", "rust", "async-channel"},
    {"tokio, threads", "rust", "tokio-threads"},
};
static const named moodycamels[] = {
    {"moodycamel, spin", "moodycamel", "spin"},
    {"moodycamel, spin, tokens, bulk", "moodycamel", "spin-tokens"},
    {"moodycamel, blocking", "moodycamel", "blocking"},
    {"moodycamel, blocking, tokens, bulk", "moodycamel", "blocking-tokens"},
};
#define LENGTH(array) (sizeof(array) / sizeof(array)[0])

static void add_all(const drive_group *group, bench_role role, const named *names, size_t count)
{
    size_t i;
    for (i = 0; i < count; i++) {
        (void)drive_add(group, role, names[i].name, names[i].program, names[i].kind);
    }
}

static void add_flow_peers(const drive_group *group)
{
    bool bounded = group->a > 0;
    add_all(group, BENCH_PEER, rust_threads, LENGTH(rust_threads));
    (void)drive_add(group, BENCH_PEER, "tokio, tasks, recv", "rust", "tokio-tasks");
    (void)drive_add(group, BENCH_PEER, "tokio, tasks, recv + try_recv", "rust", "tokio-tasks-many");
    if (bounded) {
        (void)drive_add(group, BENCH_PEER, "Go", "go", "channel");
        (void)drive_add(group, BENCH_PEER, "APR queue", "apr", "queue");
        if (group->c == 1) {
            (void)drive_add(group, BENCH_OTHER, "ck_ring, spin", "ck", "spsc");
        }
    } else {
        add_all(group, BENCH_PEER, moodycamels, LENGTH(moodycamels));
        (void)drive_add(group, BENCH_PEER, "GLib GAsyncQueue", "glib", "queue");
    }
    (void)drive_add(group, BENCH_PEER, "ZeroMQ inproc", "zmq", "push-pull");
    (void)drive_add(group, BENCH_PEER, "nng inproc", "nng", "inproc");
    (void)drive_add(group, BENCH_PEER, "mutex + condvar", "own", "mutex");
}

/* A goal against several. */
static void goals(bench_row *row, double ratio, const char *const *names)
{
    for (; *names != NULL; names++) {
        drive_goal(row, ratio, *names);
    }
}

static void add_flow_goals(bench_row *row, const drive_group *group)
{
    static const char *const rust[] = {"std", "crossbeam", NULL};
    static const char *const rust_tokio[] = {"std", "crossbeam", "tokio, tasks, recv",
                                             "tokio, tasks, recv + try_recv", NULL};
    static const char *const tokio_tasks[] = {"tokio, tasks, recv", "tokio, tasks, recv + try_recv",
                                              NULL};
    static const char *const c_channels[] = {"mutex + condvar", "APR queue", "ZeroMQ inproc", NULL};
    static const char *const spinning[] = {"crossbeam", "Go", NULL};
    static const char *const sleeping[] = {"std",
                                           "flume",
                                           "async-channel, blocking",
                                           "tokio, threads",
                                           "ZeroMQ inproc",
                                           "nng inproc",
                                           "mutex + condvar",
                                           "APR queue",
                                           NULL};
    bool small = group->b == 8;
    if (group->c > 1) {
        if (small && group->a == 1024) {
            drive_goal(row, 2, "best peer");
        } else if (small && group->a == 0) {
            drive_goal(row, 1.1, "moodycamel, spin, tokens, bulk");
            goals(row, 2.5, rust);
        } else if (small) {
            drive_goal(row, 1, "Go");
        }
    } else if (small && group->a == 1024) {
        goals(row, 2.5, rust);
        drive_goal(row, 4, "tokio, tasks, recv + try_recv");
        drive_goal(row, 8, "tokio, tasks, recv");
        goals(row, 10, c_channels);
        drive_goal(row, 0.7, "limit: ring");
    } else if (small && group->a == 32) {
        goals(row, 3, spinning);
        goals(row, 5, tokio_tasks);
        goals(row, 50, sleeping);
        drive_goal(row, 0.6, "limit: ring, published every 32");
    } else if (small) {
        drive_goal(row, 1.3, "moodycamel, spin, tokens, bulk");
        goals(row, 3.5, rust_tokio);
        drive_goal(row, 0.5, "limit: ring, published every 32");
    } else if (group->a == 1024) {
        drive_goal(row, 1.2, "Go");
        drive_goal(row, 0.85, "limit: ring");
    } else if (group->a == 0) {
        goals(row, 3, rust_tokio);
        drive_goal(row, 0.85, "limit: ring");
    }
}

static void add_flow(long capacity, long bytes, long senders)
{
    drive_group group = {&flow, NULL, run_flow, "flow", capacity, bytes, senders, false};
    drive_group bounded = group;
    size_t first = flow.count;
    size_t i;
    group.name = drive_text("%s, %ld B, %ld sender%s",
                            capacity > 0 ? drive_text("%ld", capacity) : "unbounded", bytes,
                            senders, senders > 1 ? "s" : "");
    for (i = 0; i < LENGTH(our_flows); i++) {
        bench_row *row = drive_add(&group, BENCH_OURS, our_flows[i].name, NULL, our_flows[i].kind);
        add_flow_goals(row, &group);
    }
    add_all(&group, BENCH_OURS, fenced_flows, LENGTH(fenced_flows));
    if (senders == 1) {
        bounded.name = group.name;
        bounded.a = capacity > 0 ? capacity : 1024;
        (void)drive_add(&bounded, BENCH_LIMIT, "limit: ring", "own", "ring");
        (void)drive_add(&bounded, BENCH_LIMIT, "limit: ring, published every 32", "own", "ring32");
    }
    add_flow_peers(&group);
    for (i = first; i < flow.count; i++) { /* who sleeps how often is much the same elsewhere */
        flow.rows[i].a = senders != 1 || bytes != 8;
    }
}

/* ---- one thread ---- */

static void run_pair(bench_row *row, double *values)
{
    work_figures figures;
    double messages;
    values[0] = NAN;
    if (drive_round(row, &figures, &messages)) {
        values[0] = figures.cpu_seconds * 1e9 / messages;
    }
}

static bench_table pairs = {
    "channels: send and receive on one thread, of its CPU time", {"ns"}, {1}, 1, true, NULL, 0};

static void add_pair(long capacity, long bytes)
{
    static const char *const rust[] = {"std", "crossbeam", NULL};
    drive_group group = {&pairs, NULL, run_pair, "pair", capacity, bytes, 1, false};
    drive_group bounded = group;
    size_t i;
    group.name = drive_text("one thread, %s, %ld B",
                            capacity > 0 ? drive_text("%ld", capacity) : "unbounded", bytes);
    bounded.name = group.name;
    bounded.a = 1024;
    for (i = 0; i < LENGTH(our_flows); i += 2) {
        bench_row *row = drive_add(&group, BENCH_OURS, our_flows[i].name, NULL, our_flows[i].kind);
        drive_goal(row, bytes == 8 ? 4.5 : 5.8, "ns");
        goals(row, 0.35, rust);
        drive_goal(row, 0.25, "tokio, try_send and try_recv");
    }
    add_all(&group, BENCH_OURS, fenced_flows, LENGTH(fenced_flows));
    (void)drive_add(&bounded, BENCH_LIMIT, "limit: ring", "own", "ring");
    add_all(&group, BENCH_PEER, rust_threads, LENGTH(rust_threads));
    (void)drive_add(&group, BENCH_PEER, "tokio, try_send and try_recv", "rust", "tokio-try");
    if (capacity > 0) {
        (void)drive_add(&group, BENCH_PEER, "Go", "go", "channel");
        (void)drive_add(&group, BENCH_PEER, "APR queue", "apr", "queue");
        (void)drive_add(&group, BENCH_OTHER, "ck_ring", "ck", "spsc");
    } else {
        add_all(&group, BENCH_PEER, moodycamels, 3);
        (void)drive_add(&group, BENCH_PEER, "GLib GAsyncQueue", "glib", "queue");
    }
    (void)drive_add(&group, BENCH_PEER, "ZeroMQ inproc", "zmq", "push-pull");
    (void)drive_add(&group, BENCH_PEER, "mutex + condvar", "own", "mutex");
}

/* ---- round trips ---- */

static void run_pong(bench_row *row, double *values)
{
    work_figures figures;
    double trips;
    size_t i;
    for (i = 0; i < 6; i++) {
        values[i] = NAN;
    }
    if (drive_round(row, &figures, &trips)) {
        /* seconds and calls are for the trips after the warm-up, as are the percentiles */
        values[0] = figures.seconds * 1e9 / trips;
        values[1] = figures.more[0];
        values[2] = figures.more[1];
        values[3] = figures.more[1] / figures.more[0];
        values[4] = figures.cpu_seconds * 1e9 / trips;
        values[5] = drive_calls_each(row, &figures, trips);
    }
}

static bench_table pongs = {"channels: a message to another thread and back",
                            {"ns", "p50 ns", "p99 ns", "p99/p50", "CPU ns", "system calls"},
                            {0, 0, 0, 2, 0, 2},
                            6,
                            true,
                            NULL,
                            0};

static void add_pongs(void)
{
    static const char *const sleepers[] = {"std", "tokio, threads", NULL};
    drive_group spin = {&pongs, "round trip, spinning", run_pong, "pong", 16, 8, 1, false};
    drive_group spin_unbounded = spin;
    drive_group sleep_at_once = spin;
    drive_group unbounded;
    bench_row *row;
    size_t i;
    spin_unbounded.a = 0;
    sleep_at_once.name = "round trip, sleeping";
    unbounded = sleep_at_once;
    unbounded.a = 0;
    for (i = 0; i < LENGTH(our_flows); i += 2) {
        row = drive_add(&spin, BENCH_OURS, our_flows[i].name, NULL, our_flows[i].kind);
        drive_goal(row, 0.5, "crossbeam");
        drive_goal(row, 0.6, "Go");
        drive_goal(row, 1, "limit: two flags");
        drive_goal(row, 1.5, "p99/p50");
    }
    (void)drive_add(&spin, BENCH_OURS, "vkp recv, without membarrier", NULL, "recv-fence");
    (void)drive_add(&spin_unbounded, BENCH_OURS, "vkp recv, unbounded", NULL, "recv");
    (void)drive_add(&spin, BENCH_LIMIT, "limit: two flags", "own", "flags");
    (void)drive_add(&spin, BENCH_LIMIT, "limit: ring", "own", "ring");
    (void)drive_add(&spin, BENCH_PEER, "crossbeam", "rust", "crossbeam");
    (void)drive_add(&spin, BENCH_PEER, "Go", "go", "channel");
    (void)drive_add(&spin, BENCH_PEER, "tokio, tasks", "rust", "tokio-tasks");
    (void)drive_add(&spin_unbounded, BENCH_PEER, "moodycamel, spin", "moodycamel", "spin");
    (void)drive_add(&spin_unbounded, BENCH_PEER, "moodycamel, blocking", "moodycamel", "blocking");
    (void)drive_add(&spin, BENCH_OTHER, "ck_ring, spin", "ck", "spsc");

    row = drive_add(&sleep_at_once, BENCH_OURS, "vkp recv", NULL, "recv-sleep");
    goals(row, 1, sleepers);
    drive_goal(row, 1.05, "limit: futex");
    drive_goal(row, 1.05, "limit: eventfd");
    (void)drive_add(&sleep_at_once, BENCH_OURS, "vkp lanes, recv", NULL, "lanes-sleep");
#ifdef __linux__
    (void)drive_add(&sleep_at_once, BENCH_LIMIT, "limit: futex", "own", "futex");
    (void)drive_add(&sleep_at_once, BENCH_LIMIT, "limit: eventfd", "own", "eventfd");
#endif
    (void)drive_add(&sleep_at_once, BENCH_LIMIT, "limit: condvar", "own", "condvar");
    (void)drive_add(&sleep_at_once, BENCH_PEER, "std", "rust", "std");
    (void)drive_add(&sleep_at_once, BENCH_PEER, "flume", "rust", "flume");
    (void)drive_add(&sleep_at_once, BENCH_PEER, "async-channel, blocking", "rust", "async-channel");
    (void)drive_add(&sleep_at_once, BENCH_PEER, "tokio, threads", "rust", "tokio-threads");
    (void)drive_add(&sleep_at_once, BENCH_PEER, "mutex + condvar", "own", "mutex");
    (void)drive_add(&sleep_at_once, BENCH_PEER, "APR queue", "apr", "queue");
    (void)drive_add(&unbounded, BENCH_PEER, "GLib GAsyncQueue", "glib", "queue");
    (void)drive_add(&sleep_at_once, BENCH_PEER, "ZeroMQ inproc", "zmq", "push-pull");
    (void)drive_add(&sleep_at_once, BENCH_PEER, "nng inproc", "nng", "inproc");
}

/* ---- memory ---- */

static void run_memory(bench_row *row, double *values)
{
    work_figures figures;
    double unused;
    values[0] = values[1] = NAN;
    if (drive_round(row, &figures, &unused)) {
        values[0] = figures.more[0];
        values[1] = figures.more[1];
    }
}

static bench_table memory = {
    "channels: heap, bytes", {"idle channel", "each message queued"}, {0, 1}, 2, true, NULL, 0};

static void add_memory(long capacity, long bytes)
{
    drive_group group = {&memory, NULL, run_memory, "memory", capacity, bytes, 1, true};
    group.name = drive_text("memory, %s, %ld B",
                            capacity > 0 ? drive_text("%ld", capacity) : "unbounded", bytes);
    (void)drive_add(&group, BENCH_OURS, "vkp", NULL, "recv");
    (void)drive_add(&group, BENCH_OURS, "vkp lanes", NULL, "lanes");
    add_all(&group, BENCH_PEER, rust_threads, LENGTH(rust_threads));
    if (capacity > 0) {
        (void)drive_add(&group, BENCH_PEER, "Go", "go", "channel");
    } else {
        add_all(&group, BENCH_PEER, moodycamels, 3);
        (void)drive_add(&group, BENCH_PEER, "GLib GAsyncQueue", "glib", "queue");
    }
    if (bytes == 8) { /* nothing else changes with the size */
        (void)drive_add(&group, BENCH_PEER, "ZeroMQ inproc", "zmq", "push-pull");
    }
    (void)drive_add(&group, BENCH_PEER, "mutex + condvar", "own", "mutex");
}

int main(int argc, char **argv)
{
    static const long capacities[] = {32, 1024, 0};
    bench_table tables[4];
    long bytes;
    size_t i;
    if (drive_start(argc, argv)) {
        return work_main(argc - 1, argv + 1, entries, LENGTH(entries));
    }
    for (i = 0; i < 3; i++) {
        for (bytes = 8; bytes <= 64; bytes += 56) {
            add_flow(capacities[i], bytes, 1);
            add_flow(capacities[i], bytes, 4);
            if (capacities[i] != 32) {
                add_pair(capacities[i], bytes);
                add_memory(capacities[i], bytes);
            }
        }
    }
    add_pongs();
    tables[0] = flow;
    tables[1] = pairs;
    tables[2] = pongs;
    tables[3] = memory;
    drive_run(
        tables, LENGTH(tables),
        "kanal is no package of Debian's; where both were measured it had 1.7 times\n"
        "crossbeam's rate at 1024 and 2.4 times unbounded (8 B, 1 sender). Tokio's recv_many is\n"
        "newer than Debian's 1.24: a recv and up to 255 try_recv stand for it. ck_ring and\n"
        "moodycamel's spinning forms never sleep.",
        argc, argv);
    return 0;
}
