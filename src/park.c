/* ======================================================================================
   >>impl-park   The waiter: the one way to be woken
   ======================================================================================
   A waiter is a node that whoever waits links into the list of what it waits for. Whoever makes
   the condition true unlinks it and calls wake, both under the list's lock; so a waiter that is
   no longer linked when its owner takes the lock has been woken completely, and its memory may
   go. wake only unparks a thread or queues a task on a loop: no user code runs under a lock.
   Lock order: a channel's or token's lock, then what wake takes: a parker's, where there are no
   futexes (the loop's queue takes none). Latches: the senders', then a place's.               */

typedef struct vkp_i_waiter {
    struct vkp_i_waiter *prev; /* NULL when not linked */
    struct vkp_i_waiter *next;
    void (*wake)(struct vkp_i_waiter *waiter);
} vkp_i_waiter;

typedef struct vkp_i_waiters { /* a ring with this as its sentinel */
    vkp_i_waiter head;
} vkp_i_waiters;

static void vkp_i_waiters_init(vkp_i_waiters *list)
{
    list->head.prev = &list->head;
    list->head.next = &list->head;
    list->head.wake = NULL;
}

static bool vkp_i_waiters_empty(const vkp_i_waiters *list)
{
    return list->head.next == &list->head;
}

static void vkp_i_waiter_link(vkp_i_waiters *list, vkp_i_waiter *waiter)
{
    waiter->prev = list->head.prev;
    waiter->next = &list->head;
    list->head.prev->next = waiter;
    list->head.prev = waiter;
}

static bool vkp_i_waiter_unlink(vkp_i_waiter *waiter)
{
    if (waiter->prev == NULL) {
        return false;
    }
    waiter->prev->next = waiter->next;
    waiter->next->prev = waiter->prev;
    waiter->prev = NULL;
    waiter->next = NULL;
    return true;
}

static void vkp_i_waiters_wake_all(vkp_i_waiters *list)
{
    while (!vkp_i_waiters_empty(list)) {
        vkp_i_waiter *first = list->head.next;
        (void)vkp_i_waiter_unlink(first);
        first->wake(first);
    }
}

/* A wait for one thing: a thread has one per thing, all with its parker; a loop's watch has one. */
typedef struct vkp_i_wait {
    vkp_i_waiter node;
    const vkp_sys *sys; /* a thread's */
    vkp_parker *parker;
    const void *item; /* a sender's that waits for room, see vkp_i_lane_admit */
    size_t cost;
    vkp_status status;
    int wake_fd;   /* of a thread that sleeps in poll */
    uint32_t done; /* atomic: a one-shot woke it, and does not touch it any more */
} vkp_i_wait;

static void vkp_i_thread_wake(vkp_i_waiter *waiter)
{
    vkp_i_wait *self = VKP_CONTAINER(waiter, vkp_i_wait, node);
    self->sys->unpark(self->parker);
}

static void vkp_i_wait_init(vkp_i_wait *self, const vkp_sys *sys, vkp_parker *parker)
{
    memset(self, 0, sizeof *self);
    self->node.wake = vkp_i_thread_wake;
    self->sys = sys;
    self->parker = parker;
}

static bool vkp_i_parker_notified(vkp_parker *parker)
{
    return VKP_I_LOAD_ACQ(&parker->state) == VKP_I_PARK_NOTIFIED;
}

/* Gates. One side stores what the other waits for and then looks whether anybody waits; the other
   says that it waits and then looks for the store. One of them must see the other, and each does
   a store before a load, which processors swap. The side that is about to sleep pays for both
   with a barrier in every thread (membarrier); where there is none, each side changes the gate
   itself, which puts the two in an order.                                                     */

/* The storing side, after its store: the bits of those who wait. */
static inline uint32_t vkp_i_flag_check(uint32_t *gate, bool fenced)
{
    if (fenced) {
        return VKP_I_ADD_ACQ_REL(gate, 0u);
    }
    VKP_I_ORDER();
    return VKP_I_LOAD(gate);
}

/* The waiting side: open, settle, and then look. */
static void vkp_i_flag_raise(uint32_t *gate, uint32_t bit)
{
    (void)VKP_I_OR(gate, bit);
}

static void vkp_i_flag_fence(const vkp_env *env, bool fenced)
{
    if (!fenced) {
        (void)vkp_i_sys(env)->membarrier(false);
    }
}

static void vkp_i_flag_lower(uint32_t *gate, uint32_t bit)
{
    (void)VKP_I_AND(gate, ~bit);
}

/* Whether gates have to do without membarrier. */
static bool vkp_i_flag_prepare(const vkp_env *env)
{
    return vkp_i_sys(env)->membarrier(true) < 0;
}

/* Waiting awake: a wake-up costs microseconds, and a value is often closer than that. */
typedef struct vkp_i_spin {
    uint32_t pauses;
    uint32_t yields;
} vkp_i_spin;

#define VKP_I_SPINS 200u
#define VKP_I_YIELDS 8u

/* How long threads of this env stay awake, in pauses. */
static uint32_t vkp_i_spins(const vkp_env *env)
{
    if (env->spins == 0) {
        return vkp_i_sys(env)->processors() > 1 ? VKP_I_SPINS : 0;
    }
    return env->spins == VKP_SPINS_NONE ? 0 : env->spins;
}

/* Pause, later yield to threads that have no processor; false when it is time to sleep. */
static inline bool vkp_i_spin_again(vkp_i_spin *spin, const vkp_sys *sys, uint32_t spins)
{
    if (spin->pauses < spins) {
        spin->pauses++;
        VKP_I_PAUSE();
        return true;
    }
    if (spins > 0 && spin->yields < VKP_I_YIELDS) {
        spin->yields++;
        sys->yield();
        return true;
    }
    return false;
}

/* What a thread or a loop can wait for: a vkp_case of one of these kinds. All waiting of the
   library but that of plain senders goes through them: look (attempt), say that one waits (join),
   sleep, look again, and leave.                                                                */
struct vkp_i_case_kind {
    /* Carry it out: EMPTY when that is not possible now. `wait` is the joined one, or NULL. */
    vkp_status (*attempt)(vkp_case *each, vkp_i_wait *wait);
    bool (*is_ready)(const vkp_case *each);
    bool (*join)(const vkp_case *each, vkp_i_wait *wait); /* false, not joined: it is ready */
    void (*leave)(const vkp_case *each, vkp_i_wait *wait);
    const vkp_env *(*env)(const vkp_case *each);
};

typedef struct vkp_i_batch { /* where a receive of several values puts them */
    void *out;
    size_t capacity;
    size_t count;
} vkp_i_batch;

static vkp_case vkp_i_case(const vkp_i_case_kind *kind, void *object, void *out)
{
    vkp_case each;
    memset(&each, 0, sizeof each);
    each.status = VKP_ERR_EMPTY;
    each.i_kind = kind;
    each.i_object = object;
    each.i_out = out;
    return each;
}

static vkp_status vkp_i_case_never_attempt(vkp_case *each, vkp_i_wait *wait)
{
    (void)each;
    (void)wait;
    return VKP_ERR_EMPTY;
}

static bool vkp_i_case_never_is_ready(const vkp_case *each)
{
    (void)each;
    return false;
}

static bool vkp_i_case_never_join(const vkp_case *each, vkp_i_wait *wait)
{
    (void)each;
    (void)wait;
    return true;
}

static void vkp_i_case_never_leave(const vkp_case *each, vkp_i_wait *wait)
{
    (void)each;
    (void)wait;
}

static const vkp_env *vkp_i_case_never_env(const vkp_case *each)
{
    (void)each;
    return NULL;
}

static const vkp_i_case_kind vkp_i_case_kind_never = {
    vkp_i_case_never_attempt, vkp_i_case_never_is_ready, vkp_i_case_never_join,
    vkp_i_case_never_leave, vkp_i_case_never_env};

VKP_API vkp_case vkp_case_never(void)
{
    return vkp_i_case(&vkp_i_case_kind_never, NULL, NULL);
}

/* Carry out the first case that can be, from `start` on; the first `joined` ones wait. */
static bool vkp_i_cases_attempt(vkp_case *cases, size_t count, size_t start, vkp_i_wait *waits,
                                size_t joined, size_t *won)
{
    size_t i;
    for (i = 0; i < count; i++) {
        size_t at = (start + i) % count;
        vkp_case *each = &cases[at];
        each->status = each->i_kind->attempt(each, at < joined ? &waits[at] : NULL);
        if (each->status != VKP_ERR_EMPTY) {
            *won = at;
            return true;
        }
    }
    return false;
}

/* A deadline among the cases, and a descriptor; i_object is the sys, set when the wait begins. */
static bool vkp_i_case_deadline_is_ready(const vkp_case *each)
{
    return ((const vkp_sys *)each->i_object)->clock_ns() >= each->i_number;
}

static vkp_status vkp_i_case_deadline_attempt(vkp_case *each, vkp_i_wait *wait)
{
    (void)wait;
    return vkp_i_case_deadline_is_ready(each) ? VKP_OK : VKP_ERR_EMPTY;
}

static const vkp_i_case_kind vkp_i_case_kind_deadline = {
    vkp_i_case_deadline_attempt, vkp_i_case_deadline_is_ready, vkp_i_case_never_join,
    vkp_i_case_never_leave, vkp_i_case_never_env};

#if VKP_I_IO
static void vkp_i_case_fd_set(const vkp_case *each, struct pollfd *poll)
{
    uint32_t interest = (uint32_t)(each->i_number >> 32);
    poll->fd = (int)(each->i_number & 0xffffffffu);
    poll->revents = 0;
    poll->events = (short)(((interest & VKP_IO_READ) != 0 ? POLLIN : 0) |
                           ((interest & VKP_IO_WRITE) != 0 ? POLLOUT : 0));
}

static vkp_status vkp_i_case_fd_attempt(vkp_case *each, vkp_i_wait *wait)
{
    const vkp_sys *sys = (const vkp_sys *)each->i_object;
    struct pollfd poll;
    int rc;
    (void)wait;
    vkp_i_case_fd_set(each, &poll);
    rc = sys->poll(&poll, 1, 0);
    if (rc == 0 || rc == -EINTR) {
        return VKP_ERR_EMPTY;
    }
    if (rc < 0) {
        errno = -rc;
        return VKP_ERR_SYS;
    }
    each->ready = ((poll.revents & POLLIN) != 0 ? VKP_IO_READ : VKP_IO_NONE) |
                  ((poll.revents & POLLOUT) != 0 ? VKP_IO_WRITE : VKP_IO_NONE) |
                  ((poll.revents & POLLHUP) != 0 ? VKP_IO_HUP : VKP_IO_NONE) |
                  ((poll.revents & (POLLERR | POLLNVAL)) != 0 ? VKP_IO_ERROR : VKP_IO_NONE);
    return VKP_OK;
}

static bool vkp_i_case_fd_is_ready(const vkp_case *each)
{
    vkp_case copy = *each;
    return vkp_i_case_fd_attempt(&copy, NULL) != VKP_ERR_EMPTY;
}

static const vkp_i_case_kind vkp_i_case_kind_fd = {vkp_i_case_fd_attempt, vkp_i_case_fd_is_ready,
                                                   vkp_i_case_never_join, vkp_i_case_never_leave,
                                                   vkp_i_case_never_env};
#endif

/* How a thread sleeps in a select: parked, or with descriptors among its cases in poll(2), where a
   wake-up is a byte in a pipe.                                                                */
typedef struct vkp_i_sleeper {
    const vkp_sys *sys;
    uint64_t deadline_ns; /* of the select, or of the first deadline among its cases */
    bool polls;
    int wake[2];
    vkp_parker parker;
} vkp_i_sleeper;

#if VKP_I_IO
static void vkp_i_pipe_wake(vkp_i_waiter *waiter)
{
    const vkp_i_wait *wait = VKP_CONTAINER(waiter, vkp_i_wait, node);
    uint64_t one = 1;
    (void)wait->sys->write(wait->wake_fd, &one, sizeof one); /* full: it is readable already */
}
#endif

static void vkp_i_sleeper_init(vkp_i_sleeper *sleeper, vkp_case *cases, size_t count,
                               const vkp_sys *sys, uint64_t deadline_ns)
{
    size_t i;
    sleeper->sys = sys;
    sleeper->deadline_ns = deadline_ns;
    sleeper->polls = false;
    for (i = 0; i < count; i++) {
        if (cases[i].i_kind == &vkp_i_case_kind_deadline) {
            cases[i].i_object = (void *)(uintptr_t)sys;
            sleeper->deadline_ns = VKP_I_MIN(sleeper->deadline_ns, cases[i].i_number);
        }
#if VKP_I_IO
        if (cases[i].i_kind == &vkp_i_case_kind_fd) {
            cases[i].i_object = (void *)(uintptr_t)sys;
            sleeper->polls = true;
        }
#endif
    }
}

static void vkp_i_sleeper_end(vkp_i_sleeper *sleeper)
{
#if VKP_I_IO
    if (sleeper->polls) {
        (void)sleeper->sys->close(sleeper->wake[0]);
        if (sleeper->wake[1] != sleeper->wake[0]) {
            (void)sleeper->sys->close(sleeper->wake[1]);
        }
        return;
    }
#endif
    vkp_i_parker_deinit(&sleeper->parker);
}

static vkp_status vkp_i_sleeper_begin(vkp_i_sleeper *sleeper, vkp_i_wait *waits, size_t count)
{
    size_t i;
#if VKP_I_IO
    if (sleeper->polls) {
        int rc = sleeper->sys->wake_pair(sleeper->wake);
        if (rc < 0) {
            errno = -rc;
            return VKP_ERR_SYS;
        }
    } else
#endif
    {
        vkp_i_parker_init(&sleeper->parker);
    }
    for (i = 0; i < count; i++) {
        vkp_i_wait_init(&waits[i], sleeper->sys, &sleeper->parker);
#if VKP_I_IO
        if (sleeper->polls) {
            waits[i].node.wake = vkp_i_pipe_wake;
            waits[i].wake_fd = sleeper->wake[1];
        }
#endif
    }
    return VKP_OK;
}

/* Until woken or a descriptor is ready: true; false at the deadline. */
static bool vkp_i_sleeper_sleep(vkp_i_sleeper *sleeper, const vkp_case *cases, size_t count)
{
#if VKP_I_IO
    if (sleeper->polls) {
        struct pollfd polls[VKP_SELECT_MAX + 1];
        size_t used = 1;
        size_t i;
        polls[0].fd = sleeper->wake[0];
        polls[0].events = POLLIN;
        polls[0].revents = 0;
        for (i = 0; i < count; i++) {
            if (cases[i].i_kind == &vkp_i_case_kind_fd) {
                vkp_i_case_fd_set(&cases[i], &polls[used]);
                used++;
            }
        }
        /* The cases tell more. A poll that ends early, its time-out being too long, is no
           deadline.                                                                            */
        return sleeper->sys->poll(polls, used, sleeper->deadline_ns) != 0 ||
               sleeper->sys->clock_ns() < sleeper->deadline_ns;
    }
#endif
    (void)cases;
    (void)count;
    sleeper->sys->park(&sleeper->parker, sleeper->deadline_ns);
    return vkp_i_parker_notified(&sleeper->parker);
}

/* Wait for one of the cases, each with its wait, and carry it out. OK, TIMEOUT or SYS. */
static vkp_status vkp_i_select(vkp_case *cases, size_t count, size_t start, vkp_i_wait *waits,
                               const vkp_sys *sys, uint32_t spins, uint64_t deadline_ns,
                               size_t *won)
{
    vkp_i_spin spin = {0, 0};
    vkp_i_sleeper sleeper;
    bool late = deadline_ns == 0;
    bool found;
    vkp_i_sleeper_init(&sleeper, cases, count, sys, deadline_ns);
    found = vkp_i_cases_attempt(cases, count, start, NULL, 0, won);
    while (!found && !late && !sleeper.polls && vkp_i_spin_again(&spin, sys, spins)) {
        found = vkp_i_cases_attempt(cases, count, start, NULL, 0, won);
    }
    while (!found && !late) {
        size_t joined;
        size_t i;
        vkp_status status = vkp_i_sleeper_begin(&sleeper, waits, count);
        if (status != VKP_OK) {
            return status;
        }
        for (joined = 0; joined < count; joined++) {
            if (!cases[joined].i_kind->join(&cases[joined], &waits[joined])) {
                break;
            }
        }
        if (joined == count) {
            bool woken = vkp_i_sleeper_sleep(&sleeper, cases, count);
            late = !woken && sleeper.deadline_ns == deadline_ns; /* one last look follows */
        }
        found = vkp_i_cases_attempt(cases, count, start, waits, joined, won);
        for (i = 0; i < joined; i++) {
            cases[i].i_kind->leave(&cases[i], &waits[i]);
        }
        vkp_i_sleeper_end(&sleeper);
    }
    return found ? VKP_OK : VKP_ERR_TIMEOUT;
}

/* The same for the library's own waits, of at most two cases: the status of the one that won. */
static vkp_status vkp_i_select_few(vkp_case *cases, size_t count, const vkp_env *env,
                                   uint32_t spins, uint64_t deadline_ns)
{
    vkp_i_wait waits[2];
    size_t won;
    vkp_status status =
        vkp_i_select(cases, count, 0, waits, vkp_i_sys(env), spins, deadline_ns, &won);
    return status == VKP_OK ? cases[won].status : status;
}

/* Waiting for a thread that is between two instructions, and may have lost its processor there.
   It sleeps in the end: a thread of a higher priority would otherwise never let that one run. */
typedef struct vkp_i_backoff {
    uint32_t rounds;
} vkp_i_backoff;

#define VKP_I_BACKOFF_NS 50000u

static void vkp_i_back_off(vkp_i_backoff *backoff, const vkp_sys *sys)
{
    backoff->rounds++;
    if (backoff->rounds < 64) {
        VKP_I_PAUSE();
    } else if (backoff->rounds < 128) {
        sys->yield();
    } else {
        vkp_parker parker;
        vkp_i_parker_init(&parker);
        sys->park(&parker, sys->clock_ns() + VKP_I_BACKOFF_NS);
        vkp_i_parker_deinit(&parker);
    }
}

/* A lock for some instructions, of which no thread waits asleep. */
static inline void vkp_i_latch_lock(uint32_t *latch, const vkp_sys *sys)
{
    vkp_i_backoff backoff = {0};
    while (VKP_I_XCHG(latch, 1u) != 0) {
        do {
            vkp_i_back_off(&backoff, sys);
        } while (VKP_I_LOAD(latch) != 0);
    }
}

static inline void vkp_i_latch_unlock(uint32_t *latch)
{
    VKP_I_STORE_REL(latch, 0u);
}

/* Bias: what nearly always ONE thread does belongs to that thread, and it does it with plain
   stores. Another one that comes revokes that for good (vkp_i_biased_lock, vkp_i_lane_own),
   which costs a membarrier once; where there is none nobody owns anything.                     */
typedef struct vkp_i_bias {
    uintptr_t owner; /* atomic: a thread, VKP_I_NOBODY yet, or VKP_I_SHARED for good */
    uint32_t busy;   /* atomic: the owner is inside */
    uint32_t held;   /* atomic: and must stay outside */
} vkp_i_bias;

#define VKP_I_NOBODY ((uintptr_t)0)
#define VKP_I_SHARED ((uintptr_t)1)

/* The owner goes inside, unless somebody holds it off, or has taken the bias. */
static inline bool vkp_i_bias_enter(vkp_i_bias *bias)
{
    VKP_I_STORE(&bias->busy, 1u);
    VKP_I_ORDER();
    if (VKP_I_LOAD_ACQ(&bias->held) == 0 && VKP_I_LOAD_ACQ(&bias->owner) == VKP_I_SELF()) {
        return true;
    }
    VKP_I_STORE_REL(&bias->busy, 0u);
    return false;
}

static inline void vkp_i_bias_exit(vkp_i_bias *bias)
{
    VKP_I_STORE_REL(&bias->busy, 0u);
}

/* Another thread: the owner is outside when this returns, until vkp_i_bias_release. */
static void vkp_i_bias_hold(vkp_i_bias *bias, const vkp_env *env)
{
    vkp_i_backoff backoff = {0};
    VKP_I_STORE(&bias->held, 1u);
    vkp_i_flag_fence(env, false);
    while (VKP_I_LOAD_ACQ(&bias->busy) != 0) {
        vkp_i_back_off(&backoff, vkp_i_sys(env));
    }
}

static void vkp_i_bias_release(vkp_i_bias *bias)
{
    VKP_I_STORE_REL(&bias->held, 0u);
}

/* A latch that costs its owner no exchange. */
typedef struct vkp_i_biased_latch {
    vkp_i_bias bias;
    uint32_t latch;
} vkp_i_biased_latch;

/* Gives what vkp_i_biased_unlock wants to know: whether the owner got in by its bias. */
static inline bool vkp_i_biased_lock(vkp_i_biased_latch *self, const vkp_env *env)
{
    uintptr_t owner = VKP_I_LOAD_ACQ(&self->bias.owner);
    if (owner == VKP_I_SELF() && vkp_i_bias_enter(&self->bias)) {
        return true;
    }
    vkp_i_latch_lock(&self->latch, vkp_i_sys(env));
    owner = VKP_I_LOAD(&self->bias.owner);
    if (owner == VKP_I_NOBODY) {
        VKP_I_STORE_REL(&self->bias.owner, VKP_I_SELF()); /* it takes effect at the unlock */
    } else if (owner != VKP_I_SHARED && owner != VKP_I_SELF()) {
        vkp_i_bias_hold(&self->bias, env);
        VKP_I_STORE_REL(&self->bias.owner, VKP_I_SHARED);
        vkp_i_bias_release(&self->bias);
    }
    return false;
}

static inline void vkp_i_biased_unlock(vkp_i_biased_latch *self, bool biased)
{
    if (biased) {
        vkp_i_bias_exit(&self->bias);
    } else {
        vkp_i_latch_unlock(&self->latch);
    }
}

static void vkp_i_biased_init(vkp_i_biased_latch *self, bool fenced)
{
    self->bias.owner = fenced ? VKP_I_SHARED : VKP_I_NOBODY;
}
