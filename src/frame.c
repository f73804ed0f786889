#if VKP_I_IO
/* ======================================================================================
   >>impl-frame   The length of a frame
   ======================================================================================
   Finds the end of a frame without building values: no allocation, no recursion, any thread. The
   input passed a strict reader before, so only bounds are checked here, not the grammar. Skip
   functions return the offset behind the skipped bytes, or 0 when the input ends before. */

/* Skip to behind the next LF. 0: there is none. */
static size_t vkp_i_skip_line(const uint8_t *data, size_t len, size_t at)
{
    const void *lf = at < len ? memchr(data + at, '\n', len - at) : NULL;
    return lf != NULL ? (size_t)((const uint8_t *)lf - data) + 1 : 0;
}

/* Skip the header at `at` and the bytes that belong to the value itself. *elements is the number of
   elements that follow. 0: incomplete. */
static size_t vkp_i_skip_head(const uint8_t *data, size_t len, size_t at, uint64_t *elements)
{
    size_t body = at < len ? vkp_i_skip_line(data, len, at + 1) : 0;
    uint64_t number = 0;
    size_t i;
    *elements = 0;
    if (body == 0) {
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

/* Whether the push whose elements start at `at` is a message. The aggregate around such a push does
   not count it as an element. */
static bool vkp_i_skip_is_message(const uint8_t *data, size_t len, size_t at)
{
    uint64_t elements;
    size_t end = vkp_i_skip_head(data, len, at, &elements);
    size_t text;
    if (end < at + 3) {
        return false;
    }
    text = data[at] == '+' ? at + 1 : vkp_i_skip_line(data, len, at + 1);
    text += data[at] == '=' ? VKP_I_VERBATIM_PREFIX : 0;
    return text < end - 2 && vkp_i_is_message_kind((const char *)data + text, end - 2 - text);
}

/* Skip the value at `at` with all its elements; attributes before elements are not counted as
   elements. 0: incomplete. */
static size_t vkp_i_skip_value(const uint8_t *data, size_t len, size_t at)
{
    uint64_t remaining = 1;
    bool root = true;
    while (remaining > 0) {
        uint64_t elements;
        size_t body = vkp_i_skip_head(data, len, at, &elements);
        if (body == 0) {
            return 0;
        }
        remaining += elements;
        if (root ||
            (data[at] != '|' && (data[at] != '>' || !vkp_i_skip_is_message(data, len, body)))) {
            remaining--;
        }
        root = false;
        at = body;
    }
    return at;
}

VKP_API size_t vkp_resp_get_frame_len(const uint8_t *data, size_t len)
{
    size_t at = 0;
    while (at < len && data[at] == '|') {
        at = vkp_i_skip_value(data, len, at);
        if (at == 0) {
            return 0;
        }
    }
    return vkp_i_skip_value(data, len, at);
}

#endif /* VKP_I_IO */
