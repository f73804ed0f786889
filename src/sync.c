#if VKP_I_IO
/* ======================================================================================
   >>impl-sync   A client without an event loop of one's own
   ======================================================================================
   Each call that waits runs rounds of the loop until what it waits for is there, or the deadline
   has passed. Pushes wait in a channel, replies of a pipeline in a list of one-shots. One thread at
   a time; no lock. */

/* One command of vkp_sync_append_argv. */
typedef struct vkp_i_pending {
    struct vkp_i_pending *next; /* the next younger one */
    vkp_oneshot slot;
} vkp_i_pending;

/* A vkp_sync_subscribe; it outlives a call whose deadline passed. */
typedef struct vkp_i_sync_wait {
    const vkp_env *env;
    bool done;      /* the outcome is known */
    bool abandoned; /* the call has returned: the outcome frees this */
    vkp_status status;
} vkp_i_sync_wait;

struct vkp_sync {
    const vkp_env *env;
    vkp_loop *loop;
    vkp_client *client;
    vkp_mpsc_rx *pushes;
    vkp_i_pending *pending;      /* oldest first */
    vkp_i_pending **pending_end; /* the NULL link where the next one is appended */
};

#define VKP_I_SYNC_PUSH_BYTES ((size_t)8 << 20) /* default of push_bytes */

/* Run one round; *again is false when the deadline had passed before. */
static vkp_status vkp_i_sync_round(vkp_sync *sync, uint64_t deadline_ns, bool *again)
{
    *again = vkp_i_loop_clock(sync->loop) < deadline_ns;
    return vkp_loop_run_once(sync->loop, *again ? deadline_ns : 0);
}

static vkp_status vkp_i_sync_open_pushes(vkp_sync *sync, size_t bytes, vkp_mpsc_tx **tx)
{
    vkp_mpsc_config config;
    memset(&config, 0, sizeof config);
    config.elem_bytes = sizeof(vkp_push);
    config.capacity_bytes = bytes != 0 ? bytes : VKP_I_SYNC_PUSH_BYTES;
    config.cost = vkp_push_get_cost;
    config.drop = vkp_push_drop;
    config.env = sync->env;
    return vkp_mpsc_open(&config, tx, &sync->pushes);
}

VKP_API vkp_status vkp_sync_open(const vkp_sync_config *config, vkp_sync **out)
{
    vkp_loop_config loop;
    vkp_client_config client;
    vkp_mpsc_tx *tx = NULL;
    vkp_sync *sync;
    vkp_status status;
    VKP_I_REQUIRE(config != NULL && out != NULL && config->backend != NULL);
    VKP_I_REQUIRE(config->client.on_push == NULL && config->client.pushes == NULL);
    sync = (vkp_sync *)vkp_i_alloc_zero(vkp_i_env(config->client.env), sizeof *sync);
    if (sync == NULL) {
        return VKP_ERR_NOMEM;
    }
    sync->env = vkp_i_env(config->client.env);
    sync->pending_end = &sync->pending;
    memset(&loop, 0, sizeof loop);
    loop.backend = config->backend;
    loop.env = sync->env;
    client = config->client;
    status = vkp_loop_open(&loop, &sync->loop);
    if (status == VKP_OK) {
        status = vkp_i_sync_open_pushes(sync, config->push_bytes, &tx);
    }
    if (status == VKP_OK) {
        client.pushes = tx;
        status = vkp_client_open(sync->loop, &client, &sync->client);
    }
    vkp_mpsc_tx_unref(tx); /* the client has its own reference */
    if (status != VKP_OK) {
        vkp_sync_unref(sync);
        return status;
    }
    *out = sync;
    return VKP_OK;
}

VKP_API vkp_client *vkp_sync_get_client(vkp_sync *sync)
{
    return sync->client;
}

VKP_API void vkp_sync_unref(vkp_sync *sync)
{
    if (sync == NULL) {
        return;
    }
    vkp_client_unref(sync->client);
    while (sync->pending != NULL) {
        vkp_i_pending *pending = sync->pending;
        vkp_reply *reply;
        sync->pending = pending->next;
        if (vkp_oneshot_try_recv(&pending->slot, &reply) == VKP_OK) {
            vkp_reply_unref(reply);
        }
        vkp_oneshot_close(&pending->slot);
        vkp_i_free(sync->env, pending, sizeof *pending);
    }
    if (sync->loop != NULL) {
        vkp_loop_close(sync->loop);
        vkp_loop_unref(sync->loop);
    }
    vkp_mpsc_rx_unref(sync->pushes);
    vkp_i_free(sync->env, sync, sizeof *sync);
}

VKP_API vkp_status vkp_sync_wait_ready(vkp_sync *sync, uint64_t deadline_ns)
{
    vkp_status status = VKP_OK;
    bool again = true;
    VKP_I_REQUIRE(sync != NULL);
    while (status == VKP_OK && vkp_client_get_state(sync->client) != VKP_CLIENT_READY) {
        if (vkp_client_get_state(sync->client) == VKP_CLIENT_CLOSED) {
            return VKP_ERR_CLOSED;
        }
        if (!again) {
            return VKP_ERR_TIMEOUT;
        }
        status = vkp_i_sync_round(sync, deadline_ns, &again);
    }
    return status;
}

/* Wait for the reply in the slot. TIMEOUT: the slot is still open. */
static vkp_status vkp_i_sync_wait_reply(vkp_sync *sync, vkp_oneshot *slot, uint64_t deadline_ns,
                                        vkp_reply **reply)
{
    vkp_status status = VKP_OK;
    bool again = true;
    for (;;) {
        vkp_status got = vkp_oneshot_try_recv(slot, reply);
        if (got != VKP_ERR_EMPTY) {
            return got == VKP_ERR_CLOSED ? VKP_ERR_DISCONNECTED : got;
        }
        if (!again || status != VKP_OK) {
            return status != VKP_OK ? status : VKP_ERR_TIMEOUT;
        }
        status = vkp_i_sync_round(sync, deadline_ns, &again);
    }
}

VKP_API vkp_status vkp_sync_command_argv(vkp_sync *sync, size_t argc, const vkp_str *argv,
                                         uint64_t deadline_ns, vkp_reply **reply)
{
    vkp_oneshot slot;
    vkp_status status;
    VKP_I_REQUIRE(sync != NULL && reply != NULL);
    status = vkp_client_command_argv(sync->client, &slot, argc, argv);
    if (status == VKP_OK) {
        status = vkp_i_sync_wait_reply(sync, &slot, deadline_ns, reply);
        vkp_oneshot_close(&slot);
    }
    return status;
}

VKP_API vkp_status vkp_sync_command(vkp_sync *sync, uint64_t deadline_ns, vkp_reply **reply, ...)
{
    vkp_str argv[VKP_I_COMMAND_ARGS];
    size_t argc = 0;
    const char *text;
    va_list arguments;
    va_start(arguments, reply);
    while ((text = va_arg(arguments, const char *)) != NULL && argc < VKP_I_COMMAND_ARGS) {
        argv[argc++] = vkp_str_of(text);
    }
    va_end(arguments);
    return text != NULL ? VKP_ERR_LIMIT
                        : vkp_sync_command_argv(sync, argc, argv, deadline_ns, reply);
}

VKP_API vkp_status vkp_sync_vcommandf(vkp_sync *sync, uint64_t deadline_ns, vkp_reply **reply,
                                      const char *format, va_list arguments)
{
    vkp_oneshot slot;
    vkp_status status;
    VKP_I_REQUIRE(sync != NULL && reply != NULL);
    status = vkp_client_vcommandf(sync->client, &slot, format, arguments);
    if (status == VKP_OK) {
        status = vkp_i_sync_wait_reply(sync, &slot, deadline_ns, reply);
        vkp_oneshot_close(&slot);
    }
    return status;
}

VKP_API vkp_status vkp_sync_commandf(vkp_sync *sync, uint64_t deadline_ns, vkp_reply **reply,
                                     const char *format, ...)
{
    va_list arguments;
    vkp_status status;
    va_start(arguments, format);
    status = vkp_sync_vcommandf(sync, deadline_ns, reply, format, arguments);
    va_end(arguments);
    return status;
}

VKP_API vkp_status vkp_sync_append_argv(vkp_sync *sync, size_t argc, const vkp_str *argv)
{
    vkp_i_pending *pending;
    vkp_status status;
    VKP_I_REQUIRE(sync != NULL);
    pending = (vkp_i_pending *)vkp_i_alloc_zero(sync->env, sizeof *pending);
    if (pending == NULL) {
        return VKP_ERR_NOMEM;
    }
    status = vkp_client_command_argv(sync->client, &pending->slot, argc, argv);
    if (status != VKP_OK) {
        vkp_i_free(sync->env, pending, sizeof *pending);
        return status;
    }
    *sync->pending_end = pending;
    sync->pending_end = &pending->next;
    return VKP_OK;
}

VKP_API vkp_status vkp_sync_next_reply(vkp_sync *sync, uint64_t deadline_ns, vkp_reply **reply)
{
    vkp_i_pending *pending;
    vkp_status status;
    VKP_I_REQUIRE(sync != NULL && reply != NULL);
    pending = sync->pending;
    if (pending == NULL) {
        return VKP_ERR_EMPTY;
    }
    status = vkp_i_sync_wait_reply(sync, &pending->slot, deadline_ns, reply);
    if (status != VKP_ERR_TIMEOUT && status != VKP_ERR_SYS) {
        sync->pending = pending->next;
        if (sync->pending == NULL) {
            sync->pending_end = &sync->pending;
        }
        vkp_oneshot_close(&pending->slot);
        vkp_i_free(sync->env, pending, sizeof *pending);
    }
    return status;
}

static void vkp_i_sync_subscribed(void *user, vkp_status status, vkp_str words)
{
    vkp_i_sync_wait *wait = (vkp_i_sync_wait *)user;
    (void)words;
    wait->done = true;
    wait->status = status;
    if (wait->abandoned) {
        vkp_i_free(wait->env, wait, sizeof *wait);
    }
}

VKP_API vkp_status vkp_sync_subscribe(vkp_sync *sync, vkp_sub_kind kind, vkp_str name,
                                      uint64_t deadline_ns)
{
    vkp_i_sync_wait *wait;
    vkp_status status;
    bool again = true;
    VKP_I_REQUIRE(sync != NULL);
    wait = (vkp_i_sync_wait *)vkp_i_alloc_zero(sync->env, sizeof *wait);
    if (wait == NULL) {
        return VKP_ERR_NOMEM;
    }
    wait->env = sync->env;
    status = vkp_client_subscribe_then(sync->client, kind, name, vkp_i_sync_subscribed, wait);
    if (status != VKP_OK) {
        vkp_i_free(sync->env, wait, sizeof *wait);
        return status;
    }
    while (status == VKP_OK && !wait->done && again) {
        status = vkp_i_sync_round(sync, deadline_ns, &again);
    }
    if (!wait->done) {
        wait->abandoned = true;
        return status != VKP_OK ? status : VKP_ERR_TIMEOUT;
    }
    status = wait->status;
    vkp_i_free(sync->env, wait, sizeof *wait);
    return status;
}

VKP_API vkp_status vkp_sync_unsubscribe(vkp_sync *sync, vkp_sub_kind kind, vkp_str name)
{
    VKP_I_REQUIRE(sync != NULL);
    return vkp_client_unsubscribe(sync->client, kind, name);
}

VKP_API vkp_status vkp_sync_next_push(vkp_sync *sync, uint64_t deadline_ns, vkp_push *push)
{
    vkp_status status = VKP_OK;
    bool again = true;
    VKP_I_REQUIRE(sync != NULL && push != NULL);
    for (;;) {
        vkp_status got = vkp_mpsc_try_recv(sync->pushes, push);
        if (got != VKP_ERR_EMPTY) {
            return got;
        }
        if (!again || status != VKP_OK) {
            return status != VKP_OK ? status : VKP_ERR_TIMEOUT;
        }
        status = vkp_i_sync_round(sync, deadline_ns, &again);
    }
}

#endif /* VKP_I_IO */
