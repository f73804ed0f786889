/* <sys/event.h> for tests on Linux: as much of kqueue(2) as the backend and the tests of it use,
   with the numbers of FreeBSD and macOS. kqueue_emulation.c has the rest.
   SPDX-License-Identifier: MIT

   With VKP_KQUEUE_WITHOUT_USER it is the header of a system that has no EVFILT_USER.            */
#ifndef VKP_TEST_KQUEUE_SYS_EVENT_H
#define VKP_TEST_KQUEUE_SYS_EVENT_H

#include <stdint.h>

struct kevent {
    uintptr_t ident; /* the descriptor; of EVFILT_USER any number */
    short filter;
    unsigned short flags;
    unsigned int fflags;
    intptr_t data;
    void *udata;
};

#define EVFILT_READ (-1)
#define EVFILT_WRITE (-2)
#define EVFILT_VNODE (-4)
#ifndef VKP_KQUEUE_WITHOUT_USER
#define EVFILT_USER (-11)
#define NOTE_TRIGGER 0x01000000
#endif

/* what to do */
#define EV_ADD 0x0001
#define EV_DELETE 0x0002
#define EV_ENABLE 0x0004
#define EV_DISABLE 0x0008
/* how */
#define EV_ONESHOT 0x0010
#define EV_CLEAR 0x0020
#define EV_RECEIPT 0x0040
/* what came of it */
#define EV_ERROR 0x4000
#define EV_EOF 0x8000

#define EV_SET(event, identifier, which, how, filter_flags, filter_data, user_data) \
    do {                                                                            \
        struct kevent *ev_set_event = (event);                                      \
        ev_set_event->ident = (identifier);                                         \
        ev_set_event->filter = (which);                                             \
        ev_set_event->flags = (how);                                                \
        ev_set_event->fflags = (filter_flags);                                      \
        ev_set_event->data = (filter_data);                                         \
        ev_set_event->udata = (user_data);                                          \
    } while (0)

#endif /* VKP_TEST_KQUEUE_SYS_EVENT_H */
