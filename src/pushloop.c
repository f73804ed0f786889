#if VKP_I_IO
/* ======================================================================================
   >>impl-pushloop   From a channel of pushes to where they are wanted
   ====================================================================================== */

struct vkp_push_loop {
    vkp_loop *loop;
    vkp_mpsc_rx *rx;
    vkp_handler *handler;
    vkp_sink sink;
    void (*on_end)(void *user);
    void *user;
    bool ended;
    bool running; /* inside its callback */
    bool unreferenced;
};

#define VKP_I_PUSH_BATCH 64

static void vkp_i_sink_write(const vkp_sink *sink, const vkp_push *push, vkp_cancel *cancel)
{
    if (sink->hub != NULL) {
        (void)vkp_hub_deliver(sink->hub, push);
    } else if (sink->conn != NULL) {
        if (push->frame.len > 0) {
            /* its policy counts */
            (void)!vkp_i_conn_push(sink->conn, &push->frame, cancel, VKP_FOREVER);
        }
    } else {
        sink->callback(sink->user, push);
    }
}

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
