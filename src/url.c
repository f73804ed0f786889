#if VKP_I_IO
/* ======================================================================================
   >>impl-url   Addresses and credentials from a URL
   ======================================================================================
   Any thread, no locks. vkp_i_url_apply sets the fields of a config that a URL stands for; their
   texts lie in one allocation, which the caller frees after it copied them. What is wrong is logged
   without the URL, because a URL has a password. A part that could be read in two ways is refused,
   and not guessed: a user without a password, which other programs take as a password.        */

#define VKP_I_URL_PORT "6379"
#define VKP_I_URL_EXTRA 16u /* bytes that an address has and its URL has not: "tcp:", ":6379" */

/* What the text behind "://" is. */
typedef enum vkp_i_url_kind { VKP_I_URL_TCP, VKP_I_URL_UNIX, VKP_I_URL_TLS } vkp_i_url_kind;

/* A URL that is being read. Functions that return a text return what is wrong, or NULL. */
typedef struct vkp_i_url {
    vkp_i_url_kind kind;
    vkp_str rest; /* of the URL: what is not read yet */
    char *end;    /* of the decoded texts */
    vkp_client_config *config;
} vkp_i_url;

/* Cut what is before the first `mark` from *text. Where there is no mark that is all, and *text
   becomes empty with ptr NULL; otherwise *text begins behind the mark.                        */
static vkp_str vkp_i_url_cut(vkp_str *text, char mark)
{
    const char *at = text->len > 0 ? (const char *)memchr(text->ptr, mark, text->len) : NULL;
    vkp_str before = *text;
    if (at == NULL) {
        *text = vkp_i_str(NULL, 0);
        return before;
    }
    before.len = (size_t)(at - before.ptr);
    *text = vkp_i_str(at + 1, text->len - before.len - 1);
    return before;
}

/* Read the scheme. False: none that is known. */
static bool vkp_i_url_scheme(vkp_i_url *url)
{
    static const struct {
        const char *text;
        vkp_i_url_kind kind;
    } schemes[] = {{"redis://", VKP_I_URL_TCP},
                   {"valkey://", VKP_I_URL_TCP},
                   {"unix://", VKP_I_URL_UNIX},
                   {"rediss://", VKP_I_URL_TLS},
                   {"valkeys://", VKP_I_URL_TLS}};
    size_t i;
    for (i = 0; i < sizeof schemes / sizeof schemes[0]; i++) {
        size_t len = strlen(schemes[i].text);
        if (url->rest.len >= len && vkp_i_str_is(vkp_i_str(url->rest.ptr, len), schemes[i].text)) {
            url->kind = schemes[i].kind;
            url->rest = vkp_i_str(url->rest.ptr + len, url->rest.len - len);
            return true;
        }
    }
    return false;
}

/* The value of a hexadecimal digit; -1: it is none. */
static int vkp_i_url_digit(char byte)
{
    return byte >= '0' && byte <= '9'   ? byte - '0'
           : byte >= 'a' && byte <= 'f' ? byte - 'a' + 10
           : byte >= 'A' && byte <= 'F' ? byte - 'A' + 10
                                        : -1;
}

/* Append the text with each %XX as its byte. False: a percent sign without two digits. */
static bool vkp_i_url_decode(vkp_i_url *url, vkp_str text)
{
    size_t i;
    for (i = 0; i < text.len; i++) {
        char byte = text.ptr[i];
        if (byte == '%') {
            int high = i + 2 < text.len ? vkp_i_url_digit(text.ptr[i + 1]) : -1;
            int low = i + 2 < text.len ? vkp_i_url_digit(text.ptr[i + 2]) : -1;
            if (high < 0 || low < 0) {
                return false;
            }
            byte = (char)(unsigned char)(high * 16 + low);
            i += 2;
        }
        *url->end++ = byte;
    }
    return true;
}

/* Append a text as it is. */
static void vkp_i_url_append(vkp_i_url *url, const char *text, size_t len)
{
    memcpy(url->end, text, len);
    url->end += len;
}

/* Decode the text; *out views the result. False: a wrong percent sign. */
static bool vkp_i_url_decode_to(vkp_i_url *url, vkp_str text, vkp_str *out)
{
    char *begin = url->end;
    bool decoded = vkp_i_url_decode(url, text);
    *out = vkp_i_str(begin, (size_t)(url->end - begin));
    return decoded;
}

/* Read "[user]:password@" at the start of *authority, if it is there. */
static const char *vkp_i_url_credentials(vkp_i_url *url, vkp_str *authority)
{
    vkp_str user;
    vkp_str password;
    size_t at = authority->len;
    while (at > 0 && authority->ptr[at - 1] != '@') {
        at--;
    }
    if (at == 0) {
        return NULL;
    }
    password = vkp_i_str(authority->ptr, at - 1);
    *authority = vkp_i_str(authority->ptr + at, authority->len - at);
    user = vkp_i_url_cut(&password, ':');
    if (password.ptr == NULL) {
        return "before the @ there is no colon, and so no password";
    }
    if ((user.len > 0 && !vkp_i_url_decode_to(url, user, &url->config->username)) ||
        !vkp_i_url_decode_to(url, password, &url->config->password)) {
        return "a percent sign without two hexadecimal digits in the user or the password";
    }
    return NULL;
}

/* Read "host[:port]" into the address. */
static const char *vkp_i_url_host(vkp_i_url *url, vkp_str text)
{
    vkp_str port = text;
    vkp_str host;
    char *begin = url->end;
    char *name;
    bool bracketed = text.len > 0 && text.ptr[0] == '[';
    if (bracketed) {
        host = vkp_i_url_cut(&port, ']');
        if (port.ptr == NULL || (port.len > 0 && port.ptr[0] != ':')) {
            return "the brackets of the host do not end before the port";
        }
        host.len++;
        port = port.len > 0 ? vkp_i_str(port.ptr + 1, port.len - 1) : vkp_i_str(NULL, 0);
    } else {
        host = vkp_i_url_cut(&port, ':');
    }
    if (host.len == 0) {
        return "there is no host";
    }
    if (port.ptr != NULL && !vkp_i_is_port(port)) {
        return "the port is not a number up to 65535 (an IPv6 host needs brackets)";
    }
    vkp_i_url_append(url, "tcp:", 4);
    name = url->end;
    if (!vkp_i_url_decode(url, host)) {
        return "a percent sign without two hexadecimal digits in the host";
    }
    if ((memchr(name, ':', (size_t)(url->end - name)) != NULL) != bracketed) {
        return "brackets are for IPv6 hosts, and only for them";
    }
    vkp_i_url_append(url, ":", 1);
    port = port.ptr != NULL ? port : vkp_str_of(VKP_I_URL_PORT);
    vkp_i_url_append(url, port.ptr, port.len);
    url->config->address = vkp_i_str(begin, (size_t)(url->end - begin));
    return NULL;
}

/* Read the path of a Unix socket into the address. */
static const char *vkp_i_url_path(vkp_i_url *url, vkp_str authority, vkp_str path)
{
    char *begin = url->end;
    if (authority.len > 0 || path.len == 0) {
        return "the path of the socket must begin with a slash";
    }
    vkp_i_url_append(url, "unix:", 5);
    if (!vkp_i_url_decode(url, path)) {
        return "a percent sign without two hexadecimal digits in the path";
    }
    url->config->address = vkp_i_str(begin, (size_t)(url->end - begin));
    return NULL;
}

/* Read the number of a database. False: it is none. */
static bool vkp_i_url_database(vkp_i_url *url, vkp_str text)
{
    uint64_t number = 0;
    size_t i;
    for (i = 0; i < text.len && number <= UINT32_MAX; i++) {
        if (text.ptr[i] < '0' || text.ptr[i] > '9') {
            return false;
        }
        number = number * 10 + (uint64_t)(text.ptr[i] - '0');
    }
    url->config->database = (uint32_t)number;
    return text.len > 0 && number <= UINT32_MAX;
}

/* Read "key=value&key=value". */
static const char *vkp_i_url_query(vkp_i_url *url, vkp_str query)
{
    bool has_database = false;
    while (query.len > 0) {
        vkp_str value = vkp_i_url_cut(&query, '&');
        vkp_str key = vkp_i_url_cut(&value, '=');
        if (vkp_i_str_equal(key, vkp_str_of("protocol"))) {
            bool known = value.len == 1 && (value.ptr[0] == '2' || value.ptr[0] == '3');
            if (!known || url->config->protocol != 0) {
                return "protocol must be 2 or 3, once, and not in the config as well";
            }
            url->config->protocol = value.ptr[0] - '0';
        } else if (url->kind == VKP_I_URL_UNIX && vkp_i_str_equal(key, vkp_str_of("db"))) {
            if (has_database || !vkp_i_url_database(url, value)) {
                return "db must be a number, once";
            }
            has_database = true;
        } else {
            return url->kind == VKP_I_URL_UNIX ? "a key other than db and protocol behind the ?"
                                               : "a key other than protocol behind the ?";
        }
    }
    return NULL;
}

/* Read what is behind the scheme. */
static const char *vkp_i_url_read(vkp_i_url *url)
{
    vkp_str query = url->rest;
    vkp_str path = vkp_i_url_cut(&query, '?');
    vkp_str authority = vkp_i_url_cut(&path, '/');
    const char *wrong = vkp_i_url_credentials(url, &authority);
    if (memchr(url->rest.ptr, '#', url->rest.len) != NULL) {
        return "there is a #, which must be written as %23";
    }
    if (wrong == NULL && url->kind == VKP_I_URL_UNIX) {
        wrong = vkp_i_url_path(url, authority,
                               path.ptr != NULL ? vkp_i_str(path.ptr - 1, path.len + 1) : path);
    } else if (wrong == NULL) {
        wrong = vkp_i_url_host(url, authority);
        if (wrong == NULL && path.len > 0 && !vkp_i_url_database(url, path)) {
            wrong = "the database behind the slash is not a number";
        }
    }
    return wrong == NULL ? vkp_i_url_query(url, query) : wrong;
}

/* Set the fields that config->url stands for, and unset url. *text and *bytes are the allocation
   that the fields view: for the caller to free, on failure too. INVALID, UNSUPPORTED or NOMEM; the
   cause is logged.                                                                            */
static vkp_status vkp_i_url_apply(const vkp_env *env, vkp_client_config *config, void **text,
                                  size_t *bytes)
{
    vkp_i_url url;
    const char *wrong;
    url.config = config;
    url.rest = config->url;
    *text = NULL;
    *bytes = config->url.len + VKP_I_URL_EXTRA;
    if (!vkp_i_url_scheme(&url)) {
        vkp_i_log(env, VKP_LOG_ERROR, "url: it begins with none of redis://, valkey://, unix://");
        return VKP_ERR_INVALID;
    }
    if (url.kind == VKP_I_URL_TLS) {
        vkp_i_log(env, VKP_LOG_ERROR, "url: rediss:// is not supported: there is no TLS");
        return VKP_ERR_UNSUPPORTED;
    }
    *text = vkp_i_alloc(env, *bytes);
    if (*text == NULL) {
        return VKP_ERR_NOMEM;
    }
    url.end = (char *)*text;
    wrong = vkp_i_url_read(&url);
    if (wrong != NULL) {
        vkp_i_log(env, VKP_LOG_ERROR, "url: %s", wrong);
        return VKP_ERR_INVALID;
    }
    config->url = vkp_i_str(NULL, 0);
    return VKP_OK;
}

#endif /* VKP_I_IO */
