#if VKP_I_IO
/* ======================================================================================
   >>impl-relay-serve   Relay: clients, and the relay itself
   ======================================================================================
   Local clients, accepting, pushes, idle time, drain, open and close of a relay.
   Loop 0 accepts and distributes descriptors over the shards in turn; a descriptor for another
   loop is a vkp_i_handover task, listed under the relay's mutex so that vkp_relay_unref finds
   it. A local client belongs to its shard's loop from vkp_i_shard_adopt to vkp_i_local_on_close.
   Pushes arrive on loop 0 (vkp_i_relay_on_push): delivered to its own hub, and sent to each
   other shard's channel, whose push loop delivers there.
   Idle: the shard that closes the relay's last client queues idle_task on loop 0, which starts
   idle_timer. Drain: loop 0 queues drain_task on each shard; the last shard without clients
   queues end_task on loop 0, which calls on_end; at the deadline kill_task closes the clients
   that are left.
   vkp_relay_unref runs while no loop runs: it may touch every shard.                          */

/* ---- local clients ---- */

/* The local client sends nothing more: answer its commands, then drain. It does not wait for what a
   server may answer late, or never.                                                           */
static bool vkp_i_local_on_end(vkp_conn *conn, void *user)
{
    vkp_i_local *local = (vkp_i_local *)user;
    if (local->session != NULL && vkp_i_session_may_wait(local->session)) {
        return false;
    }
    local->flags |= VKP_I_LOCAL_LEAVING;
    if (local->answer_count == 0 && (local->flags & VKP_I_LOCAL_BUSY) == 0) {
        vkp_conn_drain(conn);
    }
    return true;
}

/* The outbox is empty: a client that was paused for it is read again, and so is its session. */
static void vkp_i_local_on_drain(vkp_conn *conn, void *user)
{
    vkp_i_local *local = (vkp_i_local *)user;
    (void)conn;
    if (local->session != NULL) {
        vkp_i_session_resume(local->session);
    }
    vkp_i_local_maybe_resume(local);
}

static void vkp_i_shard_drained(vkp_i_shard *shard);
static void vkp_i_relay_client_left(vkp_relay *relay);

/* The connection of a local client is closed: leave the hub and the shard's list. */
static void vkp_i_local_on_close(vkp_conn *conn, void *user, vkp_close_reason reason, int error)
{
    vkp_i_local *local = (vkp_i_local *)user;
    vkp_i_shard *shard = local->shard;
    vkp_relay *relay = shard->relay;
    vkp_i_log(relay->env, VKP_LOG_DEBUG, "client %llu: %s%s%s", (unsigned long long)local->id,
              vkp_close_reason_str(reason), error != 0 ? ": " : "",
              error != 0 ? strerror(error) : "");
    if (reason == VKP_CLOSE_SLOW) {
        (void)VKP_I_ADD(&relay->slow_closed, (uint64_t)1);
    }
    local->flags |= VKP_I_LOCAL_CLOSED;
    vkp_i_local_leave_all(local);
    vkp_i_multi_free(local);
    vkp_i_local_end_session(local);
    vkp_i_local_leave_room(local);
    vkp_i_local_was_read(local, 0, 0);
    if (local->prev != NULL) {
        local->prev->next = local->next;
    } else {
        shard->locals = local->next;
    }
    if (local->next != NULL) {
        local->next->prev = local->prev;
    }
    if (shard->survey_at == local) {
        shard->survey_at = local->next;
    }
    shard->local_count--;
    if (shard->local_count == 0) {
        vkp_i_shard_stop_looking(shard);
    }
    local->member.conn = NULL;
    vkp_conn_unref(conn);
    vkp_i_shard_drained(shard);
    vkp_i_relay_client_left(relay);
    vkp_i_local_release(local);
}

static const vkp_conn_ops vkp_i_local_ops = {NULL,
                                             vkp_i_local_on_data,
                                             vkp_i_local_on_drain,
                                             vkp_i_local_on_end,
                                             vkp_i_local_on_close,
                                             vkp_resp_get_frame_len};

/* Serve an accepted descriptor on this shard's loop. Takes fd and seat, also on failure. */
static void vkp_i_shard_adopt(vkp_i_shard *shard, int fd, vkp_seat *seat, const vkp_i_door *door)
{
    vkp_relay *relay = shard->relay;
    vkp_i_local *local = NULL;
    vkp_conn *conn;
    if (!shard->draining && !shard->loop->closed) {
        local = (vkp_i_local *)vkp_i_alloc_zero(relay->env, sizeof *local);
    }
    if (local == NULL || vkp_i_conn_adopt(shard->loop, fd, shard->profile, true, &conn) != VKP_OK) {
        vkp_i_free(relay->env, local, sizeof *local);
        (void)shard->loop->sys->close(fd);
        vkp_seat_unref(seat);
        vkp_i_relay_client_left(relay);
        return;
    }
    vkp_conn_set_seat(conn, seat);
    local->member.conn = conn;
    local->member.protocol = 2;
    local->shard = shard;
    local->refs = 1;
    local->id = VKP_I_ADD(&relay->next_id, (uint64_t)1) + 1;
    local->opened_ns = vkp_i_loop_now(shard->loop);
    vkp_i_local_enter(local, door);
    local->answers_end = &local->answers;
    local->next = shard->locals;
    if (local->next != NULL) {
        local->next->prev = local;
    }
    shard->locals = local;
    shard->local_count++;
    (void)VKP_I_ADD(&relay->refs, 1);
    vkp_conn_set_user(conn, local);
}

/* ---- accepting, on loop 0 ---- */

/* An accepted descriptor on its way from loop 0 to another shard's loop. */
typedef struct vkp_i_handover {
    vkp_i_task task;             /* runs vkp_i_handover_receive on the shard's loop */
    vkp_i_shard *shard;          /* receives the descriptor */
    struct vkp_i_handover *prev; /* newer one of shard->handovers; guarded by the relay's mutex */
    struct vkp_i_handover *next; /* older one of shard->handovers; guarded by the relay's mutex */
    vkp_seat *seat;              /* the client's; taken together with fd */
    const vkp_i_door *door;      /* where it came in */
    int fd;                      /* -1: vkp_relay_unref closed the descriptor */
} vkp_i_handover;

/* Enter shard->handovers. */
static void vkp_i_handover_link(vkp_i_handover *handover)
{
    vkp_i_shard *shard = handover->shard;
    VKP_I_LOCK(&shard->relay->mutex);
    handover->prev = NULL;
    handover->next = shard->handovers;
    if (handover->next != NULL) {
        handover->next->prev = handover;
    }
    shard->handovers = handover;
    VKP_I_UNLOCK(&shard->relay->mutex);
}

static void vkp_i_handover_unlink(vkp_i_handover *handover)
{
    vkp_i_shard *shard = handover->shard;
    VKP_I_LOCK(&shard->relay->mutex);
    if (handover->prev != NULL) {
        handover->prev->next = handover->next;
    } else {
        shard->handovers = handover->next;
    }
    if (handover->next != NULL) {
        handover->next->prev = handover->prev;
    }
    VKP_I_UNLOCK(&shard->relay->mutex);
}

/* Task on the shard's loop: serve the descriptor. */
static void vkp_i_handover_receive(vkp_i_task *task)
{
    vkp_i_handover *handover = VKP_CONTAINER(task, vkp_i_handover, task);
    vkp_relay *relay = handover->shard->relay;
    vkp_i_handover_unlink(handover);
    if (handover->fd >= 0) {
        vkp_i_shard_adopt(handover->shard, handover->fd, handover->seat, handover->door);
    }
    vkp_i_free(relay->env, handover, sizeof *handover);
    vkp_i_relay_release(relay);
}

/* Queue an accepted descriptor on another shard's loop. Takes fd and seat, also on failure. */
static void vkp_i_relay_hand_over(const vkp_i_door *door, vkp_i_shard *shard, int fd,
                                  vkp_seat *seat)
{
    vkp_relay *relay = door->relay;
    vkp_i_handover *handover = (vkp_i_handover *)vkp_i_alloc(relay->env, sizeof *handover);
    if (handover != NULL) {
        handover->task.fn = vkp_i_handover_receive;
        handover->shard = shard;
        handover->fd = fd;
        handover->seat = seat;
        handover->door = door;
        (void)VKP_I_ADD(&relay->refs, 1);
        vkp_i_handover_link(handover);
        if (vkp_i_loop_queue(shard->loop, &handover->task)) {
            return;
        }
        vkp_i_handover_unlink(handover);
        vkp_i_free(relay->env, handover, sizeof *handover);
        vkp_i_relay_release(relay);
    }
    (void)shard->loop->sys->close(fd);
    vkp_seat_unref(seat);
    vkp_i_relay_client_left(relay);
}

/* A listener admitted a client: the shards take clients in turn. Loop 0. */
static void vkp_i_relay_on_fd(void *user, int fd, vkp_seat *seat)
{
    const vkp_i_door *door = (const vkp_i_door *)user;
    vkp_relay *relay = door->relay;
    vkp_i_shard *shard = &relay->shards[relay->next_shard++ % relay->shard_count];
    if (shard == &relay->shards[0]) {
        vkp_i_shard_adopt(shard, fd, seat, door);
    } else {
        vkp_i_relay_hand_over(door, shard, fd, seat);
    }
}

/* A listener refuses a client: write the reason. Loop 0. */
static void vkp_i_relay_on_refuse(void *user, int fd, vkp_refusal why)
{
    static const char *const texts[VKP_REFUSAL_COUNT] = {
        "-ERR this user is not allowed here\r\n", "-ERR max number of clients reached\r\n",
        "-ERR max number of clients of this user reached\r\n",
        "-ERR the relay is out of descriptors or memory\r\n", "-ERR the relay is ending\r\n"};
    const vkp_relay *relay = ((const vkp_i_door *)user)->relay;
    vkp_range range;
    range.base = texts[why];
    range.len = strlen(texts[why]);
    (void)relay->shards[0].loop->sys->send(fd, &range, 1); /* may fail: the reason is best effort */
}

/* ---- idle: no clients ---- */

/* linger_ms have passed: call on_idle if there is still no client. */
static void vkp_i_relay_idle_over(vkp_timer *timer)
{
    vkp_relay *relay = VKP_CONTAINER(timer, vkp_relay, idle_timer);
    if (vkp_i_relay_count_clients(relay) == 0) {
        relay->on_idle(relay->user);
    }
}

/* Task on loop 0: no client is connected, so start to linger. */
static void vkp_i_relay_idle_begins(vkp_i_task *task)
{
    vkp_relay *relay = VKP_CONTAINER(task, vkp_relay, idle_task);
    vkp_loop *loop = relay->shards[0].loop;
    (void)VKP_I_XCHG(&relay->idle_queued, 0u);
    if (!loop->closed && !relay->draining && relay->on_idle != NULL &&
        vkp_i_relay_count_clients(relay) == 0 &&
        vkp_timer_start(&relay->idle_timer, loop, vkp_i_relay_idle_over, 0,
                        vkp_i_after_ms(loop->now_ns, relay->linger_ms)) != VKP_OK) {
        vkp_i_relay_idle_over(&relay->idle_timer); /* no memory for the timer: do not linger */
    }
    vkp_i_relay_release(relay);
}

/* A client disconnected: if none is left, queue idle_task on loop 0. Any shard's loop. */
static void vkp_i_relay_client_left(vkp_relay *relay)
{
    if (relay->on_idle == NULL || vkp_i_relay_count_clients(relay) > 0 ||
        VKP_I_XCHG(&relay->idle_queued, 1u) != 0) {
        return;
    }
    (void)VKP_I_ADD(&relay->refs, 1);
    if (!vkp_i_loop_queue(relay->shards[0].loop, &relay->idle_task)) {
        vkp_i_relay_release(relay);
    }
}

VKP_API vkp_status vkp_relay_open_door(vkp_relay *relay, const vkp_relay_door *door,
                                       const char **bound)
{
    vkp_listener_config config;
    vkp_i_door *made;
    vkp_status status = VKP_ERR_NOMEM;
    VKP_I_REQUIRE(relay != NULL && door != NULL && door->address.ptr != NULL);
    VKP_I_REQUIRE(door->password.ptr == NULL || door->password.len > 0);
    made = (vkp_i_door *)vkp_i_alloc_zero(relay->env, sizeof *made);
    if (made == NULL) {
        return VKP_ERR_NOMEM;
    }
    made->relay = relay;
    made->idle_ms = door->idle_ms;
    made->password = door->password;
    if (vkp_i_copy_str(relay->env, &made->password)) {
        memset(&config, 0, sizeof config);
        config.address = door->address;
        config.registry = relay->registry;
        config.gate = relay->gate;
        config.max_clients = door->max_clients;
        config.on_fd = vkp_i_relay_on_fd;
        config.on_refuse = vkp_i_relay_on_refuse;
        config.conn.user = made;
        status = vkp_listener_open(relay->shards[0].loop, &config, &made->listener);
        if (status == VKP_OK) {
            made->next = relay->doors;
            relay->doors = made;
            relay->door_count++;
            if (bound != NULL) {
                *bound = vkp_listener_get_address(made->listener);
            }
            return VKP_OK;
        }
        vkp_i_free_str(relay->env, made->password);
    }
    vkp_i_free(relay->env, made, sizeof *made);
    return status;
}

VKP_API vkp_status vkp_relay_listen(vkp_relay *relay, vkp_str address, const char **bound)
{
    vkp_relay_door door;
    memset(&door, 0, sizeof door);
    door.address = address;
    return vkp_relay_open_door(relay, &door, bound);
}

/* ---- pushes from upstream, on loop 0, and on the other shards' loops ---- */

/* Write a text as JSON. */
static void vkp_i_put_json(vkp_resp_writer *writer, vkp_str text)
{
    size_t i;
    vkp_resp_put_raw(writer, "\"", 1);
    for (i = 0; i < text.len; i++) {
        unsigned char c = (unsigned char)text.ptr[i];
        char escaped[8];
        if (c < 0x20 || c >= 0x7f || c == '"' || c == '\\') {
            (void)snprintf(escaped, sizeof escaped, "\\u%04x", (unsigned)c);
            vkp_resp_put_raw(writer, escaped, 6);
        } else {
            vkp_resp_put_raw(writer, &text.ptr[i], 1);
        }
    }
    vkp_resp_put_raw(writer, "\"", 1);
}

/* Write what a gap covers as JSON. */
static void vkp_i_put_gap(vkp_resp_writer *writer, const vkp_relay *relay, const vkp_gap *gap)
{
    static const char *const kinds[VKP_SUB_KINDS] = {"channel", "pattern", "shard"};
    char text[VKP_I_ERROR_TEXT];
    size_t i;
    int len = snprintf(text, sizeof text, "{\"from\":%llu,\"to\":%llu,\"reason\":",
                       (unsigned long long)gap->from_unix_ms, (unsigned long long)gap->to_unix_ms);
    vkp_resp_put_raw(writer, text, (size_t)len);
    vkp_i_put_json(writer, vkp_str_of(relay->reason));
    vkp_resp_put_raw(writer, ",\"names\":", 9);
    if (gap->names == NULL) {
        vkp_resp_put_raw(writer, "null", 4);
    }
    for (i = 0; i < gap->name_count; i++) {
        len = snprintf(text, sizeof text, "%s{\"kind\":\"%s\",\"name\":", i == 0 ? "[" : ",",
                       kinds[gap->names[i].kind]);
        vkp_resp_put_raw(writer, text, (size_t)len);
        vkp_i_put_json(writer, gap->names[i].name);
        vkp_resp_put_raw(writer, "}]", i + 1 == gap->name_count ? 2 : 1);
    }
    vkp_resp_put_raw(writer, "}", 1);
}

/* Whether the gap covers a name of the client. */
static bool vkp_i_local_is_in_gap(const vkp_i_local *local, const vkp_gap *gap)
{
    size_t i;
    if (gap->names == NULL) {
        return vkp_i_local_has_names(local);
    }
    for (i = 0; i < gap->name_count; i++) {
        if (vkp_hub_is_subscribed(local->shard->hub, &local->member, gap->names[i].kind,
                                  gap->names[i].name)) {
            return true;
        }
    }
    return false;
}

/* Disconnect the shard's clients that the gap is about. */
static void vkp_i_shard_close_gap(vkp_i_shard *shard, const vkp_gap *gap)
{
    vkp_i_local *local = shard->locals;
    while (local != NULL) {
        vkp_i_local *next = local->next;
        if (vkp_i_local_is_in_gap(local, gap)) {
            (void)VKP_I_ADD(&shard->relay->lost, (uint64_t)1);
            vkp_conn_drain(local->member.conn);
        }
        local = next;
    }
}

/* Deliver a push to this shard's members: from upstream with vkp_hub_deliver, stand-alone from
   another shard with vkp_hub_publish, because its frame is not a RESP message.                */
static void vkp_i_shard_on_push(void *user, const vkp_push *push)
{
    vkp_i_shard *shard = (vkp_i_shard *)user;
    vkp_relay *relay = shard->relay;
    size_t count;
    if (push->kind == VKP_PUSH_GAP) {
        vkp_i_shard_close_gap(shard, push->gap);
        return;
    }
    count = vkp_i_relay_has_server(relay)
                ? vkp_hub_deliver(shard->hub, push)
                : vkp_hub_publish(shard->hub, push->sub, push->channel, push->payload);
    VKP_I_TALLY(shard->tally.deliveries, count);
}

/* Deliver a message in every shard. Loop 0. */
static void vkp_i_relay_deliver(vkp_relay *relay, const vkp_push *push)
{
    size_t i;
    VKP_I_TALLY(relay->shards[0].tally.messages_in, 1u);
    vkp_i_shard_on_push(&relay->shards[0], push);
    for (i = 1; i < relay->shard_count; i++) {
        vkp_push copy = *push;
        copy.frame = vkp_bytes_ref(&push->frame);
        vkp_i_shard_forward(&relay->shards[i], &copy);
    }
}

/* Messages may have been lost: a message says so. Loop 0. */
static void vkp_i_relay_report_gap(vkp_relay *relay, const vkp_gap *gap)
{
    vkp_str channel = vkp_str_of(VKP_RELAY_GAP_CHANNEL);
    vkp_resp_writer json;
    vkp_resp_writer message;
    vkp_bytes text = VKP_ZERO; /* gcc does not see that it is set */
    vkp_push push;
    vkp_resp_writer_init(&json, relay->env);
    vkp_i_put_gap(&json, relay, gap);
    if (vkp_resp_writer_take(&json, &text) != VKP_OK) {
        vkp_i_log(relay->env, VKP_LOG_ERROR, "out of memory: a gap was not reported");
        return;
    }
    memset(&push, 0, sizeof push);
    vkp_resp_writer_init(&message, relay->env);
    vkp_resp_put_aggregate(&message, VKP_RESP_PUSH, 3);
    vkp_i_put_text(&message, "message");
    vkp_resp_put_bulk(&message, channel.ptr, channel.len);
    vkp_resp_put_bulk(&message, text.data, text.len);
    if (vkp_resp_writer_take(&message, &push.frame) == VKP_OK) {
        push.kind = VKP_PUSH_MESSAGE;
        push.sub = VKP_SUB_CHANNEL;
        push.channel = channel;
        push.payload = vkp_i_str(push.frame.data + push.frame.len - 2 - text.len, text.len);
        vkp_i_relay_deliver(relay, &push);
        vkp_bytes_unref(&push.frame);
    }
    vkp_bytes_unref(&text);
}

/* A gap of the connection for subscriptions. Loop 0. */
static void vkp_i_relay_on_gap(vkp_relay *relay, const vkp_push *push)
{
    size_t i;
    (void)VKP_I_ADD(&relay->gaps, (uint64_t)1);
    vkp_i_relay_report_gap(relay, push->gap);
    if (relay->close_on_gap) {
        vkp_i_shard_close_gap(&relay->shards[0], push->gap);
        for (i = 1; i < relay->shard_count; i++) {
            vkp_push copy = *push;
            copy.frame = vkp_bytes_ref(&push->frame);
            vkp_i_shard_forward(&relay->shards[i], &copy);
        }
    }
}

/* The upstream client received a push, or has an event. Loop 0. */
static void vkp_i_relay_on_push(void *user, const vkp_push *push)
{
    vkp_relay *relay = (vkp_relay *)user;
    if (vkp_i_push_kind_is_message(push->kind)) {
        vkp_i_relay_deliver(relay, push);
        return;
    }
    vkp_i_relay_note_state(relay, push);
    if (push->kind == VKP_PUSH_DISCONNECTED) {
        (void)snprintf(relay->reason, sizeof relay->reason, "%.*s", VKP_FMT(push->payload));
    }
    if (push->kind == VKP_PUSH_GAP) {
        vkp_i_relay_on_gap(relay, push);
    }
    if (vkp_i_push_kind_is_event(push->kind)) {
        vkp_i_log(relay->env, VKP_LOG_INFO, "upstream: %s %.*s", vkp_push_kind_str(push->kind),
                  VKP_FMT(push->payload));
    }
}

/* ---- draining ---- */

/* Task on loop 0: every shard is drained. */
static void vkp_i_relay_end(vkp_i_task *task)
{
    vkp_relay *relay = VKP_CONTAINER(task, vkp_relay, end_task);
    size_t i;
    vkp_timer_stop(&relay->drain_timer);
    vkp_client_close(relay->push);
    for (i = 0; i < relay->shared_count; i++) {
        vkp_client_close(relay->shared[i]);
    }
    if (relay->on_end != NULL) {
        relay->on_end(relay->end_user);
    }
    vkp_i_relay_release(relay);
}

/* If the shard drains and has no clients left, count it off; the last shard queues end_task. */
static void vkp_i_shard_drained(vkp_i_shard *shard)
{
    vkp_relay *relay = shard->relay;
    if (!shard->draining || shard->gone || shard->local_count > 0) {
        return;
    }
    shard->gone = true;
    vkp_i_shard_end_pool(shard);
    if (VKP_I_UNREF(&relay->live_shards) == 1) {
        relay->end_task.fn = vkp_i_relay_end;
        (void)VKP_I_ADD(&relay->refs, 1);
        if (!vkp_i_loop_queue(relay->shards[0].loop, &relay->end_task)) {
            vkp_i_relay_release(relay);
        }
    }
}

/* Task on the shard's loop: drain every local client. */
static void vkp_i_shard_drain(vkp_i_task *task)
{
    vkp_i_shard *shard = VKP_CONTAINER(task, vkp_i_shard, drain_task);
    vkp_relay *relay = shard->relay;
    vkp_i_local *local = shard->locals;
    shard->draining = true;
    while (local != NULL) {
        vkp_i_local *next = local->next;
        local->flags |= VKP_I_LOCAL_LEAVING;
        if ((local->answer_count == 0 && (local->flags & VKP_I_LOCAL_BUSY) == 0) ||
            (local->session != NULL && vkp_i_session_may_wait(local->session))) {
            vkp_i_local_leave(local);
        } else {
            vkp_conn_pause(local->member.conn); /* execute no new commands */
        }
        local = next;
    }
    vkp_i_shard_drained(shard);
    vkp_i_relay_release(relay);
}

/* Task on the shard's loop: the drain's deadline has passed, close every local client. */
static void vkp_i_shard_kill(vkp_i_task *task)
{
    vkp_i_shard *shard = VKP_CONTAINER(task, vkp_i_shard, kill_task);
    vkp_relay *relay = shard->relay;
    while (shard->locals != NULL) {
        vkp_conn_close(shard->locals->member.conn);
    }
    vkp_i_relay_release(relay);
}

/* Queue one of the shard's tasks on its loop; the task holds a reference of the relay. */
static void vkp_i_shard_queue(vkp_i_shard *shard, vkp_i_task *task, void (*fn)(vkp_i_task *task))
{
    task->fn = fn;
    (void)VKP_I_ADD(&shard->relay->refs, 1);
    if (!vkp_i_loop_queue(shard->loop, task)) {
        vkp_i_relay_release(shard->relay);
    }
}

/* The drain's deadline has passed. Loop 0. */
static void vkp_i_relay_drain_over(vkp_timer *timer)
{
    vkp_relay *relay = VKP_CONTAINER(timer, vkp_relay, drain_timer);
    size_t i;
    for (i = 0; i < relay->shard_count; i++) {
        vkp_i_shard_queue(&relay->shards[i], &relay->shards[i].kill_task, vkp_i_shard_kill);
    }
}

VKP_API void vkp_relay_drain(vkp_relay *relay, void (*on_end)(void *user), void *user,
                             uint64_t deadline_ns)
{
    size_t i;
    vkp_i_door *door;
    if (relay->draining) {
        return;
    }
    relay->draining = true;
    relay->on_end = on_end;
    relay->end_user = user;
    vkp_timer_stop(&relay->idle_timer);
    relay->live_shards = relay->shard_count;
    for (door = relay->doors; door != NULL; door = door->next) {
        vkp_listener_close(door->listener);
    }
    if (vkp_timer_start(&relay->drain_timer, relay->shards[0].loop, vkp_i_relay_drain_over, 0,
                        deadline_ns) != VKP_OK) {
        vkp_i_relay_drain_over(&relay->drain_timer); /* no memory for the timer: close now */
    }
    for (i = 0; i < relay->shard_count; i++) {
        vkp_i_shard_queue(&relay->shards[i], &relay->shards[i].drain_task, vkp_i_shard_drain);
    }
}

/* ---- opening, closing ---- */

/* No loop runs: close the descriptors that are queued for the shard. Their tasks find fd -1
   later.                                                                                      */
static void vkp_i_shard_drop_handovers(vkp_relay *relay, vkp_i_shard *shard)
{
    vkp_i_handover *each;
    VKP_I_LOCK(&relay->mutex);
    for (each = shard->handovers; each != NULL; each = each->next) {
        (void)shard->loop->sys->close(each->fd);
        vkp_seat_unref(each->seat);
        each->fd = -1;
    }
    VKP_I_UNLOCK(&relay->mutex);
}

VKP_API void vkp_relay_unref(vkp_relay *relay)
{
    size_t i;
    vkp_i_door *door;
    if (relay == NULL) {
        return;
    }
    for (door = relay->doors; door != NULL; door = door->next) {
        vkp_listener_unref(door->listener);
        door->listener = NULL;
    }
    vkp_timer_stop(&relay->drain_timer);
    vkp_timer_stop(&relay->idle_timer);
    relay->on_idle = NULL; /* queued tasks still run when a loop runs again or closes */
    relay->on_end = NULL;
    vkp_i_relay_end_surveys(relay);
    for (i = 0; i < relay->shard_count; i++) {
        vkp_i_shard *shard = &relay->shards[i];
        shard->draining = true;
        shard->gone = true;
        while (shard->locals != NULL) { /* no loop runs: this thread may use all of them */
            vkp_i_conn_finish(shard->locals->member.conn, VKP_CLOSE_LOCAL, 0);
        }
        vkp_i_shard_end_pool(shard);
        vkp_i_shard_drop_handovers(relay, shard);
        vkp_push_loop_unref(shard->push_loop);
        vkp_mpsc_tx_unref(shard->pushes);
        shard->push_loop = NULL;
        shard->pushes = NULL;
    }
    for (i = 0; i < relay->shared_count; i++) {
        vkp_i_client_close_now(relay->shared[i]); /* pending answers return now */
        vkp_client_unref(relay->shared[i]);
    }
    relay->shared_count = 0;
    vkp_i_login_free(relay->env, relay->login);
    relay->login = NULL;
    if (relay->push != NULL) {
        vkp_i_client_close_now(relay->push); /* the same for subscriptions under way */
        vkp_client_unref(relay->push);
        relay->push = NULL;
    }
    vkp_i_relay_release(relay);
}

/* Open the channel of pushes from other loops, and the push loop that receives them. */
static vkp_status vkp_i_shard_open_channel(vkp_i_shard *shard)
{
    vkp_mpsc_config config;
    vkp_sink sink;
    vkp_mpsc_rx *rx;
    vkp_status status;
    memset(&config, 0, sizeof config);
    config.elem_bytes = sizeof(vkp_push);
    config.capacity_bytes = VKP_I_SHARD_LAG;
    config.cost = vkp_push_get_cost;
    config.drop = vkp_push_drop;
    config.env = shard->relay->env;
    status = vkp_mpsc_open(&config, &shard->pushes, &rx);
    if (status != VKP_OK) {
        return status;
    }
    memset(&sink, 0, sizeof sink);
    sink.callback = vkp_i_shard_on_push;
    sink.user = shard;
    status = vkp_push_loop_open(shard->loop, rx, &sink, NULL, NULL, &shard->push_loop);
    if (status != VKP_OK) {
        vkp_mpsc_rx_unref(rx);
    }
    return status;
}

/* input kept beyond max_request_bytes: headers, other commands */
#define VKP_I_REQUEST_SLACK 65536u
#define VKP_I_REQUEST_ELEMENTS (1024u * 1024) /* most arguments of a request */

/* TCP clients: silence after which the kernel asks whether they are there. Not longer than the
   places of --max-clients may be held by the dead; and no limit for what is unacknowledged, which
   would end clients that are slow to read.                                                    */
#define VKP_I_RELAY_KEEPALIVE_MS 60000u

static vkp_status vkp_i_shard_open(vkp_i_shard *shard, vkp_relay *relay,
                                   const vkp_relay_config *config, size_t index)
{
    vkp_conn_config conn;
    vkp_hub_config hub;
    vkp_resp_config resp;
    vkp_status status;
    shard->relay = relay;
    shard->turn_task.fn = vkp_i_room_on_turn;
    shard->loop = vkp_loop_ref(config->loops[index]);
    memset(&conn, 0, sizeof conn);
    conn.ops = &vkp_i_local_ops;
    conn.queue_frames = config->queue_frames;
    conn.queue_bytes = config->queue_bytes;
    conn.on_full =
        config->on_full == VKP_ON_FULL_DEFAULT ? VKP_ON_FULL_DISCONNECT : config->on_full;
    conn.input_bytes = relay->max_request_bytes + VKP_I_REQUEST_SLACK;
    conn.loop_only = true;
    conn.keepalive_ms = VKP_I_RELAY_KEEPALIVE_MS;
    shard->profile = vkp_i_profile_open(relay->env, &conn);
    memset(&hub, 0, sizeof hub);
    hub.on_interest = vkp_i_shard_on_interest;
    hub.user = shard;
    hub.env = relay->env;
    status = shard->profile != NULL ? vkp_hub_open(&hub, &shard->hub) : VKP_ERR_NOMEM;
    memset(&resp, 0, sizeof resp);
    resp.max_depth = 1;
    resp.max_elements = VKP_I_REQUEST_ELEMENTS;
    resp.max_bulk_bytes = relay->max_request_bytes;
    resp.max_frame_bytes = relay->max_request_bytes;
    resp.env = relay->env;
    if (status == VKP_OK) {
        status = vkp_resp_reader_open(&resp, &shard->reader);
    }
    if (status == VKP_OK && (index > 0 || (config->server.ptr == NULL && relay->shard_count > 1))) {
        status = vkp_i_shard_open_channel(shard);
    }
    return status;
}

#define VKP_I_RELAY_PRIVATES 1024u /* default of vkp_relay_config.private_max */

/* Open the upstream connections. */
static vkp_status vkp_i_relay_open_clients(vkp_relay *relay, const vkp_relay_config *config)
{
    vkp_loop *loop = relay->shards[0].loop;
    size_t count = config->upstreams > 0 ? config->upstreams : 1;
    vkp_client_config client;
    vkp_resp_config resp;
    vkp_status status;
    memset(&resp, 0, sizeof resp);
    resp.lenient = true;
    resp.env = relay->env;
    status = vkp_resp_reader_open(&resp, &relay->reader);
    if (status != VKP_OK) {
        return status;
    }
    memset(&client, 0, sizeof client);
    client.address = config->server;
    client.username = config->username;
    client.password = config->password;
    client.name = vkp_str_of("valkey-push-relay");
    client.resolver = config->resolver;
    client.hold_ms = relay->hold_ms;
    client.queue_bytes = SIZE_MAX; /* the room has the limit */
    client.user = relay;
    client.env = relay->env;
    client.on_push = vkp_i_relay_on_push;
    client.on_connect = vkp_i_relay_on_connect;
    status = vkp_client_open(loop, &client, &relay->push);
    if (status == VKP_OK) {
        relay->push->on_hello = vkp_i_relay_on_hello;
        relay->shared = (vkp_client **)vkp_i_alloc_zero(relay->env, count * sizeof *relay->shared);
        status = relay->shared != NULL ? VKP_OK : VKP_ERR_NOMEM;
        relay->shared_capacity = relay->shared != NULL ? count : 0;
    }
    client.on_push = vkp_i_relay_on_shared_push;
    while (status == VKP_OK && relay->shared_count < count) {
        status = vkp_client_open(loop, &client, &relay->shared[relay->shared_count]);
        relay->shared_count += status == VKP_OK ? 1u : 0u;
    }
    if (status == VKP_OK) {
        relay->private_max = config->shared_only        ? 0
                             : config->private_max != 0 ? config->private_max
                                                        : VKP_I_RELAY_PRIVATES;
        vkp_i_client_copy_config(relay->push, 2, &relay->session_configs[0]);
        vkp_i_client_copy_config(relay->push, 3, &relay->session_configs[1]);
    }
    return status;
}

/* The registry noticed that a socket's file changed. */
static void vkp_i_relay_on_file(void *user, vkp_socket *sock, vkp_socket_event event,
                                vkp_status status)
{
    const vkp_relay *relay = (const vkp_relay *)user;
    const char *text = "";
    switch (event) {
    case VKP_SOCKET_LOST:
        text = "the file is gone or replaced";
        break;
    case VKP_SOCKET_REBOUND:
        text = "bound again";
        break;
    case VKP_SOCKET_BLOCKED:
        text = "cannot be bound again: ";
        break;
    }
    vkp_i_log(relay->env, VKP_LOG_WARN, "%s: %s%s", vkp_socket_get_path(sock), text,
              event == VKP_SOCKET_BLOCKED ? vkp_status_str(status) : "");
}

#define VKP_I_RELAY_CLIENTS 16384u /* default of vkp_relay_config.max_clients */
#define VKP_I_RELAY_MODE_OWN 0600u /* mode of a socket's file: the process's own uid */
#define VKP_I_RELAY_MODE_ALL 0666u /* mode with allow_uids: the gate checks the uid */

/* Open the gate and the registry, and copy the shutdown notice. */
static vkp_status vkp_i_relay_open_gate(vkp_relay *relay, const vkp_relay_config *config)
{
    vkp_gate_config gate;
    vkp_registry_config registry;
    vkp_status status;
    memset(&gate, 0, sizeof gate);
    gate.max_clients = config->max_clients > 0 ? config->max_clients : VKP_I_RELAY_CLIENTS;
    gate.max_clients_per_uid = config->max_clients_per_uid;
    gate.allow_uids = config->allow_uids;
    gate.allow_uid_count = config->allow_uid_count;
    gate.env = relay->env;
    status = vkp_gate_open(&gate, &relay->gate);
    memset(&registry, 0, sizeof registry);
    registry.mode = config->allow_uid_count > 0 ? VKP_I_RELAY_MODE_ALL : VKP_I_RELAY_MODE_OWN;
    registry.abstract_names = VKP_I_LINUX;
    registry.loop = relay->shards[0].loop;
    registry.check_ms = config->check_ms;
    registry.rebind = true;
    registry.on_event = vkp_i_relay_on_file;
    registry.user = relay;
    registry.env = relay->env;
    if (status == VKP_OK) {
        status = vkp_registry_open(&registry, &relay->registry);
    }
    if (status == VKP_OK) {
        relay->notice = config->shutdown_notice;
        status = vkp_i_copy_str(relay->env, &relay->notice) ? VKP_OK : VKP_ERR_NOMEM;
    }
    return status;
}

/* Defaults of vkp_relay_config. */
#define VKP_I_RELAY_REQUEST_BYTES ((size_t)64 << 20)
#define VKP_I_RELAY_REPLY_BYTES ((size_t)256 << 20)
#define VKP_I_RELAY_SUBSCRIPTIONS 100000u
#define VKP_I_RELAY_NAME_BYTES ((size_t)64 << 20)
#define VKP_I_RELAY_HOLD_MS 1000u

VKP_API vkp_status vkp_relay_open(const vkp_relay_config *config, vkp_relay **out)
{
    const vkp_env *env;
    vkp_relay *relay;
    vkp_status status = VKP_OK;
    size_t count;
    size_t i;
    int kind;
    VKP_I_REQUIRE(config != NULL && out != NULL && config->loops != NULL);
    VKP_I_REQUIRE(config->max_request_bytes <= VKP_I_BLOCK_MAX / 2);
    VKP_I_REQUIRE(config->on_full != VKP_ON_FULL_WAIT && config->on_full != VKP_ON_FULL_ERROR);
    env = vkp_i_env(config->env);
    count = config->loop_count > 0 ? config->loop_count : 1;
    relay = (vkp_relay *)vkp_i_alloc_zero(env, sizeof *relay);
    if (relay == NULL) {
        return VKP_ERR_NOMEM;
    }
    relay->env = env;
    relay->refs = 1;
    relay->on_idle = config->on_idle;
    relay->user = config->user;
    relay->linger_ms = config->linger_ms;
    relay->idle_task.fn = vkp_i_relay_idle_begins;
    relay->max_request_bytes =
        config->max_request_bytes > 0 ? config->max_request_bytes : VKP_I_RELAY_REQUEST_BYTES;
    vkp_i_room_init(&relay->room, config);
    relay->max_reply_bytes =
        config->max_reply_bytes > 0 ? config->max_reply_bytes : VKP_I_RELAY_REPLY_BYTES;
    relay->close_on_gap = config->close_on_gap;
    relay->hold_ms = config->hold_ms == VKP_OFF ? 0
                     : config->hold_ms > 0      ? config->hold_ms
                                                : VKP_I_RELAY_HOLD_MS;
    relay->max_subscriptions =
        config->max_subscriptions > 0 ? config->max_subscriptions : VKP_I_RELAY_SUBSCRIPTIONS;
    relay->max_name_bytes =
        config->max_name_bytes > 0 ? config->max_name_bytes : VKP_I_RELAY_NAME_BYTES;
    VKP_I_MUTEX_INIT(&relay->mutex);
    for (kind = 0; kind < VKP_SUB_KINDS; kind++) {
        vkp_i_map_init(&relay->subscribers[kind], env);
    }
    relay->shards = (vkp_i_shard *)vkp_i_alloc_zero(env, count * sizeof *relay->shards);
    if (relay->shards == NULL) {
        vkp_i_relay_free(relay);
        return VKP_ERR_NOMEM;
    }
    relay->shard_count = count;
    for (i = 0; i < count && status == VKP_OK; i++) {
        status = vkp_i_shard_open(&relay->shards[i], relay, config, i);
    }
    if (status == VKP_OK) {
        status = vkp_i_relay_open_gate(relay, config);
    }
    if (status == VKP_OK) {
        status = vkp_i_relay_open_surveys(relay, config->measure_lag);
    }
    relay->connected = status == VKP_OK && config->server.ptr == NULL ? 1u : 0u;
    if (status == VKP_OK && config->server.ptr != NULL) {
        status = vkp_i_relay_open_clients(relay, config);
    }
    if (status != VKP_OK) {
        vkp_relay_unref(relay);
        return status;
    }
    *out = relay;
    return VKP_OK;
}

VKP_API vkp_registry *vkp_relay_get_registry(const vkp_relay *relay)
{
    return relay->registry;
}

#endif /* VKP_I_IO */
