#if VKP_I_IO
/* ======================================================================================
   >>impl-relay-errand   Relay: what one local client does to another
   ======================================================================================
   CLIENT KILL ID and CLIENT UNBLOCK. A client is known by the number that CLIENT ID says: the
   relay's, or a server's. An errand goes with it from loop to loop, as a task, while who asked is
   paused (VKP_I_LOCAL_BUSY), and returns to that client's loop with the answer:
     a local client's number        killed where it is; what blocks it is ended by the server, which
                                    knows its connection by another number
     a connection of the relay      there is no such client, for those of the relay
     another one                    the server answers                                         */

typedef struct vkp_i_errand {
    vkp_i_task task;
    vkp_i_local *asker; /* one reference */
    uint64_t id;        /* of whom it is about */
    bool unblocks;      /* UNBLOCK; otherwise KILL */
    bool with_error;    /* UNBLOCK: ERROR; otherwise TIMEOUT */
    bool spares_asker;  /* KILL: SKIPME yes */
    bool forwards;      /* the server answers */
    size_t next;        /* the shard to look at */
    int64_t count;      /* the answer */
    bool kills_asker;   /* behind the answer */
    vkp_bytes words;    /* an error of the server, in place of the answer */
    void (*forward)(vkp_i_local *local, size_t argc, const vkp_str *argv);
} vkp_i_errand;

/* Go on at a loop: in a task, or here if this is the loop or it is closed. */
static void vkp_i_errand_go(vkp_i_errand *self, vkp_loop *loop, void (*fn)(vkp_i_task *task))
{
    self->task.fn = fn;
    if (vkp_i_on_loop(loop) || !vkp_i_loop_queue(loop, &self->task)) {
        fn(&self->task);
    }
}

/* Write CLIENT KILL or CLIENT UNBLOCK for a number, which digits holds. Returns the number of
   arguments. */
static size_t vkp_i_errand_words(const vkp_i_errand *self, uint64_t id, char *digits, vkp_str *argv)
{
    size_t from = vkp_i_format_u64(digits, id);
    size_t argc = 0;
    argv[argc++] = vkp_str_of("CLIENT");
    argv[argc++] = vkp_str_of(self->unblocks ? "UNBLOCK" : "KILL");
    if (!self->unblocks) {
        argv[argc++] = vkp_str_of("ID");
    }
    argv[argc++] = vkp_i_str(digits + from, VKP_I_DIGITS - from);
    if (self->with_error) {
        argv[argc++] = vkp_str_of("ERROR");
    }
    return argc;
}

/* The asker's loop: answer. */
static void vkp_i_errand_return(vkp_i_task *task)
{
    vkp_i_errand *self = VKP_CONTAINER(task, vkp_i_errand, task);
    vkp_i_local *local = self->asker;
    const vkp_env *env = local->shard->relay->env;
    vkp_resp_writer writer;
    char digits[VKP_I_DIGITS];
    vkp_str argv[5];
    bool closed = (local->flags & VKP_I_LOCAL_CLOSED) != 0;
    local->flags &= ~VKP_I_LOCAL_BUSY;
    if (!closed && self->forwards) {
        self->forward(local, vkp_i_errand_words(self, self->id, digits, argv), argv);
    } else if (!closed) {
        vkp_resp_writer_init(&writer, env);
        if (self->words.len > 0) {
            vkp_resp_put_error(&writer, vkp_i_str(self->words.data, self->words.len));
        } else {
            vkp_resp_put_integer(&writer, self->count);
        }
        vkp_i_local_answer_writer(local, &writer);
        if (self->kills_asker) {
            vkp_i_local_pause(local, VKP_I_LOCAL_FAILED); /* nothing else of it is read */
        }
    }
    vkp_i_local_maybe_resume(local);
    vkp_bytes_unref(&self->words);
    vkp_i_free(env, self, sizeof *self);
    vkp_i_local_release(local);
}

static void vkp_i_errand_go_home(vkp_i_errand *self)
{
    vkp_i_errand_go(self, self->asker->shard->loop, vkp_i_errand_return);
}

/* Loop 0: the server has answered CLIENT UNBLOCK. */
static void vkp_i_errand_unblocked(void *user, vkp_status status, const vkp_value *value,
                                   const vkp_bytes *frame)
{
    vkp_i_errand *self = (vkp_i_errand *)user;
    vkp_str words = status == VKP_OK ? vkp_value_get_str(value) : vkp_i_str(NULL, 0);
    (void)frame;
    if (status == VKP_OK && value->type == VKP_RESP_INTEGER) {
        self->count = value->u.integer;
    } else if (status == VKP_OK && value->type == VKP_RESP_ERROR) { /* without memory: 0 */
        (void)!vkp_bytes_copy(self->asker->shard->relay->env, words.ptr, words.len, &self->words);
    }
    vkp_i_errand_go_home(self);
}

/* End what blocks the local client, if something does. */
static void vkp_i_errand_unblock(vkp_i_errand *self, const vkp_i_local *local)
{
    vkp_relay *relay = local->shard->relay;
    const vkp_i_session *session = local->session;
    char digits[VKP_I_DIGITS];
    vkp_str argv[5];
    vkp_resp_writer writer;
    vkp_bytes command = VKP_ZERO;
    size_t argc;
    vkp_status status = VKP_ERR_CLOSED;
    if (session != NULL && session->blocking > 0 && session->link.id > 0) {
        argc = vkp_i_errand_words(self, (uint64_t)session->link.id, digits, argv);
        vkp_resp_writer_init(&writer, relay->env);
        vkp_i_put_command(&writer, argc, argv);
        status = vkp_resp_writer_take(&writer, &command);
        if (status == VKP_OK) {
            status = vkp_client_send(relay->shared[0], &command, 1, vkp_i_errand_unblocked, self);
            vkp_bytes_unref(&command);
        }
    }
    if (status != VKP_OK) {
        vkp_i_errand_go_home(self); /* nothing blocks it, or the server cannot be asked */
    }
}

/* Whether one of the relay's own connections, as far as this loop has them, has the number. */
static bool vkp_i_shard_has_connection(vkp_i_shard *shard, uint64_t id)
{
    vkp_relay *relay = shard->relay;
    const vkp_i_session *session;
    const vkp_i_local *local;
    size_t i;
    if (shard == &relay->shards[0] && vkp_i_relay_has_server(relay)) {
        bool found = (uint64_t)relay->push->link.id == id;
        for (i = 0; i < relay->shared_count; i++) {
            found = found || (uint64_t)relay->shared[i]->link.id == id;
        }
        if (found) {
            return true;
        }
    }
    for (session = shard->pool; session != NULL; session = session->next) {
        if ((uint64_t)session->link.id == id) {
            return true;
        }
    }
    for (local = shard->locals; local != NULL; local = local->next) {
        if (local->session != NULL && (uint64_t)local->session->link.id == id) {
            return true;
        }
    }
    return false;
}

/* Look at one shard; the loop of that shard. */
static void vkp_i_errand_visit(vkp_i_task *task)
{
    vkp_i_errand *self = VKP_CONTAINER(task, vkp_i_errand, task);
    vkp_relay *relay = self->asker->shard->relay;
    vkp_i_shard *shard = &relay->shards[self->next++];
    vkp_i_local *local = shard->locals;
    bool found;
    while (local != NULL && VKP_I_FIRST_ID + local->id != self->id) {
        local = local->next;
    }
    found = local != NULL || vkp_i_shard_has_connection(shard, self->id);
    if (local != NULL && self->unblocks) {
        vkp_i_errand_unblock(self, local);
        return;
    }
    if (local != NULL && local == self->asker) {
        self->kills_asker = !self->spares_asker;
        self->count = self->kills_asker ? 1 : 0;
    } else if (local != NULL) {
        self->count = 1;
        vkp_conn_close(local->member.conn);
    }
    if (!found && self->next < relay->shard_count) {
        vkp_i_errand_go(self, relay->shards[self->next].loop, vkp_i_errand_visit);
        return;
    }
    self->forwards = !found && self->id < VKP_I_FIRST_ID && vkp_i_relay_has_server(relay);
    vkp_i_errand_go_home(self);
}

/* Read a client's number. False: it is none. */
static bool vkp_i_read_id(vkp_str text, uint64_t *id)
{
    size_t i;
    *id = 0;
    for (i = 0; i < text.len && i < 18 && text.ptr[i] >= '0' && text.ptr[i] <= '9'; i++) {
        *id = *id * 10 + (uint64_t)(text.ptr[i] - '0');
    }
    return i > 0 && i == text.len && *id > 0;
}

/* Read the arguments of CLIENT KILL or CLIENT UNBLOCK. False: not a form that names one client by
   its number. */
static bool vkp_i_errand_read(size_t argc, const vkp_str *argv, vkp_i_errand *out)
{
    bool unblocks = argc > 1 && vkp_i_str_is(argv[1], "UNBLOCK");
    size_t at = unblocks ? 2 : 3;
    out->unblocks = unblocks;
    out->spares_asker = true;
    if (argc < at + 1 ||
        !(unblocks || (vkp_i_str_is(argv[1], "KILL") && vkp_i_str_is(argv[2], "ID"))) ||
        !vkp_i_read_id(argv[at], &out->id)) {
        return false;
    }
    if (unblocks && argc == 4) {
        out->with_error = vkp_i_str_is(argv[3], "ERROR");
        return out->with_error || vkp_i_str_is(argv[3], "TIMEOUT");
    }
    if (!unblocks && argc == 6) {
        out->spares_asker = vkp_i_str_is(argv[5], "YES");
        return vkp_i_str_is(argv[4], "SKIPME") &&
               (out->spares_asker || vkp_i_str_is(argv[5], "NO"));
    }
    return argc == at + 1;
}

/* Whether CLIENT's arguments name one client by its number, for KILL or UNBLOCK. */
static bool vkp_i_errand_is_one(size_t argc, const vkp_str *argv)
{
    vkp_i_errand form = VKP_ZERO;
    return vkp_i_errand_read(argc, argv, &form);
}

/* Whether CLIENT KILL names clients otherwise than by a number: connections of the relay have
   addresses, users and types, too. */
static bool vkp_i_kill_is_wide(size_t argc, const vkp_str *argv)
{
    return argc > 2 && vkp_i_str_is(argv[0], "CLIENT") && vkp_i_str_is(argv[1], "KILL") &&
           !(argc > 3 && vkp_i_str_is(argv[2], "ID") &&
             (argc == 4 || vkp_i_errand_is_one(argc, argv)));
}

/* Carry out CLIENT KILL or CLIENT UNBLOCK; the arguments are such that vkp_i_errand_read takes
   them. forward: sends a command of the client to the server. */
static void vkp_i_local_send_errand(vkp_i_local *local, size_t argc, const vkp_str *argv,
                                    void (*forward)(vkp_i_local *local, size_t argc,
                                                    const vkp_str *argv))
{
    vkp_relay *relay = local->shard->relay;
    vkp_i_errand *self = (vkp_i_errand *)vkp_i_alloc_zero(relay->env, sizeof *self);
    if (self == NULL) {
        vkp_i_local_fail(local);
        return;
    }
    (void)vkp_i_errand_read(argc, argv, self);
    self->asker = local;
    self->forward = forward;
    local->refs++;
    vkp_i_local_pause(local, VKP_I_LOCAL_BUSY);
    vkp_i_errand_go(self, relay->shards[0].loop, vkp_i_errand_visit);
}

#endif /* VKP_I_IO */
