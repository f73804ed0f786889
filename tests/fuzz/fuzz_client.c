/* A client whose server is the input. An input is a head of two bytes and a script:
       0     bit 0: protocol 2; bits 1 and up: 0, or every n-th allocation fails
       1     bits 0 to 3: the longest piece in which the server's bytes arrive, less one
   In the script every byte is one that the server says, but for 0xff, which the next byte explains:
       'h' greets as a server of RESP3   'o' says OK                'x' hangs up
       's' 'p' 'd' the program subscribes to a channel, a pattern, a shard channel
       'u' 'q' 'e' the program unsubscribes     'c' sends a command        't' lets time pass
       'S' 'P' 'D' 'U' 'Q' 'E' the server confirms that                    'f' says 0xff
   Whatever the server says: each command and each subscription has one outcome, a push has the
   bytes of one frame, and at the end nothing is left. Sockets come from socketpair through a table
   of system calls of our own.
   SPDX-License-Identifier: MIT                                                                  */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE 1
#elif defined(__APPLE__) && !defined(_DARWIN_C_SOURCE)
#define _DARWIN_C_SOURCE 1
#endif
#include "valkey_push.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define HEAD 2u
#define MOST_CALLS 64
#define SCRIPT 0xff

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void require(bool condition, const char *what)
{
    if (!condition) {
        fprintf(stderr, "fuzz_client: %s\n", what);
        abort();
    }
}

/* ---- memory: counted, and failing on demand ---- */

static size_t live_bytes;
static size_t asked;
static size_t fail_every;

static void *count_alloc(void *user, void *ptr, size_t old_bytes, size_t new_bytes)
{
    void *grown;
    (void)user;
    if (new_bytes == 0) {
        live_bytes -= old_bytes;
        free(ptr);
        return NULL;
    }
    asked++;
    if (new_bytes > old_bytes && fail_every != 0 && asked % fail_every == 0) {
        return NULL;
    }
    grown = realloc(ptr, new_bytes);
    require(grown != NULL, "the machine has no memory");
    live_bytes = live_bytes - old_bytes + new_bytes;
    return grown;
}

/* ---- the server's end of the newest connection ---- */

static int server = -1;

static void hang_up(void)
{
    if (server >= 0) {
        (void)close(server);
        server = -1;
    }
}

static int give_socket(int family, int type)
{
    int fds[2];
    (void)family;
    (void)type;
    require(socketpair(AF_UNIX, SOCK_STREAM, 0, fds) == 0, "no socketpair");
    require(vkp_sys_get_default()->prepare(fds[0]) == 0 &&
                vkp_sys_get_default()->prepare(fds[1]) == 0,
            "a socket cannot be prepared");
    hang_up();
    server = fds[1];
    return fds[0];
}

static int accept_connect(int fd, const void *address, uint32_t bytes)
{
    (void)fd;
    (void)address;
    (void)bytes;
    return 0;
}

static uint64_t give_random(void)
{
    return 4;
}

/* What the client says is read and not looked at. */
static void listen_to_client(void)
{
    char bin[4096];
    while (server >= 0 && read(server, bin, sizeof bin) > 0) {
    }
}

static void say(const void *bytes, size_t len)
{
    if (server >= 0 && len > 0) {
        (void)!write(server, bytes, len); /* what does not fit is lost: the client is hung up on */
    }
}

/* ---- the program ---- */

typedef struct call {
    int outcomes;
} call;

static call calls[MOST_CALLS];
static size_t call_count;

static void on_done(void *user, vkp_status status, vkp_str words)
{
    volatile char sum = 0;
    size_t i;
    (void)status;
    for (i = 0; i < words.len; i++) {
        sum = (char)(sum ^ words.ptr[i]);
    }
    ((call *)user)->outcomes++;
}

static void on_reply(void *user, vkp_status status, const vkp_value *value, const vkp_bytes *frame)
{
    (void)value;
    require((status == VKP_OK) == (frame != NULL), "a reply without a frame");
    require(frame == NULL || vkp_resp_get_frame_len(frame->data, frame->len) == frame->len,
            "a reply of no whole frame");
    ((call *)user)->outcomes++;
}

static void on_push(void *user, const vkp_push *push)
{
    (void)user;
    require(push->kind < VKP_PUSH_CONNECTED || push->frame.len == 0, "an event with bytes");
    require(push->frame.len == 0 ||
                vkp_resp_get_frame_len(push->frame.data, push->frame.len) == push->frame.len,
            "a push of no whole frame");
    require((push->kind == VKP_PUSH_GAP) == (push->gap != NULL), "a gap without its times");
    require(push->gap == NULL || push->gap->from_ns <= push->gap->to_ns, "a gap that runs back");
}

static void subscribe(vkp_client *client, vkp_sub_kind kind)
{
    if (call_count < MOST_CALLS && vkp_client_subscribe_then(client, kind, vkp_str_of("n"), on_done,
                                                             &calls[call_count]) == VKP_OK) {
        call_count++;
    }
}

static void command(vkp_client *client)
{
    vkp_bytes get = vkp_bytes_static("*1\r\n$1\r\nX\r\n", 11);
    if (call_count < MOST_CALLS &&
        vkp_client_send(client, &get, 1, on_reply, &calls[call_count]) == VKP_OK) {
        call_count++;
    }
}

/* ---- the script ---- */

static void confirm(const char *verb)
{
    char text[64];
    int len =
        snprintf(text, sizeof text, ">3\r\n$%zu\r\n%s\r\n$1\r\nn\r\n:1\r\n", strlen(verb), verb);
    say(text, (size_t)len);
}

static void act(vkp_loop *loop, vkp_client *client, uint8_t what)
{
    static const char *const verbs = "SPDUQE";
    static const char *const confirmations[] = {"subscribe",   "psubscribe",   "ssubscribe",
                                                "unsubscribe", "punsubscribe", "sunsubscribe"};
    const char *found = what != 0 ? strchr(verbs, what) : NULL;
    if (found != NULL) {
        confirm(confirmations[found - verbs]);
    } else if (what == 'h') {
        say("%2\r\n+proto\r\n:3\r\n+id\r\n:7\r\n", 23);
    } else if (what == 'o') {
        say("+OK\r\n", 5);
    } else if (what == 'f') {
        say("\xff", 1);
    } else if (what == 'x') {
        hang_up();
    } else if (what == 's' || what == 'p' || what == 'd') {
        subscribe(client, what == 's'   ? VKP_SUB_CHANNEL
                          : what == 'p' ? VKP_SUB_PATTERN
                                        : VKP_SUB_SHARD);
    } else if (what == 'u' || what == 'q' || what == 'e') {
        (void)!vkp_client_unsubscribe(client,
                                      what == 'u'   ? VKP_SUB_CHANNEL
                                      : what == 'q' ? VKP_SUB_PATTERN
                                                    : VKP_SUB_SHARD,
                                      vkp_str_of("n"));
    } else if (what == 'c') {
        command(client);
    } else if (what == 't') {
        (void)!vkp_loop_run_once(loop, vkp_loop_after_ms(loop, 7000));
    }
}

static void run(vkp_loop *loop, vkp_client *client, const uint8_t *script, size_t len, size_t piece)
{
    size_t at = 0;
    while (at < len) {
        size_t end = at;
        while (end < len && script[end] != SCRIPT && end - at < piece) {
            end++;
        }
        if (end > at) {
            say(script + at, end - at);
            at = end;
        } else if (at + 1 < len) {
            act(loop, client, script[at + 1]);
            at += 2;
        } else {
            at++;
        }
        (void)!vkp_loop_run_once(loop, 0);
        listen_to_client();
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    vkp_sys sys = *vkp_sys_get_default();
    vkp_env env = VKP_ZERO;
    vkp_loop_config loop_config = VKP_ZERO;
    vkp_client_config config = VKP_ZERO;
    vkp_loop *loop;
    vkp_client *client;
    size_t i;
    if (size < HEAD) {
        return 0;
    }
    (void)signal(SIGPIPE, SIG_IGN);
    sys.socket = give_socket;
    sys.connect = accept_connect;
    sys.random_u64 = give_random;
    env.alloc = count_alloc;
    env.sys = &sys;
    live_bytes = 0;
    asked = 0;
    fail_every = 0;
    call_count = 0;
    memset(calls, 0, sizeof calls);
    loop_config.backend = &vkp_backend_null;
    loop_config.env = &env;
    config.address = vkp_str_of("unix:/nobody");
    config.protocol = (data[0] & 1) != 0 ? 2 : 0;
    config.on_push = on_push;
    config.resp.max_depth = 8;
    config.resp.max_line_bytes = 64;
    require(vkp_loop_open(&loop_config, &loop) == VKP_OK, "no loop");
    require(vkp_client_open(loop, &config, &client) == VKP_OK, "no client");
    fail_every = data[0] >> 1;
    (void)!vkp_loop_run_once(loop, 0);
    run(loop, client, data + HEAD, size - HEAD, (data[1] & 15u) + 1u);
    fail_every = 0;
    vkp_client_unref(client);
    for (i = 0; i < call_count; i++) {
        require(calls[i].outcomes == 1, "not one outcome for each call");
    }
    vkp_loop_close(loop);
    vkp_loop_unref(loop);
    hang_up();
    require(live_bytes == 0, "memory is left");
    return 0;
}
