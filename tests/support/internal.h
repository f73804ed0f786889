/* What the files of tests/support share among themselves.
   SPDX-License-Identifier: MIT */
#ifndef VKP_TEST_INTERNAL_H
#define VKP_TEST_INTERNAL_H

#include "support.h"

/* SIGKILL to every child that vkp_test_spawn started and nobody reaped. */
void vkp_test_i_kill_children(void);

/* True when fd is ready for `events`, hung up included; false at the deadline. fd -1 only waits. */
int vkp_test_i_poll(int fd, short events, uint64_t deadline_ns);

/* realloc and a formatted text that abort instead of failing. */
void *vkp_test_i_alloc(void *old, size_t bytes);
char *vkp_test_i_format(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Close-on-exec, and no SIGPIPE where that is a property of the socket. */
void vkp_test_i_prepare_fd(int fd);

/* vkp_test_spawn with both outputs going to a file (NULL: as vkp_test_spawn). */
int vkp_test_i_spawn(const char *const *argv, int *out_fd, const char *log_path);

#endif /* VKP_TEST_INTERNAL_H */
