#if VKP_I_IO
/* ======================================================================================
   >>impl-relay-requests   Relay: what clients say
   ======================================================================================
   The bytes of local clients, read as commands: arrays of bulk strings, and lines of words. Loop's
   thread.                                                                                     */

#define VKP_I_PROTOCOL_TEXT 256 /* bytes of a protocol error's text, terminated */

/* Log, count and answer a protocol error; the client is drained behind its pending answers. */
__attribute__((format(printf, 2, 3))) static void
vkp_i_local_protocol_error(vkp_i_local *local, const char *format, ...)
{
    char text[VKP_I_PROTOCOL_TEXT];
    va_list arguments;
    if (local->session != NULL && local->answer_count > 0) { /* comes again, behind the replies */
        vkp_i_local_pause(local, VKP_I_LOCAL_ORDER);
        return;
    }
    va_start(arguments, format);
    (void)vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    vkp_i_log(local->shard->relay->env, VKP_LOG_INFO, "client %llu: protocol error: %s",
              (unsigned long long)local->id, text);
    (void)VKP_I_ADD(&local->shard->relay->protocol_errors, (uint64_t)1);
    vkp_i_local_error(local, "ERR Protocol error: %s", text);
    vkp_i_local_pause(local, VKP_I_LOCAL_FAILED);
    vkp_i_local_maybe_resume(local);
}

/* a larger argv is freed by a command with fewer than VKP_I_ARGV_SMALL */
#define VKP_I_ARGV_LARGE 65536u
#define VKP_I_ARGV_SMALL 1024u /* commands with fewer arguments are small for VKP_I_ARGV_LARGE */

/* Make room for argc arguments in shard->argv. False: no memory. */
static bool vkp_i_shard_reserve_argv(vkp_i_shard *shard, size_t argc)
{
    void *argv = shard->argv;
    if (shard->argv_capacity > VKP_I_ARGV_LARGE && argc < VKP_I_ARGV_SMALL) {
        vkp_i_free(shard->relay->env, argv, shard->argv_capacity * sizeof *shard->argv);
        argv = NULL;
        shard->argv_capacity = 0;
    }
    shard->argv = (vkp_str *)argv;
    if (!vkp_i_grow(shard->relay->env, &argv, &shard->argv_capacity, argc, sizeof *shard->argv)) {
        return false;
    }
    shard->argv = (vkp_str *)argv;
    return true;
}

/* Execute a command that is an array of bulk strings. Returns the bytes used; 0: incomplete, not
   now, or the client closes.                                                                  */
static size_t vkp_i_local_take_array(vkp_i_local *local, const vkp_bytes *in, size_t from)
{
    vkp_i_shard *shard = local->shard;
    vkp_resp_reader *reader = local->reader != NULL ? local->reader : shard->reader;
    const vkp_value *value = NULL;
    const vkp_value *each;
    vkp_bytes request;
    size_t used = 0;
    size_t argc = 0;
    bool done = true;
    vkp_status status =
        vkp_resp_reader_scan(reader, in->data + from, in->len - from, &value, &used);
    if (status == VKP_ERR_EMPTY) {
        /* The client keeps the reader of a long command: a fresh reader would start again. */
        if (reader == shard->reader && vkp_i_reader_is_deep_in(reader)) {
            vkp_resp_reader *fresh;
            if (vkp_i_reader_open_alike(reader, &fresh) == VKP_OK) {
                local->reader = reader;
                shard->reader = fresh;
            }
        }
        if (local->reader == NULL) {
            vkp_resp_reader_reset(reader);
        }
        return 0;
    }
    if (status != VKP_OK) {
        if (status == VKP_ERR_NOMEM) {
            vkp_i_local_fail(local);
        } else {
            vkp_i_local_protocol_error(local, "%s", vkp_resp_reader_get_error(reader, NULL));
        }
        vkp_resp_reader_reset(reader);
        return 0;
    }
    if (!vkp_i_shard_reserve_argv(shard, value->len)) {
        vkp_i_local_fail(local);
        return 0;
    }
    for (each = vkp_value_get_first(value); each != NULL; each = vkp_value_get_next(value, each)) {
        if (each->type != VKP_RESP_STRING || each->flags != 0) {
            vkp_i_local_protocol_error(local, "expected '$', an argument is no bulk string");
            return 0;
        }
        shard->argv[argc++] = vkp_value_get_str(each);
    }
    if (argc > 0) {
        request.data = in->data + from;
        request.len = used;
        request.block = in->block;
        done = vkp_i_local_execute(local, argc, shard->argv, &request);
    }
    vkp_resp_reader_unref(local->reader);
    local->reader = NULL;
    if (!done) {
        vkp_resp_reader_reset(shard->reader);
    }
    return done ? used : 0;
}

/* The value of a hexadecimal digit, or -1. */
static int vkp_i_hex(char c)
{
    return c >= '0' && c <= '9'   ? c - '0'
           : c >= 'a' && c <= 'f' ? c - 'a' + 10
           : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                  : -1;
}

/* Decode one escape of a double-quoted text, from its backslash on. Returns its length. */
static size_t vkp_i_unescape(const char *at, const char *end, char *out)
{
    static const char from[] = "nrtba";
    static const char to[] = "\n\r\t\b\a";
    const char *known;
    if (end - at >= 4 && at[1] == 'x' && vkp_i_hex(at[2]) >= 0 && vkp_i_hex(at[3]) >= 0) {
        *out = (char)(unsigned char)(vkp_i_hex(at[2]) * 16 + vkp_i_hex(at[3]));
        return 4;
    }
    if (end - at < 2) {
        *out = '\\';
        return 1;
    }
    known = (const char *)memchr(from, at[1], sizeof from - 1);
    *out = known != NULL ? to[known - from] : at[1];
    return 2;
}

/* Copy one word of an inline command, without its quotes, to *out, which moves behind it. A
   quote may begin inside the word; the closing quote ends the word. Returns the end of the word;
   NULL: unbalanced quotes.                                                                    */
static const char *vkp_i_inline_word(const char *at, const char *end, char **out)
{
    char quote = '\0';
    while (at < end) {
        if (quote != '\0' && *at == quote) {
            at++;
            return at == end || *at == ' ' || *at == '\t' ? at : NULL;
        }
        if (quote == '\0' && (*at == ' ' || *at == '\t')) {
            return at;
        }
        if (quote == '\0' && (*at == '"' || *at == '\'')) {
            quote = *at++;
            continue;
        }
        if (quote == '"' && *at == '\\') {
            at += vkp_i_unescape(at, end, *out);
        } else if (quote == '\'' && *at == '\\' && at + 1 < end && at[1] == '\'') {
            **out = '\'';
            at += 2;
        } else {
            **out = *at++;
        }
        (*out)++;
    }
    return quote == '\0' ? at : NULL;
}

/* Split a line into shard->argv. False: unbalanced quotes, or no memory (*argc is SIZE_MAX). */
static bool vkp_i_shard_split(vkp_i_shard *shard, const char *at, const char *end, size_t *argc)
{
    void *text = shard->inline_text;
    char *out;
    *argc = SIZE_MAX;
    if (!vkp_i_grow(shard->relay->env, &text, &shard->inline_capacity, (size_t)(end - at) + 1, 1)) {
        return false;
    }
    shard->inline_text = (char *)text;
    out = shard->inline_text;
    if (!vkp_i_shard_reserve_argv(shard, (size_t)(end - at) / 2 + 1)) {
        return false;
    }
    *argc = 0;
    while (at != NULL && at < end) {
        char *start = out;
        if (*at == ' ' || *at == '\t') {
            at++;
            continue;
        }
        at = vkp_i_inline_word(at, end, &out);
        shard->argv[(*argc)++] = vkp_i_str(start, (size_t)(out - start));
    }
    return at != NULL;
}

#define VKP_I_INLINE_MAX 65536u /* most bytes of an inline command, its line end included */

/* Execute a command that is a line of words. Returns the bytes used; 0: incomplete, not now, or
   the client closes.                                                                          */
static size_t vkp_i_local_take_inline(vkp_i_local *local, const vkp_bytes *in, size_t from)
{
    vkp_i_shard *shard = local->shard;
    const char *line = (const char *)in->data + from;
    size_t left = in->len - from;
    const char *lf = (const char *)memchr(line, '\n', VKP_I_MIN(left, (size_t)VKP_I_INLINE_MAX));
    const char *end;
    size_t argc = 0;
    if (lf == NULL) {
        if (left >= VKP_I_INLINE_MAX) {
            vkp_i_local_protocol_error(local, "too big inline request, %u bytes without a line end",
                                       (unsigned)VKP_I_INLINE_MAX);
        }
        return 0;
    }
    end = lf > line && lf[-1] == '\r' ? lf - 1 : lf;
    if (!vkp_i_shard_split(shard, line, end, &argc)) {
        if (argc == SIZE_MAX) {
            vkp_i_local_fail(local);
        } else {
            vkp_i_local_protocol_error(local, "unbalanced quotes in request");
        }
        return 0;
    }
    if (argc > 0 &&
        (vkp_i_str_is(shard->argv[0], "POST") || vkp_i_str_is(shard->argv[0], "HOST:") ||
         (argc == 3 && vkp_i_starts_with(shard->argv[2], "HTTP/")))) {
        vkp_i_local_protocol_error(local, "the request is HTTP");
        return 0;
    }
    if (argc > 0 && !vkp_i_local_execute(local, argc, shard->argv, NULL)) {
        return 0;
    }
    return (size_t)(lf - line) + 1;
}

/* Execute commands until one is incomplete or the client is paused; on_data gets the unused
   bytes again.                                                                                */
static size_t vkp_i_local_on_data(vkp_conn *conn, void *user, const vkp_bytes *in)
{
    vkp_i_local *local = (vkp_i_local *)user;
    size_t used = 0;
    uint32_t stop = VKP_I_LOCAL_PAUSED | VKP_I_LOCAL_CLOSED | VKP_I_LOCAL_FAILED;
    local->refs++;
    while (used < in->len && (local->flags & stop) == 0 && vkp_i_conn_is_serving(conn)) {
        size_t step = in->data[used] == '*' ? vkp_i_local_take_array(local, in, used)
                                            : vkp_i_local_take_inline(local, in, used);
        if (step == 0) {
            break;
        }
        used += step;
    }
    local->heard_ms = vkp_i_loop_now_ms(local->shard->loop);
    vkp_i_local_was_read(local, used, in->len - used);
    if ((local->flags & VKP_I_LOCAL_LOCKED) != 0 && local->unread_bytes > VKP_I_LOCKED_BYTES) {
        vkp_i_local_protocol_error(local, "unauthenticated clients say less than %u bytes",
                                   VKP_I_LOCKED_BYTES);
    }
    vkp_i_local_look_ahead(local);
    vkp_i_local_release(local);
    return used;
}

#endif /* VKP_I_IO */
