/* libevent behind the table of foreign.h.
   SPDX-License-Identifier: MIT */
#include "foreign.h"

#include <event2/event.h>

#include <stdlib.h>

typedef struct foreign_watcher {
    struct event *event;
    void (*fn)(void *user);
    void *user;
} foreign_watcher;

static void *foreign_open(void)
{
    struct event_base *base = event_base_new();
    if (base == NULL) {
        vkp_test_fail("no base of libevent");
    }
    return base;
}

static int on_left(const struct event_base *base, const struct event *event, void *user)
{
    (void)base;
    (void)event;
    (void)user;
    vkp_test_fail("an event is left in the base");
}

static void foreign_close(void *base)
{
    (void)event_base_foreach_event((struct event_base *)base, on_left, NULL);
    event_base_free((struct event_base *)base);
}

/* Without ONCE, not to block means to go on as long as something is ready. */
static void foreign_step(void *base, bool wait)
{
    (void)event_base_loop((struct event_base *)base,
                          EVLOOP_NO_EXIT_ON_EMPTY | EVLOOP_ONCE | (wait ? 0 : EVLOOP_NONBLOCK));
}

static void foreign_run(void *base)
{
    (void)event_base_dispatch((struct event_base *)base);
}

static void foreign_stop(void *base)
{
    (void)event_base_loopexit((struct event_base *)base, NULL);
}

static void foreign_after_fork(void *base)
{
    if (event_reinit((struct event_base *)base) != 0) {
        vkp_test_fail("a base of libevent does not survive a fork");
    }
}

static void on_event(evutil_socket_t fd, short events, void *user)
{
    foreign_watcher *self = (foreign_watcher *)user;
    (void)fd;
    (void)events;
    self->fn(self->user);
}

static foreign_watcher *start(void *base, int fd, int events, const struct timeval *after,
                              void (*fn)(void *user), void *user)
{
    foreign_watcher *self = (foreign_watcher *)calloc(1, sizeof *self);
    if (self == NULL) {
        vkp_test_fail("no memory");
    }
    self->fn = fn;
    self->user = user;
    self->event = event_new((struct event_base *)base, fd, (short)events, on_event, self);
    if (self->event == NULL || event_add(self->event, after) != 0) {
        vkp_test_fail("no event of libevent");
    }
    return self;
}

static void *foreign_timer_start(void *base, uint64_t after_ms, void (*fn)(void *user), void *user)
{
    struct timeval after;
    after.tv_sec = (time_t)(after_ms / 1000);
    after.tv_usec = (suseconds_t)(after_ms % 1000 * 1000);
    return start(base, -1, 0, &after, fn, user);
}

static void *foreign_watch_start(void *base, int fd, void (*fn)(void *user), void *user)
{
    return start(base, fd, EV_READ | EV_PERSIST, NULL, fn, user);
}

static void end(void *watcher)
{
    event_free(((foreign_watcher *)watcher)->event);
    free(watcher);
}

static const vkp_test_foreign table = {&vkp_backend_libevent,
                                       false,
                                       true,
                                       false,
                                       true,
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
