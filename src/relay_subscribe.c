#if VKP_I_IO
/* ======================================================================================
   >>impl-relay-subscribe   Relay: subscriptions
   ======================================================================================
   How a SUBSCRIBE travels: on its local client's loop the client pauses (VKP_I_LOCAL_BUSY), and
   every name takes one interest of the upstream client. For each name the upstream client calls
   vkp_i_sub_item_done on loop 0, which returns the item to the local client's loop as a task
   (vkp_i_sub_item_return). The last item finishes the subscription: the names join the shard's
   hub, the confirmations are sent in the order of the names, and the client is read again. When
   one name is refused none joins, and the server's words are the only answer, as a server's. When
   every name has members in the shard already, and stand-alone, no item is sent to loop 0.
   Invariant: a topic of a shard's hub holds one interest of the upstream client. An
   interest beyond that is given back when its item returns, the topic's own by on_interest when
   its last member leaves.
   relay->subscribers counts subscribers by name over all shards, guarded by the relay's mutex; a
   count changes together with the hub.                                                        */

/* ---- subscriber counts ---- */

/* Count one subscriber of the name more (added) or less. False: no memory, only when added. */
static bool vkp_i_subscribers_add(vkp_relay *relay, vkp_sub_kind kind, vkp_str name, bool added)
{
    vkp_i_map *map = &relay->subscribers[kind];
    vkp_i_map_node *node;
    vkp_i_subscriber_count *entry = NULL;
    bool ok = true;
    VKP_I_LOCK(&relay->mutex);
    node = vkp_i_map_find(map, vkp_i_map_hash(map, name), name);
    if (node != NULL) {
        entry = VKP_CONTAINER(node, vkp_i_subscriber_count, node);
    } else if (added) {
        entry = (vkp_i_subscriber_count *)vkp_i_alloc_zero(relay->env, sizeof *entry + name.len);
        ok = entry != NULL;
        if (ok) {
            if (name.len > 0) {
                memcpy(entry + 1, name.ptr, name.len);
            }
            entry->node.key = vkp_i_str(entry + 1, name.len);
            entry->node.hash = vkp_i_map_hash(map, name);
            ok = vkp_i_map_insert(map, &entry->node);
        }
        if (!ok) {
            vkp_i_free(relay->env, entry, sizeof *entry + name.len);
            entry = NULL;
        }
    }
    if (entry != NULL) {
        entry->count += added ? (size_t)1 : (size_t)0 - 1;
        if (entry->count == 0) {
            vkp_i_map_remove(map, &entry->node);
            vkp_i_free(relay->env, entry, sizeof *entry + entry->node.key.len);
        }
    }
    VKP_I_UNLOCK(&relay->mutex);
    return ok;
}

/* Subscribers of a name over all shards. The relay's mutex is held. */
static size_t vkp_i_subscribers_count(vkp_relay *relay, vkp_sub_kind kind, vkp_str name)
{
    vkp_i_map *map = &relay->subscribers[kind];
    vkp_i_map_node *node = vkp_i_map_find(map, vkp_i_map_hash(map, name), name);
    return node != NULL ? VKP_CONTAINER(node, vkp_i_subscriber_count, node)->count : 0;
}

/* Number of subscriptions, over all shards, that receive a message published now: by name and by
   pattern.                                                                                    */
static size_t vkp_i_subscribers_receivers(vkp_relay *relay, vkp_sub_kind kind, vkp_str channel)
{
    vkp_i_map_node *node = NULL;
    size_t count;
    VKP_I_LOCK(&relay->mutex);
    count = vkp_i_subscribers_count(relay, kind, channel);
    while (kind == VKP_SUB_CHANNEL && relay->subscribers[VKP_SUB_PATTERN].count > 0 &&
           (node = vkp_i_map_get_next(&relay->subscribers[VKP_SUB_PATTERN], node)) != NULL) {
        if (vkp_glob_is_match(node->key, channel)) {
            count += VKP_CONTAINER(node, vkp_i_subscriber_count, node)->count;
        }
    }
    VKP_I_UNLOCK(&relay->mutex);
    return count;
}

/* ---- subscribing ---- */

typedef struct vkp_i_subscription vkp_i_subscription;

/* One name of a SUBSCRIBE. */
typedef struct vkp_i_sub_item {
    vkp_i_task task;                  /* returns the item to the local client's loop */
    vkp_i_subscription *subscription; /* holds this item */
    vkp_str name;                     /* behind the subscription's items */
    bool upstream;     /* one interest of the upstream client was taken for this name */
    vkp_status status; /* outcome from the upstream client */
    vkp_bytes words;   /* REFUSED: the server's words */
} vkp_i_sub_item;

/* One SUBSCRIBE under way, with its items and their names in one allocation. */
struct vkp_i_subscription {
    vkp_i_local *local;      /* holds one reference */
    vkp_sub_kind kind;       /* of all names */
    size_t bytes_allocated;  /* size of this allocation */
    size_t count;            /* number of `items` */
    size_t waiting;          /* items that have not returned; loop's thread */
    vkp_i_sub_item items[1]; /* `count` items, then the bytes of the names */
};

static const char *const vkp_i_sub_verbs[2][VKP_SUB_KINDS] = {
    {"unsubscribe", "punsubscribe", "sunsubscribe"}, {"subscribe", "psubscribe", "ssubscribe"}};

/* The number in a confirmation: channels and patterns together, shard channels alone. */
static size_t vkp_i_local_sub_count(const vkp_i_local *local, vkp_sub_kind kind)
{
    const uint32_t *counts = local->member.counts;
    return kind == VKP_SUB_SHARD ? counts[VKP_SUB_SHARD]
                                 : counts[VKP_SUB_CHANNEL] + counts[VKP_SUB_PATTERN];
}

/* Write the confirmation of one name; name.ptr NULL: an UNSUBSCRIBE without any name. */
static void vkp_i_put_confirmation(vkp_resp_writer *writer, const vkp_i_local *local, bool added,
                                   vkp_sub_kind kind, vkp_str name)
{
    const char *verb = vkp_i_sub_verbs[added ? 1 : 0][kind];
    int protocol = local->member.protocol;
    vkp_resp_put_aggregate(writer, protocol == 3 ? VKP_RESP_PUSH : VKP_RESP_ARRAY, 3);
    vkp_resp_put_bulk(writer, verb, strlen(verb));
    if (name.ptr == NULL) {
        vkp_resp_put_raw(writer, protocol == 3 ? "_\r\n" : "$-1\r\n", protocol == 3 ? 3 : 5);
    } else {
        vkp_resp_put_bulk(writer, name.ptr, name.len);
    }
    vkp_resp_put_integer(writer, (int64_t)vkp_i_local_sub_count(local, kind));
}

/* Give one interest of the upstream client back. */
static void vkp_i_relay_drop_interest(vkp_relay *relay, vkp_sub_kind kind, vkp_str name)
{
    if (relay->push != NULL && vkp_client_unsubscribe(relay->push, kind, name) == VKP_ERR_NOMEM) {
        vkp_i_log(relay->env, VKP_LOG_ERROR, "out of memory: a name stays subscribed upstream");
    }
}

/* The hub's callback: a topic that lost its last member gives its upstream interest back. A new
   topic keeps the interest that its item took.                                                */
static void vkp_i_shard_on_interest(void *user, vkp_sub_kind kind, vkp_str name, bool added)
{
    vkp_i_shard *shard = (vkp_i_shard *)user;
    if (!added) {
        vkp_i_relay_drop_interest(shard->relay, kind, name);
    }
}

/* Subscribe in the hub, and count. False: no memory, nothing changed. */
static bool vkp_i_local_join_name(vkp_i_local *local, vkp_sub_kind kind, vkp_str name)
{
    vkp_relay *relay = local->shard->relay;
    bool added = false;
    if (vkp_hub_subscribe(local->shard->hub, &local->member, kind, name, &added) != VKP_OK) {
        return false;
    }
    if (added && !vkp_i_subscribers_add(relay, kind, name, true)) {
        (void)vkp_hub_unsubscribe(local->shard->hub, &local->member, kind, name);
        return false;
    }
    local->name_bytes += added ? name.len : 0;
    return true;
}

/* Unsubscribe in the hub, and count. */
static void vkp_i_local_leave_name(vkp_i_local *local, vkp_sub_kind kind, vkp_str name)
{
    vkp_relay *relay = local->shard->relay;
    if (vkp_hub_is_subscribed(local->shard->hub, &local->member, kind, name)) {
        /* before the unsubscribe: name may be memory of the topic */
        local->name_bytes -= name.len;
        (void)vkp_i_subscribers_add(relay, kind, name, false);
        (void)vkp_hub_unsubscribe(local->shard->hub, &local->member, kind, name);
    }
}

/* Unsubscribe the local client from every name. */
static void vkp_i_local_leave_all(vkp_i_local *local)
{
    int kind;
    for (kind = 0; kind < VKP_SUB_KINDS; kind++) {
        while (local->member.counts[kind] > 0) {
            vkp_i_local_leave_name(local, (vkp_sub_kind)kind,
                                   vkp_hub_get_member_name(&local->member, (vkp_sub_kind)kind));
        }
    }
}

static void vkp_i_subscription_free(vkp_i_subscription *self)
{
    vkp_i_local *local = self->local;
    size_t i;
    for (i = 0; i < self->count; i++) {
        vkp_bytes_unref(&self->items[i].words);
    }
    vkp_i_free(local->shard->relay->env, self, self->bytes_allocated);
    vkp_i_local_release(local);
}

/* Whether the outcome lets the name join the hub: while there is no server it is wanted. */
static bool vkp_i_sub_item_stands(const vkp_i_sub_item *item)
{
    return item->status == VKP_OK || item->status == VKP_ERR_DISCONNECTED;
}

/* The first item that was refused. NULL: none was. */
static const vkp_i_sub_item *vkp_i_subscription_refused(const vkp_i_subscription *self)
{
    size_t i;
    for (i = 0; i < self->count; i++) {
        if (!vkp_i_sub_item_stands(&self->items[i])) {
            return &self->items[i];
        }
    }
    return NULL;
}

/* Join the hub with a name whose item has returned, and write its confirmation; only give back what
   the item took, if the client does not join. False: the local client is closed or closes later. */
static bool vkp_i_subscription_end_item(vkp_i_subscription *self, vkp_i_sub_item *item, bool joins,
                                        vkp_resp_writer *writer)
{
    vkp_i_local *local = self->local;
    vkp_relay *relay = local->shard->relay;
    bool closed = (local->flags & VKP_I_LOCAL_CLOSED) != 0;
    bool topic_had_interest = vkp_hub_get_members(local->shard->hub, self->kind, item->name) > 0;
    if (!closed && joins && !vkp_i_local_join_name(local, self->kind, item->name)) {
        closed = true;
        vkp_i_local_fail(local);
    }
    /* A new topic keeps the item's interest; otherwise the interest is given back. */
    if (item->upstream && (closed || topic_had_interest || !joins) &&
        item->status != VKP_ERR_CLOSED) {
        vkp_i_relay_drop_interest(relay, self->kind, item->name);
    }
    if (!closed && joins) {
        vkp_i_put_confirmation(writer, local, true, self->kind, item->name);
    }
    return !closed;
}

/* Every item has returned: join the hub, send the confirmations, read the client again. */
static void vkp_i_subscription_finish(vkp_i_subscription *self)
{
    vkp_i_local *local = self->local;
    const vkp_i_sub_item *refused = vkp_i_subscription_refused(self);
    vkp_resp_writer writer;
    bool alive = true;
    size_t i;
    vkp_resp_writer_init(&writer, local->shard->relay->env);
    if (refused != NULL) {
        vkp_str words = vkp_i_str(refused->words.data, refused->words.len);
        vkp_resp_put_error(&writer,
                           words.len > 0 ? words : vkp_str_of("ERR the relay could not subscribe"));
    }
    for (i = 0; i < self->count; i++) {
        alive =
            vkp_i_subscription_end_item(self, &self->items[i], refused == NULL, &writer) && alive;
    }
    if (alive) {
        vkp_i_local_answer_writer(local, &writer);
    } else {
        vkp_resp_writer_deinit(&writer);
    }
    local->flags &= ~VKP_I_LOCAL_BUSY;
    vkp_i_local_maybe_resume(local);
    vkp_i_subscription_free(self);
}

/* The item is back on its local client's loop. */
static void vkp_i_sub_item_return(vkp_i_task *task)
{
    vkp_i_sub_item *item = VKP_CONTAINER(task, vkp_i_sub_item, task);
    if (--item->subscription->waiting == 0) {
        vkp_i_subscription_finish(item->subscription);
    }
}

/* Loop 0: the upstream client has the outcome of one name; return the item to its loop. */
static void vkp_i_sub_item_done(void *user, vkp_status status, vkp_str words)
{
    vkp_i_sub_item *item = (vkp_i_sub_item *)user;
    vkp_loop *loop = item->subscription->local->shard->loop;
    item->status = status;
    if (status == VKP_ERR_REFUSED) { /* without memory the client gets a text of the relay */
        (void)!vkp_bytes_copy(item->subscription->local->shard->relay->env, words.ptr, words.len,
                              &item->words);
    }
    item->task.fn = vkp_i_sub_item_return;
    if (vkp_i_on_loop(loop) || !vkp_i_loop_queue(loop, &item->task)) {
        vkp_i_sub_item_return(&item->task);
    }
}

/* A subscription with copies of the names, or NULL: no memory. */
static vkp_i_subscription *vkp_i_subscription_new(vkp_i_local *local, vkp_sub_kind kind,
                                                  size_t count, const vkp_str *names)
{
    vkp_i_subscription *self;
    size_t bytes = sizeof *self + count * sizeof(vkp_i_sub_item);
    char *text;
    size_t i;
    for (i = 0; i < count; i++) {
        bytes += names[i].len;
    }
    self = (vkp_i_subscription *)vkp_i_alloc_zero(local->shard->relay->env, bytes);
    if (self == NULL) {
        return NULL;
    }
    self->bytes_allocated = bytes;
    self->local = local;
    self->kind = kind;
    self->count = count;
    local->refs++;
    text = (char *)&self->items[count];
    for (i = 0; i < count; i++) {
        self->items[i].subscription = self;
        if (names[i].len > 0) {
            memcpy(text, names[i].ptr, names[i].len);
        }
        self->items[i].name = vkp_i_str(text, names[i].len);
        text += names[i].len;
    }
    return self;
}

/* SUBSCRIBE, PSUBSCRIBE or SSUBSCRIBE with count names. */
static void vkp_i_local_subscribe(vkp_i_local *local, vkp_sub_kind kind, size_t count,
                                  const vkp_str *names)
{
    vkp_relay *relay = local->shard->relay;
    vkp_i_subscription *self = vkp_i_subscription_new(local, kind, count, names);
    bool ask = false;
    vkp_status status;
    size_t i;
    if (self == NULL) {
        vkp_i_local_fail(local);
        return;
    }
    /* If one name must wait for the server, every name takes an interest: the members that a name
       has now may leave before the items return, and the topic's interest would end with them. */
    for (i = 0; i < count && vkp_i_relay_has_server(relay); i++) {
        ask = ask || vkp_hub_get_members(local->shard->hub, kind, names[i]) == 0;
    }
    vkp_i_local_pause(local, VKP_I_LOCAL_BUSY);
    self->waiting = 1; /* 1 until every name is submitted: no item finishes before that */
    for (i = 0; i < count; i++) {
        vkp_i_sub_item *item = &self->items[i];
        if (!ask) {
            item->status = VKP_OK;
            continue;
        }
        item->upstream = true;
        self->waiting++;
        status =
            vkp_client_subscribe_then(relay->push, kind, item->name, vkp_i_sub_item_done, item);
        if (status != VKP_OK) { /* on OK loop 0 owns the item: it may have returned already */
            item->status = status;
            item->upstream = false;
            self->waiting--;
        }
    }
    if (--self->waiting == 0) {
        vkp_i_subscription_finish(self);
    }
}

/* UNSUBSCRIBE, PUNSUBSCRIBE or SUNSUBSCRIBE with count names; 0: all names of the kind. */
static void vkp_i_local_unsubscribe(vkp_i_local *local, vkp_sub_kind kind, size_t count,
                                    const vkp_str *names)
{
    vkp_resp_writer writer;
    size_t i;
    vkp_resp_writer_init(&writer, local->shard->relay->env);
    for (i = 0; i < count; i++) {
        vkp_i_local_leave_name(local, kind, names[i]);
        vkp_i_put_confirmation(&writer, local, false, kind, names[i]);
    }
    if (count == 0 && local->member.counts[kind] == 0) {
        vkp_i_put_confirmation(&writer, local, false, kind, vkp_i_str(NULL, 0));
    }
    while (count == 0 && local->member.counts[kind] > 0) {
        vkp_str name = vkp_hub_get_member_name(&local->member, kind);
        vkp_bytes copy;
        if (vkp_bytes_copy(local->shard->relay->env, name.ptr, name.len, &copy) != VKP_OK) {
            vkp_i_local_fail(local);
            break;
        }
        vkp_i_local_leave_name(local, kind, name);
        vkp_i_put_confirmation(&writer, local, false, kind, vkp_i_str(copy.data, copy.len));
        vkp_bytes_unref(&copy);
    }
    vkp_i_local_answer_writer(local, &writer);
}

#endif /* VKP_I_IO */
