/* vkp_backend_epoll.c - a loop's backend over epoll(7), for Linux
   SPDX-License-Identifier: MIT

   What is wrong with epoll, and what this backend does about it:
   - epoll registers the open file, not the descriptor. After a close without a removal, while a
     duplicate is open (dup, fork), the registration still reports, and no call can remove it. So
     the data of an event is the descriptor and a serial number, not the loop's token: the backend
     drops an event with an old serial, and builds a new set.
   - MOD of a closed and reused number fails (ENOENT), ADD after dup2 fails (EEXIST): each falls
     back to the other. A forked child changes the parent's set: after_fork builds a new one.
   - A regular file is EPERM: set_interest fails. EPOLLHUP and EPOLLERR mean both directions too.
   - Level-triggered, not edge-triggered: a busy peer is put at the end of the kernel's queue. */
#if __has_include("../valkey_push.h")
#include "../valkey_push.h"
#else /* installed, or copied into another folder */
#include "valkey_push.h"
#endif
#ifdef __linux__ /* elsewhere this file is empty: one build line serves every platform */
#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#define VKP_I_EPOLL_BATCH 256 /* most events of one wait */
typedef struct vkp_i_epoll_entry {
    uint64_t token;
    uint32_t interest; /* 0: not registered */
    uint32_t serial;   /* changes with every change of the registration */
} vkp_i_epoll_entry;

typedef struct vkp_i_epoll {
    const vkp_env *env;
    vkp_i_epoll_entry *entries; /* by descriptor */
    size_t items;               /* allocated in entries */
    int epoll_fd;
    int wake_fds[2]; /* equal for an eventfd; -1, as in epoll_fd: not open */
    uint32_t last_serial;
    struct epoll_event events[VKP_I_EPOLL_BATCH];
} vkp_i_epoll;

static int vkp_i_epoll_control(vkp_i_epoll *self, int operation, int fd,
                               const vkp_i_epoll_entry *entry)
{
    struct epoll_event event = VKP_ZERO;
    event.events = ((entry->interest & VKP_IO_READ) != 0 ? EPOLLIN : 0u) |
                   ((entry->interest & VKP_IO_WRITE) != 0 ? EPOLLOUT : 0u);
    event.data.u64 = (uint64_t)entry->serial << 32 | (uint32_t)fd;
    return self->env->sys->epoll_ctl(self->epoll_fd, operation, fd, &event);
}

/* Replace the set by a new set of the same descriptors. On failure the old set stays. */
static int vkp_i_epoll_rebuild(vkp_i_epoll *self)
{
    const vkp_i_epoll_entry wake = {0, VKP_IO_READ, 0};
    const int old = self->epoll_fd;
    const int set = self->env->sys->epoll_create();
    int rc = set;
    size_t fd;
    self->epoll_fd = set;
    if (rc >= 0) {
        rc = vkp_i_epoll_control(self, EPOLL_CTL_ADD, self->wake_fds[0], &wake);
    }
    for (fd = 0; fd < self->items && rc >= 0; fd++) {
        if (self->entries[fd].interest != 0) {
            rc = vkp_i_epoll_control(self, EPOLL_CTL_ADD, (int)fd, &self->entries[fd]);
        }
        if (rc == -EBADF || rc == -EPERM) { /* closed without a removal: the kernel forgot it too */
            self->entries[fd].interest = 0;
            rc = 0;
        }
    }
    self->epoll_fd = rc < 0 ? old : set;
    if ((rc < 0 ? set : old) >= 0) {
        (void)self->env->sys->close(rc < 0 ? set : old);
    }
    return rc;
}

static void vkp_i_epoll_close_fds(vkp_i_epoll *self)
{
    const int fds[3] = {self->epoll_fd, self->wake_fds[0],
                        self->wake_fds[1] != self->wake_fds[0] ? self->wake_fds[1] : -1};
    size_t i;
    for (i = 0; i < 3; i++) {
        if (fds[i] >= 0) {
            (void)self->env->sys->close(fds[i]);
        }
    }
    self->epoll_fd = self->wake_fds[0] = self->wake_fds[1] = -1;
}

static vkp_status vkp_i_epoll_open_fds(vkp_i_epoll *self)
{
    int fds[2];
    int rc = self->env->sys->wake_pair(fds);
    vkp_i_epoll_close_fds(self);
    if (rc >= 0) {
        memcpy(self->wake_fds, fds, sizeof fds);
        rc = vkp_i_epoll_rebuild(self);
    }
    if (rc < 0) {
        errno = -rc;
        return VKP_ERR_SYS;
    }
    return VKP_OK;
}

static void vkp_i_epoll_close(void *state)
{
    vkp_i_epoll *self = (vkp_i_epoll *)state;
    vkp_i_epoll_close_fds(self);
    (void)self->env->alloc(self->env->user, self->entries, self->items * sizeof *self->entries, 0);
    (void)self->env->alloc(self->env->user, self, sizeof *self, 0);
}

static vkp_status vkp_i_epoll_open(const vkp_backend_host *host, void **state)
{
    vkp_i_epoll *self = (vkp_i_epoll *)host->env->alloc(host->env->user, NULL, 0, sizeof *self);
    vkp_status status;
    if (self == NULL) {
        return VKP_ERR_NOMEM;
    }
    memset(self, 0, sizeof *self);
    self->env = host->env;
    self->epoll_fd = self->wake_fds[0] = self->wake_fds[1] = -1;
    status = vkp_i_epoll_open_fds(self);
    if (status != VKP_OK) {
        vkp_i_epoll_close(self);
        return status;
    }
    *state = self;
    return VKP_OK;
}

static bool vkp_i_epoll_reserve(vkp_i_epoll *self, int fd)
{
    const size_t each = sizeof *self->entries;
    const size_t old = self->items;
    const size_t wanted = (size_t)fd + (size_t)fd / 2 + 16;
    void *grown;
    if (fd < 0 || (size_t)fd < old || wanted > SIZE_MAX / each) {
        return fd >= 0 && (size_t)fd < old;
    }
    grown = self->env->alloc(self->env->user, self->entries, old * each, wanted * each);
    if (grown != NULL) {
        self->entries = (vkp_i_epoll_entry *)grown;
        self->items = wanted;
        memset(self->entries + old, 0, (wanted - old) * each);
    }
    return grown != NULL;
}

static vkp_status vkp_i_epoll_set_interest(void *state, int fd, uint32_t interest, uint64_t token)
{
    vkp_i_epoll *self = (vkp_i_epoll *)state;
    const vkp_i_epoll_entry wanted = {token, interest, ++self->last_serial};
    vkp_i_epoll_entry *entry;
    bool known;
    int rc = 0;
    if (!vkp_i_epoll_reserve(self, fd)) { /* beyond the table: not registered */
        return fd < 0 ? VKP_ERR_INVALID : interest == 0 ? VKP_OK : VKP_ERR_NOMEM;
    }
    entry = &self->entries[fd];
    known = entry->interest != 0;
    if (interest != 0) {
        rc = vkp_i_epoll_control(self, known ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, fd, &wanted);
        if (rc == -ENOENT || rc == -EEXIST) {
            rc = vkp_i_epoll_control(self, known ? EPOLL_CTL_ADD : EPOLL_CTL_MOD, fd, &wanted);
        }
    } else if (known) { /* on failure the first event of the registration is stale */
        (void)vkp_i_epoll_control(self, EPOLL_CTL_DEL, fd, entry);
    }
    if (rc < 0) {
        errno = -rc;
        return VKP_ERR_SYS;
    }
    *entry = wanted;
    return VKP_OK;
}

static uint32_t vkp_i_epoll_ready(uint32_t events)
{
    return ((events & EPOLLIN) != 0 ? VKP_IO_READ : VKP_IO_NONE) |
           ((events & EPOLLOUT) != 0 ? VKP_IO_WRITE : VKP_IO_NONE) |
           ((events & EPOLLHUP) != 0 ? VKP_IO_READ | VKP_IO_WRITE | VKP_IO_HUP : 0) |
           ((events & EPOLLERR) != 0 ? VKP_IO_READ | VKP_IO_WRITE | VKP_IO_ERROR : 0);
}

static vkp_status vkp_i_epoll_wait(void *state, uint64_t deadline_ns, vkp_event *out,
                                   size_t capacity, size_t *count)
{
    vkp_i_epoll *self = (vkp_i_epoll *)state;
    const size_t room = capacity < VKP_I_EPOLL_BATCH ? capacity : VKP_I_EPOLL_BATCH;
    unsigned char sink[64];
    bool stale = false;
    int i;
    int rc = self->env->sys->epoll_wait(self->epoll_fd, self->events, (int)room, deadline_ns);
    if (rc < 0 && rc != -EINTR) {
        errno = -rc;
        return VKP_ERR_SYS;
    }
    *count = 0;
    for (i = 0; i < rc; i++) {
        const uint64_t data = self->events[i].data.u64;
        const uint32_t fd = (uint32_t)data;
        if (fd == (uint32_t)self->wake_fds[0]) {
            while (self->env->sys->read((int)fd, sink, sizeof sink) == (int64_t)sizeof sink) {
            }
        } else if (self->entries[fd].interest == 0 || self->entries[fd].serial != data >> 32) {
            stale = true;
        } else {
            out[*count].token = self->entries[fd].token;
            out[(*count)++].ready = vkp_i_epoll_ready(self->events[i].events);
        }
    }
    if (stale) {
        (void)vkp_i_epoll_rebuild(self); /* on failure the next stale event tries again */
    }
    return VKP_OK;
}

/* EAGAIN: a full pipe is readable. The loop calls wake only while it sleeps: no flag is needed. */
static void vkp_i_epoll_wake(void *state)
{
    vkp_i_epoll *self = (vkp_i_epoll *)state;
    const uint64_t one = 1;
    while (self->env->sys->write(self->wake_fds[1], &one, sizeof one) == -EINTR) {
    }
}

/* The wake is shared too. One wake is left pending: a wake from before the fork is not lost. */
static vkp_status vkp_i_epoll_after_fork(void *state)
{
    vkp_i_epoll *self = (vkp_i_epoll *)state;
    if (vkp_i_epoll_open_fds(self) != VKP_OK) {
        return VKP_ERR_SYS;
    }
    vkp_i_epoll_wake(self);
    return VKP_OK;
}

static int vkp_i_epoll_pollable_fd(void *state)
{
    return ((const vkp_i_epoll *)state)->epoll_fd;
}

const vkp_backend vkp_backend_epoll = {
    VKP_BACKEND_ABI,        0 /* no flags */,        "epoll",
    vkp_i_epoll_open,       vkp_i_epoll_close,       vkp_i_epoll_set_interest,
    vkp_i_epoll_wait,       vkp_i_epoll_wake,        NULL,
    vkp_i_epoll_after_fork, vkp_i_epoll_pollable_fd, NULL};
#endif /* __linux__ */
