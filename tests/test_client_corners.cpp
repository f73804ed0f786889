// SPDX-License-Identifier: MIT
//
// Corners of the client that a review found wrong: each states what is right.
#include "support/catch.hpp"
#include "support/fake_server.h"
#include <string>
#include <vector>
namespace {
const char greeting[] = "%2\r\n+proto\r\n:3\r\n+id\r\n:77\r\n";
std::string push2(const std::vector<std::string> &parts)
{
    std::string text = "*" + std::to_string(parts.size()) + "\r\n";
    for (auto &p : parts)
        text += bulk(p);
    return text;
}
std::string confirm2(const std::string &verb, const std::string &name, int count)
{
    return "*3\r\n" + bulk(verb) + bulk(name) + ":" + std::to_string(count) + "\r\n";
}
class Watched {
  public:
    explicit Watched(vkp_client_config (*change)(vkp_client_config) = nullptr, bool sub = true)
        : loop(&vkp_backend_null, 0),
          client(loop, change ? change(server.config()) : server.config())
    {
        peer = greet();
        if (sub) {
            client.subscribe("c");
            CHECK(heard(loop, peer) == wire({"SUBSCRIBE", "c"}));
            say(peer, confirm("subscribe", "c"));
            until_events(loop, client, 2);
            client.events.clear();
        } else
            until_state(loop, client, VKP_CLIENT_READY);
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
};
// RESP2 client, "a" held
class Two {
  public:
    Two() : loop(&vkp_backend_null, 0), client(loop, cfg())
    {
        peer = server.accept(loop);
        CHECK(heard(loop, peer) == wire({"PING"}));
        say(peer, "+PONG\r\n");
        until_state(loop, client, VKP_CLIENT_READY);
        client.subscribe("a");
        CHECK(heard(loop, peer) == wire({"CLIENT", "ID"}));
        CHECK(heard(loop, peer) == wire({"SUBSCRIBE", "a"}));
        say(peer, "-ERR unknown command\r\n" + confirm2("subscribe", "a", 1));
        until_events(loop, client, 2);
        client.events.clear();
    }
    vkp_client_config cfg()
    {
        auto c = server.config();
        c.protocol = 2;
        return c;
    }
    Loop loop;
    FakeServer server;
    Client client;
    Peer peer;
};
void rounds(vkp_loop *loop, int n = 20)
{
    for (int i = 0; i < n; i++)
        (void)!vkp_loop_run_once(loop, 0);
}
} // namespace

TEST_CASE("corner: RESP2: a message of a name that the server does not let go is no reply",
          "[client]")
{
    Two with;
    with.client.unsubscribe("a");
    CHECK(heard(with.loop, with.peer) == wire({"UNSUBSCRIBE", "a"}));
    std::string fence = heard(with.loop, with.peer);
    std::string token = fence.substr(fence.find("vkp-fence"), 26);
    say(with.peer, "-BUSY a script\r\n*2\r\n$4\r\npong\r\n" + bulk(token));
    say(with.peer, push2({"message", "a", "m"}));
    rounds(with.loop);
    INFO(with.client.history());
    INFO(with.client.error());
    CHECK(with.client.count(VKP_PUSH_DISCONNECTED) == 0);
}

TEST_CASE("corner: RESP2: a message while the last name leaves is no reply to a heartbeat",
          "[client]")
{
    Two with;
    CHECK(heard(with.loop, with.peer) == wire({"PING"})); // 15 s later: the heartbeat
    with.client.unsubscribe("a");
    CHECK(heard(with.loop, with.peer) == wire({"UNSUBSCRIBE", "a"}));
    std::string fence = heard(with.loop, with.peer);
    std::string token = fence.substr(fence.find("vkp-fence"), 26);
    say(with.peer, push2({"message", "a", "m"}) + "*2\r\n$4\r\npong\r\n$0\r\n\r\n" +
                       push2({"message", "a", "m2"}) + confirm2("unsubscribe", "a", 0) +
                       bulk(token));
    rounds(with.loop);
    INFO(with.client.history());
    INFO(with.client.error());
    CHECK(with.client.count(VKP_PUSH_DISCONNECTED) == 0);
}

TEST_CASE("corner: the fence is understood by a server that wants an argument to HELLO", "[client]")
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
    (void)heard(loop, peer);
    CHECK(heard(loop, peer) == wire({"HELLO", "3"})); // 6.0 refuses HELLO alone
    say(peer, confirm("unsubscribe", "c", 0) + hello_reply);
    rounds(loop);
    Question q(client, {"GET", "k"});
    (void)heard(loop, peer);
    say(peer, "+v\r\n");
    CHECK(q.text_on(loop) == "v");
    INFO(client.error());
    CHECK(client.count(VKP_PUSH_DISCONNECTED) == 0);
}

TEST_CASE("corner: redis 6.0 asks the default user's rights about HELLO: AUTH goes first",
          "[client]")
{
    const bool user_may = GENERATE(true, false);
    const std::string refusal =
        "-NOPERM this user has no permissions to run the 'hello' command\r\n";
    Loop loop;
    FakeServer server;
    auto c = server.config();
    c.username = vkp_str_of("ann");
    c.password = vkp_str_of("pw");
    Client client(loop, c);
    Peer peer = server.accept(loop);
    CHECK(heard(loop, peer) == wire({"HELLO", "3", "AUTH", "ann", "pw"}));
    say(peer, refusal);
    CHECK(heard(loop, peer) == wire({"AUTH", "ann", "pw"}));
    CHECK(heard(loop, peer) == wire({"HELLO", "3"}));
    say(peer, "+OK\r\n" + (user_may ? hello_reply : refusal));
    if (!user_may) {
        CHECK(heard(loop, peer) == wire({"AUTH", "ann", "pw"}));
        CHECK(heard(loop, peer) == wire({"PING"}));
        say(peer, "+OK\r\n-NOPERM no ping\r\n");
    }
    until_state(loop, client, VKP_CLIENT_READY);
    CHECK(vkp_client_get_protocol(client) == (user_may ? 3 : 2));
    CHECK(client.history() == "connected");
}

TEST_CASE("corner: redis 6.0: a name is left where HELLO is refused", "[client]")
{
    Loop loop;
    FakeServer server;
    Client client(loop, server.config());
    Peer peer = server.accept(loop);
    (void)heard(loop, peer);
    say(peer, "%3\r\n$7\r\nversion\r\n$6\r\n6.0.16\r\n$5\r\nproto\r\n:3\r\n"
              "$2\r\nid\r\n:7\r\n");
    client.subscribe("c");
    CHECK(heard(loop, peer) == wire({"SUBSCRIBE", "c"}));
    say(peer, confirm("subscribe", "c"));
    until_events(loop, client, 2);
    client.unsubscribe("c");
    CHECK(heard(loop, peer) == wire({"UNSUBSCRIBE", "c"}));
    const std::string fence = heard(loop, peer);
    CHECK(fence.find("HELLO") == std::string::npos);
    const std::string token = fence.substr(fence.find("vkp-fence"), 26);
    say(peer, confirm("unsubscribe", "c", 0) + "-ERR unknown command `" + token +
                  "`, with args beginning with: \r\n");
    until_events(loop, client, 3);
    Question q(client, {"GET", "k"});
    CHECK(heard(loop, peer) == wire({"GET", "k"}));
    say(peer, "+v\r\n");
    CHECK(q.text_on(loop) == "v");
    CHECK(client.history() == "connected, subscribed c, unsubscribed c");
}

TEST_CASE("corner: an error to HELLO is not why a connection that worked ends", "[client]")
{
    Loop loop;
    FakeServer server;
    Client client(loop, server.config());
    Peer peer = server.accept(loop);
    (void)heard(loop, peer);
    say(peer, "-ERR unknown command `HELLO`, with args beginning with: `3`, \r\n");
    CHECK(heard(loop, peer) == wire({"PING"}));
    say(peer, "+PONG\r\n");
    until_state(loop, client, VKP_CLIENT_READY);
    peer.reset();
    until_events(loop, client, 2);
    CHECK(client.history() == "connected, disconnected");
    CHECK(client.events[1].payload == "the connection was lost");
}

TEST_CASE("corner: a server that answered HELLO once has RESP3, however often it hangs up",
          "[client]")
{
    Loop loop(&vkp_backend_null, 0);
    FakeServer server;
    Client client(loop, server.config());
    Peer peer = server.greet(loop, client);
    peer.reset();
    for (int i = 0; i < 40; i++) { // a proxy whose backend restarts
        peer = server.accept(loop);
        CHECK(heard(loop, peer) == wire({"HELLO", "3"}));
        peer.reset();
    }
    peer = server.greet(loop, client);
    CHECK(vkp_client_get_protocol(client) == 3);
}

TEST_CASE("corner: a name that no server accepts is INVALID", "[client]")
{
    Loop loop;
    FakeServer server;
    vkp_client_config config = server.config();
    config.name = GENERATE(vkp_str_of("my app"), vkp_str_of("line\nfeed"), vkp_str_of("\xc3\xa4"));
    vkp_client *client = nullptr;
    CHECK(vkp_client_open(loop, &config, &client) == VKP_ERR_INVALID);
}

TEST_CASE("corner: RESP2: a server that does not say who we are keeps us waiting, not lost",
          "[client]")
{
    Loop loop(&vkp_backend_null, 0);
    FakeServer server;
    vkp_client_config config = server.config();
    config.protocol = 2;
    config.heartbeat_ms = VKP_OFF;
    Client client(loop, config);
    Peer peer = server.accept(loop);
    CHECK(heard(loop, peer) == wire({"PING"}));
    say(peer, "+PONG\r\n");
    until_state(loop, client, VKP_CLIENT_READY);
    Question question(client, {"GET", "k"});
    CHECK(heard(loop, peer) == wire({"GET", "k"}));
    for (int i = 0; i < 5; i++) { // CLIENT PAUSE of some seconds
        Peer probe = server.accept(loop);
        CHECK(heard(loop, probe) == wire({"PING"}));
        say(probe, "+PONG\r\n");
        CHECK(heard(loop, probe) == wire({"PING"}));
        say(probe, "+PONG\r\n");
        hung_up(loop, probe);
    }
    say(peer, "+v\r\n");
    CHECK(question.text_on(loop) == "v");
    CHECK(client.history() == "connected");
}

TEST_CASE("corner: a push inside a push is delivered too", "[client]")
{
    Loop loop;
    FakeServer server;
    Client client(loop, server.config());
    Peer peer = server.greet(loop, client);
    const std::string inner = push({"message", "c", "inside"});
    const std::string attribute = "|1\r\n+a\r\n*1\r\n" + inner + ":1\r\n";
    SECTION("an element stands behind it")
    {
        say(peer, ">2\r\n$10\r\ninvalidate\r\n*1\r\n" + inner + "$1\r\nk\r\n");
        until_events(loop, client, 3);
        CHECK(client.events[1].payload == "inside");
        CHECK(client.events[2].kind == VKP_PUSH_INVALIDATE);
    }
    SECTION("in an attribute")
    {
        say(peer, attribute + push({"message", "c", "outside"}));
        until_events(loop, client, 3);
        CHECK(client.events[1].payload == "inside");
        CHECK(client.events[2].payload == "outside");
    }
    INFO(client.error());
    CHECK(client.history().find("disconnected") == std::string::npos);
}

TEST_CASE("corner: an option that stands before BLOCK does not hide it", "[client]")
{
    Loop loop;
    FakeServer server;
    Client client(loop, server.config());
    for (const std::vector<std::string> &command :
         {std::vector<std::string>{"XREADGROUP", "GROUP", "g", "c", "CLAIM", "100", "BLOCK", "0",
                                   "STREAMS", "x", ">"},
          std::vector<std::string>{"XREAD", "NEWER", "BLOCK", "0", "STREAMS", "x", "0"}}) {
        std::vector<vkp_str> argv;
        for (const std::string &word : command) {
            argv.push_back(vkp_str{word.data(), word.size()});
        }
        vkp_oneshot slot;
        CHECK(vkp_client_command_argv(client, &slot, argv.size(), argv.data()) == VKP_ERR_REFUSED);
    }
}

TEST_CASE("corner: RESP2: a name is left where PING is refused", "[client]")
{
    Loop loop;
    FakeServer server;
    auto c = server.config();
    c.protocol = 2;
    Client client(loop, c);
    Peer peer = server.accept(loop);
    CHECK(heard(loop, peer) == wire({"PING"}));
    say(peer, "-NOPERM no ping\r\n");
    until_state(loop, client, VKP_CLIENT_READY);
    client.subscribe("a");
    client.subscribe("b");
    CHECK(heard(loop, peer) == wire({"CLIENT", "ID"}));
    (void)heard(loop, peer);
    (void)heard(loop, peer);
    say(peer, ":7\r\n" + confirm2("subscribe", "a", 1) + confirm2("subscribe", "b", 2));
    until_events(loop, client, 3);
    for (const char *name : {"a", "b"}) {
        client.unsubscribe(name);
        CHECK(heard(loop, peer) == wire({"UNSUBSCRIBE", name}));
        // A command that no server knows: its error repeats the name.
        const std::string fence = heard(loop, peer);
        const std::string token = fence.substr(fence.find("vkp-fence"), 26);
        say(peer, confirm2("unsubscribe", name, 0) + "-ERR unknown command '" + token +
                      "', with args beginning with: \r\n");
    }
    until_events(loop, client, 5);
    Question q(client, {"GET", "k"});
    CHECK(heard(loop, peer) == wire({"GET", "k"}));
    say(peer, "+v\r\n");
    CHECK(q.text_on(loop) == "v");
    CHECK(client.count(VKP_PUSH_DISCONNECTED) == 0);
}

TEST_CASE("corner: a callback that closes the client: the others are called inside the close",
          "[client]")
{
    Loop loop;
    FakeServer server;
    Client client(loop, server.config());
    Peer peer = server.greet(loop, client);
    Done a, b;
    bool closed = false;
    int after = 0;
    REQUIRE(a.subscribe(client, "a") == VKP_OK);
    REQUIRE(b.subscribe(client, "b") == VKP_OK);
    (void)heard(loop, peer);
    (void)heard(loop, peer);
    a.hook = [&] {
        vkp_client_close(client);
        closed = true;
    };
    b.hook = [&] { after += closed ? 1 : 0; };
    say(peer, confirm("subscribe", "a"));
    vkp_test_run_until(loop, "dones", [&] { return a.calls == 1 && b.calls == 1; });
    CHECK(after == 0);
}

TEST_CASE("corner: a heartbeat that meets a busy server does not end the audits", "[client]")
{
    Watched with;
    CHECK(heard(with.loop, with.peer) == wire({"CLIENT", "INFO"}));
    say(with.peer, "-BUSY Redis is busy running a script\r\n");
    CHECK(heard(with.loop, with.peer) == wire({"CLIENT", "INFO"}));
}

TEST_CASE("corner: a push in the attribute before a reply is delivered", "[client]")
{
    Watched with;
    Question q(with.client, {"X"});
    (void)heard(with.loop, with.peer);
    say(with.peer, "|1\r\n+k\r\n" + push({"message", "c", "m"}) + ":1\r\n+v\r\n");
    CHECK(q.text_on(with.loop) == "v");
    CHECK(with.client.history() == "message c m");
}

TEST_CASE("corner: a push in a reply that is skipped does not end it too early", "[client]")
{
    Watched with;
    Question q(with.client, {"X"});
    (void)heard(with.loop, with.peer);
    say(with.peer, "*2\r\n(12x\r\n" + push({"message", "c", "m"}) + "+v\r\n");
    rounds(with.loop);
    INFO(with.client.error());
    CHECK(with.client.history() == "message c m");
}

TEST_CASE("corner: a push that is null shifts no reply", "[client]")
{
    Watched with;
    Question q(with.client, {"X"});
    (void)heard(with.loop, with.peer);
    say(with.peer, ">-1\r\n+v\r\n");
    CHECK(q.text_on(with.loop) == "v");
}

TEST_CASE("corner: a request that takes long to write is not overdue", "[client]")
{
    Sending s; // outlives the client
    Watched with;
    std::string big(20 << 20, 'x');
    REQUIRE(s.send(with.client, wire({"SET", "k", big}), 1) == VKP_OK);
    rounds(with.loop, 3);
    // the server reads slowly; the probe comes after 5 s
    Peer probe = with.greet();
    CHECK(heard(with.loop, probe) == wire({"PING"}));
    say(probe, "+PONG\r\n");
    (void)heard(with.loop, probe);
    say(probe, bulk("id=77 addr=x name= flags=N qbuf=1000000 qbuf-free=0 db=0 sub=1 omem=0\n"));
    rounds(with.loop);
    INFO(with.client.error());
    CHECK(with.client.count(VKP_PUSH_DISCONNECTED) == 0);
}

TEST_CASE("corner: a reply behind pushes that still arrive is not overdue", "[client]")
{
    Watched with;
    Question q(with.client, {"GET", "k"});
    (void)heard(with.loop, with.peer);
    Peer probe = with.greet();
    CHECK(heard(with.loop, probe) == wire({"PING"}));
    say(with.peer, push({"message", "c", "m"}));
    say(probe, "+PONG\r\n");
    (void)heard(with.loop, probe);
    say(with.peer, push({"message", "c", "m"}));
    say(probe,
        bulk("id=77 addr=x name= flags=P db=0 sub=1 qbuf=0 obl=16000 oll=900 omem=20000000\n"));
    rounds(with.loop);
    INFO(with.client.error());
    CHECK(with.client.count(VKP_PUSH_DISCONNECTED) == 0);
}

TEST_CASE("corner: a server that accepts and closes without a word is waited for with a bound",
          "[client]")
{
    Watched with;
    Question q(with.client, {"GET", "k"});
    (void)heard(with.loop, with.peer);
    uint64_t asked = with.loop.now();
    int i = 0;
    for (; i < 400 && with.client.count(VKP_PUSH_DISCONNECTED) == 0; i++) {
        Peer probe = with.server.accept(with.loop);
        (void)heard(with.loop, probe);
        probe.reset();
        rounds(with.loop, 2);
    }
    INFO((with.loop.now() - asked) / ms << " ms later");
    CHECK(i < 400);
}

TEST_CASE("corner: a large reply is valid until its callback returns, after a close too",
          "[client]")
{
    Watched with(nullptr, false);
    static vkp_client *cl;
    cl = with.client;
    static size_t seen;
    seen = 0;
    std::string cmd = wire({"X"});
    vkp_bytes bytes;
    REQUIRE(vkp_bytes_copy(nullptr, cmd.data(), cmd.size(), &bytes) == VKP_OK);
    REQUIRE(vkp_client_send(
                with.client, &bytes, 1,
                [](void *, vkp_status, const vkp_value *value, const vkp_bytes *) {
                    if (!value)
                        return;
                    vkp_client_close(cl);
                    for (auto *at = vkp_value_get_first(value); at;
                         at = vkp_value_get_next(value, at))
                        seen++;
                },
                nullptr) == VKP_OK);
    vkp_bytes_unref(&bytes);
    (void)heard(with.loop, with.peer);
    std::string r = "*40000\r\n";
    for (int i = 0; i < 40000; i++)
        r += ":1\r\n";
    vkp_test_peer_send(with.peer.get(), r.data(), r.size() / 2);
    rounds(with.loop, 10);
    vkp_test_peer_send(with.peer.get(), r.data() + r.size() / 2, r.size() - r.size() / 2);
    vkp_test_run_until(with.loop, "seen", [&] { return seen > 0; });
    CHECK(seen == 40000);
}

TEST_CASE("corner: a gap begins before the first message that is missing, also in a loop that lags",
          "[client]")
{
    Loop loop;
    FakeServer server;
    Client client(loop, server.config());
    Peer peer = server.greet(loop, client);
    client.subscribe("c");
    (void)heard(loop, peer);
    say(peer, confirm("subscribe", "c"));
    until_events(loop, client, 2);
    client.events.clear();
    say(peer, push({"message", "c", "1"}));
    uint64_t lost_at = vkp_now_ns(); // here the server cuts the slow subscriber: message 2 is lost
    peer.reset();
    usleep(300000); // the program is busy
    peer = server.greet(loop);
    (void)confirm_asked(loop, peer);
    until_events(loop, client, 5);
    CHECK(client.history() == "message c 1, disconnected, reconnected, subscribed c, gap");
    CHECK(client.events[4].gap.from_ns <= lost_at);
}

TEST_CASE("corner: no memory before the first try: one connection at a time", "[client]")
{
    Loop loop(&vkp_backend_null, 0);
    FakeServer server;
    Client client(loop, server.config());
    client.subscribe("c");
    vkp_test_env_fault(&loop.test, VKP_TEST_FAULT_FROM, 1);
    loop.round();
    vkp_test_env_fault(&loop.test, VKP_TEST_FAULT_NONE, 0);
    INFO(client.error());
    Peer peer = server.accept(loop);
    CHECK(heard(loop, peer) == wire({"HELLO", "3"}));
    // never answered: the time limit ends the try
    hung_up(loop, peer);
    peer = server.greet(loop, client);
    CHECK(heard(loop, peer) == wire({"SUBSCRIBE", "c"}));
}

TEST_CASE("corner: a name that leaves when the link goes down is left", "[client]")
{
    Watched with;
    with.client.unsubscribe("c");
    (void)heard(with.loop, with.peer);
    with.peer.reset();
    Peer peer = with.greet();
    until_state(with.loop, with.client, VKP_CLIENT_READY);
    CHECK(with.client.history() == "disconnected, unsubscribed c, reconnected");
}

TEST_CASE("corner: a server that does not count is not asked again and again", "[client]")
{
    Watched with;
    for (int i = 0; i < 20; i++) {
        std::string f = heard(with.loop, with.peer);
        if (f == wire({"SUBSCRIBE", "c"}))
            say(with.peer, confirm("subscribe", "c"));
        else if (f == wire({"CLIENT", "INFO"}))
            say(with.peer, bulk("id=77 sub=0 psub=0\n"));
    }
    rounds(with.loop);
    CHECK(with.client.count(VKP_PUSH_GAP) == 3);
}

TEST_CASE("corner: no memory for a name: nothing is called after a close", "[client]")
{
    Watched with(nullptr, false);
    Done a, b;
    bool closed = false;
    REQUIRE(b.subscribe(with.client, "b") == VKP_OK);
    (void)heard(with.loop, with.peer);
    REQUIRE(a.subscribe(with.client, "a") == VKP_OK);
    b.hook = [&] {
        vkp_client_close(with.client);
        closed = true;
    };
    int after = 0;
    a.hook = [&] { after += closed; };
    for (uint64_t k = 1; k < 2; k++) {
        vkp_test_env_fault(&with.loop.test, VKP_TEST_FAULT_ONCE, k);
        rounds(with.loop, 3);
        vkp_test_env_fault(&with.loop.test, VKP_TEST_FAULT_NONE, 0);
    }
    INFO(with.client.history() << a.calls << b.calls);
    CHECK(closed);
    CHECK(after == 0);
}

TEST_CASE("corner: a server that does not say its role is no primary", "[client]")
{
    Loop loop;
    FakeServer server;
    auto c = server.config();
    c.protocol = 2;
    c.role = VKP_CLIENT_ROLE_PRIMARY;
    Client client(loop, c);
    Peer peer = server.accept(loop);
    CHECK(heard(loop, peer) == wire({"PING"}));
    say(peer, "+PONG\r\n");
    CHECK(heard(loop, peer) == wire({"ROLE"}));
    say(peer, "-NOPERM no role\r\n");
    rounds(loop);
    CHECK(client.state() != VKP_CLIENT_READY);
}

TEST_CASE("corner: HELLO may say the protocol as a text", "[client]")
{
    Loop loop;
    FakeServer server;
    Client client(loop, server.config());
    Peer peer = server.accept(loop);
    (void)heard(loop, peer);
    say(peer, "%1\r\n+proto\r\n$1\r\n3\r\n");
    until_state(loop, client, VKP_CLIENT_READY);
    CHECK(vkp_client_get_protocol(client) == 3);
    client.subscribe("c");
    (void)heard(loop, peer);
    say(peer, confirm("subscribe", "c"));
    until_events(loop, client, 2);
    client.unsubscribe("c");
    CHECK(heard(loop, peer) == wire({"UNSUBSCRIBE", "c"}));
    CHECK(heard(loop, peer) == wire({"HELLO", "3"})); // the fence
    say(peer, confirm("unsubscribe", "c", 0) + "%1\r\n+proto\r\n$1\r\n3\r\n");
    until_events(loop, client, 3);
    CHECK(client.history() == "connected, subscribed c, unsubscribed c");
}

TEST_CASE("corner: a null push as the last element of a reply that is skipped", "[client]")
{
    Watched with;
    Question q(with.client, {"X"});
    (void)heard(with.loop, with.peer);
    say(with.peer, "*2\r\n(12x\r\n>-1\r\n");
    CHECK(q.recv_on(with.loop) == VKP_ERR_CLOSED);
}

TEST_CASE("corner: a push in a reply that is skipped is delivered", "[client]")
{
    Watched with;
    Question q(with.client, {"X"});
    (void)heard(with.loop, with.peer);
    say(with.peer, "*2\r\n(12x\r\n" + push({"message", "c", "m"}) + "+v\r\n");
    CHECK(q.recv_on(with.loop) == VKP_ERR_CLOSED);
    rounds(with.loop);
    CHECK(with.client.history() == "message c m");
}

TEST_CASE("corner: an attribute before a push that is refused does not make it a reply", "[client]")
{
    Watched with;
    Question q(with.client, {"X"});
    (void)heard(with.loop, with.peer);
    say(with.peer, "|1\r\n+k\r\n:1\r\n>3\r\n$7\r\nmessage\r\n$1\r\nc\r\n(1x\r\n+v\r\n");
    vkp_status s = q.recv_on(with.loop);
    rounds(with.loop);
    INFO(with.client.history() << with.client.error());
    CHECK(s == VKP_ERR_CLOSED);
    CHECK(with.client.error() == "the server broke the protocol: not a big number");
}
