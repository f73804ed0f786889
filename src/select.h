/* --------------------------------------------------------------------------------------
   >>api-select   Wait for the first ready case

   A case is one thing to wait for: made by the functions below, a struct in the caller's memory,
   valid while the object that the case names is valid. A case is used in one of two ways:
   vkp_select (this thread waits until one case won and was carried out), or vkp_handler_open (a
   loop calls a handler while the case is ready).                                              */

#define VKP_SELECT_MAX 64 /* the most cases of one select */

typedef struct vkp_i_case_kind vkp_i_case_kind;

/* A case. Read `status` and `ready` of the case that won; the other fields are private. */
typedef struct vkp_case {
    /* Of the case that won: what the try form of its call returned. */
    vkp_status status;
    /* Of a vkp_case_fd that won: what the descriptor is ready for, bits of vkp_io_bits. */
    uint32_t ready;
    const vkp_i_case_kind *i_kind; /* private: the functions of the case */
    void *i_object;                /* private: the object that the case names */
    void *i_out;                   /* private: the value, or where to put it */
    uint64_t i_number;             /* private: a deadline, or a descriptor and its interest */
} vkp_case;

/* A case that receives as vkp_mpsc_try_recv does: ready when there is a value or the end of the
   channel; status OK or CLOSED. NULL rx: as vkp_case_never. NULL out: for vkp_handler_open only.
   Receiver's thread.                                                                          */
VKP_API vkp_case vkp_case_mpsc_recv(vkp_mpsc_rx *rx, void *out);

/* A case that receives as vkp_oneshot_try_recv does: ready when the sender sent or abandoned;
   status OK or CLOSED; INVALID when another wait of the receiver is under way, in the same select
   too. The slot stays open while the case does not win; a case that won never wins again. NULL
   slot: as vkp_case_never. NULL out: for vkp_handler_open only. Receiver's thread.            */
VKP_API vkp_case vkp_case_oneshot_recv(vkp_oneshot *slot, void *out);

/* A case that receives as vkp_broadcast_try_recv does: ready when there is a new value, values were
   lost, or no sender is left; status OK, LAGGED or CLOSED. NULL rx: as vkp_case_never. NULL out:
   for vkp_handler_open only. Receiver's thread.                                               */
VKP_API vkp_case vkp_case_broadcast_recv(vkp_broadcast_rx *rx, void *out);

/* A case that waits as vkp_watch_changed does: ready when there is a version not seen, which the
   case marks as seen (status OK), or no sender is left (CLOSED). NULL rx: as vkp_case_never.
   Receiver's thread.                                                                          */
VKP_API vkp_case vkp_case_watch_changed(vkp_watch_rx *rx);

/* A case that sends *item: status OK, CLOSED or NOMEM. While the case waits, it has a place in the
   queue of waiting senders; when another case wins, the case gives the place up, and the next
   sender gets the room. A value not sent stays the caller's. NULL tx or item: as vkp_case_never.
   Any thread.                                                                                 */
VKP_API vkp_case vkp_case_mpsc_send(vkp_mpsc_tx *tx, const void *item);

/* A case that reserves a place: status OK, CLOSED or NOMEM; INVALID if the channel has
   capacity_bytes. While the case waits, it has a place in the queue of waiting senders; when
   another case wins, the case gives the place up, and the next sender gets the room. NULL tx or
   permit: as vkp_case_never. Any thread.                                                      */
VKP_API vkp_case vkp_case_mpsc_reserve(vkp_mpsc_tx *tx, vkp_mpsc_permit *permit);

/* A case that is ready once the receiver closed or was given back: status OK. NULL tx: as
   vkp_case_never. Any thread.                                                                 */
VKP_API vkp_case vkp_case_mpsc_closed(vkp_mpsc_tx *tx);

/* A case that is ready once the receiver closed the slot: status OK; INVALID after send or abandon,
   and when another wait of the sender is under way. NULL slot: as vkp_case_never. Sender's thread,
   before send or abandon.                                                                     */
VKP_API vkp_case vkp_case_oneshot_closed(vkp_oneshot *slot);

/* A case that is ready while no receiver is left: status OK. NULL tx: as vkp_case_never. Any
   thread.                                                                                     */
VKP_API vkp_case vkp_case_broadcast_closed(vkp_broadcast_tx *tx);

/* A case that is ready while no receiver is left: status OK. NULL tx: as vkp_case_never. Any
   thread.                                                                                     */
VKP_API vkp_case vkp_case_watch_closed(vkp_watch_tx *tx);

/* A case that is ready once the token is cancelled: status OK. NULL token: as vkp_case_never. Any
   thread.                                                                                     */
VKP_API vkp_case vkp_case_cancel(vkp_cancel *token);

/* A case that is ready once the deadline passed: status OK. For vkp_select only; a loop has
   vkp_timer. Any thread.                                                                      */
VKP_API vkp_case vkp_case_deadline(uint64_t deadline_ns);

#ifndef VKP_NO_IO
/* A case that is ready when the descriptor is ready for interest (VKP_IO_READ, VKP_IO_WRITE), hung
   up or has an error: status OK, and `ready` set. For vkp_select only; a loop has vkp_io. The
   select then sleeps in poll(2), with a wake pipe opened for the sleep: a poll that fails makes the
   case win with status SYS, a pipe that fails makes vkp_select return SYS. fd below 0: as
   vkp_case_never. Any thread.                                                                 */
VKP_API vkp_case vkp_case_fd(int fd, uint32_t interest);
#endif

/* A case that is never ready, to leave a case of an array out by a condition. Any thread. */
VKP_API vkp_case vkp_case_never(void);

/* Wait until a case is ready, and carry out that case and no other. The first ready case in the
   array wins. *won is its index; cases[*won].status is the result of its call.
   Owns:   borrows cases
   Blocks: until deadline_ns (0: checks each case once)     In callbacks: ok with deadline 0
   Threads: a thread that is allowed to use the object of every case
   Errors: TIMEOUT (no case was ready: nothing was sent or received), SYS (no wake pipe for a
   vkp_case_fd), INVALID (a null argument; count 0 or above VKP_SELECT_MAX)                    */
VKP_API VKP_NODISCARD vkp_status vkp_select(vkp_case *cases, size_t count, uint64_t deadline_ns,
                                            size_t *won);

/* Wait until a case is ready, and carry out that case and no other, in turns: the search begins
   behind the case that won last, which *turn keeps (0 at first). A case that stays ready waits for
   at most count - 1 others. *won is the index of the case; cases[*won].status is the result of its
   call.
   Owns:   borrows cases
   Blocks: until deadline_ns (0: checks each case once)     In callbacks: ok with deadline 0
   Threads: a thread that is allowed to use the object of every case
   Errors: TIMEOUT (no case was ready: nothing was sent or received), SYS (no wake pipe for a
   vkp_case_fd), INVALID (a null argument; count 0 or above VKP_SELECT_MAX)                    */
VKP_API VKP_NODISCARD vkp_status vkp_select_fair(vkp_case *cases, size_t count, uint32_t *turn,
                                                 uint64_t deadline_ns, size_t *won);
