#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-listener   Accept connections */

/* What vkp_listener_config.on_start gets; valid until on_start returns. */
typedef struct vkp_listening {
    /* OK, or why the listener did not start. */
    vkp_status status;
    /* The errno of status SYS; 0 with any other status. */
    int sys_error;
    /* The listener's address, as vkp_listener_get_address returns it. Views: valid until the
       listener ended. NULL when status is not OK. */
    const char *address;
    /* The listener, which belongs to its loop: valid until it ended. Close it, do not unref it.
       NULL when status is not OK. */
    vkp_listener *listener;
    /* The only reference of the socket: gives it to on_start, if the listener was opened with an
       address and `follow`. NULL when config.socket was set, when `follow` was false, and when
       status is not OK. */
    vkp_socket *socket;
} vkp_listening;

/* The config of vkp_listener_open. Every callback is called on the loop's thread with conn.user as
   its `user`. */
typedef struct vkp_listener_config {
    /* Where to listen: "unix:PATH", "unix:" (a unique path), "tcp:HOST:PORT" (port 0: a free port).
       Borrowed until open returns. Set either address or socket, not both. */
    vkp_str address;
    /* An open socket to listen on, shared until the listener ended (with `follow` until it has
       started). NULL: address is used. */
    vkp_socket *socket;
    /* The registry that opens the socket of a "unix:" address; shared. NULL: a registry of the
       listener's own, which allows abstract names. */
    vkp_registry *registry;
    /* The listener holds no reference of its socket: each client holds one, the program may hold
       some, and when the last one is given back (and linger_ms passed) the listener ends too. With
       an address this needs on_start, which gets the first reference. Default: false. */
    bool follow;
    /* Decides which clients are accepted; shared. NULL: over Unix sockets the process's own uid
       alone; no limit on clients. */
    vkp_gate *gate;
    /* Most clients of this listener at one time. Default: no limit. */
    size_t max_clients;
    /* The config of each accepted connection; conn.ops is required without on_fd. conn.user is the
       first user pointer of each connection. */
    vkp_conn_config conn;
    /* A connection was accepted: called once for each, before its on_open. conn is borrowed:
       valid until its on_close returned, longer with vkp_conn_ref. Set its user pointer here, or
       refuse the client by vkp_conn_close: that calls on_close with the user pointer set so far,
       conn.user at first. NULL: not called. */
    void (*on_accept)(void *user, vkp_conn *conn);
    /* A client was accepted: called once for each, instead of making a connection, for example to
       pass the client to another loop. Gives fd and seat: close fd, and unref seat when the client
       is gone. NULL: connections are made. */
    void (*on_fd)(void *user, int fd, vkp_seat *seat);
    /* A client is refused: called once for each. fd may be written to; the listener closes fd when
       this returns. NULL: not called. */
    void (*on_refuse)(void *user, int fd, vkp_refusal why);
    /* The listener ended by itself, because its socket ended or its loop was closed. Called at most
       once, never after vkp_listener_close. NULL: not called. */
    void (*on_end)(void *user);
    /* The listener started or failed. Set it to open the listener from any thread; called exactly
       once unless vkp_listener_open itself failed. NULL: vkp_listener_open starts the listener. */
    void (*on_start)(void *user, const vkp_listening *result);
    /* Clients that may wait for accept, as for listen(2). Default: 4096. Ignored with `socket` or
       `registry`: the registry's backlog is used. */
    int backlog;
} vkp_listener_config;

/* Listen and accept on the loop. Without on_start the listener starts before this returns. With
   on_start this returns first, and the loop starts the listener, owns it, and frees it when it
   ended or the loop closes. config is required.
   When descriptors or memory run out, the listener pauses, 10 ms at first, 1 s at most, and clients
   wait in the backlog; when descriptors are short for a second, the listener uses a spare one to
   refuse them (VKP_REFUSAL_OVERLOAD).
   Owns:   borrows config; shares config's socket, registry and gate, and loop; gives *listener
   (listener is NULL with on_start)
   Blocks: on the file system, and on DNS for a host name; with on_start never
   Threads: loop's; with on_start any     In callbacks: ok
   Errors: CLOSED (the loop was closed, or the socket ended), NOMEM, LIMIT (max_references of the
   socket), INVALID (both address and socket, or neither; follow with an address and without
   on_start, or with tcp:; neither conn.ops nor on_fd; listener NULL without on_start, or not NULL
   with it; another thread, without on_start). On failures of starting, which with on_start are its
   result's status: those of vkp_socket_open, IN_USE (also a port that is taken), REFUSED (the host
   name was not resolved), INVALID (a malformed address; "unix:@NAME" with a registry without
   abstract_names) */
VKP_API VKP_NODISCARD vkp_status vkp_listener_open(vkp_loop *loop,
                                                   const vkp_listener_config *config,
                                                   vkp_listener **listener);

/* The listener's address, "tcp:HOST:PORT" with the port that the system chose, or "unix:PATH".
   Views: valid as long as the listener. Loop's thread. */
VKP_API const char *vkp_listener_get_address(const vkp_listener *listener);

/* Stop accepting. Accepted connections stay open, and a drain continues. Idempotent; NULL is
   ignored. Loop's thread. */
VKP_API void vkp_listener_close(vkp_listener *listener);

/* Close the listener and give its reference back; the on_end of a drain under way is not called.
   Not for listeners with on_start. NULL is ignored. Loop's thread. */
VKP_API void vkp_listener_unref(vkp_listener *listener);

/* Shut down in order: stop accepting, send `notice` to every connection that this listener
   accepted, write what is queued, close each connection; at the deadline close the others. Then
   on_end(user) is called once, not inside this call. NULL notice: nothing is sent. NULL on_end: not
   called.
   Owns:   borrows notice     Blocks: never     Threads: loop's     In callbacks: ok
   Errors: INVALID (listener NULL, a listener with on_fd, already drained), NOMEM; on failure
   nothing was changed */
VKP_API VKP_NODISCARD vkp_status vkp_listener_drain(vkp_listener *listener, const vkp_bytes *notice,
                                                    void (*on_end)(void *user), void *user,
                                                    uint64_t deadline_ns);

/* What vkp_listener_get_stats writes. Counters count since open. */
typedef struct vkp_listener_stats {
    size_t clients;                      /* clients that have a seat now */
    uint64_t accepted;                   /* clients accepted: a connection, or a call of on_fd */
    uint64_t refused[VKP_REFUSAL_COUNT]; /* clients refused, indexed by vkp_refusal */
    uint64_t aborted;                    /* clients that closed before accept: probes, resets */
    uint64_t no_descriptors;             /* accept failed with EMFILE or ENFILE */
    uint64_t no_memory;                  /* accept failed with ENOMEM or ENOBUFS */
    uint64_t failed;                     /* accept failed with another errno */
    uint64_t pauses;                     /* pauses after no_descriptors, no_memory and failed */
} vkp_listener_stats;

/* Write the listener's counters to *stats. Loop's thread. */
VKP_API void vkp_listener_get_stats(const vkp_listener *listener, vkp_listener_stats *stats);

#endif /* VKP_NO_IO */
