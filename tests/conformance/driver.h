/* Two servers of the same program, a relay before one of them, and the same scripts said to both.
   SPDX-License-Identifier: MIT                                                                  */
#ifndef VKP_TEST_CONFORMANCE_DRIVER_H
#define VKP_TEST_CONFORMANCE_DRIVER_H

#include "conformance/scripts.h"
#include "support/relay_probe.h"

namespace conformance {

using relay_probe::hear;
using relay_probe::hear_all;
using relay_probe::hear_some;
using relay_probe::open;
using relay_probe::Peer;
using relay_probe::say;
using relay_probe::starts_with;
using relay_probe::Strings;
using relay_probe::wire;

// How a script is said.
struct Variant {
    int protocol;
    bool multi;   // between MULTI and EXEC
    size_t piece; // bytes of one write
};

inline std::ostream &operator<<(std::ostream &out, const Variant &variant)
{
    return out << "RESP" << variant.protocol << (variant.multi ? ", in MULTI" : "")
               << (variant.piece != SIZE_MAX ? ", in pieces" : "");
}

// The commands of a script as a client sends them: with MULTI and EXEC, and QUIT at the end.
inline std::vector<Step> steps_of(const Script &script, const Variant &variant)
{
    std::vector<Step> steps = script.steps;
    if (variant.multi) {
        steps.insert(steps.begin(), {Step::Kind::Command, {"MULTI"}});
        steps.push_back({Step::Kind::Command, {"EXEC"}});
    }
    steps.push_back({Step::Kind::Command, {"QUIT"}});
    return steps;
}

// One client that says a script.
class Speaker {
  public:
    Speaker(const std::string &address, const std::vector<Step> &steps, const Variant &variant)
        : address_(address), steps_(steps), piece_(variant.piece), peer_(open(address))
    {
        if (variant.protocol == 3) {
            send(wire("HELLO 3"));
            hear(peer_); // compared where a script says it
        }
    }
    // Say all of it, or as far as nothing has to be waited for.
    void begin()
    {
        std::string bytes;
        while (at_ < steps_.size() && steps_[at_].kind == Step::Kind::Command) {
            bytes += vkp_test_wire(steps_[at_].words);
            pending_ += steps_[at_].replies();
            at_++;
        }
        send(bytes);
    }
    // The rest of it, and all that is answered until the other side closes.
    Strings end()
    {
        while (at_ < steps_.size()) {
            wait();
            const Step &step = steps_[at_++];
            if (step.kind == Step::Kind::Frame) {
                pending_++;
            } else {
                other(step.words);
            }
            begin();
        }
        for (std::string frame = hear(peer_); !frame.empty(); frame = hear(peer_)) {
            frames_.push_back(frame);
        }
        return frames_;
    }

  private:
    // Unix sockets keep no borders between writes, but a reader that is awake sees most of them. A
    // script may end the connection before it is all sent.
    void send(const std::string &bytes)
    {
        for (size_t at = 0; at < bytes.size(); at += std::min(piece_, bytes.size())) {
            const std::string part = bytes.substr(at, piece_);
            (void)vkp_test_peer_send(peer_.get(), part.data(), part.size());
        }
    }
    void wait()
    {
        for (; pending_ > 0; pending_--) {
            frames_.push_back(hear(peer_));
        }
    }
    void other(const Words &words)
    {
        if (!other_) {
            other_ = open(address_);
        }
        say(other_, vkp_test_wire(words));
        frames_.push_back(hear(other_));
    }
    std::string address_;
    const std::vector<Step> &steps_;
    size_t piece_;
    Peer peer_;
    Peer other_;
    size_t at_ = 0;
    size_t pending_ = 0; // frames that are due
    Strings frames_;
};

// Another client of the relay: what it asks is answered rightly and in order, whatever others ask.
class Neighbour {
  public:
    Neighbour(Peer peer, int protocol) : peer_(std::move(peer)), protocol_(protocol)
    {
        relay_probe::ask(peer_, "HELLO", std::to_string(protocol));
        relay_probe::ask(peer_, "CLIENT", "SETNAME", "neighbour");
    }
    void ask_before()
    {
        const std::string n = std::to_string(count_++);
        say(peer_, relay_probe::wires({"ECHO " + n, "CONFIG GET databases", "MULTI", "ECHO " + n,
                                       "CONFIG GET databases", "EXEC"}));
        const std::string map = (protocol_ == 3 ? "%1\r\n" : "*2\r\n") +
                                relay_probe::bulk("databases") + relay_probe::bulk("16");
        const std::string echo = relay_probe::bulk(n);
        expect({echo, map, "+OK\r\n", "+QUEUED\r\n", "+QUEUED\r\n", "*2\r\n" + echo + map});
    }
    void ask_behind()
    {
        const std::string n = std::to_string(count_++);
        say(peer_, relay_probe::wires({"PING " + n, "CLIENT GETNAME", "ECHO " + n}));
        expect({relay_probe::bulk(n), relay_probe::bulk("neighbour"), relay_probe::bulk(n)});
    }
    // The first reply that is not right, or "". Counts the others.
    std::string check(size_t &right)
    {
        std::string wrong;
        for (const std::string &reply : expected_) {
            const std::string heard = hear(peer_);
            if (heard != reply && wrong.empty()) {
                wrong = "not " + reply + " but " + heard;
            }
            right += wrong.empty() ? 1 : 0;
        }
        expected_.clear();
        return wrong;
    }

  private:
    void expect(const Strings &replies)
    {
        expected_.insert(expected_.end(), replies.begin(), replies.end());
    }
    Peer peer_;
    int protocol_;
    size_t count_ = 0;
    Strings expected_;
};

// The servers of this program: what version they are, and what options they need.
struct Program {
    unsigned version; // 100 * major + minor
    char family;      // 'v' for valkey, 'r' for redis
    std::vector<const char *> options;
};

inline unsigned version_in(const std::string &info, const std::string &name)
{
    const size_t at = info.find(name);
    unsigned major = 0;
    unsigned minor = 0;
    return at == std::string::npos ||
                   std::sscanf(info.c_str() + at + name.size(), "%u.%u", &major, &minor) != 2
               ? 0
               : 100 * major + minor;
}

inline Program find_program()
{
    relay_probe::Server server = relay_probe::start_server();
    Peer peer = open(vkp_test_server_unix(server.get()));
    const std::string info = relay_probe::ask(peer, "INFO", "server");
    const unsigned valkey = version_in(info, "valkey_version:");
    Program program = {valkey > 0 ? valkey : version_in(info, "redis_version:"),
                       valkey > 0 ? 'v' : 'r',
                       {"--hz", "500"}}; // so often what blocks is looked at
    if (program.version >= 700) {
        program.options.insert(program.options.end(), {"--enable-debug-command", "yes"});
    }
    return program;
}

static const char library[] =
    "#!lua name=mylib\n"
    "redis.register_function('echo_it', function(keys, args) return args[1] end)\n"
    "redis.register_function('write_it', function(keys) return redis.call('SET', keys[1], 'w') "
    "end)\n"
    "redis.register_function{function_name='read_it', flags={'no-writes'},"
    " callback=function(keys) return redis.call('GET', keys[1]) end}\n";

// A server, and a connection to it that is not of the comparison.
class Ground {
  public:
    explicit Ground(const Program &program)
        : server(relay_probe::start_server(program.options)),
          address(vkp_test_server_unix(server.get())), control(open(address))
    {
    }
    // The keys and the state with which each script begins.
    void reset(const Script &script)
    {
        Strings commands = {"FLUSHALL",
                            "ACL DELUSER u",
                            "ACL LOG RESET",
                            "SLOWLOG RESET",
                            "SET s hello",
                            "SET n 10",
                            "RPUSH l a b c",
                            "SADD set a",
                            "SADD nums 1 2 3",
                            "HMSET h f v g 2",
                            "ZADD z 1 a 2 b 3 c",
                            "ZADD y 1 a 5 d",
                            "XADD x 1-1 f v",
                            "XADD x 2-1 f w",
                            "XGROUP CREATE x g 0",
                            "GEOADD geo 13.361389 38.115556 Palermo 15.087269 37.502669 Catania",
                            "PFADD hll a b",
                            "SETBIT bits 7 1"};
        if (script.has({"EVAL", "SCRIPT", "FUNCTION", "FCALL"})) {
            commands.insert(commands.end(), {"SCRIPT FLUSH", "FUNCTION FLUSH"});
        }
        say(control, relay_probe::wires(commands));
        hear_some(control, commands.size());
        if (script.has({"SAVE", "BGSAVE", "BGREWRITEAOF", "DEBUG"})) {
            until_idle();
        }
    }
    // Nothing is being saved.
    void until_idle() const
    {
        vkp_test_wait_until("the end of what the server saves", [&] {
            const std::string info = relay_probe::ask(control, "INFO", "persistence");
            return relay_probe::contains(info, "rdb_bgsave_in_progress:0") &&
                   relay_probe::contains(info, "aof_rewrite_in_progress:0") &&
                   relay_probe::contains(info, "aof_rewrite_scheduled:0");
        });
    }
    std::map<std::string, std::string> values() const
    {
        std::map<std::string, std::string> values = {{"library", library}};
        relay_probe::ask(control, "SET", "s", "hello");
        values["dump"] = parse(relay_probe::ask(control, "DUMP", "s")).text();
        say(control, vkp_test_wire({"FUNCTION", "LOAD", library}));
        hear(control);
        values["functions"] = parse(relay_probe::ask(control, "FUNCTION", "DUMP")).text();
        return values;
    }

    relay_probe::Server server;
    std::string address;
    Peer control;
};

// What both sides answered to a script.
struct Heard {
    Strings direct;
    Strings relayed;
    std::string neighbour; // its first reply that was not right
};

class Pair {
  public:
    Pair(const relay_probe::Setup &setup, const Program &program)
        : direct(program), behind(program),
          relay(setup, relay_probe::upstream_of(behind.address.c_str()))
    {
        relay.connected_client();
        for (size_t i = 0; i < std::max(setup.loops, size_t{2}); i++) {
            const int protocol = program.version < 600 || i % 2 == 0 ? 2 : 3;
            neighbours_.push_back(std::make_unique<Neighbour>(relay.client(), protocol));
        }
    }
    // only_relay: not said to the server itself.
    Heard run(const Script &script, const Variant &variant, bool only_relay)
    {
        direct.reset(script);
        behind.reset(script);
        const std::vector<Step> steps = steps_of(script, variant);
        Heard heard;
        Speaker first(direct.address, only_relay ? nothing_ : steps, variant);
        Speaker second(relay.address, steps, variant);
        first.begin();
        for (const auto &neighbour : neighbours_) {
            neighbour->ask_before();
        }
        second.begin();
        for (const auto &neighbour : neighbours_) {
            neighbour->ask_behind();
        }
        heard.direct = first.end();
        heard.relayed = second.end();
        for (const auto &neighbour : neighbours_) {
            const std::string wrong = neighbour->check(neighbours_right);
            heard.neighbour = heard.neighbour.empty() ? wrong : heard.neighbour;
        }
        return heard;
    }

    Ground direct;
    Ground behind;
    relay_probe::Relay relay;
    size_t neighbours_right = 0;

  private:
    const std::vector<Step> nothing_ = {{Step::Kind::Command, {"QUIT"}}};
    std::vector<std::unique_ptr<Neighbour>> neighbours_;
};

} // namespace conformance

#endif
