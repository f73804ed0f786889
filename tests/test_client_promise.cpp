// SPDX-License-Identifier: MIT
//
// What a client promises about its subscriptions and replies, against servers that do what real
// ones do on their bad days: every message is delivered or inside a gap that was told, and every
// reply is at its asker.
#include "support/catch.hpp"
#include "support/fake_server.h"

#include <string>
#include <thread>
#include <vector>

namespace {

// A client with these names confirmed, on a server that the test plays.
class Subscribed {
  public:
    Subscribed(vkp_loop *loop, const std::vector<std::string> &names,
               vkp_sub_kind kind = VKP_SUB_CHANNEL)
        : Subscribed(loop, names, nullptr, kind)
    {
    }
    Subscribed(vkp_loop *loop, const std::vector<std::string> &names,
               vkp_client_config (*change)(vkp_client_config), vkp_sub_kind kind = VKP_SUB_CHANNEL)
        : client(loop, change != nullptr ? change(server.config()) : server.config())
    {
        peer = server.greet(loop, client);
        for (const std::string &name : names) {
            client.subscribe(name.c_str(), kind);
            (void)heard(loop, peer);
            say(peer, confirm(kind == VKP_SUB_SHARD ? "ssubscribe" : "subscribe", name));
        }
        until_events(loop, client, 1 + names.size());
        client.events.clear();
    }
    FakeServer server;
    Client client;
    Peer peer;
};

std::string leave(vkp_loop *loop, Subscribed &with, const char *name,
                  vkp_sub_kind kind = VKP_SUB_CHANNEL)
{
    with.client.unsubscribe(name, kind);
    const std::string command = heard(loop, with.peer);
    CHECK(heard(loop, with.peer) == wire({"HELLO", "3"}));
    return command;
}

} // namespace

// ---------------------------------------------------------------------------------------------
// Replies are keyed

TEST_CASE("promise: however a server answers UNSUBSCRIBE, each reply is at its asker", "[client]")
{
    // The fourth happens when a slot leaves: its push crosses the command, whose own answer is an
    // error then.
    struct Form {
        const char *what;
        std::string answer;
        bool done; // otherwise the client asks again
    };
    const Form form = GENERATE(
        Form{"a push for the name", confirm("sunsubscribe", "s", 0), true},
        Form{"a push for no name", ">3\r\n$12\r\nsunsubscribe\r\n_\r\n:0\r\n", true},
        Form{"an error: not subscribed", "-NOSUB not subscribed\r\n", true},
        Form{"a push, then an error",
             confirm("sunsubscribe", "s", 0) + "-MOVED 5 127.0.0.1:7001\r\n", true},
        Form{"an error: moved", "-MOVED 5 127.0.0.1:7001\r\n", true},
        Form{"an error: busy", "-BUSY a script runs\r\n", false}, Form{"nothing", "", true});
    INFO(form.what);
    Loop loop;
    Subscribed with(loop, {"s"}, VKP_SUB_SHARD);
    CHECK(leave(loop, with, "s", VKP_SUB_SHARD) == wire({"SUNSUBSCRIBE", "s"}));
    Question first(with.client, {"GET", "1"});
    Question second(with.client, {"GET", "2"});
    CHECK(heard(loop, with.peer) == wire({"GET", "1"}));
    CHECK(heard(loop, with.peer) == wire({"GET", "2"}));
    say(with.peer, form.answer + hello_reply + "+one\r\n-two\r\n");
    CHECK(first.text_on(loop) == "one");
    CHECK(second.text_on(loop) == "error: two");
    if (form.done) {
        CHECK(with.client.history() == "unsubscribed s");
        with.client.subscribe("s", VKP_SUB_SHARD);
        CHECK(heard(loop, with.peer) == wire({"SSUBSCRIBE", "s"}));
    } else {
        CHECK(with.client.history().empty());
        CHECK(heard(loop, with.peer) == wire({"SUNSUBSCRIBE", "s"}));
        CHECK(heard(loop, with.peer) == wire({"HELLO", "3"}));
        say(with.peer, confirm("sunsubscribe", "s", 0) + hello_reply);
        until_events(loop, with.client, 1);
        CHECK(with.client.history() == "unsubscribed s");
    }
}

TEST_CASE("promise: several names that leave share one fence", "[client]")
{
    Loop loop;
    Subscribed with(loop, {"a", "b", "c"}, VKP_SUB_SHARD);
    for (const char *name : {"a", "b", "c"}) {
        with.client.unsubscribe(name, VKP_SUB_SHARD);
    }
    for (const char *name : {"a", "b", "c"}) {
        CHECK(heard(loop, with.peer) == wire({"SUNSUBSCRIBE", name}));
    }
    CHECK(heard(loop, with.peer) == wire({"HELLO", "3"}));
    Question next(with.client, {"NEXT"});
    CHECK(heard(loop, with.peer) == wire({"NEXT"}));
    // In another order than asked, one by an error, one with an error besides.
    say(with.peer, confirm("sunsubscribe", "c", 2) + "-MOVED 1 x:1\r\n" +
                       confirm("sunsubscribe", "b", 1) + "-MOVED 2 x:1\r\n" + hello_reply +
                       "+n\r\n");
    CHECK(next.text_on(loop) == "n");
    CHECK(with.client.count(VKP_PUSH_UNSUBSCRIBED) == 3);
    CHECK(with.client.count(VKP_PUSH_DISCONNECTED) == 0);
}

TEST_CASE("promise: what cannot be told apart ends the connection, and no reply is shifted",
          "[client]")
{
    const std::string answer = GENERATE(
        // a surplus error, a reply in place of the fence, another connection's greeting
        confirm("unsubscribe", "c", 0) + "-ERR one\r\n-ERR two\r\n",
        confirm("unsubscribe", "c", 0) + "+OK\r\n", std::string("%1\r\n+a\r\n+b\r\n"));
    Loop loop;
    Subscribed with(loop, {"c"});
    (void)leave(loop, with, "c");
    Question next(with.client, {"NEXT"});
    CHECK(heard(loop, with.peer) == wire({"NEXT"}));
    say(with.peer, answer + "+n\r\n");
    CHECK(next.text_on(loop) == vkp_status_str(VKP_ERR_CLOSED));
    CHECK(with.client.count(VKP_PUSH_DISCONNECTED) == 1);
}

TEST_CASE("promise: a confirmation of another name than was due ends the connection", "[client]")
{
    Loop loop;
    Subscribed with(loop, {});
    with.client.subscribe("a");
    CHECK(heard(loop, with.peer) == wire({"SUBSCRIBE", "a"}));
    say(with.peer, confirm("subscribe", "b"));
    hung_up(loop, with.peer);
    CHECK(with.client.error() == "a confirmation of another name than was due");
}

// ---------------------------------------------------------------------------------------------
// Pushes inside replies

TEST_CASE("promise: a push inside a reply is delivered with its own bytes, and taken out",
          "[client]")
{
    // Servers before 7.2 write a message into the reply that is being
    // written, at any depth and under any type; before 7.0 invalidations too.
    const std::string m1 = push({"message", "c", "one"});
    const std::string m2 = push({"pmessage", "c*", "c", "two"});
    const std::string gone = ">2\r\n$10\r\ninvalidate\r\n*1\r\n$1\r\nk\r\n";
    struct Form {
        std::string with;
        std::string without;
        std::string text;
    };
    const Form form =
        GENERATE_COPY(Form{"*2\r\n" + m1 + ":1\r\n" + m2 + ":2\r\n", "*2\r\n:1\r\n:2\r\n", "[1 2]"},
                      Form{"*1\r\n*2\r\n$1\r\na\r\n" + m1 + m2 + "$1\r\nb\r\n",
                           "*1\r\n*2\r\n$1\r\na\r\n$1\r\nb\r\n", "[[a b]]"},
                      Form{"%1\r\n" + m1 + "+k\r\n*1\r\n*2\r\n+x\r\n" + m2 + "*0\r\n",
                           "%1\r\n+k\r\n*1\r\n*2\r\n+x\r\n*0\r\n", "<k [[x []]]>"},
                      Form{"~1\r\n" + m1 + m2 + "_\r\n", "~1\r\n_\r\n", "{null}"});
    const bool whole = GENERATE(true, false);
    Loop loop;
    Subscribed with(loop, {"c"});
    Sending sending;
    REQUIRE(sending.send(with.client, wire({"X"}), 1) == VKP_OK);
    Question after(with.client, {"Y"});
    (void)heard(loop, with.peer);
    (void)heard(loop, with.peer);
    const std::string all = form.with + "*1\r\n" + gone + "+y\r\n";
    if (whole) {
        say(with.peer, all);
    } else {
        for (char byte : all) {
            say(with.peer, std::string(1, byte));
            loop.round();
        }
    }
    CHECK(after.text_on(loop) == "[y]");
    CHECK(sending.text == form.text);
    CHECK(sending.frame == form.without);
    CHECK(with.client.history() == "message c one, pmessage c* c two, invalidate");
    CHECK(with.client.events[0].frame == m1);
    CHECK(with.client.events[1].frame == m2);
    CHECK(with.client.events[2].frame == gone);
}

TEST_CASE("promise: a confirmation inside a reply is its element", "[client]")
{
    Loop loop;
    Subscribed with(loop, {});
    Sending sending;
    REQUIRE(sending.send(with.client, wire({"EXEC"}), 1) == VKP_OK);
    (void)heard(loop, with.peer);
    const std::string reply = "*2\r\n" + confirm("subscribe", "c") + ":1\r\n";
    say(with.peer, reply);
    vkp_test_run_until(loop, "the reply", [&] { return sending.calls == 1; });
    CHECK(sending.frame == reply);
    CHECK(with.client.history().empty());
}

// ---------------------------------------------------------------------------------------------
// Replies over a limit

TEST_CASE("promise: a reply whose shape is refused fails its own command alone", "[client]")
{
    // Depth, line, number syntax.
    std::string deep;
    for (int i = 0; i < 200; i++) {
        deep += "*1\r\n";
    }
    struct Form {
        const char *what;
        std::string reply;
    };
    const Form form = GENERATE_COPY(
        Form{"200 levels", deep + ":1\r\n"},
        Form{"a long status", "+" + std::string(70000, 'x') + "\r\n"},
        Form{"a long error", "-" + std::string(70000, 'x') + "\r\n"},
        Form{"a big number that is none", "(abc\r\n"}, Form{"a double that is none", ",abc\r\n"},
        Form{"an integer beyond 64 bits", "*2\r\n:99999999999999999999\r\n$1\r\nx\r\n"},
        Form{"a boolean that is none", "#x\r\n"},
        Form{"in the midst of an array", "*3\r\n+a\r\n(abc\r\n%1\r\n+k\r\n$4\r\n(b\r\n\r\n"},
        Form{"behind an attribute", "|1\r\n+a\r\n:1\r\n(abc\r\n"},
        Form{"a bulk that is too long", bulk(std::string(5001, 'x'))},
        Form{"a long bulk in an array", "*2\r\n" + bulk(std::string(5001, 'x')) + "+b\r\n"});
    const size_t cut = GENERATE(size_t{0}, size_t{1}, size_t{4093});
    INFO(form.what);
    Loop loop;
    Subscribed with(loop, {"c"}, [](vkp_client_config config) {
        config.resp.max_bulk_bytes = 5000;
        return config;
    });
    Question before(with.client, {"A"});
    Sending refused;
    REQUIRE(refused.send(with.client, wire({"B"}), 1) == VKP_OK);
    Question slot(with.client, {"C"});
    Question after(with.client, {"D"});
    for (int i = 0; i < 4; i++) {
        (void)heard(loop, with.peer);
    }
    const std::string all =
        "+a\r\n" + form.reply + push({"message", "c", "m"}) + form.reply + "+d\r\n";
    const size_t piece = cut == 0 ? all.size() : cut == 1 && all.size() > 4000 ? 977 : cut;
    for (size_t at = 0; at < all.size(); at += piece) {
        say(with.peer, all.substr(at, piece));
        loop.round();
    }
    CHECK(after.text_on(loop) == "d");
    CHECK(before.text_on(loop) == "a");
    CHECK(refused.status == VKP_ERR_LIMIT);
    CHECK(refused.calls == 1);
    CHECK(slot.text_on(loop) == vkp_status_str(VKP_ERR_CLOSED));
    CHECK(with.client.history() == "message c m");
}

TEST_CASE("promise: what is refused and has no known end, or is a push, ends the connection",
          "[client]")
{
    const std::string bad = GENERATE(std::string("$x\r\n"), std::string("*abc\r\n"),
                                     ">3\r\n+message\r\n+c\r\n+" + std::string(70000, 'x') + "\r\n",
                                     std::string("$3\r\nabcd\r\n"));
    Loop loop;
    Subscribed with(loop, {"c"});
    Question one(with.client, {"A"});
    (void)heard(loop, with.peer);
    say(with.peer, bad);
    CHECK(one.text_on(loop) == vkp_status_str(VKP_ERR_CLOSED));
    CHECK(with.client.history() == "disconnected");
}

// ---------------------------------------------------------------------------------------------
// Subscriptions

TEST_CASE("promise: a first refusal is an event, and the name is asked for again", "[client]")
{
    const vkp_sub_kind kind = GENERATE(VKP_SUB_CHANNEL, VKP_SUB_PATTERN, VKP_SUB_SHARD);
    const char *verbs[] = {"SUBSCRIBE", "PSUBSCRIBE", "SSUBSCRIBE"};
    const char *confirmations[] = {"subscribe", "psubscribe", "ssubscribe"};
    const char *words =
        GENERATE("NOPERM no permissions", "MOVED 1 127.0.0.1:1", "BUSY wait", "ERR whatever");
    Loop loop(&vkp_backend_null, 0); // its clock jumps over the waits
    Subscribed with(loop, {});
    Done done;
    REQUIRE(done.subscribe(with.client, "n", kind) == VKP_OK);
    CHECK(heard(loop, with.peer) == wire({verbs[kind], "n"}));
    say(with.peer, "-" + std::string(words) + "\r\n");
    vkp_test_run_until(loop, "the outcome", [&] { return done.calls == 1; });
    CHECK(done.status == VKP_ERR_REFUSED);
    CHECK(done.words == words);
    CHECK(with.client.history() == "refused n");
    CHECK(with.client.events[0].sub == kind);
    CHECK(with.client.events[0].payload == words);
    CHECK(with.client.events[0].frame.empty());
    CHECK(heard(loop, with.peer) == wire({verbs[kind], "n"}));
    say(with.peer, confirm(confirmations[kind], "n"));
    until_events(loop, with.client, 2);
    // Nothing was confirmed before: nothing can be missing.
    CHECK(with.client.history() == "refused n, subscribed n");
    CHECK(done.calls == 1);
}

TEST_CASE("promise: one who leaves takes nothing from another who stays", "[client]")
{
    // what only one of several wants.
    Loop loop;
    Subscribed with(loop, {});
    Done first, second;
    REQUIRE(first.subscribe(with.client, "c") == VKP_OK);
    REQUIRE(second.subscribe(with.client, "c") == VKP_OK);
    CHECK(heard(loop, with.peer) == wire({"SUBSCRIBE", "c"}));
    say(with.peer, "-BUSY a script runs\r\n");
    vkp_test_run_until(loop, "both", [&] { return first.calls == 1 && second.calls == 1; });
    with.client.unsubscribe("c"); // the first gives up: nothing goes out
    CHECK(heard(loop, with.peer) == wire({"SUBSCRIBE", "c"}));
    say(with.peer, confirm("subscribe", "c"));
    until_events(loop, with.client, 2);
    CHECK(with.client.history() == "refused c, subscribed c");
    with.client.unsubscribe("c");
    CHECK(heard(loop, with.peer) == wire({"UNSUBSCRIBE", "c"}));
}

TEST_CASE("promise: whoever wants a refused name asks at once", "[client]")
{
    Loop loop(&vkp_backend_null, 0);
    Subscribed with(loop, {});
    Done first, second;
    REQUIRE(first.subscribe(with.client, "c") == VKP_OK);
    CHECK(heard(loop, with.peer) == wire({"SUBSCRIBE", "c"}));
    say(with.peer, "-NOPERM no\r\n");
    vkp_test_run_until(loop, "the first", [&] { return first.calls == 1; });
    const uint64_t now = loop.now();
    REQUIRE(second.subscribe(with.client, "c") == VKP_OK);
    CHECK(heard(loop, with.peer) == wire({"SUBSCRIBE", "c"}));
    CHECK(loop.now() == now);
    say(with.peer, confirm("subscribe", "c"));
    vkp_test_run_until(loop, "the second", [&] { return second.calls == 1; });
    CHECK(second.status == VKP_OK);
    CHECK(first.status == VKP_ERR_REFUSED);
}

TEST_CASE("promise: left while refused, a name is asked for no more", "[client]")
{
    Loop loop(&vkp_backend_null, 0);
    Subscribed with(loop, {});
    with.client.subscribe("c");
    CHECK(heard(loop, with.peer) == wire({"SUBSCRIBE", "c"}));
    say(with.peer, "-NOPERM no\r\n");
    until_events(loop, with.client, 1);
    with.client.unsubscribe("c");
    CHECK(heard(loop, with.peer) == wire({"CLIENT", "INFO"})); // the heartbeat comes next
    CHECK(with.client.history() == "refused c");
}

TEST_CASE("promise: a name taken away is asked for again, and its gap names it", "[client]")
{
    Loop loop;
    Subscribed with(loop, {"a", "b"}, VKP_SUB_SHARD);
    const uint64_t before = loop.now();
    say(with.peer, confirm("sunsubscribe", "a", 0));
    CHECK(heard(loop, with.peer) == wire({"SSUBSCRIBE", "a"}));
    say(with.peer, confirm("ssubscribe", "a"));
    until_events(loop, with.client, 3);
    CHECK(with.client.history() == "lost a, subscribed a, gap a");
    CHECK(with.client.events[0].payload == "the server ended the subscription");
    CHECK(with.client.events[2].gap.from_ns <= before);
    CHECK(with.client.events[2].gap.to_ns >= before);
}

TEST_CASE("promise: a gap begins when the last request was sent that was answered", "[client]")
{
    // the path swallows bytes; the loss is noticed seconds later. Bytes that arrive
    // are no proof either: they may have been on their way since before what is lost was published.
    Loop loop(&vkp_backend_null, 0);
    Subscribed with(loop, {"c"});
    CHECK(heard(loop, with.peer) == wire({"CLIENT", "INFO"})); // after the default of 15 s
    const uint64_t good = loop.now();
    loop.round(good + 2000 * ms);
    say(with.peer, bulk("id=1 sub=1\n"));
    loop.round();
    say(with.peer, push({"message", "c", "last"}));
    until_events(loop, with.client, 1);
    with.server.close(); // nobody is there who could be asked
    vkp_test_run_until(loop, "the loss",
                       [&] { return with.client.count(VKP_PUSH_DISCONNECTED) == 1; });
    CHECK(loop.now() == good + 20000 * ms); // the next heartbeat, and its reply_timeout_ms
    CHECK(with.client.events[1].payload == "the server does not answer");
    with.server.open();
    Peer peer = with.server.greet(loop);
    CHECK(heard(loop, peer) == wire({"SUBSCRIBE", "c"}));
    say(peer, confirm("subscribe", "c"));
    vkp_test_run_until(loop, "the gap", [&] { return with.client.count(VKP_PUSH_GAP) == 1; });
    CHECK(with.client.events.back().gap.from_ns == good);
    CHECK(with.client.events.back().gap.to_ns == loop.now());
}

TEST_CASE("promise: a reply that does not fit is no proof that the connection was good", "[client]")
{
    // It was written before the request that it seems to answer, and what follows it is not read.
    Loop loop(&vkp_backend_null, 0);
    Subscribed with(loop, {"c"});
    const uint64_t good = loop.now();
    loop.round(good + 1000 * ms);
    with.client.subscribe("d");
    CHECK(heard(loop, with.peer) == wire({"SUBSCRIBE", "d"}));
    say(with.peer, "+OK\r\n" + push({"message", "c", "of long ago"}));
    vkp_test_run_until(loop, "the loss",
                       [&] { return with.client.count(VKP_PUSH_DISCONNECTED) == 1; });
    CHECK(with.client.count(VKP_PUSH_MESSAGE) == 0);
    Peer peer = with.server.greet(loop);
    (void)confirm_asked(loop, peer);
    (void)confirm_asked(loop, peer);
    vkp_test_run_until(loop, "the gap", [&] { return with.client.count(VKP_PUSH_GAP) == 1; });
    CHECK(with.client.events.back().gap.from_ns == good);
}

TEST_CASE("promise: leaving the name that a gap waits for tells the gap of the others", "[client]")
{
    Loop loop;
    Subscribed with(loop, {"a", "b"});
    with.peer.reset();
    until_state(loop, with.client, VKP_CLIENT_WAITING);
    Peer peer = with.server.greet(loop, with.client);
    const std::string back = confirm_asked(loop, peer);
    const std::string other = back == "a" ? "b" : "a";
    until_events(loop, with.client, 3);
    CHECK(with.client.count(VKP_PUSH_GAP) == 0);
    with.client.unsubscribe(other.c_str());
    until_events(loop, with.client, 4);
    CHECK(with.client.history() == "disconnected, reconnected, subscribed " + back + ", gap");
    CHECK(with.client.events[3].gap.name_count == 0);
}

TEST_CASE("promise: a refused SUBSCRIBE ends nothing that the server holds", "[client]")
{
    // A script runs for a while: leaving is refused, and so is wanting again.
    Loop loop(&vkp_backend_null, 0);
    Subscribed with(loop, {"c"});
    CHECK(leave(loop, with, "c") == wire({"UNSUBSCRIBE", "c"}));
    with.client.subscribe("c");
    CHECK(heard(loop, with.peer) == wire({"SUBSCRIBE", "c"}));
    say(with.peer, std::string("-BUSY wait\r\n") + hello_reply + "-BUSY wait\r\n");
    until_events(loop, with.client, 1);
    with.client.unsubscribe("c");
    CHECK(heard(loop, with.peer) == wire({"UNSUBSCRIBE", "c"}));
    CHECK(with.client.history() == "refused c");
}

TEST_CASE("promise: what an audit asks for again may be held still", "[client]")
{
    Loop loop(&vkp_backend_null, 0);
    Subscribed with(loop, {"c", "d"});
    CHECK(heard(loop, with.peer) == wire({"CLIENT", "INFO"}));
    say(with.peer, bulk("id=1 sub=1 psub=0 ssub=0\n")); // one of the two is gone
    const std::string gone = confirm_asked(loop, with.peer);
    const std::string other = gone == "c" ? "d" : "c";
    CHECK(heard(loop, with.peer) == wire({"SUBSCRIBE", other}));
    say(with.peer, "-BUSY wait\r\n");
    vkp_test_run_until(loop, "REFUSED", [&] { return with.client.count(VKP_PUSH_REFUSED) == 1; });
    with.client.unsubscribe(other.c_str());
    CHECK(heard(loop, with.peer) == wire({"UNSUBSCRIBE", other}));
}

TEST_CASE("promise: what the server refused to end, and then ends, is unsubscribed", "[client]")
{
    Loop loop(&vkp_backend_null, 0);
    Subscribed with(loop, {"s"}, VKP_SUB_SHARD);
    CHECK(leave(loop, with, "s", VKP_SUB_SHARD) == wire({"SUNSUBSCRIBE", "s"}));
    say(with.peer, std::string("-BUSY wait\r\n") + hello_reply + confirm("sunsubscribe", "s", 0));
    CHECK(heard(loop, with.peer) == wire({"CLIENT", "INFO"}));
    CHECK(with.client.history() == "unsubscribed s");
}

TEST_CASE("promise: two answers to one UNSUBSCRIBE do not hide that another is refused", "[client]")
{
    Loop loop(&vkp_backend_null, 0);
    Subscribed with(loop, {"a", "b"}, VKP_SUB_SHARD);
    with.client.unsubscribe("a", VKP_SUB_SHARD);
    with.client.unsubscribe("b", VKP_SUB_SHARD);
    CHECK(heard(loop, with.peer) == wire({"SUNSUBSCRIBE", "a"}));
    CHECK(heard(loop, with.peer) == wire({"SUNSUBSCRIBE", "b"}));
    CHECK(heard(loop, with.peer) == wire({"HELLO", "3"}));
    say(with.peer,
        confirm("sunsubscribe", "a", 1) + "-MOVED 1 x:1\r\n-BUSY wait\r\n" + hello_reply);
    CHECK(heard(loop, with.peer) == wire({"SUNSUBSCRIBE", "b"}));
    CHECK(with.client.history() == "unsubscribed a");
}

TEST_CASE("promise: a name that is wanted anew is refused anew", "[client]")
{
    Loop loop(&vkp_backend_null, 0);
    Subscribed with(loop, {});
    with.client.subscribe("c");
    CHECK(heard(loop, with.peer) == wire({"SUBSCRIBE", "c"}));
    say(with.peer, "-BUSY wait\r\n");
    CHECK(heard(loop, with.peer) == wire({"SUBSCRIBE", "c"})); // asked again
    CHECK(leave(loop, with, "c") == wire({"UNSUBSCRIBE", "c"}));
    with.client.subscribe("c");
    CHECK(heard(loop, with.peer) == wire({"SUBSCRIBE", "c"}));
    say(with.peer, confirm("subscribe", "c") + confirm("unsubscribe", "c", 0) + hello_reply +
                       "-BUSY wait\r\n");
    CHECK(heard(loop, with.peer) == wire({"SUBSCRIBE", "c"}));
    CHECK(with.client.history() == "refused c, subscribed c, unsubscribed c, refused c");
}

// ---------------------------------------------------------------------------------------------
// The handshake

TEST_CASE("promise: whatever a server without HELLO says, RESP2 is spoken", "[client]")
{
    const char *answer =
        GENERATE("+OK\r\n", "$2\r\nOK\r\n", "*0\r\n", "*2\r\n+server\r\n+x\r\n", ":1\r\n", "_\r\n",
                 "-ERR unknown command `HELLO`\r\n", "-ERR unsupported command\r\n",
                 "-NOPROTO sorry\r\n", "-ERR Protocol version is not an integer\r\n",
                 "-UNKNOWN no such thing\r\n", "-ERR wrong number of arguments\r\n");
    INFO(answer);
    Loop loop;
    FakeServer server;
    vkp_client_config config = server.config();
    config.password = vkp_str_of("pw");
    Client client(loop, config);
    Peer peer = server.accept(loop);
    CHECK(heard(loop, peer) == wire({"HELLO", "3", "AUTH", "default", "pw"}));
    say(peer, answer);
    CHECK(heard(loop, peer) == wire({"AUTH", "pw"}));
    CHECK(heard(loop, peer) == wire({"PING"}));
    say(peer, "+OK\r\n+PONG\r\n");
    until_state(loop, client, VKP_CLIENT_READY);
    CHECK(vkp_client_get_protocol(client) == 2);
}

TEST_CASE("promise: where HELLO is answered by hanging up, RESP2 is tried too", "[client]")
{
    Loop loop;
    FakeServer server;
    Client client(loop, server.config());
    int hellos = 0;
    for (;;) {
        Peer peer = server.accept(loop);
        const std::string first = heard(loop, peer);
        if (first == wire({"PING"})) {
            say(peer, "+PONG\r\n");
            until_state(loop, client, VKP_CLIENT_READY);
            break;
        }
        CHECK(first == wire({"HELLO", "3"}));
        REQUIRE(++hellos <= 11);
    }
    CHECK(hellos >= 10); // before, it may be chance: a server that restarts
    CHECK(vkp_client_get_protocol(client) == 2);
    CHECK(client.history() == "connect-failed, connected");
}

TEST_CASE("promise: HELLO's answer says the protocol", "[client]")
{
    struct Form {
        const char *answer;
        int protocol;
    };
    const Form form = GENERATE(Form{"%1\r\n+proto\r\n:3\r\n", 3}, Form{"%1\r\n+proto\r\n:2\r\n", 2},
                               Form{"*4\r\n+server\r\n+x\r\n+proto\r\n:2\r\n", 2},
                               Form{"*2\r\n+proto\r\n:3\r\n", 3});
    Loop loop;
    FakeServer server;
    Client client(loop, server.config());
    Peer peer = server.accept(loop);
    (void)heard(loop, peer);
    say(peer, form.answer);
    until_state(loop, client, VKP_CLIENT_READY);
    CHECK(vkp_client_get_protocol(client) == form.protocol);
    client.subscribe("c");
    if (form.protocol == 2) { // HELLO did not say it
        CHECK(heard(loop, peer) == wire({"CLIENT", "ID"}));
        say(peer, ":7\r\n");
    }
    CHECK(heard(loop, peer) == wire({"SUBSCRIBE", "c"}));
    say(peer, (form.protocol == 3 ? ">" : "*") + confirm("subscribe", "c").substr(1));
    until_events(loop, client, 2);
    CHECK(client.history() == "connected, subscribed c");
}

TEST_CASE("promise: NOAUTH to HELLO is answered with AUTH, then HELLO again, once", "[client]")
{
    Loop loop;
    FakeServer server;
    vkp_client_config config = server.config();
    config.username = vkp_str_of("ann");
    config.password = vkp_str_of("pw");
    config.name = vkp_str_of("me");
    Client client(loop, config);
    Peer peer = server.accept(loop);
    CHECK(heard(loop, peer) == wire({"HELLO", "3", "AUTH", "ann", "pw", "SETNAME", "me"}));
    say(peer, "-NOAUTH Authentication required.\r\n");
    CHECK(heard(loop, peer) == wire({"AUTH", "ann", "pw"}));
    CHECK(heard(loop, peer) == wire({"HELLO", "3", "SETNAME", "me"}));
    SECTION("it helps")
    {
        say(peer, "+OK\r\n" + std::string(hello_reply));
        until_state(loop, client, VKP_CLIENT_READY);
        CHECK(vkp_client_get_protocol(client) == 3);
        CHECK(client.history() == "connected");
    }
    SECTION("it does not")
    {
        say(peer, "+OK\r\n-NOAUTH Authentication required.\r\n");
        hung_up(loop, peer);
        CHECK(client.history() == "connect-failed");
    }
    SECTION("the password is wrong")
    {
        say(peer, "-WRONGPASS no\r\n-NOAUTH Authentication required.\r\n");
        hung_up(loop, peer);
        CHECK(client.events[0].payload == "the server refused the password: WRONGPASS no");
    }
}

TEST_CASE("promise: a login needs no PING", "[client]")
{
    const char *answer = GENERATE("-NOPERM no\r\n", "-MASTERDOWN Link with MASTER is down\r\n",
                                  "-ERR unknown command `PING`\r\n", "-LOADING wait\r\n");
    Loop loop;
    FakeServer server;
    vkp_client_config config = server.config();
    config.protocol = 2;
    Client client(loop, config);
    Peer peer = server.accept(loop);
    CHECK(heard(loop, peer) == wire({"PING"}));
    say(peer, answer);
    until_state(loop, client, VKP_CLIENT_READY);
    CHECK(client.history() == "connected");
}

TEST_CASE("promise: when a server hangs up after an error to HELLO, its words are told", "[client]")
{
    Loop loop;
    FakeServer server;
    Client client(loop, server.config());
    Peer peer = server.accept(loop);
    (void)heard(loop, peer);
    say(peer, "-ERR the gate is shut\r\n");
    (void)heard(loop, peer); // the PING of RESP2
    peer.reset();
    until_events(loop, client, 1);
    CHECK(client.history() == "connect-failed");
    CHECK(client.events[0].payload == "the connection was lost: ERR the gate is shut");
}

TEST_CASE("promise: the database and the setup commands go before anybody's commands, each time",
          "[client]")
{
    Loop loop;
    FakeServer server;
    const vkp_str tracking[] = {vkp_str_of("CLIENT"), vkp_str_of("TRACKING"), vkp_str_of("ON"),
                                vkp_str_of("BCAST")};
    const vkp_str no_evict[] = {vkp_str_of("CLIENT"), vkp_str_of("NO-EVICT"), vkp_str_of("ON")};
    const vkp_client_setup setup[] = {{4, tracking, vkp_str_of("OK"), false},
                                      {3, no_evict, {nullptr, 0}, true}};
    vkp_client_config config = server.config();
    config.database = 5;
    config.setup = setup;
    config.setup_count = 2;
    Client client(loop, config);
    client.subscribe("c");
    Question question(client, {"GET", "k"});
    for (int i = 0; i < 2; i++) {
        Peer peer = server.greet(loop);
        CHECK(heard(loop, peer) == wire({"SELECT", "5"}));
        CHECK(heard(loop, peer) == wire({"CLIENT", "TRACKING", "ON", "BCAST"}));
        CHECK(heard(loop, peer) == wire({"CLIENT", "NO-EVICT", "ON"}));
        CHECK(client.state() == VKP_CLIENT_CONNECTING);
        say(peer, "+OK\r\n+OK\r\n");
        loop.round();
        CHECK(client.state() == VKP_CLIENT_CONNECTING);
        say(peer, "-ERR unknown subcommand\r\n"); // optional
        CHECK(heard(loop, peer) == wire({"SUBSCRIBE", "c"}));
        if (i == 0) {
            CHECK(heard(loop, peer) == wire({"GET", "k"}));
        }
    }
}

TEST_CASE("promise: a setup command with another answer ends the try, and the event says why",
          "[client]")
{
    struct Form {
        std::string answers;
        const char *payload;
    };
    const Form form =
        GENERATE(Form{"-ERR DB index is out of range\r\n+OK\r\n",
                      "SELECT was answered: ERR DB index is out of range"},
                 Form{"+OK\r\n-NOPERM no\r\n", "CLIENT was answered: NOPERM no"},
                 Form{"+OK\r\n+NO\r\n", "CLIENT was answered: NO"},
                 Form{"+OK\r\n:1\r\n", "CLIENT was answered: otherwise than expected"});
    Loop loop;
    FakeServer server;
    const vkp_str tracking[] = {vkp_str_of("CLIENT"), vkp_str_of("TRACKING"), vkp_str_of("ON")};
    const vkp_client_setup setup = {3, tracking, vkp_str_of("OK"), false};
    vkp_client_config config = server.config();
    config.database = 5;
    config.setup = &setup;
    config.setup_count = 1;
    Client client(loop, config);
    Peer peer = server.greet(loop);
    (void)heard(loop, peer);
    (void)heard(loop, peer);
    say(peer, form.answers);
    hung_up(loop, peer);
    CHECK(client.history() == "connect-failed");
    CHECK(client.events[0].payload == form.payload);
}

TEST_CASE("promise: each try asks where to go, and as whom", "[client]")
{
    struct Hook {
        std::vector<std::string> addresses;
        int calls = 0;
    };
    Loop loop;
    FakeServer first;
    FakeServer second;
    Hook hook;
    hook.addresses = {first.address(), second.address()};
    vkp_client_config config = first.config();
    config.password = vkp_str_of("of the config");
    config.on_connect = [](void *user, vkp_client_target *target) {
        auto *self = static_cast<Hook *>(static_cast<vkp_test_client *>(user)->context);
        CHECK(vkp_test_view(target->password) == "of the config");
        target->address = vkp_str_of(self->addresses[static_cast<size_t>(self->calls)].c_str());
        target->username = vkp_str_of("ann");
        target->password = vkp_str_of(self->calls == 0 ? "old" : "new");
        self->calls++;
    };
    Client client(loop, config, &hook);
    Peer peer = first.accept(loop);
    CHECK(heard(loop, peer) == wire({"HELLO", "3", "AUTH", "ann", "old"}));
    say(peer, hello_reply);
    until_state(loop, client, VKP_CLIENT_READY);
    peer.reset();
    peer = second.accept(loop);
    CHECK(heard(loop, peer) == wire({"HELLO", "3", "AUTH", "ann", "new"}));
    CHECK(hook.calls == 2);
}

TEST_CASE("promise: a replica where a primary is wanted is left, and looked for again", "[client]")
{
    const bool resp2 = GENERATE(false, true);
    Loop loop;
    FakeServer server;
    vkp_client_config config = server.config();
    config.role = VKP_CLIENT_ROLE_PRIMARY;
    config.protocol = resp2 ? 2 : 0;
    Client client(loop, config);
    for (int i = 0; i < 2; i++) {
        const char *role = i == 0 ? "replica" : "master";
        Peer peer = server.accept(loop);
        (void)heard(loop, peer);
        if (resp2) {
            say(peer, "+PONG\r\n");
            CHECK(heard(loop, peer) == wire({"ROLE"}));
            say(peer, "*1\r\n" + bulk(i == 0 ? "slave" : role));
        } else {
            say(peer, "%2\r\n+proto\r\n:3\r\n+role\r\n" + bulk(role));
        }
        if (i == 0) {
            hung_up(loop, peer);
            CHECK(client.events[0].payload ==
                  (resp2 ? "not a primary but a: slave" : "not a primary but a: replica"));
        } else {
            until_state(loop, client, VKP_CLIENT_READY);
            CHECK(client.history() == "connect-failed, connected");
        }
    }
}

TEST_CASE("promise: a server that knows it is told the library's name and version", "[client]")
{
    const char *version = GENERATE("7.2.4", "8.0.1", "10.0.0", "7.0.15", "6.2.0");
    const bool knows = std::string(version) != "7.0.15" && std::string(version) != "6.2.0";
    Loop loop;
    FakeServer server;
    Client client(loop, server.config());
    Peer peer = server.accept(loop);
    (void)heard(loop, peer);
    say(peer, "%2\r\n+proto\r\n:3\r\n+version\r\n" + bulk(version));
    until_state(loop, client, VKP_CLIENT_READY);
    Question question(client, {"GET", "k"});
    if (knows) {
        CHECK(heard(loop, peer) == wire({"CLIENT", "SETINFO", "LIB-NAME", "valkey_push"}));
        CHECK(heard(loop, peer) == wire({"CLIENT", "SETINFO", "LIB-VER", VKP_VERSION_STR}));
        say(peer, "-ERR no\r\n+OK\r\n"); // whatever it says
    }
    CHECK(heard(loop, peer) == wire({"GET", "k"}));
    say(peer, "+v\r\n");
    CHECK(question.text_on(loop) == "v");
}

TEST_CASE("promise: the role is asked for with each heartbeat", "[client]")
{
    Loop loop(&vkp_backend_null, 0);
    FakeServer server;
    vkp_client_config config = server.config();
    config.role = VKP_CLIENT_ROLE_PRIMARY;
    Client client(loop, config);
    Peer peer = server.accept(loop);
    (void)heard(loop, peer);
    say(peer, "%2\r\n+proto\r\n:3\r\n+role\r\n+master\r\n");
    until_state(loop, client, VKP_CLIENT_READY);
    CHECK(heard(loop, peer) == wire({"CLIENT", "INFO"}));
    CHECK(heard(loop, peer) == wire({"ROLE"}));
    say(peer, "-NOPERM no info\r\n-NOPERM says nothing\r\n");
    CHECK(heard(loop, peer) == wire({"PING"}));
    CHECK(heard(loop, peer) == wire({"ROLE"}));
    say(peer, "+PONG\r\n*1\r\n+slave\r\n");
    until_events(loop, client, 2);
    CHECK(client.events[1].payload == "not a primary but a: slave");
}

TEST_CASE("promise: READONLY from a server that was a primary is a reason to look again",
          "[client]")
{
    const vkp_client_role role = GENERATE(VKP_CLIENT_ROLE_ANY, VKP_CLIENT_ROLE_PRIMARY);
    Loop loop;
    FakeServer server;
    vkp_client_config config = server.config();
    config.role = role;
    Client client(loop, config);
    Peer peer = server.accept(loop);
    (void)heard(loop, peer);
    say(peer, "%2\r\n+proto\r\n:3\r\n+role\r\n+master\r\n");
    until_state(loop, client, VKP_CLIENT_READY);
    const std::string refusal = "-READONLY You can't write against a read only replica.\r\n";
    SECTION("the reply")
    {
        Question write(client, {"SET", "k", "v"});
        CHECK(heard(loop, peer) == wire({"SET", "k", "v"}));
        say(peer, refusal);
        CHECK(write.text_on(loop) ==
              "error: READONLY You can't write against a read only replica.");
    }
    SECTION("one of several replies")
    {
        Sending writes;
        REQUIRE(writes.send(client, wire({"SET", "k", "v"}) + wire({"PING"}), 2) == VKP_OK);
        (void)heard(loop, peer);
        (void)heard(loop, peer);
        say(peer, refusal + "+PONG\r\n");
        vkp_test_run_until(loop, "the replies", [&] { return writes.calls == 1; });
    }
    if (role == VKP_CLIENT_ROLE_PRIMARY) {
        hung_up(loop, peer);
        CHECK(client.events[1].payload == "the server is a replica now");
    } else {
        Question next(client, {"GET", "k"});
        CHECK(heard(loop, peer) == wire({"GET", "k"}));
    }
}

TEST_CASE("promise: new credentials hold for the connection that stands, and for later ones",
          "[client]")
{
    const bool accepted = GENERATE(true, false);
    const bool named = GENERATE(true, false);
    Loop loop;
    FakeServer server;
    vkp_client_config config = server.config();
    config.password = vkp_str_of("old");
    Client client(loop, config);
    Peer peer = server.accept(loop);
    CHECK(heard(loop, peer) == wire({"HELLO", "3", "AUTH", "default", "old"}));
    say(peer, hello_reply);
    until_state(loop, client, VKP_CLIENT_READY);
    vkp_oneshot slot;
    vkp_reply *reply = nullptr;
    REQUIRE(vkp_client_authenticate(client, &slot, vkp_str_of(named ? "ann" : nullptr),
                                    vkp_str_of("new")) == VKP_OK);
    CHECK(heard(loop, peer) == (named ? wire({"AUTH", "ann", "new"}) : wire({"AUTH", "new"})));
    say(peer, accepted ? "+OK\r\n" : "-WRONGPASS no\r\n");
    vkp_test_run_until(loop, "the reply",
                       [&] { return vkp_oneshot_try_recv(&slot, &reply) == VKP_OK; });
    CHECK(vkp_test_show(vkp_reply_get_value(reply)) == (accepted ? "OK" : "error: WRONGPASS no"));
    vkp_reply_unref(reply);
    peer.reset();
    peer = server.accept(loop);
    const std::string user = accepted && named ? "ann" : "default";
    CHECK(heard(loop, peer) == wire({"HELLO", "3", "AUTH", user, accepted ? "new" : "old"}));
    CHECK(vkp_client_authenticate(nullptr, &slot, vkp_str_of("a"), vkp_str_of("b")) ==
          VKP_ERR_INVALID);
    CHECK(vkp_client_authenticate(client, &slot, vkp_str_of("a"), {nullptr, 0}) == VKP_ERR_INVALID);
}

TEST_CASE("promise: a thread waits for a ready client, and a select for any state",
          "[client][threads]")
{
    Loop loop;
    FakeServer server;
    Client client(loop, server.config());
    CHECK(vkp_client_wait_ready(nullptr, 0) == VKP_ERR_INVALID);
    CHECK(vkp_client_watch_state(client, nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_client_wait_ready(client, vkp_now_ns()) == VKP_ERR_TIMEOUT);
    vkp_watch_rx *states = nullptr;
    REQUIRE(vkp_client_watch_state(client, &states) == VKP_OK);
    vkp_client_state state = VKP_CLIENT_CLOSED;
    REQUIRE(vkp_watch_get(states, &state) == VKP_OK);
    CHECK(state == VKP_CLIENT_CONNECTING);
    vkp_status waited = VKP_ERR_EMPTY;
    std::thread thread([&] { waited = vkp_client_wait_ready(client, vkp_test_deadline()); });
    Peer peer = server.greet(loop, client);
    thread.join();
    CHECK(waited == VKP_OK);
    CHECK(vkp_client_wait_ready(client, 0) == VKP_OK);
    vkp_case cases[] = {vkp_case_watch_changed(states)};
    size_t chosen = 9;
    CHECK(vkp_select(cases, 1, 0, &chosen) == VKP_OK);
    REQUIRE(vkp_watch_get_and_update(states, &state) == VKP_OK);
    CHECK(state == VKP_CLIENT_READY);
    vkp_client_close(client);
    CHECK(vkp_client_wait_ready(client, VKP_FOREVER) == VKP_ERR_CLOSED);
    REQUIRE(vkp_watch_get_and_update(states, &state) == VKP_OK);
    CHECK(state == VKP_CLIENT_CLOSED);
    client.unref();
    CHECK(vkp_watch_changed(states, vkp_test_deadline()) == VKP_ERR_CLOSED);
    vkp_watch_rx_unref(states);
}

TEST_CASE("promise: words of a server make no lines of the log, and move no cursor", "[client]")
{
    Loop loop;
    FakeServer server;
    Client client(loop, server.config());
    Peer peer = server.accept(loop);
    (void)heard(loop, peer);
    say(peer, "-WRONGPASS a\x1b[2Jb\tc d\x7f \xc2\x9b \xc3\xa9\r\n");
    until_events(loop, client, 1);
    CHECK(client.history() == "connect-failed");
    CHECK(vkp_test_env_logged(&loop.test, "WRONGPASS a\\x1b[2Jb\\x09c"));
    CHECK(vkp_test_env_logged(&loop.test, "\\x7f \\xc2\\x9b \xc3\xa9"));
}
