/* valkey_push.h - server pushes for C, in one header
   Made of the parts in src/ by src/amalgamate.sh: edit those. SPDX-License-Identifier: MIT

   Do this in ONE source file of the program, before its first #include:
       #define VKP_IMPLEMENTATION
       #include "valkey_push.h"
   and in every other one:
       #include "valkey_push.h"
   Build with one backend from backends/, and threads:
       cc app.c backends/vkp_backend_poll.c -lpthread

   A whole program (examples/subscribe.c prints what a server publishes):
       vkp_loop_open(&loop_config, &loop);                 (a loop over a backend)
       vkp_client_open(loop, &client_config, &client);     (on_push = your callback)
       vkp_client_subscribe(client, VKP_SUB_CHANNEL, vkp_str_of("news"));
       vkp_loop_run(loop);

   TABLE OF CONTENTS (search for the token)
       >>manual        concepts, ownership, threads, errors, limits
       >>config        macros that change the build
       >>api           declarations: what people come for first
           >>api-handles  >>api-base  >>api-bytes  >>api-value  >>api-push  >>api-client
           >>api-resolver  >>api-loop  >>api-mpsc  >>api-oneshot  >>api-broadcast  >>api-watch
           >>api-cancel  >>api-select  >>api-handler  >>api-resp  >>api-registry  >>api-socket
           >>api-conn  >>api-gate  >>api-listener  >>api-health  >>api-hub  >>api-pushloop
           >>api-relay  >>api-sys  >>api-backend  >>api-typed
       >>impl          implementation: lowest layer first
           >>impl-base  >>impl-sys  >>impl-park  >>impl-bytes  >>impl-map  >>impl-cancel
           >>impl-mpsc  >>impl-mpsc-send  >>impl-mpsc-receive  >>impl-mpsc-ends  >>impl-oneshot
           >>impl-receivers  >>impl-broadcast  >>impl-watch  >>impl-select  >>impl-loop
           >>impl-handler  >>impl-loop-run  >>impl-value  >>impl-resp  >>impl-frame
           >>impl-resp-writer  >>impl-address  >>impl-socket  >>impl-registry  >>impl-gate
           >>impl-conn-queue  >>impl-conn  >>impl-listener  >>impl-health  >>impl-hub
           >>impl-push  >>impl-resolver  >>impl-link  >>impl-handshake
           >>impl-link-connect  >>impl-client
           >>impl-client-subscriptions  >>impl-client-liveness  >>impl-client-connection
           >>impl-pushloop  >>impl-relay
           >>impl-relay-resp2  >>impl-relay-subscribe  >>impl-relay-commands
           >>impl-relay-serve
       >>licence       the licence in full
*/

#ifndef VALKEY_PUSH_H
#define VALKEY_PUSH_H

/* ======================================================================================
   >>manual   Concepts
   ======================================================================================
   START HERE
   - To react to what a server pushes: vkp_loop_open, vkp_client_open, vkp_client_subscribe,
     vkp_loop_run. Pushes arrive in on_push, or in a channel that a thread of yours receives from.
   - To send commands from any thread: vkp_client_command, and vkp_oneshot_recv for the reply.
   - To pass values between threads: sections api-mpsc, api-oneshot, api-broadcast, api-watch.
   - To serve local clients: vkp_listener_open, or a whole relay with vkp_relay_open.
   - To run inside a loop that the program has already: docs/embedding.md.
   - To test code that uses this library: vkp_backend_null and docs/testing-your-code.md.
   - Every call has its contract above its declaration. docs/guarantees.md lists what holds always,
     docs/recipes/ has short whole programs.

   WHAT IT IS FOR. A Valkey (or Redis) server pushes: messages of subscribed pub/sub channels, keys
   that became invalid. This library carries those pushes to the callback, thread or process that
   needs them. It holds what such programs are made of: channels between threads, cancellation, an
   event loop over a backend, a RESP reader and writer, ref-counted Unix sockets, connections with
   bounded queues, a hub of subscribers, a client that reconnects, a relay.

   A program of one thread opens a loop, a client on it, and runs:
       static void on_push(void *user, const vkp_push *push)
       {
           if (push->kind == VKP_PUSH_MESSAGE) {
               printf("%.*s\n", VKP_FMT(push->payload));
           }
       }
   Errors aside (examples/subscribe.c has them) the other four calls are shown at the top.
   A thread of its own takes the same pushes from a channel (vkp_client_config.pushes):
       while (vkp_mpsc_recv(rx, VKP_FOREVER, &push) == VKP_OK) {
           use(&push);
           vkp_push_unref(&push);
       }
   Any thread sends commands, with a slot for the reply on its stack:
       vkp_oneshot slot; vkp_reply *reply;
       if (vkp_client_command(client, &slot, "INCR", "hits", NULL) == VKP_OK &&
           vkp_oneshot_recv(&slot, vkp_after_ms(250), &reply) == VKP_OK) {
           use(vkp_reply_get_value(reply));
           vkp_reply_unref(reply);
       }

   CHANNELS. mpsc: a queue with many senders and one receiver, bounded (a sender that finds it full
   waits: back-pressure) or not. oneshot: one value, once, in the caller's memory: the reply to a
   request. broadcast: each receiver gets each value; a slow receiver gets the number it lost.
   watch: only the newest value. cancel: a token that ends waits, with its children. Each end waits
   in three forms: try_x never waits, x waits until a deadline, and a loop calls a handler while x
   is ready (vkp_handler_open). vkp_select waits for several cases and carries out one:
       vkp_case cases[] = {vkp_case_cancel(stop), vkp_case_mpsc_recv(jobs, &job)};
       if (vkp_select(cases, 2, vkp_after_ms(1000), &won) == VKP_OK && won == 1) { work(&job); }
   Each value that a channel took is received once or dropped once, through the channel's drop
   function, whichever end closes first. A thread that waits checks for some microseconds before it
   sleeps (vkp_env.spins); the first sender after that wakes it. An idle channel costs nothing.
   docs/tokio-to-c.md has each call of Tokio's channels beside ours.

   SOCKETS. A registry finds a program's listening Unix sockets by their paths and keeps none of
   them open. Each handle is a reference: vkp_socket_open returns one to the live socket of a path
   or binds a new one, in place of a file that a dead process left. The last vkp_socket_unref
   removes the file, on whichever thread, without waiting for other threads. A listener holds a
   reference to its socket, or follows it (vkp_listener_config.follow): then each connected client
   holds a reference, and when the last one disconnects the socket is closed and its file removed.
   A gate says which clients are admitted (by default those of this process's own user) and how
   many. docs/sockets.md describes a socket's life case by case; examples/socket_life.c shows one.

   OWNERSHIP. Contracts use five words.
       takes     on OK the callee owns it; on any error the caller still does, descriptors included
       borrows   the callee uses it until the call returns
       shares    the object takes a reference of its own
       gives     one reference is the caller's to unref
       views     valid until the next call that the contract names
   Out-parameters are written only on OK.

   VERBS. The same for every handle:
       open      gives a handle, with one reference
       ref       gives one more reference to the same handle
       close     ends what the object does. Frees nothing: the handle stays valid until its last
                 unref, and calls on it return CLOSED. Idempotent; NULL is ignored.
       unref     gives one reference back. The last one closes the object first, then frees it. NULL
                 is ignored.
       init      prepares memory of the caller's; deinit ends it. deinit(NULL) does nothing.
   close and unref of each handle (thread: from where close, then unref, may be called):
       handle            close                                last unref            thread
       vkp_loop          closes all that is on it             closes                loop's; any
       vkp_client        commands get CLOSED, no callback     closes                any; any
       vkp_conn          calls on_close                       (the loop holds one)  any; any
       vkp_listener      accepts no new clients               closes, ends a drain  loop's; loop's
       vkp_health_check  no result follows                    closes                loop's; loop's
       vkp_resolver      run returns, lookups fail            closes                any; any
       vkp_handler       is not called again                  closes                loop's; loop's
       vkp_mpsc_rx       senders get CLOSED                   closes, drops values  any; receiver's
       vkp_oneshot       the sender gets CLOSED               rx closes, tx abandons   each side's
   Handles without close, where the last unref ends the activity: senders of channels (receivers
   drain, then get CLOSED), receivers of broadcast and watch, tokens, sockets (stop listening),
   seats, push loops, relays, readers. Plain references: registries, pools, gates, hubs, replies.

   ORDER OF ARGUMENTS. The object first, then what goes in, then a function and its user pointer,
   then the deadline, then out-parameters.

   CONFIGS are structs: zero them (VKP_ZERO) and set what matters. Every zero is a default that its
   field's comment names; VKP_UNLIMITED and VKP_OFF say what zero cannot. Where no field is
   required, a NULL config means all defaults. Configs are copied; pointers to ops tables, backends
   and env are kept and must outlive the object. Texts are vkp_str, copied where they are kept;
   vkp_str_of makes one of a C string, and a zeroed one is absent.

   THREADS. The library starts none and keeps no global state. A loop belongs to its thread ("loop's
   thread"): the thread inside vkp_loop_run; before the first run, the thread that called
   vkp_loop_open; after run returned, any one thread. Connections, listeners, hubs, handlers, timers
   and descriptors belong to their loop's thread. Any thread may use channels and tokens, post to a
   loop, push to a connection, close and unref connections and clients, send commands, subscribe. To
   use more cores run more loops; a connection stays on its loop for life.

   CALLBACKS run on the loop's thread, never under a lock; any call is legal inside one unless its
   contract says no. After an object's close returned on the loop's thread none of its callbacks
   runs. Frames that are queued during a round are written at its end, with one system call per
   connection.

   DEADLINES are absolute monotonic nanoseconds: vkp_after_ms(250), 0 (do not wait), VKP_FOREVER; on
   a loop vkp_loop_after_ms, which counts by the loop's own clock.

   ERRORS. Everything that can fail returns a vkp_status, which the compiler warns about if it is
   ignored ((void)!call(...) ignores one). Nothing prints, aborts or exits. A call that failed
   changed nothing, or its contract says what it changed. SYS leaves the cause in errno. A
   programmer's error is INVALID; a program that defines VKP_ASSERT asserts first. Texts for people
   go to env.log.

   LIMITS. All queues are bounded in bytes by their configs; the reader is bounded in depth,
   elements, lines and bytes. One block, frame or command is below 4 GiB. Host names are resolved
   by getaddrinfo, which may block the loop's thread; numeric addresses never block.

   SIGNALS. Process-wide signal state is not touched; sends never raise SIGPIPE. vkp_loop_stop and
   vkp_registry_unlink_all may be called in a signal handler. FORK. A child may only unref what it
   inherited; that removes no files.

   SERVERS. RESP3 servers (Redis 6, Valkey) carry commands and pushes on one connection. On a RESP2
   server the client works too, but a connection with subscriptions takes no commands (REFUSED):
   open a second client.

   GLOSSARY. One word has one meaning here, in the header, the documents and the messages.
       backend         what makes a loop wait: poll, epoll, kqueue; null has a virtual clock
       block           ref-counted immutable bytes; a vkp_bytes is a slice of one
       case            one thing to wait for: vkp_select, vkp_handler_open
       channel         between threads: mpsc, oneshot, broadcast, watch. A server's channel is a
                       pub/sub channel
       client          a vkp_client; of a listener, gate or relay: a program connected to it
       connection      a vkp_conn: a stream socket on a loop, with its queues
       drain           write what is queued, then close
       env             allocator, log function, system calls: vkp_env
       frame           one whole RESP value, as bytes
       gap             the time in which messages may have been lost: VKP_PUSH_GAP
       gate            admits clients, by user and number; each admitted client has a seat
       guest           a backend inside the program's own loop: libev, libuv, libevent
       handler         a function that a loop calls while a case is ready
       hub             which connections subscribed to what; one frame in, a reference to each out
       interest        one vkp_client_subscribe that was not taken back
       io              a descriptor that is registered on a loop
       lane            the queue of one sender of an mpsc channel
       linger          a socket's time between its last reference and its end
       listener        accepts clients on a loop
       loop, round     one thread's events; a round waits, calls callbacks, writes
       name            of a pub/sub channel, a pattern or a shard channel
       outage          from DISCONNECTED to RECONNECTED
       peer            the other end of a connection
       permit          a place in an mpsc channel whose value is being built
       policy          what a push does when the queue is full: vkp_on_full
       push            a frame that its receiver did not ask for: from a server (vkp_push), or from
                       this program to a peer (vkp_conn_push)
       push loop       carries pushes from a channel to a sink: a hub, a connection, a callback
       registry        finds live sockets by path
       relay           local clients share one connection to a server (upstream), or none
       reply           what a server answered to a command
       select          wait for the first ready case. SELECT is a command of the server
       sender, receiver  the two ends of a channel: tx and rx
       slot            the memory of a one-shot
       subscription    a name and a subscriber; in a hub a subscriber is a member
       token           a cancellation token: vkp_cancel
       watch           the channel that holds the newest value. WATCH is a command of the server  */

/* ======================================================================================
   >>config   Macros
   ======================================================================================
   Macro                unset means   define it
   VKP_IMPLEMENTATION   declarations  in ONE file, before its first #include: the implementation
                                      is compiled there
   VKP_STATIC           extern        in the one file that uses the library: all functions are
                                      static, and only that file can call them
   VKP_API              extern        in every file alike, backends included: the linkage of what
                                      the library defines. A shared library of several files that
                                      keeps its copy to itself defines it as
                                      extern __attribute__((visibility("hidden")))
   VKP_ASSERT(x)        nothing       with the implementation: a programmer's error asserts, and
                                      the call returns INVALID as well
   VKP_NO_IO            everything    with the implementation: channels only, without loop, RESP,
                                      sockets, client and relay; a file that defines it sees no
                                      other declarations
*/
#ifdef VKP_IMPLEMENTATION /* before the first system header of this file */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE 1
#elif defined(__APPLE__) && !defined(_DARWIN_C_SOURCE)
#define _DARWIN_C_SOURCE 1
#endif
#endif

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifndef VKP_API
#ifdef VKP_STATIC
#define VKP_API static __attribute__((unused))
#else
#define VKP_API extern
#endif
#endif

#ifdef VKP_STATIC
#define VKP_API_DATA extern /* a backend is compiled in a file of its own */
#else
#define VKP_API_DATA VKP_API
#endif

#if defined(VKP_STATIC) && !defined(VKP_IMPLEMENTATION)
#error "VKP_STATIC is for the one file that defines VKP_IMPLEMENTATION; for several use VKP_API"
#endif

#if defined(__GNUC__) || defined(__clang__)
#define VKP_NODISCARD __attribute__((warn_unused_result))
#else
#error "valkey_push.h needs GCC or Clang (builtin atomics)"
#endif

#ifdef __cplusplus
#define VKP_ZERO \
    {            \
    }
#else
#define VKP_ZERO \
    {            \
        0        \
    }
#endif

#define VKP_VERSION_MAJOR 0
#define VKP_VERSION_MINOR 1
#define VKP_VERSION_PATCH 0
#define VKP_VERSION_STR "0.1.0"

#ifdef __cplusplus
extern "C" {
#endif

/* ======================================================================================
   >>api   Declarations
   ======================================================================================
   The contract above each function says who owns what (takes, borrows, shares, gives, views),
   whether the call may wait, from which threads it may be called, whether it is legal inside
   callbacks, and its errors with their causes. "Loop's thread" is the thread inside vkp_loop_run;
   before the first run, the thread that called vkp_loop_open; after run returned, any one thread.
   A pointer argument must be valid. Calls that return a status return INVALID for a NULL that their
   contract does not allow; getters and vkp_resp_put_ calls do not check.                        */

/* --------------------------------------------------------------------------------------
   >>api-handles   The handles, by section                                                 */

/* What an object takes from the program: memory, log function, system calls. Not a handle. */
typedef struct vkp_env vkp_env;

/* The system calls that the library makes, as a table. Not a handle. */
typedef struct vkp_sys vkp_sys;

/* Ref-counted immutable bytes: see vkp_bytes. */
typedef struct vkp_block vkp_block;

/* A client of a server: one connection that many threads share. */
typedef struct vkp_client vkp_client;

/* Looks host names up, in a thread of the program. */
typedef struct vkp_resolver vkp_resolver;

/* What a server answered to a command: ref-counted, immutable. */
typedef struct vkp_reply vkp_reply;

/* One thread's event loop. */
typedef struct vkp_loop vkp_loop;

/* How a loop waits: poll, epoll, kqueue and others. A constant table, not a handle. */
typedef struct vkp_backend vkp_backend;

/* A function that a loop calls while a case is ready. */
typedef struct vkp_handler vkp_handler;

/* A sender of an mpsc channel: any number of references, used by any threads. */
typedef struct vkp_mpsc_tx vkp_mpsc_tx;

/* The receiver of an mpsc channel: used by one thread at a time. */
typedef struct vkp_mpsc_rx vkp_mpsc_rx;

/* A weak sender of an mpsc channel: it may become a sender again, and keeps nothing open. */
typedef struct vkp_mpsc_weak vkp_mpsc_weak;

/* The slot of a one-shot: a struct in the caller's memory, or from vkp_oneshot_open. */
typedef struct vkp_oneshot vkp_oneshot;

/* A sender of a broadcast: any number of references, used by any threads. */
typedef struct vkp_broadcast_tx vkp_broadcast_tx;

/* One receiver of a broadcast: used by one thread at a time. */
typedef struct vkp_broadcast_rx vkp_broadcast_rx;

/* A sender of a watch: any number of references, used by any threads. */
typedef struct vkp_watch_tx vkp_watch_tx;

/* One receiver of a watch: used by one thread at a time. */
typedef struct vkp_watch_rx vkp_watch_rx;

/* A cancellation token. */
typedef struct vkp_cancel vkp_cancel;

/* An incremental reader of RESP. */
typedef struct vkp_resp_reader vkp_resp_reader;

/* A registry of a program's listening Unix sockets. */
typedef struct vkp_registry vkp_registry;

/* A listening Unix socket, ref-counted. */
typedef struct vkp_socket vkp_socket;

/* Several sockets, over which clients are spread. */
typedef struct vkp_socket_pool vkp_socket_pool;

/* A stream connection on a loop. */
typedef struct vkp_conn vkp_conn;

/* A client as the kernel identifies it. A struct, not a handle. */
typedef struct vkp_peer vkp_peer;

/* Admission control for listeners. */
typedef struct vkp_gate vkp_gate;

/* The place of one admitted client at a gate. */
typedef struct vkp_seat vkp_seat;

/* Accepts clients on a loop. */
typedef struct vkp_listener vkp_listener;

/* A periodic check whether a server answers. */
typedef struct vkp_health_check vkp_health_check;

/* Which connections subscribed to which names. */
typedef struct vkp_hub vkp_hub;

/* Carries pushes from a channel to a sink, on a loop. */
typedef struct vkp_push_loop vkp_push_loop;

/* Local clients that share one connection to a server. */
typedef struct vkp_relay vkp_relay;

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

    /* Receives one log line: no newline, at most 511 bytes and a NUL. Called from any thread, never
       under a lock. NULL: nothing is logged.                                                  */
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

/* --------------------------------------------------------------------------------------
   >>api-bytes   Text views, and immutable ref-counted bytes                               */

/* A view of text that the struct does not own. The text has no terminator and may hold any byte. */
typedef struct vkp_str {
    const char *ptr; /* the first byte; NULL: no text */
    size_t len;      /* bytes */
} vkp_str;

/* The two arguments of printf's %.*s for a vkp_str of at most INT_MAX bytes. */
#define VKP_FMT(s) (int)(s).len, (s).ptr

/* A view of a terminated string; NULL gives an empty text whose ptr is NULL. Any thread. */
VKP_API vkp_str vkp_str_of(const char *text);

/* A span of an immutable block. The struct holds ONE reference to the block, if block is not NULL;
   an assignment of the struct does not add a reference.                                       */
typedef struct vkp_bytes {
    const uint8_t *data; /* the first byte */
    size_t len;          /* bytes */
    vkp_block *block;    /* the block that data lies in; NULL: static bytes, a view, or empty */
} vkp_bytes;

/* Copy len bytes into a new block. NULL env: all defaults. NULL data is allowed with len 0.
   Owns:   borrows data; gives *out       Blocks: never     Threads: any     In callbacks: ok
   Errors: NOMEM, INVALID (out NULL, data NULL with len > 0, len above 4 GiB - 1)              */
VKP_API VKP_NODISCARD vkp_status vkp_bytes_copy(const vkp_env *env, const void *data, size_t len,
                                                vkp_bytes *out);

/* A view of bytes that are never freed, such as a string literal: no block, no reference. Any
   thread.                                                                                     */
VKP_API vkp_bytes vkp_bytes_static(const void *data, size_t len);

/* One more reference to the bytes (gives). Static bytes have no count. Any thread. */
VKP_API vkp_bytes vkp_bytes_ref(const vkp_bytes *bytes);

/* A part of the bytes with a reference of its own (gives). offset and len are clamped to the length
   of the bytes. Any thread.                                                                   */
VKP_API vkp_bytes vkp_bytes_slice(const vkp_bytes *bytes, size_t offset, size_t len);

/* Give the reference back and empty the struct; the last reference frees the block. NULL and an
   empty struct are ignored. Any thread.                                                       */
VKP_API void vkp_bytes_unref(vkp_bytes *bytes);

#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-value   Values of RESP2 and RESP3
   Source of the facts: the RESP3 specification (redis/redis-specifications, protocol/RESP3.md). */

/* The type of a value. Each comment starts with the type bytes on the wire. */
typedef enum vkp_resp_type {
    /* _  and RESP2's $-1 (VKP_VALUE_NULL_BULK) and *-1 (VKP_VALUE_NULL_ARRAY). */
    VKP_RESP_NULL = 0,
    /* $  + (VKP_VALUE_SIMPLE)  = (VKP_VALUE_VERBATIM)  the text is str, len. */
    VKP_RESP_STRING,
    VKP_RESP_ERROR,   /* - (VKP_VALUE_SIMPLE)  !  the text is str, len */
    VKP_RESP_INTEGER, /* :  the number is integer */
    VKP_RESP_DOUBLE,  /* ,  the digits are str, len; vkp_value_get_double converts them */
    VKP_RESP_BOOL,    /* #  integer is 0 or 1 */
    VKP_RESP_BIGNUM,  /* (  the digits with their sign are str, len */
    VKP_RESP_ARRAY,   /* *  len elements */
    VKP_RESP_SET,     /* ~  len elements */
    VKP_RESP_PUSH,    /* >  len elements; the first is a string, the kind of the push */
    VKP_RESP_MAP,     /* %  len elements: key, value, key, value ... (twice the wire's count) */
    /* |  len elements: key, value, key, value ... (twice the wire's count). An attribute precedes
       the value that it annotates.                                                            */
    VKP_RESP_ATTRIBUTE
} vkp_resp_type;

#ifndef __cplusplus
/* In C an enumerator is an int, and compilers compare an int with any enum without a warning. With
   these casts a comparison of a RESP type with a status or with a bit of readiness is a warning. */
#define VKP_RESP_NULL ((vkp_resp_type)VKP_RESP_NULL)
#define VKP_RESP_STRING ((vkp_resp_type)VKP_RESP_STRING)
#define VKP_RESP_ERROR ((vkp_resp_type)VKP_RESP_ERROR)
#define VKP_RESP_INTEGER ((vkp_resp_type)VKP_RESP_INTEGER)
#define VKP_RESP_DOUBLE ((vkp_resp_type)VKP_RESP_DOUBLE)
#define VKP_RESP_BOOL ((vkp_resp_type)VKP_RESP_BOOL)
#define VKP_RESP_BIGNUM ((vkp_resp_type)VKP_RESP_BIGNUM)
#define VKP_RESP_ARRAY ((vkp_resp_type)VKP_RESP_ARRAY)
#define VKP_RESP_SET ((vkp_resp_type)VKP_RESP_SET)
#define VKP_RESP_PUSH ((vkp_resp_type)VKP_RESP_PUSH)
#define VKP_RESP_MAP ((vkp_resp_type)VKP_RESP_MAP)
#define VKP_RESP_ATTRIBUTE ((vkp_resp_type)VKP_RESP_ATTRIBUTE)
#endif

/* The bits of vkp_value.flags. */
typedef enum vkp_value_flags {
    VKP_VALUE_SIMPLE = 1,     /* the string or error was sent as one line (+ or -) */
    VKP_VALUE_VERBATIM = 2,   /* the string was sent as =; str starts after the 4 bytes "txt:" */
    VKP_VALUE_NULL_BULK = 4,  /* the null was sent as $-1 */
    VKP_VALUE_NULL_ARRAY = 8, /* the null was sent as *-1 (with lenient also as >-1) */
    /* A push inside another aggregate: a message (servers before 7.2 write it into the reply of the
       command that publishes it, at any depth) or an invalidation (before 7.0). The push is no
       element of the aggregate: vkp_value.len does not count it, vkp_value_get_first and
       vkp_value_get_next skip it. A client delivers such a push by itself: replies have none. */
    VKP_VALUE_OUT_OF_BAND = 16
} vkp_value_flags;

/* One value of a tree. A tree is one array in the order of the wire: the elements of an aggregate
   follow the aggregate, each element with its own elements behind it. Walk the tree with
   vkp_value_get_first and vkp_value_get_next, never by index.                                 */
typedef struct vkp_value {
    uint8_t type;          /* a vkp_resp_type */
    uint8_t flags;         /* VKP_VALUE_* bits */
    uint16_t i_depth;      /* private */
    uint32_t span;         /* entries of the array that this value takes, with all its elements */
    uint32_t attributes;   /* entries back to this value's VKP_RESP_ATTRIBUTE; 0: none */
    uint32_t i_has_nested; /* private: a VKP_VALUE_OUT_OF_BAND is inside */
    size_t len;            /* bytes of str; of an aggregate, the number of elements */
    union {
        const char *str; /* text of a STRING, ERROR, DOUBLE or BIGNUM; not terminated */
        int64_t integer; /* number of an INTEGER; 0 or 1 of a BOOL */
        size_t i_offset; /* private */
    } u;
} vkp_value;

/* The first element of the aggregate `parent`; NULL when there is none, or parent is no aggregate.
   Attributes and VKP_VALUE_OUT_OF_BAND pushes are skipped. Views parent. Any thread.          */
VKP_API const vkp_value *vkp_value_get_first(const vkp_value *parent);

/* The element after `value` in the aggregate `parent`; NULL after the last one, or when value is
   NULL. Attributes and VKP_VALUE_OUT_OF_BAND pushes are skipped. Views parent. Any thread.    */
VKP_API const vkp_value *vkp_value_get_next(const vkp_value *parent, const vkp_value *value);

/* The text of a STRING, ERROR, BIGNUM or DOUBLE; empty for other types and for NULL. Views value.
   Any thread.                                                                                 */
VKP_API vkp_str vkp_value_get_str(const vkp_value *value);

/* The number of a DOUBLE or INTEGER, in any locale; 0 for other types. Any thread. */
VKP_API double vkp_value_get_double(const vkp_value *value);

/* Whether the value is a STRING or ERROR that equals the text, ASCII case ignored. False for a text
   whose ptr is NULL. Any thread.                                                              */
VKP_API bool vkp_value_is_text(const vkp_value *value, vkp_str text);

/* The limits of a reader. */
typedef struct vkp_resp_config {
    uint32_t max_depth; /* most levels of nested aggregates; 0: 128; at most 65,000 */
    /* Most elements of one aggregate, as counted on the wire (pairs of a map); 0: 2,147,483,647. */
    uint32_t max_elements;
    size_t max_bulk_bytes;  /* most bytes of one bulk string; 0: 512 MiB */
    size_t max_line_bytes;  /* most bytes of one line without its CRLF; 0: 64 KiB */
    size_t max_frame_bytes; /* most bytes of one frame; 0: 1 GiB; at most 4 GiB - 1 */
    bool lenient;       /* accept what old servers send: ,nan(x) ,-nan ,5. ,.5 and >-1 as null */
    const vkp_env *env; /* memory; NULL: all defaults */
} vkp_resp_config;

#endif /* VKP_NO_IO */

#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-push   What a server pushes                                                       */

/* The three kinds of subscription. */
typedef enum vkp_sub_kind {
    VKP_SUB_CHANNEL = 0, /* a pub/sub channel by its exact name: SUBSCRIBE */
    VKP_SUB_PATTERN,     /* all pub/sub channels that match a glob pattern: PSUBSCRIBE */
    VKP_SUB_SHARD        /* a shard channel by its exact name: SSUBSCRIBE */
} vkp_sub_kind;

/* The number of values of vkp_sub_kind. */
#define VKP_SUB_KINDS 3

/* What a push says. CONNECTED and all kinds below it are events of the client, not of the server:
   their frame is empty.                                                                       */
typedef enum vkp_push_kind {
    VKP_PUSH_MESSAGE = 0, /* a message of a subscribed name: channel, payload */
    VKP_PUSH_PMESSAGE,    /* a message that matches a pattern: pattern, channel, payload */
    VKP_PUSH_SMESSAGE,    /* a message of a subscribed shard channel: channel, payload */
    /* The server confirmed a subscription, for the first time or again after an outage: sub, and
       the name in channel.                                                                    */
    VKP_PUSH_SUBSCRIBED,
    VKP_PUSH_UNSUBSCRIBED, /* the last unsubscribe of a name is done: sub, the name in channel */
    VKP_PUSH_INVALIDATE, /* cached keys became invalid: frame holds them, or a null for all keys */
    VKP_PUSH_OTHER,      /* a push of another kind: frame; the name of the kind in channel */
    VKP_PUSH_CONNECTED,  /* once: the first connection of the client is ready */
    /* Once per outage, and at the start: the first try to connect has failed, and tries go on;
       payload says why, with the server's words.                                              */
    VKP_PUSH_CONNECT_FAILED,
    VKP_PUSH_DISCONNECTED, /* once per outage: a ready connection was lost; payload is the reason */
    VKP_PUSH_RECONNECTED,  /* once per outage: a connection is ready, the client subscribes again */
    /* The server refused a subscription: sub, the name in channel, the server's words in payload.
       The name stays wanted: the client asks again, and SUBSCRIBED or an event REFUSED with other
       words follows.                                                                          */
    VKP_PUSH_REFUSED,
    /* A subscription that the server had confirmed was taken away: sub, the name in channel, the
       reason in payload. The client asks again, and SUBSCRIBED or REFUSED follows.            */
    VKP_PUSH_LOST,
    /* Subscriptions are back: messages of the names in gap may have been lost. A name that is not
       back is not in it: it gets a GAP of its own.                                            */
    VKP_PUSH_GAP,
    /* The channel of pushes was full: `missed` pushes were dropped before this one. */
    VKP_PUSH_LAGGED
} vkp_push_kind;

/* The name of a subscription, with its kind. */
typedef struct vkp_sub_name {
    vkp_sub_kind kind; /* of the subscription */
    vkp_str name;      /* of the channel, or the pattern */
} vkp_sub_name;

/* What a GAP covers. from: the last moment at which the subscriptions were known to be good, which
   is when the last byte before the loss arrived. to: the confirmation of the last name.       */
typedef struct vkp_gap {
    uint64_t from_ns;          /* on the clock of vkp_now_ns */
    uint64_t to_ns;            /* on the clock of vkp_now_ns */
    uint64_t from_unix_ms;     /* from_ns as wall-clock time: milliseconds since 1970 */
    uint64_t to_unix_ms;       /* to_ns as wall-clock time */
    const vkp_sub_name *names; /* the names covered; NULL: all that are subscribed now */
    size_t name_count;         /* number of names; 0: all that are subscribed now */
} vkp_gap;

/* The kind as a text in lower case: static, never NULL. Any thread. */
VKP_API const char *vkp_push_kind_str(vkp_push_kind kind);

/* One push, a plain struct. A callback borrows the push; a receiver that took a push from a channel
   owns it, and gives it back with vkp_push_unref. Texts and gap are static, or valid as long as
   the reference that frame holds.                                                             */
typedef struct vkp_push {
    vkp_push_kind kind; /* says which of the other fields are set */
    vkp_sub_kind sub;   /* kind of the subscription: messages and events about one name */
    vkp_bytes frame;    /* the RESP bytes as received; of no bytes for events of the client */
    vkp_str channel;    /* the name; OTHER: the name of the push's kind */
    vkp_str pattern;    /* PMESSAGE: the pattern that matched */
    vkp_str payload; /* of a message; of CONNECT_FAILED, DISCONNECTED, REFUSED, LOST the reason */
    const vkp_gap *gap; /* GAP: what is covered; otherwise NULL */
    uint64_t missed;    /* LAGGED: the number of pushes dropped */
} vkp_push;

/* The cost of a push in bytes, struct and frame: for vkp_mpsc_config.cost. Any thread. */
VKP_API size_t vkp_push_get_cost(const void *push);

/* vkp_push_unref of a push that no receiver took: for vkp_mpsc_config.drop. Any thread. */
VKP_API void vkp_push_drop(void *user, void *push);

/* Give the reference to the frame back and zero the struct. NULL is ignored. Any thread. */
VKP_API void vkp_push_unref(vkp_push *push);

/* Read a value as a push; allocates nothing. A value of a known kind but another number of elements
   is VKP_PUSH_OTHER. The value may be a PUSH, or an ARRAY as RESP2 sends pushes.
   Owns:   *push views value and holds no reference (frame is empty)
   Blocks: never     Threads: any     In callbacks: ok
   Errors: INVALID (a null argument, no PUSH or ARRAY, the first element is no string)         */
VKP_API VKP_NODISCARD vkp_status vkp_push_from_value(const vkp_value *value, vkp_push *push);

#endif /* VKP_NO_IO */

#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-client   A connection to a server, shared by many threads                         */

/* The value of the reply; an attribute before it is only in the frame. Views the reply. Any
   thread.                                                                                     */
VKP_API const vkp_value *vkp_reply_get_value(const vkp_reply *reply);

/* The bytes of the reply as received. Views the reply, holds no reference. Any thread. */
VKP_API vkp_bytes vkp_reply_get_frame(const vkp_reply *reply);

/* One more reference to the reply (gives). Any thread. */
VKP_API vkp_reply *vkp_reply_ref(vkp_reply *reply);

/* Give a reference back; the last one frees the reply. NULL is ignored. Any thread. */
VKP_API void vkp_reply_unref(vkp_reply *reply);

/* What a client does now. */
typedef enum vkp_client_state {
    VKP_CLIENT_CONNECTING = 0, /* connects and does the handshake; commands wait for its end */
    VKP_CLIENT_READY,          /* connected; commands are sent */
    VKP_CLIENT_WAITING,        /* waits for the next try to connect; commands get DISCONNECTED */
    VKP_CLIENT_CLOSED          /* closed; commands and subscriptions get CLOSED */
} vkp_client_state;

/* What the server must be. */
typedef enum vkp_client_role {
    VKP_CLIENT_ROLE_ANY = 0, /* a primary or a replica */
    VKP_CLIENT_ROLE_PRIMARY  /* a primary; on another server the client closes and tries again */
} vkp_client_role;

/* One command that each new connection sends before all others. */
typedef struct vkp_client_setup {
    size_t argc;         /* number of arguments, the command's name included; at least 1 */
    const vkp_str *argv; /* the arguments; any bytes */
    vkp_str expect;      /* the text that must be answered; ptr NULL: anything but an error */
    bool optional;       /* any answer will do */
} vkp_client_setup;

/* Where a try to connect goes, and with which credentials: what on_connect may change. */
typedef struct vkp_client_target {
    vkp_str address;  /* as vkp_client_config.address */
    vkp_str username; /* as vkp_client_config.username */
    vkp_str password; /* as vkp_client_config.password */
} vkp_client_target;

/* How a client connects, reconnects and delivers pushes. Only address is required. */
typedef struct vkp_client_config {
    vkp_str address;  /* required: "tcp:HOST:PORT" or "unix:PATH" */
    vkp_str username; /* sent with the password; ptr NULL: the user "default" */
    vkp_str password; /* ptr NULL: no authentication */
    vkp_str name;     /* the connection's name on the server (SETNAME); ptr NULL: none */
    int protocol;     /* 0 or 3: RESP3, or RESP2 when the server has no RESP3; 2: RESP2, no HELLO */
    uint32_t database;    /* the database that each new connection selects; 0: that of the server */
    vkp_client_role role; /* what the server must be; default: any */

    /* The commands that each new connection sends after the login, before anybody's commands;
       copied. An answer that is not the expected one ends the try to connect. */
    const vkp_client_setup *setup;
    size_t setup_count; /* number of setup commands */

    /* Called before each try to connect, on the loop's thread; may change *target, which holds what
       the config says. The texts are copied when it returns. NULL: not called.                */
    void (*on_connect)(void *user, vkp_client_target *target);

    /* Looks the host name of the address up, in a thread of the program: then no lookup blocks the
       loop (shares). NULL: lookups block the loop's thread; addresses in digits need none. */
    vkp_resolver *resolver;

    /* Most milliseconds for one try, from the connect to the end of the handshake. 0: 5,000.
       VKP_OFF: no limit.                                                                      */
    uint64_t connect_timeout_ms;

    /* The client waits a random time before each new try: from 0 to a bound that starts here and
       doubles with each failed try. Milliseconds; 0: 50.                                      */
    uint64_t retry_min_ms;
    uint64_t retry_max_ms; /* the largest bound of the random wait before a try, in ms; 0: 5,000 */

    /* A connection that stood for this many milliseconds makes the bound start again. A server that
       answers the login and then hangs up is so not asked without end. 0: 5,000.              */
    uint64_t retry_reset_ms;

    /* TCP: after this many milliseconds without a byte the kernel asks the peer, as
       vkp_conn_config.keepalive_ms. 0: 30,000. VKP_OFF: never.                                */
    uint64_t keepalive_ms;

    /* TCP: bytes that the peer does not acknowledge for this many milliseconds mean that the
       connection is lost, as vkp_conn_config.unacked_ms. 0: 20,000. VKP_OFF: never.           */
    uint64_t unacked_ms;

    /* Every so many milliseconds the client asks the server for its own count of this connection's
       subscriptions (CLIENT INFO; where that is refused, PING), and subscribes again to what is
       missing, which a GAP reports. 0: 15,000. VKP_OFF: never.                                */
    uint64_t heartbeat_ms;

    /* When the oldest reply has been due for this long, the client asks over a second, short
       connection whether the server is alive: BUSY, LOADING and a blocked connection mean that it
       is, and the wait goes on; no answer, or a server that has nothing to do, that this connection
       is lost. Milliseconds; 0: 5,000. VKP_OFF: replies are waited for without end.           */
    uint64_t reply_timeout_ms;

    /* A server that serves others while it keeps this connection blocked (CLIENT PAUSE, a blocking
       command) is waited for at most so many milliseconds; then the connection is lost. 0: 60,000.
       VKP_OFF: without end.                                                                   */
    uint64_t blocked_timeout_ms;

    /* Most bytes of commands that wait or whose reply is missing; one command always fits.
       0: 64 MiB.                                                                              */
    size_t queue_bytes;
    vkp_resp_config resp; /* limits of the client's reader; lenient and env are ignored */

    /* Called with each push on the loop's thread; the push is borrowed. on_push and pushes must not
       both be set; with neither, pushes are dropped.                                          */
    void (*on_push)(void *user, const vkp_push *push);
    void *user; /* the first argument of on_push and on_connect */

    /* The sender of a channel of vkp_push, for each push (shares until the close). When the channel
       is full the push is dropped; when there is room, a LAGGED with the number follows.      */
    vkp_mpsc_tx *pushes;
    const vkp_env *env; /* memory and log; NULL: the loop's */
} vkp_client_config;

/* Open a client and start to connect. The client reconnects until it is closed: a server that
   does not answer is no error here. If the server refuses the password, the client closes the
   connection and tries again; it never uses a connection without authentication.
   Owns:   borrows config (copies texts); shares loop, pushes and resolver; gives *client
   Blocks: never; the loop blocks on DNS, for host names without a resolver
   Threads: loop's     In callbacks: ok
   Errors: INVALID (a null argument, no address or a malformed one, another thread, an unknown
   protocol, both on_push and pushes, a limit in resp above its maximum), LIMIT (a socket path too
   long for the system), UNSUPPORTED (unix:@NAME outside Linux), NOMEM, CLOSED (loop)          */
VKP_API VKP_NODISCARD vkp_status vkp_client_open(vkp_loop *loop, const vkp_client_config *config,
                                                 vkp_client **client);

/* One more reference to the client (gives). Any thread. */
VKP_API vkp_client *vkp_client_ref(vkp_client *client);

/* Give a reference back; the last one closes the client. NULL is ignored. Any thread. */
VKP_API void vkp_client_unref(vkp_client *client);

/* Close the connection. Commands without a reply get CLOSED; no callback runs after that. On the
   loop's thread all this is done when the call returns; other threads queue it as a task for the
   loop. Idempotent; NULL is ignored. Any thread.                                              */
VKP_API void vkp_client_close(vkp_client *client);

/* The state of the client. Any thread. */
VKP_API vkp_client_state vkp_client_get_state(const vkp_client *client);

/* The protocol of the last handshake, 2 or 3; 0 before the first handshake. Any thread. */
VKP_API int vkp_client_get_protocol(const vkp_client *client);

/* Copy an English text that says what ended the last connection or try; "" if nothing did. At most
   size bytes with the NUL. Any thread.                                                        */
VKP_API void vkp_client_get_error(vkp_client *client, char *text, size_t size);

/* What vkp_client_get_stats writes: how often since open. */
typedef struct vkp_client_stats {
    uint64_t connections; /* connections that were ready */
    uint64_t failures;    /* tries to connect that failed */
    uint64_t outages;     /* ready connections that were lost: DISCONNECTED */
    uint64_t gaps;        /* times in which messages may have been lost: GAP */
    uint64_t refusals;    /* refusals of a SUBSCRIBE; REFUSED reports only new words */
    uint64_t losses;      /* subscriptions that the server took away: LOST */
    uint64_t audits;      /* comparisons of the server's counts with the client's subscriptions */
    uint64_t repairs;     /* audits that found too few subscriptions, by kind */
    uint64_t probes;      /* questions over a second connection whether the server is alive */
} vkp_client_stats;

/* Write the client's counters to *stats. Any thread. */
VKP_API void vkp_client_get_stats(const vkp_client *client, vkp_client_stats *stats);

/* Subscribe to a name. The server receives one SUBSCRIBE however many calls name it; each call
   needs one vkp_client_unsubscribe. The name is wanted until then: the client subscribes again
   after an outage, and asks again after a refusal (0.1 to 5 s later where the server's words
   promise an end, as BUSY and LOADING do, otherwise 1 to 30 s later). SUBSCRIBED, REFUSED and LOST
   report each change.
   Owns:   borrows name     Blocks: never     Threads: any     In callbacks: ok
   Errors: NOMEM, CLOSED, INVALID (client NULL, an unknown kind, name.ptr NULL with len > 0)   */
VKP_API VKP_NODISCARD vkp_status vkp_client_subscribe(vkp_client *client, vkp_sub_kind kind,
                                                      vkp_str name);

/* Receives the first outcome of a vkp_client_subscribe_then, once, on the loop's thread: OK (the
   server confirmed, now or earlier), REFUSED (words are the server's), DISCONNECTED (no connection;
   words say why), or CLOSED (the client). After REFUSED and DISCONNECTED the name is still wanted.
   words are valid until the function returns.                                                 */
typedef void (*vkp_subscribe_fn)(void *user, vkp_status status, vkp_str words);

/* vkp_client_subscribe with a notice of the first outcome: after OK, done is called once, never
   inside this call.
   Owns:   borrows name     Blocks: never     Threads: any     In callbacks: ok
   Errors: NOMEM, CLOSED, INVALID (client or done NULL, an unknown kind, name.ptr NULL with
   len > 0)                                                                                    */
VKP_API VKP_NODISCARD vkp_status vkp_client_subscribe_then(vkp_client *client, vkp_sub_kind kind,
                                                           vkp_str name, vkp_subscribe_fn done,
                                                           void *user);

/* Take one subscribe call back; the last one of a name sends UNSUBSCRIBE. A name that is not
   subscribed is ignored.
   Owns:   borrows name     Blocks: never     Threads: any     In callbacks: ok
   Errors: NOMEM, CLOSED, INVALID (client NULL, an unknown kind, name.ptr NULL with len > 0)   */
VKP_API VKP_NODISCARD vkp_status vkp_client_unsubscribe(vkp_client *client, vkp_sub_kind kind,
                                                        vkp_str name);

/* Send a command. The slot `reply`, which this call initialises, receives a vkp_reply* to unref. An
   error of the server is a reply of type VKP_RESP_ERROR. The arguments are terminated strings,
   then NULL. A command sent while the client connects waits for the end of the handshake. After
   OK, vkp_oneshot_recv returns CLOSED when no reply follows: the connection was lost or the client
   was closed (the command may or may not have run), the reply found no memory or was over a limit
   of config.resp, or the command was not sent (RESP2, and something is subscribed).
   Owns:   borrows the arguments, and the slot until vkp_oneshot_recv returned or it was closed
   Blocks: never     Threads: any     In callbacks: ok (take the reply with vkp_oneshot_try_recv)
   Errors: DISCONNECTED (the client waits for its next try; nothing was sent), FULL (queue_bytes),
   REFUSED (a command that changes the shared connection: SUBSCRIBE and UNSUBSCRIBE in all forms,
   HELLO, AUTH, RESET, QUIT, MONITOR, MULTI, EXEC, DISCARD, WATCH, SELECT, SYNC, PSYNC, CLIENT
   REPLY), LIMIT (more than 64 arguments, which vkp_client_command_argv takes; 4 GiB), CLOSED,
   NOMEM, INVALID (a null argument, no command)                                                */
VKP_API VKP_NODISCARD vkp_status vkp_client_command(vkp_client *client, vkp_oneshot *reply, ...)
    __attribute__((sentinel));

/* vkp_client_command with an array of argc arguments, which may hold any bytes. The slot `reply`
   receives a vkp_reply* to unref, or CLOSED.
   Owns:   borrows argv, and the slot until vkp_oneshot_recv returned or it was closed
   Blocks: never     Threads: any     In callbacks: ok (take the reply with vkp_oneshot_try_recv)
   Errors: as vkp_client_command, but LIMIT only at 4 GiB; INVALID (a null argument, argc 0)   */
VKP_API VKP_NODISCARD vkp_status vkp_client_command_argv(vkp_client *client, vkp_oneshot *reply,
                                                         size_t argc, const vkp_str *argv);

/* Receives the outcome of vkp_client_send, once, on the loop's thread. status OK: value and frame
   are the last reply, valid until the function returns. Otherwise value and frame are NULL, and
   status is DISCONNECTED (the commands may or may not have run), CLOSED (the client), LIMIT (the
   last reply was over a limit of config.resp, or had a number that the reader refuses; the
   commands ran), or REFUSED (not sent: RESP2, and something is subscribed). */
typedef void (*vkp_reply_fn)(void *user, vkp_status status, const vkp_value *value,
                             const vkp_bytes *frame);

/* Send bytes that hold `replies` whole commands, which stay together on the wire. The bytes are not
   checked. After OK, the loop's thread calls on_reply once, with the LAST reply; after an error
   on_reply is not called.
   Owns:   borrows commands (shares the block)
   Blocks: never     Threads: any     In callbacks: ok
   Errors: DISCONNECTED (the client waits for its next try), FULL (queue_bytes), CLOSED, NOMEM,
   INVALID (client, commands or on_reply NULL; no bytes; replies 0)                            */
VKP_API VKP_NODISCARD vkp_status vkp_client_send(vkp_client *client, const vkp_bytes *commands,
                                                 uint32_t replies, vkp_reply_fn on_reply,
                                                 void *user);

#endif /* VKP_NO_IO */

#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-resolver   Names without blocking
   A lookup of a host name blocks: for seconds where the name server does not answer. A resolver
   does lookups in a thread of the program, for all clients that share it. */

/* Open a resolver. NULL env: all defaults.
   Owns:   gives *resolver     Blocks: never     Threads: any     In callbacks: ok
   Errors: NOMEM, INVALID (resolver NULL) */
VKP_API VKP_NODISCARD vkp_status vkp_resolver_open(const vkp_env *env, vkp_resolver **resolver);

/* Look names up until vkp_resolver_close: the body of a thread. Several threads may run at once:
   then a name that takes long delays no other. Hold a reference meanwhile. To end a program, do not
   wait for this thread: a lookup cannot be interrupted.
   Blocks: on DNS, and between lookups     Threads: any     In callbacks: no */
VKP_API void vkp_resolver_run(vkp_resolver *resolver);

/* End vkp_resolver_run, after its current lookup; lookups that wait, and later ones, fail.
   Idempotent; NULL is ignored. Any thread. */
VKP_API void vkp_resolver_close(vkp_resolver *resolver);

/* One more reference to the resolver (gives). Any thread. */
VKP_API vkp_resolver *vkp_resolver_ref(vkp_resolver *resolver);

/* Give a reference back; the last one closes and frees. Clients hold references of their own. NULL
   is ignored. Any thread. */
VKP_API void vkp_resolver_unref(vkp_resolver *resolver);

#endif /* VKP_NO_IO */

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

/* --------------------------------------------------------------------------------------
   >>api-mpsc   Many senders, one receiver                                                     */

/* The configuration of an mpsc channel. Every zero is a default; only elem_bytes is required. */
typedef struct vkp_mpsc_config {
    /* Bytes of one value, 1 to 64 KiB; required. */
    size_t elem_bytes;
    /* The most values queued; 0 = unbounded. With lanes: counted per sender. */
    size_t capacity_items;
    /* The most bytes queued, as cost() counts bytes; 0 = unbounded. An empty channel takes a value
       of any cost. */
    size_t capacity_bytes;
    /* The bytes that a value counts for in capacity_bytes; NULL: elem_bytes. Called when a value is
       sent, received or dropped, on that thread, maybe under the channel's lock: return the same
       number each time, and call no function of this library. */
    size_t (*cost)(const void *item);
    /* Called once on each value that nobody received, never under a lock, on the thread that gives
       the receiver back, or on a sender's thread after that. NULL: values need no drop. */
    void (*drop)(void *user, void *item);
    /* The first argument of drop. */
    void *user;
    /* Memory and system calls; NULL: the defaults. */
    const vkp_env *env;
    /* True: each sender of vkp_mpsc_tx_clone has a lane, so that sending threads do not contend.
       The order of values is then kept per sender only, and capacity_items counts per sender. */
    bool lanes;
} vkp_mpsc_config;

/* Open a channel: its one receiver and the first sender. Memory for values is allocated with the
   first values and grows as needed; more than 64 KiB that a burst took is freed when the receiver
   waits on the empty channel. Values lie at addresses aligned to 8; to 16 where elem_bytes is a
   multiple of 16; to 64 where elem_bytes is a multiple of 64. A NULL config returns INVALID.
   Owns:   borrows config; gives *tx and *rx   Blocks: never   Threads: any   In callbacks: ok
   Errors: INVALID (a null argument; elem_bytes 0 or above 64 KiB; lanes with capacity_bytes),
   NOMEM                                                                                       */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_open(const vkp_mpsc_config *config, vkp_mpsc_tx **tx,
                                               vkp_mpsc_rx **rx);

/* One more reference to the sender (gives, the same pointer). Any thread. */
VKP_API vkp_mpsc_tx *vkp_mpsc_tx_ref(vkp_mpsc_tx *tx);

/* Another sender for the same receiver. Without config.lanes this is vkp_mpsc_tx_ref. With
   config.lanes the new sender has its own lane, and the receiver takes at most 64 values in a row
   from one lane while another lane has values.
   Owns:   gives *clone     Blocks: never     Threads: any     In callbacks: ok
   Errors: NOMEM, INVALID                                                                      */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_tx_clone(vkp_mpsc_tx *tx, vkp_mpsc_tx **clone);

/* Give a reference to the sender back. After the last reference of all senders, the receiver
   receives the values still queued, then CLOSED. NULL is ignored. Any thread.                 */
VKP_API void vkp_mpsc_tx_unref(vkp_mpsc_tx *tx);

/* A weak sender (gives): a reference that does not keep the channel open for the receiver, and
   cannot send; vkp_mpsc_upgrade makes a sender of it. Any thread.                             */
VKP_API vkp_mpsc_weak *vkp_mpsc_downgrade(vkp_mpsc_tx *tx);

/* A sender from a weak sender; with config.lanes a sender with its own lane.
   Owns:   gives *tx     Blocks: never     Threads: any     In callbacks: ok
   Errors: CLOSED (no sender is left), NOMEM (a lane), INVALID                                 */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_upgrade(vkp_mpsc_weak *weak, vkp_mpsc_tx **tx);

/* Give a weak sender back. NULL is ignored. Any thread. */
VKP_API void vkp_mpsc_weak_unref(vkp_mpsc_weak *weak);

/* Enqueue one value; wait for room until the deadline. Waiting senders get room in order of
   arrival.
   Owns:   takes what *item owns (on failure it stays the caller's)
   Blocks: until deadline_ns     Threads: any     In callbacks: would stall the loop
   Errors: CLOSED (the receiver closed), TIMEOUT (no room until the deadline), NOMEM, INVALID  */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_send(vkp_mpsc_tx *tx, const void *item,
                                               uint64_t deadline_ns);

/* Enqueue one value without waiting; never overtakes a waiting sender.
   Owns:   takes what *item owns (on failure it stays the caller's)
   Blocks: never     Threads: any     In callbacks: ok
   Errors: FULL (at capacity, or other senders wait for room), CLOSED (the receiver closed), NOMEM,
   INVALID                                                                                     */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_try_send(vkp_mpsc_tx *tx, const void *item);

/* Enqueue the `count` values of an array in order; wait for room until the deadline (0: as many
   values as fit now). OK: *sent is at least 1. *sent below count means that the deadline passed,
   the receiver closed, or memory ran out; the values not sent stay the caller's.
   Owns:   takes what the first *sent values own
   Blocks: until deadline_ns     Threads: any     In callbacks: ok with deadline 0
   Errors, when no value was sent: CLOSED (the receiver closed), TIMEOUT (no room until the
   deadline), NOMEM, INVALID (a null argument, count 0)                                        */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_send_many(vkp_mpsc_tx *tx, const void *items,
                                                    size_t count, uint64_t deadline_ns,
                                                    size_t *sent);

/* A permit: a reserved place of a channel, in the caller's memory. Build the value at `item`, then
   call vkp_mpsc_commit or vkp_mpsc_abort, once, on any thread. Until then the receiver gets no
   value sent behind the permit.                                                               */
typedef struct vkp_mpsc_permit {
    void *item;        /* elem_bytes, uninitialised; the caller's until commit or abort */
    void *i_lane;      /* private: the queue of the permit's place */
    void *i_ring;      /* private: the memory of the permit's place */
    uint64_t i_ticket; /* private: the number of the permit's place */
} vkp_mpsc_permit;

/* Reserve a place; wait for room until the deadline.
   Owns:   *permit views the channel: commit or abort before you give the sender back
   Blocks: until deadline_ns     Threads: any     In callbacks: would stall the loop
   Errors: CLOSED (the receiver closed), TIMEOUT (no room until the deadline), NOMEM, INVALID (a
   null argument; a channel with capacity_bytes: the cost of the value is not known yet)       */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_reserve(vkp_mpsc_tx *tx, uint64_t deadline_ns,
                                                  vkp_mpsc_permit *permit);

/* Reserve a place without waiting; never overtakes a waiting sender.
   Owns:   *permit views the channel: commit or abort before you give the sender back
   Blocks: never     Threads: any     In callbacks: ok
   Errors: FULL (at capacity, or other senders wait for room), CLOSED (the receiver closed), NOMEM,
   INVALID (a null argument; a channel with capacity_bytes: the cost of the value is not known
   yet)                                                                                        */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_try_reserve(vkp_mpsc_tx *tx, vkp_mpsc_permit *permit);

/* Send the value built at permit->item. The value is received even if the receiver closed after the
   reserve, and is dropped through `drop` if the receiver was given back.
   Owns:   takes what the value owns     Blocks: never     Threads: any     In callbacks: ok   */
VKP_API void vkp_mpsc_commit(vkp_mpsc_permit *permit);

/* Give a permit back without a value. The receiver skips the place; there is room for another value
   when the receiver has reached the place. Never blocks. Any thread.                          */
VKP_API void vkp_mpsc_abort(vkp_mpsc_permit *permit);

/* Wait until the receiver closes or is given back.
   Blocks: until deadline_ns     Threads: any     In callbacks: would stall the loop
   Errors: TIMEOUT, INVALID                                                                    */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_wait_closed(vkp_mpsc_tx *tx, uint64_t deadline_ns);

/* True once the receiver closed or was given back: no later send succeeds. Any thread. */
VKP_API bool vkp_mpsc_is_closed(const vkp_mpsc_tx *tx);

/* The number of values that fit now, by capacity_items alone; SIZE_MAX when that is unbounded. With
   lanes: of this sender. Other threads may change the number immediately. Any thread.         */
VKP_API size_t vkp_mpsc_get_room(const vkp_mpsc_tx *tx);

/* The channel's capacity_items; 0 = unbounded. Any thread. */
VKP_API size_t vkp_mpsc_get_capacity(const vkp_mpsc_tx *tx);

/* The number of references to the sender; with config.lanes, the number of senders. Other threads
   may change the number immediately. Any thread.                                              */
VKP_API size_t vkp_mpsc_get_senders(const vkp_mpsc_tx *tx);

/* The number of weak senders. Other threads may change the number immediately. Any thread. */
VKP_API size_t vkp_mpsc_get_weak_senders(const vkp_mpsc_tx *tx);

/* Take the oldest value; wait for a value until the deadline. Several threads may share a receiver
   if a mutex of theirs admits one at a time.
   Owns:   gives what *out owns
   Blocks: until deadline_ns     Threads: the receiver's     In callbacks: would stall the loop
   Errors: CLOSED (drained, and no sender is left or vkp_mpsc_close was called), TIMEOUT, INVALID */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_recv(vkp_mpsc_rx *rx, uint64_t deadline_ns, void *out);

/* Take the oldest value without waiting.
   Owns:   gives what *out owns     Blocks: never     Threads: the receiver's     In callbacks: ok
   Errors: EMPTY (no value; or a sender is about to fill the oldest place, or the oldest place is a
   permit), CLOSED (drained, and no sender is left or vkp_mpsc_close was called), INVALID      */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_try_recv(vkp_mpsc_rx *rx, void *out);

/* Take up to `capacity` values in one call, into the array `out`. Waits for the first value only,
   until the deadline (0: does not wait). OK: *count is at least 1.
   Owns:   gives what the values own
   Blocks: until deadline_ns     Threads: the receiver's     In callbacks: ok with deadline 0
   Errors: CLOSED (drained, and no sender is left or vkp_mpsc_close was called), TIMEOUT, INVALID (a
   null argument, capacity 0)                                                                  */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_recv_many(vkp_mpsc_rx *rx, uint64_t deadline_ns,
                                                    void *out, size_t capacity, size_t *count);

/* Give a pointer to the oldest value, and leave the value in the channel.
   Owns:   *item views the channel: valid until the next call that receives
   Blocks: never     Threads: the receiver's     In callbacks: ok
   Errors: EMPTY, CLOSED (drained, and no sender is left or vkp_mpsc_close was called), INVALID */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_peek(vkp_mpsc_rx *rx, const void **item);

/* The number of values queued now, permits included. Senders may change the number immediately.
   Receiver's thread.                                                                          */
VKP_API size_t vkp_mpsc_get_len(const vkp_mpsc_rx *rx);

/* True once vkp_mpsc_close was called or no sender is left: no new value arrives, except in permits
   reserved before; queued values are still received. Receiver's thread.                       */
VKP_API bool vkp_mpsc_rx_is_closed(const vkp_mpsc_rx *rx);

/* Refuse new values: senders get CLOSED, waiting senders immediately. Queued values, and the values
   of permits reserved before, are still received. Idempotent; NULL is ignored. Any thread.    */
VKP_API void vkp_mpsc_close(vkp_mpsc_rx *rx);

/* Close the channel, drop the queued values through `drop`, give the receiver back. Before this
   call, give back the handlers of the receiver. NULL is ignored. Receiver's thread.           */
VKP_API void vkp_mpsc_rx_unref(vkp_mpsc_rx *rx);

/* --------------------------------------------------------------------------------------
   >>api-oneshot   One value, once, in the caller's memory                                     */

#define VKP_ONESHOT_BYTES 48 /* the largest value of a one-shot */

/* A slot: the memory of a one-shot, on the receiver's side (a stack is fine): no allocation, no
   handle. The fields are private. The sender may use the slot until send or abandon; the receiver
   until recv returned or the receiver closed. The library's own senders (vkp_client_command)
   detach themselves when the receiver closes. With a sender of the program the slot must outlive
   the sender, or be made by vkp_oneshot_open.                                                 */
struct vkp_oneshot {
    uint32_t i_state;      /* which side finished first, and which side waits */
    uint32_t i_elem_bytes; /* bytes of the value */
    void *i_receiver;      /* the receiver's waiter */
    void *i_sender;        /* the sender's waiter */
    void *i_owner;         /* the sender's record, for i_detach */
    void (*i_detach)(struct vkp_oneshot *slot); /* makes the sender forget this slot */
    void (*i_drop)(void *user, void *item);     /* called on a value never received; or NULL */
    void *i_user;                               /* the first argument of i_drop */
    const vkp_env *i_env;                       /* the env of init or open */
    union {
        void *align_pointer;                    /* aligns bytes */
        uint64_t align_u64;                     /* aligns bytes */
        unsigned char bytes[VKP_ONESHOT_BYTES]; /* the first i_elem_bytes are the value */
    } i_value;                                  /* the value, aligned to 8 */
};

/* Prepare a slot for one value. A NULL env means the defaults. `drop` (may be NULL) is called once,
   with user, on a value that is sent and never received.
   Owns:   slot stays the caller's     Blocks: never     In callbacks: ok
   Threads: any, before the sender gets the slot
   Errors: INVALID (slot is NULL; elem_bytes 0 or above VKP_ONESHOT_BYTES)                     */
VKP_API VKP_NODISCARD vkp_status vkp_oneshot_init(vkp_oneshot *slot, const vkp_env *env,
                                                  size_t elem_bytes,
                                                  void (*drop)(void *user, void *item), void *user);

/* Allocate a slot and prepare it as vkp_oneshot_init does, for sides that end in any order. *slot
   has two references, one for each side: the sender gives its own back with vkp_oneshot_tx_unref,
   the receiver with vkp_oneshot_rx_unref. NULL env and NULL drop are allowed.
   Owns:   gives *slot, twice     Blocks: never     Threads: any     In callbacks: ok
   Errors: NOMEM, INVALID (slot is NULL; elem_bytes 0 or above VKP_ONESHOT_BYTES)              */
VKP_API VKP_NODISCARD vkp_status vkp_oneshot_open(const vkp_env *env, size_t elem_bytes,
                                                  void (*drop)(void *user, void *item), void *user,
                                                  vkp_oneshot **slot);

/* Sender: abandon the slot if no value was sent, and give the sender's reference back. For slots of
   vkp_oneshot_open. NULL is ignored. Sender's thread.                                         */
VKP_API void vkp_oneshot_tx_unref(vkp_oneshot *slot);

/* Receiver: close the slot, and give the receiver's reference back. For slots of vkp_oneshot_open.
   NULL is ignored. Receiver's thread.                                                         */
VKP_API void vkp_oneshot_rx_unref(vkp_oneshot *slot);

/* Sender: deliver the value and wake the receiver. The slot is not touched afterwards.
   Owns:   takes what *item owns (on failure it stays the caller's)
   Blocks: never     Threads: the sender's, once     In callbacks: ok
   Errors: CLOSED (the receiver closed first), INVALID (null argument; sent or abandoned before) */
VKP_API VKP_NODISCARD vkp_status vkp_oneshot_send(vkp_oneshot *slot, const void *item);

/* Sender: finish without a value; the receiver gets CLOSED. The slot is not touched afterwards. A
   call after a send does nothing; NULL is ignored. Sender's thread.                           */
VKP_API void vkp_oneshot_abandon(vkp_oneshot *slot);

/* Receiver: wait for the value until the deadline. After OK, CLOSED and TIMEOUT the slot is
   closed. Its memory may be reused after OK and CLOSED; after TIMEOUT too if the sender is the
   library's (vkp_client_command). A sender of the program gets CLOSED then, and still uses the
   slot, which must outlive that sender.
   Owns:   gives what *out owns
   Blocks: until deadline_ns     Threads: the receiver's     In callbacks: would stall the loop
   Errors: CLOSED (the sender abandoned the slot, or closed before), TIMEOUT, INVALID */
VKP_API VKP_NODISCARD vkp_status vkp_oneshot_recv(vkp_oneshot *slot, uint64_t deadline_ns,
                                                  void *out);

/* Receiver: take the value if it is there. After OK and CLOSED the slot is closed: its memory may
   be reused. EMPTY leaves the slot open.
   Owns:   gives what *out owns     Blocks: never     Threads: the receiver's     In callbacks: ok
   Errors: EMPTY (nothing was sent yet), CLOSED (the sender abandoned the slot, or the slot was
   closed before), INVALID                                                                     */
VKP_API VKP_NODISCARD vkp_status vkp_oneshot_try_recv(vkp_oneshot *slot, void *out);

/* Receiver: refuse the value; a value that was sent already is dropped through `drop`.
   Afterwards the memory of a slot that vkp_client_command initialised may be reused; a slot with
   a sender of the program must outlive that sender. Idempotent; NULL is ignored. Receiver's
   thread. */
VKP_API void vkp_oneshot_close(vkp_oneshot *slot);

/* Sender: true once the receiver closed the slot. Sender's thread, before send or abandon. */
VKP_API bool vkp_oneshot_is_closed(const vkp_oneshot *slot);

/* Sender: wait until the receiver closes the slot.
   Blocks: until deadline_ns     In callbacks: would stall the loop
   Threads: the sender's, before send or abandon
   Errors: TIMEOUT, INVALID                                                                    */
VKP_API VKP_NODISCARD vkp_status vkp_oneshot_wait_closed(vkp_oneshot *slot, uint64_t deadline_ns);

/* --------------------------------------------------------------------------------------
   >>api-broadcast   Every receiver sees every value                                           */

/* The configuration of a broadcast. elem_bytes and capacity_items are required. */
typedef struct vkp_broadcast_config {
    /* Bytes of one value, 1 to 64 KiB, at most 256 with retain; required. */
    size_t elem_bytes;
    /* The values kept for slow receivers; rounded up to a power of two; required. */
    size_t capacity_items;
    /* For values that own something, of at most 256 bytes; set together with drop. retain makes the
       copy *item an owner, too. Called for each copy that a receiver gets, on the receiver's
       thread, under a lock of the value's place: count a reference (vkp_bytes_ref) only.  */
    void (*retain)(void *user, void *item);
    /* For values that own something; set together with retain. drop gives up what the channel's
       own copy owns: when another value takes its place (on the sender's thread), or when the
       channel is freed. Never called under a lock. */
    void (*drop)(void *user, void *item);
    /* The first argument of retain and drop. */
    void *user;
    /* Memory and system calls; NULL: the defaults. */
    const vkp_env *env;
} vkp_broadcast_config;

/* Open a channel with one sender and no receivers. Allocates the memory of all values. A NULL
   config returns INVALID.
   Owns:   borrows config; gives *tx     Blocks: never     Threads: any     In callbacks: ok
   Errors: INVALID (a null argument; elem_bytes 0 or above 64 KiB, above 256 bytes with retain;
   capacity_items 0; only one of retain and drop), NOMEM                                       */
VKP_API VKP_NODISCARD vkp_status vkp_broadcast_open(const vkp_broadcast_config *config,
                                                    vkp_broadcast_tx **tx);

/* One more reference to the sender (gives, the same pointer). Any thread. */
VKP_API vkp_broadcast_tx *vkp_broadcast_tx_ref(vkp_broadcast_tx *tx);

/* Give a reference to the sender back. After the last one, receivers receive the values still kept,
   then CLOSED. NULL is ignored. Any thread.                                                   */
VKP_API void vkp_broadcast_tx_unref(vkp_broadcast_tx *tx);

/* A new receiver, which gets each value sent from now on.
   Owns:   gives *rx     Blocks: never     Threads: any     In callbacks: ok
   Errors: NOMEM, INVALID                                                                      */
VKP_API VKP_NODISCARD vkp_status vkp_broadcast_subscribe(vkp_broadcast_tx *tx,
                                                         vkp_broadcast_rx **rx);

/* A new receiver, which gets each value sent from now on, not what rx has not received yet.
   Owns:   gives *fresh     Blocks: never     Threads: the receiver's     In callbacks: ok
   Errors: NOMEM, INVALID                                                                      */
VKP_API VKP_NODISCARD vkp_status vkp_broadcast_resubscribe(vkp_broadcast_rx *rx,
                                                           vkp_broadcast_rx **fresh);

/* Give the receiver back. NULL is ignored. Receiver's thread. */
VKP_API void vkp_broadcast_rx_unref(vkp_broadcast_rx *rx);

/* Send one value to every receiver; the value replaces the oldest one when the channel is full.
   Never waits for receivers. All receivers see the values of several senders in one order.
   Owns:   takes what *item owns (on failure it stays the caller's)
   Blocks: never     Threads: any     In callbacks: ok
   Errors: CLOSED (no receiver), INVALID                                                       */
VKP_API VKP_NODISCARD vkp_status vkp_broadcast_send(vkp_broadcast_tx *tx, const void *item);

/* Take the oldest value that rx has not received yet; wait for a value until the deadline.
   Owns:   gives a copy, and what the copy owns
   Blocks: until deadline_ns     Threads: the receiver's     In callbacks: would stall the loop
   Errors: LAGGED (values were lost: vkp_broadcast_get_missed is their number; the next receive
   gives the oldest value still kept; *out may have been written), CLOSED (drained, and no sender is
   left), TIMEOUT, INVALID                                                                     */
VKP_API VKP_NODISCARD vkp_status vkp_broadcast_recv(vkp_broadcast_rx *rx, uint64_t deadline_ns,
                                                    void *out);

/* Take the oldest value that rx has not received yet, without waiting.
   Owns:   gives a copy, and what the copy owns
   Blocks: never     Threads: the receiver's     In callbacks: ok
   Errors: EMPTY (no new value), LAGGED (values were lost: vkp_broadcast_get_missed is their number;
   the next receive gives the oldest value still kept; *out may have been written), CLOSED
   (drained, and no sender is left), INVALID                                                   */
VKP_API VKP_NODISCARD vkp_status vkp_broadcast_try_recv(vkp_broadcast_rx *rx, void *out);

/* Take up to `capacity` values in one call, into the array `out`. Waits for the first value only,
   until the deadline (0: does not wait). OK: *count is at least 1.
   Owns:   gives copies, and what the copies own
   Blocks: until deadline_ns     Threads: the receiver's     In callbacks: ok with deadline 0
   Errors: LAGGED (values were lost: vkp_broadcast_get_missed is their number; the next receive
   gives the oldest value still kept; *out may have been written), CLOSED (drained, and no sender is
   left), TIMEOUT, INVALID (a null argument, capacity 0)                                       */
VKP_API VKP_NODISCARD vkp_status vkp_broadcast_recv_many(vkp_broadcast_rx *rx, uint64_t deadline_ns,
                                                         void *out, size_t capacity, size_t *count);

/* The exact number of values lost at the last LAGGED; 0 before the first. Receiver's thread. */
VKP_API uint64_t vkp_broadcast_get_missed(const vkp_broadcast_rx *rx);

/* The number of values sent and not received yet, values already lost included. Receiver's
   thread.                                                                                     */
VKP_API uint64_t vkp_broadcast_get_len(const vkp_broadcast_rx *rx);

/* The number of receivers now. Any thread. */
VKP_API size_t vkp_broadcast_get_receivers(const vkp_broadcast_tx *tx);

/* Wait until no receiver is left.
   Blocks: until deadline_ns     Threads: any     In callbacks: would stall the loop
   Errors: TIMEOUT, INVALID                                                                    */
VKP_API VKP_NODISCARD vkp_status vkp_broadcast_wait_closed(vkp_broadcast_tx *tx,
                                                           uint64_t deadline_ns);

/* --------------------------------------------------------------------------------------
   >>api-watch   Only the newest value                                                         */

/* The configuration of a watch. Every zero is a default; only elem_bytes is required. */
typedef struct vkp_watch_config {
    /* Bytes of the value, 1 to 64 KiB; required. */
    size_t elem_bytes;
    /* The first value, elem_bytes; NULL: zeroes, which are never dropped. vkp_watch_open takes what
       the value owns. */
    const void *initial;
    /* For values that own something; NULL for other values. Called once on each value that was
       replaced and is no longer borrowed, and on the last values when the channel is freed; on the
       thread of that call, never under a lock. Values with a drop are borrowed, not copied out
       (vkp_watch_get returns INVALID). */
    void (*drop)(void *user, void *item);
    /* The first argument of drop. */
    void *user;
    /* Memory and system calls; NULL: the defaults. */
    const vkp_env *env;
} vkp_watch_config;

/* Open a channel that holds the initial value, with one sender and no receivers. A NULL config
   returns INVALID.
   Owns:   borrows config, takes what *config->initial owns (on failure it stays the caller's);
   gives *tx
   Blocks: never     Threads: any     In callbacks: ok
   Errors: INVALID (a null argument; elem_bytes 0 or above 64 KiB), NOMEM                      */
VKP_API VKP_NODISCARD vkp_status vkp_watch_open(const vkp_watch_config *config, vkp_watch_tx **tx);

/* One more reference to the sender (gives, the same pointer). Any thread. */
VKP_API vkp_watch_tx *vkp_watch_tx_ref(vkp_watch_tx *tx);

/* Give a reference to the sender back. After the last one, vkp_watch_changed returns CLOSED once
   the newest value is seen. NULL is ignored. Any thread.                                      */
VKP_API void vkp_watch_tx_unref(vkp_watch_tx *tx);

/* A new receiver, which has seen the current value.
   Owns:   gives *rx     Blocks: never     Threads: any     In callbacks: ok
   Errors: NOMEM, INVALID                                                                      */
VKP_API VKP_NODISCARD vkp_status vkp_watch_subscribe(vkp_watch_tx *tx, vkp_watch_rx **rx);

/* A new receiver, which has seen the version that rx has seen last.
   Owns:   gives *copy     Blocks: never     Threads: the receiver's     In callbacks: ok
   Errors: NOMEM, INVALID                                                                      */
VKP_API VKP_NODISCARD vkp_status vkp_watch_rx_clone(vkp_watch_rx *rx, vkp_watch_rx **copy);

/* Give the receiver back, and end its borrow. NULL is ignored. Receiver's thread. */
VKP_API void vkp_watch_rx_unref(vkp_watch_rx *rx);

/* Replace the value and wake the receivers that wait for a change. Never waits for borrowers: a
   borrowed value stays as it is. Without receivers the value is not stored: CLOSED.
   Owns:   takes what *item owns (on failure it stays the caller's)
   Blocks: for other senders only     Threads: any     In callbacks: ok
   Errors: CLOSED (no receiver), NOMEM (every old value is borrowed, and no memory for one more),
   INVALID                                                                                     */
VKP_API VKP_NODISCARD vkp_status vkp_watch_send(vkp_watch_tx *tx, const void *item);

/* Replace the value, also without receivers, and wake the receivers that wait for a change. Never
   waits for borrowers: a borrowed value stays as it is.
   Owns:   takes what *item owns (on failure it stays the caller's)
   Blocks: for other senders only     Threads: any     In callbacks: ok
   Errors: NOMEM (every old value is borrowed, and no memory for one more), INVALID            */
VKP_API VKP_NODISCARD vkp_status vkp_watch_replace(vkp_watch_tx *tx, const void *item);

/* Call modify(user, item) with a copy of the current value. True: the copy, as modify changed it,
   becomes the new value, and waiting receivers wake. False: the value stays. Works without
   receivers. modify runs under the channel's lock, for which senders and borrowers wait: keep
   modify short, and call no function of this channel in it. *changed (may be NULL) is what modify
   returned.
   Blocks: for other senders only     Threads: any     In callbacks: ok
   Errors: NOMEM, INVALID (tx or modify is NULL; values with a drop)                           */
VKP_API VKP_NODISCARD vkp_status vkp_watch_send_if_modified(vkp_watch_tx *tx,
                                                            bool (*modify)(void *user, void *item),
                                                            void *user, bool *changed);

/* Copy the newest value into *out; do not mark the value as seen.
   Blocks: never     Threads: the receiver's     In callbacks: ok
   Errors: INVALID (a null argument, values with a drop)                                       */
VKP_API VKP_NODISCARD vkp_status vkp_watch_get(vkp_watch_rx *rx, void *out);

/* Copy the newest value into *out, and mark the value as seen.
   Blocks: never     Threads: the receiver's     In callbacks: ok
   Errors: INVALID (a null argument, values with a drop)                                       */
VKP_API VKP_NODISCARD vkp_status vkp_watch_get_and_update(vkp_watch_rx *rx, void *out);

/* A pointer to the newest value, without a copy; do not mark the value as seen. One borrow per
   receiver at a time. Senders do not wait for the end of a borrow. Returns NULL when rx is NULL or
   has a borrow already.
   Owns:   the pointer views the value until vkp_watch_release, or until vkp_watch_rx_unref
   Blocks: for modify of vkp_watch_send_if_modified only     Threads: the receiver's
   In callbacks: ok                                                                            */
VKP_API const void *vkp_watch_borrow(vkp_watch_rx *rx);

/* A pointer to the newest value, without a copy; mark the value as seen. One borrow per receiver at
   a time. Senders do not wait for the end of a borrow. Returns NULL when rx is NULL or has a borrow
   already.
   Owns:   the pointer views the value until vkp_watch_release, or until vkp_watch_rx_unref
   Blocks: for modify of vkp_watch_send_if_modified only     Threads: the receiver's
   In callbacks: ok                                                                            */
VKP_API const void *vkp_watch_borrow_and_update(vkp_watch_rx *rx);

/* End the receiver's borrow. NULL, and a receiver without a borrow, are ignored. Receiver's
   thread.                                                                                     */
VKP_API void vkp_watch_release(vkp_watch_rx *rx);

/* Wait for a version that rx has not seen, and mark the newest version as seen. No change is
   missed: a version sent before the call counts.
   Blocks: until deadline_ns     Threads: the receiver's     In callbacks: would stall the loop
   Errors: CLOSED (the newest version is seen, and no sender is left), TIMEOUT, INVALID        */
VKP_API VKP_NODISCARD vkp_status vkp_watch_changed(vkp_watch_rx *rx, uint64_t deadline_ns);

/* True while there is a version that rx has not seen, also after the last sender was given back.
   Receiver's thread.                                                                          */
VKP_API bool vkp_watch_is_changed(const vkp_watch_rx *rx);

/* Mark the newest version as not seen: vkp_watch_changed then returns OK immediately. Receiver's
   thread.                                                                                     */
VKP_API void vkp_watch_mark_changed(vkp_watch_rx *rx);

/* Mark the newest version as seen: vkp_watch_changed waits for a later one. Receiver's thread. */
VKP_API void vkp_watch_mark_unchanged(vkp_watch_rx *rx);

/* True once no sender is left. Receiver's thread. */
VKP_API bool vkp_watch_is_closed(const vkp_watch_rx *rx);

/* The number of receivers now. Any thread. */
VKP_API size_t vkp_watch_get_receivers(const vkp_watch_tx *tx);

/* Wait until no receiver is left.
   Blocks: until deadline_ns     Threads: any     In callbacks: would stall the loop
   Errors: TIMEOUT, INVALID                                                                    */
VKP_API VKP_NODISCARD vkp_status vkp_watch_wait_closed(vkp_watch_tx *tx, uint64_t deadline_ns);

/* --------------------------------------------------------------------------------------
   >>api-cancel   Cancellation tokens                                                          */

/* Open a token. With a parent, the token is cancelled with its parent (immediately, if the parent
   is cancelled already) and uses the parent's env. NULL parent: a token of its own; NULL env: the
   defaults.
   Owns:   shares parent; gives *token     Blocks: never     Threads: any     In callbacks: ok
   Errors: NOMEM, INVALID (token is NULL)                                                      */
VKP_API VKP_NODISCARD vkp_status vkp_cancel_open(const vkp_env *env, vkp_cancel *parent,
                                                 vkp_cancel **token);

/* One more reference to the token (gives, the same pointer). Any thread. */
VKP_API vkp_cancel *vkp_cancel_ref(vkp_cancel *token);

/* Give a reference to the token back; does not cancel. NULL is ignored. Any thread. */
VKP_API void vkp_cancel_unref(vkp_cancel *token);

/* Cancel the token and all its descendants: waits on them end, handlers of their cases are called.
   Idempotent. Any thread.                                                                     */
VKP_API void vkp_cancel_trigger(vkp_cancel *token);

/* True once the token is cancelled; never becomes false again. Any thread. */
VKP_API bool vkp_cancel_is_triggered(const vkp_cancel *token);

/* Wait until the token is cancelled.
   Blocks: until deadline_ns     Threads: any     In callbacks: would stall the loop
   Errors: TIMEOUT, INVALID                                                                    */
VKP_API VKP_NODISCARD vkp_status vkp_cancel_wait(vkp_cancel *token, uint64_t deadline_ns);

/* --------------------------------------------------------------------------------------
   >>api-select   Wait for the first ready case

   A case is one thing to wait for: made by the functions below, a struct in the caller's memory,
   valid while the object that the case names is valid. A case is used in one of two ways:
   vkp_select (this thread waits until one case won and was carried out), or vkp_handler_open (a
   loop calls a handler while the case is ready).                                              */

#define VKP_SELECT_MAX 64 /* the most cases of one select */

typedef struct vkp_i_case_kind vkp_i_case_kind;

/* A case. Read `status` and `ready` of the case that won; the other fields are private. */
typedef struct vkp_case {
    /* Of the case that won: what the try form of its call returned. */
    vkp_status status;
    /* Of a vkp_case_fd that won: what the descriptor is ready for, bits of vkp_io_bits. */
    uint32_t ready;
    const vkp_i_case_kind *i_kind; /* private: the functions of the case */
    void *i_object;                /* private: the object that the case names */
    void *i_out;                   /* private: the value, or where to put it */
    uint64_t i_number;             /* private: a deadline, or a descriptor and its interest */
} vkp_case;

/* A case that receives as vkp_mpsc_try_recv does: ready when there is a value or the end of the
   channel; status OK or CLOSED. NULL rx: as vkp_case_never. NULL out: for vkp_handler_open only.
   Receiver's thread.                                                                          */
VKP_API vkp_case vkp_case_mpsc_recv(vkp_mpsc_rx *rx, void *out);

/* A case that receives as vkp_oneshot_try_recv does: ready when the sender sent or abandoned;
   status OK or CLOSED. The slot stays open while the case does not win; a case that won never wins
   again. NULL slot: as vkp_case_never. NULL out: for vkp_handler_open only. Receiver's thread. */
VKP_API vkp_case vkp_case_oneshot_recv(vkp_oneshot *slot, void *out);

/* A case that receives as vkp_broadcast_try_recv does: ready when there is a new value, values were
   lost, or no sender is left; status OK, LAGGED or CLOSED. NULL rx: as vkp_case_never. NULL out:
   for vkp_handler_open only. Receiver's thread.                                               */
VKP_API vkp_case vkp_case_broadcast_recv(vkp_broadcast_rx *rx, void *out);

/* A case that waits as vkp_watch_changed does: ready when there is a version not seen, which the
   case marks as seen (status OK), or no sender is left (CLOSED). NULL rx: as vkp_case_never.
   Receiver's thread.                                                                          */
VKP_API vkp_case vkp_case_watch_changed(vkp_watch_rx *rx);

/* A case that sends *item: status OK, CLOSED or NOMEM. While the case waits, it has a place in the
   queue of waiting senders; when another case wins, the case gives the place up, and the next
   sender gets the room. A value not sent stays the caller's. NULL tx or item: as vkp_case_never.
   Any thread.                                                                                 */
VKP_API vkp_case vkp_case_mpsc_send(vkp_mpsc_tx *tx, const void *item);

/* A case that reserves a place: status OK, CLOSED or NOMEM; INVALID if the channel has
   capacity_bytes. While the case waits, it has a place in the queue of waiting senders; when
   another case wins, the case gives the place up, and the next sender gets the room. NULL tx or
   permit: as vkp_case_never. Any thread.                                                      */
VKP_API vkp_case vkp_case_mpsc_reserve(vkp_mpsc_tx *tx, vkp_mpsc_permit *permit);

/* A case that is ready once the receiver closed or was given back: status OK. NULL tx: as
   vkp_case_never. Any thread.                                                                 */
VKP_API vkp_case vkp_case_mpsc_closed(vkp_mpsc_tx *tx);

/* A case that is ready once the receiver closed the slot: status OK. NULL slot: as vkp_case_never.
   Sender's thread, before send or abandon.                                                    */
VKP_API vkp_case vkp_case_oneshot_closed(vkp_oneshot *slot);

/* A case that is ready while no receiver is left: status OK. NULL tx: as vkp_case_never. Any
   thread.                                                                                     */
VKP_API vkp_case vkp_case_broadcast_closed(vkp_broadcast_tx *tx);

/* A case that is ready while no receiver is left: status OK. NULL tx: as vkp_case_never. Any
   thread.                                                                                     */
VKP_API vkp_case vkp_case_watch_closed(vkp_watch_tx *tx);

/* A case that is ready once the token is cancelled: status OK. NULL token: as vkp_case_never. Any
   thread.                                                                                     */
VKP_API vkp_case vkp_case_cancel(vkp_cancel *token);

/* A case that is ready once the deadline passed: status OK. For vkp_select only; a loop has
   vkp_timer. Any thread.                                                                      */
VKP_API vkp_case vkp_case_deadline(uint64_t deadline_ns);

#ifndef VKP_NO_IO
/* A case that is ready when the descriptor is ready for interest (VKP_IO_READ, VKP_IO_WRITE), hung
   up or has an error: status OK, and `ready` set. For vkp_select only; a loop has vkp_io. The
   select then sleeps in poll(2), with a wake pipe opened for the sleep: a poll that fails makes the
   case win with status SYS, a pipe that fails makes vkp_select return SYS. fd below 0: as
   vkp_case_never. Any thread.                                                                 */
VKP_API vkp_case vkp_case_fd(int fd, uint32_t interest);
#endif

/* A case that is never ready, to leave a case of an array out by a condition. Any thread. */
VKP_API vkp_case vkp_case_never(void);

/* Wait until a case is ready, and carry out that case and no other. The first ready case in the
   array wins. *won is its index; cases[*won].status is the result of its call.
   Owns:   borrows cases
   Blocks: until deadline_ns (0: checks each case once)     In callbacks: ok with deadline 0
   Threads: a thread that is allowed to use the object of every case
   Errors: TIMEOUT (no case was ready: nothing was sent or received), SYS (no wake pipe for a
   vkp_case_fd), INVALID (a null argument; count 0 or above VKP_SELECT_MAX)                    */
VKP_API VKP_NODISCARD vkp_status vkp_select(vkp_case *cases, size_t count, uint64_t deadline_ns,
                                            size_t *won);

/* Wait until a case is ready, and carry out that case and no other, in turns: the search begins
   behind the case that won last, which *turn keeps (0 at first). A case that stays ready waits for
   at most count - 1 others. *won is the index of the case; cases[*won].status is the result of its
   call.
   Owns:   borrows cases
   Blocks: until deadline_ns (0: checks each case once)     In callbacks: ok with deadline 0
   Threads: a thread that is allowed to use the object of every case
   Errors: TIMEOUT (no case was ready: nothing was sent or received), SYS (no wake pipe for a
   vkp_case_fd), INVALID (a null argument; count 0 or above VKP_SELECT_MAX)                    */
VKP_API VKP_NODISCARD vkp_status vkp_select_fair(vkp_case *cases, size_t count, uint32_t *turn,
                                                 uint64_t deadline_ns, size_t *won);

#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-handler   Callbacks of a loop for channels                                            */

/* Open a handler: the loop calls fn(user) in every round in which the case `what` is ready. In fn,
   call the try form of the case's call, or close the handler: while the case stays ready, the loop
   calls fn again. A handler of vkp_case_mpsc_send or vkp_case_mpsc_reserve reserves nothing: the
   try form may still return FULL. `what` is copied; the object that the case names must outlive
   the handler. Make receiving cases with `out` NULL. Close a handler of a one-shot before the same
   side finishes the slot (send, abandon, recv, close).
   Owns:   borrows what; shares loop; gives *handler; user (may be NULL) stays the caller's
   Blocks: never     Threads: loop's     In callbacks: ok
   Errors: NOMEM, INVALID (a null argument, a case of vkp_case_fd or vkp_case_deadline, a closed
   loop, another thread)                                                                       */
VKP_API VKP_NODISCARD vkp_status vkp_handler_open(vkp_loop *loop, const vkp_case *what,
                                                  void (*fn)(void *user), void *user,
                                                  vkp_handler **handler);

/* End the handler: fn is no longer called. vkp_loop_close closes the handlers of the loop.
   Idempotent; NULL is ignored. Loop's thread, also inside fn.                                 */
VKP_API void vkp_handler_close(vkp_handler *handler);

/* Close the handler and give its reference back. NULL is ignored. Loop's thread, also inside fn. */
VKP_API void vkp_handler_unref(vkp_handler *handler);

#endif /* VKP_NO_IO */

#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-resp   RESP reader and writer                                                     */

/* Open an incremental reader. The reader allocates for bytes that arrived, never for a length or
   count that a header announces. NULL config: all defaults.
   Owns:   borrows config; gives *reader     Blocks: never     Threads: any     In callbacks: ok
   Errors: NOMEM, INVALID (reader NULL, max_depth or max_frame_bytes above its maximum)        */
VKP_API VKP_NODISCARD vkp_status vkp_resp_reader_open(const vkp_resp_config *config,
                                                      vkp_resp_reader **reader);

/* Free the reader and the values that it returned. NULL is ignored. Any thread, one at a time. */
VKP_API void vkp_resp_reader_unref(vkp_resp_reader *reader);

/* Append bytes to the reader's own buffer. NULL data is allowed with len 0.
   Owns:   borrows data (copies)     Blocks: never     Threads: any, one at a time
   Errors: NOMEM (nothing was appended), PROTOCOL or LIMIT (the reader's earlier error), INVALID */
VKP_API VKP_NODISCARD vkp_status vkp_resp_reader_feed(vkp_resp_reader *reader, const void *data,
                                                      size_t len);

/* Read the next whole value of the bytes that vkp_resp_reader_feed appended.
   Owns:   *value views the reader until the next call on the reader
   Blocks: never     Threads: any, one at a time     In callbacks: ok
   Errors: EMPTY (feed more bytes), PROTOCOL and LIMIT (each later call returns the error until
   reset: see vkp_resp_reader_get_error), NOMEM (call again), INVALID                          */
VKP_API VKP_NODISCARD vkp_status vkp_resp_reader_next(vkp_resp_reader *reader,
                                                      const vkp_value **value);

/* Read one value from the caller's bytes, without a copy. On OK *consumed is the length of the
   frame; the next window starts behind the frame. On EMPTY and NOMEM call again with the SAME
   bytes, possibly moved, and after EMPTY with more bytes behind them: the reader continues at its
   position. While a frame is incomplete do not change between scan and feed with next.
   Owns:   borrows window; *value views window, and the reader until the next call on the reader
   Blocks: never     Threads: any, one at a time     In callbacks: ok
   Errors: EMPTY (more bytes are needed), PROTOCOL and LIMIT (each later call returns the error
   until reset), NOMEM, INVALID                                                                */
VKP_API VKP_NODISCARD vkp_status vkp_resp_reader_scan(vkp_resp_reader *reader, const void *window,
                                                      size_t len, const vkp_value **value,
                                                      size_t *consumed);

/* The reason of the reader's error, with the limit or the byte; "" when there is no error.
   *position is the byte of the error, counted from open or reset; position may be NULL. Views the
   reader until the next call on it. Any thread, one at a time.                                */
VKP_API const char *vkp_resp_reader_get_error(const vkp_resp_reader *reader, uint64_t *position);

/* Drop the error, the fed bytes and the incomplete frame. Positions count from 0 again. Any
   thread, one at a time.                                                                      */
VKP_API void vkp_resp_reader_reset(vkp_resp_reader *reader);

/* The length of the first frame in the bytes; 0 when the frame is incomplete or malformed. Only for
   bytes that a reader without lenient accepted before. Any thread.                            */
VKP_API size_t vkp_resp_get_frame_len(const uint8_t *data, size_t len);

/* Builds RESP in one growing block. The struct is the caller's memory; its fields are private. The
   writer keeps the first error: call all put functions, then check the result of
   vkp_resp_writer_take.                                                                       */
typedef struct vkp_resp_writer {
    const vkp_env *i_env; /* private */
    vkp_block *i_block;   /* private */
    size_t i_len;         /* private */
    vkp_status i_status;  /* private */
} vkp_resp_writer;

/* Prepare an empty writer. NULL env: all defaults. Call this first, then the put functions. Any
   thread, one at a time.                                                                      */
VKP_API void vkp_resp_writer_init(vkp_resp_writer *writer, const vkp_env *env);

/* Put the header of an ARRAY, SET, PUSH, MAP or ATTRIBUTE; the elements follow. count is that of
   the wire: pairs for a MAP or ATTRIBUTE. Any thread, one at a time.                          */
VKP_API void vkp_resp_put_aggregate(vkp_resp_writer *writer, vkp_resp_type type, size_t count);

/* Put a bulk string ($) of any bytes. NULL data is allowed with len 0. Any thread, one at a
   time.                                                                                       */
VKP_API void vkp_resp_put_bulk(vkp_resp_writer *writer, const void *data, size_t len);

/* Put a simple string (+). The text is one line: a CR or LF is an error, INVALID. Any thread, one
   at a time.                                                                                  */
VKP_API void vkp_resp_put_simple(vkp_resp_writer *writer, vkp_str text);

/* Put an error (-). The text is one line: a CR or LF is an error, INVALID. Any thread, one at a
   time.                                                                                       */
VKP_API void vkp_resp_put_error(vkp_resp_writer *writer, vkp_str text);

/* Put an integer (:). Any thread, one at a time. */
VKP_API void vkp_resp_put_integer(vkp_resp_writer *writer, int64_t value);

/* Put a double (,) so that reading it gives the same number, in any locale; nan, inf and -inf
   too. Any thread, one at a time.                                                             */
VKP_API void vkp_resp_put_double(vkp_resp_writer *writer, double value);

/* Put a boolean (#). Any thread, one at a time. */
VKP_API void vkp_resp_put_bool(vkp_resp_writer *writer, bool value);

/* Put the null of RESP3 (_). Any thread, one at a time. */
VKP_API void vkp_resp_put_null(vkp_resp_writer *writer);

/* Put bytes unchanged, without a header; they are not checked. NULL data is allowed with len 0.
   Any thread, one at a time.                                                                  */
VKP_API void vkp_resp_put_raw(vkp_resp_writer *writer, const void *data, size_t len);

/* Put a whole value. protocol 3: as RESP3. Otherwise as a server writes to a RESP2 client: maps,
   sets and pushes as arrays, doubles and big numbers as bulk strings, booleans as 0 and 1, null
   as $-1 unless it was received as *-1, errors as one line, no attributes. VKP_VALUE_OUT_OF_BAND
   pushes inside the value are left out. Any thread, one at a time.                            */
VKP_API void vkp_resp_put_value(vkp_resp_writer *writer, const vkp_value *value, int protocol);

/* Take the bytes, or the first error of the put functions. The writer is then empty and without an
   error, after a failure too.
   Owns:   gives *bytes     Blocks: never     Threads: any, one at a time
   Errors: NOMEM, LIMIT (above 4 GiB - 1), INVALID (a CR or LF in put_simple or put_error)     */
VKP_API VKP_NODISCARD vkp_status vkp_resp_writer_take(vkp_resp_writer *writer, vkp_bytes *bytes);

/* Free the bytes that were not taken. The writer is then empty and may be used again. NULL is
   ignored. Any thread, one at a time.                                                         */
VKP_API void vkp_resp_writer_deinit(vkp_resp_writer *writer);

#endif /* VKP_NO_IO */

#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-registry   Finds live sockets by their paths                                      */

/* What a check found at a socket's file, which another program removed or replaced: see
   vkp_registry_config.check_ms. */
typedef enum vkp_socket_event {
    /* The socket's file is gone, or another file is in its place. */
    VKP_SOCKET_LOST = 1,
    /* The lost socket is bound to its path again: new clients can connect. */
    VKP_SOCKET_REBOUND,
    /* The lost socket could not be bound again, for the reason in `status`. Every check tries
       again; the event is repeated when the reason changes. */
    VKP_SOCKET_BLOCKED
} vkp_socket_event;

/* The config of vkp_registry_open. Zeroed: all defaults. */
typedef struct vkp_registry_config {
    /* Clients that may wait for accept, as for listen(2). Default: 4096. The system may cut it. */
    int backlog;
    /* Permissions of the sockets' files. Default: 0600. With more than 0600 every listener needs a
       gate that checks uids (vkp_gate); gates do so by default. */
    uint32_t mode;
    /* A path "@NAME" is an abstract name; opening one is UNSUPPORTED outside Linux. Default: false,
       a path "@NAME" is a file. */
    bool abstract_names;
    /* Most sockets alive at one time. Default: no limit. */
    size_t max_sockets;
    /* Most references of one socket. Default and maximum: 2^29. */
    size_t max_references;
    /* Folder of unique paths; copied. Default: $XDG_RUNTIME_DIR if this user owns it, else $TMPDIR,
       else /tmp. */
    vkp_str folder;
    /* Runs the timers of linger_ms and check_ms, which need a loop; shared. NULL: no timers. */
    vkp_loop *loop;
    /* Milliseconds from a socket's last reference to its end; opened again in that time, the socket
       lives on. Default: 0, it ends immediately. Needs loop. */
    uint64_t linger_ms;
    /* Milliseconds between two checks whether each socket's file is still its own. Default: 0, no
       checks. Needs loop. */
    uint64_t check_ms;
    /* A check binds a lost socket again. Default: false, a check only reports. */
    bool rebind;
    /* A check found an event; status is the reason of BLOCKED, else OK. Called once per event, on
       the loop's thread, not for sockets that linger. sock is borrowed; it may have ended since
       the check. NULL: not called. */
    void (*on_event)(void *user, vkp_socket *sock, vkp_socket_event event, vkp_status status);
    /* Handed to on_event. */
    void *user;
    /* Memory, log and system; must outlive the registry. NULL: the defaults. */
    const vkp_env *env;
} vkp_registry_config;

/* Open a registry: a map from paths to live sockets. A program may open several; none is global.
   NULL config: all defaults.
   Owns:   borrows config (copies folder), shares config.loop; gives *registry
   Blocks: never     Threads: any     In callbacks: ok
   Errors: NOMEM, INVALID (registry NULL; linger_ms or check_ms without a loop) */
VKP_API VKP_NODISCARD vkp_status vkp_registry_open(const vkp_registry_config *config,
                                                   vkp_registry **registry);

/* One more reference (gives, the same pointer). Any thread. */
VKP_API vkp_registry *vkp_registry_ref(vkp_registry *registry);

/* One reference less. A registry is freed when neither a reference nor a live socket is left. NULL
   is ignored. Any thread. */
VKP_API void vkp_registry_unref(vkp_registry *registry);

/* The number of sockets alive in this registry, sockets that linger included. Any thread; other
   threads may change the number immediately. */
VKP_API size_t vkp_registry_get_count(vkp_registry *registry);

/* Whether a socket of the path is alive in this registry, also one that lingers. Any thread; other
   threads may change this immediately. */
VKP_API bool vkp_registry_is_active(vkp_registry *registry, vkp_str path);

/* End every socket of the registry now, also sockets that linger, and remove their files; their
   listeners end too, each on its loop. Handles stay valid, but inactive. Returns how many sockets
   ended. May be called in an atexit function.
   Blocks: on the file system, and on threads that use the registry
   Threads: any     In callbacks: ok */
VKP_API size_t vkp_registry_cleanup_all(vkp_registry *registry);

/* Remove the files of the sockets that this process opened, and do nothing else: for handlers of
   crashes. The program must end right after it. Takes no lock, allocates nothing, is
   async-signal-safe. Any thread, also in signal handlers. */
VKP_API void vkp_registry_unlink_all(vkp_registry *registry);

/* What vkp_registry_get_stats writes. Counters count since the registry was opened. */
typedef struct vkp_registry_stats {
    /* Sockets alive now, sockets that linger included. */
    size_t live;
    /* References of all live sockets now. */
    size_t references;
    /* Sockets opened or adopted. */
    uint64_t created;
    /* Opened sockets that replaced a file left by a dead process. */
    uint64_t taken_over;
    /* Sockets that lingered and were opened again. */
    uint64_t revived;
    /* Sockets that ended. */
    uint64_t ended;
    /* Sockets that ended on another thread than that of their last unref: the other thread was in
       the registry, so it cleaned up. */
    uint64_t handed_over;
    /* Files that could not be removed. */
    uint64_t unlink_failures;
    /* The errno of the last file that could not be removed; 0: none. */
    int unlink_errno;
    /* Files that checks found gone or replaced. */
    uint64_t lost;
    /* Lost sockets that checks bound again. */
    uint64_t rebound;
    /* Nanoseconds that the last cleanup took: from the last unref (or the end of linger_ms, or the
       call of vkp_registry_cleanup_all) until the file was gone. */
    uint64_t cleanup_last_ns;
    /* Nanoseconds of the longest cleanup. */
    uint64_t cleanup_most_ns;
    /* Nanoseconds of all cleanups together. */
    uint64_t cleanup_total_ns;
} vkp_registry_stats;

/* Write the registry's counters to *stats. Any thread; waits for threads that use the registry. */
VKP_API void vkp_registry_get_stats(vkp_registry *registry, vkp_registry_stats *stats);

#endif /* VKP_NO_IO */

#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-socket   Ref-counted listening Unix sockets

   A socket is alive as long as it has references: handles of the program, listeners, clients. When
   the last reference is given back, the socket stops listening and its file is removed. A registry
   finds the sockets of a program by their paths, and keeps none of them alive.
   A path NULL means a unique path in the registry's folder. A path that begins with '@' is an
   abstract name (Linux: no file, gone with the last descriptor) if the registry has abstract_names,
   and in addresses ("unix:@NAME"). A file whose name begins with '@' is written "./@NAME". */

/* Give the live socket of the path, also one that lingers, or open a new one: bound, with the
   registry's mode, listening. Atomic. While the socket lives, its process holds a flock on the file
   PATH.lock: so a file left by a dead process is replaced, a file of a live process is not.
   A path is used as it is written: two spellings of one file are two paths.
   Owns:   borrows path (NULL: a unique path); gives *sock
   Blocks: on the file system, and on threads that open sockets     Threads: any
   In callbacks: ok
   Errors: INVALID (a null argument; an empty path, a `..` component, a zero byte), LIMIT (a path
   longer than the 107 bytes that fit on Linux, 103 elsewhere: logged; max_sockets;
   max_references), IN_USE (another process serves the path), EXISTS (something else than a socket
   of this user is at the path; it is left there), UNSUPPORTED (an abstract name outside Linux), SYS
   (a call on the file system failed), NOMEM */
VKP_API VKP_NODISCARD vkp_status vkp_socket_open(vkp_registry *registry, vkp_str path,
                                                 vkp_socket **sock);

/* Give the live socket of the path, also one that lingers; never open a new one.
   Owns:   borrows path; gives *sock
   Blocks: on threads that open sockets     Threads: any     In callbacks: ok
   Errors: NOT_FOUND (no live socket of that path), LIMIT (max_references; a path that is too long),
   INVALID (a null argument or path; an empty path, a `..` component), UNSUPPORTED (an abstract name
   outside Linux) */
VKP_API VKP_NODISCARD vkp_status vkp_socket_find(vkp_registry *registry, vkp_str path,
                                                 vkp_socket **sock);

/* Make a socket of a descriptor that the caller bound to the path and set listening. The registry
   makes the descriptor non-blocking, takes PATH.lock, and removes the file at the socket's end.
   Owns:   borrows path, takes fd (on failure fd stays the caller's); gives *sock
   Blocks: on the file system, and on threads that open sockets     Threads: any
   In callbacks: ok
   Errors: EXISTS (a socket of that path is alive in the registry), IN_USE (another process holds
   PATH.lock), LIMIT (a path that is too long; max_sockets), INVALID (a null argument or path;
   fd < 0; no file at the path, or not a socket), UNSUPPORTED (an abstract name), SYS, NOMEM */
VKP_API VKP_NODISCARD vkp_status vkp_socket_adopt(vkp_registry *registry, vkp_str path, int fd,
                                                  vkp_socket **sock);

/* One more reference: gives sock, or returns NULL when sock has max_references. Any thread. */
VKP_API VKP_NODISCARD vkp_socket *vkp_socket_ref(vkp_socket *sock);

/* One reference less. The last one ends the socket: it stops listening, and its file, if that is
   still the one that this socket bound, and its lock file are removed; with linger_ms the end comes
   that much later. In a forked child no file is removed. NULL is ignored.
   Blocks: on the file system only: if another thread uses the registry, that thread cleans up
   Threads: any     In callbacks: ok */
VKP_API void vkp_socket_unref(vkp_socket *sock);

/* A weak handle, which does not keep its socket alive: a value that may be copied and needs no
   unref. Use it only while the registry has a reference. Zeroed, it is the handle of no socket. */
typedef struct vkp_weak_socket {
    vkp_socket *i_socket;  /* private */
    uint32_t i_generation; /* private */
} vkp_weak_socket;

/* A weak handle of the socket, which is borrowed. Any thread. */
VKP_API vkp_weak_socket vkp_socket_downgrade(const vkp_socket *sock);

/* Give a reference to the weak handle's socket while that lives, also while it lingers. Takes a
   lock only if no reference is left and the registry has linger_ms.
   Owns:   borrows weak; gives *sock     Blocks: on threads that use the registry, with the lock
   Threads: any     In callbacks: ok
   Errors: NOT_FOUND (the socket ended, or the handle is zeroed), LIMIT (max_references), INVALID */
VKP_API VKP_NODISCARD vkp_status vkp_socket_upgrade(const vkp_weak_socket *weak, vkp_socket **sock);

/* The socket's path, zero-terminated. Views: valid until the caller's unref. Any thread. */
VKP_API const char *vkp_socket_get_path(const vkp_socket *sock);

/* Whether the socket still accepts clients; false after vkp_registry_cleanup_all. Any thread. */
VKP_API bool vkp_socket_is_active(const vkp_socket *sock);

/* The number of the socket's references. Advisory: other threads may change it immediately. Any
   thread. */
VKP_API size_t vkp_socket_get_ref_count(const vkp_socket *sock);

/* How vkp_socket_pool_pick chooses a socket. */
typedef enum vkp_balance {
    VKP_BALANCE_LEAST = 0, /* the socket with the fewest references; of equal ones the next */
    VKP_BALANCE_TURN       /* one socket after the other */
} vkp_balance;

/* The config of vkp_socket_pool_open. */
typedef struct vkp_socket_pool_config {
    vkp_registry *registry; /* the registry that opens the pool's sockets; required; shared */
    /* The paths of the sockets, an array of `count`; a NULL path is a unique one. NULL: all paths
       are unique. */
    const vkp_str *paths;
    size_t count;        /* number of sockets; required, at least 1 */
    vkp_balance balance; /* how vkp_socket_pool_pick chooses; default: VKP_BALANCE_LEAST */
} vkp_socket_pool_config;

/* Open a pool: several sockets, over which clients are spread. Opens all its sockets or, on
   failure, none, and holds a reference of each until its last unref. config is required.
   Owns:   borrows config, shares config.registry; gives *pool
   Blocks: on the file system, and on threads that open sockets     Threads: any
   In callbacks: ok
   Errors: those of vkp_socket_open; INVALID (a null argument, no registry, count 0), NOMEM */
VKP_API VKP_NODISCARD vkp_status vkp_socket_pool_open(const vkp_socket_pool_config *config,
                                                      vkp_socket_pool **pool);

/* One more reference (gives, the same pointer). Any thread. */
VKP_API vkp_socket_pool *vkp_socket_pool_ref(vkp_socket_pool *pool);

/* One reference less; the last one gives back the pool's sockets. NULL is ignored. Any thread. */
VKP_API void vkp_socket_pool_unref(vkp_socket_pool *pool);

/* Choose the socket for the next client; keep *sock as long as that client is connected. Skips
   sockets that are no longer active.
   Owns:   gives *sock     Blocks: never     Threads: any     In callbacks: ok
   Errors: CLOSED (no socket is active), LIMIT (every active socket has max_references), INVALID */
VKP_API VKP_NODISCARD vkp_status vkp_socket_pool_pick(vkp_socket_pool *pool, vkp_socket **sock);

/* The number of sockets in the pool, as it was opened. Any thread. */
VKP_API size_t vkp_socket_pool_get_count(const vkp_socket_pool *pool);

/* The pool's socket at the index, which must be below vkp_socket_pool_get_count. Views: valid as
   long as the pool. Any thread. */
VKP_API vkp_socket *vkp_socket_pool_get_socket(const vkp_socket_pool *pool, size_t index);

#endif /* VKP_NO_IO */

#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-conn   Connections
   Addresses: "unix:PATH", "tcp:HOST:PORT", "tcp:[V6]:PORT". */

/* Why a connection closed: an argument of vkp_conn_ops.on_close. */
typedef enum vkp_close_reason {
    /* This program closed the connection: vkp_conn_close, vkp_conn_drain after the last write,
       or a listener's drain at its deadline. */
    VKP_CLOSE_LOCAL = 0,
    /* The peer closed the connection: end of file, a reset, or a hang-up. */
    VKP_CLOSE_PEER,
    /* A system call failed: sys_error is its errno. EMSGSIZE: more than input_bytes were kept. */
    VKP_CLOSE_ERROR,
    /* The peer read too slowly: a queue was full with VKP_ON_FULL_DISCONNECT, or a relay's
       max_reply_bytes were exceeded. */
    VKP_CLOSE_SLOW,
    /* The loop was closed. */
    VKP_CLOSE_LOOP,
    /* No memory for received bytes, for the response stream, or for a push that was queued. */
    VKP_CLOSE_NOMEM
} vkp_close_reason;

/* The reason as a short text; static, never NULL. Any thread. */
VKP_API const char *vkp_close_reason_str(vkp_close_reason reason);

/* The policy: what vkp_conn_push does when the queue is full. On the loop's thread a full outbox
   is written first: the policy applies when the peer does not read. Frames of vkp_conn_send are
   never dropped. Dropped pushes are counted (vkp_conn_stats.dropped_frames). */
typedef enum vkp_on_full {
    /* As VKP_ON_FULL_WAIT; in a relay's config as VKP_ON_FULL_DISCONNECT. */
    VKP_ON_FULL_DEFAULT = 0,
    /* vkp_conn_push waits for room until its deadline; on the loop's thread it returns FULL. */
    VKP_ON_FULL_WAIT,
    /* vkp_conn_push returns FULL; the frame is not queued. */
    VKP_ON_FULL_ERROR,
    /* vkp_conn_push returns DROPPED; the frame is not queued, and counted. */
    VKP_ON_FULL_DROP_NEWEST,
    /* vkp_conn_push returns OK; the oldest pushes of which no byte was written are dropped and
       counted. */
    VKP_ON_FULL_DROP_OLDEST,
    /* vkp_conn_push returns CLOSED; the connection closes with VKP_CLOSE_SLOW, and on_close
       follows, not inside this call. */
    VKP_ON_FULL_DISCONNECT
} vkp_on_full;

/* Callbacks of a connection, all on its loop's thread, none under a lock, none after on_close. Any
   may be NULL. The connection keeps the pointer: the table must outlive it. */
typedef struct vkp_conn_ops {
    /* The connection is established. Called once; by vkp_conn_open before it returns. */
    void (*on_open)(vkp_conn *conn, void *user);
    /* Bytes arrived. Returns how many it used; the next call gets the others again, with more
       behind them. `in` views the read block: keep parts with vkp_bytes_slice. NULL: all bytes are
       dropped. */
    size_t (*on_data)(vkp_conn *conn, void *user, const vkp_bytes *in);
    /* The outbox is empty, after the kernel refused bytes because the peer does not read. It is not
       called for a queue that one write emptied: to resume a connection that was paused for its
       queue, pause above vkp_loop_config.read_bytes at least. */
    void (*on_drain)(vkp_conn *conn, void *user);
    /* The peer sends nothing further; bytes that on_data did not use are dropped. Returns true
       to keep the connection for writing (end it with vkp_conn_drain or vkp_conn_close), false
       to close it with VKP_CLOSE_PEER. NULL: false. */
    bool (*on_end)(vkp_conn *conn, void *user);
    /* The connection closed, or vkp_conn_connect failed after it returned OK. Called once, as the
       last callback. sys_error is the errno behind the reason, 0: none. */
    void (*on_close)(vkp_conn *conn, void *user, vkp_close_reason reason, int sys_error);
    /* Returns the length of the pushed frame that begins at data. With it, neighbouring frames of
       one block are queued and written as one range; vkp_resp_get_frame_len does this for RESP.
       NULL: each frame is queued by itself. */
    size_t (*frame_len)(const uint8_t *data, size_t len);
} vkp_conn_ops;

/* The config of a connection. The two queue limits hold for each of two queues: the inbox (pushes
   of other threads, which wait for the loop) and the outbox (frames that wait for the peer). */
typedef struct vkp_conn_config {
    /* The callbacks; required. Kept by pointer, not copied. */
    const vkp_conn_ops *ops;
    /* Handed to the callbacks; see vkp_conn_set_user. */
    void *user;
    /* Most pushes in the inbox, and in the outbox. Default: 65,536. */
    size_t queue_frames;
    /* Most bytes of pushes in the inbox, and in the outbox. Default: 8 MiB. One frame always
       fits. */
    size_t queue_bytes;
    /* Most received bytes that are kept because on_data did not use them; beyond, the connection
       closes with VKP_CLOSE_ERROR, EMSGSIZE. Default: 512 MiB. */
    size_t input_bytes;
    /* The policy of a full queue. Default: VKP_ON_FULL_WAIT. */
    vkp_on_full on_full;
    /* Most milliseconds for vkp_conn_connect, over all addresses of a host name: each address gets
       an equal share of the time that is left. Default: 0, as long as the system tries. */
    uint64_t connect_ms;
    /* TCP: after this many milliseconds without a byte the kernel asks the peer, and closes the
       connection (ETIMEDOUT) when three questions have no answer. Default: 0, never. */
    uint64_t keepalive_ms;
    /* TCP: the kernel closes the connection (ETIMEDOUT) when bytes that were written are not
       acknowledged for this many milliseconds. Default: 0, the system's limit, many minutes. */
    uint64_t unacked_ms;
    /* Only the loop's thread pushes: saves the inbox, about 200 bytes. Default: false. */
    bool loop_only;
} vkp_conn_config;

/* Serve a connected stream socket on the loop. Calls on_open before it returns. config and its ops
   are required.
   Owns:   borrows config, takes fd (on failure fd stays the caller's), shares loop; gives *conn
   (the loop keeps a reference of its own until the close)
   Blocks: never     Threads: loop's     In callbacks: ok
   Errors: NOMEM, SYS, CLOSED (the loop was closed), INVALID (a null argument, no ops, fd < 0,
   another thread) */
VKP_API VKP_NODISCARD vkp_status vkp_conn_open(vkp_loop *loop, int fd,
                                               const vkp_conn_config *config, vkp_conn **conn);

/* Connect to an address and serve the connection on the loop. After OK, on_open follows on success,
   on_close on failure; a connect that fails immediately, as of Unix sockets, is an error here.
   config and its ops are required.
   Owns:   borrows address and config, shares loop; gives *conn (the loop keeps a reference of its
   own until the close)
   Blocks: on DNS, in getaddrinfo, for a host name; for numbers and localhost never
   Threads: loop's     In callbacks: ok
   Errors: NOMEM, SYS (also a connect that fails immediately), CLOSED (the loop was closed), REFUSED
   (the host name was not resolved), LIMIT (a Unix path that is too long), UNSUPPORTED (an abstract
   name outside Linux), INVALID (a null argument, no ops, a malformed address, another thread) */
VKP_API VKP_NODISCARD vkp_status vkp_conn_connect(vkp_loop *loop, vkp_str address,
                                                  const vkp_conn_config *config, vkp_conn **conn);

/* One more reference (gives, the same pointer). Any thread. */
VKP_API vkp_conn *vkp_conn_ref(vkp_conn *conn);

/* One reference less; does not close the connection. NULL is ignored. Any thread. */
VKP_API void vkp_conn_unref(vkp_conn *conn);

/* Push one frame; when the queue is full, the policy decides. On the loop's thread the frame is put
   in the outbox, on other threads in the inbox.
   Owns:   borrows frame (takes a reference of its own)
   Blocks: until deadline_ns with VKP_ON_FULL_WAIT on other threads; else never
   Threads: any; with loop_only the loop's     In callbacks: ok
   Errors: FULL (VKP_ON_FULL_ERROR; or VKP_ON_FULL_WAIT on the loop's thread), DROPPED
   (VKP_ON_FULL_DROP_NEWEST), TIMEOUT (VKP_ON_FULL_WAIT, no room until the deadline), CLOSED (closed
   or draining; VKP_ON_FULL_DISCONNECT), NOMEM, INVALID (a null argument; loop_only, on another
   thread) */
VKP_API VKP_NODISCARD vkp_status vkp_conn_push(vkp_conn *conn, const vkp_bytes *frame,
                                               uint64_t deadline_ns);

/* Append one frame to the response stream. It keeps its order with pushes, is never dropped, and no
   limit of the queue holds for it: to bound the stream, stop reading (vkp_conn_pause).
   Owns:   borrows frame (takes a reference of its own)
   Blocks: never     Threads: loop's     In callbacks: ok
   Errors: CLOSED (closed or draining), NOMEM (also a frame of 2 GiB or more), INVALID (a null
   argument, another thread) */
VKP_API VKP_NODISCARD vkp_status vkp_conn_send(vkp_conn *conn, const vkp_bytes *frame);

/* Stop reading: on_data is not called until vkp_conn_resume. Loop's thread. */
VKP_API void vkp_conn_pause(vkp_conn *conn);

/* Read again after vkp_conn_pause. on_data gets the kept bytes at the end of the round, not inside
   this call. Loop's thread. */
VKP_API void vkp_conn_resume(vkp_conn *conn);

/* Stop reading, write everything that is queued, then close with VKP_CLOSE_LOCAL. Idempotent.
   Loop's thread. */
VKP_API void vkp_conn_drain(vkp_conn *conn);

/* Close the connection; frames that are still queued are dropped. On the loop's thread on_close
   runs before this returns; from other threads the close is posted to the loop. Idempotent; NULL is
   ignored. Any thread. */
VKP_API void vkp_conn_close(vkp_conn *conn);

/* The connection's user pointer, which its callbacks get. Loop's thread. */
VKP_API void *vkp_conn_get_user(const vkp_conn *conn);

/* Replace the user pointer that the connection's callbacks get. Loop's thread. */
VKP_API void vkp_conn_set_user(vkp_conn *conn, void *user);

/* The connection's loop. Views: valid as long as the connection. Loop's thread. */
VKP_API vkp_loop *vkp_conn_get_loop(const vkp_conn *conn);

/* The connection's descriptor, -1 after the close; it stays the connection's. Loop's thread. */
VKP_API int vkp_conn_get_fd(const vkp_conn *conn);

/* Whether the connection is not closed; also true while it connects or drains. Any thread. */
VKP_API bool vkp_conn_is_open(const vkp_conn *conn);

/* What vkp_conn_get_stats writes. */
typedef struct vkp_conn_stats {
    size_t queued_frames;    /* pushes in the outbox now */
    size_t queued_bytes;     /* bytes in the outbox now, of pushes and of the response stream */
    uint64_t dropped_frames; /* pushes that the policy dropped since open */
} vkp_conn_stats;

/* Write the connection's counters to *stats. Loop's thread. */
VKP_API void vkp_conn_get_stats(const vkp_conn *conn, vkp_conn_stats *stats);

#endif /* VKP_NO_IO */

#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-gate   Admission control: which clients a listener accepts, and how many */

/* Why a client was refused: its connection was closed right after accept. */
typedef enum vkp_refusal {
    /* The client's uid is not allowed, or could not be read, or vkp_gate_config.allow returned
       false. */
    VKP_REFUSAL_USER = 0,
    /* max_clients of the gate or of the listener, or max_references of the socket, was reached. */
    VKP_REFUSAL_FULL,
    /* max_clients_per_uid was reached. */
    VKP_REFUSAL_USER_FULL,
    /* No memory, or no descriptors for a second or longer. */
    VKP_REFUSAL_OVERLOAD,
    /* The socket's last reference was just given back, or the listener was just closed. */
    VKP_REFUSAL_ENDED
} vkp_refusal;

/* The number of values of vkp_refusal. */
#define VKP_REFUSAL_COUNT 5

/* The config of vkp_gate_open. Uids are those of clients over Unix sockets; TCP clients have none,
   and are only counted. */
typedef struct vkp_gate_config {
    /* Most clients at one time, over all listeners of the gate. Default: no limit. */
    size_t max_clients;
    /* Most clients of one uid at one time, over all listeners of the gate. Default: no limit. */
    size_t max_clients_per_uid;
    /* Uids that are allowed besides the process's own (effective) uid; copied. NULL: none. */
    const uint32_t *allow_uids;
    /* Number of allow_uids. */
    size_t allow_uid_count;
    /* Every uid is allowed. Default: false. */
    bool allow_any_uid;
    /* Returns whether a client over a Unix socket is allowed; called instead of the checks of uids.
       Called once per client, on the accepting loop's thread. NULL: uids decide. */
    bool (*allow)(void *user, const vkp_peer *peer);
    /* Handed to allow. */
    void *user;
    /* Memory, log and system; must outlive the gate. NULL: the defaults. */
    const vkp_env *env;
} vkp_gate_config;

/* Open a gate; any number of listeners, on any loops, may share it. NULL config: all defaults.
   Owns:   borrows config (copies allow_uids); gives *gate
   Blocks: never     Threads: any     In callbacks: ok
   Errors: NOMEM, INVALID (gate NULL; allow_uid_count without allow_uids) */
VKP_API VKP_NODISCARD vkp_status vkp_gate_open(const vkp_gate_config *config, vkp_gate **gate);

/* One more reference (gives, the same pointer). Any thread. */
VKP_API vkp_gate *vkp_gate_ref(vkp_gate *gate);

/* One reference less; listeners and seats hold one each. NULL is ignored. Any thread. */
VKP_API void vkp_gate_unref(vkp_gate *gate);

/* What vkp_gate_get_stats writes. */
typedef struct vkp_gate_stats {
    size_t clients;                      /* clients that have a seat now */
    uint64_t admitted;                   /* clients that got a seat since open */
    uint64_t refused[VKP_REFUSAL_COUNT]; /* clients refused since open, indexed by vkp_refusal */
} vkp_gate_stats;

/* Write the gate's counters to *stats. Any thread. */
VKP_API void vkp_gate_get_stats(vkp_gate *gate, vkp_gate_stats *stats);

/* Give back the seat of one admitted client: the client no longer counts at the gate, and if the
   listener follows its socket, the client's reference of that socket is given back too. A
   connection gives back its seat before its on_close. NULL is ignored. Any thread. */
VKP_API void vkp_seat_unref(vkp_seat *seat);

/* Let the connection keep the seat until its close. The connection is open and has no seat. Takes
   seat. Loop's thread. */
VKP_API void vkp_conn_set_seat(vkp_conn *conn, vkp_seat *seat);

#endif /* VKP_NO_IO */

#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-listener   Accept connections */

/* What vkp_listener_config.on_start gets; valid until on_start returns. */
typedef struct vkp_listening {
    /* OK, or why the listener did not start. */
    vkp_status status;
    /* The errno of status SYS; 0 with any other status. */
    int sys_error;
    /* The listener's address, as vkp_listener_get_address returns it. Views: valid until the
       listener ended. NULL when status is not OK. */
    const char *address;
    /* The listener, which belongs to its loop: valid until it ended. Close it, do not unref it.
       NULL when status is not OK. */
    vkp_listener *listener;
    /* The only reference of the socket: gives it to on_start, if the listener was opened with an
       address and `follow`. NULL when config.socket was set, when `follow` was false, and when
       status is not OK. */
    vkp_socket *socket;
} vkp_listening;

/* The config of vkp_listener_open. Every callback is called on the loop's thread with conn.user as
   its `user`. */
typedef struct vkp_listener_config {
    /* Where to listen: "unix:PATH", "unix:" (a unique path), "tcp:HOST:PORT" (port 0: a free port).
       Borrowed until open returns. Set either address or socket, not both. */
    vkp_str address;
    /* An open socket to listen on, shared until the listener ended (with `follow` until it has
       started). NULL: address is used. */
    vkp_socket *socket;
    /* The registry that opens the socket of a "unix:" address; shared. NULL: a registry of the
       listener's own, which allows abstract names. */
    vkp_registry *registry;
    /* The listener holds no reference of its socket: each client holds one, the program may hold
       some, and when the last one is given back (and linger_ms passed) the listener ends too. With
       an address this needs on_start, which gets the first reference. Default: false. */
    bool follow;
    /* Decides which clients are accepted; shared. NULL: over Unix sockets the process's own uid
       alone; no limit on clients. */
    vkp_gate *gate;
    /* Most clients of this listener at one time. Default: no limit. */
    size_t max_clients;
    /* The config of each accepted connection; conn.ops is required without on_fd. conn.user is the
       first user pointer of each connection. */
    vkp_conn_config conn;
    /* A connection was accepted: called once for each, before its on_open. conn is borrowed:
       valid until its on_close returned, longer with vkp_conn_ref. Set its user pointer here, or
       refuse the client by vkp_conn_close: that calls on_close with the user pointer set so far,
       conn.user at first. NULL: not called. */
    void (*on_accept)(void *user, vkp_conn *conn);
    /* A client was accepted: called once for each, instead of making a connection, for example to
       pass the client to another loop. Gives fd and seat: close fd, and unref seat when the client
       is gone. NULL: connections are made. */
    void (*on_fd)(void *user, int fd, vkp_seat *seat);
    /* A client is refused: called once for each. fd may be written to; the listener closes fd when
       this returns. NULL: not called. */
    void (*on_refuse)(void *user, int fd, vkp_refusal why);
    /* The listener ended by itself, because its socket ended or its loop was closed. Called at most
       once, never after vkp_listener_close. NULL: not called. */
    void (*on_end)(void *user);
    /* The listener started or failed. Set it to open the listener from any thread; called exactly
       once unless vkp_listener_open itself failed. NULL: vkp_listener_open starts the listener. */
    void (*on_start)(void *user, const vkp_listening *result);
    /* Clients that may wait for accept, as for listen(2). Default: 4096. Ignored with `socket` or
       `registry`: the registry's backlog is used. */
    int backlog;
} vkp_listener_config;

/* Listen and accept on the loop. Without on_start the listener starts before this returns. With
   on_start this returns first, and the loop starts the listener, owns it, and frees it when it
   ended or the loop closes. config is required.
   When descriptors or memory run out, the listener pauses, 10 ms at first, 1 s at most, and clients
   wait in the backlog; when descriptors are short for a second, the listener uses a spare one to
   refuse them (VKP_REFUSAL_OVERLOAD).
   Owns:   borrows config; shares config's socket, registry and gate, and loop; gives *listener
   (listener is NULL with on_start)
   Blocks: on the file system, and on DNS for a host name; with on_start never
   Threads: loop's; with on_start any     In callbacks: ok
   Errors: CLOSED (the loop was closed, or the socket ended), NOMEM, LIMIT (max_references of the
   socket), INVALID (both address and socket, or neither; follow with an address and without
   on_start, or with tcp:; neither conn.ops nor on_fd; listener NULL without on_start, or not NULL
   with it; another thread, without on_start). On failures of starting, which with on_start are its
   result's status: those of vkp_socket_open, IN_USE (also a port that is taken), REFUSED (the host
   name was not resolved), INVALID (a malformed address; "unix:@NAME" with a registry without
   abstract_names) */
VKP_API VKP_NODISCARD vkp_status vkp_listener_open(vkp_loop *loop,
                                                   const vkp_listener_config *config,
                                                   vkp_listener **listener);

/* The listener's address, "tcp:HOST:PORT" with the port that the system chose, or "unix:PATH".
   Views: valid as long as the listener. Loop's thread. */
VKP_API const char *vkp_listener_get_address(const vkp_listener *listener);

/* Stop accepting. Accepted connections stay open, and a drain continues. Idempotent; NULL is
   ignored. Loop's thread. */
VKP_API void vkp_listener_close(vkp_listener *listener);

/* Close the listener and give its reference back; the on_end of a drain under way is not called.
   Not for listeners with on_start. NULL is ignored. Loop's thread. */
VKP_API void vkp_listener_unref(vkp_listener *listener);

/* Shut down in order: stop accepting, send `notice` to every connection that this listener
   accepted, write what is queued, close each connection; at the deadline close the others. Then
   on_end(user) is called once, not inside this call. NULL notice: nothing is sent. NULL on_end: not
   called.
   Owns:   borrows notice     Blocks: never     Threads: loop's     In callbacks: ok
   Errors: INVALID (listener NULL, a listener with on_fd, already drained), NOMEM; on failure
   nothing was changed */
VKP_API VKP_NODISCARD vkp_status vkp_listener_drain(vkp_listener *listener, const vkp_bytes *notice,
                                                    void (*on_end)(void *user), void *user,
                                                    uint64_t deadline_ns);

/* What vkp_listener_get_stats writes. Counters count since open. */
typedef struct vkp_listener_stats {
    size_t clients;                      /* clients that have a seat now */
    uint64_t accepted;                   /* clients accepted: a connection, or a call of on_fd */
    uint64_t refused[VKP_REFUSAL_COUNT]; /* clients refused, indexed by vkp_refusal */
    uint64_t aborted;                    /* clients that closed before accept: probes, resets */
    uint64_t no_descriptors;             /* accept failed with EMFILE or ENFILE */
    uint64_t no_memory;                  /* accept failed with ENOMEM or ENOBUFS */
    uint64_t failed;                     /* accept failed with another errno */
    uint64_t pauses;                     /* pauses after no_descriptors, no_memory and failed */
} vkp_listener_stats;

/* Write the listener's counters to *stats. Loop's thread. */
VKP_API void vkp_listener_get_stats(const vkp_listener *listener, vkp_listener_stats *stats);

#endif /* VKP_NO_IO */

#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-health   Check whether a server answers */

/* The result of one check. */
typedef struct vkp_health {
    /* OK, or REFUSED (no connection), PROTOCOL (another answer), DISCONNECTED (the server closed
       the connection before the answer), TIMEOUT, SYS (with sys_error), NOMEM. */
    vkp_status status;
    /* The errno of status SYS; 0 with any other status. */
    int sys_error;
    /* Nanoseconds from the connect to the answer or the failure. */
    uint64_t elapsed_ns;
    /* Failed checks in a row, this one included; 0 when status is OK. */
    uint64_t failures;
} vkp_health;

/* The config of vkp_health_check_open. Texts are copied. */
typedef struct vkp_health_config {
    vkp_str address;     /* the server: "unix:PATH" or "tcp:HOST:PORT"; required */
    vkp_str request;     /* what a check sends; default: "PING\r\n" */
    vkp_str answer;      /* how the answer must begin; default: "+PONG\r\n" */
    uint64_t timeout_ms; /* milliseconds of one check; default: 1000; VKP_OFF: no limit */
    /* Milliseconds from the start of one check to the start of the next. Default: 0, one check
       only. */
    uint64_t period_ms;
    /* A check ended: called once for each, on the loop's thread. Required. */
    void (*on_result)(void *user, const vkp_health *health);
    /* Handed to on_result. */
    void *user;
} vkp_health_config;

/* Check a server: connect, send the request, compare the answer, disconnect. The first check starts
   after this call returned, further ones every period_ms. config is required.
   Owns:   borrows config (copies its texts), shares loop; gives *check
   Blocks: never; each check blocks on DNS for a host name, as vkp_conn_connect
   Threads: loop's     In callbacks: ok
   Errors: NOMEM, CLOSED (the loop was closed), LIMIT (a Unix path that is too long), UNSUPPORTED
   (an abstract name outside Linux), INVALID (a null argument, no address, no on_result, a malformed
   address, another thread) */
VKP_API VKP_NODISCARD vkp_status vkp_health_check_open(vkp_loop *loop,
                                                       const vkp_health_config *config,
                                                       vkp_health_check **check);

/* End the check: on_result is not called again. Idempotent; NULL is ignored. Loop's thread, also
   inside on_result. */
VKP_API void vkp_health_check_close(vkp_health_check *check);

/* Close the check and give its reference back. NULL is ignored. Loop's thread, also inside
   on_result. */
VKP_API void vkp_health_check_unref(vkp_health_check *check);

#endif /* VKP_NO_IO */

#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-hub   Which connections subscribed to which names */

/* Whether the glob pattern matches the whole text: * ? [abc] [^a-z] \x, byte by byte, as servers
   match. The time is at worst proportional to the text's length times the pattern's. Any thread. */
VKP_API bool vkp_glob_is_match(vkp_str pattern, vkp_str text);

/* One subscription of a member. Private. */
typedef struct vkp_hub_sub vkp_hub_sub;

/* A subscriber: a connection and its protocol. In the caller's memory; zero it first. Call
   vkp_hub_leave before the memory is used for something else. */
typedef struct vkp_hub_member {
    /* The connection that messages are pushed to. Views: call vkp_hub_leave before the connection's
       unref. */
    vkp_conn *conn;
    /* The RESP version of messages to this member: 3, or 2 (any other value). */
    int protocol;
    /* The number of the member's subscriptions, indexed by vkp_sub_kind; read only. */
    uint32_t counts[VKP_SUB_KINDS];
    /* Private. */
    vkp_hub_sub *i_subs[VKP_SUB_KINDS];
} vkp_hub_member;

/* The config of vkp_hub_open. Zeroed: all defaults. */
typedef struct vkp_hub_config {
    /* A name got its first member (added true) or lost its last (added false). Called on the hub's
       thread inside the call that changed this, never inside vkp_hub_publish. NULL: not called. */
    void (*on_interest)(void *user, vkp_sub_kind kind, vkp_str name, bool added);
    /* Handed to on_interest. */
    void *user;
    /* Memory, log and system; must outlive the hub. NULL: the defaults. */
    const vkp_env *env;
} vkp_hub_config;

/* Open a hub, which then belongs to one loop's thread. NULL config: all defaults.
   Owns:   borrows config; gives *hub
   Blocks: never     Threads: any     In callbacks: ok
   Errors: NOMEM, INVALID (hub NULL) */
VKP_API VKP_NODISCARD vkp_status vkp_hub_open(const vkp_hub_config *config, vkp_hub **hub);

/* Free the hub, which has only one reference; every member must have left. NULL is ignored. Loop's
   thread. */
VKP_API void vkp_hub_unref(vkp_hub *hub);

/* Add the member to a name. *added (NULL is allowed) is false when the member had the name already,
   which is OK too.
   Owns:   borrows name, views member until it has left
   Blocks: never     Threads: loop's     In callbacks: ok
   Errors: NOMEM, LIMIT (a name of 4 GiB or more), INVALID (hub or member NULL, no such kind) */
VKP_API VKP_NODISCARD vkp_status vkp_hub_subscribe(vkp_hub *hub, vkp_hub_member *member,
                                                   vkp_sub_kind kind, vkp_str name, bool *added);

/* Remove the member from a name. Returns false when the member did not have the name. Loop's
   thread. */
VKP_API bool vkp_hub_unsubscribe(vkp_hub *hub, vkp_hub_member *member, vkp_sub_kind kind,
                                 vkp_str name);

/* Remove the member from all its names. Loop's thread. */
VKP_API void vkp_hub_leave(vkp_hub *hub, vkp_hub_member *member);

/* One of the member's names of that kind, {NULL, 0} when the member has none. Views: valid until
   the member's next change. Loop's thread. */
VKP_API vkp_str vkp_hub_get_member_name(const vkp_hub_member *member, vkp_sub_kind kind);

/* Whether the member has the name. Loop's thread. */
VKP_API bool vkp_hub_is_subscribed(const vkp_hub *hub, const vkp_hub_member *member,
                                   vkp_sub_kind kind, vkp_str name);

/* Push a message to every member of the pub/sub channel and, with VKP_SUB_CHANNEL, to every member
   of each pattern that matches. The frame for a name is encoded at most once per protocol, and the
   name's members share it. Each member gets its messages in order; the policy of its connection
   holds. Returns how many deliveries were tried, as PUBLISH counts. Loop's thread. */
VKP_API size_t vkp_hub_publish(vkp_hub *hub, vkp_sub_kind kind, vkp_str channel, vkp_str payload);

/* Deliver a server's push as it was received: a message to the members of its pub/sub channel, a
   pmessage to the members of its pattern (the server sends one push for each). Members of protocol
   3 share the received bytes. Returns how many deliveries were tried; 0 for a push that is not a
   message. Loop's thread. */
VKP_API size_t vkp_hub_deliver(vkp_hub *hub, const vkp_push *push);

/* The number of members of a name. Loop's thread. */
VKP_API size_t vkp_hub_get_members(const vkp_hub *hub, vkp_sub_kind kind, vkp_str name);

/* The number of names of that kind that have a member. Loop's thread. */
VKP_API size_t vkp_hub_get_names(const vkp_hub *hub, vkp_sub_kind kind);

/* Step through the names of that kind, in no order: set *cursor to NULL before the first call. Each
   call returns true with the next name in *name, or false after the last. Views: *name and *cursor
   are valid until the hub's next change. Loop's thread. */
VKP_API bool vkp_hub_next_name(const vkp_hub *hub, vkp_sub_kind kind, void **cursor, vkp_str *name);

#endif /* VKP_NO_IO */

#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-pushloop   From a channel of pushes to a hub, a connection or a callback */

/* Where a push loop delivers pushes: set exactly one of hub, conn and callback. */
typedef struct vkp_sink {
    /* Messages are delivered to this hub. Only for vkp_push_loop_open, on the hub's loop. */
    vkp_hub *hub;
    /* Frames are pushed to this connection as they were received; events of the client, which have
       no frame, are not. */
    vkp_conn *conn;
    /* Called with each push, on the thread of the push loop. Borrows push. */
    void (*callback)(void *user, const vkp_push *push);
    /* Handed to callback. */
    void *user;
} vkp_sink;

/* Receive pushes in this thread and deliver each to the sink, until the channel closes: then
   returns OK. A push that the sink cannot take (a full queue, a closed connection) is lost; the
   push loop continues. NULL cancel: only the channel ends the call.
   Owns:   borrows rx, sink, cancel
   Blocks: until the channel is closed and drained, or the token is cancelled
   Threads: any     In callbacks: would stall the loop
   Errors: CANCELLED (cancel was triggered), INVALID (rx or sink NULL, none or several of hub, conn
   and callback, a hub, a channel of other values than vkp_push) */
VKP_API VKP_NODISCARD vkp_status vkp_push_loop_run(vkp_mpsc_rx *rx, const vkp_sink *sink,
                                                   vkp_cancel *cancel);

/* Receive pushes on an event loop, in batches, and deliver each to the sink. A push that the sink
   cannot take is lost. When the channel is closed and drained the push loop stops and calls
   on_end(user) once, on the loop's thread; unref it then. NULL on_end: not called.
   Owns:   takes rx (on failure rx stays the caller's), borrows sink, shares loop and sink->conn,
   views sink->hub until the unref; gives *push_loop
   Blocks: never     Threads: loop's     In callbacks: ok
   Errors: NOMEM, INVALID (a null argument, none or several of hub, conn and callback, a channel of
   other values than vkp_push, a closed loop) */
VKP_API VKP_NODISCARD vkp_status vkp_push_loop_open(vkp_loop *loop, vkp_mpsc_rx *rx,
                                                    const vkp_sink *sink,
                                                    void (*on_end)(void *user), void *user,
                                                    vkp_push_loop **push_loop);

/* Stop the push loop and free it with its receiver; on_end is not called after this. NULL is
   ignored. Loop's thread, also inside the sink's callback and on_end. */
VKP_API void vkp_push_loop_unref(vkp_push_loop *push_loop);

#endif /* VKP_NO_IO */

#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-relay   Serve local Valkey clients over one upstream connection, or none */

/* The config of vkp_relay_open. */
typedef struct vkp_relay_config {
    vkp_str server; /* address of the server; default: none, a stand-alone pub/sub broker */
    /* Looks the server's host name up in a thread of the program; shared. NULL: lookups block
       loops[0]. */
    vkp_resolver *resolver;
    vkp_str username; /* user name for the upstream connection; default: the default user */
    vkp_str password; /* password for the upstream connection; default: none */
    /* The loops that serve local clients, an array of loop_count: each client is given to the next
       loop in turn. Required; each loop is shared. */
    vkp_loop *const *loops;
    /* The number of loops. Default: 1. */
    size_t loop_count;
    /* Most messages that wait for one client. Default: 65,536. */
    size_t queue_frames;
    /* Most bytes of messages that wait for one client; one message always fits. Default: 8 MiB. */
    size_t queue_bytes;
    /* The policy when a client's queue is full: VKP_ON_FULL_DISCONNECT (default), DROP_OLDEST or
       DROP_NEWEST. */
    vkp_on_full on_full;
    /* Most clients at one time, over all addresses. Default: 16,384. */
    size_t max_clients;
    /* Most clients of one uid at one time, over Unix sockets. Default: no limit. */
    size_t max_clients_per_uid;
    /* Uids that are allowed over Unix sockets besides the process's own uid; copied. With any, the
       sockets' files have mode 0666 instead of 0600. NULL: none. */
    const uint32_t *allow_uids;
    /* The number of allow_uids. */
    size_t allow_uid_count;
    /* The last client left, and for linger_ms none came. Called each time this happens, on
       loops[0], not before the first client and not during a drain. NULL: not called. */
    void (*on_idle)(void *user);
    /* Handed to on_idle. */
    void *user;
    /* Milliseconds without a client before on_idle is called. Default: 0, it is called
       immediately. */
    uint64_t linger_ms;
    /* Milliseconds between two checks of the Unix sockets' files; a lost file is bound again.
       Default: 0, no checks. */
    uint64_t check_ms;
    /* The text that vkp_relay_drain sends to each client; copied. Default: nothing is sent. */
    vkp_str shutdown_notice;
    /* Most bytes of one command, or of one MULTI block. Default: 64 MiB; must be below 2 GiB. */
    size_t max_request_bytes;
    /* Most bytes of replies that one client has not read; beyond, the relay closes the client.
       Default: 256 MiB. */
    size_t max_reply_bytes;
    /* Most names that one client subscribes to. Default: 100,000. */
    size_t max_subscriptions;
    /* Memory, log and system; must outlive the relay. NULL: the defaults. */
    const vkp_env *env;
} vkp_relay_config;

/* Open a relay on loops that the caller runs, each in its own thread. loops[0] carries the upstream
   connection and the listeners. config and its loops are required.
   Owns:   borrows config (copies its texts), shares the loops; gives *relay
   Blocks: never     Threads: that of every loop, before the loops run
   Errors: NOMEM, INVALID (a null argument, no loops, on_full WAIT or ERROR, max_request_bytes of
   2 GiB or more, allow_uid_count without allow_uids), those of vkp_client_open */
VKP_API VKP_NODISCARD vkp_status vkp_relay_open(const vkp_relay_config *config, vkp_relay **relay);

/* Accept local clients at one more address; may be called for several. *bound (NULL is allowed)
   gets the address with the port that the system chose.
   Owns:   borrows address; *bound views the address until the relay's unref
   Blocks: on the file system, and on DNS for a host name     Threads: that of loops[0]
   Errors: INVALID (a null argument or address), NOMEM, those of vkp_listener_open */
VKP_API VKP_NODISCARD vkp_status vkp_relay_listen(vkp_relay *relay, vkp_str address,
                                                  const char **bound);

/* The pub/sub channel of the message that carries vkp_relay_config.shutdown_notice. */
#define VKP_RELAY_NOTICE_CHANNEL "valkey-push:shutdown"

/* Shut down in order: stop accepting, answer the commands that were received, send each client the
   shutdown_notice, write what is queued, close each connection; at the deadline close the others.
   Then on_end(user) is called once, on loops[0]. NULL on_end: not called. Later calls are ignored.
   Clients of RESP3 and clients with subscriptions get the notice as a message of the pub/sub
   channel VKP_RELAY_NOTICE_CHANNEL; other clients get it as an error, in place of their next reply.
   Blocks: never     Threads: that of loops[0]     In callbacks: ok */
VKP_API void vkp_relay_drain(vkp_relay *relay, void (*on_end)(void *user), void *user,
                             uint64_t deadline_ns);

/* What vkp_relay_get_stats writes. Counters count since open. */
typedef struct vkp_relay_stats {
    size_t clients;                      /* clients of the relay now */
    uint64_t accepted;                   /* clients accepted */
    uint64_t refused[VKP_REFUSAL_COUNT]; /* clients refused, indexed by vkp_refusal */
    uint64_t messages_in;                /* messages from the server, or from clients by PUBLISH */
    uint64_t deliveries;                 /* deliveries of messages to clients that were tried */
    uint64_t dropped_frames;             /* messages to clients that on_full dropped */
    uint64_t slow_closed;     /* clients closed by VKP_ON_FULL_DISCONNECT or max_reply_bytes */
    uint64_t lagged;          /* messages lost to one loop that was 64 MiB behind */
    uint64_t protocol_errors; /* clients closed because they broke the protocol */
} vkp_relay_stats;

/* Write the relay's counters to *stats. Any thread. */
VKP_API void vkp_relay_get_stats(const vkp_relay *relay, vkp_relay_stats *stats);

/* The registry of the relay's Unix sockets, for vkp_registry_get_stats and for handlers of crashes.
   Views: valid until the relay's unref. Any thread. */
VKP_API vkp_registry *vkp_relay_get_registry(const vkp_relay *relay);

/* Close the relay immediately and free it. The on_end of a drain under way is not called. The loops
   no longer run, or never ran. NULL is ignored. Threads: any one that alone uses the loops. */
VKP_API void vkp_relay_unref(vkp_relay *relay);

#endif /* VKP_NO_IO */

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

/* --------------------------------------------------------------------------------------
   >>api-typed   Channels of a type

   VKP_MPSC_TYPED(jobs, struct job) at file scope declares jobs_tx and jobs_rx, types that the
   compiler does not confuse with another channel's, and functions that take and give struct job:
   jobs_open, jobs_send ... Each one is an inline call of the function of that name in the channel's
   section, with the type in place of void: contract, errors and threads are those of that function.
   Values of 8, 24 and 64 bytes are moved without a call of memcpy.                            */

/* Makes a function of a typed channel inline, without a warning where the function is not used. */
#define VKP_TYPED_CALL static inline __attribute__((unused))

/* For the macros below: the types name_value, name_tx and name_rx, and the functions name_raw_tx,
   raw_rx, tx_ref, tx_unref, rx_unref.                                                         */
#define VKP_TYPED_ENDS(name, T, raw_tx_type, raw_rx_type, raw_tx_ref, raw_tx_unref, raw_rx_unref) \
    typedef T name##_value;                                                                       \
    typedef struct name##_tx name##_tx;                                                           \
    typedef struct name##_rx name##_rx;                                                           \
    VKP_TYPED_CALL raw_tx_type *name##_raw_tx(const name##_tx *tx)                                \
    {                                                                                             \
        return (raw_tx_type *)(uintptr_t)tx;                                                      \
    }                                                                                             \
    VKP_TYPED_CALL raw_rx_type *name##_raw_rx(const name##_rx *rx)                                \
    {                                                                                             \
        return (raw_rx_type *)(uintptr_t)rx;                                                      \
    }                                                                                             \
    VKP_TYPED_CALL name##_tx *name##_tx_ref(name##_tx *tx)                                        \
    {                                                                                             \
        return (name##_tx *)(uintptr_t)raw_tx_ref(name##_raw_tx(tx));                             \
    }                                                                                             \
    VKP_TYPED_CALL void name##_tx_unref(name##_tx *tx)                                            \
    {                                                                                             \
        raw_tx_unref(name##_raw_tx(tx));                                                          \
    }                                                                                             \
    VKP_TYPED_CALL void name##_rx_unref(name##_rx *rx)                                            \
    {                                                                                             \
        raw_rx_unref(name##_raw_rx(rx));                                                          \
    }

/* For the macros below: the function name_verb, which gives an end (`to`: tx or rx) from `from`. */
#define VKP_TYPED_GIVE(name, verb, from, to, raw_type, raw_call)                                  \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_##verb(name##_##from *self, name##_##to **end) \
    {                                                                                             \
        raw_type *raw;                                                                            \
        vkp_status status =                                                                       \
            end != NULL ? raw_call(name##_raw_##from(self), &raw) : VKP_ERR_INVALID;              \
        if (status == VKP_OK) {                                                                   \
            *end = (name##_##to *)(uintptr_t)raw;                                                 \
        }                                                                                         \
        return status;                                                                            \
    }

/* An mpsc channel of T: name_open, close, send, try_send, send_many, reserve, try_reserve, recv,
   try_recv, recv_many, peek, tx_clone, tx_ref, tx_unref, rx_unref, case_recv and case_send, as the
   vkp_mpsc_* and vkp_case_mpsc_* functions. name_open sets config.elem_bytes; a NULL config means
   all defaults. name_reserve and name_try_reserve also give the place of the value as *value.
   name_raw_tx and name_raw_rx give the handles for functions without a value: other cases,
   handlers, lengths, weak senders. Threads: as the function called.                           */
#define VKP_MPSC_TYPED(name, T)                                                                    \
    VKP_TYPED_ENDS(name, T, vkp_mpsc_tx, vkp_mpsc_rx, vkp_mpsc_tx_ref, vkp_mpsc_tx_unref,          \
                   vkp_mpsc_rx_unref)                                                              \
    VKP_TYPED_GIVE(name, tx_clone, tx, tx, vkp_mpsc_tx, vkp_mpsc_tx_clone)                         \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_open(const vkp_mpsc_config *config,             \
                                                        name##_tx **tx, name##_rx **rx)            \
    {                                                                                              \
        vkp_mpsc_config typed = VKP_ZERO;                                                          \
        vkp_mpsc_tx *raw_tx;                                                                       \
        vkp_mpsc_rx *raw_rx;                                                                       \
        vkp_status status;                                                                         \
        if (tx == NULL || rx == NULL) {                                                            \
            return VKP_ERR_INVALID;                                                                \
        }                                                                                          \
        if (config != NULL) {                                                                      \
            typed = *config;                                                                       \
        }                                                                                          \
        typed.elem_bytes = sizeof(name##_value);                                                   \
        status = vkp_mpsc_open(&typed, &raw_tx, &raw_rx);                                          \
        if (status == VKP_OK) {                                                                    \
            *tx = (name##_tx *)(uintptr_t)raw_tx;                                                  \
            *rx = (name##_rx *)(uintptr_t)raw_rx;                                                  \
        }                                                                                          \
        return status;                                                                             \
    }                                                                                              \
    VKP_TYPED_CALL void name##_close(name##_rx *rx)                                                \
    {                                                                                              \
        vkp_mpsc_close(name##_raw_rx(rx));                                                         \
    }                                                                                              \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_send(name##_tx *tx, name##_value value,         \
                                                        uint64_t deadline_ns)                      \
    {                                                                                              \
        return vkp_mpsc_send(name##_raw_tx(tx), &value, deadline_ns);                              \
    }                                                                                              \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_try_send(name##_tx *tx, name##_value value)     \
    {                                                                                              \
        return vkp_mpsc_try_send(name##_raw_tx(tx), &value);                                       \
    }                                                                                              \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_send_many(                                      \
        name##_tx *tx, const name##_value *values, size_t count, uint64_t deadline_ns,             \
        size_t *sent)                                                                              \
    {                                                                                              \
        return vkp_mpsc_send_many(name##_raw_tx(tx), values, count, deadline_ns, sent);            \
    }                                                                                              \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_reserve(                                        \
        name##_tx *tx, uint64_t deadline_ns, vkp_mpsc_permit *permit, name##_value **value)        \
    {                                                                                              \
        vkp_status status = value != NULL                                                          \
                                ? vkp_mpsc_reserve(name##_raw_tx(tx), deadline_ns, permit)         \
                                : VKP_ERR_INVALID;                                                 \
        if (status == VKP_OK) {                                                                    \
            *value = (name##_value *)permit->item;                                                 \
        }                                                                                          \
        return status;                                                                             \
    }                                                                                              \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_try_reserve(                                    \
        name##_tx *tx, vkp_mpsc_permit *permit, name##_value **value)                              \
    {                                                                                              \
        vkp_status status =                                                                        \
            value != NULL ? vkp_mpsc_try_reserve(name##_raw_tx(tx), permit) : VKP_ERR_INVALID;     \
        if (status == VKP_OK) {                                                                    \
            *value = (name##_value *)permit->item;                                                 \
        }                                                                                          \
        return status;                                                                             \
    }                                                                                              \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_recv(name##_rx *rx, uint64_t deadline_ns,       \
                                                        name##_value *out)                         \
    {                                                                                              \
        return vkp_mpsc_recv(name##_raw_rx(rx), deadline_ns, out);                                 \
    }                                                                                              \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_try_recv(name##_rx *rx, name##_value *out)      \
    {                                                                                              \
        return vkp_mpsc_try_recv(name##_raw_rx(rx), out);                                          \
    }                                                                                              \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_recv_many(                                      \
        name##_rx *rx, uint64_t deadline_ns, name##_value *out, size_t capacity, size_t *count)    \
    {                                                                                              \
        return vkp_mpsc_recv_many(name##_raw_rx(rx), deadline_ns, out, capacity, count);           \
    }                                                                                              \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_peek(name##_rx *rx, const name##_value **value) \
    {                                                                                              \
        const void *item;                                                                          \
        vkp_status status =                                                                        \
            value != NULL ? vkp_mpsc_peek(name##_raw_rx(rx), &item) : VKP_ERR_INVALID;             \
        if (status == VKP_OK) {                                                                    \
            *value = (const name##_value *)item;                                                   \
        }                                                                                          \
        return status;                                                                             \
    }                                                                                              \
    VKP_TYPED_CALL vkp_case name##_case_recv(name##_rx *rx, name##_value *out)                     \
    {                                                                                              \
        return vkp_case_mpsc_recv(name##_raw_rx(rx), out);                                         \
    }                                                                                              \
    VKP_TYPED_CALL vkp_case name##_case_send(name##_tx *tx, const name##_value *value)             \
    {                                                                                              \
        return vkp_case_mpsc_send(name##_raw_tx(tx), value);                                       \
    }                                                                                              \
    struct name##_tx /* lets a semicolon follow the macro */

/* A one-shot of T, at most VKP_ONESHOT_BYTES: the slot is the type `name`, in the caller's memory
   or from name_open. The functions are name_init, open, send, abandon, recv, try_recv, close,
   is_closed, wait_closed, tx_unref, rx_unref, case_recv and case_closed, as the vkp_oneshot_* and
   vkp_case_oneshot_* functions; name_init and name_open set elem_bytes. Threads: as the function
   called.                                                                                     */
#define VKP_ONESHOT_TYPED(name, T)                                                               \
    typedef T name##_value;                                                                      \
    typedef struct name {                                                                        \
        vkp_oneshot slot;                                                                        \
    } name;                                                                                      \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_init(                                         \
        name *self, const vkp_env *env, void (*drop)(void *user, void *item), void *user)        \
    {                                                                                            \
        return vkp_oneshot_init(&self->slot, env, sizeof(name##_value), drop, user);             \
    }                                                                                            \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_send(name *self, name##_value value)          \
    {                                                                                            \
        return vkp_oneshot_send(&self->slot, &value);                                            \
    }                                                                                            \
    VKP_TYPED_CALL void name##_abandon(name *self)                                               \
    {                                                                                            \
        vkp_oneshot_abandon((vkp_oneshot *)(uintptr_t)self);                                     \
    }                                                                                            \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_recv(name *self, uint64_t deadline_ns,        \
                                                        name##_value *out)                       \
    {                                                                                            \
        return vkp_oneshot_recv(&self->slot, deadline_ns, out);                                  \
    }                                                                                            \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_try_recv(name *self, name##_value *out)       \
    {                                                                                            \
        return vkp_oneshot_try_recv(&self->slot, out);                                           \
    }                                                                                            \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_open(                                         \
        const vkp_env *env, void (*drop)(void *user, void *item), void *user, name **self)       \
    {                                                                                            \
        vkp_oneshot *raw;                                                                        \
        vkp_status status = self != NULL                                                         \
                                ? vkp_oneshot_open(env, sizeof(name##_value), drop, user, &raw)  \
                                : VKP_ERR_INVALID;                                               \
        if (status == VKP_OK) {                                                                  \
            *self = (name *)(uintptr_t)raw;                                                      \
        }                                                                                        \
        return status;                                                                           \
    }                                                                                            \
    VKP_TYPED_CALL void name##_tx_unref(name *self)                                              \
    {                                                                                            \
        vkp_oneshot_tx_unref((vkp_oneshot *)(uintptr_t)self);                                    \
    }                                                                                            \
    VKP_TYPED_CALL void name##_rx_unref(name *self)                                              \
    {                                                                                            \
        vkp_oneshot_rx_unref((vkp_oneshot *)(uintptr_t)self);                                    \
    }                                                                                            \
    VKP_TYPED_CALL bool name##_is_closed(const name *self)                                       \
    {                                                                                            \
        return vkp_oneshot_is_closed(&self->slot);                                               \
    }                                                                                            \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_wait_closed(name *self, uint64_t deadline_ns) \
    {                                                                                            \
        return vkp_oneshot_wait_closed(&self->slot, deadline_ns);                                \
    }                                                                                            \
    VKP_TYPED_CALL vkp_case name##_case_recv(name *self, name##_value *out)                      \
    {                                                                                            \
        return vkp_case_oneshot_recv((vkp_oneshot *)(uintptr_t)self, out);                       \
    }                                                                                            \
    VKP_TYPED_CALL vkp_case name##_case_closed(name *self)                                       \
    {                                                                                            \
        return vkp_case_oneshot_closed((vkp_oneshot *)(uintptr_t)self);                          \
    }                                                                                            \
    VKP_TYPED_CALL void name##_close(name *self)                                                 \
    {                                                                                            \
        vkp_oneshot_close((vkp_oneshot *)(uintptr_t)self);                                       \
    }                                                                                            \
    struct name

/* A broadcast of T: name_open, send, recv, try_recv, recv_many, subscribe, resubscribe, tx_ref,
   tx_unref, rx_unref and case_recv, as the vkp_broadcast_* functions. name_open sets
   config.elem_bytes; a NULL config returns INVALID: capacity_items is required. name_raw_tx and
   name_raw_rx give the handles for functions without a value: other cases, handlers, lengths.
   Threads: as the function called.                                                            */
#define VKP_BROADCAST_TYPED(name, T)                                                            \
    VKP_TYPED_ENDS(name, T, vkp_broadcast_tx, vkp_broadcast_rx, vkp_broadcast_tx_ref,           \
                   vkp_broadcast_tx_unref, vkp_broadcast_rx_unref)                              \
    VKP_TYPED_GIVE(name, subscribe, tx, rx, vkp_broadcast_rx, vkp_broadcast_subscribe)          \
    VKP_TYPED_GIVE(name, resubscribe, rx, rx, vkp_broadcast_rx, vkp_broadcast_resubscribe)      \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_open(const vkp_broadcast_config *config,     \
                                                        name##_tx **tx)                         \
    {                                                                                           \
        vkp_broadcast_config typed = VKP_ZERO;                                                  \
        vkp_broadcast_tx *raw;                                                                  \
        vkp_status status;                                                                      \
        if (config == NULL || tx == NULL) {                                                     \
            return VKP_ERR_INVALID;                                                             \
        }                                                                                       \
        typed = *config;                                                                        \
        typed.elem_bytes = sizeof(name##_value);                                                \
        status = vkp_broadcast_open(&typed, &raw);                                              \
        if (status == VKP_OK) {                                                                 \
            *tx = (name##_tx *)(uintptr_t)raw;                                                  \
        }                                                                                       \
        return status;                                                                          \
    }                                                                                           \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_send(name##_tx *tx, name##_value value)      \
    {                                                                                           \
        return vkp_broadcast_send(name##_raw_tx(tx), &value);                                   \
    }                                                                                           \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_recv(name##_rx *rx, uint64_t deadline_ns,    \
                                                        name##_value *out)                      \
    {                                                                                           \
        return vkp_broadcast_recv(name##_raw_rx(rx), deadline_ns, out);                         \
    }                                                                                           \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_recv_many(                                   \
        name##_rx *rx, uint64_t deadline_ns, name##_value *out, size_t capacity, size_t *count) \
    {                                                                                           \
        return vkp_broadcast_recv_many(name##_raw_rx(rx), deadline_ns, out, capacity, count);   \
    }                                                                                           \
    VKP_TYPED_CALL vkp_case name##_case_recv(name##_rx *rx, name##_value *out)                  \
    {                                                                                           \
        return vkp_case_broadcast_recv(name##_raw_rx(rx), out);                                 \
    }                                                                                           \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_try_recv(name##_rx *rx, name##_value *out)   \
    {                                                                                           \
        return vkp_broadcast_try_recv(name##_raw_rx(rx), out);                                  \
    }                                                                                           \
    struct name##_tx

/* A watch of T: name_open, send, replace, get, get_and_update, borrow, borrow_and_update, release,
   changed, subscribe, rx_clone, tx_ref, tx_unref and rx_unref, as the vkp_watch_* functions.
   name_open sets config.elem_bytes, and takes the first value as an argument in place of
   config.initial (NULL: zeroes); a NULL config means all defaults. name_raw_tx and name_raw_rx give
   the handles for functions without a value: cases, handlers, marks, vkp_watch_send_if_modified.
   Threads: as the function called.                                                            */
#define VKP_WATCH_TYPED(name, T)                                                                \
    VKP_TYPED_ENDS(name, T, vkp_watch_tx, vkp_watch_rx, vkp_watch_tx_ref, vkp_watch_tx_unref,   \
                   vkp_watch_rx_unref)                                                          \
    VKP_TYPED_GIVE(name, subscribe, tx, rx, vkp_watch_rx, vkp_watch_subscribe)                  \
    VKP_TYPED_GIVE(name, rx_clone, rx, rx, vkp_watch_rx, vkp_watch_rx_clone)                    \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_open(                                        \
        const vkp_watch_config *config, const name##_value *initial, name##_tx **tx)            \
    {                                                                                           \
        vkp_watch_config typed = VKP_ZERO;                                                      \
        vkp_watch_tx *raw;                                                                      \
        vkp_status status;                                                                      \
        if (tx == NULL) {                                                                       \
            return VKP_ERR_INVALID;                                                             \
        }                                                                                       \
        if (config != NULL) {                                                                   \
            typed = *config;                                                                    \
        }                                                                                       \
        typed.elem_bytes = sizeof(name##_value);                                                \
        typed.initial = initial;                                                                \
        status = vkp_watch_open(&typed, &raw);                                                  \
        if (status == VKP_OK) {                                                                 \
            *tx = (name##_tx *)(uintptr_t)raw;                                                  \
        }                                                                                       \
        return status;                                                                          \
    }                                                                                           \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_send(name##_tx *tx, name##_value value)      \
    {                                                                                           \
        return vkp_watch_send(name##_raw_tx(tx), &value);                                       \
    }                                                                                           \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_replace(name##_tx *tx, name##_value value)   \
    {                                                                                           \
        return vkp_watch_replace(name##_raw_tx(tx), &value);                                    \
    }                                                                                           \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_get(name##_rx *rx, name##_value *out)        \
    {                                                                                           \
        return vkp_watch_get(name##_raw_rx(rx), out);                                           \
    }                                                                                           \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_get_and_update(name##_rx *rx,                \
                                                                  name##_value *out)            \
    {                                                                                           \
        return vkp_watch_get_and_update(name##_raw_rx(rx), out);                                \
    }                                                                                           \
    VKP_TYPED_CALL const name##_value *name##_borrow(name##_rx *rx)                             \
    {                                                                                           \
        return (const name##_value *)vkp_watch_borrow(name##_raw_rx(rx));                       \
    }                                                                                           \
    VKP_TYPED_CALL const name##_value *name##_borrow_and_update(name##_rx *rx)                  \
    {                                                                                           \
        return (const name##_value *)vkp_watch_borrow_and_update(name##_raw_rx(rx));            \
    }                                                                                           \
    VKP_TYPED_CALL void name##_release(name##_rx *rx)                                           \
    {                                                                                           \
        vkp_watch_release(name##_raw_rx(rx));                                                   \
    }                                                                                           \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_changed(name##_rx *rx, uint64_t deadline_ns) \
    {                                                                                           \
        return vkp_watch_changed(name##_raw_rx(rx), deadline_ns);                               \
    }                                                                                           \
    struct name##_tx

#ifdef __cplusplus
}
#endif

#endif /* VALKEY_PUSH_H */

/* ======================================================================================
   >>impl   Implementation
   ====================================================================================== */
#if defined(VKP_IMPLEMENTATION) && !defined(VKP_I_IMPLEMENTED)
#define VKP_I_IMPLEMENTED

/* Platform facts and the system headers of the implementation. VKP_I_LINUX, VKP_I_APPLE and
   VKP_I_IO are always defined, as 0 or 1: test them with #if. Feature macros (_GNU_SOURCE ...) are
   set at the top of the header, before the first system header. */
#if !defined(__linux__) && !defined(__APPLE__) && !defined(__FreeBSD__) && \
    !defined(__OpenBSD__) && !defined(__NetBSD__) && !defined(__DragonFly__)
#error "valkey_push.h supports Linux, macOS and the BSDs"
#endif

#ifdef __linux__
#define VKP_I_LINUX 1
#else
#define VKP_I_LINUX 0
#endif
#ifdef __APPLE__
#define VKP_I_APPLE 1
#else
#define VKP_I_APPLE 0
#endif
#ifdef VKP_NO_IO
#define VKP_I_IO 0
#else
#define VKP_I_IO 1
#endif

#include <errno.h>
#include <float.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#if VKP_I_LINUX
#include <sys/random.h>
#include <sys/syscall.h>
#if !defined(__USE_GNU) && defined(__GLIBC__)
#error \
    "define VKP_IMPLEMENTATION before the FIRST include of this file, or build with -D_GNU_SOURCE"
#endif
#endif
#if VKP_I_IO
#include <arpa/inet.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/un.h>
#if VKP_I_LINUX
#include <sys/epoll.h>
#include <sys/eventfd.h>
#else
#pragma push_macro("EV_ERROR") /* an enumerator of libev's <ev.h>, which programs may include */
#include <sys/event.h>
#pragma pop_macro("EV_ERROR")
#endif
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ======================================================================================
   >>impl-base   Atomics by intent, locks, memory, log
   ======================================================================================
   All atomics of the file use the macros below, so that a model checker can replace them
   (VKP_I_ATOMICS_FILE). A name without a suffix is relaxed for a load, a store, ADD and SUB, and
   acquire and release for XCHG, CAS, OR and AND. No macro is a fence: ThreadSanitizer does not see
   fences. Where a store must be visible before a later load of another variable, both sides use
   the SEQ forms, or a flag (vkp_i_flag_*, section park).
   Reference counts grow relaxed and shrink with acquire and release, so that the thread that frees
   an object sees all writes to it. The functions of this section take no lock.                 */
#ifdef VKP_I_ATOMICS_FILE
#include VKP_I_ATOMICS_FILE
#else
#define VKP_I_LOAD(p) __atomic_load_n((p), __ATOMIC_RELAXED)
#define VKP_I_LOAD_ACQ(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
#define VKP_I_LOAD_SEQ(p) __atomic_load_n((p), __ATOMIC_SEQ_CST)
#define VKP_I_STORE(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)
#define VKP_I_STORE_REL(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
#define VKP_I_STORE_SEQ(p, v) __atomic_store_n((p), (v), __ATOMIC_SEQ_CST)
#define VKP_I_XCHG(p, v) __atomic_exchange_n((p), (v), __ATOMIC_ACQ_REL)
#define VKP_I_XCHG_SEQ(p, v) __atomic_exchange_n((p), (v), __ATOMIC_SEQ_CST)
#define VKP_I_CAS(p, expected, v) \
    __atomic_compare_exchange_n((p), (expected), (v), false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)
#define VKP_I_CAS_SEQ(p, expected, v) \
    __atomic_compare_exchange_n((p), (expected), (v), false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)
#define VKP_I_ADD(p, v) __atomic_fetch_add((p), (v), __ATOMIC_RELAXED)
#define VKP_I_SUB(p, v) __atomic_fetch_sub((p), (v), __ATOMIC_RELAXED)
#define VKP_I_UNREF(p) __atomic_fetch_sub((p), 1, __ATOMIC_ACQ_REL) /* gives the count before */
#define VKP_I_SUB_ACQ_REL(p, v) __atomic_fetch_sub((p), (v), __ATOMIC_ACQ_REL)
#define VKP_I_ADD_ACQ_REL(p, v) __atomic_fetch_add((p), (v), __ATOMIC_ACQ_REL)
#define VKP_I_OR(p, v) __atomic_fetch_or((p), (v), __ATOMIC_ACQ_REL)
#define VKP_I_AND(p, v) __atomic_fetch_and((p), (v), __ATOMIC_ACQ_REL)
/* The calling thread as a number; never 0 or 1. The builtin exists for x86-64 from clang 14 and
   gcc 11 on.                                                                                   */
#if VKP_I_LINUX && defined(__x86_64__) && \
    (defined(__clang__) ? __clang_major__ >= 14 : __GNUC__ >= 11)
#define VKP_I_SELF() ((uintptr_t)__builtin_thread_pointer())
#else
#define VKP_I_SELF() ((uintptr_t)pthread_self())
#endif
/* Orders memory accesses for the compiler only: no instruction. */
#define VKP_I_ORDER() __atomic_signal_fence(__ATOMIC_SEQ_CST)
#if defined(__x86_64__) || defined(__i386__)
#define VKP_I_PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__) || defined(__arm__)
#define VKP_I_PAUSE() __asm__ volatile("yield")
#else
#define VKP_I_PAUSE() VKP_I_ORDER()
#endif
/* A value that one thread hands to another is copied in and out: a model checker sees the
   copies.                                                                                      */
#define VKP_I_COPY_IN(slot, from, bytes) vkp_i_copy_in((slot), (from), (bytes))
#define VKP_I_COPY_OUT(to, slot, bytes) vkp_i_copy_out((to), (slot), (bytes))
#define VKP_I_MUTEX pthread_mutex_t
#define VKP_I_MUTEX_INIT(m) ((void)pthread_mutex_init((m), NULL))
#define VKP_I_MUTEX_DEINIT(m) ((void)pthread_mutex_destroy((m)))
#define VKP_I_LOCK(m) ((void)pthread_mutex_lock((m)))
#define VKP_I_UNLOCK(m) ((void)pthread_mutex_unlock((m)))
#endif

#ifndef VKP_ASSERT
#define VKP_ASSERT(condition) ((void)0)
#endif

/* A programmer's error: assert where the program defines VKP_ASSERT, and return INVALID. */
#define VKP_I_REQUIRE(condition)    \
    do {                            \
        if (!(condition)) {         \
            VKP_ASSERT(condition);  \
            return VKP_ERR_INVALID; \
        }                           \
    } while (0)

/* Fields that are this many bytes apart lie in different cache lines and different pairs of
   lines.                                                                                       */
#define VKP_I_APART 128

/* Most bytes of one value of a channel (mpsc, broadcast, watch). */
#define VKP_I_ELEM_MAX 65536u

#define VKP_I_NS_PER_MS 1000000u

#define VKP_I_MIN(a, b) ((a) < (b) ? (a) : (b))
#define VKP_I_MAX(a, b) ((a) > (b) ? (a) : (b))

/* The compiler no longer knows what the pointer points to. Where it does, GCC warns of overflows in
   branches that are dead code for the size at hand, at link time (-flto) too. Of a copy, hide the
   pointer to the caller's object alone: the bench channels shows what another one costs.      */
#define VKP_I_HIDE(pointer) __asm__("" : "+r"(pointer))

/* Copy a value. Values of usual sizes (8, 24, 64 bytes) move without a call of memcpy. */
static inline void vkp_i_copy(void *to, const void *from, size_t bytes)
{
    if (bytes == 8) {
        memcpy(to, from, 8);
    } else if (bytes == 24) {
        memcpy(to, from, 24);
    } else if (bytes == 64) {
        memcpy(to, from, 64);
    } else {
        memcpy(to, from, bytes);
    }
}

/* Copy the caller's value into a slot. */
static inline void vkp_i_copy_in(void *slot, const void *from, size_t bytes)
{
    VKP_I_HIDE(from);
    vkp_i_copy(slot, from, bytes);
}

/* Copy a slot's value to the caller. */
static inline void vkp_i_copy_out(void *to, const void *slot, size_t bytes)
{
    VKP_I_HIDE(to);
    vkp_i_copy(to, slot, bytes);
}

VKP_API const char *vkp_status_str(vkp_status status)
{
#define VKP_I_STATUS_TEXT(name, value, text) \
    if (status == (name)) {                  \
        return text;                         \
    }
    VKP_STATUS_MAP(VKP_I_STATUS_TEXT)
#undef VKP_I_STATUS_TEXT
    return "unknown status";
}

VKP_API const char *vkp_version_str(void)
{
    return VKP_VERSION_STR;
}

/* The default allocator. Not inlined: gcc would warn (-Wfree-nonheap-object) of frees of
   embedded slots and lanes, which a check at run time prevents.                                */
static __attribute__((noinline)) void *vkp_i_libc_alloc(void *user, void *ptr, size_t old_bytes,
                                                        size_t new_bytes)
{
    (void)user;
    (void)old_bytes;
    if (new_bytes == 0) {
        free(ptr);
        return NULL;
    }
    return realloc(ptr, new_bytes);
}

static const vkp_env vkp_i_env_default = {NULL, NULL, NULL, VKP_LOG_DEFAULT, NULL, 0};

/* The given env, or the default one for NULL. */
static const vkp_env *vkp_i_env(const vkp_env *env)
{
    return env != NULL ? env : &vkp_i_env_default;
}

/* Allocate, resize or free with the allocator of the env, as vkp_env.alloc describes. */
static void *vkp_i_resize(const vkp_env *env, void *ptr, size_t old_bytes, size_t new_bytes)
{
    return env->alloc != NULL ? env->alloc(env->user, ptr, old_bytes, new_bytes)
                              : vkp_i_libc_alloc(NULL, ptr, old_bytes, new_bytes);
}

static void *vkp_i_alloc(const vkp_env *env, size_t bytes)
{
    return vkp_i_resize(env, NULL, 0, bytes);
}

static void *vkp_i_alloc_zero(const vkp_env *env, size_t bytes)
{
    void *ptr = vkp_i_alloc(env, bytes);
    if (ptr != NULL) {
        memset(ptr, 0, bytes);
    }
    return ptr;
}

/* Free memory of `bytes` bytes; NULL is ignored. */
static void vkp_i_free(const vkp_env *env, void *ptr, size_t bytes)
{
    if (ptr != NULL) {
        (void)vkp_i_resize(env, ptr, bytes, 0);
    }
}

#if VKP_I_IO
#define VKP_I_GROW_FIRST 8u /* elements of an array that grows for the first time */

/* Make room for `need` elements in an array that doubles; false when memory runs out or the size
   overflows, and the array is unchanged then.                                                  */
static bool vkp_i_grow(const vkp_env *env, void **array, size_t *capacity, size_t need,
                       size_t elem_bytes)
{
    size_t wanted = *capacity < VKP_I_GROW_FIRST ? VKP_I_GROW_FIRST : *capacity;
    void *grown;
    if (need <= *capacity) {
        return true;
    }
    while (wanted < need) {
        if (wanted > SIZE_MAX / 2) {
            return false;
        }
        wanted *= 2;
    }
    if (wanted > SIZE_MAX / elem_bytes) {
        return false;
    }
    grown = vkp_i_resize(env, *array, *capacity * elem_bytes, wanted * elem_bytes);
    if (grown == NULL) {
        return false;
    }
    *array = grown;
    *capacity = wanted;
    return true;
}

#define VKP_I_LOG_BYTES 512 /* of one log line with its NUL; a longer line is cut */

/* Format one line and give it to the log of the env, if the env logs this level. Call it without
   a lock.                                                                                      */
__attribute__((format(printf, 3, 4))) static void vkp_i_log(const vkp_env *env, vkp_log_level level,
                                                            const char *format, ...)
{
    char text[VKP_I_LOG_BYTES];
    va_list arguments;
    int most = env->log_level == VKP_LOG_DEFAULT ? (int)VKP_LOG_WARN : (int)env->log_level;
    if (env->log == NULL || (int)level > most) {
        return;
    }
    va_start(arguments, format);
    (void)vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    env->log(env->user, level, text);
}
#endif

/* The deadline `ms` milliseconds after now_ns; saturates at VKP_FOREVER. */
static uint64_t vkp_i_after_ms(uint64_t now_ns, uint64_t ms)
{
    return ms > (VKP_FOREVER - now_ns) / VKP_I_NS_PER_MS ? VKP_FOREVER
                                                         : now_ns + ms * VKP_I_NS_PER_MS;
}

VKP_API vkp_str vkp_str_of(const char *text)
{
    vkp_str view;
    view.ptr = text;
    view.len = text != NULL ? strlen(text) : 0;
    return view;
}

#if VKP_I_IO
/* A view of `len` characters; borrows them. */
static vkp_str vkp_i_str(const void *ptr, size_t len)
{
    vkp_str view;
    view.ptr = (const char *)ptr;
    view.len = len;
    return view;
}

static bool vkp_i_str_equal(vkp_str a, vkp_str b)
{
    return a.len == b.len && (a.len == 0 || memcmp(a.ptr, b.ptr, a.len) == 0);
}

/* The lower-case letter of an ASCII capital; other characters are unchanged. */
static char vkp_i_lower(char c)
{
    return c >= 'A' && c <= 'Z' ? (char)(c + ('a' - 'A')) : c;
}

/* Whether two views are equal without regard to ASCII case. */
static bool vkp_i_str_alike(vkp_str a, vkp_str b)
{
    size_t i;
    for (i = 0; i < a.len && i < b.len; i++) {
        if (vkp_i_lower(a.ptr[i]) != vkp_i_lower(b.ptr[i])) {
            return false;
        }
    }
    return a.len == b.len;
}

/* Whether the view equals the terminated text without regard to ASCII case. */
static bool vkp_i_str_is(vkp_str view, const char *text)
{
    size_t i;
    for (i = 0; i < view.len; i++) {
        if (text[i] == '\0' || vkp_i_lower(view.ptr[i]) != vkp_i_lower(text[i])) {
            return false;
        }
    }
    return text[i] == '\0';
}

/* Replace the view by a copy that has a NUL behind its end; false without memory. A view whose
   ptr is NULL stays. vkp_i_free_str frees the copy.                                            */
static bool vkp_i_copy_str(const vkp_env *env, vkp_str *text)
{
    char *copy;
    if (text->ptr == NULL) {
        return true;
    }
    copy = (char *)vkp_i_alloc(env, text->len + 1);
    if (copy != NULL) {
        memcpy(copy, text->ptr, text->len);
        copy[text->len] = '\0';
    }
    text->ptr = copy;
    return copy != NULL;
}

/* Free a copy that vkp_i_copy_str made; a view whose ptr is NULL is ignored. */
static void vkp_i_free_str(const vkp_env *env, vkp_str text)
{
    void *copy;
    memcpy(&copy, &text.ptr, sizeof copy); /* a cast would warn: the copy itself is not const */
    vkp_i_free(env, copy, text.len + 1);
}

/* Free a text whose allocation ends with its only NUL; NULL is ignored. */
static void vkp_i_free_text(const vkp_env *env, char *text)
{
    if (text != NULL) {
        vkp_i_free(env, text, strlen(text) + 1);
    }
}

static bool vkp_i_starts_with(vkp_str text, const char *start)
{
    size_t len = strlen(start);
    return text.len >= len && memcmp(text.ptr, start, len) == 0;
}

/* Load 8 bytes in the byte order of the machine, from an address of any alignment. */
static uint64_t vkp_i_load64(const void *from)
{
    uint64_t value;
    memcpy(&value, from, sizeof value);
    return value;
}

/* The status of a failed system call, whose result is a negated errno; sets errno. */
static vkp_status vkp_i_sys_failure(int result)
{
    errno = -result;
    return result == -ENOMEM || result == -ENOBUFS ? VKP_ERR_NOMEM : VKP_ERR_SYS;
}
#endif

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
        vkp_i_os_clock_ns,      vkp_i_os_wall_ns,     vkp_i_os_random_u64,
        vkp_i_os_process_id,    vkp_i_os_user_id,     vkp_i_os_park,
        vkp_i_os_unpark,        vkp_i_os_yield,       vkp_i_os_processors,
        vkp_i_os_membarrier,    VKP_I_OS(socket),     VKP_I_OS(bind),
        VKP_I_OS(listen),       VKP_I_OS(accept),     VKP_I_OS(connect),
        VKP_I_OS(socket_error), VKP_I_OS(prepare),    VKP_I_OS(set_nodelay),
        VKP_I_OS(set_liveness), VKP_I_OS(peer),       VKP_I_OS(local_port),
        VKP_I_OS(resolve),      VKP_I_OS(read),       VKP_I_OS(send),
        VKP_I_OS(write),        VKP_I_OS(close),      VKP_I_OS(lock_file),
        VKP_I_OS(identify),     VKP_I_OS(chmod),      VKP_I_OS(unlink),
        VKP_I_OS(wake_pair),    VKP_I_OS(poll),       VKP_I_OS(epoll_create),
        VKP_I_OS(epoll_ctl),    VKP_I_OS(epoll_wait), VKP_I_OS(kqueue_create),
        VKP_I_OS(kevent),       VKP_I_OS(fd_kind)};
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

/* ======================================================================================
   >>impl-park   The waiter: the one way to be woken
   ======================================================================================
   A waiter is a node that a waiting side links into a list of the object it waits for. The side
   that makes the condition true unlinks the waiter and calls its wake, both under the lock of the
   list. A waiter that is no longer linked when its owner takes the lock has therefore been woken
   completely, and its memory may be freed. (A one-shot has no list and no lock, see its section.)
   wake only unparks a thread or queues a task on a loop: no user code runs under a lock.
   Lock order: the lock of a channel or token, then the lock that wake takes: the mutex of a parker
   where there are no futexes (the queue of a loop takes no lock). Latches: the latch of the
   senders, then the latch of a place.                                                          */

typedef struct vkp_i_waiter {
    struct vkp_i_waiter *prev; /* NULL when not linked */
    struct vkp_i_waiter *next;
    void (*wake)(struct vkp_i_waiter *waiter); /* unparks a thread, or queues a task */
} vkp_i_waiter;

typedef struct vkp_i_waiters {
    vkp_i_waiter head; /* the sentinel of a ring: next is the oldest waiter, prev the newest */
} vkp_i_waiters;

static void vkp_i_waiters_init(vkp_i_waiters *list)
{
    list->head.prev = &list->head;
    list->head.next = &list->head;
    list->head.wake = NULL;
}

static bool vkp_i_waiters_empty(const vkp_i_waiters *list)
{
    return list->head.next == &list->head;
}

/* Link the waiter as the newest of the list. */
static void vkp_i_waiter_link(vkp_i_waiters *list, vkp_i_waiter *waiter)
{
    waiter->prev = list->head.prev;
    waiter->next = &list->head;
    list->head.prev->next = waiter;
    list->head.prev = waiter;
}

/* Unlink the waiter; false when it was not linked. */
static bool vkp_i_waiter_unlink(vkp_i_waiter *waiter)
{
    if (waiter->prev == NULL) {
        return false;
    }
    waiter->prev->next = waiter->next;
    waiter->next->prev = waiter->prev;
    waiter->prev = NULL;
    waiter->next = NULL;
    return true;
}

/* Locked: unlink and wake every waiter, the oldest first. */
static void vkp_i_waiters_wake_all(vkp_i_waiters *list)
{
    while (!vkp_i_waiters_empty(list)) {
        vkp_i_waiter *first = list->head.next;
        (void)vkp_i_waiter_unlink(first);
        first->wake(first);
    }
}

/* One wait for one object. A thread that waits for several objects has one vkp_i_wait for each,
   all with its parker; a handler has one.                                                      */
typedef struct vkp_i_wait {
    vkp_i_waiter node;
    const vkp_sys *sys; /* of a thread that waits; NULL in a handler */
    vkp_parker *parker; /* of a thread that waits; NULL in a handler */
    const void *item;   /* value of a sender that waits for room, or NULL, see vkp_i_lane_admit */
    size_t cost; /* of a sender that waits for room: bytes of its value, by vkp_mpsc_config.cost */
    vkp_status status; /* of a sender that waits for room: FULL until it is woken */
    int wake_fd;       /* where a wake-up of a thread that sleeps in poll is written */
    uint32_t done;     /* atomic: 1 when a one-shot has woken this wait and no longer uses it */
} vkp_i_wait;

/* The wake of a parked thread. */
static void vkp_i_thread_wake(vkp_i_waiter *waiter)
{
    vkp_i_wait *self = VKP_CONTAINER(waiter, vkp_i_wait, node);
    self->sys->unpark(self->parker);
}

/* Prepare the wait of a thread that will park. */
static void vkp_i_wait_init(vkp_i_wait *self, const vkp_sys *sys, vkp_parker *parker)
{
    memset(self, 0, sizeof *self);
    self->node.wake = vkp_i_thread_wake;
    self->sys = sys;
    self->parker = parker;
}

/* Whether unpark was called for the parker. */
static bool vkp_i_parker_notified(vkp_parker *parker)
{
    return VKP_I_LOAD_ACQ(&parker->state) == VKP_I_PARK_NOTIFIED;
}

/* Flags. The storing side stores a value and then checks the flag; the waiting side raises its
   bit of the flag and then checks for the value. One of the two must see the other's store, but
   each side does a store before a load, and processors reorder those. The waiting side, which is
   about to sleep, pays for both with a memory barrier in every thread (membarrier). Where there
   is no membarrier (`fenced`), both sides change the flag with a read-modify-write: the flag
   orders the two sides.                                                                        */

/* Storing side, after its store: the raised bits; 0 means that no side waits. */
static inline uint32_t vkp_i_flag_check(uint32_t *flag, bool fenced)
{
    if (fenced) {
        return VKP_I_ADD_ACQ_REL(flag, 0u);
    }
    VKP_I_ORDER();
    return VKP_I_LOAD(flag);
}

/* Waiting side: raise the bit; then call vkp_i_flag_fence; then check for the value. */
static void vkp_i_flag_raise(uint32_t *flag, uint32_t bit)
{
    (void)VKP_I_OR(flag, bit);
}

/* Waiting side, after vkp_i_flag_raise: from here on it sees the store, or the storing side sees
   the bit.                                                                                     */
static void vkp_i_flag_fence(const vkp_env *env, bool fenced)
{
    if (!fenced) {
        (void)vkp_i_sys(env)->membarrier(false);
    }
}

/* Lower the bit: no side waits for it. Both sides call this, under the lock of the list. */
static void vkp_i_flag_lower(uint32_t *flag, uint32_t bit)
{
    (void)VKP_I_AND(flag, ~bit);
}

/* Register the process for membarrier; true (`fenced`) when flags must work without it. */
static bool vkp_i_flag_prepare(const vkp_env *env)
{
    return vkp_i_sys(env)->membarrier(true) < 0;
}

/* A thread stays awake for a while before it sleeps: a wake-up costs microseconds, and a value
   often arrives sooner.                                                                        */
typedef struct vkp_i_spin {
    uint32_t pauses; /* processor pauses done */
    uint32_t yields; /* yields done after the pauses */
} vkp_i_spin;

#define VKP_I_SPINS 200u /* default of vkp_env.spins: pauses before a thread yields */
#define VKP_I_YIELDS 8u  /* yields after the pauses, before a thread sleeps */

/* Pauses of a thread of this env before it yields and sleeps; 0: it sleeps immediately. */
static uint32_t vkp_i_spins(const vkp_env *env)
{
    if (env->spins == 0) {
        return vkp_i_sys(env)->processors() > 1 ? VKP_I_SPINS : 0;
    }
    return env->spins == VKP_SPINS_NONE ? 0 : env->spins;
}

/* Pause, or after `spins` pauses yield to a thread without a processor; false: time to sleep. */
static inline bool vkp_i_spin_again(vkp_i_spin *spin, const vkp_sys *sys, uint32_t spins)
{
    if (spin->pauses < spins) {
        spin->pauses++;
        VKP_I_PAUSE();
        return true;
    }
    if (spins > 0 && spin->yields < VKP_I_YIELDS) {
        spin->yields++;
        sys->yield();
        return true;
    }
    return false;
}

/* The functions of one kind of case. All waits of the library, except plain sends and reserves
   of mpsc channels, use them in this order: attempt, join, sleep, attempt again, leave.        */
struct vkp_i_case_kind {
    /* Carry the case out; EMPTY when it is not ready. `wait` is the joined wait, or NULL. */
    vkp_status (*attempt)(vkp_case *each, vkp_i_wait *wait);
    /* Whether an attempt is worthwhile; takes and sends nothing. */
    bool (*is_ready)(const vkp_case *each);
    /* Link the wait to the object of the case; false, and not joined, when the case is ready. */
    bool (*join)(const vkp_case *each, vkp_i_wait *wait);
    /* End a wait that join began; its memory may be reused afterwards. */
    void (*leave)(const vkp_case *each, vkp_i_wait *wait);
    /* The env of the object; NULL for a kind of case without an object. */
    const vkp_env *(*env)(const vkp_case *each);
};

/* Where a case that receives several values puts them (its i_out). */
typedef struct vkp_i_batch {
    void *out;       /* array of `capacity` values */
    size_t capacity; /* most values to receive */
    size_t count;    /* values received; written with status OK */
} vkp_i_batch;

/* Make a case of that kind, with status EMPTY. */
static vkp_case vkp_i_case(const vkp_i_case_kind *kind, void *object, void *out)
{
    vkp_case each;
    memset(&each, 0, sizeof each);
    each.status = VKP_ERR_EMPTY;
    each.i_kind = kind;
    each.i_object = object;
    each.i_out = out;
    return each;
}

static vkp_status vkp_i_case_never_attempt(vkp_case *each, vkp_i_wait *wait)
{
    (void)each;
    (void)wait;
    return VKP_ERR_EMPTY;
}

static bool vkp_i_case_never_is_ready(const vkp_case *each)
{
    (void)each;
    return false;
}

static bool vkp_i_case_never_join(const vkp_case *each, vkp_i_wait *wait)
{
    (void)each;
    (void)wait;
    return true;
}

static void vkp_i_case_never_leave(const vkp_case *each, vkp_i_wait *wait)
{
    (void)each;
    (void)wait;
}

static const vkp_env *vkp_i_case_never_env(const vkp_case *each)
{
    (void)each;
    return NULL;
}

static const vkp_i_case_kind vkp_i_case_kind_never = {
    vkp_i_case_never_attempt, vkp_i_case_never_is_ready, vkp_i_case_never_join,
    vkp_i_case_never_leave, vkp_i_case_never_env};

VKP_API vkp_case vkp_case_never(void)
{
    return vkp_i_case(&vkp_i_case_kind_never, NULL, NULL);
}

/* Carry out the first ready case, searching from index `start` on and then from 0; false when
   none is ready. The cases below index `joined` are joined, and get their waits.               */
static bool vkp_i_cases_attempt(vkp_case *cases, size_t count, size_t start, vkp_i_wait *waits,
                                size_t joined, size_t *won)
{
    size_t i;
    for (i = 0; i < count; i++) {
        size_t at = (start + i) % count;
        vkp_case *each = &cases[at];
        each->status = each->i_kind->attempt(each, at < joined ? &waits[at] : NULL);
        if (each->status != VKP_ERR_EMPTY) {
            *won = at;
            return true;
        }
    }
    return false;
}

/* A deadline as a case; i_object is the vkp_sys, set when the wait begins. It never joins: the
   sleeper ends with the earliest deadline.                                                     */
static bool vkp_i_case_deadline_is_ready(const vkp_case *each)
{
    return ((const vkp_sys *)each->i_object)->clock_ns() >= each->i_number;
}

static vkp_status vkp_i_case_deadline_attempt(vkp_case *each, vkp_i_wait *wait)
{
    (void)wait;
    return vkp_i_case_deadline_is_ready(each) ? VKP_OK : VKP_ERR_EMPTY;
}

static const vkp_i_case_kind vkp_i_case_kind_deadline = {
    vkp_i_case_deadline_attempt, vkp_i_case_deadline_is_ready, vkp_i_case_never_join,
    vkp_i_case_never_leave, vkp_i_case_never_env};

#if VKP_I_IO
/* A descriptor as a case; i_object is the vkp_sys, set when the wait begins. It never joins: the
   sleeper polls. i_number holds the interest in its upper 32 bits, the descriptor in its lower
   32.                                                                                          */
static void vkp_i_case_fd_set(const vkp_case *each, struct pollfd *poll)
{
    uint32_t interest = (uint32_t)(each->i_number >> 32);
    poll->fd = (int)(each->i_number & 0xffffffffu);
    poll->revents = 0;
    poll->events = (short)(((interest & VKP_IO_READ) != 0 ? POLLIN : 0) |
                           ((interest & VKP_IO_WRITE) != 0 ? POLLOUT : 0));
}

/* Poll the descriptor without waiting. A failed poll carries the case out, with status SYS. */
static vkp_status vkp_i_case_fd_attempt(vkp_case *each, vkp_i_wait *wait)
{
    const vkp_sys *sys = (const vkp_sys *)each->i_object;
    struct pollfd poll;
    int rc;
    (void)wait;
    vkp_i_case_fd_set(each, &poll);
    rc = sys->poll(&poll, 1, 0);
    if (rc == 0 || rc == -EINTR) {
        return VKP_ERR_EMPTY;
    }
    if (rc < 0) {
        errno = -rc;
        return VKP_ERR_SYS;
    }
    each->ready = ((poll.revents & POLLIN) != 0 ? VKP_IO_READ : VKP_IO_NONE) |
                  ((poll.revents & POLLOUT) != 0 ? VKP_IO_WRITE : VKP_IO_NONE) |
                  ((poll.revents & POLLHUP) != 0 ? VKP_IO_HUP : VKP_IO_NONE) |
                  ((poll.revents & (POLLERR | POLLNVAL)) != 0 ? VKP_IO_ERROR : VKP_IO_NONE);
    return VKP_OK;
}

static bool vkp_i_case_fd_is_ready(const vkp_case *each)
{
    vkp_case copy = *each;
    return vkp_i_case_fd_attempt(&copy, NULL) != VKP_ERR_EMPTY;
}

static const vkp_i_case_kind vkp_i_case_kind_fd = {vkp_i_case_fd_attempt, vkp_i_case_fd_is_ready,
                                                   vkp_i_case_never_join, vkp_i_case_never_leave,
                                                   vkp_i_case_never_env};
#endif

/* How a thread sleeps in a select: parked, or in poll(2) when descriptors are among its cases; a
   wake-up is then a write to an eventfd (Linux) or a pipe.                                     */
typedef struct vkp_i_sleeper {
    const vkp_sys *sys;
    uint64_t deadline_ns; /* the earliest of the deadline of the select and those of its cases */
    bool polls;           /* sleeps in poll, not parked */
    int wake[2];          /* with `polls`: read end, write end; the same for an eventfd */
    vkp_parker parker;    /* without `polls` */
} vkp_i_sleeper;

#if VKP_I_IO
/* The wake of a thread that sleeps in poll. */
static void vkp_i_pipe_wake(vkp_i_waiter *waiter)
{
    const vkp_i_wait *wait = VKP_CONTAINER(waiter, vkp_i_wait, node);
    uint64_t one = 1;
    /* A write to a full pipe fails, and need not succeed: the read end is readable already. */
    (void)wait->sys->write(wait->wake_fd, &one, sizeof one);
}
#endif

/* Decide how to sleep, and until when; gives deadlines and descriptors their vkp_sys. */
static void vkp_i_sleeper_init(vkp_i_sleeper *sleeper, vkp_case *cases, size_t count,
                               const vkp_sys *sys, uint64_t deadline_ns)
{
    size_t i;
    sleeper->sys = sys;
    sleeper->deadline_ns = deadline_ns;
    sleeper->polls = false;
    for (i = 0; i < count; i++) {
        if (cases[i].i_kind == &vkp_i_case_kind_deadline) {
            cases[i].i_object = (void *)(uintptr_t)sys;
            sleeper->deadline_ns = VKP_I_MIN(sleeper->deadline_ns, cases[i].i_number);
        }
#if VKP_I_IO
        if (cases[i].i_kind == &vkp_i_case_kind_fd) {
            cases[i].i_object = (void *)(uintptr_t)sys;
            sleeper->polls = true;
        }
#endif
    }
}

/* After each sleep: release what vkp_i_sleeper_begin opened. */
static void vkp_i_sleeper_end(vkp_i_sleeper *sleeper)
{
#if VKP_I_IO
    if (sleeper->polls) {
        (void)sleeper->sys->close(sleeper->wake[0]);
        if (sleeper->wake[1] != sleeper->wake[0]) {
            (void)sleeper->sys->close(sleeper->wake[1]);
        }
        return;
    }
#endif
    vkp_i_parker_deinit(&sleeper->parker);
}

/* Before each sleep: prepare the parker or the pipe, and a wait for each case. OK or SYS. */
static vkp_status vkp_i_sleeper_begin(vkp_i_sleeper *sleeper, vkp_i_wait *waits, size_t count)
{
    size_t i;
#if VKP_I_IO
    if (sleeper->polls) {
        int rc = sleeper->sys->wake_pair(sleeper->wake);
        if (rc < 0) {
            errno = -rc;
            return VKP_ERR_SYS;
        }
    } else
#endif
    {
        vkp_i_parker_init(&sleeper->parker);
    }
    for (i = 0; i < count; i++) {
        vkp_i_wait_init(&waits[i], sleeper->sys, &sleeper->parker);
#if VKP_I_IO
        if (sleeper->polls) {
            waits[i].node.wake = vkp_i_pipe_wake;
            waits[i].wake_fd = sleeper->wake[1];
        }
#endif
    }
    return VKP_OK;
}

/* Sleep until a wake-up arrives or a descriptor is ready: true; false at the deadline. */
static bool vkp_i_sleeper_sleep(vkp_i_sleeper *sleeper, const vkp_case *cases, size_t count)
{
#if VKP_I_IO
    if (sleeper->polls) {
        struct pollfd polls[VKP_SELECT_MAX + 1];
        size_t used = 1;
        size_t i;
        polls[0].fd = sleeper->wake[0];
        polls[0].events = POLLIN;
        polls[0].revents = 0;
        for (i = 0; i < count; i++) {
            if (cases[i].i_kind == &vkp_i_case_kind_fd) {
                vkp_i_case_fd_set(&cases[i], &polls[used]);
                used++;
            }
        }
        /* The attempt that follows finds the ready descriptor. poll returns 0 before the
           deadline when the deadline is beyond its longest time-out: that counts as a wake-up. */
        return sleeper->sys->poll(polls, used, sleeper->deadline_ns) != 0 ||
               sleeper->sys->clock_ns() < sleeper->deadline_ns;
    }
#endif
    (void)cases;
    (void)count;
    sleeper->sys->park(&sleeper->parker, sleeper->deadline_ns);
    return vkp_i_parker_notified(&sleeper->parker);
}

/* Wait for one of the cases and carry it out. `waits` has an element for each case; `spins` is
   the number of pauses before the first sleep. OK (*won is the index, the status of that case
   its result), TIMEOUT or SYS.                                                                 */
static vkp_status vkp_i_select(vkp_case *cases, size_t count, size_t start, vkp_i_wait *waits,
                               const vkp_sys *sys, uint32_t spins, uint64_t deadline_ns,
                               size_t *won)
{
    vkp_i_spin spin = {0, 0};
    vkp_i_sleeper sleeper;
    bool late = deadline_ns == 0;
    bool found;
    vkp_i_sleeper_init(&sleeper, cases, count, sys, deadline_ns);
    found = vkp_i_cases_attempt(cases, count, start, NULL, 0, won);
    while (!found && !late && !sleeper.polls && vkp_i_spin_again(&spin, sys, spins)) {
        found = vkp_i_cases_attempt(cases, count, start, NULL, 0, won);
    }
    while (!found && !late) {
        size_t joined;
        size_t i;
        vkp_status status = vkp_i_sleeper_begin(&sleeper, waits, count);
        if (status != VKP_OK) {
            return status;
        }
        for (joined = 0; joined < count; joined++) {
            if (!cases[joined].i_kind->join(&cases[joined], &waits[joined])) {
                break;
            }
        }
        if (joined == count) {
            bool woken = vkp_i_sleeper_sleep(&sleeper, cases, count);
            late = !woken && sleeper.deadline_ns == deadline_ns; /* one last attempt follows */
        }
        found = vkp_i_cases_attempt(cases, count, start, waits, joined, won);
        for (i = 0; i < joined; i++) {
            cases[i].i_kind->leave(&cases[i], &waits[i]);
        }
        vkp_i_sleeper_end(&sleeper);
    }
    return found ? VKP_OK : VKP_ERR_TIMEOUT;
}

/* vkp_i_select for at most two cases: gives the status of the case that won, TIMEOUT or SYS. */
static vkp_status vkp_i_select_few(vkp_case *cases, size_t count, const vkp_env *env,
                                   uint32_t spins, uint64_t deadline_ns)
{
    vkp_i_wait waits[2];
    size_t won;
    vkp_status status =
        vkp_i_select(cases, count, 0, waits, vkp_i_sys(env), spins, deadline_ns, &won);
    return status == VKP_OK ? cases[won].status : status;
}

/* Waiting for a thread that is between two instructions, and may have lost its processor there:
   pause, later yield, in the end sleep. Without the sleep, a waiting thread of a higher priority
   could keep the other thread from running.                                                    */
typedef struct vkp_i_backoff {
    uint32_t rounds; /* calls of vkp_i_back_off */
} vkp_i_backoff;

#define VKP_I_BACKOFF_PAUSES 64u /* rounds that pause */
#define VKP_I_BACKOFF_YIELDS 64u /* rounds after those that yield */
#define VKP_I_BACKOFF_NS 50000u  /* sleep of each later round */

static void vkp_i_back_off(vkp_i_backoff *backoff, const vkp_sys *sys)
{
    backoff->rounds++;
    if (backoff->rounds < VKP_I_BACKOFF_PAUSES) {
        VKP_I_PAUSE();
    } else if (backoff->rounds < VKP_I_BACKOFF_PAUSES + VKP_I_BACKOFF_YIELDS) {
        sys->yield();
    } else {
        vkp_parker parker;
        vkp_i_parker_init(&parker);
        sys->park(&parker, sys->clock_ns() + VKP_I_BACKOFF_NS);
        vkp_i_parker_deinit(&parker);
    }
}

/* A latch is a lock held for a few instructions: 0 free, 1 held. A thread that waits for it
   backs off; unlock wakes no thread. The exchange acquires what the store of unlock releases.  */
static inline void vkp_i_latch_lock(uint32_t *latch, const vkp_sys *sys)
{
    vkp_i_backoff backoff = {0};
    while (VKP_I_XCHG(latch, 1u) != 0) {
        do {
            vkp_i_back_off(&backoff, sys);
        } while (VKP_I_LOAD(latch) != 0);
    }
}

static inline void vkp_i_latch_unlock(uint32_t *latch)
{
    VKP_I_STORE_REL(latch, 0u);
}

/* Bias: work that nearly always ONE thread does belongs to that thread, its owner, which does it
   with plain stores. The first other thread revokes the bias permanently (vkp_i_biased_lock,
   vkp_i_lane_own), which costs one membarrier; where there is no membarrier, no thread is ever
   the owner. vkp_i_bias_enter stores `busy`, then loads `held`; vkp_i_bias_hold stores `held`,
   then, after a membarrier, loads `busy`: one of the two sees the other.                       */
typedef struct vkp_i_bias {
    uintptr_t owner; /* atomic: VKP_I_SELF of a thread, VKP_I_NOBODY or VKP_I_SHARED */
    uint32_t busy;   /* atomic: 1 while the owner is inside */
    uint32_t held;   /* atomic: 1 while the owner must stay outside */
} vkp_i_bias;

#define VKP_I_NOBODY ((uintptr_t)0) /* no thread has worked yet: the first one becomes the owner */
#define VKP_I_SHARED ((uintptr_t)1) /* no owner, permanently */

/* Enter as the owner; false while another thread holds the owner off, or after it was revoked. */
static inline bool vkp_i_bias_enter(vkp_i_bias *bias)
{
    VKP_I_STORE(&bias->busy, 1u);
    VKP_I_ORDER();
    if (VKP_I_LOAD_ACQ(&bias->held) == 0 && VKP_I_LOAD_ACQ(&bias->owner) == VKP_I_SELF()) {
        return true;
    }
    VKP_I_STORE_REL(&bias->busy, 0u);
    return false;
}

static inline void vkp_i_bias_exit(vkp_i_bias *bias)
{
    VKP_I_STORE_REL(&bias->busy, 0u);
}

/* Another thread, under the lock that guards the revocation: when this returns the owner is
   outside, and stays there until vkp_i_bias_release.                                           */
static void vkp_i_bias_hold(vkp_i_bias *bias, const vkp_env *env)
{
    vkp_i_backoff backoff = {0};
    VKP_I_STORE(&bias->held, 1u);
    vkp_i_flag_fence(env, false);
    while (VKP_I_LOAD_ACQ(&bias->busy) != 0) {
        vkp_i_back_off(&backoff, vkp_i_sys(env));
    }
}

static void vkp_i_bias_release(vkp_i_bias *bias)
{
    VKP_I_STORE_REL(&bias->held, 0u);
}

/* A latch that its owner takes without a read-modify-write. */
typedef struct vkp_i_biased_latch {
    vkp_i_bias bias; /* changed under `latch` */
    uint32_t latch;  /* atomic: 0 free, 1 held; taken by a thread that did not enter by its bias */
} vkp_i_biased_latch;

/* Lock. Gives whether the caller entered as the owner, which vkp_i_biased_unlock must be given. */
static inline bool vkp_i_biased_lock(vkp_i_biased_latch *self, const vkp_env *env)
{
    uintptr_t owner = VKP_I_LOAD_ACQ(&self->bias.owner);
    if (owner == VKP_I_SELF() && vkp_i_bias_enter(&self->bias)) {
        return true;
    }
    vkp_i_latch_lock(&self->latch, vkp_i_sys(env));
    owner = VKP_I_LOAD(&self->bias.owner);
    if (owner == VKP_I_NOBODY) {
        VKP_I_STORE_REL(&self->bias.owner, VKP_I_SELF()); /* the bias begins with the unlock */
    } else if (owner != VKP_I_SHARED && owner != VKP_I_SELF()) {
        vkp_i_bias_hold(&self->bias, env);
        VKP_I_STORE_REL(&self->bias.owner, VKP_I_SHARED);
        vkp_i_bias_release(&self->bias);
    }
    return false;
}

static inline void vkp_i_biased_unlock(vkp_i_biased_latch *self, bool biased)
{
    if (biased) {
        vkp_i_bias_exit(&self->bias);
    } else {
        vkp_i_latch_unlock(&self->latch);
    }
}

/* Prepare a zeroed latch; `fenced`: there is no membarrier, so the latch never has an owner. */
static void vkp_i_biased_init(vkp_i_biased_latch *self, bool fenced)
{
    self->bias.owner = fenced ? VKP_I_SHARED : VKP_I_NOBODY;
}

/* ======================================================================================
   >>impl-bytes   Immutable ref-counted blocks
   ======================================================================================
   A block is one allocation: header, then bytes. Bytes below `len` never change. The ONE holder of
   the right to append (the read block of a loop, the encoder of a hub, a writer) writes above
   `len` and hands out ranges of the written bytes (vkp_bytes). Ranges reach other threads through
   queues, which order those writes before the reads. No locks: the last unref frees the block. */

struct vkp_block {
    const vkp_env *env; /* its allocator frees the block */
    size_t refs;        /* atomic; 64 bits do not overflow */
    size_t capacity;    /* bytes behind the header */
    size_t len;         /* bytes in use; only the holder of the right to append changes it */
};

#define VKP_I_BLOCK_MAX 0xffffffffu /* most bytes of a block: offsets inside have 32 bits */
#define VKP_I_BLOCK_MIN 64u         /* fewest bytes of a block that vkp_i_block_reserve opens */

/* The bytes of the block, behind its header. */
static uint8_t *vkp_i_block_data(vkp_block *block)
{
    return (uint8_t *)(block + 1);
}

/* An empty block with one reference; NULL without memory, or above VKP_I_BLOCK_MAX. */
static vkp_block *vkp_i_block_open(const vkp_env *env, size_t capacity)
{
    vkp_block *block;
    if (capacity > VKP_I_BLOCK_MAX) {
        return NULL;
    }
    block = (vkp_block *)vkp_i_alloc(env, sizeof *block + capacity);
    if (block != NULL) {
        block->env = env;
        block->refs = 1;
        block->capacity = capacity;
        block->len = 0;
    }
    return block;
}

/* One more reference; NULL is ignored. */
static vkp_block *vkp_i_block_ref(vkp_block *block)
{
    if (block != NULL) {
        (void)VKP_I_ADD(&block->refs, 1);
    }
    return block;
}

/* One reference less; the last one frees the block. NULL is ignored. */
static void vkp_i_block_unref(vkp_block *block)
{
    if (block != NULL && VKP_I_UNREF(&block->refs) == 1) {
        vkp_i_free(block->env, block, sizeof *block + block->capacity);
    }
}

#if VKP_I_IO
/* Whether the reference of the caller is the only one, so that the bytes may be written again.
   The acquire pairs with the release in the unref of the other holders.                        */
static bool vkp_i_block_is_mine(const vkp_block *block)
{
    return VKP_I_LOAD_ACQ(&block->refs) == 1;
}

/* Make room for `more` bytes in an unshared block of the caller, by a move to a larger block
   (*block may be NULL). OK, NOMEM, or LIMIT above VKP_I_BLOCK_MAX.                             */
static vkp_status vkp_i_block_reserve(const vkp_env *env, vkp_block **block, size_t more)
{
    size_t used = *block != NULL ? (*block)->len : 0;
    size_t capacity = *block != NULL ? (*block)->capacity : 0;
    size_t wanted;
    vkp_block *grown;
    if (more <= capacity - used) {
        return VKP_OK;
    }
    if (more > VKP_I_BLOCK_MAX - used) {
        return VKP_ERR_LIMIT;
    }
    wanted = VKP_I_MAX(used + more, VKP_I_MIN(capacity * 2, (size_t)VKP_I_BLOCK_MAX));
    wanted = VKP_I_MAX(wanted, (size_t)VKP_I_BLOCK_MIN);
    grown = vkp_i_block_open(env, wanted);
    if (grown == NULL) {
        return VKP_ERR_NOMEM;
    }
    if (used > 0) {
        memcpy(vkp_i_block_data(grown), vkp_i_block_data(*block), used);
    }
    grown->len = used;
    vkp_i_block_unref(*block);
    *block = grown;
    return VKP_OK;
}
#endif

VKP_API vkp_status vkp_bytes_copy(const vkp_env *env, const void *data, size_t len, vkp_bytes *out)
{
    vkp_block *block;
    VKP_I_REQUIRE(out != NULL && (data != NULL || len == 0) && len <= VKP_I_BLOCK_MAX);
    block = vkp_i_block_open(vkp_i_env(env), len);
    if (block == NULL) {
        return VKP_ERR_NOMEM;
    }
    if (len > 0) {
        memcpy(vkp_i_block_data(block), data, len);
    }
    block->len = len;
    out->data = vkp_i_block_data(block);
    out->len = len;
    out->block = block;
    return VKP_OK;
}

VKP_API vkp_bytes vkp_bytes_static(const void *data, size_t len)
{
    vkp_bytes bytes;
    bytes.data = (const uint8_t *)data;
    bytes.len = len;
    bytes.block = NULL;
    return bytes;
}

VKP_API vkp_bytes vkp_bytes_ref(const vkp_bytes *bytes)
{
    (void)vkp_i_block_ref(bytes->block);
    return *bytes;
}

VKP_API vkp_bytes vkp_bytes_slice(const vkp_bytes *bytes, size_t offset, size_t len)
{
    vkp_bytes slice = vkp_bytes_ref(bytes);
    offset = VKP_I_MIN(offset, bytes->len);
    slice.data = bytes->data != NULL ? bytes->data + offset : NULL;
    slice.len = VKP_I_MIN(len, bytes->len - offset);
    return slice;
}

VKP_API void vkp_bytes_unref(vkp_bytes *bytes)
{
    if (bytes != NULL) {
        vkp_i_block_unref(bytes->block);
        *bytes = vkp_bytes_static(NULL, 0);
    }
}

#if VKP_I_IO
/* ======================================================================================
   >>impl-map   Names to objects, for sockets, hubs and clients
   ======================================================================================
   A hash table with chains, which doubles; its nodes are members of the objects of the owner.
   Names may come from hostile clients: the hash is keyed (SipHash-1-3 of Aumasson and Bernstein),
   with a random key for each map. The owner of a map has its lock.
   Threads without that lock may walk a shared map, if the memory of its nodes is never freed
   meanwhile: links are stored in one piece (their release pairs with the acquire of the walk), and
   old tables are kept. Such a walk may miss a node or stray into another chain: check a node that
   it finds, and search again under the lock when it finds none.                                */

typedef struct vkp_i_map_node {
    struct vkp_i_map_node *next; /* of the chain; atomic in a shared map */
    uint64_t hash;               /* of the key; atomic in a shared map */
    vkp_str key;                 /* borrowed from the owner of the node */
} vkp_i_map_node;

typedef struct vkp_i_buckets {
    struct vkp_i_buckets *older; /* in a shared map: the table before this one, kept */
    size_t count;                /* buckets, a power of two; they follow this struct */
} vkp_i_buckets;

typedef struct vkp_i_map {
    const vkp_env *env;
    vkp_i_buckets *buckets; /* atomic: the table; NULL before the first insert */
    size_t count;           /* nodes */
    bool shared;            /* threads without the lock of the owner walk the map */
    uint64_t key[2];        /* of the hash, random */
} vkp_i_map;

#define VKP_I_MAP_FIRST 16u /* buckets of the first table, a power of two */

#define VKP_I_ROTL(x, b) (((x) << (b)) | ((x) >> (64 - (b))))
#define VKP_I_SIP_ROUND(v)               \
    do {                                 \
        (v)[0] += (v)[1];                \
        (v)[1] = VKP_I_ROTL((v)[1], 13); \
        (v)[1] ^= (v)[0];                \
        (v)[0] = VKP_I_ROTL((v)[0], 32); \
        (v)[2] += (v)[3];                \
        (v)[3] = VKP_I_ROTL((v)[3], 16); \
        (v)[3] ^= (v)[2];                \
        (v)[0] += (v)[3];                \
        (v)[3] = VKP_I_ROTL((v)[3], 21); \
        (v)[3] ^= (v)[0];                \
        (v)[2] += (v)[1];                \
        (v)[1] = VKP_I_ROTL((v)[1], 17); \
        (v)[1] ^= (v)[2];                \
        (v)[2] = VKP_I_ROTL((v)[2], 32); \
    } while (0)

/* SipHash-1-3 of the text: one round for each 8 bytes, three at the end. The four initial words
   are those of SipHash: "somepseudorandomlygeneratedbytes".                                    */
static uint64_t vkp_i_map_hash(const vkp_i_map *map, vkp_str text)
{
    uint64_t v[4];
    uint64_t word;
    unsigned shift;
    size_t i;
    v[0] = map->key[0] ^ 0x736f6d6570736575u;
    v[1] = map->key[1] ^ 0x646f72616e646f6du;
    v[2] = map->key[0] ^ 0x6c7967656e657261u;
    v[3] = map->key[1] ^ 0x7465646279746573u;
    for (i = 0; i + 8 <= text.len; i += 8) {
        word = vkp_i_load64(text.ptr + i);
        v[3] ^= word;
        VKP_I_SIP_ROUND(v);
        v[0] ^= word;
    }
    word = (uint64_t)text.len << 56;
    for (shift = 0; i < text.len; i++, shift += 8) { /* at most 7 bytes: memcpy costs more */
        word |= (uint64_t)(unsigned char)text.ptr[i] << shift;
    }
    v[3] ^= word;
    VKP_I_SIP_ROUND(v);
    v[0] ^= word;
    v[2] ^= 0xff;
    VKP_I_SIP_ROUND(v);
    VKP_I_SIP_ROUND(v);
    VKP_I_SIP_ROUND(v);
    return v[0] ^ v[1] ^ v[2] ^ v[3];
}

static void vkp_i_map_init(vkp_i_map *map, const vkp_env *env)
{
    const vkp_sys *sys = vkp_i_sys(env);
    memset(map, 0, sizeof *map);
    map->env = env;
    map->key[0] = sys->random_u64();
    map->key[1] = sys->random_u64();
}

/* The head of the chain for the hash. */
static vkp_i_map_node **vkp_i_map_bucket(vkp_i_buckets *buckets, uint64_t hash)
{
    return (vkp_i_map_node **)(void *)(buckets + 1) + (hash & (buckets->count - 1));
}

static void vkp_i_buckets_free(const vkp_env *env, vkp_i_buckets *buckets)
{
    vkp_i_free(env, buckets, sizeof *buckets + buckets->count * sizeof(vkp_i_map_node *));
}

/* Free all tables; the nodes stay the property of their owners. */
static void vkp_i_map_deinit(vkp_i_map *map)
{
    while (map->buckets != NULL) {
        vkp_i_buckets *older = map->buckets->older;
        vkp_i_buckets_free(map->env, map->buckets);
        map->buckets = older;
    }
}

static vkp_i_map_node *vkp_i_map_find(const vkp_i_map *map, uint64_t hash, vkp_str key)
{
    vkp_i_map_node *node = map->buckets != NULL ? *vkp_i_map_bucket(map->buckets, hash) : NULL;
    while (node != NULL && (node->hash != hash || !vkp_i_str_equal(node->key, key))) {
        node = node->next;
    }
    return node;
}

/* Make the node the first of its chain; a walk sees it only after its own link is stored. */
static void vkp_i_map_link(vkp_i_buckets *buckets, vkp_i_map_node *node)
{
    vkp_i_map_node **bucket = vkp_i_map_bucket(buckets, node->hash);
    VKP_I_STORE_REL(&node->next, *bucket);
    VKP_I_STORE_REL(bucket, node);
}

/* Move all nodes to a new table. The old table is kept in a shared map, else freed. False
   without memory: the map is unchanged.                                                        */
static bool vkp_i_map_resize(vkp_i_map *map, size_t bucket_count)
{
    vkp_i_buckets *older = map->buckets;
    vkp_i_buckets *buckets = (vkp_i_buckets *)vkp_i_alloc_zero(
        map->env, sizeof *buckets + bucket_count * sizeof(vkp_i_map_node *));
    size_t i;
    if (buckets == NULL) {
        return false;
    }
    buckets->count = bucket_count;
    for (i = 0; older != NULL && i < older->count; i++) {
        vkp_i_map_node *node = *vkp_i_map_bucket(older, i);
        while (node != NULL) {
            vkp_i_map_node *next = node->next;
            vkp_i_map_link(buckets, node);
            node = next;
        }
    }
    if (older != NULL && map->shared) {
        buckets->older = older;
    } else if (older != NULL) {
        vkp_i_buckets_free(map->env, older);
    }
    VKP_I_STORE_REL(&map->buckets, buckets);
    return true;
}

/* Insert a node whose hash and key are set. False when there is no memory for the first table; a
   map that cannot double becomes slower, not wrong.                                            */
static bool vkp_i_map_insert(vkp_i_map *map, vkp_i_map_node *node)
{
    size_t room = map->buckets != NULL ? map->buckets->count : 0;
    if (map->count >= room && !vkp_i_map_resize(map, room == 0 ? VKP_I_MAP_FIRST : room * 2) &&
        room == 0) {
        return false;
    }
    vkp_i_map_link(map->buckets, node);
    map->count++;
    return true;
}

/* Remove a node that is in the map. */
static void vkp_i_map_remove(vkp_i_map *map, vkp_i_map_node *node)
{
    vkp_i_map_node **link = vkp_i_map_bucket(map->buckets, node->hash);
    while (*link != node) {
        link = &(*link)->next;
    }
    VKP_I_STORE_REL(link, node->next);
    map->count--;
}

/* The next node of a walk; NULL begins the walk, and ends it. Of all nodes, only the node
   returned last may be removed during the walk.                                                */
static vkp_i_map_node *vkp_i_map_get_next(const vkp_i_map *map, const vkp_i_map_node *node)
{
    size_t count = map->buckets != NULL ? map->buckets->count : 0;
    size_t bucket = 0;
    vkp_i_map_node *found = NULL;
    if (node != NULL) {
        if (node->next != NULL) {
            return node->next;
        }
        bucket = (size_t)(node->hash & (count - 1)) + 1;
    }
    for (; bucket < count && found == NULL; bucket++) {
        found = *vkp_i_map_bucket(map->buckets, bucket);
    }
    return found;
}

#endif /* VKP_I_IO */

/* ======================================================================================
   >>impl-cancel   Cancellation tokens
   ======================================================================================
   The tokens of a tree share one lock, so that a walk through the tree needs no lock order. The
   lock is opened with the root and freed with the last token of the tree. A child holds a
   reference to its parent; the list of children in the parent is weak. `triggered` is written
   under the lock (release) and read without it (acquire). vkp_cancel_trigger wakes the waiters of
   the token and of its descendants under the lock. Lock order: the lock of the tree, then the lock
   that wake takes (section park).                                                              */

/* What all tokens of a tree share. */
typedef struct vkp_i_cancel_tree {
    VKP_I_MUTEX mutex; /* guards the links and the waiters of all tokens of the tree */
    size_t refs;       /* atomic: one for each token */
} vkp_i_cancel_tree;

struct vkp_cancel {
    const vkp_env *env; /* the same in the whole tree */
    vkp_i_cancel_tree *tree;
    vkp_cancel *parent;       /* a reference; NULL in the root */
    vkp_cancel *first_child;  /* weak; under tree->mutex */
    vkp_cancel *prev_sibling; /* weak; under tree->mutex */
    vkp_cancel *next_sibling; /* weak; under tree->mutex */
    size_t refs;              /* atomic */
    uint32_t triggered;       /* atomic: 1 once cancelled; stored under tree->mutex */
    vkp_i_waiters waiters;    /* under tree->mutex */
};

VKP_API vkp_status vkp_cancel_open(const vkp_env *env, vkp_cancel *parent, vkp_cancel **token)
{
    vkp_cancel *self;
    VKP_I_REQUIRE(token != NULL);
    /* All tokens of a tree have one env: the last token, any of them, frees the lock. */
    env = parent != NULL ? parent->env : vkp_i_env(env);
    self = (vkp_cancel *)vkp_i_alloc_zero(env, sizeof *self);
    if (self == NULL) {
        return VKP_ERR_NOMEM;
    }
    if (parent == NULL) {
        self->tree = (vkp_i_cancel_tree *)vkp_i_alloc_zero(env, sizeof *self->tree);
        if (self->tree == NULL) {
            vkp_i_free(env, self, sizeof *self);
            return VKP_ERR_NOMEM;
        }
        VKP_I_MUTEX_INIT(&self->tree->mutex);
    } else {
        self->tree = parent->tree;
        self->parent = vkp_cancel_ref(parent);
    }
    self->env = env;
    self->refs = 1;
    vkp_i_waiters_init(&self->waiters);
    VKP_I_LOCK(&self->tree->mutex);
    (void)VKP_I_ADD(&self->tree->refs, 1);
    if (parent != NULL) {
        self->next_sibling = parent->first_child;
        if (parent->first_child != NULL) {
            parent->first_child->prev_sibling = self;
        }
        parent->first_child = self;
        self->triggered = VKP_I_LOAD(&parent->triggered);
    }
    VKP_I_UNLOCK(&self->tree->mutex);
    *token = self;
    return VKP_OK;
}

VKP_API vkp_cancel *vkp_cancel_ref(vkp_cancel *token)
{
    (void)VKP_I_ADD(&token->refs, 1);
    return token;
}

/* Remove a token without references from the list of its parent. */
static void vkp_i_cancel_unlink(vkp_cancel *token)
{
    VKP_I_LOCK(&token->tree->mutex);
    if (token->prev_sibling != NULL) {
        token->prev_sibling->next_sibling = token->next_sibling;
    } else if (token->parent != NULL) {
        token->parent->first_child = token->next_sibling;
    }
    if (token->next_sibling != NULL) {
        token->next_sibling->prev_sibling = token->prev_sibling;
    }
    VKP_I_UNLOCK(&token->tree->mutex);
}

VKP_API void vkp_cancel_unref(vkp_cancel *token)
{
    while (token != NULL && VKP_I_UNREF(&token->refs) == 1) {
        vkp_cancel *parent = token->parent;
        vkp_i_cancel_tree *tree = token->tree;
        vkp_i_cancel_unlink(token);
        if (VKP_I_UNREF(&tree->refs) == 1) {
            VKP_I_MUTEX_DEINIT(&tree->mutex);
            vkp_i_free(token->env, tree, sizeof *tree);
        }
        vkp_i_free(token->env, token, sizeof *token);
        token = parent;
    }
}

/* Locked: the next token of the subtree under `top`, parents before children; NULL at the end. */
static vkp_cancel *vkp_i_cancel_next(vkp_cancel *token, vkp_cancel *top)
{
    if (token->first_child != NULL) {
        return token->first_child;
    }
    while (token != top && token->next_sibling == NULL) {
        token = token->parent;
    }
    return token == top ? NULL : token->next_sibling;
}

VKP_API void vkp_cancel_trigger(vkp_cancel *token)
{
    vkp_cancel *each = token;
    VKP_I_LOCK(&token->tree->mutex);
    while (each != NULL) {
        VKP_I_STORE_REL(&each->triggered, 1u);
        vkp_i_waiters_wake_all(&each->waiters);
        each = vkp_i_cancel_next(each, token);
    }
    VKP_I_UNLOCK(&token->tree->mutex);
}

VKP_API bool vkp_cancel_is_triggered(const vkp_cancel *token)
{
    return VKP_I_LOAD_ACQ(&token->triggered) != 0;
}

/* Link the waiter; false, and not linked, when the token is cancelled already. */
static bool vkp_i_cancel_join(vkp_cancel *token, vkp_i_waiter *waiter)
{
    bool triggered;
    VKP_I_LOCK(&token->tree->mutex);
    triggered = VKP_I_LOAD(&token->triggered) != 0;
    if (!triggered) {
        vkp_i_waiter_link(&token->waiters, waiter);
    }
    VKP_I_UNLOCK(&token->tree->mutex);
    return !triggered;
}

/* Unlink the waiter if it is linked; no wake of it runs when this returns. */
static void vkp_i_cancel_leave(vkp_cancel *token, vkp_i_waiter *waiter)
{
    VKP_I_LOCK(&token->tree->mutex);
    (void)vkp_i_waiter_unlink(waiter);
    VKP_I_UNLOCK(&token->tree->mutex);
}

static vkp_status vkp_i_case_cancel_attempt(vkp_case *each, vkp_i_wait *wait)
{
    (void)wait;
    return vkp_cancel_is_triggered((vkp_cancel *)each->i_object) ? VKP_OK : VKP_ERR_EMPTY;
}

static bool vkp_i_case_cancel_is_ready(const vkp_case *each)
{
    return vkp_cancel_is_triggered((vkp_cancel *)each->i_object);
}

static bool vkp_i_case_cancel_join(const vkp_case *each, vkp_i_wait *wait)
{
    return vkp_i_cancel_join((vkp_cancel *)each->i_object, &wait->node);
}

static void vkp_i_case_cancel_leave(const vkp_case *each, vkp_i_wait *wait)
{
    vkp_i_cancel_leave((vkp_cancel *)each->i_object, &wait->node);
}

static const vkp_env *vkp_i_case_cancel_env(const vkp_case *each)
{
    return ((vkp_cancel *)each->i_object)->env;
}

static const vkp_i_case_kind vkp_i_case_kind_cancel = {
    vkp_i_case_cancel_attempt, vkp_i_case_cancel_is_ready, vkp_i_case_cancel_join,
    vkp_i_case_cancel_leave, vkp_i_case_cancel_env};

VKP_API vkp_case vkp_case_cancel(vkp_cancel *token)
{
    return token != NULL ? vkp_i_case(&vkp_i_case_kind_cancel, token, NULL) : vkp_case_never();
}

VKP_API vkp_status vkp_cancel_wait(vkp_cancel *token, uint64_t deadline_ns)
{
    vkp_case cancelled;
    VKP_I_REQUIRE(token != NULL);
    cancelled = vkp_case_cancel(token);
    return vkp_i_select_few(&cancelled, 1, token->env, 0, deadline_ns);
}

/* ======================================================================================
   >>impl-mpsc   Many senders, one receiver
   ======================================================================================
   A queue is a lane. Tickets count its places since the beginning: `tail` is the next ticket to
   give, `head` the next ticket to receive. The place of a ticket, in a ring, has a stamp, which
   says for which ticket its value is ready, and the value. A sender takes a ticket with one
   exchange, writes the value and stores the stamp (release); the receiver loads the stamp
   (acquire), reads the value and stores `head` (release), all without an exchange.
   The lowest bit of `tail`, SLOW, sends every sender through the mutex: while a ring is replaced,
   while senders wait, when bytes are counted, after close. SLOW is set first (vkp_i_lane_freeze),
   the fields that the fast path reads change afterwards; a fast sender that read the old state
   then fails its exchange. Under the mutex everything can be done: the fast path is a short cut.
   A ring that is too small gets a successor, which begins at the ticket of the sender that needed
   it. The old ring ends at that ticket, and the receiver frees it when `head` arrives there.
   A waiting sender is linked in `senders`; the side that makes room moves its value in, in order
   of arrival. Senders find a receiver that sleeps or is gone by the flag `flags`; the receiver
   finds waiting senders by the flag `tx_waiting` (flags: section park).
   Lock order: the mutex, and under it only the lock that wake takes.                           */

#define VKP_I_TAIL_SLOW 1u     /* in vkp_i_lane.tail: senders take the mutex */
#define VKP_I_TAIL_TICKET 2u   /* in vkp_i_lane.tail: one ticket */
#define VKP_I_RX_WAITING 1u    /* in vkp_i_channel.flags: the receiver waits */
#define VKP_I_RX_GONE 2u       /* in vkp_i_channel.flags: the receiver gave its handle back */
#define VKP_I_ENDED_CLOSED 1u  /* in vkp_i_channel.ended: the receiver closed */
#define VKP_I_ENDED_SENDERS 2u /* in vkp_i_channel.ended: no sender is left */
#define VKP_I_STAMP_ABORTED 1u /* in a stamp: the place has no value */
#define VKP_I_STAMP_BYTES 8u   /* room of a stamp in front of its value, which is aligned to 8 */
#define VKP_I_LINE_BYTES 64u   /* a cache line */
#define VKP_I_PLACE_MIN 16u    /* fewest bytes of a place with stamp and value */
#define VKP_I_RING_FIRST 16u   /* most places of the first ring */
#define VKP_I_RING_FIRST_MOST 4096u /* most bytes of values in the first ring */
#define VKP_I_RING_KEEP 65536u      /* bytes of a ring that an empty lane keeps */

/* Most bytes of a value that lies beside its stamp. */
#define VKP_I_BESIDE_MAX (VKP_I_LINE_BYTES - VKP_I_STAMP_BYTES)

/* Most places of a ring: a stamp has 31 bits of its ticket. */
#define VKP_I_RING_PLACES_MAX (UINT32_MAX / 4)

#define VKP_I_BUNCH 16u     /* values that the receiver takes between two stores of head */
#define VKP_I_LANE_TURN 64u /* values that the receiver takes from one lane before the next lane */
#define VKP_I_HYSTERESIS 4u /* a spinning sender tries again when 1 / this of a lane is free */
#define VKP_I_LINGER_BURST 64u  /* values of a burst that needs no linger */
#define VKP_I_LINGER_PAUSES 32u /* most pauses of a linger */
#define VKP_I_LINGER_SHARE 4u   /* most pauses of a linger: room / this, so that no lane fills */

typedef struct vkp_i_channel vkp_i_channel;

typedef struct vkp_i_ring {
    struct vkp_i_ring *next; /* the successor, once `end` is set; the next ring of `retired` */
    uint64_t end;            /* atomic: first ticket of the successor; UINT64_MAX without one */
    size_t bytes;            /* of this allocation */
    uint64_t mask;           /* number of places - 1; the number is a power of two */
    size_t elem_bytes;       /* of one value */
    size_t stride;           /* bytes from one value to the next */
    size_t stamp_stride;     /* bytes from one stamp to the next; `stride` for small values */
    uint8_t *stamps;         /* the stamp of place 0 */
    uint8_t *items;          /* the value of place 0; small values lie beside their stamps */
} vkp_i_ring;

/* One queue: of all senders of a channel, or of one sender of a channel with lanes. */
typedef struct vkp_i_lane {
    vkp_i_channel *channel;
    struct vkp_i_lane *next; /* atomic: the next lane of the channel; written under the mutex */
    uint32_t dead;           /* atomic: 1 when its sender is gone; the receiver frees the lane */
    unsigned char pad_senders[VKP_I_APART]; /* senders write the fields below */
    uint64_t tail;                          /* atomic: next ticket << 1, and VKP_I_TAIL_SLOW */
    uint64_t head_seen;                     /* atomic: `head` as a sender loaded it last */
    uint64_t room;    /* atomic: tickets above `head` that senders may take in this ring */
    vkp_i_ring *ring; /* atomic: the ring of `tail`; NULL: none yet, or freed when empty */
    vkp_i_bias bias;  /* of the one thread that sends, while only one does */
    unsigned char pad_receiver[VKP_I_APART]; /* the receiver writes the fields below */
    uint64_t head;                           /* atomic: next ticket to receive */
    vkp_i_ring *rx_ring;                     /* atomic: the ring of `head` */
    uint64_t taken_cost;                     /* atomic: cost of all values received, in bytes */
    uint64_t lingered;   /* `head` when the receiver found nothing the last time */
    uint32_t tx_waiting; /* flag: 1 while `senders` is not empty */
    bool plain; /* no counted bytes, no eviction, not fenced: vkp_i_lane_recv_fast may run */
    unsigned char pad_slow[VKP_I_APART]; /* the mutex guards the fields below */
    uint64_t sent_cost;                  /* under the mutex: cost of all values sent, in bytes */
    vkp_i_waiters senders;               /* under the mutex: waiting senders, oldest first */
} vkp_i_lane;

struct vkp_mpsc_tx {
    vkp_i_lane *lane;
    size_t refs; /* atomic */
};

/* A sender with a lane of its own: a clone, see vkp_mpsc_config.lanes. */
typedef struct vkp_i_extra_lane {
    vkp_mpsc_tx tx;
    vkp_i_lane lane;
} vkp_i_extra_lane;

struct vkp_mpsc_rx {
    vkp_i_channel *channel;
};

struct vkp_mpsc_weak {
    vkp_i_channel *channel;
    size_t refs; /* atomic; each weak sender also holds one of vkp_i_channel.refs */
};

struct vkp_i_channel {
    vkp_mpsc_config config; /* a copy; config.env is not NULL */
    uint64_t capacity;      /* most values of one lane; UINT64_MAX when unbounded */
    vkp_mpsc_tx tx;         /* the sender of the first lane */
    vkp_mpsc_rx rx;         /* the receiver */
    vkp_mpsc_weak weak;     /* all weak senders */
    size_t refs;            /* atomic: one of all senders together, the receiver, weak senders */
    size_t handles;         /* atomic: senders; all references to one sender count once */
    uint32_t flags;         /* flag: VKP_I_RX_WAITING, VKP_I_RX_GONE */
    uint32_t ended;         /* atomic: VKP_I_ENDED_CLOSED, VKP_I_ENDED_SENDERS; never cleared */
    uint32_t spins;         /* pauses before a thread sleeps */
    bool fenced;            /* there is no membarrier: flags and biases do without */
    bool evicts;            /* senders may take the oldest value: receiving takes the mutex, too */
    VKP_I_MUTEX mutex;      /* guards the lists of waiters and the slow path of all lanes */
    vkp_i_waiters receiver; /* under the mutex: the waiting receiver */
    vkp_i_waiters closers;  /* under the mutex: waits for the close of the receiver */
    vkp_i_ring *retired;    /* under the mutex: rings that ended after the receiver was gone */
    size_t dead_lanes;      /* atomic: lanes that the receiver has to free */
    vkp_i_lane *rx_lane;    /* the receiver's: the lane of its last value */
    vkp_i_lane lane;        /* the first lane */
};

/* ---- rings ---- */

static uint32_t *vkp_i_ring_stamp(const vkp_i_ring *ring, uint64_t ticket)
{
    return (uint32_t *)(void *)(ring->stamps + (size_t)(ticket & ring->mask) * ring->stamp_stride);
}

static uint8_t *vkp_i_ring_item(const vkp_i_ring *ring, uint64_t ticket)
{
    return ring->items + (size_t)(ticket & ring->mask) * ring->stride;
}

/* The stamp of a place whose value is ready for the ticket; its lowest bit is for
   VKP_I_STAMP_ABORTED.                                                                         */
static uint32_t vkp_i_stamp(uint64_t ticket)
{
    return (uint32_t)((ticket + 1) << 1);
}

/* A ring with `slots` places, a power of two, from ticket `start` on; NULL without memory. A
   value up to VKP_I_BESIDE_MAX lies behind its stamp, in the same cache line; larger values have
   an array of their own, so that a value of one line does not touch two.                       */
static vkp_i_ring *vkp_i_ring_open(const vkp_env *env, size_t elem_bytes, size_t slots,
                                   uint64_t start)
{
    size_t stride;
    size_t stamp_stride = sizeof(uint32_t);
    size_t bytes;
    vkp_i_ring *ring;
    uint64_t i;
    if (elem_bytes <= VKP_I_BESIDE_MAX) {
        for (stride = VKP_I_PLACE_MIN; stride < elem_bytes + VKP_I_STAMP_BYTES; stride *= 2) {
        }
        stamp_stride = stride;
    } else {
        stride = (elem_bytes + 7u) & ~(size_t)7u;
    }
    if (slots > (SIZE_MAX - sizeof *ring - 2 * VKP_I_LINE_BYTES) / (stride + stamp_stride)) {
        return NULL;
    }
    bytes = sizeof *ring + 2 * VKP_I_LINE_BYTES +
            slots * (stride + (stamp_stride == stride ? 0 : stamp_stride));
    ring = (vkp_i_ring *)vkp_i_alloc(env, bytes);
    if (ring == NULL) {
        return NULL;
    }
    ring->next = NULL;
    ring->end = UINT64_MAX;
    ring->bytes = bytes;
    ring->mask = slots - 1;
    ring->elem_bytes = elem_bytes;
    ring->stride = stride;
    ring->stamp_stride = stamp_stride;
    ring->stamps = (uint8_t *)(((uintptr_t)(ring + 1) + VKP_I_LINE_BYTES - 1u) &
                               ~(uintptr_t)(VKP_I_LINE_BYTES - 1u));
    if (elem_bytes <= VKP_I_BESIDE_MAX) {
        ring->items = ring->stamps + (stride - ((elem_bytes + 7u) & ~(size_t)7u));
    } else {
        uintptr_t behind = (uintptr_t)(ring->stamps + slots * stamp_stride);
        ring->items =
            (uint8_t *)((behind + VKP_I_LINE_BYTES - 1u) & ~(uintptr_t)(VKP_I_LINE_BYTES - 1u));
    }
    for (i = 0; i < slots; i++) { /* the stamp of ticket start - 1 */
        *vkp_i_ring_stamp(ring, i) = (uint32_t)(start << 1);
    }
    return ring;
}

static void vkp_i_ring_close(const vkp_env *env, vkp_i_ring *ring)
{
    if (ring != NULL) {
        vkp_i_free(env, ring, ring->bytes);
    }
}

/* ---- both sides ---- */

/* The cost of a value, in bytes. */
static size_t vkp_i_channel_cost(const vkp_i_channel *channel, const void *item)
{
    return channel->config.cost != NULL ? channel->config.cost(item) : channel->config.elem_bytes;
}

/* Tickets from `head` up to `ticket`; 0 when `ticket` is out of date, and so below `head`. */
static uint64_t vkp_i_used(uint64_t ticket, uint64_t head)
{
    return (int64_t)(ticket - head) > 0 ? ticket - head : 0;
}

/* The oldest value where it lies, or NULL. Passes aborted places, and rings that have ended,
   which it frees. Receiver's thread; under the mutex when `evicts` or when the receiver is gone. */
static inline uint8_t *vkp_i_lane_oldest(vkp_i_lane *lane)
{
    for (;;) {
        uint64_t head = VKP_I_LOAD(&lane->head);
        vkp_i_ring *ring = VKP_I_LOAD_ACQ(&lane->rx_ring);
        uint32_t stamp;
        if (ring == NULL) {
            return NULL;
        }
        stamp = VKP_I_LOAD_ACQ(vkp_i_ring_stamp(ring, head));
        if (stamp == vkp_i_stamp(head)) {
            return vkp_i_ring_item(ring, head);
        }
        if (stamp == (vkp_i_stamp(head) | VKP_I_STAMP_ABORTED)) {
            VKP_I_STORE_REL(&lane->head, head + 1);
        } else if (VKP_I_LOAD_ACQ(&ring->end) == head) {
            vkp_i_channel *channel = lane->channel;
            VKP_I_STORE(&lane->rx_ring, ring->next);
            if ((VKP_I_LOAD(&channel->flags) & VKP_I_RX_GONE) != 0) {
                ring->next = channel->retired; /* a drop may still use a value of the ring */
                channel->retired = ring;
            } else {
                vkp_i_ring_close(channel->config.env, ring);
            }
        } else {
            return NULL;
        }
    }
}

/* The oldest value was taken: its place is free. The caller lets waiting senders in
   (vkp_i_lane_freed).                                                                          */
static inline void vkp_i_lane_pop(vkp_i_lane *lane, const uint8_t *item)
{
    if (lane->channel->config.capacity_bytes != 0) {
        size_t cost = vkp_i_channel_cost(lane->channel, item);
        VKP_I_STORE_REL(&lane->taken_cost, VKP_I_LOAD(&lane->taken_cost) + cost);
    }
    VKP_I_STORE_REL(&lane->head, VKP_I_LOAD(&lane->head) + 1);
}

/* The next lane; after the last lane the first one. */
static vkp_i_lane *vkp_i_lane_after(const vkp_i_lane *lane)
{
    vkp_i_lane *next = VKP_I_LOAD_ACQ(&lane->next);
    return next != NULL ? next : &lane->channel->lane;
}

/* The lane of the next value of the receiver, or NULL: its last lane while that has values, else
   the next lane with a value.                                                                  */
static vkp_i_lane *vkp_i_channel_find(vkp_i_channel *channel)
{
    vkp_i_lane *first = channel->rx_lane;
    vkp_i_lane *lane = first;
    do {
        if (vkp_i_lane_oldest(lane) != NULL) {
            channel->rx_lane = lane;
            return lane;
        }
        lane = vkp_i_lane_after(lane);
    } while (lane != first);
    return NULL;
}

/* Locked: wake the receiver if it waits. */
static void vkp_i_channel_wake_receiver(vkp_i_channel *channel)
{
    if (!vkp_i_waiters_empty(&channel->receiver)) {
        vkp_i_flag_lower(&channel->flags, VKP_I_RX_WAITING);
        vkp_i_waiters_wake_all(&channel->receiver);
    }
}

/* Drop all queued values. Each is taken under the mutex, and dropped without it. */
static void vkp_i_channel_purge(vkp_i_channel *channel)
{
    for (;;) {
        vkp_i_lane *lane;
        uint8_t *item;
        VKP_I_LOCK(&channel->mutex);
        lane = vkp_i_channel_find(channel);
        item = lane != NULL ? vkp_i_lane_oldest(lane) : NULL;
        if (item != NULL) {
            vkp_i_lane_pop(lane, item);
        }
        VKP_I_UNLOCK(&channel->mutex);
        if (item == NULL) {
            return;
        }
        if (channel->config.drop != NULL) {
            channel->config.drop(channel->config.user, item);
        }
    }
}

/* A sender found `flags` raised: wake the waiting receiver, or, when the receiver is gone, drop
   the values that no receiver will take.                                                       */
static void vkp_i_channel_signal(vkp_i_channel *channel)
{
    VKP_I_LOCK(&channel->mutex);
    vkp_i_channel_wake_receiver(channel);
    VKP_I_UNLOCK(&channel->mutex);
    if ((VKP_I_LOAD(&channel->flags) & VKP_I_RX_GONE) != 0) {
        vkp_i_channel_purge(channel);
    }
}

/* ======================================================================================
   >>impl-mpsc-send   mpsc: the senders' side
   ======================================================================================
   A sender takes the first of these ways that is open: the fast path (vkp_i_lane_send_fast,
   vkp_i_lane_claim) without the mutex; the slow path (vkp_i_lane_send_locked) under the mutex,
   with SLOW set; a wait in `senders` (vkp_i_lane_join), which vkp_i_lane_admit ends.
   While a lane is frozen only the holder of the mutex changes `tail`, `ring`, `room` and
   `sent_cost`; vkp_i_lane_thaw ends that and publishes these changes with the release of `tail`.
   A lane belongs to the one thread that sends (bias): that thread stores `tail` plainly, between
   vkp_i_lane_enter and vkp_i_bias_exit, and vkp_i_lane_freeze keeps it out before SLOW is set.
   A sender wakes the receiver after it stored a stamp: fast path by the flag `flags`, slow path
   under the mutex. The release of `head` pairs with the acquire loads of `head` and `head_seen`
   here: a place is written again only after its value was read.                                */

/* Enter the fast path as the owner of the lane; false while the owner is held off, or when the
   lane has changed since `tail` was loaded as `word`.                                          */
static inline bool vkp_i_lane_enter(vkp_i_lane *lane, uint64_t word)
{
    if (!vkp_i_bias_enter(&lane->bias)) {
        return false;
    }
    /* The owner is checked last: `tail` may be unchanged although the lane became shared. */
    if (VKP_I_LOAD_ACQ(&lane->tail) == word && VKP_I_LOAD(&lane->bias.owner) == VKP_I_SELF()) {
        return true;
    }
    vkp_i_bias_exit(&lane->bias);
    return false;
}

/* Take up to `count` tickets without the mutex: OK with the first ticket, its ring and their
   number. FULL is certain; EMPTY: the caller must take the mutex.                              */
static vkp_status vkp_i_lane_claim(vkp_i_lane *lane, uint64_t count, uint64_t *ticket,
                                   vkp_i_ring **ring, uint64_t *taken)
{
    uint64_t word = VKP_I_LOAD_ACQ(&lane->tail);
    for (;;) {
        uint64_t room = VKP_I_LOAD_ACQ(&lane->room);
        uint64_t used = vkp_i_used(word >> 1, VKP_I_LOAD_ACQ(&lane->head_seen));
        uintptr_t owner = VKP_I_LOAD_ACQ(&lane->bias.owner);
        *ring = VKP_I_LOAD_ACQ(&lane->ring);
        if ((word & VKP_I_TAIL_SLOW) != 0 || (owner != VKP_I_SHARED && owner != VKP_I_SELF())) {
            return VKP_ERR_EMPTY;
        }
        if (used >= room) {
            uint64_t head = VKP_I_LOAD_ACQ(&lane->head);
            VKP_I_STORE_REL(&lane->head_seen, head);
            used = vkp_i_used(word >> 1, head);
            if (used >= room) {
                return room == lane->channel->capacity ? VKP_ERR_FULL : VKP_ERR_EMPTY;
            }
        }
        *taken = VKP_I_MIN(count, room - used);
        *ticket = word >> 1;
        if (owner != VKP_I_SHARED) {
            if (!vkp_i_lane_enter(lane, word)) {
                return VKP_ERR_EMPTY;
            }
            VKP_I_STORE(&lane->tail, word + VKP_I_TAIL_TICKET * *taken);
            vkp_i_bias_exit(&lane->bias);
            return VKP_OK;
        }
        if (VKP_I_CAS(&lane->tail, &word, word + VKP_I_TAIL_TICKET * *taken)) {
            return VKP_OK;
        }
    }
}

/* The place of the ticket is written: store its stamp (`outcome` is 0 or VKP_I_STAMP_ABORTED),
   and wake the receiver if it waits.                                                           */
static inline void vkp_i_lane_publish(vkp_i_lane *lane, vkp_i_ring *ring, uint64_t ticket,
                                      uint32_t outcome)
{
    vkp_i_channel *channel = lane->channel;
    VKP_I_STORE_REL(vkp_i_ring_stamp(ring, ticket), vkp_i_stamp(ticket) | outcome);
    if (vkp_i_flag_check(&channel->flags, channel->fenced) != 0) {
        vkp_i_channel_signal(channel);
    }
}

/* The path of nearly every value. False, and nothing is sent, without room, when SLOW is set, or
   when another sender was faster.                                                              */
static inline bool vkp_i_lane_send_fast(vkp_i_lane *lane, const void *item)
{
    uint64_t word = VKP_I_LOAD_ACQ(&lane->tail);
    uint64_t used = (word >> 1) - VKP_I_LOAD_ACQ(&lane->head_seen); /* huge if `word` is old */
    uint64_t room = VKP_I_LOAD_ACQ(&lane->room);
    vkp_i_ring *ring = VKP_I_LOAD_ACQ(&lane->ring);
    uintptr_t owner = VKP_I_LOAD_ACQ(&lane->bias.owner);
    if ((word & VKP_I_TAIL_SLOW) != 0 || used >= room) {
        return false;
    }
    if (owner == VKP_I_SELF()) {
        if (!vkp_i_lane_enter(lane, word)) {
            return false;
        }
        VKP_I_STORE(&lane->tail, word + VKP_I_TAIL_TICKET);
        vkp_i_bias_exit(&lane->bias);
    } else if (owner != VKP_I_SHARED || !VKP_I_CAS(&lane->tail, &word, word + VKP_I_TAIL_TICKET)) {
        return false;
    }
    VKP_I_COPY_IN(vkp_i_ring_item(ring, word >> 1), item, ring->elem_bytes);
    vkp_i_lane_publish(lane, ring, word >> 1, 0);
    return true;
}

/* Locked: set SLOW, which keeps senders off the fast path. Gives the next ticket. */
static uint64_t vkp_i_lane_freeze(vkp_i_lane *lane)
{
    uintptr_t owner = VKP_I_LOAD(&lane->bias.owner);
    uint64_t word = VKP_I_LOAD_ACQ(&lane->tail);
    if ((word & VKP_I_TAIL_SLOW) != 0) {
        return word >> 1;
    }
    if (owner == VKP_I_SHARED || owner == VKP_I_SELF()) {
        return VKP_I_OR(&lane->tail, (uint64_t)VKP_I_TAIL_SLOW) >> 1;
    }
    /* The owner stores `tail` plainly, and would clear SLOW: it must be outside first. */
    vkp_i_bias_hold(&lane->bias, lane->channel->config.env);
    word = VKP_I_OR(&lane->tail, (uint64_t)VKP_I_TAIL_SLOW);
    vkp_i_bias_release(&lane->bias);
    return word >> 1;
}

/* Locked and frozen: the first thread that sends owns the lane; a second one makes it shared,
   permanently.                                                                                 */
static void vkp_i_lane_own(vkp_i_lane *lane)
{
    uintptr_t owner = VKP_I_LOAD(&lane->bias.owner);
    if (owner == VKP_I_NOBODY) {
        VKP_I_STORE_REL(&lane->bias.owner, VKP_I_SELF());
    } else if (owner != VKP_I_SELF() && owner != VKP_I_SHARED) {
        VKP_I_STORE_REL(&lane->bias.owner, VKP_I_SHARED);
    }
}

/* Locked: set the next ticket, and clear SLOW unless the slow path is still needed. */
static void vkp_i_lane_thaw(vkp_i_lane *lane, uint64_t ticket)
{
    const vkp_i_channel *channel = lane->channel;
    bool slow = VKP_I_LOAD(&channel->ended) != 0 || VKP_I_LOAD(&lane->ring) == NULL ||
                !vkp_i_waiters_empty(&lane->senders) || channel->config.capacity_bytes != 0;
    VKP_I_STORE_REL(&lane->tail, ticket << 1 | (slow ? VKP_I_TAIL_SLOW : 0u));
}

/* Locked: whether a value of this cost fits under the ticket. Into an empty lane any one value
   fits.                                                                                        */
static bool vkp_i_lane_has_room(const vkp_i_lane *lane, uint64_t ticket, size_t cost)
{
    const vkp_i_channel *channel = lane->channel;
    uint64_t used = ticket - VKP_I_LOAD_ACQ(&lane->head);
    size_t most = channel->config.capacity_bytes;
    uint64_t cost_used;
    if (used >= channel->capacity) {
        return false;
    }
    if (most == 0 || used == 0) {
        return true;
    }
    cost_used = lane->sent_cost - VKP_I_LOAD(&lane->taken_cost);
    return cost_used <= most && cost <= most - cost_used;
}

/* Locked and frozen: make sure that the ring has a place for the ticket, which has room; false
   without memory. The first ring is small, each successor has twice the places.                */
static bool vkp_i_lane_make_slot(vkp_i_lane *lane, uint64_t ticket)
{
    vkp_i_channel *channel = lane->channel;
    vkp_i_ring *old = VKP_I_LOAD(&lane->ring);
    vkp_i_ring *ring;
    uint64_t slots;
    if (old != NULL && ticket - VKP_I_LOAD_ACQ(&lane->head) <= old->mask) {
        return true;
    }
    if (old != NULL) {
        slots = (old->mask + 1) * 2;
    } else {
        for (slots = VKP_I_RING_FIRST;
             slots > 1 && (slots / 2 >= channel->capacity ||
                           slots * channel->config.elem_bytes > VKP_I_RING_FIRST_MOST);
             slots /= 2) {
        }
    }
    ring = slots > VKP_I_RING_PLACES_MAX
               ? NULL
               : vkp_i_ring_open(channel->config.env, channel->config.elem_bytes, (size_t)slots,
                                 ticket);
    if (ring == NULL) {
        return false;
    }
    VKP_I_STORE_REL(&lane->ring, ring);
    VKP_I_STORE_REL(&lane->room, VKP_I_MIN(channel->capacity, slots));
    if (old != NULL) {
        old->next = ring;
        VKP_I_STORE_REL(&old->end, ticket);
    } else {
        VKP_I_STORE_REL(&lane->rx_ring, ring);
    }
    return true;
}

/* Locked and frozen: put the value into the queue under the ticket, which has room. OK or NOMEM. */
static vkp_status vkp_i_lane_place(vkp_i_lane *lane, uint64_t ticket, const void *item, size_t cost)
{
    vkp_i_ring *ring;
    if (!vkp_i_lane_make_slot(lane, ticket)) {
        return VKP_ERR_NOMEM;
    }
    ring = VKP_I_LOAD(&lane->ring);
    VKP_I_COPY_IN(vkp_i_ring_item(ring, ticket), item, lane->channel->config.elem_bytes);
    lane->sent_cost += cost;
    VKP_I_STORE_REL(vkp_i_ring_stamp(ring, ticket), vkp_i_stamp(ticket));
    return VKP_OK;
}

/* Locked: end the wait of a sender with this status: unlink it and wake it. */
static void vkp_i_sender_finish(vkp_i_wait *sender, vkp_status status)
{
    sender->status = status;
    (void)vkp_i_waiter_unlink(&sender->node);
    sender->node.wake(&sender->node);
}

/* Locked: let waiting senders in, oldest first, while there is room. A sender that left its
   value here (`item`) has the value moved in, and its wait ends. A sender without `item` is
   notified once, and keeps its place as the first of `senders` until it takes the room itself. */
static void vkp_i_lane_admit(vkp_i_lane *lane)
{
    uint64_t ticket;
    bool placed = false;
    ticket = vkp_i_lane_freeze(lane);
    while (!vkp_i_waiters_empty(&lane->senders)) {
        vkp_i_wait *sender = VKP_CONTAINER(lane->senders.head.next, vkp_i_wait, node);
        if (!vkp_i_lane_has_room(lane, ticket, sender->cost)) {
            break;
        }
        if (sender->item == NULL) {
            if (sender->status == VKP_ERR_FULL) {
                sender->status = VKP_OK; /* so that it is notified once */
                sender->node.wake(&sender->node);
            }
            break;
        }
        {
            vkp_status status = vkp_i_lane_place(lane, ticket, sender->item, sender->cost);
            ticket += status == VKP_OK ? 1u : 0u;
            placed = placed || status == VKP_OK;
            vkp_i_sender_finish(sender, status);
        }
    }
    if (vkp_i_waiters_empty(&lane->senders)) {
        vkp_i_flag_lower(&lane->tx_waiting, 1u);
    }
    vkp_i_lane_thaw(lane, ticket);
    if (placed) {
        vkp_i_channel_wake_receiver(lane->channel);
    }
}

/* Make the permit for the place of the ticket. */
static void vkp_i_permit_set(vkp_mpsc_permit *permit, vkp_i_lane *lane, vkp_i_ring *ring,
                             uint64_t ticket)
{
    permit->item = vkp_i_ring_item(ring, ticket);
    permit->i_lane = lane;
    permit->i_ring = ring;
    permit->i_ticket = ticket;
}

/* Locked: send, or reserve when `permit` is given, unless another sender waits. `self` is the
   caller's own wait in `senders`, or NULL. OK, CLOSED, NOMEM; FULL means that waiting helps.   */
static vkp_status vkp_i_lane_send_locked(vkp_i_lane *lane, const void *item, size_t cost,
                                         vkp_mpsc_permit *permit, const vkp_i_wait *self)
{
    uint64_t ticket = vkp_i_lane_freeze(lane);
    vkp_status status = VKP_OK;
    const vkp_i_waiter *first = lane->senders.head.next;
    vkp_i_lane_own(lane);
    if ((VKP_I_LOAD(&lane->channel->ended) & VKP_I_ENDED_CLOSED) != 0) {
        status = VKP_ERR_CLOSED;
    } else if ((first != &lane->senders.head && (self == NULL || first != &self->node)) ||
               !vkp_i_lane_has_room(lane, ticket, cost)) {
        status = VKP_ERR_FULL;
    } else if (permit != NULL) {
        status = vkp_i_lane_make_slot(lane, ticket) ? VKP_OK : VKP_ERR_NOMEM;
        if (status == VKP_OK) {
            vkp_i_permit_set(permit, lane, VKP_I_LOAD(&lane->ring), ticket);
        }
    } else {
        status = vkp_i_lane_place(lane, ticket, item, cost);
    }
    vkp_i_lane_thaw(lane, status == VKP_OK ? ticket + 1 : ticket);
    if (status == VKP_OK && permit == NULL) {
        vkp_i_channel_wake_receiver(lane->channel);
    }
    return status;
}

/* Send, or reserve when `permit` is given, without waiting: OK, FULL, CLOSED or NOMEM. */
__attribute__((noinline)) static vkp_status vkp_i_lane_try(vkp_i_lane *lane, const void *item,
                                                           vkp_mpsc_permit *permit)
{
    vkp_i_channel *channel = lane->channel;
    vkp_i_ring *ring;
    uint64_t ticket;
    uint64_t taken;
    vkp_status status = vkp_i_lane_claim(lane, 1, &ticket, &ring, &taken);
    if (status == VKP_OK) {
        if (permit != NULL) {
            vkp_i_permit_set(permit, lane, ring, ticket);
        } else {
            VKP_I_COPY_IN(vkp_i_ring_item(ring, ticket), item, channel->config.elem_bytes);
            vkp_i_lane_publish(lane, ring, ticket, 0);
        }
    } else if (status == VKP_ERR_EMPTY) {
        size_t cost = permit == NULL ? vkp_i_channel_cost(channel, item) : 0;
        VKP_I_LOCK(&channel->mutex);
        status = vkp_i_lane_send_locked(lane, item, cost, permit, NULL);
        VKP_I_UNLOCK(&channel->mutex);
    }
    return status;
}

/* Link a sender into `senders`; it may be woken before this returns. */
static void vkp_i_lane_join(vkp_i_lane *lane, vkp_i_wait *sender)
{
    vkp_i_channel *channel = lane->channel;
    VKP_I_LOCK(&channel->mutex);
    sender->status = VKP_ERR_FULL;
    vkp_i_waiter_link(&lane->senders, &sender->node);
    (void)vkp_i_lane_freeze(lane);
    vkp_i_flag_raise(&lane->tx_waiting, 1u);
    if ((VKP_I_LOAD(&channel->ended) & VKP_I_ENDED_CLOSED) != 0) {
        vkp_i_sender_finish(sender, VKP_ERR_CLOSED);
    }
    VKP_I_UNLOCK(&channel->mutex);
    vkp_i_flag_fence(channel->config.env, channel->fenced);
    VKP_I_LOCK(&channel->mutex);
    vkp_i_lane_admit(lane); /* room that the receiver made before it could see the flag */
    VKP_I_UNLOCK(&channel->mutex);
}

/* Take the room with the wait that is linked in `senders`. FULL: this wait is not the first one,
   or there is no room; CLOSED when the channel was closed.                                     */
static vkp_status vkp_i_lane_claim_place(vkp_i_lane *lane, vkp_i_wait *wait, const void *item,
                                         vkp_mpsc_permit *permit)
{
    vkp_i_channel *channel = lane->channel;
    vkp_status status;
    VKP_I_LOCK(&channel->mutex);
    status = wait->node.prev != NULL ? vkp_i_lane_send_locked(lane, item, wait->cost, permit, wait)
                                     : wait->status; /* closed */
    VKP_I_UNLOCK(&channel->mutex);
    return status;
}

/* End a wait in `senders`, and let the next one in, which may have room now. Gives how the wait
   ended; FULL when it was still linked.                                                        */
static vkp_status vkp_i_lane_leave(vkp_i_lane *lane, vkp_i_wait *wait)
{
    vkp_i_channel *channel = lane->channel;
    VKP_I_LOCK(&channel->mutex);
    if (vkp_i_waiter_unlink(&wait->node)) {
        wait->status = VKP_ERR_FULL;
        vkp_i_lane_admit(lane);
    }
    VKP_I_UNLOCK(&channel->mutex);
    return wait->status;
}

/* Whether another try without the mutex is worthwhile. */
static bool vkp_i_lane_looks_roomy(vkp_i_lane *lane)
{
    uint64_t word = VKP_I_LOAD(&lane->tail);
    return (word & VKP_I_TAIL_SLOW) == 0 &&
           vkp_i_used(word >> 1, VKP_I_LOAD(&lane->head)) <
               VKP_I_LOAD(&lane->room) - VKP_I_LOAD(&lane->room) / VKP_I_HYSTERESIS;
}

/* Send, or reserve when `permit` is given, and wait for room. The wait ends without it at the
   deadline or when the token (may be NULL) is cancelled: TIMEOUT in both cases.                */
static vkp_status vkp_i_lane_send(vkp_i_lane *lane, const void *item, vkp_mpsc_permit *permit,
                                  vkp_cancel *cancel, uint64_t deadline_ns)
{
    vkp_i_channel *channel = lane->channel;
    const vkp_sys *sys = vkp_i_sys(channel->config.env);
    vkp_i_wait sender;
    vkp_i_wait cancelled;
    vkp_parker parker;
    vkp_status claimed;
    vkp_status status = vkp_i_lane_try(lane, item, permit);
    vkp_i_spin spin = {0, 0};
    if (status != VKP_ERR_FULL || deadline_ns == 0) {
        return status == VKP_ERR_FULL ? VKP_ERR_TIMEOUT : status;
    }
    while (vkp_i_spin_again(&spin, sys, channel->spins)) {
        if (vkp_i_lane_looks_roomy(lane)) {
            status = vkp_i_lane_try(lane, item, permit);
            if (status != VKP_ERR_FULL) {
                return status;
            }
        }
    }
    vkp_i_parker_init(&parker);
    vkp_i_wait_init(&sender, sys, &parker);
    vkp_i_wait_init(&cancelled, sys, &parker);
    sender.item = item;
    sender.cost = item != NULL ? vkp_i_channel_cost(channel, item) : 0;
    vkp_i_lane_join(lane, &sender);
    if (cancel == NULL || vkp_i_cancel_join(cancel, &cancelled.node)) {
        sys->park(&parker, deadline_ns);
    }
    if (cancel != NULL) {
        vkp_i_cancel_leave(cancel, &cancelled.node);
    }
    claimed = permit != NULL ? vkp_i_lane_claim_place(lane, &sender, NULL, permit) : VKP_ERR_FULL;
    status = vkp_i_lane_leave(lane, &sender);
    status = claimed != VKP_ERR_FULL ? claimed : status;
    vkp_i_parker_deinit(&parker);
    return status == VKP_ERR_FULL ? VKP_ERR_TIMEOUT : status;
}

VKP_API vkp_status vkp_mpsc_send(vkp_mpsc_tx *tx, const void *item, uint64_t deadline_ns)
{
    VKP_I_REQUIRE(tx != NULL && item != NULL);
    return vkp_i_lane_send_fast(tx->lane, item)
               ? VKP_OK
               : vkp_i_lane_send(tx->lane, item, NULL, NULL, deadline_ns);
}

VKP_API vkp_status vkp_mpsc_try_send(vkp_mpsc_tx *tx, const void *item)
{
    VKP_I_REQUIRE(tx != NULL && item != NULL);
    return vkp_i_lane_send_fast(tx->lane, item) ? VKP_OK : vkp_i_lane_try(tx->lane, item, NULL);
}

VKP_API vkp_status vkp_mpsc_reserve(vkp_mpsc_tx *tx, uint64_t deadline_ns, vkp_mpsc_permit *permit)
{
    VKP_I_REQUIRE(tx != NULL && permit != NULL && tx->lane->channel->config.capacity_bytes == 0);
    return vkp_i_lane_send(tx->lane, NULL, permit, NULL, deadline_ns);
}

VKP_API vkp_status vkp_mpsc_try_reserve(vkp_mpsc_tx *tx, vkp_mpsc_permit *permit)
{
    VKP_I_REQUIRE(tx != NULL && permit != NULL && tx->lane->channel->config.capacity_bytes == 0);
    return vkp_i_lane_try(tx->lane, NULL, permit);
}

VKP_API void vkp_mpsc_commit(vkp_mpsc_permit *permit)
{
    vkp_i_lane_publish((vkp_i_lane *)permit->i_lane, (vkp_i_ring *)permit->i_ring, permit->i_ticket,
                       0);
}

VKP_API void vkp_mpsc_abort(vkp_mpsc_permit *permit)
{
    vkp_i_lane_publish((vkp_i_lane *)permit->i_lane, (vkp_i_ring *)permit->i_ring, permit->i_ticket,
                       VKP_I_STAMP_ABORTED);
}

VKP_API vkp_status vkp_mpsc_send_many(vkp_mpsc_tx *tx, const void *items, size_t count,
                                      uint64_t deadline_ns, size_t *sent)
{
    vkp_i_lane *lane;
    size_t bytes;
    size_t done = 0;
    VKP_I_REQUIRE(tx != NULL && items != NULL && count > 0 && sent != NULL);
    lane = tx->lane;
    bytes = lane->channel->config.elem_bytes;
    while (done < count) {
        const uint8_t *next = (const uint8_t *)items + done * bytes;
        vkp_i_ring *ring;
        uint64_t ticket;
        uint64_t taken;
        uint64_t i;
        vkp_status status = vkp_i_lane_claim(lane, count - done, &ticket, &ring, &taken);
        if (status != VKP_OK) { /* send one value by the slow path, then claim again */
            status = vkp_i_lane_send(lane, next, NULL, NULL, deadline_ns);
            if (status != VKP_OK && done == 0) {
                return status;
            }
            if (status != VKP_OK) {
                break;
            }
            done++;
            continue;
        }
        for (i = 0; i + 1 < taken; i++) {
            VKP_I_COPY_IN(vkp_i_ring_item(ring, ticket + i), next + i * bytes, bytes);
            VKP_I_STORE_REL(vkp_i_ring_stamp(ring, ticket + i), vkp_i_stamp(ticket + i));
        }
        VKP_I_COPY_IN(vkp_i_ring_item(ring, ticket + i), next + i * bytes, bytes);
        vkp_i_lane_publish(lane, ring, ticket + i, 0);
        done += (size_t)taken;
    }
    *sent = done;
    return VKP_OK;
}

/* ======================================================================================
   >>impl-mpsc-receive   mpsc: the receiver's side
   ======================================================================================
   The receiver's thread runs this section; where senders may evict (`evicts`), under the mutex
   too. The acquire of a stamp pairs with its release by the sender: the value is complete. After
   it stored `head` the receiver checks the flag `tx_waiting`, and lets waiting senders in under
   the mutex.
   Before it sleeps the receiver links its waiter, raises VKP_I_RX_WAITING, and checks once more; a
   sender that publishes, a close and the end of the last sender wake it.
   With several lanes the receiver takes at most VKP_I_LANE_TURN values from one lane while others
   have values. Only the receiver frees rings and lanes that are no longer used, until it is gone
   itself.                                                                                      */

/* Let in senders that wait, and cannot see the places just freed. */
static void vkp_i_lane_admit_waiting(vkp_i_lane *lane)
{
    VKP_I_LOCK(&lane->channel->mutex);
    vkp_i_lane_admit(lane);
    VKP_I_UNLOCK(&lane->channel->mutex);
}

/* After no value was found: EMPTY; CLOSED when the channel has ended and all lanes are empty; OK
   when a value arrived since.                                                                  */
static vkp_status vkp_i_channel_end(vkp_i_channel *channel)
{
    const vkp_i_lane *lane = &channel->lane;
    if (VKP_I_LOAD_ACQ(&channel->ended) == 0) {
        return VKP_ERR_EMPTY;
    }
    for (; lane != NULL; lane = VKP_I_LOAD_ACQ(&lane->next)) {
        if (VKP_I_LOAD_ACQ(&lane->tail) >> 1 != VKP_I_LOAD(&lane->head)) {
            return vkp_i_channel_find(channel) != NULL ? VKP_OK : VKP_ERR_EMPTY;
        }
    }
    return VKP_ERR_CLOSED;
}

/* The path of nearly every value. False, and nothing is taken, when the value is not ready, the
   lane is not `plain`, or the turn of the lane ends with this value.                           */
static inline bool vkp_i_lane_recv_fast(vkp_i_lane *lane, void *out)
{
    vkp_i_ring *ring = VKP_I_LOAD_ACQ(&lane->rx_ring);
    uint64_t head = VKP_I_LOAD(&lane->head);
    if (!lane->plain || ring == NULL || (head + 1) % VKP_I_LANE_TURN == 0 ||
        VKP_I_LOAD_ACQ(vkp_i_ring_stamp(ring, head)) != vkp_i_stamp(head)) {
        return false;
    }
    VKP_I_COPY_OUT(out, vkp_i_ring_item(ring, head), ring->elem_bytes);
    VKP_I_STORE_REL(&lane->head, head + 1);
    if (vkp_i_flag_check(&lane->tx_waiting, false) != 0) {
        vkp_i_lane_admit_waiting(lane);
    }
    return true;
}

/* Take up to `capacity` values from the ring of `head`. Senders see freed places in bunches
   (VKP_I_BUNCH): the cache line of `head` would otherwise change hands for each value.         */
static size_t vkp_i_lane_take(vkp_i_lane *lane, uint8_t *out, size_t capacity)
{
    vkp_i_ring *ring = VKP_I_LOAD(&lane->rx_ring);
    uint64_t head = VKP_I_LOAD(&lane->head);
    uint64_t cost = VKP_I_LOAD(&lane->taken_cost);
    size_t taken = 0;
    while (taken < capacity && VKP_I_LOAD_ACQ(vkp_i_ring_stamp(ring, head)) == vkp_i_stamp(head)) {
        const uint8_t *item = vkp_i_ring_item(ring, head);
        VKP_I_COPY_OUT(out, item, ring->elem_bytes);
        if (lane->channel->config.capacity_bytes != 0) {
            cost += vkp_i_channel_cost(lane->channel, item);
            VKP_I_STORE(&lane->taken_cost, cost);
        }
        out += ring->elem_bytes;
        taken++;
        head++;
        if (taken % VKP_I_BUNCH == 0) {
            VKP_I_STORE_REL(&lane->head, head);
        }
    }
    VKP_I_STORE_REL(&lane->head, head);
    return taken;
}

/* After values were taken: let waiting senders in. Takes the mutex, which with `evicts` is held
   already.                                                                                     */
static void vkp_i_lane_freed(vkp_i_lane *lane)
{
    vkp_i_channel *channel = lane->channel;
    if (channel->evicts) {
        vkp_i_lane_admit(lane);
    } else if (vkp_i_flag_check(&lane->tx_waiting, channel->fenced) != 0) {
        vkp_i_lane_admit_waiting(lane);
    }
}

/* vkp_i_lane_freed for all lanes. */
static void vkp_i_channel_freed(vkp_i_channel *channel)
{
    vkp_i_lane *lane = &channel->lane;
    for (; lane != NULL; lane = VKP_I_LOAD_ACQ(&lane->next)) {
        vkp_i_lane_freed(lane);
    }
}

/* Take the mutex where senders may take the oldest value: the receiver needs it there, too. */
static void vkp_i_channel_hold(vkp_i_channel *channel)
{
    if (channel->evicts) {
        VKP_I_LOCK(&channel->mutex);
    }
}

/* Give back the mutex that vkp_i_channel_hold took. */
static void vkp_i_channel_release(vkp_i_channel *channel)
{
    if (channel->evicts) {
        VKP_I_UNLOCK(&channel->mutex);
    }
}

/* Locked: an empty lane frees the large ring that a burst needed. The lane is frozen and its
   last ticket received, so no sender uses the ring.                                            */
static void vkp_i_lane_trim(vkp_i_lane *lane)
{
    vkp_i_ring *ring = VKP_I_LOAD(&lane->rx_ring);
    uint64_t ticket;
    if (ring == NULL || VKP_I_LOAD(&lane->ring)->bytes <= VKP_I_RING_KEEP) {
        return;
    }
    ticket = vkp_i_lane_freeze(lane);
    if (vkp_i_lane_oldest(lane) == NULL && ticket == VKP_I_LOAD(&lane->head)) {
        ring = VKP_I_LOAD(&lane->rx_ring);
        VKP_I_STORE_REL(&lane->ring, (vkp_i_ring *)NULL);
        VKP_I_STORE_REL(&lane->room, (uint64_t)0);
        VKP_I_STORE_REL(&lane->rx_ring, (vkp_i_ring *)NULL);
        vkp_i_ring_close(lane->channel->config.env, ring);
    }
    vkp_i_lane_thaw(lane, ticket);
}

/* Free a lane that no thread uses any longer, with its rings. */
static void vkp_i_lane_free(vkp_i_lane *lane)
{
    const vkp_env *env = lane->channel->config.env;
    (void)vkp_i_lane_oldest(lane); /* frees the rings that have ended */
    vkp_i_ring_close(env, VKP_I_LOAD(&lane->rx_ring));
    if (lane != &lane->channel->lane) {
        vkp_i_free(env, VKP_CONTAINER(lane, vkp_i_extra_lane, lane), sizeof(vkp_i_extra_lane));
    }
}

/* Locked: free large rings of empty lanes, and empty lanes whose sender is gone. */
static void vkp_i_channel_tidy(vkp_i_channel *channel)
{
    vkp_i_lane *before = &channel->lane;
    vkp_i_lane_trim(before);
    while (VKP_I_LOAD(&before->next) != NULL) {
        vkp_i_lane *lane = VKP_I_LOAD(&before->next);
        if (VKP_I_LOAD_ACQ(&lane->dead) != 0 && vkp_i_lane_oldest(lane) == NULL &&
            VKP_I_LOAD(&lane->tail) >> 1 == VKP_I_LOAD(&lane->head)) {
            VKP_I_STORE_REL(&before->next, VKP_I_LOAD(&lane->next));
            channel->rx_lane = &channel->lane;
            (void)VKP_I_SUB(&channel->dead_lanes, (size_t)1);
            vkp_i_lane_free(lane);
        } else {
            vkp_i_lane_trim(lane);
            before = lane;
        }
    }
}

/* Take up to `capacity` values without waiting: OK with their number, EMPTY or CLOSED. */
static vkp_status vkp_i_channel_try_recv(vkp_i_channel *channel, void *out, size_t capacity,
                                         size_t *count)
{
    vkp_status status = VKP_OK;
    size_t taken = 0;
    vkp_i_lane *lane;
    vkp_i_channel_hold(channel);
    lane = vkp_i_channel_find(channel);
    if (lane == NULL) {
        status = vkp_i_channel_end(channel);
        lane = status == VKP_OK ? vkp_i_channel_find(channel) : NULL;
        if (lane == NULL && VKP_I_LOAD(&channel->dead_lanes) != 0) {
            VKP_I_LOCK(&channel->mutex); /* for a receiver that never waits: join would do this */
            vkp_i_channel_tidy(channel);
            VKP_I_UNLOCK(&channel->mutex);
        }
    }
    while (lane != NULL && taken < capacity) {
        uint8_t *to = (uint8_t *)out + taken * channel->config.elem_bytes;
        size_t turn = VKP_I_LANE_TURN - (size_t)(VKP_I_LOAD(&lane->head) % VKP_I_LANE_TURN);
        taken += vkp_i_lane_take(lane, to, VKP_I_MIN(capacity - taken, turn));
        if (VKP_I_LOAD(&lane->head) % VKP_I_LANE_TURN == 0 || taken < capacity) {
            channel->rx_lane = vkp_i_lane_after(lane);
        }
        lane = taken < capacity ? vkp_i_channel_find(channel) : NULL;
    }
    if (taken > 0) {
        *count = taken;
    }
    vkp_i_channel_freed(channel);
    vkp_i_channel_release(channel);
    return status;
}

/* Whether a receive would give a value or CLOSED. */
static bool vkp_i_channel_is_ready(vkp_i_channel *channel)
{
    bool ready;
    vkp_i_channel_hold(channel);
    ready = vkp_i_channel_find(channel) != NULL || vkp_i_channel_end(channel) != VKP_ERR_EMPTY;
    vkp_i_channel_freed(channel); /* the search passed aborted places: they are free */
    vkp_i_channel_release(channel);
    return ready;
}

/* Unlink the waiter of the receiver if it is linked. */
static void vkp_i_channel_leave(vkp_i_channel *channel, vkp_i_waiter *waiter)
{
    VKP_I_LOCK(&channel->mutex);
    if (vkp_i_waiter_unlink(waiter) && vkp_i_waiters_empty(&channel->receiver)) {
        vkp_i_flag_lower(&channel->flags, VKP_I_RX_WAITING);
    }
    VKP_I_UNLOCK(&channel->mutex);
}

/* Link the waiter of the receiver; false, and not linked, when a receive would not be EMPTY. */
static bool vkp_i_channel_join(vkp_i_channel *channel, vkp_i_waiter *waiter)
{
    VKP_I_LOCK(&channel->mutex);
    vkp_i_channel_tidy(channel);
    vkp_i_waiter_link(&channel->receiver, waiter);
    vkp_i_flag_raise(&channel->flags, VKP_I_RX_WAITING);
    VKP_I_UNLOCK(&channel->mutex);
    vkp_i_flag_fence(channel->config.env, channel->fenced);
    if (!vkp_i_channel_is_ready(channel)) {
        return true;
    }
    vkp_i_channel_leave(channel, waiter);
    return false;
}

/* After a short burst the receiver pauses, so that some values gather: a receiver close behind a
   stream takes each cache line from its sender while the sender writes it. After a single value,
   which may be part of a dialogue, it does not pause.                                          */
static void vkp_i_lane_linger(vkp_i_lane *lane, uint32_t spins)
{
    uint64_t head = VKP_I_LOAD(&lane->head);
    uint64_t burst = head - lane->lingered;
    uint32_t i;
    lane->lingered = head;
    if (burst >= 2 && burst < VKP_I_LINGER_BURST) {
        uint64_t most =
            VKP_I_MIN(VKP_I_LINGER_PAUSES, VKP_I_LOAD(&lane->room) / VKP_I_LINGER_SHARE);
        for (i = 0; i < most && i < spins; i++) {
            VKP_I_PAUSE();
        }
    }
}

static vkp_status vkp_i_case_recv_attempt(vkp_case *each, vkp_i_wait *wait)
{
    size_t count;
    (void)wait;
    return vkp_i_channel_try_recv((vkp_i_channel *)each->i_object, each->i_out, 1, &count);
}

static vkp_status vkp_i_case_recv_many_attempt(vkp_case *each, vkp_i_wait *wait)
{
    vkp_i_batch *batch = (vkp_i_batch *)each->i_out;
    (void)wait;
    return vkp_i_channel_try_recv((vkp_i_channel *)each->i_object, batch->out, batch->capacity,
                                  &batch->count);
}

static bool vkp_i_case_recv_is_ready(const vkp_case *each)
{
    return vkp_i_channel_is_ready((vkp_i_channel *)each->i_object);
}

static bool vkp_i_case_recv_join(const vkp_case *each, vkp_i_wait *wait)
{
    return vkp_i_channel_join((vkp_i_channel *)each->i_object, &wait->node);
}

static void vkp_i_case_recv_leave(const vkp_case *each, vkp_i_wait *wait)
{
    vkp_i_channel_leave((vkp_i_channel *)each->i_object, &wait->node);
}

static const vkp_env *vkp_i_case_recv_env(const vkp_case *each)
{
    return ((vkp_i_channel *)each->i_object)->config.env;
}

static const vkp_i_case_kind vkp_i_case_recv = {vkp_i_case_recv_attempt, vkp_i_case_recv_is_ready,
                                                vkp_i_case_recv_join, vkp_i_case_recv_leave,
                                                vkp_i_case_recv_env};
static const vkp_i_case_kind vkp_i_case_recv_many = {vkp_i_case_recv_many_attempt,
                                                     vkp_i_case_recv_is_ready, vkp_i_case_recv_join,
                                                     vkp_i_case_recv_leave, vkp_i_case_recv_env};

/* Whether a receiver that spins should try again. */
static inline bool vkp_i_channel_looks_ready(vkp_i_channel *channel)
{
    return channel->evicts
               ? vkp_i_channel_is_ready(channel)
               : vkp_i_channel_find(channel) != NULL || VKP_I_LOAD(&channel->ended) != 0;
}

/* Take up to `capacity` values, and wait for the first one until the deadline, or until the
   token (may be NULL) is cancelled: CANCELLED.                                                 */
static vkp_status vkp_i_mpsc_recv(vkp_mpsc_rx *rx, void *out, size_t capacity, size_t *count,
                                  vkp_cancel *cancel, uint64_t deadline_ns)
{
    vkp_i_channel *channel = rx->channel;
    const vkp_sys *sys = vkp_i_sys(channel->config.env);
    vkp_i_spin spin = {0, 0};
    vkp_i_batch batch;
    vkp_case cases[2];
    vkp_i_wait waits[2];
    size_t won;
    vkp_status status;
    if (deadline_ns != 0) {
        vkp_i_lane_linger(channel->rx_lane, channel->spins);
        while (vkp_i_spin_again(&spin, sys, channel->spins) &&
               !vkp_i_channel_looks_ready(channel)) {
        }
        if (capacity == 1 && vkp_i_lane_recv_fast(channel->rx_lane, out)) {
            *count = 1;
            return VKP_OK;
        }
    }
    batch.out = out;
    batch.capacity = capacity;
    cases[0] = vkp_i_case(&vkp_i_case_recv_many, channel, &batch);
    cases[1] = vkp_case_cancel(cancel);
    status = vkp_i_select(cases, 2, 0, waits, sys, 0, deadline_ns, &won);
    if (status != VKP_OK) {
        return status;
    }
    if (won == 1) {
        return VKP_ERR_CANCELLED;
    }
    if (cases[0].status == VKP_OK) {
        *count = batch.count;
    }
    return cases[0].status;
}

VKP_API vkp_status vkp_mpsc_recv(vkp_mpsc_rx *rx, uint64_t deadline_ns, void *out)
{
    size_t count;
    VKP_I_REQUIRE(rx != NULL && out != NULL);
    return vkp_i_lane_recv_fast(rx->channel->rx_lane, out)
               ? VKP_OK
               : vkp_i_mpsc_recv(rx, out, 1, &count, NULL, deadline_ns);
}

VKP_API vkp_status vkp_mpsc_recv_many(vkp_mpsc_rx *rx, uint64_t deadline_ns, void *out,
                                      size_t capacity, size_t *count)
{
    VKP_I_REQUIRE(rx != NULL && out != NULL && capacity > 0 && count != NULL);
    return vkp_i_mpsc_recv(rx, out, capacity, count, NULL, deadline_ns);
}

VKP_API vkp_status vkp_mpsc_try_recv(vkp_mpsc_rx *rx, void *out)
{
    size_t count;
    VKP_I_REQUIRE(rx != NULL && out != NULL);
    return vkp_i_lane_recv_fast(rx->channel->rx_lane, out)
               ? VKP_OK
               : vkp_i_channel_try_recv(rx->channel, out, 1, &count);
}

VKP_API vkp_status vkp_mpsc_peek(vkp_mpsc_rx *rx, const void **item)
{
    vkp_i_lane *lane;
    vkp_status status = VKP_OK;
    VKP_I_REQUIRE(rx != NULL && item != NULL);
    lane = vkp_i_channel_find(rx->channel);
    if (lane == NULL) {
        status = vkp_i_channel_end(rx->channel);
        lane = status == VKP_OK ? vkp_i_channel_find(rx->channel) : NULL;
    }
    vkp_i_channel_freed(rx->channel); /* the search passed aborted places: they are free */
    if (lane != NULL) {
        *item = vkp_i_lane_oldest(lane);
    }
    return status;
}

VKP_API size_t vkp_mpsc_get_len(const vkp_mpsc_rx *rx)
{
    const vkp_i_lane *lane = &rx->channel->lane;
    uint64_t count = 0;
    for (; lane != NULL; lane = VKP_I_LOAD_ACQ(&lane->next)) {
        /* vkp_i_used: a value may be received before vkp_i_lane_thaw has moved `tail`. */
        count += vkp_i_used(VKP_I_LOAD_ACQ(&lane->tail) >> 1, VKP_I_LOAD(&lane->head));
    }
    return (size_t)count;
}

VKP_API bool vkp_mpsc_rx_is_closed(const vkp_mpsc_rx *rx)
{
    return VKP_I_LOAD_ACQ(&rx->channel->ended) != 0;
}

/* ======================================================================================
   >>impl-mpsc-ends   mpsc: opening, closing, cases
   ======================================================================================
   `handles` counts the senders: when it reaches 0 the channel has ended (VKP_I_ENDED_SENDERS), and
   the receiver is woken. `refs` counts all senders as one, the receiver, and each weak sender:
   when it reaches 0 the memory is freed.
   vkp_mpsc_close freezes all lanes permanently, sets VKP_I_ENDED_CLOSED, and wakes waiting
   senders, waits for the close, and the receiver, all under the mutex. Places that were reserved
   before are still received. After vkp_mpsc_rx_unref raised VKP_I_RX_GONE, a sender that publishes
   drops the value itself.
   A case that sends has its wait in `senders`, without `item`: it takes the room in its attempt. */

/* Give one of `refs` back; the last one frees the channel. */
static void vkp_i_channel_unref(vkp_i_channel *channel)
{
    const vkp_env *env = channel->config.env;
    if (VKP_I_UNREF(&channel->refs) != 1) {
        return;
    }
    while (channel->retired != NULL) {
        vkp_i_ring *next = channel->retired->next;
        vkp_i_ring_close(env, channel->retired);
        channel->retired = next;
    }
    while (channel->lane.next != NULL) {
        vkp_i_lane *lane = channel->lane.next;
        channel->lane.next = lane->next;
        vkp_i_lane_free(lane);
    }
    vkp_i_lane_free(&channel->lane);
    VKP_I_MUTEX_DEINIT(&channel->mutex);
    vkp_i_free(env, channel, sizeof *channel);
}

/* Prepare a zeroed lane, which has no ring. */
static void vkp_i_lane_init(vkp_i_lane *lane, vkp_i_channel *channel)
{
    lane->channel = channel;
    lane->tail = VKP_I_TAIL_SLOW; /* the slow path opens the ring */
    lane->bias.owner = channel->fenced ? VKP_I_SHARED : VKP_I_NOBODY;
    lane->plain = !channel->evicts && !channel->fenced && channel->config.capacity_bytes == 0;
    vkp_i_waiters_init(&lane->senders);
}

/* Open a channel; `evicts` allows vkp_i_mpsc_send_evict. OK or NOMEM. */
static vkp_status vkp_i_mpsc_open(const vkp_mpsc_config *config, bool evicts, vkp_mpsc_tx **tx,
                                  vkp_mpsc_rx **rx)
{
    const vkp_env *env = vkp_i_env(config->env);
    vkp_i_channel *channel = (vkp_i_channel *)vkp_i_alloc_zero(env, sizeof *channel);
    if (channel == NULL) {
        return VKP_ERR_NOMEM;
    }
    channel->config = *config;
    channel->config.env = env;
    channel->capacity = config->capacity_items != 0 ? config->capacity_items : UINT64_MAX;
    channel->tx.lane = &channel->lane;
    channel->tx.refs = 1;
    channel->handles = 1;
    channel->rx_lane = &channel->lane;
    channel->rx.channel = channel;
    channel->weak.channel = channel;
    channel->refs = 2;
    channel->evicts = evicts;
    channel->fenced = vkp_i_flag_prepare(env);
    channel->spins = vkp_i_spins(env);
    VKP_I_MUTEX_INIT(&channel->mutex);
    vkp_i_waiters_init(&channel->receiver);
    vkp_i_waiters_init(&channel->closers);
    vkp_i_lane_init(&channel->lane, channel);
    *tx = &channel->tx;
    *rx = &channel->rx;
    return VKP_OK;
}

VKP_API vkp_status vkp_mpsc_open(const vkp_mpsc_config *config, vkp_mpsc_tx **tx, vkp_mpsc_rx **rx)
{
    VKP_I_REQUIRE(config != NULL && tx != NULL && rx != NULL);
    VKP_I_REQUIRE(config->elem_bytes > 0 && config->elem_bytes <= VKP_I_ELEM_MAX);
    VKP_I_REQUIRE(!config->lanes || config->capacity_bytes == 0);
    return vkp_i_mpsc_open(config, false, tx, rx);
}

VKP_API vkp_mpsc_tx *vkp_mpsc_tx_ref(vkp_mpsc_tx *tx)
{
    (void)VKP_I_ADD(&tx->refs, (size_t)1);
    return tx;
}

/* Give one of `handles` back; the last one ends the channel. */
static void vkp_i_channel_remove_sender(vkp_i_channel *channel)
{
    if (VKP_I_UNREF(&channel->handles) == 1) {
        VKP_I_LOCK(&channel->mutex);
        (void)VKP_I_OR(&channel->ended, VKP_I_ENDED_SENDERS);
        vkp_i_channel_wake_receiver(channel);
        VKP_I_UNLOCK(&channel->mutex);
        vkp_i_channel_unref(channel);
    }
}

/* Make a sender with a lane of its own; the caller has counted it in `handles`. */
static vkp_status vkp_i_channel_add_lane(vkp_i_channel *channel, vkp_mpsc_tx **tx)
{
    vkp_i_extra_lane *extra =
        (vkp_i_extra_lane *)vkp_i_alloc_zero(channel->config.env, sizeof *extra);
    if (extra == NULL) {
        vkp_i_channel_remove_sender(channel);
        return VKP_ERR_NOMEM;
    }
    vkp_i_lane_init(&extra->lane, channel);
    extra->tx.lane = &extra->lane;
    extra->tx.refs = 1;
    VKP_I_LOCK(&channel->mutex);
    extra->lane.next = VKP_I_LOAD(&channel->lane.next);
    VKP_I_STORE_REL(&channel->lane.next, &extra->lane);
    VKP_I_UNLOCK(&channel->mutex);
    *tx = &extra->tx;
    return VKP_OK;
}

VKP_API vkp_status vkp_mpsc_tx_clone(vkp_mpsc_tx *tx, vkp_mpsc_tx **clone)
{
    vkp_i_channel *channel;
    VKP_I_REQUIRE(tx != NULL && clone != NULL);
    channel = tx->lane->channel;
    if (!channel->config.lanes) {
        *clone = vkp_mpsc_tx_ref(tx);
        return VKP_OK;
    }
    (void)VKP_I_ADD(&channel->handles, (size_t)1);
    return vkp_i_channel_add_lane(channel, clone);
}

VKP_API void vkp_mpsc_tx_unref(vkp_mpsc_tx *tx)
{
    vkp_i_channel *channel;
    if (tx == NULL) {
        return;
    }
    channel = tx->lane->channel;
    if (VKP_I_UNREF(&tx->refs) == 1) {
        if (tx != &channel->tx) {
            (void)VKP_I_ADD(&channel->dead_lanes, (size_t)1);
            VKP_I_STORE_REL(&tx->lane->dead, 1u); /* the receiver may free tx now */
        }
        vkp_i_channel_remove_sender(channel);
    }
}

VKP_API vkp_mpsc_weak *vkp_mpsc_downgrade(vkp_mpsc_tx *tx)
{
    vkp_i_channel *channel = tx->lane->channel;
    (void)VKP_I_ADD(&channel->refs, (size_t)1);
    (void)VKP_I_ADD(&channel->weak.refs, (size_t)1);
    return &channel->weak;
}

VKP_API vkp_status vkp_mpsc_upgrade(vkp_mpsc_weak *weak, vkp_mpsc_tx **tx)
{
    vkp_i_channel *channel;
    size_t *senders;
    size_t count;
    VKP_I_REQUIRE(weak != NULL && tx != NULL);
    channel = weak->channel;
    senders = channel->config.lanes ? &channel->handles : &channel->tx.refs;
    count = VKP_I_LOAD(senders);
    while (count != 0) {
        if (VKP_I_CAS(senders, &count, count + 1)) {
            if (channel->config.lanes) {
                return vkp_i_channel_add_lane(channel, tx);
            }
            *tx = &channel->tx;
            return VKP_OK;
        }
    }
    return VKP_ERR_CLOSED;
}

VKP_API void vkp_mpsc_weak_unref(vkp_mpsc_weak *weak)
{
    if (weak != NULL) {
        (void)VKP_I_SUB(&weak->refs, (size_t)1);
        vkp_i_channel_unref(weak->channel);
    }
}

VKP_API bool vkp_mpsc_is_closed(const vkp_mpsc_tx *tx)
{
    return (VKP_I_LOAD_ACQ(&tx->lane->channel->ended) & VKP_I_ENDED_CLOSED) != 0;
}

VKP_API size_t vkp_mpsc_get_room(const vkp_mpsc_tx *tx)
{
    const vkp_i_lane *lane = tx->lane;
    uint64_t capacity = lane->channel->capacity;
    uint64_t head = VKP_I_LOAD_ACQ(&lane->head);
    uint64_t used = vkp_i_used(VKP_I_LOAD_ACQ(&lane->tail) >> 1, head);
    return capacity == UINT64_MAX ? SIZE_MAX : (size_t)(capacity - VKP_I_MIN(used, capacity));
}

VKP_API size_t vkp_mpsc_get_capacity(const vkp_mpsc_tx *tx)
{
    return tx->lane->channel->config.capacity_items;
}

VKP_API size_t vkp_mpsc_get_senders(const vkp_mpsc_tx *tx)
{
    const vkp_i_channel *channel = tx->lane->channel;
    return VKP_I_LOAD(channel->config.lanes ? &channel->handles : &tx->refs);
}

VKP_API size_t vkp_mpsc_get_weak_senders(const vkp_mpsc_tx *tx)
{
    return VKP_I_LOAD(&tx->lane->channel->weak.refs);
}

VKP_API void vkp_mpsc_close(vkp_mpsc_rx *rx)
{
    vkp_i_channel *channel;
    vkp_i_lane *lane;
    if (rx == NULL) {
        return;
    }
    channel = rx->channel;
    lane = &channel->lane;
    VKP_I_LOCK(&channel->mutex);
    for (; lane != NULL; lane = VKP_I_LOAD(&lane->next)) {
        (void)vkp_i_lane_freeze(lane); /* permanently: no ticket is given after this */
    }
    (void)VKP_I_OR(&channel->ended, VKP_I_ENDED_CLOSED);
    for (lane = &channel->lane; lane != NULL; lane = VKP_I_LOAD(&lane->next)) {
        while (!vkp_i_waiters_empty(&lane->senders)) {
            vkp_i_wait *sender = VKP_CONTAINER(lane->senders.head.next, vkp_i_wait, node);
            vkp_i_sender_finish(sender, VKP_ERR_CLOSED);
        }
        vkp_i_flag_lower(&lane->tx_waiting, 1u);
    }
    vkp_i_waiters_wake_all(&channel->closers);
    vkp_i_channel_wake_receiver(channel);
    VKP_I_UNLOCK(&channel->mutex);
}

VKP_API void vkp_mpsc_rx_unref(vkp_mpsc_rx *rx)
{
    vkp_i_channel *channel;
    if (rx == NULL) {
        return;
    }
    channel = rx->channel;
    vkp_mpsc_close(rx);
    /* From here on a sender that publishes late drops its value itself. */
    vkp_i_flag_raise(&channel->flags, VKP_I_RX_GONE);
    vkp_i_flag_fence(channel->config.env, channel->fenced);
    vkp_i_channel_purge(channel);
    vkp_i_channel_unref(channel);
}

static vkp_status vkp_i_case_closed_attempt(vkp_case *each, vkp_i_wait *wait)
{
    (void)wait;
    return vkp_mpsc_is_closed(&((vkp_i_channel *)each->i_object)->tx) ? VKP_OK : VKP_ERR_EMPTY;
}

static bool vkp_i_case_closed_is_ready(const vkp_case *each)
{
    return vkp_mpsc_is_closed(&((vkp_i_channel *)each->i_object)->tx);
}

static bool vkp_i_case_closed_join(const vkp_case *each, vkp_i_wait *wait)
{
    vkp_i_channel *channel = (vkp_i_channel *)each->i_object;
    bool closed;
    VKP_I_LOCK(&channel->mutex);
    closed = vkp_mpsc_is_closed(&channel->tx);
    if (!closed) {
        vkp_i_waiter_link(&channel->closers, &wait->node);
    }
    VKP_I_UNLOCK(&channel->mutex);
    return !closed;
}

static void vkp_i_case_closed_leave(const vkp_case *each, vkp_i_wait *wait)
{
    vkp_i_channel *channel = (vkp_i_channel *)each->i_object;
    VKP_I_LOCK(&channel->mutex);
    (void)vkp_i_waiter_unlink(&wait->node);
    VKP_I_UNLOCK(&channel->mutex);
}

static const vkp_i_case_kind vkp_i_case_closed = {
    vkp_i_case_closed_attempt, vkp_i_case_closed_is_ready, vkp_i_case_closed_join,
    vkp_i_case_closed_leave, vkp_i_case_recv_env};

VKP_API vkp_status vkp_mpsc_wait_closed(vkp_mpsc_tx *tx, uint64_t deadline_ns)
{
    vkp_i_channel *channel;
    vkp_case closed;
    VKP_I_REQUIRE(tx != NULL);
    channel = tx->lane->channel;
    closed = vkp_i_case(&vkp_i_case_closed, channel, NULL);
    return vkp_i_select_few(&closed, 1, channel->config.env, 0, deadline_ns);
}

/* The cases of a sender; their i_object is the lane, i_out the item or the permit. While such a
   case waits, its wait is linked in `senders`. FULL means not ready, which is EMPTY in a case. */
static vkp_status vkp_i_case_send_outcome(vkp_status status)
{
    return status == VKP_ERR_FULL ? VKP_ERR_EMPTY : status;
}

static vkp_status vkp_i_case_send_attempt(vkp_case *each, vkp_i_wait *wait)
{
    vkp_i_lane *lane = (vkp_i_lane *)each->i_object;
    return vkp_i_case_send_outcome(wait == NULL
                                       ? vkp_i_lane_try(lane, each->i_out, NULL)
                                       : vkp_i_lane_claim_place(lane, wait, each->i_out, NULL));
}

static vkp_status vkp_i_case_reserve_attempt(vkp_case *each, vkp_i_wait *wait)
{
    vkp_i_lane *lane = (vkp_i_lane *)each->i_object;
    vkp_mpsc_permit *permit = (vkp_mpsc_permit *)each->i_out;
    if (lane->channel->config.capacity_bytes != 0) {
        return VKP_ERR_INVALID; /* as vkp_mpsc_reserve: the cost is not known yet */
    }
    return vkp_i_case_send_outcome(wait == NULL ? vkp_i_lane_try(lane, NULL, permit)
                                                : vkp_i_lane_claim_place(lane, wait, NULL, permit));
}

static bool vkp_i_case_send_is_ready(const vkp_case *each)
{
    vkp_i_lane *lane = (vkp_i_lane *)each->i_object;
    bool ready;
    VKP_I_LOCK(&lane->channel->mutex);
    ready = vkp_mpsc_is_closed(&lane->channel->tx) ||
            (vkp_i_waiters_empty(&lane->senders) &&
             vkp_i_lane_has_room(lane, VKP_I_LOAD_ACQ(&lane->tail) >> 1, 0));
    VKP_I_UNLOCK(&lane->channel->mutex);
    return ready;
}

static bool vkp_i_case_send_join(const vkp_case *each, vkp_i_wait *wait)
{
    vkp_i_lane *lane = (vkp_i_lane *)each->i_object;
    wait->cost = vkp_i_channel_cost(lane->channel, each->i_out);
    vkp_i_lane_join(lane, wait);
    return true;
}

static bool vkp_i_case_reserve_join(const vkp_case *each, vkp_i_wait *wait)
{
    vkp_i_lane_join((vkp_i_lane *)each->i_object, wait);
    return true;
}

static void vkp_i_case_send_leave(const vkp_case *each, vkp_i_wait *wait)
{
    (void)vkp_i_lane_leave((vkp_i_lane *)each->i_object, wait);
}

static const vkp_env *vkp_i_case_send_env(const vkp_case *each)
{
    return ((vkp_i_lane *)each->i_object)->channel->config.env;
}

static const vkp_i_case_kind vkp_i_case_send = {vkp_i_case_send_attempt, vkp_i_case_send_is_ready,
                                                vkp_i_case_send_join, vkp_i_case_send_leave,
                                                vkp_i_case_send_env};
static const vkp_i_case_kind vkp_i_case_reserve = {
    vkp_i_case_reserve_attempt, vkp_i_case_send_is_ready, vkp_i_case_reserve_join,
    vkp_i_case_send_leave, vkp_i_case_send_env};

VKP_API vkp_case vkp_case_mpsc_recv(vkp_mpsc_rx *rx, void *out)
{
    return rx != NULL ? vkp_i_case(&vkp_i_case_recv, rx->channel, out) : vkp_case_never();
}

VKP_API vkp_case vkp_case_mpsc_send(vkp_mpsc_tx *tx, const void *item)
{
    return tx != NULL && item != NULL
               ? vkp_i_case(&vkp_i_case_send, tx->lane, (void *)(uintptr_t)item)
               : vkp_case_never();
}

VKP_API vkp_case vkp_case_mpsc_reserve(vkp_mpsc_tx *tx, vkp_mpsc_permit *permit)
{
    return tx != NULL && permit != NULL ? vkp_i_case(&vkp_i_case_reserve, tx->lane, permit)
                                        : vkp_case_never();
}

VKP_API vkp_case vkp_case_mpsc_closed(vkp_mpsc_tx *tx)
{
    return tx != NULL ? vkp_i_case(&vkp_i_case_closed, tx->lane->channel, NULL) : vkp_case_never();
}

#if VKP_I_IO
/* For queues that prefer the newest value: send, or when full, take the oldest value out into
   *evicted (*was_evicted is true then) and try once more. FULL with an eviction: the value is
   larger than the place of the oldest one, so call again.                                      */
static vkp_status vkp_i_mpsc_send_evict(vkp_mpsc_tx *tx, const void *item, void *evicted,
                                        bool *was_evicted)
{
    vkp_i_lane *lane = tx->lane;
    vkp_i_channel *channel = lane->channel;
    size_t cost = vkp_i_channel_cost(channel, item);
    vkp_status status;
    *was_evicted = false;
    VKP_I_LOCK(&channel->mutex);
    status = vkp_i_lane_send_locked(lane, item, cost, NULL, NULL);
    if (status == VKP_ERR_FULL) {
        const uint8_t *oldest = vkp_i_lane_oldest(lane);
        if (oldest != NULL) {
            memcpy(evicted, oldest, channel->config.elem_bytes);
            vkp_i_lane_pop(lane, oldest);
            *was_evicted = true;
            status = vkp_i_lane_send_locked(lane, item, cost, NULL, NULL);
        }
    }
    VKP_I_UNLOCK(&channel->mutex);
    return status;
}

/* The cost of the next value of the first lane; false when there is none. Receiver's thread. */
static bool vkp_i_mpsc_next_cost(const vkp_mpsc_rx *rx, size_t *cost)
{
    vkp_i_channel *channel = rx->channel;
    const uint8_t *item;
    VKP_I_LOCK(&channel->mutex);
    item = vkp_i_lane_oldest(&channel->lane);
    if (item != NULL) {
        *cost = vkp_i_channel_cost(channel, item);
    }
    VKP_I_UNLOCK(&channel->mutex);
    return item != NULL;
}
#endif

/* ======================================================================================
   >>impl-oneshot   One value, once, in the caller's memory
   ======================================================================================
   One state word decides which side ends the slot first; there is no lock. The sender writes the
   value, then sets SENT (or ABANDONED) with an exchange; the receiver sets CLOSED with an
   exchange, or with a plain store after it saw the end of the sender. The release of the exchange
   pairs with the acquire loads of the state: a receiver that sees SENT sees the value.
   RX_WAITING and TX_WAITING say that i_receiver or i_sender points to a wait. The side that ends
   the slot reads this pointer BEFORE its exchange, because the slot may be freed after the
   exchange; it wakes the wait, and then sets `done` of the wait. A side that leaves its wait after
   the slot ended waits for `done`: the other side is between two instructions.
   A side may wait several times (in a select that another case won). Each wait is a turn, counted
   in the state, so that an exchange fails that belongs to the pointer of an earlier wait. A slot
   on the heap has two references, one for each side.                                           */

#define VKP_I_SLOT_SENT 1u      /* the sender sent: the value is in the slot */
#define VKP_I_SLOT_ABANDONED 2u /* the sender ended without a value */
#define VKP_I_SLOT_CLOSED 4u    /* the receiver closed, or has taken the value */
#define VKP_I_SLOT_ENDED (VKP_I_SLOT_SENT | VKP_I_SLOT_ABANDONED | VKP_I_SLOT_CLOSED)
#define VKP_I_SLOT_RX_WAITING 8u  /* i_receiver points to a wait */
#define VKP_I_SLOT_TX_WAITING 16u /* i_sender points to a wait */
#define VKP_I_SLOT_HEAP 32u       /* the slot is that of a vkp_i_heap_slot */
#define VKP_I_SLOT_TURN 64u       /* one wait: this bit and those above count the waits */

typedef struct vkp_i_heap_slot {
    vkp_oneshot slot;
    size_t refs; /* atomic: one for each side */
} vkp_i_heap_slot;

VKP_API vkp_status vkp_oneshot_init(vkp_oneshot *slot, const vkp_env *env, size_t elem_bytes,
                                    void (*drop)(void *user, void *item), void *user)
{
    VKP_I_REQUIRE(slot != NULL && elem_bytes > 0 && elem_bytes <= VKP_ONESHOT_BYTES);
    VKP_I_STORE(&slot->i_state, 0u);
    slot->i_elem_bytes = (uint32_t)elem_bytes;
    slot->i_owner = NULL;
    slot->i_detach = NULL;
    slot->i_drop = drop;
    slot->i_user = user;
    slot->i_env = vkp_i_env(env);
    return VKP_OK;
}

VKP_API vkp_status vkp_oneshot_open(const vkp_env *env, size_t elem_bytes,
                                    void (*drop)(void *user, void *item), void *user,
                                    vkp_oneshot **slot)
{
    vkp_i_heap_slot *self;
    vkp_status status;
    VKP_I_REQUIRE(slot != NULL);
    self = (vkp_i_heap_slot *)vkp_i_alloc(vkp_i_env(env), sizeof *self);
    if (self == NULL) {
        return VKP_ERR_NOMEM;
    }
    status = vkp_oneshot_init(&self->slot, env, elem_bytes, drop, user);
    if (status != VKP_OK) {
        vkp_i_free(vkp_i_env(env), self, sizeof *self);
        return status;
    }
    VKP_I_STORE(&self->slot.i_state, VKP_I_SLOT_HEAP);
    VKP_I_STORE(&self->refs, (size_t)2);
    *slot = &self->slot;
    return VKP_OK;
}

/* Give a reference to a slot on the heap back. The side that finds a count of 1 is alone, and
   needs no exchange.                                                                           */
static void vkp_i_heap_slot_unref(vkp_oneshot *slot)
{
    vkp_i_heap_slot *self = VKP_CONTAINER(slot, vkp_i_heap_slot, slot);
    if (VKP_I_LOAD_ACQ(&self->refs) == 1 || VKP_I_UNREF(&self->refs) == 1) {
        vkp_i_free(slot->i_env, self, sizeof *self);
    }
}

/* Wake a wait; its memory may be freed once `done` is set. */
static void vkp_i_slot_wake(vkp_i_wait *wait)
{
    wait->node.wake(&wait->node);
    VKP_I_STORE_REL(&wait->done, 1u);
}

/* End the sender's side with SENT or ABANDONED; `state` is the state as loaded before. False
   when the receiver closed first.                                                              */
static inline bool vkp_i_oneshot_finish(vkp_oneshot *slot, uint32_t state, uint32_t outcome)
{
    while ((state & VKP_I_SLOT_ENDED) == 0) {
        bool waits = (state & VKP_I_SLOT_RX_WAITING) != 0;
        vkp_i_wait *receiver = waits ? (vkp_i_wait *)VKP_I_LOAD(&slot->i_receiver) : NULL;
        if (VKP_I_CAS(&slot->i_state, &state, (state & VKP_I_SLOT_HEAP) | outcome)) {
            if (receiver != NULL) {
                vkp_i_slot_wake(receiver);
            }
            return true;
        }
    }
    return false;
}

VKP_API vkp_status vkp_oneshot_send(vkp_oneshot *slot, const void *item)
{
    uint32_t state;
    void *value;
    VKP_I_REQUIRE(slot != NULL && item != NULL);
    state = VKP_I_LOAD_ACQ(&slot->i_state);
    VKP_I_REQUIRE((state & (VKP_I_SLOT_SENT | VKP_I_SLOT_ABANDONED)) == 0);
    value = slot->i_value.bytes;
    VKP_I_HIDE(value); /* the slot may be the caller's object, of a size that GCC knows */
    VKP_I_COPY_IN(value, item, slot->i_elem_bytes);
    return vkp_i_oneshot_finish(slot, state, VKP_I_SLOT_SENT) ? VKP_OK : VKP_ERR_CLOSED;
}

VKP_API void vkp_oneshot_abandon(vkp_oneshot *slot)
{
    if (slot != NULL) {
        (void)vkp_i_oneshot_finish(slot, VKP_I_LOAD_ACQ(&slot->i_state), VKP_I_SLOT_ABANDONED);
    }
}

VKP_API bool vkp_oneshot_is_closed(const vkp_oneshot *slot)
{
    return (VKP_I_LOAD_ACQ(&slot->i_state) & VKP_I_SLOT_CLOSED) != 0;
}

/* Take the value if it is there, and close: OK. EMPTY leaves the slot open; CLOSED when it ended
   without a value.                                                                             */
static inline vkp_status vkp_i_oneshot_take(vkp_oneshot *slot, void *out)
{
    uint32_t state = VKP_I_LOAD_ACQ(&slot->i_state);
    vkp_status status = VKP_ERR_CLOSED;
    if ((state & VKP_I_SLOT_ENDED) == 0) {
        return VKP_ERR_EMPTY;
    }
    if ((state & VKP_I_SLOT_SENT) != 0) {
        const void *value = slot->i_value.bytes;
        VKP_I_HIDE(value); /* as in send */
        VKP_I_COPY_OUT(out, value, slot->i_elem_bytes);
        status = VKP_OK;
    }
    VKP_I_STORE(&slot->i_state, (state & VKP_I_SLOT_HEAP) | VKP_I_SLOT_CLOSED);
    return status;
}

/* Close unless the sender has finished; false when the sender was first. */
static bool vkp_i_oneshot_close_first(vkp_oneshot *slot)
{
    uint32_t state = VKP_I_LOAD_ACQ(&slot->i_state);
    while ((state & VKP_I_SLOT_ENDED) == 0) {
        bool waits = (state & VKP_I_SLOT_TX_WAITING) != 0;
        vkp_i_wait *sender = waits ? (vkp_i_wait *)VKP_I_LOAD(&slot->i_sender) : NULL;
        void (*detach)(vkp_oneshot *) = slot->i_detach;
        if (VKP_I_CAS(&slot->i_state, &state, (state & VKP_I_SLOT_HEAP) | VKP_I_SLOT_CLOSED)) {
            if (sender != NULL) {
                vkp_i_slot_wake(sender);
            }
            if (detach != NULL) {
                detach(slot);
            }
            return true;
        }
    }
    return false;
}

VKP_API void vkp_oneshot_close(vkp_oneshot *slot)
{
    uint32_t state;
    if (slot == NULL || vkp_i_oneshot_close_first(slot)) {
        return;
    }
    state = VKP_I_LOAD_ACQ(&slot->i_state);
    if ((state & VKP_I_SLOT_SENT) != 0 && slot->i_drop != NULL) {
        slot->i_drop(slot->i_user, slot->i_value.bytes);
    }
    VKP_I_STORE(&slot->i_state, (state & VKP_I_SLOT_HEAP) | VKP_I_SLOT_CLOSED);
}

VKP_API void vkp_oneshot_tx_unref(vkp_oneshot *slot)
{
    if (slot != NULL) {
        bool on_heap = (VKP_I_LOAD(&slot->i_state) & VKP_I_SLOT_HEAP) != 0;
        vkp_oneshot_abandon(slot);
        if (on_heap) {
            vkp_i_heap_slot_unref(slot);
        }
    }
}

VKP_API void vkp_oneshot_rx_unref(vkp_oneshot *slot)
{
    if (slot != NULL) {
        bool on_heap = (VKP_I_LOAD(&slot->i_state) & VKP_I_SLOT_HEAP) != 0;
        vkp_oneshot_close(slot);
        if (on_heap) {
            vkp_i_heap_slot_unref(slot);
        }
    }
}

/* Wait for the end of the slot; `side` is RX_WAITING or TX_WAITING. False, and not waiting, when
   the slot has ended.                                                                          */
static bool vkp_i_oneshot_join(vkp_oneshot *slot, vkp_i_wait *waiter, uint32_t side)
{
    uint32_t state = VKP_I_LOAD_ACQ(&slot->i_state);
    VKP_I_STORE(&waiter->done, 0u);
    if (side == VKP_I_SLOT_RX_WAITING) {
        VKP_I_STORE(&slot->i_receiver, (void *)waiter);
    } else {
        VKP_I_STORE(&slot->i_sender, (void *)waiter);
    }
    while ((state & VKP_I_SLOT_ENDED) == 0) {
        if (VKP_I_CAS(&slot->i_state, &state, (state + VKP_I_SLOT_TURN) | side)) {
            return true;
        }
    }
    return false;
}

/* End a wait that vkp_i_oneshot_join began; its memory may be freed when this returns. */
static void vkp_i_oneshot_leave(vkp_oneshot *slot, vkp_i_wait *waiter, uint32_t side)
{
    uint32_t state;
    vkp_i_backoff backoff = {0};
    if (VKP_I_LOAD_ACQ(&waiter->done) != 0) {
        return;
    }
    state = VKP_I_LOAD_ACQ(&slot->i_state);
    while ((state & VKP_I_SLOT_ENDED) == 0) {
        if (VKP_I_CAS(&slot->i_state, &state, state & ~side)) {
            return;
        }
    }
    while (VKP_I_LOAD_ACQ(&waiter->done) == 0) {
        vkp_i_back_off(&backoff, vkp_i_sys(slot->i_env));
    }
}

static bool vkp_i_oneshot_has_ended(const vkp_case *each)
{
    vkp_oneshot *slot = (vkp_oneshot *)each->i_object;
    return (VKP_I_LOAD_ACQ(&slot->i_state) & VKP_I_SLOT_ENDED) != 0;
}

static const vkp_env *vkp_i_case_oneshot_env(const vkp_case *each)
{
    return ((vkp_oneshot *)each->i_object)->i_env;
}

/* Receive; the case never wins again afterwards. */
static vkp_status vkp_i_case_oneshot_attempt(vkp_case *each, vkp_i_wait *wait)
{
    vkp_oneshot *slot = (vkp_oneshot *)each->i_object;
    vkp_status status;
    if (!vkp_i_oneshot_has_ended(each)) {
        return VKP_ERR_EMPTY;
    }
    if (wait != NULL) {
        vkp_i_oneshot_leave(slot, wait, VKP_I_SLOT_RX_WAITING);
    }
    status = vkp_i_oneshot_take(slot, each->i_out);
    each->i_kind = &vkp_i_case_kind_never; /* the slot may be freed now */
    return status;
}

static bool vkp_i_case_oneshot_join(const vkp_case *each, vkp_i_wait *wait)
{
    return vkp_i_oneshot_join((vkp_oneshot *)each->i_object, wait, VKP_I_SLOT_RX_WAITING);
}

static void vkp_i_case_oneshot_leave(const vkp_case *each, vkp_i_wait *wait)
{
    vkp_i_oneshot_leave((vkp_oneshot *)each->i_object, wait, VKP_I_SLOT_RX_WAITING);
}

static const vkp_i_case_kind vkp_i_case_oneshot = {
    vkp_i_case_oneshot_attempt, vkp_i_oneshot_has_ended, vkp_i_case_oneshot_join,
    vkp_i_case_oneshot_leave, vkp_i_case_oneshot_env};

/* The sender's case: ready when the receiver has closed. */
static vkp_status vkp_i_case_oneshot_closed_attempt(vkp_case *each, vkp_i_wait *wait)
{
    (void)wait;
    return vkp_oneshot_is_closed((vkp_oneshot *)each->i_object) ? VKP_OK : VKP_ERR_EMPTY;
}

static bool vkp_i_case_oneshot_closed_join(const vkp_case *each, vkp_i_wait *wait)
{
    return vkp_i_oneshot_join((vkp_oneshot *)each->i_object, wait, VKP_I_SLOT_TX_WAITING);
}

static void vkp_i_case_oneshot_closed_leave(const vkp_case *each, vkp_i_wait *wait)
{
    vkp_i_oneshot_leave((vkp_oneshot *)each->i_object, wait, VKP_I_SLOT_TX_WAITING);
}

static const vkp_i_case_kind vkp_i_case_oneshot_closed = {
    vkp_i_case_oneshot_closed_attempt, vkp_i_oneshot_has_ended, vkp_i_case_oneshot_closed_join,
    vkp_i_case_oneshot_closed_leave, vkp_i_case_oneshot_env};

VKP_API vkp_status vkp_oneshot_recv(vkp_oneshot *slot, uint64_t deadline_ns, void *out)
{
    vkp_status status;
    VKP_I_REQUIRE(slot != NULL && out != NULL);
    status = vkp_i_oneshot_take(slot, out);
    if (status != VKP_ERR_EMPTY) {
        return status;
    }
    if (deadline_ns != 0) {
        const vkp_env *env = slot->i_env;
        vkp_case receive = vkp_i_case(&vkp_i_case_oneshot, slot, out);
        vkp_i_spin spin = {0, 0};
        uint32_t spins = vkp_i_spins(env);
        while (vkp_i_spin_again(&spin, vkp_i_sys(env), spins) &&
               !vkp_i_oneshot_has_ended(&receive)) {
        }
        status = vkp_i_select_few(&receive, 1, env, 0, deadline_ns);
        if (status != VKP_ERR_TIMEOUT) {
            return status;
        }
    }
    /* A value that arrives at the deadline is received: the side that ends the slot first wins. */
    return vkp_i_oneshot_close_first(slot) ? VKP_ERR_TIMEOUT : vkp_i_oneshot_take(slot, out);
}

VKP_API vkp_status vkp_oneshot_try_recv(vkp_oneshot *slot, void *out)
{
    VKP_I_REQUIRE(slot != NULL && out != NULL);
    return vkp_i_oneshot_take(slot, out);
}

VKP_API vkp_status vkp_oneshot_wait_closed(vkp_oneshot *slot, uint64_t deadline_ns)
{
    vkp_case closed;
    VKP_I_REQUIRE(slot != NULL);
    closed = vkp_i_case(&vkp_i_case_oneshot_closed, slot, NULL);
    return vkp_i_select_few(&closed, 1, slot->i_env, 0, deadline_ns);
}

VKP_API vkp_case vkp_case_oneshot_recv(vkp_oneshot *slot, void *out)
{
    return slot != NULL ? vkp_i_case(&vkp_i_case_oneshot, slot, out) : vkp_case_never();
}

VKP_API vkp_case vkp_case_oneshot_closed(vkp_oneshot *slot)
{
    return slot != NULL ? vkp_i_case(&vkp_i_case_oneshot_closed, slot, NULL) : vkp_case_never();
}

/* ======================================================================================
   >>impl-receivers   What broadcast and watch share
   ======================================================================================
   A channel with many receivers: their count, the waiting ones, and the sender that waits until no
   receiver is left. A sender stores its value (or `ended`), then checks the flag `waiting`; when
   it is raised, it lowers the flag and wakes all of `news` under the mutex. A receiver that waits
   links its waiter, raises the flag, and then checks once more (flags: section park). The last
   receiver wakes `closers` under the mutex, after its count.
   Lock order: the mutex, and under it only the lock that wake takes; no sender or receiver holds a
   latch when it takes the mutex.                                                               */

typedef struct vkp_i_receivers {
    const vkp_env *env;
    uint32_t spins;   /* pauses before a receiver sleeps */
    bool fenced;      /* there is no membarrier: flags and biases do without */
    uint32_t ended;   /* atomic: 1 when no sender is left */
    uint32_t waiting; /* flag: 1 while `news` is not empty */
    size_t receivers; /* atomic: their number */
    unsigned char pad_lists[VKP_I_APART];
    VKP_I_MUTEX mutex;     /* guards both lists */
    vkp_i_waiters news;    /* under the mutex: receivers that wait for a value or the end */
    vkp_i_waiters closers; /* under the mutex: waits until no receiver is left */
} vkp_i_receivers;

static void vkp_i_receivers_init(vkp_i_receivers *receivers, const vkp_env *env)
{
    receivers->env = env;
    receivers->spins = vkp_i_spins(env);
    receivers->fenced = vkp_i_flag_prepare(env);
    VKP_I_MUTEX_INIT(&receivers->mutex);
    vkp_i_waiters_init(&receivers->news);
    vkp_i_waiters_init(&receivers->closers);
}

static void vkp_i_receivers_deinit(vkp_i_receivers *receivers)
{
    VKP_I_MUTEX_DEINIT(&receivers->mutex);
}

/* After the store of a value or of the end: wake the receivers that wait. */
static inline void vkp_i_receivers_signal(vkp_i_receivers *receivers)
{
    if (vkp_i_flag_check(&receivers->waiting, receivers->fenced) != 0) {
        VKP_I_LOCK(&receivers->mutex);
        vkp_i_flag_lower(&receivers->waiting, 1u);
        vkp_i_waiters_wake_all(&receivers->news);
        VKP_I_UNLOCK(&receivers->mutex);
    }
}

/* The last sender gave its reference back: the channel has ended. */
static void vkp_i_receivers_end(vkp_i_receivers *receivers)
{
    VKP_I_STORE_REL(&receivers->ended, 1u);
    vkp_i_receivers_signal(receivers);
}

static bool vkp_i_receivers_is_ended(const vkp_i_receivers *receivers)
{
    return VKP_I_LOAD_ACQ(&receivers->ended) != 0;
}

/* The number of receivers. */
static size_t vkp_i_receivers_size(const vkp_i_receivers *receivers)
{
    return VKP_I_LOAD_ACQ(&receivers->receivers);
}

/* Link the waiter of a receiver, which must check once more afterwards. */
static void vkp_i_receivers_join(vkp_i_receivers *receivers, vkp_i_waiter *waiter)
{
    VKP_I_LOCK(&receivers->mutex);
    vkp_i_waiter_link(&receivers->news, waiter);
    vkp_i_flag_raise(&receivers->waiting, 1u);
    VKP_I_UNLOCK(&receivers->mutex);
    vkp_i_flag_fence(receivers->env, receivers->fenced);
}

/* Unlink the waiter of a receiver if it is linked; the last one lowers the flag. */
static void vkp_i_receivers_leave(vkp_i_receivers *receivers, vkp_i_waiter *waiter)
{
    VKP_I_LOCK(&receivers->mutex);
    if (vkp_i_waiter_unlink(waiter) && vkp_i_waiters_empty(&receivers->news)) {
        vkp_i_flag_lower(&receivers->waiting, 1u);
    }
    VKP_I_UNLOCK(&receivers->mutex);
}

/* Count one receiver less; when none is left, wake the waits for that. */
static void vkp_i_receivers_remove(vkp_i_receivers *receivers)
{
    if (VKP_I_UNREF(&receivers->receivers) == 1) {
        VKP_I_LOCK(&receivers->mutex);
        vkp_i_waiters_wake_all(&receivers->closers);
        VKP_I_UNLOCK(&receivers->mutex);
    }
}

static vkp_status vkp_i_case_no_receivers_attempt(vkp_case *each, vkp_i_wait *wait)
{
    (void)wait;
    return vkp_i_receivers_size((vkp_i_receivers *)each->i_object) == 0 ? VKP_OK : VKP_ERR_EMPTY;
}

static bool vkp_i_case_no_receivers_is_ready(const vkp_case *each)
{
    return vkp_i_receivers_size((vkp_i_receivers *)each->i_object) == 0;
}

static bool vkp_i_case_no_receivers_join(const vkp_case *each, vkp_i_wait *wait)
{
    vkp_i_receivers *receivers = (vkp_i_receivers *)each->i_object;
    bool ready;
    VKP_I_LOCK(&receivers->mutex); /* the last receiver counts, then wakes under the mutex */
    ready = vkp_i_case_no_receivers_is_ready(each);
    if (!ready) {
        vkp_i_waiter_link(&receivers->closers, &wait->node);
    }
    VKP_I_UNLOCK(&receivers->mutex);
    return !ready;
}

static void vkp_i_case_no_receivers_leave(const vkp_case *each, vkp_i_wait *wait)
{
    vkp_i_receivers *receivers = (vkp_i_receivers *)each->i_object;
    VKP_I_LOCK(&receivers->mutex);
    (void)vkp_i_waiter_unlink(&wait->node);
    VKP_I_UNLOCK(&receivers->mutex);
}

static const vkp_env *vkp_i_case_no_receivers_env(const vkp_case *each)
{
    return ((vkp_i_receivers *)each->i_object)->env;
}

/* The case that no receiver is left; i_object is the vkp_i_receivers. */
static const vkp_i_case_kind vkp_i_case_no_receivers = {
    vkp_i_case_no_receivers_attempt, vkp_i_case_no_receivers_is_ready, vkp_i_case_no_receivers_join,
    vkp_i_case_no_receivers_leave, vkp_i_case_no_receivers_env};

/* Wait until no receiver is left: OK, TIMEOUT or SYS. */
static vkp_status vkp_i_receivers_wait_gone(vkp_i_receivers *receivers, uint64_t deadline_ns)
{
    vkp_case gone = vkp_i_case(&vkp_i_case_no_receivers, receivers, NULL);
    return vkp_i_select_few(&gone, 1, receivers->env, 0, deadline_ns);
}

/* Copy a value into words that other threads may load meanwhile. The release of each word pairs
   with the acquire in vkp_i_words_load: a reader that sees a new word sees the seq stored before
   it.                                                                                          */
static inline void vkp_i_words_store(uint64_t *words, const void *item, size_t bytes)
{
    const uint8_t *from = (const uint8_t *)item;
    for (; bytes >= sizeof *words; bytes -= sizeof *words, from += sizeof *words, words++) {
        uint64_t word;
        memcpy(&word, from, sizeof word);
        VKP_I_STORE_REL(words, word);
    }
    if (bytes > 0) {
        uint64_t word = 0;
        memcpy(&word, from, bytes);
        VKP_I_STORE_REL(words, word);
    }
}

/* Copy a value out of words that another thread may store meanwhile; the caller checks the seq. */
static inline void vkp_i_words_load(void *out, const uint64_t *words, size_t bytes)
{
    uint8_t *to = (uint8_t *)out;
    for (; bytes >= sizeof *words; bytes -= sizeof *words, to += sizeof *words, words++) {
        uint64_t word = VKP_I_LOAD_ACQ(words);
        memcpy(to, &word, sizeof word);
    }
    if (bytes > 0) {
        uint64_t word = VKP_I_LOAD_ACQ(words);
        memcpy(to, &word, bytes);
    }
}

#define VKP_I_OWNED_BYTES 256u /* most bytes of a broadcast value with a drop: a handle */

/* ======================================================================================
   >>impl-broadcast   Every receiver sees every value
   ======================================================================================
   A ring of places. Tickets count the values since the beginning; each receiver has the ticket
   that it reads next. One sender at a time writes, under the latch of the channel, and never
   checks where receivers are. The `seq` of a place says which ticket it holds, and is odd while
   the place is written. A receiver loads `seq` before and after it copies the value, and so
   notices a sender that overtook it. Words are stored with release and loaded with acquire: a
   receiver that loads a word of a later value also sees the later `seq`.
   Values that own something (with retain and drop) are instead copied and retained under a latch
   of their place. Latch order: that of the channel, then that of a place. drop runs without a
   latch.
   A receiver that waits is linked in `receivers` (section receivers); each send wakes all waiting
   receivers after it stored `tail`.                                                            */

typedef struct vkp_i_broadcast {
    vkp_broadcast_config config; /* a copy; config.env is not NULL */
    size_t words;                /* of one value */
    size_t stride;               /* words of one place: seq, value, and with retain a latch */
    uint64_t mask;               /* number of places - 1; the number is a power of two */
    size_t refs;                 /* atomic: one of all senders together, one of each receiver */
    size_t tx_refs;              /* atomic: references of senders */
    uint64_t *places; /* the ring; word 0 of a place is its seq, 0 before the first value */
    unsigned char pad_sender[VKP_I_APART];
    uint64_t tail;            /* atomic: the next ticket */
    vkp_i_biased_latch latch; /* held by the sender that writes */
    vkp_i_receivers receivers;
} vkp_i_broadcast;

struct vkp_broadcast_tx {
    vkp_i_broadcast channel;
};

struct vkp_broadcast_rx {
    vkp_i_broadcast *channel;
    uint64_t next;   /* ticket of the next value to receive */
    uint64_t missed; /* values lost at the last LAGGED */
};

/* The place of the ticket; its first word is the seq. */
static uint64_t *vkp_i_place(const vkp_i_broadcast *channel, uint64_t ticket)
{
    return channel->places + (size_t)(ticket & channel->mask) * channel->stride;
}

/* The latch of a place, behind its value; only in channels with retain. */
static uint32_t *vkp_i_place_latch(const vkp_i_broadcast *channel, uint64_t *place)
{
    return (uint32_t *)(void *)(place + 1 + channel->words);
}

/* The seq of a place that holds the value of the ticket: even, and not 0. */
static uint64_t vkp_i_place_seq(uint64_t ticket)
{
    return (ticket + 1) << 1;
}

/* Give one of `refs` back; the last one drops the values in the ring and frees the channel. */
static void vkp_i_broadcast_unref(vkp_i_broadcast *channel)
{
    const vkp_env *env = channel->config.env;
    uint64_t i;
    if (VKP_I_UNREF(&channel->refs) != 1) {
        return;
    }
    for (i = 0; channel->config.drop != NULL && i <= channel->mask; i++) {
        uint64_t *place = vkp_i_place(channel, i);
        if (VKP_I_LOAD(place) != 0) {
            channel->config.drop(channel->config.user, place + 1);
        }
    }
    vkp_i_free(env, channel->places,
               (size_t)(channel->mask + 1) * channel->stride * sizeof(uint64_t));
    vkp_i_receivers_deinit(&channel->receivers);
    vkp_i_free(env, channel, sizeof *channel);
}

VKP_API vkp_status vkp_broadcast_open(const vkp_broadcast_config *config, vkp_broadcast_tx **tx)
{
    const vkp_env *env;
    vkp_i_broadcast *channel;
    size_t capacity = 1;
    VKP_I_REQUIRE(config != NULL && tx != NULL && config->capacity_items > 0);
    VKP_I_REQUIRE(config->elem_bytes > 0 && config->elem_bytes <= VKP_I_ELEM_MAX);
    VKP_I_REQUIRE((config->retain == NULL) == (config->drop == NULL));
    VKP_I_REQUIRE(config->retain == NULL || config->elem_bytes <= VKP_I_OWNED_BYTES);
    env = vkp_i_env(config->env);
    channel = (vkp_i_broadcast *)vkp_i_alloc_zero(env, sizeof *channel);
    if (channel == NULL) {
        return VKP_ERR_NOMEM;
    }
    channel->config = *config;
    channel->config.env = env;
    channel->words = (config->elem_bytes + sizeof(uint64_t) - 1) / sizeof(uint64_t);
    channel->stride = 1 + channel->words + (config->retain != NULL ? 1u : 0u);
    while (capacity < config->capacity_items && capacity <= SIZE_MAX / 4) {
        capacity *= 2;
    }
    if (capacity >= config->capacity_items &&
        capacity <= SIZE_MAX / (channel->stride * sizeof(uint64_t))) {
        channel->places =
            (uint64_t *)vkp_i_alloc_zero(env, capacity * channel->stride * sizeof(uint64_t));
    }
    if (channel->places == NULL) {
        vkp_i_free(env, channel, sizeof *channel);
        return VKP_ERR_NOMEM;
    }
    channel->mask = capacity - 1;
    channel->refs = 1;
    channel->tx_refs = 1;
    vkp_i_receivers_init(&channel->receivers, env);
    vkp_i_biased_init(&channel->latch, channel->receivers.fenced);
    *tx = (vkp_broadcast_tx *)(void *)channel;
    return VKP_OK;
}

VKP_API vkp_broadcast_tx *vkp_broadcast_tx_ref(vkp_broadcast_tx *tx)
{
    (void)VKP_I_ADD(&tx->channel.tx_refs, (size_t)1);
    return tx;
}

VKP_API void vkp_broadcast_tx_unref(vkp_broadcast_tx *tx)
{
    if (tx != NULL && VKP_I_UNREF(&tx->channel.tx_refs) == 1) {
        vkp_i_receivers_end(&tx->channel.receivers);
        vkp_i_broadcast_unref(&tx->channel);
    }
}

/* A receiver of the values sent from now on. OK or NOMEM. */
static vkp_status vkp_i_broadcast_subscribe(vkp_i_broadcast *channel, vkp_broadcast_rx **rx)
{
    vkp_broadcast_rx *self =
        (vkp_broadcast_rx *)vkp_i_alloc_zero(channel->config.env, sizeof *self);
    if (self == NULL) {
        return VKP_ERR_NOMEM;
    }
    self->channel = channel;
    (void)VKP_I_ADD(&channel->refs, (size_t)1);
    (void)VKP_I_ADD(&channel->receivers.receivers, (size_t)1);
    self->next = VKP_I_LOAD_ACQ(&channel->tail);
    *rx = self;
    return VKP_OK;
}

VKP_API vkp_status vkp_broadcast_subscribe(vkp_broadcast_tx *tx, vkp_broadcast_rx **rx)
{
    VKP_I_REQUIRE(tx != NULL && rx != NULL);
    return vkp_i_broadcast_subscribe(&tx->channel, rx);
}

VKP_API vkp_status vkp_broadcast_resubscribe(vkp_broadcast_rx *rx, vkp_broadcast_rx **fresh)
{
    VKP_I_REQUIRE(rx != NULL && fresh != NULL);
    return vkp_i_broadcast_subscribe(rx->channel, fresh);
}

VKP_API void vkp_broadcast_rx_unref(vkp_broadcast_rx *rx)
{
    vkp_i_broadcast *channel;
    if (rx == NULL) {
        return;
    }
    channel = rx->channel;
    vkp_i_receivers_remove(&channel->receivers);
    vkp_i_free(channel->config.env, rx, sizeof *rx);
    vkp_i_broadcast_unref(channel);
}

/* Latched: write the value into its place. True when it replaced a value that owns something:
   that value is in *old then, and the caller drops it.                                         */
static bool vkp_i_place_write(vkp_i_broadcast *channel, uint64_t ticket, const void *item,
                              void *old)
{
    uint64_t *place = vkp_i_place(channel, ticket);
    bool replaced = false;
    if (channel->config.retain != NULL) {
        vkp_i_latch_lock(vkp_i_place_latch(channel, place), vkp_i_sys(channel->config.env));
        replaced = VKP_I_LOAD(place) != 0;
        if (replaced) {
            VKP_I_COPY_OUT(old, place + 1, channel->config.elem_bytes);
        }
        VKP_I_COPY_IN(place + 1, item, channel->config.elem_bytes);
        VKP_I_STORE_REL(place, vkp_i_place_seq(ticket));
        vkp_i_latch_unlock(vkp_i_place_latch(channel, place));
    } else {
        VKP_I_STORE(place, VKP_I_LOAD(place) | 1u);
        vkp_i_words_store(place + 1, item, channel->config.elem_bytes);
        VKP_I_STORE_REL(place, vkp_i_place_seq(ticket));
    }
    return replaced;
}

VKP_API vkp_status vkp_broadcast_send(vkp_broadcast_tx *tx, const void *item)
{
    vkp_i_broadcast *channel;
    uint64_t old[VKP_I_OWNED_BYTES / sizeof(uint64_t)];
    bool drops;
    bool biased;
    VKP_I_REQUIRE(tx != NULL && item != NULL);
    channel = &tx->channel;
    if (vkp_i_receivers_size(&channel->receivers) == 0) {
        return VKP_ERR_CLOSED;
    }
    biased = vkp_i_biased_lock(&channel->latch, channel->config.env);
    {
        uint64_t ticket = VKP_I_LOAD(&channel->tail);
        drops = vkp_i_place_write(channel, ticket, item, old);
        VKP_I_STORE_REL(&channel->tail, ticket + 1);
    }
    vkp_i_biased_unlock(&channel->latch, biased);
    if (drops) {
        channel->config.drop(channel->config.user, old);
    }
    vkp_i_receivers_signal(&channel->receivers);
    return VKP_OK;
}

/* Copy the value of the ticket out; false when its place holds a later one, or is being written. */
static inline bool vkp_i_place_read(const vkp_i_broadcast *channel, uint64_t ticket, void *out)
{
    uint64_t *place = vkp_i_place(channel, ticket);
    uint64_t seq = vkp_i_place_seq(ticket);
    bool held;
    if (channel->config.retain == NULL) {
        if (VKP_I_LOAD_ACQ(place) != seq) {
            return false;
        }
        vkp_i_words_load(out, place + 1, channel->config.elem_bytes);
        return VKP_I_LOAD(place) == seq;
    }
    vkp_i_latch_lock(vkp_i_place_latch(channel, place), vkp_i_sys(channel->config.env));
    held = VKP_I_LOAD_ACQ(place) == seq;
    if (held) {
        VKP_I_COPY_OUT(out, place + 1, channel->config.elem_bytes);
        channel->config.retain(channel->config.user, out);
    }
    vkp_i_latch_unlock(vkp_i_place_latch(channel, place));
    return held;
}

/* The path of nearly every value; false, and nothing is taken, when it is not there or lost. */
static inline bool vkp_i_broadcast_take_one(vkp_broadcast_rx *rx, void *out)
{
    const vkp_i_broadcast *channel = rx->channel;
    if (rx->next == VKP_I_LOAD_ACQ(&channel->tail) || !vkp_i_place_read(channel, rx->next, out)) {
        return false;
    }
    rx->next++;
    return true;
}

/* Take up to `capacity` values without waiting: OK with their number, EMPTY, CLOSED, or LAGGED,
   which moves the receiver to the oldest value that is left.                                   */
static vkp_status vkp_i_broadcast_take(vkp_broadcast_rx *rx, uint8_t *out, size_t capacity,
                                       size_t *count)
{
    vkp_i_broadcast *channel = rx->channel;
    bool ended = vkp_i_receivers_is_ended(&channel->receivers);
    /* `tail` is loaded after `ended`: no value follows the end. */
    uint64_t tail = VKP_I_LOAD_ACQ(&channel->tail);
    size_t taken = 0;
    if (rx->next == tail) {
        return ended ? VKP_ERR_CLOSED : VKP_ERR_EMPTY;
    }
    while (taken < capacity && rx->next != tail && vkp_i_place_read(channel, rx->next, out)) {
        out += channel->config.elem_bytes;
        rx->next++;
        taken++;
    }
    if (taken == 0) {
        uint64_t oldest;
        tail = VKP_I_LOAD_ACQ(&channel->tail);
        oldest = tail > channel->mask ? tail - (channel->mask + 1) : 0;
        oldest = VKP_I_MAX(oldest, rx->next + 1); /* a sender replaces that of `next` */
        rx->missed = oldest - rx->next;
        rx->next = oldest;
        return VKP_ERR_LAGGED;
    }
    *count = taken;
    return VKP_OK;
}

static vkp_status vkp_i_case_value_attempt(vkp_case *each, vkp_i_wait *wait)
{
    size_t count;
    (void)wait;
    return vkp_i_broadcast_take((vkp_broadcast_rx *)each->i_object, (uint8_t *)each->i_out, 1,
                                &count);
}

/* As vkp_i_case_value_attempt, for several values: i_out is a vkp_i_batch. */
static vkp_status vkp_i_case_values_attempt(vkp_case *each, vkp_i_wait *wait)
{
    vkp_i_batch *batch = (vkp_i_batch *)each->i_out;
    (void)wait;
    return vkp_i_broadcast_take((vkp_broadcast_rx *)each->i_object, (uint8_t *)batch->out,
                                batch->capacity, &batch->count);
}

static bool vkp_i_case_value_is_ready(const vkp_case *each)
{
    const vkp_broadcast_rx *rx = (const vkp_broadcast_rx *)each->i_object;
    return vkp_i_receivers_is_ended(&rx->channel->receivers) ||
           VKP_I_LOAD_ACQ(&rx->channel->tail) != rx->next;
}

static void vkp_i_case_value_leave(const vkp_case *each, vkp_i_wait *wait)
{
    vkp_i_receivers_leave(&((vkp_broadcast_rx *)each->i_object)->channel->receivers, &wait->node);
}

static bool vkp_i_case_value_join(const vkp_case *each, vkp_i_wait *wait)
{
    vkp_i_receivers_join(&((vkp_broadcast_rx *)each->i_object)->channel->receivers, &wait->node);
    if (vkp_i_case_value_is_ready(each)) {
        vkp_i_case_value_leave(each, wait);
        return false;
    }
    return true;
}

static const vkp_env *vkp_i_case_value_env(const vkp_case *each)
{
    return ((vkp_broadcast_rx *)each->i_object)->channel->config.env;
}

static const vkp_i_case_kind vkp_i_case_value = {vkp_i_case_value_attempt,
                                                 vkp_i_case_value_is_ready, vkp_i_case_value_join,
                                                 vkp_i_case_value_leave, vkp_i_case_value_env};
static const vkp_i_case_kind vkp_i_case_values = {vkp_i_case_values_attempt,
                                                  vkp_i_case_value_is_ready, vkp_i_case_value_join,
                                                  vkp_i_case_value_leave, vkp_i_case_value_env};

VKP_API vkp_case vkp_case_broadcast_recv(vkp_broadcast_rx *rx, void *out)
{
    return rx != NULL ? vkp_i_case(&vkp_i_case_value, rx, out) : vkp_case_never();
}

VKP_API vkp_status vkp_broadcast_try_recv(vkp_broadcast_rx *rx, void *out)
{
    size_t count;
    VKP_I_REQUIRE(rx != NULL && out != NULL);
    return vkp_i_broadcast_take_one(rx, out) ? VKP_OK
                                             : vkp_i_broadcast_take(rx, (uint8_t *)out, 1, &count);
}

VKP_API vkp_status vkp_broadcast_recv_many(vkp_broadcast_rx *rx, uint64_t deadline_ns, void *out,
                                           size_t capacity, size_t *count)
{
    vkp_i_batch batch;
    vkp_case values;
    vkp_status status;
    VKP_I_REQUIRE(rx != NULL && out != NULL && capacity > 0 && count != NULL);
    batch.out = out;
    batch.capacity = capacity;
    values = vkp_i_case(&vkp_i_case_values, rx, &batch);
    status = vkp_i_select_few(&values, 1, rx->channel->config.env, rx->channel->receivers.spins,
                              deadline_ns);
    if (status == VKP_OK) {
        *count = batch.count;
    }
    return status;
}

VKP_API vkp_status vkp_broadcast_recv(vkp_broadcast_rx *rx, uint64_t deadline_ns, void *out)
{
    size_t count;
    VKP_I_REQUIRE(rx != NULL && out != NULL);
    return vkp_i_broadcast_take_one(rx, out)
               ? VKP_OK
               : vkp_broadcast_recv_many(rx, deadline_ns, out, 1, &count);
}

VKP_API uint64_t vkp_broadcast_get_missed(const vkp_broadcast_rx *rx)
{
    return rx->missed;
}

VKP_API uint64_t vkp_broadcast_get_len(const vkp_broadcast_rx *rx)
{
    return VKP_I_LOAD_ACQ(&rx->channel->tail) - rx->next;
}

VKP_API size_t vkp_broadcast_get_receivers(const vkp_broadcast_tx *tx)
{
    return vkp_i_receivers_size(&tx->channel.receivers);
}

VKP_API vkp_case vkp_case_broadcast_closed(vkp_broadcast_tx *tx)
{
    return tx != NULL ? vkp_i_case(&vkp_i_case_no_receivers, &tx->channel.receivers, NULL)
                      : vkp_case_never();
}

VKP_API vkp_status vkp_broadcast_wait_closed(vkp_broadcast_tx *tx, uint64_t deadline_ns)
{
    VKP_I_REQUIRE(tx != NULL);
    return vkp_i_receivers_wait_gone(&tx->channel.receivers, deadline_ns);
}

/* ======================================================================================
   >>impl-watch   Only the newest value
   ======================================================================================
   Values lie in cells. A sender fills a cell that is not current, not pinned by a borrow, and owns
   no value, and makes it current; a borrower pins the current cell. Both do so under the latch,
   for a few instructions (vkp_watch_send_if_modified: while modify runs). drop runs without the
   latch.
   Copying a value out takes no latch: a receiver loads the `seq` of the cell before and after it
   copies the words, and `seq` changes whenever the cell is filled. Words are stored with release
   and loaded with acquire: a receiver that loads a word of a later value also sees the later
   `seq`.
   A receiver that waits for a change is linked in `receivers` (section receivers); each new
   version wakes all waiting receivers after `version` is stored.                               */

typedef struct vkp_i_cell {
    struct vkp_i_cell *next; /* under the latch: the next of all cells */
    uint64_t seq;            /* atomic: version << 1; odd while the cell is filled */
    size_t pins;             /* under the latch: borrows of this cell */
    bool owns;               /* under the latch: holds a value that still has to be dropped */
    uint64_t words[1];       /* atomic: the value; longer than declared, see vkp_i_cell_bytes */
} vkp_i_cell;

typedef struct vkp_i_watch {
    vkp_watch_config config; /* a copy; config.env is not NULL */
    size_t words;            /* of one value */
    size_t refs;             /* atomic: one of all senders together, one of each receiver */
    size_t tx_refs;          /* atomic: references of senders */
    unsigned char pad_sender[VKP_I_APART];
    vkp_i_biased_latch latch; /* held for the changes of cells and versions */
    uint64_t version;         /* atomic: of the newest value */
    vkp_i_cell *current;      /* atomic: the cell of the newest value */
    vkp_i_cell *cells;        /* under the latch: all cells */
    uint64_t *scratch;        /* under the latch: for vkp_watch_send_if_modified, or NULL */
    vkp_i_receivers receivers;
} vkp_i_watch;

struct vkp_watch_tx {
    vkp_i_watch watch;
};

struct vkp_watch_rx {
    vkp_i_watch *watch;
    uint64_t seen;        /* newest version that counts as seen */
    vkp_i_cell *borrowed; /* cell of the current borrow, or NULL */
};

/* The size of a cell with its value. */
static size_t vkp_i_cell_bytes(const vkp_i_watch *watch)
{
    return sizeof(vkp_i_cell) + (watch->words - 1) * sizeof(uint64_t);
}

/* Latched: a cell to fill, whose seq is odd until vkp_i_watch_publish; NULL without memory. */
static vkp_i_cell *vkp_i_watch_take_cell(vkp_i_watch *watch)
{
    vkp_i_cell *cell = watch->cells;
    while (cell != NULL && (cell == VKP_I_LOAD(&watch->current) || cell->pins != 0 || cell->owns)) {
        cell = cell->next;
    }
    if (cell == NULL) {
        cell = (vkp_i_cell *)vkp_i_alloc_zero(watch->config.env, vkp_i_cell_bytes(watch));
        if (cell == NULL) {
            return NULL;
        }
        cell->next = watch->cells;
        watch->cells = cell;
    }
    VKP_I_STORE(&cell->seq, VKP_I_LOAD(&cell->seq) | 1u);
    return cell;
}

/* Latched: the cell is filled, and becomes the newest version. Gives the replaced cell if its
   value is to be dropped now, else NULL.                                                       */
static vkp_i_cell *vkp_i_watch_publish(vkp_i_watch *watch, vkp_i_cell *cell)
{
    vkp_i_cell *old = VKP_I_LOAD(&watch->current);
    uint64_t version = VKP_I_LOAD(&watch->version) + 1;
    cell->owns = watch->config.drop != NULL;
    VKP_I_STORE_REL(&cell->seq, version << 1);
    VKP_I_STORE_REL(&watch->current, cell);
    VKP_I_STORE_REL(&watch->version, version);
    return old != NULL && old->owns && old->pins == 0 ? old : NULL;
}

/* Drop the value of a replaced cell that no receiver borrows; NULL is ignored. `owns` keeps
   senders from filling the cell until the drop has returned.                                   */
static void vkp_i_watch_drop(vkp_i_watch *watch, vkp_i_cell *cell)
{
    if (cell != NULL) {
        bool biased;
        watch->config.drop(watch->config.user, cell->words);
        biased = vkp_i_biased_lock(&watch->latch, watch->config.env);
        cell->owns = false;
        vkp_i_biased_unlock(&watch->latch, biased);
    }
}

/* Give one of `refs` back; the last one drops the values and frees the channel. */
static void vkp_i_watch_unref(vkp_i_watch *watch)
{
    const vkp_env *env = watch->config.env;
    if (VKP_I_UNREF(&watch->refs) != 1) {
        return;
    }
    while (watch->cells != NULL) {
        vkp_i_cell *cell = watch->cells;
        watch->cells = cell->next;
        if (cell->owns) {
            watch->config.drop(watch->config.user, cell->words);
        }
        vkp_i_free(env, cell, vkp_i_cell_bytes(watch));
    }
    if (watch->scratch != NULL) {
        vkp_i_free(env, watch->scratch, watch->words * sizeof(uint64_t));
    }
    vkp_i_receivers_deinit(&watch->receivers);
    vkp_i_free(env, watch, sizeof *watch);
}

VKP_API vkp_status vkp_watch_open(const vkp_watch_config *config, vkp_watch_tx **tx)
{
    const vkp_env *env;
    vkp_i_watch *watch;
    vkp_i_cell *cell;
    VKP_I_REQUIRE(config != NULL && tx != NULL);
    VKP_I_REQUIRE(config->elem_bytes > 0 && config->elem_bytes <= VKP_I_ELEM_MAX);
    env = vkp_i_env(config->env);
    watch = (vkp_i_watch *)vkp_i_alloc_zero(env, sizeof *watch);
    if (watch == NULL) {
        return VKP_ERR_NOMEM;
    }
    watch->config = *config;
    watch->config.env = env;
    watch->words = (config->elem_bytes + sizeof(uint64_t) - 1) / sizeof(uint64_t);
    cell = vkp_i_watch_take_cell(watch);
    if (cell == NULL) {
        vkp_i_free(env, watch, sizeof *watch);
        return VKP_ERR_NOMEM;
    }
    if (config->initial != NULL) {
        vkp_i_words_store(cell->words, config->initial, config->elem_bytes);
    }
    (void)vkp_i_watch_publish(watch, cell);
    cell->owns = config->drop != NULL && config->initial != NULL;
    watch->refs = 1;
    watch->tx_refs = 1;
    vkp_i_receivers_init(&watch->receivers, env);
    vkp_i_biased_init(&watch->latch, watch->receivers.fenced);
    *tx = (vkp_watch_tx *)(void *)watch;
    return VKP_OK;
}

VKP_API vkp_watch_tx *vkp_watch_tx_ref(vkp_watch_tx *tx)
{
    (void)VKP_I_ADD(&tx->watch.tx_refs, (size_t)1);
    return tx;
}

VKP_API void vkp_watch_tx_unref(vkp_watch_tx *tx)
{
    vkp_i_watch *watch;
    if (tx == NULL) {
        return;
    }
    watch = &tx->watch;
    if (VKP_I_UNREF(&watch->tx_refs) == 1) {
        vkp_i_receivers_end(&watch->receivers);
        vkp_i_watch_unref(watch);
    }
}

/* A receiver for which the version `seen` counts as seen. OK or NOMEM. */
static vkp_status vkp_i_watch_subscribe(vkp_i_watch *watch, uint64_t seen, vkp_watch_rx **rx)
{
    vkp_watch_rx *self = (vkp_watch_rx *)vkp_i_alloc_zero(watch->config.env, sizeof *self);
    if (self == NULL) {
        return VKP_ERR_NOMEM;
    }
    self->watch = watch;
    self->seen = seen;
    (void)VKP_I_ADD(&watch->refs, (size_t)1);
    (void)VKP_I_ADD(&watch->receivers.receivers, (size_t)1);
    *rx = self;
    return VKP_OK;
}

VKP_API vkp_status vkp_watch_subscribe(vkp_watch_tx *tx, vkp_watch_rx **rx)
{
    VKP_I_REQUIRE(tx != NULL && rx != NULL);
    return vkp_i_watch_subscribe(&tx->watch, VKP_I_LOAD_ACQ(&tx->watch.version), rx);
}

VKP_API vkp_status vkp_watch_rx_clone(vkp_watch_rx *rx, vkp_watch_rx **copy)
{
    VKP_I_REQUIRE(rx != NULL && copy != NULL);
    return vkp_i_watch_subscribe(rx->watch, rx->seen, copy);
}

VKP_API void vkp_watch_rx_unref(vkp_watch_rx *rx)
{
    vkp_i_watch *watch;
    if (rx == NULL) {
        return;
    }
    watch = rx->watch;
    vkp_watch_release(rx);
    vkp_i_receivers_remove(&watch->receivers);
    vkp_i_free(watch->config.env, rx, sizeof *rx);
    vkp_i_watch_unref(watch);
}

VKP_API vkp_status vkp_watch_replace(vkp_watch_tx *tx, const void *item)
{
    vkp_i_watch *watch;
    vkp_i_cell *cell;
    vkp_i_cell *doomed = NULL;
    bool biased;
    VKP_I_REQUIRE(tx != NULL && item != NULL);
    watch = &tx->watch;
    biased = vkp_i_biased_lock(&watch->latch, watch->config.env);
    cell = vkp_i_watch_take_cell(watch);
    if (cell != NULL) {
        vkp_i_words_store(cell->words, item, watch->config.elem_bytes);
        doomed = vkp_i_watch_publish(watch, cell);
    }
    vkp_i_biased_unlock(&watch->latch, biased);
    if (cell == NULL) {
        return VKP_ERR_NOMEM;
    }
    vkp_i_watch_drop(watch, doomed);
    vkp_i_receivers_signal(&watch->receivers);
    return VKP_OK;
}

VKP_API vkp_status vkp_watch_send(vkp_watch_tx *tx, const void *item)
{
    VKP_I_REQUIRE(tx != NULL && item != NULL);
    return vkp_watch_get_receivers(tx) == 0 ? VKP_ERR_CLOSED : vkp_watch_replace(tx, item);
}

/* Latched: memory in which modify may write, apart from the cells; NULL without memory. */
static uint64_t *vkp_i_watch_scratch(vkp_i_watch *watch)
{
    if (watch->scratch == NULL) {
        watch->scratch =
            (uint64_t *)vkp_i_alloc_zero(watch->config.env, watch->words * sizeof(uint64_t));
    }
    return watch->scratch;
}

/* Latched: publish a new version made by modify. OK, with *modified false when modify changed
   nothing, or NOMEM.                                                                           */
static vkp_status vkp_i_watch_modify(vkp_i_watch *watch, bool (*modify)(void *user, void *item),
                                     void *user, bool *modified)
{
    uint64_t *scratch = vkp_i_watch_scratch(watch);
    vkp_i_cell *cell;
    *modified = false;
    if (scratch == NULL) {
        return VKP_ERR_NOMEM;
    }
    vkp_i_words_load(scratch, VKP_I_LOAD(&watch->current)->words, watch->config.elem_bytes);
    if (!modify(user, scratch)) {
        return VKP_OK;
    }
    cell = vkp_i_watch_take_cell(watch);
    if (cell == NULL) {
        return VKP_ERR_NOMEM;
    }
    vkp_i_words_store(cell->words, scratch, watch->config.elem_bytes);
    (void)vkp_i_watch_publish(watch, cell);
    *modified = true;
    return VKP_OK;
}

VKP_API vkp_status vkp_watch_send_if_modified(vkp_watch_tx *tx,
                                              bool (*modify)(void *user, void *item), void *user,
                                              bool *changed)
{
    vkp_i_watch *watch;
    vkp_status status;
    bool modified;
    bool biased;
    VKP_I_REQUIRE(tx != NULL && modify != NULL && tx->watch.config.drop == NULL);
    watch = &tx->watch;
    biased = vkp_i_biased_lock(&watch->latch, watch->config.env);
    status = vkp_i_watch_modify(watch, modify, user, &modified);
    vkp_i_biased_unlock(&watch->latch, biased);
    if (modified) {
        vkp_i_receivers_signal(&watch->receivers);
    }
    if (status == VKP_OK && changed != NULL) {
        *changed = modified;
    }
    return status;
}

/* Copy the newest value out; gives its version. Repeats while a sender interferes. */
static uint64_t vkp_i_watch_read(const vkp_i_watch *watch, void *out)
{
    vkp_i_backoff backoff = {0};
    for (;;) {
        const vkp_i_cell *cell = VKP_I_LOAD_ACQ(&watch->current);
        uint64_t seq = VKP_I_LOAD_ACQ(&cell->seq);
        if ((seq & 1u) == 0) {
            vkp_i_words_load(out, cell->words, watch->config.elem_bytes);
            /* `current` too: a cell filled again gets its seq before it becomes the newest. */
            if (VKP_I_LOAD(&cell->seq) == seq && VKP_I_LOAD(&watch->current) == cell) {
                return seq >> 1;
            }
        }
        vkp_i_back_off(&backoff, vkp_i_sys(watch->config.env));
    }
}

VKP_API vkp_status vkp_watch_get(vkp_watch_rx *rx, void *out)
{
    VKP_I_REQUIRE(rx != NULL && out != NULL && rx->watch->config.drop == NULL);
    (void)vkp_i_watch_read(rx->watch, out);
    return VKP_OK;
}

VKP_API vkp_status vkp_watch_get_and_update(vkp_watch_rx *rx, void *out)
{
    VKP_I_REQUIRE(rx != NULL && out != NULL && rx->watch->config.drop == NULL);
    rx->seen = vkp_i_watch_read(rx->watch, out);
    return VKP_OK;
}

VKP_API const void *vkp_watch_borrow(vkp_watch_rx *rx)
{
    vkp_i_watch *watch;
    bool biased;
    if (rx == NULL || rx->borrowed != NULL) {
        return NULL;
    }
    watch = rx->watch;
    biased = vkp_i_biased_lock(&watch->latch, watch->config.env);
    rx->borrowed = VKP_I_LOAD(&watch->current);
    rx->borrowed->pins++;
    vkp_i_biased_unlock(&watch->latch, biased);
    return rx->borrowed->words;
}

VKP_API const void *vkp_watch_borrow_and_update(vkp_watch_rx *rx)
{
    const void *item = vkp_watch_borrow(rx);
    if (item != NULL) {
        rx->seen = VKP_I_LOAD(&rx->borrowed->seq) >> 1;
    }
    return item;
}

VKP_API void vkp_watch_release(vkp_watch_rx *rx)
{
    vkp_i_watch *watch;
    vkp_i_cell *cell;
    bool last;
    bool biased;
    if (rx == NULL || rx->borrowed == NULL) {
        return;
    }
    watch = rx->watch;
    cell = rx->borrowed;
    rx->borrowed = NULL;
    biased = vkp_i_biased_lock(&watch->latch, watch->config.env);
    cell->pins--;
    last = cell->pins == 0 && cell->owns && cell != VKP_I_LOAD(&watch->current);
    vkp_i_biased_unlock(&watch->latch, biased);
    vkp_i_watch_drop(watch, last ? cell : NULL);
}

/* Signed, because `seen` may be ahead: vkp_watch_get_and_update can read a version before
   `version` is stored.                                                                         */
VKP_API bool vkp_watch_is_changed(const vkp_watch_rx *rx)
{
    return (int64_t)(VKP_I_LOAD_ACQ(&rx->watch->version) - rx->seen) > 0;
}

VKP_API void vkp_watch_mark_changed(vkp_watch_rx *rx)
{
    rx->seen = VKP_I_LOAD_ACQ(&rx->watch->version) - 1;
}

VKP_API void vkp_watch_mark_unchanged(vkp_watch_rx *rx)
{
    rx->seen = VKP_I_LOAD_ACQ(&rx->watch->version);
}

VKP_API bool vkp_watch_is_closed(const vkp_watch_rx *rx)
{
    return vkp_i_receivers_is_ended(&rx->watch->receivers);
}

VKP_API size_t vkp_watch_get_receivers(const vkp_watch_tx *tx)
{
    return vkp_i_receivers_size(&tx->watch.receivers);
}

/* OK marks the newest version as seen. */
static vkp_status vkp_i_case_changed_attempt(vkp_case *each, vkp_i_wait *wait)
{
    vkp_watch_rx *rx = (vkp_watch_rx *)each->i_object;
    bool closed = vkp_watch_is_closed(rx);
    (void)wait;
    if (!vkp_watch_is_changed(rx)) { /* checked after `closed`: no version follows the end */
        return closed ? VKP_ERR_CLOSED : VKP_ERR_EMPTY;
    }
    vkp_watch_mark_unchanged(rx);
    return VKP_OK;
}

static bool vkp_i_case_changed_is_ready(const vkp_case *each)
{
    const vkp_watch_rx *rx = (const vkp_watch_rx *)each->i_object;
    return vkp_watch_is_changed(rx) || vkp_watch_is_closed(rx);
}

static void vkp_i_case_changed_leave(const vkp_case *each, vkp_i_wait *wait)
{
    vkp_i_receivers_leave(&((vkp_watch_rx *)each->i_object)->watch->receivers, &wait->node);
}

static bool vkp_i_case_changed_join(const vkp_case *each, vkp_i_wait *wait)
{
    vkp_i_receivers_join(&((vkp_watch_rx *)each->i_object)->watch->receivers, &wait->node);
    if (vkp_i_case_changed_is_ready(each)) {
        vkp_i_case_changed_leave(each, wait);
        return false;
    }
    return true;
}

static const vkp_env *vkp_i_case_changed_env(const vkp_case *each)
{
    return ((vkp_watch_rx *)each->i_object)->watch->config.env;
}

static const vkp_i_case_kind vkp_i_case_changed = {
    vkp_i_case_changed_attempt, vkp_i_case_changed_is_ready, vkp_i_case_changed_join,
    vkp_i_case_changed_leave, vkp_i_case_changed_env};

VKP_API vkp_case vkp_case_watch_changed(vkp_watch_rx *rx)
{
    return rx != NULL ? vkp_i_case(&vkp_i_case_changed, rx, NULL) : vkp_case_never();
}

VKP_API vkp_status vkp_watch_changed(vkp_watch_rx *rx, uint64_t deadline_ns)
{
    vkp_case changed;
    VKP_I_REQUIRE(rx != NULL);
    changed = vkp_case_watch_changed(rx);
    return vkp_i_select_few(&changed, 1, rx->watch->config.env, rx->watch->receivers.spins,
                            deadline_ns);
}

VKP_API vkp_case vkp_case_watch_closed(vkp_watch_tx *tx)
{
    return tx != NULL ? vkp_i_case(&vkp_i_case_no_receivers, &tx->watch.receivers, NULL)
                      : vkp_case_never();
}

VKP_API vkp_status vkp_watch_wait_closed(vkp_watch_tx *tx, uint64_t deadline_ns)
{
    VKP_I_REQUIRE(tx != NULL);
    return vkp_i_receivers_wait_gone(&tx->watch.receivers, deadline_ns);
}

/* ======================================================================================
   >>impl-select   Wait for whichever comes first
   ======================================================================================
   The engine of select is vkp_i_select in the section park: every wait of the library, except
   plain sends and reserves of mpsc channels, is a select. This section has the public calls. It
   has no state and no lock: a select joins the objects of its cases one after the other and holds
   no lock of one object while it takes that of another.                                        */

/* i_object is set when the wait begins (vkp_i_sleeper_init). */
VKP_API vkp_case vkp_case_deadline(uint64_t deadline_ns)
{
    vkp_case each = vkp_i_case(&vkp_i_case_kind_deadline, NULL, NULL);
    each.i_number = deadline_ns;
    return each;
}

#if VKP_I_IO
VKP_API vkp_case vkp_case_fd(int fd, uint32_t interest)
{
    vkp_case each;
    if (fd < 0) {
        return vkp_case_never();
    }
    each = vkp_i_case(&vkp_i_case_kind_fd, NULL, NULL);
    each.i_number = (uint64_t)interest << 32 | (uint32_t)fd;
    return each;
}
#endif

/* A select pauses vkp_env.spins / this times before it sleeps: each time it tries all cases. */
#define VKP_I_SELECT_SPINS 8u

/* Select with the env of the first case that has an env, or with the default env. */
static vkp_status vkp_i_select_all(vkp_case *cases, size_t count, size_t start,
                                   uint64_t deadline_ns, size_t *won)
{
    vkp_i_wait waits[VKP_SELECT_MAX];
    const vkp_env *env = NULL;
    size_t i;
    for (i = 0; i < count && env == NULL; i++) {
        env = cases[i].i_kind->env(&cases[i]);
    }
    env = vkp_i_env(env);
    return vkp_i_select(cases, count, start, waits, vkp_i_sys(env),
                        vkp_i_spins(env) / VKP_I_SELECT_SPINS, deadline_ns, won);
}

VKP_API vkp_status vkp_select(vkp_case *cases, size_t count, uint64_t deadline_ns, size_t *won)
{
    VKP_I_REQUIRE(cases != NULL && count > 0 && count <= VKP_SELECT_MAX && won != NULL);
    return vkp_i_select_all(cases, count, 0, deadline_ns, won);
}

VKP_API vkp_status vkp_select_fair(vkp_case *cases, size_t count, uint32_t *turn,
                                   uint64_t deadline_ns, size_t *won)
{
    vkp_status status;
    VKP_I_REQUIRE(cases != NULL && count > 0 && count <= VKP_SELECT_MAX && won != NULL);
    VKP_I_REQUIRE(turn != NULL);
    status = vkp_i_select_all(cases, count, *turn % count, deadline_ns, won);
    if (status == VKP_OK) {
        *turn = (uint32_t)(*won + 1);
    }
    return status;
}

#if VKP_I_IO
/* ======================================================================================
   >>impl-loop   One thread's event loop
   ======================================================================================
   A round: wait on the backend, dispatch descriptors, run the tasks that other threads queued, run
   timers, then run the deferred work of the round (writes, closes) until none is left, then check
   the unarmed handlers.
   Other threads reach the loop through ONE lock-free queue of tasks. A thread pushes a task and
   then loads `asleep`; the loop stores `asleep` and then loads the queue. All four are seq_cst, so
   at least one side sees the other: no task waits for an unrelated event. Only the first thread
   that pushes finds `asleep` set, clears it and calls the backend's wake.
   A registered descriptor has a slot with a generation. The token of an event carries index and
   generation, so an event that was fetched before a stop, or before the descriptor's number was
   used again, matches no slot and is dropped.
   This section takes no lock. Fields that change after open and are not atomic belong to the
   loop's thread. */

/* One call of a function on the loop's thread; queued or deferred, not both. */
typedef struct vkp_i_task {
    struct vkp_i_task *next;             /* the next task of the queue, or of the deferred list */
    void (*fn)(struct vkp_i_task *task); /* may free the task */
} vkp_i_task;

/* The link of an object that needs a callback at vkp_loop_close and has no registered descriptor,
   which would receive ready 0. */
typedef struct vkp_i_attached {
    struct vkp_i_attached *prev; /* NULL: not attached */
    struct vkp_i_attached *next;
    vkp_loop *loop;
    void (*on_loop_close)(struct vkp_i_attached *self); /* called once, after the detach */
} vkp_i_attached;

/* The place of a registered descriptor. */
typedef struct vkp_i_slot {
    vkp_io *io;          /* NULL: the slot is free */
    uint32_t generation; /* counts the stops of this slot; part of the token of an event */
    uint32_t next_free;  /* index + 1 of the next free slot, 0: none */
} vkp_i_slot;

/* The entry of a running timer in the heap. */
typedef struct vkp_i_timer_entry {
    uint64_t deadline_ns; /* at least the loop's time when the timer was started */
    uint64_t order;       /* number of the start: equal deadlines fire in this order */
    vkp_timer *timer;
} vkp_i_timer_entry;

struct vkp_loop {
    const vkp_env *env;
    vkp_env host_env; /* the env that the backend receives: alloc and sys are never NULL */
    const vkp_sys *sys;
    const vkp_backend *backend;
    void *backend_state;   /* returned by the backend's open */
    vkp_backend_host host; /* given to the backend's open, valid until its close */
    size_t refs;           /* atomic */
    int opener_pid;        /* the process that opened the loop; another one is a forked child */

    vkp_i_task
        *queue;      /* atomic: tasks, newest first; &vkp_i_queue_closed once the loop is closed */
    uint32_t asleep; /* atomic, seq_cst with queue: 1 while a push must call the backend's wake */
    uint32_t stopping; /* atomic: vkp_loop_stop was called */
    uintptr_t thread;  /* atomic: the loop's thread (vkp_i_this_thread); 0: any thread */
    uint32_t running;  /* atomic: a thread is inside vkp_loop_run or vkp_loop_run_once */

    bool in_round;         /* inside a round or inside vkp_loop_close */
    bool closed;           /* vkp_loop_close was called */
    uint32_t unpolled;     /* rounds in a row that did not call the backend's wait */
    uint64_t reminder_ns;  /* guests: the deadline last given to the backend's timer */
    bool reminded;         /* guests: the timer for reminder_ns is set and has not fired */
    vkp_i_waiters unarmed; /* handlers that did not join their case: each round checks them */
    uint64_t now_ns;       /* the clock, read once in each round */
    vkp_event *events;     /* the events of one wait */
    size_t event_capacity;
    vkp_i_slot *slots;
    size_t slot_count; /* slots ever used, the free ones included */
    size_t slot_capacity;
    uint32_t free_slot;        /* index + 1 of the first free slot, 0: none */
    vkp_i_timer_entry *timers; /* a binary heap, the earliest deadline first */
    size_t timer_count;
    size_t timer_capacity;
    uint64_t timer_order;      /* number of the next start, see vkp_i_timer_entry */
    vkp_i_task *deferred;      /* tasks for the end of the round, oldest first */
    vkp_i_task **deferred_end; /* where the next deferred task is linked */
    vkp_i_attached attached;   /* sentinel of the ring of attached objects */
    vkp_block *read_block;     /* the read buffer that the loop's connections share */
    size_t read_bytes;         /* bytes of one read */
};

static vkp_i_task vkp_i_queue_closed; /* marks the queue of a closed loop; never run */

/* Identifies the calling thread: the address of a thread-local variable is cheap and unique. */
static uintptr_t vkp_i_this_thread(void)
{
    static __thread char name;
    return (uintptr_t)&name;
}

/* True on the loop's thread: first the thread that opened the loop, then the thread that runs it,
   also between rounds of vkp_loop_run_once. After vkp_loop_run or vkp_loop_close returned, true on
   any thread. */
static bool vkp_i_on_loop(const vkp_loop *loop)
{
    uintptr_t thread = VKP_I_LOAD_ACQ(&loop->thread);
    return thread == 0 || thread == vkp_i_this_thread();
}

/* Queue a task. Any thread. False: the loop is closed and the task stays the caller's. */
static bool vkp_i_loop_queue(vkp_loop *loop, vkp_i_task *task)
{
    vkp_i_task *newest = VKP_I_LOAD(&loop->queue);
    do {
        if (newest == &vkp_i_queue_closed) {
            return false;
        }
        task->next = newest;
    } while (!VKP_I_CAS_SEQ(&loop->queue, &newest, task));
    if (VKP_I_LOAD_SEQ(&loop->asleep) != 0 && VKP_I_XCHG_SEQ(&loop->asleep, 0u) != 0) {
        loop->backend->wake(loop->backend_state);
    }
    return true;
}

/* A deadline that never comes, but keeps a guest's timer set. */
#define VKP_I_SOME_DAY (VKP_FOREVER - 1)

/* Give a guest backend the next deadline: the foreign loop waits and knows only the timer set here.
   Called at the end of each round, and by every function that makes work outside of rounds. While
   objects are attached but nothing has a deadline, the timer is set to VKP_I_SOME_DAY: a foreign
   loop without timers would end although, for example, a handler waits for a channel. */
static vkp_status vkp_i_loop_set_guest_timer(vkp_loop *loop)
{
    uint64_t deadline_ns;
    vkp_status status = VKP_OK;
    if (loop->backend->timer == NULL || loop->in_round || loop->closed) {
        return VKP_OK;
    }
    deadline_ns = vkp_loop_get_deadline_ns(loop);
    if (deadline_ns == VKP_FOREVER && loop->attached.next != &loop->attached) {
        deadline_ns = VKP_I_SOME_DAY;
    }
    if (!loop->reminded || deadline_ns != loop->reminder_ns) {
        status = loop->backend->timer(loop->backend_state, deadline_ns);
        loop->reminded = status == VKP_OK;
        loop->reminder_ns = deadline_ns;
    }
    return status;
}

/* Run a task at the end of this round. Loop's thread. */
static void vkp_i_loop_defer(vkp_loop *loop, vkp_i_task *task)
{
    task->next = NULL;
    *loop->deferred_end = task;
    loop->deferred_end = &task->next;
    (void)!vkp_i_loop_set_guest_timer(loop);
}

/* Add an object to the ring whose on_loop_close is called by vkp_loop_close. Loop's thread. */
static void vkp_i_loop_attach(vkp_loop *loop, vkp_i_attached *object)
{
    object->prev = loop->attached.prev;
    object->next = &loop->attached;
    object->loop = loop;
    loop->attached.prev->next = object;
    loop->attached.prev = object;
    (void)!vkp_i_loop_set_guest_timer(loop);
}

/* Idempotent. Loop's thread. */
static void vkp_i_loop_detach(vkp_i_attached *object)
{
    if (object->prev != NULL) {
        object->prev->next = object->next;
        object->next->prev = object->prev;
        object->prev = NULL;
        object->next = NULL;
        (void)!vkp_i_loop_set_guest_timer(object->loop);
    }
}

/* Run a list of tasks, oldest first: the list arrives newest first. */
static void vkp_i_run_tasks(vkp_i_task *newest)
{
    vkp_i_task *oldest = NULL;
    while (newest != NULL) {
        vkp_i_task *next = newest->next;
        newest->next = oldest;
        oldest = newest;
        newest = next;
    }
    while (oldest != NULL) {
        vkp_i_task *next = oldest->next;
        oldest->fn(oldest);
        oldest = next;
    }
}

static void vkp_i_loop_run_queued(vkp_loop *loop)
{
    if (VKP_I_LOAD_SEQ(&loop->queue) != NULL) {
        vkp_i_run_tasks(VKP_I_XCHG_SEQ(&loop->queue, (vkp_i_task *)NULL));
    }
}

/* Run deferred tasks until none is left: a task deferred by a task runs in this round, too. */
static void vkp_i_loop_run_deferred(vkp_loop *loop)
{
    while (loop->deferred != NULL) {
        vkp_i_task *task = loop->deferred;
        loop->deferred = task->next;
        if (loop->deferred == NULL) {
            loop->deferred_end = &loop->deferred;
        }
        task->fn(task);
    }
}

/* Read the backend's virtual clock, or the system's clock. */
static uint64_t vkp_i_loop_clock(const vkp_loop *loop)
{
    return loop->backend->clock_ns != NULL ? loop->backend->clock_ns(loop->backend_state)
                                           : loop->sys->clock_ns();
}

/* The time of the round. Between rounds now_ns may be old (a foreign loop waits), so the clock is
   read. */
static uint64_t vkp_i_loop_now(const vkp_loop *loop)
{
    return loop->in_round ? loop->now_ns : vkp_i_loop_clock(loop);
}

VKP_API vkp_loop *vkp_loop_ref(vkp_loop *loop)
{
    (void)VKP_I_ADD(&loop->refs, 1);
    return loop;
}

VKP_API void vkp_loop_unref(vkp_loop *loop)
{
    if (loop == NULL || VKP_I_UNREF(&loop->refs) != 1) {
        return;
    }
    vkp_loop_close(loop);
    loop->backend->close(loop->backend_state);
    vkp_i_block_unref(loop->read_block);
    vkp_i_free(loop->env, loop->events, loop->event_capacity * sizeof(vkp_event));
    vkp_i_free(loop->env, loop->slots, loop->slot_capacity * sizeof(vkp_i_slot));
    vkp_i_free(loop->env, loop->timers, loop->timer_capacity * sizeof(vkp_i_timer_entry));
    vkp_i_free(loop->env, loop, sizeof *loop);
}

/* True in a forked child: it shares kernel objects with its parent, so it only frees memory. */
static bool vkp_i_loop_is_forked(const vkp_loop *loop)
{
    return loop->sys->process_id() != loop->opener_pid;
}

/* Notify attached objects, then every registered descriptor (with ready 0), of the close. */
static void vkp_i_loop_close_objects(vkp_loop *loop)
{
    size_t i;
    while (loop->attached.next != &loop->attached) {
        vkp_i_attached *object = loop->attached.next;
        vkp_i_loop_detach(object);
        object->on_loop_close(object);
    }
    for (i = 0; i < loop->slot_count; i++) {
        vkp_io *io = loop->slots[i].io;
        if (io != NULL) {
            vkp_io_stop(io);
            io->i_fn(io, 0);
        }
    }
}

VKP_API void vkp_loop_close(vkp_loop *loop)
{
    if (loop == NULL || loop->closed || loop->in_round) {
        return;
    }
    (void)vkp_loop_ref(loop); /* an object that closes here may give the last reference back */
    /* Another thread may have run the rounds: callbacks need this one to be the loop's thread. */
    VKP_I_STORE_REL(&loop->thread, vkp_i_this_thread());
    loop->in_round = true;
    vkp_i_loop_run_queued(loop);
    loop->closed = true; /* from here on nothing opens: it would miss the close */
    vkp_i_loop_close_objects(loop);
    vkp_i_loop_run_deferred(loop);
    /* Tasks that are queued by now run; tasks that they queue are refused. */
    vkp_i_run_tasks(VKP_I_XCHG_SEQ(&loop->queue, &vkp_i_queue_closed));
    vkp_i_loop_run_deferred(loop);
    while (loop->timer_count >
           0) { /* marked as stopped: vkp_timer_stop may come after the loop is freed */
        loop->timers[--loop->timer_count].timer->i_index = 0;
    }
    loop->in_round = false;
    if (loop->backend->timer != NULL) {
        (void)loop->backend->timer(loop->backend_state, VKP_FOREVER);
    }
    VKP_I_STORE_REL(&loop->thread, (uintptr_t)0);
    if (VKP_I_LOAD_ACQ(&loop->refs) > 1) {
        vkp_loop_unref(loop);
    } else {
        (void)VKP_I_SUB(&loop->refs, 1); /* called by the last unref, which frees the loop */
    }
}

VKP_API uint64_t vkp_loop_get_now_ns(const vkp_loop *loop)
{
    return vkp_i_loop_now(loop);
}

VKP_API uint64_t vkp_loop_after_ms(const vkp_loop *loop, uint64_t ms)
{
    return vkp_i_after_ms(vkp_loop_get_now_ns(loop), ms);
}

VKP_API int vkp_loop_get_fd(const vkp_loop *loop)
{
    return loop->backend->pollable_fd != NULL ? loop->backend->pollable_fd(loop->backend_state)
                                              : -1;
}

VKP_API uint64_t vkp_loop_get_deadline_ns(const vkp_loop *loop)
{
    if (VKP_I_LOAD_SEQ(&loop->queue) != NULL || loop->deferred != NULL ||
        !vkp_i_waiters_empty(&loop->unarmed)) {
        return 0;
    }
    return loop->timer_count > 0 ? loop->timers[0].deadline_ns : VKP_FOREVER;
}

/* ---- registered descriptors ---- */

/* The token of a slot: generation in the upper 32 bits, index in the lower. */
static uint64_t vkp_i_io_token(const vkp_loop *loop, uint32_t slot)
{
    return ((uint64_t)loop->slots[slot].generation << 32) | slot;
}

VKP_API vkp_status vkp_io_start(vkp_io *io, vkp_loop *loop, int fd, uint32_t interest,
                                void (*fn)(vkp_io *io, uint32_t ready))
{
    uint32_t slot;
    vkp_status status;
    VKP_I_REQUIRE(loop != NULL && io != NULL && fd >= 0 && fn != NULL);
    VKP_I_REQUIRE(!loop->closed && vkp_i_on_loop(loop));
    if (loop->free_slot != 0) {
        slot = loop->free_slot - 1;
    } else {
        void *slots = loop->slots;
        if (!vkp_i_grow(loop->env, &slots, &loop->slot_capacity, loop->slot_count + 1,
                        sizeof(vkp_i_slot))) {
            return VKP_ERR_NOMEM;
        }
        loop->slots = (vkp_i_slot *)slots;
        slot = (uint32_t)loop->slot_count++;
        memset(&loop->slots[slot], 0, sizeof loop->slots[slot]);
        loop->slots[slot].next_free = loop->free_slot;
        loop->free_slot = slot + 1;
    }
    status = loop->backend->set_interest(loop->backend_state, fd,
                                         interest & (VKP_IO_READ | VKP_IO_WRITE),
                                         vkp_i_io_token(loop, slot));
    if (status != VKP_OK) {
        return status;
    }
    loop->free_slot = loop->slots[slot].next_free;
    loop->slots[slot].io = io;
    io->i_loop = loop;
    io->i_fn = fn;
    io->i_fd = fd;
    io->i_slot = slot;
    io->i_interest = interest;
    return VKP_OK;
}

VKP_API vkp_status vkp_io_set(vkp_io *io, uint32_t interest)
{
    vkp_loop *loop;
    vkp_status status;
    VKP_I_REQUIRE(io != NULL && io->i_loop != NULL);
    loop = io->i_loop;
    interest &= VKP_IO_READ | VKP_IO_WRITE;
    if (io->i_interest == interest) {
        return VKP_OK;
    }
    status = loop->backend->set_interest(loop->backend_state, io->i_fd, interest,
                                         vkp_i_io_token(loop, io->i_slot));
    if (status == VKP_OK) {
        io->i_interest = interest;
    }
    return status;
}

VKP_API void vkp_io_stop(vkp_io *io)
{
    vkp_loop *loop = io->i_loop;
    vkp_i_slot *slot;
    if (loop == NULL) {
        return;
    }
    slot = &loop->slots[io->i_slot];
    if (!vkp_i_loop_is_forked(loop)) {
        (void)loop->backend->set_interest(loop->backend_state, io->i_fd, 0,
                                          vkp_i_io_token(loop, io->i_slot));
    }
    slot->io = NULL;
    slot->generation++;
    slot->next_free = loop->free_slot;
    loop->free_slot = io->i_slot + 1;
    io->i_loop = NULL;
}

/* Call the descriptor's callback, unless the slot was stopped or used again since the wait. */
static void vkp_i_loop_dispatch(vkp_loop *loop, const vkp_event *event)
{
    uint32_t index = (uint32_t)(event->token & 0xffffffffu);
    vkp_i_slot *slot = index < loop->slot_count ? &loop->slots[index] : NULL;
    if (slot != NULL && slot->io != NULL && event->ready != 0 &&
        slot->generation == (uint32_t)(event->token >> 32)) {
        slot->io->i_fn(slot->io, event->ready);
    }
}

/* ---- timers: a binary heap, earliest first ---- */

/* Whether timer a fires before timer b. */
static bool vkp_i_timer_before(const vkp_i_timer_entry *a, const vkp_i_timer_entry *b)
{
    return a->deadline_ns != b->deadline_ns ? a->deadline_ns < b->deadline_ns : a->order < b->order;
}

/* Store an entry in the heap and record its index in the timer. */
static void vkp_i_timer_place(vkp_loop *loop, size_t index, vkp_i_timer_entry entry)
{
    loop->timers[index] = entry;
    entry.timer->i_index = index + 1;
}

/* Place an entry at the index or nearer to the root, where the heap's order holds. */
static void vkp_i_timer_sift_up(vkp_loop *loop, size_t index, vkp_i_timer_entry entry)
{
    while (index > 0) {
        size_t parent = (index - 1) / 2;
        if (!vkp_i_timer_before(&entry, &loop->timers[parent])) {
            break;
        }
        vkp_i_timer_place(loop, index, loop->timers[parent]);
        index = parent;
    }
    vkp_i_timer_place(loop, index, entry);
}

/* Place an entry at the index or farther from the root, where the heap's order holds. */
static void vkp_i_timer_sift_down(vkp_loop *loop, size_t index, vkp_i_timer_entry entry)
{
    for (;;) {
        size_t child = 2 * index + 1;
        if (child >= loop->timer_count) {
            break;
        }
        if (child + 1 < loop->timer_count &&
            vkp_i_timer_before(&loop->timers[child + 1], &loop->timers[child])) {
            child++;
        }
        if (!vkp_i_timer_before(&loop->timers[child], &entry)) {
            break;
        }
        vkp_i_timer_place(loop, index, loop->timers[child]);
        index = child;
    }
    vkp_i_timer_place(loop, index, entry);
}

/* Take a timer out of the heap; the last entry fills the hole. Idempotent. */
static void vkp_i_timer_remove(vkp_timer *timer)
{
    vkp_loop *loop = timer->i_loop;
    size_t index;
    vkp_i_timer_entry last;
    if (timer->i_index == 0) {
        return;
    }
    index = timer->i_index - 1;
    timer->i_index = 0;
    last = loop->timers[--loop->timer_count];
    if (index == loop->timer_count) {
        return;
    }
    if (index > 0 && vkp_i_timer_before(&last, &loop->timers[(index - 1) / 2])) {
        vkp_i_timer_sift_up(loop, index, last);
    } else {
        vkp_i_timer_sift_down(loop, index, last);
    }
}

VKP_API void vkp_timer_stop(vkp_timer *timer)
{
    if (timer->i_index != 0) {
        vkp_i_timer_remove(timer);
        (void)!vkp_i_loop_set_guest_timer(timer->i_loop); /* on failure: one idle round */
    }
}

VKP_API vkp_status vkp_timer_start(vkp_timer *timer, vkp_loop *loop, void (*fn)(vkp_timer *timer),
                                   uint64_t period_ns, uint64_t deadline_ns)
{
    vkp_i_timer_entry entry;
    void *timers;
    vkp_status status;
    VKP_I_REQUIRE(loop != NULL && timer != NULL && fn != NULL && vkp_i_on_loop(loop));
    timers = loop->timers;
    if (!vkp_i_grow(loop->env, &timers, &loop->timer_capacity, loop->timer_count + 1,
                    sizeof(vkp_i_timer_entry))) {
        return VKP_ERR_NOMEM;
    }
    loop->timers = (vkp_i_timer_entry *)timers;
    vkp_i_timer_remove(timer);
    timer->i_loop = loop;
    timer->i_fn = fn;
    timer->i_deadline_ns = deadline_ns;
    timer->i_period_ns = period_ns;
    /* Overdue timers are equally due: a timer that restarts itself in the past fires last. */
    entry.deadline_ns = VKP_I_MAX(deadline_ns, loop->now_ns);
    entry.order = loop->timer_order++;
    entry.timer = timer;
    vkp_i_timer_sift_up(loop, loop->timer_count++, entry);
    status = vkp_i_loop_set_guest_timer(loop);
    if (status != VKP_OK) {
        vkp_timer_stop(timer);
    }
    return status;
}

/* a + b, or VKP_FOREVER on overflow. */
static uint64_t vkp_i_add_ns(uint64_t a, uint64_t b)
{
    return b > VKP_FOREVER - a ? VKP_FOREVER : a + b;
}

/* Run the timers that were started before this call and are due. A timer that restarts itself in
   the past fires again in the next round, so the round ends. */
static void vkp_i_loop_run_timers(vkp_loop *loop)
{
    uint64_t newest = loop->timer_order;
    while (loop->timer_count > 0 && loop->timers[0].deadline_ns <= loop->now_ns &&
           loop->timers[0].order < newest) {
        vkp_timer *timer = loop->timers[0].timer;
        vkp_i_timer_remove(timer);
        if (timer->i_period_ns != 0) {
            uint64_t next = vkp_i_add_ns(timer->i_deadline_ns, timer->i_period_ns);
            if (next <= loop->now_ns) {
                next = vkp_i_add_ns(loop->now_ns, timer->i_period_ns);
            }
            /* Cannot fail for memory: the removed entry left room in the heap. */
            (void)!vkp_timer_start(timer, loop, timer->i_fn, timer->i_period_ns, next);
        }
        timer->i_fn(timer);
    }
}

#endif /* VKP_I_IO */

#if VKP_I_IO
/* ======================================================================================
   >>impl-handler   Callbacks of a loop for channels
   ======================================================================================
   Between two calls of fn a handler is queued (its task is in the loop's queue), unarmed (linked
   to loop->unarmed, checked at the end of each round) or joined (linked to its case; a wake-up from
   any thread queues the task).
   The task calls fn if the case is ready, and makes the handler unarmed. At the end of the round
   the loop queues the tasks of unarmed handlers with a ready case, behind all other tasks: a busy
   channel does not starve the loop. The others join their cases once no task is queued.
   The struct is freed when its task is not queued, fn does not run and the handle was given back.
   No user code runs under a lock: wake runs under the case's lock and only queues the task. */

struct vkp_handler {
    vkp_i_task task;         /* runs vkp_i_handler_run on the loop's thread */
    vkp_i_attached attached; /* ends the handler when the loop closes */
    vkp_i_wait wait;         /* its node is linked to the case (joined) or to loop->unarmed */
    vkp_loop *loop;          /* a reference */
    vkp_case what;           /* the case to wait for, copied */
    void (*fn)(void *user);
    void *user;
    bool busy;     /* the task is queued; written by the waking thread, read after leave */
    bool joined;   /* the wait is linked to the case; loop's thread only */
    bool running;  /* inside fn; loop's thread only */
    bool ended;    /* fn is not called again; loop's thread only */
    bool released; /* the handle was given back; loop's thread only */
};

/* Queue the task. Any thread under the case's lock, or the loop's thread. */
static void vkp_i_handler_wake(vkp_i_waiter *waiter)
{
    vkp_handler *handler = VKP_CONTAINER(waiter, vkp_handler, wait.node);
    handler->busy = true;
    if (!vkp_i_loop_queue(handler->loop, &handler->task)) {
        handler->busy = false; /* the loop is closed: the task never runs */
    }
}

/* Unlink from the case or from the loop's unarmed handlers. Afterwards no thread calls wake. */
static void vkp_i_handler_leave(vkp_handler *handler)
{
    if (handler->joined) {
        handler->joined = false;
        handler->what.i_kind->leave(&handler->what, &handler->wait);
    } else {
        (void)vkp_i_waiter_unlink(&handler->wait.node); /* from loop->unarmed */
    }
}

static void vkp_i_handler_end(vkp_handler *handler)
{
    if (!handler->ended) {
        handler->ended = true;
        vkp_i_loop_detach(&handler->attached);
        vkp_i_handler_leave(handler);
    }
}

/* Free the handler if nothing uses it any longer. */
static void vkp_i_handler_free(vkp_handler *handler)
{
    vkp_loop *loop = handler->loop;
    if (handler->released && !handler->busy && !handler->running) {
        vkp_i_free(loop->env, handler, sizeof *handler);
        vkp_loop_unref(loop);
    }
}

/* Join the case, or queue the task immediately when the case is ready. */
static void vkp_i_handler_arm(vkp_handler *handler)
{
    const vkp_i_case_kind *kind = handler->what.i_kind;
    handler->wait.status = VKP_OK;
    if (!kind->is_ready(&handler->what) && kind->join(&handler->what, &handler->wait)) {
        handler->joined = true;
    } else if (!handler->busy) { /* busy: the case woke the handler during join */
        vkp_i_handler_wake(&handler->wait.node);
    }
}

/* Called at the end of a round. While the loop has work, it checks unarmed handlers itself: joining
   a case costs this thread (other threads must see it) and the thread that then wakes it. */
static void vkp_i_loop_arm(vkp_loop *loop)
{
    vkp_i_waiter *node = loop->unarmed.head.next;
    while (node != &loop->unarmed.head) {
        vkp_handler *handler = VKP_CONTAINER(node, vkp_handler, wait.node);
        node = node->next;
        if (handler->what.i_kind->is_ready(&handler->what)) {
            (void)vkp_i_waiter_unlink(&handler->wait.node);
            vkp_i_handler_wake(&handler->wait.node);
        }
    }
    while (VKP_I_LOAD(&loop->queue) == NULL && !vkp_i_waiters_empty(&loop->unarmed)) {
        vkp_handler *handler = VKP_CONTAINER(loop->unarmed.head.next, vkp_handler, wait.node);
        (void)vkp_i_waiter_unlink(&handler->wait.node);
        vkp_i_handler_arm(handler);
    }
}

/* The handler's task: call fn if the case is still ready, then make the handler unarmed. */
static void vkp_i_handler_run(vkp_i_task *task)
{
    vkp_handler *handler = VKP_CONTAINER(task, vkp_handler, task);
    vkp_i_handler_leave(handler);
    handler->busy = false;
    if (!handler->ended && handler->what.i_kind->is_ready(&handler->what)) {
        handler->running = true;
        handler->fn(handler->user);
        handler->running = false;
    }
    if (!handler->ended) {
        vkp_i_waiter_link(&handler->loop->unarmed, &handler->wait.node);
    }
    vkp_i_handler_free(handler);
}

static void vkp_i_handler_loop_closed(vkp_i_attached *attached)
{
    vkp_i_handler_end(VKP_CONTAINER(attached, vkp_handler, attached));
}

VKP_API vkp_status vkp_handler_open(vkp_loop *loop, const vkp_case *what, void (*fn)(void *user),
                                    void *user, vkp_handler **out)
{
    vkp_handler *self;
    VKP_I_REQUIRE(loop != NULL && what != NULL && fn != NULL && out != NULL);
    VKP_I_REQUIRE(!loop->closed && vkp_i_on_loop(loop));
    VKP_I_REQUIRE(what->i_kind != &vkp_i_case_kind_deadline && what->i_kind != &vkp_i_case_kind_fd);
    self = (vkp_handler *)vkp_i_alloc_zero(loop->env, sizeof *self);
    if (self == NULL) {
        return VKP_ERR_NOMEM;
    }
    self->task.fn = vkp_i_handler_run;
    self->attached.on_loop_close = vkp_i_handler_loop_closed;
    self->wait.node.wake = vkp_i_handler_wake;
    self->loop = vkp_loop_ref(loop);
    self->what = *what;
    self->fn = fn;
    self->user = user;
    *out = self;
    vkp_i_loop_attach(loop, &self->attached);
    vkp_i_handler_arm(self);
    return VKP_OK;
}

VKP_API void vkp_handler_close(vkp_handler *handler)
{
    if (handler != NULL) {
        vkp_i_handler_end(handler);
    }
}

VKP_API void vkp_handler_unref(vkp_handler *handler)
{
    if (handler != NULL) {
        vkp_i_handler_end(handler);
        handler->released = true;
        vkp_i_handler_free(handler);
    }
}

#endif /* VKP_I_IO */

#if VKP_I_IO
/* ======================================================================================
   >>impl-loop-run   The rounds of a loop, and its opening
   ======================================================================================
   The order of a round: wait, clear `asleep`, descriptors, queued tasks, timers, deferred tasks,
   handlers, set `asleep`. Between the two stores of `asleep` a push costs no wake: the round itself
   runs the queue, or the next round sees the task before it waits.
   `running` lets one thread at a time into the rounds; `in_round` refuses a round inside a
   callback. `thread` is stored when a thread enters, and 0 after vkp_loop_run or vkp_loop_close.
   A guest backend never blocks: the foreign loop calls vkp_i_backend_round, and each round ends by
   giving the guest the next deadline. */

#define VKP_I_UNPOLLED 8u /* most rounds in a row in which vkp_loop_run skips the backend's wait */

#define VKP_I_EVENTS_PER_WAIT 256u            /* default of events_per_wait */
#define VKP_I_READ_BYTES 65536u               /* default of read_bytes */
#define VKP_I_LEAST_READ_BYTES ((size_t)1024) /* lowest read_bytes */

/* One round. While tasks are queued, up to `unpolled` rounds in a row skip the backend's wait, and
   descriptors are not checked in them. */
static vkp_status vkp_i_loop_round(vkp_loop *loop, uint64_t deadline_ns, uint32_t unpolled)
{
    size_t count = 0;
    size_t i;
    vkp_status status;
    deadline_ns = VKP_I_MIN(deadline_ns, vkp_loop_get_deadline_ns(loop));
    if (VKP_I_LOAD_ACQ(&loop->stopping) != 0) {
        deadline_ns = 0;
    }
    if (VKP_I_LOAD(&loop->queue) != NULL && loop->unpolled < unpolled) {
        loop->unpolled++;
        status = VKP_OK;
    } else {
        loop->unpolled = 0;
        status = loop->backend->wait(loop->backend_state, deadline_ns, loop->events,
                                     loop->event_capacity, &count);
    }
    VKP_I_STORE_SEQ(&loop->asleep, 0u);
    loop->now_ns = vkp_i_loop_clock(loop);
    if (loop->reminder_ns <= loop->now_ns) {
        loop->reminded = false; /* the guest's timer fired, or fires in vain: set it again */
    }
    if (status != VKP_OK) {
        count = 0;
    }
    loop->in_round = true;
    for (i = 0; i < count; i++) {
        vkp_i_loop_dispatch(loop, &loop->events[i]);
    }
    vkp_i_loop_run_queued(loop);
    vkp_i_loop_run_timers(loop);
    vkp_i_loop_run_deferred(loop);
    vkp_i_loop_arm(loop);
    loop->in_round = false;
    /* From here on a push calls wake. The next round loads the queue again before it waits. */
    VKP_I_STORE_SEQ(&loop->asleep, 1u);
    if (vkp_i_loop_set_guest_timer(loop) != VKP_OK && status == VKP_OK) {
        status = VKP_ERR_SYS;
    }
    return status;
}

/* Become the loop's thread. False: another thread runs the loop, this is inside a callback, or the
   loop is closed. */
static bool vkp_i_loop_enter(vkp_loop *loop)
{
    uint32_t idle = 0;
    if (!VKP_I_CAS(&loop->running, &idle, 1u)) {
        return false;
    }
    if (loop->closed || loop->in_round) {
        VKP_I_STORE_REL(&loop->running, 0u);
        return false;
    }
    VKP_I_STORE_REL(&loop->thread, vkp_i_this_thread());
    return true;
}

VKP_API vkp_status vkp_loop_run_once(vkp_loop *loop, uint64_t deadline_ns)
{
    vkp_status status;
    VKP_I_REQUIRE(loop != NULL && vkp_i_loop_enter(loop));
    status = vkp_i_loop_round(loop, deadline_ns, 0);
    VKP_I_STORE_REL(&loop->running, 0u);
    return status;
}

VKP_API vkp_status vkp_loop_run(vkp_loop *loop)
{
    vkp_status status = VKP_OK;
    VKP_I_REQUIRE(loop != NULL && (loop->backend->flags & VKP_BACKEND_GUEST) == 0);
    VKP_I_REQUIRE(vkp_i_loop_enter(loop));
    do {
        status = vkp_i_loop_round(loop, VKP_FOREVER, VKP_I_UNPOLLED);
    } while (status == VKP_OK && VKP_I_LOAD_ACQ(&loop->stopping) == 0);
    VKP_I_STORE(&loop->stopping, 0u);
    VKP_I_STORE_REL(&loop->thread, (uintptr_t)0);
    VKP_I_STORE_REL(&loop->running, 0u);
    return status;
}

VKP_API void vkp_loop_stop(vkp_loop *loop)
{
    VKP_I_STORE_REL(&loop->stopping, 1u);
    loop->backend->wake(loop->backend_state);
}

/* One call of vkp_loop_post. */
typedef struct vkp_i_post {
    vkp_i_task task;
    const vkp_env *env; /* allocated the post, and frees it */
    void (*fn)(void *user);
    void *user;
} vkp_i_post;

/* Free the post, then call the program's function. */
static void vkp_i_run_post(vkp_i_task *task)
{
    vkp_i_post *post = VKP_CONTAINER(task, vkp_i_post, task);
    void (*fn)(void *user) = post->fn;
    void *user = post->user;
    vkp_i_free(post->env, post, sizeof *post);
    fn(user);
}

VKP_API vkp_status vkp_loop_post(vkp_loop *loop, void (*fn)(void *user), void *user)
{
    vkp_i_post *post;
    VKP_I_REQUIRE(loop != NULL && fn != NULL);
    post = (vkp_i_post *)vkp_i_alloc(loop->env, sizeof *post);
    if (post == NULL) {
        return VKP_ERR_NOMEM;
    }
    post->task.fn = vkp_i_run_post;
    post->env = loop->env;
    post->fn = fn;
    post->user = user;
    if (!vkp_i_loop_queue(loop, &post->task)) {
        vkp_i_free(loop->env, post, sizeof *post);
        return VKP_ERR_CLOSED;
    }
    return VKP_OK;
}

/* ---- opening ---- */

/* A guest's timer fired: run a round without waiting. A program may run its foreign loop inside one
   of our callbacks, or after it closed our loop: then no round runs. Inside a callback the guest's
   timer is used up, so the round under way sets it again at its end. */
static void vkp_i_backend_round(void *user)
{
    vkp_loop *loop = (vkp_loop *)user;
    if (loop->in_round) {
        loop->reminded = false;
    } else if (!loop->closed) {
        (void)!vkp_loop_run_once(loop, 0); /* a guest has no caller for the status */
    }
}

/* Apply defaults, allocate the events and open the backend. On failure the caller frees events. */
static vkp_status vkp_i_loop_setup(vkp_loop *loop, const vkp_loop_config *config)
{
    vkp_status status;
    loop->event_capacity =
        config->events_per_wait != 0 ? config->events_per_wait : VKP_I_EVENTS_PER_WAIT;
    loop->read_bytes = config->read_bytes != 0 ? config->read_bytes : VKP_I_READ_BYTES;
    loop->read_bytes = VKP_I_MAX(loop->read_bytes, VKP_I_LEAST_READ_BYTES);
    loop->events = (vkp_event *)vkp_i_alloc(loop->env, loop->event_capacity * sizeof(vkp_event));
    if (loop->events == NULL) {
        return VKP_ERR_NOMEM;
    }
    loop->host_env = *loop->env;
    loop->host_env.sys = loop->sys;
    if (loop->host_env.alloc == NULL) {
        loop->host_env.alloc = vkp_i_libc_alloc;
    }
    loop->host.env = &loop->host_env;
    loop->host.foreign = config->foreign;
    loop->host.loop = loop;
    loop->host.round = vkp_i_backend_round;
    status = loop->backend->open(&loop->host, &loop->backend_state);
    /* The deadline 0 makes a guest run a round first: tasks may be posted before the foreign loop
       runs. */
    if (status == VKP_OK && loop->backend->timer != NULL) {
        status = loop->backend->timer(loop->backend_state, 0);
        loop->reminded = true;
        if (status != VKP_OK) {
            loop->backend->close(loop->backend_state);
        }
    }
    return status;
}

VKP_API vkp_status vkp_loop_open(const vkp_loop_config *config, vkp_loop **out)
{
    vkp_loop *loop;
    vkp_status status;
    const vkp_env *env;
    VKP_I_REQUIRE(config != NULL && out != NULL);
    env = vkp_i_env(config->env);
    if (config->backend == NULL || config->backend->abi != VKP_BACKEND_ABI) {
        vkp_i_log(env, VKP_LOG_ERROR,
                  "vkp_loop_open: config.backend is missing or of another version: pass "
                  "&vkp_backend_poll or &vkp_backend_epoll and link its file from backends/");
        return VKP_ERR_INVALID;
    }
    loop = (vkp_loop *)vkp_i_alloc_zero(env, sizeof *loop);
    if (loop == NULL) {
        return VKP_ERR_NOMEM;
    }
    loop->env = env;
    loop->sys = vkp_i_sys(env);
    loop->backend = config->backend;
    loop->refs = 1;
    loop->opener_pid = loop->sys->process_id();
    loop->thread = vkp_i_this_thread();
    loop->asleep = 1;
    loop->deferred_end = &loop->deferred;
    vkp_i_waiters_init(&loop->unarmed);
    loop->attached.prev = &loop->attached;
    loop->attached.next = &loop->attached;
    status = vkp_i_loop_setup(loop, config);
    if (status != VKP_OK) {
        vkp_i_free(env, loop->events, loop->event_capacity * sizeof(vkp_event));
        vkp_i_free(env, loop, sizeof *loop);
        return status;
    }
    loop->now_ns = vkp_i_loop_clock(loop);
    *out = loop;
    return VKP_OK;
}

#endif /* VKP_I_IO */

#if VKP_I_IO
/* ======================================================================================
   >>impl-value   Values of RESP2 and RESP3
   ======================================================================================
   Read-only functions over trees that the reader made: any thread, no locks, no allocation.
   `span` of a value is the number of array places that the value and all its elements take, so
   value + value->span is its next sibling. Walks skip attributes and VKP_VALUE_OUT_OF_BAND pushes.
   The text of a double is validated when it is read (vkp_i_double_valid); later conversions rely on
   that and cannot fail. */

#define VKP_I_VERBATIM_PREFIX 4u /* bytes before the text of a verbatim string: "txt:" */

/* Whether the value counts as an element of the aggregate around it. */
static bool vkp_i_value_is_element(const vkp_value *value)
{
    return value->type != VKP_RESP_ATTRIBUTE && (value->flags & VKP_VALUE_OUT_OF_BAND) == 0;
}

/* Whether a push of this kind inside a reply is no element of it. Servers write messages and
   invalidations when they happen, also in the midst of a reply: messages before 7.2, invalidations
   before 7.0. The confirmation of a SUBSCRIBE inside a MULTI is an element: it is what the command
   answers.                                                                                    */
static bool vkp_i_is_uncounted_kind(const char *text, size_t len)
{
    static const char *const kinds[] = {"message", "pmessage", "smessage", "invalidate",
                                        "tracking-redir-broken"};
    size_t i;
    for (i = 0; i < sizeof kinds / sizeof kinds[0]; i++) {
        if (vkp_i_str_equal(vkp_i_str(text, len), vkp_str_of(kinds[i]))) {
            return true;
        }
    }
    return false;
}

/* The first element of parent at `value` or behind it, or NULL. */
static const vkp_value *vkp_i_value_from(const vkp_value *parent, const vkp_value *value)
{
    const vkp_value *end = parent + parent->span;
    while (value < end && !vkp_i_value_is_element(value)) {
        value += value->span;
    }
    return value < end ? value : NULL;
}

VKP_API const vkp_value *vkp_value_get_first(const vkp_value *parent)
{
    return vkp_i_value_from(parent, parent + 1);
}

VKP_API const vkp_value *vkp_value_get_next(const vkp_value *parent, const vkp_value *value)
{
    return value != NULL ? vkp_i_value_from(parent, value + value->span) : NULL;
}

VKP_API vkp_str vkp_value_get_str(const vkp_value *value)
{
    bool text = value != NULL && (value->type == VKP_RESP_STRING || value->type == VKP_RESP_ERROR ||
                                  value->type == VKP_RESP_BIGNUM || value->type == VKP_RESP_DOUBLE);
    return text ? vkp_i_str(value->u.str, value->len) : vkp_i_str(NULL, 0);
}

VKP_API bool vkp_value_is_text(const vkp_value *value, vkp_str text)
{
    return (value->type == VKP_RESP_STRING || value->type == VKP_RESP_ERROR) && text.ptr != NULL &&
           vkp_i_str_alike(vkp_value_get_str(value), text);
}

/* ---- doubles ---- */

/* How many decimal digits follow at `at`. */
static size_t vkp_i_digits(const char *text, size_t len, size_t at)
{
    size_t start = at;
    while (at < len && text[at] >= '0' && text[at] <= '9') {
        at++;
    }
    return at - start;
}

#define VKP_I_EXPONENT_MAX 100000000L /* exponents saturate here; a double has -324 to 308 */
#define VKP_I_DOUBLE_DIGITS 780u /* digits that the conversion keeps; 768 decide any rounding */
#define VKP_I_DOUBLE_TEXT 840u   /* bytes: sign, kept digits, sticky digit, exponent, NUL */

/* The exponent at `at`, with its sign, saturated a little above VKP_I_EXPONENT_MAX. */
static long vkp_i_to_exponent(const char *text, size_t len, size_t at)
{
    bool negative = at < len && text[at] == '-';
    long value = 0;
    at += at < len && (text[at] == '-' || text[at] == '+') ? 1u : 0u;
    for (; at < len && value <= VKP_I_EXPONENT_MAX; at++) {
        value = value * 10 + (text[at] - '0');
    }
    return negative ? -value : value;
}

/* strtod of validated text in any locale: the copy has no decimal point, it is an integer with an
   exponent. No tie between two doubles needs more than 768 digits; one sticky digit stands for the
   digits that were cut: 1 if one of them was not zero. */
static double vkp_i_to_double(const char *text, size_t len)
{
    char copy[VKP_I_DOUBLE_TEXT];
    size_t used = 0;
    size_t kept = 0;
    size_t i = 0;
    long shift = 0;
    bool fraction = false;
    bool cut = false;
    if (text[0] == '-' || text[0] == '+') {
        copy[used++] = text[i++];
    }
    for (; i < len && text[i] != 'e' && text[i] != 'E'; i++) {
        if (text[i] == '.') {
            fraction = true;
            continue;
        }
        shift -= fraction ? 1 : 0;
        if (kept < VKP_I_DOUBLE_DIGITS) {
            copy[used] = text[i];
            used += kept > 0 || text[i] != '0' ? 1u : 0u;
            kept += kept > 0 || text[i] != '0' ? 1u : 0u;
        } else {
            shift++;
            cut = cut || text[i] != '0';
        }
    }
    if (cut || kept == 0) {
        copy[used++] = cut ? '1' : '0';
        shift -= cut ? 1 : 0;
    }
    if (i < len) {
        long exponent = vkp_i_to_exponent(text, len, i + 1);
        shift = exponent > VKP_I_EXPONENT_MAX    ? VKP_I_EXPONENT_MAX
                : exponent < -VKP_I_EXPONENT_MAX ? -VKP_I_EXPONENT_MAX
                                                 : shift + exponent;
    }
    (void)snprintf(copy + used, sizeof copy - used, "e%ld", shift);
    return strtod(copy, NULL);
}

/* DBL_MAX and not a literal: a decimal literal is slightly less where doubles are computed with
   more bits (x87). */
#define VKP_I_DOUBLE_MAX DBL_MAX

/* Whether the text is a finite double of the RESP3 grammar, or "inf", "-inf" or "nan". Lenient:
   also "nan(x)", "-nan", "5." and ".5" of old servers. */
static bool vkp_i_double_valid(const char *text, size_t len, bool lenient)
{
    vkp_str all = vkp_i_str(text, len);
    size_t at = len > 0 && (text[0] == '-' || text[0] == '+') ? 1 : 0;
    size_t whole;
    size_t fraction = 0;
    double value;
    if (vkp_i_str_equal(all, vkp_str_of("inf")) || vkp_i_str_equal(all, vkp_str_of("-inf")) ||
        vkp_i_str_equal(all, vkp_str_of("nan"))) {
        return true;
    }
    if (lenient && len >= at + 3 && memcmp(text + at, "nan", 3) == 0) {
        return len == at + 3 || (text[at + 3] == '(' && text[len - 1] == ')');
    }
    whole = vkp_i_digits(text, len, at);
    at += whole;
    if (at < len && text[at] == '.') {
        fraction = vkp_i_digits(text, len, at + 1);
        at += 1 + fraction;
        if (lenient ? whole + fraction == 0 : whole == 0 || fraction == 0) {
            return false;
        }
    } else if (whole == 0) {
        return false;
    }
    if (at < len && (text[at] == 'e' || text[at] == 'E')) {
        size_t exponent;
        at++;
        at += at < len && (text[at] == '-' || text[at] == '+') ? 1u : 0u;
        exponent = vkp_i_digits(text, len, at);
        at += exponent;
        if (exponent == 0) {
            return false;
        }
    }
    if (at != len) {
        return false;
    }
    value = vkp_i_to_double(text, len);
    return value <= VKP_I_DOUBLE_MAX && value >= -VKP_I_DOUBLE_MAX;
}

VKP_API double vkp_value_get_double(const vkp_value *value)
{
    const char *text = value->u.str;
    double infinity = VKP_I_DOUBLE_MAX * 10.0;
    size_t at;
    if (value->type == VKP_RESP_INTEGER) {
        return (double)value->u.integer;
    }
    if (value->type != VKP_RESP_DOUBLE) {
        return 0.0;
    }
    at = text[0] == '-' || text[0] == '+' ? 1 : 0;
    if (text[at] == 'i') {
        return at == 1 ? -infinity : infinity;
    }
    if (text[at] == 'n') {
        return infinity - infinity;
    }
    return vkp_i_to_double(text, value->len);
}

#endif /* VKP_I_IO */

#if VKP_I_IO
/* ======================================================================================
   >>impl-resp   RESP2 and RESP3
   ======================================================================================
   The reader scans a window that starts at the current frame. `position` is the end of the values
   that are complete. Bytes behind it are scanned again when more bytes arrive; that costs at most
   one header of 22 bytes, and a line continues at `line_seen`.
   Values of an incomplete frame hold offsets into the window; they become pointers when the frame
   is complete, so the window may move between two scans. Open aggregates are a stack of counters:
   no recursion, and nothing is allocated for an announced count.
   Each step grows its arrays before it changes anything else, so NOMEM can be retried. */

#define VKP_I_READER_MOST_DEPTH 65000u  /* highest max_depth: vkp_value.i_depth has 16 bits */
#define VKP_I_READER_REASON_BYTES 160   /* bytes of an error text, its NUL included */
#define VKP_I_READER_KEPT_VALUES 32768u /* larger value arrays are freed after their frame */
#define VKP_I_QUICK_VALUES 4u           /* values of a message: push, kind, channel, payload */
#define VKP_I_QUICK_DIGITS 8u           /* longest length that the quick path reads */
#define VKP_I_KIND_LEN 7u               /* bytes of "message" */
#define VKP_I_TLS_ALERT 0x15            /* first byte of a TLS record: an alert */
#define VKP_I_TLS_HANDSHAKE 0x16        /* first byte of a TLS record: a handshake */

/* An aggregate that is not complete yet. */
typedef struct vkp_i_level {
    size_t index;       /* index of the aggregate in reader->values */
    uint64_t remaining; /* elements of the aggregate that are not complete yet */
    size_t attribute;   /* index + 1 of the attribute before the next element; 0: none */
} vkp_i_level;

struct vkp_resp_reader {
    const vkp_env *env;
    vkp_resp_config config;  /* defaults filled in */
    vkp_status status;       /* OK, or the sticky error */
    uint64_t error_position; /* of the wrong byte, counted since open or reset */
    bool end_known; /* the sticky error is about one value: vkp_i_skip finds the frame's end */
    char reason[VKP_I_READER_REASON_BYTES]; /* text of the sticky error, or "" */
    uint64_t consumed;                      /* bytes of whole frames since open or reset */
    size_t position;                        /* end of the complete values in the window */
    size_t line_seen;  /* where the search for the end of a line continues; 0: at its start */
    bool whole;        /* the last scan returned a frame: the next scan starts a new one */
    bool quick;        /* the limits allow vkp_i_reader_quick */
    bool quick_values; /* values[0] to values[3] have the constant fields of a message */
    size_t attribute;  /* index + 1 of the attribute before the root value; 0: none */
    vkp_value *values; /* the values of the frame, in reading order */
    size_t count;
    size_t capacity;
    vkp_i_level *levels; /* stack of the open aggregates */
    size_t depth;        /* number of open aggregates */
    size_t level_capacity;
    uint8_t *buffer; /* bytes that feed copied */
    size_t begin;    /* offset of the first unread byte in buffer */
    size_t end;      /* offset behind the last byte in buffer */
    size_t buffer_capacity;
    size_t given; /* bytes of the frame that next returned; dropped at the next call */
};

/* The start of the frame that a subscriber receives most; the channel's length follows. */
static const char vkp_i_message_prefix[] = ">3\r\n$7\r\nmessage\r\n$";
#define VKP_I_MESSAGE_PREFIX 18u /* bytes of vkp_i_message_prefix */

static bool vkp_i_is_crlf(const uint8_t *at, const uint8_t *end)
{
    return end - at >= 2 && memcmp(at, "\r\n", 2) == 0;
}

/* Whether the frame starts with vkp_i_message_prefix. */
static bool vkp_i_is_message(const uint8_t *frame, size_t len)
{
    return len >= VKP_I_MESSAGE_PREFIX &&
           vkp_i_load64(frame) == vkp_i_load64(vkp_i_message_prefix) &&
           vkp_i_load64(frame + 8) == vkp_i_load64(vkp_i_message_prefix + 8) &&
           memcmp(frame + 16, "\n$", 2) == 0;
}

VKP_API vkp_status vkp_resp_reader_open(const vkp_resp_config *config, vkp_resp_reader **out)
{
    vkp_resp_reader *reader;
    const vkp_env *env;
    static const vkp_resp_config defaults = VKP_ZERO;
    VKP_I_REQUIRE(out != NULL);
    if (config == NULL) {
        config = &defaults;
    }
    VKP_I_REQUIRE(config->max_depth <= VKP_I_READER_MOST_DEPTH &&
                  config->max_frame_bytes <= VKP_I_BLOCK_MAX);
    env = vkp_i_env(config->env);
    reader = (vkp_resp_reader *)vkp_i_alloc_zero(env, sizeof *reader);
    if (reader == NULL) {
        return VKP_ERR_NOMEM;
    }
    reader->env = env;
    reader->config = *config;
    config = NULL;
/* The defaults that vkp_resp_config documents. */
#define VKP_I_DEFAULT(field, value)     \
    if (reader->config.field == 0) {    \
        reader->config.field = (value); \
    }
    VKP_I_DEFAULT(max_depth, 128)
    VKP_I_DEFAULT(max_elements, 0x7fffffffu)
    VKP_I_DEFAULT(max_bulk_bytes, (size_t)512 << 20)
    VKP_I_DEFAULT(max_line_bytes, 65536)
    VKP_I_DEFAULT(max_frame_bytes, (size_t)1 << 30)
#undef VKP_I_DEFAULT
    reader->quick = reader->config.max_depth > 0 && reader->config.max_elements >= 3 &&
                    reader->config.max_bulk_bytes >= VKP_I_KIND_LEN;
    *out = reader;
    return VKP_OK;
}

/* Free the arrays of values and levels. */
static void vkp_i_reader_trim(vkp_resp_reader *reader)
{
    vkp_i_free(reader->env, reader->values, reader->capacity * sizeof *reader->values);
    vkp_i_free(reader->env, reader->levels, reader->level_capacity * sizeof *reader->levels);
    reader->values = NULL;
    reader->capacity = 0;
    reader->levels = NULL;
    reader->level_capacity = 0;
}

VKP_API void vkp_resp_reader_unref(vkp_resp_reader *reader)
{
    if (reader != NULL) {
        vkp_i_reader_trim(reader);
        vkp_i_free(reader->env, reader->buffer, reader->buffer_capacity);
        vkp_i_free(reader->env, reader, sizeof *reader);
    }
}

/* Prepare for a new frame. */
static void vkp_i_reader_start(vkp_resp_reader *reader)
{
    reader->whole = false;
    reader->position = 0;
    reader->line_seen = 0;
    reader->attribute = 0;
    reader->count = 0;
    reader->depth = 0;
    if (reader->capacity > VKP_I_READER_KEPT_VALUES) { /* one huge frame: free a megabyte or more */
        vkp_i_reader_trim(reader);
    }
}

VKP_API void vkp_resp_reader_reset(vkp_resp_reader *reader)
{
    vkp_i_reader_start(reader);
    reader->status = VKP_OK;
    reader->reason[0] = '\0';
    reader->error_position = 0;
    reader->consumed = 0;
    reader->begin = 0;
    reader->end = 0;
    reader->given = 0;
}

VKP_API const char *vkp_resp_reader_get_error(const vkp_resp_reader *reader, uint64_t *position)
{
    if (position != NULL) {
        *position = reader->error_position;
    }
    return reader->reason;
}

/* Set the sticky error and its text. `at`: offset of the wrong byte in the window. */
__attribute__((format(printf, 4, 5))) static vkp_status
vkp_i_reader_fail(vkp_resp_reader *reader, vkp_status status, size_t at, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    (void)vsnprintf(reader->reason, sizeof reader->reason, format, arguments);
    va_end(arguments);
    reader->status = status;
    reader->error_position = reader->consumed + at;
    reader->end_known = false;
    return status;
}

/* Signs that the number of a header may have; they depend on the type byte before it. */
#define VKP_I_NUM_PLUS 1u      /* "+5" is allowed */
#define VKP_I_NUM_NEGATIVE 2u  /* every "-n" is allowed */
#define VKP_I_NUM_MINUS_ONE 4u /* "-1" is the only allowed negative number */

/* Read digits and CRLF at `at`; *after is the offset behind the LF. EMPTY: bytes are missing. */
static vkp_status vkp_i_reader_number(vkp_resp_reader *reader, const uint8_t *window, size_t len,
                                      size_t at, uint32_t allowed, int64_t *number, size_t *after)
{
    uint64_t value = 0;
    uint64_t most = (uint64_t)INT64_MAX;
    bool negative = false;
    size_t digits = 0;
    size_t first;
    if (at < len && (window[at] == '-' || window[at] == '+')) {
        negative = window[at] == '-';
        if (negative ? (allowed & (VKP_I_NUM_NEGATIVE | VKP_I_NUM_MINUS_ONE)) == 0
                     : (allowed & VKP_I_NUM_PLUS) == 0) {
            return vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, at, "sign '%c' not allowed here",
                                     window[at]);
        }
        most += negative ? 1u : 0u;
        at++;
    }
    first = at;
    for (; at < len && window[at] >= '0' && window[at] <= '9'; at++, digits++) {
        uint64_t digit = (uint64_t)(window[at] - '0');
        if (digits == 1 && window[first] == '0') {
            return vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, first, "number with a leading zero");
        }
        if (value > (most - digit) / 10) {
            return vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, at, "number beyond 64 bits");
        }
        value = value * 10 + digit;
    }
    if (at >= len) {
        return VKP_ERR_EMPTY;
    }
    if (digits == 0) {
        return vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, at, "digit expected, byte 0x%02x found",
                                 window[at]);
    }
    if (window[at] != '\r') {
        return vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, at,
                                 "CRLF expected after a number, byte 0x%02x found", window[at]);
    }
    if (at + 1 >= len) {
        return VKP_ERR_EMPTY;
    }
    if (window[at + 1] != '\n') {
        return vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, at + 1, "CR without LF");
    }
    if (negative && (value == 0 || ((allowed & VKP_I_NUM_NEGATIVE) == 0 && value != 1))) {
        return vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, first,
                                 "negative number not allowed here");
    }
    *number = negative ? (int64_t)(0 - value) : (int64_t)value;
    *after = at + 2;
    return VKP_OK;
}

/* Find the line behind the type byte at `position`: its text is [position + 1, *end). EMPTY: more
   bytes are needed; line_seen is where the next search starts. */
static vkp_status vkp_i_reader_line(vkp_resp_reader *reader, const uint8_t *window, size_t len,
                                    size_t *end)
{
    size_t start = reader->position + 1;
    size_t from = VKP_I_MAX(start, reader->line_seen);
    size_t most = reader->config.max_line_bytes;
    const void *found = from < len ? memchr(window + from, '\n', len - from) : NULL;
    size_t stop = found != NULL ? (size_t)((const uint8_t *)found - window) : len;
    const void *cr = memchr(window + from, '\r', stop > from ? stop - from : 0);
    size_t cr_at = cr != NULL ? (size_t)((const uint8_t *)cr - window) : stop;
    if (cr_at - start > most) {
        return vkp_i_reader_fail(reader, VKP_ERR_LIMIT, start + most,
                                 "line longer than max_line_bytes (%zu)", most);
    }
    if (cr != NULL && cr_at + 1 < stop) {
        return vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, cr_at + 1, "CR without LF");
    }
    if (found == NULL) {
        reader->line_seen = cr != NULL ? cr_at : len;
        return VKP_ERR_EMPTY;
    }
    if (cr == NULL) {
        return vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, stop, "LF without CR");
    }
    reader->line_seen = 0;
    *end = cr_at;
    return VKP_OK;
}

/* Append a value; an attribute before it is linked to it. NULL: no memory, nothing was changed. */
static vkp_value *vkp_i_reader_add(vkp_resp_reader *reader, vkp_resp_type type)
{
    void *values = reader->values;
    size_t *attribute =
        reader->depth > 0 ? &reader->levels[reader->depth - 1].attribute : &reader->attribute;
    vkp_value *value;
    if (!vkp_i_grow(reader->env, &values, &reader->capacity, reader->count + 1,
                    sizeof *reader->values)) {
        return NULL;
    }
    reader->values = (vkp_value *)values;
    reader->quick_values = false;
    value = &reader->values[reader->count];
    memset(value, 0, sizeof *value);
    value->type = (uint8_t)type;
    value->i_depth = (uint16_t)reader->depth;
    value->span = 1;
    if (*attribute != 0) {
        value->attributes = (uint32_t)(reader->count - (*attribute - 1));
        *attribute = 0;
    }
    reader->count++;
    return value;
}

/* Append a value with text, and move `position` to `after`. */
static vkp_status vkp_i_reader_text(vkp_resp_reader *reader, vkp_resp_type type, uint32_t flags,
                                    size_t offset, size_t len, size_t after)
{
    vkp_value *value = vkp_i_reader_add(reader, type);
    if (value == NULL) {
        return VKP_ERR_NOMEM;
    }
    value->flags = (uint8_t)flags;
    value->len = len;
    value->u.i_offset = offset;
    reader->position = after;
    return VKP_OK;
}

/* Append a value without text, and move `position` to `after`. */
static vkp_status vkp_i_reader_scalar(vkp_resp_reader *reader, vkp_resp_type type, uint32_t flags,
                                      int64_t integer, size_t after)
{
    vkp_value *value = vkp_i_reader_add(reader, type);
    if (value == NULL) {
        return VKP_ERR_NOMEM;
    }
    value->flags = (uint8_t)flags;
    value->u.integer = integer;
    reader->position = after;
    return VKP_OK;
}

/* A value whose header announces its length: $ (string or null), ! (error), = (verbatim). */
static vkp_status vkp_i_reader_bulk(vkp_resp_reader *reader, const uint8_t *window, size_t len,
                                    uint8_t mark)
{
    size_t at = reader->position;
    size_t most = reader->config.max_bulk_bytes;
    int64_t number = 0;
    size_t after = 0;
    size_t size;
    size_t prefix = mark == '=' ? VKP_I_VERBATIM_PREFIX : 0;
    vkp_status status = vkp_i_reader_number(reader, window, len, at + 1,
                                            mark == '$' ? VKP_I_NUM_MINUS_ONE : 0, &number, &after);
    if (status != VKP_OK) {
        return status;
    }
    if (number < 0) {
        return vkp_i_reader_scalar(reader, VKP_RESP_NULL, VKP_VALUE_NULL_BULK, 0, after);
    }
    if ((uint64_t)number > most) {
        return vkp_i_reader_fail(reader, VKP_ERR_LIMIT, at,
                                 "bulk of %llu bytes, max_bulk_bytes is %zu",
                                 (unsigned long long)number, most);
    }
    size = (size_t)number;
    if (size < prefix) {
        return vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, at, "verbatim string below 4 bytes");
    }
    if (after + size + 2 > reader->config.max_frame_bytes) {
        return vkp_i_reader_fail(reader, VKP_ERR_LIMIT, at, "frame above max_frame_bytes (%zu)",
                                 reader->config.max_frame_bytes);
    }
    if (len < after || len - after < size + 2) {
        return VKP_ERR_EMPTY;
    }
    if (window[after + size] != '\r' || window[after + size + 1] != '\n') {
        return vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, after + size,
                                 "bulk of %zu bytes is not followed by CRLF", size);
    }
    if (prefix != 0 && window[after + prefix - 1] != ':') {
        return vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, after + prefix - 1,
                                 "verbatim string without its colon");
    }
    return vkp_i_reader_text(reader, mark == '!' ? VKP_RESP_ERROR : VKP_RESP_STRING,
                             prefix != 0 ? VKP_VALUE_VERBATIM : 0, after + prefix, size - prefix,
                             after + size + 2);
}

/* A value that is one line: + (string), - (error), comma (double), ( (big number). */
static vkp_status vkp_i_reader_lined(vkp_resp_reader *reader, const uint8_t *window, size_t len,
                                     uint8_t mark)
{
    size_t start = reader->position + 1;
    size_t end = 0;
    const char *text;
    vkp_status status = vkp_i_reader_line(reader, window, len, &end);
    if (status != VKP_OK) {
        return status;
    }
    text = (const char *)window + start;
    if (mark == '+' || mark == '-') {
        return vkp_i_reader_text(reader, mark == '+' ? VKP_RESP_STRING : VKP_RESP_ERROR,
                                 VKP_VALUE_SIMPLE, start, end - start, end + 2);
    }
    if (mark == ',') {
        if (!vkp_i_double_valid(text, end - start, reader->config.lenient)) {
            return vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, start, "not a double");
        }
        return vkp_i_reader_text(reader, VKP_RESP_DOUBLE, 0, start, end - start, end + 2);
    }
    {
        size_t sign = end > start && (text[0] == '-' || text[0] == '+') ? 1 : 0;
        size_t digits = vkp_i_digits(text, end - start, sign);
        if (digits == 0 || sign + digits != end - start) {
            return vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, start, "not a big number");
        }
    }
    return vkp_i_reader_text(reader, VKP_RESP_BIGNUM, 0, start, end - start, end + 2);
}

/* A value of fixed length: #t, #f (boolean), _ (null). */
static vkp_status vkp_i_reader_constant(vkp_resp_reader *reader, const uint8_t *window, size_t len,
                                        uint8_t mark)
{
    size_t at = reader->position + 1;
    size_t body = mark == '#' ? 1 : 0;
    if (len < at + body) {
        return VKP_ERR_EMPTY;
    }
    if (body == 1 && window[at] != 't' && window[at] != 'f') {
        return vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, at, "boolean is neither #t nor #f");
    }
    if (len > at + body && window[at + body] != '\r') {
        return vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, at + body,
                                 "CRLF expected, byte 0x%02x found", window[at + body]);
    }
    if (len < at + body + 2) {
        return VKP_ERR_EMPTY;
    }
    if (window[at + body + 1] != '\n') {
        return vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, at + body + 1, "CR without LF");
    }
    return vkp_i_reader_scalar(reader, body == 1 ? VKP_RESP_BOOL : VKP_RESP_NULL, 0,
                               body == 1 && window[at] == 't' ? 1 : 0, at + body + 2);
}

/* Append an aggregate, and push its level. */
static vkp_status vkp_i_reader_open_level(vkp_resp_reader *reader, vkp_resp_type type,
                                          uint64_t elements, size_t after)
{
    vkp_value *value;
    vkp_i_level *level;
    void *levels = reader->levels;
    if (reader->depth >= reader->config.max_depth) {
        return vkp_i_reader_fail(reader, VKP_ERR_LIMIT, reader->position,
                                 "nested deeper than max_depth (%u)",
                                 (unsigned)reader->config.max_depth);
    }
    if (!vkp_i_grow(reader->env, &levels, &reader->level_capacity, reader->depth + 1,
                    sizeof *reader->levels)) {
        return VKP_ERR_NOMEM;
    }
    reader->levels = (vkp_i_level *)levels;
    value = vkp_i_reader_add(reader, type);
    if (value == NULL) {
        return VKP_ERR_NOMEM;
    }
    value->len = (size_t)elements;
    level = &reader->levels[reader->depth++];
    level->index = reader->count - 1;
    level->remaining = elements;
    level->attribute = 0;
    reader->position = after;
    return VKP_OK;
}

/* The header of an aggregate: * ~ > % |, or a null as *-1 (lenient: also >-1). */
static vkp_status vkp_i_reader_aggregate(vkp_resp_reader *reader, const uint8_t *window, size_t len,
                                         uint8_t mark)
{
    size_t at = reader->position;
    bool lenient_null = reader->config.lenient && mark == '>';
    vkp_resp_type type = mark == '*'   ? VKP_RESP_ARRAY
                         : mark == '~' ? VKP_RESP_SET
                         : mark == '>' ? VKP_RESP_PUSH
                         : mark == '%' ? VKP_RESP_MAP
                                       : VKP_RESP_ATTRIBUTE;
    int64_t number = 0;
    size_t after = 0;
    uint64_t elements;
    vkp_status status =
        vkp_i_reader_number(reader, window, len, at + 1,
                            mark == '*' || lenient_null ? VKP_I_NUM_MINUS_ONE : 0, &number, &after);
    if (status != VKP_OK) {
        return status;
    }
    if (number < 0) {
        return vkp_i_reader_scalar(reader, VKP_RESP_NULL, VKP_VALUE_NULL_ARRAY, 0, after);
    }
    if ((uint64_t)number > reader->config.max_elements) {
        return vkp_i_reader_fail(reader, VKP_ERR_LIMIT, at,
                                 "aggregate of %llu elements, max_elements is %u",
                                 (unsigned long long)number, (unsigned)reader->config.max_elements);
    }
    if (number == 0 && mark == '>') {
        return vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, at, "push without a kind");
    }
    elements = (uint64_t)number * (type == VKP_RESP_MAP || type == VKP_RESP_ATTRIBUTE ? 2u : 1u);
    return vkp_i_reader_open_level(reader, type, elements, after);
}

/* The error for an unknown type byte, with a guess at what the peer speaks. */
static vkp_status vkp_i_reader_unknown(vkp_resp_reader *reader, const uint8_t *window, size_t len)
{
    size_t at = reader->position;
    const uint8_t *from = window + at;
    size_t left = len - at;
    uint8_t byte = window[at];
    const char *guess = "";
    static const char *const http[] = {"HTTP", "GET ", "POST", "PUT ", "HEAD", "OPTI", "DELE"};
    size_t i;
    for (i = 0; i < sizeof http / sizeof http[0]; i++) {
        size_t most = VKP_I_MIN(left, (size_t)4);
        if (memcmp(from, http[i], most) == 0) {
            if (left < 4) {
                return VKP_ERR_EMPTY; /* the result must not depend on how the input is split */
            }
            guess = ": this looks like HTTP";
        }
    }
    if (byte == VKP_I_TLS_HANDSHAKE || byte == VKP_I_TLS_ALERT) {
        guess = ": this looks like a TLS record";
    } else if (byte == ';' || byte == '.') {
        guess = ": streamed types are not supported";
    }
    return byte >= 0x20 && byte < 0x7f
               ? vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, at, "unknown type byte '%c'%s", byte,
                                   guess)
               : vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, at, "unknown type byte 0x%02x%s", byte,
                                   guess);
}

/* Whether the next value is the first element of a push, its kind, which must be a string. */
static bool vkp_i_reader_wants_kind(const vkp_resp_reader *reader)
{
    const vkp_i_level *top = reader->depth > 0 ? &reader->levels[reader->depth - 1] : NULL;
    return top != NULL && reader->values[top->index].type == VKP_RESP_PUSH &&
           top->remaining == reader->values[top->index].len;
}

/* Read one value, or the header of one aggregate, at `position`. EMPTY: more bytes are needed. */
static vkp_status vkp_i_reader_step(vkp_resp_reader *reader, const uint8_t *window, size_t len)
{
    uint8_t mark;
    bool kind;
    int64_t number = 0;
    size_t after = 0;
    vkp_status status;
    if (reader->position >= reader->config.max_frame_bytes) {
        return vkp_i_reader_fail(reader, VKP_ERR_LIMIT, reader->position,
                                 "frame above max_frame_bytes (%zu)",
                                 reader->config.max_frame_bytes);
    }
    if (reader->position >= len) {
        return VKP_ERR_EMPTY;
    }
    mark = window[reader->position];
    kind = vkp_i_reader_wants_kind(reader);
    if (kind && mark != '$' && mark != '+' && mark != '=') {
        return vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, reader->position,
                                 "the kind of a push is not a string");
    }
    switch (mark) {
    case '$':
        after = reader->position;
        status = vkp_i_reader_bulk(reader, window, len, mark);
        return status == VKP_OK && kind && reader->values[reader->count - 1].type == VKP_RESP_NULL
                   ? vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, after,
                                       "the kind of a push is not a string")
                   : status;
    case '!':
    case '=':
        return vkp_i_reader_bulk(reader, window, len, mark);
    case '+':
    case '-':
    case ',':
    case '(':
        return vkp_i_reader_lined(reader, window, len, mark);
    case ':':
        status = vkp_i_reader_number(reader, window, len, reader->position + 1,
                                     VKP_I_NUM_PLUS | VKP_I_NUM_NEGATIVE, &number, &after);
        return status != VKP_OK ? status
                                : vkp_i_reader_scalar(reader, VKP_RESP_INTEGER, 0, number, after);
    case '#':
    case '_':
        return vkp_i_reader_constant(reader, window, len, mark);
    case '*':
    case '~':
    case '>':
    case '%':
    case '|':
        return vkp_i_reader_aggregate(reader, window, len, mark);
    default:
        return vkp_i_reader_unknown(reader, window, len);
    }
}

/* Whether a complete push is no element of the aggregate around it. Its text is still an offset. */
static bool vkp_i_push_is_uncounted(const uint8_t *window, const vkp_value *push)
{
    const vkp_value *kind = push + 1;
    return vkp_i_is_uncounted_kind((const char *)window + kind->u.i_offset, kind->len);
}

/* The last value is complete: count it in its aggregate, and close each aggregate that it
   completes. True: the frame is complete. */
static bool vkp_i_reader_end_value(vkp_resp_reader *reader, const uint8_t *window)
{
    size_t index = reader->count - 1;
    for (;;) {
        vkp_value *value = &reader->values[index];
        vkp_i_level *top = reader->depth > 0 ? &reader->levels[reader->depth - 1] : NULL;
        if (top != NULL && top->index == index) { /* the header of an aggregate */
            if (top->remaining > 0) {
                return false;
            }
            reader->depth--;
            continue;
        }
        value->span = (uint32_t)(reader->count - index);
        if (value->type == VKP_RESP_ATTRIBUTE) {
            *(top != NULL ? &top->attribute : &reader->attribute) = index + 1;
            return false;
        }
        if (top == NULL) {
            return true;
        }
        if (value->type == VKP_RESP_PUSH && vkp_i_push_is_uncounted(window, value)) {
            size_t level = reader->depth;
            value->flags = (uint8_t)(value->flags | VKP_VALUE_OUT_OF_BAND);
            while (level > 0 && !reader->values[reader->levels[--level].index].i_has_nested) {
                reader->values[reader->levels[level].index].i_has_nested = 1;
            }
            return false;
        }
        if (--top->remaining > 0) {
            return false;
        }
        index = top->index;
        reader->depth--;
    }
}

/* Turn the offsets of a complete frame into pointers. */
static void vkp_i_reader_point(vkp_resp_reader *reader, const uint8_t *window)
{
    size_t i;
    for (i = 0; i < reader->count; i++) {
        vkp_value *value = &reader->values[i];
        if (value->type == VKP_RESP_STRING || value->type == VKP_RESP_ERROR ||
            value->type == VKP_RESP_BIGNUM || value->type == VKP_RESP_DOUBLE) {
            value->u.str = (const char *)window + value->u.i_offset;
        }
    }
}

/* Read a length of at most VKP_I_QUICK_DIGITS digits without a leading zero, and its CRLF. NULL:
   use the general path. Always inlined, so that the branches of each of its two places have a
   prediction of their own. */
__attribute__((always_inline)) static inline const uint8_t *
vkp_i_quick_length(const uint8_t *at, const uint8_t *end, size_t *out)
{
    const uint8_t *start = at;
    size_t value = 0;
    while (at < end && (uint8_t)(*at - '0') < 10) {
        value = value * 10 + (uint8_t)(*at - '0');
        at++;
    }
    if ((size_t)(at - start) - 1 >= VKP_I_QUICK_DIGITS || (*start == '0' && at - start > 1) ||
        !vkp_i_is_crlf(at, end)) {
        return NULL;
    }
    *out = value;
    return at + 2;
}

/* Write the fields that are equal in all messages. They stay until the general path overwrites
   them, so that each further message costs five stores. */
static void vkp_i_quick_prepare(vkp_resp_reader *reader)
{
    size_t i;
    memset(reader->values, 0, VKP_I_QUICK_VALUES * sizeof *reader->values);
    for (i = 0; i < VKP_I_QUICK_VALUES; i++) {
        reader->values[i].type = i == 0 ? VKP_RESP_PUSH : VKP_RESP_STRING;
        reader->values[i].i_depth = i == 0 ? 0 : 1;
        reader->values[i].span = i == 0 ? VKP_I_QUICK_VALUES : 1;
        reader->values[i].len = i == 0 ? VKP_I_QUICK_VALUES - 1 : VKP_I_KIND_LEN;
    }
    reader->quick_values = true;
}

/* The quick path for the most frequent frame of a subscriber: >3, "message", channel, payload. Its
   first 18 bytes are compared in three steps, its texts are skipped by their lengths. The reader's
   state is that between two frames, before and after. EMPTY: the payload is incomplete.
   UNSUPPORTED: use the general path. */
static vkp_status vkp_i_reader_quick(vkp_resp_reader *reader, const uint8_t *window, size_t len,
                                     size_t *consumed)
{
    const uint8_t *end = window + len;
    const uint8_t *channel;
    const uint8_t *payload;
    size_t channel_len;
    size_t payload_len;
    size_t most = reader->config.max_bulk_bytes;
    size_t whole;
    vkp_value *values = reader->values;
    if (!vkp_i_is_message(window, len) || !reader->quick || reader->capacity < VKP_I_QUICK_VALUES) {
        return VKP_ERR_UNSUPPORTED;
    }
    channel = vkp_i_quick_length(window + VKP_I_MESSAGE_PREFIX, end, &channel_len);
    if (channel == NULL || channel_len > most || (size_t)(end - channel) < channel_len + 3 ||
        memcmp(channel + channel_len, "\r\n$", 3) != 0) {
        return VKP_ERR_UNSUPPORTED;
    }
    payload = vkp_i_quick_length(channel + channel_len + 3, end, &payload_len);
    if (payload == NULL || payload_len > most) {
        return VKP_ERR_UNSUPPORTED;
    }
    whole = (size_t)(payload - window) + payload_len + 2;
    if (whole > reader->config.max_frame_bytes) {
        return VKP_ERR_UNSUPPORTED;
    }
    if (whole > len) {
        return whole - len >= 2 ? VKP_ERR_EMPTY : VKP_ERR_UNSUPPORTED;
    }
    if (memcmp(payload + payload_len, "\r\n", 2) != 0) {
        return VKP_ERR_UNSUPPORTED;
    }
    if (!reader->quick_values) {
        vkp_i_quick_prepare(reader);
    }
    values[1].u.str = (const char *)window + 8;
    values[2].len = channel_len;
    values[2].u.str = (const char *)channel;
    values[3].len = payload_len;
    values[3].u.str = (const char *)payload;
    *consumed = whole;
    return VKP_OK;
}

/* Whether the end of the frame can be found although a step refused the value at `position`: a
   line, however long and whatever its digits, ends at its LF, and an aggregate of a known count has
   an end, however deep or large it is. No end is found behind a length that is wrong or too large,
   or behind an unknown type.                                                                  */
static bool vkp_i_reader_knows_end(const vkp_resp_reader *reader, const uint8_t *window, size_t len)
{
    char mark;
    if (reader->position >= reader->config.max_frame_bytes || reader->position >= len) {
        return false;
    }
    mark = (char)window[reader->position];
    return reader->status == VKP_ERR_LIMIT      ? mark != '$' && mark != '!' && mark != '='
           : reader->status == VKP_ERR_PROTOCOL ? memchr(":,(#_", mark, 5) != NULL
                                                : false;
}

/* The path for every frame. Not inlined: vkp_resp_reader_scan would save every register, even on
   the quick path. */
__attribute__((noinline)) static vkp_status vkp_i_reader_general(vkp_resp_reader *reader,
                                                                 const uint8_t *window, size_t len,
                                                                 const vkp_value **value,
                                                                 size_t *consumed)
{
    do {
        vkp_status status = vkp_i_reader_step(reader, window, len);
        if (status != VKP_OK) {
            reader->end_known = vkp_i_reader_knows_end(reader, window, len);
            return status;
        }
    } while (!vkp_i_reader_end_value(reader, window));
    if (reader->position > reader->config.max_frame_bytes) {
        return vkp_i_reader_fail(reader, VKP_ERR_LIMIT, reader->config.max_frame_bytes,
                                 "frame above max_frame_bytes (%zu)",
                                 reader->config.max_frame_bytes);
    }
    vkp_i_reader_point(reader, window);
    *value = &reader->values[0];
    while ((*value)->type == VKP_RESP_ATTRIBUTE) {
        *value += (*value)->span;
    }
    *consumed = reader->position;
    reader->consumed += reader->position;
    reader->whole = true;
    return VKP_OK;
}

VKP_API vkp_status vkp_resp_reader_scan(vkp_resp_reader *reader, const void *data, size_t len,
                                        const vkp_value **value, size_t *consumed)
{
    const uint8_t *window = (const uint8_t *)data;
    VKP_I_REQUIRE(reader != NULL && value != NULL && consumed != NULL &&
                  (data != NULL || len == 0));
    if (reader->status != VKP_OK) {
        return reader->status;
    }
    if (window == NULL) {
        return VKP_ERR_EMPTY;
    }
    if (reader->whole) {
        vkp_i_reader_start(reader);
    }
    if (reader->position == 0) {
        vkp_status status = vkp_i_reader_quick(reader, window, len, consumed);
        if (status == VKP_OK) {
            *value = &reader->values[0];
            reader->consumed += *consumed;
        }
        if (status != VKP_ERR_UNSUPPORTED) {
            return status;
        }
    }
    return vkp_i_reader_general(reader, window, len, value, consumed);
}

VKP_API vkp_status vkp_resp_reader_feed(vkp_resp_reader *reader, const void *data, size_t len)
{
    VKP_I_REQUIRE(reader != NULL && (data != NULL || len == 0));
    if (reader->status != VKP_OK) {
        return reader->status;
    }
    reader->begin += reader->given;
    reader->given = 0;
    if (reader->begin > 0 &&
        (reader->begin == reader->end || len > reader->buffer_capacity - reader->end)) {
        memmove(reader->buffer, reader->buffer + reader->begin, reader->end - reader->begin);
        reader->end -= reader->begin;
        reader->begin = 0;
    }
    if (len > 0) {
        void *buffer = reader->buffer;
        if (len > SIZE_MAX - reader->end ||
            !vkp_i_grow(reader->env, &buffer, &reader->buffer_capacity, reader->end + len, 1)) {
            return VKP_ERR_NOMEM;
        }
        reader->buffer = (uint8_t *)buffer;
        memcpy(reader->buffer + reader->end, data, len);
        reader->end += len;
    }
    return VKP_OK;
}

VKP_API vkp_status vkp_resp_reader_next(vkp_resp_reader *reader, const vkp_value **value)
{
    static const uint8_t nothing[1] = {0};
    const uint8_t *window;
    VKP_I_REQUIRE(reader != NULL && value != NULL);
    reader->begin += reader->given;
    reader->given = 0;
    window = reader->buffer != NULL ? reader->buffer + reader->begin : nothing;
    return vkp_resp_reader_scan(reader, window, reader->end - reader->begin, value, &reader->given);
}

/* ---- for the layers above ----
   A link skips a reply that the reader refuses, where the end is known. The relay gives a client
   with a long command a reader of its own. */

/* Whether vkp_i_skip finds the end of the frame that the reader refused. */
static bool vkp_i_reader_is_end_known(const vkp_resp_reader *reader)
{
    return reader->status != VKP_OK && reader->end_known;
}

#define VKP_I_READER_DEEP 64 /* values that are cheap to read again from the start of the frame */

/* Whether the incomplete frame has so many values that reading it again from its start is slow. */
static bool vkp_i_reader_is_deep_in(const vkp_resp_reader *reader)
{
    return reader->count > VKP_I_READER_DEEP;
}

/* Open another reader with the config of this one. */
static vkp_status vkp_i_reader_open_alike(const vkp_resp_reader *reader, vkp_resp_reader **out)
{
    return vkp_resp_reader_open(&reader->config, out);
}

#endif /* VKP_I_IO */

#if VKP_I_IO
/* ======================================================================================
   >>impl-frame   The end of a frame
   ======================================================================================
   Finds the end of a frame without building values: no allocation, no recursion, any thread. Only
   bounds are checked here, not the grammar: the input passed a strict reader before, or a reader
   refused one of its values, whose end can be found all the same.
   A vkp_i_skip continues where it stopped when more bytes have arrived, so that a long frame in
   many pieces costs each byte once.                                                           */

/* Where the search for the end of a frame is; all zero at the start of the frame. */
typedef struct vkp_i_skip {
    size_t at;          /* offset of the next header; at the end: behind the frame */
    size_t line_seen;   /* bytes behind `at` that hold no LF */
    uint64_t remaining; /* values that are not complete, the root included */
    bool inside;        /* `at` is behind the header of the value */
    bool attribute;     /* the value is an attribute: the frame goes on behind it */
} vkp_i_skip;

/* Skip the header at `at` and the bytes that belong to the value itself; the first *seen bytes hold
   no LF. *elements is the number of elements that follow. Returns the offset behind. 0: incomplete,
   and *seen grows while the LF is missing.                                                    */
static size_t vkp_i_skip_head(const uint8_t *data, size_t len, size_t at, size_t *seen,
                              uint64_t *elements)
{
    size_t from = at + VKP_I_MAX(*seen, (size_t)1);
    const void *lf = from < len ? memchr(data + from, '\n', len - from) : NULL;
    size_t body = lf != NULL ? (size_t)((const uint8_t *)lf - data) + 1 : 0;
    uint64_t number = 0;
    size_t i;
    *elements = 0;
    if (body == 0) {
        *seen = at < len ? len - at : 0;
        return 0;
    }
    for (i = at + 1; i < body && data[i] >= '0' && data[i] <= '9'; i++) {
        number = number * 10 + (uint64_t)(data[i] - '0');
    }
    switch (data[at]) {
    case '$':
    case '!':
    case '=':
        if (data[at + 1] == '-') {
            return body;
        }
        return number > len || len - body < (size_t)number + 2 ? 0 : body + (size_t)number + 2;
    case '*':
    case '~':
    case '>':
        *elements = number;
        return body;
    case '%':
    case '|':
        *elements = number * 2;
        return body;
    default:
        return body;
    }
}

/* Whether the push whose elements start at `at` is no element of the aggregate around it. The kind
   must be complete.                                                                           */
static bool vkp_i_skip_is_uncounted(const uint8_t *data, size_t len, size_t at)
{
    uint64_t elements;
    size_t seen = 0;
    size_t end = vkp_i_skip_head(data, len, at, &seen, &elements);
    size_t text;
    if (end < at + 3) {
        return false;
    }
    text = data[at] == '+'
               ? at + 1
               : (size_t)((const uint8_t *)memchr(data + at, '\n', end - at) - data) + 1;
    text += data[at] == '=' ? VKP_I_VERBATIM_PREFIX : 0;
    return text < end - 2 && vkp_i_is_uncounted_kind((const char *)data + text, end - 2 - text);
}

/* Continue to the end of the value at the start of data; an attribute before an element is not
   counted as one. True: skip->at is the offset behind it. False: more bytes are needed.       */
static bool vkp_i_skip_value(vkp_i_skip *skip, const uint8_t *data, size_t len)
{
    if (!skip->inside) {
        skip->remaining = 1;
    }
    while (skip->remaining > 0) {
        uint64_t elements;
        uint64_t none;
        size_t seen = 0;
        bool counts = true;
        size_t body = vkp_i_skip_head(data, len, skip->at, &skip->line_seen, &elements);
        if (body == 0) {
            return false;
        }
        if (skip->inside && data[skip->at] == '|') {
            counts = false;
        } else if (skip->inside && data[skip->at] == '>') {
            if (vkp_i_skip_head(data, len, body, &seen, &none) == 0) { /* the kind decides */
                return false;
            }
            counts = !vkp_i_skip_is_uncounted(data, len, body);
        }
        skip->remaining += elements;
        skip->remaining -= counts ? 1u : 0u;
        skip->inside = true;
        skip->line_seen = 0;
        skip->at = body;
    }
    return true;
}

/* Continue to the end of the frame: its attributes, then its value. True: skip->at is the offset
   behind it. False: more bytes are needed.                                                    */
static bool vkp_i_skip_frame(vkp_i_skip *skip, const uint8_t *data, size_t len)
{
    do {
        if (!skip->inside && skip->at < len) {
            skip->attribute = data[skip->at] == '|';
        }
        if (!vkp_i_skip_value(skip, data, len)) {
            return false;
        }
        skip->inside = false;
    } while (skip->attribute);
    return true;
}

VKP_API size_t vkp_resp_get_frame_len(const uint8_t *data, size_t len)
{
    vkp_i_skip skip = VKP_ZERO;
    return vkp_i_skip_frame(&skip, data, len) ? skip.at : 0;
}

/* The next push at or behind `from` that is inside the whole frame but no element of it: its bytes
   are [*begin, *end). False: there is none.                                                   */
static bool vkp_i_frame_get_nested(const vkp_bytes *frame, size_t from, size_t *begin, size_t *end)
{
    const uint8_t *data = frame->data;
    size_t len = frame->len;
    while (from < len) {
        uint64_t elements;
        size_t seen = 0;
        size_t body = vkp_i_skip_head(data, len, from, &seen, &elements);
        if (body == 0) {
            return false; /* not the case in a whole frame */
        }
        if (from > 0 && data[from] == '>' && vkp_i_skip_is_uncounted(data, len, body)) {
            vkp_i_skip skip = VKP_ZERO;
            *begin = from;
            *end = vkp_i_skip_value(&skip, data + from, len - from) ? from + skip.at : len;
            return true;
        }
        from = body;
    }
    return false;
}

#endif /* VKP_I_IO */

#if VKP_I_IO
/* ======================================================================================
   >>impl-resp-writer   RESP writer
   ======================================================================================
   A writer appends to one block that only it refers to, until vkp_resp_writer_take gives the block
   away. No locks: one thread at a time.
   The first error stays in i_status and each later put does nothing, so that only take needs a
   check. The program's locale does not change the output. */

#define VKP_I_DIGITS 24u       /* bytes for the digits of a uint64_t: 20 at most */
#define VKP_I_HEADER_BYTES 32u /* bytes for a header: mark, sign, digits and CRLF */
#define VKP_I_DOUBLE_BYTES 64u /* bytes for a double in "%.17g" and a NUL */

VKP_API void vkp_resp_writer_init(vkp_resp_writer *writer, const vkp_env *env)
{
    writer->i_env = vkp_i_env(env);
    writer->i_block = NULL;
    writer->i_len = 0;
    writer->i_status = VKP_OK;
}

VKP_API void vkp_resp_put_raw(vkp_resp_writer *writer, const void *data, size_t len)
{
    vkp_block *block = writer->i_block;
    if (writer->i_status != VKP_OK) {
        return;
    }
    writer->i_status = vkp_i_block_reserve(writer->i_env, &writer->i_block, len);
    if (writer->i_status == VKP_OK && len > 0) {
        block = writer->i_block;
        memcpy(vkp_i_block_data(block) + block->len, data, len);
        block->len += len;
        writer->i_len = block->len;
    }
}

/* Write decimal digits to the end of the buffer; returns the index of the first one. */
static size_t vkp_i_format_u64(char buffer[VKP_I_DIGITS], uint64_t value)
{
    size_t at = VKP_I_DIGITS;
    do {
        buffer[--at] = (char)('0' + (char)(value % 10));
        value /= 10;
    } while (value != 0);
    return at;
}

/* Append a type byte, a number and CRLF. */
static void vkp_i_put_header(vkp_resp_writer *writer, char mark, bool negative, uint64_t number)
{
    char line[VKP_I_HEADER_BYTES];
    char digits[VKP_I_DIGITS];
    size_t from = vkp_i_format_u64(digits, number);
    size_t used = 0;
    line[used++] = mark;
    if (negative) {
        line[used++] = '-';
    }
    memcpy(line + used, digits + from, VKP_I_DIGITS - from);
    used += VKP_I_DIGITS - from;
    line[used++] = '\r';
    line[used++] = '\n';
    vkp_resp_put_raw(writer, line, used);
}

VKP_API void vkp_resp_put_aggregate(vkp_resp_writer *writer, vkp_resp_type type, size_t count)
{
    char mark = type == VKP_RESP_SET         ? '~'
                : type == VKP_RESP_PUSH      ? '>'
                : type == VKP_RESP_MAP       ? '%'
                : type == VKP_RESP_ATTRIBUTE ? '|'
                                             : '*';
    vkp_i_put_header(writer, mark, false, count);
}

VKP_API void vkp_resp_put_bulk(vkp_resp_writer *writer, const void *data, size_t len)
{
    vkp_i_put_header(writer, '$', false, len);
    vkp_resp_put_raw(writer, data, len);
    vkp_resp_put_raw(writer, "\r\n", 2);
}

/* Append a type byte, the text and CRLF. INVALID: the text has a CR or an LF. */
static void vkp_i_put_line(vkp_resp_writer *writer, char mark, vkp_str text)
{
    if (text.len > 0 &&
        (memchr(text.ptr, '\r', text.len) != NULL || memchr(text.ptr, '\n', text.len) != NULL)) {
        writer->i_status = writer->i_status == VKP_OK ? VKP_ERR_INVALID : writer->i_status;
        return;
    }
    vkp_resp_put_raw(writer, &mark, 1);
    vkp_resp_put_raw(writer, text.ptr, text.len);
    vkp_resp_put_raw(writer, "\r\n", 2);
}

VKP_API void vkp_resp_put_simple(vkp_resp_writer *writer, vkp_str text)
{
    vkp_i_put_line(writer, '+', text);
}

VKP_API void vkp_resp_put_error(vkp_resp_writer *writer, vkp_str text)
{
    vkp_i_put_line(writer, '-', text);
}

VKP_API void vkp_resp_put_integer(vkp_resp_writer *writer, int64_t value)
{
    uint64_t magnitude = value < 0 ? 0 - (uint64_t)value : (uint64_t)value;
    vkp_i_put_header(writer, ':', value < 0, magnitude);
}

VKP_API void vkp_resp_put_double(vkp_resp_writer *writer, double value)
{
    char text[VKP_I_DOUBLE_BYTES];
    size_t from;
    size_t to = 0;
    if (value != value) {
        (void)snprintf(text, sizeof text, "nan");
    } else if (value > VKP_I_DOUBLE_MAX || value < -VKP_I_DOUBLE_MAX) {
        (void)snprintf(text, sizeof text, value > 0 ? "inf" : "-inf");
    } else {
        (void)snprintf(text, sizeof text, "%.17g", value);
        for (from = 0; text[from] != '\0'; from++) { /* a locale's point may have several bytes */
            if (strchr("0123456789+-e", text[from]) != NULL) {
                text[to++] = text[from];
            } else if (to > 0 && text[to - 1] != '.') {
                text[to++] = '.';
            }
        }
        text[to] = '\0';
    }
    vkp_i_put_line(writer, ',', vkp_str_of(text));
}

VKP_API void vkp_resp_put_bool(vkp_resp_writer *writer, bool value)
{
    vkp_resp_put_raw(writer, value ? "#t\r\n" : "#f\r\n", 4);
}

VKP_API void vkp_resp_put_null(vkp_resp_writer *writer)
{
    vkp_resp_put_raw(writer, "_\r\n", 3);
}

/* Append an error. RESP2 has errors of one line only: each CR and LF becomes a blank. */
static void vkp_i_put_error_value(vkp_resp_writer *writer, const vkp_value *value, int protocol)
{
    size_t start;
    if (protocol == 3 && (value->flags & VKP_VALUE_SIMPLE) == 0) {
        vkp_i_put_header(writer, '!', false, value->len);
        vkp_resp_put_raw(writer, value->u.str, value->len);
        vkp_resp_put_raw(writer, "\r\n", 2);
        return;
    }
    vkp_resp_put_raw(writer, "-", 1);
    start = writer->i_len;
    vkp_resp_put_raw(writer, value->u.str, value->len);
    if (writer->i_status == VKP_OK) {
        uint8_t *data = vkp_i_block_data(writer->i_block);
        for (; start < writer->i_len; start++) {
            data[start] = data[start] == '\r' || data[start] == '\n' ? (uint8_t)' ' : data[start];
        }
    }
    vkp_resp_put_raw(writer, "\r\n", 2);
}

/* Append a string, a double or a big number; RESP2 has bulk strings in place of both numbers. */
static void vkp_i_put_text_value(vkp_resp_writer *writer, const vkp_value *value, int protocol)
{
    vkp_str text = vkp_value_get_str(value);
    if (value->type == VKP_RESP_STRING && (value->flags & VKP_VALUE_SIMPLE) != 0) {
        vkp_i_put_line(writer, '+', text);
    } else if (value->type == VKP_RESP_STRING && (value->flags & VKP_VALUE_VERBATIM) != 0 &&
               protocol == 3) {
        vkp_i_put_header(writer, '=', false, text.len + VKP_I_VERBATIM_PREFIX);
        vkp_resp_put_raw(writer, text.ptr - VKP_I_VERBATIM_PREFIX,
                         text.len + VKP_I_VERBATIM_PREFIX);
        vkp_resp_put_raw(writer, "\r\n", 2);
    } else if (value->type == VKP_RESP_STRING || protocol != 3) {
        vkp_resp_put_bulk(writer, text.ptr, text.len);
    } else {
        vkp_i_put_line(writer, value->type == VKP_RESP_DOUBLE ? ',' : '(', text);
    }
}

/* Append the header of an aggregate. RESP2 writes every aggregate as an array. */
static void vkp_i_put_aggregate_value(vkp_resp_writer *writer, const vkp_value *value, int protocol)
{
    bool paired = value->type == VKP_RESP_MAP || value->type == VKP_RESP_ATTRIBUTE;
    if (protocol == 3) {
        vkp_resp_put_aggregate(writer, (vkp_resp_type)value->type,
                               paired ? value->len / 2 : value->len);
    } else {
        vkp_resp_put_aggregate(writer, VKP_RESP_ARRAY, value->len);
    }
}

/* Append one place of the tree: a scalar, or the header of an aggregate. */
static void vkp_i_put_node(vkp_resp_writer *writer, const vkp_value *value, int protocol)
{
    switch ((int)value->type) {
    case VKP_RESP_NULL:
        if (protocol == 3) {
            vkp_resp_put_null(writer);
        } else {
            vkp_resp_put_raw(writer,
                             (value->flags & VKP_VALUE_NULL_ARRAY) != 0 ? "*-1\r\n" : "$-1\r\n", 5);
        }
        break;
    case VKP_RESP_ERROR:
        vkp_i_put_error_value(writer, value, protocol);
        break;
    case VKP_RESP_INTEGER:
        vkp_resp_put_integer(writer, value->u.integer);
        break;
    case VKP_RESP_BOOL:
        if (protocol == 3) {
            vkp_resp_put_bool(writer, value->u.integer != 0);
        } else {
            vkp_resp_put_integer(writer, value->u.integer);
        }
        break;
    case VKP_RESP_STRING:
    case VKP_RESP_BIGNUM:
    case VKP_RESP_DOUBLE:
        vkp_i_put_text_value(writer, value, protocol);
        break;
    default:
        vkp_i_put_aggregate_value(writer, value, protocol);
        break;
    }
}

VKP_API void vkp_resp_put_value(vkp_resp_writer *writer, const vkp_value *value, int protocol)
{
    const vkp_value *root = value;
    const vkp_value *end = value + value->span;
    while (value < end) {
        if (((value->flags & VKP_VALUE_OUT_OF_BAND) != 0 && value != root) ||
            (value->type == VKP_RESP_ATTRIBUTE && protocol != 3)) {
            value += value->span;
        } else {
            vkp_i_put_node(writer, value, protocol);
            value++;
        }
    }
}

VKP_API vkp_status vkp_resp_writer_take(vkp_resp_writer *writer, vkp_bytes *bytes)
{
    vkp_status status = writer->i_status;
    if (status == VKP_OK) {
        bytes->block = writer->i_block;
        bytes->len = writer->i_len;
        bytes->data = writer->i_block != NULL ? vkp_i_block_data(writer->i_block) : NULL;
        writer->i_block = NULL;
    }
    vkp_resp_writer_deinit(writer);
    return status;
}

VKP_API void vkp_resp_writer_deinit(vkp_resp_writer *writer)
{
    if (writer != NULL) {
        vkp_i_block_unref(writer->i_block);
        vkp_resp_writer_init(writer, writer->i_env);
    }
}

#endif /* VKP_I_IO */

#if VKP_I_IO
/* ======================================================================================
   >>impl-address   Addresses
   ======================================================================================
   Text to socket addresses: "unix:PATH", "unix:@NAME" (abstract, Linux only) or "tcp:HOST:PORT" (an
   IPv6 host may stand in brackets). Any thread, no locks. Only resolving a host that is not numeric
   may block, on DNS.
   A vkp_i_name views the text it was made from; it is checked once, in vkp_i_name_of, and then used
   as it is written. Errors are logged with the text, where the caller could not see their cause. */

#define VKP_I_HOST_BYTES 256u /* a DNS name has at most 253 bytes */
#define VKP_I_PORT_MAX 65535u
#define VKP_I_PORT_DIGITS 6u /* longest text of a port, leading zeros included */

/* The checked name of a Unix socket. */
typedef struct vkp_i_name {
    const char *text; /* views; not terminated */
    size_t len;       /* bytes of text, the '@' included */
    bool abstract;    /* text begins with '@' and names no file */
} vkp_i_name;

/* Whether the path has a ".." component. */
static bool vkp_i_path_climbs(vkp_str path)
{
    size_t begin = 0;
    size_t i;
    for (i = 0; i <= path.len; i++) {
        if (i == path.len || path.ptr[i] == '/') {
            if (i - begin == 2 && path.ptr[begin] == '.' && path.ptr[begin + 1] == '.') {
                return true;
            }
            begin = i + 1;
        }
    }
    return false;
}

/* Check the name of a Unix socket. INVALID: empty, a NUL byte or a ".." component. LIMIT: too long
   for sun_path. UNSUPPORTED: an abstract name outside Linux. */
static vkp_status vkp_i_name_of(const vkp_env *env, vkp_str text, bool abstract_names,
                                vkp_i_name *out)
{
    size_t most = sizeof(((struct sockaddr_un *)NULL)->sun_path) - 1; /* a NUL needs 1 byte */
    size_t len = text.len;
    VKP_I_REQUIRE(text.ptr != NULL && len > 0 && memchr(text.ptr, '\0', len) == NULL);
    out->text = text.ptr;
    out->len = len;
    out->abstract = abstract_names && text.ptr[0] == '@';
    if (out->abstract) {
        len--;
        VKP_I_REQUIRE(len > 0);
        if (!VKP_I_LINUX) {
            return VKP_ERR_UNSUPPORTED;
        }
    } else if (vkp_i_path_climbs(text)) {
        return VKP_ERR_INVALID;
    }
    if (len > most) {
        vkp_i_log(env, VKP_LOG_ERROR, "socket path of %zu bytes, %zu fit: %.*s", len, most,
                  VKP_FMT(text));
        return VKP_ERR_LIMIT;
    }
    return VKP_OK;
}

/* The socket address of a checked name. An abstract name has a NUL in place of its '@', and its
   length ends the address: NULs behind it would be part of the name. */
static vkp_address vkp_i_unix_address(vkp_i_name name)
{
    union {
        struct sockaddr_un name;
        unsigned char bytes[sizeof(struct sockaddr_un)];
    } local;
    vkp_address address;
    memset(&local, 0, sizeof local);
    memset(&address, 0, sizeof address);
    local.name.sun_family = AF_UNIX;
    memcpy(local.name.sun_path, name.text, name.len);
    address.family = AF_UNIX;
    address.bytes = (uint32_t)sizeof local;
    if (name.abstract) {
        local.name.sun_path[0] = '\0';
        address.bytes = (uint32_t)(offsetof(struct sockaddr_un, sun_path) + name.len);
    }
    memcpy(address.storage.bytes, local.bytes, sizeof local);
    return address;
}

/* Whether the text is a port, 0 to 65535, in decimal. Resolvers accept larger ones and cut them. */
static bool vkp_i_is_port(vkp_str text)
{
    unsigned port = 0;
    size_t i;
    for (i = 0; i < text.len && text.ptr[i] >= '0' && text.ptr[i] <= '9' && i < VKP_I_PORT_DIGITS;
         i++) {
        port = port * 10 + (unsigned)(text.ptr[i] - '0');
    }
    return i > 0 && i == text.len && port <= VKP_I_PORT_MAX;
}

/* Whether the host is an address in digits, which needs no lookup. */
static bool vkp_i_is_numeric_host(const char *host)
{
    struct in_addr address;
    return strchr(host, ':') != NULL || inet_pton(AF_INET, host, &address) == 1;
}

/* The parts of an address text. */
typedef struct vkp_i_parts {
    vkp_i_name name;             /* name of a Unix socket; text is NULL for a TCP address */
    char host[VKP_I_HOST_BYTES]; /* TCP host, terminated, without brackets */
    char port[8];                /* TCP port, terminated */
} vkp_i_parts;

/* Split an address text. INVALID, LIMIT and UNSUPPORTED: see vkp_i_name_of; INVALID also for a text
   of neither form. */
static vkp_status vkp_i_split_address(const vkp_env *env, vkp_str text, vkp_i_parts *parts)
{
    vkp_str host;
    vkp_str port;
    memset(parts, 0, sizeof *parts);
    if (vkp_i_starts_with(text, "unix:")) {
        return vkp_i_name_of(env, vkp_i_str(text.ptr + 5, text.len - 5), true, &parts->name);
    }
    host = vkp_i_starts_with(text, "tcp:") ? vkp_i_str(text.ptr + 4, text.len - 4)
                                           : vkp_i_str(NULL, 0);
    port = vkp_i_str(NULL, 0);
    while (host.len > 0 && port.ptr == NULL) {
        if (host.ptr[--host.len] == ':') {
            port.ptr = host.ptr + host.len + 1;
            port.len = (size_t)(text.ptr + text.len - port.ptr);
        }
    }
    if (host.len == 0 || host.len >= sizeof parts->host || !vkp_i_is_port(port) ||
        memchr(host.ptr, '\0', host.len) != NULL) {
        vkp_i_log(env, VKP_LOG_ERROR, "address is neither unix:PATH nor tcp:HOST:PORT: %.*s",
                  VKP_FMT(text));
        return VKP_ERR_INVALID;
    }
    if (host.len > 2 && host.ptr[0] == '[' && host.ptr[host.len - 1] == ']') {
        host.ptr++;
        host.len -= 2;
    }
    memcpy(parts->host, host.ptr, host.len);
    memcpy(parts->port, port.ptr, port.len);
    return VKP_OK;
}

/* The socket addresses of "tcp:HOST:PORT" or "unix:PATH". REFUSED: the host cannot be resolved. May
   block on DNS. */
static vkp_status vkp_i_parse_address(const vkp_env *env, vkp_str text, vkp_address *out,
                                      size_t capacity, size_t *count)
{
    vkp_i_parts parts;
    vkp_status status = vkp_i_split_address(env, text, &parts);
    int found = 1;
    if (status != VKP_OK) {
        return status;
    }
    if (parts.name.text != NULL) {
        out[0] = vkp_i_unix_address(parts.name);
    } else {
        found = vkp_i_sys(env)->resolve(parts.host, parts.port, out, capacity);
    }
    if (found <= 0) {
        vkp_i_log(env, VKP_LOG_ERROR, "cannot resolve %.*s", VKP_FMT(text));
        return VKP_ERR_REFUSED;
    }
    *count = (size_t)found;
    return VKP_OK;
}

#endif /* VKP_I_IO */

#if VKP_I_IO
/* ======================================================================================
   >>impl-socket   Ref-counted Unix sockets
   ======================================================================================
   A socket is a slot of its registry. The memory of a slot is used again for later sockets and is
   freed only with the registry, so weak handles and searches by path may read any slot at any time.
   One atomic word holds the slot's generation (which socket it is now), the count of references and
   two bits. After a thread took a reference through the word, the other fields stay valid.

   States of a slot (count = VKP_I_REFS of the word), and what ends them:
     spare      count 0, on registry->spare        create -> live
     live       count > 0, in the map, listening   last unref -> ending
     ending     count 0, CLEANUP set, in the map   dispose -> spare, or -> lingering (linger_ms);
                                                   a search by path -> live (linger_ms), or -> DEAD
     lingering  count 0, LINGERS set, in the map   a search by path -> live; upkeep -> spare
     DEAD       not in the map, files removed, handles inactive; the thread that sets CLEANUP in the
                last unref, or that set it before -> spare
   vkp_registry_cleanup_all makes live and ending slots DEAD, lingering ones spare.

   The last unref cleans up without waiting for a lock. One compare-and-swap sets the count to 0 and
   CLEANUP, so exactly one thread disposes of the slot. The registry's lock is the word `held`. Lock
   order: `mutex`, then `held`. Threads that may wait lock `mutex` first; unref only tries `held`.
   If `held` is taken, the unref pushes the slot to the list `ended_slots` and tries `held` once
   more. The holder loads `ended_slots` after it released `held`: so either the holder finds the
   slot, or the second try succeeds.
   A thread that searches a path and finds a slot with count 0 retires it (DEAD) and creates the new
   socket in another slot; the thread that set CLEANUP finds DEAD and only recycles the slot. So the
   end of a path's old socket never touches the path's new one.

   The lock guards the map, the files, the statistics and the fields marked below. Descriptors are
   closed, messages logged and callbacks called after the lock was released (the descriptor of an
   abstract name excepted). A descriptor is in an endpoint with its own count: a loop where it is
   registered keeps it open after the socket ended. Followers (listeners) are notified by a task on
   their loop, queued under the lock.

   On disk: PATH.lock is created and flocked first and removed last, so the flock shows other
   processes whether the path is in use. PATH is bound, gets its mode, and only then listens, so no
   client connects before. A file is unlinked only if its device and inode are the recorded ones. */

#define VKP_I_REFS ((uint64_t)0x3fffffff) /* bits of the word: the count of references */
#define VKP_I_MOST_REFS ((size_t)1 << 29) /* far below VKP_I_DEAD: ref adds before it checks */
#define VKP_I_DEAD ((uint64_t)1 << 30)    /* bit of the word: retired, inactive from then on */
#define VKP_I_CLEANUP ((uint64_t)1 << 31) /* bit of the word: one thread disposes of the slot */
#define VKP_I_GENERATION(word) ((uint32_t)((word) >> 32)) /* counts the sockets of the slot */

/* Bytes of a name with its NUL: an abstract name, its '@' included, may fill sun_path. */
#define VKP_I_PATH_BYTES (sizeof(((struct sockaddr_un *)NULL)->sun_path) + 1)
#define VKP_I_LOCK_SUFFIX_BYTES 8u /* room for ".lock" and its NUL */
#define VKP_I_NOTE_BYTES 256       /* longest message of the registry, its NUL included */

/* A listening descriptor, shared by a socket and the listeners that accept from it. */
typedef struct vkp_i_endpoint {
    struct vkp_i_endpoint *next; /* next in registry->to_close */
    const vkp_env *env;
    size_t refs; /* atomic: one of the socket, one of each listener that accepts from it */
    int fd;      /* closed with the last reference */
} vkp_i_endpoint;

/* A listener in the list of its socket. Guarded by the registry's lock. */
typedef struct vkp_i_follower {
    struct vkp_i_follower *next; /* next in sock->followers */
    vkp_socket *sock;            /* NULL: not in a list, or the socket ended */
    vkp_loop *loop;              /* the listener's loop, where the task runs */
    vkp_i_task task; /* notifies the listener that its socket ended or has a new descriptor */
    bool queued;     /* the task is in the loop's queue */
} vkp_i_follower;

/* vkp_socket.flags: bits. */
#define VKP_I_SOCKET_ABSTRACT 1u                  /* the name is abstract: no files */
#define VKP_I_SOCKET_LINGERS 2u                   /* the count is 0; upkeep ends the socket later */
#define VKP_I_SOCKET_LOST 4u                      /* the last check did not find our file */
#define VKP_I_SOCKET_EVENT(event) (8u << (event)) /* on_event is due for this vkp_socket_event */

struct vkp_socket {
    vkp_i_map_node node;    /* in registry->sockets; key: path */
    uint64_t word;          /* atomic: generation, CLEANUP, DEAD and count, see the states above */
    vkp_registry *registry; /* constant; a reference from create until the slot is spare */
    vkp_socket *all;        /* next in registry->all; constant */
    vkp_socket *link;       /* next in registry->ended_slots or registry->spare */
    uint64_t ended_ns;      /* when the count became 0; written by the thread that set CLEANUP */
    /* Guarded by the registry's lock: */
    vkp_i_endpoint *endpoint;  /* the listening descriptor; NULL once retired */
    vkp_i_follower *followers; /* listeners that are notified of the socket's end */
    uint64_t linger_until_ns;  /* when lingering ends, on the loop's clock; 0: upkeep sets it */
    uint32_t flags;            /* VKP_I_SOCKET_* */
    vkp_status blocked;        /* why the last bind of a lost socket failed; OK: it did not */
    int lock_fd;               /* holds the flock of PATH.lock; -1: none */
    /* Written under the lock; vkp_registry_unlink_all reads them without it while on_disk is 1: */
    uint32_t on_disk;            /* atomic: 1 while path, id and lock_id are those of our files */
    int opener_pid;              /* the process that owns the files; a forked child removes none */
    vkp_file_id id;              /* the socket's file */
    vkp_file_id lock_id;         /* the file PATH.lock */
    char path[VKP_I_PATH_BYTES]; /* terminated; of an abstract name with its '@' */
};

struct vkp_registry {
    const vkp_env *env;
    const vkp_sys *sys;
    size_t refs; /* atomic: the program's, one of each socket, and those of calls and tasks */
    vkp_registry_config config; /* defaults filled in, folder copied; constant after open */
    VKP_I_MUTEX mutex;          /* threads that wait for `held` wait here first */
    uint32_t held;              /* atomic: 1 while a thread holds the registry's lock */
    vkp_socket *ended_slots;    /* atomic: slots to dispose of, pushed while `held` was taken */
    vkp_socket *all;            /* atomic: every slot, newest first; slots are never unlinked */
    /* Guarded by `held`: */
    vkp_i_map sockets;        /* path to socket: live, ending and lingering ones */
    vkp_socket *spare;        /* slots without a socket */
    vkp_i_endpoint *to_close; /* endpoints to give back after the unlock */
    size_t released;          /* references of the registry to give back after the unlock */
    bool noted;               /* `note` is to be logged after the unlock */
    vkp_log_level note_level; /* level of `note` */
    char note[VKP_I_NOTE_BYTES];
    vkp_registry_stats stats;
    bool upkeep_queued;     /* upkeep_task is in the loop's queue, with a reference */
    bool upkeep_attached;   /* upkeep_place is attached and the timer runs, with a reference */
    bool loop_gone;         /* the loop is closed: no upkeep any longer */
    uint64_t next_check_ns; /* when the files are checked next, on the loop's clock */
    /* Run upkeep on the loop's thread: */
    vkp_i_task upkeep_task;      /* queued by any thread, see upkeep_queued */
    vkp_timer upkeep_timer;      /* loop's thread only */
    vkp_i_attached upkeep_place; /* loop's thread only; runs upkeep when the loop closes */
};

/* The name of the socket; views its path. */
static vkp_i_name vkp_i_socket_name(const vkp_socket *sock)
{
    vkp_i_name name;
    name.text = sock->path;
    name.len = sock->node.key.len;
    name.abstract = (sock->flags & VKP_I_SOCKET_ABSTRACT) != 0;
    return name;
}

/* "PATH.lock". */
typedef struct vkp_i_lock_name {
    char path[VKP_I_PATH_BYTES + VKP_I_LOCK_SUFFIX_BYTES];
} vkp_i_lock_name;

static vkp_i_lock_name vkp_i_socket_lock_name(const vkp_socket *sock)
{
    static const char suffix[] = ".lock";
    vkp_i_lock_name name;
    size_t len = strlen(sock->path);
    memcpy(name.path, sock->path, len); /* not snprintf: called in signal handlers */
    memcpy(name.path + len, suffix, sizeof suffix);
    return name;
}

/* ---- the registry's lock, and the work after it was released ---- */

/* An endpoint for the descriptor, with one reference. NULL: no memory, and fd stays open. */
static vkp_i_endpoint *vkp_i_endpoint_open(const vkp_env *env, int fd)
{
    vkp_i_endpoint *endpoint = (vkp_i_endpoint *)vkp_i_alloc_zero(env, sizeof *endpoint);
    if (endpoint != NULL) {
        endpoint->env = env;
        endpoint->refs = 1;
        endpoint->fd = fd;
    }
    return endpoint;
}

static vkp_i_endpoint *vkp_i_endpoint_ref(vkp_i_endpoint *endpoint)
{
    (void)VKP_I_ADD(&endpoint->refs, 1);
    return endpoint;
}

static void vkp_i_endpoint_unref(vkp_i_endpoint *endpoint)
{
    if (endpoint != NULL && VKP_I_UNREF(&endpoint->refs) == 1) {
        (void)vkp_i_sys(endpoint->env)->close(endpoint->fd);
        vkp_i_free(endpoint->env, endpoint, sizeof *endpoint);
    }
}

/* Free the registry and all its slots. Called with the last reference: no lock is needed. */
static void vkp_i_registry_free(vkp_registry *registry)
{
    vkp_loop *loop = registry->config.loop;
    while (registry->all != NULL) {
        vkp_socket *sock = registry->all;
        registry->all = sock->all;
        vkp_i_free(registry->env, sock, sizeof *sock);
    }
    vkp_i_map_deinit(&registry->sockets);
    VKP_I_MUTEX_DEINIT(&registry->mutex);
    vkp_i_free_str(registry->env, registry->config.folder);
    vkp_i_free(registry->env, registry, sizeof *registry);
    vkp_loop_unref(loop);
}

/* Give back `count` references of the registry. Not under its lock. */
static void vkp_i_registry_drop(vkp_registry *registry, size_t count)
{
    if (count > 0 && VKP_I_SUB_ACQ_REL(&registry->refs, count) == count) {
        vkp_i_registry_free(registry);
    }
}

/* Keep a message that is logged after the unlock; it replaces an earlier one. Under the lock. */
__attribute__((format(printf, 3, 4))) static void
vkp_i_registry_note(vkp_registry *registry, vkp_log_level level, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    registry->noted = true;
    registry->note_level = level;
    (void)vsnprintf(registry->note, sizeof registry->note, format, arguments);
    va_end(arguments);
}

static void vkp_i_registry_dispose_all(vkp_registry *registry);

/* Take the registry's lock, waiting for it, and dispose of the slots in `ended_slots`. */
static void vkp_i_registry_enter(vkp_registry *registry)
{
    VKP_I_LOCK(&registry->mutex);
    vkp_i_latch_lock(&registry->held, registry->sys);
    vkp_i_registry_dispose_all(registry);
}

/* Take the registry's lock if it is free. Never waits. */
static bool vkp_i_registry_try_enter(vkp_registry *registry)
{
    return VKP_I_XCHG(&registry->held, 1u) == 0;
}

/* Release the registry's lock, then close, log and give back what was left for after it. `in_line`:
   the lock was taken by vkp_i_registry_enter, not by try_enter. The caller has a reference of the
   registry. Keeps errno. The release exchange of `held` and the load of `ended_slots` pair with the
   push to `ended_slots` and the second vkp_i_registry_try_enter in vkp_socket_unref. */
static void vkp_i_registry_leave(vkp_registry *registry, bool in_line)
{
    int error = errno;
    size_t released = 0;
    vkp_i_endpoint *to_close = NULL;
    vkp_log_level level = VKP_LOG_DEFAULT;
    char note[VKP_I_NOTE_BYTES];
    note[0] = '\0';
    do {
        vkp_i_registry_dispose_all(registry);
        while (registry->to_close != NULL) {
            vkp_i_endpoint *each = registry->to_close;
            registry->to_close = each->next;
            each->next = to_close;
            to_close = each;
        }
        released += registry->released;
        registry->released = 0;
        if (registry->noted) {
            level = registry->note_level;
            memcpy(note, registry->note, sizeof note);
            registry->noted = false;
        }
        (void)VKP_I_XCHG(&registry->held, 0u);
    } while (VKP_I_LOAD_ACQ(&registry->ended_slots) != NULL && vkp_i_registry_try_enter(registry));
    if (in_line) {
        VKP_I_UNLOCK(&registry->mutex);
    }
    while (to_close != NULL) {
        vkp_i_endpoint *next = to_close->next;
        vkp_i_endpoint_unref(to_close);
        to_close = next;
    }
    if (level != VKP_LOG_DEFAULT) {
        vkp_i_log(registry->env, level, "%s", note);
    }
    vkp_i_registry_drop(registry, released);
    errno = error;
}

/* ---- references ---- */

/* Take a reference if the slot still has this generation. `locked`: the caller holds the registry's
   lock and may revive a socket with count 0, if the registry lingers. NOT_FOUND: the socket ended.
   LIMIT: max_references. */
static vkp_status vkp_i_socket_take(vkp_socket *sock, uint32_t generation, bool locked)
{
    vkp_registry *registry = sock->registry;
    uint64_t word = VKP_I_LOAD_ACQ(&sock->word);
    do {
        if (VKP_I_GENERATION(word) != generation || (word & VKP_I_DEAD) != 0 ||
            ((word & VKP_I_REFS) == 0 && !(locked && registry->config.linger_ms > 0))) {
            return VKP_ERR_NOT_FOUND;
        }
        if ((word & VKP_I_REFS) >= registry->config.max_references) {
            return VKP_ERR_LIMIT;
        }
    } while (!VKP_I_CAS(&sock->word, &word, word + 1));
    if (locked && (word & VKP_I_REFS) == 0) {
        sock->flags &= ~VKP_I_SOCKET_LINGERS;
        registry->stats.revived++;
    }
    return VKP_OK;
}

/* Take a reference under the lock, where a lingering socket is revived. Not inlined, so that the
   caller's path without the lock saves no registers. */
static __attribute__((noinline)) vkp_status
vkp_i_socket_take_lingering(vkp_socket *sock, uint32_t generation, vkp_socket **out)
{
    vkp_status status = VKP_ERR_NOT_FOUND;
    if (sock->registry->config.linger_ms > 0 &&
        VKP_I_GENERATION(VKP_I_LOAD(&sock->word)) == generation) {
        vkp_i_registry_enter(sock->registry);
        status = vkp_i_socket_take(sock, generation, true);
        vkp_i_registry_leave(sock->registry, true);
    }
    if (status == VKP_OK) {
        *out = sock;
    }
    return status;
}

/* Take a reference if the slot still has this generation. The caller does not hold the lock; it is
   taken only if the socket may linger. */
static vkp_status vkp_i_socket_take_weak(vkp_socket *sock, uint32_t generation, vkp_socket **out)
{
    vkp_status status = vkp_i_socket_take(sock, generation, false);
    if (status == VKP_ERR_NOT_FOUND) {
        return vkp_i_socket_take_lingering(sock, generation, out);
    }
    if (status == VKP_OK) {
        *out = sock;
    }
    return status;
}

VKP_API vkp_socket *vkp_socket_ref(vkp_socket *sock)
{
    uint64_t word = VKP_I_ADD(&sock->word, (uint64_t)1);
    if ((word & VKP_I_REFS) < sock->registry->config.max_references) {
        return sock;
    }
    (void)VKP_I_SUB(&sock->word, (uint64_t)1); /* not the last: the caller has one */
    return NULL;
}

static void vkp_i_socket_dispose(vkp_registry *registry, vkp_socket *sock);

VKP_API void vkp_socket_unref(vkp_socket *sock)
{
    vkp_registry *registry;
    uint64_t word;
    uint64_t less;
    if (sock == NULL) {
        return;
    }
    word = VKP_I_LOAD(&sock->word);
    do {
        less = (word & VKP_I_REFS) > 1 ? word - 1 : (word - 1) | VKP_I_CLEANUP;
    } while (!VKP_I_CAS(&sock->word, &word, less));
    if ((less & VKP_I_REFS) > 0 || (word & VKP_I_CLEANUP) != 0) {
        return; /* other references exist, or the thread that set CLEANUP will see the count 0 */
    }
    registry = sock->registry;
    sock->ended_ns = registry->sys->clock_ns();
    /* The disposing thread gives the socket's reference of the registry back: keep one for here. */
    (void)VKP_I_ADD(&registry->refs, 1);
    if (vkp_i_registry_try_enter(registry)) {
        vkp_i_socket_dispose(registry, sock);
        vkp_i_registry_leave(registry, false);
    } else {
        sock->link = VKP_I_LOAD(&registry->ended_slots);
        while (!VKP_I_CAS(&registry->ended_slots, &sock->link, sock)) {
        }
        if (vkp_i_registry_try_enter(registry)) {
            vkp_i_registry_leave(registry, false);
        }
    }
    vkp_i_registry_drop(registry, 1);
}

VKP_API vkp_weak_socket vkp_socket_downgrade(const vkp_socket *sock)
{
    vkp_weak_socket weak;
    memcpy(&weak.i_socket, &sock, sizeof sock); /* drops const */
    weak.i_generation = VKP_I_GENERATION(VKP_I_LOAD(&sock->word));
    return weak;
}

VKP_API vkp_status vkp_socket_upgrade(const vkp_weak_socket *weak, vkp_socket **out)
{
    VKP_I_REQUIRE(weak != NULL && out != NULL);
    return weak->i_socket != NULL ? vkp_i_socket_take_weak(weak->i_socket, weak->i_generation, out)
                                  : VKP_ERR_NOT_FOUND;
}

VKP_API const char *vkp_socket_get_path(const vkp_socket *sock)
{
    return sock->path;
}

VKP_API bool vkp_socket_is_active(const vkp_socket *sock)
{
    return (VKP_I_LOAD_ACQ(&sock->word) & VKP_I_DEAD) == 0;
}

VKP_API size_t vkp_socket_get_ref_count(const vkp_socket *sock)
{
    return (size_t)(VKP_I_LOAD(&sock->word) & VKP_I_REFS);
}

/* ---- the end of a socket; all functions under the registry's lock ---- */

static bool vkp_i_same_file(const vkp_file_id *a, const vkp_file_id *b)
{
    return a->device == b->device && a->inode == b->inode;
}

/* Unlink the path if it still names the recorded file. 0 also when the file is gone or another one;
   otherwise a negated errno. */
static int vkp_i_unlink_same(const vkp_sys *sys, const char *path, const vkp_file_id *id)
{
    vkp_file_id found;
    int result = sys->identify(path, &found);
    if (result == 0 && vkp_i_same_file(&found, id)) {
        result = sys->unlink(path);
    }
    return result == -ENOENT ? 0 : result; /* the file is gone already */
}

/* Unlink the recorded file; count and log a failure. */
static void vkp_i_registry_remove(vkp_registry *registry, const char *path, const vkp_file_id *id)
{
    int result = vkp_i_unlink_same(registry->sys, path, id);
    if (result < 0) {
        registry->stats.unlink_failures++;
        registry->stats.unlink_errno = -result;
        vkp_i_registry_note(registry, VKP_LOG_WARN, "%s: not removed: %s", path, strerror(-result));
    }
}

/* Give up PATH.lock, removing the file first if `unlink`. */
static void vkp_i_socket_unlock(vkp_socket *sock, bool unlink)
{
    const vkp_sys *sys = sock->registry->sys;
    if (sock->lock_fd >= 0) {
        if (unlink) {
            vkp_i_lock_name name = vkp_i_socket_lock_name(sock);
            vkp_i_registry_remove(sock->registry, name.path, &sock->lock_id);
        }
        (void)sys->close(sock->lock_fd);
        sock->lock_fd = -1;
        memset(&sock->lock_id, 0, sizeof sock->lock_id); /* a new file may get its inode */
    }
}

/* Give the socket's endpoint back, after the unlock. The endpoint of an abstract name is given back
   immediately: the name is free only when the descriptor is closed. */
static void vkp_i_socket_detach(vkp_socket *sock)
{
    vkp_registry *registry = sock->registry;
    vkp_i_endpoint *endpoint = sock->endpoint;
    sock->endpoint = NULL;
    if (endpoint != NULL && (sock->flags & VKP_I_SOCKET_ABSTRACT) != 0) {
        vkp_i_endpoint_unref(endpoint);
    } else if (endpoint != NULL) {
        endpoint->next = registry->to_close;
        registry->to_close = endpoint;
    }
}

/* Queue the follower's task, once until it ran. */
static void vkp_i_follower_notify(vkp_i_follower *follower)
{
    if (!follower->queued) {
        follower->queued = vkp_i_loop_queue(follower->loop, &follower->task);
    }
}

/* End a socket: set DEAD, remove it from the map, notify its followers, remove its file if it is
   still ours, then PATH.lock. `since_ns`: when its end was due, for the statistics. False: the
   socket was DEAD before. */
static bool vkp_i_socket_retire(vkp_socket *sock, uint64_t since_ns)
{
    vkp_registry *registry = sock->registry;
    const vkp_sys *sys = registry->sys;
    bool ours = sys->process_id() == sock->opener_pid; /* else a forked child: the parent's files */
    uint64_t now;
    if ((VKP_I_OR(&sock->word, VKP_I_DEAD) & VKP_I_DEAD) != 0) {
        return false;
    }
    VKP_I_STORE_REL(&sock->on_disk, 0u);
    vkp_i_map_remove(&registry->sockets, &sock->node);
    registry->stats.ended++;
    while (sock->followers != NULL) {
        vkp_i_follower *follower = sock->followers;
        sock->followers = follower->next;
        follower->sock = NULL;
        if (ours) {
            vkp_i_follower_notify(follower);
        }
    }
    if (ours && (sock->flags & VKP_I_SOCKET_ABSTRACT) == 0) {
        vkp_i_registry_remove(registry, sock->path, &sock->id);
    }
    vkp_i_socket_unlock(sock, ours);
    vkp_i_socket_detach(sock);
    now = sys->clock_ns();
    registry->stats.cleanup_last_ns = now > since_ns ? now - since_ns : 0;
    registry->stats.cleanup_total_ns += registry->stats.cleanup_last_ns;
    registry->stats.cleanup_most_ns =
        VKP_I_MAX(registry->stats.cleanup_most_ns, registry->stats.cleanup_last_ns);
    return true;
}

/* Make a slot without references spare, with a new generation. A slot whose generations are used up
   (the next one is 0) is never used again: an old weak handle could match it. */
static void vkp_i_socket_recycle(vkp_registry *registry, vkp_socket *sock)
{
    uint32_t generation = VKP_I_GENERATION(VKP_I_LOAD(&sock->word)) + 1;
    VKP_I_STORE_REL(&sock->word, (uint64_t)generation << 32);
    if (generation != 0) {
        sock->link = registry->spare;
        registry->spare = sock;
    }
    registry->released++;
}

/* Retire a socket without references, and make its slot spare. */
static void vkp_i_socket_end(vkp_registry *registry, vkp_socket *sock, uint64_t since_ns)
{
    (void)vkp_i_socket_retire(sock, since_ns);
    vkp_i_socket_recycle(registry, sock);
}

/* Queue upkeep on the loop. False: the loop is closed. */
static bool vkp_i_registry_request_upkeep(vkp_registry *registry)
{
    if (!registry->upkeep_queued && !registry->loop_gone) {
        registry->upkeep_queued = vkp_i_loop_queue(registry->config.loop, &registry->upkeep_task);
        registry->loop_gone = !registry->upkeep_queued;
        if (registry->upkeep_queued) {
            (void)VKP_I_ADD(&registry->refs, 1);
        }
    }
    return !registry->loop_gone;
}

/* Start the checks of files with the first socket, or later if the timer had no memory then. */
static void vkp_i_registry_ensure_checks(vkp_registry *registry)
{
    if (registry->config.check_ms > 0 && !registry->upkeep_attached) {
        (void)vkp_i_registry_request_upkeep(registry);
    }
}

/* End a socket or let it linger, if its count is still 0; otherwise only clear CLEANUP. Called by
   the thread that set CLEANUP, or by the thread that found the slot in `ended_slots`. */
static void vkp_i_socket_dispose(vkp_registry *registry, vkp_socket *sock)
{
    uint64_t word = VKP_I_LOAD_ACQ(&sock->word);
    bool lingers = false;
    vkp_i_registry_ensure_checks(registry);
    do {
        if ((word & VKP_I_REFS) == 0) {
            lingers = (word & VKP_I_DEAD) == 0 && registry->config.linger_ms > 0 &&
                      registry->sys->process_id() == sock->opener_pid &&
                      vkp_i_registry_request_upkeep(registry);
            if (!lingers) {
                vkp_i_socket_end(registry, sock, sock->ended_ns);
                return;
            }
        }
    } while (!VKP_I_CAS(&sock->word, &word, word & ~VKP_I_CLEANUP));
    if (lingers) {
        sock->flags |= VKP_I_SOCKET_LINGERS;
        sock->linger_until_ns = 0;
    }
}

/* Dispose of all slots in `ended_slots`. */
static void vkp_i_registry_dispose_all(vkp_registry *registry)
{
    vkp_socket *sock = NULL;
    if (VKP_I_LOAD_ACQ(&registry->ended_slots) != NULL) {
        sock = VKP_I_XCHG(&registry->ended_slots, (vkp_socket *)NULL);
    }
    while (sock != NULL) {
        vkp_socket *next = sock->link;
        uint64_t ended = registry->stats.ended;
        vkp_i_socket_dispose(registry, sock);
        registry->stats.handed_over +=
            registry->stats.ended - ended; /* 0 more if the socket lingers */
        sock = next;
    }
}

/* ---- the beginning of a socket; all functions under the registry's lock ---- */

/* Whether a process listens at the path: 0 no, 1 yes or not excluded, or a negated errno. */
static int vkp_i_socket_probe(const vkp_sys *sys, vkp_i_name name)
{
    vkp_address address = vkp_i_unix_address(name);
    int fd = sys->socket(AF_UNIX, SOCK_STREAM);
    int result;
    if (fd < 0) {
        return fd;
    }
    result = sys->connect(fd, address.storage.bytes, address.bytes);
    (void)sys->close(fd);
    return result == -ECONNREFUSED || result == -ENOENT ? 0 : 1;
}

/* Remove a dead process's socket file from the path; *cleared is then true. Our process holds
   PATH.lock. EXISTS: not a socket, or of another user. IN_USE: a process listens there. */
static vkp_status vkp_i_socket_clear(vkp_socket *sock, bool *cleared)
{
    vkp_registry *registry = sock->registry;
    const vkp_sys *sys = registry->sys;
    vkp_file_id found;
    int result = sys->identify(sock->path, &found);
    if (result == -ENOENT) {
        return VKP_OK;
    }
    if (result < 0) {
        return vkp_i_sys_failure(result);
    }
    if (!found.is_socket || found.uid != sys->user_id()) {
        vkp_i_registry_note(registry, VKP_LOG_ERROR, "%s: something that is no socket of this user",
                            sock->path);
        return VKP_ERR_EXISTS;
    }
    result = vkp_i_socket_probe(sys, vkp_i_socket_name(sock));
    if (result != 0) {
        return result < 0 ? vkp_i_sys_failure(result) : VKP_ERR_IN_USE;
    }
    result = vkp_i_unlink_same(sys, sock->path, &found);
    if (result < 0) {
        return vkp_i_sys_failure(result);
    }
    *cleared = true;
    vkp_i_registry_note(registry, VKP_LOG_INFO, "%s: taken over from a process that is gone",
                        sock->path);
    return VKP_OK;
}

/* Set the mode of the file, then listen: in this order no client connects before the mode holds. */
static int vkp_i_socket_start(vkp_socket *sock, int fd, vkp_file_id *id)
{
    const vkp_registry *registry = sock->registry;
    const vkp_sys *sys = registry->sys;
    int result = 0;
    if ((sock->flags & VKP_I_SOCKET_ABSTRACT) == 0) {
        result = sys->identify(sock->path, id);
        if (result == 0 && id->mode != registry->config.mode) {
            result = sys->chmod(sock->path, registry->config.mode);
        }
    }
    return result == 0 ? sys->listen(fd, registry->config.backlog) : result;
}

/* Bind and listen. On success the new endpoint replaces the old one, if there was one. */
static vkp_status vkp_i_socket_bind(vkp_socket *sock)
{
    vkp_registry *registry = sock->registry;
    const vkp_sys *sys = registry->sys;
    vkp_address address = vkp_i_unix_address(vkp_i_socket_name(sock));
    vkp_i_endpoint *endpoint = NULL;
    vkp_file_id id;
    int fd = sys->socket(AF_UNIX, SOCK_STREAM);
    int result = fd;
    memset(&id, 0, sizeof id);
    if (fd >= 0) {
        endpoint = vkp_i_endpoint_open(registry->env, fd);
        result = endpoint == NULL
                     ? -ENOMEM
                     : sys->bind(fd, address.storage.bytes, address.bytes, registry->config.mode);
    }
    if (result == 0) {
        result = vkp_i_socket_start(sock, fd, &id);
        if (result < 0 && (id.is_socket || sys->identify(sock->path, &id) == 0)) {
            (void)vkp_i_unlink_same(sys, sock->path, &id);
        }
    }
    if (result < 0) {
        if (endpoint != NULL) {
            vkp_i_endpoint_unref(endpoint);
        } else if (fd >= 0) {
            (void)sys->close(fd);
        }
        return result == -EADDRINUSE || result == -EEXIST ? VKP_ERR_IN_USE
                                                          : vkp_i_sys_failure(result);
    }
    vkp_i_socket_detach(sock);
    sock->endpoint = endpoint;
    sock->id = id;
    return VKP_OK;
}

/* Create and flock PATH.lock. IN_USE: another process holds it. EXISTS: it is a symbolic link. */
static vkp_status vkp_i_socket_lock(vkp_socket *sock)
{
    vkp_registry *registry = sock->registry;
    vkp_i_lock_name name = vkp_i_socket_lock_name(sock);
    int result = registry->sys->lock_file(name.path, &sock->lock_id);
    if (result >= 0) {
        sock->lock_fd = result;
        return VKP_OK;
    }
    if (result == -EWOULDBLOCK) {
        vkp_i_registry_note(registry, VKP_LOG_ERROR, "%s: another process serves it", sock->path);
        return VKP_ERR_IN_USE;
    }
    vkp_i_registry_note(registry, VKP_LOG_ERROR, "%s: %s", name.path, strerror(-result));
    return result == -ELOOP ? VKP_ERR_EXISTS : vkp_i_sys_failure(result);
}

/* Use the descriptor that the caller bound. On failure it stays the caller's. */
static vkp_status vkp_i_socket_adopt(vkp_socket *sock, int fd)
{
    vkp_registry *registry = sock->registry;
    int result = registry->sys->identify(sock->path, &sock->id);
    VKP_I_REQUIRE(result == 0 && sock->id.is_socket);
    result = registry->sys->prepare(fd); /* else accept would block a listener's loop */
    if (result < 0) {
        return vkp_i_sys_failure(result);
    }
    sock->endpoint = vkp_i_endpoint_open(registry->env, fd);
    return sock->endpoint != NULL ? VKP_OK : VKP_ERR_NOMEM;
}

/* A slot for the name, spare or new, with a count of 0. NULL: no memory. */
static vkp_socket *vkp_i_socket_new(vkp_registry *registry, vkp_i_name name)
{
    vkp_socket *sock = registry->spare;
    if (sock != NULL) {
        registry->spare = sock->link;
    } else {
        sock = (vkp_socket *)vkp_i_alloc_zero(registry->env, sizeof *sock);
        if (sock == NULL) {
            return NULL;
        }
        sock->registry = registry;
        sock->all = registry->all;
        VKP_I_STORE_REL(&registry->all, sock);
    }
    sock->endpoint = NULL;
    sock->followers = NULL;
    sock->flags = name.abstract ? VKP_I_SOCKET_ABSTRACT : 0;
    sock->blocked = VKP_OK;
    sock->lock_fd = -1;
    sock->opener_pid = registry->sys->process_id();
    memcpy(sock->path, name.text, name.len);
    sock->path[name.len] = '\0';
    sock->node.key = vkp_i_str(sock->path, name.len);
    VKP_I_STORE(&sock->node.hash, vkp_i_map_hash(&registry->sockets, sock->node.key));
    return sock;
}

/* Create the socket of a name that is not in the map. fd: bound by the caller, or -1: bind here. */
static vkp_status vkp_i_socket_create(vkp_registry *registry, vkp_i_name name, int fd,
                                      vkp_socket **out)
{
    vkp_status status = VKP_OK;
    vkp_socket *sock;
    bool cleared = false;
    int error;
    if (registry->sockets.count >= registry->config.max_sockets) {
        return VKP_ERR_LIMIT;
    }
    sock = vkp_i_socket_new(registry, name);
    if (sock == NULL) {
        return VKP_ERR_NOMEM;
    }
    if (!name.abstract) {
        status = vkp_i_socket_lock(sock);
    }
    if (status == VKP_OK && fd >= 0) {
        status = vkp_i_socket_adopt(sock, fd);
    } else if (status == VKP_OK) {
        status = name.abstract ? VKP_OK : vkp_i_socket_clear(sock, &cleared);
        status = status == VKP_OK ? vkp_i_socket_bind(sock) : status;
    }
    if (status == VKP_OK && !vkp_i_map_insert(&registry->sockets, &sock->node)) {
        status = VKP_ERR_NOMEM;
        if (fd < 0 && !name.abstract) {
            (void)vkp_i_unlink_same(registry->sys, sock->path, &sock->id);
        }
    }
    if (status == VKP_OK) {
        uint64_t word = VKP_I_LOAD(&sock->word);
        VKP_I_STORE_REL(&sock->word, word + 1);
        VKP_I_STORE_REL(&sock->on_disk, name.abstract ? 0u : 1u);
        (void)VKP_I_ADD(&registry->refs, 1);
        registry->stats.created++;
        registry->stats.taken_over += cleared ? 1u : 0u;
        vkp_i_registry_ensure_checks(registry);
        *out = sock;
        return VKP_OK;
    }
    error = errno;
    if (sock->endpoint != NULL && fd >= 0) { /* the descriptor stays the caller's */
        vkp_i_free(registry->env, sock->endpoint, sizeof *sock->endpoint);
        sock->endpoint = NULL;
    }
    vkp_i_socket_unlock(sock, true);
    vkp_i_socket_detach(sock);
    sock->link = registry->spare;
    registry->spare = sock;
    errno = error;
    return status;
}

/* The socket of the name in the map, without a reference, or NULL. */
static vkp_socket *vkp_i_registry_find(vkp_registry *registry, vkp_i_name name)
{
    vkp_str key = vkp_i_str(name.text, name.len);
    vkp_i_map_node *node =
        vkp_i_map_find(&registry->sockets, vkp_i_map_hash(&registry->sockets, key), key);
    return node != NULL ? VKP_CONTAINER(node, vkp_socket, node) : NULL;
}

/* A reference to the socket of the name. NOT_FOUND: there is none; an ending one was retired. */
static vkp_status vkp_i_registry_take(vkp_registry *registry, vkp_i_name name, vkp_socket **out)
{
    vkp_socket *sock = vkp_i_registry_find(registry, name);
    vkp_status status = VKP_ERR_NOT_FOUND;
    if (sock != NULL) {
        status = vkp_i_socket_take(sock, VKP_I_GENERATION(VKP_I_LOAD(&sock->word)), true);
    }
    if (status == VKP_OK) {
        *out = sock;
    } else if (sock != NULL && status == VKP_ERR_NOT_FOUND) {
        (void)vkp_i_socket_retire(sock, registry->sys->clock_ns());
    }
    return status;
}

#define VKP_I_PEEK_STEPS 32 /* nodes that a search without the lock visits at most */

/* Search without the lock: take a reference first, then compare the path. NULL proves nothing: the
   caller searches again under the lock. */
static vkp_socket *vkp_i_registry_peek(vkp_registry *registry, vkp_str name)
{
    uint64_t hash = vkp_i_map_hash(&registry->sockets, name);
    vkp_i_buckets *buckets = VKP_I_LOAD_ACQ(&registry->sockets.buckets);
    vkp_i_map_node *node = buckets != NULL ? VKP_I_LOAD_ACQ(vkp_i_map_bucket(buckets, hash)) : NULL;
    int steps;
    for (steps = 0; node != NULL && steps < VKP_I_PEEK_STEPS; steps++) {
        if (VKP_I_LOAD(&node->hash) == hash) {
            vkp_socket *sock = VKP_CONTAINER(node, vkp_socket, node);
            uint32_t generation = VKP_I_GENERATION(VKP_I_LOAD(&sock->word));
            if (vkp_i_socket_take(sock, generation, false) != VKP_OK) {
                return NULL;
            }
            if (vkp_i_str_equal(sock->node.key, name)) {
                return sock;
            }
            vkp_socket_unref(sock);
            return NULL;
        }
        node = VKP_I_LOAD_ACQ(&node->next);
    }
    return NULL;
}

#endif /* VKP_I_IO */

#if VKP_I_IO
/* ======================================================================================
   >>impl-registry   The registry of sockets
   ======================================================================================
   A registry maps paths to sockets and keeps none of them alive; each socket keeps the registry.
   The lock (vkp_i_registry_enter, leave) guards the members of vkp_registry from `sockets` to
   `next_check_ns`, and the guarded fields of its sockets. The socket section has lock order and
   states.
   Upkeep is the timed work, on the thread of config.loop. One pass, under the lock:
     1. ends sockets that lingered for linger_ms (all lingering ones, once the loop is closed);
     2. every check_ms compares the file at each path with the recorded one: another file or none is
        LOST; with config.rebind a new bind gives REBOUND or BLOCKED;
     3. starts the timer for the next pass, or stops it when nothing is due.
   After the unlock it calls on_event, one event at a time.
   A pass is started by upkeep_task (queued by a thread that made work for upkeep), by upkeep_timer,
   or by the close of the loop. The queued task and the attached place each hold a reference of the
   registry; the timer and the close take one more for their pass. */

#define VKP_I_REGISTRY_BACKLOG 4096 /* default of config.backlog; the system cuts it */
#define VKP_I_REGISTRY_MODE 0600    /* default of config.mode: the user only */
#define VKP_I_UNIQUE_TRIES 8        /* random names to try for a unique path */
#define VKP_I_UNIQUE_PATH_BYTES 512 /* bytes in which a unique path is built */

/* ---- upkeep ---- */

/* Mark the event: on_event is called for it after the unlock. */
static void vkp_i_socket_note_event(vkp_socket *sock, vkp_socket_event event)
{
    if (sock->registry->config.on_event != NULL) {
        sock->flags |= VKP_I_SOCKET_EVENT(event);
    }
}

/* Bind a lost socket again and notify its followers of the new descriptor. PATH.lock may be gone,
   too: then it is created again, which fails if another process holds a new one. */
static vkp_status vkp_i_socket_rebind(vkp_socket *sock)
{
    vkp_i_lock_name name = vkp_i_socket_lock_name(sock);
    vkp_i_follower *follower;
    vkp_file_id found;
    bool cleared = false;
    vkp_status status = VKP_OK;
    if (sock->lock_fd < 0 || sock->registry->sys->identify(name.path, &found) != 0 ||
        !vkp_i_same_file(&found, &sock->lock_id)) {
        vkp_i_socket_unlock(sock, false);
        status = vkp_i_socket_lock(sock);
    }
    VKP_I_STORE_REL(&sock->on_disk, 0u);
    status = status == VKP_OK ? vkp_i_socket_clear(sock, &cleared) : status;
    status = status == VKP_OK ? vkp_i_socket_bind(sock) : status;
    VKP_I_STORE_REL(&sock->on_disk, 1u);
    for (follower = sock->followers; status == VKP_OK && follower != NULL;
         follower = follower->next) {
        vkp_i_follower_notify(follower);
    }
    return status;
}

/* Compare the file at the path with the recorded one, and bind again if it is lost. */
static void vkp_i_socket_check(vkp_socket *sock)
{
    vkp_registry *registry = sock->registry;
    vkp_file_id found;
    vkp_status status;
    int result = registry->sys->identify(sock->path, &found);
    if (result == 0 && vkp_i_same_file(&found, &sock->id)) {
        sock->flags &= ~VKP_I_SOCKET_LOST; /* the file may be back */
        sock->blocked = VKP_OK;
        return;
    }
    if (result < 0 && result != -ENOENT && result != -ENOTDIR) {
        return; /* lstat failed (for example: no permission): the file may be there */
    }
    if ((sock->flags & VKP_I_SOCKET_LOST) == 0) {
        sock->flags |= VKP_I_SOCKET_LOST;
        registry->stats.lost++;
        vkp_i_socket_note_event(sock, VKP_SOCKET_LOST);
    }
    if (!registry->config.rebind) {
        return;
    }
    status = vkp_i_socket_rebind(sock);
    if (status == VKP_OK) {
        sock->flags &= ~VKP_I_SOCKET_LOST;
        registry->stats.rebound++;
        vkp_i_socket_note_event(sock, VKP_SOCKET_REBOUND);
    } else if (status != sock->blocked) {
        vkp_i_socket_note_event(sock, VKP_SOCKET_BLOCKED);
    }
    sock->blocked = status;
}

/* Call on_event for each marked event, without the lock. The search starts again after each call:
   the program may change the map in the callback. LOST is reported first, then BLOCKED, REBOUND. */
static void vkp_i_registry_notify_events(vkp_registry *registry)
{
    for (;;) {
        vkp_i_map_node *node = NULL;
        vkp_socket *sock = NULL;
        uint32_t event = 0;
        vkp_status status = VKP_OK;
        vkp_i_registry_enter(registry);
        while (event == 0 && (node = vkp_i_map_get_next(&registry->sockets, node)) != NULL) {
            sock = VKP_CONTAINER(node, vkp_socket, node);
            for (event = VKP_SOCKET_BLOCKED; event > 0; event--) {
                if ((sock->flags & VKP_I_SOCKET_EVENT(event)) != 0) {
                    break;
                }
            }
            if (event > 0) {
                event = (sock->flags & VKP_I_SOCKET_EVENT(VKP_SOCKET_LOST)) != 0
                            ? (uint32_t)VKP_SOCKET_LOST
                            : event;
                sock->flags &= ~VKP_I_SOCKET_EVENT(event);
                status = event == VKP_SOCKET_BLOCKED ? sock->blocked : VKP_OK;
                if (vkp_i_socket_take(sock, VKP_I_GENERATION(VKP_I_LOAD(&sock->word)), false) !=
                    VKP_OK) {
                    event = 0; /* the socket is ending: its event is dropped */
                }
            }
        }
        vkp_i_registry_leave(registry, true);
        if (event == 0) {
            return;
        }
        registry->config.on_event(registry->config.user, sock, (vkp_socket_event)event, status);
        vkp_socket_unref(sock);
    }
}

static void vkp_i_registry_on_timer(vkp_timer *timer);

/* One pass of upkeep, under the lock. `over`: the loop is closed, every lingering socket ends now.
   Returns when the next pass is due, or VKP_FOREVER. */
static uint64_t vkp_i_registry_do_upkeep(vkp_registry *registry, uint64_t now_ns, bool over)
{
    uint64_t next_ns = VKP_FOREVER;
    bool check = registry->config.check_ms > 0 && !over && now_ns >= registry->next_check_ns;
    vkp_i_map_node *node = NULL;
    if (check) {
        registry->next_check_ns = vkp_i_after_ms(now_ns, registry->config.check_ms);
    }
    while ((node = vkp_i_map_get_next(&registry->sockets, node)) != NULL) {
        vkp_socket *sock = VKP_CONTAINER(node, vkp_socket, node);
        bool lingers = (sock->flags & VKP_I_SOCKET_LINGERS) != 0;
        if (lingers && sock->linger_until_ns == 0) {
            sock->linger_until_ns = vkp_i_after_ms(now_ns, registry->config.linger_ms);
        }
        if (lingers && (over || now_ns >= sock->linger_until_ns)) {
            vkp_i_socket_end(registry, sock, registry->sys->clock_ns());
            continue;
        }
        if (lingers) {
            next_ns = VKP_I_MIN(next_ns, sock->linger_until_ns);
        }
        if (check && (sock->flags & VKP_I_SOCKET_ABSTRACT) == 0) {
            vkp_i_socket_check(sock);
        }
    }
    if (registry->config.check_ms > 0 && !over && registry->sockets.count > 0) {
        next_ns = VKP_I_MIN(next_ns, registry->next_check_ns);
    }
    return next_ns;
}

/* Run a pass and start or stop the timer. Loop's thread; the caller holds a reference of the
   registry. While upkeep_place is attached, it holds another one. */
static void vkp_i_registry_run_upkeep(vkp_registry *registry)
{
    vkp_loop *loop = registry->config.loop;
    uint64_t next_ns;
    vkp_i_registry_enter(registry);
    registry->loop_gone = registry->loop_gone || loop->closed;
    next_ns = vkp_i_registry_do_upkeep(registry, loop->now_ns, registry->loop_gone);
    if (next_ns != VKP_FOREVER && vkp_timer_start(&registry->upkeep_timer, loop,
                                                  vkp_i_registry_on_timer, 0, next_ns) != VKP_OK) {
        /* Without a timer no socket can linger: end them now. */
        next_ns = vkp_i_registry_do_upkeep(registry, loop->now_ns, true);
    }
    if (next_ns != VKP_FOREVER && !registry->upkeep_attached) {
        registry->upkeep_attached = true;
        (void)VKP_I_ADD(&registry->refs, 1);
        vkp_i_loop_attach(loop, &registry->upkeep_place);
    } else if (next_ns == VKP_FOREVER && registry->upkeep_attached) {
        registry->upkeep_attached = false;
        registry->released++;
        vkp_timer_stop(&registry->upkeep_timer);
        vkp_i_loop_detach(&registry->upkeep_place);
    }
    vkp_i_registry_leave(registry, true);
    if (registry->config.on_event != NULL) {
        vkp_i_registry_notify_events(registry);
    }
}

static void vkp_i_registry_on_timer(vkp_timer *timer)
{
    vkp_registry *registry = VKP_CONTAINER(timer, vkp_registry, upkeep_timer);
    (void)VKP_I_ADD(&registry->refs, 1);
    vkp_i_registry_run_upkeep(registry);
    vkp_i_registry_drop(registry, 1);
}

/* upkeep_task: upkeep was requested by vkp_i_registry_request_upkeep. */
static void vkp_i_registry_on_call(vkp_i_task *task)
{
    vkp_registry *registry = VKP_CONTAINER(task, vkp_registry, upkeep_task);
    vkp_i_registry_enter(registry);
    registry->upkeep_queued = false;
    vkp_i_registry_leave(registry, true);
    vkp_i_registry_run_upkeep(registry);
    vkp_i_registry_drop(registry, 1); /* the task's */
}

static void vkp_i_registry_on_loop_close(vkp_i_attached *place)
{
    vkp_registry *registry = VKP_CONTAINER(place, vkp_registry, upkeep_place);
    (void)VKP_I_ADD(&registry->refs, 1);
    vkp_i_registry_run_upkeep(registry); /* loop->closed is true */
    vkp_i_registry_drop(registry, 1);
}

/* ---- the functions of the API ---- */

/* The folder of unique paths: $XDG_RUNTIME_DIR if it belongs to the user, $TMPDIR, or /tmp. */
static const char *vkp_i_default_folder(const vkp_sys *sys)
{
    const char *folder = getenv("XDG_RUNTIME_DIR");
    vkp_file_id id;
    if (folder != NULL && folder[0] == '/' && sys->identify(folder, &id) == 0 &&
        id.uid == sys->user_id()) {
        return folder;
    }
    folder = getenv("TMPDIR");
    return folder != NULL && folder[0] == '/' && sys->identify(folder, &id) == 0 ? folder : "/tmp";
}

VKP_API vkp_status vkp_registry_open(const vkp_registry_config *config, vkp_registry **out)
{
    vkp_registry *registry;
    const vkp_env *env = vkp_i_env(config != NULL ? config->env : NULL);
    VKP_I_REQUIRE(out != NULL);
    VKP_I_REQUIRE(config == NULL || config->loop != NULL ||
                  (config->linger_ms == 0 && config->check_ms == 0));
    registry = (vkp_registry *)vkp_i_alloc_zero(env, sizeof *registry);
    if (registry == NULL) {
        return VKP_ERR_NOMEM;
    }
    registry->env = env;
    registry->sys = vkp_i_sys(env);
    registry->refs = 1;
    if (config != NULL) {
        registry->config = *config;
    }
    if (registry->config.folder.ptr == NULL) {
        registry->config.folder = vkp_str_of(vkp_i_default_folder(registry->sys));
    }
    if (!vkp_i_copy_str(env, &registry->config.folder)) {
        vkp_i_free(env, registry, sizeof *registry);
        return VKP_ERR_NOMEM;
    }
    if (registry->config.backlog <= 0) {
        registry->config.backlog = VKP_I_REGISTRY_BACKLOG;
    }
    if (registry->config.mode == 0) {
        registry->config.mode = VKP_I_REGISTRY_MODE;
    }
    if (registry->config.max_sockets == 0) {
        registry->config.max_sockets = SIZE_MAX;
    }
    if (registry->config.max_references == 0 || registry->config.max_references > VKP_I_MOST_REFS) {
        registry->config.max_references = VKP_I_MOST_REFS;
    }
    if (registry->config.loop != NULL) {
        (void)vkp_loop_ref(registry->config.loop);
    }
    registry->upkeep_task.fn = vkp_i_registry_on_call;
    registry->upkeep_place.on_loop_close = vkp_i_registry_on_loop_close;
    VKP_I_MUTEX_INIT(&registry->mutex);
    vkp_i_map_init(&registry->sockets, env);
    registry->sockets.shared = true;
    *out = registry;
    return VKP_OK;
}

VKP_API vkp_registry *vkp_registry_ref(vkp_registry *registry)
{
    (void)VKP_I_ADD(&registry->refs, 1);
    return registry;
}

VKP_API void vkp_registry_unref(vkp_registry *registry)
{
    if (registry != NULL) {
        vkp_i_registry_drop(registry, 1);
    }
}

VKP_API void vkp_registry_get_stats(vkp_registry *registry, vkp_registry_stats *stats)
{
    vkp_i_map_node *node = NULL;
    vkp_i_registry_enter(registry);
    *stats = registry->stats;
    stats->live = registry->sockets.count;
    stats->references = 0;
    while ((node = vkp_i_map_get_next(&registry->sockets, node)) != NULL) {
        stats->references += vkp_socket_get_ref_count(VKP_CONTAINER(node, vkp_socket, node));
    }
    vkp_i_registry_leave(registry, true);
}

VKP_API size_t vkp_registry_get_count(vkp_registry *registry)
{
    size_t count;
    vkp_i_registry_enter(registry);
    count = registry->sockets.count;
    vkp_i_registry_leave(registry, true);
    return count;
}

VKP_API bool vkp_registry_is_active(vkp_registry *registry, vkp_str path)
{
    vkp_i_name name;
    vkp_socket *sock;
    name.text = path.ptr;
    name.len = path.len;
    name.abstract = false; /* not used by the search */
    vkp_i_registry_enter(registry);
    sock = vkp_i_registry_find(registry, name);
    vkp_i_registry_leave(registry, true);
    return sock != NULL;
}

VKP_API size_t vkp_registry_cleanup_all(vkp_registry *registry)
{
    size_t count = 0;
    vkp_i_map_node *node;
    uint64_t now_ns;
    vkp_i_registry_enter(registry);
    now_ns = registry->sys->clock_ns();
    while ((node = vkp_i_map_get_next(&registry->sockets, NULL)) != NULL) {
        vkp_socket *sock = VKP_CONTAINER(node, vkp_socket, node);
        bool lingers = (sock->flags & VKP_I_SOCKET_LINGERS) != 0;
        (void)vkp_i_socket_retire(sock, now_ns);
        if (lingers) {
            vkp_i_socket_recycle(registry, sock);
        }
        count++;
    }
    vkp_i_registry_leave(registry, true);
    return count;
}

VKP_API void vkp_registry_unlink_all(vkp_registry *registry)
{
    const vkp_sys *sys = registry->sys;
    int error = errno;
    vkp_socket *sock;
    for (sock = VKP_I_LOAD_ACQ(&registry->all); sock != NULL; sock = sock->all) {
        if (VKP_I_LOAD_ACQ(&sock->on_disk) != 0 && sock->opener_pid == sys->process_id()) {
            vkp_i_lock_name name = vkp_i_socket_lock_name(sock);
            (void)vkp_i_unlink_same(sys, sock->path, &sock->id);
            (void)vkp_i_unlink_same(sys, name.path, &sock->lock_id);
        }
    }
    errno = error;
}

/* A reference to the socket of the path; `create`: make one if there is none. */
static vkp_status vkp_i_registry_get(vkp_registry *registry, vkp_str text, bool create,
                                     vkp_socket **out)
{
    vkp_i_name name;
    vkp_socket *sock = NULL;
    vkp_status status = VKP_OK;
    if (text.len > 0) {
        sock = vkp_i_registry_peek(registry, text); /* a path in the map is valid */
    }
    if (sock == NULL) {
        status = vkp_i_name_of(registry->env, text, registry->config.abstract_names, &name);
        if (status != VKP_OK) {
            return status;
        }
        vkp_i_registry_enter(registry);
        status = vkp_i_registry_take(registry, name, &sock);
        if (status == VKP_ERR_NOT_FOUND && create) {
            status = vkp_i_socket_create(registry, name, -1, &sock);
        }
        vkp_i_registry_leave(registry, true);
    }
    if (status == VKP_OK) {
        *out = sock;
    }
    return status;
}

/* Create a socket with a random name in the registry's folder; if it is in use, try another. */
static vkp_status vkp_i_registry_get_unique(vkp_registry *registry, vkp_socket **out)
{
    vkp_status status = VKP_ERR_IN_USE;
    int i;
    for (i = 0; i < VKP_I_UNIQUE_TRIES && (status == VKP_ERR_IN_USE || status == VKP_ERR_EXISTS);
         i++) {
        char text[VKP_I_UNIQUE_PATH_BYTES];
        vkp_i_name name;
        int len = snprintf(text, sizeof text, "%.*s/vkp-%d-%08lx.sock",
                           VKP_FMT(registry->config.folder), registry->sys->process_id(),
                           (unsigned long)(registry->sys->random_u64() & 0xffffffffu));
        status = len < 0 || (size_t)len >= sizeof text
                     ? VKP_ERR_LIMIT
                     : vkp_i_name_of(registry->env, vkp_i_str(text, (size_t)len), false, &name);
        if (status == VKP_OK) {
            vkp_i_registry_enter(registry);
            status = vkp_i_registry_find(registry, name) != NULL
                         ? VKP_ERR_EXISTS
                         : vkp_i_socket_create(registry, name, -1, out);
            vkp_i_registry_leave(registry, true);
        }
    }
    return status;
}

VKP_API vkp_status vkp_socket_open(vkp_registry *registry, vkp_str path, vkp_socket **out)
{
    VKP_I_REQUIRE(registry != NULL && out != NULL);
    return path.ptr != NULL ? vkp_i_registry_get(registry, path, true, out)
                            : vkp_i_registry_get_unique(registry, out);
}

VKP_API vkp_status vkp_socket_find(vkp_registry *registry, vkp_str path, vkp_socket **out)
{
    VKP_I_REQUIRE(registry != NULL && out != NULL && path.ptr != NULL);
    return vkp_i_registry_get(registry, path, false, out);
}

VKP_API vkp_status vkp_socket_adopt(vkp_registry *registry, vkp_str path, int fd, vkp_socket **out)
{
    vkp_i_name name;
    vkp_socket *sock = NULL;
    vkp_status status;
    VKP_I_REQUIRE(registry != NULL && out != NULL && path.ptr != NULL && fd >= 0);
    status = vkp_i_name_of(registry->env, path, registry->config.abstract_names, &name);
    if (status == VKP_OK && name.abstract) {
        status = VKP_ERR_UNSUPPORTED;
    }
    if (status != VKP_OK) {
        return status;
    }
    vkp_i_registry_enter(registry);
    status = vkp_i_registry_take(registry, name, &sock);
    if (status == VKP_ERR_NOT_FOUND) {
        status = vkp_i_socket_create(registry, name, fd, out);
    } else if (status == VKP_OK || status == VKP_ERR_LIMIT) {
        status = VKP_ERR_EXISTS;
    }
    vkp_i_registry_leave(registry, true);
    vkp_socket_unref(sock);
    return status;
}

/* ---- pools ---- */

struct vkp_socket_pool {
    vkp_registry *registry;
    size_t refs;          /* atomic */
    size_t turn;          /* atomic: counts the picks; each search starts at the next socket */
    vkp_balance balance;  /* constant, as are the members below */
    size_t capacity;      /* sockets that the memory was allocated for */
    size_t count;         /* sockets that are open */
    vkp_socket **sockets; /* in the same allocation, behind this struct */
};

VKP_API vkp_socket_pool *vkp_socket_pool_ref(vkp_socket_pool *pool)
{
    (void)VKP_I_ADD(&pool->refs, 1);
    return pool;
}

VKP_API void vkp_socket_pool_unref(vkp_socket_pool *pool)
{
    if (pool != NULL && VKP_I_UNREF(&pool->refs) == 1) {
        vkp_registry *registry = pool->registry;
        while (pool->count > 0) {
            vkp_socket_unref(pool->sockets[--pool->count]);
        }
        vkp_i_free(registry->env, pool, sizeof *pool + pool->capacity * sizeof *pool->sockets);
        vkp_registry_unref(registry);
    }
}

VKP_API vkp_status vkp_socket_pool_open(const vkp_socket_pool_config *config, vkp_socket_pool **out)
{
    vkp_socket_pool *pool;
    vkp_status status = VKP_OK;
    VKP_I_REQUIRE(config != NULL && out != NULL && config->registry != NULL && config->count > 0);
    if (config->count > (SIZE_MAX - sizeof *pool) / sizeof *pool->sockets) {
        return VKP_ERR_NOMEM;
    }
    pool = (vkp_socket_pool *)vkp_i_alloc_zero(
        config->registry->env, sizeof *pool + config->count * sizeof *pool->sockets);
    if (pool == NULL) {
        return VKP_ERR_NOMEM;
    }
    pool->registry = vkp_registry_ref(config->registry);
    pool->refs = 1;
    pool->balance = config->balance;
    pool->capacity = config->count;
    pool->sockets = (vkp_socket **)(void *)(pool + 1);
    while (pool->count < pool->capacity && status == VKP_OK) {
        vkp_str path = config->paths != NULL ? config->paths[pool->count] : vkp_i_str(NULL, 0);
        status = vkp_socket_open(pool->registry, path, &pool->sockets[pool->count]);
        pool->count += status == VKP_OK ? 1u : 0u;
    }
    if (status != VKP_OK) {
        int error = errno;
        vkp_socket_pool_unref(pool);
        errno = error;
        return status;
    }
    *out = pool;
    return VKP_OK;
}

VKP_API vkp_status vkp_socket_pool_pick(vkp_socket_pool *pool, vkp_socket **out)
{
    vkp_status status = VKP_ERR_CLOSED;
    vkp_socket *best = NULL;
    size_t least = SIZE_MAX;
    size_t start;
    size_t i;
    VKP_I_REQUIRE(pool != NULL && out != NULL);
    start = VKP_I_ADD(&pool->turn, 1);
    for (i = 0; i < pool->count && least > 0; i++) {
        vkp_socket *each = pool->sockets[(start + i) % pool->count];
        size_t load = vkp_socket_get_ref_count(each);
        if (!vkp_socket_is_active(each) || load >= least) {
            continue;
        }
        status = load < each->registry->config.max_references ? VKP_OK : VKP_ERR_LIMIT;
        if (status == VKP_OK) {
            best = each;
            least = pool->balance == VKP_BALANCE_TURN ? 0 : load;
        }
    }
    if (best != NULL) {
        best = vkp_socket_ref(best);
        status = best != NULL ? VKP_OK : VKP_ERR_LIMIT;
    }
    if (status == VKP_OK) {
        *out = best;
    }
    return status;
}

VKP_API size_t vkp_socket_pool_get_count(const vkp_socket_pool *pool)
{
    return pool->count;
}

VKP_API vkp_socket *vkp_socket_pool_get_socket(const vkp_socket_pool *pool, size_t index)
{
    return pool->sockets[index];
}

#endif /* VKP_I_IO */

#if VKP_I_IO
/* ======================================================================================
   >>impl-gate   Who may come in
   ======================================================================================
   A gate counts admitted clients. One vkp_seat counts all clients of one uid at one listener; it is
   freed with its last client. Admission walks the list of seats, which has at most uids times
   listeners entries.
   The gate's mutex guards `seats`, `stats` and the links and counts of the seats. No other lock is
   taken under it: `allow` is called and sockets are given back without it. Members that are neither
   guarded nor atomic are constant after open.
   Each client of a seat holds one reference of seat->sock; the seat holds one of the gate. */

/* All clients of one uid that one listener accepted. */
struct vkp_seat {
    vkp_seat *prev;   /* in gate->seats; NULL: the first */
    vkp_seat *next;   /* in gate->seats; NULL: the last */
    vkp_gate *gate;   /* a reference */
    vkp_socket *sock; /* one reference per client; NULL: the listener does not follow a socket */
    uint64_t listener_id; /* number of the listener, unique at this gate */
    uint32_t uid;         /* of the clients; valid if has_uid */
    bool has_uid;         /* false for TCP clients */
    size_t clients;       /* admitted and not yet given back */
};

struct vkp_gate {
    const vkp_env *env;
    const vkp_sys *sys;
    size_t refs;            /* atomic */
    vkp_gate_config config; /* 0 limits are SIZE_MAX here; its allow_uids is the caller's memory */
    uint32_t *allow_uids;   /* copy of config.allow_uids */
    uint64_t listener_ids;  /* atomic: the number of the next listener */
    VKP_I_MUTEX mutex;
    vkp_seat *seats;      /* guarded by mutex */
    vkp_gate_stats stats; /* guarded by mutex */
};

VKP_API vkp_status vkp_gate_open(const vkp_gate_config *config, vkp_gate **out)
{
    const vkp_env *env = vkp_i_env(config != NULL ? config->env : NULL);
    vkp_gate *gate;
    VKP_I_REQUIRE(out != NULL);
    VKP_I_REQUIRE(config == NULL || config->allow_uid_count == 0 || config->allow_uids != NULL);
    gate = (vkp_gate *)vkp_i_alloc_zero(env, sizeof *gate);
    if (gate == NULL) {
        return VKP_ERR_NOMEM;
    }
    gate->env = env;
    gate->sys = vkp_i_sys(env);
    gate->refs = 1;
    if (config != NULL) {
        gate->config = *config;
    }
    if (gate->config.allow_uid_count > 0) {
        size_t bytes = gate->config.allow_uid_count * sizeof *gate->allow_uids;
        gate->allow_uids = (uint32_t *)vkp_i_alloc(env, bytes);
        if (gate->allow_uids == NULL) {
            vkp_i_free(env, gate, sizeof *gate);
            return VKP_ERR_NOMEM;
        }
        memcpy(gate->allow_uids, gate->config.allow_uids, bytes);
    }
    if (gate->config.max_clients == 0) {
        gate->config.max_clients = SIZE_MAX;
    }
    if (gate->config.max_clients_per_uid == 0) {
        gate->config.max_clients_per_uid = SIZE_MAX;
    }
    VKP_I_MUTEX_INIT(&gate->mutex);
    *out = gate;
    return VKP_OK;
}

VKP_API vkp_gate *vkp_gate_ref(vkp_gate *gate)
{
    (void)VKP_I_ADD(&gate->refs, 1);
    return gate;
}

VKP_API void vkp_gate_unref(vkp_gate *gate)
{
    if (gate != NULL && VKP_I_UNREF(&gate->refs) == 1) {
        vkp_i_free(gate->env, gate->allow_uids,
                   gate->config.allow_uid_count * sizeof *gate->allow_uids);
        VKP_I_MUTEX_DEINIT(&gate->mutex);
        vkp_i_free(gate->env, gate, sizeof *gate);
    }
}

VKP_API void vkp_gate_get_stats(vkp_gate *gate, vkp_gate_stats *stats)
{
    VKP_I_LOCK(&gate->mutex);
    *stats = gate->stats;
    VKP_I_UNLOCK(&gate->mutex);
}

/* Whether a client of this uid may connect: `allow` decides if it is set. Not under the mutex. */
static bool vkp_i_gate_allows(const vkp_gate *gate, const vkp_peer *peer)
{
    size_t i;
    if (gate->config.allow != NULL) {
        return gate->config.allow(gate->config.user, peer);
    }
    if (gate->config.allow_any_uid || peer->uid == gate->sys->user_id()) {
        return true;
    }
    for (i = 0; i < gate->config.allow_uid_count; i++) {
        if (gate->allow_uids[i] == peer->uid) {
            return true;
        }
    }
    return false;
}

/* Admit a client, under the mutex. `wanted` has the fields of its seat; `most` is the listener's
   limit of clients. OK gives *out; LIMIT or NOMEM give *why. */
static vkp_status vkp_i_gate_seat(vkp_gate *gate, const vkp_seat *wanted, size_t most,
                                  vkp_seat **out, vkp_refusal *why)
{
    vkp_seat *found = NULL;
    vkp_seat *each;
    size_t of_listener = 0;
    size_t of_uid = 0;
    for (each = gate->seats; each != NULL; each = each->next) {
        bool same_uid = each->has_uid == wanted->has_uid && each->uid == wanted->uid;
        of_listener += each->listener_id == wanted->listener_id ? each->clients : 0;
        of_uid += same_uid ? each->clients : 0;
        if (same_uid && each->listener_id == wanted->listener_id) {
            found = each;
        }
    }
    *why = VKP_REFUSAL_FULL;
    if (gate->stats.clients >= gate->config.max_clients || of_listener >= most) {
        return VKP_ERR_LIMIT;
    }
    *why = VKP_REFUSAL_USER_FULL;
    if (wanted->has_uid && of_uid >= gate->config.max_clients_per_uid) {
        return VKP_ERR_LIMIT;
    }
    *why = VKP_REFUSAL_OVERLOAD;
    if (found == NULL) {
        found = (vkp_seat *)vkp_i_alloc(gate->env, sizeof *found);
        if (found == NULL) {
            return VKP_ERR_NOMEM;
        }
        *found = *wanted;
        found->gate = vkp_gate_ref(gate);
        found->next = gate->seats;
        if (found->next != NULL) {
            found->next->prev = found;
        }
        gate->seats = found;
    }
    found->clients++;
    gate->stats.clients++;
    gate->stats.admitted++;
    *out = found;
    return VKP_OK;
}

/* Count a refused client in the statistics. */
static void vkp_i_gate_count_refusal(vkp_gate *gate, vkp_refusal why)
{
    VKP_I_LOCK(&gate->mutex);
    gate->stats.refused[why]++;
    VKP_I_UNLOCK(&gate->mutex);
}

VKP_API void vkp_seat_unref(vkp_seat *seat)
{
    vkp_gate *gate;
    vkp_socket *sock;
    bool last;
    if (seat == NULL) {
        return;
    }
    gate = seat->gate;
    VKP_I_LOCK(&gate->mutex);
    sock = seat->sock;
    gate->stats.clients--;
    last = --seat->clients == 0;
    if (last) {
        if (seat->prev != NULL) {
            seat->prev->next = seat->next;
        } else {
            gate->seats = seat->next;
        }
        if (seat->next != NULL) {
            seat->next->prev = seat->prev;
        }
    }
    VKP_I_UNLOCK(&gate->mutex);
    vkp_socket_unref(sock);
    if (last) {
        vkp_i_free(gate->env, seat, sizeof *seat);
        vkp_gate_unref(gate);
    }
}

#endif /* VKP_I_IO */

#if VKP_I_IO
/* ======================================================================================
   >>impl-conn-queue   Connections: the struct, and its queue
   ======================================================================================
   Every field of a connection belongs to its loop's thread, except the atomic fields, `remote`
   and the inbox.
   The outbox is a queue of spans: neighbouring frames of one block are ONE span, which holds one
   reference and is written as one range. frame_len finds the borders of the frames again when
   the policy must drop one. A push writes only when the outbox is full: otherwise it defers the
   connection's task, and the round ends with one gathered write per connection.
   A push never closes the connection, because its caller may be iterating over many connections:
   vkp_i_conn_close_later sets VKP_I_CONN_CLOSES, and the deferred task closes.
   An idle connection has no buffers: input is read into the loop's block, and the start of an
   incomplete frame is kept in a block of its own size.                                        */

/* Values of vkp_conn.state. */
#define VKP_I_CONN_OPEN 0u
#define VKP_I_CONN_CLOSED 1u

/* Bits of vkp_conn.flags. */
#define VKP_I_CONN_CONNECTING 1u /* connect() has not finished */
#define VKP_I_CONN_PAUSED 2u     /* vkp_conn_pause was called: nothing is read */
#define VKP_I_CONN_ENDED 4u      /* the peer closed its sending side: nothing is read */
#define VKP_I_CONN_DRAINING 8u   /* vkp_conn_drain was called: closes when all queues are written */
#define VKP_I_CONN_BLOCKED 16u   /* the kernel's buffer is full: waits for VKP_IO_WRITE */
#define VKP_I_CONN_QUEUED 32u    /* vkp_conn.task is deferred */
#define VKP_I_CONN_CLOSES 64u    /* vkp_conn.task closes the connection with closes_reason */
#define VKP_I_CONN_REREAD 128u   /* resumed: the kept input is delivered to on_data again */
#define VKP_I_CONN_INBOX_HELD 256u /* frames wait in the inbox for room in the outbox: no handler */

/* Defaults of vkp_conn_config. */
#define VKP_I_CONN_QUEUE_FRAMES 65536u
#define VKP_I_CONN_QUEUE_BYTES ((size_t)8 << 20)
#define VKP_I_CONN_INPUT_BYTES ((size_t)512 << 20)

/* The config and the counters that the connections of a listener, or of a relay's shard, share. */
typedef struct vkp_i_profile {
    const vkp_env *env;
    size_t refs;            /* atomic */
    uint64_t dropped;       /* atomic: pushes that the policy dropped, over all connections */
    size_t live;            /* open connections of vkp_i_conn_adopt; loop's thread */
    vkp_i_task *when_empty; /* deferred once when `live` becomes 0, or NULL; loop's thread */
    vkp_conn_config config;
} vkp_i_profile;

/* A range of the outbox: neighbouring frames of one block. */
typedef struct vkp_i_span {
    const uint8_t *data; /* the first byte that is not written */
    vkp_block *block;    /* holds one reference, or NULL: static bytes */
    uint32_t len;        /* bytes that are not written */
    uint32_t frames;     /* pushes in the span; 0: response stream, never dropped */
} vkp_i_span;

/* Frames that other threads pushed. */
typedef struct vkp_i_inbox {
    vkp_mpsc_tx *tx;      /* sender of vkp_bytes, used by every pushing thread */
    vkp_mpsc_rx *rx;      /* receiver of vkp_bytes, loop's thread */
    vkp_handler *handler; /* moves frames to the outbox; NULL while the inbox is held */
} vkp_i_inbox;

/* Close the inbox's handler: frames stay in the inbox until a handler is opened again. Loop's
   thread.                                                                                     */
static void vkp_i_inbox_hold(vkp_i_inbox *inbox)
{
    vkp_handler_unref(inbox->handler);
    inbox->handler = NULL;
}

#define VKP_I_CONNECT_TRIES 8 /* most addresses that one connect tries */

typedef struct vkp_i_connecting {
    vkp_address addresses[VKP_I_CONNECT_TRIES]; /* the peer's resolved addresses */
    size_t count;                               /* used elements of `addresses` */
    size_t next;                                /* index of the address to try next */
    vkp_conn *conn;                             /* whose connect this is */
    uint64_t deadline_ns;                       /* of the whole connect */
    vkp_timer timer;                            /* ends the share of an address */
} vkp_i_connecting;

/* The fields that a push uses are first: they fill two cache lines instead of five. */
struct vkp_conn {
    vkp_i_profile *profile; /* shared */
    uint32_t state;         /* atomic: VKP_I_CONN_OPEN or VKP_I_CONN_CLOSED */
    uint32_t flags;         /* VKP_I_CONN_CONNECTING and the other bits */
    vkp_i_span first;       /* the queue's head; the other spans are in the ring `more` */
    uint32_t spans;         /* spans in the queue, `first` included */
    uint32_t head_sent;     /* written bytes of `first`: first.data is that far behind its start */
    size_t queued_frames; /* pushes in the queue; written ones of `first` count until normalized */
    size_t queued_bytes;  /* bytes in the queue: pushes and response stream */
    size_t pushed_bytes;  /* bytes of pushes in the queue */
    vkp_i_task task;      /* deferred to the end of the round */
    vkp_loop *loop;       /* shared */
    size_t refs;          /* atomic; the loop holds one until the close, each queued task one */
    vkp_i_span *more;     /* ring of the spans behind `first`, or NULL */
    uint32_t more_capacity;         /* places in `more`: a power of two, or 0 */
    uint32_t more_head;             /* index in `more` of the span behind `first` */
    void *user;                     /* the program's pointer, an argument of every callback */
    vkp_io io;                      /* registration of fd */
    vkp_i_task remote;              /* closes the connection; queued by another thread */
    uint32_t remote_queued;         /* atomic: 1 once `remote` was queued */
    int fd;                         /* -1: none */
    int closes_error;               /* errno for on_close, set with VKP_I_CONN_CLOSES */
    vkp_close_reason closes_reason; /* reason for on_close, set with VKP_I_CONN_CLOSES */
    vkp_block *input;               /* bytes that on_data left, from input_begin on; or NULL */
    size_t input_begin;             /* offset in `input` of the first kept byte */
    uint64_t dropped;               /* atomic: pushes that the policy dropped */
    vkp_i_inbox *inbox;             /* NULL with loop_only */
    vkp_i_connecting *connecting;   /* NULL once connected */
    vkp_seat *seat;                 /* given back at the close; or NULL */
};

VKP_API const char *vkp_close_reason_str(vkp_close_reason reason)
{
    switch (reason) {
    case VKP_CLOSE_LOCAL:
        return "closed here";
    case VKP_CLOSE_PEER:
        return "closed by the peer";
    case VKP_CLOSE_ERROR:
        return "system error";
    case VKP_CLOSE_SLOW:
        return "peer too slow";
    case VKP_CLOSE_LOOP:
        return "loop closed";
    case VKP_CLOSE_NOMEM:
        return "out of memory";
    }
    return "unknown reason";
}

/* A profile with a copy of the config and its defaults; one reference, the caller's. NULL: no
   memory.                                                                                     */
static vkp_i_profile *vkp_i_profile_open(const vkp_env *env, const vkp_conn_config *config)
{
    vkp_i_profile *profile = (vkp_i_profile *)vkp_i_alloc_zero(env, sizeof *profile);
    if (profile != NULL) {
        profile->env = env;
        profile->refs = 1;
        profile->config = *config;
        if (profile->config.on_full == VKP_ON_FULL_DEFAULT) {
            profile->config.on_full = VKP_ON_FULL_WAIT;
        }
        if (profile->config.queue_frames == 0) {
            profile->config.queue_frames = VKP_I_CONN_QUEUE_FRAMES;
        }
        if (profile->config.queue_bytes == 0) {
            profile->config.queue_bytes = VKP_I_CONN_QUEUE_BYTES;
        }
        if (profile->config.input_bytes == 0) {
            profile->config.input_bytes = VKP_I_CONN_INPUT_BYTES;
        }
    }
    return profile;
}

static vkp_i_profile *vkp_i_profile_ref(vkp_i_profile *profile)
{
    (void)VKP_I_ADD(&profile->refs, 1);
    return profile;
}

static void vkp_i_profile_unref(vkp_i_profile *profile)
{
    if (VKP_I_UNREF(&profile->refs) == 1) {
        vkp_i_free(profile->env, profile, sizeof *profile);
    }
}

/* ---- the queue of spans ---- */

/* The queue's span at index 0 (the head) to spans - 1. */
static vkp_i_span *vkp_i_span_at(vkp_conn *conn, uint32_t index)
{
    return index == 0 ? &conn->first
                      : &conn->more[(conn->more_head + index - 1) & (conn->more_capacity - 1)];
}

static void vkp_i_spans_free_ring(vkp_conn *conn)
{
    vkp_i_free(conn->loop->env, conn->more, conn->more_capacity * sizeof *conn->more);
    conn->more = NULL;
    conn->more_capacity = 0;
    conn->more_head = 0;
}

#define VKP_I_SPANS_FIRST 4u /* the ring's first capacity, a power of two */

/* Make room in the ring for one more span. False: no memory, nothing changed. */
static bool vkp_i_spans_reserve(vkp_conn *conn)
{
    uint32_t capacity = conn->more_capacity == 0 ? VKP_I_SPANS_FIRST : conn->more_capacity * 2;
    vkp_i_span *ring;
    uint32_t i;
    if (conn->spans == 0 || conn->spans - 1 < conn->more_capacity) {
        return true;
    }
    ring = (vkp_i_span *)vkp_i_alloc(conn->loop->env, capacity * sizeof *ring);
    if (ring == NULL) {
        return false;
    }
    for (i = 1; i < conn->spans; i++) {
        ring[i - 1] = *vkp_i_span_at(conn, i);
    }
    vkp_i_spans_free_ring(conn);
    conn->more = ring;
    conn->more_capacity = capacity;
    return true;
}

/* Append a span to the queue, after vkp_i_spans_reserve. */
static void vkp_i_spans_append(vkp_conn *conn, vkp_i_span span)
{
    conn->spans++;
    *vkp_i_span_at(conn, conn->spans - 1) = span;
}

/* Remove the span at the index and give its block back. */
static void vkp_i_spans_remove(vkp_conn *conn, uint32_t index)
{
    vkp_i_block_unref(vkp_i_span_at(conn, index)->block);
    for (; index > 0; index--) { /* few spans precede the first push that may be dropped */
        *vkp_i_span_at(conn, index) = *vkp_i_span_at(conn, index - 1);
    }
    conn->spans--;
    if (conn->spans == 0) {
        vkp_i_spans_free_ring(conn);
    } else {
        conn->first = conn->more[conn->more_head];
        conn->more_head = (conn->more_head + 1) & (conn->more_capacity - 1);
    }
}

/* Length of the first of `frames` frames in the len bytes at data; len when frame_len finds
   none.                                                                                       */
static size_t vkp_i_span_frame(const vkp_conn *conn, const uint8_t *data, size_t len,
                               uint32_t frames)
{
    size_t frame = len;
    if (frames > 1) {
        frame = conn->profile->config.ops->frame_len(data, len);
    }
    return frame == 0 || frame > len ? len : frame;
}

/* Account for a partly written head: count its written frames off, and split the frame that is
   written in part from the frames behind it, because the connection must finish that frame.
   False: no memory, nothing changed.                                                          */
static bool vkp_i_spans_normalize(vkp_conn *conn)
{
    vkp_i_span *head = &conn->first;
    const uint8_t *start;
    size_t whole = conn->head_sent + (size_t)head->len;
    size_t at = 0;
    uint32_t gone = 0;
    vkp_i_span rest;
    if (conn->spans == 0 || conn->head_sent == 0 || head->frames == 0) {
        return true;
    }
    start = head->data - conn->head_sent;
    while (at < conn->head_sent) {
        at += vkp_i_span_frame(conn, start + at, whole - at, head->frames - gone);
        gone++;
    }
    rest = *head;
    rest.data = start + at;
    rest.len = (uint32_t)(whole - at);
    rest.frames = head->frames - gone;
    if (rest.frames > 0 && at > conn->head_sent) {
        if (!vkp_i_spans_reserve(conn)) {
            return false;
        }
        conn->spans++;
        conn->more_head = (conn->more_head - 1) & (conn->more_capacity - 1);
        conn->more[conn->more_head] = rest;
        (void)vkp_i_block_ref(rest.block);
        head->len -= rest.len;
        head->frames = 0; /* partly written: it can no longer be dropped */
        conn->pushed_bytes -= head->len;
    } else if (at > conn->head_sent) {
        head->frames = 0;
        conn->pushed_bytes -= head->len;
    } else {
        head->frames = rest.frames;
    }
    conn->queued_frames -= gone;
    conn->head_sent = 0;
    return true;
}

/* Count one push that the policy dropped. */
static void vkp_i_conn_count_drop(vkp_conn *conn)
{
    (void)VKP_I_ADD(&conn->dropped, (uint64_t)1);
    (void)VKP_I_ADD(&conn->profile->dropped, (uint64_t)1);
}

/* Drop the oldest push of which no byte is written. The head is normalized. False: there is
   none.                                                                                       */
static bool vkp_i_spans_drop_oldest(vkp_conn *conn)
{
    uint32_t index = 0;
    vkp_i_span *span;
    size_t frame;
    while (index < conn->spans && vkp_i_span_at(conn, index)->frames == 0) {
        index++;
    }
    if (index == conn->spans) {
        return false;
    }
    span = vkp_i_span_at(conn, index);
    frame = vkp_i_span_frame(conn, span->data, span->len, span->frames);
    conn->queued_frames--;
    conn->queued_bytes -= frame;
    conn->pushed_bytes -= frame;
    vkp_i_conn_count_drop(conn);
    if (span->frames == 1) {
        vkp_i_spans_remove(conn, index);
    } else {
        span->data += frame;
        span->len -= (uint32_t)frame;
        span->frames--;
    }
    return true;
}

static void vkp_i_spans_clear(vkp_conn *conn)
{
    while (conn->spans > 0) {
        vkp_i_spans_remove(conn, conn->spans > 1 ? 1 : 0);
    }
    conn->queued_frames = 0;
    conn->queued_bytes = 0;
    conn->pushed_bytes = 0;
    conn->head_sent = 0;
}

#define VKP_I_SPAN_MAX 0x7fffffffu /* most bytes of one span */

/* Whether the frame extends the last span: the next bytes of its block, of the same kind (push
   or response stream), and frame_len can find the border between pushes.                      */
static bool vkp_i_span_adjoins(const vkp_conn *conn, const vkp_i_span *tail, const vkp_bytes *frame,
                               bool push)
{
    return tail->block != NULL && tail->block == frame->block &&
           tail->data + tail->len == frame->data && (tail->frames > 0) == push &&
           (!push || conn->profile->config.ops->frame_len != NULL) &&
           frame->len < VKP_I_SPAN_MAX - tail->len;
}

#define VKP_I_COMPACT_BYTES 4096u /* capacity of a private block that gathers small spans */
#define VKP_I_COMPACT_PART 4u     /* a span below 1 / 4 of its block is copied out of it */

/* A slow client must not pin a whole block for each queued frame. When the last span cannot grow
   and is a small part of its block, copy it behind the span before it, or else into a private
   block.                                                                                      */
static void vkp_i_spans_compact_tail(vkp_conn *conn)
{
    vkp_i_span *tail;
    vkp_i_span *before;
    vkp_block *block;
    bool joins; /* later frames may be copied behind it */
    if (conn->spans < 2) {
        return; /* the head may be partly written */
    }
    tail = vkp_i_span_at(conn, conn->spans - 1);
    if (tail->block == NULL ? tail->len >= VKP_I_COMPACT_BYTES / VKP_I_COMPACT_PART
                            : tail->len >= tail->block->capacity / VKP_I_COMPACT_PART ||
                                  tail->block->capacity <= VKP_I_COMPACT_BYTES) {
        return; /* static bytes pin no block, but many short spans make a drop's search slow */
    }
    before = conn->spans > 2 ? vkp_i_span_at(conn, conn->spans - 2) : NULL;
    if (before != NULL && before->block != NULL && vkp_i_block_is_mine(before->block) &&
        before->block->capacity == VKP_I_COMPACT_BYTES &&
        (before->frames > 0) == (tail->frames > 0) &&
        (before->frames == 0 || conn->profile->config.ops->frame_len != NULL) &&
        before->data + before->len == vkp_i_block_data(before->block) + before->block->len &&
        tail->len <= before->block->capacity - before->block->len) {
        memcpy(vkp_i_block_data(before->block) + before->block->len, tail->data, tail->len);
        before->block->len += tail->len;
        before->len += tail->len;
        before->frames += tail->frames;
        vkp_i_block_unref(tail->block);
        conn->spans--;
        return;
    }
    joins = tail->frames == 0 || conn->profile->config.ops->frame_len != NULL;
    block = vkp_i_block_open(conn->loop->env,
                             VKP_I_MAX(joins ? (size_t)VKP_I_COMPACT_BYTES : 0, (size_t)tail->len));
    if (block == NULL) {
        return; /* no memory: the span keeps its large block */
    }
    memcpy(vkp_i_block_data(block), tail->data, tail->len);
    block->len = tail->len;
    vkp_i_block_unref(tail->block);
    tail->block = block;
    tail->data = vkp_i_block_data(block);
}

/* Queue a frame; push: false for the response stream. NOMEM (or a frame above VKP_I_SPAN_MAX):
   the frame is not queued.                                                                    */
static vkp_status vkp_i_spans_push(vkp_conn *conn, const vkp_bytes *frame, bool push)
{
    vkp_i_span *tail = conn->spans > 0 ? vkp_i_span_at(conn, conn->spans - 1) : NULL;
    if (tail != NULL && vkp_i_span_adjoins(conn, tail, frame, push)) {
        tail->len += (uint32_t)frame->len;
        tail->frames += push ? 1u : 0u;
    } else {
        vkp_i_span span;
        if ((conn->flags & VKP_I_CONN_BLOCKED) != 0) {
            vkp_i_spans_compact_tail(conn);
        }
        if (frame->len > VKP_I_SPAN_MAX || !vkp_i_spans_reserve(conn)) {
            return VKP_ERR_NOMEM;
        }
        span.data = frame->data;
        span.block = vkp_i_block_ref(frame->block);
        span.len = (uint32_t)frame->len;
        span.frames = push ? 1 : 0;
        vkp_i_spans_append(conn, span);
    }
    conn->queued_bytes += frame->len;
    if (push) {
        conn->queued_frames++;
        conn->pushed_bytes += frame->len;
    }
    return VKP_OK;
}

#endif /* VKP_I_IO */

#if VKP_I_IO
/* ======================================================================================
   >>impl-conn   Connections
   ======================================================================================
   The life of a connection: connect or adopt, read, push, write, close. Everything runs on the
   loop's thread, except that other threads push into the inbox and queue `remote` to close.
   vkp_i_conn_finish is the only function that ends a connection; it takes effect once. Code that
   may run inside a push calls vkp_i_conn_close_later instead, and the deferred task ends the
   connection.
   The inbox's handler moves frames to the outbox; the round ends with vkp_i_conn_task, which
   writes. When the kernel's buffer is full, VKP_IO_WRITE calls vkp_i_conn_writable.
   No lock is held here. Every callback may close the connection: code behind a callback checks
   vkp_i_conn_closed.                                                                          */

/* ---- life ---- */

VKP_API vkp_conn *vkp_conn_ref(vkp_conn *conn)
{
    (void)VKP_I_ADD(&conn->refs, 1);
    return conn;
}

VKP_API void vkp_conn_unref(vkp_conn *conn)
{
    vkp_loop *loop;
    if (conn == NULL || VKP_I_UNREF(&conn->refs) != 1) {
        return;
    }
    loop = conn->loop;
    if (conn->inbox != NULL) {
        vkp_i_inbox_hold(conn->inbox); /* only after a failed open; otherwise the close did this */
        vkp_mpsc_tx_unref(conn->inbox->tx);
        vkp_mpsc_rx_unref(conn->inbox->rx);
        vkp_i_free(loop->env, conn->inbox, sizeof *conn->inbox);
    }
    vkp_i_profile_unref(conn->profile);
    vkp_i_free(loop->env, conn, sizeof *conn);
    vkp_loop_unref(loop);
}

/* Defer the connection's task to the end of the round, once. The task holds a reference. */
static void vkp_i_conn_defer(vkp_conn *conn)
{
    if ((conn->flags & VKP_I_CONN_QUEUED) == 0) {
        conn->flags |= VKP_I_CONN_QUEUED;
        (void)vkp_conn_ref(conn);
        vkp_i_loop_defer(conn->loop, &conn->task);
    }
}

/* Whether vkp_i_conn_finish ran. Any thread. */
static bool vkp_i_conn_closed(const vkp_conn *conn)
{
    return VKP_I_LOAD_ACQ(&conn->state) == VKP_I_CONN_CLOSED;
}

/* Stop to connect, if it connects. */
static void vkp_i_connecting_free(vkp_conn *conn)
{
    if (conn->connecting != NULL) {
        vkp_timer_stop(&conn->connecting->timer);
        vkp_i_free(conn->loop->env, conn->connecting, sizeof *conn->connecting);
        conn->connecting = NULL;
    }
}

/* The only way a connection ends: release everything, call on_close. A second call does nothing.
   Loop's thread.                                                                              */
static void vkp_i_conn_finish(vkp_conn *conn, vkp_close_reason reason, int error)
{
    vkp_i_profile *profile = conn->profile;
    const vkp_conn_ops *ops = profile->config.ops;
    if (VKP_I_XCHG(&conn->state, VKP_I_CONN_CLOSED) == VKP_I_CONN_CLOSED) {
        return;
    }
    vkp_io_stop(&conn->io);
    if (conn->fd >= 0) {
        (void)conn->loop->sys->close(conn->fd);
        conn->fd = -1;
    }
    vkp_i_spans_clear(conn);
    vkp_i_block_unref(conn->input);
    conn->input = NULL;
    vkp_i_connecting_free(conn);
    if (conn->inbox != NULL) {
        vkp_i_inbox_hold(conn->inbox);
        vkp_mpsc_close(conn->inbox->rx);
    }
    vkp_seat_unref(conn->seat);
    conn->seat = NULL;
    if (ops->on_close != NULL) {
        ops->on_close(conn, conn->user, reason, error);
    }
    if (profile->live > 0 && --profile->live == 0 && profile->when_empty != NULL) {
        vkp_i_loop_defer(conn->loop, profile->when_empty);
        profile->when_empty = NULL;
    }
    vkp_conn_unref(conn); /* the reference that the loop held */
}

/* The deferred task closes the connection with this reason; the first reason is kept. Allowed
   inside a push. Loop's thread.                                                               */
static void vkp_i_conn_close_later(vkp_conn *conn, vkp_close_reason reason, int error)
{
    if ((conn->flags & VKP_I_CONN_CLOSES) == 0) {
        conn->flags |= VKP_I_CONN_CLOSES;
        conn->closes_reason = reason;
        conn->closes_error = error;
        vkp_i_conn_defer(conn);
    }
}

/* Register the descriptor for the readiness that the flags need. */
static void vkp_i_conn_update_interest(vkp_conn *conn)
{
    uint32_t interest = 0;
    if (vkp_i_conn_closed(conn)) {
        return;
    }
    if ((conn->flags & (VKP_I_CONN_CONNECTING | VKP_I_CONN_BLOCKED)) != 0) {
        interest |= VKP_IO_WRITE;
    }
    if ((conn->flags & (VKP_I_CONN_CONNECTING | VKP_I_CONN_PAUSED | VKP_I_CONN_ENDED |
                        VKP_I_CONN_DRAINING)) == 0) {
        interest |= VKP_IO_READ;
    }
    if (vkp_io_set(&conn->io, interest) != VKP_OK) {
        vkp_i_conn_close_later(conn, VKP_CLOSE_ERROR, errno);
    }
}

/* ---- writing ---- */

/* Remove `put` written bytes from the queue's head. */
static void vkp_i_conn_written(vkp_conn *conn, size_t put)
{
    conn->queued_bytes -= put;
    while (put > 0) {
        vkp_i_span *head = &conn->first;
        size_t part = VKP_I_MIN(put, (size_t)head->len);
        if (head->frames > 0) {
            conn->pushed_bytes -= part;
        }
        put -= part;
        if (part == head->len) {
            conn->queued_frames -= head->frames;
            conn->head_sent = 0;
            vkp_i_spans_remove(conn, 0);
        } else {
            head->data += part;
            head->len -= (uint32_t)part;
            conn->head_sent += (uint32_t)part;
        }
    }
}

#define VKP_I_RANGES 64 /* most spans of one gathered write */

/* Write until the outbox is empty or the kernel's buffer is full. An error closes later, never
   here.                                                                                       */
static void vkp_i_conn_flush(vkp_conn *conn)
{
    while (conn->spans > 0 &&
           (conn->flags & (VKP_I_CONN_BLOCKED | VKP_I_CONN_CONNECTING | VKP_I_CONN_CLOSES)) == 0) {
        vkp_range ranges[VKP_I_RANGES];
        size_t count = VKP_I_MIN((size_t)conn->spans, (size_t)VKP_I_RANGES);
        size_t offered = 0;
        size_t i;
        int64_t put;
        for (i = 0; i < count; i++) {
            const vkp_i_span *span = vkp_i_span_at(conn, (uint32_t)i);
            ranges[i].base = span->data;
            ranges[i].len = span->len;
            offered += span->len;
        }
        put = conn->loop->sys->send(conn->fd, ranges, count);
        if (put == -EINTR) {
            continue;
        }
        if (put < 0 && put != -EAGAIN && put != -EWOULDBLOCK && put != -ENOBUFS) {
            vkp_i_conn_close_later(conn, VKP_CLOSE_ERROR, (int)-put);
            return;
        }
        if (put > 0) {
            vkp_i_conn_written(conn, (size_t)put);
        }
        if (put < 0 || (size_t)put < offered) {
            conn->flags |= VKP_I_CONN_BLOCKED;
            vkp_i_conn_update_interest(conn);
        }
    }
}

static void vkp_i_conn_pull_inbox(vkp_conn *conn);

/* Whether a draining connection has written everything. VKP_I_CONN_INBOX_HELD stays set until
   its inbox is empty.                                                                         */
static bool vkp_i_conn_is_drained(const vkp_conn *conn)
{
    return conn->spans == 0 &&
           (conn->flags & (VKP_I_CONN_DRAINING | VKP_I_CONN_INBOX_HELD)) == VKP_I_CONN_DRAINING;
}

/* The kernel's buffer has room again: write, call on_drain when the outbox is empty, pull a held
   inbox.                                                                                      */
static void vkp_i_conn_writable(vkp_conn *conn)
{
    conn->flags &= ~VKP_I_CONN_BLOCKED;
    vkp_i_conn_flush(conn);
    if ((conn->flags & VKP_I_CONN_BLOCKED) == 0) {
        vkp_i_conn_update_interest(conn);
        if (conn->spans == 0 && conn->profile->config.ops->on_drain != NULL) {
            conn->profile->config.ops->on_drain(conn, conn->user);
        }
    }
    if (!vkp_i_conn_closed(conn) && (conn->flags & VKP_I_CONN_INBOX_HELD) != 0) {
        vkp_i_conn_pull_inbox(conn);
    }
    if (!vkp_i_conn_closed(conn) && vkp_i_conn_is_drained(conn)) {
        vkp_i_conn_close_later(conn, VKP_CLOSE_LOCAL, 0);
    }
}

/* ---- pushing ---- */

/* Whether the outbox has room for a push of len bytes. One push always fits. */
static bool vkp_i_conn_has_room(const vkp_conn *conn, size_t len)
{
    const vkp_conn_config *config = &conn->profile->config;
    return conn->queued_frames < config->queue_frames &&
           (conn->queued_frames == 0 || (conn->pushed_bytes <= config->queue_bytes &&
                                         len <= config->queue_bytes - conn->pushed_bytes));
}

/* Whether the outbox has room for a push of len bytes, if need be after a write and after
   counting written frames off. The cheapest check is first.                                   */
static bool vkp_i_conn_find_room(vkp_conn *conn, size_t len)
{
    if (vkp_i_conn_has_room(conn, len)) {
        return true;
    }
    vkp_i_conn_flush(conn);
    return vkp_i_conn_has_room(conn, len) ||
           (vkp_i_spans_normalize(conn) && vkp_i_conn_has_room(conn, len));
}

/* Queue a push in the outbox, by the policy when the outbox is full. Loop's thread. */
static vkp_status vkp_i_conn_enqueue(vkp_conn *conn, const vkp_bytes *frame)
{
    vkp_status status;
    if (vkp_i_conn_closed(conn) || (conn->flags & VKP_I_CONN_CLOSES) != 0) {
        return VKP_ERR_CLOSED;
    }
    if (frame->len == 0) {
        return VKP_OK;
    }
    if (!vkp_i_conn_find_room(conn, frame->len)) {
        if ((conn->flags & VKP_I_CONN_CLOSES) != 0) {
            return VKP_ERR_CLOSED;
        }
        switch ((int)conn->profile->config.on_full) {
        case VKP_ON_FULL_DROP_NEWEST:
            vkp_i_conn_count_drop(conn);
            return VKP_ERR_DROPPED;
        case VKP_ON_FULL_DROP_OLDEST:
            if (!vkp_i_spans_normalize(conn)) {
                return VKP_ERR_NOMEM; /* no memory to split the partly written frame off */
            }
            while (!vkp_i_conn_has_room(conn, frame->len) && vkp_i_spans_drop_oldest(conn)) {
            }
            break;
        case VKP_ON_FULL_DISCONNECT:
            vkp_i_conn_close_later(conn, VKP_CLOSE_SLOW, 0);
            return VKP_ERR_CLOSED;
        default:
            return VKP_ERR_FULL;
        }
    }
    status = vkp_i_spans_push(conn, frame, true);
    vkp_i_conn_defer(conn);
    return status;
}

/* A push from the loop's thread: CLOSED while the connection drains. */
static vkp_status vkp_i_conn_admit(vkp_conn *conn, const vkp_bytes *frame)
{
    return (conn->flags & VKP_I_CONN_DRAINING) != 0 ? VKP_ERR_CLOSED
                                                    : vkp_i_conn_enqueue(conn, frame);
}

VKP_API vkp_status vkp_conn_send(vkp_conn *conn, const vkp_bytes *frame)
{
    vkp_status status;
    VKP_I_REQUIRE(conn != NULL && frame != NULL && vkp_i_on_loop(conn->loop));
    if (vkp_i_conn_closed(conn) || (conn->flags & (VKP_I_CONN_CLOSES | VKP_I_CONN_DRAINING)) != 0) {
        return VKP_ERR_CLOSED;
    }
    if (frame->len == 0) {
        return VKP_OK;
    }
    status = vkp_i_spans_push(conn, frame, false);
    vkp_i_conn_defer(conn);
    return status;
}

/* The inbox's handler: frames from other threads have arrived. */
static void vkp_i_conn_inbox_ready(void *user)
{
    vkp_i_conn_pull_inbox((vkp_conn *)user);
}

/* Open the inbox's handler: the loop moves frames to the outbox again. */
static vkp_status vkp_i_conn_handle_inbox(vkp_conn *conn)
{
    vkp_case receive = vkp_case_mpsc_recv(conn->inbox->rx, NULL);
    return vkp_handler_open(conn->loop, &receive, vkp_i_conn_inbox_ready, conn,
                            &conn->inbox->handler);
}

/* No memory to queue a push for which its sender received OK: count it as dropped, or close
   later when the policy drops nothing.                                                        */
static void vkp_i_conn_count_lost(vkp_conn *conn)
{
    vkp_on_full policy = conn->profile->config.on_full;
    if (policy == VKP_ON_FULL_DROP_NEWEST || policy == VKP_ON_FULL_DROP_OLDEST) {
        vkp_i_conn_count_drop(conn);
    } else {
        vkp_i_conn_close_later(conn, VKP_CLOSE_NOMEM, 0);
    }
}

#define VKP_I_INBOX_BATCH 1024 /* most frames that one call of the handler moves */

/* Move frames from the inbox to the outbox. With a policy that waits (WAIT, ERROR) frames stay
   in the inbox while the outbox is full, and the inbox has no handler until there is room. The
   batch limit lets the round end when threads push as fast as the peer reads: the handler calls
   again for the frames left.                                                                  */
static void vkp_i_conn_pull_inbox(vkp_conn *conn)
{
    vkp_mpsc_rx *rx = conn->inbox->rx;
    bool waits = conn->profile->config.on_full == VKP_ON_FULL_WAIT ||
                 conn->profile->config.on_full == VKP_ON_FULL_ERROR;
    /* no batch limit: the inbox is closed, no frame is added */
    bool draining = (conn->flags & VKP_I_CONN_DRAINING) != 0;
    vkp_bytes frame;
    size_t next = 0;
    int i;
    for (i = 0; i < VKP_I_INBOX_BATCH || draining; i++) {
        if (waits && !vkp_i_mpsc_next_cost(rx, &next)) {
            break; /* empty: the cost of a frame that arrives now is not known */
        }
        if (waits && !vkp_i_conn_find_room(conn, next)) {
            if ((conn->flags & VKP_I_CONN_INBOX_HELD) == 0) {
                conn->flags |= VKP_I_CONN_INBOX_HELD;
                vkp_i_inbox_hold(conn->inbox);
            }
            return;
        }
        if (vkp_mpsc_try_recv(rx, &frame) != VKP_OK) {
            break;
        }
        if (vkp_i_conn_enqueue(conn, &frame) == VKP_ERR_NOMEM) {
            vkp_i_conn_count_lost(conn);
        }
        vkp_bytes_unref(&frame);
    }
    if ((conn->flags & VKP_I_CONN_INBOX_HELD) != 0) {
        conn->flags &= ~VKP_I_CONN_INBOX_HELD;
        if (!draining && vkp_i_conn_handle_inbox(conn) != VKP_OK) {
            vkp_i_conn_close_later(conn, VKP_CLOSE_NOMEM, 0);
        }
    }
}

/* Task of vkp_conn_close from another thread. */
static void vkp_i_conn_remote(vkp_i_task *task)
{
    vkp_conn *conn = VKP_CONTAINER(task, vkp_conn, remote);
    vkp_i_conn_finish(conn, VKP_CLOSE_LOCAL, 0);
    vkp_conn_unref(conn);
}

/* Task of a push from another thread that found the inbox full, with VKP_ON_FULL_DISCONNECT. */
static void vkp_i_conn_remote_slow(vkp_i_task *task)
{
    vkp_conn *conn = VKP_CONTAINER(task, vkp_conn, remote);
    vkp_i_conn_finish(conn, VKP_CLOSE_SLOW, 0);
    vkp_conn_unref(conn);
}

/* Queue fn, which closes, on the loop. Only the first call queues: its reason is the one
   reported. Other threads.                                                                    */
static void vkp_i_conn_close_remotely(vkp_conn *conn, void (*fn)(vkp_i_task *task))
{
    if (VKP_I_XCHG(&conn->remote_queued, 1u) != 0) {
        return;
    }
    (void)vkp_conn_ref(conn);
    conn->remote.fn = fn;
    if (!vkp_i_loop_queue(conn->loop, &conn->remote)) {
        vkp_conn_unref(conn); /* the loop is closed: its close also closed the connection */
    }
}

/* Push into the inbox, by the policy when the inbox is full. Other threads. */
static vkp_status vkp_i_conn_push_remotely(vkp_conn *conn, const vkp_bytes *frame,
                                           vkp_cancel *cancel, uint64_t deadline_ns)
{
    vkp_bytes item = vkp_bytes_ref(frame);
    vkp_bytes evicted;
    vkp_status status;
    bool was_evicted = false;
    switch ((int)conn->profile->config.on_full) {
    case VKP_ON_FULL_WAIT:
        status = vkp_i_lane_send(conn->inbox->tx->lane, &item, NULL, cancel, deadline_ns);
        break;
    case VKP_ON_FULL_DROP_OLDEST:
        do {
            status = vkp_i_mpsc_send_evict(conn->inbox->tx, &item, &evicted, &was_evicted);
            if (was_evicted) {
                vkp_i_conn_count_drop(conn);
                vkp_bytes_unref(&evicted);
            }
        } while (was_evicted && status == VKP_ERR_FULL);
        break;
    default:
        status = vkp_mpsc_try_send(conn->inbox->tx, &item);
        break;
    }
    if (status == VKP_ERR_FULL && conn->profile->config.on_full == VKP_ON_FULL_DROP_NEWEST) {
        vkp_i_conn_count_drop(conn);
        status = VKP_ERR_DROPPED;
    } else if (status == VKP_ERR_FULL && conn->profile->config.on_full == VKP_ON_FULL_DISCONNECT) {
        vkp_i_conn_close_remotely(conn, vkp_i_conn_remote_slow);
        status = VKP_ERR_CLOSED;
    }
    if (status != VKP_OK) {
        vkp_bytes_unref(&item);
    }
    return status;
}

/* Push from any thread. A wait for room ends at the deadline, or when the token (may be NULL) is
   triggered.                                                                                  */
static vkp_status vkp_i_conn_push(vkp_conn *conn, const vkp_bytes *frame, vkp_cancel *cancel,
                                  uint64_t deadline_ns)
{
    if (vkp_i_on_loop(conn->loop)) {
        return vkp_i_conn_admit(conn, frame);
    }
    VKP_I_REQUIRE(conn->inbox != NULL);
    return vkp_i_conn_push_remotely(conn, frame, cancel, deadline_ns);
}

VKP_API vkp_status vkp_conn_push(vkp_conn *conn, const vkp_bytes *frame, uint64_t deadline_ns)
{
    VKP_I_REQUIRE(conn != NULL && frame != NULL);
    return vkp_i_conn_push(conn, frame, NULL, deadline_ns);
}

/* ---- reading ---- */

/* A block with room to read into. The kept input is copied to offset *begin of the loop's block;
   large kept input stays in its own block, which grows. NULL: no memory.                      */
static vkp_block *vkp_i_conn_read_block(vkp_conn *conn, size_t *begin)
{
    vkp_loop *loop = conn->loop;
    size_t kept = conn->input != NULL ? conn->input->len - conn->input_begin : 0;
    vkp_block *block = loop->read_block;
    if (kept > loop->read_bytes / 2) {
        if (vkp_i_block_reserve(loop->env, &conn->input, loop->read_bytes / 2) != VKP_OK) {
            return NULL;
        }
        *begin = conn->input_begin;
        return conn->input;
    }
    if (block != NULL && vkp_i_block_is_mine(block)) {
        block->len = 0;
    }
    if (block == NULL || block->capacity - block->len < kept + loop->read_bytes / 2) {
        vkp_i_block_unref(block);
        loop->read_block = block = vkp_i_block_open(loop->env, loop->read_bytes * 2);
        if (block == NULL) {
            return NULL;
        }
    }
    *begin = block->len;
    if (kept > 0) {
        memcpy(vkp_i_block_data(block) + block->len,
               vkp_i_block_data(conn->input) + conn->input_begin, kept);
        block->len += kept;
    }
    return block;
}

/* Keep bytes [begin, len) of the block for the next on_data. False: over input_bytes, or no
   memory; the connection closes later.                                                        */
static bool vkp_i_conn_keep(vkp_conn *conn, vkp_block *block, size_t begin)
{
    size_t left = block->len - begin;
    vkp_block *kept = NULL;
    if (left > conn->profile->config.input_bytes) {
        vkp_i_conn_close_later(conn, VKP_CLOSE_ERROR, EMSGSIZE);
        return false;
    }
    if (left > 0 && block == conn->input && begin == conn->input_begin) {
        return true;
    }
    if (left > 0) {
        /* A large incomplete frame grows: reserve room now. */
        size_t room = left > conn->loop->read_bytes / 2 ? left * 2 : left;
        kept = vkp_i_block_open(conn->loop->env, VKP_I_MIN(room, (size_t)VKP_I_BLOCK_MAX));
        if (kept == NULL) {
            vkp_i_conn_close_later(conn, VKP_CLOSE_NOMEM, 0);
            return false;
        }
        memcpy(vkp_i_block_data(kept), vkp_i_block_data(block) + begin, left);
        kept->len = left;
    }
    vkp_i_block_unref(conn->input);
    conn->input = kept;
    conn->input_begin = 0;
    return true;
}

/* Call on_data with bytes [begin, len) of the block, and keep the bytes that on_data leaves. */
static void vkp_i_conn_deliver(vkp_conn *conn, vkp_block *block, size_t begin)
{
    const vkp_conn_ops *ops = conn->profile->config.ops;
    vkp_bytes window;
    size_t used;
    window.block = vkp_i_block_ref(block);
    window.data = vkp_i_block_data(block) + begin;
    window.len = block->len - begin;
    used = ops->on_data != NULL ? ops->on_data(conn, conn->user, &window) : window.len;
    if (!vkp_i_conn_closed(conn)) {
        (void)vkp_i_conn_keep(conn, block, begin + VKP_I_MIN(used, window.len));
    }
    vkp_i_block_unref(block);
}

/* After vkp_conn_resume: deliver the kept input, without waiting for more bytes. */
static void vkp_i_conn_reread(vkp_conn *conn)
{
    if ((conn->flags & VKP_I_CONN_REREAD) != 0) {
        conn->flags &= ~VKP_I_CONN_REREAD;
        if (conn->input != NULL &&
            (conn->flags & (VKP_I_CONN_PAUSED | VKP_I_CONN_DRAINING | VKP_I_CONN_ENDED)) == 0) {
            vkp_i_conn_deliver(conn, conn->input, conn->input_begin);
        }
    }
}

/* The peer closed its sending side: on_end decides whether the connection stays open to write. */
static void vkp_i_conn_end(vkp_conn *conn)
{
    const vkp_conn_ops *ops = conn->profile->config.ops;
    conn->flags |= VKP_I_CONN_ENDED;
    if (ops->on_end == NULL || !ops->on_end(conn, conn->user)) {
        vkp_i_conn_finish(conn, VKP_CLOSE_PEER, 0);
    } else {
        vkp_i_conn_update_interest(conn);
    }
}

/* One read, delivered to on_data. */
static void vkp_i_conn_readable(vkp_conn *conn)
{
    size_t begin = 0;
    vkp_block *block = vkp_i_conn_read_block(conn, &begin);
    size_t room;
    int64_t got;
    if (block == NULL) {
        vkp_i_conn_finish(conn, VKP_CLOSE_NOMEM, 0);
        return;
    }
    room = VKP_I_MIN(block->capacity - block->len, conn->loop->read_bytes);
    got = conn->loop->sys->read(conn->fd, vkp_i_block_data(block) + block->len, room);
    if (got > 0) {
        block->len += (size_t)got;
        vkp_i_conn_deliver(conn, block, begin);
    } else if (block != conn->input) {
        block->len = begin; /* nothing was read: discard the copy of the kept input */
    }
    if (got == 0) {
        vkp_i_conn_end(conn);
    } else if (got < 0 && got != -EAGAIN && got != -EWOULDBLOCK && got != -EINTR) {
        vkp_i_conn_finish(conn, got == -ECONNRESET ? VKP_CLOSE_PEER : VKP_CLOSE_ERROR, (int)-got);
    }
}

/* ---- connecting ---- */

static void vkp_i_conn_event(vkp_io *io, uint32_t ready);
static void vkp_i_conn_share_ended(vkp_timer *timer);

/* Set what the config says about the liveness of a TCP connection. */
static void vkp_i_conn_set_liveness(vkp_conn *conn)
{
    const vkp_conn_config *config = &conn->profile->config;
    if (config->keepalive_ms > 0 || config->unacked_ms > 0) {
        (void)conn->loop->sys->set_liveness(conn->fd, config->keepalive_ms, config->unacked_ms);
    }
}

/* Start the timer that ends the share of the address tried now. The last one has what is left. */
static vkp_status vkp_i_conn_share_time(vkp_conn *conn)
{
    vkp_i_connecting *self = conn->connecting;
    uint64_t now_ns = vkp_i_loop_now(conn->loop);
    uint64_t left_ns = self->deadline_ns - VKP_I_MIN(now_ns, self->deadline_ns);
    uint64_t shares = self->count - self->next + 1;
    if (self->deadline_ns == VKP_FOREVER) {
        return VKP_OK;
    }
    return vkp_timer_start(&self->timer, conn->loop, vkp_i_conn_share_ended, 0,
                           now_ns + left_ns / shares);
}

/* Begin to connect to the next address. VKP_OK: an event reports the outcome. */
static vkp_status vkp_i_conn_try_next(vkp_conn *conn)
{
    const vkp_sys *sys = conn->loop->sys;
    int result = conn->connecting->next > 0 ? -ETIMEDOUT : -ECONNREFUSED;
    while (conn->connecting->next < conn->connecting->count) {
        const vkp_address *address = &conn->connecting->addresses[conn->connecting->next++];
        result = sys->socket(address->family, SOCK_STREAM);
        if (result < 0) {
            continue;
        }
        conn->fd = result;
        if (address->family != AF_UNIX) {
            (void)sys->set_nodelay(conn->fd);
            vkp_i_conn_set_liveness(conn);
        }
        result = sys->connect(conn->fd, address->storage.bytes, address->bytes);
        if (result == 0 || result == -EINPROGRESS || result == -EINTR) {
            vkp_status status =
                vkp_io_start(&conn->io, conn->loop, conn->fd, VKP_IO_WRITE, vkp_i_conn_event);
            if (status == VKP_OK) {
                status = vkp_i_conn_share_time(conn);
            }
            if (status == VKP_OK) {
                return VKP_OK;
            }
            vkp_io_stop(&conn->io);
            result = status == VKP_ERR_NOMEM ? -ENOMEM : -errno;
        }
        (void)sys->close(conn->fd);
        conn->fd = -1;
    }
    return vkp_i_sys_failure(result);
}

/* Give the address up that was tried, and try the next one; without one the connection ends with
   the error. */
static void vkp_i_conn_leave_address(vkp_conn *conn, int error)
{
    bool last = conn->connecting->next == conn->connecting->count;
    vkp_io_stop(&conn->io);
    (void)conn->loop->sys->close(conn->fd);
    conn->fd = -1;
    if (vkp_i_conn_try_next(conn) != VKP_OK) {
        vkp_i_conn_finish(conn, VKP_CLOSE_ERROR, last ? error : errno);
    }
}

/* The time of an address is over. */
static void vkp_i_conn_share_ended(vkp_timer *timer)
{
    vkp_conn *conn = VKP_CONTAINER(timer, vkp_i_connecting, timer)->conn;
    (void)vkp_conn_ref(conn);
    vkp_i_conn_leave_address(conn, ETIMEDOUT);
    vkp_conn_unref(conn);
}

/* An attempt to connect has ended: open the connection, or try the next address. */
static void vkp_i_conn_connected(vkp_conn *conn)
{
    int error = -conn->loop->sys->socket_error(conn->fd);
    const vkp_conn_ops *ops = conn->profile->config.ops;
    if (error != 0) {
        vkp_i_conn_leave_address(conn, error);
        return;
    }
    vkp_timer_stop(&conn->connecting->timer);
    conn->flags &= ~VKP_I_CONN_CONNECTING;
    vkp_i_conn_update_interest(conn);
    if (ops->on_open != NULL) {
        ops->on_open(conn, conn->user); /* may ask vkp_i_conn_get_address */
    }
    if (!vkp_i_conn_closed(conn)) {
        vkp_i_connecting_free(conn);
        vkp_i_conn_defer(conn); /* write the frames that were pushed while connecting */
    }
}

/* The descriptor is ready; ready 0: the loop closes. */
static void vkp_i_conn_event(vkp_io *io, uint32_t ready)
{
    vkp_conn *conn = VKP_CONTAINER(io, vkp_conn, io);
    bool hung_up = (ready & (VKP_IO_HUP | VKP_IO_ERROR)) != 0;
    (void)vkp_conn_ref(conn);
    if (ready == 0) {
        vkp_i_conn_finish(conn, VKP_CLOSE_LOOP, 0);
    } else if ((conn->flags & VKP_I_CONN_CONNECTING) != 0) {
        vkp_i_conn_connected(conn);
    } else {
        if ((conn->flags & VKP_I_CONN_BLOCKED) != 0 && (ready & VKP_IO_WRITE) != 0) {
            vkp_i_conn_writable(conn);
        }
        if (vkp_i_conn_closed(conn)) {
            /* a callback closed the connection */
        } else if ((conn->flags & (VKP_I_CONN_ENDED | VKP_I_CONN_DRAINING)) != 0) {
            if (hung_up) {
                vkp_i_conn_finish(conn, VKP_CLOSE_PEER, 0);
            }
        } else if ((conn->flags & VKP_I_CONN_PAUSED) == 0 &&
                   ((ready & VKP_IO_READ) != 0 || hung_up)) {
            /* Kept input precedes the bytes, or the end, that a read finds. */
            vkp_i_conn_reread(conn);
            if (!vkp_i_conn_closed(conn) &&
                (conn->flags & (VKP_I_CONN_PAUSED | VKP_I_CONN_DRAINING | VKP_I_CONN_REREAD)) ==
                    0) {
                vkp_i_conn_readable(conn);
            }
        }
    }
    vkp_conn_unref(conn);
}

#define VKP_I_DISCARD_BYTES 4096 /* most bytes of one discarding read */
#define VKP_I_DISCARD_READS 16   /* most discarding reads before a close */

/* Read and discard waiting input before this side closes, within limits: a kernel that closes a
   TCP socket with unread input sends a reset, and the peer loses the last bytes written to it. */
static void vkp_i_conn_discard_input(vkp_conn *conn)
{
    char bin[VKP_I_DISCARD_BYTES];
    int i;
    for (i = 0; i < VKP_I_DISCARD_READS && conn->loop->sys->read(conn->fd, bin, sizeof bin) > 0;
         i++) {
    }
}

/* The deferred task, at the end of a round: deliver kept input after a resume, write once, pull
   a held inbox, then close if the connection is drained or marked.                            */
static void vkp_i_conn_task(vkp_i_task *task)
{
    vkp_conn *conn = VKP_CONTAINER(task, vkp_conn, task);
    conn->flags &= ~VKP_I_CONN_QUEUED;
    if (!vkp_i_conn_closed(conn)) {
        vkp_i_conn_reread(conn);
    }
    if (!vkp_i_conn_closed(conn)) {
        vkp_i_conn_flush(conn);
        if ((conn->flags & VKP_I_CONN_INBOX_HELD) != 0 &&
            (conn->flags & (VKP_I_CONN_BLOCKED | VKP_I_CONN_CONNECTING)) == 0) {
            vkp_i_conn_pull_inbox(conn);
        }
        if (vkp_i_conn_is_drained(conn)) {
            vkp_i_conn_discard_input(conn);
            vkp_i_conn_close_later(conn, VKP_CLOSE_LOCAL, 0);
        }
        if ((conn->flags & VKP_I_CONN_CLOSES) != 0) {
            vkp_i_conn_finish(conn, conn->closes_reason, conn->closes_error);
        }
    }
    vkp_conn_unref(conn);
}

static void vkp_i_drop_bytes(void *user, void *item)
{
    (void)user;
    vkp_bytes_unref((vkp_bytes *)item);
}

static size_t vkp_i_cost_bytes(const void *item)
{
    return ((const vkp_bytes *)item)->len;
}

static vkp_status vkp_i_conn_open_inbox(vkp_conn *conn)
{
    const vkp_conn_config *config = &conn->profile->config;
    vkp_mpsc_config inbox;
    vkp_status status;
    memset(&inbox, 0, sizeof inbox);
    inbox.elem_bytes = sizeof(vkp_bytes);
    inbox.capacity_items = config->queue_frames;
    inbox.capacity_bytes = config->queue_bytes;
    inbox.cost = vkp_i_cost_bytes;
    inbox.drop = vkp_i_drop_bytes;
    inbox.env = conn->loop->env;
    conn->inbox = (vkp_i_inbox *)vkp_i_alloc_zero(conn->loop->env, sizeof *conn->inbox);
    if (conn->inbox == NULL) {
        return VKP_ERR_NOMEM;
    }
    status = vkp_i_mpsc_open(&inbox, conn->profile->config.on_full == VKP_ON_FULL_DROP_OLDEST,
                             &conn->inbox->tx, &conn->inbox->rx);
    if (status != VKP_OK) {
        vkp_i_free(conn->loop->env, conn->inbox, sizeof *conn->inbox);
        conn->inbox = NULL;
        return status;
    }
    return vkp_i_conn_handle_inbox(conn);
}

/* A connection without a descriptor, with one reference, the caller's. Shares profile. */
static vkp_status vkp_i_conn_new(vkp_loop *loop, vkp_i_profile *profile, vkp_conn **out)
{
    vkp_conn *conn = (vkp_conn *)vkp_i_alloc_zero(loop->env, sizeof *conn);
    vkp_status status = VKP_OK;
    if (conn == NULL) {
        return VKP_ERR_NOMEM;
    }
    conn->refs = 1;
    conn->loop = vkp_loop_ref(loop);
    conn->profile = vkp_i_profile_ref(profile);
    conn->user = profile->config.user;
    conn->task.fn = vkp_i_conn_task;
    conn->fd = -1;
    if (!profile->config.loop_only) {
        status = vkp_i_conn_open_inbox(conn);
    }
    if (status != VKP_OK) {
        vkp_conn_unref(conn);
        return status;
    }
    *out = conn;
    return VKP_OK;
}

/* Serve fd with a shared profile. Takes fd; gives *out beside the loop's own reference.
   prepared: fd was accepted by this library, its flags are set. The caller calls on_open.     */
static vkp_status vkp_i_conn_adopt(vkp_loop *loop, int fd, vkp_i_profile *profile, bool prepared,
                                   vkp_conn **out)
{
    vkp_conn *conn;
    int result = prepared ? 0 : loop->sys->prepare(fd);
    vkp_status status;
    if (result < 0) {
        return vkp_i_sys_failure(result);
    }
    status = vkp_i_conn_new(loop, profile, &conn);
    if (status != VKP_OK) {
        return status;
    }
    status = vkp_io_start(&conn->io, loop, fd, VKP_IO_READ, vkp_i_conn_event);
    if (status != VKP_OK) {
        vkp_conn_unref(conn);
        return status;
    }
    conn->fd = fd;
    vkp_i_conn_set_liveness(conn); /* no effect on other sockets than TCP's */
    profile->live++;
    *out = vkp_conn_ref(conn);
    return VKP_OK;
}

VKP_API vkp_status vkp_conn_open(vkp_loop *loop, int fd, const vkp_conn_config *config,
                                 vkp_conn **conn)
{
    vkp_i_profile *profile;
    vkp_status status;
    VKP_I_REQUIRE(loop != NULL && fd >= 0 && config != NULL && config->ops != NULL && conn != NULL);
    VKP_I_REQUIRE(vkp_i_on_loop(loop));
    if (loop->closed) {
        return VKP_ERR_CLOSED;
    }
    profile = vkp_i_profile_open(loop->env, config);
    if (profile == NULL) {
        return VKP_ERR_NOMEM;
    }
    status = vkp_i_conn_adopt(loop, fd, profile, false, conn);
    vkp_i_profile_unref(profile);
    if (status == VKP_OK && config->ops->on_open != NULL) {
        config->ops->on_open(*conn, (*conn)->user);
    }
    return status;
}

/* vkp_conn_connect to resolved addresses, at most VKP_I_CONNECT_TRIES of them. */
static vkp_status vkp_i_conn_connect_to(vkp_loop *loop, const vkp_address *addresses, size_t count,
                                        const vkp_conn_config *config, vkp_conn **out)
{
    vkp_i_profile *profile = vkp_i_profile_open(loop->env, config);
    vkp_conn *conn = NULL;
    vkp_status status;
    if (profile == NULL) {
        return VKP_ERR_NOMEM;
    }
    status = vkp_i_conn_new(loop, profile, &conn);
    vkp_i_profile_unref(profile);
    if (status != VKP_OK) {
        return status;
    }
    conn->flags |= VKP_I_CONN_CONNECTING;
    conn->connecting = (vkp_i_connecting *)vkp_i_alloc_zero(loop->env, sizeof *conn->connecting);
    if (conn->connecting == NULL) {
        vkp_conn_unref(conn);
        return VKP_ERR_NOMEM;
    }
    memcpy(conn->connecting->addresses, addresses, count * sizeof *addresses);
    conn->connecting->count = count;
    conn->connecting->conn = conn;
    conn->connecting->deadline_ns = config->connect_ms == 0
                                        ? VKP_FOREVER
                                        : vkp_i_after_ms(vkp_i_loop_now(loop), config->connect_ms);
    status = vkp_i_conn_try_next(conn);
    if (status != VKP_OK) {
        int error = errno;
        vkp_i_connecting_free(conn);
        vkp_conn_unref(conn);
        errno = error;
        return status;
    }
    *out = vkp_conn_ref(conn);
    return VKP_OK;
}

VKP_API vkp_status vkp_conn_connect(vkp_loop *loop, vkp_str address, const vkp_conn_config *config,
                                    vkp_conn **out)
{
    vkp_address addresses[VKP_I_CONNECT_TRIES];
    size_t count = 0;
    vkp_status status;
    VKP_I_REQUIRE(loop != NULL && address.ptr != NULL && config != NULL && config->ops != NULL);
    VKP_I_REQUIRE(out != NULL && vkp_i_on_loop(loop));
    if (loop->closed) {
        return VKP_ERR_CLOSED;
    }
    status = vkp_i_parse_address(loop->env, address, addresses, VKP_I_CONNECT_TRIES, &count);
    return status == VKP_OK ? vkp_i_conn_connect_to(loop, addresses, count, config, out) : status;
}

/* ---- the other calls of the handle ---- */

VKP_API void vkp_conn_pause(vkp_conn *conn)
{
    conn->flags |= VKP_I_CONN_PAUSED;
    vkp_i_conn_update_interest(conn);
}

VKP_API void vkp_conn_resume(vkp_conn *conn)
{
    if ((conn->flags & VKP_I_CONN_PAUSED) == 0 || vkp_i_conn_closed(conn)) {
        return;
    }
    conn->flags &= ~VKP_I_CONN_PAUSED;
    conn->flags |= VKP_I_CONN_REREAD;
    vkp_i_conn_update_interest(conn);
    vkp_i_conn_defer(conn);
}

VKP_API void vkp_conn_drain(vkp_conn *conn)
{
    if (vkp_i_conn_closed(conn) || (conn->flags & VKP_I_CONN_DRAINING) != 0) {
        return;
    }
    conn->flags |= VKP_I_CONN_DRAINING;
    if (conn->inbox != NULL) { /* frames in the inbox are written before the close */
        vkp_i_inbox_hold(conn->inbox);
        vkp_mpsc_close(conn->inbox->rx);
        conn->flags |= VKP_I_CONN_INBOX_HELD;
        vkp_i_conn_pull_inbox(conn);
    }
    vkp_i_conn_update_interest(conn);
    vkp_i_conn_defer(conn);
}

VKP_API void vkp_conn_close(vkp_conn *conn)
{
    if (conn == NULL || vkp_i_conn_closed(conn)) {
        return;
    }
    if (vkp_i_on_loop(conn->loop)) {
        vkp_i_conn_finish(conn, VKP_CLOSE_LOCAL, 0);
    } else {
        vkp_i_conn_close_remotely(conn, vkp_i_conn_remote);
    }
}

VKP_API void *vkp_conn_get_user(const vkp_conn *conn)
{
    return conn->user;
}

VKP_API void vkp_conn_set_user(vkp_conn *conn, void *user)
{
    conn->user = user;
}

VKP_API void vkp_conn_set_seat(vkp_conn *conn, vkp_seat *seat)
{
    conn->seat = seat;
}

VKP_API vkp_loop *vkp_conn_get_loop(const vkp_conn *conn)
{
    return conn->loop;
}

VKP_API int vkp_conn_get_fd(const vkp_conn *conn)
{
    return conn->fd;
}

VKP_API bool vkp_conn_is_open(const vkp_conn *conn)
{
    return !vkp_i_conn_closed(conn);
}

VKP_API void vkp_conn_get_stats(const vkp_conn *conn, vkp_conn_stats *stats)
{
    stats->queued_frames = conn->queued_frames;
    stats->queued_bytes = conn->queued_bytes;
    stats->dropped_frames = VKP_I_LOAD(&conn->dropped);
}

/* ---- for the layers above ----
   Listener, hub, push loop and relay use the public calls and: vkp_i_profile_open, _ref and _unref,
   the profile's dropped, live and when_empty; vkp_i_conn_adopt, vkp_i_conn_admit,
   vkp_i_conn_push, vkp_i_conn_flush, vkp_i_conn_finish, vkp_i_conn_close_later; and the functions
   below.                                                                                      */

/* Inside on_open after vkp_conn_connect: the address that accepted. */
static const vkp_address *vkp_i_conn_get_address(const vkp_conn *conn)
{
    return &conn->connecting->addresses[conn->connecting->next - 1];
}

/* Whether vkp_conn_drain was called: the connection reads nothing, and closes when its queues
   are written.                                                                                */
static bool vkp_i_conn_is_draining(const vkp_conn *conn)
{
    return (conn->flags & VKP_I_CONN_DRAINING) != 0;
}

/* Whether the peer's commands are still answered: the connection neither drains nor closes
   later.                                                                                      */
static bool vkp_i_conn_is_serving(const vkp_conn *conn)
{
    return (conn->flags & (VKP_I_CONN_DRAINING | VKP_I_CONN_CLOSES)) == 0;
}

/* Bytes in the outbox, pushes and response stream, that the kernel has not accepted. */
static size_t vkp_i_conn_get_queued_bytes(const vkp_conn *conn)
{
    return conn->queued_bytes;
}

/* The next connection of the profile in the loop's slots from *index on, or NULL. *index moves
   past it.                                                                                    */
static vkp_conn *vkp_i_conn_of_profile(vkp_loop *loop, const vkp_i_profile *profile, size_t *index)
{
    while (*index < loop->slot_count) {
        vkp_io *io = loop->slots[(*index)++].io;
        if (io != NULL && io->i_fn == vkp_i_conn_event) {
            vkp_conn *conn = VKP_CONTAINER(io, vkp_conn, io);
            if (conn->profile == profile) {
                return conn;
            }
        }
    }
    return NULL;
}

#endif /* VKP_I_IO */

#if VKP_I_IO
/* ======================================================================================
   >>impl-listener   Accept connections
   ======================================================================================
   A listener accepts on its loop's thread, at most VKP_I_ACCEPT_BATCH connections per event. The
   gate admits or refuses each one (vkp_i_listener_admit); an admitted descriptor becomes a
   connection, or on_fd takes it with its seat.
   A Unix listener is a follower of its socket: when the socket ends or has another descriptor,
   the registry queues follower.task on the loop, from any thread. vkp_listener_open with
   on_start queues the open itself as a task, from any thread.
   The registry's lock and the gate's mutex are taken one after the other, never one inside the
   other; callbacks of the listener run without locks. A callback may close the listener: code
   behind a callback checks `endpoint` or VKP_I_LISTENER_CLOSED.                               */

/* Bits of vkp_listener.flags. */
#define VKP_I_LISTENER_CLOSED 1u       /* vkp_listener_close was called */
#define VKP_I_LISTENER_LOOPS 2u        /* the loop owns the listener and frees it after the close */
#define VKP_I_LISTENER_CLOSED_FIRST 4u /* closed while follower.task was queued */
#define VKP_I_LISTENER_DRAINS 8u       /* a drain is under way */

#define VKP_I_UNIX_PREFIX (sizeof "unix:" - 1)
#define VKP_I_ADDRESS_TEXT 320    /* bytes of a TCP address as text */
#define VKP_I_LISTEN_BACKLOG 4096 /* default of vkp_listener_config.backlog */

/* References, all used on the loop's thread: one of the owner (the program, or the loop with
   VKP_I_LISTENER_LOOPS), and one each of a running event, of a follower's task queued at the
   close, and of a drain under way.                                                            */
struct vkp_listener {
    vkp_loop *loop;             /* shared */
    size_t refs;                /* loop's thread */
    uint32_t flags;             /* VKP_I_LISTENER_CLOSED and the other bits */
    vkp_i_profile *profile;     /* config of the accepted connections, shared with them */
    vkp_listener_config config; /* its address is cleared after the open: the caller's memory */
    vkp_gate *gate;             /* shared; opened by the listener when the config has none */
    uint64_t listener_id;       /* the listener's number in its gate */
    vkp_registry *registry;     /* of a Unix socket, shared; NULL for TCP */
    vkp_socket *socket;         /* of a Unix address, shared unless config.follow; NULL for TCP */
    uint32_t generation;        /* the socket's generation, for vkp_i_socket_take_weak */
    vkp_i_follower follower;    /* entry in the socket's list of followers */
    vkp_i_endpoint *endpoint;   /* shares the listening descriptor; NULL when closed */
    vkp_io io;                  /* registration of the listening descriptor */
    vkp_timer pause;            /* runs while accepting pauses, for example after EMFILE */
    uint64_t pause_ns;          /* length of the last pause; 0: the last accept succeeded */
    uint64_t shortage_ns; /* time of the first accept that failed with EMFILE or ENFILE; 0: none */
    int spare;            /* a descriptor kept to be closed when no other is free; -1: none */
    vkp_i_task release_task;        /* gives the loop's reference back after the close */
    vkp_timer drain_timer;          /* deadline of the drain */
    vkp_i_task drain_task;          /* calls on_drained; its fn is NULL until a drain begins */
    void (*on_drained)(void *user); /* of vkp_listener_drain; called once */
    void *drain_user;               /* argument of on_drained */
    vkp_str address;                /* a copy, with the port that the system chose */
    vkp_listener_stats stats;       /* all but `clients`, which the gate's seats count */
};

/* Give one reference back; the last one frees the listener. */
static void vkp_i_listener_release(vkp_listener *listener)
{
    if (--listener->refs == 0) {
        vkp_loop *loop = listener->loop;
        vkp_i_profile_unref(listener->profile);
        vkp_registry_unref(listener->registry);
        vkp_gate_unref(listener->gate);
        vkp_i_free_str(loop->env, listener->address);
        vkp_i_free(loop->env, listener, sizeof *listener);
        vkp_loop_unref(loop);
    }
}

static void vkp_i_listener_release_later(vkp_i_task *task)
{
    vkp_i_listener_release(VKP_CONTAINER(task, vkp_listener, release_task));
}

/* The socket or the loop ended: close the listener and call on_end. */
static void vkp_i_listener_end(vkp_listener *listener)
{
    void (*on_end)(void *user) = listener->config.on_end;
    void *user = listener->config.conn.user;
    vkp_listener_close(listener);
    if (on_end != NULL) {
        on_end(user);
    }
}

/* ---- accepting ---- */

/* Count a refused client, call on_refuse, close fd. */
static void vkp_i_listener_refuse(vkp_listener *listener, int fd, vkp_refusal why)
{
    listener->stats.refused[why]++;
    vkp_i_gate_count_refusal(listener->gate, why);
    if (listener->config.on_refuse != NULL) {
        listener->config.on_refuse(listener->config.conn.user, fd, why);
    }
    (void)listener->loop->sys->close(fd);
}

/* Take a seat for the client of fd. NOT_FOUND: the client has disconnected already; LIMIT,
   NOMEM: the client is refused, *why says why.                                                */
static vkp_status vkp_i_listener_admit(vkp_listener *listener, int fd, vkp_seat **seat,
                                       vkp_refusal *why)
{
    vkp_gate *gate = listener->gate;
    vkp_peer peer;
    vkp_seat wanted;
    vkp_status status = VKP_OK;
    memset(&wanted, 0, sizeof wanted);
    if (listener->socket != NULL) {
        int result = listener->loop->sys->peer(fd, &peer);
        if (result == -ENOTCONN || result == -ECONNRESET) {
            return VKP_ERR_NOT_FOUND;
        }
        *why = VKP_REFUSAL_USER;
        if (result < 0 || !vkp_i_gate_allows(gate, &peer)) {
            return VKP_ERR_LIMIT;
        }
        wanted.uid = peer.uid;
        wanted.has_uid = true;
        if (listener->config.follow) {
            status = vkp_i_socket_take_weak(listener->socket, listener->generation, &wanted.sock);
            *why = status == VKP_ERR_LIMIT ? VKP_REFUSAL_FULL : VKP_REFUSAL_ENDED;
        }
    }
    if (status != VKP_OK) {
        return VKP_ERR_LIMIT;
    }
    wanted.listener_id = listener->listener_id;
    VKP_I_LOCK(&gate->mutex);
    status = vkp_i_gate_seat(gate, &wanted, listener->config.max_clients, seat, why);
    VKP_I_UNLOCK(&gate->mutex);
    if (status != VKP_OK) {
        vkp_socket_unref(wanted.sock);
    }
    return status;
}

/* Admit the client of fd: make a connection, or give fd and its seat to on_fd. Otherwise refuse
   it.                                                                                         */
static void vkp_i_listener_give(vkp_listener *listener, int fd)
{
    const vkp_conn_ops *ops = listener->profile->config.ops;
    vkp_seat *seat = NULL;
    vkp_refusal why = VKP_REFUSAL_OVERLOAD;
    vkp_conn *conn;
    vkp_status status = vkp_i_listener_admit(listener, fd, &seat, &why);
    if (status == VKP_ERR_NOT_FOUND) {
        listener->stats.aborted++;
        (void)listener->loop->sys->close(fd);
        return;
    }
    if ((listener->flags & VKP_I_LISTENER_CLOSED) != 0) { /* the gate closed it */
        vkp_seat_unref(seat);
        listener->config.on_refuse = NULL;
        vkp_i_listener_refuse(listener, fd, VKP_REFUSAL_ENDED);
        return;
    }
    if (status != VKP_OK) {
        vkp_i_listener_refuse(listener, fd, why);
        return;
    }
    if (listener->config.on_fd != NULL) {
        listener->stats.accepted++;
        listener->config.on_fd(listener->config.conn.user, fd, seat);
        return;
    }
    if (vkp_i_conn_adopt(listener->loop, fd, listener->profile, true, &conn) != VKP_OK) {
        vkp_seat_unref(seat);
        vkp_i_listener_refuse(listener, fd, VKP_REFUSAL_OVERLOAD);
        return;
    }
    listener->stats.accepted++;
    vkp_conn_set_seat(conn, seat);
    if (listener->config.on_accept != NULL) {
        listener->config.on_accept(listener->config.conn.user, conn);
    }
    if (vkp_conn_is_open(conn) && ops->on_open != NULL) {
        ops->on_open(conn, vkp_conn_get_user(conn));
    }
    vkp_conn_unref(conn);
}

#define VKP_I_ACCEPT_BATCH 64           /* most connections accepted per event */
#define VKP_I_PAUSE_LEAST_NS 10000000u  /* first pause: 10 ms */
#define VKP_I_PAUSE_MOST_NS 1000000000u /* longest pause: 1 s */

/* The pause is over: accept again. */
static void vkp_i_listener_unpause(vkp_timer *timer)
{
    vkp_listener *listener = VKP_CONTAINER(timer, vkp_listener, pause);
    if (vkp_io_set(&listener->io, VKP_IO_READ) != VKP_OK) {
        /* Cannot fail: the entry of this timer was just removed, so there is room. */
        (void)!vkp_timer_start(timer, listener->loop, vkp_i_listener_unpause, 0,
                               listener->loop->now_ns + VKP_I_PAUSE_MOST_NS);
    }
}

/* Pause accepting. Clients wait in the backlog, and the loop does not spin on a descriptor that
   stays ready.                                                                                */
static void vkp_i_listener_back_off(vkp_listener *listener, int error)
{
    listener->pause_ns = listener->pause_ns == 0
                             ? VKP_I_PAUSE_LEAST_NS
                             : VKP_I_MIN(listener->pause_ns * 2, (uint64_t)VKP_I_PAUSE_MOST_NS);
    if (vkp_timer_start(&listener->pause, listener->loop, vkp_i_listener_unpause, 0,
                        listener->loop->now_ns + listener->pause_ns) == VKP_OK) {
        (void)!vkp_io_set(&listener->io, 0);
        listener->stats.pauses++;
    }
    vkp_i_log(listener->loop->env, VKP_LOG_WARN, "%s: accept: %s; pausing for %u ms",
              listener->address.ptr, strerror(error),
              (unsigned)(listener->pause_ns / VKP_I_NS_PER_MS));
}

/* Descriptors are short for a second: close the spare one, so that waiting clients can be
   accepted and refused instead of waiting without an answer.                                  */
static void vkp_i_listener_reject_waiting(vkp_listener *listener)
{
    const vkp_sys *sys = listener->loop->sys;
    int fd = 0;
    int i;
    if (listener->spare >= 0) {
        (void)sys->close(listener->spare);
        listener->spare = -1;
        for (i = 0; i < VKP_I_ACCEPT_BATCH && fd >= 0 && listener->endpoint != NULL; i++) {
            fd = sys->accept(listener->endpoint->fd);
            if (fd >= 0) {
                vkp_i_listener_refuse(listener, fd, VKP_REFUSAL_OVERLOAD);
            }
        }
    }
    if (listener->endpoint != NULL) {
        listener->spare = sys->socket(AF_UNIX, SOCK_STREAM);
    }
}

/* accept failed. True: accept the next connection immediately. */
static bool vkp_i_listener_failed(vkp_listener *listener, int error)
{
    if (error == EINTR) {
        return true;
    }
    if (error == EAGAIN || error == EWOULDBLOCK) {
        return false;
    }
    if (error == ECONNABORTED || error == EPROTO || error == ENETDOWN || error == EHOSTUNREACH ||
        error == ENETUNREACH) { /* errors of the accepted connection, not of the listener */
        listener->stats.aborted++;
        return true;
    }
    if (error == EMFILE || error == ENFILE) {
        uint64_t now_ns = listener->loop->now_ns;
        listener->stats.no_descriptors++;
        if (listener->shortage_ns == 0) {
            listener->shortage_ns = now_ns;
        } else if (now_ns - listener->shortage_ns >= VKP_I_PAUSE_MOST_NS) {
            vkp_i_listener_reject_waiting(listener);
        }
    } else if (error == ENOMEM || error == ENOBUFS) {
        listener->stats.no_memory++;
    } else {
        listener->stats.failed++;
    }
    if ((listener->flags & VKP_I_LISTENER_CLOSED) == 0) {
        vkp_i_listener_back_off(listener, error);
    }
    return false;
}

/* The listening descriptor is ready; ready 0: the loop closes. */
static void vkp_i_listener_event(vkp_io *io, uint32_t ready)
{
    vkp_listener *listener = VKP_CONTAINER(io, vkp_listener, io);
    bool more = true;
    int i;
    listener->refs++;
    if (ready == 0) {
        vkp_i_listener_end(listener);
    }
    for (i = 0; i < VKP_I_ACCEPT_BATCH && more && listener->endpoint != NULL; i++) {
        int fd = listener->loop->sys->accept(listener->endpoint->fd);
        if (fd < 0) {
            more = vkp_i_listener_failed(listener, -fd);
            continue;
        }
        listener->pause_ns = 0;
        listener->shortage_ns = 0;
        if (i == 0 && listener->spare < 0) { /* no descriptor was free for it earlier */
            listener->spare = listener->loop->sys->socket(AF_UNIX, SOCK_STREAM);
        }
        if (listener->socket == NULL) {
            (void)listener->loop->sys->set_nodelay(fd);
        }
        vkp_i_listener_give(listener, fd);
    }
    vkp_i_listener_release(listener);
}

/* ---- with a socket ---- */

/* Task of the follower: the socket has ended, or has another descriptor. */
static void vkp_i_listener_socket_ended(vkp_i_task *task)
{
    vkp_listener *listener = VKP_CONTAINER(task, vkp_listener, follower.task);
    vkp_i_endpoint *endpoint = NULL;
    vkp_i_registry_enter(listener->registry);
    listener->follower.queued = false;
    if (listener->follower.sock != NULL) {
        endpoint = vkp_i_endpoint_ref(listener->follower.sock->endpoint);
    }
    vkp_i_registry_leave(listener->registry, true);
    if ((listener->flags & VKP_I_LISTENER_CLOSED_FIRST) != 0) {
        vkp_i_listener_release(listener);
    } else if (endpoint == NULL) {
        vkp_i_listener_end(listener);
    } else if (endpoint != listener->endpoint) {
        vkp_i_endpoint *before = listener->endpoint;
        listener->endpoint = endpoint;
        endpoint = before; /* its reference is given back below */
        vkp_io_stop(&listener->io);
        vkp_timer_stop(&listener->pause);
        if (vkp_io_start(&listener->io, listener->loop, listener->endpoint->fd, VKP_IO_READ,
                         vkp_i_listener_event) != VKP_OK) {
            vkp_i_listener_end(listener);
        }
    }
    vkp_i_endpoint_unref(endpoint);
}

/* Share the socket's descriptor and join its followers. CLOSED: the socket has ended. */
static vkp_status vkp_i_listener_attach_socket(vkp_listener *listener)
{
    vkp_socket *sock = listener->socket;
    vkp_i_registry_enter(listener->registry);
    if (sock->endpoint != NULL) {
        listener->endpoint = vkp_i_endpoint_ref(sock->endpoint);
        listener->follower.loop = listener->loop;
        listener->follower.task.fn = vkp_i_listener_socket_ended;
        listener->follower.sock = sock;
        listener->follower.next = sock->followers;
        sock->followers = &listener->follower;
    }
    vkp_i_registry_leave(listener->registry, true);
    return listener->endpoint != NULL ? VKP_OK : VKP_ERR_CLOSED;
}

/* Leave the socket's followers. A follower's task that is queued keeps a reference until it
   runs.                                                                                       */
static void vkp_i_listener_detach_socket(vkp_listener *listener)
{
    vkp_i_follower *follower = &listener->follower;
    vkp_i_registry_enter(listener->registry);
    if (follower->sock != NULL) {
        vkp_i_follower **link = &follower->sock->followers;
        while (*link != follower) {
            link = &(*link)->next;
        }
        *link = follower->next;
        follower->sock = NULL;
    }
    if (follower->queued) {
        listener->flags |= VKP_I_LISTENER_CLOSED_FIRST;
        listener->refs++;
    }
    vkp_i_registry_leave(listener->registry, true);
}

/* ---- opening ---- */

/* Bind and listen on a TCP address; listener->address gets the port that the system chose. */
static vkp_status vkp_i_listen_tcp(vkp_listener *listener, const vkp_address *address, vkp_str text)
{
    const vkp_sys *sys = listener->loop->sys;
    char full[VKP_I_ADDRESS_TEXT];
    int fd = sys->socket(address->family, SOCK_STREAM);
    int result = fd;
    if (fd >= 0) {
        listener->endpoint = vkp_i_endpoint_open(listener->loop->env, fd);
        if (listener->endpoint == NULL) {
            (void)sys->close(fd);
            return VKP_ERR_NOMEM;
        }
        result = sys->bind(fd, address->storage.bytes, address->bytes, 0);
    }
    if (result == 0) {
        result = sys->listen(fd, listener->config.backlog > 0 ? listener->config.backlog
                                                              : VKP_I_LISTEN_BACKLOG);
    }
    if (result == 0) {
        result = sys->local_port(fd);
    }
    if (result < 0) {
        return result == -EADDRINUSE ? VKP_ERR_IN_USE : vkp_i_sys_failure(result);
    }
    while (text.ptr[--text.len] != ':') { /* cut the requested port off: it may be 0 */
    }
    (void)snprintf(full, sizeof full, "%.*s:%d", VKP_FMT(text), result);
    listener->address = vkp_str_of(full);
    return vkp_i_copy_str(listener->loop->env, &listener->address) ? VKP_OK : VKP_ERR_NOMEM;
}

/* Listen on listener->socket, of which the listener holds a reference. */
static vkp_status vkp_i_listen_unix(vkp_listener *listener)
{
    char full[sizeof "unix:" + VKP_I_PATH_BYTES];
    bool copied;
    (void)snprintf(full, sizeof full, "unix:%s", vkp_socket_get_path(listener->socket));
    listener->address = vkp_str_of(full);
    copied = vkp_i_copy_str(listener->loop->env, &listener->address);
    listener->generation = vkp_socket_downgrade(listener->socket).i_generation;
    return copied ? vkp_i_listener_attach_socket(listener) : VKP_ERR_NOMEM;
}

/* Open the socket of "unix:PATH" or, for a unique path, of "unix:". Opens a registry when
   *registry is NULL.                                                                          */
static vkp_status vkp_i_make_socket(const vkp_env *env, int backlog, vkp_str address,
                                    vkp_registry **registry, vkp_socket **sock)
{
    vkp_str path = vkp_i_str(address.ptr + VKP_I_UNIX_PREFIX, address.len - VKP_I_UNIX_PREFIX);
    bool abstract = path.len > 0 && path.ptr[0] == '@';
    vkp_status status = VKP_OK;
    if (abstract && !VKP_I_LINUX) {
        return VKP_ERR_UNSUPPORTED;
    }
    if (path.len == 0) {
        path.ptr = NULL;
    }
    if (*registry == NULL) {
        vkp_registry_config config;
        memset(&config, 0, sizeof config);
        config.env = env;
        config.backlog = backlog;
        config.abstract_names = VKP_I_LINUX;
        status = vkp_registry_open(&config, registry);
    } else {
        VKP_I_REQUIRE(!abstract || (*registry)->config.abstract_names);
    }
    return status == VKP_OK ? vkp_socket_open(*registry, path, sock) : status;
}

static vkp_status vkp_i_listener_bind(vkp_listener *listener)
{
    vkp_str text = listener->config.address;
    vkp_address address;
    size_t count = 0;
    vkp_status status;
    if (listener->config.socket != NULL) {
        listener->registry = vkp_registry_ref(listener->config.socket->registry);
        listener->socket = vkp_socket_ref(listener->config.socket);
        return listener->socket != NULL ? vkp_i_listen_unix(listener) : VKP_ERR_LIMIT;
    }
    if (vkp_i_starts_with(text, "unix:")) {
        if (listener->config.registry != NULL) {
            listener->registry = vkp_registry_ref(listener->config.registry);
        }
        status = vkp_i_make_socket(listener->loop->env, listener->config.backlog, text,
                                   &listener->registry, &listener->socket);
        return status == VKP_OK ? vkp_i_listen_unix(listener) : status;
    }
    status = vkp_i_parse_address(listener->loop->env, text, &address, 1, &count);
    return status == VKP_OK ? vkp_i_listen_tcp(listener, &address, text) : status;
}

static vkp_status vkp_i_listener_open_gate(vkp_listener *listener)
{
    vkp_gate_config config;
    vkp_status status = VKP_OK;
    memset(&config, 0, sizeof config);
    config.env = listener->loop->env;
    if (listener->config.gate != NULL) {
        listener->gate = vkp_gate_ref(listener->config.gate);
    } else {
        status = vkp_gate_open(&config, &listener->gate);
    }
    if (status == VKP_OK) {
        listener->listener_id = VKP_I_ADD(&listener->gate->listener_ids, (uint64_t)1);
    }
    return status;
}

/* Open a listener whose config was checked. Loop's thread. */
static vkp_status vkp_i_listener_begin(vkp_loop *loop, const vkp_listener_config *config,
                                       vkp_listener **out)
{
    vkp_listener *listener;
    vkp_status status;
    int error;
    listener = (vkp_listener *)vkp_i_alloc_zero(loop->env, sizeof *listener);
    if (listener == NULL) {
        return VKP_ERR_NOMEM;
    }
    listener->profile = vkp_i_profile_open(loop->env, &config->conn);
    if (listener->profile == NULL) {
        vkp_i_free(loop->env, listener, sizeof *listener);
        return VKP_ERR_NOMEM;
    }
    listener->loop = vkp_loop_ref(loop);
    listener->refs = 1;
    listener->config = *config;
    listener->spare = -1;
    if (listener->config.max_clients == 0) {
        listener->config.max_clients = SIZE_MAX;
    }
    status = vkp_i_listener_open_gate(listener);
    status = status == VKP_OK ? vkp_i_listener_bind(listener) : status;
    if (status == VKP_OK) {
        status = vkp_io_start(&listener->io, loop, listener->endpoint->fd, VKP_IO_READ,
                              vkp_i_listener_event);
    }
    error = errno;
    memset(&listener->config.address, 0, sizeof listener->config.address); /* the caller's memory */
    if (status != VKP_OK) {
        /* unref must give the open's reference of the socket back */
        listener->config.follow = false;
        vkp_listener_unref(listener);
        errno = error;
        return status;
    }
    /* On failure vkp_i_listener_event opens the spare descriptor later. */
    listener->spare = loop->sys->socket(AF_UNIX, SOCK_STREAM);
    if (config->follow) {
        vkp_socket_unref(listener->socket); /* not the last reference: the caller holds one */
    }
    *out = listener;
    return VKP_OK;
}

VKP_API const char *vkp_listener_get_address(const vkp_listener *listener)
{
    return listener->address.ptr;
}

VKP_API void vkp_listener_get_stats(const vkp_listener *listener, vkp_listener_stats *stats)
{
    const vkp_seat *each;
    *stats = listener->stats;
    stats->clients = 0;
    VKP_I_LOCK(&listener->gate->mutex);
    for (each = listener->gate->seats; each != NULL; each = each->next) {
        stats->clients += each->listener_id == listener->listener_id ? each->clients : 0;
    }
    VKP_I_UNLOCK(&listener->gate->mutex);
}

VKP_API void vkp_listener_close(vkp_listener *listener)
{
    if (listener == NULL || (listener->flags & VKP_I_LISTENER_CLOSED) != 0) {
        return;
    }
    listener->flags |= VKP_I_LISTENER_CLOSED;
    vkp_io_stop(&listener->io);
    vkp_timer_stop(&listener->pause);
    if (listener->registry != NULL) {
        vkp_i_listener_detach_socket(listener);
    }
    vkp_i_endpoint_unref(listener->endpoint);
    listener->endpoint = NULL;
    if (!listener->config.follow) {
        vkp_socket_unref(listener->socket);
    }
    if (listener->spare >= 0) {
        (void)listener->loop->sys->close(listener->spare);
        listener->spare = -1;
    }
    if ((listener->flags & VKP_I_LISTENER_LOOPS) != 0) {
        vkp_i_loop_defer(listener->loop, &listener->release_task);
    }
}

VKP_API void vkp_listener_unref(vkp_listener *listener)
{
    if (listener == NULL) {
        return;
    }
    vkp_listener_close(listener);
    if ((listener->flags & VKP_I_LISTENER_DRAINS) != 0) {
        listener->flags &= ~VKP_I_LISTENER_DRAINS;
        vkp_timer_stop(&listener->drain_timer);
        listener->on_drained = NULL;
        if (listener->profile->when_empty != NULL) { /* otherwise drain_task is deferred */
            listener->profile->when_empty = NULL;
            vkp_i_listener_release(listener);
        }
    }
    vkp_i_listener_release(listener);
}

/* ---- draining ---- */

/* Task: every connection of a drained listener is closed. */
static void vkp_i_listener_drained(vkp_i_task *task)
{
    vkp_listener *listener = VKP_CONTAINER(task, vkp_listener, drain_task);
    void (*on_drained)(void *user) = listener->on_drained;
    listener->flags &= ~VKP_I_LISTENER_DRAINS;
    vkp_timer_stop(&listener->drain_timer);
    if (on_drained != NULL) {
        on_drained(listener->drain_user);
    }
    vkp_i_listener_release(listener);
}

/* The drain's deadline has passed: close the connections that are left. */
static void vkp_i_listener_drain_over(vkp_timer *timer)
{
    vkp_listener *listener = VKP_CONTAINER(timer, vkp_listener, drain_timer);
    vkp_conn *conn;
    size_t index = 0;
    listener->refs++;
    while ((conn = vkp_i_conn_of_profile(listener->loop, listener->profile, &index)) != NULL) {
        vkp_i_conn_finish(conn, VKP_CLOSE_LOCAL, 0);
    }
    vkp_i_listener_release(listener);
}

VKP_API vkp_status vkp_listener_drain(vkp_listener *listener, const vkp_bytes *notice,
                                      void (*on_end)(void *user), void *user, uint64_t deadline_ns)
{
    vkp_conn *conn;
    size_t index = 0;
    VKP_I_REQUIRE(listener != NULL && listener->config.on_fd == NULL);
    VKP_I_REQUIRE(listener->drain_task.fn == NULL);
    if (deadline_ns != VKP_FOREVER) {
        vkp_status status = vkp_timer_start(&listener->drain_timer, listener->loop,
                                            vkp_i_listener_drain_over, 0, deadline_ns);
        if (status != VKP_OK) {
            return status;
        }
    }
    listener->refs++;
    listener->flags |= VKP_I_LISTENER_DRAINS;
    listener->drain_task.fn = vkp_i_listener_drained;
    listener->on_drained = on_end;
    listener->drain_user = user;
    vkp_listener_close(listener);
    while ((conn = vkp_i_conn_of_profile(listener->loop, listener->profile, &index)) != NULL) {
        if (notice != NULL && vkp_conn_send(conn, notice) == VKP_ERR_NOMEM) {
            vkp_i_conn_close_later(conn, VKP_CLOSE_NOMEM, 0);
        }
        vkp_conn_drain(conn);
    }
    if (listener->profile->live > 0) {
        listener->profile->when_empty = &listener->drain_task;
    } else {
        vkp_i_loop_defer(listener->loop, &listener->drain_task);
    }
    return VKP_OK;
}

/* ---- listeners started from any thread ---- */

/* A listener that vkp_listener_open with on_start queued for its loop's thread. */
typedef struct vkp_i_start {
    vkp_i_task task;            /* runs vkp_i_start_run on the loop's thread */
    vkp_loop *loop;             /* shared */
    vkp_listener_config config; /* shares its socket, registry and gate; its address is a copy */
} vkp_i_start;

static void vkp_i_start_free(vkp_i_start *start)
{
    vkp_loop *loop = start->loop;
    vkp_registry_unref(start->config.registry);
    vkp_gate_unref(start->config.gate);
    vkp_socket_unref(start->config.socket);
    vkp_i_free_str(loop->env, start->config.address);
    vkp_i_free(loop->env, start, sizeof *start);
    vkp_loop_unref(loop);
}

/* Task on the loop's thread: open the listener, call on_start. */
static void vkp_i_start_run(vkp_i_task *task)
{
    vkp_i_start *start = VKP_CONTAINER(task, vkp_i_start, task);
    bool gives = start->config.follow && start->config.socket == NULL;
    vkp_listener *listener = NULL;
    vkp_listening result;
    memset(&result, 0, sizeof result);
    result.status = start->loop->closed ? VKP_ERR_CLOSED : VKP_OK;
    if (result.status == VKP_OK && gives) { /* on_start gets its first reference */
        result.status =
            vkp_i_make_socket(start->loop->env, start->config.backlog, start->config.address,
                              &start->config.registry, &start->config.socket);
    }
    if (result.status == VKP_OK) {
        result.status = vkp_i_listener_begin(start->loop, &start->config, &listener);
    }
    if (result.status == VKP_OK) {
        listener->flags |= VKP_I_LISTENER_LOOPS;
        listener->release_task.fn = vkp_i_listener_release_later;
        result.address = listener->address.ptr;
        result.listener = listener;
        result.socket = gives ? start->config.socket : NULL;
    } else if (result.status == VKP_ERR_SYS) {
        result.sys_error = errno;
    }
    start->config.on_start(start->config.conn.user, &result);
    if (result.socket != NULL) {
        start->config.socket = NULL; /* on_start took the reference */
    }
    vkp_i_start_free(start);
}

/* Queue vkp_i_start_run on the loop. Any thread. */
static vkp_status vkp_i_listener_start(vkp_loop *loop, const vkp_listener_config *config)
{
    vkp_i_start *start = (vkp_i_start *)vkp_i_alloc_zero(loop->env, sizeof *start);
    vkp_status status = VKP_OK;
    if (start == NULL) {
        return VKP_ERR_NOMEM;
    }
    start->task.fn = vkp_i_start_run;
    start->loop = vkp_loop_ref(loop);
    start->config = *config;
    start->config.registry = config->registry != NULL ? vkp_registry_ref(config->registry) : NULL;
    start->config.gate = config->gate != NULL ? vkp_gate_ref(config->gate) : NULL;
    if (config->address.ptr != NULL) {
        status = vkp_i_copy_str(loop->env, &start->config.address) ? VKP_OK : VKP_ERR_NOMEM;
    } else {
        start->config.socket = vkp_socket_ref(config->socket);
        status = start->config.socket != NULL ? VKP_OK : VKP_ERR_LIMIT;
    }
    if (status == VKP_OK && !vkp_i_loop_queue(loop, &start->task)) {
        status = VKP_ERR_CLOSED;
    }
    if (status != VKP_OK) {
        vkp_i_start_free(start);
    }
    return status;
}

VKP_API vkp_status vkp_listener_open(vkp_loop *loop, const vkp_listener_config *config,
                                     vkp_listener **listener)
{
    VKP_I_REQUIRE(loop != NULL && config != NULL);
    VKP_I_REQUIRE((config->address.ptr != NULL) != (config->socket != NULL));
    VKP_I_REQUIRE(config->conn.ops != NULL || config->on_fd != NULL);
    VKP_I_REQUIRE((config->on_start == NULL) == (listener != NULL));
    if (config->on_start != NULL) {
        VKP_I_REQUIRE(!config->follow || config->address.ptr == NULL ||
                      vkp_i_starts_with(config->address, "unix:"));
        return vkp_i_listener_start(loop, config);
    }
    VKP_I_REQUIRE(vkp_i_on_loop(loop) && (config->socket != NULL || !config->follow));
    return loop->closed ? VKP_ERR_CLOSED : vkp_i_listener_begin(loop, config, listener);
}

#endif /* VKP_I_IO */

#if VKP_I_IO
/* ======================================================================================
   >>impl-health   Is a server well?
   ======================================================================================
   A health check runs on its loop's thread alone, without locks. Each check connects, sends the
   request, compares the first bytes received with the answer, calls on_result once, and starts
   the timer of the next check.
   vkp_i_health_end is the only end of a check. It disconnects before it calls on_result: the
   user of a connection without a check is NULL, and its events are ignored. on_result may close
   and unref the handle; `calling` defers the free until on_result returned.                   */

#define VKP_I_HEALTH_TIMEOUT_MS 1000u /* default of vkp_health_config.timeout_ms */

struct vkp_health_check {
    vkp_loop *loop;           /* shared */
    vkp_health_config config; /* its address, request and answer point into `texts` */
    char *texts;              /* terminated copies of address, request and answer */
    size_t text_bytes;        /* allocated bytes of `texts` */
    vkp_conn *conn;           /* connection of the running check, or NULL */
    vkp_timer timer;          /* deadline of the running check, or start of the next one */
    vkp_i_attached place;     /* calls vkp_i_health_on_loop_close */
    uint64_t began_ns;        /* start of the running or last check */
    uint64_t failures;        /* failed checks since the last success */
    bool calling;             /* on_result is running: unref must not free */
    bool closed;              /* vkp_health_check_close was called */
    bool released;            /* the handle was given back: the end of on_result frees */
};

static void vkp_i_health_begin(vkp_timer *timer);

static void vkp_i_health_free(vkp_health_check *check)
{
    vkp_loop *loop = check->loop;
    vkp_i_free(loop->env, check->texts, check->text_bytes);
    vkp_i_free(loop->env, check, sizeof *check);
    vkp_loop_unref(loop);
}

/* Close the connection. Its user is cleared first: the on_close that follows must not end a
   check.                                                                                      */
static void vkp_i_health_disconnect(vkp_health_check *check)
{
    vkp_conn *conn = check->conn;
    check->conn = NULL;
    if (conn != NULL) {
        vkp_conn_set_user(conn, NULL);
        vkp_conn_close(conn);
        vkp_conn_unref(conn);
    }
}

/* End the running check: call on_result, then start the timer of the next check, or free. */
static void vkp_i_health_end(vkp_health_check *check, vkp_status status, int error)
{
    vkp_loop *loop = check->loop;
    vkp_health health;
    vkp_timer_stop(&check->timer);
    vkp_i_health_disconnect(check);
    check->failures = status == VKP_OK ? 0 : check->failures + 1;
    memset(&health, 0, sizeof health);
    health.status = status;
    health.sys_error = status == VKP_ERR_SYS ? error : 0;
    health.elapsed_ns = vkp_i_loop_clock(loop) - check->began_ns;
    health.failures = check->failures;
    check->calling = true;
    check->config.on_result(check->config.user, &health);
    check->calling = false;
    if (check->released) {
        vkp_i_health_free(check);
    } else if (!check->closed && check->config.period_ms > 0 && !loop->closed) {
        uint64_t next_ns = vkp_i_after_ms(check->began_ns, check->config.period_ms);
        /* Cannot fail: the entry of this timer was just removed, so there is room. */
        (void)!vkp_timer_start(&check->timer, loop, vkp_i_health_begin, 0,
                               VKP_I_MAX(next_ns, loop->now_ns));
    }
}

static void vkp_i_health_on_open(vkp_conn *conn, void *user)
{
    vkp_health_check *check = (vkp_health_check *)user;
    vkp_bytes request;
    vkp_status status;
    if (check == NULL) {
        return;
    }
    status = vkp_bytes_copy(check->loop->env, check->config.request.ptr, check->config.request.len,
                            &request);
    if (status == VKP_OK) {
        status = vkp_conn_send(conn, &request);
        vkp_bytes_unref(&request);
    }
    if (status != VKP_OK) {
        vkp_i_health_end(check, status, 0);
    }
}

static size_t vkp_i_health_on_data(vkp_conn *conn, void *user, const vkp_bytes *in)
{
    vkp_health_check *check = (vkp_health_check *)user;
    vkp_str answer;
    size_t len;
    (void)conn;
    if (check == NULL) {
        return in->len;
    }
    answer = check->config.answer;
    len = VKP_I_MIN(in->len, answer.len);
    if (memcmp(in->data, answer.ptr, len) != 0) {
        vkp_i_health_end(check, VKP_ERR_PROTOCOL, 0);
    } else if (len == answer.len) {
        vkp_i_health_end(check, VKP_OK, 0);
    } else {
        return 0; /* incomplete: on_data gets these bytes again, with more behind them */
    }
    return in->len;
}

static void vkp_i_health_on_close(vkp_conn *conn, void *user, vkp_close_reason reason, int error)
{
    vkp_health_check *check = (vkp_health_check *)user;
    vkp_status status = VKP_ERR_DISCONNECTED;
    (void)conn;
    if (check == NULL) {
        return;
    }
    if (reason == VKP_CLOSE_NOMEM) {
        status = VKP_ERR_NOMEM;
    } else if (reason == VKP_CLOSE_ERROR && error != EPIPE && error != ECONNRESET) {
        status = error == ECONNREFUSED || error == ENOENT ? VKP_ERR_REFUSED : VKP_ERR_SYS;
    }
    vkp_i_health_end(check, status, error);
}

static const vkp_conn_ops vkp_i_health_ops = {
    vkp_i_health_on_open, vkp_i_health_on_data, NULL, NULL, vkp_i_health_on_close, NULL};

static void vkp_i_health_timed_out(vkp_timer *timer)
{
    vkp_i_health_end(VKP_CONTAINER(timer, vkp_health_check, timer), VKP_ERR_TIMEOUT, 0);
}

/* Timer's callback: start a check. */
static void vkp_i_health_begin(vkp_timer *timer)
{
    vkp_health_check *check = VKP_CONTAINER(timer, vkp_health_check, timer);
    vkp_loop *loop = check->loop;
    vkp_conn_config config;
    vkp_status status;
    memset(&config, 0, sizeof config);
    config.ops = &vkp_i_health_ops;
    config.user = check;
    config.input_bytes = check->config.answer.len + loop->read_bytes;
    config.loop_only = true;
    check->began_ns = vkp_i_loop_clock(loop);
    status = vkp_timer_start(timer, loop, vkp_i_health_timed_out, 0,
                             vkp_i_after_ms(check->began_ns, check->config.timeout_ms));
    if (status == VKP_OK) {
        status = vkp_conn_connect(loop, check->config.address, &config, &check->conn);
    }
    if (status == VKP_ERR_SYS && (errno == ECONNREFUSED || errno == ENOENT)) {
        status = VKP_ERR_REFUSED;
    }
    if (status != VKP_OK) {
        vkp_i_health_end(check, status, errno);
    }
}

/* The loop closes: stop checking. The handle stays valid until its unref. */
static void vkp_i_health_on_loop_close(vkp_i_attached *place)
{
    vkp_health_check *check = VKP_CONTAINER(place, vkp_health_check, place);
    vkp_timer_stop(&check->timer);
    vkp_i_health_disconnect(check);
}

/* Copy a text, terminated, to offset *at of check->texts; *at moves behind it. */
static vkp_str vkp_i_health_copy(vkp_health_check *check, size_t *at, vkp_str text)
{
    char *copy = check->texts + *at;
    memcpy(copy, text.ptr, text.len);
    copy[text.len] = '\0';
    *at += text.len + 1;
    return vkp_i_str(copy, text.len);
}

VKP_API vkp_status vkp_health_check_open(vkp_loop *loop, const vkp_health_config *config,
                                         vkp_health_check **out)
{
    vkp_health_check *check;
    vkp_i_parts parts;
    vkp_status status;
    size_t at = 0;
    VKP_I_REQUIRE(loop != NULL && config != NULL && out != NULL && vkp_i_on_loop(loop));
    VKP_I_REQUIRE(config->address.ptr != NULL && config->on_result != NULL);
    if (loop->closed) {
        return VKP_ERR_CLOSED;
    }
    status = vkp_i_split_address(loop->env, config->address, &parts);
    if (status != VKP_OK) {
        return status;
    }
    check = (vkp_health_check *)vkp_i_alloc_zero(loop->env, sizeof *check);
    if (check == NULL) {
        return VKP_ERR_NOMEM;
    }
    check->config = *config;
    if (check->config.request.len == 0) {
        check->config.request = vkp_str_of("PING\r\n");
    }
    if (check->config.answer.len == 0) {
        check->config.answer = vkp_str_of("+PONG\r\n");
    }
    if (check->config.timeout_ms == 0) {
        check->config.timeout_ms = VKP_I_HEALTH_TIMEOUT_MS;
    }
    check->loop = vkp_loop_ref(loop);
    check->text_bytes =
        config->address.len + check->config.request.len + check->config.answer.len + 3;
    check->texts = (char *)vkp_i_alloc(loop->env, check->text_bytes);
    status = check->texts != NULL ? VKP_OK : VKP_ERR_NOMEM;
    if (status == VKP_OK) {
        check->config.address = vkp_i_health_copy(check, &at, config->address);
        check->config.request = vkp_i_health_copy(check, &at, check->config.request);
        check->config.answer = vkp_i_health_copy(check, &at, check->config.answer);
        status = vkp_timer_start(&check->timer, loop, vkp_i_health_begin, 0, 0);
    }
    if (status != VKP_OK) {
        vkp_i_health_free(check);
        return status;
    }
    check->place.on_loop_close = vkp_i_health_on_loop_close;
    vkp_i_loop_attach(loop, &check->place);
    *out = check;
    return VKP_OK;
}

VKP_API void vkp_health_check_close(vkp_health_check *check)
{
    if (check != NULL && !check->closed) {
        check->closed = true;
        vkp_timer_stop(&check->timer);
        vkp_i_health_disconnect(check);
        vkp_i_loop_detach(&check->place);
    }
}

VKP_API void vkp_health_check_unref(vkp_health_check *check)
{
    if (check != NULL) {
        vkp_health_check_close(check);
        check->released = true;
        if (!check->calling) {
            vkp_i_health_free(check);
        }
    }
}

#endif /* VKP_I_IO */

#if VKP_I_IO
/* ======================================================================================
   >>impl-hub   Who is subscribed to what
   ======================================================================================
   A topic is a name of one kind with its members, in no order. A subscription records its index
   among the topic's members and its neighbours among the member's subscriptions, so that
   removing it takes constant time at both ends.
   Messages are encoded into append-only blocks, one block per protocol: consecutive messages are
   neighbours, which a connection writes as one range.
   A hub runs on one loop's thread, without locks. Subscribe, unsubscribe and leave call
   on_interest for a topic's first and last member; delivery never does. Delivery never closes a
   connection (vkp_i_conn_close_later), so that the list of members does not change under it.  */

/* A name of one kind with its members. The name is behind the struct. */
typedef struct vkp_i_topic {
    vkp_i_map_node node; /* in vkp_hub.topics; its key is the name */
    vkp_hub_sub **subs;  /* one subscription for each member, in no order */
    size_t count;        /* used places of `subs` */
    size_t capacity;     /* allocated places of `subs` */
    vkp_sub_kind kind;   /* which of vkp_hub.topics holds this topic */
} vkp_i_topic;

struct vkp_hub_sub {
    vkp_i_topic *topic;     /* holds this subscription at `index` */
    vkp_hub_member *member; /* the subscriber; in the caller's memory */
    size_t index;           /* place of this subscription in topic->subs */
    vkp_hub_sub *prev;      /* the member's newer subscription of this kind, or NULL */
    vkp_hub_sub *next;      /* the member's older subscription of this kind, or NULL */
};

struct vkp_hub {
    const vkp_env *env;
    vkp_hub_config config;           /* a copy */
    vkp_i_map topics[VKP_SUB_KINDS]; /* by vkp_sub_kind, then by name */
    vkp_block *blocks[2];            /* where messages are encoded: [0] RESP2, [1] RESP3; or NULL */
};

/* Match a byte against the element of a [set] at *at: a byte, an escaped byte or a range. *at
   moves behind the element.                                                                   */
static bool vkp_i_glob_class_hit(vkp_str pattern, size_t *at, unsigned char byte)
{
    unsigned char low = (unsigned char)pattern.ptr[*at];
    unsigned char high;
    if (low == '\\' && *at + 1 < pattern.len) {
        low = (unsigned char)pattern.ptr[*at + 1];
        *at += 2;
        return low == byte;
    }
    if (*at + 2 < pattern.len && pattern.ptr[*at + 1] == '-') {
        high = (unsigned char)pattern.ptr[*at + 2];
        *at += 3;
        return low <= high ? byte >= low && byte <= high : byte >= high && byte <= low;
    }
    *at += 1;
    return low == byte;
}

/* Match one byte against the pattern's element at *at; *at moves behind it. */
static bool vkp_i_glob_one(vkp_str pattern, size_t *at, unsigned char byte)
{
    unsigned char mark = (unsigned char)pattern.ptr[*at];
    bool negated;
    bool hit = false;
    if (mark == '?') {
        *at += 1;
        return true;
    }
    if (mark != '[') {
        *at += mark == '\\' && *at + 1 < pattern.len ? 1u : 0u;
        mark = (unsigned char)pattern.ptr[*at];
        *at += 1;
        return mark == byte;
    }
    *at += 1;
    negated = *at < pattern.len && pattern.ptr[*at] == '^';
    *at += negated ? 1u : 0u;
    while (*at < pattern.len && pattern.ptr[*at] != ']') {
        hit = vkp_i_glob_class_hit(pattern, at, byte) || hit;
    }
    *at += *at < pattern.len ? 1u : 0u; /* an unclosed set ends with the pattern */
    return hit != negated;
}

/* A mismatch returns to the last star only: an earlier star that matches more text cannot do
   better.                                                                                     */
VKP_API bool vkp_glob_is_match(vkp_str pattern, vkp_str text)
{
    size_t p = 0;
    size_t t = 0;
    size_t star = SIZE_MAX;
    size_t star_text = 0;
    for (;;) {
        size_t next = p;
        while (p < pattern.len && pattern.ptr[p] == '*') {
            star = ++p;
            star_text = t;
            next = p;
        }
        if (star == pattern.len) {
            return true;
        }
        if (t < text.len && p < pattern.len &&
            vkp_i_glob_one(pattern, &next, (unsigned char)text.ptr[t])) {
            p = next;
            t++;
            continue;
        }
        if (t == text.len && p == pattern.len) {
            return true;
        }
        if (star == SIZE_MAX || star_text >= text.len) {
            return false;
        }
        t = ++star_text;
        p = star;
    }
}

VKP_API vkp_status vkp_hub_open(const vkp_hub_config *config, vkp_hub **out)
{
    const vkp_env *env = vkp_i_env(config != NULL ? config->env : NULL);
    vkp_hub *hub;
    int kind;
    VKP_I_REQUIRE(out != NULL);
    hub = (vkp_hub *)vkp_i_alloc_zero(env, sizeof *hub);
    if (hub == NULL) {
        return VKP_ERR_NOMEM;
    }
    hub->env = env;
    if (config != NULL) {
        hub->config = *config;
    }
    for (kind = 0; kind < VKP_SUB_KINDS; kind++) {
        vkp_i_map_init(&hub->topics[kind], env);
    }
    *out = hub;
    return VKP_OK;
}

static void vkp_i_topic_free(vkp_hub *hub, vkp_i_topic *topic)
{
    vkp_i_free(hub->env, topic->subs, topic->capacity * sizeof *topic->subs);
    vkp_i_free(hub->env, topic, sizeof *topic + topic->node.key.len);
}

VKP_API void vkp_hub_unref(vkp_hub *hub)
{
    int kind;
    if (hub == NULL) {
        return;
    }
    for (kind = 0; kind < VKP_SUB_KINDS; kind++) {
        vkp_i_map_deinit(&hub->topics[kind]);
    }
    vkp_i_block_unref(hub->blocks[0]);
    vkp_i_block_unref(hub->blocks[1]);
    vkp_i_free(hub->env, hub, sizeof *hub);
}

/* The topic of a name, or NULL. */
static vkp_i_topic *vkp_i_hub_find(const vkp_hub *hub, vkp_sub_kind kind, vkp_str name)
{
    const vkp_i_map *map = &hub->topics[kind];
    vkp_i_map_node *node =
        map->count > 0 ? vkp_i_map_find(map, vkp_i_map_hash(map, name), name) : NULL;
    return node != NULL ? VKP_CONTAINER(node, vkp_i_topic, node) : NULL;
}

static vkp_i_topic *vkp_i_topic_new(vkp_hub *hub, vkp_sub_kind kind, vkp_str name)
{
    vkp_i_topic *topic = (vkp_i_topic *)vkp_i_alloc_zero(hub->env, sizeof *topic + name.len);
    if (topic == NULL) {
        return NULL;
    }
    topic->kind = kind;
    if (name.len > 0) {
        memcpy(topic + 1, name.ptr, name.len);
    }
    topic->node.key = vkp_i_str(topic + 1, name.len);
    topic->node.hash = vkp_i_map_hash(&hub->topics[kind], name);
    if (!vkp_i_map_insert(&hub->topics[kind], &topic->node)) {
        vkp_i_topic_free(hub, topic);
        return NULL;
    }
    return topic;
}

/* The member's subscription to the topic, or NULL. */
static vkp_hub_sub *vkp_i_member_find(const vkp_hub_member *member, const vkp_i_topic *topic)
{
    vkp_hub_sub *sub = member->i_subs[topic->kind];
    size_t i;
    /* Both lists are searched in step: the shorter one bounds the time. */
    for (i = 0; i < topic->count && sub != NULL && sub->topic != topic; i++) {
        if (topic->subs[i]->member == member) {
            return topic->subs[i];
        }
        sub = sub->next;
    }
    return i < topic->count ? sub : NULL;
}

/* Free a topic without members; if the last parameter is set, call on_interest before. */
static void vkp_i_hub_forget_empty(vkp_hub *hub, vkp_i_topic *topic, bool tell)
{
    if (topic->count == 0) {
        vkp_i_map_remove(&hub->topics[topic->kind], &topic->node);
        if (tell && hub->config.on_interest != NULL) {
            hub->config.on_interest(hub->config.user, topic->kind, topic->node.key, false);
        }
        vkp_i_topic_free(hub, topic);
    }
}

VKP_API vkp_status vkp_hub_subscribe(vkp_hub *hub, vkp_hub_member *member, vkp_sub_kind kind,
                                     vkp_str name, bool *added)
{
    vkp_i_topic *topic;
    vkp_hub_sub *sub;
    void *subs;
    bool fresh;
    VKP_I_REQUIRE(hub != NULL && member != NULL && (unsigned)kind < VKP_SUB_KINDS);
    if (name.len > VKP_I_BLOCK_MAX) {
        return VKP_ERR_LIMIT;
    }
    topic = vkp_i_hub_find(hub, kind, name);
    fresh = topic == NULL;
    if (!fresh && vkp_i_member_find(member, topic) != NULL) {
        if (added != NULL) {
            *added = false;
        }
        return VKP_OK;
    }
    sub = (vkp_hub_sub *)vkp_i_alloc_zero(hub->env, sizeof *sub);
    if (fresh && sub != NULL) {
        topic = vkp_i_topic_new(hub, kind, name);
    }
    subs = topic != NULL ? topic->subs : NULL;
    if (sub == NULL || topic == NULL ||
        !vkp_i_grow(hub->env, &subs, &topic->capacity, topic->count + 1, sizeof *topic->subs)) {
        vkp_i_free(hub->env, sub, sizeof *sub);
        if (topic != NULL) {
            vkp_i_hub_forget_empty(hub, topic, false);
        }
        return VKP_ERR_NOMEM;
    }
    topic->subs = (vkp_hub_sub **)subs;
    sub->topic = topic;
    sub->member = member;
    sub->index = topic->count;
    topic->subs[topic->count++] = sub;
    sub->next = member->i_subs[kind];
    if (sub->next != NULL) {
        sub->next->prev = sub;
    }
    member->i_subs[kind] = sub;
    member->counts[kind]++;
    if (added != NULL) {
        *added = true;
    }
    if (fresh && hub->config.on_interest != NULL) {
        hub->config.on_interest(hub->config.user, kind, name, true);
    }
    return VKP_OK;
}

/* Remove a subscription from its topic and its member, and free it. The last one frees the
   topic.                                                                                      */
static void vkp_i_hub_drop(vkp_hub *hub, vkp_hub_sub *sub)
{
    vkp_i_topic *topic = sub->topic;
    vkp_hub_member *member = sub->member;
    topic->subs[sub->index] = topic->subs[--topic->count];
    topic->subs[sub->index]->index = sub->index;
    if (sub->prev != NULL) {
        sub->prev->next = sub->next;
    } else {
        member->i_subs[topic->kind] = sub->next;
    }
    if (sub->next != NULL) {
        sub->next->prev = sub->prev;
    }
    member->counts[topic->kind]--;
    vkp_i_free(hub->env, sub, sizeof *sub);
    vkp_i_hub_forget_empty(hub, topic, true);
}

VKP_API bool vkp_hub_unsubscribe(vkp_hub *hub, vkp_hub_member *member, vkp_sub_kind kind,
                                 vkp_str name)
{
    vkp_i_topic *topic = vkp_i_hub_find(hub, kind, name);
    vkp_hub_sub *sub = topic != NULL ? vkp_i_member_find(member, topic) : NULL;
    if (sub != NULL) {
        vkp_i_hub_drop(hub, sub);
    }
    return sub != NULL;
}

VKP_API void vkp_hub_leave(vkp_hub *hub, vkp_hub_member *member)
{
    int kind;
    for (kind = 0; kind < VKP_SUB_KINDS; kind++) {
        while (member->i_subs[kind] != NULL) {
            vkp_i_hub_drop(hub, member->i_subs[kind]);
        }
    }
}

VKP_API vkp_str vkp_hub_get_member_name(const vkp_hub_member *member, vkp_sub_kind kind)
{
    const vkp_hub_sub *sub = member->i_subs[kind];
    return sub != NULL ? sub->topic->node.key : vkp_i_str(NULL, 0);
}

VKP_API bool vkp_hub_is_subscribed(const vkp_hub *hub, const vkp_hub_member *member,
                                   vkp_sub_kind kind, vkp_str name)
{
    vkp_i_topic *topic = vkp_i_hub_find(hub, kind, name);
    return topic != NULL && vkp_i_member_find(member, topic) != NULL;
}

VKP_API size_t vkp_hub_get_members(const vkp_hub *hub, vkp_sub_kind kind, vkp_str name)
{
    vkp_i_topic *topic = vkp_i_hub_find(hub, kind, name);
    return topic != NULL ? topic->count : 0;
}

VKP_API size_t vkp_hub_get_names(const vkp_hub *hub, vkp_sub_kind kind)
{
    return hub->topics[kind].count;
}

VKP_API bool vkp_hub_next_name(const vkp_hub *hub, vkp_sub_kind kind, void **cursor, vkp_str *name)
{
    vkp_i_map_node *node = vkp_i_map_get_next(&hub->topics[kind], (vkp_i_map_node *)*cursor);
    *cursor = node;
    if (node != NULL) {
        *name = node->key;
    }
    return node != NULL;
}

/* ---- delivery ---- */

/* A message under delivery and its encodings. */
typedef struct vkp_i_message {
    vkp_str parts[4];    /* kind, pattern (may be empty), channel, payload; views */
    bool has_pattern;    /* parts[1] is part of the message */
    vkp_bytes frames[2]; /* [0] RESP2, [1] RESP3; views; len 0: not encoded yet */
} vkp_i_message;

#define VKP_I_HUB_BLOCK 65536u /* least capacity of an encoding block */
#define VKP_I_BULK_HEAD 28u    /* at least the bytes that a bulk string adds to its text */
#define VKP_I_ARRAY_HEAD 8u    /* at least the bytes of a message's first line */

/* Room for `bytes` at the end of an encoding block, or NULL: no memory. The hub's own reference
   keeps the block while it is filled.                                                         */
static uint8_t *vkp_i_hub_reserve(vkp_hub *hub, int which, size_t bytes)
{
    vkp_block *block = hub->blocks[which];
    if (block != NULL && vkp_i_block_is_mine(block)) {
        block->len = 0; /* no connection holds it any longer: reuse the same cache lines */
    }
    if (block != NULL && block->capacity - block->len < bytes) {
        vkp_i_block_unref(block);
        block = NULL;
    }
    if (block == NULL) {
        block = vkp_i_block_open(hub->env, VKP_I_MAX((size_t)VKP_I_HUB_BLOCK, bytes));
    }
    hub->blocks[which] = block;
    return block != NULL ? vkp_i_block_data(block) + block->len : NULL;
}

/* Write the text as a bulk string; returns the bytes written, at most text.len +
   VKP_I_BULK_HEAD.                                                                            */
static size_t vkp_i_encode_bulk(uint8_t *out, vkp_str text)
{
    char digits[VKP_I_DIGITS];
    size_t from = vkp_i_format_u64(digits, text.len);
    size_t at = 0;
    out[at++] = '$';
    memcpy(out + at, digits + from, VKP_I_DIGITS - from);
    at += VKP_I_DIGITS - from;
    out[at++] = '\r';
    out[at++] = '\n';
    if (text.len > 0) {
        memcpy(out + at, text.ptr, text.len);
    }
    at += text.len;
    out[at++] = '\r';
    out[at++] = '\n';
    return at;
}

/* The message in the protocol, encoded at the first call. NULL: no memory, or above
   VKP_I_BLOCK_MAX.                                                                            */
static const vkp_bytes *vkp_i_message_frame(vkp_hub *hub, vkp_i_message *message, int protocol)
{
    int which = protocol == 3 ? 1 : 0;
    vkp_bytes *frame = &message->frames[which];
    size_t most = VKP_I_ARRAY_HEAD;
    size_t at = 0;
    uint8_t *out;
    int i;
    if (frame->len > 0) {
        return frame;
    }
    for (i = 0; i < 4; i++) {
        most += message->parts[i].len + VKP_I_BULK_HEAD;
    }
    out = most <= VKP_I_BLOCK_MAX ? vkp_i_hub_reserve(hub, which, most) : NULL;
    if (out == NULL) {
        return NULL;
    }
    out[at++] = which == 1 ? '>' : '*';
    out[at++] = message->has_pattern ? '4' : '3';
    out[at++] = '\r';
    out[at++] = '\n';
    for (i = 0; i < 4; i++) {
        if (i != 1 || message->has_pattern) {
            at += vkp_i_encode_bulk(out + at, message->parts[i]);
        }
    }
    hub->blocks[which]->len += at;
    frame->data = out;
    frame->len = at;
    frame->block = hub->blocks[which];
    return frame;
}

/* Push the message to every member of the topic; returns the number of members. */
static size_t vkp_i_topic_deliver(vkp_hub *hub, vkp_i_topic *topic, vkp_i_message *message)
{
    size_t i;
    for (i = 0; i < topic->count; i++) {
        vkp_hub_member *member = topic->subs[i]->member;
        const vkp_bytes *frame = &message->frames[member->protocol == 3 ? 1 : 0];
        if (frame->len == 0) {
            frame = vkp_i_message_frame(hub, message, member->protocol);
        }
        if (frame != NULL) {
            (void)!vkp_i_conn_admit(member->conn, frame); /* the policy counts drops */
        }
    }
    return topic->count;
}

static void vkp_i_message_init(vkp_i_message *message, const char *kind, vkp_str pattern,
                               vkp_str channel, vkp_str payload)
{
    memset(message, 0, sizeof *message);
    message->parts[0] = vkp_str_of(kind);
    message->parts[1] = pattern;
    message->parts[2] = channel;
    message->parts[3] = payload;
    message->has_pattern = kind[0] == 'p';
}

VKP_API size_t vkp_hub_publish(vkp_hub *hub, vkp_sub_kind kind, vkp_str channel, vkp_str payload)
{
    vkp_i_message message;
    vkp_i_topic *topic = vkp_i_hub_find(hub, kind, channel);
    vkp_i_map_node *node = NULL;
    vkp_str none = vkp_i_str(NULL, 0);
    size_t count = 0;
    if (topic != NULL) {
        vkp_i_message_init(&message, kind == VKP_SUB_SHARD ? "smessage" : "message", none, channel,
                           payload);
        count += vkp_i_topic_deliver(hub, topic, &message);
    }
    if (kind == VKP_SUB_CHANNEL && hub->topics[VKP_SUB_PATTERN].count > 0) {
        while ((node = vkp_i_map_get_next(&hub->topics[VKP_SUB_PATTERN], node)) != NULL) {
            if (vkp_glob_is_match(node->key, channel)) {
                vkp_i_message_init(&message, "pmessage", node->key, channel, payload);
                count += vkp_i_topic_deliver(hub, VKP_CONTAINER(node, vkp_i_topic, node), &message);
            }
        }
    }
    return count;
}

VKP_API size_t vkp_hub_deliver(vkp_hub *hub, const vkp_push *push)
{
    vkp_i_message message;
    vkp_i_topic *topic;
    vkp_sub_kind kind = push->kind == VKP_PUSH_PMESSAGE   ? VKP_SUB_PATTERN
                        : push->kind == VKP_PUSH_SMESSAGE ? VKP_SUB_SHARD
                                                          : VKP_SUB_CHANNEL;
    if (push->kind != VKP_PUSH_MESSAGE && kind == VKP_SUB_CHANNEL) {
        return 0;
    }
    topic = vkp_i_hub_find(hub, kind, kind == VKP_SUB_PATTERN ? push->pattern : push->channel);
    if (topic == NULL) {
        return 0;
    }
    vkp_i_message_init(&message,
                       kind == VKP_SUB_PATTERN ? "pmessage"
                       : kind == VKP_SUB_SHARD ? "smessage"
                                               : "message",
                       push->pattern, push->channel, push->payload);
    if (push->frame.len > 0 && push->frame.data[0] == '>') {
        message.frames[1] = push->frame;
    }
    return vkp_i_topic_deliver(hub, topic, &message);
}

#endif /* VKP_I_IO */

#if VKP_I_IO
/* ======================================================================================
   >>impl-push   What a server pushes
   ======================================================================================
   Recognise a push in a value. vkp_push_from_value takes no lock and allocates nothing; the
   texts of its result view the value's frame, so it runs on any thread.
   vkp_i_push_forms is the only list of kinds that a server sends. A push of a listed name with
   another number of elements is VKP_PUSH_OTHER. The kinds from VKP_PUSH_CONNECTED on are events
   of the client and never come from a server.                                                 */

VKP_API const char *vkp_push_kind_str(vkp_push_kind kind)
{
    switch (kind) {
    case VKP_PUSH_MESSAGE:
        return "message";
    case VKP_PUSH_PMESSAGE:
        return "pmessage";
    case VKP_PUSH_SMESSAGE:
        return "smessage";
    case VKP_PUSH_SUBSCRIBED:
        return "subscribed";
    case VKP_PUSH_UNSUBSCRIBED:
        return "unsubscribed";
    case VKP_PUSH_INVALIDATE:
        return "invalidate";
    case VKP_PUSH_OTHER:
        return "other";
    case VKP_PUSH_CONNECTED:
        return "connected";
    case VKP_PUSH_CONNECT_FAILED:
        return "connect-failed";
    case VKP_PUSH_DISCONNECTED:
        return "disconnected";
    case VKP_PUSH_RECONNECTED:
        return "reconnected";
    case VKP_PUSH_REFUSED:
        return "refused";
    case VKP_PUSH_LOST:
        return "lost";
    case VKP_PUSH_GAP:
        return "gap";
    case VKP_PUSH_LAGGED:
        return "lagged";
    }
    return "unknown";
}

VKP_API size_t vkp_push_get_cost(const void *push)
{
    return sizeof(vkp_push) + ((const vkp_push *)push)->frame.len;
}

VKP_API void vkp_push_unref(vkp_push *push)
{
    if (push != NULL) {
        vkp_bytes_unref(&push->frame);
        memset(push, 0, sizeof *push);
    }
}

VKP_API void vkp_push_drop(void *user, void *push)
{
    (void)user;
    vkp_push_unref((vkp_push *)push);
}

/* Whether the push is a message of a pub/sub channel, received by its name, by a pattern or as a
   shard channel.                                                                              */
static bool vkp_i_push_kind_is_message(vkp_push_kind kind)
{
    return kind == VKP_PUSH_MESSAGE || kind == VKP_PUSH_PMESSAGE || kind == VKP_PUSH_SMESSAGE;
}

/* Whether the push is an event of the client, which no server sends. */
static bool vkp_i_push_kind_is_event(vkp_push_kind kind)
{
    return kind >= VKP_PUSH_CONNECTED;
}

/* One kind of push as a server writes it. */
typedef struct vkp_i_push_form {
    const char *name;   /* the push's first element */
    vkp_push_kind kind; /* value of vkp_push.kind */
    vkp_sub_kind sub;   /* value of vkp_push.sub; without meaning for INVALIDATE */
    uint8_t elements;   /* number of elements, the name included */
} vkp_i_push_form;

static const vkp_i_push_form vkp_i_push_forms[] = {
    {"message", VKP_PUSH_MESSAGE, VKP_SUB_CHANNEL, 3},
    {"pmessage", VKP_PUSH_PMESSAGE, VKP_SUB_PATTERN, 4},
    {"smessage", VKP_PUSH_SMESSAGE, VKP_SUB_SHARD, 3},
    {"subscribe", VKP_PUSH_SUBSCRIBED, VKP_SUB_CHANNEL, 3},
    {"psubscribe", VKP_PUSH_SUBSCRIBED, VKP_SUB_PATTERN, 3},
    {"ssubscribe", VKP_PUSH_SUBSCRIBED, VKP_SUB_SHARD, 3},
    {"unsubscribe", VKP_PUSH_UNSUBSCRIBED, VKP_SUB_CHANNEL, 3},
    {"punsubscribe", VKP_PUSH_UNSUBSCRIBED, VKP_SUB_PATTERN, 3},
    {"sunsubscribe", VKP_PUSH_UNSUBSCRIBED, VKP_SUB_SHARD, 3},
    {"invalidate", VKP_PUSH_INVALIDATE, VKP_SUB_CHANNEL, 2}};

/* Fill the fields of a push from a value of the given form. */
static void vkp_i_push_parts(const vkp_value *value, const vkp_i_push_form *form, vkp_push *push)
{
    const vkp_value *element = vkp_value_get_first(value);
    push->kind = form->kind;
    push->sub = form->sub;
    if (form->kind == VKP_PUSH_INVALIDATE) {
        return;
    }
    element = vkp_value_get_next(value, element);
    if (form->kind == VKP_PUSH_PMESSAGE) {
        push->pattern = vkp_value_get_str(element);
        element = vkp_value_get_next(value, element);
    }
    push->channel = vkp_value_get_str(element);
    if (vkp_i_push_kind_is_message(form->kind)) {
        push->payload = vkp_value_get_str(vkp_value_get_next(value, element));
    }
}

/* Copy the bytes to *end, which moves behind them; returns a view of the copy. */
static vkp_str vkp_i_put_copy(char **end, vkp_str text)
{
    vkp_str copy = vkp_i_str(*end, text.len);
    if (text.len > 0) {
        memcpy(*end, text.ptr, text.len);
    }
    *end += text.len;
    return copy;
}

/* Make the event own its texts: copies of channel and payload in a block that its frame, of no
   bytes, refers to. False: no memory; the event is unchanged.                                 */
static bool vkp_i_push_own_texts(const vkp_env *env, vkp_push *event)
{
    vkp_block *block = vkp_i_block_open(env, event->channel.len + event->payload.len);
    char *end;
    if (block == NULL) {
        return false;
    }
    end = (char *)vkp_i_block_data(block);
    event->channel = vkp_i_put_copy(&end, event->channel);
    event->payload = vkp_i_put_copy(&end, event->payload);
    event->frame.block = block;
    return true;
}

VKP_API vkp_status vkp_push_from_value(const vkp_value *value, vkp_push *push)
{
    size_t i;
    VKP_I_REQUIRE(value != NULL && push != NULL);
    if ((value->type != VKP_RESP_PUSH && value->type != VKP_RESP_ARRAY) || value->len == 0 ||
        value[1].type != VKP_RESP_STRING) {
        return VKP_ERR_INVALID;
    }
    memset(push, 0, sizeof *push);
    /* A fast path for plain messages. Span 4 with length 3: no attributes and no aggregates inside.
       The memset above set kind to VKP_PUSH_MESSAGE and sub to VKP_SUB_CHANNEL, which are 0.  */
    if (value->span == 4 && value->len == 3 && value[1].len == 7 &&
        memcmp(value[1].u.str, "message", 7) == 0 && value[2].type == VKP_RESP_STRING &&
        value[3].type == VKP_RESP_STRING) {
        push->channel = vkp_i_str(value[2].u.str, value[2].len);
        push->payload = vkp_i_str(value[3].u.str, value[3].len);
        return VKP_OK;
    }
    for (i = 0; i < sizeof vkp_i_push_forms / sizeof vkp_i_push_forms[0]; i++) {
        const vkp_i_push_form *form = &vkp_i_push_forms[i];
        if (value->len == form->elements &&
            vkp_i_str_equal(vkp_value_get_str(&value[1]), vkp_str_of(form->name))) {
            vkp_i_push_parts(value, form, push);
            return VKP_OK;
        }
    }
    push->kind = VKP_PUSH_OTHER;
    push->channel = vkp_value_get_str(&value[1]);
    return VKP_OK;
}

#endif /* VKP_I_IO */

#if VKP_I_IO
/* ======================================================================================
   >>impl-resolver   Names without blocking
   ======================================================================================
   A lookup travels from the loop that asks, through a channel, to a thread in vkp_resolver_run, and
   back as a task of the loop. The loop may lose its interest meanwhile (`done` NULL); the task
   frees the lookup. Threads in vkp_resolver_run take lookups one at a time under the mutex, and
   look up without it. */

#define VKP_I_LOOKUP_ADDRESSES 8 /* most addresses of a name */

typedef struct vkp_i_lookup {
    vkp_i_task task; /* returns the lookup to its loop */
    vkp_loop *loop;  /* shared */
    const vkp_env *env;
    vkp_i_parts parts; /* host and port */
    vkp_address addresses[VKP_I_LOOKUP_ADDRESSES];
    size_t count; /* 0: the name was not found, or the resolver is closed */
    /* Called on the loop's thread, once, before the lookup is freed. NULL: no interest. */
    void (*done)(struct vkp_i_lookup *lookup);
    void *user; /* of done */
} vkp_i_lookup;

struct vkp_resolver {
    const vkp_env *env;
    size_t refs;       /* atomic */
    VKP_I_MUTEX gate;  /* guards tx */
    VKP_I_MUTEX mutex; /* one thread at a time receives */
    vkp_mpsc_tx *tx;   /* of vkp_i_lookup*; NULL once closed; guarded by gate */
    vkp_mpsc_rx *rx;   /* used under mutex */
};

static void vkp_i_lookup_free(vkp_i_lookup *lookup)
{
    vkp_loop_unref(lookup->loop);
    vkp_i_free(lookup->env, lookup, sizeof *lookup);
}

/* The lookup is back on its loop. */
static void vkp_i_lookup_return(vkp_i_task *task)
{
    vkp_i_lookup *lookup = VKP_CONTAINER(task, vkp_i_lookup, task);
    if (lookup->done != NULL) {
        lookup->done(lookup);
    }
    vkp_i_lookup_free(lookup);
}

/* Send the lookup back to its loop; a closed loop has no interest. */
static void vkp_i_lookup_finish(vkp_i_lookup *lookup)
{
    lookup->task.fn = vkp_i_lookup_return;
    if (!vkp_i_loop_queue(lookup->loop, &lookup->task)) {
        vkp_i_lookup_free(lookup);
    }
}

static void vkp_i_lookup_drop(void *user, void *item)
{
    (void)user;
    vkp_i_lookup_finish(*(vkp_i_lookup **)item);
}

VKP_API vkp_status vkp_resolver_open(const vkp_env *env, vkp_resolver **out)
{
    vkp_resolver *resolver;
    vkp_mpsc_config config;
    vkp_status status;
    VKP_I_REQUIRE(out != NULL);
    env = vkp_i_env(env);
    resolver = (vkp_resolver *)vkp_i_alloc_zero(env, sizeof *resolver);
    if (resolver == NULL) {
        return VKP_ERR_NOMEM;
    }
    memset(&config, 0, sizeof config);
    config.elem_bytes = sizeof(vkp_i_lookup *);
    config.drop = vkp_i_lookup_drop;
    config.env = env;
    status = vkp_mpsc_open(&config, &resolver->tx, &resolver->rx);
    if (status != VKP_OK) {
        vkp_i_free(env, resolver, sizeof *resolver);
        return status;
    }
    resolver->env = env;
    resolver->refs = 1;
    VKP_I_MUTEX_INIT(&resolver->mutex);
    VKP_I_MUTEX_INIT(&resolver->gate);
    *out = resolver;
    return VKP_OK;
}

VKP_API vkp_resolver *vkp_resolver_ref(vkp_resolver *resolver)
{
    (void)VKP_I_ADD(&resolver->refs, 1);
    return resolver;
}

VKP_API void vkp_resolver_close(vkp_resolver *resolver)
{
    vkp_mpsc_tx *tx;
    if (resolver == NULL) {
        return;
    }
    VKP_I_LOCK(&resolver->gate);
    tx = resolver->tx;
    resolver->tx = NULL;
    VKP_I_UNLOCK(&resolver->gate);
    vkp_mpsc_tx_unref(tx); /* the receiver drains, then it is closed */
}

VKP_API void vkp_resolver_unref(vkp_resolver *resolver)
{
    if (resolver != NULL && VKP_I_UNREF(&resolver->refs) == 1) {
        vkp_resolver_close(resolver);
        vkp_mpsc_rx_unref(resolver->rx); /* returns the lookups that nobody took */
        VKP_I_MUTEX_DEINIT(&resolver->mutex);
        VKP_I_MUTEX_DEINIT(&resolver->gate);
        vkp_i_free(resolver->env, resolver, sizeof *resolver);
    }
}

static bool vkp_i_resolver_is_closed(vkp_resolver *resolver)
{
    bool closed;
    VKP_I_LOCK(&resolver->gate);
    closed = resolver->tx == NULL;
    VKP_I_UNLOCK(&resolver->gate);
    return closed;
}

VKP_API void vkp_resolver_run(vkp_resolver *resolver)
{
    vkp_i_lookup *lookup;
    vkp_status status;
    for (;;) {
        VKP_I_LOCK(&resolver->mutex);
        status = vkp_mpsc_recv(resolver->rx, VKP_FOREVER, &lookup);
        VKP_I_UNLOCK(&resolver->mutex);
        if (status != VKP_OK) {
            return;
        }
        if (!vkp_i_resolver_is_closed(resolver)) {
            int found = vkp_i_sys(resolver->env)
                            ->resolve(lookup->parts.host, lookup->parts.port, lookup->addresses,
                                      VKP_I_LOOKUP_ADDRESSES);
            lookup->count = found > 0 ? (size_t)found : 0;
        }
        vkp_i_lookup_finish(lookup);
    }
}

/* Look the host up for the loop; done is called on its thread, never inside this call. NULL: no
   memory, or the resolver is closed. */
static vkp_i_lookup *vkp_i_resolver_ask(vkp_resolver *resolver, vkp_loop *loop,
                                        const vkp_i_parts *parts,
                                        void (*done)(vkp_i_lookup *lookup), void *user)
{
    vkp_i_lookup *lookup = (vkp_i_lookup *)vkp_i_alloc_zero(resolver->env, sizeof *lookup);
    vkp_status status = VKP_ERR_CLOSED;
    if (lookup == NULL) {
        return NULL;
    }
    lookup->env = resolver->env;
    lookup->loop = vkp_loop_ref(loop);
    lookup->parts = *parts;
    lookup->done = done;
    lookup->user = user;
    VKP_I_LOCK(&resolver->gate);
    if (resolver->tx != NULL) {
        status = vkp_mpsc_try_send(resolver->tx, &lookup);
    }
    VKP_I_UNLOCK(&resolver->gate);
    if (status != VKP_OK) {
        vkp_i_lookup_free(lookup);
        return NULL;
    }
    return lookup;
}

#endif /* VKP_I_IO */

#if VKP_I_IO
/* ======================================================================================
   >>impl-link   One connection to a server, and the requests in flight on it
   ======================================================================================
   A link connects, lets the handshake log in (see impl-handshake), writes requests, and hands each
   answer to the request that it belongs to. Its owner embeds it and is called by vkp_i_link_ops.
   Loop's thread only; no lock is held. Every callback may close the link: code behind a callback
   checks `conn`.
   Requests wait in `flight`, oldest first, because a server answers in order. What answers a
   request depends on what it expects:
     REPLIES  `due` replies; the last one settles it.
     NAMES    SUBSCRIBE: one push for each of `due` names, or one error for all.
     LEAVES   UNSUBSCRIBE: servers answer with a push for the name, with a push for no name, with an
              error, or with a push and an error. So none of these settles it: the fence does.
     FENCE    settles the LEAVES before it by a reply that nothing else has: in RESP3 the map of
              HELLO, in RESP2 the link's token from PING. The link writes it behind the LEAVES.
   An answer that fits nothing means that replies and requests are out of step. The link fails then,
   because every later reply would reach the wrong request.                                    */

typedef enum vkp_i_expect {
    VKP_I_EXPECT_REPLIES = 0,
    VKP_I_EXPECT_NAMES,
    VKP_I_EXPECT_LEAVES,
    VKP_I_EXPECT_FENCE
} vkp_i_expect;

/* What is asked of a server; a member of a larger struct. */
typedef struct vkp_i_request {
    struct vkp_i_request *next; /* younger request of the list that holds this one */
    vkp_i_expect expect;        /* what answers it */
    uint32_t due;               /* replies, or confirmations of names, still to come */
    bool answered;              /* LEAVES: a push or an error was its answer; due 0: refused */
    uint64_t sent_ns;           /* when it was written, on the loop's clock */
    vkp_bytes bytes;            /* the commands to write; empty once written */
    /* NAMES and LEAVES: whether the push is for this request. It was reported then. */
    bool (*accept)(struct vkp_i_request *request, const vkp_push *push);
    /* The request is out of flight; the callback owns it. OK: value and frame are the last reply,
       or NULL when pushes or a fence settled it. REFUSED: value is the error that answered NAMES or
       LEAVES. LIMIT: the reply was over a limit of the reader. Any other status: no answer. Value
       and frame are valid until the callback returns.                                         */
    void (*settle)(struct vkp_i_request *request, vkp_status status, const vkp_value *value,
                   const vkp_bytes *frame);
} vkp_i_request;

/* A list of requests, oldest first. */
typedef struct vkp_i_requests {
    vkp_i_request *first; /* NULL: empty */
    vkp_i_request **end;  /* the NULL link where the next request is appended */
} vkp_i_requests;

typedef struct vkp_i_link vkp_i_link;

/* The addresses of the last lookup that found any. */
typedef struct vkp_i_known {
    vkp_i_parts parts; /* the name, and the port */
    vkp_address addresses[VKP_I_LOOKUP_ADDRESSES];
    size_t count;
} vkp_i_known;

typedef struct vkp_i_link_ops {
    void (*on_ready)(vkp_i_link *link);                      /* the handshake succeeded */
    void (*on_push)(vkp_i_link *link, const vkp_push *push); /* a push that answers no request */
    /* The connection, or the try to connect, ended, and `error` says why. The requests in flight
       are still there: the owner settles them.                                                */
    void (*on_down)(vkp_i_link *link);
    void (*on_busy)(vkp_i_link *link); /* the first request is in flight again */
    void (*hold)(vkp_i_link *link);    /* one more reference to the owner */
    void (*release)(vkp_i_link *link); /* one reference less */
} vkp_i_link_ops;

#define VKP_I_LINK_ERROR_BYTES 160 /* text of vkp_i_link.error, terminated */
#define VKP_I_TOKEN_BYTES 33       /* text of vkp_i_link.token, terminated */

/* Where the handshake is. */
typedef enum vkp_i_stage {
    VKP_I_STAGE_CONNECTING = 0, /* no byte was sent */
    VKP_I_STAGE_HELLO,          /* HELLO 3 waits for its answer */
    VKP_I_STAGE_LOGIN,          /* RESP2: AUTH and PING wait for their answers */
    VKP_I_STAGE_SETUP,          /* SELECT and the commands of the config wait for their answers */
    VKP_I_STAGE_READY
} vkp_i_stage;

struct vkp_i_link {
    const vkp_env *env;
    vkp_loop *loop;                  /* the owner's */
    const vkp_client_config *config; /* the owner's, defaults filled in */
    const vkp_i_link_ops *ops;
    vkp_conn *conn;          /* NULL: down */
    vkp_resp_reader *reader; /* reads replies and pushes */
    vkp_block *out;          /* small commands are gathered here: one range to write */
    vkp_i_requests flight;   /* written requests that wait for answers, oldest first */
    vkp_i_stage stage;
    uint32_t protocol;      /* 2 or 3; 0 before the first handshake */
    uint32_t steps;         /* requests of the handshake's stage that are not settled */
    bool authenticated;     /* NOAUTH was answered to HELLO, AUTH was sent, HELLO asked again */
    bool subscribed;        /* RESP2: an array may be a push; set by the owner */
    bool fence_wanted;      /* LEAVES were written and no fence behind them */
    bool fence_queued;      /* fence_task is deferred */
    bool skipping;          /* the reader refused the reply that `skip` passes over */
    bool connected;         /* this try was accepted by a server's kernel */
    bool spoke;             /* this try had a reply */
    uint32_t errors;        /* errors that answered LEAVES since the last fence */
    uint64_t answered_ns;   /* when an answer, or a part of one, arrived last */
    uint64_t heard_ns;      /* when the last bytes arrived; before: when the connection was begun */
    uint64_t ready_ns;      /* when the handshake succeeded */
    int64_t id;             /* the connection's id on the server; 0: not known */
    vkp_i_lookup *lookup;   /* of the host name; NULL: none is under way */
    vkp_timer lookup_timer; /* ends the wait for a lookup, where addresses are known */
    vkp_i_known *known;     /* addresses of the last lookup; NULL: none */
    uint32_t failures;      /* tries that did not get READY, since one did */
    vkp_address peer;       /* the address of this connection */
    vkp_str username;       /* of this try; the owner's memory */
    vkp_str password;
    vkp_i_task fence_task;
    vkp_i_skip skip;
    char hello_words[VKP_I_LINK_ERROR_BYTES]; /* HELLO's error, when the handshake went on */
    char token[VKP_I_TOKEN_BYTES];            /* PING's argument in a fence */
    char error[VKP_I_LINK_ERROR_BYTES]; /* what ended the last connection or try; "" at first */
};

/* ---- lists of requests ---- */

static void vkp_i_requests_init(vkp_i_requests *list)
{
    list->first = NULL;
    list->end = &list->first;
}

static void vkp_i_requests_append(vkp_i_requests *list, vkp_i_request *request)
{
    request->next = NULL;
    *list->end = request;
    list->end = &request->next;
}

static vkp_i_request *vkp_i_requests_pop(vkp_i_requests *list)
{
    vkp_i_request *first = list->first;
    if (first != NULL) {
        list->first = first->next;
        if (list->first == NULL) {
            list->end = &list->first;
        }
    }
    return first;
}

/* Append all requests of `from` to `to`. */
static void vkp_i_requests_move(vkp_i_requests *from, vkp_i_requests *to)
{
    if (from->first != NULL) {
        *to->end = from->first;
        to->end = from->end;
        vkp_i_requests_init(from);
    }
}

/* ---- ending ---- */

/* Stop to wait for the lookup, if one is under way. */
static void vkp_i_link_end_lookup(vkp_i_link *link)
{
    vkp_timer_stop(&link->lookup_timer);
    if (link->lookup != NULL) {
        link->lookup->done = NULL;
        link->lookup = NULL;
    }
}

/* Close the connection, if any; its on_close is ignored because `conn` is NULL by then. The
   requests in flight stay. */
static void vkp_i_link_close(vkp_i_link *link)
{
    vkp_conn *conn = link->conn;
    link->conn = NULL;
    link->failures += link->stage == VKP_I_STAGE_READY ? 0u : 1u;
    vkp_i_link_end_lookup(link);
    link->stage = VKP_I_STAGE_CONNECTING;
    link->fence_wanted = false;
    link->skipping = false;
    link->errors = 0;
    if (conn != NULL) {
        vkp_conn_close(conn);
        vkp_conn_unref(conn);
    }
    vkp_resp_reader_reset(link->reader);
}

/* The link failed: why is the reason, words are the server's, or of no length. */
static void vkp_i_link_fail(vkp_i_link *link, const char *why, vkp_str words)
{
    int len = (int)VKP_I_MIN(words.len, sizeof link->error);
    (void)snprintf(link->error, sizeof link->error, "%s%s%.*s", why, len > 0 ? ": " : "", len,
                   len > 0 ? words.ptr : "");
    vkp_i_link_close(link); /* ends the memory of words */
    link->ops->on_down(link);
}

/* The same without words of the server. */
static void vkp_i_link_lose(vkp_i_link *link, const char *why)
{
    vkp_i_link_fail(link, why, vkp_i_str(NULL, 0));
}

/* ---- writing ---- */

#define VKP_I_GATHER 2048u        /* commands up to this size are copied together */
#define VKP_I_GATHER_BLOCK 16384u /* capacity of the block that gathers small commands */

/* Queue commands on the connection; small ones are copied behind each other, which makes one
   range to write.                                                                             */
static vkp_status vkp_i_link_write(vkp_i_link *link, const vkp_bytes *bytes)
{
    vkp_bytes part = *bytes;
    vkp_block *out = link->out;
    if (bytes->len <= VKP_I_GATHER) {
        if (out != NULL && vkp_i_block_is_mine(out)) {
            out->len = 0;
        }
        if (out == NULL || out->capacity - out->len < bytes->len) {
            vkp_i_block_unref(out);
            out = vkp_i_block_open(link->env, VKP_I_GATHER_BLOCK);
            link->out = out;
        }
        if (out != NULL) {
            part.data = vkp_i_block_data(out) + out->len;
            part.block = out;
            memcpy(vkp_i_block_data(out) + out->len, bytes->data, bytes->len);
            out->len += bytes->len;
        }
    }
    return vkp_conn_send(link->conn, &part);
}

static bool vkp_i_link_put_fence(vkp_i_link *link);

/* Write a request and append it to `flight`. False: not connected or no memory; it stays the
   caller's.                                                                                   */
static bool vkp_i_link_start(vkp_i_link *link, vkp_i_request *request)
{
    if (link->conn == NULL) {
        return false;
    }
    if (link->fence_wanted && request->expect != VKP_I_EXPECT_LEAVES &&
        request->expect != VKP_I_EXPECT_FENCE && !vkp_i_link_put_fence(link)) {
        return false;
    }
    if (vkp_i_link_write(link, &request->bytes) != VKP_OK) {
        return false;
    }
    vkp_bytes_unref(&request->bytes);
    request->sent_ns = link->loop->now_ns;
    vkp_i_requests_append(&link->flight, request);
    if (link->flight.first == request) {
        link->ops->on_busy(link);
    }
    if (request->expect == VKP_I_EXPECT_LEAVES) {
        link->fence_wanted = true;
        if (!link->fence_queued) {
            link->fence_queued = true;
            link->ops->hold(link);
            vkp_i_loop_defer(link->loop, &link->fence_task);
        }
    }
    return true;
}

static void vkp_i_put_command(vkp_resp_writer *writer, size_t argc, const vkp_str *argv)
{
    size_t i;
    vkp_resp_put_aggregate(writer, VKP_RESP_ARRAY, argc);
    for (i = 0; i < argc; i++) {
        vkp_resp_put_bulk(writer, argv[i].ptr, argv[i].len);
    }
}

/* Put one command into the request. NOMEM, or LIMIT: 4 GiB. */
static vkp_status vkp_i_request_put(vkp_i_request *request, const vkp_env *env, size_t argc,
                                    const vkp_str *argv)
{
    vkp_resp_writer writer;
    vkp_resp_writer_init(&writer, env);
    vkp_i_put_command(&writer, argc, argv);
    return vkp_resp_writer_take(&writer, &request->bytes);
}

/* ---- fences ---- */

/* A fence, with the environment that frees it. */
typedef struct vkp_i_fence {
    vkp_i_request request;
    const vkp_env *env;
} vkp_i_fence;

static void vkp_i_fence_settled(vkp_i_request *request, vkp_status status, const vkp_value *value,
                                const vkp_bytes *frame)
{
    vkp_i_fence *fence = VKP_CONTAINER(request, vkp_i_fence, request);
    (void)status;
    (void)value;
    (void)frame;
    vkp_bytes_unref(&request->bytes);
    vkp_i_free(fence->env, fence, sizeof *fence);
}

/* Write a fence behind the LEAVES. False: no memory. */
static bool vkp_i_link_put_fence(vkp_i_link *link)
{
    vkp_i_fence *fence = (vkp_i_fence *)vkp_i_alloc_zero(link->env, sizeof *fence);
    vkp_str argv[2];
    if (fence == NULL) {
        return false;
    }
    fence->env = link->env;
    fence->request.expect = VKP_I_EXPECT_FENCE;
    fence->request.settle = vkp_i_fence_settled;
    /* Every user may send HELLO, also while a script runs or a data set is loaded. */
    argv[0] = vkp_str_of(link->protocol == 3 ? "HELLO" : "PING");
    argv[1] = vkp_str_of(link->token);
    if (vkp_i_request_put(&fence->request, link->env, link->protocol == 3 ? 1 : 2, argv) !=
            VKP_OK ||
        !vkp_i_link_start(link, &fence->request)) {
        vkp_i_fence_settled(&fence->request, VKP_ERR_NOMEM, NULL, NULL);
        return false;
    }
    link->fence_wanted = false;
    return true;
}

/* The end of the round in which LEAVES were written. */
static void vkp_i_link_fence_task(vkp_i_task *task)
{
    vkp_i_link *link = VKP_CONTAINER(task, vkp_i_link, fence_task);
    link->fence_queued = false;
    if (link->fence_wanted && link->conn != NULL && !vkp_i_link_put_fence(link)) {
        vkp_i_link_lose(link, "out of memory");
    }
    link->ops->release(link);
}

/* The value behind a key of a map, or of an array of keys and values; NULL: there is none. */
static const vkp_value *vkp_i_map_value(const vkp_value *map, const char *key)
{
    const vkp_value *at =
        map->type == VKP_RESP_MAP || map->type == VKP_RESP_ARRAY ? vkp_value_get_first(map) : NULL;
    while (at != NULL) {
        const vkp_value *value = vkp_value_get_next(map, at);
        if (vkp_value_is_text(at, vkp_str_of(key))) {
            return value;
        }
        at = vkp_value_get_next(map, value);
    }
    return NULL;
}

/* Whether the reply is the one of the link's fence. */
static bool vkp_i_link_is_fence(const vkp_i_link *link, const vkp_value *value)
{
    const vkp_value *last = value;
    if (link->protocol == 3) {
        const vkp_value *id = vkp_i_map_value(value, "id");
        return vkp_i_map_value(value, "proto") != NULL &&
               (link->id == 0 || (id != NULL && id->u.integer == link->id));
    }
    if (value->type == VKP_RESP_ARRAY && value->len == 2) { /* something is subscribed still */
        last = vkp_value_get_next(value, vkp_value_get_first(value));
    }
    return last->type == VKP_RESP_STRING && vkp_value_is_text(last, vkp_str_of(link->token));
}

/* A reply while LEAVES are the oldest requests: one of their errors, or the fence. */
static void vkp_i_link_leaves_reply(vkp_i_link *link, const vkp_value *value)
{
    vkp_conn *conn = link->conn;
    vkp_i_request *request;
    uint32_t leaves = 0;
    uint32_t answered = 0;
    for (request = link->flight.first; request != NULL && request->expect == VKP_I_EXPECT_LEAVES;
         request = request->next) {
        leaves++;
        answered += request->answered ? 1u : 0u;
    }
    if (value->type == VKP_RESP_ERROR) {
        vkp_str words = vkp_value_get_str(value);
        if (++link->errors > leaves) {
            vkp_i_link_lose(link, "an error that nothing can have caused");
            return;
        }
        /* The oldest without a push is refused; when all have theirs, it is a second answer. */
        request = link->flight.first;
        while (answered < leaves && request->answered) {
            request = request->next;
        }
        if (answered < leaves) {
            request->answered = true;
            /* Not subscribed, or not served here any more: what was asked for is so. */
            request->due =
                vkp_i_starts_with(words, "NOSUB") || vkp_i_starts_with(words, "MOVED") ? 1 : 0;
        }
        return;
    }
    if (request == NULL || request->expect != VKP_I_EXPECT_FENCE ||
        !vkp_i_link_is_fence(link, value)) {
        vkp_i_link_lose(link, "a reply where an unsubscription was due");
        return;
    }
    link->errors = 0;
    while (link->conn == conn && leaves-- > 0) {
        request = vkp_i_requests_pop(&link->flight);
        request->settle(request, request->due == 0 ? VKP_ERR_REFUSED : VKP_OK, NULL, NULL);
    }
    if (link->conn == conn) {
        request = vkp_i_requests_pop(&link->flight);
        request->settle(request, VKP_OK, value, NULL);
    }
}

/* ---- reading ---- */

/* A reply arrived: it belongs to the oldest request in flight. */
static void vkp_i_link_reply(vkp_i_link *link, const vkp_value *value, const vkp_bytes *frame)
{
    vkp_i_request *oldest = link->flight.first;
    link->answered_ns = link->loop->now_ns;
    link->spoke = true;
    if (oldest == NULL) {
        vkp_i_link_lose(link, "a reply that nobody asked for");
        return;
    }
    switch (oldest->expect) {
    case VKP_I_EXPECT_REPLIES:
        if (--oldest->due == 0) {
            (void)vkp_i_requests_pop(&link->flight);
            oldest->settle(oldest, VKP_OK, value, frame);
        }
        break;
    case VKP_I_EXPECT_NAMES:
        if (value->type == VKP_RESP_ERROR) {
            (void)vkp_i_requests_pop(&link->flight);
            oldest->settle(oldest, VKP_ERR_REFUSED, value, frame);
        } else {
            vkp_i_link_lose(link, "a reply where a confirmation was due");
        }
        break;
    case VKP_I_EXPECT_LEAVES:
    case VKP_I_EXPECT_FENCE: /* without LEAVES before it never the oldest */
        vkp_i_link_leaves_reply(link, value);
        break;
    }
}

/* Whether a push of the UNSUBSCRIBE family answers one of the LEAVES at the head of the flight. */
static bool vkp_i_link_push_leaves(vkp_i_link *link, const vkp_push *push)
{
    vkp_i_request *request;
    for (request = link->flight.first; request != NULL && request->expect == VKP_I_EXPECT_LEAVES;
         request = request->next) {
        if (!request->answered) {
            request->answered = true; /* before accept, whose callbacks may end the request */
            if (push->channel.ptr == NULL || request->accept(request, push)) {
                return true;
            }
            request->answered = false;
        }
    }
    return false;
}

/* A push arrived: it answers a request in flight, or is the owner's. */
static void vkp_i_link_push(vkp_i_link *link, const vkp_value *value, const vkp_bytes *frame)
{
    vkp_conn *conn = link->conn;
    vkp_i_request *oldest = link->flight.first;
    vkp_push push;
    if (vkp_push_from_value(value, &push) != VKP_OK) {
        return; /* the reader rejects such a push */
    }
    push.frame = *frame;
    if (push.kind == VKP_PUSH_SUBSCRIBED && oldest != NULL &&
        oldest->expect == VKP_I_EXPECT_NAMES) {
        if (!oldest->accept(oldest, &push)) {
            vkp_i_link_lose(link, "a confirmation of another name than was due");
        } else if (link->conn == conn && --oldest->due == 0) {
            link->answered_ns = link->loop->now_ns;
            (void)vkp_i_requests_pop(&link->flight);
            oldest->settle(oldest, VKP_OK, NULL, NULL);
        }
        return;
    }
    if (push.kind == VKP_PUSH_UNSUBSCRIBED && vkp_i_link_push_leaves(link, &push)) {
        return;
    }
    link->ops->on_push(link, &push);
}

/* Whether a RESP2 array is a push. RESP2 has no type for pushes: an array of a push's form is
   one while something is subscribed, or while a SUBSCRIBE or UNSUBSCRIBE waits for its answer. */
static bool vkp_i_link_is_push2(const vkp_i_link *link, const vkp_value *value)
{
    vkp_push push;
    const vkp_i_request *oldest = link->flight.first;
    bool due = oldest != NULL &&
               (oldest->expect == VKP_I_EXPECT_NAMES || oldest->expect == VKP_I_EXPECT_LEAVES);
    return link->protocol == 2 && value->type == VKP_RESP_ARRAY && (link->subscribed || due) &&
           vkp_push_from_value(value, &push) == VKP_OK && push.kind != VKP_PUSH_OTHER;
}

/* Read bytes that hold one whole value. */
static const vkp_value *vkp_i_link_reread(vkp_i_link *link, const vkp_bytes *bytes)
{
    const vkp_value *value = NULL;
    size_t consumed;
    return vkp_resp_reader_scan(link->reader, bytes->data, bytes->len, &value, &consumed) == VKP_OK
               ? value
               : NULL;
}

/* A reply with pushes inside: each is handled as if it had arrived before the reply, with its own
   bytes as its frame; then the reply, without them. False: no memory.                          */
static bool vkp_i_link_unnest(vkp_i_link *link, const vkp_bytes *frame)
{
    vkp_conn *conn = link->conn;
    vkp_bytes rest = *frame;
    const vkp_value *value = NULL;
    uint8_t *to;
    size_t from = 0;
    size_t begin;
    size_t end;
    rest.block = vkp_i_block_open(link->env, frame->len);
    if (rest.block == NULL) {
        return false;
    }
    rest.data = vkp_i_block_data(rest.block);
    to = vkp_i_block_data(rest.block);
    while (link->conn == conn && vkp_i_frame_get_nested(frame, from, &begin, &end)) {
        vkp_bytes push = vkp_bytes_slice(frame, begin, end - begin);
        memcpy(to, frame->data + from, begin - from);
        to += begin - from;
        from = end;
        value = vkp_i_link_reread(link, &push);
        if (value != NULL) {
            vkp_i_link_push(link, value, &push);
        }
        vkp_bytes_unref(&push);
    }
    memcpy(to, frame->data + from, frame->len - from);
    to += frame->len - from;
    rest.len = (size_t)(to - rest.data);
    rest.block->len = rest.len;
    if (link->conn == conn) {
        value = vkp_i_link_reread(link, &rest);
        if (value != NULL) {
            vkp_i_link_reply(link, value, &rest);
        }
    }
    vkp_bytes_unref(&rest);
    return value != NULL || link->conn != conn;
}

/* One whole value arrived: a push or a reply. */
static void vkp_i_link_value(vkp_i_link *link, const vkp_value *value, const vkp_bytes *frame)
{
    if (value->type == VKP_RESP_PUSH || vkp_i_link_is_push2(link, value)) {
        vkp_i_link_push(link, value, frame);
    } else if (value->i_has_nested == 0) {
        vkp_i_link_reply(link, value, frame);
    } else if (!vkp_i_link_unnest(link, frame)) {
        vkp_i_link_lose(link, "out of memory");
    }
}

/* The reader refused the frame that begins at data. Begin to skip it, if it is the reply of a
   command and its end can be found; otherwise the link fails.                                 */
static void vkp_i_link_refuse(vkp_i_link *link, vkp_status status, const uint8_t *data)
{
    const vkp_i_request *oldest = link->flight.first;
    bool push = data[0] == '>' || (link->protocol == 2 && link->subscribed && data[0] == '*');
    uint64_t position;
    const char *reason = vkp_resp_reader_get_error(link->reader, &position);
    if (status == VKP_ERR_NOMEM) {
        vkp_i_link_lose(link, "out of memory");
    } else if (vkp_i_reader_is_end_known(link->reader) && !push && oldest != NULL &&
               oldest->expect == VKP_I_EXPECT_REPLIES) {
        vkp_i_log(link->env, VKP_LOG_WARN, "%s: a reply is dropped: %s", link->config->address.ptr,
                  reason);
        memset(&link->skip, 0, sizeof link->skip);
        link->skipping = true;
    } else {
        vkp_i_log(link->env, VKP_LOG_ERROR, "%s: bad reply: %s", link->config->address.ptr, reason);
        vkp_i_link_fail(link, "the server broke the protocol", vkp_str_of(reason));
    }
}

/* Continue behind a reply that the reader refused. Returns its bytes, or 0: more are needed. */
static size_t vkp_i_link_skip(vkp_i_link *link, const uint8_t *data, size_t len)
{
    vkp_i_request *oldest = link->flight.first;
    if (!vkp_i_skip_frame(&link->skip, data, len)) {
        if (len > link->reader->config.max_frame_bytes) {
            vkp_i_link_lose(link, "a reply above max_frame_bytes");
        }
        return 0;
    }
    link->skipping = false;
    vkp_resp_reader_reset(link->reader);
    if (--oldest->due == 0) {
        (void)vkp_i_requests_pop(&link->flight);
        oldest->settle(oldest, VKP_ERR_LIMIT, NULL, NULL);
    }
    return link->skip.at;
}

/* Read as many whole values as arrived; the bytes of an incomplete one are delivered again. */
static size_t vkp_i_link_on_data(vkp_conn *conn, void *user, const vkp_bytes *in)
{
    vkp_i_link *link = (vkp_i_link *)user;
    size_t used = 0;
    uint64_t now_ns = link->loop->now_ns;
    link->ops->hold(link); /* a callback may give the last other reference back */
    while (link->conn == conn && used < in->len) {
        const vkp_value *value;
        size_t consumed;
        vkp_bytes frame;
        vkp_status status;
        if (link->skipping) {
            link->answered_ns = now_ns;
            consumed = vkp_i_link_skip(link, in->data + used, in->len - used);
            if (consumed == 0) {
                break;
            }
            used += consumed;
            continue;
        }
        status =
            vkp_resp_reader_scan(link->reader, in->data + used, in->len - used, &value, &consumed);
        if (status == VKP_ERR_EMPTY) {
            link->answered_ns = in->data[used] != '>' ? now_ns : link->answered_ns;
            break;
        }
        if (status != VKP_OK) {
            vkp_i_link_refuse(link, status, in->data + used);
            continue;
        }
        frame.data = in->data + used;
        frame.len = consumed;
        frame.block = in->block;
        used += consumed;
        vkp_i_link_value(link, value, &frame);
    }
    link->heard_ns = now_ns; /* not before: what is lost now was good until the bytes before */
    link->ops->release(link);
    return used;
}

/* Prepare a link that is all zero; env, loop, config, ops borrowed. */
static vkp_status vkp_i_link_init(vkp_i_link *link, const vkp_env *env, vkp_loop *loop,
                                  const vkp_client_config *config, const vkp_i_link_ops *ops)
{
    const vkp_sys *sys = vkp_i_sys(env);
    link->env = env;
    link->loop = loop;
    link->config = config;
    link->ops = ops;
    link->fence_task.fn = vkp_i_link_fence_task;
    vkp_i_requests_init(&link->flight);
    (void)snprintf(link->token, sizeof link->token, "vkp-fence-%016llx",
                   (unsigned long long)sys->random_u64());
    return vkp_resp_reader_open(&config->resp, &link->reader);
}

/* Free what the link has; it is closed and its flight is empty. */
static void vkp_i_link_deinit(vkp_i_link *link)
{
    vkp_resp_reader_unref(link->reader);
    vkp_i_block_unref(link->out);
    vkp_i_free(link->env, link->known, sizeof *link->known);
}

#endif /* VKP_I_IO */

#if VKP_I_IO
/* ======================================================================================
   >>impl-handshake   Logging in to a server
   ======================================================================================
   From the connect to VKP_I_STAGE_READY, on the loop's thread. The stages of a link, and what ends
   them; anything else that a server does ends the link, and the owner tries again:
     CONNECTING  connected: send HELLO 3 with AUTH and SETNAME: HELLO. With protocol 2: LOGIN.
     HELLO       the reply says proto 3 or 2: SETUP. Another reply, or an error of a server that
                 does not know HELLO, in whatever words: LOGIN. NOAUTH although a password was
                 sent: AUTH, then HELLO again, once. Another error of a server that does: the end.
     LOGIN       send AUTH, SETNAME and PING. AUTH is refused, or PING is answered NOAUTH: the end.
                 Another answer to PING: SETUP. Some users have no right to PING.
     SETUP       send SELECT and the commands of the config. All answered as expected: READY.
   Replies to CLIENT SETNAME and CLIENT SETINFO are ignored: they change nothing that matters. */

/* What one request of the handshake is. */
typedef enum vkp_i_step_kind {
    VKP_I_STEP_HELLO,
    VKP_I_STEP_AUTH,
    VKP_I_STEP_PING,   /* the last one of LOGIN */
    VKP_I_STEP_SELECT, /* must be answered by OK */
    VKP_I_STEP_SETUP,  /* must be answered as vkp_client_setup says */
    VKP_I_STEP_ROLE,   /* RESP2 with a role in the config: HELLO's map did not say it */
    VKP_I_STEP_IGNORED
} vkp_i_step_kind;

typedef struct vkp_i_step {
    vkp_i_request request;
    vkp_i_link *link;
    vkp_i_step_kind kind;
    size_t index; /* SETUP: of config->setup */
} vkp_i_step;

static void vkp_i_step_settled(vkp_i_request *request, vkp_status status, const vkp_value *value,
                               const vkp_bytes *frame);

/* Send one command of the handshake. False: not connected or no memory. */
static bool vkp_i_link_step(vkp_i_link *link, vkp_i_step_kind kind, size_t index, size_t argc,
                            const vkp_str *argv)
{
    vkp_i_step *step = (vkp_i_step *)vkp_i_alloc_zero(link->env, sizeof *step);
    if (step == NULL) {
        return false;
    }
    step->request.due = 1;
    step->request.settle = vkp_i_step_settled;
    step->link = link;
    step->kind = kind;
    step->index = index;
    if (vkp_i_request_put(&step->request, link->env, argc, argv) != VKP_OK ||
        !vkp_i_link_start(link, &step->request)) {
        vkp_bytes_unref(&step->request.bytes);
        vkp_i_free(link->env, step, sizeof *step);
        return false;
    }
    link->steps += kind != VKP_I_STEP_IGNORED ? 1u : 0u;
    return true;
}

/* Whether the reply is an error that passes by itself, or a refusal that another form of login
   would not change. */
static bool vkp_i_words_are_passing(vkp_str words)
{
    static const char *const starts[] = {"BUSY",        "LOADING",  "MASTERDOWN",
                                         "CLUSTERDOWN", "TRYAGAIN", "ERR max number of clients"};
    size_t i;
    for (i = 0; i < sizeof starts / sizeof starts[0]; i++) {
        if (vkp_i_starts_with(words, starts[i])) {
            return true;
        }
    }
    return false;
}

/* Whether an error to HELLO comes from a server that knows HELLO. */
static bool vkp_i_words_are_final(vkp_str words)
{
    return vkp_i_words_are_passing(words) || vkp_i_starts_with(words, "WRONGPASS") ||
           vkp_i_starts_with(words, "NOPERM") || vkp_i_starts_with(words, "DENIED");
}

/* Send HELLO 3. False: not connected or no memory. */
static bool vkp_i_link_hello(vkp_i_link *link, bool auth)
{
    vkp_str argv[8];
    size_t argc = 0;
    link->stage = VKP_I_STAGE_HELLO;
    link->protocol = 3;
    argv[argc++] = vkp_str_of("HELLO");
    argv[argc++] = vkp_str_of("3");
    if (auth && link->password.ptr != NULL) {
        argv[argc++] = vkp_str_of("AUTH");
        argv[argc++] = link->username.ptr != NULL ? link->username : vkp_str_of("default");
        argv[argc++] = link->password;
    }
    if (link->config->name.ptr != NULL) {
        argv[argc++] = vkp_str_of("SETNAME");
        argv[argc++] = link->config->name;
    }
    return vkp_i_link_step(link, VKP_I_STEP_HELLO, 0, argc, argv);
}

/* Send AUTH, if there is a password. False: not connected or no memory. */
static bool vkp_i_link_auth(vkp_i_link *link)
{
    vkp_str argv[3];
    size_t argc = 0;
    if (link->password.ptr == NULL) {
        return true;
    }
    argv[argc++] = vkp_str_of("AUTH");
    if (link->username.ptr != NULL) {
        argv[argc++] = link->username;
    }
    argv[argc++] = link->password;
    return vkp_i_link_step(link, VKP_I_STEP_AUTH, 0, argc, argv);
}

/* The login of RESP2. False: not connected or no memory. */
static bool vkp_i_link_login(vkp_i_link *link)
{
    vkp_str argv[3];
    link->stage = VKP_I_STAGE_LOGIN;
    link->protocol = 2;
    if (!vkp_i_link_auth(link)) {
        return false;
    }
    argv[0] = vkp_str_of("CLIENT");
    argv[1] = vkp_str_of("SETNAME");
    argv[2] = link->config->name;
    if (argv[2].ptr != NULL && !vkp_i_link_step(link, VKP_I_STEP_IGNORED, 0, 3, argv)) {
        return false;
    }
    argv[0] = vkp_str_of("PING");
    return vkp_i_link_step(link, VKP_I_STEP_PING, 0, 1, argv);
}

/* The commands of the config, after the login. False: not connected or no memory. */
static bool vkp_i_link_setup(vkp_i_link *link)
{
    const vkp_client_config *config = link->config;
    char digits[VKP_I_DIGITS];
    size_t from;
    vkp_str argv[2];
    size_t i;
    link->stage = VKP_I_STAGE_SETUP;
    if (config->role != VKP_CLIENT_ROLE_ANY && link->protocol == 2) {
        argv[0] = vkp_str_of("ROLE");
        if (!vkp_i_link_step(link, VKP_I_STEP_ROLE, 0, 1, argv)) {
            return false;
        }
    }
    if (config->database != 0) {
        from = vkp_i_format_u64(digits, config->database);
        argv[0] = vkp_str_of("SELECT");
        argv[1] = vkp_i_str(digits + from, VKP_I_DIGITS - from);
        if (!vkp_i_link_step(link, VKP_I_STEP_SELECT, 0, 2, argv)) {
            return false;
        }
    }
    for (i = 0; i < config->setup_count; i++) {
        const vkp_client_setup *setup = &config->setup[i];
        if (!vkp_i_link_step(link, VKP_I_STEP_SETUP, i, setup->argc, setup->argv)) {
            return false;
        }
    }
    return true;
}

#define VKP_I_SETINFO_MAJOR 7 /* CLIENT SETINFO exists from 7.2 on */
#define VKP_I_SETINFO_MINOR 2

/* Whether the version of HELLO's reply, "7.2.4", is at least 7.2. */
static bool vkp_i_has_setinfo(vkp_str version)
{
    unsigned parts[2] = {0, 0};
    size_t part = 0;
    size_t i;
    for (i = 0; i < version.len && part < 2; i++) {
        if (version.ptr[i] == '.') {
            part++;
        } else if (version.ptr[i] >= '0' && version.ptr[i] <= '9' && parts[part] < 10000) {
            parts[part] = parts[part] * 10 + (unsigned)(version.ptr[i] - '0');
        }
    }
    return parts[0] > VKP_I_SETINFO_MAJOR ||
           (parts[0] == VKP_I_SETINFO_MAJOR && parts[1] >= VKP_I_SETINFO_MINOR);
}

/* Send the server the library's name and version. False: not connected or no memory. */
static bool vkp_i_link_introduce(vkp_i_link *link)
{
    static const char *const infos[2][2] = {{"LIB-NAME", "valkey_push"},
                                            {"LIB-VER", VKP_VERSION_STR}};
    vkp_str argv[4];
    int i;
    for (i = 0; i < 2; i++) {
        argv[0] = vkp_str_of("CLIENT");
        argv[1] = vkp_str_of("SETINFO");
        argv[2] = vkp_str_of(infos[i][0]);
        argv[3] = vkp_str_of(infos[i][1]);
        if (!vkp_i_link_step(link, VKP_I_STEP_IGNORED, 0, 4, argv)) {
            return false;
        }
    }
    return true;
}

/* Whether the role is the wanted one; if not the link fails. */
static bool vkp_i_link_check_role(vkp_i_link *link, vkp_str role)
{
    bool primary = vkp_i_str_is(role, "master") || vkp_i_str_is(role, "primary");
    if (link->config->role == VKP_CLIENT_ROLE_PRIMARY && role.len > 0 && !primary) {
        vkp_i_link_fail(link, "not a primary but a", role);
        return false;
    }
    return true;
}

/* HELLO was answered with a map, or an array of keys and values. */
static void vkp_i_link_greeted(vkp_i_link *link, const vkp_value *value, const vkp_value *proto)
{
    const vkp_value *id = vkp_i_map_value(value, "id");
    link->id = id != NULL && id->type == VKP_RESP_INTEGER ? id->u.integer : 0;
    link->protocol = proto->u.integer == 2 ? 2 : 3;
    if (!vkp_i_link_check_role(link, vkp_value_get_str(vkp_i_map_value(value, "role")))) {
        return;
    }
    if ((vkp_i_has_setinfo(vkp_value_get_str(vkp_i_map_value(value, "version"))) &&
         !vkp_i_link_introduce(link)) ||
        !vkp_i_link_setup(link)) {
        vkp_i_link_lose(link, "out of memory");
    }
}

/* HELLO was answered. */
static void vkp_i_link_hello_reply(vkp_i_link *link, const vkp_value *value)
{
    const vkp_value *proto = vkp_i_map_value(value, "proto");
    vkp_str words = vkp_value_get_str(value);
    bool ok;
    if (proto != NULL && proto->type == VKP_RESP_INTEGER) {
        vkp_i_link_greeted(link, value, proto);
        return;
    }
    if (value->type == VKP_RESP_ERROR) {
        bool no_auth = vkp_i_starts_with(words, "NOAUTH");
        if (vkp_i_words_are_final(words) ||
            (no_auth && (link->password.ptr == NULL || link->authenticated))) {
            vkp_i_link_fail(link, "the server refused the handshake", words);
            return;
        }
        (void)snprintf(link->hello_words, sizeof link->hello_words, "%.*s",
                       (int)VKP_I_MIN(words.len, sizeof link->hello_words), words.ptr);
        if (no_auth) {
            link->authenticated = true;
            ok = vkp_i_link_auth(link) && vkp_i_link_hello(link, false);
            if (!ok) {
                vkp_i_link_lose(link, "out of memory");
            }
            return;
        }
    }
    if (!vkp_i_link_login(link)) {
        vkp_i_link_lose(link, "out of memory");
    }
}

/* Check the reply to a command of the config. */
static void vkp_i_link_setup_reply(vkp_i_link *link, const vkp_i_step *step, const vkp_value *value)
{
    static const vkp_client_setup select = {2, NULL, {"OK", 2}, false};
    const vkp_client_setup *setup =
        step->kind == VKP_I_STEP_SETUP ? &link->config->setup[step->index] : &select;
    vkp_str name = step->kind == VKP_I_STEP_SETUP ? setup->argv[0] : vkp_str_of("SELECT");
    char why[64];
    if (setup->optional ||
        (value->type != VKP_RESP_ERROR &&
         (setup->expect.ptr == NULL || vkp_value_is_text(value, setup->expect)))) {
        return;
    }
    (void)snprintf(why, sizeof why, "%.*s was answered", (int)VKP_I_MIN(name.len, (size_t)32),
                   name.ptr);
    vkp_i_link_fail(link, why,
                    value->type == VKP_RESP_ERROR || value->type == VKP_RESP_STRING
                        ? vkp_value_get_str(value)
                        : vkp_str_of("otherwise than expected"));
}

/* One step of the handshake is answered. */
static void vkp_i_link_step_reply(vkp_i_link *link, const vkp_i_step *step, const vkp_value *value)
{
    vkp_str words = vkp_value_get_str(value);
    bool failed = value->type == VKP_RESP_ERROR;
    switch (step->kind) {
    case VKP_I_STEP_HELLO:
        vkp_i_link_hello_reply(link, value);
        break;
    case VKP_I_STEP_AUTH:
        if (failed) {
            vkp_i_link_fail(link, "the server refused the password", words);
        }
        break;
    case VKP_I_STEP_PING:
        if (failed && vkp_i_starts_with(words, "NOAUTH")) {
            vkp_i_link_fail(link, "the server refused the handshake", words);
        } else if (!vkp_i_link_setup(link)) {
            vkp_i_link_lose(link, "out of memory");
        }
        break;
    case VKP_I_STEP_ROLE:
        if (!failed) {
            (void)vkp_i_link_check_role(link, vkp_value_get_str(vkp_value_get_first(value)));
        }
        break;
    case VKP_I_STEP_SELECT:
    case VKP_I_STEP_SETUP:
        vkp_i_link_setup_reply(link, step, value);
        break;
    case VKP_I_STEP_IGNORED:
        break;
    }
}

static void vkp_i_step_settled(vkp_i_request *request, vkp_status status, const vkp_value *value,
                               const vkp_bytes *frame)
{
    vkp_i_step *step = VKP_CONTAINER(request, vkp_i_step, request);
    vkp_i_link *link = step->link;
    vkp_conn *conn = link->conn;
    (void)frame;
    if (status == VKP_ERR_LIMIT && step->kind != VKP_I_STEP_IGNORED) {
        vkp_i_link_lose(link, "a reply over a limit in the handshake");
    } else if (status == VKP_OK) {
        link->steps -= step->kind != VKP_I_STEP_IGNORED ? 1u : 0u;
        vkp_i_link_step_reply(link, step, value);
        if (conn != NULL && link->conn == conn && link->stage == VKP_I_STAGE_SETUP &&
            link->steps == 0) {
            link->stage = VKP_I_STAGE_READY;
            link->ready_ns = link->loop->now_ns;
            link->failures = 0;
            link->ops->on_ready(link);
        }
    }
    vkp_bytes_unref(&step->request.bytes);
    vkp_i_free(link->env, step, sizeof *step);
}

/* The connection is established. False: not connected or no memory. */
static bool vkp_i_link_begin_handshake(vkp_i_link *link)
{
    return link->config->protocol == 2 ? vkp_i_link_login(link) : vkp_i_link_hello(link, true);
}

#endif /* VKP_I_IO */

#if VKP_I_IO
/* ======================================================================================
   >>impl-link-connect   The way of a link to its server
   ======================================================================================
   From an address text to a connection, on the loop's thread. A host name is looked up by the
   resolver of the config, in its thread; without a resolver the lookup blocks this thread. When a
   name server does not answer in time, the addresses of the last lookup of the same name serve.
   Each try begins with another address of the name: one that accepts connections and does not
   answer must not be the only one that is tried. Within a try each address gets a share of the time
   (see vkp_conn_config.connect_ms). */

#define VKP_I_LOOKUP_MS 1000u /* how long a lookup is waited for, where addresses are known */

/* Static text for a connection that failed or was lost. */
static const char *vkp_i_link_why(int error)
{
    return error == ECONNREFUSED || error == ENOENT ? "nobody accepts connections there"
           : error == ETIMEDOUT                     ? "nobody answers there"
                                                    : "the connection was lost";
}

static void vkp_i_link_on_open(vkp_conn *conn, void *user)
{
    vkp_i_link *link = (vkp_i_link *)user;
    link->connected = true;
    link->peer = *vkp_i_conn_get_address(conn);
    link->ops->hold(link);
    if (!vkp_i_link_begin_handshake(link)) {
        vkp_i_link_lose(link, "out of memory");
    }
    link->ops->release(link);
}

static void vkp_i_link_on_close(vkp_conn *conn, void *user, vkp_close_reason reason, int error)
{
    vkp_i_link *link = (vkp_i_link *)user;
    if (conn != link->conn) { /* vkp_i_link_close closed it */
        return;
    }
    if (reason == VKP_CLOSE_LOOP) {
        return; /* the owner closes with the loop */
    }
    vkp_i_log(link->env, VKP_LOG_INFO, "%s: %s%s%s", link->config->address.ptr,
              vkp_close_reason_str(reason), error != 0 ? ": " : "",
              error != 0 ? strerror(error) : "");
    link->ops->hold(link);
    vkp_i_link_fail(link, vkp_i_link_why(error), vkp_str_of(link->hello_words));
    link->ops->release(link);
}

static const vkp_conn_ops vkp_i_link_conn_ops = {
    vkp_i_link_on_open, vkp_i_link_on_data, NULL, NULL, vkp_i_link_on_close, NULL};

/* Begin to connect to one of the addresses, the first one chosen by the number of failed tries. */
static vkp_status vkp_i_link_dial(vkp_i_link *link, const vkp_address *addresses, size_t count)
{
    vkp_address turned[VKP_I_LOOKUP_ADDRESSES];
    vkp_conn_config config;
    size_t i;
    for (i = 0; i < count; i++) {
        turned[i] = addresses[(i + link->failures) % count];
    }
    memset(&config, 0, sizeof config);
    config.ops = &vkp_i_link_conn_ops;
    config.user = link;
    config.loop_only = true;
    config.input_bytes = VKP_I_BLOCK_MAX;
    config.connect_ms = link->config->connect_timeout_ms;
    config.keepalive_ms = link->config->keepalive_ms == VKP_OFF ? 0 : link->config->keepalive_ms;
    config.unacked_ms = link->config->unacked_ms == VKP_OFF ? 0 : link->config->unacked_ms;
    return vkp_i_conn_connect_to(link->loop, turned, count, &config, &link->conn);
}

/* Connect to the addresses of the last lookup; on failure the link is lost. */
static void vkp_i_link_dial_known(vkp_i_link *link)
{
    vkp_status status = vkp_i_link_dial(link, link->known->addresses, link->known->count);
    if (status != VKP_OK) {
        vkp_i_link_lose(link,
                        status == VKP_ERR_SYS ? vkp_i_link_why(errno) : vkp_status_str(status));
    }
}

/* Whether addresses of this name are known. */
static bool vkp_i_link_knows(const vkp_i_link *link, const vkp_i_parts *parts)
{
    return link->known != NULL && strcmp(link->known->parts.host, parts->host) == 0 &&
           strcmp(link->known->parts.port, parts->port) == 0;
}

/* The resolver has the outcome of the lookup. */
static void vkp_i_link_looked_up(vkp_i_lookup *lookup)
{
    vkp_i_link *link = (vkp_i_link *)lookup->user;
    bool known = vkp_i_link_knows(link, &lookup->parts);
    link->lookup = NULL;
    vkp_timer_stop(&link->lookup_timer);
    link->ops->hold(link);
    if (lookup->count > 0 && link->known == NULL) {
        link->known = (vkp_i_known *)vkp_i_alloc_zero(link->env, sizeof *link->known);
    }
    if (lookup->count > 0 && link->known != NULL) {
        link->known->parts = lookup->parts;
        link->known->count = lookup->count;
        memcpy(link->known->addresses, lookup->addresses, sizeof lookup->addresses);
        known = true;
    }
    if (known) {
        vkp_i_link_dial_known(link);
    } else {
        vkp_i_link_lose(link, lookup->count > 0 ? "out of memory" : "the host name was not found");
    }
    link->ops->release(link);
}

/* The lookup takes too long: use what is known. The lookup goes on, nobody waits for it. */
static void vkp_i_link_lookup_late(vkp_timer *timer)
{
    vkp_i_link *link = VKP_CONTAINER(timer, vkp_i_link, lookup_timer);
    link->ops->hold(link);
    vkp_i_link_end_lookup(link);
    vkp_i_link_dial_known(link);
    link->ops->release(link);
}

/* Ask the resolver for the addresses of the name. */
static vkp_status vkp_i_link_look_up(vkp_i_link *link, const vkp_i_parts *parts)
{
    link->lookup =
        vkp_i_resolver_ask(link->config->resolver, link->loop, parts, vkp_i_link_looked_up, link);
    if (link->lookup == NULL) {
        return VKP_ERR_NOMEM;
    }
    if (vkp_i_link_knows(link, parts)) {
        uint64_t deadline_ns = vkp_i_after_ms(vkp_i_loop_now(link->loop), VKP_I_LOOKUP_MS);
        return vkp_timer_start(&link->lookup_timer, link->loop, vkp_i_link_lookup_late, 0,
                               deadline_ns);
    }
    return VKP_OK;
}

/* Prepare a try to connect with these credentials (borrowed until on_down). */
static void vkp_i_link_begin(vkp_i_link *link, vkp_str username, vkp_str password)
{
    link->username = username;
    link->password = password;
    link->stage = VKP_I_STAGE_CONNECTING;
    link->steps = 0;
    link->connected = false;
    link->spoke = false;
    link->authenticated = false;
    link->subscribed = false;
    link->id = 0;
    link->hello_words[0] = '\0';
    link->heard_ns = vkp_i_loop_now(link->loop);
    link->answered_ns = link->heard_ns;
}

/* Begin to connect to the address of another link. On failure the link is down, and on_down is not
   called. */
static vkp_status vkp_i_link_connect_to(vkp_i_link *link, const vkp_address *address,
                                        vkp_str username, vkp_str password)
{
    vkp_i_link_begin(link, username, password);
    return vkp_i_link_dial(link, address, 1);
}

/* Begin to connect to the address. On failure the link is down, and on_down is not called. */
static vkp_status vkp_i_link_connect(vkp_i_link *link, vkp_str address, vkp_str username,
                                     vkp_str password)
{
    vkp_address addresses[VKP_I_LOOKUP_ADDRESSES];
    vkp_i_parts parts;
    size_t count = 0;
    vkp_status status = vkp_i_split_address(link->env, address, &parts);
    vkp_i_link_begin(link, username, password);
    if (status == VKP_OK && link->config->resolver != NULL && parts.name.text == NULL &&
        !vkp_i_is_numeric_host(parts.host)) {
        return vkp_i_link_look_up(link, &parts);
    }
    if (status == VKP_OK) {
        status = vkp_i_parse_address(link->env, address, addresses, VKP_I_LOOKUP_ADDRESSES, &count);
    }
    return status == VKP_OK ? vkp_i_link_dial(link, addresses, count) : status;
}

#endif /* VKP_I_IO */

#if VKP_I_IO
/* ======================================================================================
   >>impl-client   A client: what any thread submits
   ======================================================================================
   Any thread appends asks to `submitted` under the mutex and queues the client's task. The task
   runs on the loop's thread: commands go to the link, which writes them and finds their replies;
   calls of subscribe and unsubscribe go to the subscription table (impl-client-subscriptions).
   The mutex guards `submitted`, `queued_bytes`, `accepting`, `ended`, `task_queued`,
   `close_wanted`, `error`, and the links between asks and one-shots; every other field belongs to
   the loop's thread. Under the mutex only the loop's lock-free queue and a one-shot are used.
   Callbacks run on the loop's thread without the mutex, and any callback may close the client:
   code behind a callback checks `closed`.                                                     */

typedef enum vkp_i_ask_kind {
    VKP_I_ASK_COMMAND, /* commands of the program */
    VKP_I_ASK_WANT,    /* vkp_client_subscribe: never written, adds to an interest's `wanted` */
    VKP_I_ASK_LEAVE    /* vkp_client_unsubscribe: never written, takes from `wanted` */
} vkp_i_ask_kind;

/* What the program asked of the client. */
typedef struct vkp_i_ask {
    vkp_i_request request; /* its bytes are the commands to write; for WANT and LEAVE the name */
    vkp_client *client;    /* no reference */
    vkp_i_ask_kind kind;
    size_t cost;           /* bytes counted in client->queued_bytes, or 0 */
    vkp_oneshot *slot;     /* receives the reply, or NULL; guarded by the mutex */
    vkp_reply_fn on_reply; /* called with the last reply, or NULL */
    vkp_subscribe_fn done; /* called with the outcome of a WANT, or NULL */
    void *user;            /* argument of on_reply and of done */
    vkp_sub_kind sub;      /* kind of the name, for WANT and LEAVE */
    vkp_status outcome;    /* of a WANT in client->reporting */
} vkp_i_ask;

typedef struct vkp_i_probe vkp_i_probe; /* see impl-client-liveness */

struct vkp_reply {
    const vkp_env *env;
    size_t refs;       /* atomic */
    size_t bytes;      /* size of this allocation */
    vkp_bytes frame;   /* the raw bytes: a copy in this allocation, or shares the read block */
    vkp_value *values; /* the tree, behind the struct */
};

struct vkp_client {
    const vkp_env *env;
    vkp_loop *loop;           /* shared */
    vkp_client_config config; /* its texts and setup commands are copies */
    size_t refs;    /* atomic: one per handle, per one-shot, of the open loop, of the queued task */
    size_t users;   /* atomic: handles of the program; giving the last one back closes */
    uint32_t state; /* atomic: vkp_client_state */
    uint32_t protocol; /* atomic: the link's protocol: 2 or 3; 0 before the first handshake */
    VKP_I_MUTEX mutex; /* guards the fields from `submitted` to `error`, and ask->slot */
    vkp_i_requests submitted; /* asks that the loop has not taken; guarded by the mutex */
    size_t queued_bytes;      /* cost of all incomplete commands; guarded by the mutex */
    bool accepting;           /* commands are accepted (CONNECTING, READY); guarded by the mutex */
    bool ended;               /* closed: every ask gets CLOSED; guarded by the mutex */
    bool task_queued;         /* `task` is queued on the loop; guarded by the mutex */
    bool close_wanted;        /* `task` closes the client; guarded by the mutex */
    char error[VKP_I_LINK_ERROR_BYTES]; /* for vkp_client_get_error; guarded by the mutex */

    bool closed;              /* vkp_i_client_close_now ran */
    bool begun;               /* the first try to connect has begun */
    bool ready;               /* the link is ready: requests are written */
    bool was_ready;           /* a handshake succeeded before: the next event is RECONNECTED */
    bool failure_reported;    /* CONNECT_FAILED was emitted since the client was ready */
    bool beat_sent;           /* a heartbeat waits for its reply */
    bool counts_refused;      /* the server does not answer CLIENT INFO */
    vkp_i_probe *probe;       /* asks whether the server is alive; NULL: none is under way */
    uint64_t heartbeat_ns;    /* time of the next heartbeat */
    uint64_t patient_ns;      /* when a probe ended last */
    vkp_i_task task;          /* works on `submitted`; queued by any thread */
    vkp_i_attached attached;  /* calls vkp_i_client_loop_closed */
    vkp_i_link link;          /* the connection */
    vkp_client_target target; /* copies: where the link connects to, and as whom */
    vkp_i_requests taken;     /* asks taken from `submitted`, not started */
    vkp_i_requests failed;    /* requests that failed and are not settled yet */
    vkp_i_requests reporting; /* WANTs whose outcome is known and not reported yet */
    bool is_reporting;        /* vkp_i_waiters_report runs */
    vkp_i_map interests[VKP_SUB_KINDS]; /* by vkp_sub_kind, then by name */
    size_t held;                        /* number of interests that are HELD */
    size_t held_of[VKP_SUB_KINDS];      /* the same, by kind */
    size_t stuck;                       /* number of interests that are STUCK */
    size_t subs_in_flight;              /* SUBSCRIBEs and UNSUBSCRIBEs without an answer */
    uint64_t changes;                   /* of states of interests */
    size_t resuming;                    /* number of interests with a gap whose answer is due */
    uint64_t audited_ns;                /* when the server's counts last agreed with the table */
    uint64_t missed; /* pushes without room in config.pushes since the last LAGGED */
    uint32_t tries;  /* attempts to connect since the bound of the wait started again */
    vkp_timer timer; /* CONNECTING: the time limit; WAITING: the next try; READY: the watch */
    vkp_client_stats stats; /* each field atomic */
};

/* Free the copies of the setup commands, the first `count` of them. */
static void vkp_i_setup_free(const vkp_env *env, vkp_client_setup *setup, size_t count, size_t all)
{
    size_t i;
    size_t j;
    for (i = 0; i < count; i++) {
        vkp_str *argv;
        memcpy(&argv, &setup[i].argv, sizeof argv); /* the copies are not const */
        for (j = 0; j < setup[i].argc; j++) {
            vkp_i_free_str(env, argv[j]);
        }
        vkp_i_free(env, argv, setup[i].argc * sizeof *argv);
        vkp_i_free_str(env, setup[i].expect);
    }
    vkp_i_free(env, setup, all * sizeof *setup);
}

static void vkp_i_target_free(const vkp_env *env, vkp_client_target *target)
{
    vkp_i_free_str(env, target->address);
    vkp_i_free_str(env, target->username);
    vkp_i_free_str(env, target->password);
    memset(target, 0, sizeof *target);
}

static void vkp_i_client_free(vkp_client *client)
{
    vkp_loop *loop = client->loop;
    const vkp_env *env = client->env;
    vkp_client_setup *setup;
    int kind;
    for (kind = 0; kind < VKP_SUB_KINDS; kind++) {
        vkp_i_map_deinit(&client->interests[kind]);
    }
    vkp_i_link_deinit(&client->link);
    vkp_mpsc_tx_unref(client->config.pushes);
    vkp_resolver_unref(client->config.resolver);
    VKP_I_MUTEX_DEINIT(&client->mutex);
    vkp_i_free_str(env, client->config.address);
    vkp_i_free_str(env, client->config.username);
    vkp_i_free_str(env, client->config.password);
    vkp_i_free_str(env, client->config.name);
    vkp_i_target_free(env, &client->target);
    memcpy(&setup, &client->config.setup, sizeof setup); /* the copies are not const */
    vkp_i_setup_free(env, setup, client->config.setup_count, client->config.setup_count);
    vkp_i_free(env, client, sizeof *client);
    vkp_loop_unref(loop);
}

/* Give one of `refs` back; the last one frees the client. */
static void vkp_i_client_release(vkp_client *client)
{
    if (VKP_I_UNREF(&client->refs) == 1) {
        vkp_i_client_free(client);
    }
}

VKP_API vkp_client_state vkp_client_get_state(const vkp_client *client)
{
    return (vkp_client_state)VKP_I_LOAD_ACQ(&client->state);
}

/* ---- replies ---- */

#define VKP_I_REPLY_COPY 4096u /* a frame up to this size is copied: it must not pin its block */

/* A reply with its own copy of the tree; a large frame shares its block. NULL: no memory. */
static vkp_reply *vkp_i_reply_new(const vkp_env *env, const vkp_value *value,
                                  const vkp_bytes *frame)
{
    bool copy = frame->len <= VKP_I_REPLY_COPY;
    size_t bytes = sizeof(vkp_reply) + value->span * sizeof(vkp_value) + (copy ? frame->len : 0);
    vkp_reply *reply = (vkp_reply *)vkp_i_alloc(env, bytes);
    size_t i;
    if (reply == NULL) {
        return NULL;
    }
    reply->env = env;
    reply->refs = 1;
    reply->bytes = bytes;
    reply->values = (vkp_value *)(void *)(reply + 1);
    memcpy(reply->values, value, value->span * sizeof *value);
    reply->values[0].attributes = 0; /* the attribute precedes the root: not copied */
    if (!copy) {
        reply->frame = vkp_bytes_ref(frame);
        return reply;
    }
    reply->frame = vkp_bytes_static(reply->values + value->span, frame->len);
    memcpy(reply->values + value->span, frame->data, frame->len);
    for (i = 0; i < value->span; i++) {
        vkp_value *each = &reply->values[i];
        if (each->type == VKP_RESP_STRING || each->type == VKP_RESP_ERROR ||
            each->type == VKP_RESP_BIGNUM || each->type == VKP_RESP_DOUBLE) {
            size_t offset = (size_t)((const uint8_t *)each->u.str - frame->data);
            each->u.str = (const char *)reply->frame.data + offset;
        }
    }
    return reply;
}

VKP_API const vkp_value *vkp_reply_get_value(const vkp_reply *reply)
{
    return reply->values;
}

VKP_API vkp_bytes vkp_reply_get_frame(const vkp_reply *reply)
{
    return reply->frame;
}

VKP_API vkp_reply *vkp_reply_ref(vkp_reply *reply)
{
    (void)VKP_I_ADD(&reply->refs, 1);
    return reply;
}

VKP_API void vkp_reply_unref(vkp_reply *reply)
{
    if (reply != NULL && VKP_I_UNREF(&reply->refs) == 1) {
        vkp_bytes_unref(&reply->frame);
        vkp_i_free(reply->env, reply, reply->bytes);
    }
}

static void vkp_i_drop_reply(void *user, void *item)
{
    (void)user;
    vkp_reply_unref(*(vkp_reply **)item);
}

/* Count one more of a counter of vkp_client_stats. */
#define VKP_I_COUNT(client, counter) ((void)VKP_I_ADD(&(client)->stats.counter, (uint64_t)1))

/* ---- asks ---- */

static void vkp_i_ask_settled(vkp_i_request *request, vkp_status status, const vkp_value *value,
                              const vkp_bytes *frame);

static vkp_i_ask *vkp_i_ask_new(vkp_client *client, vkp_i_ask_kind kind)
{
    vkp_i_ask *ask = (vkp_i_ask *)vkp_i_alloc_zero(client->env, sizeof *ask);
    if (ask != NULL) {
        ask->request.due = 1;
        ask->request.settle = vkp_i_ask_settled;
        ask->client = client;
        ask->kind = kind;
    }
    return ask;
}

static void vkp_i_ask_free(vkp_i_ask *ask)
{
    vkp_bytes_unref(&ask->request.bytes);
    vkp_i_free(ask->client->env, ask, sizeof *ask);
}

/* Hand the reply to the one-shot of the ask, or end the one-shot when there is none. */
static void vkp_i_ask_answer_slot(vkp_i_ask *ask, vkp_reply *reply)
{
    vkp_client *client = ask->client;
    vkp_oneshot *slot;
    bool ended = false;
    VKP_I_LOCK(&client->mutex);
    slot = ask->slot;
    ask->slot = NULL;
    if (slot != NULL) {
        slot->i_owner = NULL; /* before the send: its receiver may free the slot */
        if (reply == NULL) {
            ended =
                vkp_i_oneshot_finish(slot, VKP_I_LOAD_ACQ(&slot->i_state), VKP_I_SLOT_ABANDONED);
        } else if (vkp_oneshot_send(slot, (const void *)&reply) == VKP_OK) {
            reply = NULL;
            ended = true;
        }
    }
    VKP_I_UNLOCK(&client->mutex);
    vkp_reply_unref(reply);
    if (ended) {
        vkp_i_client_release(client); /* the one-shot's reference; the caller holds another */
    }
}

/* Report the outcome of a WANT, and free it. words are the server's, or the reason. */
static void vkp_i_ask_report(vkp_i_ask *ask, vkp_status status, vkp_str words)
{
    if (ask->done != NULL) {
        ask->done(ask->user, status, words);
    }
    vkp_i_ask_free(ask);
}

/* The end of an ask: answer its callback or its one-shot, and free it. */
static void vkp_i_ask_settled(vkp_i_request *request, vkp_status status, const vkp_value *value,
                              const vkp_bytes *frame)
{
    vkp_i_ask *ask = VKP_CONTAINER(request, vkp_i_ask, request);
    vkp_client *client = ask->client;
    if (ask->cost > 0) { /* before the callbacks: they may submit again */
        VKP_I_LOCK(&client->mutex);
        client->queued_bytes -= ask->cost;
        VKP_I_UNLOCK(&client->mutex);
    }
    if (ask->kind != VKP_I_ASK_COMMAND) {
        vkp_i_ask_report(ask, status, vkp_str_of(client->link.error));
        return;
    }
    if (ask->on_reply != NULL) {
        ask->on_reply(ask->user, status, value, frame);
    } else {
        vkp_i_ask_answer_slot(ask,
                              status == VKP_OK ? vkp_i_reply_new(client->env, value, frame) : NULL);
    }
    vkp_i_ask_free(ask);
}

/* The receiver closed its one-shot: unlink it from the ask. A one-shot holds a reference of
   the client until it is detached or has its value.                                           */
static void vkp_i_ask_detach(vkp_oneshot *slot)
{
    vkp_client *client = (vkp_client *)slot->i_user;
    VKP_I_LOCK(&client->mutex);
    if (slot->i_owner != NULL) {
        ((vkp_i_ask *)slot->i_owner)->slot = NULL;
        slot->i_owner = NULL;
    }
    VKP_I_UNLOCK(&client->mutex);
    vkp_i_client_release(client);
}

/* ---- submitting, from any thread ---- */

/* Queue the client's task, unless it is queued. The mutex is held. */
static void vkp_i_client_schedule(vkp_client *client)
{
    if (!client->task_queued) {
        client->task_queued = true;
        (void)VKP_I_ADD(&client->refs, 1);
        if (!vkp_i_loop_queue(client->loop, &client->task)) {
            client->task_queued = false;
            (void)VKP_I_SUB(&client->refs, 1); /* not the last: the caller holds one */
        }
    }
}

/* Append an ask to `submitted`. On failure (CLOSED, DISCONNECTED, FULL) it stays the
   caller's.                                                                                   */
static vkp_status vkp_i_client_submit(vkp_client *client, vkp_i_ask *ask)
{
    bool interest = ask->kind != VKP_I_ASK_COMMAND;
    vkp_status status = VKP_OK;
    VKP_I_LOCK(&client->mutex);
    if (client->ended) {
        status = VKP_ERR_CLOSED;
    } else if (!interest && !client->accepting) {
        status = VKP_ERR_DISCONNECTED;
    } else if (client->queued_bytes > 0 &&
               ask->cost > client->config.queue_bytes -
                               VKP_I_MIN(client->queued_bytes, client->config.queue_bytes)) {
        status = VKP_ERR_FULL;
    } else {
        client->queued_bytes += ask->cost;
        vkp_i_requests_append(&client->submitted, &ask->request);
        vkp_i_client_schedule(client);
    }
    VKP_I_UNLOCK(&client->mutex);
    return status;
}

/* Submit an ask, or free it on failure. */
static vkp_status vkp_i_client_submit_or_free(vkp_client *client, vkp_i_ask *ask)
{
    vkp_status status = vkp_i_client_submit(client, ask);
    if (status != VKP_OK) {
        vkp_i_ask_free(ask);
    }
    return status;
}

VKP_API vkp_status vkp_client_send(vkp_client *client, const vkp_bytes *commands, uint32_t replies,
                                   vkp_reply_fn on_reply, void *user)
{
    vkp_i_ask *ask;
    VKP_I_REQUIRE(client != NULL && commands != NULL && commands->len > 0 && replies > 0);
    VKP_I_REQUIRE(on_reply != NULL);
    ask = vkp_i_ask_new(client, VKP_I_ASK_COMMAND);
    if (ask == NULL) {
        return VKP_ERR_NOMEM;
    }
    ask->request.due = replies;
    ask->on_reply = on_reply;
    ask->user = user;
    ask->request.bytes = vkp_bytes_ref(commands);
    ask->cost = sizeof *ask + commands->len;
    return vkp_i_client_submit_or_free(client, ask);
}

/* Whether the command would change the connection that all users of the client share. */
static bool vkp_i_command_breaks_sharing(size_t argc, const vkp_str *argv)
{
    static const char *const names[] = {
        "SUBSCRIBE", "PSUBSCRIBE", "SSUBSCRIBE", "UNSUBSCRIBE", "PUNSUBSCRIBE", "SUNSUBSCRIBE",
        "HELLO",     "AUTH",       "RESET",      "QUIT",        "MONITOR",      "MULTI",
        "EXEC",      "DISCARD",    "WATCH",      "SELECT",      "SYNC",         "PSYNC"};
    size_t i;
    for (i = 0; i < sizeof names / sizeof names[0]; i++) {
        if (vkp_i_str_is(argv[0], names[i])) {
            return true;
        }
    }
    return argc > 1 && vkp_i_str_is(argv[0], "CLIENT") && vkp_i_str_is(argv[1], "REPLY");
}

/* Submit one command whose reply the one-shot receives. */
static vkp_status vkp_i_client_ask(vkp_client *client, vkp_oneshot *slot, size_t argc,
                                   const vkp_str *argv)
{
    vkp_i_ask *ask;
    vkp_status status;
    if (vkp_i_command_breaks_sharing(argc, argv)) {
        return VKP_ERR_REFUSED;
    }
    ask = vkp_i_ask_new(client, VKP_I_ASK_COMMAND);
    if (ask == NULL) {
        return VKP_ERR_NOMEM;
    }
    status = vkp_i_request_put(&ask->request, client->env, argc, argv);
    if (status != VKP_OK) {
        vkp_i_free(client->env, ask, sizeof *ask);
        return status;
    }
    ask->cost = sizeof *ask + ask->request.bytes.len;
    ask->slot = slot;
    slot->i_owner = ask;
    slot->i_detach = vkp_i_ask_detach;
    /* Given back when the one-shot is detached or the request completes. */
    (void)VKP_I_ADD(&client->refs, 1);
    status = vkp_i_client_submit_or_free(client, ask);
    if (status != VKP_OK) {
        slot->i_owner = NULL;
        slot->i_detach = NULL;
        (void)VKP_I_UNREF(&client->refs); /* the caller's own reference remains */
    }
    return status;
}

VKP_API vkp_status vkp_client_command_argv(vkp_client *client, vkp_oneshot *slot, size_t argc,
                                           const vkp_str *argv)
{
    vkp_status status;
    VKP_I_REQUIRE(client != NULL && slot != NULL && argc > 0 && argv != NULL);
    status = vkp_oneshot_init(slot, client->env, sizeof(vkp_reply *), vkp_i_drop_reply, client);
    if (status == VKP_OK) {
        status = vkp_i_client_ask(client, slot, argc, argv);
    }
    if (status != VKP_OK) {
        vkp_oneshot_abandon(slot); /* a receiver that waits on it gets CLOSED */
    }
    return status;
}

#define VKP_I_COMMAND_ARGS 64 /* most arguments of vkp_client_command */

VKP_API vkp_status vkp_client_command(vkp_client *client, vkp_oneshot *slot, ...)
{
    vkp_str argv[VKP_I_COMMAND_ARGS];
    size_t argc = 0;
    const char *text;
    va_list arguments;
    va_start(arguments, slot);
    while ((text = va_arg(arguments, const char *)) != NULL && argc < VKP_I_COMMAND_ARGS) {
        argv[argc++] = vkp_str_of(text);
    }
    va_end(arguments);
    return text != NULL ? VKP_ERR_LIMIT : vkp_client_command_argv(client, slot, argc, argv);
}

/* Submit a WANT or a LEAVE of a name. */
static vkp_status vkp_i_client_interest(vkp_client *client, vkp_i_ask_kind kind, vkp_sub_kind sub,
                                        vkp_str name, vkp_subscribe_fn done, void *user)
{
    vkp_i_ask *ask;
    vkp_status status;
    VKP_I_REQUIRE(client != NULL && (unsigned)sub < VKP_SUB_KINDS &&
                  (name.ptr != NULL || name.len == 0));
    ask = vkp_i_ask_new(client, kind);
    if (ask == NULL) {
        return VKP_ERR_NOMEM;
    }
    status = vkp_bytes_copy(client->env, name.ptr, name.len, &ask->request.bytes);
    if (status != VKP_OK) {
        vkp_i_free(client->env, ask, sizeof *ask);
        return status;
    }
    ask->sub = sub;
    ask->done = done;
    ask->user = user;
    return vkp_i_client_submit_or_free(client, ask);
}

VKP_API vkp_status vkp_client_subscribe(vkp_client *client, vkp_sub_kind kind, vkp_str name)
{
    return vkp_i_client_interest(client, VKP_I_ASK_WANT, kind, name, NULL, NULL);
}

VKP_API vkp_status vkp_client_subscribe_then(vkp_client *client, vkp_sub_kind kind, vkp_str name,
                                             vkp_subscribe_fn done, void *user)
{
    VKP_I_REQUIRE(done != NULL);
    return vkp_i_client_interest(client, VKP_I_ASK_WANT, kind, name, done, user);
}

VKP_API vkp_status vkp_client_unsubscribe(vkp_client *client, vkp_sub_kind kind, vkp_str name)
{
    return vkp_i_client_interest(client, VKP_I_ASK_LEAVE, kind, name, NULL, NULL);
}

#endif /* VKP_I_IO */

#if VKP_I_IO
/* ======================================================================================
   >>impl-client-subscriptions   The subscription table of a client
   ======================================================================================
   Each name that the program wants, or that the client still has to leave, is one interest in ONE
   state. vkp_i_interest_step is the only place that changes it, by the table vkp_i_sub_rules:

   state     what it means                                     how it goes on
   GONE      not wanted, and nothing is on the wire for it     freed once no request refers to it
   WANTED    not asked yet: the link is not ready              asked when it is
   ASKED     SUBSCRIBE is on the wire                          the server confirms or refuses
   HELD      the server confirmed: messages arrive             until it is left, lost or taken away
   REFUSED   the server refused: its timer runs                asked again when the timer ends
   LEAVING   UNSUBSCRIBE is on the wire                        the fence behind it confirms
   STUCK     the server refused UNSUBSCRIBE: its timer runs    left again when the timer ends

   An answer counts for the state only if it answers the newest command of the name: a program may
   leave and want again before the first answer. Only the last interest that leaves ends a name.
   Messages of a HELD name may be missing when the link goes down, when the server takes the name
   away, or when an audit finds that it is not there. gap_ns is then the last moment at which the
   name was known to be good. It stays until a GAP reports it: that is when every name with a gap
   that was asked for has its answer, and it covers those that are back.
   Everything runs on the loop's thread.                                                       */

typedef enum vkp_i_sub_state {
    VKP_I_SUB_GONE = 0,
    VKP_I_SUB_WANTED,
    VKP_I_SUB_ASKED,
    VKP_I_SUB_HELD,
    VKP_I_SUB_REFUSED,
    VKP_I_SUB_LEAVING,
    VKP_I_SUB_STUCK
} vkp_i_sub_state;
#define VKP_I_SUB_STATES 7

typedef enum vkp_i_sub_event {
    VKP_I_EVENT_WANT = 0,  /* a vkp_client_subscribe */
    VKP_I_EVENT_LEAVE,     /* the vkp_client_unsubscribe that takes the last one back */
    VKP_I_EVENT_READY,     /* the link is ready */
    VKP_I_EVENT_CONFIRMED, /* the newest command, a SUBSCRIBE, is confirmed */
    VKP_I_EVENT_REFUSED,   /* ... is refused */
    VKP_I_EVENT_LEFT,      /* the newest command, an UNSUBSCRIBE, is done */
    VKP_I_EVENT_STUCK,     /* ... is refused */
    VKP_I_EVENT_TAKEN,     /* the server ended the subscription, unasked */
    VKP_I_EVENT_MISSING,   /* an audit found that the server may not have it */
    VKP_I_EVENT_RETRY,     /* the timer of a refusal ended */
    VKP_I_EVENT_DOWN       /* the link is down */
} vkp_i_sub_event;
#define VKP_I_SUB_EVENTS 11

/* The actions of a rule, done in this order, after the state has changed. */
#define VKP_I_DO_CALM 1u  /* stop the timer of the refusal, and forget the refusal */
#define VKP_I_DO_GAP 2u   /* messages may be missing: gap_ns */
#define VKP_I_DO_WAIT 4u  /* start the timer of the refusal */
#define VKP_I_DO_ASK 8u   /* send SUBSCRIBE; without a ready link the state is WANTED instead */
#define VKP_I_DO_PART 16u /* send UNSUBSCRIBE */

typedef struct vkp_i_sub_rule {
    uint8_t next;    /* a vkp_i_sub_state */
    uint8_t actions; /* VKP_I_DO_* bits */
} vkp_i_sub_rule;

#define VKP_I_STAY(state)    \
    {                        \
        VKP_I_SUB_##state, 0 \
    }
#define VKP_I_GO(state, actions)              \
    {                                         \
        VKP_I_SUB_##state, (uint8_t)(actions) \
    }

/* By state and event: WANT, LEAVE, READY, CONFIRMED, REFUSED, LEFT, STUCK, TAKEN, MISSING, RETRY,
   DOWN.                                                                                       */
static const vkp_i_sub_rule vkp_i_sub_rules[VKP_I_SUB_STATES][VKP_I_SUB_EVENTS] = {
    /* GONE */
    {VKP_I_GO(ASKED, VKP_I_DO_ASK), VKP_I_STAY(GONE), VKP_I_STAY(GONE), VKP_I_STAY(GONE),
     VKP_I_STAY(GONE), VKP_I_STAY(GONE), VKP_I_STAY(GONE), VKP_I_STAY(GONE), VKP_I_STAY(GONE),
     VKP_I_STAY(GONE), VKP_I_STAY(GONE)},
    /* WANTED */
    {VKP_I_STAY(WANTED), VKP_I_GO(GONE, 0), VKP_I_GO(ASKED, VKP_I_DO_ASK), VKP_I_STAY(WANTED),
     VKP_I_STAY(WANTED), VKP_I_STAY(WANTED), VKP_I_STAY(WANTED), VKP_I_STAY(WANTED),
     VKP_I_STAY(WANTED), VKP_I_STAY(WANTED), VKP_I_STAY(WANTED)},
    /* ASKED */
    {VKP_I_STAY(ASKED), VKP_I_GO(LEAVING, VKP_I_DO_PART), VKP_I_STAY(ASKED),
     VKP_I_GO(HELD, VKP_I_DO_CALM), VKP_I_GO(REFUSED, VKP_I_DO_WAIT), VKP_I_STAY(ASKED),
     VKP_I_STAY(ASKED), VKP_I_STAY(ASKED), VKP_I_STAY(ASKED), VKP_I_STAY(ASKED),
     VKP_I_GO(WANTED, VKP_I_DO_CALM)},
    /* HELD */
    {VKP_I_STAY(HELD), VKP_I_GO(LEAVING, VKP_I_DO_PART), VKP_I_STAY(HELD), VKP_I_STAY(HELD),
     VKP_I_STAY(HELD), VKP_I_STAY(HELD), VKP_I_STAY(HELD),
     VKP_I_GO(ASKED, VKP_I_DO_GAP | VKP_I_DO_ASK), VKP_I_GO(ASKED, VKP_I_DO_GAP | VKP_I_DO_ASK),
     VKP_I_STAY(HELD), VKP_I_GO(WANTED, VKP_I_DO_GAP)},
    /* REFUSED */
    {VKP_I_GO(ASKED, VKP_I_DO_ASK), VKP_I_GO(GONE, VKP_I_DO_CALM), VKP_I_STAY(REFUSED),
     VKP_I_STAY(REFUSED), VKP_I_STAY(REFUSED), VKP_I_STAY(REFUSED), VKP_I_STAY(REFUSED),
     VKP_I_STAY(REFUSED), VKP_I_STAY(REFUSED), VKP_I_GO(ASKED, VKP_I_DO_ASK),
     VKP_I_GO(WANTED, VKP_I_DO_CALM)},
    /* LEAVING */
    {VKP_I_GO(ASKED, VKP_I_DO_ASK), VKP_I_STAY(LEAVING), VKP_I_STAY(LEAVING), VKP_I_STAY(LEAVING),
     VKP_I_STAY(LEAVING), VKP_I_GO(GONE, VKP_I_DO_CALM), VKP_I_GO(STUCK, VKP_I_DO_WAIT),
     VKP_I_STAY(LEAVING), VKP_I_STAY(LEAVING), VKP_I_STAY(LEAVING), VKP_I_GO(GONE, VKP_I_DO_CALM)},
    /* STUCK */
    {VKP_I_GO(ASKED, VKP_I_DO_CALM | VKP_I_DO_ASK), VKP_I_STAY(STUCK), VKP_I_STAY(STUCK),
     VKP_I_STAY(STUCK), VKP_I_STAY(STUCK), VKP_I_STAY(STUCK), VKP_I_STAY(STUCK),
     VKP_I_GO(GONE, VKP_I_DO_CALM), VKP_I_STAY(STUCK), VKP_I_GO(LEAVING, VKP_I_DO_PART),
     VKP_I_GO(GONE, VKP_I_DO_CALM)}};

typedef struct vkp_i_interest vkp_i_interest;

/* What a name has only while the server refuses it. */
typedef struct vkp_i_refusal {
    vkp_timer timer; /* ends the wait */
    vkp_i_interest *interest;
    uint32_t tries; /* refusals since the last confirmation */
    bool passing;   /* the server's words promise an end: see vkp_i_words_are_passing */
    uint64_t words; /* hash of the words of the last event REFUSED; 0: none */
} vkp_i_refusal;

/* A name, which is behind the struct. */
struct vkp_i_interest {
    vkp_i_map_node node; /* in client->interests; its key is the name */
    vkp_client *client;
    vkp_sub_kind kind;
    vkp_i_sub_state state;
    size_t wanted;    /* calls of vkp_client_subscribe minus those of vkp_client_unsubscribe */
    size_t in_flight; /* commands on the wire for it, and callers of vkp_i_interest_hold */
    struct vkp_i_sub_request *newest; /* the newest command in flight; NULL: none */
    vkp_i_refusal *refusal;           /* NULL: the server did not refuse it */
    uint64_t gap_ns;                  /* messages may be missing from then on; 0: none are */
    bool resuming;                    /* counted in client->resuming */
    vkp_i_requests waiters;           /* WANTs that wait until the name can be asked for */
};

/* One SUBSCRIBE or UNSUBSCRIBE on the wire. */
typedef struct vkp_i_sub_request {
    vkp_i_request request; /* expects NAMES or LEAVES */
    vkp_client *client;
    vkp_i_interest *interest;
    bool reported;          /* UNSUBSCRIBE: the server's push was emitted */
    vkp_i_requests waiters; /* SUBSCRIBE: WANTs that wait for this answer */
} vkp_i_sub_request;

/* ---- events ---- */

/* Give a push or an event to on_push or to the channel config.pushes. A push without room counts
   in `missed`; a LAGGED event precedes the next push that has room.                           */
static void vkp_i_client_emit(vkp_client *client, const vkp_push *push)
{
    vkp_push item;
    if (client->config.on_push != NULL) {
        client->config.on_push(client->config.user, push);
        return;
    }
    if (client->config.pushes == NULL) {
        return;
    }
    if (client->missed > 0) {
        memset(&item, 0, sizeof item);
        item.kind = VKP_PUSH_LAGGED;
        item.missed = client->missed;
        if (vkp_mpsc_try_send(client->config.pushes, &item) == VKP_OK) {
            client->missed = 0;
        }
    }
    item = *push;
    item.frame = vkp_bytes_ref(&push->frame);
    if (client->missed > 0 || vkp_mpsc_try_send(client->config.pushes, &item) != VKP_OK) {
        client->missed++;
        vkp_bytes_unref(&item.frame);
    }
}

/* Emit an event of the client. text may be of any life: the event has a copy. Without memory for
   the copy the event goes without its text. */
static void vkp_i_client_event(vkp_client *client, vkp_push_kind kind, vkp_str text)
{
    vkp_push push;
    memset(&push, 0, sizeof push);
    push.kind = kind;
    push.payload = text;
    if (text.len > 0 && !vkp_i_push_own_texts(client->env, &push)) {
        push.payload = vkp_str_of("out of memory");
    }
    vkp_i_client_emit(client, &push);
    vkp_bytes_unref(&push.frame);
}

/* Emit an event about one name. No memory: the link fails, and the next connection begins anew. */
static void vkp_i_interest_event(vkp_i_interest *interest, vkp_push_kind kind, vkp_str text)
{
    vkp_client *client = interest->client;
    vkp_push push;
    memset(&push, 0, sizeof push);
    push.kind = kind;
    push.sub = interest->kind;
    push.channel = interest->node.key;
    push.payload = text;
    if (!vkp_i_push_own_texts(client->env, &push)) {
        vkp_i_link_lose(&client->link, "out of memory");
        return;
    }
    vkp_i_client_emit(client, &push);
    vkp_bytes_unref(&push.frame);
}

/* ---- interests ---- */

static vkp_i_interest *vkp_i_interest_find(vkp_client *client, vkp_sub_kind kind, vkp_str name)
{
    vkp_i_map *map = &client->interests[kind];
    vkp_i_map_node *node =
        map->count > 0 ? vkp_i_map_find(map, vkp_i_map_hash(map, name), name) : NULL;
    return node != NULL ? VKP_CONTAINER(node, vkp_i_interest, node) : NULL;
}

static vkp_i_interest *vkp_i_interest_new(vkp_client *client, vkp_sub_kind kind, vkp_str name)
{
    vkp_i_map *map = &client->interests[kind];
    vkp_i_interest *interest =
        (vkp_i_interest *)vkp_i_alloc_zero(client->env, sizeof *interest + name.len);
    if (interest == NULL) {
        return NULL;
    }
    if (name.len > 0) {
        memcpy(interest + 1, name.ptr, name.len);
    }
    interest->client = client;
    interest->kind = kind;
    interest->node.key = vkp_i_str(interest + 1, name.len);
    interest->node.hash = vkp_i_map_hash(map, name);
    vkp_i_requests_init(&interest->waiters);
    if (!vkp_i_map_insert(map, &interest->node)) {
        vkp_i_free(client->env, interest, sizeof *interest + name.len);
        return NULL;
    }
    return interest;
}

/* Stop counting the interest among those whose answer a GAP waits for. */
static void vkp_i_interest_end_resuming(vkp_i_interest *interest)
{
    if (interest->resuming) {
        interest->resuming = false;
        interest->client->resuming--;
    }
}

/* Free an interest that is GONE and that no request refers to. */
static void vkp_i_interest_free_unused(vkp_i_interest *interest)
{
    vkp_client *client = interest->client;
    if (interest->state == VKP_I_SUB_GONE && interest->in_flight == 0) {
        vkp_i_interest_end_resuming(interest);
        vkp_i_map_remove(&client->interests[interest->kind], &interest->node);
        vkp_i_free(client->env, interest, sizeof *interest + interest->node.key.len);
    }
}

/* Keep an interest while callbacks run. */
static void vkp_i_interest_hold(vkp_i_interest *interest)
{
    interest->in_flight++;
}

static void vkp_i_interest_release(vkp_i_interest *interest)
{
    interest->in_flight--;
    vkp_i_interest_free_unused(interest);
}

/* ---- refusals ---- */

#define VKP_I_PASSING_MIN_MS 100u   /* first wait where the server's words promise an end */
#define VKP_I_PASSING_MAX_MS 5000u  /* longest wait there */
#define VKP_I_LASTING_MIN_MS 1000u  /* first wait after other words */
#define VKP_I_LASTING_MAX_MS 30000u /* longest wait there */

static void vkp_i_interest_calm(vkp_i_interest *interest)
{
    if (interest->refusal != NULL) {
        vkp_timer_stop(&interest->refusal->timer);
        vkp_i_free(interest->client->env, interest->refusal, sizeof *interest->refusal);
        interest->refusal = NULL;
    }
}

static void vkp_i_interest_on_timer(vkp_timer *timer);

/* The refusal of the interest, made if there is none. NULL: no memory. */
static vkp_i_refusal *vkp_i_interest_refusal(vkp_i_interest *interest)
{
    if (interest->refusal == NULL) {
        interest->refusal =
            (vkp_i_refusal *)vkp_i_alloc_zero(interest->client->env, sizeof *interest->refusal);
    }
    if (interest->refusal != NULL) {
        interest->refusal->interest = interest;
    }
    return interest->refusal;
}

/* Start the wait for the next try: at least half of a bound that doubles. False: no memory. */
static bool vkp_i_interest_wait(vkp_i_interest *interest)
{
    vkp_client *client = interest->client;
    vkp_i_refusal *refusal = interest->refusal;
    uint64_t bound = refusal->passing ? VKP_I_PASSING_MIN_MS : VKP_I_LASTING_MIN_MS;
    uint64_t most = refusal->passing ? VKP_I_PASSING_MAX_MS : VKP_I_LASTING_MAX_MS;
    uint32_t i;
    for (i = 0; i < refusal->tries && bound < most; i++) {
        bound *= 2;
    }
    bound = VKP_I_MIN(bound, most);
    refusal->tries++;
    bound -= vkp_i_sys(client->env)->random_u64() % (bound / 2 + 1);
    return vkp_timer_start(&refusal->timer, client->loop, vkp_i_interest_on_timer, 0,
                           vkp_i_after_ms(vkp_i_loop_now(client->loop), bound)) == VKP_OK;
}

/* ---- asking and leaving ---- */

static bool vkp_i_sub_accept(vkp_i_request *request, const vkp_push *push);
static void vkp_i_sub_settled(vkp_i_request *request, vkp_status status, const vkp_value *value,
                              const vkp_bytes *frame);

/* Send SUBSCRIBE or UNSUBSCRIBE. False: not connected or no memory. */
static bool vkp_i_interest_send(vkp_i_interest *interest, bool subscribe)
{
    static const char *const verbs[2][VKP_SUB_KINDS] = {
        {"UNSUBSCRIBE", "PUNSUBSCRIBE", "SUNSUBSCRIBE"}, {"SUBSCRIBE", "PSUBSCRIBE", "SSUBSCRIBE"}};
    vkp_client *client = interest->client;
    vkp_i_sub_request *self = (vkp_i_sub_request *)vkp_i_alloc_zero(client->env, sizeof *self);
    vkp_str argv[2];
    if (self == NULL) {
        return false;
    }
    self->request.expect = subscribe ? VKP_I_EXPECT_NAMES : VKP_I_EXPECT_LEAVES;
    self->request.due = 1;
    self->request.accept = vkp_i_sub_accept;
    self->request.settle = vkp_i_sub_settled;
    self->client = client;
    self->interest = interest;
    vkp_i_requests_init(&self->waiters);
    argv[0] = vkp_str_of(verbs[subscribe ? 1 : 0][interest->kind]);
    argv[1] = interest->node.key;
    if (vkp_i_request_put(&self->request, client->env, 2, argv) != VKP_OK ||
        !vkp_i_link_start(&client->link, &self->request)) {
        vkp_bytes_unref(&self->request.bytes);
        vkp_i_free(client->env, self, sizeof *self);
        return false;
    }
    interest->newest = self;
    interest->in_flight++;
    client->subs_in_flight++;
    client->changes++;
    vkp_i_requests_move(&interest->waiters, &self->waiters);
    return true;
}

/* Messages may be missing from the last moment at which the connection was known to be good. */
static void vkp_i_interest_open_gap(vkp_i_interest *interest, uint64_t from_ns)
{
    if (interest->gap_ns == 0) {
        interest->gap_ns = VKP_I_MAX(from_ns, (uint64_t)1);
    }
}

/* Change the state, and keep the client's numbers in step. */
static void vkp_i_interest_set_state(vkp_i_interest *interest, vkp_i_sub_state state)
{
    vkp_client *client = interest->client;
    size_t held = state == VKP_I_SUB_HELD ? 1 : 0;
    size_t stuck = state == VKP_I_SUB_STUCK ? 1 : 0;
    held -= interest->state == VKP_I_SUB_HELD ? 1u : 0u; /* wraps around: so does the sum */
    stuck -= interest->state == VKP_I_SUB_STUCK ? 1u : 0u;
    client->changes += interest->state != state ? 1u : 0u;
    client->held += held;
    client->held_of[interest->kind] += held;
    client->stuck += stuck;
    client->link.subscribed = client->held > 0;
    interest->state = state;
}

/* An event happened to the name: change its state, and do what the rule says. False: no memory to
   do it; the caller lets the link fail, and the next connection begins anew. */
static bool vkp_i_interest_step(vkp_i_interest *interest, vkp_i_sub_event event)
{
    vkp_client *client = interest->client;
    vkp_i_sub_rule rule = vkp_i_sub_rules[interest->state][event];
    bool ok = true;
    vkp_i_interest_set_state(interest, (vkp_i_sub_state)rule.next);
    if ((rule.actions & VKP_I_DO_CALM) != 0) {
        vkp_i_interest_calm(interest);
    }
    if ((rule.actions & VKP_I_DO_GAP) != 0) {
        vkp_i_interest_open_gap(interest, event == VKP_I_EVENT_MISSING ? client->audited_ns
                                                                       : client->link.heard_ns);
    }
    if ((rule.actions & VKP_I_DO_WAIT) != 0) {
        ok = vkp_i_interest_wait(interest);
    }
    if ((rule.actions & VKP_I_DO_ASK) != 0) {
        if (!client->ready) {
            vkp_i_interest_set_state(interest, VKP_I_SUB_WANTED);
        } else {
            ok = vkp_i_interest_send(interest, true);
            if (interest->gap_ns != 0 && !interest->resuming) {
                interest->resuming = true;
                client->resuming++;
            }
        }
    }
    if ((rule.actions & VKP_I_DO_PART) != 0) {
        interest->gap_ns = 0;
        vkp_i_interest_end_resuming(interest);
        ok = vkp_i_interest_send(interest, false);
    }
    return ok;
}

/* The same, and the link fails where there is no memory. */
static void vkp_i_interest_take_step(vkp_i_interest *interest, vkp_i_sub_event event)
{
    vkp_client *client = interest->client;
    if (!vkp_i_interest_step(interest, event)) {
        vkp_i_link_lose(&client->link, "out of memory");
    }
}

/* ---- gaps ---- */

static uint64_t vkp_i_wall_ms(const vkp_client *client, uint64_t then_ns)
{
    uint64_t ago_ns = vkp_i_loop_now(client->loop) - then_ns;
    uint64_t wall_ns = vkp_i_sys(client->env)->wall_ns();
    return (wall_ns - VKP_I_MIN(ago_ns, wall_ns)) / VKP_I_NS_PER_MS;
}

/* Fill the gap and the names behind it from the interests that are back; clears their gap_ns. With
   gap NULL nothing is changed: returns how many are back, and the bytes of their names.       */
static size_t vkp_i_client_collect_gap(vkp_client *client, vkp_gap *gap, vkp_sub_name *names,
                                       char *texts, size_t *bytes)
{
    size_t count = 0;
    int kind;
    *bytes = 0;
    for (kind = 0; kind < VKP_SUB_KINDS; kind++) {
        vkp_i_map_node *node = NULL;
        while ((node = vkp_i_map_get_next(&client->interests[kind], node)) != NULL) {
            vkp_i_interest *interest = VKP_CONTAINER(node, vkp_i_interest, node);
            if (interest->gap_ns == 0 || interest->state != VKP_I_SUB_HELD) {
                continue;
            }
            if (gap != NULL) {
                gap->from_ns = VKP_I_MIN(gap->from_ns, interest->gap_ns);
                interest->gap_ns = 0;
            }
            if (names != NULL) {
                names[count].kind = interest->kind;
                names[count].name = vkp_i_put_copy(&texts, node->key);
            }
            *bytes += node->key.len;
            count++;
        }
    }
    return count;
}

/* Every name with a gap that was asked for has its answer: report the gap of those now back. */
static void vkp_i_client_emit_gap(vkp_client *client)
{
    vkp_push push;
    vkp_gap *gap;
    vkp_sub_name *names = NULL;
    size_t bytes;
    size_t count = vkp_i_client_collect_gap(client, NULL, NULL, NULL, &bytes);
    bool all = count == client->held;
    if (count == 0) {
        return;
    }
    memset(&push, 0, sizeof push);
    push.kind = VKP_PUSH_GAP;
    push.frame.block =
        vkp_i_block_open(client->env, sizeof *gap + (all ? 0 : count * sizeof *names + bytes));
    if (push.frame.block == NULL) {
        vkp_i_link_lose(&client->link, "out of memory"); /* the next connection reports it */
        return;
    }
    gap = (vkp_gap *)(void *)vkp_i_block_data(push.frame.block);
    memset(gap, 0, sizeof *gap);
    gap->from_ns = VKP_FOREVER;
    gap->to_ns = vkp_i_loop_now(client->loop);
    if (!all) {
        names = (vkp_sub_name *)(void *)(gap + 1);
        gap->names = names;
        gap->name_count = count;
    }
    (void)vkp_i_client_collect_gap(client, gap, names, all ? NULL : (char *)(names + count),
                                   &bytes);
    gap->from_unix_ms = vkp_i_wall_ms(client, gap->from_ns);
    gap->to_unix_ms = vkp_i_wall_ms(client, gap->to_ns);
    push.gap = gap;
    VKP_I_COUNT(client, gaps);
    vkp_i_client_emit(client, &push);
    vkp_bytes_unref(&push.frame);
}

/* The name has its answer. The last one of those that a GAP waits for reports it. */
static void vkp_i_interest_resumed(vkp_i_interest *interest)
{
    vkp_client *client = interest->client;
    if (interest->resuming) {
        vkp_i_interest_end_resuming(interest);
        if (client->resuming == 0) {
            vkp_i_client_emit_gap(client);
        }
    }
}

/* ---- answers ---- */

/* The server confirmed the name of a request, by this push. */
static bool vkp_i_sub_accept(vkp_i_request *request, const vkp_push *push)
{
    vkp_i_sub_request *self = VKP_CONTAINER(request, vkp_i_sub_request, request);
    vkp_i_interest *interest = self->interest;
    vkp_client *client = self->client;
    if (push->sub != interest->kind || !vkp_i_str_equal(push->channel, interest->node.key)) {
        return false;
    }
    if (push->kind == VKP_PUSH_SUBSCRIBED && interest->newest == self) {
        interest->newest = NULL;
        (void)!vkp_i_interest_step(interest, VKP_I_EVENT_CONFIRMED); /* needs no memory */
    }
    self->reported = true;
    vkp_i_client_emit(client, push);
    if (push->kind == VKP_PUSH_SUBSCRIBED && !client->closed && client->ready) {
        vkp_i_interest_resumed(interest);
    }
    return true;
}

/* Note the outcome of all WANTs of the list, for vkp_i_waiters_report. */
static void vkp_i_waiters_note(vkp_client *client, vkp_i_requests *waiters, vkp_status status)
{
    vkp_i_request *request;
    for (request = waiters->first; request != NULL; request = request->next) {
        VKP_CONTAINER(request, vkp_i_ask, request)->outcome = status;
    }
    vkp_i_requests_move(waiters, &client->reporting);
}

/* Report the outcome of all WANTs of the list. A callback may close the client: the close reports
   those that are left before it returns. */
static void vkp_i_waiters_report(vkp_client *client, vkp_i_requests *waiters, vkp_status status,
                                 vkp_str words)
{
    vkp_i_request *request;
    vkp_i_waiters_note(client, waiters, status);
    if (client->is_reporting) {
        return; /* inside a callback of the call that goes on */
    }
    client->is_reporting = true;
    while ((request = vkp_i_requests_pop(&client->reporting)) != NULL) {
        vkp_i_ask *ask = VKP_CONTAINER(request, vkp_i_ask, request);
        vkp_i_ask_report(ask, ask->outcome,
                         ask->outcome == status ? words : vkp_str_of(client->link.error));
    }
    client->is_reporting = false;
}

/* The server refused to subscribe. The event reports it once, and again when the words change. */
static void vkp_i_interest_refused(vkp_i_interest *interest, vkp_str words)
{
    vkp_client *client = interest->client;
    vkp_i_refusal *refusal = vkp_i_interest_refusal(interest);
    uint64_t hash = vkp_i_map_hash(&client->interests[interest->kind], words) | 1u;
    bool report = refusal != NULL && refusal->words != hash;
    if (refusal != NULL) {
        refusal->passing = vkp_i_words_are_passing(words);
        refusal->words = hash;
    }
    if (refusal == NULL || !vkp_i_interest_step(interest, VKP_I_EVENT_REFUSED)) {
        vkp_i_link_lose(&client->link, "out of memory");
        return;
    }
    VKP_I_COUNT(client, refusals);
    if (report) {
        vkp_i_log(client->env, VKP_LOG_WARN, "%s: %.*s is refused: %.*s",
                  client->config.address.ptr, VKP_FMT(interest->node.key), VKP_FMT(words));
        vkp_i_interest_event(interest, VKP_PUSH_REFUSED, words);
    }
    if (!client->closed && client->ready) {
        vkp_i_interest_resumed(interest);
    }
}

/* The server refused to unsubscribe: messages of the name still arrive. */
static void vkp_i_interest_stuck(vkp_i_interest *interest)
{
    vkp_client *client = interest->client;
    vkp_i_refusal *refusal = vkp_i_interest_refusal(interest);
    if (refusal != NULL) {
        refusal->passing = true;
    }
    if (refusal == NULL || !vkp_i_interest_step(interest, VKP_I_EVENT_STUCK)) {
        vkp_i_link_lose(&client->link, "out of memory");
    }
}

/* The name is unsubscribed. reported: the server's push was emitted; if not, the event is ours. */
static void vkp_i_interest_left(vkp_i_interest *interest, bool reported)
{
    (void)!vkp_i_interest_step(interest, VKP_I_EVENT_LEFT); /* needs no memory */
    if (!reported) {
        vkp_i_interest_event(interest, VKP_PUSH_UNSUBSCRIBED, vkp_i_str(NULL, 0));
    }
}

/* A SUBSCRIBE or UNSUBSCRIBE is out of flight. */
static void vkp_i_sub_settled(vkp_i_request *request, vkp_status status, const vkp_value *value,
                              const vkp_bytes *frame)
{
    vkp_i_sub_request *self = VKP_CONTAINER(request, vkp_i_sub_request, request);
    vkp_i_interest *interest = self->interest;
    vkp_client *client = self->client;
    bool newest = interest->newest == self;
    vkp_str words = value != NULL ? vkp_value_get_str(value) : vkp_str_of(client->link.error);
    (void)frame;
    client->subs_in_flight--;
    vkp_i_waiters_note(client, &self->waiters, status); /* a callback may close the client */
    if (newest) {
        interest->newest = NULL;
    }
    if (newest && request->expect == VKP_I_EXPECT_NAMES && status == VKP_ERR_REFUSED) {
        vkp_i_interest_refused(interest, words);
    } else if (newest && status == VKP_ERR_REFUSED) {
        vkp_i_interest_stuck(interest);
    } else if (newest && status == VKP_OK) {
        vkp_i_interest_left(interest, self->reported);
    }
    vkp_i_interest_release(interest);
    vkp_i_waiters_report(client, &self->waiters, status, words);
    vkp_bytes_unref(&self->request.bytes);
    vkp_i_free(client->env, self, sizeof *self);
}

/* The timer of a refusal ended. */
static void vkp_i_interest_on_timer(vkp_timer *timer)
{
    vkp_i_refusal *refusal = VKP_CONTAINER(timer, vkp_i_refusal, timer);
    vkp_client *client = refusal->interest->client;
    (void)VKP_I_ADD(&client->refs, 1);
    vkp_i_interest_take_step(refusal->interest, VKP_I_EVENT_RETRY);
    vkp_i_client_release(client);
}

/* The server ended a subscription that nobody asked it to end: it no longer serves the slot. */
static void vkp_i_client_taken(vkp_client *client, const vkp_push *push)
{
    vkp_i_interest *interest = vkp_i_interest_find(client, push->sub, push->channel);
    bool held = interest != NULL && interest->state == VKP_I_SUB_HELD;
    if (interest == NULL) {
        vkp_i_client_emit(client, push);
        return;
    }
    vkp_i_interest_hold(interest);
    if (held) {
        VKP_I_COUNT(client, losses);
        vkp_i_interest_event(interest, VKP_PUSH_LOST,
                             vkp_str_of("the server ended the subscription"));
    }
    if (!client->closed && client->ready) {
        vkp_i_interest_take_step(interest, VKP_I_EVENT_TAKEN);
    }
    vkp_i_interest_release(interest);
}

/* ---- what the program asks ---- */

/* Carry out a WANT: add one to the interest's `wanted`, and report the outcome now, or when the
   server has answered. False: no memory for the name; the ask stays the caller's. */
static bool vkp_i_client_want(vkp_client *client, vkp_i_ask *ask)
{
    vkp_str name = vkp_i_str(ask->request.bytes.data, ask->request.bytes.len);
    vkp_i_interest *interest = vkp_i_interest_find(client, ask->sub, name);
    if (interest == NULL) {
        interest = vkp_i_interest_new(client, ask->sub, name);
    }
    if (interest == NULL) {
        return false;
    }
    interest->wanted++;
    vkp_i_requests_append(&interest->waiters, &ask->request);
    vkp_i_interest_hold(interest);
    if (!vkp_i_interest_step(interest, VKP_I_EVENT_WANT)) {
        vkp_i_link_lose(&client->link, "out of memory");
    } else if (interest->state == VKP_I_SUB_HELD) {
        vkp_i_waiters_report(client, &interest->waiters, VKP_OK, vkp_i_str(NULL, 0));
    } else if (interest->newest != NULL) {
        vkp_i_requests_move(&interest->waiters, &interest->newest->waiters);
    } else if (vkp_client_get_state(client) != VKP_CLIENT_CONNECTING) {
        vkp_i_waiters_report(client, &interest->waiters, VKP_ERR_DISCONNECTED,
                             vkp_str_of(client->link.error));
    }
    vkp_i_interest_release(interest);
    return true;
}

/* Carry out a LEAVE: take one from the interest's `wanted`. */
static void vkp_i_client_leave(vkp_client *client, vkp_i_ask *ask)
{
    vkp_str name = vkp_i_str(ask->request.bytes.data, ask->request.bytes.len);
    vkp_i_interest *interest = vkp_i_interest_find(client, ask->sub, name);
    bool resumed;
    vkp_i_ask_free(ask);
    if (interest == NULL || interest->wanted == 0 || --interest->wanted > 0) {
        return;
    }
    vkp_i_interest_hold(interest);
    resumed = interest->resuming;
    vkp_i_interest_take_step(interest, VKP_I_EVENT_LEAVE);
    vkp_i_waiters_report(client, &interest->waiters, VKP_ERR_DISCONNECTED,
                         vkp_str_of(client->link.error));
    if (resumed && !client->closed && client->ready && client->resuming == 0) {
        vkp_i_client_emit_gap(client); /* it waited for the answer to this name */
    }
    vkp_i_interest_release(interest);
}

/* ---- the link's life ---- */

/* Ask for every wanted name on a new connection. */
static void vkp_i_client_resubscribe(vkp_client *client)
{
    int kind;
    for (kind = 0; kind < VKP_SUB_KINDS; kind++) {
        vkp_i_map_node *node = NULL;
        while ((node = vkp_i_map_get_next(&client->interests[kind], node)) != NULL) {
            if (!vkp_i_interest_step(VKP_CONTAINER(node, vkp_i_interest, node),
                                     VKP_I_EVENT_READY)) {
                vkp_i_link_lose(&client->link, "out of memory");
                return;
            }
        }
    }
}

/* The link is down: wanted names stay. WANTs that wait are moved to `failed`. */
static void vkp_i_client_suspend(vkp_client *client)
{
    int kind;
    for (kind = 0; kind < VKP_SUB_KINDS; kind++) {
        vkp_i_map_node *node = vkp_i_map_get_next(&client->interests[kind], NULL);
        while (node != NULL) {
            vkp_i_interest *interest = VKP_CONTAINER(node, vkp_i_interest, node);
            node = vkp_i_map_get_next(&client->interests[kind], node);
            interest->newest = NULL;
            vkp_i_interest_end_resuming(interest);
            vkp_i_requests_move(&interest->waiters, &client->failed);
            (void)!vkp_i_interest_step(interest, VKP_I_EVENT_DOWN); /* needs no memory */
            vkp_i_interest_free_unused(interest);
        }
    }
}

/* The client is closed: no name is wanted. */
static void vkp_i_client_forget(vkp_client *client)
{
    int kind;
    for (kind = 0; kind < VKP_SUB_KINDS; kind++) {
        vkp_i_map_node *node = vkp_i_map_get_next(&client->interests[kind], NULL);
        while (node != NULL) {
            vkp_i_interest *interest = VKP_CONTAINER(node, vkp_i_interest, node);
            node = vkp_i_map_get_next(&client->interests[kind], node);
            interest->wanted = 0;
            (void)!vkp_i_interest_step(interest, VKP_I_EVENT_LEAVE);
            vkp_i_interest_free_unused(interest);
        }
    }
}

#endif /* VKP_I_IO */

#if VKP_I_IO
/* ======================================================================================
   >>impl-client-liveness   Whether the connection still does what it should
   ======================================================================================
   Two questions, on the loop's thread, while a link is ready:
   Is what is due answered? A server answers in order, so the oldest request in flight decides. When
   it has been due for reply_timeout_ms without any progress, a probe asks over a connection of its
   own, to the same address. What the probe finds, and what follows:
     DEAD     nobody accepts connections                         the link is lost
     BUSY     an error such as BUSY, LOADING, too many clients   the wait goes on
     MUTE     it accepts connections and answers nothing         the wait goes on, up to
     BLOCKED  it lists our connection as blocked                 blocked_timeout_ms
     STALLED  it answers the probe, and owes us nothing          the link is lost
   Does the server have the subscriptions that the table says? With each heartbeat the client asks
   for the server's own counts (an audit). Counts that are too low are repaired: each name of the
   kind is asked for again, and a GAP covers them from the last audit that agreed. Counts that are
   too high end the link: nobody can say which name it is.                                      */

typedef enum vkp_i_verdict {
    VKP_I_PROBE_DEAD,
    VKP_I_PROBE_BUSY,
    VKP_I_PROBE_MUTE,
    VKP_I_PROBE_BLOCKED,
    VKP_I_PROBE_STALLED
} vkp_i_verdict;

/* One question to the server over a connection of its own. */
struct vkp_i_probe {
    vkp_i_link link;
    vkp_client *client;       /* one reference */
    vkp_client_config config; /* of link: the client's, without name, database, setup and role */
    size_t refs;              /* of the client's pointer, and of vkp_i_link_ops.hold */
    uint64_t begun_ns;        /* on the loop's clock */
    vkp_timer timer;          /* ends the wait for an answer */
    vkp_i_request ask;        /* PING, then CLIENT LIST */
    bool listing;             /* CLIENT LIST was sent */
};

/* ---- the probe ---- */

static vkp_i_probe *vkp_i_probe_of(vkp_i_link *link)
{
    return VKP_CONTAINER(link, vkp_i_probe, link);
}

static void vkp_i_probe_hold(vkp_i_link *link)
{
    vkp_i_probe_of(link)->refs++;
}

static void vkp_i_probe_release(vkp_i_link *link)
{
    vkp_i_probe *probe = vkp_i_probe_of(link);
    vkp_client *client = probe->client;
    if (--probe->refs == 0) {
        vkp_i_link_deinit(&probe->link);
        vkp_i_free(client->env, probe, sizeof *probe);
        vkp_i_client_release(client);
    }
}

/* End the probe of the client, if one runs. */
static void vkp_i_client_end_probe(vkp_client *client)
{
    vkp_i_probe *probe = client->probe;
    vkp_i_request *request;
    if (probe != NULL) {
        client->probe = NULL;
        vkp_timer_stop(&probe->timer);
        vkp_i_link_close(&probe->link);
        while ((request = vkp_i_requests_pop(&probe->link.flight)) != NULL) {
            request->settle(request, VKP_ERR_CLOSED, NULL, NULL);
        }
        vkp_i_probe_release(&probe->link);
    }
}

/* When the oldest request in flight became the one that is due; 0: nothing is. */
static uint64_t vkp_i_client_due_since(const vkp_client *client)
{
    const vkp_i_request *oldest = client->link.flight.first;
    return oldest == NULL ? 0 : VKP_I_MAX(oldest->sent_ns, client->link.answered_ns);
}

/* When the oldest request in flight is overdue. */
static uint64_t vkp_i_client_overdue_ns(const vkp_client *client)
{
    uint64_t since_ns = vkp_i_client_due_since(client);
    return since_ns == 0 ? VKP_FOREVER
                         : vkp_i_after_ms(VKP_I_MAX(since_ns, client->patient_ns),
                                          client->config.reply_timeout_ms);
}

/* When the watch has to look again. */
static uint64_t vkp_i_client_watch_ns(const vkp_client *client)
{
    uint64_t overdue_ns = client->probe != NULL ? VKP_FOREVER : vkp_i_client_overdue_ns(client);
    return VKP_I_MIN(client->heartbeat_ns, overdue_ns);
}

/* Start the client's timer, which has its callback already, for the next look of the watch. */
static void vkp_i_client_start_watch(vkp_client *client)
{
    if (vkp_timer_start(&client->timer, client->loop, client->timer.i_fn, 0,
                        vkp_i_client_watch_ns(client)) != VKP_OK) {
        vkp_i_log(client->env, VKP_LOG_ERROR, "out of memory: the client's timer did not start");
    }
}

/* The probe has its answer: do what follows from it. The caller holds the probe. */
static void vkp_i_probe_end(vkp_i_probe *probe, vkp_i_verdict verdict)
{
    vkp_client *client = probe->client;
    uint64_t now_ns = vkp_i_loop_now(client->loop);
    uint64_t due_ns = vkp_i_client_due_since(client);
    uint64_t blocked_ms = client->config.blocked_timeout_ms;
    bool answered = due_ns == 0 || client->link.answered_ns >= probe->begun_ns;
    if (client->probe != probe) {
        return; /* it has ended */
    }
    vkp_i_client_end_probe(client);
    client->patient_ns = now_ns; /* the next probe comes after another reply_timeout_ms */
    if (!client->ready) {
        return;
    }
    switch (answered ? VKP_I_PROBE_BUSY : verdict) {
    case VKP_I_PROBE_DEAD:
        vkp_i_link_lose(&client->link, "the server does not answer");
        break;
    case VKP_I_PROBE_STALLED:
        vkp_i_link_lose(&client->link, "the server answers others, and not this connection");
        break;
    case VKP_I_PROBE_MUTE:
    case VKP_I_PROBE_BLOCKED:
        if (now_ns >= vkp_i_after_ms(due_ns, blocked_ms)) {
            vkp_i_link_lose(&client->link, verdict == VKP_I_PROBE_MUTE
                                               ? "the server does not answer"
                                               : "the server keeps this connection blocked");
        }
        break;
    case VKP_I_PROBE_BUSY:
        break;
    }
    if (client->ready) {
        vkp_i_client_start_watch(client);
    }
}

/* Send the probe's next question. */
static void vkp_i_probe_ask(vkp_i_probe *probe, size_t argc, const vkp_str *argv)
{
    probe->ask.due = 1;
    if (vkp_i_request_put(&probe->ask, probe->client->env, argc, argv) != VKP_OK ||
        !vkp_i_link_start(&probe->link, &probe->ask)) {
        vkp_bytes_unref(&probe->ask.bytes);
        vkp_i_probe_end(probe, VKP_I_PROBE_BUSY); /* no memory: says nothing about the server */
    }
}

/* The value of a field in a line of CLIENT LIST or CLIENT INFO; name is " field=". ptr NULL: there
   is no such field. */
static vkp_str vkp_i_info_field(vkp_str line, const char *name)
{
    size_t len = strlen(name);
    size_t i;
    for (i = 0; i + len <= line.len; i++) {
        if (memcmp(line.ptr + i, name, len) == 0) {
            size_t from = i + len;
            for (i = from; i < line.len && line.ptr[i] != ' ' && line.ptr[i] != '\n'; i++) {
            }
            return vkp_i_str(line.ptr + from, i - from);
        }
    }
    return vkp_i_str(NULL, 0);
}

/* What the line of CLIENT LIST says of the client's connection. */
static vkp_i_verdict vkp_i_probe_judge(vkp_str line)
{
    vkp_str flags = vkp_i_info_field(line, " flags=");
    return flags.ptr != NULL && memchr(flags.ptr, 'b', flags.len) != NULL ? VKP_I_PROBE_BLOCKED
                                                                          : VKP_I_PROBE_STALLED;
}

static void vkp_i_probe_answered(vkp_i_request *request, vkp_status status, const vkp_value *value,
                                 const vkp_bytes *frame)
{
    vkp_i_probe *probe = VKP_CONTAINER(request, vkp_i_probe, ask);
    int64_t id = probe->client->link.id;
    char digits[VKP_I_DIGITS];
    vkp_str argv[4];
    size_t from;
    (void)frame;
    vkp_bytes_unref(&request->bytes);
    if (status != VKP_OK) {
        return; /* vkp_i_client_end_probe, or a reply over a limit: the timer ends the probe */
    }
    if (probe->listing) {
        vkp_i_probe_end(probe, vkp_i_probe_judge(vkp_value_get_str(value)));
    } else if (value->type == VKP_RESP_ERROR) {
        vkp_i_probe_end(probe, VKP_I_PROBE_BUSY);
    } else if (id == 0) { /* the server did not say who we are */
        vkp_i_probe_end(probe, VKP_I_PROBE_STALLED);
    } else {
        probe->listing = true;
        from = vkp_i_format_u64(digits, (uint64_t)id);
        argv[0] = vkp_str_of("CLIENT");
        argv[1] = vkp_str_of("LIST");
        argv[2] = vkp_str_of("ID");
        argv[3] = vkp_i_str(digits + from, VKP_I_DIGITS - from);
        vkp_i_probe_ask(probe, 4, argv);
    }
}

static void vkp_i_probe_on_ready(vkp_i_link *link)
{
    vkp_str argv = vkp_str_of("PING");
    vkp_i_probe_ask(vkp_i_probe_of(link), 1, &argv);
}

static void vkp_i_probe_on_push(vkp_i_link *link, const vkp_push *push)
{
    (void)link;
    (void)push;
}

/* The probe's connection ended. Words of the server, also those of a refusal, are a sign of life.
   A connection that was established and then ended without words is what a server does that is
   full, or that is being restarted: the next probe finds out. */
static void vkp_i_probe_on_down(vkp_i_link *link)
{
    vkp_i_probe_end(vkp_i_probe_of(link),
                    link->spoke || link->connected ? VKP_I_PROBE_BUSY : VKP_I_PROBE_DEAD);
}

static void vkp_i_probe_on_busy(vkp_i_link *link)
{
    (void)link;
}

static const vkp_i_link_ops vkp_i_probe_ops = {vkp_i_probe_on_ready, vkp_i_probe_on_push,
                                               vkp_i_probe_on_down,  vkp_i_probe_on_busy,
                                               vkp_i_probe_hold,     vkp_i_probe_release};

static void vkp_i_probe_on_timer(vkp_timer *timer)
{
    vkp_i_probe *probe = VKP_CONTAINER(timer, vkp_i_probe, timer);
    vkp_i_probe_hold(&probe->link);
    vkp_i_probe_end(probe, probe->link.connected ? VKP_I_PROBE_MUTE : VKP_I_PROBE_DEAD);
    vkp_i_probe_release(&probe->link);
}

/* Ask the server over a connection of its own. Without memory the next watch tries again. */
static void vkp_i_client_start_probe(vkp_client *client)
{
    vkp_i_probe *probe = (vkp_i_probe *)vkp_i_alloc_zero(client->env, sizeof *probe);
    uint64_t deadline_ns;
    vkp_status status;
    if (probe == NULL) {
        return;
    }
    probe->client = client;
    probe->refs = 1;
    probe->begun_ns = vkp_i_loop_now(client->loop);
    probe->ask.settle = vkp_i_probe_answered;
    probe->config = client->config;
    probe->config.name = vkp_i_str(NULL, 0);
    probe->config.database = 0;
    probe->config.setup_count = 0;
    probe->config.role = VKP_CLIENT_ROLE_ANY;
    (void)VKP_I_ADD(&client->refs, 1);
    client->probe = probe;
    VKP_I_COUNT(client, probes);
    deadline_ns = vkp_i_after_ms(probe->begun_ns, client->config.reply_timeout_ms);
    status =
        vkp_i_link_init(&probe->link, client->env, client->loop, &probe->config, &vkp_i_probe_ops);
    if (status == VKP_OK) {
        status = vkp_timer_start(&probe->timer, client->loop, vkp_i_probe_on_timer, 0, deadline_ns);
    }
    if (status == VKP_OK) {
        status = vkp_i_link_connect_to(&probe->link, &client->link.peer, client->target.username,
                                       client->target.password);
    }
    if (status != VKP_OK) {
        vkp_i_probe_hold(&probe->link);
        vkp_i_probe_end(probe, status == VKP_ERR_SYS ? VKP_I_PROBE_DEAD : VKP_I_PROBE_BUSY);
        vkp_i_probe_release(&probe->link);
    }
}

/* ---- the audit ---- */

/* A heartbeat: CLIENT INFO, or PING. */
typedef struct vkp_i_beat {
    vkp_i_request request;
    vkp_client *client;
    bool audit;       /* CLIENT INFO */
    uint64_t changes; /* client->changes when it was sent */
    uint64_t sent_ns; /* on the loop's clock */
} vkp_i_beat;

/* Ask again for every name of the kind: the server has fewer than the table says. */
static void vkp_i_client_repair(vkp_client *client, int kind)
{
    vkp_i_map_node *node = NULL;
    VKP_I_COUNT(client, repairs);
    while (client->ready && (node = vkp_i_map_get_next(&client->interests[kind], node)) != NULL) {
        vkp_i_interest_take_step(VKP_CONTAINER(node, vkp_i_interest, node), VKP_I_EVENT_MISSING);
    }
}

/* Compare the server's counts with the table. */
static void vkp_i_client_audit(vkp_client *client, const vkp_i_beat *beat, vkp_str line)
{
    static const char *const fields[VKP_SUB_KINDS] = {" sub=", " psub=", " ssub="};
    bool agrees = true;
    int kind;
    if (beat->changes != client->changes || client->subs_in_flight > 0 || client->stuck > 0) {
        return; /* the table changed meanwhile: the next heartbeat audits */
    }
    VKP_I_COUNT(client, audits);
    for (kind = 0; kind < VKP_SUB_KINDS && client->ready; kind++) {
        vkp_str text = vkp_i_info_field(line, fields[kind]);
        size_t count = 0;
        size_t i;
        for (i = 0; i < text.len && text.ptr[i] >= '0' && text.ptr[i] <= '9'; i++) {
            count = count * 10 + (size_t)(text.ptr[i] - '0');
        }
        if (text.ptr == NULL || count == client->held_of[kind]) {
            continue; /* older servers do not count shard channels */
        }
        agrees = false;
        vkp_i_log(client->env, VKP_LOG_WARN, "%s: the server counts%s%zu, the client %zu",
                  client->config.address.ptr, fields[kind], count, client->held_of[kind]);
        if (count > client->held_of[kind]) {
            vkp_i_link_lose(&client->link, "the server has subscriptions that nobody asked for");
        } else {
            vkp_i_client_repair(client, kind);
        }
    }
    if (agrees) {
        client->audited_ns = beat->sent_ns;
    }
}

static void vkp_i_beat_settled(vkp_i_request *request, vkp_status status, const vkp_value *value,
                               const vkp_bytes *frame)
{
    vkp_i_beat *beat = VKP_CONTAINER(request, vkp_i_beat, request);
    vkp_client *client = beat->client;
    (void)frame;
    client->beat_sent = false;
    if (status == VKP_OK && beat->audit && value->type == VKP_RESP_STRING) {
        vkp_i_client_audit(client, beat, vkp_value_get_str(value));
    } else if (status == VKP_OK && beat->audit) {
        client->counts_refused = true; /* an old server, or no right to ask */
    }
    vkp_bytes_unref(&request->bytes);
    vkp_i_free(client->env, beat, sizeof *beat);
}

/* Send a heartbeat. A RESP2 connection with subscriptions carries no command but PING. False: no
   memory. */
static bool vkp_i_client_beat(vkp_client *client)
{
    vkp_i_beat *beat = (vkp_i_beat *)vkp_i_alloc_zero(client->env, sizeof *beat);
    bool audit = client->link.protocol == 3 && !client->counts_refused;
    vkp_str argv[2];
    if (beat == NULL) {
        return false;
    }
    beat->client = client;
    beat->audit = audit;
    beat->changes = client->changes;
    beat->sent_ns = client->loop->now_ns;
    beat->request.due = 1;
    beat->request.settle = vkp_i_beat_settled;
    argv[0] = vkp_str_of(audit ? "CLIENT" : "PING");
    argv[1] = vkp_str_of("INFO");
    if (vkp_i_request_put(&beat->request, client->env, audit ? 2 : 1, argv) != VKP_OK ||
        !vkp_i_link_start(&client->link, &beat->request)) {
        vkp_i_beat_settled(&beat->request, VKP_ERR_NOMEM, NULL, NULL);
        return false;
    }
    client->beat_sent = true;
    return true;
}

/* ---- the watch ---- */

/* Look after the connection: send a heartbeat, or a probe. */
static void vkp_i_client_watch(vkp_client *client)
{
    uint64_t now_ns = client->loop->now_ns;
    if (client->probe == NULL && now_ns >= vkp_i_client_overdue_ns(client)) {
        vkp_i_client_start_probe(client);
    }
    if (client->ready && now_ns >= client->heartbeat_ns) {
        client->heartbeat_ns = vkp_i_after_ms(now_ns, client->config.heartbeat_ms);
        if (!client->beat_sent && !vkp_i_client_beat(client)) {
            vkp_i_link_lose(&client->link, "out of memory");
        }
    }
}

#endif /* VKP_I_IO */

#if VKP_I_IO
/* ======================================================================================
   >>impl-client-connection   The life of a client
   ======================================================================================
   Everything here runs on the loop's thread, except vkp_client_ref, _unref, _close and the
   getters. The states of vkp_client_state:
     CONNECTING  the link connects and logs in; ready: READY; down, or over connect_timeout_ms:
                 WAITING
     WAITING     the timer of vkp_i_client_backoff: CONNECTING
     READY       commands are written; the link down: WAITING
     CLOSED      from every state: vkp_client_close, or the loop's close; final
   vkp_i_client_down is the only way to WAITING, vkp_i_client_close_now the only way to CLOSED.
   Both collect all requests that fail before they call the first callback, because any callback
   may close the client; code behind a callback checks `closed`, `ready` or `link.conn`.
   The mutex is held only around `submitted` and its flags, never around a callback.           */

static void vkp_i_client_on_timer(vkp_timer *timer);

/* Set the state, and whether commands are accepted. */
static void vkp_i_client_set_state(vkp_client *client, vkp_client_state state)
{
    VKP_I_STORE_REL(&client->state, (uint32_t)state);
    VKP_I_LOCK(&client->mutex);
    client->accepting = state == VKP_CLIENT_CONNECTING || state == VKP_CLIENT_READY;
    VKP_I_UNLOCK(&client->mutex);
}

static void vkp_i_client_set_error(vkp_client *client, const char *text)
{
    VKP_I_LOCK(&client->mutex);
    (void)snprintf(client->error, sizeof client->error, "%s", text);
    VKP_I_UNLOCK(&client->mutex);
}

VKP_API void vkp_client_get_error(vkp_client *client, char *text, size_t size)
{
    VKP_I_LOCK(&client->mutex);
    (void)snprintf(text, size, "%s", client->error);
    VKP_I_UNLOCK(&client->mutex);
}

/* Start the one timer of the client, in ms from now; the state decides what it means. */
static void vkp_i_client_start_timer(vkp_client *client, uint64_t ms)
{
    uint64_t deadline = vkp_i_after_ms(vkp_i_loop_now(client->loop), ms);
    if (vkp_timer_start(&client->timer, client->loop, vkp_i_client_on_timer, 0, deadline) !=
        VKP_OK) {
        vkp_i_log(client->env, VKP_LOG_ERROR, "out of memory: the client's timer did not start");
    }
}

static bool vkp_i_request_is_interest(const vkp_i_request *request)
{
    return VKP_CONTAINER(request, vkp_i_ask, request)->kind != VKP_I_ASK_COMMAND;
}

/* Settle every request of `failed`. A callback may close the client: that close settles the other
   requests before it returns.                                                                 */
static void vkp_i_client_settle_failed(vkp_client *client, vkp_status status)
{
    vkp_i_request *request;
    while ((request = vkp_i_requests_pop(&client->failed)) != NULL) {
        request->settle(request, status, NULL, NULL);
    }
}

/* Move asks from `submitted` to out: interests (WANT, LEAVE), commands, or both. The others
   stay.                                                                                       */
static void vkp_i_client_collect(vkp_client *client, bool interests, bool commands,
                                 vkp_i_requests *out)
{
    vkp_i_requests all;
    vkp_i_request *request;
    vkp_i_requests_init(&all);
    VKP_I_LOCK(&client->mutex);
    vkp_i_requests_move(&client->submitted, &all);
    while ((request = vkp_i_requests_pop(&all)) != NULL) {
        bool wanted = vkp_i_request_is_interest(request) ? interests : commands;
        vkp_i_requests_append(wanted ? out : &client->submitted, request);
    }
    VKP_I_UNLOCK(&client->mutex);
}

/* Move to `failed` every command without a reply, written or not, and every WANT that waits;
   wanted names stay. All are moved before the first callback, because a callback may close the
   client.                                                                                     */
static void vkp_i_client_collect_failed(vkp_client *client)
{
    client->ready = false;
    vkp_i_client_end_probe(client);
    vkp_i_requests_move(&client->link.flight, &client->failed);
    vkp_i_client_collect(client, false, true, &client->failed);
    vkp_i_client_suspend(client);
}

/* Milliseconds to wait: random, uniform, up to a bound that doubles with each try, so that many
   clients do not reconnect at the same time.                                                  */
static uint64_t vkp_i_client_backoff(vkp_client *client)
{
    uint64_t most = VKP_I_MIN(client->config.retry_max_ms, (uint64_t)INT64_MAX);
    uint64_t bound = client->config.retry_min_ms;
    uint32_t i;
    for (i = 0; i < client->tries && bound < most; i++) {
        bound *= 2;
    }
    client->tries++;
    bound = VKP_I_MIN(bound, most);
    return vkp_i_sys(client->env)->random_u64() % (bound + 1);
}

/* Whether the connection that is lost now stood so long that the bound of the wait starts again. */
static bool vkp_i_client_stood(const vkp_client *client)
{
    uint64_t stood_ns = vkp_i_loop_now(client->loop) - client->link.ready_ns;
    return client->ready && stood_ns / VKP_I_NS_PER_MS >= client->config.retry_reset_ms;
}

/* The connection, or the try to connect, has ended, and link.error says why: start the timer of the
   next try, emit DISCONNECTED or CONNECT_FAILED, settle what failed.                          */
static void vkp_i_client_down(vkp_client *client)
{
    bool was_ready = client->ready;
    bool report = !was_ready && !client->failure_reported;
    vkp_str why = vkp_str_of(client->link.error);
    if (client->closed || vkp_client_get_state(client) == VKP_CLIENT_WAITING) {
        return;
    }
    if (vkp_i_client_stood(client)) {
        client->tries = 0;
    }
    vkp_i_client_set_error(client, why.ptr);
    vkp_i_log(client->env, was_ready || report ? VKP_LOG_WARN : VKP_LOG_INFO, "%s: %s",
              client->config.address.ptr, why.ptr);
    vkp_i_client_set_state(client, VKP_CLIENT_WAITING);
    vkp_i_client_start_timer(client, vkp_i_client_backoff(client));
    vkp_i_client_collect_failed(client);
    client->failure_reported = !was_ready;
    if (!was_ready) {
        VKP_I_COUNT(client, failures);
    }
    if (was_ready) {
        VKP_I_COUNT(client, outages);
        vkp_i_client_event(client, VKP_PUSH_DISCONNECTED, why);
    } else if (report) {
        vkp_i_client_event(client, VKP_PUSH_CONNECT_FAILED, why);
    }
    vkp_i_client_settle_failed(client, VKP_ERR_DISCONNECTED);
}

static void vkp_i_client_take(vkp_client *client);

static vkp_client *vkp_i_client_of(vkp_i_link *link)
{
    return VKP_CONTAINER(link, vkp_client, link);
}

/* The handshake succeeded: emit CONNECTED or RECONNECTED, subscribe again, write the commands
   that waited.                                                                                */
static void vkp_i_client_on_ready(vkp_i_link *link)
{
    vkp_client *client = vkp_i_client_of(link);
    client->ready = true;
    client->failure_reported = false;
    client->audited_ns = client->loop->now_ns;
    client->beat_sent = false;
    client->counts_refused = false;
    client->patient_ns = 0;
    client->heartbeat_ns = vkp_i_after_ms(client->loop->now_ns, client->config.heartbeat_ms);
    VKP_I_COUNT(client, connections);
    VKP_I_STORE(&client->protocol, link->protocol);
    vkp_i_client_set_state(client, VKP_CLIENT_READY);
    vkp_i_client_start_watch(client);
    vkp_i_client_event(client, client->was_ready ? VKP_PUSH_RECONNECTED : VKP_PUSH_CONNECTED,
                       vkp_i_str(NULL, 0));
    client->was_ready = true;
    if (client->ready) {
        vkp_i_client_resubscribe(client);
    }
    if (client->ready) {
        vkp_i_client_take(client);
    }
}

static void vkp_i_client_on_push(vkp_i_link *link, const vkp_push *push)
{
    vkp_client *client = vkp_i_client_of(link);
    if (push->kind == VKP_PUSH_UNSUBSCRIBED) {
        vkp_i_client_taken(client, push);
    } else {
        vkp_i_client_emit(client, push);
    }
}

static void vkp_i_client_on_down(vkp_i_link *link)
{
    vkp_i_client_down(vkp_i_client_of(link));
}

/* The first request is in flight again: the watch must not sleep until the next heartbeat. */
static void vkp_i_client_on_busy(vkp_i_link *link)
{
    vkp_client *client = vkp_i_client_of(link);
    uint64_t overdue_ns = vkp_i_after_ms(client->loop->now_ns, client->config.reply_timeout_ms);
    if (client->ready && client->timer.i_deadline_ns > overdue_ns) {
        vkp_i_client_start_watch(client);
    }
}

static void vkp_i_client_hold(vkp_i_link *link)
{
    (void)VKP_I_ADD(&vkp_i_client_of(link)->refs, 1);
}

static void vkp_i_client_unhold(vkp_i_link *link)
{
    vkp_i_client_release(vkp_i_client_of(link));
}

static const vkp_i_link_ops vkp_i_client_link_ops = {vkp_i_client_on_ready, vkp_i_client_on_push,
                                                     vkp_i_client_on_down,  vkp_i_client_on_busy,
                                                     vkp_i_client_hold,     vkp_i_client_unhold};

/* The target of the next try: a copy of what the config says, or of what on_connect makes of it.
   False: no memory.                                                                           */
static bool vkp_i_client_aim(vkp_client *client)
{
    const vkp_client_config *config = &client->config;
    vkp_client_target target;
    target.address = config->address;
    target.username = config->username;
    target.password = config->password;
    if (config->on_connect != NULL) {
        config->on_connect(config->user, &target);
    }
    vkp_i_target_free(client->env, &client->target);
    client->target = target;
    if (!vkp_i_copy_str(client->env, &client->target.address)) {
        client->target.username.ptr = NULL; /* not copied: must not be freed */
        client->target.password.ptr = NULL;
        return false;
    }
    if (!vkp_i_copy_str(client->env, &client->target.username)) {
        client->target.password.ptr = NULL;
        return false;
    }
    return vkp_i_copy_str(client->env, &client->target.password);
}

/* Begin an attempt to connect, with its time limit. On failure the wait for the next try has
   begun.                                                                                      */
static vkp_status vkp_i_client_connect(vkp_client *client)
{
    vkp_status status = VKP_ERR_NOMEM;
    vkp_i_client_set_state(client, VKP_CLIENT_CONNECTING);
    vkp_i_client_start_timer(client, client->config.connect_timeout_ms);
    if (vkp_i_client_aim(client) && !client->closed) {
        status = vkp_i_link_connect(&client->link, client->target.address, client->target.username,
                                    client->target.password);
    }
    if (status != VKP_OK && !client->closed) {
        vkp_i_link_lose(&client->link,
                        status == VKP_ERR_SYS ? vkp_i_link_why(errno) : vkp_status_str(status));
    }
    return status;
}

/* The timer's callback; what the timer means depends on the state. */
static void vkp_i_client_on_timer(vkp_timer *timer)
{
    vkp_client *client = VKP_CONTAINER(timer, vkp_client, timer);
    (void)VKP_I_ADD(&client->refs, 1);
    switch (vkp_client_get_state(client)) {
    case VKP_CLIENT_CONNECTING:
        if (!client->begun) {
            client->begun = true;
            (void)!vkp_i_client_connect(client); /* on failure the wait has begun */
            break;
        }
        vkp_i_link_lose(&client->link, "no connection within the time limit");
        break;
    case VKP_CLIENT_WAITING:
        (void)!vkp_i_client_connect(client); /* on failure the next wait has begun */
        break;
    case VKP_CLIENT_READY:
        vkp_i_client_watch(client);
        if (client->ready) {
            vkp_i_client_start_watch(client);
        }
        break;
    case VKP_CLIENT_CLOSED:
        break;
    }
    vkp_i_client_release(client);
}

/* ---- the queued task, opening, closing ---- */

/* Whether a command must be refused: a RESP2 connection carries no commands while a name is
   subscribed.                                                                                 */
static bool vkp_i_client_must_refuse(const vkp_client *client)
{
    return client->link.protocol == 2 &&
           client->interests[0].count + client->interests[1].count + client->interests[2].count > 0;
}

/* No memory for a new name: put the ask, and all asks behind it, back to `submitted` for the next
   connection, and let this connection fail. The ask's callback is called now, because the next
   connection may be far away.                                                                 */
static void vkp_i_client_lost_memory(vkp_client *client, vkp_i_ask *ask)
{
    vkp_i_requests all;
    vkp_subscribe_fn done = ask->done;
    void *user = ask->user;
    ask->done = NULL;
    vkp_i_requests_init(&all);
    vkp_i_requests_append(&all, &ask->request);
    vkp_i_requests_move(&client->taken, &all);
    VKP_I_LOCK(&client->mutex);
    vkp_i_requests_move(&client->submitted, &all);
    vkp_i_requests_move(&all, &client->submitted);
    VKP_I_UNLOCK(&client->mutex);
    vkp_i_link_lose(&client->link, "out of memory");
    if (done != NULL) {
        done(user, client->closed ? VKP_ERR_CLOSED : VKP_ERR_DISCONNECTED,
             vkp_str_of("out of memory"));
    }
}

/* Start one ask that was taken from `submitted`. */
static void vkp_i_client_dispatch(vkp_client *client, vkp_i_ask *ask)
{
    if (ask->kind == VKP_I_ASK_WANT) {
        if (!vkp_i_client_want(client, ask)) {
            vkp_i_client_lost_memory(client, ask);
        }
    } else if (ask->kind == VKP_I_ASK_LEAVE) {
        vkp_i_client_leave(client, ask);
    } else if (vkp_i_client_must_refuse(client)) {
        vkp_i_log(client->env, VKP_LOG_WARN,
                  "command refused: a RESP2 connection with subscriptions carries no commands");
        vkp_i_ask_settled(&ask->request, VKP_ERR_REFUSED, NULL, NULL);
    } else if (!client->ready || !vkp_i_link_start(&client->link, &ask->request)) {
        vkp_i_ask_settled(&ask->request, VKP_ERR_DISCONNECTED, NULL, NULL);
    }
}

/* Start the submitted asks. Commands stay in `submitted` until the client is ready. */
static void vkp_i_client_take(vkp_client *client)
{
    vkp_i_request *request;
    vkp_i_client_collect(client, true, client->ready, &client->taken);
    while ((request = vkp_i_requests_pop(&client->taken)) != NULL) {
        vkp_i_client_dispatch(client, VKP_CONTAINER(request, vkp_i_ask, request));
    }
}

/* Close the client, once. Gives the loop's reference back: the caller must hold another. Loop's
   thread.                                                                                     */
static void vkp_i_client_close_now(vkp_client *client)
{
    if (client->closed) {
        return;
    }
    client->closed = true;
    VKP_I_LOCK(&client->mutex);
    client->ended = true;
    VKP_I_UNLOCK(&client->mutex);
    vkp_i_client_set_state(client, VKP_CLIENT_CLOSED);
    vkp_i_loop_detach(&client->attached);
    vkp_timer_stop(&client->timer);
    vkp_i_link_close(&client->link);
    (void)snprintf(client->link.error, sizeof client->link.error, "closed");
    vkp_i_client_collect_failed(client);
    vkp_i_requests_move(&client->reporting, &client->failed);
    vkp_i_requests_move(&client->taken, &client->failed);
    vkp_i_client_collect(client, true, true, &client->failed);
    vkp_i_client_forget(client);
    vkp_i_client_settle_failed(client, VKP_ERR_CLOSED);
    vkp_mpsc_tx_unref(client->config.pushes);
    client->config.pushes = NULL;
    vkp_i_client_release(client);
}

/* The client's task: start what any thread submitted. The task holds a reference. */
static void vkp_i_client_run(vkp_i_task *task)
{
    vkp_client *client = VKP_CONTAINER(task, vkp_client, task);
    bool close_wanted;
    VKP_I_LOCK(&client->mutex);
    client->task_queued = false;
    close_wanted = client->close_wanted;
    VKP_I_UNLOCK(&client->mutex);
    vkp_i_client_take(client);
    if (close_wanted) {
        vkp_i_client_close_now(client);
    }
    vkp_i_client_release(client);
}

static void vkp_i_client_loop_closed(vkp_i_attached *attached)
{
    vkp_client *client = VKP_CONTAINER(attached, vkp_client, attached);
    (void)VKP_I_ADD(&client->refs, 1);
    vkp_i_client_close_now(client);
    vkp_i_client_release(client);
}

VKP_API void vkp_client_get_stats(const vkp_client *client, vkp_client_stats *stats)
{
    stats->connections = VKP_I_LOAD(&client->stats.connections);
    stats->failures = VKP_I_LOAD(&client->stats.failures);
    stats->outages = VKP_I_LOAD(&client->stats.outages);
    stats->gaps = VKP_I_LOAD(&client->stats.gaps);
    stats->refusals = VKP_I_LOAD(&client->stats.refusals);
    stats->losses = VKP_I_LOAD(&client->stats.losses);
    stats->audits = VKP_I_LOAD(&client->stats.audits);
    stats->repairs = VKP_I_LOAD(&client->stats.repairs);
    stats->probes = VKP_I_LOAD(&client->stats.probes);
}

VKP_API vkp_client *vkp_client_ref(vkp_client *client)
{
    (void)VKP_I_ADD(&client->users, 1);
    (void)VKP_I_ADD(&client->refs, 1);
    return client;
}

VKP_API void vkp_client_close(vkp_client *client)
{
    if (client == NULL) {
        return;
    }
    if (vkp_i_on_loop(client->loop)) {
        vkp_i_client_close_now(client);
        return;
    }
    VKP_I_LOCK(&client->mutex);
    client->close_wanted = true;
    vkp_i_client_schedule(client);
    VKP_I_UNLOCK(&client->mutex);
}

VKP_API void vkp_client_unref(vkp_client *client)
{
    if (client == NULL) {
        return;
    }
    if (VKP_I_UNREF(&client->users) == 1) {
        vkp_client_close(client);
    }
    vkp_i_client_release(client);
}

VKP_API int vkp_client_get_protocol(const vkp_client *client)
{
    return (int)VKP_I_LOAD(&client->protocol);
}

/* Copy the setup commands of the config. */
static vkp_status vkp_i_client_copy_setup(vkp_client *client, const vkp_client_config *config)
{
    const vkp_env *env = client->env;
    vkp_client_setup *setup;
    size_t i;
    size_t j;
    if (config->setup_count == 0) {
        return VKP_OK;
    }
    setup = (vkp_client_setup *)vkp_i_alloc_zero(env, config->setup_count * sizeof *setup);
    for (i = 0; setup != NULL && i < config->setup_count; i++) {
        size_t argc = config->setup[i].argc;
        vkp_str *argv = (vkp_str *)vkp_i_alloc_zero(env, argc * sizeof *argv);
        bool copied = argv != NULL;
        setup[i] = config->setup[i];
        setup[i].argv = argv;
        setup[i].argc = copied ? argc : 0;
        for (j = 0; copied && j < argc; j++) {
            argv[j] = config->setup[i].argv[j];
            copied = vkp_i_copy_str(env, &argv[j]);
        }
        if (!copied || !vkp_i_copy_str(env, &setup[i].expect)) {
            setup[i].expect.ptr = NULL;
            vkp_i_setup_free(env, setup, i + 1, config->setup_count);
            return VKP_ERR_NOMEM;
        }
    }
    client->config.setup = setup;
    client->config.setup_count = setup != NULL ? config->setup_count : 0;
    return setup != NULL ? VKP_OK : VKP_ERR_NOMEM;
}

/* Copy the config, set its defaults, prepare the link. */
static vkp_status vkp_i_client_configure(vkp_client *client, const vkp_client_config *config)
{
    vkp_client_config *own = &client->config;
    vkp_str *texts[4];
    bool copied = true;
    size_t i;
    *own = *config;
    own->pushes = NULL;
    own->resolver = NULL;
    own->setup = NULL;
    own->setup_count = 0;
    texts[0] = &own->address;
    texts[1] = &own->username;
    texts[2] = &own->password;
    texts[3] = &own->name;
    for (i = 0; i < 4; i++) {
        copied = copied && vkp_i_copy_str(client->env, texts[i]);
        if (!copied) {
            texts[i]->ptr = NULL; /* not copied: vkp_i_client_free must not free it */
        }
    }
    if (!copied || vkp_i_client_copy_setup(client, config) != VKP_OK) {
        return VKP_ERR_NOMEM;
    }
#define VKP_I_DEFAULT(field, value) \
    if (own->field == 0) {          \
        own->field = (value);       \
    }
    VKP_I_DEFAULT(connect_timeout_ms, 5000)
    VKP_I_DEFAULT(retry_min_ms, 50)
    VKP_I_DEFAULT(retry_max_ms, 5000)
    VKP_I_DEFAULT(retry_reset_ms, 5000)
    VKP_I_DEFAULT(keepalive_ms, 30000)
    VKP_I_DEFAULT(unacked_ms, 20000)
    VKP_I_DEFAULT(heartbeat_ms, 15000)
    VKP_I_DEFAULT(reply_timeout_ms, 5000)
    VKP_I_DEFAULT(blocked_timeout_ms, 60000)
    VKP_I_DEFAULT(queue_bytes, (size_t)64 << 20)
#undef VKP_I_DEFAULT
    own->resp.lenient = true;
    own->resp.env = client->env;
    return vkp_i_link_init(&client->link, client->env, client->loop, own, &vkp_i_client_link_ops);
}

/* Whether every setup command has a name. */
static bool vkp_i_setup_is_valid(const vkp_client_config *config)
{
    size_t i;
    for (i = 0; i < config->setup_count; i++) {
        if (config->setup == NULL || config->setup[i].argc == 0 || config->setup[i].argv == NULL) {
            return false;
        }
    }
    return true;
}

VKP_API vkp_status vkp_client_open(vkp_loop *loop, const vkp_client_config *config,
                                   vkp_client **out)
{
    vkp_client *client;
    vkp_i_parts parts;
    vkp_status status;
    int kind;
    VKP_I_REQUIRE(loop != NULL && config != NULL && config->address.ptr != NULL && out != NULL);
    VKP_I_REQUIRE(vkp_i_on_loop(loop) && (config->on_push == NULL || config->pushes == NULL));
    VKP_I_REQUIRE(config->protocol == 0 || config->protocol == 2 || config->protocol == 3);
    VKP_I_REQUIRE((unsigned)config->role <= VKP_CLIENT_ROLE_PRIMARY &&
                  vkp_i_setup_is_valid(config));
    if (loop->closed) {
        return VKP_ERR_CLOSED;
    }
    client = (vkp_client *)vkp_i_alloc_zero(config->env != NULL ? config->env : loop->env,
                                            sizeof *client);
    if (client == NULL) {
        return VKP_ERR_NOMEM;
    }
    client->env = config->env != NULL ? config->env : loop->env;
    client->loop = vkp_loop_ref(loop);
    client->refs = 2;
    client->users = 1;
    VKP_I_MUTEX_INIT(&client->mutex);
    vkp_i_requests_init(&client->submitted);
    vkp_i_requests_init(&client->link.flight);
    vkp_i_requests_init(&client->taken);
    vkp_i_requests_init(&client->failed);
    vkp_i_requests_init(&client->reporting);
    for (kind = 0; kind < VKP_SUB_KINDS; kind++) {
        vkp_i_map_init(&client->interests[kind], client->env);
    }
    client->task.fn = vkp_i_client_run;
    client->attached.on_loop_close = vkp_i_client_loop_closed;
    status = vkp_i_client_configure(client, config);
    if (status == VKP_OK) {
        status = vkp_i_split_address(client->env, config->address, &parts);
    }
    if (status != VKP_OK) {
        vkp_i_client_free(client);
        return status;
    }
    if (config->pushes != NULL) {
        client->config.pushes = vkp_mpsc_tx_ref(config->pushes);
    }
    if (config->resolver != NULL) {
        client->config.resolver = vkp_resolver_ref(config->resolver);
    }
    vkp_i_loop_attach(loop, &client->attached);
    /* The first try begins in the loop's next round: no callback runs inside this call. */
    vkp_i_client_set_state(client, VKP_CLIENT_CONNECTING);
    vkp_i_client_start_timer(client, 0);
    if (client->timer.i_index == 0) { /* without a timer the client would never try */
        vkp_i_client_close_now(client);
        vkp_client_unref(client);
        return VKP_ERR_NOMEM;
    }
    *out = client;
    return VKP_OK;
}

#endif /* VKP_I_IO */

#if VKP_I_IO
/* ======================================================================================
   >>impl-pushloop   From a channel of pushes to where they are wanted
   ======================================================================================
   Receive pushes from a channel and write each one to a sink: a hub, a connection or a callback.
   vkp_push_loop_run blocks the receiver's thread. vkp_push_loop_open receives on a loop's
   thread, by a handler that takes at most VKP_I_PUSH_BATCH pushes per call and is called again
   for more; the hub or callback runs there too.
   on_end runs once, when the channel is closed and empty. The callback and on_end may unref the
   push loop: `running` defers the free. No lock is held.                                      */

struct vkp_push_loop {
    vkp_loop *loop;             /* shared */
    vkp_mpsc_rx *rx;            /* taken from the caller of open */
    vkp_handler *handler;       /* calls vkp_i_push_loop_ready while rx is ready */
    vkp_sink sink;              /* shares its conn; borrows its hub */
    void (*on_end)(void *user); /* called once when the channel is closed and empty; or NULL */
    void *user;                 /* argument of on_end */
    bool ended;                 /* the channel was found closed and empty */
    bool running;               /* vkp_i_push_loop_ready is running: unref must not free */
    bool unreferenced; /* the handle was given back: the end of vkp_i_push_loop_ready frees */
};

#define VKP_I_PUSH_BATCH 64 /* most pushes per receive, and per call of the handler */

/* Write one push to the sink. The token (may be NULL) ends a wait for room in a connection's
   inbox.                                                                                      */
static void vkp_i_sink_write(const vkp_sink *sink, const vkp_push *push, vkp_cancel *cancel)
{
    if (sink->hub != NULL) {
        (void)vkp_hub_deliver(sink->hub, push);
    } else if (sink->conn != NULL) {
        if (push->frame.len > 0) {
            /* the connection's policy counts what it drops */
            (void)!vkp_i_conn_push(sink->conn, &push->frame, cancel, VKP_FOREVER);
        }
    } else {
        sink->callback(sink->user, push);
    }
}

/* Whether exactly one of hub, conn and callback is set. */
static bool vkp_i_sink_is_one(const vkp_sink *sink)
{
    return sink != NULL &&
           (sink->hub != NULL) + (sink->conn != NULL) + (sink->callback != NULL) == 1;
}

VKP_API vkp_status vkp_push_loop_run(vkp_mpsc_rx *rx, const vkp_sink *sink, vkp_cancel *cancel)
{
    vkp_push batch[VKP_I_PUSH_BATCH];
    vkp_status status;
    size_t count;
    size_t i;
    VKP_I_REQUIRE(rx != NULL && vkp_i_sink_is_one(sink) && sink->hub == NULL);
    VKP_I_REQUIRE(rx->channel->config.elem_bytes == sizeof(vkp_push));
    for (;;) {
        if (cancel != NULL && vkp_cancel_is_triggered(cancel)) {
            return VKP_ERR_CANCELLED;
        }
        status = vkp_i_mpsc_recv(rx, batch, VKP_I_PUSH_BATCH, &count, cancel, VKP_FOREVER);
        if (status != VKP_OK) {
            return status == VKP_ERR_CLOSED ? VKP_OK : status;
        }
        for (i = 0; i < count; i++) {
            vkp_i_sink_write(sink, &batch[i], cancel);
            vkp_push_unref(&batch[i]);
        }
    }
}

static void vkp_i_push_loop_free(vkp_push_loop *self)
{
    vkp_loop *loop = self->loop;
    vkp_handler_unref(self->handler);
    vkp_mpsc_rx_unref(self->rx);
    vkp_conn_unref(self->sink.conn);
    vkp_i_free(loop->env, self, sizeof *self);
    vkp_loop_unref(loop);
}

/* Handler: the channel holds pushes, or is closed. */
static void vkp_i_push_loop_ready(void *user)
{
    vkp_push_loop *self = (vkp_push_loop *)user;
    vkp_push push;
    vkp_status status = VKP_OK;
    int i;
    self->running = true;
    for (i = 0; i < VKP_I_PUSH_BATCH && !self->unreferenced; i++) {
        status = vkp_mpsc_try_recv(self->rx, &push);
        if (status != VKP_OK) {
            break;
        }
        vkp_i_sink_write(&self->sink, &push, NULL);
        vkp_push_unref(&push);
    }
    if (status == VKP_ERR_CLOSED && !self->ended) {
        self->ended = true;
        vkp_handler_close(self->handler);
        if (self->on_end != NULL) {
            self->on_end(self->user);
        }
    }
    self->running = false;
    if (self->unreferenced) {
        vkp_i_push_loop_free(self);
    }
}

VKP_API vkp_status vkp_push_loop_open(vkp_loop *loop, vkp_mpsc_rx *rx, const vkp_sink *sink,
                                      void (*on_end)(void *user), void *user, vkp_push_loop **out)
{
    vkp_case receive = vkp_case_mpsc_recv(rx, NULL);
    vkp_push_loop *self;
    vkp_status status;
    VKP_I_REQUIRE(loop != NULL && rx != NULL && vkp_i_sink_is_one(sink) && out != NULL);
    VKP_I_REQUIRE(rx->channel->config.elem_bytes == sizeof(vkp_push));
    self = (vkp_push_loop *)vkp_i_alloc_zero(loop->env, sizeof *self);
    if (self == NULL) {
        return VKP_ERR_NOMEM;
    }
    status = vkp_handler_open(loop, &receive, vkp_i_push_loop_ready, self, &self->handler);
    if (status != VKP_OK) {
        vkp_i_free(loop->env, self, sizeof *self);
        return status;
    }
    self->loop = vkp_loop_ref(loop);
    self->rx = rx;
    self->sink = *sink;
    if (sink->conn != NULL) {
        (void)vkp_conn_ref(sink->conn);
    }
    self->on_end = on_end;
    self->user = user;
    *out = self;
    return VKP_OK;
}

VKP_API void vkp_push_loop_unref(vkp_push_loop *self)
{
    if (self == NULL) {
        return;
    }
    vkp_handler_close(self->handler);
    self->unreferenced = true;
    if (!self->running) {
        vkp_i_push_loop_free(self);
    }
}

#endif /* VKP_I_IO */

#if VKP_I_IO
/* ======================================================================================
   >>impl-relay   Serve local Valkey clients over one upstream connection, or none
   ======================================================================================
   One shard per loop: a hub, a request reader and the local clients given to that loop. Loop 0
   (shard 0's) also carries the listeners and the upstream client.
   How a command travels: the local client's loop parses it (vkp_i_local_on_data) and appends an
   answer to local->answers. vkp_client_send queues the command for loop 0, which writes it
   upstream. The reply arrives on loop 0 (vkp_i_answer_on_reply), which converts it to the local
   client's protocol and returns the answer to the client's loop as a task (vkp_i_answer_return).
   There every finished answer at the head of local->answers is sent, so replies leave in the
   order of their commands.
   SUBSCRIBE and its family, HELLO, RESET and QUIT depend on that order: while answers are
   pending they are not executed, the connection pauses, and on_data gets their bytes again
   later. So there is never a queue of commands.
   A topic of a shard's hub holds one interest of the upstream client. SUBSCRIBE is confirmed to
   the local client when the server confirmed it, or immediately when the server is disconnected.
   Stand-alone, relay->subscribers counts subscribers over all shards, so that any shard answers
   PUBLISH.
   References: one of the relay for its owner, for each local client and for each task between
   threads; one of a local client (loop's thread) for its connection, each answer and each
   subscription under way.
   The relay's mutex guards `subscribers` and the shards' `handovers`; no callback runs under it.
   Lock order: the relay's mutex, then the gate's and the registry's.                          */

typedef struct vkp_i_shard vkp_i_shard;
typedef struct vkp_i_local vkp_i_local;

/* Bits of a shape: how a command's RESP2 reply differs from its RESP3 reply, beyond the types. */
#define VKP_I_SHAPE_NULL_ARRAY 1u    /* a null reply is *-1 in RESP2 */
#define VKP_I_SHAPE_FLAT 2u          /* RESP3 nests pairs in arrays, RESP2 has one flat array */
#define VKP_I_SHAPE_PAIRS 4u         /* RESP3's map is an array of pairs in RESP2 */
#define VKP_I_SHAPE_NULL_ELEMENTS 8u /* null elements are *-1 in RESP2 */
#define VKP_I_SHAPE_NULL_LAST 16u    /* a last element that is null is *-1 in RESP2 */

/* The place of one reply in the order of a local client's commands. */
typedef struct vkp_i_answer {
    struct vkp_i_answer *next; /* the younger answer of the local client */
    vkp_i_task task;           /* returns the answer to the local client's loop */
    vkp_i_local *local;        /* holds one reference */
    size_t bytes_allocated;    /* size of this allocation, shapes included */
    size_t asked_bytes;        /* bytes of the command, counted in local->asked_bytes */
    vkp_bytes bytes;           /* the reply to send, valid once `done` */
    bool done;                 /* the reply is complete; loop's thread of the local client */
    uint8_t protocol;          /* the local client's protocol when it sent the command */
    uint32_t shape_count;      /* for EXEC: number of shapes behind the struct, one per command */
    uint8_t shape;             /* VKP_I_SHAPE_* of a single command */
} vkp_i_answer;

/* A MULTI under way: the commands that wait for EXEC. */
typedef struct vkp_i_multi {
    vkp_resp_writer block; /* MULTI and the commands, encoded as they will be sent */
    uint8_t *shapes;       /* VKP_I_SHAPE_* of each command */
    size_t count;          /* commands in `block`, without MULTI */
    size_t capacity;       /* allocated bytes of `shapes` */
    bool failed;           /* a command was refused: EXEC answers EXECABORT */
} vkp_i_multi;

/* Bits of vkp_i_local.flags. */
#define VKP_I_LOCAL_BUSY 1u    /* paused: a SUBSCRIBE waits for the server */
#define VKP_I_LOCAL_ORDER 2u   /* paused until no answer is pending */
#define VKP_I_LOCAL_FULL 4u    /* paused: too many pending answers, or too many bytes queued */
#define VKP_I_LOCAL_LEAVING 8u /* drains when no answer and no SUBSCRIBE is pending */
#define VKP_I_LOCAL_CLOSED 16u /* the connection is closed */
#define VKP_I_LOCAL_FAILED 32u /* broke the protocol: drains when no answer is pending */

/* A local client. Its fields belong to its loop's thread, except `shard`, which loop 0 reads
   too.                                                                                        */
struct vkp_i_local {
    vkp_hub_member member; /* the client as a member of the shard's hub; holds the connection */
    vkp_i_shard *shard;    /* constant */
    vkp_i_local *prev;     /* newer local client of the shard, or NULL */
    vkp_i_local *next;     /* older local client of the shard, or NULL */
    uint64_t id;           /* number for CLIENT ID and the log */
    uint32_t refs;         /* loop's thread */
    uint32_t flags;        /* VKP_I_LOCAL_BUSY and the other bits */
    vkp_i_answer *answers; /* pending answers, oldest first */
    vkp_i_answer **answers_end; /* the NULL link where the next answer is appended */
    uint32_t answer_count;      /* number of pending answers */
    size_t asked_bytes;         /* bytes of the commands whose answers are pending */
    size_t held_bytes;          /* bytes of finished replies that wait for an older one */
    vkp_i_multi *multi;         /* NULL: no MULTI under way */
    vkp_resp_reader *reader;    /* of a large command that arrives in parts; NULL: the shard's */
    char *name;                 /* by SETNAME, terminated; or NULL */
};

/* The part of a relay on one loop. `relay`, `loop` and `pushes` are constant until vkp_relay_unref;
   every other field belongs to the loop's thread unless its comment names another owner.      */
struct vkp_i_shard {
    vkp_relay *relay;        /* no reference */
    vkp_loop *loop;          /* shared */
    vkp_hub *hub;            /* subscriptions of this shard's local clients */
    vkp_i_profile *profile;  /* config of the local clients' connections */
    vkp_resp_reader *reader; /* reads the requests of all local clients in turn */
    vkp_str *argv;           /* arguments of the command that is executed now */
    size_t argv_capacity;    /* allocated elements of `argv` */
    char *inline_text;       /* unquoted words of an inline command */
    size_t inline_capacity;  /* allocated bytes of `inline_text` */
    vkp_i_local *locals;     /* local clients, newest first */
    size_t local_count;      /* number of `locals` */
    /* descriptors queued for this loop; guarded by the relay's mutex */
    struct vkp_i_handover *handovers;
    bool draining;            /* drains, or ends: accepts no further local clients */
    bool gone;                /* drained, and taken off relay->live_shards */
    vkp_mpsc_tx *pushes;      /* sender of other loops to this shard; NULL where none sends */
    vkp_push_loop *push_loop; /* receives `pushes`; or NULL */
    vkp_i_task drain_task;    /* runs vkp_i_shard_drain on this loop */
    vkp_i_task kill_task;     /* runs vkp_i_shard_kill on this loop, at the drain's deadline */
};

/* Subscribers of one name over all shards. The name is behind the struct. */
typedef struct vkp_i_subscriber_count {
    vkp_i_map_node node; /* in relay->subscribers; its key is the name */
    size_t count;        /* above 0 */
} vkp_i_subscriber_count;

struct vkp_relay {
    const vkp_env *env;
    size_t refs;         /* atomic */
    vkp_i_shard *shards; /* one per loop */
    size_t shard_count;  /* number of `shards` */
    size_t next_shard;   /* which shard gets the next client, modulo shard_count; loop 0's thread */
    vkp_registry *registry;   /* of the Unix sockets that the relay listens on */
    vkp_gate *gate;           /* admits the clients of all listeners */
    size_t max_request_bytes; /* limit of one command, and of one MULTI block */
    size_t max_reply_bytes;   /* limit of the replies that a client has not read */
    size_t max_subscriptions; /* limit of the names of one client */
    vkp_client *client;       /* the upstream client; NULL: stand-alone */
    vkp_listener **listeners; /* loop 0's thread */
    size_t listener_count;    /* used places of `listeners` */
    size_t listener_capacity; /* allocated places of `listeners` */
    uint64_t next_id;         /* atomic: the last number given to a local client */
    VKP_I_MUTEX mutex;        /* guards `subscribers` and the shards' `handovers` */
    /* stand-alone: counts by kind and name; guarded by the mutex */
    vkp_i_map subscribers[VKP_SUB_KINDS];
    bool draining;               /* vkp_relay_drain was called; loop 0's thread */
    size_t live_shards;          /* atomic: shards that have not drained yet */
    vkp_timer drain_timer;       /* deadline of the drain; loop 0's */
    vkp_i_task end_task;         /* runs vkp_i_relay_end on loop 0 */
    void (*on_end)(void *user);  /* called on loop 0 at the end of a drain, or NULL */
    void *end_user;              /* argument of on_end */
    vkp_str notice;              /* text for clients at a drain: a copy, or NULL */
    void (*on_idle)(void *user); /* called on loop 0 after linger_ms without clients, or NULL */
    void *user;                  /* argument of on_idle */
    uint64_t linger_ms;          /* time without clients before on_idle */
    uint32_t idle_queued;        /* atomic: 1 while idle_task is queued */
    vkp_i_task idle_task;        /* starts idle_timer on loop 0; queued by any shard's thread */
    vkp_timer idle_timer;        /* runs for linger_ms; loop 0's */
    uint64_t messages_in;        /* atomic: messages from upstream, or by PUBLISH */
    uint64_t deliveries;         /* atomic: messages delivered to local clients */
    uint64_t lagged;             /* atomic: messages lost because a shard's channel was full */
    uint64_t slow_closed;        /* atomic: clients closed with VKP_CLOSE_SLOW */
    uint64_t protocol_errors;    /* atomic: clients closed for a protocol error */
};

static void vkp_i_relay_free(vkp_relay *relay)
{
    const vkp_env *env = relay->env;
    size_t i;
    int kind;
    for (i = 0; i < relay->shard_count; i++) {
        vkp_i_shard *shard = &relay->shards[i];
        vkp_hub_unref(shard->hub);
        vkp_resp_reader_unref(shard->reader);
        if (shard->profile != NULL) {
            vkp_i_profile_unref(shard->profile);
        }
        vkp_i_free(env, shard->argv, shard->argv_capacity * sizeof *shard->argv);
        vkp_i_free(env, shard->inline_text, shard->inline_capacity);
        vkp_loop_unref(shard->loop);
    }
    for (kind = 0; kind < VKP_SUB_KINDS; kind++) {
        vkp_i_map_deinit(&relay->subscribers[kind]);
    }
    vkp_gate_unref(relay->gate);
    vkp_registry_unref(relay->registry);
    vkp_i_free_str(env, relay->notice);
    vkp_i_free(env, relay->listeners, relay->listener_capacity * sizeof *relay->listeners);
    vkp_i_free(env, relay->shards, relay->shard_count * sizeof *relay->shards);
    VKP_I_MUTEX_DEINIT(&relay->mutex);
    vkp_i_free(env, relay, sizeof *relay);
}

/* Give one of `refs` back; the last one frees the relay. */
static void vkp_i_relay_release(vkp_relay *relay)
{
    if (VKP_I_UNREF(&relay->refs) == 1) {
        vkp_i_relay_free(relay);
    }
}

static size_t vkp_i_relay_count_clients(const vkp_relay *relay)
{
    vkp_gate_stats stats;
    vkp_gate_get_stats(relay->gate, &stats);
    return stats.clients;
}

/* ---- answers ---- */

/* Give one reference back, on the loop's thread; the last one frees the local client. */
static void vkp_i_local_release(vkp_i_local *local)
{
    vkp_relay *relay = local->shard->relay;
    if (--local->refs == 0) {
        vkp_resp_reader_unref(local->reader);
        vkp_i_free_text(relay->env, local->name);
        vkp_i_free(relay->env, local, sizeof *local);
        vkp_i_relay_release(relay);
    }
}

/* Write reply bytes now, or close later when there is no memory. */
static void vkp_i_local_send(vkp_i_local *local, const vkp_bytes *bytes)
{
    if (vkp_conn_send(local->member.conn, bytes) == VKP_ERR_NOMEM) {
        vkp_i_conn_close_later(local->member.conn, VKP_CLOSE_NOMEM, 0);
    }
}

/* No memory for this local client: close it later. */
static void vkp_i_local_fail(vkp_i_local *local)
{
    if ((local->flags & VKP_I_LOCAL_CLOSED) == 0) {
        vkp_i_conn_close_later(local->member.conn, VKP_CLOSE_NOMEM, 0);
    }
}

/* Above one of these limits a local client's commands are not read until all are down to half. */
#define VKP_I_MOST_ANSWERS 1024u            /* pending answers */
#define VKP_I_MOST_ASKED ((size_t)4 << 20)  /* bytes of commands whose answers are pending */
#define VKP_I_MOST_UNREAD ((size_t)1 << 20) /* bytes in the outbox that the kernel has not taken */

#define VKP_I_ERROR_TEXT 512 /* bytes of an error reply's text, terminated; a longer one is cut */

/* Answer the current command with an error. */
__attribute__((format(printf, 2, 3))) static void vkp_i_local_error(vkp_i_local *local,
                                                                    const char *format, ...);

/* Send the shutdown notice: a message to a client of RESP3 or with subscriptions, else an error
   reply (see vkp_relay_drain).                                                                */
static void vkp_i_local_notify(vkp_i_local *local)
{
    vkp_i_shard *shard = local->shard;
    const vkp_hub_member *member = &local->member;
    vkp_str notice = shard->relay->notice;
    if (member->protocol == 3 || member->counts[0] + member->counts[1] + member->counts[2] > 0) {
        vkp_i_message message;
        const vkp_bytes *frame;
        vkp_i_message_init(&message, "message", vkp_i_str(NULL, 0),
                           vkp_str_of(VKP_RELAY_NOTICE_CHANNEL), notice);
        frame = vkp_i_message_frame(shard->hub, &message, member->protocol);
        if (frame != NULL) {
            vkp_i_local_send(local, frame);
        }
    } else {
        vkp_i_local_error(local, "ERR %.*s", VKP_FMT(notice));
    }
}

/* Drain the local client's connection, after the shutdown notice if the shard drains. */
static void vkp_i_local_leave(vkp_i_local *local)
{
    if (local->shard->draining && local->shard->relay->notice.ptr != NULL &&
        (local->flags & VKP_I_LOCAL_FAILED) == 0 && !vkp_i_conn_is_draining(local->member.conn)) {
        vkp_i_local_notify(local);
    }
    vkp_conn_drain(local->member.conn);
}

/* Clear the reasons to pause that no longer hold. When none is left, read again, or drain a
   client that leaves.                                                                         */
static void vkp_i_local_maybe_resume(vkp_i_local *local)
{
    if ((local->flags & VKP_I_LOCAL_CLOSED) != 0) {
        return;
    }
    if (local->answers == NULL) {
        local->flags &= ~VKP_I_LOCAL_ORDER;
    }
    if ((local->flags & VKP_I_LOCAL_FULL) != 0 &&
        vkp_i_conn_get_queued_bytes(local->member.conn) > VKP_I_MOST_UNREAD / 2) {
        /* on_drain is called when the bytes left are written */
        vkp_i_conn_flush(local->member.conn);
    }
    if (local->answer_count < VKP_I_MOST_ANSWERS / 2 &&
        local->asked_bytes <= VKP_I_MOST_ASKED / 2 &&
        vkp_i_conn_get_queued_bytes(local->member.conn) <= VKP_I_MOST_UNREAD / 2) {
        local->flags &= ~VKP_I_LOCAL_FULL;
    }
    if ((local->flags & (VKP_I_LOCAL_BUSY | VKP_I_LOCAL_ORDER | VKP_I_LOCAL_FULL)) != 0) {
        return;
    }
    if ((local->flags & (VKP_I_LOCAL_FAILED | VKP_I_LOCAL_LEAVING)) != 0) {
        if (local->answers == NULL) { /* unread input is no whole command */
            vkp_i_local_leave(local);
        }
        return;
    }
    vkp_conn_resume(local->member.conn);
}

/* Stop reading; why is the VKP_I_LOCAL_* bit that vkp_i_local_maybe_resume clears. */
static void vkp_i_local_pause(vkp_i_local *local, uint32_t why)
{
    local->flags |= why;
    vkp_conn_pause(local->member.conn);
}

/* Above VKP_I_MOST_UNREAD: write as much as the kernel accepts, and pause if the outbox is still
   above it. on_drain resumes.                                                                 */
static void vkp_i_local_throttle(vkp_i_local *local)
{
    vkp_conn *conn = local->member.conn;
    if (vkp_i_conn_get_queued_bytes(conn) > VKP_I_MOST_UNREAD) {
        vkp_i_conn_flush(conn);
    }
    if (vkp_i_conn_get_queued_bytes(conn) > VKP_I_MOST_UNREAD) {
        vkp_i_local_pause(local, VKP_I_LOCAL_FULL);
    }
}

/* Free an answer and give its reference of the local client back. */
static void vkp_i_answer_free(vkp_i_answer *answer)
{
    vkp_i_local *local = answer->local;
    vkp_bytes_unref(&answer->bytes);
    vkp_i_free(local->shard->relay->env, answer, answer->bytes_allocated);
    vkp_i_local_release(local);
}

/* Send the finished answers at the head of the list, then resume or drain if possible. */
static void vkp_i_local_flush_answers(vkp_i_local *local)
{
    local->refs++;
    while (local->answers != NULL && local->answers->done) {
        vkp_i_answer *answer = local->answers;
        local->answers = answer->next;
        if (local->answers == NULL) {
            local->answers_end = &local->answers;
        }
        local->answer_count--;
        local->asked_bytes -= answer->asked_bytes;
        local->held_bytes -= answer->bytes.len;
        if ((local->flags & VKP_I_LOCAL_CLOSED) == 0) {
            vkp_i_local_send(local, &answer->bytes);
        }
        vkp_i_answer_free(answer);
    }
    vkp_i_local_maybe_resume(local);
    vkp_i_local_release(local);
}

/* Append a pending answer. NULL: no memory; the connection closes later. */
static vkp_i_answer *vkp_i_answer_new(vkp_i_local *local, size_t shape_count)
{
    size_t bytes = sizeof(vkp_i_answer) + shape_count;
    vkp_i_answer *answer = (vkp_i_answer *)vkp_i_alloc_zero(local->shard->relay->env, bytes);
    if (answer == NULL) {
        vkp_i_local_fail(local);
        return NULL;
    }
    answer->bytes_allocated = bytes;
    answer->local = local;
    answer->protocol = (uint8_t)local->member.protocol;
    answer->shape_count = (uint32_t)shape_count;
    local->refs++;
    *local->answers_end = answer;
    local->answers_end = &answer->next;
    local->answer_count++;
    if (local->answer_count >= VKP_I_MOST_ANSWERS) {
        vkp_i_local_pause(local, VKP_I_LOCAL_FULL);
    }
    return answer;
}

/* Answer the current command now, behind the pending answers. Takes the reference of bytes. */
static void vkp_i_local_answer(vkp_i_local *local, vkp_bytes bytes)
{
    vkp_i_answer *answer;
    if (local->answers == NULL) {
        vkp_i_local_send(local, &bytes);
        vkp_bytes_unref(&bytes);
        vkp_i_local_throttle(local);
        return;
    }
    answer = vkp_i_answer_new(local, 0);
    if (answer == NULL) {
        vkp_bytes_unref(&bytes);
        return;
    }
    answer->bytes = bytes;
    answer->done = true;
    local->held_bytes += bytes.len;
}

/* Answer with a static text of RESP. */
static void vkp_i_local_answer_static(vkp_i_local *local, const char *text)
{
    vkp_i_local_answer(local, vkp_bytes_static(text, strlen(text)));
}

/* Answer with the writer's bytes. No memory: the connection closes later. */
static void vkp_i_local_answer_writer(vkp_i_local *local, vkp_resp_writer *writer)
{
    vkp_bytes bytes;
    if (vkp_resp_writer_take(writer, &bytes) != VKP_OK) {
        vkp_i_local_fail(local);
        return;
    }
    vkp_i_local_answer(local, bytes);
}

/* The error reply "-<text>". Control bytes become blanks, because text may repeat bytes that the
   client sent.                                                                                */
static vkp_bytes vkp_i_error_bytes(const vkp_env *env, char *text)
{
    vkp_resp_writer writer;
    vkp_bytes bytes;
    char *at;
    for (at = text; *at != '\0'; at++) {
        *at = (unsigned char)*at < 0x20 || *at == 0x7f ? ' ' : *at;
    }
    vkp_resp_writer_init(&writer, env);
    vkp_resp_put_error(&writer, vkp_str_of(text));
    if (vkp_resp_writer_take(&writer, &bytes) != VKP_OK) {
        static const char none[] = "-ERR out of memory\r\n";
        bytes = vkp_bytes_static(none, sizeof none - 1);
    }
    return bytes;
}

__attribute__((format(printf, 2, 3))) static void vkp_i_local_error(vkp_i_local *local,
                                                                    const char *format, ...)
{
    char text[VKP_I_ERROR_TEXT];
    va_list arguments;
    va_start(arguments, format);
    (void)vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    vkp_i_local_answer(local, vkp_i_error_bytes(local->shard->relay->env, text));
}

#define VKP_I_SHORT_BYTES 64 /* most bytes of a client's text in an error reply */
#define VKP_I_SHORT(s) (int)VKP_I_MIN((s).len, (size_t)VKP_I_SHORT_BYTES), (s).ptr /* for %.*s */

/* A command's name in lower case and shortened, as servers write it in their errors. */
typedef struct vkp_i_verb {
    char text[VKP_I_SHORT_BYTES + 1];
} vkp_i_verb;

/* The command's name for an error reply. */
static vkp_i_verb vkp_i_verb_of(vkp_str name)
{
    vkp_i_verb verb;
    size_t len = VKP_I_MIN(name.len, sizeof verb.text - 1);
    size_t i;
    for (i = 0; i < len; i++) {
        verb.text[i] = vkp_i_lower(name.ptr[i]);
    }
    verb.text[len] = '\0';
    return verb;
}

#endif /* VKP_I_IO */

#if VKP_I_IO
/* ======================================================================================
   >>impl-relay-resp2   Relay: replies for clients of RESP2
   ======================================================================================
   The upstream connection speaks RESP3 (RESP2 only when the server has no RESP3). A reply for a
   client of RESP2 is converted on loop 0, when it arrives; a reply whose bytes mean the same in
   the client's protocol is shared without a copy. The shape of a command (VKP_I_SHAPE_*)
   describes where a server's RESP2 reply differs from a plain conversion of the types.
   vkp_i_local_forward runs on the local client's loop and hands the command and its answer to
   the upstream client. vkp_i_answer_on_reply runs on loop 0 and returns the answer as a task;
   vkp_i_answer_return runs on the local client's loop again. In between only loop
   0 touches the reply; of the local client loop 0 reads `shard` alone.                        */

/* ---- conversion of replies ---- */

/* Whether the received bytes mean the same in RESP2. */
static bool vkp_i_value_is_resp2(const vkp_value *value)
{
    uint32_t i;
    for (i = 0; i < value->span; i++) {
        const vkp_value *each = &value[i];
        bool plain = each->type == VKP_RESP_INTEGER || each->type == VKP_RESP_ARRAY ||
                     (each->type == VKP_RESP_STRING && (each->flags & VKP_VALUE_VERBATIM) == 0) ||
                     (each->type == VKP_RESP_ERROR && (each->flags & VKP_VALUE_SIMPLE) != 0);
        if (!plain || each->attributes != 0) {
            return false;
        }
    }
    return true;
}

/* Write an array of pairs as one flat array. */
static void vkp_i_put_flat(vkp_resp_writer *writer, const vkp_value *value)
{
    const vkp_value *each;
    const vkp_value *inner;
    size_t count = 0;
    for (each = vkp_value_get_first(value); each != NULL; each = vkp_value_get_next(value, each)) {
        count += each->type == VKP_RESP_ARRAY ? each->len : 1;
    }
    vkp_resp_put_aggregate(writer, VKP_RESP_ARRAY, count);
    for (each = vkp_value_get_first(value); each != NULL; each = vkp_value_get_next(value, each)) {
        if (each->type != VKP_RESP_ARRAY) {
            vkp_resp_put_value(writer, each, 2);
            continue;
        }
        for (inner = vkp_value_get_first(each); inner != NULL;
             inner = vkp_value_get_next(each, inner)) {
            vkp_resp_put_value(writer, inner, 2);
        }
    }
}

static void vkp_i_put_resp2(vkp_resp_writer *writer, const vkp_value *value, uint32_t shape);

/* Write the map of XREAD as an array of pairs: a stream's name and its entries. A deleted entry
   has a null array for its fields.                                                            */
static void vkp_i_put_pairs(vkp_resp_writer *writer, const vkp_value *value)
{
    const vkp_value *entry;
    const vkp_value *each = vkp_value_get_first(value);
    vkp_resp_put_aggregate(writer, VKP_RESP_ARRAY, value->len / 2);
    while (each != NULL) {
        const vkp_value *second = vkp_value_get_next(value, each);
        if (second == NULL) {
            break; /* a map has pairs */
        }
        vkp_resp_put_aggregate(writer, VKP_RESP_ARRAY, 2);
        vkp_resp_put_value(writer, each, 2);
        vkp_resp_put_aggregate(writer, VKP_RESP_ARRAY, second->len);
        for (entry = vkp_value_get_first(second); entry != NULL;
             entry = vkp_value_get_next(second, entry)) {
            vkp_i_put_resp2(writer, entry, VKP_I_SHAPE_NULL_LAST);
        }
        each = vkp_value_get_next(value, second);
    }
}

/* Write a RESP3 reply as the server would have written it to a RESP2 client. */
static void vkp_i_put_resp2(vkp_resp_writer *writer, const vkp_value *value, uint32_t shape)
{
    const vkp_value *each;
    if (value->type == VKP_RESP_NULL && (shape & VKP_I_SHAPE_NULL_ARRAY) != 0) {
        vkp_resp_put_raw(writer, "*-1\r\n", 5);
    } else if (value->type == VKP_RESP_ARRAY && (shape & VKP_I_SHAPE_FLAT) != 0) {
        vkp_i_put_flat(writer, value);
    } else if (value->type == VKP_RESP_MAP && (shape & VKP_I_SHAPE_PAIRS) != 0) {
        vkp_i_put_pairs(writer, value);
    } else if (value->type == VKP_RESP_ARRAY && (shape & VKP_I_SHAPE_NULL_ELEMENTS) != 0) {
        vkp_resp_put_aggregate(writer, VKP_RESP_ARRAY, value->len);
        for (each = vkp_value_get_first(value); each != NULL;
             each = vkp_value_get_next(value, each)) {
            vkp_i_put_resp2(writer, each, VKP_I_SHAPE_NULL_ARRAY);
        }
    } else if (value->type == VKP_RESP_ARRAY && (shape & VKP_I_SHAPE_NULL_LAST) != 0) {
        vkp_resp_put_aggregate(writer, VKP_RESP_ARRAY, value->len);
        for (each = vkp_value_get_first(value); each != NULL;
             each = vkp_value_get_next(value, each)) {
            bool last = vkp_value_get_next(value, each) == NULL;
            vkp_i_put_resp2(writer, each, last ? VKP_I_SHAPE_NULL_ARRAY : 0);
        }
    } else {
        vkp_resp_put_value(writer, value, 2);
    }
}

/* Write the reply of an EXEC: each element by the shape of its command. */
static void vkp_i_put_exec2(vkp_resp_writer *writer, const vkp_value *value, const uint8_t *shapes,
                            size_t count)
{
    const vkp_value *each;
    size_t i = 0;
    vkp_resp_put_aggregate(writer, VKP_RESP_ARRAY, value->len);
    for (each = vkp_value_get_first(value); each != NULL; each = vkp_value_get_next(value, each)) {
        vkp_i_put_resp2(writer, each, i < count ? shapes[i] : 0u);
        i++;
    }
}

/* The reply in the local client's protocol: shares the received bytes where they mean the same,
   otherwise converts.                                                                         */
static vkp_status vkp_i_answer_convert(const vkp_i_answer *answer, const vkp_env *env,
                                       const vkp_value *value, const vkp_bytes *frame,
                                       vkp_bytes *out)
{
    vkp_resp_writer writer;
    bool has_shape = answer->shape != 0 || answer->shape_count != 0;
    if (answer->protocol == 3
            ? value->i_has_nested == 0 && (value->type != VKP_RESP_NULL || value->flags == 0)
            : !has_shape && vkp_i_value_is_resp2(value)) {
        *out = vkp_bytes_ref(frame);
        return VKP_OK;
    }
    vkp_resp_writer_init(&writer, env);
    if (answer->protocol == 3) {
        vkp_resp_put_value(&writer, value, 3);
    } else if (answer->shape_count > 0 && value->type == VKP_RESP_ARRAY) {
        vkp_i_put_exec2(&writer, value, (const uint8_t *)(answer + 1), answer->shape_count);
    } else {
        vkp_i_put_resp2(&writer, value, answer->shape);
    }
    return vkp_resp_writer_take(&writer, out);
}

/* The answer is back on its local client's loop, with its reply: send it if no older answer is
   pending. Above max_reply_bytes the client closes later.                                     */
static void vkp_i_answer_return(vkp_i_task *task)
{
    vkp_i_answer *answer = VKP_CONTAINER(task, vkp_i_answer, task);
    vkp_i_local *local = answer->local;
    answer->done = true;
    local->held_bytes += answer->bytes.len;
    if ((local->flags & VKP_I_LOCAL_CLOSED) == 0 &&
        local->held_bytes + vkp_i_conn_get_queued_bytes(local->member.conn) >
            local->shard->relay->max_reply_bytes) {
        vkp_i_conn_close_later(local->member.conn, VKP_CLOSE_SLOW, 0);
    }
    vkp_i_local_flush_answers(local);
}

#define VKP_I_UPSTREAM_TEXT 160 /* bytes of the error texts below, terminated */

/* Loop 0: the upstream client has the reply, or failed. The local client belongs to its own
   loop: only its `shard` may be read here.                                                    */
static void vkp_i_answer_on_reply(void *user, vkp_status status, const vkp_value *value,
                                  const vkp_bytes *frame)
{
    vkp_i_answer *answer = (vkp_i_answer *)user;
    vkp_i_shard *shard = answer->local->shard;
    const vkp_env *env = shard->relay->env;
    char text[VKP_I_UPSTREAM_TEXT];
    if (status == VKP_OK) {
        status = vkp_i_answer_convert(answer, env, value, frame, &answer->bytes);
    }
    if (status != VKP_OK) {
        (void)snprintf(text, sizeof text, "%s",
                       status == VKP_ERR_REFUSED
                           ? "ERR the server speaks RESP2 only: no commands beside subscriptions"
                       : status == VKP_ERR_NOMEM
                           ? "ERR the relay is out of memory"
                           : "ERR the upstream connection was lost; the command may have run");
        answer->bytes = vkp_i_error_bytes(env, text);
    }
    if (vkp_i_on_loop(shard->loop)) {
        vkp_i_answer_return(&answer->task);
        return;
    }
    answer->task.fn = vkp_i_answer_return;
    if (!vkp_i_loop_queue(shard->loop, &answer->task)) {
        /* that loop is closed: no other thread uses its clients */
        vkp_i_answer_return(&answer->task);
    }
}

/* Send commands upstream; the last of their `replies` becomes the answer's reply. Local client's
   loop.                                                                                       */
static void vkp_i_local_forward(vkp_i_local *local, vkp_i_answer *answer, const vkp_bytes *commands,
                                uint32_t replies)
{
    vkp_relay *relay = local->shard->relay;
    char text[VKP_I_UPSTREAM_TEXT];
    vkp_status status;
    answer->asked_bytes = commands->len;
    local->asked_bytes += commands->len;
    if (local->asked_bytes > VKP_I_MOST_ASKED) {
        vkp_i_local_pause(local, VKP_I_LOCAL_FULL);
    }
    vkp_i_local_throttle(local);
    status = vkp_client_send(relay->client, commands, replies, vkp_i_answer_on_reply, answer);
    if (status != VKP_OK) {
        (void)snprintf(text, sizeof text, "%s",
                       status == VKP_ERR_FULL ? "ERR too many commands wait for the upstream server"
                       : status == VKP_ERR_NOMEM
                           ? "ERR the relay is out of memory"
                           : "ERR the relay is not connected to its upstream server");
        answer->bytes = vkp_i_error_bytes(relay->env, text);
        vkp_i_answer_return(&answer->task);
    }
}

#endif /* VKP_I_IO */

#if VKP_I_IO
/* ======================================================================================
   >>impl-relay-subscribe   Relay: subscriptions
   ======================================================================================
   How a SUBSCRIBE travels: on its local client's loop the client pauses (VKP_I_LOCAL_BUSY), and
   every name takes one interest of the upstream client. For each name the upstream client calls
   vkp_i_sub_item_done on loop 0, which returns the item to the local client's loop as a task
   (vkp_i_sub_item_return). The last item finishes the subscription: the names join the shard's
   hub, the confirmations are sent in the order of the names, and the client is read again. When
   every name has members in the shard already, and stand-alone, no item is sent to loop 0.
   Invariant: a topic of a shard's hub holds one interest of the upstream client. An
   interest beyond that is given back when its item returns, the topic's own by on_interest when
   its last member leaves.
   Stand-alone, relay->subscribers counts subscribers by name over all shards, guarded by the
   relay's mutex; a count changes together with the hub. With a server the counts are unused.  */

/* ---- subscriber counts ---- */

/* Count one subscriber of the name more (added) or less. False: no memory, only when added. */
static bool vkp_i_subscribers_add(vkp_relay *relay, vkp_sub_kind kind, vkp_str name, bool added)
{
    vkp_i_map *map = &relay->subscribers[kind];
    vkp_i_map_node *node;
    vkp_i_subscriber_count *entry = NULL;
    bool ok = true;
    VKP_I_LOCK(&relay->mutex);
    node = vkp_i_map_find(map, vkp_i_map_hash(map, name), name);
    if (node != NULL) {
        entry = VKP_CONTAINER(node, vkp_i_subscriber_count, node);
    } else if (added) {
        entry = (vkp_i_subscriber_count *)vkp_i_alloc_zero(relay->env, sizeof *entry + name.len);
        ok = entry != NULL;
        if (ok) {
            if (name.len > 0) {
                memcpy(entry + 1, name.ptr, name.len);
            }
            entry->node.key = vkp_i_str(entry + 1, name.len);
            entry->node.hash = vkp_i_map_hash(map, name);
            ok = vkp_i_map_insert(map, &entry->node);
        }
        if (!ok) {
            vkp_i_free(relay->env, entry, sizeof *entry + name.len);
            entry = NULL;
        }
    }
    if (entry != NULL) {
        entry->count += added ? (size_t)1 : (size_t)0 - 1;
        if (entry->count == 0) {
            vkp_i_map_remove(map, &entry->node);
            vkp_i_free(relay->env, entry, sizeof *entry + entry->node.key.len);
        }
    }
    VKP_I_UNLOCK(&relay->mutex);
    return ok;
}

/* Subscribers of a name over all shards. The relay's mutex is held. */
static size_t vkp_i_subscribers_count(vkp_relay *relay, vkp_sub_kind kind, vkp_str name)
{
    vkp_i_map *map = &relay->subscribers[kind];
    vkp_i_map_node *node = vkp_i_map_find(map, vkp_i_map_hash(map, name), name);
    return node != NULL ? VKP_CONTAINER(node, vkp_i_subscriber_count, node)->count : 0;
}

/* Number of subscriptions, over all shards, that receive a message published now: by name and by
   pattern.                                                                                    */
static size_t vkp_i_subscribers_receivers(vkp_relay *relay, vkp_sub_kind kind, vkp_str channel)
{
    vkp_i_map_node *node = NULL;
    size_t count;
    VKP_I_LOCK(&relay->mutex);
    count = vkp_i_subscribers_count(relay, kind, channel);
    while (kind == VKP_SUB_CHANNEL && relay->subscribers[VKP_SUB_PATTERN].count > 0 &&
           (node = vkp_i_map_get_next(&relay->subscribers[VKP_SUB_PATTERN], node)) != NULL) {
        if (vkp_glob_is_match(node->key, channel)) {
            count += VKP_CONTAINER(node, vkp_i_subscriber_count, node)->count;
        }
    }
    VKP_I_UNLOCK(&relay->mutex);
    return count;
}

/* ---- subscribing ---- */

typedef struct vkp_i_subscription vkp_i_subscription;

/* One name of a SUBSCRIBE. */
typedef struct vkp_i_sub_item {
    vkp_i_task task;                  /* returns the item to the local client's loop */
    vkp_i_subscription *subscription; /* holds this item */
    vkp_str name;                     /* behind the subscription's items */
    bool upstream;     /* one interest of the upstream client was taken for this name */
    vkp_status status; /* outcome from the upstream client */
    vkp_bytes words;   /* REFUSED: the server's words */
} vkp_i_sub_item;

/* One SUBSCRIBE under way, with its items and their names in one allocation. */
struct vkp_i_subscription {
    vkp_i_local *local;      /* holds one reference */
    vkp_sub_kind kind;       /* of all names */
    size_t bytes_allocated;  /* size of this allocation */
    size_t count;            /* number of `items` */
    size_t waiting;          /* items that have not returned; loop's thread */
    vkp_i_sub_item items[1]; /* `count` items, then the bytes of the names */
};

static const char *const vkp_i_sub_verbs[2][VKP_SUB_KINDS] = {
    {"unsubscribe", "punsubscribe", "sunsubscribe"}, {"subscribe", "psubscribe", "ssubscribe"}};

/* The number in a confirmation: channels and patterns together, shard channels alone. */
static size_t vkp_i_local_sub_count(const vkp_i_local *local, vkp_sub_kind kind)
{
    const uint32_t *counts = local->member.counts;
    return kind == VKP_SUB_SHARD ? counts[VKP_SUB_SHARD]
                                 : counts[VKP_SUB_CHANNEL] + counts[VKP_SUB_PATTERN];
}

/* Write the confirmation of one name; name.ptr NULL: an UNSUBSCRIBE without any name. */
static void vkp_i_put_confirmation(vkp_resp_writer *writer, const vkp_i_local *local, bool added,
                                   vkp_sub_kind kind, vkp_str name)
{
    const char *verb = vkp_i_sub_verbs[added ? 1 : 0][kind];
    int protocol = local->member.protocol;
    vkp_resp_put_aggregate(writer, protocol == 3 ? VKP_RESP_PUSH : VKP_RESP_ARRAY, 3);
    vkp_resp_put_bulk(writer, verb, strlen(verb));
    if (name.ptr == NULL) {
        vkp_resp_put_raw(writer, protocol == 3 ? "_\r\n" : "$-1\r\n", protocol == 3 ? 3 : 5);
    } else {
        vkp_resp_put_bulk(writer, name.ptr, name.len);
    }
    vkp_resp_put_integer(writer, (int64_t)vkp_i_local_sub_count(local, kind));
}

/* Give one interest of the upstream client back. */
static void vkp_i_relay_drop_interest(vkp_relay *relay, vkp_sub_kind kind, vkp_str name)
{
    if (relay->client != NULL &&
        vkp_client_unsubscribe(relay->client, kind, name) == VKP_ERR_NOMEM) {
        vkp_i_log(relay->env, VKP_LOG_ERROR, "out of memory: a name stays subscribed upstream");
    }
}

/* The hub's callback: a topic that lost its last member gives its upstream interest back. A new
   topic keeps the interest that its item took.                                                */
static void vkp_i_shard_on_interest(void *user, vkp_sub_kind kind, vkp_str name, bool added)
{
    vkp_i_shard *shard = (vkp_i_shard *)user;
    if (!added) {
        vkp_i_relay_drop_interest(shard->relay, kind, name);
    }
}

/* Subscribe in the hub and, stand-alone, count. False: no memory, nothing changed. */
static bool vkp_i_local_join_name(vkp_i_local *local, vkp_sub_kind kind, vkp_str name)
{
    vkp_relay *relay = local->shard->relay;
    bool added = false;
    if (vkp_hub_subscribe(local->shard->hub, &local->member, kind, name, &added) != VKP_OK) {
        return false;
    }
    if (added && relay->client == NULL && !vkp_i_subscribers_add(relay, kind, name, true)) {
        (void)vkp_hub_unsubscribe(local->shard->hub, &local->member, kind, name);
        return false;
    }
    return true;
}

/* Unsubscribe in the hub and, stand-alone, count. */
static void vkp_i_local_leave_name(vkp_i_local *local, vkp_sub_kind kind, vkp_str name)
{
    vkp_relay *relay = local->shard->relay;
    if (vkp_hub_is_subscribed(local->shard->hub, &local->member, kind, name)) {
        if (relay->client == NULL) { /* before the unsubscribe: name may be memory of the topic */
            (void)vkp_i_subscribers_add(relay, kind, name, false);
        }
        (void)vkp_hub_unsubscribe(local->shard->hub, &local->member, kind, name);
    }
}

/* Unsubscribe the local client from every name. */
static void vkp_i_local_leave_all(vkp_i_local *local)
{
    int kind;
    for (kind = 0; kind < VKP_SUB_KINDS; kind++) {
        while (local->member.counts[kind] > 0) {
            vkp_i_local_leave_name(local, (vkp_sub_kind)kind,
                                   vkp_hub_get_member_name(&local->member, (vkp_sub_kind)kind));
        }
    }
}

static void vkp_i_subscription_free(vkp_i_subscription *self)
{
    vkp_i_local *local = self->local;
    size_t i;
    for (i = 0; i < self->count; i++) {
        vkp_bytes_unref(&self->items[i].words);
    }
    vkp_i_free(local->shard->relay->env, self, self->bytes_allocated);
    vkp_i_local_release(local);
}

/* Join the hub with a name whose item has returned, and write its confirmation or error. False:
   the local client is closed or closes later.                                                 */
static bool vkp_i_subscription_end_item(vkp_i_subscription *self, vkp_i_sub_item *item,
                                        vkp_resp_writer *writer)
{
    vkp_i_local *local = self->local;
    vkp_relay *relay = local->shard->relay;
    bool closed = (local->flags & VKP_I_LOCAL_CLOSED) != 0;
    bool stands = item->status == VKP_OK || item->status == VKP_ERR_DISCONNECTED;
    bool topic_had_interest = vkp_hub_get_members(local->shard->hub, self->kind, item->name) > 0;
    if (!closed && stands && !vkp_i_local_join_name(local, self->kind, item->name)) {
        stands = false;
        closed = true;
        vkp_i_local_fail(local);
    }
    /* A new topic keeps the item's interest; otherwise the interest is given back. */
    if (item->upstream && (closed || topic_had_interest || !stands) &&
        item->status != VKP_ERR_CLOSED) {
        vkp_i_relay_drop_interest(relay, self->kind, item->name);
    }
    if (closed) {
        return false;
    }
    if (stands) {
        vkp_i_put_confirmation(writer, local, true, self->kind, item->name);
    } else {
        vkp_str words = vkp_i_str(item->words.data, item->words.len);
        vkp_resp_put_error(writer,
                           words.len > 0 ? words : vkp_str_of("ERR the relay could not subscribe"));
    }
    return true;
}

/* Every item has returned: join the hub, send the confirmations, read the client again. */
static void vkp_i_subscription_finish(vkp_i_subscription *self)
{
    vkp_i_local *local = self->local;
    vkp_resp_writer writer;
    bool alive = true;
    size_t i;
    vkp_resp_writer_init(&writer, local->shard->relay->env);
    for (i = 0; i < self->count; i++) {
        alive = vkp_i_subscription_end_item(self, &self->items[i], &writer) && alive;
    }
    if (alive) {
        vkp_i_local_answer_writer(local, &writer);
    } else {
        vkp_resp_writer_deinit(&writer);
    }
    local->flags &= ~VKP_I_LOCAL_BUSY;
    vkp_i_local_maybe_resume(local);
    vkp_i_subscription_free(self);
}

/* The item is back on its local client's loop. */
static void vkp_i_sub_item_return(vkp_i_task *task)
{
    vkp_i_sub_item *item = VKP_CONTAINER(task, vkp_i_sub_item, task);
    if (--item->subscription->waiting == 0) {
        vkp_i_subscription_finish(item->subscription);
    }
}

/* Loop 0: the upstream client has the outcome of one name; return the item to its loop. */
static void vkp_i_sub_item_done(void *user, vkp_status status, vkp_str words)
{
    vkp_i_sub_item *item = (vkp_i_sub_item *)user;
    vkp_loop *loop = item->subscription->local->shard->loop;
    item->status = status;
    if (status == VKP_ERR_REFUSED) { /* without memory the client gets a text of the relay */
        (void)!vkp_bytes_copy(item->subscription->local->shard->relay->env, words.ptr, words.len,
                              &item->words);
    }
    item->task.fn = vkp_i_sub_item_return;
    if (vkp_i_on_loop(loop) || !vkp_i_loop_queue(loop, &item->task)) {
        vkp_i_sub_item_return(&item->task);
    }
}

/* A subscription with copies of the names, or NULL: no memory. */
static vkp_i_subscription *vkp_i_subscription_new(vkp_i_local *local, vkp_sub_kind kind,
                                                  size_t count, const vkp_str *names)
{
    vkp_i_subscription *self;
    size_t bytes = sizeof *self + count * sizeof(vkp_i_sub_item);
    char *text;
    size_t i;
    for (i = 0; i < count; i++) {
        bytes += names[i].len;
    }
    self = (vkp_i_subscription *)vkp_i_alloc_zero(local->shard->relay->env, bytes);
    if (self == NULL) {
        return NULL;
    }
    self->bytes_allocated = bytes;
    self->local = local;
    self->kind = kind;
    self->count = count;
    local->refs++;
    text = (char *)&self->items[count];
    for (i = 0; i < count; i++) {
        self->items[i].subscription = self;
        if (names[i].len > 0) {
            memcpy(text, names[i].ptr, names[i].len);
        }
        self->items[i].name = vkp_i_str(text, names[i].len);
        text += names[i].len;
    }
    return self;
}

/* SUBSCRIBE, PSUBSCRIBE or SSUBSCRIBE with count names. */
static void vkp_i_local_subscribe(vkp_i_local *local, vkp_sub_kind kind, size_t count,
                                  const vkp_str *names)
{
    vkp_relay *relay = local->shard->relay;
    vkp_i_subscription *self = vkp_i_subscription_new(local, kind, count, names);
    bool ask = false;
    vkp_status status;
    size_t i;
    if (self == NULL) {
        vkp_i_local_fail(local);
        return;
    }
    /* If one name must wait for the server, every name takes an interest: the members that a name
       has now may leave before the items return, and the topic's interest would end with them. */
    for (i = 0; i < count && relay->client != NULL; i++) {
        ask = ask || vkp_hub_get_members(local->shard->hub, kind, names[i]) == 0;
    }
    vkp_i_local_pause(local, VKP_I_LOCAL_BUSY);
    self->waiting = 1; /* 1 until every name is submitted: no item finishes before that */
    for (i = 0; i < count; i++) {
        vkp_i_sub_item *item = &self->items[i];
        if (!ask) {
            item->status = VKP_OK;
            continue;
        }
        item->upstream = true;
        self->waiting++;
        status =
            vkp_client_subscribe_then(relay->client, kind, item->name, vkp_i_sub_item_done, item);
        if (status != VKP_OK) { /* on OK loop 0 owns the item: it may have returned already */
            item->status = status;
            item->upstream = false;
            self->waiting--;
        }
    }
    if (--self->waiting == 0) {
        vkp_i_subscription_finish(self);
    }
}

/* UNSUBSCRIBE, PUNSUBSCRIBE or SUNSUBSCRIBE with count names; 0: all names of the kind. */
static void vkp_i_local_unsubscribe(vkp_i_local *local, vkp_sub_kind kind, size_t count,
                                    const vkp_str *names)
{
    vkp_resp_writer writer;
    size_t i;
    vkp_resp_writer_init(&writer, local->shard->relay->env);
    for (i = 0; i < count; i++) {
        vkp_i_local_leave_name(local, kind, names[i]);
        vkp_i_put_confirmation(&writer, local, false, kind, names[i]);
    }
    if (count == 0 && local->member.counts[kind] == 0) {
        vkp_i_put_confirmation(&writer, local, false, kind, vkp_i_str(NULL, 0));
    }
    while (count == 0 && local->member.counts[kind] > 0) {
        vkp_str name = vkp_hub_get_member_name(&local->member, kind);
        vkp_bytes copy;
        if (vkp_bytes_copy(local->shard->relay->env, name.ptr, name.len, &copy) != VKP_OK) {
            vkp_i_local_fail(local);
            break;
        }
        vkp_i_local_leave_name(local, kind, name);
        vkp_i_put_confirmation(&writer, local, false, kind, vkp_i_str(copy.data, copy.len));
        vkp_bytes_unref(&copy);
    }
    vkp_i_local_answer_writer(local, &writer);
}

#endif /* VKP_I_IO */

#if VKP_I_IO
/* ======================================================================================
   >>impl-relay-commands   Relay: commands
   ======================================================================================
   Execute one command of a local client, on that client's loop. vkp_i_local_execute decides by
   the table vkp_i_commands: wait until no answer is pending, refuse (the command would block or
   change the one upstream connection), hold for EXEC, answer here, or forward upstream. Commands
   outside the table are forwarded, and stand-alone refused.
   Each command is answered once, in its order: at once by its vkp_i_run_* function, or later by
   an answer or a subscription under way.
   Stand-alone, PUBLISH delivers to its own shard's hub and sends the message to every other
   shard's channel; push loops deliver it there. The relay's mutex is taken for subscriber counts
   only.                                                                                       */

/* ---- commands ---- */

/* Bits of vkp_i_command.flags, besides the VKP_I_SHAPE_* bits. */
#define VKP_I_CMD_SHAPES 0x00ffu /* mask of the VKP_I_SHAPE_* bits */
#define VKP_I_CMD_ORDER 0x0100u  /* executed when no answer is pending */
#define VKP_I_CMD_LOCAL 0x0200u  /* answered by the relay, with or without a server */
#define VKP_I_CMD_ALONE 0x0400u  /* answered by a stand-alone relay, otherwise forwarded */
#define VKP_I_CMD_SUB2 0x0800u   /* allowed to a RESP2 client with subscriptions */
#define VKP_I_CMD_BLOCKS 0x1000u /* refused: blocks the upstream connection for all clients */
#define VKP_I_CMD_STATE 0x2000u  /* refused: changes the state of the upstream connection */
#define VKP_I_CMD_MULTI 0x4000u  /* executed inside MULTI, not held until EXEC */
#define VKP_I_CMD_MAYBE 0x8000u  /* refused only with a BLOCK argument */

typedef void (*vkp_i_command_fn)(vkp_i_local *local, size_t argc, const vkp_str *argv);

typedef struct vkp_i_command {
    const char *name;     /* lower case; the table is sorted by name */
    vkp_i_command_fn run; /* answers the command; NULL: forwarded or refused */
    uint32_t flags;       /* VKP_I_CMD_* and VKP_I_SHAPE_* bits */
} vkp_i_command;

/* Whether argc is between least and most, the command's name included; otherwise an error is
   answered.                                                                                   */
static bool vkp_i_local_arity(vkp_i_local *local, size_t argc, size_t least, size_t most,
                              const vkp_str *argv)
{
    if (argc < least || argc > most) {
        vkp_i_local_error(local, "ERR wrong number of arguments for '%s' command",
                          vkp_i_verb_of(argv[0]).text);
        return false;
    }
    return true;
}

static void vkp_i_run_ping(vkp_i_local *local, size_t argc, const vkp_str *argv)
{
    vkp_resp_writer writer;
    bool subscribed =
        vkp_i_local_sub_count(local, VKP_SUB_CHANNEL) + local->member.counts[VKP_SUB_SHARD] > 0;
    if (!vkp_i_local_arity(local, argc, 1, 2, argv)) {
        return;
    }
    vkp_resp_writer_init(&writer, local->shard->relay->env);
    if (subscribed && local->member.protocol == 2) {
        vkp_resp_put_aggregate(&writer, VKP_RESP_ARRAY, 2);
        vkp_resp_put_bulk(&writer, "pong", 4);
        vkp_resp_put_bulk(&writer, argc > 1 ? argv[1].ptr : "", argc > 1 ? argv[1].len : 0);
    } else if (argc > 1) {
        vkp_resp_put_bulk(&writer, argv[1].ptr, argv[1].len);
    } else {
        vkp_i_local_answer_static(local, "+PONG\r\n");
        return;
    }
    vkp_i_local_answer_writer(local, &writer);
}

static void vkp_i_run_echo(vkp_i_local *local, size_t argc, const vkp_str *argv)
{
    vkp_resp_writer writer;
    if (vkp_i_local_arity(local, argc, 2, 2, argv)) {
        vkp_resp_writer_init(&writer, local->shard->relay->env);
        vkp_resp_put_bulk(&writer, argv[1].ptr, argv[1].len);
        vkp_i_local_answer_writer(local, &writer);
    }
}

/* Set the client's name: printable bytes without blanks, as servers require; empty removes it.
   False: an error was answered, or no memory.                                                 */
static bool vkp_i_local_set_name(vkp_i_local *local, vkp_str name)
{
    const vkp_env *env = local->shard->relay->env;
    char *copy = NULL;
    size_t i;
    for (i = 0; i < name.len; i++) {
        if (name.ptr[i] < '!' || name.ptr[i] > '~') {
            vkp_i_local_error(local, "ERR Client names cannot contain spaces, newlines or special "
                                     "characters.");
            return false;
        }
    }
    if (name.len > 0) {
        copy = (char *)vkp_i_alloc(env, name.len + 1);
        if (copy == NULL) {
            vkp_i_local_fail(local);
            return false;
        }
        memcpy(copy, name.ptr, name.len);
        copy[name.len] = '\0';
    }
    vkp_i_free_text(env, local->name);
    local->name = copy;
    return true;
}

/* Begin a map; in RESP2 an array of twice the elements. */
static void vkp_i_put_map(vkp_resp_writer *writer, int protocol, size_t pairs)
{
    if (protocol == 3) {
        vkp_resp_put_aggregate(writer, VKP_RESP_MAP, pairs);
    } else {
        vkp_resp_put_aggregate(writer, VKP_RESP_ARRAY, pairs * 2);
    }
}

static void vkp_i_put_text(vkp_resp_writer *writer, const char *text)
{
    vkp_resp_put_bulk(writer, text, strlen(text));
}

/* Answer HELLO. */
static void vkp_i_local_greet(vkp_i_local *local)
{
    vkp_resp_writer writer;
    vkp_resp_writer_init(&writer, local->shard->relay->env);
    vkp_i_put_map(&writer, local->member.protocol, 7);
    vkp_i_put_text(&writer, "server");
    vkp_i_put_text(&writer, "valkey-push-relay");
    vkp_i_put_text(&writer, "version");
    vkp_i_put_text(&writer, VKP_VERSION_STR);
    vkp_i_put_text(&writer, "proto");
    vkp_resp_put_integer(&writer, local->member.protocol);
    vkp_i_put_text(&writer, "id");
    vkp_resp_put_integer(&writer, (int64_t)local->id);
    vkp_i_put_text(&writer, "mode");
    vkp_i_put_text(&writer, "standalone");
    vkp_i_put_text(&writer, "role");
    vkp_i_put_text(&writer, "master");
    vkp_i_put_text(&writer, "modules");
    vkp_resp_put_aggregate(&writer, VKP_RESP_ARRAY, 0);
    vkp_i_local_answer_writer(local, &writer);
}

#define VKP_I_PROTOCOL_DIGITS 19 /* HELLO's version is an integer only with fewer digits */

static const char vkp_i_no_auth[] =
    "ERR the relay takes no passwords: its socket's permissions decide who may connect";

/* HELLO [protocol [AUTH user password] [SETNAME name]]: answered here, never forwarded. */
static void vkp_i_run_hello(vkp_i_local *local, size_t argc, const vkp_str *argv)
{
    int protocol = local->member.protocol;
    vkp_str name = vkp_i_str(NULL, 0);
    size_t i = 2;
    if (argc > 1) {
        if (argv[1].len != 1 || (argv[1].ptr[0] != '2' && argv[1].ptr[0] != '3')) {
            bool number = argv[1].len > 0 && argv[1].len < VKP_I_PROTOCOL_DIGITS;
            for (i = 0; i < argv[1].len; i++) {
                number = number && argv[1].ptr[i] >= '0' && argv[1].ptr[i] <= '9';
            }
            vkp_i_local_error(local, "%s",
                              number ? "NOPROTO unsupported protocol version"
                                     : "ERR Protocol version is not an integer or "
                                       "out of range");
            return;
        }
        protocol = argv[1].ptr[0] - '0';
    }
    while (i < argc) {
        if (vkp_i_str_is(argv[i], "SETNAME") && i + 1 < argc) {
            name = argv[i + 1];
            i += 2;
        } else if (vkp_i_str_is(argv[i], "AUTH") && i + 2 < argc) {
            vkp_i_local_error(local, "%s", vkp_i_no_auth);
            return;
        } else {
            vkp_i_local_error(local, "ERR Syntax error in HELLO option '%.*s'",
                              VKP_I_SHORT(argv[i]));
            return;
        }
    }
    if (name.ptr == NULL || vkp_i_local_set_name(local, name)) {
        local->member.protocol = protocol;
        vkp_i_local_greet(local);
    }
}

static void vkp_i_run_auth(vkp_i_local *local, size_t argc, const vkp_str *argv)
{
    (void)argc;
    (void)argv;
    vkp_i_local_error(local, "%s", vkp_i_no_auth);
}

static void vkp_i_multi_free(vkp_i_local *local)
{
    const vkp_env *env = local->shard->relay->env;
    vkp_i_multi *multi = local->multi;
    if (multi != NULL) {
        vkp_resp_writer_deinit(&multi->block);
        vkp_i_free(env, multi->shapes, multi->capacity);
        vkp_i_free(env, multi, sizeof *multi);
        local->multi = NULL;
    }
}

/* RESET: forget MULTI, subscriptions, name and protocol of this client. */
static void vkp_i_run_reset(vkp_i_local *local, size_t argc, const vkp_str *argv)
{
    (void)argc;
    (void)argv;
    vkp_i_multi_free(local);
    vkp_i_local_leave_all(local);
    (void)vkp_i_local_set_name(local, vkp_i_str(NULL, 0));
    local->member.protocol = 2;
    vkp_i_local_answer_static(local, "+RESET\r\n");
}

static void vkp_i_run_quit(vkp_i_local *local, size_t argc, const vkp_str *argv)
{
    (void)argc;
    (void)argv;
    vkp_i_local_answer_static(local, "+OK\r\n");
    vkp_conn_drain(local->member.conn);
}

#define VKP_I_INFO_TEXT 320 /* bytes of the texts of CLIENT INFO and INFO, terminated */

/* Answer CLIENT INFO. */
static void vkp_i_local_client_info(vkp_i_local *local)
{
    char text[VKP_I_INFO_TEXT];
    vkp_resp_writer writer;
    const uint32_t *counts = local->member.counts;
    (void)snprintf(text, sizeof text,
                   "id=%llu fd=%d name=%.128s db=0 sub=%u psub=%u ssub=%u multi=%d resp=%d\n",
                   (unsigned long long)local->id, vkp_conn_get_fd(local->member.conn),
                   local->name != NULL ? local->name : "", (unsigned)counts[VKP_SUB_CHANNEL],
                   (unsigned)counts[VKP_SUB_PATTERN], (unsigned)counts[VKP_SUB_SHARD],
                   local->multi != NULL ? (int)local->multi->count : -1, local->member.protocol);
    vkp_resp_writer_init(&writer, local->shard->relay->env);
    vkp_i_put_text(&writer, text);
    vkp_i_local_answer_writer(local, &writer);
}

static void vkp_i_local_forward_command(vkp_i_local *local, size_t argc, const vkp_str *argv,
                                        uint32_t shape);

/* CLIENT: subcommands about this connection are answered here, those that would change the
   upstream connection refused, others forwarded.                                              */
static void vkp_i_run_client(vkp_i_local *local, size_t argc, const vkp_str *argv)
{
    static const char *const refused[] = {"REPLY",    "TRACKING",     "CACHING",  "NO-EVICT",
                                          "NO-TOUCH", "TRACKINGINFO", "GETREDIR", "CAPA"};
    vkp_resp_writer writer;
    size_t i;
    if (!vkp_i_local_arity(local, argc, 2, SIZE_MAX, argv)) {
        return;
    }
    for (i = 0; i < sizeof refused / sizeof refused[0]; i++) {
        if (vkp_i_str_is(argv[1], refused[i])) {
            vkp_i_local_error(local,
                              "ERR CLIENT %s cannot be shared: it would change the relay's "
                              "one upstream connection",
                              refused[i]);
            return;
        }
    }
    vkp_resp_writer_init(&writer, local->shard->relay->env);
    if (vkp_i_str_is(argv[1], "ID")) {
        vkp_resp_put_integer(&writer, (int64_t)local->id);
        vkp_i_local_answer_writer(local, &writer);
    } else if (vkp_i_str_is(argv[1], "SETNAME") && argc == 3) {
        if (vkp_i_local_set_name(local, argv[2])) {
            vkp_i_local_answer_static(local, "+OK\r\n");
        }
    } else if (vkp_i_str_is(argv[1], "GETNAME")) {
        if (local->name != NULL) {
            vkp_i_put_text(&writer, local->name);
        } else {
            vkp_resp_put_raw(&writer, local->member.protocol == 3 ? "_\r\n" : "$-1\r\n",
                             local->member.protocol == 3 ? 3 : 5);
        }
        vkp_i_local_answer_writer(local, &writer);
    } else if (vkp_i_str_is(argv[1], "SETINFO") && argc == 4) {
        vkp_i_local_answer_static(local, "+OK\r\n"); /* accepted and not stored */
    } else if (vkp_i_str_is(argv[1], "INFO")) {
        vkp_i_local_client_info(local);
    } else if (local->shard->relay->client != NULL) {
        vkp_i_local_forward_command(local, argc, argv, 0);
    } else {
        vkp_i_local_error(local, "ERR unknown subcommand or wrong number of arguments for '%.*s'",
                          VKP_I_SHORT(argv[1]));
    }
}

static void vkp_i_run_subscribe(vkp_i_local *local, size_t argc, const vkp_str *argv)
{
    vkp_sub_kind kind = vkp_i_lower(argv[0].ptr[0]) == 'p'   ? VKP_SUB_PATTERN
                        : vkp_i_lower(argv[0].ptr[1]) == 's' ? VKP_SUB_SHARD
                                                             : VKP_SUB_CHANNEL;
    const uint32_t *counts = local->member.counts;
    size_t names = (size_t)counts[0] + counts[1] + counts[2];
    size_t most = local->shard->relay->max_subscriptions;
    if (!vkp_i_local_arity(local, argc, 2, SIZE_MAX, argv)) {
        return;
    }
    if (names > most || argc - 1 > most - names) {
        vkp_i_local_error(local, "ERR more than %zu subscriptions of one client", most);
        return;
    }
    vkp_i_local_subscribe(local, kind, argc - 1, argv + 1);
}

static void vkp_i_run_unsubscribe(vkp_i_local *local, size_t argc, const vkp_str *argv)
{
    char first = vkp_i_lower(argv[0].ptr[0]);
    vkp_sub_kind kind = first == 'p'   ? VKP_SUB_PATTERN
                        : first == 's' ? VKP_SUB_SHARD
                                       : VKP_SUB_CHANNEL;
    vkp_i_local_unsubscribe(local, kind, argc - 1, argv + 1);
}

#define VKP_I_SHARD_LAG ((size_t)64 << 20) /* capacity in bytes of a shard's channel of pushes */

/* Send a push to another shard's loop; without room it is lost and counted. Takes the push's
   reference.                                                                                  */
static void vkp_i_shard_forward(vkp_i_shard *shard, vkp_push *push)
{
    if (vkp_mpsc_try_send(shard->pushes, push) != VKP_OK) {
        (void)VKP_I_ADD(&shard->relay->lagged, (uint64_t)1);
        vkp_i_log(shard->relay->env, VKP_LOG_ERROR,
                  "a loop is %zu MiB behind: a message is lost for its clients",
                  VKP_I_SHARD_LAG >> 20);
        vkp_push_unref(push);
    }
}

/* PUBLISH and SPUBLISH, stand-alone: deliver to this shard's members, and send a push to each other
   shard.                                                                                      */
static void vkp_i_run_publish(vkp_i_local *local, size_t argc, const vkp_str *argv)
{
    vkp_i_shard *shard = local->shard;
    vkp_relay *relay = shard->relay;
    vkp_sub_kind kind = vkp_i_lower(argv[0].ptr[0]) == 's' ? VKP_SUB_SHARD : VKP_SUB_CHANNEL;
    vkp_resp_writer writer;
    size_t receivers;
    size_t i;
    if (!vkp_i_local_arity(local, argc, 3, 3, argv)) {
        return;
    }
    (void)VKP_I_ADD(&relay->messages_in, (uint64_t)1);
    receivers = relay->shard_count > 1 ? vkp_i_subscribers_receivers(relay, kind, argv[1]) : 0;
    for (i = 0; i < relay->shard_count && receivers > 0; i++) {
        vkp_push push;
        if (&relay->shards[i] == shard) {
            continue;
        }
        memset(&push, 0, sizeof push);
        push.kind = kind == VKP_SUB_SHARD ? VKP_PUSH_SMESSAGE : VKP_PUSH_MESSAGE;
        push.sub = kind;
        vkp_resp_writer_init(&writer, relay->env);
        vkp_resp_put_raw(&writer, argv[1].ptr, argv[1].len);
        vkp_resp_put_raw(&writer, argv[2].ptr, argv[2].len);
        if (vkp_resp_writer_take(&writer, &push.frame) == VKP_OK) {
            push.channel = vkp_i_str(push.frame.data, argv[1].len);
            push.payload = vkp_i_str(push.frame.data + argv[1].len, argv[2].len);
            vkp_i_shard_forward(&relay->shards[i], &push);
        }
    }
    i = vkp_hub_publish(shard->hub, kind, argv[1], argv[2]);
    (void)VKP_I_ADD(&relay->deliveries, (uint64_t)i);
    vkp_resp_writer_init(&writer, relay->env);
    vkp_resp_put_integer(&writer, (int64_t)(relay->shard_count > 1 ? receivers : i));
    vkp_i_local_answer_writer(local, &writer);
}

/* Write the subscribed names that match the pattern (NULL: all). The relay's mutex is held. */
static void vkp_i_put_channels(vkp_resp_writer *writer, vkp_relay *relay, vkp_sub_kind kind,
                               const vkp_str *pattern)
{
    vkp_i_map_node *node = NULL;
    size_t count = 0;
    while ((node = vkp_i_map_get_next(&relay->subscribers[kind], node)) != NULL) {
        count += pattern == NULL || vkp_glob_is_match(*pattern, node->key) ? 1u : 0u;
    }
    vkp_resp_put_aggregate(writer, VKP_RESP_ARRAY, count);
    while ((node = vkp_i_map_get_next(&relay->subscribers[kind], node)) != NULL) {
        if (pattern == NULL || vkp_glob_is_match(*pattern, node->key)) {
            vkp_resp_put_bulk(writer, node->key.ptr, node->key.len);
        }
    }
}

#define VKP_I_SHARD_PREFIX (sizeof "SHARD" - 1) /* of PUBSUB SHARDCHANNELS and SHARDNUMSUB */

/* PUBSUB, stand-alone: answered from the subscriber counts. */
static void vkp_i_run_pubsub(vkp_i_local *local, size_t argc, const vkp_str *argv)
{
    vkp_relay *relay = local->shard->relay;
    vkp_resp_writer writer;
    vkp_sub_kind kind;
    vkp_str what;
    bool known = true;
    size_t i;
    if (!vkp_i_local_arity(local, argc, 2, SIZE_MAX, argv)) {
        return;
    }
    kind = argv[1].len > VKP_I_SHARD_PREFIX &&
                   vkp_i_str_is(vkp_i_str(argv[1].ptr, VKP_I_SHARD_PREFIX), "SHARD")
               ? VKP_SUB_SHARD
               : VKP_SUB_CHANNEL;
    what = kind == VKP_SUB_SHARD
               ? vkp_i_str(argv[1].ptr + VKP_I_SHARD_PREFIX, argv[1].len - VKP_I_SHARD_PREFIX)
               : argv[1];
    vkp_resp_writer_init(&writer, relay->env);
    VKP_I_LOCK(&relay->mutex);
    if (vkp_i_str_is(what, "CHANNELS") && argc <= 3) {
        vkp_i_put_channels(&writer, relay, kind, argc == 3 ? &argv[2] : NULL);
    } else if (vkp_i_str_is(what, "NUMSUB")) {
        vkp_i_put_map(&writer, 2, argc - 2);
        for (i = 2; i < argc; i++) {
            vkp_resp_put_bulk(&writer, argv[i].ptr, argv[i].len);
            vkp_resp_put_integer(&writer, (int64_t)vkp_i_subscribers_count(relay, kind, argv[i]));
        }
    } else if (vkp_i_str_is(argv[1], "NUMPAT") && argc == 2) {
        vkp_resp_put_integer(&writer, (int64_t)relay->subscribers[VKP_SUB_PATTERN].count);
    } else {
        known = false;
    }
    VKP_I_UNLOCK(&relay->mutex);
    if (known) {
        vkp_i_local_answer_writer(local, &writer);
    } else {
        vkp_i_local_error(local, "ERR unknown subcommand or wrong number of arguments for '%.*s'",
                          VKP_I_SHORT(argv[1]));
    }
}

/* COMMAND and CONFIG, stand-alone: client libraries send them on connect. The answers are empty. */
static void vkp_i_run_command(vkp_i_local *local, size_t argc, const vkp_str *argv)
{
    vkp_resp_writer writer;
    vkp_resp_writer_init(&writer, local->shard->relay->env);
    if (argc > 1 && vkp_i_str_is(argv[1], "COUNT")) {
        vkp_resp_put_integer(&writer, 0);
    } else if ((argc > 1 && vkp_i_str_is(argv[1], "DOCS")) || vkp_i_str_is(argv[0], "CONFIG")) {
        vkp_i_put_map(&writer, local->member.protocol, 0);
    } else {
        vkp_resp_put_aggregate(&writer, VKP_RESP_ARRAY, 0);
    }
    vkp_i_local_answer_writer(local, &writer);
}

static void vkp_i_run_info(vkp_i_local *local, size_t argc, const vkp_str *argv)
{
    vkp_relay *relay = local->shard->relay;
    char text[VKP_I_INFO_TEXT];
    vkp_resp_writer writer;
    (void)argc;
    (void)argv;
    (void)snprintf(text, sizeof text,
                   "# Server\r\nvalkey_push_version:%s\r\nredis_mode:standalone\r\n"
                   "# Clients\r\nconnected_clients:%llu\r\n# Persistence\r\nloading:0\r\n",
                   VKP_VERSION_STR, (unsigned long long)vkp_i_relay_count_clients(relay));
    vkp_resp_writer_init(&writer, relay->env);
    vkp_i_put_text(&writer, text);
    vkp_i_local_answer_writer(local, &writer);
}

/* ---- MULTI ---- */

/* MULTI: hold the commands that follow until EXEC. */
static void vkp_i_run_multi(vkp_i_local *local, size_t argc, const vkp_str *argv)
{
    const vkp_env *env = local->shard->relay->env;
    vkp_str verb = vkp_str_of("MULTI");
    if (local->shard->relay->client == NULL) {
        vkp_i_local_error(local, "ERR MULTI needs an upstream server: this relay stands alone");
        return;
    }
    if (!vkp_i_local_arity(local, argc, 1, 1, argv)) {
        return;
    }
    if (local->multi != NULL) {
        vkp_i_local_error(local, "ERR MULTI calls can not be nested");
        return;
    }
    local->multi = (vkp_i_multi *)vkp_i_alloc_zero(env, sizeof *local->multi);
    if (local->multi == NULL) {
        vkp_i_local_fail(local);
        return;
    }
    vkp_resp_writer_init(&local->multi->block, env);
    vkp_i_put_command(&local->multi->block, 1, &verb);
    vkp_i_local_answer_static(local, "+OK\r\n");
}

static void vkp_i_run_discard(vkp_i_local *local, size_t argc, const vkp_str *argv)
{
    (void)argc;
    (void)argv;
    if (local->multi == NULL) {
        vkp_i_local_error(local, "ERR DISCARD without MULTI");
        return;
    }
    vkp_i_multi_free(local);
    vkp_i_local_answer_static(local, "+OK\r\n");
}

/* EXEC: send MULTI, the held commands and EXEC upstream in one piece; only the last reply is the
   answer.                                                                                     */
static void vkp_i_run_exec(vkp_i_local *local, size_t argc, const vkp_str *argv)
{
    vkp_i_multi *multi = local->multi;
    vkp_str verb = vkp_str_of("EXEC");
    vkp_i_answer *answer;
    vkp_bytes block;
    uint32_t replies;
    (void)argc;
    (void)argv;
    if (multi == NULL) {
        vkp_i_local_error(local, "ERR EXEC without MULTI");
        return;
    }
    if (multi->failed) {
        vkp_i_multi_free(local);
        vkp_i_local_error(local, "EXECABORT Transaction discarded because of previous errors.");
        return;
    }
    vkp_i_put_command(&multi->block, 1, &verb);
    replies = (uint32_t)multi->count + 2;
    answer = vkp_i_answer_new(local, multi->count);
    if (answer == NULL || vkp_resp_writer_take(&multi->block, &block) != VKP_OK) {
        vkp_i_local_fail(local);
        vkp_i_multi_free(local);
        if (answer != NULL) { /* return the answer, which frees it: the connection closes later */
            vkp_i_answer_return(&answer->task);
        }
        return;
    }
    if (multi->count > 0) {
        memcpy(answer + 1, multi->shapes, multi->count);
    }
    vkp_i_multi_free(local);
    vkp_i_local_forward(local, answer, &block, replies);
    vkp_bytes_unref(&block);
}

/* Hold a command until EXEC. */
static void vkp_i_multi_append(vkp_i_local *local, size_t argc, const vkp_str *argv, uint32_t shape)
{
    vkp_i_multi *multi = local->multi;
    const vkp_env *env = local->shard->relay->env;
    void *shapes = multi->shapes;
    size_t i;
    size_t bytes = multi->block.i_len;
    for (i = 0; i < argc; i++) {
        bytes += argv[i].len;
    }
    if (bytes > local->shard->relay->max_request_bytes) {
        multi->failed = true;
        vkp_i_local_error(local,
                          "ERR the transaction is larger than the relay's limit of %zu bytes",
                          local->shard->relay->max_request_bytes);
        return;
    }
    if (!vkp_i_grow(env, &shapes, &multi->capacity, multi->count + 1, 1)) {
        vkp_i_local_fail(local);
        return;
    }
    multi->shapes = (uint8_t *)shapes;
    multi->shapes[multi->count++] = (uint8_t)shape;
    vkp_i_put_command(&multi->block, argc, argv);
    vkp_i_local_answer_static(local, "+QUEUED\r\n");
}

/* ---- dispatch ---- */

/* Flags of the subscribe family. */
#define VKP_I_SUBS (VKP_I_CMD_LOCAL | VKP_I_CMD_ORDER | VKP_I_CMD_SUB2)
/* Flags of DISCARD, QUIT and RESET, which end a MULTI. */
#define VKP_I_HERE (VKP_I_CMD_LOCAL | VKP_I_CMD_ORDER | VKP_I_CMD_MULTI)

/* Sorted by name for vkp_i_command_find; every other command is forwarded. */
static const vkp_i_command vkp_i_commands[] = {
    {"asking", NULL, VKP_I_CMD_STATE},
    {"auth", vkp_i_run_auth, VKP_I_CMD_LOCAL},
    {"blmove", NULL, VKP_I_CMD_BLOCKS},
    {"blmpop", NULL, VKP_I_CMD_BLOCKS},
    {"blpop", NULL, VKP_I_CMD_BLOCKS},
    {"brpop", NULL, VKP_I_CMD_BLOCKS},
    {"brpoplpush", NULL, VKP_I_CMD_BLOCKS},
    {"bzmpop", NULL, VKP_I_CMD_BLOCKS},
    {"bzpopmax", NULL, VKP_I_CMD_BLOCKS},
    {"bzpopmin", NULL, VKP_I_CMD_BLOCKS},
    {"client", vkp_i_run_client, VKP_I_CMD_LOCAL},
    {"command", vkp_i_run_command, VKP_I_CMD_ALONE},
    {"config", vkp_i_run_command, VKP_I_CMD_ALONE},
    {"discard", vkp_i_run_discard, VKP_I_HERE},
    {"echo", vkp_i_run_echo, VKP_I_CMD_ALONE},
    {"exec", vkp_i_run_exec, VKP_I_CMD_LOCAL | VKP_I_CMD_MULTI},
    {"geopos", NULL, VKP_I_SHAPE_NULL_ELEMENTS},
    {"hello", vkp_i_run_hello, VKP_I_CMD_LOCAL | VKP_I_CMD_ORDER},
    {"hrandfield", NULL, VKP_I_SHAPE_FLAT},
    {"info", vkp_i_run_info, VKP_I_CMD_ALONE},
    {"lmpop", NULL, VKP_I_SHAPE_NULL_ARRAY},
    {"lpop", NULL, VKP_I_SHAPE_NULL_ARRAY},
    {"monitor", NULL, VKP_I_CMD_STATE},
    {"multi", vkp_i_run_multi, VKP_I_CMD_LOCAL | VKP_I_CMD_MULTI},
    {"ping", vkp_i_run_ping, VKP_I_CMD_LOCAL | VKP_I_CMD_SUB2},
    {"psubscribe", vkp_i_run_subscribe, VKP_I_SUBS},
    {"psync", NULL, VKP_I_CMD_STATE},
    {"publish", vkp_i_run_publish, VKP_I_CMD_ALONE},
    {"pubsub", vkp_i_run_pubsub, VKP_I_CMD_ALONE},
    {"punsubscribe", vkp_i_run_unsubscribe, VKP_I_SUBS},
    {"quit", vkp_i_run_quit, VKP_I_HERE | VKP_I_CMD_SUB2},
    {"readonly", NULL, VKP_I_CMD_STATE},
    {"readwrite", NULL, VKP_I_CMD_STATE},
    {"replconf", NULL, VKP_I_CMD_STATE},
    {"reset", vkp_i_run_reset, VKP_I_HERE | VKP_I_CMD_SUB2},
    {"rpop", NULL, VKP_I_SHAPE_NULL_ARRAY},
    {"select", NULL, VKP_I_CMD_STATE},
    {"spublish", vkp_i_run_publish, VKP_I_CMD_ALONE},
    {"ssubscribe", vkp_i_run_subscribe, VKP_I_SUBS},
    {"subscribe", vkp_i_run_subscribe, VKP_I_SUBS},
    {"sunsubscribe", vkp_i_run_unsubscribe, VKP_I_SUBS},
    {"sync", NULL, VKP_I_CMD_STATE},
    {"unsubscribe", vkp_i_run_unsubscribe, VKP_I_SUBS},
    {"unwatch", NULL, VKP_I_CMD_STATE},
    {"wait", NULL, VKP_I_CMD_BLOCKS},
    {"waitaof", NULL, VKP_I_CMD_BLOCKS},
    {"watch", NULL, VKP_I_CMD_STATE},
    {"xpending", NULL, VKP_I_SHAPE_NULL_LAST},
    {"xread", NULL, VKP_I_CMD_MAYBE | VKP_I_SHAPE_PAIRS | VKP_I_SHAPE_NULL_ARRAY},
    {"xreadgroup", NULL, VKP_I_CMD_MAYBE | VKP_I_SHAPE_PAIRS | VKP_I_SHAPE_NULL_ARRAY},
    {"zdiff", NULL, VKP_I_SHAPE_FLAT},
    {"zinter", NULL, VKP_I_SHAPE_FLAT},
    {"zmpop", NULL, VKP_I_SHAPE_NULL_ARRAY},
    {"zpopmax", NULL, VKP_I_SHAPE_FLAT},
    {"zpopmin", NULL, VKP_I_SHAPE_FLAT},
    {"zrandmember", NULL, VKP_I_SHAPE_FLAT},
    {"zrange", NULL, VKP_I_SHAPE_FLAT},
    {"zrangebyscore", NULL, VKP_I_SHAPE_FLAT},
    {"zrank", NULL, VKP_I_SHAPE_NULL_ARRAY},
    {"zrevrange", NULL, VKP_I_SHAPE_FLAT},
    {"zrevrangebyscore", NULL, VKP_I_SHAPE_FLAT},
    {"zrevrank", NULL, VKP_I_SHAPE_NULL_ARRAY},
    {"zunion", NULL, VKP_I_SHAPE_FLAT}};

#define VKP_I_COMMAND_NAME 20 /* bytes of a buffer for any name in vkp_i_commands */

/* The command's entry in the table, case ignored, or NULL. */
static const vkp_i_command *vkp_i_command_find(vkp_str name)
{
    char key[VKP_I_COMMAND_NAME];
    size_t low = 0;
    size_t high = sizeof vkp_i_commands / sizeof vkp_i_commands[0];
    size_t i;
    if (name.len == 0 || name.len >= sizeof key) {
        return NULL;
    }
    for (i = 0; i < name.len; i++) {
        key[i] = vkp_i_lower(name.ptr[i]);
    }
    key[name.len] = '\0';
    while (low < high) {
        size_t middle = (low + high) / 2;
        int order = strcmp(key, vkp_i_commands[middle].name);
        if (order == 0) {
            return &vkp_i_commands[middle];
        }
        if (order < 0) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return NULL;
}

/* The shape of this call: LPOP and RPOP have one only with a count, ZRANK and ZREVRANK only with
   WITHSCORE.                                                                                  */
static uint32_t vkp_i_command_shape(const vkp_i_command *command, size_t argc, const vkp_str *argv)
{
    uint32_t shape = command != NULL ? command->flags & VKP_I_CMD_SHAPES : 0;
    bool pop = vkp_i_str_is(argv[0], "LPOP") || vkp_i_str_is(argv[0], "RPOP");
    bool rank = vkp_i_str_is(argv[0], "ZRANK") || vkp_i_str_is(argv[0], "ZREVRANK");
    return (pop && argc < 3) || (rank && argc < 4) ? 0 : shape;
}

/* Refuse a command that clients cannot share or that is not allowed now. True: the error with
   the reason is answered.                                                                     */
static bool vkp_i_local_refuse(vkp_i_local *local, const vkp_i_command *command, size_t argc,
                               const vkp_str *argv)
{
    uint32_t flags = command != NULL ? command->flags : 0;
    size_t i;
    if ((flags & VKP_I_CMD_MAYBE) != 0) {
        for (i = 1; i < argc && !vkp_i_str_is(argv[i], "STREAMS"); i++) {
            if (vkp_i_str_is(argv[i], "BLOCK")) {
                flags |= VKP_I_CMD_BLOCKS;
            }
        }
    }
    if ((flags & VKP_I_CMD_BLOCKS) != 0) {
        vkp_i_local_error(local,
                          "ERR '%.*s' cannot be shared: it would block the relay's one "
                          "upstream connection; connect to the server itself",
                          VKP_I_SHORT(argv[0]));
    } else if ((flags & VKP_I_CMD_STATE) != 0) {
        vkp_i_local_error(local,
                          "ERR '%.*s' cannot be shared: it would change the state of the "
                          "relay's one upstream connection; connect to the server itself",
                          VKP_I_SHORT(argv[0]));
    } else if (local->multi != NULL && (flags & VKP_I_CMD_LOCAL) != 0 &&
               (flags & VKP_I_CMD_MULTI) == 0 && command->run != vkp_i_run_ping) {
        vkp_i_local_error(local,
                          "ERR '%.*s' inside MULTI cannot be shared: it belongs to this "
                          "connection, not to the relay's",
                          VKP_I_SHORT(argv[0]));
    } else if (local->member.protocol == 2 && (flags & VKP_I_CMD_SUB2) == 0 &&
               vkp_i_local_sub_count(local, VKP_SUB_CHANNEL) + local->member.counts[VKP_SUB_SHARD] >
                   0) {
        vkp_i_local_error(local,
                          "ERR Can't execute '%s': only (P|S)SUBSCRIBE / "
                          "(P|S)UNSUBSCRIBE / PING / QUIT / RESET are allowed in this "
                          "context",
                          vkp_i_verb_of(argv[0]).text);
        return true; /* as servers do: this error alone does not fail a MULTI */
    } else {
        return false;
    }
    if (local->multi != NULL) {
        local->multi->failed = true;
    }
    return true;
}

/* Forward the bytes of one command upstream. */
static void vkp_i_local_forward_bytes(vkp_i_local *local, const vkp_bytes *request, uint32_t shape)
{
    vkp_i_answer *answer = vkp_i_answer_new(local, 0);
    if (answer != NULL) {
        answer->shape = (uint8_t)shape;
        vkp_i_local_forward(local, answer, request, 1);
    }
}

/* Encode one command and forward it upstream. */
static void vkp_i_local_forward_command(vkp_i_local *local, size_t argc, const vkp_str *argv,
                                        uint32_t shape)
{
    vkp_resp_writer writer;
    vkp_bytes request;
    vkp_resp_writer_init(&writer, local->shard->relay->env);
    vkp_i_put_command(&writer, argc, argv);
    if (vkp_resp_writer_take(&writer, &request) != VKP_OK) {
        vkp_i_local_fail(local);
        return;
    }
    vkp_i_local_forward_bytes(local, &request, shape);
    vkp_bytes_unref(&request);
}

/* Execute one command. request: its bytes if it arrived as a RESP array, otherwise NULL. False:
   not now; the client is paused, and on_data must get the bytes again.                        */
static bool vkp_i_local_execute(vkp_i_local *local, size_t argc, const vkp_str *argv,
                                const vkp_bytes *request)
{
    vkp_relay *relay = local->shard->relay;
    const vkp_i_command *command = vkp_i_command_find(argv[0]);
    uint32_t flags = command != NULL ? command->flags : 0;
    uint32_t shape = vkp_i_command_shape(command, argc, argv);
    bool here =
        (flags & VKP_I_CMD_LOCAL) != 0 || ((flags & VKP_I_CMD_ALONE) != 0 && relay->client == NULL);
    if ((flags & VKP_I_CMD_ORDER) != 0 && local->answers != NULL) {
        vkp_i_local_pause(local, VKP_I_LOCAL_ORDER);
        return false;
    }
    if (vkp_i_local_refuse(local, command, argc, argv)) {
        return true;
    }
    if (local->multi != NULL && (flags & VKP_I_CMD_MULTI) == 0) {
        vkp_i_multi_append(local, argc, argv, shape);
    } else if (here) {
        command->run(local, argc, argv);
    } else if (relay->client == NULL) {
        vkp_i_local_error(local,
                          "ERR unknown command '%.*s': this relay stands alone, a pub/sub "
                          "broker without a server",
                          VKP_I_SHORT(argv[0]));
    } else if (request != NULL) {
        vkp_i_local_forward_bytes(local, request, shape);
    } else {
        vkp_i_local_forward_command(local, argc, argv, shape);
    }
    return true;
}

#endif /* VKP_I_IO */

#if VKP_I_IO
/* ======================================================================================
   >>impl-relay-serve   Relay: clients, and the relay itself
   ======================================================================================
   Requests, local clients, accepting, pushes, idle time, drain, open and close of a relay.
   Loop 0 accepts and distributes descriptors over the shards in turn; a descriptor for another
   loop is a vkp_i_handover task, listed under the relay's mutex so that vkp_relay_unref finds
   it. A local client belongs to its shard's loop from vkp_i_shard_adopt to vkp_i_local_on_close.
   Pushes arrive on loop 0 (vkp_i_relay_on_push): delivered to its own hub, and sent to each
   other shard's channel, whose push loop delivers there.
   Idle: the shard that closes the relay's last client queues idle_task on loop 0, which starts
   idle_timer. Drain: loop 0 queues drain_task on each shard; the last shard without clients
   queues end_task on loop 0, which calls on_end; at the deadline kill_task closes the clients
   that are left.
   vkp_relay_unref runs while no loop runs: it may touch every shard.                          */

/* ---- requests ---- */

#define VKP_I_PROTOCOL_TEXT 256 /* bytes of a protocol error's text, terminated */

/* Log, count and answer a protocol error; the client is drained behind its pending answers. */
__attribute__((format(printf, 2, 3))) static void
vkp_i_local_protocol_error(vkp_i_local *local, const char *format, ...)
{
    char text[VKP_I_PROTOCOL_TEXT];
    va_list arguments;
    va_start(arguments, format);
    (void)vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    vkp_i_log(local->shard->relay->env, VKP_LOG_INFO, "client %llu: protocol error: %s",
              (unsigned long long)local->id, text);
    (void)VKP_I_ADD(&local->shard->relay->protocol_errors, (uint64_t)1);
    vkp_i_local_error(local, "ERR Protocol error: %s", text);
    vkp_i_local_pause(local, VKP_I_LOCAL_FAILED);
    vkp_i_local_maybe_resume(local);
}

/* a larger argv is freed by a command with fewer than VKP_I_ARGV_SMALL */
#define VKP_I_ARGV_LARGE 65536u
#define VKP_I_ARGV_SMALL 1024u /* commands with fewer arguments are small for VKP_I_ARGV_LARGE */

/* Make room for argc arguments in shard->argv. False: no memory. */
static bool vkp_i_shard_reserve_argv(vkp_i_shard *shard, size_t argc)
{
    void *argv = shard->argv;
    if (shard->argv_capacity > VKP_I_ARGV_LARGE && argc < VKP_I_ARGV_SMALL) {
        vkp_i_free(shard->relay->env, argv, shard->argv_capacity * sizeof *shard->argv);
        argv = NULL;
        shard->argv_capacity = 0;
    }
    shard->argv = (vkp_str *)argv;
    if (!vkp_i_grow(shard->relay->env, &argv, &shard->argv_capacity, argc, sizeof *shard->argv)) {
        return false;
    }
    shard->argv = (vkp_str *)argv;
    return true;
}

/* Execute a command that is an array of bulk strings. Returns the bytes used; 0: incomplete, not
   now, or the client closes.                                                                  */
static size_t vkp_i_local_take_array(vkp_i_local *local, const vkp_bytes *in, size_t from)
{
    vkp_i_shard *shard = local->shard;
    vkp_resp_reader *reader = local->reader != NULL ? local->reader : shard->reader;
    const vkp_value *value = NULL;
    const vkp_value *each;
    vkp_bytes request;
    size_t used = 0;
    size_t argc = 0;
    bool done = true;
    vkp_status status =
        vkp_resp_reader_scan(reader, in->data + from, in->len - from, &value, &used);
    if (status == VKP_ERR_EMPTY) {
        /* The client keeps the reader of a long command: a fresh reader would start again. */
        if (reader == shard->reader && vkp_i_reader_is_deep_in(reader)) {
            vkp_resp_reader *fresh;
            if (vkp_i_reader_open_alike(reader, &fresh) == VKP_OK) {
                local->reader = reader;
                shard->reader = fresh;
            }
        }
        if (local->reader == NULL) {
            vkp_resp_reader_reset(reader);
        }
        return 0;
    }
    if (status != VKP_OK) {
        if (status == VKP_ERR_NOMEM) {
            vkp_i_local_fail(local);
        } else {
            vkp_i_local_protocol_error(local, "%s", vkp_resp_reader_get_error(reader, NULL));
        }
        vkp_resp_reader_reset(reader);
        return 0;
    }
    if (!vkp_i_shard_reserve_argv(shard, value->len)) {
        vkp_i_local_fail(local);
        return 0;
    }
    for (each = vkp_value_get_first(value); each != NULL; each = vkp_value_get_next(value, each)) {
        if (each->type != VKP_RESP_STRING || each->flags != 0) {
            vkp_i_local_protocol_error(local, "expected '$', an argument is no bulk string");
            return 0;
        }
        shard->argv[argc++] = vkp_value_get_str(each);
    }
    if (argc > 0) {
        request.data = in->data + from;
        request.len = used;
        request.block = in->block;
        done = vkp_i_local_execute(local, argc, shard->argv, &request);
    }
    vkp_resp_reader_unref(local->reader);
    local->reader = NULL;
    if (!done) {
        vkp_resp_reader_reset(shard->reader);
    }
    return done ? used : 0;
}

/* The value of a hexadecimal digit, or -1. */
static int vkp_i_hex(char c)
{
    return c >= '0' && c <= '9'   ? c - '0'
           : c >= 'a' && c <= 'f' ? c - 'a' + 10
           : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                  : -1;
}

/* Decode one escape of a double-quoted text, from its backslash on. Returns its length. */
static size_t vkp_i_unescape(const char *at, const char *end, char *out)
{
    static const char from[] = "nrtba";
    static const char to[] = "\n\r\t\b\a";
    const char *known;
    if (end - at >= 4 && at[1] == 'x' && vkp_i_hex(at[2]) >= 0 && vkp_i_hex(at[3]) >= 0) {
        *out = (char)(unsigned char)(vkp_i_hex(at[2]) * 16 + vkp_i_hex(at[3]));
        return 4;
    }
    if (end - at < 2) {
        *out = '\\';
        return 1;
    }
    known = (const char *)memchr(from, at[1], sizeof from - 1);
    *out = known != NULL ? to[known - from] : at[1];
    return 2;
}

/* Copy one word of an inline command, without its quotes, to *out, which moves behind it. A
   quote may begin inside the word; the closing quote ends the word. Returns the end of the word;
   NULL: unbalanced quotes.                                                                    */
static const char *vkp_i_inline_word(const char *at, const char *end, char **out)
{
    char quote = '\0';
    while (at < end) {
        if (quote != '\0' && *at == quote) {
            at++;
            return at == end || *at == ' ' || *at == '\t' ? at : NULL;
        }
        if (quote == '\0' && (*at == ' ' || *at == '\t')) {
            return at;
        }
        if (quote == '\0' && (*at == '"' || *at == '\'')) {
            quote = *at++;
            continue;
        }
        if (quote == '"' && *at == '\\') {
            at += vkp_i_unescape(at, end, *out);
        } else if (quote == '\'' && *at == '\\' && at + 1 < end && at[1] == '\'') {
            **out = '\'';
            at += 2;
        } else {
            **out = *at++;
        }
        (*out)++;
    }
    return quote == '\0' ? at : NULL;
}

/* Split a line into shard->argv. False: unbalanced quotes, or no memory (*argc is SIZE_MAX). */
static bool vkp_i_shard_split(vkp_i_shard *shard, const char *at, const char *end, size_t *argc)
{
    void *text = shard->inline_text;
    char *out;
    *argc = SIZE_MAX;
    if (!vkp_i_grow(shard->relay->env, &text, &shard->inline_capacity, (size_t)(end - at) + 1, 1)) {
        return false;
    }
    shard->inline_text = (char *)text;
    out = shard->inline_text;
    if (!vkp_i_shard_reserve_argv(shard, (size_t)(end - at) / 2 + 1)) {
        return false;
    }
    *argc = 0;
    while (at != NULL && at < end) {
        char *start = out;
        if (*at == ' ' || *at == '\t') {
            at++;
            continue;
        }
        at = vkp_i_inline_word(at, end, &out);
        shard->argv[(*argc)++] = vkp_i_str(start, (size_t)(out - start));
    }
    return at != NULL;
}

#define VKP_I_INLINE_MAX 65536u /* most bytes of an inline command, its line end included */

/* Execute a command that is a line of words. Returns the bytes used; 0: incomplete, not now, or
   the client closes.                                                                          */
static size_t vkp_i_local_take_inline(vkp_i_local *local, const vkp_bytes *in, size_t from)
{
    vkp_i_shard *shard = local->shard;
    const char *line = (const char *)in->data + from;
    size_t left = in->len - from;
    const char *lf = (const char *)memchr(line, '\n', VKP_I_MIN(left, (size_t)VKP_I_INLINE_MAX));
    const char *end;
    size_t argc = 0;
    if (lf == NULL) {
        if (left >= VKP_I_INLINE_MAX) {
            vkp_i_local_protocol_error(local, "too big inline request, %u bytes without a line end",
                                       (unsigned)VKP_I_INLINE_MAX);
        }
        return 0;
    }
    end = lf > line && lf[-1] == '\r' ? lf - 1 : lf;
    if (!vkp_i_shard_split(shard, line, end, &argc)) {
        if (argc == SIZE_MAX) {
            vkp_i_local_fail(local);
        } else {
            vkp_i_local_protocol_error(local, "unbalanced quotes in request");
        }
        return 0;
    }
    if (argc > 0 &&
        (vkp_i_str_is(shard->argv[0], "POST") || vkp_i_str_is(shard->argv[0], "HOST:") ||
         (argc == 3 && vkp_i_starts_with(shard->argv[2], "HTTP/")))) {
        vkp_i_local_protocol_error(local, "the request is HTTP");
        return 0;
    }
    if (argc > 0 && !vkp_i_local_execute(local, argc, shard->argv, NULL)) {
        return 0;
    }
    return (size_t)(lf - line) + 1;
}

/* Execute commands until one is incomplete or the client is paused; on_data gets the unused
   bytes again.                                                                                */
static size_t vkp_i_local_on_data(vkp_conn *conn, void *user, const vkp_bytes *in)
{
    vkp_i_local *local = (vkp_i_local *)user;
    size_t used = 0;
    uint32_t stop = VKP_I_LOCAL_BUSY | VKP_I_LOCAL_ORDER | VKP_I_LOCAL_FULL | VKP_I_LOCAL_CLOSED |
                    VKP_I_LOCAL_FAILED;
    local->refs++;
    while (used < in->len && (local->flags & stop) == 0 && vkp_i_conn_is_serving(conn)) {
        size_t step = in->data[used] == '*' ? vkp_i_local_take_array(local, in, used)
                                            : vkp_i_local_take_inline(local, in, used);
        if (step == 0) {
            break;
        }
        used += step;
    }
    vkp_i_local_release(local);
    return used;
}

/* ---- local clients ---- */

/* The local client sends nothing more: answer its commands, then drain. */
static bool vkp_i_local_on_end(vkp_conn *conn, void *user)
{
    vkp_i_local *local = (vkp_i_local *)user;
    local->flags |= VKP_I_LOCAL_LEAVING;
    if (local->answers == NULL && (local->flags & VKP_I_LOCAL_BUSY) == 0) {
        vkp_conn_drain(conn);
    }
    return true;
}

/* The outbox is empty: a client that was paused for it is read again. */
static void vkp_i_local_on_drain(vkp_conn *conn, void *user)
{
    (void)conn;
    vkp_i_local_maybe_resume((vkp_i_local *)user);
}

static void vkp_i_shard_drained(vkp_i_shard *shard);
static void vkp_i_relay_client_left(vkp_relay *relay);

/* The connection of a local client is closed: leave the hub and the shard's list. */
static void vkp_i_local_on_close(vkp_conn *conn, void *user, vkp_close_reason reason, int error)
{
    vkp_i_local *local = (vkp_i_local *)user;
    vkp_i_shard *shard = local->shard;
    vkp_relay *relay = shard->relay;
    vkp_i_log(relay->env, VKP_LOG_DEBUG, "client %llu: %s%s%s", (unsigned long long)local->id,
              vkp_close_reason_str(reason), error != 0 ? ": " : "",
              error != 0 ? strerror(error) : "");
    if (reason == VKP_CLOSE_SLOW) {
        (void)VKP_I_ADD(&relay->slow_closed, (uint64_t)1);
    }
    local->flags |= VKP_I_LOCAL_CLOSED;
    vkp_i_local_leave_all(local);
    vkp_i_multi_free(local);
    if (local->prev != NULL) {
        local->prev->next = local->next;
    } else {
        shard->locals = local->next;
    }
    if (local->next != NULL) {
        local->next->prev = local->prev;
    }
    shard->local_count--;
    local->member.conn = NULL;
    vkp_conn_unref(conn);
    vkp_i_shard_drained(shard);
    vkp_i_relay_client_left(relay);
    vkp_i_local_release(local);
}

static const vkp_conn_ops vkp_i_local_ops = {NULL,
                                             vkp_i_local_on_data,
                                             vkp_i_local_on_drain,
                                             vkp_i_local_on_end,
                                             vkp_i_local_on_close,
                                             vkp_resp_get_frame_len};

/* Serve an accepted descriptor on this shard's loop. Takes fd and seat, also on failure. */
static void vkp_i_shard_adopt(vkp_i_shard *shard, int fd, vkp_seat *seat)
{
    vkp_relay *relay = shard->relay;
    vkp_i_local *local = NULL;
    vkp_conn *conn;
    if (!shard->draining && !shard->loop->closed) {
        local = (vkp_i_local *)vkp_i_alloc_zero(relay->env, sizeof *local);
    }
    if (local == NULL || vkp_i_conn_adopt(shard->loop, fd, shard->profile, true, &conn) != VKP_OK) {
        vkp_i_free(relay->env, local, sizeof *local);
        (void)shard->loop->sys->close(fd);
        vkp_seat_unref(seat);
        vkp_i_relay_client_left(relay);
        return;
    }
    vkp_conn_set_seat(conn, seat);
    local->member.conn = conn;
    local->member.protocol = 2;
    local->shard = shard;
    local->refs = 1;
    local->id = VKP_I_ADD(&relay->next_id, (uint64_t)1) + 1;
    local->answers_end = &local->answers;
    local->next = shard->locals;
    if (local->next != NULL) {
        local->next->prev = local;
    }
    shard->locals = local;
    shard->local_count++;
    (void)VKP_I_ADD(&relay->refs, 1);
    vkp_conn_set_user(conn, local);
}

/* ---- accepting, on loop 0 ---- */

/* An accepted descriptor on its way from loop 0 to another shard's loop. */
typedef struct vkp_i_handover {
    vkp_i_task task;             /* runs vkp_i_handover_receive on the shard's loop */
    vkp_i_shard *shard;          /* receives the descriptor */
    struct vkp_i_handover *prev; /* newer one of shard->handovers; guarded by the relay's mutex */
    struct vkp_i_handover *next; /* older one of shard->handovers; guarded by the relay's mutex */
    vkp_seat *seat;              /* the client's; taken together with fd */
    int fd;                      /* -1: vkp_relay_unref closed the descriptor */
} vkp_i_handover;

/* Enter shard->handovers. */
static void vkp_i_handover_link(vkp_i_handover *handover)
{
    vkp_i_shard *shard = handover->shard;
    VKP_I_LOCK(&shard->relay->mutex);
    handover->prev = NULL;
    handover->next = shard->handovers;
    if (handover->next != NULL) {
        handover->next->prev = handover;
    }
    shard->handovers = handover;
    VKP_I_UNLOCK(&shard->relay->mutex);
}

static void vkp_i_handover_unlink(vkp_i_handover *handover)
{
    vkp_i_shard *shard = handover->shard;
    VKP_I_LOCK(&shard->relay->mutex);
    if (handover->prev != NULL) {
        handover->prev->next = handover->next;
    } else {
        shard->handovers = handover->next;
    }
    if (handover->next != NULL) {
        handover->next->prev = handover->prev;
    }
    VKP_I_UNLOCK(&shard->relay->mutex);
}

/* Task on the shard's loop: serve the descriptor. */
static void vkp_i_handover_receive(vkp_i_task *task)
{
    vkp_i_handover *handover = VKP_CONTAINER(task, vkp_i_handover, task);
    vkp_relay *relay = handover->shard->relay;
    vkp_i_handover_unlink(handover);
    if (handover->fd >= 0) {
        vkp_i_shard_adopt(handover->shard, handover->fd, handover->seat);
    }
    vkp_i_free(relay->env, handover, sizeof *handover);
    vkp_i_relay_release(relay);
}

/* Queue an accepted descriptor on another shard's loop. Takes fd and seat, also on failure. */
static void vkp_i_relay_hand_over(vkp_relay *relay, vkp_i_shard *shard, int fd, vkp_seat *seat)
{
    vkp_i_handover *handover = (vkp_i_handover *)vkp_i_alloc(relay->env, sizeof *handover);
    if (handover != NULL) {
        handover->task.fn = vkp_i_handover_receive;
        handover->shard = shard;
        handover->fd = fd;
        handover->seat = seat;
        (void)VKP_I_ADD(&relay->refs, 1);
        vkp_i_handover_link(handover);
        if (vkp_i_loop_queue(shard->loop, &handover->task)) {
            return;
        }
        vkp_i_handover_unlink(handover);
        vkp_i_free(relay->env, handover, sizeof *handover);
        vkp_i_relay_release(relay);
    }
    (void)shard->loop->sys->close(fd);
    vkp_seat_unref(seat);
    vkp_i_relay_client_left(relay);
}

/* A listener admitted a client: the shards take clients in turn. Loop 0. */
static void vkp_i_relay_on_fd(void *user, int fd, vkp_seat *seat)
{
    vkp_relay *relay = (vkp_relay *)user;
    vkp_i_shard *shard = &relay->shards[relay->next_shard++ % relay->shard_count];
    if (shard == &relay->shards[0]) {
        vkp_i_shard_adopt(shard, fd, seat);
    } else {
        vkp_i_relay_hand_over(relay, shard, fd, seat);
    }
}

/* A listener refuses a client: write the reason. Loop 0. */
static void vkp_i_relay_on_refuse(void *user, int fd, vkp_refusal why)
{
    static const char *const texts[VKP_REFUSAL_COUNT] = {
        "-ERR this user is not allowed here\r\n", "-ERR max number of clients reached\r\n",
        "-ERR max number of clients of this user reached\r\n",
        "-ERR the relay is out of descriptors or memory\r\n", "-ERR the relay is ending\r\n"};
    vkp_relay *relay = (vkp_relay *)user;
    vkp_range range;
    range.base = texts[why];
    range.len = strlen(texts[why]);
    (void)relay->shards[0].loop->sys->send(fd, &range, 1); /* may fail: the reason is best effort */
}

/* ---- idle: no clients ---- */

/* linger_ms have passed: call on_idle if there is still no client. */
static void vkp_i_relay_idle_over(vkp_timer *timer)
{
    vkp_relay *relay = VKP_CONTAINER(timer, vkp_relay, idle_timer);
    if (vkp_i_relay_count_clients(relay) == 0) {
        relay->on_idle(relay->user);
    }
}

/* Task on loop 0: no client is connected, so start to linger. */
static void vkp_i_relay_idle_begins(vkp_i_task *task)
{
    vkp_relay *relay = VKP_CONTAINER(task, vkp_relay, idle_task);
    vkp_loop *loop = relay->shards[0].loop;
    (void)VKP_I_XCHG(&relay->idle_queued, 0u);
    if (!loop->closed && !relay->draining && relay->on_idle != NULL &&
        vkp_i_relay_count_clients(relay) == 0 &&
        vkp_timer_start(&relay->idle_timer, loop, vkp_i_relay_idle_over, 0,
                        vkp_i_after_ms(loop->now_ns, relay->linger_ms)) != VKP_OK) {
        vkp_i_relay_idle_over(&relay->idle_timer); /* no memory for the timer: do not linger */
    }
    vkp_i_relay_release(relay);
}

/* A client disconnected: if none is left, queue idle_task on loop 0. Any shard's loop. */
static void vkp_i_relay_client_left(vkp_relay *relay)
{
    if (relay->on_idle == NULL || vkp_i_relay_count_clients(relay) > 0 ||
        VKP_I_XCHG(&relay->idle_queued, 1u) != 0) {
        return;
    }
    (void)VKP_I_ADD(&relay->refs, 1);
    if (!vkp_i_loop_queue(relay->shards[0].loop, &relay->idle_task)) {
        vkp_i_relay_release(relay);
    }
}

VKP_API vkp_status vkp_relay_listen(vkp_relay *relay, vkp_str address, const char **bound)
{
    vkp_listener_config config;
    vkp_listener *listener;
    void *listeners;
    vkp_status status;
    VKP_I_REQUIRE(relay != NULL && address.ptr != NULL);
    listeners = relay->listeners;
    if (!vkp_i_grow(relay->env, &listeners, &relay->listener_capacity, relay->listener_count + 1,
                    sizeof *relay->listeners)) {
        return VKP_ERR_NOMEM;
    }
    relay->listeners = (vkp_listener **)listeners;
    memset(&config, 0, sizeof config);
    config.address = address;
    config.registry = relay->registry;
    config.gate = relay->gate;
    config.on_fd = vkp_i_relay_on_fd;
    config.on_refuse = vkp_i_relay_on_refuse;
    config.conn.user = relay;
    status = vkp_listener_open(relay->shards[0].loop, &config, &listener);
    if (status == VKP_OK) {
        relay->listeners[relay->listener_count++] = listener;
        if (bound != NULL) {
            *bound = vkp_listener_get_address(listener);
        }
    }
    return status;
}

/* ---- pushes from upstream, on loop 0, and on the other shards' loops ---- */

/* Deliver a push to this shard's members: from upstream with vkp_hub_deliver, stand-alone from
   another shard with vkp_hub_publish, because its frame is not a RESP message.                */
static void vkp_i_shard_on_push(void *user, const vkp_push *push)
{
    vkp_i_shard *shard = (vkp_i_shard *)user;
    vkp_relay *relay = shard->relay;
    size_t count = relay->client != NULL
                       ? vkp_hub_deliver(shard->hub, push)
                       : vkp_hub_publish(shard->hub, push->sub, push->channel, push->payload);
    (void)VKP_I_ADD(&relay->deliveries, (uint64_t)count);
}

/* The upstream client received a push: deliver it in every shard. Loop 0. */
static void vkp_i_relay_on_push(void *user, const vkp_push *push)
{
    vkp_relay *relay = (vkp_relay *)user;
    size_t i;
    if (!vkp_i_push_kind_is_message(push->kind)) {
        if (vkp_i_push_kind_is_event(push->kind)) {
            vkp_i_log(relay->env, VKP_LOG_INFO, "upstream: %s %.*s", vkp_push_kind_str(push->kind),
                      VKP_FMT(push->payload));
        }
        return;
    }
    (void)VKP_I_ADD(&relay->messages_in, (uint64_t)1);
    vkp_i_shard_on_push(&relay->shards[0], push);
    for (i = 1; i < relay->shard_count; i++) {
        vkp_push copy = *push;
        copy.frame = vkp_bytes_ref(&push->frame);
        vkp_i_shard_forward(&relay->shards[i], &copy);
    }
}

/* ---- draining ---- */

/* Task on loop 0: every shard is drained. */
static void vkp_i_relay_end(vkp_i_task *task)
{
    vkp_relay *relay = VKP_CONTAINER(task, vkp_relay, end_task);
    vkp_timer_stop(&relay->drain_timer);
    if (relay->client != NULL) {
        vkp_client_close(relay->client);
    }
    if (relay->on_end != NULL) {
        relay->on_end(relay->end_user);
    }
    vkp_i_relay_release(relay);
}

/* If the shard drains and has no clients left, count it off; the last shard queues end_task. */
static void vkp_i_shard_drained(vkp_i_shard *shard)
{
    vkp_relay *relay = shard->relay;
    if (!shard->draining || shard->gone || shard->local_count > 0) {
        return;
    }
    shard->gone = true;
    if (VKP_I_UNREF(&relay->live_shards) == 1) {
        relay->end_task.fn = vkp_i_relay_end;
        (void)VKP_I_ADD(&relay->refs, 1);
        if (!vkp_i_loop_queue(relay->shards[0].loop, &relay->end_task)) {
            vkp_i_relay_release(relay);
        }
    }
}

/* Task on the shard's loop: drain every local client. */
static void vkp_i_shard_drain(vkp_i_task *task)
{
    vkp_i_shard *shard = VKP_CONTAINER(task, vkp_i_shard, drain_task);
    vkp_relay *relay = shard->relay;
    vkp_i_local *local = shard->locals;
    shard->draining = true;
    while (local != NULL) {
        vkp_i_local *next = local->next;
        local->flags |= VKP_I_LOCAL_LEAVING;
        if (local->answers == NULL && (local->flags & VKP_I_LOCAL_BUSY) == 0) {
            vkp_i_local_leave(local);
        } else {
            vkp_conn_pause(local->member.conn); /* execute no new commands */
        }
        local = next;
    }
    vkp_i_shard_drained(shard);
    vkp_i_relay_release(relay);
}

/* Task on the shard's loop: the drain's deadline has passed, close every local client. */
static void vkp_i_shard_kill(vkp_i_task *task)
{
    vkp_i_shard *shard = VKP_CONTAINER(task, vkp_i_shard, kill_task);
    vkp_relay *relay = shard->relay;
    while (shard->locals != NULL) {
        vkp_conn_close(shard->locals->member.conn);
    }
    vkp_i_relay_release(relay);
}

/* Queue one of the shard's tasks on its loop; the task holds a reference of the relay. */
static void vkp_i_shard_queue(vkp_i_shard *shard, vkp_i_task *task, void (*fn)(vkp_i_task *task))
{
    task->fn = fn;
    (void)VKP_I_ADD(&shard->relay->refs, 1);
    if (!vkp_i_loop_queue(shard->loop, task)) {
        vkp_i_relay_release(shard->relay);
    }
}

/* The drain's deadline has passed. Loop 0. */
static void vkp_i_relay_drain_over(vkp_timer *timer)
{
    vkp_relay *relay = VKP_CONTAINER(timer, vkp_relay, drain_timer);
    size_t i;
    for (i = 0; i < relay->shard_count; i++) {
        vkp_i_shard_queue(&relay->shards[i], &relay->shards[i].kill_task, vkp_i_shard_kill);
    }
}

VKP_API void vkp_relay_drain(vkp_relay *relay, void (*on_end)(void *user), void *user,
                             uint64_t deadline_ns)
{
    size_t i;
    if (relay->draining) {
        return;
    }
    relay->draining = true;
    relay->on_end = on_end;
    relay->end_user = user;
    vkp_timer_stop(&relay->idle_timer);
    relay->live_shards = relay->shard_count;
    for (i = 0; i < relay->listener_count; i++) {
        vkp_listener_close(relay->listeners[i]);
    }
    if (vkp_timer_start(&relay->drain_timer, relay->shards[0].loop, vkp_i_relay_drain_over, 0,
                        deadline_ns) != VKP_OK) {
        vkp_i_relay_drain_over(&relay->drain_timer); /* no memory for the timer: close now */
    }
    for (i = 0; i < relay->shard_count; i++) {
        vkp_i_shard_queue(&relay->shards[i], &relay->shards[i].drain_task, vkp_i_shard_drain);
    }
}

/* ---- opening, closing ---- */

/* No loop runs: close the descriptors that are queued for the shard. Their tasks find fd -1
   later.                                                                                      */
static void vkp_i_shard_drop_handovers(vkp_relay *relay, vkp_i_shard *shard)
{
    vkp_i_handover *each;
    VKP_I_LOCK(&relay->mutex);
    for (each = shard->handovers; each != NULL; each = each->next) {
        (void)shard->loop->sys->close(each->fd);
        vkp_seat_unref(each->seat);
        each->fd = -1;
    }
    VKP_I_UNLOCK(&relay->mutex);
}

VKP_API void vkp_relay_unref(vkp_relay *relay)
{
    size_t i;
    if (relay == NULL) {
        return;
    }
    for (i = 0; i < relay->listener_count; i++) {
        vkp_listener_unref(relay->listeners[i]);
    }
    relay->listener_count = 0;
    vkp_timer_stop(&relay->drain_timer);
    vkp_timer_stop(&relay->idle_timer);
    relay->on_idle = NULL; /* queued tasks still run when a loop runs again or closes */
    relay->on_end = NULL;
    for (i = 0; i < relay->shard_count; i++) {
        vkp_i_shard *shard = &relay->shards[i];
        shard->draining = true;
        shard->gone = true;
        while (shard->locals != NULL) { /* no loop runs: this thread may use all of them */
            vkp_i_conn_finish(shard->locals->member.conn, VKP_CLOSE_LOCAL, 0);
        }
        vkp_i_shard_drop_handovers(relay, shard);
        vkp_push_loop_unref(shard->push_loop);
        vkp_mpsc_tx_unref(shard->pushes);
        shard->push_loop = NULL;
        shard->pushes = NULL;
    }
    if (relay->client != NULL) {
        vkp_i_client_close_now(relay->client); /* pending answers return now */
        vkp_client_unref(relay->client);
        relay->client = NULL;
    }
    vkp_i_relay_release(relay);
}

/* Open the channel of pushes from other loops, and the push loop that receives them. */
static vkp_status vkp_i_shard_open_channel(vkp_i_shard *shard)
{
    vkp_mpsc_config config;
    vkp_sink sink;
    vkp_mpsc_rx *rx;
    vkp_status status;
    memset(&config, 0, sizeof config);
    config.elem_bytes = sizeof(vkp_push);
    config.capacity_bytes = VKP_I_SHARD_LAG;
    config.cost = vkp_push_get_cost;
    config.drop = vkp_push_drop;
    config.env = shard->relay->env;
    status = vkp_mpsc_open(&config, &shard->pushes, &rx);
    if (status != VKP_OK) {
        return status;
    }
    memset(&sink, 0, sizeof sink);
    sink.callback = vkp_i_shard_on_push;
    sink.user = shard;
    status = vkp_push_loop_open(shard->loop, rx, &sink, NULL, NULL, &shard->push_loop);
    if (status != VKP_OK) {
        vkp_mpsc_rx_unref(rx);
    }
    return status;
}

/* input kept beyond max_request_bytes: headers, other commands */
#define VKP_I_REQUEST_SLACK 65536u
#define VKP_I_REQUEST_ELEMENTS (1024u * 1024) /* most arguments of a request */

static vkp_status vkp_i_shard_open(vkp_i_shard *shard, vkp_relay *relay,
                                   const vkp_relay_config *config, size_t index)
{
    vkp_conn_config conn;
    vkp_hub_config hub;
    vkp_resp_config resp;
    vkp_status status;
    shard->relay = relay;
    shard->loop = vkp_loop_ref(config->loops[index]);
    memset(&conn, 0, sizeof conn);
    conn.ops = &vkp_i_local_ops;
    conn.queue_frames = config->queue_frames;
    conn.queue_bytes = config->queue_bytes;
    conn.on_full =
        config->on_full == VKP_ON_FULL_DEFAULT ? VKP_ON_FULL_DISCONNECT : config->on_full;
    conn.input_bytes = relay->max_request_bytes + VKP_I_REQUEST_SLACK;
    conn.loop_only = true;
    shard->profile = vkp_i_profile_open(relay->env, &conn);
    memset(&hub, 0, sizeof hub);
    hub.on_interest = vkp_i_shard_on_interest;
    hub.user = shard;
    hub.env = relay->env;
    status = shard->profile != NULL ? vkp_hub_open(&hub, &shard->hub) : VKP_ERR_NOMEM;
    memset(&resp, 0, sizeof resp);
    resp.max_depth = 1;
    resp.max_elements = VKP_I_REQUEST_ELEMENTS;
    resp.max_bulk_bytes = relay->max_request_bytes;
    resp.max_frame_bytes = relay->max_request_bytes;
    resp.env = relay->env;
    if (status == VKP_OK) {
        status = vkp_resp_reader_open(&resp, &shard->reader);
    }
    if (status == VKP_OK && (index > 0 || (config->server.ptr == NULL && relay->shard_count > 1))) {
        status = vkp_i_shard_open_channel(shard);
    }
    return status;
}

static vkp_status vkp_i_relay_open_client(vkp_relay *relay, const vkp_relay_config *config)
{
    vkp_client_config client;
    memset(&client, 0, sizeof client);
    client.address = config->server;
    client.username = config->username;
    client.password = config->password;
    client.name = vkp_str_of("valkey-push-relay");
    client.resolver = config->resolver;
    client.on_push = vkp_i_relay_on_push;
    client.user = relay;
    client.env = relay->env;
    return vkp_client_open(relay->shards[0].loop, &client, &relay->client);
}

/* The registry noticed that a socket's file changed. */
static void vkp_i_relay_on_file(void *user, vkp_socket *sock, vkp_socket_event event,
                                vkp_status status)
{
    const vkp_relay *relay = (const vkp_relay *)user;
    const char *text = "";
    switch (event) {
    case VKP_SOCKET_LOST:
        text = "the file is gone or replaced";
        break;
    case VKP_SOCKET_REBOUND:
        text = "bound again";
        break;
    case VKP_SOCKET_BLOCKED:
        text = "cannot be bound again: ";
        break;
    }
    vkp_i_log(relay->env, VKP_LOG_WARN, "%s: %s%s", vkp_socket_get_path(sock), text,
              event == VKP_SOCKET_BLOCKED ? vkp_status_str(status) : "");
}

#define VKP_I_RELAY_CLIENTS 16384u /* default of vkp_relay_config.max_clients */
#define VKP_I_RELAY_MODE_OWN 0600u /* mode of a socket's file: the process's own uid */
#define VKP_I_RELAY_MODE_ALL 0666u /* mode with allow_uids: the gate checks the uid */

/* Open the gate and the registry, and copy the shutdown notice. */
static vkp_status vkp_i_relay_open_gate(vkp_relay *relay, const vkp_relay_config *config)
{
    vkp_gate_config gate;
    vkp_registry_config registry;
    vkp_status status;
    memset(&gate, 0, sizeof gate);
    gate.max_clients = config->max_clients > 0 ? config->max_clients : VKP_I_RELAY_CLIENTS;
    gate.max_clients_per_uid = config->max_clients_per_uid;
    gate.allow_uids = config->allow_uids;
    gate.allow_uid_count = config->allow_uid_count;
    gate.env = relay->env;
    status = vkp_gate_open(&gate, &relay->gate);
    memset(&registry, 0, sizeof registry);
    registry.mode = config->allow_uid_count > 0 ? VKP_I_RELAY_MODE_ALL : VKP_I_RELAY_MODE_OWN;
    registry.abstract_names = VKP_I_LINUX;
    registry.loop = relay->shards[0].loop;
    registry.check_ms = config->check_ms;
    registry.rebind = true;
    registry.on_event = vkp_i_relay_on_file;
    registry.user = relay;
    registry.env = relay->env;
    if (status == VKP_OK) {
        status = vkp_registry_open(&registry, &relay->registry);
    }
    if (status == VKP_OK) {
        relay->notice = config->shutdown_notice;
        status = vkp_i_copy_str(relay->env, &relay->notice) ? VKP_OK : VKP_ERR_NOMEM;
    }
    return status;
}

/* Defaults of vkp_relay_config. */
#define VKP_I_RELAY_REQUEST_BYTES ((size_t)64 << 20)
#define VKP_I_RELAY_REPLY_BYTES ((size_t)256 << 20)
#define VKP_I_RELAY_SUBSCRIPTIONS 100000u

VKP_API vkp_status vkp_relay_open(const vkp_relay_config *config, vkp_relay **out)
{
    const vkp_env *env;
    vkp_relay *relay;
    vkp_status status = VKP_OK;
    size_t count;
    size_t i;
    int kind;
    VKP_I_REQUIRE(config != NULL && out != NULL && config->loops != NULL);
    VKP_I_REQUIRE(config->max_request_bytes <= VKP_I_BLOCK_MAX / 2);
    VKP_I_REQUIRE(config->on_full != VKP_ON_FULL_WAIT && config->on_full != VKP_ON_FULL_ERROR);
    env = vkp_i_env(config->env);
    count = config->loop_count > 0 ? config->loop_count : 1;
    relay = (vkp_relay *)vkp_i_alloc_zero(env, sizeof *relay);
    if (relay == NULL) {
        return VKP_ERR_NOMEM;
    }
    relay->env = env;
    relay->refs = 1;
    relay->on_idle = config->on_idle;
    relay->user = config->user;
    relay->linger_ms = config->linger_ms;
    relay->idle_task.fn = vkp_i_relay_idle_begins;
    relay->max_request_bytes =
        config->max_request_bytes > 0 ? config->max_request_bytes : VKP_I_RELAY_REQUEST_BYTES;
    relay->max_reply_bytes =
        config->max_reply_bytes > 0 ? config->max_reply_bytes : VKP_I_RELAY_REPLY_BYTES;
    relay->max_subscriptions =
        config->max_subscriptions > 0 ? config->max_subscriptions : VKP_I_RELAY_SUBSCRIPTIONS;
    VKP_I_MUTEX_INIT(&relay->mutex);
    for (kind = 0; kind < VKP_SUB_KINDS; kind++) {
        vkp_i_map_init(&relay->subscribers[kind], env);
    }
    relay->shards = (vkp_i_shard *)vkp_i_alloc_zero(env, count * sizeof *relay->shards);
    if (relay->shards == NULL) {
        vkp_i_relay_free(relay);
        return VKP_ERR_NOMEM;
    }
    relay->shard_count = count;
    for (i = 0; i < count && status == VKP_OK; i++) {
        status = vkp_i_shard_open(&relay->shards[i], relay, config, i);
    }
    if (status == VKP_OK) {
        status = vkp_i_relay_open_gate(relay, config);
    }
    if (status == VKP_OK && config->server.ptr != NULL) {
        status = vkp_i_relay_open_client(relay, config);
    }
    if (status != VKP_OK) {
        vkp_relay_unref(relay);
        return status;
    }
    *out = relay;
    return VKP_OK;
}

VKP_API vkp_registry *vkp_relay_get_registry(const vkp_relay *relay)
{
    return relay->registry;
}

VKP_API void vkp_relay_get_stats(const vkp_relay *relay, vkp_relay_stats *stats)
{
    size_t i;
    vkp_gate_stats gate;
    vkp_gate_get_stats(relay->gate, &gate);
    stats->clients = gate.clients;
    stats->accepted = gate.admitted;
    memcpy(stats->refused, gate.refused, sizeof stats->refused);
    stats->messages_in = VKP_I_LOAD(&relay->messages_in);
    stats->deliveries = VKP_I_LOAD(&relay->deliveries);
    stats->lagged = VKP_I_LOAD(&relay->lagged);
    stats->slow_closed = VKP_I_LOAD(&relay->slow_closed);
    stats->protocol_errors = VKP_I_LOAD(&relay->protocol_errors);
    stats->dropped_frames = 0;
    for (i = 0; i < relay->shard_count; i++) {
        stats->dropped_frames += VKP_I_LOAD(&relay->shards[i].profile->dropped);
    }
}

#endif /* VKP_I_IO */

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* VKP_IMPLEMENTATION */

/* ======================================================================================
   >>licence   MIT
   ======================================================================================
   Copyright (c) 2026 valkey_push contributors

   Permission is hereby granted, free of charge, to any person obtaining a copy of this software
   and associated documentation files (the "Software"), to deal in the Software without
   restriction, including without limitation the rights to use, copy, modify, merge, publish,
   distribute, sublicense, and/or sell copies of the Software, and to permit persons to whom the
   Software is furnished to do so, subject to the following conditions:

   The above copyright notice and this permission notice shall be included in all copies or
   substantial portions of the Software.

   THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING
   BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
   NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
   DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
   OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.     */
