// SPDX-License-Identifier: MIT
//
// Connections to the server that carry one client of a relay: what a command does to its connection
// is done to this client alone, and what blocks keeps nobody else waiting. Each script is said to a
// relay and to its server; the answers are the same.
#include "support/catch.hpp"

#include "support/relay_probe.h"

#include <csignal>

namespace {

using namespace relay_probe;

// A relay behind a server, with two clients that share.
struct Both {
    explicit Both(const Setup &setup, vkp_relay_config config = {},
                  const std::vector<const char *> &options = {}, const vkp_sys *sys = nullptr)
        : server(start_server(options)), relay(setup, with(config, server.get()), sys),
          peer(relay.connected_client()), other(relay.connected_client()),
          direct(open(vkp_test_server_unix(server.get())))
    {
    }
    static vkp_relay_config with(vkp_relay_config config, vkp_test_server *server)
    {
        config.server = vkp_str_of(vkp_test_server_unix(server));
        return config;
    }
    void until_privates(size_t count) const
    {
        vkp_test_wait_until("the count of private connections",
                            [&] { return relay.stats().privates == count; });
    }
    // Until the server says that so many clients are blocked.
    void until_blocked(size_t count) const
    {
        vkp_test_wait_until("the server's count of blocked clients", [&] {
            return contains(ask(direct, "INFO", "clients"),
                            "blocked_clients:" + std::to_string(count) + "\r\n");
        });
    }
    Server server;
    Relay relay;
    Peer peer;
    Peer other;
    Peer direct;
};

TEST_CASE("private: what belongs to a connection is answered as directly")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Differential differential(setup);
    const Strings scripts[] = {
        // Databases.
        {"SET k zero", "SELECT 1", "GET k", "SET k one", "SELECT 0", "GET k", "SELECT 1", "GET k",
         "DBSIZE", "SELECT x", "SELECT", "SELECT 99", "GET k", "SELECT 0 1", "FLUSHDB", "SELECT 0",
         "GET k"},
        {"SELECT 0", "SET k v", "select 00", "GET k"},
        // Transactions under WATCH.
        {"SET k 1", "WATCH k", "GET k", "MULTI", "INCR k", "EXEC", "GET k", "UNWATCH"},
        {"WATCH k", "SET k 2", "MULTI", "SET k 3", "EXEC", "GET k", "DISCARD", "EXEC"},
        {"WATCH k l", "UNWATCH", "SET k 2", "MULTI", "SET k 3", "EXEC", "GET k"},
        {"WATCH k", "MULTI", "SET k 3", "DISCARD", "GET k", "MULTI", "GET k", "EXEC"},
        {"WATCH k", "MULTI", "WATCH l", "NOSUCH", "SET k 1", "EXEC", "GET k"},
        {"WATCH", "UNWATCH x", "MULTI", "MULTI", "EXEC x", "EXEC", "DISCARD x"},
        // Private commands in a transaction that is held already.
        {"MULTI", "SET k 1", "INCR k", "BLPOP none 0", "GET k", "EXEC", "GET k"},
        {"MULTI", "SET k 1", "SELECT 1", "SET k 2", "EXEC", "GET k", "SELECT 0", "GET k"},
        {"MULTI", "LPUSH l a", "BLPOP l 0", "NOSUCH x", "EXEC", "LLEN l"},
        {"MULTI", "SET k 1", "BRPOP l 0", "DISCARD", "GET k", "DISCARD"},
        // What blocks, or could.
        {"RPUSH l a b c d", "BLPOP l 0", "BRPOP l 1", "BLMOVE l m LEFT RIGHT 1",
         "BLMPOP 0 1 l LEFT", "BLPOP none 0.01", "BRPOPLPUSH none x 0.01", "BLPOP none x",
         "LLEN l"},
        {"ZADD z 1 a 2 b 3 c", "BZPOPMIN z 0", "BZPOPMAX z 0", "BZMPOP 0 1 z MIN",
         "BZPOPMIN z 0.01"},
        {"XADD x 1-1 f v", "XREAD BLOCK 10 STREAMS x 0", "XREAD COUNT 1 block 10 STREAMS x $",
         "XGROUP CREATE x streams 0", "XREADGROUP GROUP streams c BLOCK 10 STREAMS x >",
         "XREADGROUP GROUP streams c BLOCK 10 STREAMS x >", "XREAD STREAMS BLOCK 0"},
        {"WAIT 0 10", "SET k v", "WAIT 0 10", "WAIT x 1"},
        // Flags of the connection.
        {"CLIENT NO-EVICT ON", "CLIENT NO-EVICT OFF", "CLIENT NO-TOUCH ON", "GET k"},
        {"CLIENT TRACKINGINFO", "CLIENT GETREDIR", "CLIENT CACHING YES", "CLIENT TRACKING x"},
        {"READONLY", "READWRITE", "ASKING", "GET k"},
        {"CLIENT REPLY ON", "SET k v", "CLIENT REPLY SKIP", "SET k w", "GET k"},
        {"MULTI", "SET k v", "CLIENT REPLY ON", "GET k", "EXEC", "GET k"},
        {"MULTI", "SET k v", "CLIENT REPLY x", "GET k", "EXEC", "GET k"},
        {"MULTI", "SET k v", "CLIENT REPLY OFF", "EXEC", "GET k", "CLIENT REPLY ON", "GET k"},
        {"SET k v", "CLIENT REPLY OFF", "SET k w", "GET k", "CLIENT REPLY ON", "GET k"},
        {"AUTH wrong", "AUTH default wrong", "GET k", "AUTH", "SET k v"},
        {"SCRIPT DEBUG", "GET k"},
        {"DEBUG STRINGMATCH-LEN 1 x", "NOSUCH a b", "MODULE LIST", "GET k"},
        {"SELECT 2", "RESET", "SET k v", "GET k"},
        // Subscriptions stand beside it.
        {"SELECT 2", "PUBLISH c a", "SET k v"},
    };
    for (const Strings &script : scripts) {
        differential.run_both(wires(script));
        if (setup.loops == 1) {
            differential.run(wire("HELLO 3") + wires(script), 11);
        }
    }
}

TEST_CASE("what a server refuses is refused in its own words")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Differential differential(setup);
    const Strings scripts[] = {
        {"CLIENT", "CLIENT ID x", "CLIENT SETNAME", "CLIENT SETNAME a b", "CLIENT GETNAME x",
         "CLIENT INFO x", "CLIENT SETINFO", "CLIENT SETINFO LIB-NAME", "CLIENT SETINFO NO-SUCH x",
         "CLIENT GETNAME"},
        {"RESET x", "CLIENT SETNAME a", "SELECT 1", "RESET x y", "CLIENT GETNAME", "RESET"},
        {"MULTI", "SET k v", "RESET x", "EXEC", "GET k"},
        {"MULTI", "SET k v", "MULTI", "INCR n", "EXEC", "GET k", "DISCARD"},
        {"MULTI", "SET k v", "EXEC x", "GET k", "EXEC", "GET k"},
        {"MULTI", "SET k v", "DISCARD x", "GET k", "EXEC", "GET k"},
        {"MULTI x", "SUBSCRIBE c", "UNSUBSCRIBE c", "SET k v", "EXEC x", "DISCARD x", "GET k"},
        {"WATCH k", "MULTI x", "SUBSCRIBE c", "UNSUBSCRIBE c", "MULTI", "DISCARD x", "WAIT 0 1",
         "EXEC"},
    };
    for (const Strings &script : scripts) {
        differential.run_both(wires(script));
    }
    differential.run_both(vkp_test_wire({"CLIENT", "SETINFO", "lib-name", "a b"}) + wire("PING"));
}

TEST_CASE("private: a thousand commands in one write are answered in order, on both ways")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Differential differential(setup);
    std::string script;
    for (int i = 0; i < 1000; i++) {
        const std::string n = std::to_string(i);
        script += wires(i % 50 == 17   ? Strings{"SELECT 1", "SET k " + n, "SELECT 0"}
                        : i % 50 == 31 ? Strings{"WATCH k", "MULTI", "INCR n", "EXEC"}
                        : i % 50 == 42 ? Strings{"RPUSH l " + n, "BLPOP l 0"}
                        : i % 3 == 0   ? Strings{"GET k", "CLIENT SETNAME a" + n, "CLIENT GETNAME"}
                                       : Strings{"SET k " + n, "PING", "ECHO " + n});
    }
    differential.run_both(script);
}

TEST_CASE("private: a database that is not 0 is the client's alone")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Both both(setup);
    ask(both.peer, "SET", "k", "zero");
    // As some libraries do: without looking at an answer.
    say(both.peer, wires({"SELECT 5", "SET k five", "FLUSHDB", "SET k again"}));
    CHECK(hear_some(both.peer, 4) == Strings(4, "+OK\r\n"));
    CHECK(ask(both.other, "GET", "k") == bulk("zero"));
    CHECK(ask(both.peer, "GET", "k") == bulk("again"));
    CHECK(contains(ask(both.peer, "CLIENT", "INFO"), " db=5 "));
    CHECK(both.relay.stats().privates == 1);
    both.peer.reset();
    both.until_privates(0);
}

TEST_CASE("private: WATCH sees the writes of others")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Both both(setup);
    const bool interfere = GENERATE(true, false);
    ask(both.peer, "SET", "k", "1");
    CHECK(ask(both.peer, "WATCH", "k") == "+OK\r\n");
    if (interfere) {
        ask(both.other, "SET", "k", "2");
    }
    say(both.peer, wires({"MULTI", "INCR k", "EXEC"}));
    CHECK(hear_some(both.peer, 3) ==
          Strings{"+OK\r\n", "+QUEUED\r\n", interfere ? "*-1\r\n" : "*1\r\n:2\r\n"});
}

TEST_CASE("private: what blocks keeps nobody else waiting, and costs one connection")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Both both(setup);
    std::vector<Peer> blocked;
    for (int i = 0; i < 20; i++) {
        blocked.push_back(both.relay.client());
        say(blocked.back(), wire("BLPOP list" + std::to_string(i) + " 0"));
    }
    both.until_blocked(20);
    for (int i = 0; i < 50; i++) {
        CHECK(ask(both.other, "ECHO", "a") == bulk("a"));
    }
    for (int i = 0; i < 20; i++) {
        const std::string list = "list" + std::to_string(i);
        CHECK(ask(both.other, "RPUSH", list, "x") == ":1\r\n");
        CHECK(hear(blocked[static_cast<size_t>(i)]) == "*2\r\n" + bulk(list) + bulk("x"));
    }
    CHECK(both.relay.stats().privates == 20);
}

TEST_CASE("private: a client that goes while it blocks takes nothing with it")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Both both(setup);
    const bool half = GENERATE(true, false);
    say(both.peer, wire("BLPOP l 0"));
    both.until_blocked(1);
    if (half) {
        CHECK(::shutdown(vkp_test_peer_fd(both.peer.get()), SHUT_WR) == 0);
        CHECK(hear(both.peer).empty()); // as a server does
    }
    both.peer.reset();
    both.until_blocked(0);
    both.until_privates(0);
    ask(both.other, "RPUSH", "l", "kept");
    CHECK(ask(both.other, "LPOP", "l") == bulk("kept"));
}

TEST_CASE("private: a client that goes behind what blocks is noticed, whatever it said last")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Both both(setup);
    std::string more;
    switch (GENERATE(0, 1, 2, 3)) {
    case 0:
        more = wire("QUIT"); // waits for its turn
        break;
    case 1:
        for (int i = 0; i < 2000; i++) {
            more += wire("PING");
        }
        break;
    case 2:
        more = vkp_test_wire({"ECHO", std::string(900000, 'x')}) + wire("CLIENT ID");
        break;
    default:
        more = wire("SUBSCRIBE c") + "*2\r\n$4\r\nECHO\r\n$100\r\nhalf";
    }
    say(both.peer, wire("BLPOP l 0") + more);
    both.until_blocked(1);
    const bool half = GENERATE(true, false);
    if (half) {
        CHECK(::shutdown(vkp_test_peer_fd(both.peer.get()), SHUT_WR) == 0);
        CHECK(hear(both.peer).empty());
    }
    both.peer.reset();
    both.until_blocked(0);
    ask(both.other, "RPUSH", "l", "kept");
    CHECK(ask(both.other, "LPOP", "l") == bulk("kept"));
    both.until_privates(0);
}

TEST_CASE("private: what was said behind what blocks is answered when it is over")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Both both(setup);
    std::string more;
    for (int i = 0; i < 2000; i++) {
        more += wire("ECHO " + std::to_string(i)) + (i % 100 == 7 ? wire("CLIENT GETNAME") : "");
    }
    say(both.peer, wire("BLPOP l 0") + more);
    both.until_blocked(1);
    ask(both.other, "RPUSH", "l", "x");
    CHECK(hear(both.peer) == "*2\r\n" + bulk("l") + bulk("x"));
    for (int i = 0; i < 2000; i++) {
        REQUIRE(hear(both.peer) == bulk(std::to_string(i)));
        if (i % 100 == 7) {
            REQUIRE(hear(both.peer) == "$-1\r\n");
        }
    }
}

TEST_CASE("private: a connection whose client did not read is not the next one's")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    if (setup.loops > 1) {
        return; // each loop keeps its own
    }
    Both both(setup);
    ask(both.direct, "SET", "big", std::string(20000000, 'x'));
    Peer idler = both.relay.client();
    CHECK(ask(idler, "BLPOP", "none", "0.01") == "*-1\r\n");
    say(idler, wire("GET big"));
    CHECK(std::string(vkp_test_peer_read(idler.get(), 5)) == "$2000");
    idler.reset();
    CHECK(ask(both.peer, "SELECT", "1") == "+OK\r\n");
    CHECK(ask(both.peer, "GET", "none") == "$-1\r\n");
}

TEST_CASE("private: subscriptions stand beside it, between whole replies")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Both both(setup);
    CHECK(starts_with(ask(both.peer, "HELLO", "3"), "%7"));
    ask(both.peer, "SUBSCRIBE", "c");
    CHECK(ask(both.peer, "SELECT", "1") == "+OK\r\n");
    ask(both.peer, "SET", "big", std::string(300000, 'x'));
    size_t messages = 0;
    size_t replies = 0;
    for (int i = 0; i < 20; i++) {
        say(both.peer, wires({"GET big", "GET big"}));
        ask(both.other, "PUBLISH", "c", std::to_string(i));
    }
    while (messages < 20 || replies < 40) {
        const std::string frame = hear(both.peer);
        if (frame == message(3, "c", std::to_string(messages))) {
            messages++;
        } else {
            REQUIRE(frame == bulk(std::string(300000, 'x')));
            replies++;
        }
    }
    // What is subscribed or left on the way is the hub's.
    CHECK(ask(both.peer, "SUBSCRIBE", "d") == confirmation(3, "subscribe", "d", 2));
    CHECK(ask(both.peer, "UNSUBSCRIBE", "c") == confirmation(3, "unsubscribe", "c", 1));
    CHECK(ask(both.other, "PUBLISH", "d", "x") == ":1\r\n");
    CHECK(hear(both.peer) == message(3, "d", "x"));
    CHECK(ask(both.peer, "DBSIZE") == ":1\r\n");
}

TEST_CASE("private: tracking tells one client which keys changed")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Both both(setup);
    ask(both.peer, "HELLO", "3");
    ask(both.peer, "SET", "k", "1");
    CHECK(ask(both.peer, "CLIENT", "TRACKING", "ON") == "+OK\r\n");
    CHECK(ask(both.peer, "GET", "k") == bulk("1"));
    CHECK(ask(both.other, "SET", "k", "2") == "+OK\r\n");
    CHECK(hear(both.peer) == ">2\r\n" + bulk("invalidate") + "*1\r\n" + bulk("k"));
    CHECK(ask(both.peer, "GET", "k") == bulk("2"));
    CHECK(ask(both.other, "FLUSHALL") == "+OK\r\n");
    CHECK(hear(both.peer) == ">2\r\n" + bulk("invalidate") + "_\r\n");
    // Behind a blocking command too.
    say(both.peer, wire("BLPOP l 0"));
    both.until_blocked(1);
    CHECK(ask(both.other, "RPUSH", "l", "a") == ":1\r\n");
    CHECK(hear(both.peer) == "*2\r\n" + bulk("l") + bulk("a"));
}

TEST_CASE("private: MONITOR shows what the server does, to one client")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Both both(setup);
    CHECK(ask(both.peer, "MONITOR") == "+OK\r\n");
    for (int i = 0; i < 10; i++) {
        ask(both.other, "ECHO", "monitored" + std::to_string(i));
    }
    for (int i = 0; i < 10;) {
        const std::string line = hear(both.peer);
        REQUIRE(starts_with(line, "+"));
        i += contains(line, "\"monitored" + std::to_string(i) + "\"") ? 1 : 0;
    }
    say(both.peer, wire("QUIT"));
    for (std::string line = hear(both.peer); !line.empty(); line = hear(both.peer)) {
        CHECK(starts_with(line, "+"));
    }
    both.until_privates(0);
}

TEST_CASE("private: where replies are not counted, too, what the relay denies goes nowhere")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Both both(setup);
    for (const char *tunnel : {"MONITOR", "CLIENT REPLY OFF", "SCRIPT DEBUG YES"}) {
        for (const char *denied : {"SHUTDOWN NOSAVE", "CLIENT PAUSE 100000 ALL", "SYNC",
                                   "CLIENT KILL TYPE normal", "debug sleep 1000"}) {
            INFO(tunnel << ", " << denied);
            Peer peer = both.relay.client();
            say(peer, wire(tunnel) + wire(denied) + wire("SET reached yes"));
            for (std::string line = hear(peer); !line.empty(); line = hear(peer)) {
                CHECK_FALSE(contains(line, "DENIED")); // nobody expects an answer there
            }
            CHECK(ask(both.other, "PING") == "+PONG\r\n");
            CHECK(ask(both.direct, "GET", "reached") == "$-1\r\n");
        }
    }
    CHECK(both.relay.stats().outages == 0);
    both.until_privates(0);
}

TEST_CASE("private: a script's debugger talks to one client")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Both both(setup);
    ask(both.other, "SET", "k", "v");
    CHECK(ask(both.peer, "SCRIPT", "DEBUG", "YES") == "+OK\r\n");
    say(both.peer, wire("EVAL return(1) 0"));
    CHECK(contains(hear(both.peer), "* Stopped at 1"));
    CHECK(ask(both.other, "GET", "k") == bulk("v"));
    say(both.peer, wire("c"));
    CHECK(hear_all(both.peer) == Strings{"*1\r\n+<endsession>\r\n", ":1\r\n"});
    CHECK(ask(both.other, "GET", "k") == bulk("v"));
}

// HELLO's answer with the number of the client left out.
std::string without_id(const std::string &hello)
{
    const std::string key = bulk("id") + ":";
    const size_t at = hello.find(key);
    REQUIRE(at != std::string::npos);
    return hello.substr(0, at + key.size()) + hello.substr(hello.find("\r\n", at + key.size()));
}

TEST_CASE("private: HELLO is answered as the server does, but for the number")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Both both(setup);
    for (const char *protocol : {"3", "2"}) {
        CHECK(without_id(ask(both.peer, "HELLO", protocol)) ==
              without_id(ask(both.direct, "HELLO", protocol)));
    }
    CHECK(without_id(ask(both.peer, "HELLO", "3", "AUTH", "default", "any")) ==
          without_id(ask(both.direct, "HELLO", "3", "AUTH", "default", "any")));
}

TEST_CASE("private: a login is one client's, and the server decides")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Both both(setup);
    ask(both.direct, "ACL", "SETUSER", "ann", "on", ">pw", "+@all", "-set", "~*", "&*");
    SECTION("AUTH")
    {
        CHECK(starts_with(ask(both.peer, "AUTH", "ann", "no"), "-WRONGPASS"));
        CHECK(ask(both.peer, "AUTH", "ann", "pw") == "+OK\r\n");
    }
    SECTION("HELLO")
    {
        CHECK(starts_with(ask(both.peer, "HELLO", "3", "AUTH", "ann", "no"), "-WRONGPASS"));
        CHECK(contains(ask(both.peer, "CLIENT", "INFO"), " resp=2"));
        const std::string hello =
            ask(both.peer, "HELLO", "3", "AUTH", "ann", "pw", "SETNAME", "anns");
        CHECK(starts_with(hello, "%7"));
        CHECK(contains(hello, bulk("role") + bulk("master")));
        CHECK(ask(both.peer, "CLIENT", "GETNAME") == bulk("anns"));
        CHECK(contains(ask(both.direct, "CLIENT", "LIST"), "name=anns "));
        CHECK(ask(both.peer, "GET", "none") == "_\r\n");
    }
    CHECK(ask(both.peer, "ACL", "WHOAMI") == bulk("ann"));
    say(both.peer, wires({"GET none", "AUTH ann no", "GET none", "AUTH bob x", "ECHO a"}));
    const Strings heard = hear_some(both.peer, 5); // redis 7.2 does not answer where replies wait
    CHECK(starts_with(heard[1], "-WRONGPASS"));
    CHECK(starts_with(heard[3], "-WRONGPASS"));
    CHECK(heard[4] == bulk("a"));
    CHECK(starts_with(ask(both.peer, "SET", "k", "v"), "-NOPERM"));
    CHECK(ask(both.other, "ACL", "WHOAMI") == bulk("default"));
    CHECK(ask(both.other, "SET", "k", "v") == "+OK\r\n");
    CHECK(ask(both.peer, "RESET") == "+RESET\r\n");
    CHECK(ask(both.peer, "ACL", "WHOAMI") == bulk("default"));
}

TEST_CASE("private: a client that is killed on the server is disconnected, and nobody else")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Both both(setup);
    ask(both.peer, "CLIENT", "SETNAME", "victim");
    say(both.peer, wire("BLPOP l 0"));
    both.until_blocked(1);
    const std::string list = ask(both.direct, "CLIENT", "LIST");
    const size_t line = list.rfind("id=", list.find("name=victim "));
    const std::string id = list.substr(line + 3, list.find(' ', line) - line - 3);
    CHECK(ask(both.direct, "CLIENT", "KILL", "ID", id) == ":1\r\n");
    CHECK(hear(both.peer).empty());
    CHECK(ask(both.other, "ECHO", "a") == bulk("a"));
    both.until_privates(0);
}

TEST_CASE("private: the next client takes a connection that the last one left, without its traces")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    if (setup.loops > 1) {
        return; // each loop keeps its own
    }
    Both both(setup);
    ask(both.peer, "CLIENT", "SETNAME", "first");
    ask(both.peer, "RPUSH", "l", "a");
    CHECK(ask(both.peer, "BLPOP", "l", "0") == "*2\r\n" + bulk("l") + bulk("a"));
    CHECK(ask(both.peer, "SELECT", "3") == "+OK\r\n");
    CHECK(ask(both.peer, "SELECT", "0") == "+OK\r\n");
    both.peer.reset();
    vkp_test_wait_until("the first one is gone", [&] { return both.relay.stats().clients == 1; });
    ask(both.other, "RPUSH", "l", "b");
    CHECK(ask(both.other, "BLPOP", "l", "0") == "*2\r\n" + bulk("l") + bulk("b"));
    CHECK(both.relay.stats().privates_opened == 1);
    CHECK(both.relay.stats().privates == 1);
    vkp_test_wait_until("no name is left of it", [&] {
        return !contains(ask(both.direct, "CLIENT", "LIST"), "name=first");
    });
    // A connection that logged in, or tracks, is no other client's.
    ask(both.other, "CLIENT", "TRACKING", "ON");
    ask(both.other, "CLIENT", "TRACKING", "OFF");
    both.other.reset();
    both.until_privates(0);
}

std::atomic<uint64_t> ahead_ns = {0};

// A clock that the test moves.
const vkp_sys *movable_clock()
{
    static const vkp_sys table = [] {
        vkp_sys copy = *vkp_sys_get_default();
        copy.clock_ns = [] { return vkp_sys_get_default()->clock_ns() + ahead_ns; };
        return copy;
    }();
    return &table;
}

TEST_CASE("private: a client that needs its connection no more shares again")
{
    NEEDS_SERVER();
    Both both(one_loop(), {}, {}, movable_clock());
    const bool needed = GENERATE(true, false);
    CHECK(ask(both.peer, "SELECT", "1") == "+OK\r\n");
    CHECK(ask(both.peer, "SELECT", needed ? "2" : "0") == "+OK\r\n");
    ahead_ns += 6000000000u;
    ask(both.other, "PING");
    ask(both.other, "PING");
    ask(both.other, "RPUSH", "l", "a");
    CHECK(ask(both.other, "BLPOP", "l", "0") == "*2\r\n" + bulk("l") + bulk("a"));
    CHECK(both.relay.stats().privates_opened == (needed ? 2u : 1u));
    CHECK(ask(both.peer, "SET", "k", "v") == "+OK\r\n");
    CHECK(ask(both.direct, "EXISTS", "k") == (needed ? ":0\r\n" : ":1\r\n"));
}

TEST_CASE("private: an EXEC that fails before its time leaves the keys watched")
{
    NEEDS_SERVER();
    Both both(one_loop(), {}, {}, movable_clock());
    const bool aborted = GENERATE(true, false);
    CHECK(ask(both.peer, "WATCH", "k") == "+OK\r\n");
    if (aborted) { // that ends it
        say(both.peer, wires({"MULTI", "NOSUCH", "EXEC"}));
        CHECK(starts_with(hear_some(both.peer, 3)[2], "-EXECABORT"));
    } else {
        CHECK(starts_with(ask(both.peer, "EXEC"), "-ERR EXEC without MULTI"));
    }
    ahead_ns += 6000000000u;
    ask(both.other, "ECHO", "a");
    ask(both.other, "ECHO", "a");
    ask(both.direct, "SET", "k", "1");
    say(both.peer, wires({"MULTI", "SET k 2", "EXEC"}));
    CHECK(hear_some(both.peer, 3)[2] == (aborted ? "*1\r\n+OK\r\n" : "*-1\r\n"));
}

TEST_CASE("private: where no connection may be opened, nothing runs in the wrong state")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    vkp_relay_config config = {};
    const bool off = GENERATE(true, false);
    config.shared_only = off;
    config.private_max = 1;
    Both both(setup, config);
    Peer holder = both.relay.client();
    ask(both.other, "SET", "k", "v");
    if (!off) {
        CHECK(ask(holder, "SELECT", "1") == "+OK\r\n");
    }
    // What blocks is refused, and the client goes on.
    CHECK(starts_with(ask(both.peer, "BLPOP", "l", "0"), "-DENIED "));
    CHECK(ask(both.peer, "GET", "k") == bulk("v"));
    say(both.peer, wires({"MULTI", "SET k lost", "BLPOP l 0", "EXEC", "GET k"}));
    Strings heard = hear_some(both.peer, 5);
    CHECK(starts_with(heard[2], "-DENIED "));
    CHECK(starts_with(heard[3], "-EXECABORT"));
    CHECK(heard[4] == bulk("v"));
    say(both.peer, wires({"MULTI", "SELECT 5", "SET k lost", "EXEC", "GET k"}));
    heard = hear_some(both.peer, 5);
    CHECK(starts_with(heard[1], "-DENIED "));
    CHECK(starts_with(heard[3], "-EXECABORT"));
    CHECK(heard[4] == bulk("v"));
    // Behind a state that is missing nothing is executed.
    for (const char *state : {"SELECT 5", "WATCH k", "AUTH ann pw", "MONITOR", "CLIENT TRACKING ON",
                              "CLIENT REPLY OFF", "HELLO 3 AUTH ann pw", "READONLY"}) {
        INFO(state);
        Peer peer = both.relay.client();
        say(peer, wires({"GET k", state, "FLUSHDB", "SET k lost"}));
        heard = hear_all(peer);
        REQUIRE(heard.size() == 2);
        CHECK(heard[0] == bulk("v"));
        CHECK(starts_with(heard[1], "-DENIED "));
        CHECK(ask(both.other, "GET", "k") == bulk("v"));
    }
    CHECK(ask(both.peer, "SELECT", "0") == "+OK\r\n");
    CHECK(ask(both.peer, "UNWATCH") == "+OK\r\n");
    CHECK(both.relay.stats().privates_refused == 11);
    if (!off) { // a place that is free again is used
        holder.reset();
        both.until_privates(0);
        CHECK(ask(both.peer, "SELECT", "1") == "+OK\r\n");
    }
}

TEST_CASE("private: a server that is not there closes the client, after a while")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Both both(setup);
    const bool comes_back = GENERATE(true, false);
    vkp_test_server_kill(both.server.get());
    say(both.peer, wires({"SELECT 1", "SET k v"}));
    if (comes_back) {
        vkp_test_server_restart(both.server.get());
        CHECK(hear_some(both.peer, 2) == Strings(2, "+OK\r\n"));
    } else {
        CHECK(hear_all(both.peer).empty());
        vkp_test_server_restart(both.server.get());
        Relay::until_connected(both.other);
    }
}

TEST_CASE("private: a client that does not read stops its own server connection only")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Both both(setup);
    CHECK(ask(both.peer, "SELECT", "1") == "+OK\r\n");
    CHECK(ask(both.peer, "SET", "big", std::string(1000000, 'x')) == "+OK\r\n");
    std::string script;
    for (int i = 0; i < 100; i++) {
        script += wire("GET big");
    }
    say(both.peer, script);
    for (int i = 0; i < 50; i++) {
        CHECK(ask(both.other, "ECHO", "a") == bulk("a"));
    }
    CHECK(vkp_test_env_live_bytes(&both.relay.test) < 16000000);
    for (int i = 0; i < 100; i++) {
        REQUIRE(hear(both.peer).size() == 1000000 + 12);
    }
    CHECK(ask(both.peer, "DBSIZE") == ":1\r\n");
}

TEST_CASE("private: WAIT waits for the writes that went another way")
{
    NEEDS_SERVER();
    Both both(one_loop());
    CHECK(ask(both.direct, "CONFIG", "SET", "repl-diskless-sync-delay", "0") == "+OK\r\n");
    Server replica = start_server();
    const std::string port = std::to_string(vkp_test_server_port(both.server.get()));
    Peer there = open(vkp_test_server_unix(replica.get()));
    CHECK(ask(there, "REPLICAOF", "127.0.0.1", port) == "+OK\r\n");
    vkp_test_wait_until("the replica", [&] {
        return contains(ask(both.direct, "INFO", "replication"), "state=online");
    });
    CHECK(ask(both.peer, "SET", "k", "v") == "+OK\r\n");
    CHECK(ask(both.peer, "WAIT", "1", "0") == ":1\r\n");
    CHECK(::kill(vkp_test_server_pid(replica.get()), SIGSTOP) == 0);
    CHECK(ask(both.peer, "RESET") == "+RESET\r\n"); // shares again
    CHECK(ask(both.peer, "SET", "k", "w") == "+OK\r\n");
    CHECK(ask(both.peer, "WAIT", "1", "50") == ":0\r\n");
    CHECK(::kill(vkp_test_server_pid(replica.get()), SIGCONT) == 0);
    CHECK(ask(both.peer, "WAIT", "1", "0") == ":1\r\n");
    // Without the right to the message before it WAIT would wait for nothing.
    ask(both.direct, "ACL", "SETUSER", "bob", "on", ">pw", "+@all", "~*", "resetchannels");
    CHECK(ask(both.peer, "AUTH", "bob", "pw") == "+OK\r\n");
    say(both.peer, wires({"WAIT 1 0", "ECHO a", "WAIT 1 0", "ECHO b"}));
    const Strings heard = hear_some(both.peer, 4);
    CHECK(starts_with(heard[0], "-NOPERM"));
    CHECK(heard[1] == bulk("a"));
    CHECK(starts_with(heard[2], "-NOPERM"));
    CHECK(heard[3] == bulk("b"));
}

TEST_CASE("private: a relay that ends does not wait for what blocks")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Both both(setup);
    say(both.peer, wire("BLPOP l 0"));
    both.until_blocked(1);
    Peer third = both.relay.client();
    CHECK(ask(third, "SELECT", "1") == "+OK\r\n");
    std::atomic<bool> ended = {false};
    both.relay.on_loop([&] {
        vkp_relay_drain(
            both.relay, [](void *user) { *static_cast<std::atomic<bool> *>(user) = true; }, &ended,
            VKP_FOREVER);
    });
    CHECK(hear(both.peer).empty());
    CHECK(hear(third).empty());
    vkp_test_wait_until("the end of the drain", [&] { return ended.load(); });
    CHECK(both.relay.stats().privates == 0);
}

} // namespace

// ---------------------------------------------------------------------------------------------
// One client acts on another

namespace {

std::string id_of(const Peer &peer)
{
    const std::string reply = ask(peer, "CLIENT", "ID");
    return reply.substr(1, reply.size() - 3);
}

} // namespace

TEST_CASE("private: a client's number names that client, whichever loop it is on")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Server server = start_server();
    Relay relay(setup, upstream_of(vkp_test_server_unix(server.get())));
    relay.connected_client();
    Peer peer = relay.client();
    std::vector<Peer> others = relay.client_per_loop();
    SECTION("KILL")
    {
        for (const Peer &other : others) {
            say(peer, wires({"ECHO before", "CLIENT KILL ID " + id_of(other), "ECHO behind"}));
            CHECK(hear_some(peer, 3) == Strings{bulk("before"), ":1\r\n", bulk("behind")});
            CHECK(hear(other).empty());
            CHECK(ask(peer, "CLIENT", "KILL", "ID", std::to_string((1ull << 40) + 5000)) ==
                  ":0\r\n");
        }
        const std::string own = id_of(peer);
        CHECK(ask(peer, "CLIENT", "KILL", "ID", own) == ":0\r\n"); // SKIPME yes
        CHECK(ask(peer, "CLIENT", "KILL", "ID", own, "SKIPME", "yes") == ":0\r\n");
        say(peer, wires({"ECHO a", "CLIENT KILL ID " + own + " SKIPME no", "ECHO b"}));
        CHECK(hear_some(peer, 2) == Strings{bulk("a"), ":1\r\n"});
        CHECK(hear(peer).empty());
    }
    SECTION("UNBLOCK")
    {
        const std::string protocol = GENERATE("2", "3");
        Peer direct = open(vkp_test_server_unix(server.get()));
        for (const Peer &other : others) {
            ask(other, "HELLO", protocol);
            CHECK(ask(peer, "CLIENT", "UNBLOCK", id_of(other)) == ":0\r\n"); // nothing blocks it
            const std::string id = id_of(other);
            for (const std::string how : {"", " TIMEOUT", " ERROR"}) {
                say(other, wire("BLPOP none 0"));
                vkp_test_wait_until("it blocks", [&] {
                    return contains(ask(direct, "INFO", "clients"), "blocked_clients:1\r\n");
                });
                say(peer, wires({"CLIENT UNBLOCK " + id + how, "ECHO behind"}));
                CHECK(hear_some(peer, 2) == Strings{":1\r\n", bulk("behind")});
                const std::string end = hear(other);
                INFO(end);
                CHECK((how == " ERROR" ? starts_with(end, "-UNBLOCKED")
                                       : end == (protocol == "3" ? "_\r\n" : "*-1\r\n")));
            }
            ask(other, "RESET");
        }
    }
    SECTION("from a connection of one's own")
    {
        ask(peer, "SELECT", "1");
        say(peer, wires({"ECHO a", "CLIENT KILL ID " + id_of(others.back()), "ECHO b",
                         "CLIENT KILL ID 4000000", "ECHO c"}));
        CHECK(hear_some(peer, 5) == Strings{bulk("a"), ":1\r\n", bulk("b"), ":0\r\n", bulk("c")});
    }
}

TEST_CASE("private: connections of the relay are no clients that one may kill")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Both both(setup);
    CHECK(ask(both.other, "SELECT", "1") == "+OK\r\n");
    CHECK(ask(both.other, "SET", "k", "v") == "+OK\r\n");
    const std::string list = ask(both.direct, "CLIENT", "LIST");
    int own = 0;
    const std::string direct = id_of(both.direct);
    for (size_t at = list.find("id="); at != std::string::npos; at = list.find("\nid=", at + 1)) {
        at += list[at] == '\n' ? 1 : 0;
        const std::string id = list.substr(at + 3, list.find(' ', at) - at - 3);
        if (id != direct) {
            own++;
            CHECK(ask(both.peer, "CLIENT", "KILL", "ID", id) == ":0\r\n");
            CHECK(ask(both.peer, "CLIENT", "UNBLOCK", id) == ":0\r\n");
        }
    }
    CHECK(own >= 3); // pushes, shared commands, one client's
    for (const char *filter :
         {"TYPE normal", "USER default", "TYPE pubsub", "SKIPME no", "LADDR 127.0.0.1:1",
          "ADDR 127.0.0.1:1", "127.0.0.1:1", "ID 5 TYPE normal"}) {
        INFO(filter);
        say(both.peer, wire(std::string("CLIENT KILL ") + filter));
        CHECK(starts_with(hear(both.peer), "-DENIED "));
    }
    // What is no number is the server's to answer.
    CHECK(ask(both.peer, "CLIENT", "KILL", "ID", "x") ==
          ask(both.direct, "CLIENT", "KILL", "ID", "x"));
    CHECK(ask(both.peer, "CLIENT", "KILL", "ID", direct) == ":1\r\n");
    CHECK(hear(both.direct).empty());
    CHECK(ask(both.other, "GET", "k") == bulk("v"));
    CHECK(both.relay.stats().outages == 0);
}

TEST_CASE("private: stand-alone, too, a client's number names that client")
{
    EVERY_SETUP();
    Relay relay(setup);
    Peer peer = relay.client();
    for (const Peer &other : relay.client_per_loop()) {
        const std::string id = id_of(other);
        CHECK(ask(peer, "CLIENT", "UNBLOCK", id) == ":0\r\n");
        CHECK(ask(peer, "CLIENT", "KILL", "ID", "12") == ":0\r\n");
        CHECK(ask(peer, "CLIENT", "KILL", "ID", id) == ":1\r\n");
        CHECK(hear(other).empty());
    }
}
