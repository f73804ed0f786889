/* The library under test, with the checker's atomics, and the system that it is given: the part of
   vkp_sys that channels use. The library's own system functions run too, on the checker's futex,
   clock and membarrier.                                                                       */
#include <errno.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdarg.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static long checkers_syscall(long number, ...);
static int checkers_clock(clockid_t clock, struct timespec *now);
static int checkers_yield(void);
#define syscall checkers_syscall
#define clock_gettime checkers_clock
#define sched_yield checkers_yield

#define VKP_IMPLEMENTATION
#define VKP_NO_IO
#define VKP_I_ATOMICS_FILE "model_atomics.h"
#include "valkey_push.h"

#include "environment.h"

#define REGISTER_PRIVATE_EXPEDITED (1 << 4)
#define PRIVATE_EXPEDITED (1 << 3)

static int checkers_clock(clockid_t clock, struct timespec *now)
{
    uint64_t ns = model_clock_ns();
    MODEL_CHECK(clock == CLOCK_MONOTONIC);
    now->tv_sec = (time_t)(ns / VKP_I_NS_PER_S);
    now->tv_nsec = (long)(ns % VKP_I_NS_PER_S);
    return 0;
}

static int checkers_yield(void)
{
    model_yield();
    return 0;
}

static void checkers_futex(uint32_t *place, int operation, uint32_t value,
                           const struct timespec *until)
{
    if (operation == (FUTEX_WAIT_BITSET | FUTEX_PRIVATE_FLAG)) {
        (void)model_sleep((uintptr_t)place, value,
                          until == NULL ? VKP_FOREVER
                                        : (uint64_t)until->tv_sec * VKP_I_NS_PER_S +
                                              (uint64_t)until->tv_nsec);
    } else {
        MODEL_CHECK(operation == (FUTEX_WAKE | FUTEX_PRIVATE_FLAG));
        model_wake((uintptr_t)place);
    }
}

static long checkers_syscall(long number, ...)
{
    va_list arguments;
    va_start(arguments, number);
    if (number == VKP_I_FUTEX) {
        uint32_t *place = va_arg(arguments, uint32_t *);
        int operation = va_arg(arguments, int);
        uint32_t value = va_arg(arguments, uint32_t);
        const struct timespec *until = operation == (FUTEX_WAKE | FUTEX_PRIVATE_FLAG)
                                           ? NULL
                                           : va_arg(arguments, struct timespec *);
        checkers_futex(place, operation, value, until);
    } else {
        int command = va_arg(arguments, int);
        MODEL_CHECK(number == SYS_membarrier);
        MODEL_CHECK(command == REGISTER_PRIVATE_EXPEDITED || command == PRIVATE_EXPEDITED);
        if (model_now->no_barrier) {
            va_end(arguments);
            errno = ENOSYS;
            return -1;
        }
        if (command == PRIVATE_EXPEDITED && !model_empty_barrier) {
            model_barrier();
        }
    }
    va_end(arguments);
    return 0;
}

/* The contract of park and unpark in the fewest steps; that the library's own keep it is shown by
   the models of the parker.                                                                   */
static void park(vkp_parker *parker, uint64_t deadline_ns)
{
    while (VKP_I_LOAD_ACQ(&parker->state) != VKP_I_PARK_NOTIFIED) {
        if (!model_sleep((uintptr_t)&parker->state, VKP_I_PARK_EMPTY, deadline_ns)) {
            return;
        }
    }
}

static void unpark(vkp_parker *parker)
{
    uintptr_t place = (uintptr_t)&parker->state;
    if (!model_unpark_is_lost()) {
        (void)VKP_I_XCHG(&parker->state, VKP_I_PARK_NOTIFIED);
        model_wake(place);
    }
}

/* A pause lets other threads go on; the yields after it would do so eight times more, and each way
   back to a thread that spins would cost a preemption: it would never come to sleep.          */
static void stay(void)
{
}

static uint32_t processors(void)
{
    return 2;
}

const vkp_env *environment(void)
{
    static vkp_sys sys;
    static vkp_env env;
    sys = *vkp_sys_get_default();
    (void)sys.processors(); /* is remembered from one execution to the next: so know it at once */
    sys.park = park;
    sys.unpark = unpark;
    sys.yield = stay;
    sys.processors = processors;
    env.alloc = model_alloc;
    env.sys = &sys;
    env.spins = model_now->spins > 0 ? model_now->spins : VKP_SPINS_NONE;
    return &env;
}

/* ---- the parker ---- */

static struct {
    vkp_parker *parker;
    unsigned woken;
    unsigned timeouts;
} now;

static void parker_before(void)
{
    memset(&now, 0, sizeof now);
    now.parker = (vkp_parker *)model_alloc(NULL, NULL, 0, sizeof *now.parker);
    vkp_i_parker_init(now.parker);
}

/* Thread 0 parks as often as the scenario says, the last time for ever; the others unpark once. */
static void parker_thread(unsigned self)
{
    uint64_t i;
    if (self > 0) {
        vkp_i_os_unpark(now.parker);
        return;
    }
    for (i = 0; i + 1 < model_now->scenario[0]; i++) {
        vkp_i_os_park(now.parker, 1000 * (i + 1));
        if (vkp_i_parker_notified(now.parker)) {
            now.woken++;
            return;
        }
        MODEL_CHECK(model_clock_ns() >= 1000 * (i + 1));
        now.timeouts++;
    }
    vkp_i_os_park(now.parker, VKP_FOREVER);
    MODEL_CHECK(vkp_i_parker_notified(now.parker));
    now.woken++;
}

static void parker_after(void)
{
    model_outcome(now.timeouts);
    MODEL_CHECK(now.woken == 1);
    vkp_i_parker_deinit(now.parker);
    (void)model_alloc(NULL, now.parker, sizeof *now.parker, 0);
}

void parker_models(void)
{
    unsigned parks;
    unsigned threads;
    for (parks = 1; parks <= 3; parks++) {
        for (threads = 2; threads <= 3; threads++) {
            struct model model = {.preemptions = 3, .stale = 2};
            snprintf(model.name, sizeof model.name, "parker %u | %u", parks, threads - 1);
            model.before = parker_before;
            model.thread = parker_thread;
            model.after = parker_after;
            model.threads = threads;
            model.scenario[0] = parks;
            model.outcomes = ((uint64_t)1 << parks) - 1; /* no deadline passes, or one, or ... */
            model_add(&model);
        }
    }
}
