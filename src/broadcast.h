/* --------------------------------------------------------------------------------------
   >>api-broadcast   Every receiver sees every value                                           */

/* The configuration of a broadcast. elem_bytes and capacity_items are required. */
typedef struct vkp_broadcast_config {
    /* Bytes of one value, 1 to 64 KiB, at most 256 with retain; required. */
    size_t elem_bytes;
    /* The values kept for slow receivers; rounded up to a power of two; required. */
    size_t capacity_items;
    /* For values that own something, of at most 256 bytes; set together with drop. retain makes the
       copy *item an owner, too. Called for each copy that a receiver gets, on the receiver's
       thread, under a lock of the value's place: count a reference (vkp_bytes_ref) only.  */
    void (*retain)(void *user, void *item);
    /* For values that own something; set together with retain. drop gives up what the channel's
       own copy owns: when another value takes its place (on the sender's thread), or when the
       channel is freed. Never called under a lock. */
    void (*drop)(void *user, void *item);
    /* The first argument of retain and drop. */
    void *user;
    /* Memory and system calls; NULL: the defaults. */
    const vkp_env *env;
} vkp_broadcast_config;

/* Open a channel with one sender and no receivers. Allocates the memory of all values. A NULL
   config returns INVALID.
   Owns:   borrows config; gives *tx     Blocks: never     Threads: any     In callbacks: ok
   Errors: INVALID (a null argument; elem_bytes 0 or above 64 KiB, above 256 bytes with retain;
   capacity_items 0; only one of retain and drop), NOMEM                                       */
VKP_API VKP_NODISCARD vkp_status vkp_broadcast_open(const vkp_broadcast_config *config,
                                                    vkp_broadcast_tx **tx);

/* One more reference to the sender (gives, the same pointer). Any thread. */
VKP_API vkp_broadcast_tx *vkp_broadcast_tx_ref(vkp_broadcast_tx *tx);

/* Give a reference to the sender back. After the last one, receivers receive the values still kept,
   then CLOSED. NULL is ignored. Any thread.                                                   */
VKP_API void vkp_broadcast_tx_unref(vkp_broadcast_tx *tx);

/* A new receiver, which gets each value sent from now on.
   Owns:   gives *rx     Blocks: never     Threads: any     In callbacks: ok
   Errors: NOMEM, INVALID                                                                      */
VKP_API VKP_NODISCARD vkp_status vkp_broadcast_subscribe(vkp_broadcast_tx *tx,
                                                         vkp_broadcast_rx **rx);

/* A new receiver, which gets each value sent from now on, not what rx has not received yet.
   Owns:   gives *fresh     Blocks: never     Threads: the receiver's     In callbacks: ok
   Errors: NOMEM, INVALID                                                                      */
VKP_API VKP_NODISCARD vkp_status vkp_broadcast_resubscribe(vkp_broadcast_rx *rx,
                                                           vkp_broadcast_rx **fresh);

/* Give the receiver back. NULL is ignored. Receiver's thread. */
VKP_API void vkp_broadcast_rx_unref(vkp_broadcast_rx *rx);

/* Send one value to every receiver; the value replaces the oldest one when the channel is full.
   Never waits for receivers. All receivers see the values of several senders in one order.
   Owns:   takes what *item owns (on failure it stays the caller's)
   Blocks: never     Threads: any     In callbacks: ok
   Errors: CLOSED (no receiver), INVALID                                                       */
VKP_API VKP_NODISCARD vkp_status vkp_broadcast_send(vkp_broadcast_tx *tx, const void *item);

/* Take the oldest value that rx has not received yet; wait for a value until the deadline.
   Owns:   gives a copy, and what the copy owns
   Blocks: until deadline_ns     Threads: the receiver's     In callbacks: would stall the loop
   Errors: LAGGED (values were lost: vkp_broadcast_get_missed is their number; the next receive
   gives the oldest value still kept; *out may have been written), CLOSED (drained, and no sender is
   left), TIMEOUT, INVALID                                                                     */
VKP_API VKP_NODISCARD vkp_status vkp_broadcast_recv(vkp_broadcast_rx *rx, uint64_t deadline_ns,
                                                    void *out);

/* Take the oldest value that rx has not received yet, without waiting.
   Owns:   gives a copy, and what the copy owns
   Blocks: never     Threads: the receiver's     In callbacks: ok
   Errors: EMPTY (no new value), LAGGED (values were lost: vkp_broadcast_get_missed is their number;
   the next receive gives the oldest value still kept; *out may have been written), CLOSED
   (drained, and no sender is left), INVALID                                                   */
VKP_API VKP_NODISCARD vkp_status vkp_broadcast_try_recv(vkp_broadcast_rx *rx, void *out);

/* Take up to `capacity` values in one call, into the array `out`. Waits for the first value only,
   until the deadline (0: does not wait). OK: *count is at least 1.
   Owns:   gives copies, and what the copies own
   Blocks: until deadline_ns     Threads: the receiver's     In callbacks: ok with deadline 0
   Errors: LAGGED (values were lost: vkp_broadcast_get_missed is their number; the next receive
   gives the oldest value still kept; *out may have been written), CLOSED (drained, and no sender is
   left), TIMEOUT, INVALID (a null argument, capacity 0)                                       */
VKP_API VKP_NODISCARD vkp_status vkp_broadcast_recv_many(vkp_broadcast_rx *rx, uint64_t deadline_ns,
                                                         void *out, size_t capacity, size_t *count);

/* The exact number of values lost at the last LAGGED; 0 before the first. Receiver's thread. */
VKP_API uint64_t vkp_broadcast_get_missed(const vkp_broadcast_rx *rx);

/* The number of values sent and not received yet, values already lost included. Receiver's
   thread.                                                                                     */
VKP_API uint64_t vkp_broadcast_get_len(const vkp_broadcast_rx *rx);

/* The number of receivers now. Any thread. */
VKP_API size_t vkp_broadcast_get_receivers(const vkp_broadcast_tx *tx);

/* Wait until no receiver is left.
   Blocks: until deadline_ns     Threads: any     In callbacks: would stall the loop
   Errors: TIMEOUT, INVALID                                                                    */
VKP_API VKP_NODISCARD vkp_status vkp_broadcast_wait_closed(vkp_broadcast_tx *tx,
                                                           uint64_t deadline_ns);
