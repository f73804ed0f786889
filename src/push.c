#if VKP_I_IO
/* ======================================================================================
   >>impl-push   What a server pushes
   ======================================================================================
   Recognise a push in a value. vkp_push_from_value takes no lock and allocates nothing; the
   texts of its result view the value's frame, so it runs on any thread.
   vkp_i_push_forms is the only list of kinds that a server sends. A push of a listed name with
   another number of elements is VKP_PUSH_OTHER. The kinds from VKP_PUSH_CONNECTED on are events
   of the client and never come from a server.                                                 */

VKP_API const char *vkp_push_kind_str(vkp_push_kind kind)
{
    switch (kind) {
    case VKP_PUSH_MESSAGE:
        return "message";
    case VKP_PUSH_PMESSAGE:
        return "pmessage";
    case VKP_PUSH_SMESSAGE:
        return "smessage";
    case VKP_PUSH_SUBSCRIBED:
        return "subscribed";
    case VKP_PUSH_UNSUBSCRIBED:
        return "unsubscribed";
    case VKP_PUSH_INVALIDATE:
        return "invalidate";
    case VKP_PUSH_OTHER:
        return "other";
    case VKP_PUSH_CONNECTED:
        return "connected";
    case VKP_PUSH_CONNECT_FAILED:
        return "connect-failed";
    case VKP_PUSH_DISCONNECTED:
        return "disconnected";
    case VKP_PUSH_RECONNECTED:
        return "reconnected";
    case VKP_PUSH_REFUSED:
        return "refused";
    case VKP_PUSH_LOST:
        return "lost";
    case VKP_PUSH_GAP:
        return "gap";
    case VKP_PUSH_LAGGED:
        return "lagged";
    }
    return "unknown";
}

VKP_API size_t vkp_push_get_cost(const void *push)
{
    return sizeof(vkp_push) + ((const vkp_push *)push)->frame.len;
}

VKP_API void vkp_push_unref(vkp_push *push)
{
    if (push != NULL) {
        vkp_bytes_unref(&push->frame);
        memset(push, 0, sizeof *push);
    }
}

VKP_API void vkp_push_drop(void *user, void *push)
{
    (void)user;
    vkp_push_unref((vkp_push *)push);
}

/* Whether the push is a message of a pub/sub channel, received by its name, by a pattern or as a
   shard channel.                                                                              */
static bool vkp_i_push_kind_is_message(vkp_push_kind kind)
{
    return kind == VKP_PUSH_MESSAGE || kind == VKP_PUSH_PMESSAGE || kind == VKP_PUSH_SMESSAGE;
}

/* Whether the push is an event of the client, which no server sends. */
static bool vkp_i_push_kind_is_event(vkp_push_kind kind)
{
    return kind >= VKP_PUSH_CONNECTED;
}

/* One kind of push as a server writes it. */
typedef struct vkp_i_push_form {
    const char *name;   /* the push's first element */
    vkp_push_kind kind; /* value of vkp_push.kind */
    vkp_sub_kind sub;   /* value of vkp_push.sub; without meaning for INVALIDATE */
    uint8_t elements;   /* number of elements, the name included */
} vkp_i_push_form;

static const vkp_i_push_form vkp_i_push_forms[] = {
    {"message", VKP_PUSH_MESSAGE, VKP_SUB_CHANNEL, 3},
    {"pmessage", VKP_PUSH_PMESSAGE, VKP_SUB_PATTERN, 4},
    {"smessage", VKP_PUSH_SMESSAGE, VKP_SUB_SHARD, 3},
    {"subscribe", VKP_PUSH_SUBSCRIBED, VKP_SUB_CHANNEL, 3},
    {"psubscribe", VKP_PUSH_SUBSCRIBED, VKP_SUB_PATTERN, 3},
    {"ssubscribe", VKP_PUSH_SUBSCRIBED, VKP_SUB_SHARD, 3},
    {"unsubscribe", VKP_PUSH_UNSUBSCRIBED, VKP_SUB_CHANNEL, 3},
    {"punsubscribe", VKP_PUSH_UNSUBSCRIBED, VKP_SUB_PATTERN, 3},
    {"sunsubscribe", VKP_PUSH_UNSUBSCRIBED, VKP_SUB_SHARD, 3},
    {"invalidate", VKP_PUSH_INVALIDATE, VKP_SUB_CHANNEL, 2}};

/* Fill the fields of a push from a value of the given form. */
static void vkp_i_push_parts(const vkp_value *value, const vkp_i_push_form *form, vkp_push *push)
{
    const vkp_value *element = vkp_value_get_first(value);
    push->kind = form->kind;
    push->sub = form->sub;
    if (form->kind == VKP_PUSH_INVALIDATE) {
        return;
    }
    element = vkp_value_get_next(value, element);
    if (form->kind == VKP_PUSH_PMESSAGE) {
        push->pattern = vkp_value_get_str(element);
        element = vkp_value_get_next(value, element);
    }
    push->channel = vkp_value_get_str(element);
    if (vkp_i_push_kind_is_message(form->kind)) {
        push->payload = vkp_value_get_str(vkp_value_get_next(value, element));
    }
}

/* Copy the bytes to *end, which moves behind them; returns a view of the copy. */
static vkp_str vkp_i_put_copy(char **end, vkp_str text)
{
    vkp_str copy = vkp_i_str(*end, text.len);
    if (text.len > 0) {
        memcpy(*end, text.ptr, text.len);
    }
    *end += text.len;
    return copy;
}

/* Make the event own its texts: copies of channel and payload in a block that its frame, of no
   bytes, refers to. False: no memory; the event is unchanged.                                 */
static bool vkp_i_push_own_texts(const vkp_env *env, vkp_push *event)
{
    vkp_block *block = vkp_i_block_open(env, event->channel.len + event->payload.len);
    char *end;
    if (block == NULL) {
        return false;
    }
    end = (char *)vkp_i_block_data(block);
    event->channel = vkp_i_put_copy(&end, event->channel);
    event->payload = vkp_i_put_copy(&end, event->payload);
    event->frame.block = block;
    return true;
}

/* Read a plain message, the push of a channel of most messages: no attributes and no aggregates
   inside. False: it is none, and *push is unchanged. Each field is written, because clearing the
   struct first costs more than the rest.                                                      */
static inline bool vkp_i_push_from_message(const vkp_value *value, vkp_push *push)
{
    if (value->span != 4 || value->len != 3 || value[1].type != VKP_RESP_STRING ||
        value[1].len != 7 || memcmp(value[1].u.str, "message", 7) != 0 ||
        value[2].type != VKP_RESP_STRING || value[3].type != VKP_RESP_STRING) {
        return false;
    }
    push->kind = VKP_PUSH_MESSAGE;
    push->sub = VKP_SUB_CHANNEL;
    push->frame.data = NULL;
    push->frame.len = 0;
    push->frame.block = NULL;
    push->channel = vkp_i_str(value[2].u.str, value[2].len);
    push->pattern.ptr = NULL;
    push->pattern.len = 0;
    push->payload = vkp_i_str(value[3].u.str, value[3].len);
    push->gap = NULL;
    push->missed = 0;
    return true;
}

VKP_API vkp_status vkp_push_from_value(const vkp_value *value, vkp_push *push)
{
    size_t i;
    VKP_I_REQUIRE(value != NULL && push != NULL);
    if ((value->type != VKP_RESP_PUSH && value->type != VKP_RESP_ARRAY) || value->len == 0 ||
        value[1].type != VKP_RESP_STRING) {
        return VKP_ERR_INVALID;
    }
    if (vkp_i_push_from_message(value, push)) {
        return VKP_OK;
    }
    memset(push, 0, sizeof *push);
    for (i = 0; i < sizeof vkp_i_push_forms / sizeof vkp_i_push_forms[0]; i++) {
        const vkp_i_push_form *form = &vkp_i_push_forms[i];
        if (value->len == form->elements &&
            vkp_i_str_equal(vkp_value_get_str(&value[1]), vkp_str_of(form->name))) {
            vkp_i_push_parts(value, form, push);
            return VKP_OK;
        }
    }
    push->kind = VKP_PUSH_OTHER;
    push->channel = vkp_value_get_str(&value[1]);
    return VKP_OK;
}

#endif /* VKP_I_IO */
