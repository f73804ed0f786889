#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-pushloop   From a channel of pushes to where they are wanted                      */

/* Where a push loop writes; exactly one. */
typedef struct vkp_sink {
    vkp_hub *hub;   /* messages are published; only on the hub's loop */
    vkp_conn *conn; /* frames are pushed as received; events of the client are not written */
    void (*callback)(void *user, const vkp_push *push); /* borrows */
    void *user;
} vkp_sink;

/* Receive pushes until the channel closes, in this thread. A sink that fails (a full queue, a
   closed connection) loses that push; the loop goes on.
   Owns:   borrows rx, sink     Blocks: until the channel is closed and drained, or cancelled
   Threads: any, not a hub's     Errors: CANCELLED (cancel may be NULL), INVALID
   OK means the channel closed.                                                                */
VKP_API VKP_NODISCARD vkp_status vkp_push_loop_run(vkp_mpsc_rx *rx, const vkp_sink *sink,
                                                   vkp_cancel *cancel);

/* The same on an event loop, batch by batch. on_end(user) once, when the channel closed; the
   push loop is stopped then and waits for its unref.
   Owns:   takes rx (on failure it stays the caller's), shares loop and sink.conn, views sink.hub;
   gives *push_loop     Threads: loop's     Errors: INVALID, NOMEM                             */
VKP_API VKP_NODISCARD vkp_status vkp_push_loop_open(vkp_loop *loop, vkp_mpsc_rx *rx,
                                                    const vkp_sink *sink,
                                                    void (*on_end)(void *user), void *user,
                                                    vkp_push_loop **push_loop);
VKP_API void vkp_push_loop_unref(vkp_push_loop *push_loop); /* stops it; loop's thread */

#endif /* VKP_NO_IO */
