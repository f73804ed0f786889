#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-backend   The contract of backends */

/* The version of struct vkp_backend: vkp_backend.abi. */
#define VKP_BACKEND_ABI 1u

/* A bit of vkp_backend.flags: a loop of the program's own waits; `wait` never blocks. */
#define VKP_BACKEND_GUEST 1u

/* A bit of vkp_backend.flags: the backend keeps the clock, see vkp_backend.clock_ns. */
#define VKP_BACKEND_VIRTUAL_TIME 2u

/* One ready descriptor, which a backend's `wait` reports. */
typedef struct vkp_event {
    uint64_t token; /* the token that set_interest gave last for the descriptor */
    uint32_t ready; /* bits: VKP_IO_READ, VKP_IO_WRITE, VKP_IO_HUP, VKP_IO_ERROR */
} vkp_event;

/* What a backend gets at open; valid until the backend's close. */
typedef struct vkp_backend_host {
    const vkp_env *env;        /* the loop's env; its members are set, sys is never NULL */
    void *foreign;             /* vkp_loop_config.foreign: the program's own loop, for guests */
    void *loop;                /* the argument of `round` */
    void (*round)(void *loop); /* guests: run one round without waiting; loop's thread only */
} vkp_backend_host;

/* A backend is one constant struct. docs/porting-a-backend.md is its manual,
   tests/backend_conformance.cpp its proof. All members are called on the loop's thread, except
   wake. */
struct vkp_backend {
    /* VKP_BACKEND_ABI. */
    uint32_t abi;
    /* Bits: VKP_BACKEND_GUEST, VKP_BACKEND_VIRTUAL_TIME. */
    uint32_t flags;
    /* The backend's name, for messages. */
    const char *name;
    /* Open a backend for one loop and write *state on OK. Errors: NOMEM, SYS (with errno), INVALID
       (a guest without a foreign loop). */
    vkp_status (*open)(const vkp_backend_host *host, void **state);
    /* Free what the backend opened. Registered descriptors stay open. */
    void (*close)(void *state);
    /* Set the interest in fd to exactly this, in place of what it was; 0 removes fd. Idempotent.
       Level-triggered. Each event of fd carries the token. Errors: NOMEM, SYS (with errno), INVALID
       (fd < 0). */
    vkp_status (*set_interest)(void *state, int fd, uint32_t interest, uint64_t token);
    /* Write at most `capacity` events to out and their number to *count. Waits until an event is
       there, wake was called, or the deadline passed (0 never waits; time-outs round up). EINTR is
       zero events. Errors: SYS (with errno). */
    vkp_status (*wait)(void *state, uint64_t deadline_ns, vkp_event *out, size_t capacity,
                       size_t *count);
    /* End the wait under way, or the next one immediately. Several wakes may end one wait. Any
       thread, and signal handlers. */
    void (*wake)(void *state);
    /* Guests: have host->round called at that deadline, in place of the one before. NULL for
       backends that wait themselves. Errors: NOMEM, SYS (with errno). */
    vkp_status (*timer)(void *state, uint64_t deadline_ns);
    /* Stop sharing kernel state with the parent: called in a forked child, before any other member.
       Errors: NOMEM, SYS (with errno). */
    vkp_status (*after_fork)(void *state);
    /* A descriptor that polls readable when wait would report events or was woken, or -1. */
    int (*pollable_fd)(void *state);
    /* With VKP_BACKEND_VIRTUAL_TIME: the clock, in nanoseconds. Otherwise NULL. */
    uint64_t (*clock_ns)(void *state);
};

/* poll(2), for any POSIX system. Link backends/vkp_backend_poll.c. */
VKP_API_DATA const vkp_backend vkp_backend_poll;

/* epoll(7), for Linux. Link backends/vkp_backend_epoll.c. */
VKP_API_DATA const vkp_backend vkp_backend_epoll;

/* kqueue(2), for macOS and the BSDs. Link backends/vkp_backend_kqueue.c. */
VKP_API_DATA const vkp_backend vkp_backend_kqueue;

/* For tests: virtual time, events in the order of descriptors. Link backends/vkp_backend_null.c. */
VKP_API_DATA const vkp_backend vkp_backend_null;

/* A guest of libev: vkp_loop_config.foreign is a struct ev_loop *. docs/embedding.md has the rules.
   Link backends/vkp_backend_libev.c. */
VKP_API_DATA const vkp_backend vkp_backend_libev;

/* A guest of libuv: vkp_loop_config.foreign is a uv_loop_t *. docs/embedding.md has the rules. Link
   backends/vkp_backend_libuv.c. */
VKP_API_DATA const vkp_backend vkp_backend_libuv;

/* A guest of libevent: vkp_loop_config.foreign is a struct event_base *. docs/embedding.md has the
   rules. Link backends/vkp_backend_libevent.c. */
VKP_API_DATA const vkp_backend vkp_backend_libevent;

#endif /* VKP_NO_IO */
