/* ======================================================================================
   >>impl-mpsc   Many senders, one receiver
   ======================================================================================
   A queue is a lane: tickets count the places since the beginning, `tail` the next one to give,
   `head` the next one to receive. A ticket's place is a slot of a ring: a stamp that says for which
   ticket its value is ready, and the value. So a sender takes a ticket with one exchange, fills the
   slot, stamps it, and the receiver needs no exchange at all.

   The lowest bit of `tail`, SLOW, sends every sender through the mutex: while a ring is replaced,
   while senders wait, when bytes are counted, after close. It is set first (freeze), and what the
   fast path reads is changed after that; a fast sender that read the old state then fails its
   exchange. Under the mutex everything can be done, the fast path is a short cut.
   A ring that is too small gets a successor, which begins at the ticket of the sender that needed
   it: the old ring ends there, and the receiver frees it when it comes to that end.
   A waiting sender stands in `senders`; whoever makes room moves its value in, in order of arrival.
   Receiver and senders look for each other by the gates `flags` (asleep, or gone) and
   `tx_waiting`, see the section park. Lock order: the mutex, then
   nothing.                                                                                     */

#define VKP_I_TAIL_SLOW 1u
#define VKP_I_RX_WAITING 1u /* vkp_i_channel.flags */
#define VKP_I_RX_GONE 2u
#define VKP_I_ENDED_CLOSED 1u /* vkp_i_channel.ended */
#define VKP_I_ENDED_SENDERS 2u
#define VKP_I_STAMP_ABORTED 1u
#define VKP_I_BUNCH 16u     /* values between two looks of senders at head, see vkp_i_lane_take */
#define VKP_I_LANE_TURN 64u /* values that the receiver takes from one lane before it looks on */
#define VKP_I_HYSTERESIS 4u /* a full lane is roomy again when this part of it is free */
#define VKP_I_LINGER_BURST 64u
#define VKP_I_LINGER_PAUSES 32u
#define VKP_I_LINGER_SHARE 4u  /* never longer than it takes to fill this part of a lane */
#define VKP_I_RING_KEEP 65536u /* bytes of a ring that an empty channel keeps */

typedef struct vkp_i_channel vkp_i_channel;

typedef struct vkp_i_ring {
    struct vkp_i_ring *next; /* valid once the receiver is at `end` */
    uint64_t end;            /* atomic: the successor's first ticket; UINT64_MAX: none */
    size_t bytes;            /* of this allocation */
    uint64_t mask;           /* slots - 1 */
    size_t elem_bytes;
    size_t stride;       /* from item to item, */
    size_t stamp_stride; /* and from stamp to stamp: small values lie beside theirs */
    uint8_t *stamps;
    uint8_t *items;
} vkp_i_ring;

typedef struct vkp_i_lane {
    vkp_i_channel *channel;
    struct vkp_i_lane *next; /* atomic: of the channel's lanes, written under the mutex */
    uint32_t dead;           /* atomic: its sender has gone; the receiver frees it */
    unsigned char pad_senders[VKP_I_APART];
    uint64_t tail;      /* atomic: ticket << 1 | SLOW */
    uint64_t head_seen; /* atomic: what senders saw of head last */
    uint64_t room;      /* atomic: tickets above head to give without growing */
    vkp_i_ring *ring;   /* atomic: where tickets go now; NULL: none yet */
    vkp_i_bias bias;    /* of the one thread that sends, as long as it is one */
    unsigned char pad_receiver[VKP_I_APART];
    uint64_t head;       /* atomic */
    vkp_i_ring *rx_ring; /* atomic: where head is */
    uint64_t taken_cost; /* atomic */
    uint64_t lingered;   /* head when there was nothing the last time */
    uint32_t tx_waiting; /* gate: senders is not empty */
    bool plain;          /* no bytes to count, no eviction, no fences: values may go the fast way */
    unsigned char pad_slow[VKP_I_APART];
    uint64_t sent_cost; /* the rest is guarded by the mutex */
    vkp_i_waiters senders;
} vkp_i_lane;

struct vkp_mpsc_tx {
    vkp_i_lane *lane;
    size_t refs; /* atomic */
};
typedef struct vkp_i_extra_lane { /* of a clone, see vkp_mpsc_config.lanes */
    vkp_mpsc_tx tx;
    vkp_i_lane lane;
} vkp_i_extra_lane;

struct vkp_mpsc_rx {
    vkp_i_channel *channel;
};
struct vkp_mpsc_weak {
    vkp_i_channel *channel;
    size_t refs; /* atomic; each holds one of the channel's */
};

struct vkp_i_channel {
    vkp_mpsc_config config;
    uint64_t capacity; /* items, UINT64_MAX when unbounded */
    vkp_mpsc_tx tx;
    vkp_mpsc_rx rx;
    vkp_mpsc_weak weak;
    size_t refs;    /* atomic: all senders together, the receiver, weak senders */
    size_t handles; /* atomic: senders; the references of one count once */
    uint32_t flags; /* gate: VKP_I_RX_* */
    uint32_t ended; /* atomic: VKP_I_ENDED_* */
    uint32_t spins; /* before a thread sleeps */
    bool fenced;    /* no membarrier here */
    bool evicts;    /* senders may take the oldest value: receiving needs the mutex too */
    VKP_I_MUTEX mutex;
    vkp_i_waiters receiver;
    vkp_i_waiters closers; /* wait until closed */
    vkp_i_ring *retired;   /* rings left behind after the receiver went */
    size_t dead_lanes;     /* atomic: that the receiver has to free */
    vkp_i_lane *rx_lane;   /* the receiver's: where it took the last value */
    vkp_i_lane lane;       /* the first one */
};

/* ---- rings ---- */

static uint32_t *vkp_i_ring_stamp(const vkp_i_ring *ring, uint64_t ticket)
{
    return (uint32_t *)(void *)(ring->stamps + (size_t)(ticket & ring->mask) * ring->stamp_stride);
}

static uint8_t *vkp_i_ring_item(const vkp_i_ring *ring, uint64_t ticket)
{
    return ring->items + (size_t)(ticket & ring->mask) * ring->stride;
}

static uint32_t vkp_i_stamp(uint64_t ticket)
{
    return (uint32_t)((ticket + 1) << 1);
}

/* Room for `slots` values from ticket `start` on. Values up to 56 bytes lie behind their stamp, in
   one cache line with it; larger ones in an array of their own, so that a line's worth of value is
   one line.                                                                                    */
static vkp_i_ring *vkp_i_ring_open(const vkp_env *env, size_t elem_bytes, size_t slots,
                                   uint64_t start)
{
    size_t stride;
    size_t stamp_stride = sizeof(uint32_t);
    size_t bytes;
    vkp_i_ring *ring;
    uint64_t i;
    if (elem_bytes <= 56) {
        for (stride = 16; stride < elem_bytes + 8; stride *= 2) {
        }
        stamp_stride = stride;
    } else {
        stride = (elem_bytes + 7u) & ~(size_t)7u;
    }
    if (slots > (SIZE_MAX - sizeof *ring - 128) / (stride + stamp_stride)) {
        return NULL;
    }
    bytes = sizeof *ring + 128 + slots * (stride + (stamp_stride == stride ? 0 : stamp_stride));
    ring = (vkp_i_ring *)vkp_i_alloc(env, bytes);
    if (ring == NULL) {
        return NULL;
    }
    ring->next = NULL;
    ring->end = UINT64_MAX;
    ring->bytes = bytes;
    ring->mask = slots - 1;
    ring->elem_bytes = elem_bytes;
    ring->stride = stride;
    ring->stamp_stride = stamp_stride;
    ring->stamps = (uint8_t *)(((uintptr_t)(ring + 1) + 63u) & ~(uintptr_t)63u);
    if (elem_bytes <= 56) {
        ring->items = ring->stamps + (stride - ((elem_bytes + 7u) & ~(size_t)7u));
    } else {
        uintptr_t behind = (uintptr_t)(ring->stamps + slots * stamp_stride);
        ring->items = (uint8_t *)((behind + 63u) & ~(uintptr_t)63u);
    }
    for (i = 0; i < slots; i++) { /* no ticket from start on has this stamp in this lap */
        *vkp_i_ring_stamp(ring, i) = (uint32_t)(start << 1);
    }
    return ring;
}

static void vkp_i_ring_close(const vkp_env *env, vkp_i_ring *ring)
{
    if (ring != NULL) {
        vkp_i_free(env, ring, ring->bytes);
    }
}

/* ---- what both sides do ---- */

static size_t vkp_i_channel_cost(const vkp_i_channel *channel, const void *item)
{
    return channel->config.cost != NULL ? channel->config.cost(item) : channel->config.elem_bytes;
}

/* Tickets below `ticket` that are not free; 0 for a ticket that is out of date. */
static uint64_t vkp_i_used(uint64_t ticket, uint64_t head)
{
    return (int64_t)(ticket - head) > 0 ? ticket - head : 0;
}

/* The oldest value where it lies, or NULL. Skips what was aborted, and follows to the next ring. */
static inline uint8_t *vkp_i_lane_oldest(vkp_i_lane *lane)
{
    for (;;) {
        uint64_t head = VKP_I_LOAD(&lane->head);
        vkp_i_ring *ring = VKP_I_LOAD_ACQ(&lane->rx_ring);
        uint32_t stamp;
        if (ring == NULL) {
            return NULL;
        }
        stamp = VKP_I_LOAD_ACQ(vkp_i_ring_stamp(ring, head));
        if (stamp == vkp_i_stamp(head)) {
            return vkp_i_ring_item(ring, head);
        }
        if (stamp == (vkp_i_stamp(head) | VKP_I_STAMP_ABORTED)) {
            VKP_I_STORE_REL(&lane->head, head + 1);
        } else if (VKP_I_LOAD_ACQ(&ring->end) == head) {
            vkp_i_channel *channel = lane->channel;
            VKP_I_STORE(&lane->rx_ring, ring->next);
            if ((VKP_I_LOAD(&channel->flags) & VKP_I_RX_GONE) != 0) {
                ring->next = channel->retired; /* a drop may still be looking at a value in it */
                channel->retired = ring;
            } else {
                vkp_i_ring_close(channel->config.env, ring);
            }
        } else {
            return NULL;
        }
    }
}

/* The oldest value is out: its place is free. Senders are let in by vkp_i_lane_freed. */
static inline void vkp_i_lane_pop(vkp_i_lane *lane, const uint8_t *item)
{
    if (lane->channel->config.capacity_bytes != 0) {
        size_t cost = vkp_i_channel_cost(lane->channel, item);
        VKP_I_STORE_REL(&lane->taken_cost, VKP_I_LOAD(&lane->taken_cost) + cost);
    }
    VKP_I_STORE_REL(&lane->head, VKP_I_LOAD(&lane->head) + 1);
}

static vkp_i_lane *vkp_i_lane_after(const vkp_i_lane *lane)
{
    vkp_i_lane *next = VKP_I_LOAD_ACQ(&lane->next);
    return next != NULL ? next : &lane->channel->lane;
}

/* The lane of the receiver's next value, or NULL: where it is, as long as there is something. */
static vkp_i_lane *vkp_i_channel_find(vkp_i_channel *channel)
{
    vkp_i_lane *first = channel->rx_lane;
    vkp_i_lane *lane = first;
    do {
        if (vkp_i_lane_oldest(lane) != NULL) {
            channel->rx_lane = lane;
            return lane;
        }
        lane = vkp_i_lane_after(lane);
    } while (lane != first);
    return NULL;
}

/* Locked: wake the receiver if it sleeps. */
static void vkp_i_channel_wake_receiver(vkp_i_channel *channel)
{
    if (!vkp_i_waiters_empty(&channel->receiver)) {
        vkp_i_flag_lower(&channel->flags, VKP_I_RX_WAITING);
        vkp_i_waiters_wake_all(&channel->receiver);
    }
}

/* Drop what is queued. Values come out one by one, so that drop runs without the mutex. */
static void vkp_i_channel_purge(vkp_i_channel *channel)
{
    for (;;) {
        vkp_i_lane *lane;
        uint8_t *item;
        VKP_I_LOCK(&channel->mutex);
        lane = vkp_i_channel_find(channel);
        item = lane != NULL ? vkp_i_lane_oldest(lane) : NULL;
        if (item != NULL) {
            vkp_i_lane_pop(lane, item);
        }
        VKP_I_UNLOCK(&channel->mutex);
        if (item == NULL) {
            return;
        }
        if (channel->config.drop != NULL) {
            channel->config.drop(channel->config.user, item);
        }
    }
}

/* A sender saw that the receiver sleeps, or that it has gone and nobody will take the value. */
static void vkp_i_channel_signal(vkp_i_channel *channel)
{
    VKP_I_LOCK(&channel->mutex);
    vkp_i_channel_wake_receiver(channel);
    VKP_I_UNLOCK(&channel->mutex);
    if ((VKP_I_LOAD(&channel->flags) & VKP_I_RX_GONE) != 0) {
        vkp_i_channel_purge(channel);
    }
}
