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
