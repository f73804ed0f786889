/* ======================================================================================
   >>impl-broadcast   Every receiver sees every value
   ======================================================================================
   A ring of places. Tickets count the values since the beginning; each receiver has the ticket
   that it reads next. One sender at a time writes, under the latch of the channel, and never
   checks where receivers are. The `seq` of a place says which ticket it holds, and is odd while
   the place is written. A receiver loads `seq` before and after it copies the value, and so
   notices a sender that overtook it. Words are stored with release and loaded with acquire: a
   receiver that loads a word of a later value also sees the later `seq`.
   Values that own something (with retain and drop) are instead copied and retained under a latch
   of their place. Latch order: that of the channel, then that of a place. drop runs without a
   latch.
   A receiver that waits is linked in `receivers` (section receivers); each send wakes all waiting
   receivers after it stored `tail`.                                                            */

typedef struct vkp_i_broadcast {
    vkp_broadcast_config config; /* a copy; config.env is not NULL */
    size_t words;                /* of one value */
    size_t stride;               /* words of one place: seq, value, and with retain a latch */
    uint64_t mask;               /* number of places - 1; the number is a power of two */
    size_t refs;                 /* atomic: one of all senders together, one of each receiver */
    size_t tx_refs;              /* atomic: references of senders */
    uint64_t *places; /* the ring; word 0 of a place is its seq, 0 before the first value */
    unsigned char pad_sender[VKP_I_APART];
    uint64_t tail;            /* atomic: the next ticket */
    vkp_i_biased_latch latch; /* held by the sender that writes */
    vkp_i_receivers receivers;
} vkp_i_broadcast;

struct vkp_broadcast_tx {
    vkp_i_broadcast channel;
};

struct vkp_broadcast_rx {
    vkp_i_broadcast *channel;
    uint64_t next;   /* ticket of the next value to receive */
    uint64_t missed; /* values lost at the last LAGGED */
};

/* The place of the ticket; its first word is the seq. */
static uint64_t *vkp_i_place(const vkp_i_broadcast *channel, uint64_t ticket)
{
    return channel->places + (size_t)(ticket & channel->mask) * channel->stride;
}

/* The latch of a place, behind its value; only in channels with retain. */
static uint32_t *vkp_i_place_latch(const vkp_i_broadcast *channel, uint64_t *place)
{
    return (uint32_t *)(void *)(place + 1 + channel->words);
}

/* The seq of a place that holds the value of the ticket: even, and not 0. */
static uint64_t vkp_i_place_seq(uint64_t ticket)
{
    return (ticket + 1) << 1;
}

/* Give one of `refs` back; the last one drops the values in the ring and frees the channel. */
static void vkp_i_broadcast_unref(vkp_i_broadcast *channel)
{
    const vkp_env *env = channel->config.env;
    uint64_t i;
    if (VKP_I_UNREF(&channel->refs) != 1) {
        return;
    }
    for (i = 0; channel->config.drop != NULL && i <= channel->mask; i++) {
        uint64_t *place = vkp_i_place(channel, i);
        if (VKP_I_LOAD(place) != 0) {
            channel->config.drop(channel->config.user, place + 1);
        }
    }
    vkp_i_free(env, channel->places,
               (size_t)(channel->mask + 1) * channel->stride * sizeof(uint64_t));
    vkp_i_receivers_deinit(&channel->receivers);
    vkp_i_free(env, channel, sizeof *channel);
}

VKP_API vkp_status vkp_broadcast_open(const vkp_broadcast_config *config, vkp_broadcast_tx **tx)
{
    const vkp_env *env;
    vkp_i_broadcast *channel;
    size_t capacity = 1;
    VKP_I_REQUIRE(config != NULL && tx != NULL && config->capacity_items > 0);
    VKP_I_REQUIRE(config->elem_bytes > 0 && config->elem_bytes <= VKP_I_ELEM_MAX);
    VKP_I_REQUIRE((config->retain == NULL) == (config->drop == NULL));
    VKP_I_REQUIRE(config->retain == NULL || config->elem_bytes <= VKP_I_OWNED_BYTES);
    env = vkp_i_env(config->env);
    channel = (vkp_i_broadcast *)vkp_i_alloc_zero(env, sizeof *channel);
    if (channel == NULL) {
        return VKP_ERR_NOMEM;
    }
    channel->config = *config;
    channel->config.env = env;
    channel->words = (config->elem_bytes + sizeof(uint64_t) - 1) / sizeof(uint64_t);
    channel->stride = 1 + channel->words + (config->retain != NULL ? 1u : 0u);
    while (capacity < config->capacity_items && capacity <= SIZE_MAX / 4) {
        capacity *= 2;
    }
    if (capacity >= config->capacity_items &&
        capacity <= SIZE_MAX / (channel->stride * sizeof(uint64_t))) {
        channel->places =
            (uint64_t *)vkp_i_alloc_zero(env, capacity * channel->stride * sizeof(uint64_t));
    }
    if (channel->places == NULL) {
        vkp_i_free(env, channel, sizeof *channel);
        return VKP_ERR_NOMEM;
    }
    channel->mask = capacity - 1;
    channel->refs = 1;
    channel->tx_refs = 1;
    vkp_i_receivers_init(&channel->receivers, env);
    vkp_i_biased_init(&channel->latch, channel->receivers.fenced);
    *tx = (vkp_broadcast_tx *)(void *)channel;
    return VKP_OK;
}

VKP_API vkp_broadcast_tx *vkp_broadcast_tx_ref(vkp_broadcast_tx *tx)
{
    (void)VKP_I_ADD(&tx->channel.tx_refs, (size_t)1);
    return tx;
}

VKP_API void vkp_broadcast_tx_unref(vkp_broadcast_tx *tx)
{
    if (tx != NULL && VKP_I_UNREF(&tx->channel.tx_refs) == 1) {
        vkp_i_receivers_end(&tx->channel.receivers);
        vkp_i_broadcast_unref(&tx->channel);
    }
}

/* A receiver of the values sent from now on. OK or NOMEM. */
static vkp_status vkp_i_broadcast_subscribe(vkp_i_broadcast *channel, vkp_broadcast_rx **rx)
{
    vkp_broadcast_rx *self =
        (vkp_broadcast_rx *)vkp_i_alloc_zero(channel->config.env, sizeof *self);
    if (self == NULL) {
        return VKP_ERR_NOMEM;
    }
    self->channel = channel;
    (void)VKP_I_ADD(&channel->refs, (size_t)1);
    (void)VKP_I_ADD(&channel->receivers.receivers, (size_t)1);
    self->next = VKP_I_LOAD_ACQ(&channel->tail);
    *rx = self;
    return VKP_OK;
}

VKP_API vkp_status vkp_broadcast_subscribe(vkp_broadcast_tx *tx, vkp_broadcast_rx **rx)
{
    VKP_I_REQUIRE(tx != NULL && rx != NULL);
    return vkp_i_broadcast_subscribe(&tx->channel, rx);
}

VKP_API vkp_status vkp_broadcast_resubscribe(vkp_broadcast_rx *rx, vkp_broadcast_rx **fresh)
{
    VKP_I_REQUIRE(rx != NULL && fresh != NULL);
    return vkp_i_broadcast_subscribe(rx->channel, fresh);
}

VKP_API void vkp_broadcast_rx_unref(vkp_broadcast_rx *rx)
{
    vkp_i_broadcast *channel;
    if (rx == NULL) {
        return;
    }
    channel = rx->channel;
    vkp_i_receivers_remove(&channel->receivers);
    vkp_i_free(channel->config.env, rx, sizeof *rx);
    vkp_i_broadcast_unref(channel);
}

/* Latched: write the value into its place. True when it replaced a value that owns something:
   that value is in *old then, and the caller drops it.                                         */
static bool vkp_i_place_write(vkp_i_broadcast *channel, uint64_t ticket, const void *item,
                              void *old)
{
    uint64_t *place = vkp_i_place(channel, ticket);
    bool replaced = false;
    if (channel->config.retain != NULL) {
        vkp_i_latch_lock(vkp_i_place_latch(channel, place), vkp_i_sys(channel->config.env));
        replaced = VKP_I_LOAD(place) != 0;
        if (replaced) {
            VKP_I_COPY_OUT(old, place + 1, channel->config.elem_bytes);
        }
        VKP_I_COPY_IN(place + 1, item, channel->config.elem_bytes);
        VKP_I_STORE_REL(place, vkp_i_place_seq(ticket));
        vkp_i_latch_unlock(vkp_i_place_latch(channel, place));
    } else {
        VKP_I_STORE(place, VKP_I_LOAD(place) | 1u);
        vkp_i_words_store(place + 1, item, channel->config.elem_bytes);
        VKP_I_STORE_REL(place, vkp_i_place_seq(ticket));
    }
    return replaced;
}

VKP_API vkp_status vkp_broadcast_send(vkp_broadcast_tx *tx, const void *item)
{
    vkp_i_broadcast *channel;
    uint64_t old[VKP_I_OWNED_BYTES / sizeof(uint64_t)];
    bool drops;
    bool biased;
    VKP_I_REQUIRE(tx != NULL && item != NULL);
    channel = &tx->channel;
    if (vkp_i_receivers_size(&channel->receivers) == 0) {
        return VKP_ERR_CLOSED;
    }
    biased = vkp_i_biased_lock(&channel->latch, channel->config.env);
    {
        uint64_t ticket = VKP_I_LOAD(&channel->tail);
        drops = vkp_i_place_write(channel, ticket, item, old);
        VKP_I_STORE_REL(&channel->tail, ticket + 1);
    }
    vkp_i_biased_unlock(&channel->latch, biased);
    if (drops) {
        channel->config.drop(channel->config.user, old);
    }
    vkp_i_receivers_signal(&channel->receivers);
    return VKP_OK;
}

/* Copy the value of the ticket out; false when its place holds a later one, or is being written. */
static inline bool vkp_i_place_read(const vkp_i_broadcast *channel, uint64_t ticket, void *out)
{
    uint64_t *place = vkp_i_place(channel, ticket);
    uint64_t seq = vkp_i_place_seq(ticket);
    bool held;
    if (channel->config.retain == NULL) {
        if (VKP_I_LOAD_ACQ(place) != seq) {
            return false;
        }
        vkp_i_words_load(out, place + 1, channel->config.elem_bytes);
        return VKP_I_LOAD(place) == seq;
    }
    vkp_i_latch_lock(vkp_i_place_latch(channel, place), vkp_i_sys(channel->config.env));
    held = VKP_I_LOAD_ACQ(place) == seq;
    if (held) {
        VKP_I_COPY_OUT(out, place + 1, channel->config.elem_bytes);
        channel->config.retain(channel->config.user, out);
    }
    vkp_i_latch_unlock(vkp_i_place_latch(channel, place));
    return held;
}

/* The path of nearly every value; false, and nothing is taken, when it is not there or lost. */
static inline bool vkp_i_broadcast_take_one(vkp_broadcast_rx *rx, void *out)
{
    const vkp_i_broadcast *channel = rx->channel;
    if (rx->next == VKP_I_LOAD_ACQ(&channel->tail) || !vkp_i_place_read(channel, rx->next, out)) {
        return false;
    }
    rx->next++;
    return true;
}

/* Take up to `capacity` values without waiting: OK with their number, EMPTY, CLOSED, or LAGGED,
   which moves the receiver to the oldest value that is left.                                   */
static vkp_status vkp_i_broadcast_take(vkp_broadcast_rx *rx, uint8_t *out, size_t capacity,
                                       size_t *count)
{
    vkp_i_broadcast *channel = rx->channel;
    bool ended = vkp_i_receivers_is_ended(&channel->receivers);
    /* `tail` is loaded after `ended`: no value follows the end. */
    uint64_t tail = VKP_I_LOAD_ACQ(&channel->tail);
    size_t taken = 0;
    if (rx->next == tail) {
        return ended ? VKP_ERR_CLOSED : VKP_ERR_EMPTY;
    }
    while (taken < capacity && rx->next != tail && vkp_i_place_read(channel, rx->next, out)) {
        out += channel->config.elem_bytes;
        rx->next++;
        taken++;
    }
    if (taken == 0) {
        uint64_t oldest;
        tail = VKP_I_LOAD_ACQ(&channel->tail);
        oldest = tail > channel->mask ? tail - (channel->mask + 1) : 0;
        oldest = VKP_I_MAX(oldest, rx->next + 1); /* a sender replaces that of `next` */
        rx->missed = oldest - rx->next;
        rx->next = oldest;
        return VKP_ERR_LAGGED;
    }
    *count = taken;
    return VKP_OK;
}

static vkp_status vkp_i_case_value_attempt(vkp_case *each, vkp_i_wait *wait)
{
    size_t count;
    (void)wait;
    return vkp_i_broadcast_take((vkp_broadcast_rx *)each->i_object, (uint8_t *)each->i_out, 1,
                                &count);
}

/* As vkp_i_case_value_attempt, for several values: i_out is a vkp_i_batch. */
static vkp_status vkp_i_case_values_attempt(vkp_case *each, vkp_i_wait *wait)
{
    vkp_i_batch *batch = (vkp_i_batch *)each->i_out;
    (void)wait;
    return vkp_i_broadcast_take((vkp_broadcast_rx *)each->i_object, (uint8_t *)batch->out,
                                batch->capacity, &batch->count);
}

static bool vkp_i_case_value_is_ready(const vkp_case *each)
{
    const vkp_broadcast_rx *rx = (const vkp_broadcast_rx *)each->i_object;
    return vkp_i_receivers_is_ended(&rx->channel->receivers) ||
           VKP_I_LOAD_ACQ(&rx->channel->tail) != rx->next;
}

static void vkp_i_case_value_leave(const vkp_case *each, vkp_i_wait *wait)
{
    vkp_i_receivers_leave(&((vkp_broadcast_rx *)each->i_object)->channel->receivers, &wait->node);
}

static bool vkp_i_case_value_join(const vkp_case *each, vkp_i_wait *wait)
{
    vkp_i_receivers_join(&((vkp_broadcast_rx *)each->i_object)->channel->receivers, &wait->node);
    if (vkp_i_case_value_is_ready(each)) {
        vkp_i_case_value_leave(each, wait);
        return false;
    }
    return true;
}

static const vkp_env *vkp_i_case_value_env(const vkp_case *each)
{
    return ((vkp_broadcast_rx *)each->i_object)->channel->config.env;
}

static const vkp_i_case_kind vkp_i_case_value = {vkp_i_case_value_attempt,
                                                 vkp_i_case_value_is_ready, vkp_i_case_value_join,
                                                 vkp_i_case_value_leave, vkp_i_case_value_env};
static const vkp_i_case_kind vkp_i_case_values = {vkp_i_case_values_attempt,
                                                  vkp_i_case_value_is_ready, vkp_i_case_value_join,
                                                  vkp_i_case_value_leave, vkp_i_case_value_env};

VKP_API vkp_case vkp_case_broadcast_recv(vkp_broadcast_rx *rx, void *out)
{
    return rx != NULL ? vkp_i_case(&vkp_i_case_value, rx, out) : vkp_case_never();
}

VKP_API vkp_status vkp_broadcast_try_recv(vkp_broadcast_rx *rx, void *out)
{
    size_t count;
    VKP_I_REQUIRE(rx != NULL && out != NULL);
    return vkp_i_broadcast_take_one(rx, out) ? VKP_OK
                                             : vkp_i_broadcast_take(rx, (uint8_t *)out, 1, &count);
}

VKP_API vkp_status vkp_broadcast_recv_many(vkp_broadcast_rx *rx, uint64_t deadline_ns, void *out,
                                           size_t capacity, size_t *count)
{
    vkp_i_batch batch;
    vkp_case values;
    vkp_status status;
    VKP_I_REQUIRE(rx != NULL && out != NULL && capacity > 0 && count != NULL);
    batch.out = out;
    batch.capacity = capacity;
    values = vkp_i_case(&vkp_i_case_values, rx, &batch);
    status = vkp_i_select_few(&values, 1, rx->channel->config.env, rx->channel->receivers.spins,
                              deadline_ns);
    if (status == VKP_OK) {
        *count = batch.count;
    }
    return status;
}

VKP_API vkp_status vkp_broadcast_recv(vkp_broadcast_rx *rx, uint64_t deadline_ns, void *out)
{
    size_t count;
    VKP_I_REQUIRE(rx != NULL && out != NULL);
    return vkp_i_broadcast_take_one(rx, out)
               ? VKP_OK
               : vkp_broadcast_recv_many(rx, deadline_ns, out, 1, &count);
}

VKP_API uint64_t vkp_broadcast_get_missed(const vkp_broadcast_rx *rx)
{
    return rx->missed;
}

VKP_API uint64_t vkp_broadcast_get_len(const vkp_broadcast_rx *rx)
{
    return VKP_I_LOAD_ACQ(&rx->channel->tail) - rx->next;
}

VKP_API size_t vkp_broadcast_get_receivers(const vkp_broadcast_tx *tx)
{
    return vkp_i_receivers_size(&tx->channel.receivers);
}

VKP_API vkp_case vkp_case_broadcast_closed(vkp_broadcast_tx *tx)
{
    return tx != NULL ? vkp_i_case(&vkp_i_case_no_receivers, &tx->channel.receivers, NULL)
                      : vkp_case_never();
}

VKP_API vkp_status vkp_broadcast_wait_closed(vkp_broadcast_tx *tx, uint64_t deadline_ns)
{
    VKP_I_REQUIRE(tx != NULL);
    return vkp_i_receivers_wait_gone(&tx->channel.receivers, deadline_ns);
}
