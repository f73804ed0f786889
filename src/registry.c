#if VKP_I_IO
/* ======================================================================================
   >>impl-registry   The registry of sockets
   ======================================================================================
   A registry maps paths to sockets and keeps none of them alive; each socket keeps the registry.
   The lock (vkp_i_registry_enter, leave) guards the members of vkp_registry from `sockets` to
   `next_check_ns`, and the guarded fields of its sockets. The socket section has lock order and
   states.
   Upkeep is the timed work, on the thread of config.loop. One pass, under the lock:
     1. ends sockets that lingered for linger_ms (all lingering ones, once the loop is closed);
     2. every check_ms compares the file at each path with the recorded one: another file or none is
        LOST; with config.rebind a new bind gives REBOUND or BLOCKED;
     3. starts the timer for the next pass, or stops it when nothing is due.
   After the unlock it calls on_event, one event at a time.
   A pass is started by upkeep_task (queued by a thread that made work for upkeep), by upkeep_timer,
   or by the close of the loop. The queued task and the attached place each hold a reference of the
   registry; the timer and the close take one more for their pass. */

#define VKP_I_REGISTRY_BACKLOG 4096 /* default of config.backlog; the system cuts it */
#define VKP_I_REGISTRY_MODE 0600    /* default of config.mode: the user only */
#define VKP_I_UNIQUE_TRIES 8        /* random names to try for a unique path */
#define VKP_I_UNIQUE_PATH_BYTES 512 /* bytes in which a unique path is built */

/* ---- upkeep ---- */

/* Mark the event: on_event is called for it after the unlock. */
static void vkp_i_socket_note_event(vkp_socket *sock, vkp_socket_event event)
{
    if (sock->registry->config.on_event != NULL) {
        sock->flags |= VKP_I_SOCKET_EVENT(event);
    }
}

/* Bind a lost socket again and notify its followers of the new descriptor. PATH.lock may be gone,
   too: then it is created again, which fails if another process holds a new one. */
static vkp_status vkp_i_socket_rebind(vkp_socket *sock)
{
    vkp_i_lock_name name = vkp_i_socket_lock_name(sock);
    vkp_i_follower *follower;
    vkp_file_id found;
    bool cleared = false;
    vkp_status status = VKP_OK;
    if (sock->lock_fd < 0 || sock->registry->sys->identify(name.path, &found) != 0 ||
        !vkp_i_same_file(&found, &sock->lock_id)) {
        vkp_i_socket_unlock(sock, false);
        status = vkp_i_socket_lock(sock);
    }
    VKP_I_STORE_REL(&sock->on_disk, 0u);
    status = status == VKP_OK ? vkp_i_socket_clear(sock, &cleared) : status;
    status = status == VKP_OK ? vkp_i_socket_bind(sock) : status;
    VKP_I_STORE_REL(&sock->on_disk, 1u);
    for (follower = sock->followers; status == VKP_OK && follower != NULL;
         follower = follower->next) {
        vkp_i_follower_notify(follower);
    }
    return status;
}

/* Compare the file at the path with the recorded one, and bind again if it is lost. */
static void vkp_i_socket_check(vkp_socket *sock)
{
    vkp_registry *registry = sock->registry;
    vkp_file_id found;
    vkp_status status;
    int result = registry->sys->identify(sock->path, &found);
    if (result == 0 && vkp_i_same_file(&found, &sock->id)) {
        sock->flags &= ~VKP_I_SOCKET_LOST; /* the file may be back */
        sock->blocked = VKP_OK;
        return;
    }
    if (result < 0 && result != -ENOENT && result != -ENOTDIR) {
        return; /* lstat failed (for example: no permission): the file may be there */
    }
    if ((sock->flags & VKP_I_SOCKET_LOST) == 0) {
        sock->flags |= VKP_I_SOCKET_LOST;
        registry->stats.lost++;
        vkp_i_socket_note_event(sock, VKP_SOCKET_LOST);
    }
    if (!registry->config.rebind) {
        return;
    }
    status = vkp_i_socket_rebind(sock);
    if (status == VKP_OK) {
        sock->flags &= ~VKP_I_SOCKET_LOST;
        registry->stats.rebound++;
        vkp_i_socket_note_event(sock, VKP_SOCKET_REBOUND);
    } else if (status != sock->blocked) {
        vkp_i_socket_note_event(sock, VKP_SOCKET_BLOCKED);
    }
    sock->blocked = status;
}

/* Call on_event for each marked event, without the lock. The search starts again after each call:
   the program may change the map in the callback. LOST is reported first, then BLOCKED, REBOUND. */
static void vkp_i_registry_notify_events(vkp_registry *registry)
{
    for (;;) {
        vkp_i_map_node *node = NULL;
        vkp_socket *sock = NULL;
        uint32_t event = 0;
        vkp_status status = VKP_OK;
        vkp_i_registry_enter(registry);
        while (event == 0 && (node = vkp_i_map_get_next(&registry->sockets, node)) != NULL) {
            sock = VKP_CONTAINER(node, vkp_socket, node);
            for (event = VKP_SOCKET_BLOCKED; event > 0; event--) {
                if ((sock->flags & VKP_I_SOCKET_EVENT(event)) != 0) {
                    break;
                }
            }
            if (event > 0) {
                event = (sock->flags & VKP_I_SOCKET_EVENT(VKP_SOCKET_LOST)) != 0
                            ? (uint32_t)VKP_SOCKET_LOST
                            : event;
                sock->flags &= ~VKP_I_SOCKET_EVENT(event);
                status = event == VKP_SOCKET_BLOCKED ? sock->blocked : VKP_OK;
                if (vkp_i_socket_take(sock, VKP_I_GENERATION(VKP_I_LOAD(&sock->word)), false) !=
                    VKP_OK) {
                    event = 0; /* the socket is ending: its event is dropped */
                }
            }
        }
        vkp_i_registry_leave(registry, true);
        if (event == 0) {
            return;
        }
        registry->config.on_event(registry->config.user, sock, (vkp_socket_event)event, status);
        vkp_socket_unref(sock);
    }
}

static void vkp_i_registry_on_timer(vkp_timer *timer);

/* One pass of upkeep, under the lock. `over`: the loop is closed, every lingering socket ends now.
   Returns when the next pass is due, or VKP_FOREVER. */
static uint64_t vkp_i_registry_do_upkeep(vkp_registry *registry, uint64_t now_ns, bool over)
{
    uint64_t next_ns = VKP_FOREVER;
    bool check = registry->config.check_ms > 0 && !over && now_ns >= registry->next_check_ns;
    vkp_i_map_node *node = NULL;
    if (check) {
        registry->next_check_ns = vkp_i_after_ms(now_ns, registry->config.check_ms);
    }
    while ((node = vkp_i_map_get_next(&registry->sockets, node)) != NULL) {
        vkp_socket *sock = VKP_CONTAINER(node, vkp_socket, node);
        bool lingers = (sock->flags & VKP_I_SOCKET_LINGERS) != 0;
        if (lingers && sock->linger_until_ns == 0) {
            sock->linger_until_ns = vkp_i_after_ms(now_ns, registry->config.linger_ms);
        }
        if (lingers && (over || now_ns >= sock->linger_until_ns)) {
            vkp_i_socket_end(registry, sock, registry->sys->clock_ns());
            continue;
        }
        if (lingers) {
            next_ns = VKP_I_MIN(next_ns, sock->linger_until_ns);
        }
        if (check && (sock->flags & VKP_I_SOCKET_ABSTRACT) == 0) {
            vkp_i_socket_check(sock);
        }
    }
    if (registry->config.check_ms > 0 && !over && registry->sockets.count > 0) {
        next_ns = VKP_I_MIN(next_ns, registry->next_check_ns);
    }
    return next_ns;
}

/* Run a pass and start or stop the timer. Loop's thread; the caller holds a reference of the
   registry. While upkeep_place is attached, it holds another one. */
static void vkp_i_registry_run_upkeep(vkp_registry *registry)
{
    vkp_loop *loop = registry->config.loop;
    uint64_t next_ns;
    vkp_i_registry_enter(registry);
    registry->loop_gone = registry->loop_gone || loop->closed;
    next_ns = vkp_i_registry_do_upkeep(registry, loop->now_ns, registry->loop_gone);
    if (next_ns != VKP_FOREVER && vkp_timer_start(&registry->upkeep_timer, loop,
                                                  vkp_i_registry_on_timer, 0, next_ns) != VKP_OK) {
        /* Without a timer no socket can linger: end them now. */
        next_ns = vkp_i_registry_do_upkeep(registry, loop->now_ns, true);
    }
    if (next_ns != VKP_FOREVER && !registry->upkeep_attached) {
        registry->upkeep_attached = true;
        (void)VKP_I_ADD(&registry->refs, 1);
        vkp_i_loop_attach(loop, &registry->upkeep_place);
    } else if (next_ns == VKP_FOREVER && registry->upkeep_attached) {
        registry->upkeep_attached = false;
        registry->released++;
        vkp_timer_stop(&registry->upkeep_timer);
        vkp_i_loop_detach(&registry->upkeep_place);
    }
    vkp_i_registry_leave(registry, true);
    if (registry->config.on_event != NULL) {
        vkp_i_registry_notify_events(registry);
    }
}

static void vkp_i_registry_on_timer(vkp_timer *timer)
{
    vkp_registry *registry = VKP_CONTAINER(timer, vkp_registry, upkeep_timer);
    (void)VKP_I_ADD(&registry->refs, 1);
    vkp_i_registry_run_upkeep(registry);
    vkp_i_registry_drop(registry, 1);
}

/* upkeep_task: upkeep was requested by vkp_i_registry_request_upkeep. */
static void vkp_i_registry_on_call(vkp_i_task *task)
{
    vkp_registry *registry = VKP_CONTAINER(task, vkp_registry, upkeep_task);
    vkp_i_registry_enter(registry);
    registry->upkeep_queued = false;
    vkp_i_registry_leave(registry, true);
    vkp_i_registry_run_upkeep(registry);
    vkp_i_registry_drop(registry, 1); /* the task's */
}

static void vkp_i_registry_on_loop_close(vkp_i_attached *place)
{
    vkp_registry *registry = VKP_CONTAINER(place, vkp_registry, upkeep_place);
    (void)VKP_I_ADD(&registry->refs, 1);
    vkp_i_registry_run_upkeep(registry); /* loop->closed is true */
    vkp_i_registry_drop(registry, 1);
}

/* ---- the functions of the API ---- */

/* The folder of unique paths: $XDG_RUNTIME_DIR if it belongs to the user, $TMPDIR, or /tmp. */
static const char *vkp_i_default_folder(const vkp_sys *sys)
{
    const char *folder = getenv("XDG_RUNTIME_DIR");
    vkp_file_id id;
    if (folder != NULL && folder[0] == '/' && sys->identify(folder, &id) == 0 &&
        id.uid == sys->user_id()) {
        return folder;
    }
    folder = getenv("TMPDIR");
    return folder != NULL && folder[0] == '/' && sys->identify(folder, &id) == 0 ? folder : "/tmp";
}

VKP_API vkp_status vkp_registry_open(const vkp_registry_config *config, vkp_registry **out)
{
    vkp_registry *registry;
    const vkp_env *env = vkp_i_env(config != NULL ? config->env : NULL);
    VKP_I_REQUIRE(out != NULL);
    VKP_I_REQUIRE(config == NULL || config->loop != NULL ||
                  (config->linger_ms == 0 && config->check_ms == 0));
    registry = (vkp_registry *)vkp_i_alloc_zero(env, sizeof *registry);
    if (registry == NULL) {
        return VKP_ERR_NOMEM;
    }
    registry->env = env;
    registry->sys = vkp_i_sys(env);
    registry->refs = 1;
    if (config != NULL) {
        registry->config = *config;
    }
    if (registry->config.folder.ptr == NULL) {
        registry->config.folder = vkp_str_of(vkp_i_default_folder(registry->sys));
    }
    if (!vkp_i_copy_str(env, &registry->config.folder)) {
        vkp_i_free(env, registry, sizeof *registry);
        return VKP_ERR_NOMEM;
    }
    if (registry->config.backlog <= 0) {
        registry->config.backlog = VKP_I_REGISTRY_BACKLOG;
    }
    if (registry->config.mode == 0) {
        registry->config.mode = VKP_I_REGISTRY_MODE;
    }
    if (registry->config.max_sockets == 0) {
        registry->config.max_sockets = SIZE_MAX;
    }
    if (registry->config.max_references == 0 || registry->config.max_references > VKP_I_MOST_REFS) {
        registry->config.max_references = VKP_I_MOST_REFS;
    }
    if (registry->config.loop != NULL) {
        (void)vkp_loop_ref(registry->config.loop);
    }
    registry->upkeep_task.fn = vkp_i_registry_on_call;
    registry->upkeep_place.on_loop_close = vkp_i_registry_on_loop_close;
    VKP_I_MUTEX_INIT(&registry->mutex);
    vkp_i_map_init(&registry->sockets, env);
    registry->sockets.shared = true;
    *out = registry;
    return VKP_OK;
}

VKP_API vkp_registry *vkp_registry_ref(vkp_registry *registry)
{
    (void)VKP_I_ADD(&registry->refs, 1);
    return registry;
}

VKP_API void vkp_registry_unref(vkp_registry *registry)
{
    if (registry != NULL) {
        vkp_i_registry_drop(registry, 1);
    }
}

VKP_API void vkp_registry_get_stats(vkp_registry *registry, vkp_registry_stats *stats)
{
    vkp_i_map_node *node = NULL;
    vkp_i_registry_enter(registry);
    *stats = registry->stats;
    stats->live = registry->sockets.count;
    stats->references = 0;
    while ((node = vkp_i_map_get_next(&registry->sockets, node)) != NULL) {
        stats->references += vkp_socket_get_ref_count(VKP_CONTAINER(node, vkp_socket, node));
    }
    vkp_i_registry_leave(registry, true);
}

VKP_API size_t vkp_registry_get_count(vkp_registry *registry)
{
    size_t count;
    vkp_i_registry_enter(registry);
    count = registry->sockets.count;
    vkp_i_registry_leave(registry, true);
    return count;
}

VKP_API bool vkp_registry_is_active(vkp_registry *registry, vkp_str path)
{
    vkp_i_name name;
    vkp_socket *sock;
    name.text = path.ptr;
    name.len = path.len;
    name.abstract = false; /* not used by the search */
    vkp_i_registry_enter(registry);
    sock = vkp_i_registry_find(registry, name);
    vkp_i_registry_leave(registry, true);
    return sock != NULL;
}

VKP_API size_t vkp_registry_cleanup_all(vkp_registry *registry)
{
    size_t count = 0;
    vkp_i_map_node *node;
    uint64_t now_ns;
    vkp_i_registry_enter(registry);
    now_ns = registry->sys->clock_ns();
    while ((node = vkp_i_map_get_next(&registry->sockets, NULL)) != NULL) {
        vkp_socket *sock = VKP_CONTAINER(node, vkp_socket, node);
        bool lingers = (sock->flags & VKP_I_SOCKET_LINGERS) != 0;
        (void)vkp_i_socket_retire(sock, now_ns);
        if (lingers) {
            vkp_i_socket_recycle(registry, sock);
        }
        count++;
    }
    vkp_i_registry_leave(registry, true);
    return count;
}

VKP_API void vkp_registry_unlink_all(vkp_registry *registry)
{
    const vkp_sys *sys = registry->sys;
    int error = errno;
    vkp_socket *sock;
    for (sock = VKP_I_LOAD_ACQ(&registry->all); sock != NULL; sock = sock->all) {
        if (VKP_I_LOAD_ACQ(&sock->on_disk) != 0 && sock->opener_pid == sys->process_id()) {
            vkp_i_lock_name name = vkp_i_socket_lock_name(sock);
            (void)vkp_i_unlink_same(sys, sock->path, &sock->id);
            (void)vkp_i_unlink_same(sys, name.path, &sock->lock_id);
        }
    }
    errno = error;
}

/* A reference to the socket of the path; `create`: make one if there is none. */
static vkp_status vkp_i_registry_get(vkp_registry *registry, vkp_str text, bool create,
                                     vkp_socket **out)
{
    vkp_i_name name;
    vkp_socket *sock = NULL;
    vkp_status status = VKP_OK;
    if (text.len > 0) {
        sock = vkp_i_registry_peek(registry, text); /* a path in the map is valid */
    }
    if (sock == NULL) {
        status = vkp_i_name_of(registry->env, text, registry->config.abstract_names, &name);
        if (status != VKP_OK) {
            return status;
        }
        vkp_i_registry_enter(registry);
        status = vkp_i_registry_take(registry, name, &sock);
        if (status == VKP_ERR_NOT_FOUND && create) {
            status = vkp_i_socket_create(registry, name, -1, &sock);
        }
        vkp_i_registry_leave(registry, true);
    }
    if (status == VKP_OK) {
        *out = sock;
    }
    return status;
}

/* Create a socket with a random name in the registry's folder; if it is in use, try another. */
static vkp_status vkp_i_registry_get_unique(vkp_registry *registry, vkp_socket **out)
{
    vkp_status status = VKP_ERR_IN_USE;
    int i;
    for (i = 0; i < VKP_I_UNIQUE_TRIES && (status == VKP_ERR_IN_USE || status == VKP_ERR_EXISTS);
         i++) {
        char text[VKP_I_UNIQUE_PATH_BYTES];
        vkp_i_name name;
        int len = snprintf(text, sizeof text, "%.*s/vkp-%d-%08lx.sock",
                           VKP_FMT(registry->config.folder), registry->sys->process_id(),
                           (unsigned long)(registry->sys->random_u64() & 0xffffffffu));
        status = len < 0 || (size_t)len >= sizeof text
                     ? VKP_ERR_LIMIT
                     : vkp_i_name_of(registry->env, vkp_i_str(text, (size_t)len), false, &name);
        if (status == VKP_OK) {
            vkp_i_registry_enter(registry);
            status = vkp_i_registry_find(registry, name) != NULL
                         ? VKP_ERR_EXISTS
                         : vkp_i_socket_create(registry, name, -1, out);
            vkp_i_registry_leave(registry, true);
        }
    }
    return status;
}

VKP_API vkp_status vkp_socket_open(vkp_registry *registry, vkp_str path, vkp_socket **out)
{
    VKP_I_REQUIRE(registry != NULL && out != NULL);
    return path.ptr != NULL ? vkp_i_registry_get(registry, path, true, out)
                            : vkp_i_registry_get_unique(registry, out);
}

VKP_API vkp_status vkp_socket_find(vkp_registry *registry, vkp_str path, vkp_socket **out)
{
    VKP_I_REQUIRE(registry != NULL && out != NULL && path.ptr != NULL);
    return vkp_i_registry_get(registry, path, false, out);
}

VKP_API vkp_status vkp_socket_adopt(vkp_registry *registry, vkp_str path, int fd, vkp_socket **out)
{
    vkp_i_name name;
    vkp_socket *sock = NULL;
    vkp_status status;
    VKP_I_REQUIRE(registry != NULL && out != NULL && path.ptr != NULL && fd >= 0);
    status = vkp_i_name_of(registry->env, path, registry->config.abstract_names, &name);
    if (status == VKP_OK && name.abstract) {
        status = VKP_ERR_UNSUPPORTED;
    }
    if (status != VKP_OK) {
        return status;
    }
    vkp_i_registry_enter(registry);
    status = vkp_i_registry_take(registry, name, &sock);
    if (status == VKP_ERR_NOT_FOUND) {
        status = vkp_i_socket_create(registry, name, fd, out);
    } else if (status == VKP_OK || status == VKP_ERR_LIMIT) {
        status = VKP_ERR_EXISTS;
    }
    vkp_i_registry_leave(registry, true);
    vkp_socket_unref(sock);
    return status;
}

/* ---- pools ---- */

struct vkp_socket_pool {
    vkp_registry *registry;
    size_t refs;          /* atomic */
    size_t turn;          /* atomic: counts the picks; each search starts at the next socket */
    vkp_balance balance;  /* constant, as are the members below */
    size_t capacity;      /* sockets that the memory was allocated for */
    size_t count;         /* sockets that are open */
    vkp_socket **sockets; /* in the same allocation, behind this struct */
};

VKP_API vkp_socket_pool *vkp_socket_pool_ref(vkp_socket_pool *pool)
{
    (void)VKP_I_ADD(&pool->refs, 1);
    return pool;
}

VKP_API void vkp_socket_pool_unref(vkp_socket_pool *pool)
{
    if (pool != NULL && VKP_I_UNREF(&pool->refs) == 1) {
        vkp_registry *registry = pool->registry;
        while (pool->count > 0) {
            vkp_socket_unref(pool->sockets[--pool->count]);
        }
        vkp_i_free(registry->env, pool, sizeof *pool + pool->capacity * sizeof *pool->sockets);
        vkp_registry_unref(registry);
    }
}

VKP_API vkp_status vkp_socket_pool_open(const vkp_socket_pool_config *config, vkp_socket_pool **out)
{
    vkp_socket_pool *pool;
    vkp_status status = VKP_OK;
    VKP_I_REQUIRE(config != NULL && out != NULL && config->registry != NULL && config->count > 0);
    if (config->count > (SIZE_MAX - sizeof *pool) / sizeof *pool->sockets) {
        return VKP_ERR_NOMEM;
    }
    pool = (vkp_socket_pool *)vkp_i_alloc_zero(
        config->registry->env, sizeof *pool + config->count * sizeof *pool->sockets);
    if (pool == NULL) {
        return VKP_ERR_NOMEM;
    }
    pool->registry = vkp_registry_ref(config->registry);
    pool->refs = 1;
    pool->balance = config->balance;
    pool->capacity = config->count;
    pool->sockets = (vkp_socket **)(void *)(pool + 1);
    while (pool->count < pool->capacity && status == VKP_OK) {
        vkp_str path = config->paths != NULL ? config->paths[pool->count] : vkp_i_str(NULL, 0);
        status = vkp_socket_open(pool->registry, path, &pool->sockets[pool->count]);
        pool->count += status == VKP_OK ? 1u : 0u;
    }
    if (status != VKP_OK) {
        int error = errno;
        vkp_socket_pool_unref(pool);
        errno = error;
        return status;
    }
    *out = pool;
    return VKP_OK;
}

VKP_API vkp_status vkp_socket_pool_pick(vkp_socket_pool *pool, vkp_socket **out)
{
    vkp_status status = VKP_ERR_CLOSED;
    vkp_socket *best = NULL;
    size_t least = SIZE_MAX;
    size_t start;
    size_t i;
    VKP_I_REQUIRE(pool != NULL && out != NULL);
    start = VKP_I_ADD(&pool->turn, 1);
    for (i = 0; i < pool->count && least > 0; i++) {
        vkp_socket *each = pool->sockets[(start + i) % pool->count];
        size_t load = vkp_socket_get_ref_count(each);
        if (!vkp_socket_is_active(each) || load >= least) {
            continue;
        }
        status = load < each->registry->config.max_references ? VKP_OK : VKP_ERR_LIMIT;
        if (status == VKP_OK) {
            best = each;
            least = pool->balance == VKP_BALANCE_TURN ? 0 : load;
        }
    }
    if (best != NULL) {
        best = vkp_socket_ref(best);
        status = best != NULL ? VKP_OK : VKP_ERR_LIMIT;
    }
    if (status == VKP_OK) {
        *out = best;
    }
    return status;
}

VKP_API size_t vkp_socket_pool_get_count(const vkp_socket_pool *pool)
{
    return pool->count;
}

VKP_API vkp_socket *vkp_socket_pool_get_socket(const vkp_socket_pool *pool, size_t index)
{
    return pool->sockets[index];
}

#endif /* VKP_I_IO */
