/* What may differ between a server and a relay before it, by command: parts of replies that two
   servers do not have in common either, and differences that are the relay's.
   SPDX-License-Identifier: MIT                                                                  */
#ifndef VKP_TEST_CONFORMANCE_DIFFERENCES_H
#define VKP_TEST_CONFORMANCE_DIFFERENCES_H

#include "conformance/reply.h"

namespace conformance {

struct Masked {
    const char *command; // and with these arguments: those that begin so
    Mask mask;
    const char *reason;
};

// A second server of the same program, asked directly, would differ as well. The first row that
// fits counts.
static const Masked masks[] = {
    {"ACL GENPASS", Mask::Random, "a password at random"},
    {"ACL CAT", Mask::Order, "a table that is hashed with a random seed"},
    {"ACL LOG", Mask::Kind, "addresses and times"},
    {"CLIENT ID", Mask::Numbers, "a number for each connection"},
    {"COMMAND DOCS", Mask::Orders, "a table that is hashed with a random seed"},
    {"COMMAND INFO", Mask::Orders, "a table that is hashed with a random seed"},
    {"COMMAND LIST", Mask::Order, "a table that is hashed with a random seed"},
    {"COMMAND", Mask::Orders, "a table that is hashed with a random seed"},
    {"COMMANDLOG GET", Mask::Kind, "times"},
    {"COMMANDLOG LEN", Mask::Numbers, "how many commands were slow"},
    {"CONFIG GET", Mask::Order, "a table that is hashed with a random seed"},
    {"DEBUG OBJECT", Mask::Kind, "addresses and times"},
    {"FUNCTION LIST", Mask::Orders, "a table that is hashed with a random seed"},
    {"HELLO", Mask::Greeting, "a number for each connection"},
    {"HPTTL", Mask::Numbers, "the time that is left"},
    {"INFO", Mask::Names, "times, sizes, counts"},
    {"LASTSAVE", Mask::Numbers, "a time"},
    {"LATENCY HISTOGRAM", Mask::Kind, "times"},
    {"LOLWUT", Mask::Kind, "a drawing at random"},
    {"MEMORY DOCTOR", Mask::Kind, "sizes"},
    {"MEMORY MALLOC-STATS", Mask::Kind, "sizes"},
    {"MEMORY STATS", Mask::Kind, "sizes"},
    {"OBJECT IDLETIME", Mask::Numbers, "a time"},
    {"PTTL", Mask::Numbers, "the time that is left"},
    {"RANDOMKEY", Mask::Kind, "a key at random"},
    {"ROLE", Mask::Numbers, "what is replicated: WAIT's message is"},
    {"SCAN 1", Mask::Kind, "a table that is hashed with a random seed"},
    {"SDIFF", Mask::Order, "a table that is hashed with a random seed"},
    {"SINTER", Mask::Order, "a table that is hashed with a random seed"},
    {"SUNION", Mask::Order, "a table that is hashed with a random seed"},
    {"SLOWLOG GET", Mask::Kind, "times"},
    {"SLOWLOG LEN", Mask::Numbers, "how many commands were slow"},
    {"TIME", Mask::Numbers, "a time"},
    {"VLINKS", Mask::Kind, "levels at random"},
    {"VINFO", Mask::Numbers, "levels at random"},
    {"XADD x *", Mask::Numbers, "a time"},
    {"XINFO CONSUMERS", Mask::Numbers, "times"},
    {"XINFO STREAM x FULL", Mask::Numbers, "times"},
    {"XPENDING x g - +", Mask::Numbers, "times"},
};

// Where the difference is.
enum class Where {
    Reply, // in what the command is answered, in EXEC's reply too
    Queue  // between MULTI and EXEC, in the place of QUEUED; EXEC is then aborted
};

// Versions are 100 * major + minor; 0: any.
struct Difference {
    const char *command; // and with these arguments: those that begin so
    Where where;
    const char *direct; // a part of the server's reply
    const char *relay;  // a part of the relay's reply
    const char *reason;
    const char *words; // in docs/relay.md, which says so
    unsigned from;
    unsigned before;
    char family; // 'v' for valkey; 0: any
};

// What only an operator should do, and what would make the relay a replica.
constexpr Difference denied(const char *command, Where where)
{
    return {
        command, where, "", "-DENIED ", "everybody would pay for it", "## What the relay refuses",
        0,       0,     0};
}

constexpr Difference denied_in_multi(const char *command)
{
    return {command,
            Where::Queue,
            "",
            "-DENIED ",
            "the relay answers it",
            "And, between `MULTI` and `EXEC`, what the relay answers",
            0,
            0,
            0};
}

constexpr Difference not_subscribed(const char *command)
{
    return {command,
            Where::Reply,
            "-NOSUB ",
            "unsubscribe",
            "one version differs from all others",
            "is confirmed, as by all servers but valkey 8.0",
            800,
            801,
            'v'};
}

static const Difference differences[] = {
    denied("CLIENT PAUSE", Where::Reply),
    denied("CLIENT PAUSE", Where::Queue),
    denied("DEBUG SLEEP", Where::Reply),
    denied("DEBUG SLEEP", Where::Queue),
    denied("FAILOVER", Where::Reply),
    denied("FAILOVER", Where::Queue),
    denied("PSYNC", Where::Reply),
    denied("PSYNC", Where::Queue),
    denied("REPLCONF", Where::Reply),
    denied("REPLCONF", Where::Queue),
    denied("SHUTDOWN", Where::Reply),
    denied("SHUTDOWN", Where::Queue),
    denied("SYNC", Where::Reply),
    denied("SYNC", Where::Queue),
    {"CLIENT KILL", Where::Reply, "", "-DENIED ", "it fits the relay's connections",
     "since the relay's connections fit too", 0, 0, 0},
    {"CLIENT KILL", Where::Queue, "", "-DENIED ", "the same, and by a number of the relay's",
     "`UNBLOCK` or `KILL ID`", 0, 0, 0},
    denied_in_multi("CLIENT ID"),
    denied_in_multi("CLIENT GETNAME"),
    denied_in_multi("CLIENT INFO"),
    denied_in_multi("CLIENT SETINFO"),
    denied_in_multi("CLIENT SETNAME"),
    denied_in_multi("CLIENT UNBLOCK"),
    denied_in_multi("HELLO"),
    denied_in_multi("PSUBSCRIBE"),
    denied_in_multi("PUNSUBSCRIBE"),
    denied_in_multi("SSUBSCRIBE"),
    denied_in_multi("SUBSCRIBE"),
    denied_in_multi("SUNSUBSCRIBE"),
    denied_in_multi("UNSUBSCRIBE"),
    {"CLIENT INFO", Where::Reply, "", " tot-cmds=0", "the fields of all servers",
     "`CLIENT INFO` has the fields of all servers", 0, 0, 0},
    {"CLIENT LIST", Where::Reply, "", "name=valkey-push-relay ",
     "the server's clients, not the relay's", "relay's connections are called `valkey-push-relay`",
     0, 0, 0},
    {"CLIENT SETINFO", Where::Reply, "-ERR ", "+OK", "the server is too old",
     "one that is too old for", 0, 702, 0},
    {"CLIENT ID", Where::Reply, "-ERR ", ":", "the server is too old", "one that is too old for", 0,
     500, 0},
    {"HELLO", Where::Reply, "-", "", "the server is too old", "one that is too old for", 600, 602,
     0},
    not_subscribed("PUNSUBSCRIBE"),
    not_subscribed("SUNSUBSCRIBE"),
    not_subscribed("UNSUBSCRIBE"),
};

} // namespace conformance

#endif
