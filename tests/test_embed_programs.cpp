// SPDX-License-Identifier: MIT
//
// examples/embed_poll.c and examples/embed_glib.c as their readers run them: a loop of ours inside
// the program's own poll, and inside GLib's main loop.
#include "support/catch.hpp"

#include <string>
#include <vector>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "support/program.h"

TEST_CASE("embed_poll: what is typed goes to every client, until the end of the input")
{
    const std::string path = program("embed_poll");
    NEEDS(path);
    const std::string address = vkp_test_fresh_address("poll");
    const std::string input = vkp_test_fresh_path("input");
    REQUIRE(mkfifo(input.c_str(), 0600) == 0);
    Running running({"sh", "-c", "exec \"$0\" \"$1\" <\"$2\"", path, address, input});
    const int keyboard = open(input.c_str(), O_WRONLY | O_CLOEXEC); // when the other end is open
    REQUIRE(keyboard >= 0);
    CHECK(running.line() == "listening on " + address + "\n");
    Peer first(vkp_test_peer_open(address.c_str()));
    CHECK(running.line() == "a client came\n");
    Peer second(vkp_test_peer_open(address.c_str()));
    CHECK(running.line() == "a client came\n");
    REQUIRE(write(keyboard, "hello\n", 6) == 6);
    CHECK(text_of(first.get(), 6) == "hello\n");
    CHECK(text_of(second.get(), 6) == "hello\n");
    REQUIRE(vkp_test_peer_send_text(second.get(), "and you\n"));
    CHECK(running.line() == "and you\n");
    second.reset();
    REQUIRE(write(keyboard, "bye\n", 4) == 4);
    close(keyboard);
    CHECK(text_of(first.get(), 4) == "bye\n");
    CHECK(vkp_test_peer_drain(first.get()) == 0);
    CHECK(running.line().empty());
    CHECK(running.wait() == 0);
    CHECK_FALSE(vkp_test_exists(address.substr(5).c_str()));
}

TEST_CASE("embed_poll: an address that cannot be had is exit code 1")
{
    const std::string path = program("embed_poll");
    NEEDS(path);
    Running running({path, "nonsense"});
    CHECK(running.line().empty());
    CHECK(running.wait() == 1);
}

TEST_CASE("embed_glib: prints what is published, until somebody says bye")
{
    const std::string path = program("embed_glib");
    NEEDS(path);
    if (vkp_test_server_program() == nullptr) {
        WARN("left out: there is no valkey-server and no redis-server");
        return;
    }
    std::unique_ptr<vkp_test_server, void (*)(vkp_test_server *)> server(
        vkp_test_server_open(nullptr), vkp_test_server_close);
    Running running({path, vkp_test_server_unix(server.get())});
    std::string line = running.line();
    while (!line.empty() && line.substr(0, 10) != "subscribed") { // connected, before
        line = running.line();
    }
    REQUIRE(line.substr(0, 10) == "subscribed");
    Peer peer(vkp_test_peer_open(vkp_test_server_tcp(server.get())));
    for (const char *text : {"one", "two", "bye"}) {
        CHECK(vkp_test_ask(peer.get(), "PUBLISH", "news", text) == ":1\r\n");
        CHECK(running.line() == std::string("message: ") + text + "\n");
    }
    CHECK(running.line().empty());
    CHECK(running.wait() == 0);
}
