#if VKP_I_IO
/* ======================================================================================
   >>impl-loop-run   The rounds of a loop, and its opening
   ======================================================================================
   The order of a round: wait, clear `asleep`, descriptors, queued tasks, timers, deferred tasks,
   handlers, set `asleep`. Between the two stores of `asleep` a push costs no wake: the round itself
   runs the queue, or the next round sees the task before it waits.
   `running` lets one thread at a time into the rounds; `in_round` refuses a round inside a
   callback. `thread` is stored when a thread enters, and 0 after vkp_loop_run or vkp_loop_close.
   A guest backend never blocks: the foreign loop calls vkp_i_backend_round, and each round ends by
   giving the guest the next deadline. */

#define VKP_I_UNPOLLED 8u /* most rounds in a row in which vkp_loop_run skips the backend's wait */

#define VKP_I_EVENTS_PER_WAIT 256u            /* default of events_per_wait */
#define VKP_I_READ_BYTES 65536u               /* default of read_bytes */
#define VKP_I_LEAST_READ_BYTES ((size_t)1024) /* lowest read_bytes */

/* One round. While tasks are queued, up to `unpolled` rounds in a row skip the backend's wait, and
   descriptors are not checked in them. */
static vkp_status vkp_i_loop_round(vkp_loop *loop, uint64_t deadline_ns, uint32_t unpolled)
{
    size_t count = 0;
    size_t i;
    vkp_status status;
    deadline_ns = VKP_I_MIN(deadline_ns, vkp_loop_get_deadline_ns(loop));
    if (VKP_I_LOAD_ACQ(&loop->stopping) != 0) {
        deadline_ns = 0;
    }
    if (VKP_I_LOAD(&loop->queue) != NULL && loop->unpolled < unpolled) {
        loop->unpolled++;
        status = VKP_OK;
    } else {
        loop->unpolled = 0;
        status = loop->backend->wait(loop->backend_state, deadline_ns, loop->events,
                                     loop->event_capacity, &count);
    }
    VKP_I_STORE_SEQ(&loop->asleep, 0u);
    loop->now_ns = vkp_i_loop_clock(loop);
    if (loop->reminder_ns <= loop->now_ns) {
        loop->reminded = false; /* the guest's timer fired, or fires in vain: set it again */
    }
    if (status != VKP_OK) {
        count = 0;
    }
    loop->in_round = true;
    for (i = 0; i < count; i++) {
        vkp_i_loop_dispatch(loop, &loop->events[i]);
    }
    vkp_i_loop_run_queued(loop);
    vkp_i_loop_run_timers(loop);
    vkp_i_loop_run_deferred(loop);
    vkp_i_loop_arm(loop);
    loop->in_round = false;
    /* From here on a push calls wake. The next round loads the queue again before it waits. */
    VKP_I_STORE_SEQ(&loop->asleep, 1u);
    if (vkp_i_loop_set_guest_timer(loop) != VKP_OK && status == VKP_OK) {
        status = VKP_ERR_SYS;
    }
    return status;
}

/* Become the loop's thread. False: another thread runs the loop, this is inside a callback, or the
   loop is closed. */
static bool vkp_i_loop_enter(vkp_loop *loop)
{
    uint32_t idle = 0;
    if (!VKP_I_CAS(&loop->running, &idle, 1u)) {
        return false;
    }
    if (loop->closed || loop->in_round) {
        VKP_I_STORE_REL(&loop->running, 0u);
        return false;
    }
    VKP_I_STORE_REL(&loop->thread, vkp_i_this_thread());
    return true;
}

VKP_API vkp_status vkp_loop_run_once(vkp_loop *loop, uint64_t deadline_ns)
{
    vkp_status status;
    VKP_I_REQUIRE(loop != NULL && vkp_i_loop_enter(loop));
    status = vkp_i_loop_round(loop, deadline_ns, 0);
    VKP_I_STORE_REL(&loop->running, 0u);
    return status;
}

VKP_API vkp_status vkp_loop_run(vkp_loop *loop)
{
    vkp_status status = VKP_OK;
    VKP_I_REQUIRE(loop != NULL && (loop->backend->flags & VKP_BACKEND_GUEST) == 0);
    VKP_I_REQUIRE(vkp_i_loop_enter(loop));
    do {
        status = vkp_i_loop_round(loop, VKP_FOREVER, VKP_I_UNPOLLED);
    } while (status == VKP_OK && VKP_I_LOAD_ACQ(&loop->stopping) == 0);
    VKP_I_STORE(&loop->stopping, 0u);
    VKP_I_STORE_REL(&loop->thread, (uintptr_t)0);
    VKP_I_STORE_REL(&loop->running, 0u);
    return status;
}

VKP_API void vkp_loop_stop(vkp_loop *loop)
{
    VKP_I_STORE_REL(&loop->stopping, 1u);
    loop->backend->wake(loop->backend_state);
}

/* One call of vkp_loop_post. */
typedef struct vkp_i_post {
    vkp_i_task task;
    const vkp_env *env; /* allocated the post, and frees it */
    void (*fn)(void *user);
    void *user;
} vkp_i_post;

/* Free the post, then call the program's function. */
static void vkp_i_run_post(vkp_i_task *task)
{
    vkp_i_post *post = VKP_CONTAINER(task, vkp_i_post, task);
    void (*fn)(void *user) = post->fn;
    void *user = post->user;
    vkp_i_free(post->env, post, sizeof *post);
    fn(user);
}

VKP_API vkp_status vkp_loop_post(vkp_loop *loop, void (*fn)(void *user), void *user)
{
    vkp_i_post *post;
    VKP_I_REQUIRE(loop != NULL && fn != NULL);
    post = (vkp_i_post *)vkp_i_alloc(loop->env, sizeof *post);
    if (post == NULL) {
        return VKP_ERR_NOMEM;
    }
    post->task.fn = vkp_i_run_post;
    post->env = loop->env;
    post->fn = fn;
    post->user = user;
    if (!vkp_i_loop_queue(loop, &post->task)) {
        vkp_i_free(loop->env, post, sizeof *post);
        return VKP_ERR_CLOSED;
    }
    return VKP_OK;
}

/* ---- opening ---- */

/* A guest's timer fired: run a round without waiting. A program may run its foreign loop inside one
   of our callbacks, or after it closed our loop: then no round runs. Inside a callback the guest's
   timer is used up, so the round under way sets it again at its end. */
static void vkp_i_backend_round(void *user)
{
    vkp_loop *loop = (vkp_loop *)user;
    if (loop->in_round) {
        loop->reminded = false;
    } else if (!loop->closed) {
        (void)!vkp_loop_run_once(loop, 0); /* a guest has no caller for the status */
    }
}

/* Apply defaults, allocate the events and open the backend. On failure the caller frees events. */
static vkp_status vkp_i_loop_setup(vkp_loop *loop, const vkp_loop_config *config)
{
    vkp_status status;
    loop->event_capacity =
        config->events_per_wait != 0 ? config->events_per_wait : VKP_I_EVENTS_PER_WAIT;
    loop->read_bytes = config->read_bytes != 0 ? config->read_bytes : VKP_I_READ_BYTES;
    loop->read_bytes = VKP_I_MAX(loop->read_bytes, VKP_I_LEAST_READ_BYTES);
    loop->events = (vkp_event *)vkp_i_alloc(loop->env, loop->event_capacity * sizeof(vkp_event));
    if (loop->events == NULL) {
        return VKP_ERR_NOMEM;
    }
    loop->host_env = *loop->env;
    loop->host_env.sys = loop->sys;
    if (loop->host_env.alloc == NULL) {
        loop->host_env.alloc = vkp_i_libc_alloc;
    }
    loop->host.env = &loop->host_env;
    loop->host.foreign = config->foreign;
    loop->host.loop = loop;
    loop->host.round = vkp_i_backend_round;
    status = loop->backend->open(&loop->host, &loop->backend_state);
    /* The deadline 0 makes a guest run a round first: tasks may be posted before the foreign loop
       runs. */
    if (status == VKP_OK && loop->backend->timer != NULL) {
        status = loop->backend->timer(loop->backend_state, 0);
        loop->reminded = true;
        if (status != VKP_OK) {
            loop->backend->close(loop->backend_state);
        }
    }
    return status;
}

VKP_API vkp_status vkp_loop_open(const vkp_loop_config *config, vkp_loop **out)
{
    vkp_loop *loop;
    vkp_status status;
    const vkp_env *env;
    VKP_I_REQUIRE(config != NULL && out != NULL);
    env = vkp_i_env(config->env);
    if (config->backend == NULL || config->backend->abi != VKP_BACKEND_ABI) {
        vkp_i_log(env, VKP_LOG_ERROR,
                  "vkp_loop_open: config.backend is missing or of another version: pass "
                  "&vkp_backend_poll or &vkp_backend_epoll and link its file from backends/");
        return VKP_ERR_INVALID;
    }
    loop = (vkp_loop *)vkp_i_alloc_zero(env, sizeof *loop);
    if (loop == NULL) {
        return VKP_ERR_NOMEM;
    }
    loop->env = env;
    loop->sys = vkp_i_sys(env);
    loop->backend = config->backend;
    loop->refs = 1;
    loop->opener_pid = loop->sys->process_id();
    loop->thread = vkp_i_this_thread();
    loop->asleep = 1;
    loop->deferred_end = &loop->deferred;
    vkp_i_waiters_init(&loop->unarmed);
    loop->attached.prev = &loop->attached;
    loop->attached.next = &loop->attached;
    status = vkp_i_loop_setup(loop, config);
    if (status != VKP_OK) {
        vkp_i_free(env, loop->events, loop->event_capacity * sizeof(vkp_event));
        vkp_i_free(env, loop, sizeof *loop);
        return status;
    }
    loop->now_ns = vkp_i_loop_clock(loop);
    *out = loop;
    return VKP_OK;
}

#endif /* VKP_I_IO */
