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
    size_t i;
    for (i = 0; i < name.len; i++) {
        if (name.ptr[i] < '!' || name.ptr[i] > '~') {
            vkp_i_local_error(local, "ERR Client names cannot contain spaces, newlines or special "
                                     "characters.");
            return false;
        }
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

/* Answer HELLO. */
static void vkp_i_local_greet(vkp_i_local *local)
{
    vkp_resp_writer writer;
    vkp_resp_writer_init(&writer, local->shard->relay->env);
    vkp_i_put_map(&writer, local->member.protocol, 7);
    vkp_i_put_text(&writer, "server");
    vkp_i_put_text(&writer, "valkey-push-relay");
    vkp_i_put_text(&writer, "version");
    vkp_i_put_text(&writer, VKP_VERSION_STR);
    vkp_i_put_text(&writer, "proto");
    vkp_resp_put_integer(&writer, local->member.protocol);
    vkp_i_put_text(&writer, "id");
    vkp_resp_put_integer(&writer, (int64_t)local->id);
    vkp_i_put_text(&writer, "mode");
    vkp_i_put_text(&writer, "standalone");
    vkp_i_put_text(&writer, "role");
    vkp_i_put_text(&writer, "master");
    vkp_i_put_text(&writer, "modules");
    vkp_resp_put_aggregate(&writer, VKP_RESP_ARRAY, 0);
    vkp_i_local_answer_writer(local, &writer);
}

#define VKP_I_INFO_TEXT 320 /* bytes of the texts of CLIENT INFO and INFO, terminated */

/* Answer CLIENT INFO. */
static void vkp_i_local_client_info(vkp_i_local *local)
{
    char text[VKP_I_INFO_TEXT];
    vkp_resp_writer writer;
    const uint32_t *counts = local->member.counts;
    (void)snprintf(text, sizeof text,
                   "id=%llu fd=%d name=%.128s db=0 sub=%u psub=%u ssub=%u multi=%d resp=%d\n",
                   (unsigned long long)local->id, vkp_conn_get_fd(local->member.conn),
                   local->name != NULL ? local->name : "", (unsigned)counts[VKP_SUB_CHANNEL],
                   (unsigned)counts[VKP_SUB_PATTERN], (unsigned)counts[VKP_SUB_SHARD],
                   local->multi != NULL ? (int)local->multi->count : -1, local->member.protocol);
    vkp_resp_writer_init(&writer, local->shard->relay->env);
    vkp_i_put_text(&writer, text);
    vkp_i_local_answer_writer(local, &writer);
}

#endif /* VKP_I_IO */
