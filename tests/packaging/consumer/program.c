/* A program from outside the tree, in C: a loop over each backend of this system carries out one
   call. Whether it is linked with the library or holds the implementation is not its business.
   SPDX-License-Identifier: MIT */
#include <valkey_push.h>

#include <stdio.h>
#include <string.h>

static void stop(void *loop)
{
    vkp_loop_stop((vkp_loop *)loop);
}

static vkp_status run_loop(const vkp_backend *backend)
{
    vkp_loop_config config = VKP_ZERO;
    vkp_loop *loop;
    vkp_status status;
    config.backend = backend;
    status = vkp_loop_open(&config, &loop);
    if (status != VKP_OK) {
        return status;
    }
    status = vkp_loop_post(loop, stop, loop);
    if (status == VKP_OK) {
        status = vkp_loop_run(loop);
    }
    vkp_loop_unref(loop);
    return status;
}

int main(void)
{
    static const vkp_backend *const backends[] = {
        &vkp_backend_poll,
#ifdef __linux__
        &vkp_backend_epoll,
#endif
    };
    size_t i;
    for (i = 0; i < sizeof backends / sizeof *backends; i++) {
        vkp_status status = run_loop(backends[i]);
        printf("%s: %s\n", backends[i]->name, vkp_status_str(status));
        if (status != VKP_OK) {
            return 1;
        }
    }
    return strcmp(vkp_version_str(), VKP_VERSION_STR) != 0;
}
