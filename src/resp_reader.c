#if VKP_I_IO
/* ======================================================================================
   >>impl-resp   RESP2 and RESP3
   ======================================================================================
   The reader scans a window that starts at the current frame. `position` is the end of the values
   that are complete. Bytes behind it are scanned again when more bytes arrive; that costs at most
   one header of 22 bytes, and a line continues at `line_seen`.
   Values of an incomplete frame hold offsets into the window; they become pointers when the frame
   is complete, so the window may move between two scans. Open aggregates are a stack of counters:
   no recursion, and nothing is allocated for an announced count.
   A streamed value is a level too, which ends with ";0" or "." in place of a count: the elements of
   a streamed string are its chunks, which are copied to `text` one behind the other.
   Each step grows its arrays before it changes anything else, so NOMEM can be retried. */

#define VKP_I_READER_MOST_DEPTH 65000u  /* highest max_depth: vkp_value.i_depth has 16 bits */
#define VKP_I_READER_REASON_BYTES 160   /* bytes of an error text, its NUL included */
#define VKP_I_READER_KEPT_VALUES 32768u /* larger value arrays are freed after their frame */
#define VKP_I_READER_KEPT_TEXT 1048576u /* a larger `text` is freed after its frame */
#define VKP_I_QUICK_VALUES 4u           /* values of a message: push, kind, channel, payload */
#define VKP_I_QUICK_DIGITS 8u           /* longest length that the quick path reads */
#define VKP_I_KIND_LEN 7u               /* bytes of "message" */
#define VKP_I_TLS_ALERT 0x15            /* first byte of a TLS record: an alert */
#define VKP_I_TLS_HANDSHAKE 0x16        /* first byte of a TLS record: a handshake */

#define VKP_I_STREAMED INT64_MIN        /* the length or count of a streamed value: "?" */
#define VKP_I_ENDLESS UINT64_MAX        /* `remaining` at the start of a streamed value */
#define VKP_I_COUNTED_MOST (1ull << 33) /* largest `remaining` of an aggregate with a count */
#define VKP_I_VALUE_GATHERED 128u       /* private bit of flags: i_offset is that in `text` */

/* An aggregate, or a streamed string, that is not complete yet. */
typedef struct vkp_i_level {
    size_t index;       /* index of the value in reader->values */
    uint64_t remaining; /* elements that are not complete yet; streamed: VKP_I_ENDLESS less those
                           that are, and 0 at the end                                          */
    size_t attribute;   /* index + 1 of the attribute before the next element; 0: none */
} vkp_i_level;

struct vkp_resp_reader {
    const vkp_env *env;
    vkp_resp_config config;  /* defaults filled in */
    vkp_status status;       /* OK, or the sticky error */
    uint64_t error_position; /* of the wrong byte, counted since open or reset */
    bool end_known; /* the sticky error is about one value: vkp_i_skip finds the frame's end */
    char reason[VKP_I_READER_REASON_BYTES]; /* text of the sticky error, or "" */
    uint64_t consumed;                      /* bytes of whole frames since open or reset */
    size_t position;                        /* end of the complete values in the window */
    size_t line_seen;  /* where the search for the end of a line continues; 0: at its start */
    bool whole;        /* the last scan returned a frame: the next scan starts a new one */
    bool quick;        /* the limits allow vkp_i_reader_quick */
    bool quick_values; /* values[0] to values[3] have the constant fields of a message */
    bool nested;       /* the frame has a VKP_VALUE_OUT_OF_BAND */
    size_t streamed;   /* number of streamed values in the frame */
    size_t attribute;  /* index + 1 of the attribute before the root value; 0: none */
    vkp_value *values; /* the values of the frame, in reading order */
    size_t count;
    size_t capacity;
    vkp_i_level *levels; /* stack of the open aggregates */
    size_t depth;        /* number of open aggregates */
    size_t level_capacity;
    char *text; /* the streamed strings of the frame */
    size_t text_len;
    size_t text_capacity;
    uint8_t *buffer; /* bytes that feed copied */
    size_t begin;    /* offset of the first unread byte in buffer */
    size_t end;      /* offset behind the last byte in buffer */
    size_t buffer_capacity;
    size_t given; /* bytes of the frame that next returned; dropped at the next call */
};

/* The start of the frame that a subscriber receives most; the channel's length follows. */
static const char vkp_i_message_prefix[] = ">3\r\n$7\r\nmessage\r\n$";
#define VKP_I_MESSAGE_PREFIX 18u /* bytes of vkp_i_message_prefix */

static bool vkp_i_is_crlf(const uint8_t *at, const uint8_t *end)
{
    return end - at >= 2 && memcmp(at, "\r\n", 2) == 0;
}

/* Whether the frame starts with vkp_i_message_prefix. */
static bool vkp_i_is_message(const uint8_t *frame, size_t len)
{
    return len >= VKP_I_MESSAGE_PREFIX &&
           vkp_i_load64(frame) == vkp_i_load64(vkp_i_message_prefix) &&
           vkp_i_load64(frame + 8) == vkp_i_load64(vkp_i_message_prefix + 8) &&
           memcmp(frame + 16, "\n$", 2) == 0;
}

VKP_API vkp_status vkp_resp_reader_open(const vkp_resp_config *config, vkp_resp_reader **out)
{
    vkp_resp_reader *reader;
    const vkp_env *env;
    static const vkp_resp_config defaults = VKP_ZERO;
    VKP_I_REQUIRE(out != NULL);
    if (config == NULL) {
        config = &defaults;
    }
    VKP_I_REQUIRE(config->max_depth <= VKP_I_READER_MOST_DEPTH &&
                  config->max_frame_bytes <= VKP_I_BLOCK_MAX);
    env = vkp_i_env(config->env);
    reader = (vkp_resp_reader *)vkp_i_alloc_zero(env, sizeof *reader);
    if (reader == NULL) {
        return VKP_ERR_NOMEM;
    }
    reader->env = env;
    reader->config = *config;
    config = NULL;
/* The defaults that vkp_resp_config documents. */
#define VKP_I_DEFAULT(field, value)     \
    if (reader->config.field == 0) {    \
        reader->config.field = (value); \
    }
    VKP_I_DEFAULT(max_depth, 128)
    VKP_I_DEFAULT(max_elements, 0x7fffffffu)
    VKP_I_DEFAULT(max_bulk_bytes, (size_t)512 << 20)
    VKP_I_DEFAULT(max_line_bytes, 65536)
    VKP_I_DEFAULT(max_frame_bytes, (size_t)1 << 30)
#undef VKP_I_DEFAULT
    reader->quick = reader->config.max_depth > 0 && reader->config.max_elements >= 3 &&
                    reader->config.max_bulk_bytes >= VKP_I_KIND_LEN;
    *out = reader;
    return VKP_OK;
}

/* Free the arrays of values and levels, and the texts. */
static void vkp_i_reader_trim(vkp_resp_reader *reader)
{
    vkp_i_free(reader->env, reader->values, reader->capacity * sizeof *reader->values);
    vkp_i_free(reader->env, reader->levels, reader->level_capacity * sizeof *reader->levels);
    reader->values = NULL;
    reader->capacity = 0;
    reader->levels = NULL;
    reader->level_capacity = 0;
    vkp_i_free(reader->env, reader->text, reader->text_capacity);
    reader->text = NULL;
    reader->text_capacity = 0;
}

VKP_API void vkp_resp_reader_unref(vkp_resp_reader *reader)
{
    if (reader != NULL) {
        vkp_i_reader_trim(reader);
        vkp_i_free(reader->env, reader->buffer, reader->buffer_capacity);
        vkp_i_free(reader->env, reader, sizeof *reader);
    }
}

/* Prepare for a new frame. The values of the last one stay until they are overwritten. */
static void vkp_i_reader_start(vkp_resp_reader *reader)
{
    reader->whole = false;
    reader->position = 0;
    reader->line_seen = 0;
    reader->attribute = 0;
    reader->count = 0;
    reader->depth = 0;
    reader->nested = false;
    reader->streamed = 0;
    reader->text_len = 0;
}

VKP_API void vkp_resp_reader_reset(vkp_resp_reader *reader)
{
    vkp_i_reader_start(reader);
    reader->status = VKP_OK;
    reader->reason[0] = '\0';
    reader->error_position = 0;
    reader->consumed = 0;
    reader->begin = 0;
    reader->end = 0;
    reader->given = 0;
}

VKP_API const char *vkp_resp_reader_get_error(const vkp_resp_reader *reader, uint64_t *position)
{
    if (position != NULL) {
        *position = reader->error_position;
    }
    return reader->reason;
}

/* Set the sticky error and its text. `at`: offset of the wrong byte in the window. */
__attribute__((format(printf, 4, 5))) static vkp_status
vkp_i_reader_fail(vkp_resp_reader *reader, vkp_status status, size_t at, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    (void)vsnprintf(reader->reason, sizeof reader->reason, format, arguments);
    va_end(arguments);
    reader->status = status;
    reader->error_position = reader->consumed + at;
    reader->end_known = false;
    return status;
}

/* Signs that the number of a header may have; they depend on the type byte before it. */
#define VKP_I_NUM_PLUS 1u      /* "+5" is allowed */
#define VKP_I_NUM_NEGATIVE 2u  /* every "-n" is allowed */
#define VKP_I_NUM_MINUS_ONE 4u /* "-1" is the only allowed negative number */
#define VKP_I_NUM_STREAMED 8u  /* "?" is allowed, with vkp_resp_config.streamed */

/* Check that a CRLF is at `at`. */
__attribute__((always_inline)) static inline vkp_status
vkp_i_reader_crlf(vkp_resp_reader *reader, const uint8_t *window, size_t len, size_t at)
{
    if (len > at && window[at] != '\r') {
        return vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, at, "CRLF expected, byte 0x%02x found",
                                 window[at]);
    }
    if (len < at + 2) {
        return VKP_ERR_EMPTY;
    }
    if (window[at + 1] != '\n') {
        return vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, at + 1, "CR without LF");
    }
    return VKP_OK;
}

/* A byte at `at` that is no digit where a number begins: a "?" and CRLF is the length or count of a
   streamed value, VKP_I_STREAMED.                                                             */
__attribute__((noinline)) static vkp_status vkp_i_reader_no_digit(vkp_resp_reader *reader,
                                                                  const uint8_t *window, size_t len,
                                                                  size_t at, uint32_t allowed,
                                                                  int64_t *number, size_t *after)
{
    if (window[at] != '?' || (allowed & VKP_I_NUM_STREAMED) == 0 || !reader->config.streamed) {
        return vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, at, "digit expected, byte 0x%02x found",
                                 window[at]);
    }
    *number = VKP_I_STREAMED;
    *after = at + 3;
    return vkp_i_reader_crlf(reader, window, len, at + 1);
}

/* Read digits and CRLF at `at`; *after is the offset behind the LF. The number of "?" is
   VKP_I_STREAMED. EMPTY: bytes are missing. */
static vkp_status vkp_i_reader_number(vkp_resp_reader *reader, const uint8_t *window, size_t len,
                                      size_t at, uint32_t allowed, int64_t *number, size_t *after)
{
    uint64_t value = 0;
    uint64_t most = (uint64_t)INT64_MAX;
    bool negative = false;
    size_t digits = 0;
    size_t first;
    if (at < len && (window[at] == '-' || window[at] == '+')) {
        negative = window[at] == '-';
        if (negative ? (allowed & (VKP_I_NUM_NEGATIVE | VKP_I_NUM_MINUS_ONE)) == 0
                     : (allowed & VKP_I_NUM_PLUS) == 0) {
            return vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, at, "sign '%c' not allowed here",
                                     window[at]);
        }
        most += negative ? 1u : 0u;
        allowed &= ~VKP_I_NUM_STREAMED;
        at++;
    }
    first = at;
    for (; at < len && window[at] >= '0' && window[at] <= '9'; at++, digits++) {
        uint64_t digit = (uint64_t)(window[at] - '0');
        if (digits == 1 && window[first] == '0') {
            return vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, first, "number with a leading zero");
        }
        if (value > (most - digit) / 10) {
            return vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, at, "number beyond 64 bits");
        }
        value = value * 10 + digit;
    }
    if (at >= len) {
        return VKP_ERR_EMPTY;
    }
    if (digits == 0) {
        return vkp_i_reader_no_digit(reader, window, len, at, allowed, number, after);
    }
    if (window[at] != '\r') {
        return vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, at,
                                 "CRLF expected after a number, byte 0x%02x found", window[at]);
    }
    if (at + 1 >= len) {
        return VKP_ERR_EMPTY;
    }
    if (window[at + 1] != '\n') {
        return vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, at + 1, "CR without LF");
    }
    if (negative && (value == 0 || ((allowed & VKP_I_NUM_NEGATIVE) == 0 && value != 1))) {
        return vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, first,
                                 "negative number not allowed here");
    }
    *number = negative ? (int64_t)(0 - value) : (int64_t)value;
    *after = at + 2;
    return VKP_OK;
}

/* Find the line behind the type byte at `position`: its text is [position + 1, *end). EMPTY: more
   bytes are needed; line_seen is where the next search starts. */
static vkp_status vkp_i_reader_line(vkp_resp_reader *reader, const uint8_t *window, size_t len,
                                    size_t *end)
{
    size_t start = reader->position + 1;
    size_t from = VKP_I_MAX(start, reader->line_seen);
    size_t most = reader->config.max_line_bytes;
    const void *found = from < len ? memchr(window + from, '\n', len - from) : NULL;
    size_t stop = found != NULL ? (size_t)((const uint8_t *)found - window) : len;
    const void *cr = memchr(window + from, '\r', stop > from ? stop - from : 0);
    size_t cr_at = cr != NULL ? (size_t)((const uint8_t *)cr - window) : stop;
    if (cr_at - start > most) {
        return vkp_i_reader_fail(reader, VKP_ERR_LIMIT, start + most,
                                 "line longer than max_line_bytes (%zu)", most);
    }
    if (cr != NULL && cr_at + 1 < stop) {
        return vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, cr_at + 1, "CR without LF");
    }
    if (found == NULL) {
        reader->line_seen = cr != NULL ? cr_at : len;
        return VKP_ERR_EMPTY;
    }
    if (cr == NULL) {
        return vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, stop, "LF without CR");
    }
    reader->line_seen = 0;
    *end = cr_at;
    return VKP_OK;
}

/* Append a value; an attribute before it is linked to it. NULL: no memory, nothing was changed. */
static vkp_value *vkp_i_reader_add(vkp_resp_reader *reader, vkp_resp_type type)
{
    void *values = reader->values;
    size_t *attribute =
        reader->depth > 0 ? &reader->levels[reader->depth - 1].attribute : &reader->attribute;
    vkp_value *value;
    if (!vkp_i_grow(reader->env, &values, &reader->capacity, reader->count + 1,
                    sizeof *reader->values)) {
        return NULL;
    }
    reader->values = (vkp_value *)values;
    reader->quick_values = false;
    value = &reader->values[reader->count];
    memset(value, 0, sizeof *value);
    value->type = (uint8_t)type;
    value->i_depth = (uint16_t)reader->depth;
    value->span = 1;
    if (*attribute != 0) {
        value->attributes = (uint32_t)(reader->count - (*attribute - 1));
        *attribute = 0;
    }
    reader->count++;
    return value;
}

/* Append a value with text, and move `position` to `after`. */
static vkp_status vkp_i_reader_text(vkp_resp_reader *reader, vkp_resp_type type, uint32_t flags,
                                    size_t offset, size_t len, size_t after)
{
    vkp_value *value = vkp_i_reader_add(reader, type);
    if (value == NULL) {
        return VKP_ERR_NOMEM;
    }
    value->flags = (uint8_t)flags;
    value->len = len;
    value->u.i_offset = offset;
    reader->position = after;
    return VKP_OK;
}

/* Append a value without text, and move `position` to `after`. */
static vkp_status vkp_i_reader_scalar(vkp_resp_reader *reader, vkp_resp_type type, uint32_t flags,
                                      int64_t integer, size_t after)
{
    vkp_value *value = vkp_i_reader_add(reader, type);
    if (value == NULL) {
        return VKP_ERR_NOMEM;
    }
    value->flags = (uint8_t)flags;
    value->u.integer = integer;
    reader->position = after;
    return VKP_OK;
}

/* Append an aggregate or a streamed string, and push its level. */
__attribute__((always_inline)) static inline vkp_status
vkp_i_reader_open_level(vkp_resp_reader *reader, vkp_resp_type type, uint64_t elements,
                        size_t after)
{
    vkp_value *value;
    vkp_i_level *level;
    void *levels = reader->levels;
    if (reader->depth >= reader->config.max_depth && type != VKP_RESP_STRING) {
        return vkp_i_reader_fail(reader, VKP_ERR_LIMIT, reader->position,
                                 "nested deeper than max_depth (%u)",
                                 (unsigned)reader->config.max_depth);
    }
    if (!vkp_i_grow(reader->env, &levels, &reader->level_capacity, reader->depth + 1,
                    sizeof *reader->levels)) {
        return VKP_ERR_NOMEM;
    }
    reader->levels = (vkp_i_level *)levels;
    value = vkp_i_reader_add(reader, type);
    if (value == NULL) {
        return VKP_ERR_NOMEM;
    }
    value->len = (size_t)elements;
    level = &reader->levels[reader->depth++];
    level->index = reader->count - 1;
    level->remaining = elements;
    level->attribute = 0;
    reader->position = after;
    return VKP_OK;
}

/* Append a streamed value of no bytes or elements yet, and push its level. */
__attribute__((noinline)) static vkp_status
vkp_i_reader_open_streamed(vkp_resp_reader *reader, vkp_resp_type type, size_t after)
{
    vkp_status status;
    if (type == VKP_RESP_PUSH || type == VKP_RESP_ATTRIBUTE) {
        return vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, reader->position,
                                 "%s cannot be streamed",
                                 type == VKP_RESP_PUSH ? "a push" : "an attribute");
    }
    status = vkp_i_reader_open_level(reader, type, VKP_I_ENDLESS, after);
    if (status == VKP_OK) {
        reader->values[reader->count - 1].len = 0;
        reader->streamed++;
    }
    return status;
}

/* Check that `size` bytes and their CRLF are at `from`, for the header at `position`. */
__attribute__((always_inline)) static inline vkp_status
vkp_i_reader_payload(vkp_resp_reader *reader, const uint8_t *window, size_t len, size_t from,
                     size_t size)
{
    if (from + size + 2 > reader->config.max_frame_bytes) {
        return vkp_i_reader_fail(reader, VKP_ERR_LIMIT, reader->position,
                                 "frame above max_frame_bytes (%zu)",
                                 reader->config.max_frame_bytes);
    }
    if (len < from || len - from < size + 2) {
        return VKP_ERR_EMPTY;
    }
    if (window[from + size] != '\r' || window[from + size + 1] != '\n') {
        return vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, from + size,
                                 "bulk of %zu bytes is not followed by CRLF", size);
    }
    return VKP_OK;
}

/* A value whose header announces its length: $ (string or null), ! (error), = (verbatim). */
static vkp_status vkp_i_reader_bulk(vkp_resp_reader *reader, const uint8_t *window, size_t len,
                                    uint8_t mark)
{
    size_t at = reader->position;
    size_t most = reader->config.max_bulk_bytes;
    int64_t number = 0;
    size_t after = 0;
    size_t size;
    size_t prefix = mark == '=' ? VKP_I_VERBATIM_PREFIX : 0;
    vkp_status status = vkp_i_reader_number(
        reader, window, len, at + 1, mark == '$' ? VKP_I_NUM_MINUS_ONE | VKP_I_NUM_STREAMED : 0,
        &number, &after);
    if (status != VKP_OK) {
        return status;
    }
    if (number < 0) {
        return number == VKP_I_STREAMED
                   ? vkp_i_reader_open_streamed(reader, VKP_RESP_STRING, after)
                   : vkp_i_reader_scalar(reader, VKP_RESP_NULL, VKP_VALUE_NULL_BULK, 0, after);
    }
    if ((uint64_t)number > most) {
        return vkp_i_reader_fail(reader, VKP_ERR_LIMIT, at,
                                 "bulk of %llu bytes, max_bulk_bytes is %zu",
                                 (unsigned long long)number, most);
    }
    size = (size_t)number;
    if (size < prefix) {
        return vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, at, "verbatim string below 4 bytes");
    }
    status = vkp_i_reader_payload(reader, window, len, after, size);
    if (status != VKP_OK) {
        return status;
    }
    if (prefix != 0 && window[after + prefix - 1] != ':') {
        return vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, after + prefix - 1,
                                 "verbatim string without its colon");
    }
    return vkp_i_reader_text(reader, mark == '!' ? VKP_RESP_ERROR : VKP_RESP_STRING,
                             prefix != 0 ? VKP_VALUE_VERBATIM : 0, after + prefix, size - prefix,
                             after + size + 2);
}

/* A value that is one line: + (string), - (error), comma (double), ( (big number). */
static vkp_status vkp_i_reader_lined(vkp_resp_reader *reader, const uint8_t *window, size_t len,
                                     uint8_t mark)
{
    size_t start = reader->position + 1;
    size_t end = 0;
    const char *text;
    vkp_status status = vkp_i_reader_line(reader, window, len, &end);
    if (status != VKP_OK) {
        return status;
    }
    text = (const char *)window + start;
    if (mark == '+' || mark == '-') {
        return vkp_i_reader_text(reader, mark == '+' ? VKP_RESP_STRING : VKP_RESP_ERROR,
                                 VKP_VALUE_SIMPLE, start, end - start, end + 2);
    }
    if (mark == ',') {
        if (!vkp_i_double_valid(text, end - start, reader->config.lenient)) {
            return vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, start, "not a double");
        }
        return vkp_i_reader_text(reader, VKP_RESP_DOUBLE, 0, start, end - start, end + 2);
    }
    {
        size_t sign = end > start && (text[0] == '-' || text[0] == '+') ? 1 : 0;
        size_t digits = vkp_i_digits(text, end - start, sign);
        if (digits == 0 || sign + digits != end - start) {
            return vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, start, "not a big number");
        }
    }
    return vkp_i_reader_text(reader, VKP_RESP_BIGNUM, 0, start, end - start, end + 2);
}

/* A value of fixed length: #t, #f (boolean), _ (null). */
static vkp_status vkp_i_reader_constant(vkp_resp_reader *reader, const uint8_t *window, size_t len,
                                        uint8_t mark)
{
    size_t at = reader->position + 1;
    size_t body = mark == '#' ? 1 : 0;
    vkp_status status;
    if (len < at + body) {
        return VKP_ERR_EMPTY;
    }
    if (body == 1 && window[at] != 't' && window[at] != 'f') {
        return vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, at, "boolean is neither #t nor #f");
    }
    status = vkp_i_reader_crlf(reader, window, len, at + body);
    if (status != VKP_OK) {
        return status;
    }
    return vkp_i_reader_scalar(reader, body == 1 ? VKP_RESP_BOOL : VKP_RESP_NULL, 0,
                               body == 1 && window[at] == 't' ? 1 : 0, at + body + 2);
}

/* The header of an aggregate: * ~ > % |, or a null as *-1 (lenient: also >-1). */
static vkp_status vkp_i_reader_aggregate(vkp_resp_reader *reader, const uint8_t *window, size_t len,
                                         uint8_t mark)
{
    size_t at = reader->position;
    bool lenient_null = reader->config.lenient && mark == '>';
    vkp_resp_type type = mark == '*'   ? VKP_RESP_ARRAY
                         : mark == '~' ? VKP_RESP_SET
                         : mark == '>' ? VKP_RESP_PUSH
                         : mark == '%' ? VKP_RESP_MAP
                                       : VKP_RESP_ATTRIBUTE;
    uint32_t allowed = VKP_I_NUM_STREAMED | (mark == '*' || lenient_null ? VKP_I_NUM_MINUS_ONE : 0);
    int64_t number = 0;
    size_t after = 0;
    uint64_t elements;
    vkp_status status = vkp_i_reader_number(reader, window, len, at + 1, allowed, &number, &after);
    if (status != VKP_OK) {
        return status;
    }
    if (number < 0) {
        return number == VKP_I_STREAMED
                   ? vkp_i_reader_open_streamed(reader, type, after)
                   : vkp_i_reader_scalar(reader, VKP_RESP_NULL, VKP_VALUE_NULL_ARRAY, 0, after);
    }
    if ((uint64_t)number > reader->config.max_elements) {
        return vkp_i_reader_fail(reader, VKP_ERR_LIMIT, at,
                                 "aggregate of %llu elements, max_elements is %u",
                                 (unsigned long long)number, (unsigned)reader->config.max_elements);
    }
    if (number == 0 && mark == '>') {
        return vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, at, "push without a kind");
    }
    elements = (uint64_t)number * (type == VKP_RESP_MAP || type == VKP_RESP_ATTRIBUTE ? 2u : 1u);
    return vkp_i_reader_open_level(reader, type, elements, after);
}

/* The innermost open value if it is streamed, or NULL. */
static vkp_i_level *vkp_i_reader_get_streamed(const vkp_resp_reader *reader)
{
    vkp_i_level *top = reader->depth > 0 ? &reader->levels[reader->depth - 1] : NULL;
    return top != NULL && top->remaining > VKP_I_COUNTED_MOST ? top : NULL;
}

/* Whether a streamed string is open: a chunk must follow. */
static bool vkp_i_reader_is_in_string(const vkp_resp_reader *reader)
{
    const vkp_i_level *top = vkp_i_reader_get_streamed(reader);
    return top != NULL && reader->values[top->index].type == VKP_RESP_STRING;
}

/* Whether a value that begins with `mark` is an element too many of a streamed aggregate. An
   attribute is no element, and a push is one only if its kind says so: when it is complete. */
static bool vkp_i_reader_is_full(const vkp_resp_reader *reader, uint8_t mark)
{
    const vkp_i_level *top = vkp_i_reader_get_streamed(reader);
    bool pairs = top != NULL && reader->values[top->index].type == VKP_RESP_MAP;
    uint64_t most = (uint64_t)reader->config.max_elements * (pairs ? 2u : 1u);
    uint64_t come = top != NULL ? VKP_I_ENDLESS - top->remaining : 0;
    return top != NULL && !vkp_i_reader_is_in_string(reader) &&
           (come > most || (come == most && mark != '.' && mark != '|' && mark != '>'));
}

/* Whether a value that begins with `mark` may follow in the streamed value that is open. */
__attribute__((noinline)) static vkp_status vkp_i_reader_check_streamed(vkp_resp_reader *reader,
                                                                        uint8_t mark)
{
    if (vkp_i_reader_is_in_string(reader)) {
        return mark == ';' ? VKP_OK
                           : vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, reader->position,
                                               "chunk of a streamed string expected, "
                                               "byte 0x%02x found",
                                               mark);
    }
    return !vkp_i_reader_is_full(reader, mark)
               ? VKP_OK
               : vkp_i_reader_fail(reader, VKP_ERR_LIMIT, reader->position,
                                   "streamed aggregate of more elements than max_elements (%u)",
                                   (unsigned)reader->config.max_elements);
}

/* The end of a streamed aggregate: "." */
__attribute__((noinline)) static vkp_status
vkp_i_reader_end_streamed(vkp_resp_reader *reader, const uint8_t *window, size_t len)
{
    size_t at = reader->position;
    vkp_i_level *top = vkp_i_reader_get_streamed(reader);
    vkp_value *value = top != NULL ? &reader->values[top->index] : NULL;
    uint64_t elements = top != NULL ? VKP_I_ENDLESS - top->remaining : 0;
    vkp_status status;
    if (top == NULL) {
        return vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, at,
                                 "end (.) outside of a streamed aggregate");
    }
    if (top->attribute != 0) {
        return vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, at,
                                 "streamed aggregate ends behind an attribute");
    }
    if (value->type == VKP_RESP_MAP && elements % 2 != 0) {
        return vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, at,
                                 "streamed map ends behind a key without a value");
    }
    status = vkp_i_reader_crlf(reader, window, len, at + 1);
    if (status != VKP_OK) {
        return status;
    }
    value->len = (size_t)elements;
    top->remaining = 0;
    reader->position = at + 3;
    return VKP_OK;
}

/* One chunk of a streamed string, which is copied behind the chunks before; ";0" is the end. */
__attribute__((noinline)) static vkp_status vkp_i_reader_chunk(vkp_resp_reader *reader,
                                                               const uint8_t *window, size_t len)
{
    size_t at = reader->position;
    vkp_i_level *top = vkp_i_reader_get_streamed(reader);
    vkp_value *value = top != NULL ? &reader->values[top->index] : NULL;
    void *text = reader->text;
    int64_t number = 0;
    size_t after = 0;
    size_t size;
    vkp_status status;
    if (!vkp_i_reader_is_in_string(reader)) {
        return vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, at,
                                 "chunk (;) outside of a streamed string");
    }
    status = vkp_i_reader_number(reader, window, len, at + 1, 0, &number, &after);
    if (status != VKP_OK) {
        return status;
    }
    if ((uint64_t)number > reader->config.max_bulk_bytes - value->len) {
        return vkp_i_reader_fail(reader, VKP_ERR_LIMIT, at,
                                 "streamed string above max_bulk_bytes (%zu)",
                                 reader->config.max_bulk_bytes);
    }
    size = (size_t)number;
    if (size == 0) {
        top->remaining = 0;
        reader->position = after;
        return VKP_OK;
    }
    status = vkp_i_reader_payload(reader, window, len, after, size);
    if (status != VKP_OK) {
        return status;
    }
    if (!vkp_i_grow(reader->env, &text, &reader->text_capacity, reader->text_len + size, 1)) {
        return VKP_ERR_NOMEM;
    }
    reader->text = (char *)text;
    memcpy(reader->text + reader->text_len, window + after, size);
    if (value->len == 0) {
        value->flags = (uint8_t)(value->flags | VKP_I_VALUE_GATHERED);
        value->u.i_offset = reader->text_len;
    }
    value->len += size;
    reader->text_len += size;
    reader->position = after + size + 2;
    return VKP_OK;
}

/* The error for an unknown type byte, with a guess at what the peer speaks. */
static vkp_status vkp_i_reader_unknown(vkp_resp_reader *reader, const uint8_t *window, size_t len)
{
    size_t at = reader->position;
    const uint8_t *from = window + at;
    size_t left = len - at;
    uint8_t byte = window[at];
    const char *guess = "";
    static const char *const http[] = {"HTTP", "GET ", "POST", "PUT ", "HEAD", "OPTI", "DELE"};
    size_t i;
    for (i = 0; i < sizeof http / sizeof http[0]; i++) {
        size_t most = VKP_I_MIN(left, (size_t)4);
        if (memcmp(from, http[i], most) == 0) {
            if (left < 4) {
                return VKP_ERR_EMPTY; /* the result must not depend on how the input is split */
            }
            guess = ": this looks like HTTP";
        }
    }
    if (byte == VKP_I_TLS_HANDSHAKE || byte == VKP_I_TLS_ALERT) {
        guess = ": this looks like a TLS record";
    } else if (byte == ';' || byte == '.') {
        guess = ": streamed types are not supported";
    }
    return byte >= 0x20 && byte < 0x7f
               ? vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, at, "unknown type byte '%c'%s", byte,
                                   guess)
               : vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, at, "unknown type byte 0x%02x%s", byte,
                                   guess);
}

/* Whether the next value is the first element of a push, its kind, which must be a string. */
static bool vkp_i_reader_wants_kind(const vkp_resp_reader *reader)
{
    const vkp_i_level *top = reader->depth > 0 ? &reader->levels[reader->depth - 1] : NULL;
    return top != NULL && reader->values[top->index].type == VKP_RESP_PUSH &&
           top->remaining == reader->values[top->index].len;
}

/* Read one value, the header of one aggregate, or one part of a streamed value, at `position`.
   EMPTY: more bytes are needed. */
static vkp_status vkp_i_reader_step(vkp_resp_reader *reader, const uint8_t *window, size_t len)
{
    uint8_t mark;
    bool kind;
    int64_t number = 0;
    size_t after = 0;
    vkp_status status;
    if (reader->position >= reader->config.max_frame_bytes) {
        return vkp_i_reader_fail(reader, VKP_ERR_LIMIT, reader->position,
                                 "frame above max_frame_bytes (%zu)",
                                 reader->config.max_frame_bytes);
    }
    if (reader->position >= len) {
        return VKP_ERR_EMPTY;
    }
    mark = window[reader->position];
    if (reader->streamed > 0) {
        status = vkp_i_reader_check_streamed(reader, mark);
        if (status != VKP_OK) {
            return status;
        }
    }
    kind = vkp_i_reader_wants_kind(reader);
    if (kind && mark != '$' && mark != '+' && mark != '=') {
        return vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, reader->position,
                                 "the kind of a push is not a string");
    }
    switch (mark) {
    case '$':
        after = reader->position;
        status = vkp_i_reader_bulk(reader, window, len, mark);
        return status == VKP_OK && kind && reader->values[reader->count - 1].type == VKP_RESP_NULL
                   ? vkp_i_reader_fail(reader, VKP_ERR_PROTOCOL, after,
                                       "the kind of a push is not a string")
                   : status;
    case '!':
    case '=':
        return vkp_i_reader_bulk(reader, window, len, mark);
    case '+':
    case '-':
    case ',':
    case '(':
        return vkp_i_reader_lined(reader, window, len, mark);
    case ':':
        status = vkp_i_reader_number(reader, window, len, reader->position + 1,
                                     VKP_I_NUM_PLUS | VKP_I_NUM_NEGATIVE, &number, &after);
        return status != VKP_OK ? status
                                : vkp_i_reader_scalar(reader, VKP_RESP_INTEGER, 0, number, after);
    case '#':
    case '_':
        return vkp_i_reader_constant(reader, window, len, mark);
    case '*':
    case '~':
    case '>':
    case '%':
    case '|':
        return vkp_i_reader_aggregate(reader, window, len, mark);
    case ';':
    case '.':
        return !reader->config.streamed ? vkp_i_reader_unknown(reader, window, len)
               : mark == ';'            ? vkp_i_reader_chunk(reader, window, len)
                                        : vkp_i_reader_end_streamed(reader, window, len);
    default:
        return vkp_i_reader_unknown(reader, window, len);
    }
}

/* The text of a value of an incomplete frame, whose text is still an offset. */
static const char *vkp_i_reader_text_at(const vkp_resp_reader *reader, const uint8_t *window,
                                        const vkp_value *value)
{
    const char *from =
        (value->flags & VKP_I_VALUE_GATHERED) != 0 ? reader->text : (const char *)window;
    return from + value->u.i_offset;
}

/* Whether a complete push is no element of the aggregate around it. */
static bool vkp_i_push_is_uncounted(const vkp_resp_reader *reader, const uint8_t *window,
                                    const vkp_value *push)
{
    const vkp_value *kind = push + 1;
    return vkp_i_is_uncounted_kind(vkp_i_reader_text_at(reader, window, kind), kind->len);
}

/* The last value is complete: count it in its aggregate, and close each aggregate that it
   completes. True: the frame is complete. */
static bool vkp_i_reader_end_value(vkp_resp_reader *reader, const uint8_t *window)
{
    size_t index = reader->count - 1;
    if (reader->streamed > 0) {
        const vkp_i_level *open = reader->depth > 0 ? &reader->levels[reader->depth - 1] : NULL;
        index = open != NULL && open->remaining == 0 ? open->index : index; /* behind its "." */
    }
    for (;;) {
        vkp_value *value = &reader->values[index];
        vkp_i_level *top = reader->depth > 0 ? &reader->levels[reader->depth - 1] : NULL;
        if (top != NULL && top->index == index) { /* an open value */
            if (top->remaining > 0) {
                return false;
            }
            reader->depth--;
            continue;
        }
        value->span = (uint32_t)(reader->count - index);
        if (value->type == VKP_RESP_ATTRIBUTE) {
            *(top != NULL ? &top->attribute : &reader->attribute) = index + 1;
            return false;
        }
        if (top == NULL) {
            return true;
        }
        if (value->type == VKP_RESP_PUSH && vkp_i_push_is_uncounted(reader, window, value)) {
            size_t level = reader->depth;
            value->flags = (uint8_t)(value->flags | VKP_VALUE_OUT_OF_BAND);
            reader->nested = true;
            while (level > 0 && !reader->values[reader->levels[--level].index].i_has_nested) {
                reader->values[reader->levels[level].index].i_has_nested = 1;
            }
            return false;
        }
        if (--top->remaining > 0) {
            return false;
        }
        index = top->index;
        reader->depth--;
    }
}

/* Turn the offsets of a complete frame into pointers. */
__attribute__((always_inline)) static inline void
vkp_i_reader_point(vkp_resp_reader *reader, const uint8_t *window, bool gathered)
{
    size_t i;
    for (i = 0; i < reader->count; i++) {
        vkp_value *value = &reader->values[i];
        if (value->type == VKP_RESP_STRING || value->type == VKP_RESP_ERROR ||
            value->type == VKP_RESP_BIGNUM || value->type == VKP_RESP_DOUBLE) {
            value->u.str = gathered ? vkp_i_reader_text_at(reader, window, value)
                                    : (const char *)window + value->u.i_offset;
            value->flags = (uint8_t)(value->flags & (gathered ? ~VKP_I_VALUE_GATHERED : ~0u));
        }
    }
}

/* Read a length of at most VKP_I_QUICK_DIGITS digits without a leading zero, and its CRLF. NULL:
   use the general path. Always inlined, so that the branches of each of its two places have a
   prediction of their own. */
__attribute__((always_inline)) static inline const uint8_t *
vkp_i_quick_length(const uint8_t *at, const uint8_t *end, size_t *out)
{
    const uint8_t *start = at;
    size_t value = 0;
    while (at < end && (uint8_t)(*at - '0') < 10) {
        value = value * 10 + (uint8_t)(*at - '0');
        at++;
    }
    if ((size_t)(at - start) - 1 >= VKP_I_QUICK_DIGITS || (*start == '0' && at - start > 1) ||
        !vkp_i_is_crlf(at, end)) {
        return NULL;
    }
    *out = value;
    return at + 2;
}

/* Write the fields that are equal in all messages. They stay until the general path overwrites
   them, so that each further message costs five stores. */
static void vkp_i_quick_prepare(vkp_resp_reader *reader)
{
    size_t i;
    memset(reader->values, 0, VKP_I_QUICK_VALUES * sizeof *reader->values);
    for (i = 0; i < VKP_I_QUICK_VALUES; i++) {
        reader->values[i].type = i == 0 ? VKP_RESP_PUSH : VKP_RESP_STRING;
        reader->values[i].i_depth = i == 0 ? 0 : 1;
        reader->values[i].span = i == 0 ? VKP_I_QUICK_VALUES : 1;
        reader->values[i].len = i == 0 ? VKP_I_QUICK_VALUES - 1 : VKP_I_KIND_LEN;
    }
    reader->quick_values = true;
}

/* The quick path for the most frequent frame of a subscriber: >3, "message", channel, payload. Its
   first 18 bytes are compared in three steps, its texts are skipped by their lengths. The reader's
   state is that between two frames, before and after. EMPTY: the payload is incomplete.
   UNSUPPORTED: use the general path. */
static vkp_status vkp_i_reader_quick(vkp_resp_reader *reader, const uint8_t *window, size_t len,
                                     size_t *consumed)
{
    const uint8_t *end = window + len;
    const uint8_t *channel;
    const uint8_t *payload;
    size_t channel_len;
    size_t payload_len;
    size_t most = reader->config.max_bulk_bytes;
    size_t whole;
    vkp_value *values = reader->values;
    if (!vkp_i_is_message(window, len) || !reader->quick || reader->capacity < VKP_I_QUICK_VALUES) {
        return VKP_ERR_UNSUPPORTED;
    }
    channel = vkp_i_quick_length(window + VKP_I_MESSAGE_PREFIX, end, &channel_len);
    if (channel == NULL || channel_len > most || (size_t)(end - channel) < channel_len + 3 ||
        memcmp(channel + channel_len, "\r\n$", 3) != 0) {
        return VKP_ERR_UNSUPPORTED;
    }
    payload = vkp_i_quick_length(channel + channel_len + 3, end, &payload_len);
    if (payload == NULL || payload_len > most) {
        return VKP_ERR_UNSUPPORTED;
    }
    whole = (size_t)(payload - window) + payload_len + 2;
    if (whole > reader->config.max_frame_bytes) {
        return VKP_ERR_UNSUPPORTED;
    }
    if (whole > len) {
        return whole - len >= 2 ? VKP_ERR_EMPTY : VKP_ERR_UNSUPPORTED;
    }
    if (memcmp(payload + payload_len, "\r\n", 2) != 0) {
        return VKP_ERR_UNSUPPORTED;
    }
    if (!reader->quick_values) {
        vkp_i_quick_prepare(reader);
    }
    values[1].u.str = (const char *)window + 8;
    values[2].len = channel_len;
    values[2].u.str = (const char *)channel;
    values[3].len = payload_len;
    values[3].u.str = (const char *)payload;
    *consumed = whole;
    return VKP_OK;
}

/* Whether the end of the frame can be found although a step refused the value at `position`: a
   line, however long and whatever its digits, ends at its LF, and an aggregate of a known count has
   an end, however deep or large it is, as a streamed one has, and a bulk ends where its length
   says. No end is found behind a length that is wrong, within a streamed string, or behind an
   unknown type.                                                                               */
static bool vkp_i_reader_knows_end(const vkp_resp_reader *reader, const uint8_t *window, size_t len)
{
    uint8_t mark;
    if (reader->position >= reader->config.max_frame_bytes || reader->position >= len ||
        vkp_i_reader_is_in_string(reader)) {
        return false;
    }
    mark = window[reader->position];
    if (vkp_i_reader_is_full(reader, mark)) {
        return true;
    }
    return reader->status == VKP_ERR_LIMIT      ? true
           : reader->status == VKP_ERR_PROTOCOL ? memchr(":,(#_", mark, 5) != NULL
                                                : false;
}

/* The path for every frame. Not inlined: vkp_resp_reader_scan would save every register, even on
   the quick path. */
__attribute__((noinline)) static vkp_status vkp_i_reader_general(vkp_resp_reader *reader,
                                                                 const uint8_t *window, size_t len,
                                                                 const vkp_value **value,
                                                                 size_t *consumed)
{
    vkp_value *root;
    do {
        vkp_status status = vkp_i_reader_step(reader, window, len);
        if (status != VKP_OK) {
            reader->end_known = vkp_i_reader_knows_end(reader, window, len);
            return status;
        }
    } while (!vkp_i_reader_end_value(reader, window));
    if (reader->position > reader->config.max_frame_bytes) {
        return vkp_i_reader_fail(reader, VKP_ERR_LIMIT, reader->config.max_frame_bytes,
                                 "frame above max_frame_bytes (%zu)",
                                 reader->config.max_frame_bytes);
    }
    if (reader->text_len > 0) {
        vkp_i_reader_point(reader, window, true);
    } else {
        vkp_i_reader_point(reader, window, false);
    }
    root = &reader->values[0];
    while (root->type == VKP_RESP_ATTRIBUTE) {
        root += root->span;
    }
    root->i_has_nested = reader->nested ? 1 : 0; /* also of a push in its attributes */
    *value = root;
    *consumed = reader->position;
    reader->consumed += reader->position;
    reader->whole = true;
    return VKP_OK;
}

VKP_API vkp_status vkp_resp_reader_scan(vkp_resp_reader *reader, const void *data, size_t len,
                                        const vkp_value **value, size_t *consumed)
{
    const uint8_t *window = (const uint8_t *)data;
    VKP_I_REQUIRE(reader != NULL && value != NULL && consumed != NULL &&
                  (data != NULL || len == 0));
    if (reader->status != VKP_OK) {
        return reader->status;
    }
    if (window == NULL) {
        return VKP_ERR_EMPTY;
    }
    if (reader->whole) {
        vkp_i_reader_start(reader);
        if (reader->capacity > VKP_I_READER_KEPT_VALUES ||
            reader->text_capacity > VKP_I_READER_KEPT_TEXT) { /* one huge frame: free a megabyte */
            vkp_i_reader_trim(reader);
        }
    }
    if (reader->position == 0) {
        vkp_status status = vkp_i_reader_quick(reader, window, len, consumed);
        if (status == VKP_OK) {
            *value = &reader->values[0];
            reader->consumed += *consumed;
        }
        if (status != VKP_ERR_UNSUPPORTED) {
            return status;
        }
    }
    return vkp_i_reader_general(reader, window, len, value, consumed);
}

VKP_API vkp_status vkp_resp_reader_feed(vkp_resp_reader *reader, const void *data, size_t len)
{
    VKP_I_REQUIRE(reader != NULL && (data != NULL || len == 0));
    if (reader->status != VKP_OK) {
        return reader->status;
    }
    reader->begin += reader->given;
    reader->given = 0;
    if (reader->begin > 0 &&
        (reader->begin == reader->end || len > reader->buffer_capacity - reader->end)) {
        memmove(reader->buffer, reader->buffer + reader->begin, reader->end - reader->begin);
        reader->end -= reader->begin;
        reader->begin = 0;
    }
    if (len > 0) {
        void *buffer = reader->buffer;
        if (len > SIZE_MAX - reader->end ||
            !vkp_i_grow(reader->env, &buffer, &reader->buffer_capacity, reader->end + len, 1)) {
            return VKP_ERR_NOMEM;
        }
        reader->buffer = (uint8_t *)buffer;
        memcpy(reader->buffer + reader->end, data, len);
        reader->end += len;
    }
    return VKP_OK;
}

VKP_API vkp_status vkp_resp_reader_next(vkp_resp_reader *reader, const vkp_value **value)
{
    static const uint8_t nothing[1] = {0};
    const uint8_t *window;
    VKP_I_REQUIRE(reader != NULL && value != NULL);
    reader->begin += reader->given;
    reader->given = 0;
    window = reader->buffer != NULL ? reader->buffer + reader->begin : nothing;
    return vkp_resp_reader_scan(reader, window, reader->end - reader->begin, value, &reader->given);
}

/* ---- for the layers above ----
   A link skips a reply that the reader refuses, where the end is known. The relay gives a client
   with a long command a reader of its own. */

/* Whether vkp_i_skip finds the end of the frame that the reader refused. */
static bool vkp_i_reader_is_end_known(const vkp_resp_reader *reader)
{
    return reader->status != VKP_OK && reader->end_known;
}

#define VKP_I_READER_DEEP 64 /* values that are cheap to read again from the start of the frame */

/* Whether the incomplete frame has so many values that reading it again from its start is slow. */
static bool vkp_i_reader_is_deep_in(const vkp_resp_reader *reader)
{
    return reader->count > VKP_I_READER_DEEP;
}

/* Open another reader with the config of this one. */
static vkp_status vkp_i_reader_open_alike(const vkp_resp_reader *reader, vkp_resp_reader **out)
{
    return vkp_resp_reader_open(&reader->config, out);
}

#endif /* VKP_I_IO */
