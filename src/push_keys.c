#if VKP_I_IO
/* ======================================================================================
   >>impl-push-keys   The keys of an invalidation
   ======================================================================================
   Reads the frame of a push, whose bytes a reader accepted before: no allocation, no lock, any
   thread. A cursor is an offset into the frame, behind the key that was read last; the keys end
   with the frame, because they are its last element. Every offset is checked all the same: a frame
   may be made by a program, and a cursor may be of another push.
   A server sends RESP3 clients a push of its own, ">2 invalidate KEYS", and RESP2 clients a message
   of the channel __redis__:invalidate. KEYS is an array, or a null for all keys.              */

/* The offset behind the value at `at`; the frame's length when the value is incomplete. */
static size_t vkp_i_push_skip(const vkp_bytes *frame, size_t at)
{
    vkp_i_skip skip = VKP_ZERO;
    return at < frame->len && vkp_i_skip_value(&skip, frame->data + at, frame->len - at)
               ? at + skip.at
               : frame->len;
}

/* The offset of the first element at `at` or behind it: attributes are skipped, and pushes that
   are no elements. The frame's length: there is none.                                         */
static size_t vkp_i_push_element(const vkp_bytes *frame, size_t at)
{
    while (at < frame->len) {
        uint8_t mark = frame->data[at];
        if (mark == '>') {
            uint64_t elements;
            bool complete;
            size_t seen = 0;
            size_t body = vkp_i_skip_head(frame->data, frame->len, at, &seen, &elements);
            if (body == 0 || !vkp_i_skip_is_uncounted(frame->data, frame->len, body, &complete)) {
                return body == 0 ? frame->len : at;
            }
        } else if (mark != '|') {
            return at;
        }
        at = vkp_i_push_skip(frame, at);
    }
    return frame->len;
}

/* The offset of the element that is the array of keys or the null; 0: the push has none. */
static size_t vkp_i_push_keys_at(const vkp_push *push)
{
    const vkp_bytes *frame = &push->frame;
    bool message = push->kind == VKP_PUSH_MESSAGE &&
                   vkp_i_str_equal(push->channel, vkp_str_of("__redis__:invalidate"));
    uint64_t elements;
    size_t seen = 0;
    size_t at = 0;
    if (push->kind != VKP_PUSH_INVALIDATE && !message) {
        return 0;
    }
    while (at < frame->len && frame->data[at] == '|') { /* before the push */
        at = vkp_i_push_skip(frame, at);
    }
    at = vkp_i_skip_head(frame->data, frame->len, at, &seen, &elements);
    if (at == 0) {
        return 0;
    }
    at = vkp_i_push_skip(frame, vkp_i_push_element(frame, at)); /* the kind */
    if (message) {
        at = vkp_i_push_skip(frame, vkp_i_push_element(frame, at)); /* the channel */
    }
    at = vkp_i_push_element(frame, at);
    return at < frame->len ? at : 0;
}

VKP_API bool vkp_push_is_flush(const vkp_push *push)
{
    size_t at = vkp_i_push_keys_at(push);
    const uint8_t *data = push->frame.data;
    return at > 0 && (data[at] == '_' || ((data[at] == '*' || data[at] == '$') &&
                                          at + 1 < push->frame.len && data[at + 1] == '-'));
}

/* The text of the string at [at, end) of the frame; ptr NULL: it is none. */
static vkp_str vkp_i_push_text(const vkp_bytes *frame, size_t at, size_t end)
{
    const char *data = (const char *)frame->data;
    size_t begin = at + 1;
    if ((data[at] != '$' && data[at] != '+') || end < at + 3 ||
        (data[at] == '$' && (data[at + 1] == '-' || data[at + 1] == '?'))) {
        return vkp_i_str(NULL, 0);
    }
    if (data[at] == '$') {
        const char *lf = (const char *)memchr(data + at, '\n', end - at);
        begin = lf != NULL ? (size_t)(lf - data) + 1 : end;
    }
    return begin <= end - 2 ? vkp_i_str(data + begin, end - 2 - begin) : vkp_i_str(NULL, 0);
}

VKP_API bool vkp_push_get_key(const vkp_push *push, size_t *cursor, vkp_str *key)
{
    const vkp_bytes *frame = &push->frame;
    size_t at = *cursor;
    if (at == 0) {
        uint64_t elements;
        size_t seen = 0;
        at = vkp_i_push_keys_at(push);
        if (at == 0 || frame->data[at] != '*') {
            return false;
        }
        at = vkp_i_skip_head(frame->data, frame->len, at, &seen, &elements);
        if (at == 0) {
            return false;
        }
    }
    while ((at = vkp_i_push_element(frame, at)) < frame->len) {
        size_t end = vkp_i_push_skip(frame, at);
        vkp_str text = vkp_i_push_text(frame, at, end);
        *cursor = end;
        at = end;
        if (text.ptr != NULL) {
            *key = text;
            return true;
        }
    }
    *cursor = frame->len;
    return false;
}

#endif /* VKP_I_IO */
