#if VKP_I_IO
/* ======================================================================================
   >>impl-conn-queue   Connections: the struct, and its queue
   ======================================================================================
   Every field of a connection belongs to its loop's thread, except the atomic fields, `remote`
   and the inbox.
   The outbox is a queue of spans: neighbouring frames of one block are ONE span, which holds one
   reference and is written as one range. frame_len finds the borders of the frames again when
   the policy must drop one. A push writes only when the outbox is full: otherwise it defers the
   connection's task, and the round ends with one gathered write per connection.
   A push never closes the connection, because its caller may be iterating over many connections:
   vkp_i_conn_close_later sets VKP_I_CONN_CLOSES, and the deferred task closes.
   An idle connection has no buffers: input is read into the loop's block, and the start of an
   incomplete frame is kept in a block of its own size.                                        */

/* Values of vkp_conn.state. */
#define VKP_I_CONN_OPEN 0u
#define VKP_I_CONN_CLOSED 1u

/* Bits of vkp_conn.flags. */
#define VKP_I_CONN_CONNECTING 1u /* connect() has not finished */
#define VKP_I_CONN_PAUSED 2u     /* vkp_conn_pause was called: nothing is read */
#define VKP_I_CONN_ENDED 4u      /* the peer closed its sending side: nothing is read */
#define VKP_I_CONN_DRAINING 8u   /* vkp_conn_drain was called: closes when all queues are written */
#define VKP_I_CONN_BLOCKED 16u   /* the kernel's buffer is full: waits for VKP_IO_WRITE */
#define VKP_I_CONN_QUEUED 32u    /* vkp_conn.task is deferred */
#define VKP_I_CONN_CLOSES 64u    /* vkp_conn.task closes the connection with closes_reason */
#define VKP_I_CONN_REREAD 128u   /* resumed: the kept input is delivered to on_data again */
#define VKP_I_CONN_AHEAD 512u    /* with PAUSED: reads all the same, to see the peer's end */
#define VKP_I_CONN_INBOX_HELD 256u /* frames wait in the inbox for room in the outbox: no handler */

/* Defaults of vkp_conn_config. */
#define VKP_I_CONN_QUEUE_FRAMES 65536u
#define VKP_I_CONN_QUEUE_BYTES ((size_t)8 << 20)
#define VKP_I_CONN_INPUT_BYTES ((size_t)512 << 20)

/* The config and the counters that the connections of a listener, or of a relay's shard, share. */
typedef struct vkp_i_profile {
    const vkp_env *env;
    size_t refs;            /* atomic */
    uint64_t dropped;       /* atomic: pushes that the policy dropped, over all connections */
    size_t live;            /* open connections of vkp_i_conn_adopt; loop's thread */
    vkp_i_task *when_empty; /* deferred once when `live` becomes 0, or NULL; loop's thread */
    vkp_conn_config config;
} vkp_i_profile;

/* A range of the outbox: neighbouring frames of one block. */
typedef struct vkp_i_span {
    const uint8_t *data; /* the first byte that is not written */
    vkp_block *block;    /* holds one reference, or NULL: static bytes */
    uint32_t len;        /* bytes that are not written */
    uint32_t frames;     /* pushes in the span; 0: response stream, never dropped */
} vkp_i_span;

/* Frames that other threads pushed. */
typedef struct vkp_i_inbox {
    vkp_mpsc_tx *tx;      /* sender of vkp_bytes, used by every pushing thread */
    vkp_mpsc_rx *rx;      /* receiver of vkp_bytes, loop's thread */
    vkp_handler *handler; /* moves frames to the outbox; NULL while the inbox is held */
} vkp_i_inbox;

/* Close the inbox's handler: frames stay in the inbox until a handler is opened again. Loop's
   thread.                                                                                     */
static void vkp_i_inbox_hold(vkp_i_inbox *inbox)
{
    vkp_handler_unref(inbox->handler);
    inbox->handler = NULL;
}

#define VKP_I_CONNECT_TRIES 8 /* most addresses that one connect tries */

typedef struct vkp_i_connecting {
    vkp_address addresses[VKP_I_CONNECT_TRIES]; /* the peer's resolved addresses */
    size_t count;                               /* used elements of `addresses` */
    size_t next;                                /* index of the address to try next */
    vkp_conn *conn;                             /* whose connect this is */
    uint64_t deadline_ns;                       /* of the whole connect */
    vkp_timer timer;                            /* ends the share of an address */
} vkp_i_connecting;

/* The fields that a push uses are first: they fill two cache lines instead of five. */
struct vkp_conn {
    vkp_i_profile *profile; /* shared */
    uint32_t state;         /* atomic: VKP_I_CONN_OPEN or VKP_I_CONN_CLOSED */
    uint32_t flags;         /* VKP_I_CONN_CONNECTING and the other bits */
    vkp_i_span first;       /* the queue's head; the other spans are in the ring `more` */
    uint32_t spans;         /* spans in the queue, `first` included */
    uint32_t head_sent;     /* written bytes of `first`: first.data is that far behind its start */
    size_t queued_frames; /* pushes in the queue; written ones of `first` count until normalized */
    size_t queued_bytes;  /* bytes in the queue: pushes and response stream */
    size_t pushed_bytes;  /* bytes of pushes in the queue */
    vkp_i_task task;      /* deferred to the end of the round */
    vkp_loop *loop;       /* shared */
    size_t refs;          /* atomic; the loop holds one until the close, each queued task one */
    vkp_i_span *more;     /* ring of the spans behind `first`, or NULL */
    uint32_t more_capacity;         /* places in `more`: a power of two, or 0 */
    uint32_t more_head;             /* index in `more` of the span behind `first` */
    void *user;                     /* the program's pointer, an argument of every callback */
    vkp_io io;                      /* registration of fd */
    vkp_i_task remote;              /* closes the connection; queued by another thread */
    uint32_t remote_queued;         /* atomic: 1 once `remote` was queued */
    int fd;                         /* -1: none */
    int closes_error;               /* errno for on_close, set with VKP_I_CONN_CLOSES */
    vkp_close_reason closes_reason; /* reason for on_close, set with VKP_I_CONN_CLOSES */
    vkp_block *input;               /* bytes that on_data left, from input_begin on; or NULL */
    size_t input_begin;             /* offset in `input` of the first kept byte */
    uint64_t dropped;               /* atomic: pushes that the policy dropped */
    vkp_i_inbox *inbox;             /* NULL with loop_only */
    vkp_i_connecting *connecting;   /* NULL once connected */
    vkp_seat *seat;                 /* given back at the close; or NULL */
};

VKP_API const char *vkp_close_reason_str(vkp_close_reason reason)
{
    switch (reason) {
    case VKP_CLOSE_LOCAL:
        return "closed here";
    case VKP_CLOSE_PEER:
        return "closed by the peer";
    case VKP_CLOSE_ERROR:
        return "system error";
    case VKP_CLOSE_SLOW:
        return "peer too slow";
    case VKP_CLOSE_LOOP:
        return "loop closed";
    case VKP_CLOSE_NOMEM:
        return "out of memory";
    }
    return "unknown reason";
}

/* A profile with a copy of the config and its defaults; one reference, the caller's. NULL: no
   memory.                                                                                     */
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
            profile->config.queue_frames = VKP_I_CONN_QUEUE_FRAMES;
        }
        if (profile->config.queue_bytes == 0) {
            profile->config.queue_bytes = VKP_I_CONN_QUEUE_BYTES;
        }
        if (profile->config.input_bytes == 0) {
            profile->config.input_bytes = VKP_I_CONN_INPUT_BYTES;
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

/* The queue's span at index 0 (the head) to spans - 1. */
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

#define VKP_I_SPANS_FIRST 4u /* the ring's first capacity, a power of two */

/* Make room in the ring for one more span. False: no memory, nothing changed. */
static bool vkp_i_spans_reserve(vkp_conn *conn)
{
    uint32_t capacity = conn->more_capacity == 0 ? VKP_I_SPANS_FIRST : conn->more_capacity * 2;
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

/* Append a span to the queue, after vkp_i_spans_reserve. */
static void vkp_i_spans_append(vkp_conn *conn, vkp_i_span span)
{
    conn->spans++;
    *vkp_i_span_at(conn, conn->spans - 1) = span;
}

/* Remove the span at the index and give its block back. */
static void vkp_i_spans_remove(vkp_conn *conn, uint32_t index)
{
    vkp_i_block_unref(vkp_i_span_at(conn, index)->block);
    for (; index > 0; index--) { /* few spans precede the first push that may be dropped */
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

/* Length of the first of `frames` frames in the len bytes at data; len when frame_len finds
   none.                                                                                       */
static size_t vkp_i_span_frame(const vkp_conn *conn, const uint8_t *data, size_t len,
                               uint32_t frames)
{
    size_t frame = len;
    if (frames > 1) {
        frame = conn->profile->config.ops->frame_len(data, len);
    }
    return frame == 0 || frame > len ? len : frame;
}

/* Account for a partly written head: count its written frames off, and split the frame that is
   written in part from the frames behind it, because the connection must finish that frame.
   False: no memory, nothing changed.                                                          */
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
        head->frames = 0; /* partly written: it can no longer be dropped */
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

/* Count one push that the policy dropped. */
static void vkp_i_conn_count_drop(vkp_conn *conn)
{
    (void)VKP_I_ADD(&conn->dropped, (uint64_t)1);
    (void)VKP_I_ADD(&conn->profile->dropped, (uint64_t)1);
}

/* Drop the oldest push of which no byte is written. The head is normalized. False: there is
   none.                                                                                       */
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

#define VKP_I_SPAN_MAX 0x7fffffffu /* most bytes of one span */

/* Whether the frame extends the last span: the next bytes of its block, of the same kind (push
   or response stream), and frame_len can find the border between pushes.                      */
static bool vkp_i_span_adjoins(const vkp_conn *conn, const vkp_i_span *tail, const vkp_bytes *frame,
                               bool push)
{
    return tail->block != NULL && tail->block == frame->block &&
           tail->data + tail->len == frame->data && (tail->frames > 0) == push &&
           (!push || conn->profile->config.ops->frame_len != NULL) &&
           frame->len < VKP_I_SPAN_MAX - tail->len;
}

#define VKP_I_COMPACT_BYTES 4096u /* capacity of a private block that gathers small spans */
#define VKP_I_COMPACT_PART 4u     /* a span below 1 / 4 of its block is copied out of it */

/* A slow client must not pin a whole block for each queued frame. When the last span cannot grow
   and is a small part of its block, copy it behind the span before it, or else into a private
   block.                                                                                      */
static void vkp_i_spans_compact_tail(vkp_conn *conn)
{
    vkp_i_span *tail;
    vkp_i_span *before;
    vkp_block *block;
    bool joins; /* later frames may be copied behind it */
    if (conn->spans < 2) {
        return; /* the head may be partly written */
    }
    tail = vkp_i_span_at(conn, conn->spans - 1);
    if (tail->block == NULL ? tail->len >= VKP_I_COMPACT_BYTES / VKP_I_COMPACT_PART
                            : tail->len >= tail->block->capacity / VKP_I_COMPACT_PART ||
                                  tail->block->capacity <= VKP_I_COMPACT_BYTES) {
        return; /* static bytes pin no block, but many short spans make a drop's search slow */
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
        return; /* no memory: the span keeps its large block */
    }
    memcpy(vkp_i_block_data(block), tail->data, tail->len);
    block->len = tail->len;
    vkp_i_block_unref(tail->block);
    tail->block = block;
    tail->data = vkp_i_block_data(block);
}

/* Queue a frame; push: false for the response stream. NOMEM (or a frame above VKP_I_SPAN_MAX):
   the frame is not queued.                                                                    */
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
        if (frame->len > VKP_I_SPAN_MAX || !vkp_i_spans_reserve(conn)) {
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
