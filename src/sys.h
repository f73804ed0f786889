/* --------------------------------------------------------------------------------------
   >>api-sys   The operating system as one table of functions */

/* What a thread sleeps on: vkp_sys.park and vkp_sys.unpark. */
typedef struct vkp_parker vkp_parker;

/* One range of a gathered write. Laid out as POSIX's struct iovec. */
typedef struct vkp_range {
    const void *base; /* the first byte */
    size_t len;       /* number of bytes */
} vkp_range;

/* A socket address, as bind and connect take it. */
typedef struct vkp_address {
    uint32_t bytes;  /* bytes of storage in use */
    uint16_t family; /* AF_UNIX, AF_INET or AF_INET6 */
    union {
        uint64_t align;           /* aligns the bytes; not used */
        unsigned char bytes[128]; /* the system's struct sockaddr */
    } storage;                    /* the address itself */
} vkp_address;

/* A client over a Unix socket, as the kernel identifies it. */
struct vkp_peer {
    uint32_t uid; /* effective user id of the client's process */
    uint32_t gid; /* effective group id of the client's process */
    int pid;      /* process id of the client; 0 where the system does not report it */
};

/* What lstat reports about a path. */
typedef struct vkp_file_id {
    uint64_t device; /* the file's device */
    uint64_t inode;  /* the file's inode on its device */
    uint32_t uid;    /* the file's owner */
    uint32_t mode;   /* the file's permissions, without its type */
    bool is_socket;  /* the file is a socket */
} vkp_file_id;

/* Result of vkp_sys.fd_kind: a descriptor that is neither a regular file nor a socket. */
#define VKP_FD_OTHER 0
/* Result of vkp_sys.fd_kind: a regular file. */
#define VKP_FD_FILE 1
/* Result of vkp_sys.fd_kind: a socket. */
#define VKP_FD_SOCKET 2

/* Every contact with the operating system. To inject faults or a clock, copy the table of
   vkp_sys_get_default and replace members. Members that return a signed integer return >= 0 or a
   negated errno; the library does not read errno after them. write and kevent may be called in a
   signal handler and leave errno unchanged. New descriptors are non-blocking and close-on-exec from
   birth. Members may be called from any thread. With VKP_NO_IO the members from `socket` on are
   NULL. */
struct vkp_sys {
    /* Now: nanoseconds of the monotonic clock. */
    uint64_t (*clock_ns)(void);
    /* Now: nanoseconds since 1970 on the wall clock, which may jump. */
    uint64_t (*wall_ns)(void);
    /* 64 random bits for jitter and names, not for secrets. */
    uint64_t (*random_u64)(void);
    /* The id of this process. */
    int (*process_id)(void);
    /* The effective user id of this process. */
    uint32_t (*user_id)(void);
    /* Sleep until unpark or until the deadline; never returns earlier. */
    void (*park)(vkp_parker *parker, uint64_t deadline_ns);
    /* End the park of that parker, or its next one: the only way to end a park before its
       deadline. */
    void (*unpark)(vkp_parker *parker);
    /* Let another thread run. */
    void (*yield)(void);
    /* The number of processors that are online. */
    uint32_t (*processors)(void);
    /* A full memory barrier on every running thread of the process. `prepare` is true once, before
       the first barrier. Negative where the system has none: each sender then pays for a barrier of
       its own. What was prepared must work until the end: a sandbox that refuses the call must be
       entered before the first channel is opened. */
    int (*membarrier)(bool prepare);
    /* socket(2): a new descriptor. */
    int (*socket)(int family, int type);
    /* bind(2). mode: the permissions of a Unix socket's file at its creation, less the umask, where
       the system can set them. */
    int (*bind)(int fd, const void *address, uint32_t bytes, uint32_t mode);
    /* listen(2). */
    int (*listen)(int fd, int backlog);
    /* accept(2): the new connection's descriptor. */
    int (*accept)(int fd);
    /* connect(2). -EINPROGRESS: the connect continues, and the descriptor gets writable. */
    int (*connect)(int fd, const void *address, uint32_t bytes);
    /* Read and clear SO_ERROR: 0, or the error as a negated errno. */
    int (*socket_error)(int fd);
    /* Make an adopted descriptor non-blocking and close-on-exec, and let it raise no SIGPIPE. */
    int (*prepare)(int fd);
    /* Set TCP_NODELAY. */
    int (*set_nodelay)(int fd);
    /* Notice a dead TCP peer: probes after keepalive_ms of silence, and an error when written bytes
       are not acknowledged for unacked_ms. 0: no such limit. */
    int (*set_liveness)(int fd, uint64_t keepalive_ms, uint64_t unacked_ms);
    /* Write the peer of a connected Unix socket to *peer. */
    int (*peer)(int fd, vkp_peer *peer);
    /* The uid that stands for all users whom this process's user namespace (Linux) does not map;
       UINT32_MAX: each user has a uid. */
    uint32_t (*overflow_id)(void);
    /* The local port of a bound TCP socket. */
    int (*local_port)(int fd);
    /* Write at most `capacity` addresses of a TCP host and port to out; returns how many. May block
       on DNS for host names, not for addresses in digits. */
    int (*resolve)(const char *host, const char *port, vkp_address *out, size_t capacity);
    /* read(2): the number of bytes read, 0 at the end of file. */
    int64_t (*read)(int fd, void *buffer, size_t bytes);
    /* sendmsg(2): the number of bytes written, perhaps not all. Never raises SIGPIPE. */
    int64_t (*send)(int fd, const vkp_range *ranges, size_t count);
    /* write(2), for the pipes of wakes: the number of bytes written. */
    int64_t (*write)(int fd, const void *buffer, size_t bytes);
    /* close(2). */
    int (*close)(int fd);
    /* Open the file, created with mode 0600, and flock it: a descriptor that holds the lock.
       -EWOULDBLOCK: another process holds the lock. *id is the locked file. */
    int (*lock_file)(const char *path, vkp_file_id *id);
    /* lstat(2): writes *id. */
    int (*identify)(const char *path, vkp_file_id *id);
    /* chmod(2). */
    int (*chmod)(const char *path, uint32_t mode);
    /* unlink(2). */
    int (*unlink)(const char *path);
    /* Open a pair of descriptors for wakes: fds[0] polls readable after a write to fds[1]. Both may
       be one descriptor. */
    int (*wake_pair)(int fds[2]);
    /* poll(2) with a deadline, on an array of `count` struct pollfd. */
    int (*poll)(void *pollfds, size_t count, uint64_t deadline_ns);
    /* epoll_create1(2): a new descriptor. -ENOSYS where there is no epoll. */
    int (*epoll_create)(void);
    /* epoll_ctl(2), with a struct epoll_event. -ENOSYS where there is no epoll. */
    int (*epoll_ctl)(int epoll_fd, int operation, int fd, void *event);
    /* epoll_wait(2) with a deadline, on an array of struct epoll_event. -ENOSYS where there is no
       epoll. */
    int (*epoll_wait)(int epoll_fd, void *events, int capacity, uint64_t deadline_ns);
    /* kqueue(2): a new descriptor. -ENOSYS where there is no kqueue. */
    int (*kqueue_create)(void);
    /* kevent(2) with a deadline, on arrays of struct kevent: apply the changes, then wait for
       events. With event_count 0 it does not wait. -ENOSYS where there is no kqueue. */
    int (*kevent)(int kq, const void *changes, int change_count, void *events, int event_count,
                  uint64_t deadline_ns);
    /* The kind of a descriptor: VKP_FD_OTHER, VKP_FD_FILE or VKP_FD_SOCKET. */
    int (*fd_kind)(int fd);
};

/* The table of functions over libc. Static. Any thread. */
VKP_API const vkp_sys *vkp_sys_get_default(void);
