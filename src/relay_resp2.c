#if VKP_I_IO
/* ======================================================================================
   >>impl-relay-resp2   Relay: replies for clients of RESP2
   ======================================================================================
   The upstream connection speaks RESP3 (RESP2 only when the server has no RESP3). A reply whose
   bytes mean the same in the client's protocol is shared without a copy, and only its end is looked
   for; another one is read and converted on loop 0, when it arrives. The shape of a command
   (VKP_I_SHAPE_*) describes where a server's RESP2 reply differs from a plain conversion of the
   types.
   vkp_i_local_forward runs on the local client's loop and hands the command and its answer to
   the upstream client. vkp_i_answer_on_reply runs on loop 0 and returns the answer as a task;
   vkp_i_answer_return runs on the local client's loop again. In between only loop
   0 touches the reply; of the local client loop 0 reads `shard` alone.                        */

/* ---- conversion of replies ---- */

/* Whether the bytes of a whole reply mean the same in RESP2. */
static bool vkp_i_frame_is_resp2(const vkp_bytes *frame)
{
    size_t at = 0;
    while (at < frame->len) {
        uint64_t elements;
        size_t seen = 0;
        if (memchr("+-:$*", frame->data[at], 5) == NULL) {
            return false;
        }
        at = vkp_i_skip_head(frame->data, frame->len, at, &seen, &elements);
        if (at == 0) {
            return false; /* not the case in a whole frame */
        }
    }
    return true;
}

/* Whether the reply is a null as RESP2 has it. */
static bool vkp_i_frame_is_null2(const vkp_bytes *frame)
{
    return frame->len == 5 && (frame->data[0] == '$' || frame->data[0] == '*') &&
           frame->data[1] == '-';
}

/* Write an array of pairs as one flat array. */
static void vkp_i_put_flat(vkp_resp_writer *writer, const vkp_value *value)
{
    const vkp_value *each;
    const vkp_value *inner;
    size_t count = 0;
    for (each = vkp_value_get_first(value); each != NULL; each = vkp_value_get_next(value, each)) {
        count += each->type == VKP_RESP_ARRAY ? each->len : 1;
    }
    vkp_resp_put_aggregate(writer, VKP_RESP_ARRAY, count);
    for (each = vkp_value_get_first(value); each != NULL; each = vkp_value_get_next(value, each)) {
        if (each->type != VKP_RESP_ARRAY) {
            vkp_resp_put_value(writer, each, 2);
            continue;
        }
        for (inner = vkp_value_get_first(each); inner != NULL;
             inner = vkp_value_get_next(each, inner)) {
            vkp_resp_put_value(writer, inner, 2);
        }
    }
}

static void vkp_i_put_resp2(vkp_resp_writer *writer, const vkp_value *value, uint32_t shape);

/* Write the map of XREAD as an array of pairs: a stream's name and its entries. A deleted entry
   has a null array for its fields.                                                            */
static void vkp_i_put_pairs(vkp_resp_writer *writer, const vkp_value *value)
{
    const vkp_value *entry;
    const vkp_value *each = vkp_value_get_first(value);
    vkp_resp_put_aggregate(writer, VKP_RESP_ARRAY, value->len / 2);
    while (each != NULL) {
        const vkp_value *second = vkp_value_get_next(value, each);
        if (second == NULL) {
            break; /* a map has pairs */
        }
        vkp_resp_put_aggregate(writer, VKP_RESP_ARRAY, 2);
        vkp_resp_put_value(writer, each, 2);
        vkp_resp_put_aggregate(writer, VKP_RESP_ARRAY, second->len);
        for (entry = vkp_value_get_first(second); entry != NULL;
             entry = vkp_value_get_next(second, entry)) {
            vkp_i_put_resp2(writer, entry, VKP_I_SHAPE_NULL_LAST);
        }
        each = vkp_value_get_next(value, second);
    }
}

/* Write a RESP3 reply as the server would have written it to a RESP2 client. */
static void vkp_i_put_resp2(vkp_resp_writer *writer, const vkp_value *value, uint32_t shape)
{
    const vkp_value *each;
    if (value->type == VKP_RESP_NULL && (shape & VKP_I_SHAPE_NULL_ARRAY) != 0) {
        vkp_resp_put_raw(writer, "*-1\r\n", 5);
    } else if (value->type == VKP_RESP_ARRAY && (shape & VKP_I_SHAPE_FLAT) != 0) {
        vkp_i_put_flat(writer, value);
    } else if (value->type == VKP_RESP_MAP && (shape & VKP_I_SHAPE_PAIRS) != 0) {
        vkp_i_put_pairs(writer, value);
    } else if (value->type == VKP_RESP_ARRAY && (shape & VKP_I_SHAPE_NULL_ELEMENTS) != 0) {
        vkp_resp_put_aggregate(writer, VKP_RESP_ARRAY, value->len);
        for (each = vkp_value_get_first(value); each != NULL;
             each = vkp_value_get_next(value, each)) {
            vkp_i_put_resp2(writer, each, VKP_I_SHAPE_NULL_ARRAY);
        }
    } else if (value->type == VKP_RESP_ARRAY && (shape & VKP_I_SHAPE_NULL_LAST) != 0) {
        vkp_resp_put_aggregate(writer, VKP_RESP_ARRAY, value->len);
        for (each = vkp_value_get_first(value); each != NULL;
             each = vkp_value_get_next(value, each)) {
            bool last = vkp_value_get_next(value, each) == NULL;
            vkp_i_put_resp2(writer, each, last ? VKP_I_SHAPE_NULL_ARRAY : 0);
        }
    } else {
        vkp_resp_put_value(writer, value, 2);
    }
}

/* Write the reply of an EXEC: each element by the shape of its command. */
static void vkp_i_put_exec2(vkp_resp_writer *writer, const vkp_value *value, const uint8_t *shapes,
                            size_t count)
{
    const vkp_value *each;
    size_t i = 0;
    vkp_resp_put_aggregate(writer, VKP_RESP_ARRAY, value->len);
    for (each = vkp_value_get_first(value); each != NULL; each = vkp_value_get_next(value, each)) {
        vkp_i_put_resp2(writer, each, i < count ? shapes[i] : 0u);
        i++;
    }
}

/* Write PUBSUB NUMSUB: the relay, which the server counts once, is its local clients. */
static void vkp_i_put_numsub(vkp_resp_writer *writer, vkp_relay *relay, vkp_sub_kind kind,
                             const vkp_value *value)
{
    const vkp_value *each = vkp_value_get_first(value);
    vkp_resp_put_aggregate(writer, VKP_RESP_ARRAY, value->len);
    while (each != NULL) {
        const vkp_value *count = vkp_value_get_next(value, each);
        vkp_resp_put_value(writer, each, 2);
        if (count != NULL && count->type == VKP_RESP_INTEGER) {
            int64_t own;
            VKP_I_LOCK(&relay->mutex);
            own = (int64_t)vkp_i_subscribers_count(relay, kind, vkp_value_get_str(each));
            VKP_I_UNLOCK(&relay->mutex);
            vkp_resp_put_integer(writer, own > 0 && count->u.integer > 0
                                             ? count->u.integer - 1 + own
                                             : count->u.integer);
        } else if (count != NULL) {
            vkp_resp_put_value(writer, count, 2);
        }
        each = count != NULL ? vkp_value_get_next(value, count) : NULL;
    }
}

/* Whether the reply's bytes are the answer as they are. */
static bool vkp_i_answer_fits(const vkp_i_answer *answer, const vkp_bytes *frame)
{
    if (answer->shape & (VKP_I_SHAPE_NUMSUB | VKP_I_SHAPE_SHARDNUMSUB)) {
        return false;
    }
    return answer->protocol == 3
               ? !vkp_i_frame_is_null2(frame) && frame->data[0] != '|'
               : answer->shape == 0 && answer->shape_count == 0 && vkp_i_frame_is_resp2(frame);
}

/* The reply in the local client's protocol: shares the received bytes where they mean the same, and
   has no look at them then; otherwise it is read, within the limits of the relay's reader, and
   converted. Loop 0. LIMIT or PROTOCOL: the reader refuses it.                                */
static vkp_status vkp_i_answer_convert(const vkp_i_answer *answer, const vkp_bytes *frame,
                                       vkp_bytes *out)
{
    vkp_relay *relay = answer->local->shard->relay;
    uint8_t numsub = answer->shape & (VKP_I_SHAPE_NUMSUB | VKP_I_SHAPE_SHARDNUMSUB);
    vkp_resp_writer writer;
    const vkp_value *value;
    size_t consumed;
    vkp_status status;
    if (vkp_i_answer_fits(answer, frame)) {
        *out = vkp_bytes_ref(frame);
        return VKP_OK;
    }
    vkp_resp_reader_reset(relay->reader);
    status = vkp_resp_reader_scan(relay->reader, frame->data, frame->len, &value, &consumed);
    if (status != VKP_OK) {
        return status;
    }
    vkp_resp_writer_init(&writer, relay->env);
    if (numsub != 0 && value->type == VKP_RESP_ARRAY) {
        vkp_i_put_numsub(&writer, relay,
                         numsub == VKP_I_SHAPE_NUMSUB ? VKP_SUB_CHANNEL : VKP_SUB_SHARD, value);
    } else if (answer->protocol == 3) {
        vkp_resp_put_value(&writer, value, 3);
    } else if (answer->shape_count > 0 && value->type == VKP_RESP_ARRAY) {
        vkp_i_put_exec2(&writer, value, (const uint8_t *)(answer + 1), answer->shape_count);
    } else {
        vkp_i_put_resp2(&writer, value, answer->shape);
    }
    return vkp_resp_writer_take(&writer, out);
}

/* The answer is back on its local client's loop, with its reply: send it if no older answer is
   pending. Above max_reply_bytes the client closes later.                                     */
static void vkp_i_answer_return(vkp_i_task *task)
{
    vkp_i_answer *answer = VKP_CONTAINER(task, vkp_i_answer, task);
    vkp_i_local *local = answer->local;
    answer->done = true;
    local->held_bytes += answer->bytes.len;
    if (answer->asked_bytes > 0) {
        vkp_i_shard_count_reply(local->shard, VKP_RELAY_SHARED,
                                answer->lost ? 0 : answer->asked_ns);
    }
    if ((local->flags & VKP_I_LOCAL_CLOSED) == 0 &&
        local->held_bytes + vkp_i_conn_get_queued_bytes(local->member.conn) >
            local->shard->relay->max_reply_bytes) {
        vkp_i_conn_close_later(local->member.conn, VKP_CLOSE_SLOW, 0);
    }
    vkp_i_local_flush_answers(local);
}

#define VKP_I_UPSTREAM_TEXT 160 /* bytes of the error texts below, terminated */

/* Loop 0: the upstream client has the reply, or failed. The local client belongs to its own
   loop: only its `shard` may be read here.                                                    */
static void vkp_i_answer_on_reply(void *user, vkp_status status, const vkp_value *value,
                                  const vkp_bytes *frame)
{
    vkp_i_answer *answer = (vkp_i_answer *)user;
    vkp_i_shard *shard = answer->local->shard;
    const vkp_env *env = shard->relay->env;
    char text[VKP_I_UPSTREAM_TEXT];
    (void)value; /* NULL, or with an attribute read already */
    if (status == VKP_OK) {
        status = vkp_i_answer_convert(answer, frame, &answer->bytes);
    }
    answer->lost = status == VKP_ERR_DISCONNECTED || status == VKP_ERR_CLOSED;
    if (status != VKP_OK && !answer->lost) {
        (void)snprintf(text, sizeof text, "%s",
                       status == VKP_ERR_REFUSED
                           ? "ERR the server speaks RESP2 only: no commands beside subscriptions"
                       : status == VKP_ERR_NOMEM
                           ? "ERR the relay is out of memory"
                           : "ERR the reply is nested too deeply, or has a line that is too long");
        answer->bytes = vkp_i_error_bytes(env, text);
    }
    if (vkp_i_on_loop(shard->loop)) {
        vkp_i_answer_return(&answer->task);
        return;
    }
    answer->task.fn = vkp_i_answer_return;
    if (!vkp_i_loop_queue(shard->loop, &answer->task)) {
        /* that loop is closed: no other thread uses its clients */
        vkp_i_answer_return(&answer->task);
    }
}

/* Send commands upstream; the last of their `replies` becomes the answer's reply. Local client's
   loop.                                                                                       */
static void vkp_i_local_forward(vkp_i_local *local, vkp_i_answer *answer, const vkp_bytes *commands,
                                uint32_t replies)
{
    vkp_relay *relay = local->shard->relay;
    char text[] = "ERR the relay is out of memory";
    vkp_status status;
    answer->asked_bytes = commands->len;
    answer->asked_ns = local->shard->loop->now_ns;
    vkp_i_shard_count_asked(local->shard, VKP_RELAY_SHARED, replies);
    local->asked_bytes += commands->len;
    if (local->asked_bytes > VKP_I_MOST_ASKED) {
        vkp_i_local_pause(local, VKP_I_LOCAL_FULL);
    }
    vkp_i_local_throttle(local);
    status = vkp_i_client_send(relay->shared[local->id % relay->shared_count], commands, replies,
                               true, vkp_i_answer_on_reply, answer);
    if (status != VKP_OK) {
        answer->asked_ns = 0;
        answer->lost = status == VKP_ERR_DISCONNECTED || status == VKP_ERR_CLOSED;
        if (!answer->lost) {
            answer->bytes = vkp_i_error_bytes(relay->env, text);
        }
        vkp_i_answer_return(&answer->task);
    }
}

#endif /* VKP_I_IO */
