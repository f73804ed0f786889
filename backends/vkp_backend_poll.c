/* vkp_backend_poll.c - a loop's backend over poll(2), for any POSIX system
   SPDX-License-Identifier: MIT

   What is wrong with poll, and what this backend does about it:
   - The kernel copies and scans the whole set on each call: a round costs as much as there are
     descriptors, not as much as there are events. The array has no unused entries (the last entry
     fills a hole), so that the kernel scans registered descriptors only. With thousands of mostly
     idle descriptors use epoll or kqueue.
   - poll does not remember what it reported: when more descriptors are ready than the caller has
     room for, a scan from the front each time would starve the back. This backend continues where
     the last scan ended.
   - poll reports a closed descriptor as POLLNVAL without end. The backend reports VKP_IO_ERROR, so
     that the owner's next read or write fails and the owner stops the io. macOS reports POLLNVAL
     for some devices too; reading these devices works.
   - POLLHUP is reported with or without POLLIN while data is left, depending on the system and on
     the kind of descriptor. The backend reports readable, writable and hung up: readers read all
     data before they treat the connection as closed.
   - Only a descriptor ends the call early: a pipe or an eventfd in the set is the wake.        */
#if __has_include("../valkey_push.h")
#include "../valkey_push.h"
#else /* installed, or copied into another folder */
#include "valkey_push.h"
#endif

#include <errno.h>
#include <poll.h>
#include <string.h>

typedef struct vkp_i_poll_place {
    uint64_t token;
    size_t index; /* in fds; 0, the index of the wake, means not registered */
} vkp_i_poll_place;

typedef struct vkp_i_poll {
    const vkp_env *env;
    vkp_i_poll_place *places; /* by descriptor */
    struct pollfd *fds;       /* dense; [0] is the reading end of the wake */
    size_t items;             /* allocated in both */
    size_t count;             /* entries of fds in use */
    size_t cursor;            /* index in fds at which the next scan begins */
    int wake_fds[2];          /* equal for an eventfd; -1 after a failed after_fork */
} vkp_i_poll;

#define VKP_I_POLL_ITEM_BYTES (sizeof(vkp_i_poll_place) + sizeof(struct pollfd))

/* Make room for descriptors below `need` and their entries: one block, places first. Returns false,
   and changes nothing, when memory runs out.                                                  */
static bool vkp_i_poll_reserve(vkp_i_poll *self, size_t need)
{
    const vkp_env *env = self->env;
    size_t wanted = self->items > 0 ? self->items : 16;
    vkp_i_poll_place *places;
    while (wanted < need) {
        wanted *= 2;
    }
    if (wanted == self->items || wanted > SIZE_MAX / VKP_I_POLL_ITEM_BYTES) {
        return wanted == self->items;
    }
    places = (vkp_i_poll_place *)env->alloc(env->user, NULL, 0, wanted * VKP_I_POLL_ITEM_BYTES);
    if (places == NULL) {
        return false;
    }
    memset(places, 0, wanted * VKP_I_POLL_ITEM_BYTES);
    if (self->items > 0) {
        memcpy(places, self->places, self->items * sizeof *places);
        memcpy(places + wanted, self->fds, self->count * sizeof *self->fds);
        (void)env->alloc(env->user, self->places, self->items * VKP_I_POLL_ITEM_BYTES, 0);
    }
    self->places = places;
    self->fds = (struct pollfd *)(void *)(places + wanted);
    self->items = wanted;
    return true;
}

static void vkp_i_poll_close_wake(vkp_i_poll *self)
{
    if (self->wake_fds[1] != self->wake_fds[0]) {
        (void)self->env->sys->close(self->wake_fds[1]);
    }
    if (self->wake_fds[0] >= 0) {
        (void)self->env->sys->close(self->wake_fds[0]);
    }
    self->wake_fds[0] = self->wake_fds[1] = -1;
}

static void vkp_i_poll_close(void *state)
{
    vkp_i_poll *self = (vkp_i_poll *)state;
    const vkp_env *env = self->env;
    vkp_i_poll_close_wake(self);
    (void)env->alloc(env->user, self->places, self->items * VKP_I_POLL_ITEM_BYTES, 0);
    (void)env->alloc(env->user, self, sizeof *self, 0);
}

static vkp_status vkp_i_poll_open_wake(vkp_i_poll *self)
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

static vkp_status vkp_i_poll_open(const vkp_backend_host *host, void **state)
{
    const vkp_env *env = host->env;
    vkp_status status;
    vkp_i_poll *self = (vkp_i_poll *)env->alloc(env->user, NULL, 0, sizeof *self);
    if (self == NULL) {
        return VKP_ERR_NOMEM;
    }
    memset(self, 0, sizeof *self);
    self->env = env;
    self->wake_fds[0] = self->wake_fds[1] = -1;
    self->count = 1;
    self->cursor = 1;
    status = vkp_i_poll_reserve(self, 1) ? vkp_i_poll_open_wake(self) : VKP_ERR_NOMEM;
    if (status != VKP_OK) {
        vkp_i_poll_close(self);
        return status;
    }
    *state = self;
    return VKP_OK;
}

static vkp_status vkp_i_poll_set_interest(void *state, int fd, uint32_t interest, uint64_t token)
{
    vkp_i_poll *self = (vkp_i_poll *)state;
    vkp_i_poll_place *place;
    struct pollfd *entry;
    if (fd < 0) {
        return VKP_ERR_INVALID;
    }
    if (!vkp_i_poll_reserve(self, (size_t)fd + 2)) {
        return interest == 0 ? VKP_OK : VKP_ERR_NOMEM; /* beyond the table: not registered */
    }
    place = &self->places[fd];
    if (interest != 0) {
        place->index = place->index != 0 ? place->index : self->count++;
        place->token = token;
        entry = &self->fds[place->index];
        entry->fd = fd;
        entry->events = (short)(((interest & VKP_IO_READ) != 0 ? POLLIN : 0) |
                                ((interest & VKP_IO_WRITE) != 0 ? POLLOUT : 0));
    } else if (place->index != 0) {
        entry = &self->fds[place->index];
        *entry = self->fds[--self->count];
        self->places[entry->fd].index = place->index;
        place->index = 0; /* last: the moved entry may be the removed one */
    }
    return VKP_OK;
}

static uint32_t vkp_i_poll_ready(int revents)
{
    uint32_t ready = (revents & POLLIN) != 0 ? VKP_IO_READ : VKP_IO_NONE;
    ready |= (revents & POLLOUT) != 0 ? VKP_IO_WRITE : VKP_IO_NONE;
    ready |= (revents & POLLHUP) != 0 ? VKP_IO_READ | VKP_IO_WRITE | VKP_IO_HUP : 0;
    ready |= (revents & (POLLERR | POLLNVAL)) != 0 ? VKP_IO_READ | VKP_IO_WRITE | VKP_IO_ERROR : 0;
    return ready;
}

static vkp_status vkp_i_poll_wait(void *state, uint64_t deadline_ns, vkp_event *out,
                                  size_t capacity, size_t *count)
{
    vkp_i_poll *self = (vkp_i_poll *)state;
    size_t found = 0;
    size_t scanned;
    unsigned char sink[64];
    int left;
    self->fds[0].fd = self->wake_fds[0];
    self->fds[0].events = POLLIN;
    left = self->env->sys->poll(self->fds, self->count, deadline_ns);
    if (left < 0 && left != -EINTR) {
        errno = -left;
        return VKP_ERR_SYS;
    }
    if (left > 0 && self->fds[0].revents != 0) {
        left--;
        while (self->env->sys->read(self->wake_fds[0], sink, sizeof sink) == (int64_t)sizeof sink) {
        }
    }
    for (scanned = 1; scanned < self->count && left > 0 && found < capacity; scanned++) {
        const struct pollfd *entry;
        self->cursor = self->cursor < self->count ? self->cursor : 1;
        entry = &self->fds[self->cursor++];
        if (entry->revents != 0) {
            out[found].token = self->places[entry->fd].token;
            out[found].ready = vkp_i_poll_ready(entry->revents);
            found++;
            left--;
        }
    }
    *count = found;
    return VKP_OK;
}

/* EAGAIN needs no handling: a full pipe is readable already. The loop calls wake only while it
   sleeps, so no flag saves the system call.                                                   */
static void vkp_i_poll_wake(void *state)
{
    vkp_i_poll *self = (vkp_i_poll *)state;
    const uint64_t one = 1;
    while (self->env->sys->write(self->wake_fds[1], &one, sizeof one) == -EINTR) {
    }
}

/* The set is the child's own, but the wake is shared: a child that reads from the wake takes the
   parent's wakes. One wake is left pending, so that a wake from before the fork is not lost.   */
static vkp_status vkp_i_poll_after_fork(void *state)
{
    vkp_i_poll *self = (vkp_i_poll *)state;
    vkp_i_poll_close_wake(self);
    if (vkp_i_poll_open_wake(self) != VKP_OK) {
        return VKP_ERR_SYS;
    }
    vkp_i_poll_wake(self);
    return VKP_OK;
}

static int vkp_i_poll_pollable_fd(void *state)
{
    (void)state;
    return -1; /* no descriptor represents the whole set */
}

const vkp_backend vkp_backend_poll = {VKP_BACKEND_ABI,
                                      0,
                                      "poll",
                                      vkp_i_poll_open,
                                      vkp_i_poll_close,
                                      vkp_i_poll_set_interest,
                                      vkp_i_poll_wait,
                                      vkp_i_poll_wake,
                                      NULL,
                                      vkp_i_poll_after_fork,
                                      vkp_i_poll_pollable_fd,
                                      NULL};
