#if VKP_I_IO
/* ======================================================================================
   >>impl-client   A connection to a server, shared by many threads
   ======================================================================================
   Any thread appends requests to `submitted` under the mutex and queues the client's task. The
   task runs on the loop's thread: it takes the list, writes each request's bytes and moves the
   request to `flight`, the requests that wait for their replies, oldest first. A reply completes
   the oldest request. The server answers SUBSCRIBE and UNSUBSCRIBE not with a reply but with one
   push, in its place among the replies: that push completes the oldest request too, when kind
   and name match.
   The mutex guards `submitted`, `queued_bytes`, `accepting`, `ended`, `task_queued`,
   `close_wanted`, `error`, and the links between requests and one-shots; every other field
   belongs to the loop's thread. Under the mutex only the loop's lock-free queue and a one-shot
   are used.
   Callbacks run on the loop's thread without the mutex, and any callback may close the client:
   code behind a callback checks `closed`.                                                     */

typedef enum vkp_i_request_kind {
    VKP_I_REQUEST_COMMAND,     /* commands of the program */
    VKP_I_REQUEST_HELLO,       /* ends the handshake: HELLO, or for RESP2 the PING behind AUTH */
    VKP_I_REQUEST_LOGIN,       /* RESP2: AUTH */
    VKP_I_REQUEST_NAME,        /* RESP2: CLIENT SETNAME, whose reply is ignored */
    VKP_I_REQUEST_PING,        /* the heartbeat */
    VKP_I_REQUEST_SUBSCRIBE,   /* sent for one interest */
    VKP_I_REQUEST_UNSUBSCRIBE, /* sent for one interest */
    VKP_I_REQUEST_WANT, /* vkp_client_subscribe: never written, adds to an interest's `wanted` */
    VKP_I_REQUEST_LEAVE /* vkp_client_unsubscribe: never written, takes from `wanted` */
} vkp_i_request_kind;

/* One entry of `submitted`, `taken`, `flight`, `failed` or an interest's `waiters`. */
typedef struct vkp_i_request {
    struct vkp_i_request *next; /* younger request of the list that holds this one */
    vkp_client *client;         /* no reference */
    vkp_i_request_kind kind;
    uint32_t replies;      /* replies still to come; for a WANT that waits: confirmations */
    size_t cost;           /* bytes counted in client->queued_bytes, or 0 */
    vkp_bytes bytes;       /* the commands to write; for WANT and LEAVE the name */
    vkp_oneshot *slot;     /* receives the reply, or NULL; guarded by the mutex */
    vkp_reply_fn on_reply; /* called with the last reply, or NULL */
    void (*done)(void *user, vkp_status status); /* called with the outcome of a WANT, or NULL */
    void *user;                                  /* argument of on_reply and of done */
    vkp_sub_kind sub;                            /* kind of the name, for requests with a name */
    struct vkp_i_interest *interest;             /* for SUBSCRIBE and UNSUBSCRIBE */
} vkp_i_request;

/* A list of requests, oldest first. */
typedef struct vkp_i_requests {
    vkp_i_request *first; /* NULL: empty */
    vkp_i_request **end;  /* the NULL link where the next request is appended */
} vkp_i_requests;

/* A name that the program wants, or that still waits for a confirmation. The name is behind the
   struct.                                                                                     */
typedef struct vkp_i_interest {
    vkp_i_map_node node; /* in client->interests; its key is the name */
    vkp_sub_kind kind;
    size_t wanted;    /* calls of vkp_client_subscribe minus those of vkp_client_unsubscribe */
    size_t in_flight; /* SUBSCRIBE and UNSUBSCRIBE commands without an answer */
    bool subscribed;  /* the last command sent is SUBSCRIBE, not UNSUBSCRIBE */
    bool confirmed;   /* the server confirmed the subscription */
    bool resuming;    /* subscribed again after an outage: the GAP event waits for the answer */
    vkp_i_requests waiters; /* WANT requests that wait for an answer of the server */
} vkp_i_interest;

struct vkp_reply {
    const vkp_env *env;
    size_t refs;       /* atomic */
    size_t bytes;      /* size of this allocation */
    vkp_bytes frame;   /* the raw bytes: a copy in this allocation, or shares the read block */
    vkp_value *values; /* the tree, behind the struct */
};

#define VKP_I_CLIENT_ERROR_BYTES 128 /* text of vkp_client_get_error, terminated */

struct vkp_client {
    const vkp_env *env;
    vkp_loop *loop;           /* shared */
    vkp_client_config config; /* its texts are copies */
    size_t refs;    /* atomic: one per handle, per one-shot, of the open loop, of the queued task */
    size_t users;   /* atomic: handles of the program; giving the last one back closes */
    uint32_t state; /* atomic: vkp_client_state */
    uint32_t protocol;        /* atomic: 2 or 3 */
    VKP_I_MUTEX mutex;        /* guards the fields from `submitted` to `error`, and request->slot */
    vkp_i_requests submitted; /* requests that the loop has not taken; guarded by the mutex */
    size_t queued_bytes;      /* cost of all incomplete commands; guarded by the mutex */
    bool accepting;           /* commands are accepted (CONNECTING, READY); guarded by the mutex */
    bool ended;               /* closed: every request gets CLOSED; guarded by the mutex */
    bool task_queued;         /* `task` is queued on the loop; guarded by the mutex */
    bool close_wanted;        /* `task` closes the client; guarded by the mutex */
    char error[VKP_I_CLIENT_ERROR_BYTES]; /* for vkp_client_get_error; guarded by the mutex */

    bool closed;             /* vkp_i_client_close_now ran */
    bool ready;              /* the handshake succeeded: requests are written */
    bool outage;             /* from DISCONNECTED until the next connection has subscribed again */
    bool gap_open;           /* messages may be missing since lost_ns; a GAP event ends it */
    bool was_ready;          /* a handshake succeeded before: the next event is RECONNECTED */
    bool falling_back;       /* the handshake is that of RESP2 */
    bool ping_sent;          /* a heartbeat's PING waits for its reply */
    vkp_i_task task;         /* works on `submitted`; queued by any thread */
    vkp_i_attached attached; /* calls vkp_i_client_loop_closed */
    vkp_conn *conn;          /* NULL: not connected */
    vkp_resp_reader *reader; /* reads replies and pushes */
    vkp_block *out;          /* small commands are gathered here: one range to write */
    vkp_i_requests flight;   /* written requests that wait for replies, oldest first */
    vkp_i_requests taken;    /* requests taken from `submitted`, not started */
    vkp_i_requests failed;   /* failed requests whose callbacks were not called */
    vkp_i_map interests[VKP_SUB_KINDS]; /* by vkp_sub_kind, then by name */
    size_t confirmed;                   /* number of interests that are `confirmed` */
    size_t resuming;                    /* number of interests that are `resuming` */
    uint64_t lost_ns;  /* start of the gap: the time of the first lost connection */
    uint64_t heard_ns; /* time of the last bytes received */
    uint64_t missed;   /* pushes without room in config.pushes since the last LAGGED */
    uint32_t tries;    /* attempts to connect since the last READY */
    vkp_timer timer;   /* CONNECTING: the time limit; WAITING: the next try; READY: the heartbeat */
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

/* Give one of `refs` back; the last one frees the client. */
static void vkp_i_client_release(vkp_client *client)
{
    if (VKP_I_UNREF(&client->refs) == 1) {
        vkp_i_client_free(client);
    }
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

/* Append all requests of `from` to `to`. */
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

/* Report the outcome to the request's callback or one-shot, then free the request. value and
   frame are NULL unless status is OK.                                                         */
static void vkp_i_request_complete(vkp_i_request *request, vkp_status status,
                                   const vkp_value *value, const vkp_bytes *frame)
{
    vkp_client *client = request->client;
    vkp_oneshot *slot;
    if (request->cost > 0) { /* before the callbacks: they may submit again */
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
            slot->i_owner = NULL; /* before the send: its receiver may free the slot */
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
            vkp_i_client_release(client); /* the one-shot's reference; the caller holds another */
        }
    }
    vkp_i_request_free(request);
}

/* The receiver closed its one-shot: unlink it from the request. A one-shot holds a reference of
   the client until it is detached or has its value.                                           */
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

/* Append a request to `submitted`. On failure (CLOSED, DISCONNECTED, FULL) it stays the
   caller's.                                                                                   */
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

/* Submit a request, or free it on failure. */
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

/* Whether the command would change the connection that all users of the client share. */
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

/* Submit one command whose reply the one-shot receives. */
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
    /* Given back when the one-shot is detached or the request completes. */
    (void)VKP_I_ADD(&client->refs, 1);
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
        vkp_oneshot_abandon(slot); /* a receiver that waits on it gets CLOSED */
    }
    return status;
}

#define VKP_I_COMMAND_ARGS 64 /* most arguments of vkp_client_command */

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
static vkp_status vkp_i_client_interest(vkp_client *client, vkp_i_request_kind kind,
                                        vkp_sub_kind sub, vkp_str name,
                                        void (*done)(void *user, vkp_status), void *user)
{
    vkp_i_request *request;
    vkp_status status;
    VKP_I_REQUIRE(client != NULL && (unsigned)sub < VKP_SUB_KINDS &&
                  (name.ptr != NULL || name.len == 0));
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
