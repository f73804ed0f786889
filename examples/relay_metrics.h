/* The HTTP server of valkey-push-relay, which examples/relay.c includes: /metrics for Prometheus,
   /healthz, a page for people, and the counters that SIGUSR1 prints: collect() is the one list of
   them.
   SPDX-License-Identifier: MIT                                                                  */
#ifndef RELAY_METRICS_H
#define RELAY_METRICS_H

#include "valkey_push.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "relay_page.h"

#define HEALTH_MS 1000 /* how long /healthz waits for the server */

typedef struct web {
    vkp_http *http;
    vkp_relay *relay;
    vkp_loop *loop;
    bool has_server;
    uint64_t began_ms; /* milliseconds since 1970 */
    vkp_bytes page;
} web;

/* ---- the counters ---- */

/* One number, with its name in each of the forms. */
typedef struct counter {
    const char *name;   /* for SIGUSR1 and the page */
    const char *family; /* for Prometheus; NULL: it is in another form there */
    const char *labels; /* for Prometheus; "": none */
    const char *help;   /* of the family; NULL: as before */
    uint64_t value;
} counter;

#define MOST_COUNTERS 80

typedef struct counters {
    counter all[MOST_COUNTERS];
    size_t count;
} counters;

static void add(counters *to, const char *name, const char *family, const char *labels,
                const char *help, uint64_t value)
{
    counter *next = &to->all[to->count++];
    next->name = name;
    next->family = family;
    next->labels = labels;
    next->help = help;
    next->value = value;
}

static uint64_t count_replies(const vkp_relay_times *times)
{
    uint64_t sum = 0;
    size_t i;
    for (i = 0; i < VKP_RELAY_TIMES; i++) {
        sum += times->within[i];
    }
    return sum;
}

static void collect_clients(counters *to, const vkp_relay_survey *from)
{
    static const char refused[] = "vkp_clients_refused_total";
    static const char closed[] = "vkp_clients_closed_total";
    static const char state[] = "vkp_clients_by_state";
    const vkp_relay_stats *stats = &from->stats;
    add(to, "clients", "vkp_clients", "", "Clients now.", stats->clients);
    add(to, "clients_slow", state, "state=\"slow\"",
        "Clients by what they do; each is in the first state that fits.",
        from->clients[VKP_RELAY_CLIENT_SLOW]);
    add(to, "clients_waiting", state, "state=\"waiting\"", NULL,
        from->clients[VKP_RELAY_CLIENT_WAITING]);
    add(to, "clients_private", state, "state=\"private\"", NULL,
        from->clients[VKP_RELAY_CLIENT_PRIVATE]);
    add(to, "clients_subscribed", state, "state=\"subscribed\"", NULL,
        from->clients[VKP_RELAY_CLIENT_SUBSCRIBED]);
    add(to, "clients_idle", state, "state=\"idle\"", NULL, from->clients[VKP_RELAY_CLIENT_IDLE]);
    add(to, "accepted", "vkp_clients_accepted_total", "", "Clients that were accepted.",
        stats->accepted);
    add(to, "refused_user", refused, "reason=\"user\"", "Clients that were refused.",
        stats->refused[VKP_REFUSAL_USER]);
    add(to, "refused_full", refused, "reason=\"full\"", NULL, stats->refused[VKP_REFUSAL_FULL]);
    add(to, "refused_user_full", refused, "reason=\"user_full\"", NULL,
        stats->refused[VKP_REFUSAL_USER_FULL]);
    add(to, "refused_overload", refused, "reason=\"overload\"", NULL,
        stats->refused[VKP_REFUSAL_OVERLOAD]);
    add(to, "refused_ended", refused, "reason=\"ended\"", NULL, stats->refused[VKP_REFUSAL_ENDED]);
    add(to, "slow_closed", closed, "reason=\"slow\"", "Clients that the relay disconnected.",
        stats->slow_closed);
    add(to, "protocol_errors", closed, "reason=\"protocol\"", NULL, stats->protocol_errors);
    add(to, "lost", closed, "reason=\"upstream\"", NULL, stats->lost);
    add(to, "queued_bytes", "vkp_queued_bytes", "", "Bytes that wait for clients.",
        from->queued_bytes);
}

static void collect_messages(counters *to, const vkp_relay_stats *stats)
{
    static const char dropped[] = "vkp_messages_dropped_total";
    add(to, "messages_in", "vkp_messages_total", "",
        "Messages from the server; without one, from PUBLISH.", stats->messages_in);
    add(to, "deliveries", "vkp_deliveries_total", "", "Messages to clients.", stats->deliveries);
    add(to, "dropped_frames", dropped, "reason=\"queue_full\"", "Messages that were dropped.",
        stats->dropped_frames);
    add(to, "lagged", dropped, "reason=\"loop_behind\"", NULL, stats->lagged);
}

static void collect_upstream(counters *to, const vkp_relay_stats *stats)
{
    static const char commands[] = "vkp_commands_total";
    add(to, "connected", "vkp_upstream_connected", "",
        "Whether all shared connections to the server are there.", stats->connected ? 1 : 0);
    add(to, "connected_since", "vkp_upstream_since_seconds", "",
        "When vkp_upstream_connected changed, seconds since 1970.", stats->since_unix_ms / 1000);
    add(to, "outages", "vkp_upstream_outages_total", "", "Shared connections that were lost.",
        stats->outages);
    add(to, "reconnects", "vkp_upstream_reconnects_total", "",
        "Shared connections in place of lost ones.", stats->reconnects);
    add(to, "gaps", "vkp_gaps_total", "", "Times in which messages may have been lost.",
        stats->gaps);
    add(to, "refusals", "vkp_subscriptions_refused_total", "",
        "Subscriptions that the server refused.", stats->refusals);
    add(to, "commands_shared", commands, "connection=\"shared\"",
        "Commands of clients, by the connection that carried them.",
        stats->commands[VKP_RELAY_SHARED]);
    add(to, "commands_private", commands, "connection=\"private\"", NULL,
        stats->commands[VKP_RELAY_PRIVATE]);
    add(to, "commands_push", commands, "connection=\"push\"", NULL,
        stats->commands[VKP_RELAY_PUSH]);
    add(to, "commands_here", commands, "connection=\"none\"", NULL,
        stats->commands[VKP_RELAY_HERE]);
    add(to, "in_flight", "vkp_commands_in_flight", "", "Commands whose replies the server owes.",
        stats->in_flight);
    add(to, "replies_shared", NULL, "", NULL, count_replies(&stats->replies[0]));
    add(to, "replies_shared_ns", NULL, "", NULL, stats->replies[0].total_ns);
    add(to, "replies_private", NULL, "", NULL, count_replies(&stats->replies[1]));
    add(to, "replies_private_ns", NULL, "", NULL, stats->replies[1].total_ns);
    add(to, "privates", "vkp_private_connections", "",
        "Connections to the server that carry one client, or wait for one.", stats->privates);
    add(to, "privates_opened", "vkp_private_connections_opened_total", "",
        "Such connections that were opened.", stats->privates_opened);
    add(to, "privates_refused", "vkp_private_connections_refused_total", "",
        "Commands that were denied for want of such a connection.", stats->privates_refused);
    add(to, "gathered_bytes", "vkp_gathered_bytes", "",
        "Bytes of commands that count against --gather-bytes.", stats->gathered_bytes);
}

static void collect_sockets(counters *to, vkp_relay *relay)
{
    vkp_registry_stats stats;
    vkp_registry_get_stats(vkp_relay_get_registry(relay), &stats);
    add(to, "sockets_live", "vkp_sockets", "", "Unix sockets now.", stats.live);
    add(to, "sockets_references", "vkp_sockets_references", "", "References to them.",
        stats.references);
    add(to, "sockets_created", "vkp_sockets_created_total", "", "Unix sockets that were created.",
        stats.created);
    add(to, "sockets_taken_over", "vkp_sockets_taken_over_total", "",
        "Of those, in place of a dead process's.", stats.taken_over);
    add(to, "sockets_revived", "vkp_sockets_revived_total", "", "Sockets that lingered and stayed.",
        stats.revived);
    add(to, "sockets_ended", "vkp_sockets_ended_total", "", "Unix sockets that ended.",
        stats.ended);
    add(to, "sockets_handed_over", "vkp_sockets_handed_over_total", "",
        "Ends that another thread finished.", stats.handed_over);
    add(to, "sockets_unlink_failures", "vkp_sockets_unlink_failures_total", "",
        "Files that could not be removed.", stats.unlink_failures);
    add(to, "sockets_unlink_errno", NULL, "", NULL, (uint64_t)stats.unlink_errno);
    add(to, "sockets_lost", "vkp_sockets_lost_total", "", "Files found gone or replaced.",
        stats.lost);
    add(to, "sockets_rebound", "vkp_sockets_rebound_total", "", "Of those, created again.",
        stats.rebound);
    add(to, "sockets_cleanup_last_ns", NULL, "", NULL, stats.cleanup_last_ns);
    add(to, "sockets_cleanup_most_ns", NULL, "", NULL, stats.cleanup_most_ns);
    add(to, "sockets_cleanup_total_ns", NULL, "", NULL, stats.cleanup_total_ns);
}

static void collect(counters *to, vkp_relay *relay, const vkp_relay_survey *from)
{
    to->count = 0;
    collect_clients(to, from);
    collect_messages(to, &from->stats);
    collect_upstream(to, &from->stats);
    collect_sockets(to, relay);
}

/* SIGUSR1. user: the relay. */
static void print_counters(void *user, const vkp_relay_survey *survey)
{
    counters found;
    size_t i;
    if (survey == NULL) {
        fputs("valkey-push-relay: no memory for the counters\n", stderr);
        return;
    }
    collect(&found, (vkp_relay *)user, survey);
    for (i = 0; i < found.count; i++) {
        fprintf(stderr, "%s %llu\n", found.all[i].name, (unsigned long long)found.all[i].value);
    }
}

/* ---- text ---- */

__attribute__((format(printf, 2, 3))) static void put(vkp_resp_writer *out, const char *format, ...)
{
    char text[512]; /* longer than all that is put; hostile texts go through put_text */
    va_list arguments;
    int len;
    va_start(arguments, format);
    len = vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    vkp_resp_put_raw(out, text, len < (int)sizeof text ? (size_t)len : sizeof text - 1);
}

/* The length of the UTF-8 character at the beginning; 0: none, or one that is not to be seen: of
   control, or of direction, which would let a name look like another one. */
static size_t printable_len(vkp_str text)
{
    const unsigned char *at = (const unsigned char *)text.ptr;
    size_t len = at[0] < 0x80 ? 1 : at[0] < 0xc2 ? 0 : at[0] < 0xe0 ? 2 : at[0] < 0xf0 ? 3 : 4;
    uint32_t code = len < 2 ? at[0] : at[0] & (0xffu >> (len + 1));
    size_t i;
    if (len == 0 || len > text.len || at[0] > 0xf4) {
        return 0;
    }
    for (i = 1; i < len; i++) {
        if ((at[i] & 0xc0) != 0x80) {
            return 0;
        }
        code = code << 6 | (at[i] & 0x3fu);
    }
    if (code < 0x20 || (code >= 0x7f && code < 0xa0) || (len == 3 && code < 0x800) ||
        (code >= 0xd800 && code < 0xe000) || (len == 4 && code < 0x10000) || code > 0x10ffff ||
        (code >= 0x200b && code <= 0x200f) || (code >= 0x2028 && code <= 0x202e) ||
        (code >= 0x2060 && code <= 0x206f) || code == 0x61c || code == 0xfeff || code == 0xad) {
        return 0;
    }
    return len;
}

/* Put any bytes between quotes, for JSON and for a label of Prometheus, which escape alike what is
   left here: bytes that cannot be seen become \xNN, and a backslash two, so that no two texts look
   the same. */
static void put_text(vkp_resp_writer *out, vkp_str text)
{
    put(out, "\"");
    while (text.len > 0) {
        size_t len = printable_len(text);
        if (len == 0) {
            put(out, "\\\\x%02x", (unsigned)(unsigned char)text.ptr[0]);
            len = 1;
        } else if (text.ptr[0] == '\\') {
            put(out, "\\\\\\\\");
        } else if (text.ptr[0] == '"') {
            put(out, "\\\"");
        } else {
            vkp_resp_put_raw(out, text.ptr, len);
        }
        text.ptr += len;
        text.len -= len;
    }
    put(out, "\"");
}

/* ---- /metrics ---- */

static bool is_total(const char *family)
{
    size_t len = strlen(family);
    return len > 6 && strcmp(family + len - 6, "_total") == 0;
}

static void put_family(vkp_resp_writer *out, const char *family, const char *help)
{
    put(out, "# HELP %s %s\n# TYPE %s %s\n", family, help, family,
        is_total(family) ? "counter" : "gauge");
}

/* The bounds are exact: 2^14 ns and on, as vkp_relay_times counts. */
static void put_times(vkp_resp_writer *out, const char *connection, const vkp_relay_times *times)
{
    static const char name[] = "vkp_reply_seconds";
    uint64_t sum = 0;
    size_t i;
    for (i = 0; i + 1 < VKP_RELAY_TIMES; i++) {
        uint64_t most_ns = (uint64_t)1 << (14 + i);
        sum += times->within[i];
        put(out, "%s_bucket{connection=\"%s\",le=\"%llu.%09llu\"} %llu\n", name, connection,
            (unsigned long long)(most_ns / 1000000000), (unsigned long long)(most_ns % 1000000000),
            (unsigned long long)sum);
    }
    sum += times->within[i];
    put(out, "%s_bucket{connection=\"%s\",le=\"+Inf\"} %llu\n", name, connection,
        (unsigned long long)sum);
    put(out, "%s_sum{connection=\"%s\"} %llu.%09llu\n", name, connection,
        (unsigned long long)(times->total_ns / 1000000000),
        (unsigned long long)(times->total_ns % 1000000000));
    put(out, "%s_count{connection=\"%s\"} %llu\n", name, connection, (unsigned long long)sum);
}

static void put_listeners(vkp_resp_writer *out, const vkp_relay_survey *survey)
{
    static const char *const families[] = {"vkp_listener_clients", "vkp_listener_accepted_total",
                                           "vkp_listener_refused_total"};
    static const char *const helps[] = {"Clients of a listener now.",
                                        "Clients that a listener accepted.",
                                        "Clients that a listener refused."};
    size_t f;
    size_t i;
    size_t k;
    for (f = 0; f < 3; f++) {
        put_family(out, families[f], helps[f]);
        for (i = 0; i < survey->listener_count; i++) {
            const vkp_listener_stats *stats = &survey->listeners[i].stats;
            uint64_t refused = 0;
            for (k = 0; k < VKP_REFUSAL_COUNT; k++) {
                refused += stats->refused[k];
            }
            put(out, "%s{listener=", families[f]);
            put_text(out, vkp_str_of(survey->listeners[i].address));
            put(out, "} %llu\n",
                (unsigned long long)(f == 0   ? stats->clients
                                     : f == 1 ? stats->accepted
                                              : refused));
        }
    }
}

static const char *kind_text(vkp_sub_kind kind)
{
    return kind == VKP_SUB_CHANNEL ? "channel" : kind == VKP_SUB_PATTERN ? "pattern" : "shard";
}

/* Names that are cut are left out: two of them might look the same. */
static void put_channels(vkp_resp_writer *out, const vkp_relay_survey *survey)
{
    static const char *const families[] = {"vkp_channel_messages_total", "vkp_channel_subscribers"};
    static const char *const helps[] = {"Messages of the names with the most.",
                                        "Clients that are subscribed to them."};
    size_t f;
    size_t i;
    for (f = 0; f < 2; f++) {
        put_family(out, families[f], helps[f]);
        for (i = 0; i < survey->channel_count; i++) {
            const vkp_relay_channel *channel = &survey->channels[i];
            if (channel->name.len == channel->name_bytes) {
                put(out, "%s{kind=\"%s\",channel=", families[f], kind_text(channel->kind));
                put_text(out, channel->name);
                put(out, "} %llu\n",
                    (unsigned long long)(f == 0 ? channel->messages : channel->subscribers));
            }
        }
    }
}

static void put_loops(vkp_resp_writer *out, const vkp_relay_survey *survey)
{
    size_t i;
    put_family(out, "vkp_loop_clients", "Clients of a loop now.");
    for (i = 0; i < survey->loop_count; i++) {
        put(out, "vkp_loop_clients{loop=\"%zu\"} %zu\n", i, survey->loops[i].clients);
    }
    put_family(out, "vkp_loop_lag_seconds",
               "How late a loop was at worst in the last 10 to 20 seconds.");
    for (i = 0; i < survey->loop_count; i++) {
        put(out, "vkp_loop_lag_seconds{loop=\"%zu\"} %llu.%09llu\n", i,
            (unsigned long long)(survey->loops[i].lag_ns / 1000000000),
            (unsigned long long)(survey->loops[i].lag_ns % 1000000000));
    }
}

static void put_metrics(vkp_resp_writer *out, const web *self, const vkp_relay_survey *survey)
{
    counters found;
    size_t i;
    collect(&found, self->relay, survey);
    for (i = 0; i < found.count; i++) {
        const counter *each = &found.all[i];
        if (each->family == NULL) {
            continue;
        }
        if (each->help != NULL) {
            put_family(out, each->family, each->help);
        }
        put(out, "%s%s%s%s %llu\n", each->family, each->labels[0] != '\0' ? "{" : "", each->labels,
            each->labels[0] != '\0' ? "}" : "", (unsigned long long)each->value);
    }
    put(out, "# HELP vkp_reply_seconds Time from a command to its reply; not of those that may "
             "block.\n# TYPE vkp_reply_seconds histogram\n");
    put_times(out, "shared", &survey->stats.replies[0]);
    put_times(out, "private", &survey->stats.replies[1]);
    put_listeners(out, survey);
    put_loops(out, survey);
    put_channels(out, survey);
    put_family(out, "vkp_start_time_seconds", "When the relay started, seconds since 1970.");
    put(out, "vkp_start_time_seconds %llu\n", (unsigned long long)(self->began_ms / 1000));
    put_family(out, "vkp_build_info", "The version.");
    put(out, "vkp_build_info{version=\"%s\"} 1\n", vkp_version_str());
}

/* ---- /status: what the page shows, as JSON ---- */

static void put_json_lists(vkp_resp_writer *out, const vkp_relay_survey *survey)
{
    size_t i;
    put(out, "\"listeners\":[");
    for (i = 0; i < survey->listener_count; i++) {
        put(out, "%s{\"address\":", i > 0 ? "," : "");
        put_text(out, vkp_str_of(survey->listeners[i].address));
        put(out, ",\"clients\":%zu,\"accepted\":%llu}", survey->listeners[i].stats.clients,
            (unsigned long long)survey->listeners[i].stats.accepted);
    }
    put(out, "],\"loops\":[");
    for (i = 0; i < survey->loop_count; i++) {
        put(out, "%s{\"clients\":%zu,\"lag_ns\":%llu}", i > 0 ? "," : "", survey->loops[i].clients,
            (unsigned long long)survey->loops[i].lag_ns);
    }
    put(out, "],\"channels\":[");
    for (i = 0; i < survey->channel_count; i++) {
        const vkp_relay_channel *channel = &survey->channels[i];
        put(out,
            "%s{\"kind\":\"%s\",\"bytes\":%zu,\"cut\":%s,\"messages\":%llu,"
            "\"subscribers\":%zu,\"name\":",
            i > 0 ? "," : "", kind_text(channel->kind), channel->name_bytes,
            channel->name.len < channel->name_bytes ? "true" : "false",
            (unsigned long long)channel->messages, channel->subscribers);
        put_text(out, channel->name);
        put(out, "}");
    }
    put(out, "],\"outages\":[");
    for (i = 0; i < survey->outage_count; i++) {
        put(out, "%s{\"from\":%llu,\"to\":%llu,\"reason\":", i > 0 ? "," : "",
            (unsigned long long)survey->outages[i].from_unix_ms,
            (unsigned long long)survey->outages[i].to_unix_ms);
        put_text(out, survey->outages[i].reason);
        put(out, "}");
    }
    put(out, "]");
}

static uint64_t unix_ms(void)
{
    struct timespec now = {0, 0};
    (void)clock_gettime(CLOCK_REALTIME, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

static void put_status(vkp_resp_writer *out, const web *self, const vkp_relay_survey *survey)
{
    counters found;
    size_t i;
    collect(&found, self->relay, survey);
    put(out, "{\"version\":\"%s\",\"server\":%s,\"began\":%llu,\"now\":%llu,\"since\":%llu,",
        vkp_version_str(), self->has_server ? "true" : "false", (unsigned long long)self->began_ms,
        (unsigned long long)unix_ms(), (unsigned long long)survey->stats.since_unix_ms);
    put(out, "\"counters\":{");
    for (i = 0; i < found.count; i++) {
        put(out, "%s\"%s\":%llu", i > 0 ? "," : "", found.all[i].name,
            (unsigned long long)found.all[i].value);
    }
    put(out, "},\"times\":[");
    for (i = 0; i < VKP_RELAY_TIMES; i++) {
        put(out, "%s%llu", i > 0 ? "," : "",
            (unsigned long long)(survey->stats.replies[0].within[i] +
                                 survey->stats.replies[1].within[i]));
    }
    put(out, "],");
    put_json_lists(out, survey);
    put(out, "}\n");
}

/* ---- requests ---- */

/* A request that is answered later. */
typedef struct job {
    web *self;
    vkp_http_call *call; /* NULL: answered */
    void (*put)(vkp_resp_writer *out, const web *self, const vkp_relay_survey *survey);
    const char *type;
    vkp_timer timer; /* of /healthz */
} job;

static void answer_text(vkp_http_call *call, int status, const char *text)
{
    vkp_http_response response;
    memset(&response, 0, sizeof response);
    response.status = status;
    if (text != NULL && vkp_bytes_copy(NULL, text, strlen(text), &response.body) != VKP_OK) {
        response.status = 503;
    }
    vkp_http_answer(call, &response);
    vkp_bytes_unref(&response.body);
}

static void on_survey(void *user, const vkp_relay_survey *survey)
{
    job *self = (job *)user;
    vkp_http_response response;
    vkp_resp_writer writer;
    memset(&response, 0, sizeof response);
    vkp_resp_writer_init(&writer, NULL);
    if (survey != NULL) {
        self->put(&writer, self->self, survey);
    }
    response.type = self->type;
    if (survey == NULL || vkp_resp_writer_take(&writer, &response.body) != VKP_OK) {
        response.status = 503;
        response.type = NULL;
    }
    vkp_http_answer(self->call, &response);
    vkp_bytes_unref(&response.body);
    free(self);
}

static void end_health(job *self, int status, const char *text)
{
    if (self->call != NULL) {
        vkp_timer_stop(&self->timer);
        answer_text(self->call, status, text);
        self->call = NULL;
    }
}

/* The server did not answer in time; on_ping frees the job when it does, or cannot any longer. */
static void on_health_timer(vkp_timer *timer)
{
    end_health(VKP_CONTAINER(timer, job, timer), 503, "the server does not answer\n");
}

static void on_ping(void *user, vkp_status status, vkp_str words)
{
    job *self = (job *)user;
    char text[256];
    const char *why = status == VKP_ERR_REFUSED ? "the server says: " : "there is no connection";
    if (status == VKP_OK) {
        end_health(self, 200, "ok\n");
    } else {
        words.len = words.len < 200 ? words.len : 200;
        (void)snprintf(text, sizeof text, "%s%.*s\n", why, (int)words.len,
                       words.len > 0 ? words.ptr : "");
        end_health(self, 503, text);
    }
    free(self);
}

/* Whether the server answers now. */
static void serve_health(web *self, job *next)
{
    if (vkp_timer_start(&next->timer, self->loop, on_health_timer, 0,
                        vkp_loop_after_ms(self->loop, HEALTH_MS)) != VKP_OK ||
        vkp_relay_ping_then(self->relay, on_ping, next) != VKP_OK) {
        end_health(next, 503, NULL);
        free(next);
    }
}

static void serve_page(const web *self, vkp_http_call *call)
{
    vkp_http_response response;
    memset(&response, 0, sizeof response);
    response.type = "text/html; charset=utf-8";
    response.fields = RELAY_PAGE_FIELDS;
    response.body = self->page;
    vkp_http_answer(call, &response);
}

static void on_request(void *user, const vkp_http_request *request, vkp_http_call *call)
{
    static const struct {
        const char *path;
        const char *type;
        void (*put)(vkp_resp_writer *out, const web *self, const vkp_relay_survey *survey);
    } pages[] = {{"/metrics", "text/plain; version=0.0.4; charset=utf-8", put_metrics},
                 {"/status", "application/json", put_status},
                 {"/healthz", NULL, NULL}};
    web *self = (web *)user;
    job *next;
    size_t i = 0;
    if (request->path.len == 1) {
        serve_page(self, call);
        return;
    }
    while (i < 3 && (strlen(pages[i].path) != request->path.len ||
                     memcmp(pages[i].path, request->path.ptr, request->path.len) != 0)) {
        i++;
    }
    if (i == 3) {
        answer_text(call, 404, NULL);
        return;
    }
    next = (job *)calloc(1, sizeof *next);
    if (next == NULL) {
        answer_text(call, 503, NULL);
        return;
    }
    next->self = self;
    next->call = call;
    next->type = pages[i].type;
    next->put = pages[i].put;
    if (next->put == NULL) {
        serve_health(self, next);
    } else if (vkp_relay_survey_then(self->relay, on_survey, next) != VKP_OK) {
        answer_text(call, 503, NULL);
        free(next);
    }
}

/* ---- start and end ---- */

/* Serves at the address, for hosts of any name or not; prints where. The relay outlives it. */
static vkp_status open_web(web *self, const char *address, bool any_host)
{
    vkp_http_config config = VKP_ZERO;
    vkp_resp_writer writer;
    vkp_status status;
    size_t i;
    self->began_ms = unix_ms();
    vkp_resp_writer_init(&writer, NULL);
    for (i = 0; i < sizeof relay_page / sizeof *relay_page; i++) {
        vkp_resp_put_raw(&writer, relay_page[i], strlen(relay_page[i]));
        vkp_resp_put_raw(&writer, "\n", 1);
    }
    status = vkp_resp_writer_take(&writer, &self->page);
    if (status == VKP_OK) {
        config.address = vkp_str_of(address);
        config.any_host = any_host;
        config.on_request = on_request;
        config.user = self;
        status = vkp_http_open(self->loop, &config, &self->http);
    }
    if (status == VKP_OK) {
        const char *bound = vkp_http_get_address(self->http);
        bool tcp = strncmp(bound, "tcp:", 4) == 0;
        printf("ready: %s%s\n", tcp ? "http://" : "http+", tcp ? bound + 4 : bound);
        fflush(stdout);
    }
    return status;
}

static void close_web(web *self)
{
    vkp_http_unref(self->http);
    self->http = NULL;
    vkp_bytes_unref(&self->page);
}

#endif /* RELAY_METRICS_H */
