// SPDX-License-Identifier: MIT
//
// What is published in a soak, and what the publisher remembers of it: for each number the two
// times between which it was published, and whether the server took it. Numbers of one sending
// share a record, and the newest records are kept: memory stays the same however long it runs.
#ifndef VKP_TEST_SOAK_LEDGER_H
#define VKP_TEST_SOAK_LEDGER_H

#include "support/support.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <mutex>
#include <string>
#include <vector>

namespace soak {

constexpr uint64_t ms = 1000000;
constexpr uint64_t second = 1000 * ms;
constexpr uint64_t none = UINT64_MAX; // no number, no time

// What a number is published to: the number modulo the count of these says which one.
struct Stream {
    const char *name;
    bool shard;
};
constexpr Stream streams[] = {{"a0", false}, {"a1", false}, {"b0", false}, {"s0", true}};
constexpr uint64_t stream_count = sizeof streams / sizeof *streams;
constexpr const char *filler = "fill"; // a channel without numbers, to be subscribed too

// Whether a subscription receives the messages of the stream. Patterns end in their only star.
inline bool matches(vkp_sub_kind kind, const std::string &name, const Stream &stream)
{
    if (kind == VKP_SUB_PATTERN) {
        return !stream.shard && std::strncmp(name.c_str(), stream.name, name.size() - 1) == 0;
    }
    return (kind == VKP_SUB_SHARD) == stream.shard && name == stream.name;
}

// How many bytes follow the number in its message: most messages are short, some need many reads.
inline size_t padding_of(uint64_t number)
{
    return number % 997 == 0 ? 20000 : number % 13 == 0 ? 1 + number % 200 : 0;
}

inline std::string payload_of(uint64_t number)
{
    return std::to_string(number) + std::string(padding_of(number), '.');
}

// The number in a message; none: it was not published here.
inline uint64_t number_in(vkp_str payload)
{
    uint64_t number = 0;
    size_t digits = 0;
    while (digits < payload.len && payload.ptr[digits] >= '0' && payload.ptr[digits] <= '9') {
        number = number * 10 + static_cast<uint64_t>(payload.ptr[digits++] - '0');
    }
    return digits > 0 && payload.len == digits + padding_of(number) ? number : none;
}

// A random number from a seed, the same everywhere.
class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed)
    {
    }
    uint64_t next()
    {
        state_ += UINT64_C(0x9e3779b97f4a7c15);
        uint64_t mixed = state_;
        mixed = (mixed ^ mixed >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
        mixed = (mixed ^ mixed >> 27) * UINT64_C(0x94d049bb133111eb);
        return mixed ^ mixed >> 31;
    }
    uint64_t below(uint64_t bound)
    {
        return next() % bound;
    }
    uint64_t between(uint64_t least, uint64_t most)
    {
        return least + below(most - least + 1);
    }
    bool one_in(uint64_t bound)
    {
        return below(bound) == 0;
    }

  private:
    uint64_t state_;
};

// A time on the clock of vkp_now_ns, from its first to its last nanosecond.
struct Interval {
    uint64_t from_ns;
    uint64_t to_ns;
};

// Numbers of one stream, first and last included.
struct Range {
    uint64_t first;
    uint64_t last;
};

enum class Verdict {
    explained, // each number was refused by the server, or lies in a gap
    open,      // it is not known yet what became of some
    lost       // the server took one, and no gap covers it
};

class Ledger {
  public:
    // So many numbers are on their way from now on; returns the first one.
    uint64_t begin(uint64_t count)
    {
        std::lock_guard<std::mutex> guard(lock_);
        const uint64_t first = next_;
        next_ += count;
        append({first, next_ - 1, vkp_now_ns(), none, State::sent});
        return first;
    }
    // What became of the numbers of the last begin, in their order.
    void settle(const std::vector<bool> &taken)
    {
        std::lock_guard<std::mutex> guard(lock_);
        const Record sent = record(written_ - 1);
        const uint64_t now = vkp_now_ns();
        written_--;
        for (size_t i = 0; i < taken.size();) {
            const size_t from = i;
            while (i < taken.size() && taken[i] == taken[from]) {
                const uint64_t number = sent.first + i++;
                if (taken[from]) {
                    newest_[number % stream_count] = number;
                    taken_++;
                }
            }
            append({sent.first + from, sent.first + i - 1, sent.before_ns, now,
                    taken[from] ? State::taken : State::refused});
        }
    }
    // The first number that was not begun.
    uint64_t begun() const
    {
        std::lock_guard<std::mutex> guard(lock_);
        return next_;
    }
    uint64_t taken() const
    {
        std::lock_guard<std::mutex> guard(lock_);
        return taken_;
    }
    // The newest number of the stream that the server took; none: it took none.
    uint64_t newest(uint64_t stream) const
    {
        std::lock_guard<std::mutex> guard(lock_);
        return newest_[stream];
    }
    // Whether each number of the range has an explanation; *why says which one has none.
    Verdict judge(const Range &range, const std::deque<Interval> &gaps, std::string *why) const
    {
        std::lock_guard<std::mutex> guard(lock_);
        const uint64_t oldest = written_ > capacity ? written_ - capacity : 0;
        uint64_t at = find(oldest, range.first);
        bool open = false;
        if (at == none) {
            *why = "number " + std::to_string(range.first) + " is older than the records";
            return Verdict::lost;
        }
        for (; at < written_ && record(at).first <= range.last; at++) {
            const Record &each = record(at);
            const uint64_t number = first_in(range, each);
            if (number == none || each.state == State::refused || is_covered(each, gaps)) {
                continue;
            }
            if (each.state == State::sent) {
                open = true;
                continue;
            }
            *why = "number " + std::to_string(number) + ", published between " +
                   std::to_string(each.before_ns) + " and " + std::to_string(each.after_ns);
            return Verdict::lost;
        }
        return open ? Verdict::open : Verdict::explained;
    }

  private:
    enum class State { sent, taken, refused };
    struct Record {
        uint64_t first;
        uint64_t last;
        uint64_t before_ns;
        uint64_t after_ns; // none: not known yet
        State state;
    };
    static constexpr uint64_t capacity = 1 << 17;

    const Record &record(uint64_t at) const
    {
        return records_[at % capacity];
    }
    void append(const Record &record)
    {
        records_[written_++ % capacity] = record;
    }
    // Where the record of the number is; none: it is gone.
    uint64_t find(uint64_t low, uint64_t number) const
    {
        uint64_t high = written_;
        if (low == high || record(low).first > number) {
            return none;
        }
        while (high - low > 1) {
            const uint64_t middle = low + (high - low) / 2;
            (record(middle).first <= number ? low : high) = middle;
        }
        return low;
    }
    // The first number of the range in the record; none: it has none.
    static uint64_t first_in(const Range &range, const Record &record)
    {
        uint64_t number = range.first;
        if (number < record.first) {
            number += (record.first - number + stream_count - 1) / stream_count * stream_count;
        }
        return number <= std::min(range.last, record.last) ? number : none;
    }
    static bool is_covered(const Record &record, const std::deque<Interval> &gaps)
    {
        for (const Interval &gap : gaps) {
            if (gap.from_ns <= record.after_ns && record.before_ns <= gap.to_ns) {
                return true;
            }
        }
        return false;
    }
    mutable std::mutex lock_;
    std::vector<Record> records_ = std::vector<Record>(capacity);
    uint64_t written_ = 0; // records, those that are gone included
    uint64_t next_ = 0;
    uint64_t taken_ = 0;
    uint64_t newest_[stream_count] = {none, none, none, none};
};

// What went wrong, from any thread. The first few are kept.
class Faults {
  public:
    void add(const std::string &what)
    {
        std::lock_guard<std::mutex> guard(lock_);
        if (kept_.size() < 5) {
            kept_.push_back(what);
        }
    }
    bool any() const
    {
        std::lock_guard<std::mutex> guard(lock_);
        return !kept_.empty();
    }
    std::string text() const
    {
        std::lock_guard<std::mutex> guard(lock_);
        std::string all;
        for (const std::string &each : kept_) {
            all += each + "\n";
        }
        return all;
    }

  private:
    mutable std::mutex lock_;
    std::vector<std::string> kept_;
};

} // namespace soak

#endif // VKP_TEST_SOAK_LEDGER_H
