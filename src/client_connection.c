#if VKP_I_IO
/* ======================================================================================
   >>impl-client-connection   The life of a client
   ======================================================================================
   Everything here runs on the loop's thread, except vkp_client_ref, _unref, _close and the
   getters. The states of vkp_client_state:
     CONNECTING  the link connects and logs in; ready: READY; down, or over connect_timeout_ms:
                 WAITING
     WAITING     the timer of vkp_i_client_backoff: CONNECTING
     READY       commands are written; the link down: WAITING
     CLOSED      from every state: vkp_client_close, or the loop's close; final
   vkp_i_client_down is the only way to WAITING, vkp_i_client_close_now the only way to CLOSED.
   Both collect all requests that fail before they call the first callback, because any callback
   may close the client; code behind a callback checks `closed`, `ready` or `link.conn`.
   The mutex is held only around `submitted` and its flags, never around a callback.           */

static void vkp_i_client_on_timer(vkp_timer *timer);

/* Set the state, and whether commands are accepted. */
static void vkp_i_client_set_state(vkp_client *client, vkp_client_state state)
{
    VKP_I_STORE_REL(&client->state, (uint32_t)state);
    VKP_I_LOCK(&client->mutex);
    client->accepting = state == VKP_CLIENT_CONNECTING || state == VKP_CLIENT_READY ||
                        (state == VKP_CLIENT_WAITING && client->config.hold_ms > 0);
    VKP_I_UNLOCK(&client->mutex);
    if (vkp_watch_replace(client->states, &state) != VKP_OK) {
        vkp_i_log(client->env, VKP_LOG_ERROR, "out of memory: a state was not reported");
    }
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

static bool vkp_i_request_is_interest(vkp_i_request *request)
{
    return VKP_CONTAINER(request, vkp_i_ask, request)->kind != VKP_I_ASK_COMMAND;
}

/* Settle every request of `failed`. A callback may close the client: that close settles the other
   requests before it returns.                                                                 */
static void vkp_i_client_settle_failed(vkp_client *client, vkp_status status)
{
    vkp_i_request *request;
    while ((request = vkp_i_requests_pop(&client->failed)) != NULL) {
        request->settle(request, status, NULL, NULL);
    }
}

/* Move asks from `submitted` to out: interests (WANT, LEAVE), commands, or both. The others
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
   wanted names stay, and with hold_ms the commands that are not written. All are moved before the
   first callback, because a callback may close the client.                                    */
static void vkp_i_client_collect_failed(vkp_client *client)
{
    client->ready = false;
    vkp_i_client_end_probe(client);
    vkp_i_requests_move(&client->link.flight, &client->failed);
    vkp_i_client_collect(client, false, client->config.hold_ms == 0 || client->closed,
                         &client->failed);
    vkp_i_client_suspend(client);
}

/* ---- commands that wait for a connection ---- */

/* When the oldest command in `submitted` began to wait; 0: there is none. */
static uint64_t vkp_i_client_waits_since(vkp_client *client)
{
    vkp_i_request *request;
    uint64_t since_ns;
    VKP_I_LOCK(&client->mutex);
    request = client->submitted.first;
    while (request != NULL && vkp_i_request_is_interest(request)) {
        request = request->next;
    }
    since_ns = request != NULL ? request->sent_ns : 0;
    VKP_I_UNLOCK(&client->mutex);
    return since_ns;
}

static void vkp_i_client_on_hold_timer(vkp_timer *timer);

/* Commands may wait while there is no connection: limit their wait, and try soon. */
static void vkp_i_client_hold_commands(vkp_client *client)
{
    uint64_t since_ns =
        client->ready || client->config.hold_ms == 0 ? 0 : vkp_i_client_waits_since(client);
    uint64_t soon_ns = vkp_i_after_ms(vkp_i_loop_now(client->loop), client->config.retry_min_ms);
    if (since_ns == 0) {
        return;
    }
    if (client->hold_timer.i_index == 0 &&
        vkp_timer_start(&client->hold_timer, client->loop, vkp_i_client_on_hold_timer, 0,
                        vkp_i_after_ms(since_ns, client->config.hold_ms)) != VKP_OK) {
        vkp_i_log(client->env, VKP_LOG_ERROR, "out of memory: a command may wait without end");
    }
    if (vkp_client_get_state(client) == VKP_CLIENT_WAITING &&
        client->timer.i_deadline_ns > soon_ns) {
        vkp_i_client_start_timer(client, client->config.retry_min_ms);
    }
}

/* The oldest command has waited for hold_ms: it fails, with those of its age. */
static void vkp_i_client_on_hold_timer(vkp_timer *timer)
{
    vkp_client *client = VKP_CONTAINER(timer, vkp_client, hold_timer);
    uint64_t now_ns = client->loop->now_ns;
    vkp_i_requests all;
    vkp_i_request *request;
    if (client->ready) {
        return; /* they are written */
    }
    (void)VKP_I_ADD(&client->refs, 1);
    vkp_i_requests_init(&all);
    VKP_I_LOCK(&client->mutex);
    vkp_i_requests_move(&client->submitted, &all);
    while ((request = vkp_i_requests_pop(&all)) != NULL) {
        bool late = !vkp_i_request_is_interest(request) &&
                    vkp_i_after_ms(request->sent_ns, client->config.hold_ms) <= now_ns;
        vkp_i_requests_append(late ? &client->failed : &client->submitted, request);
    }
    VKP_I_UNLOCK(&client->mutex);
    vkp_i_client_settle_failed(client, VKP_ERR_DISCONNECTED);
    if (!client->closed) {
        vkp_i_client_hold_commands(client);
    }
    vkp_i_client_release(client);
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

/* Whether the connection that is lost now stood so long that the bound of the wait starts again. */
static bool vkp_i_client_stood(const vkp_client *client)
{
    uint64_t stood_ns = vkp_i_loop_now(client->loop) - client->link.ready_ns;
    return client->ready && stood_ns / VKP_I_NS_PER_MS >= client->config.retry_reset_ms;
}

/* The connection, or the try to connect, has ended, and link.error says why: start the timer of the
   next try, emit DISCONNECTED or CONNECT_FAILED, settle what failed.                          */
static void vkp_i_client_down(vkp_client *client)
{
    bool was_ready = client->ready;
    bool report = !was_ready && !client->failure_reported;
    vkp_str why = vkp_str_of(client->link.error);
    if (client->closed || vkp_client_get_state(client) == VKP_CLIENT_WAITING) {
        return;
    }
    if (vkp_i_client_stood(client)) {
        client->tries = 0;
    }
    vkp_i_client_set_error(client, why.ptr);
    vkp_i_log(client->env, was_ready || report ? VKP_LOG_WARN : VKP_LOG_INFO, "%s: %s",
              client->config.address.ptr, why.ptr);
    vkp_i_client_set_state(client, VKP_CLIENT_WAITING);
    vkp_i_client_start_timer(client, vkp_i_client_backoff(client));
    vkp_i_client_hold_commands(client);
    vkp_i_client_collect_failed(client);
    client->failure_reported = !was_ready;
    if (!was_ready) {
        VKP_I_COUNT(client, failures);
    }
    if (was_ready) {
        VKP_I_COUNT(client, outages);
        vkp_i_client_event(client, VKP_PUSH_DISCONNECTED, why);
    } else if (report) {
        vkp_i_client_event(client, VKP_PUSH_CONNECT_FAILED, why);
    }
    vkp_i_client_settle_failed(client, VKP_ERR_DISCONNECTED);
}

static void vkp_i_client_take(vkp_client *client);

static vkp_client *vkp_i_client_of(vkp_i_link *link)
{
    return VKP_CONTAINER(link, vkp_client, link);
}

/* The handshake succeeded: emit CONNECTED or RECONNECTED, subscribe again, write the commands
   that waited.                                                                                */
static void vkp_i_client_on_ready(vkp_i_link *link)
{
    vkp_client *client = vkp_i_client_of(link);
    client->ready = true;
    client->failure_reported = false;
    client->audited_ns = client->loop->now_ns;
    client->beat_sent = false;
    client->counts_refused = false;
    client->audit_due = false;
    client->unsent = 0;
    memset(client->repaired, 0, sizeof client->repaired);
    client->patient_ns = 0;
    client->heartbeat_ns = vkp_i_after_ms(client->loop->now_ns, client->config.heartbeat_ms);
    client->delivery_ns = vkp_i_after_ms(client->loop->now_ns, client->config.delivery_ms);
    client->delivered_ns = client->loop->now_ns;
    VKP_I_COUNT(client, connections);
    VKP_I_STORE(&client->protocol, link->protocol);
    vkp_i_client_set_state(client, VKP_CLIENT_READY);
    vkp_i_client_start_watch(client);
    vkp_i_client_event(client, client->was_ready ? VKP_PUSH_RECONNECTED : VKP_PUSH_CONNECTED,
                       vkp_i_str(NULL, 0));
    client->was_ready = true;
    if (client->ready) {
        vkp_i_client_resubscribe(client);
    }
    if (client->ready) {
        vkp_i_client_take(client);
    }
}

static void vkp_i_client_on_push(vkp_i_link *link, const vkp_push *push)
{
    vkp_client *client = vkp_i_client_of(link);
    if (push->kind == VKP_PUSH_UNSUBSCRIBED) {
        vkp_i_client_taken(client, push);
    } else if (!vkp_i_client_is_own(client, push->channel)) {
        vkp_i_client_hand(client, push);
    } else if (push->kind == VKP_PUSH_MESSAGE) {
        vkp_i_client_take_own(client, push);
    }
}

static void vkp_i_client_on_hello(vkp_i_link *link, const vkp_value *hello)
{
    const vkp_client *client = VKP_CONTAINER(link, vkp_client, link);
    if (client->on_hello != NULL) {
        client->on_hello(client->config.user, hello);
    }
}

static void vkp_i_client_on_down(vkp_i_link *link)
{
    vkp_i_client_down(vkp_i_client_of(link));
}

/* The first request is in flight again: the watch must not sleep until the next heartbeat. */
static void vkp_i_client_on_busy(vkp_i_link *link)
{
    vkp_client *client = vkp_i_client_of(link);
    uint64_t overdue_ns = vkp_i_after_ms(client->loop->now_ns, client->config.reply_timeout_ms);
    if (client->ready && client->timer.i_deadline_ns > overdue_ns) {
        vkp_i_client_start_watch(client);
    }
}

static void vkp_i_client_hold(vkp_i_link *link)
{
    (void)VKP_I_ADD(&vkp_i_client_of(link)->refs, 1);
}

static void vkp_i_client_unhold(vkp_i_link *link)
{
    vkp_i_client_release(vkp_i_client_of(link));
}

static const vkp_i_link_ops vkp_i_client_link_ops = {
    vkp_i_client_on_ready, vkp_i_client_on_push,  vkp_i_client_on_down,
    vkp_i_client_on_busy,  vkp_i_client_on_hello, NULL,
    vkp_i_client_hold,     vkp_i_client_unhold,   NULL};

/* Begin an attempt to connect, with its time limit. On failure the wait for the next try has
   begun.                                                                                      */
static vkp_status vkp_i_client_connect(vkp_client *client)
{
    vkp_status status = VKP_ERR_NOMEM;
    client->begun = true;
    vkp_i_client_set_state(client, VKP_CLIENT_CONNECTING);
    vkp_i_client_start_timer(client, client->config.connect_timeout_ms);
    if (vkp_i_client_aim(client) && !client->closed) {
        status = vkp_i_link_connect(&client->link, client->target.address, client->target.username,
                                    client->target.password);
    }
    if (status == VKP_OK &&
        !client->link.looking) { /* a lookup that blocked took none of the time */
        vkp_i_client_start_timer(client, client->config.connect_timeout_ms);
    }
    if (status != VKP_OK && !client->closed) {
        vkp_i_link_lose(&client->link,
                        status == VKP_ERR_SYS ? vkp_i_link_why(errno) : vkp_status_str(status));
    }
    return status;
}

/* The timer's callback; what the timer means depends on the state. */
static void vkp_i_client_on_timer(vkp_timer *timer)
{
    vkp_client *client = VKP_CONTAINER(timer, vkp_client, timer);
    (void)VKP_I_ADD(&client->refs, 1);
    switch (vkp_client_get_state(client)) {
    case VKP_CLIENT_CONNECTING:
        if (!client->begun) {
            (void)!vkp_i_client_connect(client); /* on failure the wait has begun */
            break;
        }
        vkp_i_link_lose(&client->link, "no connection within the time limit");
        break;
    case VKP_CLIENT_WAITING:
        (void)!vkp_i_client_connect(client); /* on failure the next wait has begun */
        break;
    case VKP_CLIENT_READY:
        vkp_i_client_watch(client);
        if (client->ready) {
            vkp_i_client_start_watch(client);
        }
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
    return client->link.protocol == 2 && client->live > 0;
}

/* No memory for a new name: report that, because the next connection may be far away; then put the
   ask, and all asks behind it, back to `submitted` for the next connection; this one fails. */
static void vkp_i_client_lost_memory(vkp_client *client, vkp_i_ask *ask)
{
    vkp_i_requests all;
    vkp_subscribe_fn done = ask->done;
    ask->done = NULL;
    if (done != NULL) {
        done(ask->user, VKP_ERR_DISCONNECTED, vkp_str_of("out of memory"));
    }
    if (client->closed) {
        vkp_i_ask_free(ask);
        return;
    }
    vkp_i_requests_init(&all);
    vkp_i_requests_append(&all, &ask->request);
    vkp_i_requests_move(&client->taken, &all);
    VKP_I_LOCK(&client->mutex);
    vkp_i_requests_move(&client->submitted, &all);
    vkp_i_requests_move(&all, &client->submitted);
    VKP_I_UNLOCK(&client->mutex);
    vkp_i_link_lose(&client->link, "out of memory");
}

/* Start one ask that was taken from `submitted`. */
static void vkp_i_client_dispatch(vkp_client *client, vkp_i_ask *ask)
{
    if (ask->kind == VKP_I_ASK_WANT) {
        if (!vkp_i_client_want(client, ask)) {
            vkp_i_client_lost_memory(client, ask);
        }
        vkp_i_client_keep_own(client);
    } else if (ask->kind == VKP_I_ASK_LEAVE) {
        vkp_i_client_leave(client, ask);
        vkp_i_client_keep_own(client);
    } else if (ask->waits && client->ready && !vkp_i_client_must_refuse(client)) {
        vkp_i_client_carry_behind(client, ask);
    } else if (ask->blocks && client->ready) {
        vkp_i_client_carry(client, ask);
    } else if (vkp_i_client_must_refuse(client)) {
        vkp_i_log(client->env, VKP_LOG_WARN,
                  "command refused: a RESP2 connection with subscriptions carries no commands");
        vkp_i_ask_settled(&ask->request, VKP_ERR_REFUSED, NULL, NULL);
    } else if (!client->ready || !vkp_i_link_start(&client->link, &ask->request)) {
        vkp_i_ask_settled(&ask->request, VKP_ERR_DISCONNECTED, NULL, NULL);
    }
}

/* Start the submitted asks. Commands stay in `submitted` until the client is ready. */
static void vkp_i_client_take(vkp_client *client)
{
    vkp_i_request *request;
    vkp_i_client_hold_commands(client);
    vkp_i_client_collect(client, true, client->ready, &client->taken);
    while ((request = vkp_i_requests_pop(&client->taken)) != NULL) {
        vkp_i_client_dispatch(client, VKP_CONTAINER(request, vkp_i_ask, request));
    }
}

/* Close the client, once. Gives the loop's reference back: the caller must hold another. Loop's
   thread.                                                                                     */
static void vkp_i_client_close_now(vkp_client *client)
{
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
    vkp_timer_stop(&client->hold_timer);
    vkp_i_link_close(&client->link);
    vkp_i_client_end_privates(client);
    (void)snprintf(client->link.error, sizeof client->link.error, "closed");
    vkp_i_client_collect_failed(client);
    vkp_i_requests_move(&client->reporting, &client->failed);
    vkp_i_requests_move(&client->taken, &client->failed);
    vkp_i_client_collect(client, true, true, &client->failed);
    vkp_i_client_forget(client);
    vkp_i_client_settle_failed(client, VKP_ERR_CLOSED);
    vkp_handler_unref(client->room); /* the room that it waits for is free again */
    client->room = NULL;
    if (client->missed > 0) {
        vkp_i_client_report_missed(client);
    }
    vkp_mpsc_tx_unref(client->config.pushes);
    client->config.pushes = NULL;
    vkp_i_client_release(client);
}

/* The client's task: start what any thread submitted. The task holds a reference. */
static void vkp_i_client_run(vkp_i_task *task)
{
    vkp_client *client = VKP_CONTAINER(task, vkp_client, task);
    bool close_wanted;
    bool sweep_wanted;
    VKP_I_LOCK(&client->mutex);
    client->task_queued = false;
    close_wanted = client->close_wanted;
    sweep_wanted = client->sweep_wanted;
    client->sweep_wanted = false;
    VKP_I_UNLOCK(&client->mutex);
    vkp_i_client_take(client);
    if (sweep_wanted && !client->closed) {
        vkp_i_client_sweep_privates(client);
    }
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

VKP_API vkp_status vkp_client_watch_state(vkp_client *client, vkp_watch_rx **states)
{
    VKP_I_REQUIRE(client != NULL && states != NULL);
    return vkp_watch_subscribe(client->states, states);
}

VKP_API vkp_status vkp_client_wait_ready(vkp_client *client, uint64_t deadline_ns)
{
    vkp_watch_rx *states;
    vkp_status status;
    VKP_I_REQUIRE(client != NULL);
    status = vkp_watch_subscribe(client->states, &states);
    if (status != VKP_OK) {
        return status;
    }
    while (status == VKP_OK && vkp_client_get_state(client) != VKP_CLIENT_READY) {
        status = vkp_client_get_state(client) == VKP_CLIENT_CLOSED
                     ? VKP_ERR_CLOSED
                     : vkp_watch_changed(states, deadline_ns);
    }
    vkp_watch_rx_unref(states);
    return status;
}

VKP_API void vkp_client_get_stats(const vkp_client *client, vkp_client_stats *stats)
{
    stats->connections = VKP_I_LOAD(&client->stats.connections);
    stats->failures = VKP_I_LOAD(&client->stats.failures);
    stats->outages = VKP_I_LOAD(&client->stats.outages);
    stats->gaps = VKP_I_LOAD(&client->stats.gaps);
    stats->refusals = VKP_I_LOAD(&client->stats.refusals);
    stats->losses = VKP_I_LOAD(&client->stats.losses);
    stats->audits = VKP_I_LOAD(&client->stats.audits);
    stats->repairs = VKP_I_LOAD(&client->stats.repairs);
    stats->probes = VKP_I_LOAD(&client->stats.probes);
    stats->deliveries = VKP_I_LOAD(&client->stats.deliveries);
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

VKP_API int vkp_client_get_protocol(const vkp_client *client)
{
    return (int)VKP_I_LOAD(&client->protocol);
}

/* Copy the setup commands of the config. */
static vkp_status vkp_i_client_copy_setup(vkp_client *client, const vkp_client_config *config)
{
    const vkp_env *env = client->env;
    vkp_client_setup *setup;
    size_t i;
    size_t j;
    if (config->setup_count == 0) {
        return VKP_OK;
    }
    setup = (vkp_client_setup *)vkp_i_alloc_zero(env, config->setup_count * sizeof *setup);
    for (i = 0; setup != NULL && i < config->setup_count; i++) {
        size_t argc = config->setup[i].argc;
        vkp_str *argv = (vkp_str *)vkp_i_alloc_zero(env, argc * sizeof *argv);
        bool copied = argv != NULL;
        setup[i] = config->setup[i];
        setup[i].argv = argv;
        setup[i].argc = copied ? argc : 0;
        for (j = 0; copied && j < argc; j++) {
            argv[j] = config->setup[i].argv[j];
            copied = vkp_i_copy_str(env, &argv[j]);
        }
        if (!copied || !vkp_i_copy_str(env, &setup[i].expect)) {
            setup[i].expect.ptr = NULL;
            vkp_i_setup_free(env, setup, i + 1, config->setup_count);
            return VKP_ERR_NOMEM;
        }
    }
    client->config.setup = setup;
    client->config.setup_count = setup != NULL ? config->setup_count : 0;
    return setup != NULL ? VKP_OK : VKP_ERR_NOMEM;
}

/* Copy the config, set its defaults, prepare the link. */
static vkp_status vkp_i_client_configure(vkp_client *client, const vkp_client_config *config)
{
    vkp_client_config *own = &client->config;
    vkp_str *texts[4];
    bool copied = true;
    size_t i;
    *own = *config;
    own->pushes = NULL;
    own->resolver = NULL;
    own->setup = NULL;
    own->setup_count = 0;
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
    if (!copied || vkp_i_client_copy_setup(client, config) != VKP_OK) {
        return VKP_ERR_NOMEM;
    }
#define VKP_I_DEFAULT(field, value) \
    if (own->field == 0) {          \
        own->field = (value);       \
    }
    VKP_I_DEFAULT(connect_timeout_ms, 5000)
    VKP_I_DEFAULT(retry_min_ms, 50)
    VKP_I_DEFAULT(retry_max_ms, 5000)
    VKP_I_DEFAULT(retry_reset_ms, 5000)
    VKP_I_DEFAULT(keepalive_ms, 30000)
    VKP_I_DEFAULT(unacked_ms, 20000)
    VKP_I_DEFAULT(heartbeat_ms, 15000)
    VKP_I_DEFAULT(reply_timeout_ms, 5000)
    VKP_I_DEFAULT(blocked_timeout_ms, 60000)
    VKP_I_DEFAULT(delivery_ms, VKP_OFF)
    VKP_I_DEFAULT(queue_bytes, (size_t)64 << 20)
#undef VKP_I_DEFAULT
    own->resp.lenient = true;
    own->resp.streamed = false;
    own->resp.env = client->env;
    if (own->delivery_ms != VKP_OFF) {
        vkp_i_client_name_own(client);
    }
    return vkp_i_link_init(&client->link, client->env, client->loop, own, &vkp_i_client_link_ops);
}

/* Whether every setup command has a name. */
static bool vkp_i_setup_is_valid(const vkp_client_config *config)
{
    size_t i;
    for (i = 0; i < config->setup_count; i++) {
        if (config->setup == NULL || config->setup[i].argc == 0 || config->setup[i].argv == NULL) {
            return false;
        }
    }
    return true;
}

/* Open a client by a config that is valid and has no URL. */
static vkp_status vkp_i_client_new(vkp_loop *loop, const vkp_client_config *config,
                                   vkp_client **out)
{
    const vkp_env *env = config->env != NULL ? config->env : loop->env;
    vkp_client *client = (vkp_client *)vkp_i_alloc_zero(env, sizeof *client);
    vkp_i_parts parts;
    vkp_watch_config states;
    vkp_client_state first = VKP_CLIENT_CONNECTING;
    vkp_status status;
    int kind;
    if (client == NULL) {
        return VKP_ERR_NOMEM;
    }
    client->env = env;
    client->loop = vkp_loop_ref(loop);
    client->refs = 2;
    client->users = 1;
    VKP_I_MUTEX_INIT(&client->mutex);
    vkp_i_requests_init(&client->submitted);
    vkp_i_requests_init(&client->link.flight);
    vkp_i_requests_init(&client->taken);
    vkp_i_requests_init(&client->failed);
    vkp_i_requests_init(&client->waiting);
    vkp_i_requests_init(&client->reporting);
    for (kind = 0; kind < VKP_SUB_KINDS; kind++) {
        vkp_i_map_init(&client->interests[kind], client->env);
    }
    client->task.fn = vkp_i_client_run;
    client->attached.on_loop_close = vkp_i_client_loop_closed;
    status = vkp_i_client_configure(client, config);
    if (status == VKP_OK) {
        status = vkp_i_split_address(client->env, config->address, &parts);
    }
    if (status == VKP_OK) {
        memset(&states, 0, sizeof states);
        states.elem_bytes = sizeof(vkp_client_state);
        states.env = client->env;
        status = vkp_watch_open(&states, &client->states);
    }
    if (status == VKP_OK) { /* later ones find the memory that the first one took */
        status = vkp_watch_replace(client->states, &first);
    }
    if (status != VKP_OK) {
        vkp_i_client_free(client);
        return status;
    }
    if (config->pushes != NULL) {
        client->config.pushes = vkp_mpsc_tx_ref(config->pushes);
    }
    if (config->resolver != NULL) {
        client->config.resolver = vkp_resolver_ref(config->resolver);
    }
    vkp_i_loop_attach(loop, &client->attached);
    /* The first try begins in the loop's next round: no callback runs inside this call. */
    vkp_i_client_set_state(client, VKP_CLIENT_CONNECTING);
    vkp_i_client_start_timer(client, 0);
    if (client->timer.i_index == 0) { /* without a timer the client would never try */
        vkp_i_client_close_now(client);
        vkp_client_unref(client);
        return VKP_ERR_NOMEM;
    }
    *out = client;
    return VKP_OK;
}

/* Whether the fields that a URL stands for are unset. */
static bool vkp_i_client_has_only_url(const vkp_client_config *config)
{
    return config->address.ptr == NULL && config->username.ptr == NULL &&
           config->password.ptr == NULL && config->database == 0;
}

VKP_API vkp_status vkp_client_open(vkp_loop *loop, const vkp_client_config *config,
                                   vkp_client **out)
{
    vkp_client_config read;
    const vkp_env *env;
    void *text;
    size_t bytes;
    vkp_status status;
    VKP_I_REQUIRE(loop != NULL && config != NULL && out != NULL);
    VKP_I_REQUIRE(config->url.ptr != NULL ? vkp_i_client_has_only_url(config)
                                          : config->address.ptr != NULL);
    VKP_I_REQUIRE(vkp_i_on_loop(loop) && (config->on_push == NULL || config->pushes == NULL));
    VKP_I_REQUIRE(config->protocol == 0 || config->protocol == 2 || config->protocol == 3);
    VKP_I_REQUIRE((unsigned)config->role <= VKP_CLIENT_ROLE_PRIMARY &&
                  vkp_i_setup_is_valid(config) && vkp_i_is_client_name(config->name));
    if (loop->closed) {
        return VKP_ERR_CLOSED;
    }
    if (config->url.ptr == NULL) {
        return vkp_i_client_new(loop, config, out);
    }
    env = config->env != NULL ? config->env : loop->env;
    read = *config;
    status = vkp_i_url_apply(env, &read, &text, &bytes);
    if (status == VKP_OK) {
        status = vkp_i_client_new(loop, &read, out);
    }
    vkp_i_free(env, text, bytes);
    return status;
}

#endif /* VKP_I_IO */
