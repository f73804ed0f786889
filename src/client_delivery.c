#if VKP_I_IO
/* ======================================================================================
   >>impl-client-delivery   Whether a published message arrives
   ======================================================================================
   With config.delivery_ms, while the program wants a name, the client also subscribes to a channel
   of its own: an interest of the table like any other, but for events, gaps and messages, which the
   program does not see. Every delivery_ms a probe publishes to that channel. A message that is not
   there reply_timeout_ms after PUBLISH was answered, although this connection answered something
   that was sent later, will not come: the connection is lost, with a GAP from the last time that
   one did. Without such an answer the connection is overdue, which liveness judges.           */

/* Make the name of the client's own channel: one that nobody else has. */
static void vkp_i_client_name_own(vkp_client *client)
{
    const vkp_sys *sys = vkp_i_sys(client->env);
    uint64_t high = sys->random_u64();
    uint64_t low = sys->random_u64();
    int len = snprintf(client->own_text, sizeof client->own_text, "vkp:delivery:%016llx%016llx",
                       (unsigned long long)high, (unsigned long long)low);
    client->own = vkp_i_str(client->own_text, (size_t)len);
}

/* The client's own interest. NULL: there is none. */
static vkp_i_interest *vkp_i_client_get_own(vkp_client *client)
{
    return client->own.len > 0 ? vkp_i_interest_find(client, VKP_SUB_CHANNEL, client->own) : NULL;
}

/* Want the own channel while the program wants a name, and leave it with the last one: a RESP2
   connection with a subscription carries no commands. Without memory the next call tries again. */
static void vkp_i_client_keep_own(vkp_client *client)
{
    bool wanted = client->names_wanted > 0;
    vkp_i_interest *own = vkp_i_client_get_own(client);
    if (client->own.len == 0 || client->own_wanted == wanted || client->closed) {
        return;
    }
    if (own == NULL && wanted) {
        own = vkp_i_interest_new(client, VKP_SUB_CHANNEL, client->own);
    }
    if (own != NULL) {
        client->own_wanted = wanted;
        vkp_i_interest_hold(own);
        vkp_i_interest_take_step(own, wanted      ? VKP_I_EVENT_WANT
                                      : own->kept ? VKP_I_EVENT_LEAVE_KEPT
                                                  : VKP_I_EVENT_LEAVE);
        vkp_i_interest_release(own);
    }
}

/* Let the watch look now, and send a heartbeat. */
static void vkp_i_client_beat_now(vkp_client *client)
{
    client->heartbeat_ns = client->loop->now_ns;
    vkp_i_client_look_now(client);
}

/* Send PUBLISH; its payload is the time at which the probe began. */
static void vkp_i_delivery_on_ready(vkp_i_link *link)
{
    vkp_i_probe *probe = vkp_i_probe_of(link);
    char digits[VKP_I_DIGITS];
    size_t from = vkp_i_format_u64(digits, probe->begun_ns);
    vkp_str argv[3];
    argv[0] = vkp_str_of("PUBLISH");
    argv[1] = probe->client->own;
    argv[2] = vkp_i_str(digits + from, VKP_I_DIGITS - from);
    if (!vkp_i_probe_ask(probe, 3, argv)) {
        vkp_i_client_end_probe(probe->client); /* the next one asks again */
    }
}

/* PUBLISH was answered: from now on an answer on the client's connection follows the message. */
static void vkp_i_delivery_answered(vkp_i_request *request, vkp_status status,
                                    const vkp_value *value, const vkp_bytes *frame)
{
    vkp_i_probe *probe = VKP_CONTAINER(request, vkp_i_probe, ask);
    vkp_client *client = probe->client;
    (void)frame;
    vkp_bytes_unref(&request->bytes);
    if (status != VKP_OK) {
        return; /* the probe ended, or its timer ends it */
    }
    if (value->type != VKP_RESP_ERROR) {
        probe->published_ns = client->loop->now_ns;
        vkp_i_client_beat_now(client);
        return;
    }
    if (!vkp_i_words_are_passing(vkp_value_get_str(value))) {
        vkp_i_log(client->env, VKP_LOG_WARN, "%s: no delivery probes on this connection: %.*s",
                  client->config.address.ptr, VKP_FMT(vkp_value_get_str(value)));
        client->delivery_ns = VKP_FOREVER;
    }
    vkp_i_client_end_probe(client);
}

static void vkp_i_delivery_on_timer(vkp_timer *timer)
{
    vkp_i_probe *probe = VKP_CONTAINER(timer, vkp_i_probe, timer);
    vkp_client *client = probe->client;
    vkp_i_probe_hold(&probe->link);
    if (probe->published_ns == 0) {
        vkp_i_client_end_probe(client);
    } else if (client->link.known_ns >= probe->published_ns) {
        client->link.known_ns = client->delivered_ns;
        vkp_i_link_lose(&client->link, "a published message did not arrive");
    } else if (vkp_i_probe_start_timer(probe)) {
        vkp_i_client_beat_now(client);
    } else {
        vkp_i_client_end_probe(client);
    }
    vkp_i_probe_release(&probe->link);
}

static const vkp_i_probe_kind vkp_i_delivery_kind = {
    {vkp_i_delivery_on_ready, vkp_i_probe_on_push, vkp_i_probe_on_down, vkp_i_probe_on_busy, NULL,
     NULL, vkp_i_probe_hold, vkp_i_probe_release, NULL},
    vkp_i_delivery_on_timer,
    vkp_i_delivery_answered};

/* A message of the own channel ends the probe that published it. */
__attribute__((noinline)) static void vkp_i_client_take_own(vkp_client *client,
                                                            const vkp_push *push)
{
    vkp_i_probe *probe = client->probe;
    char digits[VKP_I_DIGITS];
    size_t from;
    if (probe == NULL || probe->kind != &vkp_i_delivery_kind) {
        return;
    }
    from = vkp_i_format_u64(digits, probe->begun_ns);
    if (vkp_i_str_equal(push->payload, vkp_i_str(digits + from, VKP_I_DIGITS - from))) {
        client->delivered_ns = probe->begun_ns;
        VKP_I_COUNT(client, deliveries);
        vkp_i_client_end_probe(client);
    }
}

/* It is time for a delivery probe: start one, unless the own channel is not subscribed or another
   probe runs. */
static void vkp_i_client_probe_delivery(vkp_client *client)
{
    vkp_i_interest *own = vkp_i_client_get_own(client);
    client->delivery_ns = vkp_i_after_ms(client->loop->now_ns, client->config.delivery_ms);
    if (own != NULL && own->state == VKP_I_SUB_HELD && client->probe == NULL &&
        vkp_i_client_start_probe(client, &vkp_i_delivery_kind) != VKP_OK) {
        vkp_i_client_end_probe(client);
    }
}

#endif /* VKP_I_IO */
