#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-backend   The contract of backends                                                */

#define VKP_BACKEND_ABI 1u

/* vkp_backend.flags */
#define VKP_BACKEND_GUEST 1u /* a loop of the program's own waits; wait() is not called to block */
#define VKP_BACKEND_VIRTUAL_TIME 2u /* the backend keeps the clock (see clock_ns)               */

typedef struct vkp_event {
    uint64_t token; /* as given to watch */
    uint32_t ready; /* VKP_IO_READ | VKP_IO_WRITE | VKP_IO_HUP | VKP_IO_ERROR */
} vkp_event;

/* What a backend gets at open; valid until its close. */
typedef struct vkp_backend_host {
    const vkp_env *env;        /* members filled in, sys never NULL */
    void *foreign;             /* vkp_loop_config.foreign: the program's own loop, for guests */
    void *loop;                /* handed back in `round` */
    void (*round)(void *loop); /* guests: run one round without waiting (loop thread only) */
} vkp_backend_host;

/* A backend is one constant struct. docs/porting-a-backend.md is its manual, tests/
   backend_conformance.cpp its proof. All calls come from the loop's thread, except wake.      */
struct vkp_backend {
    uint32_t abi;   /* VKP_BACKEND_ABI */
    uint32_t flags; /* VKP_BACKEND_* */
    const char *name;
    vkp_status (*open)(const vkp_backend_host *host, void **state);
    void (*close)(void *state);
    /* Interest in fd is exactly this, replacing what was; 0 removes it. Idempotent.
       Level-triggered. The token comes back with each event. Errors: NOMEM, SYS (with errno),
       INVALID (fd < 0).                                                                       */
    vkp_status (*set_interest)(void *state, int fd, uint32_t interest, uint64_t token);
    /* Up to capacity events. Waits until one is there, wake was called, or the deadline passed
       (0 never waits; time-outs round up). EINTR is zero events. Errors: SYS (with errno).   */
    vkp_status (*wait)(void *state, uint64_t deadline_ns, vkp_event *out, size_t capacity,
                       size_t *count);
    /* Any thread or signal handler. Coalesces; a wake before a wait ends that wait at once. */
    void (*wake)(void *state);
    /* Guests: run a round at that deadline. NULL for backends that own the wait. */
    vkp_status (*timer)(void *state, uint64_t deadline_ns);
    /* In a forked child, before anything else: stop sharing kernel state with the parent. */
    vkp_status (*after_fork)(void *state);
    /* A descriptor that polls readable when wait would give events, or -1. */
    int (*pollable_fd)(void *state);
    /* VKP_BACKEND_VIRTUAL_TIME: the clock. Otherwise NULL. */
    uint64_t (*clock_ns)(void *state);
};

/* The backends of this tree; link the file of the one you use. */
extern const vkp_backend vkp_backend_poll;   /* backends/vkp_backend_poll.c: any POSIX          */
extern const vkp_backend vkp_backend_epoll;  /* backends/vkp_backend_epoll.c: Linux             */
extern const vkp_backend vkp_backend_kqueue; /* backends/vkp_backend_kqueue.c: macOS, the BSDs  */
extern const vkp_backend vkp_backend_null;   /* backends/vkp_backend_null.c: tests;
                                                virtual time, events in fd order               */

/* Guests: vkp_loop_config.foreign is the program's own loop. docs/embedding.md has the rules. */
extern const vkp_backend vkp_backend_libev;    /* backends/vkp_backend_libev.c: struct ev_loop *  */
extern const vkp_backend vkp_backend_libuv;    /* backends/vkp_backend_libuv.c: uv_loop_t *       */
extern const vkp_backend vkp_backend_libevent; /* ..._libevent.c: struct event_base *             */

#endif /* VKP_NO_IO */
