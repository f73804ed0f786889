#if VKP_I_IO
/* ======================================================================================
   >>impl-pushloop   From a channel of pushes to where they are wanted
   ======================================================================================
   Receive pushes from a channel and write each one to a sink: a hub, a connection or a callback.
   vkp_push_loop_run blocks the receiver's thread. vkp_push_loop_open receives on a loop's
   thread, by a handler that takes at most VKP_I_PUSH_BATCH pushes per call and is called again
   for more; the hub or callback runs there too.
   on_end runs once, when the channel is closed and empty. The callback and on_end may unref the
   push loop: `running` defers the free. No lock is held.                                      */

struct vkp_push_loop {
    vkp_loop *loop;             /* shared */
    vkp_mpsc_rx *rx;            /* taken from the caller of open */
    vkp_handler *handler;       /* calls vkp_i_push_loop_ready while rx is ready */
    vkp_sink sink;              /* shares its conn; borrows its hub */
    void (*on_end)(void *user); /* called once when the channel is closed and empty; or NULL */
    void *user;                 /* argument of on_end */
    bool ended;                 /* the channel was found closed and empty */
    bool running;               /* vkp_i_push_loop_ready is running: unref must not free */
    bool unreferenced; /* the handle was given back: the end of vkp_i_push_loop_ready frees */
};

#define VKP_I_PUSH_BATCH 64 /* most pushes per receive, and per call of the handler */

/* Write one push to the sink. The token (may be NULL) ends a wait for room in a connection's
   inbox.                                                                                      */
static void vkp_i_sink_write(const vkp_sink *sink, const vkp_push *push, vkp_cancel *cancel)
{
    if (sink->hub != NULL) {
        (void)vkp_hub_deliver(sink->hub, push);
    } else if (sink->conn != NULL) {
        if (push->frame.len > 0) {
            /* the connection's policy counts what it drops */
            (void)!vkp_i_conn_push(sink->conn, &push->frame, cancel, VKP_FOREVER);
        }
    } else {
        sink->callback(sink->user, push);
    }
}

/* Whether exactly one of hub, conn and callback is set. */
static bool vkp_i_sink_is_one(const vkp_sink *sink)
{
    return sink != NULL &&
           (sink->hub != NULL) + (sink->conn != NULL) + (sink->callback != NULL) == 1;
}

VKP_API vkp_status vkp_push_loop_run(vkp_mpsc_rx *rx, const vkp_sink *sink, vkp_cancel *cancel)
{
    vkp_push batch[VKP_I_PUSH_BATCH];
    vkp_status status;
    size_t count;
    size_t i;
    VKP_I_REQUIRE(rx != NULL && vkp_i_sink_is_one(sink) && sink->hub == NULL);
    VKP_I_REQUIRE(rx->channel->config.elem_bytes == sizeof(vkp_push));
    for (;;) {
        if (cancel != NULL && vkp_cancel_is_triggered(cancel)) {
            return VKP_ERR_CANCELLED;
        }
        status = vkp_i_mpsc_recv(rx, batch, VKP_I_PUSH_BATCH, &count, cancel, VKP_FOREVER);
        if (status != VKP_OK) {
            return status == VKP_ERR_CLOSED ? VKP_OK : status;
        }
        for (i = 0; i < count; i++) {
            vkp_i_sink_write(sink, &batch[i], cancel);
            vkp_push_unref(&batch[i]);
        }
    }
}

static void vkp_i_push_loop_free(vkp_push_loop *self)
{
    vkp_loop *loop = self->loop;
    vkp_handler_unref(self->handler);
    vkp_mpsc_rx_unref(self->rx);
    vkp_conn_unref(self->sink.conn);
    vkp_i_free(loop->env, self, sizeof *self);
    vkp_loop_unref(loop);
}

/* Handler: the channel holds pushes, or is closed. */
static void vkp_i_push_loop_ready(void *user)
{
    vkp_push_loop *self = (vkp_push_loop *)user;
    vkp_push push;
    vkp_status status = VKP_OK;
    int i;
    self->running = true;
    for (i = 0; i < VKP_I_PUSH_BATCH && !self->unreferenced; i++) {
        status = vkp_mpsc_try_recv(self->rx, &push);
        if (status != VKP_OK) {
            break;
        }
        vkp_i_sink_write(&self->sink, &push, NULL);
        vkp_push_unref(&push);
    }
    if (status == VKP_ERR_CLOSED && !self->ended) {
        self->ended = true;
        vkp_handler_close(self->handler);
        if (self->on_end != NULL) {
            self->on_end(self->user);
        }
    }
    self->running = false;
    if (self->unreferenced) {
        vkp_i_push_loop_free(self);
    }
}

VKP_API vkp_status vkp_push_loop_open(vkp_loop *loop, vkp_mpsc_rx *rx, const vkp_sink *sink,
                                      void (*on_end)(void *user), void *user, vkp_push_loop **out)
{
    vkp_case receive = vkp_case_mpsc_recv(rx, NULL);
    vkp_push_loop *self;
    vkp_status status;
    VKP_I_REQUIRE(loop != NULL && rx != NULL && vkp_i_sink_is_one(sink) && out != NULL);
    VKP_I_REQUIRE(rx->channel->config.elem_bytes == sizeof(vkp_push));
    self = (vkp_push_loop *)vkp_i_alloc_zero(loop->env, sizeof *self);
    if (self == NULL) {
        return VKP_ERR_NOMEM;
    }
    status = vkp_handler_open(loop, &receive, vkp_i_push_loop_ready, self, &self->handler);
    if (status != VKP_OK) {
        vkp_i_free(loop->env, self, sizeof *self);
        return status;
    }
    self->loop = vkp_loop_ref(loop);
    self->rx = rx;
    self->sink = *sink;
    if (sink->conn != NULL) {
        (void)vkp_conn_ref(sink->conn);
    }
    self->on_end = on_end;
    self->user = user;
    *out = self;
    return VKP_OK;
}

VKP_API void vkp_push_loop_unref(vkp_push_loop *self)
{
    if (self == NULL) {
        return;
    }
    vkp_handler_close(self->handler);
    self->unreferenced = true;
    if (!self->running) {
        vkp_i_push_loop_free(self);
    }
}

#endif /* VKP_I_IO */
