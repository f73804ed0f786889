/* reader [rounds [part of a group's name]]: RESP3 pushes from 16 KiB feeds to views, on one core.
   SPDX-License-Identifier: MIT

   Rates are per second of CPU time, which other processes do not disturb as they do the clock on
   the wall. Every row gets the same bytes in the same feeds, copies them in, and adds up the
   payloads. hiredis before 1.0 knows no pushes: it gets arrays, which differ in the first byte.  */
#include "bench.h"

#if VKP_HAVE_HIREDIS
#include <hiredis/hiredis.h>
#endif

#define SOURCE_BYTES ((size_t)1 << 20)
#define FEED 16384
#define LONGEST 2048
#define RUN_NS 100e6

typedef struct source {
    char *data;
    size_t len;
    uint64_t messages;
    uint64_t payload_bytes;
} source;

/* What a row adds up; compared with the source, so that nobody is quick by leaving things out. */
typedef struct sums {
    uint64_t messages;
    uint64_t payload_bytes;
} sums;

static char buffer[FEED + 2 * LONGEST];

/* Payloads of that many bytes; 0: 1 to 256, on channels of 1 to 32. */
static source make_source(size_t payload, char mark)
{
    source made = {(char *)malloc(SOURCE_BYTES + LONGEST), 0, 0, 0};
    uint32_t seed = 7;
    while (made.len < SOURCE_BYTES) {
        size_t size = payload;
        int name = 4;
        if (payload == 0) {
            seed = seed * 1664525u + 1013904223u;
            size = 1 + (seed >> 8) % 256;
            name = 1 + (int)((seed >> 16) % 32);
        }
        made.len +=
            (size_t)sprintf(made.data + made.len, "%c3\r\n$7\r\nmessage\r\n$%d\r\n%.*s\r\n$%zu\r\n",
                            mark, name, name, "channelchannelchannelchannelchan", size);
        memset(made.data + made.len, 'x', size);
        memcpy(made.data + made.len + size, "\r\n", 2);
        made.len += size + 2;
        made.messages++;
        made.payload_bytes += size;
    }
    return made;
}

/* ---- the limit: as little as can be done and still be right for well-formed pushes ---- */

static const char *scan_length(const char *at, const char *end, size_t *out)
{
    size_t value = 0;
    while (at < end && (unsigned char)(*at - '0') < 10) {
        value = value * 10 + (size_t)(*at++ - '0');
    }
    *out = value;
    return end - at >= 2 && at[0] == '\r' && at[1] == '\n' ? at + 2 : NULL;
}

/* Bytes of one message, 0: not all there. */
static size_t scan_message(const char *from, size_t len, size_t *payload)
{
    const char *end = from + len;
    const char *at = from + 18;
    size_t size;
    if (len < 18 || memcmp(from, ">3\r\n$7\r\nmessage\r\n$", 18) != 0) {
        return 0;
    }
    at = scan_length(at, end, &size);
    if (at == NULL || (size_t)(end - at) < size + 3 || memcmp(at + size, "\r\n$", 3) != 0) {
        return 0;
    }
    at = scan_length(at + size + 3, end, payload);
    if (at == NULL || (size_t)(end - at) < *payload + 2 || at[*payload] != '\r') {
        return 0;
    }
    return (size_t)(at + *payload + 2 - from);
}

/* ---- one pass over the source ---- */

typedef void (*pass_fn)(const source *from, sums *sum);

static void pass_memcpy(const source *from, sums *sum)
{
    size_t at;
    for (at = 0; at < from->len; at += FEED) {
        size_t size = from->len - at < FEED ? from->len - at : FEED;
        memcpy(buffer, from->data + at, size);
        __asm__ volatile("" ::"r"(buffer) : "memory");
    }
    sum->messages += from->messages;
    sum->payload_bytes += from->payload_bytes;
}

static void pass_scanner(const source *from, sums *sum)
{
    size_t kept = 0;
    size_t at;
    for (at = 0; at < from->len; at += FEED) {
        size_t size = from->len - at < FEED ? from->len - at : FEED;
        size_t used = 0;
        size_t step;
        size_t payload = 0;
        memcpy(buffer + kept, from->data + at, size);
        kept += size;
        while ((step = scan_message(buffer + used, kept - used, &payload)) > 0) {
            used += step;
            sum->messages++;
            sum->payload_bytes += payload;
        }
        memmove(buffer, buffer + used, kept - used);
        kept -= used;
    }
}

static vkp_resp_reader *reader; /* between passes it holds no frame */

static void pass_scan(const source *from, sums *sum)
{
    size_t kept = 0;
    size_t at;
    for (at = 0; at < from->len; at += FEED) {
        size_t size = from->len - at < FEED ? from->len - at : FEED;
        size_t used = 0;
        size_t step;
        const vkp_value *value;
        memcpy(buffer + kept, from->data + at, size);
        kept += size;
        while (vkp_resp_reader_scan(reader, buffer + used, kept - used, &value, &step) == VKP_OK) {
            used += step;
            sum->messages++;
            sum->payload_bytes += value[3].len;
        }
        memmove(buffer, buffer + used, kept - used);
        kept -= used;
    }
}

static void pass_feed(const source *from, sums *sum)
{
    size_t at;
    for (at = 0; at < from->len; at += FEED) {
        size_t size = from->len - at < FEED ? from->len - at : FEED;
        const vkp_value *value;
        if (vkp_resp_reader_feed(reader, from->data + at, size) != VKP_OK) {
            bench_fail("feed failed");
        }
        while (vkp_resp_reader_next(reader, &value) == VKP_OK) {
            sum->messages++;
            sum->payload_bytes += value[3].len;
        }
    }
}

#if VKP_HAVE_HIREDIS
static redisReader *peer;
static redisReader *peer_null;

static void pass_hiredis(const source *from, sums *sum)
{
    size_t at;
    for (at = 0; at < from->len; at += FEED) {
        size_t size = from->len - at < FEED ? from->len - at : FEED;
        void *reply = NULL;
        redisReaderFeed(peer, from->data + at, size);
        while (redisReaderGetReply(peer, &reply) == REDIS_OK && reply != NULL) {
            sum->messages++;
            sum->payload_bytes += ((redisReply *)reply)->element[2]->len;
            freeReplyObject(reply);
        }
    }
}

/* Its object functions are absent: it parses and tells only that there was a reply. */
static void pass_hiredis_null(const source *from, sums *sum)
{
    size_t at;
    for (at = 0; at < from->len; at += FEED) {
        size_t size = from->len - at < FEED ? from->len - at : FEED;
        void *reply = NULL;
        redisReaderFeed(peer_null, from->data + at, size);
        while (redisReaderGetReply(peer_null, &reply) == REDIS_OK && reply != NULL) {
            sum->messages++;
        }
    }
    sum->payload_bytes += from->payload_bytes;
}
#endif

static pass_fn passes[] = {pass_memcpy,  pass_scanner,     pass_scan, pass_feed,
#if VKP_HAVE_HIREDIS
                           pass_hiredis, pass_hiredis_null
#endif
};

static void run(bench_row *row, double *values)
{
    const source *from = (const source *)row->context;
    pass_fn pass = passes[row->a];
    sums sum = {0, 0};
    double begun;
    double spent;
    uint64_t done = 0;
    pass(from, &sum);
    memset(&sum, 0, sizeof sum);
    begun = bench_cpu_ns();
    do {
        pass(from, &sum);
        done++;
        spent = bench_cpu_ns() - begun;
    } while (spent < RUN_NS);
    if (sum.messages != done * from->messages || sum.payload_bytes != done * from->payload_bytes) {
        bench_fail("%s, %s: saw %llu of %llu messages", row->group, row->name,
                   (unsigned long long)sum.messages, (unsigned long long)(done * from->messages));
    }
    values[0] = (double)sum.messages * 1e3 / spent;
    values[1] = (double)(done * from->len) / spent;
    values[2] = spent / (double)sum.messages;
}

int main(int argc, char **argv)
{
    static const size_t payloads[4] = {16, 64, 1024, 0};
    static const char *const groups[4] = {"16 B", "64 B", "1 KiB", "mixed"};
    static bench_row rows[4 * 6];
    static source pushes[4];
#if VKP_HAVE_HIREDIS
    static source arrays[4];
#endif
    bench_table table = {"reader: pushes from 16 KiB feeds",
                         {"M messages/s", "GB/s", "ns/message"},
                         {1, 2, 1},
                         3,
                         false,
                         rows,
                         0};
    size_t rounds = bench_rounds(argc, argv);
    size_t i;
    bench_pin(1);
    if (vkp_resp_reader_open(NULL, &reader) != VKP_OK) {
        bench_fail("no memory");
    }
#if VKP_HAVE_HIREDIS
    peer = redisReaderCreate();
    peer_null = redisReaderCreateWithFunctions(NULL);
#if HIREDIS_MAJOR < 1
#define PEER_MARK '*'
#else
#define PEER_MARK '>'
#endif
#endif
    for (i = 0; i < 4; i++) {
        bool big = payloads[i] == 1024;
        bench_row base = {groups[i], "", BENCH_OURS, run, 0, 0, &pushes[i], {{NULL, 0}}, NULL};
        bench_goal goals[3] = {{"limit: own scanner", 0.8},
                               {"hiredis, objects", big ? 5 : 10},
                               {"hiredis, null functions", big ? 2.5 : 4}};
        bench_row row = base;
        pushes[i] = make_source(payloads[i], '>');
        row.name = "memcpy of the bytes";
        row.role = BENCH_OTHER;
        rows[table.count++] = row;
        row.name = "limit: own scanner";
        row.role = BENCH_LIMIT;
        row.a = 1;
        rows[table.count++] = row;
        row.name = "vkp scan";
        row.role = BENCH_OURS;
        row.a = 2;
        memcpy(row.goals, goals, sizeof goals);
        rows[table.count++] = row;
        row.name = "vkp feed, next";
        row.a = 3;
        rows[table.count++] = row;
#if VKP_HAVE_HIREDIS
        arrays[i] = make_source(payloads[i], PEER_MARK);
        row = base;
        row.context = &arrays[i];
        row.role = BENCH_PEER;
        row.name = "hiredis, objects";
        row.a = 4;
        rows[table.count++] = row;
        row.name = "hiredis, null functions";
        row.a = 5;
        rows[table.count++] = row;
#endif
    }
    bench_print_machine();
    bench_keep(&table, argc, argv);
    bench_run(&table, rounds);
    vkp_resp_reader_unref(reader);
    return 0;
}
