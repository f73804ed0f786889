/* Files, descriptors, the counting environment, waits; see support.h.
   SPDX-License-Identifier: MIT */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE 1
#elif defined(__APPLE__) && !defined(_DARWIN_C_SOURCE)
#define _DARWIN_C_SOURCE 1
#endif
#include "internal.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

static void remove_dir(void);

void vkp_test_fail(const char *format, ...)
{
    char text[2048];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    fprintf(stderr, "vkp_test: %s\n", text);
    fflush(stderr);
    /* abort runs no exit handlers */
    vkp_test_i_kill_children();
    remove_dir();
    abort();
}

uint64_t vkp_test_deadline(void)
{
    const char *patience = getenv("VKP_TEST_PATIENCE");
    unsigned long seconds = patience ? strtoul(patience, NULL, 10) : 0;
    return vkp_now_ns() + (uint64_t)(seconds > 0 ? seconds : 30) * UINT64_C(1000000000);
}

vkp_status vkp_test_handle(vkp_loop *loop, vkp_mpsc_rx *rx, void (*fn)(void *user), void *user,
                           vkp_handler **handler)
{
    vkp_case receive = vkp_case_mpsc_recv(rx, NULL);
    return vkp_handler_open(loop, &receive, fn, user, handler);
}

int vkp_test_i_poll(int fd, short events, uint64_t deadline_ns)
{
    struct pollfd item = {fd, events, 0};
    for (;;) {
        uint64_t now = vkp_now_ns();
        uint64_t left_ms = deadline_ns > now ? (deadline_ns - now) / 1000000 + 1 : 0;
        int count = poll(&item, fd < 0 ? 0 : 1, left_ms > 60000 ? 60000 : (int)left_ms);
        if (count > 0) {
            return 1;
        }
        if (count < 0 && errno != EINTR) {
            vkp_test_fail("poll: %s", strerror(errno));
        }
        if (vkp_now_ns() >= deadline_ns) {
            return 0;
        }
    }
}

void *vkp_test_i_alloc(void *old, size_t bytes)
{
    void *block = realloc(old, bytes);
    if (!block) {
        vkp_test_fail("out of memory in the test itself (%lu bytes)", (unsigned long)bytes);
    }
    return block;
}

char *vkp_test_i_format(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    int len = vsnprintf(NULL, 0, format, arguments);
    va_end(arguments);
    char *text = (char *)vkp_test_i_alloc(NULL, (size_t)len + 1);
    va_start(arguments, format);
    vsnprintf(text, (size_t)len + 1, format, arguments);
    va_end(arguments);
    return text;
}

/* --------------------------------------------------------------------------------------
   Files and descriptors                                                                     */

typedef struct kept_path {
    struct kept_path *next;
    char *name;
    char *path;
} kept_path;

static pthread_mutex_t files_lock = PTHREAD_MUTEX_INITIALIZER;
static char files_dir[32];
static int files_owner;
static unsigned files_number;
static kept_path *files_kept;

/* Depth first; symbolic links are removed, not followed. */
static void remove_tree(const char *path)
{
    struct stat info;
    if (lstat(path, &info) != 0) {
        return;
    }
    DIR *dir = S_ISDIR(info.st_mode) ? opendir(path) : NULL;
    for (struct dirent *entry = dir ? readdir(dir) : NULL; entry; entry = readdir(dir)) {
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..")) {
            continue;
        }
        char *inner = vkp_test_i_format("%s/%s", path, entry->d_name);
        remove_tree(inner);
        free(inner);
    }
    if (dir) {
        closedir(dir);
    }
    remove(path);
}

static void remove_dir(void)
{
    /* a forked child that calls exit must not take its parent's files away */
    if (files_owner != (int)getpid()) {
        return;
    }
    remove_tree(files_dir);
}

/* For leak checkers: the paths given out live until here. */
static void forget_files(void)
{
    vkp_test_i_kill_children();
    remove_dir();
    while (files_kept) {
        kept_path *kept = files_kept;
        files_kept = kept->next;
        free(kept->name);
        free(kept->path);
        free(kept);
    }
}

/* /tmp, not $TMPDIR: macOS's own is so long that a socket address barely fits behind it. */
static const char *dir_locked(void)
{
    if (files_dir[0]) {
        return files_dir;
    }
    strcpy(files_dir, "/tmp/vkp-test.XXXXXX");
    if (!mkdtemp(files_dir)) {
        vkp_test_fail("mkdtemp %s: %s", files_dir, strerror(errno));
    }
    files_owner = (int)getpid();
    atexit(forget_files);
    return files_dir;
}

static const char *path_locked(const char *name)
{
    for (kept_path *kept = files_kept; kept; kept = kept->next) {
        if (!strcmp(kept->name, name)) {
            return kept->path;
        }
    }
    kept_path *kept = (kept_path *)vkp_test_i_alloc(NULL, sizeof *kept);
    kept->name = vkp_test_i_format("%s", name);
    kept->path = vkp_test_i_format("%s/%s", dir_locked(), name);
    kept->next = files_kept;
    files_kept = kept;
    return kept->path;
}

const char *vkp_test_dir(void)
{
    pthread_mutex_lock(&files_lock);
    const char *dir = dir_locked();
    pthread_mutex_unlock(&files_lock);
    return dir;
}

const char *vkp_test_path(const char *name)
{
    pthread_mutex_lock(&files_lock);
    const char *path = path_locked(name);
    pthread_mutex_unlock(&files_lock);
    return path;
}

const char *vkp_test_fresh_path(const char *stem)
{
    pthread_mutex_lock(&files_lock);
    char *name = vkp_test_i_format("%s.%u", stem, ++files_number);
    const char *path = path_locked(name);
    pthread_mutex_unlock(&files_lock);
    free(name);
    return path;
}

const char *vkp_test_fresh_address(const char *stem)
{
    const char *path = vkp_test_fresh_path(stem);
    char *key = vkp_test_i_format("address of %s", path);
    pthread_mutex_lock(&files_lock);
    kept_path *kept = (kept_path *)vkp_test_i_alloc(NULL, sizeof *kept);
    kept->name = key;
    kept->path = vkp_test_i_format("unix:%s", path);
    kept->next = files_kept;
    files_kept = kept;
    pthread_mutex_unlock(&files_lock);
    return kept->path;
}

bool vkp_test_exists(const char *path)
{
    struct stat info;
    return lstat(path, &info) == 0;
}

int vkp_test_fd_count(void)
{
    DIR *dir = opendir("/proc/self/fd");
    if (!dir) {
        dir = opendir("/dev/fd");
    }
    if (!dir) {
        vkp_test_fail("neither /proc/self/fd nor /dev/fd can be read: %s", strerror(errno));
    }
    int count = -1; /* the descriptor of dir */
    for (struct dirent *entry = readdir(dir); entry; entry = readdir(dir)) {
        count += entry->d_name[0] != '.';
    }
    closedir(dir);
    return count;
}

void vkp_test_i_prepare_fd(int fd)
{
    fcntl(fd, F_SETFD, FD_CLOEXEC);
#ifdef SO_NOSIGPIPE
    int on = 1;
    setsockopt(fd, SOL_SOCKET, SO_NOSIGPIPE, &on, sizeof on);
#endif
}

void vkp_test_socket_pair(int fds[2])
{
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, fds) != 0) {
        vkp_test_fail("socketpair: %s", strerror(errno));
    }
    vkp_test_i_prepare_fd(fds[0]);
    vkp_test_i_prepare_fd(fds[1]);
    fcntl(fds[0], F_SETFL, fcntl(fds[0], F_GETFL) | O_NONBLOCK);
}

/* --------------------------------------------------------------------------------------
   The environment                                                                           */

#define LIVE UINT64_C(0x766b705f6c697665)
#define FREED UINT64_C(0x766b705f66726565)

/* In front of each block; 32 bytes keep the alignment of malloc. */
typedef struct block_head {
    uint64_t mark;
    uint64_t bytes;
    vkp_test_env *owner;
    void *reserved;
} block_head;

static bool must_fail(vkp_test_env *env)
{
    env->i_calls++;
    uint64_t nth = env->i_calls - env->i_armed_at;
    bool fails = false;
    switch (env->i_fault) {
    case VKP_TEST_FAULT_NONE:
        break;
    case VKP_TEST_FAULT_ONCE:
        fails = nth == env->i_k;
        break;
    case VKP_TEST_FAULT_FROM:
        fails = nth >= env->i_k;
        break;
    case VKP_TEST_FAULT_EVERY:
        fails = nth % env->i_k == 0;
        break;
    }
    env->i_failures += fails;
    return fails;
}

static void check_head(const vkp_test_env *env, const block_head *head, size_t old_bytes)
{
    if (head->mark == FREED) {
        vkp_test_fail("a block of %lu bytes was freed twice", (unsigned long)head->bytes);
    }
    if (head->mark != LIVE) {
        vkp_test_fail("a block was freed that this allocator did not give");
    }
    if (head->owner != env) {
        vkp_test_fail("a block was freed through another env than it came from");
    }
    if (head->bytes != old_bytes) {
        vkp_test_fail("a block of %lu bytes was freed or resized as one of %lu",
                      (unsigned long)head->bytes, (unsigned long)old_bytes);
    }
}

static void *resize_locked(vkp_test_env *env, void *ptr, size_t old_bytes, size_t new_bytes)
{
    block_head *head = ptr ? (block_head *)ptr - 1 : NULL;
    if (head) {
        check_head(env, head, old_bytes);
    }
    if (new_bytes == 0) {
        if (head) {
            head->mark = FREED;
            env->i_live_bytes -= old_bytes;
            env->i_live_blocks--;
            free(head);
        }
        return NULL;
    }
    if (new_bytes > (head ? old_bytes : 0) && must_fail(env)) {
        return NULL;
    }
    block_head *moved = (block_head *)realloc(head, sizeof *head + new_bytes);
    if (!moved) {
        return NULL;
    }
    env->i_live_bytes += new_bytes - (head ? old_bytes : 0);
    env->i_live_blocks += head ? 0 : 1;
    if (env->i_live_bytes > env->i_peak_bytes) {
        env->i_peak_bytes = env->i_live_bytes;
    }
    moved->mark = LIVE;
    moved->bytes = new_bytes;
    moved->owner = env;
    return moved + 1;
}

static void *env_alloc(void *user, void *ptr, size_t old_bytes, size_t new_bytes)
{
    vkp_test_env *env = (vkp_test_env *)user;
    pthread_mutex_lock(&env->i_lock);
    void *block = resize_locked(env, ptr, old_bytes, new_bytes);
    pthread_mutex_unlock(&env->i_lock);
    return block;
}

static void env_log(void *user, vkp_log_level level, const char *text)
{
    vkp_test_env *env = (vkp_test_env *)user;
    if (strlen(text) > 512 || strchr(text, '\n')) {
        vkp_test_fail("a log line is too long or holds a newline: %.600s", text);
    }
    pthread_mutex_lock(&env->i_lock);
    if (env->i_line_count == env->i_line_capacity) {
        env->i_line_capacity = env->i_line_capacity ? env->i_line_capacity * 2 : 16;
        env->i_lines =
            (char **)vkp_test_i_alloc(env->i_lines, env->i_line_capacity * sizeof *env->i_lines);
        env->i_levels = (vkp_log_level *)vkp_test_i_alloc(env->i_levels, env->i_line_capacity *
                                                                             sizeof *env->i_levels);
    }
    env->i_lines[env->i_line_count] = vkp_test_i_format("%s", text);
    env->i_levels[env->i_line_count++] = level;
    pthread_mutex_unlock(&env->i_lock);
}

void vkp_test_env_init(vkp_test_env *env)
{
    memset(env, 0, sizeof *env);
    pthread_mutex_init(&env->i_lock, NULL);
    env->env.alloc = env_alloc;
    env->env.log = env_log;
    env->env.user = env;
    env->env.log_level = VKP_LOG_DEBUG;
}

void vkp_test_env_deinit(vkp_test_env *env)
{
    if (env->i_live_blocks) {
        vkp_test_fail("%lu blocks (%lu bytes) are still allocated",
                      (unsigned long)env->i_live_blocks, (unsigned long)env->i_live_bytes);
    }
    vkp_test_env_log_clear(env);
    free(env->i_lines);
    free(env->i_levels);
    pthread_mutex_destroy(&env->i_lock);
    memset(env, 0, sizeof *env);
}

void vkp_test_env_fault(vkp_test_env *env, vkp_test_fault fault, uint64_t k)
{
    if (fault != VKP_TEST_FAULT_NONE && k == 0) {
        vkp_test_fail("faults count from 1");
    }
    pthread_mutex_lock(&env->i_lock);
    env->i_fault = fault;
    env->i_k = k;
    env->i_armed_at = env->i_calls;
    pthread_mutex_unlock(&env->i_lock);
}

uint64_t vkp_test_env_calls(vkp_test_env *env)
{
    pthread_mutex_lock(&env->i_lock);
    uint64_t calls = env->i_calls;
    pthread_mutex_unlock(&env->i_lock);
    return calls;
}

uint64_t vkp_test_env_failures(vkp_test_env *env)
{
    pthread_mutex_lock(&env->i_lock);
    uint64_t failures = env->i_failures;
    pthread_mutex_unlock(&env->i_lock);
    return failures;
}

static size_t read_size(vkp_test_env *env, const size_t *field)
{
    pthread_mutex_lock(&env->i_lock);
    size_t value = *field;
    pthread_mutex_unlock(&env->i_lock);
    return value;
}

size_t vkp_test_env_live_bytes(vkp_test_env *env)
{
    return read_size(env, &env->i_live_bytes);
}

size_t vkp_test_env_live_blocks(vkp_test_env *env)
{
    return read_size(env, &env->i_live_blocks);
}

size_t vkp_test_env_peak_bytes(vkp_test_env *env)
{
    return read_size(env, &env->i_peak_bytes);
}

size_t vkp_test_env_log_count(vkp_test_env *env)
{
    return read_size(env, &env->i_line_count);
}

vkp_log_level vkp_test_env_log_line(vkp_test_env *env, size_t index, char *text, size_t size)
{
    pthread_mutex_lock(&env->i_lock);
    if (index >= env->i_line_count) {
        vkp_test_fail("log line %lu of %lu", (unsigned long)index,
                      (unsigned long)env->i_line_count);
    }
    snprintf(text, size, "%s", env->i_lines[index]);
    vkp_log_level level = env->i_levels[index];
    pthread_mutex_unlock(&env->i_lock);
    return level;
}

bool vkp_test_env_logged(vkp_test_env *env, const char *part)
{
    bool found = false;
    pthread_mutex_lock(&env->i_lock);
    for (size_t i = 0; i < env->i_line_count && !found; i++) {
        found = strstr(env->i_lines[i], part) != NULL;
    }
    pthread_mutex_unlock(&env->i_lock);
    return found;
}

void vkp_test_env_log_clear(vkp_test_env *env)
{
    pthread_mutex_lock(&env->i_lock);
    for (size_t i = 0; i < env->i_line_count; i++) {
        free(env->i_lines[i]);
    }
    env->i_line_count = 0;
    pthread_mutex_unlock(&env->i_lock);
}

/* --------------------------------------------------------------------------------------
   Waits                                                                                     */

/* Conditions may change without the loop being told (another thread's counter), hence slices. */
#define SLICE_NS UINT64_C(5000000)

void vkp_test_run_until(vkp_loop *loop, bool (*done)(void *user), void *user, const char *what)
{
    uint64_t deadline = vkp_test_deadline();
    while (!done(user)) {
        vkp_status status = vkp_loop_run_once(loop, vkp_loop_get_now_ns(loop) + SLICE_NS);
        if (status != VKP_OK) {
            vkp_test_fail("the loop failed while waiting for %s: %s", what, vkp_status_str(status));
        }
        if (vkp_now_ns() > deadline) {
            vkp_test_fail("gave up waiting for %s", what);
        }
    }
}

void vkp_test_wait_until(bool (*done)(void *user), void *user, const char *what)
{
    uint64_t deadline = vkp_test_deadline();
    while (!done(user)) {
        if (vkp_now_ns() > deadline) {
            vkp_test_fail("gave up waiting for %s", what);
        }
        vkp_test_i_poll(-1, 0, vkp_now_ns() + 1000000);
    }
}
