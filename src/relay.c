#if VKP_I_IO
/* ======================================================================================
   >>impl-relay   Serve local Valkey clients over one upstream connection, or none
   ======================================================================================
   One shard per loop: a hub, a request reader, the local clients accepted there. Shard 0's loop
   carries the listeners and the upstream client.
   A local client's replies leave in the order of its commands: each command that must wait takes
   a place in `answers`; what is ready at the head is sent. Commands that depend on that order
   (the subscribe family, HELLO, RESET, QUIT) are not even parsed past while answers are out: the
   connection pauses and the bytes come again. So there is no queue of commands, ever.
   A place waits for the upstream client, whose callback runs on loop 0; it converts the reply
   there and sends the place home to the client's loop as a task.
   A topic of a shard's hub holds one interest of the upstream client; a SUBSCRIBE is confirmed
   locally when the server confirmed it, or at once when the server is away.
   Stand-alone, `census` counts subscribers over all shards, so that any shard answers PUBLISH.
   References: the relay is kept by its owner, each local client and each task between threads;
   a local client (loop's thread) by its connection, each answer and subscription under way.   */

typedef struct vkp_i_shard vkp_i_shard;
typedef struct vkp_i_local vkp_i_local;

/* How a RESP3 reply differs from RESP2's beyond its types. */
#define VKP_I_SHAPE_NULL_ARRAY 1u    /* null is *-1 */
#define VKP_I_SHAPE_FLAT 2u          /* RESP3 nests pairs in arrays */
#define VKP_I_SHAPE_PAIRS 4u         /* RESP3's map is an array of pairs */
#define VKP_I_SHAPE_NULL_ELEMENTS 8u /* null elements are *-1 */
#define VKP_I_SHAPE_NULL_LAST 16u    /* the last element, when null, is *-1 */

typedef struct vkp_i_answer {
    struct vkp_i_answer *next;
    vkp_i_task task; /* home, to the client's loop */
    vkp_i_local *local;
    size_t bytes_allocated;
    size_t asked_bytes; /* of the command */
    vkp_bytes bytes;    /* when done */
    bool done;
    uint8_t protocol;     /* the client's when it asked */
    uint32_t shape_count; /* of an EXEC: the shapes of its commands stand behind the struct */
    uint8_t shape;
} vkp_i_answer;

/* A MULTI under way: its commands, as they will be sent. */
typedef struct vkp_i_multi {
    vkp_resp_writer block;
    uint8_t *shapes;
    size_t count;
    size_t capacity;
    bool failed;
} vkp_i_multi;

#define VKP_I_LOCAL_BUSY 1u    /* a subscription is under way: paused */
#define VKP_I_LOCAL_ORDER 2u   /* paused until all answers are out */
#define VKP_I_LOCAL_FULL 4u    /* paused: too many answers, or too many bytes, are out */
#define VKP_I_LOCAL_LEAVING 8u /* drain when nothing is under way */
#define VKP_I_LOCAL_CLOSED 16u
#define VKP_I_LOCAL_FAILED 32u /* broke the protocol: read no more, drain when answers are out */

struct vkp_i_local {
    vkp_hub_member member;
    vkp_i_shard *shard;
    vkp_i_local *prev; /* of the shard */
    vkp_i_local *next;
    uint64_t id;
    uint32_t refs; /* loop's thread */
    uint32_t flags;
    vkp_i_answer *answers; /* oldest first */
    vkp_i_answer **answers_end;
    uint32_t answer_count;
    size_t asked_bytes; /* of commands whose answers are out */
    size_t held_bytes;  /* of replies that wait for an older one */
    vkp_i_multi *multi;
    vkp_resp_reader *reader; /* of a large command under way; else the shard's is used */
    char *name;
};

struct vkp_i_shard {
    vkp_relay *relay;
    vkp_loop *loop;
    vkp_hub *hub;
    vkp_i_profile *profile;
    vkp_resp_reader *reader;
    vkp_str *argv; /* of the command in hand */
    size_t argv_capacity;
    char *inline_text; /* of an inline command, unquoted */
    size_t inline_capacity;
    vkp_i_local *locals;
    size_t local_count;
    struct vkp_i_handover *handovers; /* guarded by the relay's mutex */
    bool draining;
    bool gone;           /* drained, and told */
    vkp_mpsc_tx *pushes; /* to this shard from other loops; NULL where none sends */
    vkp_push_loop *push_loop;
    vkp_i_task drain_task;
    vkp_i_task kill_task;
};

typedef struct vkp_i_subscriber_count {
    vkp_i_map_node node;
    size_t count;
} vkp_i_subscriber_count; /* its name is behind the struct */

struct vkp_relay {
    const vkp_env *env;
    size_t refs; /* atomic */
    vkp_i_shard *shards;
    size_t shard_count;
    size_t next_shard; /* loop 0's */
    vkp_registry *registry;
    vkp_gate *gate;
    size_t max_request_bytes;
    size_t max_reply_bytes;
    size_t max_subscriptions;
    vkp_client *client; /* NULL: stand-alone */
    vkp_listener **listeners;
    size_t listener_count;
    size_t listener_capacity;
    uint64_t next_id; /* atomic */
    VKP_I_MUTEX mutex;
    vkp_i_map subscribers[VKP_SUB_KINDS]; /* guarded by the mutex */
    bool draining;
    size_t live_shards; /* atomic, while draining */
    vkp_timer drain_timer;
    vkp_i_task end_task;
    void (*on_end)(void *user);
    void *end_user;
    vkp_str notice; /* for the shutdown: a copy, or NULL */
    void (*on_idle)(void *user);
    void *user;
    uint64_t linger_ms;
    uint32_t idle_queued; /* atomic */
    vkp_i_task idle_task;
    vkp_timer idle_timer; /* loop 0's */
    uint64_t messages_in; /* atomic, as all counters that follow */
    uint64_t deliveries;
    uint64_t lagged;
    uint64_t slow_closed;
    uint64_t protocol_errors;
};

static void vkp_i_relay_free(vkp_relay *relay)
{
    const vkp_env *env = relay->env;
    size_t i;
    int kind;
    for (i = 0; i < relay->shard_count; i++) {
        vkp_i_shard *shard = &relay->shards[i];
        vkp_hub_unref(shard->hub);
        vkp_resp_reader_unref(shard->reader);
        if (shard->profile != NULL) {
            vkp_i_profile_unref(shard->profile);
        }
        vkp_i_free(env, shard->argv, shard->argv_capacity * sizeof *shard->argv);
        vkp_i_free(env, shard->inline_text, shard->inline_capacity);
        vkp_loop_unref(shard->loop);
    }
    for (kind = 0; kind < VKP_SUB_KINDS; kind++) {
        vkp_i_map_deinit(&relay->subscribers[kind]);
    }
    vkp_gate_unref(relay->gate);
    vkp_registry_unref(relay->registry);
    vkp_i_free_str(env, relay->notice);
    vkp_i_free(env, relay->listeners, relay->listener_capacity * sizeof *relay->listeners);
    vkp_i_free(env, relay->shards, relay->shard_count * sizeof *relay->shards);
    VKP_I_MUTEX_DEINIT(&relay->mutex);
    vkp_i_free(env, relay, sizeof *relay);
}

static void vkp_i_relay_release(vkp_relay *relay)
{
    if (VKP_I_UNREF(&relay->refs) == 1) {
        vkp_i_relay_free(relay);
    }
}

static size_t vkp_i_relay_count_clients(const vkp_relay *relay)
{
    vkp_gate_stats stats;
    vkp_gate_get_stats(relay->gate, &stats);
    return stats.clients;
}

/* ---- answers ---- */

static void vkp_i_local_release(vkp_i_local *local)
{
    vkp_relay *relay = local->shard->relay;
    if (--local->refs == 0) {
        vkp_resp_reader_unref(local->reader);
        vkp_i_free_text(relay->env, local->name);
        vkp_i_free(relay->env, local, sizeof *local);
        vkp_i_relay_release(relay);
    }
}

static void vkp_i_local_send(vkp_i_local *local, const vkp_bytes *bytes)
{
    if (vkp_conn_send(local->member.conn, bytes) == VKP_ERR_NOMEM) {
        vkp_i_conn_close_later(local->member.conn, VKP_CLOSE_NOMEM, 0);
    }
}

static void vkp_i_local_fail(vkp_i_local *local)
{
    if ((local->flags & VKP_I_LOCAL_CLOSED) == 0) {
        vkp_i_conn_close_later(local->member.conn, VKP_CLOSE_NOMEM, 0);
    }
}

/* A client that runs ahead is not read until it is down to half of these. */
#define VKP_I_MOST_ANSWERS 1024u
#define VKP_I_MOST_ASKED ((size_t)4 << 20)
#define VKP_I_MOST_UNREAD ((size_t)1 << 20)

__attribute__((format(printf, 2, 3))) static void vkp_i_local_error(vkp_i_local *local,
                                                                    const char *format, ...);

/* Tell it why no more is answered, see vkp_relay_drain. */
static void vkp_i_local_notify(vkp_i_local *local)
{
    vkp_i_shard *shard = local->shard;
    const vkp_hub_member *member = &local->member;
    vkp_str notice = shard->relay->notice;
    if (member->protocol == 3 || member->counts[0] + member->counts[1] + member->counts[2] > 0) {
        vkp_i_message message;
        const vkp_bytes *frame;
        vkp_i_message_init(&message, "message", vkp_i_str(NULL, 0),
                           vkp_str_of(VKP_RELAY_NOTICE_CHANNEL), notice);
        frame = vkp_i_message_frame(shard->hub, &message, member->protocol);
        if (frame != NULL) {
            vkp_i_local_send(local, frame);
        }
    } else {
        vkp_i_local_error(local, "ERR %.*s", VKP_FMT(notice));
    }
}

static void vkp_i_local_leave(vkp_i_local *local)
{
    if (local->shard->draining && local->shard->relay->notice.ptr != NULL &&
        (local->flags & VKP_I_LOCAL_FAILED) == 0 && !vkp_i_conn_is_draining(local->member.conn)) {
        vkp_i_local_notify(local);
    }
    vkp_conn_drain(local->member.conn);
}

/* Go on reading, or leave, as far as nothing stands against it. */
static void vkp_i_local_maybe_resume(vkp_i_local *local)
{
    if ((local->flags & VKP_I_LOCAL_CLOSED) != 0) {
        return;
    }
    if (local->answers == NULL) {
        local->flags &= ~VKP_I_LOCAL_ORDER;
    }
    if ((local->flags & VKP_I_LOCAL_FULL) != 0 &&
        vkp_i_conn_get_queued_bytes(local->member.conn) > VKP_I_MOST_UNREAD / 2) {
        vkp_i_conn_flush(local->member.conn); /* what it cannot take, on_drain tells of */
    }
    if (local->answer_count < VKP_I_MOST_ANSWERS / 2 &&
        local->asked_bytes <= VKP_I_MOST_ASKED / 2 &&
        vkp_i_conn_get_queued_bytes(local->member.conn) <= VKP_I_MOST_UNREAD / 2) {
        local->flags &= ~VKP_I_LOCAL_FULL;
    }
    if ((local->flags & (VKP_I_LOCAL_BUSY | VKP_I_LOCAL_ORDER | VKP_I_LOCAL_FULL)) != 0) {
        return;
    }
    if ((local->flags & (VKP_I_LOCAL_FAILED | VKP_I_LOCAL_LEAVING)) != 0) {
        if (local->answers == NULL) { /* input that is left is no whole command */
            vkp_i_local_leave(local);
        }
        return;
    }
    vkp_conn_resume(local->member.conn);
}

static void vkp_i_local_pause(vkp_i_local *local, uint32_t why)
{
    local->flags |= why;
    vkp_conn_pause(local->member.conn);
}

/* Replies pile up: write what the kernel takes, and read no more commands before the rest went
   (on_drain tells).                                                                           */
static void vkp_i_local_throttle(vkp_i_local *local)
{
    vkp_conn *conn = local->member.conn;
    if (vkp_i_conn_get_queued_bytes(conn) > VKP_I_MOST_UNREAD) {
        vkp_i_conn_flush(conn);
    }
    if (vkp_i_conn_get_queued_bytes(conn) > VKP_I_MOST_UNREAD) {
        vkp_i_local_pause(local, VKP_I_LOCAL_FULL);
    }
}

static void vkp_i_answer_free(vkp_i_answer *answer)
{
    vkp_i_local *local = answer->local;
    vkp_bytes_unref(&answer->bytes);
    vkp_i_free(local->shard->relay->env, answer, answer->bytes_allocated);
    vkp_i_local_release(local);
}

static void vkp_i_local_flush_answers(vkp_i_local *local)
{
    local->refs++;
    while (local->answers != NULL && local->answers->done) {
        vkp_i_answer *answer = local->answers;
        local->answers = answer->next;
        if (local->answers == NULL) {
            local->answers_end = &local->answers;
        }
        local->answer_count--;
        local->asked_bytes -= answer->asked_bytes;
        local->held_bytes -= answer->bytes.len;
        if ((local->flags & VKP_I_LOCAL_CLOSED) == 0) {
            vkp_i_local_send(local, &answer->bytes);
        }
        vkp_i_answer_free(answer);
    }
    vkp_i_local_maybe_resume(local);
    vkp_i_local_release(local);
}

/* A new place at the end of the stream, or NULL: the connection is doomed then. */
static vkp_i_answer *vkp_i_answer_new(vkp_i_local *local, size_t shape_count)
{
    size_t bytes = sizeof(vkp_i_answer) + shape_count;
    vkp_i_answer *answer = (vkp_i_answer *)vkp_i_alloc_zero(local->shard->relay->env, bytes);
    if (answer == NULL) {
        vkp_i_local_fail(local);
        return NULL;
    }
    answer->bytes_allocated = bytes;
    answer->local = local;
    answer->protocol = (uint8_t)local->member.protocol;
    answer->shape_count = (uint32_t)shape_count;
    local->refs++;
    *local->answers_end = answer;
    local->answers_end = &answer->next;
    local->answer_count++;
    if (local->answer_count >= VKP_I_MOST_ANSWERS) {
        vkp_i_local_pause(local, VKP_I_LOCAL_FULL);
    }
    return answer;
}

/* Answer now, behind what is still out. Takes the reference. */
static void vkp_i_local_answer(vkp_i_local *local, vkp_bytes bytes)
{
    vkp_i_answer *answer;
    if (local->answers == NULL) {
        vkp_i_local_send(local, &bytes);
        vkp_bytes_unref(&bytes);
        vkp_i_local_throttle(local);
        return;
    }
    answer = vkp_i_answer_new(local, 0);
    if (answer == NULL) {
        vkp_bytes_unref(&bytes);
        return;
    }
    answer->bytes = bytes;
    answer->done = true;
    local->held_bytes += bytes.len;
}

static void vkp_i_local_answer_static(vkp_i_local *local, const char *text)
{
    vkp_i_local_answer(local, vkp_bytes_static(text, strlen(text)));
}

static void vkp_i_local_answer_writer(vkp_i_local *local, vkp_resp_writer *writer)
{
    vkp_bytes bytes;
    if (vkp_resp_writer_take(writer, &bytes) != VKP_OK) {
        vkp_i_local_fail(local);
        return;
    }
    vkp_i_local_answer(local, bytes);
}

/* "-<text>": control bytes of what a client sent are not sent back. */
static vkp_bytes vkp_i_error_bytes(const vkp_env *env, char *text)
{
    vkp_resp_writer writer;
    vkp_bytes bytes;
    char *at;
    for (at = text; *at != '\0'; at++) {
        *at = (unsigned char)*at < 0x20 || *at == 0x7f ? ' ' : *at;
    }
    vkp_resp_writer_init(&writer, env);
    vkp_resp_put_error(&writer, vkp_str_of(text));
    if (vkp_resp_writer_take(&writer, &bytes) != VKP_OK) {
        static const char none[] = "-ERR out of memory\r\n";
        bytes = vkp_bytes_static(none, sizeof none - 1);
    }
    return bytes;
}

__attribute__((format(printf, 2, 3))) static void vkp_i_local_error(vkp_i_local *local,
                                                                    const char *format, ...)
{
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    (void)vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    vkp_i_local_answer(local, vkp_i_error_bytes(local->shard->relay->env, text));
}

#define VKP_I_SHORT(s) (int)VKP_I_MIN((s).len, (size_t)64), (s).ptr

/* A command's name as servers spell it in their errors. */
typedef struct vkp_i_verb {
    char text[65];
} vkp_i_verb;

static vkp_i_verb vkp_i_verb_of(vkp_str name)
{
    vkp_i_verb verb;
    size_t len = VKP_I_MIN(name.len, sizeof verb.text - 1);
    size_t i;
    for (i = 0; i < len; i++) {
        verb.text[i] = vkp_i_lower(name.ptr[i]);
    }
    verb.text[len] = '\0';
    return verb;
}

#endif /* VKP_I_IO */
