/* --------------------------------------------------------------------------------------
   >>api-base   Status, deadlines, environment                                             */

/* Each status as X(name, value, text). VKP_OK is 0, errors are negative, numbers never change. The
   text says what the status means; the contract of a call names the cause.                    */
#define VKP_STATUS_MAP(X)                                                     \
    X(VKP_OK, 0, "ok")                                                        \
    X(VKP_ERR_INVALID, -1, "invalid argument or use")                         \
    X(VKP_ERR_NOMEM, -2, "out of memory")                                     \
    X(VKP_ERR_SYS, -3, "a system call failed; see errno")                     \
    X(VKP_ERR_EMPTY, -4, "nothing there yet")                                 \
    X(VKP_ERR_FULL, -5, "no room")                                            \
    X(VKP_ERR_CLOSED, -6, "closed")                                           \
    X(VKP_ERR_TIMEOUT, -7, "deadline passed")                                 \
    X(VKP_ERR_CANCELLED, -8, "cancelled")                                     \
    X(VKP_ERR_PROTOCOL, -9, "the peer broke the protocol")                    \
    X(VKP_ERR_LIMIT, -10, "a configured limit was exceeded")                  \
    X(VKP_ERR_EXISTS, -11, "exists already")                                  \
    X(VKP_ERR_NOT_FOUND, -12, "not found")                                    \
    X(VKP_ERR_IN_USE, -13, "in use by another process or handle")             \
    X(VKP_ERR_DISCONNECTED, -14, "not connected to the server")               \
    X(VKP_ERR_REFUSED, -15, "the server or this library refused the request") \
    X(VKP_ERR_DROPPED, -16, "dropped by the queue's policy")                  \
    X(VKP_ERR_UNSUPPORTED, -17, "not supported here")                         \
    X(VKP_ERR_LAGGED, -18, "values were lost to a receiver too slow")

/* The result of a call that can fail: VKP_OK, or an error of VKP_STATUS_MAP. */
typedef enum vkp_status {
#define VKP_I_STATUS_ENUM(name, value, text) name = value,
    VKP_STATUS_MAP(VKP_I_STATUS_ENUM)
#undef VKP_I_STATUS_ENUM
} vkp_status;

/* The status as a short lower-case English text: static, never NULL. Any thread. */
VKP_API const char *vkp_status_str(vkp_status status);

/* The version of the compiled library as "MAJOR.MINOR.PATCH": static. Any thread. */
VKP_API const char *vkp_version_str(void);

/* A deadline that never passes. Deadlines are absolute nanoseconds of the monotonic clock; the
   deadline 0 has always passed.                                                               */
#define VKP_FOREVER UINT64_MAX

/* A size without a limit, for a config in which 0 means a default. */
#define VKP_UNLIMITED SIZE_MAX

/* A time (_ms) that never comes, for a config in which 0 means a default. */
#define VKP_OFF UINT64_MAX

/* The current time in nanoseconds of the monotonic clock. Any thread. */
VKP_API uint64_t vkp_now_ns(void);

/* The deadline `ms` milliseconds from now by the system's clock; saturates at VKP_FOREVER. For a
   loop with a clock of its own (vkp_backend_null) use vkp_loop_after_ms. Any thread.          */
VKP_API uint64_t vkp_after_ms(uint64_t ms);

/* The struct `type` whose field `member` is at `pointer`. A callback that receives a vkp_io or a
   vkp_timer finds with it the program's struct that contains the vkp_io or vkp_timer.         */
#define VKP_CONTAINER(pointer, type, member) \
    ((type *)(void *)((char *)(pointer)-offsetof(type, member)))

/* How serious a log line is; a larger value is more verbose. */
typedef enum vkp_log_level {
    VKP_LOG_DEFAULT = 0, /* in vkp_env.log_level: the same as VKP_LOG_WARN */
    VKP_LOG_ERROR = 1,   /* an operation failed */
    VKP_LOG_WARN = 2,    /* the library continues, without something that the program asked for */
    VKP_LOG_INFO = 3,    /* events of operation: connections lost or made, sockets taken over */
    VKP_LOG_DEBUG = 4    /* details: how the connection of each client of a relay ended */
} vkp_log_level;

/* What an object takes from the program: memory, log function, system calls. Objects keep the
   POINTER: an env must outlive every object opened with it. A NULL env means all defaults, and a
   zero field means the default of that field.                                                 */
struct vkp_env {
    /* Allocates (ptr NULL), resizes, or frees (new_bytes 0, returns NULL): realloc with sizes. NULL
       for a non-zero new_bytes means no memory. Called from any thread. NULL: the C library's. */
    void *(*alloc)(void *user, void *ptr, size_t old_bytes, size_t new_bytes);

    /* Receives one log line: at most 511 bytes and a NUL, control characters as \xNN, no newline.
       Called from any thread, never under a lock. NULL: nothing is logged.                    */
    void (*log)(void *user, vkp_log_level level, const char *text);

    void *user;              /* the first argument of alloc and of log */
    vkp_log_level log_level; /* the most verbose level that log receives; 0: VKP_LOG_WARN */
    const vkp_sys *sys;      /* the table of system calls; NULL: vkp_sys_get_default() */

    /* How many times a waiting thread checks again before it sleeps, about 20 ns apart; to sleep
       and wake costs some microseconds. 0: 200, or none where one processor is online.        */
    uint32_t spins;
};

/* vkp_env.spins: a waiting thread sleeps immediately. */
#define VKP_SPINS_NONE UINT32_MAX
