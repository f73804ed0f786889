/* cc -I. examples/embed_glib.c backends/v*_epoll.c $(pkg-config --cflags --libs glib-2.0) -pthread
   SPDX-License-Identifier: MIT

   A loop inside GLib's main loop, as a GSource. Prints what is published on "news", and every ten
   seconds the number of messages; ends with the message "bye":
   embed_glib [tcp:HOST:PORT | unix:PATH]
   On systems other than Linux the backend is backends/vkp_backend_kqueue.c.                   */
#define VKP_IMPLEMENTATION
#include "valkey_push.h"

#include <glib.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>

#ifdef __linux__
#define BACKEND vkp_backend_epoll
#else
#define BACKEND vkp_backend_kqueue
#endif

typedef struct push_source {
    GSource source;
    vkp_loop *loop;
    gpointer descriptor;
} push_source;

/* GLib calls prepare before it waits: TRUE when there is work already, otherwise *timeout_ms is the
   longest wait.                                                                               */
static gboolean push_source_prepare(GSource *source, gint *timeout_ms)
{
    const uint64_t deadline_ns = vkp_loop_get_deadline_ns(((push_source *)source)->loop);
    const uint64_t now_ns = vkp_now_ns();
    const uint64_t ms = deadline_ns > now_ns ? (deadline_ns - now_ns + 999999) / 1000000 : 0;
    *timeout_ms = deadline_ns == VKP_FOREVER ? -1 : ms > INT_MAX ? INT_MAX : (gint)ms;
    return *timeout_ms == 0;
}

/* GLib calls check after it waited: TRUE when the loop needs a round. */
static gboolean push_source_check(GSource *source)
{
    push_source *self = (push_source *)source;
    return g_source_query_unix_fd(source, self->descriptor) != 0 ||
           vkp_loop_get_deadline_ns(self->loop) <= vkp_now_ns();
}

static gboolean push_source_dispatch(GSource *source, GSourceFunc fn, gpointer user)
{
    (void)fn;
    (void)user;
    return vkp_loop_run_once(((push_source *)source)->loop, 0) == VKP_OK ? G_SOURCE_CONTINUE
                                                                         : G_SOURCE_REMOVE;
}

static GSource *push_source_new(vkp_loop *loop)
{
    static GSourceFuncs functions = {.prepare = push_source_prepare,
                                     .check = push_source_check,
                                     .dispatch = push_source_dispatch};
    GSource *source = g_source_new(&functions, sizeof(push_source));
    push_source *self = (push_source *)source;
    self->loop = loop;
    self->descriptor = g_source_add_unix_fd(source, vkp_loop_get_fd(loop), G_IO_IN);
    return source;
}

/* ---- the program ---- */

typedef struct program {
    GMainLoop *main_loop;
    unsigned long messages;
} program;

static void on_push(void *user, const vkp_push *push)
{
    program *self = (program *)user;
    printf("%s: %.*s\n", vkp_push_kind_str(push->kind), VKP_FMT(push->payload));
    fflush(stdout);
    self->messages += push->kind == VKP_PUSH_MESSAGE ? 1 : 0;
    if (push->kind == VKP_PUSH_MESSAGE && push->payload.len == 3 &&
        memcmp(push->payload.ptr, "bye", 3) == 0) {
        g_main_loop_quit(self->main_loop);
    }
}

static gboolean on_ten_seconds(gpointer user)
{
    printf("%lu messages so far\n", ((program *)user)->messages);
    fflush(stdout);
    return G_SOURCE_CONTINUE;
}

int main(int argc, char **argv)
{
    program self = {.main_loop = g_main_loop_new(NULL, FALSE)};
    vkp_loop *loop;
    vkp_client *client;
    vkp_loop_config on = {.backend = &BACKEND};
    vkp_client_config to = {.address = vkp_str_of(argc > 1 ? argv[1] : "tcp:127.0.0.1:6379"),
                            .on_push = on_push,
                            .user = &self};
    if (vkp_loop_open(&on, &loop) != VKP_OK || vkp_client_open(loop, &to, &client) != VKP_OK ||
        vkp_client_subscribe(client, VKP_SUB_CHANNEL, vkp_str_of("news")) != VKP_OK) {
        fprintf(stderr, "no client to %.*s\n", VKP_FMT(to.address));
        return 1;
    }
    GSource *source = push_source_new(loop);
    g_source_attach(source, NULL);
    guint timer = g_timeout_add_seconds(10, on_ten_seconds, &self);

    g_main_loop_run(self.main_loop);

    g_source_remove(timer);
    g_source_destroy(source);
    g_source_unref(source);
    vkp_client_close(client);
    vkp_client_unref(client);
    vkp_loop_unref(loop);
    g_main_loop_unref(self.main_loop);
    return 0;
}
