/* A program with a loop of its own, which ours is a guest of (GUEST: libev, libuv or libevent):
   what is posted runs in it.
   SPDX-License-Identifier: MIT */
#include <valkey_push.h>

#include <stdio.h>

#if defined(GUEST_libev)
#include <ev.h>
typedef struct ev_loop foreign;
#define OPEN() ev_loop_new(EVFLAG_AUTO)
#define RUN(loop) ev_run(loop, 0)
#define CLOSE(loop) ev_loop_destroy(loop)
#elif defined(GUEST_libuv)
#include <uv.h>
typedef uv_loop_t foreign;
#define OPEN() uv_default_loop()
#define RUN(loop) uv_run(loop, UV_RUN_DEFAULT)
#define CLOSE(loop) ((void)uv_run(loop, UV_RUN_DEFAULT), (void)uv_loop_close(loop))
#else
#include <event2/event.h>
typedef struct event_base foreign;
#define OPEN() event_base_new()
#define RUN(loop) event_base_dispatch(loop)
#define CLOSE(loop) event_base_free(loop)
#endif

#define JOIN(a, b) a##b
#define BACKEND(guest) JOIN(vkp_backend_, guest)

static void count(void *ran)
{
    ++*(int *)ran;
}

int main(void)
{
    foreign *own = OPEN();
    vkp_loop_config config = VKP_ZERO;
    vkp_loop *loop;
    int ran = 0;
    config.backend = &BACKEND(GUEST);
    config.foreign = own;
    if (own == NULL || vkp_loop_open(&config, &loop) != VKP_OK ||
        vkp_loop_post(loop, count, &ran) != VKP_OK) {
        return 1;
    }
    (void)RUN(own);
    vkp_loop_unref(loop);
    CLOSE(own);
    printf("%s: %d\n", config.backend->name, ran);
    return ran == 1 ? 0 : 1;
}
