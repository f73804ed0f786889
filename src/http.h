#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-http   Serve a few pages over HTTP
   HTTP/1.1 (RFC 9110, RFC 9112) for pages that a program makes itself: GET and HEAD, no bodies of
   requests, no files. What breaks the protocol is refused with the status that the standards name,
   and the connection is closed. */

/* A request, as views of its bytes. */
typedef struct vkp_http_request {
    vkp_str method;  /* "GET", or any other */
    vkp_str path;    /* from the "/" on, not decoded; the whole target of CONNECT and OPTIONS * */
    vkp_str query;   /* what is behind the "?"; ptr NULL: there is none */
    vkp_str host;    /* of the target, otherwise of the field Host; ptr NULL: HTTP/1.0 without it */
    vkp_str fields;  /* the header fields with their line ends, for vkp_http_get_field */
    bool has_body;   /* a body follows */
    bool keep_alive; /* the peer wants to send another request on this connection */
} vkp_http_request;

/* Limits of vkp_http_read, in bytes with line ends, and in fields. */
#define VKP_HTTP_LINE_BYTES 8192u
#define VKP_HTTP_FIELDS_BYTES 16384u
#define VKP_HTTP_FIELDS 100u

/* Read the request that begins at data. After OK, *used is its length, without its body. After
   EMPTY, call again with the same bytes and more behind them. With PROTOCOL, *code (also written
   then) is the status to refuse it with: 400, 414 (the line is too long), 431 (the fields are), 501
   (no method is that long) or 505 (another version).
   Owns:   borrows data; *request views data     Blocks: never     Threads: any
   In callbacks: ok
   Errors: EMPTY (incomplete), PROTOCOL (not a request, or over a limit), INVALID (a null argument)
   */
VKP_API VKP_NODISCARD vkp_status vkp_http_read(const uint8_t *data, size_t len,
                                               vkp_http_request *request, size_t *used, int *code);

/* The value of the first header field with that name, in letters of either case, without blanks
   around it; ptr NULL: there is no such field. Views: the request's bytes. Any thread. */
VKP_API vkp_str vkp_http_get_field(const vkp_http_request *request, const char *name);

/* What vkp_http_answer sends. Zeroed: 200 without a body. */
typedef struct vkp_http_response {
    /* The status code. Default: 200. */
    int status;
    /* The media type of the body, as "text/html; charset=utf-8". Default: text/plain in UTF-8. */
    const char *type;
    /* The body; borrowed. Empty, and status is not 200: the status as a line of text. */
    vkp_bytes body;
    /* More header fields, each with its CRLF; sent as they are. NULL: none. */
    const char *fields;
} vkp_http_response;

/* The config of vkp_http_open. */
typedef struct vkp_http_config {
    /* Where to listen, as for vkp_listener_open; required. Borrowed until open returns. */
    vkp_str address;
    /* Decides which clients are accepted; shared. NULL: over Unix sockets the process's own uid. */
    vkp_gate *gate;
    /* Most clients at one time; others get 503. Default: 64. */
    size_t max_clients;
    /* Milliseconds in which a client has to send a whole request, and to read its answer; also how
       long an idle connection stays open. Default: 10,000. */
    uint64_t timeout_ms;
    /* Answer requests for any host. Default: false; over TCP a request whose Host is neither an
       address in digits, nor localhost, nor the host of `address` gets 421: the page of a stranger
       whose name was made to resolve to this machine (DNS rebinding) can read nothing. */
    bool any_host;
    /* A GET or HEAD arrived; required. Answer it with vkp_http_answer, once, inside this call or
       later. request is borrowed: valid until on_request returns. Gives call. */
    void (*on_request)(void *user, const vkp_http_request *request, vkp_http_call *call);
    /* Handed to on_request. */
    void *user;
} vkp_http_config;

/* Serve HTTP on the loop. config, its address and its on_request are required. Requests of one
   connection are answered one after the other; a client that does not read its answers is not read
   either.
   Owns:   borrows config; shares loop and config's gate; gives *http
   Blocks: on the file system, and on DNS for a host name
   Threads: loop's     In callbacks: ok
   Errors: INVALID (a null argument, no address or on_request), NOMEM, those of vkp_listener_open */
VKP_API VKP_NODISCARD vkp_status vkp_http_open(vkp_loop *loop, const vkp_http_config *config,
                                               vkp_http **http);

/* The address, as vkp_listener_get_address. Views: valid as long as http. Loop's thread. */
VKP_API const char *vkp_http_get_address(const vkp_http *http);

/* Answer a request. A HEAD gets the header alone. When the client is gone, or memory is short,
   nothing is sent; in the second case the connection closes.
   Owns:   takes call, always; borrows response     Blocks: never     Threads: loop's
   In callbacks: ok */
VKP_API void vkp_http_answer(vkp_http_call *call, const vkp_http_response *response);

/* Shut down in order: stop accepting, let the calls under way be answered, write what is queued,
   close each connection; at the deadline close the others. Then on_end(user) is called once, not
   inside this call. NULL on_end: not called.
   Owns:   user stays the caller's     Blocks: never     Threads: loop's     In callbacks: ok
   Errors: INVALID (http NULL, closed or drained already), NOMEM; on failure nothing was changed */
VKP_API VKP_NODISCARD vkp_status vkp_http_drain(vkp_http *http, void (*on_end)(void *user),
                                                void *user, uint64_t deadline_ns);

/* Stop accepting, and close all connections; calls under way still have to be answered. The on_end
   of a drain under way is not called. Idempotent; NULL is ignored. Loop's thread. */
VKP_API void vkp_http_close(vkp_http *http);

/* Close the server and give its reference back. NULL is ignored. Loop's thread. */
VKP_API void vkp_http_unref(vkp_http *http);

#endif /* VKP_NO_IO */
