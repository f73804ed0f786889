#if VKP_I_IO
/* ======================================================================================
   >>impl-client-liveness   Whether the connection still does what it should
   ======================================================================================
   Two questions, on the loop's thread, while a link is ready; a third one, whether a published
   message arrives, is impl-client-delivery's.
   Is what is due answered? A server answers in order, so the oldest request in flight decides. When
   it has been due for reply_timeout_ms without any progress, a probe asks over a connection of its
   own, to the same address. What the probe finds, and what follows:
     DEAD     nobody accepts connections                         the link is lost
     BUSY     an error such as BUSY, LOADING, too many clients,  the wait goes on
              or output for us that still arrives
     MUTE     it accepts connections and answers nothing         the wait goes on, up to
     BLOCKED  it lists our connection as blocked, has a part     blocked_timeout_ms
              of a request, or does not say
     STALLED  it answers the probe, and owes us nothing          the link is lost
   Does the server have the subscriptions that the table says? With each heartbeat the client asks
   for the server's own counts (an audit): CLIENT INFO, or in RESP2, where a connection with
   subscriptions carries no such command, CLIENT LIST over a probe. Counts that are too low are
   repaired: each name of the kind is asked for again, and a GAP covers them from the last audit
   that agreed. Counts that are too high end the link: nobody can say which name it is. Neither is
   done more than VKP_I_MOST_REPAIRS times in a row.                                            */

typedef enum vkp_i_verdict {
    VKP_I_PROBE_DEAD,
    VKP_I_PROBE_BUSY,
    VKP_I_PROBE_MUTE,
    VKP_I_PROBE_BLOCKED,
    VKP_I_PROBE_STALLED
} vkp_i_verdict;

/* When the oldest request in flight became the one that is due; 0: nothing is. */
static uint64_t vkp_i_client_due_since(const vkp_client *client)
{
    const vkp_i_request *oldest = client->link.flight.first;
    return oldest == NULL ? 0 : VKP_I_MAX(oldest->sent_ns, client->link.answered_ns);
}

/* When the oldest request in flight is overdue. */
static uint64_t vkp_i_client_overdue_ns(const vkp_client *client)
{
    uint64_t since_ns = vkp_i_client_due_since(client);
    return since_ns == 0 ? VKP_FOREVER
                         : vkp_i_after_ms(VKP_I_MAX(since_ns, client->patient_ns),
                                          client->config.reply_timeout_ms);
}

static bool vkp_i_client_is_asking(const vkp_client *client);

/* When the watch has to look again. */
static uint64_t vkp_i_client_watch_ns(const vkp_client *client)
{
    uint64_t overdue_ns =
        vkp_i_client_is_asking(client) ? VKP_FOREVER : vkp_i_client_overdue_ns(client);
    return VKP_I_MIN(VKP_I_MIN(client->heartbeat_ns, client->delivery_ns), overdue_ns);
}

/* Start the client's timer, which has its callback already, for the next look of the watch. */
static void vkp_i_client_start_watch(vkp_client *client)
{
    if (vkp_timer_start(&client->timer, client->loop, client->timer.i_fn, 0,
                        vkp_i_client_watch_ns(client)) != VKP_OK) {
        vkp_i_log(client->env, VKP_LOG_ERROR, "out of memory: the client's timer did not start");
    }
}

/* The probe has its answer: do what follows from it. The caller holds the probe. */
static void vkp_i_probe_end(vkp_i_probe *probe, vkp_i_verdict verdict)
{
    vkp_client *client = probe->client;
    uint64_t now_ns = vkp_i_loop_now(client->loop);
    uint64_t due_ns = vkp_i_client_due_since(client);
    uint64_t blocked_ms = client->config.blocked_timeout_ms;
    bool answered = due_ns == 0 || client->link.answered_ns >= probe->begun_ns;
    if (client->probe != probe) {
        return; /* it has ended */
    }
    vkp_i_client_end_probe(client);
    client->patient_ns = now_ns; /* the next probe comes after another reply_timeout_ms */
    if (!client->ready) {
        return;
    }
    switch (answered ? VKP_I_PROBE_BUSY : verdict) {
    case VKP_I_PROBE_DEAD:
        vkp_i_link_lose(&client->link, "the server does not answer");
        break;
    case VKP_I_PROBE_STALLED:
        vkp_i_link_lose(&client->link, "the server answers others, and not this connection");
        break;
    case VKP_I_PROBE_MUTE:
    case VKP_I_PROBE_BLOCKED:
        if (now_ns >= vkp_i_after_ms(due_ns, blocked_ms)) {
            vkp_i_link_lose(&client->link, verdict == VKP_I_PROBE_MUTE
                                               ? "the server does not answer"
                                               : "the server keeps this connection blocked");
        }
        break;
    case VKP_I_PROBE_BUSY:
        break;
    }
    if (client->ready) {
        vkp_i_client_start_watch(client);
    }
}

/* The value of a field in a line of CLIENT LIST or CLIENT INFO; name is " field=". ptr NULL: there
   is no such field. */
static vkp_str vkp_i_info_field(vkp_str line, const char *name)
{
    size_t len = strlen(name);
    size_t i;
    for (i = 0; i + len <= line.len; i++) {
        if (memcmp(line.ptr + i, name, len) == 0) {
            size_t from = i + len;
            for (i = from; i < line.len && line.ptr[i] != ' ' && line.ptr[i] != '\n'; i++) {
            }
            return vkp_i_str(line.ptr + from, i - from);
        }
    }
    return vkp_i_str(NULL, 0);
}

/* Whether the field of the line is there and not 0. */
static bool vkp_i_info_counts(vkp_str line, const char *name)
{
    vkp_str text = vkp_i_info_field(line, name);
    return text.len > 0 && !vkp_i_str_equal(text, vkp_str_of("0"));
}

/* What the reply to CLIENT LIST says of the client's connection. */
static vkp_i_verdict vkp_i_probe_judge(const vkp_i_probe *probe, const vkp_value *value)
{
    vkp_str line = vkp_value_get_str(value);
    vkp_str flags = vkp_i_info_field(line, " flags=");
    const vkp_i_link *link = &probe->client->link;
    bool unsent = vkp_i_info_counts(line, " oll=") || vkp_i_info_counts(line, " obl=");
    if (unsent && link->heard_ns >= probe->begun_ns) {
        return VKP_I_PROBE_BUSY; /* the reply is behind what still arrives */
    }
    if (value->type == VKP_RESP_ERROR ||
        (flags.len > 0 && memchr(flags.ptr, 'b', flags.len) != NULL) ||
        vkp_i_info_counts(line, " qbuf=") || vkp_i_conn_get_queued_bytes(link->conn) > 0) {
        return VKP_I_PROBE_BLOCKED; /* or half of a request is there, or nobody may say */
    }
    return VKP_I_PROBE_STALLED;
}

static void vkp_i_probe_answered(vkp_i_request *request, vkp_status status, const vkp_value *value,
                                 const vkp_bytes *frame)
{
    vkp_i_probe *probe = VKP_CONTAINER(request, vkp_i_probe, ask);
    (void)frame;
    vkp_bytes_unref(&request->bytes);
    if (status != VKP_OK) {
        return; /* vkp_i_client_end_probe, or a reply over a limit: the timer ends the probe */
    }
    if (probe->listing) {
        vkp_i_probe_end(probe, probe->client->link.conn != NULL ? vkp_i_probe_judge(probe, value)
                                                                : VKP_I_PROBE_BUSY);
    } else if (value->type == VKP_RESP_ERROR) {
        vkp_i_probe_end(probe, VKP_I_PROBE_BUSY);
    } else if (probe->client->link.id == 0) { /* nobody said how the server calls us */
        vkp_i_probe_end(probe, VKP_I_PROBE_BLOCKED);
    } else {
        probe->listing = true;
        if (!vkp_i_probe_list(probe)) {
            vkp_i_probe_end(probe, VKP_I_PROBE_BUSY); /* says nothing about the server */
        }
    }
}

static void vkp_i_probe_on_ready(vkp_i_link *link)
{
    vkp_str argv = vkp_str_of("PING");
    if (!vkp_i_probe_ask(vkp_i_probe_of(link), 1, &argv)) {
        vkp_i_probe_end(vkp_i_probe_of(link), VKP_I_PROBE_BUSY); /* says nothing about the server */
    }
}

/* The probe's connection ended. Words of the server, also those of a refusal, are a sign of life.
   One that accepts connections and closes them without words may stand before a dead server. */
static void vkp_i_liveness_on_down(vkp_i_link *link)
{
    vkp_i_probe_end(vkp_i_probe_of(link), link->spoke       ? VKP_I_PROBE_BUSY
                                          : link->connected ? VKP_I_PROBE_MUTE
                                                            : VKP_I_PROBE_DEAD);
}

static void vkp_i_probe_on_timer(vkp_timer *timer)
{
    vkp_i_probe *probe = VKP_CONTAINER(timer, vkp_i_probe, timer);
    vkp_i_probe_hold(&probe->link);
    vkp_i_probe_end(probe, probe->link.connected ? VKP_I_PROBE_MUTE : VKP_I_PROBE_DEAD);
    vkp_i_probe_release(&probe->link);
}

static const vkp_i_probe_kind vkp_i_liveness_kind = {
    {vkp_i_probe_on_ready, vkp_i_probe_on_push, vkp_i_liveness_on_down, vkp_i_probe_on_busy, NULL,
     NULL, vkp_i_probe_hold, vkp_i_probe_release, NULL},
    vkp_i_probe_on_timer,
    vkp_i_probe_answered};

/* Whether a probe asks whether the server is alive. */
static bool vkp_i_client_is_asking(const vkp_client *client)
{
    return client->probe != NULL && client->probe->kind == &vkp_i_liveness_kind;
}

/* Ask the server whether it is alive; a delivery probe gives way. Without memory the next watch
   tries again. */
static void vkp_i_client_ask_server(vkp_client *client)
{
    vkp_status status;
    vkp_i_client_end_probe(client);
    status = vkp_i_client_start_probe(client, &vkp_i_liveness_kind);
    if (client->probe == NULL) {
        client->patient_ns = client->loop->now_ns;
        return;
    }
    VKP_I_COUNT(client, probes);
    if (status != VKP_OK) {
        vkp_i_probe *probe = client->probe;
        vkp_i_probe_hold(&probe->link);
        vkp_i_probe_end(probe, status == VKP_ERR_SYS ? VKP_I_PROBE_DEAD : VKP_I_PROBE_BUSY);
        vkp_i_probe_release(&probe->link);
    }
}

/* ---- the audit ---- */

/* A heartbeat: CLIENT INFO, or PING. */
typedef struct vkp_i_beat {
    vkp_i_request request;
    vkp_client *client;
    bool counts; /* CLIENT INFO */
    vkp_i_audit audit;
} vkp_i_beat;

static vkp_i_audit vkp_i_audit_of(const vkp_client *client)
{
    vkp_i_audit audit = {client->changes, client->loop->now_ns};
    return audit;
}

/* Ask again for every name of the kind: the server has fewer than the table says. */
static void vkp_i_client_repair(vkp_client *client, int kind)
{
    vkp_i_map_node *node = NULL;
    VKP_I_COUNT(client, repairs);
    while (client->ready && (node = vkp_i_map_get_next(&client->interests[kind], node)) != NULL) {
        vkp_i_interest_take_step(VKP_CONTAINER(node, vkp_i_interest, node), VKP_I_EVENT_MISSING);
    }
}

/* Repairs in a row that may help, and connections that an audit may end in a row; then the audits
   end: the server miscounts, or speaks of somebody else's connection. */
#define VKP_I_MOST_REPAIRS 3u

/* Compare the server's counts with the table. */
static void vkp_i_client_audit(vkp_client *client, const vkp_i_audit *audit, vkp_str line)
{
    static const char *const fields[VKP_SUB_KINDS] = {" sub=", " psub=", " ssub="};
    bool agrees = true;
    int kind;
    if (audit->changes != client->changes || client->subs_in_flight > 0 || client->stuck > 0) {
        return; /* the table changed meanwhile: the next heartbeat audits */
    }
    VKP_I_COUNT(client, audits);
    for (kind = 0; kind < VKP_SUB_KINDS && client->ready; kind++) {
        vkp_str text = vkp_i_info_field(line, fields[kind]);
        size_t count = 0;
        size_t i;
        for (i = 0; i < text.len && text.ptr[i] >= '0' && text.ptr[i] <= '9'; i++) {
            count = count * 10 + (size_t)(text.ptr[i] - '0');
        }
        if (text.ptr == NULL || count == client->held_of[kind]) {
            client->repaired[kind] = 0;
            continue; /* older servers do not count shard channels */
        }
        agrees = false;
        vkp_i_log(client->env, VKP_LOG_WARN, "%s: the server counts%s%zu, the client %zu",
                  client->config.address.ptr, fields[kind], count, client->held_of[kind]);
        if (client->repaired[kind] >= VKP_I_MOST_REPAIRS ||
            (count > client->held_of[kind] && client->ended_by_audits >= VKP_I_MOST_REPAIRS)) {
            vkp_i_log(client->env, VKP_LOG_WARN, "%s: no more audits", client->config.address.ptr);
            client->counts_refused = true;
        } else if (count > client->held_of[kind]) {
            client->ended_by_audits++;
            vkp_i_link_lose(&client->link, "the server has subscriptions that nobody asked for");
        } else {
            client->repaired[kind]++;
            vkp_i_client_repair(client, kind);
        }
    }
    if (agrees) {
        client->audited_ns = audit->sent_ns;
        client->ended_by_audits = 0;
    }
}

/* The server answered CLIENT INFO or CLIENT LIST. */
static void vkp_i_client_counted(vkp_client *client, const vkp_i_audit *audit,
                                 const vkp_value *value)
{
    vkp_str words = vkp_value_get_str(value);
    if (value->type == VKP_RESP_STRING) {
        vkp_i_client_audit(client, audit, words);
    } else if (!vkp_i_words_are_passing(words)) {
        client->counts_refused = true; /* an old server, or no right to ask */
    }
}

static void vkp_i_beat_settled(vkp_i_request *request, vkp_status status, const vkp_value *value,
                               const vkp_bytes *frame)
{
    vkp_i_beat *beat = VKP_CONTAINER(request, vkp_i_beat, request);
    vkp_client *client = beat->client;
    (void)frame;
    client->beat_sent = false;
    if (status == VKP_OK && beat->counts) {
        vkp_i_client_counted(client, &beat->audit, value);
    }
    vkp_bytes_unref(&request->bytes);
    vkp_i_free(client->env, beat, sizeof *beat);
}

static void vkp_i_audit_on_ready(vkp_i_link *link)
{
    vkp_i_probe *probe = vkp_i_probe_of(link);
    probe->audit = vkp_i_audit_of(probe->client);
    if (!vkp_i_probe_list(probe)) {
        vkp_i_client_end_probe(probe->client); /* the next heartbeat asks again */
    }
}

static void vkp_i_audit_answered(vkp_i_request *request, vkp_status status, const vkp_value *value,
                                 const vkp_bytes *frame)
{
    vkp_i_probe *probe = VKP_CONTAINER(request, vkp_i_probe, ask);
    vkp_client *client = probe->client;
    vkp_i_audit audit = probe->audit;
    (void)frame;
    vkp_bytes_unref(&request->bytes);
    if (status == VKP_OK) { /* otherwise the probe ended, or its timer ends it */
        vkp_i_client_end_probe(client);
        vkp_i_client_counted(client, &audit, value);
    }
}

static void vkp_i_audit_on_timer(vkp_timer *timer)
{
    vkp_i_client_end_probe(VKP_CONTAINER(timer, vkp_i_probe, timer)->client);
}

static const vkp_i_probe_kind vkp_i_audit_kind = {
    {vkp_i_audit_on_ready, vkp_i_probe_on_push, vkp_i_probe_on_down, vkp_i_probe_on_busy, NULL,
     NULL, vkp_i_probe_hold, vkp_i_probe_release, NULL},
    vkp_i_audit_on_timer,
    vkp_i_audit_answered};

/* Ask for the counts over a probe, unless one runs: its end starts the watch, which comes here
   again. */
static void vkp_i_client_audit_apart(vkp_client *client)
{
    if (client->probe == NULL) {
        client->audit_due = false;
        if (vkp_i_client_start_probe(client, &vkp_i_audit_kind) != VKP_OK) {
            vkp_i_client_end_probe(client);
        }
    }
}

/* Send a heartbeat. A RESP2 connection with subscriptions carries no command but PING. False: no
   memory. */
static bool vkp_i_client_beat(vkp_client *client)
{
    vkp_i_beat *beat = (vkp_i_beat *)vkp_i_alloc_zero(client->env, sizeof *beat);
    bool counts = client->link.protocol == 3 && !client->counts_refused;
    vkp_str argv[2];
    if (beat == NULL) {
        return false;
    }
    beat->client = client;
    beat->counts = counts;
    beat->audit = vkp_i_audit_of(client);
    beat->request.due = 1;
    beat->request.settle = vkp_i_beat_settled;
    argv[0] = vkp_str_of(counts ? "CLIENT" : "PING");
    argv[1] = vkp_str_of("INFO");
    if (vkp_i_request_put(&beat->request, client->env, counts ? 2 : 1, argv) != VKP_OK ||
        !vkp_i_link_start(&client->link, &beat->request)) {
        vkp_i_beat_settled(&beat->request, VKP_ERR_NOMEM, NULL, NULL);
        return false;
    }
    client->beat_sent = true;
    return client->config.role == VKP_CLIENT_ROLE_ANY || client->link.protocol == 2 ||
           vkp_i_link_ask_role(&client->link);
}

/* ---- the watch ---- */

/* Look after the connection: send a heartbeat, or a probe. A request that is still being written is
   not due while the server takes bytes of it. */
static void vkp_i_client_watch(vkp_client *client)
{
    uint64_t now_ns = client->loop->now_ns;
    size_t unsent = vkp_i_conn_get_queued_bytes(client->link.conn);
    if (unsent > 0 && unsent < client->unsent) {
        client->patient_ns = now_ns;
    }
    client->unsent = unsent;
    if (!vkp_i_client_is_asking(client) && now_ns >= vkp_i_client_overdue_ns(client)) {
        vkp_i_client_ask_server(client);
    }
    if (client->ready && now_ns >= client->heartbeat_ns) {
        client->heartbeat_ns = vkp_i_after_ms(now_ns, client->config.heartbeat_ms);
        client->audit_due = client->link.protocol == 2 && client->live > 0 &&
                            client->link.id != 0 && !client->counts_refused;
        if (!client->beat_sent && !vkp_i_client_beat(client)) {
            vkp_i_link_lose(&client->link, "out of memory");
        }
    }
    if (client->ready && now_ns >= client->delivery_ns) {
        vkp_i_client_probe_delivery(client);
    }
    if (client->ready && client->audit_due) {
        vkp_i_client_audit_apart(client);
    }
}

#endif /* VKP_I_IO */
