/* libuv behind the table of foreign.h.
   SPDX-License-Identifier: MIT */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE 1 /* in strict C99, glibc hides what uv.h needs */
#endif
#include "foreign.h"

#include <uv.h>

#include <stdlib.h>

typedef struct foreign_loop {
    uv_loop_t loop;
    uv_prepare_t keep; /* started, it keeps the loop alive and changes nothing else */
} foreign_loop;

typedef struct foreign_watcher {
    union {
        uv_handle_t any;
        uv_timer_t timer;
        uv_poll_t poll;
    } handle;
    void (*fn)(void *user);
    void *user;
} foreign_watcher;

/* The backends take a uv_loop_t: it is the first member. */
static foreign_loop *of(void *loop)
{
    return (foreign_loop *)loop;
}

static void check(int rc, const char *what)
{
    if (rc < 0) {
        vkp_test_fail("libuv: %s: %s", what, uv_strerror(rc));
    }
}

static void *foreign_open(void)
{
    foreign_loop *self = (foreign_loop *)calloc(1, sizeof *self);
    if (self == NULL) {
        vkp_test_fail("no memory");
    }
    check(uv_loop_init(&self->loop), "a loop");
    check(uv_prepare_init(&self->loop, &self->keep), "a prepare handle");
    return self;
}

static void foreign_close(void *loop)
{
    uv_close((uv_handle_t *)&of(loop)->keep, NULL);
    (void)uv_run(&of(loop)->loop, UV_RUN_NOWAIT); /* runs what closes */
    check(uv_loop_close(&of(loop)->loop), "something is left in the loop");
    free(loop);
}

static void on_keep(uv_prepare_t *keep)
{
    (void)keep;
}

static void foreign_step(void *loop, bool wait)
{
    check(uv_prepare_start(&of(loop)->keep, on_keep), "a prepare handle");
    (void)uv_run(&of(loop)->loop, wait ? UV_RUN_ONCE : UV_RUN_NOWAIT);
    (void)uv_prepare_stop(&of(loop)->keep);
}

static void foreign_run(void *loop)
{
    (void)uv_run(&of(loop)->loop, UV_RUN_DEFAULT);
}

static void foreign_stop(void *loop)
{
    uv_stop(&of(loop)->loop);
}

static void foreign_after_fork(void *loop)
{
    check(uv_loop_fork(&of(loop)->loop), "a forked loop");
}

static foreign_watcher *new_watcher(void (*fn)(void *user), void *user)
{
    foreign_watcher *self = (foreign_watcher *)calloc(1, sizeof *self);
    if (self == NULL) {
        vkp_test_fail("no memory");
    }
    self->handle.any.data = self;
    self->fn = fn;
    self->user = user;
    return self;
}

static void on_closed(uv_handle_t *handle)
{
    free(handle->data);
}

static void end(void *watcher)
{
    uv_close(&((foreign_watcher *)watcher)->handle.any, on_closed);
}

static void on_timer(uv_timer_t *timer)
{
    foreign_watcher *self = (foreign_watcher *)timer->data;
    self->fn(self->user);
}

static void *foreign_timer_start(void *loop, uint64_t after_ms, void (*fn)(void *user), void *user)
{
    foreign_watcher *self = new_watcher(fn, user);
    check(uv_timer_init(&of(loop)->loop, &self->handle.timer), "a timer");
    check(uv_timer_start(&self->handle.timer, on_timer, after_ms, 0), "a timer");
    return self;
}

static void on_poll(uv_poll_t *poll, int status, int events)
{
    foreign_watcher *self = (foreign_watcher *)poll->data;
    (void)events;
    check(status, "a descriptor");
    self->fn(self->user);
}

static void *foreign_watch_start(void *loop, int fd, void (*fn)(void *user), void *user)
{
    foreign_watcher *self = new_watcher(fn, user);
    check(uv_poll_init(&of(loop)->loop, &self->handle.poll, fd), "a descriptor");
    check(uv_poll_start(&self->handle.poll, UV_READABLE, on_poll), "a descriptor");
    return self;
}

static const vkp_test_foreign table = {&vkp_backend_libuv,
                                       true,
                                       true,
                                       false,
                                       false,
                                       foreign_open,
                                       foreign_close,
                                       foreign_step,
                                       foreign_run,
                                       foreign_stop,
                                       foreign_after_fork,
                                       foreign_timer_start,
                                       end,
                                       foreign_watch_start,
                                       end};

const vkp_test_foreign *vkp_test_foreign_loop(void)
{
    return &table;
}
