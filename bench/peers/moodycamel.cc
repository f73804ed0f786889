/* Worker: moodycamel's ConcurrentQueue, unbounded.
   SPDX-License-Identifier: MIT

       spin             as it is; the receiver tries again until something is there
       spin-tokens      a token for each end, taken out 256 at a time
       blocking         its BlockingConcurrentQueue, which sleeps on a semaphore after 10,000 turns
       blocking-tokens  the same with tokens, 256 at a time                                   */
#include "worker.h"

#include <blockingconcurrentqueue.h>
#include <concurrentqueue.h>

namespace {

const size_t bulk = 256;

template <size_t Bytes>
struct message {
    uint64_t words[Bytes / 8];
};

/* How a queue that does not wait, and one that does, take up to `most` messages. */
template <class Message>
struct spinning {
    moodycamel::ConcurrentQueue<Message> queue;
    void one(Message &out)
    {
        unsigned turns = 0;
        while (!queue.try_dequeue(out)) {
            work_back_off(&turns);
        }
    }
    size_t many(moodycamel::ConsumerToken &token, Message *out, size_t most)
    {
        unsigned turns = 0;
        size_t got;
        while ((got = queue.try_dequeue_bulk(token, out, most)) == 0) {
            work_back_off(&turns);
        }
        return got;
    }
};

template <class Message>
struct blocking {
    moodycamel::BlockingConcurrentQueue<Message> queue;
    void one(Message &out)
    {
        queue.wait_dequeue(out);
    }
    size_t many(moodycamel::ConsumerToken &token, Message *out, size_t most)
    {
        return queue.wait_dequeue_bulk(token, out, most);
    }
};

template <class Queue, class Message>
struct plain {
    Queue both;
    struct sender {
        Queue &both;
        explicit sender(plain &channel) : both(channel.both)
        {
        }
        void send(const Message &from)
        {
            both.queue.enqueue(from);
        }
    };
    struct receiver {
        Queue &both;
        explicit receiver(plain &channel) : both(channel.both)
        {
        }
        void receive(Message &out)
        {
            both.one(out);
        }
    };
};

template <class Queue, class Message>
struct tokens {
    Queue both;
    struct sender {
        Queue &both;
        moodycamel::ProducerToken token;
        explicit sender(tokens &channel) : both(channel.both), token(both.queue)
        {
        }
        void send(const Message &from)
        {
            both.queue.enqueue(token, from);
        }
    };
    struct receiver {
        Queue &both;
        moodycamel::ConsumerToken token;
        Message held[bulk];
        size_t next;
        size_t end;
        explicit receiver(tokens &channel)
            : both(channel.both), token(both.queue), held(), next(0), end(0)
        {
        }
        void receive(Message &out)
        {
            if (next == end) {
                end = both.many(token, held, bulk);
                next = 0;
            }
            out = held[next++];
        }
    };
};

/* The six functions of a work_channel over one of the above. */
template <class Channel, class Message>
struct functions {
    static void *open(const work_order *)
    {
        return new Channel();
    }
    static void *sender(void *channel, long)
    {
        return new typename Channel::sender(*static_cast<Channel *>(channel));
    }
    static void *receiver(void *channel)
    {
        return new typename Channel::receiver(*static_cast<Channel *>(channel));
    }
    static void send(void *sender, const void *from, size_t)
    {
        Message copy;
        memcpy(&copy, from, sizeof copy);
        static_cast<typename Channel::sender *>(sender)->send(copy);
    }
    static void receive(void *receiver, void *out, size_t)
    {
        Message copy;
        static_cast<typename Channel::receiver *>(receiver)->receive(copy);
        memcpy(out, &copy, sizeof copy);
    }
    static void end(void *)
    {
    }
    static constexpr work_channel channel = {open, sender, receiver, send, receive, end};
    static void *produce(void *at)
    {
        return work_produce(&channel, sizeof(Message), at);
    }
    static void *answer(void *at)
    {
        return work_answer(&channel, sizeof(Message), at);
    }
    static work_figures work(const work_order *order)
    {
        if (strcmp(order->item, "flow") == 0) {
            return work_flow(&channel, sizeof(Message), produce, order);
        }
        if (strcmp(order->item, "pair") == 0) {
            return work_pair(&channel, sizeof(Message), order);
        }
        if (strcmp(order->item, "pong") == 0) {
            return work_pong(&channel, sizeof(Message), answer, order);
        }
        return work_memory(&channel, sizeof(Message), order);
    }
};

template <template <class> class Queue, template <class, class> class Ends>
work_figures by_size(const work_order *order)
{
    typedef message<8> small;
    typedef message<64> large;
    return order->b == 8 ? functions<Ends<Queue<small>, small>, small>::work(order)
                         : functions<Ends<Queue<large>, large>, large>::work(order);
}

const work_entry entries[] = {{"spin", by_size<spinning, plain>},
                              {"spin-tokens", by_size<spinning, tokens>},
                              {"blocking", by_size<blocking, plain>},
                              {"blocking-tokens", by_size<blocking, tokens>}};

} // namespace

int main(int argc, char **argv)
{
    return work_main(argc, argv, entries, sizeof entries / sizeof entries[0]);
}
