#if VKP_I_IO
/* ======================================================================================
   >>impl-frame   The end of a frame
   ======================================================================================
   Finds the end of a frame without building values: no allocation, no recursion, any thread. Only
   bounds are checked here, not the grammar: the input passed a strict reader before, or a reader
   refused one of its values, whose end can be found all the same.
   The elements of a streamed value are not counted: headers and ends of streamed values are, and
   the value is complete when as many of them ended as began.
   A vkp_i_skip continues where it stopped when more bytes have arrived, so that a long frame in
   many pieces costs each byte once.                                                           */

/* Where the search for the end of a frame is; all zero at the start of the frame. */
typedef struct vkp_i_skip {
    size_t at;          /* offset of the next header; at the end: behind the frame */
    size_t line_seen;   /* bytes behind `at` that hold no LF */
    uint64_t remaining; /* values that are not complete, the root included; values inside a streamed
                           value are not counted                                               */
    uint64_t streamed;  /* streamed values that are not complete */
    bool inside;        /* `at` is behind the header of the value */
    bool attribute;     /* the value is an attribute: the frame goes on behind it */
} vkp_i_skip;

#define VKP_I_KIND_ROOM 24u /* bytes of a streamed kind that decide: the longest has 21 */

/* Whether the whole header at `at` is that of a streamed value. */
static bool vkp_i_skip_is_streamed(const uint8_t *data, size_t at)
{
    return data[at + 1] == '?' &&
           (data[at] == '$' || data[at] == '*' || data[at] == '~' || data[at] == '%');
}

/* Whether the whole header at `at` is the end of a streamed value. */
static bool vkp_i_skip_is_end(const uint8_t *data, size_t at)
{
    return data[at] == '.' || (data[at] == ';' && data[at + 1] == '0' && data[at + 2] == '\r');
}

/* The bytes that are missing of the bulk at `at`, whose header is whole; 0: none, or it is no
   bulk.                                                                                       */
static uint64_t vkp_i_skip_missing(const uint8_t *data, size_t len, size_t at)
{
    const uint8_t *lf = (const uint8_t *)memchr(data + at, '\n', len - at);
    uint64_t number = 0;
    size_t digit;
    size_t body;
    if (lf == NULL || (data[at] != '$' && data[at] != '!' && data[at] != '=')) {
        return 0;
    }
    body = (size_t)(lf - data) + 1;
    for (digit = at + 1; data[digit] >= '0' && data[digit] <= '9'; digit++) {
        number = number * 10 + (uint64_t)(data[digit] - '0');
    }
    return number + 2 > len - body ? number + 2 - (len - body) : 0;
}

/* Skip the header at `at` and the bytes that belong to the value itself; the first *seen bytes hold
   no LF. *elements is the number of elements that follow, 0 for a streamed value. A chunk and the
   end of a streamed value are skipped as values are. Returns the offset behind. 0: incomplete, and
   *seen grows while the LF is missing.                                                        */
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
    case ';':
        if (data[at + 1] == '-' || data[at + 1] == '?' || vkp_i_skip_is_end(data, at)) {
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

/* The text of the string at `at`; of a streamed string the first bytes, copied to room, which are
   enough to know a kind. False: more bytes are needed.                                        */
static bool vkp_i_skip_text(const uint8_t *data, size_t len, size_t at, char *room, vkp_str *text)
{
    uint64_t elements;
    size_t seen = 0;
    size_t end = vkp_i_skip_head(data, len, at, &seen, &elements);
    bool streamed = end != 0 && vkp_i_skip_is_streamed(data, at);
    size_t begin;
    *text = vkp_i_str(room, 0);
    while (streamed && end != 0 && text->len < VKP_I_KIND_ROOM) {
        size_t size;
        at = end;
        seen = 0;
        end = vkp_i_skip_head(data, len, at, &seen, &elements);
        if (end != 0) {
            begin = (size_t)((const uint8_t *)memchr(data + at, '\n', end - at) - data) + 1;
            size = data[at] == ';' && end > begin + 2 ? end - 2 - begin : 0;
            if (size == 0) { /* the end */
                return true;
            }
            size = VKP_I_MIN(size, VKP_I_KIND_ROOM - text->len);
            memcpy(room + text->len, data + begin, size);
            text->len += size;
        }
    }
    if (end == 0 || streamed) {
        return end != 0;
    }
    begin = data[at] == '+'
                ? at + 1
                : (size_t)((const uint8_t *)memchr(data + at, '\n', end - at) - data) + 1;
    begin += data[at] == '=' ? VKP_I_VERBATIM_PREFIX : 0;
    if (begin + 2 < end) {
        *text = vkp_i_str((const char *)data + begin, end - 2 - begin);
    }
    return true;
}

/* Whether the push whose elements start at `at` is no element of the aggregate around it. False too
   when its kind is incomplete, and *complete is false then.                                   */
static bool vkp_i_skip_is_uncounted(const uint8_t *data, size_t len, size_t at, bool *complete)
{
    char room[VKP_I_KIND_ROOM];
    vkp_str kind;
    *complete = vkp_i_skip_text(data, len, at, room, &kind);
    return *complete && vkp_i_is_uncounted_kind(kind.ptr, kind.len);
}

/* Count the value whose header is at skip->at and whose elements start at `body`. False: more bytes
   are needed to know whether it counts.                                                       */
static bool vkp_i_skip_count(vkp_i_skip *skip, const uint8_t *data, size_t len, size_t body,
                             uint64_t elements)
{
    bool counts = true;
    bool complete = true;
    if (vkp_i_skip_is_streamed(data, skip->at)) {
        skip->streamed++;
    } else if (skip->streamed > 0) {
        if (vkp_i_skip_is_end(data, skip->at) && --skip->streamed == 0) {
            skip->remaining--;
        }
    } else {
        if (skip->inside && data[skip->at] == '|') {
            counts = false;
        } else if (skip->inside && data[skip->at] == '>' && elements > 0) { /* the kind decides */
            counts = !vkp_i_skip_is_uncounted(data, len, body, &complete);
        }
        if (complete) {
            skip->remaining += elements;
            skip->remaining -= counts ? 1u : 0u;
        }
    }
    return complete;
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
        size_t body = vkp_i_skip_head(data, len, skip->at, &skip->line_seen, &elements);
        if (body == 0 || !vkp_i_skip_count(skip, data, len, body, elements)) {
            return false;
        }
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

/* The offset of the frame's value, behind its attributes; len: it has not arrived. */
static size_t vkp_i_frame_get_root(const uint8_t *data, size_t len)
{
    size_t at = 0;
    while (at < len && data[at] == '|') {
        vkp_i_skip skip = VKP_ZERO;
        if (!vkp_i_skip_value(&skip, data + at, len - at)) {
            return len;
        }
        at += skip.at;
    }
    return at;
}

/* The next push at or behind `from` that is inside the whole frame but no element of it: its bytes
   are [*begin, *end). False: there is none.                                                   */
static bool vkp_i_frame_get_nested(const vkp_bytes *frame, size_t from, size_t *begin, size_t *end)
{
    const uint8_t *data = frame->data;
    size_t len = frame->len;
    size_t root = vkp_i_frame_get_root(data, len);
    while (from < len) {
        uint64_t elements;
        bool complete;
        size_t seen = 0;
        size_t body = vkp_i_skip_head(data, len, from, &seen, &elements);
        if (body == 0) {
            return false; /* not the case in a whole frame */
        }
        if (from != root && data[from] == '>' && elements > 0 &&
            vkp_i_skip_is_uncounted(data, len, body, &complete)) {
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
