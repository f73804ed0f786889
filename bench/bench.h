/* Shared by the benchmarks: clocks, pinning, sockets, child processes, and the table.
   SPDX-License-Identifier: MIT

   A program lists rows; each round runs all of them in a new random order, so that what else the
   machine does spreads over all. A ratio is the median of the ratios of the same round.        */
#ifndef VKP_BENCH_H
#define VKP_BENCH_H

#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE 1
#endif

#include "valkey_push.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#ifdef __linux__
#include <sched.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#endif

#define BENCH_COLUMNS 6
#define BENCH_GOALS 16
#define BENCH_UNUSED __attribute__((unused))

typedef enum bench_role { BENCH_OURS, BENCH_PEER, BENCH_LIMIT, BENCH_OTHER } bench_role;

/* At least (or, where less is better, at most) `ratio` times the row of that name in the group, or
   its "best peer"; or, where that is the name of a column, at most `ratio` in it.              */
typedef struct bench_goal {
    const char *against;
    double ratio;
} bench_goal;

typedef struct bench_row bench_row;
struct bench_row {
    const char *group;
    const char *name;
    bench_role role;
    void (*run)(bench_row *row, double *values); /* fills one value per column; NAN: unknown */
    long a;                                      /* run's own */
    long b;
    const void *context;
    bench_goal goals[BENCH_GOALS];
    double *samples; /* [round][column] */
};

typedef struct bench_table {
    const char *title;
    const char *columns[BENCH_COLUMNS]; /* the first is compared */
    int digits[BENCH_COLUMNS];
    size_t column_count;
    bool less_is_better;
    bench_row *rows;
    size_t count;
} bench_table;

BENCH_UNUSED static void bench_fail(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    exit(1);
}

BENCH_UNUSED static uint64_t bench_now_ns(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

/* CPU time of this process. */
BENCH_UNUSED static double bench_cpu_ns(void)
{
    struct timespec time;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
    return (double)time.tv_sec * 1e9 + (double)time.tv_nsec;
}

/* Without a second core, or where a process cannot be pinned: as the system likes. */
BENCH_UNUSED static void bench_pin(int core)
{
#ifdef __linux__
    cpu_set_t set;
    if (sysconf(_SC_NPROCESSORS_ONLN) > core) {
        CPU_ZERO(&set);
        CPU_SET(core, &set);
        (void)sched_setaffinity(0, sizeof set, &set);
    }
#else
    (void)core;
#endif
}

BENCH_UNUSED static void bench_raise_descriptors(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < 16384) {
        limit.rlim_cur = limit.rlim_max < 16384 ? limit.rlim_max : 16384;
        (void)setrlimit(RLIMIT_NOFILE, &limit);
    }
}

/* ---- what /proc tells of a process; NAN where there is none ---- */

BENCH_UNUSED static double bench_proc_number(long pid, const char *file, int field)
{
    char path[64];
    double value = NAN;
    FILE *in;
    snprintf(path, sizeof path, "/proc/%ld/%s", pid, file);
    in = fopen(path, "r");
    if (in != NULL) {
        while (field-- >= 0 && fscanf(in, "%lf", &value) == 1) {
        }
        fclose(in);
    }
    return value;
}

/* CPU time of the process's main thread, which is where every server here works. */
BENCH_UNUSED static double bench_proc_cpu_ns(long pid)
{
    return bench_proc_number(pid, "schedstat", 0);
}

BENCH_UNUSED static double bench_proc_rss(long pid)
{
    return bench_proc_number(pid, "statm", 1) * (double)sysconf(_SC_PAGESIZE);
}

/* ---- system calls of a process, by strace; off the clock ---- */

typedef struct bench_trace {
    pid_t tracer;
    char path[64];
} bench_trace;

static bool bench_is_traced(long pid)
{
    char path[64];
    char line[256];
    long tracer = 0;
    FILE *in;
    snprintf(path, sizeof path, "/proc/%ld/status", pid);
    in = fopen(path, "r");
    while (in != NULL && fgets(line, sizeof line, in) != NULL) {
        (void)sscanf(line, "TracerPid: %ld", &tracer);
    }
    if (in != NULL) {
        fclose(in);
    }
    return tracer != 0;
}

/* False: no strace, or not allowed. */
BENCH_UNUSED static bool bench_trace_start(bench_trace *trace, long pid)
{
    char target[24];
    int status;
    snprintf(trace->path, sizeof trace->path, "/tmp/vkp-bench-%ld.calls", (long)getpid());
    snprintf(target, sizeof target, "%ld", pid);
    trace->tracer = fork();
    if (trace->tracer == 0) {
        if (freopen("/dev/null", "w", stderr) != NULL) {
            execlp("strace", "strace", "-c", "-p", target, "-o", trace->path, (char *)NULL);
        }
        _exit(127);
    }
    while (trace->tracer > 0 && !bench_is_traced(pid)) {
        if (waitpid(trace->tracer, &status, WNOHANG) == trace->tracer) {
            return false;
        }
    }
    return trace->tracer > 0;
}

/* How many calls there were since the start. */
BENCH_UNUSED static double bench_trace_end(bench_trace *trace)
{
    char line[256];
    double calls = NAN;
    FILE *in;
    kill(trace->tracer, SIGINT);
    while (waitpid(trace->tracer, NULL, 0) < 0 && errno == EINTR) {
    }
    in = fopen(trace->path, "r");
    while (in != NULL && fgets(line, sizeof line, in) != NULL) {
        double each = 0;
        if (strstr(line, " total\n") != NULL && sscanf(line, "%*f %*f %*f %lf", &each) == 1) {
            calls = each;
        }
    }
    if (in != NULL) {
        fclose(in);
    }
    unlink(trace->path);
    return calls;
}

/* ---- sockets ---- */

typedef struct bench_address {
    union {
        struct sockaddr any;
        struct sockaddr_un local;
        struct sockaddr_in inet;
    } u;
    socklen_t bytes;
} bench_address;

/* "unix:PATH" or "tcp:PORT" on this machine. */
static bench_address bench_address_of(const char *text)
{
    bench_address address;
    memset(&address, 0, sizeof address);
    if (strncmp(text, "unix:", 5) == 0) {
        address.u.local.sun_family = AF_UNIX;
        snprintf(address.u.local.sun_path, sizeof address.u.local.sun_path, "%s", text + 5);
        address.bytes = sizeof address.u.local;
    } else {
        address.u.inet.sin_family = AF_INET;
        address.u.inet.sin_port = htons((uint16_t)atoi(strrchr(text, ':') + 1));
        address.u.inet.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        address.bytes = sizeof address.u.inet;
    }
    return address;
}

static void bench_nodelay(int fd)
{
    int on = 1;
    (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on); /* fails on Unix sockets */
}

/* A blocking connection; tries again while the server starts. */
BENCH_UNUSED static int bench_dial(const char *text)
{
    bench_address address = bench_address_of(text);
    uint64_t deadline = bench_now_ns() + 10000000000u;
    int fd;
    while ((fd = socket(address.u.any.sa_family, SOCK_STREAM, 0)) >= 0) {
        if (connect(fd, &address.u.any, address.bytes) == 0) {
            bench_nodelay(fd);
            return fd;
        }
        close(fd);
        if (bench_now_ns() > deadline) {
            break;
        }
        poll(NULL, 0, 1);
    }
    bench_fail("cannot connect to %s: %s", text, strerror(errno));
    return -1;
}

BENCH_UNUSED static int bench_listen(const char *text)
{
    bench_address address = bench_address_of(text);
    int fd = socket(address.u.any.sa_family, SOCK_STREAM, 0);
    int on = 1;
    if (address.u.any.sa_family == AF_UNIX) {
        unlink(address.u.local.sun_path);
    }
    (void)setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (fd < 0 || bind(fd, &address.u.any, address.bytes) != 0 || listen(fd, 4096) != 0) {
        bench_fail("cannot listen on %s: %s", text, strerror(errno));
    }
    return fd;
}

BENCH_UNUSED static void bench_write(int fd, const void *data, size_t len)
{
    const char *at = (const char *)data;
    while (len > 0) {
        ssize_t put = write(fd, at, len);
        if (put < 0 && errno == EAGAIN) {
            struct pollfd ready = {fd, POLLOUT, 0};
            poll(&ready, 1, -1);
        } else if (put < 0 && errno != EINTR) {
            bench_fail("write: %s", strerror(errno));
        } else if (put > 0) {
            at += put;
            len -= (size_t)put;
        }
    }
}

/* Read until the text was seen. */
BENCH_UNUSED static void bench_expect(int fd, const char *text)
{
    char seen[65536];
    size_t len = 0;
    while (len < sizeof seen - 1) {
        ssize_t got = read(fd, seen + len, sizeof seen - 1 - len);
        if (got <= 0) {
            break;
        }
        len += (size_t)got;
        seen[len] = '\0';
        if (strstr(seen, text) != NULL) {
            return;
        }
    }
    seen[len] = '\0';
    bench_fail("expected %s, got %s", text, seen);
}

/* ---- child processes ---- */

#define BENCH_CHILDREN 16
static pid_t bench_children[BENCH_CHILDREN];
static size_t bench_child_count;

static void bench_stop_children(void)
{
    while (bench_child_count > 0) {
        pid_t child = bench_children[--bench_child_count];
        if (child > 0) {
            kill(child, SIGKILL);
            while (waitpid(child, NULL, 0) < 0 && errno == EINTR) {
            }
        }
    }
}

BENCH_UNUSED static void bench_stop(pid_t pid)
{
    size_t i;
    for (i = 0; i < bench_child_count; i++) {
        if (bench_children[i] == pid) {
            bench_children[i] = bench_children[--bench_child_count];
            kill(pid, SIGKILL);
            while (waitpid(pid, NULL, 0) < 0 && errno == EINTR) {
            }
            return;
        }
    }
}

/* fork, pinned; 0 in the child. The parent stops all its children when it exits. */
BENCH_UNUSED static pid_t bench_fork(int core)
{
    pid_t pid;
    fflush(NULL);
    if (bench_child_count == 0) {
        atexit(bench_stop_children);
    }
    pid = bench_child_count < BENCH_CHILDREN ? fork() : -1;
    if (pid < 0) {
        bench_fail("fork: %s", strerror(errno));
    } else if (pid == 0) {
        bench_child_count = 0; /* they are the parent's */
        (void)setpgid(0, 0);   /* an interrupt from the terminal is for the parent */
#ifdef __linux__
        (void)prctl(PR_SET_PDEATHSIG, SIGKILL); /* should the parent be killed */
#endif
        bench_pin(core);
    } else {
        bench_children[bench_child_count++] = pid;
    }
    return pid;
}

/* redis-server, or the server that VKP_BENCH_SERVER names; no port, one Unix socket. */
BENCH_UNUSED static pid_t bench_start_server(int core, const char *port, const char *socket_path)
{
    const char *program = getenv("VKP_BENCH_SERVER");
    pid_t pid = bench_fork(core);
    if (program == NULL) {
        program = "redis-server";
    }
    if (pid == 0) {
        if (freopen("/dev/null", "w", stdout) != NULL) {
            execlp(program, program, "--port", port, "--unixsocket", socket_path, "--save", "",
                   "--maxclients", "12000", "--client-output-buffer-limit", "pubsub 0 0 0",
                   (char *)NULL);
        }
        fprintf(stderr, "cannot run %s: %s\n", program, strerror(errno));
        _exit(127);
    }
    return pid;
}

/* ---- the table ---- */

static int bench_compare(const void *a, const void *b)
{
    double left = *(const double *)a;
    double right = *(const double *)b;
    return left < right ? -1 : left > right;
}

static double bench_percentile(double *values, size_t count, double part)
{
    size_t known = 0;
    size_t i;
    for (i = 0; i < count; i++) {
        if (!isnan(values[i])) {
            values[known++] = values[i];
        }
    }
    if (known == 0) {
        return NAN;
    }
    qsort(values, known, sizeof *values, bench_compare);
    if (part == 0.5 && known % 2 == 0) {
        return (values[known / 2 - 1] + values[known / 2]) / 2;
    }
    i = (size_t)((double)known * part);
    return values[i < known ? i : known - 1];
}

static double bench_column(const bench_row *row, size_t rounds, size_t column, double part)
{
    double values[1024];
    size_t i;
    for (i = 0; i < rounds; i++) {
        values[i] = row->samples[i * BENCH_COLUMNS + column];
    }
    return bench_percentile(values, rounds, part);
}

static double bench_ratio(const bench_row *row, const bench_row *other, size_t rounds)
{
    double values[1024];
    size_t i;
    for (i = 0; i < rounds; i++) {
        values[i] = row->samples[i * BENCH_COLUMNS] / other->samples[i * BENCH_COLUMNS];
    }
    return bench_percentile(values, rounds, 0.5);
}

static void bench_print_number(double value, int digits, const char *unit)
{
    if (isnan(value)) {
        printf("-");
    } else {
        printf("%.*f%s", digits, value, unit);
    }
}

static const bench_row *bench_find(const bench_table *table, const bench_row *row, const char *name)
{
    size_t i;
    for (i = 0; i < table->count; i++) {
        if (strcmp(table->rows[i].group, row->group) == 0 &&
            strcmp(table->rows[i].name, name) == 0) {
            return &table->rows[i];
        }
    }
    return NULL;
}

/* The best of the peers, or of the limits, in the row's group. */
static const bench_row *bench_best(const bench_table *table, const bench_row *row, bench_role role,
                                   size_t rounds)
{
    const bench_row *best = NULL;
    double best_value = NAN;
    size_t i;
    for (i = 0; i < table->count; i++) {
        const bench_row *other = &table->rows[i];
        if (other->role == role && strcmp(other->group, row->group) == 0) {
            double value = bench_column(other, rounds, 0, 0.5);
            if (!isnan(value) && (best == NULL || (table->less_is_better ? value < best_value
                                                                         : value > best_value))) {
                best = other;
                best_value = value;
            }
        }
    }
    return best;
}

static void bench_print_goal(const char *sign, const bench_goal *goal, const char *mark,
                             double reached, bool met, size_t printed)
{
    printf("%s%s %g%s%s: %s (%.2f)", printed > 0 ? "; " : "", sign, goal->ratio, mark,
           goal->against, met ? "met" : "**MISSED**", reached);
}

static void bench_print_goals(const bench_table *table, const bench_row *row, size_t rounds)
{
    size_t printed = 0;
    size_t i;
    size_t column;
    for (i = 0; i < BENCH_GOALS && row->goals[i].against != NULL; i++) {
        const bench_goal *goal = &row->goals[i];
        const bench_row *other = strcmp(goal->against, "best peer") == 0
                                     ? bench_best(table, row, BENCH_PEER, rounds)
                                     : bench_find(table, row, goal->against);
        double reached = other != NULL ? bench_ratio(row, other, rounds) : NAN;
        bool met = table->less_is_better ? reached <= goal->ratio : reached >= goal->ratio;
        if (!isnan(reached)) {
            bench_print_goal(table->less_is_better ? "<=" : ">=", goal, " x ", reached, met,
                             printed++);
        }
        for (column = 0; column < table->column_count; column++) {
            reached = bench_column(row, rounds, column, 0.5);
            if (strcmp(table->columns[column], goal->against) == 0 && !isnan(reached)) {
                bench_print_goal("<=", goal, " ", reached, reached <= goal->ratio, printed++);
            }
        }
    }
}

static void bench_print(const bench_table *table, size_t rounds)
{
    size_t i;
    size_t column;
    printf("\n### %s\n\n%zu rounds: median (min-max).\n\n", table->title, rounds);
    printf("| | | %s | x best peer | x limit |", table->columns[0]);
    for (column = 1; column < table->column_count; column++) {
        printf(" %s |", table->columns[column]);
    }
    printf(" goals |\n|---|---|---|---|---|");
    for (column = 0; column < table->column_count; column++) {
        printf("---|");
    }
    printf("\n");
    for (i = 0; i < table->count; i++) {
        const bench_row *row = &table->rows[i];
        const bench_row *peer = bench_best(table, row, BENCH_PEER, rounds);
        const bench_row *limit = bench_best(table, row, BENCH_LIMIT, rounds);
        int digits = table->digits[0];
        printf("| %s | %s | ", row->group, row->name);
        bench_print_number(bench_column(row, rounds, 0, 0.5), digits, " (");
        bench_print_number(bench_column(row, rounds, 0, 0), digits, "-");
        bench_print_number(bench_column(row, rounds, 0, 1), digits, ") | ");
        bench_print_number(peer != NULL ? bench_ratio(row, peer, rounds) : NAN, 2, "");
        printf(" | ");
        bench_print_number(limit != NULL ? bench_ratio(row, limit, rounds) : NAN, 2, "");
        for (column = 1; column < table->column_count; column++) {
            printf(" | ");
            bench_print_number(bench_column(row, rounds, column, 0.5), table->digits[column], "");
        }
        printf(" | ");
        bench_print_goals(table, row, rounds);
        printf(" |\n");
    }
    fflush(stdout);
}

BENCH_UNUSED static void bench_print_machine(void)
{
    struct utsname name;
    char line[256];
    char model[256] = "unknown CPU";
    FILE *in = fopen("/proc/cpuinfo", "r");
    while (in != NULL && fgets(line, sizeof line, in) != NULL) {
        if (sscanf(line, "model name : %255[^\n]", model) == 1) {
            break;
        }
    }
    if (in != NULL) {
        fclose(in);
    }
    uname(&name);
    printf("%ld cores, %s, %s %s %s, compiler %s, valkey_push %s\n", sysconf(_SC_NPROCESSORS_ONLN),
           model, name.sysname, name.release, name.machine, __VERSION__, vkp_version_str());
}

static volatile sig_atomic_t bench_interrupted;

static void bench_interrupt(int number)
{
    (void)number;
    bench_interrupted = 1;
}

/* Run the rows of all tables, `rounds` times, and print; an interrupt prints after the round under
   way. Returns how many rounds there were.                                                     */
BENCH_UNUSED static size_t bench_run_tables(bench_table *tables, size_t table_count, size_t rounds)
{
    bench_row **order;
    size_t count = 0;
    size_t round;
    size_t i;
    size_t j;
    for (i = 0; i < table_count; i++) {
        count += tables[i].count;
    }
    order = (bench_row **)malloc((count + 1) * sizeof *order);
    count = 0;
    for (i = 0; i < table_count; i++) {
        for (j = 0; j < tables[i].count; j++) {
            bench_row *row = &tables[i].rows[j];
            row->samples = (double *)calloc(rounds, BENCH_COLUMNS * sizeof *row->samples);
            order[count++] = row;
        }
    }
    signal(SIGINT, bench_interrupt);
    signal(SIGTERM, bench_interrupt);
    for (round = 0; round < rounds && bench_interrupted == 0; round++) {
        for (i = count; i > 1; i--) {
            size_t other = (size_t)(vkp_sys_get_default()->random_u64() % i);
            bench_row *kept = order[i - 1];
            order[i - 1] = order[other];
            order[other] = kept;
        }
        for (i = 0; i < count; i++) {
            order[i]->run(order[i], order[i]->samples + round * BENCH_COLUMNS);
        }
        fprintf(stderr, "%s: round %zu of %zu\n", tables[0].title, round + 1, rounds);
    }
    for (i = 0; i < table_count; i++) {
        if (tables[i].count > 0) {
            bench_print(&tables[i], round);
        }
    }
    for (i = 0; i < count; i++) {
        free(order[i]->samples);
    }
    free(order);
    return round;
}

BENCH_UNUSED static void bench_run(bench_table *table, size_t rounds)
{
    (void)bench_run_tables(table, 1, rounds);
}

/* With a second argument only the groups with that text in their name. */
BENCH_UNUSED static void bench_keep(bench_table *table, int argc, char **argv)
{
    size_t kept = 0;
    size_t i;
    for (i = 0; i < table->count; i++) {
        if (argc < 3 || strstr(table->rows[i].group, argv[2]) != NULL) {
            table->rows[kept++] = table->rows[i];
        }
    }
    table->count = kept;
}

BENCH_UNUSED static size_t bench_rounds(int argc, char **argv)
{
    long rounds = argc > 1 ? atol(argv[1]) : 7;
    return rounds > 0 && rounds <= 1000 ? (size_t)rounds : 7;
}

#endif
