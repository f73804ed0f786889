/* A server of pages under any bytes. An input is a head of six bytes and a stream:
       0     0, or every n-th allocation of the server fails
       1..5  the lengths, less one, of the pieces in which the stream arrives, over and over
   The stream is read whole and in windows that grow by pieces: the requests and the verdict must be
   the same. Each request is written again from what was read of it, and must be read as the same.
   Then the stream goes to a server in pieces: its answers, and the place where it closes, must be
   those that the requests ask for.
   SPDX-License-Identifier: MIT                                                                  */
#include "valkey_push.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define HEAD 6u
#define MOST_REQUESTS 64u

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void fail(const char *what)
{
    fprintf(stderr, "fuzz_http: %s\n", what);
    abort();
}

static void require(bool condition, const char *what)
{
    if (!condition) {
        fail(what);
    }
}

/* ---- what the stream asks for ---- */

typedef struct verdict {
    int status[MOST_REQUESTS + 1]; /* of the answers */
    bool head[MOST_REQUESTS + 1];  /* the answer has no body */
    size_t count;
    size_t used; /* bytes of the requests that were read */
    bool open;   /* the connection stays for the next request */
    bool whole;  /* the last answer is to a request; otherwise to what is none */
} verdict;

static size_t piece_len(const uint8_t *head, size_t index)
{
    return (size_t)head[1 + index % (HEAD - 1)] + 1;
}

static bool same(vkp_str a, vkp_str b)
{
    return (a.ptr == NULL) == (b.ptr == NULL) && a.len == b.len &&
           (a.len == 0 || memcmp(a.ptr, b.ptr, a.len) == 0);
}

/* Whether the host is one that a server on a Unix socket answers for: any. The methods decide. */
static int expected_status(const vkp_http_request *request)
{
    bool get = same(request->method, vkp_str_of("GET"));
    bool head = same(request->method, vkp_str_of("HEAD"));
    return !get && !head ? 405 : request->has_body ? 413 : 200;
}

static void put(char *out, size_t *at, vkp_str text)
{
    memcpy(out + *at, text.ptr, text.len);
    *at += text.len;
}

/* Writes the request again, and reads it. */
static void check_again(const vkp_http_request *request, size_t used)
{
    char *out = (char *)malloc(used * 2 + 256);
    vkp_http_request again;
    size_t at = 0;
    size_t end = 0;
    int code = 0;
    require(out != NULL, "the machine has no memory");
    put(out, &at, request->method);
    put(out, &at, vkp_str_of(" "));
    put(out, &at, request->path);
    if (request->query.ptr != NULL) {
        put(out, &at, vkp_str_of("?"));
        put(out, &at, request->query);
    }
    put(out, &at,
        vkp_str_of(request->keep_alive || request->has_body ? " HTTP/1.1\r\n" : " HTTP/1.0\r\n"));
    put(out, &at, request->fields);
    if (vkp_http_get_field(request, "host").ptr == NULL) {
        put(out, &at, vkp_str_of("Host: x\r\n"));
    }
    put(out, &at, vkp_str_of("\r\n"));
    if (at - request->fields.len < VKP_HTTP_LINE_BYTES &&
        request->fields.len + 16 < VKP_HTTP_FIELDS_BYTES) {
        vkp_status status = vkp_http_read((const uint8_t *)out, at, &again, &end, &code);
        if (status == VKP_ERR_PROTOCOL && code == 431) { /* one field more than there may be */
            free(out);
            return;
        }
        require(status == VKP_OK && end == at, "a request is refused when it is written again");
        require(same(again.method, request->method) && same(again.path, request->path) &&
                    same(again.query, request->query) && again.has_body == request->has_body,
                "a request is another one when it is written again");
        require(request->fields.len == 0 ||
                    same(vkp_http_get_field(&again, "x"), vkp_http_get_field(request, "x")),
                "a field is another one when it is written again");
    }
    free(out);
}

/* Notes a request. False: it is the last one. */
static bool note(verdict *out, const vkp_http_request *request, size_t used)
{
    out->status[out->count] = expected_status(request);
    out->head[out->count] = same(request->method, vkp_str_of("HEAD"));
    out->used += used;
    out->open = request->keep_alive && out->status[out->count] == 200;
    out->whole = true;
    out->count++;
    return out->open && out->count < MOST_REQUESTS;
}

/* Reads the stream in windows that end at the pieces' ends; head NULL: in one window. */
static verdict read_stream(const uint8_t *head, const uint8_t *stream, size_t size)
{
    verdict out;
    size_t end = head != NULL ? 0 : size;
    size_t index = 0;
    bool more = true;
    memset(&out, 0, sizeof out);
    out.open = true;
    while (more) {
        vkp_http_request request;
        size_t used = 0;
        int code = 0;
        size_t len = end - out.used;
        uint8_t *window = (uint8_t *)malloc(len > 0 ? len : 1);
        vkp_status status;
        require(window != NULL, "the machine has no memory");
        memcpy(window, stream + out.used, len);
        status = vkp_http_read(window, len, &request, &used, &code);
        if (status == VKP_OK) {
            require(used > 0 && used <= len, "more used than there was");
            check_again(&request, used);
            more = note(&out, &request, used);
        } else if (status == VKP_ERR_PROTOCOL) {
            require(code == 400 || code == 414 || code == 431 || code == 501 || code == 505,
                    "an unknown status");
            out.status[out.count++] = code;
            out.open = false;
            out.whole = stream[size - 1] == '\n';
            more = false;
        } else if (end == size) {
            more = false;
        } else {
            size_t piece = piece_len(head, index++);
            end = piece < size - end ? end + piece : size;
        }
        free(window);
    }
    return out;
}

/* ---- the server ---- */

typedef struct site {
    vkp_env env;
    vkp_loop *loop;
    vkp_http *http;
    size_t asked;
    size_t fail_every;
    size_t live_bytes;
} site;

#define MOST_BYTES 300000u /* of a server without clients; its loop keeps a block to read into */

static void *site_alloc(void *user, void *ptr, size_t old_bytes, size_t new_bytes)
{
    site *self = (site *)user;
    void *grown;
    if (new_bytes == 0) {
        self->live_bytes -= old_bytes;
        free(ptr);
        return NULL;
    }
    self->asked++;
    if (self->fail_every != 0 && self->asked % self->fail_every == 0) {
        return NULL;
    }
    grown = realloc(ptr, new_bytes);
    require(grown != NULL, "the machine has no memory");
    self->live_bytes = self->live_bytes - old_bytes + new_bytes;
    return grown;
}

static void on_request(void *user, const vkp_http_request *request, vkp_http_call *call)
{
    vkp_http_response response;
    (void)user;
    (void)request;
    memset(&response, 0, sizeof response);
    response.body = vkp_bytes_static("page", 4);
    vkp_http_answer(call, &response);
}

/* One server for all inputs. */
static site *site_get(void)
{
    static site self;
    if (self.loop == NULL) {
        static char address[64];
        vkp_loop_config loop;
        vkp_http_config config;
        (void)snprintf(address, sizeof address, "unix:@vkp-fuzz-http-%d", (int)getpid());
        memset(&loop, 0, sizeof loop);
        memset(&config, 0, sizeof config);
        self.env.alloc = site_alloc;
        self.env.user = &self;
        loop.backend = &vkp_backend_poll;
        loop.env = &self.env;
        config.address = vkp_str_of(address);
        config.on_request = on_request;
        require(vkp_loop_open(&loop, &self.loop) == VKP_OK, "no loop");
        require(vkp_http_open(self.loop, &config, &self.http) == VKP_OK, "no server");
    }
    return &self;
}

static int site_connect(site *self)
{
    const char *name = vkp_http_get_address(self->http) + sizeof "unix:" - 1;
    struct sockaddr_un address;
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    memset(&address, 0, sizeof address);
    address.sun_family = AF_UNIX;
    memcpy(address.sun_path + 1, name + 1, strlen(name) - 1);
    require(fd >= 0 &&
                connect(fd, (const struct sockaddr *)&address,
                        (socklen_t)(offsetof(struct sockaddr_un, sun_path) + strlen(name))) == 0,
            "no connection");
    require(fcntl(fd, F_SETFL, O_NONBLOCK) == 0, "no fcntl");
    return fd;
}

static void site_round(site *self)
{
    require(vkp_loop_run_once(self->loop, 0) == VKP_OK, "a round failed");
}

/* Compares the answers with what was asked for. Without failures all of them have to be there. */
static void check_answers(const verdict *wanted, char *text, size_t len, bool all)
{
    size_t at = 0;
    size_t i;
    text[len] = '\0';
    if (!all && strncmp(text, "HTTP/1.1 503", 12) == 0) { /* no memory for the connection */
        return;
    }
    for (i = 0; i < wanted->count && at < len; i++) {
        char *body = strstr(text + at, "\r\n\r\n");
        char *length = strstr(text + at, "\r\nContent-Length: ");
        size_t bytes;
        require(body != NULL && length != NULL && length < body, "half an answer");
        require(strncmp(text + at, "HTTP/1.1 ", 9) == 0 && atoi(text + at + 9) == wanted->status[i],
                "another status than the request asked for");
        bytes = wanted->head[i] ? 0 : strtoul(length + 18, NULL, 10);
        at = (size_t)(body + 4 - text) + bytes;
        require(at <= len, "half a body");
    }
    require(at == len, "an answer that nobody asked for");
    /* A stream that ends without a line end may hide that it is over a limit. */
    require(!all || i == wanted->count || (i + 1 == wanted->count && !wanted->whole),
            "an answer is missing");
}

/* Sends the stream in pieces and gathers the answers. */
static void check_server(const uint8_t *data, const uint8_t *stream, size_t size,
                         const verdict *wanted)
{
    site *self = site_get();
    static char text[262144];
    size_t len = 0;
    size_t sent = 0;
    size_t index = 0;
    int rounds = 0;
    bool ended = false;
    int fd;
    self->fail_every = data[0] > 1 ? data[0] : 0;
    fd = site_connect(self);
    while (!ended) {
        size_t piece = piece_len(data, index++);
        ssize_t got = recv(fd, text + len, sizeof text - 1 - len, 0);
        ended = got == 0 || (got < 0 && errno != EAGAIN);
        len += got > 0 ? (size_t)got : 0;
        piece = piece < size - sent ? piece : size - sent;
        if (piece > 0) {
            ssize_t put_bytes = send(fd, stream + sent, piece, MSG_NOSIGNAL);
            sent += put_bytes > 0 ? (size_t)put_bytes : 0;
        } else {
            (void)shutdown(fd, SHUT_WR);
        }
        site_round(self);
        require(rounds++ < 1000000, "the server neither answers nor closes");
    }
    (void)close(fd);
    check_answers(wanted, text, len, self->fail_every == 0);
    self->fail_every = 0;
    site_round(self);
    require(self->live_bytes < MOST_BYTES, "memory leaked");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    uint8_t *stream;
    verdict whole;
    verdict parts;
    if (size < HEAD || size > 100000) {
        return 0;
    }
    size -= HEAD;
    stream = (uint8_t *)malloc(size > 0 ? size : 1);
    require(stream != NULL, "the machine has no memory");
    memcpy(stream, data + HEAD, size);
    whole = read_stream(NULL, stream, size);
    parts = read_stream(data, stream, size);
    require(memcmp(&whole, &parts, sizeof whole) == 0, "in windows the stream is another one");
    if (whole.count < MOST_REQUESTS) {
        check_server(data, stream, size, &whole);
    }
    free(stream);
    return 0;
}
