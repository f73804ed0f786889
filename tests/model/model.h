/* A model checker for the real code of valkey_push.h: runs it on fibers, in every order of its
   atomic operations and with every value that a weak memory may give them, up to a bound.

   A MODEL is a scenario of two to four threads that use the library. One EXECUTION of it is a
   sequence of choices: which thread goes on at each point where another one could notice, and
   which of the values written so far a load sees. The search is depth first over these choices.
   It is complete up to two bounds: `preemptions`, how often a thread is stopped that could go on
   (a switch away from one that waits costs nothing), and `stale`, how many loads see another value
   than the newest.

   MEMORY is that of C11 without what runs ahead of its own thread (a load never sees a value not
   yet written). Each atomic location keeps the history of its values; each thread knows, for each
   location, the newest value that it must have seen. A load may return any value from that one on;
   release and acquire hand the knowledge over, RMW operations see the newest value, SEQ operations
   never an older one than the newest of a SEQ store. A thread whose store another one does not see
   yet is what processors with store buffers show, and all that Dekker's handshake needs to fail.

   PLAIN memory is watched through the compiler's own instrumentation for ThreadSanitizer, whose
   runtime is replaced by the checker's: any two accesses of one place, one of them a write, that
   no release and acquire order, are a DATA RACE. Memory of the library comes from the checker's
   allocator, is not handed out twice in one execution, and may not be touched once it was freed.

   FAILURES: a check of the model, a data race, memory used after its end or never given back, all
   threads waiting for ever (a lost wake-up), more steps than any execution needs (a live-lock).
   A failing execution is run once more and printed step by step.                              */
#ifndef MODEL_H
#define MODEL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* ---------------------------------------------------------------------------------------------
   For the models                                                                              */

#define MODEL_THREADS 5

struct model {
    char name[72];
    unsigned threads;
    unsigned preemptions; /* the bounds of the ordinary run */
    unsigned stale;
    bool no_barrier;          /* the system refuses membarrier */
    uint32_t spins;           /* how often threads look again before they sleep */
    void (*before)(void);     /* alone, before the threads start */
    void (*thread)(unsigned); /* thread 0, 1, ... */
    void (*after)(void);      /* alone, when all have ended */
    uint64_t scenario[4];     /* the family's own, read through model_now */
    const char *fails;        /* a model of the checker itself: how its failure begins */
    uint64_t outcomes;        /* the same, that passes: all numbers it hands to model_outcome */
};

void model_add(const struct model *model);
extern const struct model *model_now; /* the one that is running */

void model_fail(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));

#define MODEL_CHECK(condition)                                       \
    do {                                                             \
        if (!(condition)) {                                          \
            model_fail("%s:%d: %s", __FILE__, __LINE__, #condition); \
        }                                                            \
    } while (0)

unsigned model_thread(void); /* which thread calls; MODEL_THREADS: before or after */

/* One execution came to this end, 0 to 63. */
void model_outcome(unsigned number);

/* Whether every load so far saw the newest value. Only then is there one time for all threads: what
   has returned in one may be expected by another, though nothing told it so.                  */
bool model_has_one_time(void);

/* Printed between the steps of a failing execution. */
void model_note(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* ---------------------------------------------------------------------------------------------
   For what the library is given instead of its atomics and its operating system               */

/* Bits: what an operation does for the order of others. LOCK marks sites of locks. */
#define MODEL_RELAXED 0u
#define MODEL_ACQUIRE 1u
#define MODEL_RELEASE 2u
#define MODEL_ACQ_REL 3u
#define MODEL_SEQ 4u
#define MODEL_LOCK 8u

struct model_site {
    const char *what;
    const char *function;
    int line;
    unsigned order;   /* in force */
    unsigned written; /* as the header asks */
    uint32_t hits;    /* in the run of one model */
    uint32_t index;
};

enum model_operation { MODEL_XCHG, MODEL_ADD, MODEL_SUB, MODEL_OR, MODEL_AND };

uint64_t model_load(struct model_site *site, uintptr_t place, unsigned bytes);
void model_store(struct model_site *site, uintptr_t place, unsigned bytes, uint64_t value);
uint64_t model_rmw(struct model_site *site, uintptr_t place, unsigned bytes,
                   enum model_operation operation, uint64_t operand);
bool model_cas(struct model_site *site, uintptr_t place, unsigned bytes, uint64_t *expected,
               uint64_t value);

typedef struct model_mutex {
    uint32_t index; /* into the checker's table */
} model_mutex;

void model_mutex_init(model_mutex *mutex);
void model_mutex_deinit(model_mutex *mutex);
void model_lock(struct model_site *site, model_mutex *mutex);
void model_unlock(struct model_site *site, model_mutex *mutex);

/* Before what others may notice although it is no atomic operation: a call of the system. */
void model_step(void);

/* Let another thread make a step, if any can. */
void model_yield(void);

/* The futex: sleep until woken, unless the newest value at `place` is another one already. False
   when the deadline passed, which it does at any time.                                        */
bool model_sleep(uintptr_t place, uint32_t expected, uint64_t deadline_ns);
void model_wake(uintptr_t place);

uint64_t model_clock_ns(void);
void model_barrier(void); /* membarrier: a full barrier on all threads */
void *model_alloc(void *user, void *ptr, size_t old_bytes, size_t new_bytes);

/* The faults of the system that a run may seed. */
extern unsigned model_lost_unpark; /* the n-th unpark of each execution does nothing; 0: none */
extern bool model_empty_barrier;   /* membarrier does nothing and says that it did */
bool model_unpark_is_lost(void);

/* ---------------------------------------------------------------------------------------------
   For the runner                                                                              */

enum model_verdict { MODEL_PASSED, MODEL_FAILED, MODEL_UNFINISHED };

void model_prepare(void);
double model_seconds(void);

/* All executions of the model within the bounds, unless one fails or the time is over; first with
   `least` preemptions, so that what fails does so in a short form. In a mutant, failures are
   expected and locks may be missing.                                                          */
enum model_verdict model_check(const struct model *model, unsigned least, unsigned preemptions,
                               unsigned stale, double until, bool mutant, uint64_t *executions);
const char *model_failure(void);
uint64_t model_outcomes(void);  /* of the check before, as a set of bits */
void model_print_failure(void); /* of the check before, step by step */

#endif
