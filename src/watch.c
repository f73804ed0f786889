/* ======================================================================================
   >>impl-watch   Only the newest value
   ======================================================================================
   Values lie in cells. A sender fills a cell that is not current, not pinned by a borrow, and owns
   no value, and makes it current; a borrower pins the current cell. Both do so under the latch,
   for a few instructions (vkp_watch_send_if_modified: while modify runs). drop runs without the
   latch.
   Copying a value out takes no latch: a receiver loads the `seq` of the cell before and after it
   copies the words, and `seq` changes whenever the cell is filled. Words are stored with release
   and loaded with acquire: a receiver that loads a word of a later value also sees the later
   `seq`.
   A receiver that waits for a change is linked in `receivers` (section receivers); each new
   version wakes all waiting receivers after `version` is stored.                               */

typedef struct vkp_i_cell {
    struct vkp_i_cell *next; /* under the latch: the next of all cells */
    uint64_t seq;            /* atomic: version << 1; odd while the cell is filled */
    size_t pins;             /* under the latch: borrows of this cell */
    bool owns;               /* under the latch: holds a value that still has to be dropped */
    uint64_t words[1];       /* atomic: the value; longer than declared, see vkp_i_cell_bytes */
} vkp_i_cell;

typedef struct vkp_i_watch {
    vkp_watch_config config; /* a copy; config.env is not NULL */
    size_t words;            /* of one value */
    size_t refs;             /* atomic: one of all senders together, one of each receiver */
    size_t tx_refs;          /* atomic: references of senders */
    unsigned char pad_sender[VKP_I_APART];
    vkp_i_biased_latch latch; /* held for the changes of cells and versions */
    uint64_t version;         /* atomic: of the newest value */
    vkp_i_cell *current;      /* atomic: the cell of the newest value */
    vkp_i_cell *cells;        /* under the latch: all cells */
    uint64_t *scratch;        /* under the latch: for vkp_watch_send_if_modified, or NULL */
    vkp_i_receivers receivers;
} vkp_i_watch;

struct vkp_watch_tx {
    vkp_i_watch watch;
};

struct vkp_watch_rx {
    vkp_i_watch *watch;
    uint64_t seen;        /* newest version that counts as seen */
    vkp_i_cell *borrowed; /* cell of the current borrow, or NULL */
};

/* The size of a cell with its value. */
static size_t vkp_i_cell_bytes(const vkp_i_watch *watch)
{
    return sizeof(vkp_i_cell) + (watch->words - 1) * sizeof(uint64_t);
}

/* Latched: a cell to fill, whose seq is odd until vkp_i_watch_publish; NULL without memory. */
static vkp_i_cell *vkp_i_watch_take_cell(vkp_i_watch *watch)
{
    vkp_i_cell *cell = watch->cells;
    while (cell != NULL && (cell == VKP_I_LOAD(&watch->current) || cell->pins != 0 || cell->owns)) {
        cell = cell->next;
    }
    if (cell == NULL) {
        cell = (vkp_i_cell *)vkp_i_alloc_zero(watch->config.env, vkp_i_cell_bytes(watch));
        if (cell == NULL) {
            return NULL;
        }
        cell->next = watch->cells;
        watch->cells = cell;
    }
    VKP_I_STORE(&cell->seq, VKP_I_LOAD(&cell->seq) | 1u);
    return cell;
}

/* Latched: the cell is filled, and becomes the newest version. Gives the replaced cell if its
   value is to be dropped now, else NULL.                                                       */
static vkp_i_cell *vkp_i_watch_publish(vkp_i_watch *watch, vkp_i_cell *cell)
{
    vkp_i_cell *old = VKP_I_LOAD(&watch->current);
    uint64_t version = VKP_I_LOAD(&watch->version) + 1;
    cell->owns = watch->config.drop != NULL;
    VKP_I_STORE_REL(&cell->seq, version << 1);
    VKP_I_STORE_REL(&watch->current, cell);
    VKP_I_STORE_REL(&watch->version, version);
    return old != NULL && old->owns && old->pins == 0 ? old : NULL;
}

/* Drop the value of a replaced cell that no receiver borrows; NULL is ignored. `owns` keeps
   senders from filling the cell until the drop has returned.                                   */
static void vkp_i_watch_drop(vkp_i_watch *watch, vkp_i_cell *cell)
{
    if (cell != NULL) {
        bool biased;
        watch->config.drop(watch->config.user, cell->words);
        biased = vkp_i_biased_lock(&watch->latch, watch->config.env);
        cell->owns = false;
        vkp_i_biased_unlock(&watch->latch, biased);
    }
}

/* Give one of `refs` back; the last one drops the values and frees the channel. */
static void vkp_i_watch_unref(vkp_i_watch *watch)
{
    const vkp_env *env = watch->config.env;
    if (VKP_I_UNREF(&watch->refs) != 1) {
        return;
    }
    while (watch->cells != NULL) {
        vkp_i_cell *cell = watch->cells;
        watch->cells = cell->next;
        if (cell->owns) {
            watch->config.drop(watch->config.user, cell->words);
        }
        vkp_i_free(env, cell, vkp_i_cell_bytes(watch));
    }
    if (watch->scratch != NULL) {
        vkp_i_free(env, watch->scratch, watch->words * sizeof(uint64_t));
    }
    vkp_i_receivers_deinit(&watch->receivers);
    vkp_i_free(env, watch, sizeof *watch);
}

VKP_API vkp_status vkp_watch_open(const vkp_watch_config *config, vkp_watch_tx **tx)
{
    const vkp_env *env;
    vkp_i_watch *watch;
    vkp_i_cell *cell;
    VKP_I_REQUIRE(config != NULL && tx != NULL);
    VKP_I_REQUIRE(config->elem_bytes > 0 && config->elem_bytes <= VKP_I_ELEM_MAX);
    env = vkp_i_env(config->env);
    watch = (vkp_i_watch *)vkp_i_alloc_zero(env, sizeof *watch);
    if (watch == NULL) {
        return VKP_ERR_NOMEM;
    }
    watch->config = *config;
    watch->config.env = env;
    watch->words = (config->elem_bytes + sizeof(uint64_t) - 1) / sizeof(uint64_t);
    cell = vkp_i_watch_take_cell(watch);
    if (cell == NULL) {
        vkp_i_free(env, watch, sizeof *watch);
        return VKP_ERR_NOMEM;
    }
    if (config->initial != NULL) {
        vkp_i_words_store(cell->words, config->initial, config->elem_bytes);
    }
    (void)vkp_i_watch_publish(watch, cell);
    cell->owns = config->drop != NULL && config->initial != NULL;
    watch->refs = 1;
    watch->tx_refs = 1;
    vkp_i_receivers_init(&watch->receivers, env);
    vkp_i_biased_init(&watch->latch, watch->receivers.fenced);
    *tx = (vkp_watch_tx *)(void *)watch;
    return VKP_OK;
}

VKP_API vkp_watch_tx *vkp_watch_tx_ref(vkp_watch_tx *tx)
{
    (void)VKP_I_ADD(&tx->watch.tx_refs, (size_t)1);
    return tx;
}

VKP_API void vkp_watch_tx_unref(vkp_watch_tx *tx)
{
    vkp_i_watch *watch;
    if (tx == NULL) {
        return;
    }
    watch = &tx->watch;
    if (VKP_I_UNREF(&watch->tx_refs) == 1) {
        vkp_i_receivers_end(&watch->receivers);
        vkp_i_watch_unref(watch);
    }
}

/* A receiver for which the version `seen` counts as seen. OK or NOMEM. */
static vkp_status vkp_i_watch_subscribe(vkp_i_watch *watch, uint64_t seen, vkp_watch_rx **rx)
{
    vkp_watch_rx *self = (vkp_watch_rx *)vkp_i_alloc_zero(watch->config.env, sizeof *self);
    if (self == NULL) {
        return VKP_ERR_NOMEM;
    }
    self->watch = watch;
    self->seen = seen;
    (void)VKP_I_ADD(&watch->refs, (size_t)1);
    (void)VKP_I_ADD(&watch->receivers.receivers, (size_t)1);
    *rx = self;
    return VKP_OK;
}

VKP_API vkp_status vkp_watch_subscribe(vkp_watch_tx *tx, vkp_watch_rx **rx)
{
    VKP_I_REQUIRE(tx != NULL && rx != NULL);
    return vkp_i_watch_subscribe(&tx->watch, VKP_I_LOAD_ACQ(&tx->watch.version), rx);
}

VKP_API vkp_status vkp_watch_rx_clone(vkp_watch_rx *rx, vkp_watch_rx **copy)
{
    VKP_I_REQUIRE(rx != NULL && copy != NULL);
    return vkp_i_watch_subscribe(rx->watch, rx->seen, copy);
}

VKP_API void vkp_watch_rx_unref(vkp_watch_rx *rx)
{
    vkp_i_watch *watch;
    if (rx == NULL) {
        return;
    }
    watch = rx->watch;
    vkp_watch_release(rx);
    vkp_i_receivers_remove(&watch->receivers);
    vkp_i_free(watch->config.env, rx, sizeof *rx);
    vkp_i_watch_unref(watch);
}

VKP_API vkp_status vkp_watch_replace(vkp_watch_tx *tx, const void *item)
{
    vkp_i_watch *watch;
    vkp_i_cell *cell;
    vkp_i_cell *doomed = NULL;
    bool biased;
    VKP_I_REQUIRE(tx != NULL && item != NULL);
    watch = &tx->watch;
    biased = vkp_i_biased_lock(&watch->latch, watch->config.env);
    cell = vkp_i_watch_take_cell(watch);
    if (cell != NULL) {
        vkp_i_words_store(cell->words, item, watch->config.elem_bytes);
        doomed = vkp_i_watch_publish(watch, cell);
    }
    vkp_i_biased_unlock(&watch->latch, biased);
    if (cell == NULL) {
        return VKP_ERR_NOMEM;
    }
    vkp_i_watch_drop(watch, doomed);
    vkp_i_receivers_signal(&watch->receivers);
    return VKP_OK;
}

VKP_API vkp_status vkp_watch_send(vkp_watch_tx *tx, const void *item)
{
    VKP_I_REQUIRE(tx != NULL && item != NULL);
    return vkp_watch_get_receivers(tx) == 0 ? VKP_ERR_CLOSED : vkp_watch_replace(tx, item);
}

/* Latched: memory in which modify may write, apart from the cells; NULL without memory. */
static uint64_t *vkp_i_watch_scratch(vkp_i_watch *watch)
{
    if (watch->scratch == NULL) {
        watch->scratch =
            (uint64_t *)vkp_i_alloc_zero(watch->config.env, watch->words * sizeof(uint64_t));
    }
    return watch->scratch;
}

/* Latched: publish a new version made by modify. OK, with *modified false when modify changed
   nothing, or NOMEM.                                                                           */
static vkp_status vkp_i_watch_modify(vkp_i_watch *watch, bool (*modify)(void *user, void *item),
                                     void *user, bool *modified)
{
    uint64_t *scratch = vkp_i_watch_scratch(watch);
    vkp_i_cell *cell;
    *modified = false;
    if (scratch == NULL) {
        return VKP_ERR_NOMEM;
    }
    vkp_i_words_load(scratch, VKP_I_LOAD(&watch->current)->words, watch->config.elem_bytes);
    if (!modify(user, scratch)) {
        return VKP_OK;
    }
    cell = vkp_i_watch_take_cell(watch);
    if (cell == NULL) {
        return VKP_ERR_NOMEM;
    }
    vkp_i_words_store(cell->words, scratch, watch->config.elem_bytes);
    (void)vkp_i_watch_publish(watch, cell);
    *modified = true;
    return VKP_OK;
}

VKP_API vkp_status vkp_watch_send_if_modified(vkp_watch_tx *tx,
                                              bool (*modify)(void *user, void *item), void *user,
                                              bool *changed)
{
    vkp_i_watch *watch;
    vkp_status status;
    bool modified;
    bool biased;
    VKP_I_REQUIRE(tx != NULL && modify != NULL && tx->watch.config.drop == NULL);
    watch = &tx->watch;
    biased = vkp_i_biased_lock(&watch->latch, watch->config.env);
    status = vkp_i_watch_modify(watch, modify, user, &modified);
    vkp_i_biased_unlock(&watch->latch, biased);
    if (modified) {
        vkp_i_receivers_signal(&watch->receivers);
    }
    if (status == VKP_OK && changed != NULL) {
        *changed = modified;
    }
    return status;
}

/* Copy the newest value out; gives its version. Repeats while a sender interferes. */
static uint64_t vkp_i_watch_read(const vkp_i_watch *watch, void *out)
{
    vkp_i_backoff backoff = {0};
    for (;;) {
        const vkp_i_cell *cell = VKP_I_LOAD_ACQ(&watch->current);
        uint64_t seq = VKP_I_LOAD_ACQ(&cell->seq);
        if ((seq & 1u) == 0) {
            vkp_i_words_load(out, cell->words, watch->config.elem_bytes);
            /* `current` too: a cell filled again gets its seq before it becomes the newest. */
            if (VKP_I_LOAD(&cell->seq) == seq && VKP_I_LOAD(&watch->current) == cell) {
                return seq >> 1;
            }
        }
        vkp_i_back_off(&backoff, vkp_i_sys(watch->config.env));
    }
}

VKP_API vkp_status vkp_watch_get(vkp_watch_rx *rx, void *out)
{
    VKP_I_REQUIRE(rx != NULL && out != NULL && rx->watch->config.drop == NULL);
    (void)vkp_i_watch_read(rx->watch, out);
    return VKP_OK;
}

VKP_API vkp_status vkp_watch_get_and_update(vkp_watch_rx *rx, void *out)
{
    VKP_I_REQUIRE(rx != NULL && out != NULL && rx->watch->config.drop == NULL);
    rx->seen = vkp_i_watch_read(rx->watch, out);
    return VKP_OK;
}

VKP_API const void *vkp_watch_borrow(vkp_watch_rx *rx)
{
    vkp_i_watch *watch;
    bool biased;
    if (rx == NULL || rx->borrowed != NULL) {
        return NULL;
    }
    watch = rx->watch;
    biased = vkp_i_biased_lock(&watch->latch, watch->config.env);
    rx->borrowed = VKP_I_LOAD(&watch->current);
    rx->borrowed->pins++;
    vkp_i_biased_unlock(&watch->latch, biased);
    return rx->borrowed->words;
}

VKP_API const void *vkp_watch_borrow_and_update(vkp_watch_rx *rx)
{
    const void *item = vkp_watch_borrow(rx);
    if (item != NULL) {
        rx->seen = VKP_I_LOAD(&rx->borrowed->seq) >> 1;
    }
    return item;
}

VKP_API void vkp_watch_release(vkp_watch_rx *rx)
{
    vkp_i_watch *watch;
    vkp_i_cell *cell;
    bool last;
    bool biased;
    if (rx == NULL || rx->borrowed == NULL) {
        return;
    }
    watch = rx->watch;
    cell = rx->borrowed;
    rx->borrowed = NULL;
    biased = vkp_i_biased_lock(&watch->latch, watch->config.env);
    cell->pins--;
    last = cell->pins == 0 && cell->owns && cell != VKP_I_LOAD(&watch->current);
    vkp_i_biased_unlock(&watch->latch, biased);
    vkp_i_watch_drop(watch, last ? cell : NULL);
}

/* Signed, because `seen` may be ahead: vkp_watch_get_and_update can read a version before
   `version` is stored.                                                                         */
VKP_API bool vkp_watch_is_changed(const vkp_watch_rx *rx)
{
    return (int64_t)(VKP_I_LOAD_ACQ(&rx->watch->version) - rx->seen) > 0;
}

VKP_API void vkp_watch_mark_changed(vkp_watch_rx *rx)
{
    rx->seen = VKP_I_LOAD_ACQ(&rx->watch->version) - 1;
}

VKP_API void vkp_watch_mark_unchanged(vkp_watch_rx *rx)
{
    rx->seen = VKP_I_LOAD_ACQ(&rx->watch->version);
}

VKP_API bool vkp_watch_is_closed(const vkp_watch_rx *rx)
{
    return vkp_i_receivers_is_ended(&rx->watch->receivers);
}

VKP_API size_t vkp_watch_get_receivers(const vkp_watch_tx *tx)
{
    return vkp_i_receivers_size(&tx->watch.receivers);
}

/* OK marks the newest version as seen. */
static vkp_status vkp_i_case_changed_attempt(vkp_case *each, vkp_i_wait *wait)
{
    vkp_watch_rx *rx = (vkp_watch_rx *)each->i_object;
    bool closed = vkp_watch_is_closed(rx);
    (void)wait;
    if (!vkp_watch_is_changed(rx)) { /* checked after `closed`: no version follows the end */
        return closed ? VKP_ERR_CLOSED : VKP_ERR_EMPTY;
    }
    vkp_watch_mark_unchanged(rx);
    return VKP_OK;
}

static bool vkp_i_case_changed_is_ready(const vkp_case *each)
{
    const vkp_watch_rx *rx = (const vkp_watch_rx *)each->i_object;
    return vkp_watch_is_changed(rx) || vkp_watch_is_closed(rx);
}

static void vkp_i_case_changed_leave(const vkp_case *each, vkp_i_wait *wait)
{
    vkp_i_receivers_leave(&((vkp_watch_rx *)each->i_object)->watch->receivers, &wait->node);
}

static bool vkp_i_case_changed_join(const vkp_case *each, vkp_i_wait *wait)
{
    vkp_i_receivers_join(&((vkp_watch_rx *)each->i_object)->watch->receivers, &wait->node);
    if (vkp_i_case_changed_is_ready(each)) {
        vkp_i_case_changed_leave(each, wait);
        return false;
    }
    return true;
}

static const vkp_env *vkp_i_case_changed_env(const vkp_case *each)
{
    return ((vkp_watch_rx *)each->i_object)->watch->config.env;
}

static const vkp_i_case_kind vkp_i_case_changed = {
    vkp_i_case_changed_attempt, vkp_i_case_changed_is_ready, vkp_i_case_changed_join,
    vkp_i_case_changed_leave, vkp_i_case_changed_env};

VKP_API vkp_case vkp_case_watch_changed(vkp_watch_rx *rx)
{
    return rx != NULL ? vkp_i_case(&vkp_i_case_changed, rx, NULL) : vkp_case_never();
}

VKP_API vkp_status vkp_watch_changed(vkp_watch_rx *rx, uint64_t deadline_ns)
{
    vkp_case changed;
    VKP_I_REQUIRE(rx != NULL);
    changed = vkp_case_watch_changed(rx);
    return vkp_i_select_few(&changed, 1, rx->watch->config.env, rx->watch->receivers.spins,
                            deadline_ns);
}

VKP_API vkp_case vkp_case_watch_closed(vkp_watch_tx *tx)
{
    return tx != NULL ? vkp_i_case(&vkp_i_case_no_receivers, &tx->watch.receivers, NULL)
                      : vkp_case_never();
}

VKP_API vkp_status vkp_watch_wait_closed(vkp_watch_tx *tx, uint64_t deadline_ns)
{
    VKP_I_REQUIRE(tx != NULL);
    return vkp_i_receivers_wait_gone(&tx->watch.receivers, deadline_ns);
}
