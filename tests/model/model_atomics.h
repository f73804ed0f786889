/* The library's atomics and locks, handed to the model checker (VKP_I_ATOMICS_FILE).

   Each use of a macro below is a site of its own, with its place in the header and the order it
   asks for; the checker reads the order from the site, so that a run can weaken one site at a time
   without a second build.                                                                     */
#include <stdint.h>

#include "model.h"

#define MODEL_SITE(what, order)                                                                    \
    static struct model_site model_this_site = {what, __func__, __LINE__, (order), (order), 0, 0}; \
    static struct model_site *const model_this_entry                                               \
        __attribute__((section("model_sites"), used)) = &model_this_site

/* The type of a value read from p; the casts serve integers and pointers alike. */
#define MODEL_RESULT(p, call) (__typeof__(*(p)))(uintptr_t)(call)
#define MODEL_PLACE(p) &model_this_site, (uintptr_t)(p), (unsigned)sizeof(*(p))

#define MODEL_LOAD(p, what, order)                   \
    __extension__({                                  \
        MODEL_SITE(what, order);                     \
        MODEL_RESULT(p, model_load(MODEL_PLACE(p))); \
    })
#define MODEL_STORE(p, v, what, order)               \
    __extension__({                                  \
        MODEL_SITE(what, order);                     \
        model_store(MODEL_PLACE(p), (uintptr_t)(v)); \
    })
#define MODEL_RMW(p, v, what, order, operation)                                \
    __extension__({                                                            \
        MODEL_SITE(what, order);                                               \
        MODEL_RESULT(p, model_rmw(MODEL_PLACE(p), operation, (uintptr_t)(v))); \
    })
#define MODEL_CAS(p, expected, v, what, order)                                        \
    __extension__({                                                                   \
        MODEL_SITE(what, order);                                                      \
        uint64_t model_expected = (uint64_t)(uintptr_t)(*(expected));                 \
        bool model_done = model_cas(MODEL_PLACE(p), &model_expected, (uintptr_t)(v)); \
        if (!model_done) {                                                            \
            *(expected) = (__typeof__(*(p)))(uintptr_t)model_expected;                \
        }                                                                             \
        model_done;                                                                   \
    })

#define VKP_I_LOAD(p) MODEL_LOAD(p, "LOAD", MODEL_RELAXED)
#define VKP_I_LOAD_ACQ(p) MODEL_LOAD(p, "LOAD_ACQ", MODEL_ACQUIRE)
#define VKP_I_LOAD_SEQ(p) MODEL_LOAD(p, "LOAD_SEQ", MODEL_ACQUIRE | MODEL_SEQ)
#define VKP_I_STORE(p, v) MODEL_STORE(p, v, "STORE", MODEL_RELAXED)
#define VKP_I_STORE_REL(p, v) MODEL_STORE(p, v, "STORE_REL", MODEL_RELEASE)
#define VKP_I_STORE_SEQ(p, v) MODEL_STORE(p, v, "STORE_SEQ", MODEL_RELEASE | MODEL_SEQ)
#define VKP_I_XCHG(p, v) MODEL_RMW(p, v, "XCHG", MODEL_ACQ_REL, MODEL_XCHG)
#define VKP_I_XCHG_SEQ(p, v) MODEL_RMW(p, v, "XCHG_SEQ", MODEL_ACQ_REL | MODEL_SEQ, MODEL_XCHG)
#define VKP_I_CAS(p, expected, v) MODEL_CAS(p, expected, v, "CAS", MODEL_ACQ_REL)
#define VKP_I_CAS_SEQ(p, expected, v) \
    MODEL_CAS(p, expected, v, "CAS_SEQ", MODEL_ACQ_REL | MODEL_SEQ)
#define VKP_I_ADD(p, v) MODEL_RMW(p, v, "ADD", MODEL_RELAXED, MODEL_ADD)
#define VKP_I_SUB(p, v) MODEL_RMW(p, v, "SUB", MODEL_RELAXED, MODEL_SUB)
#define VKP_I_UNREF(p) MODEL_RMW(p, 1, "UNREF", MODEL_ACQ_REL, MODEL_SUB)
#define VKP_I_SUB_ACQ_REL(p, v) MODEL_RMW(p, v, "SUB_ACQ_REL", MODEL_ACQ_REL, MODEL_SUB)
#define VKP_I_ADD_ACQ_REL(p, v) MODEL_RMW(p, v, "ADD_ACQ_REL", MODEL_ACQ_REL, MODEL_ADD)
#define VKP_I_OR(p, v) MODEL_RMW(p, v, "OR", MODEL_ACQ_REL, MODEL_OR)
#define VKP_I_AND(p, v) MODEL_RMW(p, v, "AND", MODEL_ACQ_REL, MODEL_AND)

/* Who runs: the fibers share the one thread that the system knows. */
#define VKP_I_SELF() ((uintptr_t)(model_thread() + 2))

#define VKP_I_PAUSE() model_yield()
/* Keeps the compiler from moving a load over a store; the checker moves none. */
#define VKP_I_ORDER() ((void)0)
/* Seen by the race detector through the calls to memcpy. */
#define VKP_I_COPY_IN(slot, src, bytes) ((void)memcpy((slot), (src), (bytes)))
#define VKP_I_COPY_OUT(dst, slot, bytes) ((void)memcpy((dst), (slot), (bytes)))

#define VKP_I_MUTEX model_mutex
#define VKP_I_MUTEX_INIT(m) model_mutex_init((m))
#define VKP_I_MUTEX_DEINIT(m) model_mutex_deinit((m))
#define VKP_I_LOCK(m)                      \
    __extension__({                        \
        MODEL_SITE("LOCK", MODEL_LOCK);    \
        model_lock(&model_this_site, (m)); \
    })
#define VKP_I_UNLOCK(m)                      \
    __extension__({                          \
        MODEL_SITE("UNLOCK", MODEL_LOCK);    \
        model_unlock(&model_this_site, (m)); \
    })
