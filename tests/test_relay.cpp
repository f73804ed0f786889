// SPDX-License-Identifier: MIT
//
// The relay in this process, its loops in threads, its clients over real sockets: what a client
// library would notice, checked where possible against a real server that hears the same bytes.
#include "support/catch.hpp"

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "support/relay_probe.h"

namespace {

using namespace relay_probe;

const Strings strings_and_keys = {"SET k v",
                                  "GET k",
                                  "GET none",
                                  "APPEND k w",
                                  "STRLEN k",
                                  "INCR n",
                                  "INCRBYFLOAT n 1.5",
                                  "MSET a 1 b 2",
                                  "MGET a none b",
                                  "GETRANGE k 0 0",
                                  "SETNX k x",
                                  "SET k x NX",
                                  "SET k y GET",
                                  "GETDEL a",
                                  "INCR k",
                                  "TYPE k",
                                  "EXISTS k none",
                                  "DEL b",
                                  "EXPIRE k 1000",
                                  "PERSIST k",
                                  "OBJECT ENCODING n",
                                  "OBJECT ENCODING none",
                                  "OBJECT HELP",
                                  "BITFIELD bf OVERFLOW FAIL INCRBY u2 0 9",
                                  "SETBIT bits 7 1",
                                  "BITCOUNT bits",
                                  "LCS k n",
                                  "NOSUCHCOMMAND a b",
                                  "GET",
                                  "SET k",
                                  "LPUSH k 1",
                                  "EVAL return{1,2.5,'three',{4},false,true} 0",
                                  "EVAL return{double=3.25} 0",
                                  "EVAL return{map={a=1}} 0",
                                  "EVAL return{err='CODE_text'} 0",
                                  "EVAL return{ok='fine'} 0",
                                  "SCRIPT EXISTS 0000000000000000000000000000000000000000",
                                  "ECHO hello",
                                  "DBSIZE",
                                  "LOLWUT VERSION 5 20 1 1",
                                  "CONFIG GET maxmemory",
                                  "CONFIG GET max*-entries",
                                  "CONFIG GET nosuch",
                                  "COMMAND INFO get nosuch",
                                  "COMMAND COUNT",
                                  "COMMAND DOCS get",
                                  "COMMAND GETKEYS MSET a b c d",
                                  "COMMAND LIST FILTERBY PATTERN xa*",
                                  "ACL WHOAMI",
                                  "ACL GETUSER default",
                                  "ACL GETUSER nobody",
                                  "MEMORY USAGE none",
                                  "PUBLISH nobody hi",
                                  "PUBSUB CHANNELS",
                                  "PUBSUB NUMSUB a b",
                                  "PUBSUB NUMPAT",
                                  "PUBSUB SHARDCHANNELS",
                                  "SPUBLISH nobody hi"};

const Strings aggregates = {
    "RPUSH l a b c a b a",
    "LRANGE l 0 -1",
    "LPOS l a",
    "LPOS l none",
    "LPOS l a COUNT 0",
    "LPOS l none COUNT 0",
    "LPOP l",
    "LPOP l 2",
    "RPOP l 1",
    "LPOP none",
    "LPOP none 2",
    "RPOP none 1",
    "LPOP l 0",
    "LMPOP 1 none LEFT",
    "LMPOP 2 none l LEFT COUNT 2",
    "LINSERT l BEFORE none x",
    "LLEN l",
    "HSET h f 1 g 2",
    "HGETALL h",
    "HGETALL none",
    "HGET h none",
    "HMGET h f none g",
    "HKEYS h",
    "HVALS h",
    "HRANDFIELD h 5 WITHVALUES",
    "HRANDFIELD h 5",
    "HRANDFIELD none",
    "HRANDFIELD none 3",
    "HRANDFIELD none 3 WITHVALUES",
    "HINCRBYFLOAT h f 0.5",
    "HSCAN h 0",
    "SADD s 1 2 3",
    "SMEMBERS s",
    "SMEMBERS none",
    "SISMEMBER s 2",
    "SMISMEMBER s 2 9",
    "SSCAN s 0",
    "SINTER s s",
    "SUNION s none",
    "SDIFF s none",
    "SINTERCARD 1 s",
    "SPOP none",
    "SPOP none 2",
    "SRANDMEMBER s 5",
    "SRANDMEMBER none",
    "SPOP s 3",
    "ZADD z 1 a 2.5 b inf c -inf d 0.1 e",
    "ZADD z INCR 1 a",
    "ZADD z XX INCR 1 none",
    "ZSCORE z b",
    "ZSCORE z c",
    "ZSCORE z none",
    "ZMSCORE z a none c",
    "ZRANGE z 0 -1",
    "ZRANGE z 0 -1 WITHSCORES",
    "ZRANGE none 0 -1 WITHSCORES",
    "ZRANGE z 1 3 BYSCORE WITHSCORES LIMIT 0 1",
    "ZRANGEBYSCORE z 0 9 WITHSCORES",
    "ZREVRANGE z 0 1 WITHSCORES",
    "ZREVRANGEBYSCORE z 9 0 WITHSCORES",
    "ZRANGEBYLEX z - +",
    "ZRANK z a",
    "ZRANK z none",
    "ZREVRANK z none",
    "ZRANK z a WITHSCORE",
    "ZRANK z none WITHSCORE",
    "ZINCRBY z 0.25 b",
    "ZCOUNT z 0 5",
    "ZRANDMEMBER z 9",
    "ZRANDMEMBER z 9 WITHSCORES",
    "ZRANDMEMBER none",
    "ZRANDMEMBER none 2 WITHSCORES",
    "ZUNION 2 z none WITHSCORES",
    "ZINTER 2 z z WITHSCORES",
    "ZDIFF 2 z none WITHSCORES",
    "ZDIFF 2 z none",
    "ZSCAN z 0",
    "ZPOPMIN z",
    "ZPOPMIN z 2",
    "ZPOPMAX none",
    "ZPOPMAX none 2",
    "ZPOPMAX z 9",
    "ZMPOP 1 none MIN",
    "ZADD z 1 a 2 b",
    "ZMPOP 1 z MIN COUNT 5",
    "GEOADD g 13.361389 38.115556 P 15.087269 37.502669 C",
    "GEOPOS g P none C",
    "GEOPOS none a",
    "GEODIST g P C km",
    "GEODIST g P none",
    "GEOHASH g P none",
    "GEOSEARCH g FROMLONLAT 15 37 BYRADIUS 200 km ASC WITHCOORD WITHDIST WITHHASH",
    "GEORADIUS none 1 1 1 km",
    "SCAN 0 COUNT 1000",
    "SORT l ALPHA",
    "SORT none",
    "SORT s BY none GET # GET w_*"};

const Strings streams = {"XADD x 1-1 f 1",
                         "XADD x 2-1 f 2 g 3",
                         "XADD x NOMKSTREAM 3-1 f 3",
                         "XADD none NOMKSTREAM 3-1 f 3",
                         "XLEN x",
                         "XRANGE x - +",
                         "XRANGE none - +",
                         "XREVRANGE x + - COUNT 1",
                         "XREAD STREAMS x 0",
                         "XREAD COUNT 1 STREAMS x none 0 0",
                         "XREAD STREAMS x 9-9",
                         "XREAD STREAMS none 0",
                         "XGROUP CREATE x grp 0",
                         "XPENDING x grp",
                         "XREADGROUP GROUP grp me COUNT 2 STREAMS x >",
                         "XREADGROUP GROUP grp me STREAMS x >",
                         "XREADGROUP GROUP grp me STREAMS x 0",
                         "XPENDING x grp",
                         "XACK x grp 1-1",
                         "XDEL x 2-1",
                         "XREADGROUP GROUP grp me STREAMS x 0",
                         "XINFO GROUPS x",
                         "XINFO STREAM x",
                         "XCLAIM x grp me 0 2-1",
                         "XAUTOCLAIM x grp me 0 0",
                         "XADD x 5-0 f v",
                         "XSETID x 6-0",
                         "XTRIM x MAXLEN 0",
                         "XREADGROUP GROUP grp me STREAMS x >",
                         "XREADGROUP GROUP nogroup me STREAMS x >"};

// Pushes aside: a push on the relay's connection is the relay's.
const Strings debug_types = {
    "DEBUG PROTOCOL string", "DEBUG PROTOCOL integer", "DEBUG PROTOCOL double",
    "DEBUG PROTOCOL null",   "DEBUG PROTOCOL array",   "DEBUG PROTOCOL set",
    "DEBUG PROTOCOL map",    "DEBUG PROTOCOL attrib",  "DEBUG PROTOCOL verbatim",
    "DEBUG PROTOCOL true",   "DEBUG PROTOCOL false",   "DEBUG PROTOCOL bignum"};

Strings in_multi(const Strings &commands)
{
    Strings all = {"MULTI"};
    for (const std::string &command : commands) {
        // A transaction with a command that cannot be parsed is another test's.
        if (command != "GET" && command != "SET k" && !starts_with(command, "NOSUCH") &&
            !ends_with(command, " WITHSCORE")) {
            all.push_back(command);
        }
    }
    all.push_back("EXEC");
    return all;
}

TEST_CASE("relayed commands answer as directly, in RESP2 and RESP3, and inside MULTI")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Differential differential(setup);
    for (const Strings &commands : {strings_and_keys, aggregates, streams, debug_types}) {
        differential.run(wires(commands)); // no HELLO at all
        differential.run_both(wires(commands));
        differential.run_both(wires(commands), 11);
        differential.run_both(wires(in_multi(commands)));
    }
}

TEST_CASE("each reply alone is that of the server")
{
    NEEDS_SERVER();
    const Setup setup = one_loop();
    Differential differential(setup);
    // The same as above, but each mistake shows by itself instead of hiding behind the first.
    for (const Strings &commands : {strings_and_keys, aggregates, streams, debug_types}) {
        std::string before;
        for (const std::string &command : commands) {
            differential.run_both(before + wire(command));
            before += wire(command);
        }
    }
}

TEST_CASE("what is answered locally is answered as the server does")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Differential differential(setup);
    const Strings script = {"PING",
                            "PING hi",
                            "PING a b",
                            "ping",
                            "HELLO",
                            "HELLO 3",
                            "PING",
                            "HELLO 2",
                            "PING",
                            "HELLO 3 SETNAME me",
                            "CLIENT GETNAME",
                            "HELLO 9",
                            "HELLO abc",
                            "HELLO 3 NOSUCH",
                            "HELLO 3 SETNAME",
                            "CLIENT GETNAME",
                            "HELLO 2",
                            "CLIENT GETNAME",
                            "CLIENT SETNAME you",
                            "CLIENT GETNAME",
                            "CLIENT SETNAME \"\"",
                            "CLIENT GETNAME",
                            "CLIENT SETNAME bad\x01name",
                            "CLIENT GETNAME",
                            "CLIENT",
                            "CLIENT NOSUCH",
                            "ECHO",
                            "PUBLISH a",
                            "PUBSUB",
                            "PUBSUB NOSUCH",
                            "SUBSCRIBE",
                            "PSUBSCRIBE",
                            "SSUBSCRIBE",
                            "UNSUBSCRIBE",
                            "EXEC",
                            "DISCARD",
                            "MULTI",
                            "MULTI",
                            "DISCARD",
                            "MULTI",
                            "EXEC",
                            "MULTI",
                            "PING",
                            "PING hi",
                            "EXEC",
                            "MULTI a",
                            "RESET",
                            "PING",
                            "RESET",
                            "HELLO 3",
                            "CLIENT SETNAME again",
                            "RESET",
                            "CLIENT GETNAME",
                            "MULTI",
                            "RESET",
                            "EXEC",
                            "QUIT",
                            "PING"};
    differential.run(wires(script));
    differential.run(wires(script), 7);
    differential.run(wires({"PING", "MULTI", "QUIT", "PING"}));
    // Empty commands are no commands.
    differential.run("\r\n*0\r\n*-1\r\n" + wire("PING"));
    if (differential.answers(" \r\n" + wire("PING"), "+PONG")) { // valkey 8 takes *1 for a command
        differential.run("\r\n*0\r\n*-1\r\n \r\n" + wire("PING"));
    }
}

TEST_CASE("inline commands, quoted or not")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Differential differential(setup);
    differential.run_both(
        "PING\r\nPING\n  PING   hi  \r\nSET k \"a b\\r\\n\\t\\\\\\\"\\x41\\x0g\\q\"\r\n"
        "GET k\r\nSET k 'it\\'s \"so\" \\n'\r\nGET k\r\nSET k \"\"\r\nGET k\r\n"
        "SET\tk\ttabs\r\nGET k\r\nECHO a\"b c\"\r\nECHO a'b'\r\n"
        "ECHO \"\\a\\b\"\r\nECHO \\n\r\nget K\r\nSUBSCRIBE 'a b' c\r\nUNSUBSCRIBE \"a b\"\r\n");
    for (const char *broken : {"ECHO \"a\r\n", "ECHO 'a\r\n", "ECHO \"a\"b\r\n", "ECHO 'a'b\r\n"}) {
        if (differential.answers(broken, "-ERR Protocol error")) { // valkey 9 takes "a"b
            differential.run(wire("PING") + broken);
        }
    }
    differential.run_both("PING\r\nECHO one\r\n" + wire("ECHO two") + "ECHO three\r\n", 3);
}

TEST_CASE("the SUBSCRIBE family answers byte for byte as the server")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Differential differential(setup);
    const Strings script = {"SUBSCRIBE a b c",
                            "SUBSCRIBE a",
                            "SUBSCRIBE d d",
                            "UNSUBSCRIBE nope",
                            "PSUBSCRIBE p* q*",
                            "PSUBSCRIBE p*",
                            "PING",
                            "PING hi",
                            "UNSUBSCRIBE a",
                            "UNSUBSCRIBE a",
                            "UNSUBSCRIBE d d",
                            "SSUBSCRIBE s1 s2",
                            "SSUBSCRIBE s1",
                            "SUBSCRIBE",
                            "PUNSUBSCRIBE nope",
                            "PUNSUBSCRIBE q*",
                            "PUNSUBSCRIBE",
                            "SUNSUBSCRIBE s1",
                            "SUNSUBSCRIBE nope",
                            "GET k",
                            "get k",
                            "PUBLISH nobody hi",
                            "UNSUBSCRIBE b",
                            "UNSUBSCRIBE",
                            "PING",
                            "SUNSUBSCRIBE",
                            "PING",
                            "UNSUBSCRIBE",
                            "PUNSUBSCRIBE",
                            "SUNSUBSCRIBE",
                            "GET k",
                            "SUBSCRIBE \"\"",
                            "PSUBSCRIBE \"\"",
                            "UNSUBSCRIBE \"\"",
                            "PUNSUBSCRIBE \"\"",
                            "SSUBSCRIBE \"\"",
                            "PING",
                            "RESET",
                            "PING",
                            "CLIENT GETNAME"};
    differential.run_both(wires(script));
    differential.run_both(wires(script), 5);
    differential.run(wires({"HELLO 3", "SUBSCRIBE a", "HELLO 2", "PING", "HELLO 3", "UNSUBSCRIBE",
                            "HELLO 3", "PING"}));
    differential.run(wires({"SUBSCRIBE a", "QUIT", "PING"}));
    // Names hold any byte.
    std::string odd("\0\r\n\xff* ", 6);
    differential.run_both(vkp_test_wire({"SUBSCRIBE", odd, "b"}) +
                          vkp_test_wire({"UNSUBSCRIBE", odd}));
    // One command with very many names.
    Strings names = {"SUBSCRIBE"};
    for (int i = 0; i < 2000; i++) {
        names.push_back("name" + std::to_string(i));
    }
    std::string many = vkp_test_wire(names);
    names[0] = "UNSUBSCRIBE";
    differential.run_both(many + vkp_test_wire(names));
}

TEST_CASE("subscriptions and commands do not share a fate")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Server server = start_server();
    vkp_relay_config config = upstream_of(vkp_test_server_unix(server.get()));
    config.upstreams = 2;
    Relay relay(setup, config);
    Peer first = relay.connected_client();
    Peer second = relay.connected_client();
    Peer subscriber = relay.client();
    say(subscriber, vkp_test_wire({"SUBSCRIBE", "c"}));
    CHECK(hear(subscriber) == confirmation(2, "subscribe", "c", 1));
    Peer direct = open(vkp_test_server_unix(server.get()));
    CHECK(relay_connections(direct) == 3);
    SECTION("the server kills a connection of commands")
    {
        // Each message arrives: none may be missing around the kill, and nobody reconnects.
        for (int i = 0; i < 20; i++) {
            const std::string number = std::to_string(i);
            if (i == 10) {
                CHECK(ask(direct, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes") == ":2\r\n");
            }
            CHECK(ask(direct, "PUBLISH", "c", number) == ":1\r\n");
            CHECK(hear(subscriber) == message(2, "c", number));
        }
        Relay::until_connected(first);
        Relay::until_connected(second);
    }
    SECTION("the server kills the connection of subscriptions")
    {
        CHECK(ask(direct, "CLIENT", "KILL", "TYPE", "pubsub") == ":1\r\n");
        for (int i = 0; i < 20; i++) { // no command fails
            CHECK(ask(first, "ECHO", "a") == bulk("a"));
            CHECK(ask(second, "ECHO", "b") == bulk("b"));
        }
        until_numsub(direct, "c", 1);
        CHECK(ask(direct, "PUBLISH", "c", "back") == ":1\r\n");
        CHECK(hear(subscriber) == message(2, "c", "back"));
    }
    SECTION("replies pile up beyond the limit of subscribers")
    {
        ask(direct, "CONFIG", "SET", "client-output-buffer-limit", "pubsub 1mb 1mb 1");
        ask(direct, "SET", "k", std::string(100000, 'x'));
        std::string script;
        for (int i = 0; i < 1000; i++) {
            script += vkp_test_wire({"GET", "k"});
        }
        say(first, script);
        for (int i = 0; i < 1000; i++) {
            REQUIRE(hear(first).size() == 100000 + 11);
        }
        CHECK(ask(direct, "PUBLISH", "c", "there") == ":1\r\n");
        CHECK(hear(subscriber) == message(2, "c", "there"));
        CHECK(!vkp_test_env_logged(&relay.test, "disconnected"));
    }
}

TEST_CASE("commands that break the protocol end that client, not the connection they would share")
{
    NEEDS_SERVER();
    const Setup setup = one_loop();
    Server server = start_server();
    Relay relay(setup, upstream_of(vkp_test_server_unix(server.get())));
    relay.connected_client();
    for (const char *broken :
         {"*1\r\n:1\r\n", "*1\r\n+PING\r\n", "*1\r\n$-1\r\n", "*1\r\n$4\r\nPINGxx", "*x\r\n",
          "*1\r\n$x\r\n", "*1\r\n$-5\r\n", "*2147483648\r\n", "*4294967295\r\n",
          "*1\r\n$4294967295\r\n", "*1\r\n*1\r\n$4\r\nPING\r\n",
          "*1\r\n|1\r\n$1\r\na\r\n$1\r\nb\r\n$4\r\nPING\r\n"}) {
        INFO(broken);
        Peer peer = relay.client();
        say(peer, wire("ECHO before") + broken);
        Strings heard = hear_all(peer);
        REQUIRE(heard.size() == 2);
        CHECK(heard[0] == bulk("before"));
        CHECK(starts_with(heard[1], "-ERR Protocol error"));
    }
    CHECK(ask(relay.client(), "ECHO", "alive") == bulk("alive"));
    CHECK(!vkp_test_env_logged(&relay.test, "disconnected"));
}

// ---------------------------------------------------------------------------------------------
// Pipelines

TEST_CASE("a pipeline of a thousand commands in one write is answered in order")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Server server = start_server();
    Relay relay(setup, upstream_of(vkp_test_server_unix(server.get())));
    Peer peer = relay.connected_client();
    // Local and forwarded, by turns; the subscribe family waits for what is out.
    std::string script;
    Strings expected;
    for (int i = 0; i < 1000; i++) {
        std::string text = std::to_string(i);
        switch (i % 5) {
        case 0:
            script += vkp_test_wire({"SET", "key", text});
            expected.push_back("+OK\r\n");
            break;
        case 1:
            script += vkp_test_wire({"PING", text});
            expected.push_back(bulk(text));
            break;
        case 2:
            script += vkp_test_wire({"GET", "key"});
            expected.push_back(bulk(std::to_string(i - 2)));
            break;
        case 3:
            script +=
                vkp_test_wire({"CLIENT", "SETNAME", text}) + vkp_test_wire({"CLIENT", "GETNAME"});
            expected.push_back("+OK\r\n");
            expected.push_back(bulk(text));
            break;
        default:
            script +=
                vkp_test_wire({"RPUSH", "list", text}) + vkp_test_wire({"BLPOP", "list", "0"});
            expected.push_back(":1\r\n");
            expected.push_back("*2\r\n" + bulk("list") + bulk(text));
        }
    }
    say(peer, script);
    CHECK(hear_some(peer, expected.size()) == expected);

    script = wire("HELLO 3");
    expected.clear();
    for (int i = 0; i < 300; i++) {
        std::string name = "c" + std::to_string(i);
        script += wire("INCR n") + vkp_test_wire({"SUBSCRIBE", name}) + wire("GET n") +
                  vkp_test_wire({"UNSUBSCRIBE", name}) + wire("PING");
        expected.push_back(":" + std::to_string(i + 1) + "\r\n");
        expected.push_back(confirmation(3, "subscribe", name, 1));
        expected.push_back(bulk(std::to_string(i + 1)));
        expected.push_back(confirmation(3, "unsubscribe", name, 0));
        expected.push_back("+PONG\r\n");
    }
    say(peer, script);
    CHECK(starts_with(hear(peer), "%7"));
    CHECK(hear_some(peer, expected.size()) == expected);
}

TEST_CASE("pipelines of many clients do not mix")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Server server = start_server();
    Relay relay(setup, upstream_of(vkp_test_server_tcp(server.get())));
    relay.connected_client();
    std::atomic<size_t> wrong{0};
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; i++) {
        threads.emplace_back([&, i] {
            Peer peer = relay.client();
            std::string id = std::to_string(i);
            for (int round = 0; round < 5; round++) {
                std::string script;
                for (int j = 0; j < 400; j++) {
                    script += vkp_test_wire({"ECHO", id + ":" + std::to_string(j)});
                }
                say(peer, script);
                for (int j = 0; j < 400; j++) {
                    wrong += hear(peer) == bulk(id + ":" + std::to_string(j)) ? 0 : 1;
                }
            }
        });
    }
    for (std::thread &thread : threads) {
        thread.join();
    }
    CHECK(wrong == 0);
}

TEST_CASE("values of ten megabytes go both ways")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Server server = start_server();
    Relay relay(setup, upstream_of(vkp_test_server_unix(server.get())));
    Peer peer = relay.connected_client();
    Peer subscriber = relay.client();
    REQUIRE(ask(subscriber, "SUBSCRIBE", "big") == confirmation(2, "subscribe", "big", 1));
    std::string value(10u << 20, 'x');
    for (size_t i = 0; i < value.size(); i += 4096) {
        value[i] = static_cast<char>('a' + i / 4096 % 26);
    }
    // Catch2 takes minutes to print ten megabytes: compare first, show an end of it.
    auto same = [&](const std::string &reply, const std::string &expected) {
        INFO(reply.substr(0, 100) << "...\n" << relay.log());
        CHECK(reply.size() == expected.size());
        CHECK((reply == expected));
    };
    CHECK(ask(peer, "SET", "big", value) == "+OK\r\n");
    CHECK(ask(peer, "STRLEN", "big") == ":10485760\r\n");
    same(ask(peer, "GET", "big"), bulk(value));
    CHECK(ask(peer, "MULTI") == "+OK\r\n");
    CHECK(ask(peer, "SET", "big", value + "y") == "+QUEUED\r\n");
    CHECK(ask(peer, "GET", "big") == "+QUEUED\r\n");
    same(ask(peer, "EXEC"), "*2\r\n+OK\r\n" + bulk(value + "y"));
    CHECK(ask(peer, "PUBLISH", "big", value) == ":1\r\n");
    same(hear(subscriber), message(2, "big", value));
}

TEST_CASE("a client that ends its side after asking still gets every answer")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Server server = start_server();
    Relay relay(setup, upstream_of(vkp_test_server_unix(server.get())));
    relay.connected_client();
    for (const char *verb : {"ECHO", "PING"}) { // forwarded, and local
        Peer peer = relay.client();
        std::string script;
        Strings expected;
        for (int i = 0; i < 3000; i++) {
            script += vkp_test_wire({verb, std::to_string(i)});
            expected.push_back(bulk(std::to_string(i)));
        }
        say(peer, script);
        REQUIRE(shutdown(vkp_test_peer_fd(peer.get()), SHUT_WR) == 0);
        CHECK(hear_all(peer) == expected);
    }
    Peer subscribing = relay.client();
    say(subscribing, wires({"HELLO 3", "GET none", "SUBSCRIBE a b", "GET none", "PING"}));
    REQUIRE(shutdown(vkp_test_peer_fd(subscribing.get()), SHUT_WR) == 0);
    Strings heard = hear_all(subscribing);
    REQUIRE(heard.size() == 6);
    CHECK(Strings(heard.begin() + 1, heard.end()) ==
          Strings{"_\r\n", confirmation(3, "subscribe", "a", 1),
                  confirmation(3, "subscribe", "b", 2), "_\r\n", "+PONG\r\n"});
    Peer half = relay.client();
    say(half, wire("ECHO whole") + "*2\r\n$4\r\nECHO\r\n$5\r\nha");
    REQUIRE(shutdown(vkp_test_peer_fd(half.get()), SHUT_WR) == 0);
    CHECK(hear_all(half) == Strings{bulk("whole")});
}

// ---------------------------------------------------------------------------------------------
// Transactions and refusals

TEST_CASE("a transaction is one block: others see all of it or nothing")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Server server = start_server();
    Relay relay(setup, upstream_of(vkp_test_server_unix(server.get())));
    Peer first = relay.connected_client();
    Peer second = relay.client();
    CHECK(ask(first, "MULTI") == "+OK\r\n");
    CHECK(ask(first, "SET", "k", "in") == "+QUEUED\r\n");
    CHECK(ask(second, "SET", "k", "out") == "+OK\r\n"); // not swallowed by the other's MULTI
    CHECK(ask(second, "GET", "k") == bulk("out"));
    CHECK(ask(first, "GET", "k") == "+QUEUED\r\n");
    CHECK(ask(first, "LPUSH", "k", "1") == "+QUEUED\r\n");
    CHECK(ask(first, "EXEC") ==
          "*3\r\n+OK\r\n$2\r\nin\r\n-WRONGTYPE Operation against a key holding the "
          "wrong kind of value\r\n");
    CHECK(ask(first, "EXEC") == "-ERR EXEC without MULTI\r\n");

    CHECK(ask(first, "MULTI") == "+OK\r\n");
    CHECK(starts_with(ask(first, "MULTI"), "-ERR ")); // in the server's words
    CHECK(ask(first, "SET", "k", "never") == "+QUEUED\r\n");
    CHECK(ask(first, "DISCARD") == "+OK\r\n");
    CHECK(ask(first, "DISCARD") == "-ERR DISCARD without MULTI\r\n");
    CHECK(ask(second, "GET", "k") == bulk("in"));

    // The server refuses what it cannot parse: nothing of the block runs.
    CHECK(ask(first, "MULTI") == "+OK\r\n");
    CHECK(ask(first, "SET", "k", "never") == "+QUEUED\r\n");
    ask(first, "SET", "k");
    CHECK(starts_with(ask(first, "EXEC"), "-EXECABORT"));
    CHECK(ask(second, "GET", "k") == bulk("in"));

    // So does the relay.
    CHECK(ask(first, "MULTI") == "+OK\r\n");
    CHECK(ask(first, "SET", "k", "never") == "+QUEUED\r\n");
    CHECK(contains(ask(first, "SUBSCRIBE", "a"), "inside MULTI"));
    CHECK(starts_with(ask(first, "EXEC"), "-EXECABORT"));
    CHECK(ask(second, "GET", "k") == bulk("in"));

    // A client that leaves in the middle leaves nothing behind.
    CHECK(ask(first, "MULTI") == "+OK\r\n");
    CHECK(ask(first, "SET", "k", "never") == "+QUEUED\r\n");
    first.reset();
    CHECK(ask(second, "GET", "k") == bulk("in"));
}

TEST_CASE("transactions of several clients at once stay whole")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Server server = start_server();
    Relay relay(setup, upstream_of(vkp_test_server_unix(server.get())));
    relay.connected_client();
    std::atomic<size_t> wrong{0};
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; i++) {
        threads.emplace_back([&, i] {
            Peer peer = relay.client();
            std::string mine = std::to_string(i);
            std::string script = wire("MULTI") + vkp_test_wire({"SET", "who", mine}) +
                                 wire("INCR n") + wire("GET who") + wire("EXEC");
            for (int round = 0; round < 100; round++) {
                say(peer, script);
                Strings heard = hear_some(peer, 5);
                wrong += contains(heard[4], "$1\r\n" + mine + "\r\n") && starts_with(heard[4], "*3")
                             ? 0
                             : 1;
            }
        });
    }
    for (std::thread &thread : threads) {
        thread.join();
    }
    CHECK(wrong == 0);
    CHECK(ask(relay.client(), "GET", "n") == bulk("400"));
}

TEST_CASE("a reply of any shape is its client's, as the server sends it")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Differential differential(setup);
    const std::string deep = "local t = {1} for i = 1, 130 do t = {t} end return t";
    const std::string line = "return redis.status_reply(string.rep('x', 70000))";
    const std::string error = "return redis.error_reply(string.rep('x', 70000))";
    const std::string number = "redis.setresp(3) return {big_number = 'abc'}";
    const std::string mixed = "redis.setresp(3) return {1, {map = {a = {set = {b = true}}}}, "
                              "{double = 1.5}, false, {verbatim_string = {format = 'txt', "
                              "string = 'v'}}}";
    std::string script;
    for (const std::string &each : {deep, line, error, number, mixed}) {
        script += vkp_test_wire({"EVAL", each, "0"}) + wire("SET k v") + wire("GET none");
    }
    // As bytes in RESP3. What RESP2 has too passes in RESP2.
    differential.run(wire("HELLO 3") + script);
    differential.run(wire("HELLO 3") + script, 7);
    script = "";
    for (const std::string &each : {deep, line, error}) {
        script += vkp_test_wire({"EVAL", each, "0"}) + wire("SET k v") + wire("GET none");
    }
    differential.run(wire("HELLO 2") + script);
}

TEST_CASE("a reply that cannot be converted is an error of its own command alone")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Server server = start_server();
    Relay relay(setup, upstream_of(vkp_test_server_unix(server.get())));
    Peer peer = relay.connected_client();
    Peer other = relay.client();
    const std::string deep =
        "redis.setresp(3) local t = {map = {a = 1}} for i = 1, 130 do t = {map = {a = t}} end "
        "return t";
    const std::string number = "redis.setresp(3) return {big_number = 'abc'}";
    for (const std::string &script : {deep, number}) {
        CHECK(starts_with(ask(peer, "EVAL", script, "0"), "-ERR the reply is"));
        CHECK(ask(other, "PING") == "+PONG\r\n");
        CHECK(ask(other, "SET", "k", "v") == "+OK\r\n");
        CHECK(ask(peer, "GET", "k") == bulk("v"));
    }
    CHECK(relay.stats().outages == 0);
    CHECK(!vkp_test_env_logged(&relay.test, "broke the protocol"));
}

TEST_CASE("what is not for clients of a relay is denied, and changes nothing")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Server server = start_server({"--enable-debug-command", "yes"});
    Relay relay(setup, upstream_of(vkp_test_server_unix(server.get())));
    Peer peer = relay.connected_client();
    Peer other = relay.client();
    ask(other, "SET", "k", "v");
    for (const char *command :
         {"SYNC", "PSYNC ? -1", "REPLCONF LISTENING-PORT 1", "CLIENT PAUSE 60000", "failover",
          "SHUTDOWN NOSAVE", "DEBUG SLEEP 60"}) {
        INFO(command);
        CHECK(starts_with((say(peer, wire(command)), hear(peer)), "-DENIED "));
        CHECK(ask(other, "GET", "k") == bulk("v"));
        // Not smuggled through a transaction either.
        say(peer, wires({"MULTI", "SET k lost", command, "EXEC"}));
        Strings heard = hear_some(peer, 4);
        CHECK(heard[1] == "+QUEUED\r\n");
        CHECK(starts_with(heard[2], "-DENIED "));
        CHECK(starts_with(heard[3], "-EXECABORT"));
        CHECK(ask(other, "GET", "k") == bulk("v"));
    }
    for (const char *command :
         {"SUBSCRIBE a", "PSUBSCRIBE a", "SSUBSCRIBE a", "UNSUBSCRIBE", "PUNSUBSCRIBE",
          "SUNSUBSCRIBE", "HELLO 3", "CLIENT ID", "CLIENT SETNAME x"}) {
        INFO(command);
        say(peer, wires({"MULTI", command, "EXEC"}));
        Strings heard = hear_some(peer, 3);
        CHECK(contains(heard[1], "inside MULTI"));
        CHECK(starts_with(heard[2], "-EXECABORT"));
    }
    CHECK(relay.stats().privates_opened == 0);
    CHECK(relay.stats().protocol_errors == 0);
}

// ---------------------------------------------------------------------------------------------
// On connect, and about oneself

TEST_CASE("a client's own state is its own")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Server server = start_server();
    const bool alone = GENERATE(true, false);
    Relay relay(setup,
                alone ? vkp_relay_config{} : upstream_of(vkp_test_server_unix(server.get())));
    Peer first = relay.client();
    Peer second = relay.client();
    if (!alone) {
        Relay::until_connected(first);
    }
    std::string id = ask(first, "CLIENT", "ID");
    CHECK(starts_with(id, ":"));
    CHECK(ask(first, "CLIENT", "ID") == id);
    CHECK(ask(second, "CLIENT", "ID") != id);
    CHECK(ask(first, "CLIENT", "SETINFO", "LIB-NAME", "lib") == "+OK\r\n");
    CHECK(ask(first, "CLIENT", "SETINFO", "LIB-VER", "1.2") == "+OK\r\n");
    CHECK(ask(first, "CLIENT", "SETNAME", "one") == "+OK\r\n");
    CHECK(ask(second, "CLIENT", "GETNAME") == "$-1\r\n");
    CHECK(starts_with(ask(second, "HELLO", "3", "SETNAME", "two"), "%7\r\n"));
    CHECK(ask(second, "CLIENT", "GETNAME") == bulk("two"));
    CHECK(ask(first, "CLIENT", "GETNAME") == bulk("one"));
    CHECK(std::stoull(id.substr(1)) > UINT64_C(1) << 40); // no number of the server's
    std::string info = ask(first, "CLIENT", "INFO");
    if (!alone) { // every field that the server has
        Peer direct = open(vkp_test_server_unix(server.get()));
        std::istringstream line(ask(direct, "CLIENT", "INFO").substr(6));
        for (std::string word; line >> word;) {
            INFO(word);
            CHECK(contains(info, word.substr(0, word.find('=') + 1)));
        }
    }
    CHECK(contains(info, " name=one "));
    CHECK(contains(info, " resp=2"));
    CHECK(contains(info, "id=" + id.substr(1, id.size() - 3) + " "));
    ask(second, "SUBSCRIBE", "a");
    ask(second, "PSUBSCRIBE", "b*");
    info = ask(second, "CLIENT", "INFO");
    CHECK(contains(info, " sub=1 psub=1 ssub=0 "));
    CHECK(contains(info, " resp=3"));
    CHECK(starts_with(info, "=" + std::to_string(info.size() - 8) + "\r\ntxt:id=")); // verbatim
    CHECK(contains(ask(second, "HELLO"), "$5\r\nproto\r\n:3\r\n"));
    CHECK(ask(second, "RESET") == "+RESET\r\n");
    CHECK(contains(ask(second, "HELLO"), "$5\r\nproto\r\n:2\r\n"));
    CHECK(ask(second, "CLIENT", "GETNAME") == "$-1\r\n");
    CHECK(ask(second, "QUIT") == "+OK\r\n");
    CHECK(hear(second).empty());
}

TEST_CASE("stand-alone: what client libraries ask on connect has an answer")
{
    EVERY_SETUP();
    Relay relay(setup);
    Peer peer = relay.client();
    CHECK(ask(peer, "COMMAND") == "*0\r\n");
    CHECK(ask(peer, "COMMAND", "DOCS") == "*0\r\n");
    CHECK(ask(peer, "COMMAND", "COUNT") == ":0\r\n");
    CHECK(ask(peer, "CONFIG", "GET", "*") == "*0\r\n");
    CHECK(ask(peer, "ECHO", "hi") == bulk("hi"));
    std::string info = ask(peer, "INFO");
    CHECK(contains(info, "redis_mode:standalone\r\n"));
    CHECK(contains(info, "connected_clients:1\r\n"));
    CHECK(contains(info, "loading:0\r\n"));
    CHECK(contains(info, std::string("valkey_push_version:") + vkp_version_str() + "\r\n"));
    CHECK(starts_with(ask(peer, "HELLO", "3"), "%7\r\n"));
    CHECK(ask(peer, "COMMAND", "DOCS") == "%0\r\n");
    CHECK(ask(peer, "CONFIG", "GET", "*") == "%0\r\n");
    CHECK(ask(peer, "CLIENT", "GETNAME") == "_\r\n");
    for (const char *command : {"GET k", "MULTI", "SET k v", "CLIENT KILL TYPE normal", "NOSUCH"}) {
        say(peer, wire(command));
        CHECK(starts_with(hear(peer), "-ERR "));
    }
    CHECK(contains(ask(peer, "GET", "k"), "stands alone"));
    CHECK(contains(ask(peer, "MULTI"), "needs an upstream server"));
    CHECK(ask(peer, "PING") == "+PONG\r\n");
    // Control bytes of a command are not sent back raw: an answer stays one line.
    say(peer, vkp_test_wire({"A\r\n+B"}));
    CHECK(contains(hear(peer), "'A  +B'"));
    CHECK(ask(peer, "PING") == "+PONG\r\n");
}

// ---------------------------------------------------------------------------------------------
// Publishing and subscribing

TEST_CASE("stand-alone: PUBLISH reaches clients of every loop and counts them")
{
    EVERY_SETUP();
    Relay relay(setup);
    Peer publisher = relay.client();
    CHECK(ask(publisher, "PUBLISH", "news", "nobody") == ":0\r\n");
    std::vector<Peer> subscribers;
    for (int i = 0; i < 12; i++) {
        subscribers.push_back(relay.client());
        if (i % 2 == 1) {
            ask(subscribers.back(), "HELLO", "3");
        }
        int protocol = 2 + i % 2;
        CHECK(ask(subscribers.back(), "SUBSCRIBE", "news") ==
              confirmation(protocol, "subscribe", "news", 1));
        if (i < 6) {
            CHECK(ask(subscribers.back(), "PSUBSCRIBE", "n*") ==
                  confirmation(protocol, "psubscribe", "n*", 2));
        }
        if (i < 4) {
            CHECK(ask(subscribers.back(), "SSUBSCRIBE", "shard") ==
                  confirmation(protocol, "ssubscribe", "shard", 1));
        }
    }
    CHECK(ask(publisher, "PUBSUB", "NUMSUB", "news", "none") ==
          "*4\r\n$4\r\nnews\r\n:12\r\n$4\r\nnone\r\n:0\r\n");
    CHECK(ask(publisher, "PUBSUB", "NUMSUB") == "*0\r\n");
    CHECK(ask(publisher, "PUBSUB", "NUMPAT") == ":1\r\n");
    CHECK(ask(publisher, "PUBSUB", "CHANNELS") == "*1\r\n$4\r\nnews\r\n");
    CHECK(ask(publisher, "PUBSUB", "CHANNELS", "x*") == "*0\r\n");
    CHECK(ask(publisher, "PUBSUB", "CHANNELS", "[mn]ew?") == "*1\r\n$4\r\nnews\r\n");
    CHECK(ask(publisher, "PUBSUB", "SHARDCHANNELS") == "*1\r\n$5\r\nshard\r\n");
    CHECK(ask(publisher, "PUBSUB", "SHARDNUMSUB", "shard") == "*2\r\n$5\r\nshard\r\n:4\r\n");
    CHECK(ask(publisher, "PUBLISH", "news", "hi") == ":18\r\n");
    CHECK(ask(publisher, "PUBLISH", "nothing", "x") == ":6\r\n");
    CHECK(ask(publisher, "SPUBLISH", "shard", "to shard") == ":4\r\n");
    CHECK(ask(publisher, "SPUBLISH", "news", "x") == ":0\r\n");
    for (int i = 0; i < 12; i++) {
        INFO(i);
        std::string begin = i % 2 ? ">" : "*";
        std::multiset<std::string> expected = {message(2 + i % 2, "news", "hi")};
        if (i < 6) {
            expected.insert(begin + "4\r\n" + bulk("pmessage") + bulk("n*") + bulk("news") +
                            bulk("hi"));
            expected.insert(begin + "4\r\n" + bulk("pmessage") + bulk("n*") + bulk("nothing") +
                            bulk("x"));
        }
        if (i < 4) {
            expected.insert(begin + "3\r\n" + bulk("smessage") + bulk("shard") + bulk("to shard"));
        }
        Strings heard = hear_some(subscribers[static_cast<size_t>(i)], expected.size());
        CHECK(std::multiset<std::string>(heard.begin(), heard.end()) == expected);
    }
    subscribers.clear();
    vkp_test_wait_until("all to have left",
                        [&] { return ask(publisher, "PUBSUB", "CHANNELS") == "*0\r\n"; });
    CHECK(ask(publisher, "PUBSUB", "NUMPAT") == ":0\r\n");
    CHECK(ask(publisher, "PUBLISH", "news", "gone") == ":0\r\n");
}

TEST_CASE("stand-alone: messages of one publisher arrive complete and in order")
{
    EVERY_SETUP();
    Relay relay(setup);
    std::vector<Peer> subscribers = relay.client_per_loop();
    for (const Peer &subscriber : subscribers) {
        ask(subscriber, "SUBSCRIBE", "news");
    }
    std::vector<Peer> publishers = relay.client_per_loop();
    std::string script;
    for (int i = 0; i < 1000; i++) {
        script += vkp_test_wire({"PUBLISH", "news", std::to_string(i)});
    }
    std::string expected_count = ":" + std::to_string(subscribers.size()) + "\r\n";
    size_t wrong = 0;
    for (const Peer &publisher : publishers) {
        std::thread sender([&] { say(publisher, script); });
        for (int i = 0; i < 1000; i++) {
            wrong += hear(publisher) == expected_count ? 0 : 1;
        }
        sender.join();
        for (const Peer &subscriber : subscribers) {
            for (int i = 0; i < 1000; i++) {
                wrong += hear(subscriber) == message(2, "news", std::to_string(i)) ? 0 : 1;
            }
        }
    }
    CHECK(wrong == 0);
    CHECK(relay.stats().messages_in == 1000 * publishers.size());
    CHECK(relay.stats().deliveries == 1000 * publishers.size() * subscribers.size());
}

TEST_CASE("messages from the server reach every client in its protocol, in order")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Server server = start_server();
    Relay relay(setup, upstream_of(vkp_test_server_unix(server.get())));
    relay.connected_client();
    std::vector<Peer> two = relay.client_per_loop();
    std::vector<Peer> three = relay.client_per_loop();
    Peer patterns = relay.client();
    for (const Peer &peer : two) {
        ask(peer, "SUBSCRIBE", "news");
    }
    for (const Peer &peer : three) {
        ask(peer, "HELLO", "3");
        ask(peer, "SUBSCRIBE", "news");
    }
    ask(patterns, "HELLO", "3");
    ask(patterns, "PSUBSCRIBE", "n*");
    ask(patterns, "SSUBSCRIBE", "sh");
    Peer direct = open(vkp_test_server_unix(server.get()));
    CHECK(numsub(direct, "news") == 1);
    for (int i = 0; i < 500; i++) {
        CHECK(ask(direct, "PUBLISH", "news", std::to_string(i)) == ":2\r\n");
    }
    CHECK(ask(direct, "SPUBLISH", "sh", "s") == ":1\r\n");
    size_t wrong = 0;
    for (int i = 0; i < 500; i++) {
        for (const Peer &peer : two) {
            wrong += hear(peer) == message(2, "news", std::to_string(i)) ? 0 : 1;
        }
        for (const Peer &peer : three) {
            wrong += hear(peer) == message(3, "news", std::to_string(i)) ? 0 : 1;
        }
        wrong += hear(patterns) == ">4\r\n" + bulk("pmessage") + bulk("n*") + bulk("news") +
                                       bulk(std::to_string(i))
                     ? 0
                     : 1;
    }
    CHECK(wrong == 0);
    CHECK(hear(patterns) == ">3\r\n" + bulk("smessage") + bulk("sh") + bulk("s"));
    // Through the relay the publisher hears what the server counts: one subscriber, the relay.
    Peer publisher = relay.client();
    CHECK(ask(publisher, "PUBLISH", "news", "last") == ":2\r\n");
    for (const Peer &peer : two) {
        CHECK(hear(peer) == message(2, "news", "last"));
    }
    CHECK(ask(publisher, "PUBSUB", "NUMSUB", "news") ==
          "*2\r\n$4\r\nnews\r\n:" + std::to_string(2 * setup.loops) + "\r\n");
    // Its own message reaches a subscriber too, before the reply of PUBLISH or after it.
    CHECK(hear(three[0]) == message(3, "news", "last"));
    say(three[0], wire("PUBLISH news own"));
    Strings heard = hear_some(three[0], 2);
    std::sort(heard.begin(), heard.end());
    CHECK(heard == Strings{":2\r\n", message(3, "news", "own")});
}

TEST_CASE("upstream a name is subscribed once, and not at all when the last one left")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Server server = start_server();
    Relay relay(setup, upstream_of(vkp_test_server_unix(server.get())));
    relay.connected_client();
    Peer direct = open(vkp_test_server_unix(server.get()));
    std::vector<Peer> crowd;
    for (int i = 0; i < 500; i++) {
        crowd.push_back(relay.client());
        say(crowd.back(), wires({"SUBSCRIBE news", "PSUBSCRIBE n*", "SSUBSCRIBE sh"}));
    }
    size_t wrong = 0;
    for (const Peer &peer : crowd) {
        wrong += hear(peer) == confirmation(2, "subscribe", "news", 1) ? 0 : 1;
        wrong += hear(peer) == confirmation(2, "psubscribe", "n*", 2) ? 0 : 1;
        wrong += hear(peer) == confirmation(2, "ssubscribe", "sh", 1) ? 0 : 1;
    }
    CHECK(wrong == 0);
    CHECK(numsub(direct, "news") == 1);
    CHECK(ask(direct, "PUBSUB", "NUMPAT") == ":1\r\n");
    CHECK(ask(direct, "PUBSUB", "SHARDNUMSUB", "sh") == "*2\r\n$2\r\nsh\r\n:1\r\n");
    CHECK(ask(direct, "PUBLISH", "news", "hi") == ":2\r\n");
    for (const Peer &peer : crowd) {
        wrong += hear(peer) == message(2, "news", "hi") ? 0 : 1;
        wrong += starts_with(hear(peer), "*4\r\n$8\r\npmessage\r\n") ? 0 : 1;
    }
    CHECK(wrong == 0);
    // Some by UNSUBSCRIBE, some by RESET, some by QUIT, the rest by going away; one stays for long.
    for (size_t i = 0; i + 1 < crowd.size(); i++) {
        const char *how[] = {"UNSUBSCRIBE", "RESET", "QUIT", "PING"};
        say(crowd[i], wire(how[i % 4]));
        if (i % 4 == 0) {
            say(crowd[i], wires({"PUNSUBSCRIBE n*", "SUNSUBSCRIBE sh"}));
        }
        if (i % 4 >= 2) {
            crowd[i].reset();
        }
    }
    for (size_t i = 0; i + 1 < crowd.size(); i++) {
        if (crowd[i]) {
            for (size_t replies = i % 4 == 0 ? 3 : 1; replies > 0; replies--) {
                wrong += hear(crowd[i]).empty() ? 1 : 0;
            }
        }
    }
    CHECK(wrong == 0);
    CHECK(numsub(direct, "news") == 1);
    ask(direct, "PUBLISH", "news", "one left");
    CHECK(hear(crowd.back()) == message(2, "news", "one left"));
    crowd.back().reset();
    until_numsub(direct, "news", 0);
    vkp_test_wait_until("patterns to go",
                        [&] { return ask(direct, "PUBSUB", "NUMPAT") == ":0\r\n"; });
    vkp_test_wait_until("shard channels to go",
                        [&] { return ask(direct, "PUBSUB", "SHARDCHANNELS") == "*0\r\n"; });
    CHECK(ask(direct, "PUBLISH", "news", "x") == ":0\r\n");
}

TEST_CASE("subscribing and leaving by turns on all loops ends where it should")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Server server = start_server();
    Relay relay(setup, upstream_of(vkp_test_server_unix(server.get())));
    relay.connected_client();
    std::vector<std::thread> threads;
    std::atomic<size_t> wrong{0};
    for (int i = 0; i < 4; i++) {
        threads.emplace_back([&] {
            for (int round = 0; round < 40; round++) {
                Peer peer = relay.client();
                say(peer, wires({"SUBSCRIBE a b", "UNSUBSCRIBE a", "SUBSCRIBE a", "UNSUBSCRIBE",
                                 "SUBSCRIBE b"}));
                Strings heard = hear_some(peer, 7);
                wrong += heard[6] == confirmation(2, "subscribe", "b", 1) ? 0 : 1;
                if (round % 2 == 0) {
                    say(peer, wires({"SUBSCRIBE a c", "UNSUBSCRIBE c"})); // and away in the middle
                }
            }
        });
    }
    for (std::thread &thread : threads) {
        thread.join();
    }
    CHECK(wrong == 0);
    Peer last = relay.client();
    ask(last, "SUBSCRIBE", "b");
    Peer direct = open(vkp_test_server_unix(server.get()));
    until_numsub(direct, "a", 0);
    until_numsub(direct, "c", 0);
    CHECK(numsub(direct, "b") == 1);
    CHECK(ask(direct, "PUBLISH", "b", "hi") == ":1\r\n");
    CHECK(hear(last) == message(2, "b", "hi"));
}

TEST_CASE("a subscription that the server refuses is refused to the client, who stays")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Server server =
        start_server({"--user", "limited", "on", ">pw", "resetchannels", "&ok*", "+@all", "~*"});
    vkp_relay_config config = upstream_of(vkp_test_server_unix(server.get()));
    config.username = vkp_str_of("limited");
    config.password = vkp_str_of("pw");
    Relay relay(setup, config);
    Peer direct = open(vkp_test_server_unix(server.get()));
    CHECK(ask(direct, "AUTH", "limited", "pw") == "+OK\r\n");
    // All or none of the names, and the server's words.
    const std::string script =
        wires({"SUBSCRIBE ok1 secret ok2", "PING x", "SUBSCRIBE ok1", "SUBSCRIBE ok1 ok2 secret",
               "PSUBSCRIBE ok* *", "PING x", "UNSUBSCRIBE"});
    Peer peer = relay.connected_client();
    say(direct, script);
    say(peer, script);
    const Strings expected = hear_some(direct, 7);
    CHECK(hear_some(peer, 7) == expected);
    CHECK(starts_with(expected[0], "-NOPERM"));
    CHECK(expected[1] == bulk("x"));
    CHECK(expected[2] == confirmation(2, "subscribe", "ok1", 1));
    // A name that was refused with others is not kept upstream.
    until_numsub(direct, "ok1", 0);
    until_numsub(direct, "ok2", 0);
}

TEST_CASE("the names of one client have a limit in bytes, and each has one")
{
    EVERY_SETUP();
    vkp_relay_config config = {};
    config.max_name_bytes = 200000;
    Relay relay(setup, config);
    Peer peer = relay.client();
    const std::string most(65536, 'n');
    CHECK(ask(peer, "SUBSCRIBE", most + "n") == "-ERR a name of more than 65536 bytes\r\n");
    CHECK(ask(peer, "PSUBSCRIBE", most) == confirmation(2, "psubscribe", most, 1));
    CHECK(ask(peer, "SUBSCRIBE", most) == confirmation(2, "subscribe", most, 2));
    CHECK(ask(peer, "SUBSCRIBE", most) == confirmation(2, "subscribe", most, 2)); // has it
    const std::string other(65536, 'o');
    CHECK(ask(peer, "SSUBSCRIBE", other) == confirmation(2, "ssubscribe", other, 1));
    CHECK(ask(peer, "SUBSCRIBE", other) ==
          "-ERR more than 200000 bytes of names of one client\r\n");
    CHECK(ask(peer, "UNSUBSCRIBE", most) == confirmation(2, "unsubscribe", most, 1));
    CHECK(ask(peer, "UNSUBSCRIBE", most) == confirmation(2, "unsubscribe", most, 1));
    CHECK(ask(peer, "SUBSCRIBE", other) == confirmation(2, "subscribe", other, 2));
    CHECK(ask(peer, "RESET") == "+RESET\r\n");
    say(peer, wires({"SUBSCRIBE a b"}));
    CHECK(hear_some(peer, 2)[1] == confirmation(2, "subscribe", "b", 2));
}

// ---------------------------------------------------------------------------------------------
// The server away

TEST_CASE("the server dies and returns: subscribers stay, subscriptions return")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Server server = start_server();
    vkp_relay_config config = upstream_of(vkp_test_server_tcp(server.get()));
    config.hold_ms = 20000; // restarts take their time
    Relay relay(setup, config);
    std::vector<Peer> subscribers = relay.client_per_loop();
    for (const Peer &peer : subscribers) {
        ask(peer, "HELLO", "3");
        ask(peer, "SUBSCRIBE", "news");
        ask(peer, "PSUBSCRIBE", "p*");
    }
    for (int round = 0; round < 3; round++) {
        INFO("round " << round);
        Peer asking = relay.connected_client();
        // Traffic when it happens: commands under way, and messages.
        std::string script;
        for (int i = 0; i < 500; i++) {
            script += wire("PUBLISH traffic x") + wire("INCR n");
        }
        say(asking, script);
        vkp_test_server_kill(server.get());
        // Away, and both connections know it: what comes now waits, subscriptions are noted.
        vkp_test_wait_until("the losses to be noticed", [&] {
            return relay.stats().outages == 2 * (static_cast<uint64_t>(round) + 1);
        });
        Peer waits = relay.client();
        say(waits, wires({"SET k waited", "PING", "GET k"}));
        Peer transaction = relay.client();
        say(transaction, wires({"MULTI", "SET l waited", "GET l", "EXEC"}));
        CHECK(hear_some(transaction, 3) == Strings{"+OK\r\n", "+QUEUED\r\n", "+QUEUED\r\n"});
        Peer late = relay.client();
        CHECK(ask(late, "SUBSCRIBE", "late") == confirmation(2, "subscribe", "late", 1));
        vkp_test_server_restart(server.get());
        CHECK(hear_some(waits, 3) == Strings{"+OK\r\n", "+PONG\r\n", bulk("waited")});
        CHECK(hear(transaction) == "*2\r\n+OK\r\n" + bulk("waited"));
        Peer direct = open(vkp_test_server_tcp(server.get()));
        until_numsub(direct, "news", 1);
        until_numsub(direct, "late", 1);
        vkp_test_wait_until("the pattern",
                            [&] { return ask(direct, "PUBSUB", "NUMPAT") == ":1\r\n"; });
        for (int i = 0; i < 200; i++) {
            ask(direct, "PUBLISH", "news", std::to_string(i));
        }
        ask(direct, "PUBLISH", "pattern", "p");
        ask(direct, "PUBLISH", "late", "l");
        size_t wrong = 0;
        for (const Peer &peer : subscribers) {
            for (int i = 0; i < 200; i++) {
                wrong += hear(peer) == message(3, "news", std::to_string(i)) ? 0 : 1;
            }
            wrong +=
                hear(peer) == ">4\r\n" + bulk("pmessage") + bulk("p*") + bulk("pattern") + bulk("p")
                    ? 0
                    : 1;
        }
        CHECK(wrong == 0);
        CHECK(hear(late) == message(2, "late", "l"));
        // What was sent may have run or not: its client is disconnected, behind the replies. If all
        // of it was answered, or nothing sent, the rest waited.
        size_t replies = 0;
        for (std::string reply = hear(asking); !reply.empty(); reply = hear(asking)) {
            REQUIRE(starts_with(reply, ":"));
            if (++replies == 1000) {
                break;
            }
        }
    }
}

TEST_CASE("a client that unsubscribes while the server is away is not subscribed again")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Server server = start_server();
    Relay relay(setup, upstream_of(vkp_test_server_tcp(server.get())));
    Peer peer = relay.connected_client();
    ask(peer, "HELLO", "3");
    ask(peer, "SUBSCRIBE", "gone");
    ask(peer, "SUBSCRIBE", "kept");
    vkp_test_server_kill(server.get());
    CHECK(ask(peer, "UNSUBSCRIBE", "gone") == confirmation(3, "unsubscribe", "gone", 1));
    vkp_test_server_restart(server.get());
    Peer direct = open(vkp_test_server_tcp(server.get()));
    until_numsub(direct, "kept", 1);
    CHECK(numsub(direct, "gone") == 0);
}

TEST_CASE("a server that never comes: subscribers wait, who asks is disconnected in the end")
{
    EVERY_SETUP();
    std::string nowhere = vkp_test_fresh_address("nowhere");
    vkp_relay_config config = upstream_of(nowhere.c_str());
    config.hold_ms = GENERATE(uint64_t{30}, VKP_OFF);
    Relay relay(setup, config);
    for (const char *command : {"PING", "GET k", "PUBLISH a b", "BLPOP l 0", "SELECT 1"}) {
        INFO(command);
        Peer peer = relay.client();
        say(peer, wire("CLIENT GETNAME") + wire(command) + wire("CLIENT ID"));
        CHECK(hear_all(peer) == Strings{"$-1\r\n"});
    }
    CHECK(relay.stats().lost == 5);
    for (size_t i = 0; i < setup.loops; i++) {
        Peer peer = relay.client();
        say(peer, wires({"SUBSCRIBE a b", "SUBSCRIBE a", "UNSUBSCRIBE b", "PING", "UNSUBSCRIBE"}));
        CHECK(hear_some(peer, 6) ==
              Strings{confirmation(2, "subscribe", "a", 1), confirmation(2, "subscribe", "b", 2),
                      confirmation(2, "subscribe", "a", 2), confirmation(2, "unsubscribe", "b", 1),
                      "*2\r\n$4\r\npong\r\n$0\r\n\r\n", confirmation(2, "unsubscribe", "a", 0)});
        CHECK(ask(peer, "SUBSCRIBE", "left behind") ==
              confirmation(2, "subscribe", "left behind", 1));
    }
}

TEST_CASE("a password that the server refuses: the relay says so and serves what it can")
{
    NEEDS_SERVER();
    Server server = start_server({"--requirepass", "right"});
    vkp_relay_config config = upstream_of(vkp_test_server_unix(server.get()));
    SECTION("the right one")
    {
        config.password = vkp_str_of("right");
        Relay relay(one_loop(), config);
        Peer peer = relay.connected_client();
        CHECK(ask(peer, "SET", "k", "v") == "+OK\r\n");
    }
    SECTION("a wrong one")
    {
        config.password = vkp_str_of("wrong");
        Relay relay(one_loop(), config);
        Peer peer = relay.client();
        vkp_test_wait_until("the refusal in the log",
                            [&] { return vkp_test_env_logged(&relay.test, "WRONGPASS"); });
        CHECK(!vkp_test_env_logged(&relay.test, "wrong "));
        CHECK(ask(peer, "SUBSCRIBE", "c") == confirmation(2, "subscribe", "c", 1));
        Peer asking = relay.client();
        CHECK(ask(asking, "GET", "k").empty());
    }
}

TEST_CASE("a new login: on the connections that stand and on later ones, and a refusal is logged")
{
    NEEDS_SERVER();
    Setup setup = one_loop();
    setup.loops = GENERATE(size_t{1}, size_t{3});
    Server server = start_server({"--requirepass", "one"});
    vkp_relay_config config = upstream_of(vkp_test_server_unix(server.get()));
    config.password = vkp_str_of("one");
    Peer direct = open(vkp_test_server_unix(server.get()));
    ask(direct, "AUTH", "one");
    Relay relay(setup, config);
    Peer peer = relay.connected_client();
    vkp_status status = VKP_OK;
    auto log_in = [&](vkp_str username, vkp_str password) {
        relay.on_loop([&] { status = vkp_relay_set_login(relay, username, password); });
        return status;
    };
    CHECK(vkp_relay_set_login(nullptr, vkp_str{}, vkp_str_of("two")) == VKP_ERR_INVALID);
    CHECK(log_in(vkp_str_of("app"), vkp_str{}) == VKP_ERR_INVALID);
    CHECK(log_in(vkp_str_of("app"), vkp_str_of("nope")) == VKP_OK);
    vkp_test_wait_until("the refusal in the log", [&] {
        return vkp_test_env_logged(&relay.test, "the server refused the new password: WRONGPASS");
    });
    CHECK(!vkp_test_env_logged(&relay.test, "nope"));
    CHECK(ask(peer, "PING") == "+PONG\r\n"); // as whom it logged in before
    CHECK(ask(direct, "CONFIG", "SET", "requirepass", "two") == "+OK\r\n");
    CHECK(log_in(vkp_str{}, vkp_str_of("two")) == VKP_OK);
    CHECK(ask(direct, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes") != ":0\r\n");
    Peer other = relay.connected_client();
    CHECK(ask(other, "SELECT", "1") == "+OK\r\n");
    CHECK(ask(other, "ACL", "WHOAMI") == bulk("default"));
}

TEST_CASE("a new login without memory changes nothing")
{
    NEEDS_SERVER();
    Server server = start_server({"--requirepass", "one"});
    vkp_relay_config config = upstream_of(vkp_test_server_unix(server.get()));
    config.password = vkp_str_of("one");
    Peer direct = open(vkp_test_server_unix(server.get()));
    ask(direct, "AUTH", "one");
    Relay relay(one_loop(), config);
    Peer peer = relay.connected_client();
    std::vector<vkp_status> all;
    relay.on_loop([&] {
        do {
            vkp_test_env_fault(&relay.test, VKP_TEST_FAULT_ONCE, all.size() + 1);
            all.push_back(vkp_relay_set_login(relay, vkp_str_of("app"), vkp_str_of("two")));
        } while (vkp_test_env_failures(&relay.test) > 0 && all.back() == VKP_ERR_NOMEM);
        vkp_test_env_fault(&relay.test, VKP_TEST_FAULT_NONE, 0);
        all.push_back(vkp_relay_set_login(relay, vkp_str_of("default"), vkp_str_of("one")));
    });
    REQUIRE(all.size() >= 3);
    CHECK(all.front() == VKP_ERR_NOMEM);
    CHECK(all.back() == VKP_OK);
    CHECK(ask(direct, "CLIENT", "KILL", "TYPE", "normal") != ":0\r\n");
    Peer other = relay.connected_client();
    CHECK(ask(other, "ACL", "WHOAMI") == bulk("default"));
}

TEST_CASE("a new login means nothing to a relay without a server")
{
    Relay relay(one_loop());
    Peer peer = relay.client();
    vkp_status status = VKP_ERR_SYS;
    relay.on_loop(
        [&] { status = vkp_relay_set_login(relay, vkp_str_of("app"), vkp_str_of("two")); });
    CHECK(status == VKP_OK);
    CHECK(ask(peer, "PING") == "+PONG\r\n");
}

// What a GAP's message says; "" in place of what is not there.
std::string field(const std::string &json, const std::string &name)
{
    const size_t at = json.find("\"" + name + "\":");
    return at == std::string::npos
               ? ""
               : json.substr(at + name.size() + 3,
                             json.find_first_of(",}", at + name.size() + 3) - at - name.size() - 3);
}

TEST_CASE("a gap is a message for those who want to know, or the end for those who must")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Server server = start_server();
    vkp_relay_config config = upstream_of(vkp_test_server_unix(server.get()));
    config.close_on_gap = GENERATE(true, false);
    Relay relay(setup, config);
    Peer direct = open(vkp_test_server_unix(server.get()));
    std::vector<Peer> subscribers = relay.client_per_loop();
    for (const Peer &peer : subscribers) {
        ask(peer, "SUBSCRIBE", config.close_on_gap ? "c" : VKP_RELAY_GAP_CHANNEL);
    }
    std::vector<Peer> others = relay.client_per_loop();
    CHECK(ask(direct, "CLIENT", "KILL", "TYPE", "pubsub") == ":1\r\n");
    for (const Peer &peer : subscribers) {
        const std::string frame = hear(peer);
        if (config.close_on_gap) {
            CHECK(frame.empty());
            continue;
        }
        CHECK(starts_with(frame, "*3\r\n" + bulk("message") + bulk(VKP_RELAY_GAP_CHANNEL)));
        const uint64_t from = std::stoull(field(frame, "from"));
        CHECK(from > 1700000000000u);
        CHECK(std::stoull(field(frame, "to")) >= from);
        CHECK(field(frame, "reason") == "\"the connection was lost\"");
        CHECK(field(frame, "names") == "null");
    }
    for (const Peer &peer : others) {
        CHECK(ask(peer, "PING") == "+PONG\r\n");
    }
    CHECK(relay.stats().gaps == 1);
    CHECK(relay.stats().outages == 1);
    CHECK(relay.stats().lost == (config.close_on_gap ? setup.loops : 0));
}

std::atomic<uint64_t> asked_keepalive_ms = {0};

TEST_CASE("the kernel asks silent TCP clients whether they are there")
{
    static const vkp_sys table = [] {
        vkp_sys copy = *vkp_sys_get_default();
        copy.set_liveness = [](int fd, uint64_t keepalive_ms, uint64_t unacked_ms) {
            asked_keepalive_ms = unacked_ms == 0 ? keepalive_ms : 0;
            return vkp_sys_get_default()->set_liveness(fd, keepalive_ms, unacked_ms);
        };
        return copy;
    }();
    Relay relay({*vkp_test_backends(), 1}, {}, &table);
    const char *bound = nullptr;
    relay.on_loop(
        [&] { REQUIRE(vkp_relay_listen(relay, vkp_str_of("tcp:127.0.0.1:0"), &bound) == VKP_OK); });
    Peer peer = open(bound);
    CHECK(ask(peer, "PING") == "+PONG\r\n");
    CHECK(asked_keepalive_ms == 60000);
}

TEST_CASE("PUBSUB NUMSUB counts the relay as its clients")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Server server = start_server();
    Relay relay(setup, upstream_of(vkp_test_server_unix(server.get())));
    Peer direct = open(vkp_test_server_unix(server.get()));
    Peer beside = open(vkp_test_server_unix(server.get()));
    ask(beside, "SUBSCRIBE", "a");
    Peer asking = relay.connected_client();
    std::vector<Peer> subscribers;
    for (int i = 0; i < 7; i++) {
        subscribers.push_back(relay.client());
        say(subscribers.back(), wires({"SUBSCRIBE a b", "SSUBSCRIBE s"}));
        CHECK(hear_some(subscribers.back(), 3)[2] == confirmation(2, "ssubscribe", "s", 1));
    }
    CHECK(ask(direct, "PUBSUB", "NUMSUB", "a") == "*2\r\n" + bulk("a") + ":2\r\n");
    for (const char *protocol : {"2", "3"}) {
        ask(asking, "HELLO", protocol);
        CHECK(ask(asking, "PUBSUB", "NUMSUB", "a", "b", "none") ==
              "*6\r\n" + bulk("a") + ":8\r\n" + bulk("b") + ":7\r\n" + bulk("none") + ":0\r\n");
        CHECK(ask(asking, "PUBSUB", "NUMSUB") == "*0\r\n");
        CHECK(ask(asking, "pubsub", "shardnumsub", "s") == "*2\r\n" + bulk("s") + ":7\r\n");
    }
    for (size_t i = 0; i < 6; i++) {
        subscribers[i].reset();
    }
    vkp_test_wait_until("those who left are not counted", [&] {
        return ask(asking, "PUBSUB", "NUMSUB", "a") == "*2\r\n" + bulk("a") + ":2\r\n";
    });
}

// ---------------------------------------------------------------------------------------------
// Hostile clients

std::string random_bytes(uint32_t seed, size_t len)
{
    std::string text;
    while (text.size() < len) {
        seed = seed * 1664525u + 1013904223u;
        text += static_cast<char>(seed >> 24);
    }
    return text;
}

TEST_CASE("garbage costs that client its connection, and nobody else anything")
{
    EVERY_SETUP();
    Relay relay(setup);
    std::vector<Peer> others = relay.client_per_loop();
    for (const Peer &other : others) {
        ask(other, "SUBSCRIBE", "news");
    }
    const std::vector<std::pair<std::string, std::string>> broken = {
        {"an endless line", std::string(1u << 20, 'a')},
        {"an endless header", "*" + std::string(1u << 20, '1')},
        {"four billion elements", "*4294967295\r\n"},
        {"a million and one elements", "*1048577\r\n"},
        {"a bulk of four gigabytes", "*1\r\n$4294967295\r\n"},
        {"a bulk beyond the limit", "*1\r\n$67108865\r\n"},
        {"a length beyond 64 bits", "*1\r\n$99999999999999999999\r\n"},
        {"no bulk", "*2\r\n$4\r\nPING\r\n:5\r\n"},
        {"a wrong trailer", "*1\r\n$4\r\nPINGab"},
        {"nested arrays", "*1\r\n*1\r\n*1\r\n$1\r\na\r\n"},
        {"a map in an array", "*1\r\n%1\r\n$1\r\na\r\n$1\r\nb\r\n"},
        {"an attribute in an array", "*1\r\n|1\r\n+k\r\n+v\r\n$4\r\nPING\r\n"},
        {"a null argument", "*2\r\n$4\r\nECHO\r\n$-1\r\n"},
        {"a streamed bulk", "*1\r\n$?\r\n;4\r\nPING\r\n;0\r\n"},
        {"quotes that do not end", "ECHO \"abc\r\n"},
        {"HTTP", "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"},
        {"HTTP of a browser tricked",
         "POST / HTTP/1.1\r\nHost: localhost\r\n\r\nPUBLISH news evil\r\n"},
    };
    for (const auto &each : broken) {
        INFO(each.first);
        Peer peer = relay.client();
        uint64_t errors = relay.stats().protocol_errors;
        say(peer, wire("PING"));
        CHECK(hear(peer) == "+PONG\r\n");
        (void)vkp_test_peer_send(peer.get(), each.second.data(), each.second.size());
        std::string reply = hear(peer);
        CHECK(starts_with(reply, "-ERR Protocol error: "));
        CHECK(reply.size() < 400);
        CHECK(hear(peer).empty());
        CHECK(relay.stats().protocol_errors == errors + 1);
    }
    // Where the protocol allows no answer that makes sense, the end is enough.
    for (uint32_t seed = 0; seed < 50; seed++) {
        INFO("seed " << seed);
        Peer peer = relay.client();
        std::string bytes = seed == 0
                                ? std::string("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 11)
                                : random_bytes(seed, 64 * seed);
        (void)vkp_test_peer_send(peer.get(), bytes.data(), bytes.size());
        shutdown(vkp_test_peer_fd(peer.get()), SHUT_WR);
        vkp_test_peer_drain(peer.get());
    }
    // Frames that never end: cut off at every byte.
    std::string whole = wire("PUBLISH news never");
    for (size_t len = 1; len < whole.size(); len++) {
        Peer peer = relay.client();
        say(peer, whole.substr(0, len));
    }
    Peer publisher = relay.client();
    CHECK(ask(publisher, "PUBLISH", "news", "fine") ==
          ":" + std::to_string(others.size()) + "\r\n");
    for (const Peer &other : others) {
        CHECK(hear(other) == message(2, "news", "fine"));
    }
}

TEST_CASE("headers that promise much cost little memory")
{
    EVERY_SETUP();
    Relay relay(setup);
    Peer other = relay.client();
    ask(other, "PING");
    std::vector<Peer> peers;
    size_t before = vkp_test_env_live_bytes(&relay.test);
    for (int i = 0; i < 200; i++) {
        peers.push_back(relay.client());
        say(peers.back(), wire("PING"));
        say(peers.back(), i % 2 ? "*1048576\r\n$67108864\r\nabc" : "*1048576\r\n");
        hear(peers.back());
    }
    CHECK(vkp_test_env_live_bytes(&relay.test) - before < 200 * 16384);
    CHECK(ask(other, "PING") == "+PONG\r\n");
}

TEST_CASE("a request beyond max_request_bytes is refused, one below it served")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Server server = start_server();
    vkp_relay_config config = upstream_of(vkp_test_server_unix(server.get()));
    config.max_request_bytes = 100000;
    Relay relay(setup, config);
    Peer peer = relay.connected_client();
    CHECK(ask(peer, "SET", "k", std::string(99000, 'x')) == "+OK\r\n");
    CHECK(ask(peer, "MULTI") == "+OK\r\n");
    CHECK(ask(peer, "SET", "k", std::string(60000, 'y')) == "+QUEUED\r\n");
    CHECK(
        contains(ask(peer, "SET", "k", std::string(60000, 'z')), "larger than the relay's limit"));
    CHECK(starts_with(ask(peer, "EXEC"), "-EXECABORT"));
    CHECK(ask(peer, "STRLEN", "k") == ":99000\r\n");
    CHECK(contains(ask(peer, "SET", "k", std::string(100001, 'x')), "Protocol error"));
    CHECK(hear(peer).empty());
    CHECK(ask(relay.client(), "STRLEN", "k") == ":99000\r\n");
}

TEST_CASE("a storm of connections over max_clients: the first are served, the others told")
{
    EVERY_SETUP();
    vkp_relay_config config = {};
    config.max_clients = 10;
    Relay relay(setup, config);
    std::vector<Peer> served;
    for (int i = 0; i < 10; i++) {
        served.push_back(relay.client());
        CHECK(ask(served.back(), "PING") == "+PONG\r\n");
    }
    for (int i = 0; i < 200; i++) {
        Peer refused = relay.client();
        CHECK(hear(refused) == "-ERR max number of clients reached\r\n");
        CHECK(hear(refused).empty());
    }
    vkp_test_wait_until("the last refusal to be counted",
                        [&] { return relay.stats().refused[VKP_REFUSAL_FULL] == 200; });
    CHECK(relay.stats().clients == 10);
    CHECK(relay.stats().accepted == 10);
    for (const Peer &peer : served) {
        CHECK(ask(peer, "PING") == "+PONG\r\n");
    }
    served.pop_back();
    vkp_test_wait_until("a place", [&] { return relay.stats().clients == 9; });
    served.push_back(relay.client());
    CHECK(ask(served.back(), "PING") == "+PONG\r\n");
    // Gone at once: accepted, perhaps served, never counted twice.
    for (int i = 0; i < 300; i++) {
        close(vkp_test_connect(relay.address.c_str()));
    }
    served.clear();
    vkp_test_wait_until("all to be gone", [&] { return relay.stats().clients == 0; });
}

TEST_CASE("a policy that would make the relay wait is refused, not replaced")
{
    vkp_test_loop loop(&vkp_backend_poll);
    vkp_loop *loops[] = {loop};
    vkp_relay_config config = {};
    vkp_relay *relay = nullptr;
    config.loops = loops;
    for (vkp_on_full policy : {VKP_ON_FULL_WAIT, VKP_ON_FULL_ERROR}) {
        config.on_full = policy;
        CHECK(vkp_relay_open(&config, &relay) == VKP_ERR_INVALID);
    }
    CHECK(relay == nullptr);
}

TEST_CASE("a subscriber that does not read is handled as on_full says; others lose nothing")
{
    EVERY_SETUP();
    const vkp_on_full policy = GENERATE(VKP_ON_FULL_DROP_OLDEST, VKP_ON_FULL_DROP_NEWEST,
                                        VKP_ON_FULL_DISCONNECT, VKP_ON_FULL_DEFAULT);
    INFO("policy " << policy);
    vkp_relay_config config = {};
    config.on_full = policy;
    config.queue_bytes = 256 * 1024;
    config.queue_frames = 1000;
    Relay relay(setup, config);
    Peer slow = relay.client();
    ask(slow, "SUBSCRIBE", "news");
    std::vector<Peer> others = relay.client_per_loop();
    for (const Peer &other : others) {
        ask(other, "SUBSCRIBE", "news");
    }
    Peer publisher = relay.client();
    size_t before = vkp_test_env_live_bytes(&relay.test);
    constexpr int count = 3000;
    std::string padding(1000, 'x');
    for (int i = 0; i < count; i++) {
        std::string payload = std::to_string(i) + padding;
        ask(publisher, "PUBLISH", "news", payload);
        for (const Peer &other : others) {
            if (hear(other) != message(2, "news", payload)) {
                FAIL("a reading client missed message " << i);
            }
        }
    }
    // The queue's budget, the read blocks of the loops, room for change; not the 3 MB published.
    CHECK(vkp_test_env_live_bytes(&relay.test) < before + 1500000);
    vkp_relay_stats stats = relay.stats();
    (void)vkp_test_peer_send_text(slow.get(), "PING end\r\n"); // it may be closed
    int first = -1;
    int last = -1;
    size_t got = 0;
    bool ended = true;
    for (std::string frame = hear(slow); !frame.empty(); frame = hear(slow)) {
        if (contains(frame, "pong")) {
            ended = false;
            break;
        }
        size_t at = frame.rfind("\r\n", frame.size() - 3) + 2;
        int number = std::stoi(frame.substr(at));
        CHECK(number > last);
        first = first < 0 ? number : first;
        last = number;
        got++;
    }
    CHECK(first == 0);
    if (policy == VKP_ON_FULL_DISCONNECT || policy == VKP_ON_FULL_DEFAULT) {
        CHECK(ended);
        CHECK(stats.slow_closed == 1);
        CHECK(stats.dropped_frames == 0);
        CHECK(last == static_cast<int>(got) - 1); // no holes before the end
    } else {
        CHECK(!ended);
        CHECK(stats.slow_closed == 0);
        CHECK(stats.dropped_frames == count - got);
        CHECK((last == count - 1) == (policy == VKP_ON_FULL_DROP_OLDEST));
    }
}

TEST_CASE("a client that asks and does not read stops being read, and memory stays")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Server server = start_server();
    Relay relay(setup, upstream_of(vkp_test_server_unix(server.get())));
    Peer other = relay.connected_client();
    ask(other, "SET", "k", std::string(10000, 'x'));
    Peer greedy = relay.client();
    // As much as the kernel and the relay take: 10,000 answers of 10,000 bytes.
    std::string script;
    for (int i = 0; i < 10000; i++) {
        script += wire("GET k");
    }
    std::atomic<bool> sent{false};
    std::thread sender([&] {
        (void)vkp_test_peer_send(greedy.get(), script.data(), script.size());
        sent = true;
    });
    for (int i = 0; i < 2000; i++) {
        CHECK(ask(other, "ECHO", "hi") == bulk("hi"));
    }
    CHECK(vkp_test_env_peak_bytes(&relay.test) < 40u << 20);
    size_t wrong = 0;
    for (int i = 0; i < 10000; i++) {
        wrong += hear(greedy).size() == 10010 ? 0 : 1;
    }
    sender.join();
    CHECK(wrong == 0);
    CHECK(vkp_test_env_peak_bytes(&relay.test) < 40u << 20);
}

// ---------------------------------------------------------------------------------------------
// Opening, draining, failing

TEST_CASE("listening at several addresses, and at one that is taken")
{
    EVERY_SETUP();
    Relay second(setup);
    Relay relay(setup);
    std::string tcp;
    vkp_status taken = VKP_OK;
    vkp_status broken = VKP_OK;
    relay.on_loop([&] {
        const char *bound = nullptr;
        if (vkp_relay_listen(relay, vkp_str_of("tcp:127.0.0.1:0"), &bound) == VKP_OK) {
            tcp = bound;
        }
        taken = vkp_relay_listen(relay, vkp_str_of(second.address.c_str()), nullptr);
        broken = vkp_relay_listen(relay, vkp_str_of("nonsense"), nullptr);
    });
    REQUIRE(starts_with(tcp, "tcp:127.0.0.1:"));
    CHECK(tcp != "tcp:127.0.0.1:0");
    CHECK(taken == VKP_ERR_IN_USE);
    CHECK(broken == VKP_ERR_INVALID);
    Peer over_tcp = open(tcp);
    Peer over_unix = relay.client();
    ask(over_tcp, "SUBSCRIBE", "a");
    CHECK(ask(over_unix, "PUBLISH", "a", "hi") == ":1\r\n");
    CHECK(hear(over_tcp) == message(2, "a", "hi"));
    CHECK(vkp_test_exists(second.address.c_str() + 5));
}

TEST_CASE("a drain answers what was asked, delivers what is queued, and removes the file")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Server server = start_server();
    Relay relay(setup, upstream_of(vkp_test_server_unix(server.get())));
    Peer asking = relay.connected_client();
    std::vector<Peer> subscribers = relay.client_per_loop();
    for (const Peer &peer : subscribers) {
        ask(peer, "SUBSCRIBE", "news");
    }
    std::string script;
    for (int i = 0; i < 200; i++) {
        script += wire("INCR n");
    }
    say(asking, script);
    CHECK(hear(asking) == ":1\r\n"); // it has begun
    Peer direct = open(vkp_test_server_unix(server.get()));
    ask(direct, "PUBLISH", "news", "last");
    for (const Peer &peer : subscribers) {
        CHECK(hear(peer) == message(2, "news", "last"));
    }
    std::atomic<int> ends{0};
    relay.on_loop([&] {
        vkp_relay_drain(
            relay, [](void *user) { ++*static_cast<std::atomic<int> *>(user); }, &ends,
            vkp_test_deadline());
    });
    CHECK(!vkp_test_exists(relay.address.c_str() + 5));
    CHECK(vkp_test_connect(relay.address.c_str()) == -1);
    for (const Peer &peer : subscribers) {
        CHECK(hear(peer).empty());
    }
    int last = 1;
    for (const std::string &reply : hear_all(asking)) {
        CHECK(reply == ":" + std::to_string(++last) + "\r\n");
    }
    vkp_test_wait_until("the end", [&] { return ends == 1; });
    CHECK(relay.stats().clients == 0);
    // What the server was asked, the client was told.
    CHECK(ask(direct, "GET", "n") == bulk(std::to_string(last)));
}

TEST_CASE("a drain tells each client why, in its own language, after all it was owed")
{
    EVERY_SETUP();
    const std::string notice = GENERATE(as<std::string>{}, "going down", "two\r\nlines", "",
                                        "long " + std::string(2000, 'x'));
    vkp_relay_config config = {};
    config.shutdown_notice = vkp_str_of(notice.c_str());
    Relay relay(setup, config);
    const std::string channel = VKP_RELAY_NOTICE_CHANNEL;
    std::vector<Peer> plain = relay.client_per_loop();
    std::vector<Peer> plain3 = relay.client_per_loop();
    for (const Peer &peer : plain3) {
        ask(peer, "HELLO", "3");
    }
    Peer subscribed = relay.client();
    ask(subscribed, "SUBSCRIBE", "a");
    Peer patterned = relay.client();
    ask(patterned, "PSUBSCRIBE", "*");
    Peer sharded = relay.client();
    ask(sharded, "HELLO", "3");
    ask(sharded, "SSUBSCRIBE", "s");
    Peer former = relay.client(); // subscribed no more: a client like any other
    ask(former, "SUBSCRIBE", "a");
    ask(former, "UNSUBSCRIBE", "a");
    Peer within = relay.client(); // and one in the middle of a command
    ask(within, "PING");
    say(within, "*2\r\n$4\r\nECHO\r\n$5\r\nhal");
    ask(plain[0], "PUBLISH", "a", "last");
    std::atomic<int> ends{0};
    relay.on_loop([&] {
        vkp_relay_drain(
            relay, [](void *user) { ++*static_cast<std::atomic<int> *>(user); }, &ends,
            vkp_test_deadline());
    });
    auto is_error = [&](const std::string &frame) {
        const bool one_line = frame.find("\r\n") == frame.size() - 2;
        const std::string words = notice.substr(0, notice.find('\r')).substr(0, 100);
        return starts_with(frame, "-ERR " + words) && one_line;
    };
    for (const Peer &peer : plain) {
        Strings heard = hear_all(peer);
        REQUIRE(heard.size() == 1);
        CHECK(is_error(heard[0]));
    }
    for (const Peer &peer : plain3) {
        CHECK(hear_all(peer) == Strings{message(3, channel, notice)});
    }
    CHECK(hear_all(subscribed) == Strings{message(2, "a", "last"), message(2, channel, notice)});
    const Strings heard = hear_all(patterned);
    REQUIRE(heard.size() == 2);
    CHECK(starts_with(heard[0], "*4\r\n$8\r\npmessage"));
    CHECK(heard[1] == message(2, channel, notice));
    CHECK(hear_all(sharded) == Strings{message(3, channel, notice)});
    for (const Peer *peer : {&former, &within}) {
        const Strings last = hear_all(*peer);
        REQUIRE(last.size() == 1);
        CHECK(is_error(last[0]));
    }
    vkp_test_wait_until("the end", [&] { return ends == 1; });
    CHECK(relay.stats().clients == 0);
}

TEST_CASE("a drain's notice comes behind the answers that the server still owes")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Server server = start_server();
    vkp_relay_config config = upstream_of(vkp_test_server_unix(server.get()));
    config.shutdown_notice = vkp_str_of("going down");
    Relay relay(setup, config);
    Peer asking = relay.connected_client();
    std::string script;
    for (int i = 0; i < 200; i++) {
        script += wire("INCR n");
    }
    say(asking, script);
    CHECK(hear(asking) == ":1\r\n"); // it has begun
    relay.on_loop([&] { vkp_relay_drain(relay, nullptr, nullptr, vkp_test_deadline()); });
    const Strings heard = hear_all(asking);
    REQUIRE(!heard.empty());
    for (size_t i = 0; i + 1 < heard.size(); i++) {
        CHECK(heard[i] == ":" + std::to_string(i + 2) + "\r\n");
    }
    CHECK(heard.back() == "-ERR going down\r\n");
    Peer direct = open(vkp_test_server_unix(server.get()));
    CHECK(ask(direct, "GET", "n") == bulk(std::to_string(heard.size())));
}

TEST_CASE("a relay is gone before its drain's end was told: nobody is told any more")
{
    const bool early = GENERATE(true, false);
    vkp_test_env test;
    vkp_test_env_init(&test);
    {
        vkp_test_loop loop(vkp_test_backends()[0]);
        vkp_loop *loops[] = {loop};
        vkp_relay_config config = upstream_of(vkp_test_fresh_address("nobody"));
        config.loops = loops;
        config.loop_count = 1;
        config.env = &test.env;
        vkp_relay *relay = nullptr;
        REQUIRE(vkp_relay_open(&config, &relay) == VKP_OK);
        int told = 0;
        vkp_relay_drain(
            relay, [](void *user) { ++*static_cast<int *>(user); }, &told, vkp_test_deadline());
        // This round finds no clients; what it queues is for the next one, which a close runs.
        REQUIRE(vkp_loop_run_once(loop, 0) == VKP_OK);
        if (early) {
            vkp_relay_unref(std::exchange(relay, nullptr));
        }
        vkp_loop_close(loop);
        CHECK(told == (early ? 0 : 1));
        vkp_relay_unref(relay);
    }
    vkp_test_env_deinit(&test);
}

TEST_CASE("a drain ends at its deadline, whoever does not read")
{
    EVERY_SETUP();
    vkp_relay_config config = {};
    config.on_full = VKP_ON_FULL_DROP_OLDEST;
    Relay relay(setup, config);
    Peer slow = relay.client();
    ask(slow, "SUBSCRIBE", "a");
    Peer publisher = relay.client();
    std::string payload(100000, 'x');
    for (int i = 0; i < 50; i++) {
        ask(publisher, "PUBLISH", "a", payload);
    }
    std::atomic<int> ends{0};
    relay.on_loop([&] {
        vkp_relay_drain(
            relay, [](void *user) { ++*static_cast<std::atomic<int> *>(user); }, &ends,
            vkp_after_ms(50));
        vkp_relay_drain(relay, nullptr, nullptr, 0); // once
    });
    vkp_test_wait_until("the end", [&] { return ends == 1; });
    CHECK(relay.stats().clients == 0);
    CHECK(hear(publisher).empty());
}

// ---------------------------------------------------------------------------------------------
// Who comes, who stays, where

TEST_CASE("nobody there for the time to linger, once somebody was: on_idle")
{
    struct Idle {
        int count = 0;
    } idle;
    vkp_relay_config config = {};
    config.linger_ms = 1000;
    config.on_idle = [](void *user) { static_cast<Idle *>(user)->count++; };
    config.user = &idle;
    config.max_clients = 2;
    StillRelay relay(config);
    Peer first;
    Peer second;
    Peer third;
    relay.pass(5000);
    CHECK(idle.count == 0); // nobody was ever there
    CHECK(relay.knock(&first) == "+PONG\r\n");
    relay.pass(5000);
    CHECK(idle.count == 0);
    relay.leave(&first);
    relay.pass(999);
    CHECK(relay.knock(&first) == "+PONG\r\n"); // just in time
    relay.pass(5000);
    CHECK(idle.count == 0);
    CHECK(relay.knock(&second) == "+PONG\r\n");
    CHECK(starts_with(relay.knock(&third), "-ERR max"));
    relay.leave(&first);
    relay.pass(5000);
    CHECK(idle.count == 0); // one is still there
    relay.leave(&second);
    relay.pass(999);
    CHECK(idle.count == 0);
    SECTION("the whole time")
    {
        relay.pass(1);
        CHECK(idle.count == 1);
        relay.pass(5000);
        CHECK(idle.count == 1);
    }
    SECTION("a short visit begins it anew")
    {
        CHECK(relay.knock(&first) == "+PONG\r\n");
        relay.leave(&first);
        relay.pass(999);
        CHECK(idle.count == 0);
        relay.pass(1);
        CHECK(idle.count == 1);
    }
    SECTION("a drain ends it")
    {
        vkp_relay_drain(relay, nullptr, nullptr, VKP_FOREVER);
        relay.pass(5000);
        CHECK(idle.count == 0);
    }
}

TEST_CASE("a relay is gone before loop 0 heard that the last client left: no time to linger begins")
{
    vkp_test_env test;
    vkp_test_env_init(&test);
    {
        vkp_test_loop first(vkp_test_backends()[0]);
        vkp_test_loop second(vkp_test_backends()[0]);
        vkp_loop *loops[] = {first, second};
        vkp_relay_config config = {};
        config.loops = loops;
        config.loop_count = 2;
        config.env = &test.env;
        config.linger_ms = 1000;
        config.on_idle = [](void *) { vkp_test_fail("on_idle of a relay that is gone"); };
        vkp_relay *relay = nullptr;
        const char *bound = nullptr;
        REQUIRE(vkp_relay_open(&config, &relay) == VKP_OK);
        REQUIRE(vkp_relay_listen(relay, vkp_str_of(vkp_test_fresh_address("idle")), &bound) ==
                VKP_OK);
        std::vector<Peer> peers;
        for (int i = 0; i < 4; i++) { // two on each loop
            peers.push_back(open(bound));
            say(peers.back(), wire("PING"));
        }
        const auto clients = [&] {
            vkp_relay_stats stats;
            vkp_relay_get_stats(relay, &stats);
            return stats.clients;
        };
        const uint64_t deadline = vkp_test_deadline();
        for (const Peer &peer : peers) {
            size_t len = 0;
            while (vkp_test_peer_try_read_frame(peer.get(), &len) == nullptr) {
                REQUIRE(vkp_sys_get_default()->clock_ns() < deadline);
                REQUIRE(vkp_loop_run_once(first, 0) == VKP_OK);
                REQUIRE(vkp_loop_run_once(second, 0) == VKP_OK);
            }
        }
        peers.clear();
        while (clients() > 2) {
            REQUIRE(vkp_loop_run_once(first, deadline) == VKP_OK);
        }
        while (clients() > 0) { // tells the first loop, which runs no more
            REQUIRE(vkp_loop_run_once(second, deadline) == VKP_OK);
        }
        vkp_relay_unref(relay);
        vkp_loop_close(first);
        vkp_loop_close(second);
    }
    vkp_test_env_deinit(&test);
}

TEST_CASE("on_idle comes on loop 0, whichever loop the last client was on, and may drain")
{
    EVERY_SETUP();
    struct Idle {
        vkp_relay *relay = nullptr;
        std::atomic<int> count{0};
        std::atomic<bool> ended{false};
    } idle;
    vkp_relay_config config = {};
    config.on_idle = [](void *user) {
        Idle *self = static_cast<Idle *>(user);
        self->count++;
        vkp_relay_drain(
            self->relay, [](void *arg) { static_cast<Idle *>(arg)->ended = true; }, self,
            vkp_test_deadline());
    };
    config.user = &idle;
    Relay relay(setup, config);
    idle.relay = relay;
    std::vector<Peer> peers = relay.client_per_loop();
    for (const Peer &peer : peers) {
        ask(peer, "SUBSCRIBE", "a");
    }
    while (peers.size() > 1) {
        peers.erase(peers.begin());
    }
    vkp_test_wait_until("one client", [&] { return relay.stats().clients == 1; });
    CHECK(ask(peers[0], "PING") != "");
    CHECK(idle.count == 0);
    peers.clear();
    vkp_test_wait_until("the end", [&] { return idle.ended.load(); });
    CHECK(idle.count == 1);
    CHECK(vkp_test_connect(relay.address.c_str()) == -1);
}

TEST_CASE("so many clients of one user over Unix sockets, and no more")
{
    EVERY_SETUP();
    vkp_relay_config config = {};
    config.max_clients_per_uid = 2;
    Relay relay(setup, config);
    std::string tcp;
    relay.on_loop([&] {
        const char *bound = nullptr;
        tcp = vkp_relay_listen(relay, vkp_str_of("tcp:127.0.0.1:0"), &bound) == VKP_OK ? bound : "";
    });
    Peer first = relay.client();
    Peer second = relay.client();
    CHECK(ask(first, "PING") == "+PONG\r\n");
    CHECK(ask(second, "PING") == "+PONG\r\n");
    Peer third = relay.client();
    CHECK(hear(third) == "-ERR max number of clients of this user reached\r\n");
    CHECK(hear(third).empty());
    std::vector<Peer> others;
    for (int i = 0; i < 5; i++) { // nobody knows whose they are
        others.push_back(open(tcp));
        CHECK(ask(others.back(), "PING") == "+PONG\r\n");
    }
    const vkp_relay_stats stats = relay.stats();
    CHECK(stats.clients == 7);
    CHECK(stats.accepted == 7);
    CHECK(stats.refused[VKP_REFUSAL_USER_FULL] == 1);
    CHECK(stats.refused[VKP_REFUSAL_FULL] == 0);
    first.reset();
    vkp_test_wait_until("a place", [&] { return relay.stats().clients == 6; });
    first = relay.client();
    CHECK(ask(first, "PING") == "+PONG\r\n");
}

TEST_CASE("other users come in when they are allowed to, and see the file then")
{
    static uint32_t uid;
    vkp_sys sys = *vkp_sys_get_default();
    sys.peer = [](int fd, vkp_peer *peer) {
        const int result = vkp_sys_get_default()->peer(fd, peer);
        peer->uid = uid;
        return result;
    };
    const uint32_t own = vkp_sys_get_default()->user_id();
    const uint32_t allowed[] = {own + 1, own + 2};
    const bool some = GENERATE(false, true);
    vkp_relay_config config = {};
    config.allow_uids = some ? allowed : nullptr;
    config.allow_uid_count = some ? 2 : 0;
    StillRelay relay(config, &sys);
    struct stat status;
    REQUIRE(stat(relay.address.c_str() + 5, &status) == 0);
    CHECK((status.st_mode & 07777) == (some ? 0666 : 0600));
    uint64_t refused = 0;
    for (uint32_t each : {own, own + 1, own + 2, own + 3, own - 1}) {
        Peer peer;
        uid = each;
        INFO("user " << each);
        const bool in = each == own || (some && (each == own + 1 || each == own + 2));
        CHECK(relay.knock(&peer) == (in ? "+PONG\r\n" : "-ERR this user is not allowed here\r\n"));
        refused += in ? 0 : 1;
    }
    CHECK(relay.stats().refused[VKP_REFUSAL_USER] == refused);
}

TEST_CASE("a file that is taken away is bound again; clients notice nothing")
{
    EVERY_SETUP();
    vkp_relay_config config = {};
    config.check_ms = 5;
    Relay relay(setup, config);
    Peer steady = relay.client();
    ask(steady, "SUBSCRIBE", "a");
    for (int i = 1; i <= 3; i++) {
        REQUIRE(unlink(relay.address.c_str() + 5) == 0);
        vkp_registry_stats stats;
        vkp_test_wait_until("the file", [&] {
            vkp_registry_get_stats(vkp_relay_get_registry(relay), &stats);
            return stats.rebound == static_cast<uint64_t>(i);
        });
        CHECK(stats.lost == static_cast<uint64_t>(i));
        CHECK(stats.live == 1);
        Peer next = relay.client();
        CHECK(ask(next, "PUBLISH", "a", "hi") == ":1\r\n");
        CHECK(hear(steady) == message(2, "a", "hi"));
    }
    CHECK(contains(relay.log(), "bound again"));
}

TEST_CASE("an address without a path is a name of its own; an abstract one has no file")
{
    REQUIRE(setenv("XDG_RUNTIME_DIR", vkp_test_dir(), 1) == 0);
    EVERY_SETUP();
    std::set<std::string> paths;
    vkp_test_loop loop; // of the library's own client, who knows abstract names
    {
        Relay relay(setup);
        for (int i = 0; i < 3; i++) {
            std::string address;
            relay.on_loop([&] {
                const char *bound = nullptr;
                address =
                    vkp_relay_listen(relay, vkp_str_of("unix:"), &bound) == VKP_OK ? bound : "";
            });
            CHECK(starts_with(address, std::string("unix:") + vkp_test_dir() + "/"));
            CHECK(paths.insert(address.substr(5)).second);
            CHECK(vkp_test_exists(address.c_str() + 5));
            CHECK(ask(open(address), "PING") == "+PONG\r\n");
        }
        vkp_registry_stats stats;
        vkp_registry_get_stats(vkp_relay_get_registry(relay), &stats);
        CHECK(stats.live == 4);
        CHECK(stats.created == 4);
        vkp_status abstract = VKP_OK;
        std::string name = "unix:@" + std::string(vkp_test_fresh_path("abstract"));
        relay.on_loop(
            [&] { abstract = vkp_relay_listen(relay, vkp_str_of(name.c_str()), nullptr); });
#ifdef __linux__
        REQUIRE(abstract == VKP_OK);
        CHECK_FALSE(vkp_test_exists(name.c_str() + 5));
        CHECK_FALSE(vkp_test_exists(name.c_str() + 6));
        struct Answer {
            std::atomic<int> status{1};
        } answer;
        vkp_health_config config = {};
        config.address = vkp_str_of(name.c_str());
        config.timeout_ms = 30000;
        config.user = &answer;
        config.on_result = [](void *user, const vkp_health *health) {
            static_cast<Answer *>(user)->status = health->status;
        };
        vkp_health_check *check = nullptr;
        REQUIRE(vkp_health_check_open(loop, &config, &check) == VKP_OK);
        vkp_test_run_until(loop, "an answer", [&] { return answer.status != 1; });
        CHECK(answer.status == VKP_OK);
        vkp_health_check_unref(check);
#else
        CHECK(abstract == VKP_ERR_UNSUPPORTED);
#endif
    }
    for (const std::string &path : paths) {
        CHECK_FALSE(vkp_test_exists(path.c_str()));
        CHECK_FALSE(vkp_test_exists((path + ".lock").c_str()));
    }
    REQUIRE(unsetenv("XDG_RUNTIME_DIR") == 0);
}

TEST_CASE("wrong configs are refused")
{
    vkp_test_loop loop;
    vkp_loop *view = loop;
    vkp_relay *relay = nullptr;
    vkp_relay_config config = {};
    CHECK(vkp_relay_open(nullptr, &relay) == VKP_ERR_INVALID);
    CHECK(vkp_relay_open(&config, &relay) == VKP_ERR_INVALID);
    config.loops = &view;
    CHECK(vkp_relay_open(&config, nullptr) == VKP_ERR_INVALID);
    config.server = vkp_str_of("nonsense");
    CHECK(vkp_relay_open(&config, &relay) == VKP_ERR_INVALID);
    CHECK(relay == nullptr);
    vkp_relay_unref(nullptr);
}

TEST_CASE("no memory for opening or listening, at every allocation: an error, and nothing is left")
{
    const bool alone = GENERATE(true, false);
    const size_t loop_count = GENERATE(size_t{1}, size_t{3});
    std::string server = vkp_test_fresh_address("nowhere");
    uint64_t k = 1;
    bool all = false;
    for (; !all; k++) {
        vkp_test_env test;
        vkp_test_env_init(&test);
        {
            std::vector<std::unique_ptr<vkp_test_loop>> loops;
            std::vector<vkp_loop *> views;
            for (size_t i = 0; i < loop_count; i++) {
                loops.push_back(std::make_unique<vkp_test_loop>());
                views.push_back(*loops.back());
            }
            vkp_relay_config config = {};
            config.server = vkp_str_of(alone ? nullptr : server.c_str());
            config.loops = views.data();
            config.loop_count = loop_count;
            config.env = &test.env;
            vkp_relay *relay = nullptr;
            std::string address = vkp_test_fresh_address("nomem");
            vkp_test_env_fault(&test, VKP_TEST_FAULT_ONCE, k);
            vkp_status status = vkp_relay_open(&config, &relay);
            if (status == VKP_OK) {
                status = vkp_relay_listen(relay, vkp_str_of(address.c_str()), nullptr);
            }
            all = vkp_test_env_failures(&test) == 0;
            CHECK(status == (all ? VKP_OK : VKP_ERR_NOMEM));
            if (relay != nullptr && status != VKP_OK) {
                CHECK(!vkp_test_exists(address.c_str() + 5));
                CHECK(vkp_relay_listen(relay, vkp_str_of(address.c_str()), nullptr) ==
                      VKP_OK); // now it can
            }
            vkp_relay_unref(relay);
            CHECK(!vkp_test_exists(address.c_str() + 5));
            while (!loops.empty()) {
                loops.pop_back();
            }
        }
        vkp_test_env_deinit(&test);
    }
    CHECK(k > 5);
}

// One session of all that a client may do. Memory runs out anywhere in it: answers may be missing,
// the connection may be closed.
void session(Relay &relay, int protocol)
{
    Peer peer = relay.client();
    Peer publisher = relay.client();
    std::string script =
        wires({"HELLO " + std::to_string(protocol), "CLIENT SETNAME me", "SET k v", "GET k",
               "MULTI", "SET k w", "ZADD z 1 a", "ZRANGE z 0 -1 WITHSCORES", "EXEC",
               "SUBSCRIBE a b c", "PSUBSCRIBE a* b*", "SSUBSCRIBE s", "UNSUBSCRIBE b", "PING",
               "CLIENT INFO", "PUBSUB CHANNELS", "UNSUBSCRIBE", "PUNSUBSCRIBE", "SUNSUBSCRIBE"}) +
        "ECHO \"inline words\"\r\n" + vkp_test_wire({"ECHO", std::string(100000, 'x')}) +
        wires({"HGETALL none", "SUBSCRIBE a", "RESET", "COMMAND INFO get", "QUIT"});
    (void)vkp_test_peer_send(peer.get(), script.data(), script.size());
    std::string news = wires({"PUBLISH a hi", "PUBLISH b hi", "SPUBLISH s hi", "QUIT"});
    (void)vkp_test_peer_send(publisher.get(), news.data(), news.size());
    vkp_test_peer_drain(publisher.get());
    // A subscription may wait for a connection upstream, which may fail for ever at each n-th
    // allocation: the end comes with memory.
    vkp_test_env_fault(&relay.test, VKP_TEST_FAULT_NONE, 0);
    vkp_test_peer_drain(peer.get());
}

TEST_CASE("memory runs out during sessions: connections may close, the relay lives")
{
    NEEDS_SERVER();
    const bool first = GENERATE(true, false); // of all setups, each with 160 sessions
    const Setup setup = first ? one_loop() : setups().back();
    INFO(setup);
    const bool alone = GENERATE(true, false);
    Server server = start_server();
    Relay relay(setup,
                alone ? vkp_relay_config{} : upstream_of(vkp_test_server_unix(server.get())));
    Peer calm = relay.client();
    CHECK(ask(calm, "PING") == "+PONG\r\n");
    if (!alone) {
        Relay::until_connected(calm);
    }
    for (uint64_t k = 1; k <= 120; k++) {
        vkp_test_env_fault(&relay.test, VKP_TEST_FAULT_ONCE, k);
        session(relay, 2 + static_cast<int>(k % 2));
    }
    for (uint64_t every = 2; every <= 40; every++) {
        vkp_test_env_fault(&relay.test, VKP_TEST_FAULT_EVERY, every);
        session(relay, 2 + static_cast<int>(every % 2));
    }
    vkp_test_env_fault(&relay.test, VKP_TEST_FAULT_NONE, 0);
    CHECK(vkp_test_env_failures(&relay.test) > 20);
    Peer after = relay.client();
    if (!alone) {
        Relay::until_connected(after);
        Peer direct = open(vkp_test_server_unix(server.get()));
        ask(after, "SUBSCRIBE", "a");
        until_numsub(direct, "a", 1);
        ask(direct, "PUBLISH", "a", "hi"); // a pattern may have stayed: the log tells
    } else {
        ask(after, "SUBSCRIBE", "a");
        Peer publisher = relay.client();
        CHECK(ask(publisher, "PUBLISH", "a", "hi") == ":1\r\n");
    }
    CHECK(hear(after) == message(2, "a", "hi"));
    after.reset();
    calm.reset();
    vkp_test_wait_until("all to be gone", [&] { return relay.stats().clients <= 1; });
}

TEST_CASE("a relay is let go in the middle of everything")
{
    NEEDS_SERVER();
    EVERY_SETUP();
    Server server = start_server();
    const bool dead = GENERATE(false, true);
    Relay relay(setup, upstream_of(vkp_test_server_unix(server.get())));
    relay.connected_client();
    std::vector<Peer> peers;
    for (int i = 0; i < 20; i++) {
        peers.push_back(relay.client());
        std::string script = wires({"SUBSCRIBE a b", "UNSUBSCRIBE", "SET k v"});
        for (int j = 0; j < 200; j++) {
            script += wire("ECHO x") + wire("INCR n");
        }
        say(peers.back(), script + wires({"SUBSCRIBE c", "MULTI", "SUBSCRIBE d"}));
    }
    for (const Peer &peer : peers) {
        // Under way for sure: not still between two loops.
        CHECK(starts_with(hear(peer), "*3\r\n$9\r\nsubscribe"));
    }
    if (dead) {
        vkp_test_server_kill(server.get());
    }
    relay.let_go();
    for (const Peer &peer : peers) {
        vkp_test_peer_drain(peer.get()); // it ends
    }
    CHECK(!vkp_test_exists(relay.address.c_str() + 5));
}

} // namespace
