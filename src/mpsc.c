/* ======================================================================================
   >>impl-mpsc-ends   mpsc: opening, closing, cases
   ======================================================================================
   `handles` counts the senders: when it reaches 0 the channel has ended (VKP_I_ENDED_SENDERS), and
   the receiver is woken. `refs` counts all senders as one, the receiver, and each weak sender:
   when it reaches 0 the memory is freed.
   vkp_mpsc_close freezes all lanes permanently, sets VKP_I_ENDED_CLOSED, and wakes waiting
   senders, waits for the close, and the receiver, all under the mutex. Places that were reserved
   before are still received. After vkp_mpsc_rx_unref raised VKP_I_RX_GONE, a sender that publishes
   drops the value itself.
   A case that sends has its wait in `senders`, without `item`: it takes the room in its attempt. */

/* Give one of `refs` back; the last one frees the channel. */
static void vkp_i_channel_unref(vkp_i_channel *channel)
{
    const vkp_env *env = channel->config.env;
    if (VKP_I_UNREF(&channel->refs) != 1) {
        return;
    }
    while (channel->retired != NULL) {
        vkp_i_ring *next = channel->retired->next;
        vkp_i_ring_close(env, channel->retired);
        channel->retired = next;
    }
    while (channel->lane.next != NULL) {
        vkp_i_lane *lane = channel->lane.next;
        channel->lane.next = lane->next;
        vkp_i_lane_free(lane);
    }
    vkp_i_lane_free(&channel->lane);
    VKP_I_MUTEX_DEINIT(&channel->mutex);
    vkp_i_free(env, channel, sizeof *channel);
}

/* Prepare a zeroed lane, which has no ring. */
static void vkp_i_lane_init(vkp_i_lane *lane, vkp_i_channel *channel)
{
    lane->channel = channel;
    lane->tail = VKP_I_TAIL_SLOW; /* the slow path opens the ring */
    lane->bias.owner = channel->fenced ? VKP_I_SHARED : VKP_I_NOBODY;
    lane->plain = !channel->evicts && !channel->fenced && channel->config.capacity_bytes == 0;
    vkp_i_waiters_init(&lane->senders);
}

/* Open a channel; `evicts` allows vkp_i_mpsc_send_evict. OK or NOMEM. */
static vkp_status vkp_i_mpsc_open(const vkp_mpsc_config *config, bool evicts, vkp_mpsc_tx **tx,
                                  vkp_mpsc_rx **rx)
{
    const vkp_env *env = vkp_i_env(config->env);
    vkp_i_channel *channel = (vkp_i_channel *)vkp_i_alloc_zero(env, sizeof *channel);
    if (channel == NULL) {
        return VKP_ERR_NOMEM;
    }
    channel->config = *config;
    channel->config.env = env;
    channel->capacity = config->capacity_items != 0 ? config->capacity_items : UINT64_MAX;
    channel->tx.lane = &channel->lane;
    channel->tx.refs = 1;
    channel->handles = 1;
    channel->rx_lane = &channel->lane;
    channel->rx.channel = channel;
    channel->weak.channel = channel;
    channel->refs = 2;
    channel->evicts = evicts;
    channel->fenced = vkp_i_flag_prepare(env);
    channel->spins = vkp_i_spins(env);
    VKP_I_MUTEX_INIT(&channel->mutex);
    vkp_i_waiters_init(&channel->receiver);
    vkp_i_waiters_init(&channel->closers);
    vkp_i_lane_init(&channel->lane, channel);
    channel->lane.linked = true;
    *tx = &channel->tx;
    *rx = &channel->rx;
    return VKP_OK;
}

VKP_API vkp_status vkp_mpsc_open(const vkp_mpsc_config *config, vkp_mpsc_tx **tx, vkp_mpsc_rx **rx)
{
    VKP_I_REQUIRE(config != NULL && tx != NULL && rx != NULL);
    VKP_I_REQUIRE(config->elem_bytes > 0 && config->elem_bytes <= VKP_I_ELEM_MAX);
    VKP_I_REQUIRE(!config->lanes || config->capacity_bytes == 0);
    return vkp_i_mpsc_open(config, false, tx, rx);
}

VKP_API vkp_mpsc_tx *vkp_mpsc_tx_ref(vkp_mpsc_tx *tx)
{
    (void)VKP_I_ADD(&tx->refs, (size_t)1);
    return tx;
}

/* Give one of `handles` back; the last one ends the channel. */
static void vkp_i_channel_remove_sender(vkp_i_channel *channel)
{
    if (VKP_I_UNREF(&channel->handles) == 1) {
        VKP_I_LOCK(&channel->mutex);
        (void)VKP_I_OR(&channel->ended, VKP_I_ENDED_SENDERS);
        vkp_i_channel_wake_receiver(channel);
        VKP_I_UNLOCK(&channel->mutex);
        vkp_i_channel_unref(channel);
    }
}

/* Make a sender with a lane of its own; the caller has counted it in `handles`. */
static vkp_status vkp_i_channel_add_lane(vkp_i_channel *channel, vkp_mpsc_tx **tx)
{
    vkp_i_extra_lane *extra =
        (vkp_i_extra_lane *)vkp_i_alloc_zero(channel->config.env, sizeof *extra);
    if (extra == NULL) {
        vkp_i_channel_remove_sender(channel);
        return VKP_ERR_NOMEM;
    }
    vkp_i_lane_init(&extra->lane, channel);
    extra->tx.lane = &extra->lane;
    extra->tx.refs = 1;
    *tx = &extra->tx;
    return VKP_OK;
}

VKP_API vkp_status vkp_mpsc_tx_clone(vkp_mpsc_tx *tx, vkp_mpsc_tx **clone)
{
    vkp_i_channel *channel;
    VKP_I_REQUIRE(tx != NULL && clone != NULL);
    channel = tx->lane->channel;
    if (!channel->config.lanes) {
        *clone = vkp_mpsc_tx_ref(tx);
        return VKP_OK;
    }
    (void)VKP_I_ADD(&channel->handles, (size_t)1);
    return vkp_i_channel_add_lane(channel, clone);
}

VKP_API void vkp_mpsc_tx_unref(vkp_mpsc_tx *tx)
{
    vkp_i_channel *channel;
    if (tx == NULL) {
        return;
    }
    channel = tx->lane->channel;
    if (VKP_I_UNREF(&tx->refs) == 1) {
        if (!tx->lane->linked) {
            vkp_i_lane_free(tx->lane); /* never used: nothing points to it */
        } else if (tx != &channel->tx) {
            VKP_I_STORE_REL(&tx->lane->dead, 1u); /* the receiver may free tx now */
        }
        vkp_i_channel_remove_sender(channel);
    }
}

VKP_API vkp_mpsc_weak *vkp_mpsc_downgrade(vkp_mpsc_tx *tx)
{
    vkp_i_channel *channel = tx->lane->channel;
    (void)VKP_I_ADD(&channel->refs, (size_t)1);
    (void)VKP_I_ADD(&channel->weak.refs, (size_t)1);
    return &channel->weak;
}

VKP_API vkp_status vkp_mpsc_upgrade(vkp_mpsc_weak *weak, vkp_mpsc_tx **tx)
{
    vkp_i_channel *channel;
    size_t *senders;
    size_t count;
    VKP_I_REQUIRE(weak != NULL && tx != NULL);
    channel = weak->channel;
    senders = channel->config.lanes ? &channel->handles : &channel->tx.refs;
    count = VKP_I_LOAD(senders);
    while (count != 0) {
        if (VKP_I_CAS(senders, &count, count + 1)) {
            if (channel->config.lanes) {
                return vkp_i_channel_add_lane(channel, tx);
            }
            *tx = &channel->tx;
            return VKP_OK;
        }
    }
    return VKP_ERR_CLOSED;
}

VKP_API void vkp_mpsc_weak_unref(vkp_mpsc_weak *weak)
{
    if (weak != NULL) {
        (void)VKP_I_SUB(&weak->refs, (size_t)1);
        vkp_i_channel_unref(weak->channel);
    }
}

VKP_API bool vkp_mpsc_is_closed(const vkp_mpsc_tx *tx)
{
    return (VKP_I_LOAD_ACQ(&tx->lane->channel->ended) & VKP_I_ENDED_CLOSED) != 0;
}

VKP_API size_t vkp_mpsc_get_room(const vkp_mpsc_tx *tx)
{
    const vkp_i_lane *lane = tx->lane;
    uint64_t capacity = lane->channel->capacity;
    uint64_t head = VKP_I_LOAD_ACQ(&lane->head);
    uint64_t used = vkp_i_used(VKP_I_LOAD_ACQ(&lane->tail) >> 1, head);
    return capacity == UINT64_MAX ? SIZE_MAX : (size_t)(capacity - VKP_I_MIN(used, capacity));
}

VKP_API size_t vkp_mpsc_get_capacity(const vkp_mpsc_tx *tx)
{
    return tx->lane->channel->config.capacity_items;
}

VKP_API size_t vkp_mpsc_get_senders(const vkp_mpsc_tx *tx)
{
    const vkp_i_channel *channel = tx->lane->channel;
    return VKP_I_LOAD(channel->config.lanes ? &channel->handles : &tx->refs);
}

VKP_API size_t vkp_mpsc_get_weak_senders(const vkp_mpsc_tx *tx)
{
    return VKP_I_LOAD(&tx->lane->channel->weak.refs);
}

VKP_API void vkp_mpsc_close(vkp_mpsc_rx *rx)
{
    vkp_i_channel *channel;
    vkp_i_lane *lane;
    if (rx == NULL) {
        return;
    }
    channel = rx->channel;
    lane = &channel->lane;
    VKP_I_LOCK(&channel->mutex);
    for (; lane != NULL; lane = VKP_I_LOAD(&lane->next)) {
        (void)vkp_i_lane_freeze(lane); /* permanently: no ticket is given after this */
    }
    (void)VKP_I_OR(&channel->ended, VKP_I_ENDED_CLOSED);
    for (lane = &channel->lane; lane != NULL; lane = VKP_I_LOAD(&lane->next)) {
        while (!vkp_i_waiters_empty(&lane->senders)) {
            vkp_i_wait *sender = VKP_CONTAINER(lane->senders.head.next, vkp_i_wait, node);
            vkp_i_sender_finish(sender, VKP_ERR_CLOSED);
        }
        vkp_i_flag_lower(&lane->tx_waiting, 1u);
    }
    vkp_i_waiters_wake_all(&channel->closers);
    vkp_i_channel_wake_receiver(channel);
    VKP_I_UNLOCK(&channel->mutex);
}

VKP_API void vkp_mpsc_rx_unref(vkp_mpsc_rx *rx)
{
    vkp_i_channel *channel;
    if (rx == NULL) {
        return;
    }
    channel = rx->channel;
    vkp_mpsc_close(rx);
    /* From here on a sender that publishes late drops its value itself. */
    vkp_i_flag_raise(&channel->flags, VKP_I_RX_GONE);
    vkp_i_flag_fence(channel->config.env, channel->fenced);
    vkp_i_channel_purge(channel);
    vkp_i_channel_unref(channel);
}

static vkp_status vkp_i_case_closed_attempt(vkp_case *each, vkp_i_wait *wait)
{
    (void)wait;
    return vkp_mpsc_is_closed(&((vkp_i_channel *)each->i_object)->tx) ? VKP_OK : VKP_ERR_EMPTY;
}

static bool vkp_i_case_closed_is_ready(const vkp_case *each)
{
    return vkp_mpsc_is_closed(&((vkp_i_channel *)each->i_object)->tx);
}

static bool vkp_i_case_closed_join(const vkp_case *each, vkp_i_wait *wait)
{
    vkp_i_channel *channel = (vkp_i_channel *)each->i_object;
    bool closed;
    VKP_I_LOCK(&channel->mutex);
    closed = vkp_mpsc_is_closed(&channel->tx);
    if (!closed) {
        vkp_i_waiter_link(&channel->closers, &wait->node);
    }
    VKP_I_UNLOCK(&channel->mutex);
    return !closed;
}

static void vkp_i_case_closed_leave(const vkp_case *each, vkp_i_wait *wait)
{
    vkp_i_channel *channel = (vkp_i_channel *)each->i_object;
    VKP_I_LOCK(&channel->mutex);
    (void)vkp_i_waiter_unlink(&wait->node);
    VKP_I_UNLOCK(&channel->mutex);
}

static const vkp_i_case_kind vkp_i_case_closed = {
    vkp_i_case_closed_attempt, vkp_i_case_closed_is_ready, vkp_i_case_closed_join,
    vkp_i_case_closed_leave, vkp_i_case_recv_env};

VKP_API vkp_status vkp_mpsc_wait_closed(vkp_mpsc_tx *tx, uint64_t deadline_ns)
{
    vkp_i_channel *channel;
    vkp_case closed;
    VKP_I_REQUIRE(tx != NULL);
    channel = tx->lane->channel;
    closed = vkp_i_case(&vkp_i_case_closed, channel, NULL);
    return vkp_i_select_few(&closed, 1, channel->config.env, 0, deadline_ns);
}

/* The cases of a sender; their i_object is the lane, i_out the item or the permit. While such a
   case waits, its wait is linked in `senders`. FULL means not ready, which is EMPTY in a case. */
static vkp_status vkp_i_case_send_outcome(vkp_status status)
{
    return status == VKP_ERR_FULL ? VKP_ERR_EMPTY : status;
}

static vkp_status vkp_i_case_send_attempt(vkp_case *each, vkp_i_wait *wait)
{
    vkp_i_lane *lane = (vkp_i_lane *)each->i_object;
    return vkp_i_case_send_outcome(wait == NULL
                                       ? vkp_i_lane_try(lane, each->i_out, NULL)
                                       : vkp_i_lane_claim_place(lane, wait, each->i_out, NULL));
}

static vkp_status vkp_i_case_reserve_attempt(vkp_case *each, vkp_i_wait *wait)
{
    vkp_i_lane *lane = (vkp_i_lane *)each->i_object;
    vkp_mpsc_permit *permit = (vkp_mpsc_permit *)each->i_out;
    if (lane->channel->config.capacity_bytes != 0) {
        return VKP_ERR_INVALID; /* as vkp_mpsc_reserve: the cost is not known yet */
    }
    return vkp_i_case_send_outcome(wait == NULL ? vkp_i_lane_try(lane, NULL, permit)
                                                : vkp_i_lane_claim_place(lane, wait, NULL, permit));
}

static bool vkp_i_case_send_is_ready(const vkp_case *each)
{
    vkp_i_lane *lane = (vkp_i_lane *)each->i_object;
    bool ready;
    VKP_I_LOCK(&lane->channel->mutex);
    ready = vkp_mpsc_is_closed(&lane->channel->tx) ||
            (vkp_i_waiters_empty(&lane->senders) &&
             vkp_i_lane_has_room(lane, VKP_I_LOAD_ACQ(&lane->tail) >> 1, 0));
    VKP_I_UNLOCK(&lane->channel->mutex);
    return ready;
}

static bool vkp_i_case_send_join(const vkp_case *each, vkp_i_wait *wait)
{
    vkp_i_lane *lane = (vkp_i_lane *)each->i_object;
    wait->cost = vkp_i_channel_cost(lane->channel, each->i_out);
    vkp_i_lane_join(lane, wait);
    return true;
}

static bool vkp_i_case_reserve_join(const vkp_case *each, vkp_i_wait *wait)
{
    vkp_i_lane_join((vkp_i_lane *)each->i_object, wait);
    return true;
}

static void vkp_i_case_send_leave(const vkp_case *each, vkp_i_wait *wait)
{
    (void)vkp_i_lane_leave((vkp_i_lane *)each->i_object, wait);
}

static const vkp_env *vkp_i_case_send_env(const vkp_case *each)
{
    return ((vkp_i_lane *)each->i_object)->channel->config.env;
}

static const vkp_i_case_kind vkp_i_case_send = {vkp_i_case_send_attempt, vkp_i_case_send_is_ready,
                                                vkp_i_case_send_join, vkp_i_case_send_leave,
                                                vkp_i_case_send_env};
static const vkp_i_case_kind vkp_i_case_reserve = {
    vkp_i_case_reserve_attempt, vkp_i_case_send_is_ready, vkp_i_case_reserve_join,
    vkp_i_case_send_leave, vkp_i_case_send_env};

VKP_API vkp_case vkp_case_mpsc_recv(vkp_mpsc_rx *rx, void *out)
{
    return rx != NULL ? vkp_i_case(&vkp_i_case_recv, rx->channel, out) : vkp_case_never();
}

VKP_API vkp_case vkp_case_mpsc_send(vkp_mpsc_tx *tx, const void *item)
{
    return tx != NULL && item != NULL
               ? vkp_i_case(&vkp_i_case_send, tx->lane, (void *)(uintptr_t)item)
               : vkp_case_never();
}

VKP_API vkp_case vkp_case_mpsc_reserve(vkp_mpsc_tx *tx, vkp_mpsc_permit *permit)
{
    return tx != NULL && permit != NULL ? vkp_i_case(&vkp_i_case_reserve, tx->lane, permit)
                                        : vkp_case_never();
}

VKP_API vkp_case vkp_case_mpsc_closed(vkp_mpsc_tx *tx)
{
    return tx != NULL ? vkp_i_case(&vkp_i_case_closed, tx->lane->channel, NULL) : vkp_case_never();
}

#if VKP_I_IO
/* For queues that prefer the newest value: send, or when full, take the oldest value out into
   *evicted (*was_evicted is true then) and try once more. FULL with an eviction: the value is
   larger than the place of the oldest one, so call again.                                      */
static vkp_status vkp_i_mpsc_send_evict(vkp_mpsc_tx *tx, const void *item, void *evicted,
                                        bool *was_evicted)
{
    vkp_i_lane *lane = tx->lane;
    vkp_i_channel *channel = lane->channel;
    size_t cost = vkp_i_channel_cost(channel, item);
    vkp_status status;
    *was_evicted = false;
    VKP_I_LOCK(&channel->mutex);
    status = vkp_i_lane_send_locked(lane, item, cost, NULL, NULL);
    if (status == VKP_ERR_FULL) {
        const uint8_t *oldest = vkp_i_lane_oldest(lane);
        if (oldest != NULL) {
            memcpy(evicted, oldest, channel->config.elem_bytes);
            vkp_i_lane_pop(lane, oldest);
            *was_evicted = true;
            status = vkp_i_lane_send_locked(lane, item, cost, NULL, NULL);
        }
    }
    VKP_I_UNLOCK(&channel->mutex);
    return status;
}

/* The cost of the next value of the first lane; false when there is none. Receiver's thread. */
static bool vkp_i_mpsc_next_cost(const vkp_mpsc_rx *rx, size_t *cost)
{
    vkp_i_channel *channel = rx->channel;
    const uint8_t *item;
    VKP_I_LOCK(&channel->mutex);
    item = vkp_i_lane_oldest(&channel->lane);
    if (item != NULL) {
        *cost = vkp_i_channel_cost(channel, item);
    }
    VKP_I_UNLOCK(&channel->mutex);
    return item != NULL;
}
#endif
