/* Shared by the benchmarks of the channels: tables whose rows are worker processes.
   SPDX-License-Identifier: MIT

   One process measures one thing once (peers/worker.h): nothing that a library leaves behind, and
   no thread that it started, reaches the next row. Ours are workers too: the program calls itself.
   A worker that was not built, as its library is not installed, is left out, and named.          */
#ifndef VKP_BENCH_DRIVE_H
#define VKP_BENCH_DRIVE_H

#include "bench.h"
#include "peers/worker.h"

#define DRIVE_SECONDS 0.25      /* of one measurement */
#define DRIVE_PATIENCE_MS 60000 /* a worker that takes longer is stopped; its row has a gap */
#define DRIVE_ROWS 1024

typedef struct drive_item {
    char program[256];
    work_order order;
    bool is_timeless;
} drive_item;

static char drive_folder[192];
static char drive_self[256];
static const char *drive_absent[32];
static size_t drive_absent_count;

/* ---- the library's workers: what they run in ---- */

static vkp_sys drive_sys;
static uint64_t drive_calls;
static uint64_t drive_waits; /* of a loop */
static int64_t drive_bytes;
static vkp_env drive_env_made;

static void drive_count_call(void)
{
    __atomic_fetch_add(&drive_calls, 1, __ATOMIC_RELAXED);
}

static uint64_t drive_get_calls(void)
{
    return __atomic_load_n(&drive_calls, __ATOMIC_RELAXED);
}

static double drive_get_bytes(void)
{
    return (double)__atomic_load_n(&drive_bytes, __ATOMIC_RELAXED);
}

static void drive_park(vkp_parker *parker, uint64_t deadline_ns)
{
    drive_count_call();
    vkp_sys_get_default()->park(parker, deadline_ns);
}

static void drive_unpark(vkp_parker *parker)
{
    drive_count_call();
    vkp_sys_get_default()->unpark(parker);
}

static void drive_yield(void)
{
    drive_count_call();
    vkp_sys_get_default()->yield();
}

static int drive_membarrier(bool prepare)
{
    drive_count_call();
    return vkp_sys_get_default()->membarrier(prepare);
}

static int drive_no_membarrier(bool prepare)
{
    (void)prepare;
    return -ENOSYS;
}

static int64_t drive_write(int fd, const void *buffer, size_t bytes)
{
    drive_count_call();
    return vkp_sys_get_default()->write(fd, buffer, bytes);
}

static int64_t drive_read(int fd, void *buffer, size_t bytes)
{
    drive_count_call();
    return vkp_sys_get_default()->read(fd, buffer, bytes);
}

static int drive_poll(void *pollfds, size_t count, uint64_t deadline_ns)
{
    drive_count_call();
    drive_waits++;
    return vkp_sys_get_default()->poll(pollfds, count, deadline_ns);
}

static int drive_epoll_wait(int epoll_fd, void *events, int capacity, uint64_t deadline_ns)
{
    drive_count_call();
    drive_waits++;
    return vkp_sys_get_default()->epoll_wait(epoll_fd, events, capacity, deadline_ns);
}

static void *drive_alloc(void *user, void *pointer, size_t old_bytes, size_t new_bytes)
{
    (void)user;
    __atomic_fetch_add(&drive_bytes, (int64_t)new_bytes - (int64_t)old_bytes, __ATOMIC_RELAXED);
    if (new_bytes == 0) {
        free(pointer);
        return NULL;
    }
    return realloc(pointer, new_bytes);
}

/* The environment of one of our workers; its kind says what is unusual: "fence" takes membarrier
   away, "sleep" never looks twice before it sleeps. Memory is counted when that is the question. */
BENCH_UNUSED static const vkp_env *drive_env(const work_order *order)
{
    drive_sys = *vkp_sys_get_default();
    drive_sys.park = drive_park;
    drive_sys.unpark = drive_unpark;
    drive_sys.yield = drive_yield;
    drive_sys.membarrier =
        strstr(order->kind, "fence") != NULL ? drive_no_membarrier : drive_membarrier;
    drive_sys.write = drive_write;
    drive_sys.read = drive_read;
    drive_sys.poll = drive_poll;
    drive_sys.epoll_wait = drive_epoll_wait;
    drive_env_made.sys = &drive_sys;
    work_count_calls = drive_get_calls;
    if (strstr(order->kind, "sleep") != NULL) {
        drive_env_made.spins = VKP_SPINS_NONE;
    }
    if (strcmp(order->item, "memory") == 0) {
        drive_env_made.alloc = drive_alloc;
        work_count_heap = drive_get_bytes;
    }
    return &drive_env_made;
}

BENCH_UNUSED static const vkp_backend *drive_backend(const char *name)
{
#ifdef __linux__
    if (strcmp(name, "epoll") == 0) {
        return &vkp_backend_epoll;
    }
#endif
    return strcmp(name, "poll") == 0 ? &vkp_backend_poll : NULL;
}

#ifdef __linux__
#define DRIVE_BACKEND "epoll"
#else
#define DRIVE_BACKEND "poll"
#endif

BENCH_UNUSED static void drive_check(vkp_status status, const char *what)
{
    if (status != VKP_OK) {
        bench_fail("%s: %s", what, vkp_status_str(status));
    }
}

/* ---- running workers ---- */

/* What the child prints until it ends; false: it failed, or took too long. */
static bool drive_collect(int fd, char *text, size_t size)
{
    uint64_t deadline = bench_now_ns() + (uint64_t)DRIVE_PATIENCE_MS * 1000000u;
    size_t len = 0;
    for (;;) {
        uint64_t now = bench_now_ns();
        struct pollfd ready = {fd, POLLIN, 0};
        ssize_t got;
        if (now >= deadline || len == size - 1) {
            return false;
        }
        if (poll(&ready, 1, (int)((deadline - now) / 1000000u) + 1) <= 0) {
            continue;
        }
        got = read(fd, text + len, size - 1 - len);
        if (got == 0) {
            text[len] = '\0';
            return len > 0;
        }
        len += got > 0 ? (size_t)got : 0;
    }
}

static void drive_exec(const drive_item *item, uint64_t count, const char *trace)
{
    char numbers[4][24];
    const char *words[16];
    size_t at = 0;
    snprintf(numbers[0], sizeof numbers[0], "%ld", item->order.a);
    snprintf(numbers[1], sizeof numbers[1], "%ld", item->order.b);
    snprintf(numbers[2], sizeof numbers[2], "%ld", item->order.c);
    snprintf(numbers[3], sizeof numbers[3], "%llu", (unsigned long long)count);
    if (trace != NULL) {
        words[at++] = "strace";
        words[at++] = "-f";
        words[at++] = "-c";
        words[at++] = "-o";
        words[at++] = trace;
    }
    words[at++] = item->program;
    if (strcmp(item->program, drive_self) == 0) {
        words[at++] = "worker";
    }
    words[at++] = item->order.item;
    words[at++] = item->order.kind;
    words[at++] = numbers[0];
    words[at++] = numbers[1];
    words[at++] = numbers[2];
    words[at++] = numbers[3];
    words[at] = NULL;
    execvp(words[0], (char **)(uintptr_t)words);
    _exit(127);
}

static bool drive_work(const drive_item *item, uint64_t count, const char *trace,
                       work_figures *figures)
{
    char text[512];
    int ends[2];
    bool done;
    pid_t pid;
    if (pipe(ends) != 0) {
        bench_fail("pipe: %s", strerror(errno));
    }
    fflush(NULL);
    pid = fork();
    if (pid == 0) {
#ifdef __linux__
        (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
#endif
        (void)setpgid(0, 0); /* an interrupt is for the parent, which ends the round first */
        dup2(ends[1], STDOUT_FILENO);
        close(ends[0]);
        close(ends[1]);
        drive_exec(item, count, trace);
    }
    close(ends[1]);
    done = pid > 0 && drive_collect(ends[0], text, sizeof text);
    close(ends[0]);
    if (pid > 0) {
        if (!done) {
            (void)setpgid(pid, pid); /* should the child not have come to it */
            kill(-pid, SIGKILL);     /* what strace runs, too */
        }
        while (waitpid(pid, NULL, 0) < 0 && errno == EINTR) {
        }
    }
    if (!done ||
        sscanf(text, "%lf %lf %lf %lf %lf %lf", &figures->seconds, &figures->cpu_seconds,
               &figures->sleeps, &figures->calls, &figures->more[0], &figures->more[1]) != 6) {
        fprintf(stderr, "%s %s %s %ld %ld %ld: no figures\n", item->program, item->order.item,
                item->order.kind, item->order.a, item->order.b, item->order.c);
        return false;
    }
    return true;
}

/* How many operations take DRIVE_SECONDS. It goes there in steps, and by CPU time where that is
   less: a thread that was kept off its core makes a short measurement much too long.           */
static void drive_size(drive_item *item)
{
    uint64_t count = 4096;
    work_figures figures;
    while (item->order.count == 0) {
        if (!drive_work(item, count, NULL, &figures)) {
            item->order.count = count;
        } else {
            double seconds =
                figures.cpu_seconds < figures.seconds ? figures.cpu_seconds : figures.seconds;
            double factor = DRIVE_SECONDS / (seconds > 1e-9 ? seconds : 1e-9);
            if (factor <= 2) {
                item->order.count = ((uint64_t)((double)count * factor) + 4095) / 4096 * 4096;
            }
            count = (uint64_t)((double)count * (factor < 8 ? factor : 8) + 4095) / 4096 * 4096;
        }
    }
}

/* System calls of `count` operations: those under strace, less those of a worker that hardly did
   anything. NAN: no strace.                                                                   */
static double drive_trace_pass(drive_item *item, uint64_t count, const char *path)
{
    char line[256];
    double calls = NAN;
    work_figures figures;
    FILE *in;
    if (!drive_work(item, count, path, &figures)) {
        return NAN;
    }
    in = fopen(path, "r");
    while (in != NULL && fgets(line, sizeof line, in) != NULL) {
        double each;
        if (strstr(line, " total\n") != NULL && sscanf(line, "%*f %*f %*f %lf", &each) == 1) {
            calls = each;
        }
    }
    if (in != NULL) {
        fclose(in);
    }
    unlink(path);
    return calls;
}

static double drive_trace(drive_item *item)
{
    static int missing = -1;
    char path[64];
    uint64_t few = 64; /* one for each client */
    uint64_t count = item->order.count / 8;
    double calls;
    if (missing < 0) {
        missing = system("command -v strace >/dev/null 2>&1");
    }
    if (missing != 0) {
        return NAN;
    }
    snprintf(path, sizeof path, "/tmp/vkp-bench-%ld.calls", (long)getpid());
    count = count < 16384 ? 16384 : count > 262144 ? 262144 : count;
    calls = drive_trace_pass(item, count, path) - drive_trace_pass(item, few, path);
    return calls < 0 ? 0 : calls / (double)(count - few);
}

/* The figures of one round; `operations` is what they are for. */
static bool drive_round(bench_row *row, work_figures *figures, double *operations)
{
    drive_item *item = (drive_item *)(uintptr_t)row->context;
    if (!item->is_timeless) { /* sized in the first round */
        drive_size(item);
    }
    *operations = (double)item->order.count;
    return drive_work(item, item->order.count, NULL, figures);
}

/* System calls per operation: counted by ours, else by strace in the row's first round, unless its
   `a` says that it is not to be.                                                               */
BENCH_UNUSED static double drive_calls_each(bench_row *row, const work_figures *figures,
                                            double operations)
{
    drive_item *item = (drive_item *)(uintptr_t)row->context;
    if (!isnan(figures->calls)) {
        return figures->calls / operations;
    }
    if (row->a == 0) {
        row->a = 1;
        return drive_trace(item);
    }
    return NAN;
}

/* ---- building tables ---- */

static bool drive_is_absent(const char *program)
{
    char path[256];
    size_t i;
    snprintf(path, sizeof path, "%s/peers/%s", drive_folder, program);
    if (access(path, X_OK) == 0) {
        return false;
    }
    for (i = 0; i < drive_absent_count; i++) {
        if (strcmp(drive_absent[i], program) == 0) {
            return true;
        }
    }
    drive_absent[drive_absent_count++] = program;
    return true;
}

BENCH_UNUSED static const char *drive_text(const char *format, ...)
{
    char text[256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    return strdup(text);
}

/* What all rows of a group are asked for. */
typedef struct drive_group {
    bench_table *table;
    const char *name;
    void (*run)(bench_row *row, double *values);
    const char *item;
    long a;
    long b;
    long c;
    bool is_timeless;
} drive_group;

/* program NULL: this one. Returns the row, or NULL when it was left out. */
BENCH_UNUSED static bench_row *drive_add(const drive_group *group, bench_role role,
                                         const char *name, const char *program, const char *kind)
{
    drive_item *item;
    bench_row *row;
    if (program != NULL && drive_is_absent(program)) {
        return NULL;
    }
    if (group->table->rows == NULL) {
        group->table->rows = (bench_row *)calloc(DRIVE_ROWS, sizeof *group->table->rows);
    }
    item = (drive_item *)calloc(1, sizeof *item);
    if (program != NULL) {
        snprintf(item->program, sizeof item->program, "%s/peers/%s", drive_folder, program);
    } else {
        snprintf(item->program, sizeof item->program, "%s", drive_self);
    }
    item->order.item = group->item;
    item->order.kind = kind;
    item->order.a = group->a;
    item->order.b = group->b;
    item->order.c = group->c;
    item->is_timeless = group->is_timeless;
    row = &group->table->rows[group->table->count++];
    row->group = group->name;
    row->name = name;
    row->role = role;
    row->run = group->run;
    row->context = item;
    return row;
}

/* A goal of a row that is there. */
BENCH_UNUSED static void drive_goal(bench_row *row, double ratio, const char *against)
{
    size_t i = 0;
    while (row->goals[i].against != NULL && i < BENCH_GOALS - 1) {
        i++;
    }
    row->goals[i].against = against;
    row->goals[i].ratio = ratio;
}

/* The program's name and folder; with "worker" as the first argument it is one. */
BENCH_UNUSED static bool drive_start(int argc, char **argv)
{
    char *slash;
    snprintf(drive_self, sizeof drive_self, "%s", argv[0]);
    snprintf(drive_folder, sizeof drive_folder, "%s", argv[0]);
    slash = strrchr(drive_folder, '/');
    if (slash != NULL) {
        *slash = '\0';
    } else {
        snprintf(drive_folder, sizeof drive_folder, ".");
    }
    return argc > 1 && strcmp(argv[1], "worker") == 0;
}

/* note: what a reader of the tables has to know, or NULL. */
BENCH_UNUSED static void drive_run(bench_table *tables, size_t count, const char *note, int argc,
                                   char **argv)
{
    size_t i;
    bench_print_machine();
    if (note != NULL) {
        printf("\n%s\n", note);
    }
    if (drive_absent_count > 0) {
        printf("\nLeft out, as not built here:");
        for (i = 0; i < drive_absent_count; i++) {
            printf("%s %s", i > 0 ? "," : "", drive_absent[i]);
        }
        printf(".\n");
    }
    for (i = 0; i < count; i++) {
        bench_keep(&tables[i], argc, argv);
    }
    (void)bench_run_tables(tables, count, bench_rounds(argc, argv));
}

#endif
