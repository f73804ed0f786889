/* --------------------------------------------------------------------------------------
   >>api-watch   Only the newest value                                                     */

typedef struct vkp_watch_config {
    size_t elem_bytes;   /* bytes of the value; required */
    const void *initial; /* the first value, elem_bytes; NULL: zeroes. Taken on success. */
    /* For values that own something: drop is called once on each that was replaced and is borrowed
       no more. Such values are borrowed, not copied out (vkp_watch_get is INVALID).           */
    void (*drop)(void *user, void *item);
    void *user; /* handed to drop */
    const vkp_env *env;
} vkp_watch_config;

/* Open a channel that holds the initial value, with one sender and no receivers.
   Owns:   borrows config; gives *tx     Blocks: never     Threads: any     In callbacks: ok
   Errors: INVALID (elem_bytes 0 or above 64 KiB), NOMEM                                       */
VKP_API VKP_NODISCARD vkp_status vkp_watch_open(const vkp_watch_config *config, vkp_watch_tx **tx);
VKP_API vkp_watch_tx *vkp_watch_tx_ref(vkp_watch_tx *tx); /* any thread */
VKP_API void vkp_watch_tx_unref(vkp_watch_tx *tx);        /* NULL is ignored */

/* A receiver that has seen the value of now; a copy of one, which has seen what that one has.
   Owns:   gives *rx     Blocks: never     Threads: any / the receiver's     Errors: NOMEM,
   INVALID                                                                                      */
VKP_API VKP_NODISCARD vkp_status vkp_watch_subscribe(vkp_watch_tx *tx, vkp_watch_rx **rx);
VKP_API VKP_NODISCARD vkp_status vkp_watch_rx_clone(vkp_watch_rx *rx, vkp_watch_rx **copy);
VKP_API void vkp_watch_rx_unref(vkp_watch_rx *rx); /* ends a borrow; NULL is ignored */

/* Replace the value and wake who waits for a change. Never waits for borrowers: they keep the value
   they look at. send is CLOSED without receivers, replace stores the value nevertheless.
   Owns:   takes what *item owns (on failure it stays the caller's)
   Blocks: for other senders only     Threads: any     In callbacks: ok
   Errors: CLOSED (send), NOMEM (every old value is borrowed), INVALID                         */
VKP_API VKP_NODISCARD vkp_status vkp_watch_send(vkp_watch_tx *tx, const void *item);
VKP_API VKP_NODISCARD vkp_status vkp_watch_replace(vkp_watch_tx *tx, const void *item);

/* Change the value in place of a copy: modify gets the bytes of the current value and returns
   whether it changed them; only then is a new version there. Not for values with a drop.
   modify runs under the senders' lock: no call of this channel in it.
   *changed, when not NULL, is written on OK. Threads, Errors: as vkp_watch_replace            */
VKP_API VKP_NODISCARD vkp_status vkp_watch_send_if_modified(vkp_watch_tx *tx,
                                                            bool (*modify)(void *user, void *item),
                                                            void *user, bool *changed);

/* Copy the newest value out; get_and_update also marks it as seen. Never waits.
   Threads: the receiver's     Errors: INVALID (values with a drop)                            */
VKP_API VKP_NODISCARD vkp_status vkp_watch_get(vkp_watch_rx *rx, void *out);
VKP_API VKP_NODISCARD vkp_status vkp_watch_get_and_update(vkp_watch_rx *rx, void *out);

/* Look at the newest value where it lies; borrow_and_update also marks it as seen. One borrow per
   receiver at a time; it keeps nobody waiting.
   Owns:   the pointer views the value until vkp_watch_release (or the receiver's unref)
   Blocks: never     Threads: the receiver's     NULL: a borrow is out                         */
VKP_API const void *vkp_watch_borrow(vkp_watch_rx *rx);
VKP_API const void *vkp_watch_borrow_and_update(vkp_watch_rx *rx);
VKP_API void vkp_watch_release(vkp_watch_rx *rx); /* ignored without a borrow */

/* Wait for a version not seen yet, and mark it as seen. No version is missed: one sent before the
   call counts.
   Blocks: until deadline_ns     Threads: the receiver's
   Errors: CLOSED (all seen, and no sender is left), TIMEOUT, INVALID                          */
VKP_API VKP_NODISCARD vkp_status vkp_watch_changed(vkp_watch_rx *rx, uint64_t deadline_ns);

/* Whether a version is there that was not seen (still so after the senders went); forget or pretend
   to have seen it. Receiver's thread.                                                         */
VKP_API bool vkp_watch_is_changed(const vkp_watch_rx *rx);
VKP_API void vkp_watch_mark_changed(vkp_watch_rx *rx);
VKP_API void vkp_watch_mark_unchanged(vkp_watch_rx *rx);

/* Whether no sender is left; receivers now; wait until there is none: OK, TIMEOUT, INVALID. */
VKP_API bool vkp_watch_is_closed(const vkp_watch_rx *rx);
VKP_API size_t vkp_watch_get_receivers(const vkp_watch_tx *tx); /* any thread */
VKP_API VKP_NODISCARD vkp_status vkp_watch_wait_closed(vkp_watch_tx *tx, uint64_t deadline_ns);
