/* vkp_backend_kqueue.c - a loop's backend over kqueue(2), for macOS and the BSDs
   SPDX-License-Identifier: MIT

   What is wrong with kqueue, and what this backend does about it:
   - Reading and writing are two registrations and two separate events. The backend reports one
     event per descriptor and batch. If the second registration fails, it removes the first.
   - Closing a descriptor, or dup2 over it, removes its registrations. So no event is of a former
     owner; set_interest registers every direction again, and a failed removal is no error.
   - EV_EOF is of one direction. The end of a socket's input is no hang-up: output may still be
     wanted. The end of a pipe, once drained, is a hang-up, and so is the loss of its last reader.
   - A regular file reports nothing at its end: EPERM, as from epoll. A pipe without readers: EPIPE.
   - A forked child has no queue: the queue's number may be another file, so it is not closed.
   - Older NetBSD and OpenBSD have no EVFILT_USER, the wake: there a registered pipe is the wake. */
#if __has_include("../valkey_push.h")
#include "../valkey_push.h"
#else /* installed, or copied into another folder */
#include "valkey_push.h"
#endif
/* On Linux this file is empty: one build line serves every platform. Tests emulate a kqueue. */
#if !defined(__linux__) || defined(VKP_KQUEUE_EMULATED)
#include <errno.h>
#include <string.h>
#include <sys/types.h>
#include <sys/event.h>
#define VKP_I_KQUEUE_BATCH 256 /* most events of one wait; the kernel queues a ready one last */
typedef struct vkp_i_kqueue_entry {
    uint64_t token;    /* here, not in the event: a pointer (udata) may be too small for a token */
    uint64_t event;    /* number of the last event; below self->batch: of a former batch */
    uint32_t interest; /* 0: not registered */
} vkp_i_kqueue_entry;

typedef struct vkp_i_kqueue {
    const vkp_env *env;
    vkp_i_kqueue_entry *entries; /* by descriptor */
    size_t items;                /* allocated in entries */
    uint64_t batch;  /* number of the first event of a batch; from VKP_I_KQUEUE_BATCH on */
    int queue;       /* -1: not open */
    int wake_fds[2]; /* equal for an eventfd; -1: not open, always so with EVFILT_USER */
    int queue_pid;   /* the process that opened the queue */
    struct kevent events[VKP_I_KQUEUE_BATCH];
} vkp_i_kqueue;

static int vkp_i_kqueue_change(const vkp_i_kqueue *self, int fd, uint32_t directions, bool add)
{
    struct kevent changes[2];
    const unsigned short flags = add ? EV_ADD : EV_DELETE;
    int count = 0;
    EV_SET(&changes[count], (uintptr_t)fd, EVFILT_READ, flags, 0, 0, 0);
    count += (directions & VKP_IO_READ) != 0 ? 1 : 0;
    EV_SET(&changes[count], (uintptr_t)fd, EVFILT_WRITE, flags, 0, 0, 0);
    count += (directions & VKP_IO_WRITE) != 0 ? 1 : 0;
    return count > 0 ? self->env->sys->kevent(self->queue, changes, count, NULL, 0, 0) : 0;
}

/* Register the wake (begin), or wake. With EV_CLEAR many wakes are one event, reported once. */
static int vkp_i_kqueue_signal(vkp_i_kqueue *self, bool begin)
{
#ifdef EVFILT_USER
    const unsigned short flags = begin ? EV_ADD | EV_CLEAR : 0;
    struct kevent change;
    EV_SET(&change, (uintptr_t)-1, EVFILT_USER, flags, begin ? 0 : NOTE_TRIGGER, 0, 0);
    return self->env->sys->kevent(self->queue, &change, 1, NULL, 0, 0);
#else
    const uint64_t one = 1;
    int fds[2];
    int rc = begin ? self->env->sys->wake_pair(fds)
                   : (int)self->env->sys->write(self->wake_fds[1], &one, sizeof one);
    if (begin && rc >= 0) {
        memcpy(self->wake_fds, fds, sizeof fds);
        rc = vkp_i_kqueue_change(self, fds[0], VKP_IO_READ, true);
    }
    return rc;
#endif
}

static void vkp_i_kqueue_wake(void *state)
{
    while (vkp_i_kqueue_signal((vkp_i_kqueue *)state, false) == -EINTR) {
    }
}

static void vkp_i_kqueue_close_fds(vkp_i_kqueue *self)
{
    if (self->queue >= 0 && self->queue_pid == self->env->sys->process_id()) {
        (void)self->env->sys->close(self->queue);
    }
    if (self->wake_fds[1] != self->wake_fds[0]) {
        (void)self->env->sys->close(self->wake_fds[1]);
    }
    if (self->wake_fds[0] >= 0) {
        (void)self->env->sys->close(self->wake_fds[0]);
    }
    self->queue = self->wake_fds[0] = self->wake_fds[1] = -1;
}

/* Replace the queue by a new queue of the same descriptors. */
static vkp_status vkp_i_kqueue_open_fds(vkp_i_kqueue *self)
{
    size_t fd;
    int rc;
    vkp_i_kqueue_close_fds(self);
    self->queue = rc = self->env->sys->kqueue_create();
    self->queue_pid = self->env->sys->process_id();
    rc = rc < 0 ? rc : vkp_i_kqueue_signal(self, true);
    for (fd = 0; fd < self->items && rc >= 0; fd++) {
        rc = vkp_i_kqueue_change(self, (int)fd, self->entries[fd].interest, true);
        rc = rc == -EBADF ? 0 : rc; /* closed without a removal */
    }
    if (rc < 0) {
        vkp_i_kqueue_close_fds(self);
        errno = -rc;
    }
    return rc < 0 ? VKP_ERR_SYS : VKP_OK;
}

static void vkp_i_kqueue_close(void *state)
{
    vkp_i_kqueue *self = (vkp_i_kqueue *)state;
    vkp_i_kqueue_close_fds(self);
    (void)self->env->alloc(self->env->user, self->entries, self->items * sizeof *self->entries, 0);
    (void)self->env->alloc(self->env->user, self, sizeof *self, 0);
}

static vkp_status vkp_i_kqueue_open(const vkp_backend_host *host, void **state)
{
    vkp_i_kqueue *self = (vkp_i_kqueue *)host->env->alloc(host->env->user, NULL, 0, sizeof *self);
    if (self == NULL) {
        return VKP_ERR_NOMEM;
    }
    memset(self, 0, sizeof *self);
    self->env = host->env;
    self->queue = self->wake_fds[0] = self->wake_fds[1] = -1;
    if (vkp_i_kqueue_open_fds(self) != VKP_OK) {
        vkp_i_kqueue_close(self);
        return VKP_ERR_SYS;
    }
    *state = self;
    return VKP_OK;
}

static vkp_i_kqueue_entry *vkp_i_kqueue_entry_of(vkp_i_kqueue *self, int fd)
{
    const size_t each = sizeof *self->entries;
    const size_t wanted = (size_t)fd + (size_t)fd / 2 + 16;
    void *grown = NULL;
    if (fd >= 0 && (size_t)fd >= self->items && wanted <= SIZE_MAX / each) {
        grown = self->env->alloc(self->env->user, self->entries, self->items * each, wanted * each);
    }
    if (grown != NULL) {
        self->entries = (vkp_i_kqueue_entry *)grown;
        memset(self->entries + self->items, 0, (wanted - self->items) * each);
        self->items = wanted;
    }
    return fd >= 0 && (size_t)fd < self->items ? &self->entries[fd] : NULL;
}

static vkp_status vkp_i_kqueue_set_interest(void *state, int fd, uint32_t interest, uint64_t token)
{
    vkp_i_kqueue *self = (vkp_i_kqueue *)state;
    vkp_i_kqueue_entry *entry = vkp_i_kqueue_entry_of(self, fd);
    int rc = (interest &= VKP_IO_READ | VKP_IO_WRITE) != 0 ? self->env->sys->fd_kind(fd) : 0;
    if (entry == NULL) { /* beyond the table: not registered */
        return fd < 0 ? VKP_ERR_INVALID : interest == 0 ? VKP_OK : VKP_ERR_NOMEM;
    }
    if (rc >= 0) {
        rc = rc == VKP_FD_FILE ? -EPERM : vkp_i_kqueue_change(self, fd, interest, true);
    }
    if (rc < 0) {
        (void)vkp_i_kqueue_change(self, fd, interest & ~entry->interest, false);
        errno = -rc;
        return VKP_ERR_SYS;
    }
    (void)vkp_i_kqueue_change(self, fd, entry->interest & ~interest, false);
    entry->interest = interest;
    entry->token = token;
    return VKP_OK;
}

/* The bits of an event, which is of one direction; HUP and ERROR set both directions. */
static uint32_t vkp_i_kqueue_ready(const vkp_i_kqueue *self, const struct kevent *event)
{
    const bool reads = event->filter == EVFILT_READ;
    const bool ends = (event->flags & EV_EOF) != 0;
    const bool failed = (event->flags & EV_ERROR) != 0 || (ends && event->fflags != 0);
    const int kind = ends && reads ? self->env->sys->fd_kind((int)event->ident) : VKP_FD_OTHER;
    const bool hung_up = ends && (!reads || event->data == 0) && kind != VKP_FD_SOCKET;
    return (reads ? VKP_IO_READ : VKP_IO_WRITE) |
           (failed ? VKP_IO_READ | VKP_IO_WRITE | VKP_IO_ERROR : 0) |
           (hung_up ? VKP_IO_READ | VKP_IO_WRITE | VKP_IO_HUP : 0);
}

static vkp_status vkp_i_kqueue_wait(void *state, uint64_t deadline_ns, vkp_event *out,
                                    size_t capacity, size_t *count)
{
    vkp_i_kqueue *self = (vkp_i_kqueue *)state;
    const vkp_sys *sys = self->env->sys;
    const int room = (int)(capacity < VKP_I_KQUEUE_BATCH ? capacity : VKP_I_KQUEUE_BATCH);
    const int wake = self->wake_fds[0]; /* -1 with EVFILT_USER, whose identifier is -1 as well */
    unsigned char sink[64];
    int rc = sys->kevent(self->queue, NULL, 0, self->events, room, deadline_ns);
    int i;
    if (rc < 0 && rc != -EINTR) {
        errno = -rc;
        return VKP_ERR_SYS;
    }
    *count = 0;
    self->batch += VKP_I_KQUEUE_BATCH;
    for (i = 0; i < rc; i++) {
        const struct kevent *event = &self->events[i];
        const uint32_t direction = event->filter == EVFILT_READ ? VKP_IO_READ : VKP_IO_WRITE;
        vkp_i_kqueue_entry *entry;
        if (event->ident == (uintptr_t)wake) {
            while (wake >= 0 && sys->read(wake, sink, sizeof sink) == (int64_t)sizeof sink) {
            }
            continue;
        }
        entry = &self->entries[event->ident];
        if ((entry->interest & direction) == 0) { /* an earlier removal failed */
            (void)vkp_i_kqueue_change(self, (int)event->ident, direction, false);
            continue;
        }
        if (entry->event < self->batch) {
            out[*count].token = entry->token;
            out[*count].ready = 0;
            entry->event = self->batch + (*count)++;
        }
        out[entry->event - self->batch].ready |= vkp_i_kqueue_ready(self, event);
    }
    return VKP_OK;
}

/* One wake is left pending, so that a wake from before the fork is not lost. */
static vkp_status vkp_i_kqueue_after_fork(void *state)
{
    vkp_status status = vkp_i_kqueue_open_fds((vkp_i_kqueue *)state);
    vkp_i_kqueue_wake(state);
    return status;
}

static int vkp_i_kqueue_pollable_fd(void *state)
{
    return ((const vkp_i_kqueue *)state)->queue;
}

const vkp_backend vkp_backend_kqueue = {
    VKP_BACKEND_ABI,         0 /* no flags */,         "kqueue",
    vkp_i_kqueue_open,       vkp_i_kqueue_close,       vkp_i_kqueue_set_interest,
    vkp_i_kqueue_wait,       vkp_i_kqueue_wake,        NULL,
    vkp_i_kqueue_after_fork, vkp_i_kqueue_pollable_fd, NULL};
#endif /* a kqueue, or its emulation */
