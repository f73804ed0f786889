#if VKP_I_IO
/* ======================================================================================
   >>impl-relay-commands   Relay: commands
   ======================================================================================
   Execute one command of a local client, on that client's loop. vkp_i_local_execute decides by
   the table vkp_i_commands, and by what the command does to the connection that carries it (see
   impl-command): wait until no answer is pending, refuse, hold for EXEC, answer here, or forward
   upstream. Commands outside the table are forwarded, and stand-alone refused.
   Each command is answered once, in its order: at once by its vkp_i_run_* function, or later by
   an answer or a subscription under way.
   Stand-alone, PUBLISH delivers to its own shard's hub and sends the message to every other
   shard's channel; push loops deliver it there. The relay's mutex is taken for subscriber counts
   only.                                                                                       */

/* ---- commands ---- */

/* Bits of vkp_i_command.flags, besides the VKP_I_SHAPE_* bits. */
#define VKP_I_CMD_SHAPES 0x00ffu /* mask of the VKP_I_SHAPE_* bits */
#define VKP_I_CMD_ORDER 0x0100u  /* executed when no answer is pending */
#define VKP_I_CMD_LOCAL 0x0200u  /* answered by the relay, with or without a server */
#define VKP_I_CMD_ALONE 0x0400u  /* answered by a stand-alone relay, otherwise forwarded */
#define VKP_I_CMD_SUB2 0x0800u   /* allowed to a RESP2 client with subscriptions */
#define VKP_I_CMD_MULTI 0x4000u  /* executed inside MULTI, not held until EXEC */

typedef void (*vkp_i_command_fn)(vkp_i_local *local, size_t argc, const vkp_str *argv);

typedef struct vkp_i_command {
    const char *name;     /* lower case; the table is sorted by name */
    vkp_i_command_fn run; /* answers the command; NULL: forwarded or refused */
    uint32_t flags;       /* VKP_I_CMD_* and VKP_I_SHAPE_* bits */
} vkp_i_command;

static void vkp_i_run_ping(vkp_i_local *local, size_t argc, const vkp_str *argv)
{
    vkp_resp_writer writer;
    bool subscribed =
        vkp_i_local_sub_count(local, VKP_SUB_CHANNEL) + local->member.counts[VKP_SUB_SHARD] > 0;
    if (!vkp_i_local_arity(local, argc, 1, 2, argv)) {
        return;
    }
    vkp_resp_writer_init(&writer, local->shard->relay->env);
    if (subscribed && local->member.protocol == 2) {
        vkp_resp_put_aggregate(&writer, VKP_RESP_ARRAY, 2);
        vkp_resp_put_bulk(&writer, "pong", 4);
        vkp_resp_put_bulk(&writer, argc > 1 ? argv[1].ptr : "", argc > 1 ? argv[1].len : 0);
    } else if (argc > 1) {
        vkp_resp_put_bulk(&writer, argv[1].ptr, argv[1].len);
    } else {
        vkp_i_local_answer_static(local, "+PONG\r\n");
        return;
    }
    vkp_i_local_answer_writer(local, &writer);
}

static void vkp_i_run_echo(vkp_i_local *local, size_t argc, const vkp_str *argv)
{
    vkp_resp_writer writer;
    if (vkp_i_local_arity(local, argc, 2, 2, argv)) {
        vkp_resp_writer_init(&writer, local->shard->relay->env);
        vkp_resp_put_bulk(&writer, argv[1].ptr, argv[1].len);
        vkp_i_local_answer_writer(local, &writer);
    }
}

#define VKP_I_PROTOCOL_DIGITS 19 /* HELLO's version is an integer only with fewer digits */

static const char vkp_i_no_auth[] =
    "ERR this relay stands alone and takes no passwords: its socket's permissions decide who may "
    "connect";

/* Read HELLO's version into *protocol, which is unchanged without one. False: an error was
   answered.                                                                                   */
static bool vkp_i_hello_version(vkp_i_local *local, size_t argc, const vkp_str *argv, int *protocol)
{
    bool number;
    size_t i;
    if (argc < 2) {
        return true;
    }
    if (argv[1].len == 1 && (argv[1].ptr[0] == '2' || argv[1].ptr[0] == '3')) {
        *protocol = argv[1].ptr[0] - '0';
        return true;
    }
    number = argv[1].len > 0 && argv[1].len < VKP_I_PROTOCOL_DIGITS;
    for (i = 0; i < argv[1].len; i++) {
        number = number && argv[1].ptr[i] >= '0' && argv[1].ptr[i] <= '9';
    }
    vkp_i_local_error(local, "%s",
                      number ? "NOPROTO unsupported protocol version"
                             : "ERR Protocol version is not an integer or out of range");
    return false;
}

/* HELLO [protocol [AUTH user password] [SETNAME name]]: the relay greets. A login goes to the
   server over the client's own connection first.                                              */
static void vkp_i_run_hello(vkp_i_local *local, size_t argc, const vkp_str *argv)
{
    int protocol = local->member.protocol;
    vkp_str name = vkp_i_str(NULL, 0);
    const vkp_str *login = NULL;
    size_t i = 2;
    if (!vkp_i_hello_version(local, argc, argv, &protocol)) {
        return;
    }
    while (i < argc) {
        if (vkp_i_str_is(argv[i], "SETNAME") && i + 1 < argc) {
            name = argv[i + 1];
            i += 2;
        } else if (vkp_i_str_is(argv[i], "AUTH") && i + 2 < argc) {
            login = &argv[i + 1];
            i += 3;
        } else {
            vkp_i_local_error(local, "ERR Syntax error in HELLO option '%.*s'",
                              VKP_I_SHORT(argv[i]));
            return;
        }
    }
    if (login != NULL && vkp_i_local_has_key(local, login[0], login[1])) {
        local->flags &= ~VKP_I_LOCAL_LOCKED;
        login = NULL;
    }
    if (login != NULL && local->session == NULL) {
        vkp_i_local_error(local, "%s", vkp_i_no_auth);
    } else if (name.ptr == NULL || vkp_i_local_set_name(local, name)) {
        if (local->session != NULL) {
            vkp_i_session_greet(local->session, protocol, login);
        }
        if (login == NULL) {
            local->member.protocol = protocol;
            vkp_i_local_greet(local);
        }
    }
}

static void vkp_i_run_auth(vkp_i_local *local, size_t argc, const vkp_str *argv)
{
    (void)argc;
    (void)argv;
    vkp_i_local_error(local, "%s", vkp_i_no_auth);
}

/* SELECT 0 and UNWATCH of a client that shares: its connection is in this state. */
static void vkp_i_run_nothing(vkp_i_local *local, size_t argc, const vkp_str *argv)
{
    (void)argc;
    (void)argv;
    vkp_i_local_answer_static(local, "+OK\r\n");
}

static void vkp_i_multi_free(vkp_i_local *local)
{
    const vkp_env *env = local->shard->relay->env;
    vkp_i_multi *multi = local->multi;
    if (multi != NULL) {
        vkp_resp_writer_deinit(&multi->block);
        vkp_i_free(env, multi->shapes, multi->capacity);
        vkp_i_free(env, multi, sizeof *multi);
        local->multi = NULL;
    }
}

/* A command was refused: the transaction, if there is one, must not be executed without it. */
static void vkp_i_multi_fail(vkp_i_local *local)
{
    if (local->multi != NULL) {
        local->multi->failed = true;
    } else if (local->session != NULL) {
        vkp_i_session_fail_multi(local->session);
    }
}

/* RESET: forget MULTI, subscriptions, name, protocol and connection of this client. */
static void vkp_i_run_reset(vkp_i_local *local, size_t argc, const vkp_str *argv)
{
    if (!vkp_i_local_arity(local, argc, 1, 1, argv)) {
        vkp_i_multi_fail(local);
        return;
    }
    vkp_i_multi_free(local);
    vkp_i_local_leave_all(local);
    vkp_i_local_end_session(local);
    (void)vkp_i_local_set_name(local, vkp_i_str(NULL, 0));
    local->member.protocol = 2;
    vkp_i_local_lock(local);
    vkp_i_local_answer_static(local, "+RESET\r\n");
}

static void vkp_i_run_quit(vkp_i_local *local, size_t argc, const vkp_str *argv)
{
    (void)argc;
    (void)argv;
    vkp_i_local_answer_static(local, "+OK\r\n");
    vkp_conn_drain(local->member.conn);
}

static void vkp_i_local_forward_command(vkp_i_local *local, size_t argc, const vkp_str *argv,
                                        uint32_t shape);

/* Whether the client is in a transaction. */
static bool vkp_i_local_in_multi(const vkp_i_local *local)
{
    return local->multi != NULL || (local->session != NULL && local->session->multi_sent);
}

/* Whether CLIENT's subcommand is about the local client itself, in a form that servers accept: for
   others each server has words of its own.                                                    */
static bool vkp_i_client_runs_here(size_t argc, const vkp_str *argv)
{
    static const struct {
        const char *name;
        size_t argc;
    } own[] = {{"ID", 2}, {"SETNAME", 3}, {"GETNAME", 2}, {"INFO", 2}};
    size_t i;
    for (i = 0; i < sizeof own / sizeof own[0] && argc > 1; i++) {
        if (vkp_i_str_is(argv[1], own[i].name)) {
            return argc == own[i].argc;
        }
    }
    if (argc == 4 && vkp_i_str_is(argv[1], "SETINFO")) {
        return (vkp_i_str_is(argv[2], "LIB-NAME") || vkp_i_str_is(argv[2], "LIB-VER")) &&
               vkp_i_is_client_name(argv[3]);
    }
    return vkp_i_errand_is_one(argc, argv);
}

static void vkp_i_local_forward_errand(vkp_i_local *local, size_t argc, const vkp_str *argv);

/* CLIENT with a subcommand about the local client itself; stand-alone with any. */
static void vkp_i_run_client(vkp_i_local *local, size_t argc, const vkp_str *argv)
{
    vkp_resp_writer writer;
    if (!vkp_i_local_arity(local, argc, 2, SIZE_MAX, argv)) {
        return;
    }
    if (vkp_i_errand_is_one(argc, argv)) {
        vkp_i_local_send_errand(local, argc, argv, vkp_i_local_forward_errand);
        return;
    }
    vkp_resp_writer_init(&writer, local->shard->relay->env);
    if (vkp_i_str_is(argv[1], "ID") && argc == 2) {
        vkp_resp_put_integer(&writer, (int64_t)(VKP_I_FIRST_ID + local->id));
        vkp_i_local_answer_writer(local, &writer);
    } else if (vkp_i_str_is(argv[1], "SETNAME") && argc == 3) {
        if (vkp_i_local_set_name(local, argv[2])) {
            if (local->session != NULL) {
                vkp_i_session_name(local->session);
            }
            vkp_i_local_answer_static(local, "+OK\r\n");
        }
    } else if (vkp_i_str_is(argv[1], "GETNAME") && argc == 2) {
        if (local->name != NULL) {
            vkp_i_put_text(&writer, local->name);
        } else {
            vkp_resp_put_raw(&writer, local->member.protocol == 3 ? "_\r\n" : "$-1\r\n",
                             local->member.protocol == 3 ? 3 : 5);
        }
        vkp_i_local_answer_writer(local, &writer);
    } else if (vkp_i_str_is(argv[1], "SETINFO") && argc == 4) {
        vkp_i_local_answer_static(local, "+OK\r\n"); /* accepted and not stored */
    } else if (vkp_i_str_is(argv[1], "INFO") && argc == 2) {
        vkp_i_local_client_info(local, local->session != NULL ? local->session->database : 0,
                                vkp_i_local_in_multi(local));
    } else {
        vkp_i_local_error(local, "ERR unknown subcommand or wrong number of arguments for '%.*s'",
                          VKP_I_SHORT(argv[1]));
    }
}

#define VKP_I_MOST_NAME_BYTES ((size_t)64 << 10)

static void vkp_i_run_subscribe(vkp_i_local *local, size_t argc, const vkp_str *argv)
{
    vkp_sub_kind kind = vkp_i_lower(argv[0].ptr[0]) == 'p'   ? VKP_SUB_PATTERN
                        : vkp_i_lower(argv[0].ptr[1]) == 's' ? VKP_SUB_SHARD
                                                             : VKP_SUB_CHANNEL;
    const uint32_t *counts = local->member.counts;
    size_t names = (size_t)counts[0] + counts[1] + counts[2];
    size_t most = local->shard->relay->max_subscriptions;
    size_t bytes = local->name_bytes;
    size_t i;
    if (!vkp_i_local_arity(local, argc, 2, SIZE_MAX, argv)) {
        return;
    }
    if (names > most || argc - 1 > most - names) {
        vkp_i_local_error(local, "ERR more than %zu subscriptions of one client", most);
        return;
    }
    for (i = 1; i < argc; i++) {
        if (argv[i].len > VKP_I_MOST_NAME_BYTES) {
            vkp_i_local_error(local, "ERR a name of more than %zu bytes", VKP_I_MOST_NAME_BYTES);
            return;
        }
        bytes += argv[i].len;
    }
    if (bytes > local->shard->relay->max_name_bytes) {
        vkp_i_local_error(local, "ERR more than %zu bytes of names of one client",
                          local->shard->relay->max_name_bytes);
        return;
    }
    vkp_i_local_subscribe(local, kind, argc - 1, argv + 1);
}

static void vkp_i_run_unsubscribe(vkp_i_local *local, size_t argc, const vkp_str *argv)
{
    char first = vkp_i_lower(argv[0].ptr[0]);
    vkp_sub_kind kind = first == 'p'   ? VKP_SUB_PATTERN
                        : first == 's' ? VKP_SUB_SHARD
                                       : VKP_SUB_CHANNEL;
    vkp_i_local_unsubscribe(local, kind, argc - 1, argv + 1);
}

#define VKP_I_SHARD_LAG ((size_t)64 << 20) /* capacity in bytes of a shard's channel of pushes */

/* Send a push to another shard's loop; without room it is lost and counted. Takes the push's
   reference.                                                                                  */
static void vkp_i_shard_forward(vkp_i_shard *shard, vkp_push *push)
{
    if (vkp_mpsc_try_send(shard->pushes, push) != VKP_OK) {
        (void)VKP_I_ADD(&shard->relay->lagged, (uint64_t)1);
        vkp_i_log(shard->relay->env, VKP_LOG_ERROR,
                  "a loop is %zu MiB behind: a message is lost for its clients",
                  VKP_I_SHARD_LAG >> 20);
        vkp_push_unref(push);
    }
}

/* PUBLISH and SPUBLISH, stand-alone: deliver to this shard's members, and send a push to each other
   shard.                                                                                      */
static void vkp_i_run_publish(vkp_i_local *local, size_t argc, const vkp_str *argv)
{
    vkp_i_shard *shard = local->shard;
    vkp_relay *relay = shard->relay;
    vkp_sub_kind kind = vkp_i_lower(argv[0].ptr[0]) == 's' ? VKP_SUB_SHARD : VKP_SUB_CHANNEL;
    vkp_resp_writer writer;
    size_t receivers;
    size_t i;
    if (!vkp_i_local_arity(local, argc, 3, 3, argv)) {
        return;
    }
    VKP_I_TALLY(shard->tally.messages_in, 1u);
    receivers = relay->shard_count > 1 ? vkp_i_subscribers_receivers(relay, kind, argv[1]) : 0;
    for (i = 0; i < relay->shard_count && receivers > 0; i++) {
        vkp_push push;
        if (&relay->shards[i] == shard) {
            continue;
        }
        memset(&push, 0, sizeof push);
        push.kind = kind == VKP_SUB_SHARD ? VKP_PUSH_SMESSAGE : VKP_PUSH_MESSAGE;
        push.sub = kind;
        vkp_resp_writer_init(&writer, relay->env);
        vkp_resp_put_raw(&writer, argv[1].ptr, argv[1].len);
        vkp_resp_put_raw(&writer, argv[2].ptr, argv[2].len);
        if (vkp_resp_writer_take(&writer, &push.frame) == VKP_OK) {
            push.channel = vkp_i_str(push.frame.data, argv[1].len);
            push.payload = vkp_i_str(push.frame.data + argv[1].len, argv[2].len);
            vkp_i_shard_forward(&relay->shards[i], &push);
        }
    }
    i = vkp_hub_publish(shard->hub, kind, argv[1], argv[2]);
    VKP_I_TALLY(shard->tally.deliveries, i);
    vkp_resp_writer_init(&writer, relay->env);
    vkp_resp_put_integer(&writer, (int64_t)(relay->shard_count > 1 ? receivers : i));
    vkp_i_local_answer_writer(local, &writer);
}

/* Write the subscribed names that match the pattern (NULL: all). The relay's mutex is held. */
static void vkp_i_put_channels(vkp_resp_writer *writer, vkp_relay *relay, vkp_sub_kind kind,
                               const vkp_str *pattern)
{
    vkp_i_map_node *node = NULL;
    size_t count = 0;
    while ((node = vkp_i_map_get_next(&relay->subscribers[kind], node)) != NULL) {
        count += pattern == NULL || vkp_glob_is_match(*pattern, node->key) ? 1u : 0u;
    }
    vkp_resp_put_aggregate(writer, VKP_RESP_ARRAY, count);
    while ((node = vkp_i_map_get_next(&relay->subscribers[kind], node)) != NULL) {
        if (pattern == NULL || vkp_glob_is_match(*pattern, node->key)) {
            vkp_resp_put_bulk(writer, node->key.ptr, node->key.len);
        }
    }
}

#define VKP_I_SHARD_PREFIX (sizeof "SHARD" - 1) /* of PUBSUB SHARDCHANNELS and SHARDNUMSUB */

/* PUBSUB, stand-alone: answered from the subscriber counts. */
static void vkp_i_run_pubsub(vkp_i_local *local, size_t argc, const vkp_str *argv)
{
    vkp_relay *relay = local->shard->relay;
    vkp_resp_writer writer;
    vkp_sub_kind kind;
    vkp_str what;
    bool known = true;
    size_t i;
    if (!vkp_i_local_arity(local, argc, 2, SIZE_MAX, argv)) {
        return;
    }
    kind = argv[1].len > VKP_I_SHARD_PREFIX &&
                   vkp_i_str_is(vkp_i_str(argv[1].ptr, VKP_I_SHARD_PREFIX), "SHARD")
               ? VKP_SUB_SHARD
               : VKP_SUB_CHANNEL;
    what = kind == VKP_SUB_SHARD
               ? vkp_i_str(argv[1].ptr + VKP_I_SHARD_PREFIX, argv[1].len - VKP_I_SHARD_PREFIX)
               : argv[1];
    vkp_resp_writer_init(&writer, relay->env);
    VKP_I_LOCK(&relay->mutex);
    if (vkp_i_str_is(what, "CHANNELS") && argc <= 3) {
        vkp_i_put_channels(&writer, relay, kind, argc == 3 ? &argv[2] : NULL);
    } else if (vkp_i_str_is(what, "NUMSUB")) {
        vkp_i_put_map(&writer, 2, argc - 2);
        for (i = 2; i < argc; i++) {
            vkp_resp_put_bulk(&writer, argv[i].ptr, argv[i].len);
            vkp_resp_put_integer(&writer, (int64_t)vkp_i_subscribers_count(relay, kind, argv[i]));
        }
    } else if (vkp_i_str_is(argv[1], "NUMPAT") && argc == 2) {
        vkp_resp_put_integer(&writer, (int64_t)relay->subscribers[VKP_SUB_PATTERN].count);
    } else {
        known = false;
    }
    VKP_I_UNLOCK(&relay->mutex);
    if (known) {
        vkp_i_local_answer_writer(local, &writer);
    } else {
        vkp_i_local_error(local, "ERR unknown subcommand or wrong number of arguments for '%.*s'",
                          VKP_I_SHORT(argv[1]));
    }
}

/* COMMAND and CONFIG, stand-alone: client libraries send them on connect. The answers are empty. */
static void vkp_i_run_command(vkp_i_local *local, size_t argc, const vkp_str *argv)
{
    vkp_resp_writer writer;
    vkp_resp_writer_init(&writer, local->shard->relay->env);
    if (argc > 1 && vkp_i_str_is(argv[1], "COUNT")) {
        vkp_resp_put_integer(&writer, 0);
    } else if ((argc > 1 && vkp_i_str_is(argv[1], "DOCS")) || vkp_i_str_is(argv[0], "CONFIG")) {
        vkp_i_put_map(&writer, local->member.protocol, 0);
    } else {
        vkp_resp_put_aggregate(&writer, VKP_RESP_ARRAY, 0);
    }
    vkp_i_local_answer_writer(local, &writer);
}

static void vkp_i_run_info(vkp_i_local *local, size_t argc, const vkp_str *argv)
{
    vkp_relay *relay = local->shard->relay;
    char text[VKP_I_INFO_TEXT];
    vkp_resp_writer writer;
    (void)argc;
    (void)argv;
    (void)snprintf(text, sizeof text,
                   "# Server\r\nvalkey_push_version:%s\r\nredis_mode:standalone\r\n"
                   "# Clients\r\nconnected_clients:%llu\r\n# Persistence\r\nloading:0\r\n",
                   VKP_VERSION_STR, (unsigned long long)vkp_i_relay_count_clients(relay));
    vkp_resp_writer_init(&writer, relay->env);
    vkp_i_put_text(&writer, text);
    vkp_i_local_answer_writer(local, &writer);
}

/* ---- MULTI ---- */

/* MULTI: hold the commands that follow until EXEC. */
static void vkp_i_run_multi(vkp_i_local *local, size_t argc, const vkp_str *argv)
{
    const vkp_env *env = local->shard->relay->env;
    vkp_str verb = vkp_str_of("MULTI");
    if (!vkp_i_relay_has_server(local->shard->relay)) {
        vkp_i_local_error(local, "ERR MULTI needs an upstream server: this relay stands alone");
        return;
    }
    if (!vkp_i_local_arity(local, argc, 1, 1, argv)) {
        vkp_i_multi_fail(local);
        return;
    }
    if (local->multi != NULL) {
        vkp_i_local_error(local, "ERR MULTI calls can not be nested");
        return;
    }
    local->multi = (vkp_i_multi *)vkp_i_alloc_zero(env, sizeof *local->multi);
    if (local->multi == NULL) {
        vkp_i_local_fail(local);
        return;
    }
    vkp_resp_writer_init(&local->multi->block, env);
    vkp_i_put_command(&local->multi->block, 1, &verb);
    vkp_i_local_answer_static(local, "+OK\r\n");
}

static void vkp_i_run_discard(vkp_i_local *local, size_t argc, const vkp_str *argv)
{
    if (!vkp_i_local_arity(local, argc, 1, 1, argv)) {
        vkp_i_multi_fail(local);
        return;
    }
    if (local->multi == NULL) {
        vkp_i_local_error(local, "ERR DISCARD without MULTI");
        return;
    }
    vkp_i_multi_free(local);
    vkp_i_local_answer_static(local, "+OK\r\n");
}

/* EXEC: send MULTI, the held commands and EXEC upstream in one piece; only the last reply is the
   answer.                                                                                     */
static void vkp_i_run_exec(vkp_i_local *local, size_t argc, const vkp_str *argv)
{
    vkp_i_multi *multi = local->multi;
    vkp_str verb = vkp_str_of("EXEC");
    vkp_i_answer *answer;
    vkp_bytes block;
    uint32_t replies;
    if (!vkp_i_local_arity(local, argc, 1, 1, argv)) {
        vkp_i_multi_fail(local);
        return;
    }
    if (multi == NULL) {
        vkp_i_local_error(local, "ERR EXEC without MULTI");
        return;
    }
    if (multi->failed) {
        vkp_i_multi_free(local);
        vkp_i_local_error(local, "EXECABORT Transaction discarded because of previous errors.");
        return;
    }
    vkp_i_put_command(&multi->block, 1, &verb);
    replies = (uint32_t)multi->count + 2;
    answer = vkp_i_answer_new(local, multi->count);
    if (answer == NULL || vkp_resp_writer_take(&multi->block, &block) != VKP_OK) {
        vkp_i_local_fail(local);
        vkp_i_multi_free(local);
        if (answer != NULL) { /* return the answer, which frees it: the connection closes later */
            vkp_i_answer_return(&answer->task);
        }
        return;
    }
    if (multi->count > 0) {
        memcpy(answer + 1, multi->shapes, multi->count);
    }
    vkp_i_multi_free(local);
    vkp_i_local_forward(local, answer, &block, replies);
    vkp_bytes_unref(&block);
}

/* Hold a command until EXEC. */
static void vkp_i_multi_append(vkp_i_local *local, size_t argc, const vkp_str *argv, uint32_t shape)
{
    vkp_i_multi *multi = local->multi;
    const vkp_env *env = local->shard->relay->env;
    void *shapes = multi->shapes;
    size_t i;
    size_t bytes = multi->block.i_len;
    for (i = 0; i < argc; i++) {
        bytes += argv[i].len;
    }
    if (bytes > local->shard->relay->max_request_bytes) {
        multi->failed = true;
        vkp_i_local_error(local,
                          "ERR the transaction is larger than the relay's limit of %zu bytes",
                          local->shard->relay->max_request_bytes);
        return;
    }
    if (!vkp_i_grow(env, &shapes, &multi->capacity, multi->count + 1, 1)) {
        vkp_i_local_fail(local);
        return;
    }
    multi->shapes = (uint8_t *)shapes;
    multi->shapes[multi->count++] = (uint8_t)shape;
    vkp_i_put_command(&multi->block, argc, argv);
    vkp_i_local_answer_static(local, "+QUEUED\r\n");
}

/* ---- dispatch ---- */

/* Flags of the subscribe family. */
#define VKP_I_SUBS (VKP_I_CMD_LOCAL | VKP_I_CMD_ORDER | VKP_I_CMD_SUB2)
/* Flags of DISCARD, QUIT and RESET, which end a MULTI. */
#define VKP_I_HERE (VKP_I_CMD_LOCAL | VKP_I_CMD_ORDER | VKP_I_CMD_MULTI)

/* Sorted by name for vkp_i_command_find; every other command is the server's. */
static const vkp_i_command vkp_i_commands[] = {
    {"auth", vkp_i_run_auth, VKP_I_CMD_LOCAL},
    {"client", vkp_i_run_client, VKP_I_CMD_LOCAL},
    {"command", vkp_i_run_command, VKP_I_CMD_ALONE},
    {"config", vkp_i_run_command, VKP_I_CMD_ALONE},
    {"discard", vkp_i_run_discard, VKP_I_HERE},
    {"echo", vkp_i_run_echo, VKP_I_CMD_ALONE},
    {"exec", vkp_i_run_exec, VKP_I_CMD_LOCAL | VKP_I_CMD_MULTI},
    {"geopos", NULL, VKP_I_SHAPE_NULL_ELEMENTS},
    {"hello", vkp_i_run_hello, VKP_I_CMD_LOCAL | VKP_I_CMD_ORDER},
    {"hrandfield", NULL, VKP_I_SHAPE_FLAT},
    {"info", vkp_i_run_info, VKP_I_CMD_ALONE},
    {"lmpop", NULL, VKP_I_SHAPE_NULL_ARRAY},
    {"lpop", NULL, VKP_I_SHAPE_NULL_ARRAY},
    {"multi", vkp_i_run_multi, VKP_I_CMD_LOCAL | VKP_I_CMD_MULTI},
    {"ping", vkp_i_run_ping, VKP_I_CMD_ALONE | VKP_I_CMD_SUB2},
    {"psubscribe", vkp_i_run_subscribe, VKP_I_SUBS},
    {"publish", vkp_i_run_publish, VKP_I_CMD_ALONE},
    {"pubsub", vkp_i_run_pubsub, VKP_I_CMD_ALONE},
    {"punsubscribe", vkp_i_run_unsubscribe, VKP_I_SUBS},
    {"quit", vkp_i_run_quit, VKP_I_HERE | VKP_I_CMD_SUB2},
    {"reset", vkp_i_run_reset, VKP_I_HERE | VKP_I_CMD_SUB2},
    {"rpop", NULL, VKP_I_SHAPE_NULL_ARRAY},
    {"select", vkp_i_run_nothing, VKP_I_CMD_LOCAL},
    {"spublish", vkp_i_run_publish, VKP_I_CMD_ALONE},
    {"ssubscribe", vkp_i_run_subscribe, VKP_I_SUBS},
    {"subscribe", vkp_i_run_subscribe, VKP_I_SUBS},
    {"sunsubscribe", vkp_i_run_unsubscribe, VKP_I_SUBS},
    {"unsubscribe", vkp_i_run_unsubscribe, VKP_I_SUBS},
    {"unwatch", vkp_i_run_nothing, VKP_I_CMD_LOCAL},
    {"xpending", NULL, VKP_I_SHAPE_NULL_LAST},
    {"xread", NULL, VKP_I_SHAPE_PAIRS | VKP_I_SHAPE_NULL_ARRAY},
    {"xreadgroup", NULL, VKP_I_SHAPE_PAIRS | VKP_I_SHAPE_NULL_ARRAY},
    {"zdiff", NULL, VKP_I_SHAPE_FLAT},
    {"zinter", NULL, VKP_I_SHAPE_FLAT},
    {"zmpop", NULL, VKP_I_SHAPE_NULL_ARRAY},
    {"zpopmax", NULL, VKP_I_SHAPE_FLAT},
    {"zpopmin", NULL, VKP_I_SHAPE_FLAT},
    {"zrandmember", NULL, VKP_I_SHAPE_FLAT},
    {"zrange", NULL, VKP_I_SHAPE_FLAT},
    {"zrangebyscore", NULL, VKP_I_SHAPE_FLAT},
    {"zrank", NULL, VKP_I_SHAPE_NULL_ARRAY},
    {"zrevrange", NULL, VKP_I_SHAPE_FLAT},
    {"zrevrangebyscore", NULL, VKP_I_SHAPE_FLAT},
    {"zrevrank", NULL, VKP_I_SHAPE_NULL_ARRAY},
    {"zunion", NULL, VKP_I_SHAPE_FLAT}};

#define VKP_I_COMMAND_NAME 20 /* bytes of a buffer for any name in vkp_i_commands */

/* The command's entry in the table, case ignored, or NULL. */
static const vkp_i_command *vkp_i_command_find(vkp_str name)
{
    char key[VKP_I_COMMAND_NAME];
    size_t low = 0;
    size_t high = sizeof vkp_i_commands / sizeof vkp_i_commands[0];
    size_t i;
    if (name.len == 0 || name.len >= sizeof key) {
        return NULL;
    }
    for (i = 0; i < name.len; i++) {
        key[i] = vkp_i_lower(name.ptr[i]);
    }
    key[name.len] = '\0';
    while (low < high) {
        size_t middle = (low + high) / 2;
        int order = strcmp(key, vkp_i_commands[middle].name);
        if (order == 0) {
            return &vkp_i_commands[middle];
        }
        if (order < 0) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return NULL;
}

/* The shape of this call: LPOP and RPOP have one only with a count, ZRANK and ZREVRANK only with
   WITHSCORE.                                                                                  */
static uint32_t vkp_i_command_shape(const vkp_i_command *command, size_t argc, const vkp_str *argv)
{
    uint32_t shape = command != NULL ? command->flags & VKP_I_CMD_SHAPES : 0;
    bool pop = vkp_i_str_is(argv[0], "LPOP") || vkp_i_str_is(argv[0], "RPOP");
    bool rank = vkp_i_str_is(argv[0], "ZRANK") || vkp_i_str_is(argv[0], "ZREVRANK");
    if (argc > 2 && vkp_i_str_is(argv[0], "PUBSUB")) {
        return vkp_i_str_is(argv[1], "NUMSUB")        ? VKP_I_SHAPE_NUMSUB
               : vkp_i_str_is(argv[1], "SHARDNUMSUB") ? VKP_I_SHAPE_SHARDNUMSUB
                                                      : 0;
    }
    return (pop && argc < 3) || (rank && argc < 4) ? 0 : shape;
}

/* What a relay refuses: it would end or stop the server for everybody, or make the relay a
   replica; and a CLIENT KILL that the relay's own connections fit.                            */
static const char *const vkp_i_denied[][2] = {
    {"CLIENT", "PAUSE"}, {"DEBUG", "SLEEP"}, {"FAILOVER", NULL}, {"PSYNC", NULL},
    {"REPLCONF", NULL},  {"SHUTDOWN", NULL}, {"SYNC", NULL}};

static bool vkp_i_command_is_denied(size_t argc, const vkp_str *argv)
{
    size_t i;
    for (i = 0; i < sizeof vkp_i_denied / sizeof vkp_i_denied[0]; i++) {
        if (vkp_i_str_is(argv[0], vkp_i_denied[i][0]) &&
            (vkp_i_denied[i][1] == NULL ||
             (argc > 1 && vkp_i_str_is(argv[1], vkp_i_denied[i][1])))) {
            return true;
        }
    }
    return vkp_i_kill_is_wide(argc, argv);
}

/* Whether the client may only change its subscriptions: as servers have it in RESP2. */
static bool vkp_i_local_only_subscribes(const vkp_i_local *local)
{
    return local->member.protocol == 2 &&
           vkp_i_local_sub_count(local, VKP_SUB_CHANNEL) + local->member.counts[VKP_SUB_SHARD] > 0;
}

static bool vkp_i_local_has_names(const vkp_i_local *local)
{
    const uint32_t *counts = local->member.counts;
    return counts[VKP_SUB_CHANNEL] + counts[VKP_SUB_PATTERN] + counts[VKP_SUB_SHARD] > 0;
}

/* Where a command goes. */
typedef enum vkp_i_route {
    VKP_I_ROUTE_HERE,    /* the relay answers */
    VKP_I_ROUTE_DENIED,  /* an error: not through a relay */
    VKP_I_ROUTE_SUB2,    /* an error: the client has subscriptions in RESP2 */
    VKP_I_ROUTE_MULTI,   /* an error: not in a transaction through a relay */
    VKP_I_ROUTE_UNKNOWN, /* an error: there is no server */
    VKP_I_ROUTE_HELD,    /* in a transaction: waits for EXEC */
    VKP_I_ROUTE_SHARED,  /* over a connection with the commands of others */
    VKP_I_ROUTE_PRIVATE  /* over the client's own one */
} vkp_i_route;

/* Whether MULTI, EXEC or DISCARD are about what the relay holds. A MULTI in a transaction and
   arguments are what servers refuse, each in its own words, and some end the transaction: they get
   it. A transaction that failed here stays here.                                              */
static bool vkp_i_local_holds_multi(const vkp_i_local *local, const vkp_i_command *command,
                                    size_t argc)
{
    bool refused = argc > 1 || (command->run == vkp_i_run_multi && local->multi != NULL);
    return !refused || (local->multi != NULL && local->multi->failed);
}

/* Whether the relay itself answers the command. */
static bool vkp_i_local_runs_here(const vkp_i_local *local, const vkp_i_command *command,
                                  size_t argc, const vkp_str *argv)
{
    bool shares = local->session == NULL;
    if (command == NULL || command->run == NULL) {
        return false;
    }
    if (!vkp_i_relay_has_server(local->shard->relay)) {
        return command->run != vkp_i_run_nothing;
    }
    if (command->run == vkp_i_run_ping) { /* otherwise the server says whether it is there */
        return vkp_i_local_only_subscribes(local);
    }
    if ((command->flags & VKP_I_CMD_LOCAL) == 0 || command->run == vkp_i_run_auth) {
        return false;
    }
    if (command->run == vkp_i_run_client) {
        return vkp_i_client_runs_here(argc, argv);
    }
    if (command->run == vkp_i_run_nothing) {
        return shares && local->multi == NULL &&
               (argc == 1 ? vkp_i_str_is(argv[0], "UNWATCH")
                          : argc == 2 && vkp_i_str_is(argv[1], "0"));
    }
    if (command->run == vkp_i_run_multi || command->run == vkp_i_run_exec ||
        command->run == vkp_i_run_discard) {
        return shares && vkp_i_local_holds_multi(local, command, argc);
    }
    return true;
}

static vkp_i_route vkp_i_local_route(const vkp_i_local *local, const vkp_i_command *command,
                                     size_t argc, const vkp_str *argv)
{
    const vkp_i_session *session = local->session;
    uint32_t flags = command != NULL ? command->flags : 0;
    bool subs = (flags & VKP_I_CMD_SUB2) != 0;
    if (vkp_i_relay_has_server(local->shard->relay) && vkp_i_command_is_denied(argc, argv)) {
        return VKP_I_ROUTE_DENIED;
    }
    if (vkp_i_local_in_tunnel(local) && !(subs && vkp_i_local_has_names(local))) {
        return VKP_I_ROUTE_PRIVATE;
    }
    if (!subs && vkp_i_local_only_subscribes(local)) {
        return VKP_I_ROUTE_SUB2;
    }
    if (vkp_i_local_runs_here(local, command, argc, argv)) {
        return !vkp_i_local_in_multi(local) || (flags & VKP_I_CMD_MULTI) != 0 ? VKP_I_ROUTE_HERE
                                                                              : VKP_I_ROUTE_MULTI;
    }
    if (!vkp_i_relay_has_server(local->shard->relay)) {
        return VKP_I_ROUTE_UNKNOWN;
    }
    if (session != NULL || !vkp_i_command_is_harmless(argc, argv)) {
        return local->multi != NULL && local->multi->failed ? VKP_I_ROUTE_HELD
                                                            : VKP_I_ROUTE_PRIVATE;
    }
    return local->multi != NULL ? VKP_I_ROUTE_HELD : VKP_I_ROUTE_SHARED;
}

/* Answer the error of a route; in a tunnel, where an answer has no place, the client leaves. */
static void vkp_i_local_refuse(vkp_i_local *local, vkp_i_route route, size_t argc,
                               const vkp_str *argv)
{
    if (vkp_i_local_in_tunnel(local)) {
        vkp_i_log(local->shard->relay->env, VKP_LOG_INFO,
                  "client %llu: '%.*s' is not for clients of a relay",
                  (unsigned long long)local->id, VKP_I_SHORT(argv[0]));
        vkp_i_local_pause(local, VKP_I_LOCAL_FAILED);
        vkp_i_local_maybe_resume(local);
        return;
    }
    if (route == VKP_I_ROUTE_SUB2) {
        vkp_i_local_error(local,
                          "ERR Can't execute '%s': only (P|S)SUBSCRIBE / "
                          "(P|S)UNSUBSCRIBE / PING / QUIT / RESET are allowed in this "
                          "context",
                          vkp_i_verb_of(argv[0]).text);
        return; /* as servers do: this error alone does not fail a MULTI */
    }
    if (route == VKP_I_ROUTE_UNKNOWN) {
        vkp_i_local_error(local,
                          "ERR unknown command '%.*s': this relay stands alone, a pub/sub "
                          "broker without a server",
                          VKP_I_SHORT(argv[0]));
    } else if (route == VKP_I_ROUTE_MULTI) {
        vkp_i_local_error(local, "DENIED '%.*s' inside MULTI: the relay answers it, not the server",
                          VKP_I_SHORT(argv[0]));
    } else {
        vkp_i_local_error(local, "DENIED '%.*s%s%.*s' is not for clients of a relay",
                          VKP_I_SHORT(argv[0]), argc > 1 ? " " : "",
                          (int)(argc > 1 ? VKP_I_MIN(argv[1].len, (size_t)VKP_I_SHORT_BYTES) : 0),
                          argc > 1 ? argv[1].ptr : "");
    }
    vkp_i_multi_fail(local);
}

/* Forward the bytes of one command upstream. */
static void vkp_i_local_forward_bytes(vkp_i_local *local, const vkp_bytes *request, uint32_t shape)
{
    vkp_i_answer *answer = vkp_i_answer_new(local, 0);
    if (answer != NULL) {
        answer->shape = (uint8_t)shape;
        vkp_i_local_forward(local, answer, request, 1);
    }
}

/* Encode one command and forward it upstream. */
static void vkp_i_local_forward_command(vkp_i_local *local, size_t argc, const vkp_str *argv,
                                        uint32_t shape)
{
    vkp_resp_writer writer;
    vkp_bytes request;
    vkp_resp_writer_init(&writer, local->shard->relay->env);
    vkp_i_put_command(&writer, argc, argv);
    if (vkp_resp_writer_take(&writer, &request) != VKP_OK) {
        vkp_i_local_fail(local);
        return;
    }
    vkp_i_local_forward_bytes(local, &request, shape);
    vkp_bytes_unref(&request);
}

/* ---- the short way of most commands ---- */

/* Whether the arguments decide where a command goes, or what its reply looks like in RESP2. */
static bool vkp_i_command_needs_arguments(vkp_str name)
{
    static const char *const names[] = {"CLIENT", "FUNCTION",   "LPOP",  "PUBSUB", "RPOP",
                                        "SCRIPT", "XREADGROUP", "XREAD", "ZRANK",  "ZREVRANK"};
    size_t i;
    for (i = 0; i < sizeof names / sizeof names[0]; i++) {
        if (vkp_i_str_is(name, names[i])) {
            return true;
        }
    }
    return false;
}

/* Find out about a command, by its name. */
static void vkp_i_plain_learn(vkp_i_plain *plain, vkp_str name)
{
    const vkp_i_command *command = vkp_i_command_find(name);
    memcpy(plain->name, name.ptr, name.len);
    plain->len = (uint8_t)name.len;
    plain->plain = !vkp_i_command_needs_arguments(name) && vkp_i_command_is_harmless(1, &name) &&
                   !vkp_i_command_is_denied(1, &name) &&
                   (command == NULL || (command->flags & VKP_I_CMD_LOCAL) == 0);
    plain->shape = command != NULL ? (uint8_t)(command->flags & VKP_I_CMD_SHAPES) : 0;
}

/* What is known of a command, or NULL: it takes the long way. */
static const vkp_i_plain *vkp_i_shard_get_plain(vkp_i_shard *shard, vkp_str name)
{
    vkp_i_plain *plain;
    size_t hash;
    if (name.len == 0 || name.len > VKP_I_PLAIN_NAME) {
        return NULL;
    }
    hash = name.len * 31u + (uint8_t)name.ptr[0] * 7u + (uint8_t)name.ptr[name.len / 2] * 3u +
           (uint8_t)name.ptr[name.len - 1];
    plain = &shard->plain[hash & (VKP_I_PLAIN_NAMES - 1)];
    if (plain->len != name.len || memcmp(plain->name, name.ptr, name.len) != 0) {
        vkp_i_plain_learn(plain, name);
    }
    return plain->plain ? plain : NULL;
}

/* Whether all that the client sends may be shared, as far as its own state goes. */
static bool vkp_i_local_is_plain(const vkp_i_local *local)
{
    return local->session == NULL && local->multi == NULL &&
           (local->flags & VKP_I_LOCAL_LOCKED) == 0 &&
           vkp_i_relay_has_server(local->shard->relay) && !vkp_i_local_only_subscribes(local);
}

/* Move a transaction that is held here to the client's own connection; the client has the answers
   already.                                                                                    */
static void vkp_i_local_move_multi(vkp_i_local *local)
{
    vkp_i_multi *multi = local->multi;
    vkp_bytes block;
    size_t count = multi->count + 1;
    if (vkp_resp_writer_take(&multi->block, &block) != VKP_OK) {
        vkp_i_local_fail(local);
    } else {
        vkp_i_session_begin_multi(local->session, &block, count);
        vkp_bytes_unref(&block);
    }
    vkp_i_multi_free(local);
}

/* There is no session for the command: an error; what depends on the command must not run. */
static void vkp_i_local_refuse_private(vkp_i_local *local, size_t argc, const vkp_str *argv)
{
    vkp_relay *relay = local->shard->relay;
    (void)VKP_I_ADD(&relay->privates_refused, (uint64_t)1);
    vkp_i_local_error(local, "DENIED '%.*s' needs a connection of its own, and %s",
                      VKP_I_SHORT(argv[0]),
                      relay->private_max == 0 ? "this relay opens none"
                                              : "all that this relay may open are in use");
    if (local->multi != NULL) {
        vkp_i_multi_fail(local); /* so that EXEC fails */
    } else if (vkp_i_command_is_state(argc, argv) || vkp_i_str_is(argv[0], "HELLO")) {
        vkp_i_local_pause(local, VKP_I_LOCAL_FAILED);
        vkp_i_local_maybe_resume(local);
    }
}

/* What vkp_i_local_need_session says. */
typedef enum vkp_i_need {
    VKP_I_NEED_MET,    /* local->session is logged in */
    VKP_I_NEED_WAITS,  /* it opens, or the client closes: on_data must get the bytes again */
    VKP_I_NEED_REFUSED /* an error was answered */
} vkp_i_need;

/* The command needs a session. */
static vkp_i_need vkp_i_local_need_session(vkp_i_local *local, size_t argc, const vkp_str *argv)
{
    vkp_status status = VKP_OK;
    if (local->session == NULL && local->answer_count > 0) {
        vkp_i_local_pause(local, VKP_I_LOCAL_ORDER); /* replies of both must not cross */
        return VKP_I_NEED_WAITS;
    }
    if (local->session == NULL) {
        status = vkp_i_local_open_session(local);
    }
    if (status == VKP_ERR_FULL) {
        vkp_i_local_refuse_private(local, argc, argv);
        return VKP_I_NEED_REFUSED;
    }
    if (status != VKP_OK) {
        vkp_i_local_fail(local);
    }
    return local->session != NULL && local->session->stage != VKP_I_SESSION_OPENING
               ? VKP_I_NEED_MET
               : VKP_I_NEED_WAITS;
}

/* Whether the command is sent when no reply is under way. A tunnel begins with CLIENT REPLY.
   Servers refuse SCRIPT DEBUG behind replies that are not sent yet, and redis 7.2 to valkey 8.1 do
   not answer a login that fails there.                                                        */
static bool vkp_i_command_is_alone(size_t argc, const vkp_str *argv)
{
    return vkp_i_str_is(argv[0], "AUTH") || vkp_i_str_is(argv[0], "HELLO") ||
           (argc > 1 && ((vkp_i_str_is(argv[0], "CLIENT") && vkp_i_str_is(argv[1], "REPLY")) ||
                         (vkp_i_str_is(argv[0], "SCRIPT") && vkp_i_str_is(argv[1], "DEBUG"))));
}

/* Whether the command has to wait for replies that are under way. The client is paused then. */
static bool vkp_i_local_waits_alone(vkp_i_local *local, size_t argc, const vkp_str *argv)
{
    bool waits = local->answer_count > 0 && vkp_i_command_is_alone(argc, argv);
    if (waits) {
        vkp_i_local_pause(local, VKP_I_LOCAL_ORDER);
    }
    return waits;
}

/* Send a command over the client's own connection. False: not now. */
static bool vkp_i_local_execute_private(vkp_i_local *local, size_t argc, const vkp_str *argv,
                                        const vkp_bytes *request)
{
    vkp_resp_writer writer;
    vkp_bytes copy;
    vkp_i_need need = vkp_i_local_need_session(local, argc, argv);
    if (need != VKP_I_NEED_MET) {
        return need == VKP_I_NEED_REFUSED;
    }
    if (local->multi != NULL) {
        vkp_i_local_move_multi(local);
    }
    if (vkp_i_local_waits_alone(local, argc, argv)) { /* of the transaction, or of the name */
        return false;
    }
    if (request != NULL) {
        vkp_i_session_ask(local->session, argc, argv, request);
        return true;
    }
    vkp_resp_writer_init(&writer, local->shard->relay->env);
    vkp_i_put_command(&writer, argc, argv);
    if (vkp_resp_writer_take(&writer, &copy) != VKP_OK) {
        vkp_i_local_fail(local);
        return true;
    }
    vkp_i_session_ask(local->session, argc, argv, &copy);
    vkp_bytes_unref(&copy);
    return true;
}

/* Send CLIENT KILL or CLIENT UNBLOCK to the server, which knows whom it is about. */
static void vkp_i_local_forward_errand(vkp_i_local *local, size_t argc, const vkp_str *argv)
{
    if (local->session != NULL) {
        (void)vkp_i_local_execute_private(local, argc, argv, NULL);
    } else {
        vkp_i_local_forward_command(local, argc, argv, 0);
    }
}

/* Answer a command here. False: not now. */
static bool vkp_i_local_execute_here(vkp_i_local *local, const vkp_i_command *command, size_t argc,
                                     const vkp_str *argv)
{
    vkp_str login[2];
    if (command->run == vkp_i_run_hello &&
        vkp_i_hello_get_login(argc, argv, &login[0], &login[1]) &&
        !vkp_i_local_has_key(local, login[0], login[1]) &&
        vkp_i_relay_has_server(local->shard->relay)) {
        vkp_i_need need = vkp_i_local_need_session(local, argc, argv);
        if (need != VKP_I_NEED_MET) {
            return need == VKP_I_NEED_REFUSED;
        }
        if (vkp_i_local_waits_alone(local, argc, argv)) {
            return false;
        }
    }
    VKP_I_TALLY(local->shard->tally.commands[command->run == vkp_i_run_subscribe ||
                                                     command->run == vkp_i_run_unsubscribe
                                                 ? VKP_RELAY_PUSH
                                                 : VKP_RELAY_HERE],
                1u);
    command->run(local, argc, argv);
    return true;
}

/* Whether the command has to wait until no answer is pending: what the relay answers by itself must
   not overtake what a server answers, and some commands change what later answers look like.  */
static bool vkp_i_local_must_wait(const vkp_i_local *local, vkp_i_route route, uint32_t flags,
                                  size_t argc, const vkp_str *argv)
{
    if (local->answer_count == 0) {
        return false;
    }
    if (route == VKP_I_ROUTE_PRIVATE) {
        return vkp_i_command_is_alone(argc, argv);
    }
    return local->session != NULL || (flags & VKP_I_CMD_ORDER) != 0;
}

/* Execute one command. request: its bytes if it arrived as a RESP array, otherwise NULL. False:
   not now; the client is paused, and on_data must get the bytes again.                        */
static bool vkp_i_local_execute(vkp_i_local *local, size_t argc, const vkp_str *argv,
                                const vkp_bytes *request)
{
    const vkp_i_plain *plain = request != NULL && vkp_i_local_is_plain(local)
                                   ? vkp_i_shard_get_plain(local->shard, argv[0])
                                   : NULL;
    const vkp_i_command *command;
    uint32_t flags;
    uint32_t shape;
    vkp_i_route route;
    if (plain != NULL) {
        vkp_i_local_forward_bytes(local, request, plain->shape);
        return true;
    }
    if (local->door->password.ptr != NULL && vkp_i_local_at_door(local, argc, argv)) {
        return true;
    }
    command = vkp_i_command_find(argv[0]);
    flags = command != NULL ? command->flags : 0;
    shape = vkp_i_command_shape(command, argc, argv);
    route = vkp_i_local_route(local, command, argc, argv);
    if (vkp_i_local_must_wait(local, route, flags, argc, argv)) {
        vkp_i_local_pause(local, VKP_I_LOCAL_ORDER);
        return false;
    }
    switch (route) {
    case VKP_I_ROUTE_HERE:
        return vkp_i_local_execute_here(local, command, argc, argv);
    case VKP_I_ROUTE_HELD:
        vkp_i_multi_append(local, argc, argv, shape);
        break;
    case VKP_I_ROUTE_SHARED:
        if (request != NULL) {
            vkp_i_local_forward_bytes(local, request, shape);
        } else {
            vkp_i_local_forward_command(local, argc, argv, shape);
        }
        break;
    case VKP_I_ROUTE_PRIVATE:
        return vkp_i_local_execute_private(local, argc, argv, request);
    case VKP_I_ROUTE_DENIED:
    case VKP_I_ROUTE_SUB2:
    case VKP_I_ROUTE_MULTI:
    case VKP_I_ROUTE_UNKNOWN:
        vkp_i_local_refuse(local, route, argc, argv);
        break;
    }
    return true;
}

#endif /* VKP_I_IO */
