#if VKP_I_IO
/* ======================================================================================
   >>impl-relay-survey   Relay: what it says about itself
   ======================================================================================
   Counters: each loop counts in its shard's tally, any thread adds the tallies up
   (vkp_relay_get_stats). What would cost each command or each change of a client's state to count
   is looked up when somebody asks (vkp_relay_survey_then): loop 0 queues survey_task on each shard,
   which goes over its clients, VKP_I_SURVEY_SLICE in a round; the last shard queues end_task on
   loop 0, which puts the findings together and calls those who asked. Who asks while a survey is
   under way gets the next one, so that each survey is younger than the call.
   A shard's findings belong to its loop from the survey_task until it counts itself off `left`,
   then to loop 0.
   Loop 0 also keeps the outages: from the loss of a shared connection until all are there again.
   Lag: a timer on each loop, ten times a second, compares the clock with its deadline. */

#define VKP_I_SURVEY_SLICE 128u          /* most clients in a round */
#define VKP_I_SURVEY_CHANNELS 16u        /* most names in a survey */
#define VKP_I_SURVEY_OUTAGES 32u         /* most outages that are kept */
#define VKP_I_LAG_PERIOD_NS 100000000u   /* between two looks at the lag */
#define VKP_I_LAG_TURN_NS 10000000000ull /* the largest lag is of this time and of that before */

/* Somebody who wants a survey. */
typedef struct vkp_i_survey_call {
    vkp_i_task task; /* enters the call in surveys->waiting, on loop 0 */
    struct vkp_i_survey_call *next;
    vkp_relay *relay; /* holds one reference */
    void (*done)(void *user, const vkp_relay_survey *survey);
    void *user;
} vkp_i_survey_call;

/* A name with many messages on one loop. */
typedef struct vkp_i_found_channel {
    vkp_sub_kind kind;
    size_t name_bytes; /* of the whole name; `name` has a part of it */
    uint64_t messages;
    size_t subscribers;
    char name[VKP_RELAY_CHANNEL_BYTES];
} vkp_i_found_channel;

/* What one shard found. */
typedef struct vkp_i_findings {
    size_t clients[VKP_RELAY_CLIENT_STATES];
    size_t queued_bytes;
    vkp_relay_loop loop;
    size_t channel_count;
    vkp_i_found_channel channels[VKP_I_HUB_TOP];
} vkp_i_findings;

typedef struct vkp_i_outage {
    uint64_t from_unix_ms;
    uint64_t to_unix_ms;
    char reason[VKP_I_REASON_BYTES];
} vkp_i_outage;

typedef struct vkp_i_surveys {
    vkp_relay *relay;                           /* no reference */
    vkp_i_survey_call *waiting;                 /* for the next survey, newest first */
    vkp_i_survey_call *running;                 /* of the survey under way; NULL: none is */
    size_t left;                                /* atomic: shards that have not finished */
    bool ended;                                 /* the relay's unref was called */
    vkp_i_task end_task;                        /* runs vkp_i_surveys_end on loop 0 */
    vkp_i_findings *findings;                   /* one per shard, behind the struct */
    vkp_i_outage outages[VKP_I_SURVEY_OUTAGES]; /* a ring */
    size_t outage_count;                        /* since open; the last one may last */
    bool in_outage;
} vkp_i_surveys;

/* ---- outages, on loop 0 ---- */

static uint64_t vkp_i_relay_unix_ms(const vkp_relay *relay)
{
    return relay->shards[0].loop->sys->wall_ns() / VKP_I_NS_PER_MS;
}

/* Whether all connections to the server that clients share are there. */
static bool vkp_i_relay_is_connected(const vkp_relay *relay)
{
    size_t i;
    if (vkp_i_relay_has_server(relay) && vkp_client_get_state(relay->push) != VKP_CLIENT_READY) {
        return false;
    }
    for (i = 0; i < relay->shared_count; i++) {
        if (vkp_client_get_state(relay->shared[i]) != VKP_CLIENT_READY) {
            return false;
        }
    }
    return true;
}

/* A shared connection, or the one for subscriptions, came, went, or could not be had. */
static void vkp_i_relay_note_state(vkp_relay *relay, const vkp_push *push)
{
    vkp_i_surveys *surveys = relay->surveys;
    bool connected = vkp_i_relay_is_connected(relay);
    uint64_t now_ms = vkp_i_relay_unix_ms(relay);
    vkp_i_outage *outage;
    if (connected != (relay->connected != 0)) {
        VKP_I_STORE(&relay->connected, connected ? 1u : 0u);
        VKP_I_STORE(&relay->since_unix_ms, now_ms);
    }
    if (surveys->in_outage && connected) {
        outage = &surveys->outages[(surveys->outage_count - 1) % VKP_I_SURVEY_OUTAGES];
        outage->to_unix_ms = now_ms;
        surveys->in_outage = false;
    } else if (!surveys->in_outage &&
               (push->kind == VKP_PUSH_DISCONNECTED || push->kind == VKP_PUSH_CONNECT_FAILED)) {
        outage = &surveys->outages[surveys->outage_count++ % VKP_I_SURVEY_OUTAGES];
        outage->from_unix_ms = now_ms;
        outage->to_unix_ms = 0;
        (void)snprintf(outage->reason, sizeof outage->reason, "%.*s", VKP_FMT(push->payload));
        surveys->in_outage = true;
    }
}

/* An event of a connection that carries commands. */
static void vkp_i_relay_on_shared_push(void *user, const vkp_push *push)
{
    vkp_i_relay_note_state((vkp_relay *)user, push);
}

/* ---- lag, on each loop ---- */

static void vkp_i_lag_measure(vkp_timer *timer)
{
    vkp_i_lag *lag = VKP_CONTAINER(timer, vkp_i_lag, timer);
    uint64_t now_ns = vkp_i_loop_clock(timer->i_loop);
    uint64_t late_ns = now_ns - VKP_I_MIN(now_ns, lag->due_ns);
    if (now_ns - lag->turn_ns >= VKP_I_LAG_TURN_NS) {
        lag->before = lag->most;
        lag->most = 0;
        lag->turn_ns = now_ns;
    }
    lag->most = VKP_I_MAX(lag->most, late_ns);
    lag->due_ns = now_ns + VKP_I_LAG_PERIOD_NS;
    /* Cannot fail: the entry of this timer was just removed, so there is room. */
    (void)!vkp_timer_start(timer, timer->i_loop, vkp_i_lag_measure, 0, lag->due_ns);
}

/* ---- a survey of one shard, on its loop ---- */

static vkp_relay_client_state vkp_i_local_get_state(const vkp_i_local *local)
{
    return vkp_i_conn_get_queued_bytes(local->member.conn) > 0 ? VKP_RELAY_CLIENT_SLOW
           : local->answer_count > 0                           ? VKP_RELAY_CLIENT_WAITING
           : local->session != NULL                            ? VKP_RELAY_CLIENT_PRIVATE
           : local->member.counts[0] + local->member.counts[1] + local->member.counts[2] > 0
               ? VKP_RELAY_CLIENT_SUBSCRIBED
               : VKP_RELAY_CLIENT_IDLE;
}

/* What takes no time, once per survey. */
static void vkp_i_shard_find_channels(vkp_i_shard *shard, vkp_i_findings *found)
{
    const vkp_hub *hub = shard->hub;
    size_t i;
    for (i = 0; i < hub->top_count; i++) {
        const vkp_i_topic *topic = hub->top[i];
        vkp_i_found_channel *channel = &found->channels[i];
        channel->kind = topic->kind;
        channel->name_bytes = topic->node.key.len;
        channel->messages = topic->messages;
        channel->subscribers = topic->count;
        vkp_i_copy(channel->name, topic->node.key.ptr,
                   VKP_I_MIN(topic->node.key.len, sizeof channel->name));
    }
    found->channel_count = hub->top_count;
    found->loop.clients = shard->local_count;
    found->loop.lag_ns = VKP_I_MAX(shard->lag.most, shard->lag.before);
}

static void vkp_i_surveys_end(vkp_i_task *task);

/* The shard has finished: the last one goes on at loop 0. Gives the reference of its task back. */
static void vkp_i_shard_survey_done(vkp_i_shard *shard)
{
    vkp_relay *relay = shard->relay;
    vkp_i_surveys *surveys = relay->surveys;
    if (VKP_I_UNREF(&surveys->left) == 1) {
        (void)VKP_I_ADD(&relay->refs, 1);
        surveys->end_task.fn = vkp_i_surveys_end;
        if (!vkp_i_loop_queue(relay->shards[0].loop, &surveys->end_task)) {
            vkp_i_relay_release(relay);
        }
    }
    vkp_i_relay_release(relay);
}

/* Task: look at some clients. */
static void vkp_i_shard_survey(vkp_i_task *task)
{
    vkp_i_shard *shard = VKP_CONTAINER(task, vkp_i_shard, survey_task);
    vkp_relay *relay = shard->relay;
    vkp_i_findings *found = &relay->surveys->findings[shard - relay->shards];
    size_t i;
    for (i = 0; i < VKP_I_SURVEY_SLICE && shard->survey_at != NULL; i++) {
        const vkp_i_local *local = shard->survey_at;
        found->clients[vkp_i_local_get_state(local)]++;
        found->queued_bytes += vkp_i_conn_get_queued_bytes(local->member.conn);
        shard->survey_at = local->next;
    }
    if (shard->survey_at != NULL && vkp_i_loop_queue(shard->loop, task)) {
        return;
    }
    if (!shard->gone) {
        vkp_i_shard_find_channels(shard, found);
    }
    vkp_i_shard_survey_done(shard);
}

/* Task: begin with the newest client. */
static void vkp_i_shard_survey_begins(vkp_i_task *task)
{
    vkp_i_shard *shard = VKP_CONTAINER(task, vkp_i_shard, survey_task);
    shard->survey_at = shard->locals;
    task->fn = vkp_i_shard_survey;
    vkp_i_shard_survey(task);
}

/* ---- surveys, on loop 0 ---- */

/* Start the survey that the waiting calls get. */
static void vkp_i_surveys_begin(vkp_relay *relay)
{
    vkp_i_surveys *surveys = relay->surveys;
    size_t i;
    surveys->running = surveys->waiting;
    surveys->waiting = NULL;
    surveys->left = relay->shard_count;
    memset(surveys->findings, 0, relay->shard_count * sizeof *surveys->findings);
    for (i = 0; i < relay->shard_count; i++) {
        vkp_i_shard *shard = &relay->shards[i];
        (void)VKP_I_ADD(&relay->refs, 1);
        shard->survey_task.fn = vkp_i_shard_survey_begins;
        if (!vkp_i_loop_queue(shard->loop, &shard->survey_task)) {
            vkp_i_shard_survey_done(shard);
        }
    }
}

/* Call those who asked, and free their calls. */
static void vkp_i_survey_calls_end(vkp_relay *relay, vkp_i_survey_call *call,
                                   const vkp_relay_survey *survey)
{
    while (call != NULL) {
        vkp_i_survey_call *next = call->next;
        call->done(call->user, survey);
        vkp_i_free(relay->env, call, sizeof *call);
        vkp_i_relay_release(relay);
        call = next;
    }
}

/* By kind and name: of those that were cut the length decides, too. */
static int vkp_i_compare_names(const void *a, const void *b)
{
    const vkp_i_found_channel *one = *(const vkp_i_found_channel *const *)a;
    const vkp_i_found_channel *two = *(const vkp_i_found_channel *const *)b;
    size_t len = VKP_I_MIN(VKP_I_MIN(one->name_bytes, two->name_bytes), sizeof one->name);
    int order = one->kind != two->kind ? (one->kind < two->kind ? -1 : 1)
                                       : memcmp(one->name, two->name, len);
    return order != 0 || one->name_bytes == two->name_bytes ? order
           : one->name_bytes < two->name_bytes              ? -1
                                                            : 1;
}

/* The most messages first, otherwise by name. */
static int vkp_i_compare_messages(const void *a, const void *b)
{
    const vkp_i_found_channel *one = *(const vkp_i_found_channel *const *)a;
    const vkp_i_found_channel *two = *(const vkp_i_found_channel *const *)b;
    return one->messages != two->messages ? (one->messages > two->messages ? -1 : 1)
                                          : vkp_i_compare_names(a, b);
}

/* Put the shards' names together in `all`, an array with room for them. Returns how many. A name's
   messages come to each shard that has a subscriber: the largest number counts.               */
static size_t vkp_i_surveys_merge(const vkp_relay *relay, vkp_i_found_channel **all)
{
    size_t count = 0;
    size_t kept = 0;
    size_t i;
    size_t k;
    for (i = 0; i < relay->shard_count; i++) {
        for (k = 0; k < relay->surveys->findings[i].channel_count; k++) {
            all[count++] = &relay->surveys->findings[i].channels[k];
        }
    }
    qsort(all, count, sizeof *all, vkp_i_compare_names);
    for (i = 0; i < count; i++) {
        if (kept > 0 && vkp_i_compare_names(&all[kept - 1], &all[i]) == 0) {
            all[kept - 1]->messages = VKP_I_MAX(all[kept - 1]->messages, all[i]->messages);
            all[kept - 1]->subscribers += all[i]->subscribers;
        } else {
            all[kept++] = all[i];
        }
    }
    qsort(all, kept, sizeof *all, vkp_i_compare_messages);
    return VKP_I_MIN(kept, (size_t)VKP_I_SURVEY_CHANNELS);
}

/* The arrays of a survey. */
typedef struct vkp_i_survey_lists {
    vkp_relay_channel channels[VKP_I_SURVEY_CHANNELS];
    vkp_relay_outage outages[VKP_I_SURVEY_OUTAGES];
} vkp_i_survey_lists;

static void vkp_i_survey_add_outages(const vkp_i_surveys *surveys, vkp_i_survey_lists *lists,
                                     vkp_relay_survey *survey)
{
    size_t i;
    survey->outages = lists->outages;
    survey->outage_count = VKP_I_MIN(surveys->outage_count, (size_t)VKP_I_SURVEY_OUTAGES);
    for (i = 0; i < survey->outage_count; i++) {
        const vkp_i_outage *from =
            &surveys->outages[(surveys->outage_count - survey->outage_count + i) %
                              VKP_I_SURVEY_OUTAGES];
        lists->outages[i].from_unix_ms = from->from_unix_ms;
        lists->outages[i].to_unix_ms = from->to_unix_ms;
        lists->outages[i].reason = vkp_str_of(from->reason);
    }
}

static void vkp_i_survey_add_channels(const vkp_relay *relay, vkp_i_found_channel **all,
                                      vkp_i_survey_lists *lists, vkp_relay_survey *survey)
{
    size_t i;
    survey->channels = lists->channels;
    survey->channel_count = vkp_i_surveys_merge(relay, all);
    for (i = 0; i < survey->channel_count; i++) {
        vkp_relay_channel *to = &lists->channels[i];
        to->kind = all[i]->kind;
        to->name = vkp_i_str(all[i]->name, VKP_I_MIN(all[i]->name_bytes, sizeof all[i]->name));
        to->name_bytes = all[i]->name_bytes;
        to->messages = all[i]->messages;
        to->subscribers = all[i]->subscribers;
    }
}

/* Put the findings together and call those who asked. False: no memory. */
static bool vkp_i_surveys_report(vkp_relay *relay, vkp_i_survey_call *calls)
{
    const vkp_env *env = relay->env;
    size_t shards = relay->shard_count;
    size_t most = shards * VKP_I_HUB_TOP;
    vkp_i_survey_lists *lists = (vkp_i_survey_lists *)vkp_i_alloc(env, sizeof *lists);
    vkp_i_found_channel **all = (vkp_i_found_channel **)vkp_i_alloc(env, most * sizeof *all);
    vkp_relay_loop *loops = (vkp_relay_loop *)vkp_i_alloc(env, shards * sizeof *loops);
    size_t count = relay->door_count + 1; /* one for none */
    vkp_relay_listener *listeners =
        (vkp_relay_listener *)vkp_i_alloc(env, count * sizeof *listeners);
    bool ok = lists != NULL && all != NULL && loops != NULL && listeners != NULL;
    vkp_relay_survey survey;
    size_t i;
    size_t k;
    memset(&survey, 0, sizeof survey);
    if (ok) {
        vkp_relay_get_stats(relay, &survey.stats);
        for (i = 0; i < shards; i++) {
            for (k = 0; k < VKP_RELAY_CLIENT_STATES; k++) {
                survey.clients[k] += relay->surveys->findings[i].clients[k];
            }
            survey.queued_bytes += relay->surveys->findings[i].queued_bytes;
            loops[i] = relay->surveys->findings[i].loop;
        }
        const vkp_i_door *door = relay->doors; /* newest first */
        for (i = relay->door_count; i > 0; i--, door = door->next) {
            listeners[i - 1].address = vkp_listener_get_address(door->listener);
            vkp_listener_get_stats(door->listener, &listeners[i - 1].stats);
        }
        survey.loops = loops;
        survey.loop_count = shards;
        survey.listeners = listeners;
        survey.listener_count = relay->door_count;
        vkp_i_survey_add_outages(relay->surveys, lists, &survey);
        vkp_i_survey_add_channels(relay, all, lists, &survey);
        vkp_i_survey_calls_end(relay, calls, &survey);
    }
    vkp_i_free(env, listeners, count * sizeof *listeners);
    vkp_i_free(env, loops, shards * sizeof *loops);
    vkp_i_free(env, all, most * sizeof *all);
    vkp_i_free(env, lists, sizeof *lists);
    return ok;
}

/* Task on loop 0: all shards have finished. */
static void vkp_i_surveys_end(vkp_i_task *task)
{
    vkp_i_surveys *surveys = VKP_CONTAINER(task, vkp_i_surveys, end_task);
    vkp_relay *relay = surveys->relay;
    vkp_i_survey_call *calls = surveys->running;
    surveys->running = NULL;
    if (calls != NULL && !vkp_i_surveys_report(relay, calls)) {
        vkp_i_survey_calls_end(relay, calls, NULL);
    }
    if (surveys->waiting != NULL) {
        vkp_i_surveys_begin(relay);
    }
    vkp_i_relay_release(relay);
}

/* Task on loop 0: somebody wants a survey. */
static void vkp_i_survey_call_enter(vkp_i_task *task)
{
    vkp_i_survey_call *call = VKP_CONTAINER(task, vkp_i_survey_call, task);
    vkp_relay *relay = call->relay;
    vkp_i_surveys *surveys = relay->surveys;
    if (surveys->ended) {
        vkp_i_survey_calls_end(relay, call, NULL);
        return;
    }
    call->next = surveys->waiting;
    surveys->waiting = call;
    if (surveys->running == NULL) {
        vkp_i_surveys_begin(relay);
    }
}

VKP_API vkp_status vkp_relay_survey_then(vkp_relay *relay,
                                         void (*done)(void *user, const vkp_relay_survey *survey),
                                         void *user)
{
    vkp_i_survey_call *call;
    VKP_I_REQUIRE(relay != NULL && done != NULL);
    call = (vkp_i_survey_call *)vkp_i_alloc_zero(relay->env, sizeof *call);
    if (call == NULL) {
        return VKP_ERR_NOMEM;
    }
    call->task.fn = vkp_i_survey_call_enter;
    call->relay = relay;
    call->done = done;
    call->user = user;
    (void)VKP_I_ADD(&relay->refs, 1);
    if (!vkp_i_loop_queue(relay->shards[0].loop, &call->task)) {
        vkp_i_free(relay->env, call, sizeof *call);
        vkp_i_relay_release(relay);
        return VKP_ERR_CLOSED;
    }
    return VKP_OK;
}

/* The relay's unref: no loop runs. Surveys under way end when their tasks do. */
static void vkp_i_relay_end_surveys(vkp_relay *relay)
{
    vkp_i_surveys *surveys = relay->surveys;
    size_t i;
    for (i = 0; i < relay->shard_count; i++) {
        vkp_timer_stop(&relay->shards[i].lag.timer);
        relay->shards[i].survey_at = NULL;
    }
    if (surveys != NULL) {
        vkp_i_survey_call *running = surveys->running;
        vkp_i_survey_call *waiting = surveys->waiting;
        surveys->ended = true;
        surveys->running = NULL;
        surveys->waiting = NULL;
        vkp_i_survey_calls_end(relay, running, NULL);
        vkp_i_survey_calls_end(relay, waiting, NULL);
    }
}

/* Allocate what surveys need, and start to measure the lag. */
static vkp_status vkp_i_relay_open_surveys(vkp_relay *relay, bool measure_lag)
{
    size_t bytes = sizeof(vkp_i_surveys) + relay->shard_count * sizeof(vkp_i_findings);
    vkp_i_surveys *surveys = (vkp_i_surveys *)vkp_i_alloc_zero(relay->env, bytes);
    vkp_status status = VKP_OK;
    size_t i;
    if (surveys == NULL) {
        return VKP_ERR_NOMEM;
    }
    surveys->relay = relay;
    surveys->findings = (vkp_i_findings *)(void *)(surveys + 1);
    relay->surveys = surveys;
    relay->surveys_bytes = bytes;
    relay->since_unix_ms = vkp_i_relay_unix_ms(relay);
    for (i = 0; i < relay->shard_count && measure_lag && status == VKP_OK; i++) {
        vkp_i_lag *lag = &relay->shards[i].lag;
        lag->turn_ns = vkp_i_loop_clock(relay->shards[i].loop);
        lag->due_ns = lag->turn_ns + VKP_I_LAG_PERIOD_NS;
        status =
            vkp_timer_start(&lag->timer, relay->shards[i].loop, vkp_i_lag_measure, 0, lag->due_ns);
    }
    return status;
}

/* ---- PING ---- */

/* Somebody who wants to know whether the server answers. */
typedef struct vkp_i_ping {
    vkp_relay *relay; /* holds one reference */
    vkp_subscribe_fn done;
    void *user;
} vkp_i_ping;

static void vkp_i_ping_end(vkp_i_ping *ping, vkp_status status, vkp_str words)
{
    vkp_relay *relay = ping->relay;
    ping->done(ping->user, status, words);
    vkp_i_free(relay->env, ping, sizeof *ping);
    vkp_i_relay_release(relay);
}

/* Loop 0: the server answered, or cannot. One that does not let this user PING answers. */
static void vkp_i_ping_on_reply(void *user, vkp_status status, const vkp_value *value,
                                const vkp_bytes *frame)
{
    vkp_str words = vkp_i_str(NULL, 0);
    (void)frame;
    if (status == VKP_OK && value->type == VKP_RESP_ERROR &&
        !vkp_i_starts_with(vkp_value_get_str(value), "NOPERM")) {
        status = VKP_ERR_REFUSED;
        words = vkp_value_get_str(value);
    }
    vkp_i_ping_end((vkp_i_ping *)user, status, words);
}

VKP_API vkp_status vkp_relay_ping_then(vkp_relay *relay, vkp_subscribe_fn done, void *user)
{
    static const char text[] = "*1\r\n$4\r\nPING\r\n";
    vkp_bytes command = vkp_bytes_static(text, sizeof text - 1);
    vkp_status status;
    vkp_i_ping *ping;
    VKP_I_REQUIRE(relay != NULL && done != NULL);
    ping = (vkp_i_ping *)vkp_i_alloc(relay->env, sizeof *ping);
    if (ping == NULL) {
        return VKP_ERR_NOMEM;
    }
    ping->relay = relay;
    ping->done = done;
    ping->user = user;
    (void)VKP_I_ADD(&relay->refs, 1);
    if (relay->shared_count == 0 || !vkp_i_relay_is_connected(relay)) {
        vkp_i_ping_end(ping, vkp_i_relay_is_connected(relay) ? VKP_OK : VKP_ERR_DISCONNECTED,
                       vkp_i_str(NULL, 0));
        return VKP_OK;
    }
    status = vkp_client_send(relay->shared[0], &command, 1, vkp_i_ping_on_reply, ping);
    if (status != VKP_OK) {
        vkp_i_ping_end(ping, status, vkp_i_str(NULL, 0));
    }
    return VKP_OK;
}

/* ---- counters ---- */

static void vkp_i_add_times(vkp_relay_times *sum, const vkp_relay_times *times)
{
    size_t i;
    sum->total_ns += VKP_I_LOAD(&times->total_ns);
    for (i = 0; i < VKP_RELAY_TIMES; i++) {
        sum->within[i] += VKP_I_LOAD(&times->within[i]);
    }
}

static void vkp_i_add_tally(vkp_relay_stats *stats, const vkp_i_tally *tally)
{
    size_t i;
    for (i = 0; i < VKP_RELAY_ROUTES; i++) {
        stats->commands[i] += VKP_I_LOAD(&tally->commands[i]);
    }
    stats->messages_in += VKP_I_LOAD(&tally->messages_in);
    stats->deliveries += VKP_I_LOAD(&tally->deliveries);
    stats->in_flight += VKP_I_LOAD(&tally->in_flight);
    vkp_i_add_times(&stats->replies[0], &tally->replies[0]);
    vkp_i_add_times(&stats->replies[1], &tally->replies[1]);
}

static void vkp_i_add_upstream(vkp_relay_stats *stats, const vkp_client *client)
{
    vkp_client_stats of;
    vkp_client_get_stats(client, &of);
    stats->outages += of.outages;
    stats->refusals += of.refusals;
    stats->reconnects += of.connections > 0 ? of.connections - 1 : 0;
}

VKP_API void vkp_relay_get_stats(const vkp_relay *relay, vkp_relay_stats *stats)
{
    size_t i;
    vkp_gate_stats gate;
    memset(stats, 0, sizeof *stats);
    vkp_gate_get_stats(relay->gate, &gate);
    stats->clients = gate.clients;
    stats->accepted = gate.admitted;
    memcpy(stats->refused, gate.refused, sizeof stats->refused);
    stats->lagged = VKP_I_LOAD(&relay->lagged);
    stats->slow_closed = VKP_I_LOAD(&relay->slow_closed);
    stats->protocol_errors = VKP_I_LOAD(&relay->protocol_errors);
    stats->gaps = VKP_I_LOAD(&relay->gaps);
    stats->lost = VKP_I_LOAD(&relay->lost);
    stats->privates = VKP_I_LOAD(&relay->private_count);
    stats->privates_opened = VKP_I_LOAD(&relay->privates_opened);
    stats->privates_refused = VKP_I_LOAD(&relay->privates_refused);
    stats->gathered_bytes = VKP_I_LOAD(&relay->room.used);
    stats->connected = VKP_I_LOAD(&relay->connected) != 0;
    stats->since_unix_ms = VKP_I_LOAD(&relay->since_unix_ms);
    if (relay->push != NULL) {
        vkp_i_add_upstream(stats, relay->push);
    }
    for (i = 0; i < relay->shared_count; i++) {
        vkp_i_add_upstream(stats, relay->shared[i]);
    }
    for (i = 0; i < relay->shard_count; i++) {
        vkp_i_add_tally(stats, &relay->shards[i].tally);
        stats->dropped_frames += VKP_I_LOAD(&relay->shards[i].profile->dropped);
    }
}

#endif /* VKP_I_IO */
