/* ======================================================================================
   >>impl-mpsc-send   mpsc: the senders' side
   ======================================================================================
   A sender takes the first of these ways that is open: the fast path (vkp_i_lane_send_fast,
   vkp_i_lane_claim) without the mutex; the slow path (vkp_i_lane_send_locked) under the mutex,
   with SLOW set; a wait in `senders` (vkp_i_lane_join), which vkp_i_lane_admit ends.
   While a lane is frozen only the holder of the mutex changes `tail`, `ring`, `room` and
   `sent_cost`; vkp_i_lane_thaw ends that and publishes these changes with the release of `tail`.
   A lane belongs to the one thread that sends (bias): that thread stores `tail` plainly, between
   vkp_i_lane_enter and vkp_i_bias_exit, and vkp_i_lane_freeze keeps it out before SLOW is set.
   A sender wakes the receiver after it stored a stamp: fast path by the flag `flags`, slow path
   under the mutex. The release of `head` pairs with the acquire loads of `head` and `head_seen`
   here: a place is written again only after its value was read.                                */

/* Enter the fast path as the owner of the lane; false while the owner is held off, or when the
   lane has changed since `tail` was loaded as `word`.                                          */
static inline bool vkp_i_lane_enter(vkp_i_lane *lane, uint64_t word)
{
    if (!vkp_i_bias_enter(&lane->bias)) {
        return false;
    }
    /* The owner is checked last: `tail` may be unchanged although the lane became shared. */
    if (VKP_I_LOAD_ACQ(&lane->tail) == word && VKP_I_LOAD(&lane->bias.owner) == VKP_I_SELF()) {
        return true;
    }
    vkp_i_bias_exit(&lane->bias);
    return false;
}

/* Take up to `count` tickets without the mutex: OK with the first ticket, its ring and their
   number. FULL is certain; EMPTY: the caller must take the mutex.                              */
static vkp_status vkp_i_lane_claim(vkp_i_lane *lane, uint64_t count, uint64_t *ticket,
                                   vkp_i_ring **ring, uint64_t *taken)
{
    uint64_t word = VKP_I_LOAD_ACQ(&lane->tail);
    for (;;) {
        uint64_t room = VKP_I_LOAD_ACQ(&lane->room);
        uint64_t used = vkp_i_used(word >> 1, VKP_I_LOAD_ACQ(&lane->head_seen));
        uintptr_t owner = VKP_I_LOAD_ACQ(&lane->bias.owner);
        *ring = VKP_I_LOAD_ACQ(&lane->ring);
        if ((word & VKP_I_TAIL_SLOW) != 0 || (owner != VKP_I_SHARED && owner != VKP_I_SELF())) {
            return VKP_ERR_EMPTY;
        }
        if (used >= room) {
            uint64_t head = VKP_I_LOAD_ACQ(&lane->head);
            VKP_I_STORE_REL(&lane->head_seen, head);
            used = vkp_i_used(word >> 1, head);
            if (used >= room) {
                return room == lane->channel->capacity ? VKP_ERR_FULL : VKP_ERR_EMPTY;
            }
        }
        *taken = VKP_I_MIN(count, room - used);
        *ticket = word >> 1;
        if (owner != VKP_I_SHARED) {
            if (!vkp_i_lane_enter(lane, word)) {
                return VKP_ERR_EMPTY;
            }
            VKP_I_STORE(&lane->tail, word + VKP_I_TAIL_TICKET * *taken);
            vkp_i_bias_exit(&lane->bias);
            return VKP_OK;
        }
        if (VKP_I_CAS(&lane->tail, &word, word + VKP_I_TAIL_TICKET * *taken)) {
            return VKP_OK;
        }
    }
}

/* The place of the ticket is written: store its stamp (`outcome` is 0 or VKP_I_STAMP_ABORTED),
   and wake the receiver if it waits.                                                           */
static inline void vkp_i_lane_publish(vkp_i_lane *lane, vkp_i_ring *ring, uint64_t ticket,
                                      uint32_t outcome)
{
    vkp_i_channel *channel = lane->channel;
    VKP_I_STORE_REL(vkp_i_ring_stamp(ring, ticket), vkp_i_stamp(ticket) | outcome);
    if (vkp_i_flag_check(&channel->flags, channel->fenced) != 0) {
        vkp_i_channel_signal(channel);
    }
}

/* The path of nearly every value. False, and nothing is sent, without room, when SLOW is set, or
   when another sender was faster.                                                              */
static inline bool vkp_i_lane_send_fast(vkp_i_lane *lane, const void *item)
{
    uint64_t word = VKP_I_LOAD_ACQ(&lane->tail);
    uint64_t used = (word >> 1) - VKP_I_LOAD_ACQ(&lane->head_seen); /* huge if `word` is old */
    uint64_t room = VKP_I_LOAD_ACQ(&lane->room);
    vkp_i_ring *ring = VKP_I_LOAD_ACQ(&lane->ring);
    uintptr_t owner = VKP_I_LOAD_ACQ(&lane->bias.owner);
    if ((word & VKP_I_TAIL_SLOW) != 0 || used >= room) {
        return false;
    }
    if (owner == VKP_I_SELF()) {
        if (!vkp_i_lane_enter(lane, word)) {
            return false;
        }
        VKP_I_STORE(&lane->tail, word + VKP_I_TAIL_TICKET);
        vkp_i_bias_exit(&lane->bias);
    } else if (owner != VKP_I_SHARED || !VKP_I_CAS(&lane->tail, &word, word + VKP_I_TAIL_TICKET)) {
        return false;
    }
    VKP_I_COPY_IN(vkp_i_ring_item(ring, word >> 1), item, ring->elem_bytes);
    vkp_i_lane_publish(lane, ring, word >> 1, 0);
    return true;
}

/* Locked: set SLOW, which keeps senders off the fast path. Gives the next ticket. */
static uint64_t vkp_i_lane_freeze(vkp_i_lane *lane)
{
    uintptr_t owner = VKP_I_LOAD(&lane->bias.owner);
    uint64_t word = VKP_I_LOAD_ACQ(&lane->tail);
    if ((word & VKP_I_TAIL_SLOW) != 0) {
        return word >> 1;
    }
    if (owner == VKP_I_SHARED || owner == VKP_I_SELF()) {
        return VKP_I_OR(&lane->tail, (uint64_t)VKP_I_TAIL_SLOW) >> 1;
    }
    /* The owner stores `tail` plainly, and would clear SLOW: it must be outside first. */
    vkp_i_bias_hold(&lane->bias, lane->channel->config.env);
    word = VKP_I_OR(&lane->tail, (uint64_t)VKP_I_TAIL_SLOW);
    vkp_i_bias_release(&lane->bias);
    return word >> 1;
}

/* Locked and frozen: the first thread that sends owns the lane; a second one makes it shared,
   permanently.                                                                                 */
static void vkp_i_lane_own(vkp_i_lane *lane)
{
    uintptr_t owner = VKP_I_LOAD(&lane->bias.owner);
    if (owner == VKP_I_NOBODY) {
        VKP_I_STORE_REL(&lane->bias.owner, VKP_I_SELF());
    } else if (owner != VKP_I_SELF() && owner != VKP_I_SHARED) {
        VKP_I_STORE_REL(&lane->bias.owner, VKP_I_SHARED);
    }
}

/* Locked: link the lane of a clone at its first use. A clone that never sends costs the receiver
   nothing, and is freed by its last reference.                                                 */
static void vkp_i_lane_link(vkp_i_lane *lane)
{
    if (!lane->linked) {
        vkp_i_lane *first = &lane->channel->lane;
        lane->linked = true;
        VKP_I_STORE(&lane->next, VKP_I_LOAD(&first->next));
        VKP_I_STORE_REL(&first->next, lane);
    }
}

/* Locked: set the next ticket, and clear SLOW unless the slow path is still needed. */
static void vkp_i_lane_thaw(vkp_i_lane *lane, uint64_t ticket)
{
    const vkp_i_channel *channel = lane->channel;
    bool slow = VKP_I_LOAD(&channel->ended) != 0 || VKP_I_LOAD(&lane->ring) == NULL ||
                !vkp_i_waiters_empty(&lane->senders) || channel->config.capacity_bytes != 0;
    VKP_I_STORE_REL(&lane->tail, ticket << 1 | (slow ? VKP_I_TAIL_SLOW : 0u));
}

/* Locked: whether a value of this cost fits under the ticket. Into an empty lane any one value
   fits.                                                                                        */
static bool vkp_i_lane_has_room(const vkp_i_lane *lane, uint64_t ticket, size_t cost)
{
    const vkp_i_channel *channel = lane->channel;
    uint64_t used = ticket - VKP_I_LOAD_ACQ(&lane->head);
    size_t most = channel->config.capacity_bytes;
    uint64_t cost_used;
    if (used >= channel->capacity) {
        return false;
    }
    if (most == 0 || used == 0) {
        return true;
    }
    cost_used = lane->sent_cost - VKP_I_LOAD(&lane->taken_cost);
    return cost_used <= most && cost <= most - cost_used;
}

/* Locked and frozen: make sure that the ring has a place for the ticket, which has room; false
   without memory. The first ring is small, each successor has twice the places.                */
static bool vkp_i_lane_make_slot(vkp_i_lane *lane, uint64_t ticket)
{
    vkp_i_channel *channel = lane->channel;
    vkp_i_ring *old = VKP_I_LOAD(&lane->ring);
    vkp_i_ring *ring;
    uint64_t slots;
    if (old != NULL && ticket - VKP_I_LOAD_ACQ(&lane->head) <= old->mask) {
        return true;
    }
    if (old != NULL) {
        slots = (old->mask + 1) * 2;
    } else {
        for (slots = VKP_I_RING_FIRST;
             slots > 1 && (slots / 2 >= channel->capacity ||
                           slots * channel->config.elem_bytes > VKP_I_RING_FIRST_MOST);
             slots /= 2) {
        }
    }
    ring = slots > VKP_I_RING_PLACES_MAX
               ? NULL
               : vkp_i_ring_open(channel->config.env, channel->config.elem_bytes, (size_t)slots,
                                 ticket);
    if (ring == NULL) {
        return false;
    }
    VKP_I_STORE_REL(&lane->ring, ring);
    VKP_I_STORE_REL(&lane->room, VKP_I_MIN(channel->capacity, slots));
    if (old != NULL) {
        old->next = ring;
        VKP_I_STORE_REL(&old->end, ticket);
    } else {
        VKP_I_STORE_REL(&lane->rx_ring, ring);
    }
    return true;
}

/* Locked and frozen: put the value into the queue under the ticket, which has room. OK or NOMEM. */
static vkp_status vkp_i_lane_place(vkp_i_lane *lane, uint64_t ticket, const void *item, size_t cost)
{
    vkp_i_ring *ring;
    if (!vkp_i_lane_make_slot(lane, ticket)) {
        return VKP_ERR_NOMEM;
    }
    ring = VKP_I_LOAD(&lane->ring);
    VKP_I_COPY_IN(vkp_i_ring_item(ring, ticket), item, lane->channel->config.elem_bytes);
    lane->sent_cost += cost;
    VKP_I_STORE_REL(vkp_i_ring_stamp(ring, ticket), vkp_i_stamp(ticket));
    return VKP_OK;
}

/* Locked: end the wait of a sender with this status: unlink it and wake it. */
static void vkp_i_sender_finish(vkp_i_wait *sender, vkp_status status)
{
    sender->status = status;
    (void)vkp_i_waiter_unlink(&sender->node);
    sender->node.wake(&sender->node);
}

/* Locked: let waiting senders in, oldest first, while there is room. A sender that left its
   value here (`item`) has the value moved in, and its wait ends. A sender without `item` is
   notified once, and keeps its place as the first of `senders` until it takes the room itself. */
static void vkp_i_lane_admit(vkp_i_lane *lane)
{
    uint64_t ticket;
    bool placed = false;
    ticket = vkp_i_lane_freeze(lane);
    while (!vkp_i_waiters_empty(&lane->senders)) {
        vkp_i_wait *sender = VKP_CONTAINER(lane->senders.head.next, vkp_i_wait, node);
        if (!vkp_i_lane_has_room(lane, ticket, sender->cost)) {
            break;
        }
        if (sender->item == NULL) {
            if (sender->status == VKP_ERR_FULL) {
                sender->status = VKP_OK; /* so that it is notified once */
                sender->node.wake(&sender->node);
            }
            break;
        }
        {
            vkp_status status = vkp_i_lane_place(lane, ticket, sender->item, sender->cost);
            ticket += status == VKP_OK ? 1u : 0u;
            placed = placed || status == VKP_OK;
            vkp_i_sender_finish(sender, status);
        }
    }
    if (vkp_i_waiters_empty(&lane->senders)) {
        vkp_i_flag_lower(&lane->tx_waiting, 1u);
    }
    vkp_i_lane_thaw(lane, ticket);
    if (placed) {
        vkp_i_channel_wake_receiver(lane->channel);
    }
}

/* Make the permit for the place of the ticket. */
static void vkp_i_permit_set(vkp_mpsc_permit *permit, vkp_i_lane *lane, vkp_i_ring *ring,
                             uint64_t ticket)
{
    permit->item = vkp_i_ring_item(ring, ticket);
    permit->i_lane = lane;
    permit->i_ring = ring;
    permit->i_ticket = ticket;
}

/* Locked: send, or reserve when `permit` is given, unless another sender waits. `self` is the
   caller's own wait in `senders`, or NULL. OK, CLOSED, NOMEM; FULL means that waiting helps.   */
static vkp_status vkp_i_lane_send_locked(vkp_i_lane *lane, const void *item, size_t cost,
                                         vkp_mpsc_permit *permit, const vkp_i_wait *self)
{
    uint64_t ticket = vkp_i_lane_freeze(lane);
    vkp_status status = VKP_OK;
    const vkp_i_waiter *first = lane->senders.head.next;
    vkp_i_lane_link(lane);
    vkp_i_lane_own(lane);
    if ((VKP_I_LOAD(&lane->channel->ended) & VKP_I_ENDED_CLOSED) != 0) {
        status = VKP_ERR_CLOSED;
    } else if ((first != &lane->senders.head && (self == NULL || first != &self->node)) ||
               !vkp_i_lane_has_room(lane, ticket, cost)) {
        status = VKP_ERR_FULL;
    } else if (permit != NULL) {
        status = vkp_i_lane_make_slot(lane, ticket) ? VKP_OK : VKP_ERR_NOMEM;
        if (status == VKP_OK) {
            vkp_i_permit_set(permit, lane, VKP_I_LOAD(&lane->ring), ticket);
        }
    } else {
        status = vkp_i_lane_place(lane, ticket, item, cost);
    }
    vkp_i_lane_thaw(lane, status == VKP_OK ? ticket + 1 : ticket);
    if (status == VKP_OK && permit == NULL) {
        vkp_i_channel_wake_receiver(lane->channel);
    }
    return status;
}

/* Send, or reserve when `permit` is given, without waiting: OK, FULL, CLOSED or NOMEM. */
__attribute__((noinline)) static vkp_status vkp_i_lane_try(vkp_i_lane *lane, const void *item,
                                                           vkp_mpsc_permit *permit)
{
    vkp_i_channel *channel = lane->channel;
    vkp_i_ring *ring;
    uint64_t ticket;
    uint64_t taken;
    vkp_status status = vkp_i_lane_claim(lane, 1, &ticket, &ring, &taken);
    if (status == VKP_OK) {
        if (permit != NULL) {
            vkp_i_permit_set(permit, lane, ring, ticket);
        } else {
            VKP_I_COPY_IN(vkp_i_ring_item(ring, ticket), item, channel->config.elem_bytes);
            vkp_i_lane_publish(lane, ring, ticket, 0);
        }
    } else if (status == VKP_ERR_EMPTY) {
        size_t cost = permit == NULL ? vkp_i_channel_cost(channel, item) : 0;
        VKP_I_LOCK(&channel->mutex);
        status = vkp_i_lane_send_locked(lane, item, cost, permit, NULL);
        VKP_I_UNLOCK(&channel->mutex);
    }
    return status;
}

/* Link a sender into `senders`; it may be woken before this returns. */
static void vkp_i_lane_join(vkp_i_lane *lane, vkp_i_wait *sender)
{
    vkp_i_channel *channel = lane->channel;
    VKP_I_LOCK(&channel->mutex);
    sender->status = VKP_ERR_FULL;
    vkp_i_lane_link(lane);
    vkp_i_waiter_link(&lane->senders, &sender->node);
    (void)vkp_i_lane_freeze(lane);
    vkp_i_flag_raise(&lane->tx_waiting, 1u);
    if ((VKP_I_LOAD(&channel->ended) & VKP_I_ENDED_CLOSED) != 0) {
        vkp_i_sender_finish(sender, VKP_ERR_CLOSED);
    }
    VKP_I_UNLOCK(&channel->mutex);
    vkp_i_flag_fence(channel->config.env, channel->fenced);
    VKP_I_LOCK(&channel->mutex);
    vkp_i_lane_admit(lane); /* room that the receiver made before it could see the flag */
    VKP_I_UNLOCK(&channel->mutex);
}

/* Take the room with the wait that is linked in `senders`. FULL: this wait is not the first one,
   or there is no room; CLOSED when the channel was closed.                                     */
static vkp_status vkp_i_lane_claim_place(vkp_i_lane *lane, vkp_i_wait *wait, const void *item,
                                         vkp_mpsc_permit *permit)
{
    vkp_i_channel *channel = lane->channel;
    vkp_status status;
    VKP_I_LOCK(&channel->mutex);
    status = wait->node.prev != NULL ? vkp_i_lane_send_locked(lane, item, wait->cost, permit, wait)
                                     : wait->status; /* closed */
    VKP_I_UNLOCK(&channel->mutex);
    return status;
}

/* End a wait in `senders`, and let the next one in, which may have room now. Gives how the wait
   ended; FULL when it was still linked.                                                        */
static vkp_status vkp_i_lane_leave(vkp_i_lane *lane, vkp_i_wait *wait)
{
    vkp_i_channel *channel = lane->channel;
    VKP_I_LOCK(&channel->mutex);
    if (vkp_i_waiter_unlink(&wait->node)) {
        wait->status = VKP_ERR_FULL;
        vkp_i_lane_admit(lane);
    }
    VKP_I_UNLOCK(&channel->mutex);
    return wait->status;
}

/* Whether another try without the mutex is worthwhile. */
static bool vkp_i_lane_looks_roomy(vkp_i_lane *lane)
{
    uint64_t word = VKP_I_LOAD(&lane->tail);
    return (word & VKP_I_TAIL_SLOW) == 0 &&
           vkp_i_used(word >> 1, VKP_I_LOAD(&lane->head)) <
               VKP_I_LOAD(&lane->room) - VKP_I_LOAD(&lane->room) / VKP_I_HYSTERESIS;
}

/* Send, or reserve when `permit` is given, and wait for room. The wait ends without it at the
   deadline or when the token (may be NULL) is cancelled: TIMEOUT in both cases.                */
static vkp_status vkp_i_lane_send(vkp_i_lane *lane, const void *item, vkp_mpsc_permit *permit,
                                  vkp_cancel *cancel, uint64_t deadline_ns)
{
    vkp_i_channel *channel = lane->channel;
    const vkp_sys *sys = vkp_i_sys(channel->config.env);
    vkp_i_wait sender;
    vkp_i_wait cancelled;
    vkp_parker parker;
    vkp_status claimed;
    vkp_status status = vkp_i_lane_try(lane, item, permit);
    vkp_i_spin spin = {0, 0};
    if (status != VKP_ERR_FULL || deadline_ns == 0) {
        return status == VKP_ERR_FULL ? VKP_ERR_TIMEOUT : status;
    }
    while (vkp_i_spin_again(&spin, sys, channel->spins)) {
        if (vkp_i_lane_looks_roomy(lane)) {
            status = vkp_i_lane_try(lane, item, permit);
            if (status != VKP_ERR_FULL) {
                return status;
            }
        }
    }
    vkp_i_parker_init(&parker);
    vkp_i_wait_init(&sender, sys, &parker);
    vkp_i_wait_init(&cancelled, sys, &parker);
    sender.item = item;
    sender.cost = item != NULL ? vkp_i_channel_cost(channel, item) : 0;
    vkp_i_lane_join(lane, &sender);
    if (cancel == NULL || vkp_i_cancel_join(cancel, &cancelled.node)) {
        sys->park(&parker, deadline_ns);
    }
    if (cancel != NULL) {
        vkp_i_cancel_leave(cancel, &cancelled.node);
    }
    claimed = permit != NULL ? vkp_i_lane_claim_place(lane, &sender, NULL, permit) : VKP_ERR_FULL;
    status = vkp_i_lane_leave(lane, &sender);
    status = claimed != VKP_ERR_FULL ? claimed : status;
    vkp_i_parker_deinit(&parker);
    return status == VKP_ERR_FULL ? VKP_ERR_TIMEOUT : status;
}

VKP_API vkp_status vkp_mpsc_send(vkp_mpsc_tx *tx, const void *item, uint64_t deadline_ns)
{
    VKP_I_REQUIRE(tx != NULL && item != NULL);
    return vkp_i_lane_send_fast(tx->lane, item)
               ? VKP_OK
               : vkp_i_lane_send(tx->lane, item, NULL, NULL, deadline_ns);
}

VKP_API vkp_status vkp_mpsc_try_send(vkp_mpsc_tx *tx, const void *item)
{
    VKP_I_REQUIRE(tx != NULL && item != NULL);
    return vkp_i_lane_send_fast(tx->lane, item) ? VKP_OK : vkp_i_lane_try(tx->lane, item, NULL);
}

VKP_API vkp_status vkp_mpsc_reserve(vkp_mpsc_tx *tx, uint64_t deadline_ns, vkp_mpsc_permit *permit)
{
    VKP_I_REQUIRE(tx != NULL && permit != NULL && tx->lane->channel->config.capacity_bytes == 0);
    return vkp_i_lane_send(tx->lane, NULL, permit, NULL, deadline_ns);
}

VKP_API vkp_status vkp_mpsc_try_reserve(vkp_mpsc_tx *tx, vkp_mpsc_permit *permit)
{
    VKP_I_REQUIRE(tx != NULL && permit != NULL && tx->lane->channel->config.capacity_bytes == 0);
    return vkp_i_lane_try(tx->lane, NULL, permit);
}

/* Publish the place of a permit, once: a permit that was used, or never reserved, has no lane. */
static void vkp_i_permit_use(vkp_mpsc_permit *permit, uint32_t outcome)
{
    if (permit != NULL && permit->i_lane != NULL) {
        vkp_i_lane *lane = (vkp_i_lane *)permit->i_lane;
        permit->i_lane = NULL;
        permit->item = NULL;
        vkp_i_lane_publish(lane, (vkp_i_ring *)permit->i_ring, permit->i_ticket, outcome);
    }
}

VKP_API void vkp_mpsc_commit(vkp_mpsc_permit *permit)
{
    vkp_i_permit_use(permit, 0);
}

VKP_API void vkp_mpsc_abort(vkp_mpsc_permit *permit)
{
    vkp_i_permit_use(permit, VKP_I_STAMP_ABORTED);
}

VKP_API vkp_status vkp_mpsc_send_many(vkp_mpsc_tx *tx, const void *items, size_t count,
                                      uint64_t deadline_ns, size_t *sent)
{
    vkp_i_lane *lane;
    size_t bytes;
    size_t done = 0;
    VKP_I_REQUIRE(tx != NULL && items != NULL && count > 0 && sent != NULL);
    lane = tx->lane;
    bytes = lane->channel->config.elem_bytes;
    while (done < count) {
        const uint8_t *next = (const uint8_t *)items + done * bytes;
        vkp_i_ring *ring;
        uint64_t ticket;
        uint64_t taken;
        uint64_t i;
        vkp_status status = vkp_i_lane_claim(lane, count - done, &ticket, &ring, &taken);
        if (status != VKP_OK) { /* send one value by the slow path, then claim again */
            status = vkp_i_lane_send(lane, next, NULL, NULL, deadline_ns);
            if (status != VKP_OK && done == 0) {
                return status;
            }
            if (status != VKP_OK) {
                break;
            }
            done++;
            continue;
        }
        for (i = 0; i + 1 < taken; i++) {
            VKP_I_COPY_IN(vkp_i_ring_item(ring, ticket + i), next + i * bytes, bytes);
            VKP_I_STORE_REL(vkp_i_ring_stamp(ring, ticket + i), vkp_i_stamp(ticket + i));
        }
        VKP_I_COPY_IN(vkp_i_ring_item(ring, ticket + i), next + i * bytes, bytes);
        vkp_i_lane_publish(lane, ring, ticket + i, 0);
        done += (size_t)taken;
    }
    *sent = done;
    return VKP_OK;
}
