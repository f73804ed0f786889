#if VKP_I_IO
/* ======================================================================================
   >>impl-link   One connection to a server, and the requests in flight on it
   ======================================================================================
   A link connects, lets the handshake log in (see impl-handshake), writes requests, and hands each
   answer to the request that it belongs to. Its owner embeds it and is called by vkp_i_link_ops.
   Loop's thread only; no lock is held. Every callback may close the link: code behind a callback
   checks `conn`.
   Requests wait in `flight`, oldest first, because a server answers in order. What answers a
   request depends on what it expects:
     REPLIES  `due` replies; the last one settles it.
     NAMES    SUBSCRIBE: one push for each of `due` names, or one error for all.
     LEAVES   UNSUBSCRIBE: servers answer with a push for the name, with a push for no name, with an
              error, or with a push and an error. So none of these settles it: the fence does.
     FENCE    settles the LEAVES before it by a reply that nothing else has: in RESP3 the map of
              HELLO 3, in RESP2 the link's token, and where neither HELLO nor PING may be allowed
              the error of an unknown command, the token. The link writes it behind the LEAVES.
   An answer that fits nothing means that replies and requests are out of step. The link fails then,
   because every later reply would reach the wrong request.                                    */

typedef enum vkp_i_expect {
    VKP_I_EXPECT_REPLIES = 0,
    VKP_I_EXPECT_NAMES,
    VKP_I_EXPECT_LEAVES,
    VKP_I_EXPECT_FENCE
} vkp_i_expect;

/* What is asked of a server; a member of a larger struct. */
typedef struct vkp_i_request {
    struct vkp_i_request *next; /* younger request of the list that holds this one */
    vkp_i_expect expect;        /* what answers it */
    uint32_t due;               /* replies, or confirmations of names, still to come */
    bool answered;              /* LEAVES: a push or an error was its answer; due 0: refused */
    bool moved;                 /* LEAVES: a MOVED followed its push */
    bool by_error;              /* LEAVES: an error was its answer */
    bool unread;                /* REPLIES: value is NULL, nobody looks into the reply */
    uint64_t sent_ns; /* when it was written, on the loop's clock; before, when it began to
                                   wait, where that matters                                    */
    vkp_bytes bytes;  /* the commands to write; empty once written */
    /* NAMES and LEAVES: whether the push is for this request. It was reported then. */
    bool (*accept)(struct vkp_i_request *request, const vkp_push *push);
    /* The request is out of flight; the callback owns it. OK: value and frame are the last reply,
       or NULL when pushes or a fence settled it. REFUSED: value is the error that answered NAMES or
       LEAVES. LIMIT: the reply was over a limit of the reader. Any other status: no answer. Value
       and frame are valid until the callback returns.                                         */
    void (*settle)(struct vkp_i_request *request, vkp_status status, const vkp_value *value,
                   const vkp_bytes *frame);
} vkp_i_request;

/* A list of requests, oldest first. */
typedef struct vkp_i_requests {
    vkp_i_request *first; /* NULL: empty */
    vkp_i_request **end;  /* the NULL link where the next request is appended */
} vkp_i_requests;

typedef struct vkp_i_link vkp_i_link;

/* The addresses of the last lookup that found any. */
typedef struct vkp_i_known {
    vkp_i_parts parts; /* the name, and the port */
    vkp_address addresses[VKP_I_LOOKUP_ADDRESSES];
    size_t count;
} vkp_i_known;

typedef struct vkp_i_link_ops {
    void (*on_ready)(vkp_i_link *link);                      /* the handshake succeeded */
    void (*on_push)(vkp_i_link *link, const vkp_push *push); /* a push that answers no request */
    /* The connection, or the try to connect, ended, and `error` says why. The requests in flight
       are still there: the owner settles them.                                                */
    void (*on_down)(vkp_i_link *link);
    void (*on_busy)(vkp_i_link *link); /* the first request is in flight again */
    /* NULL, or the server answered HELLO: a map, or an array of keys and values. */
    void (*on_hello)(vkp_i_link *link, const vkp_value *hello);
    void (*on_written)(vkp_i_link *link); /* NULL, or the kernel has taken all that it had not */
    void (*hold)(vkp_i_link *link);       /* one more reference to the owner */
    void (*release)(vkp_i_link *link);    /* one reference less */
    /* NULL, or what reads all bytes behind the handshake's replies; returns how many it used, and
       gets the others again with those that follow.                                           */
    size_t (*on_bytes)(vkp_i_link *link, const vkp_bytes *in);
} vkp_i_link_ops;

#define VKP_I_LINK_ERROR_BYTES 160 /* text of vkp_i_link.error, terminated */
#define VKP_I_TOKEN_BYTES 33       /* text of vkp_i_link.token, terminated */

/* Where the handshake is. */
typedef enum vkp_i_stage {
    VKP_I_STAGE_CONNECTING = 0, /* no byte was sent */
    VKP_I_STAGE_HELLO,          /* HELLO 3 waits for its answer */
    VKP_I_STAGE_LOGIN,          /* RESP2: AUTH and PING wait for their answers */
    VKP_I_STAGE_SETUP,          /* SELECT and the commands of the config wait for their answers */
    VKP_I_STAGE_READY
} vkp_i_stage;

struct vkp_i_link {
    const vkp_env *env;
    vkp_loop *loop;                  /* the owner's */
    const vkp_client_config *config; /* the owner's, defaults filled in */
    const vkp_i_link_ops *ops;
    vkp_conn *conn;          /* NULL: down */
    vkp_resp_reader *reader; /* reads replies and pushes */
    vkp_block *out;          /* small commands are gathered here: one range to write */
    vkp_i_requests flight;   /* written requests that wait for answers, oldest first */
    vkp_i_stage stage;
    uint32_t protocol;      /* 2 or 3; 0 before the first handshake */
    uint32_t steps;         /* requests of the handshake's stage that are not settled */
    bool authenticated;     /* NOAUTH was answered to HELLO, AUTH was sent, HELLO asked again */
    bool role_known;        /* the server said its role */
    bool subscribed;        /* RESP2: an array may be a push; set by the owner */
    bool fence_wanted;      /* LEAVES were written and no fence behind them */
    bool fence_queued;      /* fence_task is deferred */
    bool skipping;          /* the reader refused the reply that `skip` passes over */
    bool ping_refused;      /* RESP2: the server answers PING with an error */
    bool hello_restricted;  /* RESP3 of redis 6.0: only users with the right to HELLO may */
    bool demoted;           /* a reply said that the server is a replica, and must be none */
    bool had_resp3;         /* this server answered HELLO once: hang-ups say nothing about it */
    bool connected;         /* this try was accepted by a server's kernel */
    bool spoke;             /* this try had a reply */
    uint32_t errors;        /* errors that answered LEAVES since the last fence */
    uint64_t answered_ns;   /* when an answer, or a part of one, arrived last */
    uint64_t known_ns;      /* the server had this connection then: see vkp_i_link_answered */
    uint64_t heard_ns;      /* when bytes arrived last */
    uint64_t ready_ns;      /* when the handshake succeeded */
    int64_t id;             /* the connection's id on the server; 0: not known */
    bool id_asked;          /* CLIENT ID was sent, which HELLO makes needless */
    bool wants_id;          /* a login of RESP2 asks for it; set by the owner */
    vkp_i_lookup *lookup;   /* of the host name; NULL: none is under way */
    bool looking;           /* this try waits for the lookup */
    vkp_timer lookup_timer; /* ends the wait for a lookup, where addresses are known */
    vkp_i_known *known;     /* addresses of the last lookup; NULL: none */
    uint32_t failures;      /* tries that did not get READY, since one did */
    uint32_t hung_up;       /* tries in a row in which the server hung up at HELLO */
    vkp_address peer;       /* the address of this connection */
    vkp_str username;       /* of this try; a copy */
    vkp_str password;
    vkp_i_task fence_task;
    vkp_i_skip skip;
    uint64_t dropping;                        /* skipping a bulk: bytes of it that have not come */
    char hello_words[VKP_I_LINK_ERROR_BYTES]; /* HELLO's error, when the handshake went on */
    char token[VKP_I_TOKEN_BYTES];            /* PING's argument in a fence */
    char error[VKP_I_LINK_ERROR_BYTES]; /* what ended the last connection or try; "" at first */
};

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
    if (from->first != NULL) {
        *to->end = from->first;
        to->end = from->end;
        vkp_i_requests_init(from);
    }
}

/* ---- ending ---- */

/* Nobody waits for the lookup any more. */
static void vkp_i_link_abandon_lookup(vkp_i_link *link)
{
    if (link->lookup != NULL) {
        link->lookup->done = NULL;
        VKP_I_STORE(&link->lookup->abandoned, 1u);
        link->lookup = NULL;
    }
}

/* End the connection or the try, if any; the connection's on_close is ignored because `conn` is
   NULL by then. The requests in flight stay. A lookup that is under way goes on, for the next
   try.                                                                                        */
static void vkp_i_link_stop(vkp_i_link *link)
{
    vkp_conn *conn = link->conn;
    link->conn = NULL;
    link->failures += link->stage == VKP_I_STAGE_READY ? 0u : 1u;
    link->looking = false;
    vkp_timer_stop(&link->lookup_timer);
    link->stage = VKP_I_STAGE_CONNECTING;
    link->fence_wanted = false;
    link->skipping = false;
    memset(&link->skip, 0, sizeof link->skip);
    link->dropping = 0;
    link->errors = 0;
    if (conn != NULL) {
        vkp_conn_close(conn);
        vkp_conn_unref(conn);
    }
    if (link->reader != NULL) { /* otherwise vkp_i_link_init had no memory */
        vkp_resp_reader_reset(link->reader);
    }
}

/* The same for the last time. */
static void vkp_i_link_close(vkp_i_link *link)
{
    vkp_i_link_abandon_lookup(link);
    vkp_i_link_stop(link);
}

/* The link failed: why is the reason, words are the server's, or of no length. */
static void vkp_i_link_fail(vkp_i_link *link, const char *why, vkp_str words)
{
    int len = (int)VKP_I_MIN(words.len, sizeof link->error);
    (void)snprintf(link->error, sizeof link->error, "%s%s%.*s", why, len > 0 ? ": " : "", len,
                   len > 0 ? words.ptr : "");
    vkp_i_link_stop(link); /* ends the memory of words */
    link->ops->on_down(link);
}

/* The same without words of the server. */
static void vkp_i_link_lose(vkp_i_link *link, const char *why)
{
    vkp_i_link_fail(link, why, vkp_i_str(NULL, 0));
}

/* ---- writing ---- */

#define VKP_I_GATHER 2048u        /* commands up to this size are copied together */
#define VKP_I_GATHER_BLOCK 16384u /* capacity of the block that gathers small commands */

/* Queue commands on the connection; small ones are copied behind each other, which makes one
   range to write.                                                                             */
static vkp_status vkp_i_link_write(vkp_i_link *link, const vkp_bytes *bytes)
{
    vkp_bytes part = *bytes;
    vkp_block *out = link->out;
    if (bytes->len <= VKP_I_GATHER) {
        if (out != NULL && vkp_i_block_is_mine(out)) {
            out->len = 0;
        }
        if (out == NULL || out->capacity - out->len < bytes->len) {
            vkp_i_block_unref(out);
            out = vkp_i_block_open(link->env, VKP_I_GATHER_BLOCK);
            link->out = out;
        }
        if (out != NULL) {
            part.data = vkp_i_block_data(out) + out->len;
            part.block = out;
            memcpy(vkp_i_block_data(out) + out->len, bytes->data, bytes->len);
            out->len += bytes->len;
        }
    }
    return vkp_conn_send(link->conn, &part);
}

static bool vkp_i_link_put_fence(vkp_i_link *link);

/* Write a request and append it to `flight`. False: not connected or no memory; it stays the
   caller's.                                                                                   */
static bool vkp_i_link_start(vkp_i_link *link, vkp_i_request *request)
{
    if (link->conn == NULL) {
        return false;
    }
    if (link->fence_wanted && request->expect != VKP_I_EXPECT_LEAVES &&
        request->expect != VKP_I_EXPECT_FENCE && !vkp_i_link_put_fence(link)) {
        return false;
    }
    if (vkp_i_link_write(link, &request->bytes) != VKP_OK) {
        return false;
    }
    vkp_bytes_unref(&request->bytes);
    request->sent_ns = link->loop->now_ns;
    vkp_i_requests_append(&link->flight, request);
    if (link->flight.first == request) {
        link->ops->on_busy(link);
    }
    if (request->expect == VKP_I_EXPECT_LEAVES) {
        link->fence_wanted = true;
        if (!link->fence_queued) {
            link->fence_queued = true;
            link->ops->hold(link);
            vkp_i_loop_defer(link->loop, &link->fence_task);
        }
    }
    return true;
}

static void vkp_i_put_command(vkp_resp_writer *writer, size_t argc, const vkp_str *argv)
{
    size_t i;
    vkp_resp_put_aggregate(writer, VKP_RESP_ARRAY, argc);
    for (i = 0; i < argc; i++) {
        vkp_resp_put_bulk(writer, argv[i].ptr, argv[i].len);
    }
}

/* Put one command into the request. NOMEM, or LIMIT: 4 GiB. */
static vkp_status vkp_i_request_put(vkp_i_request *request, const vkp_env *env, size_t argc,
                                    const vkp_str *argv)
{
    vkp_resp_writer writer;
    vkp_resp_writer_init(&writer, env);
    vkp_i_put_command(&writer, argc, argv);
    return vkp_resp_writer_take(&writer, &request->bytes);
}

/* ---- fences ---- */

/* A fence, with the environment that frees it. */
typedef struct vkp_i_fence {
    vkp_i_request request;
    const vkp_env *env;
} vkp_i_fence;

static void vkp_i_fence_settled(vkp_i_request *request, vkp_status status, const vkp_value *value,
                                const vkp_bytes *frame)
{
    vkp_i_fence *fence = VKP_CONTAINER(request, vkp_i_fence, request);
    (void)status;
    (void)value;
    (void)frame;
    vkp_bytes_unref(&request->bytes);
    vkp_i_free(fence->env, fence, sizeof *fence);
}

/* Write a fence behind the LEAVES. False: no memory. */
static bool vkp_i_link_put_fence(vkp_i_link *link)
{
    vkp_i_fence *fence = (vkp_i_fence *)vkp_i_alloc_zero(link->env, sizeof *fence);
    vkp_str argv[2];
    size_t argc = 0;
    if (fence == NULL) {
        return false;
    }
    fence->env = link->env;
    fence->request.expect = VKP_I_EXPECT_FENCE;
    fence->request.settle = vkp_i_fence_settled;
    if (link->protocol == 3 && !link->hello_restricted) {
        /* Every user may, also while a script runs or a data set loads. */
        argv[argc++] = vkp_str_of("HELLO");
        argv[argc++] = vkp_str_of("3");
    } else {
        if (link->protocol == 2 && !link->ping_refused) {
            argv[argc++] = vkp_str_of("PING");
        }
        argv[argc++] = vkp_str_of(link->token); /* alone: an unknown command, whose error says it */
    }
    if (vkp_i_request_put(&fence->request, link->env, argc, argv) != VKP_OK ||
        !vkp_i_link_start(link, &fence->request)) {
        vkp_i_fence_settled(&fence->request, VKP_ERR_NOMEM, NULL, NULL);
        return false;
    }
    link->fence_wanted = false;
    return true;
}

/* The end of the round in which LEAVES were written. */
static void vkp_i_link_fence_task(vkp_i_task *task)
{
    vkp_i_link *link = VKP_CONTAINER(task, vkp_i_link, fence_task);
    link->fence_queued = false;
    if (link->fence_wanted && link->conn != NULL && !vkp_i_link_put_fence(link)) {
        vkp_i_link_lose(link, "out of memory");
    }
    link->ops->release(link);
}

/* The value behind a key of a map, or of an array of keys and values; NULL: there is none. */
static const vkp_value *vkp_i_map_value(const vkp_value *map, const char *key)
{
    const vkp_value *at =
        map->type == VKP_RESP_MAP || map->type == VKP_RESP_ARRAY ? vkp_value_get_first(map) : NULL;
    while (at != NULL) {
        const vkp_value *value = vkp_value_get_next(map, at);
        if (vkp_value_is_text(at, vkp_str_of(key))) {
            return value;
        }
        at = vkp_value_get_next(map, value);
    }
    return NULL;
}

/* Whether the reply is the one of the link's fence. */
static bool vkp_i_link_is_fence(const vkp_i_link *link, const vkp_value *value)
{
    const vkp_value *last = value;
    if (link->protocol == 3 && !link->hello_restricted) {
        const vkp_value *id = vkp_i_map_value(value, "id");
        return vkp_i_map_value(value, "proto") != NULL &&
               (link->id == 0 || (id != NULL && id->u.integer == link->id));
    }
    if (value->type == VKP_RESP_ARRAY && value->len == 2) { /* something is subscribed still */
        last = vkp_value_get_next(value, vkp_value_get_first(value));
    }
    if (link->protocol == 3 || link->ping_refused) {
        return value->type == VKP_RESP_ERROR &&
               vkp_i_contains(vkp_value_get_str(value), link->token);
    }
    return last != NULL && last->type == VKP_RESP_STRING &&
           vkp_value_is_text(last, vkp_str_of(link->token));
}

/* The request was answered. When it was sent is the latest moment at which the server is known to
   have had this connection: bytes that arrive now may have been on their way for long, and what
   was published since they were written may be lost. */
static void vkp_i_link_answered(vkp_i_link *link, const vkp_i_request *request)
{
    link->answered_ns = link->loop->now_ns;
    link->known_ns = VKP_I_MAX(link->known_ns, request->sent_ns);
}

/* An error that answers LEAVES: a MOVED may follow a push, another one answers the oldest that has
   no answer. */
static void vkp_i_link_leaves_error(vkp_i_link *link, vkp_str words)
{
    bool moved = vkp_i_starts_with(words, "MOVED");
    bool done = moved || vkp_i_starts_with(words, "NOSUB");
    vkp_i_request *request = link->flight.first;
    while (request != NULL && request->expect == VKP_I_EXPECT_LEAVES) {
        if (moved && request->answered && !request->moved && request->next != NULL &&
            !request->next->answered) {
            request->moved = true; /* the last one with a push */
            return;
        }
        if (!request->answered) {
            request->answered = true;
            request->moved = moved;
            request->by_error = true;
            /* Not subscribed, or not served here any more: what was asked for is so. */
            request->due = done ? 1 : 0;
            return;
        }
        request = request->next;
    }
    /* One more error than it seemed: it is not known whose it is, so those are left again. */
    for (request = link->flight.first;
         !done && request != NULL && request->expect == VKP_I_EXPECT_LEAVES;
         request = request->next) {
        request->due = request->by_error ? 0 : request->due;
    }
}

/* A reply while LEAVES are the oldest requests: one of their errors, or the fence. */
static void vkp_i_link_leaves_reply(vkp_i_link *link, const vkp_value *value)
{
    vkp_conn *conn = link->conn;
    vkp_i_request *request;
    uint32_t leaves = 0;
    for (request = link->flight.first; request != NULL && request->expect == VKP_I_EXPECT_LEAVES;
         request = request->next) {
        leaves++;
    }
    if (value->type == VKP_RESP_ERROR && !vkp_i_link_is_fence(link, value)) {
        vkp_str words = vkp_value_get_str(value);
        if (++link->errors > leaves) {
            vkp_i_link_lose(link, "an error that nothing can have caused");
            return;
        }
        link->answered_ns = link->loop->now_ns;
        vkp_i_link_leaves_error(link, words);
        return;
    }
    if (request == NULL || request->expect != VKP_I_EXPECT_FENCE ||
        !vkp_i_link_is_fence(link, value)) {
        vkp_i_link_lose(link, "a reply where an unsubscription was due");
        return;
    }
    link->errors = 0;
    while (link->conn == conn && leaves-- > 0) {
        request = vkp_i_requests_pop(&link->flight);
        request->settle(request, request->due == 0 ? VKP_ERR_REFUSED : VKP_OK, NULL, NULL);
    }
    if (link->conn == conn) {
        request = vkp_i_requests_pop(&link->flight);
        vkp_i_link_answered(link, request);
        request->settle(request, VKP_OK, value, NULL);
    }
}

/* ---- reading ---- */

/* A reply arrived: it belongs to the oldest request in flight. */
static void vkp_i_link_reply(vkp_i_link *link, const vkp_value *value, const vkp_bytes *frame)
{
    vkp_i_request *oldest = link->flight.first;
    link->spoke = true;
    link->hung_up = 0;
    if (value->type == VKP_RESP_ERROR && link->config->role == VKP_CLIENT_ROLE_PRIMARY &&
        vkp_i_starts_with(vkp_value_get_str(value), "READONLY")) {
        link->demoted = true;
    }
    if (oldest == NULL) {
        vkp_i_link_lose(link, "a reply that nobody asked for");
        return;
    }
    switch (oldest->expect) {
    case VKP_I_EXPECT_REPLIES:
        vkp_i_link_answered(link, oldest);
        if (--oldest->due == 0) {
            (void)vkp_i_requests_pop(&link->flight);
            oldest->settle(oldest, VKP_OK, value, frame);
        }
        break;
    case VKP_I_EXPECT_NAMES:
        if (value->type == VKP_RESP_ERROR) {
            vkp_i_link_answered(link, oldest);
            (void)vkp_i_requests_pop(&link->flight);
            oldest->settle(oldest, VKP_ERR_REFUSED, value, frame);
        } else {
            vkp_i_link_lose(link, "a reply where a confirmation was due");
        }
        break;
    case VKP_I_EXPECT_LEAVES:
    case VKP_I_EXPECT_FENCE: /* without LEAVES before it never the oldest */
        vkp_i_link_leaves_reply(link, value);
        break;
    }
}

/* Whether a push of the UNSUBSCRIBE family answers one of the LEAVES at the head of the flight. */
__attribute__((noinline)) static bool vkp_i_link_push_leaves(vkp_i_link *link, const vkp_push *push)
{
    vkp_i_request *request;
    for (request = link->flight.first; request != NULL && request->expect == VKP_I_EXPECT_LEAVES;
         request = request->next) {
        if (!request->answered) {
            request->answered = true; /* before accept, whose callbacks may end the request */
            if (push->channel.ptr == NULL || request->accept(request, push)) {
                return true;
            }
            request->answered = false;
        }
    }
    return false;
}

/* A confirmation while the oldest request waits for some. */
__attribute__((noinline)) static void vkp_i_link_confirmed(vkp_i_link *link, const vkp_push *push)
{
    vkp_conn *conn = link->conn;
    vkp_i_request *oldest = link->flight.first;
    if (!oldest->accept(oldest, push)) {
        vkp_i_link_lose(link, "a confirmation of another name than was due");
    } else if (link->conn == conn && --oldest->due == 0) {
        vkp_i_link_answered(link, oldest);
        (void)vkp_i_requests_pop(&link->flight);
        oldest->settle(oldest, VKP_OK, NULL, NULL);
    }
}

/* A push arrived: it answers a request in flight, or is the owner's. */
static void vkp_i_link_push(vkp_i_link *link, const vkp_value *value, const vkp_bytes *frame)
{
    vkp_push push;
    if (!vkp_i_push_from_message(value, &push) && vkp_push_from_value(value, &push) != VKP_OK) {
        return; /* the reader rejects such a push */
    }
    push.frame = *frame;
    if (push.kind == VKP_PUSH_SUBSCRIBED && link->flight.first != NULL &&
        link->flight.first->expect == VKP_I_EXPECT_NAMES) {
        vkp_i_link_confirmed(link, &push);
    } else if (push.kind != VKP_PUSH_UNSUBSCRIBED || !vkp_i_link_push_leaves(link, &push)) {
        link->ops->on_push(link, &push);
    }
}

/* Whether a RESP2 array is a push. RESP2 has no type for pushes: an array of a push's form is
   one while something is subscribed, or while a SUBSCRIBE or UNSUBSCRIBE waits for its answer. */
static bool vkp_i_link_is_push2(const vkp_i_link *link, const vkp_value *value)
{
    vkp_push push;
    const vkp_i_request *oldest = link->flight.first;
    bool due = oldest != NULL &&
               (oldest->expect == VKP_I_EXPECT_NAMES || oldest->expect == VKP_I_EXPECT_LEAVES);
    return link->protocol == 2 && value->type == VKP_RESP_ARRAY && (link->subscribed || due) &&
           vkp_push_from_value(value, &push) == VKP_OK && push.kind != VKP_PUSH_OTHER;
}

/* Read bytes that hold one whole value. */
static const vkp_value *vkp_i_link_reread(vkp_i_link *link, const vkp_bytes *bytes)
{
    const vkp_value *value = NULL;
    size_t consumed;
    return vkp_resp_reader_scan(link->reader, bytes->data, bytes->len, &value, &consumed) == VKP_OK
               ? value
               : NULL;
}

/* Deliver the pushes inside a reply, each as if it had arrived before the reply, with its own bytes
   as its frame. `rest`, which may be NULL, becomes the reply without them. False: no memory. */
static bool vkp_i_link_deliver_nested(vkp_i_link *link, const vkp_bytes *frame, vkp_bytes *rest)
{
    vkp_conn *conn = link->conn;
    size_t from = 0;
    size_t begin;
    size_t end;
    while (link->conn == conn && vkp_i_frame_get_nested(frame, from, &begin, &end)) {
        vkp_bytes push = vkp_bytes_slice(frame, begin, end - begin);
        const vkp_value *value = vkp_i_link_reread(link, &push);
        if (rest != NULL) {
            memcpy(vkp_i_block_data(rest->block) + rest->len, frame->data + from, begin - from);
            rest->len += begin - from;
        }
        from = end;
        if (value != NULL) {
            vkp_i_link_push(link, value, &push);
        }
        vkp_bytes_unref(&push);
        if (value == NULL) {
            return false;
        }
    }
    if (rest != NULL) {
        memcpy(vkp_i_block_data(rest->block) + rest->len, frame->data + from, frame->len - from);
        rest->len += frame->len - from;
    }
    return true;
}

/* Handle the pushes inside a reply or a push, then that without them. False: no memory. */
static bool vkp_i_link_unnest(vkp_i_link *link, const vkp_bytes *frame)
{
    vkp_conn *conn = link->conn;
    const vkp_value *value = NULL;
    vkp_bytes rest;
    bool ok;
    rest.block = vkp_i_block_open(link->env, frame->len);
    if (rest.block == NULL) {
        return false;
    }
    rest.data = vkp_i_block_data(rest.block);
    rest.len = 0;
    ok = vkp_i_link_deliver_nested(link, frame, &rest);
    rest.block->len = rest.len;
    if (ok && link->conn == conn) {
        value = vkp_i_link_reread(link, &rest);
        ok = value != NULL;
    }
    if (ok && link->conn == conn) {
        if (value->type == VKP_RESP_PUSH) {
            vkp_i_link_push(link, value, &rest);
        } else {
            vkp_i_link_reply(link, value, &rest);
        }
    }
    vkp_bytes_unref(&rest);
    return ok;
}

/* One whole value arrived: a push or a reply. */
static void vkp_i_link_value(vkp_i_link *link, const vkp_value *value, const vkp_bytes *frame)
{
    if (value->i_has_nested != 0) {
        if (!vkp_i_link_unnest(link, frame)) {
            vkp_i_link_lose(link, "out of memory");
        }
    } else if (value->type == VKP_RESP_PUSH || vkp_i_link_is_push2(link, value)) {
        vkp_i_link_push(link, value, frame);
    } else if (frame->data[0] != '>') { /* ">-1": old servers send a push that says nothing */
        vkp_i_link_reply(link, value, frame);
    }
}

/* The type byte of the frame's value, behind its attributes; 0: it has not arrived. */
static uint8_t vkp_i_frame_type(const uint8_t *data, size_t len)
{
    size_t at = vkp_i_frame_get_root(data, len);
    return at < len ? data[at] : 0;
}

/* The reader refused the frame that begins at data. Begin to skip it, if it is the reply of a
   command and its end can be found; otherwise the link fails.                                 */
static void vkp_i_link_refuse(vkp_i_link *link, vkp_status status, const uint8_t *data, size_t len)
{
    const vkp_i_request *oldest = link->flight.first;
    uint8_t type = vkp_i_frame_type(data, len);
    bool push =
        type == 0 || type == '>' || (link->protocol == 2 && link->subscribed && type == '*');
    uint64_t position;
    const char *reason = vkp_resp_reader_get_error(link->reader, &position);
    if (status == VKP_ERR_NOMEM) {
        vkp_i_link_lose(link, "out of memory");
    } else if (vkp_i_reader_is_end_known(link->reader) && !push && oldest != NULL &&
               oldest->expect == VKP_I_EXPECT_REPLIES) {
        vkp_i_log(link->env, VKP_LOG_WARN, "%s: a reply is dropped: %s", link->config->address.ptr,
                  reason);
        memset(&link->skip, 0, sizeof link->skip);
        link->skipping = true;
    } else {
        vkp_i_log(link->env, VKP_LOG_ERROR, "%s: bad reply: %s", link->config->address.ptr, reason);
        vkp_i_link_fail(link, "the server broke the protocol", vkp_str_of(reason));
    }
}

/* The reply that the reader refused is behind: its command has no other one. */
static void vkp_i_link_skipped(vkp_i_link *link)
{
    vkp_i_request *oldest = link->flight.first;
    link->skipping = false;
    vkp_resp_reader_reset(link->reader);
    vkp_i_link_answered(link, oldest);
    if (--oldest->due == 0) {
        (void)vkp_i_requests_pop(&link->flight);
        oldest->settle(oldest, VKP_ERR_LIMIT, NULL, NULL);
    }
}

/* Continue behind a bulk that is too large: it is not kept. Returns the bytes used. */
static size_t vkp_i_link_drop(vkp_i_link *link, const vkp_bytes *in)
{
    size_t used = (size_t)VKP_I_MIN((uint64_t)in->len, link->dropping);
    link->dropping -= used;
    if (link->dropping == 0) {
        vkp_i_link_skipped(link);
    }
    return used;
}

/* Continue behind a reply that the reader refused; its bytes are at the start of `in`. The pushes
   inside it are delivered. Returns its bytes, or 0: more are needed, or the link failed. */
static size_t vkp_i_link_skip(vkp_i_link *link, const vkp_bytes *in)
{
    vkp_conn *conn = link->conn;
    vkp_bytes frame = *in;
    if (link->dropping > 0) {
        return vkp_i_link_drop(link, in);
    }
    if (!vkp_i_skip_frame(&link->skip, in->data, in->len)) {
        link->dropping = vkp_i_skip_missing(in->data, in->len, 0);
        if (link->dropping > 0) {
            return in->len;
        }
        if (in->len > link->reader->config.max_frame_bytes) {
            vkp_i_link_lose(link, "a reply above max_frame_bytes");
        }
        return 0;
    }
    frame.len = link->skip.at;
    vkp_resp_reader_reset(link->reader);
    if (!vkp_i_link_deliver_nested(link, &frame, NULL)) {
        vkp_i_link_lose(link, "a push in a reply that is over a limit");
    }
    if (link->conn != conn) {
        return 0;
    }
    vkp_i_link_skipped(link);
    return frame.len;
}

/* A reply that nobody looks into arrives; its bytes are at the start of `in`. Its form is not
   checked, so none is over a limit but that of a frame. Returns its bytes, or 0: more are needed,
   or the link failed.                                                                         */
static size_t vkp_i_link_pass(vkp_i_link *link, const vkp_bytes *in)
{
    vkp_i_request *oldest = link->flight.first;
    vkp_bytes frame = *in;
    link->answered_ns = link->loop->now_ns;
    if (memchr("+-:$*%~!=,_#(", in->data[0], 13) == NULL) {
        vkp_i_link_lose(link, "the server broke the protocol");
        return 0;
    }
    if (!vkp_i_skip_frame(&link->skip, in->data, in->len)) {
        if (in->len > link->reader->config.max_frame_bytes) {
            vkp_i_link_lose(link, "a reply above max_frame_bytes");
        }
        return 0;
    }
    frame.len = link->skip.at;
    memset(&link->skip, 0, sizeof link->skip);
    link->spoke = true;
    link->hung_up = 0;
    vkp_i_link_answered(link, oldest);
    if (--oldest->due == 0) {
        (void)vkp_i_requests_pop(&link->flight);
        oldest->settle(oldest, VKP_OK, NULL, &frame);
    }
    return frame.len;
}

/* Whether what begins with the byte is the reply of a request that nobody looks into. A push, also
   one behind an attribute, is read as ever.                                                   */
static bool vkp_i_link_is_unread(const vkp_i_link *link, uint8_t first)
{
    return link->flight.first != NULL && link->flight.first->unread && first != '>' && first != '|';
}

/* Whether the owner reads the bytes itself from here on. */
static bool vkp_i_link_is_raw(const vkp_i_link *link)
{
    return link->ops->on_bytes != NULL && link->stage == VKP_I_STAGE_READY &&
           link->flight.first == NULL;
}

static size_t vkp_i_link_on_data(vkp_conn *conn, void *user, const vkp_bytes *in)
{
    vkp_i_link *link = (vkp_i_link *)user;
    size_t used = 0;
    bool raw = vkp_i_link_is_raw(link);
    bool has_reader = link->ops->on_bytes != NULL;
    uint64_t now_ns = link->loop->now_ns;
    link->heard_ns = now_ns;
    link->ops->hold(link); /* a callback may give the last other reference back */
    while (link->conn == conn && used < in->len && !raw) {
        const vkp_value *value;
        size_t consumed;
        vkp_bytes frame;
        vkp_status status;
        frame.data = in->data + used;
        frame.len = in->len - used;
        frame.block = in->block;
        if (link->skipping || vkp_i_link_is_unread(link, in->data[used])) {
            link->answered_ns = now_ns;
            consumed =
                link->skipping ? vkp_i_link_skip(link, &frame) : vkp_i_link_pass(link, &frame);
            if (consumed == 0) {
                break;
            }
            used += consumed;
            continue;
        }
        status =
            vkp_resp_reader_scan(link->reader, in->data + used, in->len - used, &value, &consumed);
        if (status == VKP_ERR_EMPTY) {
            link->answered_ns = in->data[used] != '>' ? now_ns : link->answered_ns;
            break;
        }
        if (status != VKP_OK) {
            vkp_i_link_refuse(link, status, in->data + used, in->len - used);
            continue;
        }
        frame.len = consumed;
        used += consumed;
        vkp_i_link_value(link, value, &frame);
        raw = has_reader && vkp_i_link_is_raw(link);
    }
    if (link->demoted && link->conn == conn) { /* the command has its answer */
        vkp_i_link_lose(link, "the server is a replica now");
    }
    if (raw && link->conn == conn && used < in->len) {
        vkp_bytes rest;
        rest.data = in->data + used;
        rest.len = in->len - used;
        rest.block = in->block;
        used += link->ops->on_bytes(link, &rest);
    }
    link->ops->release(link);
    return used;
}

/* Prepare a link that is all zero; env, loop, config, ops borrowed. */
static vkp_status vkp_i_link_init(vkp_i_link *link, const vkp_env *env, vkp_loop *loop,
                                  const vkp_client_config *config, const vkp_i_link_ops *ops)
{
    const vkp_sys *sys = vkp_i_sys(env);
    link->env = env;
    link->loop = loop;
    link->config = config;
    link->ops = ops;
    link->fence_task.fn = vkp_i_link_fence_task;
    vkp_i_requests_init(&link->flight);
    (void)snprintf(link->token, sizeof link->token, "vkp-fence-%016llx",
                   (unsigned long long)sys->random_u64());
    return vkp_resp_reader_open(&config->resp, &link->reader);
}

/* Free what the link has; it is closed and its flight is empty. */
static void vkp_i_link_deinit(vkp_i_link *link)
{
    vkp_resp_reader_unref(link->reader);
    vkp_i_block_unref(link->out);
    vkp_i_free_str(link->env, link->username);
    vkp_i_free_str(link->env, link->password);
    vkp_i_free(link->env, link->known, sizeof *link->known);
}

#endif /* VKP_I_IO */
