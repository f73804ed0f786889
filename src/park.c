/* ======================================================================================
   >>impl-park   The waiter: the one way to be woken
   ======================================================================================
   A waiter is a node that a waiting side links into a list of the object it waits for. The side
   that makes the condition true unlinks the waiter and calls its wake, both under the lock of the
   list. A waiter that is no longer linked when its owner takes the lock has therefore been woken
   completely, and its memory may be freed. (A one-shot has no list and no lock, see its section.)
   wake only unparks a thread or queues a task on a loop: no user code runs under a lock.
   Lock order: the lock of a channel or token, then the lock that wake takes: the mutex of a parker
   where there are no futexes (the queue of a loop takes no lock). Latches: the latch of the
   senders, then the latch of a place.                                                          */

typedef struct vkp_i_waiter {
    struct vkp_i_waiter *prev; /* NULL when not linked */
    struct vkp_i_waiter *next;
    void (*wake)(struct vkp_i_waiter *waiter); /* unparks a thread, or queues a task */
} vkp_i_waiter;

typedef struct vkp_i_waiters {
    vkp_i_waiter head; /* the sentinel of a ring: next is the oldest waiter, prev the newest */
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

/* Link the waiter as the newest of the list. */
static void vkp_i_waiter_link(vkp_i_waiters *list, vkp_i_waiter *waiter)
{
    waiter->prev = list->head.prev;
    waiter->next = &list->head;
    list->head.prev->next = waiter;
    list->head.prev = waiter;
}

/* Unlink the waiter; false when it was not linked. */
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

/* Locked: unlink and wake every waiter, the oldest first. */
static void vkp_i_waiters_wake_all(vkp_i_waiters *list)
{
    while (!vkp_i_waiters_empty(list)) {
        vkp_i_waiter *first = list->head.next;
        (void)vkp_i_waiter_unlink(first);
        first->wake(first);
    }
}

/* One wait for one object. A thread that waits for several objects has one vkp_i_wait for each,
   all with its parker; a handler has one.                                                      */
typedef struct vkp_i_wait {
    vkp_i_waiter node;
    const vkp_sys *sys; /* of a thread that waits; NULL in a handler */
    vkp_parker *parker; /* of a thread that waits; NULL in a handler */
    const void *item;   /* value of a sender that waits for room, or NULL, see vkp_i_lane_admit */
    size_t cost; /* of a sender that waits for room: bytes of its value, by vkp_mpsc_config.cost */
    vkp_status status; /* of a sender that waits for room: FULL until it is woken */
    int wake_fd;       /* where a wake-up of a thread that sleeps in poll is written */
    uint32_t done;     /* atomic: 1 when a one-shot has woken this wait and no longer uses it */
} vkp_i_wait;

/* The wake of a parked thread. */
static void vkp_i_thread_wake(vkp_i_waiter *waiter)
{
    vkp_i_wait *self = VKP_CONTAINER(waiter, vkp_i_wait, node);
    self->sys->unpark(self->parker);
}

/* Prepare the wait of a thread that will park. */
static void vkp_i_wait_init(vkp_i_wait *self, const vkp_sys *sys, vkp_parker *parker)
{
    memset(self, 0, sizeof *self);
    self->node.wake = vkp_i_thread_wake;
    self->sys = sys;
    self->parker = parker;
}

/* Whether unpark was called for the parker. */
static bool vkp_i_parker_notified(vkp_parker *parker)
{
    return VKP_I_LOAD_ACQ(&parker->state) == VKP_I_PARK_NOTIFIED;
}

/* Flags. The storing side stores a value and then checks the flag; the waiting side raises its
   bit of the flag and then checks for the value. One of the two must see the other's store, but
   each side does a store before a load, and processors reorder those. The waiting side, which is
   about to sleep, pays for both with a memory barrier in every thread (membarrier). Where there
   is no membarrier (`fenced`), both sides change the flag with a read-modify-write: the flag
   orders the two sides.                                                                        */

/* Storing side, after its store: the raised bits; 0 means that no side waits. */
static inline uint32_t vkp_i_flag_check(uint32_t *flag, bool fenced)
{
    if (fenced) {
        return VKP_I_ADD_ACQ_REL(flag, 0u);
    }
    VKP_I_ORDER();
    return VKP_I_LOAD(flag);
}

/* Waiting side: raise the bit; then call vkp_i_flag_fence; then check for the value. */
static void vkp_i_flag_raise(uint32_t *flag, uint32_t bit)
{
    (void)VKP_I_OR(flag, bit);
}

/* Waiting side, after vkp_i_flag_raise: from here on it sees the store, or the storing side sees
   the bit.                                                                                     */
static void vkp_i_flag_fence(const vkp_env *env, bool fenced)
{
    if (!fenced) {
        (void)vkp_i_sys(env)->membarrier(false);
    }
}

/* Lower the bit: no side waits for it. Both sides call this, under the lock of the list. */
static void vkp_i_flag_lower(uint32_t *flag, uint32_t bit)
{
    (void)VKP_I_AND(flag, ~bit);
}

/* Register the process for membarrier; true (`fenced`) when flags must work without it. */
static bool vkp_i_flag_prepare(const vkp_env *env)
{
    return vkp_i_sys(env)->membarrier(true) < 0;
}

/* A thread stays awake for a while before it sleeps: a wake-up costs microseconds, and a value
   often arrives sooner.                                                                        */
typedef struct vkp_i_spin {
    uint32_t pauses; /* processor pauses done */
    uint32_t yields; /* yields done after the pauses */
} vkp_i_spin;

#define VKP_I_SPINS 200u /* default of vkp_env.spins: pauses before a thread yields */
#define VKP_I_YIELDS 8u  /* yields after the pauses, before a thread sleeps */

/* Pauses of a thread of this env before it yields and sleeps; 0: it sleeps immediately. */
static uint32_t vkp_i_spins(const vkp_env *env)
{
    if (env->spins == 0) {
        return vkp_i_sys(env)->processors() > 1 ? VKP_I_SPINS : 0;
    }
    return env->spins == VKP_SPINS_NONE ? 0 : env->spins;
}

/* Pause, or after `spins` pauses yield to a thread without a processor; false: time to sleep. */
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

/* The functions of one kind of case. All waits of the library, except plain sends and reserves
   of mpsc channels, use them in this order: attempt, join, sleep, attempt again, leave.        */
struct vkp_i_case_kind {
    /* Carry the case out; EMPTY when it is not ready. `wait` is the joined wait, or NULL. */
    vkp_status (*attempt)(vkp_case *each, vkp_i_wait *wait);
    /* Whether an attempt is worthwhile; takes and sends nothing. */
    bool (*is_ready)(const vkp_case *each);
    /* Link the wait to the object of the case; false, and not joined, when the case is ready. */
    bool (*join)(const vkp_case *each, vkp_i_wait *wait);
    /* End a wait that join began; its memory may be reused afterwards. */
    void (*leave)(const vkp_case *each, vkp_i_wait *wait);
    /* The env of the object; NULL for a kind of case without an object. */
    const vkp_env *(*env)(const vkp_case *each);
};

/* Where a case that receives several values puts them (its i_out). */
typedef struct vkp_i_batch {
    void *out;       /* array of `capacity` values */
    size_t capacity; /* most values to receive */
    size_t count;    /* values received; written with status OK */
} vkp_i_batch;

/* Make a case of that kind, with status EMPTY. */
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

/* Carry out the first ready case, searching from index `start` on and then from 0; false when
   none is ready. The cases below index `joined` are joined, and get their waits.               */
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

/* A deadline as a case; i_object is the vkp_sys, set when the wait begins. It never joins: the
   sleeper ends with the earliest deadline.                                                     */
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
/* A descriptor as a case; i_object is the vkp_sys, set when the wait begins. It never joins: the
   sleeper polls. i_number holds the interest in its upper 32 bits, the descriptor in its lower
   32.                                                                                          */
static void vkp_i_case_fd_set(const vkp_case *each, struct pollfd *poll)
{
    uint32_t interest = (uint32_t)(each->i_number >> 32);
    poll->fd = (int)(each->i_number & 0xffffffffu);
    poll->revents = 0;
    poll->events = (short)(((interest & VKP_IO_READ) != 0 ? POLLIN : 0) |
                           ((interest & VKP_IO_WRITE) != 0 ? POLLOUT : 0));
}

/* Poll the descriptor without waiting. A failed poll carries the case out, with status SYS. */
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

/* How a thread sleeps in a select: parked, or in poll(2) when descriptors are among its cases; a
   wake-up is then a write to an eventfd (Linux) or a pipe.                                     */
typedef struct vkp_i_sleeper {
    const vkp_sys *sys;
    uint64_t deadline_ns; /* the earliest of the deadline of the select and those of its cases */
    bool polls;           /* sleeps in poll, not parked */
    int wake[2];          /* with `polls`: read end, write end; the same for an eventfd */
    vkp_parker parker;    /* without `polls` */
} vkp_i_sleeper;

#if VKP_I_IO
/* The wake of a thread that sleeps in poll. */
static void vkp_i_pipe_wake(vkp_i_waiter *waiter)
{
    const vkp_i_wait *wait = VKP_CONTAINER(waiter, vkp_i_wait, node);
    uint64_t one = 1;
    /* A write to a full pipe fails, and need not succeed: the read end is readable already. */
    (void)wait->sys->write(wait->wake_fd, &one, sizeof one);
}
#endif

/* Decide how to sleep, and until when; gives deadlines and descriptors their vkp_sys. */
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

/* After each sleep: release what vkp_i_sleeper_begin opened. */
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

/* Before each sleep: prepare the parker or the pipe, and a wait for each case. OK or SYS. */
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

/* Sleep until a wake-up arrives or a descriptor is ready: true; false at the deadline. */
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
        /* The attempt that follows finds the ready descriptor. poll returns 0 before the
           deadline when the deadline is beyond its longest time-out: that counts as a wake-up. */
        return sleeper->sys->poll(polls, used, sleeper->deadline_ns) != 0 ||
               sleeper->sys->clock_ns() < sleeper->deadline_ns;
    }
#endif
    (void)cases;
    (void)count;
    sleeper->sys->park(&sleeper->parker, sleeper->deadline_ns);
    return vkp_i_parker_notified(&sleeper->parker);
}

/* Wait for one of the cases and carry it out. `waits` has an element for each case; `spins` is
   the number of pauses before the first sleep. OK (*won is the index, the status of that case
   its result), TIMEOUT or SYS.                                                                 */
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
            late = !woken && sleeper.deadline_ns == deadline_ns; /* one last attempt follows */
        }
        found = vkp_i_cases_attempt(cases, count, start, waits, joined, won);
        if (!found && joined < count) {
            late = sys->clock_ns() >= deadline_ns; /* a case was ready, and another side took it */
        }
        for (i = 0; i < joined; i++) {
            cases[i].i_kind->leave(&cases[i], &waits[i]);
        }
        vkp_i_sleeper_end(&sleeper);
    }
    return found ? VKP_OK : VKP_ERR_TIMEOUT;
}

/* vkp_i_select for at most two cases: gives the status of the case that won, TIMEOUT or SYS. */
static vkp_status vkp_i_select_few(vkp_case *cases, size_t count, const vkp_env *env,
                                   uint32_t spins, uint64_t deadline_ns)
{
    vkp_i_wait waits[2];
    size_t won;
    vkp_status status =
        vkp_i_select(cases, count, 0, waits, vkp_i_sys(env), spins, deadline_ns, &won);
    return status == VKP_OK ? cases[won].status : status;
}

/* Waiting for a thread that is between two instructions, and may have lost its processor there:
   pause, later yield, in the end sleep. Without the sleep, a waiting thread of a higher priority
   could keep the other thread from running.                                                    */
typedef struct vkp_i_backoff {
    uint32_t rounds; /* calls of vkp_i_back_off */
} vkp_i_backoff;

#define VKP_I_BACKOFF_PAUSES 64u /* rounds that pause */
#define VKP_I_BACKOFF_YIELDS 64u /* rounds after those that yield */
#define VKP_I_BACKOFF_NS 50000u  /* sleep of each later round */

static void vkp_i_back_off(vkp_i_backoff *backoff, const vkp_sys *sys)
{
    backoff->rounds++;
    if (backoff->rounds < VKP_I_BACKOFF_PAUSES) {
        VKP_I_PAUSE();
    } else if (backoff->rounds < VKP_I_BACKOFF_PAUSES + VKP_I_BACKOFF_YIELDS) {
        sys->yield();
    } else {
        vkp_parker parker;
        vkp_i_parker_init(&parker);
        sys->park(&parker, sys->clock_ns() + VKP_I_BACKOFF_NS);
        vkp_i_parker_deinit(&parker);
    }
}

/* A latch is a lock held for a few instructions: 0 free, 1 held. A thread that waits for it
   backs off; unlock wakes no thread. The exchange acquires what the store of unlock releases.  */
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

/* Bias: work that nearly always ONE thread does belongs to that thread, its owner, which does it
   with plain stores. The first other thread revokes the bias permanently (vkp_i_biased_lock,
   vkp_i_lane_own), which costs one membarrier; where there is no membarrier, no thread is ever
   the owner. vkp_i_bias_enter stores `busy`, then loads `held`; vkp_i_bias_hold stores `held`,
   then, after a membarrier, loads `busy`: one of the two sees the other.                       */
typedef struct vkp_i_bias {
    uintptr_t owner; /* atomic: VKP_I_SELF of a thread, VKP_I_NOBODY or VKP_I_SHARED */
    uint32_t busy;   /* atomic: 1 while the owner is inside */
    uint32_t held;   /* atomic: 1 while the owner must stay outside */
} vkp_i_bias;

#define VKP_I_NOBODY ((uintptr_t)0) /* no thread has worked yet: the first one becomes the owner */
#define VKP_I_SHARED ((uintptr_t)1) /* no owner, permanently */

/* Enter as the owner; false while another thread holds the owner off, or after it was revoked. */
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

/* Another thread, under the lock that guards the revocation: when this returns the owner is
   outside, and stays there until vkp_i_bias_release.                                           */
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

/* A latch that its owner takes without a read-modify-write. */
typedef struct vkp_i_biased_latch {
    vkp_i_bias bias; /* changed under `latch` */
    uint32_t latch;  /* atomic: 0 free, 1 held; taken by a thread that did not enter by its bias */
} vkp_i_biased_latch;

/* Lock. Gives whether the caller entered as the owner, which vkp_i_biased_unlock must be given. */
static inline bool vkp_i_biased_lock(vkp_i_biased_latch *self, const vkp_env *env)
{
    uintptr_t owner = VKP_I_LOAD_ACQ(&self->bias.owner);
    if (owner == VKP_I_SELF() && vkp_i_bias_enter(&self->bias)) {
        return true;
    }
    vkp_i_latch_lock(&self->latch, vkp_i_sys(env));
    owner = VKP_I_LOAD(&self->bias.owner);
    if (owner == VKP_I_NOBODY) {
        VKP_I_STORE_REL(&self->bias.owner, VKP_I_SELF()); /* the bias begins with the unlock */
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

/* Prepare a zeroed latch; `fenced`: there is no membarrier, so the latch never has an owner. */
static void vkp_i_biased_init(vkp_i_biased_latch *self, bool fenced)
{
    self->bias.owner = fenced ? VKP_I_SHARED : VKP_I_NOBODY;
}
