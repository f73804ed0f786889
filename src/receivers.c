/* ======================================================================================
   >>impl-receivers   What broadcast and watch share
   ======================================================================================
   A channel with many receivers: their count, the waiting ones, and the sender that waits until no
   receiver is left. A sender stores its value (or `ended`), then checks the flag `waiting`; when
   it is raised, it lowers the flag and wakes all of `news` under the mutex. A receiver that waits
   links its waiter, raises the flag, and then checks once more (flags: section park). The last
   receiver wakes `closers` under the mutex, after its count.
   Lock order: the mutex, and under it only the lock that wake takes; no sender or receiver holds a
   latch when it takes the mutex.                                                               */

typedef struct vkp_i_receivers {
    const vkp_env *env;
    uint32_t spins;   /* pauses before a receiver sleeps */
    bool fenced;      /* there is no membarrier: flags and biases do without */
    uint32_t ended;   /* atomic: 1 when no sender is left */
    uint32_t waiting; /* flag: 1 while `news` is not empty */
    size_t receivers; /* atomic: their number */
    unsigned char pad_lists[VKP_I_APART];
    VKP_I_MUTEX mutex;     /* guards both lists */
    vkp_i_waiters news;    /* under the mutex: receivers that wait for a value or the end */
    vkp_i_waiters closers; /* under the mutex: waits until no receiver is left */
} vkp_i_receivers;

static void vkp_i_receivers_init(vkp_i_receivers *receivers, const vkp_env *env)
{
    receivers->env = env;
    receivers->spins = vkp_i_spins(env);
    receivers->fenced = vkp_i_flag_prepare(env);
    VKP_I_MUTEX_INIT(&receivers->mutex);
    vkp_i_waiters_init(&receivers->news);
    vkp_i_waiters_init(&receivers->closers);
}

static void vkp_i_receivers_deinit(vkp_i_receivers *receivers)
{
    VKP_I_MUTEX_DEINIT(&receivers->mutex);
}

/* After the store of a value or of the end: wake the receivers that wait. */
static inline void vkp_i_receivers_signal(vkp_i_receivers *receivers)
{
    if (vkp_i_flag_check(&receivers->waiting, receivers->fenced) != 0) {
        VKP_I_LOCK(&receivers->mutex);
        vkp_i_flag_lower(&receivers->waiting, 1u);
        vkp_i_waiters_wake_all(&receivers->news);
        VKP_I_UNLOCK(&receivers->mutex);
    }
}

/* The last sender gave its reference back: the channel has ended. */
static void vkp_i_receivers_end(vkp_i_receivers *receivers)
{
    VKP_I_STORE_REL(&receivers->ended, 1u);
    vkp_i_receivers_signal(receivers);
}

static bool vkp_i_receivers_is_ended(const vkp_i_receivers *receivers)
{
    return VKP_I_LOAD_ACQ(&receivers->ended) != 0;
}

/* The number of receivers. */
static size_t vkp_i_receivers_size(const vkp_i_receivers *receivers)
{
    return VKP_I_LOAD_ACQ(&receivers->receivers);
}

/* Link the waiter of a receiver, which must check once more afterwards. */
static void vkp_i_receivers_join(vkp_i_receivers *receivers, vkp_i_waiter *waiter)
{
    VKP_I_LOCK(&receivers->mutex);
    vkp_i_waiter_link(&receivers->news, waiter);
    vkp_i_flag_raise(&receivers->waiting, 1u);
    VKP_I_UNLOCK(&receivers->mutex);
    vkp_i_flag_fence(receivers->env, receivers->fenced);
}

/* Unlink the waiter of a receiver if it is linked; the last one lowers the flag. */
static void vkp_i_receivers_leave(vkp_i_receivers *receivers, vkp_i_waiter *waiter)
{
    VKP_I_LOCK(&receivers->mutex);
    if (vkp_i_waiter_unlink(waiter) && vkp_i_waiters_empty(&receivers->news)) {
        vkp_i_flag_lower(&receivers->waiting, 1u);
    }
    VKP_I_UNLOCK(&receivers->mutex);
}

/* Count one receiver less; when none is left, wake the waits for that. */
static void vkp_i_receivers_remove(vkp_i_receivers *receivers)
{
    if (VKP_I_UNREF(&receivers->receivers) == 1) {
        VKP_I_LOCK(&receivers->mutex);
        vkp_i_waiters_wake_all(&receivers->closers);
        VKP_I_UNLOCK(&receivers->mutex);
    }
}

static vkp_status vkp_i_case_no_receivers_attempt(vkp_case *each, vkp_i_wait *wait)
{
    (void)wait;
    return vkp_i_receivers_size((vkp_i_receivers *)each->i_object) == 0 ? VKP_OK : VKP_ERR_EMPTY;
}

static bool vkp_i_case_no_receivers_is_ready(const vkp_case *each)
{
    return vkp_i_receivers_size((vkp_i_receivers *)each->i_object) == 0;
}

static bool vkp_i_case_no_receivers_join(const vkp_case *each, vkp_i_wait *wait)
{
    vkp_i_receivers *receivers = (vkp_i_receivers *)each->i_object;
    bool ready;
    VKP_I_LOCK(&receivers->mutex); /* the last receiver counts, then wakes under the mutex */
    ready = vkp_i_case_no_receivers_is_ready(each);
    if (!ready) {
        vkp_i_waiter_link(&receivers->closers, &wait->node);
    }
    VKP_I_UNLOCK(&receivers->mutex);
    return !ready;
}

static void vkp_i_case_no_receivers_leave(const vkp_case *each, vkp_i_wait *wait)
{
    vkp_i_receivers *receivers = (vkp_i_receivers *)each->i_object;
    VKP_I_LOCK(&receivers->mutex);
    (void)vkp_i_waiter_unlink(&wait->node);
    VKP_I_UNLOCK(&receivers->mutex);
}

static const vkp_env *vkp_i_case_no_receivers_env(const vkp_case *each)
{
    return ((vkp_i_receivers *)each->i_object)->env;
}

/* The case that no receiver is left; i_object is the vkp_i_receivers. */
static const vkp_i_case_kind vkp_i_case_no_receivers = {
    vkp_i_case_no_receivers_attempt, vkp_i_case_no_receivers_is_ready, vkp_i_case_no_receivers_join,
    vkp_i_case_no_receivers_leave, vkp_i_case_no_receivers_env};

/* Wait until no receiver is left: OK, TIMEOUT or SYS. */
static vkp_status vkp_i_receivers_wait_gone(vkp_i_receivers *receivers, uint64_t deadline_ns)
{
    vkp_case gone = vkp_i_case(&vkp_i_case_no_receivers, receivers, NULL);
    return vkp_i_select_few(&gone, 1, receivers->env, 0, deadline_ns);
}

/* Copy a value into words that other threads may load meanwhile. The release of each word pairs
   with the acquire in vkp_i_words_load: a reader that sees a new word sees the seq stored before
   it.                                                                                          */
static inline void vkp_i_words_store(uint64_t *words, const void *item, size_t bytes)
{
    const uint8_t *from = (const uint8_t *)item;
    for (; bytes >= sizeof *words; bytes -= sizeof *words, from += sizeof *words, words++) {
        uint64_t word;
        memcpy(&word, from, sizeof word);
        VKP_I_STORE_REL(words, word);
    }
    if (bytes > 0) {
        uint64_t word = 0;
        memcpy(&word, from, bytes);
        VKP_I_STORE_REL(words, word);
    }
}

/* Copy a value out of words that another thread may store meanwhile; the caller checks the seq. */
static inline void vkp_i_words_load(void *out, const uint64_t *words, size_t bytes)
{
    uint8_t *to = (uint8_t *)out;
    for (; bytes >= sizeof *words; bytes -= sizeof *words, to += sizeof *words, words++) {
        uint64_t word = VKP_I_LOAD_ACQ(words);
        memcpy(to, &word, sizeof word);
    }
    if (bytes > 0) {
        uint64_t word = VKP_I_LOAD_ACQ(words);
        memcpy(to, &word, bytes);
    }
}

#define VKP_I_OWNED_BYTES 256u /* most bytes of a broadcast value with a drop: a handle */
