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

/* A client with a loop of its own, for programs that wait for each answer. */
typedef struct vkp_sync vkp_sync;

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

/* Serves pages over HTTP, on a loop. */
typedef struct vkp_http vkp_http;

/* A request of HTTP that is to be answered. */
typedef struct vkp_http_call vkp_http_call;

/* Which connections subscribed to which names. */
typedef struct vkp_hub vkp_hub;

/* Carries pushes from a channel to a sink, on a loop. */
typedef struct vkp_push_loop vkp_push_loop;

/* Local clients that share connections to a server. */
typedef struct vkp_relay vkp_relay;
