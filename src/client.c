#if VKP_I_IO
/* ======================================================================================
   >>impl-client   A connection to a server, shared by many threads
   ======================================================================================
   Other threads append requests to `submitted` under the mutex and queue one task; the loop takes
   the list, writes each request's bytes and moves it to `flight`, the requests whose replies are
   still to come, in order. Each reply settles the oldest one. A SUBSCRIBE has no reply but one
   push, in its place among the replies: it settles the same way, by name.
   `submitted`, `queued_bytes`, `accepting`, the one-shots' links and `error` are guarded by the
   mutex; everything else is the loop's. Callbacks run without the lock, and any of them may
   close the client: whoever calls one looks at `closed` afterwards.                           */

typedef enum vkp_i_request_kind {
    VKP_I_REQUEST_COMMAND,
    VKP_I_REQUEST_HELLO,
    VKP_I_REQUEST_LOGIN, /* RESP2: AUTH */
    VKP_I_REQUEST_NAME,  /* RESP2: CLIENT SETNAME, whose answer does not matter */
    VKP_I_REQUEST_PING,
    VKP_I_REQUEST_SUBSCRIBE,
    VKP_I_REQUEST_UNSUBSCRIBE,
    VKP_I_REQUEST_WANT, /* submitted only: one interest more */
    VKP_I_REQUEST_LEAVE /* submitted only: one less */
} vkp_i_request_kind;

typedef struct vkp_i_request {
    struct vkp_i_request *next;
    vkp_client *client;
    vkp_i_request_kind kind;
    uint32_t replies; /* still to come */
    size_t cost;
    vkp_bytes bytes;   /* what to write; of WANT and LEAVE the name */
    vkp_oneshot *slot; /* guarded by the mutex */
    vkp_reply_fn on_reply;
    void (*done)(void *user, vkp_status status);
    void *user;
    vkp_sub_kind sub;
    struct vkp_i_interest *interest; /* of SUBSCRIBE and UNSUBSCRIBE */
} vkp_i_request;

typedef struct vkp_i_requests {
    vkp_i_request *first;
    vkp_i_request **end;
} vkp_i_requests;

/* A name that somebody wants, or that is still on its way out. */
typedef struct vkp_i_interest {
    vkp_i_map_node node;
    vkp_sub_kind kind;
    size_t wanted;          /* calls of subscribe not taken back */
    size_t in_flight;       /* SUBSCRIBE and UNSUBSCRIBE not settled */
    bool subscribed;        /* what the last command sent asks for */
    bool confirmed;         /* the server said so */
    bool resuming;          /* after an outage: GAP waits for it */
    vkp_i_requests waiters; /* WANTs to be told */
} vkp_i_interest;           /* its name is behind the struct */

struct vkp_reply {
    const vkp_env *env;
    size_t refs;  /* atomic */
    size_t bytes; /* of this allocation */
    vkp_bytes frame;
    vkp_value *values;
};

struct vkp_client {
    const vkp_env *env;
    vkp_loop *loop;
    vkp_client_config config; /* texts are copies */
    size_t refs;              /* atomic: users, the loop while open, the queued task */
    size_t users;             /* atomic: the last one closes */
    uint32_t state;           /* atomic: vkp_client_state */
    uint32_t protocol;        /* atomic */
    VKP_I_MUTEX mutex;
    vkp_i_requests submitted;
    size_t queued_bytes;
    bool accepting; /* commands */
    bool ended;     /* nothing at all */
    bool task_queued;
    bool close_wanted;
    char error[128];

    bool closed;
    bool ready;
    bool outage;   /* DISCONNECTED was told, RECONNECTED was not */
    bool gap_open; /* since lost_ns, until GAP is told */
    bool was_ready;
    bool falling_back;
    bool ping_sent;
    vkp_i_task task;
    vkp_i_attached attached;
    vkp_conn *conn;
    vkp_resp_reader *reader;
    vkp_block *out; /* small commands are gathered here: one range to write */
    vkp_i_requests flight;
    vkp_i_requests taken;  /* from submitted, next in turn */
    vkp_i_requests failed; /* their end is not told yet */
    vkp_i_map interests[VKP_SUB_KINDS];
    size_t confirmed; /* interests that are */
    size_t resuming;
    uint64_t lost_ns;
    uint64_t heard_ns;
    uint64_t missed;
    uint32_t tries;
    vkp_timer timer; /* connecting: the limit; waiting: the next try; ready: the heartbeat */
};

static void vkp_i_client_free(vkp_client *client)
{
    vkp_loop *loop = client->loop;
    const vkp_env *env = client->env;
    int kind;
    for (kind = 0; kind < VKP_SUB_KINDS; kind++) {
        vkp_i_map_deinit(&client->interests[kind]);
    }
    vkp_resp_reader_unref(client->reader);
    vkp_i_block_unref(client->out);
    vkp_mpsc_tx_unref(client->config.pushes);
    VKP_I_MUTEX_DEINIT(&client->mutex);
    vkp_i_free_str(env, client->config.address);
    vkp_i_free_str(env, client->config.username);
    vkp_i_free_str(env, client->config.password);
    vkp_i_free_str(env, client->config.name);
    vkp_i_free(env, client, sizeof *client);
    vkp_loop_unref(loop);
}

static void vkp_i_client_release(vkp_client *client)
{
    if (VKP_I_UNREF(&client->refs) == 1) {
        vkp_i_client_free(client);
    }
}

/* ---- replies ---- */

#define VKP_I_REPLY_COPY 4096u /* a smaller frame is copied: it must not pin its read block */

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
    reply->values[0].attributes = 0; /* stands before the root: not copied */
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

/* ---- lists of requests ---- */

static void vkp_i_requests_init(vkp_i_requests *list)
{
    list->first = NULL;
    list->end = &list->first;
}

static void vkp_i_requests_append(vkp_i_requests *list, vkp_i_request *request)
{
    request->next = NULL;
    *list->end = request;
    list->end = &request->next;
}

static vkp_i_request *vkp_i_requests_pop(vkp_i_requests *list)
{
    vkp_i_request *first = list->first;
    if (first != NULL) {
        list->first = first->next;
        if (list->first == NULL) {
            list->end = &list->first;
        }
    }
    return first;
}

static void vkp_i_requests_move(vkp_i_requests *from, vkp_i_requests *to)
{
    vkp_i_request *request;
    while ((request = vkp_i_requests_pop(from)) != NULL) {
        vkp_i_requests_append(to, request);
    }
}

static vkp_i_request *vkp_i_request_new(vkp_client *client, vkp_i_request_kind kind)
{
    vkp_i_request *request = (vkp_i_request *)vkp_i_alloc_zero(client->env, sizeof *request);
    if (request != NULL) {
        request->client = client;
        request->kind = kind;
        request->replies = 1;
    }
    return request;
}

static void vkp_i_request_free(vkp_i_request *request)
{
    vkp_bytes_unref(&request->bytes);
    vkp_i_free(request->client->env, request, sizeof *request);
}

/* Tell the outcome of a command, then free it. value NULL unless status is OK. */
static void vkp_i_request_complete(vkp_i_request *request, vkp_status status,
                                   const vkp_value *value, const vkp_bytes *frame)
{
    vkp_client *client = request->client;
    vkp_oneshot *slot;
    if (request->cost > 0) { /* before anybody is told: who is may ask again */
        VKP_I_LOCK(&client->mutex);
        client->queued_bytes -= request->cost;
        VKP_I_UNLOCK(&client->mutex);
    }
    if (request->on_reply != NULL) {
        request->on_reply(request->user, status, value, frame);
    }
    if (request->done != NULL) {
        request->done(request->user, status);
    }
    if (request->kind == VKP_I_REQUEST_COMMAND && request->on_reply == NULL) {
        vkp_reply *reply = status == VKP_OK ? vkp_i_reply_new(client->env, value, frame) : NULL;
        bool ended = false;
        VKP_I_LOCK(&client->mutex);
        slot = request->slot;
        request->slot = NULL;
        if (slot != NULL) {
            slot->i_owner = NULL; /* before the send: the slot may be gone after it */
            if (reply == NULL) {
                ended = vkp_i_oneshot_finish(slot, VKP_I_LOAD_ACQ(&slot->i_state),
                                             VKP_I_SLOT_ABANDONED);
            } else if (vkp_oneshot_send(slot, (const void *)&reply) == VKP_OK) {
                reply = NULL;
                ended = true;
            }
        }
        VKP_I_UNLOCK(&client->mutex);
        vkp_reply_unref(reply);
        if (ended) {
            vkp_i_client_release(client); /* the slot's; the caller has one of its own */
        }
    }
    vkp_i_request_free(request);
}

/* A receiver gave up: forget its slot. The slot keeps the client until this, or its value, came. */
static void vkp_i_request_detach(vkp_oneshot *slot)
{
    vkp_client *client = (vkp_client *)slot->i_user;
    VKP_I_LOCK(&client->mutex);
    if (slot->i_owner != NULL) {
        ((vkp_i_request *)slot->i_owner)->slot = NULL;
        slot->i_owner = NULL;
    }
    VKP_I_UNLOCK(&client->mutex);
    vkp_i_client_release(client);
}

/* ---- submitting, from any thread ---- */

/* Locked: make sure that the loop will look. */
static void vkp_i_client_schedule(vkp_client *client)
{
    if (!client->task_queued) {
        client->task_queued = true;
        (void)VKP_I_ADD(&client->refs, 1);
        if (!vkp_i_loop_queue(client->loop, &client->task)) {
            client->task_queued = false;
            (void)VKP_I_SUB(&client->refs, 1); /* the caller has one */
        }
    }
}

static vkp_status vkp_i_client_submit(vkp_client *client, vkp_i_request *request)
{
    bool interest = request->kind == VKP_I_REQUEST_WANT || request->kind == VKP_I_REQUEST_LEAVE;
    vkp_status status = VKP_OK;
    VKP_I_LOCK(&client->mutex);
    if (client->ended) {
        status = VKP_ERR_CLOSED;
    } else if (!interest && !client->accepting) {
        status = VKP_ERR_DISCONNECTED;
    } else if (client->queued_bytes > 0 &&
               request->cost > client->config.queue_bytes -
                                   VKP_I_MIN(client->queued_bytes, client->config.queue_bytes)) {
        status = VKP_ERR_FULL;
    } else {
        client->queued_bytes += request->cost;
        vkp_i_requests_append(&client->submitted, request);
        vkp_i_client_schedule(client);
    }
    VKP_I_UNLOCK(&client->mutex);
    return status;
}

static vkp_status vkp_i_client_submit_or_free(vkp_client *client, vkp_i_request *request)
{
    vkp_status status = vkp_i_client_submit(client, request);
    if (status != VKP_OK) {
        vkp_bytes_unref(&request->bytes);
        vkp_i_free(client->env, request, sizeof *request);
    }
    return status;
}

VKP_API vkp_status vkp_client_send(vkp_client *client, const vkp_bytes *commands, uint32_t replies,
                                   vkp_reply_fn on_reply, void *user)
{
    vkp_i_request *request;
    VKP_I_REQUIRE(client != NULL && commands != NULL && commands->len > 0 && replies > 0);
    VKP_I_REQUIRE(on_reply != NULL);
    request = vkp_i_request_new(client, VKP_I_REQUEST_COMMAND);
    if (request == NULL) {
        return VKP_ERR_NOMEM;
    }
    request->replies = replies;
    request->on_reply = on_reply;
    request->user = user;
    request->bytes = vkp_bytes_ref(commands);
    request->cost = sizeof *request + commands->len;
    return vkp_i_client_submit_or_free(client, request);
}

/* Commands that would change the connection under everybody's feet. */
static bool vkp_i_command_breaks_sharing(size_t argc, const vkp_str *argv)
{
    static const char *const names[] = {
        "SUBSCRIBE", "PSUBSCRIBE", "SSUBSCRIBE", "UNSUBSCRIBE", "PUNSUBSCRIBE", "SUNSUBSCRIBE",
        "HELLO",     "AUTH",       "RESET",      "QUIT",        "MONITOR",      "MULTI",
        "EXEC",      "DISCARD",    "WATCH",      "SELECT",      "SYNC",         "PSYNC"};
    size_t i;
    for (i = 0; i < sizeof names / sizeof names[0]; i++) {
        if (vkp_i_str_is(argv[0], names[i])) {
            return true;
        }
    }
    return argc > 1 && vkp_i_str_is(argv[0], "CLIENT") && vkp_i_str_is(argv[1], "REPLY");
}

static void vkp_i_put_command(vkp_resp_writer *writer, size_t argc, const vkp_str *argv)
{
    size_t i;
    vkp_resp_put_aggregate(writer, VKP_RESP_ARRAY, argc);
    for (i = 0; i < argc; i++) {
        vkp_resp_put_bulk(writer, argv[i].ptr, argv[i].len);
    }
}

static vkp_status vkp_i_client_ask(vkp_client *client, vkp_oneshot *slot, size_t argc,
                                   const vkp_str *argv)
{
    vkp_i_request *request;
    vkp_resp_writer writer;
    vkp_status status;
    if (vkp_i_command_breaks_sharing(argc, argv)) {
        return VKP_ERR_REFUSED;
    }
    request = vkp_i_request_new(client, VKP_I_REQUEST_COMMAND);
    if (request == NULL) {
        return VKP_ERR_NOMEM;
    }
    vkp_resp_writer_init(&writer, client->env);
    vkp_i_put_command(&writer, argc, argv);
    status = vkp_resp_writer_take(&writer, &request->bytes);
    if (status != VKP_OK) {
        vkp_i_free(client->env, request, sizeof *request);
        return status;
    }
    request->cost = sizeof *request + request->bytes.len;
    request->slot = slot;
    slot->i_owner = request;
    slot->i_detach = vkp_i_request_detach;
    (void)VKP_I_ADD(&client->refs, 1); /* given back by whoever ends the pairing */
    status = vkp_i_client_submit_or_free(client, request);
    if (status != VKP_OK) {
        slot->i_owner = NULL;
        slot->i_detach = NULL;
        (void)VKP_I_UNREF(&client->refs); /* the caller's own reference remains */
    }
    return status;
}

VKP_API vkp_status vkp_client_command_argv(vkp_client *client, vkp_oneshot *slot, size_t argc,
                                           const vkp_str *argv)
{
    vkp_status status;
    VKP_I_REQUIRE(client != NULL && slot != NULL && argc > 0 && argv != NULL);
    status = vkp_oneshot_init(slot, client->env, sizeof(vkp_reply *), vkp_i_drop_reply, client);
    if (status == VKP_OK) {
        status = vkp_i_client_ask(client, slot, argc, argv);
    }
    if (status != VKP_OK) {
        vkp_oneshot_abandon(slot); /* who waits on it all the same gets CLOSED */
    }
    return status;
}

#define VKP_I_COMMAND_ARGS 64

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

static vkp_status vkp_i_client_interest(vkp_client *client, vkp_i_request_kind kind,
                                        vkp_sub_kind sub, vkp_str name,
                                        void (*done)(void *user, vkp_status), void *user)
{
    vkp_i_request *request;
    vkp_status status;
    VKP_I_REQUIRE(client != NULL && (unsigned)sub < 3 && (name.ptr != NULL || name.len == 0));
    request = vkp_i_request_new(client, kind);
    if (request == NULL) {
        return VKP_ERR_NOMEM;
    }
    status = vkp_bytes_copy(client->env, name.ptr, name.len, &request->bytes);
    if (status != VKP_OK) {
        vkp_i_free(client->env, request, sizeof *request);
        return status;
    }
    request->sub = sub;
    request->done = done;
    request->user = user;
    return vkp_i_client_submit_or_free(client, request);
}

VKP_API vkp_status vkp_client_subscribe(vkp_client *client, vkp_sub_kind kind, vkp_str name)
{
    return vkp_i_client_interest(client, VKP_I_REQUEST_WANT, kind, name, NULL, NULL);
}

VKP_API vkp_status vkp_client_subscribe_then(vkp_client *client, vkp_sub_kind kind, vkp_str name,
                                             void (*done)(void *user, vkp_status), void *user)
{
    VKP_I_REQUIRE(done != NULL);
    return vkp_i_client_interest(client, VKP_I_REQUEST_WANT, kind, name, done, user);
}

VKP_API vkp_status vkp_client_unsubscribe(vkp_client *client, vkp_sub_kind kind, vkp_str name)
{
    return vkp_i_client_interest(client, VKP_I_REQUEST_LEAVE, kind, name, NULL, NULL);
}

#endif /* VKP_I_IO */
