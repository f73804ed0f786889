/* --------------------------------------------------------------------------------------
   >>api-mpsc   Many senders, one receiver                                                 */

typedef struct vkp_mpsc_config {
    size_t elem_bytes;     /* bytes of one value; required */
    size_t capacity_items; /* most values queued; 0 = unbounded */
    size_t capacity_bytes; /* most cost queued, by cost(); 0 = unbounded; one value always fits */
    /* Bytes that a value stands for; default elem_bytes. Used with capacity_bytes. Called at send
       and at receive, under the channel's lock: the same answer each time, no library call.   */
    size_t (*cost)(const void *item);
    void (*drop)(void *user, void *item); /* called once on each value nobody received */
    void *user;                           /* handed to drop */
    const vkp_env *env;
    /* Senders of vkp_mpsc_tx_clone have a lane each, so that threads that send do not meet: the
       order of values is kept per sender only, and capacity_items counts per sender.           */
    bool lanes;
} vkp_mpsc_config;

/* Open a channel: its one receiver and the first sender. Memory for values comes with the first
   ones and grows with need; what a burst took is given back when the receiver finds nothing.
   Values lie at addresses aligned to 8, to 16 where elem_bytes is a multiple of 16, to 64 where
   it is a multiple of 64.
   Owns:   borrows config; gives *tx and *rx   Blocks: never   Threads: any   In callbacks: ok
   Errors: INVALID (elem_bytes 0 or above 64 KiB; lanes with capacity_bytes), NOMEM            */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_open(const vkp_mpsc_config *config, vkp_mpsc_tx **tx,
                                               vkp_mpsc_rx **rx);

/* One more reference to the same sender (gives, the same pointer). Any thread. */
VKP_API vkp_mpsc_tx *vkp_mpsc_tx_ref(vkp_mpsc_tx *tx);

/* Another sender for the same receiver. Without config.lanes that is vkp_mpsc_tx_ref, with it the
   sender has a lane of its own, for which the receiver waits at most 64 values of each other.
   Owns:   gives *clone     Blocks: never     Threads: any     Errors: NOMEM, INVALID          */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_tx_clone(vkp_mpsc_tx *tx, vkp_mpsc_tx **clone);

/* One reference less. After the last one of all senders the receiver drains, then gets CLOSED.
   NULL is ignored. Any thread.                                                                */
VKP_API void vkp_mpsc_tx_unref(vkp_mpsc_tx *tx);

/* A weak sender (gives): it does not keep the channel open for the receiver. Any thread. Upgrading
   gives *tx, a sender. Errors: CLOSED (the last sender has gone), NOMEM (a lane), INVALID.    */
VKP_API vkp_mpsc_weak *vkp_mpsc_downgrade(vkp_mpsc_tx *tx);
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_upgrade(vkp_mpsc_weak *weak, vkp_mpsc_tx **tx);
VKP_API void vkp_mpsc_weak_unref(vkp_mpsc_weak *weak); /* NULL is ignored */

/* Enqueue one value, waiting for room until the deadline. Waiting senders go in order of arrival.
   Owns:   takes what *item owns (on failure it stays the caller's)
   Blocks: until deadline_ns      Threads: any      In callbacks: would stall the loop
   Errors: CLOSED (receiver closed), TIMEOUT, NOMEM, INVALID                                   */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_send(vkp_mpsc_tx *tx, const void *item,
                                               uint64_t deadline_ns);

/* Enqueue one value without waiting; never overtakes a waiting sender.
   Owns:   takes what *item owns (on failure it stays the caller's)
   Blocks: never          Threads: any          In callbacks: ok
   Errors: FULL (at capacity), CLOSED (receiver closed), NOMEM, INVALID                        */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_try_send(vkp_mpsc_tx *tx, const void *item);

/* Enqueue the `count` values of an array, in order, waiting for room until the deadline (0: as many
   as fit now). *sent is written on OK, at least 1: fewer than count means that the deadline
   passed, the receiver closed, or memory ran out, and the values behind stay the caller's.
   Threads, Errors: as vkp_mpsc_send, when none was sent                                       */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_send_many(vkp_mpsc_tx *tx, const void *items,
                                                    size_t count, uint64_t deadline_ns,
                                                    size_t *sent);

/* A place in the queue, in the caller's memory: build the value at `item`, then commit or abort,
   once, on any thread. The receiver waits behind the place until then.                        */
typedef struct vkp_mpsc_permit {
    void *item; /* elem_bytes, uninitialised; yours until commit or abort */
    void *i_lane;
    void *i_ring;
    uint64_t i_ticket;
} vkp_mpsc_permit;

/* Take a place, waiting for room until the deadline; or without waiting.
   Owns:   *permit views the channel: commit or abort it before the sender's unref
   Blocks: until deadline_ns / never      Threads: any
   Errors: as vkp_mpsc_send / as vkp_mpsc_try_send; INVALID with capacity_bytes, as a value that is
   not there yet costs nothing known                                                           */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_reserve(vkp_mpsc_tx *tx, uint64_t deadline_ns,
                                                  vkp_mpsc_permit *permit);
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_try_reserve(vkp_mpsc_tx *tx, vkp_mpsc_permit *permit);

/* The value is built: it is received even if the receiver closed meanwhile, and goes to `drop` if
   the receiver is gone. Takes what the value owns. Never blocks.                              */
VKP_API void vkp_mpsc_commit(vkp_mpsc_permit *permit);

/* No value: the place is skipped, and free again when the receiver comes to it. Never blocks. */
VKP_API void vkp_mpsc_abort(vkp_mpsc_permit *permit);

/* Wait until the receiver closes or goes: OK, TIMEOUT, INVALID. Any thread; would stall a loop. */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_wait_closed(vkp_mpsc_tx *tx, uint64_t deadline_ns);

/* Plain reads, out of date at once while others send or receive. Any thread.
   is_closed: the receiver closed, sending cannot succeed any more. room: values that fit now by
   their number, SIZE_MAX when that is unbounded. capacity: capacity_items. senders, weak_senders:
   references.                                                                                  */
VKP_API bool vkp_mpsc_is_closed(const vkp_mpsc_tx *tx);
VKP_API size_t vkp_mpsc_get_room(const vkp_mpsc_tx *tx);
VKP_API size_t vkp_mpsc_get_capacity(const vkp_mpsc_tx *tx);
VKP_API size_t vkp_mpsc_get_senders(const vkp_mpsc_tx *tx);
VKP_API size_t vkp_mpsc_get_weak_senders(const vkp_mpsc_tx *tx);

/* Take the oldest value, waiting until the deadline.
   Owns:   gives what *out owns     Blocks: until deadline_ns     Threads: the receiver's
   Errors: CLOSED (drained, and no sender is left or vkp_mpsc_close was called), TIMEOUT, INVALID */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_recv(vkp_mpsc_rx *rx, uint64_t deadline_ns, void *out);

/* Take the oldest value if there is one. As vkp_mpsc_recv, EMPTY instead of waiting: also while the
   oldest place is another sender's who is about to fill it, or holds a permit.                */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_try_recv(vkp_mpsc_rx *rx, void *out);

/* Take up to `capacity` values at once into the array `out`; waits only for the first, with
   deadline 0 not at all. *count is written on OK, at least 1. Errors as vkp_mpsc_recv.        */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_recv_many(vkp_mpsc_rx *rx, uint64_t deadline_ns,
                                                    void *out, size_t capacity, size_t *count);

/* Look at the oldest value where it lies.
   Owns:   *item views the channel: valid until the next call that receives   Blocks: never
   Threads: the receiver's     Errors: EMPTY, CLOSED, INVALID                                  */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_peek(vkp_mpsc_rx *rx, const void **item);

/* Values queued now, places reserved included; out of date at once while others send. is_closed:
   the receiver closed or the last sender went: nothing new comes, what is queued is still received.
   Receiver's thread.                                                                          */
VKP_API size_t vkp_mpsc_get_len(const vkp_mpsc_rx *rx);
VKP_API bool vkp_mpsc_rx_is_closed(const vkp_mpsc_rx *rx);

/* Refuse new values: senders get CLOSED, waiting ones at once; queued ones are still received,
   and those of places reserved before. Idempotent. Any thread.                                */
VKP_API void vkp_mpsc_close(vkp_mpsc_rx *rx);

/* Close, drop what is queued, give the receiver back. NULL is ignored. Its handlers are given back
   before. Receiver's thread.                                                                  */
VKP_API void vkp_mpsc_rx_unref(vkp_mpsc_rx *rx);
