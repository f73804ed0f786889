/* --------------------------------------------------------------------------------------
   >>api-watch   Only the newest value                                                         */

/* The configuration of a watch. Every zero is a default; only elem_bytes is required. */
typedef struct vkp_watch_config {
    /* Bytes of the value, 1 to 64 KiB; required. */
    size_t elem_bytes;
    /* The first value, elem_bytes; NULL: zeroes, which are never dropped. vkp_watch_open takes what
       the value owns. */
    const void *initial;
    /* For values that own something; NULL for other values. Called once on each value that was
       replaced and is no longer borrowed, and on the last values when the channel is freed; on the
       thread of that call, never under a lock. Values with a drop are borrowed, not copied out
       (vkp_watch_get returns INVALID). */
    void (*drop)(void *user, void *item);
    /* The first argument of drop. */
    void *user;
    /* Memory and system calls; NULL: the defaults. */
    const vkp_env *env;
} vkp_watch_config;

/* Open a channel that holds the initial value, with one sender and no receivers. A NULL config
   returns INVALID.
   Owns:   borrows config, takes what *config->initial owns (on failure it stays the caller's);
   gives *tx
   Blocks: never     Threads: any     In callbacks: ok
   Errors: INVALID (a null argument; elem_bytes 0 or above 64 KiB), NOMEM                      */
VKP_API VKP_NODISCARD vkp_status vkp_watch_open(const vkp_watch_config *config, vkp_watch_tx **tx);

/* One more reference to the sender (gives, the same pointer). Any thread. */
VKP_API vkp_watch_tx *vkp_watch_tx_ref(vkp_watch_tx *tx);

/* Give a reference to the sender back. After the last one, vkp_watch_changed returns CLOSED once
   the newest value is seen. NULL is ignored. Any thread.                                      */
VKP_API void vkp_watch_tx_unref(vkp_watch_tx *tx);

/* A new receiver, which has seen the current value.
   Owns:   gives *rx     Blocks: never     Threads: any     In callbacks: ok
   Errors: NOMEM, INVALID                                                                      */
VKP_API VKP_NODISCARD vkp_status vkp_watch_subscribe(vkp_watch_tx *tx, vkp_watch_rx **rx);

/* A new receiver, which has seen the version that rx has seen last.
   Owns:   gives *copy     Blocks: never     Threads: the receiver's     In callbacks: ok
   Errors: NOMEM, INVALID                                                                      */
VKP_API VKP_NODISCARD vkp_status vkp_watch_rx_clone(vkp_watch_rx *rx, vkp_watch_rx **copy);

/* Give the receiver back, and end its borrow. NULL is ignored. Receiver's thread. */
VKP_API void vkp_watch_rx_unref(vkp_watch_rx *rx);

/* Replace the value and wake the receivers that wait for a change. Never waits for borrowers: a
   borrowed value stays as it is. Without receivers the value is not stored: CLOSED.
   Owns:   takes what *item owns (on failure it stays the caller's)
   Blocks: for other senders only     Threads: any     In callbacks: ok
   Errors: CLOSED (no receiver), NOMEM (every old value is borrowed, and no memory for one more),
   INVALID                                                                                     */
VKP_API VKP_NODISCARD vkp_status vkp_watch_send(vkp_watch_tx *tx, const void *item);

/* Replace the value, also without receivers, and wake the receivers that wait for a change. Never
   waits for borrowers: a borrowed value stays as it is.
   Owns:   takes what *item owns (on failure it stays the caller's)
   Blocks: for other senders only     Threads: any     In callbacks: ok
   Errors: NOMEM (every old value is borrowed, and no memory for one more), INVALID            */
VKP_API VKP_NODISCARD vkp_status vkp_watch_replace(vkp_watch_tx *tx, const void *item);

/* Call modify(user, item) with a copy of the current value. True: the copy, as modify changed it,
   becomes the new value, and waiting receivers wake. False: the value stays. Works without
   receivers. modify runs under the channel's lock, for which senders and borrowers wait: keep
   modify short, and call no function of this channel in it. *changed (may be NULL) is what modify
   returned.
   Blocks: for other senders only     Threads: any     In callbacks: ok
   Errors: NOMEM, INVALID (tx or modify is NULL; values with a drop)                           */
VKP_API VKP_NODISCARD vkp_status vkp_watch_send_if_modified(vkp_watch_tx *tx,
                                                            bool (*modify)(void *user, void *item),
                                                            void *user, bool *changed);

/* Copy the newest value into *out; do not mark the value as seen.
   Blocks: never     Threads: the receiver's     In callbacks: ok
   Errors: INVALID (a null argument, values with a drop)                                       */
VKP_API VKP_NODISCARD vkp_status vkp_watch_get(vkp_watch_rx *rx, void *out);

/* Copy the newest value into *out, and mark the value as seen.
   Blocks: never     Threads: the receiver's     In callbacks: ok
   Errors: INVALID (a null argument, values with a drop)                                       */
VKP_API VKP_NODISCARD vkp_status vkp_watch_get_and_update(vkp_watch_rx *rx, void *out);

/* A pointer to the newest value, without a copy; do not mark the value as seen. One borrow per
   receiver at a time. Senders do not wait for the end of a borrow. Returns NULL when rx is NULL or
   has a borrow already.
   Owns:   the pointer views the value until vkp_watch_release, or until vkp_watch_rx_unref
   Blocks: for modify of vkp_watch_send_if_modified only     Threads: the receiver's
   In callbacks: ok                                                                            */
VKP_API const void *vkp_watch_borrow(vkp_watch_rx *rx);

/* A pointer to the newest value, without a copy; mark the value as seen. One borrow per receiver at
   a time. Senders do not wait for the end of a borrow. Returns NULL when rx is NULL or has a borrow
   already.
   Owns:   the pointer views the value until vkp_watch_release, or until vkp_watch_rx_unref
   Blocks: for modify of vkp_watch_send_if_modified only     Threads: the receiver's
   In callbacks: ok                                                                            */
VKP_API const void *vkp_watch_borrow_and_update(vkp_watch_rx *rx);

/* End the receiver's borrow. NULL, and a receiver without a borrow, are ignored. Receiver's
   thread.                                                                                     */
VKP_API void vkp_watch_release(vkp_watch_rx *rx);

/* Wait for a version that rx has not seen, and mark the newest version as seen. No change is
   missed: a version sent before the call counts.
   Blocks: until deadline_ns     Threads: the receiver's     In callbacks: would stall the loop
   Errors: CLOSED (the newest version is seen, and no sender is left), TIMEOUT, INVALID        */
VKP_API VKP_NODISCARD vkp_status vkp_watch_changed(vkp_watch_rx *rx, uint64_t deadline_ns);

/* True while there is a version that rx has not seen, also after the last sender was given back.
   Receiver's thread.                                                                          */
VKP_API bool vkp_watch_is_changed(const vkp_watch_rx *rx);

/* Mark the newest version as not seen: vkp_watch_changed then returns OK immediately. Receiver's
   thread.                                                                                     */
VKP_API void vkp_watch_mark_changed(vkp_watch_rx *rx);

/* Mark the newest version as seen: vkp_watch_changed waits for a later one. Receiver's thread. */
VKP_API void vkp_watch_mark_unchanged(vkp_watch_rx *rx);

/* True once no sender is left. Receiver's thread. */
VKP_API bool vkp_watch_is_closed(const vkp_watch_rx *rx);

/* The number of receivers now. Any thread. */
VKP_API size_t vkp_watch_get_receivers(const vkp_watch_tx *tx);

/* Wait until no receiver is left.
   Blocks: until deadline_ns     Threads: any     In callbacks: would stall the loop
   Errors: TIMEOUT, INVALID                                                                    */
VKP_API VKP_NODISCARD vkp_status vkp_watch_wait_closed(vkp_watch_tx *tx, uint64_t deadline_ns);
