/* Worker: Concurrency Kit's ring, one sender and one receiver, messages by value; both spin, as it
   has no way to wait. Its many-sender form spins on senders that were preempted: not for two cores.
   SPDX-License-Identifier: MIT                                                               */
#include "worker.h"

#include <ck_ring.h>

struct small {
    uint64_t words[1];
};
struct large {
    uint64_t words[8];
};
CK_RING_PROTOTYPE(small, small)
CK_RING_PROTOTYPE(large, large)

typedef struct ck {
    ck_ring_t ring;
    void *slots;
} ck;

static void *ck_open(const work_order *order)
{
    ck *self = (ck *)work_alloc(sizeof *self);
    unsigned size = 2;
    while (size < (unsigned)order->a + 1) { /* it keeps one free */
        size *= 2;
    }
    self->slots = work_alloc(size * (size_t)order->b);
    ck_ring_init(&self->ring, size);
    return self;
}

static void *ck_sender(void *channel, long index)
{
    (void)index;
    return channel;
}

static void *ck_receiver(void *channel)
{
    return channel;
}

WORK_INLINE void ck_send(void *sender, const void *message, size_t bytes)
{
    ck *self = (ck *)sender;
    unsigned turns = 0;
    if (bytes == 8) {
        struct small copy;
        memcpy(&copy, message, sizeof copy);
        while (!CK_RING_ENQUEUE_SPSC(small, &self->ring, self->slots, &copy)) {
            work_back_off(&turns);
        }
    } else {
        struct large copy;
        memcpy(&copy, message, sizeof copy);
        while (!CK_RING_ENQUEUE_SPSC(large, &self->ring, self->slots, &copy)) {
            work_back_off(&turns);
        }
    }
}

WORK_INLINE void ck_receive(void *receiver, void *message, size_t bytes)
{
    ck *self = (ck *)receiver;
    unsigned turns = 0;
    if (bytes == 8) {
        while (!CK_RING_DEQUEUE_SPSC(small, &self->ring, self->slots, (struct small *)message)) {
            work_back_off(&turns);
        }
    } else {
        while (!CK_RING_DEQUEUE_SPSC(large, &self->ring, self->slots, (struct large *)message)) {
            work_back_off(&turns);
        }
    }
}

static void ck_end(void *sender)
{
    (void)sender;
}

static const work_channel ck_spsc = {ck_open, ck_sender, ck_receiver, ck_send, ck_receive, ck_end};
WORK_CHANNEL(ck_spsc)

static const work_entry entries[] = {{"spsc", ck_spsc_work}};

int main(int argc, char **argv)
{
    return work_main(argc, argv, entries, sizeof entries / sizeof entries[0]);
}
