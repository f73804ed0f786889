/* Models of watch: one or two senders, one to three receivers. Values are two words that must
   agree, or own something (then each is dropped once, and they are borrowed only).

   Senders:   s send    p replace    m send_if_modified    r get_receivers
              n subscribe, look, unref    x wait_closed, deadline    w wait_closed
   Receivers: c changed    d changed, deadline    g get    u get_and_update    h has_changed
              b borrow, release    B borrow_and_update, release    l borrow, and keep it
              k mark_changed, changed    y mark_unchanged    v clone, look, unref
              * changed and look until CLOSED                                                   */
#include "environment.h"
#include "families.h"

#include <stdio.h>
#include <string.h>

#define ENDS 3
#define VALUES 4 /* of one sender */
#define SOON 1000
#define INITIAL 0xf0u

struct watch_scenario {
    const char *senders[ENDS];
    const char *receivers[ENDS];
    bool owned;
};

typedef struct pair {
    uint64_t value;
    uint64_t again;
} pair;

struct receiver {
    vkp_watch_rx *rx;
    unsigned least[ENDS + 1]; /* value of each sender that may be seen next */
    unsigned changes;
    uint64_t last; /* value seen */
    bool marked;   /* a change may have gone with a mark */
};

static struct {
    vkp_watch_tx *tx[ENDS];
    struct receiver receivers[ENDS];
    unsigned senders;
    unsigned readers;
    unsigned next[ENDS];
    bool taken[256];
    unsigned drops[256];
    unsigned begun;    /* changes begun, */
    unsigned accepted; /* and OK */
    unsigned open;
    unsigned strong;
    unsigned alive;
    unsigned alive_at_most;
    unsigned deserted; /* how often there came to be no receiver */
    bool refused;
    bool borrows;
} now;

static const struct watch_scenario *scenario(void)
{
    return (const struct watch_scenario *)(uintptr_t)model_now->scenario[0];
}

static void drop(void *user, void *item)
{
    pair value;
    MODEL_CHECK(user == &now);
    memcpy(&value, item, sizeof value);
    model_note("drops %llx", (unsigned long long)value.value);
    MODEL_CHECK(value.value == value.again && value.value < 256);
    now.drops[value.value]++;
    MODEL_CHECK(now.drops[value.value] == 1);
}

/* ---- senders ---- */

static pair fresh_value(unsigned sender)
{
    pair value;
    MODEL_CHECK(now.next[sender] < VALUES);
    value.value = sender * 16u + 1 + now.next[sender]++;
    value.again = value.value;
    now.begun++;
    now.open++;
    return value;
}

static void settle(vkp_status status, bool may_be_closed, const pair *value)
{
    model_note("sent %llx: %s", (unsigned long long)value->value, vkp_status_str(status));
    now.open--;
    if (status == VKP_OK) {
        now.accepted++;
        now.taken[value->value] = true;
        return;
    }
    now.begun--;
    now.refused = true;
    MODEL_CHECK((status == VKP_ERR_CLOSED && may_be_closed) ||
                (status == VKP_ERR_NOMEM && now.borrows));
}

static bool modify(void *user, void *item)
{
    memcpy(item, user, sizeof(pair));
    return true;
}

/* A look that must not be torn, and not go back. */
static void saw(struct receiver *self, const pair *value)
{
    unsigned sender = (unsigned)(value->value / 16);
    unsigned number = (unsigned)(value->value % 16) - 1;
    model_note("saw %llx", (unsigned long long)value->value);
    self->last = value->value;
    MODEL_CHECK(value->value == value->again);
    MODEL_CHECK(!scenario()->owned || now.drops[value->value] == 0);
    if (value->value == INITIAL) {
        MODEL_CHECK(self->least[ENDS] == 0);
        return;
    }
    MODEL_CHECK(sender < ENDS && number < now.next[sender]);
    MODEL_CHECK(number + 1 >= self->least[sender]);
    self->least[sender] = number + 1;
    self->least[ENDS] = 1;
}

static void look(struct receiver *self, bool update)
{
    pair value;
    vkp_status status;
    if (scenario()->owned) {
        const void *item =
            update ? vkp_watch_borrow_and_update(self->rx) : vkp_watch_borrow(self->rx);
        MODEL_CHECK(item != NULL);
        memcpy(&value, item, sizeof value);
        saw(self, &value);
        vkp_watch_release(self->rx);
        return;
    }
    status = update ? vkp_watch_get_and_update(self->rx, &value) : vkp_watch_get(self->rx, &value);
    MODEL_CHECK(status == VKP_OK);
    saw(self, &value);
}

static void leave(struct receiver *self)
{
    now.alive--;
    now.deserted += now.alive == 0;
    vkp_watch_rx_unref(self->rx);
    now.alive_at_most--;
}

static void visit(vkp_watch_tx *tx, const struct receiver *beside)
{
    struct receiver fresh;
    vkp_status status;
    memset(&fresh, 0, sizeof fresh);
    if (beside != NULL) {
        fresh = *beside;
    }
    now.alive_at_most++;
    status =
        tx != NULL ? vkp_watch_subscribe(tx, &fresh.rx) : vkp_watch_rx_clone(beside->rx, &fresh.rx);
    MODEL_CHECK(status == VKP_OK);
    now.alive++;
    look(&fresh, false);
    (void)vkp_watch_is_changed(fresh.rx);
    leave(&fresh);
}

static void sender_call(unsigned sender, char call)
{
    vkp_watch_tx *tx = now.tx[sender];
    bool known = now.alive_at_most == 0;
    bool deserted = now.alive == 0;
    unsigned before = now.deserted;
    bool changed = false;
    vkp_status status;
    pair value;
    switch (call) {
    case 's':
        value = fresh_value(sender);
        status = vkp_watch_send(tx, &value);
        MODEL_CHECK(status != VKP_OK || !known || !model_has_one_time());
        settle(status, deserted || now.deserted > before || !model_has_one_time(), &value);
        break;
    case 'p':
        value = fresh_value(sender);
        settle(vkp_watch_replace(tx, &value), false, &value);
        break;
    case 'm':
        value = fresh_value(sender);
        status = vkp_watch_send_if_modified(tx, modify, &value, &changed);
        MODEL_CHECK(status != VKP_OK || changed);
        settle(status, false, &value);
        break;
    case 'r':
        MODEL_CHECK(vkp_watch_get_receivers(tx) <= ENDS + 2);
        break;
    case 'n':
        visit(tx, NULL);
        break;
    default:
        status = vkp_watch_wait_closed(tx, call == 'x' ? SOON : VKP_FOREVER);
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

/* ---- receivers ---- */

static vkp_status changed(struct receiver *self, uint64_t deadline_ns, bool marked)
{
    bool must = now.open == 0 && now.accepted > 0 && self->least[ENDS] == 0 && self->changes == 0 &&
                !self->marked;
    vkp_status status = vkp_watch_changed(self->rx, deadline_ns);
    model_note("changed: %s", vkp_status_str(status));
    switch ((int)status) {
    case VKP_OK:
        self->changes += !marked;
        MODEL_CHECK(self->changes <= now.begun);
        break;
    case VKP_ERR_CLOSED:
        MODEL_CHECK(now.strong == 0 && !marked);
        MODEL_CHECK(now.accepted == 0 || self->changes > 0 || self->least[ENDS] > 0 ||
                    self->marked);
        break;
    default:
        MODEL_CHECK(status == VKP_ERR_TIMEOUT && deadline_ns != VKP_FOREVER && !marked);
        MODEL_CHECK(!must || !model_has_one_time());
        break;
    }
    return status;
}

static void receiver_call(struct receiver *self, char call)
{
    const void *item;
    pair value;
    bool again;
    switch (call) {
    case 'c':
        (void)changed(self, VKP_FOREVER, false);
        break;
    case 'd':
        (void)changed(self, SOON, false);
        break;
    case 'k':
        vkp_watch_mark_changed(self->rx);
        self->marked = true;
        MODEL_CHECK(vkp_watch_is_changed(self->rx));
        (void)changed(self, VKP_FOREVER, true);
        break;
    case 'y':
        vkp_watch_mark_unchanged(self->rx);
        self->marked = true;
        break;
    case 'h':
        MODEL_CHECK(!vkp_watch_is_changed(self->rx) || now.begun > 0);
        MODEL_CHECK(!vkp_watch_is_closed(self->rx) || now.strong == 0);
        break;
    case 'g':
    case 'b':
        look(self, false);
        break;
    case 'u':
    case 'B':
        look(self, true);
        break;
    case 'l':
        item = vkp_watch_borrow(self->rx);
        MODEL_CHECK(item != NULL && vkp_watch_borrow(self->rx) == NULL);
        memcpy(&value, item, sizeof value);
        saw(self, &value);
        (void)vkp_watch_is_closed(self->rx); /* others may go on meanwhile */
        memcpy(&value, item, sizeof value);
        saw(self, &value);
        break;
    case 'v':
        visit(NULL, self);
        break;
    default:
        /* After a change there is another value than the one seen before. */
        for (again = self->last == 0 && !self->marked; changed(self, VKP_FOREVER, false) == VKP_OK;
             again = true) {
            uint64_t before = self->last != 0 ? self->last : INITIAL;
            look(self, true);
            MODEL_CHECK(!again || self->last != before);
        }
        look(self, false);
        /* What is seen after CLOSED is the last value of the one that sent it. */
        for (item = NULL, value.value = 0; value.value < now.senders; value.value++) {
            item = self->least[value.value] == now.next[value.value] ? self : item;
        }
        MODEL_CHECK(item != NULL || now.refused);
        break;
    }
}

static void before(void)
{
    static const pair initial = {INITIAL, INITIAL};
    const struct watch_scenario *s = scenario();
    vkp_watch_config config = VKP_ZERO;
    vkp_watch_tx *tx = NULL;
    vkp_status status;
    memset(&now, 0, sizeof now);
    config.elem_bytes = sizeof(pair);
    config.initial = &initial;
    config.drop = s->owned ? drop : NULL;
    config.user = &now;
    config.env = environment();
    status = vkp_watch_open(&config, &tx);
    MODEL_CHECK(status == VKP_OK);
    now.taken[INITIAL] = true;
    for (; now.senders < ENDS && s->senders[now.senders] != NULL; now.senders++) {
        now.tx[now.senders] = vkp_watch_tx_ref(tx);
        now.strong++;
    }
    for (; now.readers < ENDS && s->receivers[now.readers] != NULL; now.readers++) {
        status = vkp_watch_subscribe(tx, &now.receivers[now.readers].rx);
        MODEL_CHECK(status == VKP_OK);
        now.borrows = now.borrows || strpbrk(s->receivers[now.readers], "bBl*") != NULL;
        now.alive++;
    }
    now.borrows = now.borrows || s->owned;
    now.alive_at_most = now.alive;
    vkp_watch_tx_unref(tx);
}

static void thread(unsigned index)
{
    const char *call;
    if (index < now.senders) {
        for (call = scenario()->senders[index]; *call != '\0'; call++) {
            sender_call(index, *call);
        }
        now.strong--;
        vkp_watch_tx_unref(now.tx[index]);
        return;
    }
    index -= now.senders;
    for (call = scenario()->receivers[index]; *call != '\0'; call++) {
        receiver_call(&now.receivers[index], *call);
    }
    leave(&now.receivers[index]);
}

static void after(void)
{
    unsigned i;
    for (i = 0; i < 256 && scenario()->owned; i++) {
        MODEL_CHECK(now.drops[i] == (now.taken[i] ? 1u : 0u));
    }
}

#define COUNT(array) (sizeof(array) / sizeof *(array))

static struct watch_scenario all[1000];
static unsigned used;

static void add(struct watch_scenario what, bool no_barrier, unsigned preemptions)
{
    struct model model = {.before = before, .thread = thread, .after = after, .stale = 1};
    size_t length;
    unsigned i;
    all[used] = what;
    model.no_barrier = no_barrier;
    model.preemptions = preemptions;
    model.scenario[0] = (uintptr_t)&all[used++];
    length = (size_t)snprintf(model.name, sizeof model.name, "watch");
    for (i = 0; i < ENDS && what.senders[i] != NULL; i++, model.threads++) {
        length += (size_t)snprintf(model.name + length, sizeof model.name - length, " %s",
                                   what.senders[i]);
    }
    for (i = 0; i < ENDS && what.receivers[i] != NULL; i++, model.threads++) {
        length += (size_t)snprintf(model.name + length, sizeof model.name - length, "%s %s",
                                   i == 0 ? " |" : "", what.receivers[i]);
    }
    snprintf(model.name + length, sizeof model.name - length, "%s%s", what.owned ? ", owned" : "",
             no_barrier ? ", fenced" : "");
    model_add(&model);
}

void watch_models(void)
{
    static const char *const senders[] = {"s", "ss", "p", "m", "pp", "ns", "xs", "rs", "wp"};
    static const char *const receivers[] = {"*",  "c*", "d*", "g*", "u*", "h*", "b*",
                                            "B*", "l",  "k*", "y*", "v*", "gg", ""};
    static const char *const pairs[] = {"*", "c", "d", "u", "B", "l", ""};
    size_t i;
    size_t k;
    unsigned owned;
    for (i = 0; i < COUNT(senders); i++) {
        for (k = 0; k < COUNT(receivers); k++) {
            for (owned = 0; owned < 2; owned++) {
                if (senders[i][0] == 'w' && strpbrk(receivers[k], "c*") != NULL) {
                    continue; /* each would wait for the other, as it should */
                }
                if (senders[i][0] == 'm' && owned == 1) {
                    continue; /* not for values with a drop */
                }
                add((struct watch_scenario){{senders[i]}, {receivers[k]}, owned == 1},
                    (i + k) % 2 == 1, 2);
            }
        }
    }
    add((struct watch_scenario){{"s", "p"}, {"*"}, false}, false, 2);
    add((struct watch_scenario){{"s", "p"}, {"B"}, true}, true, 2);
    add((struct watch_scenario){{"ss", "p"}, {"u"}, false}, true, 2);
    for (i = 0; i < COUNT(pairs); i++) {
        for (k = i; k < COUNT(pairs); k++) {
            add((struct watch_scenario){{"ss"}, {pairs[i], pairs[k]}, true}, k % 2 == 1, 1);
            if (i < 3) { /* four threads that all take the latch are more than it is worth */
                add((struct watch_scenario){{"s", "p"}, {pairs[i], pairs[k]}, i % 2 == 1},
                    k % 2 == 0, 1);
            }
        }
    }
    for (k = 0; k < COUNT(receivers); k++) {
        add((struct watch_scenario){{"s", "pp"}, {receivers[k]}, false}, k % 2 == 0, 1);
        add((struct watch_scenario){{"s", "pp"}, {receivers[k]}, true}, k % 2 == 1, 1);
        add((struct watch_scenario){{"n", "p"}, {receivers[k]}, true}, k % 2 == 1, 1);
    }
}
