// SPDX-License-Identifier: MIT
//
// examples/socket_life.c as its reader runs it: the whole story, and paths at which it cannot be
// told, which the exit code says.
#include "support/catch.hpp"

#include <cstdlib>
#include <fstream>
#include <memory>
#include <sstream>
#include <string>

#include <unistd.h>

#include "support/support.h"

namespace {

// "" where the examples are not built.
std::string program()
{
    const char *folder = std::getenv("VKP_TEST_BUILD_DIR");
    std::string path = std::string(folder ? folder : ".") + "/examples/socket_life";
    return vkp_test_exists(path.c_str()) ? path : "";
}

#define NEEDS_THE_PROGRAM()                                     \
    if (program().empty()) {                                    \
        WARN("left out: examples/socket_life.c was not built"); \
        return;                                                 \
    }

struct Outcome {
    std::string text;
    int code;
};

Outcome run(const std::string &path)
{
    const std::string itself = program();
    const char *const argv[] = {itself.c_str(), path.c_str(), nullptr};
    Outcome outcome;
    int out = -1;
    const int pid = vkp_test_spawn(argv, &out);
    char buffer[4096];
    for (ssize_t got = read(out, buffer, sizeof buffer); got > 0;
         got = read(out, buffer, sizeof buffer)) {
        outcome.text.append(buffer, static_cast<size_t>(got));
    }
    close(out);
    outcome.code = vkp_test_reap(pid, 0);
    return outcome;
}

// The last line, without its end.
std::string last_line(const std::string &text)
{
    const size_t end = text.size() - 1;
    return text.substr(text.rfind('\n', end - 1) + 1, end - text.rfind('\n', end - 1) - 1);
}

const char *const nowhere = "-           -           ";
const char *const there = "srw-------  -rw-------  ";

std::string row(std::string step, int references, const char *disk, const char *weak)
{
    step.resize(47, ' ');
    return step + std::string(10, ' ') + std::to_string(references) + "  " + disk + weak + "\n";
}

std::string story()
{
    const std::string served = row("another process serves it: IN_USE here", 0, there, "no");
    return row("nobody has asked for it", 0, nowhere, "no") +
           row("the program opens it", 1, there, "yes") +
           row("a listener follows it: that is no reference", 1, there, "yes") +
           row("a client comes", 2, there, "yes") + row("two more come", 4, there, "yes") +
           row("another part of the program asks for the path", 5, there, "yes") +
           row("the program gives both handles back", 3, there, "yes") +
           row("two clients leave", 1, there, "yes") +
           row("the weak handle becomes a reference", 2, there, "yes") +
           row("the last client leaves", 0, nowhere, "no") +
           row("a new one of that path is not the weak handle's", 1, there, "no") +
           row("it ends", 0, nowhere, "no") + served +
           row("that one is killed, and leaves its files", 0, there, "no") +
           row("they are taken over", 1, there, "no") + row("it ends", 0, nowhere, "no") + served +
           row("that one exits, and sweeps in atexit", 0, nowhere, "no") + served +
           row("a signal ends that one; its handler unlinks", 0, nowhere, "no") + "as it must be\n";
}

} // namespace

TEST_CASE("socket life: every step is as the example says, and nothing is left")
{
    NEEDS_THE_PROGRAM();
    const std::string path = vkp_test_fresh_path("life");
    const Outcome outcome = run(path);
    const size_t rows = outcome.text.find("nobody");
    REQUIRE(rows != std::string::npos);
    CHECK(outcome.text.substr(0, rows) ==
          "PATH is " + path +
              "\nstep                                            references  PATH        "
              "PATH.lock   weak upgrades\n");
    CHECK(outcome.text.substr(rows) == story());
    CHECK(outcome.code == 0);
    CHECK_FALSE(vkp_test_exists(path.c_str()));
    CHECK_FALSE(vkp_test_exists((path + ".lock").c_str()));
}

TEST_CASE("socket life: a file at the path is wrong for every step, and stays what it is")
{
    NEEDS_THE_PROGRAM();
    const std::string path = vkp_test_fresh_path("life");
    std::ofstream(path) << "a diary";
    const Outcome outcome = run(path);
    CHECK(outcome.code == 1);
    CHECK(last_line(outcome.text) == "something is WRONG");
    std::ostringstream text;
    text << std::ifstream(path).rdbuf();
    CHECK(text.str() == "a diary");
    CHECK_FALSE(vkp_test_exists((path + ".lock").c_str()));
}

TEST_CASE("socket life: a path that another process serves is left to it")
{
    NEEDS_THE_PROGRAM();
    const std::string path = vkp_test_fresh_path("life");
    vkp_registry *registry = nullptr;
    vkp_socket *sock = nullptr;
    REQUIRE(vkp_registry_open(nullptr, &registry) == VKP_OK);
    REQUIRE(vkp_socket_open(registry, vkp_str_of(path.c_str()), &sock) == VKP_OK);
    const Outcome outcome = run(path);
    CHECK(outcome.code == 1);
    CHECK(last_line(outcome.text) == "something is WRONG");
    CHECK(vkp_test_exists(path.c_str()));
    CHECK(vkp_test_exists((path + ".lock").c_str()));
    vkp_socket_unref(sock);
    vkp_registry_unref(registry);
    CHECK_FALSE(vkp_test_exists(path.c_str()));
}
