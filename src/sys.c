/* ======================================================================================
   >>impl-sys   The operating system behind one table
   ======================================================================================
   Only this section makes system calls (the mutexes of the base section aside). Results are >= 0
   or a negated errno. Differences between systems end here: Linux has accept4 and eventfd; macOS
   refuses MSG_NOSIGNAL, so SO_NOSIGPIPE is set instead; a futex takes absolute monotonic deadlines,
   a condition variable takes them on some systems only (not on macOS).
   Threads: a parker belongs to the one thread that parks in it; any thread may unpark it. The
   functions here hold no lock when they return and keep no state but the number of processors. */

#define VKP_I_NS_PER_S 1000000000u
#define VKP_I_NS_PER_US 1000u
#define VKP_I_US_PER_S 1000000u

static uint64_t vkp_i_os_clock_ns(void)
{
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * VKP_I_NS_PER_S + (uint64_t)now.tv_nsec;
}

static uint64_t vkp_i_os_wall_ns(void)
{
    struct timespec now;
    (void)clock_gettime(CLOCK_REALTIME, &now);
    return (uint64_t)now.tv_sec * VKP_I_NS_PER_S + (uint64_t)now.tv_nsec;
}

static uint64_t vkp_i_os_random_u64(void)
{
    uint64_t value = 0;
#if VKP_I_LINUX
    if (getrandom(&value, sizeof value, GRND_NONBLOCK) == (ssize_t)sizeof value) {
        return value;
    }
#else
    arc4random_buf(&value, sizeof value);
    return value;
#endif
    /* Early in the boot getrandom has no entropy yet and fails. The fallback is one step of
       splitmix64 from the clock: good enough for jitter and names, not for secrets. */
    value = vkp_i_os_clock_ns() + 0x9e3779b97f4a7c15u;
    value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9u;
    value = (value ^ (value >> 27)) * 0x94d049bb133111ebu;
    return value ^ (value >> 31);
}

static int vkp_i_os_process_id(void)
{
    return (int)getpid();
}

static uint32_t vkp_i_os_user_id(void)
{
    return (uint32_t)geteuid();
}

/* The states of a parker. */
#define VKP_I_PARK_EMPTY 0u    /* no thread sleeps, no notification arrived */
#define VKP_I_PARK_NOTIFIED 1u /* unpark was called: park returns */
#define VKP_I_PARK_ASLEEP 2u   /* Linux: a thread sleeps in the futex, unpark must wake it */

struct vkp_parker {
    uint32_t state; /* atomic: VKP_I_PARK_*, written by park and unpark */
#if !VKP_I_LINUX
    pthread_mutex_t mutex;
    pthread_cond_t condition;
#endif
};

#if VKP_I_LINUX
/* On a 32-bit system SYS_futex takes a time of two 32-bit words, even where libc made time_t 64
   bits wide. Newer 32-bit systems have SYS_futex_time64 alone, with two 64-bit words. */
#ifdef SYS_futex
#define VKP_I_FUTEX SYS_futex
typedef long vkp_i_futex_number;
#else
#define VKP_I_FUTEX SYS_futex_time64
typedef long long vkp_i_futex_number;
#endif

/* Values of the kernel's <linux/futex.h>, which is not installed with every libc (musl). */
#define VKP_I_FUTEX_WAKE_PRIVATE (1 | 128)        /* FUTEX_WAKE | FUTEX_PRIVATE_FLAG */
#define VKP_I_FUTEX_WAIT_BITSET_PRIVATE (9 | 128) /* FUTEX_WAIT_BITSET | FUTEX_PRIVATE_FLAG */
#define VKP_I_FUTEX_ANY 0xffffffffu               /* FUTEX_BITSET_MATCH_ANY */
#define VKP_I_FUTEX_MOST_S 0x7fffffffu /* 68 years fit in 32 bits; park then waits again */

static void vkp_i_parker_init(vkp_parker *parker)
{
    parker->state = VKP_I_PARK_EMPTY;
}

static void vkp_i_parker_deinit(vkp_parker *parker)
{
    (void)parker;
}

/* Sleep until unpark or the deadline; never returns early. The state ASLEEP makes unpark call the
   kernel. The exchange in unpark pairs with the acquire load here: what the waking thread wrote
   before is visible after park returned. */
static void vkp_i_os_park(vkp_parker *parker, uint64_t deadline_ns)
{
    struct {
        vkp_i_futex_number s;
        vkp_i_futex_number ns;
    } until;
    uint64_t s = deadline_ns / VKP_I_NS_PER_S;
    uint32_t state = VKP_I_PARK_EMPTY;
    (void)VKP_I_CAS(&parker->state, &state, VKP_I_PARK_ASLEEP);
    until.s = (vkp_i_futex_number)(s < VKP_I_FUTEX_MOST_S ? s : VKP_I_FUTEX_MOST_S);
    until.ns = (vkp_i_futex_number)(deadline_ns % VKP_I_NS_PER_S);
    while (VKP_I_LOAD_ACQ(&parker->state) != VKP_I_PARK_NOTIFIED) {
        if (deadline_ns != VKP_FOREVER && vkp_i_os_clock_ns() >= deadline_ns) {
            return;
        }
        (void)syscall(VKP_I_FUTEX, &parker->state, VKP_I_FUTEX_WAIT_BITSET_PRIVATE,
                      VKP_I_PARK_ASLEEP, deadline_ns == VKP_FOREVER ? NULL : &until, NULL,
                      VKP_I_FUTEX_ANY);
    }
}

/* After the exchange the parked thread may return and free the parker. FUTEX_WAKE on a freed
   address is harmless: at most another futex there wakes early, and its owner checks again. */
static void vkp_i_os_unpark(vkp_parker *parker)
{
    if (VKP_I_XCHG(&parker->state, VKP_I_PARK_NOTIFIED) == VKP_I_PARK_ASLEEP) {
        (void)syscall(VKP_I_FUTEX, &parker->state, VKP_I_FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
    }
}
#else
static void vkp_i_parker_init(vkp_parker *parker)
{
    parker->state = VKP_I_PARK_EMPTY;
    (void)pthread_mutex_init(&parker->mutex, NULL);
#if VKP_I_APPLE
    (void)pthread_cond_init(&parker->condition, NULL);
#else
    {
        pthread_condattr_t attributes;
        (void)pthread_condattr_init(&attributes);
        (void)pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
        (void)pthread_cond_init(&parker->condition, &attributes);
        (void)pthread_condattr_destroy(&attributes);
    }
#endif
}

static void vkp_i_parker_deinit(vkp_parker *parker)
{
    (void)pthread_cond_destroy(&parker->condition);
    (void)pthread_mutex_destroy(&parker->mutex);
}

static void vkp_i_os_park(vkp_parker *parker, uint64_t deadline_ns)
{
    (void)pthread_mutex_lock(&parker->mutex);
    while (VKP_I_LOAD_ACQ(&parker->state) != VKP_I_PARK_NOTIFIED) {
        uint64_t now = vkp_i_os_clock_ns();
        struct timespec wait;
        if (deadline_ns == VKP_FOREVER) {
            (void)pthread_cond_wait(&parker->condition, &parker->mutex);
            continue;
        }
        if (now >= deadline_ns) {
            break;
        }
#if VKP_I_APPLE
        wait.tv_sec = (time_t)((deadline_ns - now) / VKP_I_NS_PER_S);
        wait.tv_nsec = (long)((deadline_ns - now) % VKP_I_NS_PER_S);
        (void)pthread_cond_timedwait_relative_np(&parker->condition, &parker->mutex, &wait);
#else
        wait.tv_sec = (time_t)(deadline_ns / VKP_I_NS_PER_S);
        wait.tv_nsec = (long)(deadline_ns % VKP_I_NS_PER_S);
        (void)pthread_cond_timedwait(&parker->condition, &parker->mutex, &wait);
#endif
    }
    (void)pthread_mutex_unlock(&parker->mutex);
}

static void vkp_i_os_unpark(vkp_parker *parker)
{
    (void)pthread_mutex_lock(&parker->mutex);
    VKP_I_STORE_REL(&parker->state, VKP_I_PARK_NOTIFIED);
    (void)pthread_cond_signal(&parker->condition);
    (void)pthread_mutex_unlock(&parker->mutex);
}
#endif

static void vkp_i_os_yield(void)
{
    (void)sched_yield();
}

/* Processors online, at least 1. Read once and kept: every channel that opens needs the number. */
static uint32_t vkp_i_os_processors(void)
{
    static uint32_t known;
    uint32_t count = VKP_I_LOAD(&known);
    if (count == 0) {
        long online = sysconf(_SC_NPROCESSORS_ONLN);
        count = online > 0 ? (uint32_t)online : 1u;
        VKP_I_STORE(&known, count);
    }
    return count;
}

/* Commands of membarrier(2): values of the kernel's <linux/membarrier.h>. */
#define VKP_I_MEMBARRIER_PREPARE (1 << 4) /* MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED */
#define VKP_I_MEMBARRIER_NOW (1 << 3)     /* MEMBARRIER_CMD_PRIVATE_EXPEDITED */

/* Needs Linux 4.14; a sandbox may refuse the call. Other systems: -ENOSYS. */
static int vkp_i_os_membarrier(bool prepare)
{
#if VKP_I_LINUX && defined(SYS_membarrier)
    const int command = prepare ? VKP_I_MEMBARRIER_PREPARE : VKP_I_MEMBARRIER_NOW;
    return syscall(SYS_membarrier, command, 0, 0) == 0 ? 0 : -errno;
#else
    (void)prepare;
    return -ENOSYS;
#endif
}

#if VKP_I_IO
/* The result of a libc call: -1 becomes the negated errno. */
static int vkp_i_os_result(int result)
{
    return result < 0 ? -errno : result;
}

/* Make a descriptor non-blocking and close-on-exec, and keep it from raising SIGPIPE. */
static int vkp_i_os_prepare(int fd)
{
    int status = fcntl(fd, F_GETFL);
    if (status < 0 || fcntl(fd, F_SETFL, status | O_NONBLOCK) < 0 ||
        fcntl(fd, F_SETFD, FD_CLOEXEC) < 0) {
        return -errno;
    }
#ifdef SO_NOSIGPIPE
    {
        int on = 1;
        (void)setsockopt(fd, SOL_SOCKET, SO_NOSIGPIPE, &on, sizeof on); /* fails without a socket */
    }
#endif
    return 0;
}

#if !VKP_I_LINUX
/* Prepare a new descriptor, or close it when that fails. -1 gives the negated errno. */
static int vkp_i_os_prepared(int fd)
{
    int status;
    if (fd < 0) {
        return -errno;
    }
    status = vkp_i_os_prepare(fd);
    if (status < 0) {
        (void)close(fd);
        return status;
    }
    return fd;
}
#endif

static int vkp_i_os_socket(int family, int type)
{
#if VKP_I_LINUX
    return vkp_i_os_result(socket(family, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
#else
    return vkp_i_os_prepared(socket(family, type, 0));
#endif
}

static int vkp_i_os_bind(int fd, const void *address, uint32_t bytes, uint32_t mode)
{
    struct sockaddr_storage copy;
    int on = 1;
    if (bytes > sizeof copy) {
        return -EINVAL;
    }
    memcpy(&copy, address, bytes);
    if (copy.ss_family == AF_UNIX) {
        (void)fchmod(fd, (mode_t)mode); /* Linux: the file's mode; elsewhere chmod follows */
    } else {
        (void)setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    }
    return vkp_i_os_result(bind(fd, (const struct sockaddr *)&copy, (socklen_t)bytes));
}

static int vkp_i_os_listen(int fd, int backlog)
{
    return vkp_i_os_result(listen(fd, backlog));
}

static int vkp_i_os_accept(int fd)
{
#if VKP_I_LINUX
    return vkp_i_os_result(accept4(fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC));
#else
    return vkp_i_os_prepared(accept(fd, NULL, NULL));
#endif
}

static int vkp_i_os_connect(int fd, const void *address, uint32_t bytes)
{
    struct sockaddr_storage copy;
    if (bytes > sizeof copy) {
        return -EINVAL;
    }
    memcpy(&copy, address, bytes);
    return vkp_i_os_result(connect(fd, (const struct sockaddr *)&copy, (socklen_t)bytes));
}

static int vkp_i_os_socket_error(int fd)
{
    int error = 0;
    socklen_t bytes = sizeof error;
    if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &bytes) < 0) {
        return -errno;
    }
    return -error;
}

static int vkp_i_os_set_nodelay(int fd)
{
    int on = 1;
    return vkp_i_os_result(setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on));
}

#if defined(TCP_KEEPIDLE)
#define VKP_I_KEEP_IDLE TCP_KEEPIDLE
#elif defined(TCP_KEEPALIVE) /* macOS */
#define VKP_I_KEEP_IDLE TCP_KEEPALIVE
#endif
#define VKP_I_MS_PER_S 1000u
#define VKP_I_KEEP_PROBES 3 /* unanswered probes that end a connection */

/* Milliseconds as seconds of an int, at least 1. */
static int vkp_i_to_seconds(uint64_t ms)
{
    uint64_t seconds = ms / VKP_I_MS_PER_S;
    return seconds == 0 ? 1 : seconds > 32767 ? 32767 : (int)seconds;
}

static int vkp_i_os_set_liveness(int fd, uint64_t keepalive_ms, uint64_t unacked_ms)
{
    int on = 1;
    int idle = vkp_i_to_seconds(keepalive_ms);
    int interval = vkp_i_to_seconds(keepalive_ms / VKP_I_KEEP_PROBES);
    int probes = VKP_I_KEEP_PROBES;
    int result = 0;
    if (keepalive_ms > 0) {
        result = vkp_i_os_result(setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on));
#if defined(VKP_I_KEEP_IDLE)
        (void)setsockopt(fd, IPPROTO_TCP, VKP_I_KEEP_IDLE, &idle, sizeof idle);
#endif
#if defined(TCP_KEEPINTVL) && defined(TCP_KEEPCNT)
        (void)setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof interval);
        (void)setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof probes);
#endif
    }
    if (unacked_ms > 0) {
#if defined(TCP_USER_TIMEOUT)
        unsigned ms = unacked_ms > INT_MAX ? (unsigned)INT_MAX : (unsigned)unacked_ms;
        (void)setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &ms, sizeof ms);
#elif defined(TCP_RXT_CONNDROPTIME) /* macOS */
        int seconds = vkp_i_to_seconds(unacked_ms);
        (void)setsockopt(fd, IPPROTO_TCP, TCP_RXT_CONNDROPTIME, &seconds, sizeof seconds);
#endif
    }
    (void)idle;
    (void)interval;
    (void)probes;
    return result;
}

#if VKP_I_LINUX
/* Read a file of /proc, at most size - 1 bytes, and terminate it. False: it cannot be read. */
static bool vkp_i_os_read_proc(const char *path, char *text, size_t size)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t got = -1;
    if (fd >= 0) {
        do {
            got = read(fd, text, size - 1);
        } while (got < 0 && errno == EINTR);
        (void)close(fd);
    }
    text[got > 0 ? got : 0] = '\0';
    return got >= 0;
}

/* The map of the first namespace, and of any that maps all, is one line: from 0, to 0, all. */
static uint32_t vkp_i_os_overflow_id(void)
{
    char text[256];
    unsigned long inside;
    unsigned long outside;
    unsigned long count;
    if (!vkp_i_os_read_proc("/proc/self/uid_map", text, sizeof text) ||
        (sscanf(text, "%lu %lu %lu", &inside, &outside, &count) == 3 && inside == 0 &&
         count >= UINT32_MAX)) {
        return UINT32_MAX;
    }
    if (!vkp_i_os_read_proc("/proc/sys/kernel/overflowuid", text, sizeof text) ||
        sscanf(text, "%lu", &inside) != 1) {
        return 65534; /* the kernel's default */
    }
    return (uint32_t)inside;
}
#else
static uint32_t vkp_i_os_overflow_id(void)
{
    return UINT32_MAX;
}
#endif

static int vkp_i_os_peer(int fd, vkp_peer *peer)
{
#if VKP_I_LINUX
    struct ucred found;
    socklen_t bytes = sizeof found;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &found, &bytes) < 0) {
        return -errno;
    }
    peer->uid = (uint32_t)found.uid;
    peer->gid = (uint32_t)found.gid;
    peer->pid = (int)found.pid;
#else
    uid_t user;
    gid_t group;
    if (getpeereid(fd, &user, &group) < 0) {
        return -errno;
    }
    peer->uid = (uint32_t)user;
    peer->gid = (uint32_t)group;
    peer->pid = 0;
#ifdef LOCAL_PEERPID
    {
        pid_t pid = 0;
        socklen_t bytes = sizeof pid;
        if (getsockopt(fd, 0 /* SOL_LOCAL */, LOCAL_PEERPID, &pid, &bytes) == 0) {
            peer->pid = (int)pid;
        }
    }
#endif
#endif
    return 0;
}

static int vkp_i_os_local_port(int fd)
{
    union {
        struct sockaddr any;
        struct sockaddr_in v4;
        struct sockaddr_in6 v6;
    } local;
    socklen_t bytes = sizeof local;
    if (getsockname(fd, &local.any, &bytes) < 0) {
        return -errno;
    }
    return local.any.sa_family == AF_INET6 ? (int)ntohs(local.v6.sin6_port)
                                           : (int)ntohs(local.v4.sin_port);
}

/* Numeric addresses are tried first: getaddrinfo then sends no query to a name server. */
static int vkp_i_os_resolve(const char *host, const char *port, vkp_address *out, size_t capacity)
{
    struct addrinfo hints;
    struct addrinfo *found = NULL;
    struct addrinfo *each;
    size_t count = 0;
    memset(&hints, 0, sizeof hints);
    hints.ai_family = AF_UNSPEC;
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV;
    if (getaddrinfo(host, port, &hints, &found) != 0) {
        hints.ai_flags = AI_NUMERICSERV;
        if (getaddrinfo(host, port, &hints, &found) != 0) {
            return -ENOENT;
        }
    }
    for (each = found; each != NULL && count < capacity; each = each->ai_next) {
        if (each->ai_addrlen <= sizeof out->storage) {
            out[count].bytes = (uint32_t)each->ai_addrlen;
            out[count].family = (uint16_t)each->ai_family;
            memcpy(out[count].storage.bytes, each->ai_addr, each->ai_addrlen);
            count++;
        }
    }
    freeaddrinfo(found);
    return count > 0 ? (int)count : -ENOENT;
}

static int64_t vkp_i_os_read(int fd, void *buffer, size_t bytes)
{
    ssize_t got = read(fd, buffer, bytes);
    return got < 0 ? -(int64_t)errno : (int64_t)got;
}

/* A wake may be called in a signal handler, so errno is restored for the interrupted code. */
static int64_t vkp_i_os_write(int fd, const void *buffer, size_t bytes)
{
    int before = errno;
    ssize_t put = write(fd, buffer, bytes);
    int64_t result = put < 0 ? -(int64_t)errno : (int64_t)put;
    errno = before;
    return result;
}

#define VKP_I_SEND_RANGES 64 /* ranges of one sendmsg; further ranges go with the next call */

static int64_t vkp_i_os_send(int fd, const vkp_range *ranges, size_t count)
{
    struct msghdr message;
    struct iovec vectors[VKP_I_SEND_RANGES];
    ssize_t put;
    size_t i;
    int flags = 0;
#ifdef MSG_NOSIGNAL
    flags = MSG_NOSIGNAL;
#endif
    if (count == 1) { /* the case of a fan-out; sendmsg's header would be a seventh of the cost */
        put = send(fd, ranges->base, ranges->len, flags);
        return put < 0 ? -(int64_t)errno : (int64_t)put;
    }
    if (count > VKP_I_SEND_RANGES) {
        count = VKP_I_SEND_RANGES;
    }
    for (i = 0; i < count; i++) {
        memcpy(&vectors[i].iov_base, &ranges[i].base, sizeof ranges[i].base); /* drops const */
        vectors[i].iov_len = ranges[i].len;
    }
    memset(&message, 0, sizeof message);
    message.msg_iov = vectors;
#if VKP_I_LINUX && defined(__GLIBC__)
    message.msg_iovlen = count;
#else
    message.msg_iovlen = (int)count;
#endif
    put = sendmsg(fd, &message, flags);
    return put < 0 ? -(int64_t)errno : (int64_t)put;
}

static int vkp_i_os_close(int fd)
{
    return vkp_i_os_result(close(fd));
}

#define VKP_I_PERMISSION_BITS 07777u /* of st_mode: permissions, set-id bits and the sticky bit */
#define VKP_I_LOCK_FILE_MODE 0600    /* of PATH.lock: read and written by its owner only */

/* Copy from stat what identifies a file. */
static void vkp_i_os_file_id(const struct stat *found, vkp_file_id *id)
{
    id->device = (uint64_t)found->st_dev;
    id->inode = (uint64_t)found->st_ino;
    id->uid = (uint32_t)found->st_uid;
    id->mode = (uint32_t)found->st_mode & VKP_I_PERMISSION_BITS;
    id->is_socket = S_ISSOCK(found->st_mode);
}

/* The lock is valid only if the locked file is still the file at the path. The last holder unlinks
   the file while it holds the lock, so a file opened just before that has no name any longer. */
static int vkp_i_os_lock_file(const char *path, vkp_file_id *id)
{
    for (;;) {
        struct stat opened;
        struct stat named;
        int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, VKP_I_LOCK_FILE_MODE);
        int error;
        if (fd < 0) {
            return -errno;
        }
        if (flock(fd, LOCK_EX | LOCK_NB) < 0) {
            error = errno;
            (void)close(fd);
            return -error;
        }
        if (fstat(fd, &opened) == 0 && lstat(path, &named) == 0 && opened.st_dev == named.st_dev &&
            opened.st_ino == named.st_ino) {
            vkp_i_os_file_id(&opened, id);
            return fd;
        }
        (void)close(fd);
    }
}

static int vkp_i_os_identify(const char *path, vkp_file_id *id)
{
    struct stat found;
    if (lstat(path, &found) < 0) {
        return -errno;
    }
    vkp_i_os_file_id(&found, id);
    return 0;
}

static int vkp_i_os_chmod(const char *path, uint32_t mode)
{
    return vkp_i_os_result(chmod(path, (mode_t)mode));
}

static int vkp_i_os_unlink(const char *path)
{
    return vkp_i_os_result(unlink(path));
}

static int vkp_i_os_wake_pair(int fds[2])
{
#if VKP_I_LINUX
    int fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (fd < 0) {
        return -errno;
    }
    fds[0] = fd;
    fds[1] = fd;
    return 0;
#else
    int status;
    int i;
    if (pipe(fds) < 0) {
        return -errno;
    }
    for (i = 0; i < 2; i++) {
        status = vkp_i_os_prepare(fds[i]);
        if (status < 0) {
            (void)close(fds[0]);
            (void)close(fds[1]);
            return status;
        }
    }
    return 0;
#endif
}

/* Milliseconds until the deadline, rounded up so that a wait never ends early. */
static int vkp_i_os_timeout_ms(uint64_t deadline_ns)
{
    uint64_t now;
    uint64_t ms;
    if (deadline_ns == 0) {
        return 0;
    }
    if (deadline_ns == VKP_FOREVER) {
        return -1;
    }
    now = vkp_i_os_clock_ns();
    if (deadline_ns <= now) {
        return 0;
    }
    ms = (deadline_ns - now + VKP_I_NS_PER_MS - 1) / VKP_I_NS_PER_MS;
    return ms > (uint64_t)INT_MAX ? INT_MAX : (int)ms;
}

static int vkp_i_os_poll(void *pollfds, size_t count, uint64_t deadline_ns)
{
    return vkp_i_os_result(
        poll((struct pollfd *)pollfds, (nfds_t)count, vkp_i_os_timeout_ms(deadline_ns)));
}

static int vkp_i_os_epoll_create(void)
{
#if VKP_I_LINUX
    return vkp_i_os_result(epoll_create1(EPOLL_CLOEXEC));
#else
    return -ENOSYS;
#endif
}

static int vkp_i_os_epoll_ctl(int epoll_fd, int operation, int fd, void *event)
{
#if VKP_I_LINUX
    return vkp_i_os_result(epoll_ctl(epoll_fd, operation, fd, (struct epoll_event *)event));
#else
    (void)epoll_fd;
    (void)operation;
    (void)fd;
    (void)event;
    return -ENOSYS;
#endif
}

static int vkp_i_os_epoll_wait(int epoll_fd, void *events, int capacity, uint64_t deadline_ns)
{
#if VKP_I_LINUX
    return vkp_i_os_result(epoll_wait(epoll_fd, (struct epoll_event *)events, capacity,
                                      vkp_i_os_timeout_ms(deadline_ns)));
#else
    (void)epoll_fd;
    (void)events;
    (void)capacity;
    (void)deadline_ns;
    return -ENOSYS;
#endif
}

static int vkp_i_os_kqueue_create(void)
{
#if VKP_I_LINUX
    return -ENOSYS;
#else
    int kq = kqueue();
    if (kq < 0) {
        return -errno;
    }
    (void)fcntl(kq, F_SETFD, FD_CLOEXEC);
    return kq;
#endif
}

#define VKP_I_KEVENT_MOST_S 86400u /* one day: the lowest limit among the kernels */

/* The time-out is rounded up to whole microseconds, because some kernels cut off smaller parts.
   Kernels limit the time-out (to one day, to three years) or refuse a longer one, and may measure
   it with another clock: so the code compares our clock with the deadline, and waits again. */
static int vkp_i_os_kevent(int kq, const void *changes, int change_count, void *events,
                           int event_count, uint64_t deadline_ns)
{
#if VKP_I_LINUX
    (void)kq;
    (void)changes;
    (void)change_count;
    (void)events;
    (void)event_count;
    (void)deadline_ns;
    return -ENOSYS;
#else
    const int before = errno;
    int result;
    bool too_early;
    do {
        const uint64_t now = deadline_ns == 0 ? 0 : vkp_i_os_clock_ns();
        uint64_t us = deadline_ns > now ? (deadline_ns - now - 1) / VKP_I_NS_PER_US + 1u : 0;
        struct timespec wait;
        us = VKP_I_MIN(us, (uint64_t)VKP_I_KEVENT_MOST_S * VKP_I_US_PER_S);
        wait.tv_sec = (time_t)(us / VKP_I_US_PER_S);
        wait.tv_nsec = (long)(us % VKP_I_US_PER_S * VKP_I_NS_PER_US);
        result = vkp_i_os_result(kevent(kq, (const struct kevent *)changes, change_count,
                                        (struct kevent *)events, event_count,
                                        deadline_ns == VKP_FOREVER ? NULL : &wait));
        change_count = 0;
        too_early = result == 0 && event_count > 0 && us > 0 && vkp_i_os_clock_ns() < deadline_ns;
    } while (too_early);
    errno = before;
    return result;
#endif
}

/* VKP_FD_FILE for a regular file, VKP_FD_SOCKET, or VKP_FD_OTHER. */
static int vkp_i_os_fd_kind(int fd)
{
    struct stat found;
    if (fstat(fd, &found) < 0) {
        return -errno;
    }
    return S_ISREG(found.st_mode)    ? VKP_FD_FILE
           : S_ISSOCK(found.st_mode) ? VKP_FD_SOCKET
                                     : VKP_FD_OTHER;
}
/* A member of the table that exists only with VKP_I_IO. */
#define VKP_I_OS(name) vkp_i_os_##name
#else
#define VKP_I_OS(name) NULL
#endif /* VKP_I_IO */

VKP_API const vkp_sys *vkp_sys_get_default(void)
{
    static const vkp_sys table = {
        vkp_i_os_clock_ns,       vkp_i_os_wall_ns,    vkp_i_os_random_u64,
        vkp_i_os_process_id,     vkp_i_os_user_id,    vkp_i_os_park,
        vkp_i_os_unpark,         vkp_i_os_yield,      vkp_i_os_processors,
        vkp_i_os_membarrier,     VKP_I_OS(socket),    VKP_I_OS(bind),
        VKP_I_OS(listen),        VKP_I_OS(accept),    VKP_I_OS(connect),
        VKP_I_OS(socket_error),  VKP_I_OS(prepare),   VKP_I_OS(set_nodelay),
        VKP_I_OS(set_liveness),  VKP_I_OS(peer),      VKP_I_OS(overflow_id),
        VKP_I_OS(local_port),    VKP_I_OS(resolve),   VKP_I_OS(read),
        VKP_I_OS(send),          VKP_I_OS(write),     VKP_I_OS(close),
        VKP_I_OS(lock_file),     VKP_I_OS(identify),  VKP_I_OS(chmod),
        VKP_I_OS(unlink),        VKP_I_OS(wake_pair), VKP_I_OS(poll),
        VKP_I_OS(epoll_create),  VKP_I_OS(epoll_ctl), VKP_I_OS(epoll_wait),
        VKP_I_OS(kqueue_create), VKP_I_OS(kevent),    VKP_I_OS(fd_kind)};
    return &table;
}

/* The table of an env, or the default one. */
static const vkp_sys *vkp_i_sys(const vkp_env *env)
{
    return env->sys != NULL ? env->sys : vkp_sys_get_default();
}

VKP_API uint64_t vkp_now_ns(void)
{
    return vkp_sys_get_default()->clock_ns();
}

VKP_API uint64_t vkp_after_ms(uint64_t ms)
{
    return vkp_i_after_ms(vkp_now_ns(), ms);
}
