// SPDX-License-Identifier: MIT
//
// The one-shot call by call, as its contracts have it, in the caller's memory and on the heap:
// every operation, its three ways of waiting (try, until a deadline, a loop's watch) on both
// sides. test_oneshot.cpp has its ends racing each other.
#include "support/catch.hpp"

#include <atomic>
#include <cerrno>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "support/channel_probe.h"
#include "support/client_probe.h"
#include "support/park_probe.h"
#include "support/support.h"

namespace {

// membarrier or not makes no difference to a slot, which has no gate. Spinning does.
const std::vector<uint32_t> all_spins = {0, VKP_SPINS_NONE};

vkp_env env_of(uint32_t spins)
{
    vkp_env env = VKP_ZERO;
    env.sys = vkp_test_probed_sys();
    env.spins = spins;
    return env;
}

std::vector<const vkp_backend *> backends()
{
    std::vector<const vkp_backend *> found;
    for (const vkp_backend *const *at = vkp_test_backends(); *at != nullptr; at++) {
        found.push_back(*at);
    }
    return found;
}

#define ON_EVERY_BACKEND                                           \
    const vkp_backend *backend = GENERATE(from_range(backends())); \
    INFO("backend " << backend->name)

struct Drops {
    std::atomic<uint64_t> count{0};
    std::atomic<uint64_t> last{0};
    static void drop(void *user, void *item)
    {
        Drops *self = static_cast<Drops *>(user);
        self->count.fetch_add(1, std::memory_order_relaxed);
        self->last.store(*static_cast<uint64_t *>(item), std::memory_order_relaxed);
    }
};

// A slot for a number, in this object or on the heap.
struct Slot {
    Drops drops;
    vkp_oneshot own;
    vkp_oneshot *slot = &own;
    Slot(bool heap, const vkp_env *env)
    {
        const vkp_status status = heap ? vkp_oneshot_open(env, 8, Drops::drop, &drops, &slot)
                                       : vkp_oneshot_init(&own, env, 8, Drops::drop, &drops);
        if (status != VKP_OK) {
            vkp_test_fail("no slot");
        }
    }
    ~Slot()
    {
        if (slot != &own) {
            vkp_oneshot_tx_unref(slot);
            vkp_oneshot_rx_unref(slot);
        }
    }
    Slot(const Slot &) = delete;
    Slot &operator=(const Slot &) = delete;
    vkp_status send(uint64_t value)
    {
        return vkp_oneshot_send(slot, &value);
    }
};

using Env = vkp_test_counted;

} // namespace

// ---------------------------------------------------------------------------------------------
// Each call

TEST_CASE("oneshot api: open refuses what makes no slot", "[oneshot]")
{
    Env counted;
    vkp_oneshot *slot = nullptr;
    const vkp_env *env = &counted.test.env;
    CHECK(vkp_oneshot_open(env, 8, nullptr, nullptr, nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_oneshot_open(env, 0, nullptr, nullptr, &slot) == VKP_ERR_INVALID);
    CHECK(vkp_oneshot_open(env, VKP_ONESHOT_BYTES + 1, nullptr, nullptr, &slot) == VKP_ERR_INVALID);
    CHECK(vkp_test_env_live_blocks(&counted.test) == 0);
    vkp_test_env_fault(&counted.test, VKP_TEST_FAULT_ONCE, 1);
    CHECK(vkp_oneshot_open(env, 8, nullptr, nullptr, &slot) == VKP_ERR_NOMEM);
    CHECK(slot == nullptr);
    vkp_test_env_fault(&counted.test, VKP_TEST_FAULT_NONE, 0);
    REQUIRE(vkp_oneshot_open(env, VKP_ONESHOT_BYTES, nullptr, nullptr, &slot) == VKP_OK);
    unsigned char in[VKP_ONESHOT_BYTES];
    unsigned char out[VKP_ONESHOT_BYTES] = {0};
    std::memset(in, 0x5a, sizeof in);
    CHECK(vkp_oneshot_send(slot, in) == VKP_OK);
    CHECK(vkp_oneshot_recv(slot, VKP_FOREVER, out) == VKP_OK);
    CHECK(std::memcmp(in, out, sizeof in) == 0);
    vkp_oneshot_tx_unref(slot);
    vkp_oneshot_rx_unref(slot);
}

TEST_CASE("oneshot api: one allocation for a slot of the heap, none for what happens to it",
          "[oneshot][memory]")
{
    Env counted;
    for (uint64_t i = 0; i < 100; i++) {
        const uint64_t before = vkp_test_env_calls(&counted.test);
        Slot s(true, &counted.test.env);
        uint64_t value = 0;
        CHECK(vkp_oneshot_try_recv(s.slot, &value) == VKP_ERR_EMPTY);
        CHECK(s.send(i) == VKP_OK);
        CHECK(vkp_oneshot_recv(s.slot, VKP_FOREVER, &value) == VKP_OK);
        CHECK(value == i);
        CHECK(vkp_test_env_calls(&counted.test) == before + 1);
        CHECK(vkp_test_env_live_blocks(&counted.test) == 1);
    }
    CHECK(vkp_test_env_live_blocks(&counted.test) == 0);
}

TEST_CASE("oneshot api: a slot of the heap goes with its second side, whichever that is",
          "[oneshot]")
{
    Env counted;
    vkp_oneshot *slot = nullptr;
    const bool sender_first = GENERATE(true, false);
    const bool finished = GENERATE(true, false);
    REQUIRE(vkp_oneshot_open(&counted.test.env, 8, nullptr, nullptr, &slot) == VKP_OK);
    uint64_t value = 7;
    if (sender_first) {
        if (finished) {
            CHECK(vkp_oneshot_send(slot, &value) == VKP_OK);
        }
        vkp_oneshot_tx_unref(slot);
        CHECK(vkp_test_env_live_blocks(&counted.test) == 1);
        CHECK(vkp_oneshot_try_recv(slot, &value) == (finished ? VKP_OK : VKP_ERR_CLOSED));
        vkp_oneshot_rx_unref(slot);
    } else {
        if (finished) {
            CHECK(vkp_oneshot_recv(slot, 0, &value) == VKP_ERR_TIMEOUT);
        }
        vkp_oneshot_rx_unref(slot);
        CHECK(vkp_test_env_live_blocks(&counted.test) == 1);
        CHECK(vkp_oneshot_is_closed(slot));
        CHECK(vkp_oneshot_send(slot, &value) == VKP_ERR_CLOSED);
        vkp_oneshot_tx_unref(slot);
    }
    CHECK(vkp_test_env_live_blocks(&counted.test) == 0);
}

TEST_CASE("oneshot api: null arguments of the further calls are INVALID", "[oneshot]")
{
    CHECK(vkp_oneshot_wait_closed(nullptr, 0) == VKP_ERR_INVALID);
    CHECK(vkp_oneshot_wait_closed(nullptr, VKP_FOREVER) == VKP_ERR_INVALID);
}

TEST_CASE("oneshot api: what is sent before the close of the sender's side is received",
          "[oneshot]")
{
    for (const bool heap : {false, true}) {
        for (const bool trying : {false, true}) {
            Env counted;
            Slot s(heap, &counted.test.env);
            uint64_t value = 0;
            CHECK(vkp_oneshot_try_recv(s.slot, &value) == VKP_ERR_EMPTY);
            CHECK_FALSE(vkp_oneshot_is_closed(s.slot));
            CHECK(s.send(5) == VKP_OK);
            CHECK((trying ? vkp_oneshot_try_recv(s.slot, &value)
                          : vkp_oneshot_recv(s.slot, 0, &value)) == VKP_OK);
            CHECK(value == 5);
            CHECK(s.drops.count.load() == 0);
        }
    }
}

TEST_CASE("oneshot api: a sender that gives up is CLOSED to the receiver", "[oneshot]")
{
    for (const bool heap : {false, true}) {
        for (const bool trying : {false, true}) {
            Env counted;
            Slot s(heap, &counted.test.env);
            uint64_t value = 3;
            vkp_oneshot_abandon(s.slot);
            CHECK((trying ? vkp_oneshot_try_recv(s.slot, &value)
                          : vkp_oneshot_recv(s.slot, VKP_FOREVER, &value)) == VKP_ERR_CLOSED);
            CHECK(value == 3);
            CHECK(s.drops.count.load() == 0);
        }
    }
}

TEST_CASE("oneshot api: a value for a receiver that has gone stays the sender's", "[oneshot]")
{
    for (const bool heap : {false, true}) {
        for (int ending = 0; ending < 2; ending++) { // close, a wait that ran out
            Env counted;
            Slot s(heap, &counted.test.env);
            uint64_t value = 0;
            if (ending == 0) {
                vkp_oneshot_close(s.slot);
            } else {
                CHECK(vkp_oneshot_recv(s.slot, 0, &value) == VKP_ERR_TIMEOUT);
            }
            CHECK(vkp_oneshot_is_closed(s.slot));
            CHECK(vkp_oneshot_wait_closed(s.slot, 0) == VKP_OK);
            CHECK(s.send(5) == VKP_ERR_CLOSED);
            CHECK(s.drops.count.load() == 0);
        }
        Env counted;
        Slot s(heap, &counted.test.env);
        vkp_oneshot_close(s.slot);
        vkp_oneshot_abandon(s.slot);
        CHECK(s.drops.count.load() == 0);
    }
}

TEST_CASE("oneshot api: a value that nobody receives is dropped by the receiver's close, once",
          "[oneshot]")
{
    for (const bool heap : {false, true}) {
        Env counted;
        Slot s(heap, &counted.test.env);
        CHECK(s.send(8) == VKP_OK);
        CHECK(s.drops.count.load() == 0);
        vkp_oneshot_close(s.slot);
        CHECK(s.drops.count.load() == 1);
        CHECK(s.drops.last.load() == 8);
    }
}

// ---------------------------------------------------------------------------------------------
// The three ways of waiting, on both sides

TEST_CASE("oneshot api: recv: a try, a deadline, a wait that either end of the sender ends",
          "[oneshot][threads]")
{
    const vkp_env env = env_of(GENERATE(from_range(all_spins)));
    for (const bool heap : {false, true}) {
        uint64_t value = 0;
        {
            Slot s(heap, &env);
            CHECK(vkp_oneshot_try_recv(s.slot, &value) == VKP_ERR_EMPTY);
            const uint64_t deadline = vkp_after_ms(2);
            CHECK(vkp_oneshot_recv(s.slot, deadline, &value) == VKP_ERR_TIMEOUT);
            CHECK(vkp_now_ns() >= deadline);
            CHECK(s.send(1) == VKP_ERR_CLOSED);
        }
        for (uint64_t i = 0; i < 20; i++) {
            Slot s(heap, &env);
            vkp_test_waiting receiver(
                [&] { return vkp_oneshot_recv(s.slot, VKP_FOREVER, &value); });
            if (i % 2 == 0) {
                REQUIRE(s.send(i) == VKP_OK);
                REQUIRE(receiver.join() == VKP_OK);
                REQUIRE(value == i);
            } else {
                vkp_oneshot_abandon(s.slot);
                REQUIRE(receiver.join() == VKP_ERR_CLOSED);
            }
            REQUIRE(s.drops.count.load() == 0);
        }
    }
}

TEST_CASE("oneshot api: wait_closed: a try, a deadline, a wait that the receiver's end ends",
          "[oneshot][threads]")
{
    const vkp_env env = env_of(GENERATE(from_range(all_spins)));
    for (const bool heap : {false, true}) {
        for (int ending = 0; ending < 2; ending++) { // close, a wait that ran out
            Slot s(heap, &env);
            uint64_t value = 0;
            CHECK(vkp_oneshot_wait_closed(s.slot, 0) == VKP_ERR_TIMEOUT);
            const uint64_t deadline = vkp_after_ms(2);
            CHECK(vkp_oneshot_wait_closed(s.slot, deadline) == VKP_ERR_TIMEOUT);
            CHECK(vkp_now_ns() >= deadline);
            CHECK_FALSE(vkp_oneshot_is_closed(s.slot));
            vkp_test_waiting sender([&] { return vkp_oneshot_wait_closed(s.slot, VKP_FOREVER); });
            if (ending == 0) {
                vkp_oneshot_close(s.slot);
            } else {
                CHECK(vkp_oneshot_recv(s.slot, vkp_after_ms(1), &value) == VKP_ERR_TIMEOUT);
            }
            CHECK(sender.join() == VKP_OK);
            CHECK(s.send(1) == VKP_ERR_CLOSED);
            CHECK(s.drops.count.load() == 0);
        }
    }
}

TEST_CASE("oneshot api: both sides wait: the receiver's deadline ends both", "[oneshot][threads]")
{
    const vkp_env env = env_of(VKP_SPINS_NONE);
    for (int round = 0; round < 20; round++) {
        Slot s(round % 2 != 0, &env);
        uint64_t value = 0;
        vkp_test_waiting sender([&] { return vkp_oneshot_wait_closed(s.slot, VKP_FOREVER); });
        CHECK(vkp_oneshot_recv(s.slot, vkp_now_ns() + 100000, &value) == VKP_ERR_TIMEOUT);
        CHECK(sender.join() == VKP_OK);
        vkp_oneshot_abandon(s.slot);
    }
}

TEST_CASE("oneshot api: after waiting for the close in vain the sender may still send", "[oneshot]")
{
    for (const bool heap : {false, true}) {
        Env counted;
        Slot s(heap, &counted.test.env);
        uint64_t value = 0;
        CHECK(vkp_oneshot_wait_closed(s.slot, vkp_now_ns() + 1000) == VKP_ERR_TIMEOUT);
        CHECK(vkp_oneshot_try_recv(s.slot, &value) == VKP_ERR_EMPTY);
        CHECK(s.send(4) == VKP_OK);
        CHECK(vkp_oneshot_recv(s.slot, VKP_FOREVER, &value) == VKP_OK);
        CHECK(value == 4);
    }
}

TEST_CASE("oneshot api: wait_closed after the sender's own end is INVALID, whatever its deadline",
          "[oneshot]")
{
    const vkp_env env = env_of(GENERATE(from_range(all_spins)));
    for (const bool heap : {false, true}) {
        for (const bool sends : {false, true}) {
            const vkp_test_watchdog watchdog;
            Slot s(heap, &env);
            uint64_t value = 0;
            size_t won = 9;
            if (sends) {
                REQUIRE(s.send(3) == VKP_OK);
            } else {
                vkp_oneshot_abandon(s.slot);
            }
            CHECK(vkp_oneshot_wait_closed(s.slot, 0) == VKP_ERR_INVALID);
            CHECK(vkp_oneshot_wait_closed(s.slot, 1) == VKP_ERR_INVALID); // long passed
            CHECK(vkp_oneshot_wait_closed(s.slot, VKP_FOREVER) == VKP_ERR_INVALID);
            vkp_case cases[] = {vkp_case_never(), vkp_case_oneshot_closed(s.slot)};
            CHECK(vkp_select(cases, 2, VKP_FOREVER, &won) == VKP_OK);
            CHECK(won == 1);
            CHECK(cases[1].status == VKP_ERR_INVALID);
            // The slot is whole; the receiver's end is a close as any other.
            CHECK(vkp_oneshot_try_recv(s.slot, &value) == (sends ? VKP_OK : VKP_ERR_CLOSED));
            CHECK(value == (sends ? 3 : 0));
            CHECK(vkp_oneshot_wait_closed(s.slot, VKP_FOREVER) == VKP_OK);
            CHECK(s.drops.count.load() == 0);
        }
    }
}

TEST_CASE("oneshot api: a second wait of the same side is INVALID, and the first one goes on",
          "[oneshot][threads]")
{
    const vkp_env env = env_of(GENERATE(from_range(all_spins)));
    for (const bool heap : {false, true}) {
        const vkp_test_watchdog watchdog;
        uint64_t value = 0;
        uint64_t second = 0;
        size_t won = 9;
        { // twice in one select, of either side
            Slot s(heap, &env);
            vkp_case receives[] = {vkp_case_oneshot_recv(s.slot, &value),
                                   vkp_case_oneshot_recv(s.slot, &second)};
            CHECK(vkp_select(receives, 2, 0, &won) == VKP_ERR_TIMEOUT); // nothing waits
            CHECK(vkp_select(receives, 2, VKP_FOREVER, &won) == VKP_OK);
            CHECK(won == 1);
            CHECK(receives[1].status == VKP_ERR_INVALID);
            vkp_case closes[] = {vkp_case_oneshot_closed(s.slot), vkp_case_oneshot_closed(s.slot)};
            CHECK(vkp_select(closes, 2, VKP_FOREVER, &won) == VKP_OK);
            CHECK(won == 1);
            CHECK(closes[1].status == VKP_ERR_INVALID);
            REQUIRE(s.send(1) == VKP_OK); // the slot is as it was
            CHECK(vkp_select(receives, 2, VKP_FOREVER, &won) == VKP_OK);
            CHECK(won == 0);
            CHECK(value == 1);
        }
        { // while another call waits
            Slot s(heap, &env);
            vkp_test_waiting receiver(
                [&] { return vkp_oneshot_recv(s.slot, VKP_FOREVER, &value); });
            vkp_test_waiting sender([&] { return vkp_oneshot_wait_closed(s.slot, VKP_FOREVER); });
            CHECK(vkp_oneshot_recv(s.slot, VKP_FOREVER, &second) == VKP_ERR_INVALID);
            CHECK(vkp_oneshot_wait_closed(s.slot, VKP_FOREVER) == VKP_ERR_INVALID);
            REQUIRE(s.send(2) == VKP_OK);
            CHECK(receiver.join() == VKP_OK);
            CHECK(value == 2);
            CHECK(second == 0);
            // The sender's own wait ends with its send: the receiver may have closed before.
            const vkp_status status = sender.join();
            CHECK((status == VKP_OK || status == VKP_ERR_INVALID));
        }
    }
}

TEST_CASE("oneshot api: an end by the side that waits ends its wait too", "[oneshot][loop]")
{
    ON_EVERY_BACKEND;
    const vkp_env env = env_of(0);
    for (const bool heap : {false, true}) {
        for (int end = 0; end < 4; end++) {
            INFO("heap " << heap << " end " << end);
            const vkp_test_watchdog watchdog;
            vkp_test_loop loop(backend);
            Slot s(heap, &env);
            uint64_t value = 0;
            const bool sends = end < 2;
            vkp_test_handler handler(loop,
                                     sends ? vkp_case_oneshot_closed(s.slot)
                                           : vkp_case_oneshot_recv(s.slot, nullptr),
                                     [] {});
            REQUIRE(handler.status == VKP_OK);
            switch (end) {
            case 0:
                CHECK(s.send(5) == VKP_OK);
                break;
            case 1:
                vkp_oneshot_abandon(s.slot);
                break;
            case 2:
                vkp_oneshot_close(s.slot);
                break;
            default:
                CHECK(vkp_oneshot_recv(s.slot, 0, &value) == VKP_ERR_TIMEOUT);
                break;
            }
            vkp_test_settle(loop);
            CHECK((handler.calls > 0) == !sends); // a sender is called for a close, not for itself
            vkp_oneshot_close(s.slot);
            vkp_test_settle(loop);
            handler.stop();
            CHECK(s.drops.count.load() == (end == 0 ? 1 : 0));
        }
    }
}

TEST_CASE("oneshot api: a receiver's watch is called for the value and for the end, not before",
          "[oneshot][loop]")
{
    ON_EVERY_BACKEND;
    const vkp_env env = env_of(0);
    for (const bool heap : {false, true}) {
        for (int ending = 0; ending < 3; ending++) { // send, abandon, sent before the watch
            INFO("heap " << heap << " ending " << ending);
            vkp_test_loop loop(backend);
            Slot s(heap, &env);
            uint64_t value = 0;
            vkp_status status = VKP_ERR_EMPTY;
            if (ending == 2) {
                REQUIRE(s.send(6) == VKP_OK);
            }
            std::unique_ptr<vkp_test_handler> watch;
            watch = std::make_unique<vkp_test_handler>(
                loop, vkp_case_oneshot_recv(s.slot, nullptr), [&] {
                    watch->stop(); // before the slot may go
                    status = vkp_oneshot_try_recv(s.slot, &value);
                });
            REQUIRE(watch->status == VKP_OK);
            std::thread sender;
            if (ending < 2) {
                vkp_test_settle(loop);
                CHECK(watch->calls == 0);
                sender = std::thread([&] {
                    if (ending == 0) {
                        if (s.send(6) != VKP_OK) {
                            vkp_test_fail("a value was refused");
                        }
                    } else {
                        vkp_oneshot_abandon(s.slot);
                    }
                });
            }
            vkp_test_run_until(loop, "the slot's end", [&] { return status != VKP_ERR_EMPTY; });
            if (sender.joinable()) {
                sender.join();
            }
            CHECK(status == (ending == 1 ? VKP_ERR_CLOSED : VKP_OK));
            CHECK(value == (ending == 1 ? 0 : 6));
            vkp_test_settle(loop);
            CHECK(watch->calls == 1);
        }
    }
}

TEST_CASE("oneshot api: a receiver's watch that ends leaves the slot open", "[oneshot][loop]")
{
    ON_EVERY_BACKEND;
    Env counted;
    vkp_test_loop loop(backend);
    Slot s(true, &counted.test.env);
    uint64_t value = 0;
    {
        vkp_test_handler watch(loop, vkp_case_oneshot_recv(s.slot, nullptr), [] {});
        REQUIRE(watch.status == VKP_OK);
        vkp_test_settle(loop);
        CHECK(watch.calls == 0);
    }
    CHECK_FALSE(vkp_oneshot_is_closed(s.slot));
    {
        vkp_test_handler watch(loop, vkp_case_oneshot_recv(s.slot, nullptr), [] {});
        CHECK(s.send(9) == VKP_OK);
        watch.stop(); // the wake is under way
        vkp_test_settle(loop);
        CHECK(watch.calls == 0);
    }
    CHECK(vkp_oneshot_recv(s.slot, 0, &value) == VKP_OK);
    CHECK(value == 9);
}

TEST_CASE("oneshot api: a sender's watch is called when the receiver has closed, not before",
          "[oneshot][loop]")
{
    ON_EVERY_BACKEND;
    const vkp_env env = env_of(0);
    for (const bool heap : {false, true}) {
        vkp_test_loop loop(backend);
        Slot s(heap, &env);
        std::unique_ptr<vkp_test_handler> watch;
        bool closed = false;
        watch = std::make_unique<vkp_test_handler>(loop, vkp_case_oneshot_closed(s.slot), [&] {
            watch->stop();
            closed = vkp_oneshot_is_closed(s.slot);
            vkp_oneshot_abandon(s.slot);
        });
        REQUIRE(watch->status == VKP_OK);
        vkp_test_settle(loop);
        CHECK(watch->calls == 0);
        std::thread receiver([&] { vkp_oneshot_close(s.slot); });
        vkp_test_run_until(loop, "the close", [&] { return watch->calls > 0; });
        receiver.join();
        CHECK(closed);
        vkp_test_settle(loop);
        CHECK(watch->calls == 1);
    }
    // A sender that answers ends its watch first.
    vkp_test_loop loop(backend);
    Slot s(false, &env);
    uint64_t value = 0;
    vkp_test_handler watch(loop, vkp_case_oneshot_closed(s.slot), [] {});
    vkp_test_settle(loop);
    watch.stop();
    CHECK(s.send(2) == VKP_OK);
    vkp_test_settle(loop);
    CHECK(vkp_oneshot_recv(&s.own, 0, &value) == VKP_OK);
    CHECK(watch.calls == 0);
}

TEST_CASE("oneshot api: a watch that finds no memory leaves the slot as it was", "[oneshot][loop]")
{
    ON_EVERY_BACKEND;
    vkp_test_loop loop(backend);
    Slot s(false, nullptr);
    uint64_t value = 0;
    vkp_test_env_fault(&loop.test, VKP_TEST_FAULT_FROM, 1);
    {
        vkp_test_handler watch(loop, vkp_case_oneshot_recv(s.slot, &value), [] {});
        CHECK(watch.status == VKP_ERR_NOMEM);
    }
    vkp_test_env_fault(&loop.test, VKP_TEST_FAULT_NONE, 0);
    vkp_test_handler nothing(loop, vkp_case_oneshot_recv(nullptr, &value), [] {});
    CHECK(nothing.status == VKP_OK);
    CHECK(s.send(1) == VKP_OK);
    vkp_test_settle(loop);
    CHECK(nothing.calls == 0);
    CHECK(vkp_oneshot_recv(s.slot, 0, &value) == VKP_OK);
}

// ---------------------------------------------------------------------------------------------
// What it costs, and both sides at once

namespace {

// Counts what a slot asks of the system; what no slot needs is not there to be called.
struct Calls {
    std::atomic<uint64_t> parks{0};
    std::atomic<uint64_t> unparks{0};
    std::atomic<uint64_t> others{0};
} calls;

const vkp_sys *counting_sys()
{
    static const vkp_sys table = [] {
        vkp_sys counting = {};
        counting.park = [](vkp_parker *parker, uint64_t deadline_ns) {
            calls.parks.fetch_add(1);
            vkp_test_probed_sys()->park(parker, deadline_ns);
        };
        counting.unpark = [](vkp_parker *parker) {
            calls.unparks.fetch_add(1);
            vkp_sys_get_default()->unpark(parker);
        };
        counting.yield = [] {
            calls.others.fetch_add(1);
            vkp_sys_get_default()->yield();
        };
        counting.processors = [] {
            calls.others.fetch_add(1);
            return uint32_t{2};
        };
        counting.clock_ns = [] {
            calls.others.fetch_add(1);
            return vkp_sys_get_default()->clock_ns();
        };
        return counting;
    }();
    return &table;
}

} // namespace

TEST_CASE("oneshot api: the system is called by who sleeps, once, and to wake it, once",
          "[oneshot][system][threads]")
{
    vkp_env env = VKP_ZERO;
    env.sys = counting_sys();
    env.spins = GENERATE(from_range(all_spins));
    for (const bool heap : {false, true}) {
        uint64_t value = 0;
        for (uint64_t i = 0; i < 1000; i++) {
            const uint64_t before = calls.parks + calls.unparks + calls.others;
            Slot s(heap, &env);
            REQUIRE(vkp_oneshot_try_recv(s.slot, &value) == VKP_ERR_EMPTY);
            REQUIRE(s.send(i) == VKP_OK);
            REQUIRE(vkp_oneshot_recv(s.slot, VKP_FOREVER, &value) == VKP_OK);
            REQUIRE(calls.parks + calls.unparks + calls.others == before);
        }
        const uint64_t parks = calls.parks.load();
        const uint64_t unparks = calls.unparks.load();
        Slot s(heap, &env);
        vkp_test_waiting receiver([&] { return vkp_oneshot_recv(s.slot, VKP_FOREVER, &value); });
        const uint64_t asleep = calls.parks + calls.unparks + calls.others;
        for (int lap = 0; lap < 100; lap++) {
            sched_yield();
        }
        CHECK(calls.parks + calls.unparks + calls.others == asleep);
        REQUIRE(s.send(3) == VKP_OK);
        CHECK(receiver.join() == VKP_OK);
        CHECK(calls.parks.load() - parks >= 1); // the system may end a sleep for no reason
        CHECK(calls.unparks.load() - unparks == 1);
    }
}

TEST_CASE("oneshot api: threads: all ends of a heap slot race: one fate for the value, none leaked",
          "[oneshot][threads]")
{
    const vkp_env env = env_of(GENERATE(from_range(all_spins)));
    // Slots of the library's default allocator: leaks and late uses are the sanitizers' to find.
    struct Round {
        vkp_oneshot *slot = nullptr;
        Drops drops;
        vkp_status sent = VKP_ERR_INVALID;
        vkp_status received = VKP_ERR_INVALID;
    };
    const size_t count = 3000;
    std::vector<Round> rounds(count);
    for (Round &round : rounds) {
        REQUIRE(vkp_oneshot_open(&env, 8, Drops::drop, &round.drops, &round.slot) == VKP_OK);
    }
    std::atomic<size_t> turn{0};
    const auto meet = [&](size_t i) { // each side comes to round i with the other
        turn.fetch_add(1);
        while (turn.load() < 2 * (i + 1)) {
            sched_yield();
        }
    };
    std::thread sender([&] {
        for (size_t i = 0; i < count; i++) {
            Round &round = rounds[i];
            const uint64_t value = i;
            meet(i);
            for (volatile size_t wait = 0; wait < i * 7 % 150; wait = wait + 1) {
            }
            switch (i % 4) {
            case 0:
                vkp_oneshot_abandon(round.slot);
                round.sent = VKP_ERR_CLOSED;
                break;
            case 1:
                round.sent = VKP_ERR_TIMEOUT;
                if (vkp_oneshot_wait_closed(round.slot, vkp_now_ns() + i % 5 * 5000) == VKP_OK) {
                    round.sent =
                        vkp_oneshot_is_closed(round.slot) ? VKP_ERR_CLOSED : VKP_ERR_INVALID;
                }
                if (round.sent == VKP_ERR_TIMEOUT) {
                    round.sent = vkp_oneshot_send(round.slot, &value);
                } else {
                    vkp_oneshot_abandon(round.slot);
                }
                break;
            default:
                round.sent = vkp_oneshot_send(round.slot, &value);
                break;
            }
            vkp_oneshot_tx_unref(round.slot);
        }
    });
    size_t wrong = 0;
    for (size_t i = 0; i < count; i++) {
        Round &round = rounds[i];
        uint64_t value = UINT64_MAX;
        meet(i);
        for (volatile size_t wait = 0; wait < i * 11 % 150; wait = wait + 1) {
        }
        switch (i / 4 % 4) {
        case 0:
            round.received = vkp_oneshot_recv(round.slot, VKP_FOREVER, &value);
            break;
        case 1:
            round.received = vkp_oneshot_recv(round.slot, vkp_now_ns() + i % 5 * 5000, &value);
            break;
        case 2:
            round.received = vkp_oneshot_try_recv(round.slot, &value);
            if (round.received == VKP_ERR_EMPTY) {
                vkp_oneshot_close(round.slot);
            }
            break;
        default:
            vkp_oneshot_close(round.slot);
            break;
        }
        wrong += round.received == VKP_OK ? value != i : value != UINT64_MAX;
        vkp_oneshot_rx_unref(round.slot);
    }
    sender.join();
    for (const Round &round : rounds) {
        const uint64_t dropped = round.drops.count.load();
        const uint64_t taken = round.received == VKP_OK ? 1 : 0;
        wrong += (round.sent == VKP_OK ? 1u : 0u) != taken + dropped ? 1 : 0;
        wrong += round.sent != VKP_OK && round.sent != VKP_ERR_CLOSED ? 1 : 0;
    }
    CHECK(wrong == 0);
}
