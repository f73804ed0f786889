#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-loop   One thread's event loop                                                        */

/* The configuration of a loop. Every zero is a default; only the backend is required. */
typedef struct vkp_loop_config {
    const vkp_backend *backend; /* how the loop waits, for example &vkp_backend_poll; required */
    const vkp_env *env;         /* memory, log, system calls; NULL: the defaults */
    void *foreign;          /* the program's own loop: required by guest backends, else ignored */
    size_t read_bytes;      /* bytes of one read; 0: 64 KiB; values below 1 KiB mean 1 KiB */
    size_t events_per_wait; /* the most events of one wait; 0: 256 */
} vkp_loop_config;

/* Open a loop. One thread at a time runs a loop: until a thread runs it, the loop's thread is the
   thread that called vkp_loop_open. A NULL config returns INVALID: a backend is required.
   Owns:   borrows config (keeps the env and backend pointers); gives *loop
   Blocks: never     Threads: any     In callbacks: ok
   Errors: INVALID (a null argument, no backend, a backend of another ABI: the log names the files
   to link; a guest backend without config.foreign), NOMEM, SYS (the backend cannot open)      */
VKP_API VKP_NODISCARD vkp_status vkp_loop_open(const vkp_loop_config *config, vkp_loop **loop);

/* One more reference to the loop (gives, the same pointer). Connections, clients, listeners and
   handlers hold one each. Any thread.                                                         */
VKP_API vkp_loop *vkp_loop_ref(vkp_loop *loop);

/* Give a reference to the loop back; the last one closes and frees the loop. Connections, listeners
   and clients hold references: to end the loop call vkp_loop_close first. NULL is ignored. Any
   thread. With a guest backend, give the last reference back on the foreign loop's thread, before
   the foreign loop is freed.                                                                  */
VKP_API void vkp_loop_unref(vkp_loop *loop);

/* Close the loop: close its connections, listeners, clients and handlers (on_close callbacks run
   before vkp_loop_close returns), call each started vkp_io with ready 0, run the calls posted so
   far, stop the timers. Later posts return CLOSED. Idempotent; NULL is ignored; a call inside a
   callback of the loop does nothing. Loop's thread, not inside vkp_loop_run.                  */
VKP_API void vkp_loop_close(vkp_loop *loop);

/* Run rounds until vkp_loop_stop; OK after a stop. The calling thread becomes the loop's thread;
   after the return the loop may be used by any one thread.
   Blocks: until vkp_loop_stop     Threads: any, one at a time     In callbacks: INVALID
   Errors: INVALID (another thread runs the loop, the loop is closed, a guest backend, a call
   inside a callback of the loop), SYS (the backend's wait failed)                             */
VKP_API VKP_NODISCARD vkp_status vkp_loop_run(vkp_loop *loop);

/* Run one round: wait for events until the deadline at most (0: do not wait), dispatch, write. The
   calling thread becomes the loop's thread, and stays the loop's thread after the return. After
   vkp_loop_stop a round does not wait, until a vkp_loop_run has returned. On the null backend
   VKP_FOREVER moves the clock to the next timer; without a timer or an event it never returns.
   Blocks: until deadline_ns     Threads: loop's     In callbacks: INVALID
   Errors: INVALID (inside a callback of the loop, another thread runs the loop, the loop is
   closed), SYS (the backend's wait failed)                                                    */
VKP_API VKP_NODISCARD vkp_status vkp_loop_run_once(vkp_loop *loop, uint64_t deadline_ns);

/* Make vkp_loop_run return after the current round. The stop is kept until vkp_loop_run returned: a
   stop before vkp_loop_run ends that run after one round. Any thread, and signal handlers.    */
VKP_API void vkp_loop_stop(vkp_loop *loop);

/* Call fn(user) once on the loop's thread, during a round of the loop. Calls posted by one thread
   run in the order posted; calls posted before vkp_loop_close run.
   Owns:   user stays the caller's     Blocks: never     Threads: any     In callbacks: ok
   Errors: NOMEM, CLOSED (the loop is closed), INVALID (loop or fn is NULL)                    */
VKP_API VKP_NODISCARD vkp_status vkp_loop_post(vkp_loop *loop, void (*fn)(void *user), void *user);

/* The descriptor to poll in a foreign loop: readable when the loop has events. -1: the backend has
   no such descriptor. Loop's thread.                                                          */
VKP_API int vkp_loop_get_fd(const vkp_loop *loop);

/* The deadline of the loop's next timer, for a foreign loop that polls vkp_loop_get_fd:
   VKP_FOREVER without timers, 0 while queued work needs a round now. Loop's thread.           */
VKP_API uint64_t vkp_loop_get_deadline_ns(const vkp_loop *loop);

/* The loop's clock: monotonic nanoseconds. During a round the clock stays at the end of the round's
   wait; between rounds it is the time now. Loop's thread.                                     */
VKP_API uint64_t vkp_loop_get_now_ns(const vkp_loop *loop);

/* The deadline that many milliseconds after vkp_loop_get_now_ns: for timers and calls of this loop,
   also with a backend that keeps a virtual clock. Saturates at VKP_FOREVER. Loop's thread.    */
VKP_API uint64_t vkp_loop_after_ms(const vkp_loop *loop, uint64_t ms);

/* What to wait for at a descriptor, and what a descriptor is ready for: bits of a uint32_t. */
typedef enum vkp_io_bits {
    /* No bit: an interest in nothing, or the call that a vkp_io gets when the loop closes. */
    VKP_IO_NONE = 0,
    /* A read does not wait. */
    VKP_IO_READ = 1,
    /* A write does not wait. */
    VKP_IO_WRITE = 2,
    /* The peer hung up; reported without being asked for. Implies both directions: read until the
       end of file before you treat the connection as closed. */
    VKP_IO_HUP = 4,
    /* The descriptor has an error; reported without being asked for. Implies both directions: read
       until the end of file before you treat the connection as closed. */
    VKP_IO_ERROR = 8
} vkp_io_bits;

#ifndef __cplusplus
/* In C an enumerator is an int; with these casts compilers warn when a bit of vkp_io_bits is taken
   for a value of another enum.                                                                */
#define VKP_IO_NONE ((vkp_io_bits)VKP_IO_NONE)
#define VKP_IO_READ ((vkp_io_bits)VKP_IO_READ)
#define VKP_IO_WRITE ((vkp_io_bits)VKP_IO_WRITE)
#define VKP_IO_HUP ((vkp_io_bits)VKP_IO_HUP)
#define VKP_IO_ERROR ((vkp_io_bits)VKP_IO_ERROR)
#endif

/* A descriptor that is registered with a loop, in the caller's memory; the fields are private. Zero
   the struct before the first use: vkp_io_stop is then legal at any time.                     */
typedef struct vkp_io vkp_io;
struct vkp_io {
    vkp_loop *i_loop;                         /* NULL: not registered */
    void (*i_fn)(vkp_io *io, uint32_t ready); /* called when the descriptor is ready */
    int i_fd;                                 /* the descriptor, the caller's */
    uint32_t i_slot;                          /* index in the loop's table */
    uint32_t i_interest;                      /* VKP_IO_READ and VKP_IO_WRITE, or 0 */
};

/* Register fd with the loop. In each round in which fd is ready for `interest` (level-triggered),
   the loop calls fn with VKP_IO_* bits. If the loop closes first, the loop stops the vkp_io and
   calls fn once with ready 0.
   Owns:   io and fd stay the caller's; fd must stay open until vkp_io_stop
   Blocks: never     Threads: loop's     In callbacks: ok
   Errors: NOMEM, SYS, INVALID (a null argument, fd below 0, a closed loop, another thread)    */
VKP_API VKP_NODISCARD vkp_status vkp_io_start(vkp_io *io, vkp_loop *loop, int fd, uint32_t interest,
                                              void (*fn)(vkp_io *io, uint32_t ready));

/* Replace the interest of a registered descriptor. 0 keeps the place in the loop, but reports
   nothing, not even HUP and ERROR.
   Blocks: never     Threads: loop's     In callbacks: ok
   Errors: SYS, NOMEM, INVALID (io is NULL or not started)                                     */
VKP_API VKP_NODISCARD vkp_status vkp_io_set(vkp_io *io, uint32_t interest);

/* End the registration: fn is no longer called, not even for events already fetched. Idempotent on
   a started or zeroed vkp_io. Loop's thread.                                                  */
VKP_API void vkp_io_stop(vkp_io *io);

/* A timer in the caller's memory; the fields are private. Zero the struct before its first use. */
typedef struct vkp_timer vkp_timer;
struct vkp_timer {
    vkp_loop *i_loop;               /* the loop of the last start */
    void (*i_fn)(vkp_timer *timer); /* called at the deadline */
    uint64_t i_deadline_ns;         /* the next deadline */
    uint64_t i_period_ns;           /* 0: once */
    size_t i_index;                 /* place in the heap + 1; 0 = not running */
};

/* Call fn at the deadline, then every period_ns (0: once). A deadline that has passed calls fn
   in the next round, never inside this call; the clock is the loop's: see vkp_loop_after_ms.
   Restarts a running timer. A periodic timer that is late by a period or more fires once; the
   next period counts from now.
   Owns:   timer stays the caller's, and must stay valid while the timer runs
   Blocks: never     Threads: loop's     In callbacks: ok
   Errors: NOMEM, INVALID (a null argument, another thread), SYS (a guest's foreign timer) */
VKP_API VKP_NODISCARD vkp_status vkp_timer_start(vkp_timer *timer, vkp_loop *loop,
                                                 void (*fn)(vkp_timer *timer), uint64_t period_ns,
                                                 uint64_t deadline_ns);

/* Stop the timer: fn is no longer called. Idempotent; a zeroed timer is legal. Loop's thread. */
VKP_API void vkp_timer_stop(vkp_timer *timer);

#endif /* VKP_NO_IO */
