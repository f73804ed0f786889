// SPDX-License-Identifier: MIT
//
// The books of one client. Every number that was published to a subscribed name arrives once and in
// order, or it lies in a GAP that covers the name. What is missing is noticed when a later number
// arrives; it waits for its GAP, and there is an error when that GAP does not cover it.
#ifndef VKP_TEST_SOAK_ACCOUNT_H
#define VKP_TEST_SOAK_ACCOUNT_H

#include "soak/ledger.h"

namespace soak {

class Account {
  public:
    struct Totals {
        uint64_t messages = 0;
        uint64_t missing = 0; // numbers that did not arrive, of both kinds: refused, or in a gap
        uint64_t outages = 0;
        uint64_t gaps = 0;
        uint64_t refusals = 0; // events, so fewer than vkp_client_stats counts
        uint64_t losses = 0;
        uint64_t connects = 0;
        uint64_t spare = 0; // names in a gap of which no event said that something is missing
    };

    Account(std::string who, const Ledger &ledger, Faults &faults)
        : who_(std::move(who)), ledger_(ledger), faults_(faults)
    {
    }
    Account(const Account &) = delete;
    Account &operator=(const Account &) = delete;

    void add(vkp_sub_kind kind, const char *text)
    {
        Name name;
        name.kind = kind;
        name.text = text;
        for (uint64_t i = 0; i < stream_count; i++) {
            if (matches(kind, text, streams[i])) {
                name.books.push_back({i, none, {}});
            }
        }
        names_.push_back(name);
    }
    size_t count() const
    {
        return names_.size();
    }
    vkp_sub_kind kind(size_t at) const
    {
        return names_[at].kind;
    }
    vkp_str text(size_t at) const
    {
        return vkp_str_of(names_[at].text.c_str());
    }
    const std::string &who() const
    {
        return who_;
    }

    // ---- what the program does

    // Before the call that subscribes. The number returned belongs to the outcome.
    uint64_t want(size_t at)
    {
        Guard guard(lock_);
        note("wants " + names_[at].text);
        names_[at].wanted = true;
        names_[at].awaits = false;
        return ++names_[at].generation;
    }
    // Before the call that unsubscribes: nothing of the name is owed any longer.
    void leave(size_t at)
    {
        Guard guard(lock_);
        Name &name = names_[at];
        note("leaves " + name.text);
        name.wanted = false;
        name.moving = true;
        name.owed_from = none;
        name.gap_due = false;
        name.generation++;
        for (Book &book : name.books) {
            book.missing.clear();
        }
    }
    // What the server said of the subscription. Without its consent the next confirmation counts.
    void outcome(size_t at, uint64_t generation, vkp_status status)
    {
        const uint64_t begun = ledger_.begun();
        Guard guard(lock_);
        Name &name = names_[at];
        if (generation != name.generation) {
            return;
        }
        note("outcome of " + name.text + ": " + vkp_status_str(status));
        name.moving = false;
        name.awaits = status != VKP_OK;
        if (status == VKP_OK) {
            name.owed_from = begun;
        }
    }
    bool is_wanted(size_t at) const
    {
        Guard guard(lock_);
        return names_[at].wanted;
    }

    // ---- what the client says

    // now_ns is the loop's time, or `none` where the push has waited in a channel.
    void on_push(const vkp_push &push, uint64_t now_ns);

    void wrong(const std::string &what)
    {
        Guard guard(lock_);
        fault(what);
    }

    // ---- at the end

    // Every name is wanted, confirmed and without a gap that is due.
    bool is_whole() const
    {
        Guard guard(lock_);
        bool all = connected_;
        for (const Name &name : names_) {
            all = all && name.wanted && name.on && !name.moving && !name.gap_due;
        }
        return all;
    }
    // Everything that was published has arrived, or has an explanation.
    bool has_all()
    {
        Guard guard(lock_);
        std::string why;
        bool all = true;
        for (Name &name : names_) {
            for (Book &book : name.books) {
                review(name, book, false);
                const uint64_t newest = ledger_.newest(book.stream);
                const Range rest = {due(name, book), newest};
                all = all && book.missing.empty() &&
                      (newest == none || rest.first == none || rest.first > newest ||
                       ledger_.judge(rest, name.gaps, &why) == Verdict::explained);
            }
        }
        return all;
    }
    // How many numbers the slowest name is behind.
    uint64_t lag(uint64_t begun) const
    {
        Guard guard(lock_);
        uint64_t most = 0;
        for (const Name &name : names_) {
            for (const Book &book : name.books) {
                const uint64_t at = due(name, book);
                most = name.on && at < begun ? std::max(most, begun - at) : most;
            }
        }
        return most;
    }
    Totals totals() const
    {
        Guard guard(lock_);
        return totals_;
    }
    // What is not as it should be, and the last events.
    std::string text() const
    {
        Guard guard(lock_);
        return state();
    }

  private:
    using Guard = std::lock_guard<std::mutex>;
    struct Book {
        uint64_t stream;
        uint64_t last;              // the newest number that arrived; none: none did
        std::vector<Range> missing; // without an explanation so far
    };
    struct Name {
        vkp_sub_kind kind = VKP_SUB_CHANNEL;
        std::string text;
        bool wanted = false;
        bool on = false;     // confirmed on this connection, and not lost or left since
        bool moving = false; // the client may not have learned yet what the program did
        bool awaits = false; // wanted, and refused: the next confirmation is the first one
        uint64_t generation = 0;
        uint64_t owed_from = none; // numbers from here on are owed; none: nothing is
        bool gap_due = false;      // an event said that messages may be missing
        uint64_t confirmed_ns = 0;
        uint64_t ready_ns = 0; // when the connection was ready on which it was confirmed last
        uint64_t good_ns = 0;  // that time, of the connection on which it was lost
        std::deque<Interval> gaps;
        std::vector<Book> books;
    };

    static uint64_t due(const Name &name, const Book &book)
    {
        if (name.owed_from == none) {
            return none;
        }
        const uint64_t owed =
            name.owed_from +
            (book.stream + stream_count - name.owed_from % stream_count) % stream_count;
        return book.last == none ? owed : std::max(owed, book.last + stream_count);
    }
    Name *find(vkp_sub_kind kind, vkp_str text)
    {
        for (Name &name : names_) {
            if (name.kind == kind && name.text.size() == text.len &&
                std::memcmp(name.text.data(), text.ptr, text.len) == 0) {
                return &name;
            }
        }
        return nullptr;
    }
    void message(const vkp_push &push);
    void event(const vkp_push &push, uint64_t now_ns);
    void name_event(const vkp_push &push, uint64_t now_ns);
    void connected(const vkp_push &push, uint64_t now_ns);
    void disconnected();
    void gap(const vkp_gap &gap, uint64_t now_ns);
    void cover(Name &name, const vkp_gap &gap, uint64_t now_ns);
    void review(const Name &name, Book &book, bool told);

    void lose(Name &name)
    {
        if (name.owed_from != none && !name.gap_due) {
            name.gap_due = true;
            name.good_ns = name.ready_ns;
        }
        name.on = false;
    }
    void note(const std::string &what)
    {
        history_.push_back(std::to_string(vkp_now_ns()) + " " + what);
        if (history_.size() > 80) {
            history_.pop_front();
        }
    }
    void fault(const std::string &what)
    {
        faults_.add(who_ + ": " + what + "\n" + state());
    }
    std::string state() const
    {
        std::string all = who_ + (connected_ ? ", connected" : ", not connected") + "\n";
        for (const Name &name : names_) {
            all += "  " + name.text + (name.wanted ? " wanted" : "") + (name.on ? " on" : "") +
                   (name.moving ? " moving" : "") + (name.awaits ? " awaits" : "") +
                   (name.gap_due ? " gap due" : "");
            for (const Book &book : name.books) {
                all += std::string(", ") + streams[book.stream].name + ": last " +
                       std::to_string(book.last) + ", newest " +
                       std::to_string(ledger_.newest(book.stream));
                for (const Range &range : book.missing) {
                    all += ", missing " + std::to_string(range.first) + " to " +
                           std::to_string(range.last);
                }
            }
            all += "\n";
        }
        for (const std::string &line : history_) {
            all += "    " + line + "\n";
        }
        return all;
    }

    const std::string who_;
    const Ledger &ledger_;
    Faults &faults_;
    mutable std::mutex lock_;
    std::vector<Name> names_;
    bool connected_ = false;
    bool failure_reported_ = false;
    uint64_t ready_ns_ = 0; // of this connection
    uint64_t newest_ = 0;   // number of the newest message of all names
    Totals totals_;
    std::deque<std::string> history_;
};

inline void Account::on_push(const vkp_push &push, uint64_t now_ns)
{
    Guard guard(lock_);
    if (push.kind <= VKP_PUSH_SMESSAGE) {
        message(push);
    } else {
        event(push, now_ns);
    }
}

// Look again at what is missing. After a GAP of the name nothing may be left.
inline void Account::review(const Name &name, Book &book, bool told)
{
    std::vector<Range> left;
    for (const Range &range : book.missing) {
        std::string why;
        const Verdict verdict = ledger_.judge(range, name.gaps, &why);
        if (verdict == Verdict::lost && told) {
            fault("lost outside each gap of " + name.text + ": " + why);
        } else if (verdict != Verdict::explained) {
            left.push_back(range);
        }
    }
    book.missing.swap(left);
}

inline void Account::message(const vkp_push &push)
{
    const vkp_sub_kind kind = push.kind == VKP_PUSH_PMESSAGE   ? VKP_SUB_PATTERN
                              : push.kind == VKP_PUSH_SMESSAGE ? VKP_SUB_SHARD
                                                               : VKP_SUB_CHANNEL;
    const vkp_str text = push.kind == VKP_PUSH_PMESSAGE ? push.pattern : push.channel;
    if (vkp_test_view(text) == filler) {
        return;
    }
    const uint64_t number = number_in(push.payload);
    Name *name = find(kind, text);
    Book *book = nullptr;
    for (size_t i = 0; name != nullptr && number != none && i < name->books.size(); i++) {
        book = name->books[i].stream == number % stream_count ? &name->books[i] : book;
    }
    if (book == nullptr || vkp_test_view(push.channel) != streams[book->stream].name) {
        fault("a message that nobody published to " + std::string(vkp_test_view(push.channel)));
        return;
    }
    if (!connected_ || !name->on) {
        fault("a message of " + name->text + ", which is not subscribed");
    }
    if (book->last != none && number <= book->last) {
        fault("number " + std::to_string(number) + " of " + name->text + " after " +
              std::to_string(book->last));
    }
    if (number < newest_) {
        fault("number " + std::to_string(number) + " of " + name->text + " after " +
              std::to_string(newest_) + " of another name");
    }
    const uint64_t expected = due(*name, *book);
    if (expected != none && number > expected) {
        book->missing.push_back({expected, number - stream_count});
        totals_.missing += (number - expected) / stream_count;
    }
    if (!book->missing.empty() && (totals_.messages % 64 == 0 || book->missing.size() > 64)) {
        review(*name, *book, false);
    }
    book->last = number;
    newest_ = number;
    totals_.messages++;
}

inline void Account::event(const vkp_push &push, uint64_t now_ns)
{
    note(std::string(vkp_push_kind_str(push.kind)) + " " +
         std::string(vkp_test_view(push.channel)) + " " + std::string(vkp_test_view(push.payload)));
    switch (push.kind) {
    case VKP_PUSH_SUBSCRIBED:
    case VKP_PUSH_UNSUBSCRIBED:
    case VKP_PUSH_REFUSED:
    case VKP_PUSH_LOST:
        name_event(push, now_ns);
        break;
    case VKP_PUSH_CONNECTED:
    case VKP_PUSH_RECONNECTED:
        connected(push, now_ns);
        break;
    case VKP_PUSH_DISCONNECTED:
        disconnected();
        break;
    case VKP_PUSH_CONNECT_FAILED:
        if (failure_reported_ || connected_) {
            fault("CONNECT_FAILED twice, or while connected");
        }
        failure_reported_ = true;
        break;
    case VKP_PUSH_GAP:
        gap(*push.gap, now_ns);
        break;
    case VKP_PUSH_OTHER:
        break;
    case VKP_PUSH_MESSAGE:
    case VKP_PUSH_PMESSAGE:
    case VKP_PUSH_SMESSAGE:
    case VKP_PUSH_INVALIDATE:
    case VKP_PUSH_LAGGED:
        fault("an event that nothing here can cause");
        break;
    }
}

inline void Account::name_event(const vkp_push &push, uint64_t now_ns)
{
    Name *name = find(push.sub, push.channel);
    totals_.refusals += push.kind == VKP_PUSH_REFUSED ? 1 : 0;
    totals_.losses += push.kind == VKP_PUSH_LOST ? 1 : 0;
    if (name == nullptr) {
        return;
    }
    if (!connected_ && push.kind != VKP_PUSH_UNSUBSCRIBED) {
        fault("an answer of a server that is not connected: " + name->text);
    }
    if (push.kind == VKP_PUSH_SUBSCRIBED) {
        name->on = true;
        name->ready_ns = ready_ns_;
        name->confirmed_ns = now_ns;
        if (name->awaits) {
            name->awaits = false;
            name->owed_from = ledger_.begun();
        }
    } else if (push.kind == VKP_PUSH_LOST) {
        lose(*name);
    } else if (push.kind == VKP_PUSH_UNSUBSCRIBED) {
        name->on = false;
    }
}

inline void Account::connected(const vkp_push &push, uint64_t now_ns)
{
    if (connected_ || (push.kind == VKP_PUSH_CONNECTED) != (totals_.connects == 0)) {
        fault("connected twice");
    }
    connected_ = true;
    failure_reported_ = false;
    ready_ns_ = now_ns;
    totals_.connects++;
}

inline void Account::disconnected()
{
    if (!connected_) {
        fault("DISCONNECTED twice");
    }
    connected_ = false;
    totals_.outages++;
    for (Name &name : names_) {
        lose(name);
    }
}

// A GAP is about names that are back. It begins while the names were confirmed, and not before
// their connection was ready; it ends behind their confirmations.
inline void Account::gap(const vkp_gap &gap, uint64_t now_ns)
{
    uint64_t bound_ns = now_ns;
    totals_.gaps++;
    history_.back() += "from " + std::to_string(gap.from_ns) + " to " + std::to_string(gap.to_ns);
    for (Name &name : names_) {
        bool named = gap.name_count == 0 && name.on;
        for (size_t i = 0; i < gap.name_count; i++) {
            named = named || (gap.names[i].kind == name.kind &&
                              vkp_test_view(gap.names[i].name) == name.text);
        }
        if (gap.name_count != 0 && named) {
            history_.back() += " " + name.text;
        }
        if (name.moving || name.owed_from == none) {
            bound_ns = 0; // the client may still report what happened before
        } else if (named) {
            bound_ns = std::min(bound_ns, name.gap_due ? name.good_ns : name.ready_ns);
            cover(name, gap, now_ns);
        }
    }
    if (now_ns != none && bound_ns != now_ns && gap.from_ns < bound_ns) {
        fault("a GAP that begins before the connection was ready, at " + std::to_string(bound_ns));
    }
    const uint64_t length_ms = (gap.to_ns - gap.from_ns) / ms;
    if (gap.from_ns > gap.to_ns || gap.to_ns > vkp_now_ns() ||
        gap.to_unix_ms + 1 < gap.from_unix_ms + length_ms) {
        fault("the times of a GAP contradict each other");
    }
}

inline void Account::cover(Name &name, const vkp_gap &gap, uint64_t now_ns)
{
    if (!name.on || (now_ns != none && gap.to_ns < name.confirmed_ns)) {
        fault("a GAP covers " + name.text + ", which is not back");
    }
    totals_.spare += name.gap_due ? 0 : 1;
    name.gap_due = false;
    name.gaps.push_back({gap.from_ns, gap.to_ns});
    if (name.gaps.size() > 64) {
        name.gaps.pop_front();
    }
    for (Book &book : name.books) {
        review(name, book, true);
    }
}

} // namespace soak

#endif // VKP_TEST_SOAK_ACCOUNT_H
