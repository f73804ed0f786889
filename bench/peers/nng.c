/* Worker: nng inside the process: pair sockets for one sender, push to pull for several. A bound is
   split between the two ends, as each keeps messages of its own; 8192 is its most.
   SPDX-License-Identifier: MIT */
#include "worker.h"

#include <nng/nng.h>
#include <nng/protocol/pair0/pair.h>
#include <nng/protocol/pipeline0/pull.h>
#include <nng/protocol/pipeline0/push.h>

typedef struct line {
    nng_socket receiver;
    bool many;
    int half;
    char address[32];
} line;

static void *line_open(const work_order *order)
{
    static int count;
    line *self = (line *)calloc(1, sizeof *self);
    self->many = order->c > 1;
    self->half = order->a > 0 ? (int)((order->a + 1) / 2) : 8192;
    snprintf(self->address, sizeof self->address, "inproc://%d", count++);
    if ((self->many ? nng_pull0_open(&self->receiver) : nng_pair0_open(&self->receiver)) != 0 ||
        nng_socket_set_int(self->receiver, NNG_OPT_RECVBUF, self->half) != 0 ||
        nng_listen(self->receiver, self->address, NULL, 0) != 0) {
        work_fail("nng: cannot listen");
    }
    return self;
}

static void *line_sender(void *channel, long index)
{
    line *self = (line *)channel;
    nng_socket *sender = (nng_socket *)calloc(1, sizeof *sender);
    (void)index;
    if ((self->many ? nng_push0_open(sender) : nng_pair0_open(sender)) != 0 ||
        nng_socket_set_int(*sender, NNG_OPT_SENDBUF, self->half) != 0 ||
        nng_dial(*sender, self->address, NULL, 0) != 0) {
        work_fail("nng: cannot dial");
    }
    return sender;
}

static void *line_receiver(void *channel)
{
    return &((line *)channel)->receiver;
}

WORK_INLINE void line_send(void *sender, const void *message, size_t bytes)
{
    nng_msg *copy;
    if (nng_msg_alloc(&copy, bytes) != 0) {
        work_fail("nng: no message");
    }
    memcpy(nng_msg_body(copy), message, bytes);
    if (nng_sendmsg(*(nng_socket *)sender, copy, 0) != 0) {
        work_fail("nng: send");
    }
}

WORK_INLINE void line_receive(void *receiver, void *message, size_t bytes)
{
    nng_msg *copy;
    if (nng_recvmsg(*(nng_socket *)receiver, &copy, 0) != 0) {
        work_fail("nng: receive");
    }
    memcpy(message, nng_msg_body(copy), bytes);
    nng_msg_free(copy);
}

static void line_end(void *sender)
{
    (void)sender;
}

static const work_channel inproc = {line_open, line_sender,  line_receiver,
                                    line_send, line_receive, line_end};
WORK_CHANNEL(inproc)

static const work_entry entries[] = {{"inproc", inproc_work}};

int main(int argc, char **argv)
{
    return work_main(argc, argv, entries, sizeof entries / sizeof entries[0]);
}
