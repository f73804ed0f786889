#if VKP_I_IO
/* ======================================================================================
   >>impl-loop   One thread's event loop
   ======================================================================================
   A round: wait on the backend, dispatch descriptors, run the tasks that other threads queued, run
   timers, then run the deferred work of the round (writes, closes) until none is left, then check
   the unarmed handlers.
   Other threads reach the loop through ONE lock-free queue of tasks. A thread pushes a task and
   then loads `asleep`; the loop stores `asleep` and then loads the queue. All four are seq_cst, so
   at least one side sees the other: no task waits for an unrelated event. Only the first thread
   that pushes finds `asleep` set, clears it and calls the backend's wake.
   A registered descriptor has a slot with a generation. The token of an event carries index and
   generation, so an event that was fetched before a stop, or before the descriptor's number was
   used again, matches no slot and is dropped.
   This section takes no lock. Fields that change after open and are not atomic belong to the
   loop's thread. */

/* One call of a function on the loop's thread; queued or deferred, not both. */
typedef struct vkp_i_task {
    struct vkp_i_task *next;             /* the next task of the queue, or of the deferred list */
    void (*fn)(struct vkp_i_task *task); /* may free the task */
} vkp_i_task;

/* The link of an object that needs a callback at vkp_loop_close and has no registered descriptor,
   which would receive ready 0. */
typedef struct vkp_i_attached {
    struct vkp_i_attached *prev; /* NULL: not attached */
    struct vkp_i_attached *next;
    vkp_loop *loop;
    void (*on_loop_close)(struct vkp_i_attached *self); /* called once, after the detach */
} vkp_i_attached;

/* The place of a registered descriptor. */
typedef struct vkp_i_slot {
    vkp_io *io;          /* NULL: the slot is free */
    uint32_t generation; /* counts the stops of this slot; part of the token of an event */
    uint32_t next_free;  /* index + 1 of the next free slot, 0: none */
} vkp_i_slot;

/* The entry of a running timer in the heap. */
typedef struct vkp_i_timer_entry {
    uint64_t deadline_ns; /* at least the loop's time when the timer was started */
    uint64_t order;       /* number of the start: equal deadlines fire in this order */
    vkp_timer *timer;
} vkp_i_timer_entry;

struct vkp_loop {
    const vkp_env *env;
    vkp_env host_env; /* the env that the backend receives: alloc and sys are never NULL */
    const vkp_sys *sys;
    const vkp_backend *backend;
    void *backend_state;   /* returned by the backend's open */
    vkp_backend_host host; /* given to the backend's open, valid until its close */
    size_t refs;           /* atomic */
    int opener_pid;        /* the process that opened the loop; another one is a forked child */

    vkp_i_task
        *queue;      /* atomic: tasks, newest first; &vkp_i_queue_closed once the loop is closed */
    uint32_t asleep; /* atomic, seq_cst with queue: 1 while a push must call the backend's wake */
    uint32_t stopping; /* atomic: vkp_loop_stop was called */
    uintptr_t thread;  /* atomic: the loop's thread (vkp_i_this_thread); 0: any thread */
    uint32_t running;  /* atomic: a thread is inside vkp_loop_run or vkp_loop_run_once */

    bool in_round;         /* inside a round or inside vkp_loop_close */
    bool closed;           /* vkp_loop_close was called */
    uint32_t unpolled;     /* rounds in a row that did not call the backend's wait */
    uint64_t reminder_ns;  /* guests: the deadline last given to the backend's timer */
    bool reminded;         /* guests: the timer for reminder_ns is set and has not fired */
    vkp_i_waiters unarmed; /* handlers that did not join their case: each round checks them */
    uint64_t now_ns;       /* the clock, read once in each round */
    vkp_event *events;     /* the events of one wait */
    size_t event_capacity;
    vkp_i_slot *slots;
    size_t slot_count; /* slots ever used, the free ones included */
    size_t slot_capacity;
    uint32_t free_slot;        /* index + 1 of the first free slot, 0: none */
    vkp_i_timer_entry *timers; /* a binary heap, the earliest deadline first */
    size_t timer_count;
    size_t timer_capacity;
    uint64_t timer_order;      /* number of the next start, see vkp_i_timer_entry */
    vkp_i_task *deferred;      /* tasks for the end of the round, oldest first */
    vkp_i_task **deferred_end; /* where the next deferred task is linked */
    vkp_i_attached attached;   /* sentinel of the ring of attached objects */
    vkp_block *read_block;     /* the read buffer that the loop's connections share */
    size_t read_bytes;         /* bytes of one read */
};

static vkp_i_task vkp_i_queue_closed; /* marks the queue of a closed loop; never run */

/* Identifies the calling thread: the address of a thread-local variable is cheap and unique. */
static uintptr_t vkp_i_this_thread(void)
{
    static __thread char name;
    return (uintptr_t)&name;
}

/* True on the loop's thread: first the thread that opened the loop, then the thread that runs it,
   also between rounds of vkp_loop_run_once. After vkp_loop_run or vkp_loop_close returned, true on
   any thread. */
static bool vkp_i_on_loop(const vkp_loop *loop)
{
    uintptr_t thread = VKP_I_LOAD_ACQ(&loop->thread);
    return thread == 0 || thread == vkp_i_this_thread();
}

/* Queue a task. Any thread. False: the loop is closed and the task stays the caller's. */
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

/* A deadline that never comes, but keeps a guest's timer set. */
#define VKP_I_SOME_DAY (VKP_FOREVER - 1)

/* Give a guest backend the next deadline: the foreign loop waits and knows only the timer set here.
   Called at the end of each round, and by every function that makes work outside of rounds. While
   objects are attached but nothing has a deadline, the timer is set to VKP_I_SOME_DAY: a foreign
   loop without timers would end although, for example, a handler waits for a channel. */
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

/* Add an object to the ring whose on_loop_close is called by vkp_loop_close. Loop's thread. */
static void vkp_i_loop_attach(vkp_loop *loop, vkp_i_attached *object)
{
    object->prev = loop->attached.prev;
    object->next = &loop->attached;
    object->loop = loop;
    loop->attached.prev->next = object;
    loop->attached.prev = object;
    (void)!vkp_i_loop_set_guest_timer(loop);
}

/* Idempotent. Loop's thread. */
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

/* Run a list of tasks, oldest first: the list arrives newest first. */
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

/* Run deferred tasks until none is left: a task deferred by a task runs in this round, too. */
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

/* Read the backend's virtual clock, or the system's clock. */
static uint64_t vkp_i_loop_clock(const vkp_loop *loop)
{
    return loop->backend->clock_ns != NULL ? loop->backend->clock_ns(loop->backend_state)
                                           : loop->sys->clock_ns();
}

/* The time of the round. Between rounds now_ns may be old (a foreign loop waits), so the clock is
   read. */
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

/* True in a forked child: it shares kernel objects with its parent, so it only frees memory. */
static bool vkp_i_loop_is_forked(const vkp_loop *loop)
{
    return loop->sys->process_id() != loop->opener_pid;
}

/* Notify attached objects, then every registered descriptor (with ready 0), of the close. */
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
    (void)vkp_loop_ref(loop); /* an object that closes here may give the last reference back */
    /* Another thread may have run the rounds: callbacks need this one to be the loop's thread. */
    VKP_I_STORE_REL(&loop->thread, vkp_i_this_thread());
    loop->in_round = true;
    vkp_i_loop_run_queued(loop);
    loop->closed = true; /* from here on nothing opens: it would miss the close */
    vkp_i_loop_close_objects(loop);
    vkp_i_loop_run_deferred(loop);
    /* Tasks that are queued by now run; tasks that they queue are refused. */
    vkp_i_run_tasks(VKP_I_XCHG_SEQ(&loop->queue, &vkp_i_queue_closed));
    vkp_i_loop_run_deferred(loop);
    while (loop->timer_count >
           0) { /* marked as stopped: vkp_timer_stop may come after the loop is freed */
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
        (void)VKP_I_SUB(&loop->refs, 1); /* called by the last unref, which frees the loop */
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

/* ---- registered descriptors ---- */

/* The token of a slot: generation in the upper 32 bits, index in the lower. */
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

/* Call the descriptor's callback, unless the slot was stopped or used again since the wait. */
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

/* Whether timer a fires before timer b. */
static bool vkp_i_timer_before(const vkp_i_timer_entry *a, const vkp_i_timer_entry *b)
{
    return a->deadline_ns != b->deadline_ns ? a->deadline_ns < b->deadline_ns : a->order < b->order;
}

/* Store an entry in the heap and record its index in the timer. */
static void vkp_i_timer_place(vkp_loop *loop, size_t index, vkp_i_timer_entry entry)
{
    loop->timers[index] = entry;
    entry.timer->i_index = index + 1;
}

/* Place an entry at the index or nearer to the root, where the heap's order holds. */
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

/* Place an entry at the index or farther from the root, where the heap's order holds. */
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

/* Take a timer out of the heap; the last entry fills the hole. Idempotent. */
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
        (void)!vkp_i_loop_set_guest_timer(timer->i_loop); /* on failure: one idle round */
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
    /* Overdue timers are equally due: a timer that restarts itself in the past fires last. */
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

/* a + b, or VKP_FOREVER on overflow. */
static uint64_t vkp_i_add_ns(uint64_t a, uint64_t b)
{
    return b > VKP_FOREVER - a ? VKP_FOREVER : a + b;
}

/* Run the timers that were started before this call and are due. A timer that restarts itself in
   the past fires again in the next round, so the round ends. */
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
            /* Cannot fail for memory: the removed entry left room in the heap. */
            (void)!vkp_timer_start(timer, loop, timer->i_fn, timer->i_period_ns, next);
        }
        timer->i_fn(timer);
    }
}

#endif /* VKP_I_IO */
