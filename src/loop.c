#if VKP_I_IO
/* ======================================================================================
   >>impl-loop   One thread's event loop
   ======================================================================================
   A round: wait on the backend, dispatch descriptors, run what other threads queued, run timers,
   then the deferred work of the round (writes, closes), until there is none.
   Other threads reach the loop through ONE lock-free queue of tasks. Whoever pushes looks at
   `asleep` afterwards, the loop sets `asleep` and looks at the queue afterwards, all seq_cst: one
   of the two sees the other, so no task waits for an unrelated event. Only the first pusher
   finds `asleep` set and pays for the backend's wake.
   A watch is a slot with a generation; the token of an event carries both, so that an event
   fetched before a stop, or before the descriptor's number was used again, finds no one.      */

typedef struct vkp_i_task {
    struct vkp_i_task *next;
    void (*fn)(struct vkp_i_task *task); /* may free the task */
} vkp_i_task;

/* Objects that must hear of vkp_loop_close and have no watch to hear it through. */
typedef struct vkp_i_attached {
    struct vkp_i_attached *prev;
    struct vkp_i_attached *next;
    vkp_loop *loop;
    void (*on_loop_close)(struct vkp_i_attached *self);
} vkp_i_attached;

typedef struct vkp_i_slot {
    vkp_io *io; /* NULL: free */
    uint32_t generation;
    uint32_t next_free; /* index + 1 */
} vkp_i_slot;

typedef struct vkp_i_timer_entry {
    uint64_t deadline_ns;
    uint64_t order; /* of starts: equal deadlines fire in that order */
    vkp_timer *timer;
} vkp_i_timer_entry;

struct vkp_loop {
    const vkp_env *env;
    vkp_env host_env; /* what the backend sees: nothing NULL */
    const vkp_sys *sys;
    const vkp_backend *backend;
    void *backend_state;
    vkp_backend_host host;
    size_t refs; /* atomic */
    int opener_pid;

    vkp_i_task *queue; /* atomic: newest first, vkp_i_queue_closed after the end */
    uint32_t asleep;   /* atomic, seq_cst with queue */
    uint32_t stopping; /* atomic */
    uintptr_t thread;  /* atomic: whose it is, 0 nobody's */
    uint32_t running;  /* atomic: inside vkp_loop_run or vkp_loop_run_once */

    bool in_round;
    bool closed;
    uint32_t unpolled;     /* rounds since the backend was asked */
    uint64_t reminder_ns;  /* when a guest calls for a round by itself */
    bool reminded;         /* it still does */
    vkp_i_waiters unarmed; /* case watches that look by themselves until the loop would sleep */
    uint64_t now_ns;
    vkp_event *events;
    size_t event_capacity;
    vkp_i_slot *slots;
    size_t slot_count;
    size_t slot_capacity;
    uint32_t free_slot; /* index + 1 */
    vkp_i_timer_entry *timers;
    size_t timer_count;
    size_t timer_capacity;
    uint64_t timer_order;
    vkp_i_task *deferred; /* oldest first */
    vkp_i_task **deferred_end;
    vkp_i_attached attached; /* ring */
    vkp_block *read_block;   /* the connections' */
    size_t read_bytes;
};

static vkp_i_task vkp_i_queue_closed; /* a mark, never run */

/* The address of a thread-local is a cheap name for a thread. */
static uintptr_t vkp_i_this_thread(void)
{
    static __thread char name;
    return (uintptr_t)&name;
}

/* True on the loop's thread: at first the one that opened it, then the one that runs it, also
   between rounds of vkp_loop_run_once. After vkp_loop_run returned it is nobody's: anybody's. */
static bool vkp_i_on_loop(const vkp_loop *loop)
{
    uintptr_t thread = VKP_I_LOAD_ACQ(&loop->thread);
    return thread == 0 || thread == vkp_i_this_thread();
}

/* Queue a task from any thread. False: the loop was closed, the task stays the caller's. */
static bool vkp_i_loop_queue(vkp_loop *loop, vkp_i_task *task)
{
    vkp_i_task *newest = VKP_I_LOAD(&loop->queue);
    do {
        if (newest == &vkp_i_queue_closed) {
            return false;
        }
        task->next = newest;
    } while (!VKP_I_CAS_SEQ(&loop->queue, &newest, task));
    if (VKP_I_LOAD_SEQ(&loop->asleep) != 0 && VKP_I_XCHG_SEQ(&loop->asleep, 0u) != 0) {
        loop->backend->wake(loop->backend_state);
    }
    return true;
}

#define VKP_I_SOME_DAY (VKP_FOREVER - 1)

/* A guest's wait is elsewhere, and knows of the next deadline only what it is told. A round ends
   with this; so does whatever makes work outside of rounds. Objects that have no deadline still
   have a day: its timer keeps the foreign loop from ending while, say, a channel is under watch. */
static vkp_status vkp_i_loop_set_guest_timer(vkp_loop *loop)
{
    uint64_t deadline_ns;
    vkp_status status = VKP_OK;
    if (loop->backend->timer == NULL || loop->in_round || loop->closed) {
        return VKP_OK;
    }
    deadline_ns = vkp_loop_get_deadline_ns(loop);
    if (deadline_ns == VKP_FOREVER && loop->attached.next != &loop->attached) {
        deadline_ns = VKP_I_SOME_DAY;
    }
    if (!loop->reminded || deadline_ns != loop->reminder_ns) {
        status = loop->backend->timer(loop->backend_state, deadline_ns);
        loop->reminded = status == VKP_OK;
        loop->reminder_ns = deadline_ns;
    }
    return status;
}

/* Run a task at the end of this round. Loop's thread. */
static void vkp_i_loop_defer(vkp_loop *loop, vkp_i_task *task)
{
    task->next = NULL;
    *loop->deferred_end = task;
    loop->deferred_end = &task->next;
    (void)!vkp_i_loop_set_guest_timer(loop);
}

static void vkp_i_loop_attach(vkp_loop *loop, vkp_i_attached *object)
{
    object->prev = loop->attached.prev;
    object->next = &loop->attached;
    object->loop = loop;
    loop->attached.prev->next = object;
    loop->attached.prev = object;
    (void)!vkp_i_loop_set_guest_timer(loop);
}

static void vkp_i_loop_detach(vkp_i_attached *object)
{
    if (object->prev != NULL) {
        object->prev->next = object->next;
        object->next->prev = object->prev;
        object->prev = NULL;
        object->next = NULL;
        (void)!vkp_i_loop_set_guest_timer(object->loop);
    }
}

static void vkp_i_run_tasks(vkp_i_task *newest)
{
    vkp_i_task *oldest = NULL;
    while (newest != NULL) {
        vkp_i_task *next = newest->next;
        newest->next = oldest;
        oldest = newest;
        newest = next;
    }
    while (oldest != NULL) {
        vkp_i_task *next = oldest->next;
        oldest->fn(oldest);
        oldest = next;
    }
}

static void vkp_i_loop_run_queued(vkp_loop *loop)
{
    if (VKP_I_LOAD_SEQ(&loop->queue) != NULL) {
        vkp_i_run_tasks(VKP_I_XCHG_SEQ(&loop->queue, (vkp_i_task *)NULL));
    }
}

/* Work deferred by deferred work runs in the same round. */
static void vkp_i_loop_run_deferred(vkp_loop *loop)
{
    while (loop->deferred != NULL) {
        vkp_i_task *task = loop->deferred;
        loop->deferred = task->next;
        if (loop->deferred == NULL) {
            loop->deferred_end = &loop->deferred;
        }
        task->fn(task);
    }
}

static uint64_t vkp_i_loop_clock(const vkp_loop *loop)
{
    return loop->backend->clock_ns != NULL ? loop->backend->clock_ns(loop->backend_state)
                                           : loop->sys->clock_ns();
}

/* Between rounds the last round's time may be long ago: another loop may do the waiting. */
static uint64_t vkp_i_loop_now(const vkp_loop *loop)
{
    return loop->in_round ? loop->now_ns : vkp_i_loop_clock(loop);
}

VKP_API vkp_loop *vkp_loop_ref(vkp_loop *loop)
{
    (void)VKP_I_ADD(&loop->refs, 1);
    return loop;
}

VKP_API void vkp_loop_unref(vkp_loop *loop)
{
    if (loop == NULL || VKP_I_UNREF(&loop->refs) != 1) {
        return;
    }
    vkp_loop_close(loop);
    loop->backend->close(loop->backend_state);
    vkp_i_block_unref(loop->read_block);
    vkp_i_free(loop->env, loop->events, loop->event_capacity * sizeof(vkp_event));
    vkp_i_free(loop->env, loop->slots, loop->slot_capacity * sizeof(vkp_i_slot));
    vkp_i_free(loop->env, loop->timers, loop->timer_capacity * sizeof(vkp_i_timer_entry));
    vkp_i_free(loop->env, loop, sizeof *loop);
}

/* In a forked child the parent's connections are left alone: only memory is given back. */
static bool vkp_i_loop_is_forked(const vkp_loop *loop)
{
    return loop->sys->process_id() != loop->opener_pid;
}

static void vkp_i_loop_close_objects(vkp_loop *loop)
{
    size_t i;
    while (loop->attached.next != &loop->attached) {
        vkp_i_attached *object = loop->attached.next;
        vkp_i_loop_detach(object);
        object->on_loop_close(object);
    }
    for (i = 0; i < loop->slot_count; i++) {
        vkp_io *io = loop->slots[i].io;
        if (io != NULL) {
            vkp_io_stop(io);
            io->i_fn(io, 0);
        }
    }
}

VKP_API void vkp_loop_close(vkp_loop *loop)
{
    if (loop == NULL || loop->closed || loop->in_round) {
        return;
    }
    (void)vkp_loop_ref(loop); /* the last object may hold the last reference */
    /* Ours now, should another thread have run rounds: what is called here is on the loop. */
    VKP_I_STORE_REL(&loop->thread, vkp_i_this_thread());
    loop->in_round = true;
    vkp_i_loop_run_queued(loop);
    loop->closed = true; /* nothing new opens: it would never hear of the close */
    vkp_i_loop_close_objects(loop);
    vkp_i_loop_run_deferred(loop);
    /* What was posted so far runs; what it posts is refused. */
    vkp_i_run_tasks(VKP_I_XCHG_SEQ(&loop->queue, &vkp_i_queue_closed));
    vkp_i_loop_run_deferred(loop);
    while (loop->timer_count > 0) { /* stopped: their owners may say so after the loop is gone */
        loop->timers[--loop->timer_count].timer->i_index = 0;
    }
    loop->in_round = false;
    if (loop->backend->timer != NULL) {
        (void)loop->backend->timer(loop->backend_state, VKP_FOREVER);
    }
    VKP_I_STORE_REL(&loop->thread, (uintptr_t)0);
    if (VKP_I_LOAD_ACQ(&loop->refs) > 1) {
        vkp_loop_unref(loop);
    } else {
        (void)VKP_I_SUB(&loop->refs, 1); /* called by the last unref, which goes on */
    }
}

VKP_API uint64_t vkp_loop_get_now_ns(const vkp_loop *loop)
{
    return vkp_i_loop_now(loop);
}

VKP_API uint64_t vkp_loop_after_ms(const vkp_loop *loop, uint64_t ms)
{
    return vkp_i_after_ms(vkp_loop_get_now_ns(loop), ms);
}

VKP_API int vkp_loop_get_fd(const vkp_loop *loop)
{
    return loop->backend->pollable_fd != NULL ? loop->backend->pollable_fd(loop->backend_state)
                                              : -1;
}

VKP_API uint64_t vkp_loop_get_deadline_ns(const vkp_loop *loop)
{
    if (VKP_I_LOAD_SEQ(&loop->queue) != NULL || loop->deferred != NULL ||
        !vkp_i_waiters_empty(&loop->unarmed)) {
        return 0;
    }
    return loop->timer_count > 0 ? loop->timers[0].deadline_ns : VKP_FOREVER;
}

/* ---- watches ---- */

static uint64_t vkp_i_io_token(const vkp_loop *loop, uint32_t slot)
{
    return ((uint64_t)loop->slots[slot].generation << 32) | slot;
}

VKP_API vkp_status vkp_io_start(vkp_io *io, vkp_loop *loop, int fd, uint32_t interest,
                                void (*fn)(vkp_io *io, uint32_t ready))
{
    uint32_t slot;
    vkp_status status;
    VKP_I_REQUIRE(loop != NULL && io != NULL && fd >= 0 && fn != NULL);
    VKP_I_REQUIRE(!loop->closed && vkp_i_on_loop(loop));
    if (loop->free_slot != 0) {
        slot = loop->free_slot - 1;
    } else {
        void *slots = loop->slots;
        if (!vkp_i_grow(loop->env, &slots, &loop->slot_capacity, loop->slot_count + 1,
                        sizeof(vkp_i_slot))) {
            return VKP_ERR_NOMEM;
        }
        loop->slots = (vkp_i_slot *)slots;
        slot = (uint32_t)loop->slot_count++;
        memset(&loop->slots[slot], 0, sizeof loop->slots[slot]);
        loop->slots[slot].next_free = loop->free_slot;
        loop->free_slot = slot + 1;
    }
    status = loop->backend->set_interest(loop->backend_state, fd,
                                         interest & (VKP_IO_READ | VKP_IO_WRITE),
                                         vkp_i_io_token(loop, slot));
    if (status != VKP_OK) {
        return status;
    }
    loop->free_slot = loop->slots[slot].next_free;
    loop->slots[slot].io = io;
    io->i_loop = loop;
    io->i_fn = fn;
    io->i_fd = fd;
    io->i_slot = slot;
    io->i_interest = interest;
    return VKP_OK;
}

VKP_API vkp_status vkp_io_set(vkp_io *io, uint32_t interest)
{
    vkp_loop *loop;
    vkp_status status;
    VKP_I_REQUIRE(io != NULL && io->i_loop != NULL);
    loop = io->i_loop;
    interest &= VKP_IO_READ | VKP_IO_WRITE;
    if (io->i_interest == interest) {
        return VKP_OK;
    }
    status = loop->backend->set_interest(loop->backend_state, io->i_fd, interest,
                                         vkp_i_io_token(loop, io->i_slot));
    if (status == VKP_OK) {
        io->i_interest = interest;
    }
    return status;
}

VKP_API void vkp_io_stop(vkp_io *io)
{
    vkp_loop *loop = io->i_loop;
    vkp_i_slot *slot;
    if (loop == NULL) {
        return;
    }
    slot = &loop->slots[io->i_slot];
    if (!vkp_i_loop_is_forked(loop)) {
        (void)loop->backend->set_interest(loop->backend_state, io->i_fd, 0,
                                          vkp_i_io_token(loop, io->i_slot));
    }
    slot->io = NULL;
    slot->generation++;
    slot->next_free = loop->free_slot;
    loop->free_slot = io->i_slot + 1;
    io->i_loop = NULL;
}

static void vkp_i_loop_dispatch(vkp_loop *loop, const vkp_event *event)
{
    uint32_t index = (uint32_t)(event->token & 0xffffffffu);
    vkp_i_slot *slot = index < loop->slot_count ? &loop->slots[index] : NULL;
    if (slot != NULL && slot->io != NULL && event->ready != 0 &&
        slot->generation == (uint32_t)(event->token >> 32)) {
        slot->io->i_fn(slot->io, event->ready);
    }
}

/* ---- timers: a binary heap, earliest first ---- */

static bool vkp_i_timer_before(const vkp_i_timer_entry *a, const vkp_i_timer_entry *b)
{
    return a->deadline_ns != b->deadline_ns ? a->deadline_ns < b->deadline_ns : a->order < b->order;
}

static void vkp_i_timer_place(vkp_loop *loop, size_t index, vkp_i_timer_entry entry)
{
    loop->timers[index] = entry;
    entry.timer->i_index = index + 1;
}

static void vkp_i_timer_sift_up(vkp_loop *loop, size_t index, vkp_i_timer_entry entry)
{
    while (index > 0) {
        size_t parent = (index - 1) / 2;
        if (!vkp_i_timer_before(&entry, &loop->timers[parent])) {
            break;
        }
        vkp_i_timer_place(loop, index, loop->timers[parent]);
        index = parent;
    }
    vkp_i_timer_place(loop, index, entry);
}

static void vkp_i_timer_sift_down(vkp_loop *loop, size_t index, vkp_i_timer_entry entry)
{
    for (;;) {
        size_t child = 2 * index + 1;
        if (child >= loop->timer_count) {
            break;
        }
        if (child + 1 < loop->timer_count &&
            vkp_i_timer_before(&loop->timers[child + 1], &loop->timers[child])) {
            child++;
        }
        if (!vkp_i_timer_before(&loop->timers[child], &entry)) {
            break;
        }
        vkp_i_timer_place(loop, index, loop->timers[child]);
        index = child;
    }
    vkp_i_timer_place(loop, index, entry);
}

static void vkp_i_timer_remove(vkp_timer *timer)
{
    vkp_loop *loop = timer->i_loop;
    size_t index;
    vkp_i_timer_entry last;
    if (timer->i_index == 0) {
        return;
    }
    index = timer->i_index - 1;
    timer->i_index = 0;
    last = loop->timers[--loop->timer_count];
    if (index == loop->timer_count) {
        return;
    }
    if (index > 0 && vkp_i_timer_before(&last, &loop->timers[(index - 1) / 2])) {
        vkp_i_timer_sift_up(loop, index, last);
    } else {
        vkp_i_timer_sift_down(loop, index, last);
    }
}

VKP_API void vkp_timer_stop(vkp_timer *timer)
{
    if (timer->i_index != 0) {
        vkp_i_timer_remove(timer);
        (void)!vkp_i_loop_set_guest_timer(timer->i_loop); /* if it fails: a round too many */
    }
}

VKP_API vkp_status vkp_timer_start(vkp_timer *timer, vkp_loop *loop, void (*fn)(vkp_timer *timer),
                                   uint64_t period_ns, uint64_t deadline_ns)
{
    vkp_i_timer_entry entry;
    void *timers;
    vkp_status status;
    VKP_I_REQUIRE(loop != NULL && timer != NULL && fn != NULL && vkp_i_on_loop(loop));
    timers = loop->timers;
    if (!vkp_i_grow(loop->env, &timers, &loop->timer_capacity, loop->timer_count + 1,
                    sizeof(vkp_i_timer_entry))) {
        return VKP_ERR_NOMEM;
    }
    loop->timers = (vkp_i_timer_entry *)timers;
    vkp_i_timer_remove(timer);
    timer->i_loop = loop;
    timer->i_fn = fn;
    timer->i_deadline_ns = deadline_ns;
    timer->i_period_ns = period_ns;
    /* All that is overdue is equally due: one that restarts itself in the past comes last. */
    entry.deadline_ns = VKP_I_MAX(deadline_ns, loop->now_ns);
    entry.order = loop->timer_order++;
    entry.timer = timer;
    vkp_i_timer_sift_up(loop, loop->timer_count++, entry);
    status = vkp_i_loop_set_guest_timer(loop);
    if (status != VKP_OK) {
        vkp_timer_stop(timer);
    }
    return status;
}

static uint64_t vkp_i_add_ns(uint64_t a, uint64_t b)
{
    return b > VKP_FOREVER - a ? VKP_FOREVER : a + b;
}

/* Only timers that were due when the round looked: one that restarts itself in the past does not
   keep the round from ending.                                                                 */
static void vkp_i_loop_run_timers(vkp_loop *loop)
{
    uint64_t newest = loop->timer_order;
    while (loop->timer_count > 0 && loop->timers[0].deadline_ns <= loop->now_ns &&
           loop->timers[0].order < newest) {
        vkp_timer *timer = loop->timers[0].timer;
        vkp_i_timer_remove(timer);
        if (timer->i_period_ns != 0) {
            uint64_t next = vkp_i_add_ns(timer->i_deadline_ns, timer->i_period_ns);
            if (next <= loop->now_ns) {
                next = vkp_i_add_ns(loop->now_ns, timer->i_period_ns);
            }
            /* There is room: the entry just left. */
            (void)!vkp_timer_start(timer, loop, timer->i_fn, timer->i_period_ns, next);
        }
        timer->i_fn(timer);
    }
}

#endif /* VKP_I_IO */
