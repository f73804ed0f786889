#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-conn   Connections
   Addresses: "unix:PATH", "tcp:HOST:PORT", "tcp:[V6]:PORT". */

/* Why a connection closed: an argument of vkp_conn_ops.on_close. */
typedef enum vkp_close_reason {
    /* This program closed the connection: vkp_conn_close, vkp_conn_drain after the last write,
       or a listener's drain at its deadline. */
    VKP_CLOSE_LOCAL = 0,
    /* The peer closed the connection: end of file, a reset, or a hang-up. */
    VKP_CLOSE_PEER,
    /* A system call failed: sys_error is its errno. EMSGSIZE: more than input_bytes were kept. */
    VKP_CLOSE_ERROR,
    /* The peer read too slowly: a queue was full with VKP_ON_FULL_DISCONNECT, or a relay's
       max_reply_bytes were exceeded. */
    VKP_CLOSE_SLOW,
    /* The loop was closed. */
    VKP_CLOSE_LOOP,
    /* No memory for received bytes, for the response stream, or for a push that was queued. */
    VKP_CLOSE_NOMEM
} vkp_close_reason;

/* The reason as a short text; static, never NULL. Any thread. */
VKP_API const char *vkp_close_reason_str(vkp_close_reason reason);

/* The policy: what vkp_conn_push does when the queue is full. On the loop's thread a full outbox
   is written first: the policy applies when the peer does not read. Frames of vkp_conn_send are
   never dropped. Dropped pushes are counted (vkp_conn_stats.dropped_frames). */
typedef enum vkp_on_full {
    /* As VKP_ON_FULL_WAIT; in a relay's config as VKP_ON_FULL_DISCONNECT. */
    VKP_ON_FULL_DEFAULT = 0,
    /* vkp_conn_push waits for room until its deadline; on the loop's thread it returns FULL. */
    VKP_ON_FULL_WAIT,
    /* vkp_conn_push returns FULL; the frame is not queued. */
    VKP_ON_FULL_ERROR,
    /* vkp_conn_push returns DROPPED; the frame is not queued, and counted. */
    VKP_ON_FULL_DROP_NEWEST,
    /* vkp_conn_push returns OK; the oldest pushes of which no byte was written are dropped and
       counted. */
    VKP_ON_FULL_DROP_OLDEST,
    /* vkp_conn_push returns CLOSED; the connection closes with VKP_CLOSE_SLOW, and on_close
       follows, not inside this call. */
    VKP_ON_FULL_DISCONNECT
} vkp_on_full;

/* Callbacks of a connection, all on its loop's thread, none under a lock, none after on_close. Any
   may be NULL. The connection keeps the pointer: the table must outlive it. */
typedef struct vkp_conn_ops {
    /* The connection is established. Called once; by vkp_conn_open before it returns. */
    void (*on_open)(vkp_conn *conn, void *user);
    /* Bytes arrived. Returns how many it used; the next call gets the others again, with more
       behind them. `in` views the read block: keep parts with vkp_bytes_slice. NULL: all bytes are
       dropped. */
    size_t (*on_data)(vkp_conn *conn, void *user, const vkp_bytes *in);
    /* The outbox is empty, after the kernel refused bytes because the peer does not read. It is not
       called for a queue that one write emptied: to resume a connection that was paused for its
       queue, pause above vkp_loop_config.read_bytes at least. */
    void (*on_drain)(vkp_conn *conn, void *user);
    /* The peer sends nothing further; bytes that on_data did not use are dropped. Returns true
       to keep the connection for writing (end it with vkp_conn_drain or vkp_conn_close), false
       to close it with VKP_CLOSE_PEER. NULL: false. */
    bool (*on_end)(vkp_conn *conn, void *user);
    /* The connection closed, or vkp_conn_connect failed after it returned OK. Called once, as the
       last callback. sys_error is the errno behind the reason, 0: none. */
    void (*on_close)(vkp_conn *conn, void *user, vkp_close_reason reason, int sys_error);
    /* Returns the length of the pushed frame that begins at data. With it, neighbouring frames of
       one block are queued and written as one range; vkp_resp_get_frame_len does this for RESP.
       NULL: each frame is queued by itself. */
    size_t (*frame_len)(const uint8_t *data, size_t len);
} vkp_conn_ops;

/* The config of a connection. The two queue limits hold for each of two queues: the inbox (pushes
   of other threads, which wait for the loop) and the outbox (frames that wait for the peer). */
typedef struct vkp_conn_config {
    /* The callbacks; required. Kept by pointer, not copied. */
    const vkp_conn_ops *ops;
    /* Handed to the callbacks; see vkp_conn_set_user. */
    void *user;
    /* Most pushes in the inbox, and in the outbox. Default: 65,536. */
    size_t queue_frames;
    /* Most bytes of pushes in the inbox, and in the outbox. Default: 8 MiB. One frame always
       fits. */
    size_t queue_bytes;
    /* Most received bytes that are kept because on_data did not use them; beyond, the connection
       closes with VKP_CLOSE_ERROR, EMSGSIZE. Default: 512 MiB. */
    size_t input_bytes;
    /* The policy of a full queue. Default: VKP_ON_FULL_WAIT. */
    vkp_on_full on_full;
    /* Most milliseconds for vkp_conn_connect, over all addresses of a host name: each address gets
       an equal share of the time that is left. Default: 0, as long as the system tries. */
    uint64_t connect_ms;
    /* TCP: after this many milliseconds without a byte the kernel asks the peer, and closes the
       connection (ETIMEDOUT) when three questions have no answer. Default: 0, never. */
    uint64_t keepalive_ms;
    /* TCP: the kernel closes the connection (ETIMEDOUT) when bytes that were written are not
       acknowledged for this many milliseconds. Default: 0, the system's limit, many minutes. */
    uint64_t unacked_ms;
    /* Only the loop's thread pushes: saves the inbox, about 200 bytes. Default: false. */
    bool loop_only;
} vkp_conn_config;

/* Serve a connected stream socket on the loop. Calls on_open before it returns. config and its ops
   are required.
   Owns:   borrows config, takes fd (on failure fd stays the caller's), shares loop; gives *conn
   (the loop keeps a reference of its own until the close)
   Blocks: never     Threads: loop's     In callbacks: ok
   Errors: NOMEM, SYS, CLOSED (the loop was closed), INVALID (a null argument, no ops, fd < 0,
   another thread) */
VKP_API VKP_NODISCARD vkp_status vkp_conn_open(vkp_loop *loop, int fd,
                                               const vkp_conn_config *config, vkp_conn **conn);

/* Connect to an address and serve the connection on the loop. After OK, on_open follows on success,
   on_close on failure; a connect that fails immediately, as of Unix sockets, is an error here.
   config and its ops are required.
   Owns:   borrows address and config, shares loop; gives *conn (the loop keeps a reference of its
   own until the close)
   Blocks: on DNS, in getaddrinfo, for a host name; for numbers and localhost never
   Threads: loop's     In callbacks: ok
   Errors: NOMEM, SYS (also a connect that fails immediately), CLOSED (the loop was closed), REFUSED
   (the host name was not resolved), LIMIT (a Unix path that is too long), UNSUPPORTED (an abstract
   name outside Linux), INVALID (a null argument, no ops, a malformed address, another thread) */
VKP_API VKP_NODISCARD vkp_status vkp_conn_connect(vkp_loop *loop, vkp_str address,
                                                  const vkp_conn_config *config, vkp_conn **conn);

/* One more reference (gives, the same pointer). Any thread. */
VKP_API vkp_conn *vkp_conn_ref(vkp_conn *conn);

/* One reference less; does not close the connection. NULL is ignored. Any thread. */
VKP_API void vkp_conn_unref(vkp_conn *conn);

/* Push one frame; when the queue is full, the policy decides. On the loop's thread the frame is put
   in the outbox, on other threads in the inbox.
   Owns:   borrows frame (takes a reference of its own)
   Blocks: until deadline_ns with VKP_ON_FULL_WAIT on other threads; else never
   Threads: any; with loop_only the loop's     In callbacks: ok
   Errors: FULL (VKP_ON_FULL_ERROR; or VKP_ON_FULL_WAIT on the loop's thread), DROPPED
   (VKP_ON_FULL_DROP_NEWEST), TIMEOUT (VKP_ON_FULL_WAIT, no room until the deadline), CLOSED (closed
   or draining; VKP_ON_FULL_DISCONNECT), NOMEM, INVALID (a null argument; loop_only, on another
   thread) */
VKP_API VKP_NODISCARD vkp_status vkp_conn_push(vkp_conn *conn, const vkp_bytes *frame,
                                               uint64_t deadline_ns);

/* Append one frame to the response stream. It keeps its order with pushes, is never dropped, and no
   limit of the queue holds for it: to bound the stream, stop reading (vkp_conn_pause).
   Owns:   borrows frame (takes a reference of its own)
   Blocks: never     Threads: loop's     In callbacks: ok
   Errors: CLOSED (closed or draining), NOMEM (also a frame of 2 GiB or more), INVALID (a null
   argument, another thread) */
VKP_API VKP_NODISCARD vkp_status vkp_conn_send(vkp_conn *conn, const vkp_bytes *frame);

/* Stop reading: on_data is not called until vkp_conn_resume. Loop's thread. */
VKP_API void vkp_conn_pause(vkp_conn *conn);

/* Read again after vkp_conn_pause. on_data gets the kept bytes at the end of the round, not inside
   this call. Loop's thread. */
VKP_API void vkp_conn_resume(vkp_conn *conn);

/* Stop reading, write everything that is queued, then close with VKP_CLOSE_LOCAL. Idempotent.
   Loop's thread. */
VKP_API void vkp_conn_drain(vkp_conn *conn);

/* Close the connection; frames that are still queued are dropped. On the loop's thread on_close
   runs before this returns; from other threads the close is posted to the loop. Idempotent; NULL is
   ignored. Any thread. */
VKP_API void vkp_conn_close(vkp_conn *conn);

/* The connection's user pointer, which its callbacks get. Loop's thread. */
VKP_API void *vkp_conn_get_user(const vkp_conn *conn);

/* Replace the user pointer that the connection's callbacks get. Loop's thread. */
VKP_API void vkp_conn_set_user(vkp_conn *conn, void *user);

/* The connection's loop. Views: valid as long as the connection. Loop's thread. */
VKP_API vkp_loop *vkp_conn_get_loop(const vkp_conn *conn);

/* The connection's descriptor, -1 after the close; it stays the connection's. Loop's thread. */
VKP_API int vkp_conn_get_fd(const vkp_conn *conn);

/* Whether the connection is not closed; also true while it connects or drains. Any thread. */
VKP_API bool vkp_conn_is_open(const vkp_conn *conn);

/* What vkp_conn_get_stats writes. */
typedef struct vkp_conn_stats {
    size_t queued_frames;    /* pushes in the outbox now */
    size_t queued_bytes;     /* bytes in the outbox now, of pushes and of the response stream */
    uint64_t dropped_frames; /* pushes that the policy dropped since open */
} vkp_conn_stats;

/* Write the connection's counters to *stats. Loop's thread. */
VKP_API void vkp_conn_get_stats(const vkp_conn *conn, vkp_conn_stats *stats);

#endif /* VKP_NO_IO */
