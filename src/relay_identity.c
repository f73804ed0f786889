#if VKP_I_IO
/* ======================================================================================
   >>impl-relay-identity   Relay: what a local client sees of itself
   ======================================================================================
   Names, the answer to HELLO, CLIENT INFO. The relay answers these itself: a local client is a
   client of the relay, whatever connections carry its commands. Loop's thread.                */

/* Set the client's name: printable bytes without blanks, as servers require; empty removes it.
   False: an error was answered, or no memory.                                                 */
static bool vkp_i_local_set_name(vkp_i_local *local, vkp_str name)
{
    const vkp_env *env = local->shard->relay->env;
    char *copy = NULL;
    if (!vkp_i_is_client_name(name)) {
        vkp_i_local_error(local, "ERR Client names cannot contain spaces, newlines or special "
                                 "characters.");
        return false;
    }
    if (name.len > 0) {
        copy = (char *)vkp_i_alloc(env, name.len + 1);
        if (copy == NULL) {
            vkp_i_local_fail(local);
            return false;
        }
        memcpy(copy, name.ptr, name.len);
        copy[name.len] = '\0';
    }
    vkp_i_free_text(env, local->name);
    local->name = copy;
    return true;
}

/* Begin a map; in RESP2 an array of twice the elements. */
static void vkp_i_put_map(vkp_resp_writer *writer, int protocol, size_t pairs)
{
    if (protocol == 3) {
        vkp_resp_put_aggregate(writer, VKP_RESP_MAP, pairs);
    } else {
        vkp_resp_put_aggregate(writer, VKP_RESP_ARRAY, pairs * 2);
    }
}

static void vkp_i_put_text(vkp_resp_writer *writer, const char *text)
{
    vkp_resp_put_bulk(writer, text, strlen(text));
}

/* Whether a key of HELLO's answer is one of the two that each client has of its own. */
static bool vkp_i_is_own_key(const vkp_value *key)
{
    return vkp_value_is_text(key, vkp_str_of("proto")) || vkp_value_is_text(key, vkp_str_of("id"));
}

/* Keep the server's answer to HELLO for clients of one protocol. */
static vkp_status vkp_i_greeting_make(const vkp_env *env, const vkp_value *hello, int protocol,
                                      vkp_i_greeting *greeting)
{
    vkp_resp_writer writers[2]; /* before the client's own keys, behind them */
    const vkp_value *key;
    const vkp_value *value;
    size_t pairs = 2;
    size_t at = 0;
    vkp_status status;
    for (key = vkp_value_get_first(hello); key != NULL; key = vkp_value_get_next(hello, value)) {
        value = vkp_value_get_next(hello, key);
        pairs += value == NULL || vkp_i_is_own_key(key) ? 0u : 1u;
    }
    vkp_resp_writer_init(&writers[0], env);
    vkp_resp_writer_init(&writers[1], env);
    vkp_i_put_map(&writers[0], protocol, pairs);
    for (key = vkp_value_get_first(hello); key != NULL; key = vkp_value_get_next(hello, value)) {
        value = vkp_value_get_next(hello, key);
        if (vkp_i_is_own_key(key)) {
            at = 1;
        } else if (value != NULL) {
            vkp_resp_put_value(&writers[at], key, protocol);
            vkp_resp_put_value(&writers[at], value, protocol);
        }
    }
    status = vkp_resp_writer_take(&writers[0], &greeting->before);
    if (status == VKP_OK) {
        status = vkp_resp_writer_take(&writers[1], &greeting->after);
        if (status != VKP_OK) {
            vkp_bytes_unref(&greeting->before);
        }
    } else {
        vkp_resp_writer_deinit(&writers[1]);
    }
    return status;
}

/* The server answered HELLO, on loop 0: so will the relay. Without memory the answer stays as it
   was. */
static void vkp_i_relay_on_hello(void *user, const vkp_value *hello)
{
    vkp_relay *relay = (vkp_relay *)user;
    int i;
    for (i = 0; i < 2; i++) {
        vkp_i_greeting made;
        vkp_i_greeting old;
        if (vkp_i_greeting_make(relay->env, hello, i + 2, &made) == VKP_OK) {
            VKP_I_LOCK(&relay->mutex);
            old = relay->greetings[i];
            relay->greetings[i] = made;
            VKP_I_UNLOCK(&relay->mutex);
            vkp_bytes_unref(&old.before);
            vkp_bytes_unref(&old.after);
        }
    }
}

/* Answer HELLO: as the server did, or where it never has, in the relay's own name. */
static void vkp_i_local_greet(vkp_i_local *local)
{
    vkp_relay *relay = local->shard->relay;
    int protocol = local->member.protocol;
    vkp_i_greeting greeting;
    vkp_resp_writer writer;
    VKP_I_LOCK(&relay->mutex);
    greeting.before = vkp_bytes_ref(&relay->greetings[protocol - 2].before);
    greeting.after = vkp_bytes_ref(&relay->greetings[protocol - 2].after);
    VKP_I_UNLOCK(&relay->mutex);
    vkp_resp_writer_init(&writer, relay->env);
    if (greeting.before.len > 0) {
        vkp_resp_put_raw(&writer, greeting.before.data, greeting.before.len);
    } else {
        vkp_i_put_map(&writer, protocol, 7);
        vkp_i_put_text(&writer, "server");
        vkp_i_put_text(&writer, "valkey-push-relay");
        vkp_i_put_text(&writer, "version");
        vkp_i_put_text(&writer, VKP_VERSION_STR);
    }
    vkp_i_put_text(&writer, "proto");
    vkp_resp_put_integer(&writer, protocol);
    vkp_i_put_text(&writer, "id");
    vkp_resp_put_integer(&writer, (int64_t)(VKP_I_FIRST_ID + local->id));
    if (greeting.before.len > 0) {
        vkp_resp_put_raw(&writer, greeting.after.data, greeting.after.len);
    } else {
        vkp_i_put_text(&writer, "mode");
        vkp_i_put_text(&writer, "standalone");
        vkp_i_put_text(&writer, "role");
        vkp_i_put_text(&writer, "master");
        vkp_i_put_text(&writer, "modules");
        vkp_resp_put_aggregate(&writer, VKP_RESP_ARRAY, 0);
    }
    vkp_bytes_unref(&greeting.before);
    vkp_bytes_unref(&greeting.after);
    vkp_i_local_answer_writer(local, &writer);
}

#define VKP_I_INFO_TEXT 700 /* bytes of the texts of CLIENT INFO and INFO, terminated */

/* Answer CLIENT INFO with the fields of all servers; what the relay does not know is as of an idle
   client. */
static void vkp_i_local_client_info(vkp_i_local *local, uint32_t database, bool in_multi)
{
    char text[VKP_I_INFO_TEXT];
    char head[32];
    vkp_resp_writer writer;
    const uint32_t *counts = local->member.counts;
    bool subscribed = counts[0] + counts[1] + counts[2] > 0;
    uint64_t age_ns = vkp_i_loop_now(local->shard->loop) - local->opened_ns;
    (void)snprintf(text, sizeof text,
                   "id=%llu addr=?:0 laddr=?:0 fd=%d name=%.128s age=%llu idle=0 flags=%s capa= "
                   "db=%u sub=%u psub=%u ssub=%u multi=%d watch=0 qbuf=0 qbuf-free=0 argv-mem=0 "
                   "multi-mem=0 rbs=0 rbp=0 obl=0 oll=0 omem=0 tot-mem=0 events=r "
                   "cmd=client|info user=default redir=-1 resp=%d lib-name= lib-ver= io-thread=0 "
                   "tot-net-in=0 tot-net-out=0 tot-cmds=0\n",
                   (unsigned long long)(VKP_I_FIRST_ID + local->id),
                   vkp_conn_get_fd(local->member.conn), local->name != NULL ? local->name : "",
                   (unsigned long long)(age_ns / VKP_I_NS_PER_MS / 1000),
                   subscribed ? "P"
                   : in_multi ? "x"
                              : "N",
                   (unsigned)database, (unsigned)counts[VKP_SUB_CHANNEL],
                   (unsigned)counts[VKP_SUB_PATTERN], (unsigned)counts[VKP_SUB_SHARD],
                   local->multi != NULL ? (int)local->multi->count : -1, local->member.protocol);
    vkp_resp_writer_init(&writer, local->shard->relay->env);
    if (local->member.protocol == 3) { /* a verbatim string, as servers have it */
        (void)snprintf(head, sizeof head, "=%zu\r\ntxt:", strlen(text) + 4);
        vkp_resp_put_raw(&writer, head, strlen(head));
        vkp_resp_put_raw(&writer, text, strlen(text));
        vkp_resp_put_raw(&writer, "\r\n", 2);
    } else {
        vkp_i_put_text(&writer, text);
    }
    vkp_i_local_answer_writer(local, &writer);
}

#endif /* VKP_I_IO */
