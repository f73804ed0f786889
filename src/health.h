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
