#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-hub   Who is subscribed to what                                                   */

/* Whether the glob matches the whole text: * ? [abc] [^a-z] \x, byte by byte, as servers do, but
   in time linear in text x pattern at worst. Any thread.                                      */
VKP_API bool vkp_glob_is_match(vkp_str pattern, vkp_str text);

typedef struct vkp_hub_sub vkp_hub_sub;

/* One subscriber: a connection and its protocol. In the caller's memory; zero it first. */
typedef struct vkp_hub_member {
    vkp_conn *conn; /* views: gone from the hub (vkp_hub_leave) before it is unref'd */
    int protocol;   /* 2 or 3: how messages are written to it */
    uint32_t counts[VKP_SUB_KINDS]; /* subscriptions by vkp_sub_kind; read only */
    vkp_hub_sub *i_subs[VKP_SUB_KINDS];
} vkp_hub_member;

typedef struct vkp_hub_config {
    /* A name got its first member (added) or lost its last. Not inside vkp_hub_publish. */
    void (*on_interest)(void *user, vkp_sub_kind kind, vkp_str name, bool added);
    void *user;
    const vkp_env *env;
} vkp_hub_config;

/* Open a hub. It belongs to one loop's thread.
   Owns:   borrows config; gives *hub     Blocks: never     Errors: NOMEM                      */
VKP_API VKP_NODISCARD vkp_status vkp_hub_open(const vkp_hub_config *config, vkp_hub **hub);
VKP_API void vkp_hub_unref(vkp_hub *hub); /* every member has left; NULL is ignored */

/* Add the member to a name. OK also when it was there (then *added is false; may be NULL).
   Errors: NOMEM, LIMIT (a name above 4 GiB). Loop's thread.                                   */
VKP_API VKP_NODISCARD vkp_status vkp_hub_subscribe(vkp_hub *hub, vkp_hub_member *member,
                                                   vkp_sub_kind kind, vkp_str name, bool *added);

/* Take the member off a name. False when it was not there. Loop's thread. */
VKP_API bool vkp_hub_unsubscribe(vkp_hub *hub, vkp_hub_member *member, vkp_sub_kind kind,
                                 vkp_str name);

/* Take the member off everything. Loop's thread. */
VKP_API void vkp_hub_leave(vkp_hub *hub, vkp_hub_member *member);

/* One of the member's names of that kind, empty ({NULL,0}) when it has none. Views: until the
   member's next change. Loop's thread.                                                        */
VKP_API vkp_str vkp_hub_get_member_name(const vkp_hub_member *member, vkp_sub_kind kind);

/* Whether the member has the name. Loop's thread. */
VKP_API bool vkp_hub_is_subscribed(const vkp_hub *hub, const vkp_hub_member *member,
                                   vkp_sub_kind kind, vkp_str name);

/* Deliver a message to every member of the channel and, for VKP_SUB_CHANNEL, of every pattern that
   matches. It is encoded at most once per protocol; members share it. Returns deliveries tried,
   as PUBLISH counts. Per member, messages keep their order. Loop's thread.                    */
VKP_API size_t vkp_hub_publish(vkp_hub *hub, vkp_sub_kind kind, vkp_str channel, vkp_str payload);

/* Deliver a push of a server, as it came: a message to the members of its channel, a pmessage to
   those of its pattern (the server sends one push for each). Members of protocol 3 share the
   received bytes. Returns deliveries tried; 0 for pushes that are no messages. Loop's thread. */
VKP_API size_t vkp_hub_deliver(vkp_hub *hub, const vkp_push *push);

/* Members of a name; number of names; the names one by one (walk from NULL; views until the next
   change). Loop's thread.                                                                     */
VKP_API size_t vkp_hub_get_members(const vkp_hub *hub, vkp_sub_kind kind, vkp_str name);
VKP_API size_t vkp_hub_get_names(const vkp_hub *hub, vkp_sub_kind kind);
VKP_API bool vkp_hub_next_name(const vkp_hub *hub, vkp_sub_kind kind, void **cursor, vkp_str *name);

#endif /* VKP_NO_IO */
