// SPDX-License-Identifier: MIT
//
// examples/manager.c as its reader runs it: alone, beside a real server, and where there is none.
#include "support/catch.hpp"

#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include <unistd.h>

#include "support/support.h"

namespace {

struct ServerDeleter {
    void operator()(vkp_test_server *server) const
    {
        vkp_test_server_close(server);
    }
};
using Server = std::unique_ptr<vkp_test_server, ServerDeleter>;

struct PeerDeleter {
    void operator()(vkp_test_peer *peer) const
    {
        vkp_test_peer_close(peer);
    }
};
using Peer = std::unique_ptr<vkp_test_peer, PeerDeleter>;

// "" where the examples are not built.
std::string program()
{
    const char *folder = std::getenv("VKP_TEST_BUILD_DIR");
    std::string path = std::string(folder ? folder : ".") + "/examples/manager";
    return vkp_test_exists(path.c_str()) ? path : "";
}

#define NEEDS_THE_PROGRAM()                                 \
    if (program().empty()) {                                \
        WARN("left out: examples/manager.c was not built"); \
        return;                                             \
    }

struct Outcome {
    std::string text;
    int code;
};

Outcome run(const std::vector<std::string> &options)
{
    const std::string path = program();
    std::vector<const char *> argv = {path.c_str()};
    for (const std::string &option : options) {
        argv.push_back(option.c_str());
    }
    argv.push_back(nullptr);
    Outcome outcome;
    int out = -1;
    const int pid = vkp_test_spawn(argv.data(), &out);
    char buffer[4096];
    for (ssize_t got = read(out, buffer, sizeof buffer); got > 0;
         got = read(out, buffer, sizeof buffer)) {
        outcome.text.append(buffer, static_cast<size_t>(got));
    }
    close(out);
    outcome.code = vkp_test_reap(pid, 0);
    return outcome;
}

std::string transcript(unsigned right, const std::string &end)
{
    std::string text = "4 requests wait; one more: deadline passed\n";
    for (int i = 0; i < 8; i++) {
        text +=
            "asker " + std::to_string(i) + ": " + std::to_string(right) + " of 100 answers right\n";
    }
    return text + "the manager has ended: " + end + "\n";
}

} // namespace

TEST_CASE("manager: alone, it asks a broker of its own")
{
    NEEDS_THE_PROGRAM();
    const Outcome outcome = run({});
    CHECK(outcome.text == transcript(100, "804 answers, right"));
    CHECK(outcome.code == 0);
}

TEST_CASE("manager: beside a server its askers count with one key, and leave none")
{
    NEEDS_THE_PROGRAM();
    if (vkp_test_server_program() == nullptr) {
        WARN("left out: there is no valkey-server and no redis-server");
        return;
    }
    const bool tcp = GENERATE(false, true);
    Server server(vkp_test_server_open(nullptr));
    const Outcome outcome = run(
        {"--server", tcp ? vkp_test_server_tcp(server.get()) : vkp_test_server_unix(server.get())});
    // 4 early ones, 800 of ECHO, 800 of INCR, one each of SET, GET and DEL.
    CHECK(outcome.text == transcript(100, "1607 answers, right"));
    CHECK(outcome.code == 0);
    Peer peer(vkp_test_peer_open(vkp_test_server_tcp(server.get())));
    CHECK(vkp_test_ask(peer.get(), "DBSIZE") == ":0\r\n");
    CHECK(vkp_test_ask(peer.get(), "INFO", "commandstats").find("cmdstat_incr:calls=800,") !=
          std::string::npos);
}

TEST_CASE("manager: one that cannot begin releases every asker, and the exit code tells")
{
    NEEDS_THE_PROGRAM();
    const Outcome outcome = run({"--server", "nonsense"});
    CHECK(outcome.text == transcript(0, "0 answers, WRONG"));
    CHECK(outcome.code == 1);
}

TEST_CASE("manager: what is no option is exit code 2, and nothing is printed")
{
    NEEDS_THE_PROGRAM();
    const std::vector<std::string> options =
        GENERATE(std::vector<std::string>{"--server"}, std::vector<std::string>{"--nosuch", "x"});
    const Outcome outcome = run(options);
    CHECK(outcome.text.empty());
    CHECK(outcome.code == 2);
}
