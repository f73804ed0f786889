/* vkp_backend_libev.c - a loop's backend that is a guest in the program's own ev_loop
   SPDX-License-Identifier: MIT

   What is wrong with libev, besides the points of vkp_guest.h, and what this backend does about it:
   - An event that a callback feeds runs in the same batch, behind the events of higher priority.
     A round runs there. But a round that feeds itself again would keep libev from polling its
     descriptors, so a round asks for the next one by the timer, which fires in the next iteration.
   - libev stops a descriptor that the kernel refuses, and reports EV_ERROR once. The backend
     starts the watcher again: the descriptor is polled in every round until its owner stops the io.
   - A descriptor that was closed while registered ends the process, by an assertion, when libev
     next uses it. The program avoids that: vkp_io_stop first, then close.
   - libev also exports functions with libevent's names: a program links one of the two.
   - ev_async_send is legal in signal handlers, and makes a system call only if the loop sleeps: the
     backend uses it as the wake. ev_loop_fork repairs it in a forked child.

   vkp_loop_config.foreign is the struct ev_loop *. The wake does not keep ev_run from returning
   (ev_unref); registered descriptors, timers and queued work do.                              */
#include "vkp_guest.h"

#include <ev.h>

typedef struct vkp_i_libev_entry {
    vkp_i_guest_entry base;
    ev_io io;
} vkp_i_libev_entry;

typedef struct vkp_i_libev {
    vkp_i_guest base;
    struct ev_loop *loop;
    ev_async wake;
    ev_timer timer;
    ev_prepare gather; /* fed, never started */
} vkp_i_libev;

static void vkp_i_libev_on_io(struct ev_loop *loop, ev_io *io, int revents)
{
    if ((revents & EV_ERROR) != 0) {
        ev_io_start(loop, io);
    }
    vkp_i_guest_note((vkp_i_guest_entry *)io->data);
}

static void vkp_i_libev_on_wake(struct ev_loop *loop, ev_async *wake, int revents)
{
    vkp_i_guest *self = (vkp_i_guest *)wake->data;
    (void)loop;
    (void)revents;
    self->ops->gather(self);
}

static void vkp_i_libev_on_timer(struct ev_loop *loop, ev_timer *timer, int revents)
{
    (void)loop;
    (void)revents;
    vkp_i_guest_on_timer((vkp_i_guest *)timer->data);
}

static void vkp_i_libev_on_gather(struct ev_loop *loop, ev_prepare *gather, int revents)
{
    (void)loop;
    (void)revents;
    vkp_i_guest_round((vkp_i_guest *)gather->data);
}

static int vkp_i_libev_arm(vkp_i_guest_entry *entry, uint32_t interest)
{
    struct ev_loop *loop = ((vkp_i_libev *)(void *)entry->guest)->loop;
    ev_io *io = &((vkp_i_libev_entry *)(void *)entry)->io;
    if (entry->interest == 0) {
        ev_init(io, vkp_i_libev_on_io);
        io->data = entry;
    }
    ev_io_stop(loop, io);
    ev_io_set(io, entry->fd,
              ((interest & VKP_IO_READ) != 0 ? EV_READ : 0) |
                  ((interest & VKP_IO_WRITE) != 0 ? EV_WRITE : 0));
    ev_io_start(loop, io);
    return 0;
}

static void vkp_i_libev_drop(vkp_i_guest_entry *entry)
{
    ev_io_stop(((vkp_i_libev *)(void *)entry->guest)->loop,
               &((vkp_i_libev_entry *)(void *)entry)->io);
    vkp_i_guest_free(entry);
}

static void vkp_i_libev_gather(vkp_i_guest *base)
{
    vkp_i_libev *self = (vkp_i_libev *)(void *)base;
    ev_feed_event(self->loop, &self->gather, EV_CUSTOM);
}

static int vkp_i_libev_set_timer(vkp_i_guest *base, uint64_t left_ns)
{
    vkp_i_libev *self = (vkp_i_libev *)(void *)base;
    ev_timer_stop(self->loop, &self->timer);
    if (left_ns != VKP_FOREVER) {
        ev_timer_set(&self->timer, (double)left_ns * 1e-9, 0.);
        ev_timer_start(self->loop, &self->timer);
    }
    return 0;
}

static const vkp_i_guest_ops vkp_i_libev_ops = {sizeof(vkp_i_libev_entry), vkp_i_libev_arm,
                                                vkp_i_libev_drop, vkp_i_libev_gather,
                                                vkp_i_libev_set_timer};

static vkp_status vkp_i_libev_open(const vkp_backend_host *host, void **state)
{
    const vkp_env *env = host->env;
    vkp_i_libev *self;
    if (host->foreign == NULL) {
        return VKP_ERR_INVALID;
    }
    self = (vkp_i_libev *)env->alloc(env->user, NULL, 0, sizeof *self);
    if (self == NULL) {
        return VKP_ERR_NOMEM;
    }
    memset(self, 0, sizeof *self);
    vkp_i_guest_init(&self->base, host, &vkp_i_libev_ops);
    self->loop = (struct ev_loop *)host->foreign;
    ev_init(&self->timer, vkp_i_libev_on_timer);
    self->timer.data = self;
    ev_init(&self->gather, vkp_i_libev_on_gather);
    ev_set_priority(&self->gather, EV_MINPRI);
    self->gather.data = self;
    ev_async_init(&self->wake, vkp_i_libev_on_wake);
    self->wake.data = self;
    ev_async_start(self->loop, &self->wake);
    ev_unref(self->loop);
    *state = self;
    return VKP_OK;
}

/* ev_io_stop changes no kernel state before the next iteration: safe in a forked child too. */
static void vkp_i_libev_close(void *state)
{
    vkp_i_libev *self = (vkp_i_libev *)state;
    const vkp_env env = self->base.env;
    vkp_i_guest_close(&self->base);
    ev_timer_stop(self->loop, &self->timer);
    ev_clear_pending(self->loop, &self->gather);
    ev_ref(self->loop);
    ev_async_stop(self->loop, &self->wake);
    (void)env.alloc(env.user, self, sizeof *self, 0);
}

static void vkp_i_libev_wake(void *state)
{
    vkp_i_libev *self = (vkp_i_libev *)state;
    ev_async_send(self->loop, &self->wake);
}

/* The program calls ev_loop_fork, which ends the sharing of kernel state with the parent. */
static vkp_status vkp_i_libev_after_fork(void *state)
{
    vkp_i_libev_wake(state);
    return VKP_OK;
}

const vkp_backend vkp_backend_libev = {
    VKP_BACKEND_ABI,        VKP_BACKEND_GUEST,       "libev",
    vkp_i_libev_open,       vkp_i_libev_close,       vkp_i_guest_set_interest,
    vkp_i_guest_wait,       vkp_i_libev_wake,        vkp_i_guest_timer,
    vkp_i_libev_after_fork, vkp_i_guest_pollable_fd, NULL};
