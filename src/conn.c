#if VKP_I_IO
/* ======================================================================================
   >>impl-conn   Connections
   ======================================================================================
   The life of a connection: connect or adopt, read, push, write, close. Everything runs on the
   loop's thread, except that other threads push into the inbox and queue `remote` to close.
   vkp_i_conn_finish is the only function that ends a connection; it takes effect once. Code that
   may run inside a push calls vkp_i_conn_close_later instead, and the deferred task ends the
   connection.
   The inbox's handler moves frames to the outbox; the round ends with vkp_i_conn_task, which
   writes. When the kernel's buffer is full, VKP_IO_WRITE calls vkp_i_conn_writable.
   No lock is held here. Every callback may close the connection: code behind a callback checks
   vkp_i_conn_closed.                                                                          */

/* ---- life ---- */

VKP_API vkp_conn *vkp_conn_ref(vkp_conn *conn)
{
    (void)VKP_I_ADD(&conn->refs, 1);
    return conn;
}

VKP_API void vkp_conn_unref(vkp_conn *conn)
{
    vkp_loop *loop;
    if (conn == NULL || VKP_I_UNREF(&conn->refs) != 1) {
        return;
    }
    loop = conn->loop;
    if (conn->inbox != NULL) {
        vkp_i_inbox_hold(conn->inbox); /* only after a failed open; otherwise the close did this */
        vkp_mpsc_tx_unref(conn->inbox->tx);
        vkp_mpsc_rx_unref(conn->inbox->rx);
        vkp_i_free(loop->env, conn->inbox, sizeof *conn->inbox);
    }
    vkp_i_profile_unref(conn->profile);
    vkp_i_free(loop->env, conn, sizeof *conn);
    vkp_loop_unref(loop);
}

/* Defer the connection's task to the end of the round, once. The task holds a reference. */
static void vkp_i_conn_defer(vkp_conn *conn)
{
    if ((conn->flags & VKP_I_CONN_QUEUED) == 0) {
        conn->flags |= VKP_I_CONN_QUEUED;
        (void)vkp_conn_ref(conn);
        vkp_i_loop_defer(conn->loop, &conn->task);
    }
}

/* Whether vkp_i_conn_finish ran. Any thread. */
static bool vkp_i_conn_closed(const vkp_conn *conn)
{
    return VKP_I_LOAD_ACQ(&conn->state) == VKP_I_CONN_CLOSED;
}

/* Stop to connect, if it connects. */
static void vkp_i_connecting_free(vkp_conn *conn)
{
    if (conn->connecting != NULL) {
        vkp_timer_stop(&conn->connecting->timer);
        vkp_i_free(conn->loop->env, conn->connecting, sizeof *conn->connecting);
        conn->connecting = NULL;
    }
}

/* The only way a connection ends: release everything, call on_close. A second call does nothing.
   Loop's thread.                                                                              */
static void vkp_i_conn_finish(vkp_conn *conn, vkp_close_reason reason, int error)
{
    vkp_i_profile *profile = conn->profile;
    const vkp_conn_ops *ops = profile->config.ops;
    if (VKP_I_XCHG(&conn->state, VKP_I_CONN_CLOSED) == VKP_I_CONN_CLOSED) {
        return;
    }
    vkp_io_stop(&conn->io);
    if (conn->fd >= 0) {
        (void)conn->loop->sys->close(conn->fd);
        conn->fd = -1;
    }
    vkp_i_spans_clear(conn);
    vkp_i_block_unref(conn->input);
    conn->input = NULL;
    vkp_i_connecting_free(conn);
    if (conn->inbox != NULL) {
        vkp_i_inbox_hold(conn->inbox);
        vkp_mpsc_close(conn->inbox->rx);
    }
    vkp_seat_unref(conn->seat);
    conn->seat = NULL;
    if (ops->on_close != NULL) {
        ops->on_close(conn, conn->user, reason, error);
    }
    if (profile->live > 0 && --profile->live == 0 && profile->when_empty != NULL) {
        vkp_i_loop_defer(conn->loop, profile->when_empty);
        profile->when_empty = NULL;
    }
    vkp_conn_unref(conn); /* the reference that the loop held */
}

/* The deferred task closes the connection with this reason; the first reason is kept. Allowed
   inside a push. Loop's thread.                                                               */
static void vkp_i_conn_close_later(vkp_conn *conn, vkp_close_reason reason, int error)
{
    if ((conn->flags & VKP_I_CONN_CLOSES) == 0) {
        conn->flags |= VKP_I_CONN_CLOSES;
        conn->closes_reason = reason;
        conn->closes_error = error;
        vkp_i_conn_defer(conn);
    }
}

#define VKP_I_CONN_AHEAD_BYTES ((size_t)1 << 20) /* most bytes that a paused connection reads */

/* Whether a paused connection reads on. */
static bool vkp_i_conn_reads_ahead(const vkp_conn *conn)
{
    return (conn->flags & VKP_I_CONN_AHEAD) != 0 &&
           (conn->input == NULL || conn->input->len - conn->input_begin < VKP_I_CONN_AHEAD_BYTES);
}

/* Register the descriptor for the readiness that the flags need. */
static void vkp_i_conn_update_interest(vkp_conn *conn)
{
    uint32_t interest = 0;
    if (vkp_i_conn_closed(conn)) {
        return;
    }
    if ((conn->flags & (VKP_I_CONN_CONNECTING | VKP_I_CONN_BLOCKED)) != 0) {
        interest |= VKP_IO_WRITE;
    }
    if ((conn->flags & (VKP_I_CONN_CONNECTING | VKP_I_CONN_ENDED | VKP_I_CONN_DRAINING)) == 0 &&
        ((conn->flags & VKP_I_CONN_PAUSED) == 0 || vkp_i_conn_reads_ahead(conn))) {
        interest |= VKP_IO_READ;
    }
    if (vkp_io_set(&conn->io, interest) != VKP_OK) {
        vkp_i_conn_close_later(conn, VKP_CLOSE_ERROR, errno);
    }
}

/* ---- writing ---- */

/* Remove `put` written bytes from the queue's head. */
static void vkp_i_conn_written(vkp_conn *conn, size_t put)
{
    conn->queued_bytes -= put;
    while (put > 0) {
        vkp_i_span *head = &conn->first;
        size_t part = VKP_I_MIN(put, (size_t)head->len);
        if (head->frames > 0) {
            conn->pushed_bytes -= part;
        }
        put -= part;
        if (part == head->len) {
            conn->queued_frames -= head->frames;
            conn->head_sent = 0;
            vkp_i_spans_remove(conn, 0);
        } else {
            head->data += part;
            head->len -= (uint32_t)part;
            conn->head_sent += (uint32_t)part;
        }
    }
}

#define VKP_I_RANGES 64 /* most spans of one gathered write */

/* Write until the outbox is empty or the kernel's buffer is full. An error closes later, never
   here.                                                                                       */
static void vkp_i_conn_flush(vkp_conn *conn)
{
    while (conn->spans > 0 &&
           (conn->flags & (VKP_I_CONN_BLOCKED | VKP_I_CONN_CONNECTING | VKP_I_CONN_CLOSES)) == 0) {
        vkp_range ranges[VKP_I_RANGES];
        size_t count = VKP_I_MIN((size_t)conn->spans, (size_t)VKP_I_RANGES);
        size_t offered = 0;
        size_t i;
        int64_t put;
        for (i = 0; i < count; i++) {
            const vkp_i_span *span = vkp_i_span_at(conn, (uint32_t)i);
            ranges[i].base = span->data;
            ranges[i].len = span->len;
            offered += span->len;
        }
        put = conn->loop->sys->send(conn->fd, ranges, count);
        if (put == -EINTR) {
            continue;
        }
        if (put < 0 && put != -EAGAIN && put != -EWOULDBLOCK && put != -ENOBUFS) {
            vkp_i_conn_close_later(conn, VKP_CLOSE_ERROR, (int)-put);
            return;
        }
        if (put > 0) {
            vkp_i_conn_written(conn, (size_t)put);
        }
        if (put < 0 || (size_t)put < offered) {
            conn->flags |= VKP_I_CONN_BLOCKED;
            vkp_i_conn_update_interest(conn);
        }
    }
}

static void vkp_i_conn_pull_inbox(vkp_conn *conn);

/* Whether a draining connection has written everything. VKP_I_CONN_INBOX_HELD stays set until
   its inbox is empty.                                                                         */
static bool vkp_i_conn_is_drained(const vkp_conn *conn)
{
    return conn->spans == 0 &&
           (conn->flags & (VKP_I_CONN_DRAINING | VKP_I_CONN_INBOX_HELD)) == VKP_I_CONN_DRAINING;
}

/* The kernel's buffer has room again: write, call on_drain when the outbox is empty, pull a held
   inbox.                                                                                      */
static void vkp_i_conn_writable(vkp_conn *conn)
{
    conn->flags &= ~VKP_I_CONN_BLOCKED;
    vkp_i_conn_flush(conn);
    if ((conn->flags & VKP_I_CONN_BLOCKED) == 0) {
        vkp_i_conn_update_interest(conn);
        if (conn->spans == 0 && conn->profile->config.ops->on_drain != NULL) {
            conn->profile->config.ops->on_drain(conn, conn->user);
        }
    }
    if (!vkp_i_conn_closed(conn) && (conn->flags & VKP_I_CONN_INBOX_HELD) != 0) {
        vkp_i_conn_pull_inbox(conn);
    }
    if (!vkp_i_conn_closed(conn) && vkp_i_conn_is_drained(conn)) {
        vkp_i_conn_close_later(conn, VKP_CLOSE_LOCAL, 0);
    }
}

/* ---- pushing ---- */

/* Whether the outbox has room for a push of len bytes. One push always fits. */
static bool vkp_i_conn_has_room(const vkp_conn *conn, size_t len)
{
    const vkp_conn_config *config = &conn->profile->config;
    return conn->queued_frames < config->queue_frames &&
           (conn->queued_frames == 0 || (conn->pushed_bytes <= config->queue_bytes &&
                                         len <= config->queue_bytes - conn->pushed_bytes));
}

/* Whether the outbox has room for a push of len bytes, if need be after a write and after
   counting written frames off. The cheapest check is first.                                   */
static bool vkp_i_conn_find_room(vkp_conn *conn, size_t len)
{
    if (vkp_i_conn_has_room(conn, len)) {
        return true;
    }
    vkp_i_conn_flush(conn);
    return vkp_i_conn_has_room(conn, len) ||
           (vkp_i_spans_normalize(conn) && vkp_i_conn_has_room(conn, len));
}

/* Queue a push in the outbox, by the policy when the outbox is full. Loop's thread. */
static vkp_status vkp_i_conn_enqueue(vkp_conn *conn, const vkp_bytes *frame)
{
    vkp_status status;
    if (vkp_i_conn_closed(conn) || (conn->flags & VKP_I_CONN_CLOSES) != 0) {
        return VKP_ERR_CLOSED;
    }
    if (frame->len == 0) {
        return VKP_OK;
    }
    if (!vkp_i_conn_find_room(conn, frame->len)) {
        if ((conn->flags & VKP_I_CONN_CLOSES) != 0) {
            return VKP_ERR_CLOSED;
        }
        switch ((int)conn->profile->config.on_full) {
        case VKP_ON_FULL_DROP_NEWEST:
            vkp_i_conn_count_drop(conn);
            return VKP_ERR_DROPPED;
        case VKP_ON_FULL_DROP_OLDEST:
            if (!vkp_i_spans_normalize(conn)) {
                return VKP_ERR_NOMEM; /* no memory to split the partly written frame off */
            }
            while (!vkp_i_conn_has_room(conn, frame->len) && vkp_i_spans_drop_oldest(conn)) {
            }
            break;
        case VKP_ON_FULL_DISCONNECT:
            vkp_i_conn_close_later(conn, VKP_CLOSE_SLOW, 0);
            return VKP_ERR_CLOSED;
        default:
            return VKP_ERR_FULL;
        }
    }
    status = vkp_i_spans_push(conn, frame, true);
    vkp_i_conn_defer(conn);
    return status;
}

/* A push from the loop's thread: CLOSED while the connection drains. */
static vkp_status vkp_i_conn_admit(vkp_conn *conn, const vkp_bytes *frame)
{
    return (conn->flags & VKP_I_CONN_DRAINING) != 0 ? VKP_ERR_CLOSED
                                                    : vkp_i_conn_enqueue(conn, frame);
}

VKP_API vkp_status vkp_conn_send(vkp_conn *conn, const vkp_bytes *frame)
{
    vkp_status status;
    VKP_I_REQUIRE(conn != NULL && frame != NULL && vkp_i_on_loop(conn->loop));
    if (vkp_i_conn_closed(conn) || (conn->flags & (VKP_I_CONN_CLOSES | VKP_I_CONN_DRAINING)) != 0) {
        return VKP_ERR_CLOSED;
    }
    if (frame->len == 0) {
        return VKP_OK;
    }
    status = vkp_i_spans_push(conn, frame, false);
    vkp_i_conn_defer(conn);
    return status;
}

/* The inbox's handler: frames from other threads have arrived. */
static void vkp_i_conn_inbox_ready(void *user)
{
    vkp_i_conn_pull_inbox((vkp_conn *)user);
}

/* Open the inbox's handler: the loop moves frames to the outbox again. */
static vkp_status vkp_i_conn_handle_inbox(vkp_conn *conn)
{
    vkp_case receive = vkp_case_mpsc_recv(conn->inbox->rx, NULL);
    return vkp_handler_open(conn->loop, &receive, vkp_i_conn_inbox_ready, conn,
                            &conn->inbox->handler);
}

/* No memory to queue a push for which its sender received OK: count it as dropped, or close
   later when the policy drops nothing.                                                        */
static void vkp_i_conn_count_lost(vkp_conn *conn)
{
    vkp_on_full policy = conn->profile->config.on_full;
    if (policy == VKP_ON_FULL_DROP_NEWEST || policy == VKP_ON_FULL_DROP_OLDEST) {
        vkp_i_conn_count_drop(conn);
    } else {
        vkp_i_conn_close_later(conn, VKP_CLOSE_NOMEM, 0);
    }
}

#define VKP_I_INBOX_BATCH 1024 /* most frames that one call of the handler moves */

/* Move frames from the inbox to the outbox. With a policy that waits (WAIT, ERROR) frames stay
   in the inbox while the outbox is full, and the inbox has no handler until there is room. The
   batch limit lets the round end when threads push as fast as the peer reads: the handler calls
   again for the frames left.                                                                  */
static void vkp_i_conn_pull_inbox(vkp_conn *conn)
{
    vkp_mpsc_rx *rx = conn->inbox->rx;
    bool waits = conn->profile->config.on_full == VKP_ON_FULL_WAIT ||
                 conn->profile->config.on_full == VKP_ON_FULL_ERROR;
    /* no batch limit: the inbox is closed, no frame is added */
    bool draining = (conn->flags & VKP_I_CONN_DRAINING) != 0;
    vkp_bytes frame;
    size_t next = 0;
    int i;
    for (i = 0; i < VKP_I_INBOX_BATCH || draining; i++) {
        if (waits && !vkp_i_mpsc_next_cost(rx, &next)) {
            break; /* empty: the cost of a frame that arrives now is not known */
        }
        if (waits && !vkp_i_conn_find_room(conn, next)) {
            if ((conn->flags & VKP_I_CONN_INBOX_HELD) == 0) {
                conn->flags |= VKP_I_CONN_INBOX_HELD;
                vkp_i_inbox_hold(conn->inbox);
            }
            return;
        }
        if (vkp_mpsc_try_recv(rx, &frame) != VKP_OK) {
            break;
        }
        if (vkp_i_conn_enqueue(conn, &frame) == VKP_ERR_NOMEM) {
            vkp_i_conn_count_lost(conn);
        }
        vkp_bytes_unref(&frame);
    }
    if ((conn->flags & VKP_I_CONN_INBOX_HELD) != 0) {
        conn->flags &= ~VKP_I_CONN_INBOX_HELD;
        if (!draining && vkp_i_conn_handle_inbox(conn) != VKP_OK) {
            vkp_i_conn_close_later(conn, VKP_CLOSE_NOMEM, 0);
        }
    }
}

/* Task of vkp_conn_close from another thread. */
static void vkp_i_conn_remote(vkp_i_task *task)
{
    vkp_conn *conn = VKP_CONTAINER(task, vkp_conn, remote);
    vkp_i_conn_finish(conn, VKP_CLOSE_LOCAL, 0);
    vkp_conn_unref(conn);
}

/* Task of a push from another thread that found the inbox full, with VKP_ON_FULL_DISCONNECT. */
static void vkp_i_conn_remote_slow(vkp_i_task *task)
{
    vkp_conn *conn = VKP_CONTAINER(task, vkp_conn, remote);
    vkp_i_conn_finish(conn, VKP_CLOSE_SLOW, 0);
    vkp_conn_unref(conn);
}

/* Queue fn, which closes, on the loop. Only the first call queues: its reason is the one
   reported. Other threads.                                                                    */
static void vkp_i_conn_close_remotely(vkp_conn *conn, void (*fn)(vkp_i_task *task))
{
    if (VKP_I_XCHG(&conn->remote_queued, 1u) != 0) {
        return;
    }
    (void)vkp_conn_ref(conn);
    conn->remote.fn = fn;
    if (!vkp_i_loop_queue(conn->loop, &conn->remote)) {
        vkp_conn_unref(conn); /* the loop is closed: its close also closed the connection */
    }
}

/* Push into the inbox, by the policy when the inbox is full. Other threads. */
static vkp_status vkp_i_conn_push_remotely(vkp_conn *conn, const vkp_bytes *frame,
                                           vkp_cancel *cancel, uint64_t deadline_ns)
{
    vkp_bytes item = vkp_bytes_ref(frame);
    vkp_bytes evicted;
    vkp_status status;
    bool was_evicted = false;
    switch ((int)conn->profile->config.on_full) {
    case VKP_ON_FULL_WAIT:
        status = vkp_i_lane_send(conn->inbox->tx->lane, &item, NULL, cancel, deadline_ns);
        break;
    case VKP_ON_FULL_DROP_OLDEST:
        do {
            status = vkp_i_mpsc_send_evict(conn->inbox->tx, &item, &evicted, &was_evicted);
            if (was_evicted) {
                vkp_i_conn_count_drop(conn);
                vkp_bytes_unref(&evicted);
            }
        } while (was_evicted && status == VKP_ERR_FULL);
        break;
    default:
        status = vkp_mpsc_try_send(conn->inbox->tx, &item);
        break;
    }
    if (status == VKP_ERR_FULL && conn->profile->config.on_full == VKP_ON_FULL_DROP_NEWEST) {
        vkp_i_conn_count_drop(conn);
        status = VKP_ERR_DROPPED;
    } else if (status == VKP_ERR_FULL && conn->profile->config.on_full == VKP_ON_FULL_DISCONNECT) {
        vkp_i_conn_close_remotely(conn, vkp_i_conn_remote_slow);
        status = VKP_ERR_CLOSED;
    }
    if (status != VKP_OK) {
        vkp_bytes_unref(&item);
    }
    return status;
}

/* Push from any thread. A wait for room ends at the deadline, or when the token (may be NULL) is
   triggered.                                                                                  */
static vkp_status vkp_i_conn_push(vkp_conn *conn, const vkp_bytes *frame, vkp_cancel *cancel,
                                  uint64_t deadline_ns)
{
    if (vkp_i_on_loop(conn->loop)) {
        return vkp_i_conn_admit(conn, frame);
    }
    VKP_I_REQUIRE(conn->inbox != NULL);
    return vkp_i_conn_push_remotely(conn, frame, cancel, deadline_ns);
}

VKP_API vkp_status vkp_conn_push(vkp_conn *conn, const vkp_bytes *frame, uint64_t deadline_ns)
{
    VKP_I_REQUIRE(conn != NULL && frame != NULL);
    return vkp_i_conn_push(conn, frame, NULL, deadline_ns);
}

/* ---- reading ---- */

/* A block with room to read into. The kept input is copied to offset *begin of the loop's block;
   large kept input stays in its own block, which grows. NULL: no memory.                      */
static vkp_block *vkp_i_conn_read_block(vkp_conn *conn, size_t *begin)
{
    vkp_loop *loop = conn->loop;
    size_t kept = conn->input != NULL ? conn->input->len - conn->input_begin : 0;
    vkp_block *block = loop->read_block;
    if (kept > loop->read_bytes / 2) {
        if (vkp_i_block_reserve(loop->env, &conn->input, loop->read_bytes / 2) != VKP_OK) {
            return NULL;
        }
        *begin = conn->input_begin;
        return conn->input;
    }
    if (block != NULL && vkp_i_block_is_mine(block)) {
        block->len = 0;
    }
    if (block == NULL || block->capacity - block->len < kept + loop->read_bytes / 2) {
        vkp_i_block_unref(block);
        loop->read_block = block = vkp_i_block_open(loop->env, loop->read_bytes * 2);
        if (block == NULL) {
            return NULL;
        }
    }
    *begin = block->len;
    if (kept > 0) {
        memcpy(vkp_i_block_data(block) + block->len,
               vkp_i_block_data(conn->input) + conn->input_begin, kept);
        block->len += kept;
    }
    return block;
}

/* Keep bytes [begin, len) of the block for the next on_data. False: over input_bytes, or no
   memory; the connection closes later.                                                        */
static bool vkp_i_conn_keep(vkp_conn *conn, vkp_block *block, size_t begin)
{
    size_t left = block->len - begin;
    vkp_block *kept = NULL;
    if (left > conn->profile->config.input_bytes) {
        vkp_i_conn_close_later(conn, VKP_CLOSE_ERROR, EMSGSIZE);
        return false;
    }
    if (left > 0 && block == conn->input && begin == conn->input_begin) {
        return true;
    }
    if (left > 0) {
        /* A large incomplete frame grows: reserve room now. */
        size_t room = left > conn->loop->read_bytes / 2 ? left * 2 : left;
        kept = vkp_i_block_open(conn->loop->env, VKP_I_MIN(room, (size_t)VKP_I_BLOCK_MAX));
        if (kept == NULL) {
            vkp_i_conn_close_later(conn, VKP_CLOSE_NOMEM, 0);
            return false;
        }
        memcpy(vkp_i_block_data(kept), vkp_i_block_data(block) + begin, left);
        kept->len = left;
    }
    vkp_i_block_unref(conn->input);
    conn->input = kept;
    conn->input_begin = 0;
    return true;
}

/* Call on_data with bytes [begin, len) of the block, and keep the bytes that on_data leaves. */
static void vkp_i_conn_deliver(vkp_conn *conn, vkp_block *block, size_t begin)
{
    const vkp_conn_ops *ops = conn->profile->config.ops;
    vkp_bytes window;
    size_t used;
    window.block = vkp_i_block_ref(block);
    window.data = vkp_i_block_data(block) + begin;
    window.len = block->len - begin;
    used = ops->on_data != NULL ? ops->on_data(conn, conn->user, &window) : window.len;
    if (!vkp_i_conn_closed(conn)) {
        (void)vkp_i_conn_keep(conn, block, begin + VKP_I_MIN(used, window.len));
    }
    vkp_i_block_unref(block);
}

/* After vkp_conn_resume: deliver the kept input, without waiting for more bytes. */
static void vkp_i_conn_reread(vkp_conn *conn)
{
    if ((conn->flags & VKP_I_CONN_REREAD) != 0) {
        conn->flags &= ~VKP_I_CONN_REREAD;
        if (conn->input != NULL &&
            (conn->flags & (VKP_I_CONN_PAUSED | VKP_I_CONN_DRAINING | VKP_I_CONN_ENDED)) == 0) {
            vkp_i_conn_deliver(conn, conn->input, conn->input_begin);
        }
    }
}

/* The peer closed its sending side: on_end decides whether the connection stays open to write. */
static void vkp_i_conn_end(vkp_conn *conn)
{
    const vkp_conn_ops *ops = conn->profile->config.ops;
    conn->flags |= VKP_I_CONN_ENDED;
    if (ops->on_end == NULL || !ops->on_end(conn, conn->user)) {
        vkp_i_conn_finish(conn, VKP_CLOSE_PEER, 0);
    } else {
        vkp_i_conn_update_interest(conn);
    }
}

/* One read, delivered to on_data. */
static void vkp_i_conn_readable(vkp_conn *conn)
{
    size_t begin = 0;
    vkp_block *block = vkp_i_conn_read_block(conn, &begin);
    size_t room;
    int64_t got;
    if (block == NULL) {
        vkp_i_conn_finish(conn, VKP_CLOSE_NOMEM, 0);
        return;
    }
    room = VKP_I_MIN(block->capacity - block->len, conn->loop->read_bytes);
    got = conn->loop->sys->read(conn->fd, vkp_i_block_data(block) + block->len, room);
    if (got > 0) {
        block->len += (size_t)got;
        if ((conn->flags & (VKP_I_CONN_PAUSED | VKP_I_CONN_AHEAD)) ==
            (VKP_I_CONN_PAUSED | VKP_I_CONN_AHEAD)) {
            if (vkp_i_conn_keep(conn, block, begin)) {
                vkp_i_conn_update_interest(conn);
            }
            return;
        }
        vkp_i_conn_deliver(conn, block, begin);
    } else if (block != conn->input) {
        block->len = begin; /* nothing was read: discard the copy of the kept input */
    }
    if (got == 0) {
        vkp_i_conn_end(conn);
    } else if (got < 0 && got != -EAGAIN && got != -EWOULDBLOCK && got != -EINTR) {
        vkp_i_conn_finish(conn, got == -ECONNRESET ? VKP_CLOSE_PEER : VKP_CLOSE_ERROR, (int)-got);
    }
}

/* ---- connecting ---- */

static void vkp_i_conn_event(vkp_io *io, uint32_t ready);
static void vkp_i_conn_share_ended(vkp_timer *timer);

/* Set what the config says about the liveness of a TCP connection. */
static void vkp_i_conn_set_liveness(vkp_conn *conn)
{
    const vkp_conn_config *config = &conn->profile->config;
    if (config->keepalive_ms > 0 || config->unacked_ms > 0) {
        (void)conn->loop->sys->set_liveness(conn->fd, config->keepalive_ms, config->unacked_ms);
    }
}

/* Start the timer that ends the share of the address tried now. The last one has what is left. */
static vkp_status vkp_i_conn_share_time(vkp_conn *conn)
{
    vkp_i_connecting *self = conn->connecting;
    uint64_t now_ns = vkp_i_loop_now(conn->loop);
    uint64_t left_ns = self->deadline_ns - VKP_I_MIN(now_ns, self->deadline_ns);
    uint64_t shares = self->count - self->next + 1;
    if (self->deadline_ns == VKP_FOREVER) {
        return VKP_OK;
    }
    return vkp_timer_start(&self->timer, conn->loop, vkp_i_conn_share_ended, 0,
                           now_ns + left_ns / shares);
}

/* Begin to connect to the next address. VKP_OK: an event reports the outcome. */
static vkp_status vkp_i_conn_try_next(vkp_conn *conn)
{
    const vkp_sys *sys = conn->loop->sys;
    int result = conn->connecting->next > 0 ? -ETIMEDOUT : -ECONNREFUSED;
    while (conn->connecting->next < conn->connecting->count) {
        const vkp_address *address = &conn->connecting->addresses[conn->connecting->next++];
        result = sys->socket(address->family, SOCK_STREAM);
        if (result < 0) {
            continue;
        }
        conn->fd = result;
        if (address->family != AF_UNIX) {
            (void)sys->set_nodelay(conn->fd);
            vkp_i_conn_set_liveness(conn);
        }
        result = sys->connect(conn->fd, address->storage.bytes, address->bytes);
        if (result == 0 || result == -EINPROGRESS || result == -EINTR) {
            vkp_status status =
                vkp_io_start(&conn->io, conn->loop, conn->fd, VKP_IO_WRITE, vkp_i_conn_event);
            if (status == VKP_OK) {
                status = vkp_i_conn_share_time(conn);
            }
            if (status == VKP_OK) {
                return VKP_OK;
            }
            vkp_io_stop(&conn->io);
            result = status == VKP_ERR_NOMEM ? -ENOMEM : -errno;
        }
        (void)sys->close(conn->fd);
        conn->fd = -1;
    }
    return vkp_i_sys_failure(result);
}

/* Give the address up that was tried, and try the next one; without one the connection ends with
   the error. */
static void vkp_i_conn_leave_address(vkp_conn *conn, int error)
{
    bool last = conn->connecting->next == conn->connecting->count;
    vkp_io_stop(&conn->io);
    (void)conn->loop->sys->close(conn->fd);
    conn->fd = -1;
    if (vkp_i_conn_try_next(conn) != VKP_OK) {
        vkp_i_conn_finish(conn, VKP_CLOSE_ERROR, last ? error : errno);
    }
}

/* The time of an address is over. */
static void vkp_i_conn_share_ended(vkp_timer *timer)
{
    vkp_conn *conn = VKP_CONTAINER(timer, vkp_i_connecting, timer)->conn;
    (void)vkp_conn_ref(conn);
    vkp_i_conn_leave_address(conn, ETIMEDOUT);
    vkp_conn_unref(conn);
}

/* An attempt to connect has ended: open the connection, or try the next address. */
static void vkp_i_conn_connected(vkp_conn *conn)
{
    int error = -conn->loop->sys->socket_error(conn->fd);
    const vkp_conn_ops *ops = conn->profile->config.ops;
    if (error != 0) {
        vkp_i_conn_leave_address(conn, error);
        return;
    }
    vkp_timer_stop(&conn->connecting->timer);
    conn->flags &= ~VKP_I_CONN_CONNECTING;
    vkp_i_conn_update_interest(conn);
    if (ops->on_open != NULL) {
        ops->on_open(conn, conn->user); /* may ask vkp_i_conn_get_address */
    }
    if (!vkp_i_conn_closed(conn)) {
        vkp_i_connecting_free(conn);
        vkp_i_conn_defer(conn); /* write the frames that were pushed while connecting */
    }
}

/* The descriptor is ready; ready 0: the loop closes. */
static void vkp_i_conn_event(vkp_io *io, uint32_t ready)
{
    vkp_conn *conn = VKP_CONTAINER(io, vkp_conn, io);
    bool hung_up = (ready & (VKP_IO_HUP | VKP_IO_ERROR)) != 0;
    (void)vkp_conn_ref(conn);
    if (ready == 0) {
        vkp_i_conn_finish(conn, VKP_CLOSE_LOOP, 0);
    } else if ((conn->flags & VKP_I_CONN_CONNECTING) != 0) {
        vkp_i_conn_connected(conn);
    } else {
        if ((conn->flags & VKP_I_CONN_BLOCKED) != 0 && (ready & VKP_IO_WRITE) != 0) {
            vkp_i_conn_writable(conn);
        }
        if (vkp_i_conn_closed(conn)) {
            /* a callback closed the connection */
        } else if ((conn->flags & (VKP_I_CONN_ENDED | VKP_I_CONN_DRAINING)) != 0) {
            if (hung_up) {
                vkp_i_conn_finish(conn, VKP_CLOSE_PEER, 0);
            }
        } else if ((conn->flags & VKP_I_CONN_PAUSED) != 0) {
            if (vkp_i_conn_reads_ahead(conn) && ((ready & VKP_IO_READ) != 0 || hung_up)) {
                vkp_i_conn_readable(conn);
            }
        } else if ((ready & VKP_IO_READ) != 0 || hung_up) {
            /* Kept input precedes the bytes, or the end, that a read finds. */
            vkp_i_conn_reread(conn);
            if (!vkp_i_conn_closed(conn) &&
                (conn->flags & (VKP_I_CONN_PAUSED | VKP_I_CONN_DRAINING | VKP_I_CONN_REREAD)) ==
                    0) {
                vkp_i_conn_readable(conn);
            }
        }
    }
    vkp_conn_unref(conn);
}

#define VKP_I_DISCARD_BYTES 4096 /* most bytes of one discarding read */
#define VKP_I_DISCARD_READS 16   /* most discarding reads before a close */

/* Read and discard waiting input before this side closes, within limits: a kernel that closes a
   TCP socket with unread input sends a reset, and the peer loses the last bytes written to it. */
static void vkp_i_conn_discard_input(vkp_conn *conn)
{
    char bin[VKP_I_DISCARD_BYTES];
    int i;
    for (i = 0; i < VKP_I_DISCARD_READS && conn->loop->sys->read(conn->fd, bin, sizeof bin) > 0;
         i++) {
    }
}

#define VKP_I_LAST_READS 64 /* most reads of what a peer wrote before it closed */

/* A write failed because the peer closed: deliver what the peer wrote before, often the reason. */
static void vkp_i_conn_read_last(vkp_conn *conn)
{
    const uint32_t silent = VKP_I_CONN_PAUSED | VKP_I_CONN_ENDED | VKP_I_CONN_DRAINING;
    int i;
    for (i = 0; i < VKP_I_LAST_READS && !vkp_i_conn_closed(conn) && (conn->flags & silent) == 0;
         i++) {
        vkp_i_conn_readable(conn); /* the end of the input closes the connection */
    }
}

/* The deferred task, at the end of a round: deliver kept input after a resume, write once, pull
   a held inbox, then close if the connection is drained or marked.                            */
static void vkp_i_conn_task(vkp_i_task *task)
{
    vkp_conn *conn = VKP_CONTAINER(task, vkp_conn, task);
    conn->flags &= ~VKP_I_CONN_QUEUED;
    if (!vkp_i_conn_closed(conn)) {
        vkp_i_conn_reread(conn);
    }
    if (!vkp_i_conn_closed(conn)) {
        vkp_i_conn_flush(conn);
        if ((conn->flags & VKP_I_CONN_INBOX_HELD) != 0 &&
            (conn->flags & (VKP_I_CONN_BLOCKED | VKP_I_CONN_CONNECTING)) == 0) {
            vkp_i_conn_pull_inbox(conn);
        }
        if (vkp_i_conn_is_drained(conn)) {
            vkp_i_conn_discard_input(conn);
            vkp_i_conn_close_later(conn, VKP_CLOSE_LOCAL, 0);
        }
        if ((conn->flags & VKP_I_CONN_CLOSES) != 0 &&
            (conn->closes_error == EPIPE || conn->closes_error == ECONNRESET)) {
            vkp_i_conn_read_last(conn);
        }
        if ((conn->flags & VKP_I_CONN_CLOSES) != 0) {
            vkp_i_conn_finish(conn, conn->closes_reason, conn->closes_error);
        }
    }
    vkp_conn_unref(conn);
}

static void vkp_i_drop_bytes(void *user, void *item)
{
    (void)user;
    vkp_bytes_unref((vkp_bytes *)item);
}

static size_t vkp_i_cost_bytes(const void *item)
{
    return ((const vkp_bytes *)item)->len;
}

static vkp_status vkp_i_conn_open_inbox(vkp_conn *conn)
{
    const vkp_conn_config *config = &conn->profile->config;
    vkp_mpsc_config inbox;
    vkp_status status;
    memset(&inbox, 0, sizeof inbox);
    inbox.elem_bytes = sizeof(vkp_bytes);
    inbox.capacity_items = config->queue_frames;
    inbox.capacity_bytes = config->queue_bytes;
    inbox.cost = vkp_i_cost_bytes;
    inbox.drop = vkp_i_drop_bytes;
    inbox.env = conn->loop->env;
    conn->inbox = (vkp_i_inbox *)vkp_i_alloc_zero(conn->loop->env, sizeof *conn->inbox);
    if (conn->inbox == NULL) {
        return VKP_ERR_NOMEM;
    }
    status = vkp_i_mpsc_open(&inbox, conn->profile->config.on_full == VKP_ON_FULL_DROP_OLDEST,
                             &conn->inbox->tx, &conn->inbox->rx);
    if (status != VKP_OK) {
        vkp_i_free(conn->loop->env, conn->inbox, sizeof *conn->inbox);
        conn->inbox = NULL;
        return status;
    }
    return vkp_i_conn_handle_inbox(conn);
}

/* A connection without a descriptor, with one reference, the caller's. Shares profile. */
static vkp_status vkp_i_conn_new(vkp_loop *loop, vkp_i_profile *profile, vkp_conn **out)
{
    vkp_conn *conn = (vkp_conn *)vkp_i_alloc_zero(loop->env, sizeof *conn);
    vkp_status status = VKP_OK;
    if (conn == NULL) {
        return VKP_ERR_NOMEM;
    }
    conn->refs = 1;
    conn->loop = vkp_loop_ref(loop);
    conn->profile = vkp_i_profile_ref(profile);
    conn->user = profile->config.user;
    conn->task.fn = vkp_i_conn_task;
    conn->fd = -1;
    if (!profile->config.loop_only) {
        status = vkp_i_conn_open_inbox(conn);
    }
    if (status != VKP_OK) {
        vkp_conn_unref(conn);
        return status;
    }
    *out = conn;
    return VKP_OK;
}

/* Serve fd with a shared profile. Takes fd; gives *out beside the loop's own reference.
   prepared: fd was accepted by this library, its flags are set. The caller calls on_open.     */
static vkp_status vkp_i_conn_adopt(vkp_loop *loop, int fd, vkp_i_profile *profile, bool prepared,
                                   vkp_conn **out)
{
    vkp_conn *conn;
    int result = prepared ? 0 : loop->sys->prepare(fd);
    vkp_status status;
    if (result < 0) {
        return vkp_i_sys_failure(result);
    }
    status = vkp_i_conn_new(loop, profile, &conn);
    if (status != VKP_OK) {
        return status;
    }
    status = vkp_io_start(&conn->io, loop, fd, VKP_IO_READ, vkp_i_conn_event);
    if (status != VKP_OK) {
        vkp_conn_unref(conn);
        return status;
    }
    conn->fd = fd;
    vkp_i_conn_set_liveness(conn); /* no effect on other sockets than TCP's */
    profile->live++;
    *out = vkp_conn_ref(conn);
    return VKP_OK;
}

VKP_API vkp_status vkp_conn_open(vkp_loop *loop, int fd, const vkp_conn_config *config,
                                 vkp_conn **conn)
{
    vkp_i_profile *profile;
    vkp_status status;
    VKP_I_REQUIRE(loop != NULL && fd >= 0 && config != NULL && config->ops != NULL && conn != NULL);
    VKP_I_REQUIRE(vkp_i_on_loop(loop));
    if (loop->closed) {
        return VKP_ERR_CLOSED;
    }
    profile = vkp_i_profile_open(loop->env, config);
    if (profile == NULL) {
        return VKP_ERR_NOMEM;
    }
    status = vkp_i_conn_adopt(loop, fd, profile, false, conn);
    vkp_i_profile_unref(profile);
    if (status == VKP_OK && config->ops->on_open != NULL) {
        config->ops->on_open(*conn, (*conn)->user);
    }
    return status;
}

/* vkp_conn_connect to resolved addresses, at most VKP_I_CONNECT_TRIES of them. */
static vkp_status vkp_i_conn_connect_to(vkp_loop *loop, const vkp_address *addresses, size_t count,
                                        const vkp_conn_config *config, vkp_conn **out)
{
    vkp_i_profile *profile = vkp_i_profile_open(loop->env, config);
    vkp_conn *conn = NULL;
    vkp_status status;
    if (profile == NULL) {
        return VKP_ERR_NOMEM;
    }
    status = vkp_i_conn_new(loop, profile, &conn);
    vkp_i_profile_unref(profile);
    if (status != VKP_OK) {
        return status;
    }
    conn->flags |= VKP_I_CONN_CONNECTING;
    conn->connecting = (vkp_i_connecting *)vkp_i_alloc_zero(loop->env, sizeof *conn->connecting);
    if (conn->connecting == NULL) {
        vkp_conn_unref(conn);
        return VKP_ERR_NOMEM;
    }
    memcpy(conn->connecting->addresses, addresses, count * sizeof *addresses);
    conn->connecting->count = count;
    conn->connecting->conn = conn;
    conn->connecting->deadline_ns = config->connect_ms == 0
                                        ? VKP_FOREVER
                                        : vkp_i_after_ms(vkp_i_loop_now(loop), config->connect_ms);
    status = vkp_i_conn_try_next(conn);
    if (status != VKP_OK) {
        int error = errno;
        vkp_i_connecting_free(conn);
        vkp_conn_unref(conn);
        errno = error;
        return status;
    }
    *out = vkp_conn_ref(conn);
    return VKP_OK;
}

VKP_API vkp_status vkp_conn_connect(vkp_loop *loop, vkp_str address, const vkp_conn_config *config,
                                    vkp_conn **out)
{
    vkp_address addresses[VKP_I_CONNECT_TRIES];
    size_t count = 0;
    vkp_status status;
    VKP_I_REQUIRE(loop != NULL && address.ptr != NULL && config != NULL && config->ops != NULL);
    VKP_I_REQUIRE(out != NULL && vkp_i_on_loop(loop));
    if (loop->closed) {
        return VKP_ERR_CLOSED;
    }
    status = vkp_i_parse_address(loop->env, address, addresses, VKP_I_CONNECT_TRIES, &count);
    return status == VKP_OK ? vkp_i_conn_connect_to(loop, addresses, count, config, out) : status;
}

/* ---- the other calls of the handle ---- */

VKP_API void vkp_conn_pause(vkp_conn *conn)
{
    conn->flags |= VKP_I_CONN_PAUSED;
    vkp_i_conn_update_interest(conn);
}

VKP_API void vkp_conn_resume(vkp_conn *conn)
{
    if ((conn->flags & VKP_I_CONN_PAUSED) == 0 || vkp_i_conn_closed(conn)) {
        return;
    }
    conn->flags &= ~(VKP_I_CONN_PAUSED | VKP_I_CONN_AHEAD);
    conn->flags |= VKP_I_CONN_REREAD;
    vkp_i_conn_update_interest(conn);
    vkp_i_conn_defer(conn);
}

VKP_API void vkp_conn_drain(vkp_conn *conn)
{
    if (vkp_i_conn_closed(conn) || (conn->flags & VKP_I_CONN_DRAINING) != 0) {
        return;
    }
    conn->flags |= VKP_I_CONN_DRAINING;
    if (conn->inbox != NULL) { /* frames in the inbox are written before the close */
        vkp_i_inbox_hold(conn->inbox);
        vkp_mpsc_close(conn->inbox->rx);
        conn->flags |= VKP_I_CONN_INBOX_HELD;
        vkp_i_conn_pull_inbox(conn);
    }
    vkp_i_conn_update_interest(conn);
    vkp_i_conn_defer(conn);
}

VKP_API void vkp_conn_close(vkp_conn *conn)
{
    if (conn == NULL || vkp_i_conn_closed(conn)) {
        return;
    }
    if (vkp_i_on_loop(conn->loop)) {
        vkp_i_conn_finish(conn, VKP_CLOSE_LOCAL, 0);
    } else {
        vkp_i_conn_close_remotely(conn, vkp_i_conn_remote);
    }
}

VKP_API void *vkp_conn_get_user(const vkp_conn *conn)
{
    return conn->user;
}

VKP_API void vkp_conn_set_user(vkp_conn *conn, void *user)
{
    conn->user = user;
}

VKP_API void vkp_conn_set_seat(vkp_conn *conn, vkp_seat *seat)
{
    conn->seat = seat;
}

VKP_API vkp_loop *vkp_conn_get_loop(const vkp_conn *conn)
{
    return conn->loop;
}

VKP_API int vkp_conn_get_fd(const vkp_conn *conn)
{
    return conn->fd;
}

VKP_API bool vkp_conn_is_open(const vkp_conn *conn)
{
    return !vkp_i_conn_closed(conn);
}

VKP_API void vkp_conn_get_stats(const vkp_conn *conn, vkp_conn_stats *stats)
{
    stats->queued_frames = conn->queued_frames;
    stats->queued_bytes = conn->queued_bytes;
    stats->dropped_frames = VKP_I_LOAD(&conn->dropped);
}

/* ---- for the layers above ----
   Listener, hub, push loop and relay use the public calls and: vkp_i_profile_open, _ref and _unref,
   the profile's dropped, live and when_empty; vkp_i_conn_adopt, vkp_i_conn_admit,
   vkp_i_conn_push, vkp_i_conn_flush, vkp_i_conn_finish, vkp_i_conn_close_later; and the functions
   below.                                                                                      */

/* Inside on_open after vkp_conn_connect: the address that accepted. */
static const vkp_address *vkp_i_conn_get_address(const vkp_conn *conn)
{
    return &conn->connecting->addresses[conn->connecting->next - 1];
}

/* Whether vkp_conn_drain was called: the connection reads nothing, and closes when its queues
   are written.                                                                                */
static bool vkp_i_conn_is_draining(const vkp_conn *conn)
{
    return (conn->flags & VKP_I_CONN_DRAINING) != 0;
}

/* Whether the peer's commands are still answered: the connection neither drains nor closes
   later.                                                                                      */
static bool vkp_i_conn_is_serving(const vkp_conn *conn)
{
    return (conn->flags & (VKP_I_CONN_DRAINING | VKP_I_CONN_CLOSES)) == 0;
}

/* While it is paused, the connection reads up to VKP_I_CONN_AHEAD_BYTES without on_data, so that
   on_end is called when the peer has gone. What was read then is dropped. false, or
   vkp_conn_resume: no longer.                                                                 */
static void vkp_i_conn_read_ahead(vkp_conn *conn, bool ahead)
{
    uint32_t flags = conn->flags;
    conn->flags = ahead ? flags | VKP_I_CONN_AHEAD : flags & ~VKP_I_CONN_AHEAD;
    if (conn->flags != flags) {
        vkp_i_conn_update_interest(conn);
    }
}

/* Between vkp_conn_pause and vkp_conn_resume. */
static bool vkp_i_conn_is_paused(const vkp_conn *conn)
{
    return (conn->flags & VKP_I_CONN_PAUSED) != 0;
}

/* Bytes in the outbox, pushes and response stream, that the kernel has not accepted. */
static size_t vkp_i_conn_get_queued_bytes(const vkp_conn *conn)
{
    return conn->queued_bytes;
}

/* The next connection of the profile in the loop's slots from *index on, or NULL. *index moves
   past it.                                                                                    */
static vkp_conn *vkp_i_conn_of_profile(vkp_loop *loop, const vkp_i_profile *profile, size_t *index)
{
    while (*index < loop->slot_count) {
        vkp_io *io = loop->slots[(*index)++].io;
        if (io != NULL && io->i_fn == vkp_i_conn_event) {
            vkp_conn *conn = VKP_CONTAINER(io, vkp_conn, io);
            if (conn->profile == profile) {
                return conn;
            }
        }
    }
    return NULL;
}

#endif /* VKP_I_IO */
