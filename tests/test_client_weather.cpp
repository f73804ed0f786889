// SPDX-License-Identifier: MIT
//
// Bad days of a real server: scripts that run long, data sets that load, rights, limits and
// passwords that change, connections that are killed or cut. After each the books balance: every
// message arrived, or was published inside a gap that was reported, and every name is back.
#include "support/catch.hpp"
#include "support/real_server.h"

#include <algorithm>
#include <atomic>
#include <map>
#include <string>
#include <vector>

#include <sys/socket.h>

namespace {

// Publishes numbers, and knows when each one was on its way.
class Publisher {
  public:
    explicit Publisher(const Server &server) : peer_(server.peer())
    {
    }
    // Publish one number to the name; it is on its way between the two times.
    void publish(const std::string &name)
    {
        Sent sent = {name, vkp_now_ns(), 0};
        const std::string reply = ask(peer_, "PUBLISH", name, std::to_string(sent_.size()));
        sent.after_ns = vkp_now_ns();
        sent.taken = reply[0] == ':';
        sent_.push_back(sent);
    }
    // Every number that did not arrive lies in a gap that covers its name; none arrived twice, each
    // name's are in order.
    void check(const Client &client) const
    {
        std::vector<int> seen(sent_.size());
        std::map<std::string, size_t> last;
        for (const vkp_test_event &event : client.events) {
            if (event.kind != VKP_PUSH_MESSAGE) {
                continue;
            }
            const size_t number = std::stoul(event.payload);
            REQUIRE(number < sent_.size());
            CHECK(++seen[number] == 1);
            if (last.count(event.channel)) {
                CHECK(number > last[event.channel]);
            }
            last[event.channel] = number;
        }
        size_t missing = 0;
        for (size_t i = 0; i < sent_.size(); i++) {
            if (seen[i] == 0 && sent_[i].taken) {
                missing++;
                INFO("number " << i << " to " << sent_[i].name);
                CHECK(is_covered(client, sent_[i]));
            }
        }
        INFO(missing << " of " << sent_.size() << " are missing");
        CHECK(missing < sent_.size());
    }
    size_t count() const
    {
        return sent_.size();
    }

  private:
    struct Sent {
        std::string name;
        uint64_t before_ns;
        uint64_t after_ns;
        bool taken = false;
    };
    static bool is_covered(const Client &client, const Sent &sent)
    {
        for (const vkp_test_event &event : client.events) {
            if (event.kind == VKP_PUSH_GAP && event.gap.from_ns <= sent.after_ns &&
                event.gap.to_ns >= sent.before_ns &&
                (event.names.empty() || std::find(event.names.begin(), event.names.end(),
                                                  sent.name) != event.names.end())) {
                return true;
            }
        }
        return false;
    }
    Peer peer_;
    std::vector<Sent> sent_;
};

// The descriptor that the library opened last.
std::atomic<int> last_socket{-1};

const vkp_sys *recording_sys()
{
    static const vkp_sys table = [] {
        vkp_sys copy = *vkp_sys_get_default();
        copy.socket = [](int family, int type) {
            const int fd = vkp_sys_get_default()->socket(family, type);
            last_socket = fd;
            return fd;
        };
        return copy;
    }();
    return &table;
}

void until_subscribed(vkp_loop *loop, const Client &client, size_t count)
{
    vkp_test_run_until(loop, "subscriptions",
                       [&] { return client.count(VKP_PUSH_SUBSCRIBED) >= count; });
}

void until_gap(vkp_loop *loop, const Client &client, size_t count = 1)
{
    vkp_test_run_until(loop, "a gap", [&] { return client.count(VKP_PUSH_GAP) >= count; });
}

// Until a message that is published now arrives.
void until_it_arrives(vkp_loop *loop, const Client &client, Publisher &publisher,
                      const std::string &name)
{
    publisher.publish(name);
    const std::string number = std::to_string(publisher.count() - 1);
    vkp_test_run_until(loop, "the last message", [&] {
        return !client.events.empty() && client.events.back().kind == VKP_PUSH_MESSAGE &&
               client.events.back().payload == number;
    });
}

} // namespace

TEST_CASE("weather: the connection is killed while a script runs", "[client][server]")
{
    NEEDS_A_SERVER
    Server server;
    Loop loop(*vkp_test_backends(), recording_sys());
    Client client(loop, server.config());
    Publisher publisher(server);
    Peer admin = server.peer();
    if (ask(admin, "CONFIG", "SET", "busy-reply-threshold", "20")[0] != '+') {
        CHECK(ask(admin, "CONFIG", "SET", "lua-time-limit", "20") == "+OK\r\n");
    }
    client.subscribe("a");
    client.subscribe("b");
    until_subscribed(loop, client, 2);
    until_it_arrives(loop, client, publisher, "a");
    // The script ends when the test says so: it waits for nothing that the test does not do.
    Peer scripting = server.peer();
    const std::string script = wire({"EVAL", "while true do end", "0"});
    REQUIRE(vkp_test_peer_send(scripting.get(), script.data(), script.size()));
    vkp_test_wait_until("a busy server", [&] { return ask(admin, "GET", "k").find("-BUSY") == 0; });
    // Its own connection is lost: a new one is greeted, and each SUBSCRIBE is refused.
    REQUIRE(shutdown(last_socket, SHUT_RDWR) == 0);
    vkp_test_run_until(loop, "both refusals", [&] { return client.count(VKP_PUSH_REFUSED) == 2; });
    CHECK(client.count(VKP_PUSH_GAP) == 0);
    CHECK(client.events.back().payload.find("BUSY") == 0);
    CHECK(ask(admin, "SCRIPT", "KILL") == "+OK\r\n");
    publisher.publish("a");
    publisher.publish("b");
    until_subscribed(loop, client, 4);
    until_it_arrives(loop, client, publisher, "a");
    until_it_arrives(loop, client, publisher, "b");
    publisher.check(client);
    CHECK(client.count(VKP_PUSH_DISCONNECTED) == 1);
    CHECK(subscribers(admin, "a") == "1");
    CHECK(subscribers(admin, "b") == "1");
}

TEST_CASE("weather: a script of many heartbeats costs nothing but the wait", "[client][server]")
{
    NEEDS_A_SERVER
    Server server;
    Loop loop;
    vkp_client_config config = server.config();
    config.heartbeat_ms = 10;
    config.reply_timeout_ms = 20;
    Client client(loop, config);
    Peer admin = server.peer();
    if (ask(admin, "CONFIG", "SET", "busy-reply-threshold", "5")[0] != '+') {
        CHECK(ask(admin, "CONFIG", "SET", "lua-time-limit", "5") == "+OK\r\n");
    }
    client.subscribe("c");
    until_subscribed(loop, client, 1);
    Peer scripting = server.peer();
    const std::string script = wire({"EVAL", "while true do end", "0"});
    REQUIRE(vkp_test_peer_send(scripting.get(), script.data(), script.size()));
    vkp_test_wait_until("a busy server", [&] { return ask(admin, "GET", "k").find("-BUSY") == 0; });
    for (int i = 0; i < 10; i++) { // heartbeats are refused too
        Question question(client, {"GET", "k"});
        CHECK(question.text_on(loop).find("error: BUSY") == 0);
        loop.round(loop.now() + 10000000);
    }
    CHECK(ask(admin, "SCRIPT", "KILL") == "+OK\r\n");
    vkp_test_wait_until("the end of it", [&] { return ask(admin, "GET", "k").find("-BUSY") != 0; });
    Question after(client, {"PING"});
    CHECK(after.text_on(loop) == "PONG");
    CHECK(client.history() == "connected, subscribed c");
}

TEST_CASE("weather: a server that says nothing for a while may be busy", "[client][server]")
{
    NEEDS_A_SERVER
    Server server({"--enable-debug-command", "local"});
    Loop loop;
    vkp_client_config config = server.config();
    config.heartbeat_ms = 10;
    config.reply_timeout_ms = 20;
    Client client(loop, config);
    client.subscribe("c");
    until_subscribed(loop, client, 1);
    Peer admin = server.peer();
    const std::string sleep = wire({"DEBUG", "SLEEP", "0.4"});
    REQUIRE(vkp_test_peer_send(admin.get(), sleep.data(), sleep.size()));
    vkp_client_stats stats;
    vkp_test_run_until(loop, "three probes", [&] {
        vkp_client_get_stats(client, &stats);
        return stats.probes >= 3 || stats.outages > 0;
    });
    Question after(client, {"PING"});
    CHECK(after.text_on(loop) == "PONG");
    CHECK(client.history() == "connected, subscribed c");
}

TEST_CASE("weather: a server that is paused, for all or for writes", "[client][server]")
{
    NEEDS_A_SERVER
    const char *mode = GENERATE("ALL", "WRITE");
    Server server;
    Loop loop;
    vkp_client_config config = server.config();
    config.heartbeat_ms = 10;
    config.reply_timeout_ms = 20;
    Client client(loop, config);
    client.subscribe("c");
    until_subscribed(loop, client, 1);
    Peer admin = server.peer();
    CHECK(ask(admin, "CLIENT", "PAUSE", "400", mode) == "+OK\r\n");
    Question write(client, {"SET", "k", "v"});
    CHECK(write.text_on(loop) == "OK");
    CHECK(client.history() == "connected, subscribed c");
}

TEST_CASE("weather: a data set that loads", "[client][server]")
{
    NEEDS_A_SERVER
    Server server({"--key-load-delay", "300", "--loading-process-events-interval-bytes", "1024",
                   "--enable-debug-command", "local"});
    Loop loop;
    Client client(loop, server.config());
    Publisher publisher(server);
    Peer admin = server.peer();
    client.subscribe("c");
    until_subscribed(loop, client, 1);
    CHECK(ask(admin, "DEBUG", "POPULATE", "3000") == "+OK\r\n");
    // The reload answers everybody -LOADING for a second; subscriptions stand.
    const std::string reload = wire({"DEBUG", "RELOAD"});
    REQUIRE(vkp_test_peer_send(admin.get(), reload.data(), reload.size()));
    vkp_test_run_until(loop, "LOADING", [&] {
        Question question(client, {"GET", "k"});
        return question.text_on(loop).find("error: LOADING") == 0;
    });
    client.subscribe("d");
    until_subscribed(loop, client, 2);
    vkp_test_run_until(loop, "the end of it", [&] {
        Question question(client, {"GET", "k"});
        return question.text_on(loop) == "null";
    });
    until_it_arrives(loop, client, publisher, "c");
    until_it_arrives(loop, client, publisher, "d");
    publisher.check(client);
}

TEST_CASE("weather: a replica without its primary", "[client][server]")
{
    NEEDS_A_SERVER
    const int protocol = GENERATE(2, 3);
    Server server;
    Loop loop;
    Peer replicating = server.peer();
    CHECK(ask(replicating, "CONFIG", "SET", "replica-serve-stale-data", "no") == "+OK\r\n");
    CHECK(ask(replicating, "REPLICAOF", "127.0.0.1", "1") == "+OK\r\n");
    vkp_client_config config = server.config();
    config.protocol = protocol;
    SECTION("is good enough for subscriptions")
    {
        Client client(loop, config);
        client.subscribe("c");
        until_subscribed(loop, client, 1);
        CHECK(client.history() == "connected, subscribed c");
    }
    SECTION("is left where a primary is wanted, until it is one")
    {
        config.role = VKP_CLIENT_ROLE_PRIMARY;
        Client client(loop, config);
        vkp_test_run_until(loop, "a failure", [&] { return client.events.size() == 1; });
        CHECK(client.events[0].payload.find("not a primary but a: ") == 0);
        Peer admin = server.peer();
        CHECK(ask(admin, "REPLICAOF", "NO", "ONE") == "+OK\r\n");
        until_ready(loop, client);
        CHECK(client.history() == "connect-failed, connected");
        // Demoted again: the write that shows it is answered, then the client looks again.
        CHECK(ask(admin, "REPLICAOF", "127.0.0.1", "1") == "+OK\r\n");
        if (protocol == 3) {
            Question write(client, {"SET", "k", "v"});
            CHECK(write.text_on(loop).find("error: READONLY") == 0);
            vkp_test_run_until(loop, "the loss",
                               [&] { return client.count(VKP_PUSH_DISCONNECTED) == 1; });
        }
    }
}

TEST_CASE("weather: too many clients", "[client][server]")
{
    NEEDS_A_SERVER
    Server server;
    Loop loop;
    Peer admin = server.peer();
    CHECK(ask(admin, "CONFIG", "SET", "maxclients", "1") == "+OK\r\n");
    Client client(loop, server.config());
    vkp_test_run_until(loop, "a failure", [&] { return client.events.size() == 1; });
    CHECK(client.events[0].payload.find("max number of clients") != std::string::npos);
    CHECK(ask(admin, "CONFIG", "SET", "maxclients", "100") == "+OK\r\n");
    until_ready(loop, client);
    CHECK(client.history() == "connect-failed, connected");
}

TEST_CASE("weather: passwords that are rotated", "[client][server]")
{
    NEEDS_A_SERVER
    Server server({"--requirepass", "one"});
    Loop loop;
    std::string password = "one";
    vkp_client_config config = server.config();
    config.on_connect = [](void *user, vkp_client_target *target) {
        const auto *now = static_cast<std::string *>(static_cast<vkp_test_client *>(user)->context);
        target->password = vkp_str_of(now->c_str());
    };
    Client client(loop, config, &password);
    client.subscribe("c");
    until_subscribed(loop, client, 1);
    Peer admin(vkp_test_peer_open(vkp_test_server_unix(server)));
    CHECK(ask(admin, "AUTH", "one") == "+OK\r\n");
    CHECK(ask(admin, "CONFIG", "SET", "requirepass", "two") == "+OK\r\n");
    password = "two";
    CHECK(ask(admin, "CLIENT", "KILL", "TYPE", "pubsub") == ":1\r\n");
    until_gap(loop, client);
    CHECK(client.history() ==
          "connected, subscribed c, disconnected, reconnected, subscribed c, gap");
}

TEST_CASE("weather: killed again and again in traffic", "[client][server]")
{
    NEEDS_A_SERVER
    Server server;
    Loop loop;
    Client client(loop, server.config());
    Publisher publisher(server);
    Peer admin = server.peer();
    const std::vector<std::string> names = {"a", "b", "c"};
    for (const std::string &name : names) {
        client.subscribe(name.c_str());
    }
    until_subscribed(loop, client, names.size());
    for (size_t outage = 1; outage <= 20; outage++) {
        for (int i = 0; i < 20; i++) {
            publisher.publish(names[static_cast<size_t>(i) % names.size()]);
            if (i % 3 == 0) {
                loop.round();
            }
            if (i == 10) {
                CHECK(ask(admin, "CLIENT", "KILL", "TYPE", "pubsub") == ":1\r\n");
            }
        }
        until_gap(loop, client, outage);
    }
    for (const std::string &name : names) {
        until_it_arrives(loop, client, publisher, name);
    }
    publisher.check(client);
    CHECK(client.count(VKP_PUSH_DISCONNECTED) == 20);
    CHECK(client.count(VKP_PUSH_RECONNECTED) == 20);
    CHECK(client.count(VKP_PUSH_GAP) == 20);
}

TEST_CASE("weather: a subscriber that is cut for its output buffer", "[client][server]")
{
    NEEDS_A_SERVER
    Server server;
    Loop loop;
    Client client(loop, server.config());
    Publisher publisher(server);
    Peer admin = server.peer();
    CHECK(ask(admin, "CONFIG", "SET", "client-output-buffer-limit", "pubsub 32kb 0 0") ==
          "+OK\r\n");
    client.subscribe("c");
    client.subscribe("filler");
    until_subscribed(loop, client, 2);
    // Nobody reads: the server cuts the connection in the midst of a frame.
    const std::string filler(20000, 'x');
    // Servers that refer to a payload instead of copying it (valkey 9) count little of it.
    for (int i = 0, cut = 0; i < 60 || (cut == 0 && i < 5000); i++) {
        publisher.publish("c");
        cut += ask(admin, "PUBLISH", "filler", filler) == ":0\r\n" ? 1 : 0;
    }
    client.hook = nullptr;
    until_gap(loop, client);
    until_it_arrives(loop, client, publisher, "c");
    std::vector<vkp_test_event> kept;
    for (const vkp_test_event &event : client.events) {
        if (event.channel != "filler" || event.kind != VKP_PUSH_MESSAGE) {
            kept.push_back(event);
        }
    }
    client.events = kept;
    publisher.check(client);
    CHECK(client.count(VKP_PUSH_DISCONNECTED) == 1);
}

TEST_CASE("weather: ten thousand names come back with one gap", "[client][server]")
{
    NEEDS_A_SERVER
    constexpr size_t names = 10000;
    Server server;
    Loop loop;
    Client client(loop, server.config());
    Peer admin = server.peer();
    for (size_t i = 0; i < names; i++) {
        client.subscribe(std::to_string(i).c_str(), i % 3 == 0   ? VKP_SUB_PATTERN
                                                    : i % 3 == 1 ? VKP_SUB_CHANNEL
                                                                 : VKP_SUB_SHARD);
    }
    until_subscribed(loop, client, names);
    CHECK(ask(admin, "CLIENT", "KILL", "TYPE", "pubsub") == ":1\r\n");
    until_gap(loop, client);
    CHECK(client.count(VKP_PUSH_SUBSCRIBED) == 2 * names);
    CHECK(client.events.back().kind == VKP_PUSH_GAP);
    CHECK(client.events.back().names.empty());
    vkp_client_stats stats;
    vkp_client_get_stats(client, &stats);
    CHECK(stats.outages == 1);
    CHECK(stats.gaps == 1);
}

TEST_CASE("weather: the server's own counts agree, and are asked for", "[client][server]")
{
    NEEDS_A_SERVER
    Server server;
    Loop loop;
    vkp_client_config config = server.config();
    config.heartbeat_ms = 5;
    config.protocol = GENERATE(2, 3);
    config.delivery_ms = GENERATE(0, 5); // another probe, which takes its turn
    Client client(loop, config);
    client.subscribe("a");
    client.subscribe("p*", VKP_SUB_PATTERN);
    client.subscribe("s", VKP_SUB_SHARD);
    until_subscribed(loop, client, 3);
    vkp_client_stats stats;
    vkp_test_run_until(loop, "five audits", [&] {
        vkp_client_get_stats(client, &stats);
        const bool delivered = stats.deliveries >= (config.delivery_ms != 0 ? 5 : 0);
        return (stats.audits >= 5 && delivered) || stats.outages > 0;
    });
    CHECK(stats.repairs == 0);
    CHECK(stats.outages == 0);
}

TEST_CASE("weather: messages that a server writes into a reply", "[client][server]")
{
    // Servers before 7.2 do; on later ones they stand alone. The program sees no difference.
    NEEDS_A_SERVER
    Server server({"--notify-keyspace-events", "KEA"});
    Loop loop;
    Client client(loop, server.config());
    client.subscribe("__keyspace@0__:s");
    until_subscribed(loop, client, 1);
    Question make(client, {"XGROUP", "CREATE", "s", "g", "$", "MKSTREAM"});
    CHECK(make.text_on(loop) == "OK");
    Question add(client, {"XADD", "s", "1-1", "f", "v"});
    CHECK(add.text_on(loop) == "1-1");
    Question read(client, {"XREADGROUP", "GROUP", "g", "new", "STREAMS", "s", ">"});
    CHECK(read.text_on(loop) == "<s [[1-1 [f v]]]>");
    Sending exec;
    REQUIRE(exec.send(client,
                      wire({"MULTI"}) + wire({"XCLAIM", "s", "g", "other", "0", "1-1"}) +
                          wire({"DEL", "s"}) + wire({"EXEC"}),
                      4) == VKP_OK);
    vkp_test_run_until(loop, "the transaction", [&] { return exec.calls == 1; });
    CHECK(exec.text == "[[[1-1 [f v]]] 1]");
    CHECK(exec.frame.find("keyspace") == std::string::npos);
    fence(loop, client);
    std::string told;
    for (const vkp_test_event &event : client.events) {
        if (event.kind == VKP_PUSH_MESSAGE) {
            told += event.payload + " ";
            CHECK(event.frame.find("__keyspace@0__:s") != std::string::npos);
            CHECK(event.frame.size() < 100);
        }
    }
    CHECK(told.find("xgroup-create") != std::string::npos);
    CHECK(told.find("xgroup-createconsumer") != std::string::npos);
    CHECK(told.find("del") != std::string::npos);
}
