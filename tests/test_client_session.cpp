// SPDX-License-Identifier: MIT
//
// A server that misbehaves at every step of a session, in every way: the cases are made from two
// tables. Whatever it does, it behaves well afterwards, and then the books balance: each message
// that was published for a subscribed name was delivered once or lies in a GAP that was reported,
// each reply is at its asker, and there is one DISCONNECTED per outage. The clock is virtual:
// silence costs no time.
#include "support/catch.hpp"
#include "support/fake_server.h"

#include <list>
#include <map>
#include <set>

namespace {

// ---------------------------------------------------------------------------------------------
// The tables

// What a server does last before it misbehaves. In RESP3 unless the case says otherwise.
enum Step {
    ACCEPT,
    GREETING, // HELLO 3
    PASSWORD, // AUTH: HELLO is answered NOAUTH before
    LOGIN,    // RESP2: the PING behind AUTH
    SETNAME,  // RESP2: CLIENT SETNAME
    SETINFO,
    DATABASE, // SELECT
    SETUP,    // the command of the config
    IDENTITY, // RESP2: CLIENT ID, before the first SUBSCRIBE
    SUBSCRIBE,
    PSUBSCRIBE,
    SSUBSCRIBE,
    UNSUBSCRIBE,
    FENCE, // behind UNSUBSCRIBE: HELLO, in RESP2 PING
    COMMAND,
    HEARTBEAT, // CLIENT INFO, in RESP2 PING
    PROBE_GREETING,
    PROBE_PING,
    PROBE_LIST,
    RESUBSCRIBE, // SUBSCRIBE on the second connection
    OTHER_STEP   // where nothing goes wrong
};

const char *const step_names[] = {"accept",
                                  "HELLO",
                                  "AUTH",
                                  "the login's PING",
                                  "CLIENT SETNAME",
                                  "SETINFO",
                                  "SELECT",
                                  "setup",
                                  "CLIENT ID",
                                  "SUBSCRIBE",
                                  "PSUBSCRIBE",
                                  "SSUBSCRIBE",
                                  "UNSUBSCRIBE",
                                  "fence",
                                  "command",
                                  "heartbeat",
                                  "the probe's HELLO",
                                  "the probe's PING",
                                  "the probe's CLIENT LIST",
                                  "SUBSCRIBE again"};

struct Misdeed {
    enum Kind {
        ERROR,
        SILENCE, // no answer on this connection from then on; messages go on
        STALL,   // nothing at all from then on
        CLOSE,
        HALF,    // half of the answer, then the end
        TORN,    // the answer and half of a message, then the end
        SURPLUS, // one reply too many
        OTHER_TYPE,
        PUSH,         // a push before the answer
        FORGET,       // every subscription is dropped without a word
        CONFIRMATION, // the confirmation of a name that nobody asked for
        GARBAGE
    };
    Kind kind;
    const char *text; // of an error: its words
};

const Misdeed misdeeds[] = {
    {Misdeed::ERROR, "ERR something is wrong"},
    {Misdeed::ERROR, "BUSY a script runs"},
    {Misdeed::ERROR, "LOADING the data set"},
    {Misdeed::ERROR, "NOPERM no permissions"},
    {Misdeed::ERROR, "NOAUTH Authentication required."},
    {Misdeed::ERROR, "WRONGPASS invalid password"},
    {Misdeed::ERROR, "MOVED 5 127.0.0.1:7001"},
    {Misdeed::ERROR, "ERR max number of clients reached"},
    {Misdeed::SILENCE, "silence"},
    {Misdeed::STALL, "nothing at all"},
    {Misdeed::CLOSE, "the end"},
    {Misdeed::HALF, "half an answer"},
    {Misdeed::TORN, "a torn message"},
    {Misdeed::SURPLUS, "a surplus reply"},
    {Misdeed::OTHER_TYPE, "a reply of another type"},
    {Misdeed::PUSH, "a push first"},
    {Misdeed::CONFIRMATION, "a confirmation first"},
    {Misdeed::FORGET, "subscriptions are forgotten"},
    {Misdeed::GARBAGE, "garbage"},
};

// A server of a kind, and the step at which it misbehaves the first `times` times.
struct Case {
    Step step;
    bool resp2;
    Misdeed misdeed;
    int times;
};

// ---------------------------------------------------------------------------------------------
// The server

const char *const names[] = {"c", "p*", "s", "u"};
const vkp_sub_kind kinds[] = {VKP_SUB_CHANNEL, VKP_SUB_PATTERN, VKP_SUB_SHARD, VKP_SUB_CHANNEL};
constexpr int name_count = 4;
constexpr int leaver = 3; // the name that the program leaves

// One message of the publisher.
struct Published {
    int name;
    uint64_t at;
    bool promised; // the program was subscribed
    bool delivered;
};

struct Connection {
    Peer peer;
    bool is_probe;
    bool resp3;
    bool authenticated;
    bool silent; // no answers
    bool stalled;
    int number; // of those that are no probes, from 0
    std::set<std::string> held;
    std::string late; // an answer that is held back until...
    uint64_t late_ns;
};

std::vector<std::string> words_of(const char *frame, size_t len)
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

class Server {
  public:
    Server(vkp_loop *on, const Case &of) : loop(on), the(of)
    {
    }
    // Accept, hear, answer. False: nothing happened.
    bool pump();
    void publish(const bool *promised);
    void hang_up()
    {
        for (Connection &each : connections) {
            each.peer.reset();
        }
    }
    FakeServer listener;
    std::vector<Published> messages;
    std::map<int, std::string> replies; // written for each command
    int misbehaved = 0;
    int harmless = 0; // misdeeds that no client minds

  private:
    uint64_t now() const
    {
        return vkp_loop_get_now_ns(loop);
    }
    void answer(Connection &with, const std::vector<std::string> &words);
    void misbehave(Connection &with, Step step, const std::string &right);
    std::string subscribed(Connection &with, const std::string &verb, const std::string &name);
    std::string greeting(Connection &with) const;
    std::string counts() const;
    bool is_slow() const
    {
        return the.step >= PROBE_GREETING && the.step <= PROBE_LIST;
    }
    std::string push(const Connection &with, const std::vector<std::string> &parts) const
    {
        std::string text = ::push(parts);
        text[0] = with.resp3 ? '>' : '*';
        return text;
    }
    vkp_loop *loop;
    const Case &the;
    std::list<Connection> connections;
    int accepted = 0;
    int commands = 0;
};

bool Server::pump()
{
    bool active = false;
    for (auto at = connections.begin(); at != connections.end();) {
        size_t len = 0;
        const char *frame;
        while (at->peer && (frame = vkp_test_peer_try_read_frame(at->peer.get(), &len))) {
            active = true;
            if (!at->silent) {
                answer(*at, words_of(frame, len));
            }
        }
        if (at->peer && !at->late.empty() && now() >= at->late_ns) {
            (void)vkp_test_peer_send_text(at->peer.get(), std::exchange(at->late, "").c_str());
            active = true;
        }
        if (!at->peer || vkp_test_peer_is_ended(at->peer.get())) {
            at = connections.erase(at);
            active = true;
        } else {
            ++at;
        }
    }
    while (Peer peer = listener.try_accept()) {
        bool probe = false;
        for (const Connection &each : connections) {
            probe = probe || !each.is_probe;
        }
        connections.push_back(
            {std::move(peer), probe, false, false, false, false, probe ? -1 : accepted, {}, "", 0});
        accepted += probe ? 0 : 1;
        active = true;
        if (!probe && the.step == ACCEPT && misbehaved < the.times) {
            misbehave(connections.back(), ACCEPT, "");
        }
    }
    return active;
}

// One message for each name. Where a connection holds the name it is written there.
void Server::publish(const bool *promised)
{
    for (int i = 0; i < name_count; i++) {
        const std::string number = std::to_string(messages.size());
        messages.push_back({i, now(), promised[i], false});
        for (Connection &each : connections) {
            if (each.peer && !each.stalled && each.held.count(names[i]) != 0) {
                const std::string text =
                    kinds[i] == VKP_SUB_PATTERN ? push(each, {"pmessage", names[i], "px", number})
                    : kinds[i] == VKP_SUB_SHARD ? push(each, {"smessage", names[i], number})
                                                : push(each, {"message", names[i], number});
                (void)vkp_test_peer_send_text(each.peer.get(), text.c_str());
            }
        }
    }
}

std::string Server::greeting(Connection &with) const
{
    with.resp3 = true;
    return "%4\r\n+proto\r\n:3\r\n+id\r\n:77\r\n+role\r\n+master\r\n+version\r\n+8.0.1\r\n";
}

std::string Server::subscribed(Connection &with, const std::string &verb, const std::string &name)
{
    std::string text = ">3\r\n" + bulk(verb) + bulk(name) + ":1\r\n";
    text[0] = with.resp3 ? '>' : '*';
    return text;
}

// What CLIENT INFO and CLIENT LIST say of the connection that is no probe.
std::string Server::counts() const
{
    int of[VKP_SUB_KINDS] = {0, 0, 0};
    for (const Connection &each : connections) {
        for (int i = 0; i < name_count && !each.is_probe; i++) {
            of[kinds[i]] += each.held.count(names[i]) != 0 ? 1 : 0;
        }
    }
    return bulk(std::string("id=77 flags=") + (is_slow() ? "b" : "N") +
                " sub=" + std::to_string(of[0]) + " psub=" + std::to_string(of[1]) +
                " ssub=" + std::to_string(of[2]) + "\n");
}

// long: one case for each command that a client sends.
void Server::answer(Connection &with, const std::vector<std::string> &words)
{
    const std::string &verb = words[0];
    const std::string second = words.size() > 1 ? words[1] : "";
    Connection before = {nullptr, false, with.resp3, false, false, false, 0, with.held, "", 0};
    Step step = OTHER_STEP;
    std::string right = "+OK\r\n";
    if (verb == "HELLO" && !with.resp3) {
        step = with.is_probe ? PROBE_GREETING : GREETING;
        const bool known = words.size() > 2 && words[2] == "AUTH";
        if (the.resp2) {
            step = OTHER_STEP;
            right = "-ERR unknown command 'HELLO'\r\n";
        } else if (the.step == PASSWORD && known) {
            step = OTHER_STEP;
            right = "-NOAUTH Authentication required.\r\n";
        } else {
            right = greeting(with);
        }
    } else if (verb == "HELLO") {
        step = FENCE;
        right = greeting(with);
    } else if (verb == "AUTH") {
        step = with.is_probe ? OTHER_STEP : PASSWORD;
    } else if (verb == "PING") {
        const bool login = !with.resp3 && !with.authenticated;
        with.authenticated = true;
        step = with.is_probe  ? (login ? OTHER_STEP : PROBE_PING)
               : login        ? LOGIN
               : second == "" ? HEARTBEAT
                              : FENCE;
        right = with.resp3           ? "+PONG\r\n"
                : !with.held.empty() ? "*2\r\n" + bulk("pong") + bulk(second)
                : second == ""       ? "+PONG\r\n"
                                     : bulk(second);
    } else if (verb == "CLIENT" && second == "SETNAME") {
        step = SETNAME;
    } else if (verb == "CLIENT" && second == "SETINFO") {
        step = with.is_probe ? OTHER_STEP : SETINFO;
    } else if (verb == "CLIENT" && second == "NO-EVICT") {
        step = SETUP;
    } else if (verb == "CLIENT" && second == "INFO") {
        step = HEARTBEAT;
        right = counts();
    } else if (verb == "CLIENT" && second == "LIST") {
        step = PROBE_LIST;
        right = counts();
    } else if (verb == "CLIENT" && second == "ID") {
        step = IDENTITY;
        right = ":77\r\n";
    } else if (verb == "SELECT") {
        step = DATABASE;
    } else if (verb == "GET") {
        step = COMMAND;
        right = bulk("value of " + second);
        if (is_slow() && (++commands == 2 || commands == 3)) {
            with.late = right;
            with.late_ns = now() + 20000 * ms;
            replies[atoi(second.c_str())] = right;
            return;
        }
    } else if (verb == "SUBSCRIBE" || verb == "PSUBSCRIBE" || verb == "SSUBSCRIBE") {
        const bool again = the.step == RESUBSCRIBE && with.number > 0 && second == "c";
        step = again                  ? RESUBSCRIBE
               : verb == "PSUBSCRIBE" ? PSUBSCRIBE
               : verb == "SSUBSCRIBE" ? SSUBSCRIBE
                                      : SUBSCRIBE;
        right = subscribed(with,
                           verb[0] == 'P'   ? "psubscribe"
                           : verb[1] == 'S' ? "ssubscribe"
                                            : "subscribe",
                           second);
        with.held.insert(second);
    } else if (verb == "UNSUBSCRIBE") {
        step = UNSUBSCRIBE;
        right = subscribed(with, "unsubscribe", second);
        with.held.erase(second);
    } else if (verb.find("vkp-fence") == 0) { // where PING is refused
        step = FENCE;
        right = "-ERR unknown command '" + verb + "'\r\n";
    } else {
        vkp_test_fail("an unknown command: %s", verb.c_str());
    }
    if (step == the.step && misbehaved < the.times) {
        const Misdeed::Kind kind = the.misdeed.kind;
        const bool answers = kind == Misdeed::SURPLUS || kind == Misdeed::PUSH ||
                             kind == Misdeed::TORN || kind == Misdeed::CONFIRMATION ||
                             kind == Misdeed::FORGET;
        const bool left =
            step == UNSUBSCRIBE && kind == Misdeed::ERROR && the.misdeed.text[0] == 'M';
        if (!answers) {
            with.resp3 = before.resp3;
        }
        if (!answers && !left) {
            with.held = before.held;
        }
        if (step == COMMAND) {
            replies[atoi(second.c_str())] = kind == Misdeed::ERROR        ? "-"
                                            : kind == Misdeed::OTHER_TYPE ? ":42\r\n"
                                                                          : right;
        }
        misbehave(with, step, right);
        return;
    }
    if (step == COMMAND) {
        replies[atoi(second.c_str())] = right;
    }
    if (!with.late.empty()) { // a server answers in order
        with.late += right;
    } else {
        (void)vkp_test_peer_send_text(with.peer.get(), right.c_str());
    }
}

void Server::misbehave(Connection &with, Step step, const std::string &right)
{
    const std::string message = push(with, {"message", "c", "half"});
    std::string text;
    bool ends = false;
    misbehaved++;
    switch (the.misdeed.kind) {
    case Misdeed::ERROR:
        text = "-" + std::string(the.misdeed.text) + "\r\n";
        ends = step == ACCEPT;
        harmless += (step >= IDENTITY && step <= UNSUBSCRIBE) || step == SETNAME ||
                            step == SETINFO || step == COMMAND || step == HEARTBEAT ||
                            step == RESUBSCRIBE
                        ? 1
                        : 0;
        break;
    case Misdeed::STALL:
        with.stalled = true;
        with.silent = true;
        break;
    case Misdeed::SILENCE:
        with.silent = true;
        break;
    case Misdeed::CLOSE:
        ends = true;
        break;
    case Misdeed::HALF:
        text = right.substr(0, right.size() / 2);
        ends = true;
        break;
    case Misdeed::TORN:
        text = right + message.substr(0, message.size() / 2);
        ends = true;
        break;
    case Misdeed::SURPLUS:
        text = right + "+OK\r\n";
        break;
    case Misdeed::OTHER_TYPE:
        text = ":42\r\n";
        break;
    case Misdeed::PUSH:
        text = push(with, {"news", "of the day"}) + right;
        harmless += with.resp3 ? 1 : 0;
        break;
    case Misdeed::FORGET:
        with.held.clear();
        text = step == HEARTBEAT && with.resp3 ? counts() : right;
        harmless++;
        break;
    case Misdeed::CONFIRMATION:
        text = subscribed(with, "subscribe", "nobody's") + right;
        break;
    case Misdeed::GARBAGE:
        text = std::string("\x01 garbage\r\n") + right;
        break;
    }
    (void)vkp_test_peer_send_text(with.peer.get(), text.c_str());
    if (ends) {
        with.peer.reset();
    }
}

// ---------------------------------------------------------------------------------------------
// The program

struct Gap {
    uint64_t from_ns;
    uint64_t to_ns;
    bool covers[name_count];
};

class Session {
  public:
    explicit Session(const Case &of) : loop(&vkp_backend_null, 1), server(loop, of), the(of)
    {
        static const vkp_str argv[] = {vkp_str_of("CLIENT"), vkp_str_of("NO-EVICT"),
                                       vkp_str_of("ON")};
        static const vkp_client_setup setup = {3, argv, vkp_str_of("OK"), false};
        vkp_client_config config = server.listener.config();
        loop.test.env.log = nullptr;
        config.username = vkp_str_of("ann");
        config.password = vkp_str_of("pw");
        config.name = vkp_str_of("session");
        config.database = 2;
        config.setup = &setup;
        config.setup_count = 1;
        config.on_push = [](void *user, const vkp_push *push) {
            static_cast<Session *>(user)->on_push(*push);
        };
        config.user = this;
        REQUIRE(vkp_client_open(loop, &config, &client) == VKP_OK);
    }
    ~Session()
    {
        vkp_client_unref(client);
        loop.round();
    }
    void play();

  private:
    // Rounds until it is so, or for so many virtual milliseconds.
    template <typename Condition>
    bool wait(const char *what, Condition condition);
    void pass(uint64_t virtual_ms)
    {
        const uint64_t end = loop.now() + virtual_ms * ms;
        (void)wait("time", [&] { return loop.now() >= end; });
    }
    void ask();
    void leave();
    void on_push(const vkp_push &push);
    void on_message(const vkp_push &push);
    void check_books();
    bool all_on() const
    {
        bool all = vkp_client_get_state(client) == VKP_CLIENT_READY;
        for (int i = 0; i < name_count; i++) {
            all = all && on[i] == wanted[i];
        }
        return all;
    }
    void wrong(const std::string &what)
    {
        if (problem.empty()) {
            problem = what;
        }
    }
    Loop loop;
    Server server;
    const Case &the;
    vkp_client *client = nullptr;
    bool wanted[name_count] = {true, true, true, true};
    bool on[name_count] = {};       // confirmed, as the events say
    bool promised[name_count] = {}; // confirmed once, and not left
    int connected = 0;
    int disconnected = 0;
    int failed = 0;
    bool failure_told = false;
    std::vector<Gap> gaps;
    int last[name_count] = {-1, -1, -1, -1};
    vkp_test_done dones[name_count + 1];
    std::list<Sending> sendings;
    std::string problem;
};

template <typename Condition>
bool Session::wait(const char *what, Condition condition)
{
    const uint64_t end = loop.now() + 300 * 1000 * ms;
    while (!condition()) {
        const uint64_t tick = loop.now() + 250 * ms;
        if (loop.now() > end) {
            wrong(std::string("waited in vain for ") + what);
            return false;
        }
        for (int i = 0; i < 2; i++) {
            loop.round();
            i = server.pump() ? 0 : i;
        }
        server.publish(promised);
        loop.round(); // what was published arrives before the time passes
        loop.round(tick);
    }
    return problem.empty();
}

void Session::on_message(const vkp_push &push)
{
    const std::string name(
        vkp_test_view(push.kind == VKP_PUSH_PMESSAGE ? push.pattern : push.channel));
    const std::string payload(vkp_test_view(push.payload));
    const size_t number = static_cast<size_t>(atoi(payload.c_str()));
    if (number >= server.messages.size() || name != names[server.messages[number].name]) {
        wrong("a message that nobody published: " + payload);
        return;
    }
    Published &message = server.messages[number];
    if (message.delivered || static_cast<int>(number) <= last[message.name]) {
        wrong("message " + payload + " twice or out of order");
    }
    message.delivered = true;
    last[message.name] = static_cast<int>(number);
}

void Session::on_push(const vkp_push &push)
{
    int at = name_count;
    for (int i = 0; i < name_count; i++) {
        at = push.sub == kinds[i] && vkp_test_view(push.channel) == names[i] ? i : at;
    }
    switch (push.kind) {
    case VKP_PUSH_MESSAGE:
    case VKP_PUSH_PMESSAGE:
    case VKP_PUSH_SMESSAGE:
        on_message(push);
        break;
    case VKP_PUSH_SUBSCRIBED:
        if (at < name_count) {
            on[at] = true;
            promised[at] = promised[at] || wanted[at];
        }
        break;
    case VKP_PUSH_UNSUBSCRIBED:
    case VKP_PUSH_LOST:
    case VKP_PUSH_REFUSED:
        if (at < name_count) {
            on[at] = false;
        }
        break;
    case VKP_PUSH_GAP: {
        Gap gap = {push.gap->from_ns, push.gap->to_ns, {}};
        for (int i = 0; i < name_count; i++) {
            gap.covers[i] = push.gap->name_count == 0 && on[i];
            for (size_t k = 0; k < push.gap->name_count; k++) {
                const vkp_sub_name &name = push.gap->names[k];
                gap.covers[i] = gap.covers[i] ||
                                (name.kind == kinds[i] && vkp_test_view(name.name) == names[i]);
            }
            if (gap.covers[i] && (!on[i] || !promised[i])) {
                wrong("a GAP covers a name that is not back");
            }
        }
        gaps.push_back(gap);
        break;
    }
    case VKP_PUSH_CONNECTED:
    case VKP_PUSH_RECONNECTED:
        if (connected != disconnected || (push.kind == VKP_PUSH_CONNECTED) != (connected == 0)) {
            wrong("connected twice");
        }
        connected++;
        failure_told = false;
        break;
    case VKP_PUSH_DISCONNECTED:
        disconnected++;
        if (connected != disconnected) {
            wrong("DISCONNECTED twice");
        }
        for (bool &each : on) {
            each = false;
        }
        break;
    case VKP_PUSH_CONNECT_FAILED:
        if (failure_told || connected != disconnected) {
            wrong("CONNECT_FAILED twice");
        }
        failure_told = true;
        failed++;
        break;
    case VKP_PUSH_OTHER:
        break;
    case VKP_PUSH_INVALIDATE:
    case VKP_PUSH_LAGGED:
        wrong("an event of another kind");
        break;
    }
}

// One command, and its outcome. What the client does not take while it waits is sent later.
void Session::ask()
{
    const std::string number = std::to_string(sendings.size());
    sendings.emplace_back();
    Sending &sending = sendings.back();
    if (wait("a client that takes commands", [&] {
            return sending.send(client, wire({"GET", number}), 1) == VKP_OK;
        })) {
        (void)wait("an outcome", [&] { return sending.calls == 1; });
    }
}

void Session::leave()
{
    wanted[leaver] = false;
    promised[leaver] = false;
    // The next audit would have found what was forgotten. It is too late for a name that is left.
    for (Published &message : server.messages) {
        const bool forgiven = the.misdeed.kind == Misdeed::FORGET && message.name == leaver;
        message.promised = message.promised && !forgiven;
    }
    REQUIRE(vkp_client_unsubscribe(client, VKP_SUB_CHANNEL, vkp_str_of(names[leaver])) == VKP_OK);
}

void Session::play()
{
    for (int i = 0; i < name_count; i++) {
        REQUIRE(dones[i].subscribe(client, names[i], kinds[i]) == VKP_OK);
    }
    // A command in flight behind a surplus reply gets it, and nobody can tell.
    const bool alone = the.misdeed.kind == Misdeed::SURPLUS;
    if (!alone) {
        ask(); // waits for the handshake
    }
    (void)wait("all names", [&] { return all_on(); });
    for (int i = 0; i < 3; i++) {
        ask();
        pass(100);
    }
    leave();
    pass(alone ? 1000 : 0);
    ask();
    pass(20000); // a heartbeat
    (void)wait("all names but one", [&] { return all_on(); });
    server.hang_up();
    pass(1);
    (void)wait("all names again", [&] { return all_on(); });
    ask();
    pass(40000);
    wanted[leaver] = true;
    REQUIRE(dones[name_count].subscribe(client, names[leaver]) == VKP_OK);
    (void)wait("the name that comes again", [&] { return all_on(); });
    leave();
    pass(alone ? 1000 : 0);
    ask();
    pass(20000); // whatever is due is overdue by then
    (void)wait("all names at the end", [&] { return all_on(); });
    ask();
    pass(500);
    check_books();
}

void Session::check_books()
{
    vkp_client_stats stats;
    vkp_client_get_stats(client, &stats);
    CHECK(problem == "");
    // A name is subscribed again once, unless the first misdeed costs the connection.
    const bool once = the.step == RESUBSCRIBE && server.harmless == 1;
    CHECK(server.misbehaved == (once ? 1 : the.times));
    CHECK(connected == disconnected + 1);
    CHECK(stats.outages == static_cast<uint64_t>(disconnected));
    CHECK(stats.connections == static_cast<uint64_t>(connected));
    CHECK(disconnected >= 1); // the one of the session
    size_t missing = 0;
    for (const Published &message : server.messages) {
        bool covered = message.delivered || !message.promised;
        for (const Gap &gap : gaps) {
            covered = covered || (gap.covers[message.name] && gap.from_ns <= message.at &&
                                  message.at <= gap.to_ns);
        }
        missing += covered ? 0 : 1;
    }
    CHECK(missing == 0);
    int number = 0;
    for (const Sending &sending : sendings) {
        const std::string wrote = server.replies[number++];
        CHECK(sending.calls == 1);
        if (sending.status != VKP_OK) {
            CHECK((sending.status == VKP_ERR_DISCONNECTED || sending.status == VKP_ERR_REFUSED));
        } else if (wrote == "-") {
            CHECK(sending.frame == "-" + std::string(the.misdeed.text) + "\r\n");
        } else {
            CHECK(sending.frame == wrote);
        }
    }
    for (const Done &done : dones) {
        CHECK(done.calls == 1);
    }
    // What lets replies and commands get out of step costs the connection.
    if (the.misdeed.kind == Misdeed::SURPLUS && the.step >= SUBSCRIBE && the.step <= HEARTBEAT) {
        CHECK(disconnected > 1);
    }
    // What is no fault of the connection costs none.
    if (server.harmless == server.misbehaved) {
        CHECK(disconnected == 1);
        CHECK(failed == 0);
    }
}

void play(Step step, bool resp2)
{
    for (const Misdeed &misdeed : misdeeds) {
        for (int times = 1; times <= 2; times++) {
            const Case one = {step, resp2, misdeed, times};
            INFO(step_names[step] << (resp2 ? " in RESP2" : "") << ": " << misdeed.text << ", "
                                  << times << " times");
            Session session(one);
            session.play();
        }
    }
}

} // namespace

TEST_CASE("session: with nothing wrong the books balance", "[client]")
{
    const bool resp2 = GENERATE(false, true);
    const Case one = {OTHER_STEP, resp2, {Misdeed::PUSH, ""}, 0};
    Session session(one);
    session.play();
}

TEST_CASE("session: a server that misbehaves at a step of RESP3", "[client]")
{
    const Step step =
        GENERATE(ACCEPT, GREETING, PASSWORD, SETINFO, DATABASE, SETUP, SUBSCRIBE, PSUBSCRIBE,
                 SSUBSCRIBE, UNSUBSCRIBE, FENCE, COMMAND, HEARTBEAT, RESUBSCRIBE);
    play(step, false);
}

TEST_CASE("session: a server that misbehaves at a step of a probe", "[client]")
{
    const Step step = GENERATE(PROBE_GREETING, PROBE_PING, PROBE_LIST);
    play(step, false);
}

TEST_CASE("session: a server that misbehaves at a step of RESP2", "[client]")
{
    const Step step =
        GENERATE(PASSWORD, LOGIN, SETNAME, DATABASE, SETUP, IDENTITY, SUBSCRIBE, PSUBSCRIBE,
                 SSUBSCRIBE, UNSUBSCRIBE, FENCE, HEARTBEAT, PROBE_LIST, RESUBSCRIBE);
    play(step, true);
}
