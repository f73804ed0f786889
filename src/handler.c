#if VKP_I_IO
/* ======================================================================================
   >>impl-handler   Callbacks of a loop for channels
   ====================================================================================== */

/* A handler's task calls back when its case is ready, and links the handler to the loop's unarmed
   ones. At the end of the round, handlers whose cases are ready queue their tasks again, behind the
   others: a busy channel does not starve the loop. The rest join their cases once nothing else is
   left to do; a wake-up queues the task. The struct is freed when its task is not queued and its
   last reference is given back.                                                               */

struct vkp_handler {
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

static void vkp_i_handler_wake(vkp_i_waiter *waiter)
{
    vkp_handler *handler = VKP_CONTAINER(waiter, vkp_handler, wait.node);
    handler->busy = true;
    if (!vkp_i_loop_queue(handler->loop, &handler->task)) {
        handler->busy = false; /* the loop is closed: nobody runs the task */
    }
}

static void vkp_i_handler_leave(vkp_handler *handler)
{
    if (handler->joined) {
        handler->joined = false;
        handler->what.i_kind->leave(&handler->what, &handler->wait);
    } else {
        (void)vkp_i_waiter_unlink(&handler->wait.node); /* unarmed */
    }
}

static void vkp_i_handler_end(vkp_handler *handler)
{
    if (!handler->ended) {
        handler->ended = true;
        vkp_i_loop_detach(&handler->attached);
        vkp_i_handler_leave(handler);
    }
}

static void vkp_i_handler_free(vkp_handler *handler)
{
    vkp_loop *loop = handler->loop;
    if (handler->released && !handler->busy && !handler->running) {
        vkp_i_free(loop->env, handler, sizeof *handler);
        vkp_loop_unref(loop);
    }
}

/* Wait for the case, or queue the task at once when it is ready. */
static void vkp_i_handler_arm(vkp_handler *handler)
{
    const vkp_i_case_kind *kind = handler->what.i_kind;
    handler->wait.status = VKP_OK;
    if (!kind->is_ready(&handler->what) && kind->join(&handler->what, &handler->wait)) {
        handler->joined = true;
    } else if (!handler->busy) { /* or it was woken while it joined */
        vkp_i_handler_wake(&handler->wait.node);
    }
}

/* At the end of a round. As long as the loop has work, watches look by themselves: to wait, they
   would have to make themselves known to other threads, which costs both sides.               */
static void vkp_i_loop_arm(vkp_loop *loop)
{
    vkp_i_waiter *node = loop->unarmed.head.next;
    while (node != &loop->unarmed.head) {
        vkp_handler *handler = VKP_CONTAINER(node, vkp_handler, wait.node);
        node = node->next;
        if (handler->what.i_kind->is_ready(&handler->what)) {
            (void)vkp_i_waiter_unlink(&handler->wait.node);
            vkp_i_handler_wake(&handler->wait.node);
        }
    }
    while (VKP_I_LOAD(&loop->queue) == NULL && !vkp_i_waiters_empty(&loop->unarmed)) {
        vkp_handler *handler = VKP_CONTAINER(loop->unarmed.head.next, vkp_handler, wait.node);
        (void)vkp_i_waiter_unlink(&handler->wait.node);
        vkp_i_handler_arm(handler);
    }
}

static void vkp_i_handler_run(vkp_i_task *task)
{
    vkp_handler *handler = VKP_CONTAINER(task, vkp_handler, task);
    vkp_i_handler_leave(handler);
    handler->busy = false;
    if (!handler->ended && handler->what.i_kind->is_ready(&handler->what)) {
        handler->running = true;
        handler->fn(handler->user);
        handler->running = false;
    }
    if (!handler->ended) {
        vkp_i_waiter_link(&handler->loop->unarmed, &handler->wait.node);
    }
    vkp_i_handler_free(handler);
}

static void vkp_i_handler_loop_closed(vkp_i_attached *attached)
{
    vkp_i_handler_end(VKP_CONTAINER(attached, vkp_handler, attached));
}

VKP_API vkp_status vkp_handler_open(vkp_loop *loop, const vkp_case *what, void (*fn)(void *user),
                                    void *user, vkp_handler **out)
{
    vkp_handler *self;
    VKP_I_REQUIRE(loop != NULL && what != NULL && fn != NULL && out != NULL);
    VKP_I_REQUIRE(!loop->closed && vkp_i_on_loop(loop));
    VKP_I_REQUIRE(what->i_kind != &vkp_i_case_kind_deadline && what->i_kind != &vkp_i_case_kind_fd);
    self = (vkp_handler *)vkp_i_alloc_zero(loop->env, sizeof *self);
    if (self == NULL) {
        return VKP_ERR_NOMEM;
    }
    self->task.fn = vkp_i_handler_run;
    self->attached.on_loop_close = vkp_i_handler_loop_closed;
    self->wait.node.wake = vkp_i_handler_wake;
    self->loop = vkp_loop_ref(loop);
    self->what = *what;
    self->fn = fn;
    self->user = user;
    *out = self;
    vkp_i_loop_attach(loop, &self->attached);
    vkp_i_handler_arm(self);
    return VKP_OK;
}

VKP_API void vkp_handler_close(vkp_handler *handler)
{
    if (handler != NULL) {
        vkp_i_handler_end(handler);
    }
}

VKP_API void vkp_handler_unref(vkp_handler *handler)
{
    if (handler != NULL) {
        vkp_i_handler_end(handler);
        handler->released = true;
        vkp_i_handler_free(handler);
    }
}

#endif /* VKP_I_IO */
