// SPDX-License-Identifier: MIT
//
// The delivery probe: a client that publishes to a channel of its own and waits for the message.
// The null backend's clock jumps to the next timer, so all times are exact.
#include "support/catch.hpp"
#include "support/fake_server.h"

#include <string>
#include <vector>

namespace {

const char greeting[] = "%2\r\n+proto\r\n:3\r\n+id\r\n:77\r\n";

// The words of a command on the wire.
std::vector<std::string> words(const std::string &frame)
{
    std::vector<std::string> all;
    for (size_t at = frame.find('$'); at != std::string::npos; at = frame.find('$', at)) {
        const size_t size = std::stoul(frame.substr(at + 1));
        at = frame.find("\r\n", at) + 2;
        all.push_back(frame.substr(at, size));
        at += size;
    }
    return all;
}

// The answer to a fence; RESP2 has two.
std::string fenced(const std::vector<std::string> &fence, bool subscribed)
{
    if (fence[0] == "HELLO") {
        return greeting;
    }
    return subscribed ? "*2\r\n" + bulk("pong") + bulk(fence[1]) : bulk(fence[1]);
}

// A ready client with a delivery probe every 10 s, whose names "c" and its own are subscribed.
class Delivering {
  public:
    explicit Delivering(int protocol = 3, uint64_t heartbeat_ms = VKP_OFF)
        : loop(&vkp_backend_null, 0), protocol_(protocol), client(loop, config(heartbeat_ms))
    {
        peer = greet();
        client.subscribe("c");
        own = asked();
        until_events(loop, client, 2);
        CHECK(client.history() == "connected, subscribed c");
        client.events.clear();
        ready = loop.now();
    }
    // Accept a connection and answer its handshake.
    Peer greet()
    {
        Peer with = server.accept(loop);
        if (protocol_ == 3) {
            CHECK(heard(loop, with) == wire({"HELLO", "3"}));
            say(with, greeting);
        } else {
            CHECK(heard(loop, with) == wire({"PING"}));
            say(with, "+PONG\r\n");
        }
        return with;
    }
    // Confirm SUBSCRIBE of "c" and of the own channel, in any order; returns the own one.
    std::string asked()
    {
        std::string name;
        for (int i = 0; i < 2; i++) {
            const std::vector<std::string> asked = words(heard(loop, peer));
            REQUIRE(asked.size() == 2);
            CHECK(asked[0] == "SUBSCRIBE");
            name = asked[1] == "c" ? name : asked[1];
            say(peer, typed(confirm("subscribe", asked[1], i + 1)));
        }
        CHECK(name.size() == 45);
        CHECK(name.substr(0, 13) == "vkp:delivery:");
        return name;
    }
    // The probe that comes next; returns its payload.
    std::string published()
    {
        probe = greet();
        const std::vector<std::string> asked = words(heard(loop, probe));
        REQUIRE(asked.size() == 3);
        CHECK(asked[0] == "PUBLISH");
        CHECK(asked[1] == own);
        return asked[2];
    }
    void deliver(const std::string &payload)
    {
        say(peer, typed(push({"message", own, payload})));
    }
    // A push as this protocol sends it.
    std::string typed(std::string frame) const
    {
        frame[0] = protocol_ == 3 ? '>' : '*';
        return frame;
    }

  private:
    vkp_client_config config(uint64_t heartbeat_ms) const
    {
        vkp_client_config made = server.config();
        made.delivery_ms = 10000;
        made.protocol = protocol_;
        made.heartbeat_ms = heartbeat_ms;
        return made;
    }

  public:
    Loop loop;
    FakeServer server;

  private:
    int protocol_;

  public:
    Client client;
    Peer peer;
    Peer probe;
    std::string own;
    uint64_t ready = 0;
};

const std::vector<std::string> client_info = {"CLIENT", "INFO"};

} // namespace

TEST_CASE("delivery: what is published arrives, and the program sees nothing of it", "[client]")
{
    Delivering with(GENERATE(3, 2));
    for (uint64_t i = 1; i <= 3; i++) {
        const std::string payload = with.published();
        CHECK(with.loop.now() == with.ready + i * 10000 * ms);
        if (i % 2 == 0) { // the answer to PUBLISH may come before or after the message
            say(with.probe, ":1\r\n");
        }
        with.deliver(payload);
        hung_up(with.loop, with.probe);
        CHECK(with.client.stats().deliveries == i);
    }
    say(with.peer, with.typed(push({"message", "c", "x"})));
    until_events(with.loop, with.client, 1);
    CHECK(with.client.history() == "message c x");
    CHECK(with.client.stats().gaps == 0);
    CHECK(with.client.stats().probes == 0);
}

TEST_CASE("delivery: a message that does not arrive ends the connection, with a gap", "[client]")
{
    Delivering with;
    const std::string first = with.published();
    const uint64_t delivered = with.loop.now();
    say(with.probe, ":1\r\n");
    with.deliver(first);
    hung_up(with.loop, with.probe);
    const std::string second = with.published();
    const uint64_t published = with.loop.now();
    say(with.probe, ":1\r\n");
    CHECK(heard(with.loop, with.peer) == wire(client_info));
    CHECK(with.loop.now() == published);
    with.deliver(first); // not the one that is due
    say(with.peer, "-ERR unknown command\r\n");
    until_events(with.loop, with.client, 1);
    CHECK(with.loop.now() == published + 5000 * ms);
    CHECK(with.client.events[0].payload == "a published message did not arrive");
    with.peer = with.greet();
    CHECK(with.asked() == with.own);
    until_events(with.loop, with.client, 4);
    CHECK(with.client.history() == "disconnected, reconnected, subscribed c, gap");
    CHECK(with.client.events[3].gap.from_ns == delivered);
    CHECK(with.client.events[3].names.empty());
    CHECK(with.client.stats().deliveries == 1);
}

TEST_CASE("delivery: a connection that owes an answer is judged by that", "[client]")
{
    Delivering with;
    Question question(with.client, {"GET", "k"});
    CHECK(heard(with.loop, with.peer) == wire({"GET", "k"}));
    say(with.peer, "+v\r\n");
    CHECK(question.text_on(with.loop) == "v");
    (void)with.published();
    say(with.probe, ":1\r\n");
    CHECK(heard(with.loop, with.peer) == wire(client_info));
    SECTION("the message and the answer are late")
    {
        hung_up(with.loop, with.probe);
        Peer liveness = with.greet(); // overdue: the delivery probe has given way
        CHECK(heard(with.loop, liveness) == wire({"PING"}));
        say(liveness, "-BUSY a script runs\r\n");
        hung_up(with.loop, liveness);
        CHECK(with.client.history().empty());
        CHECK(with.client.stats().probes == 1);
    }
    SECTION("the message is late, the answer has not been asked for")
    {
        with.loop.round(with.loop.now() + 4000 * ms);
        say(with.peer, "-ERR no\r\n");
        Question next(with.client, {"GET", "l"});
        CHECK(heard(with.loop, with.peer) == wire({"GET", "l"}));
        until_events(with.loop, with.client, 1);
        CHECK(with.client.events[0].payload == "a published message did not arrive");
        CHECK(next.text_on(with.loop) == vkp_status_str(VKP_ERR_CLOSED));
    }
}

TEST_CASE("delivery: PUBLISH is refused", "[client]")
{
    Delivering with;
    (void)with.published();
    SECTION("for a while: it is tried again")
    {
        say(with.probe, "-LOADING wait\r\n");
        hung_up(with.loop, with.probe);
        const std::string payload = with.published();
        CHECK(with.loop.now() == with.ready + 20000 * ms);
        with.deliver(payload);
        hung_up(with.loop, with.probe);
        CHECK(with.client.stats().deliveries == 1);
    }
    SECTION("for good: no more on this connection")
    {
        say(with.probe, "-NOPERM no\r\n");
        hung_up(with.loop, with.probe);
        with.loop.round(with.loop.now() + 60000 * ms);
        CHECK(vkp_loop_get_deadline_ns(with.loop) == VKP_FOREVER);
        with.peer.reset(); // the next one is asked anew
        with.peer = with.greet();
        CHECK(with.asked() == with.own);
        with.deliver(with.published());
        hung_up(with.loop, with.probe);
        CHECK(with.client.stats().deliveries == 1);
    }
    CHECK(with.client.stats().outages <= 1);
}

TEST_CASE("delivery: what ends the probe says nothing about the connection", "[client]")
{
    Delivering with;
    SECTION("it hangs up")
    {
        (void)with.published();
        with.probe.reset();
    }
    SECTION("it is refused")
    {
        with.probe = with.server.accept(with.loop);
        CHECK(heard(with.loop, with.probe) == wire({"HELLO", "3"}));
        say(with.probe, "-ERR max number of clients reached\r\n");
        with.probe.reset();
    }
    SECTION("it does not answer")
    {
        (void)with.published();
        hung_up(with.loop, with.probe);
        CHECK(with.loop.now() == with.ready + 15000 * ms);
    }
    with.deliver(with.published());
    CHECK(with.loop.now() == with.ready + 20000 * ms);
    hung_up(with.loop, with.probe);
    CHECK(with.client.history().empty());
}

TEST_CASE("delivery: the own channel is left with the last name", "[client]")
{
    const int protocol = GENERATE(3, 2);
    Delivering with(protocol);
    with.client.subscribe("d");
    CHECK(words(heard(with.loop, with.peer))[1] == "d");
    say(with.peer, with.typed(confirm("subscribe", "d", 3)));
    with.client.unsubscribe("d");
    CHECK(words(heard(with.loop, with.peer))[1] == "d");
    say(with.peer, with.typed(confirm("unsubscribe", "d", 2)));
    with.client.unsubscribe("c");
    std::vector<std::string> seen; // of the commands behind, fences aside
    while (seen.size() < 2) {
        const std::vector<std::string> next = words(heard(with.loop, with.peer));
        REQUIRE(!next.empty());
        if (next[0] == "UNSUBSCRIBE") {
            seen.push_back(next[1]);
            say(with.peer, with.typed(confirm("unsubscribe", next[1], 0)));
        } else {
            say(with.peer, fenced(next, seen.size() < 2));
        }
    }
    CHECK(seen == std::vector<std::string>{"c", with.own});
    Question question(with.client, {"GET", "k"}); // also in RESP2
    for (std::vector<std::string> next = words(heard(with.loop, with.peer)); next[0] != "GET";
         next = words(heard(with.loop, with.peer))) {
        say(with.peer, fenced(next, false));
    }
    say(with.peer, "+v\r\n");
    CHECK(question.text_on(with.loop) == "v");
    CHECK(with.client.history() == "subscribed d, unsubscribed d, unsubscribed c");
    with.loop.round(with.loop.now() + 60000 * ms); // nothing is published any more
    CHECK(with.server.try_accept() == nullptr);
}

TEST_CASE("delivery: no event names the own channel", "[client]")
{
    Delivering with;
    with.client.subscribe("vkp:*", VKP_SUB_PATTERN);
    CHECK(words(heard(with.loop, with.peer))[1] == "vkp:*");
    say(with.peer, confirm("psubscribe", "vkp:*", 3));
    const std::string payload = with.published();
    say(with.peer, push({"pmessage", "vkp:*", with.own, payload}));
    with.deliver(payload);
    hung_up(with.loop, with.probe);
    with.peer.reset();
    with.peer = with.greet();
    // The own channel is refused, taken away, and later back: a gap of "c" alone is one of all.
    for (int i = 0; i < 3; i++) {
        const std::vector<std::string> asked = words(heard(with.loop, with.peer));
        if (asked[1] == with.own) {
            say(with.peer, "-NOPERM no\r\n");
        } else {
            say(with.peer, confirm(asked[1] == "c" ? "subscribe" : "psubscribe", asked[1]));
        }
    }
    CHECK(words(heard(with.loop, with.peer))[1] == with.own); // a second later
    say(with.peer, confirm("subscribe", with.own, 3));
    say(with.peer, push({"message", "c", "x"}));
    vkp_test_run_until(with.loop, "the message",
                       [&] { return with.client.count(VKP_PUSH_MESSAGE) == 1; });
    CHECK(with.client.count(VKP_PUSH_GAP) == 1);
    for (const vkp_test_event &event : with.client.events) {
        CHECK(event.channel != with.own);
        CHECK(event.names.empty());
    }
    CHECK(with.client.count(VKP_PUSH_PMESSAGE) == 0);
    CHECK(with.client.count(VKP_PUSH_REFUSED) == 0);
}

TEST_CASE("delivery: the server's counts have the own channel", "[client]")
{
    Delivering with(3, 7000);
    CHECK(heard(with.loop, with.peer) == wire(client_info));
    say(with.peer, bulk("id=77 name= sub=2 psub=0 ssub=0 multi=-1\n"));
    vkp_test_run_until(with.loop, "the audit", [&] { return with.client.stats().audits == 1; });
    CHECK(with.client.history().empty());
    CHECK(with.client.stats().repairs == 0);
}

TEST_CASE("delivery: the client is closed while a message is under way", "[client]")
{
    Delivering with;
    (void)with.published();
    vkp_client_close(with.client);
    hung_up(with.loop, with.probe);
    hung_up(with.loop, with.peer);
    CHECK(with.client.history().empty());
}

TEST_CASE("delivery: each allocation may fail, and messages are probed or the connection is lost",
          "[client][faults]")
{
    bool finished = false;
    for (uint64_t k = 1; !finished; k++) {
        REQUIRE(k < 200);
        INFO("k " << k);
        Delivering with;
        std::vector<Peer> peers;
        vkp_test_env_fault(&with.loop.test, VKP_TEST_FAULT_ONCE, k);
        vkp_test_run_until(with.loop, "a message of the probe", [&] {
            if (Peer peer = with.server.try_accept()) {
                peers.push_back(std::move(peer));
            }
            for (const Peer &peer : peers) {
                size_t len = 0;
                const char *frame = vkp_test_peer_try_read_frame(peer.get(), &len);
                const std::vector<std::string> asked =
                    frame ? words(std::string(frame, len)) : std::vector<std::string>();
                if (asked.empty()) {
                } else if (asked[0] == "HELLO") {
                    (void)!vkp_test_peer_send(peer.get(), greeting, strlen(greeting));
                } else if (asked[0] == "SUBSCRIBE") {
                    say(peer, confirm("subscribe", asked[1]));
                } else if (asked[0] == "PUBLISH") {
                    say(with.client.stats().outages == 0 ? with.peer : peers.front(),
                        push({"message", asked[1], asked[2]}));
                }
            }
            return with.client.stats().deliveries > 0;
        });
        finished = vkp_test_env_failures(&with.loop.test) == 0;
        vkp_test_env_fault(&with.loop.test, VKP_TEST_FAULT_NONE, 0);
    }
}
