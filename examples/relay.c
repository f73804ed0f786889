/* mkdir -p build; cc -O2 -I. examples/relay.c backends/v*poll.c -pthread -o build/valkey-push-relay
   SPDX-License-Identifier: MIT

   valkey-push-relay: one connection to a Valkey server, any number of local clients; without
   --server a stand-alone pub/sub broker. All of it is vkp_relay; this file reads options, owns the
   threads and the signals.                                                                    */
#define VKP_IMPLEMENTATION
#include "valkey_push.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#define MOST_LISTENERS 16
#define MOST_THREADS 64
#define DRAIN_MS 5000

typedef struct options {
    const char *server;
    const char *user;
    const char *password;
    const char *listen[MOST_LISTENERS];
    size_t listen_count;
    const vkp_backend *backend;
    size_t threads;
    size_t queue_frames;
    size_t queue_bytes;
    vkp_on_full on_full;
    size_t max_clients;
    vkp_log_level log_level;
} options;

static const char usage[] =
    "usage: valkey-push-relay [options]\n"
    "  --server ADDR        the upstream server, tcp:HOST:PORT or unix:PATH;\n"
    "                       without it: a stand-alone pub/sub broker\n"
    "  --user NAME          user name for the server\n"
    "  --pass-env VAR       the environment variable that holds the password\n"
    "  --listen ADDR        accept local clients there, unix:PATH or tcp:HOST:PORT (port 0: any);\n"
    "                       may be repeated; default: a unique unix socket, printed\n"
    "  --backend NAME       poll" /* the list goes on below */
#ifdef __linux__
    " or epoll (default)"
#endif
    "\n"
    "  --threads N          event loops, clients are spread over them; default 1\n"
    "  --queue-frames N     most messages that wait for one client; default 65536\n"
    "  --queue-bytes N      most bytes that wait for one client; default 8388608\n"
    "  --on-full POLICY     drop-oldest, drop-newest or disconnect (default)\n"
    "  --max-clients N      default 16384\n"
    "  --log LEVEL          error, warn (default), info or debug; on stderr\n"
    "  --help, --version\n"
    "Prints `ready: ADDR` per address once it accepts. SIGTERM and SIGINT drain and end it.\n";

static volatile sig_atomic_t signals_seen;
static vkp_loop *main_loop; /* for the handler */

static void on_signal(int number)
{
    (void)number;
    signals_seen++;
    vkp_loop_stop(main_loop);
}

static void on_log(void *user, vkp_log_level level, const char *text)
{
    static const char *const names[] = {"", "error", "warn", "info", "debug"};
    (void)user;
    fprintf(stderr, "valkey-push-relay: %s: %s\n", names[level], text);
}

static int fail(const char *what, const char *why)
{
    fprintf(stderr, "valkey-push-relay: %s: %s\n", what, why);
    return 1;
}

static bool read_number(const char *text, size_t *out)
{
    char *end;
    unsigned long long number;
    errno = 0;
    number = strtoull(text, &end, 10);
    if (text[0] < '0' || text[0] > '9' || *end != '\0' || errno != 0 || number > SIZE_MAX / 2) {
        return false;
    }
    *out = (size_t)number;
    return true;
}

static bool read_choice(const char *text, const char *const *names, size_t count, size_t *out)
{
    for (*out = 0; *out < count; ++*out) {
        if (strcmp(text, names[*out]) == 0) {
            return true;
        }
    }
    return false;
}

static bool read_backend(const char *text, options *opts)
{
#ifdef __linux__
    if (strcmp(text, "epoll") == 0) {
        opts->backend = &vkp_backend_epoll;
        return true;
    }
#endif
    opts->backend = &vkp_backend_poll;
    return strcmp(text, "poll") == 0;
}

/* One option and its value. False: unknown, or not a value for it. */
static bool read_option(options *opts, const char *name, const char *value)
{
    static const char *const policies[] = {"drop-oldest", "drop-newest", "disconnect"};
    static const vkp_on_full on_full[] = {VKP_ON_FULL_DROP_OLDEST, VKP_ON_FULL_DROP_NEWEST,
                                          VKP_ON_FULL_DISCONNECT};
    static const char *const levels[] = {"error", "warn", "info", "debug"};
    size_t index;
    bool ok = true;
    if (strcmp(name, "--server") == 0) {
        opts->server = value;
    } else if (strcmp(name, "--user") == 0) {
        opts->user = value;
    } else if (strcmp(name, "--pass-env") == 0) {
        opts->password = getenv(value);
        ok = opts->password != NULL;
    } else if (strcmp(name, "--listen") == 0) {
        ok = opts->listen_count < MOST_LISTENERS;
        if (ok) {
            opts->listen[opts->listen_count++] = value;
        }
    } else if (strcmp(name, "--backend") == 0) {
        ok = read_backend(value, opts);
    } else if (strcmp(name, "--threads") == 0) {
        ok = read_number(value, &opts->threads) && opts->threads >= 1 &&
             opts->threads <= MOST_THREADS;
    } else if (strcmp(name, "--queue-frames") == 0) {
        ok = read_number(value, &opts->queue_frames) && opts->queue_frames > 0;
    } else if (strcmp(name, "--queue-bytes") == 0) {
        ok = read_number(value, &opts->queue_bytes) && opts->queue_bytes > 0;
    } else if (strcmp(name, "--on-full") == 0) {
        ok = read_choice(value, policies, 3, &index);
        opts->on_full = on_full[ok ? index : 2];
    } else if (strcmp(name, "--max-clients") == 0) {
        ok = read_number(value, &opts->max_clients) && opts->max_clients > 0;
    } else if (strcmp(name, "--log") == 0) {
        ok = read_choice(value, levels, 4, &index);
        opts->log_level = (vkp_log_level)(index + 1);
    } else {
        ok = false;
    }
    return ok;
}

/* -1: go on; else the exit code. */
static int read_options(int argc, char **argv, options *opts)
{
    int i;
    memset(opts, 0, sizeof *opts);
    (void)read_backend("epoll", opts); /* falls back to poll where there is none */
    opts->threads = 1;
    opts->on_full = VKP_ON_FULL_DISCONNECT;
    for (i = 1; i < argc; i += 2) {
        if (strcmp(argv[i], "--help") == 0) {
            fputs(usage, stdout);
            return 0;
        }
        if (strcmp(argv[i], "--version") == 0) {
            printf("valkey-push-relay %s\n", vkp_version());
            return 0;
        }
        if (i + 1 == argc || !read_option(opts, argv[i], argv[i + 1])) {
            fprintf(stderr, "valkey-push-relay: not an option, or not a value for it: %s %s\n%s",
                    argv[i], i + 1 < argc ? argv[i + 1] : "", usage);
            return 2;
        }
    }
    return -1;
}

/* Ten thousand clients need as many descriptors. */
static void raise_descriptor_limit(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < limit.rlim_max) {
        limit.rlim_cur = limit.rlim_max;
        (void)setrlimit(RLIMIT_NOFILE, &limit);
    }
}

static void catch_signals(void)
{
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = on_signal;
    (void)sigaction(SIGTERM, &action, NULL);
    (void)sigaction(SIGINT, &action, NULL);
    action.sa_handler = SIG_IGN;
    (void)sigaction(SIGPIPE, &action, NULL);
}

static void default_address(char *text, size_t size)
{
    const char *folder = getenv("XDG_RUNTIME_DIR");
    if (folder == NULL || access(folder, W_OK) != 0) {
        folder = getenv("TMPDIR");
    }
    if (folder == NULL || access(folder, W_OK) != 0) {
        folder = "/tmp";
    }
    (void)snprintf(text, size, "unix:%s/valkey-push-relay-%ld-%08lx.sock", folder, (long)getpid(),
                   (unsigned long)(vkp_sys_default()->random_u64() & 0xffffffffu));
}

static int listen_all(vkp_relay *relay, const options *opts)
{
    char fallback[256];
    size_t count = opts->listen_count > 0 ? opts->listen_count : 1;
    size_t i;
    default_address(fallback, sizeof fallback);
    for (i = 0; i < count; i++) {
        const char *address = opts->listen_count > 0 ? opts->listen[i] : fallback;
        const char *bound = NULL;
        vkp_status status = vkp_relay_listen(relay, address, &bound);
        if (status != VKP_OK) {
            return fail(address, status == VKP_ERR_SYS ? strerror(errno) : vkp_status_str(status));
        }
        printf("ready: %s\n", bound);
        fflush(stdout);
    }
    return 0;
}

static void *run_loop(void *loop)
{
    (void)!vkp_loop_run((vkp_loop *)loop);
    return NULL;
}

static void on_drained(void *user)
{
    *(bool *)user = true;
    vkp_loop_stop(main_loop);
}

/* Run until a signal, then drain; a second signal ends it at once. */
static int serve(vkp_relay *relay)
{
    bool drained = false;
    vkp_status status = VKP_OK;
    while (status == VKP_OK && signals_seen == 0) {
        status = vkp_loop_run(main_loop);
    }
    if (status == VKP_OK) {
        vkp_relay_drain(relay, vkp_after_ms(DRAIN_MS), on_drained, &drained);
        while (status == VKP_OK && !drained && signals_seen < 2) {
            status = vkp_loop_run(main_loop);
        }
    }
    return status == VKP_OK ? 0 : fail("event loop", strerror(errno));
}

static int run(const options *opts, const vkp_env *env, vkp_loop **loops)
{
    pthread_t threads[MOST_THREADS];
    vkp_relay_config config = VKP_ZERO;
    vkp_relay *relay;
    vkp_status status;
    size_t started = 1;
    int code;
    config.server = opts->server;
    config.username = opts->user;
    config.password = opts->password;
    config.loops = loops;
    config.loop_count = opts->threads;
    config.queue_frames = opts->queue_frames;
    config.queue_bytes = opts->queue_bytes;
    config.on_full = opts->on_full;
    config.max_clients = opts->max_clients;
    config.env = env;
    status = vkp_relay_open(&config, &relay);
    if (status != VKP_OK) {
        return fail(opts->server != NULL ? opts->server : "relay", vkp_status_str(status));
    }
    code = listen_all(relay, opts);
    while (code == 0 && started < opts->threads) {
        if (pthread_create(&threads[started], NULL, run_loop, loops[started]) != 0) {
            code = fail("thread", "cannot be started");
        } else {
            started++;
        }
    }
    if (code == 0) {
        code = serve(relay);
    }
    while (started > 1) {
        started--;
        vkp_loop_stop(loops[started]);
        (void)pthread_join(threads[started], NULL);
    }
    vkp_relay_unref(relay);
    return code;
}

int main(int argc, char **argv)
{
    vkp_loop *loops[MOST_THREADS];
    vkp_loop_config config = VKP_ZERO;
    vkp_env env = VKP_ZERO;
    options opts;
    size_t opened = 0;
    int code = read_options(argc, argv, &opts);
    if (code >= 0) {
        return code;
    }
    raise_descriptor_limit();
    env.log = on_log;
    env.log_level = opts.log_level;
    config.backend = opts.backend;
    config.env = &env;
    while (opened < opts.threads && vkp_loop_open(&config, &loops[opened]) == VKP_OK) {
        opened++;
    }
    if (opened == opts.threads) {
        main_loop = loops[0];
        catch_signals();
        code = run(&opts, &env, loops);
    } else {
        code = fail("event loop", strerror(errno));
    }
    while (opened > 0) {
        opened--;
        vkp_loop_close(loops[opened]);
        vkp_loop_unref(loops[opened]);
    }
    return code;
}
