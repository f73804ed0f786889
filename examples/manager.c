/* cc -I. examples/manager.c backends/vkp_backend_poll.c -pthread -o manager
   SPDX-License-Identifier: MIT

   One thread owns a client, the others send it requests: manager [--server tcp:HOST:PORT|unix:PATH]
   Without --server the manager opens a relay without a server, a pub/sub broker on the same loop.
   Threads can share a client without a manager (examples/commands.c). A manager is for decisions
   that one thread makes: an order, a cache, access rights. This manager carries out one request at
   a time. Other requests wait in a bounded channel; when the channel is full, the senders wait. */
#define VKP_IMPLEMENTATION
#include "valkey_push.h"

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define ROOM 4
#define ASKERS 8 /* more than ROOM, so that some askers wait for room */
#define QUESTIONS 100
#define PATIENCE_MS 10000

typedef struct answer { /* the value of the one-shot: at most VKP_ONESHOT_BYTES */
    vkp_status status;
    char text[40]; /* a longer reply is truncated */
} answer;

/* A request is on its asker's stack, and the channel carries a pointer: nothing is allocated. The
   asker waits without a deadline for its answer, which always arrives, once. An asker that may stop
   waiting needs a slot of vkp_oneshot_open.                                                   */
typedef struct request {
    vkp_oneshot slot;
    const char *words[3];
} request;

typedef struct manager {
    const char *server; /* NULL: the manager opens a broker */
    vkp_mpsc_rx *requests;
    vkp_handler *handler; /* of requests; NULL while a request is under way */
    vkp_loop *loop;
    vkp_relay *relay;
    vkp_client *client;
    request *asked; /* the request under way */
    unsigned answered;
} manager;

static void on_request(void *user);

/* Runs on the manager's thread, as all functions down to manage. The channel has a handler while no
   request is under way.                                                                       */
static void take_next(manager *self)
{
    vkp_case receive = vkp_case_mpsc_recv(self->requests, NULL);
    if (vkp_handler_open(self->loop, &receive, on_request, self, &self->handler) != VKP_OK) {
        vkp_loop_stop(self->loop);
    }
}

/* Called once for every command; without a reply the status is DISCONNECTED or another error. */
static void on_reply(void *user, vkp_status status, const vkp_value *value, const vkp_bytes *frame)
{
    manager *self = (manager *)user;
    answer reply = {.status = status};
    (void)frame;
    if (status == VKP_OK && value->type == VKP_RESP_INTEGER) {
        (void)snprintf(reply.text, sizeof reply.text, "%" PRId64, value->u.integer);
    } else if (status == VKP_OK) {
        (void)snprintf(reply.text, sizeof reply.text, "%.*s", VKP_FMT(vkp_value_get_str(value)));
        reply.status = value->type == VKP_RESP_ERROR ? VKP_ERR_REFUSED : VKP_OK;
    }
    /* The asker's wait ends with the send: after the send its request may no longer be used. */
    self->answered += vkp_oneshot_send(&self->asked->slot, &reply) == VKP_OK;
    if (status != VKP_ERR_CLOSED) { /* CLOSED: manage closed the client */
        take_next(self);
    }
}

static void on_request(void *user)
{
    manager *self = (manager *)user;
    vkp_resp_writer writer;
    vkp_bytes command;
    vkp_status status = vkp_mpsc_try_recv(self->requests, &self->asked);
    size_t count, i;
    if (status == VKP_ERR_CLOSED) { /* no sender is left, nothing is queued */
        vkp_loop_stop(self->loop);
    }
    if (status != VKP_OK) {
        return;
    }
    vkp_handler_unref(self->handler);
    self->handler = NULL;
    count = self->asked->words[2] != NULL ? 3 : 2;
    vkp_resp_writer_init(&writer, NULL);
    vkp_resp_put_aggregate(&writer, VKP_RESP_ARRAY, count);
    for (i = 0; i < count; i++) {
        vkp_resp_put_bulk(&writer, self->asked->words[i], strlen(self->asked->words[i]));
    }
    status = vkp_resp_writer_take(&writer, &command);
    if (status == VKP_OK) {
        status = vkp_client_send(self->client, &command, 1, on_reply, self);
        vkp_bytes_unref(&command);
    }
    if (status != VKP_OK) {
        on_reply(self, status, NULL, NULL);
    }
}

static vkp_status open_client(manager *self)
{
    vkp_loop_config on = {.backend = &vkp_backend_poll};
    vkp_relay_config broker = {.loops = &self->loop};
    vkp_client_config to = {.address = vkp_str_of(self->server)};
    vkp_status status = vkp_loop_open(&on, &self->loop);
    if (status == VKP_OK && self->server == NULL) {
        status = vkp_relay_open(&broker, &self->relay);
    }
    if (status == VKP_OK && self->server == NULL) {
        const char *bound;
        status = vkp_relay_listen(self->relay, vkp_str_of("tcp:127.0.0.1:0"), &bound);
        if (status == VKP_OK) {
            to.address = vkp_str_of(bound);
        }
    }
    return status == VKP_OK ? vkp_client_open(self->loop, &to, &self->client) : status;
}

/* Requests wait in the channel until the client is connected, at most PATIENCE_MS. After that, and
   in later outages, the client refuses commands (DISCONNECTED), which is an answer too.       */
static void *manage(void *user)
{
    manager *self = (manager *)user;
    uint64_t deadline = vkp_after_ms(PATIENCE_MS);
    vkp_status status = open_client(self);
    while (status == VKP_OK && vkp_client_get_state(self->client) != VKP_CLIENT_READY &&
           vkp_now_ns() < deadline) {
        status = vkp_loop_run_once(self->loop, deadline);
    }
    if (status == VKP_OK) {
        take_next(self);
        status = vkp_loop_run(self->loop);
    }
    if (status != VKP_OK) {
        fprintf(stderr, "manager: %s: %s\n", self->server != NULL ? self->server : "broker",
                status == VKP_ERR_SYS ? strerror(errno) : vkp_status_str(status));
    }
    vkp_client_unref(self->client); /* a request under way gets the answer CLOSED */
    vkp_handler_unref(self->handler);
    vkp_mpsc_rx_unref(self->requests); /* calls drop_request for each queued request */
    vkp_relay_unref(self->relay);
    vkp_loop_close(self->loop);
    vkp_loop_unref(self->loop);
    return NULL;
}

/* The channel's `drop`: the asker of a request that is not received gets CLOSED. */
static void drop_request(void *user, void *item)
{
    (void)user;
    vkp_oneshot_abandon(&(*(request **)item)->slot);
}

static vkp_status put(vkp_mpsc_tx *tx, request *asked, uint64_t deadline_ns)
{
    vkp_status status = vkp_oneshot_init(&asked->slot, NULL, sizeof(answer), NULL, NULL);
    return status == VKP_OK ? vkp_mpsc_send(tx, &asked, deadline_ns) : status;
}

/* Waits without a deadline: the manager may use the slot until it has answered. */
static bool is_answered(request *asked, const char *expected)
{
    answer got;
    return vkp_oneshot_recv(&asked->slot, VKP_FOREVER, &got) == VKP_OK && got.status == VKP_OK &&
           (expected == NULL || strcmp(got.text, expected) == 0);
}

static bool ask(vkp_mpsc_tx *tx, const char *verb, const char *name, const char *value,
                const char *expected)
{
    request asked = {.words = {verb, name, value}};
    return put(tx, &asked, vkp_after_ms(PATIENCE_MS)) == VKP_OK && is_answered(&asked, expected);
}

typedef struct asker {
    pthread_t thread;
    vkp_mpsc_tx *tx; /* the asker's own reference */
    const char *key; /* a counter; NULL without a server: the broker has no keys */
    unsigned number;
    unsigned right;
} asker;

static void *run_asker(void *user)
{
    asker *self = (asker *)user;
    char text[40];
    unsigned i;
    for (i = 0; i < QUESTIONS; i++) {
        (void)snprintf(text, sizeof text, "asker %u, question %u", self->number, i);
        self->right += ask(self->tx, "ECHO", text, NULL, text) &&
                       (self->key == NULL || ask(self->tx, "INCR", self->key, NULL, NULL));
    }
    vkp_mpsc_tx_unref(self->tx);
    return NULL;
}

int main(int argc, char **argv)
{
    vkp_mpsc_config few = {
        .elem_bytes = sizeof(request *), .capacity_items = ROOM, .drop = drop_request};
    manager boss = {.server = argc == 3 && strcmp(argv[1], "--server") == 0 ? argv[2] : NULL};
    request early[ROOM + 1];
    asker askers[ASKERS];
    pthread_t thread;
    vkp_mpsc_tx *tx;
    vkp_status status;
    char key[48], total[16];
    unsigned queued = 0, started, i;
    bool right;
    if (argc != 1 && boss.server == NULL) {
        fputs("usage: manager [--server tcp:HOST:PORT|unix:PATH]\n", stderr);
        return 2;
    }
    status = vkp_mpsc_open(&few, &tx, &boss.requests);
    while (queued <= ROOM && status == VKP_OK) { /* the manager does not run yet */
        early[queued] = (request){.words = {"ECHO", "early"}};
        status = put(tx, &early[queued], 0);
        queued += status == VKP_OK;
    }
    printf("%u requests wait; one more: %s\n", queued, vkp_status_str(status));
    if (queued == 0 || pthread_create(&thread, NULL, manage, &boss) != 0) {
        return 1;
    }
    right = queued == ROOM;
    while (queued > 0) {
        right = is_answered(&early[--queued], "early") && right;
    }
    (void)snprintf(key, sizeof key, "vkp:example:manager:%ld", (long)getpid());
    (void)snprintf(total, sizeof total, "%d", ASKERS * QUESTIONS);
    right = right && (boss.server == NULL || ask(tx, "SET", key, "0", "OK"));
    for (started = 0; started < ASKERS; started++) {
        askers[started] = (asker){.key = boss.server != NULL ? key : NULL, .number = started};
        askers[started].tx = vkp_mpsc_tx_ref(tx);
        if (pthread_create(&askers[started].thread, NULL, run_asker, &askers[started]) != 0) {
            vkp_mpsc_tx_unref(tx);
            break;
        }
    }
    for (i = 0; i < started; i++) {
        (void)pthread_join(askers[i].thread, NULL);
        printf("asker %u: %u of %u answers right\n", i, askers[i].right, QUESTIONS);
        right = right && askers[i].right == QUESTIONS && started == ASKERS;
    }
    right = right && (boss.server == NULL || ask(tx, "GET", key, NULL, total));
    right = (boss.server == NULL || ask(tx, "DEL", key, NULL, "1")) && right;
    vkp_mpsc_tx_unref(tx); /* the last reference: the manager ends when the channel is empty */
    (void)pthread_join(thread, NULL);
    printf("the manager has ended: %u answers, %s\n", boss.answered, right ? "right" : "WRONG");
    return right ? 0 : 1;
}
