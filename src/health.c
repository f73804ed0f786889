#if VKP_I_IO
/* ======================================================================================
   >>impl-health   Is a server well?
   ======================================================================================
   A health check runs on its loop's thread alone, without locks. Each check connects, sends the
   request, compares the first bytes received with the answer, calls on_result once, and starts
   the timer of the next check.
   vkp_i_health_end is the only end of a check. It disconnects before it calls on_result: the
   user of a connection without a check is NULL, and its events are ignored. on_result may close
   and unref the handle; `calling` defers the free until on_result returned.                   */

#define VKP_I_HEALTH_TIMEOUT_MS 1000u /* default of vkp_health_config.timeout_ms */

struct vkp_health_check {
    vkp_loop *loop;           /* shared */
    vkp_health_config config; /* its address, request and answer point into `texts` */
    char *texts;              /* terminated copies of address, request and answer */
    size_t text_bytes;        /* allocated bytes of `texts` */
    vkp_conn *conn;           /* connection of the running check, or NULL */
    vkp_timer timer;          /* deadline of the running check, or start of the next one */
    vkp_i_attached place;     /* calls vkp_i_health_on_loop_close */
    uint64_t began_ns;        /* start of the running or last check */
    uint64_t failures;        /* failed checks since the last success */
    bool calling;             /* on_result is running: unref must not free */
    bool closed;              /* vkp_health_check_close was called */
    bool released;            /* the handle was given back: the end of on_result frees */
};

static void vkp_i_health_begin(vkp_timer *timer);

static void vkp_i_health_free(vkp_health_check *check)
{
    vkp_loop *loop = check->loop;
    vkp_i_free(loop->env, check->texts, check->text_bytes);
    vkp_i_free(loop->env, check, sizeof *check);
    vkp_loop_unref(loop);
}

/* Close the connection. Its user is cleared first: the on_close that follows must not end a
   check.                                                                                      */
static void vkp_i_health_disconnect(vkp_health_check *check)
{
    vkp_conn *conn = check->conn;
    check->conn = NULL;
    if (conn != NULL) {
        vkp_conn_set_user(conn, NULL);
        vkp_conn_close(conn);
        vkp_conn_unref(conn);
    }
}

/* End the running check: call on_result, then start the timer of the next check, or free. */
static void vkp_i_health_end(vkp_health_check *check, vkp_status status, int error)
{
    vkp_loop *loop = check->loop;
    vkp_health health;
    vkp_timer_stop(&check->timer);
    vkp_i_health_disconnect(check);
    check->failures = status == VKP_OK ? 0 : check->failures + 1;
    memset(&health, 0, sizeof health);
    health.status = status;
    health.sys_error = status == VKP_ERR_SYS ? error : 0;
    health.elapsed_ns = vkp_i_loop_clock(loop) - check->began_ns;
    health.failures = check->failures;
    check->calling = true;
    check->config.on_result(check->config.user, &health);
    check->calling = false;
    if (check->released) {
        vkp_i_health_free(check);
    } else if (!check->closed && check->config.period_ms > 0 && !loop->closed) {
        uint64_t next_ns = vkp_i_after_ms(check->began_ns, check->config.period_ms);
        /* Cannot fail: the entry of this timer was just removed, so there is room. */
        (void)!vkp_timer_start(&check->timer, loop, vkp_i_health_begin, 0,
                               VKP_I_MAX(next_ns, loop->now_ns));
    }
}

static void vkp_i_health_on_open(vkp_conn *conn, void *user)
{
    vkp_health_check *check = (vkp_health_check *)user;
    vkp_bytes request;
    vkp_status status;
    if (check == NULL) {
        return;
    }
    status = vkp_bytes_copy(check->loop->env, check->config.request.ptr, check->config.request.len,
                            &request);
    if (status == VKP_OK) {
        status = vkp_conn_send(conn, &request);
        vkp_bytes_unref(&request);
    }
    if (status != VKP_OK) {
        vkp_i_health_end(check, status, 0);
    }
}

static size_t vkp_i_health_on_data(vkp_conn *conn, void *user, const vkp_bytes *in)
{
    vkp_health_check *check = (vkp_health_check *)user;
    vkp_str answer;
    size_t len;
    (void)conn;
    if (check == NULL) {
        return in->len;
    }
    answer = check->config.answer;
    len = VKP_I_MIN(in->len, answer.len);
    if (memcmp(in->data, answer.ptr, len) != 0) {
        vkp_i_health_end(check, VKP_ERR_PROTOCOL, 0);
    } else if (len == answer.len) {
        vkp_i_health_end(check, VKP_OK, 0);
    } else {
        return 0; /* incomplete: on_data gets these bytes again, with more behind them */
    }
    return in->len;
}

static void vkp_i_health_on_close(vkp_conn *conn, void *user, vkp_close_reason reason, int error)
{
    vkp_health_check *check = (vkp_health_check *)user;
    vkp_status status = VKP_ERR_DISCONNECTED;
    (void)conn;
    if (check == NULL) {
        return;
    }
    if (reason == VKP_CLOSE_NOMEM) {
        status = VKP_ERR_NOMEM;
    } else if (reason == VKP_CLOSE_ERROR && error != EPIPE && error != ECONNRESET) {
        status = error == ECONNREFUSED || error == ENOENT ? VKP_ERR_REFUSED : VKP_ERR_SYS;
    }
    vkp_i_health_end(check, status, error);
}

static const vkp_conn_ops vkp_i_health_ops = {
    vkp_i_health_on_open, vkp_i_health_on_data, NULL, NULL, vkp_i_health_on_close, NULL};

static void vkp_i_health_timed_out(vkp_timer *timer)
{
    vkp_i_health_end(VKP_CONTAINER(timer, vkp_health_check, timer), VKP_ERR_TIMEOUT, 0);
}

/* Timer's callback: start a check. */
static void vkp_i_health_begin(vkp_timer *timer)
{
    vkp_health_check *check = VKP_CONTAINER(timer, vkp_health_check, timer);
    vkp_loop *loop = check->loop;
    vkp_conn_config config;
    vkp_status status;
    memset(&config, 0, sizeof config);
    config.ops = &vkp_i_health_ops;
    config.user = check;
    config.input_bytes = check->config.answer.len + loop->read_bytes;
    config.loop_only = true;
    check->began_ns = vkp_i_loop_clock(loop);
    status = vkp_timer_start(timer, loop, vkp_i_health_timed_out, 0,
                             vkp_i_after_ms(check->began_ns, check->config.timeout_ms));
    if (status == VKP_OK) {
        status = vkp_conn_connect(loop, check->config.address, &config, &check->conn);
    }
    if (status == VKP_ERR_SYS && (errno == ECONNREFUSED || errno == ENOENT)) {
        status = VKP_ERR_REFUSED;
    }
    if (status != VKP_OK) {
        vkp_i_health_end(check, status, errno);
    }
}

/* The loop closes: stop checking. The handle stays valid until its unref. */
static void vkp_i_health_on_loop_close(vkp_i_attached *place)
{
    vkp_health_check *check = VKP_CONTAINER(place, vkp_health_check, place);
    vkp_timer_stop(&check->timer);
    vkp_i_health_disconnect(check);
}

/* Copy a text, terminated, to offset *at of check->texts; *at moves behind it. */
static vkp_str vkp_i_health_copy(vkp_health_check *check, size_t *at, vkp_str text)
{
    char *copy = check->texts + *at;
    memcpy(copy, text.ptr, text.len);
    copy[text.len] = '\0';
    *at += text.len + 1;
    return vkp_i_str(copy, text.len);
}

VKP_API vkp_status vkp_health_check_open(vkp_loop *loop, const vkp_health_config *config,
                                         vkp_health_check **out)
{
    vkp_health_check *check;
    vkp_i_parts parts;
    vkp_status status;
    size_t at = 0;
    VKP_I_REQUIRE(loop != NULL && config != NULL && out != NULL && vkp_i_on_loop(loop));
    VKP_I_REQUIRE(config->address.ptr != NULL && config->on_result != NULL);
    if (loop->closed) {
        return VKP_ERR_CLOSED;
    }
    status = vkp_i_split_address(loop->env, config->address, &parts);
    if (status != VKP_OK) {
        return status;
    }
    check = (vkp_health_check *)vkp_i_alloc_zero(loop->env, sizeof *check);
    if (check == NULL) {
        return VKP_ERR_NOMEM;
    }
    check->config = *config;
    if (check->config.request.len == 0) {
        check->config.request = vkp_str_of("PING\r\n");
    }
    if (check->config.answer.len == 0) {
        check->config.answer = vkp_str_of("+PONG\r\n");
    }
    if (check->config.timeout_ms == 0) {
        check->config.timeout_ms = VKP_I_HEALTH_TIMEOUT_MS;
    }
    check->loop = vkp_loop_ref(loop);
    check->text_bytes =
        config->address.len + check->config.request.len + check->config.answer.len + 3;
    check->texts = (char *)vkp_i_alloc(loop->env, check->text_bytes);
    status = check->texts != NULL ? VKP_OK : VKP_ERR_NOMEM;
    if (status == VKP_OK) {
        check->config.address = vkp_i_health_copy(check, &at, config->address);
        check->config.request = vkp_i_health_copy(check, &at, check->config.request);
        check->config.answer = vkp_i_health_copy(check, &at, check->config.answer);
        status = vkp_timer_start(&check->timer, loop, vkp_i_health_begin, 0, 0);
    }
    if (status != VKP_OK) {
        vkp_i_health_free(check);
        return status;
    }
    check->place.on_loop_close = vkp_i_health_on_loop_close;
    vkp_i_loop_attach(loop, &check->place);
    *out = check;
    return VKP_OK;
}

VKP_API void vkp_health_check_close(vkp_health_check *check)
{
    if (check != NULL && !check->closed) {
        check->closed = true;
        vkp_timer_stop(&check->timer);
        vkp_i_health_disconnect(check);
        vkp_i_loop_detach(&check->place);
    }
}

VKP_API void vkp_health_check_unref(vkp_health_check *check)
{
    if (check != NULL) {
        vkp_health_check_close(check);
        check->released = true;
        if (!check->calling) {
            vkp_i_health_free(check);
        }
    }
}

#endif /* VKP_I_IO */
