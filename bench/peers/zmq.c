/* Worker: ZeroMQ, PUSH to PULL inside the process. A bound is split between the two ends, as each
   keeps messages of its own.
   SPDX-License-Identifier: MIT */
#include "worker.h"

#include <zmq.h>

typedef struct pipeline {
    void *receiver;
    int half; /* 0: unbounded */
    char address[32];
} pipeline;

static void *context;

static void *pipeline_open(const work_order *order)
{
    static int count;
    pipeline *self = (pipeline *)calloc(1, sizeof *self);
    if (context == NULL) {
        context = zmq_ctx_new();
    }
    self->half = (int)((order->a + 1) / 2);
    snprintf(self->address, sizeof self->address, "inproc://%d", count++);
    self->receiver = zmq_socket(context, ZMQ_PULL);
    zmq_setsockopt(self->receiver, ZMQ_RCVHWM, &self->half, sizeof self->half);
    if (self->receiver == NULL || zmq_bind(self->receiver, self->address) != 0) {
        work_fail("zmq: cannot bind");
    }
    return self;
}

static void *pipeline_sender(void *channel, long index)
{
    pipeline *self = (pipeline *)channel;
    void *sender = zmq_socket(context, ZMQ_PUSH);
    (void)index;
    zmq_setsockopt(sender, ZMQ_SNDHWM, &self->half, sizeof self->half);
    if (sender == NULL || zmq_connect(sender, self->address) != 0) {
        work_fail("zmq: cannot connect");
    }
    return sender;
}

static void *pipeline_receiver(void *channel)
{
    return ((pipeline *)channel)->receiver;
}

WORK_INLINE void pipeline_send(void *sender, const void *message, size_t bytes)
{
    while (zmq_send(sender, message, bytes, 0) < 0) {
    }
}

WORK_INLINE void pipeline_receive(void *receiver, void *message, size_t bytes)
{
    while (zmq_recv(receiver, message, bytes, 0) < 0) {
    }
}

static void pipeline_end(void *sender)
{
    (void)sender;
}

static const work_channel push_pull = {pipeline_open, pipeline_sender,  pipeline_receiver,
                                       pipeline_send, pipeline_receive, pipeline_end};
WORK_CHANNEL(push_pull)

static const work_entry entries[] = {{"push-pull", push_pull_work}};

int main(int argc, char **argv)
{
    return work_main(argc, argv, entries, sizeof entries / sizeof entries[0]);
}
