#if VKP_I_IO
/* ======================================================================================
   >>impl-format   Commands from a format
   ======================================================================================
   A format is read twice. The first pass checks it and counts the command's arguments, which depend
   on the format alone: a conversion never ends an argument, and an empty one begins one. So a wrong
   format leaves the writer's bytes as they were. The second pass appends each argument's bytes, and
   then moves them to make room for their header: no argument is measured before it is written.
   Conversions of numbers are printf's own; their letters are those that hiredis accepts, and j, t
   and z. No locks: a writer has one thread at a time.                                         */

#define VKP_I_FORMAT_SPEC 32u   /* bytes of one conversion and a NUL */
#define VKP_I_FORMAT_NUMBER 64u /* bytes that are tried first for a number */

/* What a conversion takes from the arguments. */
typedef enum vkp_i_conversion {
    VKP_I_CONVERSION_NONE = 0, /* unknown, or the format ends inside it */
    VKP_I_CONVERSION_PERCENT,  /* nothing */
    VKP_I_CONVERSION_STR,      /* a terminated string */
    VKP_I_CONVERSION_BYTES,    /* a pointer and a size_t */
    VKP_I_CONVERSION_CHAR,     /* an int, put as one byte */
    VKP_I_CONVERSION_INT,
    VKP_I_CONVERSION_LONG,
    VKP_I_CONVERSION_LONG_LONG,
    VKP_I_CONVERSION_INTMAX,
    VKP_I_CONVERSION_PTRDIFF,
    VKP_I_CONVERSION_SIZE,
    VKP_I_CONVERSION_DOUBLE
} vkp_i_conversion;

/* Where the second pass is. */
typedef struct vkp_i_format {
    vkp_resp_writer *writer;
    va_list arguments; /* those that are not taken yet */
} vkp_i_format;

/* Whether the byte is one of the set; a NUL is not. */
static bool vkp_i_is_one_of(char byte, const char *set)
{
    return byte != '\0' && strchr(set, byte) != NULL;
}

/* Skip the letters that say how large an integer is; returns what the conversion takes then. */
static vkp_i_conversion vkp_i_conversion_size(const char **at)
{
    static const struct {
        const char *letters;
        vkp_i_conversion conversion;
    } sizes[] = {{"hh", VKP_I_CONVERSION_INT},       {"h", VKP_I_CONVERSION_INT},
                 {"ll", VKP_I_CONVERSION_LONG_LONG}, {"l", VKP_I_CONVERSION_LONG},
                 {"j", VKP_I_CONVERSION_INTMAX},     {"t", VKP_I_CONVERSION_PTRDIFF},
                 {"z", VKP_I_CONVERSION_SIZE}};
    size_t i;
    for (i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        size_t len = strlen(sizes[i].letters);
        if (strncmp(*at, sizes[i].letters, len) == 0) {
            *at += len;
            return sizes[i].conversion;
        }
    }
    return VKP_I_CONVERSION_INT;
}

/* The conversion that begins with the '%' at `at`; *len is the number of its bytes. */
static vkp_i_conversion vkp_i_conversion_at(const char *at, size_t *len)
{
    const char *begin = at++;
    vkp_i_conversion conversion;
    *len = 2;
    switch (*at) {
    case '%':
        return VKP_I_CONVERSION_PERCENT;
    case 's':
        return VKP_I_CONVERSION_STR;
    case 'b':
        return VKP_I_CONVERSION_BYTES;
    case 'c':
        return VKP_I_CONVERSION_CHAR;
    default:
        break;
    }
    at += strspn(at, "#0-+ ");
    at += strspn(at, "0123456789");
    if (*at == '.') {
        at++;
        at += strspn(at, "0123456789");
    }
    if (vkp_i_is_one_of(*at, "eEfFgGaA")) {
        conversion = VKP_I_CONVERSION_DOUBLE;
    } else {
        conversion = vkp_i_conversion_size(&at);
        if (!vkp_i_is_one_of(*at, "diouxX")) {
            return VKP_I_CONVERSION_NONE;
        }
    }
    *len = (size_t)(at - begin) + 1;
    return *len < VKP_I_FORMAT_SPEC ? conversion : VKP_I_CONVERSION_NONE;
}

/* The number of the command's arguments; 0: there are none, or a conversion is wrong. */
static size_t vkp_i_format_count(const char *format)
{
    size_t count = 0;
    size_t len;
    bool inside = false;
    for (; *format != '\0'; format += len) {
        bool blank = *format == ' ';
        len = 1;
        if (*format == '%' && vkp_i_conversion_at(format, &len) == VKP_I_CONVERSION_NONE) {
            return 0;
        }
        count += !blank && !inside ? 1u : 0u;
        inside = !blank;
    }
    return count;
}

static void vkp_i_format_fail(vkp_i_format *format, vkp_status status)
{
    if (format->writer->i_status == VKP_OK) {
        format->writer->i_status = status;
    }
}

/* Print the next argument without taking it; as snprintf. The conversion is checked. */
static int vkp_i_format_print(vkp_i_format *format, const char *spec, char *text, size_t size)
{
    va_list copy;
    int len;
    va_copy(copy, format->arguments);
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
    len = vsnprintf(text, size, spec, copy);
#pragma GCC diagnostic pop
    va_end(copy);
    return len;
}

/* Append the next argument as the number that spec prints, without taking it. */
static void vkp_i_format_put_number(vkp_i_format *format, const char *spec, bool floating)
{
    vkp_resp_writer *writer = format->writer;
    size_t room = VKP_I_FORMAT_NUMBER;
    size_t used = 0;
    char *text = NULL;
    while (used == 0) {
        int len;
        vkp_i_format_fail(format, vkp_i_block_reserve(writer->i_env, &writer->i_block, room));
        if (writer->i_status != VKP_OK) {
            return;
        }
        text = (char *)vkp_i_block_data(writer->i_block) + writer->i_block->len;
        len = vkp_i_format_print(format, spec, text, room);
        if (len < 0) { /* a width or precision above INT_MAX */
            vkp_i_format_fail(format, VKP_ERR_INVALID);
            return;
        }
        if (len == 0) { /* "%.0d" prints no digit of 0 */
            return;
        }
        used = (size_t)len < room ? (size_t)len : 0;
        room = (size_t)len + 1;
    }
    writer->i_block->len += floating ? vkp_i_plain_double(text, used) : used;
    writer->i_len = writer->i_block->len;
}

/* Take the number that was printed from the arguments. */
static void vkp_i_format_take_number(vkp_i_format *format, vkp_i_conversion conversion)
{
    switch ((int)conversion) {
    case VKP_I_CONVERSION_INT:
        (void)va_arg(format->arguments, int);
        break;
    case VKP_I_CONVERSION_LONG:
        (void)va_arg(format->arguments, long);
        break;
    case VKP_I_CONVERSION_LONG_LONG:
        (void)va_arg(format->arguments, long long);
        break;
    case VKP_I_CONVERSION_INTMAX:
        (void)va_arg(format->arguments, intmax_t);
        break;
    case VKP_I_CONVERSION_PTRDIFF:
        (void)va_arg(format->arguments, ptrdiff_t);
        break;
    case VKP_I_CONVERSION_SIZE:
        (void)va_arg(format->arguments, size_t);
        break;
    default:
        (void)va_arg(format->arguments, double);
        break;
    }
}

/* Append what the conversion of len bytes makes of the next arguments. */
static void vkp_i_format_put_conversion(vkp_i_format *format, const char *at, size_t len,
                                        vkp_i_conversion conversion)
{
    char spec[VKP_I_FORMAT_SPEC];
    const char *text = "%";
    size_t size = 1;
    char byte;
    switch ((int)conversion) {
    case VKP_I_CONVERSION_PERCENT:
        break;
    case VKP_I_CONVERSION_STR:
        text = va_arg(format->arguments, const char *);
        size = text != NULL ? strlen(text) : 1;
        break;
    case VKP_I_CONVERSION_BYTES:
        text = va_arg(format->arguments, const char *);
        size = va_arg(format->arguments, size_t);
        break;
    case VKP_I_CONVERSION_CHAR:
        byte = (char)va_arg(format->arguments, int);
        text = &byte;
        break;
    default:
        memcpy(spec, at, len);
        spec[len] = '\0';
        vkp_i_format_put_number(format, spec, conversion == VKP_I_CONVERSION_DOUBLE);
        vkp_i_format_take_number(format, conversion);
        return;
    }
    if (text == NULL && size > 0) {
        vkp_i_format_fail(format, VKP_ERR_INVALID);
        return;
    }
    vkp_resp_put_raw(format->writer, text, size);
}

/* Append the bytes of the argument that begins at `at`; returns the end of the argument. */
static const char *vkp_i_format_put_bytes(vkp_i_format *format, const char *at)
{
    size_t len;
    for (; *at != '\0' && *at != ' '; at += len) {
        if (*at == '%') {
            vkp_i_conversion conversion = vkp_i_conversion_at(at, &len);
            vkp_i_format_put_conversion(format, at, len, conversion);
        } else {
            len = strcspn(at, " %");
            vkp_resp_put_raw(format->writer, at, len);
        }
    }
    return at;
}

/* Make a bulk string of the bytes from `start` to the end. */
static void vkp_i_format_end_argument(vkp_resp_writer *writer, size_t start)
{
    char header[VKP_I_HEADER_BYTES];
    size_t len = writer->i_len - start;
    vkp_i_put_header(writer, '$', false, len);
    if (writer->i_status == VKP_OK) {
        uint8_t *data = vkp_i_block_data(writer->i_block) + start;
        size_t bytes = writer->i_len - start - len;
        memcpy(header, data + len, bytes);
        memmove(data + bytes, data, len);
        memcpy(data, header, bytes);
        vkp_resp_put_raw(writer, "\r\n", 2);
    }
}

VKP_API void vkp_resp_put_vcommandf(vkp_resp_writer *writer, const char *format, va_list arguments)
{
    vkp_i_format state;
    size_t count = format != NULL ? vkp_i_format_count(format) : 0;
    state.writer = writer;
    if (count == 0) {
        vkp_i_format_fail(&state, VKP_ERR_INVALID);
        return;
    }
    va_copy(state.arguments, arguments);
    vkp_resp_put_aggregate(writer, VKP_RESP_ARRAY, count);
    while (writer->i_status == VKP_OK && *format != '\0') {
        size_t start = writer->i_len;
        if (*format == ' ') {
            format++;
        } else {
            format = vkp_i_format_put_bytes(&state, format);
            vkp_i_format_end_argument(writer, start);
        }
    }
    va_end(state.arguments);
}

VKP_API void vkp_resp_put_commandf(vkp_resp_writer *writer, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vkp_resp_put_vcommandf(writer, format, arguments);
    va_end(arguments);
}

#endif /* VKP_I_IO */
