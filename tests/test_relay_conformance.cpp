// SPDX-License-Identifier: MIT
//
// What a program sees directly it sees through the relay: every command of the server, said to a
// server and, through a relay, to another server of the same program. The replies are the same byte
// for byte, but for what two servers do not have in common and for the differences that
// docs/relay.md names (both are tables in conformance/differences.h). conformance/commands.txt has
// what is said. VKP_TEST_CONFORMANCE=full: with every backend, and in small pieces too.
#include "support/catch.hpp"

#include "support/relay_probe.h"

#include "conformance/judge.h"

#include <cstdio>
#include <fstream>
#include <sstream>

namespace {

using namespace conformance;

bool is_full()
{
    const char *wanted = std::getenv("VKP_TEST_CONFORMANCE");
    return wanted != nullptr && std::string(wanted) == "full";
}

// One loop, and several; under ThreadSanitizer several, which have more to show.
std::vector<relay_probe::Setup> wanted_setups()
{
    if (is_full()) {
        return relay_probe::setups();
    }
    const std::vector<relay_probe::Setup> all = relay_probe::setups();
    return VKP_TEST_TSAN ? std::vector<relay_probe::Setup>{all.back()}
                         : std::vector<relay_probe::Setup>{all.front(), all.back()};
}

std::vector<Variant> variants(const Program &program)
{
    std::vector<Variant> all;
    for (const size_t piece : {SIZE_MAX, size_t{7}}) {
        for (const int protocol : {2, 3}) {
            for (const bool multi : {false, true}) {
                if ((protocol == 2 || program.version >= 600) && (piece == SIZE_MAX || is_full())) {
                    all.push_back({protocol, multi, piece});
                }
            }
        }
    }
    return all;
}

// To the server itself this is not said: it would end, or take the client for a replica.
bool is_for_the_relay_only(const Script &script)
{
    return script.text == "SYNC" || script.text == "SHUTDOWN";
}

// Redis from 7.2 and valkey to 8.1 do not answer a login that fails behind a reply that is not sent
// yet: in EXEC's reply an element is missing then.
bool is_without_answer(const Script &script, const Program &program)
{
    return script.has({"AUTH"}) && program.version >= 702 &&
           !(program.family == 'v' && program.version >= 900);
}

// Servers before redis 7.0 have commands of these names, which end a connection that speaks HTTP,
// with the replies that are not sent yet.
bool is_http(const Script &script)
{
    return script.has({"HOST:", "POST"});
}

bool is_said(const Script &script, const Variant &variant, const Program &program)
{
    return program.version >= script.from &&
           !(variant.multi &&
             (script.plain || is_http(script) || is_without_answer(script, program)));
}

// Whether one of the scripts has the command.
bool is_in(const std::vector<Script> &scripts, const Command &command)
{
    for (const Script &script : scripts) {
        for (const Step &step : script.steps) {
            if (!step.words.empty() && fits(command.name, step.words)) {
                return true;
            }
        }
    }
    return false;
}

// What was said to one pair, and what was wrong.
struct Totals {
    size_t commands = 0;
    size_t subcommands = 0;
    size_t written = 0; // of both: those in commands.txt
    size_t scripts = 0;
    size_t wrong = 0;

    void add(const Script &script, const Variant &variant, const std::string &trouble)
    {
        scripts++;
        if (!trouble.empty() && wrong++ < 40) {
            std::ostringstream line;
            line << script.text << "\n  (" << variant << "): " << trouble << "\n";
            std::fputs(line.str().c_str(), stderr);
        }
    }
    void print(const Program &program, const relay_probe::Setup &setup, const Judge &judge,
               size_t neighbours) const
    {
        std::printf("conformance: %s %u.%u, %s, %zu loop%s: %zu commands, %zu subcommands (%zu of "
                    "both in commands.txt), %zu scripts, %zu replies compared, %zu named "
                    "differences, %zu errors at EXEC, %zu replies to neighbours\n",
                    program.family == 'v' ? "valkey" : "redis", program.version / 100,
                    program.version % 100, setup.backend->name, setup.loops,
                    setup.loops == 1 ? "" : "s", commands, subcommands, written, scripts,
                    judge.comparisons, judge.named(), judge.late_errors, neighbours);
        std::fflush(stdout);
    }
};

Totals run_all(Pair &pair, const Program &program, Judge &judge,
               const std::vector<Command> &commands, bool also_long)
{
    const std::vector<Script> written = read_scripts(pair.direct.values());
    std::vector<Script> scripts = made_scripts(commands);
    scripts.insert(scripts.end(), written.begin(), written.end());
    Totals totals;
    for (const Command &command : commands) {
        (command.name_words() > 1 ? totals.subcommands : totals.commands)++;
        totals.written += is_in(written, command) ? 1 : 0;
    }
    for (const Variant &variant : variants(program)) {
        for (const Script &script : scripts) {
            if (!is_said(script, variant, program) ||
                (!also_long && script.has({"PFSELFTEST"}))) { // seconds
                continue;
            }
            const bool only_relay = is_for_the_relay_only(script);
            INFO(script.text << " (" << variant << ")");
            const Heard heard = pair.run(script, variant, only_relay);
            totals.add(script, variant, judge.judge(script, variant, heard, only_relay));
        }
        also_long = false;
    }
    return totals;
}

} // namespace

TEST_CASE("conformance: every command is answered as directly")
{
    NEEDS_SERVER();
    const Program program = find_program();
    bool also_long = true;
    for (const relay_probe::Setup &setup : wanted_setups()) {
        INFO(setup);
        Judge judge(program);
        Pair pair(setup, program);
        const std::vector<Command> commands =
            commands_of(relay_probe::ask(pair.direct.control, "COMMAND"));
        const Totals totals = run_all(pair, program, judge, commands, also_long);
        totals.print(program, setup, judge, pair.neighbours_right);
        CHECK(totals.wrong == 0);
        CHECK(judge.unseen(commands) == "");
        // COMMAND counts as COMMAND COUNT does; each is said at least once in each variant, and
        // answered by a reply, and EXEC's, and QUIT's.
        CHECK(":" + std::to_string(totals.commands) + "\r\n" ==
              relay_probe::ask(pair.direct.control, "COMMAND", "COUNT"));
        CHECK(totals.commands > 100);
        CHECK((program.version < 700 || totals.subcommands > 100));
        CHECK(10 * totals.written > 9 * commands.size());
        CHECK(totals.scripts > variants(program).size() * commands.size());
        CHECK(judge.comparisons > 2 * totals.scripts);
        CHECK(pair.neighbours_right >= 18 * totals.scripts);
        also_long = false;
    }
}

TEST_CASE("conformance: differences are written down in docs/relay.md")
{
    const char *folder = std::getenv("VKP_TEST_SOURCE_DIR");
    std::ifstream file(std::string(folder ? folder : ".") + "/docs/relay.md");
    std::string text;
    for (std::string word; file >> word;) {
        text += word + " ";
    }
    REQUIRE(text.size() > 10000);
    for (const Difference &row : differences) {
        INFO(row.command);
        CHECK(relay_probe::contains(text, row.words));
    }
    CHECK(relay_probe::contains(text, "the answer to it is always `QUEUED`, and an error that a "
                                      "server gives while queueing comes at `EXEC`"));
}

TEST_CASE("conformance: a command that is not known gets arguments")
{
    const std::string reply =
        "*2\r\n"
        "*6\r\n$4\r\nnews\r\n:-4\r\n*0\r\n:1\r\n:-2\r\n:1\r\n"
        "*10\r\n$4\r\nmany\r\n:-2\r\n*0\r\n:0\r\n:0\r\n:0\r\n*0\r\n*0\r\n*0\r\n"
        "*1\r\n*6\r\n$8\r\nmany|one\r\n:4\r\n*0\r\n:2\r\n:2\r\n:1\r\n";
    const std::vector<Command> commands = commands_of(reply);
    REQUIRE(commands.size() == 3);
    CHECK(commands[0].with_arguments(0) == "MANY 1");
    CHECK(commands[1].with_arguments(0) == "MANY ONE s 1");
    CHECK(commands[2].with_arguments(0) == "NEWS s s 1");
    CHECK(made_scripts(commands).size() == 3 + 2 + 3);
}
