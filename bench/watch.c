/* watch [rounds [part of a group's name]]: one value that is replaced and looked at.
   SPDX-License-Identifier: MIT

   Set and get on one thread, of CPU time; and get while a thread on the other core sets without a
   pause. Tokio's values are looked at under its lock (borrow); ours are copied out (get) or looked
   at in place (borrow, release).                                                              */
#include "drive.h"

static vkp_watch_tx *watch_tx;
static vkp_watch_rx *watch_rx;
static int watch_stop WORK_ALIGNED;

static void *write_values(void *at)
{
    work_crew *crew = ((work_seat *)at)->crew;
    size_t bytes = (size_t)crew->order->b;
    uint64_t words[8];
    uint64_t i;
    work_pin(0);
    work_ready(crew);
    for (i = 0; __atomic_load_n(&watch_stop, __ATOMIC_RELAXED) == 0; i++) {
        work_fill(words, bytes, i);
        drive_check(vkp_watch_send(watch_tx, words), "send");
    }
    return NULL;
}

static uint64_t set_values(uint64_t count, size_t bytes)
{
    uint64_t words[8];
    uint64_t i;
    for (i = 0; i < count; i++) {
        work_fill(words, bytes, i);
        drive_check(vkp_watch_send(watch_tx, words), "send");
    }
    return 0;
}

static uint64_t get_values(uint64_t count)
{
    uint64_t words[8];
    uint64_t sum = 0;
    uint64_t i;
    for (i = 0; i < count; i++) {
        drive_check(vkp_watch_get(watch_rx, words), "get");
        sum += words[0];
    }
    return sum;
}

static uint64_t borrow_values(uint64_t count)
{
    uint64_t sum = 0;
    uint64_t i;
    for (i = 0; i < count; i++) {
        sum += *(const uint64_t *)vkp_watch_borrow(watch_rx);
        vkp_watch_release(watch_rx);
    }
    return sum;
}

static uint64_t look_for_changes(uint64_t count)
{
    uint64_t sum = 0;
    uint64_t i;
    for (i = 0; i < count; i++) {
        sum += vkp_watch_is_changed(watch_rx) ? 1 : 0;
    }
    return sum;
}

static work_figures work(const work_order *order)
{
    bool contended = strcmp(order->item, "get-contended") == 0;
    bool borrows = strcmp(order->kind, "borrow") == 0;
    vkp_watch_config config = VKP_ZERO;
    work_crew crew = {order, NULL, NULL, 0, 0, 0};
    work_seat seat;
    uint64_t sum;
    work_clock clock;
    work_figures figures;
    config.elem_bytes = (size_t)order->b;
    config.env = drive_env(order);
    drive_check(vkp_watch_open(&config, &watch_tx), "open");
    drive_check(vkp_watch_subscribe(watch_tx, &watch_rx), "subscribe");
    work_pin(1);
    if (contended) {
        work_hire(&crew, &seat, 1, write_values);
        (void)work_go(&crew, 1);
        drive_check(vkp_watch_changed(watch_rx, VKP_FOREVER), "changed");
    }
    clock = work_start();
    if (strcmp(order->item, "set") == 0) {
        sum = set_values(order->count, (size_t)order->b);
    } else if (strcmp(order->item, "changed") == 0) {
        sum = look_for_changes(order->count);
    } else {
        sum = borrows ? borrow_values(order->count) : get_values(order->count);
    }
    figures = work_stop(&clock);
    __asm__ volatile("" ::"r"(sum));
    if (contended) {
        __atomic_store_n(&watch_stop, 1, __ATOMIC_RELAXED);
        work_dismiss(&seat, 1);
    }
    return figures;
}

static const work_entry entries[] = {{"copy", work}, {"copy-fence", work}, {"borrow", work}};

/* ---- table ---- */

static void run(bench_row *row, double *values)
{
    const drive_item *item = (const drive_item *)row->context;
    work_figures figures;
    double operations;
    values[0] = NAN;
    if (drive_round(row, &figures, &operations)) {
        bool contended = strcmp(item->order.item, "get-contended") == 0;
        values[0] = (contended ? figures.seconds : figures.cpu_seconds) * 1e9 / operations;
    }
}

static bench_table table = {"watch: one value", {"ns"}, {2}, 1, true, NULL, 0};

static void add(const char *item, const char *title, double ratio, long bytes)
{
    drive_group group = {&table, NULL, run, item, 0, bytes, 0, false};
    bool gets = strncmp(item, "get", 3) == 0;
    bench_row *row;
    group.name = drive_text("%s, %ld B", title, bytes);
    row = drive_add(&group, BENCH_OURS, gets ? "vkp get" : "vkp", NULL, "copy");
    if (ratio > 0) {
        drive_goal(row, ratio, "tokio");
        drive_goal(row, 2, "limit: seqlock");
    }
    if (gets) {
        row = drive_add(&group, BENCH_OURS, "vkp borrow, release", NULL, "borrow");
        drive_goal(row, ratio, "tokio");
    } else {
        (void)drive_add(&group, BENCH_OURS, "vkp, without membarrier", NULL, "copy-fence");
    }
    (void)drive_add(&group, BENCH_LIMIT, "limit: seqlock", "own_values", "seqlock");
    if (strcmp(item, "changed") != 0) {
        (void)drive_add(&group, BENCH_OTHER, "seqlock, by calls", "own_values", "seqlock-call");
    }
    (void)drive_add(&group, BENCH_PEER, "tokio", "rust", "tokio");
    if (strcmp(item, "changed") != 0) {
        (void)drive_add(&group, BENCH_PEER, "mutex", "own_values", "mutex");
        (void)drive_add(&group, BENCH_PEER, "rwlock", "own_values", "rwlock");
    }
}

int main(int argc, char **argv)
{
    long bytes;
    if (drive_start(argc, argv)) {
        return work_main(argc - 1, argv + 1, entries, sizeof entries / sizeof entries[0]);
    }
    for (bytes = 8; bytes <= 64; bytes += 56) {
        add("set", "set", 0.1, bytes);
        add("get", "get", 0.4, bytes);
        add("get-contended", "get while another sets", 0.35, bytes);
    }
    add("changed", "has it changed", 0, 8);
    drive_run(&table, 1, NULL, argc, argv);
    return 0;
}
