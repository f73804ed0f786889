/* --------------------------------------------------------------------------------------
   >>api-oneshot   One value, once, in the caller's memory                                     */

#define VKP_ONESHOT_BYTES 48 /* the largest value of a one-shot */

/* A slot: the memory of a one-shot, on the receiver's side (a stack is fine): no allocation, no
   handle. The fields are private. The sender may use the slot until send or abandon; the receiver
   until recv returned or the receiver closed. The library's own senders (vkp_client_command)
   detach themselves when the receiver closes. With a sender of the program the slot must outlive
   the sender, or be made by vkp_oneshot_open.                                                 */
struct vkp_oneshot {
    uint32_t i_state;      /* which side finished first, and which side waits */
    uint32_t i_elem_bytes; /* bytes of the value */
    void *i_receiver;      /* the receiver's waiter */
    void *i_sender;        /* the sender's waiter */
    void *i_owner;         /* the sender's record, for i_detach */
    void (*i_detach)(struct vkp_oneshot *slot); /* makes the sender forget this slot */
    void (*i_drop)(void *user, void *item);     /* called on a value never received; or NULL */
    void *i_user;                               /* the first argument of i_drop */
    const vkp_env *i_env;                       /* the env of init or open */
    union {
        void *align_pointer;                    /* aligns bytes */
        uint64_t align_u64;                     /* aligns bytes */
        unsigned char bytes[VKP_ONESHOT_BYTES]; /* the first i_elem_bytes are the value */
    } i_value;                                  /* the value, aligned to 8 */
};

/* Prepare a slot for one value. A NULL env means the defaults. `drop` (may be NULL) is called once,
   with user, on a value that is sent and never received.
   Owns:   slot stays the caller's     Blocks: never     In callbacks: ok
   Threads: any, before the sender gets the slot
   Errors: INVALID (slot is NULL; elem_bytes 0 or above VKP_ONESHOT_BYTES)                     */
VKP_API VKP_NODISCARD vkp_status vkp_oneshot_init(vkp_oneshot *slot, const vkp_env *env,
                                                  size_t elem_bytes,
                                                  void (*drop)(void *user, void *item), void *user);

/* Allocate a slot and prepare it as vkp_oneshot_init does, for sides that end in any order. *slot
   has two references, one for each side: the sender gives its own back with vkp_oneshot_tx_unref,
   the receiver with vkp_oneshot_rx_unref. NULL env and NULL drop are allowed.
   Owns:   gives *slot, twice     Blocks: never     Threads: any     In callbacks: ok
   Errors: NOMEM, INVALID (slot is NULL; elem_bytes 0 or above VKP_ONESHOT_BYTES)              */
VKP_API VKP_NODISCARD vkp_status vkp_oneshot_open(const vkp_env *env, size_t elem_bytes,
                                                  void (*drop)(void *user, void *item), void *user,
                                                  vkp_oneshot **slot);

/* Sender: abandon the slot if no value was sent, and give the sender's reference back. For slots of
   vkp_oneshot_open. NULL is ignored. Sender's thread.                                         */
VKP_API void vkp_oneshot_tx_unref(vkp_oneshot *slot);

/* Receiver: close the slot, and give the receiver's reference back. For slots of vkp_oneshot_open.
   NULL is ignored. Receiver's thread.                                                         */
VKP_API void vkp_oneshot_rx_unref(vkp_oneshot *slot);

/* Sender: deliver the value and wake the receiver. The slot is not touched afterwards.
   Owns:   takes what *item owns (on failure it stays the caller's)
   Blocks: never     Threads: the sender's, once     In callbacks: ok
   Errors: CLOSED (the receiver closed first), INVALID (null argument; sent or abandoned before) */
VKP_API VKP_NODISCARD vkp_status vkp_oneshot_send(vkp_oneshot *slot, const void *item);

/* Sender: finish without a value; the receiver gets CLOSED. The slot is not touched afterwards. A
   call after a send does nothing; NULL is ignored. Sender's thread.                           */
VKP_API void vkp_oneshot_abandon(vkp_oneshot *slot);

/* Receiver: wait for the value until the deadline. After OK, CLOSED and TIMEOUT the slot is
   closed. Its memory may be reused after OK and CLOSED; after TIMEOUT too if the sender is the
   library's (vkp_client_command). A sender of the program gets CLOSED then, and still uses the
   slot, which must outlive that sender.
   Owns:   gives what *out owns
   Blocks: until deadline_ns     Threads: the receiver's     In callbacks: would stall the loop
   Errors: CLOSED (the sender abandoned the slot, or the slot was closed before), TIMEOUT, INVALID
   (a null argument; another wait of the receiver is under way: the slot stays open)           */
VKP_API VKP_NODISCARD vkp_status vkp_oneshot_recv(vkp_oneshot *slot, uint64_t deadline_ns,
                                                  void *out);

/* Receiver: take the value if it is there. After OK and CLOSED the slot is closed: its memory may
   be reused. EMPTY leaves the slot open.
   Owns:   gives what *out owns     Blocks: never     Threads: the receiver's     In callbacks: ok
   Errors: EMPTY (nothing was sent yet), CLOSED (the sender abandoned the slot, or the slot was
   closed before), INVALID                                                                     */
VKP_API VKP_NODISCARD vkp_status vkp_oneshot_try_recv(vkp_oneshot *slot, void *out);

/* Receiver: refuse the value; a value that was sent already is dropped through `drop`.
   Afterwards the memory of a slot that vkp_client_command initialised may be reused; a slot with
   a sender of the program must outlive that sender. Idempotent; NULL is ignored. Receiver's
   thread. */
VKP_API void vkp_oneshot_close(vkp_oneshot *slot);

/* Sender: true once the receiver closed the slot. Sender's thread, before send or abandon. */
VKP_API bool vkp_oneshot_is_closed(const vkp_oneshot *slot);

/* Sender: wait until the receiver closes the slot.
   Blocks: until deadline_ns     In callbacks: would stall the loop
   Threads: the sender's, before send or abandon
   Errors: TIMEOUT, INVALID (slot is NULL; sent or abandoned before, and the receiver has not closed
   since; another wait of the sender is under way)                                             */
VKP_API VKP_NODISCARD vkp_status vkp_oneshot_wait_closed(vkp_oneshot *slot, uint64_t deadline_ns);
