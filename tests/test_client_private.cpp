// SPDX-License-Identifier: MIT
//
// Commands that block, on connections of their own: nobody else waits, and what nobody waits for
// any longer is not taken from the server.
#include "support/catch.hpp"
#include "support/fake_server.h"

#include <string>
#include <vector>

namespace {

class Blocking {
  public:
    explicit Blocking(size_t most, vkp_client_config (*change)(vkp_client_config) = nullptr,
                      bool with_password = false)
        : loop(&vkp_backend_null, 0), client(loop, config(most, change))
    {
        if (!with_password) {
            peer = server.greet(loop, client);
            return;
        }
        peer = server.accept(loop);
        (void)heard(loop, peer);
        say(peer, hello_reply);
        until_state(loop, client, VKP_CLIENT_READY);
    }
    vkp_client_config config(size_t most, vkp_client_config (*change)(vkp_client_config)) const
    {
        vkp_client_config result = server.config();
        result.private_max = most;
        result.heartbeat_ms = VKP_OFF;
        return change ? change(result) : result;
    }
    Loop loop;
    FakeServer server;
    Client client;
    Peer peer;
    Peer own;
};

const std::vector<std::string> blpop = {"BLPOP", "l", "0"};

} // namespace

TEST_CASE("private: a command that blocks has a connection of its own", "[client]")
{
    Blocking with(2);
    Question blocked(with.client, {"BLPOP", "l", "0"});
    Question other(with.client, {"GET", "k"});
    CHECK(heard(with.loop, with.peer) == wire({"GET", "k"}));
    Peer own = with.server.greet(with.loop);
    CHECK(heard(with.loop, own) == wire(blpop));
    say(with.peer, "+v\r\n");
    CHECK(other.text_on(with.loop) == "v");
    CHECK(blocked.try_recv() == VKP_ERR_EMPTY);
    say(own, "*2\r\n+l\r\n+x\r\n");
    CHECK(blocked.text_on(with.loop) == "[l x]");
    // It is kept for the next one.
    Question again(with.client, {"BRPOP", "l", "0"});
    CHECK(heard(with.loop, own) == wire({"BRPOP", "l", "0"}));
    say(own, "_\r\n");
    CHECK(again.text_on(with.loop) == "null");
    // For five seconds.
    const uint64_t idle = with.loop.now();
    hung_up(with.loop, own);
    CHECK(with.loop.now() == idle + 5000 * ms);
    CHECK(with.client.history() == "connected");
}

TEST_CASE("private: it logs in and is set up as the shared connection", "[client]")
{
    static const vkp_str no_touch[] = {vkp_str_of("CLIENT"), vkp_str_of("NO-TOUCH"),
                                       vkp_str_of("ON")};
    static const vkp_client_setup setup = {3, no_touch, {nullptr, 0}, false};
    Loop loop(&vkp_backend_null, 0);
    FakeServer server;
    vkp_client_config config = server.config();
    config.private_max = 1;
    config.username = vkp_str_of("ann");
    config.password = vkp_str_of("pw");
    config.database = 3;
    config.setup = &setup;
    config.setup_count = 1;
    Client client(loop, config);
    Question blocked(client, {"XREAD", "BLOCK", "0", "STREAMS", "x", "$"});
    Peer shared;
    for (int i = 0; i < 2; i++) {
        Peer peer = server.accept(loop);
        CHECK(heard(loop, peer) == wire({"HELLO", "3", "AUTH", "ann", "pw"}));
        say(peer, hello_reply);
        CHECK(heard(loop, peer) == wire({"SELECT", "3"}));
        CHECK(heard(loop, peer) == wire({"CLIENT", "NO-TOUCH", "ON"}));
        say(peer, "+OK\r\n+OK\r\n");
        if (i == 0) {
            until_state(loop, client, VKP_CLIENT_READY);
            shared = std::move(peer);
            continue;
        }
        CHECK(heard(loop, peer) == wire({"XREAD", "BLOCK", "0", "STREAMS", "x", "$"}));
        say(peer, "_\r\n");
        CHECK(blocked.text_on(loop) == "null");
    }
}

TEST_CASE("private: when all are in use commands wait, in their order", "[client]")
{
    Blocking with(1);
    Question first(with.client, {"BLPOP", "1", "0"});
    Question second(with.client, {"BLPOP", "2", "0"});
    Question third(with.client, {"BLPOP", "3", "0"});
    Peer own = with.server.greet(with.loop);
    for (const char *name : {"1", "2", "3"}) {
        CHECK(heard(with.loop, own) == wire({"BLPOP", name, "0"}));
        say(own, bulk(name));
    }
    CHECK(third.text_on(with.loop) == "3");
    CHECK(second.text_on(with.loop) == "2");
    CHECK(first.text_on(with.loop) == "1");
    CHECK(with.server.try_accept() == nullptr);
}

TEST_CASE("private: a command that is given up ends its connection: nothing is taken for nobody",
          "[client]")
{
    Blocking with(1);
    Peer own;
    {
        Question given_up(with.client, {"BLPOP", "l", "0"});
        own = with.server.greet(with.loop);
        CHECK(heard(with.loop, own) == wire(blpop));
    }
    hung_up(with.loop, own);
    // One that waits for a connection is forgotten.
    Question busy(with.client, {"BLPOP", "l", "0"});
    own = with.server.greet(with.loop);
    CHECK(heard(with.loop, own) == wire(blpop));
    {
        Question given_up(with.client, {"BLPOP", "never", "0"});
        with.loop.round();
    }
    with.loop.round();
    say(own, "_\r\n");
    CHECK(busy.text_on(with.loop) == "null");
    Question next(with.client, {"BLPOP", "next", "0"});
    CHECK(heard(with.loop, own) == wire({"BLPOP", "next", "0"}));
}

TEST_CASE("private: what ends its connection ends its command alone", "[client]")
{
    Blocking with(1);
    Question lost(with.client, {"BLPOP", "l", "0"});
    Question waits(with.client, {"BLPOP", "m", "0"});
    Peer own = with.server.greet(with.loop);
    CHECK(heard(with.loop, own) == wire(blpop));
    SECTION("hung up")
    {
        own.reset();
    }
    SECTION("garbage")
    {
        say(own, "?\r\n");
    }
    CHECK(lost.text_on(with.loop) == vkp_status_str(VKP_ERR_CLOSED));
    own = with.server.greet(with.loop);
    CHECK(heard(with.loop, own) == wire({"BLPOP", "m", "0"}));
    say(own, "_\r\n");
    CHECK(waits.text_on(with.loop) == "null");
    CHECK(with.client.history() == "connected");
}

TEST_CASE("private: a login that fails or does not end fails the command", "[client]")
{
    Blocking with(1);
    Question blocked(with.client, {"BLPOP", "l", "0"});
    Peer own = with.server.accept(with.loop);
    CHECK(heard(with.loop, own) == wire({"HELLO", "3"}));
    SECTION("refused")
    {
        say(own, "-ERR max number of clients reached\r\n");
        hung_up(with.loop, own);
    }
    SECTION("never answered")
    {
        hung_up(with.loop, own); // after connect_timeout_ms
    }
    CHECK(blocked.text_on(with.loop) == vkp_status_str(VKP_ERR_CLOSED));
    CHECK(with.client.history() == "connected");
}

TEST_CASE("private: WAIT comes behind what the client wrote before, on both connections",
          "[client]")
{
    Blocking with(1);
    const std::vector<std::string> catch_up = {"PUBLISH", "valkey-push:wait", ""};
    for (int i = 0; i < 2; i++) { // a new connection, and one that is kept
        Question write(with.client, {"SET", "k", "v"});
        Question wait(with.client, {"WAIT", "1", "0"});
        CHECK(heard(with.loop, with.peer) == wire({"SET", "k", "v"}));
        CHECK(heard(with.loop, with.peer) == wire(catch_up));
        for (int round = 0; round < 5; round++) {
            with.loop.round();
            CHECK(with.server.try_accept() == nullptr); // the write has no answer
        }
        say(with.peer, "+OK\r\n:0\r\n");
        CHECK(write.text_on(with.loop) == "OK");
        if (i == 0) {
            with.own = with.server.greet(with.loop);
        }
        CHECK(heard(with.loop, with.own) == wire(catch_up));
        say(with.own, ":0\r\n");
        CHECK(heard(with.loop, with.own) == wire({"WAIT", "1", "0"}));
        CHECK(wait.try_recv() == VKP_ERR_EMPTY);
        say(with.own, ":1\r\n");
        CHECK(wait.text_on(with.loop) == "1");
    }
    // Without the right to that message WAIT would wait for nothing.
    Question refused(with.client, {"WAIT", "1", "0"});
    CHECK(heard(with.loop, with.peer) == wire(catch_up));
    say(with.peer, "-NOPERM no\r\n");
    CHECK(heard(with.loop, with.own) == wire(catch_up));
    say(with.own, "-NOPERM no\r\n");
    CHECK(refused.text_on(with.loop) == "error: NOPERM no");
    Question lost(with.client, {"WAITAOF", "1", "0", "0"});
    CHECK(heard(with.loop, with.peer) == wire(catch_up));
    with.peer.reset();
    CHECK(lost.text_on(with.loop) == vkp_status_str(VKP_ERR_CLOSED));
}

TEST_CASE("private: a connection of its own logs in as the client does now", "[client]")
{
    Blocking with(
        1,
        [](vkp_client_config config) {
            config.password = vkp_str_of("hooked");
            return config;
        },
        true);
    vkp_oneshot slot;
    REQUIRE(vkp_client_authenticate(with.client, &slot, vkp_str_of("ann"), vkp_str_of("new")) ==
            VKP_OK);
    CHECK(heard(with.loop, with.peer) == wire({"AUTH", "ann", "new"}));
    say(with.peer, "+OK\r\n");
    with.loop.round();
    vkp_reply *reply = nullptr;
    vkp_test_run_until(with.loop, "the reply",
                       [&] { return vkp_oneshot_try_recv(&slot, &reply) == VKP_OK; });
    vkp_reply_unref(reply);
    vkp_oneshot_close(&slot);
    Question blocked(with.client, {"BLPOP", "l", "0"});
    Peer own = with.server.accept(with.loop);
    CHECK(heard(with.loop, own) == wire({"HELLO", "3", "AUTH", "ann", "new"}));
}

TEST_CASE("private: an outage of the shared connection leaves them alone", "[client]")
{
    Blocking with(1);
    Question blocked(with.client, {"BLPOP", "l", "0"});
    Peer own = with.server.greet(with.loop);
    CHECK(heard(with.loop, own) == wire(blpop));
    with.peer.reset();
    until_events(with.loop, with.client, 2);
    with.peer = with.server.greet(with.loop, with.client);
    say(own, "*2\r\n+l\r\n+x\r\n");
    CHECK(blocked.text_on(with.loop) == "[l x]");
}

TEST_CASE("private: they go with the client, in any state", "[client]")
{
    Blocking with(2);
    Question blocked(with.client, {"BLPOP", "l", "0"});
    Question logging_in(with.client, {"BLPOP", "m", "0"});
    Question waiting(with.client, {"BLPOP", "n", "0"});
    Peer own = with.server.greet(with.loop);
    CHECK(heard(with.loop, own) == wire(blpop));
    Peer second = with.server.accept(with.loop);
    CHECK(heard(with.loop, second) == wire({"HELLO", "3"}));
    vkp_client_close(with.client);
    CHECK(blocked.text_on(with.loop) == vkp_status_str(VKP_ERR_CLOSED));
    CHECK(logging_in.text_on(with.loop) == vkp_status_str(VKP_ERR_CLOSED));
    CHECK(waiting.text_on(with.loop) == vkp_status_str(VKP_ERR_CLOSED));
    hung_up(with.loop, own);
    hung_up(with.loop, second);
}

TEST_CASE("private: each allocation may fail, and the command says so or runs", "[client][faults]")
{
    bool finished = false;
    for (uint64_t k = 1; !finished; k++) {
        REQUIRE(k < 200);
        INFO("k " << k);
        Blocking with(1);
        std::vector<Peer> peers;
        vkp_test_env_fault(&with.loop.test, VKP_TEST_FAULT_ONCE, k);
        Question blocked;
        const vkp_status status = blocked.send(with.client, {"BLPOP", "l", "0"});
        if (status != VKP_OK) {
            CHECK(status == VKP_ERR_NOMEM);
            continue;
        }
        vkp_status outcome = VKP_ERR_EMPTY;
        vkp_test_run_until(with.loop, "an outcome", [&] {
            if (Peer peer = with.server.try_accept()) {
                peers.push_back(std::move(peer));
            }
            for (const Peer &peer : peers) {
                size_t len = 0;
                const char *frame = vkp_test_peer_try_read_frame(peer.get(), &len);
                if (frame) {
                    const bool hello = std::string(frame, len) == wire({"HELLO", "3"});
                    (void)!vkp_test_peer_send(peer.get(), hello ? hello_reply : "_\r\n",
                                              hello ? strlen(hello_reply) : 3);
                }
            }
            outcome = blocked.try_recv();
            return outcome != VKP_ERR_EMPTY;
        });
        CHECK((outcome == VKP_OK || outcome == VKP_ERR_CLOSED));
        finished = vkp_test_env_failures(&with.loop.test) == 0;
        vkp_test_env_fault(&with.loop.test, VKP_TEST_FAULT_NONE, 0);
    }
}
