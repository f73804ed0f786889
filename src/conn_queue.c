#if VKP_I_IO
/* ======================================================================================
   >>impl-conn-queue   Connections: the struct, and its queue
   ======================================================================================
   Everything of a connection belongs to its loop's thread, but for its count, `state` and the
   inbox. The outbox is a queue of spans: neighbouring frames of one block are ONE span, which
   holds one reference and is written as one range; frame_len finds the frames again when the
   policy must drop some. Nothing is written inside a push: the connection defers its task, and
   the round ends with one gathered write per connection.
   Closing from inside a push would pull the ground from under whoever pushes to many, so a push
   only marks (`doomed`); the deferred task closes.
   Idle, a connection has no buffers: input goes to the loop's block, and what is left of a frame
   is kept in a block of its own size.                                                         */

#define VKP_I_CONN_OPEN 0u
#define VKP_I_CONN_CLOSED 1u

#define VKP_I_CONN_CONNECTING 1u /* flags */
#define VKP_I_CONN_PAUSED 2u
#define VKP_I_CONN_ENDED 4u /* the peer sends no more */
#define VKP_I_CONN_DRAINING 8u
#define VKP_I_CONN_BLOCKED 16u /* the kernel's buffer is full: waits for VKP_IO_WRITE */
#define VKP_I_CONN_QUEUED 32u  /* its task is deferred */
#define VKP_I_CONN_CLOSES 64u
#define VKP_I_CONN_REREAD 128u     /* resumed: look at what was kept */
#define VKP_I_CONN_INBOX_HELD 256u /* no room for the inbox: no handler until there is */

/* Shared by all connections of a listener. */
typedef struct vkp_i_profile {
    const vkp_env *env;
    size_t refs;      /* atomic */
    uint64_t dropped; /* atomic: pushes, by the policy, over all connections */
    size_t live;      /* accepted connections that are open; loop's thread, as when_empty */
    vkp_i_task *when_empty;
    vkp_conn_config config;
} vkp_i_profile;

typedef struct vkp_i_span {
    const uint8_t *data;
    vkp_block *block; /* one reference, or NULL: static bytes */
    uint32_t len;
    uint32_t frames; /* 0: of the response stream, never dropped; else how many */
} vkp_i_span;

typedef struct vkp_i_inbox {
    vkp_mpsc_tx *tx; /* of vkp_bytes */
    vkp_mpsc_rx *rx;
    vkp_handler *handler; /* pulls; NULL while the inbox is held */
} vkp_i_inbox;

/* Nothing is pulled until a handler is opened again. Loop's thread. */
static void vkp_i_inbox_hold(vkp_i_inbox *inbox)
{
    vkp_handler_unref(inbox->handler);
    inbox->handler = NULL;
}

#define VKP_I_CONNECT_TRIES 8
typedef struct vkp_i_connecting {
    vkp_address addresses[VKP_I_CONNECT_TRIES];
    size_t count;
    size_t next;
} vkp_i_connecting;

/* What a push to many touches comes first, together: two lines of the cache, not five. */
struct vkp_conn {
    vkp_i_profile *profile;
    uint32_t state; /* atomic */
    uint32_t flags;
    vkp_i_span first; /* the queue's head; the others follow in a ring */
    uint32_t spans;
    uint32_t head_sent;   /* bytes written of `first`, whose data was moved on by as many */
    size_t queued_frames; /* pushes; those of a span partly written count until looked at */
    size_t queued_bytes;  /* of everything */
    size_t pushed_bytes;  /* of pushes */
    vkp_i_task task;      /* deferred */
    vkp_loop *loop;
    size_t refs; /* atomic; the loop holds one until the close, each queued task one */
    vkp_i_span *more;
    uint32_t more_capacity;
    uint32_t more_head;
    void *user;
    vkp_io io;
    vkp_i_task remote;      /* queued by other threads */
    uint32_t remote_queued; /* atomic */
    int fd;
    int closes_error;
    vkp_close_reason closes_reason;
    vkp_block *input; /* what on_data left; its bytes from input_begin */
    size_t input_begin;
    uint64_t dropped; /* atomic */
    vkp_i_inbox *inbox;
    vkp_i_connecting *connecting;
    vkp_seat *seat; /* given back at the close */
};

VKP_API const char *vkp_close_reason_str(vkp_close_reason reason)
{
    static const char *const texts[] = {"closed here",   "closed by the peer", "system error",
                                        "peer too slow", "loop closed",        "out of memory"};
    return (size_t)reason < sizeof texts / sizeof texts[0] ? texts[reason] : "unknown reason";
}

static vkp_i_profile *vkp_i_profile_open(const vkp_env *env, const vkp_conn_config *config)
{
    vkp_i_profile *profile = (vkp_i_profile *)vkp_i_alloc_zero(env, sizeof *profile);
    if (profile != NULL) {
        profile->env = env;
        profile->refs = 1;
        profile->config = *config;
        if (profile->config.on_full == VKP_ON_FULL_DEFAULT) {
            profile->config.on_full = VKP_ON_FULL_WAIT;
        }
        if (profile->config.queue_frames == 0) {
            profile->config.queue_frames = 65536;
        }
        if (profile->config.queue_bytes == 0) {
            profile->config.queue_bytes = (size_t)8 << 20;
        }
        if (profile->config.input_bytes == 0) {
            profile->config.input_bytes = (size_t)512 << 20;
        }
    }
    return profile;
}

static vkp_i_profile *vkp_i_profile_ref(vkp_i_profile *profile)
{
    (void)VKP_I_ADD(&profile->refs, 1);
    return profile;
}

static void vkp_i_profile_unref(vkp_i_profile *profile)
{
    if (VKP_I_UNREF(&profile->refs) == 1) {
        vkp_i_free(profile->env, profile, sizeof *profile);
    }
}

/* ---- the queue of spans ---- */

static vkp_i_span *vkp_i_span_at(vkp_conn *conn, uint32_t index)
{
    return index == 0 ? &conn->first
                      : &conn->more[(conn->more_head + index - 1) & (conn->more_capacity - 1)];
}

static void vkp_i_spans_free_ring(vkp_conn *conn)
{
    vkp_i_free(conn->loop->env, conn->more, conn->more_capacity * sizeof *conn->more);
    conn->more = NULL;
    conn->more_capacity = 0;
    conn->more_head = 0;
}

static bool vkp_i_spans_reserve(vkp_conn *conn)
{
    uint32_t capacity = conn->more_capacity == 0 ? 4 : conn->more_capacity * 2;
    vkp_i_span *ring;
    uint32_t i;
    if (conn->spans == 0 || conn->spans - 1 < conn->more_capacity) {
        return true;
    }
    ring = (vkp_i_span *)vkp_i_alloc(conn->loop->env, capacity * sizeof *ring);
    if (ring == NULL) {
        return false;
    }
    for (i = 1; i < conn->spans; i++) {
        ring[i - 1] = *vkp_i_span_at(conn, i);
    }
    vkp_i_spans_free_ring(conn);
    conn->more = ring;
    conn->more_capacity = capacity;
    return true;
}

/* Add after reserve. */
static void vkp_i_spans_append(vkp_conn *conn, vkp_i_span span)
{
    conn->spans++;
    *vkp_i_span_at(conn, conn->spans - 1) = span;
}

static void vkp_i_spans_remove(vkp_conn *conn, uint32_t index)
{
    vkp_i_block_unref(vkp_i_span_at(conn, index)->block);
    for (; index > 0; index--) { /* few stand before a frame that may be dropped */
        *vkp_i_span_at(conn, index) = *vkp_i_span_at(conn, index - 1);
    }
    conn->spans--;
    if (conn->spans == 0) {
        vkp_i_spans_free_ring(conn);
    } else {
        conn->first = conn->more[conn->more_head];
        conn->more_head = (conn->more_head + 1) & (conn->more_capacity - 1);
    }
}

static size_t vkp_i_span_frame(const vkp_conn *conn, const uint8_t *data, size_t len,
                               uint32_t frames)
{
    size_t frame = len;
    if (frames > 1) {
        frame = conn->profile->config.ops->frame_len(data, len);
    }
    return frame == 0 || frame > len ? len : frame;
}

/* Look which frames of a partly written head are gone, and set the one that is torn apart from
   the rest: it must be finished. False: no memory, nothing changed.                           */
static bool vkp_i_spans_normalize(vkp_conn *conn)
{
    vkp_i_span *head = &conn->first;
    const uint8_t *start;
    size_t whole = conn->head_sent + (size_t)head->len;
    size_t at = 0;
    uint32_t gone = 0;
    vkp_i_span rest;
    if (conn->spans == 0 || conn->head_sent == 0 || head->frames == 0) {
        return true;
    }
    start = head->data - conn->head_sent;
    while (at < conn->head_sent) {
        at += vkp_i_span_frame(conn, start + at, whole - at, head->frames - gone);
        gone++;
    }
    rest = *head;
    rest.data = start + at;
    rest.len = (uint32_t)(whole - at);
    rest.frames = head->frames - gone;
    if (rest.frames > 0 && at > conn->head_sent) {
        if (!vkp_i_spans_reserve(conn)) {
            return false;
        }
        conn->spans++;
        conn->more_head = (conn->more_head - 1) & (conn->more_capacity - 1);
        conn->more[conn->more_head] = rest;
        (void)vkp_i_block_ref(rest.block);
        head->len -= rest.len;
        head->frames = 0; /* begun: belongs to the stream now */
        conn->pushed_bytes -= head->len;
    } else if (at > conn->head_sent) {
        head->frames = 0;
        conn->pushed_bytes -= head->len;
    } else {
        head->frames = rest.frames;
    }
    conn->queued_frames -= gone;
    conn->head_sent = 0;
    return true;
}

static void vkp_i_conn_count_drop(vkp_conn *conn)
{
    (void)VKP_I_ADD(&conn->dropped, (uint64_t)1);
    (void)VKP_I_ADD(&conn->profile->dropped, (uint64_t)1);
}

/* Drop the oldest push that was not begun. False: there is none. */
static bool vkp_i_spans_drop_oldest(vkp_conn *conn)
{
    uint32_t index = 0;
    vkp_i_span *span;
    size_t frame;
    while (index < conn->spans && vkp_i_span_at(conn, index)->frames == 0) {
        index++;
    }
    if (index == conn->spans) {
        return false;
    }
    span = vkp_i_span_at(conn, index);
    frame = vkp_i_span_frame(conn, span->data, span->len, span->frames);
    conn->queued_frames--;
    conn->queued_bytes -= frame;
    conn->pushed_bytes -= frame;
    vkp_i_conn_count_drop(conn);
    if (span->frames == 1) {
        vkp_i_spans_remove(conn, index);
    } else {
        span->data += frame;
        span->len -= (uint32_t)frame;
        span->frames--;
    }
    return true;
}

static void vkp_i_spans_clear(vkp_conn *conn)
{
    while (conn->spans > 0) {
        vkp_i_spans_remove(conn, conn->spans > 1 ? 1 : 0);
    }
    conn->queued_frames = 0;
    conn->queued_bytes = 0;
    conn->pushed_bytes = 0;
    conn->head_sent = 0;
}

static bool vkp_i_span_adjoins(const vkp_conn *conn, const vkp_i_span *tail, const vkp_bytes *frame,
                               bool push)
{
    return tail->block != NULL && tail->block == frame->block &&
           tail->data + tail->len == frame->data && (tail->frames > 0) == push &&
           (!push || conn->profile->config.ops->frame_len != NULL) &&
           frame->len < 0x7fffffffu - tail->len;
}

#define VKP_I_COMPACT_BYTES 4096u

/* A slow client must not pin whole blocks for a frame each: when its queue's last span is a small
   part of its block and did not grow, copy it behind its neighbour in a private block.        */
static void vkp_i_spans_compact_tail(vkp_conn *conn)
{
    vkp_i_span *tail;
    vkp_i_span *before;
    vkp_block *block;
    bool joins; /* others may follow in the same block */
    if (conn->spans < 2) {
        return; /* the head may be partly written */
    }
    tail = vkp_i_span_at(conn, conn->spans - 1);
    if (tail->block == NULL ? tail->len >= VKP_I_COMPACT_BYTES / 4
                            : tail->len >= tail->block->capacity / 4 ||
                                  tail->block->capacity <= VKP_I_COMPACT_BYTES) {
        return; /* static bytes pin nothing, but a span each is long to search for a push to drop */
    }
    before = conn->spans > 2 ? vkp_i_span_at(conn, conn->spans - 2) : NULL;
    if (before != NULL && before->block != NULL && vkp_i_block_is_mine(before->block) &&
        before->block->capacity == VKP_I_COMPACT_BYTES &&
        (before->frames > 0) == (tail->frames > 0) &&
        (before->frames == 0 || conn->profile->config.ops->frame_len != NULL) &&
        before->data + before->len == vkp_i_block_data(before->block) + before->block->len &&
        tail->len <= before->block->capacity - before->block->len) {
        memcpy(vkp_i_block_data(before->block) + before->block->len, tail->data, tail->len);
        before->block->len += tail->len;
        before->len += tail->len;
        before->frames += tail->frames;
        vkp_i_block_unref(tail->block);
        conn->spans--;
        return;
    }
    joins = tail->frames == 0 || conn->profile->config.ops->frame_len != NULL;
    block = vkp_i_block_open(conn->loop->env,
                             VKP_I_MAX(joins ? (size_t)VKP_I_COMPACT_BYTES : 0, (size_t)tail->len));
    if (block == NULL) {
        return; /* pinned a while longer */
    }
    memcpy(vkp_i_block_data(block), tail->data, tail->len);
    block->len = tail->len;
    vkp_i_block_unref(tail->block);
    tail->block = block;
    tail->data = vkp_i_block_data(block);
}

static vkp_status vkp_i_spans_push(vkp_conn *conn, const vkp_bytes *frame, bool push)
{
    vkp_i_span *tail = conn->spans > 0 ? vkp_i_span_at(conn, conn->spans - 1) : NULL;
    if (tail != NULL && vkp_i_span_adjoins(conn, tail, frame, push)) {
        tail->len += (uint32_t)frame->len;
        tail->frames += push ? 1u : 0u;
    } else {
        vkp_i_span span;
        if ((conn->flags & VKP_I_CONN_BLOCKED) != 0) {
            vkp_i_spans_compact_tail(conn);
        }
        if (frame->len > 0x7fffffffu || !vkp_i_spans_reserve(conn)) {
            return VKP_ERR_NOMEM;
        }
        span.data = frame->data;
        span.block = vkp_i_block_ref(frame->block);
        span.len = (uint32_t)frame->len;
        span.frames = push ? 1 : 0;
        vkp_i_spans_append(conn, span);
    }
    conn->queued_bytes += frame->len;
    if (push) {
        conn->queued_frames++;
        conn->pushed_bytes += frame->len;
    }
    return VKP_OK;
}

#endif /* VKP_I_IO */
