// SPDX-License-Identifier: MIT
//
// The channel call by call, as its contracts have it: every operation, its three ways of waiting
// (try, until a deadline, a loop's watch), its ends, its memory. test_mpsc.cpp has the queue.
// What sleeps or wakes runs over each build of the gate, with and without spinning before a sleep.
// Threads use an environment without counters: a lock in the allocator would hide races.
#include "support/catch.hpp"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <deque>
#include <functional>
#include <iterator>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "support/channel_probe.h"
#include "support/client_probe.h"
#include "support/park_probe.h"
#include "support/support.h"

namespace {

#define EVERY_BUILD \
    from_range(std::vector<vkp_test_build>(std::begin(vkp_test_builds), std::end(vkp_test_builds)))

#define ON_EVERY_BUILD                                  \
    const vkp_test_build build = GENERATE(EVERY_BUILD); \
    INFO("build: " << build.name);                      \
    const vkp_env env = vkp_test_env_of(build)

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

// An environment that counts, for tests of one thread.
using Env = vkp_test_counted;

vkp_mpsc_config config_of(size_t capacity, const vkp_env *env, size_t elem_bytes = 8)
{
    vkp_mpsc_config config = VKP_ZERO;
    config.elem_bytes = elem_bytes;
    config.capacity_items = capacity;
    config.env = env;
    return config;
}

struct Channel {
    vkp_mpsc_tx *tx = nullptr;
    vkp_mpsc_rx *rx = nullptr;
    explicit Channel(const vkp_mpsc_config &config)
    {
        if (vkp_mpsc_open(&config, &tx, &rx) != VKP_OK) {
            vkp_test_fail("no channel");
        }
    }
    ~Channel()
    {
        leave();
        drop_receiver();
    }
    Channel(const Channel &) = delete;
    Channel &operator=(const Channel &) = delete;
    void leave()
    {
        vkp_mpsc_tx_unref(std::exchange(tx, nullptr));
    }
    void drop_receiver()
    {
        vkp_mpsc_rx_unref(std::exchange(rx, nullptr));
    }
    vkp_status send(uint64_t value, uint64_t deadline_ns = 0)
    {
        return vkp_mpsc_send(tx, &value, deadline_ns);
    }
    vkp_status try_send(uint64_t value)
    {
        return vkp_mpsc_try_send(tx, &value);
    }
    vkp_status try_recv(uint64_t *value)
    {
        return vkp_mpsc_try_recv(rx, value);
    }
    // The next value, or a number that no test sends.
    uint64_t next()
    {
        uint64_t value = 0;
        return vkp_mpsc_try_recv(rx, &value) == VKP_OK ? value : UINT64_MAX;
    }
};

// What a drop function saw; it may come from any thread.
struct Drops {
    std::atomic<uint64_t> count{0};
    std::atomic<uint64_t> sum{0};
    static void drop(void *user, void *item)
    {
        Drops *self = static_cast<Drops *>(user);
        self->count.fetch_add(1, std::memory_order_relaxed);
        self->sum.fetch_add(*static_cast<uint64_t *>(item), std::memory_order_relaxed);
    }
    void on(vkp_mpsc_config *config)
    {
        config->drop = drop;
        config->user = this;
    }
};

std::unique_ptr<vkp_test_waiting> waiting_send(vkp_mpsc_tx *tx, uint64_t value,
                                               uint64_t deadline_ns = VKP_FOREVER)
{
    return std::make_unique<vkp_test_waiting>(
        [=] { return vkp_mpsc_send(tx, &value, deadline_ns); });
}

uint64_t value_of(uint64_t sender, uint64_t sequence)
{
    return sender << 32 | sequence;
}

// Checks that what one receiver took is in order for each sender.
struct Sequences {
    std::vector<uint64_t> next;
    uint64_t received = 0;
    uint64_t sum = 0;
    uint64_t disorder = 0;
    explicit Sequences(size_t senders) : next(senders, 0)
    {
    }
    // Values that a sender could not send leave gaps: later ones must be larger, no more.
    void take(uint64_t value)
    {
        uint64_t &expected = next[static_cast<size_t>(value >> 32)];
        const uint64_t sequence = value & 0xffffffffu;
        disorder += sequence < expected ? 1 : 0;
        expected = sequence + 1;
        received++;
        sum += value;
    }
};

} // namespace

// ---------------------------------------------------------------------------------------------
// Each call

TEST_CASE("mpsc api: what is sent is received in order, whichever call sends it", "[mpsc]")
{
    ON_EVERY_BUILD;
    for (size_t capacity : {size_t{0}, size_t{8}}) {
        Channel channel(config_of(capacity, &env));
        for (uint64_t round = 0; round < 100; round++) {
            const uint64_t first = round * 8;
            const uint64_t many[3] = {first + 2, first + 3, first + 4};
            size_t sent = 0;
            vkp_mpsc_permit permits[2];
            REQUIRE(channel.send(first, VKP_FOREVER) == VKP_OK);
            REQUIRE(channel.try_send(first + 1) == VKP_OK);
            REQUIRE(vkp_mpsc_send_many(channel.tx, many, 3, VKP_FOREVER, &sent) == VKP_OK);
            REQUIRE(sent == 3);
            REQUIRE(vkp_mpsc_reserve(channel.tx, VKP_FOREVER, &permits[0]) == VKP_OK);
            REQUIRE(vkp_mpsc_try_reserve(channel.tx, &permits[1]) == VKP_OK);
            *static_cast<uint64_t *>(permits[1].item) = first + 6;
            vkp_mpsc_commit(&permits[1]);
            *static_cast<uint64_t *>(permits[0].item) = first + 5;
            vkp_mpsc_commit(&permits[0]);
            REQUIRE(channel.send(first + 7) == VKP_OK);
            uint64_t out[8] = {0};
            size_t count = 0;
            REQUIRE(channel.try_recv(&out[0]) == VKP_OK);
            REQUIRE(vkp_mpsc_recv(channel.rx, VKP_FOREVER, &out[1]) == VKP_OK);
            REQUIRE(vkp_mpsc_recv_many(channel.rx, VKP_FOREVER, out + 2, 6, &count) == VKP_OK);
            REQUIRE(count == 6);
            for (uint64_t i = 0; i < 8; i++) {
                REQUIRE(out[i] == first + i);
            }
            REQUIRE(channel.try_recv(out) == VKP_ERR_EMPTY);
        }
    }
}

TEST_CASE("mpsc api: null arguments of the further calls are INVALID", "[mpsc]")
{
    Channel channel(config_of(2, nullptr));
    vkp_mpsc_permit permit;
    vkp_mpsc_tx *tx = nullptr;
    const void *item = nullptr;
    uint64_t value = 1;
    size_t sent = 9;
    CHECK(vkp_mpsc_reserve(nullptr, 0, &permit) == VKP_ERR_INVALID);
    CHECK(vkp_mpsc_reserve(channel.tx, 0, nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_mpsc_try_reserve(nullptr, &permit) == VKP_ERR_INVALID);
    CHECK(vkp_mpsc_try_reserve(channel.tx, nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_mpsc_send_many(nullptr, &value, 1, 0, &sent) == VKP_ERR_INVALID);
    CHECK(vkp_mpsc_send_many(channel.tx, nullptr, 1, 0, &sent) == VKP_ERR_INVALID);
    CHECK(vkp_mpsc_send_many(channel.tx, &value, 0, 0, &sent) == VKP_ERR_INVALID);
    CHECK(vkp_mpsc_send_many(channel.tx, &value, 1, 0, nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_mpsc_wait_closed(nullptr, 0) == VKP_ERR_INVALID);
    CHECK(vkp_mpsc_upgrade(nullptr, &tx) == VKP_ERR_INVALID);
    CHECK(vkp_mpsc_tx_clone(nullptr, &tx) == VKP_ERR_INVALID);
    CHECK(vkp_mpsc_tx_clone(channel.tx, nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_mpsc_peek(nullptr, &item) == VKP_ERR_INVALID);
    CHECK(vkp_mpsc_peek(channel.rx, nullptr) == VKP_ERR_INVALID);
    vkp_mpsc_weak_unref(nullptr);
    CHECK(sent == 9);
    CHECK(tx == nullptr);
    CHECK(vkp_mpsc_get_len(channel.rx) == 0);
}

TEST_CASE("mpsc api: a refused value stays the caller's: it is not dropped", "[mpsc]")
{
    Drops drops;
    vkp_mpsc_config config = config_of(1, nullptr);
    drops.on(&config);
    Channel channel(config);
    const uint64_t many[2] = {7, 8};
    size_t sent = 9;
    REQUIRE(channel.send(1) == VKP_OK);
    CHECK(channel.send(2) == VKP_ERR_TIMEOUT);
    CHECK(channel.try_send(3) == VKP_ERR_FULL);
    CHECK(vkp_mpsc_send_many(channel.tx, many, 2, 0, &sent) == VKP_ERR_TIMEOUT);
    CHECK(sent == 9);
    CHECK(channel.next() == 1);
    vkp_mpsc_close(channel.rx);
    CHECK(channel.send(4, VKP_FOREVER) == VKP_ERR_CLOSED);
    CHECK(channel.try_send(5) == VKP_ERR_CLOSED);
    CHECK(vkp_mpsc_send_many(channel.tx, many, 2, VKP_FOREVER, &sent) == VKP_ERR_CLOSED);
    CHECK(sent == 9);
    channel.drop_receiver();
    CHECK(channel.try_send(6) == VKP_ERR_CLOSED);
    channel.leave();
    CHECK(drops.count.load() == 0);
}

TEST_CASE("mpsc api: try_recv tells nothing yet from never again", "[mpsc]")
{
    Channel channel(config_of(0, nullptr));
    uint64_t value = 0;
    size_t count = 0;
    const void *item = nullptr;
    CHECK(channel.try_recv(&value) == VKP_ERR_EMPTY);
    CHECK(vkp_mpsc_peek(channel.rx, &item) == VKP_ERR_EMPTY);
    CHECK(vkp_mpsc_recv(channel.rx, 0, &value) == VKP_ERR_TIMEOUT);
    CHECK(channel.try_send(5) == VKP_OK);
    channel.leave();
    CHECK(channel.try_recv(&value) == VKP_OK);
    CHECK(value == 5);
    CHECK(channel.try_recv(&value) == VKP_ERR_CLOSED);
    CHECK(vkp_mpsc_peek(channel.rx, &item) == VKP_ERR_CLOSED);
    CHECK(vkp_mpsc_recv(channel.rx, VKP_FOREVER, &value) == VKP_ERR_CLOSED);
    CHECK(vkp_mpsc_recv_many(channel.rx, VKP_FOREVER, &value, 1, &count) == VKP_ERR_CLOSED);
    CHECK(value == 5);
    CHECK(item == nullptr);
}

TEST_CASE("mpsc api: peek shows the oldest value and leaves it there", "[mpsc]")
{
    Channel channel(config_of(3, nullptr));
    const void *item = nullptr;
    for (uint64_t i = 1; i <= 3; i++) {
        REQUIRE(channel.try_send(i) == VKP_OK);
    }
    for (uint64_t i = 1; i <= 3; i++) {
        REQUIRE(vkp_mpsc_peek(channel.rx, &item) == VKP_OK);
        CHECK(*static_cast<const uint64_t *>(item) == i);
        CHECK(channel.try_send(9) == VKP_ERR_FULL);
        CHECK(vkp_mpsc_get_len(channel.rx) == 3);
        REQUIRE(vkp_mpsc_peek(channel.rx, &item) == VKP_OK);
        CHECK(*static_cast<const uint64_t *>(item) == i);
        CHECK(channel.next() == i);
        CHECK(channel.try_send(i + 3) == VKP_OK);
    }
}

TEST_CASE("mpsc api: len, room and capacity agree, reserved places included", "[mpsc]")
{
    Channel bounded(config_of(4, nullptr));
    vkp_mpsc_permit permit;
    CHECK(vkp_mpsc_get_capacity(bounded.tx) == 4);
    for (uint64_t lap = 0; lap < 5; lap++) {
        CHECK(vkp_mpsc_get_len(bounded.rx) == 0);
        CHECK(vkp_mpsc_get_room(bounded.tx) == 4);
        CHECK(bounded.try_send(1) == VKP_OK);
        CHECK(vkp_mpsc_try_reserve(bounded.tx, &permit) == VKP_OK);
        CHECK(vkp_mpsc_get_len(bounded.rx) == 2);
        CHECK(vkp_mpsc_get_room(bounded.tx) == 2);
        CHECK(bounded.next() == 1);
        CHECK(bounded.next() == UINT64_MAX);
        CHECK(vkp_mpsc_get_len(bounded.rx) == 1);
        CHECK(vkp_mpsc_get_room(bounded.tx) == 3);
        vkp_mpsc_abort(&permit);
        CHECK(bounded.next() == UINT64_MAX);
    }
    CHECK(vkp_mpsc_get_capacity(bounded.tx) == 4);

    Channel unbounded(config_of(0, nullptr));
    CHECK(vkp_mpsc_get_capacity(unbounded.tx) == 0);
    CHECK(vkp_mpsc_get_room(unbounded.tx) == SIZE_MAX);
    CHECK(unbounded.try_send(1) == VKP_OK);
    CHECK(vkp_mpsc_get_room(unbounded.tx) == SIZE_MAX);
    CHECK(vkp_mpsc_get_len(unbounded.rx) == 1);
}

TEST_CASE("mpsc api: references are counted, strong and weak", "[mpsc]")
{
    Channel channel(config_of(0, nullptr));
    CHECK(vkp_mpsc_get_senders(channel.tx) == 1);
    CHECK(vkp_mpsc_get_weak_senders(channel.tx) == 0);
    vkp_mpsc_tx *clone = nullptr;
    REQUIRE(vkp_mpsc_tx_clone(channel.tx, &clone) == VKP_OK);
    CHECK(clone == channel.tx);
    CHECK(vkp_mpsc_tx_ref(channel.tx) == channel.tx);
    CHECK(vkp_mpsc_get_senders(channel.tx) == 3);
    vkp_mpsc_weak *weak = vkp_mpsc_downgrade(channel.tx);
    vkp_mpsc_weak *other = vkp_mpsc_downgrade(clone);
    CHECK(vkp_mpsc_get_senders(channel.tx) == 3);
    CHECK(vkp_mpsc_get_weak_senders(channel.tx) == 2);
    vkp_mpsc_tx *again = nullptr;
    REQUIRE(vkp_mpsc_upgrade(weak, &again) == VKP_OK);
    CHECK(vkp_mpsc_get_senders(channel.tx) == 4);
    CHECK(vkp_mpsc_get_weak_senders(channel.tx) == 2);
    vkp_mpsc_weak_unref(weak);
    vkp_mpsc_weak_unref(other);
    CHECK(vkp_mpsc_get_weak_senders(channel.tx) == 0);
    vkp_mpsc_tx_unref(again);
    vkp_mpsc_tx_unref(clone);
    vkp_mpsc_tx_unref(clone);
    CHECK(vkp_mpsc_get_senders(channel.tx) == 1);
    CHECK(channel.try_send(1) == VKP_OK);
    CHECK(channel.next() == 1);
}

TEST_CASE("mpsc api: a weak sender keeps nothing open, and is nobody once the last has gone",
          "[mpsc]")
{
    Env counted;
    {
        Channel channel(config_of(0, counted.env()));
        vkp_mpsc_weak *weak = vkp_mpsc_downgrade(channel.tx);
        vkp_mpsc_tx *tx = nullptr;
        uint64_t value = 0;
        REQUIRE(vkp_mpsc_upgrade(weak, &tx) == VKP_OK);
        channel.leave();
        CHECK(channel.try_recv(&value) == VKP_ERR_EMPTY);
        CHECK(vkp_mpsc_send(tx, &value, 0) == VKP_OK);
        vkp_mpsc_tx_unref(tx);
        tx = nullptr;
        CHECK(vkp_mpsc_upgrade(weak, &tx) == VKP_ERR_CLOSED);
        CHECK(tx == nullptr);
        CHECK(channel.try_recv(&value) == VKP_OK);
        CHECK(channel.try_recv(&value) == VKP_ERR_CLOSED);
        channel.drop_receiver();
        CHECK(counted.blocks() > 0);
        CHECK(vkp_mpsc_upgrade(weak, &tx) == VKP_ERR_CLOSED);
        vkp_mpsc_weak_unref(weak);
    }
    CHECK(counted.blocks() == 0);
}

TEST_CASE("mpsc api: a weak sender upgrades after the receiver closed, to one that sends nothing",
          "[mpsc]")
{
    Channel channel(config_of(1, nullptr));
    vkp_mpsc_weak *weak = vkp_mpsc_downgrade(channel.tx);
    vkp_mpsc_close(channel.rx);
    vkp_mpsc_tx *tx = nullptr;
    REQUIRE(vkp_mpsc_upgrade(weak, &tx) == VKP_OK);
    uint64_t value = 1;
    CHECK(vkp_mpsc_send(tx, &value, VKP_FOREVER) == VKP_ERR_CLOSED);
    vkp_mpsc_tx_unref(tx);
    vkp_mpsc_weak_unref(weak);
}

TEST_CASE("mpsc api: threads: an upgrade meets the last sender's end: a sender, or CLOSED",
          "[mpsc][threads]")
{
    ON_EVERY_BUILD;
    int upgraded = 0;
    int refused = 0;
    for (int round = 0; round < 300; round++) {
        Channel channel(config_of(0, &env));
        vkp_mpsc_weak *weak = vkp_mpsc_downgrade(channel.tx);
        vkp_status status = VKP_ERR_INVALID;
        vkp_status sent = VKP_ERR_INVALID;
        std::thread other([&] {
            vkp_mpsc_tx *tx = nullptr;
            uint64_t value = 5;
            for (volatile int i = 0; i < round % 30 * 20; i = i + 1) {
            }
            status = vkp_mpsc_upgrade(weak, &tx);
            if (status == VKP_OK) {
                sent = vkp_mpsc_try_send(tx, &value);
                vkp_mpsc_tx_unref(tx);
            }
            vkp_mpsc_weak_unref(weak);
        });
        channel.leave();
        uint64_t value = 0;
        const vkp_status received = vkp_mpsc_recv(channel.rx, VKP_FOREVER, &value);
        other.join();
        if (status == VKP_OK) {
            upgraded++;
            REQUIRE(sent == VKP_OK);
            REQUIRE(received == VKP_OK);
            REQUIRE(value == 5);
            REQUIRE(channel.try_recv(&value) == VKP_ERR_CLOSED);
        } else {
            refused++;
            REQUIRE(status == VKP_ERR_CLOSED);
            REQUIRE(received == VKP_ERR_CLOSED);
        }
    }
    CHECK(upgraded + refused == 300);
}

TEST_CASE("mpsc api: is_closed is the receiver's close to senders, either end to the receiver",
          "[mpsc]")
{
    Channel closed(config_of(2, nullptr));
    CHECK_FALSE(vkp_mpsc_is_closed(closed.tx));
    CHECK_FALSE(vkp_mpsc_rx_is_closed(closed.rx));
    CHECK(closed.try_send(1) == VKP_OK);
    vkp_mpsc_close(closed.rx);
    CHECK(vkp_mpsc_is_closed(closed.tx));
    CHECK(vkp_mpsc_rx_is_closed(closed.rx));
    vkp_mpsc_close(closed.rx);
    CHECK(vkp_mpsc_is_closed(closed.tx));
    CHECK(closed.next() == 1);

    Channel dropped(config_of(2, nullptr));
    dropped.drop_receiver();
    CHECK(vkp_mpsc_is_closed(dropped.tx));

    Channel orphaned(config_of(2, nullptr));
    vkp_mpsc_tx *second = vkp_mpsc_tx_ref(orphaned.tx);
    orphaned.leave();
    CHECK_FALSE(vkp_mpsc_rx_is_closed(orphaned.rx));
    vkp_mpsc_tx_unref(second);
    CHECK(vkp_mpsc_rx_is_closed(orphaned.rx));
}

TEST_CASE("mpsc api: recv_many takes what is there and waits for the first only", "[mpsc][threads]")
{
    ON_EVERY_BUILD;
    Channel channel(config_of(0, &env));
    uint64_t out[8] = {0};
    size_t count = 99;
    CHECK(vkp_mpsc_recv_many(channel.rx, 0, out, 8, &count) == VKP_ERR_TIMEOUT);
    CHECK(count == 99);
    for (uint64_t i = 0; i < 11; i++) {
        REQUIRE(channel.try_send(i) == VKP_OK);
    }
    REQUIRE(vkp_mpsc_recv_many(channel.rx, VKP_FOREVER, out, 8, &count) == VKP_OK);
    CHECK(count == 8);
    CHECK(out[7] == 7);
    REQUIRE(vkp_mpsc_recv_many(channel.rx, VKP_FOREVER, out, 8, &count) == VKP_OK);
    CHECK(count == 3);
    CHECK(out[2] == 10);
    vkp_test_waiting receiver(
        [&] { return vkp_mpsc_recv_many(channel.rx, VKP_FOREVER, out, 8, &count); });
    REQUIRE(channel.try_send(11) == VKP_OK);
    CHECK(receiver.join() == VKP_OK);
    CHECK(count == 1);
    CHECK(out[0] == 11);
}

// ---------------------------------------------------------------------------------------------
// The three ways of waiting

TEST_CASE("mpsc api: recv: a try, a deadline, a wait that send ends", "[mpsc][threads]")
{
    ON_EVERY_BUILD;
    for (size_t capacity : {size_t{0}, size_t{1}}) {
        Channel channel(config_of(capacity, &env));
        uint64_t value = 0;
        CHECK(channel.try_recv(&value) == VKP_ERR_EMPTY);
        const uint64_t deadline = vkp_after_ms(2);
        CHECK(vkp_mpsc_recv(channel.rx, deadline, &value) == VKP_ERR_TIMEOUT);
        CHECK(vkp_now_ns() >= deadline);
        for (uint64_t i = 1; i <= 20; i++) {
            vkp_test_waiting receiver(
                [&] { return vkp_mpsc_recv(channel.rx, VKP_FOREVER, &value); });
            switch (i % 3) {
            case 0:
                REQUIRE(channel.try_send(i) == VKP_OK);
                break;
            case 1: {
                size_t sent = 0;
                REQUIRE(vkp_mpsc_send_many(channel.tx, &i, 1, 0, &sent) == VKP_OK);
                break;
            }
            default: {
                vkp_mpsc_permit permit;
                REQUIRE(vkp_mpsc_try_reserve(channel.tx, &permit) == VKP_OK);
                *static_cast<uint64_t *>(permit.item) = i;
                vkp_mpsc_commit(&permit);
                break;
            }
            }
            REQUIRE(receiver.join() == VKP_OK);
            REQUIRE(value == i);
            // One sleep was enough: the wait does not end before there is something.
            REQUIRE(receiver.parks() == 1);
        }
    }
}

TEST_CASE("mpsc api: room: a try, a deadline, a wait that recv ends", "[mpsc][threads]")
{
    ON_EVERY_BUILD;
    for (const bool reserving : {false, true}) {
        for (size_t capacity : {size_t{1}, size_t{3}, size_t{40}}) {
            INFO("reserving " << reserving << " capacity " << capacity);
            Channel channel(config_of(capacity, &env));
            vkp_mpsc_permit permit;
            uint64_t next = 0;
            uint64_t expected = 0;
            for (; next < capacity; next++) {
                REQUIRE(channel.try_send(next) == VKP_OK);
            }
            if (reserving) {
                CHECK(vkp_mpsc_try_reserve(channel.tx, &permit) == VKP_ERR_FULL);
                CHECK(vkp_mpsc_reserve(channel.tx, 0, &permit) == VKP_ERR_TIMEOUT);
            } else {
                CHECK(channel.try_send(next) == VKP_ERR_FULL);
                CHECK(channel.send(next, 0) == VKP_ERR_TIMEOUT);
            }
            const uint64_t deadline = vkp_after_ms(2);
            CHECK((reserving ? vkp_mpsc_reserve(channel.tx, deadline, &permit)
                             : channel.send(next, deadline)) == VKP_ERR_TIMEOUT);
            CHECK(vkp_now_ns() >= deadline);
            for (int i = 0; i < 10; i++, next++) {
                vkp_test_waiting sender([&] {
                    if (!reserving) {
                        return vkp_mpsc_send(channel.tx, &next, VKP_FOREVER);
                    }
                    const vkp_status status = vkp_mpsc_reserve(channel.tx, VKP_FOREVER, &permit);
                    if (status == VKP_OK) {
                        *static_cast<uint64_t *>(permit.item) = next;
                        vkp_mpsc_commit(&permit);
                    }
                    return status;
                });
                // The room goes to the waiting sender and to nobody else, however it is asked for.
                REQUIRE(channel.try_send(999) == VKP_ERR_FULL);
                REQUIRE(channel.next() == expected++);
                REQUIRE(sender.join() == VKP_OK);
                REQUIRE(sender.parks() == 1);
                REQUIRE(vkp_mpsc_get_len(channel.rx) == capacity);
            }
            while (expected < next) {
                REQUIRE(channel.next() == expected++);
            }
        }
    }
}

TEST_CASE("mpsc api: wait_closed: a try, a deadline, a wait that the receiver's end ends",
          "[mpsc][threads]")
{
    ON_EVERY_BUILD;
    for (const bool dropping : {false, true}) {
        Channel channel(config_of(1, &env));
        CHECK(vkp_mpsc_wait_closed(channel.tx, 0) == VKP_ERR_TIMEOUT);
        const uint64_t deadline = vkp_after_ms(2);
        CHECK(vkp_mpsc_wait_closed(channel.tx, deadline) == VKP_ERR_TIMEOUT);
        CHECK(vkp_now_ns() >= deadline);
        vkp_test_waiting first([&] { return vkp_mpsc_wait_closed(channel.tx, VKP_FOREVER); });
        vkp_test_waiting second([&] { return vkp_mpsc_wait_closed(channel.tx, VKP_FOREVER); });
        CHECK(channel.try_send(1) == VKP_OK);
        CHECK(channel.next() == 1);
        if (dropping) {
            channel.drop_receiver();
        } else {
            vkp_mpsc_close(channel.rx);
        }
        CHECK(first.join() == VKP_OK);
        CHECK(second.join() == VKP_OK);
        CHECK(first.parks() == 1);
        CHECK(vkp_mpsc_wait_closed(channel.tx, 0) == VKP_OK);
        CHECK(vkp_mpsc_wait_closed(channel.tx, VKP_FOREVER) == VKP_OK);
    }
}

TEST_CASE("mpsc api: an end wakes whoever waits for a value or for room", "[mpsc][threads]")
{
    ON_EVERY_BUILD;
    uint64_t value = 0;
    {
        Channel channel(config_of(1, &env));
        vkp_test_waiting receiver([&] { return vkp_mpsc_recv(channel.rx, VKP_FOREVER, &value); });
        channel.leave();
        CHECK(receiver.join() == VKP_ERR_CLOSED);
    }
    {
        Channel channel(config_of(1, &env));
        vkp_test_waiting receiver([&] { return vkp_mpsc_recv(channel.rx, VKP_FOREVER, &value); });
        vkp_mpsc_close(channel.rx);
        CHECK(receiver.join() == VKP_ERR_CLOSED);
    }
    for (const bool dropping : {false, true}) {
        Channel channel(config_of(1, &env));
        const uint64_t many[2] = {8, 9};
        size_t sent = 0;
        vkp_mpsc_permit permit;
        REQUIRE(channel.try_send(1) == VKP_OK);
        const auto sender = waiting_send(channel.tx, 2);
        vkp_test_waiting reserver(
            [&] { return vkp_mpsc_reserve(channel.tx, VKP_FOREVER, &permit); });
        vkp_test_waiting several(
            [&] { return vkp_mpsc_send_many(channel.tx, many, 2, VKP_FOREVER, &sent); });
        if (dropping) {
            channel.drop_receiver();
        } else {
            vkp_mpsc_close(channel.rx);
            CHECK(channel.next() == 1);
            CHECK(channel.try_recv(&value) == VKP_ERR_CLOSED);
        }
        CHECK(sender->join() == VKP_ERR_CLOSED);
        CHECK(reserver.join() == VKP_ERR_CLOSED);
        CHECK(several.join() == VKP_ERR_CLOSED);
        CHECK(sent == 0);
    }
}

TEST_CASE("mpsc api: a receiver under watch: called for each value, for the end, else never",
          "[mpsc][loop]")
{
    ON_EVERY_BACKEND;
    ON_EVERY_BUILD;
    vkp_test_loop loop(backend, env.sys);
    Channel channel(config_of(0, &env));
    std::vector<uint64_t> got;
    int ends = 0;
    vkp_handler *handler = nullptr;
    std::function<void()> fn = [&] {
        uint64_t value = 0;
        const vkp_status status = channel.try_recv(&value);
        if (status == VKP_OK) {
            got.push_back(value);
        } else {
            ends += status == VKP_ERR_CLOSED ? 1 : 1000;
            vkp_handler_close(handler);
        }
    };
    const auto call = [](void *user) { (*static_cast<std::function<void()> *>(user))(); };
    REQUIRE(channel.try_send(0) == VKP_OK); // was there before the watch
    REQUIRE(vkp_test_handle(loop, channel.rx, call, &fn, &handler) == VKP_OK);
    vkp_test_run_until(loop, "the value before", [&] { return got.size() == 1; });
    vkp_test_settle(loop);
    CHECK(got.size() == 1);
    for (uint64_t i = 1; i <= 3; i++) { // from this thread, and from another while the loop waits
        REQUIRE(channel.try_send(i) == VKP_OK);
        vkp_test_run_until(loop, "a value", [&] { return got.size() == i + 1; });
        vkp_test_settle(loop);
    }
    std::thread sender([&] {
        for (uint64_t i = 4; i < 200; i++) {
            if (channel.try_send(i) != VKP_OK) {
                vkp_test_fail("a value was refused");
            }
        }
    });
    vkp_test_run_until(loop, "many values", [&] { return got.size() == 200; });
    sender.join();
    vkp_handler_close(handler);
    vkp_handler_close(handler);
    REQUIRE(channel.try_send(200) == VKP_OK);
    vkp_test_settle(loop);
    CHECK(got.size() == 200);
    vkp_handler_unref(handler);
    REQUIRE(vkp_test_handle(loop, channel.rx, call, &fn, &handler) == VKP_OK);
    channel.leave();
    vkp_test_run_until(loop, "the end", [&] { return ends > 0; });
    vkp_test_settle(loop);
    vkp_handler_unref(handler);
    CHECK(ends == 1);
    REQUIRE(got.size() == 201);
    for (uint64_t i = 0; i <= 200; i++) {
        CHECK(got[static_cast<size_t>(i)] == i);
    }
}

TEST_CASE("mpsc api: a watch stays silent behind a reserved place, and speaks at its commit",
          "[mpsc][loop]")
{
    ON_EVERY_BACKEND;
    vkp_test_loop loop(backend);
    Channel channel(config_of(4, nullptr));
    vkp_test_handler watch(loop, vkp_case_mpsc_recv(channel.rx, nullptr),
                           [&] { (void)channel.next(); });
    REQUIRE(watch.status == VKP_OK);
    vkp_mpsc_permit permits[2];
    REQUIRE(vkp_mpsc_try_reserve(channel.tx, &permits[0]) == VKP_OK);
    REQUIRE(vkp_mpsc_try_reserve(channel.tx, &permits[1]) == VKP_OK);
    REQUIRE(channel.try_send(3) == VKP_OK);
    vkp_test_settle(loop);
    CHECK(watch.calls == 0);
    vkp_mpsc_abort(&permits[0]);
    vkp_test_settle(loop);
    CHECK(watch.calls == 0);
    *static_cast<uint64_t *>(permits[1].item) = 2;
    vkp_mpsc_commit(&permits[1]);
    vkp_test_run_until(loop, "both values", [&] { return vkp_mpsc_get_len(channel.rx) == 0; });
    CHECK(watch.calls == 2);
}

TEST_CASE("mpsc api: a sender's watch is called while there may be room, and at the close",
          "[mpsc][loop]")
{
    ON_EVERY_BACKEND;
    ON_EVERY_BUILD;
    for (const bool reserving : {false, true}) {
        for (size_t capacity : {size_t{0}, size_t{1}, size_t{5}}) {
            INFO("reserving " << reserving << " capacity " << capacity);
            vkp_test_loop loop(backend, env.sys);
            Channel channel(config_of(capacity, &env));
            const uint64_t item = 7;
            vkp_mpsc_permit permit;
            uint64_t sent = 0;
            vkp_status last = VKP_OK;
            const uint64_t most = capacity != 0 ? capacity : 30;
            std::unique_ptr<vkp_test_handler> watch;
            watch = std::make_unique<vkp_test_handler>(
                loop,
                reserving ? vkp_case_mpsc_reserve(channel.tx, &permit)
                          : vkp_case_mpsc_send(channel.tx, &item),
                [&] {
                    last = channel.try_send(sent);
                    sent += last == VKP_OK ? 1 : 0;
                    if (last == VKP_ERR_CLOSED || (capacity == 0 && sent == most)) {
                        watch->stop();
                    }
                });
            REQUIRE(watch->status == VKP_OK);
            vkp_test_run_until(loop, "a full channel", [&] { return sent == most; });
            vkp_test_settle(loop);
            CHECK(sent == most);
            if (capacity == 0) {
                continue;
            }
            const int calls = watch->calls;
            vkp_test_settle(loop);
            CHECK(watch->calls == calls);
            std::thread receiver([&] {
                uint64_t value = 0;
                for (uint64_t i = 0; i < 50; i++) {
                    if (vkp_mpsc_recv(channel.rx, VKP_FOREVER, &value) != VKP_OK || value != i) {
                        vkp_test_fail("not the next value");
                    }
                }
            });
            vkp_test_run_until(loop, "room again", [&] { return sent == 50 + capacity; });
            receiver.join();
            vkp_mpsc_close(channel.rx);
            vkp_test_run_until(loop, "the close", [&] { return last == VKP_ERR_CLOSED; });
        }
    }
}

TEST_CASE("mpsc api: a sender's watch stands in line, and gives its place up when it ends",
          "[mpsc][loop][threads]")
{
    ON_EVERY_BACKEND;
    ON_EVERY_BUILD;
    vkp_test_loop loop(backend, env.sys);
    Channel channel(config_of(1, &env));
    const uint64_t item = 7;
    REQUIRE(channel.try_send(0) == VKP_OK);
    vkp_test_handler watch(loop, vkp_case_mpsc_send(channel.tx, &item), [] {});
    REQUIRE(watch.status == VKP_OK);
    const auto behind = waiting_send(channel.tx, 1);
    CHECK(channel.next() == 0);
    CHECK(vkp_mpsc_get_len(channel.rx) == 0); // the place is the watch's, until it does not want it
    watch.stop();
    CHECK(behind->join() == VKP_OK);
    CHECK(watch.calls == 0);
    CHECK(channel.next() == 1);
}

TEST_CASE("mpsc api: a watch for the receiver's end is called then, not before", "[mpsc][loop]")
{
    ON_EVERY_BACKEND;
    for (const bool dropping : {false, true}) {
        vkp_test_loop loop(backend);
        Channel channel(config_of(1, nullptr));
        vkp_test_handler watch(loop, vkp_case_mpsc_closed(channel.tx), [] {});
        REQUIRE(watch.status == VKP_OK);
        REQUIRE(channel.try_send(1) == VKP_OK);
        REQUIRE(channel.next() == 1);
        vkp_test_settle(loop);
        CHECK(watch.calls == 0);
        std::thread other([&] {
            if (dropping) {
                channel.drop_receiver();
            } else {
                vkp_mpsc_close(channel.rx);
            }
        });
        vkp_test_run_until(loop, "the receiver's end", [&] { return watch.calls > 0; });
        other.join();
        watch.stop();
        const int calls = watch.calls;
        vkp_test_settle(loop);
        CHECK(watch.calls == calls);
        vkp_test_handler late(loop, vkp_case_mpsc_closed(channel.tx), [] {});
        vkp_test_run_until(loop, "an end before the watch", [&] { return late.calls > 0; });
    }
}

TEST_CASE("mpsc api: a case of nothing never wins, and its watch is never called", "[mpsc][loop]")
{
    ON_EVERY_BACKEND;
    vkp_test_loop loop(backend);
    uint64_t value = 0;
    Channel channel(config_of(1, nullptr));
    for (const vkp_case &what :
         {vkp_case_mpsc_recv(nullptr, &value), vkp_case_mpsc_send(nullptr, &value),
          vkp_case_mpsc_send(channel.tx, nullptr), vkp_case_mpsc_reserve(nullptr, nullptr),
          vkp_case_mpsc_closed(nullptr), vkp_case_never()}) {
        vkp_test_handler watch(loop, what, [] {});
        CHECK(watch.status == VKP_OK);
        vkp_test_settle(loop);
        CHECK(watch.calls == 0);
    }
}

// ---------------------------------------------------------------------------------------------
// Permits

TEST_CASE("mpsc api: reserved places are received in their order, committed in any", "[mpsc]")
{
    ON_EVERY_BUILD;
    for (size_t capacity : {size_t{0}, size_t{6}}) {
        Channel channel(config_of(capacity, &env));
        const size_t orders[4][6] = {
            {0, 1, 2, 3, 4, 5}, {5, 4, 3, 2, 1, 0}, {3, 0, 5, 1, 4, 2}, {1, 0, 3, 2, 5, 4}};
        for (const auto &order : orders) {
            vkp_mpsc_permit permits[6];
            for (vkp_mpsc_permit &permit : permits) {
                REQUIRE(vkp_mpsc_try_reserve(channel.tx, &permit) == VKP_OK);
            }
            std::vector<bool> done(6, false);
            uint64_t expected = 0;
            for (const size_t at : order) {
                *static_cast<uint64_t *>(permits[at].item) = at;
                vkp_mpsc_commit(&permits[at]);
                done[at] = true;
                while (expected < 6 && done[static_cast<size_t>(expected)]) {
                    REQUIRE(channel.next() == expected++);
                }
                REQUIRE(channel.next() == UINT64_MAX); // behind a place that is open
            }
            REQUIRE(expected == 6);
        }
    }
}

TEST_CASE("mpsc api: an aborted place is skipped; its room is back when the receiver was there",
          "[mpsc]")
{
    Drops drops;
    vkp_mpsc_config config = config_of(2, nullptr);
    drops.on(&config);
    Channel channel(config);
    vkp_mpsc_permit permit;
    for (uint64_t lap = 0; lap < 10; lap++) {
        REQUIRE(vkp_mpsc_try_reserve(channel.tx, &permit) == VKP_OK);
        REQUIRE(channel.try_send(lap) == VKP_OK);
        CHECK(channel.try_send(99) == VKP_ERR_FULL);
        vkp_mpsc_abort(&permit);
        CHECK(channel.next() == lap);
        CHECK(channel.next() == UINT64_MAX);
        CHECK(vkp_mpsc_get_room(channel.tx) == 2);
        // Alone, without a value behind it; looking is enough.
        REQUIRE(vkp_mpsc_try_reserve(channel.tx, &permit) == VKP_OK);
        vkp_mpsc_abort(&permit);
        const void *item = nullptr;
        CHECK(vkp_mpsc_peek(channel.rx, &item) == VKP_ERR_EMPTY);
        CHECK(vkp_mpsc_get_room(channel.tx) == 2);
    }
    REQUIRE(vkp_mpsc_try_reserve(channel.tx, &permit) == VKP_OK);
    vkp_mpsc_abort(&permit);
    channel.leave();
    channel.drop_receiver();
    CHECK(drops.count.load() == 0);
}

TEST_CASE("mpsc api: a permit that was used, is zero or NULL changes nothing", "[mpsc]")
{
    ON_EVERY_BUILD;
    for (const bool commits : {false, true}) {
        Drops drops;
        vkp_mpsc_config config = config_of(2, &env);
        drops.on(&config);
        Channel channel(config);
        vkp_mpsc_permit permit = VKP_ZERO;
        vkp_mpsc_commit(nullptr);
        vkp_mpsc_abort(nullptr);
        vkp_mpsc_commit(&permit);
        vkp_mpsc_abort(&permit);
        for (uint64_t lap = 0; lap < 10; lap++) {
            REQUIRE(vkp_mpsc_try_reserve(channel.tx, &permit) == VKP_OK);
            *static_cast<uint64_t *>(permit.item) = 1;
            if (commits) {
                vkp_mpsc_commit(&permit);
            } else {
                vkp_mpsc_abort(&permit);
            }
            CHECK(permit.item == nullptr);
            CHECK(channel.next() == (commits ? 1 : UINT64_MAX));
            // The places are others' now: whichever call comes late leaves them alone.
            REQUIRE(channel.try_send(10) == VKP_OK);
            REQUIRE(channel.try_send(11) == VKP_OK);
            vkp_mpsc_abort(&permit);
            vkp_mpsc_commit(&permit);
            CHECK(channel.next() == 10);
            CHECK(channel.next() == 11);
            CHECK(vkp_mpsc_get_len(channel.rx) == 0);
        }
        CHECK(drops.count.load() == 0);
    }
}

TEST_CASE("mpsc api: an aborted place lets the sender behind it in", "[mpsc][threads]")
{
    ON_EVERY_BUILD;
    for (const bool awake : {false, true}) {
        Channel channel(config_of(1, &env));
        vkp_mpsc_permit permit;
        uint64_t value = 0;
        REQUIRE(vkp_mpsc_try_reserve(channel.tx, &permit) == VKP_OK);
        const auto sender = waiting_send(channel.tx, 4);
        if (awake) { // the receiver comes by later
            vkp_mpsc_abort(&permit);
            CHECK(vkp_mpsc_recv(channel.rx, VKP_FOREVER, &value) == VKP_OK);
        } else { // the receiver sleeps behind the place
            vkp_test_waiting receiver(
                [&] { return vkp_mpsc_recv(channel.rx, VKP_FOREVER, &value); });
            vkp_mpsc_abort(&permit);
            CHECK(receiver.join() == VKP_OK);
        }
        CHECK(sender->join() == VKP_OK);
        CHECK(value == 4);
    }
}

TEST_CASE("mpsc api: lanes: whichever call passes an aborted place, its lane's sender is let in",
          "[mpsc][threads]")
{
    ON_EVERY_BUILD;
    // The one call of a receiver that finds an aborted place and, in another lane, a value.
    const auto calls = std::vector<std::function<vkp_status(vkp_mpsc_rx *)>>{
        [](vkp_mpsc_rx *rx) {
            uint64_t value = 0;
            return vkp_mpsc_recv(rx, VKP_FOREVER, &value);
        },
        [](vkp_mpsc_rx *rx) {
            uint64_t value = 0;
            return vkp_mpsc_recv(rx, 0, &value);
        },
        [](vkp_mpsc_rx *rx) {
            uint64_t value = 0;
            return vkp_mpsc_try_recv(rx, &value);
        },
        [](vkp_mpsc_rx *rx) {
            uint64_t values[2];
            size_t count = 0;
            return vkp_mpsc_recv_many(rx, VKP_FOREVER, values, 2, &count);
        },
        [](vkp_mpsc_rx *rx) {
            const void *item = nullptr;
            return vkp_mpsc_peek(rx, &item);
        },
        [](vkp_mpsc_rx *rx) {
            uint64_t value = 0;
            size_t won = 0;
            vkp_case cases[] = {vkp_case_mpsc_recv(rx, &value)};
            return vkp_select(cases, 1, VKP_FOREVER, &won);
        },
    };
    for (size_t i = 0; i < calls.size(); i++) {
        for (const bool first_lane : {false, true}) {
            INFO("call " << i << ", the place in the first lane: " << first_lane);
            vkp_test_watchdog watchdog;
            vkp_mpsc_config config = config_of(1, &env);
            config.lanes = true;
            Channel channel(config);
            vkp_mpsc_tx *clone = nullptr;
            REQUIRE(vkp_mpsc_tx_clone(channel.tx, &clone) == VKP_OK);
            vkp_mpsc_tx *full = first_lane ? channel.tx : clone;
            vkp_mpsc_tx *other = first_lane ? clone : channel.tx;
            vkp_mpsc_permit permit;
            uint64_t value = 1;
            if (!first_lane) { // the receiver looks into this lane first
                REQUIRE(vkp_mpsc_try_send(full, &value) == VKP_OK);
                REQUIRE(channel.next() == 1);
            }
            REQUIRE(vkp_mpsc_try_reserve(full, &permit) == VKP_OK);
            const auto sender = waiting_send(full, 4);
            vkp_mpsc_abort(&permit);
            REQUIRE(vkp_mpsc_try_send(other, &value) == VKP_OK);
            CHECK(calls[i](channel.rx) == VKP_OK);
            CHECK(sender->join() == VKP_OK); // without another call of the receiver
            vkp_mpsc_tx_unref(clone);
        }
    }
}

TEST_CASE("mpsc api: reserve is INVALID where values cost bytes: no value, no cost", "[mpsc]")
{
    vkp_mpsc_config config = config_of(4, nullptr);
    config.capacity_bytes = 64;
    Channel channel(config);
    vkp_mpsc_permit permit;
    CHECK(vkp_mpsc_reserve(channel.tx, VKP_FOREVER, &permit) == VKP_ERR_INVALID);
    CHECK(vkp_mpsc_try_reserve(channel.tx, &permit) == VKP_ERR_INVALID);
    CHECK(vkp_mpsc_get_len(channel.rx) == 0);
}

TEST_CASE("mpsc api: a place reserved before the close is still received", "[mpsc][threads]")
{
    ON_EVERY_BUILD;
    Drops drops;
    vkp_mpsc_config config = config_of(4, &env);
    drops.on(&config);
    Channel channel(config);
    vkp_mpsc_permit permits[2];
    uint64_t value = 0;
    REQUIRE(channel.try_send(1) == VKP_OK);
    REQUIRE(vkp_mpsc_try_reserve(channel.tx, &permits[0]) == VKP_OK);
    REQUIRE(vkp_mpsc_try_reserve(channel.tx, &permits[1]) == VKP_OK);
    vkp_mpsc_close(channel.rx);
    vkp_mpsc_permit late;
    CHECK(vkp_mpsc_try_reserve(channel.tx, &late) == VKP_ERR_CLOSED);
    CHECK(channel.next() == 1);
    CHECK(channel.try_recv(&value) == VKP_ERR_EMPTY);
    CHECK(vkp_mpsc_recv(channel.rx, vkp_after_ms(1), &value) == VKP_ERR_TIMEOUT);
    {
        vkp_test_waiting receiver([&] { return vkp_mpsc_recv(channel.rx, VKP_FOREVER, &value); });
        *static_cast<uint64_t *>(permits[0].item) = 2;
        vkp_mpsc_commit(&permits[0]);
        CHECK(receiver.join() == VKP_OK);
        CHECK(value == 2);
    }
    vkp_test_waiting receiver([&] { return vkp_mpsc_recv(channel.rx, VKP_FOREVER, &value); });
    vkp_mpsc_abort(&permits[1]);
    CHECK(receiver.join() == VKP_ERR_CLOSED);
    CHECK(drops.count.load() == 0);
}

TEST_CASE("mpsc api: a value committed after the receiver went is dropped, once", "[mpsc]")
{
    ON_EVERY_BUILD;
    for (size_t capacity : {size_t{0}, size_t{40}}) {
        Drops drops;
        vkp_mpsc_config config = config_of(capacity, &env);
        drops.on(&config);
        Channel channel(config);
        std::vector<vkp_mpsc_permit> permits(30);
        for (uint64_t i = 0; i < 30; i++) { // across a growth of the queue
            REQUIRE(vkp_mpsc_try_reserve(channel.tx, &permits[static_cast<size_t>(i)]) == VKP_OK);
            if (i % 10 == 0) {
                REQUIRE(channel.try_send(1000) == VKP_OK);
            }
        }
        channel.drop_receiver();
        uint64_t committed = 0;
        uint64_t sum = 3000;
        for (uint64_t i = 30; i-- > 0;) {
            vkp_mpsc_permit &permit = permits[static_cast<size_t>(i)];
            if (i % 3 == 0) {
                vkp_mpsc_abort(&permit);
            } else {
                *static_cast<uint64_t *>(permit.item) = i;
                vkp_mpsc_commit(&permit);
                committed++;
                sum += i;
            }
        }
        CHECK(drops.count.load() == committed + 3);
        CHECK(drops.sum.load() == sum);
        channel.leave();
        CHECK(drops.count.load() == committed + 3);
    }
}

TEST_CASE("mpsc api: threads: a place is held while others send; then all arrive in order",
          "[mpsc][threads]")
{
    ON_EVERY_BUILD;
    Channel channel(config_of(0, &env));
    vkp_mpsc_permit permit;
    REQUIRE(vkp_mpsc_try_reserve(channel.tx, &permit) == VKP_OK);
    std::vector<std::thread> threads;
    for (uint64_t s = 1; s <= 2; s++) {
        threads.emplace_back([&, s] {
            for (uint64_t i = 0; i < 2000; i++) {
                const uint64_t value = value_of(s, i);
                if (vkp_mpsc_try_send(channel.tx, &value) != VKP_OK) {
                    vkp_test_fail("a value was refused");
                }
            }
        });
    }
    uint64_t value = 0;
    for (int i = 0; i < 100; i++) {
        REQUIRE(channel.try_recv(&value) == VKP_ERR_EMPTY);
    }
    for (std::thread &thread : threads) {
        thread.join();
    }
    CHECK(vkp_mpsc_get_len(channel.rx) == 4001);
    CHECK(channel.try_recv(&value) == VKP_ERR_EMPTY);
    *static_cast<uint64_t *>(permit.item) = value_of(0, 0);
    std::thread other([&] { vkp_mpsc_commit(&permit); }); // on a thread that did not reserve
    other.join();
    Sequences seen(3);
    REQUIRE(channel.try_recv(&value) == VKP_OK);
    CHECK(value == value_of(0, 0));
    while (channel.try_recv(&value) == VKP_OK) {
        seen.take(value);
    }
    CHECK(seen.received == 4000);
    CHECK(seen.disorder == 0);
}

// ---------------------------------------------------------------------------------------------
// Memory

TEST_CASE("mpsc api: memory comes with the values, many growths keep their order", "[mpsc][memory]")
{
    for (size_t elem : {size_t{8}, size_t{100}, size_t{4096}}) {
        Env counted;
        {
            Channel channel(config_of(0, counted.env(), elem));
            const size_t empty = counted.bytes();
            std::vector<unsigned char> item(elem);
            uint64_t next = 0;
            uint64_t expected = 0;
            uint64_t wrong = 0;
            const auto put = [&](uint64_t count) {
                for (; count > 0; count--, next++) {
                    std::memcpy(item.data(), &next, sizeof next);
                    if (vkp_mpsc_try_send(channel.tx, item.data()) != VKP_OK) {
                        vkp_test_fail("an unbounded channel refused");
                    }
                }
            };
            const auto take = [&](uint64_t count) {
                for (; count > 0; count--) {
                    uint64_t value = 0;
                    if (vkp_mpsc_try_recv(channel.rx, item.data()) != VKP_OK) {
                        vkp_test_fail("a value is missing");
                    }
                    std::memcpy(&value, item.data(), sizeof value);
                    wrong += value != expected++ ? 1 : 0;
                }
            };
            // Growths meet at every distance between head and tail.
            for (uint64_t round = 1; round < 60; round++) {
                put(round * 3);
                take(round);
            }
            take(next - expected);
            CHECK(wrong == 0);
            CHECK(vkp_mpsc_get_len(channel.rx) == 0);
            CHECK(counted.bytes() > empty);
        }
        CHECK(counted.blocks() == 0);
    }
}

// The calls of a receiver that take nothing from an empty channel, and do not wait.
struct Look {
    const char *name;
    vkp_status nothing;
    std::function<vkp_status(vkp_mpsc_rx *)> call;
};

static const std::vector<Look> looks = {
    {"try_recv", VKP_ERR_EMPTY,
     [](vkp_mpsc_rx *rx) {
         uint64_t value = 0;
         return vkp_mpsc_try_recv(rx, &value);
     }},
    {"recv", VKP_ERR_TIMEOUT,
     [](vkp_mpsc_rx *rx) {
         uint64_t value = 0;
         return vkp_mpsc_recv(rx, 0, &value);
     }},
    {"recv, a deadline that has passed", VKP_ERR_TIMEOUT,
     [](vkp_mpsc_rx *rx) {
         uint64_t value = 0;
         return vkp_mpsc_recv(rx, 1, &value);
     }},
    {"recv_many", VKP_ERR_TIMEOUT,
     [](vkp_mpsc_rx *rx) {
         uint64_t values[4];
         size_t count = 0;
         return vkp_mpsc_recv_many(rx, 0, values, 4, &count);
     }},
    {"peek", VKP_ERR_EMPTY,
     [](vkp_mpsc_rx *rx) {
         const void *item = nullptr;
         return vkp_mpsc_peek(rx, &item);
     }},
    {"select", VKP_ERR_TIMEOUT,
     [](vkp_mpsc_rx *rx) {
         uint64_t value = 0;
         size_t won = 0;
         vkp_case cases[] = {vkp_case_mpsc_recv(rx, &value)};
         return vkp_select(cases, 1, 0, &won);
     }},
};

TEST_CASE("mpsc api: a burst's memory goes back when the receiver finds nothing", "[mpsc][memory]")
{
    ON_EVERY_BUILD;
    (void)env;
    for (const Look &look : looks) {
        for (const bool lanes : {false, true}) {
            INFO(look.name << ", lanes " << lanes);
            Env counted(vkp_test_build_sys(build.fenced));
            counted.test.env.spins = VKP_SPINS_NONE;
            {
                vkp_mpsc_config config = config_of(0, counted.env());
                config.lanes = lanes;
                Channel channel(config);
                uint64_t value = 0;
                REQUIRE(channel.try_send(1) == VKP_OK);
                REQUIRE(channel.try_recv(&value) == VKP_OK);
                const size_t before = counted.bytes();
                for (int burst = 0; burst < 2; burst++) {
                    const uint64_t values = 100000;
                    uint64_t wrong = 0;
                    vkp_mpsc_tx *clone = nullptr;
                    REQUIRE(vkp_mpsc_tx_clone(channel.tx, &clone) == VKP_OK);
                    for (uint64_t i = 0; i < values; i++) {
                        wrong += vkp_mpsc_try_send(clone, &i) == VKP_OK ? 0 : 1;
                    }
                    CHECK(counted.bytes() >= values * 8);
                    for (uint64_t i = 0; i < values; i++) {
                        wrong += channel.next() == i ? 0 : 1;
                    }
                    CHECK(wrong == 0);
                    for (int i = 0; i < 64; i++) {
                        CHECK(look.call(channel.rx) == look.nothing);
                    }
                    // A ring of everyday size may stay, and the clone's lane; the megabytes are
                    // back.
                    CHECK(counted.bytes() <= before + 65536);
                    vkp_mpsc_tx_unref(clone);
                    CHECK(look.call(channel.rx) == look.nothing);
                    CHECK(counted.bytes() <= before + (lanes ? 0 : 65536));
                }
                REQUIRE(channel.try_send(7) == VKP_OK);
                CHECK(channel.next() == 7);
            }
            CHECK(counted.blocks() == 0);
        }
    }
}

TEST_CASE("mpsc api: a burst's memory goes back when a handler waits, at once", "[mpsc][memory]")
{
    ON_EVERY_BACKEND;
    Env counted;
    vkp_test_loop loop(backend);
    Channel channel(config_of(0, counted.env()));
    uint64_t received = 0;
    const size_t before = counted.bytes();
    for (uint64_t i = 0; i < 100000; i++) {
        REQUIRE(channel.try_send(i) == VKP_OK);
    }
    CHECK(counted.bytes() >= 800000);
    vkp_test_handler handler(loop, vkp_case_mpsc_recv(channel.rx, nullptr), [&] {
        for (int i = 0; i < 1000 && received < 100000; i++) {
            received += channel.next() == received ? 1 : 0;
        }
    });
    vkp_test_run_until(loop, "all values", [&] { return received == 100000; });
    vkp_test_settle(loop);
    CHECK(counted.bytes() <= before + 65536);
}

TEST_CASE("mpsc api: memory that is in use stays: a permit, a value that was peeked at",
          "[mpsc][memory]")
{
    ON_EVERY_BUILD;
    for (const Look &look : looks) {
        INFO(look.name);
        Channel channel(config_of(0, &env));
        vkp_mpsc_permit permit;
        const void *item = nullptr;
        for (uint64_t i = 0; i < 20000; i++) {
            REQUIRE(channel.try_send(i) == VKP_OK);
        }
        REQUIRE(vkp_mpsc_try_reserve(channel.tx, &permit) == VKP_OK);
        uint64_t wrong = 0;
        for (uint64_t i = 0; i < 20000; i++) {
            wrong += channel.next() == i ? 0 : 1;
        }
        REQUIRE(wrong == 0);
        for (int i = 0; i < 70; i++) { // empty, but for the place
            CHECK(look.call(channel.rx) == look.nothing);
        }
        *static_cast<uint64_t *>(permit.item) = 7;
        vkp_mpsc_commit(&permit);
        REQUIRE(channel.try_send(8) == VKP_OK);
        REQUIRE(vkp_mpsc_peek(channel.rx, &item) == VKP_OK);
        CHECK(*static_cast<const uint64_t *>(item) == 7);
        CHECK(vkp_mpsc_get_len(channel.rx) == 2);
        CHECK(channel.next() == 7);
        CHECK(channel.next() == 8);
        CHECK(look.call(channel.rx) == look.nothing);
    }
}

TEST_CASE("mpsc api: nothing is allocated for a message", "[mpsc][memory]")
{
    Env counted;
    for (size_t capacity : {size_t{0}, size_t{1}, size_t{32}}) {
        Channel channel(config_of(capacity, counted.env()));
        const uint64_t most = capacity != 0 ? capacity : 100;
        for (int warm = 0; warm < 2; warm++) {
            for (uint64_t i = 0; i < most; i++) {
                REQUIRE(channel.try_send(i) == VKP_OK);
            }
            for (uint64_t i = 0; i < most; i++) {
                REQUIRE(channel.next() == i);
            }
        }
        counted.fault(VKP_TEST_FAULT_FROM, 1);
        const uint64_t calls = vkp_test_env_calls(&counted.test);
        uint64_t wrong = 0;
        for (int lap = 0; lap < 1000; lap++) {
            for (uint64_t i = 0; i < most; i++) {
                wrong += channel.send(i, VKP_FOREVER) == VKP_OK ? 0 : 1;
            }
            for (uint64_t i = 0; i < most; i++) {
                wrong += channel.next() == i ? 0 : 1;
            }
        }
        CHECK(wrong == 0);
        CHECK(vkp_test_env_calls(&counted.test) == calls);
        counted.fault(VKP_TEST_FAULT_NONE, 0);
    }
}

TEST_CASE("mpsc api: elements of every size are whole, and aligned as promised", "[mpsc][memory]")
{
    Env counted;
    std::vector<size_t> sizes;
    for (size_t elem = 1; elem <= 200; elem++) {
        sizes.push_back(elem);
    }
    sizes.push_back(4096);
    sizes.push_back(65536);
    for (const size_t elem : sizes) {
        INFO("elem " << elem);
        const size_t alignment = elem % 64 == 0 ? 64 : elem % 16 == 0 ? 16 : 8;
        for (size_t capacity : {size_t{0}, size_t{5}}) {
            Channel channel(config_of(capacity, counted.env(), elem));
            std::vector<unsigned char> in(elem);
            std::vector<unsigned char> out(elem + 1);
            size_t misaligned = 0;
            size_t wrong = 0;
            unsigned next = 0;
            const unsigned batch = capacity != 0 ? 5 : elem > 4096 ? 6 : 40;
            for (int lap = 0; lap < 3; lap++) {
                for (unsigned i = 0; i < batch; i++) {
                    std::memset(in.data(), static_cast<int>((next + i) & 0xffu), elem);
                    if (i % 2 != 0) {
                        REQUIRE(vkp_mpsc_try_send(channel.tx, in.data()) == VKP_OK);
                        continue;
                    }
                    vkp_mpsc_permit permit;
                    REQUIRE(vkp_mpsc_try_reserve(channel.tx, &permit) == VKP_OK);
                    misaligned += reinterpret_cast<uintptr_t>(permit.item) % alignment;
                    std::memcpy(permit.item, in.data(), elem);
                    vkp_mpsc_commit(&permit);
                }
                for (unsigned i = 0; i < batch; i++, next++) {
                    const void *item = nullptr;
                    std::memset(in.data(), static_cast<int>(next & 0xffu), elem);
                    REQUIRE(vkp_mpsc_peek(channel.rx, &item) == VKP_OK);
                    misaligned += reinterpret_cast<uintptr_t>(item) % alignment;
                    wrong += std::memcmp(item, in.data(), elem) != 0 ? 1 : 0;
                    out[elem] = 0xa5;
                    REQUIRE(vkp_mpsc_try_recv(channel.rx, out.data()) == VKP_OK);
                    wrong += std::memcmp(out.data(), in.data(), elem) != 0 ? 1 : 0;
                    wrong += out[elem] != 0xa5 ? 1 : 0;
                }
            }
            CHECK(misaligned == 0);
            CHECK(wrong == 0);
        }
    }
    CHECK(counted.blocks() == 0);
}

namespace {

size_t cost_of(const void *item)
{
    return static_cast<size_t>(*static_cast<const uint64_t *>(item));
}

} // namespace

TEST_CASE("mpsc api: bytes are counted by cost on every way in and out", "[mpsc]")
{
    vkp_mpsc_config config = config_of(0, nullptr);
    config.capacity_bytes = 100;
    config.cost = cost_of;
    Channel channel(config);
    for (int lap = 0; lap < 20; lap++) {
        const uint64_t many[4] = {40, 30, 20, 60};
        size_t sent = 0;
        REQUIRE(vkp_mpsc_send_many(channel.tx, many, 4, 0, &sent) == VKP_OK);
        CHECK(sent == 3); // 90 of 100
        CHECK(channel.try_send(11) == VKP_ERR_FULL);
        CHECK(channel.try_send(10) == VKP_OK);
        CHECK(channel.try_send(0) == VKP_OK); // costs nothing
        uint64_t out[8];
        size_t count = 0;
        CHECK(channel.next() == 40);
        CHECK(channel.try_send(41) == VKP_ERR_FULL);
        REQUIRE(vkp_mpsc_recv_many(channel.rx, 0, out, 8, &count) == VKP_OK);
        CHECK(count == 4);
        CHECK(channel.try_send(5000) == VKP_OK); // one value always fits
        CHECK(channel.try_send(1) == VKP_ERR_FULL);
        CHECK(channel.next() == 5000);
    }
    CHECK(vkp_mpsc_get_len(channel.rx) == 0);
}

TEST_CASE("mpsc api: threads: all bytes that were counted come back", "[mpsc][threads]")
{
    ON_EVERY_BUILD;
    vkp_mpsc_config config = config_of(0, &env);
    config.capacity_bytes = 100;
    config.cost = cost_of;
    Channel channel(config);
    const uint64_t each = 1000;
    const auto value_at = [](uint64_t s, uint64_t i) { return 1 + (i * 7 + s * 13) % 60; };
    std::vector<std::thread> threads;
    uint64_t expected = 0;
    for (uint64_t s = 0; s < 3; s++) {
        for (uint64_t i = 0; i < each; i++) {
            expected += value_at(s, i);
        }
        threads.emplace_back([&, s] {
            for (uint64_t i = 0; i < each; i++) {
                const uint64_t value = value_at(s, i);
                if (vkp_mpsc_send(channel.tx, &value, VKP_FOREVER) != VKP_OK) {
                    vkp_test_fail("a send without end failed");
                }
            }
        });
    }
    uint64_t sum = 0;
    uint64_t received = 0;
    while (received < 3 * each) {
        uint64_t out[16];
        size_t count = 0;
        REQUIRE(vkp_mpsc_recv_many(channel.rx, VKP_FOREVER, out, received % 16 + 1, &count) ==
                VKP_OK);
        received += count;
        for (size_t i = 0; i < count; i++) {
            sum += out[i];
        }
    }
    for (std::thread &thread : threads) {
        thread.join();
    }
    CHECK(sum == expected);
    CHECK(channel.try_send(60) == VKP_OK);
    CHECK(channel.try_send(40) == VKP_OK);
    CHECK(channel.try_send(1) == VKP_ERR_FULL);
}

// ---------------------------------------------------------------------------------------------
// send_many

TEST_CASE("mpsc api: send_many sends what fits, and says how many", "[mpsc]")
{
    ON_EVERY_BUILD;
    Channel channel(config_of(40, &env));
    std::vector<uint64_t> values(100);
    for (uint64_t i = 0; i < 100; i++) {
        values[static_cast<size_t>(i)] = i;
    }
    size_t sent = 0;
    REQUIRE(vkp_mpsc_send_many(channel.tx, values.data(), 100, 0, &sent) == VKP_OK);
    CHECK(sent == 40);
    CHECK(vkp_mpsc_send_many(channel.tx, values.data() + 40, 60, vkp_after_ms(1), &sent) ==
          VKP_ERR_TIMEOUT);
    CHECK(sent == 40);
    CHECK(channel.next() == 0);
    CHECK(channel.next() == 1);
    const uint64_t deadline = vkp_after_ms(2);
    REQUIRE(vkp_mpsc_send_many(channel.tx, values.data() + 40, 60, deadline, &sent) == VKP_OK);
    CHECK(sent == 2);
    CHECK(vkp_now_ns() >= deadline); // it waited for the rest
    for (uint64_t i = 2; i < 42; i++) {
        CHECK(channel.next() == i);
    }
}

TEST_CASE("mpsc api: send_many waits for room and goes on", "[mpsc][threads]")
{
    ON_EVERY_BUILD;
    for (size_t capacity : {size_t{1}, size_t{3}}) {
        Channel channel(config_of(capacity, &env));
        std::vector<uint64_t> values(50);
        for (uint64_t i = 0; i < 50; i++) {
            values[static_cast<size_t>(i)] = i;
        }
        size_t sent = 0;
        vkp_test_waiting sender(
            [&] { return vkp_mpsc_send_many(channel.tx, values.data(), 50, VKP_FOREVER, &sent); });
        uint64_t value = 0;
        for (uint64_t i = 0; i < 50; i++) {
            REQUIRE(vkp_mpsc_recv(channel.rx, VKP_FOREVER, &value) == VKP_OK);
            REQUIRE(value == i);
        }
        CHECK(sender.join() == VKP_OK);
        CHECK(sent == 50);
    }
}

TEST_CASE("mpsc api: a close in the midst of send_many: the rest stays the caller's",
          "[mpsc][threads]")
{
    ON_EVERY_BUILD;
    Channel channel(config_of(3, &env));
    const uint64_t values[5] = {0, 1, 2, 3, 4};
    size_t sent = 0;
    vkp_test_waiting sender(
        [&] { return vkp_mpsc_send_many(channel.tx, values, 5, VKP_FOREVER, &sent); });
    vkp_mpsc_close(channel.rx);
    CHECK(sender.join() == VKP_OK);
    CHECK(sent == 3);
    CHECK(vkp_mpsc_send_many(channel.tx, values, 5, VKP_FOREVER, &sent) == VKP_ERR_CLOSED);
    for (uint64_t i = 0; i < 3; i++) {
        CHECK(channel.next() == i);
    }
    CHECK(channel.next() == UINT64_MAX);
}

TEST_CASE("mpsc api: memory that ends in the midst of send_many: the rest stays the caller's",
          "[mpsc][faults]")
{
    Env counted;
    for (size_t capacity : {size_t{0}, size_t{1000}}) {
        Channel channel(config_of(capacity, counted.env()));
        std::vector<uint64_t> values(200);
        for (uint64_t i = 0; i < 200; i++) {
            values[static_cast<size_t>(i)] = i;
        }
        size_t sent = 9;
        counted.fault(VKP_TEST_FAULT_FROM, 1);
        CHECK(vkp_mpsc_send_many(channel.tx, values.data(), 200, VKP_FOREVER, &sent) ==
              VKP_ERR_NOMEM);
        CHECK(sent == 9);
        counted.fault(VKP_TEST_FAULT_FROM, 2);
        REQUIRE(vkp_mpsc_send_many(channel.tx, values.data(), 200, VKP_FOREVER, &sent) == VKP_OK);
        REQUIRE(sent > 0);
        REQUIRE(sent < 200);
        size_t more = 0;
        CHECK(vkp_mpsc_send_many(channel.tx, values.data(), 1, VKP_FOREVER, &more) ==
              VKP_ERR_NOMEM);
        counted.fault(VKP_TEST_FAULT_NONE, 0);
        REQUIRE(vkp_mpsc_send_many(channel.tx, values.data() + sent, 200 - sent, VKP_FOREVER,
                                   &more) == VKP_OK);
        CHECK(sent + more == 200);
        for (uint64_t i = 0; i < 200; i++) {
            CHECK(channel.next() == i);
        }
        CHECK(channel.next() == UINT64_MAX);
    }
    CHECK(counted.blocks() == 0);
}

// ---------------------------------------------------------------------------------------------
// Who sends: a lane belongs to its first sender, until there is a second one

TEST_CASE("mpsc api: threads: one sends, another, the first again, then many: nothing is lost",
          "[mpsc][threads]")
{
    ON_EVERY_BUILD;
    for (size_t capacity : {size_t{0}, size_t{64}}) {
        for (int round = 0; round < 20; round++) {
            Channel channel(config_of(capacity, &env));
            Sequences seen(5);
            uint64_t sent = 0;
            const auto send = [&](uint64_t s, uint64_t from, uint64_t to) {
                for (uint64_t i = from; i < to; i++) {
                    const uint64_t value = value_of(s, i);
                    if (vkp_mpsc_send(channel.tx, &value, VKP_FOREVER) != VKP_OK) {
                        vkp_test_fail("a value was refused");
                    }
                }
            };
            const auto drain = [&] {
                for (uint64_t value; channel.try_recv(&value) == VKP_OK;) {
                    seen.take(value);
                }
            };
            send(0, 0, 20);
            std::thread([&] { send(1, 0, 20); }).join();
            drain();
            send(0, 20, 40);
            drain();
            std::vector<std::thread> threads;
            for (uint64_t s = 2; s < 5; s++) {
                threads.emplace_back([&, s] { send(s, 0, 200); });
            }
            sent = 60 + 600;
            while (seen.received < sent) {
                uint64_t value = 0;
                REQUIRE(vkp_mpsc_recv(channel.rx, VKP_FOREVER, &value) == VKP_OK);
                seen.take(value);
            }
            for (std::thread &thread : threads) {
                thread.join();
            }
            REQUIRE(seen.disorder == 0);
            REQUIRE(channel.next() == UINT64_MAX);
        }
    }
}

TEST_CASE("mpsc api: threads: a second sender comes while the first sends in a tight loop",
          "[mpsc][threads]")
{
    ON_EVERY_BUILD;
    for (int round = 0; round < 20; round++) {
        Channel channel(config_of(0, &env));
        std::atomic<bool> stop{false};
        std::atomic<uint64_t> begun{0};
        uint64_t sent[2] = {0, 0};
        std::thread owner([&] {
            while (!stop.load(std::memory_order_relaxed) && sent[0] < 200000) {
                const uint64_t value = value_of(0, sent[0]);
                sent[0] += vkp_mpsc_try_send(channel.tx, &value) == VKP_OK ? 1 : 0;
                begun.store(sent[0], std::memory_order_relaxed);
            }
        });
        while (begun.load(std::memory_order_relaxed) < 10) {
            sched_yield();
        }
        for (; sent[1] < 100; sent[1]++) {
            const uint64_t value = value_of(1, sent[1]);
            REQUIRE(vkp_mpsc_try_send(channel.tx, &value) == VKP_OK);
        }
        stop.store(true);
        owner.join();
        Sequences seen(2);
        for (uint64_t value; channel.try_recv(&value) == VKP_OK;) {
            seen.take(value);
        }
        REQUIRE(seen.received == sent[0] + sent[1]);
        REQUIRE(seen.next[0] == sent[0]);
        REQUIRE(seen.next[1] == sent[1]);
        REQUIRE(seen.disorder == 0);
    }
}

// ---------------------------------------------------------------------------------------------
// The ends, met by senders

TEST_CASE("mpsc api: threads: a close meets senders in a tight loop: sent is received plus dropped",
          "[mpsc][threads]")
{
    ON_EVERY_BUILD;
    const size_t senders = GENERATE(size_t{1}, size_t{3});
    for (int round = 0; round < 16; round++) {
        const bool dropping = round % 2 != 0;
        Drops drops;
        vkp_mpsc_config config = config_of(round % 4 < 2 ? 0 : 16, &env);
        drops.on(&config);
        Channel channel(config);
        std::vector<uint64_t> sent(senders, 0);
        std::vector<uint64_t> sum(senders, 0);
        std::atomic<uint64_t> begun{0};
        std::vector<std::thread> threads;
        for (size_t s = 0; s < senders; s++) {
            threads.emplace_back([&, s] {
                for (uint64_t i = 0;; i++) {
                    const uint64_t value = value_of(s, i);
                    const vkp_status status = vkp_mpsc_send(channel.tx, &value, VKP_FOREVER);
                    if (status != VKP_OK) {
                        if (status != VKP_ERR_CLOSED) {
                            vkp_test_fail("%s", vkp_status_str(status));
                        }
                        return;
                    }
                    sent[s]++;
                    sum[s] += value;
                    if (i == 5) {
                        begun.fetch_add(1);
                    }
                }
            });
        }
        Sequences seen(senders);
        uint64_t value = 0;
        while (begun.load() < senders || seen.received < static_cast<uint64_t>(round) * 20) {
            REQUIRE(vkp_mpsc_recv(channel.rx, VKP_FOREVER, &value) == VKP_OK);
            seen.take(value);
        }
        if (dropping) {
            channel.drop_receiver();
        } else {
            vkp_mpsc_close(channel.rx);
            while (vkp_mpsc_recv(channel.rx, VKP_FOREVER, &value) == VKP_OK) {
                seen.take(value);
            }
        }
        uint64_t all = 0;
        uint64_t total = 0;
        for (size_t s = 0; s < senders; s++) {
            threads[s].join();
            all += sent[s];
            total += sum[s];
        }
        REQUIRE(all == seen.received + drops.count.load());
        REQUIRE(total == seen.sum + drops.sum.load());
        REQUIRE(seen.disorder == 0);
        REQUIRE((dropping || drops.count.load() == 0));
    }
}

namespace {

// A request that carries the slot of whoever waits for its reply, as a task that owns a
// connection would get them.
struct Request {
    vkp_oneshot *reply;
    static void drop(void *user, void *item)
    {
        static_cast<std::atomic<uint64_t> *>(user)->fetch_add(1);
        vkp_oneshot_abandon(static_cast<Request *>(item)->reply);
    }
};

} // namespace

TEST_CASE("mpsc api: threads: requests that nobody takes release their requesters at once",
          "[mpsc][threads]")
{
    ON_EVERY_BUILD;
    for (int round = 0; round < 30; round++) {
        std::atomic<uint64_t> dropped{0};
        vkp_mpsc_config config = config_of(round % 3 == 0 ? 0 : 2, &env, sizeof(Request));
        config.drop = Request::drop;
        config.user = &dropped;
        Channel channel(config);
        std::atomic<uint64_t> accepted{0};
        std::atomic<uint64_t> answered{0};
        std::atomic<uint64_t> released{0};
        std::vector<std::thread> threads;
        for (int s = 0; s < 3; s++) {
            threads.emplace_back([&] {
                for (;;) {
                    vkp_oneshot slot;
                    uint64_t reply = 0;
                    if (vkp_oneshot_init(&slot, &env, 8, nullptr, nullptr) != VKP_OK) {
                        vkp_test_fail("no slot");
                    }
                    const Request request = {&slot};
                    if (vkp_mpsc_send(channel.tx, &request, VKP_FOREVER) != VKP_OK) {
                        return;
                    }
                    accepted.fetch_add(1);
                    // Without a drop of the request this would wait for ever.
                    if (vkp_oneshot_recv(&slot, VKP_FOREVER, &reply) == VKP_OK) {
                        answered.fetch_add(1);
                    } else {
                        released.fetch_add(1);
                    }
                }
            });
        }
        const uint64_t served = static_cast<uint64_t>(round);
        for (uint64_t i = 0; i < served; i++) {
            Request request;
            REQUIRE(vkp_mpsc_recv(channel.rx, VKP_FOREVER, &request) == VKP_OK);
            REQUIRE(vkp_oneshot_send(request.reply, &i) == VKP_OK);
        }
        channel.drop_receiver();
        for (std::thread &thread : threads) {
            thread.join();
        }
        REQUIRE(answered.load() == served);
        REQUIRE(released.load() == dropped.load());
        REQUIRE(accepted.load() == served + dropped.load());
    }
}

TEST_CASE("mpsc api: drop runs without a lock: it may use the channel it comes from", "[mpsc]")
{
    struct Reentry {
        vkp_mpsc_tx *tx = nullptr;
        int refused = 0;
        int calls = 0;
    } reentry;
    vkp_mpsc_config config = config_of(0, nullptr);
    config.user = &reentry;
    config.drop = [](void *user, void *item) {
        Reentry *self = static_cast<Reentry *>(user);
        vkp_mpsc_permit permit;
        size_t sent = 0;
        self->calls++;
        self->refused += vkp_mpsc_try_send(self->tx, item) == VKP_ERR_CLOSED ? 1 : 0;
        self->refused += vkp_mpsc_send(self->tx, item, VKP_FOREVER) == VKP_ERR_CLOSED ? 1 : 0;
        self->refused += vkp_mpsc_try_reserve(self->tx, &permit) == VKP_ERR_CLOSED ? 1 : 0;
        self->refused +=
            vkp_mpsc_send_many(self->tx, item, 1, VKP_FOREVER, &sent) == VKP_ERR_CLOSED ? 1 : 0;
        self->refused += vkp_mpsc_wait_closed(self->tx, VKP_FOREVER) == VKP_OK ? 1 : 0;
        self->refused += vkp_mpsc_is_closed(self->tx) ? 1 : 0;
    };
    Channel channel(config);
    reentry.tx = channel.tx;
    vkp_mpsc_permit permit;
    for (uint64_t i = 0; i < 30; i++) {
        REQUIRE(channel.try_send(i) == VKP_OK);
    }
    REQUIRE(vkp_mpsc_try_reserve(channel.tx, &permit) == VKP_OK);
    REQUIRE(channel.try_send(30) == VKP_OK);
    channel.drop_receiver();
    CHECK(reentry.calls == 30);
    vkp_mpsc_commit(&permit); // drops from a sender's call
    CHECK(reentry.calls == 32);
    CHECK(reentry.refused == 32 * 6);
}

// ---------------------------------------------------------------------------------------------
// Order among senders

TEST_CASE("mpsc api: whoever waits for room gets it in the order of arrival, whatever the call",
          "[mpsc][threads]")
{
    ON_EVERY_BUILD;
    for (size_t capacity : {size_t{1}, size_t{2}}) {
        Channel channel(config_of(capacity, &env));
        for (uint64_t i = 0; i < capacity; i++) {
            REQUIRE(channel.try_send(0) == VKP_OK);
        }
        const uint64_t third_value = 3;
        size_t sent = 0;
        vkp_mpsc_permit permit;
        const auto first = waiting_send(channel.tx, 1);
        vkp_test_waiting second([&] {
            const vkp_status status = vkp_mpsc_reserve(channel.tx, VKP_FOREVER, &permit);
            if (status == VKP_OK) {
                *static_cast<uint64_t *>(permit.item) = 2;
                vkp_mpsc_commit(&permit);
            }
            return status;
        });
        vkp_test_waiting third(
            [&] { return vkp_mpsc_send_many(channel.tx, &third_value, 1, VKP_FOREVER, &sent); });
        const auto fourth = waiting_send(channel.tx, 4);
        uint64_t value = 0;
        vkp_mpsc_permit intruder;
        for (uint64_t i = 0; i < capacity; i++) {
            CHECK(channel.try_send(99) == VKP_ERR_FULL);
            CHECK(channel.send(99, 0) == VKP_ERR_TIMEOUT);
            CHECK(vkp_mpsc_try_reserve(channel.tx, &intruder) == VKP_ERR_FULL);
            CHECK(channel.next() == 0);
        }
        for (uint64_t i = 1; i <= 4; i++) {
            REQUIRE(vkp_mpsc_recv(channel.rx, VKP_FOREVER, &value) == VKP_OK);
            CHECK(value == i);
        }
        CHECK(first->join() == VKP_OK);
        CHECK(second.join() == VKP_OK);
        CHECK(third.join() == VKP_OK);
        CHECK(fourth->join() == VKP_OK);
        CHECK(channel.try_send(5) == VKP_OK);
    }
}

TEST_CASE("mpsc api: threads: a waiting sender is not passed, however many try", "[mpsc][threads]")
{
    ON_EVERY_BUILD;
    Channel channel(config_of(1, &env));
    std::atomic<bool> stop{false};
    std::vector<std::thread> threads;
    // Those who try take the room of nobody who waits: the waiter is the next but for the one
    // value that was there before.
    for (int s = 0; s < 2; s++) {
        threads.emplace_back([&] {
            while (!stop.load(std::memory_order_relaxed)) {
                (void)channel.try_send(0);
            }
        });
    }
    uint64_t wrong = 0;
    for (uint64_t round = 1; round <= 20; round++) {
        while (channel.try_send(0) == VKP_OK) {
        }
        const auto waiter = waiting_send(channel.tx, round);
        uint64_t value = 0;
        REQUIRE(vkp_mpsc_recv(channel.rx, VKP_FOREVER, &value) == VKP_OK);
        wrong += value != 0 ? 1 : 0;
        REQUIRE(vkp_mpsc_recv(channel.rx, VKP_FOREVER, &value) == VKP_OK);
        wrong += value != round ? 1 : 0;
        REQUIRE(waiter->join() == VKP_OK);
    }
    stop.store(true);
    for (std::thread &thread : threads) {
        thread.join();
    }
    CHECK(wrong == 0);
}

TEST_CASE("mpsc api: threads: deadlines that meet room: each value has one fate", "[mpsc][threads]")
{
    ON_EVERY_BUILD;
    const int form = GENERATE(0, 1, 2); // send, reserve, send_many
    INFO("form " << form);
    Channel channel(config_of(1, &env));
    const size_t senders = 2;
    std::vector<uint64_t> sent(senders, 0);
    std::vector<uint64_t> sum(senders, 0);
    std::vector<std::thread> threads;
    for (size_t s = 0; s < senders; s++) {
        vkp_mpsc_tx *own = vkp_mpsc_tx_ref(channel.tx);
        threads.emplace_back([&, s, own] {
            for (uint64_t i = 0; i < 1500; i++) {
                const uint64_t value = value_of(s, i);
                const uint64_t deadline = vkp_now_ns() + i % 8 * 2000;
                vkp_mpsc_permit permit;
                size_t count = 0;
                vkp_status status;
                switch (form) {
                case 0:
                    status = vkp_mpsc_send(own, &value, deadline);
                    break;
                case 1:
                    status = vkp_mpsc_reserve(own, deadline, &permit);
                    if (status == VKP_OK) {
                        *static_cast<uint64_t *>(permit.item) = value;
                        vkp_mpsc_commit(&permit);
                    }
                    break;
                default:
                    status = vkp_mpsc_send_many(own, &value, 1, deadline, &count);
                    break;
                }
                if (status == VKP_OK) {
                    sent[s]++;
                    sum[s] += value;
                } else if (status != VKP_ERR_TIMEOUT) {
                    vkp_test_fail("%s", vkp_status_str(status));
                }
            }
            vkp_mpsc_tx_unref(own);
        });
    }
    channel.leave();
    Sequences seen(senders);
    for (;;) {
        uint64_t value = 0;
        const vkp_status status =
            vkp_mpsc_recv(channel.rx, vkp_now_ns() + seen.received % 8 * 2000, &value);
        if (status == VKP_OK) {
            seen.take(value);
        } else if (status == VKP_ERR_CLOSED) {
            break;
        } else {
            REQUIRE(status == VKP_ERR_TIMEOUT);
        }
    }
    for (std::thread &thread : threads) {
        thread.join();
    }
    CHECK(seen.received == sent[0] + sent[1]);
    CHECK(seen.sum == sum[0] + sum[1]);
    CHECK(seen.disorder == 0);
}

TEST_CASE("mpsc api: a wait that a token ends leaves its place and its value", "[mpsc][threads]")
{
    ON_EVERY_BUILD;
    for (int form = 0; form < 3; form++) { // send, reserve, receive
        INFO("form " << form);
        Channel channel(config_of(1, &env));
        vkp_cancel *token = nullptr;
        REQUIRE(vkp_cancel_open(&env, nullptr, &token) == VKP_OK);
        uint64_t value = 7;
        uint64_t out = 0;
        size_t won = 9;
        vkp_mpsc_permit permit;
        if (form < 2) {
            REQUIRE(channel.try_send(1) == VKP_OK);
        }
        vkp_test_waiting waiter([&] {
            vkp_case cases[2] = {form == 0   ? vkp_case_mpsc_send(channel.tx, &value)
                                 : form == 1 ? vkp_case_mpsc_reserve(channel.tx, &permit)
                                             : vkp_case_mpsc_recv(channel.rx, &out),
                                 vkp_case_cancel(token)};
            return vkp_select(cases, 2, VKP_FOREVER, &won);
        });
        if (form < 2) {
            const auto behind = waiting_send(channel.tx, 2);
            vkp_cancel_trigger(token);
            CHECK(waiter.join() == VKP_OK);
            CHECK(won == 1);
            CHECK(channel.next() == 1);
            CHECK(behind->join() == VKP_OK);
            CHECK(channel.next() == 2);
            CHECK(channel.next() == UINT64_MAX);
        } else {
            vkp_cancel_trigger(token);
            CHECK(waiter.join() == VKP_OK);
            CHECK(won == 1);
            CHECK(channel.try_send(3) == VKP_OK);
            CHECK(channel.next() == 3);
        }
        CHECK(out == 0);
        vkp_cancel_unref(token);
    }
}

// ---------------------------------------------------------------------------------------------
// What it costs

namespace {

// Counts every call of the table; what no channel needs is not there to be called.
struct Calls {
    std::atomic<uint64_t> parks{0};
    std::atomic<uint64_t> unparks{0};
    std::atomic<uint64_t> yields{0};
    std::atomic<uint64_t> barriers{0};
    std::atomic<uint64_t> others{0};
    uint64_t all() const
    {
        return parks.load() + unparks.load() + yields.load() + barriers.load() + others.load();
    }
} calls;

const vkp_sys *counting_sys(bool membarrier)
{
    static vkp_sys tables[2];
    static const bool ready = [] {
        for (vkp_sys &table : tables) {
            table.clock_ns = [] {
                calls.others.fetch_add(1);
                return vkp_sys_get_default()->clock_ns();
            };
            table.processors = [] {
                calls.others.fetch_add(1);
                return uint32_t{2};
            };
            table.park = [](vkp_parker *parker, uint64_t deadline_ns) {
                calls.parks.fetch_add(1);
                vkp_test_probed_sys()->park(parker, deadline_ns);
            };
            table.unpark = [](vkp_parker *parker) {
                calls.unparks.fetch_add(1);
                vkp_sys_get_default()->unpark(parker);
            };
            table.yield = [] {
                calls.yields.fetch_add(1);
                vkp_sys_get_default()->yield();
            };
        }
        tables[0].membarrier = [](bool) {
            calls.barriers.fetch_add(1);
            return -ENOSYS;
        };
        tables[1].membarrier = [](bool prepare) {
            calls.barriers.fetch_add(1);
            return vkp_sys_get_default()->membarrier(prepare);
        };
        return true;
    }();
    (void)ready;
    return &tables[membarrier ? 1 : 0];
}

} // namespace

TEST_CASE("mpsc api: the system is not called for a value that finds room and a receiver awake",
          "[mpsc][system]")
{
    const vkp_test_build build = GENERATE(EVERY_BUILD);
    vkp_env env = VKP_ZERO;
    env.sys = counting_sys(!build.fenced);
    env.spins = build.spins;
    for (size_t capacity : {size_t{0}, size_t{32}}) {
        Channel channel(config_of(capacity, &env));
        const uint64_t before = calls.all();
        uint64_t wrong = 0;
        uint64_t out[4];
        size_t count = 0;
        for (uint64_t i = 0; i < 5000; i++) {
            vkp_mpsc_permit permit;
            const uint64_t many[2] = {i, i};
            wrong += channel.try_send(i) == VKP_OK ? 0 : 1;
            wrong += channel.send(i, VKP_FOREVER) == VKP_OK ? 0 : 1;
            wrong += vkp_mpsc_send_many(channel.tx, many, 2, VKP_FOREVER, &count) == VKP_OK ? 0 : 1;
            wrong += vkp_mpsc_reserve(channel.tx, VKP_FOREVER, &permit) == VKP_OK ? 0 : 1;
            *static_cast<uint64_t *>(permit.item) = i;
            vkp_mpsc_commit(&permit);
            wrong += channel.next() == i ? 0 : 1;
            wrong += vkp_mpsc_recv(channel.rx, VKP_FOREVER, out) == VKP_OK ? 0 : 1;
            wrong += vkp_mpsc_recv_many(channel.rx, VKP_FOREVER, out, 4, &count) == VKP_OK ? 0 : 1;
            wrong += channel.next() == UINT64_MAX ? 0 : 1;
        }
        CHECK(wrong == 0);
        CHECK(calls.all() == before);
    }
}

TEST_CASE("mpsc api: who waits sleeps once, and is woken once, however long the channel is idle",
          "[mpsc][system][threads]")
{
    const vkp_test_build build = GENERATE(EVERY_BUILD);
    vkp_env env = VKP_ZERO;
    env.sys = counting_sys(!build.fenced);
    env.spins = build.spins;
    Channel channel(config_of(1, &env));
    Channel other(config_of(1, &env));
    uint64_t value = 0;
    for (uint64_t i = 0; i < 20; i++) {
        const uint64_t parks = calls.parks.load();
        const uint64_t unparks = calls.unparks.load();
        vkp_test_waiting receiver([&] { return vkp_mpsc_recv(channel.rx, VKP_FOREVER, &value); });
        const uint64_t asleep = calls.all();
        for (int lap = 0; lap < 100; lap++) { // life elsewhere, which is no business of theirs
            REQUIRE(other.try_send(1) == VKP_OK);
            REQUIRE(other.next() == 1);
            sched_yield();
        }
        CHECK(calls.all() == asleep);
        REQUIRE(channel.try_send(i) == VKP_OK);
        REQUIRE(receiver.join() == VKP_OK);
        CHECK(calls.parks.load() - parks == 1);
        CHECK(calls.unparks.load() - unparks == 1);
    }
}

// ---------------------------------------------------------------------------------------------
// Lanes: a sender, and all that is counted, per clone

TEST_CASE("mpsc api: lanes: a lane without a sender goes although the channel is never empty",
          "[mpsc][lanes][memory]")
{
    ON_EVERY_BUILD;
    (void)env;
    // With `others` only clones send: no lane ever comes to the end of its turn.
    for (const bool others : {false, true}) {
        for (const bool many : {false, true}) {
            INFO("only clones send " << others << ", recv_many " << many);
            Env counted(vkp_test_build_sys(build.fenced));
            counted.test.env.spins = build.spins;
            {
                vkp_mpsc_config config = config_of(0, counted.env());
                config.lanes = true;
                Channel channel(config);
                uint64_t out[2];
                size_t count = 0;
                REQUIRE(channel.try_send(0) == VKP_OK);
                size_t most = 0;
                for (uint64_t i = 0; i < 2000; i++) {
                    vkp_mpsc_tx *clone = nullptr;
                    const size_t due = others ? 1 : 2;
                    REQUIRE(vkp_mpsc_tx_clone(channel.tx, &clone) == VKP_OK);
                    REQUIRE(vkp_mpsc_try_send(clone, &i) == VKP_OK);
                    vkp_mpsc_tx_unref(clone);
                    // As many values go as come: the channel is never empty.
                    REQUIRE((others || channel.try_send(i) == VKP_OK));
                    if (many) {
                        REQUIRE(vkp_mpsc_recv_many(channel.rx, 0, out, due, &count) == VKP_OK);
                        REQUIRE(count == due);
                    } else {
                        for (size_t k = 0; k < due; k++) {
                            REQUIRE(vkp_mpsc_recv(channel.rx, VKP_FOREVER, out) == VKP_OK);
                        }
                    }
                    REQUIRE(vkp_mpsc_get_len(channel.rx) == 1);
                    most = std::max(most, counted.blocks());
                }
                // The receiver takes up to 64 values of one lane before it comes to the others.
                CHECK(most <= 2 * 2 * 64);
            }
            CHECK(counted.blocks() == 0);
        }
    }
}

TEST_CASE("mpsc api: lanes: a burst's memory goes back beside a lane that is never empty",
          "[mpsc][lanes][memory]")
{
    ON_EVERY_BUILD;
    (void)env;
    Env counted(vkp_test_build_sys(build.fenced));
    vkp_mpsc_config config = config_of(0, counted.env());
    config.lanes = true;
    Channel channel(config);
    vkp_mpsc_tx *clone = nullptr;
    uint64_t value = 0;
    REQUIRE(vkp_mpsc_tx_clone(channel.tx, &clone) == VKP_OK);
    REQUIRE(channel.try_send(1) == VKP_OK);
    for (uint64_t i = 0; i < 100000; i++) {
        REQUIRE(vkp_mpsc_try_send(clone, &i) == VKP_OK);
    }
    CHECK(counted.bytes() >= 800000);
    for (uint64_t i = 0; i < 100000; i++) { // the value of the first lane among them
        REQUIRE(channel.try_recv(&value) == VKP_OK);
    }
    CHECK(counted.bytes() >= 800000);
    // From here on the channel has one value or two: the receiver comes by every 64 values.
    for (uint64_t i = 0; i < 64 * 70; i++) {
        REQUIRE(channel.try_send(1) == VKP_OK);
        REQUIRE(channel.try_recv(&value) == VKP_OK);
    }
    CHECK(counted.bytes() <= 2 * 65536);
    vkp_mpsc_tx_unref(clone);
}

TEST_CASE("mpsc api: lanes: clones that never send cost nothing, with or without a receiver's call",
          "[mpsc][lanes][memory]")
{
    Env counted;
    for (const bool weak : {false, true}) {
        vkp_mpsc_config config = config_of(2, counted.env());
        config.lanes = true;
        Channel channel(config);
        vkp_mpsc_weak *other = weak ? vkp_mpsc_downgrade(channel.tx) : nullptr;
        REQUIRE(channel.try_send(1) == VKP_OK);
        const size_t before = counted.bytes();
        for (int i = 0; i < 100; i++) {
            vkp_mpsc_tx *clone = nullptr;
            REQUIRE((weak ? vkp_mpsc_upgrade(other, &clone)
                          : vkp_mpsc_tx_clone(channel.tx, &clone)) == VKP_OK);
            CHECK(vkp_mpsc_get_room(clone) == 2);
            CHECK_FALSE(vkp_mpsc_is_closed(clone));
            vkp_mpsc_tx_unref(clone);
            CHECK(counted.bytes() == before);
        }
        // One that was there before the close, and sends after it, is refused as all are.
        vkp_mpsc_tx *clone = nullptr;
        uint64_t value = 2;
        REQUIRE(vkp_mpsc_tx_clone(channel.tx, &clone) == VKP_OK);
        vkp_mpsc_close(channel.rx);
        CHECK(vkp_mpsc_try_send(clone, &value) == VKP_ERR_CLOSED);
        CHECK(vkp_mpsc_send(clone, &value, VKP_FOREVER) == VKP_ERR_CLOSED);
        channel.drop_receiver();
        CHECK(vkp_mpsc_try_send(clone, &value) == VKP_ERR_CLOSED);
        vkp_mpsc_tx_unref(clone);
        vkp_mpsc_weak_unref(other);
    }
    CHECK(counted.blocks() == 0);
}

TEST_CASE("mpsc api: lanes: each clone has its order, its capacity and its places", "[mpsc][lanes]")
{
    ON_EVERY_BUILD;
    vkp_mpsc_config config = config_of(2, &env);
    config.lanes = true;
    config.capacity_bytes = 100;
    vkp_mpsc_tx *refused = nullptr;
    vkp_mpsc_rx *no_receiver = nullptr;
    CHECK(vkp_mpsc_open(&config, &refused, &no_receiver) == VKP_ERR_INVALID);
    config.capacity_bytes = 0;
    Channel channel(config);
    vkp_mpsc_tx *clone = nullptr;
    REQUIRE(vkp_mpsc_tx_clone(channel.tx, &clone) == VKP_OK);
    CHECK(clone != channel.tx);
    CHECK(vkp_mpsc_get_senders(clone) == 2);
    for (uint64_t lap = 0; lap < 20; lap++) {
        const uint64_t many[3] = {value_of(1, lap * 2), value_of(1, lap * 2 + 1), 0};
        size_t sent = 0;
        CHECK(channel.try_send(value_of(0, lap * 2)) == VKP_OK);
        CHECK(channel.try_send(value_of(0, lap * 2 + 1)) == VKP_OK);
        CHECK(channel.try_send(0) == VKP_ERR_FULL);
        CHECK(vkp_mpsc_get_room(channel.tx) == 0);
        CHECK(vkp_mpsc_get_room(clone) == 2);
        REQUIRE(vkp_mpsc_send_many(clone, many, 3, 0, &sent) == VKP_OK);
        CHECK(sent == 2);
        CHECK(vkp_mpsc_get_len(channel.rx) == 4);
        Sequences seen(2);
        seen.next = {lap * 2, lap * 2};
        const void *item = nullptr;
        for (int i = 0; i < 4; i++) {
            REQUIRE(vkp_mpsc_peek(channel.rx, &item) == VKP_OK);
            const uint64_t peeked = *static_cast<const uint64_t *>(item);
            CHECK(channel.next() == peeked);
            seen.take(peeked);
        }
        CHECK(seen.disorder == 0);
        CHECK(seen.next == std::vector<uint64_t>{lap * 2 + 2, lap * 2 + 2});
        CHECK(channel.next() == UINT64_MAX);
        // A place that is open holds up its own lane only.
        vkp_mpsc_permit permit;
        REQUIRE(vkp_mpsc_try_reserve(clone, &permit) == VKP_OK);
        CHECK(channel.try_send(5) == VKP_OK);
        CHECK(channel.next() == 5);
        CHECK(channel.next() == UINT64_MAX);
        vkp_mpsc_abort(&permit);
        CHECK(channel.next() == UINT64_MAX);
        CHECK(vkp_mpsc_get_room(clone) == 2);
    }
    const auto waiting = [&] {
        CHECK(channel.try_send(1) == VKP_OK);
        CHECK(channel.try_send(2) == VKP_OK);
        return waiting_send(channel.tx, 3);
    }();
    const uint64_t other = 9;
    CHECK(vkp_mpsc_try_send(clone, &other) == VKP_OK); // who waits does so in another line
    uint64_t sum = 0;
    for (int i = 0; i < 4; i++) {
        uint64_t value = 0;
        REQUIRE(vkp_mpsc_recv(channel.rx, VKP_FOREVER, &value) == VKP_OK);
        sum += value;
    }
    CHECK(waiting->join() == VKP_OK);
    CHECK(sum == 1 + 2 + 3 + 9);
    vkp_mpsc_tx_unref(clone);
    CHECK(vkp_mpsc_get_senders(channel.tx) == 1);
}

TEST_CASE("mpsc api: lanes: a value waits for at most 64 of each other sender", "[mpsc][lanes]")
{
    for (int form = 0; form < 3; form++) { // try_recv, recv, recv_many
        for (size_t clones : {size_t{1}, size_t{3}}) {
            INFO("form " << form << " clones " << clones);
            vkp_mpsc_config config = config_of(0, nullptr);
            config.lanes = true;
            Channel channel(config);
            std::vector<vkp_mpsc_tx *> senders(clones, nullptr);
            for (uint64_t i = 0; i < 1000; i++) {
                REQUIRE(channel.try_send(value_of(0, i)) == VKP_OK);
            }
            for (size_t c = 0; c < clones; c++) {
                REQUIRE(vkp_mpsc_tx_clone(channel.tx, &senders[c]) == VKP_OK);
                for (uint64_t i = 0; i < 1000; i++) {
                    const uint64_t value = value_of(c + 1, i);
                    REQUIRE(vkp_mpsc_try_send(senders[c], &value) == VKP_OK);
                }
            }
            Sequences seen(clones + 1);
            std::vector<uint64_t> behind(clones + 1, 0);
            uint64_t longest = 0;
            const auto take = [&](uint64_t value) {
                seen.take(value);
                for (size_t s = 0; s <= clones; s++) {
                    behind[s] = s == value >> 32 ? 0 : behind[s] + 1;
                    if (seen.next[s] < 1000) {
                        longest = std::max(longest, behind[s]);
                    }
                }
            };
            while (seen.received < 1000 * (clones + 1)) {
                uint64_t out[100];
                size_t count = 1;
                const vkp_status status =
                    form == 0   ? vkp_mpsc_try_recv(channel.rx, out)
                    : form == 1 ? vkp_mpsc_recv(channel.rx, VKP_FOREVER, out)
                                : vkp_mpsc_recv_many(channel.rx, VKP_FOREVER, out, 100, &count);
                REQUIRE(status == VKP_OK);
                for (size_t i = 0; i < count; i++) {
                    take(out[i]);
                }
            }
            CHECK(seen.disorder == 0);
            CHECK(longest <= 64 * clones);
            for (vkp_mpsc_tx *sender : senders) {
                vkp_mpsc_tx_unref(sender);
            }
        }
    }
}

TEST_CASE("mpsc api: lanes: the last of all senders is the end, weak ones get a lane",
          "[mpsc][lanes]")
{
    Env counted;
    counted.test.env.spins = VKP_SPINS_NONE;
    {
        vkp_mpsc_config config = config_of(0, counted.env());
        config.lanes = true;
        Channel channel(config);
        vkp_mpsc_tx *clone = nullptr;
        vkp_mpsc_tx *upgraded = nullptr;
        uint64_t value = 1;
        REQUIRE(vkp_mpsc_tx_clone(channel.tx, &clone) == VKP_OK);
        vkp_mpsc_weak *weak = vkp_mpsc_downgrade(clone);
        channel.leave();
        REQUIRE(vkp_mpsc_upgrade(weak, &upgraded) == VKP_OK);
        CHECK(upgraded != clone);
        CHECK(vkp_mpsc_send(upgraded, &value, 0) == VKP_OK);
        vkp_mpsc_tx_unref(clone);
        CHECK_FALSE(vkp_mpsc_rx_is_closed(channel.rx));
        CHECK(channel.next() == 1);
        CHECK(channel.try_recv(&value) == VKP_ERR_EMPTY);
        // Clones that come and go leave nothing, once the receiver waited.
        const size_t before = counted.blocks();
        for (uint64_t i = 0; i < 50; i++) {
            REQUIRE(vkp_mpsc_tx_clone(upgraded, &clone) == VKP_OK);
            REQUIRE(vkp_mpsc_try_send(clone, &i) == VKP_OK);
            vkp_mpsc_tx_unref(clone);
        }
        for (int i = 0; i < 50; i++) {
            REQUIRE(channel.next() != UINT64_MAX);
        }
        CHECK(vkp_mpsc_recv(channel.rx, vkp_now_ns() + 1000, &value) == VKP_ERR_TIMEOUT);
        CHECK(counted.blocks() <= before);
        // Without memory there is no clone, and no harm.
        counted.fault(VKP_TEST_FAULT_FROM, 1);
        CHECK(vkp_mpsc_tx_clone(upgraded, &clone) == VKP_ERR_NOMEM);
        vkp_mpsc_tx *none = nullptr;
        CHECK(vkp_mpsc_upgrade(weak, &none) == VKP_ERR_NOMEM);
        CHECK(none == nullptr);
        counted.fault(VKP_TEST_FAULT_NONE, 0);
        CHECK(vkp_mpsc_get_senders(upgraded) == 1);
        CHECK(vkp_mpsc_send(upgraded, &value, 0) == VKP_OK);
        vkp_mpsc_tx_unref(upgraded);
        CHECK(vkp_mpsc_upgrade(weak, &none) == VKP_ERR_CLOSED);
        CHECK(channel.try_recv(&value) == VKP_OK);
        CHECK(channel.try_recv(&value) == VKP_ERR_CLOSED);
        vkp_mpsc_weak_unref(weak);
    }
    CHECK(counted.blocks() == 0);
}

TEST_CASE("mpsc api: lanes: threads: clones come, send and go; each value has one fate",
          "[mpsc][lanes][threads]")
{
    ON_EVERY_BUILD;
    const size_t capacity = GENERATE(size_t{0}, size_t{2});
    for (int ending = 0; ending < 3; ending++) { // the senders', close, the receiver's
        INFO("capacity " << capacity << " ending " << ending);
        Drops drops;
        vkp_mpsc_config config = config_of(capacity, &env);
        config.lanes = true;
        drops.on(&config);
        Channel channel(config);
        const size_t threads_count = 3;
        const size_t lives = 12;
        std::vector<uint64_t> sent(threads_count * lives, 0);
        std::vector<uint64_t> sum(threads_count, 0);
        std::vector<std::thread> threads;
        for (size_t t = 0; t < threads_count; t++) {
            vkp_mpsc_tx *own = nullptr;
            REQUIRE(vkp_mpsc_tx_clone(channel.tx, &own) == VKP_OK);
            threads.emplace_back([&, t, own] {
                vkp_mpsc_tx *tx = own;
                for (size_t life = 0; life < lives; life++) {
                    uint64_t &count = sent[t * lives + life];
                    for (uint64_t i = 0; i < 100; i++) {
                        const uint64_t value = value_of(t * lives + life, i);
                        const vkp_status status =
                            i % 3 != 0 ? vkp_mpsc_send(tx, &value, VKP_FOREVER)
                                       : vkp_mpsc_send(tx, &value, vkp_now_ns() + 5000);
                        if (status == VKP_OK) {
                            count++;
                            sum[t] += value;
                        } else if (status == VKP_ERR_CLOSED) {
                            break;
                        } else if (status != VKP_ERR_TIMEOUT) {
                            vkp_test_fail("%s", vkp_status_str(status));
                        }
                    }
                    vkp_mpsc_tx *next = nullptr;
                    if (vkp_mpsc_tx_clone(tx, &next) != VKP_OK) {
                        vkp_test_fail("no clone");
                    }
                    vkp_mpsc_tx_unref(tx);
                    tx = next;
                }
                vkp_mpsc_tx_unref(tx);
            });
        }
        channel.leave();
        Sequences seen(threads_count * lives);
        uint64_t value = 0;
        while ((ending == 0 || seen.received < 500) &&
               vkp_mpsc_recv(channel.rx, VKP_FOREVER, &value) == VKP_OK) {
            seen.take(value);
        }
        if (ending == 1) {
            vkp_mpsc_close(channel.rx);
            while (vkp_mpsc_recv(channel.rx, VKP_FOREVER, &value) == VKP_OK) {
                seen.take(value);
            }
        } else if (ending == 2) {
            channel.drop_receiver();
        }
        uint64_t all = 0;
        uint64_t total = 0;
        for (std::thread &thread : threads) {
            thread.join();
        }
        for (const uint64_t count : sent) {
            all += count;
        }
        for (const uint64_t part : sum) {
            total += part;
        }
        CHECK(all == seen.received + drops.count.load());
        CHECK(total == seen.sum + drops.sum.load());
        CHECK(seen.disorder == 0);
        CHECK((ending == 2 || drops.count.load() == 0));
    }
}

TEST_CASE("mpsc api: lanes: a watch hears of every clone", "[mpsc][lanes][loop]")
{
    ON_EVERY_BACKEND;
    vkp_test_loop loop(backend);
    vkp_mpsc_config config = config_of(0, nullptr);
    config.lanes = true;
    Channel channel(config);
    std::vector<uint64_t> got;
    bool ended = false;
    vkp_test_handler watch(loop, vkp_case_mpsc_recv(channel.rx, nullptr), [&] {
        uint64_t value = 0;
        const vkp_status status = channel.try_recv(&value);
        if (status == VKP_OK) {
            got.push_back(value);
        }
        ended = ended || status == VKP_ERR_CLOSED;
    });
    REQUIRE(watch.status == VKP_OK);
    for (uint64_t i = 0; i < 10; i++) {
        vkp_mpsc_tx *clone = nullptr;
        REQUIRE(vkp_mpsc_tx_clone(channel.tx, &clone) == VKP_OK);
        REQUIRE(vkp_mpsc_try_send(clone, &i) == VKP_OK);
        vkp_test_run_until(loop, "a clone's value", [&] { return got.size() == i + 1; });
        vkp_mpsc_tx_unref(clone);
        vkp_test_settle(loop);
        CHECK(got.back() == i);
        CHECK(watch.calls == static_cast<int>(i) + 1);
    }
    channel.leave();
    vkp_test_run_until(loop, "the end", [&] { return ended; });
    watch.stop();
}

// ---------------------------------------------------------------------------------------------
// Memory that fails

namespace {

// Sends in every way, receives in every way, under any faults. What is refused stays the caller's;
// afterwards the channel works. Returns how often memory was refused.
size_t story_under_faults(Env &counted, size_t capacity, size_t elem, vkp_test_fault kind,
                          uint64_t k)
{
    size_t refused = 0;
    uint64_t next = 0;
    std::deque<uint64_t> sent;
    std::vector<unsigned char> items(elem * 40);
    const auto fill = [&](size_t count) {
        for (size_t i = 0; i < count; i++) {
            const uint64_t value = next + i;
            std::memcpy(items.data() + i * elem, &value, sizeof value);
        }
    };
    const auto keep = [&](vkp_status status, size_t count) {
        for (size_t i = 0; status == VKP_OK && i < count; i++) {
            sent.push_back(next + i);
        }
        if (status != VKP_OK) {
            refused += status == VKP_ERR_NOMEM ? 1 : 0;
            CHECK((status == VKP_ERR_NOMEM || status == VKP_ERR_FULL));
        }
        next += count;
    };
    vkp_mpsc_tx *tx = nullptr;
    vkp_mpsc_rx *rx = nullptr;
    const vkp_mpsc_config config = config_of(capacity, counted.env(), elem);
    counted.fault(kind, k);
    const vkp_status opened = vkp_mpsc_open(&config, &tx, &rx);
    if (opened != VKP_OK) {
        CHECK(opened == VKP_ERR_NOMEM);
        CHECK((tx == nullptr && rx == nullptr));
        counted.fault(VKP_TEST_FAULT_NONE, 0);
        CHECK(counted.blocks() == 0);
        return 1;
    }
    const auto put = [&] {
        vkp_mpsc_permit permit;
        size_t count = 0;
        fill(40);
        keep(vkp_mpsc_try_send(tx, items.data()), 1);
        fill(40);
        vkp_status status = vkp_mpsc_send_many(tx, items.data(), 40, 0, &count);
        keep(status == VKP_ERR_TIMEOUT ? VKP_ERR_FULL : status, count);
        next += 40 - count;
        status = vkp_mpsc_try_reserve(tx, &permit);
        if (status == VKP_OK) {
            std::memcpy(permit.item, &next, sizeof next);
            vkp_mpsc_commit(&permit);
        }
        keep(status, 1);
        if (vkp_mpsc_try_reserve(tx, &permit) == VKP_OK) {
            vkp_mpsc_abort(&permit);
        }
    };
    size_t wrong = 0;
    const auto take = [&](size_t most) {
        while (most-- > 0 && vkp_mpsc_try_recv(rx, items.data()) == VKP_OK) {
            uint64_t value = 0;
            std::memcpy(&value, items.data(), sizeof value);
            wrong += sent.empty() || sent.front() != value ? 1 : 0;
            if (!sent.empty()) {
                sent.pop_front();
            }
        }
    };
    for (int round = 0; round < 5; round++) {
        put();
        take(round == 2 ? 1000 : 10);
        if (round == 2) { // large rings go back here, and come anew
            CHECK(vkp_mpsc_recv(rx, vkp_now_ns() + 1000, items.data()) == VKP_ERR_TIMEOUT);
        }
    }
    counted.fault(VKP_TEST_FAULT_NONE, 0);
    take(1000);
    CHECK(sent.empty());
    const size_t before = refused;
    put();
    CHECK(refused == before);
    CHECK(!sent.empty());
    take(1000);
    CHECK(sent.empty());
    CHECK(wrong == 0);
    vkp_mpsc_rx_unref(rx);
    vkp_mpsc_tx_unref(tx);
    CHECK(counted.blocks() == 0);
    return refused;
}

} // namespace

TEST_CASE("mpsc api: every allocation may fail, in every way to send; then all goes on",
          "[mpsc][faults]")
{
    Env counted;
    counted.test.env.spins = VKP_SPINS_NONE;
    for (size_t elem : {size_t{8}, size_t{4096}}) {
        for (size_t capacity : {size_t{0}, size_t{2}, size_t{50}}) {
            INFO("elem " << elem << " capacity " << capacity);
            const uint64_t before = vkp_test_env_calls(&counted.test);
            REQUIRE(story_under_faults(counted, capacity, elem, VKP_TEST_FAULT_NONE, 0) == 0);
            const uint64_t allocations = vkp_test_env_calls(&counted.test) - before;
            REQUIRE(allocations > 1);
            for (vkp_test_fault kind : {VKP_TEST_FAULT_ONCE, VKP_TEST_FAULT_FROM}) {
                for (uint64_t k = 1; k <= allocations; k++) {
                    INFO("kind " << kind << " k " << k);
                    const uint64_t failures = vkp_test_env_failures(&counted.test);
                    const size_t refused = story_under_faults(counted, capacity, elem, kind, k);
                    CHECK(refused <= vkp_test_env_failures(&counted.test) - failures);
                }
            }
        }
    }
}

namespace {

// While set, this thread stays where its park returned.
thread_local std::atomic<bool> *held = nullptr;

const vkp_sys *holding_sys()
{
    static const vkp_sys table = [] {
        vkp_sys copy = *vkp_test_probed_sys();
        copy.park = [](vkp_parker *parker, uint64_t deadline_ns) {
            vkp_test_probed_sys()->park(parker, deadline_ns);
            while (held != nullptr && held->load()) {
                sched_yield();
            }
        };
        return copy;
    }();
    return &table;
}

} // namespace

TEST_CASE("mpsc api: a waiting reserve that comes for its room and finds no memory says so",
          "[mpsc][threads][faults]")
{
    Env counted(holding_sys());
    counted.test.env.spins = VKP_SPINS_NONE;
    {
        Channel channel(config_of(1, counted.env(), 65536));
        std::vector<unsigned char> value(65536);
        std::atomic<bool> hold{true};
        vkp_mpsc_permit permit;
        REQUIRE(vkp_mpsc_try_send(channel.tx, value.data()) == VKP_OK);
        vkp_test_waiting sender([&] {
            held = &hold;
            return vkp_mpsc_reserve(channel.tx, VKP_FOREVER, &permit);
        });
        // The receiver makes room, finds nothing more, and gives the memory back; the sender,
        // told of its room, has not come yet.
        REQUIRE(vkp_mpsc_try_recv(channel.rx, value.data()) == VKP_OK);
        CHECK(vkp_mpsc_recv(channel.rx, vkp_after_ms(1), value.data()) == VKP_ERR_TIMEOUT);
        counted.fault(VKP_TEST_FAULT_FROM, 1);
        hold.store(false);
        CHECK(sender.join() == VKP_ERR_NOMEM);
        counted.fault(VKP_TEST_FAULT_NONE, 0);
        CHECK(vkp_mpsc_try_send(channel.tx, value.data()) == VKP_OK);
        CHECK(vkp_mpsc_try_recv(channel.rx, value.data()) == VKP_OK);
    }
    CHECK(counted.blocks() == 0);
}

TEST_CASE("mpsc api: a case of reserve is INVALID where reserve is", "[mpsc][select]")
{
    vkp_mpsc_config config = config_of(4, nullptr);
    config.capacity_bytes = 64;
    Channel channel(config);
    vkp_mpsc_permit permit;
    CHECK(vkp_mpsc_try_reserve(channel.tx, &permit) == VKP_ERR_INVALID);
    vkp_case reserve = vkp_case_mpsc_reserve(channel.tx, &permit);
    size_t won = 9;
    REQUIRE(vkp_select(&reserve, 1, vkp_test_deadline(), &won) == VKP_OK);
    CHECK(won == 0);
    CHECK(reserve.status == VKP_ERR_INVALID);
}

TEST_CASE("mpsc api: a handler that finds no memory leaves all as it was", "[mpsc][loop][faults]")
{
    ON_EVERY_BACKEND;
    vkp_test_loop loop(backend);
    Channel channel(config_of(2, nullptr));
    int called = 0;
    const auto fn = [](void *user) { ++*static_cast<int *>(user); };
    vkp_test_env_fault(&loop.test, VKP_TEST_FAULT_FROM, 1);
    vkp_handler *handler = nullptr;
    CHECK(vkp_test_handle(loop, channel.rx, fn, &called, &handler) == VKP_ERR_NOMEM);
    CHECK(handler == nullptr);
    {
        vkp_test_handler watch(loop, vkp_case_mpsc_closed(channel.tx), [] {});
        CHECK(watch.status == VKP_ERR_NOMEM);
    }
    vkp_test_env_fault(&loop.test, VKP_TEST_FAULT_NONE, 0);
    REQUIRE(vkp_test_handle(loop, channel.rx, fn, &called, &handler) == VKP_OK);
    REQUIRE(channel.try_send(1) == VKP_OK);
    vkp_test_run_until(loop, "a value", [&] { return called > 0; });
    vkp_handler_unref(handler);
    channel.drop_receiver();
    called = 0;
    vkp_test_settle(loop);
    CHECK(called == 0);
}

TEST_CASE("mpsc api: a loop that closes ends its handlers", "[mpsc][loop]")
{
    ON_EVERY_BACKEND;
    vkp_test_loop loop(backend);
    Channel channel(config_of(2, nullptr));
    int called = 0;
    const auto fn = [](void *user) { ++*static_cast<int *>(user); };
    vkp_handler *handler = nullptr;
    REQUIRE(vkp_test_handle(loop, channel.rx, fn, &called, &handler) == VKP_OK);
    vkp_test_handler watch(loop, vkp_case_mpsc_closed(channel.tx), [] {});
    REQUIRE(watch.status == VKP_OK);
    vkp_loop_close(loop);
    REQUIRE(channel.try_send(1) == VKP_OK);
    CHECK(channel.next() == 1);
    vkp_mpsc_close(channel.rx);
    CHECK(called == 0);
    CHECK(watch.calls == 0);
    vkp_handler_unref(handler);
}

// ---------------------------------------------------------------------------------------------
// All at once

TEST_CASE("mpsc api: threads: all calls at once: each value once, in its sender's order",
          "[mpsc][threads]")
{
    ON_EVERY_BUILD;
    for (size_t capacity : {size_t{0}, size_t{1}, size_t{7}}) {
        INFO("capacity " << capacity);
        Channel channel(config_of(capacity, &env));
        const size_t senders = 3;
        std::vector<uint64_t> sent(senders, 0);
        std::vector<std::thread> threads;
        for (size_t s = 0; s < senders; s++) {
            vkp_mpsc_tx *own = vkp_mpsc_tx_ref(channel.tx);
            threads.emplace_back([&, s, own] {
                uint64_t next = 0;
                for (uint64_t i = 0; i < 1500; i++) {
                    uint64_t values[5];
                    size_t count = 1;
                    vkp_mpsc_permit permit;
                    vkp_status status = VKP_ERR_FULL;
                    for (uint64_t v = 0; v < 5; v++) {
                        values[v] = value_of(s, next + v);
                    }
                    switch ((i + s) % 5) {
                    case 0:
                        status = vkp_mpsc_send(own, values, VKP_FOREVER);
                        break;
                    case 1:
                        status = vkp_mpsc_try_send(own, values);
                        break;
                    case 2:
                        status = vkp_mpsc_send_many(own, values, 5, VKP_FOREVER, &count);
                        break;
                    case 3:
                        status = vkp_mpsc_reserve(own, VKP_FOREVER, &permit);
                        if (status == VKP_OK) {
                            *static_cast<uint64_t *>(permit.item) = values[0];
                            vkp_mpsc_commit(&permit);
                        }
                        break;
                    default:
                        if (vkp_mpsc_reserve(own, VKP_FOREVER, &permit) == VKP_OK) {
                            vkp_mpsc_abort(&permit);
                        }
                        break;
                    }
                    next += status == VKP_OK ? count : 0;
                }
                sent[s] = next;
                vkp_mpsc_tx_unref(own);
            });
        }
        channel.leave();
        Sequences seen(senders);
        uint64_t peeked_wrong = 0;
        for (uint64_t turn = 0;; turn++) {
            uint64_t out[9];
            size_t count = 1;
            const void *item = nullptr;
            vkp_status status;
            if (turn % 3 == 0) {
                status = vkp_mpsc_recv(channel.rx, VKP_FOREVER, out);
            } else if (turn % 3 == 1) {
                const bool shown = vkp_mpsc_peek(channel.rx, &item) == VKP_OK;
                const uint64_t value = shown ? *static_cast<const uint64_t *>(item) : 0;
                status = vkp_mpsc_try_recv(channel.rx, out);
                peeked_wrong += shown && (status != VKP_OK || out[0] != value) ? 1 : 0;
            } else {
                status = vkp_mpsc_recv_many(channel.rx, VKP_FOREVER, out, 9, &count);
            }
            if (status == VKP_ERR_CLOSED) {
                break;
            }
            for (size_t i = 0; status == VKP_OK && i < count; i++) {
                seen.take(out[i]);
            }
        }
        for (std::thread &thread : threads) {
            thread.join();
        }
        CHECK(peeked_wrong == 0);
        CHECK(seen.disorder == 0);
        CHECK(seen.received == sent[0] + sent[1] + sent[2]);
        CHECK(seen.next == sent); // the last of each sender came, and so all before it
    }
}
