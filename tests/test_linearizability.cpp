// SPDX-License-Identifier: MIT
//
// The channel against its sequential specification: threads make short random runs and write down
// what they called, when, and what they got; a search then looks for an order of the calls, each
// between its beginning and its end, in which a plain queue would have answered the same.
#include "support/catch.hpp"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <unordered_set>
#include <utility>
#include <vector>

#include <sched.h>

#include "support/support.h"

namespace {

enum class Kind { send, receive, close, len };

struct Call {
    Kind kind;
    bool waits;        // with a deadline, or without end
    uint64_t value;    // sent, received, or the length
    vkp_status status; // EMPTY and FULL are written down as TIMEOUT: the same answer
    uint64_t begin;
    uint64_t end;
};

using History = std::vector<Call>;

bool overlap(const Call &a, const Call &b)
{
    return a.begin < b.end && b.begin < a.end;
}

// The search of Wing and Gong: of the calls not placed yet one comes next that began before any
// of them ended. What was placed and what is queued then is all that the rest depends on, so no
// such pair is looked into twice.
class Search {
  public:
    Search(const History &history, size_t capacity) : history_(history), capacity_(capacity)
    {
        if (history.size() > 64) {
            vkp_test_fail("a history of %zu calls", history.size());
        }
    }
    bool finds_an_order()
    {
        return place(0);
    }

  private:
    bool place(uint64_t placed)
    {
        const size_t count = history_.size();
        uint64_t first_end = UINT64_MAX;
        bool open = false;
        for (size_t i = 0; i < count; i++) {
            if ((placed >> i & 1) == 0) {
                open = true;
                first_end = std::min(first_end, history_[i].end);
            }
        }
        if (!open) {
            return true;
        }
        if (!seen_.insert(key(placed)).second) {
            return false;
        }
        for (size_t i = 0; i < count; i++) {
            if ((placed >> i & 1) != 0 || history_[i].begin > first_end) {
                continue;
            }
            const std::vector<size_t> queue = queue_;
            const bool closed = closed_;
            if (answers_the_same(i, placed) && place(placed | uint64_t{1} << i)) {
                return true;
            }
            queue_ = queue;
            closed_ = closed;
        }
        return false;
    }

    std::string key(uint64_t placed) const
    {
        std::string text = std::to_string(placed) + (closed_ ? "c" : "o");
        for (const size_t at : queue_) {
            text += static_cast<char>('0' + at);
        }
        return text;
    }

    // Makes call i on the model, which is a queue of the calls that sent.
    bool answers_the_same(size_t i, uint64_t placed)
    {
        const Call &call = history_[i];
        switch (call.kind) {
        case Kind::send:
            if (call.status == VKP_ERR_CLOSED) {
                return closed_;
            }
            if (call.status == VKP_ERR_TIMEOUT) {
                return !closed_ && (queue_.size() >= capacity_ || somebody_waits(i, placed));
            }
            queue_.push_back(i);
            return call.status == VKP_OK && !closed_ && queue_.size() <= capacity_;
        case Kind::receive:
            if (call.status == VKP_ERR_CLOSED) {
                return closed_ && queue_.empty();
            }
            if (call.status == VKP_ERR_TIMEOUT) {
                // A value that is being sent has its place before it can be received.
                return queue_.empty() ? !closed_ : overlap(history_[queue_.front()], call);
            }
            if (call.status != VKP_OK || queue_.empty() ||
                history_[queue_.front()].value != call.value) {
                return false;
            }
            queue_.erase(queue_.begin());
            return true;
        case Kind::len:
            return queue_.size() == call.value;
        case Kind::close:
            closed_ = true;
            return true;
        }
        return false;
    }

    // Room belongs to the sender that stands in line for it, from when it is made.
    bool somebody_waits(size_t i, uint64_t placed) const
    {
        for (size_t j = 0; j < history_.size(); j++) {
            const Call &other = history_[j];
            if (j != i && other.kind == Kind::send && other.waits && overlap(other, history_[i]) &&
                ((placed >> j & 1) == 0 || other.status != VKP_OK)) {
                return true;
            }
        }
        return false;
    }

    const History &history_;
    size_t capacity_;
    std::vector<size_t> queue_;
    bool closed_ = false;
    std::unordered_set<std::string> seen_;
};

bool is_linearizable(const History &history, size_t capacity)
{
    return Search(history, capacity).finds_an_order();
}

std::string text_of(const History &history)
{
    static const char *const names[] = {"send", "receive", "close", "len"};
    std::string text;
    for (const Call &call : history) {
        text += "\n  " + std::to_string(call.begin) + "-" + std::to_string(call.end) + " " +
                names[static_cast<int>(call.kind)] + (call.waits ? ", waits, " : " ") +
                std::to_string(call.value) + ": " + vkp_status_str(call.status);
    }
    return text;
}

// One run: up to three senders and the receiver, who all begin together.
struct Run {
    vkp_mpsc_tx *tx = nullptr;
    vkp_mpsc_rx *rx = nullptr;
    size_t capacity = 0;
    uint32_t seed = 0;
    size_t closer = 0; // who closes, in the midst; the receiver does so in the end anyway
    std::atomic<uint64_t> clock{1};
};

class Recorder {
  public:
    Recorder(Run *run, size_t who) : run_(run), who_(who), random_(run->seed + who * 7919)
    {
        calls.reserve(64);
    }
    History calls;

    void act_as_sender()
    {
        const size_t count = 3 + random_() % 4;
        for (size_t i = 0; i < count; i++) {
            pause();
            if (run_->closer == who_ && i + 1 == count) {
                close();
            }
            send((who_ + 1) * 100 + i);
        }
    }

    void act_as_receiver()
    {
        const size_t count = 4 + random_() % 10;
        for (size_t i = 0; i < count; i++) {
            pause();
            if (random_() % 6 == 0) {
                len();
            } else {
                (void)receive(random_() % 2 == 0 ? 0 : vkp_now_ns() + random_() % 20000);
            }
        }
        close();
        while (receive(VKP_FOREVER) == VKP_OK) {
        }
    }

  private:
    void pause()
    {
        const unsigned amount = random_() % 64;
        for (volatile unsigned i = 0; i < amount; i = i + 1) {
        }
        if (amount == 0) {
            sched_yield();
        }
    }
    size_t begin(Kind kind, bool waits, uint64_t value)
    {
        calls.push_back({kind, waits, value, VKP_OK, 0, 0});
        calls.back().begin = run_->clock.fetch_add(1);
        return calls.size() - 1;
    }
    vkp_status end(size_t at, vkp_status status)
    {
        const bool not_now = status == VKP_ERR_FULL || status == VKP_ERR_EMPTY;
        calls[at].end = run_->clock.fetch_add(1);
        calls[at].status = not_now ? VKP_ERR_TIMEOUT : status;
        return status;
    }
    void send(uint64_t value)
    {
        const unsigned form = random_() % 4;
        const uint64_t deadline = form == 1   ? 0
                                  : form == 2 ? vkp_now_ns() + random_() % 20000
                                              : VKP_FOREVER;
        const size_t at = begin(Kind::send, form >= 2, value);
        (void)end(at, form == 0 ? vkp_mpsc_try_send(run_->tx, &value)
                                : vkp_mpsc_send(run_->tx, &value, deadline));
    }
    vkp_status receive(uint64_t deadline)
    {
        uint64_t value = 0;
        const size_t at = begin(Kind::receive, deadline != 0, 0);
        const vkp_status status = end(at, deadline == 0 && random_() % 2 == 0
                                              ? vkp_mpsc_try_recv(run_->rx, &value)
                                              : vkp_mpsc_recv(run_->rx, deadline, &value));
        calls[at].value = value;
        return status;
    }
    void len()
    {
        const size_t at = begin(Kind::len, false, 0);
        const size_t length = vkp_mpsc_get_len(run_->rx);
        (void)end(at, VKP_OK);
        calls[at].value = length;
    }
    void close()
    {
        const size_t at = begin(Kind::close, false, 0);
        vkp_mpsc_close(run_->rx);
        (void)end(at, VKP_OK);
    }

    Run *run_;
    size_t who_;
    std::minstd_rand random_;
};

// Threads that live through all runs: starting one takes longer than a run.
class Crew {
  public:
    static constexpr size_t most = 3;
    Crew()
    {
        for (size_t s = 0; s < most; s++) {
            threads_.emplace_back([this, s] { work(s); });
        }
    }
    ~Crew()
    {
        run_.store(nullptr);
        turn_.fetch_add(1);
        for (std::thread &thread : threads_) {
            thread.join();
        }
    }
    Crew(const Crew &) = delete;
    Crew &operator=(const Crew &) = delete;

    History record(Run *run, size_t senders)
    {
        Recorder own(run, most);
        run_.store(run);
        senders_.store(senders);
        ready_.store(0);
        done_.store(0);
        turn_.fetch_add(1);
        while (ready_.load() < senders) {
            sched_yield();
        }
        ready_.store(most + 1); // all begin
        own.act_as_receiver();
        while (done_.load() < most) {
            sched_yield();
        }
        History all = own.calls;
        for (size_t s = 0; s < senders; s++) {
            all.insert(all.end(), of_[s].begin(), of_[s].end());
        }
        return all;
    }

  private:
    void work(size_t s)
    {
        for (uint64_t turn = 1;; turn++) {
            while (turn_.load() < turn) {
                sched_yield();
            }
            Run *run = run_.load();
            if (run == nullptr) {
                return;
            }
            if (s < senders_.load()) {
                Recorder recorder(run, s);
                ready_.fetch_add(1);
                while (ready_.load() <= most) {
                    sched_yield();
                }
                recorder.act_as_sender();
                of_[s] = recorder.calls;
            }
            done_.fetch_add(1);
        }
    }
    std::atomic<Run *> run_{nullptr};
    std::atomic<uint64_t> turn_{0};
    std::atomic<size_t> senders_{0};
    std::atomic<size_t> ready_{0};
    std::atomic<size_t> done_{0};
    History of_[most];
    std::vector<std::thread> threads_;
};

Call sent(uint64_t value, uint64_t begin, uint64_t end, vkp_status status = VKP_OK)
{
    return {Kind::send, false, value, status, begin, end};
}
Call received(uint64_t value, uint64_t begin, uint64_t end, vkp_status status = VKP_OK)
{
    return {Kind::receive, false, value, status, begin, end};
}
Call closed(uint64_t begin, uint64_t end)
{
    return {Kind::close, false, 0, VKP_OK, begin, end};
}

const vkp_sys *fenced_sys()
{
    static const vkp_sys table = [] {
        vkp_sys copy = *vkp_sys_get_default();
        copy.membarrier = [](bool) { return -ENOSYS; };
        return copy;
    }();
    return &table;
}

} // namespace

TEST_CASE("linearizability: the search accepts what a queue may answer", "[linearizability]")
{
    CHECK(is_linearizable({}, 1));
    CHECK(is_linearizable({sent(1, 1, 2), received(1, 3, 4)}, 1));
    // Sent at the same time, they may come in either order, and be received before a send ended.
    CHECK(is_linearizable({sent(1, 1, 4), sent(2, 2, 3), received(1, 5, 6), received(2, 7, 8)}, 2));
    CHECK(is_linearizable({sent(1, 1, 4), sent(2, 2, 3), received(2, 5, 6), received(1, 7, 8)}, 2));
    CHECK(is_linearizable({sent(1, 1, 6), received(1, 2, 3)}, 1));
    CHECK(is_linearizable({sent(1, 1, 2), sent(2, 3, 4, VKP_ERR_TIMEOUT), received(1, 5, 6)}, 1));
    CHECK(is_linearizable({sent(1, 1, 3), received(0, 2, 4, VKP_ERR_TIMEOUT)}, 1));
    CHECK(is_linearizable(
        {sent(1, 1, 4), closed(2, 3), received(1, 5, 6), received(0, 7, 8, VKP_ERR_CLOSED)}, 1));
    // Behind a value that is being sent.
    CHECK(is_linearizable(
        {sent(1, 1, 9), sent(2, 2, 3), received(0, 4, 5, VKP_ERR_TIMEOUT), received(1, 10, 11)},
        2));
    Call waiting = sent(3, 3, 8);
    waiting.waits = true;
    CHECK(is_linearizable(
        {sent(1, 1, 2), waiting, received(1, 4, 5), sent(4, 6, 7, VKP_ERR_TIMEOUT)}, 1));
}

TEST_CASE("linearizability: the search refuses what no queue answers", "[linearizability]")
{
    const struct {
        const char *what;
        size_t capacity;
        History history;
    } wrong[] = {
        {"out of order", 2, {sent(1, 1, 2), sent(2, 3, 4), received(2, 5, 6), received(1, 7, 8)}},
        {"received twice", 2, {sent(1, 1, 2), received(1, 3, 4), received(1, 5, 6)}},
        {"received before it was sent", 1, {received(1, 1, 2), sent(1, 3, 4)}},
        {"never sent", 1, {sent(1, 1, 2), received(2, 3, 4)}},
        {"more than fits", 1, {sent(1, 1, 2), sent(2, 3, 4), received(1, 5, 6)}},
        {"empty, with a value there", 1, {sent(1, 1, 2), received(0, 3, 4, VKP_ERR_TIMEOUT)}},
        {"full, with room", 2, {sent(1, 1, 2), sent(2, 3, 4, VKP_ERR_TIMEOUT)}},
        {"sent after the close", 1, {closed(1, 2), sent(1, 3, 4)}},
        {"closed before the close", 1, {sent(1, 1, 2, VKP_ERR_CLOSED), closed(3, 4)}},
        {"the end before the last value",
         1,
         {sent(1, 1, 2), closed(3, 4), received(0, 5, 6, VKP_ERR_CLOSED)}},
        {"lost", 1, {sent(1, 1, 2), closed(3, 4), sent(2, 5, 6, VKP_ERR_TIMEOUT)}},
        {"a length of nothing",
         1,
         {sent(1, 1, 2), {Kind::len, false, 0, VKP_OK, 3, 4}, received(1, 5, 6)}},
    };
    for (const auto &each : wrong) {
        INFO(each.what);
        CHECK_FALSE(is_linearizable(each.history, each.capacity));
    }
}

TEST_CASE("linearizability: what threads saw of a channel, a queue could have answered",
          "[linearizability][threads]")
{
    Crew crew;
    size_t calls = 0;
    size_t concurrent = 0;
    size_t full = 0;
    size_t empty = 0;
    size_t refused = 0;
    size_t forgeries = 0;
    std::minstd_rand random(20250601);
    for (uint32_t number = 0; calls < 100000; number++) {
        Run run;
        vkp_env env = VKP_ZERO;
        vkp_mpsc_config config = VKP_ZERO;
        env.spins = number % 2 == 0 ? 0 : VKP_SPINS_NONE;
        env.sys = number % 4 < 2 ? nullptr : fenced_sys();
        run.capacity = 1 + number % 3;
        run.seed = static_cast<uint32_t>(random());
        run.closer = random() % 8; // often nobody
        config.elem_bytes = sizeof(uint64_t);
        config.capacity_items = run.capacity;
        config.env = &env;
        REQUIRE(vkp_mpsc_open(&config, &run.tx, &run.rx) == VKP_OK);
        History history = crew.record(&run, 2 + random() % 2);
        vkp_mpsc_tx_unref(run.tx);
        vkp_mpsc_rx_unref(run.rx);
        calls += history.size();
        if (!is_linearizable(history, run.capacity)) {
            FAIL("run " << number << ", capacity " << run.capacity << ":" << text_of(history));
        }
        Call *last = nullptr;
        for (Call &call : history) {
            for (const Call &other : history) {
                concurrent += call.begin < other.begin && overlap(call, other) ? 1 : 0;
            }
            full += call.kind == Kind::send && call.status == VKP_ERR_TIMEOUT ? 1 : 0;
            empty += call.kind == Kind::receive && call.status == VKP_ERR_TIMEOUT ? 1 : 0;
            refused += call.kind == Kind::send && call.status == VKP_ERR_CLOSED ? 1 : 0;
            if (number % 16 == 0 && call.kind == Kind::receive && call.status == VKP_OK) {
                if (last != nullptr) { // the same history, with one value received twice
                    const uint64_t value = std::exchange(call.value, last->value);
                    forgeries += is_linearizable(history, run.capacity) ? 1 : 0;
                    call.value = value;
                }
                last = &call;
            }
        }
    }
    CHECK(forgeries == 0);
    // The runs were worth it: calls met, and met every answer.
    CHECK(concurrent > 1000);
    CHECK(full > 100);
    CHECK(empty > 100);
    CHECK(refused > 100);
}
