#if VKP_I_IO
/* ======================================================================================
   >>impl-handshake   Logging in to a server
   ======================================================================================
   From the connect to VKP_I_STAGE_READY, on the loop's thread. The stages of a link, and what ends
   them; anything else that a server does ends the link, and the owner tries again:
     CONNECTING  connected: send HELLO 3 with AUTH and SETNAME: HELLO. With protocol 2, or where
                 the server hung up at HELLO ten times and never answered one: LOGIN.
     HELLO       the reply says proto 3 or 2: SETUP. Another reply, or an error of a server that
                 does not know HELLO, in whatever words: LOGIN. NOAUTH or NOPERM although a password
                 was sent: AUTH, then HELLO again, once. Redis 6.0 asks for the default user's right
                 to HELLO before it reads the AUTH in it; NOPERM without a password, or again:
                 LOGIN. Another error of a server that does: the end.
     LOGIN       send AUTH, SETNAME and PING. AUTH is refused, or PING is answered NOAUTH: the end.
                 Another answer to PING: SETUP. Some users have no right to PING.
     SETUP       send SELECT and the commands of the config. All answered as expected: READY.
   Replies to CLIENT SETNAME and CLIENT SETINFO are ignored: they change nothing that matters. */

/* What one request of the handshake is. */
typedef enum vkp_i_step_kind {
    VKP_I_STEP_HELLO,
    VKP_I_STEP_AUTH,
    VKP_I_STEP_PING,   /* the last one of LOGIN */
    VKP_I_STEP_SELECT, /* must be answered by OK */
    VKP_I_STEP_SETUP,  /* must be answered as vkp_client_setup says */
    VKP_I_STEP_ROLE,   /* with a role in the config, where HELLO did not say it; later, whether
                          it is the same */
    VKP_I_STEP_ID,     /* CLIENT ID in RESP2: in LOGIN if the owner wants it, or before the first
                          SUBSCRIBE; an error is ignored */
    VKP_I_STEP_IGNORED
} vkp_i_step_kind;

typedef struct vkp_i_step {
    vkp_i_request request;
    vkp_i_link *link;
    vkp_i_step_kind kind;
    size_t index; /* SETUP: of config->setup */
} vkp_i_step;

static void vkp_i_step_settled(vkp_i_request *request, vkp_status status, const vkp_value *value,
                               const vkp_bytes *frame);

/* Whether a connection is not ready before the step is answered. One that passes bytes on waits for
   all: servers refuse some commands behind replies that are not sent yet, or do not answer them. */
static bool vkp_i_step_counts(const vkp_i_link *link, vkp_i_step_kind kind)
{
    return kind != VKP_I_STEP_IGNORED || link->ops->on_bytes != NULL;
}

/* Send one command of the handshake. False: not connected or no memory. */
static bool vkp_i_link_step(vkp_i_link *link, vkp_i_step_kind kind, size_t index, size_t argc,
                            const vkp_str *argv)
{
    vkp_i_step *step = (vkp_i_step *)vkp_i_alloc_zero(link->env, sizeof *step);
    if (step == NULL) {
        return false;
    }
    step->request.due = 1;
    step->request.settle = vkp_i_step_settled;
    step->link = link;
    step->kind = kind;
    step->index = index;
    if (vkp_i_request_put(&step->request, link->env, argc, argv) != VKP_OK ||
        !vkp_i_link_start(link, &step->request)) {
        vkp_bytes_unref(&step->request.bytes);
        vkp_i_free(link->env, step, sizeof *step);
        return false;
    }
    link->steps += vkp_i_step_counts(link, kind) ? 1u : 0u;
    return true;
}

/* Whether the reply is an error that passes by itself, or a refusal that another form of login
   would not change. */
static bool vkp_i_words_are_passing(vkp_str words)
{
    static const char *const starts[] = {"BUSY",        "LOADING",  "MASTERDOWN",
                                         "CLUSTERDOWN", "TRYAGAIN", "ERR max number of clients"};
    size_t i;
    for (i = 0; i < sizeof starts / sizeof starts[0]; i++) {
        if (vkp_i_starts_with(words, starts[i])) {
            return true;
        }
    }
    return false;
}

/* Whether an error to HELLO comes from a server that knows HELLO. */
static bool vkp_i_words_are_final(vkp_str words)
{
    return vkp_i_words_are_passing(words) || vkp_i_starts_with(words, "WRONGPASS") ||
           vkp_i_starts_with(words, "DENIED");
}

/* Send HELLO 3. False: not connected or no memory. */
static bool vkp_i_link_hello(vkp_i_link *link, bool auth)
{
    vkp_str argv[8];
    size_t argc = 0;
    link->stage = VKP_I_STAGE_HELLO;
    link->protocol = 3;
    argv[argc++] = vkp_str_of("HELLO");
    argv[argc++] = vkp_str_of("3");
    if (auth && link->password.ptr != NULL) {
        argv[argc++] = vkp_str_of("AUTH");
        argv[argc++] = link->username.ptr != NULL ? link->username : vkp_str_of("default");
        argv[argc++] = link->password;
    }
    if (link->config->name.ptr != NULL) {
        argv[argc++] = vkp_str_of("SETNAME");
        argv[argc++] = link->config->name;
    }
    return vkp_i_link_step(link, VKP_I_STEP_HELLO, 0, argc, argv);
}

/* The arguments of AUTH; username.ptr NULL: the default user. Returns how many. */
static size_t vkp_i_auth_words(vkp_str username, vkp_str password, vkp_str argv[3])
{
    size_t argc = 0;
    argv[argc++] = vkp_str_of("AUTH");
    if (username.ptr != NULL) {
        argv[argc++] = username;
    }
    argv[argc++] = password;
    return argc;
}

/* Send AUTH, if there is a password. False: not connected or no memory. */
static bool vkp_i_link_auth(vkp_i_link *link)
{
    vkp_str argv[3];
    return link->password.ptr == NULL ||
           vkp_i_link_step(link, VKP_I_STEP_AUTH, 0,
                           vkp_i_auth_words(link->username, link->password, argv), argv);
}

/* Ask the server for the connection's id, once. False: not connected or no memory. */
static bool vkp_i_link_ask_id(vkp_i_link *link)
{
    vkp_str argv[2];
    bool asked = link->id_asked;
    argv[0] = vkp_str_of("CLIENT");
    argv[1] = vkp_str_of("ID");
    link->id_asked = true;
    return asked || vkp_i_link_step(link, VKP_I_STEP_ID, 0, 2, argv);
}

/* The login of RESP2. False: not connected or no memory. */
static bool vkp_i_link_login(vkp_i_link *link)
{
    vkp_str argv[3];
    link->stage = VKP_I_STAGE_LOGIN;
    link->protocol = 2;
    if (!vkp_i_link_auth(link)) {
        return false;
    }
    argv[0] = vkp_str_of("CLIENT");
    argv[1] = vkp_str_of("SETNAME");
    argv[2] = link->config->name;
    if (argv[2].ptr != NULL && !vkp_i_link_step(link, VKP_I_STEP_IGNORED, 0, 3, argv)) {
        return false;
    }
    if (link->wants_id && !vkp_i_link_ask_id(link)) {
        return false;
    }
    argv[0] = vkp_str_of("PING");
    return vkp_i_link_step(link, VKP_I_STEP_PING, 0, 1, argv);
}

/* Ask the server for its role. False: not connected or no memory. */
static bool vkp_i_link_ask_role(vkp_i_link *link)
{
    vkp_str argv = vkp_str_of("ROLE");
    return vkp_i_link_step(link, VKP_I_STEP_ROLE, 0, 1, &argv);
}

/* The commands of the config, after the login. False: not connected or no memory. */
static bool vkp_i_link_setup(vkp_i_link *link)
{
    const vkp_client_config *config = link->config;
    char digits[VKP_I_DIGITS];
    size_t from;
    vkp_str argv[2];
    size_t i;
    link->stage = VKP_I_STAGE_SETUP;
    if (config->role != VKP_CLIENT_ROLE_ANY && !link->role_known) {
        if (!vkp_i_link_ask_role(link)) {
            return false;
        }
    }
    if (config->database != 0) {
        from = vkp_i_format_u64(digits, config->database);
        argv[0] = vkp_str_of("SELECT");
        argv[1] = vkp_i_str(digits + from, VKP_I_DIGITS - from);
        if (!vkp_i_link_step(link, VKP_I_STEP_SELECT, 0, 2, argv)) {
            return false;
        }
    }
    for (i = 0; i < config->setup_count; i++) {
        const vkp_client_setup *setup = &config->setup[i];
        if (!vkp_i_link_step(link, VKP_I_STEP_SETUP, i, setup->argc, setup->argv)) {
            return false;
        }
    }
    return true;
}

#define VKP_I_VERSION(major, minor) ((major)*10000u + (minor))

/* The version of HELLO's reply, "7.2.4", as a VKP_I_VERSION; 0: none. */
static unsigned vkp_i_version_of(vkp_str version)
{
    unsigned parts[2] = {0, 0};
    size_t part = 0;
    size_t i;
    for (i = 0; i < version.len && part < 2; i++) {
        if (version.ptr[i] == '.') {
            part++;
        } else if (version.ptr[i] >= '0' && version.ptr[i] <= '9' && parts[part] < 10000) {
            parts[part] = parts[part] * 10 + (unsigned)(version.ptr[i] - '0');
        }
    }
    return VKP_I_VERSION(VKP_I_MIN(parts[0], 9999u), VKP_I_MIN(parts[1], 9999u));
}

/* Send the server the library's name and version. False: not connected or no memory. */
static bool vkp_i_link_introduce(vkp_i_link *link)
{
    static const char *const infos[2][2] = {{"LIB-NAME", "valkey_push"},
                                            {"LIB-VER", VKP_VERSION_STR}};
    vkp_str argv[4];
    int i;
    for (i = 0; i < 2; i++) {
        argv[0] = vkp_str_of("CLIENT");
        argv[1] = vkp_str_of("SETINFO");
        argv[2] = vkp_str_of(infos[i][0]);
        argv[3] = vkp_str_of(infos[i][1]);
        if (!vkp_i_link_step(link, VKP_I_STEP_IGNORED, 0, 4, argv)) {
            return false;
        }
    }
    return true;
}

/* Whether the role is the wanted one; if not the link fails. */
static bool vkp_i_link_check_role(vkp_i_link *link, vkp_str role)
{
    bool primary = vkp_i_str_is(role, "master") || vkp_i_str_is(role, "primary");
    link->role_known = true;
    if (link->config->role == VKP_CLIENT_ROLE_PRIMARY && !primary) {
        vkp_i_link_fail(link, "not a primary but a", role);
        return false;
    }
    return true;
}

/* The protocol that a value says, as a number or as text: 2 or 3; 0: neither. */
static int64_t vkp_i_to_protocol(const vkp_value *value)
{
    int64_t number = value->type == VKP_RESP_INTEGER             ? value->u.integer
                     : vkp_value_is_text(value, vkp_str_of("3")) ? 3
                     : vkp_value_is_text(value, vkp_str_of("2")) ? 2
                                                                 : 0;
    return number == 2 || number == 3 ? number : 0;
}

/* HELLO was answered with a map, or an array of keys and values. */
static void vkp_i_link_greeted(vkp_i_link *link, const vkp_value *value, const vkp_value *proto)
{
    const vkp_value *id = vkp_i_map_value(value, "id");
    vkp_str role = vkp_value_get_str(vkp_i_map_value(value, "role"));
    unsigned version = vkp_i_version_of(vkp_value_get_str(vkp_i_map_value(value, "version")));
    link->hello_restricted = version >= VKP_I_VERSION(6, 0) && version < VKP_I_VERSION(6, 2);
    link->id = id != NULL && id->type == VKP_RESP_INTEGER ? id->u.integer : 0;
    link->protocol = vkp_i_to_protocol(proto) == 2 ? 2 : 3;
    link->had_resp3 = link->had_resp3 || link->protocol == 3;
    if (role.len > 0 && !vkp_i_link_check_role(link, role)) {
        return;
    }
    if (link->ops->on_hello != NULL) {
        link->ops->on_hello(link, value);
    }
    if ((version >= VKP_I_VERSION(7, 2) && !vkp_i_link_introduce(link)) || /* CLIENT SETINFO */
        !vkp_i_link_setup(link)) {
        vkp_i_link_lose(link, "out of memory");
    }
}

/* HELLO was answered. */
static void vkp_i_link_hello_reply(vkp_i_link *link, const vkp_value *value)
{
    const vkp_value *proto = vkp_i_map_value(value, "proto");
    vkp_str words = vkp_value_get_str(value);
    bool ok;
    if (proto != NULL && vkp_i_to_protocol(proto) != 0) {
        vkp_i_link_greeted(link, value, proto);
        return;
    }
    if (value->type == VKP_RESP_ERROR) {
        bool no_auth = vkp_i_starts_with(words, "NOAUTH");
        bool retry = (no_auth || vkp_i_starts_with(words, "NOPERM")) &&
                     link->password.ptr != NULL && !link->authenticated;
        if (vkp_i_words_are_final(words) || (no_auth && !retry)) {
            vkp_i_link_fail(link, "the server refused the handshake", words);
            return;
        }
        (void)snprintf(link->hello_words, sizeof link->hello_words, "%.*s",
                       (int)VKP_I_MIN(words.len, sizeof link->hello_words), words.ptr);
        if (retry) {
            link->authenticated = true;
            ok = vkp_i_link_auth(link) && vkp_i_link_hello(link, false);
            if (!ok) {
                vkp_i_link_lose(link, "out of memory");
            }
            return;
        }
    }
    if (!vkp_i_link_login(link)) {
        vkp_i_link_lose(link, "out of memory");
    }
}

/* Check the reply to a command of the config. */
static void vkp_i_link_setup_reply(vkp_i_link *link, const vkp_i_step *step, const vkp_value *value)
{
    static const vkp_client_setup select = {2, NULL, {"OK", 2}, false};
    const vkp_client_setup *setup =
        step->kind == VKP_I_STEP_SETUP ? &link->config->setup[step->index] : &select;
    vkp_str name = step->kind == VKP_I_STEP_SETUP ? setup->argv[0] : vkp_str_of("SELECT");
    char why[64];
    if (setup->optional ||
        (value->type != VKP_RESP_ERROR &&
         (setup->expect.ptr == NULL || vkp_value_is_text(value, setup->expect)))) {
        return;
    }
    (void)snprintf(why, sizeof why, "%.*s was answered", (int)VKP_I_MIN(name.len, (size_t)32),
                   name.ptr);
    vkp_i_link_fail(link, why,
                    value->type == VKP_RESP_ERROR || value->type == VKP_RESP_STRING
                        ? vkp_value_get_str(value)
                        : vkp_str_of("otherwise than expected"));
}

/* One step of the handshake is answered. */
static void vkp_i_link_step_reply(vkp_i_link *link, const vkp_i_step *step, const vkp_value *value)
{
    vkp_str words = vkp_value_get_str(value);
    bool failed = value->type == VKP_RESP_ERROR;
    switch (step->kind) {
    case VKP_I_STEP_HELLO:
        vkp_i_link_hello_reply(link, value);
        break;
    case VKP_I_STEP_AUTH:
        if (failed) {
            vkp_i_link_fail(link, "the server refused the password", words);
        }
        break;
    case VKP_I_STEP_ID:
        link->id = value->type == VKP_RESP_INTEGER ? value->u.integer : 0;
        break;
    case VKP_I_STEP_PING:
        link->ping_refused = failed;
        if (failed && vkp_i_starts_with(words, "NOAUTH")) {
            vkp_i_link_fail(link, "the server refused the handshake", words);
        } else if (!vkp_i_link_setup(link)) {
            vkp_i_link_lose(link, "out of memory");
        }
        break;
    case VKP_I_STEP_ROLE:
        if (!failed || link->stage != VKP_I_STAGE_READY) { /* later, an error says nothing new */
            (void)vkp_i_link_check_role(
                link, failed ? words : vkp_value_get_str(vkp_value_get_first(value)));
        }
        break;
    case VKP_I_STEP_SELECT:
    case VKP_I_STEP_SETUP:
        vkp_i_link_setup_reply(link, step, value);
        break;
    case VKP_I_STEP_IGNORED:
        break;
    }
}

static void vkp_i_step_settled(vkp_i_request *request, vkp_status status, const vkp_value *value,
                               const vkp_bytes *frame)
{
    vkp_i_step *step = VKP_CONTAINER(request, vkp_i_step, request);
    vkp_i_link *link = step->link;
    vkp_conn *conn = link->conn;
    (void)frame;
    if (status == VKP_ERR_LIMIT && vkp_i_step_counts(link, step->kind)) {
        vkp_i_link_lose(link, "a reply over a limit in the handshake");
    } else if (status == VKP_OK) {
        link->steps -= vkp_i_step_counts(link, step->kind) ? 1u : 0u;
        vkp_i_link_step_reply(link, step, value);
        if (conn != NULL && link->conn == conn && link->stage == VKP_I_STAGE_SETUP &&
            link->steps == 0) {
            link->stage = VKP_I_STAGE_READY;
            link->ready_ns = link->loop->now_ns;
            link->failures = 0;
            link->hello_words[0] = '\0'; /* not why a connection that works ends */
            link->ops->on_ready(link);
        }
    }
    vkp_bytes_unref(&step->request.bytes);
    vkp_i_free(link->env, step, sizeof *step);
}

#define VKP_I_MOST_HUNG_UP 10u /* hang-ups at HELLO in a row that may be chance */

/* The connection is established. A server that hangs up at HELLO again and again may not know it:
   then every second try begins without. False: not connected or no memory. */
static bool vkp_i_link_begin_handshake(vkp_i_link *link)
{
    bool without =
        link->hung_up >= VKP_I_MOST_HUNG_UP && !link->had_resp3 && link->failures % 2 == 1;
    return link->config->protocol == 2 || without ? vkp_i_link_login(link)
                                                  : vkp_i_link_hello(link, true);
}

#endif /* VKP_I_IO */
