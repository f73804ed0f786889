/* Workers of our own making, without the library: the limits, and what people write by hand.
   SPDX-License-Identifier: MIT

       ring, ring32   one sender, one receiver, nobody ever sleeps; an index published for each
                      message, or for 32 (and before waiting)
       mutex          a ring (a growing one where unbounded) behind a mutex and two condvars that
                      are signalled when somebody waits
       flags          ping-pong: two words, on lines of their own, read until they change
       futex, eventfd ping-pong: the same with a sleep; Linux only
       condvar        ping-pong: a word behind a mutex and a condvar                           */
#include "worker.h"

#ifdef __linux__
#include <linux/futex.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#endif

/* ---- ring ---- */

typedef struct ring {
    size_t head WORK_ALIGNED;   /* written by the sender */
    size_t tail WORK_ALIGNED;   /* written by the receiver */
    size_t filled WORK_ALIGNED; /* the sender's own */
    size_t filled_published;
    size_t tail_seen;
    size_t taken WORK_ALIGNED; /* the receiver's own */
    size_t taken_published;
    size_t head_seen;
    size_t mask WORK_ALIGNED;
    size_t batch;
    char *slots;
} ring;

static ring *ring_make(const work_order *order, size_t batch)
{
    ring *made = (ring *)work_alloc(sizeof *made);
    size_t capacity = 1;
    while (capacity < (size_t)order->a) {
        capacity *= 2;
    }
    made->mask = capacity - 1;
    made->batch = batch < capacity / 2 ? batch : capacity / 2;
    made->slots = (char *)work_alloc(capacity * (size_t)order->b);
    return made;
}

static void *ring_open(const work_order *order)
{
    return ring_make(order, 1);
}

static void *ring32_open(const work_order *order)
{
    return ring_make(order, 32);
}

static void *same_sender(void *channel, long index)
{
    (void)index;
    return channel;
}

static void *same(void *channel)
{
    return channel;
}

static void nothing(void *sender)
{
    (void)sender;
}

WORK_INLINE void ring_publish_filled(ring *self)
{
    self->filled_published = self->filled;
    __atomic_store_n(&self->head, self->filled, __ATOMIC_RELEASE);
}

WORK_INLINE void ring_publish_taken(ring *self)
{
    self->taken_published = self->taken;
    __atomic_store_n(&self->tail, self->taken, __ATOMIC_RELEASE);
}

static __attribute__((noinline)) void ring_wait_room(ring *self)
{
    unsigned turns = 0;
    ring_publish_filled(self);
    for (;;) {
        self->tail_seen = __atomic_load_n(&self->tail, __ATOMIC_ACQUIRE);
        if (self->filled - self->tail_seen <= self->mask) {
            return;
        }
        work_back_off(&turns);
    }
}

static __attribute__((noinline)) void ring_wait_message(ring *self)
{
    unsigned turns = 0;
    if (self->taken_published != self->taken) {
        ring_publish_taken(self);
    }
    for (;;) {
        self->head_seen = __atomic_load_n(&self->head, __ATOMIC_ACQUIRE);
        if (self->head_seen != self->taken) {
            return;
        }
        work_back_off(&turns);
    }
}

WORK_INLINE void ring_send(void *sender, const void *message, size_t bytes)
{
    ring *self = (ring *)sender;
    if (self->filled - self->tail_seen > self->mask) {
        ring_wait_room(self);
    }
    memcpy(self->slots + (self->filled & self->mask) * bytes, message, bytes);
    self->filled++;
    if (self->filled - self->filled_published >= self->batch) {
        ring_publish_filled(self);
    }
}

WORK_INLINE void ring_receive(void *receiver, void *message, size_t bytes)
{
    ring *self = (ring *)receiver;
    if (self->taken == self->head_seen) {
        ring_wait_message(self);
    }
    memcpy(message, self->slots + (self->taken & self->mask) * bytes, bytes);
    self->taken++;
    if (self->taken - self->taken_published >= self->batch) {
        ring_publish_taken(self);
    }
}

static void ring_end(void *sender)
{
    ring_publish_filled((ring *)sender);
}

static const work_channel ring_each = {ring_open, same_sender,  same,
                                       ring_send, ring_receive, ring_end};
static const work_channel ring_many = {ring32_open, same_sender,  same,
                                       ring_send,   ring_receive, ring_end};
WORK_CHANNEL(ring_each)
WORK_CHANNEL(ring_many)

/* ---- mutex and condvar ---- */

typedef struct locked {
    pthread_mutex_t lock;
    pthread_cond_t filled;
    pthread_cond_t emptied;
    size_t limit; /* 0: grows */
    size_t room;  /* a power of two */
    size_t head;
    size_t tail;
    unsigned receivers_waiting;
    unsigned senders_waiting;
    char *slots;
} locked;

static void *locked_open(const work_order *order)
{
    locked *self = (locked *)calloc(1, sizeof *self);
    pthread_mutex_init(&self->lock, NULL);
    pthread_cond_init(&self->filled, NULL);
    pthread_cond_init(&self->emptied, NULL);
    self->limit = (size_t)order->a;
    self->room = 32;
    while (self->room < self->limit) {
        self->room *= 2;
    }
    self->slots = (char *)malloc(self->room * (size_t)order->b);
    return self;
}

/* Everything moves to the front of twice the room. */
static __attribute__((noinline)) void locked_grow(locked *self, size_t bytes)
{
    char *slots = (char *)malloc(2 * self->room * bytes);
    size_t start = self->tail & (self->room - 1);
    memcpy(slots, self->slots + start * bytes, (self->room - start) * bytes);
    memcpy(slots + (self->room - start) * bytes, self->slots, start * bytes);
    free(self->slots);
    self->slots = slots;
    self->head -= self->tail;
    self->tail = 0;
    self->room *= 2;
}

WORK_INLINE void locked_send(void *sender, const void *message, size_t bytes)
{
    locked *self = (locked *)sender;
    bool wake;
    pthread_mutex_lock(&self->lock);
    while (self->limit > 0 && self->head - self->tail >= self->limit) {
        self->senders_waiting++;
        pthread_cond_wait(&self->emptied, &self->lock);
        self->senders_waiting--;
    }
    if (self->head - self->tail == self->room) {
        locked_grow(self, bytes);
    }
    memcpy(self->slots + (self->head & (self->room - 1)) * bytes, message, bytes);
    self->head++;
    wake = self->receivers_waiting > 0;
    pthread_mutex_unlock(&self->lock);
    if (wake) {
        pthread_cond_signal(&self->filled);
    }
}

WORK_INLINE void locked_receive(void *receiver, void *message, size_t bytes)
{
    locked *self = (locked *)receiver;
    bool wake;
    pthread_mutex_lock(&self->lock);
    while (self->head == self->tail) {
        self->receivers_waiting++;
        pthread_cond_wait(&self->filled, &self->lock);
        self->receivers_waiting--;
    }
    memcpy(message, self->slots + (self->tail & (self->room - 1)) * bytes, bytes);
    self->tail++;
    wake = self->senders_waiting > 0;
    pthread_mutex_unlock(&self->lock);
    if (wake) {
        pthread_cond_signal(&self->emptied);
    }
}

static const work_channel locked_ring = {locked_open, same_sender,    same,
                                         locked_send, locked_receive, nothing};
WORK_CHANNEL(locked_ring)

/* ---- a word that one thread sets and another waits for ---- */

typedef struct word {
    uint64_t message WORK_ALIGNED; /* on the line of the word: one line goes over, not two */
    uint32_t set;
    int fd;
    pthread_mutex_t lock;
    pthread_cond_t changed;
} word;

static void *word_open(const work_order *order)
{
    word *self = (word *)work_alloc(sizeof *self);
    pthread_mutex_init(&self->lock, NULL);
    pthread_cond_init(&self->changed, NULL);
    self->fd = -1;
#ifdef __linux__
    if (strcmp(order->kind, "eventfd") == 0) {
        self->fd = eventfd(0, EFD_CLOEXEC);
    }
#else
    (void)order;
#endif
    return self;
}

WORK_INLINE void flags_send(void *sender, const void *message, size_t bytes)
{
    word *self = (word *)sender;
    (void)bytes;
    memcpy(&self->message, message, 8);
    __atomic_store_n(&self->set, 1, __ATOMIC_RELEASE);
}

WORK_INLINE void flags_receive(void *receiver, void *message, size_t bytes)
{
    word *self = (word *)receiver;
    (void)bytes;
    while (__atomic_load_n(&self->set, __ATOMIC_ACQUIRE) == 0) {
    }
    memcpy(message, &self->message, 8);
    __atomic_store_n(&self->set, 0, __ATOMIC_RELAXED);
}

static const work_channel flags = {word_open,  same_sender,   same,
                                   flags_send, flags_receive, nothing};
WORK_CHANNEL(flags)

WORK_INLINE void condvar_send(void *sender, const void *message, size_t bytes)
{
    word *self = (word *)sender;
    (void)bytes;
    memcpy(&self->message, message, 8);
    pthread_mutex_lock(&self->lock);
    self->set = 1;
    pthread_mutex_unlock(&self->lock);
    pthread_cond_signal(&self->changed);
}

WORK_INLINE void condvar_receive(void *receiver, void *message, size_t bytes)
{
    word *self = (word *)receiver;
    (void)bytes;
    pthread_mutex_lock(&self->lock);
    while (self->set == 0) {
        pthread_cond_wait(&self->changed, &self->lock);
    }
    self->set = 0;
    pthread_mutex_unlock(&self->lock);
    memcpy(message, &self->message, 8);
}

static const work_channel condvar = {word_open,    same_sender,     same,
                                     condvar_send, condvar_receive, nothing};
WORK_CHANNEL(condvar)

#ifdef __linux__
WORK_INLINE void futex_send(void *sender, const void *message, size_t bytes)
{
    word *self = (word *)sender;
    flags_send(sender, message, bytes);
    syscall(SYS_futex, &self->set, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

WORK_INLINE void futex_receive(void *receiver, void *message, size_t bytes)
{
    word *self = (word *)receiver;
    while (__atomic_load_n(&self->set, __ATOMIC_ACQUIRE) == 0) {
        syscall(SYS_futex, &self->set, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0);
    }
    flags_receive(receiver, message, bytes);
}

static const work_channel futex = {word_open,  same_sender,   same,
                                   futex_send, futex_receive, nothing};
WORK_CHANNEL(futex)

WORK_INLINE void eventfd_send(void *sender, const void *message, size_t bytes)
{
    word *self = (word *)sender;
    uint64_t one = 1;
    (void)bytes;
    memcpy(&self->message, message, 8);
    if (write(self->fd, &one, sizeof one) != (ssize_t)sizeof one) {
        work_fail("eventfd: write");
    }
}

WORK_INLINE void eventfd_receive(void *receiver, void *message, size_t bytes)
{
    word *self = (word *)receiver;
    uint64_t count;
    (void)bytes;
    if (read(self->fd, &count, sizeof count) != (ssize_t)sizeof count) {
        work_fail("eventfd: read");
    }
    memcpy(message, &self->message, 8);
}

static const work_channel eventfds = {word_open,    same_sender,     same,
                                      eventfd_send, eventfd_receive, nothing};
WORK_CHANNEL(eventfds)
#endif

static const work_entry entries[] = {
    {"ring", ring_each_work}, {"ring32", ring_many_work}, {"mutex", locked_ring_work},
    {"flags", flags_work},    {"condvar", condvar_work},
#ifdef __linux__
    {"futex", futex_work},    {"eventfd", eventfds_work},
#endif
};

int main(int argc, char **argv)
{
    return work_main(argc, argv, entries, sizeof entries / sizeof entries[0]);
}
