#if VKP_I_IO
/* ======================================================================================
   >>impl-gate   Who may come in
   ======================================================================================
   A gate counts admitted clients. One vkp_seat counts all clients of one uid at one listener; it is
   freed with its last client. Admission walks the list of seats, which has at most uids times
   listeners entries.
   The gate's mutex guards `seats`, `stats` and the links and counts of the seats. No other lock is
   taken under it: `allow` is called and sockets are given back without it. Members that are neither
   guarded nor atomic are constant after open.
   Each client of a seat holds one reference of seat->sock; the seat holds one of the gate. */

/* All clients of one uid that one listener accepted. */
struct vkp_seat {
    vkp_seat *prev;   /* in gate->seats; NULL: the first */
    vkp_seat *next;   /* in gate->seats; NULL: the last */
    vkp_gate *gate;   /* a reference */
    vkp_socket *sock; /* one reference per client; NULL: the listener does not follow a socket */
    uint64_t listener_id; /* number of the listener, unique at this gate */
    uint32_t uid;         /* of the clients; valid if has_uid */
    bool has_uid;         /* false for TCP clients */
    size_t clients;       /* admitted and not yet given back */
};

struct vkp_gate {
    const vkp_env *env;
    const vkp_sys *sys;
    size_t refs;            /* atomic */
    vkp_gate_config config; /* 0 limits are SIZE_MAX here; its allow_uids is the caller's memory */
    uint32_t *allow_uids;   /* copy of config.allow_uids */
    uint32_t overflow_id;   /* a user who has it may be anybody; UINT32_MAX: nobody has it */
    uint64_t listener_ids;  /* atomic: the number of the next listener */
    VKP_I_MUTEX mutex;
    vkp_seat *seats;      /* guarded by mutex */
    vkp_gate_stats stats; /* guarded by mutex */
};

VKP_API vkp_status vkp_gate_open(const vkp_gate_config *config, vkp_gate **out)
{
    const vkp_env *env = vkp_i_env(config != NULL ? config->env : NULL);
    vkp_gate *gate;
    VKP_I_REQUIRE(out != NULL);
    VKP_I_REQUIRE(config == NULL || config->allow_uid_count == 0 || config->allow_uids != NULL);
    gate = (vkp_gate *)vkp_i_alloc_zero(env, sizeof *gate);
    if (gate == NULL) {
        return VKP_ERR_NOMEM;
    }
    gate->env = env;
    gate->sys = vkp_i_sys(env);
    gate->refs = 1;
    gate->overflow_id = gate->sys->overflow_id();
    if (config != NULL) {
        gate->config = *config;
    }
    if (gate->config.allow_uid_count > 0) {
        size_t bytes = gate->config.allow_uid_count * sizeof *gate->allow_uids;
        gate->allow_uids = (uint32_t *)vkp_i_alloc(env, bytes);
        if (gate->allow_uids == NULL) {
            vkp_i_free(env, gate, sizeof *gate);
            return VKP_ERR_NOMEM;
        }
        memcpy(gate->allow_uids, gate->config.allow_uids, bytes);
    }
    if (gate->config.max_clients == 0) {
        gate->config.max_clients = SIZE_MAX;
    }
    if (gate->config.max_clients_per_uid == 0) {
        gate->config.max_clients_per_uid = SIZE_MAX;
    }
    VKP_I_MUTEX_INIT(&gate->mutex);
    *out = gate;
    return VKP_OK;
}

VKP_API vkp_gate *vkp_gate_ref(vkp_gate *gate)
{
    (void)VKP_I_ADD(&gate->refs, 1);
    return gate;
}

VKP_API void vkp_gate_unref(vkp_gate *gate)
{
    if (gate != NULL && VKP_I_UNREF(&gate->refs) == 1) {
        vkp_i_free(gate->env, gate->allow_uids,
                   gate->config.allow_uid_count * sizeof *gate->allow_uids);
        VKP_I_MUTEX_DEINIT(&gate->mutex);
        vkp_i_free(gate->env, gate, sizeof *gate);
    }
}

VKP_API void vkp_gate_get_stats(vkp_gate *gate, vkp_gate_stats *stats)
{
    VKP_I_LOCK(&gate->mutex);
    *stats = gate->stats;
    VKP_I_UNLOCK(&gate->mutex);
}

/* Whether a client of this uid may connect: `allow` decides if it is set. Not under the mutex. */
static bool vkp_i_gate_allows(const vkp_gate *gate, const vkp_peer *peer)
{
    size_t i;
    if (gate->config.allow != NULL) {
        return gate->config.allow(gate->config.user, peer);
    }
    if (gate->config.allow_any_uid) {
        return true;
    }
    if (peer->uid == gate->overflow_id) {
        return false;
    }
    if (peer->uid == gate->sys->user_id()) {
        return true;
    }
    for (i = 0; i < gate->config.allow_uid_count; i++) {
        if (gate->allow_uids[i] == peer->uid) {
            return true;
        }
    }
    return false;
}

/* Admit a client, under the mutex. `wanted` has the fields of its seat; `most` is the listener's
   limit of clients. OK gives *out; LIMIT or NOMEM give *why. */
static vkp_status vkp_i_gate_seat(vkp_gate *gate, const vkp_seat *wanted, size_t most,
                                  vkp_seat **out, vkp_refusal *why)
{
    vkp_seat *found = NULL;
    vkp_seat *each;
    size_t of_listener = 0;
    size_t of_uid = 0;
    for (each = gate->seats; each != NULL; each = each->next) {
        bool same_uid = each->has_uid == wanted->has_uid && each->uid == wanted->uid;
        of_listener += each->listener_id == wanted->listener_id ? each->clients : 0;
        of_uid += same_uid ? each->clients : 0;
        if (same_uid && each->listener_id == wanted->listener_id) {
            found = each;
        }
    }
    *why = VKP_REFUSAL_FULL;
    if (gate->stats.clients >= gate->config.max_clients || of_listener >= most) {
        return VKP_ERR_LIMIT;
    }
    *why = VKP_REFUSAL_USER_FULL;
    if (wanted->has_uid && of_uid >= gate->config.max_clients_per_uid) {
        return VKP_ERR_LIMIT;
    }
    *why = VKP_REFUSAL_OVERLOAD;
    if (found == NULL) {
        found = (vkp_seat *)vkp_i_alloc(gate->env, sizeof *found);
        if (found == NULL) {
            return VKP_ERR_NOMEM;
        }
        *found = *wanted;
        found->gate = vkp_gate_ref(gate);
        found->next = gate->seats;
        if (found->next != NULL) {
            found->next->prev = found;
        }
        gate->seats = found;
    }
    found->clients++;
    gate->stats.clients++;
    gate->stats.admitted++;
    *out = found;
    return VKP_OK;
}

/* Count a refused client in the statistics. */
static void vkp_i_gate_count_refusal(vkp_gate *gate, vkp_refusal why)
{
    VKP_I_LOCK(&gate->mutex);
    gate->stats.refused[why]++;
    VKP_I_UNLOCK(&gate->mutex);
}

VKP_API void vkp_seat_unref(vkp_seat *seat)
{
    vkp_gate *gate;
    vkp_socket *sock;
    bool last;
    if (seat == NULL) {
        return;
    }
    gate = seat->gate;
    VKP_I_LOCK(&gate->mutex);
    sock = seat->sock;
    gate->stats.clients--;
    last = --seat->clients == 0;
    if (last) {
        if (seat->prev != NULL) {
            seat->prev->next = seat->next;
        } else {
            gate->seats = seat->next;
        }
        if (seat->next != NULL) {
            seat->next->prev = seat->prev;
        }
    }
    VKP_I_UNLOCK(&gate->mutex);
    vkp_socket_unref(sock);
    if (last) {
        vkp_i_free(gate->env, seat, sizeof *seat);
        vkp_gate_unref(gate);
    }
}

#endif /* VKP_I_IO */
