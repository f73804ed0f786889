/* --------------------------------------------------------------------------------------
   >>api-typed   Channels of a type

   VKP_MPSC_TYPED(jobs, struct job) at file scope declares jobs_tx and jobs_rx, types that the
   compiler does not confuse with another channel's, and functions that take and give struct job:
   jobs_open, jobs_send ... Each one is an inline call of the function of that name in the channel's
   section, with the type in place of void: contract, errors and threads are those of that function.
   Values of 8, 24 and 64 bytes are moved without a call of memcpy.                            */

/* Makes a function of a typed channel inline, without a warning where the function is not used. */
#define VKP_TYPED_CALL static inline __attribute__((unused))

/* For the macros below: the types name_value, name_tx and name_rx, and the functions name_raw_tx,
   raw_rx, tx_ref, tx_unref, rx_unref.                                                         */
#define VKP_TYPED_ENDS(name, T, raw_tx_type, raw_rx_type, raw_tx_ref, raw_tx_unref, raw_rx_unref) \
    typedef T name##_value;                                                                       \
    typedef struct name##_tx name##_tx;                                                           \
    typedef struct name##_rx name##_rx;                                                           \
    VKP_TYPED_CALL raw_tx_type *name##_raw_tx(const name##_tx *tx)                                \
    {                                                                                             \
        return (raw_tx_type *)(uintptr_t)tx;                                                      \
    }                                                                                             \
    VKP_TYPED_CALL raw_rx_type *name##_raw_rx(const name##_rx *rx)                                \
    {                                                                                             \
        return (raw_rx_type *)(uintptr_t)rx;                                                      \
    }                                                                                             \
    VKP_TYPED_CALL name##_tx *name##_tx_ref(name##_tx *tx)                                        \
    {                                                                                             \
        return (name##_tx *)(uintptr_t)raw_tx_ref(name##_raw_tx(tx));                             \
    }                                                                                             \
    VKP_TYPED_CALL void name##_tx_unref(name##_tx *tx)                                            \
    {                                                                                             \
        raw_tx_unref(name##_raw_tx(tx));                                                          \
    }                                                                                             \
    VKP_TYPED_CALL void name##_rx_unref(name##_rx *rx)                                            \
    {                                                                                             \
        raw_rx_unref(name##_raw_rx(rx));                                                          \
    }

/* For the macros below: the function name_verb, which gives an end (`to`: tx or rx) from `from`. */
#define VKP_TYPED_GIVE(name, verb, from, to, raw_type, raw_call)                                  \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_##verb(name##_##from *self, name##_##to **end) \
    {                                                                                             \
        raw_type *raw;                                                                            \
        vkp_status status =                                                                       \
            end != NULL ? raw_call(name##_raw_##from(self), &raw) : VKP_ERR_INVALID;              \
        if (status == VKP_OK) {                                                                   \
            *end = (name##_##to *)(uintptr_t)raw;                                                 \
        }                                                                                         \
        return status;                                                                            \
    }

/* An mpsc channel of T: name_open, close, send, try_send, send_many, reserve, try_reserve, recv,
   try_recv, recv_many, peek, tx_clone, tx_ref, tx_unref, rx_unref, case_recv and case_send, as the
   vkp_mpsc_* and vkp_case_mpsc_* functions. name_open sets config.elem_bytes; a NULL config means
   all defaults. name_reserve and name_try_reserve also give the place of the value as *value.
   name_raw_tx and name_raw_rx give the handles for functions without a value: other cases,
   handlers, lengths, weak senders. Threads: as the function called.                           */
#define VKP_MPSC_TYPED(name, T)                                                                    \
    VKP_TYPED_ENDS(name, T, vkp_mpsc_tx, vkp_mpsc_rx, vkp_mpsc_tx_ref, vkp_mpsc_tx_unref,          \
                   vkp_mpsc_rx_unref)                                                              \
    VKP_TYPED_GIVE(name, tx_clone, tx, tx, vkp_mpsc_tx, vkp_mpsc_tx_clone)                         \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_open(const vkp_mpsc_config *config,             \
                                                        name##_tx **tx, name##_rx **rx)            \
    {                                                                                              \
        vkp_mpsc_config typed = VKP_ZERO;                                                          \
        vkp_mpsc_tx *raw_tx;                                                                       \
        vkp_mpsc_rx *raw_rx;                                                                       \
        vkp_status status;                                                                         \
        if (tx == NULL || rx == NULL) {                                                            \
            return VKP_ERR_INVALID;                                                                \
        }                                                                                          \
        if (config != NULL) {                                                                      \
            typed = *config;                                                                       \
        }                                                                                          \
        typed.elem_bytes = sizeof(name##_value);                                                   \
        status = vkp_mpsc_open(&typed, &raw_tx, &raw_rx);                                          \
        if (status == VKP_OK) {                                                                    \
            *tx = (name##_tx *)(uintptr_t)raw_tx;                                                  \
            *rx = (name##_rx *)(uintptr_t)raw_rx;                                                  \
        }                                                                                          \
        return status;                                                                             \
    }                                                                                              \
    VKP_TYPED_CALL void name##_close(name##_rx *rx)                                                \
    {                                                                                              \
        vkp_mpsc_close(name##_raw_rx(rx));                                                         \
    }                                                                                              \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_send(name##_tx *tx, name##_value value,         \
                                                        uint64_t deadline_ns)                      \
    {                                                                                              \
        return vkp_mpsc_send(name##_raw_tx(tx), &value, deadline_ns);                              \
    }                                                                                              \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_try_send(name##_tx *tx, name##_value value)     \
    {                                                                                              \
        return vkp_mpsc_try_send(name##_raw_tx(tx), &value);                                       \
    }                                                                                              \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_send_many(                                      \
        name##_tx *tx, const name##_value *values, size_t count, uint64_t deadline_ns,             \
        size_t *sent)                                                                              \
    {                                                                                              \
        return vkp_mpsc_send_many(name##_raw_tx(tx), values, count, deadline_ns, sent);            \
    }                                                                                              \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_reserve(                                        \
        name##_tx *tx, uint64_t deadline_ns, vkp_mpsc_permit *permit, name##_value **value)        \
    {                                                                                              \
        vkp_status status = value != NULL                                                          \
                                ? vkp_mpsc_reserve(name##_raw_tx(tx), deadline_ns, permit)         \
                                : VKP_ERR_INVALID;                                                 \
        if (status == VKP_OK) {                                                                    \
            *value = (name##_value *)permit->item;                                                 \
        }                                                                                          \
        return status;                                                                             \
    }                                                                                              \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_try_reserve(                                    \
        name##_tx *tx, vkp_mpsc_permit *permit, name##_value **value)                              \
    {                                                                                              \
        vkp_status status =                                                                        \
            value != NULL ? vkp_mpsc_try_reserve(name##_raw_tx(tx), permit) : VKP_ERR_INVALID;     \
        if (status == VKP_OK) {                                                                    \
            *value = (name##_value *)permit->item;                                                 \
        }                                                                                          \
        return status;                                                                             \
    }                                                                                              \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_recv(name##_rx *rx, uint64_t deadline_ns,       \
                                                        name##_value *out)                         \
    {                                                                                              \
        return vkp_mpsc_recv(name##_raw_rx(rx), deadline_ns, out);                                 \
    }                                                                                              \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_try_recv(name##_rx *rx, name##_value *out)      \
    {                                                                                              \
        return vkp_mpsc_try_recv(name##_raw_rx(rx), out);                                          \
    }                                                                                              \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_recv_many(                                      \
        name##_rx *rx, uint64_t deadline_ns, name##_value *out, size_t capacity, size_t *count)    \
    {                                                                                              \
        return vkp_mpsc_recv_many(name##_raw_rx(rx), deadline_ns, out, capacity, count);           \
    }                                                                                              \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_peek(name##_rx *rx, const name##_value **value) \
    {                                                                                              \
        const void *item;                                                                          \
        vkp_status status =                                                                        \
            value != NULL ? vkp_mpsc_peek(name##_raw_rx(rx), &item) : VKP_ERR_INVALID;             \
        if (status == VKP_OK) {                                                                    \
            *value = (const name##_value *)item;                                                   \
        }                                                                                          \
        return status;                                                                             \
    }                                                                                              \
    VKP_TYPED_CALL vkp_case name##_case_recv(name##_rx *rx, name##_value *out)                     \
    {                                                                                              \
        return vkp_case_mpsc_recv(name##_raw_rx(rx), out);                                         \
    }                                                                                              \
    VKP_TYPED_CALL vkp_case name##_case_send(name##_tx *tx, const name##_value *value)             \
    {                                                                                              \
        return vkp_case_mpsc_send(name##_raw_tx(tx), value);                                       \
    }                                                                                              \
    struct name##_tx /* lets a semicolon follow the macro */

/* A one-shot of T, at most VKP_ONESHOT_BYTES: the slot is the type `name`, in the caller's memory
   or from name_open. The functions are name_init, open, send, abandon, recv, try_recv, close,
   is_closed, wait_closed, tx_unref, rx_unref, case_recv and case_closed, as the vkp_oneshot_* and
   vkp_case_oneshot_* functions; name_init and name_open set elem_bytes. Threads: as the function
   called.                                                                                     */
#define VKP_ONESHOT_TYPED(name, T)                                                               \
    typedef T name##_value;                                                                      \
    typedef struct name {                                                                        \
        vkp_oneshot slot;                                                                        \
    } name;                                                                                      \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_init(                                         \
        name *self, const vkp_env *env, void (*drop)(void *user, void *item), void *user)        \
    {                                                                                            \
        return vkp_oneshot_init(&self->slot, env, sizeof(name##_value), drop, user);             \
    }                                                                                            \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_send(name *self, name##_value value)          \
    {                                                                                            \
        return vkp_oneshot_send(&self->slot, &value);                                            \
    }                                                                                            \
    VKP_TYPED_CALL void name##_abandon(name *self)                                               \
    {                                                                                            \
        vkp_oneshot_abandon((vkp_oneshot *)(uintptr_t)self);                                     \
    }                                                                                            \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_recv(name *self, uint64_t deadline_ns,        \
                                                        name##_value *out)                       \
    {                                                                                            \
        return vkp_oneshot_recv(&self->slot, deadline_ns, out);                                  \
    }                                                                                            \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_try_recv(name *self, name##_value *out)       \
    {                                                                                            \
        return vkp_oneshot_try_recv(&self->slot, out);                                           \
    }                                                                                            \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_open(                                         \
        const vkp_env *env, void (*drop)(void *user, void *item), void *user, name **self)       \
    {                                                                                            \
        vkp_oneshot *raw;                                                                        \
        vkp_status status = self != NULL                                                         \
                                ? vkp_oneshot_open(env, sizeof(name##_value), drop, user, &raw)  \
                                : VKP_ERR_INVALID;                                               \
        if (status == VKP_OK) {                                                                  \
            *self = (name *)(uintptr_t)raw;                                                      \
        }                                                                                        \
        return status;                                                                           \
    }                                                                                            \
    VKP_TYPED_CALL void name##_tx_unref(name *self)                                              \
    {                                                                                            \
        vkp_oneshot_tx_unref((vkp_oneshot *)(uintptr_t)self);                                    \
    }                                                                                            \
    VKP_TYPED_CALL void name##_rx_unref(name *self)                                              \
    {                                                                                            \
        vkp_oneshot_rx_unref((vkp_oneshot *)(uintptr_t)self);                                    \
    }                                                                                            \
    VKP_TYPED_CALL bool name##_is_closed(const name *self)                                       \
    {                                                                                            \
        return vkp_oneshot_is_closed(&self->slot);                                               \
    }                                                                                            \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_wait_closed(name *self, uint64_t deadline_ns) \
    {                                                                                            \
        return vkp_oneshot_wait_closed(&self->slot, deadline_ns);                                \
    }                                                                                            \
    VKP_TYPED_CALL vkp_case name##_case_recv(name *self, name##_value *out)                      \
    {                                                                                            \
        return vkp_case_oneshot_recv((vkp_oneshot *)(uintptr_t)self, out);                       \
    }                                                                                            \
    VKP_TYPED_CALL vkp_case name##_case_closed(name *self)                                       \
    {                                                                                            \
        return vkp_case_oneshot_closed((vkp_oneshot *)(uintptr_t)self);                          \
    }                                                                                            \
    VKP_TYPED_CALL void name##_close(name *self)                                                 \
    {                                                                                            \
        vkp_oneshot_close((vkp_oneshot *)(uintptr_t)self);                                       \
    }                                                                                            \
    struct name

/* A broadcast of T: name_open, send, recv, try_recv, recv_many, subscribe, resubscribe, tx_ref,
   tx_unref, rx_unref and case_recv, as the vkp_broadcast_* functions. name_open sets
   config.elem_bytes; a NULL config returns INVALID: capacity_items is required. name_raw_tx and
   name_raw_rx give the handles for functions without a value: other cases, handlers, lengths.
   Threads: as the function called.                                                            */
#define VKP_BROADCAST_TYPED(name, T)                                                            \
    VKP_TYPED_ENDS(name, T, vkp_broadcast_tx, vkp_broadcast_rx, vkp_broadcast_tx_ref,           \
                   vkp_broadcast_tx_unref, vkp_broadcast_rx_unref)                              \
    VKP_TYPED_GIVE(name, subscribe, tx, rx, vkp_broadcast_rx, vkp_broadcast_subscribe)          \
    VKP_TYPED_GIVE(name, resubscribe, rx, rx, vkp_broadcast_rx, vkp_broadcast_resubscribe)      \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_open(const vkp_broadcast_config *config,     \
                                                        name##_tx **tx)                         \
    {                                                                                           \
        vkp_broadcast_config typed = VKP_ZERO;                                                  \
        vkp_broadcast_tx *raw;                                                                  \
        vkp_status status;                                                                      \
        if (config == NULL || tx == NULL) {                                                     \
            return VKP_ERR_INVALID;                                                             \
        }                                                                                       \
        typed = *config;                                                                        \
        typed.elem_bytes = sizeof(name##_value);                                                \
        status = vkp_broadcast_open(&typed, &raw);                                              \
        if (status == VKP_OK) {                                                                 \
            *tx = (name##_tx *)(uintptr_t)raw;                                                  \
        }                                                                                       \
        return status;                                                                          \
    }                                                                                           \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_send(name##_tx *tx, name##_value value)      \
    {                                                                                           \
        return vkp_broadcast_send(name##_raw_tx(tx), &value);                                   \
    }                                                                                           \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_recv(name##_rx *rx, uint64_t deadline_ns,    \
                                                        name##_value *out)                      \
    {                                                                                           \
        return vkp_broadcast_recv(name##_raw_rx(rx), deadline_ns, out);                         \
    }                                                                                           \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_recv_many(                                   \
        name##_rx *rx, uint64_t deadline_ns, name##_value *out, size_t capacity, size_t *count) \
    {                                                                                           \
        return vkp_broadcast_recv_many(name##_raw_rx(rx), deadline_ns, out, capacity, count);   \
    }                                                                                           \
    VKP_TYPED_CALL vkp_case name##_case_recv(name##_rx *rx, name##_value *out)                  \
    {                                                                                           \
        return vkp_case_broadcast_recv(name##_raw_rx(rx), out);                                 \
    }                                                                                           \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_try_recv(name##_rx *rx, name##_value *out)   \
    {                                                                                           \
        return vkp_broadcast_try_recv(name##_raw_rx(rx), out);                                  \
    }                                                                                           \
    struct name##_tx

/* A watch of T: name_open, send, replace, get, get_and_update, borrow, borrow_and_update, release,
   changed, subscribe, rx_clone, tx_ref, tx_unref and rx_unref, as the vkp_watch_* functions.
   name_open sets config.elem_bytes, and takes the first value as an argument in place of
   config.initial (NULL: zeroes); a NULL config means all defaults. name_raw_tx and name_raw_rx give
   the handles for functions without a value: cases, handlers, marks, vkp_watch_send_if_modified.
   Threads: as the function called.                                                            */
#define VKP_WATCH_TYPED(name, T)                                                                \
    VKP_TYPED_ENDS(name, T, vkp_watch_tx, vkp_watch_rx, vkp_watch_tx_ref, vkp_watch_tx_unref,   \
                   vkp_watch_rx_unref)                                                          \
    VKP_TYPED_GIVE(name, subscribe, tx, rx, vkp_watch_rx, vkp_watch_subscribe)                  \
    VKP_TYPED_GIVE(name, rx_clone, rx, rx, vkp_watch_rx, vkp_watch_rx_clone)                    \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_open(                                        \
        const vkp_watch_config *config, const name##_value *initial, name##_tx **tx)            \
    {                                                                                           \
        vkp_watch_config typed = VKP_ZERO;                                                      \
        vkp_watch_tx *raw;                                                                      \
        vkp_status status;                                                                      \
        if (tx == NULL) {                                                                       \
            return VKP_ERR_INVALID;                                                             \
        }                                                                                       \
        if (config != NULL) {                                                                   \
            typed = *config;                                                                    \
        }                                                                                       \
        typed.elem_bytes = sizeof(name##_value);                                                \
        typed.initial = initial;                                                                \
        status = vkp_watch_open(&typed, &raw);                                                  \
        if (status == VKP_OK) {                                                                 \
            *tx = (name##_tx *)(uintptr_t)raw;                                                  \
        }                                                                                       \
        return status;                                                                          \
    }                                                                                           \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_send(name##_tx *tx, name##_value value)      \
    {                                                                                           \
        return vkp_watch_send(name##_raw_tx(tx), &value);                                       \
    }                                                                                           \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_replace(name##_tx *tx, name##_value value)   \
    {                                                                                           \
        return vkp_watch_replace(name##_raw_tx(tx), &value);                                    \
    }                                                                                           \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_get(name##_rx *rx, name##_value *out)        \
    {                                                                                           \
        return vkp_watch_get(name##_raw_rx(rx), out);                                           \
    }                                                                                           \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_get_and_update(name##_rx *rx,                \
                                                                  name##_value *out)            \
    {                                                                                           \
        return vkp_watch_get_and_update(name##_raw_rx(rx), out);                                \
    }                                                                                           \
    VKP_TYPED_CALL const name##_value *name##_borrow(name##_rx *rx)                             \
    {                                                                                           \
        return (const name##_value *)vkp_watch_borrow(name##_raw_rx(rx));                       \
    }                                                                                           \
    VKP_TYPED_CALL const name##_value *name##_borrow_and_update(name##_rx *rx)                  \
    {                                                                                           \
        return (const name##_value *)vkp_watch_borrow_and_update(name##_raw_rx(rx));            \
    }                                                                                           \
    VKP_TYPED_CALL void name##_release(name##_rx *rx)                                           \
    {                                                                                           \
        vkp_watch_release(name##_raw_rx(rx));                                                   \
    }                                                                                           \
    VKP_NODISCARD VKP_TYPED_CALL vkp_status name##_changed(name##_rx *rx, uint64_t deadline_ns) \
    {                                                                                           \
        return vkp_watch_changed(name##_raw_rx(rx), deadline_ns);                               \
    }                                                                                           \
    struct name##_tx
