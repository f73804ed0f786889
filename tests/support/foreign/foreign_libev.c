/* libev behind the table of foreign.h.
   SPDX-License-Identifier: MIT */
#include "foreign.h"

#include <ev.h>

#include <stdlib.h>

typedef struct foreign_watcher {
    struct ev_loop *loop;
    ev_io io;
    ev_timer timer;
    void (*fn)(void *user);
    void *user;
} foreign_watcher;

static void *foreign_open(void)
{
    struct ev_loop *loop = ev_loop_new(EVFLAG_AUTO);
    if (loop == NULL) {
        vkp_test_fail("no loop of libev");
    }
    return loop;
}

/* libev has no count of what is in a loop: that it was alive would show, no more. A forked child
   closes its copy, too, and may not look at the kernel's set before it has one of its own.      */
static void foreign_close(void *loop)
{
    ev_loop_fork((struct ev_loop *)loop);
    if (ev_run((struct ev_loop *)loop, EVRUN_NOWAIT)) {
        vkp_test_fail("a watcher is left in the loop");
    }
    ev_loop_destroy((struct ev_loop *)loop);
}

static void foreign_step(void *loop, bool wait)
{
    ev_ref((struct ev_loop *)loop);
    (void)ev_run((struct ev_loop *)loop, wait ? EVRUN_ONCE : EVRUN_NOWAIT);
    ev_unref((struct ev_loop *)loop);
}

static void foreign_run(void *loop)
{
    (void)ev_run((struct ev_loop *)loop, 0);
}

static void foreign_stop(void *loop)
{
    ev_break((struct ev_loop *)loop, EVBREAK_ONE);
}

static void foreign_after_fork(void *loop)
{
    ev_loop_fork((struct ev_loop *)loop);
}

static foreign_watcher *new_watcher(void *loop, void (*fn)(void *user), void *user)
{
    foreign_watcher *self = (foreign_watcher *)calloc(1, sizeof *self);
    if (self == NULL) {
        vkp_test_fail("no memory");
    }
    self->loop = (struct ev_loop *)loop;
    self->fn = fn;
    self->user = user;
    return self;
}

static void on_timer(struct ev_loop *loop, ev_timer *timer, int revents)
{
    foreign_watcher *self = (foreign_watcher *)timer->data;
    (void)loop;
    (void)revents;
    self->fn(self->user);
}

static void *foreign_timer_start(void *loop, uint64_t after_ms, void (*fn)(void *user), void *user)
{
    foreign_watcher *self = new_watcher(loop, fn, user);
    ev_timer_init(&self->timer, on_timer, (double)after_ms / 1000., 0.);
    self->timer.data = self;
    ev_timer_start(self->loop, &self->timer);
    return self;
}

static void foreign_timer_end(void *timer)
{
    foreign_watcher *self = (foreign_watcher *)timer;
    ev_timer_stop(self->loop, &self->timer);
    free(self);
}

static void on_io(struct ev_loop *loop, ev_io *io, int revents)
{
    foreign_watcher *self = (foreign_watcher *)io->data;
    (void)loop;
    (void)revents;
    self->fn(self->user);
}

static void *foreign_watch_start(void *loop, int fd, void (*fn)(void *user), void *user)
{
    foreign_watcher *self = new_watcher(loop, fn, user);
    ev_io_init(&self->io, on_io, fd, EV_READ);
    self->io.data = self;
    ev_io_start(self->loop, &self->io);
    return self;
}

static void foreign_watch_end(void *watch)
{
    foreign_watcher *self = (foreign_watcher *)watch;
    ev_io_stop(self->loop, &self->io);
    free(self);
}

static const vkp_test_foreign table = {&vkp_backend_libev,
                                       true,
                                       false,
                                       true,
                                       true,
                                       foreign_open,
                                       foreign_close,
                                       foreign_step,
                                       foreign_run,
                                       foreign_stop,
                                       foreign_after_fork,
                                       foreign_timer_start,
                                       foreign_timer_end,
                                       foreign_watch_start,
                                       foreign_watch_end};

const vkp_test_foreign *vkp_test_foreign_loop(void)
{
    return &table;
}
