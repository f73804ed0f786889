/* What the tests share: a temporary folder, an environment that counts and fails, a server
   process, a blocking RESP peer, the backends of this platform.
   SPDX-License-Identifier: MIT

   Helpers that cannot go on (no folder, a peer silent for too long) print why and abort, which
   every thread may do; Catch2's assertions are for the main thread only. Deadlines here only end
   a test that hangs; no test passes or fails by how long something took.                        */
#ifndef VKP_TEST_SUPPORT_H
#define VKP_TEST_SUPPORT_H

#include "valkey_push.h"

#include <pthread.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Print the message and abort. Any thread. */
void vkp_test_fail(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));

/* The point at which a wait counts as hung: 30 s from now, VKP_TEST_PATIENCE seconds if that is
   set (emulators, valgrind).                                                                    */
uint64_t vkp_test_deadline(void);

/* A handler on the loop that calls fn(user) while the receiver has a value, or CLOSED. */
vkp_status vkp_test_handle(vkp_loop *loop, vkp_mpsc_rx *rx, void (*fn)(void *user), void *user,
                           vkp_handler **handler);

/* --------------------------------------------------------------------------------------
   Files and descriptors                                                                     */

/* This process's folder: short enough for socket addresses, removed with its files at exit. */
const char *vkp_test_dir(void);

/* A path in that folder. The same name gives the same path; the text lives until exit. */
const char *vkp_test_path(const char *name);

/* A path in that folder that no call gave before: "<stem>.<number>". */
const char *vkp_test_fresh_path(const char *stem);

/* "unix:" and a fresh path. */
const char *vkp_test_fresh_address(const char *stem);

/* Whether lstat finds something there. */
bool vkp_test_exists(const char *path);

/* Descriptors open in this process now. Equal before and after = nothing leaked. */
int vkp_test_fd_count(void);

/* Two connected stream sockets, blocking, close-on-exec; fds[0] non-blocking for the library. */
void vkp_test_socket_pair(int fds[2]);

/* --------------------------------------------------------------------------------------
   An environment that counts, fails and records                                             */

typedef enum vkp_test_fault {
    VKP_TEST_FAULT_NONE = 0,
    VKP_TEST_FAULT_ONCE, /* the k-th allocation from now */
    VKP_TEST_FAULT_FROM, /* the k-th and all after it */
    VKP_TEST_FAULT_EVERY /* every k-th */
} vkp_test_fault;

/* Hand &env.env to the library. Frees and shrinking never fail. Sizes are checked: an old_bytes
   that is not what was allocated aborts, and so does a block freed twice.                       */
typedef struct vkp_test_env {
    vkp_env env; /* alloc, log and user are set; log_level is VKP_LOG_DEBUG */
    pthread_mutex_t i_lock;
    uint64_t i_calls;
    uint64_t i_failures;
    uint64_t i_armed_at;
    uint64_t i_k;
    vkp_test_fault i_fault;
    size_t i_live_bytes;
    size_t i_live_blocks;
    size_t i_peak_bytes;
    char **i_lines;
    vkp_log_level *i_levels;
    size_t i_line_count;
    size_t i_line_capacity;
} vkp_test_env;

void vkp_test_env_init(vkp_test_env *env);

/* Forget the log. The test checks live_blocks itself, before; deinit aborts if any is left, for a
   later free would use an env that is gone.                                                     */
void vkp_test_env_deinit(vkp_test_env *env);

/* Let allocations fail from now on; k counts from 1. NONE stops it. Any thread, as all below. */
void vkp_test_env_fault(vkp_test_env *env, vkp_test_fault fault, uint64_t k);

uint64_t vkp_test_env_calls(vkp_test_env *env);    /* that asked for memory, since init */
uint64_t vkp_test_env_failures(vkp_test_env *env); /* made to fail, since init */
size_t vkp_test_env_live_bytes(vkp_test_env *env);
size_t vkp_test_env_live_blocks(vkp_test_env *env);
size_t vkp_test_env_peak_bytes(vkp_test_env *env);

size_t vkp_test_env_log_count(vkp_test_env *env);
/* Copies line `index` (cut to size) and returns its level; index must be below the count. */
vkp_log_level vkp_test_env_log_line(vkp_test_env *env, size_t index, char *text, size_t size);
bool vkp_test_env_logged(vkp_test_env *env, const char *part); /* a line contains it */
void vkp_test_env_log_clear(vkp_test_env *env);

/* --------------------------------------------------------------------------------------
   Loops                                                                                     */

/* The backends of this platform that keep real time; ends with NULL. In programs that are linked
   with a foreign loop (foreign/foreign.h) it is the guest in that one instead.                  */
const vkp_backend *const *vkp_test_backends(void);

/* The same and, but for those, vkp_backend_null; on Linux kqueue's as well, over an emulation. */
const vkp_backend *const *vkp_test_backends_all(void);

/* The default table of system calls, but with a kqueue everywhere: on Linux an emulation. */
const vkp_sys *vkp_test_sys(void);

/* Run rounds until done(user) is true; aborts with `what` at the deadline. */
void vkp_test_run_until(vkp_loop *loop, bool (*done)(void *user), void *user, const char *what);

/* Wait in a thread without a loop until done(user) is true, for things that nothing announces
   (a file that vanishes, another process's counter); aborts with `what` at the deadline.        */
void vkp_test_wait_until(bool (*done)(void *user), void *user, const char *what);

/* --------------------------------------------------------------------------------------
   Child processes                                                                           */

/* Start argv[0] (found on PATH) with this process's output; it dies with this process, on Linux
   with this THREAD: start children from one that outlives them.
   out_fd (may be NULL) gets the read end of its standard output.                                */
int vkp_test_spawn(const char *const *argv, int *out_fd);

/* Send the signal (0: none) and wait until the child ended: its exit code, or 128 + signal. */
int vkp_test_reap(int pid, int signal_number);

/* The path of the relay built with these tests, for vkp_test_spawn. */
const char *vkp_test_relay_program(void);

/* --------------------------------------------------------------------------------------
   A real server                                                                             */

typedef struct vkp_test_server vkp_test_server;

/* The program used: $VKP_TEST_SERVER, else valkey-server, else redis-server, whichever is there;
   NULL when none is, and then a test says so and returns.                                       */
const char *vkp_test_server_program(void);

/* Start a server on a free port and on a socket in the folder, without persistence, and wait until
   it answers. `options` (may be NULL) are further arguments, ended by NULL.                     */
vkp_test_server *vkp_test_server_open(const char *const *options);

const char *vkp_test_server_tcp(const vkp_test_server *server);  /* "tcp:127.0.0.1:PORT" */
const char *vkp_test_server_unix(const vkp_test_server *server); /* "unix:PATH" */
int vkp_test_server_port(const vkp_test_server *server);
int vkp_test_server_pid(const vkp_test_server *server); /* 0 while it is down */

/* Send the signal, which must end it; on return the process is gone and its port refuses. Nothing
   if it is down.                                                                                */
void vkp_test_server_stop(vkp_test_server *server, int signal_number);

/* The same with SIGKILL. */
void vkp_test_server_kill(vkp_test_server *server);

/* Start it again, with the same port, path and options, and wait until it answers. */
void vkp_test_server_restart(vkp_test_server *server);

/* Kill it if it runs, and free. NULL is ignored. */
void vkp_test_server_close(vkp_test_server *server);

/* --------------------------------------------------------------------------------------
   A blocking peer over a raw descriptor                                                     */

/* A blocking, close-on-exec socket connected to "tcp:HOST:PORT" or "unix:PATH"; -1 with errno
   when the peer refuses.                                                                        */
int vkp_test_connect(const char *address);

typedef struct vkp_test_peer vkp_test_peer;

/* Connect; aborts when that fails. */
vkp_test_peer *vkp_test_peer_open(const char *address);

/* Over a descriptor, which the peer owns from now on. */
vkp_test_peer *vkp_test_peer_of(int fd);

/* Close and free. NULL is ignored. */
void vkp_test_peer_close(vkp_test_peer *peer);

int vkp_test_peer_fd(const vkp_test_peer *peer);

/* Write all of it. False when the other side is gone; aborts when it does not read in time. */
bool vkp_test_peer_send(vkp_test_peer *peer, const void *data, size_t len);
bool vkp_test_peer_send_text(vkp_test_peer *peer, const char *text);

/* A command as an array of bulk strings; the arguments end with NULL. */
bool vkp_test_peer_command(vkp_test_peer *peer, ...) __attribute__((sentinel));

/* Exactly len bytes, viewed until the next read; NULL when the stream ended before. */
const char *vkp_test_peer_read(vkp_test_peer *peer, size_t len);

/* One whole RESP2 or RESP3 frame, attributes before it included, viewed until the next read and
   terminated; NULL at the end of the stream. Aborts on bytes that are no RESP.                  */
const char *vkp_test_peer_read_frame(vkp_test_peer *peer, size_t *len);

/* As vkp_test_peer_read_frame without waiting: NULL while no whole frame is there, for tests that
   run the loop in the same thread.                                                              */
const char *vkp_test_peer_try_read_frame(vkp_test_peer *peer, size_t *len);

/* True once a read met the end of the stream (closed or reset). */
bool vkp_test_peer_is_ended(const vkp_test_peer *peer);

/* Read and drop until the other side closed; returns the bytes dropped. */
size_t vkp_test_peer_drain(vkp_test_peer *peer);

#ifdef __cplusplus
}

#include <string>
#include <string_view>

/* The next frame as text to compare with; "" at the end of the stream. */
inline std::string vkp_test_frame(vkp_test_peer *peer)
{
    size_t len = 0;
    const char *frame = vkp_test_peer_read_frame(peer, &len);
    return frame ? std::string(frame, len) : std::string();
}

/* A command and its reply in one line. */
template <typename... Arguments>
std::string vkp_test_ask(vkp_test_peer *peer, const Arguments &...arguments)
{
    if (!vkp_test_peer_command(peer, std::string(arguments).c_str()...,
                               static_cast<const char *>(nullptr))) {
        return std::string();
    }
    return vkp_test_frame(peer);
}

inline std::string_view vkp_test_view(vkp_str text)
{
    return text.len ? std::string_view(text.ptr, text.len) : std::string_view();
}

/* The waits with a lambda: vkp_test_run_until(loop, "a reply", [&] { return got > 0; }). */
template <typename Done>
void vkp_test_run_until(vkp_loop *loop, const char *what, Done done)
{
    vkp_test_run_until(
        loop, [](void *user) { return static_cast<bool>((*static_cast<Done *>(user))()); }, &done,
        what);
}

template <typename Done>
void vkp_test_wait_until(const char *what, Done done)
{
    vkp_test_wait_until(
        [](void *user) { return static_cast<bool>((*static_cast<Done *>(user))()); }, &done, what);
}

/* vkp_test_frame while this thread runs the loop that the frame comes from. */
inline std::string vkp_test_frame_on(vkp_loop *loop, vkp_test_peer *peer)
{
    std::string frame;
    vkp_test_run_until(loop, "a frame for the peer", [&] {
        size_t len = 0;
        const char *text = vkp_test_peer_try_read_frame(peer, &len);
        if (text) {
            frame.assign(text, len);
        }
        return text || vkp_test_peer_is_ended(peer);
    });
    return frame;
}

/* An environment that counts and fails; aborts at its end if anything is left of it. */
struct vkp_test_counted {
    vkp_test_env test;
    explicit vkp_test_counted(const vkp_sys *sys = nullptr)
    {
        vkp_test_env_init(&test);
        test.env.sys = sys;
    }
    ~vkp_test_counted()
    {
        vkp_test_env_deinit(&test);
    }
    vkp_test_counted(const vkp_test_counted &) = delete;
    vkp_test_counted &operator=(const vkp_test_counted &) = delete;
    const vkp_env *env() const
    {
        return &test.env;
    }
    size_t blocks()
    {
        return vkp_test_env_live_blocks(&test);
    }
    size_t bytes()
    {
        return vkp_test_env_live_bytes(&test);
    }
    void fault(vkp_test_fault kind, uint64_t k)
    {
        vkp_test_env_fault(&test, kind, k);
    }
};
#endif

#endif /* VKP_TEST_SUPPORT_H */
