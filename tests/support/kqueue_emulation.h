/* kqueue(2) for tests on Linux, over epoll(7): written from the manual pages of FreeBSD and macOS,
   so that the kqueue backend runs the suites on the machine at hand. tests/test_kqueue.cpp asks
   the same questions of this and of a real kqueue.
   SPDX-License-Identifier: MIT

   As there: EVFILT_READ and EVFILT_WRITE of a descriptor are registered and reported apart, what
   stays ready goes to the end of the queue, EV_EOF comes with the data that is left, EV_CLEAR and
   EV_ONESHOT, EVFILT_USER from any thread and from signal handlers, changes with EV_RECEIPT and
   with errors; a descriptor that is closed, also by dup2, loses its registrations; a forked child
   has no queue, and the queue's number is free.
   On purpose: all that can be read comes before what can be written, so that the two events of a
   descriptor never stand side by side.
   Not as there: EV_EOF has no socket's error in fflags but ECONNRESET for any, since Linux shows
   it only to whoever takes it. EV_CLEAR looks at the amount, so that as much read as came in
   between is no news. A regular file that grows ends no wait. A queue costs two descriptors.    */
#ifndef VKP_TEST_KQUEUE_EMULATION_H
#define VKP_TEST_KQUEUE_EMULATION_H

#include "valkey_push.h"

#ifdef __cplusplus
extern "C" {
#endif

/* As the members of vkp_sys: a result of 0 or more, or a negated errno; errno itself is left alone.
   Changes and events are struct kevent of kqueue/sys/event.h.                                   */
int vkp_test_kqueue_create(void);
int vkp_test_kevent(int kq, const void *changes, int change_count, void *events, int event_count,
                    uint64_t deadline_ns);

/* The kqueue backend over it, as it is where there is EVFILT_USER and where there is not. */
extern const vkp_backend vkp_test_kqueue;
extern const vkp_backend vkp_test_kqueue_no_user;

#ifdef __cplusplus
}
#endif

#endif /* VKP_TEST_KQUEUE_EMULATION_H */
