#if VKP_I_IO
/* ======================================================================================
   >>impl-relay-session   Relay: connections to the server that carry one client
   ======================================================================================
   What a command does to its connection must not reach other clients, and what blocks a connection
   must not keep them waiting. Such a command gets a session: a connection of its own, on the loop
   of its client and in the client's protocol, so that what the server sends passes as bytes; only
   the ends of frames are looked for. While a session lasts all commands of the client go that way
   but those that the relay answers itself.
   The states of a session, and what ends them:
     OPENING  the link logs in, the client is paused. Ready: SERVING, and the client's bytes are
              read again. Down: the next try, until relay->hold_ms have passed; then the
              client is closed.
     SERVING  each command has a call; a frame that is no push answers the oldest one, and says by
              vkp_i_effects what is left of the connection's state. Nothing is in flight and no
              state is left for VKP_I_SESSION_IDLE_MS: POOLED, and the client shares again. Down:
              the client is closed, as the server's death would.
     TUNNEL   behind MONITOR, CLIENT REPLY and SCRIPT DEBUG the replies cannot be counted: all
              frames pass in both directions until one side closes, or the client sends what a
              relay denies. Messages of the relay stand between.
     POOLED   without a client, for the next one of this loop. Down: the end.
   The relay counts the sessions of all loops in private_count. Everything else is the loop's
   thread's.                                                                                   */

#define VKP_I_SESSION_IDLE_MS 5000u /* how long a client keeps a session that it does not need */
#define VKP_I_SESSION_RETRY_MS 20u  /* between two tries to connect */
#define VKP_I_SESSION_POOL 8u       /* most sessions that one loop keeps without a client */

/* Bits of vkp_i_session.state: what the server's connection has that outlives a command. */
#define VKP_I_STATE_MULTI 1u
#define VKP_I_STATE_WATCH 2u
#define VKP_I_STATE_DATABASE 4u /* another one than 0 */
#define VKP_I_STATE_TRACKING 8u
#define VKP_I_STATE_STAYS 16u /* ends with the connection only: a login, flags */

/* Bits of vkp_i_call.flags. */
#define VKP_I_CALL_HIDDEN 1u  /* the relay's own command: the reply is not passed on */
#define VKP_I_CALL_MUST 2u    /* HIDDEN: an error ends the session */
#define VKP_I_CALL_BLOCKS 4u  /* may be answered late, or never */
#define VKP_I_CALL_ABORTS 8u  /* EXECABORT has the effect too */
#define VKP_I_CALL_TUNNEL 16u /* TUNNEL follows */
#define VKP_I_CALL_BEFORE 64u /* HIDDEN: an error is the answer of the next call, in its place */
#define VKP_I_CALL_LOGIN 32u  /* HELLO with AUTH: the relay greets in place of the server */

/* One command in flight. */
typedef struct vkp_i_call {
    uint32_t bytes; /* of the command */
    uint8_t set;    /* VKP_I_STATE_* that a reply without an error sets */
    uint8_t clear;  /* and clears */
    uint8_t flags;  /* VKP_I_CALL_* */
    uint32_t asked; /* when, in 2^VKP_I_CALL_SHIFT ns of the loop's clock, cut to 32 bits */
} vkp_i_call;

#define VKP_I_CALL_SHIFT 10u

/* What a command does to its connection. */
typedef struct vkp_i_effect {
    const char *name;
    const char *sub;  /* the second word; NULL: any */
    const char *word; /* the third word for this row, or the second one without `sub`; NULL: any */
    uint8_t set;
    uint8_t clear;
    uint8_t flags; /* VKP_I_CALL_* */
} vkp_i_effect;

/* The first row that fits counts. */
static const vkp_i_effect vkp_i_effects[] = {
    {"MULTI", NULL, NULL, VKP_I_STATE_MULTI, 0, 0},
    {"EXEC", NULL, NULL, 0, VKP_I_STATE_MULTI | VKP_I_STATE_WATCH, VKP_I_CALL_ABORTS},
    {"DISCARD", NULL, NULL, 0, VKP_I_STATE_MULTI | VKP_I_STATE_WATCH, 0},
    {"WATCH", NULL, NULL, VKP_I_STATE_WATCH, 0, 0},
    {"UNWATCH", NULL, NULL, 0, VKP_I_STATE_WATCH, 0},
    {"SELECT", NULL, "0", 0, VKP_I_STATE_DATABASE, 0},
    {"SELECT", NULL, NULL, VKP_I_STATE_DATABASE, 0, 0},
    {"AUTH", NULL, NULL, VKP_I_STATE_STAYS, 0, 0},
    {"ASKING", NULL, NULL, VKP_I_STATE_STAYS, 0, 0},
    {"READONLY", NULL, NULL, VKP_I_STATE_STAYS, 0, 0},
    {"READWRITE", NULL, NULL, VKP_I_STATE_STAYS, 0, 0},
    {"MONITOR", NULL, NULL, VKP_I_STATE_STAYS, 0, VKP_I_CALL_TUNNEL},
    {"SCRIPT", "DEBUG", "NO", 0, 0, 0},
    {"SCRIPT", "DEBUG", NULL, VKP_I_STATE_STAYS, 0, VKP_I_CALL_TUNNEL},
    {"CLIENT", "TRACKING", "OFF", 0, VKP_I_STATE_TRACKING, 0},
    {"CLIENT", "TRACKING", NULL, VKP_I_STATE_TRACKING, 0, 0},
    {"CLIENT", "REPLY", "ON", 0, 0, 0},
    {"CLIENT", "CAPA", NULL, VKP_I_STATE_STAYS, 0, 0},
    {"CLIENT", "IMPORT-SOURCE", NULL, VKP_I_STATE_STAYS, 0, 0},
    {"CLIENT", "NO-EVICT", NULL, VKP_I_STATE_STAYS, 0, 0},
    {"CLIENT", "NO-TOUCH", NULL, VKP_I_STATE_STAYS, 0, 0}};

typedef enum vkp_i_session_stage {
    VKP_I_SESSION_OPENING,
    VKP_I_SESSION_SERVING,
    VKP_I_SESSION_TUNNEL,
    VKP_I_SESSION_POOLED
} vkp_i_session_stage;

struct vkp_i_session {
    vkp_i_link link;
    vkp_i_shard *shard;
    vkp_i_local *local;  /* no reference; NULL: POOLED, or ended */
    vkp_i_session *next; /* of shard->pool */
    size_t refs;         /* of the client or the pool, and of vkp_i_link_ops.hold */
    vkp_i_session_stage stage;
    uint8_t state;        /* VKP_I_STATE_* */
    bool used;            /* has had a state that no command ends */
    bool named;           /* has a name on the server */
    bool multi_sent;      /* MULTI was sent, and neither EXEC nor DISCARD behind it */
    uint8_t protocol;     /* 2 or 3; what the server was asked for */
    uint32_t blocking;    /* BLOCKS calls in flight */
    vkp_i_call *calls;    /* a ring: commands in flight, oldest first */
    size_t call_capacity; /* a power of two, or 0 */
    size_t call_first;    /* index of the oldest */
    size_t call_count;
    vkp_i_skip skip;      /* in the frame that arrives */
    vkp_timer timer;      /* OPENING: the next try, or the end; SERVING: the end of idling */
    uint64_t deadline_ns; /* OPENING: the last try; SERVING: when idling ends */
    uint32_t database;    /* that the client selected last */
    int login_protocol;   /* of the HELLO with AUTH that is in flight */
};

static vkp_i_session *vkp_i_session_of(vkp_i_link *link)
{
    return VKP_CONTAINER(link, vkp_i_session, link);
}

static void vkp_i_session_hold(vkp_i_link *link)
{
    vkp_i_session_of(link)->refs++;
}

static void vkp_i_session_release(vkp_i_link *link)
{
    vkp_i_session *session = vkp_i_session_of(link);
    vkp_relay *relay = session->shard->relay;
    if (--session->refs == 0) {
        vkp_i_link_deinit(&session->link);
        vkp_i_free(relay->env, session->calls, session->call_capacity * sizeof *session->calls);
        vkp_i_free(relay->env, session, sizeof *session);
        vkp_i_relay_release(relay);
    }
}

/* Nobody waits for the replies of the calls any more. */
static void vkp_i_session_forget_calls(vkp_i_session *session)
{
    while (session->call_count > 0) {
        session->local->asked_bytes -= session->calls[session->call_first].bytes;
        session->local->answer_count--;
        VKP_I_TALLY(session->shard->tally.in_flight, (size_t)-1);
        session->call_first = (session->call_first + 1) & (session->call_capacity - 1);
        session->call_count--;
    }
    session->blocking = 0;
}

/* Take the session from its client. */
static void vkp_i_session_detach(vkp_i_session *session)
{
    if (session->local != NULL) {
        vkp_i_session_forget_calls(session);
        session->local->flags &= ~VKP_I_LOCAL_OPENING;
        session->local->session = NULL;
        session->local->unsent_bytes = 0;
        session->local = NULL;
    }
}

/* Whether nobody counts the replies that the client gets. */
static bool vkp_i_local_in_tunnel(const vkp_i_local *local)
{
    return local->session != NULL && local->session->stage == VKP_I_SESSION_TUNNEL;
}

/* All bytes pass from here on. */
static void vkp_i_session_tunnel(vkp_i_session *session)
{
    vkp_i_session_forget_calls(session);
    session->used = true;
    session->stage = VKP_I_SESSION_TUNNEL;
}

/* Take the session from the pool, if it is there. */
static void vkp_i_session_unpool(vkp_i_session *session)
{
    vkp_i_session **at = &session->shard->pool;
    if (session->stage != VKP_I_SESSION_POOLED) {
        return;
    }
    while (*at != session) {
        at = &(*at)->next;
    }
    *at = session->next;
    session->shard->pool_count--;
}

/* End the session: it has no client and is not in the pool afterwards. */
static void vkp_i_session_end(vkp_i_session *session)
{
    vkp_i_request *request;
    vkp_i_session_detach(session);
    vkp_i_session_unpool(session);
    session->stage = VKP_I_SESSION_OPENING;
    vkp_timer_stop(&session->timer);
    vkp_i_link_close(&session->link);
    while ((request = vkp_i_requests_pop(&session->link.flight)) != NULL) {
        request->settle(request, VKP_ERR_CLOSED, NULL, NULL); /* of the handshake */
    }
    (void)VKP_I_SUB(&session->shard->relay->private_count, (size_t)1);
    vkp_i_session_release(&session->link);
}

/* Whether nothing of the client is left on the session's connection. */
static bool vkp_i_session_is_clean(const vkp_i_session *session)
{
    return session->stage == VKP_I_SESSION_SERVING && session->call_count == 0 &&
           session->state == 0 && !session->used && session->skip.at == 0 &&
           !session->skip.inside && !vkp_i_conn_is_paused(session->link.conn);
}

/* The client no longer needs the session, or is gone: keep it for another one, or end it. */
static void vkp_i_session_give_back(vkp_i_session *session)
{
    vkp_i_shard *shard = session->shard;
    if (!vkp_i_session_is_clean(session) || shard->draining ||
        shard->pool_count >= VKP_I_SESSION_POOL) {
        vkp_i_session_end(session);
        return;
    }
    vkp_i_session_detach(session);
    vkp_timer_stop(&session->timer);
    session->stage = VKP_I_SESSION_POOLED;
    session->next = shard->pool;
    shard->pool = session;
    shard->pool_count++;
}

/* End what a loop keeps without clients. */
static void vkp_i_shard_end_pool(vkp_i_shard *shard)
{
    while (shard->pool != NULL) {
        vkp_i_session_end(shard->pool);
    }
}

/* The local client has no session any more. */
static void vkp_i_local_end_session(vkp_i_local *local)
{
    if (local->session != NULL) {
        vkp_i_session_give_back(local->session);
    }
}

/* Close the client as the server's death would: what it has is written first. */
static void vkp_i_session_close_client(vkp_i_session *session)
{
    vkp_i_local *local = session->local;
    vkp_i_session_end(session);
    if (local != NULL) {
        (void)VKP_I_ADD(&local->shard->relay->lost, (uint64_t)1);
        vkp_conn_drain(local->member.conn);
    }
}

/* ---- sending ---- */

/* Append a call. False: no memory. */
static bool vkp_i_session_put_call(vkp_i_session *session, vkp_i_call call)
{
    const vkp_env *env = session->shard->relay->env;
    size_t capacity = session->call_capacity;
    size_t i;
    if (session->call_count == capacity) {
        size_t larger = capacity > 0 ? capacity * 2 : 8;
        vkp_i_call *calls = (vkp_i_call *)vkp_i_alloc(env, larger * sizeof *calls);
        if (calls == NULL) {
            return false;
        }
        for (i = 0; i < session->call_count; i++) {
            calls[i] = session->calls[(session->call_first + i) & (capacity - 1)];
        }
        vkp_i_free(env, session->calls, capacity * sizeof *calls);
        session->calls = calls;
        session->call_capacity = larger;
        session->call_first = 0;
    }
    i = (session->call_first + session->call_count++) & (session->call_capacity - 1);
    session->calls[i] = call;
    return true;
}

/* Send the bytes of one command. On failure the client closes later. */
static void vkp_i_session_send(vkp_i_session *session, vkp_i_call call, const vkp_bytes *bytes)
{
    vkp_i_local *local = session->local;
    size_t unsent;
    call.bytes = (uint32_t)bytes->len; /* max_request_bytes is below 2 GiB */
    call.asked = (uint32_t)(session->shard->loop->now_ns >> VKP_I_CALL_SHIFT);
    if (session->stage != VKP_I_SESSION_TUNNEL) {
        if (!vkp_i_session_put_call(session, call)) {
            vkp_i_local_fail(local);
            return;
        }
        session->blocking += (call.flags & VKP_I_CALL_BLOCKS) != 0 ? 1u : 0u;
        vkp_i_shard_count_asked(session->shard, VKP_RELAY_PRIVATE,
                                (call.flags & VKP_I_CALL_HIDDEN) == 0 ? 1u : 0u);
        local->answer_count++;
        local->asked_bytes += bytes->len;
        if (local->answer_count >= VKP_I_MOST_ANSWERS || local->asked_bytes > VKP_I_MOST_ASKED) {
            vkp_i_local_pause(local, VKP_I_LOCAL_FULL);
        }
    }
    if (vkp_conn_send(session->link.conn, bytes) == VKP_ERR_NOMEM) {
        vkp_i_local_fail(local);
    }
    unsent = vkp_i_conn_get_queued_bytes(session->link.conn);
    if (unsent > VKP_I_ROOM_FREE) { /* only what the kernel refuses comes to on_written */
        vkp_i_conn_flush(session->link.conn);
        unsent = vkp_i_conn_get_queued_bytes(session->link.conn);
    }
    local->unsent_bytes = (uint32_t)VKP_I_MIN(unsent, (size_t)UINT32_MAX);
    if (unsent > VKP_I_MOST_ASKED) {
        vkp_i_local_pause(local, VKP_I_LOCAL_FULL);
    }
}

/* Send a command of the relay itself. */
static void vkp_i_session_tell(vkp_i_session *session, uint32_t flags, size_t argc,
                               const vkp_str *argv)
{
    vkp_resp_writer writer;
    vkp_bytes bytes;
    vkp_i_call call = VKP_ZERO;
    call.flags = (uint8_t)(VKP_I_CALL_HIDDEN | flags);
    vkp_resp_writer_init(&writer, session->shard->relay->env);
    vkp_i_put_command(&writer, argc, argv);
    if (vkp_resp_writer_take(&writer, &bytes) != VKP_OK) {
        vkp_i_local_fail(session->local);
        return;
    }
    vkp_i_session_send(session, call, &bytes);
    vkp_bytes_unref(&bytes);
}

/* Give the server's connection the client's name, if it has another one. */
static void vkp_i_session_name(vkp_i_session *session)
{
    const char *name = session->local->name;
    vkp_str argv[3];
    if (name != NULL || session->named) {
        argv[0] = vkp_str_of("CLIENT");
        argv[1] = vkp_str_of("SETNAME");
        argv[2] = vkp_str_of(name != NULL ? name : "");
        session->named = name != NULL;
        vkp_i_session_tell(session, 0, 3, argv);
    }
}

/* The row of the command, or NULL. */
static const vkp_i_effect *vkp_i_effect_find(size_t argc, const vkp_str *argv)
{
    size_t i;
    for (i = 0; i < sizeof vkp_i_effects / sizeof vkp_i_effects[0]; i++) {
        const vkp_i_effect *row = &vkp_i_effects[i];
        size_t word = row->sub != NULL ? 2 : 1;
        if (vkp_i_str_is(argv[0], row->name) &&
            (row->sub == NULL || (argc > 1 && vkp_i_str_is(argv[1], row->sub))) &&
            (row->word == NULL || (argc > word && vkp_i_str_is(argv[word], row->word)))) {
            return row;
        }
    }
    return NULL;
}

/* Whether what follows the command depends on it: when it is refused, nothing may follow. */
static bool vkp_i_command_is_state(size_t argc, const vkp_str *argv)
{
    const vkp_i_effect *effect = vkp_i_effect_find(argc, argv);
    return (effect != NULL && (effect->set != 0 || (effect->flags & VKP_I_CALL_TUNNEL) != 0)) ||
           (vkp_i_str_is(argv[0], "CLIENT") && argc > 1 && vkp_i_str_is(argv[1], "REPLY"));
}

/* The number of a database, as SELECT has it; 0: none. */
static uint32_t vkp_i_database_of(vkp_str text)
{
    uint32_t number = 0;
    size_t i;
    for (i = 0; i < text.len && i < 9; i++) {
        if (text.ptr[i] < '0' || text.ptr[i] > '9') {
            return 0;
        }
        number = number * 10 + (uint32_t)(text.ptr[i] - '0');
    }
    return number;
}

/* Send a command of the client. */
static void vkp_i_session_ask(vkp_i_session *session, size_t argc, const vkp_str *argv,
                              const vkp_bytes *bytes)
{
    bool refused = /* whatever the transaction is: EXEC alone ends it then */
        argc > 1 && (vkp_i_str_is(argv[0], "MULTI") || vkp_i_str_is(argv[0], "DISCARD"));
    const vkp_i_effect *effect = refused ? NULL : vkp_i_effect_find(argc, argv);
    vkp_i_call call = VKP_ZERO;
    if (vkp_i_command_get_sharing(argc, argv) == VKP_I_SHARING_BLOCKS) {
        call.flags = VKP_I_CALL_BLOCKS;
    }
    if (effect != NULL) {
        call.set = effect->set;
        call.clear = effect->clear;
        call.flags |= effect->flags;
    }
    if ((call.set & VKP_I_STATE_MULTI) != 0) {
        session->multi_sent = true;
    } else if ((call.clear & VKP_I_STATE_MULTI) != 0) {
        session->multi_sent = false;
    } else if (session->multi_sent) { /* takes effect at EXEC, if at all */
        session->used = session->used || call.set != 0;
        session->state |= call.set != 0 ? VKP_I_STATE_STAYS : 0u;
        call.set = 0;
        call.clear = 0;
        call.flags = 0;
    }
    if (effect != NULL && ((effect->set | effect->clear) & VKP_I_STATE_DATABASE) != 0 &&
        argc == 2) {
        session->database = vkp_i_database_of(argv[1]);
    }
    if (vkp_i_command_is_wait(argc, argv) && !session->multi_sent) { /* writes were shared */
        vkp_bytes catch_up = vkp_bytes_static(vkp_i_catch_up, sizeof vkp_i_catch_up - 1);
        vkp_i_call hidden = VKP_ZERO;
        hidden.flags = VKP_I_CALL_HIDDEN | VKP_I_CALL_BEFORE;
        vkp_i_session_send(session, hidden, &catch_up);
    }
    vkp_i_session_send(session, call, bytes);
    if (vkp_i_str_is(argv[0], "CLIENT") && argc > 2 && vkp_i_str_is(argv[1], "REPLY") &&
        !vkp_i_str_is(argv[2], "ON")) {
        vkp_i_session_tunnel(session); /* no reply says so */
    }
}

/* The client says HELLO, perhaps with a name, which it has already: so does the relay to the
   server. login: user and password, or NULL.                                                  */
static void vkp_i_session_greet(vkp_i_session *session, int protocol, const vkp_str *login)
{
    vkp_str argv[5];
    argv[0] = vkp_str_of("HELLO");
    argv[1] = vkp_str_of(protocol == 3 ? "3" : "2");
    if (login != NULL) {
        vkp_resp_writer writer;
        vkp_bytes bytes;
        vkp_i_call call = VKP_ZERO;
        call.set = VKP_I_STATE_STAYS;
        call.flags = VKP_I_CALL_LOGIN;
        argv[2] = vkp_str_of("AUTH");
        argv[3] = login[0];
        argv[4] = login[1];
        session->login_protocol = protocol;
        vkp_resp_writer_init(&writer, session->shard->relay->env);
        vkp_i_put_command(&writer, 5, argv);
        if (vkp_resp_writer_take(&writer, &bytes) != VKP_OK) {
            vkp_i_local_fail(session->local);
            return;
        }
        vkp_i_session_send(session, call, &bytes);
        vkp_bytes_unref(&bytes);
    } else if (protocol != session->protocol) {
        session->protocol = (uint8_t)protocol;
        vkp_i_session_tell(session, VKP_I_CALL_MUST, 2, argv);
    }
    vkp_i_session_name(session);
}

/* Begin a transaction of which the client has the answers: MULTI and the commands behind it,
   `count` in all.                                                                             */
static void vkp_i_session_begin_multi(vkp_i_session *session, const vkp_bytes *block, size_t count)
{
    vkp_i_call call = VKP_ZERO;
    call.set = VKP_I_STATE_MULTI;
    call.flags = VKP_I_CALL_HIDDEN;
    session->multi_sent = true;
    vkp_i_session_send(session, call, block);
    for (call.set = 0, call.bytes = 0; count > 1; count--) {
        if (!vkp_i_session_put_call(session, call)) {
            vkp_i_local_fail(session->local);
            return;
        }
        session->local->answer_count++;
    }
}

/* A command in the transaction was refused: a command that the server refuses makes EXEC fail. */
static void vkp_i_session_fail_multi(vkp_i_session *session)
{
    vkp_str verb = vkp_str_of("valkey-push-refused");
    if (session->multi_sent) {
        vkp_i_session_tell(session, 0, 1, &verb);
    }
}

/* Whether the session's server may be silent for long: the client's end must not wait for it. */
static bool vkp_i_session_may_wait(const vkp_i_session *session)
{
    return session->blocking > 0 || session->stage != VKP_I_SESSION_SERVING;
}

/* ---- receiving ---- */

/* The handshake is behind: free what only that needed, because there may be many sessions. */
static void vkp_i_session_shrink(vkp_i_session *session)
{
    vkp_resp_reader_unref(session->link.reader);
    session->link.reader = NULL;
    vkp_i_block_unref(session->link.out);
    session->link.out = NULL;
}

/* A client that is paused behind what blocks is read ahead: when it goes, the server must not give
   to it what it waits for.                                                                    */
static void vkp_i_local_look_ahead(vkp_i_local *local)
{
    if ((local->flags & VKP_I_LOCAL_CLOSED) == 0) {
        vkp_i_conn_read_ahead(local->member.conn, (local->flags & VKP_I_LOCAL_PAUSED) != 0 &&
                                                      local->session != NULL &&
                                                      local->session->blocking > 0);
    }
}

/* The client took what it had: read the server again. */
static void vkp_i_session_resume(vkp_i_session *session)
{
    vkp_conn_resume(session->link.conn);
}

/* Pass bytes on to the client; a client that does not read stops the server. */
static void vkp_i_session_pass(vkp_i_session *session, const vkp_bytes *bytes)
{
    vkp_i_local *local = session->local;
    vkp_i_local_send(local, bytes);
    if (vkp_i_conn_get_queued_bytes(local->member.conn) > VKP_I_MOST_UNREAD) {
        vkp_i_conn_flush(local->member.conn);
    }
    if (vkp_i_conn_get_queued_bytes(local->member.conn) > VKP_I_MOST_UNREAD) {
        vkp_conn_pause(session->link.conn);
    }
}

/* HELLO with AUTH was answered. */
static void vkp_i_session_logged_in(vkp_i_session *session)
{
    vkp_i_local *local = session->local;
    session->protocol = (uint8_t)session->login_protocol;
    local->member.protocol = session->login_protocol;
    vkp_i_local_greet(local);
}

/* Whether an error says that a transaction is over; others, such as "EXEC without MULTI", leave the
   connection as it was.                                                                       */
static bool vkp_i_frame_is_abort(const vkp_bytes *frame)
{
    static const char text[] = "-EXECABORT";
    return frame->len >= sizeof text && memcmp(frame->data, text, sizeof text - 1) == 0;
}

/* Count the reply; its time unless it may have blocked, or the client did not ask. */
static void vkp_i_session_count_reply(vkp_i_session *session, vkp_i_call call)
{
    uint64_t now_ns = session->shard->loop->now_ns;
    uint32_t took = (uint32_t)(now_ns >> VKP_I_CALL_SHIFT) - call.asked;
    bool timed = (call.flags & (VKP_I_CALL_BLOCKS | VKP_I_CALL_HIDDEN)) == 0;
    vkp_i_shard_count_reply(session->shard, VKP_RELAY_PRIVATE,
                            timed ? now_ns - ((uint64_t)took << VKP_I_CALL_SHIFT) : 0);
}

/* A frame that answers the oldest call. */
static void vkp_i_session_reply(vkp_i_session *session, const vkp_bytes *frame, bool error)
{
    vkp_i_local *local = session->local;
    vkp_i_call call = session->calls[session->call_first];
    session->call_first = (session->call_first + 1) & (session->call_capacity - 1);
    session->call_count--;
    session->blocking -= (call.flags & VKP_I_CALL_BLOCKS) != 0 ? 1u : 0u;
    local->answer_count--;
    local->asked_bytes -= call.bytes;
    vkp_i_session_count_reply(session, call);
    if (error && (call.flags & VKP_I_CALL_MUST) != 0) {
        vkp_i_session_close_client(session);
        return;
    }
    if (!error || ((call.flags & VKP_I_CALL_ABORTS) != 0 && vkp_i_frame_is_abort(frame))) {
        session->state = (uint8_t)((session->state | call.set) & ~call.clear);
        session->used =
            session->used || (session->state & (VKP_I_STATE_STAYS | VKP_I_STATE_TRACKING)) != 0;
        if ((call.flags & VKP_I_CALL_TUNNEL) != 0) {
            vkp_i_session_tunnel(session);
        }
    }
    if (error && (call.flags & VKP_I_CALL_BEFORE) != 0 && session->call_count > 0) {
        session->calls[session->call_first].flags |= VKP_I_CALL_HIDDEN;
        vkp_i_session_pass(session, frame);
    } else if ((call.flags & VKP_I_CALL_LOGIN) != 0 && !error) {
        vkp_i_session_logged_in(session);
    } else if ((call.flags & VKP_I_CALL_HIDDEN) == 0) {
        vkp_i_session_pass(session, frame);
    }
}

static void vkp_i_session_on_timer(vkp_timer *timer);

/* Start the timer. False: no memory; the client is closed, since its session would have no end. */
static bool vkp_i_session_start_timer(vkp_i_session *session, uint64_t deadline_ns)
{
    if (vkp_timer_start(&session->timer, session->shard->loop, vkp_i_session_on_timer, 0,
                        deadline_ns) != VKP_OK) {
        vkp_i_local_fail(session->local);
        return false;
    }
    return true;
}

/* Nothing is in flight: the client shares again when this stays so. */
static void vkp_i_session_idles(vkp_i_session *session)
{
    session->deadline_ns = vkp_i_after_ms(session->shard->loop->now_ns, VKP_I_SESSION_IDLE_MS);
    if (session->state == 0 && session->timer.i_index == 0) {
        (void)vkp_i_session_start_timer(session, session->deadline_ns);
    }
}

/* Read whole frames. Returns the bytes used. */
static size_t vkp_i_session_read(vkp_i_session *session, const vkp_bytes *in)
{
    size_t used = 0;
    while (used < in->len && session->local != NULL && !vkp_i_conn_is_paused(session->link.conn) &&
           vkp_i_skip_frame(&session->skip, in->data + used, in->len - used)) {
        vkp_bytes frame;
        uint8_t type;
        frame.data = in->data + used;
        frame.len = session->skip.at;
        frame.block = in->block;
        used += frame.len;
        memset(&session->skip, 0, sizeof session->skip);
        type = vkp_i_frame_type(frame.data, frame.len);
        if (type == '>' || session->stage == VKP_I_SESSION_TUNNEL) {
            vkp_i_session_pass(session, &frame);
        } else if (session->call_count > 0) {
            vkp_i_session_reply(session, &frame, type == '-' || type == '!');
        } else {
            vkp_i_log(session->shard->relay->env, VKP_LOG_WARN,
                      "client %llu: a reply that nobody asked for on its own connection",
                      (unsigned long long)session->local->id);
            vkp_i_session_pass(session, &frame); /* a server that says why it closes */
        }
    }
    return used;
}

static size_t vkp_i_session_on_bytes(vkp_i_link *link, const vkp_bytes *in)
{
    vkp_i_session *session = vkp_i_session_of(link);
    vkp_i_local *local = session->local;
    size_t used;
    if (session->stage == VKP_I_SESSION_POOLED) {
        vkp_i_session_end(session); /* nothing was asked for */
        return in->len;
    }
    vkp_i_session_shrink(session);
    used = vkp_i_session_read(session, in);
    if (session->local != NULL) {
        if (session->call_count == 0) {
            vkp_i_session_idles(session);
        }
        vkp_i_local_look_ahead(local);
        vkp_i_local_maybe_resume(local);
    }
    return used;
}

/* ---- opening ---- */

/* No connection can be had: the client is closed, with the server's words if it had any. */
static void vkp_i_session_give_up(vkp_i_session *session)
{
    vkp_i_local *local = session->local;
    const vkp_i_link *link = &session->link;
    vkp_i_log(session->shard->relay->env, VKP_LOG_INFO, "client %llu: no connection of its own: %s",
              (unsigned long long)local->id, link->error);
    if (link->spoke) {
        vkp_i_local_error(local, "DENIED the relay cannot log in for this client: %s", link->error);
    }
    vkp_i_session_close_client(session);
}

/* A try failed: another one follows, or none. */
static void vkp_i_session_failed(vkp_i_session *session)
{
    uint64_t next_ns = vkp_i_after_ms(vkp_i_loop_now(session->shard->loop), VKP_I_SESSION_RETRY_MS);
    if (next_ns < session->deadline_ns) {
        (void)vkp_i_session_start_timer(session, next_ns);
    } else {
        vkp_i_session_give_up(session);
    }
}

/* Try to connect, with the credentials that count now. */
static void vkp_i_session_try(vkp_i_session *session)
{
    const vkp_client_config *config = session->link.config;
    vkp_relay *relay = session->shard->relay;
    vkp_client_target *login = NULL;
    bool given;
    vkp_status status = VKP_ERR_NOMEM;
    VKP_I_LOCK(&relay->mutex);
    given = relay->login != NULL;
    if (given) {
        login = vkp_i_login_new(relay->env, relay->login->username, relay->login->password);
    }
    VKP_I_UNLOCK(&relay->mutex);
    if (!given || login != NULL) {
        status = vkp_i_link_connect(&session->link, config->address,
                                    given ? login->username : config->username,
                                    given ? login->password : config->password);
    }
    vkp_i_login_free(relay->env, login);
    if (status != VKP_OK) {
        vkp_i_session_failed(session);
    }
}

/* ---- the relay's credentials ---- */

/* Loop 0: a client of the relay connects. Only this loop's thread changes the login. */
static void vkp_i_relay_on_connect(void *user, vkp_client_target *target)
{
    const vkp_relay *relay = (const vkp_relay *)user;
    if (relay->login != NULL) {
        target->username = relay->login->username;
        target->password = relay->login->password;
    }
}

/* The server answered AUTH on a connection that stands. */
static void vkp_i_relay_authenticated(void *user, vkp_status status, const vkp_value *value,
                                      const vkp_bytes *frame)
{
    const vkp_relay *relay = (const vkp_relay *)user;
    (void)frame;
    if (status == VKP_OK && value->type == VKP_RESP_ERROR) {
        vkp_i_log(relay->env, VKP_LOG_WARN, "upstream: the server refused the new password: %.*s",
                  VKP_FMT(vkp_value_get_str(value)));
    }
}

/* Send AUTH with the new credentials; a connection that cannot carry it has them when it begins
   again. */
static void vkp_i_relay_authenticate(vkp_relay *relay, vkp_client *client)
{
    vkp_resp_writer writer;
    vkp_bytes command;
    vkp_str argv[3];
    vkp_resp_writer_init(&writer, relay->env);
    vkp_i_put_command(&writer,
                      vkp_i_auth_words(relay->login->username, relay->login->password, argv), argv);
    if (vkp_resp_writer_take(&writer, &command) == VKP_OK) {
        (void)!vkp_client_send(client, &command, 1, vkp_i_relay_authenticated, relay);
        vkp_bytes_unref(&command);
    }
}

VKP_API vkp_status vkp_relay_set_login(vkp_relay *relay, vkp_str username, vkp_str password)
{
    vkp_client_target *login;
    vkp_client_target *old;
    size_t i;
    VKP_I_REQUIRE(relay != NULL && password.ptr != NULL);
    login = vkp_i_login_new(relay->env, username, password);
    if (login == NULL) {
        return VKP_ERR_NOMEM;
    }
    VKP_I_LOCK(&relay->mutex);
    old = relay->login;
    relay->login = login;
    VKP_I_UNLOCK(&relay->mutex);
    vkp_i_login_free(relay->env, old);
    if (vkp_i_relay_has_server(relay)) {
        vkp_i_relay_authenticate(relay, relay->push);
        for (i = 0; i < relay->shared_count; i++) {
            vkp_i_relay_authenticate(relay, relay->shared[i]);
        }
    }
    return VKP_OK;
}

/* OPENING: the time for the next try. SERVING: perhaps it is no longer needed. */
static void vkp_i_session_on_timer(vkp_timer *timer)
{
    vkp_i_session *session = VKP_CONTAINER(timer, vkp_i_session, timer);
    if (session->stage == VKP_I_SESSION_OPENING) {
        vkp_i_session_hold(&session->link);
        vkp_i_session_try(session);
        vkp_i_session_release(&session->link);
    } else if (session->call_count > 0 || session->state != 0) {
        return; /* starts again when nothing is in flight */
    } else if (session->shard->loop->now_ns < session->deadline_ns) {
        (void)vkp_i_session_start_timer(session, session->deadline_ns);
    } else {
        vkp_i_session_give_back(session);
    }
}

/* Let the client use the session that is logged in. */
static void vkp_i_session_serve(vkp_i_session *session)
{
    session->stage = VKP_I_SESSION_SERVING;
    vkp_timer_stop(&session->timer);
    vkp_i_session_name(session);
    vkp_i_session_idles(session);
}

static void vkp_i_session_on_ready(vkp_i_link *link)
{
    vkp_i_session *session = vkp_i_session_of(link);
    vkp_i_local *local = session->local;
    if (link->protocol != session->protocol) {
        vkp_i_local_error(local, "DENIED the server speaks RESP2 only");
        vkp_i_session_close_client(session);
        return;
    }
    vkp_i_session_shrink(session);
    vkp_i_session_serve(session);
    local->flags &= ~VKP_I_LOCAL_OPENING;
    vkp_i_local_maybe_resume(local);
}

static void vkp_i_session_on_down(vkp_i_link *link)
{
    vkp_i_session *session = vkp_i_session_of(link);
    vkp_i_request *request;
    if (session->stage != VKP_I_SESSION_OPENING) {
        vkp_i_session_close_client(session);
        return;
    }
    while ((request = vkp_i_requests_pop(&link->flight)) != NULL) {
        request->settle(request, VKP_ERR_CLOSED, NULL, NULL);
    }
    vkp_i_session_failed(session);
}

static void vkp_i_session_on_push(vkp_i_link *link, const vkp_push *push)
{
    (void)link; /* none can come before the client asked for something */
    (void)push;
}

static void vkp_i_session_on_busy(vkp_i_link *link)
{
    (void)link;
}

static void vkp_i_session_on_written(vkp_i_link *link)
{
    const vkp_i_session *session = VKP_CONTAINER(link, vkp_i_session, link);
    if (session->local != NULL) {
        session->local->unsent_bytes = 0;
        vkp_i_local_was_written(session->local);
    }
}

static const vkp_i_link_ops vkp_i_session_ops = {vkp_i_session_on_ready,
                                                 vkp_i_session_on_push,
                                                 vkp_i_session_on_down,
                                                 vkp_i_session_on_busy,
                                                 NULL,
                                                 vkp_i_session_on_written,
                                                 vkp_i_session_hold,
                                                 vkp_i_session_release,
                                                 vkp_i_session_on_bytes};

/* A session of the pool with the protocol; NULL: there is none. */
static vkp_i_session *vkp_i_shard_take_pooled(vkp_i_shard *shard, int protocol)
{
    vkp_i_session *session = shard->pool;
    while (session != NULL && session->protocol != protocol) {
        session = session->next;
    }
    if (session != NULL) {
        vkp_i_session_unpool(session);
    }
    return session;
}

/* Count one session more. False: there are private_max. */
static bool vkp_i_relay_count_session(vkp_i_shard *shard)
{
    vkp_relay *relay = shard->relay;
    if (VKP_I_LOAD(&relay->private_count) >= relay->private_max && shard->pool != NULL) {
        vkp_i_session_end(shard->pool); /* of the other protocol */
    }
    if (VKP_I_ADD(&relay->private_count, (size_t)1) < relay->private_max) {
        return true;
    }
    (void)VKP_I_SUB(&relay->private_count, (size_t)1);
    return false;
}

/* Give the client a session. OK: it has one and is paused while it opens, or it will be closed.
   FULL: there are too many. NOMEM.                                                            */
static vkp_status vkp_i_local_open_session(vkp_i_local *local)
{
    vkp_i_shard *shard = local->shard;
    vkp_relay *relay = shard->relay;
    int protocol = local->member.protocol;
    vkp_i_session *session = vkp_i_shard_take_pooled(shard, protocol);
    if (session != NULL) {
        session->local = local;
        local->session = session;
        vkp_i_session_serve(session);
        return VKP_OK;
    }
    if (!vkp_i_relay_count_session(shard)) {
        return VKP_ERR_FULL;
    }
    session = (vkp_i_session *)vkp_i_alloc_zero(relay->env, sizeof *session);
    if (session == NULL) {
        (void)VKP_I_SUB(&relay->private_count, (size_t)1);
        return VKP_ERR_NOMEM;
    }
    (void)VKP_I_ADD(&relay->refs, 1);
    (void)VKP_I_ADD(&relay->privates_opened, (uint64_t)1);
    session->shard = shard;
    session->refs = 1;
    session->protocol = (uint8_t)protocol;
    session->local = local;
    local->session = session;
    session->deadline_ns = vkp_i_after_ms(vkp_i_loop_now(shard->loop), relay->hold_ms);
    vkp_i_local_pause(local, VKP_I_LOCAL_OPENING);
    if (vkp_i_link_init(&session->link, relay->env, shard->loop,
                        &relay->session_configs[protocol == 3 ? 1 : 0],
                        &vkp_i_session_ops) != VKP_OK) {
        vkp_i_session_end(session);
        return VKP_ERR_NOMEM;
    }
    session->link.wants_id = true; /* for CLIENT UNBLOCK of others */
    vkp_i_session_hold(&session->link);
    vkp_i_session_try(session);
    vkp_i_session_release(&session->link);
    return VKP_OK;
}

#endif /* VKP_I_IO */
