/* --------------------------------------------------------------------------------------
   >>api-base   Status, deadlines, environment                                             */

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

typedef enum vkp_status {
#define VKP_I_STATUS_ENUM(name, value, text) name = value,
    VKP_STATUS_MAP(VKP_I_STATUS_ENUM)
#undef VKP_I_STATUS_ENUM
} vkp_status;

/* The status as a short lower-case English text; never NULL, static. Any thread. */
VKP_API const char *vkp_status_str(vkp_status status);

/* The library's version at run time, "MAJOR.MINOR.PATCH"; static. Any thread. */
VKP_API const char *vkp_version_str(void);

/* Deadlines are absolute nanoseconds of the monotonic clock. 0 has always passed. */
#define VKP_FOREVER UINT64_MAX

/* In a config, where 0 means a default: a size without a limit, a time (_ms) that never comes. */
#define VKP_UNLIMITED SIZE_MAX
#define VKP_OFF UINT64_MAX

/* Now, in nanoseconds of the monotonic clock. Any thread. */
VKP_API uint64_t vkp_now_ns(void);

/* The deadline that many milliseconds from now; saturates at VKP_FOREVER. Any thread. */
VKP_API uint64_t vkp_after_ms(uint64_t ms);

/* The struct of that type whose member the pointer points to: what a vkp_io or vkp_timer is part
   of, in its callback.                                                                        */
#define VKP_CONTAINER(pointer, type, member) \
    ((type *)(void *)((char *)(pointer)-offsetof(type, member)))

typedef enum vkp_log_level {
    VKP_LOG_DEFAULT = 0, /* as VKP_LOG_WARN */
    VKP_LOG_ERROR = 1,
    VKP_LOG_WARN = 2,
    VKP_LOG_INFO = 3,
    VKP_LOG_DEBUG = 4
} vkp_log_level;

/* What an object takes from the program around it. Objects keep the POINTER: an env outlives
   every object opened with it. NULL env, and NULL members, mean the defaults.               */
struct vkp_env {
    /* realloc with sizes: ptr NULL allocates, new_bytes 0 frees and returns NULL. Must be
       callable from any thread. Default: the C library's. NULL for a non-zero size = failure. */
    void *(*alloc)(void *user, void *ptr, size_t old_bytes, size_t new_bytes);
    /* One line, no newline, at most 512 bytes. Any thread, never under a lock. Default: none. */
    void (*log)(void *user, vkp_log_level level, const char *text);
    void *user;              /* handed to both */
    vkp_log_level log_level; /* the most verbose level passed to log */
    const vkp_sys *sys;      /* operating system; default vkp_sys_get_default() */
    /* How often a thread looks again before it sleeps, about 20 ns apart; sleeping and waking cost
       some microseconds. Default: 200, and none where one processor is online.                */
    uint32_t spins;
};

#define VKP_SPINS_NONE UINT32_MAX /* vkp_env.spins: sleep at once */
