#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-gate   Admission control: which clients a listener accepts, and how many */

/* Why a client was refused: its connection was closed right after accept. */
typedef enum vkp_refusal {
    /* The client's uid is not allowed, or could not be read, or vkp_gate_config.allow returned
       false. */
    VKP_REFUSAL_USER = 0,
    /* max_clients of the gate or of the listener, or max_references of the socket, was reached. */
    VKP_REFUSAL_FULL,
    /* max_clients_per_uid was reached. */
    VKP_REFUSAL_USER_FULL,
    /* No memory, or no descriptors for a second or longer. */
    VKP_REFUSAL_OVERLOAD,
    /* The socket's last reference was just given back, or the listener was just closed. */
    VKP_REFUSAL_ENDED
} vkp_refusal;

/* The number of values of vkp_refusal. */
#define VKP_REFUSAL_COUNT 5

/* The config of vkp_gate_open. Uids are those of clients over Unix sockets; TCP clients have none,
   and are only counted. Users whom the process's user namespace (Linux) does not map share one uid,
   which is nobody's: they are not allowed but by allow_any_uid or allow. */
typedef struct vkp_gate_config {
    /* Most clients at one time, over all listeners of the gate. Default: no limit. */
    size_t max_clients;
    /* Most clients of one uid at one time, over all listeners of the gate. Default: no limit. */
    size_t max_clients_per_uid;
    /* Uids that are allowed besides the process's own (effective) uid; copied. NULL: none. */
    const uint32_t *allow_uids;
    /* Number of allow_uids. */
    size_t allow_uid_count;
    /* Every uid is allowed. Default: false. */
    bool allow_any_uid;
    /* Returns whether a client over a Unix socket is allowed; called instead of the checks of uids.
       Called once per client, on the accepting loop's thread. NULL: uids decide. */
    bool (*allow)(void *user, const vkp_peer *peer);
    /* Handed to allow. */
    void *user;
    /* Memory, log and system; must outlive the gate. NULL: the defaults. */
    const vkp_env *env;
} vkp_gate_config;

/* Open a gate; any number of listeners, on any loops, may share it. NULL config: all defaults.
   Owns:   borrows config (copies allow_uids); gives *gate
   Blocks: never     Threads: any     In callbacks: ok
   Errors: NOMEM, INVALID (gate NULL; allow_uid_count without allow_uids) */
VKP_API VKP_NODISCARD vkp_status vkp_gate_open(const vkp_gate_config *config, vkp_gate **gate);

/* One more reference (gives, the same pointer). Any thread. */
VKP_API vkp_gate *vkp_gate_ref(vkp_gate *gate);

/* One reference less; listeners and seats hold one each. NULL is ignored. Any thread. */
VKP_API void vkp_gate_unref(vkp_gate *gate);

/* What vkp_gate_get_stats writes. */
typedef struct vkp_gate_stats {
    size_t clients;                      /* clients that have a seat now */
    uint64_t admitted;                   /* clients that got a seat since open */
    uint64_t refused[VKP_REFUSAL_COUNT]; /* clients refused since open, indexed by vkp_refusal */
} vkp_gate_stats;

/* Write the gate's counters to *stats. Any thread. */
VKP_API void vkp_gate_get_stats(vkp_gate *gate, vkp_gate_stats *stats);

/* Give back the seat of one admitted client: the client no longer counts at the gate, and if the
   listener follows its socket, the client's reference of that socket is given back too. A
   connection gives back its seat before its on_close. NULL is ignored. Any thread. */
VKP_API void vkp_seat_unref(vkp_seat *seat);

/* Let the connection keep the seat until its close. The connection is open and has no seat. Takes
   seat. Loop's thread. */
VKP_API void vkp_conn_set_seat(vkp_conn *conn, vkp_seat *seat);

#endif /* VKP_NO_IO */
