// SPDX-License-Identifier: MIT
//
// The keys of an invalidation, one by one: the forms in which servers send them, frames that no
// server sends, and a real server that tracks what a client read.
#include "support/catch.hpp"
#include "support/fake_server.h"

#include <algorithm>
#include <random>
#include <string>
#include <vector>

namespace {

vkp_push push_of(const std::string &frame, vkp_push_kind kind = VKP_PUSH_INVALIDATE)
{
    vkp_push push = {};
    push.kind = kind;
    push.frame = vkp_bytes_static(frame.data(), frame.size());
    if (kind == VKP_PUSH_MESSAGE) {
        push.channel = vkp_str_of("__redis__:invalidate");
    }
    return push;
}

std::vector<std::string> keys_of(const vkp_push &push)
{
    std::vector<std::string> keys;
    size_t cursor = 0;
    vkp_str key = vkp_str_of("unchanged");
    while (vkp_push_get_key(&push, &cursor, &key)) {
        keys.emplace_back(vkp_test_view(key));
        key = vkp_str_of("unchanged");
    }
    CHECK(std::string(vkp_test_view(key)) == "unchanged");
    CHECK_FALSE(vkp_push_get_key(&push, &cursor, &key)); // again
    return keys;
}

using Keys = std::vector<std::string>;

struct Row {
    std::string frame;
    vkp_push_kind kind;
    Keys keys;
    bool flush;
};

// Collect the keys of each push that the client delivers; "flush" for one of all keys.
void collect(vkp_test_client &client, std::vector<std::string> *all)
{
    client.hook = [all](const vkp_push &push) {
        if (push.kind != VKP_PUSH_INVALIDATE && push.kind != VKP_PUSH_MESSAGE) {
            return;
        }
        if (vkp_push_is_flush(&push)) {
            all->emplace_back("flush");
        }
        for (const std::string &key : keys_of(push)) {
            all->push_back(key);
        }
    };
}

void until_keys(vkp_loop *loop, const std::vector<std::string> &all, size_t count)
{
    vkp_test_run_until(loop, "keys", [&] { return all.size() >= count; });
}

#define NEEDS_A_SERVER                                                         \
    if (!vkp_test_server_program()) {                                          \
        WARN("neither valkey-server nor redis-server is on PATH: not tested"); \
        return;                                                                \
    }

class Server {
  public:
    Server() : server_(vkp_test_server_open(options()))
    {
    }
    ~Server()
    {
        vkp_test_server_close(server_);
    }
    Server(const Server &) = delete;
    Server &operator=(const Server &) = delete;
    vkp_client_config config() const
    {
        vkp_client_config config = {};
        config.address = vkp_str_of(vkp_test_server_unix(server_));
        return config;
    }
    Peer peer() const
    {
        return Peer(vkp_test_peer_open(vkp_test_server_unix(server_)));
    }

  private:
    static const char *const *options()
    {
        static const char *const none[] = {nullptr};
        return none;
    }
    vkp_test_server *server_;
};

template <typename... Words>
std::string ask(const Peer &peer, const Words &...words)
{
    return vkp_test_ask(peer.get(), words...);
}

} // namespace

TEST_CASE("push keys: the forms in which servers send them", "[push]")
{
    const std::string binary("a\0\r\n$3\r\n", 8);
    const std::string head = ">2\r\n$10\r\ninvalidate\r\n";
    const std::string resp2 = "*3\r\n$7\r\nmessage\r\n$20\r\n__redis__:invalidate\r\n";
    const vkp_push_kind keys = VKP_PUSH_INVALIDATE;
    const vkp_push_kind message = VKP_PUSH_MESSAGE;
    const std::vector<Row> rows = {
        {head + "*1\r\n$3\r\nfoo\r\n", keys, {"foo"}, false},
        {head + "*3\r\n$1\r\na\r\n$0\r\n\r\n$2\r\nbc\r\n", keys, {"a", "", "bc"}, false},
        {head + "*1\r\n" + bulk(binary), keys, {binary}, false},
        {head + "*0\r\n", keys, {}, false},
        {head + "_\r\n", keys, {}, true},
        {head + "*-1\r\n", keys, {}, true},
        {head + "$-1\r\n", keys, {}, true},
        {">2\r\n+invalidate\r\n*2\r\n+a\r\n$1\r\nb\r\n", keys, {"a", "b"}, false},
        {"*2\r\n$10\r\ninvalidate\r\n*2\r\n$1\r\na\r\n$1\r\nb\r\n", keys, {"a", "b"}, false},
        {"*2\r\n$10\r\ninvalidate\r\n*-1\r\n", keys, {}, true},
        {resp2 + "*2\r\n$1\r\na\r\n$1\r\nb\r\n", message, {"a", "b"}, false},
        {resp2 + "*-1\r\n", message, {}, true},
        {resp2 + "$-1\r\n", message, {}, true},
        {">3\r\n$7\r\nmessage\r\n$20\r\n__redis__:invalidate\r\n_\r\n", message, {}, true},
        // A program published there: no keys.
        {resp2 + "$5\r\nhello\r\n", message, {}, false},
        // Attributes before the push, before an element, before a key; a push that is no element.
        {"|1\r\n+k\r\n*1\r\n:1\r\n" + head + "*1\r\n$1\r\na\r\n", keys, {"a"}, false},
        {">2\r\n|1\r\n+k\r\n+v\r\n+invalidate\r\n|1\r\n+k\r\n+v\r\n*1\r\n|1\r\n+k\r\n+v\r\n+a\r\n",
         keys,
         {"a"},
         false},
        {head + "*2\r\n$1\r\na\r\n>3\r\n+message\r\n+c\r\n+p\r\n$1\r\nb\r\n",
         keys,
         {"a", "b"},
         false},
        {head + ">3\r\n+message\r\n+c\r\n+p\r\n*1\r\n$1\r\na\r\n", keys, {"a"}, false},
        // What is no string is no key.
        {head + "*6\r\n:1\r\n$1\r\na\r\n_\r\n$-1\r\n*1\r\n$1\r\nx\r\n$1\r\nb\r\n",
         keys,
         {"a", "b"},
         false},
    };
    for (const Row &row : rows) {
        INFO(row.frame);
        const vkp_push push = push_of(row.frame, row.kind);
        CHECK(keys_of(push) == row.keys);
        CHECK(vkp_push_is_flush(&push) == row.flush);
    }
}

TEST_CASE("push keys: other pushes have none", "[push]")
{
    const std::string frame = ">2\r\n$10\r\ninvalidate\r\n*1\r\n$3\r\nfoo\r\n";
    const std::string flush = ">2\r\n$10\r\ninvalidate\r\n_\r\n";
    for (int kind = 0; kind <= VKP_PUSH_LAGGED; kind++) {
        INFO(kind);
        const bool mine = kind == VKP_PUSH_INVALIDATE;
        vkp_push push = push_of(frame, static_cast<vkp_push_kind>(kind));
        push.channel = vkp_str_of("__redis__:invalidated");
        CHECK(keys_of(push) == (mine ? Keys{"foo"} : Keys{}));
        push.frame = vkp_bytes_static(flush.data(), flush.size());
        CHECK(vkp_push_is_flush(&push) == mine);
    }
    // No frame: vkp_push_from_value.
    const vkp_push empty = push_of("");
    CHECK(keys_of(empty).empty());
    CHECK_FALSE(vkp_push_is_flush(&empty));
    const vkp_push none = {};
    CHECK(keys_of(none).empty());
}

TEST_CASE("push keys: no frame and no cursor is read beyond its end", "[push]")
{
    const std::vector<std::string> frames = {
        "|1\r\n+k\r\n*1\r\n:1\r\n>2\r\n$10\r\ninvalidate\r\n*3\r\n$1\r\na\r\n|1\r\n+k\r\n+v\r\n"
        "$12\r\nabcdefghijkl\r\n>2\r\n+invalidate\r\n*1\r\n+z\r\n+simple\r\n",
        ">2\r\n$10\r\ninvalidate\r\n*-1\r\n", ">2\r\n$10\r\ninvalidate\r\n_\r\n"};
    const auto all = [](const std::string &bytes, size_t cursor) {
        // Bytes of exactly this size, for the sanitizer.
        const std::vector<char> exact(bytes.begin(), bytes.end());
        vkp_push push = {};
        push.kind = VKP_PUSH_INVALIDATE;
        push.frame = vkp_bytes_static(exact.data(), exact.size());
        (void)vkp_push_is_flush(&push);
        vkp_str key = {nullptr, 0};
        size_t count = 0;
        for (; vkp_push_get_key(&push, &cursor, &key); count++) {
            const char *end = exact.data() + exact.size();
            if (count > bytes.size() || key.ptr < exact.data() || key.ptr + key.len > end) {
                return false;
            }
        }
        return true;
    };
    std::mt19937 random(11);
    bool good = true;
    for (const std::string &frame : frames) {
        for (size_t len = 0; len <= frame.size(); len++) { // cut
            good = good && all(frame.substr(0, len), 0);
        }
        for (size_t cursor = 0; cursor <= frame.size() + 2; cursor++) {
            good = good && all(frame, cursor);
        }
        good = good && all(frame, SIZE_MAX);
        for (int round = 0; round < 20000; round++) {
            std::string broken = frame;
            for (unsigned n = random() % 3 + 1; n > 0; n--) {
                broken[random() % broken.size()] = "$*>|+-_%:0129\r\nx"[random() % 16];
            }
            good = good && all(broken, 0) && all(broken, random() % broken.size());
        }
    }
    CHECK(good);
}

TEST_CASE("push keys: many", "[push]")
{
    const size_t count = 200000;
    std::string frame = ">2\r\n$10\r\ninvalidate\r\n*" + std::to_string(count) + "\r\n";
    for (size_t i = 0; i < count; i++) {
        frame += bulk("key:" + std::to_string(i));
    }
    const vkp_push push = push_of(frame);
    const Keys keys = keys_of(push);
    REQUIRE(keys.size() == count);
    CHECK(keys.front() == "key:0");
    CHECK(keys.back() == "key:199999");
}

TEST_CASE("push keys: what a client delivers", "[push][client]")
{
    Loop loop;
    FakeServer server;
    Client client(loop, server.config());
    Keys keys;
    collect(client, &keys);
    Peer peer = server.greet(loop, client);
    say(peer, ">2\r\n$10\r\ninvalidate\r\n*2\r\n$1\r\na\r\n$1\r\nb\r\n");
    until_keys(loop, keys, 2);
    // Inside a reply, as servers before 7.0 write it.
    Question question(client, {"MGET", "x", "y"});
    CHECK(heard(loop, peer) == wire({"MGET", "x", "y"}));
    say(peer, "*2\r\n+1\r\n>2\r\n$10\r\ninvalidate\r\n*1\r\n$1\r\nc\r\n+2\r\n");
    CHECK(question.text_on(loop) == "[1 2]");
    say(peer, ">2\r\n$10\r\ninvalidate\r\n_\r\n");
    until_keys(loop, keys, 4);
    CHECK(keys == Keys{"a", "b", "c", "flush"});
}

TEST_CASE("push keys: a real server that tracks what was read", "[push][client]")
{
    NEEDS_A_SERVER
    Server server;
    Loop loop;
    const vkp_str tracking[] = {vkp_str_of("CLIENT"), vkp_str_of("TRACKING"), vkp_str_of("ON")};
    vkp_client_setup setup = {};
    setup.argc = 3;
    setup.argv = tracking;
    setup.expect = vkp_str_of("OK");
    vkp_client_config config = server.config();
    config.setup = &setup;
    config.setup_count = 1;
    Client client(loop, config);
    Keys keys;
    collect(client, &keys);
    until_state(loop, client, VKP_CLIENT_READY);
    Peer other = server.peer();
    const std::string odd("k \r\n");
    CHECK(ask(other, "SET", odd, "1") == "+OK\r\n");
    vkp_oneshot slot;
    vkp_reply *reply = nullptr;
    REQUIRE(vkp_client_commandf(client, &slot, "MGET plain %b", odd.data(), odd.size()) == VKP_OK);
    vkp_test_run_until(loop, "a reply",
                       [&] { return vkp_oneshot_try_recv(&slot, &reply) == VKP_OK; });
    char text[64];
    CHECK(vkp_value_get_text(vkp_reply_get_value(reply), text, sizeof text) == 11);
    CHECK(std::string(text) == "[null, \"1\"]");
    vkp_reply_unref(reply);
    CHECK(ask(other, "SET", "plain", "2") == "+OK\r\n");
    until_keys(loop, keys, 1);
    CHECK(ask(other, "DEL", odd) == ":1\r\n");
    until_keys(loop, keys, 2);
    CHECK(ask(other, "FLUSHALL") == "+OK\r\n");
    until_keys(loop, keys, 3);
    CHECK(keys == Keys{"plain", odd, "flush"});
}

TEST_CASE("push keys: a real server sends many keys at once", "[push][client]")
{
    NEEDS_A_SERVER
    Server server;
    Loop loop;
    const vkp_str tracking[] = {vkp_str_of("CLIENT"), vkp_str_of("TRACKING"), vkp_str_of("ON"),
                                vkp_str_of("BCAST"),  vkp_str_of("PREFIX"),   vkp_str_of("user:")};
    vkp_client_setup setup = {};
    setup.argc = 6;
    setup.argv = tracking;
    setup.expect = vkp_str_of("OK");
    vkp_client_config config = server.config();
    config.setup = &setup;
    config.setup_count = 1;
    Client client(loop, config);
    Keys keys;
    collect(client, &keys);
    until_state(loop, client, VKP_CLIENT_READY);
    Peer other = server.peer();
    std::vector<std::string> words = {"MSET"};
    Keys expected;
    for (int i = 0; i < 5000; i++) {
        expected.push_back("user:" + std::to_string(i));
        words.push_back(expected.back());
        words.emplace_back("v");
    }
    const std::string command = wire(words);
    REQUIRE(vkp_test_peer_send(other.get(), command.data(), command.size()));
    until_keys(loop, keys, expected.size());
    std::sort(keys.begin(), keys.end());
    std::sort(expected.begin(), expected.end());
    CHECK((keys == expected));
    CHECK(client.count(VKP_PUSH_INVALIDATE) < 100);
}

TEST_CASE("push keys: a RESP2 client receives them by its subscription", "[push][client]")
{
    NEEDS_A_SERVER
    Server server;
    Loop loop;
    vkp_client_config config = server.config();
    config.protocol = 2;
    Client client(loop, config);
    Keys keys;
    collect(client, &keys);
    until_state(loop, client, VKP_CLIENT_READY);
    Question id(client, {"CLIENT", "ID"});
    const std::string redirect = id.text_on(loop);
    client.subscribe("__redis__:invalidate");
    vkp_test_run_until(loop, "a subscription",
                       [&] { return client.count(VKP_PUSH_SUBSCRIBED) == 1; });
    Peer reader = server.peer();
    CHECK(ask(reader, "CLIENT", "TRACKING", "ON", "REDIRECT", redirect) == "+OK\r\n");
    CHECK(ask(reader, "GET", "k") == "$-1\r\n");
    Peer writer = server.peer();
    CHECK(ask(writer, "SET", "k", "1") == "+OK\r\n");
    until_keys(loop, keys, 1);
    CHECK(ask(writer, "FLUSHALL") == "+OK\r\n");
    until_keys(loop, keys, 2);
    CHECK(keys == Keys{"k", "flush"});
}
