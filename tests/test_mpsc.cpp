// SPDX-License-Identifier: MIT
//
// The channel: many senders, one receiver. One-threaded tests fix every answer, against a model
// where that helps; the threaded ones count, for no order of theirs is known beforehand. Threads
// use the default environment: a lock in the allocator would hide races from a sanitizer.
#include "support/catch.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "support/park_probe.h"
#include "support/support.h"

namespace {

using Env = vkp_test_counted;

vkp_mpsc_config config_of(size_t elem_bytes, size_t capacity_items, const vkp_env *env)
{
    vkp_mpsc_config config = VKP_ZERO;
    config.elem_bytes = elem_bytes;
    config.capacity_items = capacity_items;
    config.env = env;
    return config;
}

struct Channel {
    vkp_mpsc_tx *tx = nullptr;
    vkp_mpsc_rx *rx = nullptr;
    vkp_status status;
    explicit Channel(const vkp_mpsc_config &config) : status(vkp_mpsc_open(&config, &tx, &rx))
    {
    }
    ~Channel()
    {
        vkp_mpsc_tx_unref(tx);
        vkp_mpsc_rx_unref(rx);
    }
    Channel(const Channel &) = delete;
    Channel &operator=(const Channel &) = delete;
};

// Sender in the high part, sequence number in the low one.
uint64_t value_of(uint64_t sender, uint64_t sequence)
{
    return sender << 32 | sequence;
}
uint64_t sender_of(uint64_t value)
{
    return value >> 32;
}
uint64_t sequence_of(uint64_t value)
{
    return value & 0xffffffffu;
}

// What a drop function saw, in tests where one thread drops. Two may at once: a sender that was
// late and the receiver that goes.
struct Drops {
    std::vector<uint64_t> values;
    static void drop(void *user, void *item)
    {
        // Read as its type, not copied: a value is aligned as the program would expect.
        static_cast<Drops *>(user)->values.push_back(*static_cast<uint64_t *>(item));
    }
};

vkp_status try_send(vkp_mpsc_tx *tx, uint64_t value)
{
    return vkp_mpsc_try_send(tx, &value);
}

size_t value_cost(const void *item)
{
    uint64_t value = 0;
    std::memcpy(&value, item, sizeof value);
    return static_cast<size_t>(value);
}

// A thread that waits in send. The constructor returns once others can see it wait.
class WaitingSender {
  public:
    // With `passes` the deadline passes when that is set, whatever the time.
    WaitingSender(vkp_mpsc_tx *tx, uint64_t value, uint64_t deadline_ns,
                  const std::atomic<bool> *passes = nullptr)
        : thread_([this, tx, value, deadline_ns, passes] {
              vkp_test_parks = &parks_;
              vkp_test_deadline_passes = passes;
              status_ = vkp_mpsc_send(tx, &value, deadline_ns);
              vkp_test_parks = nullptr;
          })
    {
        vkp_test_await_park(parks_);
    }
    vkp_status join()
    {
        thread_.join();
        return status_;
    }

  private:
    std::atomic<unsigned> parks_{0};
    vkp_status status_ = VKP_ERR_INVALID;
    std::thread thread_;
};

// A thread that waits in recv, as above.
class WaitingReceiver {
  public:
    explicit WaitingReceiver(vkp_mpsc_rx *rx)
        : thread_([this, rx] {
              vkp_test_parks = &parks_;
              status_ = vkp_mpsc_recv(rx, vkp_test_deadline(), &value);
              vkp_test_parks = nullptr;
          })
    {
        vkp_test_await_park(parks_);
    }
    vkp_status join()
    {
        thread_.join();
        return status_;
    }
    uint64_t value = 0;

  private:
    std::atomic<unsigned> parks_{0};
    vkp_status status_ = VKP_ERR_INVALID;
    std::thread thread_;
};

vkp_env probed_env()
{
    vkp_env env = VKP_ZERO;
    env.sys = vkp_test_probed_sys();
    return env;
}

} // namespace

TEST_CASE("mpsc: open refuses what makes no channel", "[mpsc]")
{
    vkp_mpsc_tx *tx = nullptr;
    vkp_mpsc_rx *rx = nullptr;
    vkp_mpsc_config good = config_of(8, 4, nullptr);
    vkp_mpsc_config none = config_of(0, 4, nullptr);
    vkp_mpsc_config large = config_of(64 * 1024 + 1, 4, nullptr);
    CHECK(vkp_mpsc_open(nullptr, &tx, &rx) == VKP_ERR_INVALID);
    CHECK(vkp_mpsc_open(&good, nullptr, &rx) == VKP_ERR_INVALID);
    CHECK(vkp_mpsc_open(&good, &tx, nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_mpsc_open(&none, &tx, &rx) == VKP_ERR_INVALID);
    CHECK(vkp_mpsc_open(&large, &tx, &rx) == VKP_ERR_INVALID);
    CHECK(tx == nullptr);
    CHECK(rx == nullptr);
}

TEST_CASE("mpsc: null arguments are INVALID, null handles are ignored by unref", "[mpsc]")
{
    Channel channel(config_of(8, 4, nullptr));
    REQUIRE(channel.status == VKP_OK);
    uint64_t value = 5;
    size_t count = 99;
    CHECK(vkp_mpsc_send(nullptr, &value, 0) == VKP_ERR_INVALID);
    CHECK(vkp_mpsc_send(channel.tx, nullptr, 0) == VKP_ERR_INVALID);
    CHECK(vkp_mpsc_try_send(nullptr, &value) == VKP_ERR_INVALID);
    CHECK(vkp_mpsc_try_send(channel.tx, nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_mpsc_recv(nullptr, 0, &value) == VKP_ERR_INVALID);
    CHECK(vkp_mpsc_recv(channel.rx, 0, nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_mpsc_try_recv(nullptr, &value) == VKP_ERR_INVALID);
    CHECK(vkp_mpsc_try_recv(channel.rx, nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_mpsc_recv_many(nullptr, 0, &value, 1, &count) == VKP_ERR_INVALID);
    CHECK(vkp_mpsc_recv_many(channel.rx, 0, nullptr, 1, &count) == VKP_ERR_INVALID);
    CHECK(vkp_mpsc_recv_many(channel.rx, 0, &value, 1, nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_mpsc_recv_many(channel.rx, 0, &value, 0, &count) == VKP_ERR_INVALID);
    vkp_mpsc_tx_unref(nullptr);
    vkp_mpsc_rx_unref(nullptr);
    CHECK(value == 5);
    CHECK(count == 99);
    CHECK(vkp_mpsc_get_len(channel.rx) == 0);
}

TEST_CASE("mpsc: values of every size come out whole and in order", "[mpsc]")
{
    Env env;
    for (size_t elem :
         {size_t{1}, size_t{3}, size_t{8}, size_t{24}, size_t{100}, size_t{4096}, size_t{65536}}) {
        for (size_t capacity : {size_t{0}, size_t{1}, size_t{7}}) {
            INFO("elem " << elem << " capacity " << capacity);
            Channel channel(config_of(elem, capacity, &env.test.env));
            REQUIRE(channel.status == VKP_OK);
            std::vector<unsigned char> in(elem);
            std::vector<unsigned char> out(elem);
            const size_t batch = capacity ? capacity : 50;
            unsigned next_in = 0;
            unsigned next_out = 0;
            for (int round = 0; round < 4; round++) {
                for (size_t i = 0; i < batch; i++) {
                    std::fill(in.begin(), in.end(), static_cast<unsigned char>(next_in++));
                    REQUIRE(vkp_mpsc_try_send(channel.tx, in.data()) == VKP_OK);
                }
                REQUIRE(vkp_mpsc_get_len(channel.rx) == batch);
                for (size_t i = 0; i < batch; i++) {
                    std::fill(in.begin(), in.end(), static_cast<unsigned char>(next_out++));
                    REQUIRE(vkp_mpsc_try_recv(channel.rx, out.data()) == VKP_OK);
                    REQUIRE(out == in);
                }
                REQUIRE(vkp_mpsc_try_recv(channel.rx, out.data()) == VKP_ERR_EMPTY);
            }
        }
    }
    CHECK(env.blocks() == 0);
}

TEST_CASE("mpsc: a full channel refuses, and the value stays the caller's", "[mpsc]")
{
    Drops drops;
    vkp_mpsc_config config = config_of(8, 3, nullptr);
    config.drop = Drops::drop;
    config.user = &drops;
    {
        Channel channel(config);
        REQUIRE(channel.status == VKP_OK);
        for (uint64_t i = 0; i < 3; i++) {
            CHECK(try_send(channel.tx, i) == VKP_OK);
        }
        CHECK(try_send(channel.tx, 3) == VKP_ERR_FULL);
        uint64_t value = 4;
        CHECK(vkp_mpsc_send(channel.tx, &value, 0) == VKP_ERR_TIMEOUT);
        CHECK(vkp_mpsc_get_len(channel.rx) == 3);
        CHECK(vkp_mpsc_try_recv(channel.rx, &value) == VKP_OK);
        CHECK(value == 0);
        CHECK(try_send(channel.tx, 5) == VKP_OK);
        CHECK(try_send(channel.tx, 6) == VKP_ERR_FULL);
    }
    CHECK(drops.values == std::vector<uint64_t>{1, 2, 5});
}

TEST_CASE("mpsc: a deadline that passed still takes what is there, or room that is there", "[mpsc]")
{
    Channel channel(config_of(8, 1, nullptr));
    REQUIRE(channel.status == VKP_OK);
    uint64_t value = 7;
    size_t count = 0;
    CHECK(vkp_mpsc_recv(channel.rx, 0, &value) == VKP_ERR_TIMEOUT);
    CHECK(vkp_mpsc_recv_many(channel.rx, 0, &value, 1, &count) == VKP_ERR_TIMEOUT);
    CHECK(vkp_mpsc_send(channel.tx, &value, 0) == VKP_OK);
    CHECK(vkp_mpsc_send(channel.tx, &value, 0) == VKP_ERR_TIMEOUT);
    value = 0;
    CHECK(vkp_mpsc_recv(channel.rx, 0, &value) == VKP_OK);
    CHECK(value == 7);
}

TEST_CASE("mpsc: waits end at their deadline, by the clock of the environment", "[mpsc]")
{
    vkp_env env = VKP_ZERO;
    env.sys = vkp_test_virtual_sys();
    Channel channel(config_of(8, 1, &env));
    REQUIRE(channel.status == VKP_OK);
    const uint64_t hour_ns = uint64_t{3600} * 1000000000u;
    uint64_t value = 1;
    size_t count = 0;

    uint64_t deadline = vkp_test_virtual_ns.load() + hour_ns;
    CHECK(vkp_mpsc_recv(channel.rx, deadline, &value) == VKP_ERR_TIMEOUT);
    CHECK(vkp_test_virtual_ns.load() == deadline);
    CHECK(value == 1);

    deadline += hour_ns;
    CHECK(vkp_mpsc_recv_many(channel.rx, deadline, &value, 1, &count) == VKP_ERR_TIMEOUT);
    CHECK(vkp_test_virtual_ns.load() == deadline);
    CHECK(count == 0);

    REQUIRE(try_send(channel.tx, 1) == VKP_OK);
    deadline += hour_ns;
    CHECK(vkp_mpsc_send(channel.tx, &value, deadline) == VKP_ERR_TIMEOUT);
    CHECK(vkp_test_virtual_ns.load() == deadline);
    CHECK(vkp_mpsc_get_len(channel.rx) == 1);
}

TEST_CASE("mpsc: a wait on the real clock never ends before its deadline", "[mpsc]")
{
    Channel channel(config_of(8, 1, nullptr));
    REQUIRE(channel.status == VKP_OK);
    uint64_t value = 0;
    uint64_t deadline = vkp_after_ms(2);
    CHECK(vkp_mpsc_recv(channel.rx, deadline, &value) == VKP_ERR_TIMEOUT);
    CHECK(vkp_now_ns() >= deadline);
    REQUIRE(try_send(channel.tx, 1) == VKP_OK);
    deadline = vkp_after_ms(2);
    CHECK(vkp_mpsc_send(channel.tx, &value, deadline) == VKP_ERR_TIMEOUT);
    CHECK(vkp_now_ns() >= deadline);
}

TEST_CASE("mpsc: capacity in bytes counts what cost says, and one value always fits", "[mpsc]")
{
    vkp_mpsc_config config = config_of(8, 0, nullptr);
    config.capacity_bytes = 100;
    config.cost = value_cost;
    Channel channel(config);
    REQUIRE(channel.status == VKP_OK);
    uint64_t value = 0;
    CHECK(try_send(channel.tx, 60) == VKP_OK);
    CHECK(try_send(channel.tx, 41) == VKP_ERR_FULL);
    CHECK(try_send(channel.tx, 40) == VKP_OK);
    CHECK(try_send(channel.tx, 1) == VKP_ERR_FULL);
    CHECK(try_send(channel.tx, 0) == VKP_OK);
    CHECK(vkp_mpsc_try_recv(channel.rx, &value) == VKP_OK);
    CHECK(value == 60);
    CHECK(try_send(channel.tx, 60) == VKP_OK);
    while (vkp_mpsc_try_recv(channel.rx, &value) == VKP_OK) {
    }
    CHECK(try_send(channel.tx, 5000) == VKP_OK);
    CHECK(try_send(channel.tx, 1) == VKP_ERR_FULL);
    CHECK(vkp_mpsc_try_recv(channel.rx, &value) == VKP_OK);
    CHECK(value == 5000);
    CHECK(try_send(channel.tx, UINT32_MAX) == VKP_OK);
}

TEST_CASE("mpsc: costs that would overflow the sum do not make room", "[mpsc]")
{
    vkp_mpsc_config config = config_of(8, 0, nullptr);
    config.capacity_bytes = 100;
    config.cost = [](const void *item) { return value_cost(item) == 1 ? size_t{1} : SIZE_MAX; };
    Channel channel(config);
    REQUIRE(channel.status == VKP_OK);
    CHECK(try_send(channel.tx, 1) == VKP_OK);
    CHECK(try_send(channel.tx, 2) == VKP_ERR_FULL);
    uint64_t value = 0;
    CHECK(vkp_mpsc_try_recv(channel.rx, &value) == VKP_OK);
    CHECK(try_send(channel.tx, 2) == VKP_OK);
    CHECK(try_send(channel.tx, 1) == VKP_ERR_FULL);
    CHECK(try_send(channel.tx, 2) == VKP_ERR_FULL);
    CHECK(vkp_mpsc_get_len(channel.rx) == 1);
}

TEST_CASE("mpsc: without cost a value stands for its own size", "[mpsc]")
{
    vkp_mpsc_config config = config_of(8, 0, nullptr);
    config.capacity_bytes = 31;
    Channel channel(config);
    REQUIRE(channel.status == VKP_OK);
    CHECK(try_send(channel.tx, 1) == VKP_OK);
    CHECK(try_send(channel.tx, 2) == VKP_OK);
    CHECK(try_send(channel.tx, 3) == VKP_OK);
    CHECK(try_send(channel.tx, 4) == VKP_ERR_FULL);
}

TEST_CASE("mpsc: long random sequences answer as a model of a queue does", "[mpsc]")
{
    struct Shape {
        size_t items;
        size_t bytes;
    };
    const Shape shapes[] = {{0, 0}, {1, 0}, {5, 0}, {64, 0}, {0, 50}, {6, 40}, {1000, 1}};
    Env env;
    for (const Shape &shape : shapes) {
        for (unsigned seed = 0; seed < 6; seed++) {
            INFO("items " << shape.items << " bytes " << shape.bytes << " seed " << seed);
            std::mt19937 random(seed);
            Drops drops;
            vkp_mpsc_config config = config_of(8, shape.items, &env.test.env);
            config.capacity_bytes = shape.bytes;
            config.cost = shape.bytes ? value_cost : nullptr;
            config.drop = Drops::drop;
            config.user = &drops;
            std::deque<uint64_t> model;
            uint64_t model_bytes = 0;
            size_t wrong = 0;
            {
                Channel channel(config);
                REQUIRE(channel.status == VKP_OK);
                // Phases lean to one side, so that the queue is often empty and often long.
                for (int step = 0; step < 6000; step++) {
                    const bool leaning_in = (step / 500) % 2 == 0;
                    const unsigned long dice = random() % 10;
                    if (dice < (leaning_in ? 7 : 2)) {
                        const uint64_t value = random() % 30;
                        const bool room = (shape.items == 0 || model.size() < shape.items) &&
                                          (shape.bytes == 0 || model.empty() ||
                                           model_bytes + value <= shape.bytes);
                        const vkp_status status = dice % 2 ? vkp_mpsc_send(channel.tx, &value, 0)
                                                           : vkp_mpsc_try_send(channel.tx, &value);
                        const vkp_status expected = room       ? VKP_OK
                                                    : dice % 2 ? VKP_ERR_TIMEOUT
                                                               : VKP_ERR_FULL;
                        wrong += status != expected;
                        if (room) {
                            model.push_back(value);
                            model_bytes += value;
                        }
                    } else {
                        uint64_t got[8];
                        size_t count = 0;
                        const size_t most = 1 + random() % 8;
                        vkp_status status;
                        if (dice % 2) {
                            status = vkp_mpsc_recv_many(channel.rx, 0, got, most, &count);
                        } else {
                            status = vkp_mpsc_try_recv(channel.rx, got);
                            count = status == VKP_OK ? 1 : 0;
                        }
                        const size_t expected = std::min(dice % 2 ? most : size_t{1}, model.size());
                        wrong += count != expected;
                        wrong += status != (expected   ? VKP_OK
                                            : dice % 2 ? VKP_ERR_TIMEOUT
                                                       : VKP_ERR_EMPTY);
                        for (size_t i = 0; i < std::min(count, expected); i++) {
                            wrong += got[i] != model.front();
                            model_bytes -= model.front();
                            model.pop_front();
                        }
                    }
                    wrong += vkp_mpsc_get_len(channel.rx) != model.size();
                    REQUIRE(wrong == 0);
                }
            }
            CHECK(drops.values == std::vector<uint64_t>(model.begin(), model.end()));
        }
    }
    CHECK(env.blocks() == 0);
}

TEST_CASE("mpsc: recv_many takes up to its capacity, oldest first", "[mpsc]")
{
    Channel channel(config_of(8, 0, nullptr));
    REQUIRE(channel.status == VKP_OK);
    // More than any block of an unbounded queue is likely to hold.
    for (uint64_t i = 0; i < 3000; i++) {
        REQUIRE(try_send(channel.tx, i) == VKP_OK);
    }
    std::vector<uint64_t> out(2000, UINT64_MAX);
    size_t count = 0;
    REQUIRE(vkp_mpsc_recv_many(channel.rx, VKP_FOREVER, out.data(), 10, &count) == VKP_OK);
    CHECK(count == 10);
    CHECK(out[9] == 9);
    CHECK(out[10] == UINT64_MAX);
    uint64_t next = 10;
    while (next < 3000) {
        REQUIRE(vkp_mpsc_recv_many(channel.rx, VKP_FOREVER, out.data(), out.size(), &count) ==
                VKP_OK);
        REQUIRE(count >= 1);
        REQUIRE(count <= out.size());
        for (size_t i = 0; i < count; i++) {
            REQUIRE(out[i] == next++);
        }
    }
    CHECK(next == 3000);
    CHECK(vkp_mpsc_get_len(channel.rx) == 0);
}

TEST_CASE("mpsc: recv_many gives all that is there, not only a part", "[mpsc]")
{
    for (size_t capacity : {size_t{0}, size_t{10}}) {
        Channel channel(config_of(8, capacity, nullptr));
        REQUIRE(channel.status == VKP_OK);
        uint64_t out[10];
        size_t count = 0;
        // Begin at every place of a ring.
        for (uint64_t shift = 0; shift < 10; shift++) {
            for (uint64_t i = 0; i < 7; i++) {
                REQUIRE(try_send(channel.tx, shift * 10 + i) == VKP_OK);
            }
            REQUIRE(vkp_mpsc_recv_many(channel.rx, VKP_FOREVER, out, 10, &count) == VKP_OK);
            REQUIRE(count == 7);
            for (uint64_t i = 0; i < 7; i++) {
                REQUIRE(out[i] == shift * 10 + i);
            }
        }
    }
}

TEST_CASE("mpsc: a waiting receiver gets what another thread sends", "[mpsc][threads]")
{
    const vkp_env env = probed_env();
    for (size_t capacity : {size_t{0}, size_t{1}}) {
        Channel channel(config_of(8, capacity, &env));
        REQUIRE(channel.status == VKP_OK);
        for (uint64_t i = 0; i < 50; i++) {
            WaitingReceiver receiver(channel.rx);
            const vkp_status sent = try_send(channel.tx, i);
            const vkp_status received = receiver.join();
            REQUIRE(sent == VKP_OK);
            REQUIRE(received == VKP_OK);
            REQUIRE(receiver.value == i);
        }
    }
}

TEST_CASE("mpsc: close refuses new values, queued ones are received, then CLOSED", "[mpsc]")
{
    for (size_t capacity : {size_t{0}, size_t{4}}) {
        Drops drops;
        vkp_mpsc_config config = config_of(8, capacity, nullptr);
        config.drop = Drops::drop;
        config.user = &drops;
        {
            Channel channel(config);
            REQUIRE(channel.status == VKP_OK);
            for (uint64_t i = 0; i < 4; i++) {
                REQUIRE(try_send(channel.tx, i) == VKP_OK);
            }
            CHECK_FALSE(vkp_mpsc_is_closed(channel.tx));
            vkp_mpsc_close(channel.rx);
            vkp_mpsc_close(channel.rx);
            CHECK(vkp_mpsc_is_closed(channel.tx));
            uint64_t value = 9;
            CHECK(vkp_mpsc_send(channel.tx, &value, VKP_FOREVER) == VKP_ERR_CLOSED);
            CHECK(vkp_mpsc_try_send(channel.tx, &value) == VKP_ERR_CLOSED);
            CHECK(vkp_mpsc_get_len(channel.rx) == 4);
            size_t count = 0;
            uint64_t two[2];
            CHECK(vkp_mpsc_recv(channel.rx, 0, &value) == VKP_OK);
            CHECK(value == 0);
            CHECK(vkp_mpsc_try_recv(channel.rx, &value) == VKP_OK);
            CHECK(value == 1);
            CHECK(vkp_mpsc_recv_many(channel.rx, 0, two, 2, &count) == VKP_OK);
            CHECK(count == 2);
            value = 77;
            count = 55;
            for (int again = 0; again < 2; again++) {
                CHECK(vkp_mpsc_recv(channel.rx, VKP_FOREVER, &value) == VKP_ERR_CLOSED);
                CHECK(vkp_mpsc_try_recv(channel.rx, &value) == VKP_ERR_CLOSED);
                CHECK(vkp_mpsc_recv_many(channel.rx, VKP_FOREVER, two, 2, &count) ==
                      VKP_ERR_CLOSED);
            }
            CHECK(value == 77);
            CHECK(count == 55);
        }
        CHECK(drops.values.empty());
    }
}

TEST_CASE("mpsc: after the last sender the receiver drains, then gets CLOSED", "[mpsc]")
{
    Env env;
    vkp_mpsc_tx *tx = nullptr;
    vkp_mpsc_rx *rx = nullptr;
    const vkp_mpsc_config config = config_of(8, 0, &env.test.env);
    REQUIRE(vkp_mpsc_open(&config, &tx, &rx) == VKP_OK);
    vkp_mpsc_tx *second = vkp_mpsc_tx_ref(tx);
    CHECK(second == tx);
    REQUIRE(try_send(tx, 1) == VKP_OK);
    vkp_mpsc_tx_unref(tx);
    uint64_t value = 0;
    REQUIRE(try_send(second, 2) == VKP_OK);
    CHECK(vkp_mpsc_recv(rx, 0, &value) == VKP_OK);
    CHECK(vkp_mpsc_recv(rx, 0, &value) == VKP_OK);
    CHECK(value == 2);
    CHECK(vkp_mpsc_try_recv(rx, &value) == VKP_ERR_EMPTY);
    CHECK(vkp_mpsc_recv(rx, 0, &value) == VKP_ERR_TIMEOUT);
    REQUIRE(try_send(second, 3) == VKP_OK);
    vkp_mpsc_tx_unref(second);
    CHECK(vkp_mpsc_get_len(rx) == 1);
    CHECK(vkp_mpsc_try_recv(rx, &value) == VKP_OK);
    CHECK(value == 3);
    CHECK(vkp_mpsc_try_recv(rx, &value) == VKP_ERR_CLOSED);
    CHECK(vkp_mpsc_recv(rx, VKP_FOREVER, &value) == VKP_ERR_CLOSED);
    vkp_mpsc_close(rx);
    CHECK(vkp_mpsc_recv(rx, VKP_FOREVER, &value) == VKP_ERR_CLOSED);
    vkp_mpsc_rx_unref(rx);
    CHECK(env.blocks() == 0);
}

TEST_CASE("mpsc: the receiver's last unref drops what is queued, once, in order", "[mpsc]")
{
    Env env;
    for (size_t capacity : {size_t{0}, size_t{300}}) {
        for (bool sender_first : {false, true}) {
            Drops drops;
            vkp_mpsc_config config = config_of(8, capacity, &env.test.env);
            config.drop = Drops::drop;
            config.user = &drops;
            vkp_mpsc_tx *tx = nullptr;
            vkp_mpsc_rx *rx = nullptr;
            REQUIRE(vkp_mpsc_open(&config, &tx, &rx) == VKP_OK);
            std::vector<uint64_t> expected;
            for (uint64_t i = 0; i < 300; i++) {
                REQUIRE(try_send(tx, i) == VKP_OK);
            }
            uint64_t value = 0;
            for (uint64_t i = 0; i < 100; i++) {
                REQUIRE(vkp_mpsc_try_recv(rx, &value) == VKP_OK);
            }
            for (uint64_t i = 100; i < 300; i++) {
                expected.push_back(i);
            }
            if (sender_first) {
                vkp_mpsc_tx_unref(tx);
                CHECK(drops.values.empty());
                vkp_mpsc_rx_unref(rx);
            } else {
                vkp_mpsc_rx_unref(rx);
                CHECK(drops.values == expected);
                CHECK(vkp_mpsc_is_closed(tx));
                CHECK(try_send(tx, 1) == VKP_ERR_CLOSED);
                CHECK(vkp_mpsc_send(tx, &value, VKP_FOREVER) == VKP_ERR_CLOSED);
                vkp_mpsc_tx_unref(tx);
            }
            CHECK(drops.values == expected);
            CHECK(env.blocks() == 0);
        }
    }
}

TEST_CASE("mpsc: without a drop function queued values simply go", "[mpsc]")
{
    Env env;
    {
        Channel channel(config_of(16, 0, &env.test.env));
        REQUIRE(channel.status == VKP_OK);
        const uint64_t pair[2] = {1, 2};
        for (int i = 0; i < 500; i++) {
            REQUIRE(vkp_mpsc_try_send(channel.tx, pair) == VKP_OK);
        }
    }
    CHECK(env.blocks() == 0);
}

namespace {
struct Reentrant {
    vkp_mpsc_tx *tx;
    std::vector<vkp_status> answers;
    static void drop(void *user, void *item)
    {
        Reentrant *self = static_cast<Reentrant *>(user);
        CHECK(vkp_mpsc_is_closed(self->tx));
        self->answers.push_back(vkp_mpsc_try_send(self->tx, item));
    }
};
} // namespace

TEST_CASE("mpsc: drop may use the channel: no lock is held around it", "[mpsc]")
{
    for (size_t capacity : {size_t{0}, size_t{8}}) {
        Reentrant self = {nullptr, {}};
        vkp_mpsc_config config = config_of(8, capacity, nullptr);
        config.drop = Reentrant::drop;
        config.user = &self;
        vkp_mpsc_rx *rx = nullptr;
        REQUIRE(vkp_mpsc_open(&config, &self.tx, &rx) == VKP_OK);
        for (uint64_t i = 0; i < 3; i++) {
            REQUIRE(try_send(self.tx, i) == VKP_OK);
        }
        vkp_mpsc_rx_unref(rx);
        CHECK(self.answers == std::vector<vkp_status>(3, VKP_ERR_CLOSED));
        vkp_mpsc_tx_unref(self.tx);
    }
}

TEST_CASE("mpsc: waiting senders go in order of arrival, and nobody overtakes them",
          "[mpsc][threads]")
{
    const vkp_env env = probed_env();
    Channel channel(config_of(8, 2, &env));
    REQUIRE(channel.status == VKP_OK);
    REQUIRE(try_send(channel.tx, 0) == VKP_OK);
    REQUIRE(try_send(channel.tx, 1) == VKP_OK);
    std::vector<std::unique_ptr<WaitingSender>> senders;
    const uint64_t waiting = 6;
    for (uint64_t i = 0; i < waiting; i++) {
        senders.push_back(std::make_unique<WaitingSender>(channel.tx, 2 + i, vkp_test_deadline()));
    }
    CHECK(vkp_mpsc_get_len(channel.rx) == 2);
    std::vector<uint64_t> got;
    std::vector<vkp_status> overtaking;
    for (uint64_t i = 0; i < 2 + waiting; i++) {
        uint64_t value = UINT64_MAX;
        if (vkp_mpsc_recv(channel.rx, vkp_test_deadline(), &value) == VKP_OK) {
            got.push_back(value);
        }
        // Room was made, but it belongs to those who wait.
        if (i < waiting) {
            overtaking.push_back(try_send(channel.tx, 99));
        }
    }
    std::vector<vkp_status> statuses;
    for (const std::unique_ptr<WaitingSender> &sender : senders) {
        statuses.push_back(sender->join());
    }
    CHECK(statuses == std::vector<vkp_status>(waiting, VKP_OK));
    CHECK(overtaking == std::vector<vkp_status>(waiting, VKP_ERR_FULL));
    CHECK(got == std::vector<uint64_t>{0, 1, 2, 3, 4, 5, 6, 7});
    CHECK(try_send(channel.tx, 1) == VKP_OK);
}

TEST_CASE("mpsc: a small value does not slip past a large one that waits for bytes",
          "[mpsc][threads]")
{
    const vkp_env env = probed_env();
    vkp_mpsc_config config = config_of(8, 0, &env);
    config.capacity_bytes = 100;
    config.cost = value_cost;
    Channel channel(config);
    REQUIRE(channel.status == VKP_OK);
    REQUIRE(try_send(channel.tx, 50) == VKP_OK);
    REQUIRE(try_send(channel.tx, 20) == VKP_OK);
    WaitingSender large(channel.tx, 90, vkp_test_deadline());
    const vkp_status overtaking = try_send(channel.tx, 5);
    WaitingSender small(channel.tx, 6, vkp_test_deadline());
    std::vector<uint64_t> got;
    for (int i = 0; i < 4; i++) {
        uint64_t value = 0;
        if (vkp_mpsc_recv(channel.rx, vkp_test_deadline(), &value) == VKP_OK) {
            got.push_back(value);
        }
    }
    CHECK(large.join() == VKP_OK);
    CHECK(small.join() == VKP_OK);
    CHECK(overtaking == VKP_ERR_FULL);
    CHECK(got == std::vector<uint64_t>{50, 20, 90, 6});
}

TEST_CASE("mpsc: a waiting sender that gives up lets the next one through", "[mpsc][threads]")
{
    const vkp_env env = probed_env();
    vkp_mpsc_config config = config_of(8, 0, &env);
    config.capacity_bytes = 100;
    config.cost = value_cost;
    Channel channel(config);
    REQUIRE(channel.status == VKP_OK);
    REQUIRE(try_send(channel.tx, 50) == VKP_OK);
    // The large one gives up while the small one waits behind it; only that makes way for the small
    // one, for the receiver takes nothing until both have ended.
    std::atomic<bool> passes{false};
    WaitingSender large(channel.tx, 90, vkp_test_deadline(), &passes);
    WaitingSender small(channel.tx, 6, vkp_test_deadline());
    passes = true;
    CHECK(large.join() == VKP_ERR_TIMEOUT);
    CHECK(small.join() == VKP_OK);
    uint64_t value = 0;
    CHECK(vkp_mpsc_try_recv(channel.rx, &value) == VKP_OK);
    CHECK(value == 50);
    CHECK(vkp_mpsc_try_recv(channel.rx, &value) == VKP_OK);
    CHECK(value == 6);
    CHECK(vkp_mpsc_try_recv(channel.rx, &value) == VKP_ERR_EMPTY);
}

TEST_CASE("mpsc: recv_many serves every waiting sender that it made room for", "[mpsc][threads]")
{
    const vkp_env env = probed_env();
    Channel channel(config_of(8, 3, &env));
    REQUIRE(channel.status == VKP_OK);
    for (uint64_t i = 0; i < 3; i++) {
        REQUIRE(try_send(channel.tx, i) == VKP_OK);
    }
    std::vector<std::unique_ptr<WaitingSender>> senders;
    for (uint64_t i = 3; i < 6; i++) {
        senders.push_back(std::make_unique<WaitingSender>(channel.tx, i, vkp_test_deadline()));
    }
    uint64_t out[8];
    size_t count = 0;
    const vkp_status first = vkp_mpsc_recv_many(channel.rx, vkp_test_deadline(), out, 3, &count);
    // All three end without another receive.
    std::vector<vkp_status> statuses;
    for (const std::unique_ptr<WaitingSender> &sender : senders) {
        statuses.push_back(sender->join());
    }
    CHECK(first == VKP_OK);
    CHECK(count == 3);
    CHECK(statuses == std::vector<vkp_status>(3, VKP_OK));
    CHECK(vkp_mpsc_get_len(channel.rx) == 3);
    CHECK(vkp_mpsc_recv_many(channel.rx, 0, out, 8, &count) == VKP_OK);
    CHECK(count == 3);
    CHECK(out[0] == 3);
    CHECK(out[1] == 4);
    CHECK(out[2] == 5);
}

TEST_CASE("mpsc: closing ends every wait at once", "[mpsc][threads]")
{
    const vkp_env env = probed_env();
    Drops drops;
    vkp_mpsc_config config = config_of(8, 1, &env);
    config.drop = Drops::drop;
    config.user = &drops;
    for (bool unref : {false, true}) {
        drops.values.clear();
        vkp_mpsc_tx *tx = nullptr;
        vkp_mpsc_rx *rx = nullptr;
        REQUIRE(vkp_mpsc_open(&config, &tx, &rx) == VKP_OK);
        REQUIRE(try_send(tx, 1) == VKP_OK);
        WaitingSender a(tx, 2, VKP_FOREVER);
        WaitingSender b(tx, 3, VKP_FOREVER);
        if (unref) {
            vkp_mpsc_rx_unref(rx);
        } else {
            vkp_mpsc_close(rx);
        }
        CHECK(a.join() == VKP_ERR_CLOSED);
        CHECK(b.join() == VKP_ERR_CLOSED);
        uint64_t value = 0;
        if (!unref) {
            CHECK(vkp_mpsc_recv(rx, 0, &value) == VKP_OK);
            CHECK(value == 1);
            CHECK(vkp_mpsc_recv(rx, 0, &value) == VKP_ERR_CLOSED);
            vkp_mpsc_rx_unref(rx);
        }
        vkp_mpsc_tx_unref(tx);
        // The two refused values stayed with their senders.
        CHECK(drops.values == (unref ? std::vector<uint64_t>{1} : std::vector<uint64_t>{}));
    }
}

TEST_CASE("mpsc: a waiting receiver is told of close and of the last sender's end",
          "[mpsc][threads]")
{
    const vkp_env env = probed_env();
    for (size_t capacity : {size_t{0}, size_t{2}}) {
        Channel closed(config_of(8, capacity, &env));
        REQUIRE(closed.status == VKP_OK);
        WaitingReceiver first(closed.rx);
        vkp_mpsc_close(closed.rx);
        CHECK(first.join() == VKP_ERR_CLOSED);

        Channel orphaned(config_of(8, capacity, &env));
        REQUIRE(orphaned.status == VKP_OK);
        vkp_mpsc_tx *second = vkp_mpsc_tx_ref(orphaned.tx);
        WaitingReceiver receiver(orphaned.rx);
        vkp_mpsc_tx_unref(orphaned.tx);
        orphaned.tx = nullptr;
        vkp_mpsc_tx_unref(second);
        CHECK(receiver.join() == VKP_ERR_CLOSED);
    }
}

namespace {

// One run: senders send as fast as they can, the receiver takes in some manner, and in the end
// every value accounted for must be one of those sent, per sender in order.
struct Traffic {
    size_t senders;
    uint64_t each;
    size_t capacity_items;
    size_t capacity_bytes;
    int manner; // 0 recv, 1 try_recv, 2 recv_many, 3 recv with deadlines that often pass
};

void take_all(vkp_mpsc_rx *rx, int manner, const std::function<void(uint64_t)> &take)
{
    uint64_t out[64];
    for (;;) {
        size_t count = 1;
        vkp_status status;
        switch (manner) {
        case 0:
            status = vkp_mpsc_recv(rx, VKP_FOREVER, out);
            break;
        case 1:
            status = vkp_mpsc_try_recv(rx, out);
            break;
        case 2:
            status = vkp_mpsc_recv_many(rx, VKP_FOREVER, out, 64, &count);
            break;
        default:
            status = vkp_mpsc_recv(rx, vkp_now_ns() + 2000, out);
            break;
        }
        if (status == VKP_ERR_EMPTY || status == VKP_ERR_TIMEOUT) {
            sched_yield();
            continue;
        }
        if (status != VKP_OK) {
            return;
        }
        for (size_t i = 0; i < count; i++) {
            take(out[i]);
        }
    }
}

} // namespace

TEST_CASE("mpsc: threads: every value arrives once, in the order of its sender", "[mpsc][threads]")
{
    const Traffic runs[] = {
        {3, 20000, 0, 0, 0},  {3, 20000, 0, 0, 2},   {2, 20000, 0, 0, 3},   {3, 20000, 64, 0, 0},
        {3, 20000, 64, 0, 1}, {3, 20000, 64, 0, 2},  {2, 3000, 1, 0, 0},    {2, 3000, 1, 0, 2},
        {2, 3000, 1, 0, 3},   {3, 10000, 0, 128, 0}, {3, 10000, 7, 100, 2}, {1, 40000, 0, 0, 1},
    };
    for (const Traffic &run : runs) {
        INFO("senders " << run.senders << " items " << run.capacity_items << " bytes "
                        << run.capacity_bytes << " manner " << run.manner);
        vkp_mpsc_config config = config_of(8, run.capacity_items, nullptr);
        config.capacity_bytes = run.capacity_bytes;
        vkp_mpsc_tx *tx = nullptr;
        vkp_mpsc_rx *rx = nullptr;
        REQUIRE(vkp_mpsc_open(&config, &tx, &rx) == VKP_OK);
        std::vector<uint64_t> refused(run.senders, 0);
        std::vector<std::thread> workers;
        for (size_t s = 0; s < run.senders; s++) {
            vkp_mpsc_tx *own = vkp_mpsc_tx_ref(tx);
            workers.emplace_back([&, s, own] {
                for (uint64_t i = 0; i < run.each; i++) {
                    const uint64_t value = value_of(s, i);
                    refused[s] += vkp_mpsc_send(own, &value, VKP_FOREVER) != VKP_OK;
                }
                vkp_mpsc_tx_unref(own);
            });
        }
        vkp_mpsc_tx_unref(tx);
        std::vector<uint64_t> next(run.senders, 0);
        size_t disorder = 0;
        take_all(rx, run.manner, [&](uint64_t value) {
            const uint64_t sender = sender_of(value);
            if (sender >= run.senders || sequence_of(value) != next[sender]) {
                disorder++;
                return;
            }
            next[sender]++;
        });
        for (std::thread &worker : workers) {
            worker.join();
        }
        vkp_mpsc_rx_unref(rx);
        CHECK(disorder == 0);
        CHECK(refused == std::vector<uint64_t>(run.senders, 0));
        CHECK(next == std::vector<uint64_t>(run.senders, run.each));
    }
}

TEST_CASE("mpsc: threads: the bounds hold whenever the receiver looks", "[mpsc][threads]")
{
    vkp_mpsc_config config = config_of(8, 5, nullptr);
    vkp_mpsc_tx *tx = nullptr;
    vkp_mpsc_rx *rx = nullptr;
    REQUIRE(vkp_mpsc_open(&config, &tx, &rx) == VKP_OK);
    std::vector<std::thread> workers;
    for (size_t s = 0; s < 3; s++) {
        vkp_mpsc_tx *own = vkp_mpsc_tx_ref(tx);
        workers.emplace_back([s, own] {
            for (uint64_t i = 0; i < 5000; i++) {
                const uint64_t value = value_of(s, i);
                if (vkp_mpsc_send(own, &value, VKP_FOREVER) != VKP_OK) {
                    vkp_test_fail("a send without a deadline failed");
                }
            }
            vkp_mpsc_tx_unref(own);
        });
    }
    vkp_mpsc_tx_unref(tx);
    size_t longest = 0;
    uint64_t received = 0;
    uint64_t value = 0;
    for (;;) {
        longest = std::max(longest, vkp_mpsc_get_len(rx));
        if (vkp_mpsc_recv(rx, VKP_FOREVER, &value) != VKP_OK) {
            break;
        }
        received++;
    }
    for (std::thread &worker : workers) {
        worker.join();
    }
    vkp_mpsc_rx_unref(rx);
    CHECK(longest <= 5);
    CHECK(received == 15000);
}

namespace {

struct AtomicDrops {
    std::atomic<uint64_t> count{0};
    std::atomic<uint64_t> sum{0};
    static void drop(void *user, void *item)
    {
        AtomicDrops *self = static_cast<AtomicDrops *>(user);
        self->count.fetch_add(1, std::memory_order_relaxed);
        self->sum.fetch_add(*static_cast<uint64_t *>(item), std::memory_order_relaxed);
    }
};

} // namespace

TEST_CASE("mpsc: threads: whatever ends the traffic, sent is received plus dropped",
          "[mpsc][threads]")
{
    // The end comes from the receiver by unref, by close and drain, or from a third thread by
    // close, while senders wait, send with deadlines and try.
    for (int round = 0; round < 60; round++) {
        const int ending = round % 3;
        const size_t capacity =
            std::vector<size_t>{0, 1, 4, 50}[static_cast<size_t>(round / 3) % 4];
        INFO("ending " << ending << " capacity " << capacity);
        AtomicDrops drops;
        vkp_mpsc_config config = config_of(8, capacity, nullptr);
        config.drop = AtomicDrops::drop;
        config.user = &drops;
        vkp_mpsc_tx *tx = nullptr;
        vkp_mpsc_rx *rx = nullptr;
        REQUIRE(vkp_mpsc_open(&config, &tx, &rx) == VKP_OK);
        const size_t senders = 3;
        std::vector<uint64_t> sent(senders, 0);
        std::vector<uint64_t> sum(senders, 0);
        std::vector<int> strange(senders, 0);
        std::vector<std::thread> workers;
        for (size_t s = 0; s < senders; s++) {
            vkp_mpsc_tx *own = vkp_mpsc_tx_ref(tx);
            workers.emplace_back([&, s, own] {
                for (uint64_t i = 0; i < 100000; i++) {
                    const uint64_t value = value_of(s, i);
                    const vkp_status status = s == 0 ? vkp_mpsc_send(own, &value, VKP_FOREVER)
                                              : s == 1
                                                  ? vkp_mpsc_send(own, &value, vkp_now_ns() + 3000)
                                                  : vkp_mpsc_try_send(own, &value);
                    if (status == VKP_OK) {
                        sent[s]++;
                        sum[s] += value;
                    } else if (status == VKP_ERR_CLOSED) {
                        strange[s] += vkp_mpsc_is_closed(own) ? 0 : 1;
                        break;
                    } else if (status != (s == 1 ? VKP_ERR_TIMEOUT : VKP_ERR_FULL) || s == 0) {
                        strange[s]++;
                    }
                }
                vkp_mpsc_tx_unref(own);
            });
        }
        uint64_t received = 0;
        uint64_t received_sum = 0;
        uint64_t value = 0;
        std::thread closer;
        if (ending == 2) {
            closer = std::thread([rx] { vkp_mpsc_close(rx); });
        }
        for (int i = 0; i < 200 + round * 10; i++) {
            if (vkp_mpsc_recv(rx, VKP_FOREVER, &value) != VKP_OK) {
                break;
            }
            received++;
            received_sum += value;
        }
        if (ending != 0) {
            vkp_mpsc_close(rx);
            while (vkp_mpsc_recv(rx, VKP_FOREVER, &value) == VKP_OK) {
                received++;
                received_sum += value;
            }
        }
        if (closer.joinable()) {
            closer.join();
        }
        vkp_mpsc_rx_unref(rx);
        for (std::thread &worker : workers) {
            worker.join();
        }
        vkp_mpsc_tx_unref(tx);
        uint64_t all_sent = 0;
        uint64_t all_sum = 0;
        for (size_t s = 0; s < senders; s++) {
            all_sent += sent[s];
            all_sum += sum[s];
            CHECK(strange[s] == 0);
        }
        CHECK(all_sent == received + drops.count.load());
        CHECK(all_sum == received_sum + drops.sum.load());
        if (ending != 0) {
            CHECK(drops.count.load() == 0);
        }
    }
}

TEST_CASE("mpsc: threads: deadlines that pass in the moment of room lose and double nothing",
          "[mpsc][threads]")
{
    vkp_mpsc_config config = config_of(8, 1, nullptr);
    vkp_mpsc_tx *tx = nullptr;
    vkp_mpsc_rx *rx = nullptr;
    REQUIRE(vkp_mpsc_open(&config, &tx, &rx) == VKP_OK);
    const size_t senders = 2;
    std::vector<std::vector<uint64_t>> sent(senders);
    std::vector<int> strange(senders, 0);
    std::vector<std::thread> workers;
    for (size_t s = 0; s < senders; s++) {
        vkp_mpsc_tx *own = vkp_mpsc_tx_ref(tx);
        workers.emplace_back([&, s, own] {
            for (uint64_t i = 0; i < 10000; i++) {
                const uint64_t value = value_of(s, i);
                const vkp_status status = vkp_mpsc_send(own, &value, vkp_now_ns() + i % 40 * 500);
                if (status == VKP_OK) {
                    sent[s].push_back(value);
                } else {
                    strange[s] += status != VKP_ERR_TIMEOUT;
                }
            }
            vkp_mpsc_tx_unref(own);
        });
    }
    vkp_mpsc_tx_unref(tx);
    std::vector<std::vector<uint64_t>> received(senders);
    size_t unknown = 0;
    take_all(rx, 3, [&](uint64_t value) {
        if (sender_of(value) < senders) {
            received[sender_of(value)].push_back(value);
        } else {
            unknown++;
        }
    });
    for (std::thread &worker : workers) {
        worker.join();
    }
    vkp_mpsc_rx_unref(rx);
    CHECK(unknown == 0);
    CHECK(strange == std::vector<int>(senders, 0));
    CHECK((received == sent));
}

TEST_CASE("mpsc: threads: the receiver may move from thread to thread", "[mpsc][threads]")
{
    vkp_mpsc_config config = config_of(8, 4, nullptr);
    vkp_mpsc_tx *tx = nullptr;
    vkp_mpsc_rx *rx = nullptr;
    REQUIRE(vkp_mpsc_open(&config, &tx, &rx) == VKP_OK);
    const uint64_t total = 4000;
    std::thread sender([tx] {
        for (uint64_t i = 0; i < total; i++) {
            if (vkp_mpsc_send(tx, &i, VKP_FOREVER) != VKP_OK) {
                vkp_test_fail("a send without a deadline failed");
            }
        }
        vkp_mpsc_tx_unref(tx);
    });
    uint64_t next = 0;
    size_t disorder = 0;
    while (next < total) {
        std::thread receiver([&] {
            for (int i = 0; i < 100 && next < total; i++) {
                uint64_t value = 0;
                if (vkp_mpsc_recv(rx, VKP_FOREVER, &value) != VKP_OK || value != next) {
                    disorder++;
                }
                next++;
            }
        });
        receiver.join();
    }
    sender.join();
    uint64_t value = 0;
    CHECK(disorder == 0);
    CHECK(vkp_mpsc_recv(rx, VKP_FOREVER, &value) == VKP_ERR_CLOSED);
    vkp_mpsc_rx_unref(rx);
}

TEST_CASE("mpsc: threads: references come and go while values pass", "[mpsc][threads]")
{
    for (int round = 0; round < 200; round++) {
        vkp_mpsc_config config = config_of(8, round % 2 ? 2 : 0, nullptr);
        vkp_mpsc_tx *tx = nullptr;
        vkp_mpsc_rx *rx = nullptr;
        REQUIRE(vkp_mpsc_open(&config, &tx, &rx) == VKP_OK);
        std::vector<std::thread> workers;
        for (uint64_t s = 0; s < 3; s++) {
            vkp_mpsc_tx *own = vkp_mpsc_tx_ref(tx);
            workers.emplace_back([s, own] {
                for (uint64_t i = 0; i < 20; i++) {
                    vkp_mpsc_tx *another = vkp_mpsc_tx_ref(own);
                    const uint64_t value = value_of(s, i);
                    if (vkp_mpsc_send(another, &value, VKP_FOREVER) != VKP_OK) {
                        vkp_test_fail("a send without a deadline failed");
                    }
                    vkp_mpsc_tx_unref(another);
                }
                vkp_mpsc_tx_unref(own);
            });
        }
        vkp_mpsc_tx_unref(tx);
        uint64_t received = 0;
        take_all(rx, round % 4, [&](uint64_t) { received++; });
        for (std::thread &worker : workers) {
            worker.join();
        }
        vkp_mpsc_rx_unref(rx);
        REQUIRE(received == 60);
    }
}

namespace {

// The same story under any faults: what is refused stays the caller's, what is taken arrives or is
// dropped, and afterwards the channel works. Returns how often memory was refused.
size_t story_under_faults(Env &env, size_t capacity, vkp_test_fault kind, uint64_t k)
{
    size_t refused = 0;
    Drops drops;
    vkp_mpsc_config config = config_of(8, capacity, &env.test.env);
    config.drop = Drops::drop;
    config.user = &drops;
    vkp_mpsc_tx *tx = nullptr;
    vkp_mpsc_rx *rx = nullptr;
    std::vector<uint64_t> sent;
    std::vector<uint64_t> got;
    env.fault(kind, k);
    const vkp_status opened = vkp_mpsc_open(&config, &tx, &rx);
    if (opened != VKP_OK) {
        CHECK(opened == VKP_ERR_NOMEM);
        CHECK(tx == nullptr);
        CHECK(rx == nullptr);
        env.fault(VKP_TEST_FAULT_NONE, 0);
        CHECK(env.blocks() == 0);
        return 1;
    }
    const auto send = [&](uint64_t value) {
        const vkp_status status =
            value % 2 ? vkp_mpsc_try_send(tx, &value) : vkp_mpsc_send(tx, &value, 0);
        if (status == VKP_OK) {
            sent.push_back(value);
        } else if (status == VKP_ERR_NOMEM) {
            refused++;
        } else {
            CHECK(status == VKP_OK);
        }
    };
    const auto recv = [&](size_t most) {
        uint64_t value = 0;
        while (most-- > 0 && vkp_mpsc_try_recv(rx, &value) == VKP_OK) {
            got.push_back(value);
        }
    };
    uint64_t next = 0;
    for (int round = 0; round < 6; round++) {
        for (int i = 0; i < 150; i++) {
            send(next++);
        }
        recv(round == 3 ? 1000 : 100);
    }
    env.fault(VKP_TEST_FAULT_NONE, 0);
    const size_t refused_before = refused;
    recv(1000);
    for (int i = 0; i < 150; i++) {
        send(next++);
    }
    CHECK(refused == refused_before);
    recv(50);
    vkp_mpsc_rx_unref(rx);
    vkp_mpsc_tx_unref(tx);
    got.insert(got.end(), drops.values.begin(), drops.values.end());
    CHECK(got == sent);
    CHECK(env.blocks() == 0);
    return refused;
}

} // namespace

TEST_CASE("mpsc: memory may fail at every allocation; nothing is lost or leaked", "[mpsc][faults]")
{
    Env env;
    for (size_t capacity : {size_t{0}, size_t{1000}}) {
        const uint64_t before = vkp_test_env_calls(&env.test);
        REQUIRE(story_under_faults(env, capacity, VKP_TEST_FAULT_NONE, 0) == 0);
        const uint64_t calls = vkp_test_env_calls(&env.test) - before;
        REQUIRE(calls > 0);
        for (vkp_test_fault kind :
             {VKP_TEST_FAULT_ONCE, VKP_TEST_FAULT_FROM, VKP_TEST_FAULT_EVERY}) {
            for (uint64_t k = 1; k <= calls; k++) {
                INFO("capacity " << capacity << " kind " << kind << " k " << k);
                const uint64_t failures = vkp_test_env_failures(&env.test);
                const size_t refused = story_under_faults(env, capacity, kind, k);
                // Each failure is either reported or did no harm; none is reported without one.
                CHECK(refused <= vkp_test_env_failures(&env.test) - failures);
                // A fault armed later than the story's last allocation before it is disarmed meets
                // nothing.
                if (k == 1) {
                    CHECK(vkp_test_env_failures(&env.test) > failures);
                }
            }
        }
    }
}
