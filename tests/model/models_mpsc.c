/* Models of the mpsc channel: scripts of one letter per call, for one to three senders and the
   receiver, in all combinations.

   Senders:  s send            d send, deadline       t try_send           m send_many of 2
             n send_many of 2, deadline 0             c reserve, commit    a reserve, abort
             e reserve, deadline, commit              r try_reserve, commit
             k clone, send, unref    x wait_closed, deadline    w wait_closed
             q the plain reads       K close (the receiver's unref comes after all threads)
             h clone, unref: a lane without a value
             u upgrade a weak sender, send, unref; such a thread has no sender of its own
   Receiver: R recv    D recv, deadline    T try_recv    M recv_many of 2
             N recv_many of 2, deadline 0  P peek        L len and is_closed
             C close   * receive until CLOSED; the receiver's unref comes last in any case
             A abort a permit that was reserved before all threads, by the first sender
             B commit it             . call nothing more: the unref comes after all threads, so that
             a sender that nobody lets in sleeps without end                                    */
#include "environment.h"
#include "families.h"

#include <stdio.h>
#include <string.h>

#define SENDERS 3
#define VALUES 8 /* of one sender, at most */
#define LARGEST 65536
#define SOON 1000 /* a deadline, in the checker's time, which is 1 until one passes */

struct mpsc_scenario {
    const char *senders[SENDERS];
    const char *receiver;
    unsigned capacity;
    unsigned bytes; /* of a value */
    bool lanes;
    bool by_bytes; /* the capacity is counted in bytes */
};

enum fate { UNKNOWN, OFFERED, ACCEPTED, REFUSED };

static struct {
    vkp_mpsc_tx *tx[SENDERS];
    vkp_mpsc_weak *weak[SENDERS];
    vkp_mpsc_rx *rx;
    vkp_mpsc_tx *permit_tx; /* a reference of the receiver's thread, while it has the permit */
    vkp_mpsc_permit permit;
    uint64_t permit_value;
    unsigned count; /* senders */
    enum fate fate[SENDERS][VALUES];
    bool received[SENDERS][VALUES];
    bool dropped[SENDERS][VALUES];
    unsigned next[SENDERS];   /* value to offer */
    unsigned least[SENDERS];  /* value that may be received next */
    unsigned offers;          /* ever begun */
    unsigned open_offers;     /* begun and not ended, places reserved included */
    unsigned queued[SENDERS]; /* accepted for sure, and not yet received for sure */
    unsigned strong;          /* senders that have not begun to go */
    unsigned strong_at_most;  /* senders that have not gone for sure */
    bool aborted;             /* the receiver may not have passed that place yet */
    bool keep_rx;
    bool close_begun;
    bool close_done;
    bool saw_closed;
    bool peeked;
    uint64_t peek;
} now;

static unsigned char out_items[SENDERS][2 * LARGEST];
static unsigned char in_items[2 * LARGEST];

static const struct mpsc_scenario *scenario(void)
{
    return (const struct mpsc_scenario *)(uintptr_t)model_now->scenario[0];
}

static uint64_t value_of(unsigned sender, unsigned number)
{
    return 0x100u * (sender + 1) + number;
}

static void drop(void *user, void *item)
{
    uint64_t value;
    unsigned sender;
    unsigned number;
    MODEL_CHECK(user == &now);
    memcpy(&value, item, sizeof value);
    sender = (unsigned)(value >> 8) - 1;
    number = (unsigned)value & 0xff;
    model_note("drops %llx", (unsigned long long)value);
    if (scenario()->bytes != sizeof value) { /* with rings that grow, which another purge may end */
        model_step();
    }
    MODEL_CHECK(memcmp(&value, item, sizeof value) == 0);
    MODEL_CHECK(sender < SENDERS && number < VALUES);
    MODEL_CHECK(now.fate[sender][number] == OFFERED || now.fate[sender][number] == ACCEPTED);
    MODEL_CHECK(!now.received[sender][number] && !now.dropped[sender][number]);
    now.dropped[sender][number] = true;
}

/* ---- senders ---- */

static uint64_t offer(unsigned sender)
{
    unsigned number = now.next[sender]++;
    MODEL_CHECK(number < VALUES);
    now.fate[sender][number] = OFFERED;
    now.offers++;
    now.open_offers++;
    return value_of(sender, number);
}

static void settle(uint64_t value, bool accepted)
{
    unsigned sender = (unsigned)(value >> 8) - 1;
    unsigned number = (unsigned)value & 0xff;
    now.open_offers--;
    now.fate[sender][number] = accepted ? ACCEPTED : REFUSED;
    if (accepted) {
        MODEL_CHECK(!now.saw_closed || now.received[sender][number]);
        now.queued[sender] += !now.received[sender][number];
    }
    MODEL_CHECK(accepted || (!now.received[sender][number] && !now.dropped[sender][number]));
}

/* What a sender knows before it calls: whether FULL can be an answer. */
struct before_send {
    bool roomy;
    unsigned offers;
};

static struct before_send look(unsigned sender)
{
    struct before_send before;
    unsigned queued = now.queued[sender];
    unsigned i;
    for (i = 0; i < now.count && !scenario()->lanes; i++) {
        queued += i != sender ? now.queued[i] : 0;
    }
    before.roomy = scenario()->capacity == 0 || queued < scenario()->capacity;
    before.roomy = before.roomy && now.open_offers == 0 && !now.aborted;
    before.offers = now.offers;
    return before;
}

static void check_refusal(vkp_status status, struct before_send before, bool timed)
{
    switch ((int)status) {
    case VKP_ERR_CLOSED:
        MODEL_CHECK(now.close_begun);
        break;
    case VKP_ERR_FULL:
        MODEL_CHECK(!before.roomy || now.offers > before.offers + 1 || !model_has_one_time());
        MODEL_CHECK(scenario()->capacity != 0);
        break;
    case VKP_ERR_TIMEOUT:
        MODEL_CHECK(timed && scenario()->capacity != 0);
        break;
    default:
        model_fail("a send returned: %s", vkp_status_str(status));
    }
}

static void send_one(unsigned sender, vkp_mpsc_tx *tx, char how)
{
    struct before_send before = look(sender);
    uint64_t value = offer(sender);
    vkp_status status;
    memcpy(out_items[sender], &value, sizeof value);
    model_note("sends %llx", (unsigned long long)value);
    status = how == 't' ? vkp_mpsc_try_send(tx, out_items[sender])
                        : vkp_mpsc_send(tx, out_items[sender], how == 'd' ? SOON : VKP_FOREVER);
    model_note("sent %llx: %s", (unsigned long long)value, vkp_status_str(status));
    settle(value, status == VKP_OK);
    if (status != VKP_OK) {
        MODEL_CHECK(status != VKP_ERR_FULL || how == 't');
        check_refusal(status, before, how == 'd');
    }
}

static void send_two(unsigned sender, bool wait)
{
    unsigned bytes = scenario()->bytes;
    struct before_send before = look(sender);
    uint64_t value[2];
    size_t sent = 0;
    vkp_status status;
    value[0] = offer(sender);
    value[1] = offer(sender);
    memcpy(out_items[sender], &value[0], sizeof value[0]);
    memcpy(out_items[sender] + bytes, &value[1], sizeof value[1]);
    model_note("sends %llx and the next", (unsigned long long)value[0]);
    status =
        vkp_mpsc_send_many(now.tx[sender], out_items[sender], 2, wait ? VKP_FOREVER : 0, &sent);
    model_note("sent %llx, %zu: %s", (unsigned long long)value[0], sent, vkp_status_str(status));
    settle(value[0], status == VKP_OK);
    settle(value[1], status == VKP_OK && sent == 2);
    if (status != VKP_OK) {
        now.offers--; /* both were one call */
        check_refusal(status == VKP_ERR_TIMEOUT && !wait ? VKP_ERR_FULL : status, before, false);
        now.offers++;
    } else {
        MODEL_CHECK(sent == 1 || sent == 2);
        MODEL_CHECK(sent == 2 || now.close_begun || (!wait && scenario()->capacity != 0));
    }
}

static void send_permit(unsigned sender, char how)
{
    struct before_send before = look(sender);
    uint64_t value = offer(sender);
    vkp_mpsc_permit permit;
    vkp_status status =
        how == 'r' ? vkp_mpsc_try_reserve(now.tx[sender], &permit)
                   : vkp_mpsc_reserve(now.tx[sender], how == 'e' ? SOON : VKP_FOREVER, &permit);
    model_note("reserved for %llx: %s", (unsigned long long)value, vkp_status_str(status));
    if (status != VKP_OK) {
        settle(value, false);
        MODEL_CHECK(status != VKP_ERR_FULL || how == 'r');
        check_refusal(status, before, how == 'e');
        return;
    }
    MODEL_CHECK((uintptr_t)permit.item % 8 == 0);
    memcpy(permit.item, &value, sizeof value);
    if (how == 'a') {
        now.aborted = true;
        vkp_mpsc_abort(&permit);
        model_note("aborted %llx", (unsigned long long)value);
        settle(value, false);
    } else {
        vkp_mpsc_commit(&permit);
        model_note("committed %llx", (unsigned long long)value);
        settle(value, true);
    }
}

static void release(vkp_mpsc_tx *tx)
{
    now.strong--;
    model_note("unref");
    vkp_mpsc_tx_unref(tx);
    now.strong_at_most--;
}

static void send_clone(unsigned sender)
{
    vkp_mpsc_tx *clone = NULL;
    vkp_status status = vkp_mpsc_tx_clone(now.tx[sender], &clone);
    MODEL_CHECK(status == VKP_OK);
    now.strong++;
    now.strong_at_most++;
    send_one(sender, clone, 's');
    release(clone);
}

static void clone_in_vain(unsigned sender)
{
    vkp_mpsc_tx *clone = NULL;
    vkp_status status = vkp_mpsc_tx_clone(now.tx[sender], &clone);
    MODEL_CHECK(status == VKP_OK);
    now.strong++;
    now.strong_at_most++;
    release(clone);
}

static void send_upgraded(unsigned sender)
{
    bool gone = now.strong_at_most == 0;
    vkp_mpsc_tx *tx = NULL;
    vkp_status status;
    now.strong_at_most++;
    status = vkp_mpsc_upgrade(now.weak[sender], &tx);
    model_note("upgraded: %s", vkp_status_str(status));
    if (status != VKP_OK) {
        now.strong_at_most--;
        MODEL_CHECK(status == VKP_ERR_CLOSED && now.strong == 0);
        return;
    }
    MODEL_CHECK(!gone || !model_has_one_time());
    now.strong++;
    send_one(sender, tx, 's');
    release(tx);
}

static void sender_call(unsigned sender, char call)
{
    vkp_mpsc_tx *tx = now.tx[sender];
    vkp_status status;
    bool known;
    switch (call) {
    case 's':
    case 'd':
    case 't':
        send_one(sender, tx, call);
        break;
    case 'm':
    case 'n':
        send_two(sender, call == 'm');
        break;
    case 'c':
    case 'a':
    case 'e':
    case 'r':
        send_permit(sender, call);
        break;
    case 'k':
        send_clone(sender);
        break;
    case 'h':
        clone_in_vain(sender);
        break;
    case 'u':
        send_upgraded(sender);
        break;
    case 'x':
    case 'w':
        status = vkp_mpsc_wait_closed(tx, call == 'x' ? SOON : VKP_FOREVER);
        model_note("waited for the close: %s", vkp_status_str(status));
        MODEL_CHECK(status == VKP_OK ? now.close_begun : status == VKP_ERR_TIMEOUT && call == 'x');
        break;
    case 'K':
        now.close_begun = true;
        vkp_mpsc_close(now.rx);
        now.close_done = true;
        break;
    case 'q':
        known = now.close_done;
        MODEL_CHECK(vkp_mpsc_is_closed(tx) ? now.close_begun : !known || !model_has_one_time());
        MODEL_CHECK(vkp_mpsc_get_capacity(tx) == scenario()->capacity);
        MODEL_CHECK(scenario()->capacity == 0 ? vkp_mpsc_get_room(tx) == SIZE_MAX
                                              : vkp_mpsc_get_room(tx) <= scenario()->capacity);
        MODEL_CHECK(vkp_mpsc_get_senders(tx) >= 1);
        break;
    default:
        model_fail("no such call: %c", call);
    }
}

/* ---- the receiver ---- */

static void got(const void *item)
{
    uint64_t value;
    unsigned sender;
    unsigned number;
    memcpy(&value, item, sizeof value);
    model_note("received %llx", (unsigned long long)value);
    sender = (unsigned)(value >> 8) - 1;
    number = (unsigned)value & 0xff;
    MODEL_CHECK(sender < SENDERS && number < VALUES);
    MODEL_CHECK(now.fate[sender][number] == OFFERED || now.fate[sender][number] == ACCEPTED);
    MODEL_CHECK(!now.received[sender][number] && !now.dropped[sender][number]);
    MODEL_CHECK(number >= now.least[sender]);
    MODEL_CHECK(!now.saw_closed);
    MODEL_CHECK(!now.peeked || now.peek == value);
    now.peeked = false;
    now.least[sender] = number + 1;
    now.received[sender][number] = true;
    now.queued[sender] -= now.fate[sender][number] == ACCEPTED;
}

static void check_closed(void)
{
    unsigned i;
    MODEL_CHECK(now.close_begun || now.strong == 0);
    for (i = 0; i < SENDERS; i++) {
        MODEL_CHECK(now.queued[i] == 0);
    }
    now.saw_closed = true;
}

/* Whether a receive must give a value: one is there, and nobody stands before it. */
static bool ready(void)
{
    return now.open_offers == 0 && now.queued[0] + now.queued[1] + now.queued[2] > 0;
}

static vkp_status receive(char how)
{
    bool must = ready();
    size_t count = 1;
    size_t i;
    vkp_status status;
    switch (how) {
    case 'T':
        status = vkp_mpsc_try_recv(now.rx, in_items);
        break;
    case 'M':
    case 'N':
        status = vkp_mpsc_recv_many(now.rx, how == 'M' ? VKP_FOREVER : 0, in_items, 2, &count);
        break;
    default:
        status = vkp_mpsc_recv(now.rx, how == 'D' ? SOON : VKP_FOREVER, in_items);
        break;
    }
    model_note("received: %s", vkp_status_str(status));
    switch ((int)status) {
    case VKP_OK:
        MODEL_CHECK(count == 1 || (count == 2 && (how == 'M' || how == 'N')));
        for (i = 0; i < count; i++) {
            got(in_items + i * scenario()->bytes);
        }
        break;
    case VKP_ERR_CLOSED:
        check_closed();
        break;
    case VKP_ERR_EMPTY:
        MODEL_CHECK(how == 'T' && (!must || !model_has_one_time()) && !now.saw_closed);
        break;
    case VKP_ERR_TIMEOUT:
        MODEL_CHECK((how == 'D' || how == 'N') && (!must || !model_has_one_time()) &&
                    !now.saw_closed);
        break;
    default:
        model_fail("a receive returned: %s", vkp_status_str(status));
    }
    return status;
}

static void look_ahead(void)
{
    const void *item = NULL;
    bool must = ready();
    vkp_status status = vkp_mpsc_peek(now.rx, &item);
    model_note("peeked: %s", vkp_status_str(status));
    if (status == VKP_OK) {
        now.peeked = true;
        memcpy(&now.peek, item, sizeof now.peek);
    } else if (status == VKP_ERR_CLOSED) {
        check_closed();
    } else {
        MODEL_CHECK(status == VKP_ERR_EMPTY && (!must || !model_has_one_time()));
    }
}

/* Reserve, before all threads, a place of the first sender's queue for the receiver's thread. */
static void reserve_before(bool commits)
{
    vkp_status status = vkp_mpsc_try_reserve(now.tx[0], &now.permit);
    MODEL_CHECK(status == VKP_OK);
    now.permit_tx = vkp_mpsc_tx_ref(now.tx[0]);
    now.strong++;
    if (commits) {
        now.permit_value = offer(0);
    } else {
        now.open_offers++;
    }
}

static void use_permit(bool commits)
{
    if (commits) {
        memcpy(now.permit.item, &now.permit_value, sizeof now.permit_value);
        vkp_mpsc_commit(&now.permit);
        settle(now.permit_value, true);
    } else {
        now.aborted = true;
        vkp_mpsc_abort(&now.permit);
        now.open_offers--;
    }
    model_note(commits ? "committed the permit" : "aborted the permit");
    release(now.permit_tx);
}

static void receiver_call(char call)
{
    switch (call) {
    case '.':
        break;
    case 'A':
    case 'B':
        use_permit(call == 'B');
        break;
    case 'P':
        look_ahead();
        break;
    case 'L':
        MODEL_CHECK(vkp_mpsc_get_len(now.rx) <= SENDERS * VALUES);
        if (vkp_mpsc_rx_is_closed(now.rx)) {
            MODEL_CHECK(now.close_begun || now.strong == 0);
        }
        break;
    case 'C':
        now.close_begun = true;
        vkp_mpsc_close(now.rx);
        now.close_done = true;
        break;
    case '*':
        while (receive('R') == VKP_OK) {
        }
        break;
    default:
        (void)receive(call);
        break;
    }
}

/* ---- a model ---- */

static void before(void)
{
    const struct mpsc_scenario *s = scenario();
    vkp_mpsc_config config = VKP_ZERO;
    vkp_mpsc_tx *first = NULL;
    vkp_status status;
    unsigned i;
    memset(&now, 0, sizeof now);
    config.elem_bytes = s->bytes;
    config.capacity_items = s->by_bytes ? 0 : s->capacity;
    config.capacity_bytes = s->by_bytes ? s->capacity * s->bytes : 0;
    config.drop = drop;
    config.user = &now;
    config.env = environment();
    config.lanes = s->lanes;
    status = vkp_mpsc_open(&config, &first, &now.rx);
    MODEL_CHECK(status == VKP_OK);
    while (now.count < SENDERS && s->senders[now.count] != NULL) {
        now.count++;
    }
    for (i = 0; i < now.count; i++) {
        now.keep_rx = now.keep_rx || strchr(s->senders[i], 'K') != NULL;
        if (s->senders[i][0] == 'u') {
            now.weak[i] = vkp_mpsc_downgrade(first);
        } else if (i == 0 && strpbrk(s->receiver, "AB") != NULL) {
            now.tx[i] = vkp_mpsc_tx_ref(first); /* the lane that the receiver searches first */
            now.strong++;
        } else {
            status = vkp_mpsc_tx_clone(first, &now.tx[i]);
            now.strong++;
        }
        MODEL_CHECK(status == VKP_OK);
    }
    if (strpbrk(s->receiver, "AB") != NULL) {
        reserve_before(strchr(s->receiver, 'B') != NULL);
    }
    now.keep_rx = now.keep_rx || strchr(s->receiver, '.') != NULL;
    now.strong_at_most = now.strong;
    vkp_mpsc_tx_unref(first);
}

static void thread(unsigned index)
{
    const char *call;
    if (index < now.count) {
        for (call = scenario()->senders[index]; *call != '\0'; call++) {
            sender_call(index, *call);
        }
        if (now.tx[index] != NULL) {
            release(now.tx[index]);
        }
        vkp_mpsc_weak_unref(now.weak[index]);
        return;
    }
    for (call = scenario()->receiver; *call != '\0'; call++) {
        receiver_call(*call);
    }
    if (!now.keep_rx) {
        now.close_begun = true;
        vkp_mpsc_rx_unref(now.rx);
        now.close_done = true;
    }
}

static void after(void)
{
    unsigned i;
    unsigned k;
    if (now.keep_rx) {
        vkp_mpsc_rx_unref(now.rx);
    }
    for (i = 0; i < now.count; i++) {
        for (k = 0; k < now.next[i]; k++) {
            MODEL_CHECK(now.fate[i][k] == ACCEPTED || now.fate[i][k] == REFUSED);
            MODEL_CHECK((now.received[i][k] + now.dropped[i][k] == 1) ==
                        (now.fate[i][k] == ACCEPTED));
            MODEL_CHECK(!now.saw_closed || !now.dropped[i][k]);
        }
    }
}

/* ---- the combinations ---- */

static struct mpsc_scenario all[4000];
static unsigned all_count;
static bool spins;    /* of the models added next: look again before they sleep, */
static bool by_bytes; /* have a capacity in bytes */

static void add(const char *first, const char *second, const char *third, const char *receiver,
                unsigned capacity, unsigned bytes, bool lanes, bool no_barrier,
                unsigned preemptions)
{
    struct mpsc_scenario *s = &all[all_count++];
    struct model model = {.before = before, .thread = thread, .after = after};
    s->senders[0] = first;
    s->senders[1] = second;
    s->senders[2] = third;
    s->receiver = receiver;
    s->capacity = capacity;
    s->bytes = bytes;
    s->lanes = lanes;
    s->by_bytes = by_bytes;
    model.spins = spins ? 1 : 0;
    model.threads = 2u + (second != NULL) + (third != NULL);
    model.no_barrier = no_barrier;
    model.preemptions = preemptions;
    model.stale = 1;
    model.scenario[0] = (uintptr_t)s;
    snprintf(model.name, sizeof model.name, "mpsc%s %s%s%s%s%s | %s, capacity %u%s",
             spins              ? lanes ? "-lanes-spins" : "-spins"
             : by_bytes         ? "-bytes"
             : lanes            ? bytes == 8         ? "-lanes"
                                  : bytes == LARGEST ? "-lanes-trim"
                                                     : "-lanes-grow"
             : bytes == 8       ? ""
             : bytes == LARGEST ? "-trim"
                                : "-grow",
             first, second != NULL ? " " : "", second != NULL ? second : "",
             third != NULL ? " " : "", third != NULL ? third : "", receiver, capacity,
             no_barrier ? ", fenced" : "");
    model_add(&model);
}

#define COUNT(array) (sizeof(array) / sizeof *(array))

/* A sender that waits for the close and a receiver that waits for the senders: as it should be. */
static bool wait_for_each_other(const char *sender, const char *receiver)
{
    return strchr(sender, 'w') != NULL &&
           (receiver[0] == 'R' || receiver[0] == 'M' ||
            (strchr(receiver, '*') != NULL && strchr(receiver, 'C') == NULL));
}

static void spin(const char *sender, const char *receiver, unsigned capacity, bool no_barrier)
{
    if (!wait_for_each_other(sender, receiver)) {
        spins = true;
        add(sender, sender[0] == 'x' ? NULL : "s", NULL, receiver, capacity, 8, false, no_barrier,
            1);
        spins = false;
    }
}

/* Receivers that make one call behind a permit of theirs, and then only wait for the senders: what
   that call passes or takes has to let in who waits.                                          */
static void one_call_models(void)
{
    static const char *const first[] = {"s", "c", "d", "e", "t", "a", "m"};
    static const char *const calls[] = {"AR.", "AD.", "AT.", "AM.", "AN.", "AP.",
                                        "BR.", "BD.", "BT.", "BM.", "BN."};
    static const char *const behind[] = {"s", "c", "e"};
    size_t i, k, r;
    for (i = 0; i < COUNT(first); i++) {
        unsigned capacity = first[i][0] == 'm' ? 2 : 1;
        for (r = 0; r < COUNT(calls); r++) {
            for (k = 0; k < 4; k++) {
                const char *second = k < 2 ? NULL : k == 2 ? "s" : "t";
                spins = (i + r + k) % 2 == 0;
                add(first[i], second, NULL, calls[r], capacity, 8, true, r % 3 == 1,
                    second == NULL ? 2 : 1);
            }
            spins = (i + r) % 2 == 1;
            add(first[i], NULL, NULL, calls[r], capacity, 8, false, i % 2 == 1, 2);
        }
    }
    spins = false;
    /* The first of those that wait may leave: the one behind gets its room. */
    for (i = 0; i < COUNT(behind); i++) {
        for (k = 0; k < 2; k++) {
            add("d", behind[i], NULL, "AR.", 1, 8, false, k == 1, 1);
            add("e", behind[i], NULL, "AR.", 1, 8, false, k == 1, k == i ? 2 : 1);
            add("e", behind[i], NULL, "AM.", 1, 8, k == 1, k == 0, 1);
        }
    }
    add("e", "d", "s", "ARR.", 1, 8, false, false, 1);
}

/* Memory that is given back while others may use it: values of 64 KiB, whose rings go whenever the
   receiver finds nothing; values that are dropped while another thread purges; lanes that end while
   others live.                                                                                */
static void memory_models(void)
{
    static const char *const trimmed[] = {"s", "c", "a", "cs", "sc", "rs", "as", "m", "ms"};
    static const char *const idle[] = {"*",   "T*",  "N*",  "P*",  "D*",
                                       "BT*", "AP*", "TT.", "PP.", "TBT."};
    static const char *const late[] = {"mc", "mmc", "mms", "cm", "mcs"};
    static const char *const leaves[] = {"", "T", "R", "C"};
    static const char *const ended[] = {"k", "hk", "h", "kh"};
    static const char *const goes_on[] = {"R.", "T*", "RR*", "N*", "P*", "TT."};
    size_t i, r;
    for (i = 0; i < COUNT(trimmed); i++) {
        for (r = 0; r < COUNT(idle); r++) {
            unsigned capacity = strchr(idle[r], '.') != NULL ? 0 : (unsigned)(i + r) % 3;
            bool two_calls = trimmed[i][1] != '\0';
            add(trimmed[i], NULL, NULL, idle[r], capacity, LARGEST, r % 4 == 3, (i + r) % 2 == 1,
                two_calls ? 1 : 2);
            if (r < 4 && !two_calls) {
                add(trimmed[i], r % 2 == 0 ? "s" : "c", NULL, idle[r], capacity, LARGEST,
                    r % 4 == 3, (i + r) % 2 == 0, 1);
            }
        }
    }
    for (i = 0; i < COUNT(late); i++) {
        for (r = 0; r < COUNT(leaves); r++) {
            add(late[i], NULL, NULL, leaves[r], 0, 4096, r % 2 == 1, i % 2 == 1, 2);
            add(late[i], "c", NULL, leaves[r], 0, 4096, r % 2 == 0, i % 2 == 0, 1);
        }
    }
    for (i = 0; i < COUNT(ended); i++) {
        for (r = 0; r < COUNT(goes_on); r++) {
            spins = (i + r) % 2 == 0;
            add(ended[i], "s", NULL, goes_on[r], 0, 8, true, r % 3 == 0, 1);
            add(ended[i], "k", NULL, goes_on[r], 0, 8, true, r % 3 == 2, 1);
            add("ss", ended[i], NULL, goes_on[r], 0, 8, true, r % 3 == 1, 1);
        }
    }
    spins = false;
}

/* Lanes whose receiver looks again before it sleeps, and looks ahead. */
static void lanes_that_spin(const char *const *lane, size_t count)
{
    static const char *const receivers[] = {"*", "P*", "M*", "D*", "P.", "PD."};
    size_t i, k, r;
    spins = true;
    for (i = 0; i < count; i++) {
        for (r = 0; r < COUNT(receivers); r++) {
            bool stays = strchr(receivers[r], '.') != NULL;
            add(lane[i], NULL, NULL, receivers[r], stays ? 0 : 1, 8, true, (i + r) % 2 == 1, 2);
            for (k = i; k < count; k++) {
                if ((i + k + r) % 2 == 0) {
                    add(lane[i], lane[k], NULL, receivers[r], stays ? 0 : 1, 8, true,
                        (i + k) % 3 == 1, 1);
                }
            }
        }
    }
    spins = false;
}

void mpsc_models(void)
{
    static const char *const one[] = {"s", "d", "t", "m", "n", "c",  "a",  "e",
                                      "r", "k", "x", "w", "q", "ss", "ts", "ms"};
    static const char *const two[] = {"s", "d", "t", "m", "n", "c", "a", "r", "k", "u", "K"};
    static const char *const receivers[] = {"*",  "T*",  "D*", "M*", "N*", "P*", "L*",
                                            "C*", "RC*", "",   "T",  "D",  "R",  "M"};
    static const char *const ends[] = {"*", "RC*", "T"};
    static const char *const lane[] = {"s", "ss", "t", "n", "c", "a", "k"};
    static const char *const counted[] = {"s", "d", "t", "m", "n", "ss"};
    static const char *const grow[] = {"ms", "mms", "mt", "cms", "mas"};
    static const unsigned capacities[] = {1, 2, 0};
    size_t i, k, r, c, b;
    for (i = 0; i < COUNT(one); i++) {
        for (r = 0; r < COUNT(receivers); r++) {
            for (c = 0; c < COUNT(capacities); c++) {
                for (b = 0; b < 2; b++) {
                    bool taken =
                        (capacities[c] == 1 && one[i][1] == '\0') || (i + r + c + b) % 2 == 0;
                    if (taken && !wait_for_each_other(one[i], receivers[r])) {
                        add(one[i], NULL, NULL, receivers[r], capacities[c], 8, false, b == 1, 2);
                    }
                }
            }
        }
    }
    for (i = 0; i < COUNT(two); i++) {
        for (k = i; k < COUNT(two); k++) {
            for (r = 0; r < COUNT(ends); r++) {
                for (c = 0; c < COUNT(capacities); c++) {
                    for (b = 0; b < 2; b++) {
                        /* Somebody has to send; the heart of it is looked at more closely. */
                        bool deep = c == 0 && r == 0 && two[i][0] == 's' &&
                                    strchr("sta", two[k][0]) != NULL;
                        if (two[i][0] != 'u' && two[i][0] != 'K') {
                            add(two[i], two[k], NULL, ends[r], capacities[c], 8, false, b == 1,
                                deep ? 2 : 1);
                        }
                    }
                }
            }
        }
    }
    for (c = 0; c < COUNT(capacities); c++) {
        for (b = 0; b < 2; b++) {
            add("s", "s", c == 2 ? "t" : "s", "*", capacities[c], 8, false, b == 1, 1);
            add(b == 0 ? "s" : "d", b == 0 ? "t" : "a", "s", "RC*", capacities[c], 8, false,
                (b + c) % 2 == 1, 1);
        }
    }
    for (i = 0; i < COUNT(lane); i++) {
        for (k = i; k < COUNT(lane); k++) {
            for (c = 0; c < COUNT(capacities); c++) {
                add(lane[i], lane[k], NULL, k % 2 == 0 ? "*" : "M*", capacities[c], 8, true,
                    (i + k + c) % 2 == 1, 1);
            }
        }
        for (r = 0; r < COUNT(receivers); r++) {
            add(lane[i], NULL, NULL, receivers[r], r % 3, 8, true, (i + r) % 2 == 1, 2);
        }
        add(lane[i], "u", NULL, "*", 1, 8, true, i % 2 == 0, 1);
        add(lane[i], "K", NULL, "D*", 1, 8, true, i % 2 == 1, 1);
    }
    by_bytes = true;
    for (i = 0; i < COUNT(counted); i++) {
        add(counted[i], NULL, NULL, "*", 1 + i % 2, 8, false, i % 3 == 0, 2);
        add(counted[i], NULL, NULL, "RC*", 1 + i % 2, 8, false, i % 3 == 1, 2);
        add(counted[i], "s", NULL, "M*", 1, 8, false, i % 2 == 0, 1);
        add(counted[i], "t", NULL, "T*", 2, 8, false, i % 2 == 1, 1);
    }
    by_bytes = false;
    /* Threads that look again before they sleep. */
    for (i = 0; i < COUNT(one) && one[i][1] == '\0'; i++) {
        spin(one[i], "*", 1 + i % 2, i % 3 == 1);
        spin(one[i], "D*", 1 + i % 2, i % 3 == 2);
    }
    add("s", "s", NULL, "*", 1, 8, true, false, 2);
    add("s", "t", NULL, "D", 1, 8, true, true, 2);
    add("k", "s", NULL, "*", 0, 8, true, false, 2);
    add("k", "k", "k", "R", 0, 8, true, false, 1);
    /* Rings that have to grow: two places at first, or one; and one that is given back. */
    for (i = 0; i < COUNT(grow); i++) {
        for (k = 0; k < 2; k++) {
            add(grow[i], NULL, NULL, "*", 0, 2048, k == 1, false, 2);
            add(grow[i], NULL, NULL, "M*", 3, 4096, k == 1, true, 1);
            add(grow[i], "s", NULL, "R", 0, 4096, k == 1, false, 1);
            add(grow[i], "m", NULL, "M*", 0, 2048, k == 1, true, 1);
        }
    }
    add("ms", NULL, NULL, "*", 0, 40000, false, false, 1);
    add("ss", "s", NULL, "N*", 0, 40000, false, true, 1);
    one_call_models();
    memory_models();
    lanes_that_spin(lane, COUNT(lane));
}
