/* --------------------------------------------------------------------------------------
   >>api-mpsc   Many senders, one receiver                                                     */

/* The configuration of an mpsc channel. Every zero is a default; only elem_bytes is required. */
typedef struct vkp_mpsc_config {
    /* Bytes of one value, 1 to 64 KiB; required. */
    size_t elem_bytes;
    /* The most values queued; 0 = unbounded. With lanes: counted per sender. */
    size_t capacity_items;
    /* The most bytes queued, as cost() counts bytes; 0 = unbounded. An empty channel takes a value
       of any cost. */
    size_t capacity_bytes;
    /* The bytes that a value counts for in capacity_bytes; NULL: elem_bytes. Called when a value is
       sent, received or dropped, on that thread, maybe under the channel's lock: return the same
       number each time, and call no function of this library. */
    size_t (*cost)(const void *item);
    /* Called once on each value that nobody received, never under a lock, on the thread that gives
       the receiver back, or on a sender's thread after that. NULL: values need no drop. */
    void (*drop)(void *user, void *item);
    /* The first argument of drop. */
    void *user;
    /* Memory and system calls; NULL: the defaults. */
    const vkp_env *env;
    /* True: each sender of vkp_mpsc_tx_clone has a lane, so that sending threads do not contend.
       The order of values is then kept per sender only, and capacity_items counts per sender. */
    bool lanes;
} vkp_mpsc_config;

/* Open a channel: its one receiver and the first sender. Memory for values is allocated with the
   first values and grows as needed; more than 64 KiB that a burst took is freed when the receiver
   waits on the empty channel, or has found it empty 64 times in a row (with lanes: a lane of it).
   Values lie at addresses aligned to 8; to 16 where elem_bytes is a multiple of 16; to 64 where
   elem_bytes is a multiple of 64. A NULL config returns INVALID.
   Owns:   borrows config; gives *tx and *rx   Blocks: never   Threads: any   In callbacks: ok
   Errors: INVALID (a null argument; elem_bytes 0 or above 64 KiB; lanes with capacity_bytes),
   NOMEM                                                                                       */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_open(const vkp_mpsc_config *config, vkp_mpsc_tx **tx,
                                               vkp_mpsc_rx **rx);

/* One more reference to the sender (gives, the same pointer). Any thread. */
VKP_API vkp_mpsc_tx *vkp_mpsc_tx_ref(vkp_mpsc_tx *tx);

/* Another sender for the same receiver. Without config.lanes this is vkp_mpsc_tx_ref. With
   config.lanes the new sender has its own lane, and the receiver takes at most 64 values in a row
   from one lane while another lane has values. A lane without a sender is freed while the receiver
   receives, after the last value of the lane.
   Owns:   gives *clone     Blocks: never     Threads: any     In callbacks: ok
   Errors: NOMEM, INVALID                                                                      */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_tx_clone(vkp_mpsc_tx *tx, vkp_mpsc_tx **clone);

/* Give a reference to the sender back. After the last reference of all senders, the receiver
   receives the values still queued, then CLOSED. NULL is ignored. Any thread.                 */
VKP_API void vkp_mpsc_tx_unref(vkp_mpsc_tx *tx);

/* A weak sender (gives): a reference that does not keep the channel open for the receiver, and
   cannot send; vkp_mpsc_upgrade makes a sender of it. Any thread.                             */
VKP_API vkp_mpsc_weak *vkp_mpsc_downgrade(vkp_mpsc_tx *tx);

/* A sender from a weak sender; with config.lanes a sender with its own lane.
   Owns:   gives *tx     Blocks: never     Threads: any     In callbacks: ok
   Errors: CLOSED (no sender is left), NOMEM (a lane), INVALID                                 */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_upgrade(vkp_mpsc_weak *weak, vkp_mpsc_tx **tx);

/* Give a weak sender back. NULL is ignored. Any thread. */
VKP_API void vkp_mpsc_weak_unref(vkp_mpsc_weak *weak);

/* Enqueue one value; wait for room until the deadline. Waiting senders get room in order of
   arrival.
   Owns:   takes what *item owns (on failure it stays the caller's)
   Blocks: until deadline_ns     Threads: any     In callbacks: would stall the loop
   Errors: CLOSED (the receiver closed), TIMEOUT (no room until the deadline), NOMEM, INVALID  */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_send(vkp_mpsc_tx *tx, const void *item,
                                               uint64_t deadline_ns);

/* Enqueue one value without waiting; never overtakes a waiting sender.
   Owns:   takes what *item owns (on failure it stays the caller's)
   Blocks: never     Threads: any     In callbacks: ok
   Errors: FULL (at capacity, or other senders wait for room), CLOSED (the receiver closed), NOMEM,
   INVALID                                                                                     */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_try_send(vkp_mpsc_tx *tx, const void *item);

/* Enqueue the `count` values of an array in order; wait for room until the deadline (0: as many
   values as fit now). OK: *sent is at least 1. *sent below count means that the deadline passed,
   the receiver closed, or memory ran out; the values not sent stay the caller's.
   Owns:   takes what the first *sent values own
   Blocks: until deadline_ns     Threads: any     In callbacks: ok with deadline 0
   Errors, when no value was sent: CLOSED (the receiver closed), TIMEOUT (no room until the
   deadline), NOMEM, INVALID (a null argument, count 0)                                        */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_send_many(vkp_mpsc_tx *tx, const void *items,
                                                    size_t count, uint64_t deadline_ns,
                                                    size_t *sent);

/* A permit: a reserved place of a channel, in the caller's memory. Build the value at `item`, then
   call vkp_mpsc_commit or vkp_mpsc_abort, once, on any thread; `item` is NULL afterwards. Until
   then the receiver gets no value sent behind the permit. A permit that is zero has no place. */
typedef struct vkp_mpsc_permit {
    void *item;        /* elem_bytes, uninitialised; the caller's until commit or abort */
    void *i_lane;      /* private: the queue of the permit's place; NULL: used, or none */
    void *i_ring;      /* private: the memory of the permit's place */
    uint64_t i_ticket; /* private: the number of the permit's place */
} vkp_mpsc_permit;

/* Reserve a place; wait for room until the deadline.
   Owns:   *permit views the channel: commit or abort before you give the sender back
   Blocks: until deadline_ns     Threads: any     In callbacks: would stall the loop
   Errors: CLOSED (the receiver closed), TIMEOUT (no room until the deadline), NOMEM, INVALID (a
   null argument; a channel with capacity_bytes: the cost of the value is not known yet)       */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_reserve(vkp_mpsc_tx *tx, uint64_t deadline_ns,
                                                  vkp_mpsc_permit *permit);

/* Reserve a place without waiting; never overtakes a waiting sender.
   Owns:   *permit views the channel: commit or abort before you give the sender back
   Blocks: never     Threads: any     In callbacks: ok
   Errors: FULL (at capacity, or other senders wait for room), CLOSED (the receiver closed), NOMEM,
   INVALID (a null argument; a channel with capacity_bytes: the cost of the value is not known
   yet)                                                                                        */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_try_reserve(vkp_mpsc_tx *tx, vkp_mpsc_permit *permit);

/* Send the value built at permit->item. The value is received even if the receiver closed after the
   reserve, and is dropped through `drop` if the receiver was given back. A permit that was
   committed or aborted before, a permit that is zero, and NULL are ignored.
   Owns:   takes what the value owns     Blocks: never     Threads: any     In callbacks: ok   */
VKP_API void vkp_mpsc_commit(vkp_mpsc_permit *permit);

/* Give a permit back without a value. The receiver skips the place; there is room for another value
   when the receiver has reached the place. Never blocks. A permit that was committed or aborted
   before, a permit that is zero, and NULL are ignored. Any thread.                            */
VKP_API void vkp_mpsc_abort(vkp_mpsc_permit *permit);

/* Wait until the receiver closes or is given back.
   Blocks: until deadline_ns     Threads: any     In callbacks: would stall the loop
   Errors: TIMEOUT, INVALID                                                                    */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_wait_closed(vkp_mpsc_tx *tx, uint64_t deadline_ns);

/* True once the receiver closed or was given back: no later send succeeds. Any thread. */
VKP_API bool vkp_mpsc_is_closed(const vkp_mpsc_tx *tx);

/* The number of values that fit now, by capacity_items alone; SIZE_MAX when that is unbounded. With
   lanes: of this sender. Other threads may change the number immediately. Any thread.         */
VKP_API size_t vkp_mpsc_get_room(const vkp_mpsc_tx *tx);

/* The channel's capacity_items; 0 = unbounded. Any thread. */
VKP_API size_t vkp_mpsc_get_capacity(const vkp_mpsc_tx *tx);

/* The number of references to the sender; with config.lanes, the number of senders. Other threads
   may change the number immediately. Any thread.                                              */
VKP_API size_t vkp_mpsc_get_senders(const vkp_mpsc_tx *tx);

/* The number of weak senders. Other threads may change the number immediately. Any thread. */
VKP_API size_t vkp_mpsc_get_weak_senders(const vkp_mpsc_tx *tx);

/* Take the oldest value; wait for a value until the deadline. Several threads may share a receiver
   if a mutex of theirs admits one at a time.
   Owns:   gives what *out owns
   Blocks: until deadline_ns     Threads: the receiver's     In callbacks: would stall the loop
   Errors: CLOSED (drained, and no sender is left or vkp_mpsc_close was called), TIMEOUT, INVALID */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_recv(vkp_mpsc_rx *rx, uint64_t deadline_ns, void *out);

/* Take the oldest value without waiting.
   Owns:   gives what *out owns     Blocks: never     Threads: the receiver's     In callbacks: ok
   Errors: EMPTY (no value; or a sender is about to fill the oldest place, or the oldest place is a
   permit), CLOSED (drained, and no sender is left or vkp_mpsc_close was called), INVALID      */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_try_recv(vkp_mpsc_rx *rx, void *out);

/* Take up to `capacity` values in one call, into the array `out`. Waits for the first value only,
   until the deadline (0: does not wait). OK: *count is at least 1.
   Owns:   gives what the values own
   Blocks: until deadline_ns     Threads: the receiver's     In callbacks: ok with deadline 0
   Errors: CLOSED (drained, and no sender is left or vkp_mpsc_close was called), TIMEOUT, INVALID (a
   null argument, capacity 0)                                                                  */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_recv_many(vkp_mpsc_rx *rx, uint64_t deadline_ns,
                                                    void *out, size_t capacity, size_t *count);

/* Give a pointer to the oldest value, and leave the value in the channel.
   Owns:   *item views the channel: valid until the next call that receives
   Blocks: never     Threads: the receiver's     In callbacks: ok
   Errors: EMPTY, CLOSED (drained, and no sender is left or vkp_mpsc_close was called), INVALID */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_peek(vkp_mpsc_rx *rx, const void **item);

/* The number of values queued now, permits included. Senders may change the number immediately.
   Receiver's thread.                                                                          */
VKP_API size_t vkp_mpsc_get_len(const vkp_mpsc_rx *rx);

/* True once vkp_mpsc_close was called or no sender is left: no new value arrives, except in permits
   reserved before; queued values are still received. Receiver's thread.                       */
VKP_API bool vkp_mpsc_rx_is_closed(const vkp_mpsc_rx *rx);

/* Refuse new values: senders get CLOSED, waiting senders immediately. Queued values, and the values
   of permits reserved before, are still received. Idempotent; NULL is ignored. Any thread.    */
VKP_API void vkp_mpsc_close(vkp_mpsc_rx *rx);

/* Close the channel, drop the queued values through `drop`, give the receiver back. Before this
   call, give back the handlers of the receiver. NULL is ignored. Receiver's thread.           */
VKP_API void vkp_mpsc_rx_unref(vkp_mpsc_rx *rx);
