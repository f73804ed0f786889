/* valkey_push.h - server pushes for C, in one header
   Made of the parts in src/ by src/amalgamate.sh: edit those. SPDX-License-Identifier: MIT

   Do this, in ONE source file of the program:
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
           >>api-loop  >>api-mpsc  >>api-oneshot  >>api-broadcast  >>api-watch  >>api-cancel
           >>api-select  >>api-handler  >>api-resp  >>api-socket  >>api-conn  >>api-gate
           >>api-listener  >>api-health  >>api-hub  >>api-pushloop  >>api-relay  >>api-sys
           >>api-backend  >>api-typed
       >>impl          implementation: lowest layer first
           >>impl-base  >>impl-sys  >>impl-park  >>impl-bytes  >>impl-map  >>impl-cancel
           >>impl-mpsc  >>impl-mpsc-send  >>impl-mpsc-receive  >>impl-mpsc-ends  >>impl-oneshot
           >>impl-receivers  >>impl-broadcast  >>impl-watch  >>impl-select  >>impl-loop
           >>impl-handler  >>impl-loop-run  >>impl-value  >>impl-resp  >>impl-frame
           >>impl-resp-writer  >>impl-address  >>impl-socket  >>impl-registry  >>impl-gate
           >>impl-conn-queue  >>impl-conn  >>impl-listener  >>impl-health  >>impl-hub
           >>impl-push  >>impl-client  >>impl-client-connection  >>impl-pushloop  >>impl-relay
           >>impl-relay-resp2  >>impl-relay-subscribe  >>impl-relay-commands
           >>impl-relay-serve
       >>licence       the licence in full
*/

#ifndef VALKEY_PUSH_H
#define VALKEY_PUSH_H

/* ======================================================================================
   >>manual   Concepts
   ======================================================================================
   What it is for. A Valkey (or Redis) server pushes: messages of subscribed channels, keys that
   were invalidated. This library carries those pushes to the code, thread or process that wants
   them, and holds what such a program is made of: channels between threads, one-shot replies,
   cancellation, an event loop over a backend, a RESP reader, ref-counted Unix sockets,
   connections with bounded queues, a hub of subscribers, a client that reconnects, a relay.

   The layers, lowest first; each uses only those above it in this list:
       base       statuses, deadlines, env: memory, log, and the operating system in one table
       bytes      immutable ref-counted blocks and slices of them
       mpsc, oneshot, broadcast, watch, cancel, select   what threads say to each other, and how
                  they wait; no I/O (VKP_NO_IO keeps these alone)
       loop       one thread's events: descriptors, timers, calls posted by other threads
       resp       incremental reader, writer
       socket     a listening Unix socket that lives as long as somebody refers to it
       conn       a connection on a loop: outbox, policies, one gathered write per round
       hub        who is subscribed to what: one frame in, one reference per subscriber out
       client     a server connection that many threads share
       push loop  from a channel of pushes to a hub, a connection or a callback
       relay      all of it as a server: local clients in front, one upstream connection behind

   A program of one thread opens a loop, a client on it, and runs:
       static void on_push(void *user, const vkp_push *push)
       {
           if (push->kind == VKP_PUSH_MESSAGE) {
               printf("%.*s\n", VKP_FMT(push->payload));
           }
       }
   Errors aside (examples/subscribe.c has them) the rest is four calls, shown at the top.
   A thread of its own takes the same pushes from a channel (vkp_client_config.pushes):
       while (vkp_mpsc_recv(rx, VKP_FOREVER, &push) == VKP_OK) {
           use(&push);
           vkp_push_unref(&push);
       }
   and asks from wherever it is, with a slot on its stack:
       vkp_oneshot slot; vkp_reply *reply;
       if (vkp_client_command(client, &slot, "INCR", "hits", NULL) == VKP_OK &&
           vkp_oneshot_recv(&slot, vkp_after_ms(250), &reply) == VKP_OK) {
           use(vkp_reply_get_value(reply));
           vkp_reply_unref(reply);
       }

   CHANNELS. mpsc: a queue with many senders and one receiver, bounded (senders wait:
   back-pressure) or not. oneshot: one value, once, in the caller's memory: the reply to a request.
   broadcast: each receiver sees each value, a slow one hears how many it lost. watch: only the
   newest value. cancel: a token that ends waits, with its children. Each end waits in three forms:
   try_x looks, x waits until a deadline, and a loop calls back (vkp_handler_open,
   vkp_mpsc_watch). vkp_select waits for several at once and carries out one:
       vkp_case cases[] = {vkp_case_cancel(stop), vkp_case_mpsc_recv(jobs, &job)};
       if (vkp_select(cases, 2, vkp_after_ms(1000), &won) == VKP_OK && won == 1) { work(&job); }
   A value that one end took is received once or dropped once, through `drop`, whoever goes first.
   A thread that has to wait looks for some microseconds before it sleeps (vkp_env.spins); the
   first sender after that wakes it, the others find it awake. Idle channels cost no processor.
   docs/tokio-to-c.md has each call of Tokio's channels beside ours.

   SOCKETS. A registry knows a program's listening Unix sockets by their paths and keeps none alive.
   Each handle is a reference: vkp_socket_open gives one to the live socket or binds a new
   one, in place of a file that a dead process left; the last vkp_socket_unref removes the file,
   from whichever thread, without waiting for others. A listener keeps its socket, or follows it
   (vkp_listener_config.follow): then clients keep it, each by its seat, and the last to leave turns
   off the light. A gate says who comes in (by default this process's own user), and how many.
   docs/sockets.md goes through a socket's life; examples/socket_life.c shows one.

   OWNERSHIP. Contracts use five words. takes: yours no more, unless the call fails (descriptors
   too). borrows: until the call returns. shares: the object takes a reference of its own. gives:
   one reference is yours to unref. views: valid until the next call that the contract names.
   open gives a handle; ref and unref count; close ends what the object does, once, from any
   thread, and frees nothing: the handle stays valid, and says CLOSED, until its last unref.
   unref(NULL) does nothing. Out-parameters are written only on OK.

   CONFIGS are structs: zero them (VKP_ZERO) and set what matters; every zero is a default. They
   are copied; pointers to ops tables, backends and env are kept and must outlive the object.

   THREADS. The library starts none and keeps no global state. A loop belongs to the thread inside
   vkp_loop_run; connections, listeners, hubs and watches belong to their loop's thread. Any
   thread may: use channels and tokens, post to a loop, push to a connection, close and unref
   connections and clients, send commands, subscribe. Until a thread runs the loop it belongs
   to the one that opened it, which sets everything up. For more cores run more loops; a
   connection stays on its loop for life.

   CALLBACKS run on the loop's thread, never under a lock; any call is legal inside one unless its
   contract says no. After an object's close returned on the loop's thread none of its callbacks
   runs. What is written during a round leaves at its end, one system call per connection.

   DEADLINES are absolute monotonic nanoseconds: vkp_after_ms(250), 0 (do not wait), VKP_FOREVER.

   ERRORS. Everything that can fail returns a vkp_status that the compiler makes you look at.
   Nothing prints, aborts or exits. A call that failed changed nothing, or says what it changed.
   SYS leaves the cause in errno. A programmer's error asserts (VKP_ASSERT) and is INVALID in
   release builds.
   Texts for people go to env.log.

   LIMITS. All queues are bounded in bytes by their configs, the reader in depth, elements, lines
   and bytes. One block, frame or command is below 4 GiB. Host names are resolved by getaddrinfo,
   which may block the loop's thread; addresses in digits never do.

   SIGNALS. Process-wide state is not touched; sends never raise SIGPIPE. vkp_loop_stop and
   vkp_registry_unlink_all may be called in a handler. FORK. A child may unref what it inherited,
   no more; it removes no files.
   SERVERS. RESP3 servers (Redis 6, Valkey) carry commands and pushes on one connection. On a RESP2
   server the client works too, but a connection with subscriptions takes no commands (REFUSED):
   open a second client.                                                                        */

/* ======================================================================================
   >>config   Macros
   ======================================================================================
   VKP_IMPLEMENTATION   unset   in ONE file: compiles the implementation there
   VKP_STATIC           unset   everywhere it is used: all functions are static, a private copy
   VKP_API              extern  everywhere: linkage of the functions (visibility attributes)
   VKP_ASSERT(x)        nothing implementation: programmer's errors; the call returns INVALID too
   VKP_NO_IO            unset   implementation: channels only, no loop, RESP, sockets, client,
                                relay; a file that defines it sees no others declared
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
   Contracts name: who owns what (takes, borrows, shares, gives, views), whether the call may
   wait, from which threads it may come, whether it is legal inside callbacks, and its errors.
   "Loop" as a thread means: the thread that opened the loop, until one runs it; then that one;
   after vkp_loop_run returned, any ONE thread.
   Every pointer argument must be valid; NULL where it is not allowed gives INVALID.           */

/* --------------------------------------------------------------------------------------
   >>api-handles   The handles, by section                                                 */

/* What an object takes from the program around it: memory, log, the operating system. */
typedef struct vkp_env vkp_env;
typedef struct vkp_sys vkp_sys;

/* Bytes that are shared: see vkp_bytes. */
typedef struct vkp_block vkp_block;

/* A server's client, and its replies. */
typedef struct vkp_client vkp_client;
typedef struct vkp_reply vkp_reply;

/* One thread's events. */
typedef struct vkp_loop vkp_loop;
typedef struct vkp_backend vkp_backend;
typedef struct vkp_handler vkp_handler;

/* Channels. tx sends: any number of references, any threads. rx receives: one thread at a time. */
typedef struct vkp_mpsc_tx vkp_mpsc_tx;
typedef struct vkp_mpsc_rx vkp_mpsc_rx;
typedef struct vkp_mpsc_weak vkp_mpsc_weak; /* may become a sender again; keeps nothing open */
typedef struct vkp_oneshot vkp_oneshot;     /* one value, once: no handle, but caller's memory */
typedef struct vkp_broadcast_tx vkp_broadcast_tx;
typedef struct vkp_broadcast_rx vkp_broadcast_rx;
typedef struct vkp_watch_tx vkp_watch_tx;
typedef struct vkp_watch_rx vkp_watch_rx;
typedef struct vkp_cancel vkp_cancel; /* a token that ends waits */

/* RESP. */
typedef struct vkp_resp_reader vkp_resp_reader;

/* Sockets, connections, and who may connect. */
typedef struct vkp_registry vkp_registry;
typedef struct vkp_socket vkp_socket;
typedef struct vkp_socket_pool vkp_socket_pool;
typedef struct vkp_conn vkp_conn;
typedef struct vkp_peer vkp_peer;
typedef struct vkp_gate vkp_gate;
typedef struct vkp_seat vkp_seat;
typedef struct vkp_listener vkp_listener;
typedef struct vkp_health_check vkp_health_check;

/* Where messages go. */
typedef struct vkp_hub vkp_hub;
typedef struct vkp_push_loop vkp_push_loop;
typedef struct vkp_relay vkp_relay;

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

/* --------------------------------------------------------------------------------------
   >>api-bytes   Text views, and immutable ref-counted bytes                               */

/* Borrowed text: not terminated, may hold any byte. */
typedef struct vkp_str {
    const char *ptr;
    size_t len; /* bytes */
} vkp_str;

/* Arguments of printf's %.*s for a vkp_str (texts above INT_MAX bytes are cut by printf). */
#define VKP_FMT(s) (int)(s).len, (s).ptr

/* A view of a terminated string; NULL gives the empty text. Any thread. */
VKP_API vkp_str vkp_str_of(const char *text);

/* A slice of an immutable block. The value holds ONE reference when block is not NULL; copying
   the struct does not copy the reference. Block NULL: static bytes, or empty.                 */
typedef struct vkp_bytes {
    const uint8_t *data;
    size_t len;
    vkp_block *block;
} vkp_bytes;

/* Copy len bytes into a new block.
   Owns:   borrows data; gives *out       Blocks: never     Threads: any     In callbacks: ok
   Errors: NOMEM, INVALID (out NULL, or data NULL with len > 0, or len above 4 GiB - 1)        */
VKP_API VKP_NODISCARD vkp_status vkp_bytes_copy(const vkp_env *env, const void *data, size_t len,
                                                vkp_bytes *out);

/* Bytes that outlive everything (string literals): no block, no count. Any thread. */
VKP_API vkp_bytes vkp_bytes_static(const void *data, size_t len);

/* One more reference to the same bytes (gives). Any thread. */
VKP_API vkp_bytes vkp_bytes_ref(const vkp_bytes *bytes);

/* A part of the bytes, with its own reference (gives); clamped to what is there. Any thread. */
VKP_API vkp_bytes vkp_bytes_slice(const vkp_bytes *bytes, size_t offset, size_t len);

/* Give the reference back and empty the value; the last one frees the block. NULL and an empty
   value are ignored. Any thread.                                                              */
VKP_API void vkp_bytes_unref(vkp_bytes *bytes);

#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-value   Values of RESP2 and RESP3
   Facts: the RESP3 specification (redis/redis-specifications, protocol/RESP3.md).            */

typedef enum vkp_resp_type {
    VKP_RESP_NULL = 0, /* _  and $-1, *-1 of RESP2: see VKP_VALUE_NULL_BULK */
    VKP_RESP_STRING,  /* $ + =  str, len; VKP_VALUE_SIMPLE and VKP_VALUE_VERBATIM tell them apart */
    VKP_RESP_ERROR,   /* - !  str, len */
    VKP_RESP_INTEGER, /* :  integer */
    VKP_RESP_DOUBLE,  /* ,  str, len: the digits; vkp_value_get_double converts */
    VKP_RESP_BOOL,    /* #  integer: 0 or 1 */
    VKP_RESP_BIGNUM,  /* (  str, len: the digits with their sign */
    VKP_RESP_ARRAY,   /* *  len elements */
    VKP_RESP_SET,     /* ~  len elements */
    VKP_RESP_PUSH,    /* >  len elements; the first is a string, the kind of the push */
    VKP_RESP_MAP,     /* %  len elements: key, value, key, value ... (twice the wire's count) */
    VKP_RESP_ATTRIBUTE /* |  as VKP_RESP_MAP; stands before the value that it annotates */
} vkp_resp_type;

#ifndef __cplusplus
/* In C an enumerator is an int, which compilers compare with any enum in silence. With these casts
   they warn when a type of RESP, a bit of readiness or a status is taken for another.         */
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

/* vkp_value.flags: bits. */
typedef enum vkp_value_flags {
    VKP_VALUE_SIMPLE = 1,     /* + or -: a line */
    VKP_VALUE_VERBATIM = 2,   /* =: str is past the four bytes "txt:" */
    VKP_VALUE_NULL_BULK = 4,  /* null came as $-1 */
    VKP_VALUE_NULL_ARRAY = 8, /* null came as *-1 */
    /* A message push inside another aggregate: servers before 7.2 put one into the array of an EXEC
       that publishes to its own connection. Not an element: counted by nobody, passed over by the
       walk.                                                                                    */
    VKP_VALUE_OUT_OF_BAND = 16
} vkp_value_flags;

/* One value of a tree. A tree is one array in reading order: the elements of an aggregate follow
   it, each with its own. Walk with vkp_value_get_first and vkp_value_get_next, never by index. */
typedef struct vkp_value {
    uint8_t type;  /* vkp_resp_type */
    uint8_t flags; /* VKP_F_* */
    uint16_t i_depth;
    uint32_t span;         /* places in the array that it takes, its elements included */
    uint32_t attributes;   /* places back to the VKP_RESP_ATTRIBUTE that annotates it; 0 = none */
    uint32_t i_has_nested; /* of an aggregate: it holds a VKP_VALUE_OUT_OF_BAND */
    size_t len;            /* bytes of str, or number of elements */
    union {
        const char *str; /* not terminated */
        int64_t integer;
        size_t i_offset;
    } u;
} vkp_value;

/* The first element of an aggregate, or NULL; then its next sibling, or NULL after the last.
   `parent` is the aggregate. Attributes are passed over. Any thread; views.                   */
VKP_API const vkp_value *vkp_value_get_first(const vkp_value *parent);
VKP_API const vkp_value *vkp_value_get_next(const vkp_value *parent, const vkp_value *value);

/* str and len of a STRING, ERROR, BIGNUM or DOUBLE; empty for everything else, NULL included.
   Views. Any thread.                                                                          */
VKP_API vkp_str vkp_value_get_str(const vkp_value *value);

/* The number of a DOUBLE or an INTEGER in any locale; 0 for the rest. Any thread. */
VKP_API double vkp_value_get_double(const vkp_value *value);

/* True for a STRING or ERROR that equals the terminated text, ASCII case ignored. Any thread. */
VKP_API bool vkp_value_is_text(const vkp_value *value, vkp_str text);

typedef struct vkp_resp_config {
    uint32_t max_depth;     /* nested aggregates; default 128, at most 65,000 */
    uint32_t max_elements;  /* elements of one aggregate on the wire; default 4,294,967,295 / 2 */
    size_t max_bulk_bytes;  /* one bulk string; default 512 MiB */
    size_t max_line_bytes;  /* one line, CRLF not counted; default 64 KiB */
    size_t max_frame_bytes; /* one whole frame; default 1 GiB, at most 4 GiB - 1 */
    bool lenient; /* accept what old servers send: ,nan(x) ,-nan ,5. ,.5 and >-1 as null */
    const vkp_env *env;
} vkp_resp_config;

#endif /* VKP_NO_IO */

#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-push   What a server pushes                                                       */

typedef enum vkp_sub_kind {
    VKP_SUB_CHANNEL = 0, /* SUBSCRIBE, exact name */
    VKP_SUB_PATTERN,     /* PSUBSCRIBE, glob */
    VKP_SUB_SHARD        /* SSUBSCRIBE, exact name */
} vkp_sub_kind;
#define VKP_SUB_KINDS 3

typedef enum vkp_push_kind {
    VKP_PUSH_MESSAGE = 0,  /* channel, payload */
    VKP_PUSH_PMESSAGE,     /* pattern, channel, payload */
    VKP_PUSH_SMESSAGE,     /* channel, payload */
    VKP_PUSH_SUBSCRIBED,   /* channel: confirmed for the first time, or again after an outage */
    VKP_PUSH_UNSUBSCRIBED, /* channel; also when the server took a shard channel away */
    VKP_PUSH_INVALIDATE,   /* frame: the keys; a null instead means all of them */
    VKP_PUSH_OTHER,        /* any other push: frame, kind's name in channel */
    VKP_PUSH_CONNECTED,    /* the first connection stands */
    VKP_PUSH_DISCONNECTED, /* once per outage; payload tells why */
    VKP_PUSH_RECONNECTED,  /* the outage is over; subscriptions are on their way back */
    VKP_PUSH_GAP,          /* all are back: messages between from_ns and to_ns may be lost */
    VKP_PUSH_LAGGED        /* the channel of pushes was full: `missed` were dropped before this */
} vkp_push_kind;

/* The kind in lower case; static, never NULL. Any thread. */
VKP_API const char *vkp_push_kind_str(vkp_push_kind kind);

/* One push. A value: in a callback it is borrowed; out of a channel it is yours to unref. */
typedef struct vkp_push {
    vkp_push_kind kind;
    vkp_sub_kind sub; /* of SUBSCRIBED, UNSUBSCRIBED and the messages */
    vkp_bytes frame;  /* the RESP bytes as received; empty for events of the client */
    vkp_str channel;  /* these view frame */
    vkp_str pattern;
    vkp_str payload;
    uint64_t from_ns; /* GAP: monotonic times */
    uint64_t to_ns;
    uint64_t missed; /* LAGGED */
} vkp_push;

/* What a push costs a channel, in bytes: for vkp_mpsc_config.cost. Any thread. */
VKP_API size_t vkp_push_get_cost(const void *push);

/* Drops a push that nobody received: for vkp_mpsc_config.drop. Any thread. */
VKP_API void vkp_push_drop(void *user, void *push);

/* Give the push's reference back and empty it. Any thread. */
VKP_API void vkp_push_unref(vkp_push *push);

/* Read a frame as a push. Messages need no allocation and no reader.
   Owns:   *push views value and gets no reference (frame is empty)   Errors: INVALID (no push) */
VKP_API VKP_NODISCARD vkp_status vkp_push_from_value(const vkp_value *value, vkp_push *push);

#endif /* VKP_NO_IO */

#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-client   A connection to a server, shared by many threads                         */

/* A reply: one whole value and the bytes it came in. Immutable, ref-counted. */
VKP_API const vkp_value *vkp_reply_get_value(const vkp_reply *reply); /* views the reply */
VKP_API vkp_bytes vkp_reply_get_frame(const vkp_reply *reply);        /* views, no reference */
VKP_API vkp_reply *vkp_reply_ref(vkp_reply *reply);
VKP_API void vkp_reply_unref(vkp_reply *reply); /* NULL is ignored; any thread */

typedef enum vkp_client_state {
    VKP_CLIENT_CONNECTING = 0,
    VKP_CLIENT_READY,
    VKP_CLIENT_WAITING, /* for the next try */
    VKP_CLIENT_CLOSED
} vkp_client_state;

typedef struct vkp_client_config {
    vkp_str address;             /* required */
    vkp_str username;            /* default: the default user */
    vkp_str password;            /* default: none, no AUTH */
    vkp_str name;                /* CLIENT SETNAME; default: none */
    int protocol;                /* 3, or 2: never HELLO; 0 = 3, falling back to 2 */
    uint64_t connect_timeout_ms; /* default 5,000; covers the handshake too; VKP_OFF: none */
    uint64_t retry_min_ms; /* default 50: the bound of the first wait; full jitter, doubling */
    uint64_t retry_max_ms; /* default 5,000 */
    uint64_t heartbeat_ms; /* PING after that long without a byte; default 15,000; VKP_OFF: never */
    uint64_t heartbeat_timeout_ms; /* default 5,000: then the connection counts as lost */
    size_t queue_bytes;            /* most bytes of commands waiting or in flight; default 64 MiB */
    vkp_resp_config resp;          /* limits of the reader; lenient is set */
    /* Pushes, on the loop's thread; the push is borrowed. Either this, or the channel. */
    void (*on_push)(void *user, const vkp_push *push);
    void *user;
    vkp_mpsc_tx *pushes; /* of vkp_push; shared. A full channel drops, and LAGGED tells. */
    const vkp_env *env;  /* default: the loop's */
} vkp_client_config;

/* Open a client and begin to connect; it reconnects until it is closed. With a password the
   connection is refused rather than used unauthenticated.
   Owns:   borrows config (copies texts), shares loop and pushes; gives *client
   Blocks: on DNS for host names only    Threads: loop's    In callbacks: ok
   Errors: INVALID, NOMEM, CLOSED (loop)                                                       */
VKP_API VKP_NODISCARD vkp_status vkp_client_open(vkp_loop *loop, const vkp_client_config *config,
                                                 vkp_client **client);

VKP_API vkp_client *vkp_client_ref(vkp_client *client); /* any thread */
VKP_API void vkp_client_unref(vkp_client *client);      /* the last one closes; any thread */

/* Close: commands not answered get CLOSED, then nothing is called any more. Idempotent. Any
   thread; from others than the loop's it is posted.                                           */
VKP_API void vkp_client_close(vkp_client *client);

VKP_API vkp_client_state vkp_client_get_state(const vkp_client *client); /* any thread */
VKP_API int vkp_client_get_protocol(const vkp_client *client);           /* 0 until one was tried */

/* What ended the last connection or try, for people. Copies at most size bytes. Any thread. */
VKP_API void vkp_client_get_error(vkp_client *client, char *text, size_t size);

/* Subscribe, once upstream however often it is asked; each call wants one unsubscribe. Survives
   outages. SUBSCRIBED follows in the push stream.
   Owns:   borrows name     Blocks: never     Threads: any     In callbacks: ok
   Errors: NOMEM, CLOSED, INVALID                                                              */
VKP_API VKP_NODISCARD vkp_status vkp_client_subscribe(vkp_client *client, vkp_sub_kind kind,
                                                      vkp_str name);

/* As vkp_client_subscribe, and done(user, status) on the loop's thread, once: OK when the server
   confirmed (at once if it had), DISCONNECTED when there is no connection (the subscription
   stands and comes with it), REFUSED (the server said no: the subscription is gone), CLOSED.  */
VKP_API VKP_NODISCARD vkp_status vkp_client_subscribe_then(vkp_client *client, vkp_sub_kind kind,
                                                           vkp_str name,
                                                           void (*done)(void *user, vkp_status),
                                                           void *user);

/* Give up one interest; the last one unsubscribes. Errors: NOMEM, CLOSED. Any thread. A name that
   was not subscribed is ignored.                                                              */
VKP_API VKP_NODISCARD vkp_status vkp_client_unsubscribe(vkp_client *client, vkp_sub_kind kind,
                                                        vkp_str name);

/* Send a command; its reply comes into the one-shot as a vkp_reply* (gives; unref it). An error
   of the server is a reply of type VKP_RESP_ERROR. The slot is initialised here. The arguments are
   terminated strings, the last one NULL.
   Owns:   borrows the arguments; the slot until vkp_oneshot_recv returned or closed it
   Blocks: never     Threads: any     In callbacks: ok (take the reply with vkp_oneshot_try_recv)
   Errors: DISCONNECTED (no connection now: nothing was sent), FULL (queue_bytes), REFUSED (a
   command that would break the sharing: the subscribe family, HELLO, RESET, QUIT, MONITOR,
   CLIENT REPLY, MULTI, ...), LIMIT (more than 64 arguments: vkp_client_command_argv takes them),
   CLOSED, NOMEM, INVALID. After OK, recv gives CLOSED when the connection was lost before the
   reply: the command may or may not have run.                                                 */
VKP_API VKP_NODISCARD vkp_status vkp_client_command(vkp_client *client, vkp_oneshot *reply, ...)
    __attribute__((sentinel));

/* The same with counted arguments. */
VKP_API VKP_NODISCARD vkp_status vkp_client_command_argv(vkp_client *client, vkp_oneshot *reply,
                                                         size_t argc, const vkp_str *argv);

/* Send bytes that hold `replies` whole commands, kept together on the wire; on_reply gets the
   value of the LAST reply, on the loop's thread, exactly once: status OK, or with NULL
   DISCONNECTED, CLOSED, or REFUSED (RESP2 and something is subscribed). The bytes are not
   inspected.
   Owns:   borrows commands (shares the block); the value and the frame view until on_reply returns
   Blocks: never     Threads: any     Errors: DISCONNECTED, FULL, CLOSED, NOMEM, INVALID       */
typedef void (*vkp_reply_fn)(void *user, vkp_status status, const vkp_value *value,
                             const vkp_bytes *frame);
VKP_API VKP_NODISCARD vkp_status vkp_client_send(vkp_client *client, const vkp_bytes *commands,
                                                 uint32_t replies, vkp_reply_fn on_reply,
                                                 void *user);

#endif /* VKP_NO_IO */

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

/* --------------------------------------------------------------------------------------
   >>api-mpsc   Many senders, one receiver                                                 */

typedef struct vkp_mpsc_config {
    size_t elem_bytes;     /* bytes of one value; required */
    size_t capacity_items; /* most values queued; 0 = unbounded */
    size_t capacity_bytes; /* most cost queued, by cost(); 0 = unbounded; one value always fits */
    /* Bytes that a value stands for; default elem_bytes. Used with capacity_bytes. Called at send
       and at receive, under the channel's lock: the same answer each time, no library call.   */
    size_t (*cost)(const void *item);
    void (*drop)(void *user, void *item); /* called once on each value nobody received */
    void *user;                           /* handed to drop */
    const vkp_env *env;
    /* Senders of vkp_mpsc_tx_clone have a lane each, so that threads that send do not meet: the
       order of values is kept per sender only, and capacity_items counts per sender.           */
    bool lanes;
} vkp_mpsc_config;

/* Open a channel: its one receiver and the first sender. Memory for values comes with the first
   ones and grows with need; what a burst took is given back when the receiver finds nothing.
   Values lie at addresses aligned to 8, to 16 where elem_bytes is a multiple of 16, to 64 where
   it is a multiple of 64.
   Owns:   borrows config; gives *tx and *rx   Blocks: never   Threads: any   In callbacks: ok
   Errors: INVALID (elem_bytes 0 or above 64 KiB; lanes with capacity_bytes), NOMEM            */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_open(const vkp_mpsc_config *config, vkp_mpsc_tx **tx,
                                               vkp_mpsc_rx **rx);

/* One more reference to the same sender (gives, the same pointer). Any thread. */
VKP_API vkp_mpsc_tx *vkp_mpsc_tx_ref(vkp_mpsc_tx *tx);

/* Another sender for the same receiver. Without config.lanes that is vkp_mpsc_tx_ref, with it the
   sender has a lane of its own, for which the receiver waits at most 64 values of each other.
   Owns:   gives *clone     Blocks: never     Threads: any     Errors: NOMEM, INVALID          */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_tx_clone(vkp_mpsc_tx *tx, vkp_mpsc_tx **clone);

/* One reference less. After the last one of all senders the receiver drains, then gets CLOSED.
   NULL is ignored. Any thread.                                                                */
VKP_API void vkp_mpsc_tx_unref(vkp_mpsc_tx *tx);

/* A weak sender (gives): it does not keep the channel open for the receiver. Any thread. Upgrading
   gives *tx, a sender. Errors: CLOSED (the last sender has gone), NOMEM (a lane), INVALID.    */
VKP_API vkp_mpsc_weak *vkp_mpsc_downgrade(vkp_mpsc_tx *tx);
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_upgrade(vkp_mpsc_weak *weak, vkp_mpsc_tx **tx);
VKP_API void vkp_mpsc_weak_unref(vkp_mpsc_weak *weak); /* NULL is ignored */

/* Enqueue one value, waiting for room until the deadline. Waiting senders go in order of arrival.
   Owns:   takes what *item owns (on failure it stays the caller's)
   Blocks: until deadline_ns      Threads: any      In callbacks: would stall the loop
   Errors: CLOSED (receiver closed), TIMEOUT, NOMEM, INVALID                                   */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_send(vkp_mpsc_tx *tx, const void *item,
                                               uint64_t deadline_ns);

/* Enqueue one value without waiting; never overtakes a waiting sender.
   Owns:   takes what *item owns (on failure it stays the caller's)
   Blocks: never          Threads: any          In callbacks: ok
   Errors: FULL (at capacity), CLOSED (receiver closed), NOMEM, INVALID                        */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_try_send(vkp_mpsc_tx *tx, const void *item);

/* Enqueue the `count` values of an array, in order, waiting for room until the deadline (0: as many
   as fit now). *sent is written on OK, at least 1: fewer than count means that the deadline
   passed, the receiver closed, or memory ran out, and the values behind stay the caller's.
   Threads, Errors: as vkp_mpsc_send, when none was sent                                       */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_send_many(vkp_mpsc_tx *tx, const void *items,
                                                    size_t count, uint64_t deadline_ns,
                                                    size_t *sent);

/* A place in the queue, in the caller's memory: build the value at `item`, then commit or abort,
   once, on any thread. The receiver waits behind the place until then.                        */
typedef struct vkp_mpsc_permit {
    void *item; /* elem_bytes, uninitialised; yours until commit or abort */
    void *i_lane;
    void *i_ring;
    uint64_t i_ticket;
} vkp_mpsc_permit;

/* Take a place, waiting for room until the deadline; or without waiting.
   Owns:   *permit views the channel: commit or abort it before the sender's unref
   Blocks: until deadline_ns / never      Threads: any
   Errors: as vkp_mpsc_send / as vkp_mpsc_try_send; INVALID with capacity_bytes, as a value that is
   not there yet costs nothing known                                                           */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_reserve(vkp_mpsc_tx *tx, uint64_t deadline_ns,
                                                  vkp_mpsc_permit *permit);
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_try_reserve(vkp_mpsc_tx *tx, vkp_mpsc_permit *permit);

/* The value is built: it is received even if the receiver closed meanwhile, and goes to `drop` if
   the receiver is gone. Takes what the value owns. Never blocks.                              */
VKP_API void vkp_mpsc_commit(vkp_mpsc_permit *permit);

/* No value: the place is skipped, and free again when the receiver comes to it. Never blocks. */
VKP_API void vkp_mpsc_abort(vkp_mpsc_permit *permit);

/* Wait until the receiver closes or goes: OK, TIMEOUT, INVALID. Any thread; would stall a loop. */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_wait_closed(vkp_mpsc_tx *tx, uint64_t deadline_ns);

/* Plain reads, out of date at once while others send or receive. Any thread.
   is_closed: the receiver closed, sending cannot succeed any more. room: values that fit now by
   their number, SIZE_MAX when that is unbounded. capacity: capacity_items. senders, weak_senders:
   references.                                                                                  */
VKP_API bool vkp_mpsc_is_closed(const vkp_mpsc_tx *tx);
VKP_API size_t vkp_mpsc_get_room(const vkp_mpsc_tx *tx);
VKP_API size_t vkp_mpsc_get_capacity(const vkp_mpsc_tx *tx);
VKP_API size_t vkp_mpsc_get_senders(const vkp_mpsc_tx *tx);
VKP_API size_t vkp_mpsc_get_weak_senders(const vkp_mpsc_tx *tx);

/* Take the oldest value, waiting until the deadline.
   Owns:   gives what *out owns     Blocks: until deadline_ns     Threads: the receiver's
   Errors: CLOSED (drained, and no sender is left or vkp_mpsc_close was called), TIMEOUT, INVALID */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_recv(vkp_mpsc_rx *rx, uint64_t deadline_ns, void *out);

/* Take the oldest value if there is one. As vkp_mpsc_recv, EMPTY instead of waiting: also while the
   oldest place is another sender's who is about to fill it, or holds a permit.                */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_try_recv(vkp_mpsc_rx *rx, void *out);

/* Take up to `capacity` values at once into the array `out`; waits only for the first, with
   deadline 0 not at all. *count is written on OK, at least 1. Errors as vkp_mpsc_recv.        */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_recv_many(vkp_mpsc_rx *rx, uint64_t deadline_ns,
                                                    void *out, size_t capacity, size_t *count);

/* Look at the oldest value where it lies.
   Owns:   *item views the channel: valid until the next call that receives   Blocks: never
   Threads: the receiver's     Errors: EMPTY, CLOSED, INVALID                                  */
VKP_API VKP_NODISCARD vkp_status vkp_mpsc_peek(vkp_mpsc_rx *rx, const void **item);

/* Values queued now, places reserved included; out of date at once while others send. is_closed:
   the receiver closed or the last sender went: nothing new comes, what is queued is still received.
   Receiver's thread.                                                                          */
VKP_API size_t vkp_mpsc_get_len(const vkp_mpsc_rx *rx);
VKP_API bool vkp_mpsc_rx_is_closed(const vkp_mpsc_rx *rx);

/* Refuse new values: senders get CLOSED, waiting ones at once; queued ones are still received,
   and those of places reserved before. Idempotent. Any thread.                                */
VKP_API void vkp_mpsc_close(vkp_mpsc_rx *rx);

/* Close, drop what is queued, give the receiver back. NULL is ignored. Its handlers are given back
   before. Receiver's thread.                                                                  */
VKP_API void vkp_mpsc_rx_unref(vkp_mpsc_rx *rx);

/* --------------------------------------------------------------------------------------
   >>api-oneshot   One value, once, in the caller's memory                                 */

#define VKP_ONESHOT_BYTES 48

/* Lives in the receiver's memory (a stack is fine): no allocation, no handle. The fields are
   private. The sender may use it until it sent or abandoned; the receiver until recv returned or
   it closed. A library-side sender (vkp_client_command) detaches itself on close; with a sender
   of your own the memory must outlive it, or come from vkp_oneshot_open.                      */
struct vkp_oneshot {
    uint32_t i_state;
    uint32_t i_elem_bytes;
    void *i_receiver; /* waiters */
    void *i_sender;
    void *i_owner;                              /* the sender's record, for i_detach */
    void (*i_detach)(struct vkp_oneshot *slot); /* makes the sender forget this slot */
    void (*i_drop)(void *user, void *item);
    void *i_user;
    const vkp_env *i_env;
    union {
        void *align_pointer;
        uint64_t align_u64;
        unsigned char bytes[VKP_ONESHOT_BYTES];
    } i_value;
};

/* Prepare the slot for one value.
   Owns:   the caller's memory; drop (may be NULL) is called with user on a value never received
   Blocks: never     Threads: any, before the sender sees it     In callbacks: ok
   Errors: INVALID (elem_bytes 0 or above VKP_ONESHOT_BYTES)                                   */
VKP_API VKP_NODISCARD vkp_status vkp_oneshot_init(vkp_oneshot *slot, const vkp_env *env,
                                                  size_t elem_bytes,
                                                  void (*drop)(void *user, void *item), void *user);

/* The same on the heap, for sides that end in any order: *slot holds one reference for each side,
   given back with vkp_oneshot_tx_unref and vkp_oneshot_rx_unref.
   Owns:   gives *slot, twice     Blocks: never     Threads: any     In callbacks: ok
   Errors: NOMEM, INVALID (as vkp_oneshot_init)                                                */
VKP_API VKP_NODISCARD vkp_status vkp_oneshot_open(const vkp_env *env, size_t elem_bytes,
                                                  void (*drop)(void *user, void *item), void *user,
                                                  vkp_oneshot **slot);

/* Sender: abandon a slot that was not sent, and give the sender's reference back. For slots of
   vkp_oneshot_open. NULL is ignored. Sender's thread.                                         */
VKP_API void vkp_oneshot_tx_unref(vkp_oneshot *slot);

/* Receiver: close the slot, and give the receiver's reference back. For slots of vkp_oneshot_open.
   NULL is ignored. Receiver's thread.                                                         */
VKP_API void vkp_oneshot_rx_unref(vkp_oneshot *slot);

/* Sender: deliver the value and wake the receiver. The slot is not touched afterwards.
   Owns:   takes what *item owns (on CLOSED it stays the caller's)
   Blocks: never     Threads: the sender's, once     In callbacks: ok
   Errors: CLOSED (the receiver closed first), INVALID (sent before)                           */
VKP_API VKP_NODISCARD vkp_status vkp_oneshot_send(vkp_oneshot *slot, const void *item);

/* Sender: give up without a value; the receiver gets CLOSED. The slot is not touched afterwards.
   Ignored after a send; NULL is ignored. Sender's thread.                                     */
VKP_API void vkp_oneshot_abandon(vkp_oneshot *slot);

/* Receiver: wait for the value until the deadline. Whatever it returns, the slot is closed then:
   its memory may go (after TIMEOUT the sender gets CLOSED).
   Owns:   gives what *out owns     Blocks: until deadline_ns     Threads: the receiver's
   Errors: CLOSED (abandoned, or closed before), TIMEOUT, INVALID                              */
VKP_API VKP_NODISCARD vkp_status vkp_oneshot_recv(vkp_oneshot *slot, uint64_t deadline_ns,
                                                  void *out);

/* Receiver: as vkp_oneshot_recv, but EMPTY instead of waiting, and EMPTY leaves the slot open. */
VKP_API VKP_NODISCARD vkp_status vkp_oneshot_try_recv(vkp_oneshot *slot, void *out);

/* Receiver: refuse the value; one that was sent already is dropped through drop. Idempotent; NULL
   is ignored. Afterwards the memory of a slot of vkp_oneshot_init may be reused. Receiver's
   thread.                                                                                     */
VKP_API void vkp_oneshot_close(vkp_oneshot *slot);

/* Sender: true once the receiver closed; and to wait for that: OK, TIMEOUT, INVALID.
   Sender's thread, before it sent.                                                            */
VKP_API bool vkp_oneshot_is_closed(const vkp_oneshot *slot);
VKP_API VKP_NODISCARD vkp_status vkp_oneshot_wait_closed(vkp_oneshot *slot, uint64_t deadline_ns);

/* --------------------------------------------------------------------------------------
   >>api-broadcast   Every receiver sees every value                                       */

typedef struct vkp_broadcast_config {
    size_t elem_bytes; /* bytes of one value; required */
    size_t
        capacity_items; /* values kept for slow receivers; rounded up to a power of two; required */
    /* For values that own something, of at most 256 bytes: retain makes the copy *item own it too,
       drop gives that up. Both or neither. retain is called for each copy handed out, under a latch
       of the value's place: count a reference there (vkp_bytes_ref), and do no more. The ring keeps
       a value until another one takes its place, or the channel ends.                         */
    void (*retain)(void *user, void *item);
    void (*drop)(void *user, void *item);
    void *user;
    const vkp_env *env;
} vkp_broadcast_config;

/* Open a channel without receivers. All memory is taken here.
   Owns:   borrows config; gives *tx     Blocks: never     Threads: any     In callbacks: ok
   Errors: INVALID (elem_bytes 0 or above 64 KiB, 256 bytes with retain; no capacity; only one of
   retain and drop), NOMEM                                                                     */
VKP_API VKP_NODISCARD vkp_status vkp_broadcast_open(const vkp_broadcast_config *config,
                                                    vkp_broadcast_tx **tx);
VKP_API vkp_broadcast_tx *vkp_broadcast_tx_ref(vkp_broadcast_tx *tx); /* any thread */

/* One sender less. After the last one receivers drain, then get CLOSED. NULL is ignored. */
VKP_API void vkp_broadcast_tx_unref(vkp_broadcast_tx *tx);

/* A receiver of what is sent from now on; beside a sender, or beside another receiver.
   Owns:   gives *rx     Blocks: never     Threads: any / the receiver's     Errors: NOMEM,
   INVALID                                                                                      */
VKP_API VKP_NODISCARD vkp_status vkp_broadcast_subscribe(vkp_broadcast_tx *tx,
                                                         vkp_broadcast_rx **rx);
VKP_API VKP_NODISCARD vkp_status vkp_broadcast_resubscribe(vkp_broadcast_rx *rx,
                                                           vkp_broadcast_rx **fresh);
VKP_API void vkp_broadcast_rx_unref(vkp_broadcast_rx *rx); /* NULL is ignored */

/* Send one value to every receiver, over the oldest one if the ring is full. Never waits for
   receivers. With several senders the order is the same for all receivers.
   Owns:   takes what *item owns (on failure it stays the caller's)
   Blocks: never     Threads: any     In callbacks: ok     Errors: CLOSED (no receiver), INVALID */
VKP_API VKP_NODISCARD vkp_status vkp_broadcast_send(vkp_broadcast_tx *tx, const void *item);

/* Take the oldest value not seen yet, waiting until the deadline.
   Owns:   gives a copy: what it owns is yours     Blocks: until deadline_ns     Threads: rx's
   Errors: LAGGED (values were lost, vkp_broadcast_get_missed tells how many; the next receive gives
   the oldest one still there; *out may have been written), CLOSED (drained, and no sender is left),
   TIMEOUT, INVALID                                                                            */
VKP_API VKP_NODISCARD vkp_status vkp_broadcast_recv(vkp_broadcast_rx *rx, uint64_t deadline_ns,
                                                    void *out);

/* As vkp_broadcast_recv, EMPTY instead of waiting. */
VKP_API VKP_NODISCARD vkp_status vkp_broadcast_try_recv(vkp_broadcast_rx *rx, void *out);

/* Take up to `capacity` values at once; waits only for the first, with deadline 0 not at all.
   *count is written on OK, at least 1. Errors as vkp_broadcast_recv.                          */
VKP_API VKP_NODISCARD vkp_status vkp_broadcast_recv_many(vkp_broadcast_rx *rx, uint64_t deadline_ns,
                                                         void *out, size_t capacity, size_t *count);

/* Values lost: at the last LAGGED, exactly. Values waiting, those already lost included.
   Receiver's thread.                                                                          */
VKP_API uint64_t vkp_broadcast_get_missed(const vkp_broadcast_rx *rx);
VKP_API uint64_t vkp_broadcast_get_len(const vkp_broadcast_rx *rx);

/* Receivers now; and wait until there is none: OK, TIMEOUT, INVALID. Any thread. */
VKP_API size_t vkp_broadcast_get_receivers(const vkp_broadcast_tx *tx);
VKP_API VKP_NODISCARD vkp_status vkp_broadcast_wait_closed(vkp_broadcast_tx *tx,
                                                           uint64_t deadline_ns);

/* --------------------------------------------------------------------------------------
   >>api-watch   Only the newest value                                                     */

typedef struct vkp_watch_config {
    size_t elem_bytes;   /* bytes of the value; required */
    const void *initial; /* the first value, elem_bytes; NULL: zeroes. Taken on success. */
    /* For values that own something: drop is called once on each that was replaced and is borrowed
       no more. Such values are borrowed, not copied out (vkp_watch_get is INVALID).           */
    void (*drop)(void *user, void *item);
    void *user; /* handed to drop */
    const vkp_env *env;
} vkp_watch_config;

/* Open a channel that holds the initial value, with one sender and no receivers.
   Owns:   borrows config; gives *tx     Blocks: never     Threads: any     In callbacks: ok
   Errors: INVALID (elem_bytes 0 or above 64 KiB), NOMEM                                       */
VKP_API VKP_NODISCARD vkp_status vkp_watch_open(const vkp_watch_config *config, vkp_watch_tx **tx);
VKP_API vkp_watch_tx *vkp_watch_tx_ref(vkp_watch_tx *tx); /* any thread */
VKP_API void vkp_watch_tx_unref(vkp_watch_tx *tx);        /* NULL is ignored */

/* A receiver that has seen the value of now; a copy of one, which has seen what that one has.
   Owns:   gives *rx     Blocks: never     Threads: any / the receiver's     Errors: NOMEM,
   INVALID                                                                                      */
VKP_API VKP_NODISCARD vkp_status vkp_watch_subscribe(vkp_watch_tx *tx, vkp_watch_rx **rx);
VKP_API VKP_NODISCARD vkp_status vkp_watch_rx_clone(vkp_watch_rx *rx, vkp_watch_rx **copy);
VKP_API void vkp_watch_rx_unref(vkp_watch_rx *rx); /* ends a borrow; NULL is ignored */

/* Replace the value and wake who waits for a change. Never waits for borrowers: they keep the value
   they look at. send is CLOSED without receivers, replace stores the value nevertheless.
   Owns:   takes what *item owns (on failure it stays the caller's)
   Blocks: for other senders only     Threads: any     In callbacks: ok
   Errors: CLOSED (send), NOMEM (every old value is borrowed), INVALID                         */
VKP_API VKP_NODISCARD vkp_status vkp_watch_send(vkp_watch_tx *tx, const void *item);
VKP_API VKP_NODISCARD vkp_status vkp_watch_replace(vkp_watch_tx *tx, const void *item);

/* Change the value in place of a copy: modify gets the bytes of the current value and returns
   whether it changed them; only then is a new version there. Not for values with a drop.
   modify runs under the senders' lock: no call of this channel in it.
   *changed, when not NULL, is written on OK. Threads, Errors: as vkp_watch_replace            */
VKP_API VKP_NODISCARD vkp_status vkp_watch_send_if_modified(vkp_watch_tx *tx,
                                                            bool (*modify)(void *user, void *item),
                                                            void *user, bool *changed);

/* Copy the newest value out; get_and_update also marks it as seen. Never waits.
   Threads: the receiver's     Errors: INVALID (values with a drop)                            */
VKP_API VKP_NODISCARD vkp_status vkp_watch_get(vkp_watch_rx *rx, void *out);
VKP_API VKP_NODISCARD vkp_status vkp_watch_get_and_update(vkp_watch_rx *rx, void *out);

/* Look at the newest value where it lies; borrow_and_update also marks it as seen. One borrow per
   receiver at a time; it keeps nobody waiting.
   Owns:   the pointer views the value until vkp_watch_release (or the receiver's unref)
   Blocks: never     Threads: the receiver's     NULL: a borrow is out                         */
VKP_API const void *vkp_watch_borrow(vkp_watch_rx *rx);
VKP_API const void *vkp_watch_borrow_and_update(vkp_watch_rx *rx);
VKP_API void vkp_watch_release(vkp_watch_rx *rx); /* ignored without a borrow */

/* Wait for a version not seen yet, and mark it as seen. No version is missed: one sent before the
   call counts.
   Blocks: until deadline_ns     Threads: the receiver's
   Errors: CLOSED (all seen, and no sender is left), TIMEOUT, INVALID                          */
VKP_API VKP_NODISCARD vkp_status vkp_watch_changed(vkp_watch_rx *rx, uint64_t deadline_ns);

/* Whether a version is there that was not seen (still so after the senders went); forget or pretend
   to have seen it. Receiver's thread.                                                         */
VKP_API bool vkp_watch_is_changed(const vkp_watch_rx *rx);
VKP_API void vkp_watch_mark_changed(vkp_watch_rx *rx);
VKP_API void vkp_watch_mark_unchanged(vkp_watch_rx *rx);

/* Whether no sender is left; receivers now; wait until there is none: OK, TIMEOUT, INVALID. */
VKP_API bool vkp_watch_is_closed(const vkp_watch_rx *rx);
VKP_API size_t vkp_watch_get_receivers(const vkp_watch_tx *tx); /* any thread */
VKP_API VKP_NODISCARD vkp_status vkp_watch_wait_closed(vkp_watch_tx *tx, uint64_t deadline_ns);

/* --------------------------------------------------------------------------------------
   >>api-cancel   Cancellation tokens                                                      */

/* Open a token; a child is cancelled with its parent (at once, if that was cancelled before), and
   uses its parent's env.
   Owns:   shares parent (may be NULL); gives *token   Blocks: never   Threads: any
   Errors: NOMEM, INVALID                                                                      */
VKP_API VKP_NODISCARD vkp_status vkp_cancel_open(const vkp_env *env, vkp_cancel *parent,
                                                 vkp_cancel **token);

/* One more reference (gives, the same pointer). Any thread. */
VKP_API vkp_cancel *vkp_cancel_ref(vkp_cancel *token);

/* One reference less; does not cancel. NULL is ignored. Any thread. */
VKP_API void vkp_cancel_unref(vkp_cancel *token);

/* Cancel the token and all its descendants: waits end, watches fire. Idempotent. Any thread. */
VKP_API void vkp_cancel_trigger(vkp_cancel *token);

/* True once cancelled; never becomes false again. Any thread. */
VKP_API bool vkp_cancel_is_triggered(const vkp_cancel *token);

/* Wait until cancelled: OK, or TIMEOUT. Any thread; would stall a loop. */
VKP_API VKP_NODISCARD vkp_status vkp_cancel_wait(vkp_cancel *token, uint64_t deadline_ns);

/* --------------------------------------------------------------------------------------
   >>api-select   Wait for whichever comes first

   A case is one thing that a thread can wait for: made by the functions below, in the caller's
   memory, valid while what it names is. It waits in one of two ways: vkp_select (this thread,
   until one case won and was carried out), or vkp_handler (a loop's callback).             */

#define VKP_SELECT_MAX 64 /* cases of one select */

typedef struct vkp_i_case_kind vkp_i_case_kind;

typedef struct vkp_case {
    vkp_status status; /* the winner's: what the try form of its call returned */
    uint32_t ready;    /* of the winner, for vkp_case_fd: bits of vkp_io_bits */
    const vkp_i_case_kind *i_kind;
    void *i_object;
    void *i_out;
    uint64_t i_number;
} vkp_case;

/* Receive. `out` as in the call of that name; status OK, CLOSED, or LAGGED. A one-shot that does
   not win stays open. NULL objects make a case that never wins, as vkp_case_never.             */
VKP_API vkp_case vkp_case_mpsc_recv(vkp_mpsc_rx *rx, void *out);
VKP_API vkp_case vkp_case_oneshot_recv(vkp_oneshot *slot, void *out);
VKP_API vkp_case vkp_case_broadcast_recv(vkp_broadcast_rx *rx, void *out);
VKP_API vkp_case vkp_case_watch_changed(vkp_watch_rx *rx);

/* Send: status OK, CLOSED, NOMEM. While it waits it stands in the senders' queue; when another case
   wins it leaves, and the next sender has the room. A value not sent stays the caller's.      */
VKP_API vkp_case vkp_case_mpsc_send(vkp_mpsc_tx *tx, const void *item);
VKP_API vkp_case vkp_case_mpsc_reserve(vkp_mpsc_tx *tx, vkp_mpsc_permit *permit);

/* The other side is gone: status OK. */
VKP_API vkp_case vkp_case_mpsc_closed(vkp_mpsc_tx *tx);
VKP_API vkp_case vkp_case_oneshot_closed(vkp_oneshot *slot);
VKP_API vkp_case vkp_case_broadcast_closed(vkp_broadcast_tx *tx);
VKP_API vkp_case vkp_case_watch_closed(vkp_watch_tx *tx);

/* Cancelled; the deadline passed; the descriptor is ready: status OK. A descriptor is for a select
   (a loop has vkp_io) and makes it sleep in poll(2), with a wake pipe opened for the sleep. Where
   poll fails the case wins with status SYS, where the pipe does vkp_select returns SYS. */
VKP_API vkp_case vkp_case_cancel(vkp_cancel *token);
VKP_API vkp_case vkp_case_deadline(uint64_t deadline_ns);
#ifndef VKP_NO_IO
VKP_API vkp_case vkp_case_fd(int fd, uint32_t interest);
#endif
VKP_API vkp_case vkp_case_never(void); /* to leave out a case by a condition */

/* Wait until a case can be carried out, and carry out that one and no other. Biased: of several
   that are ready the first in the array wins.
   Owns:   borrows cases; *won is the index, written on OK
   Blocks: until deadline_ns (0: looks once)     Threads: those of every case's object
   Errors: TIMEOUT (no case was ready: nothing was sent or taken), SYS, INVALID (count 0 or above
   VKP_SELECT_MAX)                                                                             */
VKP_API VKP_NODISCARD vkp_status vkp_select(vkp_case *cases, size_t count, uint64_t deadline_ns,
                                            size_t *won);

/* The same, fair: the search begins behind the case that won last, kept in *turn (0 at first). A
   case that stays ready waits for at most count - 1 others.                                   */
VKP_API VKP_NODISCARD vkp_status vkp_select_fair(vkp_case *cases, size_t count, uint32_t *turn,
                                                 uint64_t deadline_ns, size_t *won);

#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-handler   Callbacks of a loop for channels                                        */

/* Call fn(user) on the loop's thread in every round in which the case is ready. In fn, call the try
   form of what the case names, or close the handler: while the case stays ready, fn is called
   again. A sending case reserves nothing: its try form may still return FULL. what is copied;
   what it names must outlive the handler. Make vkp_case_mpsc_recv and the like with `out` NULL. A
   handler of a one-shot ends before the same side finishes it (send, abandon, recv, close).
   Owns:   borrows what; shares loop; gives *handler     Blocks: never
   Threads: loop's     In callbacks: ok
   Errors: NOMEM, INVALID (a null argument, vkp_case_fd, vkp_case_deadline, a closed loop)     */
VKP_API VKP_NODISCARD vkp_status vkp_handler_open(vkp_loop *loop, const vkp_case *what,
                                                  void (*fn)(void *user), void *user,
                                                  vkp_handler **handler);

/* End the handler: fn is not called again. Idempotent; NULL is ignored. A loop that closes closes
   its handlers. Loop's thread, also inside fn.                                                */
VKP_API void vkp_handler_close(vkp_handler *handler);

/* Close the handler and give its reference back. NULL is ignored. Loop's thread, also inside fn. */
VKP_API void vkp_handler_unref(vkp_handler *handler);

#endif /* VKP_NO_IO */

#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-resp   RESP reader and writer                                                     */

/* Open an incremental reader. It allocates as bytes arrive, never for what a header announces.
   Owns:   borrows config; gives *reader   Blocks: never   Threads: any, one at a time
   Errors: NOMEM, INVALID                                                                      */
VKP_API VKP_NODISCARD vkp_status vkp_resp_reader_open(const vkp_resp_config *config,
                                                      vkp_resp_reader **reader);

/* Free the reader and the values it gave. NULL is ignored. */
VKP_API void vkp_resp_reader_unref(vkp_resp_reader *reader);

/* Append bytes to the reader's own buffer.
   Owns:   borrows data (copies)     Blocks: never     Threads: the reader's
   Errors: NOMEM (nothing was taken), or the reader's earlier error                            */
VKP_API VKP_NODISCARD vkp_status vkp_resp_reader_feed(vkp_resp_reader *reader, const void *data,
                                                      size_t len);

/* The next whole value of what was fed.
   Owns:   *value views the reader: valid until the next call on it     Blocks: never
   Errors: EMPTY (feed more), PROTOCOL, LIMIT (both sticky: see vkp_resp_reader_get_error), NOMEM
   (try again)                                                                                 */
VKP_API VKP_NODISCARD vkp_status vkp_resp_reader_next(vkp_resp_reader *reader,
                                                      const vkp_value **value);

/* The same without a copy: read one value from a window of the caller's. On EMPTY call again
   with the SAME bytes, possibly moved, and more behind them: the reader goes on where it was.
   On OK *consumed is the length of the frame; the next window starts behind it.
   Owns:   borrows window; *value views the window and the reader     Blocks: never
   Errors: as vkp_resp_reader_next; not to be mixed with feed between two frames               */
VKP_API VKP_NODISCARD vkp_status vkp_resp_reader_scan(vkp_resp_reader *reader, const void *window,
                                                      size_t len, const vkp_value **value,
                                                      size_t *consumed);

/* What was wrong and where: the byte's position since open or reset, and the reason with the
   limit or byte named. "" while there is no error. Views: until the next call on the reader.   */
VKP_API const char *vkp_resp_reader_get_error(const vkp_resp_reader *reader, uint64_t *position);

/* Forget the error, the buffer and the frame under way. */
VKP_API void vkp_resp_reader_reset(vkp_resp_reader *reader);

/* Length of the first whole frame in the bytes, 0 when it is incomplete or broken. For bytes that
   a strict reader accepted before. Any thread.                                                */
VKP_API size_t vkp_resp_get_frame_len(const uint8_t *data, size_t len);

/* Builds RESP into one growing block. In the caller's memory; fields are private. Errors are
   kept: write everything, then look at what take returns.                                     */
typedef struct vkp_resp_writer {
    const vkp_env *i_env;
    vkp_block *i_block;
    size_t i_len;
    vkp_status i_status;
} vkp_resp_writer;

/* Begin; then put values. Counts are the wire's: pairs for a MAP or ATTRIBUTE. Texts of simple
   strings and errors are one line; raw bytes go out as they are. Writer's thread.             */
VKP_API void vkp_resp_writer_init(vkp_resp_writer *writer, const vkp_env *env);
VKP_API void vkp_resp_put_aggregate(vkp_resp_writer *writer, vkp_resp_type type, size_t count);
VKP_API void vkp_resp_put_bulk(vkp_resp_writer *writer, const void *data, size_t len);
VKP_API void vkp_resp_put_simple(vkp_resp_writer *writer, vkp_str text);
VKP_API void vkp_resp_put_error(vkp_resp_writer *writer, vkp_str text);
VKP_API void vkp_resp_put_integer(vkp_resp_writer *writer, int64_t value);
VKP_API void vkp_resp_put_double(vkp_resp_writer *writer, double value);
VKP_API void vkp_resp_put_bool(vkp_resp_writer *writer, bool value);
VKP_API void vkp_resp_put_null(vkp_resp_writer *writer);
VKP_API void vkp_resp_put_raw(vkp_resp_writer *writer, const void *data, size_t len);

/* A whole value, in RESP3, or as a server writes it to a RESP2 client (maps and sets as arrays,
   doubles as bulk strings, booleans as 0 and 1, null as $-1 unless it came as *-1, attributes not
   at all).                                                                                    */
VKP_API void vkp_resp_put_value(vkp_resp_writer *writer, const vkp_value *value, int protocol);

/* End the building: the bytes, or the first error met.
   Owns:   gives *bytes; the writer is empty again, its error forgotten
   Errors: NOMEM, LIMIT (4 GiB), INVALID (a CR or LF in put_simple or put_error)               */
VKP_API VKP_NODISCARD vkp_status vkp_resp_writer_take(vkp_resp_writer *writer, vkp_bytes *bytes);

/* Drop what was built. */
VKP_API void vkp_resp_writer_deinit(vkp_resp_writer *writer);

#endif /* VKP_NO_IO */

#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-socket   Ref-counted listening Unix sockets

   A socket lives as long as somebody refers to it: handles of the program, listeners, clients.
   Whoever gives the last reference back stops it and removes its file. A registry knows the
   sockets of a program by their paths, and keeps none of them alive.
   A path NULL means a name of the registry's own, unique on this machine. A name that begins with
   '@' is abstract (Linux: no file, gone with the last descriptor) where the registry says so, and
   in addresses ("unix:@NAME"); a file of such a name is "./@NAME".                            */

/* What happened to a socket's file behind our back, see vkp_registry_config.check_ms. */
typedef enum vkp_socket_event {
    VKP_SOCKET_LOST = 1, /* the file is gone, or another one is there in its place */
    VKP_SOCKET_REBOUND,  /* bound again: new clients come in */
    VKP_SOCKET_BLOCKED   /* not bound again: status tells why; tried again at every check */
} vkp_socket_event;

typedef struct vkp_registry_config {
    int backlog;         /* of listen(2); default 4096, cut by the system */
    uint32_t mode;       /* permissions of the files; default 0600. More than that needs gates that
                              check who comes (vkp_gate), which they do by default             */
    bool abstract_names; /* "@NAME" is an abstract name; UNSUPPORTED outside Linux */
    size_t max_sockets;  /* alive at once; default: no limit */
    size_t max_references; /* of one socket; default and most: 2^29 */
    vkp_str folder;        /* of unique names; default $XDG_RUNTIME_DIR, $TMPDIR, /tmp. Copied. */
    vkp_loop *loop;     /* carries the timers of linger_ms and check_ms, which need it. Shared. */
    uint64_t linger_ms; /* a socket ends that long after its last reference; default: at once */
    uint64_t check_ms;  /* look that often whether the files are still ours; default: never */
    bool rebind;        /* then bind again what was lost */
    /* Loop's thread. sock is borrowed; it may have ended since. Not for sockets that linger. */
    void (*on_event)(void *user, vkp_socket *sock, vkp_socket_event event, vkp_status status);
    void *user;
    const vkp_env *env;
} vkp_registry_config;

/* Open a registry: path -> weak reference. An object; there is no process-wide one.
   Owns:   borrows config, shares loop; gives *registry
   Blocks: never     Threads: any     Errors: NOMEM, INVALID (a timer without a loop)          */
VKP_API VKP_NODISCARD vkp_status vkp_registry_open(const vkp_registry_config *config,
                                                   vkp_registry **registry);
VKP_API vkp_registry *vkp_registry_ref(vkp_registry *registry);

/* Sockets that live keep their registry. NULL is ignored. Any thread. */
VKP_API void vkp_registry_unref(vkp_registry *registry);

/* Sockets that are alive in this registry. Any thread; out of date at once. */
VKP_API size_t vkp_registry_get_count(vkp_registry *registry);
VKP_API bool vkp_registry_is_active(vkp_registry *registry, vkp_str path);

/* Stop and unlink every socket now, those that linger too, and their listeners with them; handles
   stay valid, inactive. Returns how many. Any thread; in atexit, too.                         */
VKP_API size_t vkp_registry_cleanup_all(vkp_registry *registry);

/* For handlers of crashes: remove the files of the sockets that this process opened, and nothing
   else. Takes no lock and no memory; async-signal-safe. The program's end must follow.        */
VKP_API void vkp_registry_unlink_all(vkp_registry *registry);

/* Counts since open, but for the first two. */
typedef struct vkp_registry_stats {
    size_t live;              /* sockets, those that linger included */
    size_t references;        /* of them */
    uint64_t created;         /* sockets */
    uint64_t taken_over;      /* of those: where a dead process's file stood */
    uint64_t revived;         /* asked for again while they lingered */
    uint64_t ended;           /* sockets */
    uint64_t handed_over;     /* of those: cleaned up by another thread that was in the registry */
    uint64_t unlink_failures; /* files that could not be removed */
    int unlink_errno;         /* of the last of those */
    uint64_t lost;            /* files found gone or replaced, by checks */
    uint64_t rebound;         /* of those: bound again */
    uint64_t cleanup_last_ns; /* from the last reference (or the linger's end) to the file gone */
    uint64_t cleanup_most_ns;
    uint64_t cleanup_total_ns;
} vkp_registry_stats;
VKP_API void vkp_registry_get_stats(vkp_registry *registry,
                                    vkp_registry_stats *stats); /* any thread */

/* The live socket of the path, or a new one: bound, with the registry's mode, listening. Atomic.
   Beside the file stands PATH.lock, held by flock while the socket lives: a file left by a dead
   process is taken over, one of a live process is not. A path is used as it is written.
   Owns:   borrows path (NULL: a unique one); gives *sock
   Blocks: on the file system, and on threads that create   Threads: any     In callbacks: ok
   Errors: INVALID (empty, or a `..` component), LIMIT (path longer than the 107 bytes that fit on
   Linux, 103 elsewhere, as the log says; max_sockets; max_references), IN_USE (another process
   serves it), EXISTS (something that is no socket of this user is there; untouched), UNSUPPORTED,
   SYS, NOMEM                                                                                  */
VKP_API VKP_NODISCARD vkp_status vkp_socket_open(vkp_registry *registry, vkp_str path,
                                                 vkp_socket **sock);

/* The live socket of the path, never a new one. Gives *sock. Any thread.
   Errors: NOT_FOUND, LIMIT (max_references), INVALID                                          */
VKP_API VKP_NODISCARD vkp_status vkp_socket_find(vkp_registry *registry, vkp_str path,
                                                 vkp_socket **sock);

/* Hand over a socket that the caller bound to the path and set listening.
   Owns:   takes fd (on failure it stays the caller's); gives *sock     Threads: any
   Errors: EXISTS (a handle of that path lives), IN_USE (another process holds PATH.lock), LIMIT,
   INVALID (no such file, or no socket), UNSUPPORTED (an abstract name), SYS, NOMEM            */
VKP_API VKP_NODISCARD vkp_status vkp_socket_adopt(vkp_registry *registry, vkp_str path, int fd,
                                                  vkp_socket **sock);

/* One more reference: sock, or NULL when it has max_references. Any thread. */
VKP_API VKP_NODISCARD vkp_socket *vkp_socket_ref(vkp_socket *sock);

/* One reference less. The last one stops listening, removes the file if it is still the one this
   handle bound, and the lock file; with linger_ms that comes later. In a forked child it removes
   nothing. NULL is ignored.
   Blocks: on the file system only: when another thread is in the registry, that one cleans up
   before it leaves     Threads: any     In callbacks: ok                                      */
VKP_API void vkp_socket_unref(vkp_socket *sock);

/* A handle that does not keep the socket alive: a value, copied at will, nothing to give back. To
   be used only while the registry is referred to. Zeroed it is the handle of no socket.       */
typedef struct vkp_weak_socket {
    vkp_socket *i_socket;
    uint32_t i_generation;
} vkp_weak_socket;

/* sock is borrowed. Any thread. */
VKP_API vkp_weak_socket vkp_socket_downgrade(const vkp_socket *sock);

/* A reference to the socket while it lives. Gives *sock. Takes no lock. Any thread.
   Errors: NOT_FOUND (it ended), LIMIT (max_references)                                        */
VKP_API VKP_NODISCARD vkp_status vkp_socket_upgrade(const vkp_weak_socket *weak, vkp_socket **sock);

/* The path (views); whether it still accepts; the references. Any thread. */
VKP_API const char *vkp_socket_get_path(const vkp_socket *sock);
VKP_API bool vkp_socket_is_active(const vkp_socket *sock);
VKP_API size_t vkp_socket_get_ref_count(const vkp_socket *sock); /* advisory */

/* Several sockets, over which clients are spread. A pool refers to its sockets. */

typedef enum vkp_balance {
    VKP_BALANCE_LEAST = 0, /* the socket with the fewest references; of equals, the next in turn */
    VKP_BALANCE_TURN       /* one after the other */
} vkp_balance;

typedef struct vkp_socket_pool_config {
    vkp_registry *registry; /* required; shared */
    const vkp_str *paths;   /* as many as count; NULL: unique ones */
    size_t count;           /* of sockets; at least 1 */
    vkp_balance balance;
} vkp_socket_pool_config;

/* Open the pool and its sockets: all or none.
   Owns:   borrows config; gives *pool     Blocks, Threads, Errors: as vkp_socket_open */
VKP_API VKP_NODISCARD vkp_status vkp_socket_pool_open(const vkp_socket_pool_config *config,
                                                      vkp_socket_pool **pool);
VKP_API vkp_socket_pool *vkp_socket_pool_ref(vkp_socket_pool *pool); /* any thread */
VKP_API void vkp_socket_pool_unref(vkp_socket_pool *pool);           /* any; NULL is ignored */

/* The socket for the next client, which is to hold it as long as it is there. Sockets that were
   cleaned up are passed over. Gives *sock. Any thread.
   Errors: CLOSED (none is active), LIMIT (max_references, of all)                             */
VKP_API VKP_NODISCARD vkp_status vkp_socket_pool_pick(vkp_socket_pool *pool, vkp_socket **sock);

/* Its sockets; each is viewed as long as the pool is. Index below the count. Any thread. */
VKP_API size_t vkp_socket_pool_get_count(const vkp_socket_pool *pool);
VKP_API vkp_socket *vkp_socket_pool_get_socket(const vkp_socket_pool *pool, size_t index);

#endif /* VKP_NO_IO */

#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-conn   Connections and listeners
   Addresses: "unix:PATH", "tcp:HOST:PORT", "tcp:[V6]:PORT".                                  */

typedef enum vkp_close_reason {
    VKP_CLOSE_LOCAL = 0, /* vkp_conn_close, or drained after vkp_conn_drain */
    VKP_CLOSE_PEER,      /* end of file */
    VKP_CLOSE_ERROR,     /* a system call failed: sys_error tells */
    VKP_CLOSE_SLOW,      /* VKP_ON_FULL_DISCONNECT */
    VKP_CLOSE_LOOP,      /* the loop was closed */
    VKP_CLOSE_NOMEM      /* no memory for what was received or for the response stream */
} vkp_close_reason;

/* The reason as a short text; static, never NULL. Any thread. */
VKP_API const char *vkp_close_reason_str(vkp_close_reason reason);

/* What a push does when the queue is full. Frames of vkp_conn_send are never dropped. */
typedef enum vkp_on_full {
    VKP_ON_FULL_DEFAULT = 0, /* WAIT; of a relay DISCONNECT */
    VKP_ON_FULL_WAIT,        /* vkp_conn_push waits; on the loop's thread it gets FULL */
    VKP_ON_FULL_ERROR,       /* FULL; the frame stays the caller's */
    VKP_ON_FULL_DROP_NEWEST, /* DROPPED; the frame stays the caller's */
    VKP_ON_FULL_DROP_OLDEST, /* OK; the oldest pushes not yet begun are dropped and counted */
    VKP_ON_FULL_DISCONNECT   /* CLOSED; the connection closes with VKP_CLOSE_SLOW */
} vkp_on_full;

/* Callbacks of a connection, all on its loop's thread, none under a lock, none after on_close.
   Any may be NULL. The table is kept by pointer.                                              */
typedef struct vkp_conn_ops {
    void (*on_open)(vkp_conn *conn, void *user); /* once, connected: may be before open returned */
    /* Bytes arrived. Returns how many were used; the rest comes again, with more behind it.
       `in` views the read block: keep parts with vkp_bytes_slice.                            */
    size_t (*on_data)(vkp_conn *conn, void *user, const vkp_bytes *in);
    void (*on_drain)(vkp_conn *conn, void *user); /* the queue is empty after it had to wait */
    /* The peer will send no more. True: keep the connection to write (end it with vkp_conn_drain or
       vkp_conn_close); false, or no on_end: it closes with VKP_CLOSE_PEER.                   */
    bool (*on_end)(vkp_conn *conn, void *user);
    void (*on_close)(vkp_conn *conn, void *user, vkp_close_reason reason, int sys_error); /* once */
    /* Length of the frame at data (a frame that was pushed). When given, neighbouring frames of
       one block are kept and written as one range; vkp_resp_get_frame_len is one.                */
    size_t (*frame_len)(const uint8_t *data, size_t len);
} vkp_conn_ops;

typedef struct vkp_conn_config {
    const vkp_conn_ops *ops; /* required */
    void *user;
    size_t queue_frames; /* most frames queued; default 65,536 */
    size_t queue_bytes;  /* most bytes queued; default 8 MiB. One frame always fits. */
    size_t input_bytes;  /* most bytes kept for on_data; default 512 MiB. Beyond: closed. */
    vkp_on_full on_full;
    bool loop_only; /* pushes come from the loop's thread alone: saves the inbox, 200 bytes */
} vkp_conn_config;

/* The queues above have the limit each: what waits for the loop (inbox: pushed by other threads)
   and what waits for the peer (outbox).                                                       */

/* Serve a connected stream socket on the loop.
   Owns:   takes fd (on failure it stays the caller's), shares loop; gives *conn (the loop keeps a
   reference of its own until the close)   Blocks: never   Threads: loop's   In callbacks: ok
   Errors: NOMEM, SYS, INVALID, CLOSED (loop)                                                  */
VKP_API VKP_NODISCARD vkp_status vkp_conn_open(vkp_loop *loop, int fd,
                                               const vkp_conn_config *config, vkp_conn **conn);

/* Connect to an address and serve it. on_open follows on success, on_close on failure. A host
   NAME is resolved with getaddrinfo, which may block on DNS; numbers and localhost do not.
   Owns, Threads: as vkp_conn_open     Errors: the same, and REFUSED (name not resolved)       */
VKP_API VKP_NODISCARD vkp_status vkp_conn_connect(vkp_loop *loop, vkp_str address,
                                                  const vkp_conn_config *config, vkp_conn **conn);

VKP_API vkp_conn *vkp_conn_ref(vkp_conn *conn); /* any thread */
VKP_API void vkp_conn_unref(vkp_conn *conn);    /* any thread; does not close; NULL is ignored */

/* Push one frame, by the policy when the queue is full. On the loop's thread, and when loop_only
   is set, it goes straight to the outbox; from other threads through the inbox.
   Owns:   borrows frame (takes a reference of its own)
   Blocks: until deadline_ns with VKP_ON_FULL_WAIT on other threads; else never
   Threads: any (the loop's alone with loop_only)     In callbacks: ok
   Errors: FULL, DROPPED, CLOSED, TIMEOUT, NOMEM, INVALID                                      */
VKP_API VKP_NODISCARD vkp_status vkp_conn_push(vkp_conn *conn, const vkp_bytes *frame,
                                               uint64_t deadline_ns);

/* Append to the response stream: in order with pushes, never dropped, not bounded by the queue's
   limits (stop reading instead: vkp_conn_pause).
   Owns:   borrows frame     Blocks: never     Threads: loop's     Errors: CLOSED, NOMEM       */
VKP_API VKP_NODISCARD vkp_status vkp_conn_send(vkp_conn *conn, const vkp_bytes *frame);

/* Stop and go on reading; on_data sees what was kept at the next round. Loop's thread. */
VKP_API void vkp_conn_pause(vkp_conn *conn);
VKP_API void vkp_conn_resume(vkp_conn *conn);

/* Read no more, write what is queued, then close with VKP_CLOSE_LOCAL. Loop's thread. */
VKP_API void vkp_conn_drain(vkp_conn *conn);

/* Close. On the loop's thread on_close runs before it returns; from others it is posted.
   Idempotent. Any thread.                                                                     */
VKP_API void vkp_conn_close(vkp_conn *conn);

/* Plain reads and the user pointer. Loop's thread where nothing else is said. */
VKP_API void *vkp_conn_get_user(const vkp_conn *conn);
VKP_API void vkp_conn_set_user(vkp_conn *conn, void *user); /* loop's thread */
VKP_API vkp_loop *vkp_conn_get_loop(const vkp_conn *conn);  /* views */
VKP_API int vkp_conn_get_fd(const vkp_conn *conn);          /* -1 when closed; loop's thread */
VKP_API bool vkp_conn_is_open(const vkp_conn *conn);        /* any thread */

typedef struct vkp_conn_stats {
    size_t queued_frames; /* in the outbox */
    size_t queued_bytes;
    uint64_t dropped_frames; /* by the policy, since open */
} vkp_conn_stats;
VKP_API void vkp_conn_get_stats(const vkp_conn *conn, vkp_conn_stats *stats); /* loop's thread */

#endif /* VKP_NO_IO */

#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-gate   Who may come in, and how many at once                                      */

/* Why a client was closed right after accept. */
typedef enum vkp_refusal {
    VKP_REFUSAL_USER = 0,  /* its uid is not allowed, or `allow` said no */
    VKP_REFUSAL_FULL,      /* max_clients, of the gate or of the listener; max_references */
    VKP_REFUSAL_USER_FULL, /* max_clients_per_uid */
    VKP_REFUSAL_OVERLOAD,  /* no descriptors for a second and more, or no memory */
    VKP_REFUSAL_ENDED      /* the socket's last reference was just given back */
} vkp_refusal;
#define VKP_REFUSAL_COUNT 5

typedef struct vkp_gate_config {
    size_t max_clients; /* at once, over all listeners of the gate; default: no limit */
    size_t max_clients_per_uid;
    /* Unix sockets: the process's own (effective) uid, these (copied), or all. */
    const uint32_t *allow_uids;
    size_t allow_uid_count;
    bool allow_any_uid;
    /* Decides instead. On the accepting loop's thread. */
    bool (*allow)(void *user, const vkp_peer *peer);
    void *user;
    const vkp_env *env;
} vkp_gate_config;

/* Open a gate; any number of listeners, on any loops, may share it.
   Owns:   borrows config; gives *gate     Threads: any     Errors: NOMEM                      */
VKP_API VKP_NODISCARD vkp_status vkp_gate_open(const vkp_gate_config *config, vkp_gate **gate);
VKP_API vkp_gate *vkp_gate_ref(vkp_gate *gate); /* any thread */
VKP_API void vkp_gate_unref(vkp_gate *gate);    /* any thread; NULL is ignored */

typedef struct vkp_gate_stats {
    size_t clients; /* now */
    uint64_t admitted;
    uint64_t refused[VKP_REFUSAL_COUNT]; /* by vkp_refusal */
} vkp_gate_stats;
VKP_API void vkp_gate_get_stats(vkp_gate *gate, vkp_gate_stats *stats); /* any thread */

/* The place of one admitted client: it counts at the gate, and holds the socket that it came
   through, if the listener follows that. Connections give theirs back before their on_close.  */
VKP_API void vkp_seat_unref(vkp_seat *seat); /* gives it back; any thread; NULL is ignored */

/* The connection keeps the seat until its close. Takes seat. Loop's thread; open connections. */
VKP_API void vkp_conn_set_seat(vkp_conn *conn, vkp_seat *seat);

#endif /* VKP_NO_IO */

#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-listener   Accept connections                                                     */

/* What vkp_listener_config.on_start gets. */
typedef struct vkp_listening {
    vkp_status status;      /* OK, or why it did not start: then all else is NULL */
    int sys_error;          /* errno, with status SYS */
    const char *address;    /* as vkp_listener_get_address. Views. */
    vkp_listener *listener; /* the loop's: valid until it ended. Close it, do not unref it. */
    vkp_socket *socket;     /* with address and follow: gives its only reference. Else NULL. */
} vkp_listening;

typedef struct vkp_listener_config {
    /* Where to listen, one of the two: "unix:PATH", "unix:" (a unique path), "tcp:HOST:PORT" ... */
    vkp_str address;
    vkp_socket *socket;     /* ... or a socket that is open; shared until the listener ended */
    vkp_registry *registry; /* of a unix: address; NULL opens one of its own */
    /* Hold no reference of the socket: each client holds one, the program may, and when the last
       one is given back (and linger_ms passed) the listener ends too. With an address only
       together with on_start, which gets the first reference.                                 */
    bool follow;
    vkp_gate *gate;       /* shared; NULL: the process's own uid alone, as many as come */
    size_t max_clients;   /* of this listener at once; default: no limit */
    vkp_conn_config conn; /* of every connection accepted; its user is on_accept's first */
    /* A connection was accepted, before its on_open: set its user, refuse by vkp_conn_close. */
    void (*on_accept)(void *user, vkp_conn *conn);
    /* Instead of a connection: take the descriptor and its seat (to hand them to another loop). */
    void (*on_fd)(void *user, int fd, vkp_seat *seat);
    /* A client is refused: fd may be written to, and is closed after this. */
    void (*on_refuse)(void *user, int fd, vkp_refusal why);
    /* It ended by itself: its socket did, or its loop. Once, not after vkp_listener_close. */
    void (*on_end)(void *user);
    /* Start from any thread: called once on the loop's thread, unless vkp_listener_open failed. */
    void (*on_start)(void *user, const vkp_listening *result);
    int backlog; /* default 4096 */
} vkp_listener_config;

/* Listen and accept on the loop. Without on_start at once, on the loop's thread; with it from any
   thread: the loop starts the listener, owns it, and frees it when it ended or the loop closes.
   When descriptors or memory run out the listener pauses, 10 ms at first, 1 s at last, and clients
   wait in the backlog; when descriptors are short for a second, a spare one serves to refuse them
   (VKP_REFUSAL_OVERLOAD).
   Owns:   borrows config, shares socket, registry, gate, loop; gives *listener (NULL with on_start)
   Blocks: on the file system; with on_start never
   Threads: loop's; with on_start any     In callbacks: ok
   Errors: as vkp_socket_open, IN_USE for a port taken (with on_start these go there); CLOSED
   (loop, or socket), NOMEM, LIMIT (max_references of socket), INVALID (address and socket both, or
   neither; follow with an address but without on_start, or with tcp:; neither conn.ops nor on_fd;
   listener NULL without on_start, or not NULL with it)                                        */
VKP_API VKP_NODISCARD vkp_status vkp_listener_open(vkp_loop *loop,
                                                   const vkp_listener_config *config,
                                                   vkp_listener **listener);

/* The address with the port that the system chose, as "tcp:HOST:PORT" or "unix:PATH". Views. */
VKP_API const char *vkp_listener_get_address(const vkp_listener *listener);

/* Stop accepting; connections stay, and a drain goes on. Idempotent. Loop's thread. */
VKP_API void vkp_listener_close(vkp_listener *listener);
VKP_API void vkp_listener_unref(vkp_listener *listener); /* closes; loop's thread; NULL ignored */

/* Shut down in good order: stop accepting, send `notice` (NULL: nothing) to every connection that
   came through, write what is queued, close each; at the deadline close what is left. Then
   on_end(user), once. For listeners without on_fd.
   Owns:   borrows notice     Blocks: never     Threads: loop's     In callbacks: ok
   Errors: INVALID (on_fd, or drained already), NOMEM: nothing happened                        */
VKP_API VKP_NODISCARD vkp_status vkp_listener_drain(vkp_listener *listener, const vkp_bytes *notice,
                                                    void (*on_end)(void *user), void *user,
                                                    uint64_t deadline_ns);

typedef struct vkp_listener_stats {
    size_t clients; /* now */
    uint64_t accepted;
    uint64_t refused[VKP_REFUSAL_COUNT]; /* by vkp_refusal */
    uint64_t aborted;                    /* left before accept: probes, resets */
    uint64_t no_descriptors;             /* accept failed with EMFILE or ENFILE */
    uint64_t no_memory;                  /* with ENOMEM or ENOBUFS */
    uint64_t failed;                     /* with anything else */
    uint64_t pauses;                     /* after the last three */
} vkp_listener_stats;
VKP_API void vkp_listener_get_stats(const vkp_listener *listener,
                                    vkp_listener_stats *stats); /* loop's thread */

#endif /* VKP_NO_IO */

#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-health   Is a server well?                                                        */

/* What one check found. */
typedef struct vkp_health {
    vkp_status status; /* OK; REFUSED (no connection), PROTOCOL (another answer), DISCONNECTED (it
                          closed), TIMEOUT, SYS (with sys_error), NOMEM                        */
    int sys_error;
    uint64_t elapsed_ns; /* from the connect to the answer */
    uint64_t failures;   /* in a row, this one included; 0 when OK */
} vkp_health;

typedef struct vkp_health_config {
    vkp_str address;     /* required */
    vkp_str request;     /* default "PING\r\n" */
    vkp_str answer;      /* with what the answer must begin; default "+PONG\r\n" */
    uint64_t timeout_ms; /* of one check; default 1000; VKP_OFF: none */
    uint64_t period_ms;  /* from one check to the next; default: one check only */
    void (*on_result)(void *user, const vkp_health *health); /* loop's thread; required */
    void *user;
} vkp_health_config;

/* Connect, ask, look at the answer, disconnect; now, and then every period.
   Owns:   borrows config (texts are copied); shares loop; gives *check
   Blocks: as vkp_conn_connect     Threads: loop's     In callbacks: ok
   Errors: NOMEM, CLOSED, INVALID, and of Unix addresses LIMIT,
   UNSUPPORTED                                                                                  */
VKP_API VKP_NODISCARD vkp_status vkp_health_check_open(vkp_loop *loop,
                                                       const vkp_health_config *config,
                                                       vkp_health_check **check);

/* End the check: no result follows. Idempotent; NULL is ignored. Loop's thread, also inside
   on_result.                                                                                  */
VKP_API void vkp_health_check_close(vkp_health_check *check);

/* Close the check and give its reference back. NULL is ignored. Loop's thread, also inside
   on_result.                                                                                  */
VKP_API void vkp_health_check_unref(vkp_health_check *check);

#endif /* VKP_NO_IO */

#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-hub   Who is subscribed to what                                                   */

/* Whether the glob matches the whole text: * ? [abc] [^a-z] \x, byte by byte, as servers do, but
   in time linear in text x pattern at worst. Any thread.                                      */
VKP_API bool vkp_glob_is_match(vkp_str pattern, vkp_str text);

typedef struct vkp_hub_sub vkp_hub_sub;

/* One subscriber: a connection and its protocol. In the caller's memory; zero it first. */
typedef struct vkp_hub_member {
    vkp_conn *conn; /* views: gone from the hub (vkp_hub_leave) before it is unref'd */
    int protocol;   /* 2 or 3: how messages are written to it */
    uint32_t counts[VKP_SUB_KINDS]; /* subscriptions by vkp_sub_kind; read only */
    vkp_hub_sub *i_subs[VKP_SUB_KINDS];
} vkp_hub_member;

typedef struct vkp_hub_config {
    /* A name got its first member (added) or lost its last. Not inside vkp_hub_publish. */
    void (*on_interest)(void *user, vkp_sub_kind kind, vkp_str name, bool added);
    void *user;
    const vkp_env *env;
} vkp_hub_config;

/* Open a hub. It belongs to one loop's thread.
   Owns:   borrows config; gives *hub     Blocks: never     Errors: NOMEM                      */
VKP_API VKP_NODISCARD vkp_status vkp_hub_open(const vkp_hub_config *config, vkp_hub **hub);
VKP_API void vkp_hub_unref(vkp_hub *hub); /* every member has left; NULL is ignored */

/* Add the member to a name. OK also when it was there (then *added is false; may be NULL).
   Errors: NOMEM, LIMIT (a name above 4 GiB). Loop's thread.                                   */
VKP_API VKP_NODISCARD vkp_status vkp_hub_subscribe(vkp_hub *hub, vkp_hub_member *member,
                                                   vkp_sub_kind kind, vkp_str name, bool *added);

/* Take the member off a name. False when it was not there. Loop's thread. */
VKP_API bool vkp_hub_unsubscribe(vkp_hub *hub, vkp_hub_member *member, vkp_sub_kind kind,
                                 vkp_str name);

/* Take the member off everything. Loop's thread. */
VKP_API void vkp_hub_leave(vkp_hub *hub, vkp_hub_member *member);

/* One of the member's names of that kind, empty ({NULL,0}) when it has none. Views: until the
   member's next change. Loop's thread.                                                        */
VKP_API vkp_str vkp_hub_get_member_name(const vkp_hub_member *member, vkp_sub_kind kind);

/* Whether the member has the name. Loop's thread. */
VKP_API bool vkp_hub_is_subscribed(const vkp_hub *hub, const vkp_hub_member *member,
                                   vkp_sub_kind kind, vkp_str name);

/* Deliver a message to every member of the channel and, for VKP_SUB_CHANNEL, of every pattern that
   matches. It is encoded at most once per protocol; members share it. Returns deliveries tried,
   as PUBLISH counts. Per member, messages keep their order. Loop's thread.                    */
VKP_API size_t vkp_hub_publish(vkp_hub *hub, vkp_sub_kind kind, vkp_str channel, vkp_str payload);

/* Deliver a push of a server, as it came: a message to the members of its channel, a pmessage to
   those of its pattern (the server sends one push for each). Members of protocol 3 share the
   received bytes. Returns deliveries tried; 0 for pushes that are no messages. Loop's thread. */
VKP_API size_t vkp_hub_deliver(vkp_hub *hub, const vkp_push *push);

/* Members of a name; number of names; the names one by one (walk from NULL; views until the next
   change). Loop's thread.                                                                     */
VKP_API size_t vkp_hub_get_members(const vkp_hub *hub, vkp_sub_kind kind, vkp_str name);
VKP_API size_t vkp_hub_get_names(const vkp_hub *hub, vkp_sub_kind kind);
VKP_API bool vkp_hub_next_name(const vkp_hub *hub, vkp_sub_kind kind, void **cursor, vkp_str *name);

#endif /* VKP_NO_IO */

#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-pushloop   From a channel of pushes to where they are wanted                      */

/* Where a push loop writes; exactly one. */
typedef struct vkp_sink {
    vkp_hub *hub;   /* messages are published; only on the hub's loop */
    vkp_conn *conn; /* frames are pushed as received; events of the client are not written */
    void (*callback)(void *user, const vkp_push *push); /* borrows */
    void *user;
} vkp_sink;

/* Receive pushes until the channel closes, in this thread. A sink that fails (a full queue, a
   closed connection) loses that push; the loop goes on.
   Owns:   borrows rx, sink     Blocks: until the channel is closed and drained, or cancelled
   Threads: any, not a hub's     Errors: CANCELLED (cancel may be NULL), INVALID
   OK means the channel closed.                                                                */
VKP_API VKP_NODISCARD vkp_status vkp_push_loop_run(vkp_mpsc_rx *rx, const vkp_sink *sink,
                                                   vkp_cancel *cancel);

/* The same on an event loop, batch by batch. on_end(user) once, when the channel closed; the
   push loop is stopped then and waits for its unref.
   Owns:   takes rx (on failure it stays the caller's), shares loop and sink.conn, views sink.hub;
   gives *push_loop     Threads: loop's     Errors: INVALID, NOMEM                             */
VKP_API VKP_NODISCARD vkp_status vkp_push_loop_open(vkp_loop *loop, vkp_mpsc_rx *rx,
                                                    const vkp_sink *sink,
                                                    void (*on_end)(void *user), void *user,
                                                    vkp_push_loop **push_loop);
VKP_API void vkp_push_loop_unref(vkp_push_loop *push_loop); /* stops it; loop's thread */

#endif /* VKP_NO_IO */

#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-relay   Serve local Valkey clients over one upstream connection, or none          */

typedef struct vkp_relay_config {
    vkp_str server;         /* address of the server; default: none, a stand-alone pub/sub broker */
    vkp_str username;       /* of the connection to the server; default: the default user */
    vkp_str password;       /* of the connection to the server; default: none */
    vkp_loop *const *loops; /* connections are spread over these; at least one */
    size_t loop_count;      /* default 1 */
    size_t queue_frames;    /* per client, as vkp_conn_config */
    size_t queue_bytes;
    vkp_on_full on_full;        /* default DISCONNECT; or DROP_OLDEST, DROP_NEWEST */
    size_t max_clients;         /* at once; default 16,384 */
    size_t max_clients_per_uid; /* over Unix sockets; default: no limit */
    /* Over Unix sockets: besides the process's own uid. Their files then have mode 0666. */
    const uint32_t *allow_uids;
    size_t allow_uid_count;
    /* Called on loops[0] when no client has been there for linger_ms, once at least one was. */
    void (*on_idle)(void *user);
    void *user;
    uint64_t linger_ms;       /* default: at once */
    uint64_t check_ms;        /* look that often at the sockets' files, bind again what is lost */
    vkp_str shutdown_notice;  /* copied; see vkp_relay_drain; default: none */
    size_t max_request_bytes; /* one command, or one MULTI block; default 64 MiB */
    size_t max_reply_bytes;   /* replies that a client has not read; default 256 MiB, then closed */
    size_t max_subscriptions; /* names of one client; default 100,000 */
    const vkp_env *env;
} vkp_relay_config;

/* Open a relay on loops that the caller runs, each in its own thread. loops[0] carries the
   upstream connection and the listeners.
   Owns:   borrows config, shares loops; gives *relay     Threads: before the loops run
   Errors: INVALID, NOMEM, and those of vkp_client_open                                        */
VKP_API VKP_NODISCARD vkp_status vkp_relay_open(const vkp_relay_config *config, vkp_relay **relay);

/* Accept local clients at one more address; several are fine. Owns: borrows address. Threads:
   loops[0]'s. *bound (may be NULL) views the address with the port chosen.
   Errors: those of vkp_listener_open                                                          */
VKP_API VKP_NODISCARD vkp_status vkp_relay_listen(vkp_relay *relay, vkp_str address,
                                                  const char **bound);

/* Stop accepting, answer what was asked, tell each client, write what is queued until the deadline,
   then close; on_end(user) on loops[0] when all is gone. Threads: loops[0]'s. Once.
   The notice is a message of the channel VKP_RELAY_NOTICE_CHANNEL to clients of RESP3 and those
   with subscriptions; to others an error, the answer to whatever they would ask next.         */
#define VKP_RELAY_NOTICE_CHANNEL "valkey-push:shutdown"
VKP_API void vkp_relay_drain(vkp_relay *relay, void (*on_end)(void *user), void *user,
                             uint64_t deadline_ns);

typedef struct vkp_relay_stats {
    size_t clients;
    uint64_t accepted;
    uint64_t refused[VKP_REFUSAL_COUNT]; /* by vkp_refusal */
    uint64_t messages_in;                /* from upstream or by PUBLISH */
    uint64_t deliveries;
    uint64_t dropped_frames;  /* by the policy */
    uint64_t slow_closed;     /* by VKP_ON_FULL_DISCONNECT, or over max_reply_bytes */
    uint64_t lagged;          /* messages lost to a loop that was 64 MiB behind */
    uint64_t protocol_errors; /* clients closed for them */
} vkp_relay_stats;
VKP_API void vkp_relay_get_stats(const vkp_relay *relay, vkp_relay_stats *stats); /* any thread */

/* The registry of its Unix sockets, for vkp_registry_get_stats and crash handlers. Views. */
VKP_API vkp_registry *vkp_relay_get_registry(const vkp_relay *relay);

/* Close at once, and free; a drain's on_end that was not called is not called any more. The loops
   do not run any more (or never ran). NULL is ignored.                                         */
VKP_API void vkp_relay_unref(vkp_relay *relay);

#endif /* VKP_NO_IO */

/* --------------------------------------------------------------------------------------
   >>api-sys   The operating system behind one table                                       */

typedef struct vkp_parker vkp_parker;

/* One range of a gathered write. Laid out as POSIX's struct iovec. */
typedef struct vkp_range {
    const void *base;
    size_t len; /* bytes */
} vkp_range;

/* A socket address, as bind and connect take it. */
typedef struct vkp_address {
    uint32_t bytes; /* of storage in use */
    uint16_t family;
    union {
        uint64_t align;
        unsigned char bytes[128];
    } storage;
} vkp_address;

/* A client as the kernel knows it. */
struct vkp_peer {
    uint32_t uid;
    uint32_t gid;
    int pid; /* 0 where the system does not tell */
};

/* What lstat says of a path. */
typedef struct vkp_file_id {
    uint64_t device;
    uint64_t inode;
    uint32_t uid;
    uint32_t mode; /* permissions */
    bool is_socket;
} vkp_file_id;

/* What stands behind a descriptor, as far as it matters to who waits for it (vkp_sys.fd_kind). */
#define VKP_FD_OTHER 0
#define VKP_FD_FILE 1 /* a regular one */
#define VKP_FD_SOCKET 2

/* Every contact with the operating system. Copy the table of vkp_sys_get_default, and replace
   members to inject faults or a clock. Calls return >= 0 or a negated errno; errno itself is not
   set. write and kevent may be called in a signal handler and leave errno alone.
   Descriptors are non-blocking and close-on-exec from birth. Members may be called from any
   thread.                                                                                     */
struct vkp_sys {
    uint64_t (*clock_ns)(void);   /* monotonic */
    uint64_t (*random_u64)(void); /* for jitter and names, not for secrets */
    int (*process_id)(void);
    uint32_t (*user_id)(void);                              /* effective */
    void (*park)(vkp_parker *parker, uint64_t deadline_ns); /* until unpark or deadline */
    void (*unpark)(vkp_parker *parker);                     /* the only way to end a park early */
    void (*yield)(void);                                    /* let another thread run */
    uint32_t (*processors)(void);                           /* online */
    /* A full barrier on every running thread of the process; `prepare` once before the first one.
       Negative where there is none: senders then pay for a barrier of their own. What was prepared
       must work until the end: a sandbox that refuses it comes before the first channel.      */
    int (*membarrier)(bool prepare);
    int (*socket)(int family, int type);
    /* mode: of a Unix socket's file at its birth, less the umask, where the system can. */
    int (*bind)(int fd, const void *address, uint32_t bytes, uint32_t mode);
    int (*listen)(int fd, int backlog);
    int (*accept)(int fd);
    int (*connect)(int fd, const void *address, uint32_t bytes); /* -EINPROGRESS is progress */
    int (*socket_error)(int fd); /* takes SO_ERROR: 0 or a negated errno */
    int (*prepare)(int fd);      /* non-blocking, close-on-exec, no SIGPIPE: for adopted sockets */
    int (*set_nodelay)(int fd);
    int (*peer)(int fd, vkp_peer *peer); /* of a connected Unix socket */
    int (*local_port)(int fd);           /* of a bound TCP socket */
    /* Addresses of a TCP host and port, at most capacity: how many. May block on DNS for names. */
    int (*resolve)(const char *host, const char *port, vkp_address *out, size_t capacity);
    int64_t (*read)(int fd, void *buffer, size_t bytes);
    int64_t (*send)(int fd, const vkp_range *ranges, size_t count); /* never SIGPIPE */
    int64_t (*write)(int fd, const void *buffer, size_t bytes);     /* wake pipes */
    int (*close)(int fd);
    /* Opens (mode 0600) and flocks; -EWOULDBLOCK when another holds it. id: of what is locked. */
    int (*lock_file)(const char *path, vkp_file_id *id);
    int (*identify)(const char *path, vkp_file_id *id); /* lstat */
    int (*chmod)(const char *path, uint32_t mode);
    int (*unlink)(const char *path);
    int (*wake_pair)(int fds[2]); /* [0] polls readable after a write to [1]; may be one fd */
    int (*poll)(void *pollfds, size_t count, uint64_t deadline_ns);
    int (*epoll_create)(void); /* -ENOSYS where there is none, as the next two */
    int (*epoll_ctl)(int epoll_fd, int operation, int fd, void *event);
    int (*epoll_wait)(int epoll_fd, void *events, int capacity, uint64_t deadline_ns);
    int (*kqueue_create)(void); /* -ENOSYS where there is none, as the next */
    /* Applies the changes, then waits for events; for none (event_count 0) it does not wait. */
    int (*kevent)(int kq, const void *changes, int change_count, void *events, int event_count,
                  uint64_t deadline_ns);
    int (*fd_kind)(int fd); /* VKP_FD_* */
};

/* The table over libc. Static. Any thread. */
VKP_API const vkp_sys *vkp_sys_get_default(void);

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

/* --------------------------------------------------------------------------------------
   >>api-typed   Channels of a type

   VKP_MPSC_TYPED(jobs, struct job) at file scope gives jobs_tx and jobs_rx, which the compiler
   tells from every other channel, and calls that take and give struct job: jobs_open, jobs_send ...
   They are the calls of the channel's section with the type in place of void, inline, no code of
   their own; contracts and errors are those. A config's elem_bytes is set by them. jobs_raw_tx and
   jobs_raw_rx give the handles for the calls that look at no value: select, watches, len, weak
   senders. Values of 8, 24 and 64 bytes are moved without a call of memcpy.                   */

#define VKP_TYPED_CALL static inline __attribute__((unused))

/* The two ends of a typed channel, for the macros below. */
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

/* A call that gives one end (`to` is tx or rx) beside another. */
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
    struct name##_tx /* so that a semicolon may follow */

/* A one-shot of at most VKP_ONESHOT_BYTES: the slot is `name`, in the caller's memory. */
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
#if defined(__STRICT_ANSI__) && !defined(__USE_GNU) && defined(__GLIBC__)
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
#pragma push_macro("EV_ERROR") /* an enumerator in <ev.h>, which the program may use as well */
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
   All atomics of the file go through these macros, so that a model checker can take them over
   (VKP_I_ATOMICS_FILE). No fences: ThreadSanitizer does not see them. Where a store must be seen
   before a later load of another variable, both sides use the SEQ forms, or a gate (park).    */
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
#define VKP_I_UNREF(p) __atomic_fetch_sub((p), 1, __ATOMIC_ACQ_REL) /* returns the count before */
#define VKP_I_SUB_ACQ_REL(p, v) __atomic_fetch_sub((p), (v), __ATOMIC_ACQ_REL)
#define VKP_I_ADD_ACQ_REL(p, v) __atomic_fetch_add((p), (v), __ATOMIC_ACQ_REL)
#define VKP_I_OR(p, v) __atomic_fetch_or((p), (v), __ATOMIC_ACQ_REL)
#define VKP_I_AND(p, v) __atomic_fetch_and((p), (v), __ATOMIC_ACQ_REL)
/* Who runs; never 0 or 1. */
#if VKP_I_LINUX && defined(__x86_64__) && \
    (defined(__clang__) ? __clang_major__ >= 14 : __GNUC__ >= 11)
#define VKP_I_SELF() ((uintptr_t)__builtin_thread_pointer())
#else
#define VKP_I_SELF() ((uintptr_t)pthread_self())
#endif
#define VKP_I_ORDER() __atomic_signal_fence(__ATOMIC_SEQ_CST) /* for the compiler alone */
#if defined(__x86_64__) || defined(__i386__)
#define VKP_I_PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__) || defined(__arm__)
#define VKP_I_PAUSE() __asm__ volatile("yield")
#else
#define VKP_I_PAUSE() VKP_I_ORDER()
#endif
#define VKP_I_COPY_IN(slot, from, bytes) vkp_i_copy((slot), (from), (bytes)) /* values, which */
#define VKP_I_COPY_OUT(to, slot, bytes) vkp_i_copy((to), (slot), (bytes))    /* threads hand over */
#define VKP_I_MUTEX pthread_mutex_t
#define VKP_I_MUTEX_INIT(m) ((void)pthread_mutex_init((m), NULL))
#define VKP_I_MUTEX_DEINIT(m) ((void)pthread_mutex_destroy((m)))
#define VKP_I_LOCK(m) ((void)pthread_mutex_lock((m)))
#define VKP_I_UNLOCK(m) ((void)pthread_mutex_unlock((m)))
#endif

#ifndef VKP_ASSERT
#define VKP_ASSERT(condition) ((void)0)
#endif

/* A programmer's error: asserts where the program wants that, and is INVALID otherwise. */
#define VKP_I_REQUIRE(condition)    \
    do {                            \
        if (!(condition)) {         \
            VKP_ASSERT(condition);  \
            return VKP_ERR_INVALID; \
        }                           \
    } while (0)

/* Fields this many bytes apart are in different cache lines, and in different pairs of lines. */
#define VKP_I_APART 128

#define VKP_I_MIN(a, b) ((a) < (b) ? (a) : (b))
#define VKP_I_MAX(a, b) ((a) > (b) ? (a) : (b))

/* Values of usual sizes move without a call. Inlined where the size is known, the other branches
   are dead, and GCC warns of what they would do.                                               */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Warray-bounds"
#pragma GCC diagnostic ignored "-Wstringop-overflow"
#pragma GCC diagnostic ignored "-Wstringop-overread"
#endif
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

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

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

/* Not inlined: gcc would see frees of embedded slots and lanes, which a flag keeps from happening,
   and warn of them (-Wfree-nonheap-object).                                                   */
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

static const vkp_env *vkp_i_env(const vkp_env *env)
{
    return env != NULL ? env : &vkp_i_env_default;
}

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

static void vkp_i_free(const vkp_env *env, void *ptr, size_t bytes)
{
    if (ptr != NULL) {
        (void)vkp_i_resize(env, ptr, bytes, 0);
    }
}

#if VKP_I_IO
/* Room for `need` elements in a doubling array. */
static bool vkp_i_grow(const vkp_env *env, void **array, size_t *capacity, size_t need,
                       size_t elem_bytes)
{
    size_t wanted = *capacity < 8 ? 8 : *capacity;
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

__attribute__((format(printf, 3, 4))) static void vkp_i_log(const vkp_env *env, vkp_log_level level,
                                                            const char *format, ...)
{
    char text[512];
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

/* That many milliseconds later; saturates at VKP_FOREVER. */
static uint64_t vkp_i_after_ms(uint64_t now_ns, uint64_t ms)
{
    return ms > (VKP_FOREVER - now_ns) / 1000000u ? VKP_FOREVER : now_ns + ms * 1000000u;
}

VKP_API vkp_str vkp_str_of(const char *text)
{
    vkp_str view;
    view.ptr = text;
    view.len = text != NULL ? strlen(text) : 0;
    return view;
}

#if VKP_I_IO
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

static char vkp_i_lower(char c)
{
    return c >= 'A' && c <= 'Z' ? (char)(c + ('a' - 'A')) : c;
}

/* Whether two views are equal, ASCII case ignored. */
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

/* Whether the view equals the terminated text, ASCII case ignored. */
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

/* A copy with a NUL behind it, in place of the view; nothing is copied of a text that is not there.
   Freed with vkp_i_free_str.                                                                  */
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

static void vkp_i_free_str(const vkp_env *env, vkp_str text)
{
    void *copy;
    memcpy(&copy, &text.ptr, sizeof copy); /* which was made here, not const */
    vkp_i_free(env, copy, text.len + 1);
}

/* A text that ends with its only NUL. */
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

static uint64_t vkp_i_load64(const void *from)
{
    uint64_t value;
    memcpy(&value, from, sizeof value);
    return value;
}

static vkp_status vkp_i_sys_failure(int result)
{
    errno = -result;
    return result == -ENOMEM || result == -ENOBUFS ? VKP_ERR_NOMEM : VKP_ERR_SYS;
}
#endif

/* ======================================================================================
   >>impl-sys   The operating system behind one table
   ======================================================================================
   Results are >= 0 or a negated errno. This section is the only one that calls the system, and
   knows that Linux has accept4 and eventfd, that macOS refuses MSG_NOSIGNAL, and that a futex
   takes absolute monotonic deadlines while a condition variable may not.                      */

#define VKP_I_NS_PER_S 1000000000u

static uint64_t vkp_i_os_clock_ns(void)
{
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
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
    /* Too early in the boot for getrandom: good enough for jitter (splitmix64 of the clock). */
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

/* Parker states. */
#define VKP_I_PARK_EMPTY 0u
#define VKP_I_PARK_NOTIFIED 1u
#define VKP_I_PARK_ASLEEP 2u

struct vkp_parker {
    uint32_t state; /* read and written by both sides, see park and unpark */
#if !VKP_I_LINUX
    pthread_mutex_t mutex;
    pthread_cond_t condition;
#endif
};

#if VKP_I_LINUX
/* A 32-bit system's first futex call takes two words, whatever the size of its time_t, which libc
   may have made 64 bits wide. Systems younger than that change have the second call alone.     */
#ifdef SYS_futex
#define VKP_I_FUTEX SYS_futex
typedef long vkp_i_futex_number;
#else
#define VKP_I_FUTEX SYS_futex_time64
typedef long long vkp_i_futex_number;
#endif

/* From the kernel's interface: its own headers are no part of every libc's (musl). */
#define VKP_I_FUTEX_WAKE_PRIVATE (1 | 128)
#define VKP_I_FUTEX_WAIT_BITSET_PRIVATE (9 | 128)
#define VKP_I_FUTEX_ANY 0xffffffffu
#define VKP_I_FUTEX_MOST_S 0x7fffffffu /* who wakes after 68 years looks, and sleeps again */

static void vkp_i_parker_init(vkp_parker *parker)
{
    parker->state = VKP_I_PARK_EMPTY;
}

static void vkp_i_parker_deinit(vkp_parker *parker)
{
    (void)parker;
}

/* Returns once notified, at the deadline, or never early. ASLEEP tells unpark that a system call
   is due; its exchange pairs with the loads here.                                             */
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

/* The parker may be gone after the exchange: waking a stale address is harmless to a futex. */
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

/* Asked for with every channel that opens: a fact of the machine, read once. */
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

/* Linux 4.14; a sandbox may refuse it. */
static int vkp_i_os_membarrier(bool prepare)
{
#if VKP_I_LINUX && defined(SYS_membarrier)
    return syscall(SYS_membarrier, prepare ? 1 << 4 : 1 << 3, 0, 0) == 0 ? 0 : -errno;
#else
    (void)prepare;
    return -ENOSYS;
#endif
}

#if VKP_I_IO
static int vkp_i_os_result(int result)
{
    return result < 0 ? -errno : result;
}

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
        (void)setsockopt(fd, SOL_SOCKET, SO_NOSIGPIPE, &on, sizeof on); /* not for every kind */
    }
#endif
    return 0;
}

#if !VKP_I_LINUX
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
        (void)fchmod(fd, (mode_t)mode); /* Linux gives the file this; elsewhere chmod follows */
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

/* Literals are tried first: they never ask a name server. */
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

/* Wakes come from signal handlers: what they interrupted must find its errno again. */
static int64_t vkp_i_os_write(int fd, const void *buffer, size_t bytes)
{
    int before = errno;
    ssize_t put = write(fd, buffer, bytes);
    int64_t result = put < 0 ? -(int64_t)errno : (int64_t)put;
    errno = before;
    return result;
}

static int64_t vkp_i_os_send(int fd, const vkp_range *ranges, size_t count)
{
    struct msghdr message;
    struct iovec vectors[64];
    ssize_t put;
    size_t i;
    int flags = 0;
#ifdef MSG_NOSIGNAL
    flags = MSG_NOSIGNAL;
#endif
    if (count == 1) { /* as in a fan-out, where sendmsg's own head would be a seventh of the cost */
        put = send(fd, ranges->base, ranges->len, flags);
        return put < 0 ? -(int64_t)errno : (int64_t)put;
    }
    if (count > sizeof vectors / sizeof vectors[0]) {
        count = sizeof vectors / sizeof vectors[0];
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

static void vkp_i_os_file_id(const struct stat *found, vkp_file_id *id)
{
    id->device = (uint64_t)found->st_dev;
    id->inode = (uint64_t)found->st_ino;
    id->uid = (uint32_t)found->st_uid;
    id->mode = (uint32_t)found->st_mode & 07777u;
    id->is_socket = S_ISSOCK(found->st_mode);
}

/* The lock counts only if the locked file is still the one at the path: its last holder removes
   it while holding the lock, so a file opened just before may be a corpse.                    */
static int vkp_i_os_lock_file(const char *path, vkp_file_id *id)
{
    for (;;) {
        struct stat opened;
        struct stat named;
        int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
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
    ms = (deadline_ns - now + 999999u) / 1000000u;
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

/* In whole microseconds, since some kernels cut off the rest. They also limit the time (to a day,
   to three years) or refuse a longer one, and may measure it by another clock: so the deadline
   decides whether it was enough.                                                              */
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
        uint64_t us = deadline_ns > now ? (deadline_ns - now - 1) / 1000u + 1u : 0;
        struct timespec wait;
        us = VKP_I_MIN(us, (uint64_t)86400u * 1000000u);
        wait.tv_sec = (time_t)(us / 1000000u);
        wait.tv_nsec = (long)(us % 1000000u * 1000u);
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
#define VKP_I_OS(name) vkp_i_os_##name
#else
#define VKP_I_OS(name) NULL
#endif /* VKP_I_IO */

VKP_API const vkp_sys *vkp_sys_get_default(void)
{
    static const vkp_sys table = {
        vkp_i_os_clock_ns,     vkp_i_os_random_u64,     vkp_i_os_process_id,    vkp_i_os_user_id,
        vkp_i_os_park,         vkp_i_os_unpark,         vkp_i_os_yield,         vkp_i_os_processors,
        vkp_i_os_membarrier,   VKP_I_OS(socket),        VKP_I_OS(bind),         VKP_I_OS(listen),
        VKP_I_OS(accept),      VKP_I_OS(connect),       VKP_I_OS(socket_error), VKP_I_OS(prepare),
        VKP_I_OS(set_nodelay), VKP_I_OS(peer),          VKP_I_OS(local_port),   VKP_I_OS(resolve),
        VKP_I_OS(read),        VKP_I_OS(send),          VKP_I_OS(write),        VKP_I_OS(close),
        VKP_I_OS(lock_file),   VKP_I_OS(identify),      VKP_I_OS(chmod),        VKP_I_OS(unlink),
        VKP_I_OS(wake_pair),   VKP_I_OS(poll),          VKP_I_OS(epoll_create), VKP_I_OS(epoll_ctl),
        VKP_I_OS(epoll_wait),  VKP_I_OS(kqueue_create), VKP_I_OS(kevent),       VKP_I_OS(fd_kind)};
    return &table;
}

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
   A waiter is a node that whoever waits links into the list of what it waits for. Whoever makes
   the condition true unlinks it and calls wake, both under the list's lock; so a waiter that is
   no longer linked when its owner takes the lock has been woken completely, and its memory may
   go. wake only unparks a thread or queues a task on a loop: no user code runs under a lock.
   Lock order: a channel's or token's lock, then what wake takes: a parker's, where there are no
   futexes (the loop's queue takes none). Latches: the senders', then a place's.               */

typedef struct vkp_i_waiter {
    struct vkp_i_waiter *prev; /* NULL when not linked */
    struct vkp_i_waiter *next;
    void (*wake)(struct vkp_i_waiter *waiter);
} vkp_i_waiter;

typedef struct vkp_i_waiters { /* a ring with this as its sentinel */
    vkp_i_waiter head;
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

static void vkp_i_waiter_link(vkp_i_waiters *list, vkp_i_waiter *waiter)
{
    waiter->prev = list->head.prev;
    waiter->next = &list->head;
    list->head.prev->next = waiter;
    list->head.prev = waiter;
}

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

static void vkp_i_waiters_wake_all(vkp_i_waiters *list)
{
    while (!vkp_i_waiters_empty(list)) {
        vkp_i_waiter *first = list->head.next;
        (void)vkp_i_waiter_unlink(first);
        first->wake(first);
    }
}

/* A wait for one thing: a thread has one per thing, all with its parker; a loop's watch has one. */
typedef struct vkp_i_wait {
    vkp_i_waiter node;
    const vkp_sys *sys; /* a thread's */
    vkp_parker *parker;
    const void *item; /* a sender's that waits for room, see vkp_i_lane_admit */
    size_t cost;
    vkp_status status;
    int wake_fd;   /* of a thread that sleeps in poll */
    uint32_t done; /* atomic: a one-shot woke it, and does not touch it any more */
} vkp_i_wait;

static void vkp_i_thread_wake(vkp_i_waiter *waiter)
{
    vkp_i_wait *self = VKP_CONTAINER(waiter, vkp_i_wait, node);
    self->sys->unpark(self->parker);
}

static void vkp_i_wait_init(vkp_i_wait *self, const vkp_sys *sys, vkp_parker *parker)
{
    memset(self, 0, sizeof *self);
    self->node.wake = vkp_i_thread_wake;
    self->sys = sys;
    self->parker = parker;
}

static bool vkp_i_parker_notified(vkp_parker *parker)
{
    return VKP_I_LOAD_ACQ(&parker->state) == VKP_I_PARK_NOTIFIED;
}

/* Gates. One side stores what the other waits for and then looks whether anybody waits; the other
   says that it waits and then looks for the store. One of them must see the other, and each does
   a store before a load, which processors swap. The side that is about to sleep pays for both
   with a barrier in every thread (membarrier); where there is none, each side changes the gate
   itself, which puts the two in an order.                                                     */

/* The storing side, after its store: the bits of those who wait. */
static inline uint32_t vkp_i_flag_check(uint32_t *gate, bool fenced)
{
    if (fenced) {
        return VKP_I_ADD_ACQ_REL(gate, 0u);
    }
    VKP_I_ORDER();
    return VKP_I_LOAD(gate);
}

/* The waiting side: open, settle, and then look. */
static void vkp_i_flag_raise(uint32_t *gate, uint32_t bit)
{
    (void)VKP_I_OR(gate, bit);
}

static void vkp_i_flag_fence(const vkp_env *env, bool fenced)
{
    if (!fenced) {
        (void)vkp_i_sys(env)->membarrier(false);
    }
}

static void vkp_i_flag_lower(uint32_t *gate, uint32_t bit)
{
    (void)VKP_I_AND(gate, ~bit);
}

/* Whether gates have to do without membarrier. */
static bool vkp_i_flag_prepare(const vkp_env *env)
{
    return vkp_i_sys(env)->membarrier(true) < 0;
}

/* Waiting awake: a wake-up costs microseconds, and a value is often closer than that. */
typedef struct vkp_i_spin {
    uint32_t pauses;
    uint32_t yields;
} vkp_i_spin;

#define VKP_I_SPINS 200u
#define VKP_I_YIELDS 8u

/* How long threads of this env stay awake, in pauses. */
static uint32_t vkp_i_spins(const vkp_env *env)
{
    if (env->spins == 0) {
        return vkp_i_sys(env)->processors() > 1 ? VKP_I_SPINS : 0;
    }
    return env->spins == VKP_SPINS_NONE ? 0 : env->spins;
}

/* Pause, later yield to threads that have no processor; false when it is time to sleep. */
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

/* What a thread or a loop can wait for: a vkp_case of one of these kinds. All waiting of the
   library but that of plain senders goes through them: look (attempt), say that one waits (join),
   sleep, look again, and leave.                                                                */
struct vkp_i_case_kind {
    /* Carry it out: EMPTY when that is not possible now. `wait` is the joined one, or NULL. */
    vkp_status (*attempt)(vkp_case *each, vkp_i_wait *wait);
    bool (*is_ready)(const vkp_case *each);
    bool (*join)(const vkp_case *each, vkp_i_wait *wait); /* false, not joined: it is ready */
    void (*leave)(const vkp_case *each, vkp_i_wait *wait);
    const vkp_env *(*env)(const vkp_case *each);
};

typedef struct vkp_i_batch { /* where a receive of several values puts them */
    void *out;
    size_t capacity;
    size_t count;
} vkp_i_batch;

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

/* Carry out the first case that can be, from `start` on; the first `joined` ones wait. */
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

/* A deadline among the cases, and a descriptor; i_object is the sys, set when the wait begins. */
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
static void vkp_i_case_fd_set(const vkp_case *each, struct pollfd *poll)
{
    uint32_t interest = (uint32_t)(each->i_number >> 32);
    poll->fd = (int)(each->i_number & 0xffffffffu);
    poll->revents = 0;
    poll->events = (short)(((interest & VKP_IO_READ) != 0 ? POLLIN : 0) |
                           ((interest & VKP_IO_WRITE) != 0 ? POLLOUT : 0));
}

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

/* How a thread sleeps in a select: parked, or with descriptors among its cases in poll(2), where a
   wake-up is a byte in a pipe.                                                                */
typedef struct vkp_i_sleeper {
    const vkp_sys *sys;
    uint64_t deadline_ns; /* of the select, or of the first deadline among its cases */
    bool polls;
    int wake[2];
    vkp_parker parker;
} vkp_i_sleeper;

#if VKP_I_IO
static void vkp_i_pipe_wake(vkp_i_waiter *waiter)
{
    const vkp_i_wait *wait = VKP_CONTAINER(waiter, vkp_i_wait, node);
    uint64_t one = 1;
    (void)wait->sys->write(wait->wake_fd, &one, sizeof one); /* full: it is readable already */
}
#endif

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

/* Until woken or a descriptor is ready: true; false at the deadline. */
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
        /* The cases tell more. A poll that ends early, its time-out being too long, is no
           deadline.                                                                            */
        return sleeper->sys->poll(polls, used, sleeper->deadline_ns) != 0 ||
               sleeper->sys->clock_ns() < sleeper->deadline_ns;
    }
#endif
    (void)cases;
    (void)count;
    sleeper->sys->park(&sleeper->parker, sleeper->deadline_ns);
    return vkp_i_parker_notified(&sleeper->parker);
}

/* Wait for one of the cases, each with its wait, and carry it out. OK, TIMEOUT or SYS. */
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
            late = !woken && sleeper.deadline_ns == deadline_ns; /* one last look follows */
        }
        found = vkp_i_cases_attempt(cases, count, start, waits, joined, won);
        for (i = 0; i < joined; i++) {
            cases[i].i_kind->leave(&cases[i], &waits[i]);
        }
        vkp_i_sleeper_end(&sleeper);
    }
    return found ? VKP_OK : VKP_ERR_TIMEOUT;
}

/* The same for the library's own waits, of at most two cases: the status of the one that won. */
static vkp_status vkp_i_select_few(vkp_case *cases, size_t count, const vkp_env *env,
                                   uint32_t spins, uint64_t deadline_ns)
{
    vkp_i_wait waits[2];
    size_t won;
    vkp_status status =
        vkp_i_select(cases, count, 0, waits, vkp_i_sys(env), spins, deadline_ns, &won);
    return status == VKP_OK ? cases[won].status : status;
}

/* Waiting for a thread that is between two instructions, and may have lost its processor there.
   It sleeps in the end: a thread of a higher priority would otherwise never let that one run. */
typedef struct vkp_i_backoff {
    uint32_t rounds;
} vkp_i_backoff;

#define VKP_I_BACKOFF_NS 50000u

static void vkp_i_back_off(vkp_i_backoff *backoff, const vkp_sys *sys)
{
    backoff->rounds++;
    if (backoff->rounds < 64) {
        VKP_I_PAUSE();
    } else if (backoff->rounds < 128) {
        sys->yield();
    } else {
        vkp_parker parker;
        vkp_i_parker_init(&parker);
        sys->park(&parker, sys->clock_ns() + VKP_I_BACKOFF_NS);
        vkp_i_parker_deinit(&parker);
    }
}

/* A lock for some instructions, of which no thread waits asleep. */
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

/* Bias: what nearly always ONE thread does belongs to that thread, and it does it with plain
   stores. Another one that comes revokes that for good (vkp_i_biased_lock, vkp_i_lane_own),
   which costs a membarrier once; where there is none nobody owns anything.                     */
typedef struct vkp_i_bias {
    uintptr_t owner; /* atomic: a thread, VKP_I_NOBODY yet, or VKP_I_SHARED for good */
    uint32_t busy;   /* atomic: the owner is inside */
    uint32_t held;   /* atomic: and must stay outside */
} vkp_i_bias;

#define VKP_I_NOBODY ((uintptr_t)0)
#define VKP_I_SHARED ((uintptr_t)1)

/* The owner goes inside, unless somebody holds it off, or has taken the bias. */
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

/* Another thread: the owner is outside when this returns, until vkp_i_bias_release. */
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

/* A latch that costs its owner no exchange. */
typedef struct vkp_i_biased_latch {
    vkp_i_bias bias;
    uint32_t latch;
} vkp_i_biased_latch;

/* Gives what vkp_i_biased_unlock wants to know: whether the owner got in by its bias. */
static inline bool vkp_i_biased_lock(vkp_i_biased_latch *self, const vkp_env *env)
{
    uintptr_t owner = VKP_I_LOAD_ACQ(&self->bias.owner);
    if (owner == VKP_I_SELF() && vkp_i_bias_enter(&self->bias)) {
        return true;
    }
    vkp_i_latch_lock(&self->latch, vkp_i_sys(env));
    owner = VKP_I_LOAD(&self->bias.owner);
    if (owner == VKP_I_NOBODY) {
        VKP_I_STORE_REL(&self->bias.owner, VKP_I_SELF()); /* it takes effect at the unlock */
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

static void vkp_i_biased_init(vkp_i_biased_latch *self, bool fenced)
{
    self->bias.owner = fenced ? VKP_I_SHARED : VKP_I_NOBODY;
}

/* ======================================================================================
   >>impl-bytes   Immutable ref-counted blocks
   ======================================================================================
   A block is one allocation: header, then bytes. Bytes below `len` never change; whoever holds
   the ONLY right to append (a loop's read block, a hub's encoder, a writer) writes above `len`
   and publishes slices. Slices cross threads through queues, which order those writes.        */

struct vkp_block {
    const vkp_env *env;
    size_t refs; /* atomic; 64 bits do not overflow */
    size_t capacity;
    size_t len; /* appender's: bytes in use */
};

#define VKP_I_BLOCK_MAX 0xffffffffu /* offsets inside a block are 32 bits */

static uint8_t *vkp_i_block_data(vkp_block *block)
{
    return (uint8_t *)(block + 1);
}

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

static vkp_block *vkp_i_block_ref(vkp_block *block)
{
    if (block != NULL) {
        (void)VKP_I_ADD(&block->refs, 1);
    }
    return block;
}

static void vkp_i_block_unref(vkp_block *block)
{
    if (block != NULL && VKP_I_UNREF(&block->refs) == 1) {
        vkp_i_free(block->env, block, sizeof *block + block->capacity);
    }
}

#if VKP_I_IO
/* Whether the caller's reference is the only one, so that the bytes may be written again. The
   acquire pairs with the release of the other holders' unref.                                 */
static bool vkp_i_block_is_mine(const vkp_block *block)
{
    return VKP_I_LOAD_ACQ(&block->refs) == 1;
}

/* Make room for `more` bytes in the caller's own unshared block (*block may be NULL). */
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
    wanted = VKP_I_MAX(wanted, (size_t)64);
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
   Intrusive, chained, doubling. Names come from clients that may be hostile: the hash is keyed
   (SipHash-1-3 of Aumasson and Bernstein) with a key of its own per map.
   A shared map may be walked by threads that do not hold its lock, if its nodes' memory stays:
   links are stored whole, old tables kept. Such a walk may miss a node or stray into another
   chain; what it finds is to be checked, what it does not find to be looked for under the lock. */

typedef struct vkp_i_map_node {
    struct vkp_i_map_node *next; /* atomic, as hash, where the map is shared */
    uint64_t hash;
    vkp_str key; /* the owner's memory */
} vkp_i_map_node;

typedef struct vkp_i_buckets {
    struct vkp_i_buckets *older; /* of a shared map: kept */
    size_t count;                /* a power of two; their links stand behind this struct */
} vkp_i_buckets;

typedef struct vkp_i_map {
    const vkp_env *env;
    vkp_i_buckets *buckets; /* atomic; NULL at first */
    size_t count;
    bool shared;
    uint64_t key[2];
} vkp_i_map;

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
    for (shift = 0; i < text.len; i++, shift += 8) { /* at most 7 bytes: a call would cost more */
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

static vkp_i_map_node **vkp_i_map_bucket(vkp_i_buckets *buckets, uint64_t hash)
{
    return (vkp_i_map_node **)(void *)(buckets + 1) + (hash & (buckets->count - 1));
}

static void vkp_i_buckets_free(const vkp_env *env, vkp_i_buckets *buckets)
{
    vkp_i_free(env, buckets, sizeof *buckets + buckets->count * sizeof(vkp_i_map_node *));
}

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

static void vkp_i_map_link(vkp_i_buckets *buckets, vkp_i_map_node *node)
{
    vkp_i_map_node **bucket = vkp_i_map_bucket(buckets, node->hash);
    VKP_I_STORE_REL(&node->next, *bucket);
    VKP_I_STORE_REL(bucket, node);
}

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

/* A map that cannot grow gets slower, not wrong; only the first table must be had. */
static bool vkp_i_map_insert(vkp_i_map *map, vkp_i_map_node *node)
{
    size_t room = map->buckets != NULL ? map->buckets->count : 0;
    if (map->count >= room && !vkp_i_map_resize(map, room == 0 ? 16 : room * 2) && room == 0) {
        return false;
    }
    vkp_i_map_link(map->buckets, node);
    map->count++;
    return true;
}

static void vkp_i_map_remove(vkp_i_map *map, vkp_i_map_node *node)
{
    vkp_i_map_node **link = vkp_i_map_bucket(map->buckets, node->hash);
    while (*link != node) {
        link = &(*link)->next;
    }
    VKP_I_STORE_REL(link, node->next);
    map->count--;
}

/* Walk from NULL; nodes must not be removed meanwhile, but for the one given last. */
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
   A tree shares one lock, owned by its root: walking it needs no lock order. A child holds a
   reference to its parent; the parent's list of children is weak. `triggered` is written under
   the lock and read without.                                                                  */

typedef struct vkp_i_cancel_tree {
    VKP_I_MUTEX mutex;
    size_t refs; /* atomic: one per token */
} vkp_i_cancel_tree;

struct vkp_cancel {
    const vkp_env *env;
    vkp_i_cancel_tree *tree;
    vkp_cancel *parent;
    vkp_cancel *first_child;
    vkp_cancel *prev_sibling;
    vkp_cancel *next_sibling;
    size_t refs;        /* atomic */
    uint32_t triggered; /* atomic, release / acquire */
    vkp_i_waiters waiters;
};

VKP_API vkp_status vkp_cancel_open(const vkp_env *env, vkp_cancel *parent, vkp_cancel **token)
{
    vkp_cancel *self;
    VKP_I_REQUIRE(token != NULL);
    /* One env for the tree: whichever token is the last one frees the lock. */
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

/* Locked: the next token of the subtree under `top`, parents before children. */
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

/* Link the waiter unless the token is cancelled already. */
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
   A queue is a lane: tickets count the places since the beginning, `tail` the next one to give,
   `head` the next one to receive. A ticket's place is a slot of a ring: a stamp that says for which
   ticket its value is ready, and the value. So a sender takes a ticket with one exchange, fills the
   slot, stamps it, and the receiver needs no exchange at all.

   The lowest bit of `tail`, SLOW, sends every sender through the mutex: while a ring is replaced,
   while senders wait, when bytes are counted, after close. It is set first (freeze), and what the
   fast path reads is changed after that; a fast sender that read the old state then fails its
   exchange. Under the mutex everything can be done, the fast path is a short cut.
   A ring that is too small gets a successor, which begins at the ticket of the sender that needed
   it: the old ring ends there, and the receiver frees it when it comes to that end.
   A waiting sender stands in `senders`; whoever makes room moves its value in, in order of arrival.
   Receiver and senders look for each other by the gates `flags` (asleep, or gone) and
   `tx_waiting`, see the section park. Lock order: the mutex, then
   nothing.                                                                                     */

#define VKP_I_TAIL_SLOW 1u
#define VKP_I_RX_WAITING 1u /* vkp_i_channel.flags */
#define VKP_I_RX_GONE 2u
#define VKP_I_ENDED_CLOSED 1u /* vkp_i_channel.ended */
#define VKP_I_ENDED_SENDERS 2u
#define VKP_I_STAMP_ABORTED 1u
#define VKP_I_BUNCH 16u     /* values between two looks of senders at head, see vkp_i_lane_take */
#define VKP_I_LANE_TURN 64u /* values that the receiver takes from one lane before it looks on */
#define VKP_I_HYSTERESIS 4u /* a full lane is roomy again when this part of it is free */
#define VKP_I_LINGER_BURST 64u
#define VKP_I_LINGER_PAUSES 32u
#define VKP_I_LINGER_SHARE 4u  /* never longer than it takes to fill this part of a lane */
#define VKP_I_RING_KEEP 65536u /* bytes of a ring that an empty channel keeps */

typedef struct vkp_i_channel vkp_i_channel;

typedef struct vkp_i_ring {
    struct vkp_i_ring *next; /* valid once the receiver is at `end` */
    uint64_t end;            /* atomic: the successor's first ticket; UINT64_MAX: none */
    size_t bytes;            /* of this allocation */
    uint64_t mask;           /* slots - 1 */
    size_t elem_bytes;
    size_t stride;       /* from item to item, */
    size_t stamp_stride; /* and from stamp to stamp: small values lie beside theirs */
    uint8_t *stamps;
    uint8_t *items;
} vkp_i_ring;

typedef struct vkp_i_lane {
    vkp_i_channel *channel;
    struct vkp_i_lane *next; /* atomic: of the channel's lanes, written under the mutex */
    uint32_t dead;           /* atomic: its sender has gone; the receiver frees it */
    unsigned char pad_senders[VKP_I_APART];
    uint64_t tail;      /* atomic: ticket << 1 | SLOW */
    uint64_t head_seen; /* atomic: what senders saw of head last */
    uint64_t room;      /* atomic: tickets above head to give without growing */
    vkp_i_ring *ring;   /* atomic: where tickets go now; NULL: none yet */
    vkp_i_bias bias;    /* of the one thread that sends, as long as it is one */
    unsigned char pad_receiver[VKP_I_APART];
    uint64_t head;       /* atomic */
    vkp_i_ring *rx_ring; /* atomic: where head is */
    uint64_t taken_cost; /* atomic */
    uint64_t lingered;   /* head when there was nothing the last time */
    uint32_t tx_waiting; /* gate: senders is not empty */
    bool plain;          /* no bytes to count, no eviction, no fences: values may go the fast way */
    unsigned char pad_slow[VKP_I_APART];
    uint64_t sent_cost; /* the rest is guarded by the mutex */
    vkp_i_waiters senders;
} vkp_i_lane;

struct vkp_mpsc_tx {
    vkp_i_lane *lane;
    size_t refs; /* atomic */
};
typedef struct vkp_i_extra_lane { /* of a clone, see vkp_mpsc_config.lanes */
    vkp_mpsc_tx tx;
    vkp_i_lane lane;
} vkp_i_extra_lane;

struct vkp_mpsc_rx {
    vkp_i_channel *channel;
};
struct vkp_mpsc_weak {
    vkp_i_channel *channel;
    size_t refs; /* atomic; each holds one of the channel's */
};

struct vkp_i_channel {
    vkp_mpsc_config config;
    uint64_t capacity; /* items, UINT64_MAX when unbounded */
    vkp_mpsc_tx tx;
    vkp_mpsc_rx rx;
    vkp_mpsc_weak weak;
    size_t refs;    /* atomic: all senders together, the receiver, weak senders */
    size_t handles; /* atomic: senders; the references of one count once */
    uint32_t flags; /* gate: VKP_I_RX_* */
    uint32_t ended; /* atomic: VKP_I_ENDED_* */
    uint32_t spins; /* before a thread sleeps */
    bool fenced;    /* no membarrier here */
    bool evicts;    /* senders may take the oldest value: receiving needs the mutex too */
    VKP_I_MUTEX mutex;
    vkp_i_waiters receiver;
    vkp_i_waiters closers; /* wait until closed */
    vkp_i_ring *retired;   /* rings left behind after the receiver went */
    size_t dead_lanes;     /* atomic: that the receiver has to free */
    vkp_i_lane *rx_lane;   /* the receiver's: where it took the last value */
    vkp_i_lane lane;       /* the first one */
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

static uint32_t vkp_i_stamp(uint64_t ticket)
{
    return (uint32_t)((ticket + 1) << 1);
}

/* Room for `slots` values from ticket `start` on. Values up to 56 bytes lie behind their stamp, in
   one cache line with it; larger ones in an array of their own, so that a line's worth of value is
   one line.                                                                                    */
static vkp_i_ring *vkp_i_ring_open(const vkp_env *env, size_t elem_bytes, size_t slots,
                                   uint64_t start)
{
    size_t stride;
    size_t stamp_stride = sizeof(uint32_t);
    size_t bytes;
    vkp_i_ring *ring;
    uint64_t i;
    if (elem_bytes <= 56) {
        for (stride = 16; stride < elem_bytes + 8; stride *= 2) {
        }
        stamp_stride = stride;
    } else {
        stride = (elem_bytes + 7u) & ~(size_t)7u;
    }
    if (slots > (SIZE_MAX - sizeof *ring - 128) / (stride + stamp_stride)) {
        return NULL;
    }
    bytes = sizeof *ring + 128 + slots * (stride + (stamp_stride == stride ? 0 : stamp_stride));
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
    ring->stamps = (uint8_t *)(((uintptr_t)(ring + 1) + 63u) & ~(uintptr_t)63u);
    if (elem_bytes <= 56) {
        ring->items = ring->stamps + (stride - ((elem_bytes + 7u) & ~(size_t)7u));
    } else {
        uintptr_t behind = (uintptr_t)(ring->stamps + slots * stamp_stride);
        ring->items = (uint8_t *)((behind + 63u) & ~(uintptr_t)63u);
    }
    for (i = 0; i < slots; i++) { /* no ticket from start on has this stamp in this lap */
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

/* ---- what both sides do ---- */

static size_t vkp_i_channel_cost(const vkp_i_channel *channel, const void *item)
{
    return channel->config.cost != NULL ? channel->config.cost(item) : channel->config.elem_bytes;
}

/* Tickets below `ticket` that are not free; 0 for a ticket that is out of date. */
static uint64_t vkp_i_used(uint64_t ticket, uint64_t head)
{
    return (int64_t)(ticket - head) > 0 ? ticket - head : 0;
}

/* The oldest value where it lies, or NULL. Skips what was aborted, and follows to the next ring. */
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
                ring->next = channel->retired; /* a drop may still be looking at a value in it */
                channel->retired = ring;
            } else {
                vkp_i_ring_close(channel->config.env, ring);
            }
        } else {
            return NULL;
        }
    }
}

/* The oldest value is out: its place is free. Senders are let in by vkp_i_lane_freed. */
static inline void vkp_i_lane_pop(vkp_i_lane *lane, const uint8_t *item)
{
    if (lane->channel->config.capacity_bytes != 0) {
        size_t cost = vkp_i_channel_cost(lane->channel, item);
        VKP_I_STORE_REL(&lane->taken_cost, VKP_I_LOAD(&lane->taken_cost) + cost);
    }
    VKP_I_STORE_REL(&lane->head, VKP_I_LOAD(&lane->head) + 1);
}

static vkp_i_lane *vkp_i_lane_after(const vkp_i_lane *lane)
{
    vkp_i_lane *next = VKP_I_LOAD_ACQ(&lane->next);
    return next != NULL ? next : &lane->channel->lane;
}

/* The lane of the receiver's next value, or NULL: where it is, as long as there is something. */
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

/* Locked: wake the receiver if it sleeps. */
static void vkp_i_channel_wake_receiver(vkp_i_channel *channel)
{
    if (!vkp_i_waiters_empty(&channel->receiver)) {
        vkp_i_flag_lower(&channel->flags, VKP_I_RX_WAITING);
        vkp_i_waiters_wake_all(&channel->receiver);
    }
}

/* Drop what is queued. Values come out one by one, so that drop runs without the mutex. */
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

/* A sender saw that the receiver sleeps, or that it has gone and nobody will take the value. */
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
   ====================================================================================== */

/* The owner begins on the fast path, unless the lane changed since it read `word`. */
static inline bool vkp_i_lane_enter(vkp_i_lane *lane, uint64_t word)
{
    if (!vkp_i_bias_enter(&lane->bias)) {
        return false;
    }
    /* The owner last: tail may be what it was, and the lane be shared since then. */
    if (VKP_I_LOAD_ACQ(&lane->tail) == word && VKP_I_LOAD(&lane->bias.owner) == VKP_I_SELF()) {
        return true;
    }
    vkp_i_bias_exit(&lane->bias);
    return false;
}

/* Take up to `count` tickets without the mutex. FULL is certain; EMPTY: go by the mutex. */
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
            VKP_I_STORE(&lane->tail, word + 2 * *taken);
            vkp_i_bias_exit(&lane->bias);
            return VKP_OK;
        }
        if (VKP_I_CAS(&lane->tail, &word, word + 2 * *taken)) {
            return VKP_OK;
        }
    }
}

/* The value of the ticket is in its slot: show it, and wake the receiver if it sleeps. */
static inline void vkp_i_lane_publish(vkp_i_lane *lane, vkp_i_ring *ring, uint64_t ticket,
                                      uint32_t outcome)
{
    vkp_i_channel *channel = lane->channel;
    VKP_I_STORE_REL(vkp_i_ring_stamp(ring, ticket), vkp_i_stamp(ticket) | outcome);
    if (vkp_i_flag_check(&channel->flags, channel->fenced) != 0) {
        vkp_i_channel_signal(channel);
    }
}

/* The way of nearly every value: there is room, and nobody comes between. */
static inline bool vkp_i_lane_send_fast(vkp_i_lane *lane, const void *item)
{
    uint64_t word = VKP_I_LOAD_ACQ(&lane->tail);
    uint64_t used = (word >> 1) - VKP_I_LOAD_ACQ(&lane->head_seen); /* out of date: huge */
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
        VKP_I_STORE(&lane->tail, word + 2);
        vkp_i_bias_exit(&lane->bias);
    } else if (owner != VKP_I_SHARED || !VKP_I_CAS(&lane->tail, &word, word + 2)) {
        return false;
    }
    VKP_I_COPY_IN(vkp_i_ring_item(ring, word >> 1), item, ring->elem_bytes);
    vkp_i_lane_publish(lane, ring, word >> 1, 0);
    return true;
}

/* Locked: keep the fast path out. Gives the next ticket. */
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
    /* The owner writes tail without an exchange: it must be out of the way first. */
    vkp_i_bias_hold(&lane->bias, lane->channel->config.env);
    word = VKP_I_OR(&lane->tail, (uint64_t)VKP_I_TAIL_SLOW);
    vkp_i_bias_release(&lane->bias);
    return word >> 1;
}

/* Locked and frozen: a lane belongs to the first thread that sends, as long as it is the only
   one.                                                                                         */
static void vkp_i_lane_own(vkp_i_lane *lane)
{
    uintptr_t owner = VKP_I_LOAD(&lane->bias.owner);
    if (owner == VKP_I_NOBODY) {
        VKP_I_STORE_REL(&lane->bias.owner, VKP_I_SELF());
    } else if (owner != VKP_I_SELF() && owner != VKP_I_SHARED) {
        VKP_I_STORE_REL(&lane->bias.owner, VKP_I_SHARED);
    }
}

/* Locked: the next ticket is this one, and the fast path may go on if nothing speaks against it. */
static void vkp_i_lane_thaw(vkp_i_lane *lane, uint64_t ticket)
{
    const vkp_i_channel *channel = lane->channel;
    bool slow = VKP_I_LOAD(&channel->ended) != 0 || VKP_I_LOAD(&lane->ring) == NULL ||
                !vkp_i_waiters_empty(&lane->senders) || channel->config.capacity_bytes != 0;
    VKP_I_STORE_REL(&lane->tail, ticket << 1 | (slow ? VKP_I_TAIL_SLOW : 0u));
}

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

/* Locked and frozen: see to it that the ring has a slot for the ticket, which has room. */
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
        for (slots = 16; slots > 1 && (slots / 2 >= channel->capacity ||
                                       slots * channel->config.elem_bytes > 4096);
             slots /= 2) {
        }
    }
    ring = slots > UINT32_MAX / 4 ? NULL
                                  : vkp_i_ring_open(channel->config.env, channel->config.elem_bytes,
                                                    (size_t)slots, ticket);
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

/* Locked and frozen: the value into the queue, under the ticket, which has room. */
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

/* Locked: take the sender out of the queue with its outcome, and wake it. */
static void vkp_i_sender_finish(vkp_i_wait *sender, vkp_status status)
{
    sender->status = status;
    (void)vkp_i_waiter_unlink(&sender->node);
    sender->node.wake(&sender->node);
}

/* Locked: let waiting senders in, oldest first, as far as there is room. The value of one that left
   it here (`item`) is moved in, and its wait is over; one that did not is told, and keeps the
   first place until it came for the room.                                                     */
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
                sender->status = VKP_OK; /* told once */
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

static void vkp_i_permit_set(vkp_mpsc_permit *permit, vkp_i_lane *lane, vkp_i_ring *ring,
                             uint64_t ticket)
{
    permit->item = vkp_i_ring_item(ring, ticket);
    permit->i_lane = lane;
    permit->i_ring = ring;
    permit->i_ticket = ticket;
}

/* Locked: send what fits; `self` is the sender's own place in the queue, or NULL. FULL means that
   waiting would help.                                                                          */
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

/* Send, reserve when `permit` is given, or say why not, without waiting. */
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

/* Stand in line; the wake-up may have come when this returns. */
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
    vkp_i_lane_admit(lane); /* the room that the receiver made before it could see us */
    VKP_I_UNLOCK(&channel->mutex);
}

/* Come for the room with the place in the line that `wait` has: FULL when it is not this one's
   turn, or when there is none.                                                                 */
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

/* Leave the line, if still in it; whoever stands behind may have room now. */
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

/* Whether it is worth to try again without the mutex. */
static bool vkp_i_lane_looks_roomy(vkp_i_lane *lane)
{
    uint64_t word = VKP_I_LOAD(&lane->tail);
    return (word & VKP_I_TAIL_SLOW) == 0 &&
           vkp_i_used(word >> 1, VKP_I_LOAD(&lane->head)) <
               VKP_I_LOAD(&lane->room) - VKP_I_LOAD(&lane->room) / VKP_I_HYSTERESIS;
}

/* The cancel section's; a thread waits for a token beside its channel. */
/* Send or reserve, waiting for room, for the token (may be NULL; TIMEOUT then), or the deadline. */
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
        if (status != VKP_OK) { /* one by the slow path, then try for more */
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
   ====================================================================================== */

/* Senders wait who could not know of the places just freed. */
static void vkp_i_lane_admit_waiting(vkp_i_lane *lane)
{
    VKP_I_LOCK(&lane->channel->mutex);
    vkp_i_lane_admit(lane);
    VKP_I_UNLOCK(&lane->channel->mutex);
}

/* Nothing was there: EMPTY, CLOSED, or OK when something just came. */
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

/* The way of nearly every value: it is there, and nobody waits for its place. */
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

/* Up to `capacity` values from the ring where the head is. Senders hear of their places in bunches,
   so that the line they look at does not change hands for each.                                */
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

/* Values are out: let senders in who could not know. The lock is taken where it is not held. */
static void vkp_i_lane_freed(vkp_i_lane *lane)
{
    vkp_i_channel *channel = lane->channel;
    if (channel->evicts) {
        vkp_i_lane_admit(lane);
    } else if (vkp_i_flag_check(&lane->tx_waiting, channel->fenced) != 0) {
        vkp_i_lane_admit_waiting(lane);
    }
}

static void vkp_i_channel_freed(vkp_i_channel *channel)
{
    vkp_i_lane *lane = &channel->lane;
    for (; lane != NULL; lane = VKP_I_LOAD_ACQ(&lane->next)) {
        vkp_i_lane_freed(lane);
    }
}

/* Where senders may take the oldest value, receiving needs the mutex, too. */
static void vkp_i_channel_hold(vkp_i_channel *channel)
{
    if (channel->evicts) {
        VKP_I_LOCK(&channel->mutex);
    }
}

static void vkp_i_channel_release(vkp_i_channel *channel)
{
    if (channel->evicts) {
        VKP_I_UNLOCK(&channel->mutex);
    }
}

/* Locked: an empty lane gives back what a burst made it take. Its last ticket is frozen, received,
   and so no sender holds the ring.                                                             */
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

static void vkp_i_lane_free(vkp_i_lane *lane)
{
    const vkp_env *env = lane->channel->config.env;
    (void)vkp_i_lane_oldest(lane); /* leaves the rings behind it */
    vkp_i_ring_close(env, VKP_I_LOAD(&lane->rx_ring));
    if (lane != &lane->channel->lane) {
        vkp_i_free(env, VKP_CONTAINER(lane, vkp_i_extra_lane, lane), sizeof(vkp_i_extra_lane));
    }
}

/* Locked: before the receiver waits, what bursts and senders left behind goes. */
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

/* EMPTY, CLOSED, or OK with up to `capacity` values. */
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
            VKP_I_LOCK(&channel->mutex); /* for a receiver that only looks, and never waits */
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

/* Whether a receive would give a value, or CLOSED. */
static bool vkp_i_channel_is_ready(vkp_i_channel *channel)
{
    bool ready;
    vkp_i_channel_hold(channel);
    ready = vkp_i_channel_find(channel) != NULL || vkp_i_channel_end(channel) != VKP_ERR_EMPTY;
    vkp_i_channel_freed(channel); /* places that were given back were passed */
    vkp_i_channel_release(channel);
    return ready;
}

static void vkp_i_channel_leave(vkp_i_channel *channel, vkp_i_waiter *waiter)
{
    VKP_I_LOCK(&channel->mutex);
    if (vkp_i_waiter_unlink(waiter) && vkp_i_waiters_empty(&channel->receiver)) {
        vkp_i_flag_lower(&channel->flags, VKP_I_RX_WAITING);
    }
    VKP_I_UNLOCK(&channel->mutex);
}

/* Link the receiver's waiter; false, and not linked, when a receive would not be EMPTY. */
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

/* A receiver that follows a stream too closely takes each cache line from its sender while that one
   writes it. After a short burst, but not after a single value, which may be one of a dialogue,
   it lets some gather.                                                                         */
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

/* Worth to try again: what a receiver that waits awake looks at. */
static inline bool vkp_i_channel_looks_ready(vkp_i_channel *channel)
{
    return channel->evicts
               ? vkp_i_channel_is_ready(channel)
               : vkp_i_channel_find(channel) != NULL || VKP_I_LOAD(&channel->ended) != 0;
}

/* Take values, or wait for the first, for the token (may be NULL), or for the deadline. */
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
    vkp_i_channel_freed(rx->channel); /* places that were given back were passed */
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
        /* A value may be received before the slow path moved tail. */
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
   ====================================================================================== */

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

static void vkp_i_lane_init(vkp_i_lane *lane, vkp_i_channel *channel)
{
    lane->channel = channel;
    lane->tail = VKP_I_TAIL_SLOW; /* there is no ring yet */
    lane->bias.owner = channel->fenced ? VKP_I_SHARED : VKP_I_NOBODY;
    lane->plain = !channel->evicts && !channel->fenced && channel->config.capacity_bytes == 0;
    vkp_i_waiters_init(&lane->senders);
}

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
    VKP_I_REQUIRE(config->elem_bytes > 0 && config->elem_bytes <= 65536);
    VKP_I_REQUIRE(!config->lanes || config->capacity_bytes == 0);
    return vkp_i_mpsc_open(config, false, tx, rx);
}

VKP_API vkp_mpsc_tx *vkp_mpsc_tx_ref(vkp_mpsc_tx *tx)
{
    (void)VKP_I_ADD(&tx->refs, (size_t)1);
    return tx;
}

/* A sender less; the last one ends the channel. */
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

/* A sender with a lane of its own, for which `handles` was counted already. */
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
            VKP_I_STORE_REL(&tx->lane->dead, 1u); /* it may be gone from here on */
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
        (void)vkp_i_lane_freeze(lane); /* for good: no ticket is given after this */
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

/* Cases of a sender; i_out is the item or the permit. While it waits it stands in the line. */
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
/* For queues that prefer the newest: when full, take the oldest value out into *evicted and try
   once more. FULL with an eviction: the value is large, call again.                           */
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

/* What the next value costs; false when there is none. Receiver's thread. */
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
   One state word decides who was first. Sender: value, then SENT (or ABANDONED) by an exchange;
   receiver: CLOSED by an exchange, or nothing at all once it saw SENT. RX_WAITING and TX_WAITING
   say that i_receiver or i_sender points to a waiter. Whoever finishes reads that pointer BEFORE
   its exchange, as the slot may be gone after it, and marks the waiter when it is done with it; a
   side that leaves its wait too late waits for that mark (the other one is between two
   instructions). A side may wait more than once (a select that another case won): each wait is a
   turn, counted in the state, so that an exchange fails that goes with the pointer of an earlier
   one. A slot of the heap has two references, one for each side.                               */

#define VKP_I_SLOT_SENT 1u
#define VKP_I_SLOT_ABANDONED 2u
#define VKP_I_SLOT_CLOSED 4u
#define VKP_I_SLOT_ENDED (VKP_I_SLOT_SENT | VKP_I_SLOT_ABANDONED | VKP_I_SLOT_CLOSED)
#define VKP_I_SLOT_RX_WAITING 8u
#define VKP_I_SLOT_TX_WAITING 16u
#define VKP_I_SLOT_HEAP 32u
#define VKP_I_SLOT_TURN 64u /* counts the waits above this bit */

typedef struct vkp_i_heap_slot {
    vkp_oneshot slot;
    size_t refs; /* atomic */
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

/* Of a slot of the heap. The side that finds itself alone needs no exchange. */
static void vkp_i_heap_slot_unref(vkp_oneshot *slot)
{
    vkp_i_heap_slot *self = VKP_CONTAINER(slot, vkp_i_heap_slot, slot);
    if (VKP_I_LOAD_ACQ(&self->refs) == 1 || VKP_I_UNREF(&self->refs) == 1) {
        vkp_i_free(slot->i_env, self, sizeof *self);
    }
}

static void vkp_i_slot_wake(vkp_i_wait *wait)
{
    wait->node.wake(&wait->node);
    VKP_I_STORE_REL(&wait->done, 1u);
}

/* End the sender's side, seen in `state`, with SENT or ABANDONED; false when the receiver closed
   first.                                                                                      */
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
    VKP_I_REQUIRE(slot != NULL && item != NULL);
    state = VKP_I_LOAD_ACQ(&slot->i_state);
    VKP_I_REQUIRE((state & (VKP_I_SLOT_SENT | VKP_I_SLOT_ABANDONED)) == 0);
    VKP_I_COPY_IN(slot->i_value.bytes, item, slot->i_elem_bytes);
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

/* What the receiver's side has come to: EMPTY, or its end. */
static inline vkp_status vkp_i_oneshot_take(vkp_oneshot *slot, void *out)
{
    uint32_t state = VKP_I_LOAD_ACQ(&slot->i_state);
    vkp_status status = VKP_ERR_CLOSED;
    if ((state & VKP_I_SLOT_ENDED) == 0) {
        return VKP_ERR_EMPTY;
    }
    if ((state & VKP_I_SLOT_SENT) != 0) {
        VKP_I_COPY_OUT(out, slot->i_value.bytes, slot->i_elem_bytes);
        status = VKP_OK;
    }
    VKP_I_STORE(&slot->i_state, (state & VKP_I_SLOT_HEAP) | VKP_I_SLOT_CLOSED);
    return status;
}

/* Close before the sender finished; false when it was first. */
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

/* Wait on one side for an end of the slot; false, and not waiting, when it has one. */
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

/* The end of a wait that join began: the waiter may go when this returns. */
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
    each->i_kind = &vkp_i_case_kind_never; /* the slot may be gone */
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
    /* A value that comes with the deadline is received: whoever ends the slot first has it. */
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
   ====================================================================================== */

/* ---- what broadcast and watch share: receivers, those who wait for news, and their leaving
   ----                                                                                         */

typedef struct vkp_i_receivers {
    const vkp_env *env;
    uint32_t spins;
    bool fenced;
    uint32_t ended;   /* atomic: no sender is left */
    uint32_t waiting; /* gate: receivers wait for news */
    size_t receivers; /* atomic */
    unsigned char pad_lists[VKP_I_APART];
    VKP_I_MUTEX mutex; /* guards both lists */
    vkp_i_waiters news;
    vkp_i_waiters closers; /* wait until no receiver is left */
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

/* After a store that receivers may wait for. */
static inline void vkp_i_receivers_signal(vkp_i_receivers *receivers)
{
    if (vkp_i_flag_check(&receivers->waiting, receivers->fenced) != 0) {
        VKP_I_LOCK(&receivers->mutex);
        vkp_i_flag_lower(&receivers->waiting, 1u);
        vkp_i_waiters_wake_all(&receivers->news);
        VKP_I_UNLOCK(&receivers->mutex);
    }
}

/* The last sender has gone. */
static void vkp_i_receivers_end(vkp_i_receivers *receivers)
{
    VKP_I_STORE_REL(&receivers->ended, 1u);
    vkp_i_receivers_signal(receivers);
}

static bool vkp_i_receivers_is_ended(const vkp_i_receivers *receivers)
{
    return VKP_I_LOAD_ACQ(&receivers->ended) != 0;
}

static size_t vkp_i_receivers_size(const vkp_i_receivers *receivers)
{
    return VKP_I_LOAD_ACQ(&receivers->receivers);
}

/* Link a receiver's waiter; it looks once more afterwards. */
static void vkp_i_receivers_join(vkp_i_receivers *receivers, vkp_i_waiter *waiter)
{
    VKP_I_LOCK(&receivers->mutex);
    vkp_i_waiter_link(&receivers->news, waiter);
    vkp_i_flag_raise(&receivers->waiting, 1u);
    VKP_I_UNLOCK(&receivers->mutex);
    vkp_i_flag_fence(receivers->env, receivers->fenced);
}

static void vkp_i_receivers_leave(vkp_i_receivers *receivers, vkp_i_waiter *waiter)
{
    VKP_I_LOCK(&receivers->mutex);
    if (vkp_i_waiter_unlink(waiter) && vkp_i_waiters_empty(&receivers->news)) {
        vkp_i_flag_lower(&receivers->waiting, 1u);
    }
    VKP_I_UNLOCK(&receivers->mutex);
}

/* A receiver goes. */
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
    VKP_I_LOCK(&receivers->mutex); /* the last receiver wakes under it, after its count */
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

/* No receiver is left; i_object is the audience. */
static const vkp_i_case_kind vkp_i_case_no_receivers = {
    vkp_i_case_no_receivers_attempt, vkp_i_case_no_receivers_is_ready, vkp_i_case_no_receivers_join,
    vkp_i_case_no_receivers_leave, vkp_i_case_no_receivers_env};

static vkp_status vkp_i_receivers_wait_gone(vkp_i_receivers *receivers, uint64_t deadline_ns)
{
    vkp_case gone = vkp_i_case(&vkp_i_case_no_receivers, receivers, NULL);
    return vkp_i_select_few(&gone, 1, receivers->env, 0, deadline_ns);
}

/* Values that are copied while they may be overwritten, word by word. */
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

#define VKP_I_OWNED_BYTES 256u /* most of a value with a drop: it is a handle */

/* ======================================================================================
   >>impl-broadcast   Every receiver sees every value
   ======================================================================================
   A ring of places; tickets count values since the beginning, and each receiver has the ticket it
   reads next. Senders go one at a time, under the latch, and never look at receivers. A place's
   `seq` tells which ticket it holds, and is odd while it is written: a receiver copies between two
   looks at it and so knows whether it was overtaken. Words are stored with release and loaded with
   acquire: a word of a later value shows the later seq, too.
   Values that own something are copied and retained under a latch of their place instead.
   Who waits for a value does so in the audience.                                              */

typedef struct vkp_i_broadcast {
    vkp_broadcast_config config;
    size_t words;   /* of one value */
    size_t stride;  /* words of one place: seq, value, latch */
    uint64_t mask;  /* capacity - 1 */
    size_t refs;    /* atomic: the senders together, each receiver */
    size_t tx_refs; /* atomic */
    uint64_t *places;
    unsigned char pad_sender[VKP_I_APART];
    uint64_t tail;            /* atomic: the next ticket */
    vkp_i_biased_latch latch; /* of senders */
    vkp_i_receivers receivers;
} vkp_i_broadcast;

struct vkp_broadcast_tx {
    vkp_i_broadcast channel;
};

struct vkp_broadcast_rx {
    vkp_i_broadcast *channel;
    uint64_t next; /* ticket */
    uint64_t missed;
};

static uint64_t *vkp_i_place(const vkp_i_broadcast *channel, uint64_t ticket)
{
    return channel->places + (size_t)(ticket & channel->mask) * channel->stride;
}

static uint32_t *vkp_i_place_latch(const vkp_i_broadcast *channel, uint64_t *place)
{
    return (uint32_t *)(void *)(place + 1 + channel->words);
}

static uint64_t vkp_i_place_seq(uint64_t ticket)
{
    return (ticket + 1) << 1;
}

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
    VKP_I_REQUIRE(config->elem_bytes > 0 && config->elem_bytes <= 65536);
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

/* Latched: the value into its place; the one that it replaces, if that owns something, into
   *old.                                                                                        */
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

/* Copy the value of the ticket out; false when its place holds a later one. */
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

/* The way of nearly every value. */
static inline bool vkp_i_broadcast_take_one(vkp_broadcast_rx *rx, void *out)
{
    const vkp_i_broadcast *channel = rx->channel;
    if (rx->next == VKP_I_LOAD_ACQ(&channel->tail) || !vkp_i_place_read(channel, rx->next, out)) {
        return false;
    }
    rx->next++;
    return true;
}

static vkp_status vkp_i_broadcast_take(vkp_broadcast_rx *rx, uint8_t *out, size_t capacity,
                                       size_t *count)
{
    vkp_i_broadcast *channel = rx->channel;
    bool ended = vkp_i_receivers_is_ended(&channel->receivers);
    uint64_t tail = VKP_I_LOAD_ACQ(&channel->tail); /* after the look at the end: nothing follows */
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
        oldest = VKP_I_MAX(oldest, rx->next + 1); /* a sender is about to replace this one */
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
   Values live in cells. A sender fills a cell that is not current and that nobody borrows, and
   makes it current; a borrower pins the current one. Both do so under the latch, for some
   instructions. Copying out takes no latch: it reads the cell's words between two looks at its
   `seq`, which changes whenever the cell does; words are stored with release and loaded with
   acquire, so that a word of a later value shows the later seq, too.
   Who waits for a change does so in the audience.                                             */

typedef struct vkp_i_cell {
    struct vkp_i_cell *next; /* of all cells; the rest but seq and words is guarded by the latch */
    uint64_t seq;            /* atomic: version << 1, odd while it is written */
    size_t pins;
    bool owns; /* a value that is not dropped yet; for channels with a drop */
    uint64_t words[1];
} vkp_i_cell;

typedef struct vkp_i_watch {
    vkp_watch_config config;
    size_t words;
    size_t refs;    /* atomic: the senders together, each receiver */
    size_t tx_refs; /* atomic */
    unsigned char pad_sender[VKP_I_APART];
    vkp_i_biased_latch latch;
    uint64_t version;    /* atomic: of the newest value */
    vkp_i_cell *current; /* atomic */
    vkp_i_cell *cells;   /* latch */
    uint64_t *scratch;   /* latch; for vkp_watch_send_if_modified */
    vkp_i_receivers receivers;
} vkp_i_watch;

struct vkp_watch_tx {
    vkp_i_watch watch;
};

struct vkp_watch_rx {
    vkp_i_watch *watch;
    uint64_t seen;
    vkp_i_cell *borrowed;
};

static size_t vkp_i_cell_bytes(const vkp_i_watch *watch)
{
    return sizeof(vkp_i_cell) + (watch->words - 1) * sizeof(uint64_t);
}

/* Latched: a cell to fill, or NULL without memory. Odd from here on. */
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

/* Latched: the cell is full, and the newest. Gives the one whose value is to be dropped, or
   NULL.                                                                                        */
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

/* The cell's value was replaced, and nobody looks at it any more. It stays taken until it is
   dropped.                                                                                     */
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
    VKP_I_REQUIRE(config->elem_bytes > 0 && config->elem_bytes <= 65536);
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

/* Latched: where `modify` may write, apart from the cells that others read; NULL without memory. */
static uint64_t *vkp_i_watch_scratch(vkp_i_watch *watch)
{
    if (watch->scratch == NULL) {
        watch->scratch =
            (uint64_t *)vkp_i_alloc_zero(watch->config.env, watch->words * sizeof(uint64_t));
    }
    return watch->scratch;
}

/* Latched: a new version made by `modify`; OK with *modified false when it changed nothing. */
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

/* Copy the newest value out: its version. */
static uint64_t vkp_i_watch_read(const vkp_i_watch *watch, void *out)
{
    vkp_i_backoff backoff = {0};
    for (;;) {
        const vkp_i_cell *cell = VKP_I_LOAD_ACQ(&watch->current);
        uint64_t seq = VKP_I_LOAD_ACQ(&cell->seq);
        if ((seq & 1u) == 0) {
            vkp_i_words_load(out, cell->words, watch->config.elem_bytes);
            /* Still current, too: a cell that is filled again is not the newest one yet. */
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

/* A version is there that the receiver has not seen. It may have seen one, by a borrow, that is not
   announced yet.                                                                               */
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

static vkp_status vkp_i_case_changed_attempt(vkp_case *each, vkp_i_wait *wait)
{
    vkp_watch_rx *rx = (vkp_watch_rx *)each->i_object;
    bool closed = vkp_watch_is_closed(rx);
    (void)wait;
    if (!vkp_watch_is_changed(rx)) { /* after the look at the end: nothing follows that */
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
   The engine is in the section park: every wait of the library is a select. Here are its public
   calls.                                                                                       */

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
    return vkp_i_select(cases, count, start, waits, vkp_i_sys(env), vkp_i_spins(env) / 8,
                        deadline_ns, won);
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
   A round: wait on the backend, dispatch descriptors, run what other threads queued, run timers,
   then the deferred work of the round (writes, closes), until there is none.
   Other threads reach the loop through ONE lock-free queue of tasks. Whoever pushes looks at
   `asleep` afterwards, the loop sets `asleep` and looks at the queue afterwards, all seq_cst: one
   of the two sees the other, so no task waits for an unrelated event. Only the first pusher
   finds `asleep` set and pays for the backend's wake.
   A watch is a slot with a generation; the token of an event carries both, so that an event
   fetched before a stop, or before the descriptor's number was used again, finds no one.      */

typedef struct vkp_i_task {
    struct vkp_i_task *next;
    void (*fn)(struct vkp_i_task *task); /* may free the task */
} vkp_i_task;

/* Objects that must hear of vkp_loop_close and have no watch to hear it through. */
typedef struct vkp_i_attached {
    struct vkp_i_attached *prev;
    struct vkp_i_attached *next;
    vkp_loop *loop;
    void (*on_loop_close)(struct vkp_i_attached *self);
} vkp_i_attached;

typedef struct vkp_i_slot {
    vkp_io *io; /* NULL: free */
    uint32_t generation;
    uint32_t next_free; /* index + 1 */
} vkp_i_slot;

typedef struct vkp_i_timer_entry {
    uint64_t deadline_ns;
    uint64_t order; /* of starts: equal deadlines fire in that order */
    vkp_timer *timer;
} vkp_i_timer_entry;

struct vkp_loop {
    const vkp_env *env;
    vkp_env host_env; /* what the backend sees: nothing NULL */
    const vkp_sys *sys;
    const vkp_backend *backend;
    void *backend_state;
    vkp_backend_host host;
    size_t refs; /* atomic */
    int opener_pid;

    vkp_i_task *queue; /* atomic: newest first, vkp_i_queue_closed after the end */
    uint32_t asleep;   /* atomic, seq_cst with queue */
    uint32_t stopping; /* atomic */
    uintptr_t thread;  /* atomic: whose it is, 0 nobody's */
    uint32_t running;  /* atomic: inside vkp_loop_run or vkp_loop_run_once */

    bool in_round;
    bool closed;
    uint32_t unpolled;     /* rounds since the backend was asked */
    uint64_t reminder_ns;  /* when a guest calls for a round by itself */
    bool reminded;         /* it still does */
    vkp_i_waiters unarmed; /* case watches that look by themselves until the loop would sleep */
    uint64_t now_ns;
    vkp_event *events;
    size_t event_capacity;
    vkp_i_slot *slots;
    size_t slot_count;
    size_t slot_capacity;
    uint32_t free_slot; /* index + 1 */
    vkp_i_timer_entry *timers;
    size_t timer_count;
    size_t timer_capacity;
    uint64_t timer_order;
    vkp_i_task *deferred; /* oldest first */
    vkp_i_task **deferred_end;
    vkp_i_attached attached; /* ring */
    vkp_block *read_block;   /* the connections' */
    size_t read_bytes;
};

static vkp_i_task vkp_i_queue_closed; /* a mark, never run */

/* The address of a thread-local is a cheap name for a thread. */
static uintptr_t vkp_i_this_thread(void)
{
    static __thread char name;
    return (uintptr_t)&name;
}

/* True on the loop's thread: at first the one that opened it, then the one that runs it, also
   between rounds of vkp_loop_run_once. After vkp_loop_run returned it is nobody's: anybody's. */
static bool vkp_i_on_loop(const vkp_loop *loop)
{
    uintptr_t thread = VKP_I_LOAD_ACQ(&loop->thread);
    return thread == 0 || thread == vkp_i_this_thread();
}

/* Queue a task from any thread. False: the loop was closed, the task stays the caller's. */
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

#define VKP_I_SOME_DAY (VKP_FOREVER - 1)

/* A guest's wait is elsewhere, and knows of the next deadline only what it is told. A round ends
   with this; so does whatever makes work outside of rounds. Objects that have no deadline still
   have a day: its timer keeps the foreign loop from ending while, say, a channel is under watch. */
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

static void vkp_i_loop_attach(vkp_loop *loop, vkp_i_attached *object)
{
    object->prev = loop->attached.prev;
    object->next = &loop->attached;
    object->loop = loop;
    loop->attached.prev->next = object;
    loop->attached.prev = object;
    (void)!vkp_i_loop_set_guest_timer(loop);
}

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

/* Work deferred by deferred work runs in the same round. */
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

static uint64_t vkp_i_loop_clock(const vkp_loop *loop)
{
    return loop->backend->clock_ns != NULL ? loop->backend->clock_ns(loop->backend_state)
                                           : loop->sys->clock_ns();
}

/* Between rounds the last round's time may be long ago: another loop may do the waiting. */
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

/* In a forked child the parent's connections are left alone: only memory is given back. */
static bool vkp_i_loop_is_forked(const vkp_loop *loop)
{
    return loop->sys->process_id() != loop->opener_pid;
}

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
    (void)vkp_loop_ref(loop); /* the last object may hold the last reference */
    /* Ours now, should another thread have run rounds: what is called here is on the loop. */
    VKP_I_STORE_REL(&loop->thread, vkp_i_this_thread());
    loop->in_round = true;
    vkp_i_loop_run_queued(loop);
    loop->closed = true; /* nothing new opens: it would never hear of the close */
    vkp_i_loop_close_objects(loop);
    vkp_i_loop_run_deferred(loop);
    /* What was posted so far runs; what it posts is refused. */
    vkp_i_run_tasks(VKP_I_XCHG_SEQ(&loop->queue, &vkp_i_queue_closed));
    vkp_i_loop_run_deferred(loop);
    while (loop->timer_count > 0) { /* stopped: their owners may say so after the loop is gone */
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
        (void)VKP_I_SUB(&loop->refs, 1); /* called by the last unref, which goes on */
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

/* ---- watches ---- */

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

static bool vkp_i_timer_before(const vkp_i_timer_entry *a, const vkp_i_timer_entry *b)
{
    return a->deadline_ns != b->deadline_ns ? a->deadline_ns < b->deadline_ns : a->order < b->order;
}

static void vkp_i_timer_place(vkp_loop *loop, size_t index, vkp_i_timer_entry entry)
{
    loop->timers[index] = entry;
    entry.timer->i_index = index + 1;
}

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
        (void)!vkp_i_loop_set_guest_timer(timer->i_loop); /* if it fails: a round too many */
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
    /* All that is overdue is equally due: one that restarts itself in the past comes last. */
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

static uint64_t vkp_i_add_ns(uint64_t a, uint64_t b)
{
    return b > VKP_FOREVER - a ? VKP_FOREVER : a + b;
}

/* Only timers that were due when the round looked: one that restarts itself in the past does not
   keep the round from ending.                                                                 */
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
            /* There is room: the entry just left. */
            (void)!vkp_timer_start(timer, loop, timer->i_fn, timer->i_period_ns, next);
        }
        timer->i_fn(timer);
    }
}

#endif /* VKP_I_IO */

#if VKP_I_IO
/* ======================================================================================
   >>impl-handler   Callbacks of a loop for channels
   ====================================================================================== */

/* A handler's task calls back when its case is ready, and links the handler to the loop's unarmed
   ones. At the end of the round, handlers whose cases are ready queue their tasks again, behind the
   others: a busy channel does not starve the loop. The rest join their cases once nothing else is
   left to do; a wake-up queues the task. The struct is freed when its task is not queued and its
   last reference is given back.                                                               */

struct vkp_handler {
    vkp_i_task task;
    vkp_i_attached attached;
    vkp_i_wait wait;
    vkp_loop *loop;
    vkp_case what;
    void (*fn)(void *user);
    void *user;
    bool busy;     /* the task is queued; set by whoever wakes, read after leave */
    bool joined;   /* the rest is the loop's thread's */
    bool running;  /* inside fn */
    bool ended;    /* fn is not called again */
    bool released; /* the handle was given back */
};

static void vkp_i_handler_wake(vkp_i_waiter *waiter)
{
    vkp_handler *handler = VKP_CONTAINER(waiter, vkp_handler, wait.node);
    handler->busy = true;
    if (!vkp_i_loop_queue(handler->loop, &handler->task)) {
        handler->busy = false; /* the loop is closed: nobody runs the task */
    }
}

static void vkp_i_handler_leave(vkp_handler *handler)
{
    if (handler->joined) {
        handler->joined = false;
        handler->what.i_kind->leave(&handler->what, &handler->wait);
    } else {
        (void)vkp_i_waiter_unlink(&handler->wait.node); /* unarmed */
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

static void vkp_i_handler_free(vkp_handler *handler)
{
    vkp_loop *loop = handler->loop;
    if (handler->released && !handler->busy && !handler->running) {
        vkp_i_free(loop->env, handler, sizeof *handler);
        vkp_loop_unref(loop);
    }
}

/* Wait for the case, or queue the task at once when it is ready. */
static void vkp_i_handler_arm(vkp_handler *handler)
{
    const vkp_i_case_kind *kind = handler->what.i_kind;
    handler->wait.status = VKP_OK;
    if (!kind->is_ready(&handler->what) && kind->join(&handler->what, &handler->wait)) {
        handler->joined = true;
    } else if (!handler->busy) { /* or it was woken while it joined */
        vkp_i_handler_wake(&handler->wait.node);
    }
}

/* At the end of a round. As long as the loop has work, watches look by themselves: to wait, they
   would have to make themselves known to other threads, which costs both sides.               */
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
   ====================================================================================== */

/* Rounds that posts and channels may go on before descriptors are asked. */
#define VKP_I_UNPOLLED 8u

/* `unpolled` rounds may have gone by on what was queued alone; descriptors wait for that long. */
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
        loop->reminded = false; /* a guest's timer has gone off, or is about to for nothing */
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
    /* From here on pushers pay for a wake-up; the next round looks at the queue once more. */
    VKP_I_STORE_SEQ(&loop->asleep, 1u);
    if (vkp_i_loop_set_guest_timer(loop) != VKP_OK && status == VKP_OK) {
        status = VKP_ERR_SYS;
    }
    return status;
}

/* Become the loop's thread. False while another runs it, inside a callback, or when closed. */
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

typedef struct vkp_i_post {
    vkp_i_task task;
    const vkp_env *env;
    void (*fn)(void *user);
    void *user;
} vkp_i_post;

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

/* The program may run its loop inside one of our callbacks, and after it closed ours: then this is
   no round. The one under way reminds the guest once more, whose timer may have gone off here. */
static void vkp_i_backend_round(void *user)
{
    vkp_loop *loop = (vkp_loop *)user;
    if (loop->in_round) {
        loop->reminded = false;
    } else if (!loop->closed) {
        (void)!vkp_loop_run_once(loop, 0); /* a guest has nobody to tell */
    }
}

static vkp_status vkp_i_loop_setup(vkp_loop *loop, const vkp_loop_config *config)
{
    vkp_status status;
    loop->event_capacity = config->events_per_wait != 0 ? config->events_per_wait : 256;
    loop->read_bytes = config->read_bytes != 0 ? config->read_bytes : 65536;
    loop->read_bytes = VKP_I_MAX(loop->read_bytes, (size_t)1024);
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
    /* A guest begins with a round, for what is posted before the foreign loop runs. */
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
   ====================================================================================== */

static bool vkp_i_value_is_element(const vkp_value *value)
{
    return value->type != VKP_RESP_ATTRIBUTE && (value->flags & VKP_VALUE_OUT_OF_BAND) == 0;
}

static bool vkp_i_is_message_kind(const char *text, size_t len)
{
    size_t skip = len == 8 && (text[0] == 'p' || text[0] == 's') ? 1 : 0;
    return len == 7 + skip && memcmp(text + skip, "message", 7) == 0;
}

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

static size_t vkp_i_digits(const char *text, size_t len, size_t at)
{
    size_t start = at;
    while (at < len && text[at] >= '0' && text[at] <= '9') {
        at++;
    }
    return at - start;
}

#define VKP_I_EXPONENT_MAX 100000000L

/* The digits of an exponent, saturated a little above the maximum. */
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

/* strtod of validated digits, whatever the locale's decimal point: without one, as an integer and
   an exponent. No tie between two doubles needs more than 768 digits; of those cut, one sticky
   digit tells whether they were zero.                                                         */
static double vkp_i_to_double(const char *text, size_t len)
{
    char copy[840];
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
        if (kept < 780) {
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

/* Not as a literal: where doubles are computed with more bits (x87) that one is a bit less. */
#define VKP_I_DOUBLE_MAX DBL_MAX

/* Whether the text is a double of the grammar and finite, or one of the named ones. */
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
   The reader walks a window that starts at the frame under way. `position` is how far whole values
   reach; what lies behind it is read again with more bytes, which costs a header of at most 22
   bytes, or, for lines, resumes at `line_seen`. Values under construction hold offsets; they
   become pointers when the frame is whole. Open aggregates are a stack of counters: no recursion,
   and nothing is allocated for an announced count. One growth may fail at a time, before
   anything was changed, so NOMEM can be retried.                                              */

typedef struct vkp_i_level {
    size_t index;       /* of the aggregate among the values */
    uint64_t remaining; /* elements still to come */
    size_t attribute;   /* index + 1 of the attribute before the next element */
} vkp_i_level;

struct vkp_resp_reader {
    const vkp_env *env;
    vkp_resp_config config;
    vkp_status status; /* OK, or the sticky error */
    uint64_t error_position;
    char reason[160];
    uint64_t consumed; /* bytes of whole frames since open or reset */
    size_t position;
    size_t line_seen;
    bool whole;        /* the last scan gave a frame: the next one starts anew */
    bool quick;        /* the limits allow vkp_i_reader_quick */
    bool quick_values; /* the first four values are those of a message */
    size_t attribute;  /* as in vkp_i_level, for the root */
    vkp_value *values;
    size_t count;
    size_t capacity;
    vkp_i_level *levels;
    size_t depth;
    size_t level_capacity;
    uint8_t *buffer; /* feed's */
    size_t begin;
    size_t end;
    size_t buffer_capacity;
    size_t given; /* bytes of the frame that next gave out */
};

static const char vkp_i_message_prefix[] = ">3\r\n$7\r\nmessage\r\n$";
#define VKP_I_MESSAGE_PREFIX 18u

static bool vkp_i_is_crlf(const uint8_t *at, const uint8_t *end)
{
    return end - at >= 2 && memcmp(at, "\r\n", 2) == 0;
}

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
    VKP_I_REQUIRE(config->max_depth <= 65000 && config->max_frame_bytes <= VKP_I_BLOCK_MAX);
    env = vkp_i_env(config->env);
    reader = (vkp_resp_reader *)vkp_i_alloc_zero(env, sizeof *reader);
    if (reader == NULL) {
        return VKP_ERR_NOMEM;
    }
    reader->env = env;
    reader->config = *config;
    config = NULL;
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
                    reader->config.max_bulk_bytes >= 7;
    *out = reader;
    return VKP_OK;
}

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

static void vkp_i_reader_start(vkp_resp_reader *reader)
{
    reader->whole = false;
    reader->position = 0;
    reader->line_seen = 0;
    reader->attribute = 0;
    reader->count = 0;
    reader->depth = 0;
    if (reader->capacity > 32768) { /* one huge frame does not keep a megabyte for ever */
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

__attribute__((format(printf, 4, 5))) static vkp_status
vkp_i_reader_fail(vkp_resp_reader *reader, vkp_status status, size_t at, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    (void)vsnprintf(reader->reason, sizeof reader->reason, format, arguments);
    va_end(arguments);
    reader->status = status;
    reader->error_position = reader->consumed + at;
    return status;
}

/* The number of a header: what it may look like depends on the type before it. */
#define VKP_I_NUM_PLUS 1u      /* +5 */
#define VKP_I_NUM_NEGATIVE 2u  /* any -n */
#define VKP_I_NUM_MINUS_ONE 4u /* -1 alone */

/* Read digits and CRLF at `at`. *after is behind the LF. EMPTY: more bytes are needed. */
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

/* Find the line behind the type byte at `position`: its text is [position + 1, *end). */
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

/* A new value at the end of the array; the attribute before it is noted. NULL: no memory. */
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

static vkp_status vkp_i_reader_bulk(vkp_resp_reader *reader, const uint8_t *window, size_t len,
                                    uint8_t mark)
{
    size_t at = reader->position;
    size_t most = reader->config.max_bulk_bytes;
    int64_t number = 0;
    size_t after = 0;
    size_t size;
    size_t prefix = mark == '=' ? 4 : 0;
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
    if (prefix != 0 && window[after + 3] != ':') {
        return vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, after + 3,
                                 "verbatim string without its colon");
    }
    return vkp_i_reader_text(reader, mark == '!' ? VKP_RESP_ERROR : VKP_RESP_STRING,
                             prefix != 0 ? VKP_VALUE_VERBATIM : 0, after + prefix, size - prefix,
                             after + size + 2);
}

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
                return VKP_ERR_EMPTY; /* the same verdict however the input is split */
            }
            guess = ": this looks like HTTP";
        }
    }
    if (byte == 0x16 || byte == 0x15) {
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

/* Whether the next element is the first of a push. */
static bool vkp_i_reader_wants_kind(const vkp_resp_reader *reader)
{
    const vkp_i_level *top = reader->depth > 0 ? &reader->levels[reader->depth - 1] : NULL;
    return top != NULL && reader->values[top->index].type == VKP_RESP_PUSH &&
           top->remaining == reader->values[top->index].len;
}

/* One value, or the header of one aggregate, at `position`. */
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

static bool vkp_i_push_is_message(const uint8_t *window, const vkp_value *push)
{
    const vkp_value *kind = push + 1;
    return vkp_i_is_message_kind((const char *)window + kind->u.i_offset, kind->len);
}

/* A value is whole: count it where it belongs, and close the aggregates that it completes.
   True when the frame is whole.                                                               */
static bool vkp_i_reader_end_value(vkp_resp_reader *reader, const uint8_t *window)
{
    size_t index = reader->count - 1;
    for (;;) {
        vkp_value *value = &reader->values[index];
        vkp_i_level *top = reader->depth > 0 ? &reader->levels[reader->depth - 1] : NULL;
        if (top != NULL && top->index == index) { /* an aggregate just opened */
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
        if (value->type == VKP_RESP_PUSH && vkp_i_push_is_message(window, value)) {
            value->flags = (uint8_t)(value->flags | VKP_VALUE_OUT_OF_BAND);
            reader->values[top->index].i_has_nested = 1;
            return false;
        }
        if (--top->remaining > 0) {
            return false;
        }
        index = top->index;
        reader->depth--;
    }
}

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

/* A length of at most 8 digits without a leading zero, and its CRLF. NULL: leave it to the steps.
   Inlined twice, so that each place's branches are predicted for themselves.                  */
__attribute__((always_inline)) static inline const uint8_t *
vkp_i_quick_length(const uint8_t *at, const uint8_t *end, size_t *out)
{
    const uint8_t *start = at;
    size_t value = 0;
    while (at < end && (uint8_t)(*at - '0') < 10) {
        value = value * 10 + (uint8_t)(*at - '0');
        at++;
    }
    if ((size_t)(at - start) - 1 >= 8 || (*start == '0' && at - start > 1) ||
        !vkp_i_is_crlf(at, end)) {
        return NULL;
    }
    *out = value;
    return at + 2;
}

/* What is the same in every message is written once and stays until the general way overwrites it:
   a subscriber's frame costs five stores.                                                     */
static void vkp_i_quick_prepare(vkp_resp_reader *reader)
{
    size_t i;
    memset(reader->values, 0, 4 * sizeof *reader->values);
    for (i = 0; i < 4; i++) {
        reader->values[i].type = i == 0 ? VKP_RESP_PUSH : VKP_RESP_STRING;
        reader->values[i].i_depth = i == 0 ? 0 : 1;
        reader->values[i].span = i == 0 ? 4 : 1;
        reader->values[i].len = i == 0 ? 3 : 7;
    }
    reader->quick_values = true;
}

/* The frame that a subscriber sees a million times: >3 message channel payload. Its first 18 bytes
   are compared at once, its texts are passed over by length. The reader's state is that before a
   frame, and stays so. EMPTY: the payload is still coming. UNSUPPORTED: take the general way. */
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
    if (!vkp_i_is_message(window, len) || !reader->quick || reader->capacity < 4) {
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

/* Out of line: inlined, it would make the quick way save every register. */
__attribute__((noinline)) static vkp_status vkp_i_reader_general(vkp_resp_reader *reader,
                                                                 const uint8_t *window, size_t len,
                                                                 const vkp_value **value,
                                                                 size_t *consumed)
{
    do {
        vkp_status status = vkp_i_reader_step(reader, window, len);
        if (status != VKP_OK) {
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
   The relay gives a reader of its own to a client whose command is long.                      */

/* The frame under way has so many values that reading it again from its start would cost. */
#define VKP_I_READER_DEEP 64
static bool vkp_i_reader_is_deep_in(const vkp_resp_reader *reader)
{
    return reader->count > VKP_I_READER_DEEP;
}

static vkp_status vkp_i_reader_open_alike(const vkp_resp_reader *reader, vkp_resp_reader **out)
{
    return vkp_resp_reader_open(&reader->config, out);
}

#endif /* VKP_I_IO */

#if VKP_I_IO
/* ======================================================================================
   >>impl-frame   The length of a frame
   ====================================================================================== */

static size_t vkp_i_skip_line(const uint8_t *data, size_t len, size_t at)
{
    const void *lf = at < len ? memchr(data + at, '\n', len - at) : NULL;
    return lf != NULL ? (size_t)((const uint8_t *)lf - data) + 1 : 0;
}

/* Behind a header line [at, body): the value's own bytes, and the elements to come. 0: torn. */
static size_t vkp_i_skip_head(const uint8_t *data, size_t len, size_t at, uint64_t *elements)
{
    size_t body = at < len ? vkp_i_skip_line(data, len, at + 1) : 0;
    uint64_t number = 0;
    size_t i;
    *elements = 0;
    if (body == 0) {
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

/* Whether the push whose elements begin at `at` is one that its parent does not count. */
static bool vkp_i_skip_is_message(const uint8_t *data, size_t len, size_t at)
{
    uint64_t elements;
    size_t end = vkp_i_skip_head(data, len, at, &elements);
    size_t text;
    if (end < at + 3) {
        return false;
    }
    text = data[at] == '+' ? at + 1 : vkp_i_skip_line(data, len, at + 1);
    text += data[at] == '=' ? 4 : 0;
    return text < end - 2 && vkp_i_is_message_kind((const char *)data + text, end - 2 - text);
}

/* Behind the value at `at`, its attributes not counted; 0: torn. */
static size_t vkp_i_skip_value(const uint8_t *data, size_t len, size_t at)
{
    uint64_t remaining = 1;
    bool root = true;
    while (remaining > 0) {
        uint64_t elements;
        size_t body = vkp_i_skip_head(data, len, at, &elements);
        if (body == 0) {
            return 0;
        }
        remaining += elements;
        if (root ||
            (data[at] != '|' && (data[at] != '>' || !vkp_i_skip_is_message(data, len, body)))) {
            remaining--;
        }
        root = false;
        at = body;
    }
    return at;
}

VKP_API size_t vkp_resp_get_frame_len(const uint8_t *data, size_t len)
{
    size_t at = 0;
    while (at < len && data[at] == '|') {
        at = vkp_i_skip_value(data, len, at);
        if (at == 0) {
            return 0;
        }
    }
    return vkp_i_skip_value(data, len, at);
}

#endif /* VKP_I_IO */

#if VKP_I_IO
/* ======================================================================================
   >>impl-resp-writer   RESP writer
   ====================================================================================== */

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

/* Decimal digits at the end of a buffer of 24 bytes; returns where they start. */
static size_t vkp_i_format_u64(char buffer[24], uint64_t value)
{
    size_t at = 24;
    do {
        buffer[--at] = (char)('0' + (char)(value % 10));
        value /= 10;
    } while (value != 0);
    return at;
}

static void vkp_i_put_header(vkp_resp_writer *writer, char mark, bool negative, uint64_t number)
{
    char line[32];
    char digits[24];
    size_t from = vkp_i_format_u64(digits, number);
    size_t used = 0;
    line[used++] = mark;
    if (negative) {
        line[used++] = '-';
    }
    memcpy(line + used, digits + from, 24 - from);
    used += 24 - from;
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
    char text[64];
    size_t from;
    size_t to = 0;
    if (value != value) {
        (void)snprintf(text, sizeof text, "nan");
    } else if (value > VKP_I_DOUBLE_MAX || value < -VKP_I_DOUBLE_MAX) {
        (void)snprintf(text, sizeof text, value > 0 ? "inf" : "-inf");
    } else {
        (void)snprintf(text, sizeof text, "%.17g", value);
        for (from = 0; text[from] != '\0'; from++) { /* the locale's point may be several bytes */
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

/* An error with line breaks cannot be a line: RESP2 gets blanks in their place. */
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

static void vkp_i_put_text_value(vkp_resp_writer *writer, const vkp_value *value, int protocol)
{
    vkp_str text = vkp_value_get_str(value);
    if (value->type == VKP_RESP_STRING && (value->flags & VKP_VALUE_SIMPLE) != 0) {
        vkp_i_put_line(writer, '+', text);
    } else if (value->type == VKP_RESP_STRING && (value->flags & VKP_VALUE_VERBATIM) != 0 &&
               protocol == 3) {
        vkp_i_put_header(writer, '=', false, text.len + 4);
        vkp_resp_put_raw(writer, text.ptr - 4, text.len + 4);
        vkp_resp_put_raw(writer, "\r\n", 2);
    } else if (value->type == VKP_RESP_STRING || protocol != 3) {
        vkp_resp_put_bulk(writer, text.ptr, text.len);
    } else {
        vkp_i_put_line(writer, value->type == VKP_RESP_DOUBLE ? ',' : '(', text);
    }
}

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

/* One place of the tree: a scalar, or an aggregate's header. */
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
   ====================================================================================== */

typedef struct vkp_i_name {
    const char *text;
    size_t len;
    bool abstract; /* text begins with '@' */
} vkp_i_name;

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

/* INVALID for what can be no name, LIMIT for what sun_path cannot hold. */
static vkp_status vkp_i_name_of(const vkp_env *env, vkp_str text, bool abstract_names,
                                vkp_i_name *out)
{
    size_t most = sizeof(((struct sockaddr_un *)NULL)->sun_path) - 1; /* and a NUL, at either end */
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

/* Decimal, 0 to 65535: resolvers take more and cut it. */
static bool vkp_i_is_port(vkp_str text)
{
    unsigned port = 0;
    size_t i;
    for (i = 0; i < text.len && text.ptr[i] >= '0' && text.ptr[i] <= '9' && i < 6; i++) {
        port = port * 10 + (unsigned)(text.ptr[i] - '0');
    }
    return i > 0 && i == text.len && port <= 65535;
}

/* What an address says. */
typedef struct vkp_i_parts {
    vkp_i_name name; /* of a Unix socket; text NULL: none */
    char host[256];
    char port[8];
} vkp_i_parts;

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

/* "tcp:HOST:PORT" or "unix:PATH": the addresses, or an error. */
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
   A socket is a slot of its registry: its memory is used again for other sockets, and freed with
   the registry only. So weak handles, and look-ups by name, may look at any slot at any time: one
   atomic word says which life of the slot this is, and how many refer to it, and whoever got a
   reference from it knows that the rest of the slot stays.

   The last unref must clean up and may not wait. It takes the count to 0 and the DUTY of the burial
   in one step, so that nobody else does both. The registry's lock is the word `held`; whoever may
   wait stands in line at the mutex before it. The burial only tries the word. Where it is taken
   the slot goes on the list of corpses, which the holder looks at after it let go: either he finds
   the corpse, or the burial's second try finds the word free.
   Who looks for a path and finds a slot whose count is 0 buries it himself and makes a new one in
   another slot; whose duty it was finds it DEAD, and only gives the slot back. A path's next
   socket is thus never touched by the end of the one before.

   Under the lock there are map, files and counters; descriptors are closed, messages logged and
   callbacks called after it. A descriptor is an endpoint with a count of its own: a loop that
   watches it keeps it open, whoever ended the socket.

   On disk: PATH.lock is created and flocked first, removed last, so that between processes the
   lock tells who lives; PATH is bound, given its mode, and only then set listening, so that
   nobody connects before. A file is unlinked only while device and inode are those recorded.  */

#define VKP_I_REFS ((uint64_t)0x3fffffff) /* of the word: how many refer to it */
#define VKP_I_MOST_REFS ((size_t)1 << 29) /* far from the next bit: ref adds before it looks */
#define VKP_I_DEAD ((uint64_t)1 << 30)    /* retired: inactive for good */
#define VKP_I_CLEANUP ((uint64_t)1 << 31) /* somebody is about to bury it */
#define VKP_I_GENERATION(word) ((uint32_t)((word) >> 32))

#define VKP_I_PATH_BYTES (sizeof(((struct sockaddr_un *)NULL)->sun_path) + 1) /* with an end */

typedef struct vkp_i_endpoint {
    struct vkp_i_endpoint *next; /* of those that wait for their close */
    const vkp_env *env;
    size_t refs; /* atomic: the socket's, and one per listener that watches it */
    int fd;
} vkp_i_endpoint;

/* A listener's place with its socket; guarded by the registry. */
typedef struct vkp_i_follower {
    struct vkp_i_follower *next;
    vkp_socket *sock; /* NULL: not, or no longer, with it */
    vkp_loop *loop;
    vkp_i_task task; /* tells the listener that its socket ended, or has another descriptor */
    bool queued;
} vkp_i_follower;

#define VKP_I_SOCKET_ABSTRACT 1u /* flags */
#define VKP_I_SOCKET_LINGERS 2u
#define VKP_I_SOCKET_LOST 4u
#define VKP_I_SOCKET_EVENT(event) (8u << (event)) /* to be told */

struct vkp_socket {
    vkp_i_map_node node; /* key: path */
    uint64_t word;       /* atomic */
    vkp_registry *registry;
    vkp_socket *all;   /* the registry's slots, linked for good */
    vkp_socket *link;  /* of corpses, or of free slots */
    uint64_t ended_ns; /* of him who has the duty */
    /* Guarded: */
    vkp_i_endpoint *endpoint; /* NULL once retired */
    vkp_i_follower *followers;
    uint64_t linger_until_ns; /* on the loop's clock; 0: not yet known */
    uint32_t flags;
    vkp_status blocked; /* why it was not bound again */
    int lock_fd;
    /* Read by vkp_registry_unlink_all, too: */
    uint32_t on_disk; /* atomic: path and ids hold */
    int opener_pid;
    vkp_file_id id;
    vkp_file_id lock_id;
    char path[VKP_I_PATH_BYTES];
};

struct vkp_registry {
    const vkp_env *env;
    const vkp_sys *sys;
    size_t refs; /* atomic: the program's, the live sockets', those of work under way */
    vkp_registry_config config; /* its folder is a copy */
    VKP_I_MUTEX mutex;          /* the line before `held` */
    uint32_t held;              /* atomic */
    vkp_socket *corpses;        /* atomic */
    vkp_socket *all;            /* atomic, newest first */
    /* Guarded by `held`: */
    vkp_i_map sockets;
    vkp_socket *spare;
    vkp_i_endpoint *to_close; /* when the lock is off */
    size_t released;          /* references to drop then */
    bool noted;               /* there is a note to log then */
    vkp_log_level note_level;
    char note[256];
    vkp_registry_stats stats;
    /* Of the loop's timer, guarded too; timer and place belong to its thread. */
    bool upkeep_queued;
    bool upkeep_attached;
    bool loop_gone;
    uint64_t next_check_ns;
    vkp_i_task upkeep_task;
    vkp_timer upkeep_timer;
    vkp_i_attached upkeep_place;
};

static vkp_i_name vkp_i_socket_name(const vkp_socket *sock)
{
    vkp_i_name name;
    name.text = sock->path;
    name.len = sock->node.key.len;
    name.abstract = (sock->flags & VKP_I_SOCKET_ABSTRACT) != 0;
    return name;
}

typedef struct vkp_i_lock_name {
    char path[VKP_I_PATH_BYTES + 8];
} vkp_i_lock_name;

static vkp_i_lock_name vkp_i_socket_lock_name(const vkp_socket *sock)
{
    static const char suffix[] = ".lock";
    vkp_i_lock_name name;
    size_t len = strlen(sock->path);
    memcpy(name.path, sock->path, len); /* no snprintf: a signal handler comes here, too */
    memcpy(name.path + len, suffix, sizeof suffix);
    return name;
}

/* ---- the registry's lock, and what follows when it is off ---- */

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

static void vkp_i_registry_drop(vkp_registry *registry, size_t count)
{
    if (count > 0 && VKP_I_SUB_ACQ_REL(&registry->refs, count) == count) {
        vkp_i_registry_free(registry);
    }
}

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

static void vkp_i_registry_enter(vkp_registry *registry)
{
    VKP_I_LOCK(&registry->mutex);
    vkp_i_latch_lock(&registry->held, registry->sys);
    vkp_i_registry_dispose_all(registry);
}

static bool vkp_i_registry_try_enter(vkp_registry *registry)
{
    return VKP_I_XCHG(&registry->held, 1u) == 0;
}

/* The caller has a reference of the registry. `in_line`: came through vkp_i_registry_enter.
   Keeps errno.                                                                                */
static void vkp_i_registry_leave(vkp_registry *registry, bool in_line)
{
    int error = errno;
    size_t released = 0;
    vkp_i_endpoint *to_close = NULL;
    vkp_log_level level = VKP_LOG_DEFAULT;
    char note[sizeof registry->note];
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
    } while (VKP_I_LOAD_ACQ(&registry->corpses) != NULL && vkp_i_registry_try_enter(registry));
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

/* One more of this life of the slot. `locked` callers bring back those that linger.
   NOT_FOUND: it ended; LIMIT.                                                                 */
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

/* It was not there at once: does it linger? By itself, so that who finds it at once saves no
   registers for this.                                                                         */
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

/* The same for those who hold no lock. */
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
        return; /* others refer to it, or its burial is under way, which will see this */
    }
    registry = sock->registry;
    sock->ended_ns = registry->sys->clock_ns();
    (void)VKP_I_ADD(&registry->refs, 1); /* whoever buries a corpse drops the socket's own */
    if (vkp_i_registry_try_enter(registry)) {
        vkp_i_socket_dispose(registry, sock);
        vkp_i_registry_leave(registry, false);
    } else {
        sock->link = VKP_I_LOAD(&registry->corpses);
        while (!VKP_I_CAS(&registry->corpses, &sock->link, sock)) {
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

/* ---- the end of a socket; all of it under the lock ---- */

static bool vkp_i_same_file(const vkp_file_id *a, const vkp_file_id *b)
{
    return a->device == b->device && a->inode == b->inode;
}

/* Remove the file while it is the one recorded: 0, or a negated errno. */
static int vkp_i_unlink_same(const vkp_sys *sys, const char *path, const vkp_file_id *id)
{
    vkp_file_id found;
    int result = sys->identify(path, &found);
    if (result == 0 && vkp_i_same_file(&found, id)) {
        result = sys->unlink(path);
    }
    return result == -ENOENT ? 0 : result; /* gone, or not ours */
}

static void vkp_i_registry_remove(vkp_registry *registry, const char *path, const vkp_file_id *id)
{
    int result = vkp_i_unlink_same(registry->sys, path, id);
    if (result < 0) {
        registry->stats.unlink_failures++;
        registry->stats.unlink_errno = -result;
        vkp_i_registry_note(registry, VKP_LOG_WARN, "%s: not removed: %s", path, strerror(-result));
    }
}

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
        memset(&sock->lock_id, 0, sizeof sock->lock_id); /* its inode may be another file's next */
    }
}

/* An abstract name is free when its descriptor is closed, so that must not wait. */
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

static void vkp_i_follower_notify(vkp_i_follower *follower)
{
    if (!follower->queued) {
        follower->queued = vkp_i_loop_queue(follower->loop, &follower->task);
    }
}

/* Make it inactive, take it off the map, remove the file if it is still ours, then the lock file.
   `since`: when that was called for. False: it was done before.                               */
static bool vkp_i_socket_retire(vkp_socket *sock, uint64_t since_ns)
{
    vkp_registry *registry = sock->registry;
    const vkp_sys *sys = registry->sys;
    bool ours = sys->process_id() == sock->opener_pid; /* else forked: the files are the parent's */
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

/* Nobody refers to it: the slot's next life may begin. A slot whose generations are used up has
   none: old weak handles would take it for theirs.                                            */
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

static void vkp_i_socket_end(vkp_registry *registry, vkp_socket *sock, uint64_t since_ns)
{
    (void)vkp_i_socket_retire(sock, since_ns);
    vkp_i_socket_recycle(registry, sock);
}

/* Have it look soon. False: there is no loop any more. */
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

/* With the first socket, and again if there was no memory for the timer then. */
static void vkp_i_registry_ensure_checks(vkp_registry *registry)
{
    if (registry->config.check_ms > 0 && !registry->upkeep_attached) {
        (void)vkp_i_registry_request_upkeep(registry);
    }
}

/* The duty is the caller's. */
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

static void vkp_i_registry_dispose_all(vkp_registry *registry)
{
    vkp_socket *corpse = NULL;
    if (VKP_I_LOAD_ACQ(&registry->corpses) != NULL) {
        corpse = VKP_I_XCHG(&registry->corpses, (vkp_socket *)NULL);
    }
    while (corpse != NULL) {
        vkp_socket *next = corpse->link;
        uint64_t ended = registry->stats.ended;
        vkp_i_socket_dispose(registry, corpse);
        registry->stats.handed_over += registry->stats.ended - ended; /* it may linger instead */
        corpse = next;
    }
}

/* ---- the beginning of a socket; all of it under the lock ---- */

/* Whether somebody answers at the path: 1 yes, 0 no, or a negated errno. */
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

/* PATH.lock is ours: make way for a bind, or say what stands there. */
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

/* Give the file its mode, then listen: the order that lets nobody in before. */
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

/* Bind, and listen: another endpoint in place of the one there was. */
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

/* Get PATH.lock. */
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

/* Take over what the caller bound. */
static vkp_status vkp_i_socket_adopt(vkp_socket *sock, int fd)
{
    vkp_registry *registry = sock->registry;
    int result = registry->sys->identify(sock->path, &sock->id);
    VKP_I_REQUIRE(result == 0 && sock->id.is_socket);
    result = registry->sys->prepare(fd); /* a blocking one would stop a listener's loop in accept */
    if (result < 0) {
        return vkp_i_sys_failure(result);
    }
    sock->endpoint = vkp_i_endpoint_open(registry->env, fd);
    return sock->endpoint != NULL ? VKP_OK : VKP_ERR_NOMEM;
}

/* A slot for the name, with a count of 0. */
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

/* Make the socket of a name that has none; fd: one that the caller bound, or -1. */
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

static vkp_socket *vkp_i_registry_find(vkp_registry *registry, vkp_i_name name)
{
    vkp_str key = vkp_i_str(name.text, name.len);
    vkp_i_map_node *node =
        vkp_i_map_find(&registry->sockets, vkp_i_map_hash(&registry->sockets, key), key);
    return node != NULL ? VKP_CONTAINER(node, vkp_socket, node) : NULL;
}

/* The live socket of the name; one that has just died is buried. */
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

/* A walk without the lock that takes before it trusts: NULL says nothing. */
#define VKP_I_PEEK_STEPS 32
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
   ====================================================================================== */

/* ---- the keeper: what happens with time, on the loop ---- */

static void vkp_i_socket_note_event(vkp_socket *sock, vkp_socket_event event)
{
    if (sock->registry->config.on_event != NULL) {
        sock->flags |= VKP_I_SOCKET_EVENT(event);
    }
}

/* The lock file may be gone as well, and somebody else may hold the new one. */
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

static void vkp_i_socket_check(vkp_socket *sock)
{
    vkp_registry *registry = sock->registry;
    vkp_file_id found;
    vkp_status status;
    int result = registry->sys->identify(sock->path, &found);
    if (result == 0 && vkp_i_same_file(&found, &sock->id)) {
        sock->flags &= ~VKP_I_SOCKET_LOST; /* it may have come back */
        sock->blocked = VKP_OK;
        return;
    }
    if (result < 0 && result != -ENOENT && result != -ENOTDIR) {
        return; /* who cannot look knows nothing */
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

/* Tell what was noted, one at a time: the program may do anything in between. */
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
                    event = 0; /* it is about to end */
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

/* End those that lingered long enough, look at the files: when is there more to do? */
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

/* Loop's thread, with a reference. A placed keeper has one of its own. */
static void vkp_i_registry_run_upkeep(vkp_registry *registry)
{
    vkp_loop *loop = registry->config.loop;
    uint64_t next_ns;
    vkp_i_registry_enter(registry);
    registry->loop_gone = registry->loop_gone || loop->closed;
    next_ns = vkp_i_registry_do_upkeep(registry, loop->now_ns, registry->loop_gone);
    if (next_ns != VKP_FOREVER && vkp_timer_start(&registry->upkeep_timer, loop,
                                                  vkp_i_registry_on_timer, 0, next_ns) != VKP_OK) {
        next_ns =
            vkp_i_registry_do_upkeep(registry, loop->now_ns, true); /* nothing lingers without */
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

static void vkp_i_registry_on_call(vkp_i_task *task)
{
    vkp_registry *registry = VKP_CONTAINER(task, vkp_registry, upkeep_task);
    vkp_i_registry_enter(registry);
    registry->upkeep_queued = false;
    vkp_i_registry_leave(registry, true);
    vkp_i_registry_run_upkeep(registry);
    vkp_i_registry_drop(registry, 1); /* the call's */
}

static void vkp_i_registry_on_loop_close(vkp_i_attached *place)
{
    vkp_registry *registry = VKP_CONTAINER(place, vkp_registry, upkeep_place);
    (void)VKP_I_ADD(&registry->refs, 1);
    vkp_i_registry_run_upkeep(registry); /* finds the loop closed */
    vkp_i_registry_drop(registry, 1);
}

/* ---- the registry's calls ---- */

/* Where unique names go: the user's own folder if there is one. */
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
        registry->config.backlog = 4096;
    }
    if (registry->config.mode == 0) {
        registry->config.mode = 0600;
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
    name.abstract = false; /* no matter here */
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

static vkp_status vkp_i_registry_get(vkp_registry *registry, vkp_str text, bool create,
                                     vkp_socket **out)
{
    vkp_i_name name;
    vkp_socket *sock = NULL;
    vkp_status status = VKP_OK;
    if (text.len > 0) {
        sock = vkp_i_registry_peek(registry, text); /* what is there has a name that can be */
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

/* A name that nobody has, in the registry's folder. */
#define VKP_I_UNIQUE_TRIES 8
static vkp_status vkp_i_registry_get_unique(vkp_registry *registry, vkp_socket **out)
{
    vkp_status status = VKP_ERR_IN_USE;
    int i;
    for (i = 0; i < VKP_I_UNIQUE_TRIES && (status == VKP_ERR_IN_USE || status == VKP_ERR_EXISTS);
         i++) {
        char text[512];
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
    size_t refs; /* atomic */
    size_t turn; /* atomic */
    vkp_balance balance;
    size_t capacity;
    size_t count;
    vkp_socket **sockets; /* behind this struct */
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
   ====================================================================================== */

/* All clients of one uid that came through one listener. */
struct vkp_seat {
    vkp_seat *prev;
    vkp_seat *next;
    vkp_gate *gate;       /* shared */
    vkp_socket *sock;     /* NULL, or each client has a reference of it */
    uint64_t listener_id; /* the listener's number */
    uint32_t uid;
    bool has_uid;
    size_t clients;
};

struct vkp_gate {
    const vkp_env *env;
    const vkp_sys *sys;
    size_t refs; /* atomic */
    vkp_gate_config config;
    uint32_t *allow_uids;
    uint64_t listener_ids; /* atomic: numbers given */
    VKP_I_MUTEX mutex;
    vkp_seat *seats; /* guarded, as all that follows */
    vkp_gate_stats stats;
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

/* What came to a door: `seat` as it would be, `most` clients of the listener at once. OK with a
   seat, or LIMIT or NOMEM with the refusal.                                                   */
static vkp_status vkp_i_gate_seat(vkp_gate *gate, const vkp_seat *wanted, size_t most,
                                  vkp_seat **out, vkp_refusal *why)
{
    vkp_seat *found = NULL;
    vkp_seat *each;
    size_t of_door = 0;
    size_t of_uid = 0;
    for (each = gate->seats; each != NULL; each = each->next) {
        bool same_uid = each->has_uid == wanted->has_uid && each->uid == wanted->uid;
        of_door += each->listener_id == wanted->listener_id ? each->clients : 0;
        of_uid += same_uid ? each->clients : 0;
        if (same_uid && each->listener_id == wanted->listener_id) {
            found = each;
        }
    }
    *why = VKP_REFUSAL_FULL;
    if (gate->stats.clients >= gate->config.max_clients || of_door >= most) {
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
   Everything of a connection belongs to its loop's thread, but for its count, `state` and the
   inbox. The outbox is a queue of spans: neighbouring frames of one block are ONE span, which
   holds one reference and is written as one range; frame_len finds the frames again when the
   policy must drop some. Nothing is written inside a push: the connection defers its task, and
   the round ends with one gathered write per connection.
   Closing from inside a push would pull the ground from under whoever pushes to many, so a push
   only marks (`doomed`); the deferred task closes.
   Idle, a connection has no buffers: input goes to the loop's block, and what is left of a frame
   is kept in a block of its own size.                                                         */

#define VKP_I_CONN_OPEN 0u
#define VKP_I_CONN_CLOSED 1u

#define VKP_I_CONN_CONNECTING 1u /* flags */
#define VKP_I_CONN_PAUSED 2u
#define VKP_I_CONN_ENDED 4u /* the peer sends no more */
#define VKP_I_CONN_DRAINING 8u
#define VKP_I_CONN_BLOCKED 16u /* the kernel's buffer is full: waits for VKP_IO_WRITE */
#define VKP_I_CONN_QUEUED 32u  /* its task is deferred */
#define VKP_I_CONN_CLOSES 64u
#define VKP_I_CONN_REREAD 128u     /* resumed: look at what was kept */
#define VKP_I_CONN_INBOX_HELD 256u /* no room for the inbox: no handler until there is */

/* Shared by all connections of a listener. */
typedef struct vkp_i_profile {
    const vkp_env *env;
    size_t refs;      /* atomic */
    uint64_t dropped; /* atomic: pushes, by the policy, over all connections */
    size_t live;      /* accepted connections that are open; loop's thread, as when_empty */
    vkp_i_task *when_empty;
    vkp_conn_config config;
} vkp_i_profile;

typedef struct vkp_i_span {
    const uint8_t *data;
    vkp_block *block; /* one reference, or NULL: static bytes */
    uint32_t len;
    uint32_t frames; /* 0: of the response stream, never dropped; else how many */
} vkp_i_span;

typedef struct vkp_i_inbox {
    vkp_mpsc_tx *tx; /* of vkp_bytes */
    vkp_mpsc_rx *rx;
    vkp_handler *handler; /* pulls; NULL while the inbox is held */
} vkp_i_inbox;

/* Nothing is pulled until a handler is opened again. Loop's thread. */
static void vkp_i_inbox_hold(vkp_i_inbox *inbox)
{
    vkp_handler_unref(inbox->handler);
    inbox->handler = NULL;
}

#define VKP_I_CONNECT_TRIES 8
typedef struct vkp_i_connecting {
    vkp_address addresses[VKP_I_CONNECT_TRIES];
    size_t count;
    size_t next;
} vkp_i_connecting;

/* What a push to many touches comes first, together: two lines of the cache, not five. */
struct vkp_conn {
    vkp_i_profile *profile;
    uint32_t state; /* atomic */
    uint32_t flags;
    vkp_i_span first; /* the queue's head; the others follow in a ring */
    uint32_t spans;
    uint32_t head_sent;   /* bytes written of `first`, whose data was moved on by as many */
    size_t queued_frames; /* pushes; those of a span partly written count until looked at */
    size_t queued_bytes;  /* of everything */
    size_t pushed_bytes;  /* of pushes */
    vkp_i_task task;      /* deferred */
    vkp_loop *loop;
    size_t refs; /* atomic; the loop holds one until the close, each queued task one */
    vkp_i_span *more;
    uint32_t more_capacity;
    uint32_t more_head;
    void *user;
    vkp_io io;
    vkp_i_task remote;      /* queued by other threads */
    uint32_t remote_queued; /* atomic */
    int fd;
    int closes_error;
    vkp_close_reason closes_reason;
    vkp_block *input; /* what on_data left; its bytes from input_begin */
    size_t input_begin;
    uint64_t dropped; /* atomic */
    vkp_i_inbox *inbox;
    vkp_i_connecting *connecting;
    vkp_seat *seat; /* given back at the close */
};

VKP_API const char *vkp_close_reason_str(vkp_close_reason reason)
{
    static const char *const texts[] = {"closed here",   "closed by the peer", "system error",
                                        "peer too slow", "loop closed",        "out of memory"};
    return (size_t)reason < sizeof texts / sizeof texts[0] ? texts[reason] : "unknown reason";
}

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
            profile->config.queue_frames = 65536;
        }
        if (profile->config.queue_bytes == 0) {
            profile->config.queue_bytes = (size_t)8 << 20;
        }
        if (profile->config.input_bytes == 0) {
            profile->config.input_bytes = (size_t)512 << 20;
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

static bool vkp_i_spans_reserve(vkp_conn *conn)
{
    uint32_t capacity = conn->more_capacity == 0 ? 4 : conn->more_capacity * 2;
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

/* Add after reserve. */
static void vkp_i_spans_append(vkp_conn *conn, vkp_i_span span)
{
    conn->spans++;
    *vkp_i_span_at(conn, conn->spans - 1) = span;
}

static void vkp_i_spans_remove(vkp_conn *conn, uint32_t index)
{
    vkp_i_block_unref(vkp_i_span_at(conn, index)->block);
    for (; index > 0; index--) { /* few stand before a frame that may be dropped */
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

static size_t vkp_i_span_frame(const vkp_conn *conn, const uint8_t *data, size_t len,
                               uint32_t frames)
{
    size_t frame = len;
    if (frames > 1) {
        frame = conn->profile->config.ops->frame_len(data, len);
    }
    return frame == 0 || frame > len ? len : frame;
}

/* Look which frames of a partly written head are gone, and set the one that is torn apart from
   the rest: it must be finished. False: no memory, nothing changed.                           */
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
        head->frames = 0; /* begun: belongs to the stream now */
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

static void vkp_i_conn_count_drop(vkp_conn *conn)
{
    (void)VKP_I_ADD(&conn->dropped, (uint64_t)1);
    (void)VKP_I_ADD(&conn->profile->dropped, (uint64_t)1);
}

/* Drop the oldest push that was not begun. False: there is none. */
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

static bool vkp_i_span_adjoins(const vkp_conn *conn, const vkp_i_span *tail, const vkp_bytes *frame,
                               bool push)
{
    return tail->block != NULL && tail->block == frame->block &&
           tail->data + tail->len == frame->data && (tail->frames > 0) == push &&
           (!push || conn->profile->config.ops->frame_len != NULL) &&
           frame->len < 0x7fffffffu - tail->len;
}

#define VKP_I_COMPACT_BYTES 4096u

/* A slow client must not pin whole blocks for a frame each: when its queue's last span is a small
   part of its block and did not grow, copy it behind its neighbour in a private block.        */
static void vkp_i_spans_compact_tail(vkp_conn *conn)
{
    vkp_i_span *tail;
    vkp_i_span *before;
    vkp_block *block;
    bool joins; /* others may follow in the same block */
    if (conn->spans < 2) {
        return; /* the head may be partly written */
    }
    tail = vkp_i_span_at(conn, conn->spans - 1);
    if (tail->block == NULL ? tail->len >= VKP_I_COMPACT_BYTES / 4
                            : tail->len >= tail->block->capacity / 4 ||
                                  tail->block->capacity <= VKP_I_COMPACT_BYTES) {
        return; /* static bytes pin nothing, but a span each is long to search for a push to drop */
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
        return; /* pinned a while longer */
    }
    memcpy(vkp_i_block_data(block), tail->data, tail->len);
    block->len = tail->len;
    vkp_i_block_unref(tail->block);
    tail->block = block;
    tail->data = vkp_i_block_data(block);
}

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
        if (frame->len > 0x7fffffffu || !vkp_i_spans_reserve(conn)) {
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
   ====================================================================================== */

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
        vkp_i_inbox_hold(conn->inbox); /* of an open that failed: else the close did that */
        vkp_mpsc_tx_unref(conn->inbox->tx);
        vkp_mpsc_rx_unref(conn->inbox->rx);
        vkp_i_free(loop->env, conn->inbox, sizeof *conn->inbox);
    }
    vkp_i_profile_unref(conn->profile);
    vkp_i_free(loop->env, conn, sizeof *conn);
    vkp_loop_unref(loop);
}

static void vkp_i_conn_defer(vkp_conn *conn)
{
    if ((conn->flags & VKP_I_CONN_QUEUED) == 0) {
        conn->flags |= VKP_I_CONN_QUEUED;
        (void)vkp_conn_ref(conn);
        vkp_i_loop_defer(conn->loop, &conn->task);
    }
}

static bool vkp_i_conn_closed(const vkp_conn *conn)
{
    return VKP_I_LOAD_ACQ(&conn->state) == VKP_I_CONN_CLOSED;
}

/* The one way a connection ends. Loop's thread. */
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
    vkp_i_free(conn->loop->env, conn->connecting, sizeof *conn->connecting);
    conn->connecting = NULL;
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
    vkp_conn_unref(conn); /* the loop's */
}

static void vkp_i_conn_close_later(vkp_conn *conn, vkp_close_reason reason, int error)
{
    if ((conn->flags & VKP_I_CONN_CLOSES) == 0) {
        conn->flags |= VKP_I_CONN_CLOSES;
        conn->closes_reason = reason;
        conn->closes_error = error;
        vkp_i_conn_defer(conn);
    }
}

/* Make the watch match the flags. */
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

/* `put` bytes went out: take them off the queue's head. */
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

#define VKP_I_RANGES 64

/* Write until the queue is empty or the kernel's buffer is full. Does not close. */
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

/* Draining, and all is written: a draining connection holds its inbox until that is empty. */
static bool vkp_i_conn_is_drained(const vkp_conn *conn)
{
    return conn->spans == 0 &&
           (conn->flags & (VKP_I_CONN_DRAINING | VKP_I_CONN_INBOX_HELD)) == VKP_I_CONN_DRAINING;
}

/* The kernel takes bytes again. */
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

static bool vkp_i_conn_has_room(const vkp_conn *conn, size_t len)
{
    const vkp_conn_config *config = &conn->profile->config;
    return conn->queued_frames < config->queue_frames &&
           (conn->queued_frames == 0 || (conn->pushed_bytes <= config->queue_bytes &&
                                         len <= config->queue_bytes - conn->pushed_bytes));
}

/* Room for one more push: looked for where it is cheap first. */
static bool vkp_i_conn_find_room(vkp_conn *conn, size_t len)
{
    if (vkp_i_conn_has_room(conn, len)) {
        return true;
    }
    vkp_i_conn_flush(conn);
    return vkp_i_conn_has_room(conn, len) ||
           (vkp_i_spans_normalize(conn) && vkp_i_conn_has_room(conn, len));
}

/* On the loop's thread: into the outbox, by the policy. */
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
                return VKP_ERR_NOMEM; /* where the torn frame ends is not known */
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

static void vkp_i_conn_inbox_ready(void *user)
{
    vkp_i_conn_pull_inbox((vkp_conn *)user);
}

static vkp_status vkp_i_conn_handle_inbox(vkp_conn *conn)
{
    vkp_case receive = vkp_case_mpsc_recv(conn->inbox->rx, NULL);
    return vkp_handler_open(conn->loop, &receive, vkp_i_conn_inbox_ready, conn,
                            &conn->inbox->handler);
}

/* A push that its thread was told is queued cannot be: count it where drops are counted. */
static void vkp_i_conn_count_lost(vkp_conn *conn)
{
    vkp_on_full policy = conn->profile->config.on_full;
    if (policy == VKP_ON_FULL_DROP_NEWEST || policy == VKP_ON_FULL_DROP_OLDEST) {
        vkp_i_conn_count_drop(conn);
    } else {
        vkp_i_conn_close_later(conn, VKP_CLOSE_NOMEM, 0);
    }
}

#define VKP_I_INBOX_BATCH 1024

/* Move what other threads pushed to the outbox. A policy that waits leaves it in the inbox, out of
   the loop's sight, until the outbox has room again. Threads that push as fast as the peer reads
   must not keep the round from ending: the handler calls again for what a batch leaves.       */
static void vkp_i_conn_pull_inbox(vkp_conn *conn)
{
    vkp_mpsc_rx *rx = conn->inbox->rx;
    bool waits = conn->profile->config.on_full == VKP_ON_FULL_WAIT ||
                 conn->profile->config.on_full == VKP_ON_FULL_ERROR;
    bool draining = (conn->flags & VKP_I_CONN_DRAINING) != 0; /* bounded: nobody pushes any more */
    vkp_bytes frame;
    size_t next = 0;
    int i;
    for (i = 0; i < VKP_I_INBOX_BATCH || draining; i++) {
        if (waits && !vkp_i_mpsc_next_cost(rx, &next)) {
            break; /* a value that comes now was not measured */
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

static void vkp_i_conn_remote(vkp_i_task *task)
{
    vkp_conn *conn = VKP_CONTAINER(task, vkp_conn, remote);
    vkp_i_conn_finish(conn, VKP_CLOSE_LOCAL, 0);
    vkp_conn_unref(conn);
}

static void vkp_i_conn_remote_slow(vkp_i_task *task)
{
    vkp_conn *conn = VKP_CONTAINER(task, vkp_conn, remote);
    vkp_i_conn_finish(conn, VKP_CLOSE_SLOW, 0);
    vkp_conn_unref(conn);
}

/* From another thread: have the loop close it. The first request's reason stands. */
static void vkp_i_conn_close_remotely(vkp_conn *conn, void (*fn)(vkp_i_task *task))
{
    if (VKP_I_XCHG(&conn->remote_queued, 1u) != 0) {
        return;
    }
    (void)vkp_conn_ref(conn);
    conn->remote.fn = fn;
    if (!vkp_i_loop_queue(conn->loop, &conn->remote)) {
        vkp_conn_unref(conn); /* the loop is closed, and the connection with it */
    }
}

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

/* The wait for room ends with the token too (may be NULL). */
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

/* A block with room to read into, behind a copy of what was kept; a large rest grows in place. */
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

/* Keep bytes [begin, len) of the block for the next time. */
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
        /* A large rest will grow: leave room at once. */
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

/* Show [begin, len) of the block to on_data and keep what it leaves. */
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

/* Resumed: show what was kept, without waiting for more. */
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
        block->len = begin; /* the copy of the rest is not needed */
    }
    if (got == 0) {
        vkp_i_conn_end(conn);
    } else if (got < 0 && got != -EAGAIN && got != -EWOULDBLOCK && got != -EINTR) {
        vkp_i_conn_finish(conn, got == -ECONNRESET ? VKP_CLOSE_PEER : VKP_CLOSE_ERROR, (int)-got);
    }
}

/* ---- connecting ---- */

static void vkp_i_conn_event(vkp_io *io, uint32_t ready);

/* Begin with the next address. VKP_OK: an event will tell. */
static vkp_status vkp_i_conn_try_next(vkp_conn *conn)
{
    const vkp_sys *sys = conn->loop->sys;
    int result = -ECONNREFUSED;
    while (conn->connecting->next < conn->connecting->count) {
        const vkp_address *address = &conn->connecting->addresses[conn->connecting->next++];
        result = sys->socket(address->family, SOCK_STREAM);
        if (result < 0) {
            continue;
        }
        conn->fd = result;
        if (address->family != AF_UNIX) {
            (void)sys->set_nodelay(conn->fd);
        }
        result = sys->connect(conn->fd, address->storage.bytes, address->bytes);
        if (result == 0 || result == -EINPROGRESS || result == -EINTR) {
            vkp_status status =
                vkp_io_start(&conn->io, conn->loop, conn->fd, VKP_IO_WRITE, vkp_i_conn_event);
            if (status == VKP_OK) {
                return VKP_OK;
            }
            result = status == VKP_ERR_NOMEM ? -ENOMEM : -errno;
        }
        (void)sys->close(conn->fd);
        conn->fd = -1;
    }
    return vkp_i_sys_failure(result);
}

static void vkp_i_conn_connected(vkp_conn *conn)
{
    int error = -conn->loop->sys->socket_error(conn->fd);
    const vkp_conn_ops *ops = conn->profile->config.ops;
    if (error != 0) {
        vkp_io_stop(&conn->io);
        (void)conn->loop->sys->close(conn->fd);
        conn->fd = -1;
        if (vkp_i_conn_try_next(conn) != VKP_OK) {
            vkp_i_conn_finish(conn, VKP_CLOSE_ERROR, conn->connecting->count > 1 ? errno : error);
        }
        return;
    }
    vkp_i_free(conn->loop->env, conn->connecting, sizeof *conn->connecting);
    conn->connecting = NULL;
    conn->flags &= ~VKP_I_CONN_CONNECTING;
    vkp_i_conn_update_interest(conn);
    if (ops->on_open != NULL) {
        ops->on_open(conn, conn->user);
    }
    if (!vkp_i_conn_closed(conn)) {
        vkp_i_conn_defer(conn); /* what was pushed meanwhile */
    }
}

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
            /* nothing more */
        } else if ((conn->flags & (VKP_I_CONN_ENDED | VKP_I_CONN_DRAINING)) != 0) {
            if (hung_up) {
                vkp_i_conn_finish(conn, VKP_CLOSE_PEER, 0);
            }
        } else if ((conn->flags & VKP_I_CONN_PAUSED) == 0 &&
                   ((ready & VKP_IO_READ) != 0 || hung_up)) {
            vkp_i_conn_reread(conn); /* first: the end may be next */
            if (!vkp_i_conn_closed(conn) &&
                (conn->flags & (VKP_I_CONN_PAUSED | VKP_I_CONN_DRAINING | VKP_I_CONN_REREAD)) ==
                    0) {
                vkp_i_conn_readable(conn);
            }
        }
    }
    vkp_conn_unref(conn);
}

/* Before a close of ours: a kernel that finds input unread resets a TCP connection, and the peer
   loses the last words. What is there is dropped, within reason.                              */
static void vkp_i_conn_discard_input(vkp_conn *conn)
{
    char bin[4096];
    int i;
    for (i = 0; i < 16 && conn->loop->sys->read(conn->fd, bin, sizeof bin) > 0; i++) {
    }
}

/* The end of a round: what was kept for a resumed reader, then one write, then the closing. */
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

/* A connection without a descriptor: one reference, the caller's. Shares the profile. */
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

/* Serve an fd with a shared profile. `prepared`: accepted by us. on_open is the caller's. */
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

VKP_API vkp_status vkp_conn_connect(vkp_loop *loop, vkp_str address, const vkp_conn_config *config,
                                    vkp_conn **out)
{
    vkp_i_profile *profile;
    vkp_conn *conn = NULL;
    vkp_status status;
    VKP_I_REQUIRE(loop != NULL && address.ptr != NULL && config != NULL && config->ops != NULL);
    VKP_I_REQUIRE(out != NULL && vkp_i_on_loop(loop));
    if (loop->closed) {
        return VKP_ERR_CLOSED;
    }
    profile = vkp_i_profile_open(loop->env, config);
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
    status = conn->connecting == NULL
                 ? VKP_ERR_NOMEM
                 : vkp_i_parse_address(loop->env, address, conn->connecting->addresses,
                                       VKP_I_CONNECT_TRIES, &conn->connecting->count);
    if (status == VKP_OK) {
        status = vkp_i_conn_try_next(conn);
    }
    if (status != VKP_OK) {
        int error = errno;
        vkp_i_free(loop->env, conn->connecting, sizeof *conn->connecting);
        conn->connecting = NULL;
        vkp_conn_unref(conn);
        errno = error;
        return status;
    }
    *out = vkp_conn_ref(conn);
    return VKP_OK;
}

/* ---- the rest of the handle ---- */

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
    if (conn->inbox != NULL) { /* what it holds is queued too */
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
   What listener, hub and relay use besides the calls of the header: vkp_i_profile_open, _ref and
   _unref, the profile's dropped, live and when_empty; vkp_i_conn_adopt, vkp_i_conn_admit,
   vkp_i_conn_push, vkp_i_conn_flush, vkp_i_conn_finish, vkp_i_conn_close_later; and these.     */

/* No more input is wanted: the connection ends when what is queued is written. */
static bool vkp_i_conn_is_draining(const vkp_conn *conn)
{
    return (conn->flags & VKP_I_CONN_DRAINING) != 0;
}

/* Whether commands of the peer are still served. */
static bool vkp_i_conn_is_serving(const vkp_conn *conn)
{
    return (conn->flags & (VKP_I_CONN_DRAINING | VKP_I_CONN_CLOSES)) == 0;
}

/* Bytes of pushes and of the response stream that the kernel has not taken. */
static size_t vkp_i_conn_get_queued_bytes(const vkp_conn *conn)
{
    return conn->queued_bytes;
}

/* The next connection of that profile from the loop's slot *index on, or NULL. */
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
   ====================================================================================== */

#define VKP_I_LISTENER_CLOSED 1u       /* flags */
#define VKP_I_LISTENER_LOOPS 2u        /* the loop's: goes when it is closed */
#define VKP_I_LISTENER_CLOSED_FIRST 4u /* closed while its follower's task was queued */
#define VKP_I_LISTENER_DRAINS 8u

/* References, all of the loop's thread: the owner's, and one each of the accepting under way, of a
   queued task of the follower, of a drain under way, of the loop's own release.               */
struct vkp_listener {
    vkp_loop *loop;
    size_t refs;
    uint32_t flags;
    vkp_i_profile *profile;
    vkp_listener_config config; /* its address is not ours */
    vkp_gate *gate;
    uint64_t listener_id;
    vkp_registry *registry; /* Unix; else NULL */
    vkp_socket *socket;     /* Unix: with a reference, unless it follows */
    uint32_t generation;    /* of the socket */
    vkp_i_follower follower;
    vkp_i_endpoint *endpoint; /* what it accepts from */
    vkp_io io;
    vkp_timer pause;      /* after EMFILE and its like */
    uint64_t pause_ns;    /* 0: the last accept was fine */
    uint64_t shortage_ns; /* since when descriptors are short; 0: they are not */
    int spare;            /* descriptor, to have one when there is none */
    vkp_i_task release_task;
    vkp_timer drain_timer;
    vkp_i_task drain_task;
    void (*on_drained)(void *user);
    void *drain_user;
    vkp_str address;          /* a copy */
    vkp_listener_stats stats; /* but for clients */
};

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

/* It ended by itself. */
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

static void vkp_i_listener_refuse(vkp_listener *listener, int fd, vkp_refusal why)
{
    listener->stats.refused[why]++;
    vkp_i_gate_count_refusal(listener->gate, why);
    if (listener->config.on_refuse != NULL) {
        listener->config.on_refuse(listener->config.conn.user, fd, why);
    }
    (void)listener->loop->sys->close(fd);
}

/* A seat for who came. NOT_FOUND: he left again; LIMIT, NOMEM: refused. */
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
    if ((listener->flags & VKP_I_LISTENER_CLOSED) != 0) { /* by the gate's callback */
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

#define VKP_I_ACCEPT_BATCH 64
#define VKP_I_PAUSE_LEAST_NS 10000000u
#define VKP_I_PAUSE_MOST_NS 1000000000u

static void vkp_i_listener_unpause(vkp_timer *timer)
{
    vkp_listener *listener = VKP_CONTAINER(timer, vkp_listener, pause);
    if (vkp_io_set(&listener->io, VKP_IO_READ) != VKP_OK) {
        /* There is room: its own entry just left. */
        (void)!vkp_timer_start(timer, listener->loop, vkp_i_listener_unpause, 0,
                               listener->loop->now_ns + VKP_I_PAUSE_MOST_NS);
    }
}

/* The connection waits in the backlog, and the loop does not spin. */
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
              listener->address.ptr, strerror(error), (unsigned)(listener->pause_ns / 1000000u));
}

/* Descriptors are short for long: those who wait shall know. */
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

/* After a failed accept: whether to try the next at once. */
static bool vkp_i_listener_failed(vkp_listener *listener, int error)
{
    if (error == EINTR) {
        return true;
    }
    if (error == EAGAIN || error == EWOULDBLOCK) {
        return false;
    }
    if (error == ECONNABORTED || error == EPROTO || error == ENETDOWN || error == EHOSTUNREACH ||
        error == ENETUNREACH) { /* of the connection that was at the head */
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
        if (i == 0 && listener->spare < 0) { /* there was none for it before */
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

/* The socket ended, or has another descriptor. */
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
        endpoint = before; /* to be given back */
        vkp_io_stop(&listener->io);
        vkp_timer_stop(&listener->pause);
        if (vkp_io_start(&listener->io, listener->loop, listener->endpoint->fd, VKP_IO_READ,
                         vkp_i_listener_event) != VKP_OK) {
            vkp_i_listener_end(listener);
        }
    }
    vkp_i_endpoint_unref(endpoint);
}

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

static vkp_status vkp_i_listen_tcp(vkp_listener *listener, const vkp_address *address, vkp_str text)
{
    const vkp_sys *sys = listener->loop->sys;
    char full[320];
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
        result = sys->listen(fd, listener->config.backlog > 0 ? listener->config.backlog : 4096);
    }
    if (result == 0) {
        result = sys->local_port(fd);
    }
    if (result < 0) {
        return result == -EADDRINUSE ? VKP_ERR_IN_USE : vkp_i_sys_failure(result);
    }
    while (text.ptr[--text.len] != ':') { /* the port that was asked for */
    }
    (void)snprintf(full, sizeof full, "%.*s:%d", VKP_FMT(text), result);
    listener->address = vkp_str_of(full);
    return vkp_i_copy_str(listener->loop->env, &listener->address) ? VKP_OK : VKP_ERR_NOMEM;
}

/* listener->socket is set, with a reference. */
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

/* The socket of "unix:PATH" or, for a unique path, "unix:". Opens a registry if there is none. */
static vkp_status vkp_i_make_socket(const vkp_env *env, int backlog, vkp_str address,
                                    vkp_registry **registry, vkp_socket **sock)
{
    vkp_str path = vkp_i_str(address.ptr + 5, address.len - 5);
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

/* On the loop's thread, with a config that was checked. */
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
    memset(&listener->config.address, 0, sizeof listener->config.address); /* the caller's */
    if (status != VKP_OK) {
        listener->config.follow = false; /* it has the reference of its opening still */
        vkp_listener_unref(listener);
        errno = error;
        return status;
    }
    listener->spare =
        loop->sys->socket(AF_UNIX, SOCK_STREAM); /* missing, it is made up for later */
    if (config->follow) {
        vkp_socket_unref(listener->socket); /* the caller has another */
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
        if (listener->profile->when_empty != NULL) { /* else its task is on its way */
            listener->profile->when_empty = NULL;
            vkp_i_listener_release(listener);
        }
    }
    vkp_i_listener_release(listener);
}

/* ---- draining ---- */

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

typedef struct vkp_i_start {
    vkp_i_task task;
    vkp_loop *loop;
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

static void vkp_i_start_run(vkp_i_task *task)
{
    vkp_i_start *start = VKP_CONTAINER(task, vkp_i_start, task);
    bool gives = start->config.follow && start->config.socket == NULL;
    vkp_listener *listener = NULL;
    vkp_listening result;
    memset(&result, 0, sizeof result);
    result.status = start->loop->closed ? VKP_ERR_CLOSED : VKP_OK;
    if (result.status == VKP_OK && gives) { /* the socket first, to have the reference */
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
        start->config.socket = NULL; /* given */
    }
    vkp_i_start_free(start);
}

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
   ====================================================================================== */

struct vkp_health_check {
    vkp_loop *loop;
    vkp_health_config config;
    char *texts; /* address, request and answer, of the copies that config has */
    size_t text_bytes;
    vkp_conn *conn;  /* of the check under way */
    vkp_timer timer; /* its deadline, or the next check */
    vkp_i_attached place;
    uint64_t began_ns;
    uint64_t failures;
    bool calling;
    bool closed;
    bool released; /* the handle was given back */
};

static void vkp_i_health_begin(vkp_timer *timer);

static void vkp_i_health_free(vkp_health_check *check)
{
    vkp_loop *loop = check->loop;
    vkp_i_free(loop->env, check->texts, check->text_bytes);
    vkp_i_free(loop->env, check, sizeof *check);
    vkp_loop_unref(loop);
}

/* Part with the connection first: its on_close must find no check under way. */
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
        /* There is room: its own entry just left. */
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
        return 0; /* the rest comes with this again */
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

static void vkp_i_health_on_loop_close(vkp_i_attached *place)
{
    vkp_health_check *check = VKP_CONTAINER(place, vkp_health_check, place);
    vkp_timer_stop(&check->timer);
    vkp_i_health_disconnect(check);
}

/* Copy a text behind the ones before. */
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
        check->config.timeout_ms = 1000;
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
   A topic is a name of one kind with its members, in no order; a subscription is a record that
   knows its place among the topic's members and among the member's subscriptions, so that both
   ends leave in constant time. Messages are encoded into append-only blocks, one per protocol:
   consecutive ones are neighbours, which connections write as one range.                      */

typedef struct vkp_i_topic {
    vkp_i_map_node node;
    vkp_hub_sub **subs;
    size_t count;
    size_t capacity;
    vkp_sub_kind kind;
} vkp_i_topic; /* its name is behind the struct */

struct vkp_hub_sub {
    vkp_i_topic *topic;
    vkp_hub_member *member;
    size_t index;      /* in the topic */
    vkp_hub_sub *prev; /* of the member */
    vkp_hub_sub *next;
};

struct vkp_hub {
    const vkp_env *env;
    vkp_hub_config config;
    vkp_i_map topics[VKP_SUB_KINDS]; /* by vkp_sub_kind */
    vkp_block *blocks[2];            /* where RESP2 and RESP3 are encoded */
};

/* One element of [set], at `at` behind the bracket or a former element; `at` moves on. */
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

/* Match one byte against the pattern's element at `at`; `at` moves behind it. */
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

/* Only the last star is ever gone back to: an earlier one that matched less can be no better. */
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

static vkp_hub_sub *vkp_i_member_find(const vkp_hub_member *member, const vkp_i_topic *topic)
{
    vkp_hub_sub *sub = member->i_subs[topic->kind];
    size_t i;
    /* Among the topic's members and among the member's topics in step: the shorter list decides. */
    for (i = 0; i < topic->count && sub != NULL && sub->topic != topic; i++) {
        if (topic->subs[i]->member == member) {
            return topic->subs[i];
        }
        sub = sub->next;
    }
    return i < topic->count ? sub : NULL;
}

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

/* A message and its encodings so far. */
typedef struct vkp_i_message {
    vkp_str parts[4]; /* kind, pattern (or nothing), channel, payload */
    bool has_pattern;
    vkp_bytes frames[2]; /* RESP2, RESP3; len 0: not encoded yet. No reference of their own. */
} vkp_i_message;

#define VKP_I_HUB_BLOCK 65536u

/* Room at the end of an encoding block. The hub's own reference keeps it while it is filled. */
static uint8_t *vkp_i_hub_reserve(vkp_hub *hub, int which, size_t bytes)
{
    vkp_block *block = hub->blocks[which];
    if (block != NULL && vkp_i_block_is_mine(block)) {
        block->len = 0; /* all was written: stay in the same cache lines */
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

static size_t vkp_i_encode_bulk(uint8_t *out, vkp_str text)
{
    char digits[24];
    size_t from = vkp_i_format_u64(digits, text.len);
    size_t at = 0;
    out[at++] = '$';
    memcpy(out + at, digits + from, 24 - from);
    at += 24 - from;
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

/* The message in one of the protocols; NULL: no memory. */
static const vkp_bytes *vkp_i_message_frame(vkp_hub *hub, vkp_i_message *message, int protocol)
{
    int which = protocol == 3 ? 1 : 0;
    vkp_bytes *frame = &message->frames[which];
    size_t most = 8;
    size_t at = 0;
    uint8_t *out;
    int i;
    if (frame->len > 0) {
        return frame;
    }
    for (i = 0; i < 4; i++) {
        most += message->parts[i].len + 28;
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
            (void)!vkp_i_conn_admit(member->conn, frame); /* the policy counts what it drops */
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
   ====================================================================================== */

VKP_API const char *vkp_push_kind_str(vkp_push_kind kind)
{
    static const char *const texts[] = {"message",      "pmessage",    "smessage", "subscribed",
                                        "unsubscribed", "invalidate",  "other",    "connected",
                                        "disconnected", "reconnected", "gap",      "lagged"};
    return (size_t)kind < sizeof texts / sizeof texts[0] ? texts[kind] : "unknown";
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

/* A message of a pub/sub channel, whichever way its subscriber asked for it. */
static bool vkp_i_push_kind_is_message(vkp_push_kind kind)
{
    return kind == VKP_PUSH_MESSAGE || kind == VKP_PUSH_PMESSAGE || kind == VKP_PUSH_SMESSAGE;
}

typedef struct vkp_i_push_form {
    const char *name;
    vkp_push_kind kind;
    vkp_sub_kind sub;
    uint8_t elements; /* with the kind; 0: any */
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

/* The parts of a push whose kind is known. A push of a known kind and another shape is OTHER. */
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

VKP_API vkp_status vkp_push_from_value(const vkp_value *value, vkp_push *push)
{
    size_t i;
    VKP_I_REQUIRE(value != NULL && push != NULL);
    if ((value->type != VKP_RESP_PUSH && value->type != VKP_RESP_ARRAY) || value->len == 0 ||
        value[1].type != VKP_RESP_STRING) {
        return VKP_ERR_INVALID;
    }
    memset(push, 0, sizeof *push);
    /* A plain message, without the walk: no attributes, no aggregates, kind MESSAGE is 0. */
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
   >>impl-client   A connection to a server, shared by many threads
   ======================================================================================
   Other threads append requests to `submitted` under the mutex and queue one task; the loop takes
   the list, writes each request's bytes and moves it to `flight`, the requests whose replies are
   still to come, in order. Each reply settles the oldest one. A SUBSCRIBE has no reply but one
   push, in its place among the replies: it settles the same way, by name.
   `submitted`, `queued_bytes`, `accepting`, the one-shots' links and `error` are guarded by the
   mutex; everything else is the loop's. Callbacks run without the lock, and any of them may
   close the client: whoever calls one looks at `closed` afterwards.                           */

typedef enum vkp_i_request_kind {
    VKP_I_REQUEST_COMMAND,
    VKP_I_REQUEST_HELLO,
    VKP_I_REQUEST_LOGIN, /* RESP2: AUTH */
    VKP_I_REQUEST_NAME,  /* RESP2: CLIENT SETNAME, whose answer does not matter */
    VKP_I_REQUEST_PING,
    VKP_I_REQUEST_SUBSCRIBE,
    VKP_I_REQUEST_UNSUBSCRIBE,
    VKP_I_REQUEST_WANT, /* submitted only: one interest more */
    VKP_I_REQUEST_LEAVE /* submitted only: one less */
} vkp_i_request_kind;

typedef struct vkp_i_request {
    struct vkp_i_request *next;
    vkp_client *client;
    vkp_i_request_kind kind;
    uint32_t replies; /* still to come */
    size_t cost;
    vkp_bytes bytes;   /* what to write; of WANT and LEAVE the name */
    vkp_oneshot *slot; /* guarded by the mutex */
    vkp_reply_fn on_reply;
    void (*done)(void *user, vkp_status status);
    void *user;
    vkp_sub_kind sub;
    struct vkp_i_interest *interest; /* of SUBSCRIBE and UNSUBSCRIBE */
} vkp_i_request;

typedef struct vkp_i_requests {
    vkp_i_request *first;
    vkp_i_request **end;
} vkp_i_requests;

/* A name that somebody wants, or that is still on its way out. */
typedef struct vkp_i_interest {
    vkp_i_map_node node;
    vkp_sub_kind kind;
    size_t wanted;          /* calls of subscribe not taken back */
    size_t in_flight;       /* SUBSCRIBE and UNSUBSCRIBE not settled */
    bool subscribed;        /* what the last command sent asks for */
    bool confirmed;         /* the server said so */
    bool resuming;          /* after an outage: GAP waits for it */
    vkp_i_requests waiters; /* WANTs to be told */
} vkp_i_interest;           /* its name is behind the struct */

struct vkp_reply {
    const vkp_env *env;
    size_t refs;  /* atomic */
    size_t bytes; /* of this allocation */
    vkp_bytes frame;
    vkp_value *values;
};

struct vkp_client {
    const vkp_env *env;
    vkp_loop *loop;
    vkp_client_config config; /* texts are copies */
    size_t refs;              /* atomic: users, the loop while open, the queued task */
    size_t users;             /* atomic: the last one closes */
    uint32_t state;           /* atomic: vkp_client_state */
    uint32_t protocol;        /* atomic */
    VKP_I_MUTEX mutex;
    vkp_i_requests submitted;
    size_t queued_bytes;
    bool accepting; /* commands */
    bool ended;     /* nothing at all */
    bool task_queued;
    bool close_wanted;
    char error[128];

    bool closed;
    bool ready;
    bool outage;   /* DISCONNECTED was told, RECONNECTED was not */
    bool gap_open; /* since lost_ns, until GAP is told */
    bool was_ready;
    bool falling_back;
    bool ping_sent;
    vkp_i_task task;
    vkp_i_attached attached;
    vkp_conn *conn;
    vkp_resp_reader *reader;
    vkp_block *out; /* small commands are gathered here: one range to write */
    vkp_i_requests flight;
    vkp_i_requests taken;  /* from submitted, next in turn */
    vkp_i_requests failed; /* their end is not told yet */
    vkp_i_map interests[VKP_SUB_KINDS];
    size_t confirmed; /* interests that are */
    size_t resuming;
    uint64_t lost_ns;
    uint64_t heard_ns;
    uint64_t missed;
    uint32_t tries;
    vkp_timer timer; /* connecting: the limit; waiting: the next try; ready: the heartbeat */
};

static void vkp_i_client_free(vkp_client *client)
{
    vkp_loop *loop = client->loop;
    const vkp_env *env = client->env;
    int kind;
    for (kind = 0; kind < VKP_SUB_KINDS; kind++) {
        vkp_i_map_deinit(&client->interests[kind]);
    }
    vkp_resp_reader_unref(client->reader);
    vkp_i_block_unref(client->out);
    vkp_mpsc_tx_unref(client->config.pushes);
    VKP_I_MUTEX_DEINIT(&client->mutex);
    vkp_i_free_str(env, client->config.address);
    vkp_i_free_str(env, client->config.username);
    vkp_i_free_str(env, client->config.password);
    vkp_i_free_str(env, client->config.name);
    vkp_i_free(env, client, sizeof *client);
    vkp_loop_unref(loop);
}

static void vkp_i_client_release(vkp_client *client)
{
    if (VKP_I_UNREF(&client->refs) == 1) {
        vkp_i_client_free(client);
    }
}

/* ---- replies ---- */

#define VKP_I_REPLY_COPY 4096u /* a smaller frame is copied: it must not pin its read block */

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
    reply->values[0].attributes = 0; /* stands before the root: not copied */
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

static void vkp_i_requests_move(vkp_i_requests *from, vkp_i_requests *to)
{
    vkp_i_request *request;
    while ((request = vkp_i_requests_pop(from)) != NULL) {
        vkp_i_requests_append(to, request);
    }
}

static vkp_i_request *vkp_i_request_new(vkp_client *client, vkp_i_request_kind kind)
{
    vkp_i_request *request = (vkp_i_request *)vkp_i_alloc_zero(client->env, sizeof *request);
    if (request != NULL) {
        request->client = client;
        request->kind = kind;
        request->replies = 1;
    }
    return request;
}

static void vkp_i_request_free(vkp_i_request *request)
{
    vkp_bytes_unref(&request->bytes);
    vkp_i_free(request->client->env, request, sizeof *request);
}

/* Tell the outcome of a command, then free it. value NULL unless status is OK. */
static void vkp_i_request_complete(vkp_i_request *request, vkp_status status,
                                   const vkp_value *value, const vkp_bytes *frame)
{
    vkp_client *client = request->client;
    vkp_oneshot *slot;
    if (request->cost > 0) { /* before anybody is told: who is may ask again */
        VKP_I_LOCK(&client->mutex);
        client->queued_bytes -= request->cost;
        VKP_I_UNLOCK(&client->mutex);
    }
    if (request->on_reply != NULL) {
        request->on_reply(request->user, status, value, frame);
    }
    if (request->done != NULL) {
        request->done(request->user, status);
    }
    if (request->kind == VKP_I_REQUEST_COMMAND && request->on_reply == NULL) {
        vkp_reply *reply = status == VKP_OK ? vkp_i_reply_new(client->env, value, frame) : NULL;
        bool ended = false;
        VKP_I_LOCK(&client->mutex);
        slot = request->slot;
        request->slot = NULL;
        if (slot != NULL) {
            slot->i_owner = NULL; /* before the send: the slot may be gone after it */
            if (reply == NULL) {
                ended = vkp_i_oneshot_finish(slot, VKP_I_LOAD_ACQ(&slot->i_state),
                                             VKP_I_SLOT_ABANDONED);
            } else if (vkp_oneshot_send(slot, (const void *)&reply) == VKP_OK) {
                reply = NULL;
                ended = true;
            }
        }
        VKP_I_UNLOCK(&client->mutex);
        vkp_reply_unref(reply);
        if (ended) {
            vkp_i_client_release(client); /* the slot's; the caller has one of its own */
        }
    }
    vkp_i_request_free(request);
}

/* A receiver gave up: forget its slot. The slot keeps the client until this, or its value, came. */
static void vkp_i_request_detach(vkp_oneshot *slot)
{
    vkp_client *client = (vkp_client *)slot->i_user;
    VKP_I_LOCK(&client->mutex);
    if (slot->i_owner != NULL) {
        ((vkp_i_request *)slot->i_owner)->slot = NULL;
        slot->i_owner = NULL;
    }
    VKP_I_UNLOCK(&client->mutex);
    vkp_i_client_release(client);
}

/* ---- submitting, from any thread ---- */

/* Locked: make sure that the loop will look. */
static void vkp_i_client_schedule(vkp_client *client)
{
    if (!client->task_queued) {
        client->task_queued = true;
        (void)VKP_I_ADD(&client->refs, 1);
        if (!vkp_i_loop_queue(client->loop, &client->task)) {
            client->task_queued = false;
            (void)VKP_I_SUB(&client->refs, 1); /* the caller has one */
        }
    }
}

static vkp_status vkp_i_client_submit(vkp_client *client, vkp_i_request *request)
{
    bool interest = request->kind == VKP_I_REQUEST_WANT || request->kind == VKP_I_REQUEST_LEAVE;
    vkp_status status = VKP_OK;
    VKP_I_LOCK(&client->mutex);
    if (client->ended) {
        status = VKP_ERR_CLOSED;
    } else if (!interest && !client->accepting) {
        status = VKP_ERR_DISCONNECTED;
    } else if (client->queued_bytes > 0 &&
               request->cost > client->config.queue_bytes -
                                   VKP_I_MIN(client->queued_bytes, client->config.queue_bytes)) {
        status = VKP_ERR_FULL;
    } else {
        client->queued_bytes += request->cost;
        vkp_i_requests_append(&client->submitted, request);
        vkp_i_client_schedule(client);
    }
    VKP_I_UNLOCK(&client->mutex);
    return status;
}

static vkp_status vkp_i_client_submit_or_free(vkp_client *client, vkp_i_request *request)
{
    vkp_status status = vkp_i_client_submit(client, request);
    if (status != VKP_OK) {
        vkp_bytes_unref(&request->bytes);
        vkp_i_free(client->env, request, sizeof *request);
    }
    return status;
}

VKP_API vkp_status vkp_client_send(vkp_client *client, const vkp_bytes *commands, uint32_t replies,
                                   vkp_reply_fn on_reply, void *user)
{
    vkp_i_request *request;
    VKP_I_REQUIRE(client != NULL && commands != NULL && commands->len > 0 && replies > 0);
    VKP_I_REQUIRE(on_reply != NULL);
    request = vkp_i_request_new(client, VKP_I_REQUEST_COMMAND);
    if (request == NULL) {
        return VKP_ERR_NOMEM;
    }
    request->replies = replies;
    request->on_reply = on_reply;
    request->user = user;
    request->bytes = vkp_bytes_ref(commands);
    request->cost = sizeof *request + commands->len;
    return vkp_i_client_submit_or_free(client, request);
}

/* Commands that would change the connection under everybody's feet. */
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

static void vkp_i_put_command(vkp_resp_writer *writer, size_t argc, const vkp_str *argv)
{
    size_t i;
    vkp_resp_put_aggregate(writer, VKP_RESP_ARRAY, argc);
    for (i = 0; i < argc; i++) {
        vkp_resp_put_bulk(writer, argv[i].ptr, argv[i].len);
    }
}

static vkp_status vkp_i_client_ask(vkp_client *client, vkp_oneshot *slot, size_t argc,
                                   const vkp_str *argv)
{
    vkp_i_request *request;
    vkp_resp_writer writer;
    vkp_status status;
    if (vkp_i_command_breaks_sharing(argc, argv)) {
        return VKP_ERR_REFUSED;
    }
    request = vkp_i_request_new(client, VKP_I_REQUEST_COMMAND);
    if (request == NULL) {
        return VKP_ERR_NOMEM;
    }
    vkp_resp_writer_init(&writer, client->env);
    vkp_i_put_command(&writer, argc, argv);
    status = vkp_resp_writer_take(&writer, &request->bytes);
    if (status != VKP_OK) {
        vkp_i_free(client->env, request, sizeof *request);
        return status;
    }
    request->cost = sizeof *request + request->bytes.len;
    request->slot = slot;
    slot->i_owner = request;
    slot->i_detach = vkp_i_request_detach;
    (void)VKP_I_ADD(&client->refs, 1); /* given back by whoever ends the pairing */
    status = vkp_i_client_submit_or_free(client, request);
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
        vkp_oneshot_abandon(slot); /* who waits on it all the same gets CLOSED */
    }
    return status;
}

#define VKP_I_COMMAND_ARGS 64

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

static vkp_status vkp_i_client_interest(vkp_client *client, vkp_i_request_kind kind,
                                        vkp_sub_kind sub, vkp_str name,
                                        void (*done)(void *user, vkp_status), void *user)
{
    vkp_i_request *request;
    vkp_status status;
    VKP_I_REQUIRE(client != NULL && (unsigned)sub < 3 && (name.ptr != NULL || name.len == 0));
    request = vkp_i_request_new(client, kind);
    if (request == NULL) {
        return VKP_ERR_NOMEM;
    }
    status = vkp_bytes_copy(client->env, name.ptr, name.len, &request->bytes);
    if (status != VKP_OK) {
        vkp_i_free(client->env, request, sizeof *request);
        return status;
    }
    request->sub = sub;
    request->done = done;
    request->user = user;
    return vkp_i_client_submit_or_free(client, request);
}

VKP_API vkp_status vkp_client_subscribe(vkp_client *client, vkp_sub_kind kind, vkp_str name)
{
    return vkp_i_client_interest(client, VKP_I_REQUEST_WANT, kind, name, NULL, NULL);
}

VKP_API vkp_status vkp_client_subscribe_then(vkp_client *client, vkp_sub_kind kind, vkp_str name,
                                             void (*done)(void *user, vkp_status), void *user)
{
    VKP_I_REQUIRE(done != NULL);
    return vkp_i_client_interest(client, VKP_I_REQUEST_WANT, kind, name, done, user);
}

VKP_API vkp_status vkp_client_unsubscribe(vkp_client *client, vkp_sub_kind kind, vkp_str name)
{
    return vkp_i_client_interest(client, VKP_I_REQUEST_LEAVE, kind, name, NULL, NULL);
}

#endif /* VKP_I_IO */

#if VKP_I_IO
/* ======================================================================================
   >>impl-client-connection   The connection of a client
   ====================================================================================== */

/* ---- events ---- */

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

/* An event of our own; `text` is static: it outlives a channel. */
static void vkp_i_client_event(vkp_client *client, vkp_push_kind kind, const char *text)
{
    vkp_push push;
    memset(&push, 0, sizeof push);
    push.kind = kind;
    push.payload = vkp_str_of(text);
    if (kind == VKP_PUSH_GAP) {
        push.from_ns = client->lost_ns;
        push.to_ns = client->loop->now_ns;
    }
    vkp_i_client_emit(client, &push);
}

/* ---- writing ---- */

#define VKP_I_GATHER 2048u /* commands up to this size are copied together */
#define VKP_I_GATHER_BLOCK 16384u

static vkp_status vkp_i_client_write(vkp_client *client, const vkp_bytes *bytes)
{
    vkp_bytes part = *bytes;
    vkp_block *out = client->out;
    if (bytes->len <= VKP_I_GATHER) {
        if (out != NULL && vkp_i_block_is_mine(out)) {
            out->len = 0;
        }
        if (out == NULL || out->capacity - out->len < bytes->len) {
            vkp_i_block_unref(out);
            out = vkp_i_block_open(client->env, VKP_I_GATHER_BLOCK);
            client->out = out;
        }
        if (out != NULL) {
            part.data = vkp_i_block_data(out) + out->len;
            part.block = out;
            memcpy(vkp_i_block_data(out) + out->len, bytes->data, bytes->len);
            out->len += bytes->len;
        }
    }
    return vkp_conn_send(client->conn, &part);
}

static void vkp_i_client_lost(vkp_client *client, const char *why);

/* Write a request and expect its replies. False: the connection could not take it. */
static bool vkp_i_client_start(vkp_client *client, vkp_i_request *request)
{
    if (client->conn == NULL || vkp_i_client_write(client, &request->bytes) != VKP_OK) {
        return false;
    }
    vkp_bytes_unref(&request->bytes);
    vkp_i_requests_append(&client->flight, request);
    return true;
}

/* Build and write one of our own commands. */
static vkp_i_request *vkp_i_client_issue(vkp_client *client, vkp_i_request_kind kind, size_t argc,
                                         const vkp_str *argv)
{
    vkp_i_request *request = vkp_i_request_new(client, kind);
    vkp_resp_writer writer;
    if (request == NULL) {
        return NULL;
    }
    vkp_resp_writer_init(&writer, client->env);
    vkp_i_put_command(&writer, argc, argv);
    if (vkp_resp_writer_take(&writer, &request->bytes) != VKP_OK ||
        !vkp_i_client_start(client, request)) {
        vkp_bytes_unref(&request->bytes);
        vkp_i_free(client->env, request, sizeof *request);
        return NULL;
    }
    return request;
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

static void vkp_i_interest_set_confirmed(vkp_client *client, vkp_i_interest *interest,
                                         bool confirmed)
{
    if (interest->confirmed != confirmed) {
        interest->confirmed = confirmed;
        client->confirmed += confirmed ? (size_t)1 : (size_t)0 - 1;
    }
}

static void vkp_i_interest_free_unused(vkp_client *client, vkp_i_interest *interest)
{
    if (interest->wanted == 0 && interest->in_flight == 0) {
        vkp_i_interest_set_confirmed(client, interest, false);
        vkp_i_map_remove(&client->interests[interest->kind], &interest->node);
        vkp_i_free(client->env, interest, sizeof *interest + interest->node.key.len);
    }
}

/* One command of the name was settled: tell those whose last one it was, or all if it was
   refused. Any of them may close the client, which frees the interest.                        */
static void vkp_i_interest_notify(vkp_client *client, vkp_i_interest *interest, bool refused)
{
    vkp_i_request *waiter;
    for (waiter = interest->waiters.first; waiter != NULL; waiter = waiter->next) {
        waiter->replies--;
    }
    while (!client->closed && interest->waiters.first != NULL &&
           (refused || interest->waiters.first->replies == 0)) {
        vkp_i_request_complete(vkp_i_requests_pop(&interest->waiters),
                               refused ? VKP_ERR_REFUSED : VKP_OK, NULL, NULL);
    }
}

/* Make the server's view follow ours. False: the connection could not take it. */
static bool vkp_i_interest_sync(vkp_client *client, vkp_i_interest *interest)
{
    static const char *const verbs[2][VKP_SUB_KINDS] = {
        {"UNSUBSCRIBE", "PUNSUBSCRIBE", "SUNSUBSCRIBE"}, {"SUBSCRIBE", "PSUBSCRIBE", "SSUBSCRIBE"}};
    bool want = interest->wanted > 0;
    vkp_i_request *request;
    vkp_str argv[2];
    if (!client->ready || want == interest->subscribed) {
        return true;
    }
    argv[0] = vkp_str_of(verbs[want ? 1 : 0][interest->kind]);
    argv[1] = interest->node.key;
    request = vkp_i_client_issue(client, want ? VKP_I_REQUEST_SUBSCRIBE : VKP_I_REQUEST_UNSUBSCRIBE,
                                 2, argv);
    if (request == NULL) {
        return false;
    }
    request->interest = interest;
    request->sub = interest->kind;
    interest->subscribed = want;
    interest->in_flight++;
    return true;
}

/* No memory for a new name: it waits, and what came after it too, for the next connection. Whoever
   asked is told so now: the next connection may be far.                                       */
static void vkp_i_client_postpone(vkp_client *client, vkp_i_request *request)
{
    vkp_i_requests all;
    void (*done)(void *user, vkp_status status) = request->done;
    void *user = request->user;
    request->done = NULL;
    vkp_i_requests_init(&all);
    vkp_i_requests_append(&all, request);
    vkp_i_requests_move(&client->taken, &all);
    VKP_I_LOCK(&client->mutex);
    vkp_i_requests_move(&client->submitted, &all);
    vkp_i_requests_move(&all, &client->submitted);
    VKP_I_UNLOCK(&client->mutex);
    vkp_i_client_lost(client, "out of memory");
    if (done != NULL) {
        done(user, client->closed ? VKP_ERR_CLOSED : VKP_ERR_DISCONNECTED);
    }
}

static void vkp_i_client_want(vkp_client *client, vkp_i_request *request)
{
    vkp_str name = vkp_i_str(request->bytes.data, request->bytes.len);
    vkp_i_interest *interest = vkp_i_interest_find(client, request->sub, name);
    if (interest == NULL) {
        interest = vkp_i_interest_new(client, request->sub, name);
    }
    if (interest == NULL) {
        vkp_i_client_postpone(client, request);
        return;
    }
    interest->wanted++;
    if (!vkp_i_interest_sync(client, interest)) {
        vkp_i_request_complete(request, VKP_ERR_DISCONNECTED, NULL, NULL);
        vkp_i_client_lost(client, "out of memory");
    } else if (!client->ready) {
        vkp_i_request_complete(request, VKP_ERR_DISCONNECTED, NULL, NULL);
    } else if (interest->confirmed && interest->in_flight == 0) {
        vkp_i_request_complete(request, VKP_OK, NULL, NULL);
    } else {
        request->replies = (uint32_t)interest->in_flight;
        vkp_i_requests_append(&interest->waiters, request);
    }
}

static void vkp_i_client_leave(vkp_client *client, vkp_i_request *request)
{
    vkp_str name = vkp_i_str(request->bytes.data, request->bytes.len);
    vkp_i_interest *interest = vkp_i_interest_find(client, request->sub, name);
    vkp_i_request_free(request);
    if (interest == NULL || interest->wanted == 0) {
        return;
    }
    interest->wanted--;
    if (!vkp_i_interest_sync(client, interest)) {
        vkp_i_client_lost(client, "out of memory");
    } else {
        vkp_i_interest_free_unused(client, interest);
    }
}

static void vkp_i_client_resumed(vkp_client *client, vkp_i_interest *interest)
{
    if (interest->resuming) {
        interest->resuming = false;
        if (--client->resuming == 0) {
            client->gap_open = false;
            vkp_i_client_event(client, VKP_PUSH_GAP, "");
        }
    }
}

/* The oldest request in flight is a SUBSCRIBE or UNSUBSCRIBE, and the server answered it. */
static void vkp_i_client_settle(vkp_client *client, const vkp_push *push, bool refused)
{
    vkp_i_request *request = vkp_i_requests_pop(&client->flight);
    vkp_i_interest *interest = request->interest;
    bool subscribe = request->kind == VKP_I_REQUEST_SUBSCRIBE;
    interest->in_flight--;
    vkp_i_request_free(request);
    vkp_i_interest_set_confirmed(client, interest, subscribe && !refused);
    interest->in_flight++; /* held while callbacks run */
    if (push != NULL) {
        vkp_i_client_emit(client, push);
    }
    if (refused && subscribe && !client->closed) {
        vkp_i_log(client->env, VKP_LOG_WARN, "the server refused a subscription to %.*s",
                  VKP_FMT(interest->node.key));
        interest->wanted = 0;
        interest->subscribed = false;
    }
    if (!client->closed) {
        vkp_i_interest_notify(client, interest, refused && subscribe);
    }
    if (!client->closed) {
        vkp_i_client_resumed(client, interest);
    }
    if (!client->closed) {
        interest->in_flight--;
        vkp_i_interest_free_unused(client, interest);
    }
}

static void vkp_i_client_resubscribe(vkp_client *client)
{
    int kind;
    for (kind = 0; kind < VKP_SUB_KINDS; kind++) {
        vkp_i_map_node *node = NULL;
        while ((node = vkp_i_map_get_next(&client->interests[kind], node)) != NULL) {
            vkp_i_interest *interest = VKP_CONTAINER(node, vkp_i_interest, node);
            if (!vkp_i_interest_sync(client, interest)) {
                vkp_i_client_lost(client, "out of memory");
                return;
            }
            if (client->outage) {
                interest->resuming = true;
                client->resuming++;
            }
        }
    }
}

/* ---- the connection's life ---- */

static void vkp_i_client_on_timer(vkp_timer *timer);

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

static void vkp_i_client_start_timer(vkp_client *client, uint64_t ms)
{
    uint64_t deadline = vkp_i_after_ms(vkp_i_loop_now(client->loop), ms);
    if (vkp_timer_start(&client->timer, client->loop, vkp_i_client_on_timer, 0, deadline) !=
        VKP_OK) {
        vkp_i_log(client->env, VKP_LOG_ERROR, "no memory for a timer of the client");
    }
}

static bool vkp_i_request_is_interest(const vkp_i_request *request)
{
    return request->kind == VKP_I_REQUEST_WANT || request->kind == VKP_I_REQUEST_LEAVE;
}

/* A callback may close the client, which then tells the rest before its close returns. */
static void vkp_i_client_tell_failed(vkp_client *client, vkp_status status)
{
    vkp_i_request *request;
    while ((request = vkp_i_requests_pop(&client->failed)) != NULL) {
        vkp_i_request_complete(request, status, NULL, NULL);
    }
}

/* Take from `submitted` what may be worked on: everything, or interests only, or commands only. */
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

/* Take every command not answered, in flight or not even written, and everybody who waits for a
   name; what they ask for stays. All are taken before any is told: a callback may close.      */
static void vkp_i_client_collect_failed(vkp_client *client)
{
    vkp_i_requests *failed = &client->failed;
    int kind;
    vkp_i_requests_move(&client->flight, failed);
    vkp_i_client_collect(client, false, true, failed);
    for (kind = 0; kind < VKP_SUB_KINDS; kind++) {
        vkp_i_map_node *node = vkp_i_map_get_next(&client->interests[kind], NULL);
        while (node != NULL) {
            vkp_i_interest *interest = VKP_CONTAINER(node, vkp_i_interest, node);
            node = vkp_i_map_get_next(&client->interests[kind], node);
            interest->in_flight = 0;
            interest->subscribed = false;
            interest->resuming = false;
            vkp_i_interest_set_confirmed(client, interest, false);
            vkp_i_requests_move(&interest->waiters, failed);
            vkp_i_interest_free_unused(client, interest);
        }
    }
    client->resuming = 0;
}

static void vkp_i_client_drop_connection(vkp_client *client)
{
    vkp_conn *conn = client->conn;
    client->conn = NULL;
    client->ready = false;
    client->ping_sent = false;
    if (conn != NULL) {
        vkp_conn_close(conn);
        vkp_conn_unref(conn);
    }
    vkp_resp_reader_reset(client->reader);
}

/* A uniform wait below a bound that doubles: many clients do not come back as one. */
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

/* The connection, or the try for one, is over: tell, fail what was asked, try again later.
   `why` is static.                                                                            */
static void vkp_i_client_lost(vkp_client *client, const char *why)
{
    bool was_ready = client->ready;
    if (client->closed || vkp_client_get_state(client) == VKP_CLIENT_WAITING) {
        return;
    }
    vkp_i_client_set_error(client, why);
    vkp_i_log(client->env, VKP_LOG_INFO, "%s: %s", client->config.address.ptr, why);
    vkp_i_client_set_state(client, VKP_CLIENT_WAITING);
    vkp_i_client_drop_connection(client);
    vkp_i_client_start_timer(client, vkp_i_client_backoff(client));
    vkp_i_client_collect_failed(client);
    if (was_ready) {
        client->outage = true;
        if (!client->gap_open) {
            client->gap_open = true;
            client->lost_ns = client->loop->now_ns;
        }
        vkp_i_client_event(client, VKP_PUSH_DISCONNECTED, why);
    }
    vkp_i_client_tell_failed(client, VKP_ERR_DISCONNECTED);
}

static void vkp_i_client_take(vkp_client *client);

static void vkp_i_client_ready(vkp_client *client)
{
    client->ready = true;
    client->tries = 0;
    client->heard_ns = client->loop->now_ns;
    vkp_i_client_set_state(client, VKP_CLIENT_READY);
    vkp_i_client_start_timer(client, client->config.heartbeat_ms);
    vkp_i_client_event(client, client->was_ready ? VKP_PUSH_RECONNECTED : VKP_PUSH_CONNECTED, "");
    client->was_ready = true;
    if (client->ready) {
        vkp_i_client_resubscribe(client);
    }
    if (client->ready) {
        client->outage = false;
        client->gap_open = client->gap_open && client->resuming > 0;
        vkp_i_client_take(client);
    }
}

/* AUTH and SETNAME one by one, for servers without HELLO. */
static bool vkp_i_client_login2(vkp_client *client)
{
    vkp_str argv[3];
    size_t argc = 0;
    VKP_I_STORE(&client->protocol, 2u);
    if (client->config.password.ptr != NULL) {
        argv[argc++] = vkp_str_of("AUTH");
        if (client->config.username.ptr != NULL) {
            argv[argc++] = client->config.username;
        }
        argv[argc++] = client->config.password;
        if (vkp_i_client_issue(client, VKP_I_REQUEST_LOGIN, argc, argv) == NULL) {
            return false;
        }
    }
    if (client->config.name.ptr != NULL) {
        argv[0] = vkp_str_of("CLIENT");
        argv[1] = vkp_str_of("SETNAME");
        argv[2] = client->config.name;
        if (vkp_i_client_issue(client, VKP_I_REQUEST_NAME, 3, argv) == NULL) {
            return false;
        }
    }
    argv[0] = vkp_str_of("PING");
    return vkp_i_client_issue(client, VKP_I_REQUEST_HELLO, 1, argv) != NULL;
}

static bool vkp_i_client_hello(vkp_client *client)
{
    vkp_str argv[8];
    size_t argc = 0;
    if (client->config.protocol == 2) {
        client->falling_back = true;
        return vkp_i_client_login2(client);
    }
    VKP_I_STORE(&client->protocol, 3u);
    argv[argc++] = vkp_str_of("HELLO");
    argv[argc++] = vkp_str_of("3");
    if (client->config.password.ptr != NULL) {
        argv[argc++] = vkp_str_of("AUTH");
        argv[argc++] =
            client->config.username.ptr != NULL ? client->config.username : vkp_str_of("default");
        argv[argc++] = client->config.password;
    }
    if (client->config.name.ptr != NULL) {
        argv[argc++] = vkp_str_of("SETNAME");
        argv[argc++] = client->config.name;
    }
    return vkp_i_client_issue(client, VKP_I_REQUEST_HELLO, argc, argv) != NULL;
}

/* The end of a try, with the server's own words (which go with the connection). */
static void vkp_i_client_refused(vkp_client *client, const char *why, vkp_str text)
{
    char words[sizeof client->error];
    (void)snprintf(words, sizeof words, "%s: %.*s", why, (int)VKP_I_MIN(text.len, sizeof words),
                   text.ptr);
    vkp_i_log(client->env, VKP_LOG_ERROR, "%s: %s", client->config.address.ptr, words);
    vkp_i_client_lost(client, why);
    vkp_i_client_set_error(client, words);
}

/* The answer to HELLO, or, on a RESP2 server, to the PING that ends the login. */
static void vkp_i_client_greeted(vkp_client *client, const vkp_value *value)
{
    vkp_str text = vkp_value_get_str(value);
    if (value->type != VKP_RESP_ERROR) {
        vkp_i_client_ready(client);
        return;
    }
    if (!client->falling_back &&
        (vkp_i_starts_with(text, "NOPROTO") || vkp_i_starts_with(text, "ERR unknown command"))) {
        client->falling_back = true;
        if (!vkp_i_client_login2(client)) {
            vkp_i_client_lost(client, "out of memory");
        }
        return;
    }
    vkp_i_client_refused(client, "the server refused the handshake", text);
}

/* ---- reading ---- */

/* A reply that belongs to the oldest request in flight. */
static void vkp_i_client_reply(vkp_client *client, const vkp_value *value, const vkp_bytes *frame)
{
    vkp_i_request *request = client->flight.first;
    vkp_i_request_kind kind;
    if (request == NULL) {
        vkp_i_client_lost(client, "a reply that nobody asked for");
        return;
    }
    kind = request->kind;
    if (kind == VKP_I_REQUEST_SUBSCRIBE || kind == VKP_I_REQUEST_UNSUBSCRIBE) {
        if (value->type == VKP_RESP_ERROR) {
            vkp_i_client_settle(client, NULL, true);
        } else {
            vkp_i_client_lost(client, "a reply where a confirmation was due");
        }
        return;
    }
    if (--request->replies > 0) {
        return;
    }
    (void)vkp_i_requests_pop(&client->flight);
    if (kind == VKP_I_REQUEST_COMMAND) {
        vkp_i_request_complete(request, VKP_OK, value, frame);
        return;
    }
    vkp_i_request_free(request);
    if (kind == VKP_I_REQUEST_HELLO) {
        vkp_i_client_greeted(client, value);
    } else if (kind == VKP_I_REQUEST_LOGIN && value->type == VKP_RESP_ERROR) {
        vkp_i_client_refused(client, "the server refused the password", vkp_value_get_str(value));
    } else if (kind == VKP_I_REQUEST_PING) {
        client->ping_sent = false;
    }
}

static void vkp_i_client_push(vkp_client *client, const vkp_value *value, const vkp_bytes *frame)
{
    vkp_push push;
    vkp_i_request *oldest = client->flight.first;
    if (vkp_push_from_value(value, &push) != VKP_OK) {
        return; /* the reader allows no such push */
    }
    push.frame = *frame;
    if (push.kind == VKP_PUSH_SUBSCRIBED || push.kind == VKP_PUSH_UNSUBSCRIBED) {
        vkp_i_request_kind kind =
            push.kind == VKP_PUSH_SUBSCRIBED ? VKP_I_REQUEST_SUBSCRIBE : VKP_I_REQUEST_UNSUBSCRIBE;
        vkp_i_interest *interest;
        if (oldest != NULL && oldest->kind == kind && oldest->sub == push.sub &&
            vkp_i_str_equal(oldest->interest->node.key, push.channel)) {
            vkp_i_client_settle(client, &push, false);
            return;
        }
        /* Unsolicited: a shard channel left the node. The next change asks for it again. */
        interest = vkp_i_interest_find(client, push.sub, push.channel);
        if (interest != NULL && push.kind == VKP_PUSH_UNSUBSCRIBED) {
            vkp_i_interest_set_confirmed(client, interest, false);
            interest->subscribed = false;
        }
    }
    vkp_i_client_emit(client, &push);
}

/* RESP2 has no pushes: arrays that look like one are, while something is subscribed. */
static bool vkp_i_client_is_push2(const vkp_client *client, const vkp_value *value)
{
    vkp_push push;
    const vkp_i_request *oldest = client->flight.first;
    bool subscribing = oldest != NULL && (oldest->kind == VKP_I_REQUEST_SUBSCRIBE ||
                                          oldest->kind == VKP_I_REQUEST_UNSUBSCRIBE);
    return VKP_I_LOAD(&client->protocol) == 2 && value->type == VKP_RESP_ARRAY &&
           (client->confirmed > 0 || subscribing) && vkp_push_from_value(value, &push) == VKP_OK &&
           push.kind != VKP_PUSH_OTHER;
}

/* Messages that an old server put inside the array of an EXEC. Their parts view the whole reply,
   which is therefore their frame.                                                             */
static void vkp_i_client_push_nested(vkp_client *client, const vkp_value *value,
                                     const vkp_bytes *frame)
{
    uint32_t i;
    for (i = 1; i < value->span && !client->closed; i++) {
        vkp_push push;
        if ((value[i].flags & VKP_VALUE_OUT_OF_BAND) != 0 &&
            vkp_push_from_value(&value[i], &push) == VKP_OK) {
            push.frame = *frame;
            vkp_i_client_emit(client, &push);
        }
    }
}

static void vkp_i_client_value(vkp_client *client, const vkp_value *value, const vkp_bytes *frame)
{
    if (value->type == VKP_RESP_PUSH || vkp_i_client_is_push2(client, value)) {
        vkp_i_client_push(client, value, frame);
        return;
    }
    if (value->type == VKP_RESP_ARRAY && value->i_has_nested != 0) {
        vkp_i_client_push_nested(client, value, frame);
        if (client->closed || client->conn == NULL) {
            return;
        }
    }
    vkp_i_client_reply(client, value, frame);
}

static size_t vkp_i_client_on_data(vkp_conn *conn, void *user, const vkp_bytes *in)
{
    vkp_client *client = (vkp_client *)user;
    size_t used = 0;
    (void)VKP_I_ADD(&client->refs, 1); /* a callback may drop the last reference */
    client->heard_ns = client->loop->now_ns;
    while (client->conn == conn && used < in->len) {
        const vkp_value *value;
        size_t consumed;
        vkp_bytes frame;
        vkp_status status = vkp_resp_reader_scan(client->reader, in->data + used, in->len - used,
                                                 &value, &consumed);
        if (status == VKP_ERR_EMPTY) {
            break;
        }
        if (status != VKP_OK) {
            uint64_t position;
            vkp_i_log(client->env, VKP_LOG_ERROR, "%s: bad reply: %s", client->config.address.ptr,
                      vkp_resp_reader_get_error(client->reader, &position));
            vkp_i_client_lost(client, status == VKP_ERR_NOMEM ? "out of memory"
                                                              : "the server broke the protocol");
            break;
        }
        frame.data = in->data + used;
        frame.len = consumed;
        frame.block = in->block;
        used += consumed;
        vkp_i_client_value(client, value, &frame);
    }
    vkp_i_client_release(client);
    return used;
}

static void vkp_i_client_on_open(vkp_conn *conn, void *user)
{
    vkp_client *client = (vkp_client *)user;
    (void)conn;
    (void)VKP_I_ADD(&client->refs, 1);
    if (!vkp_i_client_hello(client)) {
        vkp_i_client_lost(client, "out of memory");
    }
    vkp_i_client_release(client);
}

static const char *vkp_i_client_why(int error)
{
    return error == ECONNREFUSED || error == ENOENT ? "nobody accepts connections there"
                                                    : "the connection was lost";
}

static void vkp_i_client_on_close(vkp_conn *conn, void *user, vkp_close_reason reason, int error)
{
    vkp_client *client = (vkp_client *)user;
    if (conn == client->conn) { /* else it was we who let go of it */
        if (reason == VKP_CLOSE_LOOP) {
            return; /* the loop's close reaches the client itself */
        }
        vkp_i_log(client->env, VKP_LOG_INFO, "%s: %s%s%s", client->config.address.ptr,
                  vkp_close_reason_str(reason), error != 0 ? ": " : "",
                  error != 0 ? strerror(error) : "");
        (void)VKP_I_ADD(&client->refs, 1);
        vkp_i_client_lost(client, vkp_i_client_why(error));
        vkp_i_client_release(client);
    }
}

static const vkp_conn_ops vkp_i_client_ops = {
    vkp_i_client_on_open, vkp_i_client_on_data, NULL, NULL, vkp_i_client_on_close, NULL};

static vkp_status vkp_i_client_connect(vkp_client *client)
{
    vkp_conn_config config;
    vkp_status status;
    memset(&config, 0, sizeof config);
    config.ops = &vkp_i_client_ops;
    config.user = client;
    config.loop_only = true;
    config.input_bytes = VKP_I_BLOCK_MAX;
    client->falling_back = false;
    vkp_i_client_set_state(client, VKP_CLIENT_CONNECTING);
    vkp_i_client_start_timer(client, client->config.connect_timeout_ms);
    status = vkp_conn_connect(client->loop, client->config.address, &config, &client->conn);
    if (status != VKP_OK) {
        vkp_i_client_lost(client,
                          status == VKP_ERR_SYS ? vkp_i_client_why(errno) : vkp_status_str(status));
    }
    return status;
}

static void vkp_i_client_heartbeat(vkp_client *client)
{
    uint64_t idle_ms = (client->loop->now_ns - client->heard_ns) / 1000000u;
    vkp_str argv = vkp_str_of("PING");
    if (client->ping_sent && idle_ms < client->config.heartbeat_timeout_ms) {
        /* Bytes still come: the answer stands behind a long reply. */
        vkp_i_client_start_timer(client, client->config.heartbeat_timeout_ms - idle_ms);
    } else if (client->ping_sent) {
        vkp_i_client_lost(client, "no answer to a heartbeat");
    } else if (idle_ms < client->config.heartbeat_ms) {
        vkp_i_client_start_timer(client, client->config.heartbeat_ms - idle_ms);
    } else if (vkp_i_client_issue(client, VKP_I_REQUEST_PING, 1, &argv) == NULL) {
        vkp_i_client_lost(client, "out of memory");
    } else {
        client->ping_sent = true;
        vkp_i_client_start_timer(client, client->config.heartbeat_timeout_ms);
    }
}

static void vkp_i_client_on_timer(vkp_timer *timer)
{
    vkp_client *client = VKP_CONTAINER(timer, vkp_client, timer);
    (void)VKP_I_ADD(&client->refs, 1);
    switch (vkp_client_get_state(client)) {
    case VKP_CLIENT_CONNECTING:
        vkp_i_client_lost(client, "no connection within the time limit");
        break;
    case VKP_CLIENT_WAITING:
        (void)!vkp_i_client_connect(client); /* it starts the next wait itself */
        break;
    case VKP_CLIENT_READY:
        vkp_i_client_heartbeat(client);
        break;
    case VKP_CLIENT_CLOSED:
        break;
    }
    vkp_i_client_release(client);
}

/* ---- the queued task, opening, closing ---- */

/* What RESP2 cannot do: a command while something is subscribed on the same connection. */
static bool vkp_i_client_must_refuse(const vkp_client *client)
{
    return VKP_I_LOAD(&client->protocol) == 2 &&
           client->interests[0].count + client->interests[1].count + client->interests[2].count > 0;
}

static void vkp_i_client_dispatch(vkp_client *client, vkp_i_request *request)
{
    if (request->kind == VKP_I_REQUEST_WANT) {
        vkp_i_client_want(client, request);
    } else if (request->kind == VKP_I_REQUEST_LEAVE) {
        vkp_i_client_leave(client, request);
    } else if (vkp_i_client_must_refuse(client)) {
        vkp_i_log(client->env, VKP_LOG_WARN,
                  "a RESP2 server takes no commands on a subscribed connection");
        vkp_i_request_complete(request, VKP_ERR_REFUSED, NULL, NULL);
    } else if (!vkp_i_client_start(client, request)) {
        vkp_i_request_complete(request, VKP_ERR_DISCONNECTED, NULL, NULL);
    }
}

/* Work on what was submitted. Commands wait while the connection is being made. */
static void vkp_i_client_take(vkp_client *client)
{
    vkp_i_request *request;
    vkp_i_client_collect(client, true, client->ready, &client->taken);
    while ((request = vkp_i_requests_pop(&client->taken)) != NULL) {
        if (!client->ready && !vkp_i_request_is_interest(request)) {
            vkp_i_request_complete(request, VKP_ERR_DISCONNECTED, NULL, NULL);
        } else {
            vkp_i_client_dispatch(client, request);
        }
    }
}

/* The end, once. Gives up the loop's reference: the caller must hold another. */
static void vkp_i_client_close_now(vkp_client *client)
{
    int kind;
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
    vkp_i_client_drop_connection(client);
    vkp_i_client_collect_failed(client);
    vkp_i_requests_move(&client->taken, &client->failed);
    vkp_i_client_collect(client, true, true, &client->failed);
    for (kind = 0; kind < VKP_SUB_KINDS; kind++) {
        vkp_i_map_node *node = vkp_i_map_get_next(&client->interests[kind], NULL);
        while (node != NULL) {
            vkp_i_interest *interest = VKP_CONTAINER(node, vkp_i_interest, node);
            node = vkp_i_map_get_next(&client->interests[kind], node);
            interest->wanted = 0;
            vkp_i_interest_free_unused(client, interest);
        }
    }
    vkp_i_client_tell_failed(client, VKP_ERR_CLOSED);
    vkp_mpsc_tx_unref(client->config.pushes);
    client->config.pushes = NULL;
    vkp_i_client_release(client);
}

/* What other threads queued. The task holds a reference. */
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

VKP_API vkp_client_state vkp_client_get_state(const vkp_client *client)
{
    return (vkp_client_state)VKP_I_LOAD_ACQ(&client->state);
}

VKP_API int vkp_client_get_protocol(const vkp_client *client)
{
    return (int)VKP_I_LOAD(&client->protocol);
}

static bool vkp_i_client_configure(vkp_client *client, const vkp_client_config *config)
{
    vkp_client_config *own = &client->config;
    vkp_str *texts[4];
    bool copied = true;
    size_t i;
    *own = *config;
    own->pushes = NULL;
    texts[0] = &own->address;
    texts[1] = &own->username;
    texts[2] = &own->password;
    texts[3] = &own->name;
    for (i = 0; i < 4; i++) {
        copied = copied && vkp_i_copy_str(client->env, texts[i]);
        if (!copied) {
            texts[i]->ptr = NULL; /* the caller's, or not copied */
        }
    }
#define VKP_I_DEFAULT(field, value) \
    if (own->field == 0) {          \
        own->field = (value);       \
    }
    VKP_I_DEFAULT(connect_timeout_ms, 5000)
    VKP_I_DEFAULT(retry_min_ms, 50)
    VKP_I_DEFAULT(retry_max_ms, 5000)
    VKP_I_DEFAULT(heartbeat_ms, 15000)
    VKP_I_DEFAULT(heartbeat_timeout_ms, 5000)
    VKP_I_DEFAULT(queue_bytes, (size_t)64 << 20)
#undef VKP_I_DEFAULT
    own->resp.lenient = true;
    own->resp.env = client->env;
    return copied && vkp_resp_reader_open(&own->resp, &client->reader) == VKP_OK;
}

VKP_API vkp_status vkp_client_open(vkp_loop *loop, const vkp_client_config *config,
                                   vkp_client **out)
{
    vkp_client *client;
    vkp_status status;
    int kind;
    VKP_I_REQUIRE(loop != NULL && config != NULL && config->address.ptr != NULL && out != NULL);
    VKP_I_REQUIRE(vkp_i_on_loop(loop) && (config->on_push == NULL || config->pushes == NULL));
    VKP_I_REQUIRE(config->protocol == 0 || config->protocol == 2 || config->protocol == 3);
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
    vkp_i_requests_init(&client->flight);
    vkp_i_requests_init(&client->taken);
    vkp_i_requests_init(&client->failed);
    for (kind = 0; kind < VKP_SUB_KINDS; kind++) {
        vkp_i_map_init(&client->interests[kind], client->env);
    }
    client->task.fn = vkp_i_client_run;
    client->attached.on_loop_close = vkp_i_client_loop_closed;
    if (!vkp_i_client_configure(client, config)) {
        vkp_i_client_free(client);
        return VKP_ERR_NOMEM;
    }
    if (config->pushes != NULL) {
        client->config.pushes = vkp_mpsc_tx_ref(config->pushes);
    }
    vkp_i_loop_attach(loop, &client->attached);
    status = vkp_i_client_connect(client);
    if (client->timer.i_index == 0) { /* without its timer it would never try again */
        status = VKP_ERR_NOMEM;
    }
    if (status == VKP_ERR_INVALID || status == VKP_ERR_LIMIT || client->timer.i_index == 0) {
        vkp_i_client_close_now(client); /* no later try could succeed */
        vkp_client_unref(client);
        return status;
    }
    *out = client;
    return VKP_OK;
}

#endif /* VKP_I_IO */

#if VKP_I_IO
/* ======================================================================================
   >>impl-pushloop   From a channel of pushes to where they are wanted
   ====================================================================================== */

struct vkp_push_loop {
    vkp_loop *loop;
    vkp_mpsc_rx *rx;
    vkp_handler *handler;
    vkp_sink sink;
    void (*on_end)(void *user);
    void *user;
    bool ended;
    bool running; /* inside its callback */
    bool unreferenced;
};

#define VKP_I_PUSH_BATCH 64

static void vkp_i_sink_write(const vkp_sink *sink, const vkp_push *push, vkp_cancel *cancel)
{
    if (sink->hub != NULL) {
        (void)vkp_hub_deliver(sink->hub, push);
    } else if (sink->conn != NULL) {
        if (push->frame.len > 0) {
            /* its policy counts */
            (void)!vkp_i_conn_push(sink->conn, &push->frame, cancel, VKP_FOREVER);
        }
    } else {
        sink->callback(sink->user, push);
    }
}

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
   One shard per loop: a hub, a request reader, the local clients accepted there. Shard 0's loop
   carries the listeners and the upstream client.
   A local client's replies leave in the order of its commands: each command that must wait takes
   a place in `answers`; what is ready at the head is sent. Commands that depend on that order
   (the subscribe family, HELLO, RESET, QUIT) are not even parsed past while answers are out: the
   connection pauses and the bytes come again. So there is no queue of commands, ever.
   A place waits for the upstream client, whose callback runs on loop 0; it converts the reply
   there and sends the place home to the client's loop as a task.
   A topic of a shard's hub holds one interest of the upstream client; a SUBSCRIBE is confirmed
   locally when the server confirmed it, or at once when the server is away.
   Stand-alone, `census` counts subscribers over all shards, so that any shard answers PUBLISH.
   References: the relay is kept by its owner, each local client and each task between threads;
   a local client (loop's thread) by its connection, each answer and subscription under way.   */

typedef struct vkp_i_shard vkp_i_shard;
typedef struct vkp_i_local vkp_i_local;

/* How a RESP3 reply differs from RESP2's beyond its types. */
#define VKP_I_SHAPE_NULL_ARRAY 1u    /* null is *-1 */
#define VKP_I_SHAPE_FLAT 2u          /* RESP3 nests pairs in arrays */
#define VKP_I_SHAPE_PAIRS 4u         /* RESP3's map is an array of pairs */
#define VKP_I_SHAPE_NULL_ELEMENTS 8u /* null elements are *-1 */
#define VKP_I_SHAPE_NULL_LAST 16u    /* the last element, when null, is *-1 */

typedef struct vkp_i_answer {
    struct vkp_i_answer *next;
    vkp_i_task task; /* home, to the client's loop */
    vkp_i_local *local;
    size_t bytes_allocated;
    size_t asked_bytes; /* of the command */
    vkp_bytes bytes;    /* when done */
    bool done;
    uint8_t protocol;     /* the client's when it asked */
    uint32_t shape_count; /* of an EXEC: the shapes of its commands stand behind the struct */
    uint8_t shape;
} vkp_i_answer;

/* A MULTI under way: its commands, as they will be sent. */
typedef struct vkp_i_multi {
    vkp_resp_writer block;
    uint8_t *shapes;
    size_t count;
    size_t capacity;
    bool failed;
} vkp_i_multi;

#define VKP_I_LOCAL_BUSY 1u    /* a subscription is under way: paused */
#define VKP_I_LOCAL_ORDER 2u   /* paused until all answers are out */
#define VKP_I_LOCAL_FULL 4u    /* paused: too many answers, or too many bytes, are out */
#define VKP_I_LOCAL_LEAVING 8u /* drain when nothing is under way */
#define VKP_I_LOCAL_CLOSED 16u
#define VKP_I_LOCAL_FAILED 32u /* broke the protocol: read no more, drain when answers are out */

struct vkp_i_local {
    vkp_hub_member member;
    vkp_i_shard *shard;
    vkp_i_local *prev; /* of the shard */
    vkp_i_local *next;
    uint64_t id;
    uint32_t refs; /* loop's thread */
    uint32_t flags;
    vkp_i_answer *answers; /* oldest first */
    vkp_i_answer **answers_end;
    uint32_t answer_count;
    size_t asked_bytes; /* of commands whose answers are out */
    size_t held_bytes;  /* of replies that wait for an older one */
    vkp_i_multi *multi;
    vkp_resp_reader *reader; /* of a large command under way; else the shard's is used */
    char *name;
};

struct vkp_i_shard {
    vkp_relay *relay;
    vkp_loop *loop;
    vkp_hub *hub;
    vkp_i_profile *profile;
    vkp_resp_reader *reader;
    vkp_str *argv; /* of the command in hand */
    size_t argv_capacity;
    char *inline_text; /* of an inline command, unquoted */
    size_t inline_capacity;
    vkp_i_local *locals;
    size_t local_count;
    struct vkp_i_handover *handovers; /* guarded by the relay's mutex */
    bool draining;
    bool gone;           /* drained, and told */
    vkp_mpsc_tx *pushes; /* to this shard from other loops; NULL where none sends */
    vkp_push_loop *push_loop;
    vkp_i_task drain_task;
    vkp_i_task kill_task;
};

typedef struct vkp_i_subscriber_count {
    vkp_i_map_node node;
    size_t count;
} vkp_i_subscriber_count; /* its name is behind the struct */

struct vkp_relay {
    const vkp_env *env;
    size_t refs; /* atomic */
    vkp_i_shard *shards;
    size_t shard_count;
    size_t next_shard; /* loop 0's */
    vkp_registry *registry;
    vkp_gate *gate;
    size_t max_request_bytes;
    size_t max_reply_bytes;
    size_t max_subscriptions;
    vkp_client *client; /* NULL: stand-alone */
    vkp_listener **listeners;
    size_t listener_count;
    size_t listener_capacity;
    uint64_t next_id; /* atomic */
    VKP_I_MUTEX mutex;
    vkp_i_map subscribers[VKP_SUB_KINDS]; /* guarded by the mutex */
    bool draining;
    size_t live_shards; /* atomic, while draining */
    vkp_timer drain_timer;
    vkp_i_task end_task;
    void (*on_end)(void *user);
    void *end_user;
    vkp_str notice; /* for the shutdown: a copy, or NULL */
    void (*on_idle)(void *user);
    void *user;
    uint64_t linger_ms;
    uint32_t idle_queued; /* atomic */
    vkp_i_task idle_task;
    vkp_timer idle_timer; /* loop 0's */
    uint64_t messages_in; /* atomic, as all counters that follow */
    uint64_t deliveries;
    uint64_t lagged;
    uint64_t slow_closed;
    uint64_t protocol_errors;
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

static void vkp_i_local_send(vkp_i_local *local, const vkp_bytes *bytes)
{
    if (vkp_conn_send(local->member.conn, bytes) == VKP_ERR_NOMEM) {
        vkp_i_conn_close_later(local->member.conn, VKP_CLOSE_NOMEM, 0);
    }
}

static void vkp_i_local_fail(vkp_i_local *local)
{
    if ((local->flags & VKP_I_LOCAL_CLOSED) == 0) {
        vkp_i_conn_close_later(local->member.conn, VKP_CLOSE_NOMEM, 0);
    }
}

/* A client that runs ahead is not read until it is down to half of these. */
#define VKP_I_MOST_ANSWERS 1024u
#define VKP_I_MOST_ASKED ((size_t)4 << 20)
#define VKP_I_MOST_UNREAD ((size_t)1 << 20)

__attribute__((format(printf, 2, 3))) static void vkp_i_local_error(vkp_i_local *local,
                                                                    const char *format, ...);

/* Tell it why no more is answered, see vkp_relay_drain. */
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

static void vkp_i_local_leave(vkp_i_local *local)
{
    if (local->shard->draining && local->shard->relay->notice.ptr != NULL &&
        (local->flags & VKP_I_LOCAL_FAILED) == 0 && !vkp_i_conn_is_draining(local->member.conn)) {
        vkp_i_local_notify(local);
    }
    vkp_conn_drain(local->member.conn);
}

/* Go on reading, or leave, as far as nothing stands against it. */
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
        vkp_i_conn_flush(local->member.conn); /* what it cannot take, on_drain tells of */
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
        if (local->answers == NULL) { /* input that is left is no whole command */
            vkp_i_local_leave(local);
        }
        return;
    }
    vkp_conn_resume(local->member.conn);
}

static void vkp_i_local_pause(vkp_i_local *local, uint32_t why)
{
    local->flags |= why;
    vkp_conn_pause(local->member.conn);
}

/* Replies pile up: write what the kernel takes, and read no more commands before the rest went
   (on_drain tells).                                                                           */
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

static void vkp_i_answer_free(vkp_i_answer *answer)
{
    vkp_i_local *local = answer->local;
    vkp_bytes_unref(&answer->bytes);
    vkp_i_free(local->shard->relay->env, answer, answer->bytes_allocated);
    vkp_i_local_release(local);
}

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

/* A new place at the end of the stream, or NULL: the connection is doomed then. */
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

/* Answer now, behind what is still out. Takes the reference. */
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

static void vkp_i_local_answer_static(vkp_i_local *local, const char *text)
{
    vkp_i_local_answer(local, vkp_bytes_static(text, strlen(text)));
}

static void vkp_i_local_answer_writer(vkp_i_local *local, vkp_resp_writer *writer)
{
    vkp_bytes bytes;
    if (vkp_resp_writer_take(writer, &bytes) != VKP_OK) {
        vkp_i_local_fail(local);
        return;
    }
    vkp_i_local_answer(local, bytes);
}

/* "-<text>": control bytes of what a client sent are not sent back. */
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
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    (void)vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    vkp_i_local_answer(local, vkp_i_error_bytes(local->shard->relay->env, text));
}

#define VKP_I_SHORT(s) (int)VKP_I_MIN((s).len, (size_t)64), (s).ptr

/* A command's name as servers spell it in their errors. */
typedef struct vkp_i_verb {
    char text[65];
} vkp_i_verb;

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
   ====================================================================================== */

/* ---- conversion of replies ---- */

/* Whether the bytes as received say the same in RESP2. */
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

/* Streams and their entries; an entry that was deleted has a null array for its fields. */
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

/* A RESP3 reply as the server would have given it to a RESP2 client. */
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

/* The reply in the client's protocol: the bytes as received where they say the same. */
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

/* On loop 0. The answer's client lives on its own loop: only its shard may be read here. */
static void vkp_i_answer_on_reply(void *user, vkp_status status, const vkp_value *value,
                                  const vkp_bytes *frame)
{
    vkp_i_answer *answer = (vkp_i_answer *)user;
    vkp_i_shard *shard = answer->local->shard;
    const vkp_env *env = shard->relay->env;
    char text[160];
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
        vkp_i_answer_return(&answer->task); /* that loop is closed: nobody else is there */
    }
}

/* Send commands upstream and expect the last one's reply in the answer's place. */
static void vkp_i_local_forward(vkp_i_local *local, vkp_i_answer *answer, const vkp_bytes *commands,
                                uint32_t replies)
{
    vkp_relay *relay = local->shard->relay;
    char text[160];
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
   ====================================================================================== */

/* ---- the census ---- */

/* Count a subscriber more or less. False: no memory (only when adding). */
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

/* Locked: subscribers of a name. */
static size_t vkp_i_subscribers_count(vkp_relay *relay, vkp_sub_kind kind, vkp_str name)
{
    vkp_i_map *map = &relay->subscribers[kind];
    vkp_i_map_node *node = vkp_i_map_find(map, vkp_i_map_hash(map, name), name);
    return node != NULL ? VKP_CONTAINER(node, vkp_i_subscriber_count, node)->count : 0;
}

/* Who gets a message published now, over all shards. */
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

/* One name of a SUBSCRIBE that waits for the server. */
typedef struct vkp_i_sub_item {
    vkp_i_task task; /* home */
    vkp_i_subscription *subscription;
    vkp_str name;
    bool upstream; /* an interest of the client was taken for it */
    vkp_status status;
} vkp_i_sub_item;

struct vkp_i_subscription {
    vkp_i_local *local;
    vkp_sub_kind kind;
    size_t bytes_allocated;
    size_t count;
    size_t waiting;          /* loop's thread */
    vkp_i_sub_item items[1]; /* count of them; then the names */
};

static const char *const vkp_i_sub_verbs[2][VKP_SUB_KINDS] = {
    {"unsubscribe", "punsubscribe", "sunsubscribe"}, {"subscribe", "psubscribe", "ssubscribe"}};

/* What SUBSCRIBE and UNSUBSCRIBE count: channels and patterns together, shard channels alone. */
static size_t vkp_i_local_sub_count(const vkp_i_local *local, vkp_sub_kind kind)
{
    const uint32_t *counts = local->member.counts;
    return kind == VKP_SUB_SHARD ? counts[VKP_SUB_SHARD]
                                 : counts[VKP_SUB_CHANNEL] + counts[VKP_SUB_PATTERN];
}

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

static void vkp_i_relay_drop_interest(vkp_relay *relay, vkp_sub_kind kind, vkp_str name)
{
    if (relay->client != NULL &&
        vkp_client_unsubscribe(relay->client, kind, name) == VKP_ERR_NOMEM) {
        vkp_i_log(relay->env, VKP_LOG_ERROR, "no memory to unsubscribe upstream: a name stays");
    }
}

/* A shard's topic came or went. Its one upstream interest goes with it. */
static void vkp_i_shard_on_interest(void *user, vkp_sub_kind kind, vkp_str name, bool added)
{
    vkp_i_shard *shard = (vkp_i_shard *)user;
    if (!added) {
        vkp_i_relay_drop_interest(shard->relay, kind, name);
    }
}

/* Join the hub and count, or neither. */
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

static void vkp_i_local_leave_name(vkp_i_local *local, vkp_sub_kind kind, vkp_str name)
{
    vkp_relay *relay = local->shard->relay;
    if (vkp_hub_is_subscribed(local->shard->hub, &local->member, kind, name)) {
        if (relay->client == NULL) { /* first: the name may be the hub's memory */
            (void)vkp_i_subscribers_add(relay, kind, name, false);
        }
        (void)vkp_hub_unsubscribe(local->shard->hub, &local->member, kind, name);
    }
}

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
    vkp_i_free(local->shard->relay->env, self, self->bytes_allocated);
    vkp_i_local_release(local);
}

/* Take one name over from the server's answer; the confirmation or the error goes to the writer. */
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
    /* The interest goes to a fresh topic; nobody needs a second one. */
    if (item->upstream && (closed || topic_had_interest) && item->status != VKP_ERR_REFUSED &&
        item->status != VKP_ERR_CLOSED && item->status != VKP_ERR_NOMEM) {
        vkp_i_relay_drop_interest(relay, self->kind, item->name);
    }
    if (closed) {
        return false;
    }
    if (stands) {
        vkp_i_put_confirmation(writer, local, true, self->kind, item->name);
    } else {
        vkp_resp_put_error(writer,
                           vkp_str_of("NOPERM the upstream server refused the subscription"));
    }
    return true;
}

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

static void vkp_i_sub_item_return(vkp_i_task *task)
{
    vkp_i_sub_item *item = VKP_CONTAINER(task, vkp_i_sub_item, task);
    if (--item->subscription->waiting == 0) {
        vkp_i_subscription_finish(item->subscription);
    }
}

/* On loop 0. */
static void vkp_i_sub_item_done(void *user, vkp_status status)
{
    vkp_i_sub_item *item = (vkp_i_sub_item *)user;
    vkp_loop *loop = item->subscription->local->shard->loop;
    item->status = status;
    item->task.fn = vkp_i_sub_item_return;
    if (vkp_i_on_loop(loop) || !vkp_i_loop_queue(loop, &item->task)) {
        vkp_i_sub_item_return(&item->task);
    }
}

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
    /* Whoever waits for one name needs an interest in each: the members that a name has now may
       have left by then, and theirs with them.                                                */
    for (i = 0; i < count && relay->client != NULL; i++) {
        ask = ask || vkp_hub_get_members(local->shard->hub, kind, names[i]) == 0;
    }
    vkp_i_local_pause(local, VKP_I_LOCAL_BUSY);
    self->waiting = 1; /* ours, until all are asked for */
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
        if (status != VKP_OK) { /* else loop 0 owns the item now, perhaps already */
            item->status = status;
            item->upstream = false;
            self->waiting--;
        }
    }
    if (--self->waiting == 0) {
        vkp_i_subscription_finish(self);
    }
}

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
   ====================================================================================== */

/* ---- commands ---- */

#define VKP_I_CMD_ORDER 0x0100u  /* waits until all answers are out */
#define VKP_I_CMD_LOCAL 0x0200u  /* answered here, server or not */
#define VKP_I_CMD_ALONE 0x0400u  /* answered here stand-alone, else forwarded */
#define VKP_I_CMD_SUB2 0x0800u   /* allowed to a subscribed RESP2 client */
#define VKP_I_CMD_BLOCKS 0x1000u /* refused: it would block everybody */
#define VKP_I_CMD_STATE 0x2000u  /* refused: it would change the shared connection */
#define VKP_I_CMD_MULTI 0x4000u  /* runs inside MULTI instead of being held */
#define VKP_I_CMD_MAYBE 0x8000u  /* refused with a BLOCK argument */

typedef void (*vkp_i_command_fn)(vkp_i_local *local, size_t argc, const vkp_str *argv);

typedef struct vkp_i_command {
    const char *name; /* lower case; the table is sorted */
    vkp_i_command_fn run;
    uint32_t flags; /* and the shape in the low byte */
} vkp_i_command;

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

/* A name of printable bytes without blanks, as servers want it. NULL and an error otherwise. */
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

static const char vkp_i_no_auth[] =
    "ERR the relay takes no passwords: its socket's permissions decide who may connect";

static void vkp_i_run_hello(vkp_i_local *local, size_t argc, const vkp_str *argv)
{
    int protocol = local->member.protocol;
    vkp_str name = vkp_i_str(NULL, 0);
    size_t i = 2;
    if (argc > 1) {
        if (argv[1].len != 1 || (argv[1].ptr[0] != '2' && argv[1].ptr[0] != '3')) {
            bool number = argv[1].len > 0 && argv[1].len < 19;
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

static void vkp_i_local_client_info(vkp_i_local *local)
{
    char text[320];
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
        vkp_i_local_answer_static(local, "+OK\r\n"); /* told to nobody */
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

#define VKP_I_SHARD_LAG ((size_t)64 << 20) /* bytes of pushes on their way to a shard */

/* Send a push to another shard's loop. Takes its reference. */
static void vkp_i_shard_forward(vkp_i_shard *shard, vkp_push *push)
{
    if (vkp_mpsc_try_send(shard->pushes, push) != VKP_OK) {
        (void)VKP_I_ADD(&shard->relay->lagged, (uint64_t)1);
        vkp_i_log(shard->relay->env, VKP_LOG_ERROR,
                  "a loop lags by %zu MiB: a message is lost to its clients",
                  VKP_I_SHARD_LAG >> 20);
        vkp_push_unref(push);
    }
}

/* Stand-alone: to the members here, and to the other shards as a push. */
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
    kind = argv[1].len > 5 && vkp_i_str_is(vkp_i_str(argv[1].ptr, 5), "SHARD") ? VKP_SUB_SHARD
                                                                               : VKP_SUB_CHANNEL;
    what = kind == VKP_SUB_SHARD ? vkp_i_str(argv[1].ptr + 5, argv[1].len - 5) : argv[1];
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

/* What client libraries ask on connect, stand-alone: no commands are described here. */
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
    char text[320];
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
        if (answer != NULL) { /* goes with the connection */
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

#define VKP_I_SUBS (VKP_I_CMD_LOCAL | VKP_I_CMD_ORDER | VKP_I_CMD_SUB2)
#define VKP_I_HERE (VKP_I_CMD_LOCAL | VKP_I_CMD_ORDER | VKP_I_CMD_MULTI)

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

static const vkp_i_command *vkp_i_command_find(vkp_str name)
{
    char key[20];
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

/* The shape of this call: for some commands only a form with one argument more has it. */
static uint32_t vkp_i_command_shape(const vkp_i_command *command, size_t argc, const vkp_str *argv)
{
    uint32_t shape = command != NULL ? command->flags & 0xffu : 0;
    bool pop = vkp_i_str_is(argv[0], "LPOP") || vkp_i_str_is(argv[0], "RPOP");
    bool rank = vkp_i_str_is(argv[0], "ZRANK") || vkp_i_str_is(argv[0], "ZREVRANK");
    return (pop && argc < 3) || (rank && argc < 4) ? 0 : shape;
}

/* Refuse what cannot be shared; the reason is the answer. */
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
        return true; /* as servers: this alone does not fail a transaction */
    } else {
        return false;
    }
    if (local->multi != NULL) {
        local->multi->failed = true;
    }
    return true;
}

static void vkp_i_local_forward_bytes(vkp_i_local *local, const vkp_bytes *request, uint32_t shape)
{
    vkp_i_answer *answer = vkp_i_answer_new(local, 0);
    if (answer != NULL) {
        answer->shape = (uint8_t)shape;
        vkp_i_local_forward(local, answer, request, 1);
    }
}

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

/* Run one command. `request`: its bytes, when they are a whole RESP array. False: not now, the
   bytes must come again.                                                                      */
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
   ====================================================================================== */

/* ---- requests ---- */

__attribute__((format(printf, 2, 3))) static void
vkp_i_local_protocol_error(vkp_i_local *local, const char *format, ...)
{
    char text[256];
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

static bool vkp_i_shard_reserve_argv(vkp_i_shard *shard, size_t argc)
{
    void *argv = shard->argv;
    if (shard->argv_capacity > 65536 && argc < 1024) { /* a huge command was here */
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

/* A command as an array of bulk strings. Returns bytes used, 0: none (wait, or leaving). */
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
        /* Keep the reader of a long command: it must not be read from its start again. */
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

static int vkp_i_hex(char c)
{
    return c >= '0' && c <= '9'   ? c - '0'
           : c >= 'a' && c <= 'f' ? c - 'a' + 10
           : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                  : -1;
}

/* One escape of a double-quoted text, at the backslash. Returns its length. */
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

/* One word of an inline command from `at`, unquoted to `out`. A quote may begin within it, and ends
   it. NULL: quotes are not balanced.                                                          */
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

/* Split a line into shard->argv. False: unbalanced quotes, or no memory (argc SIZE_MAX). */
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

#define VKP_I_INLINE_MAX 65536u

/* A command as a line of words. Returns as vkp_i_local_take_array. */
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
        vkp_i_local_protocol_error(local, "this looks like HTTP");
        return 0;
    }
    if (argc > 0 && !vkp_i_local_execute(local, argc, shard->argv, NULL)) {
        return 0;
    }
    return (size_t)(lf - line) + 1;
}

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

static bool vkp_i_local_on_end(vkp_conn *conn, void *user)
{
    vkp_i_local *local = (vkp_i_local *)user;
    local->flags |= VKP_I_LOCAL_LEAVING;
    if (local->answers == NULL && (local->flags & VKP_I_LOCAL_BUSY) == 0) {
        vkp_conn_drain(conn);
    }
    return true;
}

static void vkp_i_local_on_drain(vkp_conn *conn, void *user)
{
    (void)conn;
    vkp_i_local_maybe_resume((vkp_i_local *)user);
}

static void vkp_i_shard_drained(vkp_i_shard *shard);
static void vkp_i_relay_client_left(vkp_relay *relay);

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

/* Serve an accepted descriptor on this shard's loop. Takes fd and seat. */
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

/* A descriptor on its way to another shard's loop. */
typedef struct vkp_i_handover {
    vkp_i_task task;
    vkp_i_shard *shard;
    struct vkp_i_handover *prev; /* of the shard; guarded by the relay's mutex */
    struct vkp_i_handover *next;
    vkp_seat *seat;
    int fd; /* -1: the relay was let go meanwhile */
} vkp_i_handover;

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
    (void)relay->shards[0].loop->sys->send(fd, &range, 1); /* a courtesy: it may not fit */
}

/* ---- nobody there ---- */

static void vkp_i_relay_idle_over(vkp_timer *timer)
{
    vkp_relay *relay = VKP_CONTAINER(timer, vkp_relay, idle_timer);
    if (vkp_i_relay_count_clients(relay) == 0) {
        relay->on_idle(relay->user);
    }
}

static void vkp_i_relay_idle_begins(vkp_i_task *task)
{
    vkp_relay *relay = VKP_CONTAINER(task, vkp_relay, idle_task);
    vkp_loop *loop = relay->shards[0].loop;
    (void)VKP_I_XCHG(&relay->idle_queued, 0u);
    if (!loop->closed && !relay->draining && relay->on_idle != NULL &&
        vkp_i_relay_count_clients(relay) == 0 &&
        vkp_timer_start(&relay->idle_timer, loop, vkp_i_relay_idle_over, 0,
                        vkp_i_after_ms(loop->now_ns, relay->linger_ms)) != VKP_OK) {
        vkp_i_relay_idle_over(&relay->idle_timer); /* no memory for patience */
    }
    vkp_i_relay_release(relay);
}

/* Any shard's loop. The last one's leaving starts the time to linger. */
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

static void vkp_i_shard_on_push(void *user, const vkp_push *push)
{
    vkp_i_shard *shard = (vkp_i_shard *)user;
    vkp_relay *relay = shard->relay;
    size_t count = relay->client != NULL
                       ? vkp_hub_deliver(shard->hub, push)
                       : vkp_hub_publish(shard->hub, push->sub, push->channel, push->payload);
    (void)VKP_I_ADD(&relay->deliveries, (uint64_t)count);
}

static void vkp_i_relay_on_push(void *user, const vkp_push *push)
{
    vkp_relay *relay = (vkp_relay *)user;
    size_t i;
    if (!vkp_i_push_kind_is_message(push->kind)) {
        if (push->kind >= VKP_PUSH_CONNECTED) {
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

/* The last client of a draining shard left: the last shard tells loop 0. */
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
            vkp_conn_pause(local->member.conn); /* no new commands */
        }
        local = next;
    }
    vkp_i_shard_drained(shard);
    vkp_i_relay_release(relay);
}

static void vkp_i_shard_kill(vkp_i_task *task)
{
    vkp_i_shard *shard = VKP_CONTAINER(task, vkp_i_shard, kill_task);
    vkp_relay *relay = shard->relay;
    while (shard->locals != NULL) {
        vkp_conn_close(shard->locals->member.conn);
    }
    vkp_i_relay_release(relay);
}

/* Run a shard's task on its loop. */
static void vkp_i_shard_queue(vkp_i_shard *shard, vkp_i_task *task, void (*fn)(vkp_i_task *task))
{
    task->fn = fn;
    (void)VKP_I_ADD(&shard->relay->refs, 1);
    if (!vkp_i_loop_queue(shard->loop, task)) {
        vkp_i_relay_release(shard->relay);
    }
}

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
        vkp_i_relay_drain_over(&relay->drain_timer); /* no memory for patience */
    }
    for (i = 0; i < relay->shard_count; i++) {
        vkp_i_shard_queue(&relay->shards[i], &relay->shards[i].drain_task, vkp_i_shard_drain);
    }
}

/* ---- opening, closing ---- */

/* The loops do not run: what was handed to them is closed now, the tasks find nothing later. */
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
    relay->on_idle = NULL; /* tasks that are queued still run, when the loops do or close */
    relay->on_end = NULL;
    for (i = 0; i < relay->shard_count; i++) {
        vkp_i_shard *shard = &relay->shards[i];
        shard->draining = true;
        shard->gone = true;
        while (shard->locals != NULL) { /* whoever calls is alone with the loops */
            vkp_i_conn_finish(shard->locals->member.conn, VKP_CLOSE_LOCAL, 0);
        }
        vkp_i_shard_drop_handovers(relay, shard);
        vkp_push_loop_unref(shard->push_loop);
        vkp_mpsc_tx_unref(shard->pushes);
        shard->push_loop = NULL;
        shard->pushes = NULL;
    }
    if (relay->client != NULL) {
        vkp_i_client_close_now(relay->client); /* answers under way come home now */
        vkp_client_unref(relay->client);
        relay->client = NULL;
    }
    vkp_i_relay_release(relay);
}

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
    conn.input_bytes = relay->max_request_bytes + 65536;
    conn.loop_only = true;
    shard->profile = vkp_i_profile_open(relay->env, &conn);
    memset(&hub, 0, sizeof hub);
    hub.on_interest = vkp_i_shard_on_interest;
    hub.user = shard;
    hub.env = relay->env;
    status = shard->profile != NULL ? vkp_hub_open(&hub, &shard->hub) : VKP_ERR_NOMEM;
    memset(&resp, 0, sizeof resp);
    resp.max_depth = 1;
    resp.max_elements = 1024 * 1024;
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
    client.on_push = vkp_i_relay_on_push;
    client.user = relay;
    client.env = relay->env;
    return vkp_client_open(relay->shards[0].loop, &client, &relay->client);
}

static void vkp_i_relay_on_file(void *user, vkp_socket *sock, vkp_socket_event event,
                                vkp_status status)
{
    static const char *const texts[] = {"", "the file is gone or replaced", "bound again",
                                        "cannot be bound again: "};
    const vkp_relay *relay = (const vkp_relay *)user;
    vkp_i_log(relay->env, VKP_LOG_WARN, "%s: %s%s", vkp_socket_get_path(sock), texts[event],
              event == VKP_SOCKET_BLOCKED ? vkp_status_str(status) : "");
}

/* Who may come in, and where. */
static vkp_status vkp_i_relay_open_gate(vkp_relay *relay, const vkp_relay_config *config)
{
    vkp_gate_config gate;
    vkp_registry_config registry;
    vkp_status status;
    memset(&gate, 0, sizeof gate);
    gate.max_clients = config->max_clients > 0 ? config->max_clients : 16384;
    gate.max_clients_per_uid = config->max_clients_per_uid;
    gate.allow_uids = config->allow_uids;
    gate.allow_uid_count = config->allow_uid_count;
    gate.env = relay->env;
    status = vkp_gate_open(&gate, &relay->gate);
    memset(&registry, 0, sizeof registry);
    registry.mode = config->allow_uid_count > 0 ? 0666 : 0600;
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
        config->max_request_bytes > 0 ? config->max_request_bytes : (size_t)64 << 20;
    relay->max_reply_bytes =
        config->max_reply_bytes > 0 ? config->max_reply_bytes : (size_t)256 << 20;
    relay->max_subscriptions = config->max_subscriptions > 0 ? config->max_subscriptions : 100000;
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
