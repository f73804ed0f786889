#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-conn   Connections and listeners
   Addresses: "unix:PATH", "tcp:HOST:PORT", "tcp:[V6]:PORT".                                  */

typedef enum vkp_close_reason {
    VKP_CLOSE_LOCAL = 0, /* vkp_conn_close, or drained after vkp_conn_drain */
    VKP_CLOSE_PEER,      /* end of file */
    VKP_CLOSE_ERROR,     /* a system call failed: sys_error tells */
    VKP_CLOSE_SLOW,      /* VKP_ON_FULL_DISCONNECT */
    VKP_CLOSE_LOOP,      /* the loop was closed */
    VKP_CLOSE_NOMEM      /* no memory for what was received or for the response stream */
} vkp_close_reason;

/* The reason as a short text; static, never NULL. Any thread. */
VKP_API const char *vkp_close_reason_str(vkp_close_reason reason);

/* What a push does when the queue is full. Frames of vkp_conn_send are never dropped. */
typedef enum vkp_on_full {
    VKP_ON_FULL_DEFAULT = 0, /* WAIT; of a relay DISCONNECT */
    VKP_ON_FULL_WAIT,        /* vkp_conn_push waits; on the loop's thread it gets FULL */
    VKP_ON_FULL_ERROR,       /* FULL; the frame stays the caller's */
    VKP_ON_FULL_DROP_NEWEST, /* DROPPED; the frame stays the caller's */
    VKP_ON_FULL_DROP_OLDEST, /* OK; the oldest pushes not yet begun are dropped and counted */
    VKP_ON_FULL_DISCONNECT   /* CLOSED; the connection closes with VKP_CLOSE_SLOW */
} vkp_on_full;

/* Callbacks of a connection, all on its loop's thread, none under a lock, none after on_close.
   Any may be NULL. The table is kept by pointer.                                              */
typedef struct vkp_conn_ops {
    void (*on_open)(vkp_conn *conn, void *user); /* once, connected: may be before open returned */
    /* Bytes arrived. Returns how many were used; the rest comes again, with more behind it.
       `in` views the read block: keep parts with vkp_bytes_slice.                            */
    size_t (*on_data)(vkp_conn *conn, void *user, const vkp_bytes *in);
    void (*on_drain)(vkp_conn *conn, void *user); /* the queue is empty after it had to wait */
    /* The peer will send no more. True: keep the connection to write (end it with vkp_conn_drain or
       vkp_conn_close); false, or no on_end: it closes with VKP_CLOSE_PEER.                   */
    bool (*on_end)(vkp_conn *conn, void *user);
    void (*on_close)(vkp_conn *conn, void *user, vkp_close_reason reason, int sys_error); /* once */
    /* Length of the frame at data (a frame that was pushed). When given, neighbouring frames of
       one block are kept and written as one range; vkp_resp_get_frame_len is one.                */
    size_t (*frame_len)(const uint8_t *data, size_t len);
} vkp_conn_ops;

typedef struct vkp_conn_config {
    const vkp_conn_ops *ops; /* required */
    void *user;
    size_t queue_frames; /* most frames queued; default 65,536 */
    size_t queue_bytes;  /* most bytes queued; default 8 MiB. One frame always fits. */
    size_t input_bytes;  /* most bytes kept for on_data; default 512 MiB. Beyond: closed. */
    vkp_on_full on_full;
    bool loop_only; /* pushes come from the loop's thread alone: saves the inbox, 200 bytes */
} vkp_conn_config;

/* The queues above have the limit each: what waits for the loop (inbox: pushed by other threads)
   and what waits for the peer (outbox).                                                       */

/* Serve a connected stream socket on the loop.
   Owns:   takes fd (on failure it stays the caller's), shares loop; gives *conn (the loop keeps a
   reference of its own until the close)   Blocks: never   Threads: loop's   In callbacks: ok
   Errors: NOMEM, SYS, INVALID, CLOSED (loop)                                                  */
VKP_API VKP_NODISCARD vkp_status vkp_conn_open(vkp_loop *loop, int fd,
                                               const vkp_conn_config *config, vkp_conn **conn);

/* Connect to an address and serve it. on_open follows on success, on_close on failure. A host
   NAME is resolved with getaddrinfo, which may block on DNS; numbers and localhost do not.
   Owns, Threads: as vkp_conn_open     Errors: the same, and REFUSED (name not resolved)       */
VKP_API VKP_NODISCARD vkp_status vkp_conn_connect(vkp_loop *loop, vkp_str address,
                                                  const vkp_conn_config *config, vkp_conn **conn);

VKP_API vkp_conn *vkp_conn_ref(vkp_conn *conn); /* any thread */
VKP_API void vkp_conn_unref(vkp_conn *conn);    /* any thread; does not close; NULL is ignored */

/* Push one frame, by the policy when the queue is full. On the loop's thread, and when loop_only
   is set, it goes straight to the outbox; from other threads through the inbox.
   Owns:   borrows frame (takes a reference of its own)
   Blocks: until deadline_ns with VKP_ON_FULL_WAIT on other threads; else never
   Threads: any (the loop's alone with loop_only)     In callbacks: ok
   Errors: FULL, DROPPED, CLOSED, TIMEOUT, NOMEM, INVALID                                      */
VKP_API VKP_NODISCARD vkp_status vkp_conn_push(vkp_conn *conn, const vkp_bytes *frame,
                                               uint64_t deadline_ns);

/* Append to the response stream: in order with pushes, never dropped, not bounded by the queue's
   limits (stop reading instead: vkp_conn_pause).
   Owns:   borrows frame     Blocks: never     Threads: loop's     Errors: CLOSED, NOMEM       */
VKP_API VKP_NODISCARD vkp_status vkp_conn_send(vkp_conn *conn, const vkp_bytes *frame);

/* Stop and go on reading; on_data sees what was kept at the next round. Loop's thread. */
VKP_API void vkp_conn_pause(vkp_conn *conn);
VKP_API void vkp_conn_resume(vkp_conn *conn);

/* Read no more, write what is queued, then close with VKP_CLOSE_LOCAL. Loop's thread. */
VKP_API void vkp_conn_drain(vkp_conn *conn);

/* Close. On the loop's thread on_close runs before it returns; from others it is posted.
   Idempotent. Any thread.                                                                     */
VKP_API void vkp_conn_close(vkp_conn *conn);

/* Plain reads and the user pointer. Loop's thread where nothing else is said. */
VKP_API void *vkp_conn_get_user(const vkp_conn *conn);
VKP_API void vkp_conn_set_user(vkp_conn *conn, void *user); /* loop's thread */
VKP_API vkp_loop *vkp_conn_get_loop(const vkp_conn *conn);  /* views */
VKP_API int vkp_conn_get_fd(const vkp_conn *conn);          /* -1 when closed; loop's thread */
VKP_API bool vkp_conn_is_open(const vkp_conn *conn);        /* any thread */

typedef struct vkp_conn_stats {
    size_t queued_frames; /* in the outbox */
    size_t queued_bytes;
    uint64_t dropped_frames; /* by the policy, since open */
} vkp_conn_stats;
VKP_API void vkp_conn_get_stats(const vkp_conn *conn, vkp_conn_stats *stats); /* loop's thread */

#endif /* VKP_NO_IO */
