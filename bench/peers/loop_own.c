/* Workers of our own making: from a thread to a loop that waits in epoll. Linux only.
   SPDX-License-Identifier: MIT

       eventfd   a ring, and a write to an eventfd for each message
       pipe      a ring, and a byte through a pipe for each message
       armed     the limit: a ring, and a write to an eventfd only when the loop is about to wait,
                 which it finds out without a fence in the sender (membarrier before the wait)  */
#include "looped.h"

#include <fcntl.h>
#include <linux/membarrier.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>

#define RING 65536
#define LOOKS 50 /* before it waits */

static struct {
    uint64_t head WORK_ALIGNED;
    uint64_t tail WORK_ALIGNED;
    uint64_t tail_seen WORK_ALIGNED; /* the sender's own */
    uint32_t armed WORK_ALIGNED;
    int wake_fd;
    int wait_fd;
    uint64_t slots[RING] WORK_ALIGNED;
} ring;

WORK_INLINE void ring_put(uint64_t value)
{
    unsigned turns = 0;
    uint64_t head = __atomic_load_n(&ring.head, __ATOMIC_RELAXED);
    while (head - ring.tail_seen == RING) {
        ring.tail_seen = __atomic_load_n(&ring.tail, __ATOMIC_ACQUIRE);
        if (head - ring.tail_seen == RING) {
            work_back_off(&turns);
        }
    }
    ring.slots[head % RING] = value;
    __atomic_store_n(&ring.head, head + 1, __ATOMIC_RELEASE);
}

WORK_INLINE bool ring_drain(looped_sum *sum)
{
    uint64_t tail = __atomic_load_n(&ring.tail, __ATOMIC_RELAXED);
    uint64_t head = __atomic_load_n(&ring.head, __ATOMIC_ACQUIRE);
    bool any = head != tail;
    sum->count += head - tail;
    while (tail != head) {
        sum->values += ring.slots[tail++ % RING];
    }
    __atomic_store_n(&ring.tail, tail, __ATOMIC_RELEASE);
    return any;
}

static void ring_wake(void)
{
    uint64_t one = 1;
    while (write(ring.wake_fd, &one, sizeof one) < 0) { /* the pipe is full */
        sched_yield();
    }
}

static void post_each(void *channel, uint64_t value)
{
    (void)channel;
    ring_put(value);
    ring_wake();
}

static void post_armed(void *channel, uint64_t value)
{
    (void)channel;
    ring_put(value);
    __asm__ volatile("" ::: "memory"); /* the receiver's barrier makes this the order of both */
    if (__atomic_load_n(&ring.armed, __ATOMIC_RELAXED) != 0 &&
        __atomic_exchange_n(&ring.armed, 0, __ATOMIC_ACQ_REL) != 0) {
        ring_wake();
    }
}

static void *produce_each(void *at)
{
    return looped_produce(post_each, at);
}

static void *produce_armed(void *at)
{
    return looped_produce(post_armed, at);
}

/* True: nothing is there, and the sender will tell. */
static bool ring_arm(looped_sum *sum)
{
    int i;
    for (i = 0; i < LOOKS; i++) {
        if (ring_drain(sum)) {
            return false;
        }
        work_pause();
    }
    __atomic_store_n(&ring.armed, 1, __ATOMIC_RELAXED);
    syscall(SYS_membarrier, MEMBARRIER_CMD_PRIVATE_EXPEDITED, 0, 0);
    if (ring_drain(sum)) {
        __atomic_store_n(&ring.armed, 0, __ATOMIC_RELAXED);
        return false;
    }
    return true;
}

static void ring_open(const work_order *order)
{
    int ends[2];
    if (strcmp(order->kind, "pipe") == 0) {
        if (pipe2(ends, O_NONBLOCK | O_CLOEXEC) != 0) {
            work_fail("no pipe");
        }
        ring.wait_fd = ends[0];
        ring.wake_fd = ends[1];
    } else {
        ring.wait_fd = ring.wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    }
    syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED, 0, 0);
}

static work_figures work(const work_order *order)
{
    bool arms = strcmp(order->kind, "armed") == 0;
    work_seat seat;
    work_crew crew = {order, NULL, NULL, 0, 0, 0};
    looped_sum sum = {0, 0};
    struct epoll_event event;
    uint64_t waits = 0;
    work_clock clock;
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    ring_open(order);
    memset(&event, 0, sizeof event);
    event.events = EPOLLIN;
    epoll_ctl(epoll, EPOLL_CTL_ADD, ring.wait_fd, &event);
    work_hire(&crew, &seat, 1, arms ? produce_armed : produce_each);
    work_pin(1);
    clock = work_go(&crew, 1);
    while (sum.count < order->count) {
        char taken[4096];
        if (arms && !ring_arm(&sum)) {
            continue;
        }
        if (epoll_wait(epoll, &event, 1, -1) == 1) {
            waits++;
            if (read(ring.wait_fd, taken, sizeof taken) < 0) {
                work_fail("loop: read");
            }
        }
        (void)ring_drain(&sum);
    }
    return looped_end(&clock, order, &seat, &sum, waits);
}

static const work_entry entries[] = {{"eventfd", work}, {"pipe", work}, {"armed", work}};

int main(int argc, char **argv)
{
    return work_main(argc, argv, entries, sizeof entries / sizeof entries[0]);
}
