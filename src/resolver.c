#if VKP_I_IO
/* ======================================================================================
   >>impl-resolver   Names without blocking
   ======================================================================================
   A lookup travels from the loop that asks, through a channel, to a thread in vkp_resolver_run, and
   back as a task of the loop. The loop may lose its interest meanwhile (`done` NULL); the task
   frees the lookup. Threads in vkp_resolver_run take lookups one at a time under the mutex, and
   look up without it. */

#define VKP_I_LOOKUP_ADDRESSES 8 /* most addresses of a name */

typedef struct vkp_i_lookup {
    vkp_i_task task; /* returns the lookup to its loop */
    vkp_loop *loop;  /* shared */
    const vkp_env *env;
    vkp_i_parts parts; /* host and port */
    vkp_address addresses[VKP_I_LOOKUP_ADDRESSES];
    size_t count;       /* 0: the name was not found, or the resolver is closed */
    uint32_t abandoned; /* atomic: nobody waits, it need not be looked up */
    /* Called on the loop's thread, once, before the lookup is freed. NULL: no interest. */
    void (*done)(struct vkp_i_lookup *lookup);
    void *user; /* of done */
} vkp_i_lookup;

struct vkp_resolver {
    const vkp_env *env;
    size_t refs;       /* atomic */
    VKP_I_MUTEX gate;  /* guards tx */
    VKP_I_MUTEX mutex; /* one thread at a time receives */
    vkp_mpsc_tx *tx;   /* of vkp_i_lookup*; NULL once closed; guarded by gate */
    vkp_mpsc_rx *rx;   /* used under mutex */
};

static void vkp_i_lookup_free(vkp_i_lookup *lookup)
{
    vkp_loop_unref(lookup->loop);
    vkp_i_free(lookup->env, lookup, sizeof *lookup);
}

/* The lookup is back on its loop. */
static void vkp_i_lookup_return(vkp_i_task *task)
{
    vkp_i_lookup *lookup = VKP_CONTAINER(task, vkp_i_lookup, task);
    if (lookup->done != NULL) {
        lookup->done(lookup);
    }
    vkp_i_lookup_free(lookup);
}

/* Send the lookup back to its loop; a closed loop has no interest. */
static void vkp_i_lookup_finish(vkp_i_lookup *lookup)
{
    lookup->task.fn = vkp_i_lookup_return;
    if (!vkp_i_loop_queue(lookup->loop, &lookup->task)) {
        vkp_i_lookup_free(lookup);
    }
}

static void vkp_i_lookup_drop(void *user, void *item)
{
    (void)user;
    vkp_i_lookup_finish(*(vkp_i_lookup **)item);
}

VKP_API vkp_status vkp_resolver_open(const vkp_env *env, vkp_resolver **out)
{
    vkp_resolver *resolver;
    vkp_mpsc_config config;
    vkp_status status;
    VKP_I_REQUIRE(out != NULL);
    env = vkp_i_env(env);
    resolver = (vkp_resolver *)vkp_i_alloc_zero(env, sizeof *resolver);
    if (resolver == NULL) {
        return VKP_ERR_NOMEM;
    }
    memset(&config, 0, sizeof config);
    config.elem_bytes = sizeof(vkp_i_lookup *);
    config.drop = vkp_i_lookup_drop;
    config.env = env;
    status = vkp_mpsc_open(&config, &resolver->tx, &resolver->rx);
    if (status != VKP_OK) {
        vkp_i_free(env, resolver, sizeof *resolver);
        return status;
    }
    resolver->env = env;
    resolver->refs = 1;
    VKP_I_MUTEX_INIT(&resolver->mutex);
    VKP_I_MUTEX_INIT(&resolver->gate);
    *out = resolver;
    return VKP_OK;
}

VKP_API vkp_resolver *vkp_resolver_ref(vkp_resolver *resolver)
{
    (void)VKP_I_ADD(&resolver->refs, 1);
    return resolver;
}

VKP_API void vkp_resolver_close(vkp_resolver *resolver)
{
    vkp_mpsc_tx *tx;
    if (resolver == NULL) {
        return;
    }
    VKP_I_LOCK(&resolver->gate);
    tx = resolver->tx;
    resolver->tx = NULL;
    VKP_I_UNLOCK(&resolver->gate);
    vkp_mpsc_tx_unref(tx); /* the receiver drains, then it is closed */
}

VKP_API void vkp_resolver_unref(vkp_resolver *resolver)
{
    if (resolver != NULL && VKP_I_UNREF(&resolver->refs) == 1) {
        vkp_resolver_close(resolver);
        vkp_mpsc_rx_unref(resolver->rx); /* returns the lookups that nobody took */
        VKP_I_MUTEX_DEINIT(&resolver->mutex);
        VKP_I_MUTEX_DEINIT(&resolver->gate);
        vkp_i_free(resolver->env, resolver, sizeof *resolver);
    }
}

static bool vkp_i_resolver_is_closed(vkp_resolver *resolver)
{
    bool closed;
    VKP_I_LOCK(&resolver->gate);
    closed = resolver->tx == NULL;
    VKP_I_UNLOCK(&resolver->gate);
    return closed;
}

VKP_API void vkp_resolver_run(vkp_resolver *resolver)
{
    vkp_i_lookup *lookup;
    vkp_status status;
    for (;;) {
        VKP_I_LOCK(&resolver->mutex);
        status = vkp_mpsc_recv(resolver->rx, VKP_FOREVER, &lookup);
        VKP_I_UNLOCK(&resolver->mutex);
        if (status != VKP_OK) {
            return;
        }
        if (!vkp_i_resolver_is_closed(resolver) && VKP_I_LOAD(&lookup->abandoned) == 0) {
            int found = vkp_i_sys(resolver->env)
                            ->resolve(lookup->parts.host, lookup->parts.port, lookup->addresses,
                                      VKP_I_LOOKUP_ADDRESSES);
            lookup->count = found > 0 ? (size_t)found : 0;
        }
        vkp_i_lookup_finish(lookup);
    }
}

/* Look the host up for the loop; done is called on its thread, never inside this call. NULL: no
   memory, or the resolver is closed. */
static vkp_i_lookup *vkp_i_resolver_ask(vkp_resolver *resolver, vkp_loop *loop,
                                        const vkp_i_parts *parts,
                                        void (*done)(vkp_i_lookup *lookup), void *user)
{
    vkp_i_lookup *lookup = (vkp_i_lookup *)vkp_i_alloc_zero(resolver->env, sizeof *lookup);
    vkp_status status = VKP_ERR_CLOSED;
    if (lookup == NULL) {
        return NULL;
    }
    lookup->env = resolver->env;
    lookup->loop = vkp_loop_ref(loop);
    lookup->parts = *parts;
    lookup->done = done;
    lookup->user = user;
    VKP_I_LOCK(&resolver->gate);
    if (resolver->tx != NULL) {
        status = vkp_mpsc_try_send(resolver->tx, &lookup);
    }
    VKP_I_UNLOCK(&resolver->gate);
    if (status != VKP_OK) {
        vkp_i_lookup_free(lookup);
        return NULL;
    }
    return lookup;
}

#endif /* VKP_I_IO */
