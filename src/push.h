#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-push   What a server pushes                                                       */

typedef enum vkp_sub_kind {
    VKP_SUB_CHANNEL = 0, /* SUBSCRIBE, exact name */
    VKP_SUB_PATTERN,     /* PSUBSCRIBE, glob */
    VKP_SUB_SHARD        /* SSUBSCRIBE, exact name */
} vkp_sub_kind;
#define VKP_SUB_KINDS 3

typedef enum vkp_push_kind {
    VKP_PUSH_MESSAGE = 0,  /* channel, payload */
    VKP_PUSH_PMESSAGE,     /* pattern, channel, payload */
    VKP_PUSH_SMESSAGE,     /* channel, payload */
    VKP_PUSH_SUBSCRIBED,   /* channel: confirmed for the first time, or again after an outage */
    VKP_PUSH_UNSUBSCRIBED, /* channel; also when the server took a shard channel away */
    VKP_PUSH_INVALIDATE,   /* frame: the keys; a null instead means all of them */
    VKP_PUSH_OTHER,        /* any other push: frame, kind's name in channel */
    VKP_PUSH_CONNECTED,    /* the first connection stands */
    VKP_PUSH_DISCONNECTED, /* once per outage; payload tells why */
    VKP_PUSH_RECONNECTED,  /* the outage is over; subscriptions are on their way back */
    VKP_PUSH_GAP,          /* all are back: messages between from_ns and to_ns may be lost */
    VKP_PUSH_LAGGED        /* the channel of pushes was full: `missed` were dropped before this */
} vkp_push_kind;

/* The kind in lower case; static, never NULL. Any thread. */
VKP_API const char *vkp_push_kind_str(vkp_push_kind kind);

/* One push. A value: in a callback it is borrowed; out of a channel it is yours to unref. */
typedef struct vkp_push {
    vkp_push_kind kind;
    vkp_sub_kind sub; /* of SUBSCRIBED, UNSUBSCRIBED and the messages */
    vkp_bytes frame;  /* the RESP bytes as received; empty for events of the client */
    vkp_str channel;  /* these view frame */
    vkp_str pattern;
    vkp_str payload;
    uint64_t from_ns; /* GAP: monotonic times */
    uint64_t to_ns;
    uint64_t missed; /* LAGGED */
} vkp_push;

/* What a push costs a channel, in bytes: for vkp_mpsc_config.cost. Any thread. */
VKP_API size_t vkp_push_get_cost(const void *push);

/* Drops a push that nobody received: for vkp_mpsc_config.drop. Any thread. */
VKP_API void vkp_push_drop(void *user, void *push);

/* Give the push's reference back and empty it. Any thread. */
VKP_API void vkp_push_unref(vkp_push *push);

/* Read a frame as a push. Messages need no allocation and no reader.
   Owns:   *push views value and gets no reference (frame is empty)   Errors: INVALID (no push) */
VKP_API VKP_NODISCARD vkp_status vkp_push_from_value(const vkp_value *value, vkp_push *push);

#endif /* VKP_NO_IO */
