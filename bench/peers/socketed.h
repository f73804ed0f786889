/* For workers that know listening Unix sockets by their names.
   SPDX-License-Identifier: MIT

   Items, A sockets, B threads, COUNT being what all threads do together:
       ref     a reference to one and the same socket, taken and given back
       upgrade the same by weak handle, of a socket chosen anew each time
       find    the same by name, of a socket that is there
       obtain  the same by name, by what makes a socket where there is none (here there is one)
       cycle   a socket made and ended, each thread's always of the same name
       end     sockets made, and each ended on the clock: percentiles. C: 0 until the call returns,
               1 until the file is gone. With a second thread, that one makes and ends others.
               Instead of system calls: how many of the COUNT were handed to another thread's care
       crowd   A sockets made, then all of them ended; COUNT sockets altogether. Further figures:
               seconds for the one and for the other
       memory  no time, but the heap that a socket takes, and the bytes of a weak handle to it
   The files are in a folder of the worker's own, in the one that VKP_BENCH_FOLDER names, else in
   /tmp; it works in it, so that names are short.                                              */
#ifndef VKP_BENCH_SOCKETED_H
#define VKP_BENCH_SOCKETED_H

#include "worker.h"

#include <errno.h>
#include <sys/stat.h>

#define SOCKETED_MOST 1024 /* sockets */
#define SOCKETED_OTHERS 64 /* names of the second thread of item "end" */
#define SOCKETED_BATCH 64  /* sockets of its first thread */

static char socketed_folder[256];
static char socketed_names[SOCKETED_MOST + SOCKETED_OTHERS][24];

/* As a worker ends with _exit, what succeeds calls it; what fails comes here by atexit. Sockets
   are ended before; what a failure left goes with its name.                                    */
static void socketed_leave(void)
{
    char lock[40];
    size_t i;
    if (socketed_folder[0] == '\0') {
        return;
    }
    for (i = 0; i < SOCKETED_MOST + SOCKETED_OTHERS; i++) {
        unlink(socketed_names[i]);
        snprintf(lock, sizeof lock, "%.24s.lock", socketed_names[i]);
        unlink(lock);
    }
    if (chdir("/") != 0 || rmdir(socketed_folder) != 0) {
        fprintf(stderr, "%s: %s\n", socketed_folder, strerror(errno));
    }
    socketed_folder[0] = '\0';
}

WORK_UNUSED static void socketed_enter(void)
{
    const char *parent = getenv("VKP_BENCH_FOLDER");
    size_t i;
    for (i = 0; i < SOCKETED_MOST + SOCKETED_OTHERS; i++) {
        snprintf(socketed_names[i], sizeof socketed_names[i], "client:%zu:sock", i);
    }
    snprintf(socketed_folder, sizeof socketed_folder, "%s/vkp-bench-XXXXXX",
             parent != NULL ? parent : "/tmp");
    if (mkdtemp(socketed_folder) == NULL || chdir(socketed_folder) != 0) {
        work_fail("no folder for the sockets");
    }
    atexit(socketed_leave);
}

/* ---- references ---- */

/* Which socket is next: 32 bits of xorshift, the same for every worker. */
typedef struct socketed_dice {
    uint32_t state;
    uint32_t count;
} socketed_dice;

WORK_INLINE uint32_t socketed_next(socketed_dice *dice)
{
    dice->state ^= dice->state << 13;
    dice->state ^= dice->state >> 17;
    dice->state ^= dice->state << 5;
    return dice->state % dice->count;
}

/* `once` is a constant, so that it is inlined: it takes a reference and gives it back. */
WORK_INLINE void *socketed_turns(void (*once)(uint32_t which), void *at)
{
    work_seat *seat = (work_seat *)at;
    work_crew *crew = seat->crew;
    bool one = strcmp(crew->order->item, "ref") == 0;
    socketed_dice dice = {12345u + (uint32_t)seat->index, (uint32_t)crew->order->a};
    uint64_t each = crew->each;
    uint64_t i;
    work_pin(seat->index == 0 ? 1 : 0);
    work_ready(crew);
    if (one) {
        for (i = 0; i < each; i++) {
            once(0);
        }
    } else {
        for (i = 0; i < each; i++) {
            once(socketed_next(&dice));
        }
    }
    return NULL;
}

/* All of the crew at work from the start to the last one's end. */
WORK_UNUSED static work_figures socketed_run(const work_order *order, void *(*entry)(void *))
{
    work_seat seats[WORK_SEATS];
    work_crew crew = {order, NULL, NULL, order->count / (uint64_t)order->b, 0, 0};
    work_clock clock;
    work_hire(&crew, seats, order->b, entry);
    clock = work_go(&crew, (int)order->b);
    work_dismiss(seats, order->b);
    return work_stop(&clock);
}

#define SOCKETED_TURNS(name)                    \
    static void *name##_turns(void *at)         \
    {                                           \
        return socketed_turns(name##_once, at); \
    }

/* ---- lives ---- */

typedef struct socketed_maker {
    void *(*make)(const char *name); /* listening; fails by itself */
    void (*end)(void *made);
} socketed_maker;

static const socketed_maker *socketed_maker_used;
static int socketed_stop WORK_ALIGNED;

static void *socketed_cycle_turns(void *at)
{
    work_seat *seat = (work_seat *)at;
    const socketed_maker *maker = socketed_maker_used;
    uint64_t i;
    work_pin(seat->index == 0 ? 1 : 0);
    work_ready(seat->crew);
    for (i = 0; i < seat->crew->each; i++) {
        maker->end(maker->make(socketed_names[seat->index]));
    }
    return NULL;
}

static void *socketed_others(void *at)
{
    const socketed_maker *maker = socketed_maker_used;
    size_t i;
    work_pin(0);
    work_ready(((work_seat *)at)->crew);
    for (i = 0; __atomic_load_n(&socketed_stop, __ATOMIC_RELAXED) == 0; i++) {
        maker->end(maker->make(socketed_names[SOCKETED_MOST + i % SOCKETED_OTHERS]));
    }
    return NULL;
}

static bool socketed_is_there(const char *name)
{
    struct stat found;
    if (lstat(name, &found) == 0) {
        return true;
    }
    if (errno != ENOENT) {
        work_fail("end: lstat");
    }
    return false;
}

/* Made in batches: a thread that has just made one finds the registry empty, as the other one is
   still waking up.                                                                            */
static work_figures socketed_end(const work_order *order)
{
    const socketed_maker *maker = socketed_maker_used;
    void *made[SOCKETED_BATCH];
    work_seat seat;
    work_crew crew = {order, NULL, NULL, 0, 0, 0};
    uint64_t warm_up = order->count / 10;
    uint64_t total = warm_up + order->count;
    uint32_t *ns = (uint32_t *)malloc((total + SOCKETED_BATCH) * sizeof *ns);
    bool alone = order->b == 1;
    uint64_t done = 0;
    size_t i;
    work_clock clock;
    work_figures figures;
    work_pin(1);
    if (!alone) {
        work_hire(&crew, &seat, 1, socketed_others);
        (void)work_go(&crew, 1);
    }
    clock = work_start();
    while (done < total) {
        for (i = 0; i < SOCKETED_BATCH; i++) {
            made[i] = maker->make(socketed_names[i]);
        }
        for (i = 0; i < SOCKETED_BATCH; i++) {
            uint64_t begun = work_now_ns();
            maker->end(made[i]);
            while (order->c == 1 && socketed_is_there(socketed_names[i])) {
            }
            ns[done++] = (uint32_t)(work_now_ns() - begun);
        }
        for (i = 0; i < SOCKETED_BATCH; i++) {
            while (socketed_is_there(socketed_names[i])) {
                if (alone) {
                    work_fail("end: the file is still there");
                }
            }
        }
    }
    figures = work_stop(&clock);
    if (!alone) {
        __atomic_store_n(&socketed_stop, 1, __ATOMIC_RELAXED);
        work_dismiss(&seat, 1);
    }
    work_percentiles(ns + warm_up, order->count, &figures);
    return figures;
}

static work_figures socketed_crowd(const work_order *order)
{
    const socketed_maker *maker = socketed_maker_used;
    static void *made[SOCKETED_MOST];
    double up_ns = 0;
    double down_ns = 0;
    uint64_t done;
    uint64_t batch;
    uint64_t i;
    work_clock clock;
    work_figures figures;
    work_pin(1);
    clock = work_start();
    for (done = 0; done < order->count; done += batch) {
        uint64_t begun = work_now_ns();
        uint64_t turned;
        batch = order->count - done;
        batch = batch < (uint64_t)order->a ? batch : (uint64_t)order->a;
        for (i = 0; i < batch; i++) {
            made[i] = maker->make(socketed_names[i]);
        }
        turned = work_now_ns();
        for (i = 0; i < batch; i++) {
            maker->end(made[i]);
        }
        up_ns += (double)(turned - begun);
        down_ns += (double)(work_now_ns() - turned);
    }
    figures = work_stop(&clock);
    figures.more[0] = up_ns * 1e-9;
    figures.more[1] = down_ns * 1e-9;
    return figures;
}

/* Items "cycle", "end" and "crowd". */
WORK_UNUSED static work_figures socketed_lives(const socketed_maker *maker, const work_order *order)
{
    socketed_maker_used = maker;
    if (strcmp(order->item, "cycle") == 0) {
        return socketed_run(order, socketed_cycle_turns);
    }
    if (strcmp(order->item, "end") == 0) {
        return socketed_end(order);
    }
    if (strcmp(order->item, "crowd") == 0) {
        return socketed_crowd(order);
    }
    work_fail("unknown item");
}

#endif
