/* ======================================================================================
   >>impl-oneshot   One value, once, in the caller's memory
   ======================================================================================
   One state word decides which side ends the slot first; there is no lock. The sender writes the
   value, then sets SENT (or ABANDONED) with an exchange; the receiver sets CLOSED with an
   exchange, or with a plain store after it saw the end of the sender. The release of the exchange
   pairs with the acquire loads of the state: a receiver that sees SENT sees the value.
   RX_WAITING and TX_WAITING say that i_receiver or i_sender points to a wait. The side that ends
   the slot reads both pointers BEFORE its exchange, because the slot may be freed after the
   exchange; it wakes the waits, and then sets `done` of each. A side that leaves its wait after
   the slot ended waits for `done`: the other side is between two instructions.
   Each side has one wait at a time: the attempt of a second one is INVALID. A side may wait
   several times (in a select that another case won). Each wait is a turn, counted in the state,
   so that an exchange fails that belongs to the pointer of an earlier wait. A slot on the heap
   has two references, one for each side.                                                       */

#define VKP_I_SLOT_SENT 1u      /* the sender sent: the value is in the slot */
#define VKP_I_SLOT_ABANDONED 2u /* the sender ended without a value */
#define VKP_I_SLOT_CLOSED 4u    /* the receiver closed, or has taken the value */
#define VKP_I_SLOT_ENDED (VKP_I_SLOT_SENT | VKP_I_SLOT_ABANDONED | VKP_I_SLOT_CLOSED)
#define VKP_I_SLOT_RX_WAITING 8u  /* i_receiver points to a wait */
#define VKP_I_SLOT_TX_WAITING 16u /* i_sender points to a wait */
#define VKP_I_SLOT_HEAP 32u       /* the slot is that of a vkp_i_heap_slot */
#define VKP_I_SLOT_TURN 64u       /* one wait: this bit and those above count the waits */

typedef struct vkp_i_heap_slot {
    vkp_oneshot slot;
    size_t refs; /* atomic: one for each side */
} vkp_i_heap_slot;

VKP_API vkp_status vkp_oneshot_init(vkp_oneshot *slot, const vkp_env *env, size_t elem_bytes,
                                    void (*drop)(void *user, void *item), void *user)
{
    VKP_I_REQUIRE(slot != NULL && elem_bytes > 0 && elem_bytes <= VKP_ONESHOT_BYTES);
    VKP_I_STORE(&slot->i_state, 0u);
    slot->i_elem_bytes = (uint32_t)elem_bytes;
    slot->i_owner = NULL;
    slot->i_detach = NULL;
    slot->i_drop = drop;
    slot->i_user = user;
    slot->i_env = vkp_i_env(env);
    return VKP_OK;
}

VKP_API vkp_status vkp_oneshot_open(const vkp_env *env, size_t elem_bytes,
                                    void (*drop)(void *user, void *item), void *user,
                                    vkp_oneshot **slot)
{
    vkp_i_heap_slot *self;
    vkp_status status;
    VKP_I_REQUIRE(slot != NULL);
    self = (vkp_i_heap_slot *)vkp_i_alloc(vkp_i_env(env), sizeof *self);
    if (self == NULL) {
        return VKP_ERR_NOMEM;
    }
    status = vkp_oneshot_init(&self->slot, env, elem_bytes, drop, user);
    if (status != VKP_OK) {
        vkp_i_free(vkp_i_env(env), self, sizeof *self);
        return status;
    }
    VKP_I_STORE(&self->slot.i_state, VKP_I_SLOT_HEAP);
    VKP_I_STORE(&self->refs, (size_t)2);
    *slot = &self->slot;
    return VKP_OK;
}

/* Give a reference to a slot on the heap back. The side that finds a count of 1 is alone, and
   needs no exchange.                                                                           */
static void vkp_i_heap_slot_unref(vkp_oneshot *slot)
{
    vkp_i_heap_slot *self = VKP_CONTAINER(slot, vkp_i_heap_slot, slot);
    if (VKP_I_LOAD_ACQ(&self->refs) == 1 || VKP_I_UNREF(&self->refs) == 1) {
        vkp_i_free(slot->i_env, self, sizeof *self);
    }
}

/* Wake a wait; its memory may be freed once `done` is set. */
static void vkp_i_slot_wake(vkp_i_wait *wait)
{
    wait->node.wake(&wait->node);
    VKP_I_STORE_REL(&wait->done, 1u);
}

/* End the slot with SENT, ABANDONED or CLOSED; `state` is the state as loaded before. False when
   the slot had ended. Wakes the waits of both sides: the side that ends the slot may have a wait
   too, in a handler.                                                                           */
static inline bool vkp_i_oneshot_end(vkp_oneshot *slot, uint32_t state, uint32_t outcome)
{
    while ((state & VKP_I_SLOT_ENDED) == 0) {
        vkp_i_wait *receiver = (state & VKP_I_SLOT_RX_WAITING) != 0
                                   ? (vkp_i_wait *)VKP_I_LOAD(&slot->i_receiver)
                                   : NULL;
        vkp_i_wait *sender =
            (state & VKP_I_SLOT_TX_WAITING) != 0 ? (vkp_i_wait *)VKP_I_LOAD(&slot->i_sender) : NULL;
        if (VKP_I_CAS(&slot->i_state, &state, (state & VKP_I_SLOT_HEAP) | outcome)) {
            if (receiver != NULL) {
                vkp_i_slot_wake(receiver);
            }
            if (sender != NULL) {
                vkp_i_slot_wake(sender);
            }
            return true;
        }
    }
    return false;
}

VKP_API vkp_status vkp_oneshot_send(vkp_oneshot *slot, const void *item)
{
    uint32_t state;
    void *value;
    VKP_I_REQUIRE(slot != NULL && item != NULL);
    state = VKP_I_LOAD_ACQ(&slot->i_state);
    VKP_I_REQUIRE((state & (VKP_I_SLOT_SENT | VKP_I_SLOT_ABANDONED)) == 0);
    value = slot->i_value.bytes;
    VKP_I_HIDE(value); /* the slot may be the caller's object, of a size that GCC knows */
    VKP_I_COPY_IN(value, item, slot->i_elem_bytes);
    return vkp_i_oneshot_end(slot, state, VKP_I_SLOT_SENT) ? VKP_OK : VKP_ERR_CLOSED;
}

VKP_API void vkp_oneshot_abandon(vkp_oneshot *slot)
{
    if (slot != NULL) {
        (void)vkp_i_oneshot_end(slot, VKP_I_LOAD_ACQ(&slot->i_state), VKP_I_SLOT_ABANDONED);
    }
}

VKP_API bool vkp_oneshot_is_closed(const vkp_oneshot *slot)
{
    return (VKP_I_LOAD_ACQ(&slot->i_state) & VKP_I_SLOT_CLOSED) != 0;
}

/* Take the value if it is there, and close: OK. EMPTY leaves the slot open; CLOSED when it ended
   without a value.                                                                             */
static inline vkp_status vkp_i_oneshot_take(vkp_oneshot *slot, void *out)
{
    uint32_t state = VKP_I_LOAD_ACQ(&slot->i_state);
    vkp_status status = VKP_ERR_CLOSED;
    if ((state & VKP_I_SLOT_ENDED) == 0) {
        return VKP_ERR_EMPTY;
    }
    if ((state & VKP_I_SLOT_SENT) != 0) {
        const void *value = slot->i_value.bytes;
        VKP_I_HIDE(value); /* as in send */
        VKP_I_COPY_OUT(out, value, slot->i_elem_bytes);
        status = VKP_OK;
    }
    VKP_I_STORE(&slot->i_state, (state & VKP_I_SLOT_HEAP) | VKP_I_SLOT_CLOSED);
    return status;
}

/* Close unless the sender has finished; false when the sender was first. */
static bool vkp_i_oneshot_close_first(vkp_oneshot *slot)
{
    uint32_t state = VKP_I_LOAD_ACQ(&slot->i_state);
    void (*detach)(vkp_oneshot *) = slot->i_detach;
    if (!vkp_i_oneshot_end(slot, state, VKP_I_SLOT_CLOSED)) {
        return false;
    }
    if (detach != NULL) {
        detach(slot);
    }
    return true;
}

VKP_API void vkp_oneshot_close(vkp_oneshot *slot)
{
    uint32_t state;
    if (slot == NULL || vkp_i_oneshot_close_first(slot)) {
        return;
    }
    state = VKP_I_LOAD_ACQ(&slot->i_state);
    if ((state & VKP_I_SLOT_SENT) != 0 && slot->i_drop != NULL) {
        slot->i_drop(slot->i_user, slot->i_value.bytes);
    }
    VKP_I_STORE(&slot->i_state, (state & VKP_I_SLOT_HEAP) | VKP_I_SLOT_CLOSED);
}

VKP_API void vkp_oneshot_tx_unref(vkp_oneshot *slot)
{
    if (slot != NULL) {
        bool on_heap = (VKP_I_LOAD(&slot->i_state) & VKP_I_SLOT_HEAP) != 0;
        vkp_oneshot_abandon(slot);
        if (on_heap) {
            vkp_i_heap_slot_unref(slot);
        }
    }
}

VKP_API void vkp_oneshot_rx_unref(vkp_oneshot *slot)
{
    if (slot != NULL) {
        bool on_heap = (VKP_I_LOAD(&slot->i_state) & VKP_I_SLOT_HEAP) != 0;
        vkp_oneshot_close(slot);
        if (on_heap) {
            vkp_i_heap_slot_unref(slot);
        }
    }
}

/* Wait for the end of the slot; `side` is RX_WAITING or TX_WAITING. False, and not waiting, when
   the slot has ended, or when another wait of this side is there: one pointer would lose it.   */
static bool vkp_i_oneshot_join(vkp_oneshot *slot, vkp_i_wait *waiter, uint32_t side)
{
    uint32_t state = VKP_I_LOAD_ACQ(&slot->i_state);
    if ((state & side) != 0) {
        return false;
    }
    VKP_I_STORE(&waiter->done, 0u);
    if (side == VKP_I_SLOT_RX_WAITING) {
        VKP_I_STORE(&slot->i_receiver, (void *)waiter);
    } else {
        VKP_I_STORE(&slot->i_sender, (void *)waiter);
    }
    while ((state & (VKP_I_SLOT_ENDED | side)) == 0) {
        if (VKP_I_CAS(&slot->i_state, &state, (state + VKP_I_SLOT_TURN) | side)) {
            return true;
        }
    }
    return false;
}

/* End a wait that vkp_i_oneshot_join began; its memory may be freed when this returns. */
static void vkp_i_oneshot_leave(vkp_oneshot *slot, vkp_i_wait *waiter, uint32_t side)
{
    uint32_t state;
    vkp_i_backoff backoff = {0};
    if (VKP_I_LOAD_ACQ(&waiter->done) != 0) {
        return;
    }
    state = VKP_I_LOAD_ACQ(&slot->i_state);
    while ((state & VKP_I_SLOT_ENDED) == 0) {
        if (VKP_I_CAS(&slot->i_state, &state, state & ~side)) {
            return;
        }
    }
    while (VKP_I_LOAD_ACQ(&waiter->done) == 0) {
        vkp_i_back_off(&backoff, vkp_i_sys(slot->i_env));
    }
}

static bool vkp_i_oneshot_has_ended(const vkp_case *each)
{
    vkp_oneshot *slot = (vkp_oneshot *)each->i_object;
    return (VKP_I_LOAD_ACQ(&slot->i_state) & VKP_I_SLOT_ENDED) != 0;
}

/* The answer while the slot has not ended: EMPTY; INVALID when this side waits already, with a
   wait that is not `wait`.                                                                     */
static vkp_status vkp_i_oneshot_pending(uint32_t state, const vkp_i_wait *wait, uint32_t side)
{
    return wait == NULL && (state & side) != 0 ? VKP_ERR_INVALID : VKP_ERR_EMPTY;
}

static const vkp_env *vkp_i_case_oneshot_env(const vkp_case *each)
{
    return ((vkp_oneshot *)each->i_object)->i_env;
}

/* Receive; the case never wins again afterwards. */
static vkp_status vkp_i_case_oneshot_attempt(vkp_case *each, vkp_i_wait *wait)
{
    vkp_oneshot *slot = (vkp_oneshot *)each->i_object;
    uint32_t state = VKP_I_LOAD_ACQ(&slot->i_state);
    vkp_status status;
    if ((state & VKP_I_SLOT_ENDED) == 0) {
        return vkp_i_oneshot_pending(state, wait, VKP_I_SLOT_RX_WAITING);
    }
    if (wait != NULL) {
        vkp_i_oneshot_leave(slot, wait, VKP_I_SLOT_RX_WAITING);
    }
    status = vkp_i_oneshot_take(slot, each->i_out);
    each->i_kind = &vkp_i_case_kind_never; /* the slot may be freed now */
    return status;
}

static bool vkp_i_case_oneshot_join(const vkp_case *each, vkp_i_wait *wait)
{
    return vkp_i_oneshot_join((vkp_oneshot *)each->i_object, wait, VKP_I_SLOT_RX_WAITING);
}

static void vkp_i_case_oneshot_leave(const vkp_case *each, vkp_i_wait *wait)
{
    vkp_i_oneshot_leave((vkp_oneshot *)each->i_object, wait, VKP_I_SLOT_RX_WAITING);
}

static const vkp_i_case_kind vkp_i_case_oneshot = {
    vkp_i_case_oneshot_attempt, vkp_i_oneshot_has_ended, vkp_i_case_oneshot_join,
    vkp_i_case_oneshot_leave, vkp_i_case_oneshot_env};

/* The sender's case: ready when the receiver has closed. INVALID after the sender's own end: the
   receiver wakes no sender then.                                                               */
static vkp_status vkp_i_case_oneshot_closed_attempt(vkp_case *each, vkp_i_wait *wait)
{
    uint32_t state = VKP_I_LOAD_ACQ(&((vkp_oneshot *)each->i_object)->i_state);
    if ((state & VKP_I_SLOT_CLOSED) != 0) {
        return VKP_OK;
    }
    return (state & VKP_I_SLOT_ENDED) != 0
               ? VKP_ERR_INVALID
               : vkp_i_oneshot_pending(state, wait, VKP_I_SLOT_TX_WAITING);
}

static bool vkp_i_case_oneshot_closed_is_ready(const vkp_case *each)
{
    return vkp_oneshot_is_closed((vkp_oneshot *)each->i_object);
}

static bool vkp_i_case_oneshot_closed_join(const vkp_case *each, vkp_i_wait *wait)
{
    vkp_oneshot *slot = (vkp_oneshot *)each->i_object;
    uint32_t state = VKP_I_LOAD_ACQ(&slot->i_state);
    if (wait->parker == NULL && (state & (VKP_I_SLOT_SENT | VKP_I_SLOT_ABANDONED)) != 0) {
        VKP_I_STORE(&wait->done, 1u); /* a handler after its own side's end: nothing wakes it */
        return true;
    }
    return vkp_i_oneshot_join(slot, wait, VKP_I_SLOT_TX_WAITING);
}

static void vkp_i_case_oneshot_closed_leave(const vkp_case *each, vkp_i_wait *wait)
{
    vkp_i_oneshot_leave((vkp_oneshot *)each->i_object, wait, VKP_I_SLOT_TX_WAITING);
}

static const vkp_i_case_kind vkp_i_case_oneshot_closed = {
    vkp_i_case_oneshot_closed_attempt, vkp_i_case_oneshot_closed_is_ready,
    vkp_i_case_oneshot_closed_join, vkp_i_case_oneshot_closed_leave, vkp_i_case_oneshot_env};

VKP_API vkp_status vkp_oneshot_recv(vkp_oneshot *slot, uint64_t deadline_ns, void *out)
{
    vkp_status status;
    VKP_I_REQUIRE(slot != NULL && out != NULL);
    status = vkp_i_oneshot_take(slot, out);
    if (status != VKP_ERR_EMPTY) {
        return status;
    }
    if (deadline_ns != 0) {
        const vkp_env *env = slot->i_env;
        vkp_case receive = vkp_i_case(&vkp_i_case_oneshot, slot, out);
        vkp_i_spin spin = {0, 0};
        uint32_t spins = vkp_i_spins(env);
        while (vkp_i_spin_again(&spin, vkp_i_sys(env), spins) &&
               !vkp_i_oneshot_has_ended(&receive)) {
        }
        status = vkp_i_select_few(&receive, 1, env, 0, deadline_ns);
        if (status != VKP_ERR_TIMEOUT) {
            return status;
        }
    }
    /* A value that arrives at the deadline is received: the side that ends the slot first wins. */
    return vkp_i_oneshot_close_first(slot) ? VKP_ERR_TIMEOUT : vkp_i_oneshot_take(slot, out);
}

VKP_API vkp_status vkp_oneshot_try_recv(vkp_oneshot *slot, void *out)
{
    VKP_I_REQUIRE(slot != NULL && out != NULL);
    return vkp_i_oneshot_take(slot, out);
}

VKP_API vkp_status vkp_oneshot_wait_closed(vkp_oneshot *slot, uint64_t deadline_ns)
{
    vkp_case closed;
    VKP_I_REQUIRE(slot != NULL);
    closed = vkp_i_case(&vkp_i_case_oneshot_closed, slot, NULL);
    return vkp_i_select_few(&closed, 1, slot->i_env, 0, deadline_ns);
}

VKP_API vkp_case vkp_case_oneshot_recv(vkp_oneshot *slot, void *out)
{
    return slot != NULL ? vkp_i_case(&vkp_i_case_oneshot, slot, out) : vkp_case_never();
}

VKP_API vkp_case vkp_case_oneshot_closed(vkp_oneshot *slot)
{
    return slot != NULL ? vkp_i_case(&vkp_i_case_oneshot_closed, slot, NULL) : vkp_case_never();
}
