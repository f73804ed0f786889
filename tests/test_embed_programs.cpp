// SPDX-License-Identifier: MIT
//
// examples/embed_poll.c and examples/embed_glib.c as their readers run them: a loop of ours inside
// the program's own poll, and inside GLib's main loop.
#include "support/catch.hpp"

#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "support/support.h"

namespace {

struct PeerDeleter {
    void operator()(vkp_test_peer *peer) const
    {
        vkp_test_peer_close(peer);
    }
};
using Peer = std::unique_ptr<vkp_test_peer, PeerDeleter>;

// "" where it is not built.
std::string program(const std::string &name)
{
    const char *folder = std::getenv("VKP_TEST_BUILD_DIR");
    std::string path = std::string(folder ? folder : ".") + "/examples/" + name;
    return vkp_test_exists(path.c_str()) ? path : "";
}

#define NEEDS(path)                                  \
    if ((path).empty()) {                            \
        WARN("left out: the example was not built"); \
        return;                                      \
    }

// A program under test, and what it prints.
class Running {
  public:
    explicit Running(const std::vector<std::string> &words)
    {
        std::vector<const char *> argv;
        for (const std::string &word : words) {
            argv.push_back(word.c_str());
        }
        argv.push_back(nullptr);
        pid_ = vkp_test_spawn(argv.data(), &out_);
    }
    ~Running()
    {
        close(out_);
        if (pid_ > 0) {
            vkp_test_reap(pid_, 9);
        }
    }
    Running(const Running &) = delete;
    Running &operator=(const Running &) = delete;
    // The next line; "" at the end.
    std::string line()
    {
        std::string text;
        char byte = 0;
        while (byte != '\n' && read(out_, &byte, 1) == 1) {
            text += byte;
        }
        return text;
    }
    int wait()
    {
        const int code = vkp_test_reap(pid_, 0);
        pid_ = -1;
        return code;
    }

  private:
    int pid_;
    int out_ = -1;
};

std::string text_of(vkp_test_peer *peer, size_t len)
{
    const char *text = vkp_test_peer_read(peer, len);
    return text ? std::string(text, len) : "";
}

} // namespace

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
