/* The backends of this platform; see support.h. A file of its own: tests that take no backend link
   without one.
   SPDX-License-Identifier: MIT */
#include "foreign/foreign.h"
#ifdef __linux__
#include "kqueue_emulation.h"
#endif

static const vkp_backend *const backends[] = {
    &vkp_backend_poll,
#ifdef __linux__
    &vkp_backend_epoll,
#else
    &vkp_backend_kqueue,
#endif
    NULL,
};

static const vkp_backend *const backends_all[] = {
    &vkp_backend_poll,
#ifdef __linux__
    &vkp_backend_epoll,
    &vkp_test_kqueue,
    &vkp_test_kqueue_no_user,
#else
    &vkp_backend_kqueue,
#endif
    &vkp_backend_null,
    NULL,
};

const vkp_backend *const *vkp_test_backends(void)
{
    return backends;
}

const vkp_backend *const *vkp_test_backends_all(void)
{
    return backends_all;
}

const vkp_test_foreign *vkp_test_foreign_loop(void)
{
    return NULL;
}
