/* ======================================================================================
   >>impl-cancel   Cancellation tokens
   ======================================================================================
   The tokens of a tree share one lock, so that a walk through the tree needs no lock order. The
   lock is opened with the root and freed with the last token of the tree. A child holds a
   reference to its parent; the list of children in the parent is weak. `triggered` is written
   under the lock (release) and read without it (acquire). vkp_cancel_trigger wakes the waiters of
   the token and of its descendants under the lock. Lock order: the lock of the tree, then the lock
   that wake takes (section park).                                                              */

/* What all tokens of a tree share. */
typedef struct vkp_i_cancel_tree {
    VKP_I_MUTEX mutex; /* guards the links and the waiters of all tokens of the tree */
    size_t refs;       /* atomic: one for each token */
} vkp_i_cancel_tree;

struct vkp_cancel {
    const vkp_env *env; /* the same in the whole tree */
    vkp_i_cancel_tree *tree;
    vkp_cancel *parent;       /* a reference; NULL in the root */
    vkp_cancel *first_child;  /* weak; under tree->mutex */
    vkp_cancel *prev_sibling; /* weak; under tree->mutex */
    vkp_cancel *next_sibling; /* weak; under tree->mutex */
    size_t refs;              /* atomic */
    uint32_t triggered;       /* atomic: 1 once cancelled; stored under tree->mutex */
    vkp_i_waiters waiters;    /* under tree->mutex */
};

VKP_API vkp_status vkp_cancel_open(const vkp_env *env, vkp_cancel *parent, vkp_cancel **token)
{
    vkp_cancel *self;
    VKP_I_REQUIRE(token != NULL);
    /* All tokens of a tree have one env: the last token, any of them, frees the lock. */
    env = parent != NULL ? parent->env : vkp_i_env(env);
    self = (vkp_cancel *)vkp_i_alloc_zero(env, sizeof *self);
    if (self == NULL) {
        return VKP_ERR_NOMEM;
    }
    if (parent == NULL) {
        self->tree = (vkp_i_cancel_tree *)vkp_i_alloc_zero(env, sizeof *self->tree);
        if (self->tree == NULL) {
            vkp_i_free(env, self, sizeof *self);
            return VKP_ERR_NOMEM;
        }
        VKP_I_MUTEX_INIT(&self->tree->mutex);
    } else {
        self->tree = parent->tree;
        self->parent = vkp_cancel_ref(parent);
    }
    self->env = env;
    self->refs = 1;
    vkp_i_waiters_init(&self->waiters);
    VKP_I_LOCK(&self->tree->mutex);
    (void)VKP_I_ADD(&self->tree->refs, 1);
    if (parent != NULL) {
        self->next_sibling = parent->first_child;
        if (parent->first_child != NULL) {
            parent->first_child->prev_sibling = self;
        }
        parent->first_child = self;
        self->triggered = VKP_I_LOAD(&parent->triggered);
    }
    VKP_I_UNLOCK(&self->tree->mutex);
    *token = self;
    return VKP_OK;
}

VKP_API vkp_cancel *vkp_cancel_ref(vkp_cancel *token)
{
    (void)VKP_I_ADD(&token->refs, 1);
    return token;
}

/* Remove a token without references from the list of its parent. */
static void vkp_i_cancel_unlink(vkp_cancel *token)
{
    VKP_I_LOCK(&token->tree->mutex);
    if (token->prev_sibling != NULL) {
        token->prev_sibling->next_sibling = token->next_sibling;
    } else if (token->parent != NULL) {
        token->parent->first_child = token->next_sibling;
    }
    if (token->next_sibling != NULL) {
        token->next_sibling->prev_sibling = token->prev_sibling;
    }
    VKP_I_UNLOCK(&token->tree->mutex);
}

VKP_API void vkp_cancel_unref(vkp_cancel *token)
{
    while (token != NULL && VKP_I_UNREF(&token->refs) == 1) {
        vkp_cancel *parent = token->parent;
        vkp_i_cancel_tree *tree = token->tree;
        vkp_i_cancel_unlink(token);
        if (VKP_I_UNREF(&tree->refs) == 1) {
            VKP_I_MUTEX_DEINIT(&tree->mutex);
            vkp_i_free(token->env, tree, sizeof *tree);
        }
        vkp_i_free(token->env, token, sizeof *token);
        token = parent;
    }
}

/* Locked: the next token of the subtree under `top`, parents before children; NULL at the end. */
static vkp_cancel *vkp_i_cancel_next(vkp_cancel *token, vkp_cancel *top)
{
    if (token->first_child != NULL) {
        return token->first_child;
    }
    while (token != top && token->next_sibling == NULL) {
        token = token->parent;
    }
    return token == top ? NULL : token->next_sibling;
}

VKP_API void vkp_cancel_trigger(vkp_cancel *token)
{
    vkp_cancel *each = token;
    VKP_I_LOCK(&token->tree->mutex);
    while (each != NULL) {
        VKP_I_STORE_REL(&each->triggered, 1u);
        vkp_i_waiters_wake_all(&each->waiters);
        each = vkp_i_cancel_next(each, token);
    }
    VKP_I_UNLOCK(&token->tree->mutex);
}

VKP_API bool vkp_cancel_is_triggered(const vkp_cancel *token)
{
    return VKP_I_LOAD_ACQ(&token->triggered) != 0;
}

/* Link the waiter; false, and not linked, when the token is cancelled already. */
static bool vkp_i_cancel_join(vkp_cancel *token, vkp_i_waiter *waiter)
{
    bool triggered;
    VKP_I_LOCK(&token->tree->mutex);
    triggered = VKP_I_LOAD(&token->triggered) != 0;
    if (!triggered) {
        vkp_i_waiter_link(&token->waiters, waiter);
    }
    VKP_I_UNLOCK(&token->tree->mutex);
    return !triggered;
}

/* Unlink the waiter if it is linked; no wake of it runs when this returns. */
static void vkp_i_cancel_leave(vkp_cancel *token, vkp_i_waiter *waiter)
{
    VKP_I_LOCK(&token->tree->mutex);
    (void)vkp_i_waiter_unlink(waiter);
    VKP_I_UNLOCK(&token->tree->mutex);
}

static vkp_status vkp_i_case_cancel_attempt(vkp_case *each, vkp_i_wait *wait)
{
    (void)wait;
    return vkp_cancel_is_triggered((vkp_cancel *)each->i_object) ? VKP_OK : VKP_ERR_EMPTY;
}

static bool vkp_i_case_cancel_is_ready(const vkp_case *each)
{
    return vkp_cancel_is_triggered((vkp_cancel *)each->i_object);
}

static bool vkp_i_case_cancel_join(const vkp_case *each, vkp_i_wait *wait)
{
    return vkp_i_cancel_join((vkp_cancel *)each->i_object, &wait->node);
}

static void vkp_i_case_cancel_leave(const vkp_case *each, vkp_i_wait *wait)
{
    vkp_i_cancel_leave((vkp_cancel *)each->i_object, &wait->node);
}

static const vkp_env *vkp_i_case_cancel_env(const vkp_case *each)
{
    return ((vkp_cancel *)each->i_object)->env;
}

static const vkp_i_case_kind vkp_i_case_kind_cancel = {
    vkp_i_case_cancel_attempt, vkp_i_case_cancel_is_ready, vkp_i_case_cancel_join,
    vkp_i_case_cancel_leave, vkp_i_case_cancel_env};

VKP_API vkp_case vkp_case_cancel(vkp_cancel *token)
{
    return token != NULL ? vkp_i_case(&vkp_i_case_kind_cancel, token, NULL) : vkp_case_never();
}

VKP_API vkp_status vkp_cancel_wait(vkp_cancel *token, uint64_t deadline_ns)
{
    vkp_case cancelled;
    VKP_I_REQUIRE(token != NULL);
    cancelled = vkp_case_cancel(token);
    return vkp_i_select_few(&cancelled, 1, token->env, 0, deadline_ns);
}
