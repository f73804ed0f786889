/* Models of select: one thread waits for two things at once until both came, while two others make
   them come. Whatever wins is carried out, whatever does not win is still there.

   r recv from an mpsc channel     e the same, that only ends       o recv from a one-shot
   b recv from a broadcast         w a watch changed                c cancelled
   s send to a full mpsc channel   v reserve in one                 m the channel's receiver goes
   n the one-shot's receiver goes  f the broadcast's receiver goes  g the watch's receiver goes
   d a deadline                    _ never
   The thread takes turns by vkp_select or vkp_select_fair, first with deadline 0 in some models.

   "select-leaves": a select that waits for room, s or v, makes one choice and leaves; a sender
   stands behind it. The receiver makes one call. When the other case won, or the deadline passed,
   the room is the sender's behind, and nobody calls anything that would let it in later.        */
#include "environment.h"
#include "families.h"

#include <stdio.h>
#include <string.h>

#define SOON 1000
#define VALUE 5u

struct select_scenario {
    char kind[2];
    bool fair;
    bool look_first; /* with deadline 0 */
    bool give_up;    /* with a deadline: what did not come is received later */
};

struct source {
    vkp_mpsc_tx *tx;
    vkp_mpsc_rx *rx;
    vkp_oneshot *slot;
    vkp_broadcast_tx *broadcast_tx;
    vkp_broadcast_rx *broadcast_rx;
    vkp_watch_tx *watch_tx;
    vkp_watch_rx *watch_rx;
    vkp_cancel *token;
    vkp_mpsc_permit permit;
    uint64_t out;
    bool begun; /* the other side has begun to make it come, */
    bool done;  /* and is through */
    bool won;
};

static struct {
    struct source source[2];
} now;

static const struct select_scenario *scenario(void)
{
    return (const struct select_scenario *)(uintptr_t)model_now->scenario[0];
}

static void expect(vkp_status status)
{
    if (status != VKP_OK) {
        model_fail("a call that cannot fail returned: %s", vkp_status_str(status));
    }
}

/* ---- the two ends of each kind ---- */

static void open_mpsc(struct source *self, bool full)
{
    uint64_t value = VALUE - 1;
    vkp_mpsc_config config = VKP_ZERO;
    config.elem_bytes = sizeof value;
    config.capacity_items = 1;
    config.env = environment();
    expect(vkp_mpsc_open(&config, &self->tx, &self->rx));
    if (full) {
        expect(vkp_mpsc_try_send(self->tx, &value));
    }
}

static void open_broadcast(struct source *self)
{
    vkp_broadcast_config config = VKP_ZERO;
    config.elem_bytes = sizeof(uint64_t);
    config.capacity_items = 1;
    config.env = environment();
    expect(vkp_broadcast_open(&config, &self->broadcast_tx));
    expect(vkp_broadcast_subscribe(self->broadcast_tx, &self->broadcast_rx));
}

static void open_watch(struct source *self)
{
    vkp_watch_config config = VKP_ZERO;
    config.elem_bytes = sizeof(uint64_t);
    config.env = environment();
    expect(vkp_watch_open(&config, &self->watch_tx));
    expect(vkp_watch_subscribe(self->watch_tx, &self->watch_rx));
}

static void open_source(struct source *self, char kind)
{
    switch (kind) {
    case 'r':
    case 'e':
    case 'm':
        open_mpsc(self, false);
        break;
    case 's':
    case 'v':
        open_mpsc(self, true);
        break;
    case 'o':
    case 'n':
        expect(vkp_oneshot_open(environment(), sizeof(uint64_t), NULL, NULL, &self->slot));
        break;
    case 'b':
    case 'f':
        open_broadcast(self);
        break;
    case 'w':
    case 'g':
        open_watch(self);
        break;
    case 'c':
        expect(vkp_cancel_open(environment(), NULL, &self->token));
        break;
    default:
        break;
    }
}

static vkp_case make_case(struct source *self, char kind)
{
    switch (kind) {
    case 'r':
    case 'e':
        return vkp_case_mpsc_recv(self->rx, &self->out);
    case 'o':
        return vkp_case_oneshot_recv(self->slot, &self->out);
    case 'b':
        return vkp_case_broadcast_recv(self->broadcast_rx, &self->out);
    case 'w':
        return vkp_case_watch_changed(self->watch_rx);
    case 'c':
        return vkp_case_cancel(self->token);
    case 's':
        self->out = VALUE;
        return vkp_case_mpsc_send(self->tx, &self->out);
    case 'v':
        return vkp_case_mpsc_reserve(self->tx, &self->permit);
    case 'm':
        return vkp_case_mpsc_closed(self->tx);
    case 'n':
        return vkp_case_oneshot_closed(self->slot);
    case 'f':
        return vkp_case_broadcast_closed(self->broadcast_tx);
    case 'g':
        return vkp_case_watch_closed(self->watch_tx);
    case 'd':
        return vkp_case_deadline(SOON);
    default:
        return vkp_case_never();
    }
}

/* The other thread: make it come. */
static void fire(struct source *self, char kind)
{
    uint64_t value = VALUE;
    self->begun = true;
    switch (kind) {
    case 'r':
        expect(vkp_mpsc_try_send(self->tx, &value));
        vkp_mpsc_tx_unref(self->tx);
        break;
    case 'e':
        vkp_mpsc_tx_unref(self->tx);
        break;
    case 'o':
        expect(vkp_oneshot_send(self->slot, &value));
        break;
    case 'b':
        expect(vkp_broadcast_send(self->broadcast_tx, &value));
        vkp_broadcast_tx_unref(self->broadcast_tx);
        break;
    case 'w':
        expect(vkp_watch_send(self->watch_tx, &value));
        vkp_watch_tx_unref(self->watch_tx);
        break;
    case 'c':
        vkp_cancel_trigger(self->token);
        break;
    case 's':
    case 'v':
        expect(vkp_mpsc_recv(self->rx, VKP_FOREVER, &value));
        MODEL_CHECK(value == VALUE - 1);
        break;
    case 'm':
        vkp_mpsc_rx_unref(self->rx);
        break;
    case 'n':
        vkp_oneshot_close(self->slot);
        break;
    case 'f':
        vkp_broadcast_rx_unref(self->broadcast_rx);
        break;
    case 'g':
        vkp_watch_rx_unref(self->watch_rx);
        break;
    default:
        break;
    }
    self->done = true;
}

/* It won, and was carried out. */
static void won(struct source *self, char kind, const vkp_case *by)
{
    MODEL_CHECK(!self->won && (self->begun || kind == 'd'));
    self->won = true;
    MODEL_CHECK(by->status == (kind == 'e' ? VKP_ERR_CLOSED : VKP_OK));
    if (strchr("rob", kind) != NULL) {
        MODEL_CHECK(self->out == VALUE);
    }
    if (kind == 'v') {
        uint64_t value = VALUE;
        memcpy(self->permit.item, &value, sizeof value);
        vkp_mpsc_commit(&self->permit);
    }
}

/* It did not win: it is still there, and comes by its own call. */
static void take_later(struct source *self, char kind)
{
    uint64_t value = VALUE;
    vkp_status status = VKP_OK;
    switch (kind) {
    case 'r':
        status = vkp_mpsc_recv(self->rx, VKP_FOREVER, &value);
        break;
    case 'e':
        MODEL_CHECK(vkp_mpsc_recv(self->rx, VKP_FOREVER, &value) == VKP_ERR_CLOSED);
        break;
    case 'o':
        status = vkp_oneshot_recv(self->slot, VKP_FOREVER, &value);
        break;
    case 'b':
        status = vkp_broadcast_recv(self->broadcast_rx, VKP_FOREVER, &value);
        break;
    case 'w':
        status = vkp_watch_changed(self->watch_rx, VKP_FOREVER);
        break;
    case 'c':
        status = vkp_cancel_wait(self->token, VKP_FOREVER);
        break;
    case 's':
    case 'v':
        status = vkp_mpsc_send(self->tx, &value, VKP_FOREVER);
        break;
    case 'm':
        status = vkp_mpsc_wait_closed(self->tx, VKP_FOREVER);
        break;
    case 'n':
        status = vkp_oneshot_wait_closed(self->slot, VKP_FOREVER);
        break;
    case 'f':
        status = vkp_broadcast_wait_closed(self->broadcast_tx, VKP_FOREVER);
        break;
    case 'g':
        status = vkp_watch_wait_closed(self->watch_tx, VKP_FOREVER);
        break;
    default:
        break;
    }
    MODEL_CHECK(status == VKP_OK && value == VALUE);
}

/* After all threads: nothing is left over, and the ends go. */
static void close_source(struct source *self, char kind)
{
    uint64_t value = 0;
    switch (kind) {
    case 'r':
    case 'e':
        MODEL_CHECK(vkp_mpsc_try_recv(self->rx, &value) == VKP_ERR_CLOSED);
        vkp_mpsc_rx_unref(self->rx);
        break;
    case 's':
    case 'v':
        expect(vkp_mpsc_try_recv(self->rx, &value));
        MODEL_CHECK(value == VALUE);
        MODEL_CHECK(vkp_mpsc_try_recv(self->rx, &value) == VKP_ERR_EMPTY);
        vkp_mpsc_rx_unref(self->rx);
        vkp_mpsc_tx_unref(self->tx);
        break;
    case 'm':
        vkp_mpsc_tx_unref(self->tx);
        break;
    case 'o':
    case 'n':
        vkp_oneshot_tx_unref(self->slot);
        vkp_oneshot_rx_unref(self->slot);
        break;
    case 'b':
        MODEL_CHECK(vkp_broadcast_try_recv(self->broadcast_rx, &value) == VKP_ERR_CLOSED);
        vkp_broadcast_rx_unref(self->broadcast_rx);
        break;
    case 'f':
        vkp_broadcast_tx_unref(self->broadcast_tx);
        break;
    case 'w':
        MODEL_CHECK(vkp_watch_changed(self->watch_rx, 0) == VKP_ERR_CLOSED);
        vkp_watch_rx_unref(self->watch_rx);
        break;
    case 'g':
        vkp_watch_tx_unref(self->watch_tx);
        break;
    case 'c':
        vkp_cancel_unref(self->token);
        break;
    default:
        break;
    }
}

/* ---- the models ---- */

static void before(void)
{
    unsigned i;
    memset(&now, 0, sizeof now);
    for (i = 0; i < 2; i++) {
        open_source(&now.source[i], scenario()->kind[i]);
    }
}

/* Whether a select has to find it now. */
static bool is_due(unsigned which)
{
    return now.source[which].done && !now.source[which].won &&
           strchr("d_", scenario()->kind[which]) == NULL;
}

static void choose_until_both_came(void)
{
    const struct select_scenario *s = scenario();
    uint32_t turn = 0;
    vkp_case cases[2];
    unsigned left = 0;
    unsigned i;
    bool look = s->look_first;
    for (i = 0; i < 2; i++) {
        cases[i] = make_case(&now.source[i], s->kind[i]);
        left += s->kind[i] != '_';
    }
    while (left > 0) {
        size_t which = 9;
        uint64_t deadline_ns = look ? 0 : s->give_up ? SOON : VKP_FOREVER;
        bool known[2] = {is_due(0), is_due(1)};
        vkp_status status = s->fair ? vkp_select_fair(cases, 2, &turn, deadline_ns, &which)
                                    : vkp_select(cases, 2, deadline_ns, &which);
        model_note("select: %s, %zu", vkp_status_str(status), which);
        if (status == VKP_ERR_TIMEOUT) {
            MODEL_CHECK(deadline_ns != VKP_FOREVER);
            MODEL_CHECK((!known[0] && !known[1]) || !model_has_one_time());
            if (!look) {
                break;
            }
            look = false;
            continue;
        }
        look = false;
        MODEL_CHECK(status == VKP_OK && which < 2);
        MODEL_CHECK(s->fair || which == 0 || !known[0] || !model_has_one_time());
        won(&now.source[which], s->kind[which], &cases[which]);
        cases[which] = vkp_case_never();
        left--;
    }
    for (i = 0; i < 2; i++) {
        if (!now.source[i].won && s->kind[i] != 'd') {
            take_later(&now.source[i], s->kind[i]);
        }
    }
}

static void thread(unsigned index)
{
    if (index < 2) {
        fire(&now.source[index], scenario()->kind[index]);
    } else {
        choose_until_both_came();
    }
}

static void after(void)
{
    unsigned i;
    for (i = 0; i < 2; i++) {
        close_source(&now.source[i], scenario()->kind[i]);
    }
}

/* ---- a select that leaves the queue of senders ---- */

struct leaves_scenario {
    char kind;  /* s or v, */
    char other; /* and what else the select waits for */
    bool fair;
};

static struct {
    struct source queue;
    struct source other;
    vkp_mpsc_tx *behind_tx;
    bool behind_sent;
} leaves;

static const struct leaves_scenario *leaves_scenario(void)
{
    return (const struct leaves_scenario *)(uintptr_t)model_now->scenario[0];
}

static void leaves_before(void)
{
    memset(&leaves, 0, sizeof leaves);
    open_source(&leaves.queue, leaves_scenario()->kind);
    open_source(&leaves.other, leaves_scenario()->other);
    leaves.behind_tx = vkp_mpsc_tx_ref(leaves.queue.tx);
}

static void choose_once(void)
{
    const struct leaves_scenario *s = leaves_scenario();
    uint32_t turn = 1;
    size_t which = 9;
    vkp_case cases[2];
    vkp_status status;
    cases[0] = make_case(&leaves.queue, s->kind);
    cases[1] = make_case(&leaves.other, s->other);
    status = s->fair ? vkp_select_fair(cases, 2, &turn, SOON, &which)
                     : vkp_select(cases, 2, SOON, &which);
    model_note("select: %s, %zu", vkp_status_str(status), which);
    MODEL_CHECK(status == VKP_OK || status == VKP_ERR_TIMEOUT);
    if (status == VKP_OK && which == 0) {
        leaves.queue.begun = true; /* the receiver's one call is what made room */
        won(&leaves.queue, s->kind, &cases[0]);
        vkp_mpsc_close(leaves.queue.rx); /* the sender behind need not wait any longer */
    } else if (status == VKP_OK) {
        won(&leaves.other, s->other, &cases[1]);
    }
}

static void leaves_thread(unsigned index)
{
    uint64_t value = VALUE + 1;
    vkp_status status;
    switch (index) {
    case 0:
        fire(&leaves.queue, leaves_scenario()->kind);
        break;
    case 1:
        fire(&leaves.other, leaves_scenario()->other);
        break;
    case 2:
        choose_once();
        break;
    default:
        status = vkp_mpsc_send(leaves.behind_tx, &value, VKP_FOREVER);
        model_note("behind: %s", vkp_status_str(status));
        MODEL_CHECK(status == VKP_OK || status == VKP_ERR_CLOSED);
        leaves.behind_sent = status == VKP_OK;
        break;
    }
}

static void leaves_after(void)
{
    char other = leaves_scenario()->other;
    uint64_t value = 0;
    unsigned left = 0;
    MODEL_CHECK(leaves.queue.won || leaves.behind_sent);
    while (vkp_mpsc_try_recv(leaves.queue.rx, &value) == VKP_OK) {
        MODEL_CHECK(value == VALUE || (leaves.behind_sent && value == VALUE + 1));
        left++;
    }
    MODEL_CHECK(left == (unsigned)leaves.queue.won + (unsigned)leaves.behind_sent);
    vkp_mpsc_tx_unref(leaves.behind_tx);
    vkp_mpsc_tx_unref(leaves.queue.tx);
    vkp_mpsc_rx_unref(leaves.queue.rx);
    if (!leaves.other.won && (other == 'r' || other == 'o')) {
        take_later(&leaves.other, other);
    }
    close_source(&leaves.other, other);
}

static void leaves_models(void)
{
    static const char others[] = "rocd_";
    static struct leaves_scenario all[2 * sizeof others];
    struct leaves_scenario *s = all;
    size_t i;
    size_t k;
    for (i = 0; i < 2; i++) {
        for (k = 0; others[k] != '\0'; k++) {
            struct model model = {.threads = 4, .preemptions = 1, .stale = 1};
            *s = (struct leaves_scenario){i == 0 ? 's' : 'v', others[k], (i + k) % 2 == 1};
            model.before = leaves_before;
            model.thread = leaves_thread;
            model.after = leaves_after;
            model.no_barrier = k % 2 == 1;
            model.scenario[0] = (uintptr_t)s;
            snprintf(model.name, sizeof model.name, "select-leaves %c %c%s%s", s->kind, s->other,
                     s->fair ? ", fair" : "", model.no_barrier ? ", fenced" : "");
            model_add(&model);
            s++;
        }
    }
}

void select_models(void)
{
    static const char kinds[] = "reobwcsvmnfgd_";
    static struct select_scenario all[sizeof kinds * sizeof kinds];
    struct select_scenario *s = all;
    size_t i;
    size_t k;
    for (i = 0; kinds[i] != '\0'; i++) {
        for (k = 0; kinds[k] != '\0'; k++) {
            struct model model = {.threads = 3, .preemptions = 1, .stale = 1};
            if (kinds[i] == '_' && kinds[k] == '_') {
                continue;
            }
            *s = (struct select_scenario){
                {kinds[i], kinds[k]}, (i + k) % 2 == 1, (i + 2 * k) % 3 == 0, (2 * i + k) % 5 == 0};
            model.before = before;
            model.thread = thread;
            model.after = after;
            model.no_barrier = (i + k) % 3 == 1;
            model.scenario[0] = (uintptr_t)s;
            snprintf(model.name, sizeof model.name, "select %c %c%s%s%s%s", kinds[i], kinds[k],
                     s->fair ? ", fair" : "", s->look_first ? ", looks first" : "",
                     s->give_up ? ", gives up" : "", model.no_barrier ? ", fenced" : "");
            model_add(&model);
            s++;
        }
    }
    leaves_models();
}
