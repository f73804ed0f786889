/* cc -O2 -I. examples/demo_client.c backends/vkp_backend_poll.c -pthread -o build/demo_client
   SPDX-License-Identifier: MIT

   The clients of examples/demo.sh, for machines without redis-cli: subscribe, send a command, share
   a listening socket. One thread and one loop receive replies and pushes.                     */
#define VKP_IMPLEMENTATION
#include "valkey_push.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PATIENCE_MS 20000
#define MOST_WORDS 32

static const char usage[] =
    "demo_client subscribe WHO ADDRESS channel|pattern NAME COUNT\n"
    "    print what arrives, a line each that begins with WHO; end after COUNT messages\n"
    "demo_client ask ADDRESS COMMAND [ARGUMENT ...]\n"
    "    send one command, print its reply\n"
    "demo_client share PATH\n"
    "    hold three references to one listening socket, and give them back one by one\n";

typedef struct subscriber {
    const char *who;
    unsigned long missing; /* messages not received yet */
} subscriber;

/* Flushes after each push: the reader at the other end of the pipe waits for each line. */
static void on_push(void *user, const vkp_push *push)
{
    subscriber *self = (subscriber *)user;
    if (push->kind == VKP_PUSH_SUBSCRIBED) {
        printf("%s subscribed to %.*s\n", self->who, VKP_FMT(push->channel));
    } else if (push->kind == VKP_PUSH_MESSAGE || push->kind == VKP_PUSH_PMESSAGE) {
        printf("%s received %.*s from %.*s\n", self->who, VKP_FMT(push->payload),
               VKP_FMT(push->channel));
        self->missing -= self->missing > 0 ? 1 : 0;
    }
    fflush(stdout);
}

static int fail(const char *what, const char *why)
{
    fprintf(stderr, "demo_client: %s: %s\n", what, why);
    return 1;
}

static int subscribe(vkp_loop *loop, char **words)
{
    vkp_client_config config = VKP_ZERO;
    vkp_client *client;
    subscriber self = VKP_ZERO;
    vkp_sub_kind kind = strcmp(words[2], "pattern") == 0 ? VKP_SUB_PATTERN : VKP_SUB_CHANNEL;
    uint64_t deadline = vkp_after_ms(PATIENCE_MS);
    vkp_status status;
    self.who = words[0];
    self.missing = strtoul(words[4], NULL, 10);
    config.address = vkp_str_of(words[1]);
    config.on_push = on_push;
    config.user = &self;
    status = vkp_client_open(loop, &config, &client);
    if (status != VKP_OK) {
        return fail(words[1], vkp_status_str(status));
    }
    status = vkp_client_subscribe(client, kind, vkp_str_of(words[3]));
    while (status == VKP_OK && self.missing > 0 && vkp_now_ns() < deadline) {
        status = vkp_loop_run_once(loop, deadline);
    }
    vkp_client_unref(client);
    if (status != VKP_OK) {
        return fail(words[1], vkp_status_str(status));
    }
    return self.missing == 0 ? 0 : fail(self.who, "messages did not arrive in time");
}

static void print_value(const vkp_value *value)
{
    const vkp_value *each;
    const char *gap = "";
    switch (value->type) {
    case VKP_RESP_ARRAY:
    case VKP_RESP_SET:
    case VKP_RESP_MAP:
        for (each = vkp_value_get_first(value); each != NULL;
             each = vkp_value_get_next(value, each)) {
            fputs(gap, stdout);
            print_value(each);
            gap = " ";
        }
        break;
    case VKP_RESP_INTEGER:
    case VKP_RESP_BOOL:
        printf("%lld", (long long)value->u.integer);
        break;
    default:
        printf("%.*s", VKP_FMT(vkp_value_get_str(value)));
        break;
    }
}

/* A command needs no callback: its reply arrives in a slot on this stack while the loop runs. */
static int ask(vkp_loop *loop, char **words, size_t count)
{
    vkp_client_config config = VKP_ZERO;
    vkp_client *client;
    vkp_oneshot slot;
    vkp_reply *reply;
    vkp_str command[MOST_WORDS];
    uint64_t deadline = vkp_after_ms(PATIENCE_MS);
    char why[128];
    vkp_status status;
    size_t i;
    int code = 0;
    for (i = 1; i < count; i++) {
        command[i - 1] = vkp_str_of(words[i]);
    }
    config.address = vkp_str_of(words[0]);
    status = vkp_client_open(loop, &config, &client);
    if (status != VKP_OK) {
        return fail(words[0], vkp_status_str(status));
    }
    status = vkp_client_command_argv(client, &slot, count - 1, command);
    if (status == VKP_OK) {
        while ((status = vkp_oneshot_try_recv(&slot, &reply)) == VKP_ERR_EMPTY &&
               vkp_now_ns() < deadline && vkp_loop_run_once(loop, deadline) == VKP_OK) {
        }
        vkp_oneshot_close(&slot);
    }
    if (status == VKP_OK) {
        const vkp_value *value = vkp_reply_get_value(reply);
        print_value(value);
        putchar('\n');
        code = value->type == VKP_RESP_ERROR ? 1 : 0;
        vkp_reply_unref(reply);
    } else {
        vkp_client_get_error(client, why, sizeof why);
        code = fail(words[0], why[0] != '\0' ? why : vkp_status_str(status));
    }
    vkp_client_unref(client);
    return code;
}

static int share(const char *path)
{
    vkp_registry *registry;
    vkp_socket *sockets[3];
    size_t count = 0;
    vkp_status status = vkp_registry_open(NULL, &registry);
    if (status != VKP_OK) {
        return fail("registry", vkp_status_str(status));
    }
    while (count < 3 && status == VKP_OK) {
        status = vkp_socket_open(registry, vkp_str_of(path), &sockets[count]);
        if (status == VKP_OK) {
            count++;
            printf("%u taken, the file is %s\n", (unsigned)count,
                   access(path, F_OK) == 0 ? "there" : "gone");
        } else {
            (void)fail(path, status == VKP_ERR_SYS ? strerror(errno) : vkp_status_str(status));
        }
    }
    while (count > 0) {
        vkp_socket_unref(sockets[--count]);
        printf("%u left, the file is %s\n", (unsigned)count,
               access(path, F_OK) == 0 ? "there" : "gone");
    }
    vkp_registry_unref(registry);
    return status == VKP_OK ? 0 : 1;
}

int main(int argc, char **argv)
{
    vkp_loop_config config = VKP_ZERO;
    vkp_loop *loop;
    int code = 2;
    config.backend = &vkp_backend_poll;
    if (vkp_loop_open(&config, &loop) != VKP_OK) {
        return fail("event loop", strerror(errno));
    }
    if (argc == 7 && strcmp(argv[1], "subscribe") == 0) {
        code = subscribe(loop, argv + 2);
    } else if (argc > 3 && argc - 3 <= MOST_WORDS && strcmp(argv[1], "ask") == 0) {
        code = ask(loop, argv + 2, (size_t)argc - 2);
    } else if (argc == 3 && strcmp(argv[1], "share") == 0) {
        code = share(argv[2]);
    } else {
        fputs(usage, stderr);
    }
    vkp_loop_close(loop);
    vkp_loop_unref(loop);
    return code;
}
