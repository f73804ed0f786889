/* cc -I. examples/socket_life.c backends/vkp_backend_poll.c -pthread -o socket_life
   SPDX-License-Identifier: MIT

   The life of a listening socket, step by step: socket_life [PATH]
   Each reference keeps the socket open: a handle of the program, or a connected client. The last
   unref removes the files. After each step the program prints the state of the socket and compares
   it with the expected state; the exit code is 1 if they differ once.                          */
#define VKP_IMPLEMENTATION
#include "valkey_push.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define PATIENCE_MS 10000

typedef struct life {
    const char *program;
    const char *path;
    vkp_registry *registry;
    vkp_loop *loop;
    vkp_weak_socket weak; /* to the first socket; zeroed before that: to none */
    unsigned came, went;  /* clients accepted, clients gone */
    unsigned ended;       /* listeners that ended */
    unsigned wrong;       /* differences from the expected state */
} life;

static void must(life *self, bool is_so, const char *what)
{
    if (!is_so) {
        printf("  WRONG: %s\n", what);
        self->wrong++;
    }
}

/* The type and mode of a file as `ls -l` prints them: a socket with mode 0600 is "srw-------". */
static const char *on_disk(const char *path)
{
    struct stat found;
    if (lstat(path, &found) != 0) {
        return "-";
    }
    return found.st_mode == (S_IFSOCK | 0600)  ? "srw-------"
           : found.st_mode == (S_IFREG | 0600) ? "-rw-------"
                                               : "other";
}

/* Prints the state after a step, and compares it with the expected state. */
static void show(life *self, const char *step, size_t references, bool files, bool upgrades)
{
    char lock_path[128];
    const char *found, *lock;
    vkp_registry_stats stats;
    vkp_socket *sock = NULL; /* the upgrade gives it */
    bool upgraded = vkp_socket_upgrade(&self->weak, &sock) == VKP_OK;
    vkp_socket_unref(sock);
    vkp_registry_get_stats(self->registry, &stats);
    (void)snprintf(lock_path, sizeof lock_path, "%s.lock", self->path);
    found = on_disk(self->path);
    lock = on_disk(lock_path);
    printf("%-47s %10zu  %-10s  %-10s  %s\n", step, stats.references, found, lock,
           upgraded ? "yes" : "no");
    must(self, stats.references == references, "the references");
    must(self, strcmp(found, files ? "srw-------" : "-") == 0, "PATH");
    must(self, strcmp(lock, files ? "-rw-------" : "-") == 0, "PATH.lock");
    must(self, upgraded == upgrades, "the weak handle");
}

/* ---- clients: each holds a reference of the socket through its seat ---- */

static void on_accept(void *user, vkp_conn *conn)
{
    (void)conn;
    ((life *)user)->came++; /* the client has its seat */
}

static void on_close(vkp_conn *conn, void *user, vkp_close_reason reason, int sys_error)
{
    (void)conn;
    (void)reason;
    (void)sys_error;
    ((life *)user)->went++; /* the seat was given back */
}

static void on_end(void *user)
{
    ((life *)user)->ended++;
}

/* Runs the loop until the counter is `count`, at most PATIENCE_MS; after a failure, not at all. */
static void run_until(life *self, const unsigned *counter, unsigned count)
{
    uint64_t deadline = vkp_after_ms(PATIENCE_MS);
    while (self->wrong == 0 && *counter < count && vkp_now_ns() < deadline) {
        must(self, vkp_loop_run_once(self->loop, deadline) == VKP_OK, "the loop");
    }
    must(self, *counter == count, "clients that came and went");
}

/* Connects as any program does. */
static int come(life *self)
{
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    (void)snprintf(to.sun_path, sizeof to.sun_path, "%s", self->path);
    must(self, connect(fd, (const struct sockaddr *)&to, sizeof to) == 0, "connect");
    run_until(self, &self->came, self->came + 1);
    return fd;
}

static void leave(life *self, int fd)
{
    (void)close(fd);
    run_until(self, &self->went, self->went + 1);
}

static void first_life(life *self)
{
    static const vkp_conn_ops ops = {.on_close = on_close};
    vkp_listener_config config = {.follow = true,
                                  .conn = {.ops = &ops, .user = self},
                                  .on_accept = on_accept,
                                  .on_end = on_end};
    vkp_listener *listener;
    vkp_socket *again = NULL;
    int clients[3];
    vkp_status status = vkp_socket_open(self->registry, vkp_str_of(self->path), &config.socket);
    if (status == VKP_OK) {
        self->weak = vkp_socket_downgrade(config.socket);
        show(self, "the program opens it", 1, true, true);
        status = vkp_listener_open(self->loop, &config, &listener);
    }
    if (status != VKP_OK) {
        must(self, false, vkp_status_str(status));
        return;
    }
    show(self, "a listener follows it: that is no reference", 1, true, true);
    clients[0] = come(self);
    show(self, "a client comes", 2, true, true);
    clients[1] = come(self);
    clients[2] = come(self);
    show(self, "two more come", 4, true, true);
    must(self, vkp_socket_open(self->registry, vkp_str_of(self->path), &again) == VKP_OK,
         "by name");
    must(self, again == config.socket, "one socket of one path");
    show(self, "another part of the program asks for the path", 5, true, true);
    vkp_socket_unref(again);
    vkp_socket_unref(config.socket);
    show(self, "the program gives both handles back", 3, true, true);
    leave(self, clients[0]);
    leave(self, clients[1]);
    show(self, "two clients leave", 1, true, true);
    must(self, vkp_socket_upgrade(&self->weak, &again) == VKP_OK, "an upgrade");
    show(self, "the weak handle becomes a reference", 2, true, true);
    vkp_socket_unref(again);
    must(self, self->ended == 0, "the listener is there to the last");
    leave(self, clients[2]);
    show(self, "the last client leaves", 0, false, false);
    run_until(self, &self->ended, 1); /* on_end is called in a later task of the loop */
    vkp_listener_unref(listener);
}

/* A new socket of the same path: the weak handle does not upgrade to it, even if the new socket has
   the same address in memory.                                                                 */
static void next_life(life *self, const char *step)
{
    vkp_socket *sock = NULL;
    vkp_status status = vkp_socket_open(self->registry, vkp_str_of(self->path), &sock);
    must(self, status == VKP_OK, "a new socket");
    show(self, step, 1, true, false);
    vkp_socket_unref(sock);
    show(self, "it ends", 0, false, false);
}

/* ---- other processes: this program, started as `socket_life --child END PATH` ---- */

static vkp_registry *swept; /* global: at_exit and at_signal get no argument */

static void at_exit(void)
{
    (void)vkp_registry_cleanup_all(swept);
}

/* Also for SIGSEGV and other crashes. vkp_registry_unlink_all and vkp_loop_stop are the only calls
   of the library that are legal in a signal handler.                                          */
static void at_signal(int number)
{
    vkp_registry_unlink_all(swept);
    (void)raise(number); /* ends the process: SA_RESETHAND restored the default action */
}

/* Ends the process without an unref of the socket. The program itself registers the cleanup, in
   atexit and as a signal handler: the library registers none.                                 */
static int be_child(const char *end, const char *path)
{
    struct sigaction action = {.sa_handler = at_signal, .sa_flags = (int)SA_RESETHAND};
    vkp_socket *sock;
    if (vkp_registry_open(NULL, &swept) != VKP_OK || atexit(at_exit) != 0 ||
        sigaction(SIGTERM, &action, NULL) != 0 ||
        vkp_socket_open(swept, vkp_str_of(path), &sock) != VKP_OK) {
        return 1;
    }
    (void)raise(SIGSTOP); /* the parent checks the state, then kills or continues this process */
    return strcmp(end, "exit") == 0 ? 0 : raise(SIGTERM);
}

static void other_process(life *self, const char *end, int signal_number, const char *step,
                          bool files)
{
    vkp_socket *sock = NULL;
    int status = 0;
    pid_t pid = fork();
    if (pid == 0) {
        (void)execlp(self->program, self->program, "--child", end, self->path, (char *)NULL);
        _exit(127);
    }
    if (pid < 0 || waitpid(pid, &status, WUNTRACED) != pid || !WIFSTOPPED(status)) {
        must(self, false, "a child");
        return;
    }
    must(self, vkp_socket_open(self->registry, vkp_str_of(self->path), &sock) == VKP_ERR_IN_USE,
         "IN_USE");
    show(self, "another process serves it: IN_USE here", 0, true, false);
    must(self, kill(pid, signal_number) == 0 && waitpid(pid, &status, 0) == pid, "a child's end");
    must(self, WIFEXITED(status) == (strcmp(end, "exit") == 0), "how it ended");
    show(self, step, 0, files, false);
}

int main(int argc, char **argv)
{
    vkp_loop_config on = {.backend = &vkp_backend_poll};
    life self = {.program = argv[0], .path = argc > 1 ? argv[1] : "socket_life.sock"};
    if (argc == 4 && strcmp(argv[1], "--child") == 0) {
        return be_child(argv[2], argv[3]);
    }
    if (vkp_registry_open(NULL, &self.registry) != VKP_OK ||
        vkp_loop_open(&on, &self.loop) != VKP_OK) {
        fputs("socket_life: no registry, or no loop\n", stderr);
        return 1;
    }
    printf("PATH is %s\n%-47s %10s  %-10s  %-10s  %s\n", self.path, "step", "references", "PATH",
           "PATH.lock", "weak upgrades");
    show(&self, "nobody has asked for it", 0, false, false);
    first_life(&self);
    next_life(&self, "a new one of that path is not the weak handle's");
    other_process(&self, "kill", SIGKILL, "that one is killed, and leaves its files", true);
    next_life(&self, "they are taken over");
    other_process(&self, "exit", SIGCONT, "that one exits, and sweeps in atexit", false);
    other_process(&self, "signal", SIGCONT, "a signal ends that one; its handler unlinks", false);
    must(&self, vkp_registry_cleanup_all(self.registry) == 0, "nothing is left to sweep");
    vkp_loop_unref(self.loop);
    vkp_registry_unref(self.registry);
    printf("%s\n", self.wrong == 0 ? "as it must be" : "something is WRONG");
    return self.wrong > 0;
}
