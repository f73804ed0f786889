#if VKP_I_IO
/* ======================================================================================
   >>impl-address   Addresses
   ======================================================================================
   Text to socket addresses: "unix:PATH", "unix:@NAME" (abstract, Linux only) or "tcp:HOST:PORT" (an
   IPv6 host may stand in brackets). Any thread, no locks. Only resolving a host that is not numeric
   may block, on DNS.
   A vkp_i_name views the text it was made from; it is checked once, in vkp_i_name_of, and then used
   as it is written. Errors are logged with the text, where the caller could not see their cause. */

#define VKP_I_HOST_BYTES 256u /* a DNS name has at most 253 bytes */
#define VKP_I_PORT_MAX 65535u
#define VKP_I_PORT_DIGITS 6u /* longest text of a port, leading zeros included */

/* The checked name of a Unix socket. */
typedef struct vkp_i_name {
    const char *text; /* views; not terminated */
    size_t len;       /* bytes of text, the '@' included */
    bool abstract;    /* text begins with '@' and names no file */
} vkp_i_name;

/* Whether the path has a ".." component. */
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

/* Check the name of a Unix socket. INVALID: empty, a NUL byte or a ".." component. LIMIT: too long
   for sun_path. UNSUPPORTED: an abstract name outside Linux. */
static vkp_status vkp_i_name_of(const vkp_env *env, vkp_str text, bool abstract_names,
                                vkp_i_name *out)
{
    size_t most = sizeof(((struct sockaddr_un *)NULL)->sun_path) - 1; /* a NUL needs 1 byte */
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

/* The socket address of a checked name. An abstract name has a NUL in place of its '@', and its
   length ends the address: NULs behind it would be part of the name. */
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

/* Whether the text is a port, 0 to 65535, in decimal. Resolvers accept larger ones and cut them. */
static bool vkp_i_is_port(vkp_str text)
{
    unsigned port = 0;
    size_t i;
    for (i = 0; i < text.len && text.ptr[i] >= '0' && text.ptr[i] <= '9' && i < VKP_I_PORT_DIGITS;
         i++) {
        port = port * 10 + (unsigned)(text.ptr[i] - '0');
    }
    return i > 0 && i == text.len && port <= VKP_I_PORT_MAX;
}

/* Whether the host is an address in digits, which needs no lookup. */
static bool vkp_i_is_numeric_host(const char *host)
{
    struct in_addr address;
    return strchr(host, ':') != NULL || inet_pton(AF_INET, host, &address) == 1;
}

/* The parts of an address text. */
typedef struct vkp_i_parts {
    vkp_i_name name;             /* name of a Unix socket; text is NULL for a TCP address */
    char host[VKP_I_HOST_BYTES]; /* TCP host, terminated, without brackets */
    char port[8];                /* TCP port, terminated */
} vkp_i_parts;

/* Split an address text. INVALID, LIMIT and UNSUPPORTED: see vkp_i_name_of; INVALID also for a text
   of neither form. */
static vkp_status vkp_i_split_address(const vkp_env *env, vkp_str text, vkp_i_parts *parts)
{
    vkp_str host;
    vkp_str port;
    memset(parts, 0, sizeof *parts);
    if (vkp_i_starts_with(text, "unix:")) {
        return vkp_i_name_of(env, vkp_i_str(text.ptr + 5, text.len - 5), true, &parts->name);
    }
    host = vkp_i_starts_with(text, "tcp:") ? vkp_i_str(text.ptr + 4, text.len - 4)
                                           : vkp_i_str(NULL, 0);
    port = vkp_i_str(NULL, 0);
    while (host.len > 0 && port.ptr == NULL) {
        if (host.ptr[--host.len] == ':') {
            port.ptr = host.ptr + host.len + 1;
            port.len = (size_t)(text.ptr + text.len - port.ptr);
        }
    }
    if (host.len == 0 || host.len >= sizeof parts->host || !vkp_i_is_port(port) ||
        memchr(host.ptr, '\0', host.len) != NULL) {
        vkp_i_log(env, VKP_LOG_ERROR, "address is neither unix:PATH nor tcp:HOST:PORT: %.*s",
                  VKP_FMT(text));
        return VKP_ERR_INVALID;
    }
    if (host.len > 2 && host.ptr[0] == '[' && host.ptr[host.len - 1] == ']') {
        host.ptr++;
        host.len -= 2;
    }
    memcpy(parts->host, host.ptr, host.len);
    memcpy(parts->port, port.ptr, port.len);
    return VKP_OK;
}

/* The socket addresses of "tcp:HOST:PORT" or "unix:PATH". REFUSED: the host cannot be resolved. May
   block on DNS. */
static vkp_status vkp_i_parse_address(const vkp_env *env, vkp_str text, vkp_address *out,
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
        vkp_i_log(env, VKP_LOG_ERROR, "cannot resolve %.*s", VKP_FMT(text));
        return VKP_ERR_REFUSED;
    }
    *count = (size_t)found;
    return VKP_OK;
}

#endif /* VKP_I_IO */
