/* ======================================================================================
   >>impl-audience   What broadcast and watch share
   ====================================================================================== */

/* ---- what broadcast and watch share: receivers, those who wait for news, and their leaving
   ----                                                                                         */

typedef struct vkp_i_audience {
    const vkp_env *env;
    uint32_t spins;
    bool fenced;
    uint32_t ended;   /* atomic: no sender is left */
    uint32_t waiting; /* gate: receivers wait for news */
    size_t receivers; /* atomic */
    unsigned char pad_lists[VKP_I_APART];
    VKP_I_MUTEX mutex; /* guards both lists */
    vkp_i_waiters news;
    vkp_i_waiters closers; /* wait until no receiver is left */
} vkp_i_audience;

static void vkp_i_audience_init(vkp_i_audience *audience, const vkp_env *env)
{
    audience->env = env;
    audience->spins = vkp_i_spins(env);
    audience->fenced = vkp_i_gate_prepare(env);
    VKP_I_MUTEX_INIT(&audience->mutex);
    vkp_i_waiters_init(&audience->news);
    vkp_i_waiters_init(&audience->closers);
}

static void vkp_i_audience_deinit(vkp_i_audience *audience)
{
    VKP_I_MUTEX_DEINIT(&audience->mutex);
}

/* After a store that receivers may wait for. */
static inline void vkp_i_audience_signal(vkp_i_audience *audience)
{
    if (vkp_i_gate_check(&audience->waiting, audience->fenced) != 0) {
        VKP_I_LOCK(&audience->mutex);
        vkp_i_gate_shut(&audience->waiting, 1u);
        vkp_i_waiters_wake_all(&audience->news);
        VKP_I_UNLOCK(&audience->mutex);
    }
}

/* The last sender has gone. */
static void vkp_i_audience_end(vkp_i_audience *audience)
{
    VKP_I_STORE_REL(&audience->ended, 1u);
    vkp_i_audience_signal(audience);
}

static bool vkp_i_audience_is_ended(const vkp_i_audience *audience)
{
    return VKP_I_LOAD_ACQ(&audience->ended) != 0;
}

static size_t vkp_i_audience_size(const vkp_i_audience *audience)
{
    return VKP_I_LOAD_ACQ(&audience->receivers);
}

/* Link a receiver's waiter; it looks once more afterwards. */
static void vkp_i_audience_join(vkp_i_audience *audience, vkp_i_waiter *waiter)
{
    VKP_I_LOCK(&audience->mutex);
    vkp_i_waiter_link(&audience->news, waiter);
    vkp_i_gate_open(&audience->waiting, 1u);
    VKP_I_UNLOCK(&audience->mutex);
    vkp_i_gate_settle(audience->env, audience->fenced);
}

static void vkp_i_audience_leave(vkp_i_audience *audience, vkp_i_waiter *waiter)
{
    VKP_I_LOCK(&audience->mutex);
    if (vkp_i_waiter_unlink(waiter) && vkp_i_waiters_empty(&audience->news)) {
        vkp_i_gate_shut(&audience->waiting, 1u);
    }
    VKP_I_UNLOCK(&audience->mutex);
}

/* A receiver goes. */
static void vkp_i_audience_lose(vkp_i_audience *audience)
{
    if (VKP_I_UNREF(&audience->receivers) == 1) {
        VKP_I_LOCK(&audience->mutex);
        vkp_i_waiters_wake_all(&audience->closers);
        VKP_I_UNLOCK(&audience->mutex);
    }
}

static vkp_status vkp_i_case_gone_attempt(vkp_case *each, vkp_i_wait *wait)
{
    (void)wait;
    return vkp_i_audience_size((vkp_i_audience *)each->i_object) == 0 ? VKP_OK : VKP_ERR_EMPTY;
}

static bool vkp_i_case_gone_is_ready(const vkp_case *each)
{
    return vkp_i_audience_size((vkp_i_audience *)each->i_object) == 0;
}

static bool vkp_i_case_gone_join(const vkp_case *each, vkp_i_wait *wait)
{
    vkp_i_audience *audience = (vkp_i_audience *)each->i_object;
    bool ready;
    VKP_I_LOCK(&audience->mutex); /* the last receiver wakes under it, after its count */
    ready = vkp_i_case_gone_is_ready(each);
    if (!ready) {
        vkp_i_waiter_link(&audience->closers, &wait->node);
    }
    VKP_I_UNLOCK(&audience->mutex);
    return !ready;
}

static void vkp_i_case_gone_leave(const vkp_case *each, vkp_i_wait *wait)
{
    vkp_i_audience *audience = (vkp_i_audience *)each->i_object;
    VKP_I_LOCK(&audience->mutex);
    (void)vkp_i_waiter_unlink(&wait->node);
    VKP_I_UNLOCK(&audience->mutex);
}

static const vkp_env *vkp_i_case_gone_env(const vkp_case *each)
{
    return ((vkp_i_audience *)each->i_object)->env;
}

/* No receiver is left; i_object is the audience. */
static const vkp_i_case_kind vkp_i_case_gone = {vkp_i_case_gone_attempt, vkp_i_case_gone_is_ready,
                                                vkp_i_case_gone_join, vkp_i_case_gone_leave,
                                                vkp_i_case_gone_env};

static vkp_status vkp_i_audience_wait_gone(vkp_i_audience *audience, uint64_t deadline_ns)
{
    vkp_case gone = vkp_i_case(&vkp_i_case_gone, audience, NULL);
    return vkp_i_select_few(&gone, 1, audience->env, 0, deadline_ns);
}

/* Values that are copied while they may be overwritten, word by word. */
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

#define VKP_I_OWNED_BYTES 256u /* most of a value with a drop: it is a handle */
