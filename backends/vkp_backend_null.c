/* vkp_backend_null.c - a loop's backend that makes runs repeatable, for tests
   SPDX-License-Identifier: MIT

   What is wrong with every real kernel for tests, and what this backend does about it:
   - Real time passes by itself, so a test of a timer sleeps or depends on luck. This clock changes
     in one case only: nothing is ready and wait has a deadline. Then the clock is set to the
     deadline, without sleeping. An hour of reconnects takes as long as its work.
   - A kernel reports events in the order in which they happened. This backend reports events in
     ascending order of descriptors; after a full batch the next wait continues above its last one.
   - Readiness still depends on other processes: the descriptors are real, and checked by poll
     without waiting. Only a wait with deadline VKP_FOREVER sleeps, because the clock has no time
     to be set to. Order and clock repeat exactly while the peers are in this thread.
   The faults of poll are handled as in vkp_backend_poll.c; the set is sorted, not indexed.    */
#if __has_include("../valkey_push.h")
#include "../valkey_push.h"
#else /* installed, or copied into another folder */
#include "valkey_push.h"
#endif
#include <errno.h>
#include <poll.h>
#include <string.h>
#define VKP_I_NULL_START_NS 1000000000u /* above 0: the deadline 0 has always passed */

typedef struct vkp_i_null {
    const vkp_env *env;
    uint64_t *tokens;   /* one block: tokens first, then fds */
    struct pollfd *fds; /* [0] is the wake; [1] and above are sorted by descriptor */
    size_t items;       /* allocated in both */
    size_t count;       /* in use in both, the wake included */
    int after_fd;       /* the next batch begins above this descriptor; -1: with the lowest */
    int wake_fds[2];    /* equal for an eventfd; -1 after a failed after_fork */
    uint64_t now_ns;
} vkp_i_null;

static bool vkp_i_null_reserve(vkp_i_null *self, size_t need)
{
    const vkp_env *env = self->env;
    const size_t each = sizeof *self->tokens + sizeof *self->fds;
    const size_t wanted = self->items > 0 ? self->items * 2 : 16;
    uint64_t *tokens;
    if (need <= self->items) {
        return true;
    }
    tokens = (uint64_t *)env->alloc(env->user, NULL, 0, wanted * each);
    if (tokens == NULL) {
        return false;
    }
    memset(tokens, 0, wanted * each);
    if (self->items > 0) {
        memcpy(tokens, self->tokens, self->count * sizeof *tokens);
        memcpy(tokens + wanted, self->fds, self->count * sizeof *self->fds);
        (void)env->alloc(env->user, self->tokens, self->items * each, 0);
    }
    self->tokens = tokens;
    self->fds = (struct pollfd *)(void *)(tokens + wanted);
    self->items = wanted;
    return true;
}

static void vkp_i_null_close_wake(vkp_i_null *self)
{
    if (self->wake_fds[1] != self->wake_fds[0]) {
        (void)self->env->sys->close(self->wake_fds[1]);
    }
    if (self->wake_fds[0] >= 0) {
        (void)self->env->sys->close(self->wake_fds[0]);
    }
    self->wake_fds[0] = self->wake_fds[1] = -1;
}

static void vkp_i_null_close(void *state)
{
    vkp_i_null *self = (vkp_i_null *)state;
    const vkp_env *env = self->env;
    const size_t each = sizeof *self->tokens + sizeof *self->fds;
    vkp_i_null_close_wake(self);
    (void)env->alloc(env->user, self->tokens, self->items * each, 0);
    (void)env->alloc(env->user, self, sizeof *self, 0);
}

static vkp_status vkp_i_null_open_wake(vkp_i_null *self)
{
    int fds[2];
    int rc = self->env->sys->wake_pair(fds);
    if (rc < 0) {
        errno = -rc;
        return VKP_ERR_SYS;
    }
    self->wake_fds[0] = fds[0];
    self->wake_fds[1] = fds[1];
    return VKP_OK;
}

static vkp_status vkp_i_null_open(const vkp_backend_host *host, void **state)
{
    const vkp_env *env = host->env;
    vkp_status status;
    vkp_i_null *self = (vkp_i_null *)env->alloc(env->user, NULL, 0, sizeof *self);
    if (self == NULL) {
        return VKP_ERR_NOMEM;
    }
    memset(self, 0, sizeof *self);
    self->env = env;
    self->count = 1;
    self->after_fd = -1;
    self->wake_fds[0] = self->wake_fds[1] = -1;
    self->now_ns = VKP_I_NULL_START_NS;
    status = vkp_i_null_reserve(self, 1) ? vkp_i_null_open_wake(self) : VKP_ERR_NOMEM;
    if (status != VKP_OK) {
        vkp_i_null_close(self);
        return status;
    }
    *state = self;
    return VKP_OK;
}

/* The index of the first entry whose descriptor is at least fd. */
static size_t vkp_i_null_find(const vkp_i_null *self, int fd)
{
    size_t low = 1;
    size_t high = self->count;
    while (low < high) {
        const size_t middle = low + (high - low) / 2;
        if (self->fds[middle].fd < fd) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

static vkp_status vkp_i_null_set_interest(void *state, int fd, uint32_t interest, uint64_t token)
{
    vkp_i_null *self = (vkp_i_null *)state;
    const size_t at = vkp_i_null_find(self, fd);
    const size_t known = at < self->count && self->fds[at].fd == fd ? 1 : 0;
    const size_t wanted = interest != 0 ? 1 : 0;
    const size_t behind = self->count - at - known;
    if (fd < 0) {
        return VKP_ERR_INVALID;
    }
    if (wanted > known && !vkp_i_null_reserve(self, self->count + 1)) {
        return VKP_ERR_NOMEM;
    }
    if (wanted != known) { /* one entry more or one less */
        memmove(self->fds + at + wanted, self->fds + at + known, behind * sizeof *self->fds);
        memmove(self->tokens + at + wanted, self->tokens + at + known,
                behind * sizeof *self->tokens);
        self->count = at + wanted + behind;
    }
    if (interest != 0) {
        self->tokens[at] = token;
        self->fds[at].fd = fd;
        self->fds[at].events = (short)(((interest & VKP_IO_READ) != 0 ? POLLIN : 0) |
                                       ((interest & VKP_IO_WRITE) != 0 ? POLLOUT : 0));
    }
    return VKP_OK;
}

static uint32_t vkp_i_null_ready(int revents)
{
    uint32_t ready = (revents & POLLIN) != 0 ? VKP_IO_READ : VKP_IO_NONE;
    ready |= (revents & POLLOUT) != 0 ? VKP_IO_WRITE : VKP_IO_NONE;
    ready |= (revents & POLLHUP) != 0 ? VKP_IO_READ | VKP_IO_WRITE | VKP_IO_HUP : 0;
    ready |= (revents & (POLLERR | POLLNVAL)) != 0 ? VKP_IO_READ | VKP_IO_WRITE | VKP_IO_ERROR : 0;
    return ready;
}

/* Report the ready entries from index `at` on. After a full batch, after_fd is the last one. */
static size_t vkp_i_null_collect(vkp_i_null *self, size_t at, vkp_event *out, size_t capacity)
{
    size_t found = 0;
    for (; at < self->count && found < capacity; at++) {
        if (self->fds[at].revents != 0) {
            out[found].token = self->tokens[at];
            out[found].ready = vkp_i_null_ready(self->fds[at].revents);
            found++;
        }
    }
    self->after_fd = at < self->count ? self->fds[at - 1].fd : -1;
    return found;
}

static vkp_status vkp_i_null_wait(void *state, uint64_t deadline_ns, vkp_event *out,
                                  size_t capacity, size_t *count)
{
    vkp_i_null *self = (vkp_i_null *)state;
    unsigned char sink[64];
    int rc;
    self->fds[0].fd = self->wake_fds[0];
    self->fds[0].events = POLLIN;
    rc = self->env->sys->poll(self->fds, self->count, deadline_ns == VKP_FOREVER ? VKP_FOREVER : 0);
    if (rc < 0 && rc != -EINTR) {
        errno = -rc;
        return VKP_ERR_SYS;
    }
    *count = 0;
    if (rc == 0 && deadline_ns > self->now_ns && deadline_ns != VKP_FOREVER) {
        self->now_ns = deadline_ns;
    }
    if (rc > 0) {
        const size_t at = self->after_fd < 0 ? 1 : vkp_i_null_find(self, self->after_fd + 1);
        *count = vkp_i_null_collect(self, at, out, capacity);
        if (*count == 0 && at > 1) {
            *count = vkp_i_null_collect(self, 1, out, capacity);
        }
        while (self->fds[0].revents != 0 &&
               self->env->sys->read(self->wake_fds[0], sink, sizeof sink) == (int64_t)sizeof sink) {
        }
    }
    return VKP_OK;
}

static void vkp_i_null_wake(void *state)
{
    vkp_i_null *self = (vkp_i_null *)state;
    const uint64_t one = 1;
    while (self->env->sys->write(self->wake_fds[1], &one, sizeof one) == -EINTR) {
    }
}

/* The wake is shared with the parent. One is left pending: none from before the fork is lost. */
static vkp_status vkp_i_null_after_fork(void *state)
{
    vkp_i_null *self = (vkp_i_null *)state;
    vkp_i_null_close_wake(self);
    if (vkp_i_null_open_wake(self) != VKP_OK) {
        return VKP_ERR_SYS;
    }
    vkp_i_null_wake(self);
    return VKP_OK;
}

static int vkp_i_null_pollable_fd(void *state)
{
    (void)state;
    return -1; /* the clock changes only inside wait */
}

static uint64_t vkp_i_null_clock_ns(void *state)
{
    return ((const vkp_i_null *)state)->now_ns;
}

const vkp_backend vkp_backend_null = {
    VKP_BACKEND_ABI,       VKP_BACKEND_VIRTUAL_TIME, "null",
    vkp_i_null_open,       vkp_i_null_close,         vkp_i_null_set_interest,
    vkp_i_null_wait,       vkp_i_null_wake,          NULL,
    vkp_i_null_after_fork, vkp_i_null_pollable_fd,   vkp_i_null_clock_ns};
