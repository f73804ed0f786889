/* --------------------------------------------------------------------------------------
   >>api-oneshot   One value, once, in the caller's memory                                 */

#define VKP_ONESHOT_BYTES 48

/* Lives in the receiver's memory (a stack is fine): no allocation, no handle. The fields are
   private. The sender may use it until it sent or abandoned; the receiver until recv returned or
   it closed. A library-side sender (vkp_client_command) detaches itself on close; with a sender
   of your own the memory must outlive it, or come from vkp_oneshot_open.                      */
struct vkp_oneshot {
    uint32_t i_state;
    uint32_t i_elem_bytes;
    void *i_receiver; /* waiters */
    void *i_sender;
    void *i_owner;                              /* the sender's record, for i_detach */
    void (*i_detach)(struct vkp_oneshot *slot); /* makes the sender forget this slot */
    void (*i_drop)(void *user, void *item);
    void *i_user;
    const vkp_env *i_env;
    union {
        void *align_pointer;
        uint64_t align_u64;
        unsigned char bytes[VKP_ONESHOT_BYTES];
    } i_value;
};

/* Prepare the slot for one value.
   Owns:   the caller's memory; drop (may be NULL) is called with user on a value never received
   Blocks: never     Threads: any, before the sender sees it     In callbacks: ok
   Errors: INVALID (elem_bytes 0 or above VKP_ONESHOT_BYTES)                                   */
VKP_API VKP_NODISCARD vkp_status vkp_oneshot_init(vkp_oneshot *slot, const vkp_env *env,
                                                  size_t elem_bytes,
                                                  void (*drop)(void *user, void *item), void *user);

/* The same on the heap, for sides that end in any order: *slot holds one reference for each side,
   given back with vkp_oneshot_tx_unref and vkp_oneshot_rx_unref.
   Owns:   gives *slot, twice     Blocks: never     Threads: any     In callbacks: ok
   Errors: NOMEM, INVALID (as vkp_oneshot_init)                                                */
VKP_API VKP_NODISCARD vkp_status vkp_oneshot_open(const vkp_env *env, size_t elem_bytes,
                                                  void (*drop)(void *user, void *item), void *user,
                                                  vkp_oneshot **slot);

/* Sender: abandon a slot that was not sent, and give the sender's reference back. For slots of
   vkp_oneshot_open. NULL is ignored. Sender's thread.                                         */
VKP_API void vkp_oneshot_tx_unref(vkp_oneshot *slot);

/* Receiver: close the slot, and give the receiver's reference back. For slots of vkp_oneshot_open.
   NULL is ignored. Receiver's thread.                                                         */
VKP_API void vkp_oneshot_rx_unref(vkp_oneshot *slot);

/* Sender: deliver the value and wake the receiver. The slot is not touched afterwards.
   Owns:   takes what *item owns (on CLOSED it stays the caller's)
   Blocks: never     Threads: the sender's, once     In callbacks: ok
   Errors: CLOSED (the receiver closed first), INVALID (sent before)                           */
VKP_API VKP_NODISCARD vkp_status vkp_oneshot_send(vkp_oneshot *slot, const void *item);

/* Sender: give up without a value; the receiver gets CLOSED. The slot is not touched afterwards.
   Ignored after a send; NULL is ignored. Sender's thread.                                     */
VKP_API void vkp_oneshot_abandon(vkp_oneshot *slot);

/* Receiver: wait for the value until the deadline. Whatever it returns, the slot is closed then:
   its memory may go (after TIMEOUT the sender gets CLOSED).
   Owns:   gives what *out owns     Blocks: until deadline_ns     Threads: the receiver's
   Errors: CLOSED (abandoned, or closed before), TIMEOUT, INVALID                              */
VKP_API VKP_NODISCARD vkp_status vkp_oneshot_recv(vkp_oneshot *slot, uint64_t deadline_ns,
                                                  void *out);

/* Receiver: as vkp_oneshot_recv, but EMPTY instead of waiting, and EMPTY leaves the slot open. */
VKP_API VKP_NODISCARD vkp_status vkp_oneshot_try_recv(vkp_oneshot *slot, void *out);

/* Receiver: refuse the value; one that was sent already is dropped through drop. Idempotent; NULL
   is ignored. Afterwards the memory of a slot of vkp_oneshot_init may be reused. Receiver's
   thread.                                                                                     */
VKP_API void vkp_oneshot_close(vkp_oneshot *slot);

/* Sender: true once the receiver closed; and to wait for that: OK, TIMEOUT, INVALID.
   Sender's thread, before it sent.                                                            */
VKP_API bool vkp_oneshot_is_closed(const vkp_oneshot *slot);
VKP_API VKP_NODISCARD vkp_status vkp_oneshot_wait_closed(vkp_oneshot *slot, uint64_t deadline_ns);
