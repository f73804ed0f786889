#if VKP_I_IO
/* ======================================================================================
   >>impl-link-connect   The way of a link to its server
   ======================================================================================
   From an address text to a connection, on the loop's thread. A host name is looked up by the
   resolver of the config, in its thread; without a resolver the lookup blocks this thread. When a
   name server does not answer in time, the addresses of the last lookup of the same name serve.
   What a lookup finds after its try has ended is kept: the next try has it, or waits for the rest.
   Each try begins with another address of the name: one that accepts connections and does not
   answer must not be the only one that is tried. Within a try each address gets a share of the time
   (see vkp_conn_config.connect_ms). */

#define VKP_I_LOOKUP_MS 1000u /* how long a lookup is waited for, where addresses are known */

/* Static text for a connection that failed or was lost. */
static const char *vkp_i_link_why(int error)
{
    return error == ECONNREFUSED || error == ENOENT ? "nobody accepts connections there"
           : error == ETIMEDOUT                     ? "nobody answers there"
                                                    : "the connection was lost";
}

static void vkp_i_link_on_open(vkp_conn *conn, void *user)
{
    vkp_i_link *link = (vkp_i_link *)user;
    link->connected = true;
    link->peer = *vkp_i_conn_get_address(conn);
    link->ops->hold(link);
    if (!vkp_i_link_begin_handshake(link)) {
        vkp_i_link_lose(link, "out of memory");
    }
    link->ops->release(link);
}

static void vkp_i_link_on_close(vkp_conn *conn, void *user, vkp_close_reason reason, int error)
{
    vkp_i_link *link = (vkp_i_link *)user;
    if (conn != link->conn) { /* vkp_i_link_close closed it */
        return;
    }
    if (reason == VKP_CLOSE_LOOP) {
        return; /* the owner closes with the loop */
    }
    vkp_i_log(link->env, VKP_LOG_INFO, "%s: %s%s%s", link->config->address.ptr,
              vkp_close_reason_str(reason), error != 0 ? ": " : "",
              error != 0 ? strerror(error) : "");
    if (link->stage == VKP_I_STAGE_HELLO && !link->spoke) {
        link->hung_up++;
    }
    link->ops->hold(link);
    vkp_i_link_fail(link, vkp_i_link_why(error), vkp_str_of(link->hello_words));
    link->ops->release(link);
}

static void vkp_i_link_on_drain(vkp_conn *conn, void *user)
{
    vkp_i_link *link = (vkp_i_link *)user;
    if (link->conn == conn && link->ops->on_written != NULL) {
        link->ops->on_written(link);
    }
}

static const vkp_conn_ops vkp_i_link_conn_ops = {
    vkp_i_link_on_open, vkp_i_link_on_data, vkp_i_link_on_drain, NULL, vkp_i_link_on_close, NULL};

/* Begin to connect to one of the addresses, the first one chosen by the number of failed tries. */
static vkp_status vkp_i_link_dial(vkp_i_link *link, const vkp_address *addresses, size_t count)
{
    vkp_address turned[VKP_I_LOOKUP_ADDRESSES];
    vkp_conn_config config;
    size_t i;
    for (i = 0; i < count; i++) {
        turned[i] = addresses[(i + link->failures) % count];
    }
    memset(&config, 0, sizeof config);
    config.ops = &vkp_i_link_conn_ops;
    config.user = link;
    config.loop_only = true;
    config.input_bytes = VKP_I_BLOCK_MAX;
    config.connect_ms = link->config->connect_timeout_ms;
    config.keepalive_ms = link->config->keepalive_ms == VKP_OFF ? 0 : link->config->keepalive_ms;
    config.unacked_ms = link->config->unacked_ms == VKP_OFF ? 0 : link->config->unacked_ms;
    return vkp_i_conn_connect_to(link->loop, turned, count, &config, &link->conn);
}

/* Connect to the addresses of the last lookup; on failure the link is lost. */
static void vkp_i_link_dial_known(vkp_i_link *link)
{
    vkp_status status = vkp_i_link_dial(link, link->known->addresses, link->known->count);
    if (status != VKP_OK) {
        vkp_i_link_lose(link,
                        status == VKP_ERR_SYS ? vkp_i_link_why(errno) : vkp_status_str(status));
    }
}

/* Whether addresses of this name are known. */
static bool vkp_i_link_knows(const vkp_i_link *link, const vkp_i_parts *parts)
{
    return link->known != NULL && strcmp(link->known->parts.host, parts->host) == 0 &&
           strcmp(link->known->parts.port, parts->port) == 0;
}

/* Keep the addresses that were found. */
static void vkp_i_link_keep_addresses(vkp_i_link *link, const vkp_i_lookup *lookup)
{
    if (link->known == NULL) {
        link->known = (vkp_i_known *)vkp_i_alloc_zero(link->env, sizeof *link->known);
    }
    if (link->known != NULL) {
        link->known->parts = lookup->parts;
        link->known->count = lookup->count;
        memcpy(link->known->addresses, lookup->addresses, sizeof lookup->addresses);
    }
}

/* The resolver has the outcome of the lookup, perhaps after the try that began it. */
static void vkp_i_link_looked_up(vkp_i_lookup *lookup)
{
    vkp_i_link *link = (vkp_i_link *)lookup->user;
    bool looking = link->looking;
    link->lookup = NULL;
    link->looking = false;
    vkp_timer_stop(&link->lookup_timer);
    if (lookup->count > 0) {
        vkp_i_link_keep_addresses(link, lookup);
    }
    if (!looking) {
        return;
    }
    link->ops->hold(link);
    if (vkp_i_link_knows(link, &lookup->parts)) {
        vkp_i_link_dial_known(link);
    } else {
        vkp_i_link_lose(link, lookup->count > 0 ? "out of memory" : "the host name was not found");
    }
    link->ops->release(link);
}

/* The lookup takes too long: use what is known. The lookup goes on, and this try does not wait for
   it. */
static void vkp_i_link_lookup_late(vkp_timer *timer)
{
    vkp_i_link *link = VKP_CONTAINER(timer, vkp_i_link, lookup_timer);
    link->looking = false;
    link->ops->hold(link);
    vkp_i_link_dial_known(link);
    link->ops->release(link);
}

/* Ask the resolver for the addresses of the name, unless it was asked already. */
static vkp_status vkp_i_link_look_up(vkp_i_link *link, const vkp_i_parts *parts)
{
    if (link->lookup != NULL && (strcmp(link->lookup->parts.host, parts->host) != 0 ||
                                 strcmp(link->lookup->parts.port, parts->port) != 0)) {
        vkp_i_link_abandon_lookup(link);
    }
    if (link->lookup == NULL) {
        link->lookup = vkp_i_resolver_ask(link->config->resolver, link->loop, parts,
                                          vkp_i_link_looked_up, link);
    }
    if (link->lookup == NULL) {
        return VKP_ERR_NOMEM;
    }
    link->looking = true;
    if (vkp_i_link_knows(link, parts)) {
        uint64_t deadline_ns = vkp_i_after_ms(vkp_i_loop_now(link->loop), VKP_I_LOOKUP_MS);
        return vkp_timer_start(&link->lookup_timer, link->loop, vkp_i_link_lookup_late, 0,
                               deadline_ns);
    }
    return VKP_OK;
}

/* Replace the text by a copy of another one. False: no memory; the text is empty then. */
static bool vkp_i_link_keep(const vkp_i_link *link, vkp_str *text, vkp_str now)
{
    vkp_i_free_str(link->env, *text);
    *text = now;
    return vkp_i_copy_str(link->env, text);
}

/* Prepare a try to connect with these credentials. False: no memory. */
static bool vkp_i_link_begin(vkp_i_link *link, vkp_str username, vkp_str password)
{
    link->stage = VKP_I_STAGE_CONNECTING;
    link->steps = 0;
    link->connected = false;
    link->spoke = false;
    link->authenticated = false;
    link->role_known = false;
    link->ping_refused = false;
    link->hello_restricted = false;
    link->demoted = false;
    link->subscribed = false;
    link->id = 0;
    link->id_asked = false;
    link->hello_words[0] = '\0';
    link->answered_ns = vkp_i_loop_now(link->loop);
    link->known_ns = link->answered_ns;
    return vkp_i_link_keep(link, &link->username, username) &&
           vkp_i_link_keep(link, &link->password, password);
}

/* Begin to connect to the address of another link. On failure the link is down, and on_down is not
   called. */
static vkp_status vkp_i_link_connect_to(vkp_i_link *link, const vkp_address *address,
                                        vkp_str username, vkp_str password)
{
    return vkp_i_link_begin(link, username, password) ? vkp_i_link_dial(link, address, 1)
                                                      : VKP_ERR_NOMEM;
}

/* Begin to connect to the address. On failure the link is down, and on_down is not called. */
static vkp_status vkp_i_link_connect(vkp_i_link *link, vkp_str address, vkp_str username,
                                     vkp_str password)
{
    vkp_address addresses[VKP_I_LOOKUP_ADDRESSES];
    vkp_i_parts parts;
    size_t count = 0;
    vkp_status status = vkp_i_split_address(link->env, address, &parts);
    if (status == VKP_OK && !vkp_i_link_begin(link, username, password)) {
        status = VKP_ERR_NOMEM;
    }
    if (status == VKP_OK && link->config->resolver != NULL && parts.name.text == NULL &&
        !vkp_i_is_numeric_host(parts.host)) {
        return vkp_i_link_look_up(link, &parts);
    }
    if (status == VKP_OK) {
        status = vkp_i_parse_address(link->env, address, addresses, VKP_I_LOOKUP_ADDRESSES, &count);
    }
    return status == VKP_OK ? vkp_i_link_dial(link, addresses, count) : status;
}

#endif /* VKP_I_IO */
