#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-handler   Callbacks of a loop for channels                                        */

/* Call fn(user) on the loop whenever vkp_mpsc_try_recv would not return EMPTY, as long as that
   is so: take something, or stop the watch. One watch per receiver.
   Owns:   shares loop     Threads: loop's     In callbacks: ok     Errors: INVALID (watched) */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_watch(vkp_mpsc_rx *rx, vkp_loop *loop,
                                                void (*fn)(void *user), void *user);

/* Stop the watch: fn is not called again. Idempotent. Loop's thread. */
VKP_API void vkp_mpsc_unwatch(vkp_mpsc_rx *rx);

/* Call fn(user) on the loop whenever the case could be carried out, as long as that is so: do it
   with its try form, or end the watch. Sending cases give no right to the room: their try form may
   still be FULL. One watch per receiving end. A watch or select of a one-shot ends before the same
   side finishes it (send, abandon, close).
   Owns:   copies what; shares loop; gives *watch; the case's object is yours to keep until the end
   Threads: loop's     In callbacks: ok
   Errors: NOMEM, INVALID (vkp_case_fd, vkp_case_deadline, closed loop)                        */
VKP_API VKP_NODISCARD vkp_status vkp_case_watch_open(vkp_loop *loop, const vkp_case *what,
                                                     void (*fn)(void *user), void *user,
                                                     vkp_case_watch **watch);

/* End the watch: fn is not called again. NULL is ignored. Loop's thread; a loop that closes ends
   its watches itself, and then this only gives the handle back.                               */
VKP_API void vkp_case_watch_close(vkp_case_watch *watch);

#endif /* VKP_NO_IO */
