#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-socket   Ref-counted listening Unix sockets

   A socket is alive as long as it has references: handles of the program, listeners, clients. When
   the last reference is given back, the socket stops listening and its file is removed. A registry
   finds the sockets of a program by their paths, and keeps none of them alive.
   A path NULL means a unique path in the registry's folder. A path that begins with '@' is an
   abstract name (Linux: no file, gone with the last descriptor) if the registry has abstract_names,
   and in addresses ("unix:@NAME"). A file whose name begins with '@' is written "./@NAME". */

/* Give the live socket of the path, also one that lingers, or open a new one: bound, with the
   registry's mode, listening. Atomic. While the socket lives, its process holds a flock on the file
   PATH.lock: so a file left by a dead process is replaced, a file of a live process is not.
   A path is used as it is written: two spellings of one file are two paths.
   Owns:   borrows path (NULL: a unique path); gives *sock
   Blocks: on the file system, and on threads that open sockets     Threads: any
   In callbacks: ok
   Errors: INVALID (a null argument; an empty path, a `..` component, a zero byte), LIMIT (a path
   longer than the 107 bytes that fit on Linux, 103 elsewhere: logged; max_sockets;
   max_references), IN_USE (another process serves the path), EXISTS (something else than a socket
   of this user is at the path; it is left there), UNSUPPORTED (an abstract name outside Linux), SYS
   (a call on the file system failed), NOMEM */
VKP_API VKP_NODISCARD vkp_status vkp_socket_open(vkp_registry *registry, vkp_str path,
                                                 vkp_socket **sock);

/* Give the live socket of the path, also one that lingers; never open a new one.
   Owns:   borrows path; gives *sock
   Blocks: on threads that open sockets     Threads: any     In callbacks: ok
   Errors: NOT_FOUND (no live socket of that path), LIMIT (max_references; a path that is too long),
   INVALID (a null argument or path; an empty path, a `..` component), UNSUPPORTED (an abstract name
   outside Linux) */
VKP_API VKP_NODISCARD vkp_status vkp_socket_find(vkp_registry *registry, vkp_str path,
                                                 vkp_socket **sock);

/* Make a socket of a descriptor that the caller bound to the path and set listening. The registry
   makes the descriptor non-blocking, takes PATH.lock, and removes the file at the socket's end.
   Owns:   borrows path, takes fd (on failure fd stays the caller's); gives *sock
   Blocks: on the file system, and on threads that open sockets     Threads: any
   In callbacks: ok
   Errors: EXISTS (a socket of that path is alive in the registry), IN_USE (another process holds
   PATH.lock), LIMIT (a path that is too long; max_sockets), INVALID (a null argument or path;
   fd < 0; no file at the path, or not a socket), UNSUPPORTED (an abstract name), SYS, NOMEM */
VKP_API VKP_NODISCARD vkp_status vkp_socket_adopt(vkp_registry *registry, vkp_str path, int fd,
                                                  vkp_socket **sock);

/* One more reference: gives sock, or returns NULL when sock has max_references. Any thread. */
VKP_API VKP_NODISCARD vkp_socket *vkp_socket_ref(vkp_socket *sock);

/* One reference less. The last one ends the socket: it stops listening, and its file, if that is
   still the one that this socket bound, and its lock file are removed; with linger_ms the end comes
   that much later. In a forked child no file is removed. NULL is ignored.
   Blocks: on the file system only: if another thread uses the registry, that thread cleans up
   Threads: any     In callbacks: ok */
VKP_API void vkp_socket_unref(vkp_socket *sock);

/* A weak handle, which does not keep its socket alive: a value that may be copied and needs no
   unref. Use it only while the registry has a reference. Zeroed, it is the handle of no socket. */
typedef struct vkp_weak_socket {
    vkp_socket *i_socket;  /* private */
    uint32_t i_generation; /* private */
} vkp_weak_socket;

/* A weak handle of the socket, which is borrowed. Any thread. */
VKP_API vkp_weak_socket vkp_socket_downgrade(const vkp_socket *sock);

/* Give a reference to the weak handle's socket while that lives, also while it lingers. Takes a
   lock only if no reference is left and the registry has linger_ms.
   Owns:   borrows weak; gives *sock     Blocks: on threads that use the registry, with the lock
   Threads: any     In callbacks: ok
   Errors: NOT_FOUND (the socket ended, or the handle is zeroed), LIMIT (max_references), INVALID */
VKP_API VKP_NODISCARD vkp_status vkp_socket_upgrade(const vkp_weak_socket *weak, vkp_socket **sock);

/* The socket's path, zero-terminated. Views: valid until the caller's unref. Any thread. */
VKP_API const char *vkp_socket_get_path(const vkp_socket *sock);

/* Whether the socket still accepts clients; false after vkp_registry_cleanup_all. Any thread. */
VKP_API bool vkp_socket_is_active(const vkp_socket *sock);

/* The number of the socket's references. Advisory: other threads may change it immediately. Any
   thread. */
VKP_API size_t vkp_socket_get_ref_count(const vkp_socket *sock);

/* How vkp_socket_pool_pick chooses a socket. */
typedef enum vkp_balance {
    VKP_BALANCE_LEAST = 0, /* the socket with the fewest references; of equal ones the next */
    VKP_BALANCE_TURN       /* one socket after the other */
} vkp_balance;

/* The config of vkp_socket_pool_open. */
typedef struct vkp_socket_pool_config {
    vkp_registry *registry; /* the registry that opens the pool's sockets; required; shared */
    /* The paths of the sockets, an array of `count`; a NULL path is a unique one. NULL: all paths
       are unique. */
    const vkp_str *paths;
    size_t count;        /* number of sockets; required, at least 1 */
    vkp_balance balance; /* how vkp_socket_pool_pick chooses; default: VKP_BALANCE_LEAST */
} vkp_socket_pool_config;

/* Open a pool: several sockets, over which clients are spread. Opens all its sockets or, on
   failure, none, and holds a reference of each until its last unref. config is required.
   Owns:   borrows config, shares config.registry; gives *pool
   Blocks: on the file system, and on threads that open sockets     Threads: any
   In callbacks: ok
   Errors: those of vkp_socket_open; INVALID (a null argument, no registry, count 0), NOMEM */
VKP_API VKP_NODISCARD vkp_status vkp_socket_pool_open(const vkp_socket_pool_config *config,
                                                      vkp_socket_pool **pool);

/* One more reference (gives, the same pointer). Any thread. */
VKP_API vkp_socket_pool *vkp_socket_pool_ref(vkp_socket_pool *pool);

/* One reference less; the last one gives back the pool's sockets. NULL is ignored. Any thread. */
VKP_API void vkp_socket_pool_unref(vkp_socket_pool *pool);

/* Choose the socket for the next client; keep *sock as long as that client is connected. Skips
   sockets that are no longer active.
   Owns:   gives *sock     Blocks: never     Threads: any     In callbacks: ok
   Errors: CLOSED (no socket is active), LIMIT (every active socket has max_references), INVALID */
VKP_API VKP_NODISCARD vkp_status vkp_socket_pool_pick(vkp_socket_pool *pool, vkp_socket **sock);

/* The number of sockets in the pool, as it was opened. Any thread. */
VKP_API size_t vkp_socket_pool_get_count(const vkp_socket_pool *pool);

/* The pool's socket at the index, which must be below vkp_socket_pool_get_count. Views: valid as
   long as the pool. Any thread. */
VKP_API vkp_socket *vkp_socket_pool_get_socket(const vkp_socket_pool *pool, size_t index);

#endif /* VKP_NO_IO */
