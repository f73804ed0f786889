/* Child processes and a real server; see support.h.
   SPDX-License-Identifier: MIT */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE 1
#elif defined(__APPLE__) && !defined(_DARWIN_C_SOURCE)
#define _DARWIN_C_SOURCE 1
#endif
#include "internal.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/prctl.h>
#endif

extern char **environ;

/* --------------------------------------------------------------------------------------
   Children                                                                                  */

/* Pids under way, 0 for a free place. Atomics, not a lock: vkp_test_fail reads it anywhere. */
static int children[256];
static int children_owner;

static void remember_child(int pid)
{
    int none = 0;
    if (__atomic_compare_exchange_n(&children_owner, &none, (int)getpid(), 0, __ATOMIC_SEQ_CST,
                                    __ATOMIC_SEQ_CST)) {
        atexit(vkp_test_i_kill_children);
    }
    for (size_t i = 0; i < sizeof children / sizeof *children; i++) {
        int empty = 0;
        if (__atomic_compare_exchange_n(&children[i], &empty, pid, 0, __ATOMIC_SEQ_CST,
                                        __ATOMIC_SEQ_CST)) {
            return;
        }
    }
    kill(pid, SIGKILL);
    vkp_test_fail("too many child processes at once");
}

static void forget_child(int pid)
{
    for (size_t i = 0; i < sizeof children / sizeof *children; i++) {
        int expected = pid;
        __atomic_compare_exchange_n(&children[i], &expected, 0, 0, __ATOMIC_SEQ_CST,
                                    __ATOMIC_SEQ_CST);
    }
}

void vkp_test_i_kill_children(void)
{
    /* in a forked child these are the parent's */
    if (__atomic_load_n(&children_owner, __ATOMIC_SEQ_CST) != (int)getpid()) {
        return;
    }
    for (size_t i = 0; i < sizeof children / sizeof *children; i++) {
        int pid = __atomic_exchange_n(&children[i], 0, __ATOMIC_SEQ_CST);
        if (pid > 0) {
            kill(pid, SIGKILL);
        }
    }
}

static char *find_program(const char *name)
{
    if (strchr(name, '/')) {
        return access(name, X_OK) == 0 ? vkp_test_i_format("%s", name) : NULL;
    }
    const char *path = getenv("PATH");
    for (const char *at = path ? path : "/usr/bin:/bin"; *at;) {
        size_t len = strcspn(at, ":");
        char *full = vkp_test_i_format("%.*s/%s", (int)len, at, name);
        if (access(full, X_OK) == 0) {
            return full;
        }
        free(full);
        at += len + (at[len] == ':');
    }
    return NULL;
}

/* Between fork and exec: only what is safe in a child of a process with threads. */
static void become(const char *program, const char *const *argv, int out, int err, int parent)
{
#ifdef __linux__
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) {
        _exit(127);
    }
#else
    (void)parent;
#endif
    for (int number = 1; number < NSIG; number++) {
        signal(number, SIG_DFL);
    }
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    if (out >= 0) {
        dup2(out, STDOUT_FILENO);
    }
    if (err >= 0) {
        dup2(err, STDERR_FILENO);
    }
    /* execve promises not to write to them; its prototype is older than const */
    union {
        const char *const *promised;
        char *const *wanted;
    } arguments = {argv};
    execve(program, arguments.wanted, environ);
    _exit(127);
}

int vkp_test_i_spawn(const char *const *argv, int *out_fd, const char *log_path)
{
    char *program = find_program(argv[0]);
    if (!program) {
        vkp_test_fail("no program %s", argv[0]);
    }
    int pipe_fds[2] = {-1, -1};
    int log_fd = -1;
    if (out_fd && pipe(pipe_fds) != 0) {
        vkp_test_fail("pipe: %s", strerror(errno));
    }
    if (out_fd) {
        vkp_test_i_prepare_fd(pipe_fds[0]);
        vkp_test_i_prepare_fd(pipe_fds[1]);
    }
    if (log_path &&
        (log_fd = open(log_path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600)) < 0) {
        vkp_test_fail("open %s: %s", log_path, strerror(errno));
    }
    /* A signal that reached the child before its exec would run this program's handlers there. */
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int parent = (int)getpid();
    pid_t pid = fork();
    if (pid == 0) {
        become(program, argv, out_fd ? pipe_fds[1] : log_fd, log_fd, parent);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (pid < 0) {
        vkp_test_fail("fork: %s", strerror(errno));
    }
    remember_child((int)pid);
    free(program);
    if (log_fd >= 0) {
        close(log_fd);
    }
    if (out_fd) {
        close(pipe_fds[1]);
        *out_fd = pipe_fds[0];
    }
    return (int)pid;
}

int vkp_test_spawn(const char *const *argv, int *out_fd)
{
    return vkp_test_i_spawn(argv, out_fd, NULL);
}

/* Whether the child ended; then *code is its result and it is forgotten. */
static bool has_ended(int pid, int *code)
{
    int status = 0;
    pid_t got = 0;
    do {
        got = waitpid(pid, &status, WNOHANG);
    } while (got < 0 && errno == EINTR);
    if (got < 0) {
        vkp_test_fail("waitpid %d: %s", pid, strerror(errno));
    }
    if (got == 0) {
        return false;
    }
    forget_child(pid);
    *code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    return true;
}

int vkp_test_reap(int pid, int signal_number)
{
    int code = 0;
    uint64_t deadline = vkp_test_deadline();
    if (signal_number) {
        kill(pid, signal_number);
    }
    while (!has_ended(pid, &code)) {
        if (vkp_now_ns() > deadline) {
            vkp_test_fail("process %d did not end", pid);
        }
        vkp_test_i_poll(-1, 0, vkp_now_ns() + 1000000);
    }
    return code;
}

const char *vkp_test_relay_program(void)
{
    const char *program = getenv("VKP_TEST_RELAY");
    if (!program) {
        vkp_test_fail("VKP_TEST_RELAY must hold the path of valkey-push-relay (ctest sets it)");
    }
    return program;
}

/* --------------------------------------------------------------------------------------
   The server                                                                                */

struct vkp_test_server {
    int port;
    int pid;
    char *tcp;
    char *unix_address;
    const char *path;
    const char *log_path;
    char **options;
};

static pthread_once_t program_once = PTHREAD_ONCE_INIT;
static char *program_found;

static void find_server(void)
{
    const char *wanted = getenv("VKP_TEST_SERVER");
    if (wanted && *wanted) {
        program_found = find_program(wanted);
        if (!program_found) {
            vkp_test_fail("VKP_TEST_SERVER names %s, which is no program", wanted);
        }
        return;
    }
    program_found = find_program("valkey-server");
    if (!program_found) {
        program_found = find_program("redis-server");
    }
}

const char *vkp_test_server_program(void)
{
    pthread_once(&program_once, find_server);
    return program_found;
}

/* Below 32768, where neither Linux nor macOS takes the source ports of outgoing connections: a
   client that retries a dead server's port from that range sooner or later connects to ITSELF
   (TCP's simultaneous open), and the server cannot have its port back.                          */
static int find_port(void)
{
    static unsigned tries;
    for (int i = 0; i < 1000; i++) {
        unsigned n = (unsigned)getpid() * 131 + __atomic_fetch_add(&tries, 1, __ATOMIC_RELAXED);
        int port = 12000 + (int)(n % 20000);
        int fd = socket(AF_INET, SOCK_STREAM, 0);
        struct sockaddr_in address;
        memset(&address, 0, sizeof address);
        address.sin_family = AF_INET;
        address.sin_port = htons((uint16_t)port);
        address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        int on = 1;
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
        int failed = bind(fd, (const struct sockaddr *)&address, sizeof address);
        close(fd);
        if (!failed) {
            return port;
        }
    }
    vkp_test_fail("no free port between 12000 and 32000");
}

static void launch(vkp_test_server *server)
{
    char *port = vkp_test_i_format("%d", server->port);
    const char *fixed[] = {vkp_test_server_program(),
                           "--port",
                           port,
                           "--bind",
                           "127.0.0.1",
                           "--unixsocket",
                           server->path,
                           "--save",
                           "",
                           "--appendonly",
                           "no",
                           "--daemonize",
                           "no",
                           "--dir",
                           vkp_test_dir()};
    size_t count = sizeof fixed / sizeof *fixed;
    size_t more = 0;
    while (server->options[more]) {
        more++;
    }
    const char **argv = (const char **)vkp_test_i_alloc(NULL, (count + more + 1) * sizeof *argv);
    memcpy(argv, fixed, sizeof fixed);
    for (size_t i = 0; i <= more; i++) {
        argv[count + i] = server->options[i];
    }
    server->pid = vkp_test_i_spawn(argv, NULL, server->log_path);
    free(argv);
    free(port);
}

/* One PING on the server's socket file, whose path is nobody else's: an answer there says that
   THIS server runs its event loop, and its TCP port is bound before that. NOAUTH is an answer.  */
static bool answers(const vkp_test_server *server)
{
    int fd = vkp_test_connect(server->unix_address);
    if (fd < 0) {
        return false;
    }
    vkp_test_peer *peer = vkp_test_peer_of(fd);
    size_t len = 0;
    const char *reply =
        vkp_test_peer_command(peer, "PING", NULL) ? vkp_test_peer_read_frame(peer, &len) : NULL;
    bool ready = reply && (!strncmp(reply, "+PONG", 5) || !strncmp(reply, "-NOAUTH", 7));
    vkp_test_peer_close(peer);
    return ready;
}

/* False when the process ended instead, as it does when the port was taken in between. */
static bool await_ready(vkp_test_server *server)
{
    uint64_t deadline = vkp_test_deadline();
    int code = 0;
    while (!answers(server)) {
        if (has_ended(server->pid, &code)) {
            server->pid = 0;
            return false;
        }
        if (vkp_now_ns() > deadline) {
            vkp_test_fail("the server on port %d does not answer", server->port);
        }
        vkp_test_i_poll(-1, 0, vkp_now_ns() + 2000000);
    }
    return true;
}

static void fail_with_log(const vkp_test_server *server)
{
    char text[1500] = "";
    FILE *file = fopen(server->log_path, "r");
    if (file) {
        if (fseek(file, -(long)sizeof text + 1, SEEK_END) != 0) {
            rewind(file);
        }
        text[fread(text, 1, sizeof text - 1, file)] = '\0';
        fclose(file);
    }
    vkp_test_fail("%s does not start; the end of its log:\n%s", vkp_test_server_program(), text);
}

static char **copy_options(const char *const *options)
{
    size_t count = 0;
    while (options && options[count]) {
        count++;
    }
    char **copy = (char **)vkp_test_i_alloc(NULL, (count + 1) * sizeof *copy);
    for (size_t i = 0; i < count; i++) {
        copy[i] = vkp_test_i_format("%s", options[i]);
    }
    copy[count] = NULL;
    return copy;
}

vkp_test_server *vkp_test_server_open(const char *const *options)
{
    if (!vkp_test_server_program()) {
        vkp_test_fail("neither valkey-server nor redis-server is on PATH");
    }
    vkp_test_server *server = (vkp_test_server *)vkp_test_i_alloc(NULL, sizeof *server);
    memset(server, 0, sizeof *server);
    server->options = copy_options(options);
    server->path = vkp_test_fresh_path("server");
    server->log_path = vkp_test_fresh_path("server.log");
    server->unix_address = vkp_test_i_format("unix:%s", server->path);
    for (int i = 0; i < 5; i++) {
        server->port = find_port();
        launch(server);
        if (await_ready(server)) {
            server->tcp = vkp_test_i_format("tcp:127.0.0.1:%d", server->port);
            return server;
        }
    }
    fail_with_log(server);
    return NULL;
}

const char *vkp_test_server_tcp(const vkp_test_server *server)
{
    return server->tcp;
}

const char *vkp_test_server_unix(const vkp_test_server *server)
{
    return server->unix_address;
}

int vkp_test_server_port(const vkp_test_server *server)
{
    return server->port;
}

int vkp_test_server_pid(const vkp_test_server *server)
{
    return server->pid;
}

void vkp_test_server_stop(vkp_test_server *server, int signal_number)
{
    if (server->pid) {
        vkp_test_reap(server->pid, signal_number);
    }
    server->pid = 0;
}

void vkp_test_server_kill(vkp_test_server *server)
{
    vkp_test_server_stop(server, SIGKILL);
}

void vkp_test_server_restart(vkp_test_server *server)
{
    vkp_test_server_kill(server);
    launch(server);
    if (!await_ready(server)) {
        fail_with_log(server);
    }
}

void vkp_test_server_close(vkp_test_server *server)
{
    if (!server) {
        return;
    }
    vkp_test_server_kill(server);
    for (size_t i = 0; server->options[i]; i++) {
        free(server->options[i]);
    }
    free(server->options);
    free(server->tcp);
    free(server->unix_address);
    free(server);
}
