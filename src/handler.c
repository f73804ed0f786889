#if VKP_I_IO
/* ======================================================================================
   >>impl-handler   Callbacks of a loop for channels
   ====================================================================================== */

/* ---- a case under watch ----
   Its task calls back when the case is ready, and puts the watch among the unarmed ones. At the end
   of the round those that are ready queue their tasks again, behind the others: a busy channel
   does not starve the loop; the rest join their cases once nothing else is left to do. A wake-up
   queues the task. The struct is freed when the task is not queued and the handle is back.    */

struct vkp_case_watch {
    vkp_i_task task;
    vkp_i_attached attached;
    vkp_i_wait wait;
    vkp_loop *loop;
    vkp_case what;
    void (*fn)(void *user);
    void *user;
    bool busy;     /* the task is queued; set by whoever wakes, read after leave */
    bool joined;   /* the rest is the loop's thread's */
    bool running;  /* inside fn */
    bool ended;    /* fn is not called again */
    bool released; /* the handle was given back */
};

static void vkp_i_case_watch_wake(vkp_i_waiter *waiter)
{
    vkp_case_watch *watch = VKP_I_CONTAINER(waiter, vkp_case_watch, wait.node);
    watch->busy = true;
    if (!vkp_i_loop_queue(watch->loop, &watch->task)) {
        watch->busy = false; /* the loop is closed: nobody runs the task */
    }
}

static void vkp_i_case_watch_leave(vkp_case_watch *watch)
{
    if (watch->joined) {
        watch->joined = false;
        watch->what.i_kind->leave(&watch->what, &watch->wait);
    } else {
        (void)vkp_i_waiter_unlink(&watch->wait.node); /* unarmed */
    }
}

static void vkp_i_case_watch_end(vkp_case_watch *watch)
{
    if (!watch->ended) {
        watch->ended = true;
        vkp_i_loop_detach(&watch->attached);
        vkp_i_case_watch_leave(watch);
    }
}

static void vkp_i_case_watch_free(vkp_case_watch *watch)
{
    vkp_loop *loop = watch->loop;
    if (watch->released && !watch->busy && !watch->running) {
        vkp_i_free(loop->env, watch, sizeof *watch);
        vkp_loop_unref(loop);
    }
}

/* Wait for the case, or queue the task at once when it is ready. */
static void vkp_i_case_watch_arm(vkp_case_watch *watch)
{
    const vkp_i_case_kind *kind = watch->what.i_kind;
    watch->wait.status = VKP_OK;
    if (!kind->is_ready(&watch->what) && kind->join(&watch->what, &watch->wait)) {
        watch->joined = true;
    } else if (!watch->busy) { /* or it was woken while it joined */
        vkp_i_case_watch_wake(&watch->wait.node);
    }
}

/* At the end of a round. As long as the loop has work, watches look by themselves: to wait, they
   would have to make themselves known to other threads, which costs both sides.               */
static void vkp_i_loop_arm(vkp_loop *loop)
{
    vkp_i_waiter *node = loop->unarmed.head.next;
    while (node != &loop->unarmed.head) {
        vkp_case_watch *watch = VKP_I_CONTAINER(node, vkp_case_watch, wait.node);
        node = node->next;
        if (watch->what.i_kind->is_ready(&watch->what)) {
            (void)vkp_i_waiter_unlink(&watch->wait.node);
            vkp_i_case_watch_wake(&watch->wait.node);
        }
    }
    while (VKP_I_LOAD(&loop->queue) == NULL && !vkp_i_waiters_empty(&loop->unarmed)) {
        vkp_case_watch *watch = VKP_I_CONTAINER(loop->unarmed.head.next, vkp_case_watch, wait.node);
        (void)vkp_i_waiter_unlink(&watch->wait.node);
        vkp_i_case_watch_arm(watch);
    }
}

static void vkp_i_case_watch_run(vkp_i_task *task)
{
    vkp_case_watch *watch = VKP_I_CONTAINER(task, vkp_case_watch, task);
    vkp_i_case_watch_leave(watch);
    watch->busy = false;
    if (!watch->ended && watch->what.i_kind->is_ready(&watch->what)) {
        watch->running = true;
        watch->fn(watch->user);
        watch->running = false;
    }
    if (!watch->ended) {
        vkp_i_waiter_link(&watch->loop->unarmed, &watch->wait.node);
    }
    vkp_i_case_watch_free(watch);
}

static void vkp_i_case_watch_loop_closed(vkp_i_attached *attached)
{
    vkp_i_case_watch_end(VKP_I_CONTAINER(attached, vkp_case_watch, attached));
}

VKP_API vkp_status vkp_case_watch_open(vkp_loop *loop, const vkp_case *what, void (*fn)(void *user),
                                       void *user, vkp_case_watch **watch)
{
    vkp_case_watch *self;
    VKP_I_REQUIRE(loop != NULL && what != NULL && fn != NULL && watch != NULL);
    VKP_I_REQUIRE(!loop->closed && vkp_i_on_loop(loop));
    VKP_I_REQUIRE(what->i_kind != &vkp_i_case_kind_deadline && what->i_kind != &vkp_i_case_kind_fd);
    self = (vkp_case_watch *)vkp_i_alloc_zero(loop->env, sizeof *self);
    if (self == NULL) {
        return VKP_ERR_NOMEM;
    }
    self->task.fn = vkp_i_case_watch_run;
    self->attached.on_loop_close = vkp_i_case_watch_loop_closed;
    self->wait.node.wake = vkp_i_case_watch_wake;
    self->loop = vkp_loop_ref(loop);
    self->what = *what;
    self->fn = fn;
    self->user = user;
    *watch = self;
    vkp_i_loop_attach(loop, &self->attached);
    vkp_i_case_watch_arm(self);
    return VKP_OK;
}

VKP_API void vkp_case_watch_close(vkp_case_watch *watch)
{
    if (watch != NULL) {
        vkp_i_case_watch_end(watch);
        watch->released = true;
        vkp_i_case_watch_free(watch);
    }
}

VKP_API void vkp_mpsc_unwatch(vkp_mpsc_rx *rx)
{
    vkp_case_watch *watch = rx->channel->watch;
    rx->channel->watch = NULL;
    vkp_case_watch_close(watch);
}

VKP_API vkp_status vkp_mpsc_watch(vkp_mpsc_rx *rx, vkp_loop *loop, void (*fn)(void *user),
                                  void *user)
{
    vkp_case receive;
    VKP_I_REQUIRE(rx != NULL);
    if (rx->channel->watch != NULL && rx->channel->watch->ended) {
        vkp_mpsc_unwatch(rx); /* its loop was closed */
    }
    VKP_I_REQUIRE(rx->channel->watch == NULL);
    receive = vkp_case_mpsc_recv(rx, NULL);
    return vkp_case_watch_open(loop, &receive, fn, user, &rx->channel->watch);
}

#endif /* VKP_I_IO */
