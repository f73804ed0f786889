// SPDX-License-Identifier: MIT
//
// Commands of all clients of a relay share one room: when it is full, large ones wait for their
// turn, and nobody else waits for them.
#include "support/catch.hpp"

#include "support/relay_probe.h"

#include <csignal>
#include <functional>
#include <thread>

namespace {

using namespace relay_probe;

const size_t most = 1 << 20;
const size_t large = 700000;

vkp_relay_config small_room(vkp_test_server *server, size_t bytes = most)
{
    vkp_relay_config config = {};
    config.gather_bytes = bytes;
    config.max_request_bytes = most;
    config.server = vkp_str_of(server != nullptr ? vkp_test_server_unix(server) : nullptr);
    return config;
}

std::string set_large()
{
    return vkp_test_wire({"SET", "k", std::string(large, 'x')});
}

// Each of so many clients at once, in a thread of its own; the first complaint of each.
Strings at_once(size_t count, const std::function<std::string(size_t)> &one)
{
    Strings complaints(count);
    std::vector<std::thread> threads;
    for (size_t i = 0; i < count; i++) {
        threads.emplace_back([&, i] { complaints[i] = one(i); });
    }
    for (std::thread &thread : threads) {
        thread.join();
    }
    return complaints;
}

// What the relay had at most, and has when all is answered and all have left.
void check_bounds(const Relay &relay)
{
    INFO("peak " << vkp_test_env_peak_bytes(const_cast<vkp_test_env *>(&relay.test)));
    CHECK(vkp_test_env_peak_bytes(const_cast<vkp_test_env *>(&relay.test)) < 4 * most);
    vkp_test_wait_until("the room to be empty", [&] { return relay.stats().gathered_bytes == 0; });
}

// A stand-alone relay whose clock the test moves, and clients in the midst of a command. The room
// has one of them, and the kernel's buffer, too: nobody waits to write, and no time passes.
class Halves {
  public:
    Halves() : relay(small_room(nullptr, 200000))
    {
    }
    // Say `bytes` of an ECHO of `large`, once the relay has read what the others said.
    Peer half(size_t bytes)
    {
        Peer peer;
        CHECK(relay.knock(&peer) == "+PONG\r\n");
        (void)vkp_test_peer_send(peer.get(), whole.data(), bytes);
        settle();
        return peer;
    }
    void rest(const Peer &peer, size_t from)
    {
        (void)vkp_test_peer_send(peer.get(), whole.data() + from, whole.size() - from);
        heard_ = vkp_test_frame_on(relay.loop, peer.get());
    }
    bool echoed() const
    {
        return heard_ == bulk(text);
    }
    // Whether the relay answers somebody else, who says little.
    bool serves_others()
    {
        Peer peer;
        return relay.knock(&peer) == "+PONG\r\n";
    }
    void settle()
    {
        for (int i = 0; i < 20; i++) {
            relay.loop.round(relay.loop.now());
        }
    }
    StillRelay relay;
    const std::string text = std::string(150000, 'x');
    const std::string whole = vkp_test_wire({"ECHO", text});

  private:
    std::string heard_;
};

} // namespace

TEST_CASE("room: large commands of many clients at once are all answered, in bounded memory")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Server server = start_server();
    Relay relay(setup, small_room(server.get()));
    Relay::until_connected(relay.client());
    const Strings complaints = at_once(12, [&](size_t i) -> std::string {
        Peer peer = relay.client();
        const std::string key = "k" + std::to_string(i);
        for (int round = 0; round < 4; round++) {
            const std::string value(large - i, static_cast<char>('a' + round));
            for (const std::string &reply :
                 {ask(peer, "SET", key, value), ask(peer, "STRLEN", key)}) {
                if (reply != "+OK\r\n" && reply != ":" + std::to_string(value.size()) + "\r\n") {
                    return reply.substr(0, 100);
                }
            }
        }
        return "";
    });
    CHECK(complaints == Strings(12));
    CHECK(relay.stats().slow_closed == 0);
    check_bounds(relay);
}

TEST_CASE("room: pipelines of large commands are answered in order, and small ones beside them")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Server server = start_server();
    Relay relay(setup, small_room(server.get()));
    Relay::until_connected(relay.client());
    const Strings complaints = at_once(6, [&](size_t i) -> std::string {
        Peer peer = relay.client();
        if (i == 0) {
            for (int n = 0; n < 200; n++) {
                if (ask(peer, "ECHO", std::to_string(n)) != bulk(std::to_string(n))) {
                    return "ECHO " + std::to_string(n);
                }
            }
            return "";
        }
        const std::string value(300000, 'v');
        std::thread writer([&] {
            for (int n = 0; n < 10; n++) {
                const std::string key = std::to_string(i) + "." + std::to_string(n);
                say(peer, vkp_test_wire({"SET", key, value}) + wire("ECHO " + key));
            }
        });
        std::string complaint;
        for (int n = 0; n < 10; n++) {
            const std::string key = std::to_string(i) + "." + std::to_string(n);
            const bool right = hear(peer) == "+OK\r\n" && hear(peer) == bulk(key);
            complaint += right || !complaint.empty() ? "" : key;
        }
        writer.join();
        return complaint;
    });
    CHECK(complaints == Strings(6));
    check_bounds(relay);
}

TEST_CASE("room: blocks of MULTI wait for their turn, too")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Server server = start_server();
    Relay relay(setup, small_room(server.get()));
    Relay::until_connected(relay.client());
    const Strings complaints = at_once(6, [&](size_t i) -> std::string {
        Peer peer = relay.client();
        ask(peer, "MULTI");
        for (int n = 0; n < 4; n++) {
            const std::string reply =
                ask(peer, "APPEND", "k" + std::to_string(i), std::string(200000, 'v'));
            if (reply != "+QUEUED\r\n") {
                return reply.substr(0, 100);
            }
        }
        const std::string reply = ask(peer, "EXEC");
        return reply == "*4\r\n:200000\r\n:400000\r\n:600000\r\n:800000\r\n" ? "" : reply;
    });
    CHECK(complaints == Strings(6));
    check_bounds(relay);
}

TEST_CASE("room: one at a time goes on, the others wait in order, and small ones do not")
{
    Halves halves;
    Peer first = halves.half(120000);  // finds room
    Peer second = halves.half(120000); // has the turn
    Peer third = halves.half(120000);  // waits
    Peer fourth = halves.half(120000); // waits
    CHECK(halves.serves_others());
    halves.rest(second, 120000);
    CHECK(halves.echoed());
    halves.rest(third, 120000);
    CHECK(halves.echoed());
    halves.rest(fourth, 120000);
    CHECK(halves.echoed());
    halves.rest(first, 120000);
    CHECK(halves.echoed());
    CHECK(halves.relay.stats().slow_closed == 0);
}

TEST_CASE("room: who has the turn and sends no more is closed, when others wait")
{
    Halves halves;
    Peer first = halves.half(120000);
    Peer second = halves.half(120000); // has the turn
    halves.relay.pass(20000);
    CHECK(halves.relay.stats().slow_closed == 0); // nobody waits
    Peer third = halves.half(120000);
    (void)vkp_test_peer_send(second.get(), halves.whole.data() + 120000, 1000);
    halves.settle();
    halves.relay.pass(6000);
    CHECK(halves.relay.stats().slow_closed == 0); // it moved
    halves.relay.pass(5000);
    CHECK(halves.relay.stats().slow_closed == 1);
    CHECK(hear(second).empty());
    CHECK(vkp_test_env_logged(&halves.relay.loop.test, "no more of its command for 5000 ms"));
    halves.rest(third, 120000);
    CHECK(halves.echoed());
    halves.rest(first, 120000); // never had the turn, and is never closed for it
    CHECK(halves.echoed());
}

TEST_CASE("room: who leaves makes room: with the turn, waiting for it, and without")
{
    Halves halves;
    Peer first = halves.half(120000);
    Peer second = halves.half(120000);
    Peer third = halves.half(120000);
    Peer fourth = halves.half(120000);
    halves.relay.leave(&third);
    halves.relay.leave(&second);
    halves.rest(fourth, 120000);
    CHECK(halves.echoed());
    halves.relay.leave(&first);
    Peer fifth = halves.half(120000); // finds room
    Peer sixth = halves.half(60000);  // finds room
    halves.rest(sixth, 60000);
    CHECK(halves.echoed());
    halves.rest(fifth, 120000);
    CHECK(halves.echoed());
}

TEST_CASE("room: what a client that ends did not say takes none")
{
    EVERY_SETUP();
    Relay relay(setup, small_room(nullptr));
    for (const char *end : {"QUIT", "NO\r\nSUCH \"quotes"}) {
        Peer peer = relay.client();
        say(peer, std::string(end) + "\r\n" + std::string(100000, 'x'));
        hear_all(peer);
    }
    vkp_test_wait_until("the room to be empty", [&] { return relay.stats().gathered_bytes == 0; });
}

// A client that writes, in a thread of its own.
class Writer {
  public:
    Writer(Peer from, std::string bytes)
        : peer(std::move(from)), wire_(std::move(bytes)), thread_([this] {
              say(peer, wire_);
              done = true;
          })
    {
    }
    ~Writer()
    {
        thread_.join();
    }
    Writer(const Writer &) = delete;
    Writer &operator=(const Writer &) = delete;
    Peer peer;
    std::atomic<bool> done{false};

  private:
    std::string wire_;
    std::thread thread_;
};

TEST_CASE("room: what a server does not answer is not gathered from all")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Server server = start_server();
    Relay relay(setup, small_room(server.get()));
    Peer small = relay.connected_client();
    CHECK(ask(small, "CLIENT", "SETNAME", "small") == "+OK\r\n");
    REQUIRE(kill(vkp_test_server_pid(server.get()), SIGSTOP) == 0);
    {
        std::vector<std::unique_ptr<Writer>> all;
        auto done = [&] {
            return std::count_if(all.begin(), all.end(),
                                 [](const auto &each) { return each->done.load(); });
        };
        for (int i = 0; i < 8; i++) {
            all.push_back(std::make_unique<Writer>(relay.client(), set_large()));
            vkp_test_wait_until("the first, which finds room", [&] { return done() > 0; });
        }
        vkp_test_wait_until("one with the turn", [&] { return done() == 2; });
        for (int i = 0; i < 200; i++) { // whoever could go on would do it now
            CHECK(ask(small, "CLIENT", "GETNAME") == bulk("small"));
        }
        CHECK(done() == 2);
        REQUIRE(kill(vkp_test_server_pid(server.get()), SIGCONT) == 0);
        for (const std::unique_ptr<Writer> &each : all) {
            CHECK(hear(each->peer) == "+OK\r\n");
        }
    }
    check_bounds(relay);
}

// What a client with a connection of its own says at once: one command that blocks.
std::vector<std::string> long_wait()
{
    std::vector<std::string> words = {"BLPOP"};
    for (char name = 'a'; name < 'h'; name++) {
        words.push_back(std::string(large / 7, name));
    }
    words.push_back("0");
    return words;
}

TEST_CASE("room: what blocks on a connection of its own keeps the turn from nobody")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Server server = start_server();
    vkp_relay_config config = small_room(server.get());
    config.gather_ms = VKP_OFF;
    Relay relay(setup, config);
    Peer half = relay.connected_client();
    say(half, set_large().substr(0, large));
    Peer own = relay.client();
    CHECK(ask(own, "WATCH", "none") == "+OK\r\n");
    REQUIRE(kill(vkp_test_server_pid(server.get()), SIGSTOP) == 0); // takes a part of it later
    Writer blocked(std::move(own),
                   vkp_test_wire(long_wait()) +
                       set_large().substr(0, 100000)); // has the turn, and then waits
    vkp_test_wait_until("the turn", [&] { return blocked.done.load(); });
    REQUIRE(kill(vkp_test_server_pid(server.get()), SIGCONT) == 0);
    {
        Writer third(relay.client(), set_large());
        CHECK(hear(third.peer) == "+OK\r\n");
    }
    Peer other = relay.client();
    CHECK(ask(other, "RPUSH", long_wait()[1], "it") == ":1\r\n");
    CHECK(contains(hear(blocked.peer), bulk("it")));
    CHECK(relay.stats().slow_closed == 0);
}

TEST_CASE("room: a server that takes nothing from one client keeps the turn for a while only")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Server server = start_server();
    vkp_relay_config config = small_room(server.get());
    config.gather_ms = 20;
    Relay relay(setup, config);
    Peer half = relay.connected_client();
    Peer own = relay.client();
    CHECK(ask(own, "WATCH", "k") == "+OK\r\n");
    say(half, set_large().substr(0, large));
    vkp_test_wait_until("room to be taken", [&] { return relay.stats().gathered_bytes >= large; });
    REQUIRE(kill(vkp_test_server_pid(server.get()), SIGSTOP) == 0);
    say(own, set_large()); // has the turn
    {
        Writer third(relay.client(), set_large());
        vkp_test_wait_until("the turn of another one", [&] { return third.done.load(); });
        REQUIRE(kill(vkp_test_server_pid(server.get()), SIGCONT) == 0);
        CHECK(hear(third.peer) == "+OK\r\n");
    }
    CHECK(hear(own) == "+OK\r\n");
    CHECK(relay.stats().slow_closed == 0);
}

TEST_CASE("room: where replies are not counted, too, a server that takes nothing stops its client")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Server server = start_server();
    Relay relay(setup, small_room(server.get()));
    Peer small = relay.connected_client();
    CHECK(ask(small, "CLIENT", "SETNAME", "small") == "+OK\r\n");
    Peer tunnel = relay.client();
    say(tunnel, wire("CLIENT REPLY OFF") + wire("SET began yes"));
    Peer direct = open(vkp_test_server_unix(server.get()));
    vkp_test_wait_until("the tunnel", [&] { return ask(direct, "GET", "began") == bulk("yes"); });
    REQUIRE(kill(vkp_test_server_pid(server.get()), SIGSTOP) == 0);
    std::string all;
    for (int i = 0; i < 20; i++) {
        all += set_large();
    }
    {
        Writer writer(std::move(tunnel), all + wire("SET ended yes"));
        vkp_test_wait_until("commands to wait",
                            [&] { return relay.stats().gathered_bytes > most; });
        for (int i = 0; i < 200; i++) { // whoever could go on would do it now
            CHECK(ask(small, "CLIENT", "GETNAME") == bulk("small"));
        }
        CHECK_FALSE(writer.done.load());
        REQUIRE(kill(vkp_test_server_pid(server.get()), SIGCONT) == 0);
        vkp_test_wait_until("all of it",
                            [&] { return ask(direct, "GET", "ended") == bulk("yes"); });
    }
    CHECK(vkp_test_env_peak_bytes(&relay.test) < 8 * most); // 4 MiB of one client, and a command
    CHECK(relay.stats().slow_closed == 0);
}
