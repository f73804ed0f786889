// SPDX-License-Identifier: MIT
//
// Select: whichever comes first of any mix of ends. Each kind of case is an End here, which can be
// made ready and then tells whether it was carried out, or left whole; so every rule is tested with
// every kind, alone and in pairs. The threaded tests at the end mix them all and count values.
#include "support/catch.hpp"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include <unistd.h>

#include "support/channel_probe.h"
#include "support/support.h"

namespace {

void must(vkp_status status)
{
    if (status != VKP_OK) {
        vkp_test_fail("a call that cannot fail here: %s", vkp_status_str(status));
    }
}

// ---- one end of everything ----

class End {
  public:
    virtual ~End() = default;
    virtual const char *name() const = 0;
    virtual vkp_case make() = 0;
    // From any thread, once; the select may be waiting.
    virtual void make_ready() = 0;
    // After it won: the status and what it gave or took are as they should be.
    virtual bool was_carried_out(const vkp_case &won) = 0;
    // After it was made ready and did not win: everything is there still, as if nobody had waited.
    virtual bool is_whole() = 0;
    virtual bool is_for_loops() const
    {
        return true;
    }
};

class Mpsc : public End {
  public:
    Mpsc(const vkp_env *env, bool full)
    {
        vkp_mpsc_config config = VKP_ZERO;
        config.elem_bytes = 8;
        config.capacity_items = 1;
        config.env = env;
        if (vkp_mpsc_open(&config, &tx, &rx) != VKP_OK || (full && !send(1))) {
            vkp_test_fail("no channel");
        }
    }
    ~Mpsc() override
    {
        vkp_mpsc_tx_unref(tx);
        vkp_mpsc_rx_unref(rx);
    }
    bool send(uint64_t value)
    {
        return vkp_mpsc_try_send(tx, &value) == VKP_OK;
    }
    bool holds(uint64_t want)
    {
        uint64_t value = 0;
        return vkp_mpsc_try_recv(rx, &value) == VKP_OK && value == want &&
               vkp_mpsc_get_len(rx) == 0;
    }
    vkp_mpsc_tx *tx = nullptr;
    vkp_mpsc_rx *rx = nullptr;
    uint64_t out = 0;
};

class MpscRecv : public Mpsc {
  public:
    MpscRecv(const vkp_env *env, bool closes) : Mpsc(env, false), closes_(closes)
    {
    }
    const char *name() const override
    {
        return closes_ ? "mpsc recv, closed" : "mpsc recv";
    }
    vkp_case make() override
    {
        return vkp_case_mpsc_recv(rx, &out);
    }
    void make_ready() override
    {
        if (!closes_) {
            const uint64_t value = 5;
            must(vkp_mpsc_try_send(tx, &value));
            return;
        }
        vkp_mpsc_tx_unref(tx);
        tx = nullptr;
    }
    bool was_carried_out(const vkp_case &won) override
    {
        return closes_ ? won.status == VKP_ERR_CLOSED
                       : won.status == VKP_OK && out == 5 && vkp_mpsc_get_len(rx) == 0;
    }
    bool is_whole() override
    {
        return out == 0 && (closes_ ? vkp_mpsc_try_recv(rx, &out) == VKP_ERR_CLOSED : holds(5));
    }

  private:
    const bool closes_;
};

class MpscSend : public Mpsc {
  public:
    MpscSend(const vkp_env *env, bool closes) : Mpsc(env, true), closes_(closes)
    {
    }
    const char *name() const override
    {
        return closes_ ? "mpsc send, closed" : "mpsc send";
    }
    vkp_case make() override
    {
        return vkp_case_mpsc_send(tx, &item_);
    }
    void make_ready() override
    {
        if (closes_) {
            vkp_mpsc_close(rx);
        } else {
            must(vkp_mpsc_try_recv(rx, &out));
        }
    }
    bool was_carried_out(const vkp_case &won) override
    {
        return closes_ ? won.status == VKP_ERR_CLOSED && holds(1)
                       : won.status == VKP_OK && holds(item_);
    }
    bool is_whole() override
    {
        return closes_ ? holds(1) : vkp_mpsc_get_len(rx) == 0 && send(9) && holds(9);
    }

  private:
    const bool closes_;
    const uint64_t item_ = 2;
};

class MpscReserve : public Mpsc {
  public:
    explicit MpscReserve(const vkp_env *env) : Mpsc(env, true)
    {
    }
    const char *name() const override
    {
        return "mpsc reserve";
    }
    vkp_case make() override
    {
        return vkp_case_mpsc_reserve(tx, &permit_);
    }
    void make_ready() override
    {
        must(vkp_mpsc_try_recv(rx, &out));
    }
    bool was_carried_out(const vkp_case &won) override
    {
        if (won.status != VKP_OK) {
            return false;
        }
        *static_cast<uint64_t *>(permit_.item) = 3;
        vkp_mpsc_commit(&permit_);
        return holds(3);
    }
    bool is_whole() override
    {
        return vkp_mpsc_get_len(rx) == 0 && send(9) && holds(9); // no place is kept for nobody
    }

  private:
    vkp_mpsc_permit permit_ = {};
};

class MpscClosed : public Mpsc {
  public:
    explicit MpscClosed(const vkp_env *env) : Mpsc(env, false)
    {
    }
    const char *name() const override
    {
        return "mpsc closed";
    }
    vkp_case make() override
    {
        return vkp_case_mpsc_closed(tx);
    }
    void make_ready() override
    {
        vkp_mpsc_close(rx);
    }
    bool was_carried_out(const vkp_case &won) override
    {
        return won.status == VKP_OK && is_whole();
    }
    bool is_whole() override
    {
        return vkp_mpsc_is_closed(tx);
    }
};

class Oneshot : public End {
  public:
    enum Kind { value, abandoned, closed };
    Oneshot(const vkp_env *env, Kind kind) : kind_(kind)
    {
        if (vkp_oneshot_init(&slot_, env, 8, nullptr, nullptr) != VKP_OK) {
            vkp_test_fail("no slot");
        }
    }
    ~Oneshot() override
    {
        vkp_oneshot_close(&slot_);
    }
    const char *name() const override
    {
        return kind_ == value       ? "oneshot recv"
               : kind_ == abandoned ? "oneshot recv, abandoned"
                                    : "oneshot closed";
    }
    vkp_case make() override
    {
        return kind_ == closed ? vkp_case_oneshot_closed(&slot_)
                               : vkp_case_oneshot_recv(&slot_, &out_);
    }
    void make_ready() override
    {
        const uint64_t item = 5;
        if (kind_ == value) {
            sent_ = vkp_oneshot_send(&slot_, &item);
        } else if (kind_ == abandoned) {
            vkp_oneshot_abandon(&slot_);
        } else {
            vkp_oneshot_close(&slot_);
        }
    }
    bool was_carried_out(const vkp_case &won) override
    {
        return kind_ == value       ? won.status == VKP_OK && out_ == 5 && sent_ == VKP_OK
               : kind_ == abandoned ? won.status == VKP_ERR_CLOSED
                                    : won.status == VKP_OK && vkp_oneshot_is_closed(&slot_);
    }
    bool is_whole() override // the slot was open until its sender came
    {
        return kind_ == value ? sent_ == VKP_OK && out_ == 0 &&
                                    vkp_oneshot_try_recv(&slot_, &out_) == VKP_OK && out_ == 5
               : kind_ == abandoned ? vkp_oneshot_try_recv(&slot_, &out_) == VKP_ERR_CLOSED
                                    : vkp_oneshot_is_closed(&slot_);
    }

  private:
    const Kind kind_;
    vkp_oneshot slot_;
    vkp_status sent_ = VKP_ERR_INVALID;
    uint64_t out_ = 0;
};

class Broadcast : public End {
  public:
    enum Kind { value, lagged, closed, gone };
    Broadcast(const vkp_env *env, Kind kind) : kind_(kind)
    {
        vkp_broadcast_config config = VKP_ZERO;
        config.elem_bytes = 8;
        config.capacity_items = 2;
        config.env = env;
        if (vkp_broadcast_open(&config, &tx_) != VKP_OK ||
            vkp_broadcast_subscribe(tx_, &rx_) != VKP_OK) {
            vkp_test_fail("no channel");
        }
    }
    ~Broadcast() override
    {
        vkp_broadcast_tx_unref(tx_);
        vkp_broadcast_rx_unref(rx_);
    }
    const char *name() const override
    {
        static const char *const names[] = {"broadcast recv", "broadcast recv, lagged",
                                            "broadcast recv, closed", "broadcast closed"};
        return names[kind_];
    }
    vkp_case make() override
    {
        return kind_ == gone ? vkp_case_broadcast_closed(tx_) : vkp_case_broadcast_recv(rx_, &out_);
    }
    void make_ready() override
    {
        if (kind_ == closed) {
            vkp_broadcast_tx_unref(tx_);
            tx_ = nullptr;
        } else if (kind_ == gone) {
            vkp_broadcast_rx_unref(rx_);
            rx_ = nullptr;
        } else {
            for (uint64_t item = 5; item < (kind_ == lagged ? 9 : 6); item++) {
                must(vkp_broadcast_send(tx_, &item));
            }
        }
    }
    bool was_carried_out(const vkp_case &won) override
    {
        switch (kind_) {
        case value:
            return won.status == VKP_OK && out_ == 5 && vkp_broadcast_get_len(rx_) == 0;
        case lagged: // a receiver that waits wakes at the first value or at any later one
            return won.status == VKP_ERR_LAGGED
                       ? vkp_broadcast_get_missed(rx_) + vkp_broadcast_get_len(rx_) == 4
                       : won.status == VKP_OK && out_ == 5 && vkp_broadcast_get_len(rx_) == 3;
        case closed:
            return won.status == VKP_ERR_CLOSED;
        case gone:
            break;
        }
        return won.status == VKP_OK && is_whole();
    }
    bool is_whole() override
    {
        switch (kind_) {
        case value:
            return out_ == 0 && vkp_broadcast_try_recv(rx_, &out_) == VKP_OK && out_ == 5;
        case lagged:
            return out_ == 0 && vkp_broadcast_try_recv(rx_, &out_) == VKP_ERR_LAGGED &&
                   vkp_broadcast_get_missed(rx_) == 2;
        case closed:
            return vkp_broadcast_try_recv(rx_, &out_) == VKP_ERR_CLOSED;
        case gone:
            break;
        }
        return vkp_broadcast_get_receivers(tx_) == 0;
    }

  private:
    const Kind kind_;
    vkp_broadcast_tx *tx_ = nullptr;
    vkp_broadcast_rx *rx_ = nullptr;
    uint64_t out_ = 0;
};

class Watch : public End {
  public:
    enum Kind { changed, closed, gone };
    Watch(const vkp_env *env, Kind kind) : kind_(kind)
    {
        vkp_watch_config config = VKP_ZERO;
        config.elem_bytes = 8;
        config.env = env;
        if (vkp_watch_open(&config, &tx_) != VKP_OK || vkp_watch_subscribe(tx_, &rx_) != VKP_OK) {
            vkp_test_fail("no channel");
        }
    }
    ~Watch() override
    {
        vkp_watch_tx_unref(tx_);
        vkp_watch_rx_unref(rx_);
    }
    const char *name() const override
    {
        static const char *const names[] = {"watch changed", "watch changed, closed",
                                            "watch closed"};
        return names[kind_];
    }
    vkp_case make() override
    {
        return kind_ == gone ? vkp_case_watch_closed(tx_) : vkp_case_watch_changed(rx_);
    }
    void make_ready() override
    {
        const uint64_t item = 5;
        if (kind_ == changed) {
            must(vkp_watch_send(tx_, &item));
        } else if (kind_ == closed) {
            vkp_watch_tx_unref(tx_);
            tx_ = nullptr;
        } else {
            vkp_watch_rx_unref(rx_);
            rx_ = nullptr;
        }
    }
    bool was_carried_out(const vkp_case &won) override
    {
        return kind_ == changed  ? won.status == VKP_OK && !vkp_watch_is_changed(rx_)
               : kind_ == closed ? won.status == VKP_ERR_CLOSED
                                 : won.status == VKP_OK && is_whole();
    }
    bool is_whole() override
    {
        return kind_ == changed  ? vkp_watch_is_changed(rx_)
               : kind_ == closed ? vkp_watch_changed(rx_, 0) == VKP_ERR_CLOSED
                                 : vkp_watch_get_receivers(tx_) == 0;
    }

  private:
    const Kind kind_;
    vkp_watch_tx *tx_ = nullptr;
    vkp_watch_rx *rx_ = nullptr;
};

class Cancel : public End {
  public:
    Cancel(const vkp_env *env, bool by_parent) : by_parent_(by_parent)
    {
        if (vkp_cancel_open(env, nullptr, &parent_) != VKP_OK ||
            vkp_cancel_open(env, parent_, &token_) != VKP_OK) {
            vkp_test_fail("no token");
        }
    }
    ~Cancel() override
    {
        vkp_cancel_unref(parent_);
        vkp_cancel_unref(token_);
    }
    const char *name() const override
    {
        return by_parent_ ? "cancel, by a parent" : "cancel";
    }
    vkp_case make() override
    {
        return vkp_case_cancel(token_);
    }
    void make_ready() override
    {
        vkp_cancel_trigger(by_parent_ ? parent_ : token_);
    }
    bool was_carried_out(const vkp_case &won) override
    {
        return won.status == VKP_OK && is_whole();
    }
    bool is_whole() override
    {
        return vkp_cancel_is_triggered(token_);
    }

  private:
    const bool by_parent_;
    vkp_cancel *parent_ = nullptr;
    vkp_cancel *token_ = nullptr;
};

class Descriptor : public End {
  public:
    enum Kind { read_end, write_end, hang_up };
    explicit Descriptor(Kind kind) : kind_(kind)
    {
        vkp_test_socket_pair(fds_);
        // Full until the other side reads.
        const std::vector<char> chunk(65536, 'x');
        while (kind == write_end && write(fds_[0], chunk.data(), chunk.size()) > 0) {
        }
    }
    ~Descriptor() override
    {
        (void)close(fds_[0]);
        if (fds_[1] >= 0) {
            (void)close(fds_[1]);
        }
    }
    const char *name() const override
    {
        static const char *const names[] = {"fd, readable", "fd, writable", "fd, hung up"};
        return names[kind_];
    }
    vkp_case make() override
    {
        return vkp_case_fd(fds_[0], kind_ == write_end ? VKP_IO_WRITE : VKP_IO_READ);
    }
    void make_ready() override
    {
        if (kind_ == read_end) {
            must(write(fds_[1], "x", 1) == 1 ? VKP_OK : VKP_ERR_SYS);
        } else if (kind_ == hang_up) {
            (void)close(fds_[1]);
            fds_[1] = -1;
        } else {
            std::vector<char> chunk(1 << 20);
            // As much as the kernel wants gone before it calls the other side writable.
            for (vkp_case look = make(); !is_ready(look); look = make()) {
                must(read(fds_[1], chunk.data(), chunk.size()) > 0 ? VKP_OK : VKP_ERR_SYS);
            }
        }
    }
    bool was_carried_out(const vkp_case &won) override
    {
        const uint32_t want = kind_ == write_end ? VKP_IO_WRITE : VKP_IO_READ;
        return won.status == VKP_OK && (won.ready & (want | VKP_IO_HUP)) != 0 &&
               (kind_ == hang_up || won.ready == want) && is_whole();
    }
    bool is_whole() override
    {
        char c = 0;
        return kind_ == read_end  ? read(fds_[0], &c, 1) == 1 && c == 'x'
               : kind_ == hang_up ? read(fds_[0], &c, 1) == 0
                                  : write(fds_[0], &c, 1) == 1;
    }
    bool is_for_loops() const override
    {
        return false;
    }

  private:
    static bool is_ready(vkp_case look)
    {
        size_t won = 0;
        return vkp_select(&look, 1, 0, &won) == VKP_OK;
    }
    const Kind kind_;
    int fds_[2];
};

using Maker = std::function<std::unique_ptr<End>(const vkp_env *env)>;

const std::vector<Maker> &kinds()
{
    static const std::vector<Maker> all = {
        [](const vkp_env *env) { return std::make_unique<MpscRecv>(env, false); },
        [](const vkp_env *env) { return std::make_unique<MpscRecv>(env, true); },
        [](const vkp_env *env) { return std::make_unique<MpscSend>(env, false); },
        [](const vkp_env *env) { return std::make_unique<MpscSend>(env, true); },
        [](const vkp_env *env) { return std::make_unique<MpscReserve>(env); },
        [](const vkp_env *env) { return std::make_unique<MpscClosed>(env); },
        [](const vkp_env *env) { return std::make_unique<Oneshot>(env, Oneshot::value); },
        [](const vkp_env *env) { return std::make_unique<Oneshot>(env, Oneshot::abandoned); },
        [](const vkp_env *env) { return std::make_unique<Oneshot>(env, Oneshot::closed); },
        [](const vkp_env *env) { return std::make_unique<Broadcast>(env, Broadcast::value); },
        [](const vkp_env *env) { return std::make_unique<Broadcast>(env, Broadcast::lagged); },
        [](const vkp_env *env) { return std::make_unique<Broadcast>(env, Broadcast::closed); },
        [](const vkp_env *env) { return std::make_unique<Broadcast>(env, Broadcast::gone); },
        [](const vkp_env *env) { return std::make_unique<Watch>(env, Watch::changed); },
        [](const vkp_env *env) { return std::make_unique<Watch>(env, Watch::closed); },
        [](const vkp_env *env) { return std::make_unique<Watch>(env, Watch::gone); },
        [](const vkp_env *env) { return std::make_unique<Cancel>(env, false); },
        [](const vkp_env *env) { return std::make_unique<Cancel>(env, true); },
        [](const vkp_env *) { return std::make_unique<Descriptor>(Descriptor::read_end); },
        [](const vkp_env *) { return std::make_unique<Descriptor>(Descriptor::write_end); },
        [](const vkp_env *) { return std::make_unique<Descriptor>(Descriptor::hang_up); },
    };
    return all;
}

// A token that nobody cancels: it lends its environment to a select of cases that have none.
class Guard {
  public:
    explicit Guard(const vkp_env *env)
    {
        if (vkp_cancel_open(env, nullptr, &token_) != VKP_OK) {
            vkp_test_fail("no token");
        }
    }
    ~Guard()
    {
        vkp_cancel_unref(token_);
    }
    Guard(const Guard &) = delete;
    Guard &operator=(const Guard &) = delete;
    vkp_case make() const
    {
        return vkp_case_cancel(token_);
    }
    vkp_cancel *token() const
    {
        return token_;
    }

  private:
    vkp_cancel *token_ = nullptr;
};

struct Channel {
    vkp_mpsc_tx *tx = nullptr;
    vkp_mpsc_rx *rx = nullptr;
    Channel(size_t capacity, const vkp_env *env, bool lanes = false)
    {
        vkp_mpsc_config config = VKP_ZERO;
        config.elem_bytes = 8;
        config.capacity_items = capacity;
        config.lanes = lanes;
        config.env = env;
        if (vkp_mpsc_open(&config, &tx, &rx) != VKP_OK) {
            vkp_test_fail("no channel");
        }
    }
    ~Channel()
    {
        vkp_mpsc_tx_unref(tx);
        vkp_mpsc_rx_unref(rx);
    }
    Channel(const Channel &) = delete;
    Channel &operator=(const Channel &) = delete;
};

} // namespace

TEST_CASE("select: no cases, too many, or null arguments are INVALID", "[select]")
{
    Channel channel(4, nullptr);
    uint64_t out = 0;
    const uint64_t value = 5;
    REQUIRE(vkp_mpsc_try_send(channel.tx, &value) == VKP_OK);
    std::vector<vkp_case> cases(VKP_SELECT_MAX + 1, vkp_case_never());
    cases[0] = vkp_case_mpsc_recv(channel.rx, &out);
    size_t won = 99;
    uint32_t turn = 0;
    CHECK(vkp_select(cases.data(), 0, 0, &won) == VKP_ERR_INVALID);
    CHECK(vkp_select(cases.data(), VKP_SELECT_MAX + 1, 0, &won) == VKP_ERR_INVALID);
    CHECK(vkp_select(cases.data(), SIZE_MAX, 0, &won) == VKP_ERR_INVALID);
    CHECK(vkp_select(nullptr, 1, 0, &won) == VKP_ERR_INVALID);
    CHECK(vkp_select(cases.data(), 1, 0, nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_select_fair(cases.data(), 0, &turn, 0, &won) == VKP_ERR_INVALID);
    CHECK(vkp_select_fair(cases.data(), VKP_SELECT_MAX + 1, &turn, 0, &won) == VKP_ERR_INVALID);
    CHECK(vkp_select_fair(nullptr, 1, &turn, 0, &won) == VKP_ERR_INVALID);
    CHECK(vkp_select_fair(cases.data(), 1, nullptr, 0, &won) == VKP_ERR_INVALID);
    CHECK(vkp_select_fair(cases.data(), 1, &turn, 0, nullptr) == VKP_ERR_INVALID);
    CHECK(won == 99);
    CHECK(turn == 0);
    CHECK(vkp_mpsc_get_len(channel.rx) == 1);
    REQUIRE(vkp_select(cases.data(), VKP_SELECT_MAX, 0, &won) == VKP_OK);
    CHECK(won == 0);
    CHECK(out == 5);
}

TEST_CASE("select: cases of nothing never win", "[select]")
{
    uint64_t out = 0;
    vkp_mpsc_permit permit;
    std::vector<vkp_case> cases = {
        vkp_case_never(),
        vkp_case_mpsc_recv(nullptr, &out),
        vkp_case_oneshot_recv(nullptr, &out),
        vkp_case_broadcast_recv(nullptr, &out),
        vkp_case_watch_changed(nullptr),
        vkp_case_mpsc_send(nullptr, &out),
        vkp_case_mpsc_reserve(nullptr, &permit),
        vkp_case_mpsc_closed(nullptr),
        vkp_case_oneshot_closed(nullptr),
        vkp_case_broadcast_closed(nullptr),
        vkp_case_watch_closed(nullptr),
        vkp_case_cancel(nullptr),
        vkp_case_fd(-1, VKP_IO_READ),
    };
    size_t won = 99;
    CHECK(vkp_select(cases.data(), cases.size(), 0, &won) == VKP_ERR_TIMEOUT);
    CHECK(vkp_select(cases.data(), cases.size(), vkp_now_ns() + 1000, &won) == VKP_ERR_TIMEOUT);
    CHECK(won == 99);
    Guard guard(nullptr);
    vkp_cancel_trigger(guard.token());
    cases.push_back(guard.make());
    CHECK(vkp_select(cases.data(), cases.size(), VKP_FOREVER, &won) == VKP_OK);
    CHECK(won == cases.size() - 1);
}

TEST_CASE("select: each kind: TIMEOUT while it is not ready, carried out when it is", "[select]")
{
    for (const vkp_test_build &build : vkp_test_builds) {
        const vkp_test_watchdog watchdog;
        const vkp_env env = vkp_test_env_of(build);
        for (const Maker &maker : kinds()) {
            for (uint64_t deadline : {uint64_t{0}, VKP_FOREVER}) {
                std::unique_ptr<End> end = maker(&env);
                INFO(build.name << ", " << end->name());
                vkp_case one = end->make();
                size_t won = 99;
                REQUIRE(vkp_select(&one, 1, 0, &won) == VKP_ERR_TIMEOUT);
                REQUIRE(vkp_select(&one, 1, vkp_now_ns() + 1000, &won) == VKP_ERR_TIMEOUT);
                REQUIRE(won == 99);
                end->make_ready();
                REQUIRE(vkp_select(&one, 1, deadline, &won) == VKP_OK); // the same case again
                REQUIRE(won == 0);
                REQUIRE(end->was_carried_out(one));
            }
        }
    }
}

TEST_CASE("select: each kind ends a sleep", "[select][threads]")
{
    for (const vkp_test_build &build : vkp_test_builds) {
        const vkp_test_watchdog watchdog;
        const vkp_env env = vkp_test_env_of(build);
        Guard guard(&env);
        for (const Maker &maker : kinds()) {
            for (bool fair : {false, true}) {
                std::unique_ptr<End> end = maker(&env);
                INFO(build.name << ", " << end->name() << ", fair " << fair);
                vkp_case cases[] = {end->make(), guard.make()};
                size_t won = 99;
                uint32_t turn = 1;
                vkp_test_waiting waiting([&] {
                    return fair ? vkp_select_fair(cases, 2, &turn, vkp_test_deadline(), &won)
                                : vkp_select(cases, 2, vkp_test_deadline(), &won);
                });
                end->make_ready();
                const vkp_status status = waiting.join();
                REQUIRE(status == VKP_OK);
                REQUIRE(won == 0);
                REQUIRE(end->was_carried_out(cases[0]));
            }
        }
    }
}

TEST_CASE("select: of two that are ready the first wins, and the other is left whole", "[select]")
{
    for (bool fenced : {false, true}) {
        vkp_env env = VKP_ZERO;
        env.sys = vkp_test_build_sys(fenced);
        for (const Maker &first : kinds()) {
            for (const Maker &second : kinds()) {
                std::unique_ptr<End> winner = first(&env);
                std::unique_ptr<End> loser = second(&env);
                INFO(winner->name() << " before " << loser->name());
                loser->make_ready();
                winner->make_ready();
                vkp_case cases[] = {vkp_case_never(), winner->make(), loser->make()};
                size_t won = 99;
                REQUIRE(vkp_select(cases, 3, VKP_FOREVER, &won) == VKP_OK);
                REQUIRE(won == 1);
                REQUIRE(winner->was_carried_out(cases[1]));
                REQUIRE(loser->is_whole());
            }
        }
    }
}

TEST_CASE("select: the one that becomes ready in the sleep wins, and the other is left whole",
          "[select][threads]")
{
    for (const vkp_test_build &build : vkp_test_builds) {
        const vkp_test_watchdog watchdog;
        const vkp_env env = vkp_test_env_of(build);
        Guard guard(&env);
        for (const Maker &first : kinds()) {
            for (const Maker &second : kinds()) {
                std::unique_ptr<End> loser = first(&env);
                std::unique_ptr<End> winner = second(&env);
                INFO(build.name << ", " << winner->name() << " behind " << loser->name());
                vkp_case cases[] = {loser->make(), winner->make(), guard.make()};
                size_t won = 99;
                vkp_test_waiting waiting(
                    [&] { return vkp_select(cases, 3, vkp_test_deadline(), &won); });
                winner->make_ready();
                const vkp_status status = waiting.join();
                loser->make_ready();
                REQUIRE(status == VKP_OK);
                REQUIRE(won == 1);
                REQUIRE(winner->was_carried_out(cases[1]));
                REQUIRE(loser->is_whole());
            }
        }
    }
}

TEST_CASE("select: what becomes ready between the look and the sleep is not missed",
          "[select][threads]")
{
    // Whoever is about to sleep asks for a barrier in all threads (where there is one) after it
    // said that it waits: that call makes the other case ready here, before or after that one
    // has said so for itself.
    static thread_local std::function<void()> *in_barrier = nullptr;
    vkp_sys sys = *vkp_sys_get_default();
    sys.membarrier = [](bool prepare) {
        if (!prepare && in_barrier != nullptr) {
            std::function<void()> *call = in_barrier;
            in_barrier = nullptr;
            (*call)();
        }
        return 0;
    };
    vkp_env calling = VKP_ZERO;
    calling.sys = &sys;
    const Maker callers[] = {
        [](const vkp_env *env) { return std::make_unique<Watch>(env, Watch::changed); },
        [](const vkp_env *env) { return std::make_unique<Broadcast>(env, Broadcast::value); },
        [](const vkp_env *env) { return std::make_unique<MpscRecv>(env, false); },
    };
    for (const vkp_test_build &build : vkp_test_builds) {
        const vkp_test_watchdog watchdog;
        const vkp_env env = vkp_test_env_of(build);
        for (const Maker &caller : callers) {
            for (const Maker &maker : kinds()) {
                for (bool before : {false, true}) {
                    std::unique_ptr<End> silent = caller(&calling);
                    std::unique_ptr<End> end = maker(&env);
                    INFO(build.name << ", " << end->name() << ", barrier of " << silent->name()
                                    << ", before " << before);
                    vkp_case cases[2];
                    cases[before ? 0 : 1] = silent->make();
                    cases[before ? 1 : 0] = end->make();
                    size_t won = 99;
                    std::function<void()> call = [&] { end->make_ready(); };
                    in_barrier = &call;
                    const vkp_status status = vkp_select(cases, 2, VKP_FOREVER, &won);
                    in_barrier = nullptr;
                    REQUIRE(status == VKP_OK);
                    REQUIRE(won == (before ? 1 : 0));
                    REQUIRE(end->was_carried_out(cases[won]));
                    silent->make_ready();
                    REQUIRE(silent->is_whole());
                }
            }
        }
    }
}

TEST_CASE("select: after TIMEOUT nothing was sent, taken or kept", "[select]")
{
    for (const vkp_test_build &build : vkp_test_builds) {
        const vkp_test_watchdog watchdog;
        const vkp_env env = vkp_test_env_of(build);
        std::vector<std::unique_ptr<End>> ends;
        std::vector<vkp_case> cases;
        for (const Maker &maker : kinds()) {
            ends.push_back(maker(&env));
            cases.push_back(ends.back()->make());
        }
        size_t won = 99;
        uint32_t turn = 3;
        for (size_t count = 1; count <= cases.size(); count++) {
            REQUIRE(vkp_select(cases.data(), count, 0, &won) == VKP_ERR_TIMEOUT);
            REQUIRE(vkp_select(cases.data(), count, vkp_now_ns() + 1000, &won) == VKP_ERR_TIMEOUT);
            REQUIRE(vkp_select_fair(cases.data(), count, &turn, vkp_now_ns() + 1000, &won) ==
                    VKP_ERR_TIMEOUT);
        }
        CHECK(won == 99);
        CHECK(turn == 3);
        for (const std::unique_ptr<End> &end : ends) {
            INFO(build.name << ", " << end->name());
            end->make_ready();
            CHECK(end->is_whole());
        }
    }
}

TEST_CASE("select: all kinds in one: each wins when it is its turn, in any order",
          "[select][threads]")
{
    for (const vkp_test_build &build : vkp_test_builds) {
        const vkp_test_watchdog watchdog;
        const vkp_env env = vkp_test_env_of(build);
        for (unsigned seed = 0; seed < 12; seed++) {
            INFO(build.name << ", seed " << seed);
            std::mt19937 random(seed);
            Guard guard(&env);
            std::vector<std::unique_ptr<End>> ends;
            std::vector<vkp_case> cases;
            std::vector<size_t> order;
            // Half of the rounds without descriptors, so that the threads park and do not poll.
            for (const Maker &maker : kinds()) {
                std::unique_ptr<End> end = maker(&env);
                if (seed % 2 == 0 || end->is_for_loops()) {
                    order.push_back(cases.size());
                    cases.push_back(end->make());
                    ends.push_back(std::move(end));
                }
            }
            cases.push_back(guard.make());
            std::shuffle(order.begin(), order.end(), random);
            uint32_t turn = 0;
            for (size_t next : order) {
                size_t won = 99;
                vkp_test_waiting waiting([&] {
                    return vkp_select_fair(cases.data(), cases.size(), &turn, vkp_test_deadline(),
                                           &won);
                });
                ends[next]->make_ready();
                const vkp_status status = waiting.join();
                INFO(ends[next]->name());
                REQUIRE(status == VKP_OK);
                REQUIRE(won == next);
                REQUIRE(ends[next]->was_carried_out(cases[next]));
                cases[next] = vkp_case_never();
            }
        }
    }
}

TEST_CASE("select: deadlines as cases: the earliest wins, and the select's own is TIMEOUT",
          "[select]")
{
    vkp_env env = VKP_ZERO;
    env.sys = vkp_test_virtual_sys();
    env.spins = VKP_SPINS_NONE;
    Guard guard(&env);
    const uint64_t hour = uint64_t{3600} * 1000000000u;
    const uint64_t now = vkp_test_virtual_ns.load();
    vkp_case cases[] = {guard.make(), vkp_case_deadline(VKP_FOREVER),
                        vkp_case_deadline(now + 2 * hour), vkp_case_deadline(now + hour)};
    size_t won = 99;
    CHECK(vkp_select(cases, 4, 0, &won) == VKP_ERR_TIMEOUT);
    CHECK(vkp_select(cases, 4, now + hour / 2, &won) == VKP_ERR_TIMEOUT);
    CHECK(vkp_test_virtual_ns.load() == now + hour / 2);
    REQUIRE(vkp_select(cases, 4, VKP_FOREVER, &won) == VKP_OK);
    CHECK(won == 3);
    CHECK(cases[3].status == VKP_OK);
    CHECK(vkp_test_virtual_ns.load() == now + hour);
    // Passed: ready at once, and behind nothing that stands before it.
    REQUIRE(vkp_select(cases, 4, 0, &won) == VKP_OK);
    CHECK(won == 3);
    vkp_cancel_trigger(guard.token());
    REQUIRE(vkp_select(cases, 4, 0, &won) == VKP_OK);
    CHECK(won == 0);
    // The same moment for both: a case is a case, and TIMEOUT is when there is none.
    Guard other(&env);
    vkp_case both[] = {other.make(), vkp_case_deadline(now + 3 * hour)};
    REQUIRE(vkp_select(both, 2, now + 3 * hour, &won) == VKP_OK);
    CHECK(won == 1);
    vkp_case passed = vkp_case_deadline(0);
    REQUIRE(vkp_select(&passed, 1, 0, &won) == VKP_OK);
}

TEST_CASE("select: a deadline among descriptors, on the real clock", "[select]")
{
    Descriptor descriptor(Descriptor::read_end);
    const uint64_t deadline = vkp_after_ms(2);
    vkp_case cases[] = {descriptor.make(), vkp_case_deadline(deadline)};
    size_t won = 99;
    REQUIRE(vkp_select(cases, 2, vkp_test_deadline(), &won) == VKP_OK);
    CHECK(won == 1);
    CHECK(vkp_now_ns() >= deadline);
    const uint64_t late = vkp_after_ms(2);
    CHECK(vkp_select(cases, 1, late, &won) == VKP_ERR_TIMEOUT);
    CHECK(vkp_now_ns() >= late);
}

TEST_CASE("select: fair: what is always ready has its turn among as many as there are cases",
          "[select]")
{
    for (size_t count : {1, 2, 3, 7, 64}) {
        INFO(count << " cases");
        std::vector<std::unique_ptr<Guard>> tokens;
        std::vector<vkp_case> cases;
        for (size_t i = 0; i < count; i++) {
            tokens.push_back(std::make_unique<Guard>(nullptr));
            vkp_cancel_trigger(tokens.back()->token());
            cases.push_back(tokens.back()->make());
        }
        uint32_t turn = 0;
        for (size_t round = 0; round < 4 * count; round++) {
            size_t won = 99;
            REQUIRE(vkp_select_fair(cases.data(), count, &turn, VKP_FOREVER, &won) == VKP_OK);
            REQUIRE(won == round % count);
        }
        // Biased: the same one for ever.
        for (size_t round = 0; round < 2 * count; round++) {
            size_t won = 99;
            REQUIRE(vkp_select(cases.data(), count, VKP_FOREVER, &won) == VKP_OK);
            REQUIRE(won == 0);
        }
        // Whatever number it begins with.
        turn = UINT32_MAX;
        size_t won = 99;
        REQUIRE(vkp_select_fair(cases.data(), count, &turn, VKP_FOREVER, &won) == VKP_OK);
        REQUIRE(won < count);
    }
}

TEST_CASE("select: fair: a case that stays ready waits for at most count - 1 others", "[select]")
{
    for (unsigned seed = 0; seed < 40; seed++) {
        INFO("seed " << seed);
        std::mt19937 random(seed);
        const size_t count = 2 + random() % 8;
        std::vector<std::unique_ptr<Channel>> channels;
        std::vector<size_t> waited(count, 0);
        std::vector<uint64_t> out(count, 0);
        uint32_t turn = 0;
        for (size_t i = 0; i < count; i++) {
            channels.push_back(std::make_unique<Channel>(64, nullptr));
        }
        for (int round = 0; round < 600; round++) {
            for (size_t i = 0; i < count; i++) {
                const uint64_t value = i;
                if (random() % 3 == 0 && vkp_mpsc_get_room(channels[i]->tx) > 0) {
                    must(vkp_mpsc_try_send(channels[i]->tx, &value));
                }
            }
            std::vector<vkp_case> cases;
            std::vector<bool> ready;
            for (size_t i = 0; i < count; i++) {
                cases.push_back(vkp_case_mpsc_recv(channels[i]->rx, &out[i]));
                ready.push_back(vkp_mpsc_get_len(channels[i]->rx) > 0);
            }
            size_t won = 99;
            const vkp_status status = vkp_select_fair(cases.data(), count, &turn, 0, &won);
            const bool any = std::find(ready.begin(), ready.end(), true) != ready.end();
            REQUIRE(status == (any ? VKP_OK : VKP_ERR_TIMEOUT));
            for (size_t i = 0; i < count && any; i++) {
                if (i == won) {
                    REQUIRE(ready[i]);
                    REQUIRE(out[i] == i);
                    waited[i] = 0;
                } else if (ready[i]) {
                    waited[i]++;
                    REQUIRE(waited[i] <= count - 1);
                }
            }
        }
    }
}

TEST_CASE("select: one end in several cases", "[select][threads]")
{
    for (const vkp_test_build &build : vkp_test_builds) {
        const vkp_test_watchdog watchdog;
        INFO(build.name);
        const vkp_env env = vkp_test_env_of(build);
        Channel channel(1, &env);
        Guard guard(&env);
        const uint64_t values[] = {1, 2, 3};
        REQUIRE(vkp_mpsc_try_send(channel.tx, &values[0]) == VKP_OK);
        vkp_case cases[] = {vkp_case_mpsc_send(channel.tx, &values[1]),
                            vkp_case_mpsc_send(channel.tx, &values[2]), guard.make(), guard.make()};
        size_t won = 99;
        uint64_t out = 0;
        vkp_test_waiting waiting([&] { return vkp_select(cases, 4, vkp_test_deadline(), &won); });
        const vkp_status received = vkp_mpsc_try_recv(channel.rx, &out);
        const vkp_status status = waiting.join();
        REQUIRE(received == VKP_OK);
        REQUIRE(status == VKP_OK);
        REQUIRE(won < 2);
        REQUIRE(vkp_mpsc_get_len(channel.rx) == 1); // one of them, not both
        REQUIRE(vkp_mpsc_try_recv(channel.rx, &out) == VKP_OK);
        CHECK(out == values[won + 1]);
        vkp_test_waiting second([&] { return vkp_select(cases + 2, 2, VKP_FOREVER, &won); });
        vkp_cancel_trigger(guard.token());
        const vkp_status cancelled = second.join();
        CHECK(cancelled == VKP_OK);
        CHECK(won == 0);
    }
}

TEST_CASE("select: a sender that leaves the queue leaves the room to the next", "[select][threads]")
{
    for (const vkp_test_build &build : vkp_test_builds) {
        const vkp_test_watchdog watchdog;
        for (bool reserves : {false, true}) {
            INFO(build.name << ", reserves " << reserves);
            const vkp_env env = vkp_test_env_of(build);
            Channel channel(1, &env);
            Guard guard(&env);
            const uint64_t values[] = {1, 2, 3};
            vkp_mpsc_permit permit = {};
            REQUIRE(vkp_mpsc_try_send(channel.tx, &values[0]) == VKP_OK);
            vkp_case cases[] = {reserves ? vkp_case_mpsc_reserve(channel.tx, &permit)
                                         : vkp_case_mpsc_send(channel.tx, &values[1]),
                                guard.make()};
            size_t won = 99;
            uint64_t out = 0;
            // The select stands before the plain sender.
            vkp_test_waiting leaving([&] { return vkp_select(cases, 2, VKP_FOREVER, &won); });
            vkp_test_waiting staying(
                [&] { return vkp_mpsc_send(channel.tx, &values[2], vkp_test_deadline()); });
            vkp_cancel_trigger(guard.token());
            const vkp_status left = leaving.join();
            const vkp_status received = vkp_mpsc_recv(channel.rx, VKP_FOREVER, &out);
            const vkp_status stayed = staying.join();
            REQUIRE(left == VKP_OK);
            REQUIRE(won == 1);
            REQUIRE(received == VKP_OK);
            REQUIRE(out == 1);
            REQUIRE(stayed == VKP_OK);
            REQUIRE(vkp_mpsc_try_recv(channel.rx, &out) == VKP_OK);
            CHECK(out == 3);
            CHECK(vkp_mpsc_try_recv(channel.rx, &out) == VKP_ERR_EMPTY);
        }
    }
}

TEST_CASE("select: a sender that was woken for room and does not want it passes it on",
          "[select][threads]")
{
    // The select sleeps on until both its cases are ready, and takes the other one.
    static thread_local std::atomic<bool> *held = nullptr;
    for (const vkp_test_build &build : vkp_test_builds) {
        for (bool reserves : {false, true}) {
            const vkp_test_watchdog watchdog;
            INFO(build.name << ", reserves " << reserves);
            vkp_sys sys = *vkp_test_build_sys(build.fenced);
            sys.park = [](vkp_parker *parker, uint64_t deadline_ns) {
                vkp_test_probed_sys()->park(parker, deadline_ns);
                while (held != nullptr && held->load()) {
                    sched_yield();
                }
            };
            vkp_env env = vkp_test_env_of(build);
            env.sys = &sys;
            Channel channel(1, &env);
            Guard guard(&env);
            const uint64_t values[] = {1, 2, 3};
            vkp_mpsc_permit permit = {};
            REQUIRE(vkp_mpsc_try_send(channel.tx, &values[0]) == VKP_OK);
            vkp_case cases[] = {guard.make(), reserves
                                                  ? vkp_case_mpsc_reserve(channel.tx, &permit)
                                                  : vkp_case_mpsc_send(channel.tx, &values[1])};
            std::atomic<bool> hold{true};
            size_t won = 99;
            uint64_t out[3] = {};
            vkp_test_waiting leaving([&] {
                held = &hold;
                return vkp_select(cases, 2, VKP_FOREVER, &won);
            });
            vkp_test_waiting staying(
                [&] { return vkp_mpsc_send(channel.tx, &values[2], VKP_FOREVER); });
            const vkp_status first = vkp_mpsc_recv(channel.rx, VKP_FOREVER, &out[0]);
            vkp_cancel_trigger(guard.token());
            hold.store(false);
            const vkp_status left = leaving.join();
            const vkp_status stayed = staying.join();
            REQUIRE(first == VKP_OK);
            REQUIRE(left == VKP_OK);
            REQUIRE(won == 0);
            REQUIRE(stayed == VKP_OK);
            REQUIRE(vkp_mpsc_try_recv(channel.rx, &out[1]) == VKP_OK);
            CHECK(out[1] == 3);
            CHECK(vkp_mpsc_try_recv(channel.rx, &out[2]) == VKP_ERR_EMPTY);
        }
    }
}

TEST_CASE("select: waiting needs no memory", "[select][faults]")
{
    for (const vkp_test_build &build : vkp_test_builds) {
        const vkp_test_watchdog watchdog;
        INFO(build.name);
        vkp_test_memory memory(build);
        {
            std::vector<std::unique_ptr<End>> ends;
            std::vector<vkp_case> cases;
            for (const Maker &maker : kinds()) {
                ends.push_back(maker(memory.env()));
                cases.push_back(ends.back()->make());
            }
            memory.fail(VKP_TEST_FAULT_FROM, 1);
            const uint64_t before = memory.failures();
            size_t won = 99;
            CHECK(vkp_select(cases.data(), cases.size(), vkp_now_ns() + 1000, &won) ==
                  VKP_ERR_TIMEOUT);
            CHECK(memory.failures() == before);
            memory.heal();
        }
        CHECK(memory.blocks() == 0);
    }
}

TEST_CASE("select: a send that finds no memory says so, and the value stays", "[select][faults]")
{
    for (bool reserves : {false, true}) {
        vkp_test_memory memory;
        {
            Channel channel(0, memory.env());
            uint64_t sent = 0;
            size_t refused = 0;
            memory.fail(VKP_TEST_FAULT_EVERY, 2);
            for (int i = 0; i < 3000; i++) {
                vkp_mpsc_permit permit = {};
                vkp_case one = reserves ? vkp_case_mpsc_reserve(channel.tx, &permit)
                                        : vkp_case_mpsc_send(channel.tx, &sent);
                size_t won = 99;
                REQUIRE(vkp_select(&one, 1, VKP_FOREVER, &won) == VKP_OK);
                if (one.status == VKP_OK) {
                    if (reserves) {
                        *static_cast<uint64_t *>(permit.item) = sent;
                        vkp_mpsc_commit(&permit);
                    }
                    sent++;
                } else {
                    REQUIRE(one.status == VKP_ERR_NOMEM);
                    refused++;
                }
            }
            memory.heal();
            CHECK(refused > 0);
            uint64_t out = 0;
            for (uint64_t value = 0; value < sent; value++) {
                REQUIRE(vkp_mpsc_try_recv(channel.rx, &out) == VKP_OK);
                REQUIRE(out == value);
            }
            CHECK(vkp_mpsc_try_recv(channel.rx, &out) == VKP_ERR_EMPTY);
        }
        CHECK(memory.blocks() == 0);
    }
}

TEST_CASE("select: no pipe for a sleep among descriptors is SYS, and nothing was taken",
          "[select][faults]")
{
    static bool refuse;
    refuse = true;
    vkp_sys sys = *vkp_test_build_sys(false);
    sys.wake_pair = [](int fds[2]) {
        return refuse ? -EMFILE : vkp_sys_get_default()->wake_pair(fds);
    };
    vkp_env env = VKP_ZERO;
    env.sys = &sys;
    std::vector<std::unique_ptr<End>> ends;
    std::vector<vkp_case> cases;
    for (const Maker &maker : kinds()) {
        ends.push_back(maker(&env));
        cases.push_back(ends.back()->make());
    }
    size_t won = 99;
    const int descriptors = vkp_test_fd_count();
    CHECK(vkp_select(cases.data(), cases.size(), 0, &won) == VKP_ERR_TIMEOUT); // only looks
    errno = 0;
    CHECK(vkp_select(cases.data(), cases.size(), VKP_FOREVER, &won) == VKP_ERR_SYS);
    CHECK(errno == EMFILE);
    CHECK(won == 99);
    refuse = false;
    CHECK(vkp_select(cases.data(), cases.size(), vkp_now_ns() + 1000, &won) == VKP_ERR_TIMEOUT);
    CHECK(vkp_test_fd_count() == descriptors);
    for (const std::unique_ptr<End> &end : ends) {
        INFO(end->name());
        end->make_ready();
        CHECK(end->is_whole());
    }
}

TEST_CASE("select: a sleep among descriptors outlives signals", "[select]")
{
    static std::atomic<int> interrupted;
    interrupted.store(0);
    vkp_sys sys = *vkp_sys_get_default();
    sys.poll = [](void *pollfds, size_t count, uint64_t deadline_ns) {
        if (deadline_ns != 0 && interrupted.fetch_add(1) < 3) {
            return -EINTR;
        }
        return vkp_sys_get_default()->poll(pollfds, count, deadline_ns);
    };
    vkp_env env = VKP_ZERO;
    env.sys = &sys;
    Guard guard(&env);
    Descriptor descriptor(Descriptor::read_end);
    vkp_case cases[] = {descriptor.make(), guard.make()};
    size_t won = 99;
    CHECK(vkp_select(cases, 2, vkp_after_ms(2), &won) == VKP_ERR_TIMEOUT);
    CHECK(interrupted.load() > 3);
}

TEST_CASE("select: a poll that ends before the deadline is not the deadline", "[select]")
{
    // As poll does where a time-out is longer than its number of milliseconds can say.
    static std::atomic<int> early;
    early = 0;
    vkp_sys sys = *vkp_sys_get_default();
    sys.poll = [](void *pollfds, size_t count, uint64_t deadline_ns) {
        if (deadline_ns != 0 && early.fetch_add(1) < 3) {
            return 0;
        }
        return vkp_sys_get_default()->poll(pollfds, count, deadline_ns);
    };
    vkp_env env = VKP_ZERO;
    env.sys = &sys;
    int fds[2];
    REQUIRE(pipe(fds) == 0);
    vkp_cancel *token = nullptr;
    REQUIRE(vkp_cancel_open(&env, nullptr, &token) == VKP_OK);
    vkp_case cases[] = {vkp_case_fd(fds[0], VKP_IO_READ), vkp_case_cancel(token)};
    size_t won = 9;
    std::atomic<bool> over{false};
    std::thread other([&] {
        while (early.load() < 4 && !over.load()) {
            std::this_thread::yield();
        }
        vkp_cancel_trigger(token);
    });
    CHECK(vkp_select(cases, 2, vkp_test_deadline(), &won) == VKP_OK);
    over = true;
    other.join();
    CHECK(won == 1);
    vkp_cancel_unref(token);
    close(fds[0]);
    close(fds[1]);
}

TEST_CASE("select: a case that is ready only while it joins does not outlast the deadline",
          "[select]")
{
    // Its join finds it ready, its attempt does not, again and again: a receiver goes before each
    // sleep, and another one comes before each attempt. The clock moves with each question.
    static vkp_broadcast_tx *tx;
    static vkp_broadcast_rx *rx;
    static std::atomic<uint64_t> now;
    const vkp_test_watchdog watchdog;
    now = 1;
    vkp_sys sys = *vkp_sys_get_default();
    sys.clock_ns = [] { return now.fetch_add(1); };
    sys.wake_pair = [](int fds[2]) {
        vkp_broadcast_rx_unref(std::exchange(rx, nullptr));
        return vkp_sys_get_default()->wake_pair(fds);
    };
    sys.poll = [](void *pollfds, size_t count, uint64_t deadline_ns) {
        if (deadline_ns != 0) {
            vkp_test_fail("asleep although a case was ready");
        }
        if (rx == nullptr && vkp_broadcast_subscribe(tx, &rx) != VKP_OK) {
            vkp_test_fail("no receiver");
        }
        return vkp_sys_get_default()->poll(pollfds, count, 0);
    };
    vkp_env env = VKP_ZERO;
    env.sys = &sys;
    vkp_broadcast_config config = VKP_ZERO;
    config.elem_bytes = 8;
    config.capacity_items = 2;
    config.env = &env;
    REQUIRE(vkp_broadcast_open(&config, &tx) == VKP_OK);
    REQUIRE(vkp_broadcast_subscribe(tx, &rx) == VKP_OK);
    int fds[2];
    REQUIRE(pipe(fds) == 0);
    vkp_case cases[] = {vkp_case_fd(fds[0], VKP_IO_READ), vkp_case_broadcast_closed(tx)};
    size_t won = 9;
    CHECK(vkp_select(cases, 2, 100, &won) == VKP_ERR_TIMEOUT);
    CHECK(now.load() > 100);
    CHECK(won == 9);
    close(fds[0]);
    close(fds[1]);
    vkp_broadcast_rx_unref(rx);
    vkp_broadcast_tx_unref(tx);
}

TEST_CASE("select: work until cancelled", "[select][threads]")
{
    // Tokio's run_until_cancelled: the work in one case, the token in the other.
    for (const vkp_test_build &build : vkp_test_builds) {
        const vkp_test_watchdog watchdog;
        INFO(build.name);
        const vkp_env env = vkp_test_env_of(build);
        Channel work(4, &env);
        Guard parent(&env);
        vkp_cancel *child = nullptr;
        REQUIRE(vkp_cancel_open(nullptr, parent.token(), &child) == VKP_OK);
        uint64_t done = 0;
        vkp_status status = VKP_OK;
        std::thread worker([&] {
            uint64_t job = 0;
            size_t won = 0;
            while (status == VKP_OK) {
                vkp_case cases[] = {vkp_case_mpsc_recv(work.rx, &job), vkp_case_cancel(child)};
                status = vkp_select(cases, 2, vkp_test_deadline(), &won);
                if (won == 1) {
                    break;
                }
                done += job;
            }
        });
        size_t refused = 0;
        for (uint64_t job = 1; job <= 100; job++) {
            refused += vkp_mpsc_send(work.tx, &job, vkp_test_deadline()) != VKP_OK;
        }
        vkp_cancel_trigger(parent.token());
        worker.join();
        vkp_cancel_unref(child);
        // Biased to the work: all that was queued before was done.
        CHECK(refused == 0);
        CHECK(status == VKP_OK);
        CHECK(done == 5050);
    }
}

TEST_CASE("case watch: each kind is told to a loop, and left whole", "[select][loop]")
{
    for (const vkp_backend *const *backend = vkp_test_backends_all(); *backend; backend++) {
        for (bool fenced : {false, true}) {
            vkp_test_memory memory({"", fenced, 0});
            for (const Maker &maker : kinds()) {
                std::unique_ptr<End> end = maker(memory.env());
                if (!end->is_for_loops()) {
                    continue;
                }
                INFO((*backend)->name << ", fenced " << fenced << ", " << end->name());
                vkp_test_watched watched(*backend, memory.env());
                size_t calls = 0;
                REQUIRE(watched.watch(end->make(), [&] { calls++; }) == VKP_OK);
                watched.settle();
                REQUIRE(calls == 0);
                // From another thread, which has to wake the loop.
                std::thread thread([&] { end->make_ready(); });
                watched.until("a call again and again", [&] { return calls >= 3; });
                thread.join();
                watched.end();
                calls = 0;
                watched.settle();
                REQUIRE(calls == 0);
                REQUIRE(end->is_whole());
            }
            CHECK(memory.blocks() == 0);
        }
    }
}

TEST_CASE("case watch: what is ready already is told, and a watch may end itself", "[select][loop]")
{
    for (const vkp_backend *const *backend = vkp_test_backends_all(); *backend; backend++) {
        for (const Maker &maker : kinds()) {
            std::unique_ptr<End> end = maker(nullptr);
            if (!end->is_for_loops()) {
                continue;
            }
            INFO((*backend)->name << ", " << end->name());
            end->make_ready();
            vkp_test_watched watched(*backend);
            size_t calls = 0;
            REQUIRE(watched.watch(end->make(), [&] {
                calls++;
                watched.end();
            }) == VKP_OK);
            watched.settle();
            REQUIRE(calls == 1);
            REQUIRE(end->is_whole());
        }
    }
}

TEST_CASE("case watch: refused calls, and a loop that closes first", "[select][loop]")
{
    Guard guard(nullptr);
    vkp_handler *watch = nullptr;
    const auto nothing = [](void *) {};
    for (const vkp_backend *const *backend = vkp_test_backends_all(); *backend; backend++) {
        INFO((*backend)->name);
        vkp_test_memory memory;
        {
            vkp_test_watched watched(*backend, memory.env());
            vkp_loop *loop = watched.loop();
            const vkp_case token = guard.make();
            Descriptor end(Descriptor::read_end);
            const vkp_case descriptor = end.make();
            const vkp_case deadline = vkp_case_deadline(0);
            CHECK(vkp_handler_open(nullptr, &token, nothing, nullptr, &watch) == VKP_ERR_INVALID);
            CHECK(vkp_handler_open(loop, nullptr, nothing, nullptr, &watch) == VKP_ERR_INVALID);
            CHECK(vkp_handler_open(loop, &token, nullptr, nullptr, &watch) == VKP_ERR_INVALID);
            CHECK(vkp_handler_open(loop, &token, nothing, nullptr, nullptr) == VKP_ERR_INVALID);
            CHECK(vkp_handler_open(loop, &descriptor, nothing, nullptr, &watch) == VKP_ERR_INVALID);
            CHECK(vkp_handler_open(loop, &deadline, nothing, nullptr, &watch) == VKP_ERR_INVALID);
            CHECK(watch == nullptr);
            vkp_handler_close(nullptr);
            vkp_handler_unref(nullptr);
            const size_t blocks = memory.blocks();
            for (uint64_t k = 1;; k++) {
                memory.fail(VKP_TEST_FAULT_ONCE, k);
                const uint64_t before = memory.failures();
                const vkp_status status = vkp_handler_open(loop, &token, nothing, nullptr, &watch);
                if (memory.failures() == before) {
                    REQUIRE(status == VKP_OK);
                    break;
                }
                CHECK(status == VKP_ERR_NOMEM);
                CHECK(watch == nullptr);
                CHECK(memory.blocks() == blocks);
            }
            memory.heal();
            vkp_loop_close(loop);
            vkp_handler *late = nullptr;
            CHECK(vkp_handler_open(loop, &token, nothing, nullptr, &late) == VKP_ERR_INVALID);
            CHECK(late == nullptr);
            vkp_handler_close(watch);
            vkp_handler_close(watch);
            vkp_handler_unref(watch);
            watch = nullptr;
        }
        CHECK(memory.blocks() == 0);
    }
}

TEST_CASE("select: threads: a cancel meets a send: the value went, or is here still",
          "[select][threads]")
{
    for (const vkp_test_build &build : vkp_test_builds) {
        const vkp_test_watchdog watchdog;
        INFO(build.name);
        const vkp_env env = vkp_test_env_of(build);
        size_t wrong = 0;
        for (unsigned round = 0; round < 300; round++) {
            Channel channel(1, &env);
            Guard guard(&env);
            const uint64_t values[] = {1, 2};
            vkp_mpsc_permit permit = {};
            uint64_t out = 0;
            REQUIRE(vkp_mpsc_try_send(channel.tx, &values[0]) == VKP_OK);
            vkp_case cases[] = {round % 2 ? vkp_case_mpsc_send(channel.tx, &values[1])
                                          : vkp_case_mpsc_reserve(channel.tx, &permit),
                                guard.make()};
            size_t won = 99;
            vkp_status status = VKP_ERR_INVALID;
            std::thread selecting(
                [&] { status = vkp_select(cases, 2, vkp_test_deadline(), &won); });
            std::thread cancelling([&] { vkp_cancel_trigger(guard.token()); });
            wrong += vkp_mpsc_recv(channel.rx, VKP_FOREVER, &out) != VKP_OK;
            selecting.join();
            cancelling.join();
            wrong += status != VKP_OK || out != 1;
            if (won == 0 && round % 2 == 0) {
                *static_cast<uint64_t *>(permit.item) = 2;
                vkp_mpsc_commit(&permit);
            }
            const vkp_status second = vkp_mpsc_try_recv(channel.rx, &out);
            wrong += won == 0 ? second != VKP_OK || out != 2 : second != VKP_ERR_EMPTY;
            // Nothing holds the room of a sender that left.
            wrong += vkp_mpsc_try_send(channel.tx, &values[0]) != VKP_OK;
        }
        CHECK(wrong == 0);
    }
}

TEST_CASE("select: threads: a one-shot that meets another end is received, or there still",
          "[select][threads]")
{
    for (const vkp_test_build &build : vkp_test_builds) {
        const vkp_test_watchdog watchdog;
        INFO(build.name);
        const vkp_env env = vkp_test_env_of(build);
        size_t wrong = 0;
        vkp_test_ledger ledger(300);
        for (uint64_t round = 0; round < 300; round++) {
            Guard guard(&env);
            vkp_oneshot *slot = nullptr;
            if (vkp_oneshot_open(&env, 8, vkp_test_ledger::drop, &ledger, &slot) != VKP_OK) {
                vkp_test_fail("no slot");
            }
            uint64_t out = UINT64_MAX;
            vkp_case cases[] = {guard.make(), vkp_case_oneshot_recv(slot, &out)};
            size_t won = 99;
            ledger.own(round);
            vkp_status sent = VKP_ERR_INVALID;
            std::thread sending([&] {
                sent = vkp_oneshot_send(slot, &round);
                vkp_oneshot_tx_unref(slot);
            });
            std::thread cancelling([&] { vkp_cancel_trigger(guard.token()); });
            wrong += vkp_select(cases, 2, vkp_test_deadline(), &won) != VKP_OK;
            if (won == 0 && round % 3 == 0) {
                vkp_oneshot_close(slot); // dropped, or given back to the sender
            } else if (won == 0) {
                wrong += vkp_oneshot_recv(slot, vkp_test_deadline(), &out) != VKP_OK;
            }
            vkp_oneshot_rx_unref(slot);
            sending.join();
            cancelling.join();
            uint64_t mine = round;
            if (out != UINT64_MAX) {
                wrong += out != round || sent != VKP_OK;
                vkp_test_ledger::drop(&ledger, &mine);
            } else if (sent != VKP_OK) {
                wrong += sent != VKP_ERR_CLOSED;
                vkp_test_ledger::drop(&ledger, &mine);
            }
        }
        CHECK(wrong == 0);
        CHECK(ledger.owned() == 0);
        CHECK(ledger.wrong() == 0);
    }
}

TEST_CASE("select: threads: a random mix of everything loses, doubles and keeps nothing",
          "[select][threads]")
{
    const uint64_t each = 1500;
    for (const vkp_test_build &build : vkp_test_builds) {
        const vkp_test_watchdog watchdog;
        for (bool with_descriptor : {false, true}) {
            INFO(build.name << ", descriptor " << with_descriptor);
            const vkp_env env = vkp_test_env_of(build);
            Channel in(3, &env);
            Channel unbounded(0, &env);
            Channel out(2, &env);
            Channel reserved(1, &env);
            Guard stop(&env);
            vkp_broadcast_config broadcast = VKP_ZERO;
            broadcast.elem_bytes = 8;
            broadcast.capacity_items = 4;
            broadcast.env = &env;
            vkp_broadcast_tx *cast = nullptr;
            vkp_broadcast_rx *cast_rx = nullptr;
            vkp_watch_config watch = VKP_ZERO;
            watch.elem_bytes = 8;
            watch.env = &env;
            vkp_watch_tx *newest = nullptr;
            vkp_watch_rx *newest_rx = nullptr;
            REQUIRE(vkp_broadcast_open(&broadcast, &cast) == VKP_OK);
            REQUIRE(vkp_broadcast_subscribe(cast, &cast_rx) == VKP_OK);
            REQUIRE(vkp_watch_open(&watch, &newest) == VKP_OK);
            REQUIRE(vkp_watch_subscribe(newest, &newest_rx) == VKP_OK);
            int fds[2];
            vkp_test_socket_pair(fds);
            std::vector<std::thread> threads;
            std::atomic<size_t> wrong{0};
            for (vkp_mpsc_tx *tx : {in.tx, unbounded.tx}) {
                threads.emplace_back([&, tx] {
                    for (uint64_t value = 0; value < each; value++) {
                        wrong += vkp_mpsc_send(tx, &value, vkp_test_deadline()) != VKP_OK;
                        if (value % 16 == 0) {
                            sched_yield();
                        }
                    }
                    vkp_mpsc_tx_unref(tx);
                });
            }
            in.tx = nullptr;
            unbounded.tx = nullptr;
            threads.emplace_back([&] {
                for (uint64_t value = 1; value <= each; value++) {
                    wrong += vkp_broadcast_send(cast, &value) != VKP_OK;
                    wrong += vkp_watch_send(newest, &value) != VKP_OK;
                    wrong += with_descriptor && write(fds[1], "x", 1) != 1;
                    if (value % 8 == 0) {
                        sched_yield();
                    }
                }
                vkp_broadcast_tx_unref(cast);
                vkp_watch_tx_unref(newest);
                (void)close(fds[1]);
            });
            for (vkp_mpsc_rx *rx : {out.rx, reserved.rx}) {
                threads.emplace_back([&, rx] {
                    uint64_t value = 0;
                    uint64_t want = 0;
                    while (vkp_mpsc_recv(rx, vkp_test_deadline(), &value) == VKP_OK) {
                        wrong += value != want++;
                    }
                    wrong += want != each;
                });
            }
            enum { recv_in, recv_unbounded, recv_cast, changed, send, reserve, fd, cancel, kinds };
            std::mt19937 random(7);
            bool open[kinds] = {true, true, true, true, true, true, with_descriptor, true};
            uint64_t got[kinds] = {};
            uint64_t missed = 0;
            uint64_t value = 0;
            uint64_t seen = 0;
            uint32_t turn = 0;
            vkp_mpsc_permit permit = {};
            const auto busy = [&] { return std::find(open, open + cancel, true) != open + cancel; };
            const uint64_t end = vkp_test_deadline();
            while (busy() && vkp_now_ns() < end) {
                // Some cases are left out by chance: then the wait is short, as none may come.
                const unsigned long left_out = random() % 4 == 0 ? random() : 0;
                const auto use = [&](int kind, vkp_case one) {
                    return open[kind] && (left_out >> kind & 1) == 0 ? one : vkp_case_never();
                };
                vkp_case cases[] = {
                    use(recv_in, vkp_case_mpsc_recv(in.rx, &value)),
                    use(recv_unbounded, vkp_case_mpsc_recv(unbounded.rx, &value)),
                    use(recv_cast, vkp_case_broadcast_recv(cast_rx, &value)),
                    use(changed, vkp_case_watch_changed(newest_rx)),
                    use(send, vkp_case_mpsc_send(out.tx, &got[send])),
                    use(reserve, vkp_case_mpsc_reserve(reserved.tx, &permit)),
                    use(fd, vkp_case_fd(fds[0], VKP_IO_READ)),
                    stop.make(),
                    vkp_case_deadline(random() % 8 == 0 ? vkp_now_ns() + 5000 : VKP_FOREVER),
                };
                const size_t count = sizeof cases / sizeof *cases;
                const uint64_t deadline = left_out != 0 ? vkp_now_ns() + random() % 30000 : end;
                size_t won = 99;
                const vkp_status status = random() % 2
                                              ? vkp_select_fair(cases, count, &turn, deadline, &won)
                                              : vkp_select(cases, count, deadline, &won);
                if (status != VKP_OK) {
                    wrong += status != VKP_ERR_TIMEOUT;
                    continue;
                }
                const vkp_status how = cases[won].status;
                switch (won) {
                case recv_in:
                case recv_unbounded:
                    open[won] = how == VKP_OK;
                    wrong += how == VKP_OK ? value != got[won]++ : how != VKP_ERR_CLOSED;
                    break;
                case recv_cast:
                    open[won] = how != VKP_ERR_CLOSED;
                    if (how == VKP_ERR_LAGGED) {
                        missed += vkp_broadcast_get_missed(cast_rx);
                    } else if (how == VKP_OK) {
                        got[won]++;
                        wrong += value != got[won] + missed; // its place, counted from 1
                    }
                    break;
                case changed:
                    open[won] = how == VKP_OK;
                    wrong += vkp_watch_get(newest_rx, &value) != VKP_OK || value < seen;
                    seen = value;
                    break;
                case send:
                    wrong += how != VKP_OK;
                    open[won] = ++got[won] < each;
                    break;
                case reserve:
                    wrong += how != VKP_OK;
                    if (random() % 5 == 0) {
                        vkp_mpsc_abort(&permit);
                        break;
                    }
                    *static_cast<uint64_t *>(permit.item) = got[won];
                    vkp_mpsc_commit(&permit);
                    open[won] = ++got[won] < each;
                    break;
                case fd: {
                    char bytes[16];
                    const ssize_t count_read = read(fds[0], bytes, 1 + random() % 16);
                    open[won] = count_read > 0;
                    wrong += count_read < 0;
                    got[won] += count_read > 0 ? static_cast<uint64_t>(count_read) : 0;
                    break;
                }
                default:
                    wrong += won == cancel; // nobody cancelled
                }
            }
            vkp_mpsc_tx_unref(out.tx);
            vkp_mpsc_tx_unref(reserved.tx);
            out.tx = nullptr;
            reserved.tx = nullptr;
            for (std::thread &thread : threads) {
                thread.join();
            }
            (void)close(fds[0]);
            vkp_broadcast_rx_unref(cast_rx);
            vkp_watch_rx_unref(newest_rx);
            CHECK_FALSE(busy());
            CHECK(wrong.load() == 0);
            CHECK(got[recv_in] == each);
            CHECK(got[recv_unbounded] == each);
            CHECK(got[recv_cast] + missed == each);
            CHECK(seen == each);
            CHECK(got[fd] == (with_descriptor ? each : 0));
        }
    }
}

TEST_CASE("select: threads: many senders that may also leave: every value is sent once",
          "[select][threads]")
{
    const uint64_t each = 1200;
    const size_t senders = 3;
    for (const vkp_test_build &build : vkp_test_builds) {
        for (bool lanes : {false, true}) {
            const vkp_test_watchdog watchdog;
            INFO(build.name << ", lanes " << lanes);
            const vkp_env env = vkp_test_env_of(build);
            Channel channel(2, &env, lanes);
            std::vector<std::thread> threads;
            std::atomic<size_t> wrong{0};
            for (size_t s = 0; s < senders; s++) {
                vkp_mpsc_tx *clone = nullptr;
                must(vkp_mpsc_tx_clone(channel.tx, &clone));
                threads.emplace_back([&, s, tx = clone] {
                    std::mt19937 random(static_cast<unsigned>(s));
                    for (uint64_t i = 0; i < each;) {
                        const uint64_t value = s * each + i;
                        vkp_case cases[] = {
                            vkp_case_mpsc_send(tx, &value),
                            vkp_case_deadline(random() % 4 ? VKP_FOREVER : vkp_now_ns() + 2000)};
                        size_t won = 99;
                        wrong += vkp_select(cases, 2, VKP_FOREVER, &won) != VKP_OK;
                        wrong += won == 0 && cases[0].status != VKP_OK;
                        i += won == 0;
                    }
                    vkp_mpsc_tx_unref(tx);
                });
            }
            vkp_mpsc_tx_unref(channel.tx);
            channel.tx = nullptr;
            std::vector<uint64_t> next(senders, 0);
            uint64_t value = 0;
            vkp_status status = VKP_OK;
            while (status == VKP_OK) {
                vkp_case one = vkp_case_mpsc_recv(channel.rx, &value);
                size_t won = 99;
                must(vkp_select(&one, 1, VKP_FOREVER, &won));
                status = one.status;
                if (status == VKP_OK) {
                    const size_t sender = static_cast<size_t>(value / each);
                    wrong += sender >= senders || value % each != next[sender]++;
                }
            }
            for (std::thread &thread : threads) {
                thread.join();
            }
            CHECK(status == VKP_ERR_CLOSED);
            CHECK(next == std::vector<uint64_t>(senders, each));
            CHECK(wrong.load() == 0);
        }
    }
}
