#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-listener   Accept connections                                                     */

/* What vkp_listener_config.on_start gets. */
typedef struct vkp_listening {
    vkp_status status;      /* OK, or why it did not start: then all else is NULL */
    int sys_error;          /* errno, with status SYS */
    const char *address;    /* as vkp_listener_get_address. Views. */
    vkp_listener *listener; /* the loop's: valid until it ended. Close it, do not unref it. */
    vkp_socket *socket;     /* with address and follow: gives its only reference. Else NULL. */
} vkp_listening;

typedef struct vkp_listener_config {
    /* Where to listen, one of the two: "unix:PATH", "unix:" (a unique path), "tcp:HOST:PORT" ... */
    vkp_str address;
    vkp_socket *socket;     /* ... or a socket that is open; shared until the listener ended */
    vkp_registry *registry; /* of a unix: address; NULL opens one of its own */
    /* Hold no reference of the socket: each client holds one, the program may, and when the last
       one is given back (and linger_ms passed) the listener ends too. With an address only
       together with on_start, which gets the first reference.                                 */
    bool follow;
    vkp_gate *gate;       /* shared; NULL: the process's own uid alone, as many as come */
    size_t max_clients;   /* of this listener at once; default: no limit */
    vkp_conn_config conn; /* of every connection accepted; its user is on_accept's first */
    /* A connection was accepted, before its on_open: set its user, refuse by vkp_conn_close. */
    void (*on_accept)(void *user, vkp_conn *conn);
    /* Instead of a connection: take the descriptor and its seat (to hand them to another loop). */
    void (*on_fd)(void *user, int fd, vkp_seat *seat);
    /* A client is refused: fd may be written to, and is closed after this. */
    void (*on_refuse)(void *user, int fd, vkp_refusal why);
    /* It ended by itself: its socket did, or its loop. Once, not after vkp_listener_close. */
    void (*on_end)(void *user);
    /* Start from any thread: called once on the loop's thread, unless vkp_listener_open failed. */
    void (*on_start)(void *user, const vkp_listening *result);
    int backlog; /* default 4096 */
} vkp_listener_config;

/* Listen and accept on the loop. Without on_start at once, on the loop's thread; with it from any
   thread: the loop starts the listener, owns it, and frees it when it ended or the loop closes.
   When descriptors or memory run out the listener pauses, 10 ms at first, 1 s at last, and clients
   wait in the backlog; when descriptors are short for a second, a spare one serves to refuse them
   (VKP_REFUSAL_OVERLOAD).
   Owns:   borrows config, shares socket, registry, gate, loop; gives *listener (NULL with on_start)
   Blocks: on the file system; with on_start never
   Threads: loop's; with on_start any     In callbacks: ok
   Errors: as vkp_socket_open, IN_USE for a port taken (with on_start these go there); CLOSED
   (loop, or socket), NOMEM, LIMIT (max_references of socket), INVALID (address and socket both, or
   neither; follow with an address but without on_start, or with tcp:; neither conn.ops nor on_fd;
   listener NULL without on_start, or not NULL with it)                                        */
VKP_API VKP_NODISCARD vkp_status vkp_listener_open(vkp_loop *loop,
                                                   const vkp_listener_config *config,
                                                   vkp_listener **listener);

/* The address with the port that the system chose, as "tcp:HOST:PORT" or "unix:PATH". Views. */
VKP_API const char *vkp_listener_get_address(const vkp_listener *listener);

/* Stop accepting; connections stay, and a drain goes on. Idempotent. Loop's thread. */
VKP_API void vkp_listener_close(vkp_listener *listener);
VKP_API void vkp_listener_unref(vkp_listener *listener); /* closes; loop's thread; NULL ignored */

/* Shut down in good order: stop accepting, send `notice` (NULL: nothing) to every connection that
   came through, write what is queued, close each; at the deadline close what is left. Then
   on_end(user), once. For listeners without on_fd.
   Owns:   borrows notice     Blocks: never     Threads: loop's     In callbacks: ok
   Errors: INVALID (on_fd, or drained already), NOMEM: nothing happened                        */
VKP_API VKP_NODISCARD vkp_status vkp_listener_drain(vkp_listener *listener, const vkp_bytes *notice,
                                                    void (*on_end)(void *user), void *user,
                                                    uint64_t deadline_ns);

typedef struct vkp_listener_stats {
    size_t clients; /* now */
    uint64_t accepted;
    uint64_t refused[VKP_REFUSAL_COUNT]; /* by vkp_refusal */
    uint64_t aborted;                    /* left before accept: probes, resets */
    uint64_t no_descriptors;             /* accept failed with EMFILE or ENFILE */
    uint64_t no_memory;                  /* with ENOMEM or ENOBUFS */
    uint64_t failed;                     /* with anything else */
    uint64_t pauses;                     /* after the last three */
} vkp_listener_stats;
VKP_API void vkp_listener_get_stats(const vkp_listener *listener,
                                    vkp_listener_stats *stats); /* loop's thread */

#endif /* VKP_NO_IO */
