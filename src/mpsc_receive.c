/* ======================================================================================
   >>impl-mpsc-receive   mpsc: the receiver's side
   ======================================================================================
   The receiver's thread runs this section; where senders may evict (`evicts`), under the mutex
   too. The acquire of a stamp pairs with its release by the sender: the value is complete. After
   it stored `head` the receiver checks the flag `tx_waiting`, and lets waiting senders in under
   the mutex.
   Before it sleeps the receiver links its waiter, raises VKP_I_RX_WAITING, and checks once more; a
   sender that publishes, a close and the end of the last sender wake it.
   With several lanes the receiver takes at most VKP_I_LANE_TURN values from one lane while others
   have values. Only the receiver frees rings and lanes that are no longer used, until it is gone
   itself: each search that is not the fast path ends in vkp_i_channel_tidy, so that all calls give
   memory back, and let waiting senders in, in the same way.                                    */

/* Let in senders that wait, and cannot see the places just freed. */
static void vkp_i_lane_admit_waiting(vkp_i_lane *lane)
{
    VKP_I_LOCK(&lane->channel->mutex);
    vkp_i_lane_admit(lane);
    VKP_I_UNLOCK(&lane->channel->mutex);
}

/* After no value was found: EMPTY; CLOSED when the channel has ended and all lanes are empty; OK
   when a value arrived since.                                                                  */
static vkp_status vkp_i_channel_end(vkp_i_channel *channel)
{
    const vkp_i_lane *lane = &channel->lane;
    if (VKP_I_LOAD_ACQ(&channel->ended) == 0) {
        return VKP_ERR_EMPTY;
    }
    for (; lane != NULL; lane = VKP_I_LOAD_ACQ(&lane->next)) {
        if (VKP_I_LOAD_ACQ(&lane->tail) >> 1 != VKP_I_LOAD(&lane->head)) {
            return vkp_i_channel_find(channel) != NULL ? VKP_OK : VKP_ERR_EMPTY;
        }
    }
    return VKP_ERR_CLOSED;
}

/* Find the lane of the next value: OK, EMPTY or CLOSED. */
static inline vkp_status vkp_i_channel_next(vkp_i_channel *channel, vkp_i_lane **lane)
{
    vkp_status status = VKP_OK;
    *lane = vkp_i_channel_find(channel);
    if (*lane == NULL) {
        status = vkp_i_channel_end(channel);
        *lane = status == VKP_OK ? vkp_i_channel_find(channel) : NULL;
    }
    return status;
}

/* The path of nearly every value. False, and nothing is taken, when the value is not ready, the
   lane is not `plain`, or the turn of the lane ends with this value.                           */
static inline bool vkp_i_lane_recv_fast(vkp_i_lane *lane, void *out)
{
    vkp_i_ring *ring = VKP_I_LOAD_ACQ(&lane->rx_ring);
    uint64_t head = VKP_I_LOAD(&lane->head);
    if (!lane->plain || ring == NULL || (head + 1) % VKP_I_LANE_TURN == 0 ||
        VKP_I_LOAD_ACQ(vkp_i_ring_stamp(ring, head)) != vkp_i_stamp(head)) {
        return false;
    }
    VKP_I_COPY_OUT(out, vkp_i_ring_item(ring, head), ring->elem_bytes);
    VKP_I_STORE_REL(&lane->head, head + 1);
    if (vkp_i_flag_check(&lane->tx_waiting, false) != 0) {
        vkp_i_lane_admit_waiting(lane);
    }
    return true;
}

/* Take up to `capacity` values from the ring of `head`. Senders see freed places in bunches
   (VKP_I_BUNCH): the cache line of `head` would otherwise change hands for each value.         */
static size_t vkp_i_lane_take(vkp_i_lane *lane, uint8_t *out, size_t capacity)
{
    vkp_i_ring *ring = VKP_I_LOAD(&lane->rx_ring);
    uint64_t head = VKP_I_LOAD(&lane->head);
    uint64_t cost = VKP_I_LOAD(&lane->taken_cost);
    size_t taken = 0;
    while (taken < capacity && VKP_I_LOAD_ACQ(vkp_i_ring_stamp(ring, head)) == vkp_i_stamp(head)) {
        const uint8_t *item = vkp_i_ring_item(ring, head);
        VKP_I_COPY_OUT(out, item, ring->elem_bytes);
        if (lane->channel->config.capacity_bytes != 0) {
            cost += vkp_i_channel_cost(lane->channel, item);
            VKP_I_STORE(&lane->taken_cost, cost);
        }
        out += ring->elem_bytes;
        taken++;
        head++;
        if (taken % VKP_I_BUNCH == 0) {
            VKP_I_STORE_REL(&lane->head, head);
        }
    }
    VKP_I_STORE_REL(&lane->head, head);
    return taken;
}

/* After values were taken: let waiting senders in. Takes the mutex, which with `evicts` is held
   already.                                                                                     */
static void vkp_i_lane_freed(vkp_i_lane *lane)
{
    vkp_i_channel *channel = lane->channel;
    if (channel->evicts) {
        vkp_i_lane_admit(lane);
    } else if (vkp_i_flag_check(&lane->tx_waiting, channel->fenced) != 0) {
        vkp_i_lane_admit_waiting(lane);
    }
}

/* Take the mutex where senders may take the oldest value: the receiver needs it there, too. */
static void vkp_i_channel_hold(vkp_i_channel *channel)
{
    if (channel->evicts) {
        VKP_I_LOCK(&channel->mutex);
    }
}

/* Give back the mutex that vkp_i_channel_hold took. */
static void vkp_i_channel_release(vkp_i_channel *channel)
{
    if (channel->evicts) {
        VKP_I_UNLOCK(&channel->mutex);
    }
}

/* Locked: an empty lane frees its large ring. The lane is frozen and its last ticket received, so
   no sender uses the ring.                                                                     */
static void vkp_i_lane_trim(vkp_i_lane *lane)
{
    uint64_t ticket = vkp_i_lane_freeze(lane);
    if (vkp_i_lane_oldest(lane) == NULL && ticket == VKP_I_LOAD(&lane->head)) {
        vkp_i_ring *ring = VKP_I_LOAD(&lane->rx_ring);
        VKP_I_STORE_REL(&lane->ring, (vkp_i_ring *)NULL);
        VKP_I_STORE_REL(&lane->room, (uint64_t)0);
        VKP_I_STORE_REL(&lane->rx_ring, (vkp_i_ring *)NULL);
        vkp_i_ring_close(lane->channel->config.env, ring);
    }
    vkp_i_lane_thaw(lane, ticket);
}

/* The search found the lane empty: free the large ring that a burst needed, if the receiver
   `waits`, or if this was so in VKP_I_SHRINK_SEARCHES searches, with no value in between. A lane
   in use, which is empty for a moment, would need the ring again.                              */
static void vkp_i_lane_shrink(vkp_i_lane *lane, bool waits)
{
    vkp_i_channel *channel = lane->channel;
    const vkp_i_ring *ring = VKP_I_LOAD_ACQ(&lane->rx_ring);
    uint64_t head = VKP_I_LOAD(&lane->head);
    if (ring == NULL || ring->bytes <= VKP_I_RING_KEEP) {
        return;
    }
    lane->searches = lane->searched == head ? lane->searches + 1 : 1;
    lane->searched = head;
    if ((!waits && lane->searches < VKP_I_SHRINK_SEARCHES) ||
        VKP_I_LOAD_ACQ(&lane->tail) >> 1 != head) {
        return;
    }
    if (channel->evicts) {
        vkp_i_lane_trim(lane); /* the caller has the mutex */
    } else {
        VKP_I_LOCK(&channel->mutex);
        vkp_i_lane_trim(lane);
        VKP_I_UNLOCK(&channel->mutex);
    }
}

/* Free a lane that no thread uses any longer, with its rings. */
static void vkp_i_lane_free(vkp_i_lane *lane)
{
    const vkp_env *env = lane->channel->config.env;
    (void)vkp_i_lane_oldest(lane); /* frees the rings that have ended */
    vkp_i_ring_close(env, VKP_I_LOAD(&lane->rx_ring));
    if (lane != &lane->channel->lane) {
        vkp_i_free(env, VKP_CONTAINER(lane, vkp_i_extra_lane, lane), sizeof(vkp_i_extra_lane));
    }
}

/* Whether the sender of the lane is gone, and all its values were received. */
static bool vkp_i_lane_is_over(vkp_i_lane *lane)
{
    return VKP_I_LOAD_ACQ(&lane->dead) != 0 && vkp_i_lane_oldest(lane) == NULL &&
           VKP_I_LOAD(&lane->tail) >> 1 == VKP_I_LOAD(&lane->head);
}

/* Unlink a lane that is over, and free it; `before` is a lane before it in the list. */
static void vkp_i_channel_remove_lane(vkp_i_channel *channel, vkp_i_lane *before, vkp_i_lane *lane)
{
    VKP_I_LOCK(&channel->mutex);
    while (VKP_I_LOAD(&before->next) != lane) {
        before = VKP_I_LOAD(&before->next); /* a new lane was linked meanwhile */
    }
    VKP_I_STORE_REL(&before->next, VKP_I_LOAD(&lane->next));
    VKP_I_UNLOCK(&channel->mutex);
    if (channel->rx_lane == lane) {
        channel->rx_lane = vkp_i_lane_after(before);
    }
    vkp_i_lane_free(lane);
}

/* The search found the lane empty: free its large ring (see vkp_i_lane_shrink), or the lane itself
   if it is over: true. `before` is a lane before it in the list.                               */
static bool vkp_i_lane_tidy(vkp_i_lane *lane, vkp_i_lane *before, bool waits)
{
    lane->found_empty = false;
    if (vkp_i_lane_is_over(lane)) {
        vkp_i_channel_remove_lane(lane->channel, before, lane);
        return true;
    }
    vkp_i_lane_shrink(lane, waits);
    return false;
}

/* After each search: let waiting senders in where values were taken or aborted places passed; of
   the lanes that the search found empty, free those that are over, and large rings. `waits`: the
   search found no value, and the receiver is about to wait.
   Takes the mutex, which with `evicts` is held already.                                        */
static void vkp_i_channel_tidy(vkp_i_channel *channel, bool waits)
{
    vkp_i_lane *before = &channel->lane;
    vkp_i_lane *lane = before;
    do {
        if (!lane->found_empty || !vkp_i_lane_tidy(lane, before, waits)) {
            vkp_i_lane_freed(lane);
            before = lane;
        }
        lane = VKP_I_LOAD_ACQ(&before->next);
    } while (lane != NULL);
}

/* Take up to `capacity` values without waiting: OK with their number, EMPTY or CLOSED. */
static vkp_status vkp_i_channel_try_recv(vkp_i_channel *channel, void *out, size_t capacity,
                                         size_t *count)
{
    vkp_status status;
    size_t taken = 0;
    vkp_i_lane *lane;
    vkp_i_channel_hold(channel);
    status = vkp_i_channel_next(channel, &lane);
    while (lane != NULL && taken < capacity) {
        uint8_t *to = (uint8_t *)out + taken * channel->config.elem_bytes;
        size_t turn = VKP_I_LANE_TURN - (size_t)(VKP_I_LOAD(&lane->head) % VKP_I_LANE_TURN);
        taken += vkp_i_lane_take(lane, to, VKP_I_MIN(capacity - taken, turn));
        if (VKP_I_LOAD(&lane->head) % VKP_I_LANE_TURN == 0 || taken < capacity) {
            channel->rx_lane = vkp_i_lane_after(lane);
        }
        lane = taken < capacity ? vkp_i_channel_find(channel) : NULL;
    }
    if (taken > 0) {
        *count = taken;
    }
    vkp_i_channel_tidy(channel, false);
    vkp_i_channel_release(channel);
    return status;
}

/* Whether a receive would give a value or CLOSED. `waits`: if not, the receiver waits. */
static bool vkp_i_channel_is_ready(vkp_i_channel *channel, bool waits)
{
    vkp_status status;
    vkp_i_lane *lane;
    vkp_i_channel_hold(channel);
    status = vkp_i_channel_next(channel, &lane);
    vkp_i_channel_tidy(channel, waits && status == VKP_ERR_EMPTY);
    vkp_i_channel_release(channel);
    return status != VKP_ERR_EMPTY;
}

/* Unlink the waiter of the receiver if it is linked. */
static void vkp_i_channel_leave(vkp_i_channel *channel, vkp_i_waiter *waiter)
{
    VKP_I_LOCK(&channel->mutex);
    if (vkp_i_waiter_unlink(waiter) && vkp_i_waiters_empty(&channel->receiver)) {
        vkp_i_flag_lower(&channel->flags, VKP_I_RX_WAITING);
    }
    VKP_I_UNLOCK(&channel->mutex);
}

/* Link the waiter of the receiver; false, and not linked, when a receive would not be EMPTY. */
static bool vkp_i_channel_join(vkp_i_channel *channel, vkp_i_waiter *waiter)
{
    VKP_I_LOCK(&channel->mutex);
    vkp_i_waiter_link(&channel->receiver, waiter);
    vkp_i_flag_raise(&channel->flags, VKP_I_RX_WAITING);
    VKP_I_UNLOCK(&channel->mutex);
    vkp_i_flag_fence(channel->config.env, channel->fenced);
    if (!vkp_i_channel_is_ready(channel, true)) {
        return true;
    }
    vkp_i_channel_leave(channel, waiter);
    return false;
}

/* After a short burst the receiver pauses, so that some values gather: a receiver close behind a
   stream takes each cache line from its sender while the sender writes it. After a single value,
   which may be part of a dialogue, it does not pause.                                          */
static void vkp_i_lane_linger(vkp_i_lane *lane, uint32_t spins)
{
    uint64_t head = VKP_I_LOAD(&lane->head);
    uint64_t burst = head - lane->lingered;
    uint32_t i;
    lane->lingered = head;
    if (burst >= 2 && burst < VKP_I_LINGER_BURST) {
        uint64_t most =
            VKP_I_MIN(VKP_I_LINGER_PAUSES, VKP_I_LOAD(&lane->room) / VKP_I_LINGER_SHARE);
        for (i = 0; i < most && i < spins; i++) {
            VKP_I_PAUSE();
        }
    }
}

static vkp_status vkp_i_case_recv_attempt(vkp_case *each, vkp_i_wait *wait)
{
    size_t count;
    (void)wait;
    return vkp_i_channel_try_recv((vkp_i_channel *)each->i_object, each->i_out, 1, &count);
}

static vkp_status vkp_i_case_recv_many_attempt(vkp_case *each, vkp_i_wait *wait)
{
    vkp_i_batch *batch = (vkp_i_batch *)each->i_out;
    (void)wait;
    return vkp_i_channel_try_recv((vkp_i_channel *)each->i_object, batch->out, batch->capacity,
                                  &batch->count);
}

static bool vkp_i_case_recv_is_ready(const vkp_case *each)
{
    return vkp_i_channel_is_ready((vkp_i_channel *)each->i_object, false);
}

static bool vkp_i_case_recv_join(const vkp_case *each, vkp_i_wait *wait)
{
    return vkp_i_channel_join((vkp_i_channel *)each->i_object, &wait->node);
}

static void vkp_i_case_recv_leave(const vkp_case *each, vkp_i_wait *wait)
{
    vkp_i_channel_leave((vkp_i_channel *)each->i_object, &wait->node);
}

static const vkp_env *vkp_i_case_recv_env(const vkp_case *each)
{
    return ((vkp_i_channel *)each->i_object)->config.env;
}

static const vkp_i_case_kind vkp_i_case_recv = {vkp_i_case_recv_attempt, vkp_i_case_recv_is_ready,
                                                vkp_i_case_recv_join, vkp_i_case_recv_leave,
                                                vkp_i_case_recv_env};
static const vkp_i_case_kind vkp_i_case_recv_many = {vkp_i_case_recv_many_attempt,
                                                     vkp_i_case_recv_is_ready, vkp_i_case_recv_join,
                                                     vkp_i_case_recv_leave, vkp_i_case_recv_env};

/* Whether the receiver has something to do in this lane: take a value, pass a place, free a lane
   that is over. Unlike vkp_i_lane_oldest this passes no aborted place and no ring: a sender may
   wait for the room, and only a search that ends in vkp_i_channel_tidy lets it in.             */
static inline bool vkp_i_lane_looks_ready(const vkp_i_lane *lane)
{
    const vkp_i_ring *ring = VKP_I_LOAD_ACQ(&lane->rx_ring);
    uint64_t head = VKP_I_LOAD(&lane->head);
    uint32_t stamp;
    if (ring == NULL) {
        return VKP_I_LOAD(&lane->dead) != 0;
    }
    stamp = VKP_I_LOAD_ACQ(vkp_i_ring_stamp(ring, head));
    return (stamp & ~VKP_I_STAMP_ABORTED) == vkp_i_stamp(head) || VKP_I_LOAD(&ring->end) == head ||
           VKP_I_LOAD(&lane->dead) != 0;
}

/* Whether a receiver that spins should try again. */
static inline bool vkp_i_channel_looks_ready(vkp_i_channel *channel)
{
    vkp_i_lane *first = channel->rx_lane;
    vkp_i_lane *lane = first;
    if (channel->evicts) {
        return vkp_i_channel_is_ready(channel, false);
    }
    do {
        if (vkp_i_lane_looks_ready(lane)) {
            channel->rx_lane = lane;
            return true;
        }
        lane->found_empty = true;
        lane = vkp_i_lane_after(lane);
    } while (lane != first);
    return VKP_I_LOAD(&channel->ended) != 0;
}

/* Take up to `capacity` values, and wait for the first one until the deadline, or until the
   token (may be NULL) is cancelled: CANCELLED.                                                 */
static vkp_status vkp_i_mpsc_recv(vkp_mpsc_rx *rx, void *out, size_t capacity, size_t *count,
                                  vkp_cancel *cancel, uint64_t deadline_ns)
{
    vkp_i_channel *channel = rx->channel;
    const vkp_sys *sys = vkp_i_sys(channel->config.env);
    vkp_i_spin spin = {0, 0};
    vkp_i_batch batch;
    vkp_case cases[2];
    vkp_i_wait waits[2];
    size_t won;
    vkp_status status;
    if (deadline_ns != 0) {
        vkp_i_lane_linger(channel->rx_lane, channel->spins);
        while (vkp_i_spin_again(&spin, sys, channel->spins) &&
               !vkp_i_channel_looks_ready(channel)) {
        }
        if (capacity == 1 && vkp_i_lane_recv_fast(channel->rx_lane, out)) {
            *count = 1;
            return VKP_OK;
        }
    }
    batch.out = out;
    batch.capacity = capacity;
    cases[0] = vkp_i_case(&vkp_i_case_recv_many, channel, &batch);
    cases[1] = vkp_case_cancel(cancel);
    status = vkp_i_select(cases, 2, 0, waits, sys, 0, deadline_ns, &won);
    if (status != VKP_OK) {
        return status;
    }
    if (won == 1) {
        return VKP_ERR_CANCELLED;
    }
    if (cases[0].status == VKP_OK) {
        *count = batch.count;
    }
    return cases[0].status;
}

VKP_API vkp_status vkp_mpsc_recv(vkp_mpsc_rx *rx, uint64_t deadline_ns, void *out)
{
    size_t count;
    VKP_I_REQUIRE(rx != NULL && out != NULL);
    return vkp_i_lane_recv_fast(rx->channel->rx_lane, out)
               ? VKP_OK
               : vkp_i_mpsc_recv(rx, out, 1, &count, NULL, deadline_ns);
}

VKP_API vkp_status vkp_mpsc_recv_many(vkp_mpsc_rx *rx, uint64_t deadline_ns, void *out,
                                      size_t capacity, size_t *count)
{
    VKP_I_REQUIRE(rx != NULL && out != NULL && capacity > 0 && count != NULL);
    return vkp_i_mpsc_recv(rx, out, capacity, count, NULL, deadline_ns);
}

VKP_API vkp_status vkp_mpsc_try_recv(vkp_mpsc_rx *rx, void *out)
{
    size_t count;
    VKP_I_REQUIRE(rx != NULL && out != NULL);
    return vkp_i_lane_recv_fast(rx->channel->rx_lane, out)
               ? VKP_OK
               : vkp_i_channel_try_recv(rx->channel, out, 1, &count);
}

VKP_API vkp_status vkp_mpsc_peek(vkp_mpsc_rx *rx, const void **item)
{
    vkp_i_channel *channel;
    vkp_i_lane *lane;
    vkp_status status;
    VKP_I_REQUIRE(rx != NULL && item != NULL);
    channel = rx->channel;
    vkp_i_channel_hold(channel);
    status = vkp_i_channel_next(channel, &lane);
    if (lane != NULL) {
        *item = vkp_i_lane_oldest(lane);
    }
    vkp_i_channel_tidy(channel, false);
    vkp_i_channel_release(channel);
    return status;
}

VKP_API size_t vkp_mpsc_get_len(const vkp_mpsc_rx *rx)
{
    const vkp_i_lane *lane = &rx->channel->lane;
    uint64_t count = 0;
    for (; lane != NULL; lane = VKP_I_LOAD_ACQ(&lane->next)) {
        /* vkp_i_used: a value may be received before vkp_i_lane_thaw has moved `tail`. */
        count += vkp_i_used(VKP_I_LOAD_ACQ(&lane->tail) >> 1, VKP_I_LOAD(&lane->head));
    }
    return (size_t)count;
}

VKP_API bool vkp_mpsc_rx_is_closed(const vkp_mpsc_rx *rx)
{
    return VKP_I_LOAD_ACQ(&rx->channel->ended) != 0;
}
