// SPDX-License-Identifier: MIT
//
// The client against a real server: what a program sees, and what the server says about it. A
// second, plain connection plays everybody else. Where no server is installed the tests say so.
#include "support/catch.hpp"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <signal.h>
#include <unistd.h>

#include "support/real_server.h"

// ---------------------------------------------------------------------------------------------
// Greeting

TEST_CASE("server: greeted over TCP and over a Unix socket, with a name", "[client][server]")
{
    NEEDS_A_SERVER
    const bool tcp = GENERATE(false, true);
    Server server;
    Loop loop;
    vkp_client_config config = server.config(tcp);
    config.name = vkp_str_of("teller");
    Client client(loop, config);
    Question name(client, {"CLIENT", "GETNAME"});
    Question info(client, {"CLIENT", "INFO"});
    CHECK(name.text_on(loop) == "teller");
    REQUIRE(info.recv_on(loop) == VKP_OK);
    CHECK(info.text().find(" resp=3") != std::string::npos);
    CHECK(vkp_client_get_protocol(client) == 3);
    CHECK(client.history() == "connected");
    CHECK(client.error().empty());
}

TEST_CASE("server: a host name is an address too", "[client][server]")
{
    NEEDS_A_SERVER
    Server server;
    Loop loop;
    const std::string address = "tcp:localhost:" + std::to_string(vkp_test_server_port(server));
    vkp_client_config config = server.config();
    config.address = vkp_str_of(address.c_str());
    Client client(loop, config);
    Question question(client, {"PING"});
    CHECK(question.text_on(loop) == "PONG");
}

TEST_CASE("server: the right password lets in, the wrong one is tried until it is right",
          "[client][server]")
{
    NEEDS_A_SERVER
    const int protocol = GENERATE(3, 2);
    Server server({"--requirepass", "open"});
    Loop loop;
    Peer admin = server.peer();
    CHECK(ask(admin, "AUTH", "open") == "+OK\r\n");
    vkp_client_config config = server.config();
    config.protocol = protocol;
    config.password = vkp_str_of("sesame");
    Client client(loop, config);
    vkp_test_run_until(loop, "a refusal",
                       [&] { return client.error().find("WRONGPASS") != std::string::npos; });
    CHECK(client.state() != VKP_CLIENT_READY);
    Question held;
    const vkp_status asked = held.send(client, {"PING"});
    CHECK((asked == VKP_ERR_DISCONNECTED || asked == VKP_OK));
    CHECK(ask(admin, "CONFIG", "SET", "requirepass", "sesame") == "+OK\r\n");
    until_ready(loop, client);
    CHECK(client.history() == "connect-failed, connected");
    Question question(client, {"PING"});
    CHECK(question.text_on(loop) == "PONG");
    CHECK_FALSE(vkp_test_env_logged(&loop.test, "sesame"));
}

TEST_CASE("server: no password where one is needed is refused, not used", "[client][server]")
{
    NEEDS_A_SERVER
    Server server({"--requirepass", "open"});
    Loop loop;
    Client client(loop, server.config());
    vkp_test_run_until(loop, "a refusal",
                       [&] { return client.error().find("NOAUTH") != std::string::npos; });
    CHECK(client.history() == "connect-failed");
    CHECK(client.events[0].payload.find("NOAUTH") != std::string::npos);
}

TEST_CASE("server: a user with rights of its own; a channel without the right is refused",
          "[client][server]")
{
    NEEDS_A_SERVER
    Server server;
    Loop loop;
    Peer admin = server.peer();
    CHECK(ask(admin, "ACL", "SETUSER", "ann", "on", ">pw", "+@all", "~*", "resetchannels",
              "&news.*") == "+OK\r\n");
    vkp_client_config config = server.config();
    config.username = vkp_str_of("ann");
    config.password = vkp_str_of("pw");
    Client client(loop, config);
    Question who(client, {"ACL", "WHOAMI"});
    CHECK(who.text_on(loop) == "ann");
    Done good;
    Done bad;
    Done again;
    REQUIRE(good.subscribe(client, "news.today") == VKP_OK);
    REQUIRE(bad.subscribe(client, "secret") == VKP_OK);
    vkp_test_run_until(loop, "both outcomes", [&] { return good.calls == 1 && bad.calls == 1; });
    CHECK(good.status == VKP_OK);
    CHECK(bad.status == VKP_ERR_REFUSED);
    CHECK(vkp_test_env_logged(&loop.test, "secret is refused: NOPERM"));
    // A right given later is used when the name is wanted again.
    CHECK(ask(admin, "ACL", "SETUSER", "ann", "&secret") == "+OK\r\n");
    REQUIRE(again.subscribe(client, "secret") == VKP_OK);
    vkp_test_run_until(loop, "the outcome", [&] { return again.calls == 1; });
    CHECK(again.status == VKP_OK);
    CHECK(client.history() ==
          "connected, subscribed news.today, refused secret, subscribed secret");
    // A right taken away closes the connection; the rest comes back.
    CHECK(ask(admin, "ACL", "SETUSER", "ann", "resetchannels", "&news.*") == "+OK\r\n");
    vkp_test_run_until(loop, "the gap", [&] { return client.count(VKP_PUSH_GAP) == 1; });
    CHECK(client.count(VKP_PUSH_DISCONNECTED) == 1);
    CHECK(client.count(VKP_PUSH_RECONNECTED) == 1);
    CHECK(subscribers(admin, "news.today") == "1");
    CHECK(subscribers(admin, "secret") == "0");
    // What is refused is not in the gap; it comes back by itself, with a gap of its own.
    vkp_test_run_until(loop, "the refusal", [&] { return client.count(VKP_PUSH_REFUSED) == 2; });
    CHECK(ask(admin, "ACL", "SETUSER", "ann", "&secret") == "+OK\r\n");
    vkp_test_run_until(loop, "the second gap", [&] { return client.count(VKP_PUSH_GAP) == 2; });
    CHECK(client.events.back().names == std::vector<std::string>{"secret"});
    CHECK(client.count(VKP_PUSH_DISCONNECTED) == 1);
    CHECK(subscribers(admin, "secret") == "1");
}

TEST_CASE("server: without HELLO there is RESP2, pushes included", "[client][server]")
{
    NEEDS_A_SERVER
    const bool renamed = GENERATE(true, false);
    Server server({"--requirepass", "pw", "--rename-command", "HELLO", renamed ? "" : "HELLO"});
    Loop loop;
    Peer admin = server.peer();
    CHECK(ask(admin, "AUTH", "pw") == "+OK\r\n");
    vkp_client_config config = server.config();
    config.password = vkp_str_of("pw");
    config.name = vkp_str_of("old");
    config.protocol = renamed ? 0 : 2;
    Client client(loop, config);
    Question name(client, {"CLIENT", "GETNAME"});
    CHECK(name.text_on(loop) == "old");
    CHECK(vkp_client_get_protocol(client) == 2);
    Question map(client, {"CONFIG", "GET", "maxclients"});
    REQUIRE(map.recv_on(loop) == VKP_OK);
    CHECK(vkp_reply_get_value(map.reply())->type == VKP_RESP_ARRAY);
    client.subscribe("c");
    client.subscribe("c*", VKP_SUB_PATTERN);
    vkp_test_run_until(loop, "confirmations", [&] { return client.events.size() == 3; });
    CHECK(ask(admin, "PUBLISH", "c", "hi") == ":2\r\n");
    vkp_test_run_until(loop, "messages", [&] { return client.events.size() == 5; });
    Question refused(client, {"PING"});
    CHECK(refused.recv_on(loop) == VKP_ERR_CLOSED);
    client.unsubscribe("c");
    client.unsubscribe("c*", VKP_SUB_PATTERN);
    vkp_test_run_until(loop, "the end", [&] { return client.events.size() == 7; });
    CHECK(client.history() == "connected, subscribed c, subscribed c*, message c hi, "
                              "pmessage c* c hi, unsubscribed c, unsubscribed c*");
    Question after(client, {"ECHO", "x"});
    CHECK(after.text_on(loop) == "x");
    // Kept across an outage.
    client.subscribe("c");
    vkp_test_run_until(loop, "a confirmation", [&] { return client.events.size() == 8; });
    CHECK(ask(admin, "CLIENT", "KILL", "TYPE", "pubsub") == ":1\r\n");
    vkp_test_run_until(loop, "the gap", [&] { return client.count(VKP_PUSH_GAP) == 1; });
    CHECK(ask(admin, "PUBLISH", "c", "again") == ":1\r\n");
    vkp_test_run_until(loop, "a message", [&] { return client.count(VKP_PUSH_MESSAGE) == 2; });
}

// ---------------------------------------------------------------------------------------------
// Commands

TEST_CASE("server: every type of RESP3 arrives as it is", "[client][server]")
{
    NEEDS_A_SERVER
    Server server({"--enable-debug-command", "yes"});
    Loop loop;
    Client client(loop, server.config());
    struct Sample {
        const char *name;
        vkp_resp_type type;
        const char *text;
    };
    const Sample samples[] = {
        {"string", VKP_RESP_STRING, "Hello World"},
        {"integer", VKP_RESP_INTEGER, "12345"},
        {"double", VKP_RESP_DOUBLE, nullptr},
        {"null", VKP_RESP_NULL, "null"},
        {"array", VKP_RESP_ARRAY, "[0 1 2]"},
        {"set", VKP_RESP_SET, "{0 1 2}"},
        {"map", VKP_RESP_MAP, "<0 false 1 true 2 false>"},
        {"bignum", VKP_RESP_BIGNUM, "big 1234567999999999999999999999999999999"},
        {"true", VKP_RESP_BOOL, "true"},
        {"false", VKP_RESP_BOOL, "false"},
        {"verbatim", VKP_RESP_STRING, "This is a verbatim\nstring"}};
    for (const Sample &sample : samples) {
        INFO(sample.name);
        Question question(client, {"DEBUG", "PROTOCOL", sample.name});
        REQUIRE(question.recv_on(loop) == VKP_OK);
        const vkp_value *value = vkp_reply_get_value(question.reply());
        CHECK(value->type == sample.type);
        if (sample.text) {
            CHECK(question.text() == sample.text);
        }
    }
    Question number(client, {"DEBUG", "PROTOCOL", "double"});
    REQUIRE(number.recv_on(loop) == VKP_OK);
    CHECK(std::abs(vkp_value_get_double(vkp_reply_get_value(number.reply())) - 3.141) < 1e-9);
    Question verbatim(client, {"DEBUG", "PROTOCOL", "verbatim"});
    REQUIRE(verbatim.recv_on(loop) == VKP_OK);
    CHECK((vkp_reply_get_value(verbatim.reply())->flags & VKP_VALUE_VERBATIM) != 0);
    // An attribute before the reply, and a push before one.
    Question attribute(client, {"DEBUG", "PROTOCOL", "attrib"});
    REQUIRE(attribute.recv_on(loop) == VKP_OK);
    CHECK(attribute.text() == "Some real reply following the attribute");
    Question pushed(client, {"DEBUG", "PROTOCOL", "push"});
    CHECK(pushed.recv_on(loop) == VKP_OK);
    CHECK(client.history() == "connected, other server-cpu-usage");
    Question error(client, {"NO SUCH COMMAND"});
    REQUIRE(error.recv_on(loop) == VKP_OK);
    CHECK(vkp_reply_get_value(error.reply())->type == VKP_RESP_ERROR);
}

TEST_CASE("server: replies of many megabytes, with small ones behind", "[client][server]")
{
    NEEDS_A_SERVER
    Server server;
    Loop loop;
    Client client(loop, server.config(true));
    const std::string big(12 << 20, 'b');
    Question set(client, {"SET", "big", big.c_str()});
    Question small(client, {"ECHO", "small"});
    Question get(client, {"GET", "big"});
    Question twice(client, {"MGET", "big", "big"});
    Question last(client, {"ECHO", "last"});
    CHECK(set.text_on(loop) == "OK");
    CHECK(small.text_on(loop) == "small");
    REQUIRE(get.recv_on(loop) == VKP_OK);
    CHECK(get.text() == big);
    REQUIRE(twice.recv_on(loop) == VKP_OK);
    CHECK(vkp_reply_get_frame(twice.reply()).len > 2 * big.size());
    CHECK(last.text_on(loop) == "last");
    Question many(client, {"EVAL", "local t={} for i=1,200000 do t[i]=i end return t", "0"});
    REQUIRE(many.recv_on(loop) == VKP_OK);
    CHECK(vkp_reply_get_value(many.reply())->len == 200000);
    CHECK(client.history() == "connected");
}

TEST_CASE("server: a deadline passes while the server is busy; later replies are right",
          "[client][server]")
{
    NEEDS_A_SERVER
    Server server({"--enable-debug-command", "yes"});
    Loop loop;
    Client client(loop, server.config());
    until_ready(loop, client);
    vkp_test_loop_thread thread(loop);
    for (int i = 0; i < 20; i++) {
        auto late = std::make_unique<Question>(
            client, std::initializer_list<const char *>{"DEBUG", "SLEEP", "0.01"});
        const vkp_status status = late->recv(vkp_after_ms(i % 5));
        if (status != VKP_ERR_TIMEOUT) {
            CHECK(status == VKP_OK);
        }
        late.reset();
        const std::string text = std::to_string(i);
        Question next(client, {"ECHO", text.c_str()});
        REQUIRE(next.recv() == VKP_OK);
        CHECK(next.text() == text);
    }
}

TEST_CASE("server: threads share one connection, pipelined, with pushes between",
          "[client][server][threads]")
{
    NEEDS_A_SERVER
    Server server;
    Loop loop;
    Client client(loop, server.config());
    client.subscribe("noise");
    vkp_test_loop_thread thread(loop);
    constexpr int askers = 4;
    constexpr int each = 250;
    std::atomic<int> wrong{0};
    std::vector<std::thread> threads;
    for (int t = 0; t < askers; t++) {
        threads.emplace_back([&, t] {
            for (int i = 0; i < each; i++) {
                const std::string text = std::to_string(t) + "." + std::to_string(i);
                Question echo;
                Question publish;
                Question count;
                if (echo.send(client, {"ECHO", text.c_str()}) != VKP_OK ||
                    publish.send(client, {"PUBLISH", "noise", text.c_str()}) != VKP_OK ||
                    count.send(client, {"INCR", "count"}) != VKP_OK) {
                    wrong.fetch_add(1);
                    continue;
                }
                if (count.recv() != VKP_OK || publish.recv() != VKP_OK || echo.recv() != VKP_OK ||
                    echo.text() != text) {
                    wrong.fetch_add(1);
                }
            }
        });
    }
    for (std::thread &one : threads) {
        one.join();
    }
    CHECK(wrong.load() == 0);
    Question total(client, {"GET", "count"});
    REQUIRE(total.recv() == VKP_OK);
    CHECK(total.text() == std::to_string(askers * each));
    // The server wrote the last message before that reply, or behind it.
    vkp_test_wait_until("all messages", [&] { return client.seen.load() >= askers * each + 2u; });
    thread.stop();
    CHECK(client.count(VKP_PUSH_MESSAGE) == askers * each);
    // One connection for all of it: each thread's messages in its order.
    std::vector<int> next(askers);
    for (const vkp_test_event &event : client.events) {
        if (event.kind == VKP_PUSH_MESSAGE) {
            const size_t dot = event.payload.find('.');
            const size_t who = std::stoul(event.payload.substr(0, dot));
            CHECK(event.payload.substr(dot + 1) == std::to_string(next.at(who)++));
        }
    }
}

TEST_CASE("server: a transaction is one block, and holds its own messages apart",
          "[client][server]")
{
    NEEDS_A_SERVER
    Server server;
    Loop loop;
    Client client(loop, server.config());
    client.subscribe("c");
    client.subscribe("c*", VKP_SUB_PATTERN);
    vkp_test_run_until(loop, "confirmations", [&] { return client.events.size() == 3; });
    Sending block;
    REQUIRE(block.send(client,
                       wire({"MULTI"}) + wire({"SET", "k", "v"}) + wire({"PUBLISH", "c", "self"}) +
                           wire({"GET", "k"}) + wire({"EXEC"}),
                       5) == VKP_OK);
    Question after(client, {"ECHO", "after"});
    CHECK(after.text_on(loop) == "after");
    CHECK(block.calls == 1);
    CHECK(block.status == VKP_OK);
    CHECK(block.text == "[OK 2 v]");
    vkp_test_run_until(loop, "the messages", [&] { return client.events.size() == 5; });
    CHECK(client.history() == "connected, subscribed c, subscribed c*, message c self, "
                              "pmessage c* c self");
    // Outside of a transaction too, wherever the server puts it.
    Question publish(client, {"PUBLISH", "c", "plain"});
    CHECK(publish.text_on(loop) == "2");
    vkp_test_run_until(loop, "the messages", [&] { return client.events.size() == 7; });
    CHECK(vkp_test_line(client.events[5]) == "message c plain");
}

// ---------------------------------------------------------------------------------------------
// Subscriptions

TEST_CASE("server: one subscription there, however many here", "[client][server]")
{
    NEEDS_A_SERVER
    Server server;
    Loop loop;
    Peer admin = server.peer();
    Client client(loop, server.config());
    constexpr int many = 500;
    for (int i = 0; i < many; i++) {
        client.subscribe("c");
        client.subscribe("p*", VKP_SUB_PATTERN);
        client.subscribe("s", VKP_SUB_SHARD);
    }
    vkp_test_run_until(loop, "confirmations", [&] { return client.events.size() == 4; });
    fence(loop, client);
    CHECK(client.count(VKP_PUSH_SUBSCRIBED) == 3);
    CHECK(subscribers(admin, "c") == "1");
    CHECK(ask(admin, "PUBSUB", "NUMPAT") == ":1\r\n");
    CHECK(ask(admin, "PUBSUB", "SHARDNUMSUB", "s") == "*2\r\n$1\r\ns\r\n:1\r\n");
    CHECK(ask(admin, "PUBLISH", "c", "x") == ":1\r\n");
    CHECK(ask(admin, "PUBLISH", "pq", "y") == ":1\r\n");
    CHECK(ask(admin, "SPUBLISH", "s", "z") == ":1\r\n");
    vkp_test_run_until(loop, "messages", [&] { return client.events.size() == 7; });
    for (int i = 0; i < many - 1; i++) {
        client.unsubscribe("c");
        client.unsubscribe("p*", VKP_SUB_PATTERN);
        client.unsubscribe("s", VKP_SUB_SHARD);
    }
    fence(loop, client);
    CHECK(subscribers(admin, "c") == "1");
    client.unsubscribe("c");
    client.unsubscribe("p*", VKP_SUB_PATTERN);
    client.unsubscribe("s", VKP_SUB_SHARD);
    vkp_test_run_until(loop, "the end", [&] { return client.events.size() == 10; });
    CHECK(subscribers(admin, "c") == "0");
    CHECK(ask(admin, "PUBSUB", "NUMPAT") == ":0\r\n");
    CHECK(ask(admin, "PUBSUB", "SHARDNUMSUB", "s") == "*2\r\n$1\r\ns\r\n:0\r\n");
    const std::string history = client.history();
    CHECK(history.find("message c x") != std::string::npos);
    CHECK(history.find("pmessage p* pq y") != std::string::npos);
    CHECK(history.find("smessage s z") != std::string::npos);
}

TEST_CASE("server: thousands of names", "[client][server]")
{
    NEEDS_A_SERVER
    Server server;
    Loop loop;
    Peer admin = server.peer();
    Client client(loop, server.config());
    constexpr size_t count = 3000;
    for (size_t i = 0; i < count; i++) {
        client.subscribe(("n" + std::to_string(i)).c_str());
    }
    vkp_test_run_until(loop, "confirmations",
                       [&] { return client.count(VKP_PUSH_SUBSCRIBED) == count; });
    CHECK(subscribers(admin, "n0") == "1");
    CHECK(subscribers(admin, "n2999") == "1");
    for (size_t i = 0; i < count; i++) {
        client.unsubscribe(("n" + std::to_string(i)).c_str());
    }
    vkp_test_run_until(loop, "the end",
                       [&] { return client.count(VKP_PUSH_UNSUBSCRIBED) == count; });
    CHECK(ask(admin, "PUBSUB", "CHANNELS") == "*0\r\n");
}

TEST_CASE("server: names and payloads are bytes", "[client][server]")
{
    NEEDS_A_SERVER
    Server server;
    Loop loop;
    Client client(loop, server.config());
    const std::string name("a\0\r\n\xff", 5);
    const std::string payload("\r\n$5\r\n\0>3", 9);
    const vkp_str text = {name.data(), name.size()};
    REQUIRE(vkp_client_subscribe(client, VKP_SUB_CHANNEL, text) == VKP_OK);
    REQUIRE(vkp_client_subscribe(client, VKP_SUB_CHANNEL, vkp_str_of("")) == VKP_OK);
    const vkp_str argv[] = {vkp_str_of("PUBLISH"), text, {payload.data(), payload.size()}};
    vkp_oneshot slot;
    vkp_reply *reply = nullptr;
    REQUIRE(vkp_client_command_argv(client, &slot, 3, argv) == VKP_OK);
    vkp_test_run_until(loop, "the reply",
                       [&] { return vkp_oneshot_try_recv(&slot, &reply) == VKP_OK; });
    CHECK(vkp_test_show(vkp_reply_get_value(reply)) == "1");
    vkp_reply_unref(reply);
    vkp_test_run_until(loop, "the message", [&] { return client.events.size() == 4; });
    CHECK(client.events[3].channel == name);
    CHECK(client.events[3].payload == payload);
}

TEST_CASE("server: invalidations and keyspace events are pushes like any other", "[client][server]")
{
    NEEDS_A_SERVER
    Server server({"--notify-keyspace-events", "KEA"});
    Loop loop;
    Peer admin = server.peer();
    Client client(loop, server.config());
    Question tracking(client, {"CLIENT", "TRACKING", "ON"});
    Question get(client, {"MGET", "k1", "k2"});
    CHECK(tracking.text_on(loop) == "OK");
    CHECK(get.text_on(loop) == "[null null]");
    CHECK(ask(admin, "SET", "k1", "v") == "+OK\r\n");
    vkp_test_run_until(loop, "an invalidation",
                       [&] { return client.count(VKP_PUSH_INVALIDATE) == 1; });
    CHECK(client.events.back().frame == ">2\r\n" + bulk("invalidate") + "*1\r\n" + bulk("k1"));
    CHECK(ask(admin, "FLUSHALL") == "+OK\r\n");
    vkp_test_run_until(loop, "a flush", [&] { return client.count(VKP_PUSH_INVALIDATE) == 2; });
    CHECK(client.events.back().frame == ">2\r\n" + bulk("invalidate") + "_\r\n");
    client.subscribe("__keyevent@0__:set");
    fence(loop, client);
    CHECK(ask(admin, "SET", "k3", "v") == "+OK\r\n");
    vkp_test_run_until(loop, "an event", [&] { return client.count(VKP_PUSH_MESSAGE) == 1; });
    CHECK(vkp_test_line(client.events.back()) == "message __keyevent@0__:set k3");
    // A redirection whose target dies is a push of a kind of its own.
    Peer target = server.peer();
    const std::string id = ask(target, "CLIENT", "ID");
    Question redirect(client, {"CLIENT", "TRACKING", "OFF"});
    CHECK(redirect.text_on(loop) == "OK");
    const std::string number = id.substr(1, id.size() - 3);
    Question to(client, {"CLIENT", "TRACKING", "ON", "REDIRECT", number.c_str()});
    Question again(client, {"GET", "k1"});
    CHECK(to.text_on(loop) == "OK");
    CHECK(again.text_on(loop) == "null");
    target.reset();
    CHECK(ask(admin, "CLIENT", "KILL", "ID", number).substr(0, 1) == ":");
    CHECK(ask(admin, "SET", "k1", "v") == "+OK\r\n");
    vkp_test_run_until(loop, "the news", [&] { return client.count(VKP_PUSH_OTHER) == 1; });
    CHECK(client.history().find("other tracking-redir-broken") != std::string::npos);
}

// ---------------------------------------------------------------------------------------------
// Outages

TEST_CASE("server: killed and started again during traffic", "[client][server][threads]")
{
    NEEDS_A_SERVER
    const bool tcp = GENERATE(false, true);
    const size_t which = GENERATE(size_t{0}, size_t{1});
    size_t backends = 0;
    while (vkp_test_backends()[backends] != nullptr) {
        backends++;
    }
    Server server;
    Loop loop(vkp_test_backends()[which % backends]);
    Client client(loop, server.config(tcp));
    client.subscribe("a");
    client.subscribe("b");
    client.subscribe("p*", VKP_SUB_PATTERN);
    vkp_test_run_until(loop, "confirmations", [&] { return client.events.size() == 4; });
    vkp_test_loop_thread thread(loop);
    std::atomic<bool> stop{false};
    std::atomic<int> wrong{0};
    std::atomic<int> ended{0};
    std::vector<std::thread> askers;
    for (int t = 0; t < 2; t++) {
        askers.emplace_back([&] {
            while (!stop.load()) {
                Question question;
                const vkp_status sent = question.send(client, {"INCR", "n"});
                if (sent == VKP_ERR_DISCONNECTED) {
                    ended.fetch_add(1);
                    sched_yield();
                    continue;
                }
                const vkp_status got = sent == VKP_OK ? question.recv() : sent;
                if (got == VKP_ERR_CLOSED) {
                    ended.fetch_add(1);
                } else if (got != VKP_OK) {
                    wrong.fetch_add(1);
                }
            }
        });
    }
    // Numbered messages until the connection breaks under them.
    int number = 0;
    const auto publish = [&](const Peer &peer, int count) {
        for (int i = 0; i < count; i++) {
            for (const char *channel : {"a", "b", "pq"}) {
                if (ask(peer, "PUBLISH", channel, std::to_string(number)) != ":1\r\n") {
                    vkp_test_fail("a message reached nobody");
                }
            }
            number++;
        }
    };
    constexpr int outages = 3;
    std::vector<int> first_after;
    for (int outage = 0; outage < outages; outage++) {
        Peer peer = server.peer();
        publish(peer, 50);
        vkp_test_server_kill(server);
        vkp_test_wait_until("the news of it",
                            [&] { return vkp_client_get_state(client) != VKP_CLIENT_READY; });
        peer.reset();
        vkp_test_server_restart(server);
        peer = server.peer();
        vkp_test_wait_until("the subscriptions", [&] {
            return subscribers(peer, "a") == "1" && subscribers(peer, "b") == "1" &&
                   ask(peer, "PUBSUB", "NUMPAT") == ":1\r\n";
        });
        first_after.push_back(number);
    }
    Peer peer = server.peer();
    publish(peer, 50);
    Question fence_question(client, {"PING"});
    CHECK(fence_question.recv() == VKP_OK);
    stop.store(true);
    for (std::thread &one : askers) {
        one.join();
    }
    thread.stop();
    vkp_test_run_until(loop, "the last message", [&] {
        return client.events.back().channel == "pq" &&
               client.events.back().payload == std::to_string(number - 1);
    });
    CHECK(wrong.load() == 0);
    CHECK(ended.load() > 0);
    // The order of events, and of messages within each name; none twice, none after the last
    // outage missing.
    std::string story;
    std::map<std::string, int> last;
    std::map<std::string, int> complete;
    for (const vkp_test_event &event : client.events) {
        if (event.kind <= VKP_PUSH_SMESSAGE) {
            const int value = std::stoi(event.payload);
            if (last.count(event.channel)) {
                REQUIRE(value > last[event.channel]);
            }
            last[event.channel] = value;
            complete[event.channel] += value >= first_after.back() ? 1 : 0;
        } else if (event.kind == VKP_PUSH_CONNECT_FAILED) {
            // Only if a try fell into the time without a server.
        } else if (event.kind != VKP_PUSH_SUBSCRIBED) {
            story += std::string(vkp_push_kind_str(event.kind)) + " ";
        } else {
            story += "s";
        }
    }
    std::string expected = "connected sss";
    for (int outage = 0; outage < outages; outage++) {
        expected += "disconnected reconnected sssgap ";
    }
    CHECK(story == expected);
    CHECK(client.count(VKP_PUSH_CONNECT_FAILED) <= outages);
    for (const char *channel : {"a", "b", "pq"}) {
        CHECK(last[channel] == number - 1);
        CHECK(complete[channel] == 50);
    }
    uint64_t previous = 0;
    for (const vkp_test_event &event : client.events) {
        if (event.kind == VKP_PUSH_GAP) {
            // A gap begins when something was sent that was answered. If a connection ends before
            // anything that was sent after the last gap is answered, both overlap.
            CHECK(event.gap.to_ns > previous);
            CHECK(event.gap.to_ns > event.gap.from_ns);
            previous = event.gap.to_ns;
        }
    }
}

TEST_CASE("server: the last reference goes while the server is down", "[client][server]")
{
    NEEDS_A_SERVER
    Server server;
    Loop loop;
    Client client(loop, server.config(true));
    client.subscribe("c");
    vkp_test_run_until(loop, "a confirmation", [&] { return client.events.size() == 2; });
    vkp_test_server_kill(server);
    vkp_test_run_until(loop, "the news", [&] { return client.events.size() == 3; });
    client.unref();
    loop.round();
    CHECK(client.history() == "connected, subscribed c, disconnected");
}

TEST_CASE("server: one that stops answering is waited for, and then left", "[client][server]")
{
    NEEDS_A_SERVER
    Server server;
    Loop loop;
    vkp_client_config config = server.config();
    config.heartbeat_ms = 20;
    config.reply_timeout_ms = 100;
    config.blocked_timeout_ms = 500;
    config.connect_timeout_ms = 500;
    Client client(loop, config);
    client.subscribe("c");
    vkp_test_run_until(loop, "a confirmation",
                       [&] { return client.count(VKP_PUSH_SUBSCRIBED) >= 1; });
    REQUIRE(kill(vkp_test_server_pid(server), SIGSTOP) == 0);
    vkp_test_run_until(loop, "the outage",
                       [&] { return client.count(VKP_PUSH_DISCONNECTED) >= 1; });
    CHECK(client.error() == "the server does not answer");
    vkp_client_stats stats;
    vkp_client_get_stats(client, &stats);
    CHECK(stats.probes >= 2); // its kernel accepts connections: it may be busy
    // Its kernel accepts connections still; the handshake fails by its own limit.
    vkp_test_run_until(loop, "a try that failed",
                       [&] { return client.error() == "no connection within the time limit"; });
    REQUIRE(kill(vkp_test_server_pid(server), SIGCONT) == 0);
    vkp_test_run_until(loop, "the gap", [&] { return client.count(VKP_PUSH_GAP) >= 1; });
    CHECK(client.count(VKP_PUSH_RECONNECTED) >= 1);
}

// ---------------------------------------------------------------------------------------------
// The channel form

TEST_CASE("server: pushes through a channel, to a thread of one's own", "[client][server][threads]")
{
    NEEDS_A_SERVER
    Server server;
    Loop loop;
    vkp_mpsc_config channel = {};
    channel.elem_bytes = sizeof(vkp_push);
    channel.capacity_items = 64;
    channel.cost = vkp_push_get_cost;
    channel.drop = vkp_push_drop;
    channel.env = &loop.test.env;
    vkp_mpsc_tx *tx = nullptr;
    vkp_mpsc_rx *rx = nullptr;
    REQUIRE(vkp_mpsc_open(&channel, &tx, &rx) == VKP_OK);
    vkp_client_config config = server.config();
    config.pushes = tx;
    vkp_client *client = nullptr;
    REQUIRE(vkp_client_open(loop, &config, &client) == VKP_OK);
    vkp_mpsc_tx_unref(tx);
    REQUIRE(vkp_client_subscribe(client, VKP_SUB_CHANNEL, vkp_str_of("c")) == VKP_OK);
    vkp_test_loop_thread thread(loop);
    constexpr int messages = 5000;
    bool in_order = true;
    std::atomic<int> accounted{0};
    std::atomic<bool> subscribed{false};
    std::thread reader([&] {
        vkp_push one;
        int last = -1;
        while (vkp_mpsc_recv(rx, VKP_FOREVER, &one) == VKP_OK) {
            if (one.kind == VKP_PUSH_MESSAGE) {
                const int value = std::stoi(std::string(vkp_test_view(one.payload)));
                in_order = in_order && value > last;
                last = value;
                accounted.fetch_add(1);
            } else if (one.kind == VKP_PUSH_LAGGED) {
                accounted.fetch_add(static_cast<int>(one.missed));
            } else if (one.kind == VKP_PUSH_SUBSCRIBED) {
                subscribed.store(true);
            }
            vkp_push_unref(&one);
        }
    });
    vkp_test_wait_until("the subscription", [&] { return subscribed.load(); });
    Peer peer = server.peer();
    std::string block;
    for (int i = 0; i < messages; i++) {
        block += wire({"PUBLISH", "c", std::to_string(i)});
    }
    REQUIRE(vkp_test_peer_send(peer.get(), block.data(), block.size()));
    for (int i = 0; i < messages; i++) {
        REQUIRE(vkp_test_frame(peer.get()) == ":1\r\n");
    }
    // LAGGED comes before the next push that fits: more of them, until the sum is exact.
    int more = 0;
    int before = -1;
    vkp_test_wait_until("every message received or told as missed", [&] {
        const int now = accounted.load();
        if (now != messages + more && now == std::exchange(before, now)) {
            more++;
            ask(peer, "PUBLISH", "c", std::to_string(messages + more));
        }
        return now == messages + more;
    });
    vkp_client_close(client);
    vkp_client_unref(client);
    reader.join();
    thread.stop();
    CHECK(in_order);
    vkp_mpsc_rx_unref(rx);
}

// ---------------------------------------------------------------------------------------------
// The examples, as built with these tests

namespace {

const char *example(const char *name)
{
    const char *folder = std::getenv("VKP_TEST_BUILD_DIR");
    static std::string path;
    path = std::string(folder ? folder : ".") + "/examples/" + name;
    return vkp_test_exists(path.c_str()) ? path.c_str() : nullptr;
}

std::string read_line(int fd)
{
    std::string line;
    char byte = 0;
    while (read(fd, &byte, 1) == 1 && byte != '\n') {
        line += byte;
    }
    return line;
}

std::string read_all(int fd)
{
    std::string text;
    for (std::string line = read_line(fd); !line.empty(); line = read_line(fd)) {
        text += line + "\n";
    }
    return text;
}

} // namespace

TEST_CASE("server: the examples do what they say", "[client][server][examples]")
{
    NEEDS_A_SERVER
    if (!example("subscribe") || !example("commands") || !example("push_channel") ||
        !example("ask")) {
        WARN("the examples were not built: not tested");
        return;
    }
    Server server;
    Peer peer = server.peer();
    const char *address = vkp_test_server_tcp(server);
    int out = -1;
    SECTION("subscribe")
    {
        const char *argv[] = {example("subscribe"), address, nullptr};
        const int pid = vkp_test_spawn(argv, &out);
        vkp_test_wait_until("its subscription", [&] { return subscribers(peer, "news") == "1"; });
        CHECK(ask(peer, "PUBLISH", "news", "hello") == ":1\r\n");
        CHECK(read_line(out) == "connected: ");
        CHECK(read_line(out) == "subscribed: ");
        CHECK(read_line(out) == "message: hello");
        CHECK(vkp_test_reap(pid, SIGTERM) == 128 + SIGTERM);
    }
    SECTION("commands")
    {
        const char *argv[] = {example("commands"), address, nullptr};
        const int pid = vkp_test_spawn(argv, &out);
        const std::string text = read_all(out);
        CHECK(vkp_test_reap(pid, 0) == 0);
        CHECK(text.find("thread 0: 1000 answered, 0 failed") != std::string::npos);
        CHECK(text.find("thread 1: 1000 answered, 0 failed") != std::string::npos);
        CHECK(ask(peer, "GET", "vkp:example:hits") == "$4\r\n2000\r\n");
    }
    SECTION("ask")
    {
        const char *argv[] = {example("ask"), address, "ECHO", "hello", nullptr};
        const int pid = vkp_test_spawn(argv, &out);
        CHECK(read_all(out) == "$5\r\nhello\r\n");
        CHECK(vkp_test_reap(pid, 0) == 0);
    }
    SECTION("push_channel")
    {
        const char *argv[] = {example("push_channel"), address, "c", nullptr};
        const int pid = vkp_test_spawn(argv, &out);
        vkp_test_wait_until("its subscription", [&] { return subscribers(peer, "c") == "1"; });
        CHECK(ask(peer, "PUBLISH", "c", "hello") == ":1\r\n");
        CHECK(ask(peer, "PUBLISH", "c", "stop") == ":1\r\n");
        CHECK(read_all(out) == "connected  \nsubscribed c \nmessage c hello\nmessage c stop\n");
        CHECK(vkp_test_reap(pid, 0) == 0);
    }
    close(out);
}

TEST_CASE("server: the messages of the delivery probe arrive", "[client][server]")
{
    const int protocol = GENERATE(3, 2);
    Loop loop;
    Server server;
    vkp_client_config config = server.config();
    config.protocol = protocol;
    config.delivery_ms = 1;
    Client client(loop, config);
    client.subscribe("c");
    vkp_client_stats stats;
    vkp_test_run_until(loop, "messages of the probe", [&] {
        vkp_client_get_stats(client, &stats);
        return stats.deliveries >= 20;
    });
    CHECK(client.history() == "connected, subscribed c");
    client.unsubscribe("c");
    Question question;
    vkp_test_run_until(loop, "a command", [&] { return client.events.size() == 3; });
    vkp_test_run_until(loop, "a connection without subscriptions", [&] {
        CHECK(question.send(client, {"PING"}) == VKP_OK);
        return question.recv_on(loop) == VKP_OK;
    });
    CHECK(question.text() == "PONG");
    CHECK(client.history() == "connected, subscribed c, unsubscribed c");
}
