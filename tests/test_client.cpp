// SPDX-License-Identifier: MIT
//
// The client against servers that the test plays itself, over real sockets: what goes over the wire
// byte by byte, and answers that no healthy server gives. Most tests run client and server in one
// thread, so that each order of events is chosen, not met by luck.
#include "support/catch.hpp"
#include "support/fake_server.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

// ---------------------------------------------------------------------------------------------
// Opening

TEST_CASE("client: open refuses what cannot work, and leaves nothing", "[client]")
{
    Loop loop;
    vkp_client *client = nullptr;
    vkp_client_config config = {};
    CHECK(vkp_client_open(loop, nullptr, &client) == VKP_ERR_INVALID);
    CHECK(vkp_client_open(loop, &config, &client) == VKP_ERR_INVALID);
    config.address = vkp_str_of("unix:/tmp/x");
    CHECK(vkp_client_open(nullptr, &config, &client) == VKP_ERR_INVALID);
    CHECK(vkp_client_open(loop, &config, nullptr) == VKP_ERR_INVALID);
    for (int protocol : {1, 4, -1}) {
        config.protocol = protocol;
        CHECK(vkp_client_open(loop, &config, &client) == VKP_ERR_INVALID);
    }
    config.protocol = 0;
    const std::string too_long = "unix:/tmp/" + std::string(200, 'x');
    for (const char *address : {"", "/tmp/x", "tcp:", "tcp:127.0.0.1", "http://x", "unix:"}) {
        INFO(address);
        config.address = vkp_str_of(address);
        CHECK(vkp_client_open(loop, &config, &client) == VKP_ERR_INVALID);
    }
    config.address = vkp_str_of(too_long.c_str());
    vkp_status status = vkp_client_open(loop, &config, &client);
    CHECK((status == VKP_ERR_INVALID || status == VKP_ERR_LIMIT));

    vkp_mpsc_config channel = {};
    channel.elem_bytes = sizeof(vkp_push);
    vkp_mpsc_tx *tx = nullptr;
    vkp_mpsc_rx *rx = nullptr;
    REQUIRE(vkp_mpsc_open(&channel, &tx, &rx) == VKP_OK);
    config.address = vkp_str_of("unix:/tmp/x");
    config.pushes = tx;
    config.on_push = [](void *, const vkp_push *) {};
    CHECK(vkp_client_open(loop, &config, &client) == VKP_ERR_INVALID);
    vkp_mpsc_tx_unref(tx);
    vkp_mpsc_rx_unref(rx);

    CHECK(client == nullptr);
    vkp_client_unref(nullptr);
    vkp_reply_unref(nullptr);
    vkp_push_unref(nullptr);
}

TEST_CASE("client: open on a closed loop is refused", "[client]")
{
    Loop loop;
    vkp_loop *kept = vkp_loop_ref(loop);
    loop.close();
    vkp_client_config config = {};
    config.address = vkp_str_of("unix:/tmp/x");
    vkp_client *client = nullptr;
    CHECK(vkp_client_open(kept, &config, &client) == VKP_ERR_CLOSED);
    CHECK(client == nullptr);
    vkp_loop_unref(kept);
}

TEST_CASE("client: the texts of the config are copied", "[client]")
{
    Loop loop;
    FakeServer server;
    vkp_client_config config = server.config();
    std::vector<char> address(server.address(), server.address() + strlen(server.address()) + 1);
    std::vector<char> secret = {'p', 'w', '\0'};
    config.address = vkp_str_of(address.data());
    config.password = vkp_str_of(secret.data());
    Client client(loop, config);
    std::fill(address.begin(), address.end(), 'X');
    std::fill(secret.begin(), secret.end(), 'X');
    std::vector<char>().swap(address);
    std::vector<char>().swap(secret);
    const std::string greeting = wire({"HELLO", "3", "AUTH", "default", "pw"});
    Peer peer = server.accept(loop);
    CHECK(heard(loop, peer) == greeting);
    peer.reset();
    peer = server.accept(loop);
    CHECK(heard(loop, peer) == greeting);
}

TEST_CASE("client: HELLO carries the credentials and the name", "[client]")
{
    struct Form {
        const char *username;
        const char *password;
        const char *name;
        std::string sent;
    };
    const Form form = GENERATE(
        Form{nullptr, nullptr, nullptr, wire({"HELLO", "3"})},
        Form{nullptr, "secret", nullptr, wire({"HELLO", "3", "AUTH", "default", "secret"})},
        Form{"ann", "secret", nullptr, wire({"HELLO", "3", "AUTH", "ann", "secret"})},
        Form{nullptr, nullptr, "me", wire({"HELLO", "3", "SETNAME", "me"})},
        Form{"ann", "", "me", wire({"HELLO", "3", "AUTH", "ann", "", "SETNAME", "me"})});
    Loop loop;
    FakeServer server;
    vkp_client_config config = server.config();
    config.username = vkp_str_of(form.username);
    config.password = vkp_str_of(form.password);
    config.name = vkp_str_of(form.name);
    config.protocol = 3;
    Client client(loop, config);
    CHECK(client.state() == VKP_CLIENT_CONNECTING);
    CHECK(vkp_client_get_protocol(client) == 0);
    Peer peer = server.accept(loop);
    CHECK(heard(loop, peer) == form.sent);
    CHECK(client.state() == VKP_CLIENT_CONNECTING);
    CHECK(client.history().empty());
    say(peer, hello_reply);
    until_state(loop, client, VKP_CLIENT_READY);
    CHECK(vkp_client_get_protocol(client) == 3);
    CHECK(client.history() == "connected");
    vkp_client_close(client);
    CHECK(client.state() == VKP_CLIENT_CLOSED);
    hung_up(loop, peer);
    CHECK(client.history() == "connected");
}

TEST_CASE("client: a server without HELLO is spoken to in RESP2", "[client]")
{
    const std::string refusal =
        GENERATE("-ERR unknown command `HELLO`, with args beginning with: `3`, \r\n",
                 "-ERR unknown command 'HELLO'\r\n", "-NOPROTO unsupported protocol version\r\n");
    Loop loop;
    FakeServer server;
    vkp_client_config config = server.config();
    config.username = vkp_str_of("ann");
    config.password = vkp_str_of("secret");
    config.name = vkp_str_of("me");
    Client client(loop, config);
    // The second time too HELLO comes first: the server may have become a newer one.
    for (int i = 0; i < 2; i++) {
        Peer peer = server.accept(loop);
        CHECK(heard(loop, peer) == wire({"HELLO", "3", "AUTH", "ann", "secret", "SETNAME", "me"}));
        say(peer, refusal);
        CHECK(heard(loop, peer) == wire({"AUTH", "ann", "secret"}));
        CHECK(heard(loop, peer) == wire({"CLIENT", "SETNAME", "me"}));
        CHECK(heard(loop, peer) == wire({"PING"}));
        CHECK(client.state() == VKP_CLIENT_CONNECTING);
        // An old server may know no names: that is no reason to leave.
        say(peer, "+OK\r\n-ERR unknown command `CLIENT`\r\n+PONG\r\n");
        until_state(loop, client, VKP_CLIENT_READY);
        CHECK(vkp_client_get_protocol(client) == 2);
        Question question(client, {"GET", "k"});
        CHECK(heard(loop, peer) == wire({"GET", "k"}));
        say(peer, "*-1\r\n");
        CHECK(question.text_on(loop) == "null");
        peer.reset();
        until_state(loop, client, VKP_CLIENT_WAITING);
    }
    CHECK(client.history() == "connected, disconnected, reconnected, disconnected");
}

TEST_CASE("client: with protocol 2 there is never a HELLO", "[client]")
{
    Loop loop;
    FakeServer server;
    vkp_client_config config = server.config();
    config.protocol = 2;
    SECTION("without credentials a PING finds out whether they are needed")
    {
        Client client(loop, config);
        Peer peer = server.accept(loop);
        CHECK(heard(loop, peer) == wire({"PING"}));
        say(peer, "-NOAUTH Authentication required.\r\n");
        hung_up(loop, peer);
        CHECK(client.history() == "connect-failed");
        CHECK(client.error().find("NOAUTH") != std::string::npos);
        peer = server.accept(loop);
        CHECK(heard(loop, peer) == wire({"PING"}));
        say(peer, "+PONG\r\n");
        until_state(loop, client, VKP_CLIENT_READY);
        CHECK(vkp_client_get_protocol(client) == 2);
        CHECK(client.history() == "connect-failed, connected");
    }
    SECTION("a password refused ends the connection")
    {
        config.password = vkp_str_of("secret");
        Client client(loop, config);
        Peer peer = server.accept(loop);
        CHECK(heard(loop, peer) == wire({"AUTH", "secret"}));
        CHECK(heard(loop, peer) == wire({"PING"}));
        say(peer, "-WRONGPASS no\r\n+PONG\r\n");
        hung_up(loop, peer);
        CHECK(client.history() == "connect-failed");
        CHECK(client.error().find("password") != std::string::npos);
        Peer again = server.accept(loop);
        CHECK(heard(loop, again) == wire({"AUTH", "secret"}));
    }
}

TEST_CASE("client: a HELLO refused for another reason is no RESP2, and is tried again", "[client]")
{
    const std::string refusal = GENERATE(
        "-WRONGPASS invalid username-password pair or user is disabled.\r\n",
        "-LOADING the dataset is in memory soon\r\n",
        "-DENIED Redis is running in protected mode\r\n", "-ERR max number of clients reached\r\n");
    Loop loop;
    FakeServer server;
    vkp_client_config config = server.config();
    config.password = vkp_str_of("secret");
    Client client(loop, config);
    for (int i = 0; i < 3; i++) {
        Peer peer = server.accept(loop);
        CHECK(heard(loop, peer) == wire({"HELLO", "3", "AUTH", "default", "secret"}));
        say(peer, refusal);
        hung_up(loop, peer);
        // What the server said, as far as it fits.
        CHECK(client.error().find(refusal.substr(
                  1, std::min<size_t>(30, refusal.find('\r') - 1))) != std::string::npos);
    }
    // Three failures, one event; its words are the server's.
    CHECK(client.history() == "connect-failed");
    CHECK(client.events[0].payload == client.error());
    CHECK_FALSE(vkp_test_env_logged(&loop.test, "secret"));
    Peer peer = server.accept(loop);
    (void)heard(loop, peer);
    say(peer, hello_reply);
    until_state(loop, client, VKP_CLIENT_READY);
    CHECK(client.history() == "connect-failed, connected");
}

TEST_CASE("client: the error text says why there is no connection, cut to the buffer", "[client]")
{
    Loop loop;
    FakeServer server;
    const vkp_client_config config = server.config();
    server.close();
    Client client(loop, config);
    CHECK(vkp_client_get_protocol(client) == 0);
    CHECK(client.state() == VKP_CLIENT_CONNECTING); // the first try begins in the first round
    CHECK(client.error().empty());
    until_state(loop, client, VKP_CLIENT_WAITING);
    CHECK(client.error() == "nobody accepts connections there");
    char small[8] = "#######";
    vkp_client_get_error(client, small, 7);
    CHECK(std::string(small) == "nobody");
    CHECK(small[7] == '\0');
    server.open();
    Peer peer = server.greet(loop, client);
    CHECK(client.history() == "connect-failed, connected");
}

// ---------------------------------------------------------------------------------------------
// Commands

TEST_CASE("client: replies find the slots of their commands, however the bytes are cut", "[client]")
{
    const size_t chunk = GENERATE(size_t{1}, size_t{7}, size_t{100000});
    Loop loop;
    FakeServer server;
    Client client(loop, server.config());
    Peer peer = server.greet(loop, client);
    constexpr int count = 300;
    std::vector<std::unique_ptr<Question>> questions;
    std::string replies;
    for (int i = 0; i < count; i++) {
        const std::string text = std::to_string(i);
        questions.push_back(std::make_unique<Question>(
            client, std::initializer_list<const char *>{"ECHO", text.c_str()}));
        replies += i % 3 == 0 ? bulk(text) : i % 3 == 1 ? ":" + text + "\r\n" : "+" + text + "\r\n";
        if (i % 10 == 0) {
            replies += push({"message", "c", text});
        }
    }
    for (int i = 0; i < count; i++) {
        REQUIRE(heard(loop, peer) == wire({"ECHO", std::to_string(i)}));
    }
    for (size_t at = 0; at < replies.size(); at += chunk) {
        say(peer, replies.substr(at, chunk));
        loop.round();
    }
    for (int i = 0; i < count; i++) {
        REQUIRE(questions[static_cast<size_t>(i)]->text_on(loop) == std::to_string(i));
    }
    REQUIRE(client.events.size() == 1 + count / 10);
    for (size_t i = 1; i < client.events.size(); i++) {
        CHECK(vkp_test_line(client.events[i]) == "message c " + std::to_string((i - 1) * 10));
    }
}

TEST_CASE("client: arguments are sent as they are", "[client]")
{
    Loop loop;
    FakeServer server;
    Client client(loop, server.config());
    Peer peer = server.greet(loop, client);
    const std::string binary("\0\r\n\xff", 4);
    const vkp_str argv[] = {vkp_str_of("SET"), {binary.data(), binary.size()}, {nullptr, 0}};
    vkp_oneshot slot;
    vkp_reply *reply = nullptr;
    REQUIRE(vkp_client_command_argv(client, &slot, 3, argv) == VKP_OK);
    CHECK(heard(loop, peer) == wire({"SET", binary, ""}));
    CHECK(vkp_oneshot_try_recv(&slot, &reply) == VKP_ERR_EMPTY);
    say(peer, "+OK\r\n");
    vkp_test_run_until(loop, "a reply",
                       [&] { return vkp_oneshot_try_recv(&slot, &reply) == VKP_OK; });
    CHECK(vkp_value_is_text(vkp_reply_get_value(reply), vkp_str_of("OK")));
    CHECK(vkp_reply_get_frame(reply).len == 5);
    vkp_reply_unref(reply);

    CHECK(vkp_client_command(client, &slot, nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_client_command_argv(client, &slot, 0, argv) == VKP_ERR_INVALID);
    CHECK(vkp_client_command_argv(client, &slot, 1, nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_client_command_argv(client, nullptr, 1, argv) == VKP_ERR_INVALID);
    CHECK(vkp_client_command_argv(nullptr, &slot, 1, argv) == VKP_ERR_INVALID);
}

TEST_CASE("client: an error is a reply", "[client]")
{
    Loop loop;
    FakeServer server;
    Client client(loop, server.config());
    Peer peer = server.greet(loop, client);
    Question simple(client, {"GET", "a"});
    Question blob(client, {"GET", "b"});
    Question good(client, {"GET", "c"});
    loop.round();
    say(peer, "-ERR no\r\n!7\r\nBAD\r\nab\r\n:3\r\n");
    CHECK(simple.text_on(loop) == "error: ERR no");
    CHECK(vkp_reply_get_value(simple.reply())->type == VKP_RESP_ERROR);
    CHECK(blob.text_on(loop) == "error: BAD\r\nab");
    CHECK(good.text_on(loop) == "3");
}

TEST_CASE("client: a reply keeps its value and bytes, whatever follows it", "[client]")
{
    const size_t size =
        GENERATE(size_t{0}, size_t{100}, size_t{4090}, size_t{70000}, size_t{5000000});
    Loop loop;
    FakeServer server;
    auto client = std::make_unique<Client>(loop, server.config());
    Peer peer = server.greet(loop, *client);
    const std::string big(size, 'x');
    const std::string frame = "|1\r\n+ttl\r\n:5\r\n*4\r\n" + bulk(big) +
                              "(123456789012345678901\r\n" + ",1.5\r\n%1\r\n+k\r\n~1\r\n#t\r\n";
    Question question(*client, {"X"});
    // What the kernel cannot hold is written by a thread.
    (void)heard(loop, peer);
    std::thread writer([&] { say(peer, frame + push({"message", "c", "after"})); });
    const vkp_status status = question.recv_on(loop);
    writer.join();
    REQUIRE(status == VKP_OK);
    until_events(loop, *client, 2);
    client.reset();
    const vkp_bytes kept = vkp_reply_get_frame(question.reply());
    CHECK(std::string(reinterpret_cast<const char *>(kept.data), kept.len) == frame);
    CHECK(question.text() ==
          "[" + big + (size ? " " : "") + "big 123456789012345678901 double 1.5 <k {true}>]");
    vkp_reply *second = vkp_reply_ref(question.take());
    vkp_reply_unref(second);
    CHECK(vkp_reply_get_value(second)->len == 4);
    vkp_reply_unref(second);
}

TEST_CASE("client: a slot may go while its reply is outstanding", "[client]")
{
    Loop loop;
    FakeServer server;
    Client client(loop, server.config());
    Peer peer = server.greet(loop, client);
    {
        auto late = std::make_unique<Question>(client, std::initializer_list<const char *>{"A"});
        CHECK(late->recv(0) == VKP_ERR_TIMEOUT);
        late.reset();
        auto closed = std::make_unique<Question>(client, std::initializer_list<const char *>{"B"});
        closed.reset();
        vkp_oneshot reused;
        vkp_reply *reply = nullptr;
        REQUIRE(vkp_client_command(client, &reused, "C", nullptr) == VKP_OK);
        REQUIRE(vkp_oneshot_recv(&reused, 0, &reply) == VKP_ERR_TIMEOUT);
        REQUIRE(vkp_client_command(client, &reused, "D", nullptr) == VKP_OK);
        for (const char *name : {"A", "B", "C", "D"}) {
            CHECK(heard(loop, peer) == wire({name}));
        }
        say(peer, "+a\r\n+b\r\n+c\r\n+d\r\n");
        vkp_test_run_until(loop, "a reply",
                           [&] { return vkp_oneshot_try_recv(&reused, &reply) == VKP_OK; });
        CHECK(vkp_test_show(vkp_reply_get_value(reply)) == "d");
        vkp_reply_unref(reply);
    }
    // A reply that came and was never taken goes with its slot.
    Sending fence;
    {
        Question untaken(client, {"E"});
        REQUIRE(fence.send(client, wire({"F"}), 1) == VKP_OK);
        loop.round();
        say(peer, "+e\r\n+f\r\n");
        vkp_test_run_until(loop, "the second reply", [&] { return fence.calls == 1; });
    }
    CHECK(fence.text == "f");
}

TEST_CASE("client: a slot may be given up after the client is gone, or while it goes", "[client]")
{
    Loop loop;
    FakeServer server;
    auto client = std::make_unique<Client>(loop, server.config());
    Peer peer = server.greet(loop, *client);
    auto question = std::make_unique<Question>(*client, std::initializer_list<const char *>{"A"});
    client.reset();
    question.reset();
    hung_up(loop, peer);
}

TEST_CASE("client: a refused command leaves a slot that is closed", "[client]")
{
    Loop loop;
    FakeServer server;
    vkp_client_config config = server.config();
    config.queue_bytes = 600;
    Client client(loop, config);
    vkp_oneshot slot;
    vkp_reply *reply = nullptr;
    const auto is_closed = [&] {
        const vkp_status tried = vkp_oneshot_try_recv(&slot, &reply);
        vkp_oneshot_close(&slot);
        return tried == VKP_ERR_CLOSED &&
               vkp_oneshot_recv(&slot, VKP_FOREVER, &reply) == VKP_ERR_CLOSED;
    };
    const std::string big(400, 'x');
    Question first(client, {big.c_str()});
    CHECK(vkp_client_command(client, &slot, big.c_str(), nullptr) == VKP_ERR_FULL);
    CHECK(is_closed());
    CHECK(vkp_client_command(client, &slot, "SUBSCRIBE", "x", nullptr) == VKP_ERR_REFUSED);
    CHECK(is_closed());
    vkp_test_env_fault(&loop.test, VKP_TEST_FAULT_FROM, 1);
    const vkp_status starved = vkp_client_command(client, &slot, "PING", nullptr);
    vkp_test_env_fault(&loop.test, VKP_TEST_FAULT_NONE, 0);
    CHECK(starved == VKP_ERR_NOMEM);
    CHECK(is_closed());
    vkp_client_close(client);
    CHECK(vkp_client_command(client, &slot, "PING", nullptr) == VKP_ERR_CLOSED);
    CHECK(is_closed());
}

TEST_CASE("client: send keeps its commands together and tells the last reply", "[client]")
{
    Loop loop;
    FakeServer server;
    Client client(loop, server.config());
    Peer peer = server.greet(loop, client);
    Question before(client, {"BEFORE"});
    Sending block;
    const std::string commands = wire({"MULTI"}) + wire({"INCR", "x"}) + wire({"EXEC"});
    REQUIRE(block.send(client, commands, 3) == VKP_OK);
    Question after(client, {"AFTER"});
    CHECK(heard(loop, peer) == wire({"BEFORE"}));
    for (const std::string &command : {wire({"MULTI"}), wire({"INCR", "x"}), wire({"EXEC"})}) {
        CHECK(heard(loop, peer) == command);
    }
    CHECK(heard(loop, peer) == wire({"AFTER"}));
    say(peer, "+before\r\n+OK\r\n+QUEUED\r\n");
    CHECK(before.text_on(loop) == "before");
    loop.round();
    CHECK(block.calls == 0);
    say(peer, push({"message", "c", "between"}) + "*1\r\n:7\r\n+after\r\n");
    CHECK(after.text_on(loop) == "after");
    CHECK(block.calls == 1);
    CHECK(block.status == VKP_OK);
    CHECK(block.text == "[7]");
    CHECK(block.frame == "*1\r\n:7\r\n");

    vkp_bytes none = vkp_bytes_static("", 0);
    vkp_bytes ping = vkp_bytes_static("PING\r\n", 6);
    CHECK(vkp_client_send(client, &none, 1, Sending::on_reply, &block) == VKP_ERR_INVALID);
    CHECK(vkp_client_send(client, &ping, 0, Sending::on_reply, &block) == VKP_ERR_INVALID);
    CHECK(vkp_client_send(client, &ping, 1, nullptr, &block) == VKP_ERR_INVALID);
    CHECK(vkp_client_send(client, nullptr, 1, Sending::on_reply, &block) == VKP_ERR_INVALID);
    CHECK(vkp_client_send(nullptr, &ping, 1, Sending::on_reply, &block) == VKP_ERR_INVALID);
    CHECK(block.calls == 1);
}

TEST_CASE("client: a callback may ask again", "[client]")
{
    Loop loop;
    FakeServer server;
    vkp_client_config config = server.config();
    config.queue_bytes = 1000; // room for one of these at a time
    Client client(loop, config);
    Peer peer = server.greet(loop, client);
    const std::string command = wire({std::string(600, 'x')});
    Sending sending;
    std::vector<vkp_status> statuses;
    sending.hook = [&] {
        if (sending.calls < 5) {
            statuses.push_back(sending.send(client, command, 1));
        }
    };
    REQUIRE(sending.send(client, command, 1) == VKP_OK);
    for (int i = 1; i <= 5; i++) {
        REQUIRE(heard(loop, peer) == command);
        say(peer, "+ok\r\n");
        vkp_test_run_until(loop, "the reply", [&] { return sending.calls == i; });
    }
    CHECK(statuses == std::vector<vkp_status>(4, VKP_OK));
}

TEST_CASE("client: commands wait for the connection being made, and fail with it", "[client]")
{
    Loop loop;
    FakeServer server;
    Client client(loop, server.config());
    Question held(client, {"ONE"});
    Sending sending;
    REQUIRE(sending.send(client, wire({"TWO"}), 1) == VKP_OK);
    {
        Peer peer = server.accept(loop);
        CHECK(heard(loop, peer) == wire({"HELLO", "3"}));
    }
    until_state(loop, client, VKP_CLIENT_WAITING);
    CHECK(held.try_recv() == VKP_ERR_CLOSED);
    CHECK(sending.calls == 1);
    CHECK(sending.status == VKP_ERR_DISCONNECTED);
    CHECK(sending.text == "none");

    Question refused;
    CHECK(refused.send(client, {"THREE"}) == VKP_ERR_DISCONNECTED);
    CHECK(sending.send(client, wire({"THREE"}), 1) == VKP_ERR_DISCONNECTED);

    until_state(loop, client, VKP_CLIENT_CONNECTING);
    Question one(client, {"ONE"});
    Question two(client, {"TWO"});
    Peer peer = server.greet(loop);
    CHECK(heard(loop, peer) == wire({"ONE"}));
    CHECK(heard(loop, peer) == wire({"TWO"}));
    say(peer, "+1\r\n+2\r\n");
    CHECK(one.text_on(loop) == "1");
    CHECK(two.text_on(loop) == "2");
    CHECK(sending.calls == 1);
}

TEST_CASE("client: commands in flight end with the connection, after DISCONNECTED was told",
          "[client]")
{
    Loop loop;
    FakeServer server;
    Client client(loop, server.config());
    Peer peer = server.greet(loop, client);
    Question answered(client, {"A"});
    Question lost(client, {"B"});
    Sending half;
    REQUIRE(half.send(client, wire({"C"}) + wire({"D"}), 2) == VKP_OK);
    std::string at_reply;
    half.hook = [&] { at_reply = client.history(); };
    for (int i = 0; i < 4; i++) {
        (void)heard(loop, peer);
    }
    say(peer, "+a\r\n");
    CHECK(answered.text_on(loop) == "a");
    Question unsent(client, {"E"}); // not even written when the end is seen
    peer.reset();
    CHECK(lost.text_on(loop) == vkp_status_str(VKP_ERR_CLOSED));
    CHECK(unsent.text_on(loop) == vkp_status_str(VKP_ERR_CLOSED));
    CHECK(half.calls == 1);
    CHECK(half.status == VKP_ERR_DISCONNECTED);
    CHECK(half.text == "none");
    CHECK(at_reply == "connected, disconnected");
    // Nothing of the old answers is taken for a new one.
    peer = server.greet(loop, client);
    Question fresh(client, {"F"});
    CHECK(heard(loop, peer) == wire({"F"}));
    say(peer, "+f\r\n");
    CHECK(fresh.text_on(loop) == "f");
    CHECK(half.calls == 1);
}

TEST_CASE("client: commands that would change the connection for all are refused", "[client]")
{
    Loop loop;
    FakeServer server;
    Client client(loop, server.config());
    const std::vector<std::vector<const char *>> commands = {
        {"SUBSCRIBE", "a"},
        {"psubscribe", "a"},
        {"SSubscribe", "a"},
        {"UNSUBSCRIBE"},
        {"PUNSUBSCRIBE"},
        {"SUNSUBSCRIBE"},
        {"HELLO", "2"},
        {"AUTH", "x"},
        {"RESET"},
        {"QUIT"},
        {"MONITOR"},
        {"MULTI"},
        {"EXEC"},
        {"DISCARD"},
        {"WATCH", "k"},
        {"SELECT", "1"},
        {"SYNC"},
        {"PSYNC", "?", "-1"},
        {"CLIENT", "REPLY", "OFF"},
        {"client", "reply", "skip"},
        {"UNWATCH"},
        {"ASKING"},
        {"READONLY"},
        {"readwrite"},
        {"REPLCONF", "ACK", "1"},
        {"Script", "Debug", "yes"},
        // Commands that block.
        {"BLPOP", "l", "0"},
        {"brpop", "l", "1"},
        {"BRPOPLPUSH", "a", "b", "0"},
        {"BLMOVE", "a", "b", "LEFT", "LEFT", "0"},
        {"BLMPOP", "0", "1", "l", "LEFT"},
        {"BZPOPMIN", "z", "0"},
        {"BZPOPMAX", "z", "0"},
        {"BZMPOP", "0", "1", "z", "MIN"},
        {"WAIT", "1", "0"},
        {"WAITAOF", "1", "1", "0"},
        {"XREAD", "BLOCK", "0", "STREAMS", "x", "$"},
        {"xread", "count", "1", "block", "0", "STREAMS", "x", "$"},
        {"XREADGROUP", "GROUP", "streams", "c", "BLOCK", "0", "STREAMS", "x", ">"}};
    for (const auto &words : commands) {
        std::vector<vkp_str> argv;
        for (const char *word : words) {
            argv.push_back(vkp_str_of(word));
        }
        vkp_oneshot slot;
        INFO(words[0]);
        CHECK(vkp_client_command_argv(client, &slot, argv.size(), argv.data()) == VKP_ERR_REFUSED);
    }
    Question harmless(client, {"CLIENT", "ID"});
    Question prefix(client, {"SUBSCRIBER", "a"});
    Question named(client, {"XREADGROUP", "GROUP", "block", "block", "STREAMS", "block", ">"});
    Question polled(client, {"XREAD", "STREAMS", "BLOCK", "0"});
    Question script(client, {"SCRIPT", "EXISTS", "DEBUG"});
    Peer peer = server.greet(loop);
    CHECK(heard(loop, peer) == wire({"CLIENT", "ID"}));
    CHECK(heard(loop, peer) == wire({"SUBSCRIBER", "a"}));
    CHECK(heard(loop, peer) ==
          wire({"XREADGROUP", "GROUP", "block", "block", "STREAMS", "block", ">"}));
    CHECK(heard(loop, peer) == wire({"XREAD", "STREAMS", "BLOCK", "0"}));
    CHECK(heard(loop, peer) == wire({"SCRIPT", "EXISTS", "DEBUG"}));
}

TEST_CASE("client: queue_bytes bounds what waits and what is in flight", "[client]")
{
    Loop loop;
    FakeServer server;
    vkp_client_config config = server.config();
    config.queue_bytes = 2000;
    Client client(loop, config);
    const std::string big(1500, 'x');
    const std::string huge(5000, 'y');
    Question first(client, {"SET", big.c_str()});
    Question second;
    CHECK(second.send(client, {"SET", big.c_str()}) == VKP_ERR_FULL);
    Sending sending;
    CHECK(sending.send(client, wire({big}), 1) == VKP_ERR_FULL);
    // Subscriptions are not commands.
    client.subscribe("c");
    Peer peer = server.greet(loop, client);
    CHECK(heard(loop, peer) == wire({"SUBSCRIBE", "c"}));
    CHECK(heard(loop, peer) == wire({"SET", big}));
    CHECK(second.send(client, {"SET", big.c_str()}) == VKP_ERR_FULL); // in flight counts too
    say(peer, confirm("subscribe", "c") + "+OK\r\n");
    CHECK(first.text_on(loop) == "OK");
    CHECK(second.send(client, {"SET", big.c_str()}) == VKP_OK);
    peer.reset();
    CHECK(second.text_on(loop) == vkp_status_str(VKP_ERR_CLOSED));
    peer = server.greet(loop, client);
    // The one that always fits.
    Question alone(client, {huge.c_str()});
    CHECK(sending.send(client, wire({"PING"}), 1) == VKP_ERR_FULL);
    CHECK(sending.calls == 0);
}

// ---------------------------------------------------------------------------------------------
// Subscriptions

TEST_CASE("client: a name is subscribed once for many, and unsubscribed after the last", "[client]")
{
    struct Kind {
        vkp_sub_kind kind;
        const char *on;
        const char *off;
        const char *confirmed;
        const char *ended;
    };
    const Kind kind =
        GENERATE(Kind{VKP_SUB_CHANNEL, "SUBSCRIBE", "UNSUBSCRIBE", "subscribe", "unsubscribe"},
                 Kind{VKP_SUB_PATTERN, "PSUBSCRIBE", "PUNSUBSCRIBE", "psubscribe", "punsubscribe"},
                 Kind{VKP_SUB_SHARD, "SSUBSCRIBE", "SUNSUBSCRIBE", "ssubscribe", "sunsubscribe"});
    Loop loop;
    FakeServer server;
    Client client(loop, server.config());
    Peer peer = server.greet(loop, client);
    Question fence;
    for (int i = 0; i < 3; i++) {
        client.subscribe("n", kind.kind);
    }
    REQUIRE(fence.send(client, {"FENCE"}) == VKP_OK);
    CHECK(heard(loop, peer) == wire({kind.on, "n"}));
    CHECK(heard(loop, peer) == wire({"FENCE"}));
    say(peer, confirm(kind.confirmed, "n") + "+1\r\n");
    CHECK(fence.text_on(loop) == "1");
    client.unsubscribe("n", kind.kind);
    client.unsubscribe("n", kind.kind);
    client.unsubscribe("other", kind.kind);
    client.unsubscribe("n", kind.kind == VKP_SUB_SHARD ? VKP_SUB_CHANNEL : VKP_SUB_SHARD);
    REQUIRE(fence.send(client, {"FENCE"}) == VKP_OK);
    CHECK(heard(loop, peer) == wire({"FENCE"}));
    say(peer, "+2\r\n");
    CHECK(fence.text_on(loop) == "2");
    client.unsubscribe("n", kind.kind);
    CHECK(heard(loop, peer) == wire({kind.off, "n"}));
    CHECK(heard(loop, peer) == wire({"HELLO", "3"}));
    say(peer, confirm(kind.ended, "n", 0) + hello_reply);
    client.unsubscribe("n", kind.kind); // one too many
    until_events(loop, client, 3);
    CHECK(client.history() == "connected, subscribed n, unsubscribed n");
    for (size_t i = 1; i < 3; i++) {
        CHECK(client.events[i].sub == kind.kind);
        CHECK(client.events[i].frame ==
              confirm(i == 1 ? kind.confirmed : kind.ended, "n", i == 1 ? 1 : 0));
    }
}

TEST_CASE("client: subscribe refuses wrong arguments, and everything after the close", "[client]")
{
    Loop loop;
    FakeServer server;
    Client client(loop, server.config());
    Done done;
    const vkp_str name = vkp_str_of("n");
    const vkp_str null_name = {nullptr, 3};
    CHECK(vkp_client_subscribe(nullptr, VKP_SUB_CHANNEL, name) == VKP_ERR_INVALID);
    CHECK(vkp_client_subscribe(client, static_cast<vkp_sub_kind>(3), name) == VKP_ERR_INVALID);
    CHECK(vkp_client_subscribe(client, VKP_SUB_CHANNEL, null_name) == VKP_ERR_INVALID);
    CHECK(vkp_client_unsubscribe(client, VKP_SUB_CHANNEL, null_name) == VKP_ERR_INVALID);
    CHECK(vkp_client_subscribe_then(client, VKP_SUB_CHANNEL, name, nullptr, nullptr) ==
          VKP_ERR_INVALID);
    vkp_client_close(client);
    vkp_client_close(client);
    CHECK(vkp_client_subscribe(client, VKP_SUB_CHANNEL, name) == VKP_ERR_CLOSED);
    CHECK(vkp_client_unsubscribe(client, VKP_SUB_CHANNEL, name) == VKP_ERR_CLOSED);
    CHECK(done.subscribe(client, "n") == VKP_ERR_CLOSED);
    Question question;
    CHECK(question.send(client, {"PING"}) == VKP_ERR_CLOSED);
    Sending sending;
    CHECK(sending.send(client, wire({"PING"}), 1) == VKP_ERR_CLOSED);
    loop.round();
    CHECK(done.calls == 0);
    CHECK(sending.calls == 0);
    CHECK(client.state() == VKP_CLIENT_CLOSED);
    CHECK(client.history().empty());
}

TEST_CASE("client: subscribe_then tells each outcome once", "[client]")
{
    Loop loop;
    FakeServer server;
    Client client(loop, server.config());
    // While the first connection is made, as commands do, it waits for the answer.
    Done early;
    REQUIRE(early.subscribe(client, "early") == VKP_OK);
    loop.round();
    Peer peer = server.greet(loop, client);
    CHECK(heard(loop, peer) == wire({"SUBSCRIBE", "early"}));
    CHECK(early.calls == 0);
    Done waiting;
    REQUIRE(waiting.subscribe(client, "early") == VKP_OK);
    loop.round();
    CHECK(waiting.calls == 0);
    say(peer, confirm("subscribe", "early"));
    vkp_test_run_until(loop, "the outcome", [&] { return waiting.calls == 1; });
    CHECK(waiting.status == VKP_OK);
    CHECK(early.calls == 1);
    CHECK(early.status == VKP_OK);
    CHECK(client.history() == "connected, subscribed early");
    Done at_once;
    REQUIRE(at_once.subscribe(client, "early") == VKP_OK);
    CHECK(at_once.calls == 0);
    loop.round();
    CHECK(at_once.calls == 1);
    CHECK(at_once.status == VKP_OK);

    Done refused[2];
    REQUIRE(refused[0].subscribe(client, "no") == VKP_OK);
    REQUIRE(refused[1].subscribe(client, "no") == VKP_OK);
    CHECK(heard(loop, peer) == wire({"SUBSCRIBE", "no"}));
    say(peer, "-NOPERM no permissions to access a channel used as an argument\r\n");
    vkp_test_run_until(loop, "a refusal", [&] { return refused[1].calls == 1; });
    CHECK(refused[0].calls == 1);
    CHECK(refused[0].status == VKP_ERR_REFUSED);
    CHECK(refused[1].status == VKP_ERR_REFUSED);
    CHECK(refused[1].words == "NOPERM no permissions to access a channel used as an argument");
    client.unsubscribe("no"); // both: the name is wanted until then; nothing goes out
    client.unsubscribe("no");

    Done lost;
    REQUIRE(lost.subscribe(client, "lost") == VKP_OK);
    CHECK(heard(loop, peer) == wire({"SUBSCRIBE", "lost"}));
    peer.reset();
    vkp_test_run_until(loop, "a loss", [&] { return lost.calls == 1; });
    CHECK(lost.status == VKP_ERR_DISCONNECTED);
    CHECK(lost.words == "the connection was lost");
    Done away;
    REQUIRE(away.subscribe(client, "lost") == VKP_OK);
    vkp_test_run_until(loop, "the outcome", [&] { return away.calls == 1; });
    CHECK(away.status == VKP_ERR_DISCONNECTED);

    peer = server.greet(loop, client);
    std::vector<std::string> again = {heard(loop, peer), heard(loop, peer)};
    std::sort(again.begin(), again.end());
    CHECK(again ==
          std::vector<std::string>{wire({"SUBSCRIBE", "lost"}), wire({"SUBSCRIBE", "early"})});
    Done closed;
    REQUIRE(closed.subscribe(client, "closed") == VKP_OK);
    CHECK(heard(loop, peer) == wire({"SUBSCRIBE", "closed"}));
    Done submitted;
    REQUIRE(submitted.subscribe(client, "submitted") == VKP_OK);
    vkp_client_close(client);
    CHECK(closed.calls == 1);
    CHECK(closed.status == VKP_ERR_CLOSED);
    CHECK(submitted.calls == 1);
    CHECK(submitted.status == VKP_ERR_CLOSED);
    loop.round();
    CHECK(early.calls + waiting.calls + at_once.calls + refused[0].calls + refused[1].calls +
              lost.calls + away.calls + closed.calls + submitted.calls ==
          9);
}

TEST_CASE("client: confirmations settle by name and place, between replies and messages",
          "[client]")
{
    Loop loop;
    FakeServer server;
    Client client(loop, server.config());
    Peer peer = server.greet(loop, client);
    Question first(client, {"A"});
    Done one;
    Done two;
    REQUIRE(one.subscribe(client, "c1") == VKP_OK);
    REQUIRE(two.subscribe(client, "p*", VKP_SUB_PATTERN) == VKP_OK);
    Question second(client, {"B"});
    CHECK(heard(loop, peer) == wire({"A"}));
    CHECK(heard(loop, peer) == wire({"SUBSCRIBE", "c1"}));
    CHECK(heard(loop, peer) == wire({"PSUBSCRIBE", "p*"}));
    CHECK(heard(loop, peer) == wire({"B"}));
    say(peer, push({"message", "c0", "stray"}) + ":1\r\n" + confirm("subscribe", "c1") +
                  push({"message", "c1", "x"}) + confirm("psubscribe", "p*", 2) +
                  push({"pmessage", "p*", "pq", "y"}) + ":2\r\n");
    CHECK(second.text_on(loop) == "2");
    CHECK(first.text_on(loop) == "1");
    CHECK(one.status == VKP_OK);
    CHECK(two.status == VKP_OK);
    CHECK(client.history() == "connected, message c0 stray, subscribed c1, message c1 x, "
                              "subscribed p*, pmessage p* pq y");
}

TEST_CASE("client: off and on again before the server answered", "[client]")
{
    Loop loop;
    FakeServer server;
    Client client(loop, server.config());
    Peer peer = server.greet(loop, client);
    Done first;
    Done second;
    REQUIRE(first.subscribe(client, "c") == VKP_OK);
    client.unsubscribe("c");
    REQUIRE(second.subscribe(client, "c") == VKP_OK);
    CHECK(heard(loop, peer) == wire({"SUBSCRIBE", "c"}));
    CHECK(heard(loop, peer) == wire({"UNSUBSCRIBE", "c"}));
    CHECK(heard(loop, peer) == wire({"HELLO", "3"})); // the fence
    CHECK(heard(loop, peer) == wire({"SUBSCRIBE", "c"}));
    say(peer, confirm("subscribe", "c"));
    vkp_test_run_until(loop, "the first", [&] { return first.calls == 1; });
    // Its own SUBSCRIBE is still on the way: a message could be missed before it.
    CHECK(second.calls == 0);
    say(peer, confirm("unsubscribe", "c", 0));
    loop.round();
    CHECK(client.events.size() == 2); // the fence settles it
    CHECK(second.calls == 0);
    say(peer, hello_reply + confirm("subscribe", "c"));
    vkp_test_run_until(loop, "the second", [&] { return second.calls == 1; });
    CHECK(first.status == VKP_OK);
    CHECK(second.status == VKP_OK);
    CHECK(client.history() == "connected, subscribed c, unsubscribed c, subscribed c");
    client.unsubscribe("c");
    CHECK(heard(loop, peer) == wire({"UNSUBSCRIBE", "c"}));
    CHECK(heard(loop, peer) == wire({"HELLO", "3"}));
    client.subscribe("c");
    CHECK(heard(loop, peer) == wire({"SUBSCRIBE", "c"}));
    client.unsubscribe("c");
    CHECK(heard(loop, peer) == wire({"UNSUBSCRIBE", "c"}));
    CHECK(heard(loop, peer) == wire({"HELLO", "3"}));
    Question next(client, {"NEXT"});
    loop.round();
    say(peer, confirm("unsubscribe", "c", 0) + hello_reply + confirm("subscribe", "c") +
                  confirm("unsubscribe", "c", 0) + hello_reply + "+n\r\n");
    CHECK(next.text_on(loop) == "n");
    CHECK(first.calls == 1);
    CHECK(second.calls == 1);
}

TEST_CASE("client: an unsubscribe that the server refuses is settled all the same", "[client]")
{
    Loop loop;
    FakeServer server;
    Client client(loop, server.config());
    Peer peer = server.greet(loop, client);
    client.subscribe("c");
    (void)heard(loop, peer);
    say(peer, confirm("subscribe", "c"));
    until_events(loop, client, 2);
    client.unsubscribe("c");
    CHECK(heard(loop, peer) == wire({"UNSUBSCRIBE", "c"}));
    CHECK(heard(loop, peer) == wire({"HELLO", "3"}));
    Question next(client, {"NEXT"});
    CHECK(heard(loop, peer) == wire({"NEXT"}));
    say(peer, "-NOSUB 'UNSUBSCRIBE' command executed not in subscribed mode\r\n" +
                  std::string(hello_reply) + "+f\r\n");
    CHECK(next.text_on(loop) == "f");
    CHECK(client.history() == "connected, subscribed c, unsubscribed c");
    client.subscribe("c");
    CHECK(heard(loop, peer) == wire({"SUBSCRIBE", "c"}));
}

TEST_CASE("client: a shard channel that leaves the node is told, and asked for again", "[client]")
{
    Loop loop;
    FakeServer server;
    Client client(loop, server.config());
    Peer peer = server.greet(loop, client);
    client.subscribe("s", VKP_SUB_SHARD);
    CHECK(heard(loop, peer) == wire({"SSUBSCRIBE", "s"}));
    say(peer, confirm("ssubscribe", "s"));
    until_events(loop, client, 2);
    Question fence(client, {"FENCE"});
    loop.round();
    say(peer, confirm("sunsubscribe", "s", 0) + confirm("sunsubscribe", "never", 0) + "+f\r\n");
    CHECK(fence.text_on(loop) == "f");
    CHECK(client.history() == "connected, subscribed s, lost s, unsubscribed never");
    CHECK(heard(loop, peer) == wire({"FENCE"}));
    CHECK(heard(loop, peer) == wire({"SSUBSCRIBE", "s"}));
    Done done;
    REQUIRE(done.subscribe(client, "s", VKP_SUB_SHARD) == VKP_OK);
    loop.round();
    CHECK(done.calls == 0);
    say(peer, "-MOVED 5 127.0.0.1:7001\r\n");
    vkp_test_run_until(loop, "the outcome", [&] { return done.calls == 1; });
    CHECK(done.status == VKP_ERR_REFUSED);
    CHECK(done.words == "MOVED 5 127.0.0.1:7001");
    // It stays wanted: the client asks again by itself, and the gap is told with the answer.
    CHECK(heard(loop, peer) == wire({"SSUBSCRIBE", "s"}));
    say(peer, confirm("ssubscribe", "s"));
    until_events(loop, client, 7);
    CHECK(client.history() == "connected, subscribed s, lost s, unsubscribed never, refused s, "
                              "subscribed s, gap");
    CHECK(client.events[4].payload == "MOVED 5 127.0.0.1:7001");
}

TEST_CASE("client: many names", "[client]")
{
    Loop loop;
    FakeServer server;
    Client client(loop, server.config());
    constexpr int count = 2000;
    for (int i = 0; i < count; i++) {
        client.subscribe(std::to_string(i).c_str());
    }
    for (int round = 0; round < 2; round++) {
        Peer peer = server.greet(loop, client);
        std::vector<bool> asked(count);
        std::string confirmations;
        for (int i = 0; i < count; i++) {
            const std::string frame = heard(loop, peer);
            const size_t at = frame.find("SUBSCRIBE\r\n$");
            REQUIRE(at != std::string::npos);
            const std::string name =
                frame.substr(frame.find("\r\n", at + 11) + 2,
                             frame.size() - 2 - (frame.find("\r\n", at + 11) + 2));
            REQUIRE_FALSE(asked[std::stoul(name)]);
            asked[std::stoul(name)] = true;
            confirmations += confirm("subscribe", name, i + 1);
        }
        const size_t before = client.events.size();
        std::thread writer([&] { say(peer, confirmations); });
        until_events(loop, client, before + count + static_cast<size_t>(round));
        writer.join();
    }
    CHECK(client.count(VKP_PUSH_SUBSCRIBED) == 2 * count);
    CHECK(client.count(VKP_PUSH_GAP) == 1);
    CHECK(client.events.back().kind == VKP_PUSH_GAP);
}

// ---------------------------------------------------------------------------------------------
// Pushes

TEST_CASE("client: each kind of push is told with its parts", "[client]")
{
    Loop loop;
    FakeServer server;
    Client client(loop, server.config());
    Peer peer = server.greet(loop, client);
    const std::vector<std::string> frames = {
        push({"message", "c", "hi"}),
        push({"message", "", ""}),
        push({"pmessage", "p*", "pq", "hi"}),
        push({"smessage", "s", "hi"}),
        ">2\r\n$10\r\ninvalidate\r\n*2\r\n$2\r\nk1\r\n$2\r\nk2\r\n",
        ">2\r\n$10\r\ninvalidate\r\n_\r\n",
        ">2\r\n$10\r\ninvalidate\r\n*-1\r\n",
        ">2\r\n$21\r\ntracking-redir-broken\r\n:6\r\n",
        ">3\r\n+server-cpu-usage\r\n%1\r\n+x\r\n,1.5\r\n*0\r\n",
        push({"message", "of", "a", "strange", "shape"}),
        ">3\r\n$11\r\nunsubscribe\r\n_\r\n:0\r\n"};
    std::string all;
    for (const std::string &frame : frames) {
        all += frame;
    }
    say(peer, all);
    until_events(loop, client, frames.size() + 1);
    CHECK(client.history() ==
          "connected, message c hi, message  , pmessage p* pq hi, smessage s hi, invalidate, "
          "invalidate, invalidate, other tracking-redir-broken, other server-cpu-usage, "
          "other message, unsubscribed ");
    for (size_t i = 0; i < frames.size(); i++) {
        CHECK(client.events[i + 1].frame == frames[i]);
    }
    CHECK(client.events[1].sub == VKP_SUB_CHANNEL);
    CHECK(client.events[3].sub == VKP_SUB_PATTERN);
    CHECK(client.events[4].sub == VKP_SUB_SHARD);
}

TEST_CASE("client: a message that an EXEC holds is told once, and is no element", "[client]")
{
    Loop loop;
    FakeServer server;
    Client client(loop, server.config());
    Peer peer = server.greet(loop, client);
    Sending block;
    REQUIRE(block.send(client, wire({"EXEC"}), 1) == VKP_OK);
    loop.round();
    say(peer, "*2\r\n:1\r\n" + push({"message", "c", "inner"}) +
                  push({"pmessage", "c*", "c", "inner"}) + ":2\r\n" +
                  push({"message", "c", "outer"}));
    until_events(loop, client, 4);
    CHECK(block.calls == 1);
    CHECK(block.text == "[1 2]");
    CHECK(client.history() == "connected, message c inner, pmessage c* c inner, message c outer");
}

TEST_CASE("client: pushes may be kept beyond their callback by a reference", "[client]")
{
    Loop loop;
    FakeServer server;
    Client client(loop, server.config());
    Peer peer = server.greet(loop, client);
    std::vector<vkp_push> kept;
    client.hook = [&](const vkp_push &given) {
        vkp_push copy = given;
        copy.frame = vkp_bytes_ref(&given.frame);
        kept.push_back(copy);
    };
    for (int i = 0; i < 100; i++) {
        say(peer, push({"message", "c", std::string(3000, static_cast<char>('a' + i % 26))}));
        loop.round();
    }
    until_events(loop, client, 101);
    client.unref();
    for (int i = 0; i < 100; i++) {
        vkp_push &one = kept[static_cast<size_t>(i)];
        CHECK(vkp_test_view(one.payload) == std::string(3000, static_cast<char>('a' + i % 26)));
        CHECK(vkp_push_get_cost(&one) == sizeof(vkp_push) + one.frame.len);
        if (i % 2 == 0) {
            vkp_push_unref(&one);
        } else {
            vkp_push_drop(nullptr, &one);
        }
        CHECK(one.frame.len == 0);
        CHECK(one.payload.len == 0);
        vkp_push_unref(&one);
    }
}

TEST_CASE("push: from a value", "[client]")
{
    vkp_resp_reader *reader = nullptr;
    REQUIRE(vkp_resp_reader_open(nullptr, &reader) == VKP_OK);
    const auto read = [&](const std::string &text) {
        const vkp_value *value = nullptr;
        if (vkp_resp_reader_feed(reader, text.data(), text.size()) != VKP_OK ||
            vkp_resp_reader_next(reader, &value) != VKP_OK) {
            vkp_test_fail("not RESP: %s", text.c_str());
        }
        return value;
    };
    vkp_push got;
    REQUIRE(vkp_push_from_value(read("*3\r\n+message\r\n+c\r\n+m\r\n"), &got) == VKP_OK);
    CHECK(got.kind == VKP_PUSH_MESSAGE);
    CHECK(got.frame.block == nullptr);
    CHECK(got.frame.len == 0);
    CHECK(vkp_test_view(got.channel) == "c");
    CHECK(vkp_test_view(got.payload) == "m");
    REQUIRE(vkp_push_from_value(read(">1\r\n+odd\r\n"), &got) == VKP_OK);
    CHECK(got.kind == VKP_PUSH_OTHER);
    CHECK(vkp_test_view(got.channel) == "odd");
    for (const char *text : {"*0\r\n", "*1\r\n:1\r\n", "+message\r\n", "%1\r\n+a\r\n+b\r\n",
                             "_\r\n", "~1\r\n+message\r\n"}) {
        INFO(text);
        CHECK(vkp_push_from_value(read(text), &got) == VKP_ERR_INVALID);
    }
    CHECK(vkp_push_from_value(nullptr, &got) == VKP_ERR_INVALID);
    CHECK(vkp_push_from_value(read("*1\r\n+a\r\n"), nullptr) == VKP_ERR_INVALID);
    vkp_resp_reader_unref(reader);
    CHECK(std::string(vkp_push_kind_str(VKP_PUSH_LAGGED)) == "lagged");
    CHECK(vkp_push_kind_str(static_cast<vkp_push_kind>(99)) != nullptr);
}

namespace {

struct Channel {
    vkp_mpsc_tx *tx = nullptr;
    vkp_mpsc_rx *rx = nullptr;
    explicit Channel(const vkp_env *env, size_t items, size_t bytes = 0)
    {
        vkp_mpsc_config config = {};
        config.elem_bytes = sizeof(vkp_push);
        config.capacity_items = items;
        config.capacity_bytes = bytes;
        config.cost = vkp_push_get_cost;
        config.drop = vkp_push_drop;
        config.env = env;
        if (vkp_mpsc_open(&config, &tx, &rx) != VKP_OK) {
            vkp_test_fail("no channel");
        }
    }
    ~Channel()
    {
        vkp_mpsc_tx_unref(tx);
        vkp_mpsc_rx_unref(rx);
    }
    Channel(const Channel &) = delete;
    Channel &operator=(const Channel &) = delete;
    // Takes what is there; "" when nothing is.
    std::string take(vkp_test_event *out = nullptr)
    {
        vkp_push one;
        vkp_status status = vkp_mpsc_try_recv(rx, &one);
        if (status != VKP_OK) {
            return status == VKP_ERR_CLOSED ? "closed" : "";
        }
        vkp_test_event event = vkp_test_event_of(one);
        vkp_push_unref(&one);
        if (out) {
            *out = event;
        }
        return event.kind == VKP_PUSH_LAGGED ? "lagged " + std::to_string(event.missed)
                                             : vkp_test_line(event);
    }
};

vkp_client *open_client(vkp_loop *loop, const vkp_client_config &config)
{
    vkp_client *client = nullptr;
    if (vkp_client_open(loop, &config, &client) != VKP_OK) {
        vkp_test_fail("no client");
    }
    return client;
}

} // namespace

TEST_CASE("client: what had no room is told as soon as there is room", "[client]")
{
    Loop loop;
    FakeServer server;
    Channel channel(&loop.test.env, 4);
    vkp_client_config config = server.config();
    config.pushes = channel.tx;
    vkp_client *client = open_client(loop, config);
    Peer peer = server.greet(loop);
    std::string text;
    for (int i = 0; i < 10; i++) {
        text += push({"message", "c", std::to_string(i)});
    }
    Sending fence;
    REQUIRE(fence.send(client, wire({"FENCE"}), 1) == VKP_OK);
    loop.round();
    say(peer, text + "+f\r\n");
    vkp_test_run_until(loop, "the fence", [&] { return fence.calls == 1; });
    SECTION("no push follows")
    {
        CHECK(channel.take() == "connected");
        std::string line;
        vkp_test_run_until(loop, "a push that says what is missing", [&] {
            line = channel.take();
            return line == "lagged 7";
        });
        CHECK(channel.take().empty());
        loop.round();
        CHECK(channel.take().empty());
        vkp_client_unref(client);
    }
    SECTION("the client is closed")
    {
        CHECK(channel.take() == "connected");
        vkp_client_close(client);
        vkp_client_unref(client);
        CHECK(channel.take() == "message c 0");
        CHECK(channel.take() == "message c 1");
        CHECK(channel.take() == "message c 2");
        CHECK(channel.take() == "lagged 7");
    }
}

TEST_CASE("client: a full channel drops, and LAGGED tells the exact number", "[client]")
{
    Loop loop;
    FakeServer server;
    Channel channel(&loop.test.env, 4);
    vkp_client_config config = server.config();
    config.pushes = channel.tx;
    vkp_client *client = open_client(loop, config);
    Peer peer = server.greet(loop);
    Sending fence;
    int fences = 0;
    const auto messages = [&](int from, int to) {
        std::string text;
        for (int i = from; i < to; i++) {
            text += push({"message", "c", std::to_string(i)});
        }
        REQUIRE(fence.send(client, wire({"FENCE"}), 1) == VKP_OK);
        loop.round();
        say(peer, text + "+f\r\n");
        fences++;
        vkp_test_run_until(loop, "the fence", [&] { return fence.calls == fences; });
    };
    messages(0, 10); // connected and 0..2 fit
    CHECK(channel.take() == "connected");
    CHECK(channel.take() == "message c 0");
    messages(10, 12); // LAGGED takes one place, 10 the other
    CHECK(channel.take() == "message c 1");
    CHECK(channel.take() == "message c 2");
    CHECK(channel.take() == "lagged 7");
    CHECK(channel.take() == "message c 10");
    CHECK(channel.take().empty());
    messages(12, 13);
    CHECK(channel.take() == "lagged 1");
    CHECK(channel.take() == "message c 12");
    // Sent = received + missed, however they were taken.
    uint64_t sum = 0;
    int next = 13;
    for (int i = 0; i < 50; i++) {
        messages(next, next + i % 9);
        next += i % 9;
        for (int take = 0; take < i % 4; take++) {
            vkp_test_event event = {};
            const std::string line = channel.take(&event);
            sum += line.empty() ? 0 : event.kind == VKP_PUSH_LAGGED ? event.missed : 1;
        }
    }
    vkp_test_event event = {};
    while (!channel.take(&event).empty()) {
        sum += event.kind == VKP_PUSH_LAGGED ? event.missed : 1;
    }
    messages(next, next + 1);
    next++;
    while (!channel.take(&event).empty()) {
        sum += event.kind == VKP_PUSH_LAGGED ? event.missed : 1;
    }
    CHECK(sum == static_cast<uint64_t>(next - 13));
    vkp_client_unref(client);
}

TEST_CASE("client: its channel closes with it, after what was queued; a receiver may go first",
          "[client]")
{
    Loop loop;
    FakeServer server;
    vkp_client_config config = server.config();
    SECTION("the client goes")
    {
        Channel channel(&loop.test.env, 0);
        config.pushes = channel.tx;
        vkp_client *client = open_client(loop, config);
        vkp_mpsc_tx_unref(channel.tx);
        channel.tx = nullptr;
        Peer peer = server.greet(loop);
        say(peer, push({"message", "c", "hi"}));
        std::string line;
        vkp_test_run_until(loop, "CONNECTED", [&] { return !(line = channel.take()).empty(); });
        CHECK(line == "connected");
        vkp_test_run_until(loop, "a message", [&] { return !(line = channel.take()).empty(); });
        CHECK(line == "message c hi");
        say(peer, push({"message", "c", "ho"}));
        peer.reset();
        vkp_test_run_until(loop, "the end",
                           [&] { return vkp_client_get_state(client) == VKP_CLIENT_WAITING; });
        vkp_client_close(client);
        CHECK(channel.take() == "message c ho");
        vkp_test_event event = {};
        CHECK(channel.take(&event) == "disconnected");
        CHECK_FALSE(event.payload.empty());
        CHECK(channel.take() == "closed");
        vkp_client_unref(client);
    }
    SECTION("the receiver goes")
    {
        Channel channel(&loop.test.env, 2);
        config.pushes = channel.tx;
        vkp_client *client = open_client(loop, config);
        Peer peer = server.greet(loop);
        vkp_mpsc_rx_unref(std::exchange(channel.rx, nullptr));
        Question question(client, {"PING"});
        (void)heard(loop, peer);
        say(peer, push({"message", "c", "hi"}) + "+PONG\r\n");
        CHECK(question.text_on(loop) == "PONG");
        vkp_client_unref(client);
    }
}

TEST_CASE("client: neither a callback nor a channel is needed", "[client]")
{
    Loop loop;
    FakeServer server;
    const vkp_client_config config = server.config();
    vkp_client *client = open_client(loop, config);
    Peer peer = server.greet(loop);
    Question question(client, {"PING"});
    (void)heard(loop, peer);
    say(peer, push({"message", "c", "hi"}) + "+PONG\r\n");
    CHECK(question.text_on(loop) == "PONG");
    vkp_client_unref(client);
}

// ---------------------------------------------------------------------------------------------
// RESP2

TEST_CASE("client: RESP2 has its pushes as arrays, and no commands beside them", "[client]")
{
    Loop loop;
    FakeServer server;
    vkp_client_config config = server.config();
    config.protocol = 2;
    Client client(loop, config);
    Peer peer = server.accept(loop);
    CHECK(heard(loop, peer) == wire({"PING"}));
    say(peer, "+PONG\r\n");
    until_state(loop, client, VKP_CLIENT_READY);
    // With nothing subscribed an array is a reply, whatever it holds.
    Question list(client, {"LRANGE", "l", "0", "-1"});
    loop.round();
    say(peer, "*3\r\n$7\r\nmessage\r\n$1\r\na\r\n$1\r\nb\r\n");
    CHECK(list.text_on(loop) == "[message a b]");
    CHECK(heard(loop, peer) == wire({"LRANGE", "l", "0", "-1"}));
    // A reply outstanding when the subscription is asked for is one too.
    Question before(client, {"LRANGE", "l", "0", "-1"});
    Done done;
    REQUIRE(done.subscribe(client, "c") == VKP_OK);
    CHECK(heard(loop, peer) == wire({"LRANGE", "l", "0", "-1"}));
    CHECK(heard(loop, peer) == wire({"CLIENT", "ID"}));
    CHECK(heard(loop, peer) == wire({"SUBSCRIBE", "c"}));
    say(peer,
        "*3\r\n$7\r\nmessage\r\n$1\r\na\r\n$1\r\nb\r\n:7\r\n"
        "*3\r\n$9\r\nsubscribe\r\n$1\r\nc\r\n:1\r\n*3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$2\r\nhi\r\n");
    CHECK(before.text_on(loop) == "[message a b]");
    until_events(loop, client, 3);
    CHECK(done.status == VKP_OK);
    CHECK(client.history() == "connected, subscribed c, message c hi");

    Question refused(client, {"GET", "k"});
    CHECK(refused.text_on(loop) == vkp_status_str(VKP_ERR_CLOSED));
    Sending sending;
    REQUIRE(sending.send(client, wire({"GET", "k"}), 1) == VKP_OK);
    vkp_test_run_until(loop, "a refusal", [&] { return sending.calls == 1; });
    CHECK(sending.status == VKP_ERR_REFUSED);

    client.subscribe("p*", VKP_SUB_PATTERN);
    CHECK(heard(loop, peer) == wire({"PSUBSCRIBE", "p*"}));
    say(peer, "*3\r\n$10\r\npsubscribe\r\n$2\r\np*\r\n:2\r\n"
              "*4\r\n$8\r\npmessage\r\n$2\r\np*\r\n$2\r\npq\r\n$1\r\nx\r\n");
    until_events(loop, client, 5);
    client.unsubscribe("c");
    client.unsubscribe("p*", VKP_SUB_PATTERN);
    CHECK(heard(loop, peer) == wire({"UNSUBSCRIBE", "c"}));
    CHECK(heard(loop, peer) == wire({"PUNSUBSCRIBE", "p*"}));
    const std::string fence = heard(loop, peer);
    CHECK(fence.find("PING") != std::string::npos);
    say(peer, "*3\r\n$11\r\nunsubscribe\r\n$1\r\nc\r\n:1\r\n"
              "*4\r\n$8\r\npmessage\r\n$2\r\np*\r\n$2\r\npq\r\n$1\r\ny\r\n"
              "*3\r\n$12\r\npunsubscribe\r\n$2\r\np*\r\n:0\r\n" +
                  fence.substr(fence.find("$26")));
    until_events(loop, client, 8);
    CHECK(client.history() ==
          "connected, subscribed c, message c hi, subscribed p*, "
          "pmessage p* pq x, pmessage p* pq y, unsubscribed c, unsubscribed p*");
    Question after(client, {"GET", "k"});
    CHECK(heard(loop, peer) == wire({"GET", "k"}));
    say(peer, "$-1\r\n");
    CHECK(after.text_on(loop) == "null");
}

// ---------------------------------------------------------------------------------------------
// Outages

TEST_CASE("client: an outage is told once, in order, and what is wanted comes back", "[client]")
{
    Loop loop;
    FakeServer server;
    Client client(loop, server.config());
    client.subscribe("kept");
    client.subscribe("left");
    uint64_t before = 0;
    uint64_t known = 0;
    {
        before = loop.now();
        Peer peer = server.greet(loop, client);
        confirm_asked(loop, peer);
        confirm_asked(loop, peer);
        until_events(loop, client, 3);
        known = loop.now();
        loop.round();
        server.close();
    }
    until_state(loop, client, VKP_CLIENT_WAITING);
    CHECK(client.count(VKP_PUSH_SUBSCRIBED) == 2);
    CHECK(client.events[3].kind == VKP_PUSH_DISCONNECTED);
    CHECK(client.events[3].payload == "the connection was lost");
    CHECK(client.error() == "the connection was lost");
    // Tries that fail are one event.
    vkp_test_run_until(loop, "a try that failed",
                       [&] { return client.error() == "nobody accepts connections there"; });
    for (int i = 0; i < 5; i++) {
        loop.round(loop.now() + 2 * ms);
    }
    CHECK(client.events.size() == 5);
    CHECK(client.events[4].payload == "nobody accepts connections there");
    client.unsubscribe("left");
    client.subscribe("fresh", VKP_SUB_PATTERN);
    client.subscribe("gone");
    client.unsubscribe("gone");
    server.open();
    Peer peer = server.greet(loop, client);
    client.events.clear();
    CHECK(heard(loop, peer) == wire({"SUBSCRIBE", "kept"}));
    CHECK(heard(loop, peer) == wire({"PSUBSCRIBE", "fresh"}));
    say(peer, push({"message", "kept", "early"}) + confirm("subscribe", "kept"));
    until_events(loop, client, 3);
    say(peer, confirm("psubscribe", "fresh", 2) + push({"message", "kept", "late"}));
    until_events(loop, client, 5);
    // "fresh" had never been confirmed: nothing of it can be missing.
    CHECK(client.history() == "message kept early, subscribed kept, gap, subscribed fresh, "
                              "message kept late");
    const vkp_test_event &gap = client.events[2];
    CHECK(gap.gap.from_ns >= before);
    CHECK(gap.gap.from_ns <= known);
    CHECK(gap.gap.to_unix_ms - gap.gap.from_unix_ms <= (gap.gap.to_ns - gap.gap.from_ns) / ms + 1);
    CHECK(gap.gap.to_ns >= gap.gap.from_ns);
    CHECK(gap.gap.to_ns <= loop.now());
    client.unsubscribe("gone"); // one too many
    Question fence(client, {"FENCE"});
    CHECK(heard(loop, peer) == wire({"FENCE"}));
}

TEST_CASE("client: a second outage before the subscriptions are back widens the gap", "[client]")
{
    Loop loop;
    FakeServer server;
    Client client(loop, server.config());
    client.subscribe("c");
    Peer peer = server.greet(loop, client);
    (void)heard(loop, peer);
    say(peer, confirm("subscribe", "c"));
    until_events(loop, client, 2);
    const uint64_t known = loop.now();
    peer.reset();
    until_state(loop, client, VKP_CLIENT_WAITING);
    server.greet(loop, client).reset();
    until_state(loop, client, VKP_CLIENT_WAITING);
    peer = server.greet(loop, client);
    CHECK(heard(loop, peer) == wire({"SUBSCRIBE", "c"}));
    say(peer, confirm("subscribe", "c"));
    until_events(loop, client, 8);
    CHECK(client.history() == "connected, subscribed c, disconnected, reconnected, disconnected, "
                              "reconnected, subscribed c, gap");
    CHECK(client.events[7].gap.from_ns <= known);
}

TEST_CASE("client: a subscription refused when it comes back is asked for until it is back",
          "[client]")
{
    // what servers say while a script runs, a data set is loaded, a primary is away.
    const std::string words =
        GENERATE("BUSY Redis is busy running a script. You can only call SCRIPT KILL",
                 "LOADING Redis is loading the dataset in memory",
                 "MASTERDOWN Link with MASTER is "
                 "down and replica-serve-stale-data is set to 'no'.",
                 "CLUSTERDOWN The cluster is down", "NOPERM no permissions to access a channel");
    Loop loop(&vkp_backend_null, 0); // its clock jumps over the waits
    FakeServer server;
    Client client(loop, server.config());
    client.subscribe("a");
    client.subscribe("b");
    Peer peer = server.greet(loop, client);
    confirm_asked(loop, peer);
    confirm_asked(loop, peer);
    until_events(loop, client, 3);
    peer.reset();
    until_events(loop, client, 4); // DISCONNECTED
    peer = server.greet(loop, client);
    client.events.clear();
    const auto answer = [&](const std::string &frame, bool refuse) {
        const bool is_a = frame == wire({"SUBSCRIBE", "a"});
        CHECK((is_a || frame == wire({"SUBSCRIBE", "b"})));
        say(peer, refuse ? "-" + words + "\r\n" : confirm("subscribe", is_a ? "a" : "b"));
        return is_a;
    };
    const std::string back = answer(heard(loop, peer), false) ? "a" : "b";
    const std::string other = back == "a" ? "b" : "a";
    answer(heard(loop, peer), true);
    // One is back: its gap is told. The other is not in it.
    until_events(loop, client, 3);
    CHECK(client.history() == "subscribed " + back + ", refused " + other + ", gap");
    CHECK(client.events[1].payload == words);
    // The same words again are no event.
    CHECK(heard(loop, peer) == wire({"SUBSCRIBE", other}));
    say(peer, "-" + words + "\r\n");
    CHECK(heard(loop, peer) == wire({"SUBSCRIBE", other}));
    CHECK(client.events.size() == 3);
    say(peer, "-NOPERM now no rights\r\n");
    until_events(loop, client, 4);
    CHECK(client.events[3].payload == "NOPERM now no rights");
    CHECK(heard(loop, peer) == wire({"SUBSCRIBE", other}));
    say(peer, confirm("subscribe", other));
    until_events(loop, client, 6);
    CHECK(client.history() == "subscribed " + back + ", refused " + other + ", gap, refused " +
                                  other + ", subscribed " + other + ", gap " + other);
    CHECK(client.events[5].gap.from_ns == client.events[2].gap.from_ns);
}

TEST_CASE("client: a refusal waits as its words say, longer each time, at least half of a bound",
          "[client]")
{
    struct Form {
        const char *words;
        std::vector<uint64_t> bounds;
    };
    const Form form = GENERATE(Form{"BUSY wait", {100, 200, 400, 800, 1600, 3200, 5000, 5000}},
                               Form{"TRYAGAIN wait", {100, 200, 400, 800}},
                               Form{"NOPERM no", {1000, 2000, 4000, 8000, 16000, 30000, 30000}},
                               Form{"ERR who knows", {1000, 2000, 4000}},
                               Form{"MOVED 5 127.0.0.1:1", {1000, 2000}});
    const bool most = GENERATE(false, true);
    Loop loop(&vkp_backend_null, 0);
    FakeServer server;
    vkp_client_config config = server.config();
    config.heartbeat_ms = VKP_OFF;
    Client client(loop, config);
    Peer peer = server.greet(loop, client);
    client.subscribe("c");
    CHECK(heard(loop, peer) == wire({"SUBSCRIBE", "c"}));
    for (uint64_t bound : form.bounds) {
        fixed_random = most ? 0 : bound / 2;
        const uint64_t before = loop.now();
        say(peer, "-" + std::string(form.words) + "\r\n");
        // The clock of the null backend jumps to the timer once nothing else is left.
        CHECK(heard(loop, peer) == wire({"SUBSCRIBE", "c"}));
        CHECK(loop.now() - before == (most ? bound : bound - bound / 2) * ms);
    }
    CHECK(client.history() == std::string("connected, refused c"));
    say(peer, confirm("subscribe", "c"));
    until_events(loop, client, 3);
    CHECK(client.history() == "connected, refused c, subscribed c");
    // A confirmation makes the bound start again.
    client.unsubscribe("c");
    CHECK(heard(loop, peer) == wire({"UNSUBSCRIBE", "c"}));
    CHECK(heard(loop, peer) == wire({"HELLO", "3"}));
    say(peer, confirm("unsubscribe", "c", 0) + hello_reply);
    client.subscribe("c");
    CHECK(heard(loop, peer) == wire({"SUBSCRIBE", "c"}));
    fixed_random = 0;
    const uint64_t before = loop.now();
    say(peer, "-" + std::string(form.words) + "\r\n");
    CHECK(heard(loop, peer) == wire({"SUBSCRIBE", "c"}));
    CHECK(loop.now() - before == form.bounds[0] * ms);
}

TEST_CASE("client: what is no RESP, or nobody's reply, or torn, ends the connection", "[client]")
{
    struct Case {
        const char *text;
        const char *error;
    };
    const Case bad =
        GENERATE(Case{"?what\r\n", "the server broke the protocol: unknown type byte '?'"},
                 Case{"HTTP/1.1 400 Bad Request\r\n",
                      "the server broke the protocol: unknown type byte 'H': this looks like HTTP"},
                 Case{"$3\r\nabcd\r\n",
                      "the server broke the protocol: bulk of 3 bytes is not followed by CRLF"},
                 Case{":1\r\n", "a reply that nobody asked for"},
                 Case{"*3\r\n$1\r\na\r\n", "the connection was lost"},
                 Case{">3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$100\r\nx", "the connection was lost"});
    Loop loop;
    FakeServer server;
    Client client(loop, server.config());
    {
        Peer peer = server.greet(loop, client);
        say(peer, push({"message", "c", "whole"}) + bad.text);
        until_events(loop, client, 2);
    }
    until_state(loop, client, VKP_CLIENT_WAITING);
    CHECK(client.error() == bad.error);
    Peer peer = server.greet(loop, client);
    say(peer, push({"message", "c", "next"}));
    until_events(loop, client, 5);
    CHECK(client.history() ==
          "connected, message c whole, disconnected, reconnected, message c next");
}

TEST_CASE("client: a reply where a confirmation was due ends the connection", "[client]")
{
    Loop loop;
    FakeServer server;
    Client client(loop, server.config());
    Peer peer = server.greet(loop, client);
    Done done;
    REQUIRE(done.subscribe(client, "c") == VKP_OK);
    (void)heard(loop, peer);
    say(peer, ":1\r\n");
    hung_up(loop, peer);
    CHECK(done.status == VKP_ERR_DISCONNECTED);
    CHECK(client.history() == "connected, disconnected");
}

TEST_CASE("client: a limit of the reader above its maximum is INVALID, not a lack of memory",
          "[client]")
{
    Loop loop;
    FakeServer server;
    vkp_client_config config = server.config();
    config.resp.max_depth = 65001;
    vkp_client *client = nullptr;
    CHECK(vkp_client_open(loop, &config, &client) == VKP_ERR_INVALID);
    CHECK(client == nullptr);
}

TEST_CASE("client: the reader's limits are the config's", "[client]")
{
    Loop loop;
    FakeServer server;
    vkp_client_config config = server.config();
    config.resp.max_bulk_bytes = 100;
    Client client(loop, config);
    Peer peer = server.greet(loop, client);
    Question fits(client, {"A"});
    Question beyond(client, {"B"});
    loop.round();
    say(peer, bulk(std::string(100, 'x')) + bulk(std::string(101, 'x')));
    CHECK(fits.text_on(loop) == std::string(100, 'x'));
    CHECK(beyond.text_on(loop) == vkp_status_str(VKP_ERR_CLOSED));
    // A length is an end: the reply costs its own command.
    Question after(client, {"C"});
    loop.round();
    say(peer, bulk(std::string(100, 'y')));
    CHECK(after.text_on(loop) == std::string(100, 'y'));
    CHECK(client.history() == "connected");
}

TEST_CASE("client: with hold_ms a command waits for a connection, and no longer", "[client]")
{
    Loop loop(&vkp_backend_null, 7); // each wait before a try is 7 ms
    FakeServer server;
    vkp_client_config config = server.config();
    config.hold_ms = 1000;
    config.retry_min_ms = 10;
    config.retry_max_ms = 60000;
    Client client(loop, config);
    Peer peer = server.greet(loop, client);
    Question written(client, {"SET", "k", "1"});
    CHECK(heard(loop, peer) == wire({"SET", "k", "1"}));
    server.close();
    peer.reset();
    CHECK(written.text_on(loop) == vkp_status_str(VKP_ERR_CLOSED));
    SECTION("the server comes back: what was not written is, and nothing twice")
    {
        Question first(client, {"SET", "k", "2"});
        loop.round(loop.now() + 500 * ms);
        Question second(client, {"GET", "k"});
        server.open();
        peer = server.greet(loop, client);
        CHECK(heard(loop, peer) == wire({"SET", "k", "2"}));
        CHECK(heard(loop, peer) == wire({"GET", "k"}));
        say(peer, "+OK\r\n+2\r\n");
        CHECK(first.text_on(loop) == "OK");
        CHECK(second.text_on(loop) == "2");
    }
    SECTION("it does not: each has its own time")
    {
        const uint64_t begun = loop.now();
        Question first(client, {"SET", "k", "2"});
        loop.round(begun + 400 * ms);
        CHECK(first.try_recv() == VKP_ERR_EMPTY);
        const uint64_t later = loop.now();
        Question second(client, {"GET", "k"});
        CHECK(first.text_on(loop) == vkp_status_str(VKP_ERR_CLOSED));
        CHECK(loop.now() >= begun + 1000 * ms);
        CHECK(loop.now() < begun + 1011 * ms);
        CHECK(second.text_on(loop) == vkp_status_str(VKP_ERR_CLOSED));
        CHECK(loop.now() >= later + 1000 * ms);
        CHECK(loop.now() < later + 1011 * ms);
    }
    SECTION("the client is closed")
    {
        Question first(client, {"SET", "k", "2"});
        loop.round();
        vkp_client_close(client);
        CHECK(first.text_on(loop) == vkp_status_str(VKP_ERR_CLOSED));
    }
}

TEST_CASE("client: a bulk over the limit is not kept while it comes", "[client]")
{
    Loop loop;
    FakeServer server;
    vkp_client_config config = server.config();
    config.resp.max_bulk_bytes = 100;
    Client client(loop, config);
    Peer peer = server.greet(loop, client);
    Question beyond(client, {"A"});
    Question after(client, {"B"});
    loop.round();
    say(peer, "$20000000\r\n");
    const std::string piece(20000, 'x');
    for (int i = 0; i < 1000; i++) {
        say(peer, piece);
        loop.round();
        REQUIRE(vkp_test_env_live_bytes(&loop.test) < 1000000);
    }
    say(peer, "\r\n+b\r\n");
    CHECK(after.text_on(loop) == "b");
    CHECK(beyond.text_on(loop) == vkp_status_str(VKP_ERR_CLOSED));
    CHECK(client.history() == "connected");
}

// ---------------------------------------------------------------------------------------------
// Time: on the null backend it jumps, so all of it is exact

TEST_CASE("client: each try waits a random part of a bound that doubles up to its limit",
          "[client]")
{
    const uint64_t random =
        GENERATE(uint64_t{0}, uint64_t{400}, uint64_t{123456789}, UINT64_MAX - 1);
    Loop loop(&vkp_backend_null, random);
    FakeServer server;
    vkp_client_config config = server.config();
    config.retry_min_ms = 0;
    config.retry_max_ms = 0; // the defaults: 50 and 5,000
    server.close();
    Client client(loop, config);
    uint64_t bound = 50;
    uint64_t at = loop.now();
    loop.round(); // the first try
    for (int i = 0; i < 12; i++) {
        REQUIRE(client.state() == VKP_CLIENT_WAITING);
        const uint64_t due = at + random % (bound + 1) * ms;
        REQUIRE(vkp_loop_get_deadline_ns(loop) == due);
        loop.round(VKP_FOREVER);
        REQUIRE(loop.now() == due);
        at = due;
        bound = std::min<uint64_t>(bound * 2, 5000);
    }
    if (random == 0) {
        return; // the next try would be in the round of the loss
    }
    // A server that greets and hangs up does not reset it.
    server.open();
    for (int i = 0; i < 3; i++) {
        server.greet(loop, client).reset();
        vkp_test_run_until(loop, "the loss", [&] { return client.state() == VKP_CLIENT_WAITING; });
        CHECK(client.events.back().kind == VKP_PUSH_DISCONNECTED);
        CHECK(vkp_loop_get_deadline_ns(loop) == loop.now() + random % 5001 * ms);
    }
    // A connection that stood for retry_reset_ms does.
    Peer peer = server.greet(loop, client);
    loop.round(loop.now() + 5000 * ms);
    peer.reset();
    vkp_test_run_until(loop, "the loss", [&] { return client.state() == VKP_CLIENT_WAITING; });
    CHECK(vkp_loop_get_deadline_ns(loop) == loop.now() + random % 51 * ms);
}

TEST_CASE("client: the time limit covers connection and handshake, each try anew", "[client]")
{
    Loop loop(&vkp_backend_null, 7);
    FakeServer server;
    vkp_client_config config = server.config();
    config.retry_min_ms = 10;
    config.retry_max_ms = 10;
    SECTION("the default")
    {
    }
    SECTION("a limit of one's own")
    {
        config.connect_timeout_ms = 70;
    }
    const uint64_t limit = (config.connect_timeout_ms ? config.connect_timeout_ms : 5000) * ms;
    Client client(loop, config);
    for (int i = 0; i < 3; i++) {
        REQUIRE(client.state() == VKP_CLIENT_CONNECTING);
        const uint64_t begin = loop.now();
        Peer peer = server.accept(loop);
        CHECK(heard(loop, peer) == wire({"HELLO", "3"}));
        REQUIRE(vkp_loop_get_deadline_ns(loop) == begin + limit);
        say(peer, "%1\r\n+proto\r\n"); // begun is not answered
        loop.round(0);
        while (client.state() == VKP_CLIENT_CONNECTING) {
            loop.round(VKP_FOREVER);
        }
        CHECK(loop.now() == begin + limit);
        CHECK(client.state() == VKP_CLIENT_WAITING);
        CHECK(client.error() == "no connection within the time limit");
        hung_up(loop, peer);
        until_state(loop, client, VKP_CLIENT_CONNECTING);
        CHECK(loop.now() == begin + limit + 7 * ms);
    }
    CHECK(client.history() == "connect-failed");
    CHECK(client.events[0].payload == "no connection within the time limit");
}

TEST_CASE("client: in RESP2 a heartbeat's answer is no push", "[client]")
{
    Loop loop(&vkp_backend_null, 0);
    FakeServer server;
    vkp_client_config config = server.config();
    config.protocol = 2;
    Client client(loop, config);
    Peer peer = server.accept(loop);
    (void)heard(loop, peer);
    say(peer, "+PONG\r\n");
    client.subscribe("c");
    CHECK(heard(loop, peer) == wire({"CLIENT", "ID"}));
    CHECK(heard(loop, peer) == wire({"SUBSCRIBE", "c"}));
    say(peer, "-ERR unknown command\r\n"
              "*3\r\n$9\r\nsubscribe\r\n$1\r\nc\r\n:1\r\n");
    for (int i = 0; i < 3; i++) {
        CHECK(heard(loop, peer) == wire({"PING"}));
        say(peer, "*2\r\n$4\r\npong\r\n$0\r\n\r\n");
    }
    CHECK(client.history() == "connected, subscribed c");
}

// ---------------------------------------------------------------------------------------------
// The end

TEST_CASE("client: close answers everything with CLOSED before it returns", "[client]")
{
    Loop loop;
    FakeServer server;
    Client client(loop, server.config());
    Peer peer = server.greet(loop, client);
    client.subscribe("c");
    (void)heard(loop, peer);
    Question flying(client, {"A"});
    Sending sending;
    REQUIRE(sending.send(client, wire({"B"}), 1) == VKP_OK);
    (void)heard(loop, peer);
    (void)heard(loop, peer);
    Question submitted(client, {"C"});
    Sending unsent;
    REQUIRE(unsent.send(client, wire({"D"}), 1) == VKP_OK);
    vkp_client_close(client);
    CHECK(flying.try_recv() == VKP_ERR_CLOSED);
    CHECK(submitted.try_recv() == VKP_ERR_CLOSED);
    CHECK(sending.calls == 1);
    CHECK(sending.status == VKP_ERR_CLOSED);
    CHECK(unsent.calls == 1);
    CHECK(unsent.status == VKP_ERR_CLOSED);
    hung_up(loop, peer);
    for (int i = 0; i < 3; i++) {
        loop.round();
    }
    CHECK(client.history() == "connected");
    CHECK(sending.calls + unsent.calls == 2);
}

TEST_CASE("client: may be closed in any callback, and nothing is called after", "[client]")
{
    const char *where = GENERATE("connected", "message", "subscribed", "unsubscribed", "refused",
                                 "disconnected", "reconnected", "gap", "reply", "reply lost",
                                 "done", "done lost", "done at once", "done refused", "nested");
    const bool unref = GENERATE(false, true);
    INFO(where << (unref ? " unref" : " close"));
    Loop loop;
    FakeServer server;
    Client client(loop, server.config());
    bool closing = false;
    bool ended = false;
    int late = 0;
    const auto at = [&](const char *place) {
        if (ended) {
            late++;
        } else if (!closing && std::string(place) == where) {
            closing = true;
            if (unref) {
                client.unref();
            } else {
                vkp_client_close(client);
            }
            ended = true;
        }
    };
    client.hook = [&](const vkp_push &given) {
        at(given.kind == VKP_PUSH_MESSAGE && vkp_test_view(given.payload) == "nested"
               ? "nested"
               : vkp_push_kind_str(given.kind));
    };
    // Several of each, so that some are behind the one that closes.
    Done done[2], lost_done[2], at_once[2], refused[2];
    Sending reply[2], lost_reply[2];
    for (int i = 0; i < 2; i++) {
        done[i].hook = [&] { at("done"); };
        lost_done[i].hook = [&] { at("done lost"); };
        at_once[i].hook = [&] { at("done at once"); };
        refused[i].hook = [&] { at("done refused"); };
        reply[i].hook = [&] { at("reply"); };
        lost_reply[i].hook = [&] { at("reply lost"); };
    }
    int asked = 0;
    const auto ask = [&](Done *two, const char *name) {
        for (int i = 0; i < 2 && !ended; i++) {
            REQUIRE(two[i].subscribe(client, name) == VKP_OK);
            asked++;
        }
    };
    const auto send = [&](Sending *two) {
        for (int i = 0; i < 2 && !ended; i++) {
            REQUIRE(two[i].send(client, wire({"X"}), 1) == VKP_OK);
            asked++;
        }
    };
    // An answer once the last command was seen, unless the client is gone.
    const auto answer = [&](const Peer &peer, int commands, const std::string &text) {
        for (int i = 0; i < commands && !ended; i++) {
            (void)heard(loop, peer);
        }
        if (!ended) {
            say(peer, text);
        }
    };
    Peer peer = server.greet(loop);
    const auto settle = [&](const std::function<bool()> &finished) {
        vkp_test_run_until(loop, "the next step", [&] { return ended || finished(); });
    };
    settle([&] { return client.events.size() == 1; });
    ask(done, "c");
    answer(peer, 1, confirm("subscribe", "c"));
    settle([&] { return done[1].calls == 1; });
    ask(at_once, "c");
    settle([&] { return at_once[1].calls == 1; });
    ask(refused, "no");
    answer(peer, 1, "-NOPERM no\r\n");
    settle([&] { return refused[1].calls == 1; });
    for (int i = 0; i < 2 && !ended; i++) {
        client.unsubscribe("no");
    }
    send(reply);
    answer(peer, 2,
           push({"message", "c", "m"}) + "*1\r\n" + push({"message", "c", "nested"}) +
               ":1\r\n+OK\r\n");
    settle([&] { return reply[1].calls == 1; });
    if (!ended) {
        client.subscribe("d");
        client.unsubscribe("d");
    }
    answer(peer, 3, confirm("subscribe", "d") + confirm("unsubscribe", "d") + hello_reply);
    settle([&] { return client.count(VKP_PUSH_UNSUBSCRIBED) == 1; });
    send(lost_reply);
    ask(lost_done, "e");
    if (!ended) {
        for (int i = 0; i < 3; i++) {
            (void)heard(loop, peer);
        }
    }
    peer.reset();
    settle([&] { return lost_done[1].calls == 1; });
    if (!ended) {
        peer = server.greet(loop);
        settle([&] { return client.state() == VKP_CLIENT_READY; });
        answer(peer, 2, confirm("subscribe", "c") + confirm("subscribe", "e"));
        settle([&] { return client.count(VKP_PUSH_GAP) == 1; });
    }
    CHECK(ended);
    for (int i = 0; i < 3; i++) {
        loop.round();
    }
    CHECK(late == 0);
    int told = 0;
    for (int i = 0; i < 2; i++) {
        told += done[i].calls + lost_done[i].calls + at_once[i].calls + refused[i].calls +
                reply[i].calls + lost_reply[i].calls;
    }
    CHECK(told == asked);
}

TEST_CASE("client: goes with its loop, in any state", "[client]")
{
    Loop loop;
    FakeServer server;
    Client client(loop, server.config());
    const int state = GENERATE(0, 1, 2, 3);
    Peer peer;
    Question question;
    Sending sending;
    Done done;
    if (state == 0) {
        CHECK(client.state() == VKP_CLIENT_CONNECTING);
    } else if (state == 1) {
        peer = server.accept(loop);
    } else {
        peer = server.greet(loop, client);
    }
    if (state < 3) {
        REQUIRE(question.send(client, {"A"}) == VKP_OK);
        REQUIRE(sending.send(client, wire({"B"}), 1) == VKP_OK);
        REQUIRE(done.subscribe(client, "c") == VKP_OK);
        loop.round();
    } else {
        server.close();
        peer.reset();
        until_state(loop, client, VKP_CLIENT_WAITING);
    }
    loop.close();
    CHECK(client.state() == VKP_CLIENT_CLOSED);
    if (state < 3) {
        CHECK(question.try_recv() == VKP_ERR_CLOSED);
        CHECK(sending.status == VKP_ERR_CLOSED);
        CHECK(sending.calls == 1);
        CHECK(done.calls == 1);
    }
    CHECK(client.events.size() == (state < 2 ? 0u : state == 2 ? 1u : 2u));
    Question late;
    CHECK(late.send(client, {"A"}) == VKP_ERR_CLOSED);
    CHECK(vkp_client_subscribe(client, VKP_SUB_CHANNEL, vkp_str_of("c")) == VKP_ERR_CLOSED);
    vkp_client_close(client);
}

TEST_CASE("client: references: the last one closes", "[client]")
{
    Loop loop;
    FakeServer server;
    Client client(loop, server.config());
    Peer peer = server.greet(loop, client);
    vkp_client *second = vkp_client_ref(client);
    CHECK(second == static_cast<vkp_client *>(client));
    client.unref();
    Question question(second, {"PING"});
    CHECK(heard(loop, peer) == wire({"PING"}));
    say(peer, "+PONG\r\n");
    CHECK(question.text_on(loop) == "PONG");
    vkp_client_unref(second);
    hung_up(loop, peer);
    CHECK(client.history() == "connected");
}

// ---------------------------------------------------------------------------------------------
// Threads

namespace {

// Answers ECHO with its argument, PUB with a push to everybody... here: to its sender, and HELLO.
// Runs in a thread of its own until its listener is shut.
class EchoServer {
  public:
    explicit EchoServer(FakeServer *server) : server_(server)
    {
        thread_ = std::thread([this] { run(); });
    }
    ~EchoServer()
    {
        stop_.store(true);
        thread_.join();
    }

  private:
    void run()
    {
        Peer peer;
        while (!stop_.load()) {
            if (!peer) {
                peer = server_->try_accept();
                sched_yield();
                continue;
            }
            size_t len = 0;
            const char *frame = vkp_test_peer_try_read_frame(peer.get(), &len);
            if (vkp_test_peer_is_ended(peer.get())) {
                peer.reset();
            } else if (frame) {
                answer(peer, std::string(frame, len));
            } else {
                sched_yield();
            }
        }
    }
    static void answer(const Peer &peer, const std::string &frame)
    {
        std::string text;
        if (frame.find("HELLO") != std::string::npos) {
            text = hello_reply;
        } else {
            // The last argument of the command, header and all.
            text = push({"message", "c", "noise"}) + frame.substr(frame.rfind('$'));
        }
        (void)vkp_test_peer_send(peer.get(), text.data(), text.size());
    }
    FakeServer *server_;
    std::atomic<bool> stop_{false};
    std::thread thread_;
};

} // namespace

TEST_CASE("client: many threads ask, and each gets its own answers", "[client][threads]")
{
    Loop loop;
    FakeServer server;
    EchoServer echo(&server);
    Client client(loop, server.config());
    vkp_test_loop_thread thread(loop);
    constexpr int askers = 4;
    constexpr int each = 400;
    std::atomic<int> wrong{0};
    std::atomic<int> timeouts{0};
    std::vector<std::thread> threads;
    for (int t = 0; t < askers; t++) {
        threads.emplace_back([&, t] {
            for (int i = 0; i < each; i++) {
                const std::string text = std::to_string(t) + ":" + std::to_string(i);
                Question question;
                if (question.send(client, {"ECHO", text.c_str()}) != VKP_OK) {
                    wrong.fetch_add(1);
                    continue;
                }
                // Some leave before the answer: their slot's memory is the next one's.
                const bool hasty = i % 5 == 4;
                const vkp_status status = question.recv(hasty ? 0 : vkp_test_deadline());
                if (hasty && status == VKP_ERR_TIMEOUT) {
                    timeouts.fetch_add(1);
                } else if (status != VKP_OK || question.text() != text) {
                    wrong.fetch_add(1);
                }
            }
        });
    }
    for (std::thread &one : threads) {
        one.join();
    }
    CHECK(wrong.load() == 0);
    thread.stop();
    CHECK(client.count(VKP_PUSH_MESSAGE) > 0);
}

TEST_CASE("client: closed and dropped from other threads, with commands in flight",
          "[client][threads]")
{
    const bool unref = GENERATE(false, true);
    for (int round = 0; round < 20; round++) {
        Loop loop;
        FakeServer server;
        EchoServer echo(&server);
        vkp_client_config config = server.config();
        vkp_client *client = open_client(loop, config);
        vkp_test_loop_thread thread(loop);
        std::atomic<int> wrong{0};
        std::atomic<int> running{0};
        std::vector<std::thread> threads;
        for (int t = 0; t < 3; t++) {
            vkp_client *own = vkp_client_ref(client);
            threads.emplace_back([&, own] {
                running.fetch_add(1);
                for (int i = 0;; i++) {
                    Question question;
                    const vkp_status sent = question.send(own, {"ECHO", "x"});
                    if (sent == VKP_ERR_CLOSED || (unref && i == 20)) {
                        break;
                    }
                    if (sent != VKP_OK) {
                        wrong.fetch_add(1);
                        break;
                    }
                    const vkp_status got = question.recv(i % 3 == 2 ? 0 : vkp_test_deadline());
                    if (got != VKP_OK && got != VKP_ERR_CLOSED &&
                        !(got == VKP_ERR_TIMEOUT && i % 3 == 2)) {
                        wrong.fetch_add(1);
                    }
                }
                vkp_client_unref(own);
            });
        }
        while (running.load() < 3) {
            sched_yield();
        }
        if (!unref) {
            vkp_client_close(client);
        }
        vkp_client_unref(client);
        for (std::thread &one : threads) {
            one.join();
        }
        CHECK(wrong.load() == 0);
        thread.stop();
    }
}

TEST_CASE("client: a slot's owner needs no reference to the client", "[client][threads]")
{
    for (int round = 0; round < 100; round++) {
        Loop loop;
        FakeServer server;
        vkp_client *client = open_client(loop, server.config());
        Question question(client, {"NEVER ANSWERED"});
        vkp_test_loop_thread thread(loop);
        std::thread leaver([&] { (void)!question.recv(vkp_now_ns() + 20000); });
        vkp_client_unref(client);
        leaver.join();
        thread.stop();
    }
}

TEST_CASE("client: threads subscribe and leave while the server comes and goes",
          "[client][threads]")
{
    Loop loop;
    FakeServer server;
    Client client(loop, server.config());
    vkp_test_loop_thread thread(loop);
    std::atomic<bool> stop{false};
    // Confirms in order; hangs up after every 50th command.
    std::thread fake([&] {
        Peer peer;
        int commands = 0;
        while (!stop.load()) {
            if (!peer) {
                peer = server.try_accept();
                sched_yield();
                continue;
            }
            size_t len = 0;
            const char *frame = vkp_test_peer_try_read_frame(peer.get(), &len);
            if (vkp_test_peer_is_ended(peer.get()) || (frame && ++commands % 50 == 0)) {
                peer.reset();
            } else if (frame) {
                const std::string text(frame, len);
                const bool off = text.find("UNSUBSCRIBE") != std::string::npos;
                const std::string name = text.substr(text.rfind('$'));
                const std::string answer =
                    text.find("HELLO") != std::string::npos
                        ? std::string(hello_reply)
                        : ">3\r\n" + bulk(off ? "unsubscribe" : "subscribe") + name + ":1\r\n";
                (void)vkp_test_peer_send(peer.get(), answer.data(), answer.size());
            } else {
                sched_yield();
            }
        }
    });
    std::atomic<int> wrong{0};
    std::atomic<int> told{0};
    std::vector<std::thread> threads;
    for (int t = 0; t < 3; t++) {
        threads.emplace_back([&, t] {
            for (int i = 0; i < 200; i++) {
                const std::string name = "c" + std::to_string((t + i) % 4);
                const vkp_str text = {name.data(), name.size()};
                const vkp_status on = vkp_client_subscribe_then(
                    client, VKP_SUB_CHANNEL, text,
                    [](void *user, vkp_status, vkp_str) {
                        static_cast<std::atomic<int> *>(user)->fetch_add(1);
                    },
                    &told);
                const vkp_status off = vkp_client_unsubscribe(client, VKP_SUB_CHANNEL, text);
                if (on != VKP_OK || off != VKP_OK) {
                    wrong.fetch_add(1);
                }
            }
        });
    }
    for (std::thread &one : threads) {
        one.join();
    }
    vkp_test_wait_until("all outcomes", [&] { return told.load() == 600; });
    CHECK(wrong.load() == 0);
    stop.store(true);
    fake.join();
    thread.stop();
    // Nothing is wanted any more: whatever happened before, the next connection asks for nothing.
    server.close();
    server.open();
    vkp_test_run_until(loop, "the end of the old connection",
                       [&] { return client.state() != VKP_CLIENT_READY; });
    Peer peer = server.greet(loop, client);
    Question fence(client, {"FENCE"});
    CHECK(heard(loop, peer) == wire({"FENCE"}));
}

// ---------------------------------------------------------------------------------------------
// Memory

TEST_CASE("client: opened without memory, it is not there", "[client][faults]")
{
    FakeServer server;
    vkp_client_config config = server.config();
    config.username = vkp_str_of("u");
    config.password = vkp_str_of("p");
    config.name = vkp_str_of("n");
    bool opened = false;
    for (uint64_t k = 1; !opened; k++) {
        REQUIRE(k < 100);
        Loop loop;
        vkp_client *client = nullptr;
        vkp_test_env_fault(&loop.test, VKP_TEST_FAULT_ONCE, k);
        const vkp_status status = vkp_client_open(loop, &config, &client);
        opened = vkp_test_env_failures(&loop.test) == 0;
        vkp_test_env_fault(&loop.test, VKP_TEST_FAULT_NONE, 0);
        if (status != VKP_OK) {
            REQUIRE(status == VKP_ERR_NOMEM);
            REQUIRE(client == nullptr);
            continue;
        }
        // It says OK: then it works.
        Peer peer = server.accept(loop);
        vkp_test_run_until(loop, "a greeting", [&] {
            size_t len = 0;
            if (vkp_test_peer_try_read_frame(peer.get(), &len)) {
                return true;
            }
            if (vkp_test_peer_is_ended(peer.get())) {
                peer = server.accept(loop);
            }
            return false;
        });
        CHECK(vkp_loop_get_deadline_ns(loop) != VKP_FOREVER); // and will not wait for ever
        vkp_client_unref(client);
    }
}

TEST_CASE("client: each allocation of a life may fail, and it goes on or says so",
          "[client][faults]")
{
    const vkp_test_fault fault = GENERATE(VKP_TEST_FAULT_ONCE, VKP_TEST_FAULT_EVERY);
    bool finished = false;
    for (uint64_t k = fault == VKP_TEST_FAULT_ONCE ? 1 : 3; !finished; k++) {
        REQUIRE(k < 400);
        INFO("k " << k);
        Loop loop;
        FakeServer server;
        Client client(loop, server.config());
        Peer peer;
        int questions = 0;
        int answers = 0;
        int dones = 0;
        int told = 0;
        bool confirmed[2] = {false, false};
        Question question[2];
        Sending sending;
        Done done;
        sending.hook = [&] { answers++; };
        done.hook = [&] { told++; };
        vkp_test_env_fault(&loop.test, fault, k);
        bool wanted[2];
        wanted[0] = vkp_client_subscribe(client, VKP_SUB_CHANNEL, vkp_str_of("c0")) == VKP_OK;
        wanted[1] = done.subscribe(client, "c1") == VKP_OK;
        dones += wanted[1] ? 1 : 0;
        bool slot[2];
        for (int i = 0; i < 2; i++) {
            slot[i] = question[i].send(client, {"ASK"}) == VKP_OK;
        }
        questions += sending.send(client, wire({"ASK"}), 1) == VKP_OK ? 1 : 0;
        // The server does its part; what was accepted must come about, over however many
        // connections.
        vkp_test_run_until(loop, "everything that was accepted", [&] {
            if (fault == VKP_TEST_FAULT_EVERY && vkp_test_env_failures(&loop.test) > 100) {
                vkp_test_env_fault(&loop.test, VKP_TEST_FAULT_NONE, 0);
            }
            if (!peer) {
                peer = server.try_accept();
                return false;
            }
            size_t len = 0;
            const char *frame = vkp_test_peer_try_read_frame(peer.get(), &len);
            if (!frame && vkp_test_peer_is_ended(peer.get())) {
                peer.reset();
                confirmed[0] = confirmed[1] = false;
                return false;
            }
            if (frame) {
                const std::string text(frame, len);
                if (text == wire({"HELLO", "3"})) {
                    vkp_test_peer_send_text(peer.get(), hello_reply);
                } else if (text == wire({"ASK"})) {
                    vkp_test_peer_send_text(peer.get(), "+OK\r\n");
                } else {
                    const std::string name = text.substr(text.size() - 4, 2);
                    const std::string answer = confirm("subscribe", name);
                    vkp_test_peer_send(peer.get(), answer.data(), answer.size());
                    confirmed[name == "c1" ? 1 : 0] = true;
                }
            }
            for (int i = 0; i < 2; i++) {
                if (slot[i] && question[i].try_recv() != VKP_ERR_EMPTY) {
                    slot[i] = false;
                }
            }
            return confirmed[0] == wanted[0] && confirmed[1] == wanted[1] && !slot[0] && !slot[1] &&
                   answers == questions && told == dones;
        });
        finished =
            vkp_test_env_failures(&loop.test) == 0 || (fault == VKP_TEST_FAULT_EVERY && k == 60);
        vkp_test_env_fault(&loop.test, VKP_TEST_FAULT_NONE, 0);
        CHECK(answers == questions);
        CHECK(told == dones);
    }
}
