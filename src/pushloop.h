#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-pushloop   From a channel of pushes to a hub, a connection or a callback */

/* Where a push loop delivers pushes: set exactly one of hub, conn and callback. */
typedef struct vkp_sink {
    /* Messages are delivered to this hub. Only for vkp_push_loop_open, on the hub's loop. */
    vkp_hub *hub;
    /* Frames are pushed to this connection as they were received; events of the client, which have
       no frame, are not. */
    vkp_conn *conn;
    /* Called with each push, on the thread of the push loop. Borrows push. */
    void (*callback)(void *user, const vkp_push *push);
    /* Handed to callback. */
    void *user;
} vkp_sink;

/* Receive pushes in this thread and deliver each to the sink, until the channel closes: then
   returns OK. A push that the sink cannot take (a full queue, a closed connection) is lost; the
   push loop continues. NULL cancel: only the channel ends the call.
   Owns:   borrows rx, sink, cancel
   Blocks: until the channel is closed and drained, or the token is cancelled
   Threads: any     In callbacks: would stall the loop
   Errors: CANCELLED (cancel was triggered), INVALID (rx or sink NULL, none or several of hub, conn
   and callback, a hub, a channel of other values than vkp_push) */
VKP_API VKP_NODISCARD vkp_status vkp_push_loop_run(vkp_mpsc_rx *rx, const vkp_sink *sink,
                                                   vkp_cancel *cancel);

/* Receive pushes on an event loop, in batches, and deliver each to the sink. A push that the sink
   cannot take is lost. When the channel is closed and drained the push loop stops and calls
   on_end(user) once, on the loop's thread; unref it then. NULL on_end: not called.
   Owns:   takes rx (on failure rx stays the caller's), borrows sink, shares loop and sink->conn,
   views sink->hub until the unref; gives *push_loop
   Blocks: never     Threads: loop's     In callbacks: ok
   Errors: NOMEM, INVALID (a null argument, none or several of hub, conn and callback, a channel of
   other values than vkp_push, a closed loop) */
VKP_API VKP_NODISCARD vkp_status vkp_push_loop_open(vkp_loop *loop, vkp_mpsc_rx *rx,
                                                    const vkp_sink *sink,
                                                    void (*on_end)(void *user), void *user,
                                                    vkp_push_loop **push_loop);

/* Stop the push loop and free it with its receiver; on_end is not called after this. NULL is
   ignored. Loop's thread, also inside the sink's callback and on_end. */
VKP_API void vkp_push_loop_unref(vkp_push_loop *push_loop);

#endif /* VKP_NO_IO */
