/* Worker: GLib's GAsyncQueue, of pointers, unbounded.
   SPDX-License-Identifier: MIT */
#include "pointer.h"

#include <glib.h>

static void *queue_open(const work_order *order)
{
    (void)order;
    return g_async_queue_new();
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
    g_async_queue_push((GAsyncQueue *)sender, pointer_from(message, bytes));
}

WORK_INLINE void queue_receive(void *receiver, void *message, size_t bytes)
{
    pointer_into(g_async_queue_pop((GAsyncQueue *)receiver), message, bytes);
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
