#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-sync   A client without an event loop of one's own
   For programs of one thread that wait for each answer. Underneath is a vkp_client on a loop of its
   own, which runs while a call here waits: heartbeats and reconnects happen then. All calls: one
   thread at a time. */

/* The config of vkp_sync_open. */
typedef struct vkp_sync_config {
    /* How the loop waits, for example &vkp_backend_poll; required. */
    const vkp_backend *backend;
    /* The client; its address or url is required, on_push and pushes must be unset, and its env is
       that of the loop too. */
    vkp_client_config client;
    /* Most bytes of pushes that wait for vkp_sync_next_push; what is over is dropped, and LAGGED
       says how many. Default: 8 MiB. */
    size_t push_bytes;
} vkp_sync_config;

/* Open a client, which begins to connect when a call waits. config, its backend and its client's
   address or url are required.
   Owns:   borrows config (as vkp_loop_open and vkp_client_open do); gives *sync
   Blocks: never     Threads: any     In callbacks: ok
   Errors: INVALID (a null argument, no backend, on_push or pushes), NOMEM, those of vkp_loop_open
   and vkp_client_open */
VKP_API VKP_NODISCARD vkp_status vkp_sync_open(const vkp_sync_config *config, vkp_sync **sync);

/* The client: for its state, error text, counters, and for calls that are not here. Views: valid
   until vkp_sync_unref. Any thread. */
VKP_API vkp_client *vkp_sync_get_client(vkp_sync *sync);

/* Wait until the client is READY. After TIMEOUT vkp_client_get_error says why it is not.
   Blocks: until deadline_ns     Threads: one     In callbacks: no
   Errors: TIMEOUT, CLOSED (the client), SYS (the backend's wait failed), INVALID (sync NULL) */
VKP_API VKP_NODISCARD vkp_status vkp_sync_wait_ready(vkp_sync *sync, uint64_t deadline_ns);

/* Send a command, whose arguments are terminated strings and then NULL, and wait for its reply. An
   error of the server is a reply of type VKP_RESP_ERROR.
   Owns:   borrows the arguments; gives *reply, to unref
   Blocks: until deadline_ns     Threads: one     In callbacks: no
   Errors: TIMEOUT (the command may have run), DISCONNECTED (the same, or nothing was sent, or the
   reply was over a limit, or a RESP2 connection with subscriptions carries no commands), SYS, those
   of vkp_client_command */
VKP_API VKP_NODISCARD vkp_status vkp_sync_command(vkp_sync *sync, uint64_t deadline_ns,
                                                  vkp_reply **reply, ...) __attribute__((sentinel));

/* vkp_sync_command with an array of argc arguments, which may hold any bytes.
   Owns:   borrows argv; gives *reply, to unref
   Blocks: until deadline_ns     Threads: one     In callbacks: no
   Errors: as vkp_sync_command */
VKP_API VKP_NODISCARD vkp_status vkp_sync_command_argv(vkp_sync *sync, size_t argc,
                                                       const vkp_str *argv, uint64_t deadline_ns,
                                                       vkp_reply **reply);

/* vkp_sync_command with one command in a format, see vkp_client_commandf.
   Owns:   borrows the arguments; gives *reply, to unref
   Blocks: until deadline_ns     Threads: one     In callbacks: no
   Errors: as vkp_sync_command, and those of vkp_client_commandf */
VKP_API VKP_NODISCARD vkp_status vkp_sync_commandf(vkp_sync *sync, uint64_t deadline_ns,
                                                   vkp_reply **reply, const char *format, ...);

/* vkp_sync_commandf with the arguments of a caller that is variadic itself; it calls va_end.
   Owns:   borrows the arguments; gives *reply, to unref
   Blocks: until deadline_ns     Threads: one     In callbacks: no
   Errors: as vkp_sync_commandf */
VKP_API VKP_NODISCARD vkp_status vkp_sync_vcommandf(vkp_sync *sync, uint64_t deadline_ns,
                                                    vkp_reply **reply, const char *format,
                                                    va_list arguments);

/* Send a command without waiting for its reply, which vkp_sync_next_reply returns. Many of them
   form a pipeline.
   Owns:   borrows argv     Blocks: never     Threads: one     In callbacks: no
   Errors: NOMEM, INVALID, those of vkp_client_command_argv */
VKP_API VKP_NODISCARD vkp_status vkp_sync_append_argv(vkp_sync *sync, size_t argc,
                                                      const vkp_str *argv);

/* Wait for the reply to the oldest command of vkp_sync_append_argv whose reply was not taken.
   Owns:   gives *reply, to unref
   Blocks: until deadline_ns     Threads: one     In callbacks: no
   Errors: EMPTY (no such command), TIMEOUT (call again), DISCONNECTED (that command has no reply;
   the next call is about the next one), SYS, INVALID */
VKP_API VKP_NODISCARD vkp_status vkp_sync_next_reply(vkp_sync *sync, uint64_t deadline_ns,
                                                     vkp_reply **reply);

/* Subscribe to a name, and wait for the first outcome. The name is wanted until
   vkp_sync_unsubscribe, whatever the outcome: see vkp_client_subscribe.
   Owns:   borrows name     Blocks: until deadline_ns     Threads: one     In callbacks: no
   Errors: REFUSED (by the server: the push REFUSED has its words), DISCONNECTED, TIMEOUT, SYS,
   NOMEM, INVALID */
VKP_API VKP_NODISCARD vkp_status vkp_sync_subscribe(vkp_sync *sync, vkp_sub_kind kind, vkp_str name,
                                                    uint64_t deadline_ns);

/* Take one vkp_sync_subscribe back.
   Owns:   borrows name     Blocks: never     Threads: one     In callbacks: no
   Errors: those of vkp_client_unsubscribe */
VKP_API VKP_NODISCARD vkp_status vkp_sync_unsubscribe(vkp_sync *sync, vkp_sub_kind kind,
                                                      vkp_str name);

/* Wait for the next push, or event of the client.
   Owns:   gives *push, to vkp_push_unref
   Blocks: until deadline_ns     Threads: one     In callbacks: no
   Errors: TIMEOUT, CLOSED (the client, and no push is left), SYS, INVALID (a null argument) */
VKP_API VKP_NODISCARD vkp_status vkp_sync_next_push(vkp_sync *sync, uint64_t deadline_ns,
                                                    vkp_push *push);

/* Close the connection and free everything; replies and pushes that were taken stay valid. NULL is
   ignored. Threads: one. */
VKP_API void vkp_sync_unref(vkp_sync *sync);

#endif /* VKP_NO_IO */
