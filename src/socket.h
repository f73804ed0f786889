#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-socket   Ref-counted listening Unix sockets

   A socket lives as long as somebody refers to it: handles of the program, listeners, clients.
   Whoever gives the last reference back stops it and removes its file. A registry knows the
   sockets of a program by their paths, and keeps none of them alive.
   A path NULL means a name of the registry's own, unique on this machine. A name that begins with
   '@' is abstract (Linux: no file, gone with the last descriptor) where the registry says so, and
   in addresses ("unix:@NAME"); a file of such a name is "./@NAME".                            */

/* What happened to a socket's file behind our back, see vkp_registry_config.check_ms. */
typedef enum vkp_socket_event {
    VKP_SOCKET_LOST = 1, /* the file is gone, or another one is there in its place */
    VKP_SOCKET_REBOUND,  /* bound again: new clients come in */
    VKP_SOCKET_BLOCKED   /* not bound again: status tells why; tried again at every check */
} vkp_socket_event;

typedef struct vkp_registry_config {
    int backlog;         /* of listen(2); default 4096, cut by the system */
    uint32_t mode;       /* permissions of the files; default 0600. More than that needs gates that
                              check who comes (vkp_gate), which they do by default             */
    bool abstract_names; /* "@NAME" is an abstract name; UNSUPPORTED outside Linux */
    size_t max_sockets;  /* alive at once; default: no limit */
    size_t max_references; /* of one socket; default and most: 2^29 */
    vkp_str folder;        /* of unique names; default $XDG_RUNTIME_DIR, $TMPDIR, /tmp. Copied. */
    vkp_loop *loop;     /* carries the timers of linger_ms and check_ms, which need it. Shared. */
    uint64_t linger_ms; /* a socket ends that long after its last reference; default: at once */
    uint64_t check_ms;  /* look that often whether the files are still ours; default: never */
    bool rebind;        /* then bind again what was lost */
    /* Loop's thread. sock is borrowed; it may have ended since. Not for sockets that linger. */
    void (*on_event)(void *user, vkp_socket *sock, vkp_socket_event event, vkp_status status);
    void *user;
    const vkp_env *env;
} vkp_registry_config;

/* Open a registry: path -> weak reference. An object; there is no process-wide one.
   Owns:   borrows config, shares loop; gives *registry
   Blocks: never     Threads: any     Errors: NOMEM, INVALID (a timer without a loop)          */
VKP_API VKP_NODISCARD vkp_status vkp_registry_open(const vkp_registry_config *config,
                                                   vkp_registry **registry);
VKP_API vkp_registry *vkp_registry_ref(vkp_registry *registry);

/* Sockets that live keep their registry. NULL is ignored. Any thread. */
VKP_API void vkp_registry_unref(vkp_registry *registry);

/* Sockets that are alive in this registry. Any thread; out of date at once. */
VKP_API size_t vkp_registry_get_count(vkp_registry *registry);
VKP_API bool vkp_registry_is_active(vkp_registry *registry, vkp_str path);

/* Stop and unlink every socket now, those that linger too, and their listeners with them; handles
   stay valid, inactive. Returns how many. Any thread; in atexit, too.                         */
VKP_API size_t vkp_registry_cleanup_all(vkp_registry *registry);

/* For handlers of crashes: remove the files of the sockets that this process opened, and nothing
   else. Takes no lock and no memory; async-signal-safe. The program's end must follow.        */
VKP_API void vkp_registry_unlink_all(vkp_registry *registry);

/* Counts since open, but for the first two. */
typedef struct vkp_registry_stats {
    size_t live;              /* sockets, those that linger included */
    size_t references;        /* of them */
    uint64_t created;         /* sockets */
    uint64_t taken_over;      /* of those: where a dead process's file stood */
    uint64_t revived;         /* asked for again while they lingered */
    uint64_t ended;           /* sockets */
    uint64_t handed_over;     /* of those: cleaned up by another thread that was in the registry */
    uint64_t unlink_failures; /* files that could not be removed */
    int unlink_errno;         /* of the last of those */
    uint64_t lost;            /* files found gone or replaced, by checks */
    uint64_t rebound;         /* of those: bound again */
    uint64_t cleanup_last_ns; /* from the last reference (or the linger's end) to the file gone */
    uint64_t cleanup_most_ns;
    uint64_t cleanup_total_ns;
} vkp_registry_stats;
VKP_API void vkp_registry_get_stats(vkp_registry *registry,
                                    vkp_registry_stats *stats); /* any thread */

/* The live socket of the path, or a new one: bound, with the registry's mode, listening. Atomic.
   Beside the file stands PATH.lock, held by flock while the socket lives: a file left by a dead
   process is taken over, one of a live process is not. A path is used as it is written.
   Owns:   borrows path (NULL: a unique one); gives *sock
   Blocks: on the file system, and on threads that create   Threads: any     In callbacks: ok
   Errors: INVALID (empty, or a `..` component), LIMIT (path longer than the 107 bytes that fit on
   Linux, 103 elsewhere, as the log says; max_sockets; max_references), IN_USE (another process
   serves it), EXISTS (something that is no socket of this user is there; untouched), UNSUPPORTED,
   SYS, NOMEM                                                                                  */
VKP_API VKP_NODISCARD vkp_status vkp_socket_open(vkp_registry *registry, vkp_str path,
                                                 vkp_socket **sock);

/* The live socket of the path, never a new one. Gives *sock. Any thread.
   Errors: NOT_FOUND, LIMIT (max_references), INVALID                                          */
VKP_API VKP_NODISCARD vkp_status vkp_socket_find(vkp_registry *registry, vkp_str path,
                                                 vkp_socket **sock);

/* Hand over a socket that the caller bound to the path and set listening.
   Owns:   takes fd (on failure it stays the caller's); gives *sock     Threads: any
   Errors: EXISTS (a handle of that path lives), IN_USE (another process holds PATH.lock), LIMIT,
   INVALID (no such file, or no socket), UNSUPPORTED (an abstract name), SYS, NOMEM            */
VKP_API VKP_NODISCARD vkp_status vkp_socket_adopt(vkp_registry *registry, vkp_str path, int fd,
                                                  vkp_socket **sock);

/* One more reference: sock, or NULL when it has max_references. Any thread. */
VKP_API VKP_NODISCARD vkp_socket *vkp_socket_ref(vkp_socket *sock);

/* One reference less. The last one stops listening, removes the file if it is still the one this
   handle bound, and the lock file; with linger_ms that comes later. In a forked child it removes
   nothing. NULL is ignored.
   Blocks: on the file system only: when another thread is in the registry, that one cleans up
   before it leaves     Threads: any     In callbacks: ok                                      */
VKP_API void vkp_socket_unref(vkp_socket *sock);

/* A handle that does not keep the socket alive: a value, copied at will, nothing to give back. To
   be used only while the registry is referred to. Zeroed it is the handle of no socket.       */
typedef struct vkp_weak_socket {
    vkp_socket *i_socket;
    uint32_t i_generation;
} vkp_weak_socket;

/* sock is borrowed. Any thread. */
VKP_API vkp_weak_socket vkp_socket_downgrade(const vkp_socket *sock);

/* A reference to the socket while it lives. Gives *sock. Takes no lock. Any thread.
   Errors: NOT_FOUND (it ended), LIMIT (max_references)                                        */
VKP_API VKP_NODISCARD vkp_status vkp_socket_upgrade(const vkp_weak_socket *weak, vkp_socket **sock);

/* The path (views); whether it still accepts; the references. Any thread. */
VKP_API const char *vkp_socket_get_path(const vkp_socket *sock);
VKP_API bool vkp_socket_is_active(const vkp_socket *sock);
VKP_API size_t vkp_socket_get_ref_count(const vkp_socket *sock); /* advisory */

/* Several sockets, over which clients are spread. A pool refers to its sockets. */

typedef enum vkp_balance {
    VKP_BALANCE_LEAST = 0, /* the socket with the fewest references; of equals, the next in turn */
    VKP_BALANCE_TURN       /* one after the other */
} vkp_balance;

typedef struct vkp_socket_pool_config {
    vkp_registry *registry; /* required; shared */
    const vkp_str *paths;   /* as many as count; NULL: unique ones */
    size_t count;           /* of sockets; at least 1 */
    vkp_balance balance;
} vkp_socket_pool_config;

/* Open the pool and its sockets: all or none.
   Owns:   borrows config; gives *pool     Blocks, Threads, Errors: as vkp_socket_open */
VKP_API VKP_NODISCARD vkp_status vkp_socket_pool_open(const vkp_socket_pool_config *config,
                                                      vkp_socket_pool **pool);
VKP_API vkp_socket_pool *vkp_socket_pool_ref(vkp_socket_pool *pool); /* any thread */
VKP_API void vkp_socket_pool_unref(vkp_socket_pool *pool);           /* any; NULL is ignored */

/* The socket for the next client, which is to hold it as long as it is there. Sockets that were
   cleaned up are passed over. Gives *sock. Any thread.
   Errors: CLOSED (none is active), LIMIT (max_references, of all)                             */
VKP_API VKP_NODISCARD vkp_status vkp_socket_pool_pick(vkp_socket_pool *pool, vkp_socket **sock);

/* Its sockets; each is viewed as long as the pool is. Index below the count. Any thread. */
VKP_API size_t vkp_socket_pool_get_count(const vkp_socket_pool *pool);
VKP_API vkp_socket *vkp_socket_pool_get_socket(const vkp_socket_pool *pool, size_t index);

#endif /* VKP_NO_IO */
