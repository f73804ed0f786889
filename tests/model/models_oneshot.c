/* Models of the one-shot: a sender and a receiver, in the caller's memory and on the heap.

   Sender:   s send    a abandon    q is_closed    x wait_closed, deadline    w wait_closed
   Receiver: R recv    D recv, deadline    T try_recv    C close
   A slot on the heap is left alone after the call that ended the receiver's part in it.
   In some models ("beside") a third thread waits for the close, as a handler of the sender does. */
#include "environment.h"
#include "families.h"

#include <stdio.h>
#include <string.h>

#define SOON 1000
#define VALUE 77u

struct oneshot_scenario {
    const char *sender;
    const char *receiver;
    bool heap;
    bool beside;
};

static struct {
    vkp_oneshot *slot;
    bool sent; /* the send said OK */
    bool refused;
    bool abandoned;
    bool received;
    unsigned drops;
    bool closing; /* the receiver's call that ends its part has begun, */
    bool closed;  /* and returned without the value */
} now;

static const struct oneshot_scenario *scenario(void)
{
    return (const struct oneshot_scenario *)(uintptr_t)model_now->scenario[0];
}

static void drop(void *user, void *item)
{
    uint64_t value;
    MODEL_CHECK(user == &now);
    memcpy(&value, item, sizeof value);
    MODEL_CHECK(value == VALUE && !now.received);
    now.drops++;
}

static void sender_call(char call)
{
    bool known = now.closed && model_has_one_time();
    uint64_t value = VALUE;
    vkp_status status;
    switch (call) {
    case 's':
        status = vkp_oneshot_send(now.slot, &value);
        model_note("sent: %s", vkp_status_str(status));
        MODEL_CHECK(status == VKP_OK || (status == VKP_ERR_CLOSED && now.closing));
        MODEL_CHECK(status != VKP_OK || !known || !model_has_one_time());
        now.sent = status == VKP_OK;
        now.refused = !now.sent;
        break;
    case 'a':
        now.abandoned = true;
        vkp_oneshot_abandon(now.slot);
        break;
    case 'q':
        MODEL_CHECK(vkp_oneshot_is_closed(now.slot) ? now.closing
                                                    : !known || !model_has_one_time());
        break;
    default:
        status = vkp_oneshot_wait_closed(now.slot, call == 'x' ? SOON : VKP_FOREVER);
        model_note("waited for the close: %s", vkp_status_str(status));
        MODEL_CHECK(status == VKP_OK ? now.closing : status == VKP_ERR_TIMEOUT && call == 'x');
        break;
    }
}

static void receiver_call(char call)
{
    bool sent = now.sent;
    uint64_t value = 0;
    vkp_status status;
    if (call == 'C') {
        now.closing = true;
        vkp_oneshot_close(now.slot);
        now.closed = !now.received;
        return;
    }
    now.closing = now.closing || call != 'T';
    status = call == 'T' ? vkp_oneshot_try_recv(now.slot, &value)
                         : vkp_oneshot_recv(now.slot, call == 'D' ? SOON : VKP_FOREVER, &value);
    model_note("received: %s", vkp_status_str(status));
    switch ((int)status) {
    case VKP_OK:
        MODEL_CHECK(value == VALUE && !now.received && !now.closed);
        now.received = true;
        return;
    case VKP_ERR_EMPTY:
        MODEL_CHECK(call == 'T' && !now.closed && !(sent && model_has_one_time()));
        return;
    case VKP_ERR_TIMEOUT:
        MODEL_CHECK(call == 'D' && !now.closed && !(sent && model_has_one_time()));
        now.closed = true;
        return;
    default:
        MODEL_CHECK(status == VKP_ERR_CLOSED && (now.abandoned || now.closed || now.received));
        break;
    }
}

/* Wait for the close while the sender's thread ends the slot: this wait ends, too. */
static void wait_beside(void)
{
    vkp_status status = vkp_oneshot_wait_closed(now.slot, VKP_FOREVER);
    model_note("waited beside: %s", vkp_status_str(status));
    MODEL_CHECK(status == VKP_OK ? now.closing : status == VKP_ERR_INVALID);
}

static void before(void)
{
    vkp_status status;
    memset(&now, 0, sizeof now);
    if (scenario()->heap) {
        status = vkp_oneshot_open(environment(), sizeof(uint64_t), drop, &now, &now.slot);
    } else {
        now.slot = (vkp_oneshot *)model_alloc(NULL, NULL, 0, sizeof *now.slot);
        status = vkp_oneshot_init(now.slot, environment(), sizeof(uint64_t), drop, &now);
    }
    MODEL_CHECK(status == VKP_OK);
}

static void thread(unsigned index)
{
    const char *call = index == 0 ? scenario()->sender : scenario()->receiver;
    if (index == 2) {
        wait_beside();
        return;
    }
    for (; *call != '\0'; call++) {
        if (index == 0) {
            sender_call(*call);
        } else {
            receiver_call(*call);
        }
    }
    if (!scenario()->heap) {
        return;
    }
    if (index == 0) {
        vkp_oneshot_tx_unref(now.slot);
    } else {
        vkp_oneshot_rx_unref(now.slot);
    }
}

static void after(void)
{
    MODEL_CHECK(now.received + now.drops == (now.sent ? 1u : 0u));
    MODEL_CHECK(!now.closed || !now.sent || now.drops == 1);
    if (!scenario()->heap) {
        (void)model_alloc(NULL, now.slot, sizeof *now.slot, 0);
    }
}

#define COUNT(array) (sizeof(array) / sizeof *(array))

void oneshot_models(void)
{
    static const char *const senders[] = {"s",  "a",  "qs", "qa",  "xs",
                                          "xa", "ws", "wa", "xxs", "xwa"};
    static const char *const receivers[] = {"R", "D", "C", "TR", "TD", "TC", "TTC"};
    static struct oneshot_scenario all[COUNT(senders) * COUNT(receivers) * 2];
    unsigned used = 0;
    size_t s;
    size_t r;
    unsigned heap;
    for (s = 0; s < COUNT(senders); s++) {
        for (r = 0; r < COUNT(receivers); r++) {
            for (heap = 0; heap < 2; heap++) {
                struct model model = {.threads = 2, .preemptions = 3, .stale = 1};
                if (strchr(senders[s], 'w') != NULL && strchr(receivers[r], 'R') != NULL) {
                    continue; /* each would wait for the other, as it should */
                }
                all[used] = (struct oneshot_scenario){senders[s], receivers[r], heap == 1, false};
                model.before = before;
                model.thread = thread;
                model.after = after;
                model.scenario[0] = (uintptr_t)&all[used++];
                snprintf(model.name, sizeof model.name, "oneshot %s | %s%s", senders[s],
                         receivers[r], heap == 1 ? ", heap" : "");
                model_add(&model);
            }
        }
    }
    for (s = 0; s < 2; s++) { /* s and a, with R, D and C */
        for (r = 0; r < 3; r++) {
            struct model model = {.threads = 3, .preemptions = 2, .stale = 1};
            static struct oneshot_scenario beside[6];
            beside[s * 3 + r] = (struct oneshot_scenario){senders[s], receivers[r], false, true};
            model.before = before;
            model.thread = thread;
            model.after = after;
            model.scenario[0] = (uintptr_t)&beside[s * 3 + r];
            snprintf(model.name, sizeof model.name, "oneshot-beside %s | %s", senders[s],
                     receivers[r]);
            model_add(&model);
        }
    }
}
