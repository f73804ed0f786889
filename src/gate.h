#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-gate   Who may come in, and how many at once                                      */

/* Why a client was closed right after accept. */
typedef enum vkp_refusal {
    VKP_REFUSAL_USER = 0,  /* its uid is not allowed, or `allow` said no */
    VKP_REFUSAL_FULL,      /* max_clients, of the gate or of the listener; max_references */
    VKP_REFUSAL_USER_FULL, /* max_clients_per_uid */
    VKP_REFUSAL_OVERLOAD,  /* no descriptors for a second and more, or no memory */
    VKP_REFUSAL_ENDED      /* the socket's last reference was just given back */
} vkp_refusal;
#define VKP_REFUSAL_COUNT 5

typedef struct vkp_gate_config {
    size_t max_clients; /* at once, over all listeners of the gate; default: no limit */
    size_t max_clients_per_uid;
    /* Unix sockets: the process's own (effective) uid, these (copied), or all. */
    const uint32_t *allow_uids;
    size_t allow_uid_count;
    bool allow_any_uid;
    /* Decides instead. On the accepting loop's thread. */
    bool (*allow)(void *user, const vkp_peer *peer);
    void *user;
    const vkp_env *env;
} vkp_gate_config;

/* Open a gate; any number of listeners, on any loops, may share it.
   Owns:   borrows config; gives *gate     Threads: any     Errors: NOMEM                      */
VKP_API VKP_NODISCARD vkp_status vkp_gate_open(const vkp_gate_config *config, vkp_gate **gate);
VKP_API vkp_gate *vkp_gate_ref(vkp_gate *gate); /* any thread */
VKP_API void vkp_gate_unref(vkp_gate *gate);    /* any thread; NULL is ignored */

typedef struct vkp_gate_stats {
    size_t clients; /* now */
    uint64_t admitted;
    uint64_t refused[VKP_REFUSAL_COUNT]; /* by vkp_refusal */
} vkp_gate_stats;
VKP_API void vkp_gate_get_stats(vkp_gate *gate, vkp_gate_stats *stats); /* any thread */

/* The place of one admitted client: it counts at the gate, and holds the socket that it came
   through, if the listener follows that. Connections give theirs back before their on_close.  */
VKP_API void vkp_seat_unref(vkp_seat *seat); /* gives it back; any thread; NULL is ignored */

/* The connection keeps the seat until its close. Takes seat. Loop's thread; open connections. */
VKP_API void vkp_conn_set_seat(vkp_conn *conn, vkp_seat *seat);

#endif /* VKP_NO_IO */
