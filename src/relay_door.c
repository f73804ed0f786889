#if VKP_I_IO
/* ======================================================================================
   >>impl-relay-door   Relay: where clients come in
   ======================================================================================
   A door is an address that a relay listens at, with what its clients have to say first, and how
   long they may say nothing. A client behind a door with a password is LOCKED until AUTH or HELLO
   has said it: what else it says is answered with NOAUTH, as a server does. The password opens the
   relay; other credentials of a client that is not locked are the server's to judge.
   Every shard looks at its clients now and then, while a door of the relay has idle_ms.       */

#define VKP_I_LOCKED_BYTES 16384u /* most bytes of a command of a LOCKED client */

/* Whether both are the same, in a time that says nothing about where they differ. */
static bool vkp_i_is_same_secret(vkp_str secret, vkp_str said)
{
    unsigned char differ = secret.len != said.len;
    size_t i;
    for (i = 0; i < said.len; i++) {
        unsigned char with = secret.len > 0 ? (unsigned char)secret.ptr[i % secret.len] : 0;
        differ = (unsigned char)(differ | ((unsigned char)said.ptr[i] ^ with));
    }
    return differ == 0;
}

/* Whether these credentials open the client's door. username.ptr NULL: the default user. */
static bool vkp_i_local_has_key(const vkp_i_local *local, vkp_str username, vkp_str password)
{
    vkp_str key = local->door->password;
    return key.ptr != NULL && (username.ptr == NULL || vkp_i_str_is(username, "default")) &&
           vkp_i_is_same_secret(key, password);
}

/* The credentials in HELLO's options; false: there are none. */
static bool vkp_i_hello_get_login(size_t argc, const vkp_str *argv, vkp_str *username,
                                  vkp_str *password)
{
    size_t i = 2;
    while (i + 1 < argc && vkp_i_str_is(argv[i], "SETNAME")) {
        i += 2;
    }
    if (i + 2 >= argc || !vkp_i_str_is(argv[i], "AUTH")) {
        return false;
    }
    *username = argv[i + 1];
    *password = argv[i + 2];
    return true;
}

/* AUTH with what opens the door, or of a LOCKED client: answer it. False: it is the server's. */
static bool vkp_i_local_auth_at_door(vkp_i_local *local, size_t argc, const vkp_str *argv)
{
    bool locked = (local->flags & VKP_I_LOCAL_LOCKED) != 0;
    bool form = argc == 2 || argc == 3;
    bool opens = form && vkp_i_local_has_key(local, argc == 3 ? argv[1] : vkp_i_str(NULL, 0),
                                             argv[argc - 1]);
    if (!locked && (!opens || local->session != NULL || local->multi != NULL)) {
        return false;
    }
    if (opens) {
        local->flags &= ~VKP_I_LOCAL_LOCKED;
        vkp_i_local_answer_static(local, "+OK\r\n");
    } else if (vkp_i_local_arity(local, argc, 2, 3, argv)) {
        vkp_i_local_error(local, "WRONGPASS invalid username-password pair or user is disabled.");
    }
    return true;
}

/* A command of a client behind a door with a password. True: it was answered here. */
static bool vkp_i_local_at_door(vkp_i_local *local, size_t argc, const vkp_str *argv)
{
    vkp_str username;
    vkp_str password;
    if (vkp_i_str_is(argv[0], "AUTH")) {
        return vkp_i_local_auth_at_door(local, argc, argv);
    }
    if ((local->flags & VKP_I_LOCAL_LOCKED) == 0 || vkp_i_str_is(argv[0], "QUIT") ||
        vkp_i_str_is(argv[0], "RESET")) {
        return false;
    }
    if (!vkp_i_str_is(argv[0], "HELLO")) {
        vkp_i_local_error(local, "NOAUTH Authentication required.");
    } else if (!vkp_i_hello_get_login(argc, argv, &username, &password)) {
        vkp_i_local_error(local, "NOAUTH HELLO must be called with the client already "
                                 "authenticated, otherwise the HELLO <proto> AUTH <user> <pass> "
                                 "option can be used to authenticate the client and select the "
                                 "RESP protocol version at the same time");
    } else if (!vkp_i_local_has_key(local, username, password)) {
        vkp_i_local_error(local, "WRONGPASS invalid username-password pair or user is disabled.");
    } else {
        return false; /* HELLO opens the door if the rest of it is right */
    }
    return true;
}

/* The client comes in, or says RESET. */
static void vkp_i_local_lock(vkp_i_local *local)
{
    if (local->door->password.ptr != NULL) {
        local->flags |= VKP_I_LOCAL_LOCKED;
    }
}

/* ---- clients that say nothing ---- */

/* Milliseconds of a loop's clock, cut to 32 bits: differences count. */
static uint32_t vkp_i_loop_now_ms(vkp_loop *loop)
{
    return (uint32_t)(vkp_i_loop_now(loop) / VKP_I_NS_PER_MS);
}

/* Whether the client has nothing to wait for. */
static bool vkp_i_local_is_idle(const vkp_i_local *local)
{
    const uint32_t *counts = local->member.counts;
    return local->answer_count == 0 && counts[0] + counts[1] + counts[2] == 0 &&
           (local->flags & VKP_I_LOCAL_PAUSED) == 0 && !vkp_i_local_in_tunnel(local);
}

/* Close the clients of the shard that have said nothing for too long. */
static void vkp_i_shard_on_quiet(vkp_timer *timer)
{
    vkp_i_shard *shard = VKP_CONTAINER(timer, vkp_i_shard, quiet_timer);
    uint32_t now_ms = vkp_i_loop_now_ms(shard->loop);
    vkp_i_local *local;
    for (local = shard->locals; local != NULL; local = local->next) {
        if (!vkp_i_local_is_idle(local)) {
            local->heard_ms = now_ms; /* its time begins when it waits for nothing */
        } else if (local->door->idle_ms > 0 && now_ms - local->heard_ms >= local->door->idle_ms) {
            vkp_i_log(shard->relay->env, VKP_LOG_INFO, "client %llu: said nothing for %u ms",
                      (unsigned long long)local->id, (unsigned)(now_ms - local->heard_ms));
            vkp_i_conn_close_later(local->member.conn, VKP_CLOSE_LOCAL, 0);
        }
    }
}

#define VKP_I_QUIET_LOOK_MS 1000u

/* A client came in at a door. Without memory for the timer it may idle. */
static void vkp_i_local_enter(vkp_i_local *local, const vkp_i_door *door)
{
    vkp_i_shard *shard = local->shard;
    local->door = door;
    local->heard_ms = vkp_i_loop_now_ms(shard->loop);
    vkp_i_local_lock(local);
    if (door->idle_ms > 0 && !shard->quiet_looks) {
        shard->quiet_looks = vkp_timer_start(&shard->quiet_timer, shard->loop, vkp_i_shard_on_quiet,
                                             VKP_I_QUIET_LOOK_MS * VKP_I_NS_PER_MS,
                                             vkp_i_after_ms(vkp_i_loop_now(shard->loop),
                                                            VKP_I_QUIET_LOOK_MS)) == VKP_OK;
    }
}

/* The shard's last client has gone. */
static void vkp_i_shard_stop_looking(vkp_i_shard *shard)
{
    vkp_timer_stop(&shard->quiet_timer);
    shard->quiet_looks = false;
}

#endif /* VKP_I_IO */
