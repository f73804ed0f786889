#if VKP_I_IO
/* ======================================================================================
   >>impl-loop-run   The rounds of a loop
   ====================================================================================== */

/* Rounds that posts and channels may go on before descriptors are asked. */
#define VKP_I_UNPOLLED 8u

/* `unpolled` rounds may have gone by on what was queued alone; descriptors wait for that long. */
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
        loop->reminded = false; /* a guest's timer has gone off, or is about to for nothing */
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
    /* From here on pushers pay for a wake-up; the next round looks at the queue once more. */
    VKP_I_STORE_SEQ(&loop->asleep, 1u);
    if (vkp_i_loop_remind(loop) != VKP_OK && status == VKP_OK) {
        status = VKP_ERR_SYS;
    }
    return status;
}

/* Become the loop's thread. False while another runs it, inside a callback, or when closed. */
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

typedef struct vkp_i_post {
    vkp_i_task task;
    const vkp_env *env;
    void (*fn)(void *user);
    void *user;
} vkp_i_post;

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

#endif /* VKP_I_IO */
