#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-handler   Callbacks of a loop for channels                                        */

/* Call fn(user) on the loop's thread in every round in which the case is ready. In fn, call the try
   form of what the case names, or close the handler: while the case stays ready, fn is called
   again. A sending case reserves nothing: its try form may still return FULL. what is copied;
   what it names must outlive the handler. Make vkp_case_mpsc_recv and the like with `out` NULL. A
   handler of a one-shot ends before the same side finishes it (send, abandon, recv, close).
   Owns:   borrows what; shares loop; gives *handler     Blocks: never
   Threads: loop's     In callbacks: ok
   Errors: NOMEM, INVALID (a null argument, vkp_case_fd, vkp_case_deadline, a closed loop)     */
VKP_API VKP_NODISCARD vkp_status vkp_handler_open(vkp_loop *loop, const vkp_case *what,
                                                  void (*fn)(void *user), void *user,
                                                  vkp_handler **handler);

/* End the handler: fn is not called again. Idempotent; NULL is ignored. A loop that closes closes
   its handlers. Loop's thread, also inside fn.                                                */
VKP_API void vkp_handler_close(vkp_handler *handler);

/* Close the handler and give its reference back. NULL is ignored. Loop's thread, also inside fn. */
VKP_API void vkp_handler_unref(vkp_handler *handler);

#endif /* VKP_NO_IO */
