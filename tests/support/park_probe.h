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

/* A thread that sets this stays in its park until the flag is set, and then finds that a year has
   passed, by its own clock: its deadline passes when the test says so.                          */
inline thread_local const std::atomic<bool> *vkp_test_deadline_passes = nullptr;
inline thread_local uint64_t vkp_test_clock_ahead_ns = 0;

inline const vkp_sys *vkp_test_probed_sys()
{
    static const vkp_sys table = [] {
        vkp_sys copy = *vkp_sys_get_default();
        copy.clock_ns = [] { return vkp_sys_get_default()->clock_ns() + vkp_test_clock_ahead_ns; };
        copy.park = [](vkp_parker *parker, uint64_t deadline_ns) {
            if (vkp_test_parks != nullptr) {
                vkp_test_parks->fetch_add(1);
            }
            if (vkp_test_deadline_passes != nullptr) {
                while (!vkp_test_deadline_passes->load()) {
                    sched_yield();
                }
                vkp_test_clock_ahead_ns = UINT64_C(365) * 24 * 3600 * 1000000000;
                return;
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
