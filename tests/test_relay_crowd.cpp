// SPDX-License-Identifier: MIT
//
// Ten thousand clients of one relay, in a process of their own: all of them get all messages.
#include "support/catch.hpp"

#include <algorithm>
#include <csignal>
#include <cstring>
#include <string>
#include <vector>

#include <poll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include "support/sanitized.h"
#include "support/support.h"

namespace {

constexpr rlim_t clients = 10000;
constexpr int messages = 1000;

// The relay needs about as many descriptors as this process: it inherits the limit.
bool raise_descriptor_limit()
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0) {
        return false;
    }
    if (limit.rlim_cur < clients + 100 && limit.rlim_max >= clients + 100) {
        limit.rlim_cur = clients + 100;
        (void)setrlimit(RLIMIT_NOFILE, &limit);
    }
    return getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur >= clients + 100;
}

std::string bulk(const std::string &text)
{
    return "$" + std::to_string(text.size()) + "\r\n" + text + "\r\n";
}

// Whether exactly these bytes come next from the socket.
bool gets(int fd, const std::string &expected)
{
    std::vector<char> buffer(65536);
    size_t at = 0;
    while (at < expected.size()) {
        struct pollfd ready = {fd, POLLIN, 0};
        size_t wanted = std::min(expected.size() - at, buffer.size());
        if (poll(&ready, 1, 30000) != 1) {
            return false;
        }
        ssize_t got = recv(fd, buffer.data(), wanted, 0);
        if (got <= 0 ||
            std::memcmp(buffer.data(), expected.data() + at, static_cast<size_t>(got)) != 0) {
            return false;
        }
        at += static_cast<size_t>(got);
    }
    return true;
}

TEST_CASE("10,000 clients subscribe to one name on one loop: each gets every one of 1,000 messages")
{
    if (VKP_TEST_SANITIZED) {
        WARN("left out: under a sanitizer this takes minutes and the machine's memory");
        return;
    }
    if (!raise_descriptor_limit()) {
        WARN("left out: the limit of descriptors is below " << clients + 100 << " (ulimit -Hn)");
        return;
    }
    std::string address = vkp_test_fresh_address("crowd");
    std::string limit = std::to_string(clients + 1);
    const char *argv[] = {
        vkp_test_relay_program(), "--listen",    address.c_str(), "--threads", "1",
        "--max-clients",          limit.c_str(), nullptr};
    int out = -1;
    int pid = vkp_test_spawn(argv, &out);
    vkp_test_peer *ready = vkp_test_peer_of(out);
    vkp_test_wait_until("the relay to accept", [&] { // the file is there before it listens
        int probe = vkp_test_connect(address.c_str());
        if (probe >= 0) {
            close(probe);
        }
        return probe >= 0;
    });

    std::vector<int> crowd;
    const std::string subscribe = "SUBSCRIBE news\r\n";
    for (rlim_t i = 0; i < clients; i++) {
        crowd.push_back(vkp_test_connect(address.c_str()));
        REQUIRE(crowd.back() >= 0);
        REQUIRE(send(crowd.back(), subscribe.data(), subscribe.size(), 0) ==
                static_cast<ssize_t>(subscribe.size()));
    }
    size_t confirmed = 0;
    for (int fd : crowd) {
        confirmed += gets(fd, "*3\r\n" + bulk("subscribe") + bulk("news") + ":1\r\n") ? 1 : 0;
    }
    REQUIRE(confirmed == clients);

    vkp_test_peer *publisher = vkp_test_peer_open(address.c_str());
    std::string script;
    std::string expected;
    std::string counts;
    for (int i = 0; i < messages; i++) {
        std::string payload = std::to_string(i);
        payload.resize(64, '.');
        script += "*3\r\n" + bulk("PUBLISH") + bulk("news") + bulk(payload);
        expected += "*3\r\n" + bulk("message") + bulk("news") + bulk(payload);
        counts += ":" + std::to_string(clients) + "\r\n";
    }
    REQUIRE(vkp_test_peer_send(publisher, script.data(), script.size()));
    size_t complete = 0;
    for (int fd : crowd) {
        complete += gets(fd, expected) ? 1 : 0;
    }
    CHECK(complete == clients);
    CHECK(gets(vkp_test_peer_fd(publisher), counts));
    vkp_test_peer_close(publisher);
    for (int fd : crowd) {
        close(fd);
    }
    CHECK(vkp_test_reap(pid, SIGTERM) == 0);
    CHECK(!vkp_test_exists(address.c_str() + 5));
    vkp_test_peer_close(ready);
}

} // namespace
