#if VKP_I_IO
/* ======================================================================================
   >>impl-resp-writer   RESP writer
   ======================================================================================
   A writer appends to one block that only it refers to, until vkp_resp_writer_take gives the block
   away. No locks: one thread at a time.
   The first error stays in i_status and each later put does nothing, so that only take needs a
   check. The program's locale does not change the output. */

#define VKP_I_DIGITS 24u       /* bytes for the digits of a uint64_t: 20 at most */
#define VKP_I_HEADER_BYTES 32u /* bytes for a header: mark, sign, digits and CRLF */
#define VKP_I_DOUBLE_BYTES 64u /* bytes for a double in "%.17g" and a NUL */

VKP_API void vkp_resp_writer_init(vkp_resp_writer *writer, const vkp_env *env)
{
    writer->i_env = vkp_i_env(env);
    writer->i_block = NULL;
    writer->i_len = 0;
    writer->i_status = VKP_OK;
}

VKP_API void vkp_resp_put_raw(vkp_resp_writer *writer, const void *data, size_t len)
{
    vkp_block *block = writer->i_block;
    if (writer->i_status != VKP_OK) {
        return;
    }
    writer->i_status = vkp_i_block_reserve(writer->i_env, &writer->i_block, len);
    if (writer->i_status == VKP_OK && len > 0) {
        block = writer->i_block;
        memcpy(vkp_i_block_data(block) + block->len, data, len);
        block->len += len;
        writer->i_len = block->len;
    }
}

/* Write decimal digits to the end of the buffer; returns the index of the first one. */
static size_t vkp_i_format_u64(char buffer[VKP_I_DIGITS], uint64_t value)
{
    size_t at = VKP_I_DIGITS;
    do {
        buffer[--at] = (char)('0' + (char)(value % 10));
        value /= 10;
    } while (value != 0);
    return at;
}

/* Append a type byte, a number and CRLF. */
static void vkp_i_put_header(vkp_resp_writer *writer, char mark, bool negative, uint64_t number)
{
    char line[VKP_I_HEADER_BYTES];
    char digits[VKP_I_DIGITS];
    size_t from = vkp_i_format_u64(digits, number);
    size_t used = 0;
    line[used++] = mark;
    if (negative) {
        line[used++] = '-';
    }
    memcpy(line + used, digits + from, VKP_I_DIGITS - from);
    used += VKP_I_DIGITS - from;
    line[used++] = '\r';
    line[used++] = '\n';
    vkp_resp_put_raw(writer, line, used);
}

VKP_API void vkp_resp_put_aggregate(vkp_resp_writer *writer, vkp_resp_type type, size_t count)
{
    char mark = type == VKP_RESP_SET         ? '~'
                : type == VKP_RESP_PUSH      ? '>'
                : type == VKP_RESP_MAP       ? '%'
                : type == VKP_RESP_ATTRIBUTE ? '|'
                                             : '*';
    vkp_i_put_header(writer, mark, false, count);
}

VKP_API void vkp_resp_put_bulk(vkp_resp_writer *writer, const void *data, size_t len)
{
    vkp_i_put_header(writer, '$', false, len);
    vkp_resp_put_raw(writer, data, len);
    vkp_resp_put_raw(writer, "\r\n", 2);
}

/* Append a type byte, the text and CRLF. INVALID: the text has a CR or an LF. */
static void vkp_i_put_line(vkp_resp_writer *writer, char mark, vkp_str text)
{
    if (text.len > 0 &&
        (memchr(text.ptr, '\r', text.len) != NULL || memchr(text.ptr, '\n', text.len) != NULL)) {
        writer->i_status = writer->i_status == VKP_OK ? VKP_ERR_INVALID : writer->i_status;
        return;
    }
    vkp_resp_put_raw(writer, &mark, 1);
    vkp_resp_put_raw(writer, text.ptr, text.len);
    vkp_resp_put_raw(writer, "\r\n", 2);
}

VKP_API void vkp_resp_put_simple(vkp_resp_writer *writer, vkp_str text)
{
    vkp_i_put_line(writer, '+', text);
}

VKP_API void vkp_resp_put_error(vkp_resp_writer *writer, vkp_str text)
{
    vkp_i_put_line(writer, '-', text);
}

VKP_API void vkp_resp_put_integer(vkp_resp_writer *writer, int64_t value)
{
    uint64_t magnitude = value < 0 ? 0 - (uint64_t)value : (uint64_t)value;
    vkp_i_put_header(writer, ':', value < 0, magnitude);
}

/* Make what printf made of a double the same in any locale: the decimal point, which may have
   several bytes, becomes ".". Returns the new length.                                         */
static size_t vkp_i_plain_double(char *text, size_t len)
{
    static const char others[] = "0123456789+- abcdefinpxABCDEFINPX"; /* "-0x1p+3", "INF", "nan" */
    size_t from;
    size_t to = 0;
    for (from = 0; from < len; from++) {
        if (memchr(others, text[from], sizeof others - 1) != NULL) {
            text[to++] = text[from];
        } else if (to == 0 || text[to - 1] != '.') {
            text[to++] = '.';
        }
    }
    return to;
}

VKP_API void vkp_resp_put_double(vkp_resp_writer *writer, double value)
{
    char text[VKP_I_DOUBLE_BYTES];
    if (value != value) {
        (void)snprintf(text, sizeof text, "nan");
    } else if (value > VKP_I_DOUBLE_MAX || value < -VKP_I_DOUBLE_MAX) {
        (void)snprintf(text, sizeof text, value > 0 ? "inf" : "-inf");
    } else {
        (void)snprintf(text, sizeof text, "%.17g", value);
        text[vkp_i_plain_double(text, strlen(text))] = '\0';
    }
    vkp_i_put_line(writer, ',', vkp_str_of(text));
}

VKP_API void vkp_resp_put_bool(vkp_resp_writer *writer, bool value)
{
    vkp_resp_put_raw(writer, value ? "#t\r\n" : "#f\r\n", 4);
}

VKP_API void vkp_resp_put_null(vkp_resp_writer *writer)
{
    vkp_resp_put_raw(writer, "_\r\n", 3);
}

/* Append an error. RESP2 has errors of one line only: each CR and LF becomes a blank. */
static void vkp_i_put_error_value(vkp_resp_writer *writer, const vkp_value *value, int protocol)
{
    size_t start;
    if (protocol == 3 && (value->flags & VKP_VALUE_SIMPLE) == 0) {
        vkp_i_put_header(writer, '!', false, value->len);
        vkp_resp_put_raw(writer, value->u.str, value->len);
        vkp_resp_put_raw(writer, "\r\n", 2);
        return;
    }
    vkp_resp_put_raw(writer, "-", 1);
    start = writer->i_len;
    vkp_resp_put_raw(writer, value->u.str, value->len);
    if (writer->i_status == VKP_OK) {
        uint8_t *data = vkp_i_block_data(writer->i_block);
        for (; start < writer->i_len; start++) {
            data[start] = data[start] == '\r' || data[start] == '\n' ? (uint8_t)' ' : data[start];
        }
    }
    vkp_resp_put_raw(writer, "\r\n", 2);
}

/* Append a string, a double or a big number; RESP2 has bulk strings in place of both numbers. */
static void vkp_i_put_text_value(vkp_resp_writer *writer, const vkp_value *value, int protocol)
{
    vkp_str text = vkp_value_get_str(value);
    if (value->type == VKP_RESP_STRING && (value->flags & VKP_VALUE_SIMPLE) != 0) {
        vkp_i_put_line(writer, '+', text);
    } else if (value->type == VKP_RESP_STRING && (value->flags & VKP_VALUE_VERBATIM) != 0 &&
               protocol == 3) {
        vkp_i_put_header(writer, '=', false, text.len + VKP_I_VERBATIM_PREFIX);
        vkp_resp_put_raw(writer, text.ptr - VKP_I_VERBATIM_PREFIX,
                         text.len + VKP_I_VERBATIM_PREFIX);
        vkp_resp_put_raw(writer, "\r\n", 2);
    } else if (value->type == VKP_RESP_STRING || protocol != 3) {
        vkp_resp_put_bulk(writer, text.ptr, text.len);
    } else {
        vkp_i_put_line(writer, value->type == VKP_RESP_DOUBLE ? ',' : '(', text);
    }
}

/* Append the header of an aggregate. RESP2 writes every aggregate as an array. */
static void vkp_i_put_aggregate_value(vkp_resp_writer *writer, const vkp_value *value, int protocol)
{
    bool paired = value->type == VKP_RESP_MAP || value->type == VKP_RESP_ATTRIBUTE;
    if (protocol == 3) {
        vkp_resp_put_aggregate(writer, (vkp_resp_type)value->type,
                               paired ? value->len / 2 : value->len);
    } else {
        vkp_resp_put_aggregate(writer, VKP_RESP_ARRAY, value->len);
    }
}

/* Append one place of the tree: a scalar, or the header of an aggregate. */
static void vkp_i_put_node(vkp_resp_writer *writer, const vkp_value *value, int protocol)
{
    switch ((int)value->type) {
    case VKP_RESP_NULL:
        if (protocol == 3) {
            vkp_resp_put_null(writer);
        } else {
            vkp_resp_put_raw(writer,
                             (value->flags & VKP_VALUE_NULL_ARRAY) != 0 ? "*-1\r\n" : "$-1\r\n", 5);
        }
        break;
    case VKP_RESP_ERROR:
        vkp_i_put_error_value(writer, value, protocol);
        break;
    case VKP_RESP_INTEGER:
        vkp_resp_put_integer(writer, value->u.integer);
        break;
    case VKP_RESP_BOOL:
        if (protocol == 3) {
            vkp_resp_put_bool(writer, value->u.integer != 0);
        } else {
            vkp_resp_put_integer(writer, value->u.integer);
        }
        break;
    case VKP_RESP_STRING:
    case VKP_RESP_BIGNUM:
    case VKP_RESP_DOUBLE:
        vkp_i_put_text_value(writer, value, protocol);
        break;
    default:
        vkp_i_put_aggregate_value(writer, value, protocol);
        break;
    }
}

VKP_API void vkp_resp_put_value(vkp_resp_writer *writer, const vkp_value *value, int protocol)
{
    const vkp_value *root = value;
    const vkp_value *end = value + value->span;
    while (value < end) {
        if (((value->flags & VKP_VALUE_OUT_OF_BAND) != 0 && value != root) ||
            (value->type == VKP_RESP_ATTRIBUTE && protocol != 3)) {
            value += value->span;
        } else {
            vkp_i_put_node(writer, value, protocol);
            value++;
        }
    }
}

VKP_API vkp_status vkp_resp_writer_take(vkp_resp_writer *writer, vkp_bytes *bytes)
{
    vkp_status status = writer->i_status;
    if (status == VKP_OK) {
        bytes->block = writer->i_block;
        bytes->len = writer->i_len;
        bytes->data = writer->i_block != NULL ? vkp_i_block_data(writer->i_block) : NULL;
        writer->i_block = NULL;
    }
    vkp_resp_writer_deinit(writer);
    return status;
}

VKP_API void vkp_resp_writer_deinit(vkp_resp_writer *writer)
{
    if (writer != NULL) {
        vkp_i_block_unref(writer->i_block);
        vkp_resp_writer_init(writer, writer->i_env);
    }
}

#endif /* VKP_I_IO */
