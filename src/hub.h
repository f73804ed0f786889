#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-hub   Which connections subscribed to which names */

/* Whether the glob pattern matches the whole text: * ? [abc] [^a-z] \x, byte by byte, as servers
   match. The time is at worst proportional to the text's length times the pattern's. Any thread. */
VKP_API bool vkp_glob_is_match(vkp_str pattern, vkp_str text);

/* One subscription of a member. Private. */
typedef struct vkp_hub_sub vkp_hub_sub;

/* A subscriber: a connection and its protocol. In the caller's memory; zero it first. Call
   vkp_hub_leave before the memory is used for something else. */
typedef struct vkp_hub_member {
    /* The connection that messages are pushed to. Views: call vkp_hub_leave before the connection's
       unref. */
    vkp_conn *conn;
    /* The RESP version of messages to this member: 3, or 2 (any other value). */
    int protocol;
    /* The number of the member's subscriptions, indexed by vkp_sub_kind; read only. */
    uint32_t counts[VKP_SUB_KINDS];
    /* Private. */
    vkp_hub_sub *i_subs[VKP_SUB_KINDS];
} vkp_hub_member;

/* The config of vkp_hub_open. Zeroed: all defaults. */
typedef struct vkp_hub_config {
    /* A name got its first member (added true) or lost its last (added false). Called on the hub's
       thread inside the call that changed this, never inside vkp_hub_publish. NULL: not called. */
    void (*on_interest)(void *user, vkp_sub_kind kind, vkp_str name, bool added);
    /* Handed to on_interest. */
    void *user;
    /* Memory, log and system; must outlive the hub. NULL: the defaults. */
    const vkp_env *env;
} vkp_hub_config;

/* Open a hub, which then belongs to one loop's thread. NULL config: all defaults.
   Owns:   borrows config; gives *hub
   Blocks: never     Threads: any     In callbacks: ok
   Errors: NOMEM, INVALID (hub NULL) */
VKP_API VKP_NODISCARD vkp_status vkp_hub_open(const vkp_hub_config *config, vkp_hub **hub);

/* Free the hub, which has only one reference; every member must have left. NULL is ignored. Loop's
   thread. */
VKP_API void vkp_hub_unref(vkp_hub *hub);

/* Add the member to a name. *added (NULL is allowed) is false when the member had the name already,
   which is OK too.
   Owns:   borrows name, views member until it has left
   Blocks: never     Threads: loop's     In callbacks: ok
   Errors: NOMEM, LIMIT (a name of 4 GiB or more), INVALID (hub or member NULL, no such kind) */
VKP_API VKP_NODISCARD vkp_status vkp_hub_subscribe(vkp_hub *hub, vkp_hub_member *member,
                                                   vkp_sub_kind kind, vkp_str name, bool *added);

/* Remove the member from a name. Returns false when the member did not have the name. Loop's
   thread. */
VKP_API bool vkp_hub_unsubscribe(vkp_hub *hub, vkp_hub_member *member, vkp_sub_kind kind,
                                 vkp_str name);

/* Remove the member from all its names. Loop's thread. */
VKP_API void vkp_hub_leave(vkp_hub *hub, vkp_hub_member *member);

/* One of the member's names of that kind, {NULL, 0} when the member has none. Views: valid until
   the member's next change. Loop's thread. */
VKP_API vkp_str vkp_hub_get_member_name(const vkp_hub_member *member, vkp_sub_kind kind);

/* Whether the member has the name. Loop's thread. */
VKP_API bool vkp_hub_is_subscribed(const vkp_hub *hub, const vkp_hub_member *member,
                                   vkp_sub_kind kind, vkp_str name);

/* Push a message to every member of the pub/sub channel and, with VKP_SUB_CHANNEL, to every member
   of each pattern that matches. The frame for a name is encoded at most once per protocol, and the
   name's members share it. Each member gets its messages in order; the policy of its connection
   holds. Returns how many deliveries were tried, as PUBLISH counts. Loop's thread. */
VKP_API size_t vkp_hub_publish(vkp_hub *hub, vkp_sub_kind kind, vkp_str channel, vkp_str payload);

/* Deliver a server's push as it was received: a message to the members of its pub/sub channel, a
   pmessage to the members of its pattern (the server sends one push for each). Members of protocol
   3 share the received bytes. Returns how many deliveries were tried; 0 for a push that is not a
   message. Loop's thread. */
VKP_API size_t vkp_hub_deliver(vkp_hub *hub, const vkp_push *push);

/* The number of members of a name. Loop's thread. */
VKP_API size_t vkp_hub_get_members(const vkp_hub *hub, vkp_sub_kind kind, vkp_str name);

/* The number of names of that kind that have a member. Loop's thread. */
VKP_API size_t vkp_hub_get_names(const vkp_hub *hub, vkp_sub_kind kind);

/* Step through the names of that kind, in no order: set *cursor to NULL before the first call. Each
   call returns true with the next name in *name, or false after the last. Views: *name and *cursor
   are valid until the hub's next change. Loop's thread. */
VKP_API bool vkp_hub_next_name(const vkp_hub *hub, vkp_sub_kind kind, void **cursor, vkp_str *name);

#endif /* VKP_NO_IO */
