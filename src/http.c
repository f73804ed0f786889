#if VKP_I_IO
/* ======================================================================================
   >>impl-http   Serve a few pages over HTTP
   ======================================================================================
   All on the loop's thread, without locks. The state of a connection is its call; it is allocated
   once and serves one request after the other. While the program works on an answer the connection
   is not read, so there is never a queue of requests; and while the peer does not read what was
   answered it is not read either.
   One timer per connection runs whenever it is the peer's turn: to send a request, or to read an
   answer. It starts with the connection and with each answer, and nothing in between restarts it:
   bytes that trickle in do not keep a place.
   References: of the server, one of its owner, one of each call, one of a drain under way. Of a
   call, one of its connection, one while the program has it.                                  */

#define VKP_I_HTTP_CLIENTS 64u       /* default of vkp_http_config.max_clients */
#define VKP_I_HTTP_TIMEOUT_MS 10000u /* default of vkp_http_config.timeout_ms */
#define VKP_I_HTTP_AGAIN 1024u       /* without a line end, so many new bytes are read again */
#define VKP_I_HTTP_TCP "tcp:"        /* begins an address that a browser can reach */

/* Above so many bytes in the outbox, which the kernel does not take, no request is read. */
#define VKP_I_HTTP_MOST_UNREAD ((size_t)65536)

/* Bits of vkp_http_call.flags. */
#define VKP_I_HTTP_BUSY 1u    /* the program works on an answer */
#define VKP_I_HTTP_INSIDE 2u  /* in on_request */
#define VKP_I_HTTP_HEAD 4u    /* the request is a HEAD */
#define VKP_I_HTTP_LAST 8u    /* the connection closes behind the answer */
#define VKP_I_HTTP_UNREAD 16u /* paused: the peer does not read */

struct vkp_http_call {
    vkp_http *http; /* holds one reference */
    vkp_conn *conn; /* holds one reference; NULL: closed */
    vkp_http_call *prev;
    vkp_http_call *next;
    vkp_timer timer;
    size_t refs;
    size_t seen;    /* bytes of the incomplete request that were read */
    uint32_t flags; /* VKP_I_HTTP_* */
};

struct vkp_http {
    vkp_loop *loop;         /* shared */
    vkp_http_config config; /* its address is a copy */
    vkp_listener *listener; /* NULL: closed */
    vkp_str bound;          /* a copy of the listener's address */
    vkp_http_call *calls;   /* of open connections, newest first */
    size_t refs;
    bool draining;
    void (*on_end)(void *user); /* of the drain */
    void *end_user;
    vkp_timer drain_timer;
    vkp_i_task end_task; /* fn is NULL until a drain begins */
};

static void vkp_i_http_release(vkp_http *http)
{
    vkp_loop *loop = http->loop;
    if (--http->refs == 0) {
        vkp_i_free_str(loop->env, http->config.address);
        vkp_i_free_str(loop->env, http->bound);
        vkp_i_free(loop->env, http, sizeof *http);
        vkp_loop_unref(loop);
    }
}

static void vkp_i_http_call_release(vkp_http_call *call)
{
    vkp_http *http = call->http;
    if (--call->refs == 0) {
        vkp_i_free(http->loop->env, call, sizeof *call);
        vkp_i_http_release(http);
    }
}

/* ---- answers ---- */

/* The status as a line of text. */
static const char *vkp_i_http_status_line(int status)
{
    static const struct {
        int status;
        const char *text;
    } texts[] = {{200, "OK\n"},
                 {400, "Bad Request\n"},
                 {404, "Not Found\n"},
                 {405, "Method Not Allowed\n"},
                 {413, "Content Too Large\n"},
                 {414, "URI Too Long\n"},
                 {421, "Misdirected Request\n"},
                 {431, "Request Header Fields Too Large\n"},
                 {501, "Not Implemented\n"},
                 {503, "Service Unavailable\n"},
                 {505, "HTTP Version Not Supported\n"}};
    size_t i;
    for (i = 0; i < sizeof texts / sizeof *texts; i++) {
        if (texts[i].status == status) {
            return texts[i].text;
        }
    }
    return "\n";
}

#define VKP_I_HTTP_DATE_BYTES 64u /* "Sun, 06 Nov 1994 08:49:37 GMT", with any year */

/* The date of a time in seconds since 1970, as header fields have it. By days since March of year
   0, whose years end with the leap day.                                                       */
static void vkp_i_http_date(char out[VKP_I_HTTP_DATE_BYTES], uint64_t seconds)
{
    static const char names[] = "MarAprMayJunJulAugSepOctNovDecJanFebThuFriSatSunMonTueWed";
    uint64_t days = seconds / 86400;
    uint64_t since = days + 719468;
    uint64_t era = since / 146097;
    uint64_t of_era = since % 146097;
    uint64_t year = (of_era - of_era / 1460 + of_era / 36524 - of_era / 146096) / 365;
    uint64_t of_year = of_era - (365 * year + year / 4 - year / 100);
    uint64_t month = (5 * of_year + 2) / 153;
    (void)snprintf(out, VKP_I_HTTP_DATE_BYTES, "%.3s, %02u %.3s %04u %02u:%02u:%02u GMT",
                   names + 36 + 3 * (days % 7), (unsigned)(of_year - (153 * month + 2) / 5 + 1),
                   names + 3 * month, (unsigned)(year + era * 400 + (month >= 10 ? 1u : 0u)),
                   (unsigned)(seconds / 3600 % 24), (unsigned)(seconds / 60 % 60),
                   (unsigned)(seconds % 60));
}

static void vkp_i_http_put(vkp_resp_writer *writer, const char *text)
{
    vkp_resp_put_raw(writer, text, strlen(text));
}

#define VKP_I_HTTP_HEAD_BYTES 256u /* of the status, the date and the length */

/* Send header and body. NOMEM: not all of it. */
static vkp_status vkp_i_http_send(vkp_http_call *call, const vkp_http_response *response)
{
    vkp_loop *loop = call->http->loop;
    int code = response->status != 0 ? response->status : 200;
    const char *reason = vkp_i_http_status_line(code);
    char date[VKP_I_HTTP_DATE_BYTES];
    char head[VKP_I_HTTP_HEAD_BYTES];
    vkp_bytes body = response->body;
    vkp_bytes bytes;
    vkp_resp_writer writer;
    vkp_status status;
    if (body.len == 0 && code != 200) {
        body = vkp_bytes_static(reason, strlen(reason));
    }
    vkp_i_http_date(date, loop->sys->wall_ns() / 1000000000u);
    (void)snprintf(head, sizeof head,
                   "HTTP/1.1 %d %.*s\r\nDate: %s\r\nContent-Length: %zu\r\nContent-Type: ", code,
                   (int)strlen(reason) - 1, reason, date, body.len);
    vkp_resp_writer_init(&writer, loop->env);
    vkp_i_http_put(&writer, head);
    vkp_i_http_put(&writer, response->type != NULL ? response->type : "text/plain; charset=utf-8");
    vkp_i_http_put(&writer, "\r\nX-Content-Type-Options: nosniff\r\nCache-Control: no-store\r\n");
    vkp_i_http_put(&writer, response->fields != NULL ? response->fields : "");
    vkp_i_http_put(&writer, (call->flags & VKP_I_HTTP_LAST) != 0
                                ? "Connection: close\r\n\r\n"
                                : "Connection: keep-alive\r\n\r\n");
    status = vkp_resp_writer_take(&writer, &bytes);
    if (status == VKP_OK) {
        status = vkp_conn_send(call->conn, &bytes);
        vkp_bytes_unref(&bytes);
    }
    if (status == VKP_OK && body.len > 0 && (call->flags & VKP_I_HTTP_HEAD) == 0) {
        status = vkp_conn_send(call->conn, &body);
    }
    return status;
}

static void vkp_i_http_timed_out(vkp_timer *timer)
{
    vkp_http_call *call = VKP_CONTAINER(timer, vkp_http_call, timer);
    vkp_conn_close(call->conn);
}

/* It is the peer's turn. */
static void vkp_i_http_start_timer(vkp_http_call *call)
{
    vkp_http *http = call->http;
    if (vkp_timer_start(&call->timer, http->loop, vkp_i_http_timed_out, 0,
                        vkp_i_after_ms(vkp_i_loop_now(http->loop), http->config.timeout_ms)) !=
        VKP_OK) {
        vkp_i_conn_close_later(call->conn, VKP_CLOSE_NOMEM, 0);
    }
}

/* The answer is queued: read the next request, unless the peer does not read. */
static void vkp_i_http_answered(vkp_http_call *call)
{
    if ((call->flags & VKP_I_HTTP_LAST) != 0) {
        vkp_conn_drain(call->conn);
        return;
    }
    if (vkp_i_conn_get_queued_bytes(call->conn) > VKP_I_HTTP_MOST_UNREAD) {
        vkp_i_conn_flush(call->conn);
    }
    if (vkp_i_conn_get_queued_bytes(call->conn) > VKP_I_HTTP_MOST_UNREAD) {
        call->flags |= VKP_I_HTTP_UNREAD;
        vkp_conn_pause(call->conn);
    } else if ((call->flags & VKP_I_HTTP_INSIDE) == 0) {
        vkp_conn_resume(call->conn);
    }
}

VKP_API void vkp_http_answer(vkp_http_call *call, const vkp_http_response *response)
{
    call->flags &= ~VKP_I_HTTP_BUSY;
    if (call->conn != NULL) {
        if (vkp_i_http_send(call, response) == VKP_ERR_NOMEM) {
            vkp_i_conn_close_later(call->conn, VKP_CLOSE_NOMEM, 0);
        } else {
            vkp_i_http_start_timer(call);
            vkp_i_http_answered(call);
        }
    }
    vkp_i_http_call_release(call);
}

/* ---- requests ---- */

/* Answer with a status, and close behind it. */
static void vkp_i_http_refuse(vkp_http_call *call, int status, const char *fields)
{
    vkp_http_response response;
    memset(&response, 0, sizeof response);
    response.status = status;
    response.fields = fields;
    call->flags |= VKP_I_HTTP_LAST;
    call->refs++;
    vkp_http_answer(call, &response);
}

/* Whether the host is nobody's but this machine's: an address in digits, or localhost. Browsers
   take a name of digits and dots for an address.                                              */
static bool vkp_i_http_host_is_local(vkp_str host)
{
    static const char local[] = "localhost";
    size_t end = sizeof local - 1;
    size_t i;
    for (i = 0; i < host.len && (host.ptr[i] == '.' || (host.ptr[i] >= '0' && host.ptr[i] <= '9'));
         i++) {
    }
    return i == host.len || host.ptr[0] == '[' ||
           (host.len >= end && vkp_i_str_is(vkp_i_str(host.ptr + host.len - end, end), local) &&
            (host.len == end || host.ptr[host.len - end - 1] == '.'));
}

/* The host without its port. */
static vkp_str vkp_i_http_strip_port(vkp_str host)
{
    size_t len = host.len;
    while (len > 0 && host.ptr[len - 1] >= '0' && host.ptr[len - 1] <= '9') {
        len--;
    }
    if (len > 0 && host.ptr[len - 1] == ':') {
        host.len = len - 1;
    }
    return host;
}

/* Whether requests for this host are answered: see vkp_http_config.any_host. */
static bool vkp_i_http_serves(const vkp_http *http, vkp_str host)
{
    vkp_str own = http->config.address;
    if (http->config.any_host || host.ptr == NULL || !vkp_i_starts_with(own, VKP_I_HTTP_TCP)) {
        return true;
    }
    host = vkp_i_http_strip_port(host);
    own = vkp_i_http_strip_port(own);
    own.ptr += sizeof VKP_I_HTTP_TCP - 1;
    own.len -= sizeof VKP_I_HTTP_TCP - 1;
    return vkp_i_http_host_is_local(host) || vkp_i_str_alike(host, own);
}

/* Give the request to the program, or refuse it. */
static void vkp_i_http_take(vkp_http_call *call, const vkp_http_request *request)
{
    vkp_http *http = call->http;
    bool get = vkp_i_str_equal(request->method, vkp_str_of("GET"));
    bool head = vkp_i_str_equal(request->method, vkp_str_of("HEAD"));
    call->flags |= head ? VKP_I_HTTP_HEAD : 0u;
    if (!vkp_i_http_serves(http, request->host)) {
        vkp_i_http_refuse(call, 421, NULL);
    } else if (!get && !head) {
        vkp_i_http_refuse(call, 405, "Allow: GET, HEAD\r\n");
    } else if (request->has_body) {
        vkp_i_http_refuse(call, 413, NULL);
    } else {
        call->flags |= VKP_I_HTTP_BUSY | VKP_I_HTTP_INSIDE;
        call->flags |= request->keep_alive ? 0u : VKP_I_HTTP_LAST;
        call->refs++;
        vkp_timer_stop(&call->timer);
        http->config.on_request(http->config.user, request, call);
        call->flags &= ~VKP_I_HTTP_INSIDE;
    }
}

/* Whether the bytes behind those that were read may make a request of them. */
static bool vkp_i_http_is_news(const vkp_http_call *call, const uint8_t *data, size_t len)
{
    return call->seen == 0 || len - call->seen >= VKP_I_HTTP_AGAIN ||
           memchr(data + call->seen, '\n', len - call->seen) != NULL;
}

static size_t vkp_i_http_on_data(vkp_conn *conn, void *user, const vkp_bytes *in)
{
    vkp_http_call *call = (vkp_http_call *)user;
    const uint32_t stop = VKP_I_HTTP_BUSY | VKP_I_HTTP_LAST | VKP_I_HTTP_UNREAD;
    size_t at = 0;
    if (call == NULL) {
        return in->len;
    }
    call->refs++;
    while (at < in->len && call->conn != NULL && vkp_i_conn_is_serving(conn) &&
           (call->flags & stop) == 0 && vkp_i_http_is_news(call, in->data + at, in->len - at)) {
        vkp_http_request request;
        size_t used = 0;
        int code = 0;
        vkp_status status = vkp_http_read(in->data + at, in->len - at, &request, &used, &code);
        call->seen = status == VKP_ERR_EMPTY ? in->len - at : 0;
        call->flags &= ~VKP_I_HTTP_HEAD;
        if (status == VKP_ERR_PROTOCOL) {
            vkp_i_http_refuse(call, code, NULL);
        } else if (status == VKP_OK) {
            vkp_i_http_take(call, &request);
            at += used;
        }
    }
    if (call->conn != NULL && (call->flags & VKP_I_HTTP_BUSY) != 0) {
        vkp_conn_pause(conn);
    }
    vkp_i_http_call_release(call);
    return at;
}

/* The peer has read what was answered. */
static void vkp_i_http_on_drain(vkp_conn *conn, void *user)
{
    vkp_http_call *call = (vkp_http_call *)user;
    if (call != NULL && (call->flags & VKP_I_HTTP_UNREAD) != 0) {
        call->flags &= ~VKP_I_HTTP_UNREAD;
        vkp_conn_resume(conn);
    }
}

/* The peer sends nothing more: what it asked for is answered. */
static bool vkp_i_http_on_end(vkp_conn *conn, void *user)
{
    vkp_http_call *call = (vkp_http_call *)user;
    if (call == NULL) {
        return false;
    }
    call->flags |= VKP_I_HTTP_LAST;
    if ((call->flags & VKP_I_HTTP_BUSY) == 0) {
        vkp_conn_drain(conn);
    }
    return true;
}

/* ---- connections ---- */

/* A drain is under way, and no connection is left. */
static void vkp_i_http_maybe_end(vkp_http *http)
{
    if (http->draining && http->calls == NULL) {
        vkp_i_loop_defer(http->loop, &http->end_task);
    }
}

static void vkp_i_http_on_close(vkp_conn *conn, void *user, vkp_close_reason reason, int error)
{
    vkp_http_call *call = (vkp_http_call *)user;
    (void)reason;
    (void)error;
    if (call == NULL) {
        return;
    }
    if (call->prev != NULL) {
        call->prev->next = call->next;
    } else {
        call->http->calls = call->next;
    }
    if (call->next != NULL) {
        call->next->prev = call->prev;
    }
    vkp_timer_stop(&call->timer);
    call->conn = NULL;
    vkp_conn_unref(conn);
    vkp_i_http_maybe_end(call->http);
    vkp_i_http_call_release(call);
}

static const vkp_conn_ops vkp_i_http_ops = {
    NULL, vkp_i_http_on_data, vkp_i_http_on_drain, vkp_i_http_on_end, vkp_i_http_on_close, NULL};

static void vkp_i_http_on_accept(void *user, vkp_conn *conn)
{
    vkp_http *http = (vkp_http *)user;
    vkp_http_call *call = (vkp_http_call *)vkp_i_alloc_zero(http->loop->env, sizeof *call);
    vkp_conn_set_user(conn, call);
    if (call == NULL) {
        vkp_conn_close(conn);
        return;
    }
    call->http = http;
    http->refs++;
    call->refs = 1;
    call->conn = vkp_conn_ref(conn);
    call->next = http->calls;
    if (call->next != NULL) {
        call->next->prev = call;
    }
    http->calls = call;
    vkp_i_http_start_timer(call);
}

/* Too many clients: say so, at least to those that read it. */
static void vkp_i_http_on_refuse(void *user, int fd, vkp_refusal why)
{
    static const char text[] = "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n"
                               "Retry-After: 1\r\nConnection: close\r\n\r\n";
    vkp_http *http = (vkp_http *)user;
    vkp_range range;
    (void)why;
    range.base = text;
    range.len = sizeof text - 1;
    (void)http->loop->sys->send(fd, &range, 1); /* may fail: it is best effort */
}

/* ---- the server ---- */

VKP_API vkp_status vkp_http_open(vkp_loop *loop, const vkp_http_config *config, vkp_http **out)
{
    vkp_listener_config listener;
    vkp_http *http;
    vkp_status status;
    VKP_I_REQUIRE(loop != NULL && config != NULL && out != NULL);
    VKP_I_REQUIRE(config->address.ptr != NULL && config->on_request != NULL);
    http = (vkp_http *)vkp_i_alloc_zero(loop->env, sizeof *http);
    if (http == NULL) {
        return VKP_ERR_NOMEM;
    }
    http->loop = vkp_loop_ref(loop);
    http->refs = 1;
    http->config = *config;
    http->config.timeout_ms = config->timeout_ms > 0 ? config->timeout_ms : VKP_I_HTTP_TIMEOUT_MS;
    memset(&listener, 0, sizeof listener);
    listener.address = config->address;
    listener.gate = config->gate;
    listener.max_clients = config->max_clients > 0 ? config->max_clients : VKP_I_HTTP_CLIENTS;
    listener.conn.ops = &vkp_i_http_ops;
    listener.conn.user = http;
    listener.conn.loop_only = true;
    listener.conn.input_bytes = VKP_HTTP_LINE_BYTES + VKP_HTTP_FIELDS_BYTES + loop->read_bytes * 2;
    listener.on_accept = vkp_i_http_on_accept;
    listener.on_refuse = vkp_i_http_on_refuse;
    status = vkp_i_copy_str(loop->env, &http->config.address) ? VKP_OK : VKP_ERR_NOMEM;
    if (status == VKP_OK) {
        status = vkp_listener_open(loop, &listener, &http->listener);
    }
    if (status == VKP_OK) {
        http->bound = vkp_str_of(vkp_listener_get_address(http->listener));
        status = vkp_i_copy_str(loop->env, &http->bound) ? VKP_OK : VKP_ERR_NOMEM;
    }
    if (status != VKP_OK) {
        int error = errno;
        vkp_http_unref(http);
        errno = error;
        return status;
    }
    *out = http;
    return VKP_OK;
}

VKP_API const char *vkp_http_get_address(const vkp_http *http)
{
    return http->bound.ptr;
}

/* Accept no further clients. */
static void vkp_i_http_stop_accepting(vkp_http *http)
{
    vkp_listener_unref(http->listener);
    http->listener = NULL;
}

static void vkp_i_http_close_all(vkp_http *http)
{
    while (http->calls != NULL) {
        vkp_conn_close(http->calls->conn);
    }
}

VKP_API void vkp_http_close(vkp_http *http)
{
    if (http != NULL) {
        http->on_end = NULL;
        vkp_timer_stop(&http->drain_timer);
        vkp_i_http_stop_accepting(http);
        vkp_i_http_close_all(http);
    }
}

VKP_API void vkp_http_unref(vkp_http *http)
{
    if (http != NULL) {
        vkp_http_close(http);
        vkp_i_http_release(http);
    }
}

/* Task: every connection of a drained server is closed. */
static void vkp_i_http_ended(vkp_i_task *task)
{
    vkp_http *http = VKP_CONTAINER(task, vkp_http, end_task);
    vkp_timer_stop(&http->drain_timer);
    if (http->on_end != NULL) {
        http->on_end(http->end_user);
    }
    vkp_i_http_release(http);
}

static void vkp_i_http_drain_over(vkp_timer *timer)
{
    vkp_i_http_close_all(VKP_CONTAINER(timer, vkp_http, drain_timer));
}

VKP_API vkp_status vkp_http_drain(vkp_http *http, void (*on_end)(void *user), void *user,
                                  uint64_t deadline_ns)
{
    vkp_http_call *call;
    vkp_status status;
    VKP_I_REQUIRE(http != NULL && http->listener != NULL);
    status = vkp_timer_start(&http->drain_timer, http->loop, vkp_i_http_drain_over, 0, deadline_ns);
    if (status != VKP_OK) {
        return status;
    }
    http->refs++;
    http->draining = true;
    http->on_end = on_end;
    http->end_user = user;
    http->end_task.fn = vkp_i_http_ended;
    vkp_i_http_stop_accepting(http);
    for (call = http->calls; call != NULL; call = call->next) {
        call->flags |= VKP_I_HTTP_LAST;
        if ((call->flags & VKP_I_HTTP_BUSY) == 0) {
            vkp_conn_drain(call->conn);
        }
    }
    vkp_i_http_maybe_end(http);
    return VKP_OK;
}

#endif /* VKP_I_IO */
