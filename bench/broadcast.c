/* broadcast [rounds [part of a group's name]]: values to 4 and 64 receivers.
   SPDX-License-Identifier: MIT

   On one thread: half a ring is sent, every receiver takes it, of CPU time. On two: one thread
   sends, one serves all receivers, and nobody lags, as the sender waits for the slowest; Tokio's
   receivers are shown both so and as tasks on two workers. Ref-counted values are 64 bytes in a
   block of their own: vkp_bytes, Arc. A delivery is one value to one receiver.                 */
#include "drive.h"

#define RING 1024
#define WINDOW (RING / 2)
#define MANY 256

static vkp_broadcast_tx *cast_tx;
static vkp_broadcast_rx **cast_rx;
static const vkp_env *cast_env;
static uint64_t cast_done WORK_ALIGNED;

static void bytes_retain(void *user, void *item)
{
    vkp_bytes *bytes = (vkp_bytes *)item;
    (void)user;
    *bytes = vkp_bytes_ref(bytes);
}

static void bytes_drop(void *user, void *item)
{
    (void)user;
    vkp_bytes_unref((vkp_bytes *)item);
}

static void cast_open(const work_order *order)
{
    vkp_broadcast_config config = VKP_ZERO;
    long i;
    cast_env = drive_env(order);
    config.env = cast_env;
    config.capacity_items = RING;
    config.elem_bytes = (size_t)order->b;
    if (order->b == 0) {
        config.elem_bytes = sizeof(vkp_bytes);
        config.retain = bytes_retain;
        config.drop = bytes_drop;
    }
    drive_check(vkp_broadcast_open(&config, &cast_tx), "open");
    cast_rx = (vkp_broadcast_rx **)calloc((size_t)order->a, sizeof(vkp_broadcast_rx *));
    for (i = 0; i < order->a; i++) {
        drive_check(vkp_broadcast_subscribe(cast_tx, &cast_rx[i]), "subscribe");
    }
}

WORK_INLINE void cast_send(size_t bytes, uint64_t value)
{
    uint64_t words[8];
    if (bytes == 0) {
        vkp_bytes shared;
        work_fill(words, 64, value);
        drive_check(vkp_bytes_copy(cast_env, words, 64, &shared), "bytes");
        drive_check(vkp_broadcast_send(cast_tx, &shared), "send");
    } else {
        work_fill(words, bytes, value);
        drive_check(vkp_broadcast_send(cast_tx, words), "send");
    }
}

typedef struct cast_batch {
    union {
        uint64_t words[MANY * 2];
        vkp_bytes shared[MANY];
    } u;
} cast_batch;

WORK_INLINE uint64_t cast_sum(size_t bytes, cast_batch *batch, size_t count)
{
    uint64_t sum = 0;
    size_t i;
    for (i = 0; i < count; i++) {
        if (bytes == 0) {
            uint64_t first;
            memcpy(&first, batch->u.shared[i].data, sizeof first);
            sum += first;
            vkp_bytes_unref(&batch->u.shared[i]);
        } else {
            sum += batch->u.words[i * (bytes / 8)];
        }
    }
    return sum;
}

/* One value, or with `many` what is there: how many. */
WORK_INLINE size_t cast_take(vkp_broadcast_rx *rx, size_t bytes, bool many, uint64_t *sum)
{
    cast_batch batch;
    size_t count = 1;
    vkp_status status = many ? vkp_broadcast_recv_many(rx, 0, &batch, MANY, &count)
                             : vkp_broadcast_try_recv(rx, &batch);
    if (status == VKP_OK) {
        *sum += cast_sum(bytes, &batch, count);
        return count;
    }
    if (status != VKP_ERR_EMPTY && status != VKP_ERR_TIMEOUT) {
        bench_fail("receive: %s", vkp_status_str(status));
    }
    return 0;
}

WORK_INLINE work_figures cast_same(const work_order *order, size_t bytes, bool many)
{
    uint64_t sum = 0;
    uint64_t sent = 0;
    long receiver;
    work_clock clock;
    cast_open(order);
    work_pin(1);
    clock = work_start();
    while (sent < order->count) {
        uint64_t end = sent + WINDOW;
        while (sent < end) {
            cast_send(bytes, sent++);
        }
        for (receiver = 0; receiver < order->a; receiver++) {
            size_t taken = 0;
            while (taken < WINDOW) {
                size_t count = cast_take(cast_rx[receiver], bytes, many, &sum);
                if (count == 0) {
                    bench_fail("cast: lost");
                }
                taken += count;
            }
        }
    }
    if (sum != (uint64_t)order->a * (sent * (sent - 1) / 2)) {
        bench_fail("cast: values lost, doubled or changed");
    }
    return work_stop(&clock);
}

WORK_INLINE void *cast_produce(size_t bytes, void *at)
{
    work_crew *crew = ((work_seat *)at)->crew;
    uint64_t i;
    work_pin(0);
    work_ready(crew);
    for (i = 0; i < crew->order->count; i++) {
        unsigned turns = 0;
        while (i - __atomic_load_n(&cast_done, __ATOMIC_ACQUIRE) >= RING) {
            work_back_off(&turns);
        }
        cast_send(bytes, i);
    }
    return NULL;
}

WORK_INLINE work_figures cast_cross(const work_order *order, size_t bytes, bool many,
                                    void *(*produce)(void *))
{
    uint64_t *taken = (uint64_t *)calloc((size_t)order->a, sizeof *taken);
    work_seat seat;
    work_crew crew = {order, NULL, NULL, 0, 0, 0};
    uint64_t sum = 0;
    uint64_t done = 0;
    long receiver;
    work_clock clock;
    work_figures figures;
    cast_open(order);
    work_hire(&crew, &seat, 1, produce);
    work_pin(1);
    clock = work_go(&crew, 1);
    while (done < order->count) {
        uint64_t least = UINT64_MAX;
        for (receiver = 0; receiver < order->a; receiver++) {
            size_t count;
            while ((count = cast_take(cast_rx[receiver], bytes, many, &sum)) > 0) {
                taken[receiver] += count;
            }
            least = taken[receiver] < least ? taken[receiver] : least;
        }
        if (least != done) {
            done = least;
            __atomic_store_n(&cast_done, done, __ATOMIC_RELEASE);
        }
    }
    figures = work_stop(&clock);
    work_dismiss(&seat, 1);
    if (sum != (uint64_t)order->a * (done * (done - 1) / 2)) {
        bench_fail("cast: values lost, doubled or changed");
    }
    return figures;
}

static void *produce_8(void *at)
{
    return cast_produce(8, at);
}

static void *produce_16(void *at)
{
    return cast_produce(16, at);
}

static void *produce_shared(void *at)
{
    return cast_produce(0, at);
}

WORK_INLINE work_figures cast_work(const work_order *order, bool many)
{
    if (order->c == 0) {
        return order->b == 8    ? cast_same(order, 8, many)
               : order->b == 16 ? cast_same(order, 16, many)
                                : cast_same(order, 0, many);
    }
    return order->b == 8    ? cast_cross(order, 8, many, produce_8)
           : order->b == 16 ? cast_cross(order, 16, many, produce_16)
                            : cast_cross(order, 0, many, produce_shared);
}

static work_figures cast_one(const work_order *order)
{
    return cast_work(order, false);
}

static work_figures cast_many(const work_order *order)
{
    return cast_work(order, true);
}

static const work_entry entries[] = {
    {"recv", cast_one}, {"recv-fence", cast_one}, {"many", cast_many}};

/* ---- table ---- */

static void run(bench_row *row, double *values)
{
    const drive_item *item = (const drive_item *)row->context;
    work_figures figures;
    double sent;
    values[0] = values[1] = values[2] = NAN;
    if (drive_round(row, &figures, &sent)) {
        double deliveries = sent * (double)item->order.a;
        double seconds = item->order.c == 0 ? figures.cpu_seconds : figures.seconds;
        values[0] = deliveries / seconds / 1e6;
        values[1] = figures.cpu_seconds * 1e9 / deliveries;
        values[2] = figures.sleeps * 1e3 / sent;
    }
}

static bench_table table = {"broadcast: deliveries",
                            {"M deliveries/s", "CPU ns/delivery", "sleeps/1000 values"},
                            {1, 2, 2},
                            3,
                            false,
                            NULL,
                            0};

static void add(long receivers, long bytes, long threads)
{
    static const char *const names[][2] = {{"vkp try_recv", "recv"}, {"vkp recv_many", "many"}};
    drive_group group = {&table, NULL, run, "cast", receivers, bytes, threads, false};
    size_t i;
    group.name = drive_text("%ld receivers, %s, %s", receivers,
                            bytes == 0 ? "ref-counted" : drive_text("%ld B", bytes),
                            threads == 0 ? "one thread" : "two threads");
    for (i = 0; i < 2; i++) {
        bench_row *row = drive_add(&group, BENCH_OURS, names[i][0], NULL, names[i][1]);
        double ratio = bytes == 0 ? 1.2 : threads == 0 ? 5 : 8;
        drive_goal(row, ratio, threads == 0 ? "tokio" : "tokio, tasks");
        drive_goal(row, 0.5, "limit: seqlock ring");
    }
    (void)drive_add(&group, BENCH_OURS, "vkp try_recv, without membarrier", NULL, "recv-fence");
    if (bytes > 0) {
        (void)drive_add(&group, BENCH_LIMIT, "limit: seqlock ring", "own_values", "seqlock");
        (void)drive_add(&group, BENCH_OTHER, "seqlock ring, by calls", "own_values",
                        "seqlock-call");
    }
    if (threads == 0) {
        (void)drive_add(&group, BENCH_PEER, "tokio", "rust", "tokio");
        (void)drive_add(&group, BENCH_PEER, "async-broadcast", "rust", "async-broadcast");
        if (bytes > 0) {
            (void)drive_add(&group, BENCH_PEER, "mutex for each place", "own_values", "mutex");
        }
    } else {
        (void)drive_add(&group, BENCH_PEER, "tokio, tasks", "rust", "tokio-tasks");
        (void)drive_add(&group, BENCH_PEER, "tokio, two threads", "rust", "tokio-threads");
    }
}

int main(int argc, char **argv)
{
    static const long sizes[] = {8, 16, 0};
    long threads;
    size_t i;
    if (drive_start(argc, argv)) {
        return work_main(argc - 1, argv + 1, entries, sizeof entries / sizeof entries[0]);
    }
    for (threads = 0; threads < 2; threads++) {
        for (i = 0; i < 3; i++) {
            add(4, sizes[i], threads);
            add(64, sizes[i], threads);
        }
    }
    drive_run(&table, 1, NULL, argc, argv);
    return 0;
}
