#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-handler   Callbacks of a loop for channels                                            */

/* Open a handler: the loop calls fn(user) in every round in which the case `what` is ready. In fn,
   call the try form of the case's call, or close the handler: while the case stays ready, the loop
   calls fn again. A handler of vkp_case_mpsc_send or vkp_case_mpsc_reserve reserves nothing: the
   try form may still return FULL. `what` is copied; the object that the case names must outlive
   the handler. Make receiving cases with `out` NULL. Close a handler of a one-shot before the same
   side finishes the slot (send, abandon, recv, close).
   Owns:   borrows what; shares loop; gives *handler; user (may be NULL) stays the caller's
   Blocks: never     Threads: loop's     In callbacks: ok
   Errors: NOMEM, INVALID (a null argument, a case of vkp_case_fd or vkp_case_deadline, a closed
   loop, another thread)                                                                       */
VKP_API VKP_NODISCARD vkp_status vkp_handler_open(vkp_loop *loop, const vkp_case *what,
                                                  void (*fn)(void *user), void *user,
                                                  vkp_handler **handler);

/* End the handler: fn is no longer called. vkp_loop_close closes the handlers of the loop.
   Idempotent; NULL is ignored. Loop's thread, also inside fn.                                 */
VKP_API void vkp_handler_close(vkp_handler *handler);

/* Close the handler and give its reference back. NULL is ignored. Loop's thread, also inside fn. */
VKP_API void vkp_handler_unref(vkp_handler *handler);

#endif /* VKP_NO_IO */
