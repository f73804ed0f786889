// SPDX-License-Identifier: MIT
//
// The one-shot slot: one value, once, in the receiver's memory. What breaks in such a thing is the
// end: each way of ending meets each other one here, one after the other and at the same time.
#include "support/catch.hpp"

#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "support/park_probe.h"
#include "support/support.h"

namespace {

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

// A slot for a number.
struct Slot {
    Drops drops;
    vkp_oneshot slot;
    explicit Slot(const vkp_env *env = nullptr)
    {
        if (vkp_oneshot_init(&slot, env, sizeof(uint64_t), Drops::drop, &drops) != VKP_OK) {
            vkp_test_fail("a slot for eight bytes was refused");
        }
    }
    Slot(const Slot &) = delete;
    Slot &operator=(const Slot &) = delete;
    vkp_status send(uint64_t value)
    {
        return vkp_oneshot_send(&slot, &value);
    }
};

// Lets two threads begin the same round together.
class Gate {
  public:
    void meet()
    {
        const uint64_t target = (arrived_.fetch_add(1) / 2 + 1) * 2;
        while (arrived_.load() < target) {
            sched_yield();
        }
    }

  private:
    std::atomic<uint64_t> arrived_{0};
};

// A little work of varying length, so that the two sides of a race meet at every distance.
void jitter(unsigned amount)
{
    for (volatile unsigned i = 0; i < amount; i = i + 1) {
    }
}

} // namespace

TEST_CASE("oneshot: init takes 1 to VKP_ONESHOT_BYTES bytes", "[oneshot]")
{
    vkp_oneshot slot;
    CHECK(VKP_ONESHOT_BYTES == 48);
    CHECK(vkp_oneshot_init(nullptr, nullptr, 8, nullptr, nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_oneshot_init(&slot, nullptr, 0, nullptr, nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_oneshot_init(&slot, nullptr, VKP_ONESHOT_BYTES + 1, nullptr, nullptr) ==
          VKP_ERR_INVALID);
    CHECK(vkp_oneshot_init(&slot, nullptr, SIZE_MAX, nullptr, nullptr) == VKP_ERR_INVALID);
    for (size_t bytes = 1; bytes <= VKP_ONESHOT_BYTES; bytes++) {
        unsigned char in[VKP_ONESHOT_BYTES];
        unsigned char out[VKP_ONESHOT_BYTES + 1];
        std::memset(in, static_cast<int>(bytes), sizeof in);
        std::memset(out, 0, sizeof out);
        REQUIRE(vkp_oneshot_init(&slot, nullptr, bytes, nullptr, nullptr) == VKP_OK);
        REQUIRE(vkp_oneshot_send(&slot, in) == VKP_OK);
        REQUIRE(vkp_oneshot_recv(&slot, VKP_FOREVER, out) == VKP_OK);
        REQUIRE(std::memcmp(in, out, bytes) == 0);
        REQUIRE(out[bytes] == 0);
    }
}

TEST_CASE("oneshot: null arguments are INVALID and change nothing", "[oneshot]")
{
    Slot s;
    uint64_t value = 3;
    CHECK(vkp_oneshot_send(nullptr, &value) == VKP_ERR_INVALID);
    CHECK(vkp_oneshot_send(&s.slot, nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_oneshot_recv(nullptr, 0, &value) == VKP_ERR_INVALID);
    CHECK(vkp_oneshot_recv(&s.slot, VKP_FOREVER, nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_oneshot_try_recv(nullptr, &value) == VKP_ERR_INVALID);
    CHECK(vkp_oneshot_try_recv(&s.slot, nullptr) == VKP_ERR_INVALID);
    CHECK(s.send(4) == VKP_OK);
    CHECK(vkp_oneshot_try_recv(&s.slot, &value) == VKP_OK);
    CHECK(value == 4);
}

TEST_CASE("oneshot: nothing is allocated, in any course of events", "[oneshot][faults]")
{
    vkp_test_env env;
    vkp_test_env_init(&env);
    vkp_test_env_fault(&env, VKP_TEST_FAULT_FROM, 1);
    uint64_t value = 0;
    {
        Slot sent(&env.env);
        CHECK(sent.send(5) == VKP_OK);
        CHECK(vkp_oneshot_recv(&sent.slot, VKP_FOREVER, &value) == VKP_OK);
        Slot late(&env.env);
        CHECK(vkp_oneshot_recv(&late.slot, vkp_after_ms(1), &value) == VKP_ERR_TIMEOUT);
        Slot dropped(&env.env);
        CHECK(dropped.send(6) == VKP_OK);
        vkp_oneshot_close(&dropped.slot);
        Slot abandoned(&env.env);
        vkp_oneshot_abandon(&abandoned.slot);
        CHECK(vkp_oneshot_recv(&abandoned.slot, VKP_FOREVER, &value) == VKP_ERR_CLOSED);
    }
    CHECK(value == 5);
    CHECK(vkp_test_env_calls(&env) == 0);
    vkp_test_env_deinit(&env);
}

TEST_CASE("oneshot: the value is received once; then the slot is closed", "[oneshot]")
{
    for (bool trying : {false, true}) {
        Slot s;
        uint64_t value = 1;
        CHECK_FALSE(vkp_oneshot_is_closed(&s.slot));
        CHECK(vkp_oneshot_try_recv(&s.slot, &value) == VKP_ERR_EMPTY);
        CHECK(vkp_oneshot_try_recv(&s.slot, &value) == VKP_ERR_EMPTY);
        CHECK_FALSE(vkp_oneshot_is_closed(&s.slot));
        CHECK(value == 1);
        CHECK(s.send(7) == VKP_OK);
        CHECK((trying ? vkp_oneshot_try_recv(&s.slot, &value)
                      : vkp_oneshot_recv(&s.slot, 0, &value)) == VKP_OK);
        CHECK(value == 7);
        CHECK(vkp_oneshot_try_recv(&s.slot, &value) == VKP_ERR_CLOSED);
        CHECK(vkp_oneshot_recv(&s.slot, VKP_FOREVER, &value) == VKP_ERR_CLOSED);
        vkp_oneshot_close(&s.slot);
        CHECK(s.drops.count.load() == 0);
        CHECK(value == 7);
    }
}

TEST_CASE("oneshot: a second send is INVALID and leaves the first value", "[oneshot]")
{
    Slot s;
    uint64_t value = 0;
    CHECK(s.send(1) == VKP_OK);
    CHECK(s.send(2) == VKP_ERR_INVALID);
    CHECK(vkp_oneshot_recv(&s.slot, VKP_FOREVER, &value) == VKP_OK);
    CHECK(value == 1);
    CHECK(s.drops.count.load() == 0);
}

TEST_CASE("oneshot: an abandoned slot gives CLOSED; after a send abandon is ignored", "[oneshot]")
{
    uint64_t value = 9;
    for (bool trying : {false, true}) {
        Slot s;
        vkp_oneshot_abandon(&s.slot);
        CHECK((trying ? vkp_oneshot_try_recv(&s.slot, &value)
                      : vkp_oneshot_recv(&s.slot, VKP_FOREVER, &value)) == VKP_ERR_CLOSED);
        CHECK(value == 9);
        CHECK(s.drops.count.load() == 0);
    }
    Slot sent;
    CHECK(sent.send(3) == VKP_OK);
    vkp_oneshot_abandon(&sent.slot);
    CHECK(vkp_oneshot_recv(&sent.slot, VKP_FOREVER, &value) == VKP_OK);
    CHECK(value == 3);
}

TEST_CASE("oneshot: close before the value: the sender keeps it", "[oneshot]")
{
    Slot s;
    uint64_t value = 0;
    vkp_oneshot_close(&s.slot);
    CHECK(vkp_oneshot_is_closed(&s.slot));
    vkp_oneshot_close(&s.slot);
    CHECK(s.send(1) == VKP_ERR_CLOSED);
    vkp_oneshot_abandon(&s.slot);
    CHECK(vkp_oneshot_recv(&s.slot, VKP_FOREVER, &value) == VKP_ERR_CLOSED);
    CHECK(vkp_oneshot_try_recv(&s.slot, &value) == VKP_ERR_CLOSED);
    CHECK(s.drops.count.load() == 0);
}

TEST_CASE("oneshot: close after the value: it is dropped, once", "[oneshot]")
{
    Slot s;
    CHECK(s.send(11) == VKP_OK);
    CHECK(s.drops.count.load() == 0);
    vkp_oneshot_close(&s.slot);
    CHECK(s.drops.count.load() == 1);
    CHECK(s.drops.last.load() == 11);
    vkp_oneshot_close(&s.slot);
    uint64_t value = 0;
    CHECK(vkp_oneshot_try_recv(&s.slot, &value) == VKP_ERR_CLOSED);
    CHECK(s.drops.count.load() == 1);

    vkp_oneshot plain;
    REQUIRE(vkp_oneshot_init(&plain, nullptr, 8, nullptr, nullptr) == VKP_OK);
    REQUIRE(vkp_oneshot_send(&plain, &value) == VKP_OK);
    vkp_oneshot_close(&plain);
    CHECK(vkp_oneshot_try_recv(&plain, &value) == VKP_ERR_CLOSED);
}

TEST_CASE("oneshot: close after abandon drops nothing", "[oneshot]")
{
    Slot s;
    vkp_oneshot_abandon(&s.slot);
    vkp_oneshot_close(&s.slot);
    vkp_oneshot_close(&s.slot);
    uint64_t value = 0;
    CHECK(vkp_oneshot_try_recv(&s.slot, &value) == VKP_ERR_CLOSED);
    CHECK(s.drops.count.load() == 0);
}

TEST_CASE("oneshot: a timeout closes the slot, and the late value stays the sender's", "[oneshot]")
{
    vkp_env env = VKP_ZERO;
    env.sys = vkp_test_virtual_sys();
    const uint64_t hour_ns = uint64_t{3600} * 1000000000u;
    for (bool at_once : {true, false}) {
        Slot s(&env);
        uint64_t value = 2;
        const uint64_t deadline = at_once ? 0 : vkp_test_virtual_ns.load() + hour_ns;
        CHECK(vkp_oneshot_recv(&s.slot, deadline, &value) == VKP_ERR_TIMEOUT);
        CHECK(vkp_test_virtual_ns.load() >= deadline);
        CHECK(vkp_oneshot_is_closed(&s.slot));
        CHECK(s.send(1) == VKP_ERR_CLOSED);
        CHECK(vkp_oneshot_recv(&s.slot, VKP_FOREVER, &value) == VKP_ERR_CLOSED);
        vkp_oneshot_close(&s.slot);
        CHECK(value == 2);
        CHECK(s.drops.count.load() == 0);
    }
}

TEST_CASE("oneshot: a wait on the real clock never ends before its deadline", "[oneshot]")
{
    Slot s;
    uint64_t value = 0;
    const uint64_t deadline = vkp_after_ms(2);
    CHECK(vkp_oneshot_recv(&s.slot, deadline, &value) == VKP_ERR_TIMEOUT);
    CHECK(vkp_now_ns() >= deadline);
}

TEST_CASE("oneshot: a slot may be used again after init", "[oneshot]")
{
    Slot s;
    uint64_t value = 0;
    for (uint64_t i = 0; i < 5; i++) {
        REQUIRE(vkp_oneshot_init(&s.slot, nullptr, 8, Drops::drop, &s.drops) == VKP_OK);
        REQUIRE(s.send(i) == VKP_OK);
        REQUIRE(vkp_oneshot_recv(&s.slot, 0, &value) == VKP_OK);
        REQUIRE(value == i);
    }
}

namespace {
struct Owner {
    int detached = 0;
    vkp_oneshot *slot = nullptr;
    static void detach(vkp_oneshot *slot)
    {
        Owner *self = static_cast<Owner *>(slot->i_owner);
        self->detached++;
        self->slot = slot;
    }
    void attach(Slot *s)
    {
        s->slot.i_owner = this;
        s->slot.i_detach = detach;
    }
};
} // namespace

TEST_CASE("oneshot: a sender that can be detached is, when the receiver leaves before the value",
          "[oneshot]")
{
    uint64_t value = 0;
    {
        Owner owner;
        Slot s;
        owner.attach(&s);
        vkp_oneshot_close(&s.slot);
        CHECK(owner.detached == 1);
        CHECK(owner.slot == &s.slot);
        vkp_oneshot_close(&s.slot);
        CHECK(vkp_oneshot_recv(&s.slot, VKP_FOREVER, &value) == VKP_ERR_CLOSED);
        CHECK(owner.detached == 1);
    }
    {
        Owner owner;
        Slot s;
        owner.attach(&s);
        CHECK(vkp_oneshot_recv(&s.slot, 0, &value) == VKP_ERR_TIMEOUT);
        CHECK(owner.detached == 1);
        CHECK(owner.slot == &s.slot);
        vkp_oneshot_close(&s.slot);
        CHECK(owner.detached == 1);
    }
}

TEST_CASE("oneshot: a sender that has finished is not detached: it may be gone", "[oneshot]")
{
    uint64_t value = 0;
    Owner owner;
    Slot received;
    owner.attach(&received);
    CHECK(vkp_oneshot_try_recv(&received.slot, &value) == VKP_ERR_EMPTY);
    CHECK(received.send(1) == VKP_OK);
    CHECK(vkp_oneshot_recv(&received.slot, 0, &value) == VKP_OK);
    vkp_oneshot_close(&received.slot);
    Slot dropped;
    owner.attach(&dropped);
    CHECK(dropped.send(1) == VKP_OK);
    vkp_oneshot_close(&dropped.slot);
    CHECK(dropped.drops.count.load() == 1);
    Slot abandoned;
    owner.attach(&abandoned);
    vkp_oneshot_abandon(&abandoned.slot);
    CHECK(vkp_oneshot_recv(&abandoned.slot, 0, &value) == VKP_ERR_CLOSED);
    vkp_oneshot_close(&abandoned.slot);
    CHECK(owner.detached == 0);
}

TEST_CASE("oneshot: a waiting receiver is woken by send and by abandon", "[oneshot][threads]")
{
    vkp_env env = VKP_ZERO;
    env.sys = vkp_test_probed_sys();
    for (int round = 0; round < 50; round++) {
        for (bool abandon : {false, true}) {
            Slot s(&env);
            std::atomic<unsigned> parks{0};
            uint64_t value = 0;
            vkp_status status = VKP_ERR_INVALID;
            std::thread receiver([&] {
                vkp_test_parks = &parks;
                status = vkp_oneshot_recv(&s.slot, vkp_test_deadline(), &value);
                vkp_test_parks = nullptr;
            });
            vkp_test_await_park(parks);
            vkp_status sent = VKP_OK;
            if (abandon) {
                vkp_oneshot_abandon(&s.slot);
            } else {
                sent = s.send(42);
            }
            receiver.join();
            REQUIRE(sent == VKP_OK);
            REQUIRE(status == (abandon ? VKP_ERR_CLOSED : VKP_OK));
            REQUIRE(value == (abandon ? 0u : 42u));
        }
    }
}

namespace {

enum SenderAct { act_send, act_abandon };
enum ReceiverAct { act_recv, act_recv_now, act_recv_soon, act_try, act_close };

struct RaceCounts {
    uint64_t sent = 0;
    uint64_t abandoned = 0;
    uint64_t kept = 0; // refused with CLOSED: the sender's
    uint64_t received = 0;
    uint64_t dropped = 0;
    uint64_t closed = 0;
    uint64_t timeouts = 0;
    uint64_t strange = 0;
};

vkp_status receive(vkp_oneshot *slot, uint64_t *value, ReceiverAct act, unsigned round)
{
    vkp_status status = VKP_ERR_EMPTY;
    switch (act) {
    case act_recv:
        return vkp_oneshot_recv(slot, VKP_FOREVER, value);
    case act_recv_now:
        return vkp_oneshot_recv(slot, 0, value);
    case act_recv_soon:
        return vkp_oneshot_recv(slot, vkp_now_ns() + round % 64 * 1000, value);
    case act_try:
        while (status == VKP_ERR_EMPTY) {
            status = vkp_oneshot_try_recv(slot, value);
        }
        return status;
    case act_close:
        break;
    }
    vkp_oneshot_close(slot);
    return VKP_ERR_CANCELLED;
}

RaceCounts race(SenderAct sender_act, ReceiverAct receiver_act, unsigned rounds)
{
    std::vector<std::unique_ptr<Slot>> slots;
    for (unsigned i = 0; i < rounds; i++) {
        slots.push_back(std::make_unique<Slot>());
    }
    Gate gate;
    RaceCounts counts;
    uint64_t strange_sends = 0;
    std::thread sender([&] {
        for (unsigned i = 0; i < rounds; i++) {
            gate.meet();
            jitter(i * 7 % 200);
            if (sender_act == act_abandon) {
                vkp_oneshot_abandon(&slots[i]->slot);
                counts.abandoned++;
                continue;
            }
            const vkp_status status = slots[i]->send(i);
            if (status == VKP_OK) {
                counts.sent++;
            } else if (status == VKP_ERR_CLOSED) {
                counts.kept++;
                strange_sends += vkp_oneshot_is_closed(&slots[i]->slot) ? 0 : 1;
            } else {
                strange_sends++;
            }
        }
    });
    for (unsigned i = 0; i < rounds; i++) {
        gate.meet();
        jitter(i * 11 % 200);
        uint64_t value = UINT64_MAX;
        switch (receive(&slots[i]->slot, &value, receiver_act, i)) {
        case VKP_OK:
            counts.received++;
            counts.strange += value != i;
            break;
        case VKP_ERR_CLOSED:
            counts.closed++;
            counts.strange += sender_act == act_send;
            break;
        case VKP_ERR_TIMEOUT:
            counts.timeouts++;
            break;
        default:
            counts.strange += receiver_act != act_close;
            break;
        }
    }
    sender.join();
    counts.strange += strange_sends;
    for (const std::unique_ptr<Slot> &slot : slots) {
        counts.dropped += slot->drops.count.load();
    }
    return counts;
}

} // namespace

TEST_CASE("oneshot: threads: every end meets every other; each value has one fate",
          "[oneshot][threads]")
{
    const unsigned rounds = 5000;
    for (ReceiverAct receiver_act : {act_recv, act_recv_now, act_recv_soon, act_try, act_close}) {
        INFO("receiver " << receiver_act);
        const RaceCounts sending = race(act_send, receiver_act, rounds);
        CHECK(sending.strange == 0);
        CHECK(sending.sent + sending.kept == rounds);
        CHECK(sending.sent == sending.received + sending.dropped);
        if (receiver_act == act_close) {
            CHECK(sending.received == 0);
        } else {
            CHECK(sending.dropped == 0);
            CHECK(sending.kept == sending.timeouts);
        }
        const RaceCounts abandoning = race(act_abandon, receiver_act, rounds);
        CHECK(abandoning.strange == 0);
        CHECK(abandoning.received + abandoning.dropped == 0);
        if (receiver_act != act_close) {
            CHECK(abandoning.closed + abandoning.timeouts == rounds);
        }
    }
}

TEST_CASE("oneshot: threads: the slot's memory may go as soon as the receiver knows the end",
          "[oneshot][threads]")
{
    // The sender may use the slot until it sent, not a moment longer: a touch afterwards is a use
    // after free to a sanitizer.
    const unsigned rounds = 10000;
    for (bool abandon : {false, true}) {
        for (bool trying : {false, true}) {
            std::vector<Slot *> slots;
            for (unsigned i = 0; i < rounds; i++) {
                slots.push_back(new Slot);
            }
            Gate gate;
            uint64_t failed = 0;
            std::thread sender([&] {
                for (unsigned i = 0; i < rounds; i++) {
                    vkp_oneshot *slot = &slots[i]->slot;
                    gate.meet();
                    jitter(i * 7 % 100);
                    const uint64_t value = i;
                    if (abandon) {
                        vkp_oneshot_abandon(slot);
                    } else {
                        failed += vkp_oneshot_send(slot, &value) != VKP_OK;
                    }
                }
            });
            uint64_t wrong = 0;
            for (unsigned i = 0; i < rounds; i++) {
                gate.meet();
                jitter(i * 11 % 100);
                uint64_t value = i;
                const vkp_status status =
                    receive(&slots[i]->slot, &value, trying ? act_try : act_recv, i);
                wrong += value != i || status != (abandon ? VKP_ERR_CLOSED : VKP_OK);
                delete slots[i];
            }
            sender.join();
            CHECK(failed == 0);
            CHECK(wrong == 0);
        }
    }
}

namespace {

// The worst moment, staged: the deadline passes after the sender has decided and before its
// wake-up arrives. The first park ends (at the deadline) once the sender is inside unpark, and
// unpark goes on once the receiver has either parked again or returned.
std::atomic<int> staged_parks{0};
std::atomic<bool> staged_unpark{false};
std::atomic<bool> staged_returned{false};

const vkp_sys *staged_sys()
{
    static const vkp_sys table = [] {
        vkp_sys copy = *vkp_sys_get_default();
        copy.park = [](vkp_parker *parker, uint64_t deadline_ns) {
            if (staged_parks.fetch_add(1) > 0) {
                vkp_sys_get_default()->park(parker, deadline_ns);
                return;
            }
            while (!staged_unpark.load()) {
                sched_yield();
            }
        };
        copy.unpark = [](vkp_parker *parker) {
            staged_unpark.store(true);
            while (staged_parks.load() < 2 && !staged_returned.load()) {
                sched_yield();
            }
            if (!staged_returned.load()) {
                vkp_sys_get_default()->unpark(parker);
            }
        };
        return copy;
    }();
    return &table;
}

} // namespace

TEST_CASE("oneshot: threads: a value that met the deadline is received, not lost",
          "[oneshot][threads]")
{
    vkp_env env = VKP_ZERO;
    env.sys = staged_sys();
    for (bool abandon : {false, true}) {
        Slot s(&env);
        staged_parks.store(0);
        staged_unpark.store(false);
        staged_returned.store(false);
        vkp_status status = VKP_ERR_INVALID;
        uint64_t value = 0;
        std::thread receiver([&] {
            status = vkp_oneshot_recv(&s.slot, vkp_after_ms(1), &value);
            staged_returned.store(true);
        });
        while (staged_parks.load() == 0) {
            sched_yield();
        }
        vkp_status sent = VKP_OK;
        if (abandon) {
            vkp_oneshot_abandon(&s.slot);
        } else {
            sent = s.send(6);
        }
        receiver.join();
        CHECK(sent == VKP_OK);
        CHECK(status == (abandon ? VKP_ERR_CLOSED : VKP_OK));
        CHECK(value == (abandon ? 0u : 6u));
        CHECK(s.drops.count.load() == 0);
    }
}

namespace {

// A sender as the library's own: it knows the slot through a record under a lock, and the record
// forgets the slot when the receiver leaves.
struct Record {
    std::mutex lock;
    vkp_oneshot *slot = nullptr;
    static void detach(vkp_oneshot *slot)
    {
        Record *self = static_cast<Record *>(slot->i_owner);
        const std::lock_guard<std::mutex> guard(self->lock);
        self->slot = nullptr;
    }
};

} // namespace

TEST_CASE("oneshot: threads: with detach the slot may live on a stack that is left early",
          "[oneshot][threads]")
{
    const unsigned rounds = 10000;
    std::vector<std::unique_ptr<Record>> records;
    for (unsigned i = 0; i < rounds; i++) {
        records.push_back(std::make_unique<Record>());
    }
    Gate gate;
    uint64_t sent = 0;
    uint64_t late = 0;
    uint64_t strange = 0;
    std::thread sender([&] {
        for (unsigned i = 0; i < rounds; i++) {
            gate.meet();
            jitter(i * 13 % 300);
            Record &record = *records[i];
            const std::lock_guard<std::mutex> guard(record.lock);
            const uint64_t value = i;
            if (record.slot == nullptr) {
                late++;
                continue;
            }
            const vkp_status status = vkp_oneshot_send(record.slot, &value);
            record.slot = nullptr;
            // CLOSED is possible still: the receiver has left, and waits for this lock in detach.
            if (status == VKP_OK) {
                sent++;
            } else if (status == VKP_ERR_CLOSED) {
                late++;
            } else {
                strange++;
            }
        }
    });
    uint64_t received = 0;
    uint64_t dropped = 0;
    for (unsigned i = 0; i < rounds; i++) {
        const std::unique_ptr<Slot> s = std::make_unique<Slot>();
        s->slot.i_owner = records[i].get();
        s->slot.i_detach = Record::detach;
        records[i]->slot = &s->slot;
        gate.meet();
        jitter(i * 11 % 300);
        uint64_t value = i;
        const ReceiverAct act = i % 3 == 0 ? act_close : act_recv_soon;
        const vkp_status status = receive(&s->slot, &value, act, i);
        received += status == VKP_OK;
        strange += value != i || status == VKP_ERR_CLOSED;
        dropped += s->drops.count.load();
    }
    sender.join();
    CHECK(strange == 0);
    CHECK(sent == received + dropped);
    CHECK(sent + late == rounds);
}
