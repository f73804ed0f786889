#if VKP_I_IO
/* ======================================================================================
   >>impl-client-connection   The connection of a client
   ======================================================================================
   Everything here runs on the loop's thread, except vkp_client_ref, _unref, _close and the
   getters. The states of vkp_client_state:
     CONNECTING  connected: send HELLO (RESP2: AUTH, SETNAME, PING); answered: READY;
                 lost, refused or over connect_timeout_ms: WAITING
     WAITING     the timer of vkp_i_client_backoff: CONNECTING
     READY       requests are written; lost, bad protocol or no answer to a heartbeat: WAITING
     CLOSED      from every state: vkp_client_close, or the loop's close; final
   vkp_i_client_lost is the only way to WAITING, vkp_i_client_close_now the only way to CLOSED.
   Both collect all requests that fail before they call the first callback, because any callback
   may close the client; code behind a callback checks `closed`, `ready` or `conn`.
   The mutex is held only around `submitted` and its flags, never around a callback.           */

/* ---- events ---- */

/* Give a push or an event to on_push or to the channel config.pushes. A push without room counts
   in `missed`; a LAGGED event precedes the next push that has room.                           */
static void vkp_i_client_emit(vkp_client *client, const vkp_push *push)
{
    vkp_push item;
    if (client->config.on_push != NULL) {
        client->config.on_push(client->config.user, push);
        return;
    }
    if (client->config.pushes == NULL) {
        return;
    }
    if (client->missed > 0) {
        memset(&item, 0, sizeof item);
        item.kind = VKP_PUSH_LAGGED;
        item.missed = client->missed;
        if (vkp_mpsc_try_send(client->config.pushes, &item) == VKP_OK) {
            client->missed = 0;
        }
    }
    item = *push;
    item.frame = vkp_bytes_ref(&push->frame);
    if (client->missed > 0 || vkp_mpsc_try_send(client->config.pushes, &item) != VKP_OK) {
        client->missed++;
        vkp_bytes_unref(&item.frame);
    }
}

/* Emit an event of the client itself. text is static, because the event may wait in a channel. */
static void vkp_i_client_event(vkp_client *client, vkp_push_kind kind, const char *text)
{
    vkp_push push;
    memset(&push, 0, sizeof push);
    push.kind = kind;
    push.payload = vkp_str_of(text);
    if (kind == VKP_PUSH_GAP) {
        push.from_ns = client->lost_ns;
        push.to_ns = client->loop->now_ns;
    }
    vkp_i_client_emit(client, &push);
}

/* ---- writing ---- */

#define VKP_I_GATHER 2048u        /* commands up to this size are copied together */
#define VKP_I_GATHER_BLOCK 16384u /* capacity of the block that gathers small commands */

/* Queue commands on the connection; small ones are copied behind each other, which makes one
   range to write.                                                                             */
static vkp_status vkp_i_client_write(vkp_client *client, const vkp_bytes *bytes)
{
    vkp_bytes part = *bytes;
    vkp_block *out = client->out;
    if (bytes->len <= VKP_I_GATHER) {
        if (out != NULL && vkp_i_block_is_mine(out)) {
            out->len = 0;
        }
        if (out == NULL || out->capacity - out->len < bytes->len) {
            vkp_i_block_unref(out);
            out = vkp_i_block_open(client->env, VKP_I_GATHER_BLOCK);
            client->out = out;
        }
        if (out != NULL) {
            part.data = vkp_i_block_data(out) + out->len;
            part.block = out;
            memcpy(vkp_i_block_data(out) + out->len, bytes->data, bytes->len);
            out->len += bytes->len;
        }
    }
    return vkp_conn_send(client->conn, &part);
}

static void vkp_i_client_lost(vkp_client *client, const char *why);

/* Write a request and append it to `flight`. False: not connected or no memory; it stays the
   caller's.                                                                                   */
static bool vkp_i_client_start(vkp_client *client, vkp_i_request *request)
{
    if (client->conn == NULL || vkp_i_client_write(client, &request->bytes) != VKP_OK) {
        return false;
    }
    vkp_bytes_unref(&request->bytes);
    vkp_i_requests_append(&client->flight, request);
    return true;
}

/* Build and start one command of the client itself. NULL: not connected or no memory. */
static vkp_i_request *vkp_i_client_issue(vkp_client *client, vkp_i_request_kind kind, size_t argc,
                                         const vkp_str *argv)
{
    vkp_i_request *request = vkp_i_request_new(client, kind);
    vkp_resp_writer writer;
    if (request == NULL) {
        return NULL;
    }
    vkp_resp_writer_init(&writer, client->env);
    vkp_i_put_command(&writer, argc, argv);
    if (vkp_resp_writer_take(&writer, &request->bytes) != VKP_OK ||
        !vkp_i_client_start(client, request)) {
        vkp_bytes_unref(&request->bytes);
        vkp_i_free(client->env, request, sizeof *request);
        return NULL;
    }
    return request;
}

/* ---- interests ---- */

static vkp_i_interest *vkp_i_interest_find(vkp_client *client, vkp_sub_kind kind, vkp_str name)
{
    vkp_i_map *map = &client->interests[kind];
    vkp_i_map_node *node =
        map->count > 0 ? vkp_i_map_find(map, vkp_i_map_hash(map, name), name) : NULL;
    return node != NULL ? VKP_CONTAINER(node, vkp_i_interest, node) : NULL;
}

static vkp_i_interest *vkp_i_interest_new(vkp_client *client, vkp_sub_kind kind, vkp_str name)
{
    vkp_i_map *map = &client->interests[kind];
    vkp_i_interest *interest =
        (vkp_i_interest *)vkp_i_alloc_zero(client->env, sizeof *interest + name.len);
    if (interest == NULL) {
        return NULL;
    }
    if (name.len > 0) {
        memcpy(interest + 1, name.ptr, name.len);
    }
    interest->kind = kind;
    interest->node.key = vkp_i_str(interest + 1, name.len);
    interest->node.hash = vkp_i_map_hash(map, name);
    vkp_i_requests_init(&interest->waiters);
    if (!vkp_i_map_insert(map, &interest->node)) {
        vkp_i_free(client->env, interest, sizeof *interest + name.len);
        return NULL;
    }
    return interest;
}

/* Set interest->confirmed and keep the number client->confirmed in step. */
static void vkp_i_interest_set_confirmed(vkp_client *client, vkp_i_interest *interest,
                                         bool confirmed)
{
    if (interest->confirmed != confirmed) {
        interest->confirmed = confirmed;
        client->confirmed += confirmed ? (size_t)1 : (size_t)0 - 1;
    }
}

/* Free an interest that is not wanted and has no command in flight. */
static void vkp_i_interest_free_unused(vkp_client *client, vkp_i_interest *interest)
{
    if (interest->wanted == 0 && interest->in_flight == 0) {
        vkp_i_interest_set_confirmed(client, interest, false);
        vkp_i_map_remove(&client->interests[interest->kind], &interest->node);
        vkp_i_free(client->env, interest, sizeof *interest + interest->node.key.len);
    }
}

/* The server answered one command of the name: complete the waiters that waited for this answer,
   or all waiters after a refusal. A callback may close the client, which frees the interest.  */
static void vkp_i_interest_notify(vkp_client *client, vkp_i_interest *interest, bool refused)
{
    vkp_i_request *waiter;
    for (waiter = interest->waiters.first; waiter != NULL; waiter = waiter->next) {
        waiter->replies--;
    }
    while (!client->closed && interest->waiters.first != NULL &&
           (refused || interest->waiters.first->replies == 0)) {
        vkp_i_request_complete(vkp_i_requests_pop(&interest->waiters),
                               refused ? VKP_ERR_REFUSED : VKP_OK, NULL, NULL);
    }
}

/* Send SUBSCRIBE or UNSUBSCRIBE when the last command sent differs from `wanted`. False: not
   connected or no memory.                                                                     */
static bool vkp_i_interest_sync(vkp_client *client, vkp_i_interest *interest)
{
    static const char *const verbs[2][VKP_SUB_KINDS] = {
        {"UNSUBSCRIBE", "PUNSUBSCRIBE", "SUNSUBSCRIBE"}, {"SUBSCRIBE", "PSUBSCRIBE", "SSUBSCRIBE"}};
    bool want = interest->wanted > 0;
    vkp_i_request *request;
    vkp_str argv[2];
    if (!client->ready || want == interest->subscribed) {
        return true;
    }
    argv[0] = vkp_str_of(verbs[want ? 1 : 0][interest->kind]);
    argv[1] = interest->node.key;
    request = vkp_i_client_issue(client, want ? VKP_I_REQUEST_SUBSCRIBE : VKP_I_REQUEST_UNSUBSCRIBE,
                                 2, argv);
    if (request == NULL) {
        return false;
    }
    request->interest = interest;
    request->sub = interest->kind;
    interest->subscribed = want;
    interest->in_flight++;
    return true;
}

/* No memory for a new name: put the request, and all requests behind it, back to `submitted` for
   the next connection, and drop this connection. The request's callback is called now with
   DISCONNECTED, because the next connection may be far away.                                  */
static void vkp_i_client_postpone(vkp_client *client, vkp_i_request *request)
{
    vkp_i_requests all;
    void (*done)(void *user, vkp_status status) = request->done;
    void *user = request->user;
    request->done = NULL;
    vkp_i_requests_init(&all);
    vkp_i_requests_append(&all, request);
    vkp_i_requests_move(&client->taken, &all);
    VKP_I_LOCK(&client->mutex);
    vkp_i_requests_move(&client->submitted, &all);
    vkp_i_requests_move(&all, &client->submitted);
    VKP_I_UNLOCK(&client->mutex);
    vkp_i_client_lost(client, "out of memory");
    if (done != NULL) {
        done(user, client->closed ? VKP_ERR_CLOSED : VKP_ERR_DISCONNECTED);
    }
}

/* Carry out a WANT: add one to the interest's `wanted`, and complete the request now or when the
   server has answered.                                                                        */
static void vkp_i_client_want(vkp_client *client, vkp_i_request *request)
{
    vkp_str name = vkp_i_str(request->bytes.data, request->bytes.len);
    vkp_i_interest *interest = vkp_i_interest_find(client, request->sub, name);
    if (interest == NULL) {
        interest = vkp_i_interest_new(client, request->sub, name);
    }
    if (interest == NULL) {
        vkp_i_client_postpone(client, request);
        return;
    }
    interest->wanted++;
    if (!vkp_i_interest_sync(client, interest)) {
        vkp_i_request_complete(request, VKP_ERR_DISCONNECTED, NULL, NULL);
        vkp_i_client_lost(client, "out of memory");
    } else if (!client->ready) {
        vkp_i_request_complete(request, VKP_ERR_DISCONNECTED, NULL, NULL);
    } else if (interest->confirmed && interest->in_flight == 0) {
        vkp_i_request_complete(request, VKP_OK, NULL, NULL);
    } else {
        request->replies = (uint32_t)interest->in_flight;
        vkp_i_requests_append(&interest->waiters, request);
    }
}

/* Carry out a LEAVE: take one from the interest's `wanted`. */
static void vkp_i_client_leave(vkp_client *client, vkp_i_request *request)
{
    vkp_str name = vkp_i_str(request->bytes.data, request->bytes.len);
    vkp_i_interest *interest = vkp_i_interest_find(client, request->sub, name);
    vkp_i_request_free(request);
    if (interest == NULL || interest->wanted == 0) {
        return;
    }
    interest->wanted--;
    if (!vkp_i_interest_sync(client, interest)) {
        vkp_i_client_lost(client, "out of memory");
    } else {
        vkp_i_interest_free_unused(client, interest);
    }
}

/* One interest is subscribed again after an outage; the last one emits GAP. */
static void vkp_i_client_resumed(vkp_client *client, vkp_i_interest *interest)
{
    if (interest->resuming) {
        interest->resuming = false;
        if (--client->resuming == 0) {
            client->gap_open = false;
            vkp_i_client_event(client, VKP_PUSH_GAP, "");
        }
    }
}

/* The server answered the oldest request in flight, a SUBSCRIBE or UNSUBSCRIBE: by its push, or
   by an error (refused).                                                                      */
static void vkp_i_client_settle(vkp_client *client, const vkp_push *push, bool refused)
{
    vkp_i_request *request = vkp_i_requests_pop(&client->flight);
    vkp_i_interest *interest = request->interest;
    bool subscribe = request->kind == VKP_I_REQUEST_SUBSCRIBE;
    interest->in_flight--;
    vkp_i_request_free(request);
    vkp_i_interest_set_confirmed(client, interest, subscribe && !refused);
    interest->in_flight++; /* keeps the interest while callbacks run */
    if (push != NULL) {
        vkp_i_client_emit(client, push);
    }
    if (refused && subscribe && !client->closed) {
        vkp_i_log(client->env, VKP_LOG_WARN, "the server refused a subscription to %.*s",
                  VKP_FMT(interest->node.key));
        interest->wanted = 0;
        interest->subscribed = false;
    }
    if (!client->closed) {
        vkp_i_interest_notify(client, interest, refused && subscribe);
    }
    if (!client->closed) {
        vkp_i_client_resumed(client, interest);
    }
    if (!client->closed) {
        interest->in_flight--;
        vkp_i_interest_free_unused(client, interest);
    }
}

/* Subscribe to every wanted name on a new connection. */
static void vkp_i_client_resubscribe(vkp_client *client)
{
    int kind;
    for (kind = 0; kind < VKP_SUB_KINDS; kind++) {
        vkp_i_map_node *node = NULL;
        while ((node = vkp_i_map_get_next(&client->interests[kind], node)) != NULL) {
            vkp_i_interest *interest = VKP_CONTAINER(node, vkp_i_interest, node);
            if (!vkp_i_interest_sync(client, interest)) {
                vkp_i_client_lost(client, "out of memory");
                return;
            }
            if (client->outage) {
                interest->resuming = true;
                client->resuming++;
            }
        }
    }
}

/* ---- the connection's life ---- */

static void vkp_i_client_on_timer(vkp_timer *timer);

/* Set the state, and whether commands are accepted. */
static void vkp_i_client_set_state(vkp_client *client, vkp_client_state state)
{
    VKP_I_STORE_REL(&client->state, (uint32_t)state);
    VKP_I_LOCK(&client->mutex);
    client->accepting = state == VKP_CLIENT_CONNECTING || state == VKP_CLIENT_READY;
    VKP_I_UNLOCK(&client->mutex);
}

static void vkp_i_client_set_error(vkp_client *client, const char *text)
{
    VKP_I_LOCK(&client->mutex);
    (void)snprintf(client->error, sizeof client->error, "%s", text);
    VKP_I_UNLOCK(&client->mutex);
}

VKP_API void vkp_client_get_error(vkp_client *client, char *text, size_t size)
{
    VKP_I_LOCK(&client->mutex);
    (void)snprintf(text, size, "%s", client->error);
    VKP_I_UNLOCK(&client->mutex);
}

/* Start the one timer of the client, in ms from now; the state decides what it means. */
static void vkp_i_client_start_timer(vkp_client *client, uint64_t ms)
{
    uint64_t deadline = vkp_i_after_ms(vkp_i_loop_now(client->loop), ms);
    if (vkp_timer_start(&client->timer, client->loop, vkp_i_client_on_timer, 0, deadline) !=
        VKP_OK) {
        vkp_i_log(client->env, VKP_LOG_ERROR, "out of memory: the client's timer did not start");
    }
}

static bool vkp_i_request_is_interest(const vkp_i_request *request)
{
    return request->kind == VKP_I_REQUEST_WANT || request->kind == VKP_I_REQUEST_LEAVE;
}

/* Complete every request of `failed`. A callback may close the client: that close completes the
   other requests before it returns.                                                           */
static void vkp_i_client_tell_failed(vkp_client *client, vkp_status status)
{
    vkp_i_request *request;
    while ((request = vkp_i_requests_pop(&client->failed)) != NULL) {
        vkp_i_request_complete(request, status, NULL, NULL);
    }
}

/* Move requests from `submitted` to out: interests (WANT, LEAVE), commands, or both. The others
   stay.                                                                                       */
static void vkp_i_client_collect(vkp_client *client, bool interests, bool commands,
                                 vkp_i_requests *out)
{
    vkp_i_requests all;
    vkp_i_request *request;
    vkp_i_requests_init(&all);
    VKP_I_LOCK(&client->mutex);
    vkp_i_requests_move(&client->submitted, &all);
    while ((request = vkp_i_requests_pop(&all)) != NULL) {
        bool wanted = vkp_i_request_is_interest(request) ? interests : commands;
        vkp_i_requests_append(wanted ? out : &client->submitted, request);
    }
    VKP_I_UNLOCK(&client->mutex);
}

/* Move to `failed` every command without a reply, written or not, and every WANT that waits;
   wanted names stay. All are moved before the first callback, because a callback may close the
   client.                                                                                     */
static void vkp_i_client_collect_failed(vkp_client *client)
{
    vkp_i_requests *failed = &client->failed;
    int kind;
    vkp_i_requests_move(&client->flight, failed);
    vkp_i_client_collect(client, false, true, failed);
    for (kind = 0; kind < VKP_SUB_KINDS; kind++) {
        vkp_i_map_node *node = vkp_i_map_get_next(&client->interests[kind], NULL);
        while (node != NULL) {
            vkp_i_interest *interest = VKP_CONTAINER(node, vkp_i_interest, node);
            node = vkp_i_map_get_next(&client->interests[kind], node);
            interest->in_flight = 0;
            interest->subscribed = false;
            interest->resuming = false;
            vkp_i_interest_set_confirmed(client, interest, false);
            vkp_i_requests_move(&interest->waiters, failed);
            vkp_i_interest_free_unused(client, interest);
        }
    }
    client->resuming = 0;
}

/* Close the connection, if any; its on_close is ignored because `conn` is NULL by then. */
static void vkp_i_client_drop_connection(vkp_client *client)
{
    vkp_conn *conn = client->conn;
    client->conn = NULL;
    client->ready = false;
    client->ping_sent = false;
    if (conn != NULL) {
        vkp_conn_close(conn);
        vkp_conn_unref(conn);
    }
    vkp_resp_reader_reset(client->reader);
}

/* Milliseconds to wait: random, uniform, up to a bound that doubles with each try, so that many
   clients do not reconnect at the same time.                                                  */
static uint64_t vkp_i_client_backoff(vkp_client *client)
{
    uint64_t most = VKP_I_MIN(client->config.retry_max_ms, (uint64_t)INT64_MAX);
    uint64_t bound = client->config.retry_min_ms;
    uint32_t i;
    for (i = 0; i < client->tries && bound < most; i++) {
        bound *= 2;
    }
    client->tries++;
    bound = VKP_I_MIN(bound, most);
    return vkp_i_sys(client->env)->random_u64() % (bound + 1);
}

/* The connection, or the attempt to connect, has ended: start the timer of the next try, emit
   DISCONNECTED if the client was ready, fail the requests without replies. why is static.     */
static void vkp_i_client_lost(vkp_client *client, const char *why)
{
    bool was_ready = client->ready;
    if (client->closed || vkp_client_get_state(client) == VKP_CLIENT_WAITING) {
        return;
    }
    vkp_i_client_set_error(client, why);
    vkp_i_log(client->env, VKP_LOG_INFO, "%s: %s", client->config.address.ptr, why);
    vkp_i_client_set_state(client, VKP_CLIENT_WAITING);
    vkp_i_client_drop_connection(client);
    vkp_i_client_start_timer(client, vkp_i_client_backoff(client));
    vkp_i_client_collect_failed(client);
    if (was_ready) {
        client->outage = true;
        if (!client->gap_open) {
            client->gap_open = true;
            client->lost_ns = client->loop->now_ns;
        }
        vkp_i_client_event(client, VKP_PUSH_DISCONNECTED, why);
    }
    vkp_i_client_tell_failed(client, VKP_ERR_DISCONNECTED);
}

static void vkp_i_client_take(vkp_client *client);

/* The handshake succeeded: emit CONNECTED or RECONNECTED, subscribe again, write the commands
   that waited.                                                                                */
static void vkp_i_client_ready(vkp_client *client)
{
    client->ready = true;
    client->tries = 0;
    client->heard_ns = client->loop->now_ns;
    vkp_i_client_set_state(client, VKP_CLIENT_READY);
    vkp_i_client_start_timer(client, client->config.heartbeat_ms);
    vkp_i_client_event(client, client->was_ready ? VKP_PUSH_RECONNECTED : VKP_PUSH_CONNECTED, "");
    client->was_ready = true;
    if (client->ready) {
        vkp_i_client_resubscribe(client);
    }
    if (client->ready) {
        client->outage = false;
        client->gap_open = client->gap_open && client->resuming > 0;
        vkp_i_client_take(client);
    }
}

/* The RESP2 handshake: AUTH, CLIENT SETNAME, and PING, whose reply ends it. False: not connected
   or no memory.                                                                               */
static bool vkp_i_client_login2(vkp_client *client)
{
    vkp_str argv[3];
    size_t argc = 0;
    VKP_I_STORE(&client->protocol, 2u);
    if (client->config.password.ptr != NULL) {
        argv[argc++] = vkp_str_of("AUTH");
        if (client->config.username.ptr != NULL) {
            argv[argc++] = client->config.username;
        }
        argv[argc++] = client->config.password;
        if (vkp_i_client_issue(client, VKP_I_REQUEST_LOGIN, argc, argv) == NULL) {
            return false;
        }
    }
    if (client->config.name.ptr != NULL) {
        argv[0] = vkp_str_of("CLIENT");
        argv[1] = vkp_str_of("SETNAME");
        argv[2] = client->config.name;
        if (vkp_i_client_issue(client, VKP_I_REQUEST_NAME, 3, argv) == NULL) {
            return false;
        }
    }
    argv[0] = vkp_str_of("PING");
    return vkp_i_client_issue(client, VKP_I_REQUEST_HELLO, 1, argv) != NULL;
}

/* Begin the handshake. False: not connected or no memory. */
static bool vkp_i_client_hello(vkp_client *client)
{
    vkp_str argv[8];
    size_t argc = 0;
    if (client->config.protocol == 2) {
        client->falling_back = true;
        return vkp_i_client_login2(client);
    }
    VKP_I_STORE(&client->protocol, 3u);
    argv[argc++] = vkp_str_of("HELLO");
    argv[argc++] = vkp_str_of("3");
    if (client->config.password.ptr != NULL) {
        argv[argc++] = vkp_str_of("AUTH");
        argv[argc++] =
            client->config.username.ptr != NULL ? client->config.username : vkp_str_of("default");
        argv[argc++] = client->config.password;
    }
    if (client->config.name.ptr != NULL) {
        argv[argc++] = vkp_str_of("SETNAME");
        argv[argc++] = client->config.name;
    }
    return vkp_i_client_issue(client, VKP_I_REQUEST_HELLO, argc, argv) != NULL;
}

/* The server refused the handshake: log its error text, keep it for vkp_client_get_error, try
   again later. text is copied first: its memory ends with the connection.                     */
static void vkp_i_client_refused(vkp_client *client, const char *why, vkp_str text)
{
    char words[sizeof client->error];
    (void)snprintf(words, sizeof words, "%s: %.*s", why, (int)VKP_I_MIN(text.len, sizeof words),
                   text.ptr);
    vkp_i_log(client->env, VKP_LOG_ERROR, "%s: %s", client->config.address.ptr, words);
    vkp_i_client_lost(client, why);
    vkp_i_client_set_error(client, words);
}

/* The reply to HELLO, or on a RESP2 server to the PING that ends the handshake. */
static void vkp_i_client_greeted(vkp_client *client, const vkp_value *value)
{
    vkp_str text = vkp_value_get_str(value);
    if (value->type != VKP_RESP_ERROR) {
        vkp_i_client_ready(client);
        return;
    }
    if (!client->falling_back &&
        (vkp_i_starts_with(text, "NOPROTO") || vkp_i_starts_with(text, "ERR unknown command"))) {
        client->falling_back = true;
        if (!vkp_i_client_login2(client)) {
            vkp_i_client_lost(client, "out of memory");
        }
        return;
    }
    vkp_i_client_refused(client, "the server refused the handshake", text);
}

/* ---- reading ---- */

/* A reply arrived: it belongs to the oldest request in flight. */
static void vkp_i_client_reply(vkp_client *client, const vkp_value *value, const vkp_bytes *frame)
{
    vkp_i_request *request = client->flight.first;
    vkp_i_request_kind kind;
    if (request == NULL) {
        vkp_i_client_lost(client, "a reply that nobody asked for");
        return;
    }
    kind = request->kind;
    if (kind == VKP_I_REQUEST_SUBSCRIBE || kind == VKP_I_REQUEST_UNSUBSCRIBE) {
        if (value->type == VKP_RESP_ERROR) {
            vkp_i_client_settle(client, NULL, true);
        } else {
            vkp_i_client_lost(client, "a reply where a confirmation was due");
        }
        return;
    }
    if (--request->replies > 0) {
        return;
    }
    (void)vkp_i_requests_pop(&client->flight);
    if (kind == VKP_I_REQUEST_COMMAND) {
        vkp_i_request_complete(request, VKP_OK, value, frame);
        return;
    }
    vkp_i_request_free(request);
    if (kind == VKP_I_REQUEST_HELLO) {
        vkp_i_client_greeted(client, value);
    } else if (kind == VKP_I_REQUEST_LOGIN && value->type == VKP_RESP_ERROR) {
        vkp_i_client_refused(client, "the server refused the password", vkp_value_get_str(value));
    } else if (kind == VKP_I_REQUEST_PING) {
        client->ping_sent = false;
    }
}

/* A push arrived: it answers the oldest request in flight, or is emitted. */
static void vkp_i_client_push(vkp_client *client, const vkp_value *value, const vkp_bytes *frame)
{
    vkp_push push;
    vkp_i_request *oldest = client->flight.first;
    if (vkp_push_from_value(value, &push) != VKP_OK) {
        return; /* the reader rejects such a push */
    }
    push.frame = *frame;
    if (push.kind == VKP_PUSH_SUBSCRIBED || push.kind == VKP_PUSH_UNSUBSCRIBED) {
        vkp_i_request_kind kind =
            push.kind == VKP_PUSH_SUBSCRIBED ? VKP_I_REQUEST_SUBSCRIBE : VKP_I_REQUEST_UNSUBSCRIBE;
        vkp_i_interest *interest;
        if (oldest != NULL && oldest->kind == kind && oldest->sub == push.sub &&
            vkp_i_str_equal(oldest->interest->node.key, push.channel)) {
            vkp_i_client_settle(client, &push, false);
            return;
        }
        /* Not requested: the shard channel moved to another node. The next change subscribes. */
        interest = vkp_i_interest_find(client, push.sub, push.channel);
        if (interest != NULL && push.kind == VKP_PUSH_UNSUBSCRIBED) {
            vkp_i_interest_set_confirmed(client, interest, false);
            interest->subscribed = false;
        }
    }
    vkp_i_client_emit(client, &push);
}

/* Whether a RESP2 array is a push. RESP2 has no type for pushes: an array of a push's form is
   one while something is subscribed.                                                          */
static bool vkp_i_client_is_push2(const vkp_client *client, const vkp_value *value)
{
    vkp_push push;
    const vkp_i_request *oldest = client->flight.first;
    bool subscribing = oldest != NULL && (oldest->kind == VKP_I_REQUEST_SUBSCRIBE ||
                                          oldest->kind == VKP_I_REQUEST_UNSUBSCRIBE);
    return VKP_I_LOAD(&client->protocol) == 2 && value->type == VKP_RESP_ARRAY &&
           (client->confirmed > 0 || subscribing) && vkp_push_from_value(value, &push) == VKP_OK &&
           push.kind != VKP_PUSH_OTHER;
}

/* Emit the messages that a server before 7.2 put inside the array of an EXEC. Their texts view
   the whole reply, so the reply's frame is their frame.                                       */
static void vkp_i_client_push_nested(vkp_client *client, const vkp_value *value,
                                     const vkp_bytes *frame)
{
    uint32_t i;
    for (i = 1; i < value->span && !client->closed; i++) {
        vkp_push push;
        if ((value[i].flags & VKP_VALUE_OUT_OF_BAND) != 0 &&
            vkp_push_from_value(&value[i], &push) == VKP_OK) {
            push.frame = *frame;
            vkp_i_client_emit(client, &push);
        }
    }
}

/* One whole value arrived: a push or a reply. */
static void vkp_i_client_value(vkp_client *client, const vkp_value *value, const vkp_bytes *frame)
{
    if (value->type == VKP_RESP_PUSH || vkp_i_client_is_push2(client, value)) {
        vkp_i_client_push(client, value, frame);
        return;
    }
    if (value->type == VKP_RESP_ARRAY && value->i_has_nested != 0) {
        vkp_i_client_push_nested(client, value, frame);
        if (client->closed || client->conn == NULL) {
            return;
        }
    }
    vkp_i_client_reply(client, value, frame);
}

/* Read as many whole values as arrived; the bytes of an incomplete one are delivered again. */
static size_t vkp_i_client_on_data(vkp_conn *conn, void *user, const vkp_bytes *in)
{
    vkp_client *client = (vkp_client *)user;
    size_t used = 0;
    (void)VKP_I_ADD(&client->refs, 1); /* a callback may give the last other reference back */
    client->heard_ns = client->loop->now_ns;
    while (client->conn == conn && used < in->len) {
        const vkp_value *value;
        size_t consumed;
        vkp_bytes frame;
        vkp_status status = vkp_resp_reader_scan(client->reader, in->data + used, in->len - used,
                                                 &value, &consumed);
        if (status == VKP_ERR_EMPTY) {
            break;
        }
        if (status != VKP_OK) {
            uint64_t position;
            vkp_i_log(client->env, VKP_LOG_ERROR, "%s: bad reply: %s", client->config.address.ptr,
                      vkp_resp_reader_get_error(client->reader, &position));
            vkp_i_client_lost(client, status == VKP_ERR_NOMEM ? "out of memory"
                                                              : "the server broke the protocol");
            break;
        }
        frame.data = in->data + used;
        frame.len = consumed;
        frame.block = in->block;
        used += consumed;
        vkp_i_client_value(client, value, &frame);
    }
    vkp_i_client_release(client);
    return used;
}

static void vkp_i_client_on_open(vkp_conn *conn, void *user)
{
    vkp_client *client = (vkp_client *)user;
    (void)conn;
    (void)VKP_I_ADD(&client->refs, 1);
    if (!vkp_i_client_hello(client)) {
        vkp_i_client_lost(client, "out of memory");
    }
    vkp_i_client_release(client);
}

/* Static text for a connection that failed or was lost. */
static const char *vkp_i_client_why(int error)
{
    return error == ECONNREFUSED || error == ENOENT ? "nobody accepts connections there"
                                                    : "the connection was lost";
}

static void vkp_i_client_on_close(vkp_conn *conn, void *user, vkp_close_reason reason, int error)
{
    vkp_client *client = (vkp_client *)user;
    if (conn == client->conn) { /* otherwise vkp_i_client_drop_connection closed it */
        if (reason == VKP_CLOSE_LOOP) {
            return; /* vkp_i_client_loop_closed closes the client */
        }
        vkp_i_log(client->env, VKP_LOG_INFO, "%s: %s%s%s", client->config.address.ptr,
                  vkp_close_reason_str(reason), error != 0 ? ": " : "",
                  error != 0 ? strerror(error) : "");
        (void)VKP_I_ADD(&client->refs, 1);
        vkp_i_client_lost(client, vkp_i_client_why(error));
        vkp_i_client_release(client);
    }
}

static const vkp_conn_ops vkp_i_client_ops = {
    vkp_i_client_on_open, vkp_i_client_on_data, NULL, NULL, vkp_i_client_on_close, NULL};

/* Begin an attempt to connect, with its time limit. On failure the wait for the next try has
   begun.                                                                                      */
static vkp_status vkp_i_client_connect(vkp_client *client)
{
    vkp_conn_config config;
    vkp_status status;
    memset(&config, 0, sizeof config);
    config.ops = &vkp_i_client_ops;
    config.user = client;
    config.loop_only = true;
    config.input_bytes = VKP_I_BLOCK_MAX;
    client->falling_back = false;
    vkp_i_client_set_state(client, VKP_CLIENT_CONNECTING);
    vkp_i_client_start_timer(client, client->config.connect_timeout_ms);
    status = vkp_conn_connect(client->loop, client->config.address, &config, &client->conn);
    if (status != VKP_OK) {
        vkp_i_client_lost(client,
                          status == VKP_ERR_SYS ? vkp_i_client_why(errno) : vkp_status_str(status));
    }
    return status;
}

/* The timer fired while READY: send PING after heartbeat_ms without bytes, drop the connection
   after heartbeat_timeout_ms more without bytes, otherwise wait on.                           */
static void vkp_i_client_heartbeat(vkp_client *client)
{
    uint64_t idle_ms = (client->loop->now_ns - client->heard_ns) / VKP_I_NS_PER_MS;
    vkp_str argv = vkp_str_of("PING");
    if (client->ping_sent && idle_ms < client->config.heartbeat_timeout_ms) {
        /* Bytes still arrive: the answer to PING is behind a long reply. */
        vkp_i_client_start_timer(client, client->config.heartbeat_timeout_ms - idle_ms);
    } else if (client->ping_sent) {
        vkp_i_client_lost(client, "no answer to a heartbeat");
    } else if (idle_ms < client->config.heartbeat_ms) {
        vkp_i_client_start_timer(client, client->config.heartbeat_ms - idle_ms);
    } else if (vkp_i_client_issue(client, VKP_I_REQUEST_PING, 1, &argv) == NULL) {
        vkp_i_client_lost(client, "out of memory");
    } else {
        client->ping_sent = true;
        vkp_i_client_start_timer(client, client->config.heartbeat_timeout_ms);
    }
}

/* The timer's callback; what the timer means depends on the state. */
static void vkp_i_client_on_timer(vkp_timer *timer)
{
    vkp_client *client = VKP_CONTAINER(timer, vkp_client, timer);
    (void)VKP_I_ADD(&client->refs, 1);
    switch (vkp_client_get_state(client)) {
    case VKP_CLIENT_CONNECTING:
        vkp_i_client_lost(client, "no connection within the time limit");
        break;
    case VKP_CLIENT_WAITING:
        (void)!vkp_i_client_connect(client); /* on failure the next wait has begun */
        break;
    case VKP_CLIENT_READY:
        vkp_i_client_heartbeat(client);
        break;
    case VKP_CLIENT_CLOSED:
        break;
    }
    vkp_i_client_release(client);
}

/* ---- the queued task, opening, closing ---- */

/* Whether a command must be refused: a RESP2 connection carries no commands while a name is
   subscribed.                                                                                 */
static bool vkp_i_client_must_refuse(const vkp_client *client)
{
    return VKP_I_LOAD(&client->protocol) == 2 &&
           client->interests[0].count + client->interests[1].count + client->interests[2].count > 0;
}

/* Start one request that was taken from `submitted`. */
static void vkp_i_client_dispatch(vkp_client *client, vkp_i_request *request)
{
    if (request->kind == VKP_I_REQUEST_WANT) {
        vkp_i_client_want(client, request);
    } else if (request->kind == VKP_I_REQUEST_LEAVE) {
        vkp_i_client_leave(client, request);
    } else if (vkp_i_client_must_refuse(client)) {
        vkp_i_log(client->env, VKP_LOG_WARN,
                  "command refused: a RESP2 connection with subscriptions carries no commands");
        vkp_i_request_complete(request, VKP_ERR_REFUSED, NULL, NULL);
    } else if (!vkp_i_client_start(client, request)) {
        vkp_i_request_complete(request, VKP_ERR_DISCONNECTED, NULL, NULL);
    }
}

/* Start the submitted requests. Commands stay in `submitted` until the client is ready. */
static void vkp_i_client_take(vkp_client *client)
{
    vkp_i_request *request;
    vkp_i_client_collect(client, true, client->ready, &client->taken);
    while ((request = vkp_i_requests_pop(&client->taken)) != NULL) {
        if (!client->ready && !vkp_i_request_is_interest(request)) {
            vkp_i_request_complete(request, VKP_ERR_DISCONNECTED, NULL, NULL);
        } else {
            vkp_i_client_dispatch(client, request);
        }
    }
}

/* Close the client, once. Gives the loop's reference back: the caller must hold another. Loop's
   thread.                                                                                     */
static void vkp_i_client_close_now(vkp_client *client)
{
    int kind;
    if (client->closed) {
        return;
    }
    client->closed = true;
    VKP_I_LOCK(&client->mutex);
    client->ended = true;
    VKP_I_UNLOCK(&client->mutex);
    vkp_i_client_set_state(client, VKP_CLIENT_CLOSED);
    vkp_i_loop_detach(&client->attached);
    vkp_timer_stop(&client->timer);
    vkp_i_client_drop_connection(client);
    vkp_i_client_collect_failed(client);
    vkp_i_requests_move(&client->taken, &client->failed);
    vkp_i_client_collect(client, true, true, &client->failed);
    for (kind = 0; kind < VKP_SUB_KINDS; kind++) {
        vkp_i_map_node *node = vkp_i_map_get_next(&client->interests[kind], NULL);
        while (node != NULL) {
            vkp_i_interest *interest = VKP_CONTAINER(node, vkp_i_interest, node);
            node = vkp_i_map_get_next(&client->interests[kind], node);
            interest->wanted = 0;
            vkp_i_interest_free_unused(client, interest);
        }
    }
    vkp_i_client_tell_failed(client, VKP_ERR_CLOSED);
    vkp_mpsc_tx_unref(client->config.pushes);
    client->config.pushes = NULL;
    vkp_i_client_release(client);
}

/* The client's task: start what any thread submitted. The task holds a reference. */
static void vkp_i_client_run(vkp_i_task *task)
{
    vkp_client *client = VKP_CONTAINER(task, vkp_client, task);
    bool close_wanted;
    VKP_I_LOCK(&client->mutex);
    client->task_queued = false;
    close_wanted = client->close_wanted;
    VKP_I_UNLOCK(&client->mutex);
    vkp_i_client_take(client);
    if (close_wanted) {
        vkp_i_client_close_now(client);
    }
    vkp_i_client_release(client);
}

static void vkp_i_client_loop_closed(vkp_i_attached *attached)
{
    vkp_client *client = VKP_CONTAINER(attached, vkp_client, attached);
    (void)VKP_I_ADD(&client->refs, 1);
    vkp_i_client_close_now(client);
    vkp_i_client_release(client);
}

VKP_API vkp_client *vkp_client_ref(vkp_client *client)
{
    (void)VKP_I_ADD(&client->users, 1);
    (void)VKP_I_ADD(&client->refs, 1);
    return client;
}

VKP_API void vkp_client_close(vkp_client *client)
{
    if (client == NULL) {
        return;
    }
    if (vkp_i_on_loop(client->loop)) {
        vkp_i_client_close_now(client);
        return;
    }
    VKP_I_LOCK(&client->mutex);
    client->close_wanted = true;
    vkp_i_client_schedule(client);
    VKP_I_UNLOCK(&client->mutex);
}

VKP_API void vkp_client_unref(vkp_client *client)
{
    if (client == NULL) {
        return;
    }
    if (VKP_I_UNREF(&client->users) == 1) {
        vkp_client_close(client);
    }
    vkp_i_client_release(client);
}

VKP_API vkp_client_state vkp_client_get_state(const vkp_client *client)
{
    return (vkp_client_state)VKP_I_LOAD_ACQ(&client->state);
}

VKP_API int vkp_client_get_protocol(const vkp_client *client)
{
    return (int)VKP_I_LOAD(&client->protocol);
}

/* Copy the config, set its defaults, open the reader. False: no memory. */
static vkp_status vkp_i_client_configure(vkp_client *client, const vkp_client_config *config)
{
    vkp_client_config *own = &client->config;
    vkp_str *texts[4];
    bool copied = true;
    size_t i;
    *own = *config;
    own->pushes = NULL;
    texts[0] = &own->address;
    texts[1] = &own->username;
    texts[2] = &own->password;
    texts[3] = &own->name;
    for (i = 0; i < 4; i++) {
        copied = copied && vkp_i_copy_str(client->env, texts[i]);
        if (!copied) {
            texts[i]->ptr = NULL; /* not copied: vkp_i_client_free must not free it */
        }
    }
#define VKP_I_DEFAULT(field, value) \
    if (own->field == 0) {          \
        own->field = (value);       \
    }
    VKP_I_DEFAULT(connect_timeout_ms, 5000)
    VKP_I_DEFAULT(retry_min_ms, 50)
    VKP_I_DEFAULT(retry_max_ms, 5000)
    VKP_I_DEFAULT(heartbeat_ms, 15000)
    VKP_I_DEFAULT(heartbeat_timeout_ms, 5000)
    VKP_I_DEFAULT(queue_bytes, (size_t)64 << 20)
#undef VKP_I_DEFAULT
    own->resp.lenient = true;
    own->resp.env = client->env;
    return copied ? vkp_resp_reader_open(&own->resp, &client->reader) : VKP_ERR_NOMEM;
}

VKP_API vkp_status vkp_client_open(vkp_loop *loop, const vkp_client_config *config,
                                   vkp_client **out)
{
    vkp_client *client;
    vkp_status status;
    int kind;
    VKP_I_REQUIRE(loop != NULL && config != NULL && config->address.ptr != NULL && out != NULL);
    VKP_I_REQUIRE(vkp_i_on_loop(loop) && (config->on_push == NULL || config->pushes == NULL));
    VKP_I_REQUIRE(config->protocol == 0 || config->protocol == 2 || config->protocol == 3);
    if (loop->closed) {
        return VKP_ERR_CLOSED;
    }
    client = (vkp_client *)vkp_i_alloc_zero(config->env != NULL ? config->env : loop->env,
                                            sizeof *client);
    if (client == NULL) {
        return VKP_ERR_NOMEM;
    }
    client->env = config->env != NULL ? config->env : loop->env;
    client->loop = vkp_loop_ref(loop);
    client->refs = 2;
    client->users = 1;
    VKP_I_MUTEX_INIT(&client->mutex);
    vkp_i_requests_init(&client->submitted);
    vkp_i_requests_init(&client->flight);
    vkp_i_requests_init(&client->taken);
    vkp_i_requests_init(&client->failed);
    for (kind = 0; kind < VKP_SUB_KINDS; kind++) {
        vkp_i_map_init(&client->interests[kind], client->env);
    }
    client->task.fn = vkp_i_client_run;
    client->attached.on_loop_close = vkp_i_client_loop_closed;
    status = vkp_i_client_configure(client, config);
    if (status != VKP_OK) {
        vkp_i_client_free(client);
        return status;
    }
    if (config->pushes != NULL) {
        client->config.pushes = vkp_mpsc_tx_ref(config->pushes);
    }
    vkp_i_loop_attach(loop, &client->attached);
    status = vkp_i_client_connect(client);
    if (client->timer.i_index == 0) { /* without a timer the client would never try again */
        status = VKP_ERR_NOMEM;
    }
    if (status == VKP_ERR_INVALID || status == VKP_ERR_LIMIT || status == VKP_ERR_UNSUPPORTED ||
        client->timer.i_index == 0) {
        vkp_i_client_close_now(client); /* no later try can succeed */
        vkp_client_unref(client);
        return status;
    }
    *out = client;
    return VKP_OK;
}

#endif /* VKP_I_IO */
