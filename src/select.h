/* --------------------------------------------------------------------------------------
   >>api-select   Wait for whichever comes first

   A case is one thing that a thread can wait for: made by the functions below, in the caller's
   memory, valid while what it names is. It waits in one of two ways: vkp_select (this thread,
   until one case won and was carried out), or vkp_handler (a loop's callback).             */

#define VKP_SELECT_MAX 64 /* cases of one select */

typedef struct vkp_i_case_kind vkp_i_case_kind;

typedef struct vkp_case {
    vkp_status status; /* the winner's: what the try form of its call returned */
    uint32_t ready;    /* of the winner, for vkp_case_fd: bits of vkp_io_bits */
    const vkp_i_case_kind *i_kind;
    void *i_object;
    void *i_out;
    uint64_t i_number;
} vkp_case;

/* Receive. `out` as in the call of that name; status OK, CLOSED, or LAGGED. A one-shot that does
   not win stays open. NULL objects make a case that never wins, as vkp_case_never.             */
VKP_API vkp_case vkp_case_mpsc_recv(vkp_mpsc_rx *rx, void *out);
VKP_API vkp_case vkp_case_oneshot_recv(vkp_oneshot *slot, void *out);
VKP_API vkp_case vkp_case_broadcast_recv(vkp_broadcast_rx *rx, void *out);
VKP_API vkp_case vkp_case_watch_changed(vkp_watch_rx *rx);

/* Send: status OK, CLOSED, NOMEM. While it waits it stands in the senders' queue; when another case
   wins it leaves, and the next sender has the room. A value not sent stays the caller's.      */
VKP_API vkp_case vkp_case_mpsc_send(vkp_mpsc_tx *tx, const void *item);
VKP_API vkp_case vkp_case_mpsc_reserve(vkp_mpsc_tx *tx, vkp_mpsc_permit *permit);

/* The other side is gone: status OK. */
VKP_API vkp_case vkp_case_mpsc_closed(vkp_mpsc_tx *tx);
VKP_API vkp_case vkp_case_oneshot_closed(vkp_oneshot *slot);
VKP_API vkp_case vkp_case_broadcast_closed(vkp_broadcast_tx *tx);
VKP_API vkp_case vkp_case_watch_closed(vkp_watch_tx *tx);

/* Cancelled; the deadline passed; the descriptor is ready: status OK. A descriptor is for a select
   (a loop has vkp_io) and makes it sleep in poll(2), with a wake pipe opened for the sleep. Where
   poll fails the case wins with status SYS, where the pipe does vkp_select returns SYS. */
VKP_API vkp_case vkp_case_cancel(vkp_cancel *token);
VKP_API vkp_case vkp_case_deadline(uint64_t deadline_ns);
#ifndef VKP_NO_IO
VKP_API vkp_case vkp_case_fd(int fd, uint32_t interest);
#endif
VKP_API vkp_case vkp_case_never(void); /* to leave out a case by a condition */

/* Wait until a case can be carried out, and carry out that one and no other. Biased: of several
   that are ready the first in the array wins.
   Owns:   borrows cases; *won is the index, written on OK
   Blocks: until deadline_ns (0: looks once)     Threads: those of every case's object
   Errors: TIMEOUT (no case was ready: nothing was sent or taken), SYS, INVALID (count 0 or above
   VKP_SELECT_MAX)                                                                             */
VKP_API VKP_NODISCARD vkp_status vkp_select(vkp_case *cases, size_t count, uint64_t deadline_ns,
                                            size_t *won);

/* The same, fair: the search begins behind the case that won last, kept in *turn (0 at first). A
   case that stays ready waits for at most count - 1 others.                                   */
VKP_API VKP_NODISCARD vkp_status vkp_select_fair(vkp_case *cases, size_t count, uint32_t *turn,
                                                 uint64_t deadline_ns, size_t *won);
