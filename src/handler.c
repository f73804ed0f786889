#if VKP_I_IO
/* ======================================================================================
   >>impl-handler   Callbacks of a loop for channels
   ======================================================================================
   Between two calls of fn a handler is queued (its task is in the loop's queue), unarmed (linked
   to loop->unarmed, checked at the end of each round) or joined (linked to its case; a wake-up from
   any thread queues the task).
   The task calls fn if the case is ready, and makes the handler unarmed. At the end of the round
   the loop queues the tasks of unarmed handlers with a ready case, behind all other tasks: a busy
   channel does not starve the loop. The others join their cases once no task is queued.
   The struct is freed when its task is not queued, fn does not run and the handle was given back.
   No user code runs under a lock: wake runs under the case's lock and only queues the task. */

struct vkp_handler {
    vkp_i_task task;         /* runs vkp_i_handler_run on the loop's thread */
    vkp_i_attached attached; /* ends the handler when the loop closes */
    vkp_i_wait wait;         /* its node is linked to the case (joined) or to loop->unarmed */
    vkp_loop *loop;          /* a reference */
    vkp_case what;           /* the case to wait for, copied */
    void (*fn)(void *user);
    void *user;
    bool busy;     /* the task is queued; written by the waking thread, read after leave */
    bool joined;   /* the wait is linked to the case; loop's thread only */
    bool running;  /* inside fn; loop's thread only */
    bool ended;    /* fn is not called again; loop's thread only */
    bool released; /* the handle was given back; loop's thread only */
};

/* Queue the task. Any thread under the case's lock, or the loop's thread. */
static void vkp_i_handler_wake(vkp_i_waiter *waiter)
{
    vkp_handler *handler = VKP_CONTAINER(waiter, vkp_handler, wait.node);
    handler->busy = true;
    if (!vkp_i_loop_queue(handler->loop, &handler->task)) {
        handler->busy = false; /* the loop is closed: the task never runs */
    }
}

/* Unlink from the case or from the loop's unarmed handlers. Afterwards no thread calls wake. */
static void vkp_i_handler_leave(vkp_handler *handler)
{
    if (handler->joined) {
        handler->joined = false;
        handler->what.i_kind->leave(&handler->what, &handler->wait);
    } else {
        (void)vkp_i_waiter_unlink(&handler->wait.node); /* from loop->unarmed */
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

/* Free the handler if nothing uses it any longer. */
static void vkp_i_handler_free(vkp_handler *handler)
{
    vkp_loop *loop = handler->loop;
    if (handler->released && !handler->busy && !handler->running) {
        vkp_i_free(loop->env, handler, sizeof *handler);
        vkp_loop_unref(loop);
    }
}

/* Join the case, or queue the task immediately when the case is ready. */
static void vkp_i_handler_arm(vkp_handler *handler)
{
    const vkp_i_case_kind *kind = handler->what.i_kind;
    handler->wait.status = VKP_OK;
    if (!kind->is_ready(&handler->what) && kind->join(&handler->what, &handler->wait)) {
        handler->joined = true;
    } else if (!handler->busy) { /* busy: the case woke the handler during join */
        vkp_i_handler_wake(&handler->wait.node);
    }
}

/* Called at the end of a round. While the loop has work, it checks unarmed handlers itself: joining
   a case costs this thread (other threads must see it) and the thread that then wakes it. */
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

/* The handler's task: call fn if the case is still ready, then make the handler unarmed. */
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
