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
