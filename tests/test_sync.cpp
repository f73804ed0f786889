// SPDX-License-Identifier: MIT
//
// A client without an event loop of one's own: each call waits for its answer. Against a real
// server, and against nobody.
#include "support/catch.hpp"
#include "support/client_probe.h"

#include <csignal>
#include <string>
#include <vector>

namespace {

#define NEEDS_A_SERVER                                                         \
    if (!vkp_test_server_program()) {                                          \
        WARN("neither valkey-server nor redis-server is on PATH: not tested"); \
        return;                                                                \
    }

// At its end nothing may be left.
class Sync {
  public:
    explicit Sync(const char *address, size_t push_bytes = 0) : fds_(vkp_test_fd_count())
    {
        vkp_test_env_init(&test);
        vkp_sync_config config = {};
        config.backend = *vkp_test_backends();
        config.client.address = vkp_str_of(address);
        config.client.env = &test.env;
        config.client.retry_min_ms = 1;
        config.client.retry_max_ms = 5;
        config.push_bytes = push_bytes;
        if (vkp_sync_open(&config, &sync_) != VKP_OK) {
            vkp_test_fail("no client to %s", address);
        }
    }
    ~Sync()
    {
        vkp_sync_unref(sync_);
        if (vkp_test_fd_count() != fds_) {
            vkp_test_fail("%d descriptors before, %d after", fds_, vkp_test_fd_count());
        }
        vkp_test_env_deinit(&test);
    }
    Sync(const Sync &) = delete;
    Sync &operator=(const Sync &) = delete;
    operator vkp_sync *() const
    {
        return sync_;
    }
    std::string command(std::initializer_list<const char *> words)
    {
        std::vector<vkp_str> argv;
        for (const char *word : words) {
            argv.push_back(vkp_str_of(word));
        }
        vkp_reply *reply = nullptr;
        const vkp_status status =
            vkp_sync_command_argv(sync_, argv.size(), argv.data(), vkp_test_deadline(), &reply);
        return show(status, reply);
    }
    std::string next_reply()
    {
        vkp_reply *reply = nullptr;
        const vkp_status status = vkp_sync_next_reply(sync_, vkp_test_deadline(), &reply);
        return show(status, reply);
    }
    std::string next_push(uint64_t deadline_ns = vkp_test_deadline())
    {
        vkp_push push;
        const vkp_status status = vkp_sync_next_push(sync_, deadline_ns, &push);
        if (status != VKP_OK) {
            return vkp_status_str(status);
        }
        const std::string line = vkp_test_line(vkp_test_event_of(push));
        vkp_push_unref(&push);
        return line;
    }
    static std::string show(vkp_status status, vkp_reply *reply)
    {
        if (status != VKP_OK) {
            return vkp_status_str(status);
        }
        const std::string text = vkp_test_show(vkp_reply_get_value(reply));
        vkp_reply_unref(reply);
        return text;
    }

    vkp_test_env test;

  private:
    int fds_;
    vkp_sync *sync_ = nullptr;
};

} // namespace

TEST_CASE("sync: connect, command, pipeline, subscribe, next push", "[sync][server]")
{
    NEEDS_A_SERVER
    const char *no_options[] = {nullptr};
    vkp_test_server *server = vkp_test_server_open(no_options);
    {
        Sync sync(vkp_test_server_unix(server));
        CHECK(vkp_sync_wait_ready(sync, vkp_test_deadline()) == VKP_OK);
        CHECK(sync.next_push() == "connected");
        CHECK(sync.command({"SET", "k", "v"}) == "OK");
        vkp_reply *reply = nullptr;
        REQUIRE(vkp_sync_command(sync, vkp_test_deadline(), &reply, "GET", "k", NULL) == VKP_OK);
        CHECK(Sync::show(VKP_OK, reply) == "v");
        CHECK(sync.command({"LPUSH", "k", "x"}).find("error: WRONGTYPE") == 0);
        CHECK(sync.next_reply() == vkp_status_str(VKP_ERR_EMPTY));
        for (int i = 0; i < 1000; i++) {
            const std::string number = std::to_string(i);
            const vkp_str argv[] = {vkp_str_of("ECHO"), vkp_str_of(number.c_str())};
            REQUIRE(vkp_sync_append_argv(sync, 2, argv) == VKP_OK);
        }
        CHECK(sync.command({"PING"}) == "PONG"); // a command in the midst takes no one's reply
        for (int i = 0; i < 1000; i++) {
            REQUIRE(sync.next_reply() == std::to_string(i));
        }
        const vkp_str name = vkp_str_of("c");
        CHECK(vkp_sync_subscribe(sync, VKP_SUB_CHANNEL, name, vkp_test_deadline()) == VKP_OK);
        CHECK(sync.next_push() == "subscribed c");
        CHECK(sync.command({"PUBLISH", "c", "hi"}) == "1");
        CHECK(sync.next_push() == "message c hi");
        CHECK(sync.next_push(0) == vkp_status_str(VKP_ERR_TIMEOUT));
        CHECK(vkp_sync_unsubscribe(sync, VKP_SUB_CHANNEL, name) == VKP_OK);
        CHECK(sync.next_push() == "unsubscribed c");
        CHECK(vkp_client_get_state(vkp_sync_get_client(sync)) == VKP_CLIENT_READY);
        // What was appended and not taken is freed with the client.
        const vkp_str argv[] = {vkp_str_of("PING")};
        REQUIRE(vkp_sync_append_argv(sync, 1, argv) == VKP_OK);
        REQUIRE(vkp_sync_append_argv(sync, 1, argv) == VKP_OK);
        CHECK(sync.next_reply() == "PONG");
    }
    vkp_test_server_close(server);
}

TEST_CASE("sync: a deadline passes, and the client is usable after it", "[sync][server]")
{
    NEEDS_A_SERVER
    const char *no_options[] = {nullptr};
    vkp_test_server *server = vkp_test_server_open(no_options);
    {
        Sync sync(vkp_test_server_unix(server));
        CHECK(vkp_sync_wait_ready(sync, vkp_test_deadline()) == VKP_OK);
        REQUIRE(kill(vkp_test_server_pid(server), SIGSTOP) == 0);
        vkp_reply *reply = nullptr;
        CHECK(vkp_sync_command(sync, vkp_after_ms(20), &reply, "PING", NULL) == VKP_ERR_TIMEOUT);
        CHECK(vkp_sync_subscribe(sync, VKP_SUB_CHANNEL, vkp_str_of("c"), vkp_after_ms(20)) ==
              VKP_ERR_TIMEOUT);
        const vkp_str argv[] = {vkp_str_of("ECHO"), vkp_str_of("late")};
        REQUIRE(vkp_sync_append_argv(sync, 2, argv) == VKP_OK);
        CHECK(vkp_sync_next_reply(sync, vkp_after_ms(20), &reply) == VKP_ERR_TIMEOUT);
        REQUIRE(kill(vkp_test_server_pid(server), SIGCONT) == 0);
        CHECK(sync.next_reply() == "late");
        CHECK(sync.command({"ECHO", "new"}) == "new");
        CHECK(sync.next_push() == "connected");
        CHECK(sync.next_push() == "subscribed c");
    }
    vkp_test_server_close(server);
}

TEST_CASE("sync: the server goes away and comes back", "[sync][server]")
{
    NEEDS_A_SERVER
    const char *no_options[] = {nullptr};
    vkp_test_server *server = vkp_test_server_open(no_options);
    {
        Sync sync(vkp_test_server_unix(server));
        CHECK(vkp_sync_subscribe(sync, VKP_SUB_CHANNEL, vkp_str_of("c"), vkp_test_deadline()) ==
              VKP_OK);
        CHECK(sync.next_push() == "connected");
        CHECK(sync.next_push() == "subscribed c");
        vkp_test_server_kill(server);
        CHECK(sync.next_push() == "disconnected");
        CHECK(sync.command({"PING"}) == vkp_status_str(VKP_ERR_DISCONNECTED));
        vkp_test_server_restart(server);
        std::string line;
        while ((line = sync.next_push()) == "connect-failed") {
        }
        CHECK(line == "reconnected");
        CHECK(sync.next_push() == "subscribed c");
        CHECK(sync.next_push() == "gap");
        CHECK(sync.command({"PING"}) == "PONG");
    }
    vkp_test_server_close(server);
}

TEST_CASE("sync: nobody is there", "[sync]")
{
    Sync sync("unix:/nobody/is/here");
    CHECK(vkp_sync_wait_ready(sync, vkp_after_ms(20)) == VKP_ERR_TIMEOUT);
    char text[64];
    vkp_client_get_error(vkp_sync_get_client(sync), text, sizeof text);
    CHECK(std::string(text) == "nobody accepts connections there");
    CHECK(sync.command({"PING"}) == vkp_status_str(VKP_ERR_DISCONNECTED));
    CHECK(vkp_sync_subscribe(sync, VKP_SUB_CHANNEL, vkp_str_of("c"), vkp_test_deadline()) ==
          VKP_ERR_DISCONNECTED);
    CHECK(sync.next_push() == "connect-failed");
}

TEST_CASE("sync: a client that is closed is no reason to wait", "[sync]")
{
    Sync sync("unix:/nonexistent/nobody");
    vkp_client_close(vkp_sync_get_client(sync));
    CHECK(vkp_sync_wait_ready(sync, VKP_FOREVER) == VKP_ERR_CLOSED);
    vkp_push push;
    CHECK(vkp_sync_next_push(sync, VKP_FOREVER, &push) == VKP_ERR_CLOSED);
}

TEST_CASE("sync: a command in a format", "[sync][server]")
{
    NEEDS_A_SERVER
    const char *const none[] = {nullptr};
    vkp_test_server *server = vkp_test_server_open(none);
    {
        Sync sync(vkp_test_server_unix(server));
        vkp_reply *reply = nullptr;
        REQUIRE(vkp_sync_wait_ready(sync, vkp_test_deadline()) == VKP_OK);
        REQUIRE(vkp_sync_commandf(sync, vkp_test_deadline(), &reply, "SET user:%d %b", 7, "a b\0c",
                                  size_t{5}) == VKP_OK);
        vkp_reply_unref(reply);
        CHECK(sync.command({"STRLEN", "user:7"}) == "5");
        CHECK(vkp_sync_commandf(sync, vkp_test_deadline(), &reply, "GET %y", 1) == VKP_ERR_INVALID);
        CHECK(vkp_sync_commandf(nullptr, 0, &reply, "GET x") == VKP_ERR_INVALID);
    }
    vkp_test_server_close(server);
}

TEST_CASE("sync: wrong arguments are refused", "[sync]")
{
    vkp_sync *sync = nullptr;
    vkp_sync_config config = {};
    CHECK(vkp_sync_open(nullptr, &sync) == VKP_ERR_INVALID);
    CHECK(vkp_sync_open(&config, &sync) == VKP_ERR_INVALID);
    config.backend = *vkp_test_backends();
    CHECK(vkp_sync_open(&config, &sync) == VKP_ERR_INVALID);
    config.client.address = vkp_str_of("nonsense");
    CHECK(vkp_sync_open(&config, &sync) == VKP_ERR_INVALID);
    config.client.address = vkp_str_of("unix:/nobody/is/here");
    config.client.on_push = [](void *, const vkp_push *) {};
    CHECK(vkp_sync_open(&config, &sync) == VKP_ERR_INVALID);
    CHECK(sync == nullptr);
    vkp_sync_unref(nullptr);
    Sync open("unix:/nobody/is/here");
    vkp_push push;
    vkp_reply *reply;
    CHECK(vkp_sync_next_push(open, 0, nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_sync_next_push(nullptr, 0, &push) == VKP_ERR_INVALID);
    CHECK(vkp_sync_next_reply(open, 0, nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_sync_command_argv(open, 0, nullptr, 0, &reply) == VKP_ERR_INVALID);
    const vkp_str blocked[] = {vkp_str_of("BLPOP"), vkp_str_of("l"), vkp_str_of("0")};
    CHECK(vkp_sync_command_argv(open, 3, blocked, 0, &reply) == VKP_ERR_REFUSED);
    CHECK(vkp_sync_append_argv(open, 3, blocked) == VKP_ERR_REFUSED);
}

TEST_CASE("sync: each allocation of an open may fail, and nothing is left", "[sync][faults]")
{
    const int fds = vkp_test_fd_count();
    bool opened = false;
    for (uint64_t k = 1; !opened; k++) {
        REQUIRE(k < 100);
        INFO("k " << k);
        vkp_test_env test;
        vkp_test_env_init(&test);
        vkp_sync_config config = {};
        config.backend = *vkp_test_backends();
        config.client.address = vkp_str_of("unix:/nobody/is/here");
        config.client.env = &test.env;
        vkp_test_env_fault(&test, VKP_TEST_FAULT_ONCE, k);
        vkp_sync *sync = nullptr;
        const vkp_status status = vkp_sync_open(&config, &sync);
        opened = status == VKP_OK;
        if (!opened) {
            CHECK(status == VKP_ERR_NOMEM);
        }
        vkp_sync_unref(sync);
        CHECK(vkp_test_env_live_blocks(&test) == 0);
        CHECK(vkp_test_fd_count() == fds);
        vkp_test_env_deinit(&test);
    }
}
