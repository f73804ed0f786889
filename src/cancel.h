/* --------------------------------------------------------------------------------------
   >>api-cancel   Cancellation tokens                                                          */

/* Open a token. With a parent, the token is cancelled with its parent (immediately, if the parent
   is cancelled already) and uses the parent's env. NULL parent: a token of its own; NULL env: the
   defaults.
   Owns:   shares parent; gives *token     Blocks: never     Threads: any     In callbacks: ok
   Errors: NOMEM, INVALID (token is NULL)                                                      */
VKP_API VKP_NODISCARD vkp_status vkp_cancel_open(const vkp_env *env, vkp_cancel *parent,
                                                 vkp_cancel **token);

/* One more reference to the token (gives, the same pointer). Any thread. */
VKP_API vkp_cancel *vkp_cancel_ref(vkp_cancel *token);

/* Give a reference to the token back; does not cancel. NULL is ignored. Any thread. */
VKP_API void vkp_cancel_unref(vkp_cancel *token);

/* Cancel the token and all its descendants: waits on them end, handlers of their cases are called.
   Idempotent. Any thread.                                                                     */
VKP_API void vkp_cancel_trigger(vkp_cancel *token);

/* True once the token is cancelled; never becomes false again. Any thread. */
VKP_API bool vkp_cancel_is_triggered(const vkp_cancel *token);

/* Wait until the token is cancelled.
   Blocks: until deadline_ns     Threads: any     In callbacks: would stall the loop
   Errors: TIMEOUT, INVALID                                                                    */
VKP_API VKP_NODISCARD vkp_status vkp_cancel_wait(vkp_cancel *token, uint64_t deadline_ns);
