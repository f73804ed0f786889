#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-relay   Serve local Valkey clients over few upstream connections, or none */

/* The config of vkp_relay_open. */
typedef struct vkp_relay_config {
    vkp_str server; /* address of the server; default: none, a stand-alone pub/sub broker */
    /* Looks the server's host name up in a thread of the program; shared. NULL: lookups block
       loops[0]. */
    vkp_resolver *resolver;
    /* How many connections share the clients' commands; all commands of a client go over the same
       one. Subscriptions have a connection of their own. Default: 1. */
    size_t upstreams;
    /* Most connections to the server that carry one client each, while it blocks, watches keys,
       uses another database, tracks keys or logs in. Default: 1,024. VKP_UNLIMITED: none is refused
       for their number. */
    size_t private_max;
    /* Commands that need such a connection are refused. Default: false. */
    bool shared_only;
    /* How many milliseconds a command waits while there is no connection to the server; then its
       client is disconnected, as it would be by the server's end. A client whose command was sent
       when the connection was lost is disconnected at once. Default: 1,000. VKP_OFF: none waits. */
    uint64_t hold_ms;
    /* When messages may have been lost, disconnect the clients that were subscribed to one of the
       names. Default: false, the subscribers of VKP_RELAY_GAP_CHANNEL are notified. */
    bool close_on_gap;
    vkp_str username; /* user name for the server; default: the default user */
    vkp_str password; /* password for the server; default: none */
    /* The loops that serve local clients, an array of loop_count: each client is given to the next
       loop in turn. Required; each loop is shared. */
    vkp_loop *const *loops;
    /* The number of loops. Default: 1. */
    size_t loop_count;
    /* Most messages that wait for one client. Default: 65,536. */
    size_t queue_frames;
    /* Most bytes of messages that wait for one client; one message always fits. Default: 8 MiB. */
    size_t queue_bytes;
    /* The policy when a client's queue is full: VKP_ON_FULL_DISCONNECT (default), DROP_OLDEST or
       DROP_NEWEST. */
    vkp_on_full on_full;
    /* Most clients at one time, over all addresses. Default: 16,384. */
    size_t max_clients;
    /* Most clients of one uid at one time, over Unix sockets. Default: no limit. */
    size_t max_clients_per_uid;
    /* Uids that are allowed over Unix sockets besides the process's own uid; copied. With any, the
       sockets' files have mode 0666 instead of 0600. NULL: none. */
    const uint32_t *allow_uids;
    /* The number of allow_uids. */
    size_t allow_uid_count;
    /* The last client left, and for linger_ms none came. Called each time this happens, on
       loops[0], not before the first client and not during a drain. NULL: not called. */
    void (*on_idle)(void *user);
    /* Handed to on_idle. */
    void *user;
    /* Milliseconds without a client before on_idle is called. Default: 0, it is called
       immediately. */
    uint64_t linger_ms;
    /* Milliseconds between two checks of the Unix sockets' files; a lost file is bound again.
       Default: 0, no checks. */
    uint64_t check_ms;
    /* The text that vkp_relay_drain sends to each client; copied. Default: nothing is sent. */
    vkp_str shutdown_notice;
    /* Most bytes of one command, or of one MULTI block. Default: 64 MiB; must be below 2 GiB. */
    size_t max_request_bytes;
    /* Bytes of commands of all clients that are not whole, wait for EXEC or are not answered. Above
       it clients that have many of them are not read; one at a time goes on. Default: 64 MiB. */
    size_t gather_bytes;
    /* How many milliseconds that one may send nothing, in the midst of a command and while others
       wait; then it is closed. Default: 5,000. VKP_OFF: without end. */
    uint64_t gather_ms;
    /* Most bytes of replies that one client has not read; beyond, the relay closes the client.
       Default: 256 MiB. */
    size_t max_reply_bytes;
    /* Most names that one client subscribes to. Default: 100,000. A name has at most 64 KiB. */
    size_t max_subscriptions;
    /* Most bytes of the names that one client subscribes to. Default: 64 MiB. */
    size_t max_name_bytes;
    /* Memory, log and system; must outlive the relay. NULL: the defaults. */
    const vkp_env *env;
} vkp_relay_config;

/* Open a relay on loops that the caller runs, each in its own thread. loops[0] carries the upstream
   connections and the listeners. config and its loops are required.
   Owns:   borrows config (copies its texts), shares the loops; gives *relay
   Blocks: never     Threads: that of every loop, before the loops run
   Errors: NOMEM, INVALID (a null argument, no loops, on_full WAIT or ERROR, max_request_bytes of
   2 GiB or more, allow_uid_count without allow_uids), those of vkp_client_open */
VKP_API VKP_NODISCARD vkp_status vkp_relay_open(const vkp_relay_config *config, vkp_relay **relay);

/* Where a relay accepts local clients. */
typedef struct vkp_relay_door {
    /* "unix:PATH", "unix:" (a unique path) or "tcp:HOST:PORT" (port 0: a free port). Required. */
    vkp_str address;
    /* Most clients at one time that came in here; they count for the relay's max_clients too.
       Default: no other limit. */
    size_t max_clients;
    /* After so many milliseconds without a word a client is disconnected that is owed no answer,
       has no subscription and no MONITOR; up to a second later. Default: 0, never. */
    uint32_t idle_ms;
    /* What a client has to say first, by AUTH or HELLO, as the user default: until then it is
       answered as a server answers without a login. Copied. ptr NULL: nothing; not empty. */
    vkp_str password;
} vkp_relay_door;

/* Accept local clients at one more address; may be called for several. *bound (NULL is allowed)
   gets the address with the port that the system chose.
   Owns:   borrows door (copies its texts); *bound views the address until the relay's unref
   Blocks: on the file system, and on DNS for a host name     Threads: that of loops[0]
   Errors: INVALID (a null argument or address, an empty password), NOMEM, those of
   vkp_listener_open */
VKP_API VKP_NODISCARD vkp_status vkp_relay_open_door(vkp_relay *relay, const vkp_relay_door *door,
                                                     const char **bound);

/* vkp_relay_open_door of a door with an address and defaults. Threads: that of loops[0] */
VKP_API VKP_NODISCARD vkp_status vkp_relay_listen(vkp_relay *relay, vkp_str address,
                                                  const char **bound);

/* Log in at the server with other credentials: on the connections that stand, where the server is
   asked and a refusal is logged, and on all that begin from now on. username.ptr NULL: the default
   user. A relay without a server ignores it.
   Owns:   borrows the texts
   Blocks: never     Threads: that of loops[0]     In callbacks: ok
   Errors: NOMEM (the credentials are as before), INVALID (relay or password.ptr NULL) */
VKP_API VKP_NODISCARD vkp_status vkp_relay_set_login(vkp_relay *relay, vkp_str username,
                                                     vkp_str password);

/* The pub/sub channel of the message that carries vkp_relay_config.shutdown_notice. */
#define VKP_RELAY_NOTICE_CHANNEL "valkey-push:shutdown"

/* The pub/sub channel of a message for each GAP of the relay's connection for subscriptions: a JSON
   object with the numbers "from" and "to", milliseconds since 1970, the text "reason", and "names",
   an array of objects with "kind" (channel, pattern or shard) and "name", or null for all that were
   subscribed. Bytes outside of ASCII are written as \\u00XX. */
#define VKP_RELAY_GAP_CHANNEL "valkey-push:gap"

/* Shut down in order: stop accepting, answer the commands that were received, send each client the
   shutdown_notice, write what is queued, close each connection; at the deadline close the others.
   Then on_end(user) is called once, on loops[0]. NULL on_end: not called. Later calls are ignored.
   Clients of RESP3 and clients with subscriptions get the notice as a message of the pub/sub
   channel VKP_RELAY_NOTICE_CHANNEL; other clients get it as an error, in place of their next reply.
   Blocks: never     Threads: that of loops[0]     In callbacks: ok */
VKP_API void vkp_relay_drain(vkp_relay *relay, void (*on_end)(void *user), void *user,
                             uint64_t deadline_ns);

/* What vkp_relay_get_stats writes. Counters count since open. */
typedef struct vkp_relay_stats {
    size_t clients;                      /* clients of the relay now */
    uint64_t accepted;                   /* clients accepted */
    uint64_t refused[VKP_REFUSAL_COUNT]; /* clients refused, indexed by vkp_refusal */
    uint64_t messages_in;                /* messages from the server, or from clients by PUBLISH */
    uint64_t deliveries;                 /* deliveries of messages to clients that were tried */
    uint64_t dropped_frames;             /* messages to clients that on_full dropped */
    uint64_t slow_closed;     /* clients closed by VKP_ON_FULL_DISCONNECT, max_reply_bytes, or
                                 because they kept others waiting, see gather_bytes */
    uint64_t lagged;          /* messages lost to one loop that was 64 MiB behind */
    uint64_t protocol_errors; /* clients closed because they broke the protocol */
    uint64_t outages;         /* push and shared connections to the server that were lost */
    uint64_t gaps;            /* times in which messages may have been lost */
    uint64_t lost;   /* clients closed because the server was not there, or by close_on_gap */
    size_t privates; /* connections to the server that carry one client, or wait for one */
    uint64_t privates_opened;  /* such connections opened */
    uint64_t privates_refused; /* commands refused because there were private_max */
    size_t gathered_bytes; /* what counts against gather_bytes now: clients with more than 16 KiB */
} vkp_relay_stats;

/* Write the relay's counters to *stats. Any thread. */
VKP_API void vkp_relay_get_stats(const vkp_relay *relay, vkp_relay_stats *stats);

/* The registry of the relay's Unix sockets, for vkp_registry_get_stats and for handlers of crashes.
   Views: valid until the relay's unref. Any thread. */
VKP_API vkp_registry *vkp_relay_get_registry(const vkp_relay *relay);

/* Close the relay immediately and free it. The on_end of a drain under way is not called. The loops
   no longer run, or never ran. NULL is ignored. Threads: any one that alone uses the loops. */
VKP_API void vkp_relay_unref(vkp_relay *relay);

#endif /* VKP_NO_IO */
