/* For workers that send from a thread to an event loop.
   SPDX-License-Identifier: MIT

   Item "loop": A messages in a burst (0: flat out), 20 us without work between bursts; COUNT
   messages of 8 bytes. The first further figure is how often the loop's wait returned.         */
#ifndef VKP_BENCH_LOOPED_H
#define VKP_BENCH_LOOPED_H

#include "worker.h"

#define LOOPED_PAUSE_NS 20000u

/* The sending thread: `post` is a constant, so that it is inlined. */
WORK_INLINE void *looped_produce(void (*post)(void *channel, uint64_t value), void *at)
{
    work_crew *crew = ((work_seat *)at)->crew;
    uint64_t burst = (uint64_t)crew->order->a;
    uint64_t left = burst;
    uint64_t i;
    work_pin(0);
    work_ready(crew);
    for (i = 0; i < crew->order->count; i++) {
        post(crew->channel, i);
        if (burst > 0 && --left == 0) {
            uint64_t end = work_now_ns() + LOOPED_PAUSE_NS;
            while (work_now_ns() < end) {
                work_pause();
            }
            left = burst;
        }
    }
    return NULL;
}

/* What came out of the loop. */
typedef struct looped_sum {
    uint64_t count;
    uint64_t values;
} looped_sum;

WORK_UNUSED static work_figures looped_end(const work_clock *clock, const work_order *order,
                                           work_seat *seat, const looped_sum *sum, uint64_t waits)
{
    work_figures figures = work_stop(clock);
    work_dismiss(seat, 1);
    if (sum->values != order->count * (order->count - 1) / 2) {
        work_fail("loop: messages lost, doubled or changed");
    }
    figures.more[0] = (double)waits;
    return figures;
}

/* ---- what is usual beside a loop: a list behind a mutex ---- */

typedef struct looped_node {
    struct looped_node *next;
    uint64_t value;
} looped_node;

typedef struct looped_list {
    pthread_mutex_t lock;
    looped_node *first;
    looped_node **end;
} looped_list;

WORK_UNUSED static void looped_list_init(looped_list *self)
{
    pthread_mutex_init(&self->lock, NULL);
    self->first = NULL;
    self->end = &self->first;
}

WORK_INLINE void looped_list_put(looped_list *self, uint64_t value)
{
    looped_node *node = (looped_node *)malloc(sizeof *node);
    node->value = value;
    node->next = NULL;
    pthread_mutex_lock(&self->lock);
    *self->end = node;
    self->end = &node->next;
    pthread_mutex_unlock(&self->lock);
}

WORK_INLINE void looped_list_drain(looped_list *self, looped_sum *sum)
{
    looped_node *node;
    pthread_mutex_lock(&self->lock);
    node = self->first;
    self->first = NULL;
    self->end = &self->first;
    pthread_mutex_unlock(&self->lock);
    while (node != NULL) {
        looped_node *next = node->next;
        sum->values += node->value;
        sum->count++;
        free(node);
        node = next;
    }
}

#endif
