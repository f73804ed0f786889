/* sockets [rounds [part of a group's name]]: ref-counted listening Unix sockets.
   SPDX-License-Identifier: MIT

   What a reference costs, by the socket itself, by a weak handle and by name, of 1,000 sockets that
   listen (the peers' do not: there only the references are real). Then sockets that come and go,
   with all their system calls: how many in a second, how long the last reference takes to give
   back, 500 at once, their memory. Rust's peers are what one writes with std: a destructor that
   removes the file, and no lock file, which is half of our system calls; so the limit is shown
   with and without it.                                                                         */
#include "drive.h"
#include "peers/socketed.h"

#define SOCKETS 1000
#define CROWD 500
#define END_GOAL_US 20

static vkp_registry *registry;
static vkp_socket *sockets[SOCKETED_MOST];
static vkp_weak_socket handles[SOCKETED_MOST];

/* ---- references ---- */

WORK_INLINE void ref_once(uint32_t which)
{
    vkp_socket_unref(vkp_socket_ref(sockets[which]));
}
SOCKETED_TURNS(ref)

WORK_INLINE void upgrade_once(uint32_t which)
{
    vkp_socket *sock;
    drive_check(vkp_socket_upgrade(&handles[which], &sock), "upgrade");
    vkp_socket_unref(sock);
}
SOCKETED_TURNS(upgrade)

WORK_INLINE void find_once(uint32_t which)
{
    vkp_socket *sock;
    drive_check(vkp_socket_find(registry, vkp_str_of(socketed_names[which]), &sock),
                "get_existing");
    vkp_socket_unref(sock);
}
SOCKETED_TURNS(find)

WORK_INLINE void obtain_once(uint32_t which)
{
    vkp_socket *sock;
    drive_check(vkp_socket_open(registry, vkp_str_of(socketed_names[which]), &sock),
                "get_or_create");
    vkp_socket_unref(sock);
}
SOCKETED_TURNS(obtain)

/* ---- the worker ---- */

static void open_registry(const vkp_env *env)
{
    vkp_registry_config config = VKP_ZERO;
    config.env = env;
    socketed_enter();
    drive_check(vkp_registry_open(&config, &registry), "registry");
}

static void *make_socket(const char *name)
{
    vkp_socket *sock;
    drive_check(vkp_socket_open(registry, vkp_str_of(name), &sock), "get_or_create");
    return sock;
}

static void end_socket(void *made)
{
    vkp_socket_unref((vkp_socket *)made);
}

static const socketed_maker maker = {make_socket, end_socket};

static void open_sockets(long count)
{
    long i;
    for (i = 0; i < count; i++) {
        sockets[i] = (vkp_socket *)make_socket(socketed_names[i]);
    }
}

static void close_all(long count)
{
    long i;
    for (i = 0; i < count; i++) {
        vkp_socket_unref(sockets[i]);
    }
    vkp_registry_unref(registry);
    socketed_leave();
}

static work_figures references(const work_order *order)
{
    work_figures figures;
    long i;
    open_registry(NULL);
    open_sockets(order->a);
    for (i = 0; i < order->a; i++) {
        handles[i] = vkp_socket_downgrade(sockets[i]);
    }
    figures = socketed_run(order, strcmp(order->item, "ref") == 0       ? ref_turns
                                  : strcmp(order->item, "upgrade") == 0 ? upgrade_turns
                                  : strcmp(order->item, "find") == 0    ? find_turns
                                                                        : obtain_turns);
    close_all(order->a);
    return figures;
}

static work_figures lives(const work_order *order)
{
    work_figures figures;
    vkp_registry_stats stats;
    open_registry(NULL);
    figures = socketed_lives(&maker, order);
    if (strcmp(order->item, "end") == 0) {
        vkp_registry_get_stats(registry, &stats);
        figures.calls = (double)stats.handed_over * (double)order->count / (double)stats.ended;
    }
    close_all(0);
    return figures;
}

static work_figures heap(const work_order *order)
{
    work_clock clock = work_start();
    work_figures figures = work_stop(&clock);
    double count = (double)order->a;
    double empty;
    double full;
    long i;
    open_registry(drive_env(order));
    empty = drive_get_bytes();
    open_sockets(order->a);
    full = drive_get_bytes();
    for (i = 0; i < order->a; i++) {
        handles[i] = vkp_socket_downgrade(sockets[i]);
    }
    figures.more[0] = (full - empty) / count;
    figures.more[1] = (drive_get_bytes() - full) / count + (double)sizeof handles[0];
    close_all(order->a);
    return figures;
}

static const work_entry entries[] = {{"references", references}, {"lives", lives}, {"heap", heap}};

/* ---- references: table ---- */

static void run_reference(bench_row *row, double *values)
{
    const drive_item *item = (const drive_item *)row->context;
    double threads = (double)item->order.b;
    work_figures figures;
    double operations;
    values[0] = NAN;
    if (drive_round(row, &figures, &operations)) {
        values[0] =
            (threads > 1 ? figures.seconds : figures.cpu_seconds) * 1e9 * threads / operations;
    }
}

static bench_table references_table = {
    "sockets: a reference taken and given back, ns of a thread", {"ns"}, {1}, 1, true, NULL, 0};

static const char *threads_text(long threads)
{
    return threads == 1 ? "1 thread" : drive_text("%ld threads", threads);
}

static drive_group reference_group(const char *item, const char *title, long threads)
{
    drive_group group = {&references_table, NULL, run_reference, item, SOCKETS, threads, 0, false};
    group.name = drive_text("%s, %s", title, threads_text(threads));
    return group;
}

static void add_ref(long threads)
{
    drive_group group = reference_group("ref", "one socket", threads);
    (void)drive_add(&group, BENCH_OURS, "vkp_socket_ref", NULL, "references");
    (void)drive_add(&group, BENCH_LIMIT, "limit: add, subtract", "own_sockets", "words");
    (void)drive_add(&group, BENCH_PEER, "Rust, Arc", "rust", "arc");
}

static void add_upgrade(long threads)
{
    drive_group group = reference_group("upgrade", "by handle", threads);
    bench_row *row = drive_add(&group, BENCH_OURS, "vkp_socket_upgrade", NULL, "references");
    drive_goal(row, threads == 1 ? 10 : 12, "ns");
    drive_goal(row, threads == 1 ? 0.333 : 0.125, "Rust, Mutex<HashMap>, by name");
    drive_goal(row, 1.15, "limit: CAS, subtract");
    (void)drive_add(&group, BENCH_LIMIT, "limit: CAS, subtract", "own_sockets", "words");
    (void)drive_add(&group, BENCH_PEER, "Rust, Weak", "rust", "arc");
    (void)drive_add(&group, BENCH_PEER, "Rust, Mutex<HashMap>, by name", "rust", "mutex");
}

static void add_name(const char *item, const char *function, long threads)
{
    drive_group group = reference_group(item, "by name", threads);
    bool finds = strcmp(item, "find") == 0;
    bench_row *row;
    group.name =
        drive_text("by name, %s, %s", finds ? "there" : "there or made", threads_text(threads));
    row = drive_add(&group, BENCH_OURS, function, NULL, "references");
    drive_goal(row, threads == 1 ? 1 : 0.5, "Rust, RwLock<HashMap>");
    (void)drive_add(&group, BENCH_LIMIT, "limit: table without a lock", "own_sockets", "words");
    (void)drive_add(&group, BENCH_PEER, "Rust, Mutex<HashMap>", "rust", "mutex");
    (void)drive_add(&group, BENCH_PEER, "Rust, RwLock<HashMap>", "rust", "rwlock");
    (void)drive_add(&group, BENCH_PEER, "C, table and mutex", "own_sockets", "mutex");
    (void)drive_add(&group, BENCH_PEER, "C, table and rwlock", "own_sockets", "rwlock");
}

/* ---- lives: tables ---- */

static void run_cycle(bench_row *row, double *values)
{
    work_figures figures;
    double sockets_made;
    values[0] = values[1] = values[2] = NAN;
    if (drive_round(row, &figures, &sockets_made)) {
        values[0] = sockets_made / figures.seconds / 1e3;
        values[1] = figures.cpu_seconds * 1e6 / sockets_made;
        values[2] = figures.sleeps / sockets_made;
    }
}

static bench_table cycles = {"sockets: made and ended, one after the other",
                             {"k sockets/s", "CPU us/socket", "sleeps/socket"},
                             {1, 1, 2},
                             3,
                             false,
                             NULL,
                             0};

static void run_end(bench_row *row, double *values)
{
    work_figures figures;
    double ends;
    values[0] = values[1] = values[2] = NAN;
    if (drive_round(row, &figures, &ends)) {
        values[0] = figures.more[0] / 1e3;
        values[1] = figures.more[1] / 1e3;
        values[2] = figures.calls * 1e2 / ends;
    }
}

static bench_table ends = {"sockets: the last reference given back",
                           {"p50 us", "p99 us", "handed over %"},
                           {1, 1, 1},
                           3,
                           true,
                           NULL,
                           0};

static void run_crowd(bench_row *row, double *values)
{
    work_figures figures;
    double sockets_made;
    size_t i;
    for (i = 0; i < 4; i++) {
        values[i] = NAN;
    }
    if (drive_round(row, &figures, &sockets_made)) {
        double crowds = sockets_made / CROWD;
        values[1] = figures.more[0] * 1e3 / crowds;
        values[2] = figures.more[1] * 1e3 / crowds;
        values[0] = values[1] + values[2];
        values[3] = drive_calls_each(row, &figures, sockets_made);
    }
}

static bench_table crowds = {"sockets: 500 made, then all of them ended",
                             {"ms", "ms up", "ms down", "system calls/socket"},
                             {1, 1, 1, 1},
                             4,
                             true,
                             NULL,
                             0};

static void run_memory(bench_row *row, double *values)
{
    work_figures figures;
    double unused;
    values[0] = values[1] = NAN;
    if (drive_round(row, &figures, &unused)) {
        values[0] = figures.more[0];
        values[1] = figures.more[1];
    }
}

static bench_table memory = {
    "sockets: memory, bytes", {"socket", "weak handle"}, {0, 0}, 2, true, NULL, 0};

static void add_lives(const drive_group *group)
{
    (void)drive_add(group, BENCH_LIMIT, "limit: system calls", "own_sockets", "calls");
    (void)drive_add(group, BENCH_OTHER, "system calls, with a lock file", "own_sockets",
                    "calls-lock");
    (void)drive_add(group, BENCH_PEER, "Rust, UnixListener and Mutex<HashMap>", "rust", "mutex");
}

static void add_cycle(long threads)
{
    drive_group group = {&cycles, NULL, run_cycle, "cycle", 1, threads, 0, false};
    group.name = drive_text("made and ended, %s", threads_text(threads));
    (void)drive_add(&group, BENCH_OURS, "vkp", NULL, "lives");
    add_lives(&group);
}

static void add_end(const char *name, long threads, long until_gone)
{
    drive_group group = {&ends, name, run_end, "end", 1, threads, until_gone, false};
    bench_row *row = drive_add(&group, BENCH_OURS, "vkp", NULL, "lives");
    if (threads == 1 || until_gone != 0) {
        drive_goal(row, END_GOAL_US, "p50 us");
    }
    add_lives(&group);
}

static void add_crowd(void)
{
    drive_group group = {&crowds, "500 up and down", run_crowd, "crowd", CROWD, 1, 0, false};
    (void)drive_add(&group, BENCH_OURS, "vkp", NULL, "lives");
    add_lives(&group);
}

static void add_memory(void)
{
    drive_group group = {&memory, "memory", run_memory, "memory", SOCKETS, 1, 0, true};
    (void)drive_add(&group, BENCH_OURS, "vkp", NULL, "heap");
    (void)drive_add(&group, BENCH_PEER, "Rust, UnixListener and Mutex<HashMap>", "rust", "mutex");
}

int main(int argc, char **argv)
{
    bench_table tables[5];
    long threads;
    bench_raise_descriptors(); /* for all workers: they inherit it */
    if (drive_start(argc, argv)) {
        return work_main(argc - 1, argv + 1, entries, sizeof entries / sizeof entries[0]);
    }
    /* Such sockets live in memory as a rule ($XDG_RUNTIME_DIR); a disk's file system has a pace of
       its own. */
    (void)setenv("VKP_BENCH_FOLDER", access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp", 0);
    for (threads = 1; threads <= 2; threads++) {
        add_ref(threads);
        add_upgrade(threads);
        add_name("find", "vkp_socket_find", threads);
        add_name("obtain", "vkp_socket_open", threads);
        add_cycle(threads);
    }
    add_end("alone, until it returns", 1, 0);
    add_end("beside another thread, until it returns", 2, 0);
    add_end("beside another thread, until the file is gone", 2, 1);
    add_crowd();
    add_memory();
    tables[0] = references_table;
    tables[1] = cycles;
    tables[2] = ends;
    tables[3] = crowds;
    tables[4] = memory;
    drive_run(tables, sizeof tables / sizeof tables[0],
              drive_text("Files in %s (VKP_BENCH_FOLDER).", getenv("VKP_BENCH_FOLDER")), argc,
              argv);
    return 0;
}
