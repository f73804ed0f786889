#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-push   What a server pushes                                                       */

/* The three kinds of subscription. */
typedef enum vkp_sub_kind {
    VKP_SUB_CHANNEL = 0, /* a pub/sub channel by its exact name: SUBSCRIBE */
    VKP_SUB_PATTERN,     /* all pub/sub channels that match a glob pattern: PSUBSCRIBE */
    VKP_SUB_SHARD        /* a shard channel by its exact name: SSUBSCRIBE */
} vkp_sub_kind;

/* The number of values of vkp_sub_kind. */
#define VKP_SUB_KINDS 3

/* What a push says. CONNECTED and all kinds below it are events of the client, not of the server:
   their frame is empty.                                                                       */
typedef enum vkp_push_kind {
    VKP_PUSH_MESSAGE = 0, /* a message of a subscribed name: channel, payload */
    VKP_PUSH_PMESSAGE,    /* a message that matches a pattern: pattern, channel, payload */
    VKP_PUSH_SMESSAGE,    /* a message of a subscribed shard channel: channel, payload */
    /* The server confirmed a subscription, for the first time or again after an outage: sub, and
       the name in channel.                                                                    */
    VKP_PUSH_SUBSCRIBED,
    VKP_PUSH_UNSUBSCRIBED, /* the last unsubscribe of a name is done: sub, the name in channel */
    /* Cached keys became invalid: vkp_push_get_key reads them; all keys: vkp_push_is_flush. */
    VKP_PUSH_INVALIDATE,
    VKP_PUSH_OTHER,     /* a push of another kind: frame; the name of the kind in channel */
    VKP_PUSH_CONNECTED, /* once: the first connection of the client is ready */
    /* Once per outage, and at the start: the first try to connect has failed, and tries go on;
       payload says why, with the server's words.                                              */
    VKP_PUSH_CONNECT_FAILED,
    VKP_PUSH_DISCONNECTED, /* once per outage: a ready connection was lost; payload is the reason */
    VKP_PUSH_RECONNECTED,  /* once per outage: a connection is ready, the client subscribes again */
    /* The server refused a subscription: sub, the name in channel, the server's words in payload.
       The name stays wanted: the client asks again, and SUBSCRIBED or an event REFUSED with other
       words follows.                                                                          */
    VKP_PUSH_REFUSED,
    /* A subscription that the server had confirmed was taken away: sub, the name in channel, the
       reason in payload. The client asks again, and SUBSCRIBED or REFUSED follows.            */
    VKP_PUSH_LOST,
    /* Subscriptions are back: messages of the names in gap may have been lost. A name that is not
       back is not in it: it gets a GAP of its own.                                            */
    VKP_PUSH_GAP,
    /* The channel of pushes was full: `missed` pushes were dropped before this one. */
    VKP_PUSH_LAGGED
} vkp_push_kind;

/* The name of a subscription, with its kind. */
typedef struct vkp_sub_name {
    vkp_sub_kind kind; /* of the subscription */
    vkp_str name;      /* of the channel, or the pattern */
} vkp_sub_name;

/* What a GAP covers. from: the last moment at which the subscriptions were known to be good: when
   the last request was sent that the server answered before the loss, at worst heartbeat_ms and
   reply_timeout_ms before. to: the confirmation of the last name.                             */
typedef struct vkp_gap {
    uint64_t from_ns;          /* on the clock of vkp_now_ns */
    uint64_t to_ns;            /* on the clock of vkp_now_ns */
    uint64_t from_unix_ms;     /* from_ns as wall-clock time: milliseconds since 1970 */
    uint64_t to_unix_ms;       /* to_ns as wall-clock time */
    const vkp_sub_name *names; /* the names covered; NULL: all that are subscribed now */
    size_t name_count;         /* number of names; 0: all that are subscribed now */
} vkp_gap;

/* The kind as a text in lower case: static, never NULL. Any thread. */
VKP_API const char *vkp_push_kind_str(vkp_push_kind kind);

/* One push, a plain struct. A callback borrows the push; a receiver that took a push from a channel
   owns it, and gives it back with vkp_push_unref. Texts and gap are static, or valid as long as
   the reference that frame holds.                                                             */
typedef struct vkp_push {
    vkp_push_kind kind; /* says which of the other fields are set */
    vkp_sub_kind sub;   /* kind of the subscription: messages and events about one name */
    vkp_bytes frame;    /* the RESP bytes as received; of no bytes for events of the client */
    vkp_str channel;    /* the name; OTHER: the name of the push's kind */
    vkp_str pattern;    /* PMESSAGE: the pattern that matched */
    vkp_str payload; /* of a message; of CONNECT_FAILED, DISCONNECTED, REFUSED, LOST the reason */
    const vkp_gap *gap; /* GAP: what is covered; otherwise NULL */
    uint64_t missed;    /* LAGGED: the number of pushes dropped */
} vkp_push;

/* The cost of a push in bytes, struct and frame: for vkp_mpsc_config.cost. Any thread. */
VKP_API size_t vkp_push_get_cost(const void *push);

/* vkp_push_unref of a push that no receiver took: for vkp_mpsc_config.drop. Any thread. */
VKP_API void vkp_push_drop(void *user, void *push);

/* Give the reference to the frame back and zero the struct. NULL is ignored. Any thread. */
VKP_API void vkp_push_unref(vkp_push *push);

/* Read a value as a push; allocates nothing. A value of a known kind but another number of elements
   is VKP_PUSH_OTHER. The value may be a PUSH, or an ARRAY as RESP2 sends pushes.
   Owns:   *push views value and holds no reference (frame is empty)
   Blocks: never     Threads: any     In callbacks: ok
   Errors: INVALID (a null argument, no PUSH or ARRAY, the first element is no string)         */
VKP_API VKP_NODISCARD vkp_status vkp_push_from_value(const vkp_value *value, vkp_push *push);

/* Whether the push says that all keys became invalid, as after FLUSHALL: then it has no keys. False
   for pushes of other kinds. Any thread.                                                      */
VKP_API bool vkp_push_is_flush(const vkp_push *push);

/* Read the next key that became invalid; *cursor is 0 before the first one, and the call's own
   afterwards. True: *key views the frame of the push. False: no key is left, and *key is unchanged.
   For an INVALIDATE, and for a MESSAGE of the channel __redis__:invalidate, which RESP2 clients
   subscribe to; pushes of other kinds or without a frame (vkp_push_from_value) have no keys.
   Allocates nothing. After DISCONNECTED a server no longer knows what was read from it: drop all
   cached keys then. Any thread.                                                               */
VKP_API bool vkp_push_get_key(const vkp_push *push, size_t *cursor, vkp_str *key);

#endif /* VKP_NO_IO */
