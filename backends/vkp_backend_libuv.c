/* vkp_backend_libuv.c - a loop's backend that is a guest in the program's own uv_loop_t
   SPDX-License-Identifier: MIT

   What is wrong with libuv, besides the points of vkp_guest.h, and what this backend does about it:
   - libuv closes handles at the end of an iteration, and the backend frees their memory then. After
     the last vkp_loop_unref the program runs its loop once more, and keeps its allocator (vkp_env)
     until then. Before that, uv_loop_close returns UV_EBUSY.
   - Before 1.45, a due timer that a timer's callback starts runs in the same pass, so work that
     makes more work would keep libuv from polling its descriptors. A timer of this backend never
     runs a round: it asks for one behind the poll of this iteration (uv_check), as descriptors do.
     An idle handle keeps that poll from waiting.
   - libuv stops a descriptor with an error (POLLERR), and reports UV_EBADF once. The backend starts
     the watcher again: the descriptor is polled in every round until its owner stops the io.
   - uv_poll makes descriptors non-blocking, refuses one that the same loop has already (EEXIST),
     and ends the process when one was closed while registered. The program avoids that:
     vkp_io_stop first, then close.
   - Before 1.45, a uv_async that was pending at a fork no longer works in the child, and
     uv_async_send may change errno (macOS). So the backend has its own wake under uv_poll.

   vkp_loop_config.foreign is the uv_loop_t *. The wake does not keep uv_run from returning
   (uv_unref); registered descriptors, timers and queued work do.                              */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE 1 /* in strict C99, glibc hides declarations that uv.h needs */
#endif
#include "vkp_guest.h"

#include <uv.h>

typedef struct vkp_i_libuv_entry {
    vkp_i_guest_entry base;
    uv_poll_t poll;
} vkp_i_libuv_entry;

typedef struct vkp_i_libuv {
    vkp_i_guest base;
    uv_loop_t *loop;
    uv_timer_t timer;
    uv_check_t gather;
    uv_idle_t hurry; /* active while a round is due */
    size_t handles;  /* handles not yet closed; the last one frees this struct */
} vkp_i_libuv;

static void vkp_i_libuv_release(vkp_i_libuv *self)
{
    const vkp_env env = self->base.env;
    if (--self->handles == 0) {
        (void)env.alloc(env.user, self, sizeof *self, 0);
    }
}

static void vkp_i_libuv_on_closed(uv_handle_t *handle)
{
    vkp_i_libuv_release((vkp_i_libuv *)handle->data);
}

static void vkp_i_libuv_on_entry_closed(uv_handle_t *handle)
{
    vkp_i_guest_entry *entry = (vkp_i_guest_entry *)handle->data;
    vkp_i_libuv *self = (vkp_i_libuv *)(void *)entry->guest;
    vkp_i_guest_free(entry);
    vkp_i_libuv_release(self);
}

static void vkp_i_libuv_on_poll(uv_poll_t *poll, int status, int events);

static int vkp_i_libuv_start(vkp_i_guest_entry *entry, uint32_t interest)
{
    return uv_poll_start(&((vkp_i_libuv_entry *)(void *)entry)->poll,
                         ((interest & VKP_IO_READ) != 0 ? UV_READABLE : 0) |
                             ((interest & VKP_IO_WRITE) != 0 ? UV_WRITABLE : 0),
                         vkp_i_libuv_on_poll);
}

static void vkp_i_libuv_on_poll(uv_poll_t *poll, int status, int events)
{
    vkp_i_guest_entry *entry = (vkp_i_guest_entry *)poll->data;
    (void)events;
    if (status < 0) {
        (void)vkp_i_libuv_start(entry, entry->interest);
    }
    vkp_i_guest_note(entry);
}

static void vkp_i_libuv_on_timer(uv_timer_t *timer)
{
    vkp_i_guest_on_timer((vkp_i_guest *)timer->data);
}

static void vkp_i_libuv_on_gather(uv_check_t *gather)
{
    vkp_i_libuv *self = (vkp_i_libuv *)gather->data;
    (void)uv_check_stop(&self->gather);
    (void)uv_idle_stop(&self->hurry);
    vkp_i_guest_round(&self->base);
}

static void vkp_i_libuv_on_hurry(uv_idle_t *hurry)
{
    (void)hurry; /* an active idle handle is enough: the poll does not wait */
}

static int vkp_i_libuv_arm(vkp_i_guest_entry *entry, uint32_t interest)
{
    vkp_i_libuv *self = (vkp_i_libuv *)(void *)entry->guest;
    uv_poll_t *poll = &((vkp_i_libuv_entry *)(void *)entry)->poll;
    int rc;
    if (entry->interest != 0) {
        return vkp_i_libuv_start(entry, interest);
    }
    rc = uv_poll_init(self->loop, poll, entry->fd);
    if (rc < 0) {
        return rc;
    }
    poll->data = entry;
    self->handles++;
    if (entry->fd == self->base.wake_fds[0]) {
        uv_unref((uv_handle_t *)poll);
    }
    return vkp_i_libuv_start(entry, interest); /* cannot fail after uv_poll_init */
}

static void vkp_i_libuv_drop(vkp_i_guest_entry *entry)
{
    uv_close((uv_handle_t *)&((vkp_i_libuv_entry *)(void *)entry)->poll,
             vkp_i_libuv_on_entry_closed);
}

static void vkp_i_libuv_gather(vkp_i_guest *base)
{
    vkp_i_libuv *self = (vkp_i_libuv *)(void *)base;
    (void)uv_check_start(&self->gather, vkp_i_libuv_on_gather);
    (void)uv_idle_start(&self->hurry, vkp_i_libuv_on_hurry);
}

static int vkp_i_libuv_set_timer(vkp_i_guest *base, uint64_t left_ns)
{
    vkp_i_libuv *self = (vkp_i_libuv *)(void *)base;
    if (left_ns == VKP_FOREVER) {
        return uv_timer_stop(&self->timer);
    }
    return uv_timer_start(&self->timer, vkp_i_libuv_on_timer, (left_ns + 999999u) / 1000000u, 0);
}

static const vkp_i_guest_ops vkp_i_libuv_ops = {sizeof(vkp_i_libuv_entry), vkp_i_libuv_arm,
                                                vkp_i_libuv_drop, vkp_i_libuv_gather,
                                                vkp_i_libuv_set_timer};

/* Calls that can fail come first: closing an initialised handle takes an iteration. */
static vkp_status vkp_i_libuv_open(const vkp_backend_host *host, void **state)
{
    const vkp_env *env = host->env;
    vkp_i_libuv *self;
    vkp_status status;
    if (host->foreign == NULL) {
        return VKP_ERR_INVALID;
    }
    self = (vkp_i_libuv *)env->alloc(env->user, NULL, 0, sizeof *self);
    if (self == NULL) {
        return VKP_ERR_NOMEM;
    }
    memset(self, 0, sizeof *self);
    vkp_i_guest_init(&self->base, host, &vkp_i_libuv_ops);
    self->loop = (uv_loop_t *)host->foreign;
    status = vkp_i_guest_open_wake(&self->base);
    if (status != VKP_OK) {
        (void)env->alloc(env->user, self, sizeof *self, 0);
        return status;
    }
    (void)uv_timer_init(self->loop, &self->timer);
    (void)uv_check_init(self->loop, &self->gather);
    (void)uv_idle_init(self->loop, &self->hurry);
    self->timer.data = self->gather.data = self->hurry.data = self;
    self->handles += 3;
    *state = self;
    return VKP_OK;
}

/* In a forked child the loop may still share the kernel's set with the parent, and uv_close would
   remove descriptors from the parent's set: uv_loop_fork first gives the child its own set.   */
static void vkp_i_libuv_close(void *state)
{
    vkp_i_libuv *self = (vkp_i_libuv *)state;
    if (vkp_i_guest_is_forked(&self->base)) {
        (void)uv_loop_fork(self->loop);
    }
    vkp_i_guest_close(&self->base);
    uv_close((uv_handle_t *)&self->timer, vkp_i_libuv_on_closed);
    uv_close((uv_handle_t *)&self->gather, vkp_i_libuv_on_closed);
    uv_close((uv_handle_t *)&self->hurry, vkp_i_libuv_on_closed);
}

const vkp_backend vkp_backend_libuv = {
    VKP_BACKEND_ABI,        VKP_BACKEND_GUEST,       "libuv",
    vkp_i_libuv_open,       vkp_i_libuv_close,       vkp_i_guest_set_interest,
    vkp_i_guest_wait,       vkp_i_guest_wake,        vkp_i_guest_timer,
    vkp_i_guest_after_fork, vkp_i_guest_pollable_fd, NULL};
