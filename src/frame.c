#if VKP_I_IO
/* ======================================================================================
   >>impl-frame   The end of a frame
   ======================================================================================
   Finds the end of a frame without building values: no allocation, no recursion, any thread. Only
   bounds are checked here, not the grammar: the input passed a strict reader before, or a reader
   refused one of its values, whose end can be found all the same.
   A vkp_i_skip continues where it stopped when more bytes have arrived, so that a long frame in
   many pieces costs each byte once.                                                           */

/* Where the search for the end of a frame is; all zero at the start of the frame. */
typedef struct vkp_i_skip {
    size_t at;          /* offset of the next header; at the end: behind the frame */
    size_t line_seen;   /* bytes behind `at` that hold no LF */
    uint64_t remaining; /* values that are not complete, the root included */
    bool inside;        /* `at` is behind the header of the value */
    bool attribute;     /* the value is an attribute: the frame goes on behind it */
} vkp_i_skip;

/* Skip the header at `at` and the bytes that belong to the value itself; the first *seen bytes hold
   no LF. *elements is the number of elements that follow. Returns the offset behind. 0: incomplete,
   and *seen grows while the LF is missing.                                                    */
static size_t vkp_i_skip_head(const uint8_t *data, size_t len, size_t at, size_t *seen,
                              uint64_t *elements)
{
    size_t from = at + VKP_I_MAX(*seen, (size_t)1);
    const void *lf = from < len ? memchr(data + from, '\n', len - from) : NULL;
    size_t body = lf != NULL ? (size_t)((const uint8_t *)lf - data) + 1 : 0;
    uint64_t number = 0;
    size_t i;
    *elements = 0;
    if (body == 0) {
        *seen = at < len ? len - at : 0;
        return 0;
    }
    for (i = at + 1; i < body && data[i] >= '0' && data[i] <= '9'; i++) {
        number = number * 10 + (uint64_t)(data[i] - '0');
    }
    switch (data[at]) {
    case '$':
    case '!':
    case '=':
        if (data[at + 1] == '-') {
            return body;
        }
        return number > len || len - body < (size_t)number + 2 ? 0 : body + (size_t)number + 2;
    case '*':
    case '~':
    case '>':
        *elements = number;
        return body;
    case '%':
    case '|':
        *elements = number * 2;
        return body;
    default:
        return body;
    }
}

/* Whether the push whose elements start at `at` is no element of the aggregate around it. The kind
   must be complete.                                                                           */
static bool vkp_i_skip_is_uncounted(const uint8_t *data, size_t len, size_t at)
{
    uint64_t elements;
    size_t seen = 0;
    size_t end = vkp_i_skip_head(data, len, at, &seen, &elements);
    size_t text;
    if (end < at + 3) {
        return false;
    }
    text = data[at] == '+'
               ? at + 1
               : (size_t)((const uint8_t *)memchr(data + at, '\n', end - at) - data) + 1;
    text += data[at] == '=' ? VKP_I_VERBATIM_PREFIX : 0;
    return text < end - 2 && vkp_i_is_uncounted_kind((const char *)data + text, end - 2 - text);
}

/* Continue to the end of the value at the start of data; an attribute before an element is not
   counted as one. True: skip->at is the offset behind it. False: more bytes are needed.       */
static bool vkp_i_skip_value(vkp_i_skip *skip, const uint8_t *data, size_t len)
{
    if (!skip->inside) {
        skip->remaining = 1;
    }
    while (skip->remaining > 0) {
        uint64_t elements;
        uint64_t none;
        size_t seen = 0;
        bool counts = true;
        size_t body = vkp_i_skip_head(data, len, skip->at, &skip->line_seen, &elements);
        if (body == 0) {
            return false;
        }
        if (skip->inside && data[skip->at] == '|') {
            counts = false;
        } else if (skip->inside && data[skip->at] == '>' && elements > 0) {
            if (vkp_i_skip_head(data, len, body, &seen, &none) == 0) { /* the kind decides */
                return false;
            }
            counts = !vkp_i_skip_is_uncounted(data, len, body);
        }
        skip->remaining += elements;
        skip->remaining -= counts ? 1u : 0u;
        skip->inside = true;
        skip->line_seen = 0;
        skip->at = body;
    }
    return true;
}

/* Continue to the end of the frame: its attributes, then its value. True: skip->at is the offset
   behind it. False: more bytes are needed.                                                    */
static bool vkp_i_skip_frame(vkp_i_skip *skip, const uint8_t *data, size_t len)
{
    do {
        if (!skip->inside && skip->at < len) {
            skip->attribute = data[skip->at] == '|';
        }
        if (!vkp_i_skip_value(skip, data, len)) {
            return false;
        }
        skip->inside = false;
    } while (skip->attribute);
    return true;
}

VKP_API size_t vkp_resp_get_frame_len(const uint8_t *data, size_t len)
{
    vkp_i_skip skip = VKP_ZERO;
    return vkp_i_skip_frame(&skip, data, len) ? skip.at : 0;
}

/* The next push at or behind `from` that is inside the whole frame but no element of it: its bytes
   are [*begin, *end). False: there is none.                                                   */
static bool vkp_i_frame_get_nested(const vkp_bytes *frame, size_t from, size_t *begin, size_t *end)
{
    const uint8_t *data = frame->data;
    size_t len = frame->len;
    while (from < len) {
        uint64_t elements;
        size_t seen = 0;
        size_t body = vkp_i_skip_head(data, len, from, &seen, &elements);
        if (body == 0) {
            return false; /* not the case in a whole frame */
        }
        if (from > 0 && data[from] == '>' && elements > 0 &&
            vkp_i_skip_is_uncounted(data, len, body)) {
            vkp_i_skip skip = VKP_ZERO;
            *begin = from;
            *end = vkp_i_skip_value(&skip, data + from, len - from) ? from + skip.at : len;
            return true;
        }
        from = body;
    }
    return false;
}

#endif /* VKP_I_IO */
