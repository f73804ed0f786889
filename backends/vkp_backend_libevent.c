/* vkp_backend_libevent.c - a loop's backend that is a guest in the program's own event_base
   SPDX-License-Identifier: MIT

   What is wrong with libevent, besides the points of vkp_guest.h, and what this backend does:
   - event_active puts an event into the batch that runs, behind the others. A round runs there. But
     a round that activates itself again would keep libevent from polling its descriptors, so a
     round asks for the next round by the timer, which fires in the next iteration.
   - Calls of other threads are safe only if the program enabled that (evthread), calls of signal
     handlers never. So the backend has its own wake, registered as an event.
   - Such an event keeps event_base_dispatch from returning, and no call changes that. libevent
     marks its own events by a flag in a public struct; the backend sets the same flag.
   - libevent registers open files, not descriptors. After a close without a removal, while a
     duplicate is open, the base reports the file without end: vkp_io_stop first, then close.
   - event_add refuses some descriptors (regular files) immediately, and writes to libevent's log.

   vkp_loop_config.foreign is the struct event_base *, of libevent 2.1 or later. The wake does not
   keep event_base_dispatch from returning; registered descriptors, timers and queued work do. */
#include "vkp_guest.h"

#include <event2/event.h>
#include <event2/event_struct.h>

typedef struct vkp_i_libevent_entry {
    vkp_i_guest_entry base;
    struct event event;
} vkp_i_libevent_entry;

typedef struct vkp_i_libevent {
    vkp_i_guest base;
    struct event_base *loop;
    struct event timer;
    struct event gather; /* made active, never added */
} vkp_i_libevent;

static void vkp_i_libevent_on_event(evutil_socket_t fd, short events, void *entry)
{
    (void)fd;
    (void)events;
    vkp_i_guest_note((vkp_i_guest_entry *)entry);
}

static void vkp_i_libevent_on_timer(evutil_socket_t fd, short events, void *self)
{
    (void)fd;
    (void)events;
    vkp_i_guest_on_timer((vkp_i_guest *)self);
}

static void vkp_i_libevent_on_gather(evutil_socket_t fd, short events, void *self)
{
    (void)fd;
    (void)events;
    vkp_i_guest_round((vkp_i_guest *)self);
}

/* event_add may leave errno 0 when memory runs out. */
static int vkp_i_libevent_add(struct event *event, const struct timeval *after)
{
    errno = 0;
    if (event_add(event, after) == 0) {
        return 0;
    }
    return errno != 0 ? -errno : -ENOMEM;
}

/* Remove and add the event, not change it: the number may be another file than before. */
static int vkp_i_libevent_arm(vkp_i_guest_entry *entry, uint32_t interest)
{
    vkp_i_libevent *self = (vkp_i_libevent *)(void *)entry->guest;
    struct event *event = &((vkp_i_libevent_entry *)(void *)entry)->event;
    const int events = EV_PERSIST | ((interest & VKP_IO_READ) != 0 ? EV_READ : 0) |
                       ((interest & VKP_IO_WRITE) != 0 ? EV_WRITE : 0);
    int rc;
    if (entry->interest != 0) {
        (void)event_del(event);
        event_debug_unassign(event);
    }
    (void)event_assign(event, self->loop, entry->fd, (short)events, vkp_i_libevent_on_event, entry);
    if (entry->fd == self->base.wake_fds[0]) {
        event->ev_evcallback.evcb_flags |= EVLIST_INTERNAL;
    }
    rc = vkp_i_libevent_add(event, NULL);
    if (rc < 0 && entry->interest == 0) {
        event_debug_unassign(event);
    }
    return rc;
}

static void vkp_i_libevent_drop(vkp_i_guest_entry *entry)
{
    struct event *event = &((vkp_i_libevent_entry *)(void *)entry)->event;
    (void)event_del(event);
    event_debug_unassign(event);
    vkp_i_guest_free(entry);
}

static void vkp_i_libevent_gather(vkp_i_guest *base)
{
    vkp_i_libevent *self = (vkp_i_libevent *)(void *)base;
    event_active(&self->gather, EV_TIMEOUT, 0);
}

static int vkp_i_libevent_set_timer(vkp_i_guest *base, uint64_t left_ns)
{
    vkp_i_libevent *self = (vkp_i_libevent *)(void *)base;
    const uint64_t left_us = (left_ns + 999u) / 1000u;
    struct timeval after;
    if (left_ns == VKP_FOREVER) {
        (void)event_del(&self->timer);
        return 0;
    }
    after.tv_sec = (time_t)(left_us / 1000000u);
    after.tv_usec = (suseconds_t)(left_us % 1000000u);
    return vkp_i_libevent_add(&self->timer, &after);
}

static const vkp_i_guest_ops vkp_i_libevent_ops = {sizeof(vkp_i_libevent_entry), vkp_i_libevent_arm,
                                                   vkp_i_libevent_drop, vkp_i_libevent_gather,
                                                   vkp_i_libevent_set_timer};

static vkp_status vkp_i_libevent_open(const vkp_backend_host *host, void **state)
{
    const vkp_env *env = host->env;
    vkp_i_libevent *self;
    vkp_status status;
    if (host->foreign == NULL) {
        return VKP_ERR_INVALID;
    }
    self = (vkp_i_libevent *)env->alloc(env->user, NULL, 0, sizeof *self);
    if (self == NULL) {
        return VKP_ERR_NOMEM;
    }
    memset(self, 0, sizeof *self);
    vkp_i_guest_init(&self->base, host, &vkp_i_libevent_ops);
    self->loop = (struct event_base *)host->foreign;
    status = vkp_i_guest_open_wake(&self->base);
    if (status != VKP_OK) {
        (void)env->alloc(env->user, self, sizeof *self, 0);
        return status;
    }
    (void)event_assign(&self->timer, self->loop, -1, 0, vkp_i_libevent_on_timer, self);
    (void)event_assign(&self->gather, self->loop, -1, 0, vkp_i_libevent_on_gather, self);
    *state = self;
    return VKP_OK;
}

/* In a forked child the base may still share the kernel's set with the parent, and event_del would
   remove descriptors from the parent's set: event_reinit first gives the child its own set.   */
static void vkp_i_libevent_close(void *state)
{
    vkp_i_libevent *self = (vkp_i_libevent *)state;
    const vkp_env env = self->base.env;
    if (vkp_i_guest_is_forked(&self->base)) {
        (void)event_reinit(self->loop);
    }
    vkp_i_guest_close(&self->base);
    (void)event_del(&self->timer);
    (void)event_del(&self->gather);
    event_debug_unassign(&self->timer);
    event_debug_unassign(&self->gather);
    (void)env.alloc(env.user, self, sizeof *self, 0);
}

const vkp_backend vkp_backend_libevent = {
    VKP_BACKEND_ABI,        VKP_BACKEND_GUEST,       "libevent",
    vkp_i_libevent_open,    vkp_i_libevent_close,    vkp_i_guest_set_interest,
    vkp_i_guest_wait,       vkp_i_guest_wake,        vkp_i_guest_timer,
    vkp_i_guest_after_fork, vkp_i_guest_pollable_fd, NULL};
