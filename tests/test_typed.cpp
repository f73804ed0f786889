// SPDX-License-Identifier: MIT
//
// Channels of a type: what the macros make, in a C unit (typed_unit.c) and here in C++. That wrong
// types do not compile is scripts/check_typed.sh's to show.
#include "support/catch.hpp"

#include <atomic>
#include <cstddef>
#include <thread>
#include <type_traits>
#include <vector>

#include "support/channel_probe.h"
#include "support/support.h"
#include "typed_unit.h"

namespace {

struct point {
    int32_t x;
    int32_t y;
};

template <size_t Bytes>
struct filler {
    unsigned char bytes[Bytes];
};

VKP_MPSC_TYPED(points, point);
VKP_MPSC_TYPED(words, uint64_t);
VKP_MPSC_TYPED(small, filler<1>);
VKP_MPSC_TYPED(three_words, filler<24>);
VKP_MPSC_TYPED(lines, filler<64>);
VKP_MPSC_TYPED(large, filler<4096>);
VKP_MPSC_TYPED(counters, int *);
VKP_ONESHOT_TYPED(point_slot, point);
VKP_BROADCAST_TYPED(point_cast, point);
VKP_WATCH_TYPED(point_watch, point);

static_assert(!std::is_convertible<points_tx *, words_tx *>::value, "channels are apart");
static_assert(!std::is_convertible<points_tx *, points_rx *>::value, "ends are apart");
static_assert(!std::is_convertible<points_tx *, vkp_mpsc_tx *>::value, "raw is asked for");
static_assert(!std::is_convertible<point_cast_rx *, point_watch_rx *>::value, "kinds are apart");
static_assert(std::is_same<decltype(points_raw_tx(nullptr)), vkp_mpsc_tx *>::value, "raw is raw");
static_assert(sizeof(point_slot) == sizeof(vkp_oneshot), "a typed slot is a slot");

bool peeks_at_constant_pointers(vkp_status (*)(counters_rx *, int *const **))
{
    return true;
}
// Whatever else the call takes.
template <typename Call>
bool peeks_at_constant_pointers(Call)
{
    return false;
}

// One value of each size there and back, through a ring's end.
template <typename Tx, typename Rx, size_t Bytes, typename Open, typename Send, typename Recv>
size_t wrong_values(Open open, Send send, Recv recv, void (*unref_tx)(Tx *), void (*unref_rx)(Rx *))
{
    vkp_mpsc_config config = VKP_ZERO;
    config.capacity_items = 3;
    Tx *tx = nullptr;
    Rx *rx = nullptr;
    size_t wrong = open(&config, &tx, &rx) != VKP_OK;
    for (uint64_t number = 0; wrong == 0 && number < 40; number++) {
        filler<Bytes> in;
        filler<Bytes> out;
        vkp_test_fill(&in, Bytes, number);
        wrong += send(tx, in, VKP_FOREVER) != VKP_OK;
        wrong += recv(rx, VKP_FOREVER, &out) != VKP_OK;
        wrong += !vkp_test_is_filled(&out, Bytes, number);
    }
    unref_tx(tx);
    unref_rx(rx);
    return wrong;
}

} // namespace

TEST_CASE("typed: all four macros in a C unit", "[typed]")
{
    CHECK(typed_unit_mpsc() == 0);
    CHECK(typed_unit_oneshot() == 0);
    CHECK(typed_unit_broadcast() == 0);
    CHECK(typed_unit_watch() == 0);
}

TEST_CASE("typed: values of every size that is moved in a way of its own", "[typed]")
{
    CHECK(wrong_values<small_tx, small_rx, 1>(small_open, small_send, small_recv, small_tx_unref,
                                              small_rx_unref) == 0);
    CHECK(wrong_values<three_words_tx, three_words_rx, 24>(three_words_open, three_words_send,
                                                           three_words_recv, three_words_tx_unref,
                                                           three_words_rx_unref) == 0);
    CHECK(wrong_values<lines_tx, lines_rx, 64>(lines_open, lines_send, lines_recv, lines_tx_unref,
                                               lines_rx_unref) == 0);
    CHECK(wrong_values<large_tx, large_rx, 4096>(large_open, large_send, large_recv, large_tx_unref,
                                                 large_rx_unref) == 0);
}

TEST_CASE("typed: pointers are values: what is const is the pointer, not what it points to",
          "[typed]")
{
    CHECK(peeks_at_constant_pointers(counters_peek));
    counters_tx *tx = nullptr;
    counters_rx *rx = nullptr;
    int counter = 0;
    int *out = nullptr;
    REQUIRE(counters_open(nullptr, &tx, &rx) == VKP_OK);
    CHECK(counters_send(tx, &counter, 0) == VKP_OK);
    CHECK(counters_recv(rx, 0, &out) == VKP_OK);
    CHECK(out == &counter);
    counters_tx_unref(tx);
    counters_rx_unref(rx);
}

TEST_CASE("typed: the size of a value comes from its type", "[typed]")
{
    vkp_mpsc_config config = VKP_ZERO;
    config.elem_bytes = 3;
    words_tx *tx = nullptr;
    words_rx *rx = nullptr;
    uint64_t out = 0;
    REQUIRE(words_open(&config, &tx, &rx) == VKP_OK);
    REQUIRE(words_send(tx, UINT64_MAX - 5, 0) == VKP_OK);
    REQUIRE(words_recv(rx, 0, &out) == VKP_OK);
    CHECK(out == UINT64_MAX - 5);
    words_tx_unref(tx);
    words_rx_unref(rx);
}

TEST_CASE("typed: the rest of the config is the caller's", "[typed]")
{
    vkp_test_memory memory;
    std::vector<int32_t> dropped;
    vkp_mpsc_config config = VKP_ZERO;
    config.capacity_items = 2;
    config.env = memory.env();
    config.user = &dropped;
    config.drop = [](void *user, void *item) {
        static_cast<std::vector<int32_t> *>(user)->push_back(static_cast<point *>(item)->x);
    };
    points_tx *tx = nullptr;
    points_rx *rx = nullptr;
    REQUIRE(points_open(&config, &tx, &rx) == VKP_OK);
    CHECK(points_send(tx, point{1, 2}, 0) == VKP_OK);
    CHECK(points_send(tx, point{3, 4}, 0) == VKP_OK);
    CHECK(points_send(tx, point{5, 6}, 0) == VKP_ERR_TIMEOUT);
    points_rx_unref(rx);
    points_tx_unref(tx);
    CHECK(dropped == std::vector<int32_t>{1, 3});
    CHECK(memory.blocks() == 0);
}

TEST_CASE("typed: refused calls give nothing", "[typed][faults]")
{
    vkp_test_memory memory;
    vkp_mpsc_config mpsc = VKP_ZERO;
    vkp_broadcast_config cast = VKP_ZERO;
    vkp_watch_config watch = VKP_ZERO;
    mpsc.env = memory.env();
    cast.env = memory.env();
    watch.env = memory.env();
    points_tx *tx = nullptr;
    points_rx *rx = nullptr;
    point_cast_tx *cast_tx = nullptr;
    point_cast_rx *cast_rx = nullptr;
    point_watch_tx *watch_tx = nullptr;
    point_watch_rx *watch_rx = nullptr;
    CHECK(points_open(&mpsc, nullptr, &rx) == VKP_ERR_INVALID);
    CHECK(points_open(&mpsc, &tx, nullptr) == VKP_ERR_INVALID);
    CHECK(point_cast_open(nullptr, &cast_tx) == VKP_ERR_INVALID);
    CHECK(point_watch_open(&watch, nullptr, nullptr) == VKP_ERR_INVALID);
    memory.fail(VKP_TEST_FAULT_FROM, 1);
    CHECK(points_open(&mpsc, &tx, &rx) == VKP_ERR_NOMEM);
    CHECK(point_watch_open(&watch, nullptr, &watch_tx) == VKP_ERR_NOMEM);
    CHECK(point_cast_open(&cast, &cast_tx) == VKP_ERR_INVALID); // no capacity
    cast.capacity_items = 1;
    CHECK(point_cast_open(&cast, &cast_tx) == VKP_ERR_NOMEM);
    CHECK(tx == nullptr);
    CHECK(rx == nullptr);
    CHECK(cast_tx == nullptr);
    CHECK(watch_tx == nullptr);
    memory.heal();
    REQUIRE(point_cast_open(&cast, &cast_tx) == VKP_OK);
    REQUIRE(point_watch_open(&watch, nullptr, &watch_tx) == VKP_OK);
    memory.fail(VKP_TEST_FAULT_FROM, 1);
    CHECK(point_cast_subscribe(cast_tx, &cast_rx) == VKP_ERR_NOMEM);
    CHECK(point_watch_subscribe(watch_tx, &watch_rx) == VKP_ERR_NOMEM);
    CHECK(cast_rx == nullptr);
    CHECK(watch_rx == nullptr);
    memory.heal();
    point_cast_tx_unref(cast_tx);
    point_watch_tx_unref(watch_tx);
    CHECK(memory.blocks() == 0);
}

TEST_CASE("typed: raw handles are the same channel: select, watches, counts", "[typed][loop]")
{
    for (const vkp_backend *const *backend = vkp_test_backends(); *backend; backend++) {
        INFO((*backend)->name);
        words_tx *tx = nullptr;
        words_rx *rx = nullptr;
        REQUIRE(words_open(nullptr, &tx, &rx) == VKP_OK);
        uint64_t got = 0;
        {
            vkp_test_watched watched(*backend);
            size_t calls = 0;
            REQUIRE(watched.watch(words_case_recv(rx, &got),
                                  [&] { calls += words_try_recv(rx, &got) == VKP_OK; }) == VKP_OK);
            REQUIRE(words_send(tx, 77, 0) == VKP_OK);
            watched.until("a value", [&] { return calls == 1; });
        }
        CHECK(got == 77);
        CHECK(vkp_mpsc_get_senders(words_raw_tx(tx)) == 1);
        vkp_mpsc_weak *weak = vkp_mpsc_downgrade(words_raw_tx(tx));
        words_tx_unref(tx);
        CHECK(vkp_mpsc_rx_is_closed(words_raw_rx(rx)));
        vkp_mpsc_weak_unref(weak);
        words_rx_unref(rx);
    }
}

TEST_CASE("typed: threads: a request, its slot in the caller's memory, and the reply",
          "[typed][threads]")
{
    struct request {
        int32_t number;
        point_slot *reply;
    };
    for (const vkp_test_build &build : vkp_test_builds) {
        const vkp_test_watchdog watchdog;
        INFO(build.name);
        const vkp_env env = vkp_test_env_of(build);
        vkp_mpsc_config config = VKP_ZERO;
        config.env = &env;
        config.capacity_items = 4;
        config.elem_bytes = sizeof(request);
        vkp_mpsc_tx *tx = nullptr;
        vkp_mpsc_rx *rx = nullptr;
        REQUIRE(vkp_mpsc_open(&config, &tx, &rx) == VKP_OK);
        std::atomic<size_t> wrong{0};
        std::thread server([&] {
            request got;
            while (vkp_mpsc_recv(rx, vkp_test_deadline(), &got) == VKP_OK) {
                wrong += point_slot_send(got.reply, point{got.number, -got.number}) != VKP_OK;
            }
        });
        std::vector<std::thread> clients;
        for (int32_t c = 0; c < 2; c++) {
            clients.emplace_back([&, c] {
                for (int32_t i = 0; i < 500; i++) {
                    point_slot slot;
                    point reply = {0, 0};
                    wrong += point_slot_init(&slot, &env, nullptr, nullptr) != VKP_OK;
                    const request ask = {c * 1000 + i, &slot};
                    wrong += vkp_mpsc_send(tx, &ask, vkp_test_deadline()) != VKP_OK;
                    wrong += point_slot_recv(&slot, vkp_test_deadline(), &reply) != VKP_OK;
                    wrong += reply.x != ask.number || reply.y != -ask.number;
                }
            });
        }
        for (std::thread &client : clients) {
            client.join();
        }
        vkp_mpsc_tx_unref(tx);
        server.join();
        vkp_mpsc_rx_unref(rx);
        CHECK(wrong.load() == 0);
    }
}

namespace {
struct Rest {
    int64_t number;
};
VKP_MPSC_TYPED(rest_queue, Rest);
VKP_BROADCAST_TYPED(rest_news, Rest);
VKP_WATCH_TYPED(rest_state, Rest);
} // namespace

TEST_CASE("typed: clones, places, batches and copies have the type, too")
{
    rest_queue_tx *tx = nullptr;
    rest_queue_tx *clone = nullptr;
    rest_queue_rx *rx = nullptr;
    vkp_mpsc_config queue = VKP_ZERO;
    queue.lanes = true;
    REQUIRE(rest_queue_open(&queue, &tx, &rx) == VKP_OK);
    REQUIRE(rest_queue_tx_clone(tx, &clone) == VKP_OK);
    vkp_mpsc_permit permit = VKP_ZERO;
    Rest *place = nullptr;
    REQUIRE(rest_queue_try_reserve(clone, &permit, &place) == VKP_OK);
    place->number = 7;
    vkp_mpsc_commit(&permit);
    Rest got = {0};
    REQUIRE(rest_queue_try_recv(rx, &got) == VKP_OK);
    CHECK(got.number == 7);
    CHECK(rest_queue_tx_clone(tx, nullptr) == VKP_ERR_INVALID);
    CHECK(rest_queue_try_reserve(tx, &permit, nullptr) == VKP_ERR_INVALID);
    CHECK(rest_queue_peek(rx, nullptr) == VKP_ERR_INVALID);
    rest_queue_tx_unref(clone);
    rest_queue_tx_unref(tx);
    rest_queue_rx_unref(rx);

    rest_news_tx *news = nullptr;
    rest_news_rx *reader = nullptr;
    rest_news_rx *late = nullptr;
    vkp_broadcast_config ring = VKP_ZERO;
    ring.capacity_items = 4;
    REQUIRE(rest_news_open(&ring, &news) == VKP_OK);
    REQUIRE(rest_news_subscribe(news, &reader) == VKP_OK);
    REQUIRE(rest_news_send(news, Rest{1}) == VKP_OK);
    REQUIRE(rest_news_resubscribe(reader, &late) == VKP_OK);
    REQUIRE(rest_news_send(news, Rest{2}) == VKP_OK);
    Rest batch[4] = {{0}, {0}, {0}, {0}};
    size_t count = 0;
    REQUIRE(rest_news_recv_many(reader, 0, batch, 4, &count) == VKP_OK);
    CHECK(count == 2);
    CHECK(batch[1].number == 2);
    size_t won = 9;
    vkp_case cases[] = {rest_news_case_recv(late, &got)};
    REQUIRE(vkp_select(cases, 1, 0, &won) == VKP_OK);
    CHECK(got.number == 2);
    CHECK(rest_news_resubscribe(reader, nullptr) == VKP_ERR_INVALID);
    rest_news_rx_unref(reader);
    rest_news_rx_unref(late);
    rest_news_tx_unref(news);

    rest_state_tx *state = nullptr;
    rest_state_rx *looker = nullptr;
    rest_state_rx *copy = nullptr;
    const Rest initial = {3};
    REQUIRE(rest_state_open(nullptr, &initial, &state) == VKP_OK);
    REQUIRE(rest_state_subscribe(state, &looker) == VKP_OK);
    REQUIRE(rest_state_rx_clone(looker, &copy) == VKP_OK);
    rest_state_tx_unref(rest_state_tx_ref(state));
    REQUIRE(rest_state_send(state, Rest{4}) == VKP_OK);
    REQUIRE(rest_state_get_and_update(looker, &got) == VKP_OK);
    CHECK(got.number == 4);
    CHECK(rest_state_changed(looker, 0) == VKP_ERR_TIMEOUT);
    const Rest *seen = rest_state_borrow_and_update(copy);
    REQUIRE(seen != nullptr);
    CHECK(seen->number == 4);
    rest_state_release(copy);
    CHECK(rest_state_changed(copy, 0) == VKP_ERR_TIMEOUT);
    CHECK(rest_state_rx_clone(looker, nullptr) == VKP_ERR_INVALID);
    rest_state_rx_unref(copy);
    rest_state_rx_unref(looker);
    rest_state_tx_unref(state);
}
