// SPDX-License-Identifier: MIT
//
// Watch: only the newest value, which may be borrowed where it lies. Tests of one thread fix every
// answer, against a model where that helps; threaded ones look for values torn, versions that went
// back, wake-ups that were lost, and values dropped while somebody looked at them.
#include "support/catch.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "support/channel_probe.h"
#include "support/support.h"

namespace {

vkp_watch_config config_of(size_t elem_bytes, const void *initial, const vkp_env *env)
{
    vkp_watch_config config = VKP_ZERO;
    config.elem_bytes = elem_bytes;
    config.initial = initial;
    config.env = env;
    return config;
}

const uint64_t zero = 0;

// Values are numbers that the ledger knows; the initial one is 0.
vkp_watch_config owning(const vkp_env *env, vkp_test_ledger *ledger)
{
    vkp_watch_config config = config_of(8, &zero, env);
    config.drop = vkp_test_ledger::drop;
    config.user = ledger;
    ledger->own(0);
    return config;
}

// One reference to a sender.
struct Sender {
    vkp_watch_tx *tx = nullptr;
    vkp_status status;
    explicit Sender(const vkp_watch_config &config) : status(vkp_watch_open(&config, &tx))
    {
    }
    ~Sender()
    {
        vkp_watch_tx_unref(tx);
    }
    Sender(const Sender &) = delete;
    Sender &operator=(const Sender &) = delete;
    void end()
    {
        vkp_watch_tx_unref(tx);
        tx = nullptr;
    }
    vkp_status send(uint64_t value)
    {
        return vkp_watch_send(tx, &value);
    }
    vkp_status replace(uint64_t value)
    {
        return vkp_watch_replace(tx, &value);
    }
};

struct Receiver {
    vkp_watch_rx *rx = nullptr;
    explicit Receiver(const Sender &sender)
    {
        if (vkp_watch_subscribe(sender.tx, &rx) != VKP_OK) {
            vkp_test_fail("a receiver was refused");
        }
    }
    explicit Receiver(const Receiver &other)
    {
        if (vkp_watch_rx_clone(other.rx, &rx) != VKP_OK) {
            vkp_test_fail("a copy of a receiver was refused");
        }
    }
    ~Receiver()
    {
        vkp_watch_rx_unref(rx);
    }
    Receiver &operator=(const Receiver &) = delete;
    void end()
    {
        vkp_watch_rx_unref(rx);
        rx = nullptr;
    }
    vkp_status changed(uint64_t deadline_ns = 0)
    {
        return vkp_watch_changed(rx, deadline_ns);
    }
    bool has_changed() const
    {
        return vkp_watch_is_changed(rx);
    }
    uint64_t get()
    {
        uint64_t value = UINT64_MAX;
        return vkp_watch_get(rx, &value) == VKP_OK ? value : UINT64_MAX;
    }
    uint64_t get_and_update()
    {
        uint64_t value = UINT64_MAX;
        return vkp_watch_get_and_update(rx, &value) == VKP_OK ? value : UINT64_MAX;
    }
    // What is borrowed, until release.
    const uint64_t *borrow()
    {
        return static_cast<const uint64_t *>(vkp_watch_borrow(rx));
    }
    const uint64_t *borrow_and_update()
    {
        return static_cast<const uint64_t *>(vkp_watch_borrow_and_update(rx));
    }
    uint64_t look()
    {
        const uint64_t *value = borrow();
        const uint64_t copy = value ? *value : UINT64_MAX;
        vkp_watch_release(rx);
        return copy;
    }
};

bool add_one(void *, void *item)
{
    ++*static_cast<uint64_t *>(item);
    return true;
}

} // namespace

TEST_CASE("watch: open refuses what makes no channel", "[watch]")
{
    vkp_watch_tx *tx = nullptr;
    const vkp_watch_config good = config_of(8, nullptr, nullptr);
    const vkp_watch_config none = config_of(0, nullptr, nullptr);
    const vkp_watch_config large = config_of(64 * 1024 + 1, nullptr, nullptr);
    CHECK(vkp_watch_open(nullptr, &tx) == VKP_ERR_INVALID);
    CHECK(vkp_watch_open(&good, nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_watch_open(&none, &tx) == VKP_ERR_INVALID);
    CHECK(vkp_watch_open(&large, &tx) == VKP_ERR_INVALID);
    CHECK(tx == nullptr);
}

TEST_CASE("watch: null arguments are INVALID, null handles are ignored by unref", "[watch]")
{
    Sender sender(config_of(8, nullptr, nullptr));
    REQUIRE(sender.status == VKP_OK);
    Receiver receiver(sender);
    vkp_watch_rx *rx = nullptr;
    uint64_t value = 5;
    CHECK(vkp_watch_subscribe(nullptr, &rx) == VKP_ERR_INVALID);
    CHECK(vkp_watch_subscribe(sender.tx, nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_watch_rx_clone(nullptr, &rx) == VKP_ERR_INVALID);
    CHECK(vkp_watch_rx_clone(receiver.rx, nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_watch_send(nullptr, &value) == VKP_ERR_INVALID);
    CHECK(vkp_watch_send(sender.tx, nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_watch_replace(nullptr, &value) == VKP_ERR_INVALID);
    CHECK(vkp_watch_replace(sender.tx, nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_watch_send_if_modified(nullptr, add_one, nullptr, nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_watch_send_if_modified(sender.tx, nullptr, nullptr, nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_watch_get(nullptr, &value) == VKP_ERR_INVALID);
    CHECK(vkp_watch_get(receiver.rx, nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_watch_get_and_update(nullptr, &value) == VKP_ERR_INVALID);
    CHECK(vkp_watch_get_and_update(receiver.rx, nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_watch_changed(nullptr, 0) == VKP_ERR_INVALID);
    CHECK(vkp_watch_wait_closed(nullptr, 0) == VKP_ERR_INVALID);
    vkp_watch_tx_unref(nullptr);
    vkp_watch_rx_unref(nullptr);
    CHECK(rx == nullptr);
    CHECK(value == 5);
    CHECK(receiver.get() == 0);
    CHECK_FALSE(receiver.has_changed());
}

TEST_CASE("watch: the initial value is there and counts as seen", "[watch]")
{
    const uint64_t initial = 42;
    Sender sender(config_of(8, &initial, nullptr));
    Receiver receiver(sender);
    CHECK(receiver.get() == 42);
    CHECK(receiver.look() == 42);
    CHECK_FALSE(receiver.has_changed());
    CHECK(receiver.changed() == VKP_ERR_TIMEOUT);
    Sender empty(config_of(8, nullptr, nullptr));
    Receiver other(empty);
    CHECK(other.get() == 0);
    CHECK_FALSE(other.has_changed());
}

TEST_CASE("watch: only the newest value is there, and one change is told for many", "[watch]")
{
    Sender sender(config_of(8, nullptr, nullptr));
    Receiver first(sender);
    Receiver second(sender);
    for (uint64_t value = 1; value <= 100; value++) {
        REQUIRE(sender.send(value) == VKP_OK);
    }
    CHECK(first.has_changed());
    CHECK(first.changed() == VKP_OK);
    CHECK(first.get() == 100);
    CHECK_FALSE(first.has_changed());
    CHECK(first.changed() == VKP_ERR_TIMEOUT);
    // Each receiver has its own opinion of what is new.
    CHECK(second.has_changed());
    CHECK(second.changed(VKP_FOREVER) == VKP_OK);
    CHECK(second.changed() == VKP_ERR_TIMEOUT);
    // An equal value is a new version nevertheless.
    REQUIRE(sender.send(100) == VKP_OK);
    CHECK(first.changed() == VKP_OK);
}

TEST_CASE("watch: borrow and get show the newest value; only those with update mark it as seen",
          "[watch]")
{
    Sender sender(config_of(8, nullptr, nullptr));
    Receiver receiver(sender);
    REQUIRE(sender.send(1) == VKP_OK);
    CHECK(receiver.get() == 1);
    CHECK(receiver.look() == 1);
    CHECK(receiver.has_changed());
    CHECK(receiver.get_and_update() == 1);
    CHECK_FALSE(receiver.has_changed());
    REQUIRE(sender.send(2) == VKP_OK);
    const uint64_t *borrowed = receiver.borrow_and_update();
    REQUIRE(borrowed != nullptr);
    CHECK(*borrowed == 2);
    vkp_watch_release(receiver.rx);
    CHECK_FALSE(receiver.has_changed());
    CHECK(receiver.changed() == VKP_ERR_TIMEOUT);
    // changed() marks, and shows nothing: what is read then may be newer than what it told.
    REQUIRE(sender.send(3) == VKP_OK);
    CHECK(receiver.changed() == VKP_OK);
    REQUIRE(sender.send(4) == VKP_OK);
    CHECK(receiver.get() == 4);
    CHECK(receiver.has_changed());
}

TEST_CASE("watch: one borrow per receiver at a time", "[watch]")
{
    Sender sender(config_of(8, nullptr, nullptr));
    Receiver receiver(sender);
    Receiver other(sender);
    vkp_watch_release(receiver.rx); // ignored without a borrow
    const uint64_t *first = receiver.borrow();
    REQUIRE(first != nullptr);
    REQUIRE(sender.send(1) == VKP_OK);
    CHECK(receiver.borrow() == nullptr);
    CHECK(receiver.borrow_and_update() == nullptr);
    CHECK(receiver.has_changed()); // the refused one marked nothing
    CHECK(receiver.get() == 1);    // a copy of the newest is no second borrow
    CHECK(*first == 0);
    CHECK(other.look() == 1);
    vkp_watch_release(receiver.rx);
    vkp_watch_release(receiver.rx);
    CHECK(receiver.look() == 1);
}

TEST_CASE("watch: what is borrowed stays as it is while many values are sent", "[watch]")
{
    std::vector<unsigned char> item(4096);
    vkp_test_fill(item.data(), item.size(), 7);
    Sender sender(config_of(item.size(), item.data(), nullptr));
    std::vector<std::unique_ptr<Receiver>> receivers;
    std::vector<const void *> borrowed;
    for (uint64_t number = 0; number < 10; number++) {
        receivers.push_back(std::make_unique<Receiver>(sender));
        vkp_test_fill(item.data(), item.size(), number);
        REQUIRE(vkp_watch_send(sender.tx, item.data()) == VKP_OK);
        borrowed.push_back(vkp_watch_borrow_and_update(receivers.back()->rx));
        REQUIRE(borrowed.back() != nullptr);
    }
    for (uint64_t number = 100; number < 200; number++) {
        vkp_test_fill(item.data(), item.size(), number);
        REQUIRE(vkp_watch_send(sender.tx, item.data()) == VKP_OK);
    }
    for (uint64_t number = 0; number < 10; number++) {
        CHECK(vkp_test_is_filled(borrowed[static_cast<size_t>(number)], item.size(), number));
    }
    SECTION("released in the order of borrowing")
    {
        for (const std::unique_ptr<Receiver> &each : receivers) {
            vkp_watch_release(each->rx);
        }
    }
    SECTION("the sender goes, then the receivers, with their borrows out")
    {
        sender.end();
        for (uint64_t number = 0; number < 10; number++) {
            CHECK(vkp_test_is_filled(borrowed[static_cast<size_t>(number)], item.size(), number));
            receivers[static_cast<size_t>(number)]->end();
        }
    }
}

TEST_CASE("watch: changed tells a version sent before the call", "[watch]")
{
    Sender sender(config_of(8, nullptr, nullptr));
    Receiver receiver(sender);
    REQUIRE(sender.send(1) == VKP_OK);
    CHECK(receiver.changed(VKP_FOREVER) == VKP_OK);
    REQUIRE(sender.replace(2) == VKP_OK);
    CHECK(receiver.changed(VKP_FOREVER) == VKP_OK);
    REQUIRE(vkp_watch_send_if_modified(sender.tx, add_one, nullptr, nullptr) == VKP_OK);
    CHECK(receiver.changed(VKP_FOREVER) == VKP_OK);
    CHECK(receiver.get() == 3);
}

TEST_CASE("watch: marks: forget, or pretend to have seen", "[watch]")
{
    Sender sender(config_of(8, nullptr, nullptr));
    Receiver receiver(sender);
    vkp_watch_mark_changed(receiver.rx);
    CHECK(receiver.has_changed());
    CHECK(receiver.changed(VKP_FOREVER) == VKP_OK);
    CHECK_FALSE(receiver.has_changed());
    vkp_watch_mark_changed(receiver.rx);
    vkp_watch_mark_changed(receiver.rx);
    CHECK(receiver.get_and_update() == 0);
    CHECK_FALSE(receiver.has_changed());
    REQUIRE(sender.send(1) == VKP_OK);
    vkp_watch_mark_unchanged(receiver.rx);
    CHECK_FALSE(receiver.has_changed());
    CHECK(receiver.changed() == VKP_ERR_TIMEOUT);
    CHECK(receiver.get() == 1); // unseen or not, it is the value
    REQUIRE(sender.send(2) == VKP_OK);
    CHECK(receiver.has_changed());
    vkp_watch_mark_changed(receiver.rx);
    CHECK(receiver.changed() == VKP_OK);
    CHECK(receiver.changed() == VKP_ERR_TIMEOUT);
    vkp_watch_mark_unchanged(receiver.rx);
    vkp_watch_mark_changed(receiver.rx);
    sender.end();
    CHECK(receiver.has_changed());
    CHECK(receiver.changed(VKP_FOREVER) == VKP_OK);
    CHECK(receiver.changed(VKP_FOREVER) == VKP_ERR_CLOSED);
    vkp_watch_mark_changed(receiver.rx);
    CHECK(receiver.changed(VKP_FOREVER) == VKP_OK);
}

TEST_CASE("watch: subscribe has seen the value of now, a copy what its original has", "[watch]")
{
    Sender sender(config_of(8, nullptr, nullptr));
    Receiver original(sender);
    REQUIRE(sender.send(1) == VKP_OK);
    Receiver fresh(sender);
    Receiver copy(original);
    CHECK_FALSE(fresh.has_changed());
    CHECK(fresh.get() == 1);
    CHECK(copy.has_changed());
    CHECK(copy.changed() == VKP_OK);
    CHECK(original.has_changed()); // each goes its own way from there
    CHECK(original.changed() == VKP_OK);
    Receiver seen(original);
    CHECK_FALSE(seen.has_changed());
    // A borrow is not copied with the receiver.
    CHECK(original.borrow() != nullptr);
    Receiver beside(original);
    CHECK(beside.borrow() != nullptr);
    sender.end();
    Receiver late(copy);
    CHECK(late.get() == 1);
    CHECK(late.changed() == VKP_ERR_CLOSED);
}

TEST_CASE("watch: without receivers send gives the value back, replace stores it", "[watch]")
{
    vkp_test_ledger ledger(5);
    Sender sender(owning(nullptr, &ledger));
    ledger.own(1);
    CHECK(sender.send(1) == VKP_ERR_CLOSED);
    CHECK(ledger.owners(1) == 1);
    CHECK(ledger.drops(1) == 0);
    CHECK(ledger.owners(0) == 1);
    ledger.own(2);
    CHECK(sender.replace(2) == VKP_OK);
    {
        Receiver receiver(sender);
        CHECK(receiver.look() == 2);
        CHECK_FALSE(receiver.has_changed());
        CHECK(sender.send(1) == VKP_OK);
        CHECK(receiver.look() == 1);
    }
    ledger.own(3);
    CHECK(sender.send(3) == VKP_ERR_CLOSED);
    Receiver receiver(sender);
    CHECK(receiver.look() == 1); // what was refused is nowhere
    CHECK(ledger.owners(3) == 1);
    receiver.end();
    sender.end();
    uint64_t refused = 3;
    vkp_test_ledger::drop(&ledger, &refused);
    CHECK(ledger.owned() == 0);
    CHECK(ledger.wrong() == 0);
}

TEST_CASE("watch: send_if_modified changes a copy, and tells only when it was changed", "[watch]")
{
    const uint64_t initial = 10;
    Sender sender(config_of(8, &initial, nullptr));
    Receiver receiver(sender);
    const uint64_t *before = receiver.borrow();
    bool changed = false;
    REQUIRE(vkp_watch_send_if_modified(sender.tx, add_one, nullptr, &changed) == VKP_OK);
    CHECK(changed);
    CHECK(receiver.has_changed());
    CHECK(*before == 10); // the borrower's value is not the one that was changed
    vkp_watch_release(receiver.rx);
    CHECK(receiver.get_and_update() == 11);
    struct Call {
        uint64_t saw;
    } call = {0};
    const auto spoil = [](void *user, void *item) {
        uint64_t *value = static_cast<uint64_t *>(item);
        static_cast<Call *>(user)->saw = *value;
        *value = 99;
        return false;
    };
    REQUIRE(vkp_watch_send_if_modified(sender.tx, spoil, &call, &changed) == VKP_OK);
    CHECK_FALSE(changed);
    CHECK(call.saw == 11);
    CHECK_FALSE(receiver.has_changed());
    CHECK(receiver.get() == 11); // what was not sent is not there
    CHECK(receiver.look() == 11);
    REQUIRE(vkp_watch_send_if_modified(sender.tx, spoil, &call, nullptr) == VKP_OK);
    CHECK(call.saw == 11);
    receiver.end();
    // As replace: without receivers, too.
    REQUIRE(vkp_watch_send_if_modified(sender.tx, add_one, nullptr, nullptr) == VKP_OK);
    Receiver later(sender);
    CHECK(later.get() == 12);
}

TEST_CASE("watch: values that own something are borrowed, not copied or changed in place",
          "[watch]")
{
    vkp_test_ledger ledger(3);
    {
        Sender sender(owning(nullptr, &ledger));
        Receiver receiver(sender);
        uint64_t value = 77;
        bool changed = true;
        CHECK(vkp_watch_get(receiver.rx, &value) == VKP_ERR_INVALID);
        CHECK(vkp_watch_get_and_update(receiver.rx, &value) == VKP_ERR_INVALID);
        CHECK(vkp_watch_send_if_modified(sender.tx, add_one, nullptr, &changed) == VKP_ERR_INVALID);
        CHECK(value == 77);
        CHECK(changed);
        CHECK(receiver.look() == 0);
        CHECK_FALSE(receiver.has_changed());
    }
    CHECK(ledger.drops(0) == 1);
    CHECK(ledger.owned() == 0);
}

TEST_CASE("watch: a value is dropped once, when it was replaced and nobody looks at it", "[watch]")
{
    vkp_test_ledger ledger(20);
    Sender sender(owning(nullptr, &ledger));
    Receiver first(sender);
    Receiver second(sender);
    ledger.own(1);
    REQUIRE(sender.send(1) == VKP_OK);
    CHECK(ledger.owners(0) == 0); // replaced, and borrowed by nobody
    CHECK(*first.borrow() == 1);
    CHECK(*second.borrow() == 1);
    for (uint64_t value = 2; value < 10; value++) {
        ledger.own(value);
        REQUIRE(sender.send(value) == VKP_OK);
        CHECK(ledger.drops(value - 1) == (value == 2 ? 0 : 1));
    }
    vkp_watch_release(first.rx);
    CHECK(ledger.drops(1) == 0);
    SECTION("the last borrower releases")
    {
        vkp_watch_release(second.rx);
        ledger.own(10);
        REQUIRE(sender.send(10) == VKP_OK);
        CHECK(ledger.drops(1) == 1);
    }
    SECTION("the last borrower goes")
    {
        second.end();
    }
    SECTION("the sender goes first")
    {
        sender.end();
        CHECK(ledger.drops(1) == 0);
        CHECK(first.look() == 9);
        CHECK(ledger.drops(9) == 0);
    }
    first.end();
    second.end();
    sender.end();
    for (uint64_t value = 0; value < 10; value++) {
        CHECK(ledger.drops(value) == 1);
    }
    CHECK(ledger.owned() == 0);
    CHECK(ledger.wrong() == 0);
}

TEST_CASE("watch: blocks of bytes as values", "[watch]")
{
    vkp_test_memory memory;
    {
        vkp_bytes initial = vkp_bytes_static("nothing", 7);
        vkp_watch_config config = config_of(sizeof initial, &initial, memory.env());
        config.drop = [](void *, void *item) { vkp_bytes_unref(static_cast<vkp_bytes *>(item)); };
        Sender sender(config);
        Receiver receiver(sender);
        std::vector<vkp_bytes> kept;
        for (char c = 'a'; c < 'k'; c++) {
            const std::string text(300, c);
            vkp_bytes bytes;
            REQUIRE(vkp_bytes_copy(memory.env(), text.data(), text.size(), &bytes) == VKP_OK);
            REQUIRE(vkp_watch_send(sender.tx, &bytes) == VKP_OK);
            const vkp_bytes *borrowed =
                static_cast<const vkp_bytes *>(vkp_watch_borrow(receiver.rx));
            REQUIRE(borrowed != nullptr);
            kept.push_back(vkp_bytes_ref(borrowed)); // outlives the channel's
            vkp_watch_release(receiver.rx);
        }
        receiver.end();
        sender.end();
        char want = 'a';
        for (vkp_bytes &bytes : kept) {
            CHECK(std::string(reinterpret_cast<const char *>(bytes.data), bytes.len) ==
                  std::string(300, want++));
            vkp_bytes_unref(&bytes);
        }
    }
    CHECK(memory.blocks() == 0);
}

TEST_CASE("watch: CLOSED when the last sender has gone, after what was not seen yet", "[watch]")
{
    Sender sender(config_of(8, nullptr, nullptr));
    Receiver saw_all(sender);
    Receiver missed_one(sender);
    vkp_watch_tx *second = vkp_watch_tx_ref(sender.tx);
    CHECK(second == sender.tx);
    REQUIRE(sender.send(1) == VKP_OK);
    CHECK(saw_all.changed() == VKP_OK);
    sender.end();
    CHECK_FALSE(vkp_watch_is_closed(saw_all.rx));
    CHECK(saw_all.changed() == VKP_ERR_TIMEOUT);
    vkp_watch_tx_unref(second);
    CHECK(vkp_watch_is_closed(saw_all.rx));
    CHECK(vkp_watch_is_closed(missed_one.rx));
    CHECK(saw_all.changed(VKP_FOREVER) == VKP_ERR_CLOSED);
    CHECK(saw_all.changed(0) == VKP_ERR_CLOSED);
    CHECK(missed_one.has_changed());
    CHECK(missed_one.changed(VKP_FOREVER) == VKP_OK);
    CHECK(missed_one.changed(VKP_FOREVER) == VKP_ERR_CLOSED);
    CHECK_FALSE(missed_one.has_changed());
    // The value stays.
    CHECK(missed_one.get() == 1);
    CHECK(missed_one.look() == 1);
}

TEST_CASE("watch: receivers are counted", "[watch]")
{
    Sender sender(config_of(8, nullptr, nullptr));
    CHECK(vkp_watch_get_receivers(sender.tx) == 0);
    CHECK(vkp_watch_wait_closed(sender.tx, 0) == VKP_OK);
    Receiver first(sender);
    {
        Receiver second(first);
        Receiver third(sender);
        CHECK(vkp_watch_get_receivers(sender.tx) == 3);
    }
    CHECK(vkp_watch_get_receivers(sender.tx) == 1);
    CHECK(vkp_watch_wait_closed(sender.tx, 0) == VKP_ERR_TIMEOUT);
    first.end();
    CHECK(vkp_watch_get_receivers(sender.tx) == 0);
    CHECK(vkp_watch_wait_closed(sender.tx, VKP_FOREVER) == VKP_OK);
}

TEST_CASE("watch: values of every size come out whole, and nothing beside them is written",
          "[watch]")
{
    std::vector<size_t> sizes;
    for (size_t bytes = 1; bytes <= 200; bytes++) {
        sizes.push_back(bytes);
    }
    sizes.push_back(4096);
    sizes.push_back(65536);
    for (bool fenced : {false, true}) {
        vkp_env env = VKP_ZERO;
        env.sys = vkp_test_build_sys(fenced);
        for (size_t bytes : sizes) {
            INFO("fenced " << fenced << ", " << bytes << " bytes");
            std::vector<unsigned char> in(bytes);
            std::vector<unsigned char> out(bytes + 16);
            vkp_test_fill(in.data(), bytes, 1);
            Sender sender(config_of(bytes, in.data(), &env));
            REQUIRE(sender.status == VKP_OK);
            Receiver receiver(sender);
            size_t wrong = 0;
            for (uint64_t number = 1; number < 6; number++) {
                std::fill(out.begin(), out.end(), static_cast<unsigned char>(0xee));
                REQUIRE(vkp_watch_get(receiver.rx, out.data()) == VKP_OK);
                wrong += !vkp_test_is_filled(out.data(), bytes, number);
                std::fill(out.begin(), out.begin() + static_cast<std::ptrdiff_t>(bytes),
                          static_cast<unsigned char>(0xee));
                wrong +=
                    std::any_of(out.begin(), out.end(), [](unsigned char c) { return c != 0xee; });
                const void *borrowed = vkp_watch_borrow_and_update(receiver.rx);
                REQUIRE(borrowed != nullptr);
                wrong += !vkp_test_is_filled(borrowed, bytes, number);
                vkp_test_fill(in.data(), bytes, number + 1);
                REQUIRE(vkp_watch_send(sender.tx, in.data()) == VKP_OK);
                wrong += !vkp_test_is_filled(borrowed, bytes, number);
                vkp_watch_release(receiver.rx);
            }
            struct Size {
                size_t bytes;
                size_t wrong;
            } size = {bytes, 0};
            REQUIRE(vkp_watch_send_if_modified(
                        sender.tx,
                        [](void *user, void *item) {
                            Size *self = static_cast<Size *>(user);
                            self->wrong += !vkp_test_is_filled(item, self->bytes, 6);
                            vkp_test_fill(item, self->bytes, 7);
                            return true;
                        },
                        &size, nullptr) == VKP_OK);
            REQUIRE(vkp_watch_get(receiver.rx, out.data()) == VKP_OK);
            wrong += !vkp_test_is_filled(out.data(), bytes, 7);
            REQUIRE(wrong + size.wrong == 0);
        }
    }
}

TEST_CASE("watch: random calls answer as a model does", "[watch]")
{
    for (unsigned seed = 0; seed < 60; seed++) {
        INFO("seed " << seed);
        std::mt19937 random(seed);
        vkp_test_memory memory;
        vkp_test_ledger ledger(3000);
        struct Model {
            vkp_watch_rx *rx;
            uint64_t seen;            // version
            const uint64_t *borrowed; // nullptr: none
            uint64_t value;           // of the borrow
        };
        std::vector<Model> models;
        const vkp_watch_config config = owning(memory.env(), &ledger);
        vkp_watch_tx *tx = nullptr;
        REQUIRE(vkp_watch_open(&config, &tx) == VKP_OK);
        uint64_t version = 1;
        uint64_t newest = 0;
        uint64_t made = 1;
        const int steps = 1200;
        for (int step = 0; step < steps; step++) {
            const unsigned long dice = random() % 100;
            const size_t pick = models.empty() ? 0 : random() % models.size();
            if (step == steps - 100) {
                vkp_watch_tx_unref(tx);
                tx = nullptr;
            }
            if (dice < 35 && tx != nullptr) {
                uint64_t value = made++;
                ledger.own(value);
                const bool replaces = dice < 10;
                const vkp_status status =
                    replaces ? vkp_watch_replace(tx, &value) : vkp_watch_send(tx, &value);
                if (models.empty() && !replaces) {
                    REQUIRE(status == VKP_ERR_CLOSED);
                    vkp_test_ledger::drop(&ledger, &value);
                } else {
                    REQUIRE(status == VKP_OK);
                    version++;
                    newest = value;
                }
            } else if (dice < 40 && models.size() < 6 && tx != nullptr) {
                Model model = {nullptr, version, nullptr, 0};
                REQUIRE(vkp_watch_subscribe(tx, &model.rx) == VKP_OK);
                models.push_back(model);
            } else if (models.empty()) {
                continue;
            } else if (dice < 44 && models.size() < 6) {
                Model model = {nullptr, models[pick].seen, nullptr, 0};
                REQUIRE(vkp_watch_rx_clone(models[pick].rx, &model.rx) == VKP_OK);
                models.push_back(model);
            } else if (dice < 48) {
                vkp_watch_rx_unref(models[pick].rx);
                models.erase(models.begin() + static_cast<std::ptrdiff_t>(pick));
            } else if (dice < 60) {
                Model &model = models[pick];
                const vkp_status status = vkp_watch_changed(model.rx, 0);
                REQUIRE(status == (model.seen != version ? VKP_OK
                                   : tx == nullptr       ? VKP_ERR_CLOSED
                                                         : VKP_ERR_TIMEOUT));
                model.seen = version;
            } else if (dice < 80) {
                Model &model = models[pick];
                const bool update = dice < 70;
                const void *borrowed =
                    update ? vkp_watch_borrow_and_update(model.rx) : vkp_watch_borrow(model.rx);
                REQUIRE((borrowed == nullptr) == (model.borrowed != nullptr));
                if (borrowed != nullptr) {
                    model.borrowed = static_cast<const uint64_t *>(borrowed);
                    model.value = newest;
                    model.seen = update ? version : model.seen;
                }
            } else if (dice < 95) {
                vkp_watch_release(models[pick].rx);
                models[pick].borrowed = nullptr;
            } else if (dice < 97) {
                vkp_watch_mark_changed(models[pick].rx);
                models[pick].seen = 0;
            } else {
                vkp_watch_mark_unchanged(models[pick].rx);
                models[pick].seen = version;
            }
            for (const Model &model : models) {
                REQUIRE(vkp_watch_is_changed(model.rx) == (model.seen != version));
                if (model.borrowed != nullptr) {
                    REQUIRE(*model.borrowed == model.value);
                    REQUIRE(ledger.owners(model.value) == 1);
                }
            }
            if (tx != nullptr) {
                REQUIRE(vkp_watch_get_receivers(tx) == models.size());
            }
            REQUIRE(ledger.owners(newest) == ((tx || !models.empty()) ? 1 : 0));
        }
        for (const Model &model : models) {
            vkp_watch_rx_unref(model.rx);
        }
        vkp_watch_tx_unref(tx);
        for (uint64_t value = 0; value < made; value++) {
            REQUIRE(ledger.drops(value) == 1);
        }
        REQUIRE(ledger.owned() == 0);
        REQUIRE(memory.blocks() == 0);
    }
}

TEST_CASE("watch: memory may fail at every allocation; nothing is lost or leaked",
          "[watch][faults]")
{
    vkp_test_memory memory;
    vkp_test_ledger ledger(100);
    ledger.own(0);
    vkp_watch_config config = config_of(8, &zero, memory.env());
    config.drop = vkp_test_ledger::drop;
    config.user = &ledger;
    uint64_t failed = 0;
    for (uint64_t k = 1;; k++) {
        memory.fail(VKP_TEST_FAULT_ONCE, k);
        const uint64_t before = memory.failures();
        Sender sender(config);
        if (memory.failures() == before) {
            REQUIRE(sender.status == VKP_OK);
            break;
        }
        failed++;
        CHECK(sender.status == VKP_ERR_NOMEM);
        CHECK(sender.tx == nullptr);
        CHECK(ledger.drops(0) == 0); // taken on success only
        CHECK(memory.blocks() == 0);
    }
    memory.heal();
    CHECK(failed > 0);
    CHECK(ledger.drops(0) == 1);
    ledger.own(0);
    Sender sender(config);
    Receiver receiver(sender);
    const size_t blocks = memory.blocks();
    vkp_watch_rx *rx = nullptr;
    for (bool copy : {false, true}) {
        for (uint64_t k = 1;; k++) {
            memory.fail(VKP_TEST_FAULT_ONCE, k);
            const uint64_t before = memory.failures();
            const vkp_status status =
                copy ? vkp_watch_rx_clone(receiver.rx, &rx) : vkp_watch_subscribe(sender.tx, &rx);
            if (memory.failures() == before) {
                REQUIRE(status == VKP_OK);
                vkp_watch_rx_unref(rx);
                rx = nullptr;
                break;
            }
            CHECK(status == VKP_ERR_NOMEM);
            CHECK(rx == nullptr);
            CHECK(memory.blocks() == blocks);
            CHECK(vkp_watch_get_receivers(sender.tx) == 1);
        }
    }
    memory.heal();
}

TEST_CASE("watch: without memory for one more value a send is refused, borrowers keep theirs",
          "[watch][faults]")
{
    vkp_test_memory memory;
    vkp_test_ledger ledger(100);
    {
        Sender sender(owning(memory.env(), &ledger));
        // Each receiver borrows a value of its own, so that the next send finds none to use again.
        std::vector<std::unique_ptr<Receiver>> receivers;
        std::vector<const uint64_t *> borrowed;
        uint64_t next = 1;
        for (int i = 0; i < 12; i++) {
            receivers.push_back(std::make_unique<Receiver>(sender));
        }
        size_t refused = 0;
        for (const std::unique_ptr<Receiver> &each : receivers) {
            borrowed.push_back(each->borrow());
            REQUIRE(borrowed.back() != nullptr);
            const uint64_t newest = *borrowed.back();
            ledger.own(next);
            memory.fail(VKP_TEST_FAULT_FROM, 1);
            vkp_status status = sender.send(next);
            if (status != VKP_OK) {
                refused++;
                CHECK(status == VKP_ERR_NOMEM);
                CHECK(ledger.owners(next) == 1);
                CHECK(ledger.drops(next) == 0);
                CHECK(sender.replace(next) == VKP_ERR_NOMEM);
                Receiver *other = receivers.back().get();
                if (other != each.get()) {
                    CHECK(other->look() == newest);
                }
                memory.heal();
                status = sender.send(next);
            }
            memory.heal();
            REQUIRE(status == VKP_OK);
            next++;
        }
        CHECK(refused > 0);
        for (size_t i = 0; i < borrowed.size(); i++) {
            CHECK(*borrowed[i] == i);
            CHECK(ledger.drops(i) == 0);
        }
        // With everything released, sending needs no memory any more.
        for (const std::unique_ptr<Receiver> &each : receivers) {
            vkp_watch_release(each->rx);
        }
        memory.fail(VKP_TEST_FAULT_FROM, 1);
        for (int i = 0; i < 30; i++) {
            ledger.own(next);
            REQUIRE(sender.send(next) == VKP_OK);
            next++;
        }
        memory.heal();
        CHECK(ledger.owners(next - 1) == 1);
    }
    CHECK(ledger.owned() == 0);
    CHECK(ledger.wrong() == 0);
    CHECK(memory.blocks() == 0);
}

TEST_CASE("watch: waits end at their deadline, by the clock of the environment", "[watch]")
{
    vkp_env env = VKP_ZERO;
    env.sys = vkp_test_virtual_sys();
    env.spins = VKP_SPINS_NONE;
    Sender sender(config_of(8, nullptr, &env));
    Receiver receiver(sender);
    uint64_t deadline = vkp_test_virtual_ns.load() + uint64_t{3600} * 1000000000u;
    CHECK(receiver.changed(deadline) == VKP_ERR_TIMEOUT);
    CHECK(vkp_test_virtual_ns.load() == deadline);
    deadline += 1000;
    CHECK(vkp_watch_wait_closed(sender.tx, deadline) == VKP_ERR_TIMEOUT);
    CHECK(vkp_test_virtual_ns.load() == deadline);
    REQUIRE(sender.send(1) == VKP_OK);
    CHECK(receiver.changed(deadline) == VKP_OK);
}

TEST_CASE("watch: every kind of send ends every wait, and so does the last sender's end",
          "[watch][threads]")
{
    for (const vkp_test_build &build : vkp_test_builds) {
        const vkp_test_watchdog watchdog;
        INFO(build.name);
        const vkp_env env = vkp_test_env_of(build);
        for (int round = 0; round < 30; round++) {
            Sender sender(config_of(8, nullptr, &env));
            Receiver first(sender);
            Receiver second(sender);
            {
                vkp_test_waiting one([&] { return first.changed(VKP_FOREVER); });
                vkp_test_waiting two([&] { return second.changed(vkp_test_deadline()); });
                // What changes nothing wakes nobody.
                const vkp_status idle = vkp_watch_send_if_modified(
                    sender.tx, [](void *, void *) { return false; }, nullptr, nullptr);
                const vkp_status sent =
                    round % 3 == 0 ? sender.send(1)
                    : round % 3 == 1
                        ? sender.replace(1)
                        : vkp_watch_send_if_modified(sender.tx, add_one, nullptr, nullptr);
                const vkp_status got_one = one.join();
                const vkp_status got_two = two.join();
                REQUIRE(idle == VKP_OK);
                REQUIRE(sent == VKP_OK);
                REQUIRE(got_one == VKP_OK);
                REQUIRE(got_two == VKP_OK);
                REQUIRE(first.get() == 1);
            }
            vkp_test_waiting one([&] { return first.changed(VKP_FOREVER); });
            vkp_test_waiting two([&] { return second.changed(vkp_test_deadline()); });
            sender.end();
            const vkp_status got_one = one.join();
            const vkp_status got_two = two.join();
            REQUIRE(got_one == VKP_ERR_CLOSED);
            REQUIRE(got_two == VKP_ERR_CLOSED);
        }
    }
}

TEST_CASE("watch: wait_closed waits until there is no receiver", "[watch][threads]")
{
    for (const vkp_test_build &build : vkp_test_builds) {
        const vkp_test_watchdog watchdog;
        INFO(build.name);
        const vkp_env env = vkp_test_env_of(build);
        Sender sender(config_of(8, nullptr, &env));
        for (int round = 0; round < 20; round++) {
            Receiver first(sender);
            Receiver second(first);
            vkp_test_waiting one([&] { return vkp_watch_wait_closed(sender.tx, VKP_FOREVER); });
            vkp_test_waiting two(
                [&] { return vkp_watch_wait_closed(sender.tx, vkp_test_deadline()); });
            first.end();
            const vkp_status sent = sender.send(1);
            second.end();
            const vkp_status got_one = one.join();
            const vkp_status got_two = two.join();
            REQUIRE(sent == VKP_OK);
            REQUIRE(got_one == VKP_OK);
            REQUIRE(got_two == VKP_OK);
        }
    }
}

TEST_CASE("watch: waiting until the value is as wanted is a loop over changed", "[watch][threads]")
{
    // Tokio's wait_for: look first, for the value of now may do; mark it as seen before it is
    // judged, so that a version sent meanwhile is not missed.
    const auto wait_for = [](vkp_watch_rx *rx, uint64_t wanted, uint64_t deadline) {
        vkp_status status = VKP_OK;
        uint64_t value = 0;
        while (status == VKP_OK) {
            status = vkp_watch_get_and_update(rx, &value);
            if (status == VKP_OK && value >= wanted) {
                break;
            }
            status = vkp_watch_changed(rx, deadline);
        }
        return status;
    };
    for (const vkp_test_build &build : vkp_test_builds) {
        const vkp_test_watchdog watchdog;
        INFO(build.name);
        const vkp_env env = vkp_test_env_of(build);
        Sender sender(config_of(8, nullptr, &env));
        Receiver receiver(sender);
        CHECK(wait_for(receiver.rx, 0, 0) == VKP_OK);
        CHECK(wait_for(receiver.rx, 1, 0) == VKP_ERR_TIMEOUT);
        vkp_test_waiting waiting([&] { return wait_for(receiver.rx, 500, vkp_test_deadline()); });
        size_t refused = 0;
        for (uint64_t value = 1; value <= 500; value++) {
            refused += sender.send(value) != VKP_OK;
        }
        const vkp_status got = waiting.join();
        CHECK(refused == 0);
        CHECK(got == VKP_OK);
        sender.end();
        CHECK(wait_for(receiver.rx, 500, VKP_FOREVER) == VKP_OK);
        CHECK(wait_for(receiver.rx, 501, VKP_FOREVER) == VKP_ERR_CLOSED);
    }
}

TEST_CASE("watch: a loop is told of a change and of the end, as long as they are there",
          "[watch][loop]")
{
    for (const vkp_backend *const *backend = vkp_test_backends_all(); *backend; backend++) {
        for (bool fenced : {false, true}) {
            INFO((*backend)->name << ", fenced " << fenced);
            vkp_test_memory memory({"", fenced, 0});
            {
                Sender sender(config_of(8, nullptr, memory.env()));
                Receiver receiver(sender);
                vkp_test_watched watched(*backend, memory.env());
                std::vector<vkp_status> told;
                size_t calls = 0;
                bool take = false;
                REQUIRE(watched.watch(vkp_case_watch_changed(receiver.rx), [&] {
                    calls++;
                    if (take) {
                        told.push_back(receiver.changed());
                        if (told.back() == VKP_ERR_CLOSED) {
                            watched.end();
                        }
                    }
                }) == VKP_OK);
                watched.settle();
                CHECK(calls == 0);
                REQUIRE(sender.send(1) == VKP_OK);
                REQUIRE(sender.send(2) == VKP_OK);
                watched.until("a call again and again", [&] { return calls >= 3; });
                CHECK(receiver.has_changed()); // being told marks nothing
                take = true;
                watched.settle();
                CHECK(told == std::vector<vkp_status>{VKP_OK});
                calls = 0;
                watched.settle();
                CHECK(calls == 0);
                REQUIRE(sender.send(3) == VKP_OK);
                sender.end();
                watched.until("the end", [&] { return told.back() == VKP_ERR_CLOSED; });
                CHECK(told == std::vector<vkp_status>{VKP_OK, VKP_OK, VKP_ERR_CLOSED});
                CHECK(receiver.get() == 3);
            }
            CHECK(memory.blocks() == 0);
        }
    }
}

TEST_CASE("watch: a loop is told when the last receiver went", "[watch][loop]")
{
    for (const vkp_backend *const *backend = vkp_test_backends_all(); *backend; backend++) {
        INFO((*backend)->name);
        Sender sender(config_of(8, nullptr, nullptr));
        Receiver first(sender);
        Receiver second(sender);
        vkp_test_watched watched(*backend);
        size_t calls = 0;
        REQUIRE(watched.watch(vkp_case_watch_closed(sender.tx), [&] { calls++; }) == VKP_OK);
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
}

TEST_CASE("watch: threads: a loop always learns of the newest value", "[watch][threads]")
{
    const uint64_t last = 3000;
    for (const vkp_backend *const *backend = vkp_test_backends(); *backend; backend++) {
        for (const vkp_test_build &build : vkp_test_builds) {
            const vkp_test_watchdog watchdog;
            INFO((*backend)->name << ", " << build.name);
            const vkp_env env = vkp_test_env_of(build);
            Sender sender(config_of(8, nullptr, &env));
            Receiver receiver(sender);
            vkp_test_watched watched(*backend, &env);
            uint64_t newest = 0;
            size_t backwards = 0;
            bool ended = false;
            REQUIRE(watched.watch(vkp_case_watch_changed(receiver.rx), [&] {
                if (receiver.changed() == VKP_OK) {
                    const uint64_t value = receiver.get();
                    backwards += value < newest;
                    newest = value;
                } else {
                    ended = true;
                    watched.end();
                }
            }) == VKP_OK);
            std::atomic<size_t> refused{0};
            std::thread thread([&] {
                for (uint64_t value = 1; value <= last; value++) {
                    refused += vkp_watch_send(sender.tx, &value) != VKP_OK;
                    if (value % 5 == 0) {
                        sched_yield();
                    }
                }
                sender.end();
            });
            watched.until("the end", [&] { return ended; });
            thread.join();
            CHECK(refused.load() == 0);
            CHECK(backwards == 0);
            CHECK(newest == last);
        }
    }
}

TEST_CASE("watch: threads: values are never torn and never go back, and the last one is seen",
          "[watch][threads]")
{
    // Each value carries its writer and a count of that writer in its number.
    const size_t bytes = 1200;
    const uint64_t each = 3000;
    const size_t readers = 4;
    for (const vkp_test_build &build : vkp_test_builds) {
        const vkp_test_watchdog watchdog;
        INFO(build.name);
        const vkp_env env = vkp_test_env_of(build);
        std::vector<unsigned char> initial(bytes);
        vkp_test_fill(initial.data(), bytes, 0);
        Sender sender(config_of(bytes, initial.data(), &env));
        std::vector<std::unique_ptr<Receiver>> ends;
        std::vector<uint64_t> wrong(readers + 2, 0);
        std::vector<uint64_t> last(readers, 0);
        std::vector<std::thread> threads;
        for (size_t r = 0; r < readers; r++) {
            ends.push_back(std::make_unique<Receiver>(sender));
        }
        for (size_t r = 0; r < readers; r++) {
            threads.emplace_back([&, r] {
                vkp_watch_rx *rx = ends[r]->rx;
                std::vector<unsigned char> out(bytes);
                uint64_t newest[2] = {0, 0};
                for (;;) {
                    const vkp_status status = vkp_watch_changed(rx, vkp_test_deadline());
                    const void *value = out.data();
                    if (r % 2 == 0) {
                        wrong[r] += vkp_watch_get(rx, out.data()) != VKP_OK;
                    } else {
                        value = vkp_watch_borrow(rx);
                    }
                    if (value == nullptr) {
                        wrong[r]++;
                        return;
                    }
                    uint64_t number = 0;
                    std::memcpy(&number, value, sizeof number);
                    wrong[r] += !vkp_test_is_filled(value, bytes, number);
                    uint64_t *before = &newest[number & 1];
                    wrong[r] += number < *before;
                    *before = number;
                    if (r % 2 != 0) {
                        sched_yield(); // writers go on while the value is borrowed
                        wrong[r] += !vkp_test_is_filled(value, bytes, number);
                        vkp_watch_release(rx);
                    }
                    if (status != VKP_OK) {
                        wrong[r] += status != VKP_ERR_CLOSED;
                        last[r] = number;
                        return;
                    }
                }
            });
        }
        for (size_t s = 0; s < 2; s++) {
            threads.emplace_back([&, s, tx = vkp_watch_tx_ref(sender.tx)] {
                std::vector<unsigned char> in(bytes);
                for (uint64_t i = 1; i <= each; i++) {
                    vkp_test_fill(in.data(), bytes, i << 1 | s);
                    wrong[readers + s] += vkp_watch_send(tx, in.data()) != VKP_OK;
                    if (i % 8 == 0) {
                        sched_yield();
                    }
                }
                vkp_watch_tx_unref(tx);
            });
        }
        sender.end();
        for (std::thread &thread : threads) {
            thread.join();
        }
        CHECK(wrong == std::vector<uint64_t>(readers + 2, 0));
        // Whichever writer was last, all agree on its last value.
        CHECK(last == std::vector<uint64_t>(readers, last[0]));
        CHECK(last[0] >> 1 == each);
    }
}

TEST_CASE("watch: threads: no copy is torn, however slow its reader", "[watch][threads]")
{
    // Large values, made before, so that the threads do little else than copy.
    const size_t bytes = 16384;
    const size_t each = 3000;
    std::vector<std::vector<unsigned char>> items(8, std::vector<unsigned char>(bytes));
    for (size_t i = 0; i < items.size(); i++) {
        vkp_test_fill(items[i].data(), bytes, i);
    }
    for (const vkp_test_build &build : vkp_test_builds) {
        const vkp_test_watchdog watchdog;
        INFO(build.name);
        const vkp_env env = vkp_test_env_of(build);
        Sender sender(config_of(bytes, items[0].data(), &env));
        std::vector<std::unique_ptr<Receiver>> ends;
        std::vector<uint64_t> wrong(4, 0);
        std::vector<std::thread> threads;
        std::atomic<size_t> ready{0};
        for (size_t r = 0; r < 2; r++) {
            ends.push_back(std::make_unique<Receiver>(sender));
        }
        for (size_t r = 0; r < 2; r++) {
            threads.emplace_back([&, r] {
                std::vector<unsigned char> out(bytes);
                ready.fetch_add(1);
                while (!vkp_watch_is_closed(ends[r]->rx)) {
                    uint64_t number = 0;
                    wrong[r] += vkp_watch_get(ends[r]->rx, out.data()) != VKP_OK;
                    std::memcpy(&number, out.data(), sizeof number);
                    wrong[r] += number >= items.size() || out != items[static_cast<size_t>(number)];
                }
            });
        }
        while (ready.load() < 2) {
            sched_yield();
        }
        for (size_t s = 0; s < 2; s++) {
            threads.emplace_back([&, s, tx = vkp_watch_tx_ref(sender.tx)] {
                for (size_t i = 0; i < each; i++) {
                    const std::vector<unsigned char> &item = items[(2 * i + s) % items.size()];
                    wrong[2 + s] += vkp_watch_replace(tx, item.data()) != VKP_OK;
                    if (i % 8 == 0) {
                        sched_yield();
                    }
                }
                vkp_watch_tx_unref(tx);
            });
        }
        sender.end();
        for (std::thread &thread : threads) {
            thread.join();
        }
        CHECK(wrong == std::vector<uint64_t>(4, 0));
    }
}

TEST_CASE("watch: threads: a value is dropped once, and never while it is borrowed",
          "[watch][threads]")
{
    const size_t each = 3000;
    for (const vkp_test_build &build : vkp_test_builds) {
        const vkp_test_watchdog watchdog;
        INFO(build.name);
        const vkp_env env = vkp_test_env_of(build);
        vkp_test_ledger ledger(1 + 2 * each);
        const size_t readers = 3;
        std::vector<uint64_t> wrong(readers + 2, 0);
        {
            Sender sender(owning(&env, &ledger));
            std::vector<std::unique_ptr<Receiver>> ends;
            std::vector<std::thread> threads;
            for (size_t r = 0; r < readers; r++) {
                ends.push_back(std::make_unique<Receiver>(sender));
            }
            for (size_t r = 0; r < readers; r++) {
                threads.emplace_back([&, r] {
                    bool open = true;
                    while (open) {
                        open = r == 0 ? ends[r]->changed(vkp_test_deadline()) == VKP_OK
                                      : !vkp_watch_is_closed(ends[r]->rx);
                        const uint64_t *value =
                            r == 2 ? ends[r]->borrow_and_update() : ends[r]->borrow();
                        if (value == nullptr) {
                            wrong[r]++;
                            return;
                        }
                        const uint64_t before = *value;
                        wrong[r] += ledger.owners(before) != 1;
                        sched_yield();
                        wrong[r] += *value != before || ledger.owners(before) != 1;
                        vkp_watch_release(ends[r]->rx);
                    }
                });
            }
            for (size_t s = 0; s < 2; s++) {
                threads.emplace_back([&, s, tx = vkp_watch_tx_ref(sender.tx)] {
                    for (size_t i = 0; i < each; i++) {
                        const uint64_t value = 1 + s * each + i;
                        ledger.own(value);
                        wrong[readers + s] += (i % 2 ? vkp_watch_replace(tx, &value)
                                                     : vkp_watch_send(tx, &value)) != VKP_OK;
                        if (i % 32 == 0) {
                            sched_yield();
                        }
                    }
                    vkp_watch_tx_unref(tx);
                });
            }
            sender.end();
            for (std::thread &thread : threads) {
                thread.join();
            }
        }
        size_t not_once = 0;
        for (uint64_t value = 0; value <= 2 * each; value++) {
            not_once += ledger.drops(value) != 1;
        }
        CHECK(wrong == std::vector<uint64_t>(readers + 2, 0));
        CHECK(not_once == 0);
        CHECK(ledger.wrong() == 0);
    }
}

TEST_CASE("watch: threads: send_if_modified loses no change of another thread", "[watch][threads]")
{
    const uint64_t each = 4000;
    for (const vkp_test_build &build : vkp_test_builds) {
        const vkp_test_watchdog watchdog;
        INFO(build.name);
        const vkp_env env = vkp_test_env_of(build);
        Sender sender(config_of(8, nullptr, &env));
        Receiver receiver(sender);
        std::atomic<size_t> wrong{0};
        std::vector<std::thread> threads;
        for (size_t s = 0; s < 3; s++) {
            threads.emplace_back([&, tx = vkp_watch_tx_ref(sender.tx)] {
                for (uint64_t i = 0; i < each; i++) {
                    bool changed = false;
                    wrong += vkp_watch_send_if_modified(tx, add_one, nullptr, &changed) != VKP_OK;
                    wrong += !changed;
                }
                vkp_watch_tx_unref(tx);
            });
        }
        sender.end();
        uint64_t before = 0;
        while (receiver.changed(vkp_test_deadline()) == VKP_OK) {
            const uint64_t value = receiver.get_and_update();
            wrong += value < before;
            before = value;
        }
        for (std::thread &thread : threads) {
            thread.join();
        }
        CHECK(wrong.load() == 0);
        CHECK(receiver.get() == 3 * each);
    }
}

TEST_CASE("watch: threads: one change at a time wakes every receiver", "[watch][threads]")
{
    for (const vkp_test_build &build : vkp_test_builds) {
        const vkp_test_watchdog watchdog;
        INFO(build.name);
        const vkp_env env = vkp_test_env_of(build);
        Sender sender(config_of(8, nullptr, &env));
        const size_t receivers = 3;
        const uint64_t rounds = 400;
        std::vector<std::unique_ptr<Receiver>> ends;
        std::vector<uint64_t> got(receivers, 0);
        std::vector<vkp_status> ended(receivers, VKP_OK);
        std::atomic<uint64_t> taken{0};
        std::vector<std::thread> threads;
        for (size_t r = 0; r < receivers; r++) {
            ends.push_back(std::make_unique<Receiver>(sender));
        }
        for (size_t r = 0; r < receivers; r++) {
            threads.emplace_back([&, r] {
                while ((ended[r] = ends[r]->changed(vkp_test_deadline())) == VKP_OK) {
                    got[r]++;
                    taken.fetch_add(1);
                }
            });
        }
        const uint64_t deadline = vkp_test_deadline();
        size_t refused = 0;
        for (uint64_t round = 1; round <= rounds; round++) {
            refused += sender.send(round) != VKP_OK;
            while (taken.load() < round * receivers && vkp_now_ns() < deadline) {
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

TEST_CASE("watch: threads: CLOSED comes after the last change, however soon the sender goes",
          "[watch][threads]")
{
    for (const vkp_test_build &build : vkp_test_builds) {
        const vkp_test_watchdog watchdog;
        INFO(build.name);
        const vkp_env env = vkp_test_env_of(build);
        const unsigned rounds = 1000;
        std::atomic<vkp_watch_tx *> next{nullptr};
        size_t wrong = 0;
        std::atomic<size_t> refused{0};
        std::thread sending([&] {
            for (unsigned round = 1; round <= rounds; round++) {
                vkp_watch_tx *tx;
                while ((tx = next.exchange(nullptr)) == nullptr) {
                    sched_yield();
                }
                const uint64_t value = round;
                refused += vkp_watch_send(tx, &value) != VKP_OK;
                vkp_watch_tx_unref(tx);
            }
        });
        for (unsigned round = 1; round <= rounds; round++) {
            Sender sender(config_of(8, nullptr, &env));
            Receiver receiver(sender);
            next.store(sender.tx);
            sender.tx = nullptr;
            vkp_status status;
            if (round % 2 == 0) {
                while ((status = receiver.changed(0)) == VKP_ERR_TIMEOUT) {
                    sched_yield();
                }
            } else {
                status = receiver.changed(VKP_FOREVER);
            }
            wrong += status != VKP_OK || receiver.get() != round;
            wrong += receiver.changed(VKP_FOREVER) != VKP_ERR_CLOSED;
        }
        sending.join();
        CHECK(wrong == 0);
        CHECK(refused.load() == 0);
    }
}

TEST_CASE("watch: threads: what get_and_update marks as seen is what it gave", "[watch][threads]")
{
    for (const vkp_test_build &build : vkp_test_builds) {
        const vkp_test_watchdog watchdog;
        INFO(build.name);
        const vkp_env env = vkp_test_env_of(build);
        Sender sender(config_of(8, nullptr, &env));
        Receiver copying(sender);
        Receiver borrowing(sender);
        std::atomic<uint64_t> seen[2] = {{0}, {0}};
        const uint64_t rounds = 3000;
        // A reader that marked more than it saw would wait for ever: the next value comes only when
        // both have this one.
        std::thread copier([&] {
            for (uint64_t value = 0; value < rounds;) {
                value = copying.get_and_update();
                seen[0].store(value);
                if (value < rounds && copying.changed(VKP_FOREVER) != VKP_OK) {
                    return;
                }
            }
        });
        std::thread borrower([&] {
            for (uint64_t value = 0; value < rounds;) {
                const uint64_t *borrowed = borrowing.borrow_and_update();
                value = borrowed ? *borrowed : rounds;
                vkp_watch_release(borrowing.rx);
                seen[1].store(value);
                if (value < rounds && borrowing.changed(VKP_FOREVER) != VKP_OK) {
                    return;
                }
            }
        });
        size_t refused = 0;
        for (uint64_t value = 1; value <= rounds; value++) {
            refused += sender.send(value) != VKP_OK;
            while (value % 2 == 0 && (seen[0].load() != value || seen[1].load() != value)) {
                sched_yield();
            }
        }
        copier.join();
        borrower.join();
        CHECK(refused == 0);
    }
}

TEST_CASE("watch: threads: receivers come, are copied, borrow and go while values are sent",
          "[watch][threads]")
{
    for (const vkp_test_build &build : vkp_test_builds) {
        const vkp_test_watchdog watchdog;
        INFO(build.name);
        const vkp_env env = vkp_test_env_of(build);
        const size_t values = 4000;
        vkp_test_ledger ledger(1 + values);
        std::vector<uint64_t> wrong(3, 0);
        uint64_t refused = 0;
        {
            Sender sender(owning(&env, &ledger));
            std::vector<std::thread> threads;
            std::atomic<bool> done{false};
            for (size_t t = 0; t < 3; t++) {
                threads.emplace_back([&, t, tx = vkp_watch_tx_ref(sender.tx)] {
                    while (!done.load()) {
                        vkp_watch_rx *rx = nullptr;
                        vkp_watch_rx *copy = nullptr;
                        if (vkp_watch_subscribe(tx, &rx) != VKP_OK ||
                            vkp_watch_rx_clone(rx, &copy) != VKP_OK) {
                            vkp_test_fail("a receiver was refused");
                        }
                        const void *first = vkp_watch_borrow(rx);
                        const void *second = vkp_watch_borrow_and_update(copy);
                        wrong[t] += first == nullptr || second == nullptr;
                        uint64_t value[2] = {0, 0};
                        std::memcpy(&value[0], first, sizeof value[0]);
                        std::memcpy(&value[1], second, sizeof value[1]);
                        wrong[t] += ledger.owners(value[0]) != 1;
                        wrong[t] += ledger.owners(value[1]) != 1;
                        wrong[t] += value[1] < value[0];
                        vkp_watch_rx_unref(rx); // with the borrow
                        wrong[t] += ledger.owners(value[1]) != 1;
                        vkp_watch_rx_unref(copy);
                    }
                    vkp_watch_tx_unref(tx);
                });
            }
            for (uint64_t value = 1; value <= values; value++) {
                ledger.own(value);
                vkp_status status = sender.send(value);
                if (status == VKP_ERR_CLOSED) { // nobody there just now
                    status = sender.replace(value);
                }
                refused += status != VKP_OK;
            }
            done.store(true);
            for (std::thread &thread : threads) {
                thread.join();
            }
        }
        size_t not_once = 0;
        for (uint64_t value = 0; value <= values; value++) {
            not_once += ledger.drops(value) != 1;
        }
        CHECK(refused == 0);
        CHECK(wrong == std::vector<uint64_t>(3, 0));
        CHECK(not_once == 0);
        CHECK(ledger.wrong() == 0);
    }
}
