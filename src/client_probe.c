#if VKP_I_IO
/* ======================================================================================
   >>impl-client-probe   A second, short connection of a client, for a question
   ======================================================================================
   Loop's thread. A client has at most one, and only while its own connection is ready. It goes to
   the same address, with the same credentials, and without what the program set up. Who starts it
   brings its callbacks; those may end it at any time.                                         */

/* What a probe is for. */
typedef struct vkp_i_probe_kind {
    vkp_i_link_ops ops;
    void (*on_timer)(vkp_timer *timer); /* reply_timeout_ms after the start */
    /* The answer to vkp_i_probe_ask. */
    void (*answered)(vkp_i_request *request, vkp_status status, const vkp_value *value,
                     const vkp_bytes *frame);
} vkp_i_probe_kind;

/* A question for the server's counts of the client's subscriptions. */
typedef struct vkp_i_audit {
    uint64_t changes; /* client->changes when it was sent */
    uint64_t sent_ns; /* on the loop's clock */
} vkp_i_audit;

struct vkp_i_probe {
    vkp_i_link link;
    const vkp_i_probe_kind *kind;
    vkp_client *client;       /* one reference */
    vkp_client_config config; /* of link: the client's, without name, database, setup and role */
    size_t refs;              /* of the client's pointer, and of vkp_i_link_ops.hold */
    uint64_t begun_ns;        /* on the loop's clock */
    vkp_timer timer;          /* ends the wait for an answer */
    vkp_i_request ask;        /* the question under way */
    bool listing;             /* of liveness: CLIENT LIST was sent */
    vkp_i_audit audit;        /* of an audit in RESP2 */
    uint64_t published_ns;    /* of delivery: PUBLISH was answered; 0: not yet */
};

static vkp_i_probe *vkp_i_probe_of(vkp_i_link *link)
{
    return VKP_CONTAINER(link, vkp_i_probe, link);
}

static void vkp_i_probe_hold(vkp_i_link *link)
{
    vkp_i_probe_of(link)->refs++;
}

static void vkp_i_probe_release(vkp_i_link *link)
{
    vkp_i_probe *probe = vkp_i_probe_of(link);
    vkp_client *client = probe->client;
    if (--probe->refs == 0) {
        vkp_i_link_deinit(&probe->link);
        vkp_i_free(client->env, probe, sizeof *probe);
        vkp_i_client_release(client);
    }
}

static void vkp_i_probe_on_push(vkp_i_link *link, const vkp_push *push)
{
    (void)link;
    (void)push;
}

static void vkp_i_probe_on_busy(vkp_i_link *link)
{
    (void)link;
}

/* Let the client's watch look at once. */
static void vkp_i_client_look_now(vkp_client *client)
{
    if (vkp_timer_start(&client->timer, client->loop, client->timer.i_fn, 0,
                        client->loop->now_ns) != VKP_OK) {
        vkp_i_log(client->env, VKP_LOG_ERROR, "out of memory: the client's timer did not start");
    }
}

/* End the probe of the client, if one runs. */
static void vkp_i_client_end_probe(vkp_client *client)
{
    vkp_i_probe *probe = client->probe;
    vkp_i_request *request;
    if (probe != NULL) {
        client->probe = NULL;
        vkp_timer_stop(&probe->timer);
        vkp_i_link_close(&probe->link);
        while ((request = vkp_i_requests_pop(&probe->link.flight)) != NULL) {
            request->settle(request, VKP_ERR_CLOSED, NULL, NULL);
        }
        if (client->ready && client->audit_due) { /* it waited for this end */
            vkp_i_client_look_now(client);
        }
        vkp_i_probe_release(&probe->link);
    }
}

/* The probe's connection ended: that says nothing about the other one. */
static void vkp_i_probe_on_down(vkp_i_link *link)
{
    vkp_i_client_end_probe(vkp_i_probe_of(link)->client);
}

/* Send the probe's next question. False: no memory. */
static bool vkp_i_probe_ask(vkp_i_probe *probe, size_t argc, const vkp_str *argv)
{
    probe->ask.due = 1;
    probe->ask.settle = probe->kind->answered;
    if (vkp_i_request_put(&probe->ask, probe->client->env, argc, argv) == VKP_OK &&
        vkp_i_link_start(&probe->link, &probe->ask)) {
        return true;
    }
    vkp_bytes_unref(&probe->ask.bytes);
    return false;
}

/* Ask what the server says of the client's own connection, whose id is known. False: no memory. */
static bool vkp_i_probe_list(vkp_i_probe *probe)
{
    char digits[VKP_I_DIGITS];
    size_t from = vkp_i_format_u64(digits, (uint64_t)probe->client->link.id);
    vkp_str argv[4];
    argv[0] = vkp_str_of("CLIENT");
    argv[1] = vkp_str_of("LIST");
    argv[2] = vkp_str_of("ID");
    argv[3] = vkp_i_str(digits + from, VKP_I_DIGITS - from);
    return vkp_i_probe_ask(probe, 4, argv);
}

/* Start the probe's timer, reply_timeout_ms from now. False: no memory. */
static bool vkp_i_probe_start_timer(vkp_i_probe *probe)
{
    vkp_client *client = probe->client;
    uint64_t deadline_ns =
        vkp_i_after_ms(vkp_i_loop_now(client->loop), client->config.reply_timeout_ms);
    return vkp_timer_start(&probe->timer, client->loop, probe->kind->on_timer, 0, deadline_ns) ==
           VKP_OK;
}

/* Start a probe of the client, which has none. On failure client->probe may be there: the caller
   ends it. */
static vkp_status vkp_i_client_start_probe(vkp_client *client, const vkp_i_probe_kind *kind)
{
    vkp_i_probe *probe = (vkp_i_probe *)vkp_i_alloc_zero(client->env, sizeof *probe);
    vkp_status status;
    if (probe == NULL) {
        return VKP_ERR_NOMEM;
    }
    probe->kind = kind;
    probe->client = client;
    probe->refs = 1;
    probe->begun_ns = vkp_i_loop_now(client->loop);
    probe->config = client->config;
    probe->config.name = vkp_i_str(NULL, 0);
    probe->config.database = 0;
    probe->config.setup_count = 0;
    probe->config.role = VKP_CLIENT_ROLE_ANY;
    (void)VKP_I_ADD(&client->refs, 1);
    client->probe = probe;
    status = vkp_i_link_init(&probe->link, client->env, client->loop, &probe->config, &kind->ops);
    if (status == VKP_OK && (!vkp_i_probe_start_timer(probe) || !vkp_i_client_aim(client))) {
        status = VKP_ERR_NOMEM;
    }
    if (status == VKP_OK) {
        status = vkp_i_link_connect_to(&probe->link, &client->link.peer, client->target.username,
                                       client->target.password);
    }
    return status;
}

#endif /* VKP_I_IO */
