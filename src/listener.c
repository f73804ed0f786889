#if VKP_I_IO
/* ======================================================================================
   >>impl-listener   Accept connections
   ======================================================================================
   A listener accepts on its loop's thread, at most VKP_I_ACCEPT_BATCH connections per event. The
   gate admits or refuses each one (vkp_i_listener_admit); an admitted descriptor becomes a
   connection, or on_fd takes it with its seat.
   A Unix listener is a follower of its socket: when the socket ends or has another descriptor,
   the registry queues follower.task on the loop, from any thread. vkp_listener_open with
   on_start queues the open itself as a task, from any thread.
   The registry's lock and the gate's mutex are taken one after the other, never one inside the
   other; callbacks of the listener run without locks. A callback may close the listener: code
   behind a callback checks `endpoint` or VKP_I_LISTENER_CLOSED.                               */

/* Bits of vkp_listener.flags. */
#define VKP_I_LISTENER_CLOSED 1u       /* vkp_listener_close was called */
#define VKP_I_LISTENER_LOOPS 2u        /* the loop owns the listener and frees it after the close */
#define VKP_I_LISTENER_CLOSED_FIRST 4u /* closed while follower.task was queued */
#define VKP_I_LISTENER_DRAINS 8u       /* a drain is under way */

#define VKP_I_UNIX_PREFIX (sizeof "unix:" - 1)
#define VKP_I_ADDRESS_TEXT 320    /* bytes of a TCP address as text */
#define VKP_I_LISTEN_BACKLOG 4096 /* default of vkp_listener_config.backlog */

/* References, all used on the loop's thread: one of the owner (the program, or the loop with
   VKP_I_LISTENER_LOOPS), and one each of a running event, of a follower's task queued at the
   close, and of a drain under way.                                                            */
struct vkp_listener {
    vkp_loop *loop;             /* shared */
    size_t refs;                /* loop's thread */
    uint32_t flags;             /* VKP_I_LISTENER_CLOSED and the other bits */
    vkp_i_profile *profile;     /* config of the accepted connections, shared with them */
    vkp_listener_config config; /* its address is cleared after the open: the caller's memory */
    vkp_gate *gate;             /* shared; opened by the listener when the config has none */
    uint64_t listener_id;       /* the listener's number in its gate */
    vkp_registry *registry;     /* of a Unix socket, shared; NULL for TCP */
    vkp_socket *socket;         /* of a Unix address, shared unless config.follow; NULL for TCP */
    uint32_t generation;        /* the socket's generation, for vkp_i_socket_take_weak */
    vkp_i_follower follower;    /* entry in the socket's list of followers */
    vkp_i_endpoint *endpoint;   /* shares the listening descriptor; NULL when closed */
    vkp_io io;                  /* registration of the listening descriptor */
    vkp_timer pause;            /* runs while accepting pauses, for example after EMFILE */
    uint64_t pause_ns;          /* length of the last pause; 0: the last accept succeeded */
    uint64_t shortage_ns; /* time of the first accept that failed with EMFILE or ENFILE; 0: none */
    int spare;            /* a descriptor kept to be closed when no other is free; -1: none */
    vkp_i_task release_task;        /* gives the loop's reference back after the close */
    vkp_timer drain_timer;          /* deadline of the drain */
    vkp_i_task drain_task;          /* calls on_drained; its fn is NULL until a drain begins */
    void (*on_drained)(void *user); /* of vkp_listener_drain; called once */
    void *drain_user;               /* argument of on_drained */
    vkp_str address;                /* a copy, with the port that the system chose */
    vkp_listener_stats stats;       /* all but `clients`, which the gate's seats count */
};

/* Give one reference back; the last one frees the listener. */
static void vkp_i_listener_release(vkp_listener *listener)
{
    if (--listener->refs == 0) {
        vkp_loop *loop = listener->loop;
        vkp_i_profile_unref(listener->profile);
        vkp_registry_unref(listener->registry);
        vkp_gate_unref(listener->gate);
        vkp_i_free_str(loop->env, listener->address);
        vkp_i_free(loop->env, listener, sizeof *listener);
        vkp_loop_unref(loop);
    }
}

static void vkp_i_listener_release_later(vkp_i_task *task)
{
    vkp_i_listener_release(VKP_CONTAINER(task, vkp_listener, release_task));
}

/* The socket or the loop ended: close the listener and call on_end. */
static void vkp_i_listener_end(vkp_listener *listener)
{
    void (*on_end)(void *user) = listener->config.on_end;
    void *user = listener->config.conn.user;
    vkp_listener_close(listener);
    if (on_end != NULL) {
        on_end(user);
    }
}

/* ---- accepting ---- */

/* Count a refused client, call on_refuse, close fd. */
static void vkp_i_listener_refuse(vkp_listener *listener, int fd, vkp_refusal why)
{
    listener->stats.refused[why]++;
    vkp_i_gate_count_refusal(listener->gate, why);
    if (listener->config.on_refuse != NULL) {
        listener->config.on_refuse(listener->config.conn.user, fd, why);
    }
    (void)listener->loop->sys->close(fd);
}

/* Take a seat for the client of fd. NOT_FOUND: the client has disconnected already; LIMIT,
   NOMEM: the client is refused, *why says why.                                                */
static vkp_status vkp_i_listener_admit(vkp_listener *listener, int fd, vkp_seat **seat,
                                       vkp_refusal *why)
{
    vkp_gate *gate = listener->gate;
    vkp_peer peer;
    vkp_seat wanted;
    vkp_status status = VKP_OK;
    memset(&wanted, 0, sizeof wanted);
    if (listener->socket != NULL) {
        int result = listener->loop->sys->peer(fd, &peer);
        if (result == -ENOTCONN || result == -ECONNRESET) {
            return VKP_ERR_NOT_FOUND;
        }
        *why = VKP_REFUSAL_USER;
        if (result < 0 || !vkp_i_gate_allows(gate, &peer)) {
            return VKP_ERR_LIMIT;
        }
        wanted.uid = peer.uid;
        wanted.has_uid = true;
        if (listener->config.follow) {
            status = vkp_i_socket_take_weak(listener->socket, listener->generation, &wanted.sock);
            *why = status == VKP_ERR_LIMIT ? VKP_REFUSAL_FULL : VKP_REFUSAL_ENDED;
        }
    }
    if (status != VKP_OK) {
        return VKP_ERR_LIMIT;
    }
    wanted.listener_id = listener->listener_id;
    VKP_I_LOCK(&gate->mutex);
    status = vkp_i_gate_seat(gate, &wanted, listener->config.max_clients, seat, why);
    VKP_I_UNLOCK(&gate->mutex);
    if (status != VKP_OK) {
        vkp_socket_unref(wanted.sock);
    }
    return status;
}

/* Admit the client of fd: make a connection, or give fd and its seat to on_fd. Otherwise refuse
   it.                                                                                         */
static void vkp_i_listener_give(vkp_listener *listener, int fd)
{
    const vkp_conn_ops *ops = listener->profile->config.ops;
    vkp_seat *seat = NULL;
    vkp_refusal why = VKP_REFUSAL_OVERLOAD;
    vkp_conn *conn;
    vkp_status status = vkp_i_listener_admit(listener, fd, &seat, &why);
    if (status == VKP_ERR_NOT_FOUND) {
        listener->stats.aborted++;
        (void)listener->loop->sys->close(fd);
        return;
    }
    if ((listener->flags & VKP_I_LISTENER_CLOSED) != 0) { /* the gate closed it */
        vkp_seat_unref(seat);
        listener->config.on_refuse = NULL;
        vkp_i_listener_refuse(listener, fd, VKP_REFUSAL_ENDED);
        return;
    }
    if (status != VKP_OK) {
        vkp_i_listener_refuse(listener, fd, why);
        return;
    }
    if (listener->config.on_fd != NULL) {
        listener->stats.accepted++;
        listener->config.on_fd(listener->config.conn.user, fd, seat);
        return;
    }
    if (vkp_i_conn_adopt(listener->loop, fd, listener->profile, true, &conn) != VKP_OK) {
        vkp_seat_unref(seat);
        vkp_i_listener_refuse(listener, fd, VKP_REFUSAL_OVERLOAD);
        return;
    }
    listener->stats.accepted++;
    vkp_conn_set_seat(conn, seat);
    if (listener->config.on_accept != NULL) {
        listener->config.on_accept(listener->config.conn.user, conn);
    }
    if (vkp_conn_is_open(conn) && ops->on_open != NULL) {
        ops->on_open(conn, vkp_conn_get_user(conn));
    }
    vkp_conn_unref(conn);
}

#define VKP_I_ACCEPT_BATCH 64           /* most connections accepted per event */
#define VKP_I_PAUSE_LEAST_NS 10000000u  /* first pause: 10 ms */
#define VKP_I_PAUSE_MOST_NS 1000000000u /* longest pause: 1 s */

/* The pause is over: accept again. */
static void vkp_i_listener_unpause(vkp_timer *timer)
{
    vkp_listener *listener = VKP_CONTAINER(timer, vkp_listener, pause);
    if (vkp_io_set(&listener->io, VKP_IO_READ) != VKP_OK) {
        /* Cannot fail: the entry of this timer was just removed, so there is room. */
        (void)!vkp_timer_start(timer, listener->loop, vkp_i_listener_unpause, 0,
                               listener->loop->now_ns + VKP_I_PAUSE_MOST_NS);
    }
}

/* Pause accepting. Clients wait in the backlog, and the loop does not spin on a descriptor that
   stays ready.                                                                                */
static void vkp_i_listener_back_off(vkp_listener *listener, int error)
{
    listener->pause_ns = listener->pause_ns == 0
                             ? VKP_I_PAUSE_LEAST_NS
                             : VKP_I_MIN(listener->pause_ns * 2, (uint64_t)VKP_I_PAUSE_MOST_NS);
    if (vkp_timer_start(&listener->pause, listener->loop, vkp_i_listener_unpause, 0,
                        listener->loop->now_ns + listener->pause_ns) == VKP_OK) {
        (void)!vkp_io_set(&listener->io, 0);
        listener->stats.pauses++;
    }
    vkp_i_log(listener->loop->env, VKP_LOG_WARN, "%s: accept: %s; pausing for %u ms",
              listener->address.ptr, strerror(error),
              (unsigned)(listener->pause_ns / VKP_I_NS_PER_MS));
}

/* Descriptors are short for a second: close the spare one, so that waiting clients can be
   accepted and refused instead of waiting without an answer.                                  */
static void vkp_i_listener_reject_waiting(vkp_listener *listener)
{
    const vkp_sys *sys = listener->loop->sys;
    int fd = 0;
    int i;
    if (listener->spare >= 0) {
        (void)sys->close(listener->spare);
        listener->spare = -1;
        for (i = 0; i < VKP_I_ACCEPT_BATCH && fd >= 0 && listener->endpoint != NULL; i++) {
            fd = sys->accept(listener->endpoint->fd);
            if (fd >= 0) {
                vkp_i_listener_refuse(listener, fd, VKP_REFUSAL_OVERLOAD);
            }
        }
    }
    if (listener->endpoint != NULL) {
        listener->spare = sys->socket(AF_UNIX, SOCK_STREAM);
    }
}

/* accept failed. True: accept the next connection immediately. */
static bool vkp_i_listener_failed(vkp_listener *listener, int error)
{
    if (error == EINTR) {
        return true;
    }
    if (error == EAGAIN || error == EWOULDBLOCK) {
        return false;
    }
    if (error == ECONNABORTED || error == EPROTO || error == ENETDOWN || error == EHOSTUNREACH ||
        error == ENETUNREACH) { /* errors of the accepted connection, not of the listener */
        listener->stats.aborted++;
        return true;
    }
    if (error == EMFILE || error == ENFILE) {
        uint64_t now_ns = listener->loop->now_ns;
        listener->stats.no_descriptors++;
        if (listener->shortage_ns == 0) {
            listener->shortage_ns = now_ns;
        } else if (now_ns - listener->shortage_ns >= VKP_I_PAUSE_MOST_NS) {
            vkp_i_listener_reject_waiting(listener);
        }
    } else if (error == ENOMEM || error == ENOBUFS) {
        listener->stats.no_memory++;
    } else {
        listener->stats.failed++;
    }
    if ((listener->flags & VKP_I_LISTENER_CLOSED) == 0) {
        vkp_i_listener_back_off(listener, error);
    }
    return false;
}

/* The listening descriptor is ready; ready 0: the loop closes. */
static void vkp_i_listener_event(vkp_io *io, uint32_t ready)
{
    vkp_listener *listener = VKP_CONTAINER(io, vkp_listener, io);
    bool more = true;
    int i;
    listener->refs++;
    if (ready == 0) {
        vkp_i_listener_end(listener);
    }
    for (i = 0; i < VKP_I_ACCEPT_BATCH && more && listener->endpoint != NULL; i++) {
        int fd = listener->loop->sys->accept(listener->endpoint->fd);
        if (fd < 0) {
            more = vkp_i_listener_failed(listener, -fd);
            continue;
        }
        listener->pause_ns = 0;
        listener->shortage_ns = 0;
        if (i == 0 && listener->spare < 0) { /* no descriptor was free for it earlier */
            listener->spare = listener->loop->sys->socket(AF_UNIX, SOCK_STREAM);
        }
        if (listener->socket == NULL) {
            (void)listener->loop->sys->set_nodelay(fd);
        }
        vkp_i_listener_give(listener, fd);
    }
    vkp_i_listener_release(listener);
}

/* ---- with a socket ---- */

/* Task of the follower: the socket has ended, or has another descriptor. */
static void vkp_i_listener_socket_ended(vkp_i_task *task)
{
    vkp_listener *listener = VKP_CONTAINER(task, vkp_listener, follower.task);
    vkp_i_endpoint *endpoint = NULL;
    vkp_i_registry_enter(listener->registry);
    listener->follower.queued = false;
    if (listener->follower.sock != NULL) {
        endpoint = vkp_i_endpoint_ref(listener->follower.sock->endpoint);
    }
    vkp_i_registry_leave(listener->registry, true);
    if ((listener->flags & VKP_I_LISTENER_CLOSED_FIRST) != 0) {
        vkp_i_listener_release(listener);
    } else if (endpoint == NULL) {
        vkp_i_listener_end(listener);
    } else if (endpoint != listener->endpoint) {
        vkp_i_endpoint *before = listener->endpoint;
        listener->endpoint = endpoint;
        endpoint = before; /* its reference is given back below */
        vkp_io_stop(&listener->io);
        vkp_timer_stop(&listener->pause);
        if (vkp_io_start(&listener->io, listener->loop, listener->endpoint->fd, VKP_IO_READ,
                         vkp_i_listener_event) != VKP_OK) {
            vkp_i_listener_end(listener);
        }
    }
    vkp_i_endpoint_unref(endpoint);
}

/* Share the socket's descriptor and join its followers. CLOSED: the socket has ended. */
static vkp_status vkp_i_listener_attach_socket(vkp_listener *listener)
{
    vkp_socket *sock = listener->socket;
    vkp_i_registry_enter(listener->registry);
    if (sock->endpoint != NULL) {
        listener->endpoint = vkp_i_endpoint_ref(sock->endpoint);
        listener->follower.loop = listener->loop;
        listener->follower.task.fn = vkp_i_listener_socket_ended;
        listener->follower.sock = sock;
        listener->follower.next = sock->followers;
        sock->followers = &listener->follower;
    }
    vkp_i_registry_leave(listener->registry, true);
    return listener->endpoint != NULL ? VKP_OK : VKP_ERR_CLOSED;
}

/* Leave the socket's followers. A follower's task that is queued keeps a reference until it
   runs.                                                                                       */
static void vkp_i_listener_detach_socket(vkp_listener *listener)
{
    vkp_i_follower *follower = &listener->follower;
    vkp_i_registry_enter(listener->registry);
    if (follower->sock != NULL) {
        vkp_i_follower **link = &follower->sock->followers;
        while (*link != follower) {
            link = &(*link)->next;
        }
        *link = follower->next;
        follower->sock = NULL;
    }
    if (follower->queued) {
        listener->flags |= VKP_I_LISTENER_CLOSED_FIRST;
        listener->refs++;
    }
    vkp_i_registry_leave(listener->registry, true);
}

/* ---- opening ---- */

/* Bind and listen on a TCP address; listener->address gets the port that the system chose. */
static vkp_status vkp_i_listen_tcp(vkp_listener *listener, const vkp_address *address, vkp_str text)
{
    const vkp_sys *sys = listener->loop->sys;
    char full[VKP_I_ADDRESS_TEXT];
    int fd = sys->socket(address->family, SOCK_STREAM);
    int result = fd;
    if (fd >= 0) {
        listener->endpoint = vkp_i_endpoint_open(listener->loop->env, fd);
        if (listener->endpoint == NULL) {
            (void)sys->close(fd);
            return VKP_ERR_NOMEM;
        }
        result = sys->bind(fd, address->storage.bytes, address->bytes, 0);
    }
    if (result == 0) {
        result = sys->listen(fd, listener->config.backlog > 0 ? listener->config.backlog
                                                              : VKP_I_LISTEN_BACKLOG);
    }
    if (result == 0) {
        result = sys->local_port(fd);
    }
    if (result < 0) {
        return result == -EADDRINUSE ? VKP_ERR_IN_USE : vkp_i_sys_failure(result);
    }
    while (text.ptr[--text.len] != ':') { /* cut the requested port off: it may be 0 */
    }
    (void)snprintf(full, sizeof full, "%.*s:%d", VKP_FMT(text), result);
    listener->address = vkp_str_of(full);
    return vkp_i_copy_str(listener->loop->env, &listener->address) ? VKP_OK : VKP_ERR_NOMEM;
}

/* Listen on listener->socket, of which the listener holds a reference. */
static vkp_status vkp_i_listen_unix(vkp_listener *listener)
{
    char full[sizeof "unix:" + VKP_I_PATH_BYTES];
    bool copied;
    (void)snprintf(full, sizeof full, "unix:%s", vkp_socket_get_path(listener->socket));
    listener->address = vkp_str_of(full);
    copied = vkp_i_copy_str(listener->loop->env, &listener->address);
    listener->generation = vkp_socket_downgrade(listener->socket).i_generation;
    return copied ? vkp_i_listener_attach_socket(listener) : VKP_ERR_NOMEM;
}

/* Open the socket of "unix:PATH" or, for a unique path, of "unix:". Opens a registry when
   *registry is NULL.                                                                          */
static vkp_status vkp_i_make_socket(const vkp_env *env, int backlog, vkp_str address,
                                    vkp_registry **registry, vkp_socket **sock)
{
    vkp_str path = vkp_i_str(address.ptr + VKP_I_UNIX_PREFIX, address.len - VKP_I_UNIX_PREFIX);
    bool abstract = path.len > 0 && path.ptr[0] == '@';
    vkp_status status = VKP_OK;
    if (abstract && !VKP_I_LINUX) {
        return VKP_ERR_UNSUPPORTED;
    }
    if (path.len == 0) {
        path.ptr = NULL;
    }
    if (*registry == NULL) {
        vkp_registry_config config;
        memset(&config, 0, sizeof config);
        config.env = env;
        config.backlog = backlog;
        config.abstract_names = VKP_I_LINUX;
        status = vkp_registry_open(&config, registry);
    } else {
        VKP_I_REQUIRE(!abstract || (*registry)->config.abstract_names);
    }
    return status == VKP_OK ? vkp_socket_open(*registry, path, sock) : status;
}

static vkp_status vkp_i_listener_bind(vkp_listener *listener)
{
    vkp_str text = listener->config.address;
    vkp_address address;
    size_t count = 0;
    vkp_status status;
    if (listener->config.socket != NULL) {
        listener->registry = vkp_registry_ref(listener->config.socket->registry);
        listener->socket = vkp_socket_ref(listener->config.socket);
        return listener->socket != NULL ? vkp_i_listen_unix(listener) : VKP_ERR_LIMIT;
    }
    if (vkp_i_starts_with(text, "unix:")) {
        if (listener->config.registry != NULL) {
            listener->registry = vkp_registry_ref(listener->config.registry);
        }
        status = vkp_i_make_socket(listener->loop->env, listener->config.backlog, text,
                                   &listener->registry, &listener->socket);
        return status == VKP_OK ? vkp_i_listen_unix(listener) : status;
    }
    status = vkp_i_parse_address(listener->loop->env, text, &address, 1, &count);
    return status == VKP_OK ? vkp_i_listen_tcp(listener, &address, text) : status;
}

static vkp_status vkp_i_listener_open_gate(vkp_listener *listener)
{
    vkp_gate_config config;
    vkp_status status = VKP_OK;
    memset(&config, 0, sizeof config);
    config.env = listener->loop->env;
    if (listener->config.gate != NULL) {
        listener->gate = vkp_gate_ref(listener->config.gate);
    } else {
        status = vkp_gate_open(&config, &listener->gate);
    }
    if (status == VKP_OK) {
        listener->listener_id = VKP_I_ADD(&listener->gate->listener_ids, (uint64_t)1);
    }
    return status;
}

/* Open a listener whose config was checked. Loop's thread. */
static vkp_status vkp_i_listener_begin(vkp_loop *loop, const vkp_listener_config *config,
                                       vkp_listener **out)
{
    vkp_listener *listener;
    vkp_status status;
    int error;
    listener = (vkp_listener *)vkp_i_alloc_zero(loop->env, sizeof *listener);
    if (listener == NULL) {
        return VKP_ERR_NOMEM;
    }
    listener->profile = vkp_i_profile_open(loop->env, &config->conn);
    if (listener->profile == NULL) {
        vkp_i_free(loop->env, listener, sizeof *listener);
        return VKP_ERR_NOMEM;
    }
    listener->loop = vkp_loop_ref(loop);
    listener->refs = 1;
    listener->config = *config;
    listener->spare = -1;
    if (listener->config.max_clients == 0) {
        listener->config.max_clients = SIZE_MAX;
    }
    status = vkp_i_listener_open_gate(listener);
    status = status == VKP_OK ? vkp_i_listener_bind(listener) : status;
    if (status == VKP_OK) {
        status = vkp_io_start(&listener->io, loop, listener->endpoint->fd, VKP_IO_READ,
                              vkp_i_listener_event);
    }
    error = errno;
    memset(&listener->config.address, 0, sizeof listener->config.address); /* the caller's memory */
    if (status != VKP_OK) {
        /* unref must give the open's reference of the socket back */
        listener->config.follow = false;
        vkp_listener_unref(listener);
        errno = error;
        return status;
    }
    /* On failure vkp_i_listener_event opens the spare descriptor later. */
    listener->spare = loop->sys->socket(AF_UNIX, SOCK_STREAM);
    if (config->follow) {
        vkp_socket_unref(listener->socket); /* not the last reference: the caller holds one */
    }
    *out = listener;
    return VKP_OK;
}

VKP_API const char *vkp_listener_get_address(const vkp_listener *listener)
{
    return listener->address.ptr;
}

VKP_API void vkp_listener_get_stats(const vkp_listener *listener, vkp_listener_stats *stats)
{
    const vkp_seat *each;
    *stats = listener->stats;
    stats->clients = 0;
    VKP_I_LOCK(&listener->gate->mutex);
    for (each = listener->gate->seats; each != NULL; each = each->next) {
        stats->clients += each->listener_id == listener->listener_id ? each->clients : 0;
    }
    VKP_I_UNLOCK(&listener->gate->mutex);
}

VKP_API void vkp_listener_close(vkp_listener *listener)
{
    if (listener == NULL || (listener->flags & VKP_I_LISTENER_CLOSED) != 0) {
        return;
    }
    listener->flags |= VKP_I_LISTENER_CLOSED;
    vkp_io_stop(&listener->io);
    vkp_timer_stop(&listener->pause);
    if (listener->registry != NULL) {
        vkp_i_listener_detach_socket(listener);
    }
    vkp_i_endpoint_unref(listener->endpoint);
    listener->endpoint = NULL;
    if (!listener->config.follow) {
        vkp_socket_unref(listener->socket);
    }
    if (listener->spare >= 0) {
        (void)listener->loop->sys->close(listener->spare);
        listener->spare = -1;
    }
    if ((listener->flags & VKP_I_LISTENER_LOOPS) != 0) {
        vkp_i_loop_defer(listener->loop, &listener->release_task);
    }
}

VKP_API void vkp_listener_unref(vkp_listener *listener)
{
    if (listener == NULL) {
        return;
    }
    vkp_listener_close(listener);
    if ((listener->flags & VKP_I_LISTENER_DRAINS) != 0) {
        listener->flags &= ~VKP_I_LISTENER_DRAINS;
        vkp_timer_stop(&listener->drain_timer);
        listener->on_drained = NULL;
        if (listener->profile->when_empty != NULL) { /* otherwise drain_task is deferred */
            listener->profile->when_empty = NULL;
            vkp_i_listener_release(listener);
        }
    }
    vkp_i_listener_release(listener);
}

/* ---- draining ---- */

/* Task: every connection of a drained listener is closed. */
static void vkp_i_listener_drained(vkp_i_task *task)
{
    vkp_listener *listener = VKP_CONTAINER(task, vkp_listener, drain_task);
    void (*on_drained)(void *user) = listener->on_drained;
    listener->flags &= ~VKP_I_LISTENER_DRAINS;
    vkp_timer_stop(&listener->drain_timer);
    if (on_drained != NULL) {
        on_drained(listener->drain_user);
    }
    vkp_i_listener_release(listener);
}

/* The drain's deadline has passed: close the connections that are left. */
static void vkp_i_listener_drain_over(vkp_timer *timer)
{
    vkp_listener *listener = VKP_CONTAINER(timer, vkp_listener, drain_timer);
    vkp_conn *conn;
    size_t index = 0;
    listener->refs++;
    while ((conn = vkp_i_conn_of_profile(listener->loop, listener->profile, &index)) != NULL) {
        vkp_i_conn_finish(conn, VKP_CLOSE_LOCAL, 0);
    }
    vkp_i_listener_release(listener);
}

VKP_API vkp_status vkp_listener_drain(vkp_listener *listener, const vkp_bytes *notice,
                                      void (*on_end)(void *user), void *user, uint64_t deadline_ns)
{
    vkp_conn *conn;
    size_t index = 0;
    VKP_I_REQUIRE(listener != NULL && listener->config.on_fd == NULL);
    VKP_I_REQUIRE(listener->drain_task.fn == NULL);
    if (deadline_ns != VKP_FOREVER) {
        vkp_status status = vkp_timer_start(&listener->drain_timer, listener->loop,
                                            vkp_i_listener_drain_over, 0, deadline_ns);
        if (status != VKP_OK) {
            return status;
        }
    }
    listener->refs++;
    listener->flags |= VKP_I_LISTENER_DRAINS;
    listener->drain_task.fn = vkp_i_listener_drained;
    listener->on_drained = on_end;
    listener->drain_user = user;
    vkp_listener_close(listener);
    while ((conn = vkp_i_conn_of_profile(listener->loop, listener->profile, &index)) != NULL) {
        if (notice != NULL && vkp_conn_send(conn, notice) == VKP_ERR_NOMEM) {
            vkp_i_conn_close_later(conn, VKP_CLOSE_NOMEM, 0);
        }
        vkp_conn_drain(conn);
    }
    if (listener->profile->live > 0) {
        listener->profile->when_empty = &listener->drain_task;
    } else {
        vkp_i_loop_defer(listener->loop, &listener->drain_task);
    }
    return VKP_OK;
}

/* ---- listeners started from any thread ---- */

/* A listener that vkp_listener_open with on_start queued for its loop's thread. */
typedef struct vkp_i_start {
    vkp_i_task task;            /* runs vkp_i_start_run on the loop's thread */
    vkp_loop *loop;             /* shared */
    vkp_listener_config config; /* shares its socket, registry and gate; its address is a copy */
} vkp_i_start;

static void vkp_i_start_free(vkp_i_start *start)
{
    vkp_loop *loop = start->loop;
    vkp_registry_unref(start->config.registry);
    vkp_gate_unref(start->config.gate);
    vkp_socket_unref(start->config.socket);
    vkp_i_free_str(loop->env, start->config.address);
    vkp_i_free(loop->env, start, sizeof *start);
    vkp_loop_unref(loop);
}

/* Task on the loop's thread: open the listener, call on_start. */
static void vkp_i_start_run(vkp_i_task *task)
{
    vkp_i_start *start = VKP_CONTAINER(task, vkp_i_start, task);
    bool gives = start->config.follow && start->config.socket == NULL;
    vkp_listener *listener = NULL;
    vkp_listening result;
    memset(&result, 0, sizeof result);
    result.status = start->loop->closed ? VKP_ERR_CLOSED : VKP_OK;
    if (result.status == VKP_OK && gives) { /* on_start gets its first reference */
        result.status =
            vkp_i_make_socket(start->loop->env, start->config.backlog, start->config.address,
                              &start->config.registry, &start->config.socket);
    }
    if (result.status == VKP_OK) {
        result.status = vkp_i_listener_begin(start->loop, &start->config, &listener);
    }
    if (result.status == VKP_OK) {
        listener->flags |= VKP_I_LISTENER_LOOPS;
        listener->release_task.fn = vkp_i_listener_release_later;
        result.address = listener->address.ptr;
        result.listener = listener;
        result.socket = gives ? start->config.socket : NULL;
    } else if (result.status == VKP_ERR_SYS) {
        result.sys_error = errno;
    }
    start->config.on_start(start->config.conn.user, &result);
    if (result.socket != NULL) {
        start->config.socket = NULL; /* on_start took the reference */
    }
    vkp_i_start_free(start);
}

/* Queue vkp_i_start_run on the loop. Any thread. */
static vkp_status vkp_i_listener_start(vkp_loop *loop, const vkp_listener_config *config)
{
    vkp_i_start *start = (vkp_i_start *)vkp_i_alloc_zero(loop->env, sizeof *start);
    vkp_status status = VKP_OK;
    if (start == NULL) {
        return VKP_ERR_NOMEM;
    }
    start->task.fn = vkp_i_start_run;
    start->loop = vkp_loop_ref(loop);
    start->config = *config;
    start->config.registry = config->registry != NULL ? vkp_registry_ref(config->registry) : NULL;
    start->config.gate = config->gate != NULL ? vkp_gate_ref(config->gate) : NULL;
    if (config->address.ptr != NULL) {
        status = vkp_i_copy_str(loop->env, &start->config.address) ? VKP_OK : VKP_ERR_NOMEM;
    } else {
        start->config.socket = vkp_socket_ref(config->socket);
        status = start->config.socket != NULL ? VKP_OK : VKP_ERR_LIMIT;
    }
    if (status == VKP_OK && !vkp_i_loop_queue(loop, &start->task)) {
        status = VKP_ERR_CLOSED;
    }
    if (status != VKP_OK) {
        vkp_i_start_free(start);
    }
    return status;
}

VKP_API vkp_status vkp_listener_open(vkp_loop *loop, const vkp_listener_config *config,
                                     vkp_listener **listener)
{
    VKP_I_REQUIRE(loop != NULL && config != NULL);
    VKP_I_REQUIRE((config->address.ptr != NULL) != (config->socket != NULL));
    VKP_I_REQUIRE(config->conn.ops != NULL || config->on_fd != NULL);
    VKP_I_REQUIRE((config->on_start == NULL) == (listener != NULL));
    if (config->on_start != NULL) {
        VKP_I_REQUIRE(!config->follow || config->address.ptr == NULL ||
                      vkp_i_starts_with(config->address, "unix:"));
        return vkp_i_listener_start(loop, config);
    }
    VKP_I_REQUIRE(vkp_i_on_loop(loop) && (config->socket != NULL || !config->follow));
    return loop->closed ? VKP_ERR_CLOSED : vkp_i_listener_begin(loop, config, listener);
}

#endif /* VKP_I_IO */
