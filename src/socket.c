#if VKP_I_IO
/* ======================================================================================
   >>impl-socket   Ref-counted Unix sockets
   ======================================================================================
   A socket is a slot of its registry: its memory is used again for other sockets, and freed with
   the registry only. So weak handles, and look-ups by name, may look at any slot at any time: one
   atomic word says which life of the slot this is, and how many refer to it, and whoever got a
   reference from it knows that the rest of the slot stays.

   The last unref must clean up and may not wait. It takes the count to 0 and the DUTY of the burial
   in one step, so that nobody else does both. The registry's lock is the word `held`; whoever may
   wait stands in line at the mutex before it. The burial only tries the word. Where it is taken
   the slot goes on the list of corpses, which the holder looks at after it let go: either he finds
   the corpse, or the burial's second try finds the word free.
   Who looks for a path and finds a slot whose count is 0 buries it himself and makes a new one in
   another slot; whose duty it was finds it DEAD, and only gives the slot back. A path's next
   socket is thus never touched by the end of the one before.

   Under the lock there are map, files and counters; descriptors are closed, messages logged and
   callbacks called after it. A descriptor is an endpoint with a count of its own: a loop that
   watches it keeps it open, whoever ended the socket.

   On disk: PATH.lock is created and flocked first, removed last, so that between processes the
   lock tells who lives; PATH is bound, given its mode, and only then set listening, so that
   nobody connects before. A file is unlinked only while device and inode are those recorded.  */

#define VKP_I_REFS ((uint64_t)0x3fffffff) /* of the word: how many refer to it */
#define VKP_I_MOST_REFS ((size_t)1 << 29) /* far from the next bit: ref adds before it looks */
#define VKP_I_DEAD ((uint64_t)1 << 30)    /* retired: inactive for good */
#define VKP_I_CLEANUP ((uint64_t)1 << 31) /* somebody is about to bury it */
#define VKP_I_GENERATION(word) ((uint32_t)((word) >> 32))

#define VKP_I_PATH_BYTES (sizeof(((struct sockaddr_un *)NULL)->sun_path) + 1) /* with an end */

typedef struct vkp_i_endpoint {
    struct vkp_i_endpoint *next; /* of those that wait for their close */
    const vkp_env *env;
    size_t refs; /* atomic: the socket's, and one per listener that watches it */
    int fd;
} vkp_i_endpoint;

/* A listener's place with its socket; guarded by the registry. */
typedef struct vkp_i_follower {
    struct vkp_i_follower *next;
    vkp_socket *sock; /* NULL: not, or no longer, with it */
    vkp_loop *loop;
    vkp_i_task task; /* tells the listener that its socket ended, or has another descriptor */
    bool queued;
} vkp_i_follower;

#define VKP_I_SOCKET_ABSTRACT 1u /* flags */
#define VKP_I_SOCKET_LINGERS 2u
#define VKP_I_SOCKET_LOST 4u
#define VKP_I_SOCKET_EVENT(event) (8u << (event)) /* to be told */

struct vkp_socket {
    vkp_i_map_node node; /* key: path */
    uint64_t word;       /* atomic */
    vkp_registry *registry;
    vkp_socket *all;   /* the registry's slots, linked for good */
    vkp_socket *link;  /* of corpses, or of free slots */
    uint64_t ended_ns; /* of him who has the duty */
    /* Guarded: */
    vkp_i_endpoint *endpoint; /* NULL once retired */
    vkp_i_follower *followers;
    uint64_t linger_until_ns; /* on the loop's clock; 0: not yet known */
    uint32_t flags;
    vkp_status blocked; /* why it was not bound again */
    int lock_fd;
    /* Read by vkp_registry_unlink_all, too: */
    uint32_t on_disk; /* atomic: path and ids hold */
    int opener_pid;
    vkp_file_id id;
    vkp_file_id lock_id;
    char path[VKP_I_PATH_BYTES];
};

struct vkp_registry {
    const vkp_env *env;
    const vkp_sys *sys;
    size_t refs; /* atomic: the program's, the live sockets', those of work under way */
    vkp_registry_config config; /* its folder is a copy */
    VKP_I_MUTEX mutex;          /* the line before `held` */
    uint32_t held;              /* atomic */
    vkp_socket *corpses;        /* atomic */
    vkp_socket *all;            /* atomic, newest first */
    /* Guarded by `held`: */
    vkp_i_map sockets;
    vkp_socket *spare;
    vkp_i_endpoint *to_close; /* when the lock is off */
    size_t released;          /* references to drop then */
    bool noted;               /* there is a note to log then */
    vkp_log_level note_level;
    char note[256];
    vkp_registry_stats stats;
    /* Of the loop's timer, guarded too; timer and place belong to its thread. */
    bool upkeep_queued;
    bool upkeep_attached;
    bool loop_gone;
    uint64_t next_check_ns;
    vkp_i_task upkeep_task;
    vkp_timer upkeep_timer;
    vkp_i_attached upkeep_place;
};

static vkp_i_name vkp_i_socket_name(const vkp_socket *sock)
{
    vkp_i_name name;
    name.text = sock->path;
    name.len = sock->node.key.len;
    name.abstract = (sock->flags & VKP_I_SOCKET_ABSTRACT) != 0;
    return name;
}

typedef struct vkp_i_lock_name {
    char path[VKP_I_PATH_BYTES + 8];
} vkp_i_lock_name;

static vkp_i_lock_name vkp_i_socket_lock_name(const vkp_socket *sock)
{
    static const char suffix[] = ".lock";
    vkp_i_lock_name name;
    size_t len = strlen(sock->path);
    memcpy(name.path, sock->path, len); /* no snprintf: a signal handler comes here, too */
    memcpy(name.path + len, suffix, sizeof suffix);
    return name;
}

/* ---- the registry's lock, and what follows when it is off ---- */

static vkp_i_endpoint *vkp_i_endpoint_open(const vkp_env *env, int fd)
{
    vkp_i_endpoint *endpoint = (vkp_i_endpoint *)vkp_i_alloc_zero(env, sizeof *endpoint);
    if (endpoint != NULL) {
        endpoint->env = env;
        endpoint->refs = 1;
        endpoint->fd = fd;
    }
    return endpoint;
}

static vkp_i_endpoint *vkp_i_endpoint_ref(vkp_i_endpoint *endpoint)
{
    (void)VKP_I_ADD(&endpoint->refs, 1);
    return endpoint;
}

static void vkp_i_endpoint_unref(vkp_i_endpoint *endpoint)
{
    if (endpoint != NULL && VKP_I_UNREF(&endpoint->refs) == 1) {
        (void)vkp_i_sys(endpoint->env)->close(endpoint->fd);
        vkp_i_free(endpoint->env, endpoint, sizeof *endpoint);
    }
}

static void vkp_i_registry_free(vkp_registry *registry)
{
    vkp_loop *loop = registry->config.loop;
    while (registry->all != NULL) {
        vkp_socket *sock = registry->all;
        registry->all = sock->all;
        vkp_i_free(registry->env, sock, sizeof *sock);
    }
    vkp_i_map_deinit(&registry->sockets);
    VKP_I_MUTEX_DEINIT(&registry->mutex);
    vkp_i_free_str(registry->env, registry->config.folder);
    vkp_i_free(registry->env, registry, sizeof *registry);
    vkp_loop_unref(loop);
}

static void vkp_i_registry_drop(vkp_registry *registry, size_t count)
{
    if (count > 0 && VKP_I_SUB_ACQ_REL(&registry->refs, count) == count) {
        vkp_i_registry_free(registry);
    }
}

__attribute__((format(printf, 3, 4))) static void
vkp_i_registry_note(vkp_registry *registry, vkp_log_level level, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    registry->noted = true;
    registry->note_level = level;
    (void)vsnprintf(registry->note, sizeof registry->note, format, arguments);
    va_end(arguments);
}

static void vkp_i_registry_dispose_all(vkp_registry *registry);

static void vkp_i_registry_enter(vkp_registry *registry)
{
    VKP_I_LOCK(&registry->mutex);
    vkp_i_latch_lock(&registry->held, registry->sys);
    vkp_i_registry_dispose_all(registry);
}

static bool vkp_i_registry_try_enter(vkp_registry *registry)
{
    return VKP_I_XCHG(&registry->held, 1u) == 0;
}

/* The caller has a reference of the registry. `in_line`: came through vkp_i_registry_enter.
   Keeps errno.                                                                                */
static void vkp_i_registry_leave(vkp_registry *registry, bool in_line)
{
    int error = errno;
    size_t released = 0;
    vkp_i_endpoint *to_close = NULL;
    vkp_log_level level = VKP_LOG_DEFAULT;
    char note[sizeof registry->note];
    note[0] = '\0';
    do {
        vkp_i_registry_dispose_all(registry);
        while (registry->to_close != NULL) {
            vkp_i_endpoint *each = registry->to_close;
            registry->to_close = each->next;
            each->next = to_close;
            to_close = each;
        }
        released += registry->released;
        registry->released = 0;
        if (registry->noted) {
            level = registry->note_level;
            memcpy(note, registry->note, sizeof note);
            registry->noted = false;
        }
        (void)VKP_I_XCHG(&registry->held, 0u);
    } while (VKP_I_LOAD_ACQ(&registry->corpses) != NULL && vkp_i_registry_try_enter(registry));
    if (in_line) {
        VKP_I_UNLOCK(&registry->mutex);
    }
    while (to_close != NULL) {
        vkp_i_endpoint *next = to_close->next;
        vkp_i_endpoint_unref(to_close);
        to_close = next;
    }
    if (level != VKP_LOG_DEFAULT) {
        vkp_i_log(registry->env, level, "%s", note);
    }
    vkp_i_registry_drop(registry, released);
    errno = error;
}

/* ---- references ---- */

/* One more of this life of the slot. `locked` callers bring back those that linger.
   NOT_FOUND: it ended; LIMIT.                                                                 */
static vkp_status vkp_i_socket_take(vkp_socket *sock, uint32_t generation, bool locked)
{
    vkp_registry *registry = sock->registry;
    uint64_t word = VKP_I_LOAD_ACQ(&sock->word);
    do {
        if (VKP_I_GENERATION(word) != generation || (word & VKP_I_DEAD) != 0 ||
            ((word & VKP_I_REFS) == 0 && !(locked && registry->config.linger_ms > 0))) {
            return VKP_ERR_NOT_FOUND;
        }
        if ((word & VKP_I_REFS) >= registry->config.max_references) {
            return VKP_ERR_LIMIT;
        }
    } while (!VKP_I_CAS(&sock->word, &word, word + 1));
    if (locked && (word & VKP_I_REFS) == 0) {
        sock->flags &= ~VKP_I_SOCKET_LINGERS;
        registry->stats.revived++;
    }
    return VKP_OK;
}

/* It was not there at once: does it linger? By itself, so that who finds it at once saves no
   registers for this.                                                                         */
static __attribute__((noinline)) vkp_status
vkp_i_socket_take_lingering(vkp_socket *sock, uint32_t generation, vkp_socket **out)
{
    vkp_status status = VKP_ERR_NOT_FOUND;
    if (sock->registry->config.linger_ms > 0 &&
        VKP_I_GENERATION(VKP_I_LOAD(&sock->word)) == generation) {
        vkp_i_registry_enter(sock->registry);
        status = vkp_i_socket_take(sock, generation, true);
        vkp_i_registry_leave(sock->registry, true);
    }
    if (status == VKP_OK) {
        *out = sock;
    }
    return status;
}

/* The same for those who hold no lock. */
static vkp_status vkp_i_socket_take_weak(vkp_socket *sock, uint32_t generation, vkp_socket **out)
{
    vkp_status status = vkp_i_socket_take(sock, generation, false);
    if (status == VKP_ERR_NOT_FOUND) {
        return vkp_i_socket_take_lingering(sock, generation, out);
    }
    if (status == VKP_OK) {
        *out = sock;
    }
    return status;
}

VKP_API vkp_socket *vkp_socket_ref(vkp_socket *sock)
{
    uint64_t word = VKP_I_ADD(&sock->word, (uint64_t)1);
    if ((word & VKP_I_REFS) < sock->registry->config.max_references) {
        return sock;
    }
    (void)VKP_I_SUB(&sock->word, (uint64_t)1); /* not the last: the caller has one */
    return NULL;
}

static void vkp_i_socket_dispose(vkp_registry *registry, vkp_socket *sock);

VKP_API void vkp_socket_unref(vkp_socket *sock)
{
    vkp_registry *registry;
    uint64_t word;
    uint64_t less;
    if (sock == NULL) {
        return;
    }
    word = VKP_I_LOAD(&sock->word);
    do {
        less = (word & VKP_I_REFS) > 1 ? word - 1 : (word - 1) | VKP_I_CLEANUP;
    } while (!VKP_I_CAS(&sock->word, &word, less));
    if ((less & VKP_I_REFS) > 0 || (word & VKP_I_CLEANUP) != 0) {
        return; /* others refer to it, or its burial is under way, which will see this */
    }
    registry = sock->registry;
    sock->ended_ns = registry->sys->clock_ns();
    (void)VKP_I_ADD(&registry->refs, 1); /* whoever buries a corpse drops the socket's own */
    if (vkp_i_registry_try_enter(registry)) {
        vkp_i_socket_dispose(registry, sock);
        vkp_i_registry_leave(registry, false);
    } else {
        sock->link = VKP_I_LOAD(&registry->corpses);
        while (!VKP_I_CAS(&registry->corpses, &sock->link, sock)) {
        }
        if (vkp_i_registry_try_enter(registry)) {
            vkp_i_registry_leave(registry, false);
        }
    }
    vkp_i_registry_drop(registry, 1);
}

VKP_API vkp_weak_socket vkp_socket_downgrade(const vkp_socket *sock)
{
    vkp_weak_socket weak;
    memcpy(&weak.i_socket, &sock, sizeof sock); /* drops const */
    weak.i_generation = VKP_I_GENERATION(VKP_I_LOAD(&sock->word));
    return weak;
}

VKP_API vkp_status vkp_socket_upgrade(const vkp_weak_socket *weak, vkp_socket **out)
{
    VKP_I_REQUIRE(weak != NULL && out != NULL);
    return weak->i_socket != NULL ? vkp_i_socket_take_weak(weak->i_socket, weak->i_generation, out)
                                  : VKP_ERR_NOT_FOUND;
}

VKP_API const char *vkp_socket_get_path(const vkp_socket *sock)
{
    return sock->path;
}

VKP_API bool vkp_socket_is_active(const vkp_socket *sock)
{
    return (VKP_I_LOAD_ACQ(&sock->word) & VKP_I_DEAD) == 0;
}

VKP_API size_t vkp_socket_get_ref_count(const vkp_socket *sock)
{
    return (size_t)(VKP_I_LOAD(&sock->word) & VKP_I_REFS);
}

/* ---- the end of a socket; all of it under the lock ---- */

static bool vkp_i_same_file(const vkp_file_id *a, const vkp_file_id *b)
{
    return a->device == b->device && a->inode == b->inode;
}

/* Remove the file while it is the one recorded: 0, or a negated errno. */
static int vkp_i_unlink_same(const vkp_sys *sys, const char *path, const vkp_file_id *id)
{
    vkp_file_id found;
    int result = sys->identify(path, &found);
    if (result == 0 && vkp_i_same_file(&found, id)) {
        result = sys->unlink(path);
    }
    return result == -ENOENT ? 0 : result; /* gone, or not ours */
}

static void vkp_i_registry_remove(vkp_registry *registry, const char *path, const vkp_file_id *id)
{
    int result = vkp_i_unlink_same(registry->sys, path, id);
    if (result < 0) {
        registry->stats.unlink_failures++;
        registry->stats.unlink_errno = -result;
        vkp_i_registry_note(registry, VKP_LOG_WARN, "%s: not removed: %s", path, strerror(-result));
    }
}

static void vkp_i_socket_unlock(vkp_socket *sock, bool unlink)
{
    const vkp_sys *sys = sock->registry->sys;
    if (sock->lock_fd >= 0) {
        if (unlink) {
            vkp_i_lock_name name = vkp_i_socket_lock_name(sock);
            vkp_i_registry_remove(sock->registry, name.path, &sock->lock_id);
        }
        (void)sys->close(sock->lock_fd);
        sock->lock_fd = -1;
        memset(&sock->lock_id, 0, sizeof sock->lock_id); /* its inode may be another file's next */
    }
}

/* An abstract name is free when its descriptor is closed, so that must not wait. */
static void vkp_i_socket_detach(vkp_socket *sock)
{
    vkp_registry *registry = sock->registry;
    vkp_i_endpoint *endpoint = sock->endpoint;
    sock->endpoint = NULL;
    if (endpoint != NULL && (sock->flags & VKP_I_SOCKET_ABSTRACT) != 0) {
        vkp_i_endpoint_unref(endpoint);
    } else if (endpoint != NULL) {
        endpoint->next = registry->to_close;
        registry->to_close = endpoint;
    }
}

static void vkp_i_follower_notify(vkp_i_follower *follower)
{
    if (!follower->queued) {
        follower->queued = vkp_i_loop_queue(follower->loop, &follower->task);
    }
}

/* Make it inactive, take it off the map, remove the file if it is still ours, then the lock file.
   `since`: when that was called for. False: it was done before.                               */
static bool vkp_i_socket_retire(vkp_socket *sock, uint64_t since_ns)
{
    vkp_registry *registry = sock->registry;
    const vkp_sys *sys = registry->sys;
    bool ours = sys->process_id() == sock->opener_pid; /* else forked: the files are the parent's */
    uint64_t now;
    if ((VKP_I_OR(&sock->word, VKP_I_DEAD) & VKP_I_DEAD) != 0) {
        return false;
    }
    VKP_I_STORE_REL(&sock->on_disk, 0u);
    vkp_i_map_remove(&registry->sockets, &sock->node);
    registry->stats.ended++;
    while (sock->followers != NULL) {
        vkp_i_follower *follower = sock->followers;
        sock->followers = follower->next;
        follower->sock = NULL;
        if (ours) {
            vkp_i_follower_notify(follower);
        }
    }
    if (ours && (sock->flags & VKP_I_SOCKET_ABSTRACT) == 0) {
        vkp_i_registry_remove(registry, sock->path, &sock->id);
    }
    vkp_i_socket_unlock(sock, ours);
    vkp_i_socket_detach(sock);
    now = sys->clock_ns();
    registry->stats.cleanup_last_ns = now > since_ns ? now - since_ns : 0;
    registry->stats.cleanup_total_ns += registry->stats.cleanup_last_ns;
    registry->stats.cleanup_most_ns =
        VKP_I_MAX(registry->stats.cleanup_most_ns, registry->stats.cleanup_last_ns);
    return true;
}

/* Nobody refers to it: the slot's next life may begin. A slot whose generations are used up has
   none: old weak handles would take it for theirs.                                            */
static void vkp_i_socket_recycle(vkp_registry *registry, vkp_socket *sock)
{
    uint32_t generation = VKP_I_GENERATION(VKP_I_LOAD(&sock->word)) + 1;
    VKP_I_STORE_REL(&sock->word, (uint64_t)generation << 32);
    if (generation != 0) {
        sock->link = registry->spare;
        registry->spare = sock;
    }
    registry->released++;
}

static void vkp_i_socket_end(vkp_registry *registry, vkp_socket *sock, uint64_t since_ns)
{
    (void)vkp_i_socket_retire(sock, since_ns);
    vkp_i_socket_recycle(registry, sock);
}

/* Have it look soon. False: there is no loop any more. */
static bool vkp_i_registry_request_upkeep(vkp_registry *registry)
{
    if (!registry->upkeep_queued && !registry->loop_gone) {
        registry->upkeep_queued = vkp_i_loop_queue(registry->config.loop, &registry->upkeep_task);
        registry->loop_gone = !registry->upkeep_queued;
        if (registry->upkeep_queued) {
            (void)VKP_I_ADD(&registry->refs, 1);
        }
    }
    return !registry->loop_gone;
}

/* With the first socket, and again if there was no memory for the timer then. */
static void vkp_i_registry_ensure_checks(vkp_registry *registry)
{
    if (registry->config.check_ms > 0 && !registry->upkeep_attached) {
        (void)vkp_i_registry_request_upkeep(registry);
    }
}

/* The duty is the caller's. */
static void vkp_i_socket_dispose(vkp_registry *registry, vkp_socket *sock)
{
    uint64_t word = VKP_I_LOAD_ACQ(&sock->word);
    bool lingers = false;
    vkp_i_registry_ensure_checks(registry);
    do {
        if ((word & VKP_I_REFS) == 0) {
            lingers = (word & VKP_I_DEAD) == 0 && registry->config.linger_ms > 0 &&
                      registry->sys->process_id() == sock->opener_pid &&
                      vkp_i_registry_request_upkeep(registry);
            if (!lingers) {
                vkp_i_socket_end(registry, sock, sock->ended_ns);
                return;
            }
        }
    } while (!VKP_I_CAS(&sock->word, &word, word & ~VKP_I_CLEANUP));
    if (lingers) {
        sock->flags |= VKP_I_SOCKET_LINGERS;
        sock->linger_until_ns = 0;
    }
}

static void vkp_i_registry_dispose_all(vkp_registry *registry)
{
    vkp_socket *corpse = NULL;
    if (VKP_I_LOAD_ACQ(&registry->corpses) != NULL) {
        corpse = VKP_I_XCHG(&registry->corpses, (vkp_socket *)NULL);
    }
    while (corpse != NULL) {
        vkp_socket *next = corpse->link;
        uint64_t ended = registry->stats.ended;
        vkp_i_socket_dispose(registry, corpse);
        registry->stats.handed_over += registry->stats.ended - ended; /* it may linger instead */
        corpse = next;
    }
}

/* ---- the beginning of a socket; all of it under the lock ---- */

/* Whether somebody answers at the path: 1 yes, 0 no, or a negated errno. */
static int vkp_i_socket_probe(const vkp_sys *sys, vkp_i_name name)
{
    vkp_address address = vkp_i_unix_address(name);
    int fd = sys->socket(AF_UNIX, SOCK_STREAM);
    int result;
    if (fd < 0) {
        return fd;
    }
    result = sys->connect(fd, address.storage.bytes, address.bytes);
    (void)sys->close(fd);
    return result == -ECONNREFUSED || result == -ENOENT ? 0 : 1;
}

/* PATH.lock is ours: make way for a bind, or say what stands there. */
static vkp_status vkp_i_socket_clear(vkp_socket *sock, bool *cleared)
{
    vkp_registry *registry = sock->registry;
    const vkp_sys *sys = registry->sys;
    vkp_file_id found;
    int result = sys->identify(sock->path, &found);
    if (result == -ENOENT) {
        return VKP_OK;
    }
    if (result < 0) {
        return vkp_i_sys_failure(result);
    }
    if (!found.is_socket || found.uid != sys->user_id()) {
        vkp_i_registry_note(registry, VKP_LOG_ERROR, "%s: something that is no socket of this user",
                            sock->path);
        return VKP_ERR_EXISTS;
    }
    result = vkp_i_socket_probe(sys, vkp_i_socket_name(sock));
    if (result != 0) {
        return result < 0 ? vkp_i_sys_failure(result) : VKP_ERR_IN_USE;
    }
    result = vkp_i_unlink_same(sys, sock->path, &found);
    if (result < 0) {
        return vkp_i_sys_failure(result);
    }
    *cleared = true;
    vkp_i_registry_note(registry, VKP_LOG_INFO, "%s: taken over from a process that is gone",
                        sock->path);
    return VKP_OK;
}

/* Give the file its mode, then listen: the order that lets nobody in before. */
static int vkp_i_socket_start(vkp_socket *sock, int fd, vkp_file_id *id)
{
    const vkp_registry *registry = sock->registry;
    const vkp_sys *sys = registry->sys;
    int result = 0;
    if ((sock->flags & VKP_I_SOCKET_ABSTRACT) == 0) {
        result = sys->identify(sock->path, id);
        if (result == 0 && id->mode != registry->config.mode) {
            result = sys->chmod(sock->path, registry->config.mode);
        }
    }
    return result == 0 ? sys->listen(fd, registry->config.backlog) : result;
}

/* Bind, and listen: another endpoint in place of the one there was. */
static vkp_status vkp_i_socket_bind(vkp_socket *sock)
{
    vkp_registry *registry = sock->registry;
    const vkp_sys *sys = registry->sys;
    vkp_address address = vkp_i_unix_address(vkp_i_socket_name(sock));
    vkp_i_endpoint *endpoint = NULL;
    vkp_file_id id;
    int fd = sys->socket(AF_UNIX, SOCK_STREAM);
    int result = fd;
    memset(&id, 0, sizeof id);
    if (fd >= 0) {
        endpoint = vkp_i_endpoint_open(registry->env, fd);
        result = endpoint == NULL
                     ? -ENOMEM
                     : sys->bind(fd, address.storage.bytes, address.bytes, registry->config.mode);
    }
    if (result == 0) {
        result = vkp_i_socket_start(sock, fd, &id);
        if (result < 0 && (id.is_socket || sys->identify(sock->path, &id) == 0)) {
            (void)vkp_i_unlink_same(sys, sock->path, &id);
        }
    }
    if (result < 0) {
        if (endpoint != NULL) {
            vkp_i_endpoint_unref(endpoint);
        } else if (fd >= 0) {
            (void)sys->close(fd);
        }
        return result == -EADDRINUSE || result == -EEXIST ? VKP_ERR_IN_USE
                                                          : vkp_i_sys_failure(result);
    }
    vkp_i_socket_detach(sock);
    sock->endpoint = endpoint;
    sock->id = id;
    return VKP_OK;
}

/* Get PATH.lock. */
static vkp_status vkp_i_socket_lock(vkp_socket *sock)
{
    vkp_registry *registry = sock->registry;
    vkp_i_lock_name name = vkp_i_socket_lock_name(sock);
    int result = registry->sys->lock_file(name.path, &sock->lock_id);
    if (result >= 0) {
        sock->lock_fd = result;
        return VKP_OK;
    }
    if (result == -EWOULDBLOCK) {
        vkp_i_registry_note(registry, VKP_LOG_ERROR, "%s: another process serves it", sock->path);
        return VKP_ERR_IN_USE;
    }
    vkp_i_registry_note(registry, VKP_LOG_ERROR, "%s: %s", name.path, strerror(-result));
    return result == -ELOOP ? VKP_ERR_EXISTS : vkp_i_sys_failure(result);
}

/* Take over what the caller bound. */
static vkp_status vkp_i_socket_adopt(vkp_socket *sock, int fd)
{
    vkp_registry *registry = sock->registry;
    int result = registry->sys->identify(sock->path, &sock->id);
    VKP_I_REQUIRE(result == 0 && sock->id.is_socket);
    result = registry->sys->prepare(fd); /* a blocking one would stop a listener's loop in accept */
    if (result < 0) {
        return vkp_i_sys_failure(result);
    }
    sock->endpoint = vkp_i_endpoint_open(registry->env, fd);
    return sock->endpoint != NULL ? VKP_OK : VKP_ERR_NOMEM;
}

/* A slot for the name, with a count of 0. */
static vkp_socket *vkp_i_socket_new(vkp_registry *registry, vkp_i_name name)
{
    vkp_socket *sock = registry->spare;
    if (sock != NULL) {
        registry->spare = sock->link;
    } else {
        sock = (vkp_socket *)vkp_i_alloc_zero(registry->env, sizeof *sock);
        if (sock == NULL) {
            return NULL;
        }
        sock->registry = registry;
        sock->all = registry->all;
        VKP_I_STORE_REL(&registry->all, sock);
    }
    sock->endpoint = NULL;
    sock->followers = NULL;
    sock->flags = name.abstract ? VKP_I_SOCKET_ABSTRACT : 0;
    sock->blocked = VKP_OK;
    sock->lock_fd = -1;
    sock->opener_pid = registry->sys->process_id();
    memcpy(sock->path, name.text, name.len);
    sock->path[name.len] = '\0';
    sock->node.key = vkp_i_str(sock->path, name.len);
    VKP_I_STORE(&sock->node.hash, vkp_i_map_hash(&registry->sockets, sock->node.key));
    return sock;
}

/* Make the socket of a name that has none; fd: one that the caller bound, or -1. */
static vkp_status vkp_i_socket_create(vkp_registry *registry, vkp_i_name name, int fd,
                                      vkp_socket **out)
{
    vkp_status status = VKP_OK;
    vkp_socket *sock;
    bool cleared = false;
    int error;
    if (registry->sockets.count >= registry->config.max_sockets) {
        return VKP_ERR_LIMIT;
    }
    sock = vkp_i_socket_new(registry, name);
    if (sock == NULL) {
        return VKP_ERR_NOMEM;
    }
    if (!name.abstract) {
        status = vkp_i_socket_lock(sock);
    }
    if (status == VKP_OK && fd >= 0) {
        status = vkp_i_socket_adopt(sock, fd);
    } else if (status == VKP_OK) {
        status = name.abstract ? VKP_OK : vkp_i_socket_clear(sock, &cleared);
        status = status == VKP_OK ? vkp_i_socket_bind(sock) : status;
    }
    if (status == VKP_OK && !vkp_i_map_insert(&registry->sockets, &sock->node)) {
        status = VKP_ERR_NOMEM;
        if (fd < 0 && !name.abstract) {
            (void)vkp_i_unlink_same(registry->sys, sock->path, &sock->id);
        }
    }
    if (status == VKP_OK) {
        uint64_t word = VKP_I_LOAD(&sock->word);
        VKP_I_STORE_REL(&sock->word, word + 1);
        VKP_I_STORE_REL(&sock->on_disk, name.abstract ? 0u : 1u);
        (void)VKP_I_ADD(&registry->refs, 1);
        registry->stats.created++;
        registry->stats.taken_over += cleared ? 1u : 0u;
        vkp_i_registry_ensure_checks(registry);
        *out = sock;
        return VKP_OK;
    }
    error = errno;
    if (sock->endpoint != NULL && fd >= 0) { /* the descriptor stays the caller's */
        vkp_i_free(registry->env, sock->endpoint, sizeof *sock->endpoint);
        sock->endpoint = NULL;
    }
    vkp_i_socket_unlock(sock, true);
    vkp_i_socket_detach(sock);
    sock->link = registry->spare;
    registry->spare = sock;
    errno = error;
    return status;
}

static vkp_socket *vkp_i_registry_find(vkp_registry *registry, vkp_i_name name)
{
    vkp_str key = vkp_i_str(name.text, name.len);
    vkp_i_map_node *node =
        vkp_i_map_find(&registry->sockets, vkp_i_map_hash(&registry->sockets, key), key);
    return node != NULL ? VKP_CONTAINER(node, vkp_socket, node) : NULL;
}

/* The live socket of the name; one that has just died is buried. */
static vkp_status vkp_i_registry_take(vkp_registry *registry, vkp_i_name name, vkp_socket **out)
{
    vkp_socket *sock = vkp_i_registry_find(registry, name);
    vkp_status status = VKP_ERR_NOT_FOUND;
    if (sock != NULL) {
        status = vkp_i_socket_take(sock, VKP_I_GENERATION(VKP_I_LOAD(&sock->word)), true);
    }
    if (status == VKP_OK) {
        *out = sock;
    } else if (sock != NULL && status == VKP_ERR_NOT_FOUND) {
        (void)vkp_i_socket_retire(sock, registry->sys->clock_ns());
    }
    return status;
}

/* A walk without the lock that takes before it trusts: NULL says nothing. */
#define VKP_I_PEEK_STEPS 32
static vkp_socket *vkp_i_registry_peek(vkp_registry *registry, vkp_str name)
{
    uint64_t hash = vkp_i_map_hash(&registry->sockets, name);
    vkp_i_buckets *buckets = VKP_I_LOAD_ACQ(&registry->sockets.buckets);
    vkp_i_map_node *node = buckets != NULL ? VKP_I_LOAD_ACQ(vkp_i_map_bucket(buckets, hash)) : NULL;
    int steps;
    for (steps = 0; node != NULL && steps < VKP_I_PEEK_STEPS; steps++) {
        if (VKP_I_LOAD(&node->hash) == hash) {
            vkp_socket *sock = VKP_CONTAINER(node, vkp_socket, node);
            uint32_t generation = VKP_I_GENERATION(VKP_I_LOAD(&sock->word));
            if (vkp_i_socket_take(sock, generation, false) != VKP_OK) {
                return NULL;
            }
            if (vkp_i_str_equal(sock->node.key, name)) {
                return sock;
            }
            vkp_socket_unref(sock);
            return NULL;
        }
        node = VKP_I_LOAD_ACQ(&node->next);
    }
    return NULL;
}

#endif /* VKP_I_IO */
