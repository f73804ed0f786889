#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-loop   One thread's event loop                                                    */

typedef struct vkp_loop_config {
    const vkp_backend *backend; /* required */
    const vkp_env *env;
    void *foreign;          /* for guest backends: the program's own loop */
    size_t read_bytes;      /* bytes of one read; default 64 KiB, at least 1 KiB */
    size_t events_per_wait; /* default 256 */
} vkp_loop_config;

/* Open a loop. It belongs to whichever thread runs it; one thread at a time.
   Owns:   borrows config (keeps env and backend pointers); gives *loop
   Blocks: never     Threads: any     In callbacks: ok
   Errors: INVALID (no backend, or a wrong ABI: logged with the files to link), NOMEM, SYS     */
VKP_API VKP_NODISCARD vkp_status vkp_loop_open(const vkp_loop_config *config, vkp_loop **loop);

/* One more reference (gives). Any thread. Connections, clients and listeners hold one each. */
VKP_API vkp_loop *vkp_loop_ref(vkp_loop *loop);

/* One reference less; the last one frees the loop. NULL is ignored. Any thread; over a guest
   the last one comes on the foreign loop's, before that is freed.                             */
VKP_API void vkp_loop_unref(vkp_loop *loop);

/* Close everything on the loop (connections, listeners, clients: their on_close run now), run
   what was posted, stop timers, refuse new posts. Idempotent. Loop's thread, not inside
   vkp_loop_run.                                                                                */
VKP_API void vkp_loop_close(vkp_loop *loop);

/* Run rounds until vkp_loop_stop. OK, INVALID (two threads, a guest backend), or SYS.
   Calling thread becomes the loop's.                                                          */
VKP_API VKP_NODISCARD vkp_status vkp_loop_run(vkp_loop *loop);

/* One round: wait until the deadline at most (0: do not wait), dispatch, write. Loop's thread.
   Errors: INVALID (inside a callback), SYS.                                                   */
VKP_API VKP_NODISCARD vkp_status vkp_loop_run_once(vkp_loop *loop, uint64_t deadline_ns);

/* Make vkp_loop_run return after the round under way. Sticky until it did. Any thread, and
   signal handlers.                                                                            */
VKP_API void vkp_loop_stop(vkp_loop *loop);

/* Call fn(user) on the loop's thread, in the order posted by each thread.
   Owns:   user stays the caller's     Blocks: never     Threads: any     In callbacks: ok
   Errors: NOMEM, CLOSED (the loop was closed), INVALID                                        */
VKP_API VKP_NODISCARD vkp_status vkp_loop_post(vkp_loop *loop, void (*fn)(void *user), void *user);

/* The descriptor to poll in a foreign loop (-1: none), and the deadline of the next timer
   (VKP_FOREVER: none; 0: work is waiting). Loop's thread.                                     */
VKP_API int vkp_loop_get_fd(const vkp_loop *loop);
VKP_API uint64_t vkp_loop_get_deadline_ns(const vkp_loop *loop);

/* The loop's clock: nanoseconds, monotonic. The same all through a round. Loop's thread. */
VKP_API uint64_t vkp_loop_get_now_ns(const vkp_loop *loop);

/* The deadline that many milliseconds after vkp_loop_get_now_ns: for timers and calls of this loop,
   also where its backend keeps a virtual clock. Saturates at VKP_FOREVER. Loop's thread.      */
VKP_API uint64_t vkp_loop_after_ms(const vkp_loop *loop, uint64_t ms);

/* What to wait for at a descriptor, and what it is ready for: bits of a uint32_t. HUP and ERROR are
   reported without being asked for and imply both directions: read until the end of file before
   you treat the connection as closed.                                                         */
typedef enum vkp_io_bits {
    VKP_IO_NONE = 0,
    VKP_IO_READ = 1,
    VKP_IO_WRITE = 2,
    VKP_IO_HUP = 4,
    VKP_IO_ERROR = 8
} vkp_io_bits;

#ifndef __cplusplus /* as for vkp_resp_type */
#define VKP_IO_NONE ((vkp_io_bits)VKP_IO_NONE)
#define VKP_IO_READ ((vkp_io_bits)VKP_IO_READ)
#define VKP_IO_WRITE ((vkp_io_bits)VKP_IO_WRITE)
#define VKP_IO_HUP ((vkp_io_bits)VKP_IO_HUP)
#define VKP_IO_ERROR ((vkp_io_bits)VKP_IO_ERROR)
#endif

/* A descriptor under watch, in the caller's memory; fields are private. */
typedef struct vkp_io vkp_io;
struct vkp_io {
    vkp_loop *i_loop;
    void (*i_fn)(vkp_io *io, uint32_t ready);
    int i_fd;
    uint32_t i_slot;
    uint32_t i_interest;
};

/* Watch fd for `interest`. fn gets VKP_IO_READ etc., and ready 0 once if the loop closes first (the
   watch is stopped then). The fd stays the caller's and must stay open until the stop.
   Blocks: never     Threads: loop's     In callbacks: ok     Errors: NOMEM, SYS, INVALID      */
VKP_API VKP_NODISCARD vkp_status vkp_io_start(vkp_io *io, vkp_loop *loop, int fd, uint32_t interest,
                                              void (*fn)(vkp_io *io, uint32_t ready));

/* Replace the interest (0 keeps the watch, silent but for HUP and ERR where the kernel tells).
   Loop's thread. Errors: SYS, NOMEM, INVALID.                                                 */
VKP_API VKP_NODISCARD vkp_status vkp_io_set(vkp_io *io, uint32_t interest);

/* End the watch: fn is not called again, not even for events already fetched. Idempotent on a
   started or zeroed watch. Loop's thread.                                                     */
VKP_API void vkp_io_stop(vkp_io *io);

/* A timer in the caller's memory; fields are private. Zero it before the first start. */
typedef struct vkp_timer vkp_timer;
struct vkp_timer {
    vkp_loop *i_loop;
    void (*i_fn)(vkp_timer *timer);
    uint64_t i_deadline_ns;
    uint64_t i_period_ns;
    size_t i_index; /* place in the heap + 1; 0 = not running */
};

/* Call fn at the deadline, then every period_ns (0: once). Restarts a running timer. A periodic
   timer that fell behind fires once and goes on from now.
   Blocks: never     Threads: loop's     In callbacks: ok     Errors: NOMEM, INVALID           */
VKP_API VKP_NODISCARD vkp_status vkp_timer_start(vkp_timer *timer, vkp_loop *loop,
                                                 void (*fn)(vkp_timer *timer), uint64_t period_ns,
                                                 uint64_t deadline_ns);

/* Stop the timer: fn is not called again. Idempotent on a zeroed timer. Loop's thread. */
VKP_API void vkp_timer_stop(vkp_timer *timer);

#endif /* VKP_NO_IO */
