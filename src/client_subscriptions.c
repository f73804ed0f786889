#if VKP_I_IO
/* ======================================================================================
   >>impl-client-subscriptions   The subscription table of a client
   ======================================================================================
   Each name that the program wants, or that the client still has to leave, is one interest in ONE
   state. vkp_i_interest_step is the only place that changes it, by the table vkp_i_sub_rules:

   state     what it means                                     how it goes on
   GONE      not wanted, and nothing is on the wire for it     freed once no request refers to it
   WANTED    not asked yet: the link is not ready              asked when it is
   ASKED     SUBSCRIBE is on the wire                          the server confirms or refuses
   HELD      the server confirmed: messages arrive             until it is left, lost or taken away
   REFUSED   the server refused: its timer runs                asked again when the timer ends
   LEAVING   UNSUBSCRIBE is on the wire                        the fence behind it confirms
   STUCK     the server refused UNSUBSCRIBE: its timer runs    left again when the timer ends

   An answer counts for the state only if it answers the newest command of the name: a program may
   leave and want again before the first answer. Only the last interest that leaves ends a name.
   Messages of a HELD name may be missing when the link goes down, when the server takes the name
   away, or when an audit finds that it is not there. gap_ns is then the last moment at which the
   name was known to be good. It stays until a GAP reports it: that is when every name with a gap
   that was asked for has its answer, and it covers those that are back.
   Everything runs on the loop's thread.                                                       */

typedef enum vkp_i_sub_state {
    VKP_I_SUB_GONE = 0,
    VKP_I_SUB_WANTED,
    VKP_I_SUB_ASKED,
    VKP_I_SUB_HELD,
    VKP_I_SUB_REFUSED,
    VKP_I_SUB_LEAVING,
    VKP_I_SUB_STUCK
} vkp_i_sub_state;
#define VKP_I_SUB_STATES 7

typedef enum vkp_i_sub_event {
    VKP_I_EVENT_WANT = 0,   /* a vkp_client_subscribe */
    VKP_I_EVENT_LEAVE,      /* the vkp_client_unsubscribe that takes the last one back */
    VKP_I_EVENT_LEAVE_KEPT, /* the same, while the server has the name */
    VKP_I_EVENT_READY,      /* the link is ready */
    VKP_I_EVENT_CONFIRMED,  /* the newest command, a SUBSCRIBE, is confirmed */
    VKP_I_EVENT_REFUSED,    /* ... is refused */
    VKP_I_EVENT_LEFT,       /* the newest command, an UNSUBSCRIBE, is done */
    VKP_I_EVENT_STUCK,      /* ... is refused */
    VKP_I_EVENT_TAKEN,      /* the server ended the subscription, unasked */
    VKP_I_EVENT_MISSING,    /* an audit found that the server may not have it */
    VKP_I_EVENT_RETRY,      /* the timer of a refusal ended */
    VKP_I_EVENT_DOWN        /* the link is down */
} vkp_i_sub_event;
#define VKP_I_SUB_EVENTS 12

/* The actions of a rule, done in this order, after the state has changed. */
#define VKP_I_DO_CALM 1u  /* stop the timer of the refusal, and forget the refusal */
#define VKP_I_DO_GAP 2u   /* messages may be missing: gap_ns */
#define VKP_I_DO_WAIT 4u  /* start the timer of the refusal */
#define VKP_I_DO_ASK 8u   /* send SUBSCRIBE; without a ready link the state is WANTED instead */
#define VKP_I_DO_PART 16u /* send UNSUBSCRIBE */

typedef struct vkp_i_sub_rule {
    uint8_t next;    /* a vkp_i_sub_state */
    uint8_t actions; /* VKP_I_DO_* bits */
} vkp_i_sub_rule;

#define VKP_I_STAY(state)    \
    {                        \
        VKP_I_SUB_##state, 0 \
    }
#define VKP_I_GO(state, actions)              \
    {                                         \
        VKP_I_SUB_##state, (uint8_t)(actions) \
    }

/* By state and event: WANT, LEAVE, LEAVE_KEPT, READY, CONFIRMED, REFUSED, LEFT, STUCK, TAKEN,
   MISSING, RETRY, DOWN. */
static const vkp_i_sub_rule vkp_i_sub_rules[VKP_I_SUB_STATES][VKP_I_SUB_EVENTS] = {
    /* GONE */
    {VKP_I_GO(ASKED, VKP_I_DO_ASK), VKP_I_STAY(GONE), VKP_I_STAY(GONE), VKP_I_STAY(GONE),
     VKP_I_STAY(GONE), VKP_I_STAY(GONE), VKP_I_STAY(GONE), VKP_I_STAY(GONE), VKP_I_STAY(GONE),
     VKP_I_STAY(GONE), VKP_I_STAY(GONE), VKP_I_STAY(GONE)},
    /* WANTED */
    {VKP_I_STAY(WANTED), VKP_I_GO(GONE, 0), VKP_I_GO(GONE, 0), VKP_I_GO(ASKED, VKP_I_DO_ASK),
     VKP_I_STAY(WANTED), VKP_I_STAY(WANTED), VKP_I_STAY(WANTED), VKP_I_STAY(WANTED),
     VKP_I_STAY(WANTED), VKP_I_STAY(WANTED), VKP_I_STAY(WANTED), VKP_I_STAY(WANTED)},
    /* ASKED */
    {VKP_I_STAY(ASKED), VKP_I_GO(LEAVING, VKP_I_DO_PART), VKP_I_GO(LEAVING, VKP_I_DO_PART),
     VKP_I_STAY(ASKED), VKP_I_GO(HELD, VKP_I_DO_CALM), VKP_I_GO(REFUSED, VKP_I_DO_WAIT),
     VKP_I_STAY(ASKED), VKP_I_STAY(ASKED), VKP_I_STAY(ASKED), VKP_I_STAY(ASKED), VKP_I_STAY(ASKED),
     VKP_I_GO(WANTED, VKP_I_DO_CALM)},
    /* HELD */
    {VKP_I_STAY(HELD), VKP_I_GO(LEAVING, VKP_I_DO_PART), VKP_I_GO(LEAVING, VKP_I_DO_PART),
     VKP_I_STAY(HELD), VKP_I_STAY(HELD), VKP_I_STAY(HELD), VKP_I_STAY(HELD), VKP_I_STAY(HELD),
     VKP_I_GO(ASKED, VKP_I_DO_GAP | VKP_I_DO_ASK), VKP_I_GO(ASKED, VKP_I_DO_GAP | VKP_I_DO_ASK),
     VKP_I_STAY(HELD), VKP_I_GO(WANTED, VKP_I_DO_GAP)},
    /* REFUSED */
    {VKP_I_GO(ASKED, VKP_I_DO_ASK), VKP_I_GO(GONE, VKP_I_DO_CALM),
     VKP_I_GO(LEAVING, VKP_I_DO_CALM | VKP_I_DO_PART), VKP_I_STAY(REFUSED), VKP_I_STAY(REFUSED),
     VKP_I_STAY(REFUSED), VKP_I_STAY(REFUSED), VKP_I_STAY(REFUSED), VKP_I_STAY(REFUSED),
     VKP_I_STAY(REFUSED), VKP_I_GO(ASKED, VKP_I_DO_ASK), VKP_I_GO(WANTED, VKP_I_DO_CALM)},
    /* LEAVING */
    {VKP_I_GO(ASKED, VKP_I_DO_CALM | VKP_I_DO_ASK), VKP_I_STAY(LEAVING), VKP_I_STAY(LEAVING),
     VKP_I_STAY(LEAVING), VKP_I_STAY(LEAVING), VKP_I_STAY(LEAVING), VKP_I_GO(GONE, VKP_I_DO_CALM),
     VKP_I_GO(STUCK, VKP_I_DO_WAIT), VKP_I_STAY(LEAVING), VKP_I_STAY(LEAVING), VKP_I_STAY(LEAVING),
     VKP_I_GO(GONE, VKP_I_DO_CALM)},
    /* STUCK */
    {VKP_I_GO(ASKED, VKP_I_DO_CALM | VKP_I_DO_ASK), VKP_I_STAY(STUCK), VKP_I_STAY(STUCK),
     VKP_I_STAY(STUCK), VKP_I_STAY(STUCK), VKP_I_STAY(STUCK), VKP_I_STAY(STUCK), VKP_I_STAY(STUCK),
     VKP_I_GO(GONE, VKP_I_DO_CALM), VKP_I_STAY(STUCK), VKP_I_GO(LEAVING, VKP_I_DO_PART),
     VKP_I_GO(GONE, VKP_I_DO_CALM)}};

typedef struct vkp_i_interest vkp_i_interest;

/* What a name has only while the server refuses it. */
typedef struct vkp_i_refusal {
    vkp_timer timer; /* ends the wait */
    vkp_i_interest *interest;
    uint32_t tries; /* refusals since the last confirmation */
    bool passing;   /* the server's words promise an end: see vkp_i_words_are_passing */
    uint64_t words; /* hash of the words of the last event REFUSED; 0: none */
} vkp_i_refusal;

/* A name, which is behind the struct. */
struct vkp_i_interest {
    vkp_i_map_node node; /* in client->interests; its key is the name */
    vkp_client *client;
    vkp_sub_kind kind;
    vkp_i_sub_state state;
    size_t wanted;    /* calls of vkp_client_subscribe minus those of vkp_client_unsubscribe */
    size_t in_flight; /* commands on the wire for it, and callers of vkp_i_interest_hold */
    struct vkp_i_sub_request *newest; /* the newest command in flight; NULL: none */
    vkp_i_refusal *refusal;           /* NULL: the server did not refuse it */
    uint64_t gap_ns;                  /* messages may be missing from then on; 0: none are */
    bool kept;                        /* the server has it, as far as the client knows */
    bool resuming;                    /* counted in client->resuming */
    vkp_i_requests waiters;           /* WANTs that wait until the name can be asked for */
};

/* One SUBSCRIBE or UNSUBSCRIBE on the wire. */
typedef struct vkp_i_sub_request {
    vkp_i_request request; /* expects NAMES or LEAVES */
    vkp_client *client;
    vkp_i_interest *interest;
    bool confirmed;         /* UNSUBSCRIBE: the server's push arrived */
    vkp_push push;          /* UNSUBSCRIBE: that push, kept for the fence */
    vkp_i_requests waiters; /* SUBSCRIBE: WANTs that wait for this answer */
} vkp_i_sub_request;

/* ---- events ---- */

/* Whether the name is the channel of the delivery probe. */
static bool vkp_i_client_is_own(const vkp_client *client, vkp_str channel)
{
    return client->own.len > 0 && vkp_i_str_equal(channel, client->own);
}

/* Put a LAGGED event for the missed pushes into config.pushes, if there is room. */
static void vkp_i_client_report_missed(vkp_client *client)
{
    vkp_push item;
    vkp_status status;
    memset(&item, 0, sizeof item);
    item.kind = VKP_PUSH_LAGGED;
    item.missed = client->missed;
    status = vkp_mpsc_try_send(client->config.pushes, &item);
    if (status == VKP_OK || status == VKP_ERR_CLOSED) {
        client->missed = 0; /* reported, or nobody receives any longer */
        vkp_handler_unref(client->room);
        client->room = NULL;
    }
}

/* There may be room in config.pushes again. */
static void vkp_i_client_on_room(void *user)
{
    vkp_i_client_report_missed((vkp_client *)user);
}

/* Queue a push or an event in the channel config.pushes. A push without room counts in `missed`; a
   LAGGED event follows as soon as there is room, before any other push.                       */
static void vkp_i_client_queue_push(vkp_client *client, const vkp_push *push)
{
    vkp_push item = *push;
    if (client->missed > 0) {
        vkp_i_client_report_missed(client);
    }
    item.frame = vkp_bytes_ref(&push->frame);
    if (client->missed > 0 || vkp_mpsc_try_send(client->config.pushes, &item) != VKP_OK) {
        client->missed++;
        vkp_bytes_unref(&item.frame);
    }
    if (client->missed > 0 && client->room == NULL) {
        static const vkp_push any = VKP_ZERO; /* says how much room is waited for */
        vkp_case room = vkp_case_mpsc_send(client->config.pushes, &any);
        if (vkp_handler_open(client->loop, &room, vkp_i_client_on_room, client, &client->room) !=
            VKP_OK) {
            client->room = NULL; /* the next push tries again */
        }
    }
}

/* Give a push or an event to on_push or to the channel config.pushes. */
static void vkp_i_client_hand(vkp_client *client, const vkp_push *push)
{
    if (client->config.on_push != NULL) {
        client->config.on_push(client->config.user, push);
    } else if (client->config.pushes != NULL) {
        vkp_i_client_queue_push(client, push);
    }
}

/* The same for an event that may be about the own channel, which the program knows nothing of. */
static void vkp_i_client_emit(vkp_client *client, const vkp_push *push)
{
    if (!vkp_i_client_is_own(client, push->channel)) {
        vkp_i_client_hand(client, push);
    }
}

/* Emit an event of the client. text may be of any life: the event has a copy. Without memory for
   the copy the event goes without its text. */
static void vkp_i_client_event(vkp_client *client, vkp_push_kind kind, vkp_str text)
{
    vkp_push push;
    memset(&push, 0, sizeof push);
    push.kind = kind;
    push.payload = text;
    if (text.len > 0 && !vkp_i_push_own_texts(client->env, &push)) {
        push.payload = vkp_str_of("out of memory");
    }
    vkp_i_client_emit(client, &push);
    vkp_bytes_unref(&push.frame);
}

/* Emit an event about one name. No memory: the link fails, and the next connection begins anew. */
static void vkp_i_interest_event(vkp_i_interest *interest, vkp_push_kind kind, vkp_str text)
{
    vkp_client *client = interest->client;
    vkp_push push;
    memset(&push, 0, sizeof push);
    push.kind = kind;
    push.sub = interest->kind;
    push.channel = interest->node.key;
    push.payload = text;
    if (!vkp_i_push_own_texts(client->env, &push)) {
        vkp_i_link_lose(&client->link, "out of memory");
        return;
    }
    vkp_i_client_emit(client, &push);
    vkp_bytes_unref(&push.frame);
}

/* ---- interests ---- */

static vkp_i_interest *vkp_i_interest_find(vkp_client *client, vkp_sub_kind kind, vkp_str name)
{
    vkp_i_map *map = &client->interests[kind];
    vkp_i_map_node *node =
        map->count > 0 ? vkp_i_map_find(map, vkp_i_map_hash(map, name), name) : NULL;
    return node != NULL ? VKP_CONTAINER(node, vkp_i_interest, node) : NULL;
}

static vkp_i_interest *vkp_i_interest_new(vkp_client *client, vkp_sub_kind kind, vkp_str name)
{
    vkp_i_map *map = &client->interests[kind];
    vkp_i_interest *interest =
        (vkp_i_interest *)vkp_i_alloc_zero(client->env, sizeof *interest + name.len);
    if (interest == NULL) {
        return NULL;
    }
    if (name.len > 0) {
        memcpy(interest + 1, name.ptr, name.len);
    }
    interest->client = client;
    interest->kind = kind;
    interest->node.key = vkp_i_str(interest + 1, name.len);
    interest->node.hash = vkp_i_map_hash(map, name);
    vkp_i_requests_init(&interest->waiters);
    if (!vkp_i_map_insert(map, &interest->node)) {
        vkp_i_free(client->env, interest, sizeof *interest + name.len);
        return NULL;
    }
    return interest;
}

/* Stop counting the interest among those whose answer a GAP waits for. */
static void vkp_i_interest_end_resuming(vkp_i_interest *interest)
{
    if (interest->resuming) {
        interest->resuming = false;
        interest->client->resuming--;
    }
}

/* Free an interest that is GONE and that no request refers to. */
static void vkp_i_interest_free_unused(vkp_i_interest *interest)
{
    vkp_client *client = interest->client;
    if (interest->state == VKP_I_SUB_GONE && interest->in_flight == 0) {
        vkp_i_interest_end_resuming(interest);
        vkp_i_map_remove(&client->interests[interest->kind], &interest->node);
        vkp_i_free(client->env, interest, sizeof *interest + interest->node.key.len);
    }
}

/* Keep an interest while callbacks run. */
static void vkp_i_interest_hold(vkp_i_interest *interest)
{
    interest->in_flight++;
}

static void vkp_i_interest_release(vkp_i_interest *interest)
{
    interest->in_flight--;
    vkp_i_interest_free_unused(interest);
}

/* ---- refusals ---- */

#define VKP_I_PASSING_MIN_MS 100u   /* first wait where the server's words promise an end */
#define VKP_I_PASSING_MAX_MS 5000u  /* longest wait there */
#define VKP_I_LASTING_MIN_MS 1000u  /* first wait after other words */
#define VKP_I_LASTING_MAX_MS 30000u /* longest wait there */

static void vkp_i_interest_calm(vkp_i_interest *interest)
{
    if (interest->refusal != NULL) {
        vkp_timer_stop(&interest->refusal->timer);
        vkp_i_free(interest->client->env, interest->refusal, sizeof *interest->refusal);
        interest->refusal = NULL;
    }
}

static void vkp_i_interest_on_timer(vkp_timer *timer);

/* The refusal of the interest, made if there is none. NULL: no memory. */
static vkp_i_refusal *vkp_i_interest_refusal(vkp_i_interest *interest)
{
    if (interest->refusal == NULL) {
        interest->refusal =
            (vkp_i_refusal *)vkp_i_alloc_zero(interest->client->env, sizeof *interest->refusal);
    }
    if (interest->refusal != NULL) {
        interest->refusal->interest = interest;
    }
    return interest->refusal;
}

/* Start the wait for the next try: at least half of a bound that doubles. False: no memory. */
static bool vkp_i_interest_wait(vkp_i_interest *interest)
{
    vkp_client *client = interest->client;
    vkp_i_refusal *refusal = interest->refusal;
    uint64_t bound = refusal->passing ? VKP_I_PASSING_MIN_MS : VKP_I_LASTING_MIN_MS;
    uint64_t most = refusal->passing ? VKP_I_PASSING_MAX_MS : VKP_I_LASTING_MAX_MS;
    uint32_t i;
    for (i = 0; i < refusal->tries && bound < most; i++) {
        bound *= 2;
    }
    bound = VKP_I_MIN(bound, most);
    refusal->tries++;
    bound -= vkp_i_sys(client->env)->random_u64() % (bound / 2 + 1);
    return vkp_timer_start(&refusal->timer, client->loop, vkp_i_interest_on_timer, 0,
                           vkp_i_after_ms(vkp_i_loop_now(client->loop), bound)) == VKP_OK;
}

/* ---- asking and leaving ---- */

static bool vkp_i_sub_accept(vkp_i_request *request, const vkp_push *push);
static void vkp_i_sub_settled(vkp_i_request *request, vkp_status status, const vkp_value *value,
                              const vkp_bytes *frame);

/* Send SUBSCRIBE or UNSUBSCRIBE. False: not connected or no memory. */
static bool vkp_i_interest_send(vkp_i_interest *interest, bool subscribe)
{
    static const char *const verbs[2][VKP_SUB_KINDS] = {
        {"UNSUBSCRIBE", "PUNSUBSCRIBE", "SUNSUBSCRIBE"}, {"SUBSCRIBE", "PSUBSCRIBE", "SSUBSCRIBE"}};
    vkp_client *client = interest->client;
    bool audits = client->link.protocol == 2 && client->heartbeat_ns != VKP_FOREVER;
    vkp_i_sub_request *self;
    vkp_str argv[2];
    if (audits && subscribe && client->ready && !vkp_i_link_ask_id(&client->link)) {
        return false; /* later a connection with subscriptions does not carry that */
    }
    self = (vkp_i_sub_request *)vkp_i_alloc_zero(client->env, sizeof *self);
    if (self == NULL) {
        return false;
    }
    self->request.expect = subscribe ? VKP_I_EXPECT_NAMES : VKP_I_EXPECT_LEAVES;
    self->request.due = 1;
    self->request.accept = vkp_i_sub_accept;
    self->request.settle = vkp_i_sub_settled;
    self->client = client;
    self->interest = interest;
    vkp_i_requests_init(&self->waiters);
    argv[0] = vkp_str_of(verbs[subscribe ? 1 : 0][interest->kind]);
    argv[1] = interest->node.key;
    if (vkp_i_request_put(&self->request, client->env, 2, argv) != VKP_OK ||
        !vkp_i_link_start(&client->link, &self->request)) {
        vkp_bytes_unref(&self->request.bytes);
        vkp_i_free(client->env, self, sizeof *self);
        return false;
    }
    interest->newest = self;
    interest->in_flight++;
    client->subs_in_flight++;
    client->changes++;
    vkp_i_requests_move(&interest->waiters, &self->waiters);
    return true;
}

/* Messages may be missing from the last moment at which the connection was known to be good. */
static void vkp_i_interest_open_gap(vkp_i_interest *interest, uint64_t from_ns)
{
    if (interest->gap_ns == 0) {
        interest->gap_ns = VKP_I_MAX(from_ns, (uint64_t)1);
    }
}

/* Note whether the server has the name: messages may arrive, and in RESP2 an array may be one. */
static void vkp_i_interest_set_kept(vkp_i_interest *interest, bool kept)
{
    vkp_client *client = interest->client;
    client->kept += kept ? 1u : 0u;
    client->kept -= interest->kept ? 1u : 0u;
    interest->kept = kept;
    client->link.subscribed = client->kept > 0;
}

/* Change the state, and keep the client's numbers in step. */
static void vkp_i_interest_set_state(vkp_i_interest *interest, vkp_i_sub_state state)
{
    vkp_client *client = interest->client;
    size_t held = state == VKP_I_SUB_HELD ? 1 : 0;
    size_t stuck = state == VKP_I_SUB_STUCK ? 1 : 0;
    held -= interest->state == VKP_I_SUB_HELD ? 1u : 0u; /* wraps around: so does the sum */
    stuck -= interest->state == VKP_I_SUB_STUCK ? 1u : 0u;
    client->changes += interest->state != state ? 1u : 0u;
    client->live += (state != VKP_I_SUB_GONE ? 1u : 0u);
    client->live -= (interest->state != VKP_I_SUB_GONE ? 1u : 0u);
    client->held += held;
    client->held_of[interest->kind] += held;
    client->stuck += stuck;
    interest->state = state;
}

/* An event happened to the name: change its state, and do what the rule says. False: no memory to
   do it; the caller lets the link fail, and the next connection begins anew. */
static bool vkp_i_interest_step(vkp_i_interest *interest, vkp_i_sub_event event)
{
    vkp_client *client = interest->client;
    vkp_i_sub_rule rule = vkp_i_sub_rules[interest->state][event];
    bool ok = true;
    vkp_i_interest_set_state(interest, (vkp_i_sub_state)rule.next);
    if (event == VKP_I_EVENT_TAKEN || event == VKP_I_EVENT_DOWN) {
        vkp_i_interest_set_kept(interest, false);
    }
    if ((rule.actions & VKP_I_DO_CALM) != 0) {
        vkp_i_interest_calm(interest);
    }
    if ((rule.actions & VKP_I_DO_GAP) != 0) {
        vkp_i_interest_open_gap(interest, event == VKP_I_EVENT_MISSING ? client->audited_ns
                                                                       : client->link.known_ns);
    }
    if ((rule.actions & VKP_I_DO_WAIT) != 0) {
        ok = vkp_i_interest_wait(interest);
    }
    if ((rule.actions & VKP_I_DO_ASK) != 0) {
        if (!client->ready) {
            vkp_i_interest_set_state(interest, VKP_I_SUB_WANTED);
        } else {
            ok = vkp_i_interest_send(interest, true);
            if (interest->gap_ns != 0 && !interest->resuming) {
                interest->resuming = true;
                client->resuming++;
            }
        }
    }
    if ((rule.actions & VKP_I_DO_PART) != 0) {
        interest->gap_ns = 0;
        vkp_i_interest_end_resuming(interest);
        ok = vkp_i_interest_send(interest, false);
    }
    return ok;
}

/* The same, and the link fails where there is no memory. */
static void vkp_i_interest_take_step(vkp_i_interest *interest, vkp_i_sub_event event)
{
    vkp_client *client = interest->client;
    if (!vkp_i_interest_step(interest, event)) {
        vkp_i_link_lose(&client->link, "out of memory");
    }
}

/* ---- gaps ---- */

static uint64_t vkp_i_wall_ms(const vkp_client *client, uint64_t then_ns)
{
    uint64_t ago_ns = vkp_i_loop_now(client->loop) - then_ns;
    uint64_t wall_ns = vkp_i_sys(client->env)->wall_ns();
    return (wall_ns - VKP_I_MIN(ago_ns, wall_ns)) / VKP_I_NS_PER_MS;
}

/* Fill the gap and the names behind it from the interests that are back; clears their gap_ns. With
   gap NULL nothing is changed: returns how many are back, with the bytes of their names, and how
   many others are HELD.                                                                       */
static size_t vkp_i_client_collect_gap(vkp_client *client, vkp_gap *gap, vkp_sub_name *names,
                                       char *texts, size_t *bytes, size_t *others)
{
    size_t count = 0;
    int kind;
    *bytes = 0;
    *others = 0;
    for (kind = 0; kind < VKP_SUB_KINDS; kind++) {
        vkp_i_map_node *node = NULL;
        while ((node = vkp_i_map_get_next(&client->interests[kind], node)) != NULL) {
            vkp_i_interest *interest = VKP_CONTAINER(node, vkp_i_interest, node);
            bool own = vkp_i_client_is_own(client, node->key);
            *others += !own && interest->state == VKP_I_SUB_HELD && interest->gap_ns == 0 ? 1u : 0u;
            if (own || interest->gap_ns == 0 || interest->state != VKP_I_SUB_HELD) {
                continue;
            }
            if (gap != NULL) {
                gap->from_ns = VKP_I_MIN(gap->from_ns, interest->gap_ns);
                interest->gap_ns = 0;
            }
            if (names != NULL) {
                names[count].kind = interest->kind;
                names[count].name = vkp_i_put_copy(&texts, node->key);
            }
            *bytes += node->key.len;
            count++;
        }
    }
    return count;
}

/* Every name with a gap that was asked for has its answer: report the gap of those now back. */
static void vkp_i_client_emit_gap(vkp_client *client)
{
    vkp_push push;
    vkp_gap *gap;
    vkp_sub_name *names = NULL;
    size_t bytes;
    size_t others;
    size_t count = vkp_i_client_collect_gap(client, NULL, NULL, NULL, &bytes, &others);
    bool all = others == 0;
    if (count == 0) {
        return;
    }
    memset(&push, 0, sizeof push);
    push.kind = VKP_PUSH_GAP;
    push.frame.block =
        vkp_i_block_open(client->env, sizeof *gap + (all ? 0 : count * sizeof *names + bytes));
    if (push.frame.block == NULL) {
        vkp_i_link_lose(&client->link, "out of memory"); /* the next connection reports it */
        return;
    }
    gap = (vkp_gap *)(void *)vkp_i_block_data(push.frame.block);
    memset(gap, 0, sizeof *gap);
    gap->from_ns = VKP_FOREVER;
    gap->to_ns = vkp_i_loop_now(client->loop);
    if (!all) {
        names = (vkp_sub_name *)(void *)(gap + 1);
        gap->names = names;
        gap->name_count = count;
    }
    (void)vkp_i_client_collect_gap(client, gap, names, all ? NULL : (char *)(names + count), &bytes,
                                   &others);
    gap->from_unix_ms = vkp_i_wall_ms(client, gap->from_ns);
    gap->to_unix_ms = vkp_i_wall_ms(client, gap->to_ns);
    push.gap = gap;
    VKP_I_COUNT(client, gaps);
    vkp_i_client_emit(client, &push);
    vkp_bytes_unref(&push.frame);
}

/* The name has its answer. The last one of those that a GAP waits for reports it. */
static void vkp_i_interest_resumed(vkp_i_interest *interest)
{
    vkp_client *client = interest->client;
    if (interest->resuming) {
        vkp_i_interest_end_resuming(interest);
        if (client->resuming == 0) {
            vkp_i_client_emit_gap(client);
        }
    }
}

/* ---- answers ---- */

/* The server confirmed the name of a request, by this push. */
static bool vkp_i_sub_accept(vkp_i_request *request, const vkp_push *push)
{
    vkp_i_sub_request *self = VKP_CONTAINER(request, vkp_i_sub_request, request);
    vkp_i_interest *interest = self->interest;
    vkp_client *client = self->client;
    if (push->sub != interest->kind || !vkp_i_str_equal(push->channel, interest->node.key)) {
        return false;
    }
    if (push->kind == VKP_PUSH_SUBSCRIBED) {
        vkp_i_interest_set_kept(interest, true);
    }
    if (push->kind == VKP_PUSH_SUBSCRIBED && interest->newest == self) {
        interest->newest = NULL;
        (void)!vkp_i_interest_step(interest, VKP_I_EVENT_CONFIRMED); /* needs no memory */
    }
    if (push->kind == VKP_PUSH_UNSUBSCRIBED) {
        self->confirmed = true;
        self->push = *push;
        self->push.frame = vkp_bytes_ref(&push->frame);
        return true;
    }
    vkp_i_client_emit(client, push);
    if (!client->closed && client->ready) {
        vkp_i_interest_resumed(interest);
    }
    return true;
}

/* Note the outcome of all WANTs of the list, for vkp_i_waiters_report. */
static void vkp_i_waiters_note(vkp_client *client, vkp_i_requests *waiters, vkp_status status)
{
    vkp_i_request *request;
    for (request = waiters->first; request != NULL; request = request->next) {
        VKP_CONTAINER(request, vkp_i_ask, request)->outcome = status;
    }
    vkp_i_requests_move(waiters, &client->reporting);
}

/* Report the outcome of all WANTs of the list. A callback may close the client: the close reports
   those that are left before it returns. */
static void vkp_i_waiters_report(vkp_client *client, vkp_i_requests *waiters, vkp_status status,
                                 vkp_str words)
{
    vkp_i_request *request;
    vkp_i_waiters_note(client, waiters, status);
    if (client->is_reporting && !client->closed) {
        return; /* inside a callback of the call that goes on */
    }
    client->is_reporting = true;
    while ((request = vkp_i_requests_pop(&client->reporting)) != NULL) {
        vkp_i_ask *ask = VKP_CONTAINER(request, vkp_i_ask, request);
        vkp_i_ask_report(ask, ask->outcome,
                         ask->outcome == status ? words : vkp_str_of(client->link.error));
    }
    client->is_reporting = false;
}

/* The server refused to subscribe. The event reports it once, and again when the words change. */
static void vkp_i_interest_refused(vkp_i_interest *interest, vkp_str words)
{
    vkp_client *client = interest->client;
    vkp_i_refusal *refusal = vkp_i_interest_refusal(interest);
    uint64_t hash = vkp_i_map_hash(&client->interests[interest->kind], words) | 1u;
    bool report = refusal != NULL && refusal->words != hash;
    if (refusal != NULL) {
        refusal->passing = vkp_i_words_are_passing(words);
        refusal->words = hash;
    }
    if (refusal == NULL || !vkp_i_interest_step(interest, VKP_I_EVENT_REFUSED)) {
        vkp_i_link_lose(&client->link, "out of memory");
        return;
    }
    VKP_I_COUNT(client, refusals);
    if (report) {
        vkp_i_log(client->env, VKP_LOG_WARN, "%s: %.*s is refused: %.*s",
                  client->config.address.ptr, VKP_FMT(interest->node.key), VKP_FMT(words));
        vkp_i_interest_event(interest, VKP_PUSH_REFUSED, words);
    }
    if (!client->closed && client->ready) {
        vkp_i_interest_resumed(interest);
    }
}

/* The server refused to unsubscribe: messages of the name still arrive. */
static void vkp_i_interest_stuck(vkp_i_interest *interest)
{
    vkp_client *client = interest->client;
    vkp_i_refusal *refusal = vkp_i_interest_refusal(interest);
    if (refusal != NULL) {
        refusal->passing = true;
    }
    if (refusal == NULL || !vkp_i_interest_step(interest, VKP_I_EVENT_STUCK)) {
        vkp_i_link_lose(&client->link, "out of memory");
    }
}

/* A name was left. The event is the server's push; without one it is ours. */
static void vkp_i_sub_report_left(vkp_i_sub_request *self)
{
    if (self->client->closed) {
        return;
    }
    if (self->confirmed) {
        vkp_i_client_emit(self->client, &self->push);
    } else if (self->interest->state == VKP_I_SUB_GONE) {
        vkp_i_interest_event(self->interest, VKP_PUSH_UNSUBSCRIBED, vkp_i_str(NULL, 0));
    }
}

/* A SUBSCRIBE or UNSUBSCRIBE is out of flight. */
static void vkp_i_sub_settled(vkp_i_request *request, vkp_status status, const vkp_value *value,
                              const vkp_bytes *frame)
{
    vkp_i_sub_request *self = VKP_CONTAINER(request, vkp_i_sub_request, request);
    vkp_i_interest *interest = self->interest;
    vkp_client *client = self->client;
    bool newest = interest->newest == self;
    vkp_str words = value != NULL ? vkp_value_get_str(value) : vkp_str_of(client->link.error);
    (void)frame;
    client->subs_in_flight--;
    vkp_i_waiters_note(client, &self->waiters, status); /* a callback may close the client */
    if (newest) {
        interest->newest = NULL;
    }
    if (request->expect == VKP_I_EXPECT_LEAVES && status == VKP_OK) {
        vkp_i_interest_set_kept(interest, false);
    }
    if (newest && request->expect == VKP_I_EXPECT_NAMES && status == VKP_ERR_REFUSED) {
        vkp_i_interest_refused(interest, words);
    } else if (newest && status == VKP_ERR_REFUSED) {
        vkp_i_interest_stuck(interest);
    } else if (newest && status == VKP_OK) {
        (void)!vkp_i_interest_step(interest, VKP_I_EVENT_LEFT); /* needs no memory */
    }
    if (request->expect == VKP_I_EXPECT_LEAVES && status != VKP_ERR_REFUSED) {
        vkp_i_sub_report_left(self); /* also when the link went down: it is left */
    }
    vkp_bytes_unref(&self->push.frame);
    vkp_i_interest_release(interest);
    vkp_i_waiters_report(client, &self->waiters, status, words);
    vkp_bytes_unref(&self->request.bytes);
    vkp_i_free(client->env, self, sizeof *self);
}

/* The timer of a refusal ended. */
static void vkp_i_interest_on_timer(vkp_timer *timer)
{
    vkp_i_refusal *refusal = VKP_CONTAINER(timer, vkp_i_refusal, timer);
    vkp_client *client = refusal->interest->client;
    (void)VKP_I_ADD(&client->refs, 1);
    vkp_i_interest_take_step(refusal->interest, VKP_I_EVENT_RETRY);
    vkp_i_client_release(client);
}

/* The server ended a subscription that nobody asked it to end: it no longer serves the slot. */
__attribute__((noinline)) static void vkp_i_client_taken(vkp_client *client, const vkp_push *push)
{
    vkp_i_interest *interest = vkp_i_interest_find(client, push->sub, push->channel);
    bool held = interest != NULL && interest->state == VKP_I_SUB_HELD;
    if (interest == NULL || interest->state == VKP_I_SUB_STUCK) {
        vkp_i_client_emit(client, push);
    }
    if (interest == NULL || client->closed || !client->ready) {
        return;
    }
    vkp_i_interest_hold(interest);
    if (held) {
        VKP_I_COUNT(client, losses);
        vkp_i_interest_event(interest, VKP_PUSH_LOST,
                             vkp_str_of("the server ended the subscription"));
    }
    if (!client->closed && client->ready) {
        vkp_i_interest_take_step(interest, VKP_I_EVENT_TAKEN);
    }
    vkp_i_interest_release(interest);
}

/* ---- what the program asks ---- */

/* Carry out a WANT: add one to the interest's `wanted`, and report the outcome now, or when the
   server has answered. False: no memory for the name; the ask stays the caller's. */
static bool vkp_i_client_want(vkp_client *client, vkp_i_ask *ask)
{
    vkp_str name = vkp_i_str(ask->request.bytes.data, ask->request.bytes.len);
    vkp_i_interest *interest = vkp_i_interest_find(client, ask->sub, name);
    if (interest == NULL) {
        interest = vkp_i_interest_new(client, ask->sub, name);
    }
    if (interest == NULL) {
        return false;
    }
    client->names_wanted += interest->wanted++ == 0 ? 1u : 0u;
    vkp_i_requests_append(&interest->waiters, &ask->request);
    vkp_i_interest_hold(interest);
    if (!vkp_i_interest_step(interest, VKP_I_EVENT_WANT)) {
        vkp_i_link_lose(&client->link, "out of memory");
    } else if (interest->state == VKP_I_SUB_HELD) {
        vkp_i_waiters_report(client, &interest->waiters, VKP_OK, vkp_i_str(NULL, 0));
    } else if (interest->newest != NULL) {
        vkp_i_requests_move(&interest->waiters, &interest->newest->waiters);
    } else if (vkp_client_get_state(client) != VKP_CLIENT_CONNECTING) {
        vkp_i_waiters_report(client, &interest->waiters, VKP_ERR_DISCONNECTED,
                             vkp_str_of(client->link.error));
    }
    vkp_i_interest_release(interest);
    return true;
}

/* Carry out a LEAVE: take one from the interest's `wanted`. */
static void vkp_i_client_leave(vkp_client *client, vkp_i_ask *ask)
{
    vkp_str name = vkp_i_str(ask->request.bytes.data, ask->request.bytes.len);
    vkp_i_interest *interest = vkp_i_interest_find(client, ask->sub, name);
    bool resumed;
    vkp_i_ask_free(ask);
    if (interest == NULL || interest->wanted == 0 || --interest->wanted > 0) {
        return;
    }
    client->names_wanted--;
    vkp_i_interest_hold(interest);
    resumed = interest->resuming;
    vkp_i_interest_take_step(interest, interest->kept ? VKP_I_EVENT_LEAVE_KEPT : VKP_I_EVENT_LEAVE);
    vkp_i_waiters_report(client, &interest->waiters, VKP_ERR_DISCONNECTED,
                         vkp_str_of(client->link.error));
    if (resumed && !client->closed && client->ready && client->resuming == 0) {
        vkp_i_client_emit_gap(client); /* it waited for the answer to this name */
    }
    vkp_i_interest_release(interest);
}

/* ---- the link's life ---- */

/* Ask for every wanted name on a new connection. */
static void vkp_i_client_resubscribe(vkp_client *client)
{
    int kind;
    for (kind = 0; kind < VKP_SUB_KINDS; kind++) {
        vkp_i_map_node *node = NULL;
        while ((node = vkp_i_map_get_next(&client->interests[kind], node)) != NULL) {
            if (!vkp_i_interest_step(VKP_CONTAINER(node, vkp_i_interest, node),
                                     VKP_I_EVENT_READY)) {
                vkp_i_link_lose(&client->link, "out of memory");
                return;
            }
        }
    }
}

/* The link is down: wanted names stay. WANTs that wait are moved to `failed`. */
static void vkp_i_client_suspend(vkp_client *client)
{
    int kind;
    for (kind = 0; kind < VKP_SUB_KINDS; kind++) {
        vkp_i_map_node *node = vkp_i_map_get_next(&client->interests[kind], NULL);
        while (node != NULL) {
            vkp_i_interest *interest = VKP_CONTAINER(node, vkp_i_interest, node);
            node = vkp_i_map_get_next(&client->interests[kind], node);
            interest->newest = NULL;
            vkp_i_interest_end_resuming(interest);
            vkp_i_requests_move(&interest->waiters, &client->failed);
            (void)!vkp_i_interest_step(interest, VKP_I_EVENT_DOWN); /* needs no memory */
            vkp_i_interest_free_unused(interest);
        }
    }
}

/* The client is closed: no name is wanted. */
static void vkp_i_client_forget(vkp_client *client)
{
    int kind;
    for (kind = 0; kind < VKP_SUB_KINDS; kind++) {
        vkp_i_map_node *node = vkp_i_map_get_next(&client->interests[kind], NULL);
        while (node != NULL) {
            vkp_i_interest *interest = VKP_CONTAINER(node, vkp_i_interest, node);
            node = vkp_i_map_get_next(&client->interests[kind], node);
            interest->wanted = 0;
            (void)!vkp_i_interest_step(interest, VKP_I_EVENT_LEAVE);
            vkp_i_interest_free_unused(interest);
        }
    }
}

#endif /* VKP_I_IO */
