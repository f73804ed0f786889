#if VKP_I_IO
/* ======================================================================================
   >>impl-client   A client: what any thread submits
   ======================================================================================
   Any thread appends asks to `submitted` under the mutex and queues the client's task. The task
   runs on the loop's thread: commands go to the link, which writes them and finds their replies;
   calls of subscribe and unsubscribe go to the subscription table (impl-client-subscriptions).
   The mutex guards `submitted`, `queued_bytes`, `accepting`, `ended`, `task_queued`,
   `close_wanted`, `error`, and the links between asks and one-shots; every other field belongs to
   the loop's thread. Under the mutex only the loop's lock-free queue and a one-shot are used.
   Callbacks run on the loop's thread without the mutex, and any callback may close the client:
   code behind a callback checks `closed`.                                                     */

typedef enum vkp_i_ask_kind {
    VKP_I_ASK_COMMAND, /* commands of the program */
    VKP_I_ASK_WANT,    /* vkp_client_subscribe: never written, adds to an interest's `wanted` */
    VKP_I_ASK_LEAVE    /* vkp_client_unsubscribe: never written, takes from `wanted` */
} vkp_i_ask_kind;

/* What the program asked of the client. */
typedef struct vkp_i_ask {
    vkp_i_request request; /* its bytes are the commands to write; for WANT and LEAVE the name */
    vkp_client *client;    /* no reference */
    vkp_i_ask_kind kind;
    size_t cost;              /* bytes counted in client->queued_bytes, or 0 */
    vkp_oneshot *slot;        /* receives the reply, or NULL; guarded by the mutex */
    vkp_reply_fn on_reply;    /* called with the last reply, or NULL */
    vkp_subscribe_fn done;    /* called with the outcome of a WANT, or NULL */
    void *user;               /* argument of on_reply and of done */
    vkp_sub_kind sub;         /* kind of the name, for WANT and LEAVE */
    bool blocks;              /* a COMMAND for a connection of its own */
    bool waits;               /* it is WAIT or WAITAOF: about what the client wrote before */
    vkp_client_target *login; /* AUTH: the credentials to keep when it succeeds; or NULL */
    vkp_status outcome;       /* of a WANT in client->reporting */
} vkp_i_ask;

typedef struct vkp_i_probe vkp_i_probe;     /* see impl-client-probe */
typedef struct vkp_i_private vkp_i_private; /* see impl-client-private */

struct vkp_reply {
    const vkp_env *env;
    size_t refs;       /* atomic */
    size_t bytes;      /* size of this allocation */
    vkp_bytes frame;   /* the raw bytes: a copy in this allocation, or shares the read block */
    vkp_value *values; /* the tree, behind the struct */
};

#define VKP_I_OWN_BYTES 46 /* "vkp:delivery:", 32 digits and a NUL */

struct vkp_client {
    const vkp_env *env;
    vkp_loop *loop;           /* shared */
    vkp_client_config config; /* its texts and setup commands are copies */
    size_t refs;    /* atomic: one per handle, per one-shot, of the open loop, of the queued task */
    size_t users;   /* atomic: handles of the program; giving the last one back closes */
    uint32_t state; /* atomic: vkp_client_state */
    uint32_t protocol;    /* atomic: the link's protocol: 2 or 3; 0 before the first handshake */
    vkp_watch_tx *states; /* of vkp_client_state: for vkp_client_watch_state */
    VKP_I_MUTEX mutex;    /* guards the fields from `submitted` to `error`, and ask->slot */
    vkp_i_requests submitted; /* asks that the loop has not taken; guarded by the mutex */
    size_t queued_bytes;      /* cost of all incomplete commands; guarded by the mutex */
    bool accepting;           /* commands are accepted: not WAITING, or hold_ms; guarded */
    bool ended;               /* closed: every ask gets CLOSED; guarded by the mutex */
    bool task_queued;         /* `task` is queued on the loop; guarded by the mutex */
    bool close_wanted;        /* `task` closes the client; guarded by the mutex */
    bool sweep_wanted;        /* `task` looks for blocking commands that were given up; guarded */
    char error[VKP_I_LINK_ERROR_BYTES]; /* for vkp_client_get_error; guarded by the mutex */

    bool closed;             /* vkp_i_client_close_now ran */
    bool begun;              /* the first try to connect has begun */
    bool ready;              /* the link is ready: requests are written */
    bool was_ready;          /* a handshake succeeded before: the next event is RECONNECTED */
    bool failure_reported;   /* CONNECT_FAILED was emitted since the client was ready */
    bool beat_sent;          /* a heartbeat waits for its reply */
    bool counts_refused;     /* the server does not answer CLIENT INFO, or CLIENT LIST */
    bool audit_due;          /* RESP2: an audit is due that needs a probe */
    vkp_i_probe *probe;      /* a second connection with a question; NULL: none is under way */
    vkp_i_private *privates; /* connections for blocking commands, in no order */
    size_t private_count;    /* number of privates */
    vkp_i_requests waiting;  /* blocking commands that wait for one of them */
    uint64_t heartbeat_ns;   /* time of the next heartbeat */
    uint64_t delivery_ns;    /* time of the next delivery probe */
    uint64_t delivered_ns;   /* when the last message that arrived of one was published */
    uint64_t patient_ns;     /* when a probe ended last */
    size_t unsent;           /* bytes that waited to be written at the last look of the watch */
    uint32_t repaired[VKP_SUB_KINDS]; /* audits of the kind in a row that found too few */
    uint32_t ended_by_audits;         /* connections in a row for which one found too many */
    /* NULL, or called with config.user when the server answered HELLO: set by a relay. */
    void (*on_hello)(void *user, const vkp_value *hello);
    vkp_i_task task;                    /* works on `submitted`; queued by any thread */
    vkp_i_attached attached;            /* calls vkp_i_client_loop_closed */
    vkp_i_link link;                    /* the connection */
    vkp_client_target target;           /* copies: where the link connects to, and as whom */
    vkp_i_requests taken;               /* asks taken from `submitted`, not started */
    vkp_i_requests failed;              /* requests that failed and are not settled yet */
    vkp_i_requests reporting;           /* WANTs whose outcome is known and not reported yet */
    bool is_reporting;                  /* vkp_i_waiters_report runs */
    vkp_i_map interests[VKP_SUB_KINDS]; /* by vkp_sub_kind, then by name */
    size_t names_wanted;                /* number of names that the program wants */
    vkp_str own; /* channel of the delivery probe, in own_text; of no length: none */
    char own_text[VKP_I_OWN_BYTES];
    bool own_wanted;               /* the client wants it */
    size_t held;                   /* number of interests that are HELD */
    size_t live;                   /* number of interests that are not GONE */
    size_t kept;                   /* number of interests that the server has */
    size_t held_of[VKP_SUB_KINDS]; /* the same, by kind */
    size_t stuck;                  /* number of interests that are STUCK */
    size_t subs_in_flight;         /* SUBSCRIBEs and UNSUBSCRIBEs without an answer */
    uint64_t changes;              /* of states of interests */
    size_t resuming;               /* number of interests with a gap whose answer is due */
    uint64_t audited_ns;           /* when the server's counts last agreed with the table */
    uint64_t missed;               /* pushes without room in config.pushes since the last LAGGED */
    vkp_timer hold_timer;          /* ends the wait of the oldest command for a connection */
    vkp_handler *room;             /* waits for room in config.pushes; NULL: nothing is missed */
    uint32_t tries;  /* attempts to connect since the bound of the wait started again */
    vkp_timer timer; /* CONNECTING: the time limit; WAITING: the next try; READY: the watch */
    vkp_client_stats stats; /* each field atomic */
};

/* Free the copies of the setup commands, the first `count` of them. */
static void vkp_i_setup_free(const vkp_env *env, vkp_client_setup *setup, size_t count, size_t all)
{
    size_t i;
    size_t j;
    for (i = 0; i < count; i++) {
        vkp_str *argv;
        memcpy(&argv, &setup[i].argv, sizeof argv); /* the copies are not const */
        for (j = 0; j < setup[i].argc; j++) {
            vkp_i_free_str(env, argv[j]);
        }
        vkp_i_free(env, argv, setup[i].argc * sizeof *argv);
        vkp_i_free_str(env, setup[i].expect);
    }
    vkp_i_free(env, setup, all * sizeof *setup);
}

static void vkp_i_target_free(const vkp_env *env, vkp_client_target *target)
{
    vkp_i_free_str(env, target->address);
    vkp_i_free_str(env, target->username);
    vkp_i_free_str(env, target->password);
    memset(target, 0, sizeof *target);
}

/* The target of the next try: a copy of what the config says, or of what on_connect makes of it.
   False: no memory.                                                                           */
static bool vkp_i_client_aim(vkp_client *client)
{
    const vkp_client_config *config = &client->config;
    vkp_client_target target;
    target.address = config->address;
    target.username = config->username;
    target.password = config->password;
    if (config->on_connect != NULL) {
        config->on_connect(config->user, &target);
    }
    vkp_i_target_free(client->env, &client->target);
    client->target = target;
    if (!vkp_i_copy_str(client->env, &client->target.address)) {
        client->target.username.ptr = NULL; /* not copied: must not be freed */
        client->target.password.ptr = NULL;
        return false;
    }
    if (!vkp_i_copy_str(client->env, &client->target.username)) {
        client->target.password.ptr = NULL;
        return false;
    }
    return vkp_i_copy_str(client->env, &client->target.password);
}

static void vkp_i_client_free(vkp_client *client)
{
    vkp_loop *loop = client->loop;
    const vkp_env *env = client->env;
    vkp_client_setup *setup;
    int kind;
    for (kind = 0; kind < VKP_SUB_KINDS; kind++) {
        vkp_i_map_deinit(&client->interests[kind]);
    }
    vkp_i_link_deinit(&client->link);
    vkp_mpsc_tx_unref(client->config.pushes);
    vkp_resolver_unref(client->config.resolver);
    vkp_watch_tx_unref(client->states);
    VKP_I_MUTEX_DEINIT(&client->mutex);
    vkp_i_free_str(env, client->config.address);
    vkp_i_free_str(env, client->config.username);
    vkp_i_free_str(env, client->config.password);
    vkp_i_free_str(env, client->config.name);
    vkp_i_target_free(env, &client->target);
    memcpy(&setup, &client->config.setup, sizeof setup); /* the copies are not const */
    vkp_i_setup_free(env, setup, client->config.setup_count, client->config.setup_count);
    vkp_i_free(env, client, sizeof *client);
    vkp_loop_unref(loop);
}

/* Give one of `refs` back; the last one frees the client. */
static void vkp_i_client_release(vkp_client *client)
{
    if (VKP_I_UNREF(&client->refs) == 1) {
        vkp_i_client_free(client);
    }
}

VKP_API vkp_client_state vkp_client_get_state(const vkp_client *client)
{
    return (vkp_client_state)VKP_I_LOAD_ACQ(&client->state);
}

/* ---- replies ---- */

#define VKP_I_REPLY_COPY 4096u /* a frame up to this size is copied: it must not pin its block */

/* A reply with its own copy of the tree; a large frame shares its block. NULL: no memory. */
static vkp_reply *vkp_i_reply_new(const vkp_env *env, const vkp_value *value,
                                  const vkp_bytes *frame)
{
    bool copy = frame->len <= VKP_I_REPLY_COPY;
    size_t bytes = sizeof(vkp_reply) + value->span * sizeof(vkp_value) + (copy ? frame->len : 0);
    vkp_reply *reply = (vkp_reply *)vkp_i_alloc(env, bytes);
    size_t i;
    if (reply == NULL) {
        return NULL;
    }
    reply->env = env;
    reply->refs = 1;
    reply->bytes = bytes;
    reply->values = (vkp_value *)(void *)(reply + 1);
    memcpy(reply->values, value, value->span * sizeof *value);
    reply->values[0].attributes = 0; /* the attribute precedes the root: not copied */
    if (!copy) {
        reply->frame = vkp_bytes_ref(frame);
        return reply;
    }
    reply->frame = vkp_bytes_static(reply->values + value->span, frame->len);
    memcpy(reply->values + value->span, frame->data, frame->len);
    for (i = 0; i < value->span; i++) {
        vkp_value *each = &reply->values[i];
        if (each->type == VKP_RESP_STRING || each->type == VKP_RESP_ERROR ||
            each->type == VKP_RESP_BIGNUM || each->type == VKP_RESP_DOUBLE) {
            size_t offset = (size_t)((const uint8_t *)each->u.str - frame->data);
            each->u.str = (const char *)reply->frame.data + offset;
        }
    }
    return reply;
}

VKP_API const vkp_value *vkp_reply_get_value(const vkp_reply *reply)
{
    return reply->values;
}

VKP_API vkp_bytes vkp_reply_get_frame(const vkp_reply *reply)
{
    return reply->frame;
}

VKP_API vkp_reply *vkp_reply_ref(vkp_reply *reply)
{
    (void)VKP_I_ADD(&reply->refs, 1);
    return reply;
}

VKP_API void vkp_reply_unref(vkp_reply *reply)
{
    if (reply != NULL && VKP_I_UNREF(&reply->refs) == 1) {
        vkp_bytes_unref(&reply->frame);
        vkp_i_free(reply->env, reply, reply->bytes);
    }
}

static void vkp_i_drop_reply(void *user, void *item)
{
    (void)user;
    vkp_reply_unref(*(vkp_reply **)item);
}

/* Count one more of a counter of vkp_client_stats. */
#define VKP_I_COUNT(client, counter) ((void)VKP_I_ADD(&(client)->stats.counter, (uint64_t)1))

/* ---- asks ---- */

static void vkp_i_ask_settled(vkp_i_request *request, vkp_status status, const vkp_value *value,
                              const vkp_bytes *frame);

static vkp_i_ask *vkp_i_ask_new(vkp_client *client, vkp_i_ask_kind kind)
{
    vkp_i_ask *ask = (vkp_i_ask *)vkp_i_alloc_zero(client->env, sizeof *ask);
    if (ask != NULL) {
        ask->request.due = 1;
        ask->request.settle = vkp_i_ask_settled;
        ask->client = client;
        ask->kind = kind;
    }
    return ask;
}

/* Free the credentials of an AUTH; NULL is ignored. */
static void vkp_i_login_free(const vkp_env *env, vkp_client_target *login)
{
    if (login != NULL) {
        vkp_i_target_free(env, login);
        vkp_i_free(env, login, sizeof *login);
    }
}

/* The credentials that an AUTH keeps. NULL: no memory. */
static vkp_client_target *vkp_i_login_new(const vkp_env *env, vkp_str username, vkp_str password)
{
    vkp_client_target *login = (vkp_client_target *)vkp_i_alloc_zero(env, sizeof *login);
    if (login == NULL) {
        return NULL;
    }
    login->username = username;
    login->password = password;
    if (!vkp_i_copy_str(env, &login->username)) {
        login->password.ptr = NULL; /* not copied: must not be freed */
    } else if (vkp_i_copy_str(env, &login->password)) {
        return login;
    }
    vkp_i_login_free(env, login);
    return NULL;
}

static void vkp_i_ask_free(vkp_i_ask *ask)
{
    vkp_i_login_free(ask->client->env, ask->login);
    vkp_bytes_unref(&ask->request.bytes);
    vkp_i_free(ask->client->env, ask, sizeof *ask);
}

/* Hand the reply to the one-shot of the ask, or end the one-shot when there is none. */
static void vkp_i_ask_answer_slot(vkp_i_ask *ask, vkp_reply *reply)
{
    vkp_client *client = ask->client;
    vkp_oneshot *slot;
    bool ended = false;
    VKP_I_LOCK(&client->mutex);
    slot = ask->slot;
    ask->slot = NULL;
    if (slot != NULL) {
        slot->i_owner = NULL; /* before the send: its receiver may free the slot */
        if (reply == NULL) {
            ended = vkp_i_oneshot_end(slot, VKP_I_LOAD_ACQ(&slot->i_state), VKP_I_SLOT_ABANDONED);
        } else if (vkp_oneshot_send(slot, (const void *)&reply) == VKP_OK) {
            reply = NULL;
            ended = true;
        }
    }
    VKP_I_UNLOCK(&client->mutex);
    vkp_reply_unref(reply);
    if (ended) {
        vkp_i_client_release(client); /* the one-shot's reference; the caller holds another */
    }
}

/* Report the outcome of a WANT, and free it. words are the server's, or the reason. */
static void vkp_i_ask_report(vkp_i_ask *ask, vkp_status status, vkp_str words)
{
    if (ask->done != NULL) {
        ask->done(ask->user, status, words);
    }
    vkp_i_ask_free(ask);
}

/* AUTH succeeded: later connections log in with these credentials. */
static void vkp_i_ask_keep_login(vkp_i_ask *ask)
{
    vkp_client_config *config = &ask->client->config;
    vkp_client_target old = *ask->login;
    ask->login->username = config->username; /* freed with the ask */
    ask->login->password = config->password;
    config->username = old.username;
    config->password = old.password;
}

/* The end of an ask: answer its callback or its one-shot, and free it. */
static void vkp_i_ask_settled(vkp_i_request *request, vkp_status status, const vkp_value *value,
                              const vkp_bytes *frame)
{
    vkp_i_ask *ask = VKP_CONTAINER(request, vkp_i_ask, request);
    vkp_client *client = ask->client;
    if (ask->cost > 0) { /* before the callbacks: they may submit again */
        VKP_I_LOCK(&client->mutex);
        client->queued_bytes -= ask->cost;
        VKP_I_UNLOCK(&client->mutex);
    }
    if (ask->kind != VKP_I_ASK_COMMAND) {
        vkp_i_ask_report(ask, status, vkp_str_of(client->link.error));
        return;
    }
    if (ask->login != NULL && status == VKP_OK && value->type != VKP_RESP_ERROR) {
        vkp_i_ask_keep_login(ask);
    }
    if (ask->on_reply != NULL) {
        ask->on_reply(ask->user, status, value, frame);
    } else {
        vkp_i_ask_answer_slot(ask,
                              status == VKP_OK ? vkp_i_reply_new(client->env, value, frame) : NULL);
    }
    vkp_i_ask_free(ask);
}

/* ---- submitting, from any thread ---- */

/* Queue the client's task, unless it is queued. The mutex is held. */
static void vkp_i_client_schedule(vkp_client *client)
{
    if (!client->task_queued) {
        client->task_queued = true;
        (void)VKP_I_ADD(&client->refs, 1);
        if (!vkp_i_loop_queue(client->loop, &client->task)) {
            client->task_queued = false;
            (void)VKP_I_SUB(&client->refs, 1); /* not the last: the caller holds one */
        }
    }
}

/* The receiver closed its one-shot: unlink it from the ask. A one-shot holds a reference of
   the client until it is detached or has its value.                                           */
static void vkp_i_ask_detach(vkp_oneshot *slot)
{
    vkp_client *client = (vkp_client *)slot->i_user;
    VKP_I_LOCK(&client->mutex);
    if (slot->i_owner != NULL) {
        vkp_i_ask *ask = (vkp_i_ask *)slot->i_owner;
        ask->slot = NULL;
        slot->i_owner = NULL;
        if (ask->blocks) {
            client->sweep_wanted = true;
            vkp_i_client_schedule(client);
        }
    }
    VKP_I_UNLOCK(&client->mutex);
    vkp_i_client_release(client);
}

/* Append an ask to `submitted`. On failure (CLOSED, DISCONNECTED, FULL) it stays the
   caller's.                                                                                   */
static vkp_status vkp_i_client_submit(vkp_client *client, vkp_i_ask *ask)
{
    bool interest = ask->kind != VKP_I_ASK_COMMAND;
    vkp_status status = VKP_OK;
    VKP_I_LOCK(&client->mutex);
    if (client->ended) {
        status = VKP_ERR_CLOSED;
    } else if (!interest && !client->accepting) {
        status = VKP_ERR_DISCONNECTED;
    } else if (client->queued_bytes > 0 &&
               ask->cost > client->config.queue_bytes -
                               VKP_I_MIN(client->queued_bytes, client->config.queue_bytes)) {
        status = VKP_ERR_FULL;
    } else {
        client->queued_bytes += ask->cost;
        if (client->config.hold_ms > 0) {
            ask->request.sent_ns = vkp_i_loop_clock(client->loop);
        }
        vkp_i_requests_append(&client->submitted, &ask->request);
        vkp_i_client_schedule(client);
    }
    VKP_I_UNLOCK(&client->mutex);
    return status;
}

/* Submit an ask, or free it on failure. */
static vkp_status vkp_i_client_submit_or_free(vkp_client *client, vkp_i_ask *ask)
{
    vkp_status status = vkp_i_client_submit(client, ask);
    if (status != VKP_OK) {
        vkp_i_ask_free(ask);
    }
    return status;
}

/* vkp_client_send. unread: on_reply gets the frame of the last reply, and NULL as its value, unless
   an attribute is before it.                                                                  */
static vkp_status vkp_i_client_send(vkp_client *client, const vkp_bytes *commands, uint32_t replies,
                                    bool unread, vkp_reply_fn on_reply, void *user)
{
    vkp_i_ask *ask = vkp_i_ask_new(client, VKP_I_ASK_COMMAND);
    if (ask == NULL) {
        return VKP_ERR_NOMEM;
    }
    ask->request.due = replies;
    ask->request.unread = unread;
    ask->on_reply = on_reply;
    ask->user = user;
    ask->request.bytes = vkp_bytes_ref(commands);
    ask->cost = sizeof *ask + commands->len;
    return vkp_i_client_submit_or_free(client, ask);
}

VKP_API vkp_status vkp_client_send(vkp_client *client, const vkp_bytes *commands, uint32_t replies,
                                   vkp_reply_fn on_reply, void *user)
{
    VKP_I_REQUIRE(client != NULL && commands != NULL && commands->len > 0 && replies > 0);
    VKP_I_REQUIRE(on_reply != NULL);
    return vkp_i_client_send(client, commands, replies, false, on_reply, user);
}

/* Submit one command whose reply the one-shot receives. Takes the command and login, which may be
   NULL, on failure too. */
static vkp_status vkp_i_client_submit_command(vkp_client *client, vkp_oneshot *slot,
                                              vkp_bytes *command, bool blocks, bool waits,
                                              vkp_client_target *login)
{
    vkp_i_ask *ask = vkp_i_ask_new(client, VKP_I_ASK_COMMAND);
    vkp_status status;
    if (ask == NULL) {
        vkp_bytes_unref(command);
        vkp_i_login_free(client->env, login);
        return VKP_ERR_NOMEM;
    }
    ask->request.bytes = *command;
    ask->login = login;
    ask->cost = sizeof *ask + ask->request.bytes.len;
    ask->blocks = blocks;
    ask->waits = waits;
    ask->slot = slot;
    slot->i_owner = ask;
    slot->i_detach = vkp_i_ask_detach;
    /* Given back when the one-shot is detached or the request completes. */
    (void)VKP_I_ADD(&client->refs, 1);
    status = vkp_i_client_submit_or_free(client, ask);
    if (status != VKP_OK) {
        slot->i_owner = NULL;
        slot->i_detach = NULL;
        (void)VKP_I_UNREF(&client->refs); /* the caller's own reference remains */
    }
    return status;
}

/* Submit the command in the writer; the one-shot, which is initialised here, receives the reply.
   argv are its arguments, or the first ones. */
static vkp_status vkp_i_client_ask_written(vkp_client *client, vkp_oneshot *slot,
                                           vkp_resp_writer *writer, size_t argc,
                                           const vkp_str *argv)
{
    vkp_i_sharing sharing;
    bool blocks;
    vkp_bytes command;
    vkp_status status =
        vkp_oneshot_init(slot, client->env, sizeof(vkp_reply *), vkp_i_drop_reply, client);
    if (status != VKP_OK) {
        vkp_resp_writer_deinit(writer);
        return status;
    }
    status = vkp_resp_writer_take(writer, &command);
    if (status == VKP_OK) {
        sharing = argc > 0 ? vkp_i_command_get_sharing(argc, argv) : VKP_I_SHARING_OK;
        blocks = sharing == VKP_I_SHARING_BLOCKS;
        if (sharing == VKP_I_SHARING_CHANGES || (blocks && client->config.private_max == 0)) {
            vkp_bytes_unref(&command);
            status = VKP_ERR_REFUSED;
        } else {
            status = vkp_i_client_submit_command(client, slot, &command, blocks,
                                                 vkp_i_command_is_wait(argc, argv), NULL);
        }
    }
    if (status != VKP_OK) {
        vkp_oneshot_abandon(slot); /* a receiver that waits on it gets CLOSED */
    }
    return status;
}

VKP_API vkp_status vkp_client_command_argv(vkp_client *client, vkp_oneshot *slot, size_t argc,
                                           const vkp_str *argv)
{
    vkp_resp_writer writer;
    VKP_I_REQUIRE(client != NULL && slot != NULL && argc > 0 && argv != NULL);
    vkp_resp_writer_init(&writer, client->env);
    vkp_i_put_command(&writer, argc, argv);
    return vkp_i_client_ask_written(client, slot, &writer, argc, argv);
}

VKP_API vkp_status vkp_client_authenticate(vkp_client *client, vkp_oneshot *slot, vkp_str username,
                                           vkp_str password)
{
    vkp_resp_writer writer;
    vkp_bytes command;
    vkp_client_target *login;
    vkp_str argv[3];
    vkp_status status;
    VKP_I_REQUIRE(client != NULL && slot != NULL && password.ptr != NULL);
    status = vkp_oneshot_init(slot, client->env, sizeof(vkp_reply *), vkp_i_drop_reply, client);
    if (status != VKP_OK) {
        return status;
    }
    vkp_resp_writer_init(&writer, client->env);
    vkp_i_put_command(&writer, vkp_i_auth_words(username, password, argv), argv);
    login = vkp_i_login_new(client->env, username, password);
    status = vkp_resp_writer_take(&writer, &command);
    if (status == VKP_OK && login != NULL) {
        status = vkp_i_client_submit_command(client, slot, &command, false, false, login);
    } else {
        vkp_i_login_free(client->env, login);
        if (status == VKP_OK) {
            vkp_bytes_unref(&command);
            status = VKP_ERR_NOMEM;
        }
    }
    if (status != VKP_OK) {
        vkp_oneshot_abandon(slot);
    }
    return status;
}

#define VKP_I_COMMAND_ARGS 64 /* most arguments of vkp_client_command */

/* The first arguments of a whole command, at most VKP_I_COMMAND_ARGS; returns how many. */
static size_t vkp_i_command_parse(const vkp_resp_writer *writer, vkp_str *argv)
{
    const uint8_t *data = writer->i_block != NULL ? vkp_i_block_data(writer->i_block) : NULL;
    uint64_t count = 0;
    size_t seen = 0;
    size_t at = data != NULL ? vkp_i_skip_head(data, writer->i_len, 0, &seen, &count) : 0;
    size_t argc = 0;
    while (at > 0 && argc < count && argc < VKP_I_COMMAND_ARGS) {
        uint64_t none;
        size_t end;
        const uint8_t *text;
        seen = 0;
        end = vkp_i_skip_head(data, writer->i_len, at, &seen, &none);
        if (end == 0) {
            break;
        }
        text = (const uint8_t *)memchr(data + at, '\n', end - at) + 1;
        argv[argc++] = vkp_i_str(text, (size_t)(data + end - 2 - text));
        at = end;
    }
    return argc;
}

VKP_API vkp_status vkp_client_vcommandf(vkp_client *client, vkp_oneshot *slot, const char *format,
                                        va_list arguments)
{
    vkp_resp_writer writer;
    vkp_str argv[VKP_I_COMMAND_ARGS];
    VKP_I_REQUIRE(client != NULL && slot != NULL && format != NULL);
    vkp_resp_writer_init(&writer, client->env);
    vkp_resp_put_vcommandf(&writer, format, arguments);
    return vkp_i_client_ask_written(client, slot, &writer, vkp_i_command_parse(&writer, argv),
                                    argv);
}

VKP_API vkp_status vkp_client_commandf(vkp_client *client, vkp_oneshot *slot, const char *format,
                                       ...)
{
    vkp_status status;
    va_list arguments;
    va_start(arguments, format);
    status = vkp_client_vcommandf(client, slot, format, arguments);
    va_end(arguments);
    return status;
}

VKP_API vkp_status vkp_client_command(vkp_client *client, vkp_oneshot *slot, ...)
{
    vkp_str argv[VKP_I_COMMAND_ARGS];
    size_t argc = 0;
    const char *text;
    va_list arguments;
    va_start(arguments, slot);
    while ((text = va_arg(arguments, const char *)) != NULL && argc < VKP_I_COMMAND_ARGS) {
        argv[argc++] = vkp_str_of(text);
    }
    va_end(arguments);
    return text != NULL ? VKP_ERR_LIMIT : vkp_client_command_argv(client, slot, argc, argv);
}

/* Submit a WANT or a LEAVE of a name. */
static vkp_status vkp_i_client_interest(vkp_client *client, vkp_i_ask_kind kind, vkp_sub_kind sub,
                                        vkp_str name, vkp_subscribe_fn done, void *user)
{
    vkp_i_ask *ask;
    vkp_status status;
    VKP_I_REQUIRE(client != NULL && (unsigned)sub < VKP_SUB_KINDS &&
                  (name.ptr != NULL || name.len == 0));
    ask = vkp_i_ask_new(client, kind);
    if (ask == NULL) {
        return VKP_ERR_NOMEM;
    }
    status = vkp_bytes_copy(client->env, name.ptr, name.len, &ask->request.bytes);
    if (status != VKP_OK) {
        vkp_i_free(client->env, ask, sizeof *ask);
        return status;
    }
    ask->sub = sub;
    ask->done = done;
    ask->user = user;
    return vkp_i_client_submit_or_free(client, ask);
}

VKP_API vkp_status vkp_client_subscribe(vkp_client *client, vkp_sub_kind kind, vkp_str name)
{
    return vkp_i_client_interest(client, VKP_I_ASK_WANT, kind, name, NULL, NULL);
}

VKP_API vkp_status vkp_client_subscribe_then(vkp_client *client, vkp_sub_kind kind, vkp_str name,
                                             vkp_subscribe_fn done, void *user)
{
    VKP_I_REQUIRE(done != NULL);
    return vkp_i_client_interest(client, VKP_I_ASK_WANT, kind, name, done, user);
}

VKP_API vkp_status vkp_client_unsubscribe(vkp_client *client, vkp_sub_kind kind, vkp_str name)
{
    return vkp_i_client_interest(client, VKP_I_ASK_LEAVE, kind, name, NULL, NULL);
}

/* For the layers above: what another connection to the same server needs, in this protocol. The
   texts are the client's.                                                                     */
static void vkp_i_client_copy_config(const vkp_client *client, int protocol,
                                     vkp_client_config *config)
{
    *config = client->config;
    config->protocol = protocol;
    config->name = vkp_i_str(NULL, 0);
    config->on_push = NULL;
    config->pushes = NULL;
}

#endif /* VKP_I_IO */
