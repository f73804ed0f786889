/* The loops of other libraries, as their programs use them, behind one table; and a guest in such a
   loop as a backend that waits, so that what is asked of every backend is asked of guests.
   SPDX-License-Identifier: MIT

   A program is linked with one of foreign_*.c at most: libev and libevent export the same names.
   Where it is, adapter.c takes the place of backends.c.                                         */
#ifndef VKP_TEST_FOREIGN_H
#define VKP_TEST_FOREIGN_H

#include "support.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct vkp_test_foreign {
    const vkp_backend *guest;
    /* What the library does when a descriptor is closed under its watch; see the guest's file. */
    bool dies_of_closed;  /* it ends the process */
    bool spins_on_closed; /* it goes on reporting the file that lives in a duplicate */
    bool is_recursive;    /* its loop may be run by a callback */
    bool shares_numbers;  /* a descriptor may be watched by several */

    void *(*open)(void);       /* aborts when it fails, as all below */
    void (*close)(void *loop); /* aborts when something is left in it */
    /* One iteration. wait: something must happen, and that nothing keeps the loop alive is no
       reason to return.                                                                        */
    void (*step)(void *loop, bool wait);
    void (*run)(void *loop);  /* until nothing keeps it alive, or stop */
    void (*stop)(void *loop); /* in a callback: run returns after this iteration */
    void (*after_fork)(void *loop);

    /* What the program has in it beside ours: a timer that goes off once, and a descriptor that is
       readable. Both are there until their end; neither end is for a callback of its own.      */
    void *(*timer_start)(void *loop, uint64_t after_ms, void (*fn)(void *user), void *user);
    void (*timer_end)(void *timer);
    void *(*watch_start)(void *loop, int fd, void (*fn)(void *user), void *user);
    void (*watch_end)(void *watch);
} vkp_test_foreign;

/* Of the library that this program is linked with; NULL in most programs. */
const vkp_test_foreign *vkp_test_foreign_loop(void);

#ifdef __cplusplus
}
#endif

#endif /* VKP_TEST_FOREIGN_H */
