/* loop [rounds [part of a group's name]]: messages of a thread to an event loop on another core.
   SPDX-License-Identifier: MIT

   Flat out, and 16 at a time with 20 us between: then the rate is given, and what counts is CPU
   time, and that the loop is woken once for each burst. A wake-up is a return of its wait.     */
#include "drive.h"
#include "peers/looped.h"

#define MANY 256

static vkp_mpsc_tx *looped_tx;
static vkp_mpsc_rx *looped_rx;
static vkp_loop *looped_loop;
static looped_sum looped_got;
static uint64_t looped_expected;

static void post(void *channel, uint64_t value)
{
    (void)channel;
    if (vkp_mpsc_send(looped_tx, &value, VKP_FOREVER) != VKP_OK) {
        bench_fail("send");
    }
}

static void *produce(void *at)
{
    return looped_produce(post, at);
}

static void stop_at_end(void)
{
    if (looped_got.count == looped_expected) {
        vkp_loop_stop(looped_loop);
    }
}

static void on_message(void *user)
{
    uint64_t value;
    (void)user;
    while (vkp_mpsc_try_recv(looped_rx, &value) == VKP_OK) {
        looped_got.values += value;
        looped_got.count++;
    }
    stop_at_end();
}

static void on_messages(void *user)
{
    uint64_t values[MANY];
    size_t count;
    size_t i;
    (void)user;
    while (vkp_mpsc_recv_many(looped_rx, 0, values, MANY, &count) == VKP_OK) {
        for (i = 0; i < count; i++) {
            looped_got.values += values[i];
        }
        looped_got.count += count;
    }
    stop_at_end();
}

static work_figures work_looped(const work_order *order)
{
    bool many = strstr(order->kind, "many") != NULL;
    vkp_mpsc_config config = VKP_ZERO;
    vkp_loop_config loop_config = VKP_ZERO;
    work_seat seat;
    work_crew crew = {order, NULL, NULL, 0, 0, 0};
    work_clock clock;
    vkp_handler *handler;
    vkp_case receive;
    uint64_t waits;
    looped_expected = order->count;
    config.elem_bytes = sizeof(uint64_t);
    config.capacity_items = (size_t)order->b;
    config.lanes = strstr(order->kind, "lanes") != NULL;
    config.env = drive_env(order);
    loop_config.env = config.env;
    loop_config.backend =
        drive_backend(strstr(order->kind, "poll") == order->kind ? "poll" : DRIVE_BACKEND);
    drive_check(vkp_mpsc_open(&config, &looped_tx, &looped_rx), "open");
    drive_check(vkp_loop_open(&loop_config, &looped_loop), "loop");
    receive = vkp_case_mpsc_recv(looped_rx, NULL);
    drive_check(
        vkp_handler_open(looped_loop, &receive, many ? on_messages : on_message, NULL, &handler),
        "handler");
    work_hire(&crew, &seat, 1, produce);
    work_pin(1);
    clock = work_go(&crew, 1);
    waits = drive_waits;
    drive_check(vkp_loop_run(looped_loop), "run");
    vkp_handler_unref(handler);
    return looped_end(&clock, order, &seat, &looped_got, drive_waits - waits);
}

/* The same channel between two threads, which A-9 is measured against. */
static work_figures work_threads(const work_order *order)
{
    vkp_mpsc_config config = VKP_ZERO;
    work_seat seat;
    work_crew crew = {order, NULL, NULL, 0, 0, 0};
    work_clock clock;
    config.elem_bytes = sizeof(uint64_t);
    config.capacity_items = (size_t)order->b;
    config.env = drive_env(order);
    drive_check(vkp_mpsc_open(&config, &looped_tx, &looped_rx), "open");
    work_hire(&crew, &seat, 1, produce);
    work_pin(1);
    clock = work_go(&crew, 1);
    while (looped_got.count < order->count) {
        uint64_t value;
        drive_check(vkp_mpsc_recv(looped_rx, VKP_FOREVER, &value), "recv");
        looped_got.values += value;
        looped_got.count++;
    }
    return looped_end(&clock, order, &seat, &looped_got, 0);
}

static const work_entry entries[] = {
    {"epoll", work_looped},       {"epoll-many", work_looped}, {"epoll-lanes", work_looped},
    {"epoll-fence", work_looped}, {"poll", work_looped},       {"poll-many", work_looped},
    {"threads", work_threads},
};

/* ---- tables ---- */

static void run_flat(bench_row *row, double *values)
{
    work_figures figures;
    double messages;
    size_t i;
    for (i = 0; i < 5; i++) {
        values[i] = NAN;
    }
    if (drive_round(row, &figures, &messages)) {
        values[0] = messages / figures.seconds / 1e6;
        values[1] = figures.more[0] * 1e3 / messages;
        values[2] = figures.cpu_seconds * 1e9 / messages;
        values[3] = figures.sleeps * 1e3 / messages;
        values[4] = drive_calls_each(row, &figures, messages) * 1e3;
    }
}

static void run_bursts(bench_row *row, double *values)
{
    const drive_item *item = (const drive_item *)row->context;
    work_figures figures;
    double messages;
    size_t i;
    for (i = 0; i < 4; i++) {
        values[i] = NAN;
    }
    if (drive_round(row, &figures, &messages)) {
        double bursts = messages / (double)item->order.a;
        values[0] = figures.cpu_seconds * 1e6 / messages;
        values[1] = figures.more[0] / bursts;
        values[2] = figures.sleeps / bursts;
        values[3] = drive_calls_each(row, &figures, messages) * (double)item->order.a;
    }
}

static bench_table flat = {
    "loop: 8 bytes from a thread to a loop",
    {"M messages/s", "wake-ups/1000", "CPU ns/message", "sleeps/1000", "system calls/1000"},
    {1, 2, 0, 2, 2},
    5,
    false,
    NULL,
    0};
static bench_table bursts = {
    "loop: 16 messages, then 20 us nothing",
    {"CPU us/message", "wake-ups/burst", "sleeps/burst", "system calls/burst"},
    {3, 3, 3, 2},
    4,
    true,
    NULL,
    0};

static void add_peers(const drive_group *group)
{
    (void)drive_add(group, BENCH_LIMIT, "limit: ring, eventfd when armed", "loop_own", "armed");
    (void)drive_add(group, BENCH_PEER, "libuv, uv_async_send + list", "loop_uv", "async");
    (void)drive_add(group, BENCH_PEER, "libev, ev_async_send + list", "loop_ev", "async");
    (void)drive_add(group, BENCH_PEER, "eventfd for each message", "loop_own", "eventfd");
    (void)drive_add(group, BENCH_PEER, "pipe, a byte for each message", "loop_own", "pipe");
}

int main(int argc, char **argv)
{
    static const char *const ours[][2] = {
#ifdef __linux__
        {"handler, epoll, try_recv", "epoll"},
        {"handler, epoll, recv_many", "epoll-many"},
        {"handler, epoll, lanes, try_recv", "epoll-lanes"},
        {"handler, epoll, try_recv, without membarrier", "epoll-fence"},
#endif
        {"handler, poll, try_recv", "poll"},
        {"handler, poll, recv_many", "poll-many"},
    };
    drive_group group = {&flat, "flat out, bounded 1024", run_flat, "loop", 0, 1024, 0, false};
    bench_table tables[2];
    size_t i;
    if (drive_start(argc, argv)) {
        return work_main(argc - 1, argv + 1, entries, sizeof entries / sizeof entries[0]);
    }
    for (i = 0; i < sizeof ours / sizeof ours[0]; i++) {
        bench_row *row = drive_add(&group, BENCH_OURS, ours[i][0], NULL, ours[i][1]);
        drive_goal(row, 2, "libuv, uv_async_send + list");
        drive_goal(row, 10, "eventfd for each message");
        drive_goal(row, 0.3, "vkp, thread to thread");
    }
    (void)drive_add(&group, BENCH_OTHER, "vkp, thread to thread", NULL, "threads");
    add_peers(&group);
    group.name = "flat out, unbounded";
    group.b = 0;
    for (i = 0; i < sizeof ours / sizeof ours[0]; i++) {
        (void)drive_add(&group, BENCH_OURS, ours[i][0], NULL, ours[i][1]);
    }
    group.table = &bursts;
    group.name = "bursts of 16";
    group.run = run_bursts;
    group.a = 16;
    group.b = 1024;
    for (i = 0; i < sizeof ours / sizeof ours[0]; i++) {
        bench_row *row = drive_add(&group, BENCH_OURS, ours[i][0], NULL, ours[i][1]);
        drive_goal(row, 1, "wake-ups/burst");
    }
    add_peers(&group);
    for (i = 0; i < bursts.count; i++) {
        bursts.rows[i].a = 1; /* strace takes longer than the pause between bursts */
    }
    tables[0] = flat;
    tables[1] = bursts;
    drive_run(tables, 2, NULL, argc, argv);
    return 0;
}
