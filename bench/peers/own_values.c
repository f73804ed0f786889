/* Workers of our own making, without the library, for the channels of single values.
   SPDX-License-Identifier: MIT

   Items, COUNT being what is counted:
       once    create, send and receive on one thread: "malloc" (the least that a value on the heap
               costs), "mutex" (a slot with a mutex and a condvar)
       call    A clients ask one server, COUNT requests: "mutex" (a bounded queue and slots)
       cast    A receivers, B bytes, C: 0 one thread, 1 a sending thread and one that serves all
               receivers; COUNT values: "seqlock" (the limit), "seqlock-call" (the same by calls,
               as to a library), "mutex" (one for each place)
       set, get, changed, get-contended (another thread sets without a pause)
               a shared value of B bytes: "seqlock" (the limit), "seqlock-call", "mutex",
               "rwlock"                                                                        */
#include "worker.h"

#define RING 1024
#define WINDOW (RING / 2)
#define QUEUED 1024

/* ---- once ---- */

static work_figures once_malloc(const work_order *order)
{
    work_clock clock;
    uint64_t i;
    work_pin(1);
    clock = work_start();
    for (i = 0; i < order->count; i++) {
        void *block = malloc(64);
        __asm__ volatile("" ::"r"(block) : "memory");
        free(block);
    }
    return work_stop(&clock);
}

typedef struct slot {
    pthread_mutex_t lock;
    pthread_cond_t filled;
    bool is_filled;
    uint64_t value;
} slot;

static void slot_init(slot *self)
{
    pthread_mutex_init(&self->lock, NULL);
    pthread_cond_init(&self->filled, NULL);
    self->is_filled = false;
}

static void slot_deinit(slot *self)
{
    pthread_mutex_destroy(&self->lock);
    pthread_cond_destroy(&self->filled);
}

/* Signals before it unlocks: afterwards the slot may be gone. */
static void slot_send(slot *self, uint64_t value)
{
    pthread_mutex_lock(&self->lock);
    self->value = value;
    self->is_filled = true;
    pthread_cond_signal(&self->filled);
    pthread_mutex_unlock(&self->lock);
}

static uint64_t slot_receive(slot *self)
{
    pthread_mutex_lock(&self->lock);
    while (!self->is_filled) {
        pthread_cond_wait(&self->filled, &self->lock);
    }
    pthread_mutex_unlock(&self->lock);
    return self->value;
}

static work_figures once_mutex(const work_order *order)
{
    work_clock clock;
    uint64_t sum = 0;
    uint64_t i;
    work_pin(1);
    clock = work_start();
    for (i = 0; i < order->count; i++) {
        slot made;
        slot_init(&made);
        slot_send(&made, i);
        sum += slot_receive(&made) - i;
        slot_deinit(&made);
    }
    if (sum != 0) {
        work_fail("once: another value came out");
    }
    return work_stop(&clock);
}

/* ---- call ---- */

typedef struct request {
    uint64_t value;
    slot *reply;
} request;

static struct {
    pthread_mutex_t lock;
    pthread_cond_t filled;
    pthread_cond_t emptied;
    request queued[QUEUED];
    size_t head;
    size_t tail;
} requests = {PTHREAD_MUTEX_INITIALIZER,
              PTHREAD_COND_INITIALIZER,
              PTHREAD_COND_INITIALIZER,
              {{0, NULL}},
              0,
              0};

static uint32_t *call_ns;

static void call_send(const request *asked)
{
    pthread_mutex_lock(&requests.lock);
    while (requests.head - requests.tail == QUEUED) {
        pthread_cond_wait(&requests.emptied, &requests.lock);
    }
    requests.queued[requests.head++ % QUEUED] = *asked;
    pthread_mutex_unlock(&requests.lock);
    pthread_cond_signal(&requests.filled);
}

static request call_receive(void)
{
    request asked;
    bool was_full;
    pthread_mutex_lock(&requests.lock);
    while (requests.head == requests.tail) {
        pthread_cond_wait(&requests.filled, &requests.lock);
    }
    was_full = requests.head - requests.tail == QUEUED;
    asked = requests.queued[requests.tail++ % QUEUED];
    pthread_mutex_unlock(&requests.lock);
    if (was_full) {
        pthread_cond_broadcast(&requests.emptied);
    }
    return asked;
}

static void *call_client(void *at)
{
    work_seat *seat = (work_seat *)at;
    work_crew *crew = seat->crew;
    uint32_t *ns = call_ns + (uint64_t)seat->index * crew->each;
    uint64_t last;
    uint64_t i;
    if (crew->order->a == 1) {
        work_pin(1);
    }
    work_ready(crew);
    last = work_now_ns();
    for (i = 0; i < crew->each; i++) {
        slot reply;
        request asked = {i, &reply};
        uint64_t now;
        slot_init(&reply);
        call_send(&asked);
        if (slot_receive(&reply) != i + 1) {
            work_fail("call: the answer to something else");
        }
        slot_deinit(&reply);
        now = work_now_ns();
        ns[i] = (uint32_t)(now - last);
        last = now;
    }
    return NULL;
}

static work_figures call_mutex(const work_order *order)
{
    work_seat seats[WORK_SEATS];
    work_crew crew = {order, NULL, NULL, order->count / (uint64_t)order->a, 0, 0};
    uint64_t total = crew.each * (uint64_t)order->a;
    uint64_t i;
    work_clock clock;
    work_figures figures;
    call_ns = (uint32_t *)malloc((total + 1) * sizeof *call_ns);
    work_hire(&crew, seats, order->a, call_client);
    if (order->a == 1) {
        work_pin(0);
    }
    clock = work_go(&crew, (int)order->a);
    for (i = 0; i < total; i++) {
        request asked = call_receive();
        slot_send(asked.reply, asked.value + 1);
    }
    work_dismiss(seats, order->a);
    figures = work_stop(&clock);
    work_percentiles(call_ns, total, &figures);
    return figures;
}

/* ---- cast ---- */

/* A place of the ring: its value's number plus one, 0 while it is written. */
typedef struct place {
    uint64_t number;
    uint64_t words[2];
} place;

typedef struct locked_place {
    pthread_mutex_t lock;
    place at;
} locked_place;

static place cast_ring[RING];
static locked_place cast_locked[RING];
static pthread_mutex_t cast_tail = PTHREAD_MUTEX_INITIALIZER;
static uint64_t cast_sent WORK_ALIGNED;
static uint64_t cast_done WORK_ALIGNED;

WORK_INLINE void cast_send(uint64_t number, size_t words)
{
    place *at = &cast_ring[number % RING];
    size_t i;
    __atomic_store_n(&at->number, 0, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_RELEASE);
    for (i = 0; i < words; i++) {
        __atomic_store_n(&at->words[i], number, __ATOMIC_RELAXED);
    }
    __atomic_store_n(&at->number, number + 1, __ATOMIC_RELEASE);
}

/* False: not there (or, which the pacing rules out, no more). */
WORK_INLINE bool cast_receive(uint64_t number, size_t words, uint64_t *out)
{
    place *at = &cast_ring[number % RING];
    size_t i;
    if (__atomic_load_n(&at->number, __ATOMIC_ACQUIRE) != number + 1) {
        return false;
    }
    for (i = 0; i < words; i++) {
        out[i] = __atomic_load_n(&at->words[i], __ATOMIC_RELAXED);
    }
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    return __atomic_load_n(&at->number, __ATOMIC_RELAXED) == number + 1;
}

/* As a library has them: somewhere else, for any size. */
static __attribute__((noinline)) void cast_send_call(uint64_t number, size_t words)
{
    __asm__ volatile("" : "+r"(words));
    cast_send(number, words);
}

static __attribute__((noinline)) bool cast_receive_call(uint64_t number, size_t words,
                                                        uint64_t *out)
{
    __asm__ volatile("" : "+r"(words));
    return cast_receive(number, words, out);
}

typedef struct cast_ops {
    void (*send)(uint64_t number, size_t words);
    bool (*receive)(uint64_t number, size_t words, uint64_t *out);
} cast_ops;

static const cast_ops cast_inlined = {cast_send, cast_receive};
static const cast_ops cast_called = {cast_send_call, cast_receive_call};

WORK_INLINE work_figures cast_same(const work_order *order, const cast_ops *ops, size_t words)
{
    uint64_t *cursors = (uint64_t *)calloc((size_t)order->a, sizeof *cursors);
    uint64_t out[2] = {0, 0};
    uint64_t sum = 0;
    uint64_t sent = 0;
    uint64_t i;
    long receiver;
    work_clock clock;
    work_pin(1);
    clock = work_start();
    while (sent < order->count) {
        for (i = 0; i < WINDOW; i++) {
            ops->send(sent++, words);
        }
        for (receiver = 0; receiver < order->a; receiver++) {
            for (i = 0; i < WINDOW; i++) {
                if (!ops->receive(cursors[receiver]++, words, out)) {
                    work_fail("cast: lost");
                }
                sum += out[0];
            }
        }
    }
    __asm__ volatile("" ::"r"(sum));
    return work_stop(&clock);
}

WORK_INLINE void *cast_produce(const cast_ops *ops, size_t words, void *at)
{
    work_crew *crew = ((work_seat *)at)->crew;
    uint64_t i;
    work_pin(0);
    work_ready(crew);
    for (i = 0; i < crew->order->count; i++) {
        unsigned turns = 0;
        while (i - __atomic_load_n(&cast_done, __ATOMIC_ACQUIRE) >= RING) {
            work_back_off(&turns);
        }
        ops->send(i, words);
        if (i % 16 == 15) {
            __atomic_store_n(&cast_sent, i + 1, __ATOMIC_RELEASE);
        }
    }
    __atomic_store_n(&cast_sent, crew->order->count, __ATOMIC_RELEASE);
    return NULL;
}

WORK_INLINE work_figures cast_cross(const work_order *order, const cast_ops *ops, size_t words,
                                    void *(*produce)(void *))
{
    work_seat seat;
    work_crew crew = {order, NULL, NULL, 0, 0, 0};
    uint64_t out[2] = {0, 0};
    uint64_t sum = 0;
    uint64_t done = 0;
    uint64_t i;
    long receiver;
    work_clock clock;
    work_figures figures;
    work_hire(&crew, &seat, 1, produce);
    work_pin(1);
    clock = work_go(&crew, 1);
    while (done < order->count) {
        unsigned turns = 0;
        uint64_t sent;
        while ((sent = __atomic_load_n(&cast_sent, __ATOMIC_ACQUIRE)) == done) {
            work_back_off(&turns);
        }
        for (receiver = 0; receiver < order->a; receiver++) {
            for (i = done; i < sent; i++) {
                if (!ops->receive(i, words, out)) {
                    work_fail("cast: lost");
                }
                sum += out[0];
            }
        }
        done = sent;
        __atomic_store_n(&cast_done, done, __ATOMIC_RELEASE);
    }
    figures = work_stop(&clock);
    __asm__ volatile("" ::"r"(sum));
    work_dismiss(&seat, 1);
    return figures;
}

#define CAST(name)                                                                          \
    static void *name##_produce_8(void *at)                                                 \
    {                                                                                       \
        return cast_produce(&name, 1, at);                                                  \
    }                                                                                       \
    static void *name##_produce_16(void *at)                                                \
    {                                                                                       \
        return cast_produce(&name, 2, at);                                                  \
    }                                                                                       \
    static work_figures name##_work(const work_order *order)                                \
    {                                                                                       \
        if (order->c == 0) {                                                                \
            return order->b == 8 ? cast_same(order, &name, 1) : cast_same(order, &name, 2); \
        }                                                                                   \
        return order->b == 8 ? cast_cross(order, &name, 1, name##_produce_8)                \
                             : cast_cross(order, &name, 2, name##_produce_16);              \
    }
CAST(cast_inlined)
CAST(cast_called)

static work_figures cast_mutex(const work_order *order)
{
    uint64_t *cursors = (uint64_t *)calloc((size_t)order->a, sizeof *cursors);
    size_t bytes = (size_t)order->b;
    uint64_t sum = 0;
    uint64_t sent = 0;
    uint64_t i;
    long receiver;
    work_clock clock;
    for (i = 0; i < RING; i++) {
        pthread_mutex_init(&cast_locked[i].lock, NULL);
    }
    work_pin(1);
    clock = work_start();
    while (sent < order->count) {
        for (i = 0; i < WINDOW; i++) {
            locked_place *to = &cast_locked[sent % RING];
            uint64_t value[2] = {sent, sent};
            pthread_mutex_lock(&cast_tail);
            pthread_mutex_lock(&to->lock);
            to->at.number = ++sent;
            memcpy(to->at.words, value, bytes);
            pthread_mutex_unlock(&to->lock);
            pthread_mutex_unlock(&cast_tail);
        }
        for (receiver = 0; receiver < order->a; receiver++) {
            for (i = 0; i < WINDOW; i++) {
                uint64_t number = cursors[receiver]++;
                locked_place *from = &cast_locked[number % RING];
                uint64_t out[2];
                pthread_mutex_lock(&from->lock);
                if (from->at.number != number + 1) {
                    work_fail("cast: lost");
                }
                memcpy(out, from->at.words, bytes);
                pthread_mutex_unlock(&from->lock);
                sum += out[0];
            }
        }
    }
    __asm__ volatile("" ::"r"(sum));
    return work_stop(&clock);
}

/* ---- a shared value ---- */

typedef struct shared_value {
    uint64_t version; /* odd while it is written */
    uint64_t words[8];
} shared_value;

static shared_value shared WORK_ALIGNED;
static pthread_mutex_t shared_mutex WORK_ALIGNED = PTHREAD_MUTEX_INITIALIZER;
static pthread_rwlock_t shared_rwlock WORK_ALIGNED = PTHREAD_RWLOCK_INITIALIZER;
static int shared_stop WORK_ALIGNED;

typedef struct shared_ops {
    void (*set)(const uint64_t *words, size_t count);
    void (*get)(uint64_t *words, size_t count);
} shared_ops;

WORK_INLINE void seqlock_set(const uint64_t *words, size_t count)
{
    uint64_t version = __atomic_load_n(&shared.version, __ATOMIC_RELAXED);
    size_t i;
    __atomic_store_n(&shared.version, version + 1, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_RELEASE);
    for (i = 0; i < count; i++) {
        __atomic_store_n(&shared.words[i], words[i], __ATOMIC_RELAXED);
    }
    __atomic_store_n(&shared.version, version + 2, __ATOMIC_RELEASE);
}

WORK_INLINE void seqlock_get(uint64_t *words, size_t count)
{
    uint64_t before;
    uint64_t after;
    do {
        size_t i;
        before = __atomic_load_n(&shared.version, __ATOMIC_ACQUIRE);
        for (i = 0; i < count; i++) {
            words[i] = __atomic_load_n(&shared.words[i], __ATOMIC_RELAXED);
        }
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        after = __atomic_load_n(&shared.version, __ATOMIC_RELAXED);
    } while (before % 2 != 0 || before != after);
}

static __attribute__((noinline)) void called_set(const uint64_t *words, size_t count)
{
    __asm__ volatile("" : "+r"(count));
    seqlock_set(words, count);
}

static __attribute__((noinline)) void called_get(uint64_t *words, size_t count)
{
    __asm__ volatile("" : "+r"(count));
    seqlock_get(words, count);
}

WORK_INLINE void mutex_set(const uint64_t *words, size_t count)
{
    pthread_mutex_lock(&shared_mutex);
    shared.version++;
    memcpy(shared.words, words, count * sizeof *words);
    pthread_mutex_unlock(&shared_mutex);
}

WORK_INLINE void mutex_get(uint64_t *words, size_t count)
{
    pthread_mutex_lock(&shared_mutex);
    memcpy(words, shared.words, count * sizeof *words);
    pthread_mutex_unlock(&shared_mutex);
}

WORK_INLINE void rwlock_set(const uint64_t *words, size_t count)
{
    pthread_rwlock_wrlock(&shared_rwlock);
    shared.version++;
    memcpy(shared.words, words, count * sizeof *words);
    pthread_rwlock_unlock(&shared_rwlock);
}

WORK_INLINE void rwlock_get(uint64_t *words, size_t count)
{
    pthread_rwlock_rdlock(&shared_rwlock);
    memcpy(words, shared.words, count * sizeof *words);
    pthread_rwlock_unlock(&shared_rwlock);
}

WORK_INLINE void *shared_write(const shared_ops *ops, size_t count, void *at)
{
    uint64_t words[8];
    uint64_t i;
    work_pin(0);
    work_ready(((work_seat *)at)->crew);
    for (i = 0; __atomic_load_n(&shared_stop, __ATOMIC_RELAXED) == 0; i++) {
        work_fill(words, count * 8, i);
        ops->set(words, count);
    }
    return NULL;
}

WORK_INLINE work_figures shared_work(const shared_ops *ops, size_t count, void *(*writer)(void *),
                                     const work_order *order)
{
    bool contended = strcmp(order->item, "get-contended") == 0;
    work_crew crew = {order, NULL, NULL, 0, 0, 0};
    work_seat seat;
    uint64_t words[8];
    uint64_t i;
    work_clock clock;
    work_figures figures;
    work_pin(1);
    if (contended) {
        work_hire(&crew, &seat, 1, writer);
        clock = work_go(&crew, 1);
        do { /* until the writer is at it */
            ops->get(words, count);
        } while (words[0] == 0);
    }
    clock = work_start();
    if (strcmp(order->item, "set") == 0) {
        for (i = 0; i < order->count; i++) {
            work_fill(words, count * 8, i);
            ops->set(words, count);
            __asm__ volatile("" ::: "memory");
        }
    } else if (strcmp(order->item, "changed") == 0) {
        uint64_t seen = 0;
        for (i = 0; i < order->count; i++) {
            seen += __atomic_load_n(&shared.version, __ATOMIC_ACQUIRE) != 0;
            __asm__ volatile("" ::"r"(seen) : "memory");
        }
    } else {
        for (i = 0; i < order->count; i++) {
            ops->get(words, count);
            __asm__ volatile("" ::"r"(words) : "memory");
        }
    }
    figures = work_stop(&clock);
    if (contended) {
        __atomic_store_n(&shared_stop, 1, __ATOMIC_RELAXED);
        work_dismiss(&seat, 1);
    }
    return figures;
}

#define SHARED(name)                                                                \
    static const shared_ops name##_ops = {name##_set, name##_get};                  \
    static void *name##_write_8(void *at)                                           \
    {                                                                               \
        return shared_write(&name##_ops, 1, at);                                    \
    }                                                                               \
    static void *name##_write_64(void *at)                                          \
    {                                                                               \
        return shared_write(&name##_ops, 8, at);                                    \
    }                                                                               \
    static work_figures name##_shared(const work_order *order)                      \
    {                                                                               \
        return order->b == 8 ? shared_work(&name##_ops, 1, name##_write_8, order)   \
                             : shared_work(&name##_ops, 8, name##_write_64, order); \
    }
SHARED(seqlock)
SHARED(called)
SHARED(mutex)
SHARED(rwlock)

static work_figures by_item_seqlock(const work_order *order)
{
    return strcmp(order->item, "cast") == 0 ? cast_inlined_work(order) : seqlock_shared(order);
}

static work_figures by_item_called(const work_order *order)
{
    return strcmp(order->item, "cast") == 0 ? cast_called_work(order) : called_shared(order);
}

static work_figures by_item_mutex(const work_order *order)
{
    if (strcmp(order->item, "once") == 0) {
        return once_mutex(order);
    }
    if (strcmp(order->item, "call") == 0) {
        return call_mutex(order);
    }
    return strcmp(order->item, "cast") == 0 ? cast_mutex(order) : mutex_shared(order);
}

static const work_entry entries[] = {{"malloc", once_malloc},
                                     {"seqlock", by_item_seqlock},
                                     {"seqlock-call", by_item_called},
                                     {"mutex", by_item_mutex},
                                     {"rwlock", rwlock_shared}};

int main(int argc, char **argv)
{
    return work_main(argc, argv, entries, sizeof entries / sizeof entries[0]);
}
