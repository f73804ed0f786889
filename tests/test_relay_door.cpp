// SPDX-License-Identifier: MIT
//
// The doors of a relay: what clients have to say first, how many come in at one, and how long they
// may say nothing.
#include "support/catch.hpp"

#include "support/relay_probe.h"

namespace {

using namespace relay_probe;

// One more door of a relay; its address.
std::string open_door(Relay &relay, vkp_relay_door door)
{
    const char *bound = nullptr;
    door.address = vkp_str_of("tcp:127.0.0.1:0");
    vkp_status status = VKP_ERR_SYS;
    relay.on_loop([&] { status = vkp_relay_open_door(relay, &door, &bound); });
    REQUIRE(status == VKP_OK);
    return bound;
}

vkp_relay_door locked(const char *password = "s3cret")
{
    vkp_relay_door door = {};
    door.password = vkp_str_of(password);
    return door;
}

// What a line of words is answered, without numbers of clients; of NOAUTH, whose words differ from
// server to server, the first one.
std::string said(const Peer &peer, const std::string &line)
{
    say(peer, wire(line));
    std::string reply = hear(peer);
    const std::string key = bulk("id") + ":";
    const size_t at = reply.find(key);
    if (at != std::string::npos) {
        reply.erase(at + key.size(), reply.find('\r', at + key.size()) - at - key.size());
    }
    return starts_with(reply, "-NOAUTH ") ? "-NOAUTH" : reply;
}

} // namespace

TEST_CASE("door: with a password it answers as a server with that password does")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Server server = start_server({"--requirepass", "s3cret"});
    vkp_relay_config config = upstream_of(vkp_test_server_unix(server.get()));
    config.password = vkp_str_of("s3cret");
    Relay relay(setup, config);
    Relay::until_connected(relay.client());
    Peer peer = open(open_door(relay, locked()));
    Peer direct = open(vkp_test_server_unix(server.get()));
    for (const char *line : {"PING",
                             "GET k",
                             "SUBSCRIBE c",
                             "MULTI",
                             "HELLO",
                             "HELLO 3",
                             "HELLO 3 SETNAME me",
                             "AUTH no",
                             "AUTH default no",
                             "AUTH ann s3cret",
                             "AUTH s3cre",
                             "AUTH s3crets",
                             "HELLO 3 AUTH default no",
                             "CLIENT ID",

                             "GET k",
                             "AUTH default s3cret",
                             "SET k v",
                             "GET k",
                             "AUTH s3cret",
                             "AUTH no",
                             "GET k",
                             "RESET",
                             "GET k",
                             "HELLO 3 AUTH default s3cret SETNAME me",
                             "CLIENT GETNAME",
                             "GET none",
                             "RESET",
                             "PING",
                             "HELLO 2 SETNAME you AUTH default s3cret",
                             "CLIENT GETNAME",
                             "QUIT"}) {
        INFO(line);
        CHECK(said(peer, line) == said(direct, line));
    }
    CHECK(hear(peer).empty());
}

TEST_CASE("door: other credentials than the password are the server's to judge, behind it")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Server server =
        start_server({"--requirepass", "other", "--user", "ann", "on", ">pw", "+@all", "~*", "&*"});
    vkp_relay_config config = upstream_of(vkp_test_server_unix(server.get()));
    config.password = vkp_str_of("other");
    Relay relay(setup, config);
    Relay::until_connected(relay.client());
    Peer peer = open(open_door(relay, locked()));
    Peer direct = open(vkp_test_server_unix(server.get()));
    CHECK(starts_with(said(peer, "AUTH ann pw"), "-WRONGPASS ")); // not before the password
    CHECK(said(peer, "AUTH s3cret") == "+OK\r\n");
    CHECK(said(peer, "AUTH default s3cret") == "+OK\r\n"); // once more
    CHECK(said(peer, "AUTH ann no") == said(direct, "AUTH ann no"));
    CHECK(said(peer, "AUTH ann pw") == "+OK\r\n");
    CHECK(said(peer, "ACL WHOAMI") == bulk("ann"));
    CHECK(said(relay.client(), "PING") == "+PONG\r\n"); // the other door has no password
}

TEST_CASE("door: without a server the password opens it, too, and nothing is large before it")
{
    EVERY_SETUP();
    Relay relay(setup);
    const std::string address = open_door(relay, locked());
    Peer peer = open(address);
    CHECK(said(peer, "PUBLISH c m") == "-NOAUTH");
    CHECK(starts_with(said(peer, "AUTH no"), "-WRONGPASS "));
    CHECK(said(peer, "AUTH s3cret") == "+OK\r\n");
    CHECK(said(peer, "PUBLISH c m") == ":0\r\n");
    CHECK(said(peer, "ECHO " + std::string(100000, 'x')) == bulk(std::string(100000, 'x')));
    Peer large = open(address);
    (void)vkp_test_peer_send_text(large.get(), "*2\r\n$4\r\nAUTH\r\n$100000\r\n");
    (void)vkp_test_peer_send_text(large.get(), std::string(50000, 'x').c_str());
    CHECK(starts_with(hear(large), "-ERR Protocol error: unauthenticated"));
    CHECK(hear(large).empty());
}

TEST_CASE("door: one has its own number of clients, and takes no place from the others")
{
    EVERY_SETUP();
    Relay relay(setup);
    vkp_relay_door door = {};
    door.max_clients = 2;
    const std::string address = open_door(relay, door);
    std::vector<Peer> peers;
    for (int i = 0; i < 2; i++) {
        peers.push_back(open(address));
        CHECK(said(peers.back(), "PING") == "+PONG\r\n");
    }
    CHECK(hear(open(address)) == "-ERR max number of clients reached\r\n");
    CHECK(said(relay.client(), "PING") == "+PONG\r\n");
    peers.pop_back();
    vkp_test_wait_until("a place", [&] { return said(open(address), "PING") == "+PONG\r\n"; });
}

TEST_CASE("door: who says nothing and waits for nothing is disconnected after a while")
{
    StillRelay relay({});
    vkp_relay_door door = {};
    const std::string path = vkp_test_fresh_address("door");
    door.address = vkp_str_of(path.c_str());
    door.idle_ms = 5000;
    REQUIRE(vkp_relay_open_door(relay, &door, nullptr) == VKP_OK);
    auto ask_on = [&](const Peer &peer, const char *line) {
        say(peer, wire(line));
        return vkp_test_frame_on(relay.loop, peer.get());
    };
    Peer silent = open(path);
    Peer talking = open(path);
    Peer subscribed = open(path);
    Peer elsewhere;
    CHECK(relay.knock(&elsewhere) == "+PONG\r\n");
    CHECK(ask_on(silent, "PING") == "+PONG\r\n");
    CHECK(ask_on(subscribed, "SUBSCRIBE c") == confirmation(2, "subscribe", "c", 1));
    for (int i = 0; i < 4; i++) {
        CHECK(ask_on(talking, "PING") == "+PONG\r\n");
        CHECK(relay.stats().clients == (i < 2 ? 4u : 3u));
        relay.pass(3000);
    }
    CHECK(hear(silent).empty());
    CHECK(ask_on(subscribed, "UNSUBSCRIBE c") == confirmation(2, "unsubscribe", "c", 0));
    relay.pass(4000);
    CHECK(relay.stats().clients == 2); // its time begins when it waits for nothing
    relay.pass(2000);
    CHECK(relay.stats().clients == 1);
    CHECK(hear(subscribed).empty());
    CHECK(ask_on(elsewhere, "PING") == "+PONG\r\n");
    CHECK(vkp_loop_get_deadline_ns(relay.loop) < VKP_FOREVER);
}

TEST_CASE("door: wrong ones are refused, and without memory nothing is left")
{
    vkp_test_loop loop;
    vkp_loop *view = loop;
    vkp_test_env test;
    vkp_test_env_init(&test);
    {
        vkp_relay_config config = {};
        config.loops = &view;
        config.env = &test.env;
        vkp_relay *relay = nullptr;
        REQUIRE(vkp_relay_open(&config, &relay) == VKP_OK);
        vkp_relay_door door = locked("");
        door.address = vkp_str_of("unix:");
        CHECK(vkp_relay_open_door(relay, &door, nullptr) == VKP_ERR_INVALID);
        CHECK(vkp_relay_open_door(relay, nullptr, nullptr) == VKP_ERR_INVALID);
        CHECK(vkp_relay_open_door(nullptr, &door, nullptr) == VKP_ERR_INVALID);
        door = locked();
        CHECK(vkp_relay_open_door(relay, &door, nullptr) == VKP_ERR_INVALID);
        door.address = vkp_str_of("unix:");
        vkp_status status = VKP_ERR_NOMEM;
        for (uint64_t k = 1; status != VKP_OK; k++) {
            vkp_test_env_fault(&test, VKP_TEST_FAULT_ONCE, k);
            status = vkp_relay_open_door(relay, &door, nullptr);
            CHECK((status == VKP_OK || status == VKP_ERR_NOMEM));
        }
        vkp_test_env_fault(&test, VKP_TEST_FAULT_NONE, 0);
        vkp_relay_unref(relay);
    }
    vkp_loop_close(loop);
    vkp_test_env_deinit(&test);
}
