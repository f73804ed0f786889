/* oneshot [rounds [part of a group's name]]: one value, once; and requests that carry the slot for
   their reply.
   SPDX-License-Identifier: MIT

   Requests go through an mpsc channel of 1024 to one server, which adds one and replies. Clients
   are threads; or state machines on the server's own loop, where Tokio has tasks of one thread. */
#include "drive.h"

#define QUEUED 1024

/* ---- once ---- */

static work_figures once(const work_order *order)
{
    const vkp_env *env = drive_env(order);
    bool on_heap = strcmp(order->kind, "heap") == 0;
    uint64_t warm_up = order->count / 10;
    uint64_t sum = 0;
    uint64_t i;
    work_clock clock = {0, 0, 0, 0};
    work_pin(1);
    for (i = 0; i < warm_up + order->count; i++) {
        vkp_oneshot stack;
        vkp_oneshot *slot = &stack;
        uint64_t out = 0;
        vkp_status status;
        if (i == warm_up) {
            clock = work_start();
        }
        status = on_heap ? vkp_oneshot_open(env, sizeof i, NULL, NULL, &slot)
                         : vkp_oneshot_init(slot, env, sizeof i, NULL, NULL);
        if (status != VKP_OK || vkp_oneshot_send(slot, &i) != VKP_OK ||
            vkp_oneshot_recv(slot, 0, &out) != VKP_OK) {
            bench_fail("once");
        }
        if (on_heap) {
            vkp_oneshot_tx_unref(slot);
            vkp_oneshot_rx_unref(slot);
        }
        sum += out - i;
    }
    if (sum != 0) {
        bench_fail("once: another value came out");
    }
    return work_stop(&clock);
}

/* ---- call ---- */

typedef struct request {
    uint64_t value;
    vkp_oneshot *reply;
} request;

static vkp_mpsc_tx *requests_tx;
static vkp_mpsc_rx *requests_rx;
static const vkp_env *call_env;
static uint32_t *call_ns;

static void open_requests(const work_order *order)
{
    vkp_mpsc_config config = VKP_ZERO;
    call_env = drive_env(order);
    config.elem_bytes = sizeof(request);
    config.capacity_items = QUEUED;
    config.env = call_env;
    drive_check(vkp_mpsc_open(&config, &requests_tx, &requests_rx), "open");
    call_ns = (uint32_t *)malloc((order->count + 1) * sizeof *call_ns);
}

static void answer(const request *asked)
{
    uint64_t value = asked->value + 1;
    drive_check(vkp_oneshot_send(asked->reply, &value), "reply");
}

static void ask(vkp_oneshot *slot, uint64_t value)
{
    request asked;
    asked.value = value;
    asked.reply = slot;
    drive_check(vkp_oneshot_init(slot, call_env, sizeof value, NULL, NULL), "init");
    drive_check(vkp_mpsc_send(requests_tx, &asked, VKP_FOREVER), "request");
}

static void *call_client(void *at)
{
    work_seat *seat = (work_seat *)at;
    work_crew *crew = seat->crew;
    uint32_t *ns = call_ns + (uint64_t)seat->index * crew->each;
    uint64_t last;
    uint64_t i;
    if (crew->order->a == 1) {
        work_pin(1);
    }
    work_ready(crew);
    last = work_now_ns();
    for (i = 0; i < crew->each; i++) {
        vkp_oneshot slot;
        uint64_t out;
        uint64_t now;
        ask(&slot, i);
        drive_check(vkp_oneshot_recv(&slot, VKP_FOREVER, &out), "reply");
        if (out != i + 1) {
            bench_fail("call: the answer to something else");
        }
        now = work_now_ns();
        ns[i] = (uint32_t)(now - last);
        last = now;
    }
    return NULL;
}

static work_figures call_threads(const work_order *order)
{
    work_seat seats[WORK_SEATS];
    work_crew crew = {order, NULL, NULL, order->count / (uint64_t)order->a, 0, 0};
    uint64_t total = crew.each * (uint64_t)order->a;
    uint64_t i;
    work_clock clock;
    work_figures figures;
    open_requests(order);
    work_hire(&crew, seats, order->a, call_client);
    if (order->a == 1) {
        work_pin(0);
    }
    clock = work_go(&crew, (int)order->a);
    for (i = 0; i < total; i++) {
        request asked;
        drive_check(vkp_mpsc_recv(requests_rx, VKP_FOREVER, &asked), "recv");
        answer(&asked);
    }
    work_dismiss(seats, order->a);
    figures = work_stop(&clock);
    work_percentiles(call_ns, total, &figures);
    return figures;
}

/* Client and server in turn, on one thread that has nothing to wait for. */
static work_figures call_by_hand(const work_order *order)
{
    uint64_t last;
    uint64_t i;
    work_clock clock;
    work_figures figures;
    open_requests(order);
    work_pin(1);
    clock = work_start();
    last = clock.started_ns;
    for (i = 0; i < order->count; i++) {
        vkp_oneshot slot;
        request asked;
        uint64_t out;
        uint64_t now;
        ask(&slot, i);
        drive_check(vkp_mpsc_try_recv(requests_rx, &asked), "recv");
        answer(&asked);
        drive_check(vkp_oneshot_try_recv(&slot, &out), "reply");
        if (out != i + 1) {
            bench_fail("call: the answer to something else");
        }
        now = work_now_ns();
        call_ns[i] = (uint32_t)(now - last);
        last = now;
    }
    figures = work_stop(&clock);
    work_percentiles(call_ns, order->count, &figures);
    return figures;
}

/* A client on the loop: asks, is called when the reply is there, asks again. */
typedef struct loop_client {
    vkp_oneshot slot;
    vkp_handler *watch;
    uint64_t asked;
    uint64_t last;
    uint32_t *ns;
} loop_client;

static vkp_loop *call_loop;
static uint64_t call_each;
static long call_open;

static void client_turn(loop_client *self);

static void client_replied(void *user)
{
    loop_client *self = (loop_client *)user;
    uint64_t out;
    uint64_t now;
    drive_check(vkp_oneshot_try_recv(&self->slot, &out), "reply");
    vkp_handler_unref(self->watch);
    if (out != self->asked + 1) {
        bench_fail("call: the answer to something else");
    }
    now = work_now_ns();
    self->ns[self->asked++] = (uint32_t)(now - self->last);
    self->last = now;
    client_turn(self);
}

static void client_turn(loop_client *self)
{
    vkp_case reply;
    if (self->asked == call_each) {
        if (--call_open == 0) {
            vkp_loop_stop(call_loop);
        }
        return;
    }
    ask(&self->slot, self->asked);
    reply = vkp_case_oneshot_recv(&self->slot, NULL);
    drive_check(vkp_handler_open(call_loop, &reply, client_replied, self, &self->watch), "watch");
}

static void serve(void *user)
{
    request asked;
    (void)user;
    while (vkp_mpsc_try_recv(requests_rx, &asked) == VKP_OK) {
        answer(&asked);
    }
}

static work_figures call_on_loop(const work_order *order)
{
    vkp_loop_config config = VKP_ZERO;
    loop_client *clients = (loop_client *)calloc((size_t)order->a, sizeof *clients);
    long i;
    work_clock clock;
    work_figures figures;
    vkp_handler *server;
    vkp_case receive;
    open_requests(order);
    config.env = call_env;
    config.backend = drive_backend(DRIVE_BACKEND);
    drive_check(vkp_loop_open(&config, &call_loop), "loop");
    receive = vkp_case_mpsc_recv(requests_rx, NULL);
    drive_check(vkp_handler_open(call_loop, &receive, serve, NULL, &server), "handler");
    work_pin(1);
    call_each = order->count / (uint64_t)order->a;
    call_open = order->a;
    clock = work_start();
    for (i = 0; i < order->a; i++) {
        clients[i].ns = call_ns + (uint64_t)i * call_each;
        clients[i].last = clock.started_ns;
        client_turn(&clients[i]);
    }
    drive_check(vkp_loop_run(call_loop), "run");
    figures = work_stop(&clock);
    vkp_handler_unref(server);
    work_percentiles(call_ns, call_each * (uint64_t)order->a, &figures);
    return figures;
}

static const work_entry entries[] = {
    {"stack", once},           {"heap", once},
    {"threads", call_threads}, {"threads-sleep", call_threads},
    {"by-hand", call_by_hand}, {"loop", call_on_loop},
};

/* ---- tables ---- */

static void run_once(bench_row *row, double *values)
{
    work_figures figures;
    double operations;
    values[0] = NAN;
    if (drive_round(row, &figures, &operations)) {
        values[0] = figures.cpu_seconds * 1e9 / operations;
    }
}

static void run_call(bench_row *row, double *values)
{
    work_figures figures;
    double operations;
    size_t i;
    for (i = 0; i < 6; i++) {
        values[i] = NAN;
    }
    if (drive_round(row, &figures, &operations)) {
        values[0] = operations / figures.seconds / 1e3;
        values[1] = figures.more[0] / 1e3;
        values[2] = figures.more[1] / 1e3;
        values[3] = figures.cpu_seconds * 1e6 / operations;
        values[4] = figures.sleeps / operations;
        values[5] = drive_calls_each(row, &figures, operations);
    }
}

static bench_table onces = {"oneshot: create, send and receive on one thread, of its CPU time",
                            {"ns"},
                            {1},
                            1,
                            true,
                            NULL,
                            0};
static bench_table calls = {"oneshot: requests and their replies",
                            {"k requests/s", "p50 us", "p99 us", "CPU us/request", "sleeps/request",
                             "system calls/request"},
                            {0, 2, 2, 2, 2, 2},
                            6,
                            false,
                            NULL,
                            0};

static void add_onces(void)
{
    drive_group group = {&onces, "one value", run_once, "once", 0, 0, 0, false};
    bench_row *row = drive_add(&group, BENCH_OURS, "vkp, caller's memory", NULL, "stack");
    drive_goal(row, 0.25, "tokio");
    row = drive_add(&group, BENCH_OURS, "vkp, heap", NULL, "heap");
    drive_goal(row, 0.8, "tokio");
    drive_goal(row, 1.2, "limit: malloc + free");
    (void)drive_add(&group, BENCH_LIMIT, "limit: malloc + free", "own_values", "malloc");
    (void)drive_add(&group, BENCH_PEER, "tokio", "rust", "tokio");
    (void)drive_add(&group, BENCH_PEER, "std, sync_channel(1)", "rust", "std");
    (void)drive_add(&group, BENCH_PEER, "crossbeam, bounded(1)", "rust", "crossbeam");
    (void)drive_add(&group, BENCH_PEER, "flume, bounded(1)", "rust", "flume");
    (void)drive_add(&group, BENCH_PEER, "mutex + condvar", "own_values", "mutex");
}

static void add_calls(long clients)
{
    drive_group group = {&calls, NULL, run_call, "call", clients, 0, 0, false};
    bench_row *row;
    group.name = drive_text("%ld client%s, threads", clients, clients > 1 ? "s" : "");
    row = drive_add(&group, BENCH_OURS, "vkp", NULL, "threads");
    if (clients == 1) {
        drive_goal(row, 1.5, "tokio, tasks");
        drive_goal(row, 100, "tokio, threads");
        drive_goal(row, 100, "std");
        drive_goal(row, 100, "mutex + condvar");
    }
    (void)drive_add(&group, BENCH_OURS, "vkp, never spinning", NULL, "threads-sleep");
    (void)drive_add(&group, BENCH_PEER, "tokio, tasks", "rust", "tokio-tasks");
    (void)drive_add(&group, BENCH_PEER, "tokio, threads", "rust", "tokio-threads");
    (void)drive_add(&group, BENCH_PEER, "std", "rust", "std");
    (void)drive_add(&group, BENCH_PEER, "crossbeam", "rust", "crossbeam");
    (void)drive_add(&group, BENCH_PEER, "Go", "go", "channel");
    (void)drive_add(&group, BENCH_PEER, "mutex + condvar", "own_values", "mutex");

    group.name = drive_text("%ld client%s, one thread", clients, clients > 1 ? "s" : "");
    row = drive_add(&group, BENCH_OURS, "vkp, on a loop", NULL, "loop");
    drive_goal(row, 1, "tokio, current_thread");
    if (clients == 1) {
        row = drive_add(&group, BENCH_OURS, "vkp, without a loop", NULL, "by-hand");
        drive_goal(row, 1, "tokio, current_thread");
    }
    (void)drive_add(&group, BENCH_PEER, "tokio, current_thread", "rust", "tokio-current");
}

int main(int argc, char **argv)
{
    bench_table tables[2];
    if (drive_start(argc, argv)) {
        return work_main(argc - 1, argv + 1, entries, sizeof entries / sizeof entries[0]);
    }
    add_onces();
    add_calls(1);
    add_calls(64);
    tables[0] = onces;
    tables[1] = calls;
    drive_run(tables, 2, NULL, argc, argv);
    return 0;
}
