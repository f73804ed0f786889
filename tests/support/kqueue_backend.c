/* The kqueue backend on Linux: its very file, compiled against the emulation, twice (one without
   EVFILT_USER), behind an open that puts the emulation into the table of system calls, unless a
   test has put a kqueue of its own there.
   SPDX-License-Identifier: MIT */
#include "kqueue_emulation.h"

#ifdef __linux__
#include "internal.h"

#include <string.h>

extern const vkp_backend vkp_test_kqueue_compiled;         /* see tests/CMakeLists.txt */
extern const vkp_backend vkp_test_kqueue_compiled_no_user; /* likewise */

typedef struct emulated {
    vkp_sys sys;
    vkp_env env;
    vkp_backend_host host;
    const vkp_backend *backend;
    void *state;
} emulated;

static vkp_status open_over(const vkp_backend *backend, const vkp_backend_host *host, void **state)
{
    const vkp_env *env = host->env;
    emulated *self = env->alloc(env->user, NULL, 0, sizeof *self);
    vkp_status status;
    if (self == NULL) {
        return VKP_ERR_NOMEM;
    }
    memset(self, 0, sizeof *self);
    self->sys = *env->sys;
    self->env = *env;
    self->host = *host;
    if (self->sys.kqueue_create == vkp_sys_get_default()->kqueue_create) {
        self->sys.kqueue_create = vkp_test_kqueue_create;
        self->sys.kevent = vkp_test_kevent;
    }
    self->env.sys = &self->sys;
    self->host.env = &self->env;
    self->backend = backend;
    status = backend->open(&self->host, &self->state);
    if (status != VKP_OK) {
        env->alloc(env->user, self, sizeof *self, 0);
        return status;
    }
    *state = self;
    return VKP_OK;
}

static vkp_status open_with_user(const vkp_backend_host *host, void **state)
{
    return open_over(&vkp_test_kqueue_compiled, host, state);
}

static vkp_status open_without_user(const vkp_backend_host *host, void **state)
{
    return open_over(&vkp_test_kqueue_compiled_no_user, host, state);
}

static void close_it(void *state)
{
    emulated *self = state;
    const vkp_env env = self->env;
    self->backend->close(self->state);
    env.alloc(env.user, self, sizeof *self, 0);
}

static vkp_status watch(void *state, int fd, uint32_t interest, uint64_t token)
{
    emulated *self = state;
    return self->backend->set_interest(self->state, fd, interest, token);
}

static vkp_status wait_for(void *state, uint64_t deadline_ns, vkp_event *out, size_t capacity,
                           size_t *count)
{
    emulated *self = state;
    return self->backend->wait(self->state, deadline_ns, out, capacity, count);
}

static void wake(void *state)
{
    emulated *self = state;
    self->backend->wake(self->state);
}

static vkp_status after_fork(void *state)
{
    emulated *self = state;
    return self->backend->after_fork(self->state);
}

static int pollable_fd(void *state)
{
    emulated *self = state;
    return self->backend->pollable_fd(self->state);
}

const vkp_backend vkp_test_kqueue = {
    VKP_BACKEND_ABI, 0,    "kqueue", open_with_user, close_it,    watch,
    wait_for,        wake, NULL,     after_fork,     pollable_fd, NULL};

const vkp_backend vkp_test_kqueue_no_user = {
    VKP_BACKEND_ABI,   0,           "kqueue without EVFILT_USER",
    open_without_user, close_it,    watch,
    wait_for,          wake,        NULL,
    after_fork,        pollable_fd, NULL};
#endif /* __linux__ */
