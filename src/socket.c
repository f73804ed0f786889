#if VKP_I_IO
/* ======================================================================================
   >>impl-socket   Ref-counted Unix sockets
   ======================================================================================
   A socket is a slot of its registry. The memory of a slot is used again for later sockets and is
   freed only with the registry, so weak handles and searches by path may read any slot at any time.
   One atomic word holds the slot's generation (which socket it is now), the count of references and
   two bits. After a thread took a reference through the word, the other fields stay valid.

   States of a slot (count = VKP_I_REFS of the word), and what ends them:
     spare      count 0, on registry->spare        create -> live
     live       count > 0, in the map, listening   last unref -> ending
     ending     count 0, CLEANUP set, in the map   dispose -> spare, or -> lingering (linger_ms);
                                                   a search by path -> live (linger_ms), or -> DEAD
     lingering  count 0, LINGERS set, in the map   a search by path -> live; upkeep -> spare
     DEAD       not in the map, files removed, handles inactive; the thread that sets CLEANUP in the
                last unref, or that set it before -> spare
   vkp_registry_cleanup_all makes live and ending slots DEAD, lingering ones spare.

   The last unref cleans up without waiting for a lock. One compare-and-swap sets the count to 0 and
   CLEANUP, so exactly one thread disposes of the slot. The registry's lock is the word `held`. Lock
   order: `mutex`, then `held`. Threads that may wait lock `mutex` first; unref only tries `held`.
   If `held` is taken, the unref pushes the slot to the list `ended_slots` and tries `held` once
   more. The holder loads `ended_slots` after it released `held`: so either the holder finds the
   slot, or the second try succeeds.
   A thread that searches a path and finds a slot with count 0 retires it (DEAD) and creates the new
   socket in another slot; the thread that set CLEANUP finds DEAD and only recycles the slot. So the
   end of a path's old socket never touches the path's new one.

   The lock guards the map, the files, the statistics and the fields marked below. Descriptors are
   closed, messages logged and callbacks called after the lock was released (the descriptor of an
   abstract name excepted). A descriptor is in an endpoint with its own count: a loop where it is
   registered keeps it open after the socket ended. Followers (listeners) are notified by a task on
   their loop, queued under the lock.

   On disk: PATH.lock is created and flocked first and removed last, so the flock shows other
   processes whether the path is in use. PATH is bound, gets its mode, and only then listens, so no
   client connects before. A file is unlinked only if its device and inode are the recorded ones. */

#define VKP_I_REFS ((uint64_t)0x3fffffff) /* bits of the word: the count of references */
#define VKP_I_MOST_REFS ((size_t)1 << 29) /* far below VKP_I_DEAD: ref adds before it checks */
#define VKP_I_DEAD ((uint64_t)1 << 30)    /* bit of the word: retired, inactive from then on */
#define VKP_I_CLEANUP ((uint64_t)1 << 31) /* bit of the word: one thread disposes of the slot */
#define VKP_I_GENERATION(word) ((uint32_t)((word) >> 32)) /* counts the sockets of the slot */

/* Bytes of a name with its NUL: an abstract name, its '@' included, may fill sun_path. */
#define VKP_I_PATH_BYTES (sizeof(((struct sockaddr_un *)NULL)->sun_path) + 1)
#define VKP_I_LOCK_SUFFIX_BYTES 8u /* room for ".lock" and its NUL */
#define VKP_I_NOTE_BYTES 256       /* longest message of the registry, its NUL included */

/* A listening descriptor, shared by a socket and the listeners that accept from it. */
typedef struct vkp_i_endpoint {
    struct vkp_i_endpoint *next; /* next in registry->to_close */
    const vkp_env *env;
    size_t refs; /* atomic: one of the socket, one of each listener that accepts from it */
    int fd;      /* closed with the last reference */
} vkp_i_endpoint;

/* A listener in the list of its socket. Guarded by the registry's lock. */
typedef struct vkp_i_follower {
    struct vkp_i_follower *next; /* next in sock->followers */
    vkp_socket *sock;            /* NULL: not in a list, or the socket ended */
    vkp_loop *loop;              /* the listener's loop, where the task runs */
    vkp_i_task task; /* notifies the listener that its socket ended or has a new descriptor */
    bool queued;     /* the task is in the loop's queue */
} vkp_i_follower;

/* vkp_socket.flags: bits. */
#define VKP_I_SOCKET_ABSTRACT 1u                  /* the name is abstract: no files */
#define VKP_I_SOCKET_LINGERS 2u                   /* the count is 0; upkeep ends the socket later */
#define VKP_I_SOCKET_LOST 4u                      /* the last check did not find our file */
#define VKP_I_SOCKET_EVENT(event) (8u << (event)) /* on_event is due for this vkp_socket_event */

struct vkp_socket {
    vkp_i_map_node node;    /* in registry->sockets; key: path */
    uint64_t word;          /* atomic: generation, CLEANUP, DEAD and count, see the states above */
    vkp_registry *registry; /* constant; a reference from create until the slot is spare */
    vkp_socket *all;        /* next in registry->all; constant */
    vkp_socket *link;       /* next in registry->ended_slots or registry->spare */
    uint64_t ended_ns;      /* when the count became 0; written by the thread that set CLEANUP */
    /* Guarded by the registry's lock: */
    vkp_i_endpoint *endpoint;  /* the listening descriptor; NULL once retired */
    vkp_i_follower *followers; /* listeners that are notified of the socket's end */
    uint64_t linger_until_ns;  /* when lingering ends, on the loop's clock; 0: upkeep sets it */
    uint32_t flags;            /* VKP_I_SOCKET_* */
    vkp_status blocked;        /* why the last bind of a lost socket failed; OK: it did not */
    int lock_fd;               /* holds the flock of PATH.lock; -1: none */
    /* Written under the lock; vkp_registry_unlink_all reads them without it while on_disk is 1: */
    uint32_t on_disk;            /* atomic: 1 while path, id and lock_id are those of our files */
    int opener_pid;              /* the process that owns the files; a forked child removes none */
    vkp_file_id id;              /* the socket's file */
    vkp_file_id lock_id;         /* the file PATH.lock */
    char path[VKP_I_PATH_BYTES]; /* terminated; of an abstract name with its '@' */
};

struct vkp_registry {
    const vkp_env *env;
    const vkp_sys *sys;
    size_t refs; /* atomic: the program's, one of each socket, and those of calls and tasks */
    vkp_registry_config config; /* defaults filled in, folder copied; constant after open */
    VKP_I_MUTEX mutex;          /* threads that wait for `held` wait here first */
    uint32_t held;              /* atomic: 1 while a thread holds the registry's lock */
    vkp_socket *ended_slots;    /* atomic: slots to dispose of, pushed while `held` was taken */
    vkp_socket *all;            /* atomic: every slot, newest first; slots are never unlinked */
    /* Guarded by `held`: */
    vkp_i_map sockets;        /* path to socket: live, ending and lingering ones */
    vkp_socket *spare;        /* slots without a socket */
    vkp_i_endpoint *to_close; /* endpoints to give back after the unlock */
    size_t released;          /* references of the registry to give back after the unlock */
    bool noted;               /* `note` is to be logged after the unlock */
    vkp_log_level note_level; /* level of `note` */
    char note[VKP_I_NOTE_BYTES];
    vkp_registry_stats stats;
    bool upkeep_queued;     /* upkeep_task is in the loop's queue, with a reference */
    bool upkeep_attached;   /* upkeep_place is attached and the timer runs, with a reference */
    bool loop_gone;         /* the loop is closed: no upkeep any longer */
    uint64_t next_check_ns; /* when the files are checked next, on the loop's clock */
    /* Run upkeep on the loop's thread: */
    vkp_i_task upkeep_task;      /* queued by any thread, see upkeep_queued */
    vkp_timer upkeep_timer;      /* loop's thread only */
    vkp_i_attached upkeep_place; /* loop's thread only; runs upkeep when the loop closes */
};

/* The name of the socket; views its path. */
static vkp_i_name vkp_i_socket_name(const vkp_socket *sock)
{
    vkp_i_name name;
    name.text = sock->path;
    name.len = sock->node.key.len;
    name.abstract = (sock->flags & VKP_I_SOCKET_ABSTRACT) != 0;
    return name;
}

/* "PATH.lock". */
typedef struct vkp_i_lock_name {
    char path[VKP_I_PATH_BYTES + VKP_I_LOCK_SUFFIX_BYTES];
} vkp_i_lock_name;

static vkp_i_lock_name vkp_i_socket_lock_name(const vkp_socket *sock)
{
    static const char suffix[] = ".lock";
    vkp_i_lock_name name;
    size_t len = strlen(sock->path);
    memcpy(name.path, sock->path, len); /* not snprintf: called in signal handlers */
    memcpy(name.path + len, suffix, sizeof suffix);
    return name;
}

/* ---- the registry's lock, and the work after it was released ---- */

/* An endpoint for the descriptor, with one reference. NULL: no memory, and fd stays open. */
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

/* Free the registry and all its slots. Called with the last reference: no lock is needed. */
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

/* Give back `count` references of the registry. Not under its lock. */
static void vkp_i_registry_drop(vkp_registry *registry, size_t count)
{
    if (count > 0 && VKP_I_SUB_ACQ_REL(&registry->refs, count) == count) {
        vkp_i_registry_free(registry);
    }
}

/* Keep a message that is logged after the unlock; it replaces an earlier one. Under the lock. */
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

/* Take the registry's lock, waiting for it, and dispose of the slots in `ended_slots`. */
static void vkp_i_registry_enter(vkp_registry *registry)
{
    VKP_I_LOCK(&registry->mutex);
    vkp_i_latch_lock(&registry->held, registry->sys);
    vkp_i_registry_dispose_all(registry);
}

/* Take the registry's lock if it is free. Never waits. */
static bool vkp_i_registry_try_enter(vkp_registry *registry)
{
    return VKP_I_XCHG(&registry->held, 1u) == 0;
}

/* Release the registry's lock, then close, log and give back what was left for after it. `in_line`:
   the lock was taken by vkp_i_registry_enter, not by try_enter. The caller has a reference of the
   registry. Keeps errno. The release exchange of `held` and the load of `ended_slots` pair with the
   push to `ended_slots` and the second vkp_i_registry_try_enter in vkp_socket_unref. */
static void vkp_i_registry_leave(vkp_registry *registry, bool in_line)
{
    int error = errno;
    size_t released = 0;
    vkp_i_endpoint *to_close = NULL;
    vkp_log_level level = VKP_LOG_DEFAULT;
    char note[VKP_I_NOTE_BYTES];
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
    } while (VKP_I_LOAD_ACQ(&registry->ended_slots) != NULL && vkp_i_registry_try_enter(registry));
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

/* Take a reference if the slot still has this generation. `locked`: the caller holds the registry's
   lock and may revive a socket with count 0, if the registry lingers. NOT_FOUND: the socket ended.
   LIMIT: max_references. */
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

/* Take a reference under the lock, where a lingering socket is revived. Not inlined, so that the
   caller's path without the lock saves no registers. */
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

/* Take a reference if the slot still has this generation. The caller does not hold the lock; it is
   taken only if the socket may linger. */
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
        return; /* other references exist, or the thread that set CLEANUP will see the count 0 */
    }
    registry = sock->registry;
    sock->ended_ns = registry->sys->clock_ns();
    /* The disposing thread gives the socket's reference of the registry back: keep one for here. */
    (void)VKP_I_ADD(&registry->refs, 1);
    if (vkp_i_registry_try_enter(registry)) {
        vkp_i_socket_dispose(registry, sock);
        vkp_i_registry_leave(registry, false);
    } else {
        sock->link = VKP_I_LOAD(&registry->ended_slots);
        while (!VKP_I_CAS(&registry->ended_slots, &sock->link, sock)) {
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

/* ---- the end of a socket; all functions under the registry's lock ---- */

static bool vkp_i_same_file(const vkp_file_id *a, const vkp_file_id *b)
{
    return a->device == b->device && a->inode == b->inode;
}

/* Unlink the path if it still names the recorded file. 0 also when the file is gone or another one;
   otherwise a negated errno. */
static int vkp_i_unlink_same(const vkp_sys *sys, const char *path, const vkp_file_id *id)
{
    vkp_file_id found;
    int result = sys->identify(path, &found);
    if (result == 0 && vkp_i_same_file(&found, id)) {
        result = sys->unlink(path);
    }
    return result == -ENOENT ? 0 : result; /* the file is gone already */
}

/* Unlink the recorded file; count and log a failure. */
static void vkp_i_registry_remove(vkp_registry *registry, const char *path, const vkp_file_id *id)
{
    int result = vkp_i_unlink_same(registry->sys, path, id);
    if (result < 0) {
        registry->stats.unlink_failures++;
        registry->stats.unlink_errno = -result;
        vkp_i_registry_note(registry, VKP_LOG_WARN, "%s: not removed: %s", path, strerror(-result));
    }
}

/* Give up PATH.lock, removing the file first if `unlink`. */
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
        memset(&sock->lock_id, 0, sizeof sock->lock_id); /* a new file may get its inode */
    }
}

/* Give the socket's endpoint back, after the unlock. The endpoint of an abstract name is given back
   immediately: the name is free only when the descriptor is closed. */
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

/* Queue the follower's task, once until it ran. */
static void vkp_i_follower_notify(vkp_i_follower *follower)
{
    if (!follower->queued) {
        follower->queued = vkp_i_loop_queue(follower->loop, &follower->task);
    }
}

/* End a socket: set DEAD, remove it from the map, notify its followers, remove its file if it is
   still ours, then PATH.lock. `since_ns`: when its end was due, for the statistics. False: the
   socket was DEAD before. */
static bool vkp_i_socket_retire(vkp_socket *sock, uint64_t since_ns)
{
    vkp_registry *registry = sock->registry;
    const vkp_sys *sys = registry->sys;
    bool ours = sys->process_id() == sock->opener_pid; /* else a forked child: the parent's files */
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

/* Make a slot without references spare, with a new generation. A slot whose generations are used up
   (the next one is 0) is never used again: an old weak handle could match it. */
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

/* Retire a socket without references, and make its slot spare. */
static void vkp_i_socket_end(vkp_registry *registry, vkp_socket *sock, uint64_t since_ns)
{
    (void)vkp_i_socket_retire(sock, since_ns);
    vkp_i_socket_recycle(registry, sock);
}

/* Queue upkeep on the loop. False: the loop is closed. */
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

/* Start the checks of files with the first socket, or later if the timer had no memory then. */
static void vkp_i_registry_ensure_checks(vkp_registry *registry)
{
    if (registry->config.check_ms > 0 && !registry->upkeep_attached) {
        (void)vkp_i_registry_request_upkeep(registry);
    }
}

/* End a socket or let it linger, if its count is still 0; otherwise only clear CLEANUP. Called by
   the thread that set CLEANUP, or by the thread that found the slot in `ended_slots`. */
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

/* Dispose of all slots in `ended_slots`. */
static void vkp_i_registry_dispose_all(vkp_registry *registry)
{
    vkp_socket *sock = NULL;
    if (VKP_I_LOAD_ACQ(&registry->ended_slots) != NULL) {
        sock = VKP_I_XCHG(&registry->ended_slots, (vkp_socket *)NULL);
    }
    while (sock != NULL) {
        vkp_socket *next = sock->link;
        uint64_t ended = registry->stats.ended;
        vkp_i_socket_dispose(registry, sock);
        registry->stats.handed_over +=
            registry->stats.ended - ended; /* 0 more if the socket lingers */
        sock = next;
    }
}

/* ---- the beginning of a socket; all functions under the registry's lock ---- */

/* Whether a process listens at the path: 0 no, 1 yes or not excluded, or a negated errno. */
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

/* Remove a dead process's socket file from the path; *cleared is then true. Our process holds
   PATH.lock. EXISTS: not a socket, or of another user. IN_USE: a process listens there. */
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

/* Set the mode of the file, then listen: in this order no client connects before the mode holds. */
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

/* Bind and listen. On success the new endpoint replaces the old one, if there was one. */
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

/* Create and flock PATH.lock. IN_USE: another process holds it. EXISTS: it is a symbolic link. */
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

/* Use the descriptor that the caller bound. On failure it stays the caller's. */
static vkp_status vkp_i_socket_adopt(vkp_socket *sock, int fd)
{
    vkp_registry *registry = sock->registry;
    int result = registry->sys->identify(sock->path, &sock->id);
    VKP_I_REQUIRE(result == 0 && sock->id.is_socket);
    result = registry->sys->prepare(fd); /* else accept would block a listener's loop */
    if (result < 0) {
        return vkp_i_sys_failure(result);
    }
    sock->endpoint = vkp_i_endpoint_open(registry->env, fd);
    return sock->endpoint != NULL ? VKP_OK : VKP_ERR_NOMEM;
}

/* A slot for the name, spare or new, with a count of 0. NULL: no memory. */
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

/* Create the socket of a name that is not in the map. fd: bound by the caller, or -1: bind here. */
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

/* The socket of the name in the map, without a reference, or NULL. */
static vkp_socket *vkp_i_registry_find(vkp_registry *registry, vkp_i_name name)
{
    vkp_str key = vkp_i_str(name.text, name.len);
    vkp_i_map_node *node =
        vkp_i_map_find(&registry->sockets, vkp_i_map_hash(&registry->sockets, key), key);
    return node != NULL ? VKP_CONTAINER(node, vkp_socket, node) : NULL;
}

/* A reference to the socket of the name. NOT_FOUND: there is none; an ending one was retired. */
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

#define VKP_I_PEEK_STEPS 32 /* nodes that a search without the lock visits at most */

/* Search without the lock: take a reference first, then compare the path. NULL proves nothing: the
   caller searches again under the lock. */
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
