// SPDX-License-Identifier: MIT
//
// Whether a connection still does what it should: what is due is watched, a second connection asks
// whether the server is alive, and the server's own counts are compared with the subscriptions. The
// null backend's clock jumps to the next timer, so all times are exact.
#include "support/catch.hpp"
#include "support/fake_server.h"

#include <string>
#include <vector>

namespace {

const char greeting[] = "%2\r\n+proto\r\n:3\r\n+id\r\n:77\r\n";

// A ready client on a loop whose clock jumps, with one name subscribed.
class Watched {
  public:
    explicit Watched(vkp_client_config (*change)(vkp_client_config) = nullptr)
        : loop(&vkp_backend_null, 0),
          client(loop, change ? change(server.config()) : server.config())
    {
        peer = greet();
        client.subscribe("c");
        confirm_name();
        until_events(loop, client, 2);
        client.events.clear();
        ready = loop.now();
    }
    void confirm_name()
    {
        CHECK(heard(loop, peer) == wire({"SUBSCRIBE", "c"}));
        say(peer, confirm("subscribe", "c"));
    }
    void reconnect()
    {
        peer = greet();
        confirm_name();
    }
    Peer greet()
    {
        Peer with = server.accept(loop);
        CHECK(heard(loop, with) == wire({"HELLO", "3"}));
        say(with, greeting);
        return with;
    }
    Loop loop;
    FakeServer server;
    Client client;
    Peer peer;
    uint64_t ready = 0;
};

std::string counts(int sub, int psub, int ssub)
{
    const std::string line = "id=77 addr=127.0.0.1:1 name= db=0 sub=" + std::to_string(sub) +
                             " psub=" + std::to_string(psub) + " ssub=" + std::to_string(ssub) +
                             " multi=-1 cmd=client|info\n";
    return "=" + std::to_string(line.size() + 4) + "\r\ntxt:" + line + "\r\n";
}

std::string listed(const char *flags)
{
    return bulk(std::string("id=77 addr=127.0.0.1:1 name= age=5 idle=5 flags=") + flags +
                " db=0 sub=1\n");
}

const std::vector<std::string> client_info = {"CLIENT", "INFO"};
const std::vector<std::string> client_list = {"CLIENT", "LIST", "ID", "77"};

} // namespace

// ---------------------------------------------------------------------------------------------
// What is due

TEST_CASE("liveness: the server is asked over a second connection when a reply is overdue",
          "[client]")
{
    Watched with;
    Question question(with.client, {"GET", "k"});
    CHECK(heard(with.loop, with.peer) == wire({"GET", "k"}));
    const uint64_t asked = with.loop.now();
    // Pushes are no sign that what is due will come.
    say(with.peer, push({"message", "c", "on"}));
    Peer probe = with.greet();
    CHECK(with.loop.now() == asked + 5000 * ms);
    CHECK(heard(with.loop, probe) == wire({"PING"}));
    CHECK(with.client.history() == "message c on");
    CHECK(with.client.stats().probes == 1);
    SECTION("busy: the wait goes on, and it is asked again")
    {
        // a script of a minute costs nobody anything but the wait.
        const char *words = GENERATE("-BUSY a script runs\r\n", "-LOADING wait\r\n",
                                     "-MASTERDOWN wait\r\n", "-NOPERM no\r\n");
        for (int i = 0; i < 12; i++) {
            say(probe, words);
            hung_up(with.loop, probe);
            const uint64_t told = with.loop.now();
            probe = with.greet();
            CHECK(with.loop.now() == told + 5000 * ms);
            CHECK(heard(with.loop, probe) == wire({"PING"}));
        }
        say(with.peer, "$1\r\nv\r\n");
        CHECK(question.text_on(with.loop) == "v");
        say(probe, "+PONG\r\n"); // too late to say anything
        CHECK(heard(with.loop, probe) == wire(client_list));
        say(probe, listed("N"));
        hung_up(with.loop, probe);
        CHECK(with.client.history() == "message c on");
    }
    SECTION("it owes this connection nothing: the connection is lost")
    {
        say(probe, "+PONG\r\n");
        CHECK(heard(with.loop, probe) == wire(client_list));
        say(probe, GENERATE(bulk(""), listed("P")));
        until_events(with.loop, with.client, 2);
        CHECK(with.client.events[1].kind == VKP_PUSH_DISCONNECTED);
        CHECK(with.client.events[1].payload ==
              "the server answers others, and not this connection");
        CHECK(question.text_on(with.loop) == vkp_status_str(VKP_ERR_CLOSED));
        hung_up(with.loop, probe);
    }
    SECTION("it keeps this connection blocked: for a minute it may")
    {
        // Whoever may not list connections cannot know.
        const std::string answer = GENERATE(listed("Pb"), std::string("-NOPERM no\r\n"));
        for (int i = 0; with.client.events.size() == 1; i++) {
            say(probe, "+PONG\r\n");
            CHECK(heard(with.loop, probe) == wire(client_list));
            say(probe, answer);
            hung_up(with.loop, probe);
            if (with.client.events.size() == 1) {
                REQUIRE(i < 20);
                probe = with.greet();
                CHECK(heard(with.loop, probe) == wire({"PING"}));
            }
        }
        CHECK(with.loop.now() >= asked + 60000 * ms);
        CHECK(with.loop.now() <= asked + 65000 * ms);
        CHECK(with.client.events[1].payload == "the server keeps this connection blocked");
    }
    SECTION("it answers nothing: it may be busy, for a minute")
    {
        for (int i = 0; with.client.events.size() == 1; i++) {
            REQUIRE(i < 20);
            hung_up(with.loop, probe);
            if (with.client.events.size() == 1) {
                probe = with.server.accept(with.loop);
                CHECK(heard(with.loop, probe) == wire({"HELLO", "3"}));
            }
        }
        CHECK(with.loop.now() >= asked + 60000 * ms);
        CHECK(with.loop.now() <= asked + 70000 * ms);
        CHECK(with.client.events[1].payload == "the server does not answer");
    }
    SECTION("the reply comes while it is asked")
    {
        say(with.peer, "$1\r\nv\r\n");
        CHECK(question.text_on(with.loop) == "v");
        Question next(with.client, {"GET", "l"});
        CHECK(heard(with.loop, with.peer) == wire({"GET", "l"}));
        say(probe, "+PONG\r\n");
        CHECK(heard(with.loop, probe) == wire(client_list));
        say(probe, listed("P"));
        hung_up(with.loop, probe);
        say(with.peer, "$1\r\nw\r\n");
        CHECK(next.text_on(with.loop) == "w");
        CHECK(with.client.history() == "message c on");
    }
    SECTION("the client is closed while it is asked")
    {
        vkp_client_close(with.client);
        CHECK(question.text_on(with.loop) == vkp_status_str(VKP_ERR_CLOSED));
        hung_up(with.loop, probe);
    }
}

TEST_CASE("liveness: nobody accepts connections where the server was: the connection is lost",
          "[client]")
{
    Watched with;
    Question question(with.client, {"GET", "k"});
    CHECK(heard(with.loop, with.peer) == wire({"GET", "k"}));
    const uint64_t asked = with.loop.now();
    with.server.close();
    until_events(with.loop, with.client, 1);
    CHECK(with.loop.now() == asked + 5000 * ms);
    CHECK(with.client.events[0].payload == "the server does not answer");
}

TEST_CASE("liveness: a refusal of the probe is a sign of life", "[client]")
{
    const char *words = GENERATE("-ERR max number of clients reached\r\n", "-WRONGPASS no\r\n", "");
    Watched with;
    Question question(with.client, {"GET", "k"});
    CHECK(heard(with.loop, with.peer) == wire({"GET", "k"}));
    for (int i = 0; i < 3; i++) {
        Peer probe = with.server.accept(with.loop);
        CHECK(heard(with.loop, probe) == wire({"HELLO", "3"}));
        say(probe, words);
    }
    CHECK(with.client.history().empty());
    say(with.peer, "+v\r\n");
    CHECK(question.text_on(with.loop) == "v");
}

TEST_CASE("liveness: a long reply that still arrives is not overdue", "[client]")
{
    Watched with([](vkp_client_config config) {
        config.heartbeat_ms = VKP_OFF;
        return config;
    });
    Question question(with.client, {"GET", "k"});
    CHECK(heard(with.loop, with.peer) == wire({"GET", "k"}));
    say(with.peer, "$10\r\n");
    for (int i = 0; i < 10; i++) {
        with.loop.round(with.loop.now() + 4000 * ms);
        say(with.peer, "x");
    }
    with.loop.round();
    CHECK(with.client.stats().probes == 0);
    say(with.peer, "\r\n");
    CHECK(question.text_on(with.loop) == "xxxxxxxxxx");
}

TEST_CASE("liveness: an idle connection is not watched but by its heartbeat", "[client]")
{
    Watched with;
    with.loop.round(VKP_FOREVER); // the watch of the SUBSCRIBE looks once
    CHECK(with.loop.now() == with.ready + 5000 * ms);
    CHECK(vkp_loop_get_deadline_ns(with.loop) == with.ready + 15000 * ms);
    // Of many commands the first starts the watch, and none of the others moves it.
    Question one(with.client, {"A"});
    (void)heard(with.loop, with.peer);
    const uint64_t first = with.loop.now();
    CHECK(vkp_loop_get_deadline_ns(with.loop) == first + 5000 * ms);
    with.loop.round(first + 1000 * ms);
    say(with.peer, "+a\r\n");
    CHECK(one.text_on(with.loop) == "a");
    Question two(with.client, {"B"});
    (void)heard(with.loop, with.peer);
    CHECK(vkp_loop_get_deadline_ns(with.loop) == first + 5000 * ms);
    Peer probe = with.server.accept(with.loop);
    CHECK(with.loop.now() == first + 6000 * ms);
}

TEST_CASE("liveness: without limits replies are waited for without end", "[client]")
{
    Watched with([](vkp_client_config config) {
        config.heartbeat_ms = VKP_OFF;
        config.reply_timeout_ms = VKP_OFF;
        return config;
    });
    Question question(with.client, {"GET", "k"});
    CHECK(heard(with.loop, with.peer) == wire({"GET", "k"}));
    CHECK(vkp_loop_get_deadline_ns(with.loop) == VKP_FOREVER);
    with.loop.round(with.loop.now() + 3600 * 1000 * ms);
    CHECK(with.client.state() == VKP_CLIENT_READY);
}

// ---------------------------------------------------------------------------------------------
// The audit

TEST_CASE("liveness: the server's counts are compared at each heartbeat, whatever arrives",
          "[client]")
{
    Watched with;
    for (int i = 1; i <= 3; i++) {
        with.loop.round(with.ready + static_cast<uint64_t>(i) * 15000 * ms - ms);
        say(with.peer, push({"message", "c", "x"}));
        CHECK(heard(with.loop, with.peer) == wire(client_info));
        CHECK(with.loop.now() == with.ready + static_cast<uint64_t>(i) * 15000 * ms);
        say(with.peer, counts(1, 0, 0));
        vkp_test_run_until(with.loop, "the audit",
                           [&] { return with.client.stats().audits == static_cast<uint64_t>(i); });
    }
    CHECK(with.client.history() == "message c x, message c x, message c x");
    CHECK(with.client.stats().repairs == 0);
}

TEST_CASE("liveness: what the server does not have is asked for again, and a gap reports it",
          "[client]")
{
    Watched with;
    with.client.subscribe("d");
    with.client.subscribe("p*", VKP_SUB_PATTERN);
    CHECK(heard(with.loop, with.peer) == wire({"SUBSCRIBE", "d"}));
    CHECK(heard(with.loop, with.peer) == wire({"PSUBSCRIBE", "p*"}));
    say(with.peer, confirm("subscribe", "d", 2) + confirm("psubscribe", "p*", 3));
    CHECK(heard(with.loop, with.peer) == wire(client_info));
    const uint64_t agreed = with.loop.now();
    say(with.peer, counts(2, 1, 0));
    CHECK(heard(with.loop, with.peer) == wire(client_info));
    with.client.events.clear();
    say(with.peer, counts(1, 1, 0)); // one of two channels is gone, nobody said which
    std::vector<std::string> names = {confirm_asked(with.loop, with.peer),
                                      confirm_asked(with.loop, with.peer)};
    std::sort(names.begin(), names.end());
    CHECK(names == std::vector<std::string>{"c", "d"});
    until_events(with.loop, with.client, 3);
    const vkp_test_event gap = with.client.events[2];
    CHECK(gap.kind == VKP_PUSH_GAP);
    names = gap.names;
    std::sort(names.begin(), names.end());
    CHECK(names == std::vector<std::string>{"c", "d"}); // the pattern is not in it
    CHECK(gap.gap.from_ns == agreed);
    CHECK(with.client.stats().repairs == 1);
    CHECK(with.client.stats().outages == 0);
}

TEST_CASE("liveness: subscriptions that nobody asked for end the connection", "[client]")
{
    Watched with;
    CHECK(heard(with.loop, with.peer) == wire(client_info));
    say(with.peer, counts(1, 0, 1));
    until_events(with.loop, with.client, 1);
    CHECK(with.client.events[0].payload == "the server has subscriptions that nobody asked for");
}

TEST_CASE("liveness: a server that counts too many each time ends three connections, not more",
          "[client]")
{
    Watched with;
    for (uint64_t lost = 1; lost <= 3; lost++) {
        CHECK(heard(with.loop, with.peer) == wire(client_info));
        say(with.peer, counts(1, 0, 1));
        with.reconnect();
        CHECK(with.client.stats().outages == lost);
    }
    CHECK(heard(with.loop, with.peer) == wire(client_info));
    say(with.peer, counts(1, 0, 1));
    CHECK(heard(with.loop, with.peer) == wire({"PING"}));
    CHECK(with.client.stats().outages == 3);
}

TEST_CASE("liveness: an audit that agrees makes up for those that ended connections", "[client]")
{
    Watched with;
    for (uint64_t lost = 1; lost <= 5; lost++) {
        CHECK(heard(with.loop, with.peer) == wire(client_info));
        say(with.peer, counts(1, 0, 0));
        CHECK(heard(with.loop, with.peer) == wire(client_info));
        say(with.peer, counts(1, 0, 1));
        with.reconnect();
        CHECK(with.client.stats().outages == lost);
    }
}

TEST_CASE("liveness: while subscriptions are on the way nothing is compared", "[client]")
{
    Watched with;
    CHECK(heard(with.loop, with.peer) == wire(client_info));
    with.client.subscribe("d");
    CHECK(heard(with.loop, with.peer) == wire({"SUBSCRIBE", "d"}));
    say(with.peer, counts(0, 5, 5) + confirm("subscribe", "d", 2));
    until_events(with.loop, with.client, 1);
    CHECK(with.client.history() == "subscribed d");
    CHECK(with.client.stats().audits == 0);
}

TEST_CASE("liveness: a server that does not count gets PING", "[client]")
{
    const std::string answer = GENERATE("-ERR unknown subcommand\r\n", "-NOPERM no\r\n");
    Watched with;
    CHECK(heard(with.loop, with.peer) == wire(client_info));
    say(with.peer, answer);
    for (int i = 0; i < 2; i++) {
        CHECK(heard(with.loop, with.peer) == wire({"PING"}));
        say(with.peer, "-NOPERM no\r\n"); // an answer all the same
    }
    CHECK(with.client.history().empty());
}

TEST_CASE("liveness: fields that a server does not have are not compared", "[client]")
{
    Watched with;
    CHECK(heard(with.loop, with.peer) == wire(client_info));
    say(with.peer, bulk("id=77 name= sub=1 multi=-1\n"));
    vkp_test_run_until(with.loop, "the audit", [&] { return with.client.stats().audits == 1; });
    CHECK(with.client.history().empty());
}

// ---------------------------------------------------------------------------------------------
// The audit in RESP2, whose subscribed connection carries no CLIENT INFO

namespace {

const char resp2_pong[] = "*2\r\n$4\r\npong\r\n$0\r\n\r\n";

std::string as_array(std::string text)
{
    text[0] = '*';
    return text;
}

// A ready client of RESP2 with one name subscribed; the server says who it is with `identity`.
class WatchedResp2 {
  public:
    explicit WatchedResp2(const char *identity = ":77\r\n")
        : loop(&vkp_backend_null, 0), client(loop, resp2(server.config()))
    {
        peer = greet();
        client.subscribe("c");
        CHECK(heard(loop, peer) == wire({"CLIENT", "ID"}));
        CHECK(heard(loop, peer) == wire({"SUBSCRIBE", "c"}));
        say(peer, identity + as_array(confirm("subscribe", "c")));
        until_events(loop, client, 2);
        client.events.clear();
    }
    static vkp_client_config resp2(vkp_client_config config)
    {
        config.protocol = 2;
        return config;
    }
    Peer greet()
    {
        Peer with = server.accept(loop);
        CHECK(heard(loop, with) == wire({"PING"}));
        say(with, "+PONG\r\n");
        return with;
    }
    // A heartbeat, and the probe that comes with it and asks for the counts.
    Peer beat()
    {
        CHECK(heard(loop, peer) == wire({"PING"}));
        say(peer, resp2_pong);
        Peer probe = greet();
        CHECK(heard(loop, probe) == wire(client_list));
        return probe;
    }
    Loop loop;
    FakeServer server;
    Client client;
    Peer peer;
};

std::string listed_counts(int sub, int psub)
{
    return bulk("id=77 flags=P sub=" + std::to_string(sub) + " psub=" + std::to_string(psub) +
                " multi=-1\n");
}

} // namespace

TEST_CASE("liveness: RESP2: the counts are asked for over a second connection", "[client]")
{
    WatchedResp2 with;
    uint64_t agreed = 0;
    for (uint64_t i = 1; i <= 2; i++) {
        Peer probe = with.beat();
        agreed = with.loop.now();
        say(probe, listed_counts(1, 0));
        vkp_test_run_until(with.loop, "the audit", [&] { return with.client.stats().audits == i; });
        CHECK(with.client.history().empty());
    }
    Peer probe = with.beat();
    say(probe, listed_counts(0, 0)); // it is gone
    CHECK(heard(with.loop, with.peer) == wire({"SUBSCRIBE", "c"}));
    say(with.peer, as_array(confirm("subscribe", "c")));
    until_events(with.loop, with.client, 2);
    CHECK(with.client.events[1].kind == VKP_PUSH_GAP);
    CHECK(with.client.events[1].gap.from_ns == agreed);
    CHECK(with.client.stats().repairs == 1);
    CHECK(with.client.stats().outages == 0);
    CHECK(with.client.stats().probes == 0); // those ask whether the server is alive
}

TEST_CASE("liveness: RESP2: a server that does not count is not asked again", "[client]")
{
    SECTION("it does not say who we are")
    {
        WatchedResp2 with("-ERR unknown subcommand 'ID'\r\n");
        for (int i = 0; i < 3; i++) {
            CHECK(heard(with.loop, with.peer) == wire({"PING"}));
            say(with.peer, resp2_pong);
        }
        with.loop.round();
        CHECK(!with.server.try_accept());
    }
    SECTION("it lists nobody")
    {
        WatchedResp2 with;
        Peer probe = with.beat();
        say(probe, "-NOPERM no\r\n");
        for (int i = 0; i < 3; i++) {
            CHECK(heard(with.loop, with.peer) == wire({"PING"}));
            say(with.peer, resp2_pong);
        }
        with.loop.round();
        CHECK(!with.server.try_accept());
        CHECK(with.client.history().empty());
    }
    SECTION("its probe connection fails: the next heartbeat asks again")
    {
        WatchedResp2 with;
        for (int i = 0; i < 3; i++) {
            Peer probe = with.beat();
            probe.reset();
        }
        CHECK(with.client.history().empty());
        CHECK(with.client.stats().audits == 0);
    }
}

TEST_CASE("liveness: RESP2: a probe that is not answered ends, and the next one asks", "[client]")
{
    WatchedResp2 with;
    Peer probe = with.beat();
    hung_up(with.loop, probe); // after reply_timeout_ms
    Peer next = with.beat();
    say(next, listed_counts(1, 0));
    vkp_test_run_until(with.loop, "the audit", [&] { return with.client.stats().audits == 1; });
    CHECK(with.client.history().empty());
}
