/* Models of broadcast: one or two senders, one to three receivers; values that count their owners.

   Senders:   s send    n subscribe, try_recv, unref    r get_receivers
              x wait_closed, deadline    w wait_closed
   Receivers: R recv    D recv, deadline    T try_recv    M recv_many of 2
              N recv_many of 2, deadline 0    L len    b resubscribe, drain that one with try_recv
              * receive until CLOSED                                                            */
#include "environment.h"
#include "families.h"

#include <stdio.h>
#include <string.h>

#define ENDS 3
#define VALUES 4 /* of one sender */
#define SOON 1000

struct broadcast_scenario {
    const char *senders[ENDS];
    const char *receivers[ENDS];
    unsigned capacity;
    bool owned; /* retain and drop */
};

struct receiver {
    vkp_broadcast_rx *rx;
    unsigned got[ENDS * VALUES]; /* values in their order */
    unsigned received;
    uint64_t missed;
    unsigned least[ENDS];  /* that may come next of each sender */
    unsigned begun_before; /* sends begun when it began, */
    unsigned done_before;  /* sends that were over for sure */
    bool closed;
};

static struct {
    vkp_broadcast_tx *tx[ENDS];
    struct receiver receivers[ENDS];
    unsigned senders;
    unsigned readers;
    int owners[ENDS][VALUES];
    unsigned next[ENDS];
    unsigned begun;         /* sends begun, */
    unsigned accepted;      /* and OK */
    unsigned open;          /* begun and not over */
    unsigned strong;        /* senders that have not begun to go */
    unsigned alive;         /* receivers that have not begun to go */
    unsigned alive_at_most; /* receivers that have not gone for sure */
    unsigned deserted;      /* how often there came to be none */
} now;

static const struct broadcast_scenario *scenario(void)
{
    return (const struct broadcast_scenario *)(uintptr_t)model_now->scenario[0];
}

static int *owners_of(const void *item)
{
    uint64_t value;
    memcpy(&value, item, sizeof value);
    MODEL_CHECK(value / 16 < ENDS && value % 16 < VALUES);
    return &now.owners[value / 16][value % 16];
}

static void retain(void *user, void *item)
{
    int *owners = owners_of(item);
    MODEL_CHECK(user == &now && *owners > 0);
    ++*owners;
}

static void drop(void *user, void *item)
{
    int *owners = owners_of(item);
    MODEL_CHECK(user == &now && *owners > 0);
    --*owners;
}

/* ---- senders ---- */

static void send(unsigned sender)
{
    uint64_t value = sender * 16u + now.next[sender];
    bool nobody = now.alive_at_most == 0;
    bool deserted = now.alive == 0;
    unsigned before = now.deserted;
    vkp_status status;
    MODEL_CHECK(now.next[sender] < VALUES);
    now.owners[sender][now.next[sender]++] = 1;
    now.begun++;
    now.open++;
    status = vkp_broadcast_send(now.tx[sender], &value);
    model_note("sent %llx: %s", (unsigned long long)value, vkp_status_str(status));
    now.open--;
    if (status == VKP_OK) {
        now.accepted++;
        MODEL_CHECK(!nobody || !model_has_one_time());
    } else {
        MODEL_CHECK(status == VKP_ERR_CLOSED);
        MODEL_CHECK(deserted || now.deserted > before || !model_has_one_time());
        now.begun--;
        now.owners[sender][value % 16] -= 1;
    }
}

/* ---- receivers ---- */

static void got(struct receiver *self, const void *item)
{
    uint64_t value;
    unsigned sender;
    memcpy(&value, item, sizeof value);
    sender = (unsigned)(value / 16);
    model_note("received %llx", (unsigned long long)value);
    MODEL_CHECK(sender < ENDS && value % 16 < now.next[sender]);
    MODEL_CHECK(value % 16 >= self->least[sender] && !self->closed);
    self->least[sender] = (unsigned)(value % 16) + 1;
    self->got[self->received++] = (unsigned)value;
    if (scenario()->owned) {
        MODEL_CHECK(*owners_of(item) > 0);
        drop(&now, &value);
    }
}

static uint64_t seen(const struct receiver *self)
{
    return self->received + self->missed;
}

static vkp_status receive(struct receiver *self, char how)
{
    uint64_t items[2];
    size_t count = 1;
    size_t i;
    bool must = now.open == 0 && now.accepted > self->begun_before + seen(self);
    uint64_t before = seen(self);
    vkp_status status;
    switch (how) {
    case 'T':
        status = vkp_broadcast_try_recv(self->rx, items);
        break;
    case 'M':
    case 'N':
        status = vkp_broadcast_recv_many(self->rx, how == 'M' ? VKP_FOREVER : 0, items, 2, &count);
        break;
    default:
        status = vkp_broadcast_recv(self->rx, how == 'D' ? SOON : VKP_FOREVER, items);
        break;
    }
    model_note("received: %s", vkp_status_str(status));
    switch ((int)status) {
    case VKP_OK:
        MODEL_CHECK(count == 1 || (count == 2 && (how == 'M' || how == 'N')));
        for (i = 0; i < count; i++) {
            got(self, &items[i]);
        }
        break;
    case VKP_ERR_LAGGED:
        MODEL_CHECK(vkp_broadcast_get_missed(self->rx) > 0);
        self->missed += vkp_broadcast_get_missed(self->rx);
        /* More were on their way than the ring holds, and those it holds are still there. */
        MODEL_CHECK(now.begun - self->done_before > before + scenario()->capacity);
        MODEL_CHECK(now.begun - self->done_before >= seen(self) + scenario()->capacity);
        break;
    case VKP_ERR_CLOSED:
        MODEL_CHECK(now.strong == 0);
        MODEL_CHECK(seen(self) <= now.accepted - self->done_before);
        MODEL_CHECK(seen(self) + self->begun_before >= now.accepted);
        self->closed = true;
        break;
    case VKP_ERR_EMPTY:
        MODEL_CHECK(how == 'T' && !self->closed && (!must || !model_has_one_time()));
        break;
    case VKP_ERR_TIMEOUT:
        MODEL_CHECK((how == 'D' || how == 'N') && !self->closed);
        MODEL_CHECK(!must || !model_has_one_time());
        break;
    default:
        model_fail("a receive returned: %s", vkp_status_str(status));
    }
    MODEL_CHECK(seen(self) <= now.begun - self->done_before);
    return status;
}

static void leave(struct receiver *self)
{
    now.alive--;
    now.deserted += now.alive == 0;
    vkp_broadcast_rx_unref(self->rx);
    now.alive_at_most--;
}

/* Another receiver, for a while, beside a sender or another receiver. */
static void visit(vkp_broadcast_tx *tx, vkp_broadcast_rx *beside)
{
    struct receiver fresh;
    vkp_status status;
    memset(&fresh, 0, sizeof fresh);
    fresh.done_before = now.accepted;
    now.alive_at_most++;
    status = tx != NULL ? vkp_broadcast_subscribe(tx, &fresh.rx)
                        : vkp_broadcast_resubscribe(beside, &fresh.rx);
    MODEL_CHECK(status == VKP_OK);
    if (!model_has_one_time()) {
        fresh.done_before = 0;
    }
    now.alive++;
    fresh.begun_before = now.begun;
    do {
        status = receive(&fresh, 'T');
    } while (status == VKP_OK || status == VKP_ERR_LAGGED);
    leave(&fresh);
}

static void sender_call(unsigned sender, char call)
{
    vkp_broadcast_tx *tx = now.tx[sender];
    bool known = now.alive_at_most == 0;
    bool deserted = now.alive == 0;
    unsigned before = now.deserted;
    vkp_status status;
    switch (call) {
    case 's':
        send(sender);
        break;
    case 'n':
        visit(tx, NULL);
        break;
    case 'r':
        MODEL_CHECK(vkp_broadcast_get_receivers(tx) <= ENDS + 2);
        break;
    default:
        status = vkp_broadcast_wait_closed(tx, call == 'x' ? SOON : VKP_FOREVER);
        model_note("waited for the close: %s", vkp_status_str(status));
        if (status == VKP_OK) {
            MODEL_CHECK(deserted || now.deserted > before || !model_has_one_time());
        } else {
            MODEL_CHECK(status == VKP_ERR_TIMEOUT && call == 'x');
            MODEL_CHECK(!known || !model_has_one_time());
        }
        break;
    }
}

static void receiver_call(struct receiver *self, char call)
{
    switch (call) {
    case 'L':
        MODEL_CHECK(vkp_broadcast_get_len(self->rx) <= ENDS * VALUES);
        break;
    case 'b':
        visit(NULL, self->rx);
        break;
    case '*':
        while (receive(self, 'R') != VKP_ERR_CLOSED) {
        }
        break;
    default:
        (void)receive(self, call);
        break;
    }
}

static void before(void)
{
    const struct broadcast_scenario *s = scenario();
    vkp_broadcast_config config = VKP_ZERO;
    vkp_broadcast_tx *tx = NULL;
    vkp_status status;
    memset(&now, 0, sizeof now);
    config.elem_bytes = sizeof(uint64_t);
    config.capacity_items = s->capacity;
    config.retain = s->owned ? retain : NULL;
    config.drop = s->owned ? drop : NULL;
    config.user = &now;
    config.env = environment();
    status = vkp_broadcast_open(&config, &tx);
    MODEL_CHECK(status == VKP_OK);
    for (; now.senders < ENDS && s->senders[now.senders] != NULL; now.senders++) {
        now.tx[now.senders] = vkp_broadcast_tx_ref(tx);
        now.strong++;
    }
    for (; now.readers < ENDS && s->receivers[now.readers] != NULL; now.readers++) {
        status = vkp_broadcast_subscribe(tx, &now.receivers[now.readers].rx);
        MODEL_CHECK(status == VKP_OK);
        now.alive++;
    }
    now.alive_at_most = now.alive;
    vkp_broadcast_tx_unref(tx);
}

static void thread(unsigned index)
{
    const char *call;
    if (index < now.senders) {
        for (call = scenario()->senders[index]; *call != '\0'; call++) {
            sender_call(index, *call);
        }
        now.strong--;
        vkp_broadcast_tx_unref(now.tx[index]);
        return;
    }
    index -= now.senders;
    for (call = scenario()->receivers[index]; *call != '\0'; call++) {
        receiver_call(&now.receivers[index], *call);
    }
    leave(&now.receivers[index]);
}

static unsigned place_in(const struct receiver *in, unsigned value)
{
    unsigned i;
    for (i = 0; i < in->received && in->got[i] != value; i++) {
    }
    return i;
}

static void after(void)
{
    const struct receiver *a = &now.receivers[0];
    const struct receiver *b = &now.receivers[1];
    unsigned last = 0;
    unsigned i;
    unsigned k;
    for (i = 0; i < a->received; i++) { /* one order for all */
        unsigned at = place_in(b, a->got[i]);
        if (at < b->received) {
            MODEL_CHECK(at >= last);
            last = at;
        }
    }
    for (i = 0; i < ENDS; i++) {
        for (k = 0; k < VALUES && scenario()->owned; k++) {
            MODEL_CHECK(now.owners[i][k] == 0);
        }
    }
}

#define COUNT(array) (sizeof(array) / sizeof *(array))

static struct broadcast_scenario all[1000];
static unsigned used;

static void add(struct broadcast_scenario what, bool no_barrier, unsigned preemptions)
{
    struct model model = {.before = before, .thread = thread, .after = after, .stale = 1};
    size_t length;
    unsigned i;
    all[used] = what;
    model.no_barrier = no_barrier;
    model.preemptions = preemptions;
    model.scenario[0] = (uintptr_t)&all[used++];
    length = (size_t)snprintf(model.name, sizeof model.name, "broadcast");
    for (i = 0; i < ENDS && what.senders[i] != NULL; i++, model.threads++) {
        length += (size_t)snprintf(model.name + length, sizeof model.name - length, " %s",
                                   what.senders[i]);
    }
    for (i = 0; i < ENDS && what.receivers[i] != NULL; i++, model.threads++) {
        length += (size_t)snprintf(model.name + length, sizeof model.name - length, "%s %s",
                                   i == 0 ? " |" : "", what.receivers[i]);
    }
    snprintf(model.name + length, sizeof model.name - length, ", capacity %u%s%s", what.capacity,
             what.owned ? ", owned" : "", no_barrier ? ", fenced" : "");
    model_add(&model);
}

void broadcast_models(void)
{
    static const char *const senders[] = {"s", "ss", "sss", "ns", "xs", "rs", "ws", "sns"};
    static const char *const receivers[] = {"*", "T*", "D*", "M*", "N*", "L*", "b*", "T", "R", ""};
    static const char *const pairs[] = {"*", "T", "M", "D", ""};
    size_t i;
    size_t k;
    unsigned c;
    unsigned b;
    for (i = 0; i < COUNT(senders); i++) {
        for (k = 0; k < COUNT(receivers); k++) {
            for (c = 0; c < 4; c++) {
                if (senders[i][0] == 'w' && strpbrk(receivers[k], "R*") != NULL) {
                    continue; /* each would wait for the other, as it should */
                }
                add(
                    (struct broadcast_scenario){
                        {senders[i]}, {receivers[k]}, 1 + c % 2, c / 2 == 1},
                    (i + k + c) % 2 == 1, 2);
            }
        }
    }
    for (b = 0; b < 2; b++) {
        add((struct broadcast_scenario){{"s", "s"}, {"*"}, 1, false}, b == 1, 2);
        add((struct broadcast_scenario){{"s", "s"}, {"*"}, 1, true}, b == 0, 2);
        add((struct broadcast_scenario){{"ss", "s"}, {"T"}, 2, false}, b == 1, 2);
    }
    for (i = 0; i < COUNT(pairs); i++) {
        for (k = i; k < COUNT(pairs); k++) {
            for (b = 0; b < 2; b++) {
                add((struct broadcast_scenario){{"ss"}, {pairs[i], pairs[k]}, 1 + b, true}, b == 1,
                    1);
                add((struct broadcast_scenario){{"s", "s"}, {pairs[i], pairs[k]}, 1 + b, true},
                    b == 0, 1);
            }
        }
    }
    for (k = 0; k < COUNT(receivers); k++) {
        for (b = 0; b < 2; b++) {
            add((struct broadcast_scenario){{"s", "ss"}, {receivers[k]}, 1 + b, true}, b == 1, 1);
            add((struct broadcast_scenario){{"s", "n"}, {receivers[k]}, 1 + b, true}, b == 0, 1);
        }
    }
}
