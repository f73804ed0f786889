/* --------------------------------------------------------------------------------------
   >>api-cancel   Cancellation tokens                                                      */

/* Open a token; a child is cancelled with its parent (at once, if that was cancelled before), and
   uses its parent's env.
   Owns:   shares parent (may be NULL); gives *token   Blocks: never   Threads: any
   Errors: NOMEM, INVALID                                                                      */
VKP_API VKP_NODISCARD vkp_status vkp_cancel_open(const vkp_env *env, vkp_cancel *parent,
                                                 vkp_cancel **token);

/* One more reference (gives, the same pointer). Any thread. */
VKP_API vkp_cancel *vkp_cancel_ref(vkp_cancel *token);

/* One reference less; does not cancel. NULL is ignored. Any thread. */
VKP_API void vkp_cancel_unref(vkp_cancel *token);

/* Cancel the token and all its descendants: waits end, watches fire. Idempotent. Any thread. */
VKP_API void vkp_cancel_trigger(vkp_cancel *token);

/* True once cancelled; never becomes false again. Any thread. */
VKP_API bool vkp_cancel_is_triggered(const vkp_cancel *token);

/* Wait until cancelled: OK, or TIMEOUT. Any thread; would stall a loop. */
VKP_API VKP_NODISCARD vkp_status vkp_cancel_wait(vkp_cancel *token, uint64_t deadline_ns);
