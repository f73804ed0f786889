/* What the workers of the channel benchmarks share: one process measures one thing once.
   SPDX-License-Identifier: MIT

   A worker is called as
       PROGRAM ITEM KIND A B C COUNT
   and prints one line of numbers, nan where it does not know:
       seconds, CPU seconds, sleeps, system calls, two figures of the item (p50, p99: ns)
   all for COUNT operations. Items of channels of messages:
       flow   A capacity (0: unbounded), B bytes, C senders: COUNT messages; one sender and the
              receiver on a core each, more senders wherever the system puts them
       pair   A capacity, B bytes: COUNT times send and receive on one thread
       pong   A capacity, B bytes: COUNT round trips between two threads
       memory A capacity, B bytes: no time, but the heap of an idle channel, and of a message queued
   What a channel is, a worker says with a work_channel and WORK_CHANNEL. C and C++.            */
#ifndef VKP_BENCH_WORKER_H
#define VKP_BENCH_WORKER_H

#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE 1
#endif

#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif

#define WORK_UNUSED __attribute__((unused))
#define WORK_INLINE static inline __attribute__((always_inline, unused))
#define WORK_LINE 128 /* two cache lines: processors fetch them in pairs */
#define WORK_ALIGNED __attribute__((aligned(WORK_LINE)))
#define WORK_IDLE_CHANNELS 64

typedef struct work_order {
    const char *item;
    const char *kind;
    long a;
    long b;
    long c;
    uint64_t count;
} work_order;

typedef struct work_figures {
    double seconds;
    double cpu_seconds;
    double sleeps; /* times that a thread gave its core up to wait */
    double calls;
    double more[2];
} work_figures;

/* Calls get the message's size as a constant, so that copies are inlined for everyone. */
typedef struct work_channel {
    void *(*open)(const work_order *order);
    void *(*sender)(void *channel, long index); /* on the sender's thread */
    void *(*receiver)(void *channel);
    void (*send)(void *sender, const void *message, size_t bytes);
    void (*receive)(void *receiver, void *message, size_t bytes);
    void (*end)(void *sender); /* no more from this sender */
} work_channel;

/* Which system calls the code under test made, where a worker can tell; see work_clock. */
static uint64_t (*work_count_calls)(void) WORK_UNUSED;

/* The heap in use, where the worker knows better than the C library. */
static double (*work_count_heap)(void) WORK_UNUSED;

WORK_UNUSED __attribute__((noreturn)) static void work_fail(const char *what)
{
    fprintf(stderr, "%s\n", what);
    exit(1);
}

WORK_UNUSED static void *work_alloc(size_t bytes)
{
    void *memory = NULL;
    if (posix_memalign(&memory, WORK_LINE, bytes) != 0) {
        work_fail("out of memory");
    }
    memset(memory, 0, bytes);
    return memory;
}

WORK_UNUSED static void work_pin(int core)
{
#ifdef __linux__
    cpu_set_t set;
    if (sysconf(_SC_NPROCESSORS_ONLN) > core) {
        CPU_ZERO(&set);
        CPU_SET(core, &set);
        (void)sched_setaffinity(0, sizeof set, &set);
    }
#else
    (void)core;
#endif
}

WORK_INLINE uint64_t work_now_ns(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

WORK_INLINE void work_pause(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb" ::: "memory");
#endif
}

/* For queues that leave waiting to the caller. */
WORK_INLINE void work_back_off(unsigned *turns)
{
    if (++*turns > 2000) {
        sched_yield();
    } else {
        work_pause();
    }
}

/* ---- clocks ---- */

typedef struct work_clock {
    uint64_t started_ns;
    double cpu_seconds;
    double sleeps;
    uint64_t calls;
} work_clock;

WORK_UNUSED static double work_cpu_seconds(void)
{
    struct timespec time;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

WORK_UNUSED static double work_sleeps(void)
{
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (double)usage.ru_nvcsw;
}

WORK_UNUSED static work_clock work_start(void)
{
    work_clock clock;
    clock.sleeps = work_sleeps();
    clock.calls = work_count_calls != NULL ? work_count_calls() : 0;
    clock.cpu_seconds = work_cpu_seconds();
    clock.started_ns = work_now_ns();
    return clock;
}

WORK_UNUSED static work_figures work_stop(const work_clock *clock)
{
    work_figures figures;
    figures.seconds = (double)(work_now_ns() - clock->started_ns) * 1e-9;
    figures.cpu_seconds = work_cpu_seconds() - clock->cpu_seconds;
    figures.sleeps = work_sleeps() - clock->sleeps;
    figures.calls = work_count_calls != NULL ? (double)(work_count_calls() - clock->calls) : NAN;
    figures.more[0] = figures.more[1] = NAN;
    return figures;
}

static int work_compare(const void *a, const void *b)
{
    uint32_t left = *(const uint32_t *)a;
    uint32_t right = *(const uint32_t *)b;
    return left < right ? -1 : left > right;
}

WORK_UNUSED static void work_percentiles(uint32_t *ns, uint64_t count, work_figures *figures)
{
    qsort(ns, count, sizeof *ns, work_compare);
    figures->more[0] = ns[count / 2];
    figures->more[1] = ns[count - 1 - count / 100];
}

/* Bytes; huge allocations that have a mapping of their own included. */
WORK_UNUSED static double work_heap(void)
{
    if (work_count_heap != NULL) {
        return work_count_heap();
    }
#if defined(__GLIBC__) && (__GLIBC__ > 2 || __GLIBC_MINOR__ >= 33)
    {
        struct mallinfo2 info = mallinfo2();
        return (double)info.uordblks + (double)info.hblkhd;
    }
#else
    return NAN;
#endif
}

/* ---- threads that begin together ---- */

typedef struct work_crew {
    const work_order *order;
    void *channel;
    void *back; /* pong: the channel of answers */
    uint64_t each;
    int ready;
    int go;
} work_crew;

typedef struct work_seat {
    work_crew *crew;
    long index;
    pthread_t thread;
} work_seat;

#define WORK_SEATS 64

/* A member of the crew: set up, waiting for the start. */
WORK_UNUSED static void work_ready(work_crew *crew)
{
    unsigned turns = 0;
    __atomic_fetch_add(&crew->ready, 1, __ATOMIC_RELEASE);
    while (__atomic_load_n(&crew->go, __ATOMIC_ACQUIRE) == 0) {
        work_back_off(&turns);
    }
}

WORK_UNUSED static work_clock work_go(work_crew *crew, int members)
{
    work_clock clock;
    while (__atomic_load_n(&crew->ready, __ATOMIC_ACQUIRE) < members) {
        sched_yield();
    }
    clock = work_start();
    __atomic_store_n(&crew->go, 1, __ATOMIC_RELEASE);
    return clock;
}

WORK_UNUSED static void work_hire(work_crew *crew, work_seat *seats, long count,
                                  void *(*entry)(void *))
{
    long i;
    for (i = 0; i < count; i++) {
        seats[i].crew = crew;
        seats[i].index = i;
        if (pthread_create(&seats[i].thread, NULL, entry, &seats[i]) != 0) {
            work_fail("no thread");
        }
    }
}

WORK_UNUSED static void work_dismiss(work_seat *seats, long count)
{
    long i;
    for (i = 0; i < count; i++) {
        pthread_join(seats[i].thread, NULL);
    }
}

/* ---- the items; each is compiled once per channel and size ---- */

/* All of the message is written: who copies 64 bytes shall copy fresh ones. */
WORK_INLINE void work_fill(uint64_t *message, size_t bytes, uint64_t value)
{
    size_t i;
    for (i = 0; i < bytes / 8; i++) {
        message[i] = value;
    }
}

WORK_INLINE void *work_produce(const work_channel *channel, size_t bytes, void *at)
{
    work_seat *seat = (work_seat *)at;
    work_crew *crew = seat->crew;
    uint64_t each = crew->each;
    uint64_t message[8];
    uint64_t i;
    void *sender;
    if (crew->order->c == 1) {
        work_pin(0);
    }
    sender = channel->sender(crew->channel, seat->index);
    work_ready(crew);
    for (i = 0; i < each; i++) {
        work_fill(message, bytes, i);
        channel->send(sender, message, bytes);
    }
    channel->end(sender);
    return NULL;
}

WORK_INLINE work_figures work_flow(const work_channel *channel, size_t bytes,
                                   void *(*produce)(void *), const work_order *order)
{
    work_seat seats[WORK_SEATS];
    work_crew crew = {order, channel->open(order), NULL, order->count / (uint64_t)order->c, 0, 0};
    void *receiver = channel->receiver(crew.channel);
    uint64_t total = crew.each * (uint64_t)order->c;
    uint64_t sum = 0;
    uint64_t message[8];
    uint64_t i;
    work_clock clock;
    work_figures figures;
    work_hire(&crew, seats, order->c, produce);
    if (order->c == 1) {
        work_pin(1);
    }
    clock = work_go(&crew, (int)order->c);
    for (i = 0; i < total; i++) {
        channel->receive(receiver, message, bytes);
        sum += message[0];
    }
    figures = work_stop(&clock);
    work_dismiss(seats, order->c);
    if (sum != (uint64_t)order->c * (crew.each * (crew.each - 1) / 2)) {
        work_fail("flow: messages lost, doubled or changed");
    }
    return figures;
}

WORK_INLINE work_figures work_pair(const work_channel *channel, size_t bytes,
                                   const work_order *order)
{
    void *both = channel->open(order);
    void *receiver = channel->receiver(both);
    void *sender = channel->sender(both, 0);
    uint64_t warm_up = order->count / 10;
    uint64_t message[8];
    uint64_t sum = 0;
    uint64_t i;
    work_clock clock = {0, 0, 0, 0};
    work_pin(1);
    for (i = 0; i < warm_up + order->count; i++) {
        if (i == warm_up) {
            clock = work_start();
        }
        work_fill(message, bytes, i);
        channel->send(sender, message, bytes);
        channel->receive(receiver, message, bytes);
        sum += message[0] - i;
    }
    if (sum != 0) {
        work_fail("pair: another message came out");
    }
    return work_stop(&clock);
}

WORK_INLINE void *work_answer(const work_channel *channel, size_t bytes, void *at)
{
    work_seat *seat = (work_seat *)at;
    work_crew *crew = seat->crew;
    void *receiver;
    void *sender;
    uint64_t message[8];
    uint64_t i;
    work_pin(0);
    receiver = channel->receiver(crew->channel);
    sender = channel->sender(crew->back, 0);
    work_ready(crew);
    for (i = 0; i < crew->each; i++) {
        channel->receive(receiver, message, bytes);
        channel->send(sender, message, bytes);
    }
    channel->end(sender);
    return NULL;
}

WORK_INLINE work_figures work_pong(const work_channel *channel, size_t bytes,
                                   void *(*answer)(void *), const work_order *order)
{
    uint64_t warm_up = order->count / 10;
    work_seat seat;
    work_crew crew = {order, channel->open(order), channel->open(order), warm_up + order->count, 0,
                      0};
    uint32_t *ns = (uint32_t *)malloc((order->count + 1) * sizeof *ns);
    void *receiver = channel->receiver(crew.back);
    void *sender;
    uint64_t message[8];
    uint64_t last = 0;
    uint64_t i;
    work_clock clock;
    work_figures figures;
    work_hire(&crew, &seat, 1, answer);
    work_pin(1);
    sender = channel->sender(crew.channel, 0);
    clock = work_go(&crew, 1);
    for (i = 0; i < warm_up + order->count; i++) {
        uint64_t now;
        if (i == warm_up) {
            clock = work_start();
            last = clock.started_ns;
        }
        work_fill(message, bytes, i);
        channel->send(sender, message, bytes);
        channel->receive(receiver, message, bytes);
        if (message[0] != i) {
            work_fail("pong: another message came back");
        }
        if (i >= warm_up) {
            now = work_now_ns();
            ns[i - warm_up] = (uint32_t)(now - last);
            last = now;
        }
    }
    figures = work_stop(&clock);
    work_dismiss(&seat, 1);
    work_percentiles(ns, order->count, &figures);
    return figures;
}

/* more: bytes of an idle channel, bytes of a message queued. */
WORK_INLINE work_figures work_memory(const work_channel *channel, size_t bytes,
                                     const work_order *order)
{
    work_figures figures = {0, 0, 0, NAN, {NAN, NAN}};
    long messages = order->a > 0 ? order->a : 100000;
    uint64_t message[8];
    void *sender;
    double before;
    long i;
    before = work_heap();
    for (i = 0; i < WORK_IDLE_CHANNELS; i++) {
        void *both = channel->open(order);
        (void)channel->receiver(both);
        (void)channel->sender(both, 0);
    }
    figures.more[0] = (work_heap() - before) / WORK_IDLE_CHANNELS;
    {
        void *both = channel->open(order);
        (void)channel->receiver(both);
        sender = channel->sender(both, 0);
    }
    before = work_heap();
    for (i = 0; i < messages; i++) {
        work_fill(message, bytes, (uint64_t)i);
        channel->send(sender, message, bytes);
    }
    figures.more[1] = (work_heap() - before) / (double)messages;
    return figures;
}

/* Makes NAME_work, which carries out an order for the channel in the constant NAME. */
#define WORK_CHANNEL(name)                                                                       \
    static void *name##_produce_8(void *at)                                                      \
    {                                                                                            \
        return work_produce(&name, 8, at);                                                       \
    }                                                                                            \
    static void *name##_produce_64(void *at)                                                     \
    {                                                                                            \
        return work_produce(&name, 64, at);                                                      \
    }                                                                                            \
    static void *name##_answer_8(void *at)                                                       \
    {                                                                                            \
        return work_answer(&name, 8, at);                                                        \
    }                                                                                            \
    static work_figures name##_work(const work_order *order)                                     \
    {                                                                                            \
        if (strcmp(order->item, "flow") == 0) {                                                  \
            return order->b == 8 ? work_flow(&name, 8, name##_produce_8, order)                  \
                                 : work_flow(&name, 64, name##_produce_64, order);               \
        }                                                                                        \
        if (strcmp(order->item, "pair") == 0) {                                                  \
            return order->b == 8 ? work_pair(&name, 8, order) : work_pair(&name, 64, order);     \
        }                                                                                        \
        if (strcmp(order->item, "pong") == 0) {                                                  \
            return work_pong(&name, 8, name##_answer_8, order);                                  \
        }                                                                                        \
        if (strcmp(order->item, "memory") == 0) {                                                \
            return order->b == 8 ? work_memory(&name, 8, order) : work_memory(&name, 64, order); \
        }                                                                                        \
        work_fail("unknown item");                                                               \
    }

/* ---- the command line ---- */

WORK_UNUSED static void *work_idle(void *at)
{
    return at;
}

typedef struct work_entry {
    const char *kind;
    work_figures (*work)(const work_order *order);
} work_entry;

WORK_UNUSED static int work_main(int argc, char **argv, const work_entry *entries, size_t count)
{
    work_order order;
    pthread_t thread;
    size_t i;
    if (argc != 7) {
        fprintf(stderr, "usage: %s ITEM KIND A B C COUNT\n", argv[0]);
        return 2;
    }
    order.item = argv[1];
    order.kind = argv[2];
    order.a = atol(argv[3]);
    order.b = atol(argv[4]);
    order.c = atol(argv[5]);
    order.count = strtoull(argv[6], NULL, 10);
    /* glibc's locks and heap leave the atomic operations out until there was a second thread. */
    if (pthread_create(&thread, NULL, work_idle, NULL) == 0) {
        pthread_join(thread, NULL);
    }
    for (i = 0; i < count; i++) {
        if (strcmp(entries[i].kind, order.kind) == 0) {
            work_figures figures = entries[i].work(&order);
            printf("%.9f %.9f %.0f %.0f %.6f %.6f\n", figures.seconds, figures.cpu_seconds,
                   figures.sleeps, figures.calls, figures.more[0], figures.more[1]);
            fflush(stdout);
            _exit(0); /* libraries' threads are not worth joining */
        }
    }
    fprintf(stderr, "%s: unknown kind %s\n", argv[0], order.kind);
    return 2;
}

#endif
