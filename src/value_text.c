#if VKP_I_IO
/* ======================================================================================
   >>impl-value-text   A value as text
   ======================================================================================
   Any thread, no locks, no allocation, no recursion: the tree is one array, which is read from its
   start to its end. The depth of an entry says which aggregates end before it. For each open
   aggregate two bits are enough: what its closing bracket is, and whether a key or a value is next.
   They take 16 KiB of the stack, for the largest depth that vkp_value.i_depth can hold. Bytes that
   find no room are counted, as snprintf does.                                                 */

#define VKP_I_TEXT_LEVELS 65536u /* depths that 16 bits can hold */
#define VKP_I_TEXT_MAP 1u        /* bit of a level: it is a map, and ends with a brace */
#define VKP_I_TEXT_VALUE 2u      /* bit of a level: the value of a key is next */

/* A text that is being written. */
typedef struct vkp_i_text {
    char *text;
    size_t size;                           /* bytes of text, the NUL included */
    size_t used;                           /* bytes that the whole text has; saturates */
    size_t depth;                          /* number of open aggregates */
    bool opened;                           /* nothing was written since the last opening bracket */
    uint8_t levels[VKP_I_TEXT_LEVELS / 4]; /* bits of each open aggregate, 2 each */
} vkp_i_text;

static void vkp_i_text_put(vkp_i_text *out, const char *text, size_t len)
{
    if (out->used < out->size && len > 0) {
        memcpy(out->text + out->used, text, VKP_I_MIN(len, out->size - out->used));
    }
    out->used = len > SIZE_MAX - out->used ? SIZE_MAX : out->used + len;
}

/* The bits of the innermost open aggregate. */
static unsigned vkp_i_text_get_level(const vkp_i_text *out)
{
    size_t level = out->depth - 1;
    return (unsigned)out->levels[level / 4] >> (level % 4 * 2) & 3u;
}

static void vkp_i_text_set_level(vkp_i_text *out, unsigned bits)
{
    size_t level = out->depth - 1;
    unsigned shift = (unsigned)(level % 4 * 2);
    unsigned others = out->levels[level / 4] & ~(3u << shift);
    out->levels[level / 4] = (uint8_t)(others | bits << shift);
}

/* Put the bytes between quotation marks. */
static void vkp_i_text_quote(vkp_i_text *out, vkp_str text)
{
    static const char hex[] = "0123456789abcdef";
    size_t from = 0;
    size_t i;
    vkp_i_text_put(out, "\"", 1);
    for (i = 0; i < text.len; i++) {
        unsigned byte = (unsigned char)text.ptr[i];
        char escape[4] = {'\\', 'x', '0', '0'};
        size_t len = 2;
        if (byte >= 0x20 && byte < 0x7f && byte != '"' && byte != '\\') {
            continue;
        }
        if (byte == '"' || byte == '\\') {
            escape[1] = (char)byte;
        } else if (byte == '\n' || byte == '\r' || byte == '\t') {
            escape[1] = byte == '\n' ? 'n' : byte == '\r' ? 'r' : 't';
        } else {
            escape[2] = hex[byte >> 4];
            escape[3] = hex[byte & 15u];
            len = 4;
        }
        vkp_i_text_put(out, text.ptr + from, i - from);
        vkp_i_text_put(out, escape, len);
        from = i + 1;
    }
    vkp_i_text_put(out, text.ptr + from, text.len - from);
    vkp_i_text_put(out, "\"", 1);
}

static void vkp_i_text_put_integer(vkp_i_text *out, int64_t value)
{
    char digits[VKP_I_DIGITS];
    size_t from = vkp_i_format_u64(digits, value < 0 ? 0 - (uint64_t)value : (uint64_t)value);
    if (value < 0) {
        digits[--from] = '-';
    }
    vkp_i_text_put(out, digits + from, VKP_I_DIGITS - from);
}

/* Put a scalar. */
static void vkp_i_text_put_scalar(vkp_i_text *out, const vkp_value *value)
{
    vkp_str text = vkp_value_get_str(value);
    switch ((int)value->type) {
    case VKP_RESP_NULL:
        text = vkp_str_of("null");
        break;
    case VKP_RESP_BOOL:
        text = vkp_str_of(value->u.integer != 0 ? "true" : "false");
        break;
    case VKP_RESP_INTEGER:
        vkp_i_text_put_integer(out, value->u.integer);
        return;
    case VKP_RESP_ERROR:
        vkp_i_text_put(out, "(error) ", 8);
        break;
    default:
        break;
    }
    if (out->depth > 0 && (value->type == VKP_RESP_STRING || value->type == VKP_RESP_ERROR)) {
        vkp_i_text_quote(out, text);
    } else {
        vkp_i_text_put(out, text.ptr, text.len);
    }
}

/* Put what stands between the value before and the next one, in the innermost open aggregate. */
static void vkp_i_text_separate(vkp_i_text *out)
{
    unsigned bits;
    if (out->depth == 0) {
        return;
    }
    bits = vkp_i_text_get_level(out);
    if (!out->opened) {
        vkp_i_text_put(out, (bits & VKP_I_TEXT_VALUE) != 0 ? ": " : ", ", 2);
    }
    if ((bits & VKP_I_TEXT_MAP) != 0) {
        vkp_i_text_set_level(out, bits ^ VKP_I_TEXT_VALUE);
    }
    out->opened = false;
}

/* Open an aggregate. */
static void vkp_i_text_open(vkp_i_text *out, vkp_resp_type type)
{
    bool paired = type == VKP_RESP_MAP || type == VKP_RESP_ATTRIBUTE;
    const char *opening = type == VKP_RESP_MAP         ? "{"
                          : type == VKP_RESP_ATTRIBUTE ? "|{"
                          : type == VKP_RESP_SET       ? "~["
                          : type == VKP_RESP_PUSH      ? ">["
                                                       : "[";
    vkp_i_text_put(out, opening, strlen(opening));
    if (out->depth % 4 == 0) { /* the first level of a byte */
        out->levels[out->depth / 4] = 0;
    }
    out->depth++;
    vkp_i_text_set_level(out, paired ? VKP_I_TEXT_MAP : 0);
    out->opened = true;
}

/* Close aggregates until `depth` are open. */
static void vkp_i_text_close_to(vkp_i_text *out, size_t depth)
{
    while (out->depth > depth) {
        vkp_i_text_put(out, (vkp_i_text_get_level(out) & VKP_I_TEXT_MAP) != 0 ? "}" : "]", 1);
        out->depth--;
        out->opened = false;
    }
}

VKP_API size_t vkp_value_get_text(const vkp_value *value, char *text, size_t size)
{
    const vkp_value *root = value;
    const vkp_value *end = value != NULL ? value + value->span : NULL;
    vkp_i_text out;
    out.text = text;
    out.size = size;
    out.used = 0;
    out.depth = 0;
    out.opened = false;
    while (value < end) {
        if (value != root && !vkp_i_value_is_element(value)) {
            value += value->span;
            continue;
        }
        vkp_i_text_close_to(&out, (size_t)value->i_depth - root->i_depth);
        vkp_i_text_separate(&out);
        if (value->type < VKP_RESP_ARRAY) {
            vkp_i_text_put_scalar(&out, value);
        } else {
            vkp_i_text_open(&out, (vkp_resp_type)value->type);
        }
        value++;
    }
    vkp_i_text_close_to(&out, 0);
    if (size > 0) {
        text[VKP_I_MIN(out.used, size - 1)] = '\0';
    }
    return out.used;
}

#endif /* VKP_I_IO */
