// SPDX-License-Identifier: MIT
//
// A server of a soak that misbehaves, in a thread of its own. Each client has a listener of its
// own; all of them get the same numbered messages. At random times a connection gets a misdeed:
// with the answer to its next command, or unasked.
#ifndef VKP_TEST_SOAK_SCRIPTED_H
#define VKP_TEST_SOAK_SCRIPTED_H

#include "soak/account.h"
#include "support/fake_server.h"

#include <atomic>
#include <list>
#include <thread>

#include <poll.h>

namespace soak {

struct Misdeed {
    enum Kind {
        ERROR,
        CLOSE,
        HALF,         // half of the answer, then the end
        TORN,         // the answer and half of a message, then the end
        SILENCE,      // no answers from then on; messages go on
        STALL,        // nothing at all from then on
        SLOW,         // no command is read for a time; messages go on
        SURPLUS,      // one reply too many
        OTHER_TYPE,   // an answer of another type
        PUSH,         // a push of an unknown kind
        CONFIRMATION, // the confirmation of a name that nobody asked for
        TAKE,         // a subscription is taken away, with a word
        FORGET,       // every subscription is dropped without a word
        GARBAGE
    };
    Kind kind;
    const char *text; // of an ERROR: its words
};

constexpr Misdeed misdeeds[] = {{Misdeed::ERROR, "ERR something is wrong"},
                                {Misdeed::ERROR, "BUSY a script runs"},
                                {Misdeed::ERROR, "LOADING the data set"},
                                {Misdeed::ERROR, "MASTERDOWN the primary is down"},
                                {Misdeed::ERROR, "NOPERM no permissions"},
                                {Misdeed::CLOSE, ""},
                                {Misdeed::HALF, ""},
                                {Misdeed::TORN, ""},
                                {Misdeed::SILENCE, ""},
                                {Misdeed::STALL, ""},
                                {Misdeed::SLOW, ""},
                                {Misdeed::SURPLUS, ""},
                                {Misdeed::OTHER_TYPE, ""},
                                {Misdeed::PUSH, ""},
                                {Misdeed::CONFIRMATION, ""},
                                {Misdeed::TAKE, ""},
                                {Misdeed::TAKE, ""},
                                {Misdeed::FORGET, ""},
                                {Misdeed::GARBAGE, ""}};
constexpr size_t misdeed_count = sizeof misdeeds / sizeof *misdeeds;

class Scripted {
  public:
    Scripted(uint64_t seed, uint64_t rate) : random_(seed), rate_(rate)
    {
    }
    ~Scripted()
    {
        stop();
    }
    // Before start. Where a client asks commands, no reply is at another asker.
    vkp_client_config listen(bool asks)
    {
        doors_.emplace_back();
        doors_.back().asks = asks;
        return doors_.back().server.config();
    }
    void watch(const Account *account)
    {
        accounts_.push_back(account);
    }
    void start()
    {
        thread_ = std::thread([this] { run(); });
    }
    void stop()
    {
        stopped_ = true;
        if (thread_.joinable()) {
            thread_.join();
        }
    }
    uint64_t misbehaved() const
    {
        return misbehaved_;
    }
    Ledger ledger;
    std::atomic<bool> calm{true};       // no misdeed begins
    std::atomic<bool> publishes{false}; // numbers are published
    std::atomic<bool> ends{false};      // closes the connections, then becomes false

  private:
    using Words = std::vector<std::string>;
    struct Held {
        vkp_sub_kind kind;
        std::string name;
    };
    struct Door {
        FakeServer server;
        bool asks = false;
    };
    struct Connection {
        Peer peer;
        bool asks = false;
        uint64_t id = 0;
        bool resp3 = false;
        bool silent = false;
        bool stalled = false;
        bool honest = false;     // another misdeed would hide from the client what the last one did
        bool counts = true;      // each CLIENT INFO, or CLIENT LIST of it, had its answer
        bool identified = false; // CLIENT ID had
        int audits = -1;         // after FORGET: those since a name is back; -1: none is
        bool unasked = false;    // the next misdeed
        uint64_t misdeed_ns = 0;
        uint64_t spared = 0;  // so many commands have their answers before the next misdeed
        uint64_t read_ns = 0; // SLOW: commands are read again then
        std::vector<Held> held;
    };

    void run();
    void accept();
    void wait() const;
    void close_all();
    void serve(Connection &with);
    void publish();
    uint64_t lag() const;
    void answer(Connection &with, const Words &words);
    std::string right(Connection &with, const Words &words);
    std::string subscribed(Connection &with, const Words &words);
    std::string unsubscribed(Connection &with, const Words &words);
    std::string pong(const Connection &with, const Words &words) const;
    std::string info(Connection &with);
    std::string list(const std::string &id);
    const Misdeed *choose(const Connection &with, const std::string &verb);
    static bool is_possible(const Misdeed &misdeed, const Connection &with,
                            const std::string &verb);
    void misbehave(Connection &with, const Misdeed &misdeed, const Words &words);
    std::string take(Connection &with);

    static void say(Connection &with, const std::string &text)
    {
        if (with.peer && !vkp_test_peer_send(with.peer.get(), text.data(), text.size())) {
            with.peer.reset();
        }
    }
    static std::string push(const Connection &with, const Words &parts)
    {
        std::string text = ::push(parts);
        text[0] = with.resp3 ? '>' : '*';
        return text;
    }
    static std::string confirmed(const Connection &with, std::string verb, const std::string &name)
    {
        for (char &letter : verb) {
            letter = static_cast<char>(letter | 0x20);
        }
        std::string text = confirm(verb, name);
        text[0] = with.resp3 ? '>' : '*';
        return text;
    }
    static vkp_sub_kind kind_of(const std::string &verb)
    {
        return verb[0] == 'P'                                   ? VKP_SUB_PATTERN
               : verb == "SSUBSCRIBE" || verb == "SUNSUBSCRIBE" ? VKP_SUB_SHARD
                                                                : VKP_SUB_CHANNEL;
    }
    void schedule(Connection &with)
    {
        with.misdeed_ns = vkp_now_ns() + random_.between(50, 3000) * ms;
        with.unasked = random_.one_in(2);
    }
    Random random_;
    const uint64_t rate_; // numbers in a second
    std::list<Door> doors_;
    std::vector<const Account *> accounts_;
    std::list<Connection> connections_;
    uint64_t ids_ = 0;
    uint64_t published_ns_ = 0; // what is published is so until then
    std::atomic<uint64_t> misbehaved_{0};
    std::atomic<bool> stopped_{false};
    std::thread thread_;
};

// ---------------------------------------------------------------------------------------------
// The thread

inline void Scripted::run()
{
    while (!stopped_) {
        accept();
        for (Connection &each : connections_) {
            serve(each);
        }
        if (ends.exchange(false)) {
            close_all();
        }
        connections_.remove_if([](const Connection &each) {
            return !each.peer || vkp_test_peer_is_ended(each.peer.get());
        });
        publish();
        wait();
    }
}

inline void Scripted::accept()
{
    for (Door &door : doors_) {
        while (Peer peer = door.server.try_accept()) {
#ifdef SO_NOSIGPIPE
            const int on = 1;
            (void)setsockopt(vkp_test_peer_fd(peer.get()), SOL_SOCKET, SO_NOSIGPIPE, &on,
                             sizeof on);
#endif
            connections_.emplace_back();
            connections_.back().peer = std::move(peer);
            connections_.back().asks = door.asks;
            connections_.back().id = ++ids_;
            schedule(connections_.back());
            if (random_.one_in(3)) { // in the handshake, or while names come back
                connections_.back().unasked = false;
                connections_.back().misdeed_ns = 0;
                connections_.back().spared = random_.below(10);
            }
        }
    }
}

// Until a command comes, or the next number is due.
inline void Scripted::wait() const
{
    std::vector<pollfd> all;
    for (const Connection &each : connections_) {
        if (each.peer && each.read_ns == 0) {
            all.push_back({vkp_test_peer_fd(each.peer.get()), POLLIN, 0});
        }
    }
    (void)poll(all.data(), static_cast<nfds_t>(all.size()), 2);
}

// What is lost between a FORGET and the audit that finds it lies in no gap if the connection ends
// between: no server does both.
inline void Scripted::close_all()
{
    for (Connection &each : connections_) {
        if (!each.honest) {
            each.peer.reset();
        }
    }
}

// A command's name and its arguments.
inline std::vector<std::string> words_of(const char *frame, size_t len)
{
    std::vector<std::string> words;
    const char *at = static_cast<const char *>(memchr(frame, '\n', len)) + 1;
    while (at < frame + len) {
        const size_t bytes = static_cast<size_t>(atoi(at + 1));
        at = strchr(at, '\n') + 1;
        words.emplace_back(at, bytes);
        at += bytes + 2;
    }
    return words;
}

inline void Scripted::serve(Connection &with)
{
    const uint64_t now = vkp_now_ns();
    if (with.read_ns > now) {
        return;
    }
    with.read_ns = 0;
    size_t len = 0;
    const char *frame;
    while (with.peer && with.read_ns == 0 &&
           (frame = vkp_test_peer_try_read_frame(with.peer.get(), &len)) != nullptr) {
        if (!with.silent) {
            answer(with, words_of(frame, len));
        }
    }
    if (with.peer && with.unasked && now >= with.misdeed_ns) {
        const Misdeed *misdeed = choose(with, "");
        if (misdeed != nullptr) {
            misbehave(with, *misdeed, {});
        }
    }
}

inline uint64_t Scripted::lag() const
{
    uint64_t most = 0;
    for (const Account *each : accounts_) {
        most = std::max(most, each->lag(ledger.begun()));
    }
    return most;
}

// The numbers that are due, written to each connection that holds a name of theirs.
inline void Scripted::publish()
{
    const uint64_t now = vkp_now_ns();
    const uint64_t count = std::min((now - published_ns_) * rate_ / second, UINT64_C(64));
    if (count == 0 || !publishes) {
        return;
    }
    published_ns_ = now;
    if (lag() > 20000) {
        return;
    }
    const uint64_t first = ledger.begin(count);
    for (Connection &each : connections_) {
        std::string text;
        for (uint64_t number = first; number < first + count && !each.stalled; number++) {
            const Stream &stream = streams[number % stream_count];
            for (const Held &held : each.held) {
                if (!matches(held.kind, held.name, stream)) {
                    continue;
                }
                text += held.kind == VKP_SUB_PATTERN
                            ? push(each, {"pmessage", held.name, stream.name, payload_of(number)})
                            : push(each, {held.kind == VKP_SUB_SHARD ? "smessage" : "message",
                                          stream.name, payload_of(number)});
            }
        }
        say(each, text);
    }
    ledger.settle(std::vector<bool>(count, true));
}

// ---------------------------------------------------------------------------------------------
// What is right

inline std::string Scripted::right(Connection &with, const Words &words)
{
    const std::string &verb = words[0];
    const std::string second = words.size() > 1 ? words[1] : "";
    if (verb == "HELLO") { // also the fence behind UNSUBSCRIBE
        with.resp3 = true;
        return "%4\r\n+proto\r\n:3\r\n+id\r\n:" + std::to_string(with.id) +
               "\r\n+role\r\n+master\r\n+version\r\n+8.0.1\r\n";
    }
    if (verb == "PING") {
        return pong(with, words);
    }
    if (verb == "ECHO") {
        return bulk(second);
    }
    if (verb == "CLIENT" && second == "INFO") {
        return info(with);
    }
    if (verb == "CLIENT" && second == "ID") {
        with.identified = true;
        return ":" + std::to_string(with.id) + "\r\n";
    }
    if (verb == "CLIENT" && second == "LIST") {
        return list(words.back());
    }
    if (verb == "SUBSCRIBE" || verb == "PSUBSCRIBE" || verb == "SSUBSCRIBE") {
        return subscribed(with, words);
    }
    if (verb == "UNSUBSCRIBE" || verb == "PUNSUBSCRIBE" || verb == "SUNSUBSCRIBE") {
        return unsubscribed(with, words);
    }
    if (verb.find("vkp-fence") == 0) { // where PING is refused
        return "-ERR unknown command '" + verb + "'\r\n";
    }
    return "+OK\r\n";
}

inline std::string Scripted::subscribed(Connection &with, const Words &words)
{
    const vkp_sub_kind kind = kind_of(words[0]);
    bool there = false;
    for (const Held &held : with.held) {
        there = there || (held.kind == kind && held.name == words[1]);
    }
    if (!there) {
        with.held.push_back({kind, words[1]});
    }
    if (with.honest && with.audits < 0) {
        with.audits = 0;
    }
    return confirmed(with, words[0], words[1]);
}

inline std::string Scripted::unsubscribed(Connection &with, const Words &words)
{
    const vkp_sub_kind kind = kind_of(words[0]);
    const auto is_it = [&](const Held &held) { return held.kind == kind && held.name == words[1]; };
    with.held.erase(std::remove_if(with.held.begin(), with.held.end(), is_it), with.held.end());
    return confirmed(with, words[0], words[1]);
}

inline std::string Scripted::pong(const Connection &with, const Words &words) const
{
    const std::string token = words.size() > 1 ? words[1] : "";
    if (!with.resp3 && !with.held.empty()) {
        return "*2\r\n" + bulk("pong") + bulk(token);
    }
    return token.empty() ? "+PONG\r\n" : bulk(token);
}

// The counts. Some audits after a FORGET its names are back, and the client knows it.
inline std::string Scripted::info(Connection &with)
{
    int of[VKP_SUB_KINDS] = {0, 0, 0};
    for (const Held &held : with.held) {
        of[held.kind]++;
    }
    if (with.audits >= 0 && ++with.audits > 4) {
        with.audits = -1;
        with.honest = false;
    }
    return bulk("id=" + std::to_string(with.id) + " flags=" + (with.read_ns != 0 ? "b" : "N") +
                " sub=" + std::to_string(of[0]) + " psub=" + std::to_string(of[1]) +
                " ssub=" + std::to_string(of[2]) + "\n");
}

// Of a connection of RESP2 that holds something the counts are asked for, too.
inline std::string Scripted::list(const std::string &id)
{
    for (Connection &each : connections_) {
        if (each.peer && std::to_string(each.id) == id) {
            return !each.resp3 && each.identified
                       ? info(each)
                       : bulk("id=" + id + " flags=" + (each.read_ns != 0 ? "b" : "N") + "\n");
        }
    }
    return bulk("");
}

// ---------------------------------------------------------------------------------------------
// What is wrong

inline void Scripted::answer(Connection &with, const Words &words)
{
    const bool due = !with.unasked && vkp_now_ns() >= with.misdeed_ns && with.spared == 0;
    with.spared -= with.spared > 0 ? 1 : 0;
    const Misdeed *misdeed = due ? choose(with, words[0]) : nullptr;
    if (misdeed != nullptr) {
        misbehave(with, *misdeed, words);
    } else {
        say(with, right(with, words));
    }
}

// A misdeed that is possible now, with an answer to the verb or, if that is empty, without.
inline const Misdeed *Scripted::choose(const Connection &with, const std::string &verb)
{
    if (calm || with.honest || with.silent || with.stalled) {
        return nullptr;
    }
    for (int i = 0; i < 10; i++) {
        const Misdeed &misdeed = misdeeds[random_.below(misdeed_count)];
        if (is_possible(misdeed, with, verb)) {
            return &misdeed;
        }
    }
    return nullptr;
}

// Where commands are asked no reply may get out of step. In RESP2 any array may be taken for one.
inline bool Scripted::is_possible(const Misdeed &misdeed, const Connection &with,
                                  const std::string &verb)
{
    switch (misdeed.kind) {
    case Misdeed::ERROR:
    case Misdeed::HALF:
        return !verb.empty();
    case Misdeed::OTHER_TYPE:
        return !verb.empty() && verb != "ECHO";
    case Misdeed::SURPLUS:
        return !with.asks;
    case Misdeed::PUSH:
    case Misdeed::CONFIRMATION:
        return with.resp3 || !with.asks;
    case Misdeed::TAKE:
        return verb.empty() && !with.held.empty();
    case Misdeed::FORGET:
        return verb.empty() && !with.held.empty() && with.counts && (with.resp3 || with.identified);
    case Misdeed::CLOSE:
    case Misdeed::TORN:
    case Misdeed::SILENCE:
    case Misdeed::STALL:
    case Misdeed::SLOW:
    case Misdeed::GARBAGE:
        return true;
    }
    return false;
}

// long: one case for each misdeed.
inline void Scripted::misbehave(Connection &with, const Misdeed &misdeed, const Words &words)
{
    const std::string verb = words.empty() ? "" : words[0];
    const std::string message = push(with, {"message", "a0", "half of it"});
    std::string text;
    bool ends_it = false;
    misbehaved_++;
    schedule(with);
    if (verb == "CLIENT" &&
        (misdeed.kind == Misdeed::ERROR || misdeed.kind == Misdeed::OTHER_TYPE)) {
        for (Connection &each : connections_) { // the client may not ask again
            const bool asked = words[1] == "INFO"   ? &each == &with
                               : words[1] == "LIST" ? std::to_string(each.id) == words.back()
                                                    : false;
            each.counts = each.counts && !asked;
        }
    }
    switch (misdeed.kind) {
    case Misdeed::ERROR:
        text = std::string("-") + misdeed.text + (verb == "ECHO" ? " " + words[1] : "") + "\r\n";
        break;
    case Misdeed::CLOSE:
        ends_it = true;
        break;
    case Misdeed::HALF:
        text = right(with, words);
        text.resize(text.size() / 2);
        ends_it = true;
        break;
    case Misdeed::TORN:
        text = (verb.empty() ? "" : right(with, words)) + message.substr(0, message.size() / 2);
        ends_it = true;
        break;
    case Misdeed::SILENCE:
        with.silent = true;
        break;
    case Misdeed::STALL:
        with.stalled = true;
        with.silent = true;
        break;
    case Misdeed::SLOW:
        text = verb.empty() ? "" : right(with, words);
        with.read_ns = vkp_now_ns() + random_.between(50, 3000) * ms;
        break;
    case Misdeed::SURPLUS:
        text = (verb.empty() ? "" : right(with, words)) + "+OK\r\n";
        with.honest = true;
        break;
    case Misdeed::OTHER_TYPE:
        text = verb == "CLIENT" && words[1] == "ID" ? "+OK\r\n" : ":42\r\n";
        break;
    case Misdeed::PUSH:
        text = push(with, {"news", "of the day"}) + (verb.empty() ? "" : right(with, words));
        with.honest = !with.resp3;
        break;
    case Misdeed::CONFIRMATION:
        text = confirmed(with, "subscribe", "nobody's") + (verb.empty() ? "" : right(with, words));
        with.honest = !with.resp3;
        break;
    case Misdeed::TAKE:
        text = take(with);
        break;
    case Misdeed::FORGET:
        with.held.clear();
        with.honest = true;
        with.audits = -1;
        break;
    case Misdeed::GARBAGE:
        text = "\x01 garbage\r\n";
        break;
    }
    say(with, text);
    if (ends_it) {
        with.peer.reset();
    }
}

// The server serves a name no longer, as when a slot moves, and says so.
inline std::string Scripted::take(Connection &with)
{
    static const char *const verbs[] = {"unsubscribe", "punsubscribe", "sunsubscribe"};
    const size_t at = static_cast<size_t>(random_.below(with.held.size()));
    const Held held = with.held[at];
    with.held.erase(with.held.begin() + static_cast<std::ptrdiff_t>(at));
    return confirmed(with, verbs[held.kind], held.name);
}

} // namespace soak

#endif // VKP_TEST_SOAK_SCRIPTED_H
