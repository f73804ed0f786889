/* --------------------------------------------------------------------------------------
   >>api-sys   The operating system behind one table                                       */

typedef struct vkp_parker vkp_parker;

/* One range of a gathered write. Laid out as POSIX's struct iovec. */
typedef struct vkp_range {
    const void *base;
    size_t len; /* bytes */
} vkp_range;

/* A socket address, as bind and connect take it. */
typedef struct vkp_address {
    uint32_t bytes; /* of storage in use */
    uint16_t family;
    union {
        uint64_t align;
        unsigned char bytes[128];
    } storage;
} vkp_address;

/* A client as the kernel knows it. */
struct vkp_peer {
    uint32_t uid;
    uint32_t gid;
    int pid; /* 0 where the system does not tell */
};

/* What lstat says of a path. */
typedef struct vkp_file_id {
    uint64_t device;
    uint64_t inode;
    uint32_t uid;
    uint32_t mode; /* permissions */
    bool is_socket;
} vkp_file_id;

/* What stands behind a descriptor, as far as it matters to who waits for it (vkp_sys.fd_kind). */
#define VKP_FD_OTHER 0
#define VKP_FD_FILE 1 /* a regular one */
#define VKP_FD_SOCKET 2

/* Every contact with the operating system. Copy the table of vkp_sys_get_default, and replace
   members to inject faults or a clock. Calls return >= 0 or a negated errno; errno itself is not
   set. write and kevent may be called in a signal handler and leave errno alone.
   Descriptors are non-blocking and close-on-exec from birth. Members may be called from any
   thread.                                                                                     */
struct vkp_sys {
    uint64_t (*clock_ns)(void);   /* monotonic */
    uint64_t (*random_u64)(void); /* for jitter and names, not for secrets */
    int (*process_id)(void);
    uint32_t (*user_id)(void);                              /* effective */
    void (*park)(vkp_parker *parker, uint64_t deadline_ns); /* until unpark or deadline */
    void (*unpark)(vkp_parker *parker);                     /* the only way to end a park early */
    void (*yield)(void);                                    /* let another thread run */
    uint32_t (*processors)(void);                           /* online */
    /* A full barrier on every running thread of the process; `prepare` once before the first one.
       Negative where there is none: senders then pay for a barrier of their own. What was prepared
       must work until the end: a sandbox that refuses it comes before the first channel.      */
    int (*membarrier)(bool prepare);
    int (*socket)(int family, int type);
    /* mode: of a Unix socket's file at its birth, less the umask, where the system can. */
    int (*bind)(int fd, const void *address, uint32_t bytes, uint32_t mode);
    int (*listen)(int fd, int backlog);
    int (*accept)(int fd);
    int (*connect)(int fd, const void *address, uint32_t bytes); /* -EINPROGRESS is progress */
    int (*socket_error)(int fd); /* takes SO_ERROR: 0 or a negated errno */
    int (*prepare)(int fd);      /* non-blocking, close-on-exec, no SIGPIPE: for adopted sockets */
    int (*set_nodelay)(int fd);
    int (*peer)(int fd, vkp_peer *peer); /* of a connected Unix socket */
    int (*local_port)(int fd);           /* of a bound TCP socket */
    /* Addresses of a TCP host and port, at most capacity: how many. May block on DNS for names. */
    int (*resolve)(const char *host, const char *port, vkp_address *out, size_t capacity);
    int64_t (*read)(int fd, void *buffer, size_t bytes);
    int64_t (*send)(int fd, const vkp_range *ranges, size_t count); /* never SIGPIPE */
    int64_t (*write)(int fd, const void *buffer, size_t bytes);     /* wake pipes */
    int (*close)(int fd);
    /* Opens (mode 0600) and flocks; -EWOULDBLOCK when another holds it. id: of what is locked. */
    int (*lock_file)(const char *path, vkp_file_id *id);
    int (*identify)(const char *path, vkp_file_id *id); /* lstat */
    int (*chmod)(const char *path, uint32_t mode);
    int (*unlink)(const char *path);
    int (*wake_pair)(int fds[2]); /* [0] polls readable after a write to [1]; may be one fd */
    int (*poll)(void *pollfds, size_t count, uint64_t deadline_ns);
    int (*epoll_create)(void); /* -ENOSYS where there is none, as the next two */
    int (*epoll_ctl)(int epoll_fd, int operation, int fd, void *event);
    int (*epoll_wait)(int epoll_fd, void *events, int capacity, uint64_t deadline_ns);
    int (*kqueue_create)(void); /* -ENOSYS where there is none, as the next */
    /* Applies the changes, then waits for events; for none (event_count 0) it does not wait. */
    int (*kevent)(int kq, const void *changes, int change_count, void *events, int event_count,
                  uint64_t deadline_ns);
    int (*fd_kind)(int fd); /* VKP_FD_* */
};

/* The table over libc. Static. Any thread. */
VKP_API const vkp_sys *vkp_sys_get_default(void);
