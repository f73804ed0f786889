/* A guest as a backend that waits: its foreign loop is opened with it and runs inside of wait.
   Takes the place of backends.c; see foreign.h.
   SPDX-License-Identifier: MIT */
#include "foreign.h"

#include <stdlib.h>

typedef struct adapter {
    void *loop;
    void *guest;
    vkp_backend_host host;
    bool asked; /* for a round */
} adapter;

static const vkp_backend *guest(void)
{
    return vkp_test_foreign_loop()->guest;
}

static void on_round(void *user)
{
    ((adapter *)user)->asked = true;
}

static void free_adapter(adapter *self)
{
    vkp_test_foreign_loop()->close(self->loop);
    free(self);
}

static vkp_status adapter_open(const vkp_backend_host *host, void **state)
{
    adapter *self = (adapter *)calloc(1, sizeof *self);
    vkp_status status;
    if (self == NULL) {
        vkp_test_fail("no memory");
    }
    self->loop = vkp_test_foreign_loop()->open();
    self->host = *host;
    self->host.foreign = self->loop;
    self->host.loop = self;
    self->host.round = on_round;
    status = guest()->open(&self->host, &self->guest);
    if (status != VKP_OK) {
        free_adapter(self);
        return status;
    }
    *state = self;
    return VKP_OK;
}

static void adapter_close(void *state)
{
    adapter *self = (adapter *)state;
    guest()->close(self->guest);
    free_adapter(self);
}

static vkp_status adapter_set_interest(void *state, int fd, uint32_t interest, uint64_t token)
{
    return guest()->set_interest(((adapter *)state)->guest, fd, interest, token);
}

static vkp_status adapter_wait(void *state, uint64_t deadline_ns, vkp_event *out, size_t capacity,
                               size_t *count)
{
    adapter *self = (adapter *)state;
    const bool wait = deadline_ns > vkp_now_ns();
    self->asked = false;
    if (wait && guest()->timer(self->guest, deadline_ns) != VKP_OK) {
        vkp_test_fail("the guest has no timer");
    }
    do {
        vkp_test_foreign_loop()->step(self->loop, wait);
    } while (wait && !self->asked);
    if (wait && guest()->timer(self->guest, VKP_FOREVER) != VKP_OK) {
        vkp_test_fail("the guest's timer does not stop");
    }
    return guest()->wait(self->guest, 0, out, capacity, count);
}

static void adapter_wake(void *state)
{
    guest()->wake(((adapter *)state)->guest);
}

static vkp_status adapter_after_fork(void *state)
{
    adapter *self = (adapter *)state;
    vkp_test_foreign_loop()->after_fork(self->loop);
    return guest()->after_fork(self->guest);
}

static int adapter_pollable_fd(void *state)
{
    return guest()->pollable_fd(((adapter *)state)->guest);
}

static vkp_backend waiting = {VKP_BACKEND_ABI,
                              0,
                              "",
                              adapter_open,
                              adapter_close,
                              adapter_set_interest,
                              adapter_wait,
                              adapter_wake,
                              NULL,
                              adapter_after_fork,
                              adapter_pollable_fd,
                              NULL};

static const vkp_backend *const backends[] = {&waiting, NULL};

/* libuv opens pipes for the whole process with its first loop: none of a test's descriptors. */
const vkp_backend *const *vkp_test_backends(void)
{
    if (waiting.name[0] == '\0') {
        vkp_test_foreign_loop()->close(vkp_test_foreign_loop()->open());
        waiting.name = guest()->name;
    }
    return backends;
}

const vkp_backend *const *vkp_test_backends_all(void)
{
    return vkp_test_backends();
}
