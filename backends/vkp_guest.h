/* vkp_guest.h - the code that the guests of foreign loops share; included by their files only
   SPDX-License-Identifier: MIT

   What is wrong with a foreign loop (libev, libuv, libevent), and what the guests do about it:
   - A foreign loop calls back for one descriptor at a time, but a vkp_loop writes once per round.
     So a callback only notes its descriptor and asks for ONE round behind the batch.
   - A foreign loop reports less than wait() promises: no hang-ups or errors, a direction too many,
     an event of a number that is another file by now. The round polls the noted descriptors,
     without waiting, and reports what poll returns.
   - A foreign loop reports in an order of its own. Noted descriptors that do not fit into a round
     stay noted, in front, so that none starves. A descriptor that stays ready is reported again,
     so a note may be removed after each report.
   - A foreign loop reads its clock once per iteration, so its timers fire early. The guest reads
     the clock itself and starts the timer again for the time that is left.
   - A foreign loop may free a watcher late (libuv). So each descriptor has memory of its own, and
     freeing that memory needs the guest's copy of the env only.                               */
#ifndef VKP_GUEST_H
#define VKP_GUEST_H

#if __has_include("../valkey_push.h")
#include "../valkey_push.h"
#else /* installed, or copied into another folder */
#include "valkey_push.h"
#endif

#include <errno.h>
#include <poll.h>
#include <string.h>

#define VKP_I_GUEST_BATCH 256 /* most descriptors of one poll */

/* The longest run of a foreign timer: some libraries count milliseconds in 32 bits. */
#define VKP_I_GUEST_DAY_NS (UINT64_C(86400) * 1000000000u)

/* A registered descriptor: the first member of the guest's own entry, which adds its watcher. */
typedef struct vkp_i_guest_entry {
    struct vkp_i_guest *guest;
    struct vkp_i_guest_entry *prev; /* in the ring of noted descriptors; NULL: not noted */
    struct vkp_i_guest_entry *next;
    uint64_t token;
    uint32_t interest; /* 0 before the first arm */
    int fd;
} vkp_i_guest_entry;

/* The functions that each guest implements for its library. */
typedef struct vkp_i_guest_ops {
    size_t entry_bytes;
    /* Have the foreign loop call back, to note the entry, whenever it is ready for a bit of the
       interest. Returns 0 or a negated errno. After a first arm that failed, the foreign loop does
       not know the entry.                                                                     */
    int (*arm)(vkp_i_guest_entry *entry, uint32_t interest);
    void (*drop)(vkp_i_guest_entry *entry);   /* end the callbacks; free the entry, now or later */
    void (*gather)(struct vkp_i_guest *self); /* ask for one round behind this batch */
    int (*set_timer)(struct vkp_i_guest *self, uint64_t left_ns); /* VKP_FOREVER: stop the timer */
} vkp_i_guest_ops;

/* The first member of each guest's state. */
typedef struct vkp_i_guest {
    vkp_env env; /* a copy: the loop's env is freed with the loop */
    const vkp_i_guest_ops *ops;
    const vkp_backend_host *host;
    vkp_i_guest_entry **entries; /* by descriptor */
    size_t items;                /* allocated in entries */
    vkp_i_guest_entry noted;     /* head of the ring of noted descriptors, oldest first */
    uint64_t deadline_ns;        /* of the next round, if no event asks for an earlier one */
    int pid;                     /* the process of open or of the last after_fork */
    vkp_i_guest_entry *wake;     /* of wake_fds; NULL for guests that wake by other means */
    int wake_fds[2];             /* equal for an eventfd; -1: not open */
    struct pollfd polled[VKP_I_GUEST_BATCH];
} vkp_i_guest;

static inline void vkp_i_guest_init(vkp_i_guest *self, const vkp_backend_host *host,
                                    const vkp_i_guest_ops *ops)
{
    self->env = *host->env;
    self->ops = ops;
    self->host = host;
    self->noted.prev = self->noted.next = &self->noted;
    self->deadline_ns = VKP_FOREVER;
    self->pid = self->env.sys->process_id();
    self->wake_fds[0] = self->wake_fds[1] = -1;
}

static inline void vkp_i_guest_forget(vkp_i_guest_entry *entry)
{
    if (entry->next != NULL) {
        entry->next->prev = entry->prev;
        entry->prev->next = entry->next;
        entry->prev = entry->next = NULL;
    }
}

static inline void vkp_i_guest_free(vkp_i_guest_entry *entry)
{
    const vkp_env *env = &entry->guest->env;
    (void)env->alloc(env->user, entry, entry->guest->ops->entry_bytes, 0);
}

static inline vkp_status vkp_i_guest_fail(int rc)
{
    errno = -rc;
    return VKP_ERR_SYS;
}

/* ---- descriptors ---- */

static inline vkp_status vkp_i_guest_add(vkp_i_guest *self, int fd, uint32_t interest,
                                         vkp_i_guest_entry **added)
{
    const vkp_env *env = &self->env;
    int rc;
    vkp_i_guest_entry *entry =
        (vkp_i_guest_entry *)env->alloc(env->user, NULL, 0, self->ops->entry_bytes);
    if (entry == NULL) {
        return VKP_ERR_NOMEM;
    }
    memset(entry, 0, self->ops->entry_bytes);
    entry->guest = self;
    entry->fd = fd;
    rc = self->ops->arm(entry, interest);
    if (rc < 0) {
        vkp_i_guest_free(entry);
        return vkp_i_guest_fail(rc);
    }
    entry->interest = interest;
    *added = entry;
    return VKP_OK;
}

static inline bool vkp_i_guest_reserve(vkp_i_guest *self, int fd)
{
    const size_t each = sizeof(vkp_i_guest_entry *);
    const size_t wanted = (size_t)fd + (size_t)fd / 2 + 16;
    void *grown;
    if ((size_t)fd < self->items) {
        return true;
    }
    grown = self->env.alloc(self->env.user, self->entries, self->items * each, wanted * each);
    if (grown == NULL) {
        return false;
    }
    self->entries = (vkp_i_guest_entry **)grown;
    memset(self->entries + self->items, 0, (wanted - self->items) * each);
    self->items = wanted;
    return true;
}

static inline vkp_status vkp_i_guest_set_interest(void *state, int fd, uint32_t interest,
                                                  uint64_t token)
{
    vkp_i_guest *self = (vkp_i_guest *)state;
    vkp_i_guest_entry *entry;
    vkp_status status = VKP_OK;
    if (fd < 0) {
        return VKP_ERR_INVALID;
    }
    entry = (size_t)fd < self->items ? self->entries[fd] : NULL;
    if (interest == 0) {
        if (entry != NULL) {
            self->entries[fd] = NULL;
            vkp_i_guest_forget(entry);
            self->ops->drop(entry);
        }
        return VKP_OK;
    }
    if (entry == NULL) {
        status = vkp_i_guest_reserve(self, fd)
                     ? vkp_i_guest_add(self, fd, interest, &self->entries[fd])
                     : VKP_ERR_NOMEM;
        entry = status == VKP_OK ? self->entries[fd] : NULL;
    } else {
        const int rc = self->ops->arm(entry, interest);
        if (rc < 0) { /* the former interest was removed just now: there is room for it */
            (void)self->ops->arm(entry, entry->interest);
            return vkp_i_guest_fail(rc);
        }
    }
    if (entry != NULL) {
        entry->interest = interest;
        entry->token = token;
    }
    return status;
}

/* ---- rounds ---- */

/* Note that the entry's descriptor may be ready. Called from the foreign loop's callback. */
static inline void vkp_i_guest_note(vkp_i_guest_entry *entry)
{
    vkp_i_guest *self = entry->guest;
    unsigned char sink[64];
    if (entry == self->wake) {
        while (self->env.sys->read(entry->fd, sink, sizeof sink) == (int64_t)sizeof sink) {
        }
    } else if (entry->next == NULL) {
        entry->next = &self->noted;
        entry->prev = self->noted.prev;
        entry->prev->next = entry->next->prev = entry;
    }
    self->ops->gather(self);
}

static inline void vkp_i_guest_round(vkp_i_guest *self)
{
    self->host->round(self->host->loop);
}

static inline uint32_t vkp_i_guest_ready(int revents)
{
    uint32_t ready = (revents & POLLIN) != 0 ? VKP_IO_READ : VKP_IO_NONE;
    ready |= (revents & POLLOUT) != 0 ? VKP_IO_WRITE : VKP_IO_NONE;
    ready |= (revents & POLLHUP) != 0 ? VKP_IO_READ | VKP_IO_WRITE | VKP_IO_HUP : 0;
    ready |= (revents & (POLLERR | POLLNVAL)) != 0 ? VKP_IO_READ | VKP_IO_WRITE | VKP_IO_ERROR : 0;
    return ready;
}

/* Never waits: the foreign loop has waited already, so deadline_ns is ignored. */
static inline vkp_status vkp_i_guest_wait(void *state, uint64_t deadline_ns, vkp_event *out,
                                          size_t capacity, size_t *count)
{
    vkp_i_guest *self = (vkp_i_guest *)state;
    size_t found = 0;
    (void)deadline_ns;
    while (self->noted.next != &self->noted && found < capacity) {
        const vkp_i_guest_entry *entry = self->noted.next;
        size_t asked = 0;
        size_t i;
        int rc;
        for (; entry != &self->noted && asked < VKP_I_GUEST_BATCH && asked < capacity - found;
             entry = entry->next) {
            struct pollfd *each = &self->polled[asked++];
            each->fd = entry->fd;
            each->events = (short)(((entry->interest & VKP_IO_READ) != 0 ? POLLIN : 0) |
                                   ((entry->interest & VKP_IO_WRITE) != 0 ? POLLOUT : 0));
            each->revents = 0;
        }
        rc = self->env.sys->poll(self->polled, asked, 0);
        if (rc < 0 && rc != -EINTR && found == 0) {
            return vkp_i_guest_fail(rc);
        }
        if (rc < 0) {
            break; /* all of them are still noted: a later wait reports them */
        }
        for (i = 0; i < asked; i++) {
            vkp_i_guest_entry *first = self->noted.next;
            vkp_i_guest_forget(first);
            if (self->polled[i].revents != 0) {
                out[found].token = first->token;
                out[found++].ready = vkp_i_guest_ready(self->polled[i].revents);
            }
        }
    }
    *count = found;
    return VKP_OK;
}

/* ---- time ---- */

static inline uint64_t vkp_i_guest_left_ns(const vkp_i_guest *self)
{
    const uint64_t now_ns = self->env.sys->clock_ns();
    const uint64_t left_ns = self->deadline_ns > now_ns ? self->deadline_ns - now_ns : 0;
    if (self->deadline_ns == VKP_FOREVER) {
        return VKP_FOREVER;
    }
    return left_ns < VKP_I_GUEST_DAY_NS ? left_ns : VKP_I_GUEST_DAY_NS;
}

static inline vkp_status vkp_i_guest_timer(void *state, uint64_t deadline_ns)
{
    vkp_i_guest *self = (vkp_i_guest *)state;
    int rc;
    self->deadline_ns = deadline_ns;
    rc = self->ops->set_timer(self, vkp_i_guest_left_ns(self));
    return rc < 0 ? vkp_i_guest_fail(rc) : VKP_OK;
}

/* The foreign timer fired. If the guest cannot start it again, a round runs too early: harmless,
   and at its end the loop sets the timer again.                                               */
static inline void vkp_i_guest_on_timer(vkp_i_guest *self)
{
    const uint64_t left_ns = vkp_i_guest_left_ns(self);
    if (left_ns == 0 || self->ops->set_timer(self, left_ns) < 0) {
        self->ops->gather(self);
    }
}

/* ---- the own wake of guests whose library has none for both threads and signal handlers ---- */

static inline void vkp_i_guest_wake(void *state)
{
    const vkp_i_guest *self = (const vkp_i_guest *)state;
    const uint64_t one = 1;
    while (self->env.sys->write(self->wake_fds[1], &one, sizeof one) == -EINTR) {
    }
}

static inline void vkp_i_guest_close_wake(vkp_i_guest *self)
{
    if (self->wake != NULL) {
        self->ops->drop(self->wake);
        self->wake = NULL;
    }
    if (self->wake_fds[1] != self->wake_fds[0]) {
        (void)self->env.sys->close(self->wake_fds[1]);
    }
    if (self->wake_fds[0] >= 0) {
        (void)self->env.sys->close(self->wake_fds[0]);
    }
    self->wake_fds[0] = self->wake_fds[1] = -1;
}

static inline vkp_status vkp_i_guest_open_wake(vkp_i_guest *self)
{
    int fds[2];
    vkp_status status;
    const int rc = self->env.sys->wake_pair(fds);
    if (rc < 0) {
        return vkp_i_guest_fail(rc);
    }
    self->wake_fds[0] = fds[0]; /* before arm, which recognises the wake by its number */
    self->wake_fds[1] = fds[1];
    status = vkp_i_guest_add(self, fds[0], VKP_IO_READ, &self->wake);
    if (status != VKP_OK) {
        vkp_i_guest_close_wake(self);
    }
    return status;
}

/* The program forks the foreign loop. The wake is shared with the parent: a new one is opened, and
   one wake is left pending, so that a wake from before the fork is not lost.                  */
static inline vkp_status vkp_i_guest_after_fork(void *state)
{
    vkp_i_guest *self = (vkp_i_guest *)state;
    vkp_status status;
    self->pid = self->env.sys->process_id();
    vkp_i_guest_close_wake(self);
    status = vkp_i_guest_open_wake(self);
    if (status == VKP_OK) {
        vkp_i_guest_wake(self);
    }
    return status;
}

/* ---- close ---- */

/* True in a forked child in which after_fork was not called: the foreign loop may not have been
   notified of the fork either.                                                                */
static inline bool vkp_i_guest_is_forked(const vkp_i_guest *self)
{
    return self->pid != self->env.sys->process_id();
}

static inline void vkp_i_guest_close(vkp_i_guest *self)
{
    size_t fd;
    for (fd = 0; fd < self->items; fd++) {
        (void)vkp_i_guest_set_interest(self, (int)fd, 0, 0);
    }
    vkp_i_guest_close_wake(self);
    (void)self->env.alloc(self->env.user, self->entries, self->items * sizeof *self->entries, 0);
}

static inline int vkp_i_guest_pollable_fd(void *state)
{
    (void)state;
    return -1; /* a descriptor of the foreign loop belongs to the program */
}

#endif /* VKP_GUEST_H */
