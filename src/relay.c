#if VKP_I_IO
/* ======================================================================================
   >>impl-relay   Serve local Valkey clients over few upstream connections, or none
   ======================================================================================
   One shard per loop: a hub, a request reader and the local clients given to that loop. Loop 0
   (shard 0's) also carries the listeners and the upstream clients: one for all subscriptions, and
   one or more that share the commands. Nothing that happens to one of them touches the other.
   How a command travels: the local client's loop parses it (vkp_i_local_on_data) and appends an
   answer to local->answers. vkp_client_send queues the command for loop 0, which writes it to the
   shared connection of this local client, always the same one. The reply arrives on loop 0
   (vkp_i_answer_on_reply), which converts it to the local client's protocol and returns the answer
   to the client's loop as a task (vkp_i_answer_return). There every finished answer at the head of
   local->answers is sent, so replies leave in the order of their commands.
   SUBSCRIBE and its family, HELLO, RESET and QUIT depend on that order: while answers are
   pending they are not executed, the connection pauses, and on_data gets their bytes again
   later. So there is never a queue of commands. In the same way the first command that cannot be
   shared waits for its client's session (see impl-relay-session).
   A topic of a shard's hub holds one interest of the client for subscriptions. SUBSCRIBE is
   confirmed to the local client when the server confirmed it, or immediately when the server is
   disconnected.
   relay->subscribers counts subscribers over all shards: so any shard of a relay that stands alone
   answers PUBLISH, and the server's counts, in which the relay is one, can be mended.
   References: one of the relay for its owner, for each local client and for each task between
   threads; one of a local client (loop's thread) for its connection, each answer and each
   subscription under way.
   The relay's mutex guards `subscribers` and the shards' `handovers`; no callback runs under it.
   Lock order: the relay's mutex, then the gate's and the registry's.                          */

typedef struct vkp_i_shard vkp_i_shard;
typedef struct vkp_i_local vkp_i_local;
typedef struct vkp_i_session vkp_i_session;

/* Bits of a shape: how a command's RESP2 reply differs from its RESP3 reply, beyond the types. */
#define VKP_I_SHAPE_NULL_ARRAY 1u    /* a null reply is *-1 in RESP2 */
#define VKP_I_SHAPE_FLAT 2u          /* RESP3 nests pairs in arrays, RESP2 has one flat array */
#define VKP_I_SHAPE_PAIRS 4u         /* RESP3's map is an array of pairs in RESP2 */
#define VKP_I_SHAPE_NULL_ELEMENTS 8u /* null elements are *-1 in RESP2 */
#define VKP_I_SHAPE_NULL_LAST 16u    /* a last element that is null is *-1 in RESP2 */
#define VKP_I_SHAPE_NUMSUB 32u       /* counts of subscribers, in which the relay counts as one */
#define VKP_I_SHAPE_SHARDNUMSUB 64u  /* the same of shard channels */

/* The place of one reply in the order of a local client's commands. */
typedef struct vkp_i_answer {
    struct vkp_i_answer *next; /* the younger answer of the local client */
    vkp_i_task task;           /* returns the answer to the local client's loop */
    vkp_i_local *local;        /* holds one reference */
    size_t bytes_allocated;    /* size of this allocation, shapes included */
    size_t asked_bytes;        /* bytes of the command, counted in local->asked_bytes */
    uint64_t asked_ns;         /* when it was forwarded; 0: not to the server */
    vkp_bytes bytes;           /* the reply to send, valid once `done` */
    bool done;                 /* the reply is complete; loop's thread of the local client */
    bool lost;                 /* there is no reply: the client is closed in its place */
    uint8_t protocol;          /* the local client's protocol when it sent the command */
    uint32_t shape_count;      /* for EXEC: number of shapes behind the struct, one per command */
    uint8_t shape;             /* VKP_I_SHAPE_* of a single command */
} vkp_i_answer;

/* A MULTI under way: the commands that wait for EXEC. */
typedef struct vkp_i_multi {
    vkp_resp_writer block; /* MULTI and the commands, encoded as they will be sent */
    uint8_t *shapes;       /* VKP_I_SHAPE_* of each command */
    size_t count;          /* commands in `block`, without MULTI */
    size_t capacity;       /* allocated bytes of `shapes` */
    bool failed;           /* a command was refused: EXEC answers EXECABORT */
} vkp_i_multi;

/* Bits of vkp_i_local.flags. */
#define VKP_I_LOCAL_BUSY 1u      /* paused: a SUBSCRIBE waits for the server */
#define VKP_I_LOCAL_ORDER 2u     /* paused until no answer is pending */
#define VKP_I_LOCAL_FULL 4u      /* paused: too many pending answers, or too many bytes queued */
#define VKP_I_LOCAL_LEAVING 8u   /* drains when no answer and no SUBSCRIBE is pending */
#define VKP_I_LOCAL_CLOSED 16u   /* the connection is closed */
#define VKP_I_LOCAL_FAILED 32u   /* nothing else is read: drains when no answer is pending */
#define VKP_I_LOCAL_OPENING 64u  /* paused: its session logs in */
#define VKP_I_LOCAL_LOST 128u    /* a command has no reply: drains behind those before it */
#define VKP_I_LOCAL_ROOM 256u    /* paused: waits for the turn */
#define VKP_I_LOCAL_TURN 512u    /* has the turn */
#define VKP_I_LOCAL_LOCKED 1024u /* has not said the password of its door */
#define VKP_I_LOCAL_PAUSED                                                           \
    (VKP_I_LOCAL_BUSY | VKP_I_LOCAL_ORDER | VKP_I_LOCAL_FULL | VKP_I_LOCAL_OPENING | \
     VKP_I_LOCAL_ROOM)

/* Servers number their clients from 1 on: a number from here on is one of the relay. */
#define VKP_I_FIRST_ID ((uint64_t)1 << 40)

/* An address that the relay listens at; constant until vkp_relay_unref. */
typedef struct vkp_i_door {
    vkp_relay *relay;
    vkp_listener *listener;
    vkp_str password; /* a copy; ptr NULL: none */
    uint32_t idle_ms; /* 0: clients may say nothing without end */
    struct vkp_i_door *next;
} vkp_i_door;

/* A local client. Its fields belong to its loop's thread, except `shard`, which loop 0 reads
   too.                                                                                        */
struct vkp_i_local {
    vkp_hub_member member;  /* the client as a member of the shard's hub; holds the connection */
    vkp_i_shard *shard;     /* constant */
    const vkp_i_door *door; /* constant */
    vkp_i_local *prev;      /* newer local client of the shard, or NULL */
    vkp_i_local *next;      /* older local client of the shard, or NULL */
    uint64_t id;            /* number for the log; CLIENT ID adds VKP_I_FIRST_ID */
    uint64_t opened_ns;     /* when the connection began, on the loop's clock */
    uint32_t refs;          /* loop's thread */
    uint32_t flags;         /* VKP_I_LOCAL_BUSY and the other bits */
    vkp_i_answer *answers;  /* pending answers, oldest first */
    vkp_i_answer **answers_end; /* the NULL link where the next answer is appended */
    uint32_t answer_count;      /* number of `answers`, and of the session's calls */
    uint32_t heard_ms;          /* when it said something, see relay_door.c */
    uint32_t unread_bytes;      /* input that is no whole command, or not executed yet */
    uint32_t unsent_bytes;      /* of `session`: commands that the kernel has not taken */
    size_t asked_bytes;         /* bytes of the commands whose answers are pending */
    size_t room_bytes;          /* counted in the relay's room */
    vkp_i_local *room_next;     /* the next one that waits for the turn */
    size_t held_bytes;          /* bytes of finished replies that wait for an older one */
    size_t name_bytes;          /* bytes of the names it is subscribed to */
    vkp_i_multi *multi;         /* NULL: no MULTI is held; a session has its own */
    vkp_i_session *session;     /* the client's own connection to the server; NULL: it shares */
    vkp_resp_reader *reader;    /* of a large command that arrives in parts; NULL: the shard's */
    char *name;                 /* by SETNAME, terminated; or NULL */
};

#define VKP_I_PLAIN_NAME 15u  /* longest name in vkp_i_shard.plain */
#define VKP_I_PLAIN_NAMES 64u /* places in vkp_i_shard.plain, a power of two */

/* What was found out about a command by its name alone, as a client wrote it. */
typedef struct vkp_i_plain {
    char name[VKP_I_PLAIN_NAME];
    uint8_t len;   /* 0: the place is empty */
    bool plain;    /* shared and forwarded, whatever its arguments */
    uint8_t shape; /* VKP_I_SHAPE_* */
} vkp_i_plain;

/* What a loop counts of its own. Its thread alone writes, with VKP_I_TALLY; any thread reads. No
   other loop writes near it, so each has the cache lines for itself.                          */
typedef struct vkp_i_tally {
    uint64_t commands[VKP_RELAY_ROUTES];
    uint64_t messages_in; /* messages from upstream, or by PUBLISH */
    uint64_t deliveries;  /* messages delivered to local clients */
    size_t in_flight;     /* commands whose replies the server owes */
    vkp_relay_times replies[2];
} vkp_i_tally;

#define VKP_I_TALLY(counter, n) VKP_I_STORE(&(counter), (counter) + (n))

/* How late a loop was. */
typedef struct vkp_i_lag {
    vkp_timer timer;
    uint64_t due_ns;  /* the timer's deadline */
    uint64_t turn_ns; /* when `most` began */
    uint64_t most;    /* since then */
    uint64_t before;  /* in the time before */
} vkp_i_lag;

/* The part of a relay on one loop. `relay`, `loop` and `pushes` are constant until vkp_relay_unref;
   every other field belongs to the loop's thread unless its comment names another owner.      */
struct vkp_i_shard {
    vkp_relay *relay;                     /* no reference */
    vkp_loop *loop;                       /* shared */
    vkp_hub *hub;                         /* subscriptions of this shard's local clients */
    vkp_i_profile *profile;               /* config of the local clients' connections */
    vkp_resp_reader *reader;              /* reads the requests of all local clients in turn */
    vkp_str *argv;                        /* arguments of the command that is executed now */
    size_t argv_capacity;                 /* allocated elements of `argv` */
    char *inline_text;                    /* unquoted words of an inline command */
    size_t inline_capacity;               /* allocated bytes of `inline_text` */
    vkp_i_plain plain[VKP_I_PLAIN_NAMES]; /* by a hash of the name; the last one counts */
    vkp_i_tally tally;
    vkp_i_lag lag;
    vkp_i_task survey_task; /* runs vkp_i_shard_survey on this loop */
    vkp_i_local *survey_at; /* the next client of the survey; NULL: none */
    vkp_i_local *locals;    /* local clients, newest first */
    size_t local_count;     /* number of `locals` */
    vkp_i_session *pool;    /* connections of former clients, for the next ones */
    size_t pool_count;      /* number of `pool` */
    /* descriptors queued for this loop; guarded by the relay's mutex */
    struct vkp_i_handover *handovers;
    bool draining;            /* drains, or ends: accepts no further local clients */
    bool gone;                /* drained, and taken off relay->live_shards */
    vkp_mpsc_tx *pushes;      /* sender of other loops to this shard; NULL where none sends */
    vkp_push_loop *push_loop; /* receives `pushes`; or NULL */
    vkp_timer quiet_timer;    /* looks for clients that say nothing; runs while quiet_looks */
    bool quiet_looks;
    vkp_i_local *turn;     /* the client with the turn, if it is of this shard */
    bool turn_moves;       /* it said something since the timer looked */
    vkp_timer turn_timer;  /* runs while `turn` is set */
    uint32_t turn_queued;  /* atomic: 1 while turn_task is queued */
    vkp_i_task turn_task;  /* runs vkp_i_room_on_turn; queued by any thread */
    vkp_i_task drain_task; /* runs vkp_i_shard_drain on this loop */
    vkp_i_task kill_task;  /* runs vkp_i_shard_kill on this loop, at the drain's deadline */
};

/* Subscribers of one name over all shards. The name is behind the struct. */
typedef struct vkp_i_subscriber_count {
    vkp_i_map_node node; /* in relay->subscribers; its key is the name */
    size_t count;        /* above 0 */
} vkp_i_subscriber_count;

/* The commands of all clients. */
typedef struct vkp_i_room {
    size_t most;          /* constant */
    uint64_t patience_ms; /* constant; VKP_OFF: without end */
    size_t used;          /* atomic */
    vkp_i_local *turn;    /* goes on without room; or NULL; guarded by the relay's mutex */
    vkp_i_local *first;   /* waits for the turn longest; guarded */
    vkp_i_local **end;    /* the NULL link where the next one is appended; guarded */
} vkp_i_room;

/* The server's answer to HELLO but for `proto` and `id`, which each client has of its own: what
   stands before these two, and behind. */
typedef struct vkp_i_greeting {
    vkp_bytes before; /* empty: not known */
    vkp_bytes after;
} vkp_i_greeting;

#define VKP_I_REASON_BYTES 160 /* text of vkp_relay.reason, terminated */

struct vkp_relay {
    const vkp_env *env;
    size_t refs;         /* atomic */
    vkp_i_shard *shards; /* one per loop */
    size_t shard_count;  /* number of `shards` */
    size_t next_shard;   /* which shard gets the next client, modulo shard_count; loop 0's thread */
    vkp_registry *registry;   /* of the Unix sockets that the relay listens on */
    vkp_gate *gate;           /* admits the clients of all listeners */
    size_t max_request_bytes; /* limit of one command, and of one MULTI block */
    size_t max_reply_bytes;   /* limit of the replies that a client has not read */
    size_t max_subscriptions; /* limit of the names of one client */
    size_t max_name_bytes;    /* limit of the bytes of these names */
    vkp_client *push;         /* the connection of all subscriptions; NULL: stand-alone */
    vkp_resp_reader *reader;  /* of replies that are converted; loop 0's thread */
    vkp_client **shared;      /* the connections of commands; each carries those of many clients */
    size_t shared_count;      /* number of `shared`; 0: stand-alone */
    size_t shared_capacity;   /* allocated elements of `shared` */
    vkp_client_config session_configs[2]; /* of sessions in RESP2 and RESP3; texts are of `push` */
    size_t private_max;                   /* most sessions */
    size_t private_count;                 /* atomic: sessions, those without a client included */
    vkp_i_door *doors;                    /* newest first; loop 0's thread */
    size_t door_count;                    /* number of `doors` */
    uint64_t next_id;                     /* atomic: the last number given to a local client */
    /* guards `subscribers`, `login`, `greetings` and the shards' `handovers` */
    VKP_I_MUTEX mutex;
    vkp_i_room room;
    vkp_i_greeting greetings[2]; /* for clients of RESP2, and of RESP3; guarded */
    vkp_client_target *login; /* for the server, without an address; NULL: as configured; guarded */
    /* stand-alone: counts by kind and name; guarded by the mutex */
    vkp_i_map subscribers[VKP_SUB_KINDS];
    bool draining;                   /* vkp_relay_drain was called; loop 0's thread */
    size_t live_shards;              /* atomic: shards that have not drained yet */
    vkp_timer drain_timer;           /* deadline of the drain; loop 0's */
    vkp_i_task end_task;             /* runs vkp_i_relay_end on loop 0 */
    void (*on_end)(void *user);      /* called on loop 0 at the end of a drain, or NULL */
    void *end_user;                  /* argument of on_end */
    vkp_str notice;                  /* text for clients at a drain: a copy, or NULL */
    void (*on_idle)(void *user);     /* called on loop 0 after linger_ms without clients, or NULL */
    void *user;                      /* argument of on_idle */
    uint64_t linger_ms;              /* time without clients before on_idle */
    uint32_t idle_queued;            /* atomic: 1 while idle_task is queued */
    vkp_i_task idle_task;            /* starts idle_timer on loop 0; queued by any shard's thread */
    vkp_timer idle_timer;            /* runs for linger_ms; loop 0's */
    uint64_t lagged;                 /* atomic: messages lost because a shard's channel was full */
    uint64_t slow_closed;            /* atomic: clients closed with VKP_CLOSE_SLOW */
    uint64_t protocol_errors;        /* atomic: clients closed for a protocol error */
    uint64_t gaps;                   /* atomic: gaps of `push` */
    uint64_t lost;                   /* atomic: clients closed for want of a reply, or for a gap */
    char reason[VKP_I_REASON_BYTES]; /* of the last outage of `push`; loop 0's thread */
    bool close_on_gap;               /* constant */
    uint64_t hold_ms;                /* constant; 0: commands do not wait */
    uint64_t privates_opened;        /* atomic: sessions opened */
    uint64_t privates_refused;       /* atomic: commands refused because of private_max */
    uint32_t connected;              /* atomic: 1 while all shared connections and `push` are */
    uint64_t since_unix_ms;          /* atomic: when `connected` changed, or open */
    struct vkp_i_surveys *surveys;   /* outages, and surveys under way; loop 0's thread */
    size_t surveys_bytes;            /* allocated bytes of `surveys` */
};

static void vkp_i_relay_free(vkp_relay *relay)
{
    const vkp_env *env = relay->env;
    size_t i;
    int kind;
    for (i = 0; i < relay->shard_count; i++) {
        vkp_i_shard *shard = &relay->shards[i];
        vkp_hub_unref(shard->hub);
        vkp_resp_reader_unref(shard->reader);
        if (shard->profile != NULL) {
            vkp_i_profile_unref(shard->profile);
        }
        vkp_i_free(env, shard->argv, shard->argv_capacity * sizeof *shard->argv);
        vkp_i_free(env, shard->inline_text, shard->inline_capacity);
        vkp_loop_unref(shard->loop);
    }
    for (kind = 0; kind < VKP_SUB_KINDS; kind++) {
        vkp_i_map_deinit(&relay->subscribers[kind]);
    }
    for (kind = 0; kind < 2; kind++) {
        vkp_bytes_unref(&relay->greetings[kind].before);
        vkp_bytes_unref(&relay->greetings[kind].after);
    }
    vkp_resp_reader_unref(relay->reader);
    vkp_gate_unref(relay->gate);
    vkp_registry_unref(relay->registry);
    vkp_i_free_str(env, relay->notice);
    while (relay->doors != NULL) {
        vkp_i_door *door = relay->doors;
        relay->doors = door->next;
        vkp_i_free_str(env, door->password);
        vkp_i_free(env, door, sizeof *door);
    }
    vkp_i_free(env, relay->shards, relay->shard_count * sizeof *relay->shards);
    vkp_i_free(env, relay->surveys, relay->surveys_bytes);
    vkp_i_free(env, relay->shared, relay->shared_capacity * sizeof *relay->shared);
    VKP_I_MUTEX_DEINIT(&relay->mutex);
    vkp_i_free(env, relay, sizeof *relay);
}

/* Give one of `refs` back; the last one frees the relay. */
static void vkp_i_relay_release(vkp_relay *relay)
{
    if (VKP_I_UNREF(&relay->refs) == 1) {
        vkp_i_relay_free(relay);
    }
}

/* Whether the relay has a server; otherwise it stands alone. */
static bool vkp_i_relay_has_server(const vkp_relay *relay)
{
    return relay->push != NULL;
}

static size_t vkp_i_relay_count_clients(const vkp_relay *relay)
{
    vkp_gate_stats stats;
    vkp_gate_get_stats(relay->gate, &stats);
    return stats.clients;
}

/* ---- counting: a load, an add and a store each ---- */

/* A command goes to the server; an EXEC with all that it carries is one in flight. */
static void vkp_i_shard_count_asked(vkp_i_shard *shard, vkp_relay_route route, uint64_t commands)
{
    VKP_I_TALLY(shard->tally.commands[route], commands);
    VKP_I_TALLY(shard->tally.in_flight, 1);
}

#define VKP_I_TIMES_SHIFT 14u /* of vkp_relay_times: the first value counts up to 2^14 ns */

/* The reply is there, or will never be. asked_ns 0: its time does not count. The clock is the
   loop's, which is read once in a round: that costs nothing here.                             */
static void vkp_i_shard_count_reply(vkp_i_shard *shard, vkp_relay_route route, uint64_t asked_ns)
{
    vkp_relay_times *times = &shard->tally.replies[route];
    VKP_I_TALLY(shard->tally.in_flight, (size_t)-1);
    if (asked_ns != 0) {
        uint64_t took_ns = shard->loop->now_ns - asked_ns;
        uint64_t part = (took_ns - (took_ns > 0 ? 1u : 0u)) >> VKP_I_TIMES_SHIFT;
        size_t index = part == 0 ? 0 : 64u - (size_t)__builtin_clzll(part);
        index = VKP_I_MIN(index, (size_t)VKP_RELAY_TIMES - 1);
        VKP_I_TALLY(times->total_ns, took_ns);
        VKP_I_TALLY(times->within[index], 1u);
    }
}

/* ---- answers ---- */

/* Give one reference back, on the loop's thread; the last one frees the local client. */
static void vkp_i_local_release(vkp_i_local *local)
{
    vkp_relay *relay = local->shard->relay;
    if (--local->refs == 0) {
        vkp_resp_reader_unref(local->reader);
        vkp_i_free_text(relay->env, local->name);
        vkp_i_free(relay->env, local, sizeof *local);
        vkp_i_relay_release(relay);
    }
}

/* Write reply bytes now, or close later when there is no memory. */
static void vkp_i_local_send(vkp_i_local *local, const vkp_bytes *bytes)
{
    if (vkp_conn_send(local->member.conn, bytes) == VKP_ERR_NOMEM) {
        vkp_i_conn_close_later(local->member.conn, VKP_CLOSE_NOMEM, 0);
    }
}

/* No memory for this local client: close it later. */
static void vkp_i_local_fail(vkp_i_local *local)
{
    if ((local->flags & VKP_I_LOCAL_CLOSED) == 0) {
        vkp_i_conn_close_later(local->member.conn, VKP_CLOSE_NOMEM, 0);
    }
}

/* Above one of these limits a local client's commands are not read until all are down to half. */
#define VKP_I_MOST_ANSWERS 1024u            /* pending answers */
#define VKP_I_MOST_ASKED ((size_t)4 << 20)  /* bytes of commands whose answers are pending */
#define VKP_I_MOST_UNREAD ((size_t)1 << 20) /* bytes in the outbox that the kernel has not taken */

#define VKP_I_ERROR_TEXT 512 /* bytes of an error reply's text, terminated; a longer one is cut */

/* Answer the current command with an error. */
__attribute__((format(printf, 2, 3))) static void vkp_i_local_error(vkp_i_local *local,
                                                                    const char *format, ...);

/* Send the shutdown notice: a message to a client of RESP3 or with subscriptions, else an error
   reply (see vkp_relay_drain).                                                                */
static void vkp_i_local_notify(vkp_i_local *local)
{
    vkp_i_shard *shard = local->shard;
    const vkp_hub_member *member = &local->member;
    vkp_str notice = shard->relay->notice;
    if (member->protocol == 3 || member->counts[0] + member->counts[1] + member->counts[2] > 0) {
        vkp_i_message message;
        const vkp_bytes *frame;
        vkp_i_message_init(&message, "message", vkp_i_str(NULL, 0),
                           vkp_str_of(VKP_RELAY_NOTICE_CHANNEL), notice);
        frame = vkp_i_message_frame(shard->hub, &message, member->protocol);
        if (frame != NULL) {
            vkp_i_local_send(local, frame);
        }
    } else {
        vkp_i_local_error(local, "ERR %.*s", VKP_FMT(notice));
    }
}

/* Drain the local client's connection, after the shutdown notice if the shard drains. */
static void vkp_i_local_leave(vkp_i_local *local)
{
    if (local->shard->draining && local->shard->relay->notice.ptr != NULL &&
        (local->flags & VKP_I_LOCAL_FAILED) == 0 && !vkp_i_conn_is_draining(local->member.conn)) {
        vkp_i_local_notify(local);
    }
    vkp_conn_drain(local->member.conn);
}

static void vkp_i_local_charge(vkp_i_local *local);
static void vkp_i_local_end_turn(vkp_i_local *local);

/* Clear the reasons to pause that no longer hold. When none is left, read again, or drain a
   client that leaves.                                                                         */
static void vkp_i_local_maybe_resume(vkp_i_local *local)
{
    vkp_i_local_charge(local);
    if ((local->flags & VKP_I_LOCAL_CLOSED) != 0) {
        return;
    }
    if (local->answer_count == 0 && (local->flags & VKP_I_LOCAL_ORDER) != 0) {
        local->flags &= ~VKP_I_LOCAL_ORDER;
        vkp_i_local_end_turn(local);
    }
    if ((local->flags & VKP_I_LOCAL_FULL) != 0 &&
        vkp_i_conn_get_queued_bytes(local->member.conn) > VKP_I_MOST_UNREAD / 2) {
        /* on_drain is called when the bytes left are written */
        vkp_i_conn_flush(local->member.conn);
    }
    if (local->answer_count < VKP_I_MOST_ANSWERS / 2 &&
        local->asked_bytes <= VKP_I_MOST_ASKED / 2 && local->unsent_bytes <= VKP_I_MOST_ASKED / 2 &&
        vkp_i_conn_get_queued_bytes(local->member.conn) <= VKP_I_MOST_UNREAD / 2) {
        local->flags &= ~VKP_I_LOCAL_FULL;
    }
    if ((local->flags & VKP_I_LOCAL_PAUSED) != 0) {
        return;
    }
    if ((local->flags & (VKP_I_LOCAL_FAILED | VKP_I_LOCAL_LEAVING)) != 0) {
        if (local->answer_count == 0) { /* unread input is no whole command */
            vkp_i_local_leave(local);
        }
        return;
    }
    vkp_conn_resume(local->member.conn);
}

/* Stop reading; why is the VKP_I_LOCAL_* bit that vkp_i_local_maybe_resume clears. */
static void vkp_i_local_pause(vkp_i_local *local, uint32_t why)
{
    local->flags |= why;
    vkp_conn_pause(local->member.conn);
}

/* ---- the room ----
   Bytes of commands that are not whole, wait for EXEC, or are not answered (on a connection of the
   client's own: not written) take room, and all clients of a relay share gather_bytes of it. The
   first VKP_I_ROOM_FREE bytes of a client are free, so most clients never come here.
   A client whose bytes find no room is not read any more, unless it has the turn: one client at a
   time has it and goes on, whatever room is taken. The others wait for it in the order of their
   coming, on whichever loops they are. States of a local client, by its flags:
     -      has room, or needs none. Its bytes grow, and there is no room: the turn is free: TURN.
            Else: ROOM.
     ROOM   paused, in the relay's list. The turn comes: TURN. Its bytes are answered: -.
     TURN   reads. It has said a command, and if that was large, has the answer; or it has no bytes
            any more: -, and the first in the list gets the turn. Nothing came of the rest of a
            command for gather_ms, while others wait: closed. A server does not take the bytes of a
            connection of its own for so long: -.
   So the relay keeps gather_bytes, what one client with the turn adds, and one read of each other.
   `used` is any thread's, the list and `turn` are guarded by the relay's mutex, the flags belong to
   the client's loop.                                                                          */

#define VKP_I_ROOM_FREE 16384u

/* Bytes of whole commands that the relay keeps until the answers are there, or on a connection of
   the client's own until the kernel takes them. */
static size_t vkp_i_local_get_pending(const vkp_i_local *local)
{
    return local->session != NULL ? local->unsent_bytes : local->asked_bytes;
}

/* The bytes of a client that take room. */
static size_t vkp_i_local_get_room(const vkp_i_local *local)
{
    size_t bytes = local->unread_bytes + vkp_i_local_get_pending(local) +
                   (local->multi != NULL ? local->multi->block.i_len : 0);
    return bytes > VKP_I_ROOM_FREE ? bytes : 0;
}

static void vkp_i_turn_on_timer(vkp_timer *timer);

/* On its loop: the client has the turn. */
static void vkp_i_local_take_turn(vkp_i_local *local)
{
    vkp_i_shard *shard = local->shard;
    uint64_t patience_ms = shard->relay->room.patience_ms;
    local->flags |= VKP_I_LOCAL_TURN;
    shard->turn = local;
    shard->turn_moves = false;
    if (patience_ms != VKP_OFF) { /* without memory it has all the time */
        (void)!vkp_timer_start(&shard->turn_timer, shard->loop, vkp_i_turn_on_timer,
                               vkp_i_after_ms(0, patience_ms),
                               vkp_i_after_ms(vkp_i_loop_now(shard->loop), patience_ms));
    }
}

/* Task of a shard: if the turn came to one of its clients, read it. */
static void vkp_i_room_on_turn(vkp_i_task *task)
{
    vkp_i_shard *shard = VKP_CONTAINER(task, vkp_i_shard, turn_task);
    vkp_relay *relay = shard->relay;
    vkp_i_local *local;
    (void)VKP_I_XCHG(&shard->turn_queued, 0u);
    VKP_I_LOCK(&relay->mutex);
    local = relay->room.turn;
    VKP_I_UNLOCK(&relay->mutex);
    /* A client of this loop leaves on this loop, so it is still there. */
    if (local != NULL && local->shard == shard && (local->flags & VKP_I_LOCAL_ROOM) != 0) {
        local->flags &= ~VKP_I_LOCAL_ROOM;
        vkp_i_local_take_turn(local);
        vkp_i_local_maybe_resume(local);
    }
    vkp_i_relay_release(relay);
}

/* A client of the shard has the turn, perhaps: say so on its loop. Any thread. */
static void vkp_i_shard_queue_turn(vkp_i_shard *shard)
{
    vkp_relay *relay = shard->relay;
    if (VKP_I_XCHG(&shard->turn_queued, 1u) != 0) {
        return;
    }
    (void)VKP_I_ADD(&relay->refs, 1);
    if (!vkp_i_loop_queue(shard->loop, &shard->turn_task)) {
        vkp_i_relay_release(relay); /* that loop is closed: nobody is read there */
    }
}

/* There is no room for the client's bytes. */
static void vkp_i_local_want_turn(vkp_i_local *local)
{
    vkp_relay *relay = local->shard->relay;
    vkp_i_room *room = &relay->room;
    bool waits;
    VKP_I_LOCK(&relay->mutex);
    waits = room->turn != NULL;
    if (waits) {
        local->room_next = NULL;
        *room->end = local;
        room->end = &local->room_next;
    } else {
        room->turn = local;
    }
    VKP_I_UNLOCK(&relay->mutex);
    if (waits) {
        vkp_i_local_pause(local, VKP_I_LOCAL_ROOM);
    } else {
        vkp_i_local_take_turn(local);
    }
}

/* Take the client out of the list. The mutex is held. */
static void vkp_i_room_remove(vkp_i_room *room, const vkp_i_local *local)
{
    vkp_i_local **at = &room->first;
    while (*at != local) {
        at = &(*at)->room_next;
    }
    *at = local->room_next;
    if (*at == NULL) {
        room->end = at;
    }
}

/* The client waits no longer, or has the turn no longer, which passes to the next one. */
static void vkp_i_local_leave_room(vkp_i_local *local)
{
    vkp_relay *relay = local->shard->relay;
    vkp_i_room *room = &relay->room;
    vkp_i_shard *next = NULL;
    if ((local->flags & (VKP_I_LOCAL_ROOM | VKP_I_LOCAL_TURN)) == 0) {
        return;
    }
    VKP_I_LOCK(&relay->mutex);
    if (room->turn != local) {
        vkp_i_room_remove(room, local);
    } else {
        room->turn = room->first;
        if (room->turn != NULL) {
            vkp_i_room_remove(room, room->turn);
            next = room->turn->shard;
        }
    }
    VKP_I_UNLOCK(&relay->mutex);
    local->flags &= ~(VKP_I_LOCAL_ROOM | VKP_I_LOCAL_TURN);
    if (local->shard->turn == local) {
        local->shard->turn = NULL;
        vkp_timer_stop(&local->shard->turn_timer);
    }
    if (next != NULL) {
        vkp_i_shard_queue_turn(next);
    }
}

/* The client's commands have changed: count their bytes. */
static void vkp_i_local_charge(vkp_i_local *local)
{
    vkp_i_room *room = &local->shard->relay->room;
    size_t old = local->room_bytes;
    size_t bytes = vkp_i_local_get_room(local);
    size_t used;
    if (bytes == old) {
        return;
    }
    local->room_bytes = bytes;
    used = VKP_I_ADD(&room->used, bytes - old) + bytes - old;
    if (bytes == 0) {
        vkp_i_local_leave_room(local);
    } else if (bytes > old && used > room->most &&
               (local->flags & (VKP_I_LOCAL_ROOM | VKP_I_LOCAL_TURN | VKP_I_LOCAL_CLOSED)) == 0) {
        vkp_i_local_want_turn(local);
    }
}

/* A command of the client with the turn is answered: others come first now, unless a block of MULTI
   is not whole. */
static void vkp_i_local_end_turn(vkp_i_local *local)
{
    const vkp_i_room *room = &local->shard->relay->room;
    if ((local->flags & VKP_I_LOCAL_TURN) != 0 && local->multi == NULL) {
        vkp_i_local_leave_room(local);
        if (local->room_bytes > 0 && VKP_I_LOAD(&room->used) > room->most) {
            vkp_i_local_want_turn(local);
        }
    }
}

/* The client was read: commands were executed, the rest is not whole. */
static void vkp_i_local_was_read(vkp_i_local *local, size_t executed, size_t rest)
{
    bool closed = (local->flags & VKP_I_LOCAL_CLOSED) != 0;
    local->unread_bytes = closed ? 0 : (uint32_t)rest; /* max_request_bytes is below 2 GiB */
    vkp_i_local_charge(local);
    if ((local->flags & VKP_I_LOCAL_TURN) != 0) {
        local->shard->turn_moves = true;
        if (executed > 0 && vkp_i_local_get_pending(local) > VKP_I_ROOM_FREE) {
            vkp_i_local_pause(local, VKP_I_LOCAL_ORDER);
        } else if (executed > 0) {
            vkp_i_local_end_turn(local);
        }
    }
}

/* The connection of the client's own has written all. */
static void vkp_i_local_was_written(vkp_i_local *local)
{
    vkp_i_local_charge(local);
    if ((local->flags & VKP_I_LOCAL_ORDER) != 0) {
        vkp_i_local_end_turn(local);
    }
    vkp_i_local_maybe_resume(local);
}

/* Whether somebody waits for the turn. */
static bool vkp_i_relay_has_waiting(vkp_relay *relay)
{
    bool waiting;
    VKP_I_LOCK(&relay->mutex);
    waiting = relay->room.first != NULL;
    VKP_I_UNLOCK(&relay->mutex);
    return waiting;
}

static void vkp_i_turn_on_timer(vkp_timer *timer)
{
    vkp_i_shard *shard = VKP_CONTAINER(timer, vkp_i_shard, turn_timer);
    vkp_i_local *local = shard->turn;
    bool waits =
        local->answer_count > 0 || (local->flags & (VKP_I_LOCAL_BUSY | VKP_I_LOCAL_OPENING)) != 0;
    bool moves = shard->turn_moves;
    shard->turn_moves = false;
    if (moves || !vkp_i_relay_has_waiting(shard->relay)) {
        return;
    }
    if (waits && local->session != NULL) {
        vkp_i_local_charge(local);
        vkp_i_local_end_turn(local);
    } else if (!waits) {
        vkp_i_log(shard->relay->env, VKP_LOG_WARN,
                  "client %llu: no more of its command for %llu ms, while others wait for room",
                  (unsigned long long)local->id,
                  (unsigned long long)shard->relay->room.patience_ms);
        vkp_i_conn_close_later(local->member.conn, VKP_CLOSE_SLOW, 0);
    }
}

#define VKP_I_RELAY_GATHER_BYTES ((size_t)64 << 20)
#define VKP_I_RELAY_GATHER_MS 5000u

static void vkp_i_room_init(vkp_i_room *room, const vkp_relay_config *config)
{
    room->most = config->gather_bytes > 0 ? config->gather_bytes : VKP_I_RELAY_GATHER_BYTES;
    room->patience_ms = config->gather_ms > 0 ? config->gather_ms : VKP_I_RELAY_GATHER_MS;
    room->end = &room->first;
}

/* ---- what is pending ---- */

/* Above VKP_I_MOST_UNREAD: write as much as the kernel accepts, and pause if the outbox is still
   above it. on_drain resumes.                                                                 */
static void vkp_i_local_throttle(vkp_i_local *local)
{
    vkp_conn *conn = local->member.conn;
    if (vkp_i_conn_get_queued_bytes(conn) > VKP_I_MOST_UNREAD) {
        vkp_i_conn_flush(conn);
    }
    if (vkp_i_conn_get_queued_bytes(conn) > VKP_I_MOST_UNREAD) {
        vkp_i_local_pause(local, VKP_I_LOCAL_FULL);
    }
}

/* Free an answer and give its reference of the local client back. */
static void vkp_i_answer_free(vkp_i_answer *answer)
{
    vkp_i_local *local = answer->local;
    vkp_bytes_unref(&answer->bytes);
    vkp_i_free(local->shard->relay->env, answer, answer->bytes_allocated);
    vkp_i_local_release(local);
}

/* Send the finished answers at the head of the list, then resume or drain if possible. */
static void vkp_i_local_flush_answers(vkp_i_local *local)
{
    local->refs++;
    while (local->answers != NULL && local->answers->done) {
        vkp_i_answer *answer = local->answers;
        local->answers = answer->next;
        if (local->answers == NULL) {
            local->answers_end = &local->answers;
        }
        local->answer_count--;
        local->asked_bytes -= answer->asked_bytes;
        local->held_bytes -= answer->bytes.len;
        if (answer->lost && (local->flags & (VKP_I_LOCAL_CLOSED | VKP_I_LOCAL_LOST)) == 0) {
            local->flags |= VKP_I_LOCAL_LOST;
            (void)VKP_I_ADD(&local->shard->relay->lost, (uint64_t)1);
            vkp_conn_drain(local->member.conn);
        }
        if ((local->flags & (VKP_I_LOCAL_CLOSED | VKP_I_LOCAL_LOST)) == 0) {
            vkp_i_local_send(local, &answer->bytes);
        }
        vkp_i_answer_free(answer);
    }
    vkp_i_local_maybe_resume(local);
    vkp_i_local_release(local);
}

/* Append a pending answer. NULL: no memory; the connection closes later. */
static vkp_i_answer *vkp_i_answer_new(vkp_i_local *local, size_t shape_count)
{
    size_t bytes = sizeof(vkp_i_answer) + shape_count;
    vkp_i_answer *answer = (vkp_i_answer *)vkp_i_alloc_zero(local->shard->relay->env, bytes);
    if (answer == NULL) {
        vkp_i_local_fail(local);
        return NULL;
    }
    answer->bytes_allocated = bytes;
    answer->local = local;
    answer->protocol = (uint8_t)local->member.protocol;
    answer->shape_count = (uint32_t)shape_count;
    local->refs++;
    *local->answers_end = answer;
    local->answers_end = &answer->next;
    local->answer_count++;
    if (local->answer_count >= VKP_I_MOST_ANSWERS) {
        vkp_i_local_pause(local, VKP_I_LOCAL_FULL);
    }
    return answer;
}

/* Answer the current command now, behind the pending answers. Takes the reference of bytes. */
static void vkp_i_local_answer(vkp_i_local *local, vkp_bytes bytes)
{
    vkp_i_answer *answer;
    if (local->answers == NULL) {
        vkp_i_local_send(local, &bytes);
        vkp_bytes_unref(&bytes);
        vkp_i_local_throttle(local);
        return;
    }
    answer = vkp_i_answer_new(local, 0);
    if (answer == NULL) {
        vkp_bytes_unref(&bytes);
        return;
    }
    answer->bytes = bytes;
    answer->done = true;
    local->held_bytes += bytes.len;
}

/* Answer with a static text of RESP. */
static void vkp_i_local_answer_static(vkp_i_local *local, const char *text)
{
    vkp_i_local_answer(local, vkp_bytes_static(text, strlen(text)));
}

/* Answer with the writer's bytes. No memory: the connection closes later. */
static void vkp_i_local_answer_writer(vkp_i_local *local, vkp_resp_writer *writer)
{
    vkp_bytes bytes;
    if (vkp_resp_writer_take(writer, &bytes) != VKP_OK) {
        vkp_i_local_fail(local);
        return;
    }
    vkp_i_local_answer(local, bytes);
}

/* The error reply "-<text>". Control bytes become blanks, because text may repeat bytes that the
   client sent.                                                                                */
static vkp_bytes vkp_i_error_bytes(const vkp_env *env, char *text)
{
    vkp_resp_writer writer;
    vkp_bytes bytes;
    char *at;
    for (at = text; *at != '\0'; at++) {
        *at = (unsigned char)*at < 0x20 || *at == 0x7f ? ' ' : *at;
    }
    vkp_resp_writer_init(&writer, env);
    vkp_resp_put_error(&writer, vkp_str_of(text));
    if (vkp_resp_writer_take(&writer, &bytes) != VKP_OK) {
        static const char none[] = "-ERR out of memory\r\n";
        bytes = vkp_bytes_static(none, sizeof none - 1);
    }
    return bytes;
}

__attribute__((format(printf, 2, 3))) static void vkp_i_local_error(vkp_i_local *local,
                                                                    const char *format, ...)
{
    char text[VKP_I_ERROR_TEXT];
    va_list arguments;
    va_start(arguments, format);
    (void)vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    vkp_i_local_answer(local, vkp_i_error_bytes(local->shard->relay->env, text));
}

#define VKP_I_SHORT_BYTES 64 /* most bytes of a client's text in an error reply */
#define VKP_I_SHORT(s) (int)VKP_I_MIN((s).len, (size_t)VKP_I_SHORT_BYTES), (s).ptr /* for %.*s */

/* A command's name in lower case and shortened, as servers write it in their errors. */
typedef struct vkp_i_verb {
    char text[VKP_I_SHORT_BYTES + 1];
} vkp_i_verb;

/* The command's name for an error reply. */
static vkp_i_verb vkp_i_verb_of(vkp_str name)
{
    vkp_i_verb verb;
    size_t len = VKP_I_MIN(name.len, sizeof verb.text - 1);
    size_t i;
    for (i = 0; i < len; i++) {
        verb.text[i] = vkp_i_lower(name.ptr[i]);
    }
    verb.text[len] = '\0';
    return verb;
}

/* Whether argc is between least and most, the command's name included; otherwise an error is
   answered.                                                                                   */
static bool vkp_i_local_arity(vkp_i_local *local, size_t argc, size_t least, size_t most,
                              const vkp_str *argv)
{
    if (argc < least || argc > most) {
        vkp_i_local_error(local, "ERR wrong number of arguments for '%s' command",
                          vkp_i_verb_of(argv[0]).text);
        return false;
    }
    return true;
}

#endif /* VKP_I_IO */
