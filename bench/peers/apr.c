/* Worker: APR's queue, of pointers, bounded.
   SPDX-License-Identifier: MIT */
#include "pointer.h"

#include <apr_general.h>
#include <apr_queue.h>

static void *queue_open(const work_order *order)
{
    apr_pool_t *pool;
    apr_queue_t *queue = NULL;
    apr_initialize(); /* counts its calls */
    if (apr_pool_create(&pool, NULL) != APR_SUCCESS ||
        apr_queue_create(&queue, (unsigned)order->a, pool) != APR_SUCCESS) {
        work_fail("apr: no queue");
    }
    return queue;
}

static void *queue_sender(void *channel, long index)
{
    (void)index;
    return channel;
}

static void *queue_receiver(void *channel)
{
    return channel;
}

WORK_INLINE void queue_send(void *sender, const void *message, size_t bytes)
{
    void *pointer = pointer_from(message, bytes);
    while (apr_queue_push((apr_queue_t *)sender, pointer) != APR_SUCCESS) {
    }
}

WORK_INLINE void queue_receive(void *receiver, void *message, size_t bytes)
{
    void *pointer;
    while (apr_queue_pop((apr_queue_t *)receiver, &pointer) != APR_SUCCESS) {
    }
    pointer_into(pointer, message, bytes);
}

static void queue_end(void *sender)
{
    (void)sender;
}

static const work_channel queue = {queue_open, queue_sender,  queue_receiver,
                                   queue_send, queue_receive, queue_end};
WORK_CHANNEL(queue)

static const work_entry entries[] = {{"queue", queue_work}};

int main(int argc, char **argv)
{
    return work_main(argc, argv, entries, sizeof entries / sizeof entries[0]);
}
