/* The engine of model.h: fibers and the search over choices, then memory, then the run of all
   models. Nothing in here is instrumented.                                                     */
#include "model.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#define MAIN MODEL_THREADS /* the caller of before and after, as a thread */
#define CLOCKS 8           /* threads and MAIN, rounded up for the vector unit */
#define LOCATIONS 128
#define HISTORY 16 /* values of one location that a load may still see */
#define MUTEXES 32
#define BLOCKS 512
#define CLASSES 8192u
#define STEPS 5000 /* more than any execution that gets on */
#define CHOICES 8192

#define HEAP_BYTES (1u << 20)
#define STACK_BYTES (1u << 16)
#define ARENA_BYTES (HEAP_BYTES + MODEL_THREADS * STACK_BYTES)
#define STATICS 256u

/* What a thread knows: how far every thread was when it last heard of it, by way of whom ever; and
   which value of each location is the oldest one that it may still see.                       */
typedef int16_t clocks __attribute__((vector_size(2 * CLOCKS)));

typedef struct view {
    clocks clock;
    uint8_t seen[LOCATIONS];
} view;

typedef struct message {
    uint64_t value;
    bool releases; /* `view` is what an acquiring reader learns */
    view view;
} message;

/* A place as it is known from one execution to the next: by who allocated it, as which of its
   blocks, at which offset. Where no two threads meet with one of them writing, stopping a thread
   shows nothing that stopping it later would not.                                             */
typedef struct place_class {
    uint64_t key;
    uint8_t readers;
    uint8_t writers;
    bool shared;
} place_class;

typedef struct location {
    uintptr_t place;
    place_class *class_of;
    uint8_t bytes;
    uint8_t newest;
    uint8_t newest_seq;
    message history[HISTORY];
} location;

/* Four bytes of the arena. The accesses are the clocks of the threads that made them. */
typedef struct cell {
    uint32_t run; /* the execution for which the rest holds */
    uint8_t location;
    bool freed;
    clocks plain_read;
    clocks plain_write;
    clocks atomic_read;
    clocks atomic_write;
} cell;

typedef struct block {
    uint32_t start;
    uint32_t bytes;
    uint8_t thread;
    uint16_t ordinal;
    int16_t clock;
    bool freed;
} block;

typedef struct mutex_state {
    unsigned holder; /* 0: free; otherwise the thread's number plus one */
    bool gone;
    place_class *class_of;
    view view;
} mutex_state;

typedef struct fiber {
    jmp_buf context;
    ucontext_t beginning;
    bool begun; /* has a context to go on with */
    view view;
    uintptr_t waits_for; /* a mutex or a futex */
    uint64_t deadline_ns;
    bool timed_out;
    uint16_t blocks;
    const struct model_site *last;
} fiber;

typedef struct choice {
    uint8_t picked;
    uint8_t options;
} choice;

static struct {
    const struct model *model;
    unsigned preemptions; /* bounds */
    unsigned stale;
    uint64_t executions;
    uint64_t outcomes;
    double until;
    bool learnt; /* a class turned out to be shared: begin again */
    bool mutant; /* a failure is what is wanted */
    bool tracing;
    choice choices[CHOICES];
    unsigned known; /* choices that are replayed */
} search;

static struct {
    uint32_t number;
    bool concurrent;
    unsigned depth;
    unsigned steps;
    unsigned preemptions;
    unsigned stale;
    unsigned unparks;
    unsigned thread;
    uint32_t ready; /* sets of threads, as bits */
    uint32_t timed; /* asleep with a deadline that may pass */
    uint32_t yielded;
    uint32_t living;
    uint64_t now_ns;
    uint32_t heap_used;
    unsigned blocks;
    unsigned locations;
    unsigned mutexes;
    char failure[600];
} run;

const struct model *model_now;
unsigned model_lost_unpark;
bool model_empty_barrier;

static fiber fibers[MODEL_THREADS + 1];
static jmp_buf driver;
static unsigned char *arena;
static cell *cells;
static uint16_t block_at[HEAP_BYTES / 16];
static block blocks[BLOCKS];
static location locations[LOCATIONS];
static mutex_state mutexes[MUTEXES];
static place_class classes[CLASSES];
static struct {
    uintptr_t place;
    cell cell;
} statics[STATICS];
static unsigned statics_used;

enum { OUTCOME_START, OUTCOME_ENDED, OUTCOME_FAILED };

unsigned model_thread(void)
{
    return run.thread;
}

void model_outcome(unsigned number)
{
    search.outcomes |= (uint64_t)1 << number;
}

uint64_t model_outcomes(void)
{
    return search.outcomes;
}

bool model_has_one_time(void)
{
    return run.stale == 0;
}

void model_note(const char *format, ...)
{
    va_list arguments;
    if (!search.tracing) {
        return;
    }
    if (run.thread == MAIN) {
        fputs("  main     ", stdout);
    } else {
        printf("  thread %u ", run.thread);
    }
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    putchar('\n');
}

void model_fail(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(run.failure, sizeof run.failure, format, arguments);
    va_end(arguments);
    _longjmp(driver, OUTCOME_FAILED);
}

/* ---------------------------------------------------------------------------------------------
   Choices and fibers                                                                           */

static unsigned choose(unsigned options)
{
    choice *next = &search.choices[run.depth];
    if (options == 1) {
        return 0;
    }
    if (run.depth == search.known) {
        if (run.depth == CHOICES) {
            model_fail("the checker: more than %d choices", CHOICES);
        }
        next->picked = 0;
        next->options = (uint8_t)options;
        search.known++;
    } else if (next->options != options) {
        model_fail("the checker: an execution cannot be repeated (%u options, then %u)",
                   next->options, options);
    }
    run.depth++;
    return next->picked;
}

/* To the next execution in depth-first order; false after the last one. */
static bool advance(void)
{
    search.known = run.depth;
    while (search.known > 0) {
        choice *last = &search.choices[search.known - 1];
        if (last->picked + 1 < last->options) {
            last->picked++;
            return true;
        }
        search.known--;
    }
    return false;
}

static void resume(unsigned thread)
{
    run.thread = thread;
    if (fibers[thread].begun) {
        _longjmp(fibers[thread].context, 1);
    }
    fibers[thread].begun = true;
    setcontext(&fibers[thread].beginning);
}

/* Decide who goes on. The thread that asks may be able to (can_stay), or waits, or has ended.
   That a deadline passes although another thread could run keeps that one from running: it counts
   as a preemption too, or threads that wait by small deadlines would go on for ever.          */
static bool reschedule(bool can_stay)
{
    uint32_t self = 1u << run.thread;
    bool stay = can_stay && (run.yielded & self) == 0;
    bool may_preempt = run.preemptions < search.preemptions;
    uint32_t others = run.ready & ~run.yielded & (stay ? ~self : ~0u);
    bool in_vain = others != 0; /* somebody could run whom a deadline would keep from it */
    unsigned picked;
    unsigned next;
    if (stay && !may_preempt) {
        return false;
    }
    if (!in_vain || may_preempt) {
        others |= run.timed;
    }
    if (stay && others == 0) {
        return false;
    }
    if (others == 0) {
        /* Only such are left as wait for a step of another one: let them look once more. */
        run.yielded = 0;
        others = run.ready;
    }
    if (others == 0) {
        model_fail("all threads wait for ever (a lost wake-up, or a deadlock)");
    }
    picked = choose((unsigned)__builtin_popcount(others) + (stay ? 1 : 0));
    if (stay) {
        if (picked == 0) {
            return false;
        }
        picked--;
    }
    while (picked-- > 0) {
        others &= others - 1;
    }
    next = (unsigned)__builtin_ctz(others);
    run.preemptions += stay || (in_vain && (run.timed & (1u << next)) != 0);
    if ((run.timed & (1u << next)) != 0) {
        run.timed &= ~(1u << next);
        run.ready |= 1u << next;
        fibers[next].timed_out = true;
        if (run.now_ns < fibers[next].deadline_ns) {
            run.now_ns = fibers[next].deadline_ns;
        }
    }
    if (next == run.thread) {
        return false;
    }
    if (_setjmp(fibers[run.thread].context) == 0) {
        resume(next);
    }
    return true;
}

static void wait_for(uintptr_t what, uint64_t deadline_ns)
{
    fiber *self = &fibers[run.thread];
    self->waits_for = what;
    self->deadline_ns = deadline_ns;
    self->timed_out = false;
    run.ready &= ~(1u << run.thread);
    if (deadline_ns != UINT64_MAX) {
        run.timed |= 1u << run.thread;
    }
    (void)reschedule(false);
    self->waits_for = 0;
}

static void wake_all(uintptr_t what)
{
    unsigned i;
    for (i = 0; i < MODEL_THREADS; i++) {
        if (fibers[i].waits_for == what && (run.living & (1u << i)) != 0) {
            run.ready |= 1u << i;
            run.timed &= ~(1u << i);
        }
    }
}

/* Before an operation that others may notice. True: others have run meanwhile. */
static bool point(bool shared)
{
    if (!run.concurrent) {
        return false;
    }
    if (++run.steps > STEPS) {
        model_fail("more than %d steps: a live-lock", STEPS);
    }
    return shared && reschedule(true);
}

/* After an operation that may end the spinning of others. */
static void stepped(void)
{
    run.yielded &= 1u << run.thread;
}

void model_step(void)
{
    (void)point(true);
    stepped();
}

void model_yield(void)
{
    if (run.concurrent) {
        run.yielded |= 1u << run.thread;
        (void)point(true);
    }
}

uint64_t model_clock_ns(void)
{
    return run.now_ns;
}

bool model_unpark_is_lost(void)
{
    return run.concurrent && ++run.unparks == model_lost_unpark;
}

static void fiber_main(int thread)
{
    for (;;) {
        search.model->thread((unsigned)thread);
        run.living &= ~(1u << thread);
        run.ready &= ~(1u << thread);
        stepped();
        if (_setjmp(fibers[thread].context) == 0) {
            if (run.living == 0) {
                _longjmp(driver, OUTCOME_ENDED);
            }
            (void)reschedule(false);
        }
    }
}

static void fibers_reset(void)
{
    int i;
    for (i = 0; i < MODEL_THREADS; i++) {
        fiber *each = &fibers[i];
        getcontext(&each->beginning);
        each->beginning.uc_stack.ss_sp = arena + HEAP_BYTES + (size_t)i * STACK_BYTES;
        each->beginning.uc_stack.ss_size = STACK_BYTES;
        each->beginning.uc_link = NULL;
        makecontext(&each->beginning, (void (*)(void))fiber_main, 1, i);
        each->begun = false;
    }
}

/* ---------------------------------------------------------------------------------------------
   Memory: what is known of a place                                                             */

static const char *describe(uintptr_t place)
{
    static char text[4][80];
    static unsigned turn;
    char *out = text[turn++ % 4];
    uintptr_t offset = place - (uintptr_t)arena;
    if (offset < HEAP_BYTES) {
        const block *in = &blocks[block_at[offset / 16]];
        snprintf(out, sizeof text[0], "block %u of %s%u (%u bytes) + %u", in->ordinal,
                 in->thread == MAIN ? "main, " : "thread ", in->thread, in->bytes,
                 (unsigned)(offset - in->start));
    } else if (offset < ARENA_BYTES) {
        offset -= HEAP_BYTES;
        snprintf(out, sizeof text[0], "stack of thread %u - %u", (unsigned)(offset / STACK_BYTES),
                 (unsigned)(STACK_BYTES - offset % STACK_BYTES));
    } else {
        snprintf(out, sizeof text[0], "static memory at %#lx", (unsigned long)place);
    }
    return out;
}

/* The function and line of a plain access: the one question put to another program, and only by an
   execution that failed. */
static void describe_code(const void *pc, char *out, size_t bytes)
{
    char command[120];
    char function[80] = "?";
    char line[200] = "?";
    FILE *answer;
    snprintf(command, sizeof command, "addr2line -sfe /proc/%d/exe %#lx 2>/dev/null", (int)getpid(),
             (unsigned long)(uintptr_t)pc - 1);
    answer = popen(command, "r");
    if (answer != NULL) {
        if (fgets(function, sizeof function, answer) == NULL ||
            fgets(line, sizeof line, answer) == NULL) {
            strcpy(line, "?");
        }
        pclose(answer);
    }
    function[strcspn(function, "\n")] = '\0';
    line[strcspn(line, "\n")] = '\0';
    snprintf(out, bytes, "%s (%s)", function, line);
}

static void fail_at(uintptr_t place, const void *pc, const char *what)
{
    char code[300] = "";
    if (search.tracing && pc != NULL) {
        describe_code(pc, code, sizeof code);
    }
    model_fail("%s: %s%s%s by thread %u", what, describe(place), code[0] != '\0' ? ", in " : "",
               code, run.thread);
}

static void begin_cell(cell *fresh, uintptr_t place, const void *pc)
{
    uintptr_t offset = place - (uintptr_t)arena;
    memset(fresh, 0, sizeof *fresh);
    fresh->run = run.number;
    if (offset < HEAP_BYTES) {
        const block *in = &blocks[block_at[offset / 16]];
        if (offset >= run.heap_used || offset < in->start || offset >= in->start + in->bytes) {
            fail_at(place, pc, "memory of nobody");
        }
        if (in->freed) {
            fail_at(place, pc, "memory used after it was freed");
        }
        fresh->plain_write[in->thread] = in->clock;
    }
}

/* Atomics outside the arena: variables of the library itself. */
static cell *static_cell(uintptr_t place)
{
    unsigned i = (unsigned)(place >> 2) % STATICS;
    while (statics[i].place != place) {
        if (statics[i].place == 0) {
            if (++statics_used == STATICS / 2) {
                model_fail("the checker: too many static atomics");
            }
            statics[i].place = place;
            break;
        }
        i = (i + 1) % STATICS;
    }
    return &statics[i].cell;
}

static cell *cell_of(uintptr_t place, const void *pc)
{
    uintptr_t offset = place - (uintptr_t)arena;
    cell *found = offset < ARENA_BYTES ? &cells[offset / 4] : static_cell(place);
    if (found->run != run.number) {
        begin_cell(found, place, pc);
    }
    if (found->freed) {
        fail_at(place, pc, "memory used after it was freed");
    }
    return found;
}

static const clocks unlimited = {INT16_MAX, INT16_MAX, INT16_MAX, INT16_MAX,
                                 INT16_MAX, INT16_MAX, INT16_MAX, INT16_MAX};

static bool any(clocks truth)
{
    typedef int64_t halves __attribute__((vector_size(16)));
    halves both = (halves)truth;
    return (both[0] | both[1]) != 0;
}

static void fail_race(const cell *at, uintptr_t place, const void *pc, const char *what)
{
    clocks clock = fibers[run.thread].view.clock;
    clocks kinds[4] = {at->plain_write, at->plain_read, at->atomic_write, at->atomic_read};
    static const char *const names[4] = {"write", "read", "atomic write", "atomic read"};
    char code[300] = "";
    unsigned kind;
    unsigned i;
    if (search.tracing && pc != NULL) {
        describe_code(pc, code, sizeof code);
    }
    for (kind = 0; kind < 4; kind++) {
        for (i = 0; i < CLOCKS; i++) {
            if (kinds[kind][i] > clock[i] && i != run.thread) {
                const struct model_site *last = fibers[i].last;
                model_fail("data race at %s: %s by thread %u%s%s, unordered with the %s by thread "
                           "%u (its last operation: %s in %s, line %d)",
                           describe(place), what, run.thread, code[0] != '\0' ? " in " : "", code,
                           names[kind], i, last != NULL ? last->what : "none",
                           last != NULL ? last->function : "?", last != NULL ? last->line : 0);
            }
        }
    }
    model_fail("data race at %s: %s by thread %u", describe(place), what, run.thread);
}

/* A thread that accesses a place twice before it tells anybody anything is looked at once: who
   comes between is caught by its own access.                                                  */
static void plain_read(uintptr_t place, const void *pc)
{
    cell *at = cell_of(place, pc);
    const view *self = &fibers[run.thread].view;
    int16_t clock = self->clock[run.thread];
    if (at->plain_read[run.thread] == clock || at->plain_write[run.thread] == clock) {
        return;
    }
    if (any((at->plain_write > self->clock) | (at->atomic_write > self->clock))) {
        fail_race(at, place, pc, "read");
    }
    at->plain_read[run.thread] = clock;
}

static void plain_write(uintptr_t place, const void *pc)
{
    cell *at = cell_of(place, pc);
    const view *self = &fibers[run.thread].view;
    int16_t clock = self->clock[run.thread];
    at->location = 0; /* an atomic that is set up anew: its history is over */
    if (at->plain_write[run.thread] == clock) {
        return;
    }
    if (any((at->plain_write > self->clock) | (at->plain_read > self->clock) |
            (at->atomic_write > self->clock) | (at->atomic_read > self->clock))) {
        fail_race(at, place, pc, "write");
    }
    at->plain_write[run.thread] = clock;
}

static void plain_range(uintptr_t place, size_t bytes, bool write, const void *pc)
{
    uintptr_t offset = place - (uintptr_t)arena;
    uintptr_t each;
    bool fresh = false;
    if (offset >= ARENA_BYTES || bytes == 0) {
        return;
    }
    if (write && offset < run.heap_used) {
        const block *in = &blocks[block_at[offset / 16]];
        fresh = in->thread == run.thread && !in->freed && offset >= in->start &&
                offset + bytes <= in->start + in->bytes &&
                in->clock == fibers[run.thread].view.clock[run.thread];
    }
    /* Of large values, each of whose copies is as long, one word in 16. */
    for (each = place & ~(uintptr_t)3; each<place + bytes; each += bytes> 256 ? 64 : 4) {
        if (fresh && cells[(each - (uintptr_t)arena) / 4].run != run.number) {
            continue; /* stands as written since its allocation a moment ago */
        }
        if (write) {
            plain_write(each, pc);
        } else {
            plain_read(each, pc);
        }
    }
}

/* The runtime of the compilers' instrumentation. */
#define HOOK(name, bytes, write)                                                      \
    void __tsan_##name(void *place);                                                  \
    void __tsan_##name(void *place)                                                   \
    {                                                                                 \
        plain_range((uintptr_t)place, (bytes), (write), __builtin_return_address(0)); \
    }
HOOK(read1, 1, false)
HOOK(read2, 2, false)
HOOK(read4, 4, false)
HOOK(read8, 8, false)
HOOK(read16, 16, false)
HOOK(write1, 1, true)
HOOK(write2, 2, true)
HOOK(write4, 4, true)
HOOK(write8, 8, true)
HOOK(write16, 16, true)
HOOK(unaligned_read2, 2, false)
HOOK(unaligned_read4, 4, false)
HOOK(unaligned_read8, 8, false)
HOOK(unaligned_read16, 16, false)
HOOK(unaligned_write2, 2, true)
HOOK(unaligned_write4, 4, true)
HOOK(unaligned_write8, 8, true)
HOOK(unaligned_write16, 16, true)

void __tsan_init(void);
void __tsan_init(void)
{
}
void __tsan_func_entry(void *caller);
void __tsan_func_entry(void *caller)
{
    (void)caller;
}
void __tsan_func_exit(void);
void __tsan_func_exit(void)
{
}
void __tsan_read_range(void *place, size_t bytes);
void __tsan_read_range(void *place, size_t bytes)
{
    plain_range((uintptr_t)place, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void *place, size_t bytes);
void __tsan_write_range(void *place, size_t bytes)
{
    plain_range((uintptr_t)place, bytes, true, __builtin_return_address(0));
}

/* The linker's --wrap: calls that the instrumentation leaves to its runtime. */
void *__real_memcpy(void *to, const void *from, size_t bytes);
void *__real_memmove(void *to, const void *from, size_t bytes);
void *__real_memset(void *to, int byte, size_t bytes);
void *__wrap_memcpy(void *to, const void *from, size_t bytes);
void *__wrap_memmove(void *to, const void *from, size_t bytes);
void *__wrap_memset(void *to, int byte, size_t bytes);
void *__wrap_memcpy(void *to, const void *from, size_t bytes)
{
    plain_range((uintptr_t)from, bytes, false, __builtin_return_address(0));
    plain_range((uintptr_t)to, bytes, true, __builtin_return_address(0));
    return __real_memcpy(to, from, bytes);
}
void *__wrap_memmove(void *to, const void *from, size_t bytes)
{
    plain_range((uintptr_t)from, bytes, false, __builtin_return_address(0));
    plain_range((uintptr_t)to, bytes, true, __builtin_return_address(0));
    return __real_memmove(to, from, bytes);
}
void *__wrap_memset(void *to, int byte, size_t bytes)
{
    plain_range((uintptr_t)to, bytes, true, __builtin_return_address(0));
    return __real_memset(to, byte, bytes);
}
int __real_memcmp(const void *a, const void *b, size_t bytes);
int __wrap_memcmp(const void *a, const void *b, size_t bytes);
int __wrap_memcmp(const void *a, const void *b, size_t bytes)
{
    plain_range((uintptr_t)a, bytes, false, __builtin_return_address(0));
    plain_range((uintptr_t)b, bytes, false, __builtin_return_address(0));
    return __real_memcmp(a, b, bytes);
}

/* ---------------------------------------------------------------------------------------------
   Memory: the allocator                                                                        */

static void *take_block(size_t bytes)
{
    uint32_t rounded = (uint32_t)((bytes + 15) & ~(size_t)15) + 16; /* nobody's bytes between */
    block *fresh = &blocks[run.blocks];
    uint32_t i;
    if (run.blocks == BLOCKS || bytes > HEAP_BYTES / 2 || run.heap_used + rounded > HEAP_BYTES) {
        model_fail("the checker: its heap is full");
    }
    fresh->start = run.heap_used;
    fresh->bytes = (uint32_t)bytes;
    fresh->thread = (uint8_t)run.thread;
    fresh->ordinal = fibers[run.thread].blocks++;
    fresh->clock = fibers[run.thread].view.clock[run.thread];
    fresh->freed = false;
    for (i = 0; i < rounded / 16; i++) {
        block_at[run.heap_used / 16 + i] = (uint16_t)run.blocks;
    }
    run.blocks++;
    run.heap_used += rounded;
    __real_memset(arena + fresh->start, 0xa5, bytes);
    return arena + fresh->start;
}

static void give_block(void *ptr, size_t bytes)
{
    uintptr_t offset = (uintptr_t)ptr - (uintptr_t)arena;
    block *in = &blocks[block_at[offset < HEAP_BYTES ? offset / 16 : 0]];
    uintptr_t each;
    if (offset >= run.heap_used || in->start != offset) {
        fail_at((uintptr_t)ptr, NULL, "freed, but never allocated");
    }
    if (in->freed || in->bytes != bytes) {
        fail_at((uintptr_t)ptr, NULL, in->freed ? "freed twice" : "freed with another size");
    }
    for (each = offset / 4; each < (offset + bytes + 3) / 4; each++) {
        if (cells[each].run == run.number) {
            plain_write((uintptr_t)arena + each * 4, NULL);
            cells[each].freed = true;
        }
    }
    in->freed = true;
}

void *model_alloc(void *user, void *ptr, size_t old_bytes, size_t new_bytes)
{
    void *fresh = NULL;
    (void)user;
    if (new_bytes > 0) {
        fresh = take_block(new_bytes);
        if (ptr != NULL) {
            __wrap_memcpy(fresh, ptr, old_bytes < new_bytes ? old_bytes : new_bytes);
        }
    }
    if (ptr != NULL) {
        give_block(ptr, old_bytes);
    }
    return fresh;
}

static void check_leaks(void)
{
    unsigned i;
    for (i = 0; i < run.blocks; i++) {
        if (!blocks[i].freed) {
            model_fail("never freed: %s", describe((uintptr_t)arena + blocks[i].start));
        }
    }
}

/* ---------------------------------------------------------------------------------------------
   Memory: atomics                                                                              */

static place_class *class_of(uintptr_t place)
{
    uintptr_t offset = place - (uintptr_t)arena;
    uint64_t key;
    unsigned i;
    if (offset < HEAP_BYTES) {
        const block *in = &blocks[block_at[offset / 16]];
        key = 1 + ((uint64_t)in->thread << 60 | (uint64_t)in->ordinal << 32 | (offset - in->start));
    } else {
        key = place;
    }
    i = (unsigned)((key * 0x9e3779b97f4a7c15u) >> 40) % CLASSES;
    while (classes[i].key != key) {
        if (classes[i].key == 0) {
            classes[i].key = key;
            break;
        }
        i = (i + 1) % CLASSES;
    }
    return &classes[i];
}

static void meet(place_class *at, bool write)
{
    uint8_t self = (uint8_t)(1u << run.thread);
    if (!run.concurrent) {
        return;
    }
    at->readers |= self;
    at->writers = (uint8_t)(at->writers | (write ? self : 0));
    if (!at->shared && at->writers != 0 && (at->readers & (at->readers - 1)) != 0) {
        at->shared = true;
        search.learnt = true;
    }
}

static uint64_t memory_read(uintptr_t place, unsigned bytes)
{
    switch (bytes) {
    case 1:
        return *(const uint8_t *)place;
    case 2:
        return *(const uint16_t *)place;
    case 4:
        return *(const uint32_t *)place;
    default:
        return *(const uint64_t *)place;
    }
}

static void memory_write(uintptr_t place, unsigned bytes, uint64_t value)
{
    switch (bytes) {
    case 1:
        *(uint8_t *)place = (uint8_t)value;
        break;
    case 2:
        *(uint16_t *)place = (uint16_t)value;
        break;
    case 4:
        *(uint32_t *)place = (uint32_t)value;
        break;
    default:
        *(uint64_t *)place = value;
        break;
    }
}

static uint64_t cut(uint64_t value, unsigned bytes)
{
    return bytes == 8 ? value : value & (((uint64_t)1 << (bytes * 8)) - 1);
}

static location *locate(cell *at, uintptr_t place, unsigned bytes)
{
    location *found = &locations[at->location];
    /* Set up anew by a write that nobody told of: clang leaves out some to a thread's own stack. */
    if (at->location == 0 ||
        (found->place == place &&
         memory_read(place, bytes) != found->history[found->newest % HISTORY].value)) {
        if (run.locations == LOCATIONS) {
            model_fail("the checker: too many atomic locations");
        }
        found = &locations[run.locations];
        found->place = place;
        found->class_of = class_of(place);
        found->bytes = (uint8_t)bytes;
        found->newest = 0;
        found->newest_seq = 0;
        found->history[0].value = memory_read(place, bytes);
        found->history[0].releases = false;
        at->location = (uint8_t)run.locations++;
    }
    found = &locations[at->location];
    if (found->bytes != bytes || found->place != place) {
        model_fail("atomic operations of different sizes at %s", describe(place));
    }
    return found;
}

/* The location before an operation, after whatever others do before it. */
static location *arrive(struct model_site *site, uintptr_t place, unsigned bytes, bool write)
{
    cell *at = cell_of(place, NULL);
    location *found = locate(at, place, bytes);
    const view *self;
    if (point(found->class_of->shared)) {
        at = cell_of(place, NULL);
        found = locate(at, place, bytes);
    }
    site->hits++;
    fibers[run.thread].last = site;
    meet(found->class_of, write);
    self = &fibers[run.thread].view;
    if (any((at->plain_write > self->clock) |
            (at->plain_read > (write ? self->clock : unlimited)))) {
        fail_race(at, place, NULL, write ? "atomic write" : "atomic read");
    }
    if (write) {
        at->atomic_write[run.thread] = self->clock[run.thread];
    } else {
        at->atomic_read[run.thread] = self->clock[run.thread];
    }
    return found;
}

static void join(view *into, const view *from)
{
    clocks newer = from->clock > into->clock;
    int i;
    into->clock = (from->clock & newer) | (into->clock & ~newer);
    for (i = 0; i < LOCATIONS; i++) {
        into->seen[i] = from->seen[i] > into->seen[i] ? from->seen[i] : into->seen[i];
    }
}

static unsigned index_of(const location *at)
{
    return (unsigned)(at - locations);
}

/* Reading a value: the reader cannot see an older one of this location any more. */
static void see(const location *at, unsigned which, unsigned order)
{
    view *self = &fibers[run.thread].view;
    const message *read = &at->history[which % HISTORY];
    if (self->seen[index_of(at)] < which) {
        self->seen[index_of(at)] = (uint8_t)which;
    }
    if ((order & MODEL_ACQUIRE) != 0 && read->releases) {
        join(self, &read->view);
    }
}

/* A new value, the newest. `continues` is the value that a RMW operation replaces: who acquires the
   new one learns also what the old one released. */
static void append(location *at, uint64_t value, unsigned order, const message *continues)
{
    view *self = &fibers[run.thread].view;
    message *fresh;
    if (at->newest == UINT8_MAX) {
        model_fail("the checker: more than 255 values at %s", describe(at->place));
    }
    at->newest++;
    self->seen[index_of(at)] = at->newest;
    if ((order & MODEL_SEQ) != 0) {
        at->newest_seq = at->newest;
    }
    fresh = &at->history[at->newest % HISTORY];
    fresh->value = value;
    fresh->releases = false;
    if ((order & MODEL_RELEASE) != 0) {
        fresh->releases = true;
        fresh->view = *self;
        self->clock[run.thread]++;
    }
    if (continues != NULL && continues->releases) {
        if (fresh->releases) {
            join(&fresh->view, &continues->view);
        } else {
            fresh->releases = true;
            fresh->view = continues->view;
        }
    }
    memory_write(at->place, at->bytes, value);
    stepped();
}

static unsigned oldest_visible(const location *at, unsigned order)
{
    unsigned oldest = fibers[run.thread].view.seen[index_of(at)];
    if ((order & MODEL_SEQ) != 0 && oldest < at->newest_seq) {
        oldest = at->newest_seq;
    }
    if (at->newest >= HISTORY && oldest < at->newest - HISTORY + 1u) {
        oldest = at->newest - HISTORY + 1u;
    }
    return oldest;
}

static void trace(const struct model_site *site, uintptr_t place, const char *text, uint64_t value)
{
    if (search.tracing) {
        model_note("%-28s %5d  %-11s %s%s %llu", site->function, site->line, site->what,
                   describe(place), text, (unsigned long long)value);
    }
}

uint64_t model_load(struct model_site *site, uintptr_t place, unsigned bytes)
{
    location *at = arrive(site, place, bytes, false);
    unsigned oldest = oldest_visible(at, site->order);
    unsigned which = at->newest;
    if (run.concurrent && oldest < which && run.stale < search.stale) {
        which -= choose(which - oldest + 1);
        run.stale += which != at->newest;
    }
    see(at, which, site->order);
    trace(site, place, which == at->newest ? " is" : " was", at->history[which % HISTORY].value);
    return at->history[which % HISTORY].value;
}

void model_store(struct model_site *site, uintptr_t place, unsigned bytes, uint64_t value)
{
    location *at = arrive(site, place, bytes, true);
    append(at, cut(value, bytes), site->order, NULL);
    trace(site, place, " =", cut(value, bytes));
}

uint64_t model_rmw(struct model_site *site, uintptr_t place, unsigned bytes,
                   enum model_operation operation, uint64_t operand)
{
    location *at = arrive(site, place, bytes, true);
    const message *last = &at->history[at->newest % HISTORY];
    uint64_t old = last->value;
    uint64_t value = operand;
    switch (operation) {
    case MODEL_XCHG:
        break;
    case MODEL_ADD:
        value = old + operand;
        break;
    case MODEL_SUB:
        value = old - operand;
        break;
    case MODEL_OR:
        value = old | operand;
        break;
    case MODEL_AND:
        value = old & operand;
        break;
    }
    see(at, at->newest, site->order);
    append(at, cut(value, bytes), site->order, last);
    trace(site, place, " becomes", cut(value, bytes));
    return old;
}

/* A comparison that fails is a load, which may see an old value too. */
bool model_cas(struct model_site *site, uintptr_t place, unsigned bytes, uint64_t *expected,
               uint64_t value)
{
    location *at = arrive(site, place, bytes, true);
    uint64_t wanted = cut(*expected, bytes);
    unsigned which = at->newest;
    if (run.concurrent && run.stale < search.stale) {
        unsigned oldest = oldest_visible(at, site->order);
        unsigned options = 1;
        unsigned picked;
        unsigned i;
        for (i = oldest; i < at->newest; i++) {
            options += at->history[i % HISTORY].value != wanted;
        }
        picked = choose(options);
        for (i = at->newest; picked > 0; picked--) {
            do {
                i--;
            } while (at->history[i % HISTORY].value == wanted);
            which = i;
        }
        run.stale += which != at->newest;
    }
    see(at, which, site->order);
    if (at->history[which % HISTORY].value != wanted) {
        *expected = at->history[which % HISTORY].value;
        trace(site, place, " stays", *expected);
        return false;
    }
    append(at, cut(value, bytes), site->order, &at->history[which % HISTORY]);
    trace(site, place, " becomes", cut(value, bytes));
    return true;
}

/* ---------------------------------------------------------------------------------------------
   Locks, sleep, barriers                                                                       */

void model_mutex_init(model_mutex *mutex)
{
    mutex_state *fresh = &mutexes[run.mutexes];
    if (run.mutexes == MUTEXES) {
        model_fail("the checker: too many locks");
    }
    plain_range((uintptr_t)mutex, sizeof *mutex, true, __builtin_return_address(0));
    memset(fresh, 0, sizeof *fresh);
    fresh->class_of = class_of((uintptr_t)mutex);
    mutex->index = 0xabcd0000u + run.mutexes++;
}

static mutex_state *mutex_of(const model_mutex *mutex)
{
    cell *at = cell_of((uintptr_t)mutex, __builtin_return_address(0));
    unsigned index = mutex->index - 0xabcd0000u;
    const view *self = &fibers[run.thread].view;
    if (index >= run.mutexes || mutexes[index].gone) {
        model_fail("no lock at %s", describe((uintptr_t)mutex));
    }
    if (any(at->plain_write > self->clock)) {
        fail_race(at, (uintptr_t)mutex, NULL, "use of a lock");
    }
    at->atomic_write[run.thread] = self->clock[run.thread];
    return &mutexes[index];
}

void model_mutex_deinit(model_mutex *mutex)
{
    mutex_state *at = mutex_of(mutex);
    plain_range((uintptr_t)mutex, sizeof *mutex, true, __builtin_return_address(0));
    if (at->holder != 0) {
        model_fail("a lock destroyed while thread %u holds it", at->holder - 1);
    }
    at->gone = true;
}

void model_lock(struct model_site *site, model_mutex *mutex)
{
    mutex_state *at = mutex_of(mutex);
    if (site->order != MODEL_LOCK) {
        return;
    }
    if (point(at->class_of->shared)) {
        at = mutex_of(mutex);
    }
    site->hits++;
    fibers[run.thread].last = site;
    meet(at->class_of, true);
    while (at->holder != 0) {
        if (at->holder == run.thread + 1) {
            model_fail("%s, line %d: takes a lock that it holds", site->function, site->line);
        }
        wait_for((uintptr_t)mutex, UINT64_MAX);
        at = mutex_of(mutex);
    }
    at->holder = run.thread + 1;
    join(&fibers[run.thread].view, &at->view);
    stepped();
    trace(site, (uintptr_t)mutex, " taken by", run.thread);
}

void model_unlock(struct model_site *site, model_mutex *mutex)
{
    mutex_state *at = mutex_of(mutex);
    if (at->holder != run.thread + 1) {
        if (search.mutant) {
            return; /* the lock was left out */
        }
        model_fail("%s, line %d: gives a lock that it does not hold", site->function, site->line);
    }
    site->hits++;
    fibers[run.thread].last = site;
    at->view = fibers[run.thread].view;
    fibers[run.thread].view.clock[run.thread]++;
    at->holder = 0;
    wake_all((uintptr_t)mutex);
    stepped();
    trace(site, (uintptr_t)mutex, " given by", run.thread);
}

bool model_sleep(uintptr_t place, uint32_t expected, uint64_t deadline_ns)
{
    if (*(const uint32_t *)place != expected) {
        return true;
    }
    if (!run.concurrent) {
        if (deadline_ns == UINT64_MAX) {
            model_fail("sleeps for ever, before or after all threads");
        }
        run.now_ns = deadline_ns > run.now_ns ? deadline_ns : run.now_ns;
        return false;
    }
    if (deadline_ns <= run.now_ns) {
        return false;
    }
    model_note("sleeps%s", deadline_ns == UINT64_MAX ? "" : " until a deadline");
    wait_for(place, deadline_ns);
    model_note(fibers[run.thread].timed_out ? "its deadline passes" : "is woken");
    return !fibers[run.thread].timed_out;
}

void model_wake(uintptr_t place)
{
    wake_all(place);
    stepped();
}

/* All stores so far are seen by all, as after a fence in each thread. It orders atomics only: plain
   memory is still handed over by a release and an acquire. */
void model_barrier(void)
{
    view all;
    unsigned i;
    (void)point(true);
    model_note("membarrier");
    memset(&all, 0, sizeof all);
    for (i = 0; i <= MAIN; i++) {
        join(&all, &fibers[i].view);
    }
    memset(&all.clock, 0, sizeof all.clock);
    for (i = 0; i <= MAIN; i++) {
        join(&fibers[i].view, &all);
    }
}

/* ---------------------------------------------------------------------------------------------
   One execution, one search                                                                    */

static bool execute(void)
{
    unsigned i;
    run.number++;
    memset((char *)&run + sizeof run.number, 0, sizeof run - sizeof run.number);
    run.thread = MAIN;
    run.locations = 1; /* 0 means none */
    run.now_ns = 1;
    for (i = 0; i <= MAIN; i++) {
        memset(&fibers[i].view, 0, sizeof fibers[i].view);
        fibers[i].view.clock[i] = 1;
        fibers[i].waits_for = 0;
        fibers[i].blocks = 0;
        fibers[i].last = NULL;
    }
    switch (_setjmp(driver)) {
    case OUTCOME_START:
        search.model->before();
        for (i = 0; i < search.model->threads; i++) {
            join(&fibers[i].view, &fibers[MAIN].view);
        }
        fibers[MAIN].view.clock[MAIN]++;
        run.living = run.ready = (1u << search.model->threads) - 1;
        run.concurrent = true;
        resume(choose(search.model->threads));
        return false;
    case OUTCOME_ENDED:
        run.concurrent = false;
        run.thread = MAIN;
        for (i = 0; i < search.model->threads; i++) {
            join(&fibers[MAIN].view, &fibers[i].view);
        }
        search.model->after();
        check_leaks();
        search.executions++;
        return true;
    default:
        fibers_reset();
        return false;
    }
}

/* All executions of the model within the bounds; ends at the first failure. */
static enum model_verdict explore(unsigned preemptions, unsigned stale)
{
    search.preemptions = preemptions;
    search.stale = stale;
    do {
        search.learnt = false;
        search.known = 0;
        search.executions = 0;
        do {
            if (!execute()) {
                return MODEL_FAILED;
            }
            if (search.executions % 4096 == 0 && model_seconds() > search.until) {
                return MODEL_UNFINISHED;
            }
        } while (!search.learnt && advance());
    } while (search.learnt);
    return MODEL_PASSED;
}

enum model_verdict model_check(const struct model *model, unsigned least, unsigned preemptions,
                               unsigned stale, double until, bool mutant, uint64_t *executions)
{
    enum model_verdict verdict = MODEL_PASSED;
    unsigned bound;
    memset(classes, 0, sizeof classes);
    search.model = model;
    search.mutant = mutant;
    search.until = until;
    search.outcomes = 0;
    model_now = model;
    for (bound = least; bound <= preemptions && verdict == MODEL_PASSED; bound++) {
        verdict = explore(bound, stale);
    }
    *executions = search.executions;
    return verdict;
}

void model_print_failure(void)
{
    printf("%s FAILED: %s\n", search.model->name, run.failure);
    search.known = run.depth;
    search.tracing = true;
    (void)execute();
    search.tracing = false;
    printf("  so: %s\n", run.failure);
    fflush(stdout);
}

const char *model_failure(void)
{
    return run.failure;
}

/* What a fault in the library may lead to: an execution that fails as others do. */
static void on_crash(int number)
{
    (void)number;
    model_fail("a crash: memory that is not there");
}

static void catch_crashes(void)
{
    static char stack[1 << 16]; /* that of a fiber may be what is not there */
    stack_t aside = {.ss_sp = stack, .ss_size = sizeof stack};
    struct sigaction action;
    __real_memset(&action, 0, sizeof action);
    action.sa_handler = on_crash;
    action.sa_flags = SA_ONSTACK | SA_NODEFER;
    if (sigaltstack(&aside, NULL) != 0 || sigaction(SIGSEGV, &action, NULL) != 0) {
        perror("sigaction");
        exit(2);
    }
}

void model_prepare(void)
{
    arena = mmap(NULL, ARENA_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    cells = mmap(NULL, ARENA_BYTES / 4 * sizeof *cells, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (arena == MAP_FAILED || cells == MAP_FAILED) {
        perror("mmap");
        exit(2);
    }
    fibers_reset();
    catch_crashes();
}
