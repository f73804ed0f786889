/* vkp_backend_libuv.c - a loop's backend that is a guest in the program's own uv_loop_t
   SPDX-License-Identifier: MIT

   What is wrong with libuv here, besides what every guest meets (vkp_guest.h), and what is done:
   - It closes handles at the end of an iteration, not at once. So their memory is given back only
     then: after the last vkp_loop_unref the program runs its loop once more, and until then its
     allocator (vkp_env) stays. uv_loop_close says UV_EBUSY before.
   - Until 1.45, timers that a timer's callback starts run in the same pass if they are due, so work
     that makes more work would keep the loop from its descriptors. Here a timer never runs a
     round; it asks for one behind the poll of this iteration (uv_check), as descriptors do, and
     an idle handle keeps that poll from waiting.
   - A descriptor with an error (POLLERR) is stopped and told of once, as UV_EBADF. It is started
     again: until its owner stops it, it is asked for in every round.
   - uv_poll makes descriptors non-blocking, refuses one that the same loop watches already (EEXIST)
     and ends the process when one was closed without a word. That is for the program to avoid:
     stop watches, then close.
   - A uv_async that was pending at a fork is dead in the child (until 1.45), and its signal may
     change errno (macOS). A wake of our own under uv_poll is sound everywhere.

   vkp_loop_config.foreign is the uv_loop_t *. The wake does not keep uv_run from returning
   (uv_unref); descriptors under watch, timers and work that is due do.                        */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE 1 /* in strict C99, glibc hides what uv.h needs */
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
    uv_idle_t hurry; /* while a round is due */
    size_t handles;  /* that are not closed; the last one frees this */
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
    (void)hurry; /* that it is active is enough */
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
    return vkp_i_libuv_start(entry, interest); /* what was just initialised can be started */
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

/* What can fail comes first: a handle that was initialised takes an iteration to go away. */
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

/* In a forked child the set of the kernel may still be the parent's, and closing handles would take
   them out of it: the child's copy of the loop gets one of its own first.                     */
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
