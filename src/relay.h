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
    /* How many milliseconds that one may send nothing, in the midst of a command or of a MULTI
       block and while others wait; then it is closed. Default: 5,000. VKP_OFF: without end. */
    uint64_t gather_ms;
    /* Most bytes of replies that one client has not read; beyond, the relay closes the client.
       Default: 256 MiB. */
    size_t max_reply_bytes;
    /* Most names that one client subscribes to. Default: 100,000. A name has at most 64 KiB. */
    size_t max_subscriptions;
    /* Most bytes of the names that one client subscribes to. Default: 64 MiB. */
    size_t max_name_bytes;
    /* Ten times a second, measure how late each loop is, for vkp_relay_loop.lag_ns. Default: false,
       an idle relay sleeps. */
    bool measure_lag;
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

/* Which way a command of a client went. */
typedef enum vkp_relay_route {
    VKP_RELAY_SHARED = 0, /* over a connection that clients share */
    VKP_RELAY_PRIVATE,    /* over a connection of the client's own */
    VKP_RELAY_PUSH,       /* subscribes or unsubscribes, over the connection for subscriptions */
    VKP_RELAY_HERE        /* answered by the relay */
} vkp_relay_route;

/* The number of values of vkp_relay_route. */
#define VKP_RELAY_ROUTES 4

/* The number of values of vkp_relay_times.within. */
#define VKP_RELAY_TIMES 22

/* How long the server took for replies, from the round of the loop in which the command was read to
   the round in which its reply was. Commands that may block are not in it. */
typedef struct vkp_relay_times {
    uint64_t total_ns; /* of all replies together */
    /* Replies that took at most 2^(14 + index) nanoseconds, 16 us to 17 s, and more than those of
       the index before; the last value counts all that took longer. */
    uint64_t within[VKP_RELAY_TIMES];
} vkp_relay_times;

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
    bool connected;        /* all connections that clients share are there; without a server too */
    uint64_t since_unix_ms; /* when `connected` changed; before that: open */
    uint64_t reconnects;    /* connections to the server in place of those that were lost */
    uint64_t refusals;      /* refusals of a SUBSCRIBE by the server */
    uint64_t commands[VKP_RELAY_ROUTES]; /* commands of clients, by vkp_relay_route */
    size_t in_flight;                    /* commands now whose replies the server owes */
    vkp_relay_times replies[2];          /* of VKP_RELAY_SHARED and VKP_RELAY_PRIVATE */
} vkp_relay_stats;

/* Write the relay's counters to *stats. Any thread. */
VKP_API void vkp_relay_get_stats(const vkp_relay *relay, vkp_relay_stats *stats);

/* What a client of a relay does now: the first of these that is so. */
typedef enum vkp_relay_client_state {
    VKP_RELAY_CLIENT_SLOW = 0,   /* it does not read what waits for it */
    VKP_RELAY_CLIENT_WAITING,    /* a command of it is under way */
    VKP_RELAY_CLIENT_PRIVATE,    /* it has a connection of its own */
    VKP_RELAY_CLIENT_SUBSCRIBED, /* it is subscribed */
    VKP_RELAY_CLIENT_IDLE        /* none of these */
} vkp_relay_client_state;

/* The number of values of vkp_relay_client_state. */
#define VKP_RELAY_CLIENT_STATES 5

/* A listener of a relay. */
typedef struct vkp_relay_listener {
    const char *address;
    vkp_listener_stats stats;
} vkp_relay_listener;

/* A loop of a relay. */
typedef struct vkp_relay_loop {
    size_t clients;  /* clients that the loop serves */
    uint64_t lag_ns; /* how late it was at worst in the last 10 to 20 seconds: see measure_lag */
} vkp_relay_loop;

/* Most bytes of a name in a survey. */
#define VKP_RELAY_CHANNEL_BYTES 256u

/* A name with many messages. */
typedef struct vkp_relay_channel {
    vkp_sub_kind kind;
    vkp_str name;       /* its first VKP_RELAY_CHANNEL_BYTES at most */
    size_t name_bytes;  /* the length of the whole name */
    uint64_t messages;  /* messages since the name has subscribers */
    size_t subscribers; /* clients of the loops on which it has many messages */
} vkp_relay_channel;

/* A time in which a connection to the server that the clients share was not there. */
typedef struct vkp_relay_outage {
    uint64_t from_unix_ms;
    uint64_t to_unix_ms; /* 0: it lasts */
    vkp_str reason;      /* of the first connection that was lost */
} vkp_relay_outage;

/* What vkp_relay_survey_then finds. Arrays and texts are valid until its `done` returns. */
typedef struct vkp_relay_survey {
    vkp_relay_stats stats;
    size_t clients[VKP_RELAY_CLIENT_STATES]; /* by vkp_relay_client_state */
    size_t queued_bytes;                     /* bytes that wait for clients that do not read */
    const vkp_relay_listener *listeners;
    size_t listener_count;
    const vkp_relay_loop *loops; /* in the order of vkp_relay_config.loops */
    size_t loop_count;
    const vkp_relay_channel *channels; /* about those with the most messages, most first */
    size_t channel_count;              /* 16 at most */
    const vkp_relay_outage *outages;   /* the last ones, oldest first */
    size_t outage_count;               /* 32 at most */
} vkp_relay_survey;

/* Look at all clients of the relay: each loop at its own, about a hundred in a round. done is
   called once on loops[0], not inside this call. survey NULL: there was no memory, or the relay's
   unref came first (then inside it, or at the close of loops[0]).
   Blocks: never     Threads: any     In callbacks: ok
   Errors: NOMEM, CLOSED (loops[0] is closed), INVALID (relay or done NULL) */
VKP_API VKP_NODISCARD vkp_status vkp_relay_survey_then(
    vkp_relay *relay, void (*done)(void *user, const vkp_relay_survey *survey), void *user);

/* Ask the server PING, over a connection that the clients share. done is called once on loops[0],
   perhaps inside this call: OK (it answers; a relay without a server does), REFUSED (words are the
   server's error, such as LOADING), DISCONNECTED (one of the shared connections is not there), or
   CLOSED. It may take long: set a time of your own. words are valid until done returns.
   Blocks: never     Threads: that of loops[0]     In callbacks: ok
   Errors: NOMEM, INVALID (relay or done NULL) */
VKP_API VKP_NODISCARD vkp_status vkp_relay_ping_then(vkp_relay *relay, vkp_subscribe_fn done,
                                                     void *user);

/* The registry of the relay's Unix sockets, for vkp_registry_get_stats and for handlers of crashes.
   Views: valid until the relay's unref. Any thread. */
VKP_API vkp_registry *vkp_relay_get_registry(const vkp_relay *relay);

/* Close the relay immediately and free it. The on_end of a drain under way is not called. The loops
   no longer run, or never ran. NULL is ignored. Threads: any one that alone uses the loops. */
VKP_API void vkp_relay_unref(vkp_relay *relay);

#endif /* VKP_NO_IO */
