#if VKP_I_IO
/* ======================================================================================
   >>impl-hub   Who is subscribed to what
   ======================================================================================
   A topic is a name of one kind with its members, in no order. A subscription records its index
   among the topic's members and its neighbours among the member's subscriptions, so that
   removing it takes constant time at both ends.
   Messages are encoded into append-only blocks, one block per protocol: consecutive messages are
   neighbours, which a connection writes as one range.
   A hub runs on one loop's thread, without locks. Subscribe, unsubscribe and leave call
   on_interest for a topic's first and last member; delivery never does. Delivery never closes a
   connection (vkp_i_conn_close_later), so that the list of members does not change under it.  */

/* A name of one kind with its members. The name is behind the struct. */
typedef struct vkp_i_topic {
    vkp_i_map_node node; /* in vkp_hub.topics; its key is the name */
    vkp_hub_sub **subs;  /* one subscription for each member, in no order */
    size_t count;        /* used places of `subs` */
    size_t capacity;     /* allocated places of `subs` */
    vkp_sub_kind kind;   /* which of vkp_hub.topics holds this topic */
    bool is_top;         /* in vkp_hub.top */
    uint64_t messages;   /* messages that were delivered to the members */
} vkp_i_topic;

struct vkp_hub_sub {
    vkp_i_topic *topic;     /* holds this subscription at `index` */
    vkp_hub_member *member; /* the subscriber; in the caller's memory */
    size_t index;           /* place of this subscription in topic->subs */
    vkp_hub_sub *prev;      /* the member's newer subscription of this kind, or NULL */
    vkp_hub_sub *next;      /* the member's older subscription of this kind, or NULL */
};

#define VKP_I_HUB_TOP 16u /* most topics of vkp_hub.top */

struct vkp_hub {
    const vkp_env *env;
    vkp_hub_config config;           /* a copy */
    vkp_i_map topics[VKP_SUB_KINDS]; /* by vkp_sub_kind, then by name */
    vkp_block *blocks[2];            /* where messages are encoded: [0] RESP2, [1] RESP3; or NULL */
    vkp_i_topic *top[VKP_I_HUB_TOP]; /* topics with about the most messages, in no order */
    size_t top_count;                /* number of `top` */
    uint64_t top_messages; /* a topic with more messages than this may belong into `top` */
};

/* Match a byte against the element of a [set] at *at: a byte, an escaped byte or a range. *at
   moves behind the element.                                                                   */
static bool vkp_i_glob_class_hit(vkp_str pattern, size_t *at, unsigned char byte)
{
    unsigned char low = (unsigned char)pattern.ptr[*at];
    unsigned char high;
    if (low == '\\' && *at + 1 < pattern.len) {
        low = (unsigned char)pattern.ptr[*at + 1];
        *at += 2;
        return low == byte;
    }
    if (*at + 2 < pattern.len && pattern.ptr[*at + 1] == '-') {
        high = (unsigned char)pattern.ptr[*at + 2];
        *at += 3;
        return low <= high ? byte >= low && byte <= high : byte >= high && byte <= low;
    }
    *at += 1;
    return low == byte;
}

/* Match one byte against the pattern's element at *at; *at moves behind it. */
static bool vkp_i_glob_one(vkp_str pattern, size_t *at, unsigned char byte)
{
    unsigned char mark = (unsigned char)pattern.ptr[*at];
    bool negated;
    bool hit = false;
    if (mark == '?') {
        *at += 1;
        return true;
    }
    if (mark != '[') {
        *at += mark == '\\' && *at + 1 < pattern.len ? 1u : 0u;
        mark = (unsigned char)pattern.ptr[*at];
        *at += 1;
        return mark == byte;
    }
    *at += 1;
    negated = *at < pattern.len && pattern.ptr[*at] == '^';
    *at += negated ? 1u : 0u;
    while (*at < pattern.len && pattern.ptr[*at] != ']') {
        hit = vkp_i_glob_class_hit(pattern, at, byte) || hit;
    }
    *at += *at < pattern.len ? 1u : 0u; /* an unclosed set ends with the pattern */
    return hit != negated;
}

/* A mismatch returns to the last star only: an earlier star that matches more text cannot do
   better.                                                                                     */
VKP_API bool vkp_glob_is_match(vkp_str pattern, vkp_str text)
{
    size_t p = 0;
    size_t t = 0;
    size_t star = SIZE_MAX;
    size_t star_text = 0;
    for (;;) {
        size_t next = p;
        while (p < pattern.len && pattern.ptr[p] == '*') {
            star = ++p;
            star_text = t;
            next = p;
        }
        if (star == pattern.len) {
            return true;
        }
        if (t < text.len && p < pattern.len &&
            vkp_i_glob_one(pattern, &next, (unsigned char)text.ptr[t])) {
            p = next;
            t++;
            continue;
        }
        if (t == text.len && p == pattern.len) {
            return true;
        }
        if (star == SIZE_MAX || star_text >= text.len) {
            return false;
        }
        t = ++star_text;
        p = star;
    }
}

VKP_API vkp_status vkp_hub_open(const vkp_hub_config *config, vkp_hub **out)
{
    const vkp_env *env = vkp_i_env(config != NULL ? config->env : NULL);
    vkp_hub *hub;
    int kind;
    VKP_I_REQUIRE(out != NULL);
    hub = (vkp_hub *)vkp_i_alloc_zero(env, sizeof *hub);
    if (hub == NULL) {
        return VKP_ERR_NOMEM;
    }
    hub->env = env;
    if (config != NULL) {
        hub->config = *config;
    }
    for (kind = 0; kind < VKP_SUB_KINDS; kind++) {
        vkp_i_map_init(&hub->topics[kind], env);
    }
    *out = hub;
    return VKP_OK;
}

static void vkp_i_topic_free(vkp_hub *hub, vkp_i_topic *topic)
{
    vkp_i_free(hub->env, topic->subs, topic->capacity * sizeof *topic->subs);
    vkp_i_free(hub->env, topic, sizeof *topic + topic->node.key.len);
}

VKP_API void vkp_hub_unref(vkp_hub *hub)
{
    int kind;
    if (hub == NULL) {
        return;
    }
    for (kind = 0; kind < VKP_SUB_KINDS; kind++) {
        vkp_i_map_deinit(&hub->topics[kind]);
    }
    vkp_i_block_unref(hub->blocks[0]);
    vkp_i_block_unref(hub->blocks[1]);
    vkp_i_free(hub->env, hub, sizeof *hub);
}

/* The topic of a name, or NULL. */
static vkp_i_topic *vkp_i_hub_find(const vkp_hub *hub, vkp_sub_kind kind, vkp_str name)
{
    const vkp_i_map *map = &hub->topics[kind];
    vkp_i_map_node *node =
        map->count > 0 ? vkp_i_map_find(map, vkp_i_map_hash(map, name), name) : NULL;
    return node != NULL ? VKP_CONTAINER(node, vkp_i_topic, node) : NULL;
}

static vkp_i_topic *vkp_i_topic_new(vkp_hub *hub, vkp_sub_kind kind, vkp_str name)
{
    vkp_i_topic *topic = (vkp_i_topic *)vkp_i_alloc_zero(hub->env, sizeof *topic + name.len);
    if (topic == NULL) {
        return NULL;
    }
    topic->kind = kind;
    if (name.len > 0) {
        memcpy(topic + 1, name.ptr, name.len);
    }
    topic->node.key = vkp_i_str(topic + 1, name.len);
    topic->node.hash = vkp_i_map_hash(&hub->topics[kind], name);
    if (!vkp_i_map_insert(&hub->topics[kind], &topic->node)) {
        vkp_i_topic_free(hub, topic);
        return NULL;
    }
    return topic;
}

/* The member's subscription to the topic, or NULL. */
static vkp_hub_sub *vkp_i_member_find(const vkp_hub_member *member, const vkp_i_topic *topic)
{
    vkp_hub_sub *sub = member->i_subs[topic->kind];
    size_t i;
    /* Both lists are searched in step: the shorter one bounds the time. */
    for (i = 0; i < topic->count && sub != NULL && sub->topic != topic; i++) {
        if (topic->subs[i]->member == member) {
            return topic->subs[i];
        }
        sub = sub->next;
    }
    return i < topic->count ? sub : NULL;
}

/* A topic has more messages than top_messages: let it into `top`, in place of the one with the
   least. It needs an eighth more than that one: otherwise topics of one rate would change places
   with each message.                                                                          */
static void vkp_i_hub_rank(vkp_hub *hub, vkp_i_topic *topic)
{
    size_t least = hub->top_count;
    size_t i;
    if (hub->top_count < VKP_I_HUB_TOP) {
        hub->top_count++;
    } else {
        least = 0;
        for (i = 1; i < VKP_I_HUB_TOP; i++) {
            least = hub->top[i]->messages < hub->top[least]->messages ? i : least;
        }
        hub->top_messages = hub->top[least]->messages + hub->top[least]->messages / 8;
        if (topic->messages <= hub->top_messages) {
            return;
        }
        hub->top[least]->is_top = false;
    }
    hub->top[least] = topic;
    topic->is_top = true;
}

/* Take the topic out of `top`: the next topics with a message get in. */
static void vkp_i_hub_unrank(vkp_hub *hub, const vkp_i_topic *topic)
{
    size_t i = 0;
    while (hub->top[i] != topic) {
        i++;
    }
    hub->top[i] = hub->top[--hub->top_count];
    hub->top_messages = 0;
}

/* Free a topic without members; if the last parameter is set, call on_interest before. */
static void vkp_i_hub_forget_empty(vkp_hub *hub, vkp_i_topic *topic, bool tell)
{
    if (topic->count == 0) {
        vkp_i_map_remove(&hub->topics[topic->kind], &topic->node);
        if (topic->is_top) {
            vkp_i_hub_unrank(hub, topic);
        }
        if (tell && hub->config.on_interest != NULL) {
            hub->config.on_interest(hub->config.user, topic->kind, topic->node.key, false);
        }
        vkp_i_topic_free(hub, topic);
    }
}

VKP_API vkp_status vkp_hub_subscribe(vkp_hub *hub, vkp_hub_member *member, vkp_sub_kind kind,
                                     vkp_str name, bool *added)
{
    vkp_i_topic *topic;
    vkp_hub_sub *sub;
    void *subs;
    bool fresh;
    VKP_I_REQUIRE(hub != NULL && member != NULL && (unsigned)kind < VKP_SUB_KINDS);
    if (name.len > VKP_I_BLOCK_MAX) {
        return VKP_ERR_LIMIT;
    }
    topic = vkp_i_hub_find(hub, kind, name);
    fresh = topic == NULL;
    if (!fresh && vkp_i_member_find(member, topic) != NULL) {
        if (added != NULL) {
            *added = false;
        }
        return VKP_OK;
    }
    sub = (vkp_hub_sub *)vkp_i_alloc_zero(hub->env, sizeof *sub);
    if (fresh && sub != NULL) {
        topic = vkp_i_topic_new(hub, kind, name);
    }
    subs = topic != NULL ? topic->subs : NULL;
    if (sub == NULL || topic == NULL ||
        !vkp_i_grow(hub->env, &subs, &topic->capacity, topic->count + 1, sizeof *topic->subs)) {
        vkp_i_free(hub->env, sub, sizeof *sub);
        if (topic != NULL) {
            vkp_i_hub_forget_empty(hub, topic, false);
        }
        return VKP_ERR_NOMEM;
    }
    topic->subs = (vkp_hub_sub **)subs;
    sub->topic = topic;
    sub->member = member;
    sub->index = topic->count;
    topic->subs[topic->count++] = sub;
    sub->next = member->i_subs[kind];
    if (sub->next != NULL) {
        sub->next->prev = sub;
    }
    member->i_subs[kind] = sub;
    member->counts[kind]++;
    if (added != NULL) {
        *added = true;
    }
    if (fresh && hub->config.on_interest != NULL) {
        hub->config.on_interest(hub->config.user, kind, name, true);
    }
    return VKP_OK;
}

/* Remove a subscription from its topic and its member, and free it. The last one frees the
   topic.                                                                                      */
static void vkp_i_hub_drop(vkp_hub *hub, vkp_hub_sub *sub)
{
    vkp_i_topic *topic = sub->topic;
    vkp_hub_member *member = sub->member;
    topic->subs[sub->index] = topic->subs[--topic->count];
    topic->subs[sub->index]->index = sub->index;
    if (sub->prev != NULL) {
        sub->prev->next = sub->next;
    } else {
        member->i_subs[topic->kind] = sub->next;
    }
    if (sub->next != NULL) {
        sub->next->prev = sub->prev;
    }
    member->counts[topic->kind]--;
    vkp_i_free(hub->env, sub, sizeof *sub);
    vkp_i_hub_forget_empty(hub, topic, true);
}

VKP_API bool vkp_hub_unsubscribe(vkp_hub *hub, vkp_hub_member *member, vkp_sub_kind kind,
                                 vkp_str name)
{
    vkp_i_topic *topic = vkp_i_hub_find(hub, kind, name);
    vkp_hub_sub *sub = topic != NULL ? vkp_i_member_find(member, topic) : NULL;
    if (sub != NULL) {
        vkp_i_hub_drop(hub, sub);
    }
    return sub != NULL;
}

VKP_API void vkp_hub_leave(vkp_hub *hub, vkp_hub_member *member)
{
    int kind;
    for (kind = 0; kind < VKP_SUB_KINDS; kind++) {
        while (member->i_subs[kind] != NULL) {
            vkp_i_hub_drop(hub, member->i_subs[kind]);
        }
    }
}

VKP_API vkp_str vkp_hub_get_member_name(const vkp_hub_member *member, vkp_sub_kind kind)
{
    const vkp_hub_sub *sub = member->i_subs[kind];
    return sub != NULL ? sub->topic->node.key : vkp_i_str(NULL, 0);
}

VKP_API bool vkp_hub_is_subscribed(const vkp_hub *hub, const vkp_hub_member *member,
                                   vkp_sub_kind kind, vkp_str name)
{
    vkp_i_topic *topic = vkp_i_hub_find(hub, kind, name);
    return topic != NULL && vkp_i_member_find(member, topic) != NULL;
}

VKP_API size_t vkp_hub_get_members(const vkp_hub *hub, vkp_sub_kind kind, vkp_str name)
{
    vkp_i_topic *topic = vkp_i_hub_find(hub, kind, name);
    return topic != NULL ? topic->count : 0;
}

VKP_API size_t vkp_hub_get_names(const vkp_hub *hub, vkp_sub_kind kind)
{
    return hub->topics[kind].count;
}

VKP_API bool vkp_hub_next_name(const vkp_hub *hub, vkp_sub_kind kind, void **cursor, vkp_str *name)
{
    vkp_i_map_node *node = vkp_i_map_get_next(&hub->topics[kind], (vkp_i_map_node *)*cursor);
    *cursor = node;
    if (node != NULL) {
        *name = node->key;
    }
    return node != NULL;
}

/* ---- delivery ---- */

/* A message under delivery and its encodings. */
typedef struct vkp_i_message {
    vkp_str parts[4];    /* kind, pattern (may be empty), channel, payload; views */
    bool has_pattern;    /* parts[1] is part of the message */
    vkp_bytes frames[2]; /* [0] RESP2, [1] RESP3; views; len 0: not encoded yet */
} vkp_i_message;

#define VKP_I_HUB_BLOCK 65536u /* least capacity of an encoding block */
#define VKP_I_BULK_HEAD 28u    /* at least the bytes that a bulk string adds to its text */
#define VKP_I_ARRAY_HEAD 8u    /* at least the bytes of a message's first line */

/* Room for `bytes` at the end of an encoding block, or NULL: no memory. The hub's own reference
   keeps the block while it is filled.                                                         */
static uint8_t *vkp_i_hub_reserve(vkp_hub *hub, int which, size_t bytes)
{
    vkp_block *block = hub->blocks[which];
    if (block != NULL && vkp_i_block_is_mine(block)) {
        block->len = 0; /* no connection holds it any longer: reuse the same cache lines */
    }
    if (block != NULL && block->capacity - block->len < bytes) {
        vkp_i_block_unref(block);
        block = NULL;
    }
    if (block == NULL) {
        block = vkp_i_block_open(hub->env, VKP_I_MAX((size_t)VKP_I_HUB_BLOCK, bytes));
    }
    hub->blocks[which] = block;
    return block != NULL ? vkp_i_block_data(block) + block->len : NULL;
}

/* Write the text as a bulk string; returns the bytes written, at most text.len +
   VKP_I_BULK_HEAD.                                                                            */
static size_t vkp_i_encode_bulk(uint8_t *out, vkp_str text)
{
    char digits[VKP_I_DIGITS];
    size_t from = vkp_i_format_u64(digits, text.len);
    size_t at = 0;
    out[at++] = '$';
    memcpy(out + at, digits + from, VKP_I_DIGITS - from);
    at += VKP_I_DIGITS - from;
    out[at++] = '\r';
    out[at++] = '\n';
    if (text.len > 0) {
        memcpy(out + at, text.ptr, text.len);
    }
    at += text.len;
    out[at++] = '\r';
    out[at++] = '\n';
    return at;
}

/* The message in the protocol, encoded at the first call. NULL: no memory, or above
   VKP_I_BLOCK_MAX.                                                                            */
static const vkp_bytes *vkp_i_message_frame(vkp_hub *hub, vkp_i_message *message, int protocol)
{
    int which = protocol == 3 ? 1 : 0;
    vkp_bytes *frame = &message->frames[which];
    size_t most = VKP_I_ARRAY_HEAD;
    size_t at = 0;
    uint8_t *out;
    int i;
    if (frame->len > 0) {
        return frame;
    }
    for (i = 0; i < 4; i++) {
        most += message->parts[i].len + VKP_I_BULK_HEAD;
    }
    out = most <= VKP_I_BLOCK_MAX ? vkp_i_hub_reserve(hub, which, most) : NULL;
    if (out == NULL) {
        return NULL;
    }
    out[at++] = which == 1 ? '>' : '*';
    out[at++] = message->has_pattern ? '4' : '3';
    out[at++] = '\r';
    out[at++] = '\n';
    for (i = 0; i < 4; i++) {
        if (i != 1 || message->has_pattern) {
            at += vkp_i_encode_bulk(out + at, message->parts[i]);
        }
    }
    hub->blocks[which]->len += at;
    frame->data = out;
    frame->len = at;
    frame->block = hub->blocks[which];
    return frame;
}

/* Push the message to every member of the topic; returns the number of members. */
static size_t vkp_i_topic_deliver(vkp_hub *hub, vkp_i_topic *topic, vkp_i_message *message)
{
    size_t i;
    topic->messages++;
    if (topic->messages > hub->top_messages && !topic->is_top) {
        vkp_i_hub_rank(hub, topic);
    }
    for (i = 0; i < topic->count; i++) {
        vkp_hub_member *member = topic->subs[i]->member;
        const vkp_bytes *frame = &message->frames[member->protocol == 3 ? 1 : 0];
        if (frame->len == 0) {
            frame = vkp_i_message_frame(hub, message, member->protocol);
        }
        if (frame != NULL) {
            (void)!vkp_i_conn_admit(member->conn, frame); /* the policy counts drops */
        }
    }
    return topic->count;
}

static void vkp_i_message_init(vkp_i_message *message, const char *kind, vkp_str pattern,
                               vkp_str channel, vkp_str payload)
{
    memset(message, 0, sizeof *message);
    message->parts[0] = vkp_str_of(kind);
    message->parts[1] = pattern;
    message->parts[2] = channel;
    message->parts[3] = payload;
    message->has_pattern = kind[0] == 'p';
}

VKP_API size_t vkp_hub_publish(vkp_hub *hub, vkp_sub_kind kind, vkp_str channel, vkp_str payload)
{
    vkp_i_message message;
    vkp_i_topic *topic = vkp_i_hub_find(hub, kind, channel);
    vkp_i_map_node *node = NULL;
    vkp_str none = vkp_i_str(NULL, 0);
    size_t count = 0;
    if (topic != NULL) {
        vkp_i_message_init(&message, kind == VKP_SUB_SHARD ? "smessage" : "message", none, channel,
                           payload);
        count += vkp_i_topic_deliver(hub, topic, &message);
    }
    if (kind == VKP_SUB_CHANNEL && hub->topics[VKP_SUB_PATTERN].count > 0) {
        while ((node = vkp_i_map_get_next(&hub->topics[VKP_SUB_PATTERN], node)) != NULL) {
            if (vkp_glob_is_match(node->key, channel)) {
                vkp_i_message_init(&message, "pmessage", node->key, channel, payload);
                count += vkp_i_topic_deliver(hub, VKP_CONTAINER(node, vkp_i_topic, node), &message);
            }
        }
    }
    return count;
}

VKP_API size_t vkp_hub_deliver(vkp_hub *hub, const vkp_push *push)
{
    vkp_i_message message;
    vkp_i_topic *topic;
    vkp_sub_kind kind = push->kind == VKP_PUSH_PMESSAGE   ? VKP_SUB_PATTERN
                        : push->kind == VKP_PUSH_SMESSAGE ? VKP_SUB_SHARD
                                                          : VKP_SUB_CHANNEL;
    if (push->kind != VKP_PUSH_MESSAGE && kind == VKP_SUB_CHANNEL) {
        return 0;
    }
    topic = vkp_i_hub_find(hub, kind, kind == VKP_SUB_PATTERN ? push->pattern : push->channel);
    if (topic == NULL) {
        return 0;
    }
    vkp_i_message_init(&message,
                       kind == VKP_SUB_PATTERN ? "pmessage"
                       : kind == VKP_SUB_SHARD ? "smessage"
                                               : "message",
                       push->pattern, push->channel, push->payload);
    if (push->frame.len > 0 && push->frame.data[0] == '>') {
        message.frames[1] = push->frame;
    }
    return vkp_i_topic_deliver(hub, topic, &message);
}

#endif /* VKP_I_IO */
