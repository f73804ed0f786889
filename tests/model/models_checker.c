/* Models of the checker itself: programs of a few lines whose outcomes the C11 memory model tells,
   and programs with one fault of each kind. `x` and `y` are atomic, `plain` is not.            */
#include "environment.h"
#include "families.h"

#include <stdio.h>
#include <string.h>

#include "model_atomics.h"

static struct cells {
    uint32_t x;
    uint32_t y;
    uint32_t plain;
    uint32_t parked;
    model_mutex mutex;
    model_mutex other;
} * now;

static uint32_t seen[4];

static void before(void)
{
    now = (struct cells *)model_alloc(NULL, NULL, 0, sizeof *now);
    memset(now, 0, sizeof *now);
    memset(seen, 0, sizeof seen);
    model_mutex_init(&now->mutex);
    model_mutex_init(&now->other);
}

static void after(void)
{
    model_outcome(seen[0] + 2 * seen[1] + 4 * seen[2] + 8 * seen[3]);
    model_mutex_deinit(&now->mutex);
    model_mutex_deinit(&now->other);
    (void)model_alloc(NULL, now, sizeof *now, 0);
}

/* ---- what is allowed ---- */

static void buffers(unsigned self)
{
    uint32_t *mine = self == 0 ? &now->x : &now->y;
    uint32_t *other = self == 0 ? &now->y : &now->x;
    VKP_I_STORE_REL(mine, 1u);
    seen[self] = VKP_I_LOAD_ACQ(other);
}

static void buffers_seq(unsigned self)
{
    uint32_t *mine = self == 0 ? &now->x : &now->y;
    uint32_t *other = self == 0 ? &now->y : &now->x;
    VKP_I_STORE_SEQ(mine, 1u);
    seen[self] = VKP_I_LOAD_SEQ(other);
}

static void buffers_barrier(unsigned self)
{
    uint32_t *mine = self == 0 ? &now->x : &now->y;
    uint32_t *other = self == 0 ? &now->y : &now->x;
    VKP_I_STORE(mine, 1u);
    if (self == 0) {
        model_barrier();
    }
    seen[self] = VKP_I_LOAD(other);
}

/* Both change one word after their store: one of them sees the other's store. */
static void buffers_meet(unsigned self)
{
    if (self == 0) {
        VKP_I_STORE_REL(&now->x, 1u);
        seen[0] = VKP_I_ADD_ACQ_REL(&now->y, 0u);
    } else {
        (void)VKP_I_OR(&now->y, 1u);
        seen[1] = VKP_I_LOAD(&now->x);
    }
}

static void message(unsigned self)
{
    if (self == 0) {
        VKP_I_STORE(&now->x, 1u);
        VKP_I_STORE_REL(&now->y, 1u);
    } else {
        seen[0] = VKP_I_LOAD_ACQ(&now->y);
        seen[1] = VKP_I_LOAD(&now->x);
    }
}

static void message_relaxed(unsigned self)
{
    if (self == 0) {
        VKP_I_STORE(&now->x, 1u);
        VKP_I_STORE(&now->y, 1u);
    } else {
        seen[0] = VKP_I_LOAD_ACQ(&now->y);
        seen[1] = VKP_I_LOAD(&now->x);
    }
}

/* A relaxed RMW hands on what the release before it released; a relaxed store does not. */
static void message_by_way_of(unsigned self, bool rmw)
{
    uint32_t one = 1;
    if (self == 0) {
        VKP_I_STORE(&now->x, 1u);
        VKP_I_STORE_REL(&now->y, 1u);
    } else if (self == 1) {
        if (rmw) {
            (void)VKP_I_ADD(&now->y, 2u);
        } else if (VKP_I_LOAD(&now->y) == one) {
            VKP_I_STORE(&now->y, 3u);
        }
    } else {
        seen[0] = VKP_I_LOAD_ACQ(&now->y) == 3;
        seen[1] = VKP_I_LOAD(&now->x);
    }
}

static void message_by_rmw(unsigned self)
{
    message_by_way_of(self, true);
}

static void message_by_store(unsigned self)
{
    message_by_way_of(self, false);
}

/* One place never goes back. */
static void coherence(unsigned self)
{
    if (self == 0) {
        VKP_I_STORE(&now->x, 1u);
    } else {
        seen[0] = VKP_I_LOAD(&now->x);
        seen[1] = VKP_I_LOAD(&now->x);
    }
}

static void count(unsigned self)
{
    uint32_t old = VKP_I_ADD(&now->x, 1u);
    seen[self] = old;
}

static void two_writers(unsigned self)
{
    if (self < 2) {
        VKP_I_STORE_REL(self == 0 ? &now->x : &now->y, 1u);
    } else {
        uint32_t *first = self == 2 ? &now->x : &now->y;
        uint32_t *second = self == 2 ? &now->y : &now->x;
        seen[2 * self - 4] = VKP_I_LOAD_ACQ(first);
        seen[2 * self - 3] = VKP_I_LOAD_ACQ(second);
    }
}

/* ---- what is a failure ---- */

static void race(unsigned self)
{
    if (self == 0) {
        now->plain = 1;
        VKP_I_STORE(&now->x, 1u);
    } else if (VKP_I_LOAD_ACQ(&now->x) == 1) {
        seen[0] = now->plain;
    }
}

static void race_mended(unsigned self)
{
    if (self == 0) {
        now->plain = 1;
        VKP_I_STORE_REL(&now->x, 1u);
    } else if (VKP_I_LOAD_ACQ(&now->x) == 1) {
        seen[0] = now->plain;
    }
}

static void race_copied(unsigned self)
{
    uint64_t bytes[2] = {self, self};
    VKP_I_COPY_IN(now, bytes, 8);
}

static void locked(unsigned self)
{
    VKP_I_LOCK(&now->mutex);
    now->plain += self + 1;
    VKP_I_UNLOCK(&now->mutex);
}

static void after_locked(void)
{
    MODEL_CHECK(now->plain == 3);
    after();
}

static void deadlock(unsigned self)
{
    VKP_I_LOCK(self == 0 ? &now->mutex : &now->other);
    VKP_I_LOCK(self == 0 ? &now->other : &now->mutex);
    VKP_I_UNLOCK(&now->mutex);
    VKP_I_UNLOCK(&now->other);
}

/* The sleeper looks before it says that it sleeps. */
static void lost(unsigned self)
{
    if (self == 0) {
        VKP_I_STORE_SEQ(&now->x, 1u);
        if (VKP_I_LOAD_SEQ(&now->y) == 1) {
            VKP_I_STORE_REL(&now->parked, 1u);
            model_wake((uintptr_t)&now->parked);
        }
    } else if (VKP_I_LOAD_SEQ(&now->x) == 0) {
        VKP_I_STORE_SEQ(&now->y, 1u);
        (void)model_sleep((uintptr_t)&now->parked, 0, VKP_FOREVER);
    }
}

static void timed(unsigned self)
{
    if (self == 0) {
        VKP_I_STORE_REL(&now->parked, 1u);
        model_wake((uintptr_t)&now->parked);
    } else {
        seen[0] = model_sleep((uintptr_t)&now->parked, 0, 1000);
        seen[1] = model_clock_ns() >= 1000;
    }
}

static void freed(unsigned self)
{
    static void *block;
    if (self == 0) {
        block = model_alloc(NULL, NULL, 0, 64);
        (void)model_alloc(NULL, block, 64, 0);
        VKP_I_STORE_REL(&now->x, 1u);
    } else if (VKP_I_LOAD_ACQ(&now->x) == 1) {
        memset(block, 0, 8);
    }
}

static void freed_in_use(unsigned self)
{
    static void *block;
    if (self == 0) {
        block = model_alloc(NULL, NULL, 0, 64);
        VKP_I_STORE_REL(&now->x, 1u);
        (void)model_alloc(NULL, block, 64, 0);
    } else if (VKP_I_LOAD_ACQ(&now->x) == 1) {
        memset(block, 0, 8);
    }
}

static void beyond(unsigned self)
{
    char *block = (char *)model_alloc(NULL, NULL, 0, 40);
    memset(block, 0, self == 0 ? 40 : 41);
    (void)model_alloc(NULL, block, 40, 0);
}

static void leak(unsigned self)
{
    if (self == 0) {
        VKP_I_STORE(&now->x, 1u);
    } else if (VKP_I_LOAD(&now->x) == 1) {
        (void)model_alloc(NULL, NULL, 0, 8);
    }
}

static void spin(unsigned self)
{
    while (self == 1 && VKP_I_LOAD(&now->x) == 0) {
        VKP_I_PAUSE();
    }
}

static void spin_mended(unsigned self)
{
    if (self == 0) {
        VKP_I_STORE(&now->x, 1u);
    }
    spin(self);
}

static void add(const char *name, unsigned threads, void (*thread)(unsigned), const char *fails,
                uint64_t outcomes)
{
    struct model model = {.before = before, .thread = thread, .preemptions = 3, .stale = 2};
    snprintf(model.name, sizeof model.name, "checker %s", name);
    model.after = thread == locked ? after_locked : after;
    model.threads = threads;
    model.fails = fails;
    model.outcomes = outcomes;
    model_add(&model);
}

void checker_models(void)
{
    add("store buffers", 2, buffers, NULL, 0xf);
    add("store buffers, seq", 2, buffers_seq, NULL, 0xe);
    add("store buffers, membarrier", 2, buffers_barrier, NULL, 0xe);
    add("store buffers, one word", 2, buffers_meet, NULL, 0xe);
    add("message", 2, message, NULL, 0xd);
    add("message, relaxed", 2, message_relaxed, NULL, 0xf);
    add("message by a RMW", 3, message_by_rmw, NULL, 0xd);
    add("message by a store", 3, message_by_store, NULL, 0xf);
    add("coherence", 2, coherence, NULL, 0xd);
    add("count", 2, count, NULL, 0x6);
    add("two writers, two readers", 4, two_writers, NULL, 0xffff);
    add("locked", 2, locked, NULL, 0x1);
    add("race, mended", 2, race_mended, NULL, 0x3);
    add("spin, mended", 2, spin_mended, NULL, 0x1);
    add("deadline", 2, timed, NULL, 0x6);
    add("race", 2, race, "data race", 0);
    add("race of copies", 2, race_copied, "data race", 0);
    add("deadlock", 2, deadlock, "all threads wait for ever", 0);
    add("lost wake-up", 2, lost, "all threads wait for ever", 0);
    add("used after free", 2, freed, "memory used after it was freed", 0);
    add("freed in use", 2, freed_in_use, "", 0);
    add("beyond the end", 2, beyond, "memory of nobody", 0);
    add("leak", 2, leak, "never freed", 0);
    add("spin", 2, spin, "more than", 0);
}
