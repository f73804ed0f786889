#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-listener   Accept connections                                                     */

typedef struct vkp_listener_config {
    const char *address;    /* or */
    vkp_socket *socket;     /* a ref-counted socket: shared until the listener closes */
    vkp_registry *registry; /* for a unix: address; NULL opens one of its own */
    /* With .socket: hold no reference of it; each client holds one, the program may, and when the
       last one is given back (and linger_ms passed) the listener ends too.                    */
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
    int backlog; /* default 4096 */
} vkp_listener_config;

/* Listen and accept on the loop. When descriptors or memory run out it pauses, 10 ms at first, 1 s
   at last, and clients wait in the backlog; when descriptors are short for a second, a spare one
   serves to tell them (VKP_REFUSAL_OVERLOAD).
   Owns:   borrows config, shares socket, registry, gate, loop; gives *listener
   Blocks: on the file system     Threads: loop's     In callbacks: ok
   Errors: as vkp_socket_open; IN_USE for a port taken; CLOSED (loop, or socket); INVALID
   (address and socket both, or neither; follow without socket; neither conn.ops nor on_fd)    */
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

/* How a listener started from another thread began. */
typedef struct vkp_listening {
    vkp_status status;      /* OK, or why not; then the rest is NULL */
    int sys_error;          /* errno of SYS */
    const char *path;       /* views */
    vkp_socket *sock;       /* vkp_listen_with_reference: gives one reference; else NULL */
    vkp_listener *listener; /* the loop's; vkp_listener_close is yours, unref is not */
} vkp_listening;

/* Start a listener from any thread. It belongs to the loop, which frees it when it ended or the
   loop closes. config.address and .socket must be NULL; config.conn.user and .on_... as above.
   vkp_listen: it keeps its socket alive until it is closed. vkp_listen_with_reference: on_init
   gets the only reference; the listener follows. vkp_listen_ref: follows a socket that is there.
   on_init(user, result) runs once on the loop's thread, unless an error comes back here.
   A registry of their own, where config names none, has no abstract names.
   Owns:   borrows path (NULL: a unique one), copies config; shares what it names until on_init
   Blocks: never     Threads: any     In callbacks: ok
   Errors: NOMEM, CLOSED, INVALID, LIMIT (max_references of a socket given)                    */
typedef void vkp_on_listening(void *user, const vkp_listening *result);
VKP_API VKP_NODISCARD vkp_status vkp_listen(vkp_loop *loop, const vkp_listener_config *config,
                                            const char *path, vkp_on_listening *on_init,
                                            void *user);
VKP_API VKP_NODISCARD vkp_status vkp_listen_with_reference(vkp_loop *loop,
                                                           const vkp_listener_config *config,
                                                           const char *path,
                                                           vkp_on_listening *on_init, void *user);
VKP_API VKP_NODISCARD vkp_status vkp_listen_ref(vkp_loop *loop, const vkp_listener_config *config,
                                                vkp_socket *sock, vkp_on_listening *on_init,
                                                void *user);

#endif /* VKP_NO_IO */
