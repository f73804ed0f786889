// SPDX-License-Identifier: MIT
//
// What a relay says about itself: commands by their way and the times of replies, clients by what
// they do, names with many messages, outages; asked for by any thread, at any time.
#include "support/catch.hpp"

#include <atomic>
#include <csignal>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "support/relay_probe.h"

using namespace relay_probe;

namespace {

// A survey with texts of its own.
struct Survey {
    bool there = false;
    vkp_relay_stats stats = {};
    std::vector<size_t> clients;
    size_t queued_bytes = 0;
    std::vector<vkp_relay_loop> loops;
    struct Channel {
        vkp_sub_kind kind;
        std::string name;
        size_t name_bytes;
        uint64_t messages;
        size_t subscribers;
    };
    std::vector<Channel> channels;
    struct Outage {
        uint64_t from, to;
        std::string reason;
    };
    std::vector<Outage> outages;
    Strings addresses;
    std::vector<vkp_listener_stats> listeners;

    size_t in(vkp_relay_client_state state) const
    {
        return clients[state];
    }
    Strings names() const
    {
        Strings all;
        for (const Channel &channel : channels) {
            all.push_back(channel.name);
        }
        return all;
    }
};

struct Asked {
    Survey survey;
    std::atomic<int> calls{0};
};

void on_survey(void *user, const vkp_relay_survey *found)
{
    Asked *asked = static_cast<Asked *>(user);
    Survey &out = asked->survey;
    out.there = found != nullptr;
    if (found != nullptr) {
        out.stats = found->stats;
        out.clients.assign(found->clients, found->clients + VKP_RELAY_CLIENT_STATES);
        out.queued_bytes = found->queued_bytes;
        out.loops.assign(found->loops, found->loops + found->loop_count);
        for (size_t i = 0; i < found->channel_count; i++) {
            const vkp_relay_channel &channel = found->channels[i];
            out.channels.push_back({channel.kind, std::string(channel.name.ptr, channel.name.len),
                                    channel.name_bytes, channel.messages, channel.subscribers});
        }
        for (size_t i = 0; i < found->outage_count; i++) {
            const vkp_relay_outage &outage = found->outages[i];
            out.outages.push_back({outage.from_unix_ms, outage.to_unix_ms,
                                   std::string(outage.reason.ptr, outage.reason.len)});
        }
        for (size_t i = 0; i < found->listener_count; i++) {
            out.addresses.push_back(found->listeners[i].address);
            out.listeners.push_back(found->listeners[i].stats);
        }
    }
    asked->calls++;
}

// By this thread, which is none of the loops'.
Survey survey_of(vkp_relay *relay)
{
    Asked asked;
    if (vkp_relay_survey_then(relay, on_survey, &asked) != VKP_OK) {
        vkp_test_fail("no survey");
    }
    vkp_test_wait_until("a survey", [&] { return asked.calls == 1; });
    return asked.survey;
}

uint64_t count_of(const vkp_relay_times &times)
{
    return std::accumulate(times.within, times.within + VKP_RELAY_TIMES, uint64_t{0});
}

} // namespace

TEST_CASE("survey: commands by their way, and the time of each reply")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Server server = start_server();
    Relay relay(setup, upstream_of(vkp_test_server_unix(server.get())));
    Peer peer = relay.connected_client();
    const vkp_relay_stats before = relay.stats();
    for (int i = 0; i < 10; i++) {
        CHECK(ask(peer, "SET", "k", "v") == "+OK\r\n");
    }
    ask(peer, "MULTI");
    ask(peer, "GET", "k");
    CHECK(ask(peer, "EXEC") == "*1\r\n$1\r\nv\r\n");
    ask(peer, "CLIENT", "GETNAME");
    ask(peer, "WATCH", "k");
    ask(peer, "GET", "k");
    ask(peer, "BLPOP", "nothing", "0.01");
    ask(peer, "UNWATCH");
    ask(peer, "SUBSCRIBE", "a");
    ask(peer, "UNSUBSCRIBE", "a");
    const vkp_relay_stats after = relay.stats();
    const auto grew = [&](vkp_relay_route route) {
        return after.commands[route] - before.commands[route];
    };
    CHECK(grew(VKP_RELAY_SHARED) == 13); // EXEC carries three
    CHECK(grew(VKP_RELAY_PRIVATE) == 4);
    CHECK(grew(VKP_RELAY_PUSH) == 2);
    CHECK(grew(VKP_RELAY_HERE) >= 1);
    CHECK(count_of(after.replies[0]) - count_of(before.replies[0]) == 11);
    CHECK(count_of(after.replies[1]) == 3); // not BLPOP, which waits
    CHECK(after.in_flight == 0);
    CHECK(after.connected);
}

TEST_CASE("survey: a reply's time is counted where it belongs")
{
    NEEDS_SERVER();
    Server server = start_server({"--enable-debug-command", "yes"});
    Relay relay(one_loop(), upstream_of(vkp_test_server_unix(server.get())));
    Peer peer = relay.connected_client();
    Peer direct = open(vkp_test_server_unix(server.get()));
    const vkp_relay_times before = relay.stats().replies[0];
    kill(vkp_test_server_pid(server.get()), SIGSTOP);
    vkp_test_peer_command(peer.get(), "GET", "k", static_cast<const char *>(nullptr));
    vkp_test_wait_until("a command under way", [&] { return relay.stats().in_flight == 1; });
    const uint64_t from = vkp_now_ns();
    Survey survey = survey_of(relay);
    CHECK(survey.in(VKP_RELAY_CLIENT_WAITING) == 1);
    vkp_test_wait_until("some time", [&] { return vkp_now_ns() - from > 70000000; });
    kill(vkp_test_server_pid(server.get()), SIGCONT);
    CHECK(hear(peer) == "$-1\r\n");
    const vkp_relay_times after = relay.stats().replies[0];
    CHECK(after.total_ns - before.total_ns >= 70000000);
    size_t index = 0;
    while (after.within[index] == before.within[index]) {
        index++;
    }
    CHECK(index >= 13); // 2^26 ns are 67 ms
    CHECK(after.within[VKP_RELAY_TIMES - 1] == before.within[VKP_RELAY_TIMES - 1]);
    CHECK(relay.stats().in_flight == 0);
}

TEST_CASE("survey: clients by what they do, on each loop")
{
    EVERY_SETUP();
    Relay relay(setup);
    std::vector<Peer> idle = relay.client_per_loop();
    std::vector<Peer> subscribed = relay.client_per_loop();
    for (const Peer &peer : subscribed) {
        ask(peer, "SUBSCRIBE", "a");
    }
    Peer slow = relay.client();
    ask(slow, "SUBSCRIBE", "slow");
    const std::string text(200000, 'x');
    vkp_test_wait_until("a client that does not read", [&] {
        ask(idle[0], "PUBLISH", "slow", text);
        return survey_of(relay).in(VKP_RELAY_CLIENT_SLOW) == 1;
    });
    const Survey survey = survey_of(relay);
    CHECK(survey.in(VKP_RELAY_CLIENT_IDLE) == setup.loops);
    CHECK(survey.in(VKP_RELAY_CLIENT_SUBSCRIBED) == setup.loops);
    CHECK(survey.queued_bytes >= 100000);
    REQUIRE(survey.loops.size() == setup.loops);
    size_t clients = 0;
    for (const vkp_relay_loop &loop : survey.loops) {
        clients += loop.clients;
    }
    CHECK(clients == 2 * setup.loops + 1);
    CHECK(survey.stats.clients == clients);
    CHECK(survey.addresses == Strings{relay.address});
    REQUIRE(survey.listeners.size() == 1);
    CHECK(survey.listeners[0].accepted == clients);
}

TEST_CASE("survey: more clients than one round looks at, while some go")
{
    EVERY_SETUP();
    Relay relay(setup);
    std::vector<Peer> peers;
    for (int i = 0; i < 400; i++) {
        peers.push_back(relay.client());
    }
    ask(peers.back(), "PING");
    vkp_test_wait_until("all of them", [&] {
        const Survey survey = survey_of(relay);
        return survey.in(VKP_RELAY_CLIENT_IDLE) == peers.size();
    });
    std::vector<Asked> asked(20);
    for (Asked &each : asked) {
        REQUIRE(vkp_relay_survey_then(relay, on_survey, &each) == VKP_OK);
        peers.resize(peers.size() - 10);
    }
    for (Asked &each : asked) {
        vkp_test_wait_until("a survey", [&] { return each.calls == 1; });
        CHECK(each.survey.in(VKP_RELAY_CLIENT_IDLE) <= 400);
        CHECK(each.survey.in(VKP_RELAY_CLIENT_IDLE) >= 200);
    }
    vkp_test_wait_until("the rest",
                        [&] { return survey_of(relay).in(VKP_RELAY_CLIENT_IDLE) == peers.size(); });
}

TEST_CASE("survey: the client that is next goes between two rounds of a survey")
{
    vkp_test_loop loop;
    vkp_loop *const loops[] = {loop};
    vkp_relay_config config = {};
    config.loops = loops;
    config.env = &loop.test.env;
    vkp_relay *relay = nullptr;
    const std::string address = vkp_test_fresh_address("survey");
    REQUIRE(vkp_relay_open(&config, &relay) == VKP_OK);
    REQUIRE(vkp_relay_listen(relay, vkp_str_of(address.c_str()), nullptr) == VKP_OK);
    std::vector<Peer> peers; // in the order in which they are accepted
    while (peers.size() < 300) {
        peers.push_back(open(address));
        vkp_test_run_until(loop, "a client", [&] {
            vkp_relay_stats stats;
            vkp_relay_get_stats(relay, &stats);
            return stats.clients == peers.size();
        });
    }
    Asked asked;
    REQUIRE(vkp_relay_survey_then(relay, on_survey, &asked) == VKP_OK);
    loop.round(); // the call
    loop.round(); // the newest 128
    for (size_t i = 300 - 256 - 3; i < 300 - 256; i++) {
        peers[i].reset(); // closed at the end of the round that looks at the 128 before them
    }
    vkp_test_run_until(loop, "a survey", [&] { return asked.calls == 1; });
    CHECK(asked.survey.in(VKP_RELAY_CLIENT_IDLE) == 297);
    vkp_relay_unref(relay);
}

TEST_CASE("survey: the place of a name that nobody wants any longer is the next one's")
{
    Relay relay(one_loop());
    Peer subscriber = relay.client();
    Peer publisher = relay.client();
    ask(subscriber, "HELLO", "3");
    for (int i = 0; i < 17; i++) {
        ask(subscriber, "SUBSCRIBE", "many" + std::to_string(i));
        for (int k = 0; k < 20; k++) {
            ask(publisher, "PUBLISH", "many" + std::to_string(i), "x");
            hear(subscriber);
        }
    }
    const Strings names = survey_of(relay).names();
    REQUIRE(names.size() == 16);
    ask(subscriber, "UNSUBSCRIBE", names[3]);
    ask(subscriber, "SUBSCRIBE", "one");
    ask(publisher, "PUBLISH", "one", "x");
    const Survey survey = survey_of(relay);
    REQUIRE(survey.channels.size() == 16);
    CHECK(survey.channels[15].name == "one");
    CHECK(survey.channels[15].messages == 1);
}

TEST_CASE("survey: names with the most messages, from any loop, with any bytes")
{
    EVERY_SETUP();
    Relay relay(setup);
    std::vector<Peer> subscribers = relay.client_per_loop();
    const std::string hostile("<b>\"\\\n\0\xff", 9);
    const std::string long_name(1000, 'L');
    for (const Peer &peer : subscribers) {
        for (int i = 0; i < 40; i++) {
            ask(peer, "SUBSCRIBE", "few" + std::to_string(i));
        }
        ask(peer, "PSUBSCRIBE", "few*");
        say(peer, vkp_test_wire({"SUBSCRIBE", hostile}));
        hear(peer);
        ask(peer, "SUBSCRIBE", long_name);
    }
    Peer peer = relay.client();
    for (int i = 0; i < 40; i++) {
        ask(peer, "PUBLISH", "few" + std::to_string(i), "x");
    }
    for (int i = 0; i < 9; i++) {
        say(peer, vkp_test_wire({"PUBLISH", hostile, "x"}));
        hear(peer);
    }
    for (int i = 0; i < 5; i++) {
        ask(peer, "PUBLISH", long_name, "x");
    }
    vkp_test_wait_until("the last message", [&] {
        const Survey survey = survey_of(relay);
        return survey.channels.size() > 2 && survey.channels[2].messages == 5 &&
               survey.channels[2].subscribers == setup.loops;
    });
    const Survey survey = survey_of(relay);
    REQUIRE(survey.channels.size() == 16);
    CHECK(survey.channels[0].name == "few*");
    CHECK(survey.channels[0].kind == VKP_SUB_PATTERN);
    CHECK(survey.channels[0].messages == 40);
    CHECK(survey.channels[1].name == hostile);
    CHECK(survey.channels[1].messages == 9);
    CHECK(survey.channels[1].subscribers == setup.loops);
    CHECK(survey.channels[2].name == long_name.substr(0, VKP_RELAY_CHANNEL_BYTES));
    CHECK(survey.channels[2].name_bytes == 1000);
    CHECK(survey.channels[3].messages == 1);
    CHECK(survey.stats.messages_in == 54);
    CHECK(survey.stats.deliveries == (80 + 9 + 5) * setup.loops);
    // A name that nobody wants any longer is gone; another one gets its place.
    for (const Peer &each : subscribers) {
        ask(each, "PUNSUBSCRIBE", "few*");
    }
    ask(peer, "PUBLISH", "few39", "x");
    vkp_test_wait_until("the next message", [&] {
        const Survey next = survey_of(relay);
        return next.channels.size() == 16 && next.channels[0].name == hostile &&
               next.channels[2].name == "few39" && next.channels[2].messages == 2;
    });
}

TEST_CASE("survey: an outage has a beginning, a reason and an end")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Server server = start_server();
    Relay relay(setup, upstream_of(vkp_test_server_unix(server.get())));
    Peer peer = relay.connected_client();
    vkp_test_wait_until("all connections", [&] { return relay.stats().connected; });
    Survey survey = survey_of(relay);
    CHECK(survey.outages.empty());
    const uint64_t since = survey.stats.since_unix_ms;
    CHECK(since > 1600000000000);
    for (size_t i = 1; i < 4; i++) {
        vkp_test_server_kill(server.get());
        vkp_test_wait_until("the outage", [&] { return !relay.stats().connected; });
        survey = survey_of(relay);
        REQUIRE(survey.outages.size() == i);
        CHECK(survey.outages.back().from >= since);
        CHECK(survey.outages.back().to == 0);
        CHECK_FALSE(survey.outages.back().reason.empty());
        CHECK(survey.stats.since_unix_ms == survey.outages.back().from);
        vkp_test_server_restart(server.get());
        vkp_test_wait_until("the end of the outage", [&] { return relay.stats().connected; });
        survey = survey_of(relay);
        REQUIRE(survey.outages.size() == i);
        CHECK(survey.outages.back().to >= survey.outages.back().from);
        CHECK(survey.stats.since_unix_ms == survey.outages.back().to);
        CHECK(survey.stats.reconnects == 2 * i); // push and shared
    }
}

TEST_CASE("survey: without a server nothing is out, and PING is answered")
{
    Relay relay(one_loop());
    const vkp_relay_stats stats = relay.stats();
    CHECK(stats.connected);
    CHECK(stats.reconnects == 0);
    relay.on_loop([&] {
        vkp_status got = VKP_ERR_INVALID;
        CHECK(vkp_relay_ping_then(
                  relay,
                  [](void *user, vkp_status status, vkp_str) {
                      *static_cast<vkp_status *>(user) = status;
                  },
                  &got) == VKP_OK);
        CHECK(got == VKP_OK);
    });
}

TEST_CASE("survey: PING says what the server says, or that there is none")
{
    NEEDS_SERVER();
    Server server = start_server();
    Relay relay(one_loop(), upstream_of(vkp_test_server_unix(server.get())));
    Peer peer = relay.connected_client();
    vkp_test_wait_until("all connections", [&] { return relay.stats().connected; });
    struct Reply {
        std::atomic<int> calls{0};
        vkp_status status = VKP_ERR_INVALID;
        std::string words;
    };
    const auto ping = [&] {
        Reply reply;
        relay.on_loop([&] {
            const vkp_status status = vkp_relay_ping_then(
                relay,
                [](void *user, vkp_status got, vkp_str words) {
                    Reply *self = static_cast<Reply *>(user);
                    self->status = got;
                    self->words = words.ptr != nullptr ? std::string(words.ptr, words.len) : "";
                    self->calls++;
                },
                &reply);
            if (status != VKP_OK) {
                vkp_test_fail("no PING");
            }
        });
        vkp_test_wait_until("an answer", [&] { return reply.calls == 1; });
        return std::make_pair(reply.status, reply.words);
    };
    CHECK(ping().first == VKP_OK);
    Peer direct = open(vkp_test_server_unix(server.get()));
    ask(direct, "ACL", "SETUSER", "default", "-ping");
    CHECK(ping().first == VKP_OK); // it answers
    ask(direct, "ACL", "SETUSER", "default", "+ping");
    vkp_test_peer_command(direct.get(), "EVAL", "while true do end", "0",
                          static_cast<const char *>(nullptr));
    ask(open(vkp_test_server_unix(server.get())), "CONFIG", "SET", "busy-reply-threshold", "1");
    vkp_test_wait_until("a busy server", [&] {
        const auto got = ping();
        return got.first == VKP_ERR_REFUSED && starts_with(got.second, "BUSY");
    });
    vkp_test_server_kill(server.get());
    vkp_test_wait_until("the outage", [&] { return !relay.stats().connected; });
    CHECK(ping().first == VKP_ERR_DISCONNECTED);
}

TEST_CASE("survey: the end of the relay ends what was asked for")
{
    EVERY_SETUP();
    std::vector<Asked> asked(8);
    {
        Relay relay(setup);
        std::vector<Peer> peers = relay.client_per_loop();
        for (Asked &each : asked) {
            REQUIRE(vkp_relay_survey_then(relay, on_survey, &each) == VKP_OK);
        }
    }
    for (Asked &each : asked) {
        CHECK(each.calls == 1);
    }
    CHECK(vkp_relay_survey_then(nullptr, on_survey, nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_relay_ping_then(nullptr, nullptr, nullptr) == VKP_ERR_INVALID);
}

TEST_CASE("survey: no memory is said, and the next survey is whole")
{
    EVERY_SETUP();
    Relay relay(setup);
    std::vector<Peer> peers = relay.client_per_loop();
    int refused = 0;
    int empty = 0;
    for (uint64_t k = 1; k < 8; k++) {
        Asked asked;
        vkp_test_env_fault(&relay.test, VKP_TEST_FAULT_ONCE, k);
        const vkp_status status = vkp_relay_survey_then(relay, on_survey, &asked);
        if (status == VKP_OK) {
            vkp_test_wait_until("a survey", [&] { return asked.calls == 1; });
            empty += asked.survey.there ? 0 : 1;
        }
        refused += status == VKP_ERR_NOMEM ? 1 : 0;
        vkp_test_env_fault(&relay.test, VKP_TEST_FAULT_NONE, 0);
        CHECK(survey_of(relay).in(VKP_RELAY_CLIENT_IDLE) == setup.loops);
    }
    CHECK(refused == 1);
    CHECK(empty == 4);
}

TEST_CASE("survey: a loop that was held up is late, when that is measured")
{
    vkp_relay_config config = {};
    config.measure_lag = true;
    EVERY_SETUP();
    Relay relay(setup, config);
    Peer peer = relay.client();
    ask(peer, "PING");
    relay.on_loop([] {
        const uint64_t until = vkp_now_ns() + 250000000;
        while (vkp_now_ns() < until) {
        }
    });
    vkp_test_wait_until("a late loop",
                        [&] { return survey_of(relay).loops[0].lag_ns >= 100000000; });
}
