/* Worker: from a thread to a loop of libuv, by a list and uv_async_send.
   SPDX-License-Identifier: MIT */
#include "looped.h"

#include <uv.h>

static looped_list list;
static looped_sum sum;
static uint64_t expected;
static uint64_t waits;
static uv_async_t async;

static void post(void *channel, uint64_t value)
{
    (void)channel;
    looped_list_put(&list, value);
    uv_async_send(&async);
}

static void *produce(void *at)
{
    return looped_produce(post, at);
}

static void on_async(uv_async_t *handle)
{
    looped_list_drain(&list, &sum);
    if (sum.count == expected) {
        uv_stop(handle->loop);
    }
}

/* Runs after each wait. */
static void on_check(uv_check_t *handle)
{
    (void)handle;
    waits++;
}

static work_figures work(const work_order *order)
{
    work_seat seat;
    work_crew crew = {order, NULL, NULL, 0, 0, 0};
    uv_loop_t *loop = uv_default_loop();
    uv_check_t check;
    work_clock clock;
    expected = order->count;
    looped_list_init(&list);
    uv_async_init(loop, &async, on_async);
    uv_check_init(loop, &check);
    uv_check_start(&check, on_check);
    work_hire(&crew, &seat, 1, produce);
    work_pin(1);
    clock = work_go(&crew, 1);
    uv_run(loop, UV_RUN_DEFAULT);
    return looped_end(&clock, order, &seat, &sum, waits);
}

static const work_entry entries[] = {{"async", work}};

int main(int argc, char **argv)
{
    return work_main(argc, argv, entries, sizeof entries / sizeof entries[0]);
}
