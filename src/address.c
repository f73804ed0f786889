#if VKP_I_IO
/* ======================================================================================
   >>impl-address   Addresses
   ====================================================================================== */

typedef struct vkp_i_name {
    const char *text;
    size_t len;
    bool abstract; /* text begins with '@' */
} vkp_i_name;

static bool vkp_i_path_climbs(vkp_str path)
{
    size_t begin = 0;
    size_t i;
    for (i = 0; i <= path.len; i++) {
        if (i == path.len || path.ptr[i] == '/') {
            if (i - begin == 2 && path.ptr[begin] == '.' && path.ptr[begin + 1] == '.') {
                return true;
            }
            begin = i + 1;
        }
    }
    return false;
}

/* INVALID for what can be no name, LIMIT for what sun_path cannot hold. */
static vkp_status vkp_i_name_of(const vkp_env *env, vkp_str text, bool abstract_names,
                                vkp_i_name *out)
{
    size_t most = sizeof(((struct sockaddr_un *)NULL)->sun_path) - 1; /* and a NUL, at either end */
    size_t len = text.len;
    VKP_I_REQUIRE(text.ptr != NULL && len > 0 && memchr(text.ptr, '\0', len) == NULL);
    out->text = text.ptr;
    out->len = len;
    out->abstract = abstract_names && text.ptr[0] == '@';
    if (out->abstract) {
        len--;
        VKP_I_REQUIRE(len > 0);
        if (!VKP_I_LINUX) {
            return VKP_ERR_UNSUPPORTED;
        }
    } else if (vkp_i_path_climbs(text)) {
        return VKP_ERR_INVALID;
    }
    if (len > most) {
        vkp_i_log(env, VKP_LOG_ERROR, "socket path of %zu bytes, %zu fit: %.*s", len, most,
                  VKP_FMT(text));
        return VKP_ERR_LIMIT;
    }
    return VKP_OK;
}

static vkp_address vkp_i_unix_address(vkp_i_name name)
{
    union {
        struct sockaddr_un name;
        unsigned char bytes[sizeof(struct sockaddr_un)];
    } local;
    vkp_address address;
    memset(&local, 0, sizeof local);
    memset(&address, 0, sizeof address);
    local.name.sun_family = AF_UNIX;
    memcpy(local.name.sun_path, name.text, name.len);
    address.family = AF_UNIX;
    address.bytes = (uint32_t)sizeof local;
    if (name.abstract) {
        local.name.sun_path[0] = '\0';
        address.bytes = (uint32_t)(offsetof(struct sockaddr_un, sun_path) + name.len);
    }
    memcpy(address.storage.bytes, local.bytes, sizeof local);
    return address;
}

/* Decimal, 0 to 65535: resolvers take more and cut it. */
static bool vkp_i_is_port(const char *text)
{
    unsigned port = 0;
    size_t len = 0;
    for (; text[len] >= '0' && text[len] <= '9' && len < 6; len++) {
        port = port * 10 + (unsigned)(text[len] - '0');
    }
    return len > 0 && text[len] == '\0' && port <= 65535;
}

/* What an address says. */
typedef struct vkp_i_parts {
    vkp_i_name name; /* of a Unix socket; text NULL: none */
    char host[256];
    const char *port;
} vkp_i_parts;

static vkp_status vkp_i_split_address(const vkp_env *env, const char *text, vkp_i_parts *parts)
{
    size_t len;
    memset(parts, 0, sizeof *parts);
    if (strncmp(text, "unix:", 5) == 0) {
        return vkp_i_name_of(env, vkp_str_of(text + 5), true, &parts->name);
    }
    parts->port = strncmp(text, "tcp:", 4) == 0 ? strrchr(text + 4, ':') : NULL;
    len = parts->port != NULL ? (size_t)(parts->port - (text + 4)) : 0;
    if (len == 0 || len >= sizeof parts->host || !vkp_i_is_port(++parts->port)) {
        vkp_i_log(env, VKP_LOG_ERROR, "address is neither unix:PATH nor tcp:HOST:PORT: %s", text);
        return VKP_ERR_INVALID;
    }
    text += 4;
    if (len > 2 && text[0] == '[' && text[len - 1] == ']') {
        text++;
        len -= 2;
    }
    memcpy(parts->host, text, len);
    return VKP_OK;
}

/* "tcp:HOST:PORT" or "unix:PATH": the addresses, or an error. */
static vkp_status vkp_i_parse_address(const vkp_env *env, const char *text, vkp_address *out,
                                      size_t capacity, size_t *count)
{
    vkp_i_parts parts;
    vkp_status status = vkp_i_split_address(env, text, &parts);
    int found = 1;
    if (status != VKP_OK) {
        return status;
    }
    if (parts.name.text != NULL) {
        out[0] = vkp_i_unix_address(parts.name);
    } else {
        found = vkp_i_sys(env)->resolve(parts.host, parts.port, out, capacity);
    }
    if (found <= 0) {
        vkp_i_log(env, VKP_LOG_ERROR, "cannot resolve %s", text);
        return VKP_ERR_REFUSED;
    }
    *count = (size_t)found;
    return VKP_OK;
}

#endif /* VKP_I_IO */
