#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-client   A connection to a server, shared by many threads                         */

/* A reply: one whole value and the bytes it came in. Immutable, ref-counted. */
VKP_API const vkp_value *vkp_reply_get_value(const vkp_reply *reply); /* views the reply */
VKP_API vkp_bytes vkp_reply_get_frame(const vkp_reply *reply);        /* views, no reference */
VKP_API vkp_reply *vkp_reply_ref(vkp_reply *reply);
VKP_API void vkp_reply_unref(vkp_reply *reply); /* NULL is ignored; any thread */

typedef enum vkp_client_state {
    VKP_CLIENT_CONNECTING = 0,
    VKP_CLIENT_READY,
    VKP_CLIENT_WAITING, /* for the next try */
    VKP_CLIENT_CLOSED
} vkp_client_state;

typedef struct vkp_client_config {
    vkp_str address;             /* required */
    vkp_str username;            /* default: the default user */
    vkp_str password;            /* default: none, no AUTH */
    vkp_str name;                /* CLIENT SETNAME; default: none */
    int protocol;                /* 3, or 2: never HELLO; 0 = 3, falling back to 2 */
    uint64_t connect_timeout_ms; /* default 5,000; covers the handshake too; VKP_OFF: none */
    uint64_t retry_min_ms; /* default 50: the bound of the first wait; full jitter, doubling */
    uint64_t retry_max_ms; /* default 5,000 */
    uint64_t heartbeat_ms; /* PING after that long without a byte; default 15,000; VKP_OFF: never */
    uint64_t heartbeat_timeout_ms; /* default 5,000: then the connection counts as lost */
    size_t queue_bytes;            /* most bytes of commands waiting or in flight; default 64 MiB */
    vkp_resp_config resp;          /* limits of the reader; lenient is set */
    /* Pushes, on the loop's thread; the push is borrowed. Either this, or the channel. */
    void (*on_push)(void *user, const vkp_push *push);
    void *user;
    vkp_mpsc_tx *pushes; /* of vkp_push; shared. A full channel drops, and LAGGED tells. */
    const vkp_env *env;  /* default: the loop's */
} vkp_client_config;

/* Open a client and begin to connect; it reconnects until it is closed. With a password the
   connection is refused rather than used unauthenticated.
   Owns:   borrows config (copies texts), shares loop and pushes; gives *client
   Blocks: on DNS for host names only    Threads: loop's    In callbacks: ok
   Errors: INVALID, NOMEM, CLOSED (loop)                                                       */
VKP_API VKP_NODISCARD vkp_status vkp_client_open(vkp_loop *loop, const vkp_client_config *config,
                                                 vkp_client **client);

VKP_API vkp_client *vkp_client_ref(vkp_client *client); /* any thread */
VKP_API void vkp_client_unref(vkp_client *client);      /* the last one closes; any thread */

/* Close: commands not answered get CLOSED, then nothing is called any more. Idempotent. Any
   thread; from others than the loop's it is posted.                                           */
VKP_API void vkp_client_close(vkp_client *client);

VKP_API vkp_client_state vkp_client_get_state(const vkp_client *client); /* any thread */
VKP_API int vkp_client_get_protocol(const vkp_client *client);           /* 0 until one was tried */

/* What ended the last connection or try, for people. Copies at most size bytes. Any thread. */
VKP_API void vkp_client_get_error(vkp_client *client, char *text, size_t size);

/* Subscribe, once upstream however often it is asked; each call wants one unsubscribe. Survives
   outages. SUBSCRIBED follows in the push stream.
   Owns:   borrows name     Blocks: never     Threads: any     In callbacks: ok
   Errors: NOMEM, CLOSED, INVALID                                                              */
VKP_API VKP_NODISCARD vkp_status vkp_client_subscribe(vkp_client *client, vkp_sub_kind kind,
                                                      vkp_str name);

/* As vkp_client_subscribe, and done(user, status) on the loop's thread, once: OK when the server
   confirmed (at once if it had), DISCONNECTED when there is no connection (the subscription
   stands and comes with it), REFUSED (the server said no: the subscription is gone), CLOSED.  */
VKP_API VKP_NODISCARD vkp_status vkp_client_subscribe_then(vkp_client *client, vkp_sub_kind kind,
                                                           vkp_str name,
                                                           void (*done)(void *user, vkp_status),
                                                           void *user);

/* Give up one interest; the last one unsubscribes. Errors: NOMEM, CLOSED. Any thread. A name that
   was not subscribed is ignored.                                                              */
VKP_API VKP_NODISCARD vkp_status vkp_client_unsubscribe(vkp_client *client, vkp_sub_kind kind,
                                                        vkp_str name);

/* Send a command; its reply comes into the one-shot as a vkp_reply* (gives; unref it). An error
   of the server is a reply of type VKP_RESP_ERROR. The slot is initialised here. The arguments are
   terminated strings, the last one NULL.
   Owns:   borrows the arguments; the slot until vkp_oneshot_recv returned or closed it
   Blocks: never     Threads: any     In callbacks: ok (take the reply with vkp_oneshot_try_recv)
   Errors: DISCONNECTED (no connection now: nothing was sent), FULL (queue_bytes), REFUSED (a
   command that would break the sharing: the subscribe family, HELLO, RESET, QUIT, MONITOR,
   CLIENT REPLY, MULTI, ...), LIMIT (more than 64 arguments: vkp_client_command_argv takes them),
   CLOSED, NOMEM, INVALID. After OK, recv gives CLOSED when the connection was lost before the
   reply: the command may or may not have run.                                                 */
VKP_API VKP_NODISCARD vkp_status vkp_client_command(vkp_client *client, vkp_oneshot *reply, ...)
    __attribute__((sentinel));

/* The same with counted arguments. */
VKP_API VKP_NODISCARD vkp_status vkp_client_command_argv(vkp_client *client, vkp_oneshot *reply,
                                                         size_t argc, const vkp_str *argv);

/* Send bytes that hold `replies` whole commands, kept together on the wire; on_reply gets the
   value of the LAST reply, on the loop's thread, exactly once: status OK, or with NULL
   DISCONNECTED, CLOSED, or REFUSED (RESP2 and something is subscribed). The bytes are not
   inspected.
   Owns:   borrows commands (shares the block); the value and the frame view until on_reply returns
   Blocks: never     Threads: any     Errors: DISCONNECTED, FULL, CLOSED, NOMEM, INVALID       */
typedef void (*vkp_reply_fn)(void *user, vkp_status status, const vkp_value *value,
                             const vkp_bytes *frame);
VKP_API VKP_NODISCARD vkp_status vkp_client_send(vkp_client *client, const vkp_bytes *commands,
                                                 uint32_t replies, vkp_reply_fn on_reply,
                                                 void *user);

#endif /* VKP_NO_IO */
