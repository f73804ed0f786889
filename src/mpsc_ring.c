/* ======================================================================================
   >>impl-mpsc   Many senders, one receiver
   ======================================================================================
   A queue is a lane. Tickets count its places since the beginning: `tail` is the next ticket to
   give, `head` the next ticket to receive. The place of a ticket, in a ring, has a stamp, which
   says for which ticket its value is ready, and the value. A sender takes a ticket with one
   exchange, writes the value and stores the stamp (release); the receiver loads the stamp
   (acquire), reads the value and stores `head` (release), all without an exchange.
   The lowest bit of `tail`, SLOW, sends every sender through the mutex: while a ring is replaced,
   while senders wait, when bytes are counted, after close. SLOW is set first (vkp_i_lane_freeze),
   the fields that the fast path reads change afterwards; a fast sender that read the old state
   then fails its exchange. Under the mutex everything can be done: the fast path is a short cut.
   A ring that is too small gets a successor, which begins at the ticket of the sender that needed
   it. The old ring ends at that ticket, and the receiver frees it when `head` arrives there.
   A waiting sender is linked in `senders`; the side that makes room moves its value in, in order
   of arrival. Senders find a receiver that sleeps or is gone by the flag `flags`; the receiver
   finds waiting senders by the flag `tx_waiting` (flags: section park).
   Lock order: the mutex, and under it only the lock that wake takes.                           */

#define VKP_I_TAIL_SLOW 1u     /* in vkp_i_lane.tail: senders take the mutex */
#define VKP_I_TAIL_TICKET 2u   /* in vkp_i_lane.tail: one ticket */
#define VKP_I_RX_WAITING 1u    /* in vkp_i_channel.flags: the receiver waits */
#define VKP_I_RX_GONE 2u       /* in vkp_i_channel.flags: the receiver gave its handle back */
#define VKP_I_ENDED_CLOSED 1u  /* in vkp_i_channel.ended: the receiver closed */
#define VKP_I_ENDED_SENDERS 2u /* in vkp_i_channel.ended: no sender is left */
#define VKP_I_STAMP_ABORTED 1u /* in a stamp: the place has no value */
#define VKP_I_STAMP_BYTES 8u   /* room of a stamp in front of its value, which is aligned to 8 */
#define VKP_I_LINE_BYTES 64u   /* a cache line */
#define VKP_I_PLACE_MIN 16u    /* fewest bytes of a place with stamp and value */
#define VKP_I_RING_FIRST 16u   /* most places of the first ring */
#define VKP_I_RING_FIRST_MOST 4096u /* most bytes of values in the first ring */
#define VKP_I_RING_KEEP 65536u      /* bytes of a ring that an empty lane keeps */
#define VKP_I_SHRINK_SEARCHES 64u   /* searches that find a lane empty, until it frees more */

/* Most bytes of a value that lies beside its stamp. */
#define VKP_I_BESIDE_MAX (VKP_I_LINE_BYTES - VKP_I_STAMP_BYTES)

/* Most places of a ring: a stamp has 31 bits of its ticket. */
#define VKP_I_RING_PLACES_MAX (UINT32_MAX / 4)

#define VKP_I_BUNCH 16u     /* values that the receiver takes between two stores of head */
#define VKP_I_LANE_TURN 64u /* values that the receiver takes from one lane before the next lane */
#define VKP_I_HYSTERESIS 4u /* a spinning sender tries again when 1 / this of a lane is free */
#define VKP_I_LINGER_BURST 64u  /* values of a burst that needs no linger */
#define VKP_I_LINGER_PAUSES 32u /* most pauses of a linger */
#define VKP_I_LINGER_SHARE 4u   /* most pauses of a linger: room / this, so that no lane fills */

typedef struct vkp_i_channel vkp_i_channel;

typedef struct vkp_i_ring {
    struct vkp_i_ring *next; /* the successor, once `end` is set; the next ring of `retired` */
    uint64_t end;            /* atomic: first ticket of the successor; UINT64_MAX without one */
    size_t bytes;            /* of this allocation */
    uint64_t mask;           /* number of places - 1; the number is a power of two */
    size_t elem_bytes;       /* of one value */
    size_t stride;           /* bytes from one value to the next */
    size_t stamp_stride;     /* bytes from one stamp to the next; `stride` for small values */
    uint8_t *stamps;         /* the stamp of place 0 */
    uint8_t *items;          /* the value of place 0; small values lie beside their stamps */
} vkp_i_ring;

/* One queue: of all senders of a channel, or of one sender of a channel with lanes. */
typedef struct vkp_i_lane {
    vkp_i_channel *channel;
    struct vkp_i_lane *next; /* atomic: the next lane of the channel; written under the mutex */
    uint32_t dead;           /* atomic: 1 when its sender is gone; the receiver frees the lane */
    unsigned char pad_senders[VKP_I_APART]; /* senders write the fields below */
    uint64_t tail;                          /* atomic: next ticket << 1, and VKP_I_TAIL_SLOW */
    uint64_t head_seen;                     /* atomic: `head` as a sender loaded it last */
    uint64_t room;    /* atomic: tickets above `head` that senders may take in this ring */
    vkp_i_ring *ring; /* atomic: the ring of `tail`; NULL: none yet, or freed when empty */
    vkp_i_bias bias;  /* of the one thread that sends, while only one does */
    unsigned char pad_receiver[VKP_I_APART]; /* the receiver writes the fields below */
    uint64_t head;                           /* atomic: next ticket to receive */
    vkp_i_ring *rx_ring;                     /* atomic: the ring of `head` */
    uint64_t taken_cost;                     /* atomic: cost of all values received, in bytes */
    uint64_t lingered;   /* `head` when the receiver found nothing the last time */
    uint64_t searched;   /* `head` when a search found the lane empty, and its ring large */
    uint32_t searches;   /* searches in a row that did so, with no value in between */
    uint32_t tx_waiting; /* flag: 1 while `senders` is not empty */
    bool found_empty;    /* the last search found no value here; for vkp_i_channel_tidy */
    bool plain; /* no counted bytes, no eviction, not fenced: vkp_i_lane_recv_fast may run */
    unsigned char pad_slow[VKP_I_APART]; /* the mutex guards the fields below */
    uint64_t sent_cost;                  /* under the mutex: cost of all values sent, in bytes */
    vkp_i_waiters senders;               /* under the mutex: waiting senders, oldest first */
    bool linked; /* under the mutex: in the list of lanes, which begins with a lane's first use */
} vkp_i_lane;

struct vkp_mpsc_tx {
    vkp_i_lane *lane;
    size_t refs; /* atomic */
};

/* A sender with a lane of its own: a clone, see vkp_mpsc_config.lanes. */
typedef struct vkp_i_extra_lane {
    vkp_mpsc_tx tx;
    vkp_i_lane lane;
} vkp_i_extra_lane;

struct vkp_mpsc_rx {
    vkp_i_channel *channel;
};

struct vkp_mpsc_weak {
    vkp_i_channel *channel;
    size_t refs; /* atomic; each weak sender also holds one of vkp_i_channel.refs */
};

struct vkp_i_channel {
    vkp_mpsc_config config; /* a copy; config.env is not NULL */
    uint64_t capacity;      /* most values of one lane; UINT64_MAX when unbounded */
    vkp_mpsc_tx tx;         /* the sender of the first lane */
    vkp_mpsc_rx rx;         /* the receiver */
    vkp_mpsc_weak weak;     /* all weak senders */
    size_t refs;            /* atomic: one of all senders together, the receiver, weak senders */
    size_t handles;         /* atomic: senders; all references to one sender count once */
    uint32_t flags;         /* flag: VKP_I_RX_WAITING, VKP_I_RX_GONE */
    uint32_t ended;         /* atomic: VKP_I_ENDED_CLOSED, VKP_I_ENDED_SENDERS; never cleared */
    uint32_t spins;         /* pauses before a thread sleeps */
    bool fenced;            /* there is no membarrier: flags and biases do without */
    bool evicts;            /* senders may take the oldest value: receiving takes the mutex, too */
    VKP_I_MUTEX mutex;      /* guards the lists of waiters and the slow path of all lanes */
    vkp_i_waiters receiver; /* under the mutex: the waiting receiver */
    vkp_i_waiters closers;  /* under the mutex: waits for the close of the receiver */
    vkp_i_ring *retired;    /* under the mutex: rings that ended after the receiver was gone */
    vkp_i_lane *rx_lane;    /* the receiver's: the lane of its last value */
    vkp_i_lane lane;        /* the first lane */
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

/* The stamp of a place whose value is ready for the ticket; its lowest bit is for
   VKP_I_STAMP_ABORTED.                                                                         */
static uint32_t vkp_i_stamp(uint64_t ticket)
{
    return (uint32_t)((ticket + 1) << 1);
}

/* A ring with `slots` places, a power of two, from ticket `start` on; NULL without memory. A
   value up to VKP_I_BESIDE_MAX lies behind its stamp, in the same cache line; larger values have
   an array of their own, so that a value of one line does not touch two.                       */
static vkp_i_ring *vkp_i_ring_open(const vkp_env *env, size_t elem_bytes, size_t slots,
                                   uint64_t start)
{
    size_t stride;
    size_t stamp_stride = sizeof(uint32_t);
    size_t bytes;
    vkp_i_ring *ring;
    uint64_t i;
    if (elem_bytes <= VKP_I_BESIDE_MAX) {
        for (stride = VKP_I_PLACE_MIN; stride < elem_bytes + VKP_I_STAMP_BYTES; stride *= 2) {
        }
        stamp_stride = stride;
    } else {
        stride = (elem_bytes + 7u) & ~(size_t)7u;
    }
    if (slots > (SIZE_MAX - sizeof *ring - 2 * VKP_I_LINE_BYTES) / (stride + stamp_stride)) {
        return NULL;
    }
    bytes = sizeof *ring + 2 * VKP_I_LINE_BYTES +
            slots * (stride + (stamp_stride == stride ? 0 : stamp_stride));
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
    ring->stamps = (uint8_t *)(((uintptr_t)(ring + 1) + VKP_I_LINE_BYTES - 1u) &
                               ~(uintptr_t)(VKP_I_LINE_BYTES - 1u));
    if (elem_bytes <= VKP_I_BESIDE_MAX) {
        ring->items = ring->stamps + (stride - ((elem_bytes + 7u) & ~(size_t)7u));
    } else {
        uintptr_t behind = (uintptr_t)(ring->stamps + slots * stamp_stride);
        ring->items =
            (uint8_t *)((behind + VKP_I_LINE_BYTES - 1u) & ~(uintptr_t)(VKP_I_LINE_BYTES - 1u));
    }
    for (i = 0; i < slots; i++) { /* the stamp of ticket start - 1 */
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

/* ---- both sides ---- */

/* The cost of a value, in bytes. */
static size_t vkp_i_channel_cost(const vkp_i_channel *channel, const void *item)
{
    return channel->config.cost != NULL ? channel->config.cost(item) : channel->config.elem_bytes;
}

/* Tickets from `head` up to `ticket`; 0 when `ticket` is out of date, and so below `head`. */
static uint64_t vkp_i_used(uint64_t ticket, uint64_t head)
{
    return (int64_t)(ticket - head) > 0 ? ticket - head : 0;
}

/* The oldest value where it lies, or NULL. Passes aborted places, and rings that have ended,
   which it frees. The caller lets in the senders that wait for aborted places (vkp_i_channel_tidy).
   Receiver's thread; under the mutex when `evicts` or when the receiver is gone.               */
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
                ring->next = channel->retired; /* a drop may still use a value of the ring */
                channel->retired = ring;
            } else {
                vkp_i_ring_close(channel->config.env, ring);
            }
        } else {
            return NULL;
        }
    }
}

/* The oldest value was taken: its place is free. The caller lets waiting senders in
   (vkp_i_channel_tidy).                                                                          */
static inline void vkp_i_lane_pop(vkp_i_lane *lane, const uint8_t *item)
{
    if (lane->channel->config.capacity_bytes != 0) {
        size_t cost = vkp_i_channel_cost(lane->channel, item);
        VKP_I_STORE_REL(&lane->taken_cost, VKP_I_LOAD(&lane->taken_cost) + cost);
    }
    VKP_I_STORE_REL(&lane->head, VKP_I_LOAD(&lane->head) + 1);
}

/* The next lane; after the last lane the first one. */
static vkp_i_lane *vkp_i_lane_after(const vkp_i_lane *lane)
{
    vkp_i_lane *next = VKP_I_LOAD_ACQ(&lane->next);
    return next != NULL ? next : &lane->channel->lane;
}

/* The lane of the next value of the receiver, or NULL: its last lane while that has values, else
   the next lane with a value.                                                                  */
static vkp_i_lane *vkp_i_channel_find(vkp_i_channel *channel)
{
    vkp_i_lane *first = channel->rx_lane;
    vkp_i_lane *lane = first;
    do {
        if (vkp_i_lane_oldest(lane) != NULL) {
            channel->rx_lane = lane;
            return lane;
        }
        lane->found_empty = true;
        lane = vkp_i_lane_after(lane);
    } while (lane != first);
    return NULL;
}

/* Locked: wake the receiver if it waits. */
static void vkp_i_channel_wake_receiver(vkp_i_channel *channel)
{
    if (!vkp_i_waiters_empty(&channel->receiver)) {
        vkp_i_flag_lower(&channel->flags, VKP_I_RX_WAITING);
        vkp_i_waiters_wake_all(&channel->receiver);
    }
}

/* Drop all queued values. Each is taken under the mutex, and dropped without it. */
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

/* A sender found `flags` raised: wake the waiting receiver, or, when the receiver is gone, drop
   the values that no receiver will take.                                                       */
static void vkp_i_channel_signal(vkp_i_channel *channel)
{
    VKP_I_LOCK(&channel->mutex);
    vkp_i_channel_wake_receiver(channel);
    VKP_I_UNLOCK(&channel->mutex);
    if ((VKP_I_LOAD(&channel->flags) & VKP_I_RX_GONE) != 0) {
        vkp_i_channel_purge(channel);
    }
}
