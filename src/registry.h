#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-registry   Finds live sockets by their paths                                      */

/* What a check found at a socket's file, which another program removed or replaced: see
   vkp_registry_config.check_ms. */
typedef enum vkp_socket_event {
    /* The socket's file is gone, or another file is in its place. */
    VKP_SOCKET_LOST = 1,
    /* The lost socket is bound to its path again: new clients can connect. */
    VKP_SOCKET_REBOUND,
    /* The lost socket could not be bound again, for the reason in `status`. Every check tries
       again; the event is repeated when the reason changes. */
    VKP_SOCKET_BLOCKED
} vkp_socket_event;

/* The config of vkp_registry_open. Zeroed: all defaults. */
typedef struct vkp_registry_config {
    /* Clients that may wait for accept, as for listen(2). Default: 4096. The system may cut it. */
    int backlog;
    /* Permissions of the sockets' files. Default: 0600. With more than 0600 every listener needs a
       gate that checks uids (vkp_gate); gates do so by default. */
    uint32_t mode;
    /* A path "@NAME" is an abstract name; opening one is UNSUPPORTED outside Linux. Default: false,
       a path "@NAME" is a file. */
    bool abstract_names;
    /* Most sockets alive at one time. Default: no limit. */
    size_t max_sockets;
    /* Most references of one socket. Default and maximum: 2^29. */
    size_t max_references;
    /* Folder of unique paths; copied. Default: $XDG_RUNTIME_DIR if this user owns it, else $TMPDIR,
       else /tmp. */
    vkp_str folder;
    /* Runs the timers of linger_ms and check_ms, which need a loop; shared. NULL: no timers. */
    vkp_loop *loop;
    /* Milliseconds from a socket's last reference to its end; opened again in that time, the socket
       lives on. Default: 0, it ends immediately. Needs loop. */
    uint64_t linger_ms;
    /* Milliseconds between two checks whether each socket's file is still its own. Default: 0, no
       checks. Needs loop. */
    uint64_t check_ms;
    /* A check binds a lost socket again. Default: false, a check only reports. */
    bool rebind;
    /* A check found an event; status is the reason of BLOCKED, else OK. Called once per event, on
       the loop's thread, not for sockets that linger. sock is borrowed; it may have ended since
       the check. NULL: not called. */
    void (*on_event)(void *user, vkp_socket *sock, vkp_socket_event event, vkp_status status);
    /* Handed to on_event. */
    void *user;
    /* Memory, log and system; must outlive the registry. NULL: the defaults. */
    const vkp_env *env;
} vkp_registry_config;

/* Open a registry: a map from paths to live sockets. A program may open several; none is global.
   NULL config: all defaults.
   Owns:   borrows config (copies folder), shares config.loop; gives *registry
   Blocks: never     Threads: any     In callbacks: ok
   Errors: NOMEM, INVALID (registry NULL; linger_ms or check_ms without a loop) */
VKP_API VKP_NODISCARD vkp_status vkp_registry_open(const vkp_registry_config *config,
                                                   vkp_registry **registry);

/* One more reference (gives, the same pointer). Any thread. */
VKP_API vkp_registry *vkp_registry_ref(vkp_registry *registry);

/* One reference less. A registry is freed when neither a reference nor a live socket is left. NULL
   is ignored. Any thread. */
VKP_API void vkp_registry_unref(vkp_registry *registry);

/* The number of sockets alive in this registry, sockets that linger included. Any thread; other
   threads may change the number immediately. */
VKP_API size_t vkp_registry_get_count(vkp_registry *registry);

/* Whether a socket of the path is alive in this registry, also one that lingers. Any thread; other
   threads may change this immediately. */
VKP_API bool vkp_registry_is_active(vkp_registry *registry, vkp_str path);

/* End every socket of the registry now, also sockets that linger, and remove their files; their
   listeners end too, each on its loop. Handles stay valid, but inactive. Returns how many sockets
   ended. May be called in an atexit function.
   Blocks: on the file system, and on threads that use the registry
   Threads: any     In callbacks: ok */
VKP_API size_t vkp_registry_cleanup_all(vkp_registry *registry);

/* Remove the files of the sockets that this process opened, and do nothing else: for handlers of
   crashes. The program must end right after it. Takes no lock, allocates nothing, is
   async-signal-safe. Any thread, also in signal handlers. */
VKP_API void vkp_registry_unlink_all(vkp_registry *registry);

/* What vkp_registry_get_stats writes. Counters count since the registry was opened. */
typedef struct vkp_registry_stats {
    /* Sockets alive now, sockets that linger included. */
    size_t live;
    /* References of all live sockets now. */
    size_t references;
    /* Sockets opened or adopted. */
    uint64_t created;
    /* Opened sockets that replaced a file left by a dead process. */
    uint64_t taken_over;
    /* Sockets that lingered and were opened again. */
    uint64_t revived;
    /* Sockets that ended. */
    uint64_t ended;
    /* Sockets that ended on another thread than that of their last unref: the other thread was in
       the registry, so it cleaned up. */
    uint64_t handed_over;
    /* Files that could not be removed. */
    uint64_t unlink_failures;
    /* The errno of the last file that could not be removed; 0: none. */
    int unlink_errno;
    /* Files that checks found gone or replaced. */
    uint64_t lost;
    /* Lost sockets that checks bound again. */
    uint64_t rebound;
    /* Nanoseconds that the last cleanup took: from the last unref (or the end of linger_ms, or the
       call of vkp_registry_cleanup_all) until the file was gone. */
    uint64_t cleanup_last_ns;
    /* Nanoseconds of the longest cleanup. */
    uint64_t cleanup_most_ns;
    /* Nanoseconds of all cleanups together. */
    uint64_t cleanup_total_ns;
} vkp_registry_stats;

/* Write the registry's counters to *stats. Any thread; waits for threads that use the registry. */
VKP_API void vkp_registry_get_stats(vkp_registry *registry, vkp_registry_stats *stats);

#endif /* VKP_NO_IO */
