/* Worker: from a thread to a loop of libev, by a list and ev_async_send.
   SPDX-License-Identifier: MIT */
#include "looped.h"

#include <ev.h>

static looped_list list;
static looped_sum sum;
static uint64_t expected;
static struct ev_loop *loop;
static ev_async async;

static void post(void *channel, uint64_t value)
{
    (void)channel;
    looped_list_put(&list, value);
    ev_async_send(loop, &async);
}

static void *produce(void *at)
{
    return looped_produce(post, at);
}

static void on_async(struct ev_loop *of, ev_async *watcher, int events)
{
    (void)watcher;
    (void)events;
    looped_list_drain(&list, &sum);
    if (sum.count == expected) {
        ev_break(of, EVBREAK_ALL);
    }
}

static work_figures work(const work_order *order)
{
    work_seat seat;
    work_crew crew = {order, NULL, NULL, 0, 0, 0};
    work_clock clock;
    expected = order->count;
    looped_list_init(&list);
    loop = ev_default_loop(0);
    ev_async_init(&async, on_async);
    ev_async_start(loop, &async);
    work_hire(&crew, &seat, 1, produce);
    work_pin(1);
    clock = work_go(&crew, 1);
    ev_run(loop, 0);
    return looped_end(&clock, order, &seat, &sum, ev_iteration(loop));
}

static const work_entry entries[] = {{"async", work}};

int main(int argc, char **argv)
{
    return work_main(argc, argv, entries, sizeof entries / sizeof entries[0]);
}
