/* The backends of this platform; see support.h. A file of its own: tests that take no backend link
   without one.
   SPDX-License-Identifier: MIT */
#include "support.h"

static const vkp_backend *const backends[] = {
    &vkp_backend_poll,
#ifdef __linux__
    &vkp_backend_epoll,
#endif
    NULL,
};

static const vkp_backend *const backends_all[] = {
    &vkp_backend_poll,
#ifdef __linux__
    &vkp_backend_epoll,
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
