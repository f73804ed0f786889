#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-relay   Serve local Valkey clients over one upstream connection, or none          */

typedef struct vkp_relay_config {
    vkp_str server;         /* address of the server; default: none, a stand-alone pub/sub broker */
    vkp_str username;       /* of the connection to the server; default: the default user */
    vkp_str password;       /* of the connection to the server; default: none */
    vkp_loop *const *loops; /* connections are spread over these; at least one */
    size_t loop_count;      /* default 1 */
    size_t queue_frames;    /* per client, as vkp_conn_config */
    size_t queue_bytes;
    vkp_on_full on_full;        /* default DISCONNECT; or DROP_OLDEST, DROP_NEWEST */
    size_t max_clients;         /* at once; default 16,384 */
    size_t max_clients_per_uid; /* over Unix sockets; default: no limit */
    /* Over Unix sockets: besides the process's own uid. Their files then have mode 0666. */
    const uint32_t *allow_uids;
    size_t allow_uid_count;
    /* Called on loops[0] when no client has been there for linger_ms, once at least one was. */
    void (*on_idle)(void *user);
    void *user;
    uint64_t linger_ms;       /* default: at once */
    uint64_t check_ms;        /* look that often at the sockets' files, bind again what is lost */
    vkp_str shutdown_notice;  /* copied; see vkp_relay_drain; default: none */
    size_t max_request_bytes; /* one command, or one MULTI block; default 64 MiB */
    size_t max_reply_bytes;   /* replies that a client has not read; default 256 MiB, then closed */
    size_t max_subscriptions; /* names of one client; default 100,000 */
    const vkp_env *env;
} vkp_relay_config;

/* Open a relay on loops that the caller runs, each in its own thread. loops[0] carries the
   upstream connection and the listeners.
   Owns:   borrows config, shares loops; gives *relay     Threads: before the loops run
   Errors: INVALID, NOMEM, and those of vkp_client_open                                        */
VKP_API VKP_NODISCARD vkp_status vkp_relay_open(const vkp_relay_config *config, vkp_relay **relay);

/* Accept local clients at one more address; several are fine. Owns: borrows address. Threads:
   loops[0]'s. *bound (may be NULL) views the address with the port chosen.
   Errors: those of vkp_listener_open                                                          */
VKP_API VKP_NODISCARD vkp_status vkp_relay_listen(vkp_relay *relay, vkp_str address,
                                                  const char **bound);

/* Stop accepting, answer what was asked, tell each client, write what is queued until the deadline,
   then close; on_end(user) on loops[0] when all is gone. Threads: loops[0]'s. Once.
   The notice is a message of the channel VKP_RELAY_NOTICE_CHANNEL to clients of RESP3 and those
   with subscriptions; to others an error, the answer to whatever they would ask next.         */
#define VKP_RELAY_NOTICE_CHANNEL "valkey-push:shutdown"
VKP_API void vkp_relay_drain(vkp_relay *relay, void (*on_end)(void *user), void *user,
                             uint64_t deadline_ns);

typedef struct vkp_relay_stats {
    size_t clients;
    uint64_t accepted;
    uint64_t refused[VKP_REFUSAL_COUNT]; /* by vkp_refusal */
    uint64_t messages_in;                /* from upstream or by PUBLISH */
    uint64_t deliveries;
    uint64_t dropped_frames;  /* by the policy */
    uint64_t slow_closed;     /* by VKP_ON_FULL_DISCONNECT, or over max_reply_bytes */
    uint64_t lagged;          /* messages lost to a loop that was 64 MiB behind */
    uint64_t protocol_errors; /* clients closed for them */
} vkp_relay_stats;
VKP_API void vkp_relay_get_stats(const vkp_relay *relay, vkp_relay_stats *stats); /* any thread */

/* The registry of its Unix sockets, for vkp_registry_get_stats and crash handlers. Views. */
VKP_API vkp_registry *vkp_relay_get_registry(const vkp_relay *relay);

/* Close at once, and free; a drain's on_end that was not called is not called any more. The loops
   do not run any more (or never ran). NULL is ignored.                                         */
VKP_API void vkp_relay_unref(vkp_relay *relay);

#endif /* VKP_NO_IO */
