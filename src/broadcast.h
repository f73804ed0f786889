/* --------------------------------------------------------------------------------------
   >>api-broadcast   Every receiver sees every value                                       */

typedef struct vkp_broadcast_config {
    size_t elem_bytes; /* bytes of one value; required */
    size_t
        capacity_items; /* values kept for slow receivers; rounded up to a power of two; required */
    /* For values that own something, of at most 256 bytes: retain makes the copy *item own it too,
       drop gives that up. Both or neither. retain is called for each copy handed out, under a latch
       of the value's place: count a reference there (vkp_bytes_ref), and do no more. The ring keeps
       a value until another one takes its place, or the channel ends.                         */
    void (*retain)(void *user, void *item);
    void (*drop)(void *user, void *item);
    void *user;
    const vkp_env *env;
} vkp_broadcast_config;

/* Open a channel without receivers. All memory is taken here.
   Owns:   borrows config; gives *tx     Blocks: never     Threads: any     In callbacks: ok
   Errors: INVALID (elem_bytes 0 or above 64 KiB, 256 bytes with retain; no capacity; only one of
   retain and drop), NOMEM                                                                     */
VKP_API VKP_NODISCARD vkp_status vkp_broadcast_open(const vkp_broadcast_config *config,
                                                    vkp_broadcast_tx **tx);
VKP_API vkp_broadcast_tx *vkp_broadcast_tx_ref(vkp_broadcast_tx *tx); /* any thread */

/* One sender less. After the last one receivers drain, then get CLOSED. NULL is ignored. */
VKP_API void vkp_broadcast_tx_unref(vkp_broadcast_tx *tx);

/* A receiver of what is sent from now on; beside a sender, or beside another receiver.
   Owns:   gives *rx     Blocks: never     Threads: any / the receiver's     Errors: NOMEM,
   INVALID                                                                                      */
VKP_API VKP_NODISCARD vkp_status vkp_broadcast_subscribe(vkp_broadcast_tx *tx,
                                                         vkp_broadcast_rx **rx);
VKP_API VKP_NODISCARD vkp_status vkp_broadcast_resubscribe(vkp_broadcast_rx *rx,
                                                           vkp_broadcast_rx **fresh);
VKP_API void vkp_broadcast_rx_unref(vkp_broadcast_rx *rx); /* NULL is ignored */

/* Send one value to every receiver, over the oldest one if the ring is full. Never waits for
   receivers. With several senders the order is the same for all receivers.
   Owns:   takes what *item owns (on failure it stays the caller's)
   Blocks: never     Threads: any     In callbacks: ok     Errors: CLOSED (no receiver), INVALID */
VKP_API VKP_NODISCARD vkp_status vkp_broadcast_send(vkp_broadcast_tx *tx, const void *item);

/* Take the oldest value not seen yet, waiting until the deadline.
   Owns:   gives a copy: what it owns is yours     Blocks: until deadline_ns     Threads: rx's
   Errors: LAGGED (values were lost, vkp_broadcast_get_missed tells how many; the next receive gives
   the oldest one still there; *out may have been written), CLOSED (drained, and no sender is left),
   TIMEOUT, INVALID                                                                            */
VKP_API VKP_NODISCARD vkp_status vkp_broadcast_recv(vkp_broadcast_rx *rx, uint64_t deadline_ns,
                                                    void *out);

/* As vkp_broadcast_recv, EMPTY instead of waiting. */
VKP_API VKP_NODISCARD vkp_status vkp_broadcast_try_recv(vkp_broadcast_rx *rx, void *out);

/* Take up to `capacity` values at once; waits only for the first, with deadline 0 not at all.
   *count is written on OK, at least 1. Errors as vkp_broadcast_recv.                          */
VKP_API VKP_NODISCARD vkp_status vkp_broadcast_recv_many(vkp_broadcast_rx *rx, uint64_t deadline_ns,
                                                         void *out, size_t capacity, size_t *count);

/* Values lost: at the last LAGGED, exactly. Values waiting, those already lost included.
   Receiver's thread.                                                                          */
VKP_API uint64_t vkp_broadcast_get_missed(const vkp_broadcast_rx *rx);
VKP_API uint64_t vkp_broadcast_get_len(const vkp_broadcast_rx *rx);

/* Receivers now; and wait until there is none: OK, TIMEOUT, INVALID. Any thread. */
VKP_API size_t vkp_broadcast_get_receivers(const vkp_broadcast_tx *tx);
VKP_API VKP_NODISCARD vkp_status vkp_broadcast_wait_closed(vkp_broadcast_tx *tx,
                                                           uint64_t deadline_ns);
