// SPDX-License-Identifier: MIT
//
// Broadcast: every receiver sees every value, or is told exactly how many it did not. Tests of one
// thread fix every answer, against a model where that helps. The threaded ones use that lag is
// counted exactly: what a receiver got and missed before a value is that value's place in the one
// order of all, so what two receivers found in one place must be the same.
#include "support/catch.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "support/channel_probe.h"
#include "support/support.h"

namespace {

vkp_broadcast_config config_of(size_t elem_bytes, size_t capacity_items, const vkp_env *env)
{
    vkp_broadcast_config config = VKP_ZERO;
    config.elem_bytes = elem_bytes;
    config.capacity_items = capacity_items;
    config.env = env;
    return config;
}

vkp_broadcast_config owning(size_t elem_bytes, size_t capacity_items, const vkp_env *env,
                            vkp_test_ledger *ledger)
{
    vkp_broadcast_config config = config_of(elem_bytes, capacity_items, env);
    config.retain = vkp_test_ledger::retain;
    config.drop = vkp_test_ledger::drop;
    config.user = ledger;
    return config;
}

// One reference to a sender.
struct Sender {
    vkp_broadcast_tx *tx = nullptr;
    vkp_status status;
    explicit Sender(const vkp_broadcast_config &config) : status(vkp_broadcast_open(&config, &tx))
    {
    }
    ~Sender()
    {
        vkp_broadcast_tx_unref(tx);
    }
    Sender(const Sender &) = delete;
    Sender &operator=(const Sender &) = delete;
    void end()
    {
        vkp_broadcast_tx_unref(tx);
        tx = nullptr;
    }
    vkp_status send(uint64_t value)
    {
        return vkp_broadcast_send(tx, &value);
    }
};

struct Receiver {
    vkp_broadcast_rx *rx = nullptr;
    explicit Receiver(const Sender &sender)
    {
        if (vkp_broadcast_subscribe(sender.tx, &rx) != VKP_OK) {
            vkp_test_fail("a receiver was refused");
        }
    }
    explicit Receiver(const Receiver &other)
    {
        if (vkp_broadcast_resubscribe(other.rx, &rx) != VKP_OK) {
            vkp_test_fail("a receiver beside another was refused");
        }
    }
    ~Receiver()
    {
        vkp_broadcast_rx_unref(rx);
    }
    Receiver &operator=(const Receiver &) = delete;
    void end()
    {
        vkp_broadcast_rx_unref(rx);
        rx = nullptr;
    }
    vkp_status recv(uint64_t deadline_ns = 0)
    {
        return vkp_broadcast_recv(rx, deadline_ns, &value);
    }
    vkp_status try_recv()
    {
        return vkp_broadcast_try_recv(rx, &value);
    }
    uint64_t missed() const
    {
        return vkp_broadcast_get_missed(rx);
    }
    uint64_t len() const
    {
        return vkp_broadcast_get_len(rx);
    }
    uint64_t value = 0;
};

const uint64_t nothing = UINT64_MAX;

// What a receiver saw, by place.
struct Seen {
    explicit Seen(size_t total) : at(total, nothing)
    {
    }
    std::vector<uint64_t> at;
    uint64_t got = 0;
    uint64_t missed = 0;
    uint64_t strange = 0;
    void take(uint64_t value)
    {
        if (got + missed < at.size()) {
            at[static_cast<size_t>(got + missed)] = value;
        } else {
            strange++;
        }
        got++;
    }
    void lag(uint64_t count)
    {
        strange += count == 0;
        missed += count;
    }
};

// Takes everything until the senders have gone, in one of three ways.
void drain(vkp_broadcast_rx *rx, int how, vkp_test_ledger *ledger, Seen *seen)
{
    const uint64_t deadline = vkp_test_deadline();
    uint64_t values[5];
    for (;;) {
        size_t count = 1;
        vkp_status status = how == 0   ? vkp_broadcast_recv(rx, deadline, values)
                            : how == 1 ? vkp_broadcast_try_recv(rx, values)
                                       : vkp_broadcast_recv_many(rx, deadline, values, 5, &count);
        if (status == VKP_OK) {
            for (size_t i = 0; i < count; i++) {
                seen->take(values[i]);
                if (ledger != nullptr) {
                    vkp_test_ledger::drop(ledger, &values[i]);
                }
            }
        } else if (status == VKP_ERR_LAGGED) {
            seen->lag(vkp_broadcast_get_missed(rx));
        } else if (status == VKP_ERR_EMPTY && vkp_now_ns() < deadline) {
            sched_yield();
        } else {
            seen->strange += status != VKP_ERR_CLOSED;
            return;
        }
    }
}

// How many places two receivers disagree about, and how many are against a sender's own order.
size_t disagreements(const std::vector<Seen> &all, size_t total, size_t senders, size_t each)
{
    size_t wrong = 0;
    std::vector<uint64_t> last(senders, 0);
    for (size_t place = 0; place < total; place++) {
        uint64_t agreed = nothing;
        for (const Seen &seen : all) {
            const uint64_t value = seen.at[place];
            wrong += value != nothing && agreed != nothing && value != agreed;
            agreed = value != nothing ? value : agreed;
        }
        if (agreed != nothing) {
            const size_t sender = static_cast<size_t>(agreed) / each;
            wrong += sender >= senders || agreed % each + 1 <= last[sender];
            if (sender < senders) {
                last[sender] = agreed % each + 1;
            }
        }
    }
    return wrong;
}

} // namespace

TEST_CASE("broadcast: open refuses what makes no channel", "[broadcast]")
{
    vkp_broadcast_tx *tx = nullptr;
    const vkp_broadcast_config good = config_of(8, 4, nullptr);
    const vkp_broadcast_config no_elem = config_of(0, 4, nullptr);
    const vkp_broadcast_config large = config_of(64 * 1024 + 1, 4, nullptr);
    const vkp_broadcast_config no_capacity = config_of(8, 0, nullptr);
    vkp_test_ledger ledger(1);
    vkp_broadcast_config only_retain = owning(8, 4, nullptr, &ledger);
    vkp_broadcast_config only_drop = only_retain;
    only_retain.drop = nullptr;
    only_drop.retain = nullptr;
    CHECK(vkp_broadcast_open(nullptr, &tx) == VKP_ERR_INVALID);
    CHECK(vkp_broadcast_open(&good, nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_broadcast_open(&no_elem, &tx) == VKP_ERR_INVALID);
    CHECK(vkp_broadcast_open(&large, &tx) == VKP_ERR_INVALID);
    CHECK(vkp_broadcast_open(&no_capacity, &tx) == VKP_ERR_INVALID);
    CHECK(vkp_broadcast_open(&only_retain, &tx) == VKP_ERR_INVALID);
    CHECK(vkp_broadcast_open(&only_drop, &tx) == VKP_ERR_INVALID);
    CHECK(tx == nullptr);
}

TEST_CASE("broadcast: a capacity beyond all memory is refused, not wrapped around", "[broadcast]")
{
    // All of these overflow or round up beyond what a size holds, or are more than there can be.
    for (size_t capacity :
         {SIZE_MAX, SIZE_MAX / 2 + 2, SIZE_MAX / 2 + 1, SIZE_MAX / 8, SIZE_MAX / 65536 + 1}) {
        for (size_t elem_bytes : {size_t{1}, size_t{8}, size_t{65536}}) {
            INFO("capacity " << capacity << " of " << elem_bytes);
            if (capacity <= (size_t{1} << 30) / elem_bytes) {
                continue; // with sizes of 32 bits there is memory for the least of them
            }
            vkp_env env = VKP_ZERO;
            // Stands for a machine without that much, whatever a sanitizer makes of such a size.
            env.alloc = [](void *, void *ptr, size_t, size_t bytes) -> void * {
                if (bytes == 0) {
                    std::free(ptr);
                    return nullptr;
                }
                return bytes > size_t{1} << 30 ? nullptr : std::realloc(ptr, bytes);
            };
            Sender sender(config_of(elem_bytes, capacity, &env));
            const bool refused = sender.status == VKP_ERR_NOMEM || sender.status == VKP_ERR_INVALID;
            CHECK(refused);
            CHECK(sender.tx == nullptr);
        }
    }
}

TEST_CASE("broadcast: null arguments are INVALID, null handles are ignored by unref", "[broadcast]")
{
    Sender sender(config_of(8, 4, nullptr));
    REQUIRE(sender.status == VKP_OK);
    Receiver receiver(sender);
    vkp_broadcast_rx *rx = nullptr;
    uint64_t value = 5;
    size_t count = 99;
    CHECK(vkp_broadcast_subscribe(nullptr, &rx) == VKP_ERR_INVALID);
    CHECK(vkp_broadcast_subscribe(sender.tx, nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_broadcast_resubscribe(nullptr, &rx) == VKP_ERR_INVALID);
    CHECK(vkp_broadcast_resubscribe(receiver.rx, nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_broadcast_send(nullptr, &value) == VKP_ERR_INVALID);
    CHECK(vkp_broadcast_send(sender.tx, nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_broadcast_recv(nullptr, 0, &value) == VKP_ERR_INVALID);
    CHECK(vkp_broadcast_recv(receiver.rx, 0, nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_broadcast_try_recv(nullptr, &value) == VKP_ERR_INVALID);
    CHECK(vkp_broadcast_try_recv(receiver.rx, nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_broadcast_recv_many(nullptr, 0, &value, 1, &count) == VKP_ERR_INVALID);
    CHECK(vkp_broadcast_recv_many(receiver.rx, 0, nullptr, 1, &count) == VKP_ERR_INVALID);
    CHECK(vkp_broadcast_recv_many(receiver.rx, 0, &value, 0, &count) == VKP_ERR_INVALID);
    CHECK(vkp_broadcast_recv_many(receiver.rx, 0, &value, 1, nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_broadcast_wait_closed(nullptr, 0) == VKP_ERR_INVALID);
    vkp_broadcast_tx_unref(nullptr);
    vkp_broadcast_rx_unref(nullptr);
    CHECK(rx == nullptr);
    CHECK(value == 5);
    CHECK(count == 99);
    CHECK(vkp_broadcast_get_receivers(sender.tx) == 1);
}

TEST_CASE("broadcast: every receiver gets every value, in the order sent", "[broadcast]")
{
    Sender sender(config_of(8, 8, nullptr));
    Receiver first(sender);
    Receiver second(sender);
    for (uint64_t value = 0; value < 8; value++) {
        REQUIRE(sender.send(value) == VKP_OK);
    }
    for (uint64_t value = 0; value < 8; value++) {
        REQUIRE(first.try_recv() == VKP_OK);
        CHECK(first.value == value);
    }
    for (uint64_t value = 0; value < 8; value++) {
        REQUIRE(second.recv() == VKP_OK);
        CHECK(second.value == value);
    }
    CHECK(first.try_recv() == VKP_ERR_EMPTY);
    CHECK(second.recv() == VKP_ERR_TIMEOUT);
}

TEST_CASE("broadcast: out is written on OK only", "[broadcast]")
{
    Sender sender(config_of(8, 2, nullptr));
    Receiver receiver(sender);
    size_t count = 99;
    receiver.value = 77;
    CHECK(receiver.try_recv() == VKP_ERR_EMPTY);
    CHECK(receiver.recv() == VKP_ERR_TIMEOUT);
    CHECK(vkp_broadcast_recv_many(receiver.rx, 0, &receiver.value, 1, &count) == VKP_ERR_TIMEOUT);
    for (uint64_t value = 0; value < 5; value++) {
        REQUIRE(sender.send(value) == VKP_OK);
    }
    CHECK(receiver.try_recv() == VKP_ERR_LAGGED);
    CHECK(receiver.value == 77);
    REQUIRE(receiver.try_recv() == VKP_OK);
    REQUIRE(receiver.try_recv() == VKP_OK);
    receiver.value = 77;
    sender.end();
    CHECK(receiver.try_recv() == VKP_ERR_CLOSED);
    CHECK(vkp_broadcast_recv_many(receiver.rx, VKP_FOREVER, &receiver.value, 1, &count) ==
          VKP_ERR_CLOSED);
    CHECK(receiver.value == 77);
    CHECK(count == 99);
}

TEST_CASE("broadcast: a receiver sees what is sent after it subscribed", "[broadcast]")
{
    Sender sender(config_of(8, 4, nullptr));
    Receiver early(sender);
    REQUIRE(sender.send(1) == VKP_OK);
    Receiver late(sender);
    CHECK(late.len() == 0);
    CHECK(late.try_recv() == VKP_ERR_EMPTY);
    REQUIRE(sender.send(2) == VKP_OK);
    REQUIRE(late.try_recv() == VKP_OK);
    CHECK(late.value == 2);
    REQUIRE(early.try_recv() == VKP_OK);
    CHECK(early.value == 1);
}

TEST_CASE("broadcast: resubscribe begins at the tail, whatever the other receiver has unread",
          "[broadcast]")
{
    Sender sender(config_of(8, 2, nullptr));
    Receiver slow(sender);
    for (uint64_t value = 0; value < 5; value++) {
        REQUIRE(sender.send(value) == VKP_OK);
    }
    Receiver fresh(slow);
    CHECK(vkp_broadcast_get_receivers(sender.tx) == 2);
    CHECK(fresh.len() == 0);
    CHECK(fresh.try_recv() == VKP_ERR_EMPTY);
    // The one that lags still learns so.
    CHECK(slow.try_recv() == VKP_ERR_LAGGED);
    CHECK(slow.missed() == 3);
    REQUIRE(sender.send(5) == VKP_OK);
    REQUIRE(fresh.try_recv() == VKP_OK);
    CHECK(fresh.value == 5);
    slow.end();
    REQUIRE(sender.send(6) == VKP_OK);
    REQUIRE(fresh.try_recv() == VKP_OK);
    CHECK(fresh.value == 6);
    sender.end();
    Receiver after(fresh);
    CHECK(after.try_recv() == VKP_ERR_CLOSED);
}

TEST_CASE("broadcast: LAGGED tells the exact number, then comes the oldest value left",
          "[broadcast]")
{
    Sender sender(config_of(8, 4, nullptr));
    Receiver receiver(sender);
    CHECK(receiver.missed() == 0);
    for (uint64_t value = 0; value < 4; value++) {
        REQUIRE(sender.send(value) == VKP_OK);
    }
    SECTION("a full ring is no lag")
    {
        REQUIRE(receiver.try_recv() == VKP_OK);
        CHECK(receiver.value == 0);
        CHECK(receiver.missed() == 0);
    }
    SECTION("one too many")
    {
        REQUIRE(sender.send(4) == VKP_OK);
        CHECK(receiver.len() == 5);
        CHECK(receiver.try_recv() == VKP_ERR_LAGGED);
        CHECK(receiver.missed() == 1);
        CHECK(receiver.len() == 4);
        for (uint64_t value = 1; value <= 4; value++) {
            REQUIRE(receiver.try_recv() == VKP_OK);
            CHECK(receiver.value == value);
        }
        CHECK(receiver.missed() == 1); // of the last LAGGED, until the next one
        CHECK(receiver.try_recv() == VKP_ERR_EMPTY);
    }
    SECTION("many rounds of the ring, by the waiting call")
    {
        for (uint64_t value = 4; value < 1003; value++) {
            REQUIRE(sender.send(value) == VKP_OK);
        }
        CHECK(receiver.recv(VKP_FOREVER) == VKP_ERR_LAGGED);
        CHECK(receiver.missed() == 999);
        REQUIRE(receiver.recv(VKP_FOREVER) == VKP_OK);
        CHECK(receiver.value == 999);
    }
    SECTION("by the call for many, which says so before it gives any")
    {
        uint64_t values[8] = {};
        size_t count = 0;
        REQUIRE(sender.send(4) == VKP_OK);
        REQUIRE(sender.send(5) == VKP_OK);
        CHECK(vkp_broadcast_recv_many(receiver.rx, VKP_FOREVER, values, 8, &count) ==
              VKP_ERR_LAGGED);
        CHECK(receiver.missed() == 2);
        REQUIRE(vkp_broadcast_recv_many(receiver.rx, VKP_FOREVER, values, 8, &count) == VKP_OK);
        CHECK(count == 4);
        CHECK(values[0] == 2);
        CHECK(values[3] == 5);
    }
    SECTION("again after the last LAGGED, before any value was taken")
    {
        for (uint64_t value = 4; value < 7; value++) {
            REQUIRE(sender.send(value) == VKP_OK);
        }
        CHECK(receiver.try_recv() == VKP_ERR_LAGGED);
        CHECK(receiver.missed() == 3);
        REQUIRE(sender.send(7) == VKP_OK);
        REQUIRE(sender.send(8) == VKP_OK);
        CHECK(receiver.try_recv() == VKP_ERR_LAGGED);
        CHECK(receiver.missed() == 2);
        REQUIRE(receiver.try_recv() == VKP_OK);
        CHECK(receiver.value == 5);
    }
}

TEST_CASE("broadcast: the capacity is rounded up to a power of two", "[broadcast]")
{
    const size_t pairs[][2] = {{1, 1}, {2, 2}, {3, 4}, {4, 4}, {5, 8}, {9, 16}, {1000, 1024}};
    for (const size_t(&pair)[2] : pairs) {
        INFO("capacity " << pair[0]);
        Sender sender(config_of(8, pair[0], nullptr));
        Receiver receiver(sender);
        for (uint64_t value = 0; value < pair[1]; value++) {
            REQUIRE(sender.send(value) == VKP_OK);
        }
        REQUIRE(receiver.try_recv() == VKP_OK);
        CHECK(receiver.value == 0);
        REQUIRE(sender.send(pair[1]) == VKP_OK);
        REQUIRE(sender.send(pair[1] + 1) == VKP_OK);
        CHECK(receiver.try_recv() == VKP_ERR_LAGGED);
        CHECK(receiver.missed() == 1);
    }
}

TEST_CASE("broadcast: after the last sender receivers drain, then get CLOSED", "[broadcast]")
{
    Sender sender(config_of(8, 4, nullptr));
    Receiver keeping_up(sender);
    Receiver slow(sender);
    vkp_broadcast_tx *second = vkp_broadcast_tx_ref(sender.tx);
    CHECK(second == sender.tx);
    for (uint64_t value = 0; value < 6; value++) {
        REQUIRE(sender.send(value) == VKP_OK);
        REQUIRE(keeping_up.try_recv() == VKP_OK);
    }
    sender.end();
    CHECK(keeping_up.try_recv() == VKP_ERR_EMPTY); // the second sender keeps the channel open
    vkp_broadcast_tx_unref(second);
    CHECK(keeping_up.try_recv() == VKP_ERR_CLOSED);
    CHECK(keeping_up.recv(VKP_FOREVER) == VKP_ERR_CLOSED);
    CHECK(slow.len() == 6);
    CHECK(slow.try_recv() == VKP_ERR_LAGGED);
    CHECK(slow.missed() == 2);
    for (uint64_t value = 2; value < 6; value++) {
        REQUIRE(slow.recv(VKP_FOREVER) == VKP_OK);
        CHECK(slow.value == value);
    }
    CHECK(slow.recv(VKP_FOREVER) == VKP_ERR_CLOSED);
    CHECK(slow.len() == 0);
}

TEST_CASE("broadcast: without receivers a send gives the value back, until one subscribes",
          "[broadcast]")
{
    vkp_test_ledger ledger(4);
    Sender sender(owning(8, 4, nullptr, &ledger));
    ledger.own(0);
    CHECK(sender.send(0) == VKP_ERR_CLOSED);
    CHECK(ledger.owners(0) == 1);
    CHECK(ledger.drops(0) == 0);
    {
        Receiver receiver(sender);
        CHECK(sender.send(0) == VKP_OK);
        REQUIRE(receiver.try_recv() == VKP_OK);
        vkp_test_ledger::drop(&ledger, &receiver.value);
    }
    ledger.own(1);
    CHECK(sender.send(1) == VKP_ERR_CLOSED);
    CHECK(ledger.owners(1) == 1);
    Receiver receiver(sender);
    CHECK(receiver.try_recv() == VKP_ERR_EMPTY); // a refused value is nowhere
    CHECK(sender.send(1) == VKP_OK);
    REQUIRE(receiver.try_recv() == VKP_OK);
    CHECK(receiver.value == 1);
    vkp_test_ledger::drop(&ledger, &receiver.value);
    receiver.end();
    sender.end();
    CHECK(ledger.owned() == 0);
    CHECK(ledger.wrong() == 0);
}

TEST_CASE("broadcast: receivers are counted, and so is what waits for each", "[broadcast]")
{
    Sender sender(config_of(8, 4, nullptr));
    CHECK(vkp_broadcast_get_receivers(sender.tx) == 0);
    Receiver first(sender);
    CHECK(first.len() == 0);
    {
        Receiver second(sender);
        Receiver third(second);
        CHECK(vkp_broadcast_get_receivers(sender.tx) == 3);
        for (uint64_t value = 0; value < 3; value++) {
            REQUIRE(sender.send(value) == VKP_OK);
        }
        CHECK(first.len() == 3);
        REQUIRE(second.try_recv() == VKP_OK);
        CHECK(second.len() == 2);
        CHECK(first.len() == 3);
    }
    CHECK(vkp_broadcast_get_receivers(sender.tx) == 1);
    for (uint64_t value = 3; value < 10; value++) {
        REQUIRE(sender.send(value) == VKP_OK);
    }
    CHECK(first.len() == 10); // those already lost included
}

TEST_CASE("broadcast: recv_many takes what is there, in order, up to its capacity", "[broadcast]")
{
    Sender sender(config_of(8, 8, nullptr));
    Receiver receiver(sender);
    uint64_t values[16] = {};
    size_t count = 0;
    CHECK(vkp_broadcast_recv_many(receiver.rx, 0, values, 16, &count) == VKP_ERR_TIMEOUT);
    // Begins inside the ring, so that its end is in the middle of a batch.
    for (uint64_t value = 0; value < 5; value++) {
        REQUIRE(sender.send(value) == VKP_OK);
        REQUIRE(receiver.try_recv() == VKP_OK);
    }
    for (uint64_t value = 5; value < 12; value++) {
        REQUIRE(sender.send(value) == VKP_OK);
    }
    REQUIRE(vkp_broadcast_recv_many(receiver.rx, VKP_FOREVER, values, 3, &count) == VKP_OK);
    CHECK(count == 3);
    CHECK(values[0] == 5);
    CHECK(values[2] == 7);
    CHECK(values[3] == 0);
    REQUIRE(vkp_broadcast_recv_many(receiver.rx, 0, values, 16, &count) == VKP_OK);
    CHECK(count == 4);
    CHECK(values[0] == 8);
    CHECK(values[3] == 11);
    REQUIRE(sender.send(12) == VKP_OK);
    sender.end();
    REQUIRE(vkp_broadcast_recv_many(receiver.rx, 0, values, 16, &count) == VKP_OK);
    CHECK(count == 1);
    CHECK(vkp_broadcast_recv_many(receiver.rx, 0, values, 16, &count) == VKP_ERR_CLOSED);
}

TEST_CASE("broadcast: values of every size come out whole, and nothing beside them is written",
          "[broadcast]")
{
    std::vector<size_t> sizes;
    for (size_t bytes = 1; bytes <= 200; bytes++) {
        sizes.push_back(bytes);
    }
    sizes.push_back(4096);
    sizes.push_back(65536);
    const size_t guard = 16;
    for (bool fenced : {false, true}) {
        vkp_env env = VKP_ZERO;
        env.sys = vkp_test_build_sys(fenced);
        for (size_t bytes : sizes) {
            INFO("fenced " << fenced << ", " << bytes << " bytes");
            Sender sender(config_of(bytes, 4, &env));
            REQUIRE(sender.status == VKP_OK);
            Receiver receiver(sender);
            std::vector<unsigned char> in(bytes);
            std::vector<unsigned char> out(4 * bytes + guard, 0xee);
            const auto beside = [&](size_t count) {
                return std::all_of(out.begin() + static_cast<std::ptrdiff_t>(count * bytes),
                                   out.end(), [](unsigned char c) { return c == 0xee; });
            };
            uint64_t sent = 0;
            uint64_t wanted = 0;
            size_t wrong = 0;
            for (unsigned round = 0; round < 12; round++) {
                for (unsigned i = 0; i < round % 6; i++) {
                    vkp_test_fill(in.data(), bytes, sent++);
                    REQUIRE(vkp_broadcast_send(sender.tx, in.data()) == VKP_OK);
                }
                std::fill(out.begin(), out.end(), static_cast<unsigned char>(0xee));
                if (round % 6 == 5) {
                    REQUIRE(vkp_broadcast_try_recv(receiver.rx, out.data()) == VKP_ERR_LAGGED);
                    REQUIRE(receiver.missed() == 1);
                    wanted++;
                    wrong += !beside(0);
                }
                if (round % 2 != 0 && sent != wanted) {
                    REQUIRE(vkp_broadcast_try_recv(receiver.rx, out.data()) == VKP_OK);
                    wrong += !vkp_test_is_filled(out.data(), bytes, wanted++) || !beside(1);
                }
                if (sent != wanted) {
                    size_t count = 0;
                    REQUIRE(vkp_broadcast_recv_many(receiver.rx, 0, out.data(), 4, &count) ==
                            VKP_OK);
                    for (size_t i = 0; i < count; i++) {
                        wrong += !vkp_test_is_filled(out.data() + i * bytes, bytes, wanted++);
                    }
                    wrong += !beside(count);
                }
            }
            REQUIRE(wanted == sent);
            REQUIRE(wrong == 0);
        }
    }
}

TEST_CASE("broadcast: random calls answer as a model does", "[broadcast]")
{
    for (unsigned seed = 0; seed < 60; seed++) {
        INFO("seed " << seed);
        std::mt19937 random(seed);
        vkp_test_memory memory;
        vkp_test_ledger ledger(3000);
        const size_t capacity = 1 + random() % 9;
        size_t kept = 1;
        while (kept < capacity) {
            kept *= 2;
        }
        struct Model {
            vkp_broadcast_rx *rx;
            uint64_t next;
            uint64_t missed;
        };
        std::vector<Model> models;
        std::vector<uint64_t> sent; // by place
        uint64_t made = 0;
        std::vector<vkp_broadcast_tx *> senders(1, nullptr);
        vkp_broadcast_config config = owning(8, capacity, memory.env(), &ledger);
        REQUIRE(vkp_broadcast_open(&config, &senders[0]) == VKP_OK);
        for (int step = 0; step < 1500; step++) {
            const unsigned long dice = random() % 100;
            if (dice < 45 && !senders.empty()) {
                const uint64_t value = made++;
                ledger.own(value);
                const vkp_status status = vkp_broadcast_send(senders[0], &value);
                REQUIRE(status == (models.empty() ? VKP_ERR_CLOSED : VKP_OK));
                if (status == VKP_OK) {
                    sent.push_back(value);
                } else {
                    uint64_t mine = value;
                    REQUIRE(ledger.owners(value) == 1);
                    vkp_test_ledger::drop(&ledger, &mine);
                }
            } else if (dice < 49 && models.size() < 5 && !senders.empty()) {
                Model model = {nullptr, sent.size(), 0};
                REQUIRE(vkp_broadcast_subscribe(senders[0], &model.rx) == VKP_OK);
                models.push_back(model);
            } else if (dice < 51 && !models.empty() && models.size() < 5) {
                Model model = {nullptr, sent.size(), 0};
                REQUIRE(vkp_broadcast_resubscribe(models[random() % models.size()].rx, &model.rx) ==
                        VKP_OK);
                models.push_back(model);
            } else if (dice < 53 && !models.empty()) {
                const size_t pick = random() % models.size();
                vkp_broadcast_rx_unref(models[pick].rx);
                models.erase(models.begin() + static_cast<std::ptrdiff_t>(pick));
            } else if (dice < 54 && senders.size() < 3 && !senders.empty()) {
                senders.push_back(vkp_broadcast_tx_ref(senders[0]));
            } else if (dice < 55 && (senders.size() > 1 || step > 1400) && !senders.empty()) {
                vkp_broadcast_tx_unref(senders.back());
                senders.pop_back();
            } else if (!models.empty()) {
                Model &model = models[random() % models.size()];
                uint64_t values[4] = {};
                size_t count = 1;
                const size_t most = dice < 90 ? 1 : 4;
                const uint64_t waiting = sent.size() - model.next;
                REQUIRE(vkp_broadcast_get_len(model.rx) == waiting);
                const vkp_status status =
                    most == 1 ? vkp_broadcast_try_recv(model.rx, values)
                              : vkp_broadcast_recv_many(model.rx, 0, values, most, &count);
                if (waiting > kept) {
                    REQUIRE(status == VKP_ERR_LAGGED);
                    model.missed = waiting - kept;
                    model.next += model.missed;
                } else if (waiting == 0) {
                    REQUIRE(status == (senders.empty() ? VKP_ERR_CLOSED
                                       : most == 1     ? VKP_ERR_EMPTY
                                                       : VKP_ERR_TIMEOUT));
                } else {
                    REQUIRE(status == VKP_OK);
                    REQUIRE(count == std::min<uint64_t>(most, waiting));
                    for (size_t i = 0; i < count; i++) {
                        REQUIRE(values[i] == sent[static_cast<size_t>(model.next)]);
                        model.next++;
                        vkp_test_ledger::drop(&ledger, &values[i]);
                    }
                }
                REQUIRE(vkp_broadcast_get_missed(model.rx) == model.missed);
            }
            if (!senders.empty()) {
                REQUIRE(vkp_broadcast_get_receivers(senders[0]) == models.size());
            }
        }
        for (vkp_broadcast_tx *tx : senders) {
            vkp_broadcast_tx_unref(tx);
        }
        for (const Model &model : models) {
            vkp_broadcast_rx_unref(model.rx);
        }
        REQUIRE(ledger.owned() == 0);
        REQUIRE(ledger.wrong() == 0);
        REQUIRE(memory.blocks() == 0);
    }
}

TEST_CASE("broadcast: values that own something: copies handed out plus one, all given up",
          "[broadcast]")
{
    vkp_test_ledger ledger(20);
    vkp_test_memory memory;
    {
        Sender sender(owning(16, 4, memory.env(), &ledger));
        Receiver first(sender);
        Receiver second(sender);
        uint64_t item[2] = {0, 0};
        for (uint64_t number = 0; number < 10; number++) {
            item[0] = number;
            ledger.own(number);
            REQUIRE(vkp_broadcast_send(sender.tx, item) == VKP_OK);
        }
        CHECK(ledger.owners(0) == 0); // overwritten, so dropped
        CHECK(ledger.drops(0) == 1);
        CHECK(ledger.owners(9) == 1);
        CHECK(vkp_broadcast_try_recv(first.rx, item) == VKP_ERR_LAGGED);
        REQUIRE(vkp_broadcast_try_recv(first.rx, item) == VKP_OK);
        CHECK(item[0] == 6);
        // The receiver's copy outlives the ring's.
        CHECK(ledger.owners(6) == 2);
        for (uint64_t number = 10; number < 20; number++) {
            uint64_t next[2] = {number, 0};
            ledger.own(number);
            REQUIRE(vkp_broadcast_send(sender.tx, next) == VKP_OK);
        }
        CHECK(ledger.owners(6) == 1);
        vkp_test_ledger::drop(&ledger, item);
        CHECK(ledger.owners(6) == 0);
    }
    CHECK(ledger.owned() == 0);
    CHECK(ledger.wrong() == 0);
    CHECK(memory.blocks() == 0);
}

TEST_CASE("broadcast: blocks of bytes as values, whichever side goes first", "[broadcast]")
{
    for (bool sender_first : {true, false}) {
        vkp_test_memory memory;
        {
            vkp_broadcast_config config = config_of(sizeof(vkp_bytes), 4, memory.env());
            config.retain = [](void *, void *item) {
                vkp_bytes *bytes = static_cast<vkp_bytes *>(item);
                *bytes = vkp_bytes_ref(bytes);
            };
            config.drop = [](void *, void *item) {
                vkp_bytes_unref(static_cast<vkp_bytes *>(item));
            };
            Sender sender(config);
            Receiver first(sender);
            Receiver second(sender);
            vkp_bytes got[4];
            size_t count = 0;
            for (char c = 'a'; c < 'k'; c++) {
                const std::string text(100, c);
                vkp_bytes bytes;
                REQUIRE(vkp_bytes_copy(memory.env(), text.data(), text.size(), &bytes) == VKP_OK);
                REQUIRE(vkp_broadcast_send(sender.tx, &bytes) == VKP_OK);
            }
            CHECK(vkp_broadcast_recv_many(first.rx, 0, got, 4, &count) == VKP_ERR_LAGGED);
            REQUIRE(vkp_broadcast_recv_many(first.rx, 0, got, 4, &count) == VKP_OK);
            REQUIRE(count == 4);
            if (sender_first) {
                sender.end();
            } else {
                first.end();
                second.end();
                sender.end();
            }
            for (size_t i = 0; i < count; i++) {
                CHECK(std::string(reinterpret_cast<const char *>(got[i].data), got[i].len) ==
                      std::string(100, static_cast<char>('g' + i)));
                vkp_bytes_unref(&got[i]);
            }
        }
        CHECK(memory.blocks() == 0);
    }
}

TEST_CASE("broadcast: memory may fail at every allocation; nothing is lost or leaked",
          "[broadcast][faults]")
{
    vkp_test_memory memory;
    uint64_t failed = 0;
    for (uint64_t k = 1;; k++) {
        memory.fail(VKP_TEST_FAULT_ONCE, k);
        const uint64_t before = memory.failures();
        Sender sender(config_of(8, 4, memory.env()));
        if (memory.failures() == before) {
            REQUIRE(sender.status == VKP_OK);
            break;
        }
        failed++;
        CHECK(sender.status == VKP_ERR_NOMEM);
        CHECK(sender.tx == nullptr);
        CHECK(memory.blocks() == 0);
    }
    CHECK(failed > 0);
    memory.heal();
    Sender sender(config_of(8, 4, memory.env()));
    Receiver receiver(sender);
    REQUIRE(sender.send(1) == VKP_OK);
    const size_t blocks = memory.blocks();
    vkp_broadcast_rx *rx = nullptr;
    for (bool beside : {false, true}) {
        for (uint64_t k = 1;; k++) {
            memory.fail(VKP_TEST_FAULT_ONCE, k);
            const uint64_t before = memory.failures();
            const vkp_status status = beside ? vkp_broadcast_resubscribe(receiver.rx, &rx)
                                             : vkp_broadcast_subscribe(sender.tx, &rx);
            if (memory.failures() == before) {
                REQUIRE(status == VKP_OK);
                vkp_broadcast_rx_unref(rx);
                rx = nullptr;
                break;
            }
            CHECK(status == VKP_ERR_NOMEM);
            CHECK(rx == nullptr);
            CHECK(memory.blocks() == blocks);
            CHECK(vkp_broadcast_get_receivers(sender.tx) == 1);
        }
    }
    // What is open needs no more: all memory was taken at the start.
    memory.fail(VKP_TEST_FAULT_FROM, 1);
    const uint64_t before = memory.failures();
    for (uint64_t value = 2; value < 100; value++) {
        REQUIRE(sender.send(value) == VKP_OK);
    }
    CHECK(receiver.try_recv() == VKP_ERR_LAGGED);
    CHECK(receiver.missed() == 95);
    for (uint64_t value = 96; value < 100; value++) {
        REQUIRE(receiver.recv(VKP_FOREVER) == VKP_OK);
        CHECK(receiver.value == value);
    }
    sender.end();
    CHECK(receiver.recv(VKP_FOREVER) == VKP_ERR_CLOSED);
    CHECK(memory.failures() == before);
    memory.heal();
}

TEST_CASE("broadcast: waits end at their deadline, by the clock of the environment", "[broadcast]")
{
    vkp_env env = VKP_ZERO;
    env.sys = vkp_test_virtual_sys();
    env.spins = VKP_SPINS_NONE;
    Sender sender(config_of(8, 4, &env));
    Receiver receiver(sender);
    uint64_t deadline = vkp_test_virtual_ns.load() + uint64_t{3600} * 1000000000u;
    CHECK(receiver.recv(deadline) == VKP_ERR_TIMEOUT);
    CHECK(vkp_test_virtual_ns.load() == deadline);
    size_t count = 0;
    deadline += 1000;
    CHECK(vkp_broadcast_recv_many(receiver.rx, deadline, &receiver.value, 1, &count) ==
          VKP_ERR_TIMEOUT);
    CHECK(vkp_test_virtual_ns.load() == deadline);
    deadline += 1000;
    CHECK(vkp_broadcast_wait_closed(sender.tx, deadline) == VKP_ERR_TIMEOUT);
    CHECK(vkp_test_virtual_ns.load() == deadline);
    REQUIRE(sender.send(1) == VKP_OK);
    CHECK(receiver.try_recv() == VKP_OK);
}

TEST_CASE("broadcast: a send ends every wait, and so does the last sender's end",
          "[broadcast][threads]")
{
    for (const vkp_test_build &build : vkp_test_builds) {
        const vkp_test_watchdog watchdog;
        INFO(build.name);
        const vkp_env env = vkp_test_env_of(build);
        for (int round = 0; round < 20; round++) {
            Sender sender(config_of(8, 4, &env));
            Receiver first(sender);
            Receiver second(sender);
            uint64_t many[4] = {};
            size_t count = 0;
            const uint64_t deadline = vkp_test_deadline();
            {
                vkp_test_waiting one([&] { return first.recv(deadline); });
                vkp_test_waiting two([&] {
                    return vkp_broadcast_recv_many(second.rx, VKP_FOREVER, many, 4, &count);
                });
                const vkp_status sent = sender.send(7);
                const vkp_status got_one = one.join();
                const vkp_status got_two = two.join();
                REQUIRE(sent == VKP_OK);
                REQUIRE(got_one == VKP_OK);
                REQUIRE(got_two == VKP_OK);
                REQUIRE(first.value == 7);
                REQUIRE(many[0] == 7);
                REQUIRE(count == 1);
            }
            vkp_test_waiting one([&] { return first.recv(VKP_FOREVER); });
            vkp_test_waiting two([&] { return second.recv(deadline); });
            sender.end();
            const vkp_status got_one = one.join();
            const vkp_status got_two = two.join();
            REQUIRE(got_one == VKP_ERR_CLOSED);
            REQUIRE(got_two == VKP_ERR_CLOSED);
        }
    }
}

TEST_CASE("broadcast: wait_closed waits until there is no receiver", "[broadcast][threads]")
{
    for (const vkp_test_build &build : vkp_test_builds) {
        const vkp_test_watchdog watchdog;
        INFO(build.name);
        const vkp_env env = vkp_test_env_of(build);
        Sender sender(config_of(8, 4, &env));
        CHECK(vkp_broadcast_wait_closed(sender.tx, 0) == VKP_OK);
        for (int round = 0; round < 20; round++) {
            Receiver first(sender);
            Receiver second(first);
            CHECK(vkp_broadcast_wait_closed(sender.tx, 0) == VKP_ERR_TIMEOUT);
            vkp_test_waiting one([&] { return vkp_broadcast_wait_closed(sender.tx, VKP_FOREVER); });
            vkp_test_waiting two(
                [&] { return vkp_broadcast_wait_closed(sender.tx, vkp_test_deadline()); });
            first.end();
            const vkp_status sent = sender.send(1); // one is left: nobody may think otherwise
            second.end();
            const vkp_status got_one = one.join();
            const vkp_status got_two = two.join();
            REQUIRE(sent == VKP_OK);
            REQUIRE(got_one == VKP_OK);
            REQUIRE(got_two == VKP_OK);
        }
    }
}

TEST_CASE("broadcast: a loop is told of values, of lag and of the end, as long as they are there",
          "[broadcast][loop]")
{
    for (const vkp_backend *const *backend = vkp_test_backends_all(); *backend; backend++) {
        for (bool fenced : {false, true}) {
            INFO((*backend)->name << ", fenced " << fenced);
            vkp_test_memory memory({"", fenced, 0});
            {
                Sender sender(config_of(8, 2, memory.env()));
                Receiver receiver(sender);
                vkp_test_watched watched(*backend, memory.env());
                const vkp_case what = vkp_case_broadcast_recv(receiver.rx, nullptr);
                std::vector<vkp_status> told;
                std::vector<uint64_t> values;
                size_t calls = 0;
                bool take = true;
                REQUIRE(watched.watch(what, [&] {
                    calls++;
                    if (take) {
                        told.push_back(receiver.try_recv());
                        if (told.back() == VKP_OK) {
                            values.push_back(receiver.value);
                        } else if (told.back() == VKP_ERR_CLOSED) {
                            watched.end();
                        }
                    }
                }) == VKP_OK);
                watched.settle();
                CHECK(calls == 0);
                take = false;
                REQUIRE(sender.send(0) == VKP_OK);
                watched.until("a call again and again", [&] { return calls >= 3; });
                take = true;
                watched.settle();
                CHECK(values == std::vector<uint64_t>{0});
                calls = 0;
                watched.settle();
                CHECK(calls == 0); // all is taken: silence
                for (uint64_t value = 1; value <= 5; value++) {
                    REQUIRE(sender.send(value) == VKP_OK);
                }
                sender.end();
                watched.until("the end", [&] { return told.back() == VKP_ERR_CLOSED; });
                CHECK(told == std::vector<vkp_status>{VKP_OK, VKP_ERR_LAGGED, VKP_OK, VKP_OK,
                                                      VKP_ERR_CLOSED});
                CHECK(receiver.missed() == 3);
                CHECK(values == std::vector<uint64_t>{0, 4, 5});
            }
            CHECK(memory.blocks() == 0);
        }
    }
}

TEST_CASE("broadcast: a loop is told when the last receiver went", "[broadcast][loop]")
{
    for (const vkp_backend *const *backend = vkp_test_backends_all(); *backend; backend++) {
        INFO((*backend)->name);
        vkp_test_memory memory;
        {
            Sender sender(config_of(8, 2, memory.env()));
            Receiver first(sender);
            Receiver second(sender);
            vkp_test_watched watched(*backend, memory.env());
            size_t calls = 0;
            REQUIRE(watched.watch(vkp_case_broadcast_closed(sender.tx), [&] { calls++; }) ==
                    VKP_OK);
            watched.settle();
            first.end();
            watched.settle();
            CHECK(calls == 0);
            second.end();
            watched.until("a call", [&] { return calls > 0; });
            watched.end();
            calls = 0;
            watched.settle();
            CHECK(calls == 0);
        }
        CHECK(memory.blocks() == 0);
    }
}

TEST_CASE("broadcast: threads: a loop misses no value of other threads", "[broadcast][threads]")
{
    const size_t each = 3000;
    for (const vkp_backend *const *backend = vkp_test_backends(); *backend; backend++) {
        for (const vkp_test_build &build : vkp_test_builds) {
            const vkp_test_watchdog watchdog;
            INFO((*backend)->name << ", " << build.name);
            const vkp_env env = vkp_test_env_of(build);
            Sender sender(config_of(8, 16, &env));
            Receiver receiver(sender);
            vkp_test_watched watched(*backend, &env);
            Seen seen(2 * each);
            bool ended = false;
            REQUIRE(watched.watch(vkp_case_broadcast_recv(receiver.rx, nullptr), [&] {
                const vkp_status status = receiver.try_recv();
                if (status == VKP_OK) {
                    seen.take(receiver.value);
                } else if (status == VKP_ERR_LAGGED) {
                    seen.lag(receiver.missed());
                } else {
                    seen.strange += status != VKP_ERR_CLOSED;
                    ended = true;
                    watched.end();
                }
            }) == VKP_OK);
            std::vector<std::thread> threads;
            std::atomic<size_t> refused{0};
            for (size_t s = 0; s < 2; s++) {
                threads.emplace_back([&, s, tx = vkp_broadcast_tx_ref(sender.tx)] {
                    for (size_t i = 0; i < each; i++) {
                        const uint64_t value = s * each + i;
                        refused += vkp_broadcast_send(tx, &value) != VKP_OK;
                        if (i % 7 == 0) {
                            sched_yield();
                        }
                    }
                    vkp_broadcast_tx_unref(tx);
                });
            }
            sender.end();
            watched.until("all values", [&] { return ended; });
            for (std::thread &thread : threads) {
                thread.join();
            }
            std::vector<Seen> all(1, seen);
            CHECK(refused.load() == 0);
            CHECK(seen.strange == 0);
            CHECK(seen.got + seen.missed == 2 * each);
            CHECK(disagreements(all, 2 * each, 2, each) == 0);
        }
    }
}

TEST_CASE("broadcast: threads: received and missed is sent, and all receivers see one order",
          "[broadcast][threads]")
{
    const size_t senders = 2;
    const size_t receivers = 3;
    const size_t each = 4000;
    for (const vkp_test_build &build : vkp_test_builds) {
        const vkp_test_watchdog watchdog;
        for (size_t capacity : {1, 2, 16, 256}) {
            INFO(build.name << ", capacity " << capacity);
            const vkp_env env = vkp_test_env_of(build);
            vkp_test_ledger ledger(senders * each);
            std::vector<Seen> seen(receivers, Seen(senders * each));
            std::atomic<size_t> refused{0};
            {
                Sender sender(owning(8, capacity, &env, &ledger));
                std::vector<std::unique_ptr<Receiver>> ends;
                for (size_t r = 0; r < receivers; r++) {
                    ends.push_back(std::make_unique<Receiver>(sender));
                }
                std::vector<std::thread> threads;
                for (size_t r = 0; r < receivers; r++) {
                    threads.emplace_back(
                        [&, r] { drain(ends[r]->rx, static_cast<int>(r), &ledger, &seen[r]); });
                }
                for (size_t s = 0; s < senders; s++) {
                    threads.emplace_back([&, s, tx = vkp_broadcast_tx_ref(sender.tx)] {
                        for (size_t i = 0; i < each; i++) {
                            const uint64_t value = s * each + i;
                            ledger.own(value);
                            refused += vkp_broadcast_send(tx, &value) != VKP_OK;
                            if (i % 16 == 0) {
                                sched_yield();
                            }
                        }
                        vkp_broadcast_tx_unref(tx);
                    });
                }
                sender.end();
                for (std::thread &thread : threads) {
                    thread.join();
                }
            }
            REQUIRE(refused.load() == 0);
            for (const Seen &one : seen) {
                REQUIRE(one.strange == 0);
                REQUIRE(one.got + one.missed == senders * each);
            }
            REQUIRE(disagreements(seen, senders * each, senders, each) == 0);
            REQUIRE(ledger.owned() == 0);
            REQUIRE(ledger.wrong() == 0);
        }
    }
}

TEST_CASE("broadcast: threads: no value is torn, however slow its reader", "[broadcast][threads]")
{
    // One place and large values: each send goes over the value that receivers are copying. They
    // are made before, so that the threads do little else than copy.
    const size_t bytes = 16384;
    const size_t each = 2000;
    std::vector<std::vector<unsigned char>> items(8, std::vector<unsigned char>(bytes));
    for (size_t i = 0; i < items.size(); i++) {
        vkp_test_fill(items[i].data(), bytes, i);
    }
    for (const vkp_test_build &build : vkp_test_builds) {
        const vkp_test_watchdog watchdog;
        INFO(build.name);
        const vkp_env env = vkp_test_env_of(build);
        Sender sender(config_of(bytes, 1, &env));
        std::vector<std::unique_ptr<Receiver>> ends;
        std::vector<uint64_t> wrong(2, 0);
        std::vector<uint64_t> counted(2, 0);
        std::vector<std::thread> threads;
        for (size_t r = 0; r < 2; r++) {
            ends.push_back(std::make_unique<Receiver>(sender));
        }
        for (size_t r = 0; r < 2; r++) {
            threads.emplace_back([&, r] {
                std::vector<unsigned char> out(bytes);
                for (;;) {
                    const vkp_status status =
                        vkp_broadcast_recv(ends[r]->rx, vkp_test_deadline(), out.data());
                    uint64_t number = 0;
                    if (status == VKP_OK) {
                        std::memcpy(&number, out.data(), sizeof number);
                        wrong[r] +=
                            number >= items.size() || out != items[static_cast<size_t>(number)];
                        counted[r]++;
                    } else if (status == VKP_ERR_LAGGED) {
                        counted[r] += ends[r]->missed();
                    } else {
                        wrong[r] += status != VKP_ERR_CLOSED;
                        return;
                    }
                }
            });
        }
        for (size_t s = 0; s < 2; s++) {
            threads.emplace_back([&, s, tx = vkp_broadcast_tx_ref(sender.tx)] {
                for (size_t i = 0; i < each; i++) {
                    const std::vector<unsigned char> &item = items[(2 * i + s) % items.size()];
                    if (vkp_broadcast_send(tx, item.data()) != VKP_OK) {
                        vkp_test_fail("a send was refused");
                    }
                    if (i % 8 == 0) {
                        sched_yield(); // let the receivers begin to copy
                    }
                }
                vkp_broadcast_tx_unref(tx);
            });
        }
        sender.end();
        for (std::thread &thread : threads) {
            thread.join();
        }
        CHECK(wrong == std::vector<uint64_t>(2, 0));
        CHECK(counted == std::vector<uint64_t>(2, 2 * each));
    }
}

TEST_CASE("broadcast: threads: one value at a time wakes every receiver", "[broadcast][threads]")
{
    for (const vkp_test_build &build : vkp_test_builds) {
        const vkp_test_watchdog watchdog;
        INFO(build.name);
        const vkp_env env = vkp_test_env_of(build);
        Sender sender(config_of(8, 2, &env));
        const size_t receivers = 3;
        const uint64_t rounds = 400;
        std::vector<std::unique_ptr<Receiver>> ends;
        std::vector<vkp_status> ended(receivers, VKP_OK);
        std::vector<uint64_t> got(receivers, 0);
        std::atomic<uint64_t> taken{0};
        std::vector<std::thread> threads;
        for (size_t r = 0; r < receivers; r++) {
            ends.push_back(std::make_unique<Receiver>(sender));
        }
        for (size_t r = 0; r < receivers; r++) {
            threads.emplace_back([&, r] {
                vkp_status status;
                while ((status = ends[r]->recv(vkp_test_deadline())) == VKP_OK) {
                    got[r] += ends[r]->value == got[r];
                    taken.fetch_add(1);
                }
                ended[r] = status;
            });
        }
        // The next value goes out when all have the last: each is on its way to sleep by then.
        const uint64_t deadline = vkp_test_deadline();
        size_t refused = 0;
        for (uint64_t round = 0; round < rounds; round++) {
            refused += sender.send(round) != VKP_OK;
            while (taken.load() < (round + 1) * receivers && vkp_now_ns() < deadline) {
                sched_yield();
            }
        }
        sender.end();
        for (std::thread &thread : threads) {
            thread.join();
        }
        CHECK(refused == 0);
        CHECK(got == std::vector<uint64_t>(receivers, rounds));
        CHECK(ended == std::vector<vkp_status>(receivers, VKP_ERR_CLOSED));
    }
}

TEST_CASE("broadcast: threads: CLOSED comes after the last value, however soon the sender goes",
          "[broadcast][threads]")
{
    for (const vkp_test_build &build : vkp_test_builds) {
        const vkp_test_watchdog watchdog;
        INFO(build.name);
        const vkp_env env = vkp_test_env_of(build);
        const unsigned rounds = 1000;
        std::atomic<vkp_broadcast_tx *> next{nullptr};
        size_t wrong = 0;
        std::atomic<size_t> refused{0};
        std::thread sending([&] {
            for (unsigned round = 0; round < rounds; round++) {
                vkp_broadcast_tx *tx;
                while ((tx = next.exchange(nullptr)) == nullptr) {
                    sched_yield();
                }
                const uint64_t value = round;
                refused += vkp_broadcast_send(tx, &value) != VKP_OK;
                vkp_broadcast_tx_unref(tx);
            }
        });
        for (unsigned round = 0; round < rounds; round++) {
            Sender sender(config_of(8, 2, &env));
            Receiver receiver(sender);
            next.store(sender.tx);
            sender.tx = nullptr;
            vkp_status status;
            if (round % 2 == 0) {
                while ((status = receiver.try_recv()) == VKP_ERR_EMPTY) {
                    sched_yield();
                }
            } else {
                status = receiver.recv(VKP_FOREVER);
            }
            wrong += status != VKP_OK || receiver.value != round;
            wrong += receiver.recv(VKP_FOREVER) != VKP_ERR_CLOSED;
        }
        sending.join();
        CHECK(wrong == 0);
        CHECK(refused.load() == 0);
    }
}

TEST_CASE("broadcast: threads: receivers come and go; each sees a run of the one order",
          "[broadcast][threads]")
{
    const size_t total = 6000;
    for (const vkp_test_build &build : vkp_test_builds) {
        const vkp_test_watchdog watchdog;
        INFO(build.name);
        const vkp_env env = vkp_test_env_of(build);
        vkp_test_ledger ledger(total);
        size_t strange = 0;
        std::vector<std::vector<uint64_t>> runs[2];
        Seen whole(total);
        {
            // Nobody lags, so each receiver's values lie side by side in the whole.
            Sender sender(owning(8, total, &env, &ledger));
            Receiver steady(sender);
            std::vector<std::thread> threads;
            std::atomic<size_t> wrong{0};
            for (size_t c = 0; c < 2; c++) {
                threads.emplace_back([&, c, tx = vkp_broadcast_tx_ref(sender.tx)] {
                    for (size_t visit = 0; visit < 60; visit++) {
                        vkp_broadcast_rx *rx = nullptr;
                        vkp_broadcast_rx *fresh = nullptr;
                        wrong += vkp_broadcast_subscribe(tx, &rx) != VKP_OK;
                        runs[c].emplace_back();
                        uint64_t value;
                        for (size_t i = 0; i < visit % 20; i++) {
                            if (vkp_broadcast_recv(rx, vkp_now_ns() + 20000, &value) == VKP_OK) {
                                runs[c].back().push_back(value);
                                vkp_test_ledger::drop(&ledger, &value);
                            }
                        }
                        wrong += vkp_broadcast_resubscribe(rx, &fresh) != VKP_OK;
                        vkp_broadcast_rx_unref(rx);
                        if (vkp_broadcast_try_recv(fresh, &value) == VKP_OK) {
                            vkp_test_ledger::drop(&ledger, &value);
                        }
                        vkp_broadcast_rx_unref(fresh);
                    }
                    vkp_broadcast_tx_unref(tx);
                });
            }
            for (size_t s = 0; s < 2; s++) {
                threads.emplace_back([&, s, tx = vkp_broadcast_tx_ref(sender.tx)] {
                    for (size_t i = 0; i < total / 2; i++) {
                        const uint64_t value = s * (total / 2) + i;
                        ledger.own(value);
                        wrong += vkp_broadcast_send(tx, &value) != VKP_OK;
                    }
                    vkp_broadcast_tx_unref(tx);
                });
            }
            sender.end();
            drain(steady.rx, 0, &ledger, &whole);
            for (std::thread &thread : threads) {
                thread.join();
            }
            strange = wrong.load();
        }
        CHECK(strange == 0);
        CHECK(whole.strange == 0);
        CHECK(whole.got == total);
        std::vector<size_t> place(total, 0);
        for (size_t i = 0; i < total; i++) {
            place[static_cast<size_t>(whole.at[i])] = i;
        }
        size_t broken = 0;
        for (const auto &visitor : runs) {
            for (const std::vector<uint64_t> &run : visitor) {
                for (size_t i = 1; i < run.size(); i++) {
                    broken += place[static_cast<size_t>(run[i])] !=
                              place[static_cast<size_t>(run[i - 1])] + 1;
                }
            }
        }
        CHECK(broken == 0);
        CHECK(ledger.owned() == 0);
        CHECK(ledger.wrong() == 0);
    }
}

TEST_CASE("broadcast: threads: the last receiver's end meets sends: taken and dropped, or refused",
          "[broadcast][threads]")
{
    for (const vkp_test_build &build : vkp_test_builds) {
        const vkp_test_watchdog watchdog;
        INFO(build.name);
        const vkp_env env = vkp_test_env_of(build);
        for (unsigned round = 0; round < 100; round++) {
            const size_t values = 40;
            vkp_test_ledger ledger(values);
            std::vector<vkp_status> statuses(values, VKP_ERR_INVALID);
            {
                Sender sender(owning(8, 4, &env, &ledger));
                Receiver receiver(sender);
                std::atomic<bool> started{false};
                std::thread thread([&] {
                    for (uint64_t value = 0; value < values; value++) {
                        ledger.own(value);
                        statuses[static_cast<size_t>(value)] =
                            vkp_broadcast_send(sender.tx, &value);
                        started.store(true);
                    }
                });
                while (!started.load()) {
                    sched_yield();
                }
                for (unsigned i = 0; i < round % 8; i++) {
                    if (receiver.try_recv() == VKP_OK) {
                        vkp_test_ledger::drop(&ledger, &receiver.value);
                    }
                }
                receiver.end();
                const vkp_status closed = vkp_broadcast_wait_closed(sender.tx, 0);
                thread.join();
                REQUIRE(closed == VKP_OK);
            }
            size_t wrong = 0;
            for (size_t i = 0; i < values; i++) {
                const bool refused = statuses[i] == VKP_ERR_CLOSED;
                wrong += statuses[i] != VKP_OK && !refused;
                wrong += ledger.owners(i) != (refused ? 1 : 0);
                wrong += i > 0 && statuses[i - 1] == VKP_ERR_CLOSED && !refused;
            }
            REQUIRE(wrong == 0);
            REQUIRE(ledger.wrong() == 0);
        }
    }
}
