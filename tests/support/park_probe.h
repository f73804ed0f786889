/* Tables of operating system calls that tell a test when a thread waits, or that keep a clock of
   their own: with them a test needs neither sleeps nor luck to meet a waiting thread.
   SPDX-License-Identifier: MIT                                                                  */
#ifndef VKP_TEST_PARK_PROBE_H
#define VKP_TEST_PARK_PROBE_H

#include "support/support.h"

#include <atomic>
#include <sched.h>

/* Counts the parks of the thread that set it; a waiter is queued before its thread parks, so one
   park means that others can see the wait.                                                      */
inline thread_local std::atomic<unsigned> *vkp_test_parks = nullptr;

inline const vkp_sys *vkp_test_probed_sys()
{
    static const vkp_sys table = [] {
        vkp_sys copy = *vkp_sys_get_default();
        copy.park = [](vkp_parker *parker, uint64_t deadline_ns) {
            if (vkp_test_parks != nullptr) {
                vkp_test_parks->fetch_add(1);
            }
            vkp_sys_get_default()->park(parker, deadline_ns);
        };
        return copy;
    }();
    return &table;
}

inline void vkp_test_await_park(const std::atomic<unsigned> &parks)
{
    const uint64_t deadline = vkp_test_deadline();
    while (parks.load() == 0) {
        if (vkp_now_ns() > deadline) {
            vkp_test_fail("a thread that should wait never parked");
        }
        sched_yield();
    }
}

/* A clock that stands still until a park, which moves it to the park's deadline: a wait of an hour
   is over at once. For tests of one thread; a park without a deadline would never end.          */
inline std::atomic<uint64_t> vkp_test_virtual_ns{1};

inline const vkp_sys *vkp_test_virtual_sys()
{
    static const vkp_sys table = [] {
        vkp_sys copy = *vkp_sys_get_default();
        copy.clock_ns = [] { return vkp_test_virtual_ns.load(); };
        copy.park = [](vkp_parker *, uint64_t deadline_ns) {
            if (deadline_ns == VKP_FOREVER) {
                vkp_test_fail("a wait without end and nobody to end it");
            }
            if (deadline_ns > vkp_test_virtual_ns.load()) {
                vkp_test_virtual_ns.store(deadline_ns);
            }
        };
        return copy;
    }();
    return &table;
}

#endif /* VKP_TEST_PARK_PROBE_H */
