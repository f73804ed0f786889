#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-client   A connection to a server, shared by many threads                         */

/* The value of the reply; an attribute before it is only in the frame. Views the reply. Any
   thread.                                                                                     */
VKP_API const vkp_value *vkp_reply_get_value(const vkp_reply *reply);

/* The bytes of the reply as received. Views the reply, holds no reference. Any thread. */
VKP_API vkp_bytes vkp_reply_get_frame(const vkp_reply *reply);

/* One more reference to the reply (gives). Any thread. */
VKP_API vkp_reply *vkp_reply_ref(vkp_reply *reply);

/* Give a reference back; the last one frees the reply. NULL is ignored. Any thread. */
VKP_API void vkp_reply_unref(vkp_reply *reply);

/* What a client does now. */
typedef enum vkp_client_state {
    VKP_CLIENT_CONNECTING = 0, /* connects and does the handshake; commands wait for its end */
    VKP_CLIENT_READY,          /* connected; commands are sent */
    VKP_CLIENT_WAITING,        /* waits for the next try to connect; commands get DISCONNECTED */
    VKP_CLIENT_CLOSED          /* closed; commands and subscriptions get CLOSED */
} vkp_client_state;

/* What the server must be. */
typedef enum vkp_client_role {
    VKP_CLIENT_ROLE_ANY = 0, /* a primary or a replica */
    /* A primary; on another server, and when a command is answered READONLY, the client closes the
       connection and tries again. */
    VKP_CLIENT_ROLE_PRIMARY
} vkp_client_role;

/* One command that each new connection sends before all others. */
typedef struct vkp_client_setup {
    size_t argc;         /* number of arguments, the command's name included; at least 1 */
    const vkp_str *argv; /* the arguments; any bytes */
    vkp_str expect;      /* the text that must be answered; ptr NULL: anything but an error */
    bool optional;       /* any answer will do */
} vkp_client_setup;

/* Where a try to connect goes, and with which credentials: what on_connect may change. */
typedef struct vkp_client_target {
    vkp_str address;  /* as vkp_client_config.address */
    vkp_str username; /* as vkp_client_config.username */
    vkp_str password; /* as vkp_client_config.password */
} vkp_client_target;

/* How a client connects, reconnects and delivers pushes. Only address or url is required. */
typedef struct vkp_client_config {
    vkp_str address; /* "tcp:HOST:PORT" or "unix:PATH"; required where url is not set */

    /* In place of address, username, password and database, which must then be unset:
       "redis://[[USER]:PASSWORD@]HOST[:PORT][/DATABASE]" (or valkey://), with port 6379 by default
       and an IPv6 host in brackets; "unix://[[USER]:PASSWORD@]/PATH[?db=DATABASE]". %XX stands for
       a byte of user, password, host or path. "?protocol=2" or 3 sets protocol, which must then be
       unset. rediss:// is UNSUPPORTED: there is no TLS. ptr NULL: the fields are used.        */
    vkp_str url;
    vkp_str username; /* sent with the password; ptr NULL: the user "default" */
    vkp_str password; /* ptr NULL: no authentication */
    vkp_str name;     /* the connection's name on the server (SETNAME); ptr NULL: none */
    /* 0 or 3: RESP3, or RESP2 when the server answers HELLO with an error that does not pass by
       itself, or hung up at HELLO ten times and never answered one. 2: RESP2, no HELLO.        */
    int protocol;
    uint32_t database;    /* the database that each new connection selects; 0: that of the server */
    vkp_client_role role; /* what the server must be; default: any */

    /* The commands that each new connection sends after the login, before anybody's commands;
       copied. An answer that is not the expected one ends the try to connect. */
    const vkp_client_setup *setup;
    size_t setup_count; /* number of setup commands */

    /* Called before each try to connect, also of the connections of private_max, reply_timeout_ms
       and delivery_ms, on the loop's thread; may change *target, which holds what the config says.
       The texts are copied when it returns. NULL: not called.                                 */
    void (*on_connect)(void *user, vkp_client_target *target);

    /* Looks the host name of the address up, in a thread of the program: then no lookup blocks the
       loop (shares). NULL: lookups block the loop's thread; addresses in digits need none. */
    vkp_resolver *resolver;

    /* Most milliseconds for one try, from the lookup by a resolver to the end of the handshake. A
       lookup that takes longer goes on, for the next try. 0: 5,000. VKP_OFF: no limit.        */
    uint64_t connect_timeout_ms;

    /* The client waits a random time before each new try: from 0 to a bound that starts here and
       doubles with each failed try. Milliseconds; 0: 50.                                      */
    uint64_t retry_min_ms;
    uint64_t retry_max_ms; /* the largest bound of the random wait before a try, in ms; 0: 5,000 */

    /* A connection that stood for this many milliseconds makes the bound start again. A server that
       answers the login and then hangs up is so not asked without end. 0: 5,000.              */
    uint64_t retry_reset_ms;

    /* TCP: after this many milliseconds without a byte the kernel asks the peer, as
       vkp_conn_config.keepalive_ms. 0: 30,000. VKP_OFF: never.                                */
    uint64_t keepalive_ms;

    /* TCP: bytes that the peer does not acknowledge for this many milliseconds mean that the
       connection is lost, as vkp_conn_config.unacked_ms. 0: 20,000. VKP_OFF: never.           */
    uint64_t unacked_ms;

    /* Every so many milliseconds the client asks the server for its own count of this connection's
       subscriptions (CLIENT INFO), and subscribes again to what is missing, which a GAP reports.
       With a role, it asks for that too. In RESP2 it sends PING, and asks with CLIENT LIST over a
       second, short connection. Where that is refused or counts wrong three times in a row, it
       sends PING. 0: 15,000. VKP_OFF: never.                                                  */
    uint64_t heartbeat_ms;

    /* When the oldest reply has been due for this long, the client asks over a second, short
       connection whether the server is alive: BUSY, LOADING and a blocked connection mean that it
       is, and the wait goes on; no answer, or a server that has nothing to do, that this connection
       is lost. Milliseconds; 0: 5,000. VKP_OFF: replies are waited for without end.           */
    uint64_t reply_timeout_ms;

    /* A server that serves others while it keeps this connection blocked (CLIENT PAUSE, a blocking
       command) is waited for at most so many milliseconds; then the connection is lost. 0: 60,000.
       VKP_OFF: without end.                                                                   */
    uint64_t blocked_timeout_ms;

    /* Every so many milliseconds, while something is subscribed, the client publishes a message to
       a channel of its own, "vkp:delivery:" and a random number, over a second, short connection,
       and is subscribed to it; its program sees nothing of that. A message that does not arrive
       within reply_timeout_ms means that the connection is lost, with a GAP from the last one that
       did. For ways to a server that may lose what they carry, such as proxies that answer CLIENT
       INFO themselves. The user needs the rights to publish and subscribe there; without, the log
       says so and nothing is probed. Others' patterns see the messages. 0 or VKP_OFF: never.  */
    uint64_t delivery_ms;

    /* Most connections for commands that block (BLPOP and its like, XREAD and XREADGROUP with
       BLOCK, WAIT, WAITAOF): each such command gets one of its own, logged in and set up as this
       one; when all are in use it waits. WAIT and WAITAOF are about the writes of their connection:
       a message to the channel "valkey-push:wait" precedes them on both, so that they wait for what
       this client wrote before; where it is refused, the refusal is their reply. Closing its slot
       gives the command up. Such a connection is kept for five seconds. Default: 0, commands that
       block are REFUSED.                                                                      */
    size_t private_max;

    /* How many milliseconds a command waits for a connection, over tries that fail; then its reply
       is DISCONNECTED. A command that was written is not sent again. A waiting command is a reason
       to try at once: no pause between two tries is longer than retry_min_ms then. Default: 0, a
       command waits for the end of the try that is under way, and between two tries it is refused.
       */
    uint64_t hold_ms;

    /* Most bytes of commands that wait or whose reply is missing; one command always fits.
       0: 64 MiB.                                                                              */
    size_t queue_bytes;
    vkp_resp_config resp; /* limits of the client's reader; its other fields are ignored */

    /* Called with each push on the loop's thread; the push is borrowed. on_push and pushes must not
       both be set; with neither, pushes are dropped.                                          */
    void (*on_push)(void *user, const vkp_push *push);
    void *user; /* the first argument of on_push and on_connect */

    /* The sender of a channel of vkp_push, for each push (shares until the close). When the channel
       is full the push is dropped, whatever it is, also a GAP; as soon as there is room a LAGGED
       with the number of dropped pushes follows.                                              */
    vkp_mpsc_tx *pushes;
    const vkp_env *env; /* memory and log; NULL: the loop's */
} vkp_client_config;

/* Open a client and start to connect. The client reconnects until it is closed: a server that
   does not answer is no error here. If the server refuses the password, the client closes the
   connection and tries again; it never uses a connection without authentication.
   Owns:   borrows config (copies texts); shares loop, pushes and resolver; gives *client
   Blocks: never; the loop blocks on DNS, for host names without a resolver
   Threads: loop's     In callbacks: ok
   Errors: INVALID (a null argument, no address or url, a malformed one, a url and a field that it
   stands for, another thread, an unknown protocol, a name that is not printable or has blanks,
   both on_push and pushes, a limit in resp above its maximum), LIMIT (a socket path too long for
   the system), UNSUPPORTED (unix:@NAME outside Linux, rediss://), NOMEM, CLOSED (loop)        */
VKP_API VKP_NODISCARD vkp_status vkp_client_open(vkp_loop *loop, const vkp_client_config *config,
                                                 vkp_client **client);

/* One more reference to the client (gives). Any thread. */
VKP_API vkp_client *vkp_client_ref(vkp_client *client);

/* Give a reference back; the last one closes the client. NULL is ignored. Any thread. */
VKP_API void vkp_client_unref(vkp_client *client);

/* Close the connection. Commands without a reply get CLOSED; no callback runs after that. On the
   loop's thread all this is done when the call returns; other threads queue it as a task for the
   loop. Idempotent; NULL is ignored. Any thread.                                              */
VKP_API void vkp_client_close(vkp_client *client);

/* The state of the client. Any thread. */
VKP_API vkp_client_state vkp_client_get_state(const vkp_client *client);

/* A receiver of the client's states, values of vkp_client_state: for vkp_watch_changed, and with
   vkp_case_watch_changed for a select or a handler. It has seen the current one.
   Owns:   gives *states     Blocks: never     Threads: any     In callbacks: ok
   Errors: NOMEM, INVALID (a null argument)                                                    */
VKP_API VKP_NODISCARD vkp_status vkp_client_watch_state(vkp_client *client, vkp_watch_rx **states);

/* Wait until the client is READY.
   Blocks: until deadline_ns     Threads: any but the loop's     In callbacks: would stall the loop
   Errors: TIMEOUT, CLOSED (the client), NOMEM, INVALID (client NULL)                          */
VKP_API VKP_NODISCARD vkp_status vkp_client_wait_ready(vkp_client *client, uint64_t deadline_ns);

/* The protocol of the last handshake, 2 or 3; 0 before the first handshake. Any thread. */
VKP_API int vkp_client_get_protocol(const vkp_client *client);

/* Copy an English text that says what ended the last connection or try; "" if nothing did. At most
   size bytes with the NUL. Any thread.                                                        */
VKP_API void vkp_client_get_error(vkp_client *client, char *text, size_t size);

/* What vkp_client_get_stats writes: how often since open. */
typedef struct vkp_client_stats {
    uint64_t connections; /* connections that were ready */
    uint64_t failures;    /* tries to connect that failed */
    uint64_t outages;     /* ready connections that were lost: DISCONNECTED */
    uint64_t gaps;        /* times in which messages may have been lost: GAP */
    uint64_t refusals;    /* refusals of a SUBSCRIBE; REFUSED reports only new words */
    uint64_t losses;      /* subscriptions that the server took away: LOST */
    uint64_t audits;      /* comparisons of the server's counts with the client's subscriptions */
    uint64_t repairs;     /* audits that found too few subscriptions, by kind */
    uint64_t probes;      /* questions over a second connection whether the server is alive */
    uint64_t deliveries;  /* messages of delivery_ms that arrived */
} vkp_client_stats;

/* Write the client's counters to *stats. Any thread. */
VKP_API void vkp_client_get_stats(const vkp_client *client, vkp_client_stats *stats);

/* Subscribe to a name. The server receives one SUBSCRIBE however many calls name it; each call
   needs one vkp_client_unsubscribe. The name is wanted until then: the client subscribes again
   after an outage, and asks again after a refusal (0.1 to 5 s later where the server's words
   promise an end, as BUSY and LOADING do, otherwise 1 to 30 s later). SUBSCRIBED, REFUSED and LOST
   report each change.
   Owns:   borrows name     Blocks: never     Threads: any     In callbacks: ok
   Errors: NOMEM, CLOSED, INVALID (client NULL, an unknown kind, name.ptr NULL with len > 0)   */
VKP_API VKP_NODISCARD vkp_status vkp_client_subscribe(vkp_client *client, vkp_sub_kind kind,
                                                      vkp_str name);

/* Receives the first outcome of a vkp_client_subscribe_then, once, on the loop's thread: OK (the
   server confirmed, now or earlier), REFUSED (words are the server's), DISCONNECTED (no connection;
   words say why), or CLOSED (the client). After REFUSED and DISCONNECTED the name is still wanted.
   words are valid until the function returns.                                                 */
typedef void (*vkp_subscribe_fn)(void *user, vkp_status status, vkp_str words);

/* vkp_client_subscribe with a notice of the first outcome: after OK, done is called once, never
   inside this call.
   Owns:   borrows name     Blocks: never     Threads: any     In callbacks: ok
   Errors: NOMEM, CLOSED, INVALID (client or done NULL, an unknown kind, name.ptr NULL with
   len > 0)                                                                                    */
VKP_API VKP_NODISCARD vkp_status vkp_client_subscribe_then(vkp_client *client, vkp_sub_kind kind,
                                                           vkp_str name, vkp_subscribe_fn done,
                                                           void *user);

/* Take one subscribe call back; the last one of a name sends UNSUBSCRIBE. A name that is not
   subscribed is ignored.
   Owns:   borrows name     Blocks: never     Threads: any     In callbacks: ok
   Errors: NOMEM, CLOSED, INVALID (client NULL, an unknown kind, name.ptr NULL with len > 0)   */
VKP_API VKP_NODISCARD vkp_status vkp_client_unsubscribe(vkp_client *client, vkp_sub_kind kind,
                                                        vkp_str name);

/* Send a command. The slot `reply`, which this call initialises, receives a vkp_reply* to unref. An
   error of the server is a reply of type VKP_RESP_ERROR. The arguments are terminated strings,
   then NULL. A command sent while the client connects waits for the end of the handshake. After
   OK, vkp_oneshot_recv returns CLOSED when no reply follows: the connection was lost or the client
   was closed (the command may or may not have run), the reply found no memory or was over a limit
   of config.resp, or the command was not sent (RESP2, and something is subscribed).
   Owns:   borrows the arguments, and the slot until vkp_oneshot_recv returned or it was closed
   Blocks: never     Threads: any     In callbacks: ok (take the reply with vkp_oneshot_try_recv)
   Errors: DISCONNECTED (the client waits for its next try; nothing was sent), FULL (queue_bytes),
   REFUSED (a command that changes the shared connection: SUBSCRIBE and UNSUBSCRIBE in all forms,
   HELLO, AUTH, RESET, QUIT, MONITOR, MULTI, EXEC, DISCARD, WATCH, UNWATCH, SELECT, ASKING,
   READONLY, READWRITE, SYNC, PSYNC, REPLCONF, SCRIPT DEBUG, CLIENT REPLY; without private_max also
   one that blocks it), LIMIT (more than 64 arguments, which vkp_client_command_argv takes; 4 GiB),
   CLOSED, NOMEM, INVALID (a null argument, no command) */
VKP_API VKP_NODISCARD vkp_status vkp_client_command(vkp_client *client, vkp_oneshot *reply, ...)
    __attribute__((sentinel));

/* vkp_client_command with an array of argc arguments, which may hold any bytes. The slot `reply`
   receives a vkp_reply* to unref, or CLOSED.
   Owns:   borrows argv, and the slot until vkp_oneshot_recv returned or it was closed
   Blocks: never     Threads: any     In callbacks: ok (take the reply with vkp_oneshot_try_recv)
   Errors: as vkp_client_command, but LIMIT only at 4 GiB; INVALID (a null argument, argc 0)   */
VKP_API VKP_NODISCARD vkp_status vkp_client_command_argv(vkp_client *client, vkp_oneshot *reply,
                                                         size_t argc, const vkp_str *argv);

/* Log in again on the connection that stands, as vkp_client_command with AUTH would. When the
   server accepts, later connections log in with these credentials too (on_connect may change
   them).
   username.ptr NULL: AUTH with the password alone.
   Owns:   borrows the texts, and the slot until vkp_oneshot_recv returned or it was closed
   Blocks: never     Threads: any     In callbacks: ok (take the reply with vkp_oneshot_try_recv)
   Errors: as vkp_client_command, but never REFUSED; INVALID (a null argument)                 */
VKP_API VKP_NODISCARD vkp_status vkp_client_authenticate(vkp_client *client, vkp_oneshot *reply,
                                                         vkp_str username, vkp_str password);

/* vkp_client_command with one command in a format, as hiredis' redisCommand has it. Blanks of the
   format separate arguments; what a conversion puts never does, whichever bytes it puts:
   "SET user:%d %b" makes 3 arguments, and one of a %s that is empty is an empty argument. %s puts
   a terminated string, %b any bytes (a pointer, then a size_t), %c the byte of an int, %% a
   percent sign; d i o u x X (after hh h l ll j t z) and e E f F g G a A put numbers as printf does,
   with its flags, and with width and precision in digits. A double has a point in any locale.
   Compilers cannot check the arguments: the attribute for printf's formats refuses %b.
   Owns:   borrows the arguments, and the slot until vkp_oneshot_recv returned or it was closed
   Blocks: never     Threads: any     In callbacks: ok (take the reply with vkp_oneshot_try_recv)
   Errors: as vkp_client_command, but LIMIT only at 4 GiB; INVALID (client, reply or format NULL, an
   unknown conversion, a format that ends inside one or has no command, a conversion of 32 bytes or
   with a width above INT_MAX, NULL for a %s or for bytes of a %b)                             */
VKP_API VKP_NODISCARD vkp_status vkp_client_commandf(vkp_client *client, vkp_oneshot *reply,
                                                     const char *format, ...);

/* vkp_client_commandf with the arguments of a caller that is variadic itself; it calls va_end.
   Owns:   borrows the arguments, and the slot until vkp_oneshot_recv returned or it was closed
   Blocks: never     Threads: any     In callbacks: ok (take the reply with vkp_oneshot_try_recv)
   Errors: as vkp_client_commandf                                                              */
VKP_API VKP_NODISCARD vkp_status vkp_client_vcommandf(vkp_client *client, vkp_oneshot *reply,
                                                      const char *format, va_list arguments);

/* Receives the outcome of vkp_client_send, once, on the loop's thread. status OK: value and frame
   are the last reply, valid until the function returns. Otherwise value and frame are NULL, and
   status is DISCONNECTED (the commands may or may not have run), CLOSED (the client), LIMIT (the
   last reply was over a limit of config.resp, or had a number that the reader refuses; the
   commands ran), or REFUSED (not sent: RESP2, and something is subscribed). */
typedef void (*vkp_reply_fn)(void *user, vkp_status status, const vkp_value *value,
                             const vkp_bytes *frame);

/* Send bytes that hold `replies` whole commands, which stay together on the wire. The bytes are not
   checked. After OK, the loop's thread calls on_reply once, with the LAST reply; after an error
   on_reply is not called.
   Owns:   borrows commands (shares the block)
   Blocks: never     Threads: any     In callbacks: ok
   Errors: DISCONNECTED (the client waits for its next try), FULL (queue_bytes), CLOSED, NOMEM,
   INVALID (client, commands or on_reply NULL; no bytes; replies 0)                            */
VKP_API VKP_NODISCARD vkp_status vkp_client_send(vkp_client *client, const vkp_bytes *commands,
                                                 uint32_t replies, vkp_reply_fn on_reply,
                                                 void *user);

#endif /* VKP_NO_IO */
