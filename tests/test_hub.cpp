// SPDX-License-Identifier: MIT
//
// Who is subscribed to what: counts and names, interest, what each member receives byte for byte,
// one encoding shared by all, pushes of a server passed on as they came, memory that fails.
#include "support/catch.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <unistd.h>

#include "support/support.h"

namespace {

vkp_str str(std::string_view text)
{
    return {text.data(), text.size()};
}

// Blocks the connections' writes, and counts them.
bool wire_blocked = false;
int wire_calls = 0;
int wire_ranges = 0;

const vkp_sys *wired()
{
    static const vkp_sys table = [] {
        vkp_sys copy = *vkp_sys_get_default();
        copy.send = [](int fd, const vkp_range *ranges, size_t count) -> int64_t {
            wire_calls++;
            wire_ranges += static_cast<int>(count);
            return wire_blocked ? -EAGAIN : vkp_sys_get_default()->send(fd, ranges, count);
        };
        return copy;
    }();
    wire_blocked = false;
    wire_calls = 0;
    wire_ranges = 0;
    return &table;
}

using Interest = std::tuple<int, std::string, bool>;

// A loop and a hub with separate accounts, which must be even at the end.
struct Hub {
    vkp_test_env loop_test;
    vkp_test_env test;
    vkp_loop *loop = nullptr;
    vkp_hub *hub = nullptr;
    std::vector<Interest> interest;

    Hub()
    {
        vkp_test_env_init(&loop_test);
        vkp_test_env_init(&test);
        loop_test.env.sys = wired();
        vkp_loop_config loop_config = {};
        loop_config.backend = &vkp_backend_null;
        loop_config.env = &loop_test.env;
        vkp_hub_config config = {};
        config.env = &test.env;
        config.user = this;
        config.on_interest = [](void *user, vkp_sub_kind kind, vkp_str name, bool added) {
            static_cast<Hub *>(user)->interest.emplace_back(kind, std::string(vkp_test_view(name)),
                                                            added);
        };
        if (vkp_loop_open(&loop_config, &loop) != VKP_OK || vkp_hub_open(&config, &hub) != VKP_OK) {
            vkp_test_fail("no hub");
        }
    }
    ~Hub()
    {
        vkp_hub_unref(hub);
        vkp_loop_close(loop);
        vkp_loop_unref(loop);
        if (std::uncaught_exceptions() == 0) {
            vkp_test_env_deinit(&test);
            vkp_test_env_deinit(&loop_test);
        }
    }
    Hub(const Hub &) = delete;
    Hub &operator=(const Hub &) = delete;
    operator vkp_hub *() const
    {
        return hub;
    }
    size_t publish(std::string_view channel, std::string_view payload,
                   vkp_sub_kind kind = VKP_SUB_CHANNEL) const
    {
        return vkp_hub_publish(hub, kind, str(channel), str(payload));
    }
    size_t members(std::string_view name, vkp_sub_kind kind = VKP_SUB_CHANNEL) const
    {
        return vkp_hub_get_members(hub, kind, str(name));
    }
    std::set<std::string> names(vkp_sub_kind kind) const
    {
        std::set<std::string> found;
        void *cursor = nullptr;
        vkp_str name;
        size_t steps = 0;
        while (vkp_hub_next_name(hub, kind, &cursor, &name)) {
            found.emplace(vkp_test_view(name));
            steps++;
        }
        if (steps != found.size()) {
            vkp_test_fail("the walk gave a name twice");
        }
        return found;
    }
    void round() const
    {
        if (vkp_loop_run_once(loop, 0) != VKP_OK) {
            vkp_test_fail("a round failed");
        }
    }
};

struct Member : vkp_hub_member {
    explicit Member(Hub &owner, int speaks, vkp_conn_config config = {})
        : vkp_hub_member(), hub(owner)
    {
        static const vkp_conn_ops ops = [] {
            vkp_conn_ops table = {};
            table.frame_len = vkp_resp_get_frame_len;
            return table;
        }();
        config.ops = &ops;
        config.loop_only = true;
        int fds[2];
        vkp_test_socket_pair(fds);
        if (vkp_conn_open(hub.loop, fds[0], &config, &conn) != VKP_OK) {
            vkp_test_fail("no connection");
        }
        fcntl(fds[1], F_SETFL, O_NONBLOCK);
        peer = fds[1];
        protocol = speaks;
    }
    ~Member()
    {
        vkp_hub_leave(hub, this);
        vkp_conn_close(conn);
        vkp_conn_unref(conn);
        close(peer);
    }
    Member(const Member &) = delete;
    Member &operator=(const Member &) = delete;
    vkp_status subscribe(std::string_view name, vkp_sub_kind kind = VKP_SUB_CHANNEL,
                         bool *added = nullptr)
    {
        return vkp_hub_subscribe(hub, this, kind, str(name), added);
    }
    bool unsubscribe(std::string_view name, vkp_sub_kind kind = VKP_SUB_CHANNEL)
    {
        return vkp_hub_unsubscribe(hub, this, kind, str(name));
    }
    bool has(std::string_view name, vkp_sub_kind kind = VKP_SUB_CHANNEL) const
    {
        return vkp_hub_is_subscribed(hub, this, kind, str(name));
    }
    // What came since the last time, after a round that writes it.
    std::string hear() const
    {
        hub.round();
        std::string text;
        char buffer[65536];
        for (ssize_t got; (got = read(peer, buffer, sizeof buffer)) > 0; hub.round()) {
            text.append(buffer, static_cast<size_t>(got));
        }
        return text;
    }

    Hub &hub;
    int peer;
};

std::string bulk(std::string_view text)
{
    return "$" + std::to_string(text.size()) + "\r\n" + std::string(text) + "\r\n";
}

std::string message(int protocol, std::string_view channel, std::string_view payload,
                    std::string_view kind = "message")
{
    return (protocol == 3 ? ">3\r\n" : "*3\r\n") + bulk(kind) + bulk(channel) + bulk(payload);
}

std::string pmessage(int protocol, std::string_view pattern, std::string_view channel,
                     std::string_view payload)
{
    return (protocol == 3 ? ">4\r\n" : "*4\r\n") + bulk("pmessage") + bulk(pattern) +
           bulk(channel) + bulk(payload);
}

// Frames of a text in no fixed order: patterns are delivered in the hub's own.
std::multiset<std::string> frames(const std::string &text)
{
    std::multiset<std::string> found;
    for (size_t at = 0; at < text.size();) {
        const size_t len = vkp_resp_get_frame_len(
            reinterpret_cast<const uint8_t *>(text.data()) + at, text.size() - at);
        if (len == 0) {
            vkp_test_fail("broken frames");
        }
        found.insert(text.substr(at, len));
        at += len;
    }
    return found;
}

} // namespace

TEST_CASE("hub: open and its arguments")
{
    vkp_hub *hub = nullptr;
    CHECK(vkp_hub_open(nullptr, nullptr) == VKP_ERR_INVALID);
    REQUIRE(vkp_hub_open(nullptr, &hub) == VKP_OK); // all defaults
    vkp_hub_member member = {};
    member.protocol = 3;
    CHECK(vkp_hub_subscribe(nullptr, &member, VKP_SUB_CHANNEL, str("a"), nullptr) ==
          VKP_ERR_INVALID);
    CHECK(vkp_hub_subscribe(hub, nullptr, VKP_SUB_CHANNEL, str("a"), nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_hub_subscribe(hub, &member, static_cast<vkp_sub_kind>(3), str("a"), nullptr) ==
          VKP_ERR_INVALID);
    if (sizeof(size_t) > 4) {
        const vkp_str huge = {"a", static_cast<size_t>(UINT64_C(5) << 30)};
        CHECK(vkp_hub_subscribe(hub, &member, VKP_SUB_CHANNEL, huge, nullptr) == VKP_ERR_LIMIT);
    }
    CHECK(vkp_hub_get_names(hub, VKP_SUB_CHANNEL) == 0);
    CHECK(vkp_hub_publish(hub, VKP_SUB_CHANNEL, str("a"), str("b")) == 0);
    vkp_hub_unref(hub);
    vkp_hub_unref(nullptr);
    vkp_test_env test;
    vkp_test_env_init(&test);
    vkp_hub_config config = {};
    config.env = &test.env;
    vkp_test_env_fault(&test, VKP_TEST_FAULT_ONCE, 1);
    hub = nullptr;
    CHECK(vkp_hub_open(&config, &hub) == VKP_ERR_NOMEM);
    CHECK(hub == nullptr);
    vkp_test_env_deinit(&test);
}

TEST_CASE("hub: subscribing twice is once, and each kind has names of its own")
{
    Hub hub;
    Member a(hub, 3);
    Member b(hub, 2);
    bool added = false;
    CHECK(a.subscribe("news", VKP_SUB_CHANNEL, &added) == VKP_OK);
    CHECK(added);
    CHECK(a.subscribe("news", VKP_SUB_CHANNEL, &added) == VKP_OK);
    CHECK_FALSE(added);
    CHECK(a.subscribe("news", VKP_SUB_PATTERN, &added) == VKP_OK);
    CHECK(added);
    CHECK(a.subscribe("news", VKP_SUB_SHARD) == VKP_OK);
    CHECK(a.subscribe("more") == VKP_OK);
    CHECK(b.subscribe("news", VKP_SUB_CHANNEL, &added) == VKP_OK);
    CHECK(added);
    CHECK(a.counts[VKP_SUB_CHANNEL] == 2);
    CHECK(a.counts[VKP_SUB_PATTERN] == 1);
    CHECK(a.counts[VKP_SUB_SHARD] == 1);
    CHECK(b.counts[VKP_SUB_CHANNEL] == 1);
    CHECK(hub.members("news") == 2);
    CHECK(hub.members("news", VKP_SUB_PATTERN) == 1);
    CHECK(hub.members("news", VKP_SUB_SHARD) == 1);
    CHECK(hub.members("nothing") == 0);
    CHECK(hub.names(VKP_SUB_CHANNEL) == std::set<std::string>{"news", "more"});
    CHECK(vkp_hub_get_names(hub, VKP_SUB_CHANNEL) == 2);
    CHECK(hub.names(VKP_SUB_PATTERN) == std::set<std::string>{"news"});
    CHECK(a.has("news"));
    CHECK(a.has("news", VKP_SUB_SHARD));
    CHECK_FALSE(b.has("news", VKP_SUB_SHARD));
    CHECK_FALSE(b.has("more"));
    CHECK_FALSE(b.has("nothing"));

    CHECK(a.unsubscribe("news"));
    CHECK_FALSE(a.unsubscribe("news"));
    CHECK_FALSE(b.unsubscribe("more"));
    CHECK_FALSE(b.unsubscribe("nothing"));
    CHECK_FALSE(b.unsubscribe("news", VKP_SUB_PATTERN));
    CHECK(a.counts[VKP_SUB_CHANNEL] == 1);
    CHECK(hub.members("news") == 1);
    CHECK(a.has("news", VKP_SUB_PATTERN));
    CHECK(hub.publish("news", "x") == 2); // b, and a's pattern

    vkp_hub_leave(hub, &a);
    vkp_hub_leave(hub, &a);
    CHECK(a.counts[VKP_SUB_CHANNEL] + a.counts[VKP_SUB_PATTERN] + a.counts[VKP_SUB_SHARD] == 0);
    CHECK(hub.names(VKP_SUB_CHANNEL) == std::set<std::string>{"news"});
    CHECK(hub.names(VKP_SUB_PATTERN).empty());
    CHECK(hub.names(VKP_SUB_SHARD).empty());
    CHECK(hub.publish("news", "y") == 1);
}

TEST_CASE("hub: interest is told when a name gets its first member and loses its last")
{
    Hub hub;
    Member a(hub, 3);
    Member b(hub, 3);
    CHECK(a.subscribe("x") == VKP_OK);
    CHECK(b.subscribe("x") == VKP_OK);
    CHECK(a.subscribe("x") == VKP_OK);
    CHECK(hub.interest == std::vector<Interest>{{VKP_SUB_CHANNEL, "x", true}});
    CHECK(a.unsubscribe("x"));
    CHECK(hub.interest.size() == 1);
    CHECK(b.unsubscribe("x"));
    CHECK(hub.interest.back() == Interest{VKP_SUB_CHANNEL, "x", false});
    hub.interest.clear();
    CHECK(a.subscribe("p*", VKP_SUB_PATTERN) == VKP_OK);
    CHECK(a.subscribe("s", VKP_SUB_SHARD) == VKP_OK);
    CHECK(a.subscribe("") == VKP_OK);
    CHECK(hub.interest == std::vector<Interest>{{VKP_SUB_PATTERN, "p*", true},
                                                {VKP_SUB_SHARD, "s", true},
                                                {VKP_SUB_CHANNEL, "", true}});
    hub.interest.clear();
    CHECK(hub.publish("p1", "x") == 1);
    CHECK(hub.interest.empty());
    vkp_hub_leave(hub, &a);
    std::sort(hub.interest.begin(), hub.interest.end());
    CHECK(hub.interest == std::vector<Interest>{{VKP_SUB_CHANNEL, "", false},
                                                {VKP_SUB_PATTERN, "p*", false},
                                                {VKP_SUB_SHARD, "s", false}});
}

TEST_CASE("hub: a member can name what it has, until it has nothing")
{
    Hub hub;
    Member a(hub, 3);
    CHECK(vkp_hub_get_member_name(&a, VKP_SUB_CHANNEL).ptr == nullptr);
    CHECK(vkp_hub_get_member_name(&a, VKP_SUB_CHANNEL).len == 0);
    std::set<std::string> expected;
    for (int i = 0; i < 50; i++) {
        expected.insert("c" + std::to_string(i));
        CHECK(a.subscribe("c" + std::to_string(i)) == VKP_OK);
        CHECK(a.subscribe("p" + std::to_string(i), VKP_SUB_PATTERN) == VKP_OK);
    }
    std::set<std::string> found;
    while (a.counts[VKP_SUB_CHANNEL] > 0) { // as UNSUBSCRIBE without names does
        const std::string name(vkp_test_view(vkp_hub_get_member_name(&a, VKP_SUB_CHANNEL)));
        CHECK(found.insert(name).second);
        CHECK(a.unsubscribe(name));
    }
    CHECK(found == expected);
    CHECK(vkp_hub_get_member_name(&a, VKP_SUB_CHANNEL).ptr == nullptr);
    CHECK(vkp_hub_get_member_name(&a, VKP_SUB_PATTERN).ptr != nullptr);
    CHECK(a.subscribe("", VKP_SUB_SHARD) == VKP_OK); // an empty name is a name
    CHECK(vkp_hub_get_member_name(&a, VKP_SUB_SHARD).len == 0);
    CHECK(vkp_hub_get_member_name(&a, VKP_SUB_SHARD).ptr != nullptr);
}

TEST_CASE("hub: what members receive, byte for byte")
{
    Hub hub;
    Member two(hub, 2);
    Member three(hub, 3);
    const std::string binary("a\0\r\n$\xff", 6);
    for (Member *member : {&two, &three}) {
        CHECK(member->subscribe("news") == VKP_OK);
        CHECK(member->subscribe(binary) == VKP_OK);
        CHECK(member->subscribe("sh", VKP_SUB_SHARD) == VKP_OK);
        CHECK(member->subscribe("w[ei]ather.*", VKP_SUB_PATTERN) == VKP_OK);
    }
    const std::string large(100000, 'L');
    CHECK(hub.publish("news", "hello") == 2);
    CHECK(hub.publish("news", "") == 2);
    CHECK(hub.publish(binary, binary) == 2);
    CHECK(hub.publish("sh", "shard", VKP_SUB_SHARD) == 2);
    CHECK(hub.publish("weather.paris", "rain") == 2);
    CHECK(hub.publish("news", large) == 2);
    CHECK(hub.publish("sh", "no shard", VKP_SUB_CHANNEL) == 0);
    CHECK(hub.publish("news", "no channel", VKP_SUB_SHARD) == 0);
    CHECK(hub.publish("weather.paris", "no pattern for shards", VKP_SUB_SHARD) == 0);
    CHECK(hub.publish("w[ei]ather.*", "the pattern's own name does not match") == 0);
    for (const Member *member : {&two, &three}) {
        const int p = member->protocol;
        CHECK(member->hear() ==
              message(p, "news", "hello") + message(p, "news", "") + message(p, binary, binary) +
                  message(p, "sh", "shard", "smessage") +
                  pmessage(p, "w[ei]ather.*", "weather.paris", "rain") + message(p, "news", large));
    }
    // A real peer's bytes.
    CHECK(hub.publish("news", "hello") == 2);
    CHECK(two.hear() == "*3\r\n$7\r\nmessage\r\n$4\r\nnews\r\n$5\r\nhello\r\n");
    CHECK(three.hear() == ">3\r\n$7\r\nmessage\r\n$4\r\nnews\r\n$5\r\nhello\r\n");
}

TEST_CASE("hub: a member with a channel and patterns that match gets one message for each")
{
    Hub hub;
    Member a(hub, 3);
    Member b(hub, 2);
    CHECK(a.subscribe("news") == VKP_OK);
    for (const char *pattern : {"n*", "*", "n?ws", "x*"}) {
        CHECK(a.subscribe(pattern, VKP_SUB_PATTERN) == VKP_OK);
    }
    CHECK(b.subscribe("n*", VKP_SUB_PATTERN) == VKP_OK);
    CHECK(hub.publish("news", "1") == 5);
    CHECK(frames(a.hear()) == std::multiset<std::string>{
                                  message(3, "news", "1"), pmessage(3, "n*", "news", "1"),
                                  pmessage(3, "*", "news", "1"), pmessage(3, "n?ws", "news", "1")});
    CHECK(b.hear() == pmessage(2, "n*", "news", "1"));
}

TEST_CASE("hub: messages keep their order per member")
{
    Hub hub;
    Member a(hub, 3);
    Member b(hub, 2);
    std::mt19937 random(5);
    std::string expected[2];
    for (int name = 0; name < 5; name++) {
        CHECK(a.subscribe("c" + std::to_string(name)) == VKP_OK);
        CHECK(b.subscribe("c" + std::to_string(name)) == VKP_OK);
    }
    std::string heard[2];
    for (int i = 0; i < 5000; i++) {
        const std::string channel = "c" + std::to_string(random() % 5);
        const std::string payload = std::to_string(i) + std::string(random() % 60, 'x');
        REQUIRE(hub.publish(channel, payload) == 2);
        expected[0] += message(3, channel, payload);
        expected[1] += message(2, channel, payload);
        if (random() % 50 == 0) {
            heard[0] += a.hear();
            heard[1] += b.hear();
        }
    }
    heard[0] += a.hear();
    heard[1] += b.hear();
    CHECK(heard[0] == expected[0]);
    CHECK(heard[1] == expected[1]);
}

TEST_CASE("hub: a message is encoded once per protocol, and consecutive ones are one range")
{
    Hub hub;
    std::vector<std::unique_ptr<Member>> members;
    for (int i = 0; i < 60; i++) {
        members.push_back(std::make_unique<Member>(hub, i % 3 == 0 ? 2 : 3));
        REQUIRE(members.back()->subscribe("all") == VKP_OK);
    }
    const std::string payload(20000, 'p');
    const size_t before = vkp_test_env_live_bytes(&hub.test);
    wire_blocked = true;
    CHECK(hub.publish("all", payload) == 60);
    CHECK(hub.publish("all", payload) == 60);
    // Two encodings of two messages each, not 120 copies.
    CHECK(vkp_test_env_live_bytes(&hub.test) - before <= 2 * (65536 + 1024));
    wire_blocked = false;
    hub.round();
    CHECK(wire_calls == 60);
    CHECK(wire_ranges == 60);
    for (const auto &member : members) {
        CHECK(member->hear() == message(member->protocol, "all", payload) +
                                    message(member->protocol, "all", payload));
    }
    // Written: the blocks are used again, no new ones are taken.
    const uint64_t calls = vkp_test_env_calls(&hub.test);
    for (int i = 0; i < 100; i++) {
        CHECK(hub.publish("all", "again") == 60);
        hub.round();
    }
    CHECK(vkp_test_env_calls(&hub.test) == calls);
}

TEST_CASE("hub: what a slow member pins is bounded by its queue, and the others lose nothing")
{
    Hub hub;
    vkp_conn_config config = {};
    config.queue_bytes = 10000;
    config.on_full = VKP_ON_FULL_DROP_OLDEST;
    Member slow(hub, 3, config);
    Member quick(hub, 3);
    REQUIRE(slow.subscribe("c") == VKP_OK);
    REQUIRE(quick.subscribe("c") == VKP_OK);
    // Fill the slow one's socket, so that everything else waits in its queue.
    const std::string filler(1u << 20, 'f');
    CHECK(hub.publish("c", filler) == 2);
    std::string heard = quick.hear();
    const size_t before =
        vkp_test_env_live_bytes(&hub.test) + vkp_test_env_live_bytes(&hub.loop_test);
    std::string expected = message(3, "c", filler);
    for (int i = 0; i < 3000; i++) {
        const std::string payload = std::to_string(i) + std::string(300, '.');
        CHECK(hub.publish("c", payload) == 2);
        expected += message(3, "c", payload);
        heard += quick.hear();
    }
    CHECK(heard == expected);
    CHECK(vkp_test_env_live_bytes(&hub.test) + vkp_test_env_live_bytes(&hub.loop_test) <
          before + 4 * 65536);
    vkp_conn_stats stats;
    vkp_conn_get_stats(slow.conn, &stats);
    CHECK(stats.dropped_frames > 2900);
    // The first was begun; then the newest, whole.
    const std::string got = slow.hear();
    CHECK(got.substr(0, 100) == expected.substr(0, 100));
    const size_t first = message(3, "c", filler).size();
    CHECK(got.size() > first);
    CHECK(expected.substr(expected.size() - (got.size() - first)) == got.substr(first));
}

TEST_CASE("hub: a delivery that a member's policy refuses is still counted, and hurts nobody")
{
    Hub hub;
    vkp_conn_config config = {};
    config.queue_frames = 1;
    config.on_full = GENERATE(VKP_ON_FULL_ERROR, VKP_ON_FULL_DROP_NEWEST, VKP_ON_FULL_DISCONNECT);
    Member full(hub, 3, config);
    Member fine(hub, 3);
    Member closed(hub, 3);
    for (Member *member : {&full, &fine, &closed}) {
        REQUIRE(member->subscribe("c") == VKP_OK);
    }
    vkp_conn_close(closed.conn);
    wire_blocked = true;
    for (int i = 0; i < 3; i++) {
        CHECK(hub.publish("c", std::to_string(i)) == 3);
    }
    wire_blocked = false;
    CHECK(fine.hear() == message(3, "c", "0") + message(3, "c", "1") + message(3, "c", "2"));
    CHECK(full.hear() ==
          (config.on_full == VKP_ON_FULL_DISCONNECT ? std::string() : message(3, "c", "0")));
    CHECK(vkp_conn_is_open(full.conn) == (config.on_full != VKP_ON_FULL_DISCONNECT));
    CHECK(hub.members("c") == 3); // leaving is the program's
}

TEST_CASE("hub: many members and many names, in any order of coming and going")
{
    Hub hub;
    std::mt19937 random(9);
    constexpr int member_count = 40;
    constexpr int name_count = 60;
    std::vector<std::unique_ptr<Member>> members;
    std::map<std::pair<int, std::string>, std::set<int>> model;
    for (int i = 0; i < member_count; i++) {
        members.push_back(std::make_unique<Member>(hub, 2 + i % 2));
    }
    for (int step = 0; step < 20000; step++) {
        const int who = static_cast<int>(random() % member_count);
        const auto kind = static_cast<vkp_sub_kind>(random() % 3);
        const std::string name = "n" + std::to_string(random() % name_count);
        std::set<int> &set = model[{kind, name}];
        Member &member = *members[static_cast<size_t>(who)];
        switch (random() % 8) {
        case 0:
        case 1:
        case 2: {
            REQUIRE(member.unsubscribe(name, kind) == (set.erase(who) > 0));
            break;
        }
        case 3:
            if (random() % 10 == 0) {
                vkp_hub_leave(hub, &member);
                for (auto &entry : model) {
                    entry.second.erase(who);
                }
            }
            break;
        default: {
            bool added = false;
            REQUIRE(member.subscribe(name, kind, &added) == VKP_OK);
            REQUIRE(added == set.insert(who).second);
        }
        }
        REQUIRE(hub.members(name, kind) == set.size());
        REQUIRE(member.has(name, kind) == (set.count(who) > 0));
    }
    uint32_t counts[member_count][3] = {};
    size_t names[3] = {};
    for (const auto &entry : model) {
        names[entry.first.first] += !entry.second.empty();
        for (int who : entry.second) {
            counts[who][entry.first.first]++;
        }
    }
    for (int kind = 0; kind < 3; kind++) {
        CHECK(vkp_hub_get_names(hub, static_cast<vkp_sub_kind>(kind)) == names[kind]);
        CHECK(hub.names(static_cast<vkp_sub_kind>(kind)).size() == names[kind]);
        for (int who = 0; who < member_count; who++) {
            CHECK(members[static_cast<size_t>(who)]->counts[kind] == counts[who][kind]);
        }
    }
    // Every name was told added and removed in turn.
    std::map<std::pair<int, std::string>, bool> told;
    for (const Interest &one : hub.interest) {
        bool &now = told[{std::get<0>(one), std::get<1>(one)}];
        REQUIRE(now != std::get<2>(one));
        now = std::get<2>(one);
    }
    for (const auto &entry : model) {
        CHECK(told[entry.first] == !entry.second.empty());
    }
}

TEST_CASE("hub: a server's push is passed on: as it came to protocol 3, as an array to 2")
{
    Hub hub;
    Member two(hub, 2);
    Member three(hub, 3);
    for (Member *member : {&two, &three}) {
        CHECK(member->subscribe("news") == VKP_OK);
        CHECK(member->subscribe("n*", VKP_SUB_PATTERN) == VKP_OK);
        CHECK(member->subscribe("sh", VKP_SUB_SHARD) == VKP_OK);
    }
    auto deliver = [&](const std::string &text) {
        vkp_resp_reader *reader = nullptr;
        const vkp_value *value = nullptr;
        size_t used = 0;
        vkp_bytes frame;
        vkp_push push;
        REQUIRE(vkp_bytes_copy(&hub.test.env, text.data(), text.size(), &frame) == VKP_OK);
        REQUIRE(vkp_resp_reader_open(nullptr, &reader) == VKP_OK);
        REQUIRE(vkp_resp_reader_scan(reader, frame.data, frame.len, &value, &used) == VKP_OK);
        REQUIRE(vkp_push_from_value(value, &push) == VKP_OK);
        push.frame = frame;
        const size_t count = vkp_hub_deliver(hub, &push);
        vkp_push_unref(&push); // the members' queues share what they need
        vkp_resp_reader_unref(reader);
        return count;
    };
    SECTION("a message goes to the channel's members alone")
    {
        CHECK(deliver(message(3, "news", "m")) == 2);
        CHECK(three.hear() == message(3, "news", "m"));
        CHECK(two.hear() == message(2, "news", "m"));
    }
    SECTION("a pmessage goes to the pattern's")
    {
        CHECK(deliver(pmessage(3, "n*", "news", "m")) == 2);
        CHECK(three.hear() == pmessage(3, "n*", "news", "m"));
        CHECK(two.hear() == pmessage(2, "n*", "news", "m"));
    }
    SECTION("an smessage goes to the shard channel's")
    {
        CHECK(deliver(message(3, "sh", "m", "smessage")) == 2);
        CHECK(three.hear() == message(3, "sh", "m", "smessage"));
        CHECK(two.hear() == message(2, "sh", "m", "smessage"));
    }
    SECTION("nobody wants it")
    {
        CHECK(deliver(message(3, "other", "m")) == 0);
        CHECK(deliver(pmessage(3, "x*", "news", "m")) == 0);
        CHECK(deliver(message(3, "news", "m", "smessage")) == 0);
        CHECK(three.hear().empty());
    }
    SECTION("no message at all")
    {
        CHECK(deliver(">2\r\n$10\r\ninvalidate\r\n*1\r\n$4\r\nnews\r\n") == 0);
        CHECK(deliver(">3\r\n$9\r\nsubscribe\r\n$4\r\nnews\r\n:1\r\n") == 0);
        vkp_push event = {};
        event.kind = VKP_PUSH_DISCONNECTED;
        event.channel = str("news");
        CHECK(vkp_hub_deliver(hub, &event) == 0);
        CHECK(three.hear().empty());
        CHECK(two.hear().empty());
    }
    SECTION("a message of the program's own, without received bytes")
    {
        vkp_push push = {};
        push.kind = VKP_PUSH_MESSAGE;
        push.channel = str("news");
        push.payload = str("m");
        CHECK(vkp_hub_deliver(hub, &push) == 2);
        CHECK(three.hear() == message(3, "news", "m"));
        CHECK(two.hear() == message(2, "news", "m"));
    }
    SECTION("received bytes are shared, not copied")
    {
        const std::string large(200000, 'L');
        CHECK(two.unsubscribe("news"));
        const size_t before = vkp_test_env_live_bytes(&hub.test);
        wire_blocked = true;
        CHECK(deliver(message(3, "news", large)) == 1);
        CHECK(vkp_test_env_live_bytes(&hub.test) - before < 201000);
        wire_blocked = false;
        CHECK(three.hear() == message(3, "news", large));
        CHECK(vkp_test_env_live_bytes(&hub.test) == before);
    }
}

TEST_CASE("hub: every allocation of subscribe may fail, and changes nothing then")
{
    const vkp_test_fault fault = GENERATE(VKP_TEST_FAULT_ONCE, VKP_TEST_FAULT_FROM);
    Hub hub;
    Member a(hub, 3);
    Member b(hub, 3);
    REQUIRE(b.subscribe("old") == VKP_OK);
    hub.interest.clear();
    int failed = 0;
    for (const char *name : {"fresh", "old"}) {
        for (uint64_t k = 1;; k++) {
            INFO(name << ", allocation " << k);
            const size_t members = hub.members(name);
            const size_t blocks = vkp_test_env_live_blocks(&hub.test);
            bool added = false;
            vkp_test_env_fault(&hub.test, fault, k);
            vkp_status status = a.subscribe(name, VKP_SUB_CHANNEL, &added);
            vkp_test_env_fault(&hub.test, VKP_TEST_FAULT_NONE, 0);
            if (status == VKP_OK) {
                CHECK(added);
                break;
            }
            failed++;
            CHECK(status == VKP_ERR_NOMEM);
            CHECK_FALSE(added); // written only on OK
            CHECK(hub.members(name) == members);
            CHECK(a.counts[VKP_SUB_CHANNEL] == (name[0] == 'o' ? 1u : 0u));
            CHECK_FALSE(a.has(name));
            CHECK(hub.interest.size() == (name[0] == 'o' ? 1u : 0u));
            CHECK(vkp_test_env_live_blocks(&hub.test) <= blocks + 1); // a grown table stays
        }
    }
    CHECK(failed >= 3);
    CHECK(hub.publish("fresh", "x") == 1);
    CHECK(hub.publish("old", "x") == 2);
}

TEST_CASE("hub: a publish without memory for its encoding delivers nothing, and the next one works")
{
    Hub hub;
    Member two(hub, 2);
    Member three(hub, 3);
    REQUIRE(two.subscribe("c") == VKP_OK);
    REQUIRE(three.subscribe("c") == VKP_OK);
    vkp_test_env_fault(&hub.test, VKP_TEST_FAULT_ONCE, 1);
    CHECK(hub.publish("c", "lost to one") == 2);
    vkp_test_env_fault(&hub.test, VKP_TEST_FAULT_FROM, 1);
    (void)hub.publish("c", std::string(100000, 'x'));
    vkp_test_env_fault(&hub.test, VKP_TEST_FAULT_NONE, 0);
    CHECK(hub.publish("c", "back") == 2);
    const std::string a = two.hear();
    const std::string b = three.hear();
    CHECK((a == message(2, "c", "back")) + (b == message(3, "c", "back")) == 1);
    CHECK((a == message(2, "c", "lost to one") + message(2, "c", "back")) +
              (b == message(3, "c", "lost to one") + message(3, "c", "back")) ==
          1);
}
