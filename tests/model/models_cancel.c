/* Models of cancellation tokens: up to three threads on a token `root`, its child and grandchild.
   Each thread holds references to all three and gives them back at its end.

   Calls: t, u, v trigger the root, the child, the grandchild       i is_triggered, each of them
          w, y wait for the child, the grandchild    d wait for the child, deadline
          o open a child of the child, look at it, unref it          g trigger a fresh child of it
          r ref and unref the child                                                              */
#include "environment.h"
#include "families.h"

#include <stdio.h>
#include <string.h>

#define SOON 1000
#define TOKENS 3
#define ACTORS 3

struct cancel_scenario {
    const char *actors[ACTORS];
};

static struct {
    vkp_cancel *token[TOKENS];
    bool begun[TOKENS]; /* a trigger of it, or of one above it, has begun, */
    bool done[TOKENS];  /* has returned */
} now;

static const struct cancel_scenario *scenario(void)
{
    return (const struct cancel_scenario *)(uintptr_t)model_now->scenario[0];
}

static void look(unsigned which)
{
    bool known = now.done[which];
    bool triggered = vkp_cancel_is_triggered(now.token[which]);
    MODEL_CHECK(triggered ? now.begun[which] : !known || !model_has_one_time());
}

static void trigger(unsigned which)
{
    unsigned i;
    for (i = which; i < TOKENS; i++) {
        now.begun[i] = true;
    }
    model_note("triggers %u", which);
    vkp_cancel_trigger(now.token[which]);
    for (i = which; i < TOKENS; i++) {
        now.done[i] = true;
        MODEL_CHECK(vkp_cancel_is_triggered(now.token[i]));
    }
}

static void wait(unsigned which, uint64_t deadline_ns)
{
    bool known = now.done[which];
    vkp_status status = vkp_cancel_wait(now.token[which], deadline_ns);
    model_note("waited for %u: %s", which, vkp_status_str(status));
    if (status == VKP_OK) {
        MODEL_CHECK(now.begun[which] && vkp_cancel_is_triggered(now.token[which]));
    } else {
        MODEL_CHECK(status == VKP_ERR_TIMEOUT && deadline_ns != VKP_FOREVER);
        MODEL_CHECK(!known || !model_has_one_time());
    }
}

static void fresh_child(bool trigger_it)
{
    vkp_cancel *fresh = NULL;
    bool known = now.done[1];
    vkp_status status = vkp_cancel_open(NULL, now.token[1], &fresh);
    MODEL_CHECK(status == VKP_OK);
    if (vkp_cancel_is_triggered(fresh)) {
        MODEL_CHECK(now.begun[1]);
    } else {
        MODEL_CHECK(!known || !model_has_one_time());
    }
    if (trigger_it) {
        vkp_cancel_trigger(fresh);
        MODEL_CHECK(vkp_cancel_is_triggered(fresh));
    }
    vkp_cancel_unref(fresh);
}

static void before(void)
{
    vkp_status status;
    unsigned i;
    unsigned k;
    memset(&now, 0, sizeof now);
    for (i = 0; i < TOKENS; i++) {
        status = vkp_cancel_open(environment(), i > 0 ? now.token[i - 1] : NULL, &now.token[i]);
        MODEL_CHECK(status == VKP_OK);
    }
    for (i = 0; i < TOKENS; i++) {
        for (k = 1; k < model_now->threads; k++) {
            MODEL_CHECK(vkp_cancel_ref(now.token[i]) == now.token[i]);
        }
    }
}

static void thread(unsigned index)
{
    const char *call;
    unsigned i;
    for (call = scenario()->actors[index]; *call != '\0'; call++) {
        switch (*call) {
        case 't':
        case 'u':
        case 'v':
            trigger((unsigned)(*call - 't'));
            break;
        case 'i':
            for (i = TOKENS; i-- > 0;) {
                look(i);
            }
            break;
        case 'w':
            wait(1, VKP_FOREVER);
            break;
        case 'y':
            wait(2, VKP_FOREVER);
            break;
        case 'd':
            wait(1, SOON);
            break;
        case 'o':
        case 'g':
            fresh_child(*call == 'g');
            break;
        default:
            MODEL_CHECK(vkp_cancel_ref(now.token[1]) == now.token[1]);
            vkp_cancel_unref(now.token[1]);
            break;
        }
    }
    /* The first and the last of a chain go first in turn: each end may outlive the other. */
    for (i = 0; i < TOKENS; i++) {
        vkp_cancel_unref(now.token[index % 2 == 0 ? i : TOKENS - 1 - i]);
    }
}

static void after(void)
{
}

#define COUNT(array) (sizeof(array) / sizeof *(array))

static void add(struct cancel_scenario *at, const char *a, const char *b, const char *c,
                unsigned preemptions)
{
    struct model model = {.before = before, .thread = thread, .after = after, .stale = 1};
    *at = (struct cancel_scenario){{a, b, c}};
    model.threads = c != NULL ? 3 : 2;
    model.preemptions = preemptions;
    model.scenario[0] = (uintptr_t)at;
    snprintf(model.name, sizeof model.name, "cancel %s | %s%s%s", a, b, c != NULL ? " | " : "",
             c != NULL ? c : "");
    model_add(&model);
}

void cancel_models(void)
{
    /* What waits for ever needs somebody who triggers. */
    static const char *const triggers[] = {"t", "u", "tu", "ut", "it", "ou"};
    static const char *const others[] = {"t", "u", "v", "i", "w", "y", "d", "o", "g", "r", "dw"};
    static struct cancel_scenario all[400];
    unsigned used = 0;
    size_t i;
    size_t k;
    for (i = 0; i < COUNT(triggers); i++) {
        for (k = 0; k < COUNT(others); k++) {
            add(&all[used++], triggers[i], others[k], NULL, 3);
        }
    }
    for (i = 0; i < COUNT(others); i++) {
        for (k = i; k < COUNT(others); k++) {
            add(&all[used++], "u", others[i], others[k], 2);
        }
    }
}
