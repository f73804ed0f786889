/* mkdir -p build
   cc -O2 -I. examples/relay.c backends/v*_[ekp]*.c -pthread -o build/valkey-push-relay
   SPDX-License-Identifier: MIT

   valkey-push-relay: any number of local clients share few connections to a Valkey server; without
   --server it is a pub/sub broker. vkp_relay does the work; this file reads the options, starts the
   threads and handles the signals; relay_metrics.h serves --metrics.                          */
#define VKP_IMPLEMENTATION
#include "valkey_push.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "relay_metrics.h"

/* The usage text and option_values repeat these numbers. */
#define MOST_LISTENERS 16
#define MOST_THREADS 64
#define MOST_UPSTREAMS 64
#define MOST_UIDS 64
#define LEAST_GATHER 65536
#define MOST_GATHER 2147483647
#define DRAIN_MS 5000
#define DEFAULT_PRIVATES 1024
#define DEFAULT_HOLD_MS 1000
#define MOST_FILE_BYTES 1048576 /* of --config and --pass-file */
#define NO_LINGER SIZE_MAX

#ifdef __linux__
#define BACKENDS "epoll or poll"
#else
#define BACKENDS "kqueue or poll"
#endif

typedef struct options {
    const char *check;
    const char *config;
    const char *server;
    size_t upstreams;
    size_t privates;
    size_t hold_ms;
    bool close_on_gap;
    const char *user;
    const char *password;
    const char *pass_file;
    vkp_relay_door doors[MOST_LISTENERS];
    size_t door_count;
    bool open;
    const char *metrics;
    const vkp_backend *backend;
    size_t threads;
    size_t queue_frames;
    size_t queue_bytes;
    size_t gather_bytes;
    vkp_on_full on_full;
    size_t max_clients;
    size_t max_clients_per_uid;
    uint32_t allow_uids[MOST_UIDS];
    size_t allow_uid_count;
    size_t linger_ms;
    size_t check_files_ms;
    const char *shutdown_notice;
    vkp_log_level log_level;
    bool log_time;
} options;

/* Two texts: a compiler need not take more than 4,095 bytes as one. */
static const char usage_of_connections[] =
    "usage: valkey-push-relay [options]\n"
    "  --server ADDR        the server to connect to, tcp:HOST:PORT or unix:PATH;\n"
    "                       default: none, the relay is a pub/sub broker without a server\n"
    "  --upstreams N        how many connections to the server share the clients' commands, 1 to\n"
    "                       64; subscriptions have one more; default: 1\n"
    "  --private N          most connections to the server that carry one client each, while it\n"
    "                       blocks, uses another database, watches or tracks keys, or logs in;\n"
    "                       0: what needs one is refused; default: 1024\n"
    "  --hold MS            how long a command waits while there is no connection to the server;\n"
    "                       then its client is disconnected; default: 1000\n"
    "  --on-gap POLICY      when messages may have been lost: notify the subscribers of\n"
    "                       " VKP_RELAY_GAP_CHANNEL ", or close all that are concerned;\n"
    "                       default: notify\n"
    "  --user NAME          user name for the server; needs a password\n"
    "  --pass-env VAR       the environment variable that holds the password for the server\n"
    "  --pass-file FILE     the file whose first line is the password for the server\n"
    "  --listen ADDR        accept clients at unix:PATH or tcp:HOST:PORT; port 0: a free port;\n"
    "                       with these behind it, which are for this address alone:\n"
    "                         ,max-clients=N         most clients at once\n"
    "                         ,idle=MS               disconnect who says nothing for so long\n"
    "                         ,require-pass-env=VAR  clients log in with the password in VAR\n"
    "                       may be repeated, up to 16 times; default: a unique Unix socket\n"
    "  --open               let other machines in at TCP addresses without a password\n"
    "  --metrics ADDR       serve HTTP at tcp:HOST:PORT or unix:PATH: a page that shows the relay\n"
    "                       live, /metrics for Prometheus, /healthz; default: off\n";

static const char usage_of_process[] =
    "  --backend NAME       how to wait for descriptors: epoll (Linux), kqueue (macOS, BSD) or\n"
    "                       poll (all); default: epoll on Linux, kqueue elsewhere\n"
    "  --threads N          event loops, 1 to 64, each in its own thread; clients are spread\n"
    "                       over them; default: 1\n"
    "  --queue-frames N     most messages that wait for one client; default: 65536\n"
    "  --queue-bytes N      most bytes of messages that wait for one client; default: 8388608\n"
    "  --gather-bytes N     bytes of commands of all clients that are not whole or not answered;\n"
    "                       beyond, large ones wait for their turn; most bytes of one command;\n"
    "                       65536 to 2147483647; default: 67108864\n"
    "  --on-full POLICY     when a client's queue is full: disconnect the client, drop-oldest\n"
    "                       or drop-newest messages; default: disconnect\n"
    "  --max-clients N      most clients at once, over all addresses; default: 16384\n"
    "  --max-clients-per-uid N\n"
    "                       most clients of one user at once, over Unix sockets;\n"
    "                       default: no limit\n"
    "  --allow-uid UID      over Unix sockets, also accept clients of the user with this number;\n"
    "                       the sockets' files then have mode 0666; may be repeated, up to 64\n"
    "                       times; default: the relay's own user\n"
    "  --linger MS          end when no client has been connected for MS milliseconds, but not\n"
    "                       before the first client; default: off\n"
    "  --check-files MS     every MS milliseconds, check that the sockets' files exist, and\n"
    "                       create those again that do not; default: off\n"
    "  --shutdown-notice TEXT\n"
    "                       before the relay ends, send TEXT to each client: as a message of\n"
    "                       channel " VKP_RELAY_NOTICE_CHANNEL ", or as an error to a RESP2\n"
    "                       client without subscriptions; default: none\n"
    "  --log LEVEL          log error, warn, info or debug, and what is more severe, on standard\n"
    "                       error; default: warn\n"
    "  --log-time           begin each line of the log with the time, in UTC\n"
    "  --config FILE        read options from FILE, one `name value` per line without the --;\n"
    "                       options of the command line win\n"
    "  --check ADDR         do not serve: send PING to the relay or server at ADDR, and wait up\n"
    "                       to 1 second for PONG; prints one line; exit code 0 (PONG) or 1\n"
    "  --help               print this text and exit\n"
    "  --version            print the version and exit\n"
    "The relay prints `ready: ADDR` for each address when it accepts clients there; of --metrics,\n"
    "`ready: http://HOST:PORT`.\n"
    "SIGTERM, SIGINT: stop accepting, answer, write what is queued for up to 5 seconds, exit;\n"
    "a second one: exit at once. SIGHUP: read --pass-file again. SIGUSR1: print counters on\n"
    "standard error, `name value` per line.\n";

static volatile sig_atomic_t ends_asked;
static volatile sig_atomic_t metrics_asked;
static volatile sig_atomic_t reload_asked;
static vkp_loop *main_loop; /* global for on_signal */

static void on_signal(int number)
{
    if (number == SIGUSR1) {
        metrics_asked = 1;
    } else if (number == SIGHUP) {
        reload_asked = 1;
    } else {
        ends_asked++;
    }
    vkp_loop_stop(main_loop);
}

/* user: the options. */
static void on_log(void *user, vkp_log_level level, const char *text)
{
    static const char *const names[] = {"", "error", "warn", "info", "debug"};
    char when[64] = "";
    struct timespec now;
    struct tm parts;
    if (((const options *)user)->log_time && clock_gettime(CLOCK_REALTIME, &now) == 0 &&
        gmtime_r(&now.tv_sec, &parts) != NULL) {
        char seconds[32];
        (void)strftime(seconds, sizeof seconds, "%Y-%m-%dT%H:%M:%S", &parts);
        (void)snprintf(when, sizeof when, "%s.%03dZ ", seconds, (int)(now.tv_nsec / 1000000));
    }
    fprintf(stderr, "%svalkey-push-relay: %s: %s\n", when, names[level], text);
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
#else
    if (strcmp(text, "kqueue") == 0) {
        opts->backend = &vkp_backend_kqueue;
        return true;
    }
#endif
    opts->backend = &vkp_backend_poll;
    return strcmp(text, "poll") == 0;
}

static bool read_uid(const char *text, options *opts)
{
    size_t uid;
    /* The largest number means "no user" in system calls. */
    if (opts->allow_uid_count == MOST_UIDS || !read_number(text, &uid) || uid >= UINT32_MAX) {
        return false;
    }
    opts->allow_uids[opts->allow_uid_count++] = (uint32_t)uid;
    return true;
}

/* The text of a file, terminated, to be freed. NULL: it cannot be read or is no text, see errno. */
static char *read_file(const char *path)
{
    FILE *file = fopen(path, "r");
    char *text = NULL;
    size_t len = 0;
    int error = 0;
    if (file == NULL) {
        return NULL;
    }
    text = (char *)malloc(MOST_FILE_BYTES + 1);
    if (text == NULL) {
        error = ENOMEM;
    } else {
        len = fread(text, 1, MOST_FILE_BYTES, file);
        text[len] = '\0';
        error = ferror(file) ? errno : !feof(file) ? EFBIG : strlen(text) != len ? EINVAL : 0;
    }
    (void)fclose(file);
    if (error != 0) {
        free(text);
        text = NULL;
        errno = error;
    }
    return text;
}

/* Reads the password file; on failure the password is as before. */
static bool read_password(options *opts)
{
    static char *kept; /* for the whole run */
    char *text = read_file(opts->pass_file);
    if (text == NULL) {
        return false;
    }
    text[strcspn(text, "\r\n")] = '\0';
    free(kept);
    kept = text;
    opts->password = text;
    return true;
}

/* One of what may stand behind an address of --listen. */
static bool read_door_word(const char *word, vkp_relay_door *door)
{
    size_t number;
    if (strncmp(word, "max-clients=", 12) == 0) {
        return read_number(word + 12, &door->max_clients) && door->max_clients > 0;
    }
    if (strncmp(word, "idle=", 5) == 0 && read_number(word + 5, &number) && number > 0 &&
        number <= UINT32_MAX) {
        door->idle_ms = (uint32_t)number;
        return true;
    }
    if (strncmp(word, "require-pass-env=", 17) == 0) {
        door->password = vkp_str_of(getenv(word + 17));
        return door->password.len > 0;
    }
    return false;
}

/* Reads the value of --listen: an address, and words behind commas. An address may have commas. */
static bool read_door(const char *text, vkp_relay_door *door)
{
    static const char *const words[] = {",max-clients=", ",idle=", ",require-pass-env="};
    char *copy = (char *)malloc(strlen(text) + 1); /* for the whole run */
    char *end = NULL;
    char *word;
    size_t i;
    if (copy == NULL) {
        return false;
    }
    strcpy(copy, text);
    for (i = 0; i < sizeof words / sizeof *words; i++) {
        word = strstr(copy, words[i]);
        end = end == NULL || (word != NULL && word < end) ? word : end;
    }
    memset(door, 0, sizeof *door);
    while (end != NULL) {
        *end = '\0';
        word = end + 1;
        end = strchr(word, ',');
        if (end != NULL) {
            *end = '\0';
        }
        if (!read_door_word(word, door)) {
            free(copy);
            return false;
        }
    }
    door->address = vkp_str_of(copy);
    return true;
}

typedef struct number_option {
    const char *name;
    size_t *value;
    size_t least;
    size_t most;
} number_option;

/* Reads an option that takes a number. *known: whether there is such an option of that name. */
static bool read_number_option(options *opts, const char *name, const char *text, bool *known)
{
    const number_option all[] = {
        {"--upstreams", &opts->upstreams, 1, MOST_UPSTREAMS},
        {"--private", &opts->privates, 0, SIZE_MAX},
        {"--hold", &opts->hold_ms, 0, UINT32_MAX},
        {"--threads", &opts->threads, 1, MOST_THREADS},
        {"--queue-frames", &opts->queue_frames, 1, SIZE_MAX},
        {"--queue-bytes", &opts->queue_bytes, 1, SIZE_MAX},
        {"--gather-bytes", &opts->gather_bytes, LEAST_GATHER, MOST_GATHER},
        {"--max-clients", &opts->max_clients, 1, SIZE_MAX},
        {"--max-clients-per-uid", &opts->max_clients_per_uid, 1, SIZE_MAX},
        {"--linger", &opts->linger_ms, 0, UINT32_MAX},
        {"--check-files", &opts->check_files_ms, 1, UINT32_MAX},
    };
    size_t i;
    for (i = 0; i < sizeof all / sizeof *all; i++) {
        if (strcmp(name, all[i].name) == 0) {
            *known = true;
            return read_number(text, all[i].value) && *all[i].value >= all[i].least &&
                   *all[i].value <= all[i].most;
        }
    }
    *known = false;
    return false;
}

/* Reads one option and its value, "" where it takes none. False: the option is unknown, or the
   value is wrong. */
static bool read_option(options *opts, const char *name, const char *value)
{
    static const char *const policies[] = {"drop-oldest", "drop-newest", "disconnect"};
    static const char *const on_gap[] = {"notify", "close"};
    static const vkp_on_full on_full[] = {VKP_ON_FULL_DROP_OLDEST, VKP_ON_FULL_DROP_NEWEST,
                                          VKP_ON_FULL_DISCONNECT};
    static const char *const levels[] = {"error", "warn", "info", "debug"};
    size_t index;
    bool known;
    bool ok = read_number_option(opts, name, value, &known);
    if (known) {
        return ok;
    }
    ok = true;
    if (strcmp(name, "--server") == 0) {
        opts->server = value;
    } else if (strcmp(name, "--user") == 0) {
        opts->user = value;
    } else if (strcmp(name, "--pass-env") == 0) {
        opts->password = getenv(value);
        ok = opts->password != NULL;
    } else if (strcmp(name, "--pass-file") == 0) {
        opts->pass_file = value;
        ok = read_password(opts);
    } else if (strcmp(name, "--config") == 0) {
        opts->config = value;
    } else if (strcmp(name, "--open") == 0) {
        opts->open = true;
    } else if (strcmp(name, "--metrics") == 0) {
        opts->metrics = value;
    } else if (strcmp(name, "--log-time") == 0) {
        opts->log_time = true;
    } else if (strcmp(name, "--listen") == 0) {
        ok = opts->door_count < MOST_LISTENERS && read_door(value, &opts->doors[opts->door_count]);
        opts->door_count += ok ? 1 : 0;
    } else if (strcmp(name, "--backend") == 0) {
        ok = read_backend(value, opts);
    } else if (strcmp(name, "--on-full") == 0) {
        ok = read_choice(value, policies, 3, &index);
        opts->on_full = on_full[ok ? index : 2];
    } else if (strcmp(name, "--on-gap") == 0) {
        ok = read_choice(value, on_gap, 2, &index);
        opts->close_on_gap = ok && index == 1;
    } else if (strcmp(name, "--allow-uid") == 0) {
        ok = read_uid(value, opts);
    } else if (strcmp(name, "--shutdown-notice") == 0) {
        opts->shutdown_notice = value;
    } else if (strcmp(name, "--check") == 0) {
        opts->check = value;
    } else if (strcmp(name, "--log") == 0) {
        ok = read_choice(value, levels, 4, &index);
        opts->log_level = (vkp_log_level)(index + 1);
    } else {
        ok = false;
    }
    return ok;
}

typedef struct option_value {
    const char *name;
    const char *expected; /* for the message about a wrong value; NULL: it takes none */
    bool repeats;         /* it may be given several times */
} option_value;

static const option_value option_values[] = {
    {"--server", "tcp:HOST:PORT or unix:PATH", false},
    {"--upstreams", "a number from 1 to 64", false},
    {"--private", "a number of connections", false},
    {"--hold", "milliseconds, 0 to 4294967295", false},
    {"--on-gap", "notify or close", false},
    {"--user", "a user name", false},
    {"--pass-env", "the name of an environment variable that is set", false},
    {"--pass-file", "a file that can be read", false},
    {"--listen", "tcp:HOST:PORT or unix:PATH[,max-clients=][,idle=][,require-pass-env=]", true},
    {"--open", NULL, false},
    {"--metrics", "tcp:HOST:PORT or unix:PATH", false},
    {"--backend", BACKENDS, false},
    {"--threads", "a number from 1 to 64", false},
    {"--queue-frames", "a number of messages, at least 1", false},
    {"--queue-bytes", "a number of bytes, at least 1", false},
    {"--gather-bytes", "a number of bytes, 65536 to 2147483647", false},
    {"--on-full", "disconnect, drop-oldest or drop-newest", false},
    {"--max-clients", "a number of clients, at least 1", false},
    {"--max-clients-per-uid", "a number of clients, at least 1", false},
    {"--allow-uid", "the number of a user, up to 64 times", true},
    {"--linger", "milliseconds, 0 to 4294967295", false},
    {"--check-files", "milliseconds, 1 to 4294967295", false},
    {"--shutdown-notice", "a text", false},
    {"--log", "error, warn, info or debug", false},
    {"--log-time", NULL, false},
    {"--config", "a file that can be read", false},
    {"--check", "tcp:HOST:PORT or unix:PATH", false},
};

#define OPTION_VALUES (sizeof option_values / sizeof *option_values)

/* The index of an option of the table, or OPTION_VALUES. */
static size_t find_option(const char *name)
{
    size_t i = 0;
    while (i < OPTION_VALUES && strcmp(name, option_values[i].name) != 0) {
        i++;
    }
    return i;
}

/* Says what is wrong with an option and its value (NULL: none was given). where: the file and line,
   or "". */
static void refuse_option(const char *where, const char *name, const char *value)
{
    size_t i = find_option(name);
    fprintf(stderr, "valkey-push-relay: %s", where);
    if (i == OPTION_VALUES) {
        fprintf(stderr, "unknown option: %s\n", name);
    } else if (option_values[i].expected == NULL) {
        fprintf(stderr, "%s takes no value, got '%s'\n", name, value);
    } else {
        fprintf(stderr, "%s: expected %s, got %s%s%s\n", name, option_values[i].expected,
                value != NULL ? "'" : "", value != NULL ? value : "nothing",
                value != NULL ? "'" : "");
    }
    fputs("valkey-push-relay --help prints all options.\n", stderr);
}

/* Whether another option that was given says the same thing. */
static bool is_said_twice(size_t i, const bool *given)
{
    bool password = given[find_option("--pass-env")] || given[find_option("--pass-file")];
    return (given[i] && !option_values[i].repeats) ||
           (strncmp(option_values[i].name, "--pass-", 7) == 0 && password);
}

/* Reads one option and notes that it was given. False: it is wrong, and that was said. */
static bool take_option(options *opts, const char *where, const char *name, const char *value,
                        bool *given)
{
    size_t i = find_option(name);
    bool takes = i < OPTION_VALUES && option_values[i].expected != NULL;
    if (i < OPTION_VALUES && is_said_twice(i, given)) {
        fprintf(stderr, "valkey-push-relay: %s%s is given twice\n", where, name);
        return false;
    }
    if (i == OPTION_VALUES || takes != (value != NULL) ||
        !read_option(opts, name, takes ? value : "")) {
        refuse_option(where, name, value);
        return false;
    }
    given[i] = true;
    return true;
}

/* Reads one line of the config file, which it changes. `before` was given on the command line. */
static bool take_line(options *opts, char *line, size_t number, const bool *before, bool *given)
{
    char where[256];
    char name[64];
    char *word = line + strspn(line, " \t");
    size_t len = strcspn(word, " \t");
    char *value = word + len + strspn(word + len, " \t");
    size_t end = strlen(value);
    size_t i;
    while (end > 0 && strchr(" \t\r", value[end - 1]) != NULL) {
        value[--end] = '\0';
    }
    if (*word == '\0' || *word == '#' || *word == '\r') {
        return true;
    }
    (void)snprintf(where, sizeof where, "%s:%zu: ", opts->config, number);
    (void)snprintf(name, sizeof name, "--%.*s", (int)(len < 60 ? len : 60), word);
    name[strcspn(name, "\r")] = '\0';
    i = find_option(name);
    if (strcmp(name, "--config") == 0 || strcmp(name, "--check") == 0) {
        fprintf(stderr, "valkey-push-relay: %s%s is for the command line\n", where, name);
        return false;
    }
    if (i < OPTION_VALUES && (before[i] || is_said_twice(i, before))) {
        return true;
    }
    return take_option(opts, where, name, end > 0 ? value : NULL, given);
}

/* Reads the file of --config, behind the command line, whose options win. */
static bool read_config(options *opts, const bool *before)
{
    static char *text; /* for the whole run */
    bool given[OPTION_VALUES] = {false};
    char *line;
    size_t number = 1;
    text = read_file(opts->config);
    if (text == NULL) {
        fprintf(stderr, "valkey-push-relay: %s: %s\n", opts->config, strerror(errno));
        return false;
    }
    for (line = text; line != NULL; number++) {
        char *next = strchr(line, '\n');
        if (next != NULL) {
            *next++ = '\0';
        }
        if (!take_line(opts, line, number, before, given)) {
            return false;
        }
        line = next;
    }
    return true;
}

/* Whether an address lets in this machine's programs alone. */
static bool is_local(const char *address)
{
    static const char *const hosts[] = {"tcp:localhost:", "tcp:[::1]:"};
    size_t i;
    for (i = 0; i < sizeof hosts / sizeof *hosts; i++) {
        if (strncmp(address, hosts[i], strlen(hosts[i])) == 0) {
            return true;
        }
    }
    /* Of what begins with 127. the numbers alone: the rest are names. */
    return strncmp(address, "tcp:", 4) != 0 ||
           (strncmp(address, "tcp:127.", 8) == 0 &&
            address[4 + strspn(address + 4, "0123456789.")] == ':');
}

/* Whether it is meant that other machines get in at the address. */
static bool check_door(const options *opts, const char *option, const char *address)
{
    if (!opts->open && !is_local(address)) {
        fprintf(stderr,
                "valkey-push-relay: %s %s: other machines get in without a password; --open "
                "allows that\n",
                option, address);
        return false;
    }
    return true;
}

/* A TCP address without a password lets every client in that reaches it: other machines must be
   meant. */
static bool check_doors(const options *opts)
{
    size_t i;
    for (i = 0; i < opts->door_count; i++) {
        const vkp_relay_door *door = &opts->doors[i];
        if (door->password.ptr == NULL && !check_door(opts, "--listen", door->address.ptr)) {
            return false;
        }
    }
    return opts->metrics == NULL || check_door(opts, "--metrics", opts->metrics);
}

/* Returns -1 to continue, or the exit code. */
static int read_options(int argc, char **argv, options *opts)
{
    bool given[OPTION_VALUES] = {false};
    int i;
    memset(opts, 0, sizeof *opts);
    (void)(read_backend("epoll", opts) || read_backend("kqueue", opts)); /* the default */
    opts->threads = 1;
    opts->privates = DEFAULT_PRIVATES;
    opts->hold_ms = DEFAULT_HOLD_MS;
    opts->linger_ms = NO_LINGER;
    opts->on_full = VKP_ON_FULL_DISCONNECT;
    for (i = 1; i < argc; i++) {
        size_t at = find_option(argv[i]);
        bool takes = at < OPTION_VALUES && option_values[at].expected != NULL;
        if (strcmp(argv[i], "--help") == 0) {
            fputs(usage_of_connections, stdout);
            fputs(usage_of_process, stdout);
            return 0;
        }
        if (strcmp(argv[i], "--version") == 0) {
            printf("valkey-push-relay %s\n", vkp_version_str());
            return 0;
        }
        if (!take_option(opts, "", argv[i], takes && i + 1 < argc ? argv[i + 1] : NULL, given)) {
            return 2;
        }
        i += takes ? 1 : 0;
    }
    if ((opts->config != NULL && !read_config(opts, given)) || !check_doors(opts)) {
        return 2;
    }
    return -1;
}

/* Each client needs a descriptor: raise the soft limit to the hard limit. */
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
    (void)sigaction(SIGUSR1, &action, NULL);
    (void)sigaction(SIGHUP, &action, NULL);
    action.sa_handler = SIG_IGN;
    (void)sigaction(SIGPIPE, &action, NULL);
}

static int listen_all(vkp_relay *relay, const options *opts)
{
    static const vkp_relay_door unique = {{"unix:", 5}, 0, 0, {NULL, 0}};
    size_t count = opts->door_count > 0 ? opts->door_count : 1;
    size_t i;
    for (i = 0; i < count; i++) {
        const vkp_relay_door *door = opts->door_count > 0 ? &opts->doors[i] : &unique;
        const char *bound = NULL;
        vkp_status status = vkp_relay_open_door(relay, door, &bound);
        if (status != VKP_OK) {
            return fail(door->address.ptr,
                        status == VKP_ERR_SYS ? strerror(errno) : vkp_status_str(status));
        }
        printf("ready: %s\n", bound);
        fflush(stdout);
    }
    return 0;
}

/* ---- systemd ---- */

/* Says to systemd, which started this program with Type=notify, what the program does now: a
   datagram to the socket that the environment names. Nobody asked: nothing is sent. */
static void notify(const char *state)
{
    const char *path = getenv("NOTIFY_SOCKET");
    struct sockaddr_un address;
    size_t len = path != NULL ? strlen(path) : 0;
    int fd;
    if (len < 2 || len >= sizeof address.sun_path || (path[0] != '/' && path[0] != '@')) {
        return;
    }
    memset(&address, 0, sizeof address);
    address.sun_family = AF_UNIX;
    memcpy(address.sun_path, path, len);
    if (path[0] == '@') { /* an abstract name */
        address.sun_path[0] = '\0';
    }
    fd = socket(AF_UNIX, SOCK_DGRAM, 0);
    if (fd >= 0) {
        (void)!sendto(fd, state, strlen(state), MSG_DONTWAIT, (const struct sockaddr *)&address,
                      (socklen_t)(offsetof(struct sockaddr_un, sun_path) + len));
        (void)close(fd);
    }
}

static void on_watchdog(vkp_timer *timer)
{
    (void)timer;
    notify("WATCHDOG=1");
}

/* With WatchdogSec= systemd restarts a program that it does not hear from: from its main loop,
   twice in that time. */
static void start_watchdog(vkp_timer *timer)
{
    const char *text = getenv("WATCHDOG_USEC");
    const char *pid = getenv("WATCHDOG_PID");
    size_t usec = 0;
    size_t whose = (size_t)getpid();
    if (text == NULL || !read_number(text, &usec) || usec < 2 ||
        (pid != NULL && (!read_number(pid, &whose) || whose != (size_t)getpid()))) {
        return;
    }
    if (vkp_timer_start(timer, main_loop, on_watchdog, (uint64_t)usec * 500,
                        vkp_loop_after_ms(main_loop, 0)) != VKP_OK) {
        (void)fail("watchdog", "no timer");
    }
}

/* ---- serving ---- */

/* SIGHUP: reads the password file again. */
static void reload(vkp_relay *relay, options *opts)
{
    if (opts->pass_file == NULL) {
        on_log(opts, VKP_LOG_WARN, "SIGHUP: there is no --pass-file to read again");
    } else if (!read_password(opts)) {
        (void)fail(opts->pass_file, strerror(errno));
    } else if (vkp_relay_set_login(relay, vkp_str_of(opts->user), vkp_str_of(opts->password)) !=
               VKP_OK) {
        (void)fail(opts->pass_file, "no memory");
    }
}

/* Runs until vkp_loop_stop, which is called by a signal, at the end of a drain, and after the time
   without clients (--linger).                                                                 */
static vkp_status run_main_loop(vkp_relay *relay, options *opts)
{
    vkp_status status = vkp_loop_run(main_loop);
    if (reload_asked) {
        reload_asked = 0;
        reload(relay, opts);
    }
    if (metrics_asked) {
        metrics_asked = 0;
        if (vkp_relay_survey_then(relay, print_counters, relay) != VKP_OK) {
            print_counters(relay, NULL);
        }
    }
    return status;
}

static void *run_loop(void *loop)
{
    (void)!vkp_loop_run((vkp_loop *)loop);
    return NULL;
}

static void set_and_stop(void *flag)
{
    *(bool *)flag = true;
    vkp_loop_stop(main_loop);
}

/* Runs until a signal, or until no client is left (--linger), then drains. A second signal ends the
   drain immediately.                                                                          */
static int serve(vkp_relay *relay, options *opts, const bool *idle)
{
    bool drained = false;
    vkp_status status = VKP_OK;
    vkp_timer watchdog = VKP_ZERO;
    start_watchdog(&watchdog);
    notify("READY=1");
    while (status == VKP_OK && ends_asked == 0 && !*idle) {
        status = run_main_loop(relay, opts);
    }
    notify("STOPPING=1");
    if (status == VKP_OK) {
        vkp_relay_drain(relay, set_and_stop, &drained, vkp_after_ms(DRAIN_MS));
        while (status == VKP_OK && !drained && ends_asked < 2) {
            status = run_main_loop(relay, opts);
        }
    }
    vkp_timer_stop(&watchdog);
    return status == VKP_OK ? 0 : fail("event loop", strerror(errno));
}

static void *run_resolver(void *user)
{
    vkp_resolver_run((vkp_resolver *)user);
    vkp_resolver_unref((vkp_resolver *)user);
    return NULL;
}

/* A thread looks the server's host name up. Nobody waits for its end: a name server that does not
   answer would delay the end of the program. NULL: none is needed, or none can be had; then the
   main loop looks the name up. */
static vkp_resolver *start_resolver(const options *opts, const vkp_env *env)
{
    vkp_resolver *resolver;
    pthread_t thread;
    if (opts->server == NULL || strncmp(opts->server, "tcp:", 4) != 0 ||
        vkp_resolver_open(env, &resolver) != VKP_OK) {
        return NULL;
    }
    if (pthread_create(&thread, NULL, run_resolver, vkp_resolver_ref(resolver)) != 0) {
        vkp_resolver_unref(resolver);
        vkp_resolver_unref(resolver);
        return NULL;
    }
    (void)pthread_detach(thread);
    return resolver;
}

static vkp_status open_relay(const options *opts, const vkp_env *env, vkp_loop **loops, bool *idle,
                             vkp_relay **relay)
{
    vkp_status status;
    vkp_relay_config config = VKP_ZERO;
    config.server = vkp_str_of(opts->server);
    config.upstreams = opts->upstreams;
    config.private_max = opts->privates;
    config.shared_only = opts->privates == 0;
    config.hold_ms = opts->hold_ms > 0 ? opts->hold_ms : VKP_OFF;
    config.close_on_gap = opts->close_on_gap;
    config.username = vkp_str_of(opts->user);
    config.password = vkp_str_of(opts->password);
    config.loops = loops;
    config.loop_count = opts->threads;
    config.queue_frames = opts->queue_frames;
    config.queue_bytes = opts->queue_bytes;
    config.gather_bytes = opts->gather_bytes;
    config.max_request_bytes = opts->gather_bytes;
    config.on_full = opts->on_full;
    config.max_clients = opts->max_clients;
    config.max_clients_per_uid = opts->max_clients_per_uid;
    config.allow_uids = opts->allow_uids;
    config.allow_uid_count = opts->allow_uid_count;
    config.check_ms = (uint32_t)opts->check_files_ms;
    config.measure_lag = opts->metrics != NULL;
    config.shutdown_notice = vkp_str_of(opts->shutdown_notice);
    if (opts->linger_ms != NO_LINGER) {
        config.linger_ms = (uint32_t)opts->linger_ms;
        config.on_idle = set_and_stop;
        config.user = idle;
    }
    config.env = env;
    config.resolver = start_resolver(opts, env);
    status = vkp_relay_open(&config, relay);
    vkp_resolver_unref(config.resolver); /* the relay has its own reference */
    return status;
}

/* Serves --metrics; an address on this machine answers for no other name. */
static int listen_web(web *self, const options *opts)
{
    vkp_status status;
    if (opts->metrics == NULL) {
        return 0;
    }
    self->loop = main_loop;
    self->has_server = opts->server != NULL;
    status = open_web(self, opts->metrics, !is_local(opts->metrics));
    if (status != VKP_OK) {
        return fail(opts->metrics,
                    status == VKP_ERR_SYS ? strerror(errno) : vkp_status_str(status));
    }
    return 0;
}

static int run(options *opts, const vkp_env *env, vkp_loop **loops)
{
    pthread_t threads[MOST_THREADS];
    static web page; /* its jobs end when the loops close */
    vkp_relay *relay;
    size_t started = 1;
    bool idle = false;
    int code;
    vkp_status status = open_relay(opts, env, loops, &idle, &relay);
    if (status != VKP_OK) {
        return fail(opts->server != NULL ? opts->server : "relay", vkp_status_str(status));
    }
    catch_signals();
    page.relay = relay;
    code = listen_all(relay, opts);
    if (code == 0) {
        code = listen_web(&page, opts);
    }
    while (code == 0 && started < opts->threads) {
        if (pthread_create(&threads[started], NULL, run_loop, loops[started]) != 0) {
            code = fail("thread", "cannot be started");
        } else {
            started++;
        }
    }
    if (code == 0) {
        code = serve(relay, opts, &idle);
    }
    while (started > 1) {
        started--;
        vkp_loop_stop(loops[started]);
        (void)pthread_join(threads[started], NULL);
    }
    close_web(&page);
    vkp_relay_unref(relay);
    return code;
}

/* ---- --check: the check of another relay, or of a server ---- */

typedef struct check_result {
    vkp_health health;
    bool there;
} check_result;

static void on_health(void *user, const vkp_health *health)
{
    check_result *result = (check_result *)user;
    result->health = *health;
    result->there = true;
    vkp_loop_stop(main_loop);
}

static const char *health_text(const vkp_health *health)
{
    static const struct {
        vkp_status status;
        const char *text;
    } texts[] = {{VKP_ERR_REFUSED, "nobody accepts connections there"},
                 {VKP_ERR_PROTOCOL, "the answer to PING is not PONG"},
                 {VKP_ERR_DISCONNECTED, "it closed the connection without an answer"},
                 {VKP_ERR_TIMEOUT, "no answer in time"}};
    size_t i;
    for (i = 0; i < sizeof texts / sizeof *texts; i++) {
        if (texts[i].status == health->status) {
            return texts[i].text;
        }
    }
    return health->status == VKP_ERR_SYS ? strerror(health->sys_error)
                                         : vkp_status_str(health->status);
}

static int check(const char *address)
{
    vkp_health_config config = VKP_ZERO;
    vkp_health_check *running;
    check_result result = VKP_ZERO;
    vkp_status status;
    config.address = vkp_str_of(address);
    config.on_result = on_health;
    config.user = &result;
    status = vkp_health_check_open(main_loop, &config, &running);
    if (status != VKP_OK) {
        return fail(address, vkp_status_str(status));
    }
    while (status == VKP_OK && !result.there) {
        status = vkp_loop_run(main_loop);
    }
    vkp_health_check_unref(running);
    if (status != VKP_OK) {
        return fail("event loop", strerror(errno));
    }
    if (result.health.status != VKP_OK) {
        return fail(address, health_text(&result.health));
    }
    printf("ok: %s answered in %.3f ms\n", address, (double)result.health.elapsed_ns / 1e6);
    return 0;
}

int main(int argc, char **argv)
{
    vkp_loop *loops[MOST_THREADS];
    vkp_loop_config config = VKP_ZERO;
    static vkp_env env; /* a resolver's thread may outlive this function */
    static options opts;
    size_t opened = 0;
    int code = read_options(argc, argv, &opts);
    if (code >= 0) {
        return code;
    }
    raise_descriptor_limit();
    env.log = opts.check == NULL ? on_log : NULL; /* --check prints one line, no log */
    env.log_level = opts.log_level;
    env.user = &opts;
    config.backend = opts.backend;
    config.env = &env;
    while (opened < opts.threads && vkp_loop_open(&config, &loops[opened]) == VKP_OK) {
        opened++;
    }
    if (opened < opts.threads) {
        code = fail("event loop", strerror(errno));
    } else {
        main_loop = loops[0];
        code = opts.check != NULL ? check(opts.check) : run(&opts, &env, loops);
    }
    while (opened > 0) {
        opened--;
        vkp_loop_close(loops[opened]);
        vkp_loop_unref(loops[opened]);
    }
    return code;
}
