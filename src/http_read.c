#if VKP_I_IO
/* ======================================================================================
   >>impl-http-read   Read a request of HTTP
   ======================================================================================
   A reader without a state: it gets all bytes of the request each time. Strict where leniency lets
   two programs read two requests in the same bytes: lines end in CRLF, no blank is in front of a
   colon, no field goes on in the next line, Host comes once, and a length is digits that come once.
   An error may be seen before the request is whole, and is the same then.                     */

#define VKP_I_HTTP_METHOD_BYTES 32u /* no method is longer */
#define VKP_I_HTTP_EMPTY_LINES 4u   /* most empty lines before a request */

/* A byte of a method or of a field's name. */
static bool vkp_i_http_is_token(unsigned char c)
{
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
           (c != '\0' && strchr("!#$%&'*+-.^_`|~", c) != NULL);
}

/* The view without blanks at its ends. */
static vkp_str vkp_i_http_trim(vkp_str text)
{
    while (text.len > 0 && (*text.ptr == ' ' || *text.ptr == '\t')) {
        text.ptr++;
        text.len--;
    }
    while (text.len > 0 && (text.ptr[text.len - 1] == ' ' || text.ptr[text.len - 1] == '\t')) {
        text.len--;
    }
    return text;
}

/* Take the text in front of the first `mark` from *rest, the mark too. Without a mark: all. */
static vkp_str vkp_i_http_cut(vkp_str *rest, char mark)
{
    const char *at = rest->len > 0 ? (const char *)memchr(rest->ptr, mark, rest->len) : NULL;
    vkp_str part = *rest;
    if (at != NULL) {
        part.len = (size_t)(at - rest->ptr);
    }
    rest->ptr += part.len + (at != NULL ? 1u : 0u);
    rest->len -= part.len + (at != NULL ? 1u : 0u);
    return part;
}

/* The line at *at, without its end, and *at moves behind it. Returns 0; -1: the end is not there;
   400: a line that does not end in CRLF, or has a control character.                          */
static int vkp_i_http_line(const uint8_t *data, size_t len, size_t *at, vkp_str *line)
{
    const uint8_t *from = data + *at;
    const uint8_t *lf = (const uint8_t *)memchr(from, '\n', len - *at);
    size_t i;
    if (lf == NULL) {
        return -1;
    }
    if (lf == from || lf[-1] != '\r') {
        return 400;
    }
    *line = vkp_i_str(from, (size_t)(lf - from) - 1);
    for (i = 0; i < line->len; i++) {
        if ((from[i] < 0x20 && from[i] != '\t') || from[i] == 0x7f) {
            return 400;
        }
    }
    *at += line->len + 2;
    return 0;
}

/* Whether the bytes may be what comes before a path: a host, and perhaps a port. */
static bool vkp_i_http_is_authority(vkp_str text)
{
    size_t i;
    for (i = 0; i < text.len; i++) {
        if (!vkp_i_http_is_token((unsigned char)text.ptr[i]) &&
            strchr(":[](),;=", text.ptr[i]) == NULL) {
            return false;
        }
    }
    return true;
}

/* Read the target of the request. Returns 0 or 400. */
static int vkp_i_http_target(vkp_http_request *request, vkp_str target)
{
    size_t i;
    for (i = 0; i < target.len; i++) {
        if ((unsigned char)target.ptr[i] >= 0x7f || target.ptr[i] == '#' || target.ptr[i] == '\t') {
            return 400;
        }
    }
    request->path = target;
    if (vkp_i_str_equal(request->method, vkp_str_of("CONNECT")) ||
        (vkp_i_str_equal(target, vkp_str_of("*")) &&
         vkp_i_str_equal(request->method, vkp_str_of("OPTIONS")))) {
        return 0;
    }
    if (target.len > 0 && target.ptr[0] != '/') { /* http://HOST/PATH, as for a proxy */
        vkp_str scheme = vkp_i_http_cut(&target, ':');
        if ((!vkp_i_str_is(scheme, "http") && !vkp_i_str_is(scheme, "https")) ||
            !vkp_i_starts_with(target, "//")) {
            return 400;
        }
        request->host = vkp_i_str(target.ptr + 2, 0);
        while (request->host.len < target.len - 2 &&
               strchr("/?", request->host.ptr[request->host.len]) == NULL) {
            request->host.len++;
        }
        target.ptr += request->host.len + 2;
        target.len -= request->host.len + 2;
        if (request->host.len == 0 || !vkp_i_http_is_authority(request->host)) {
            return 400;
        }
    } else if (target.len == 0) {
        return 400;
    }
    request->path = vkp_i_http_cut(&target, '?');
    if (target.ptr > request->path.ptr + request->path.len) {
        request->query = target;
    }
    if (request->path.len == 0) {
        request->path = vkp_str_of("/");
    }
    return 0;
}

/* How many bytes of a method begin the line. */
static size_t vkp_i_http_method_len(vkp_str line)
{
    size_t len = 0;
    while (len < line.len && len <= VKP_I_HTTP_METHOD_BYTES &&
           vkp_i_http_is_token((unsigned char)line.ptr[len])) {
        len++;
    }
    return len;
}

/* What is wrong with the method at the beginning of a line, or 0. */
static int vkp_i_http_check_method(vkp_str line)
{
    size_t len = vkp_i_http_method_len(line);
    return len > VKP_I_HTTP_METHOD_BYTES                          ? 501
           : len < line.len && (len == 0 || line.ptr[len] != ' ') ? 400
                                                                  : 0;
}

/* Read the first line. *minor: 0 is HTTP/1.0. Returns 0, or the status to refuse it with. */
static int vkp_i_http_first_line(vkp_http_request *request, vkp_str line, int *minor)
{
    vkp_str version = line;
    vkp_str target;
    request->method = vkp_i_http_cut(&version, ' ');
    target = vkp_i_http_cut(&version, ' ');
    if (version.len != 8 || !vkp_i_starts_with(version, "HTTP/") || version.ptr[6] != '.' ||
        version.ptr[5] < '0' || version.ptr[5] > '9' || version.ptr[7] < '0' ||
        version.ptr[7] > '9') {
        return 400;
    }
    if (version.ptr[5] != '1') {
        return 505;
    }
    *minor = version.ptr[7] == '0' ? 0 : 1;
    return vkp_i_http_target(request, target);
}

/* What the fields say about the request. */
typedef struct vkp_i_http_framing {
    size_t fields;
    size_t hosts;
    size_t lengths;
    bool coded;      /* Transfer-Encoding */
    bool close;      /* Connection: close */
    bool keep_alive; /* Connection: keep-alive */
} vkp_i_http_framing;

/* Take the name of a field, and its colon, from *line. ptr NULL: there is none. */
static vkp_str vkp_i_http_cut_name(vkp_str *line)
{
    size_t len = 0;
    while (len < line->len && vkp_i_http_is_token((unsigned char)line->ptr[len])) {
        len++;
    }
    return len > 0 && len < line->len && line->ptr[len] == ':' ? vkp_i_http_cut(line, ':')
                                                               : vkp_i_str(NULL, 0);
}

/* Read one field. Returns 0 or 400. */
static int vkp_i_http_field(vkp_http_request *request, vkp_i_http_framing *framing, vkp_str line)
{
    vkp_str name = vkp_i_http_cut_name(&line);
    vkp_str value = vkp_i_http_trim(line);
    size_t i;
    framing->fields++;
    if (name.ptr == NULL) {
        return 400;
    }
    if (vkp_i_str_is(name, "Host")) {
        if (framing->hosts++ > 0 || !vkp_i_http_is_authority(value)) {
            return 400;
        }
        request->host = request->host.ptr != NULL ? request->host : value;
    } else if (vkp_i_str_is(name, "Content-Length")) {
        for (i = 0; i < value.len && value.ptr[i] >= '0' && value.ptr[i] <= '9'; i++) {
            request->has_body = request->has_body || value.ptr[i] != '0';
        }
        if (framing->lengths++ > 0 || i == 0 || i < value.len) {
            return 400;
        }
    } else if (vkp_i_str_is(name, "Transfer-Encoding")) {
        framing->coded = true;
    } else if (vkp_i_str_is(name, "Connection")) {
        while (value.len > 0) {
            vkp_str word = vkp_i_http_trim(vkp_i_http_cut(&value, ','));
            framing->close = framing->close || vkp_i_str_is(word, "close");
            framing->keep_alive = framing->keep_alive || vkp_i_str_is(word, "keep-alive");
        }
    }
    return 0;
}

/* Read the fields at *at, which moves behind them and the empty line. Returns 0; -1: they are
   incomplete; or the status to refuse them with.                                              */
static int vkp_i_http_fields(const uint8_t *data, size_t len, size_t *at, vkp_http_request *request,
                             vkp_i_http_framing *framing)
{
    size_t from = *at;
    size_t end = VKP_I_MIN(len, from + VKP_HTTP_FIELDS_BYTES);
    vkp_str line;
    int code;
    do {
        size_t begin = *at;
        code = vkp_i_http_line(data, end, at, &line);
        if (code == -1 && end - from == VKP_HTTP_FIELDS_BYTES) {
            return 431;
        }
        if (code == 0 && line.len == 0) {
            request->fields = vkp_i_str(data + from, begin - from);
            return 0;
        }
        if (code == 0 && framing->fields == VKP_HTTP_FIELDS) {
            return 431;
        }
        if (code == 0) {
            code = vkp_i_http_field(request, framing, line);
        }
    } while (code == 0);
    return code;
}

/* What is wrong with a whole request, or 0. */
static int vkp_i_http_check(vkp_http_request *request, const vkp_i_http_framing *framing, int minor)
{
    if ((minor > 0 && framing->hosts == 0) ||
        (framing->coded && (framing->lengths > 0 || minor == 0))) {
        return 400;
    }
    request->has_body = request->has_body || framing->coded;
    request->keep_alive = !framing->close && (minor > 0 || framing->keep_alive);
    return 0;
}

/* Returns 0; -1: incomplete; or the status to refuse it with. */
static int vkp_i_http_read(const uint8_t *data, size_t len, vkp_http_request *request, size_t *at)
{
    vkp_i_http_framing framing;
    vkp_str line;
    size_t end;
    size_t lines = 0;
    int minor = 0;
    int code;
    memset(&framing, 0, sizeof framing);
    do {
        size_t begin = *at;
        end = VKP_I_MIN(len, begin + VKP_HTTP_LINE_BYTES);
        line = vkp_i_str(data + begin, end - begin);
        code = line.len > 0 && line.ptr[0] == '\r' ? 0 : vkp_i_http_check_method(line);
        if (code != 0) { /* also where the line is not whole */
            return code;
        }
        code = vkp_i_http_line(data, end, at, &line);
        if (code == -1) {
            return end - begin == VKP_HTTP_LINE_BYTES ? 414 : -1;
        }
    } while (code == 0 && line.len == 0 && ++lines <= VKP_I_HTTP_EMPTY_LINES);
    if (code == 0) {
        code = vkp_i_http_first_line(request, line, &minor);
    }
    if (code == 0) {
        code = vkp_i_http_fields(data, len, at, request, &framing);
    }
    return code != 0 ? code : vkp_i_http_check(request, &framing, minor);
}

VKP_API vkp_status vkp_http_read(const uint8_t *data, size_t len, vkp_http_request *request,
                                 size_t *used, int *code)
{
    vkp_http_request found;
    size_t at = 0;
    int result;
    VKP_I_REQUIRE((data != NULL || len == 0) && request != NULL && used != NULL && code != NULL);
    memset(&found, 0, sizeof found);
    result = len > 0 ? vkp_i_http_read(data, len, &found, &at) : -1;
    if (result > 0) {
        *code = result;
        return VKP_ERR_PROTOCOL;
    }
    if (result < 0) {
        return VKP_ERR_EMPTY;
    }
    *request = found;
    *used = at;
    return VKP_OK;
}

VKP_API vkp_str vkp_http_get_field(const vkp_http_request *request, const char *name)
{
    vkp_str rest = request->fields;
    while (rest.len > 0) {
        vkp_str line = vkp_i_http_cut(&rest, '\n');
        if (vkp_i_str_is(vkp_i_http_cut_name(&line), name)) {
            line.len--; /* the CR */
            return vkp_i_http_trim(line);
        }
    }
    return vkp_i_str(NULL, 0);
}

#endif /* VKP_I_IO */
