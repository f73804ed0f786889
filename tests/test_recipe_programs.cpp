// SPDX-License-Identifier: MIT
//
// The programs of docs/recipes/ and docs/testing-your-code.md as their readers run them.
#include "support/catch.hpp"

#include <string>
#include <thread>
#include <vector>

#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include "support/program.h"

namespace {

// Everything until the end of the stream.
std::string all_of(vkp_test_peer *peer)
{
    std::string text;
    for (const char *byte = vkp_test_peer_read(peer, 1); byte != nullptr;
         byte = vkp_test_peer_read(peer, 1)) {
        text += *byte;
    }
    return text;
}

// The address behind "NAME on ".
std::string address_in(const std::string &line, const std::string &name)
{
    REQUIRE(line.substr(0, name.size() + 4) == name + " on ");
    REQUIRE(line.back() == '\n');
    return line.substr(name.size() + 4, line.size() - name.size() - 5);
}

} // namespace

TEST_CASE("test_with_null_backend: all its checks pass")
{
    const std::string path = program("test_with_null_backend");
    NEEDS(path);
    Running running({path});
    CHECK(running.line() == "all checks passed\n");
    CHECK(running.wait() == 0);
}

TEST_CASE("worker_pool: every job is done once and answered")
{
    const std::string path = program("worker_pool");
    NEEDS(path);
    Running running({path});
    int done = 0;
    for (int i = 0; i < 4; i++) {
        const std::string head = "worker " + std::to_string(i) + ": ";
        const std::string line = running.line();
        REQUIRE(line.substr(0, head.size()) == head);
        done += std::atoi(line.c_str() + head.size());
    }
    CHECK(done == 64);
    CHECK(running.line() == "64 of 64 answers right\n");
    CHECK(running.wait() == 0);
}

TEST_CASE("timer_signal: ticks until SIGTERM, then a last word to each client")
{
    const std::string path = program("timer_signal");
    NEEDS(path);
    const int number = GENERATE(SIGTERM, SIGINT);
    const std::string address = vkp_test_fresh_address("timer");
    Running running({path, address, "1"});
    REQUIRE(running.line() == "listening on " + address + "\n");
    Peer first(vkp_test_peer_open(address.c_str()));
    CHECK(text_of(first.get(), 21) == "tick 1\ntick 2\ntick 3\n");
    Peer second(vkp_test_peer_open(address.c_str()));
    CHECK(text_of(second.get(), 7) == "tick 1\n"); // its own timer
    running.send_signal(number);
    for (vkp_test_peer *peer : {first.get(), second.get()}) {
        const std::string rest = all_of(peer);
        REQUIRE(rest.size() >= 4);
        CHECK(rest.substr(rest.size() - 4) == "bye\n");
    }
    CHECK(running.line() == "drained\n");
    CHECK(running.wait() == 0);
    CHECK_FALSE(vkp_test_exists(address.substr(5).c_str()));
}

TEST_CASE("timer_signal: clients may leave before, and there may be none")
{
    const std::string path = program("timer_signal");
    NEEDS(path);
    const std::string address = vkp_test_fresh_address("timer");
    Running running({path, address, "1"});
    REQUIRE(running.line() == "listening on " + address + "\n");
    if (GENERATE(false, true)) {
        Peer peer(vkp_test_peer_open(address.c_str()));
        CHECK(text_of(peer.get(), 7) == "tick 1\n");
    }
    running.send_signal(SIGTERM);
    CHECK(running.line() == "drained\n");
    CHECK(running.wait() == 0);
}

TEST_CASE("timer_signal, three_servers: an address that cannot be had is exit code 1")
{
    const std::string path = program(GENERATE("timer_signal", "three_servers"));
    NEEDS(path);
    Running running({path, "nonsense"});
    CHECK(running.line().empty());
    CHECK(running.wait() == 1);
}

TEST_CASE("three_servers: each speaks its own protocol")
{
    const std::string path = program("three_servers");
    NEEDS(path);
    const std::string socket = vkp_test_fresh_address("echo");
    Running running({path, socket});
    const std::string echo = address_in(running.line(), "echo");
    const std::string lines = address_in(running.line(), "lines");
    const std::string count = address_in(running.line(), "count");
    CHECK(echo == socket);

    Peer first(vkp_test_peer_open(echo.c_str()));
    REQUIRE(vkp_test_peer_send_text(first.get(), "hello"));
    REQUIRE(shutdown(vkp_test_peer_fd(first.get()), SHUT_WR) == 0);
    CHECK(all_of(first.get()) == "hello");

    Peer second(vkp_test_peer_open(lines.c_str()));
    REQUIRE(vkp_test_peer_send_text(second.get(), "one\ntw"));
    CHECK(text_of(second.get(), 4) == "ONE\n");
    REQUIRE(vkp_test_peer_send_text(second.get(), "o\nquit\nthree\n"));
    CHECK(all_of(second.get()) == "TWO\n");

    Peer third(vkp_test_peer_open(count.c_str()));
    CHECK(all_of(third.get()) == "3 clients\n");

    Peer fourth(vkp_test_peer_open(lines.c_str()));
    (void)vkp_test_peer_send_text(fourth.get(), std::string(513, 'x').c_str());
    CHECK(all_of(fourth.get()).empty()); // a line too long

    CHECK(running.wait(SIGTERM) == 0);
    CHECK_FALSE(vkp_test_exists(socket.substr(5).c_str()));
}

TEST_CASE("three_servers: an echo that is read late arrives in full")
{
    const std::string path = program("three_servers");
    NEEDS(path);
    Running running({path, vkp_test_fresh_address("echo")});
    const std::string echo = address_in(running.line(), "echo");
    const int fd = vkp_test_connect(echo.c_str());
    REQUIRE(fd >= 0);
    const std::string sent(8 << 20, 'x'); // more than both kernels' buffers and the queue
    std::thread writer([&] {
        for (size_t at = 0; at < sent.size();) {
            const ssize_t put = write(fd, sent.data() + at, sent.size() - at);
            if (put <= 0) {
                break;
            }
            at += static_cast<size_t>(put);
        }
        shutdown(fd, SHUT_WR);
    });
    std::vector<char> buffer(65536);
    size_t got = 0;
    for (ssize_t more = 1; more > 0;) {
        more = read(fd, buffer.data(), buffer.size());
        got += more > 0 ? static_cast<size_t>(more) : 0;
    }
    writer.join();
    close(fd);
    CHECK(got == sent.size());
    CHECK(running.wait(SIGTERM) == 0);
}

TEST_CASE("embed_libuv: a client receives three counts, and libuv's loop ends clean")
{
    const std::string path = program("embed_libuv");
    NEEDS(path);
    const std::string address = vkp_test_fresh_address("uv");
    Running running({path, address});
    REQUIRE(running.line() == "listening on " + address + "\n");
    Peer peer(vkp_test_peer_open(address.c_str()));
    CHECK(all_of(peer.get()) == "1\n2\n3\n");
    CHECK(running.line() == "closed\n");
    CHECK(running.wait() == 0);
    CHECK_FALSE(vkp_test_exists(address.substr(5).c_str()));
}
