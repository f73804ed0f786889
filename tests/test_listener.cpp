// SPDX-License-Identifier: MIT
//
// Listeners over every backend: addresses and ports, sockets of their own and shared ones, accept
// that fails, connections refused or handed on, the end in every callback. Who is let in, and how
// many, is in test_gate.cpp; listeners that follow their clients are in test_listen.cpp.
#include "support/catch.hpp"

#include <cerrno>
#include <cstddef>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <csignal>
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "support/listener_probe.h"
#include "support/support.h"

namespace {

// A loop that checks at its end that it gave everything back. Declared first, it ends last.
class Loop {
  public:
    explicit Loop(const vkp_backend *backend, const vkp_sys *sys = nullptr)
        : fds_before_(vkp_test_fd_count())
    {
        vkp_test_env_init(&test);
        test.env.sys = sys;
        vkp_loop_config config = {};
        config.backend = backend;
        config.env = &test.env;
        if (vkp_loop_open(&config, &loop_) != VKP_OK) {
            vkp_test_fail("no loop over %s", backend->name);
        }
    }
    ~Loop()
    {
        close();
        if (std::uncaught_exceptions() == 0) {
            if (vkp_test_fd_count() != fds_before_) {
                vkp_test_fail("descriptors are still open");
            }
            vkp_test_env_deinit(&test);
        }
    }
    Loop(const Loop &) = delete;
    Loop &operator=(const Loop &) = delete;
    operator vkp_loop *() const
    {
        return loop_;
    }
    void close()
    {
        if (loop_ != nullptr) {
            vkp_loop_close(loop_);
            vkp_loop_unref(std::exchange(loop_, nullptr));
        }
    }
    // One round that a timer ends, or virtual time.
    void wait()
    {
        if (vkp_loop_run_once(loop_, vkp_loop_get_now_ns(loop_) + UINT64_C(60000000000)) !=
            VKP_OK) {
            vkp_test_fail("a round failed");
        }
    }

    vkp_test_env test;

  private:
    int fds_before_;
    vkp_loop *loop_ = nullptr;
};

// A listener whose connections answer each byte with the same byte.
struct Echo {
    vkp_listener *listener = nullptr;
    vkp_listener_config config = {};
    int accepts = 0;
    int opens = 0;
    int closes = 0;
    int ends = 0;
    std::vector<std::string> told;
    std::vector<vkp_refusal> refused;
    std::function<void(vkp_conn *)> on_accept;
    std::function<void(int, vkp_seat *)> on_fd;
    std::function<void(int)> on_refuse;
    std::function<void()> on_end;

    Echo()
    {
        static const vkp_conn_ops ops = [] {
            vkp_conn_ops table = {};
            table.on_open = [](vkp_conn *, void *user) {
                Echo *self = static_cast<Echo *>(user);
                self->opens++;
                self->told.push_back("open");
            };
            table.on_data = vkp_test_echo;
            table.on_close = [](vkp_conn *, void *user, vkp_close_reason, int) {
                Echo *self = static_cast<Echo *>(user);
                self->closes++;
                self->told.push_back("close");
            };
            return table;
        }();
        config.conn.ops = &ops;
        config.conn.user = this;
        config.on_accept = [](void *user, vkp_conn *conn) {
            Echo *self = static_cast<Echo *>(user);
            self->accepts++;
            self->told.push_back("accept");
            if (self->on_accept) {
                self->on_accept(conn);
            }
        };
        config.on_refuse = [](void *user, int fd, vkp_refusal why) {
            Echo *self = static_cast<Echo *>(user);
            self->refused.push_back(why);
            if (self->on_refuse) {
                self->on_refuse(fd);
            }
        };
        config.on_end = [](void *user) {
            Echo *self = static_cast<Echo *>(user);
            self->ends++;
            if (self->on_end) {
                self->on_end();
            }
        };
    }
    // Its connections must not tell it anything afterwards.
    ~Echo()
    {
        vkp_listener_unref(listener);
        if (loop_ != nullptr) {
            vkp_loop_close(loop_);
            vkp_loop_unref(loop_);
        }
    }
    Echo(const Echo &) = delete;
    Echo &operator=(const Echo &) = delete;
    void hand_on()
    {
        config.on_fd = [](void *user, int fd, vkp_seat *seat) {
            Echo *self = static_cast<Echo *>(user);
            self->told.push_back("fd");
            self->on_fd(fd, seat);
        };
    }
    vkp_status open(vkp_loop *loop, const char *address)
    {
        config.address = vkp_str_of(address);
        return open(loop);
    }
    vkp_status open(vkp_loop *loop)
    {
        vkp_status status = vkp_listener_open(loop, &config, &listener);
        if (status == VKP_OK && loop_ == nullptr) {
            loop_ = vkp_loop_ref(loop);
        }
        return status;
    }
    std::string address() const
    {
        return vkp_listener_get_address(listener);
    }
    vkp_listener_stats stats() const
    {
        return vkp_test_listener_stats_of(listener);
    }
    void drop()
    {
        vkp_listener_unref(std::exchange(listener, nullptr));
    }

  private:
    vkp_loop *loop_ = nullptr;
};

// A client that does not block.
class Client {
  public:
    explicit Client(const std::string &address) : fd_(vkp_test_connect(address.c_str()))
    {
        if (fd_ >= 0) {
            fcntl(fd_, F_SETFL, fcntl(fd_, F_GETFL) | O_NONBLOCK);
        }
    }
    ~Client()
    {
        shut();
    }
    Client(const Client &) = delete;
    Client &operator=(const Client &) = delete;
    bool refused() const
    {
        return fd_ < 0;
    }
    void shut()
    {
        if (fd_ >= 0) {
            close(std::exchange(fd_, -1));
        }
    }
    void say(const std::string &text)
    {
        int flags = 0;
#ifdef MSG_NOSIGNAL
        flags = MSG_NOSIGNAL;
#endif
        (void)!send(fd_, text.data(), text.size(), flags);
    }
    const std::string &hear()
    {
        char buffer[1024];
        ssize_t got = 0;
        while ((got = read(fd_, buffer, sizeof buffer)) > 0) {
            heard.append(buffer, static_cast<size_t>(got));
        }
        ended = ended || got == 0 || (errno != EAGAIN && errno != EINTR);
        return heard;
    }
    std::string heard;
    bool ended = false;

  private:
    int fd_;
};

void check_echo(Loop &loop, const std::string &address)
{
    Client client(address);
    REQUIRE_FALSE(client.refused());
    client.say("echo?");
    vkp_test_run_until(loop, "the echo", [&] { return client.hear() == "echo?"; });
}

const char *path_of(const std::string &address)
{
    return address.c_str() + 5;
}

} // namespace

TEST_CASE("listener: arguments that cannot be")
{
    Loop loop(&vkp_backend_poll);
    Echo echo;
    vkp_listener *listener = nullptr;
    CHECK(vkp_listener_open(nullptr, &echo.config, &listener) == VKP_ERR_INVALID);
    CHECK(vkp_listener_open(loop, nullptr, &listener) == VKP_ERR_INVALID);
    CHECK(vkp_listener_open(loop, &echo.config, &listener) == VKP_ERR_INVALID); // no address
    echo.config.address = vkp_str_of("tcp:127.0.0.1:0");
    CHECK(vkp_listener_open(loop, &echo.config, nullptr) == VKP_ERR_INVALID);
    echo.config.conn.ops = nullptr;
    CHECK(vkp_listener_open(loop, &echo.config, &listener) == VKP_ERR_INVALID);
    Echo bad;
    for (const char *address : {"", "unix", "unix:a/../b", "tcp:", "tcp:127.0.0.1",
                                "tcp:127.0.0.1:", "tcp:127.0.0.1:65536", "tcp:127.0.0.1:x", "0"}) {
        INFO("address " << address);
        CHECK(bad.open(loop, address) == VKP_ERR_INVALID);
    }
    CHECK(bad.open(loop, ("unix:/" + std::string(200, 'p')).c_str()) == VKP_ERR_LIMIT);
    CHECK(bad.open(loop, (vkp_test_fresh_address("nowhere") + std::string("/s")).c_str()) ==
          VKP_ERR_SYS);
    CHECK(listener == nullptr);
    CHECK(bad.listener == nullptr);
    vkp_listener_unref(nullptr);
    vkp_loop *mine = vkp_loop_ref(loop);
    loop.close();
    CHECK(bad.open(mine, "tcp:127.0.0.1:0") == VKP_ERR_CLOSED);
    vkp_loop_unref(mine);
}

TEST_CASE("listener: a TCP port of the system's choice")
{
    VKP_TEST_ON_EVERY_BACKEND;
    Loop loop(backend);
    Echo echo;
    std::string address = "tcp:127.0.0.1:0";
    REQUIRE(echo.open(loop, address.c_str()) == VKP_OK);
    address = "gone"; // borrowed until open returned
    CHECK(echo.address().rfind("tcp:127.0.0.1:", 0) == 0);
    CHECK(std::stoi(echo.address().substr(14)) > 0);
    for (int i = 1; i <= 2; i++) {
        check_echo(loop, echo.address());
        vkp_test_run_until(loop, "the end", [&] { return echo.closes == i; });
    }
    CHECK(echo.told ==
          std::vector<std::string>{"accept", "open", "close", "accept", "open", "close"});

    Echo second;
    CHECK(second.open(loop, echo.address().c_str()) == VKP_ERR_IN_USE);
    CHECK(second.listener == nullptr);
    const std::string before = echo.address();
    echo.drop();
    CHECK(Client(before).refused());
    REQUIRE(second.open(loop, before.c_str()) == VKP_OK); // at once, in spite of TIME_WAIT
    CHECK(second.address() == before);
    check_echo(loop, before);
}

TEST_CASE("listener: IPv6, where the system has it")
{
    Loop loop(&vkp_backend_poll);
    Echo echo;
    if (echo.open(loop, "tcp:[::1]:0") != VKP_OK) {
        WARN("no IPv6 here: not run");
        return;
    }
    CHECK(echo.address().rfind("tcp:[::1]:", 0) == 0);
    struct Outcome {
        int opens = 0;
    } outcome;
    vkp_conn_ops ops = {};
    ops.on_open = [](vkp_conn *, void *user) { static_cast<Outcome *>(user)->opens++; };
    vkp_conn_config config = {};
    config.ops = &ops;
    config.user = &outcome;
    vkp_conn *conn = nullptr;
    REQUIRE(vkp_conn_connect(loop, vkp_str_of(echo.address().c_str()), &config, &conn) == VKP_OK);
    vkp_test_run_until(loop, "both ends", [&] { return outcome.opens == 1 && echo.opens == 1; });
    vkp_conn_close(conn);
    vkp_conn_unref(conn);
}

TEST_CASE("listener: a Unix address has a socket of its own")
{
    VKP_TEST_ON_EVERY_BACKEND;
    Loop loop(backend);
    Echo echo;
    const std::string address = vkp_test_fresh_address("l");
    REQUIRE(echo.open(loop, address.c_str()) == VKP_OK);
    CHECK(echo.address() == address);
    struct stat info;
    REQUIRE(lstat(path_of(address), &info) == 0);
    CHECK(S_ISSOCK(info.st_mode));
    CHECK((info.st_mode & 07777) == 0600);
    check_echo(loop, address);
    Echo second;
    CHECK(second.open(loop, address.c_str()) == VKP_ERR_IN_USE); // a registry of its own too
    check_echo(loop, address);
    echo.drop();
    CHECK_FALSE(vkp_test_exists(path_of(address)));
    CHECK_FALSE(vkp_test_exists((std::string(path_of(address)) + ".lock").c_str()));
    CHECK(Client(address).refused());
    REQUIRE(second.open(loop, address.c_str()) == VKP_OK);
    check_echo(loop, address);
}

TEST_CASE("listener: something else at the path is refused and left alone")
{
    Loop loop(&vkp_backend_poll);
    Echo echo;
    const std::string address = vkp_test_fresh_address("l");
    REQUIRE(mkdir(path_of(address), 0700) == 0);
    CHECK(echo.open(loop, address.c_str()) == VKP_ERR_EXISTS);
    CHECK(rmdir(path_of(address)) == 0);
}

TEST_CASE("listener: listeners of one registry share the path's socket")
{
    VKP_TEST_ON_EVERY_BACKEND;
    Loop loop(backend);
    vkp_registry *registry = nullptr;
    REQUIRE(vkp_registry_open(nullptr, &registry) == VKP_OK);
    const std::string address = vkp_test_fresh_address("l");
    Echo first;
    Echo second;
    first.config.registry = registry;
    second.config.registry = registry;
    REQUIRE(first.open(loop, address.c_str()) == VKP_OK);
    vkp_socket *sock = nullptr;
    REQUIRE(vkp_socket_find(registry, vkp_str_of(path_of(address)), &sock) == VKP_OK);
    CHECK(vkp_socket_get_ref_count(sock) == 2);
    vkp_socket_unref(sock);
    SECTION("one after the other")
    {
        first.drop();
        CHECK(vkp_registry_get_count(registry) == 0);
        REQUIRE(second.open(loop, address.c_str()) == VKP_OK);
    }
    SECTION("a handle of the program keeps the path")
    {
        REQUIRE(vkp_socket_find(registry, vkp_str_of(path_of(address)), &sock) == VKP_OK);
        first.drop();
        CHECK(vkp_test_exists(path_of(address)));
        Client waits(address); // in the backlog until somebody listens again
        CHECK_FALSE(waits.refused());
        REQUIRE(second.open(loop, address.c_str()) == VKP_OK);
        vkp_socket_unref(sock);
        waits.say("x");
        vkp_test_run_until(loop, "the echo", [&] { return waits.hear() == "x"; });
    }
    SECTION("a handle given to the listener")
    {
        REQUIRE(vkp_socket_find(registry, vkp_str_of(path_of(address)), &sock) == VKP_OK);
        first.drop();
        second.config.address = vkp_str_of(nullptr);
        second.config.socket = sock;
        REQUIRE(second.open(loop) == VKP_OK);
        CHECK(vkp_socket_get_ref_count(sock) == 2);
        vkp_socket_unref(sock);
        CHECK(second.address() == address);
    }
    vkp_registry_unref(registry);
    check_echo(loop, address);
    second.drop();
    CHECK_FALSE(vkp_test_exists(path_of(address)));
}

TEST_CASE("listener: a registered socket serves, even one that the caller left blocking")
{
    VKP_TEST_ON_EVERY_BACKEND;
    Loop loop(backend);
    vkp_registry *registry = nullptr;
    REQUIRE(vkp_registry_open(nullptr, &registry) == VKP_OK);
    const std::string address = vkp_test_fresh_address("l");
    sockaddr_un name = {};
    name.sun_family = AF_UNIX;
    std::strcpy(name.sun_path, path_of(address));
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    REQUIRE(bind(fd, reinterpret_cast<sockaddr *>(&name), sizeof name) == 0);
    REQUIRE(listen(fd, 8) == 0);
    vkp_socket *sock = nullptr;
    REQUIRE(vkp_socket_adopt(registry, vkp_str_of(path_of(address)), fd, &sock) == VKP_OK);
    REQUIRE((fcntl(fd, F_GETFL) & O_NONBLOCK) != 0); // else the next line would never return
    CHECK((fcntl(fd, F_GETFD) & FD_CLOEXEC) != 0);
    Echo echo;
    echo.config.socket = sock;
    REQUIRE(echo.open(loop) == VKP_OK);
    vkp_socket_unref(sock);
    vkp_registry_unref(registry);
    check_echo(loop, address);
}

TEST_CASE("listener: the registry's cleanup under a listener")
{
    VKP_TEST_ON_EVERY_BACKEND;
    Loop loop(backend);
    vkp_registry *registry = nullptr;
    REQUIRE(vkp_registry_open(nullptr, &registry) == VKP_OK);
    const std::string address = vkp_test_fresh_address("l");
    Echo echo;
    echo.config.registry = registry;
    REQUIRE(echo.open(loop, address.c_str()) == VKP_OK);
    Client client(address);
    vkp_test_run_until(loop, "the connection", [&] { return echo.opens == 1; });
    CHECK(vkp_registry_cleanup_all(registry) == 1);
    CHECK_FALSE(vkp_test_exists(path_of(address)));
    CHECK(Client(address).refused());
    CHECK(echo.ends == 0); // on the loop's thread, in a round
    vkp_test_rounds(loop, 3);
    CHECK(echo.ends == 1);
    client.say("still here");
    vkp_test_run_until(loop, "the echo", [&] { return client.hear() == "still here"; });
    CHECK(vkp_registry_cleanup_all(registry) == 0);
    Echo next;
    next.config.registry = registry;
    REQUIRE(next.open(loop, address.c_str()) == VKP_OK);
    echo.drop();
    vkp_test_rounds(loop, 3);
    CHECK(echo.ends == 1);
    check_echo(loop, address);
    CHECK(next.accepts == 1);
    vkp_registry_unref(registry);
}

TEST_CASE("listener: on_accept comes before on_open, sets the user, refuses by close")
{
    VKP_TEST_ON_EVERY_BACKEND;
    Loop loop(backend);
    Echo echo;
    Echo other;
    const std::string address = vkp_test_fresh_address("l");
    REQUIRE(echo.open(loop, address.c_str()) == VKP_OK);
    SECTION("another user")
    {
        echo.on_accept = [&](vkp_conn *conn) {
            CHECK(vkp_conn_get_user(conn) == &echo);
            CHECK(vkp_conn_is_open(conn));
            vkp_conn_set_user(conn, &other);
        };
        check_echo(loop, address);
        vkp_test_run_until(loop, "the end", [&] { return other.closes == 1; });
        CHECK(other.opens == 1);
        CHECK(echo.opens == 0);
        CHECK(echo.accepts == 1);
        CHECK(echo.closes == 0);
    }
    SECTION("refused")
    {
        echo.on_accept = [](vkp_conn *conn) { vkp_conn_close(conn); };
        Client client(address);
        vkp_test_run_until(loop, "the refusal", [&] {
            client.hear();
            return client.ended;
        });
        CHECK(echo.told == std::vector<std::string>{"accept", "close"});
    }
    SECTION("kept by a reference")
    {
        vkp_conn *kept = nullptr;
        echo.on_accept = [&](vkp_conn *conn) { kept = vkp_conn_ref(conn); };
        check_echo(loop, address);
        vkp_test_run_until(loop, "the end", [&] { return echo.closes == 1; });
        CHECK_FALSE(vkp_conn_is_open(kept));
        vkp_conn_unref(kept);
    }
    SECTION("spoken to first")
    {
        echo.on_accept = [](vkp_conn *conn) {
            const vkp_bytes hello = vkp_bytes_static("hello", 5);
            CHECK(vkp_conn_send(conn, &hello) == VKP_OK);
        };
        Client client(address);
        vkp_test_run_until(loop, "the greeting", [&] { return client.hear() == "hello"; });
    }
}

TEST_CASE("listener: on_fd takes the descriptor instead")
{
    VKP_TEST_ON_EVERY_BACKEND;
    Loop loop(backend);
    Loop elsewhere(backend);
    Echo echo;
    echo.hand_on();
    echo.config.conn.ops = nullptr; // no connections of its own
    const std::string address = GENERATE(as<std::string>{}, "tcp:127.0.0.1:0", "unix:");
    REQUIRE(echo.open(loop, address == "unix:" ? vkp_test_fresh_address("l") : address.c_str()) ==
            VKP_OK);
    Echo served;
    echo.on_fd = [&](int fd, vkp_seat *seat) {
        CHECK((fcntl(fd, F_GETFL) & O_NONBLOCK) != 0);
        CHECK((fcntl(fd, F_GETFD) & FD_CLOEXEC) != 0);
        vkp_conn *conn = nullptr;
        REQUIRE(vkp_conn_open(elsewhere, fd, &served.config.conn, &conn) == VKP_OK);
        REQUIRE(seat != nullptr);
        vkp_conn_set_seat(conn, seat);
        vkp_conn_unref(conn);
    };
    Client client(echo.address());
    client.say("hi");
    vkp_test_run_until(loop, "the descriptor", [&] { return !echo.told.empty(); });
    vkp_test_run_until(elsewhere, "the echo", [&] { return client.hear() == "hi"; });
    CHECK(echo.told == std::vector<std::string>{"fd"});
    CHECK(served.opens == 1);
    CHECK(echo.stats().clients == 1);
    elsewhere.close();
    CHECK(served.closes == 1);
    CHECK(echo.stats().clients == 0);
    CHECK(echo.stats().accepted == 1);
}

TEST_CASE("listener: closing stops accepting, and connections stay")
{
    VKP_TEST_ON_EVERY_BACKEND;
    Loop loop(backend);
    Echo echo;
    const std::string address = GENERATE(as<std::string>{}, "tcp:127.0.0.1:0", "unix:");
    REQUIRE(echo.open(loop, address == "unix:" ? vkp_test_fresh_address("l") : address.c_str()) ==
            VKP_OK);
    const std::string bound = echo.address();
    Client client(bound);
    vkp_test_run_until(loop, "the connection", [&] { return echo.opens == 1; });
    vkp_listener_close(echo.listener);
    vkp_listener_close(echo.listener);
    CHECK(echo.address() == bound);
    CHECK(Client(bound).refused());
    client.say("still here");
    vkp_test_run_until(loop, "the echo", [&] { return client.hear() == "still here"; });
    echo.drop();
    client.say("!");
    vkp_test_run_until(loop, "the echo", [&] { return client.hear() == "still here!"; });
    CHECK(echo.accepts == 1);
}

TEST_CASE("listener: close and unref inside its callbacks")
{
    VKP_TEST_ON_EVERY_BACKEND;
    const bool unref = GENERATE(false, true);
    Loop loop(backend);
    Echo echo;
    const std::string address = vkp_test_fresh_address("l");
    auto end = [&] {
        if (unref) {
            echo.drop();
        } else {
            vkp_listener_close(echo.listener);
        }
    };
    Client *clients[3] = {};
    SECTION("on_accept, with more in the backlog")
    {
        REQUIRE(echo.open(loop, address.c_str()) == VKP_OK);
        echo.on_accept = [&](vkp_conn *) { end(); };
        for (Client *&client : clients) {
            client = new Client(address);
        }
        clients[0]->say("served");
        vkp_test_run_until(loop, "the echo", [&] { return clients[0]->hear() == "served"; });
        CHECK(echo.accepts == 1);
        CHECK(echo.opens == 1);
        for (int i = 1; i < 3; i++) { // never accepted, and told so by the kernel
            vkp_test_run_until(loop, "the end", [&] {
                clients[i]->hear();
                return clients[i]->ended;
            });
        }
    }
    SECTION("on_fd")
    {
        echo.hand_on();
        REQUIRE(echo.open(loop, address.c_str()) == VKP_OK);
        const bool seat_first = GENERATE(false, true);
        echo.on_fd = [&](int fd, vkp_seat *seat) {
            close(fd);
            if (seat_first) {
                vkp_seat_unref(seat);
            }
            end();
            if (!seat_first) {
                vkp_seat_unref(seat);
            }
        };
        clients[0] = new Client(address);
        vkp_test_run_until(loop, "the descriptor", [&] { return echo.told.size() == 1; });
    }
    SECTION("on_refuse, with more in the backlog")
    {
        echo.config.max_clients = 1;
        REQUIRE(echo.open(loop, address.c_str()) == VKP_OK);
        clients[0] = new Client(address);
        vkp_test_run_until(loop, "the first", [&] { return echo.opens == 1; });
        echo.on_refuse = [&](int) { end(); };
        for (int i = 1; i < 3; i++) {
            clients[i] = new Client(address);
        }
        for (int i = 1; i < 3; i++) {
            vkp_test_run_until(loop, "the end", [&] {
                clients[i]->hear();
                return clients[i]->ended;
            });
        }
        CHECK(echo.refused == std::vector<vkp_refusal>{VKP_REFUSAL_FULL});
        clients[0]->say("served");
        vkp_test_run_until(loop, "the echo", [&] { return clients[0]->hear() == "served"; });
    }
    SECTION("on_end")
    {
        vkp_registry *registry = nullptr;
        REQUIRE(vkp_registry_open(nullptr, &registry) == VKP_OK);
        echo.config.registry = registry;
        REQUIRE(echo.open(loop, address.c_str()) == VKP_OK);
        echo.on_end = [&] { end(); };
        CHECK(vkp_registry_cleanup_all(registry) == 1);
        vkp_registry_unref(registry);
        vkp_test_run_until(loop, "the end", [&] { return echo.ends == 1; });
    }
    CHECK_FALSE(vkp_test_exists(path_of(address)));
    for (Client *client : clients) {
        delete client;
    }
    vkp_test_rounds(loop, 3);
}

TEST_CASE("listener: the loop's close stops it, and it says so")
{
    VKP_TEST_ON_EVERY_BACKEND;
    Loop loop(backend);
    Echo echo;
    const bool tcp = GENERATE(false, true);
    REQUIRE(echo.open(loop, tcp ? "tcp:127.0.0.1:0" : vkp_test_fresh_address("l")) == VKP_OK);
    const std::string address = echo.address();
    Client client(address);
    vkp_test_run_until(loop, "the connection", [&] { return echo.opens == 1; });
    SECTION("open until then")
    {
        loop.close();
        CHECK(echo.ends == 1);
    }
    SECTION("closed before: that was no end by itself")
    {
        vkp_listener_close(echo.listener);
        loop.close();
        CHECK(echo.ends == 0);
    }
    SECTION("let go in the callback")
    {
        echo.on_end = [&] { echo.drop(); };
        loop.close();
        CHECK(echo.ends == 1);
    }
    CHECK(echo.closes == 1);
    CHECK((tcp || !vkp_test_exists(path_of(address))));
    CHECK(Client(address).refused());
    echo.drop();
}

TEST_CASE("listener: peers that leave at once are no error")
{
    VKP_TEST_ON_EVERY_BACKEND;
    Loop loop(backend);
    Echo echo;
    const std::string address = GENERATE(as<std::string>{}, "tcp:127.0.0.1:0", "unix:");
    REQUIRE(echo.open(loop, address == "unix:" ? vkp_test_fresh_address("l") : address.c_str()) ==
            VKP_OK);
    for (int i = 0; i < 20; i++) {
        CHECK_FALSE(Client(echo.address()).refused());
    }
    check_echo(loop, echo.address());
    vkp_test_run_until(loop, "the ends", [&] { return echo.closes == echo.accepts; });
    CHECK(echo.opens == echo.accepts);
    CHECK(echo.accepts >= 1);
    CHECK_FALSE(vkp_test_env_logged(&loop.test, "accept"));
}

TEST_CASE("listener: more connections than one round accepts")
{
    VKP_TEST_ON_EVERY_BACKEND;
    Loop loop(backend);
    Echo echo;
    const std::string address = vkp_test_fresh_address("l");
    REQUIRE(echo.open(loop, address.c_str()) == VKP_OK);
    std::vector<std::unique_ptr<Client>> clients;
    for (int i = 0; i < 200; i++) {
        clients.push_back(std::make_unique<Client>(address));
        clients.back()->say(std::to_string(i));
    }
    for (int i = 0; i < 200; i++) {
        Client &client = *clients[static_cast<size_t>(i)];
        vkp_test_run_until(loop, "an echo", [&] { return client.hear() == std::to_string(i); });
    }
    CHECK(echo.accepts == 200);
}

// Accept that fails as it is told to, and counts.
namespace faulty {

int fault;
int calls;

int accept(int fd)
{
    calls++;
    return fault != 0 ? -fault : vkp_sys_get_default()->accept(fd);
}

vkp_sys table()
{
    vkp_sys sys = *vkp_sys_get_default();
    sys.accept = accept;
    fault = 0;
    calls = 0;
    return sys;
}

} // namespace faulty

// A failed accept, and then silence for exactly so long, on virtual time: nothing but timers moves
// it.
void check_pause(Loop &loop, uint64_t pause_ms)
{
    INFO("a pause of " << pause_ms << " ms");
    const int before = faulty::calls;
    const uint64_t since = vkp_loop_get_now_ns(loop);
    vkp_test_rounds(loop, 2);
    CHECK(faulty::calls == before + 1);
    vkp_test_rounds(loop, 20);
    CHECK(faulty::calls == before + 1); // the client waits, and costs no round
    CHECK(vkp_loop_get_now_ns(loop) == since);
    CHECK(vkp_loop_get_deadline_ns(loop) == since + pause_ms * vkp_test_ms);
    loop.wait();
    CHECK(vkp_loop_get_now_ns(loop) == since + pause_ms * vkp_test_ms);
}

TEST_CASE("listener: when accept fails it pauses ever longer without spinning, and recovers")
{
    const vkp_sys sys = faulty::table();
    const int fault = GENERATE(EMFILE, ENFILE, ENOMEM, ENOBUFS, EIO);
    INFO("error " << fault);
    const bool descriptors = fault == EMFILE || fault == ENFILE;
    Loop loop(&vkp_backend_null, &sys);
    Echo echo;
    const std::string address = vkp_test_fresh_address("l");
    REQUIRE(echo.open(loop, address.c_str()) == VKP_OK);
    faulty::fault = fault;
    Client client(address);
    client.say("hello?");
    // Short of descriptors for a second it does more than wait: another test.
    for (uint64_t pause : {10u, 20u, 40u, 80u, 160u, 320u}) {
        check_pause(loop, pause);
    }
    for (uint64_t pause : {640u, 1000u, 1000u, 1000u}) {
        if (!descriptors) {
            check_pause(loop, pause);
        }
    }
    CHECK(vkp_test_env_logged(&loop.test, "accept"));
    const uint64_t failures = descriptors ? 6 : 10;
    vkp_listener_stats stats = echo.stats();
    CHECK(stats.no_descriptors == (descriptors ? failures : 0));
    CHECK(stats.no_memory == (fault == ENOMEM || fault == ENOBUFS ? failures : 0));
    CHECK(stats.failed == (fault == EIO ? failures : 0));
    CHECK(stats.pauses == failures);
    CHECK(stats.accepted == 0);
    CHECK(echo.refused.empty());
    SECTION("recovered: served, and the next shortage begins small")
    {
        faulty::fault = 0;
        vkp_test_rounds(loop, 3);
        CHECK(client.hear() == "hello?");
        CHECK(echo.accepts == 1);
        CHECK(vkp_loop_get_deadline_ns(loop) == VKP_FOREVER);
        faulty::fault = fault;
        Client other(address);
        check_pause(loop, 10);
        check_pause(loop, 20);
        faulty::fault = 0;
        other.say("me too");
        vkp_test_rounds(loop, 3);
        CHECK(other.hear() == "me too");
        stats = echo.stats();
        CHECK(stats.accepted == 2);
        CHECK(stats.clients == 2);
        CHECK(stats.pauses == failures + 2);
    }
    SECTION("closed while it pauses")
    {
        vkp_test_rounds(loop, 2);
        if (GENERATE(false, true)) {
            echo.drop();
        } else {
            vkp_listener_close(echo.listener);
        }
        CHECK(vkp_loop_get_deadline_ns(loop) == VKP_FOREVER);
        vkp_test_rounds(loop, 3);
        CHECK(echo.ends == 0);
    }
}

// Descriptors as the kernel counts them, but few. Those that do not come from here are ignored.
namespace few {

int left;
std::vector<int> given;

int take(int fd)
{
    if (fd >= 0) {
        left--;
        given.push_back(fd);
    }
    return fd;
}

vkp_sys table(int fault)
{
    static int error;
    error = fault;
    vkp_sys sys = *vkp_sys_get_default();
    sys.socket = [](int family, int type) {
        return left > 0 ? take(vkp_sys_get_default()->socket(family, type)) : -error;
    };
    sys.accept = [](int fd) { return left > 0 ? take(vkp_sys_get_default()->accept(fd)) : -error; };
    sys.close = [](int fd) {
        for (size_t i = 0; i < given.size(); i++) {
            if (given[i] == fd) {
                given.erase(given.begin() + static_cast<ptrdiff_t>(i));
                left++;
                break;
            }
        }
        return vkp_sys_get_default()->close(fd);
    };
    left = 100;
    given.clear();
    return sys;
}

} // namespace few

void say_sorry(int fd)
{
    const vkp_range range = {"sorry", 5};
    CHECK(vkp_sys_get_default()->send(fd, &range, 1) == 5);
}

TEST_CASE("listener: short of descriptors for a second it tells clients, by a spare one")
{
    const int fault = GENERATE(EMFILE, ENFILE);
    const vkp_sys sys = few::table(fault);
    Loop loop(&vkp_backend_null, &sys);
    Echo echo;
    echo.on_refuse = say_sorry;
    const std::string address = vkp_test_fresh_address("l");
    REQUIRE(echo.open(loop, address.c_str()) == VKP_OK);
    few::left = 0;
    std::vector<std::unique_ptr<Client>> clients;
    for (int i = 0; i < 3; i++) {
        clients.push_back(std::make_unique<Client>(address));
    }
    auto all_told = [&] {
        bool all = true;
        for (auto &client : clients) {
            all = all && client->hear() == "sorry" && client->ended;
        }
        return all;
    };
    vkp_test_rounds(loop, 1);
    const uint64_t since = vkp_loop_get_now_ns(loop);
    uint64_t first = 0;
    for (int tries = 0; !all_told(); tries++) {
        REQUIRE(tries < 100);
        loop.wait();
        if (first == 0 && !echo.refused.empty()) {
            first = vkp_loop_get_now_ns(loop);
        }
    }
    CHECK(first >= since + 1000 * vkp_test_ms);
    CHECK(first <= since + 2000 * vkp_test_ms);
    CHECK(echo.refused == std::vector<vkp_refusal>(3, VKP_REFUSAL_OVERLOAD));
    CHECK(echo.stats().refused[VKP_REFUSAL_OVERLOAD] == 3);
    CHECK(echo.stats().no_descriptors > 3);
    CHECK(echo.accepts == 0);
    CHECK(few::left == 0); // the spare one is there again
    SECTION("then there are some again")
    {
        few::left = 10;
        Client client(address);
        client.say("hello");
        vkp_test_run_until(loop, "the echo", [&] { return client.hear() == "hello"; });
        // The next shortage is a new one: nobody is told before it lasted.
        few::left = 0;
        Client other(address);
        const uint64_t again = vkp_loop_get_now_ns(loop);
        while (echo.refused.size() == 3) {
            loop.wait();
        }
        CHECK(vkp_loop_get_now_ns(loop) >= again + 1000 * vkp_test_ms);
        vkp_test_run_until(loop, "the excuse", [&] { return other.hear() == "sorry"; });
    }
    SECTION("somebody takes the descriptor that the spare one gave back")
    {
        echo.on_refuse = [&](int fd) {
            say_sorry(fd);
            few::left--;
        };
        clients.push_back(std::make_unique<Client>(address));
        vkp_test_run_until(loop, "the excuse", all_told);
        CHECK(few::left == 0);
        // Without it there is nothing to tell by: they wait, and are served when they can be.
        Client waits(address);
        waits.say("hello");
        for (int i = 0; i < 10; i++) {
            loop.wait();
        }
        CHECK(echo.refused.size() == 4);
        few::left = 10;
        vkp_test_run_until(loop, "the echo", [&] { return waits.hear() == "hello"; });
        // And the spare one is made when it can be.
        echo.on_refuse = say_sorry;
        few::left = 0;
        clients.push_back(std::make_unique<Client>(address));
        vkp_test_run_until(loop, "the excuse", all_told);
        CHECK(echo.refused.size() == 5);
    }
    SECTION("the end while it is so")
    {
        echo.on_refuse = [&](int) { echo.drop(); };
        Client client(address);
        vkp_test_run_until(loop, "the end", [&] {
            client.hear();
            return client.ended;
        });
        CHECK(echo.listener == nullptr);
    }
}

TEST_CASE("listener: a process that ran out of descriptors, by its real limit")
{
    Loop loop(&vkp_backend_null);
    Echo echo;
    echo.on_refuse = say_sorry;
    const std::string address = vkp_test_fresh_address("l");
    REQUIRE(echo.open(loop, address.c_str()) == VKP_OK);
    Client told(address);
    rlimit before;
    REQUIRE(getrlimit(RLIMIT_NOFILE, &before) == 0);
    // The lowest free number is the limit: all below it are taken.
    const int lowest = dup(0);
    REQUIRE(lowest >= 0);
    close(lowest);
    rlimit low = before;
    low.rlim_cur = static_cast<rlim_t>(lowest);
    REQUIRE(setrlimit(RLIMIT_NOFILE, &low) == 0);
    for (int i = 0; i < 100 && echo.refused.empty(); i++) {
        loop.wait();
    }
    const bool excused = told.hear() == "sorry";
    const int none = dup(0);
    REQUIRE(setrlimit(RLIMIT_NOFILE, &before) == 0);
    CHECK(none == -1);
    CHECK(excused);
    CHECK(echo.refused == std::vector<vkp_refusal>{VKP_REFUSAL_OVERLOAD});
    CHECK(echo.stats().no_descriptors > 3);
    CHECK(echo.stats().accepted == 0);
    check_echo(loop, address);
    CHECK(echo.stats().accepted == 1);
}

TEST_CASE("listener: an aborted or interrupted accept goes on with the next")
{
    VKP_TEST_ON_EVERY_BACKEND;
    static int fault;
    static int left;
    vkp_sys sys = *vkp_sys_get_default();
    sys.accept = [](int fd) { return left-- > 0 ? -fault : vkp_sys_get_default()->accept(fd); };
    fault = GENERATE(ECONNABORTED, EPROTO, EINTR);
    INFO("error " << fault);
    left = 3;
    Loop loop(backend, &sys);
    Echo echo;
    const std::string address = vkp_test_fresh_address("l");
    REQUIRE(echo.open(loop, address.c_str()) == VKP_OK);
    Client client(address);
    client.say("echo?");
    vkp_test_rounds(loop, 3); // no timer's time passes: there was no pause
    CHECK(client.hear() == "echo?");
    CHECK(left < 0);
    CHECK(echo.accepts == 1);
    const vkp_listener_stats stats = echo.stats();
    CHECK(stats.accepted == 1);
    CHECK(stats.aborted == (fault == EINTR ? 0 : 3)); // nobody left by EINTR
    CHECK(stats.failed + stats.no_memory + stats.no_descriptors + stats.pauses == 0);
    CHECK_FALSE(vkp_test_env_logged(&loop.test, "accept"));
}

TEST_CASE("listener: every allocation of open may fail")
{
    const bool tcp = GENERATE(false, true);
    const vkp_test_fault fault = GENERATE(VKP_TEST_FAULT_ONCE, VKP_TEST_FAULT_FROM);
    Loop loop(&vkp_backend_poll);
    uint64_t k = 1;
    for (;; k++) {
        INFO("allocation " << k);
        Echo echo;
        const std::string address = tcp ? "tcp:127.0.0.1:0" : vkp_test_fresh_address("l");
        const int fds = vkp_test_fd_count();
        vkp_test_env_fault(&loop.test, fault, k);
        vkp_status status = echo.open(loop, address.c_str());
        vkp_test_env_fault(&loop.test, VKP_TEST_FAULT_NONE, 0);
        if (status == VKP_OK) {
            check_echo(loop, echo.address());
            break;
        }
        CHECK(status == VKP_ERR_NOMEM);
        CHECK(echo.listener == nullptr);
        CHECK(vkp_test_fd_count() == fds);
        CHECK((tcp || !vkp_test_exists(path_of(address))));
        CHECK((tcp || !vkp_test_exists((std::string(path_of(address)) + ".lock").c_str())));
    }
    CHECK(k > 3);
}

TEST_CASE("listener: every system call of open may fail")
{
    static int fault_at;
    static int calls;
    vkp_sys sys = *vkp_sys_get_default();
    sys.socket = [](int family, int type) {
        return calls++ == fault_at ? -EMFILE : vkp_sys_get_default()->socket(family, type);
    };
    sys.bind = [](int fd, const void *address, uint32_t bytes, uint32_t mode) {
        return calls++ == fault_at ? -EACCES
                                   : vkp_sys_get_default()->bind(fd, address, bytes, mode);
    };
    sys.listen = [](int fd, int backlog) {
        return calls++ == fault_at ? -EIO : vkp_sys_get_default()->listen(fd, backlog);
    };
    sys.local_port = [](int fd) {
        return calls++ == fault_at ? -EIO : vkp_sys_get_default()->local_port(fd);
    };
    const bool tcp = GENERATE(false, true);
    Loop loop(&vkp_backend_poll, &sys);
    int failed = 0;
    for (fault_at = 0;; fault_at++) {
        INFO("call " << fault_at);
        Echo echo;
        const std::string address = tcp ? "tcp:127.0.0.1:0" : vkp_test_fresh_address("l");
        const int fds = vkp_test_fd_count();
        calls = 0;
        errno = 0;
        vkp_status status = echo.open(loop, address.c_str());
        const int error = errno;
        if (status == VKP_OK) {
            break;
        }
        failed++;
        CHECK(status == VKP_ERR_SYS);
        CHECK(error != 0);
        CHECK(vkp_test_fd_count() == fds);
        CHECK((tcp || !vkp_test_exists(path_of(address))));
    }
    CHECK(failed == (tcp ? 4 : 3));
}

TEST_CASE("listener: a connection that there is no memory for is closed, the others are served")
{
    VKP_TEST_ON_EVERY_BACKEND;
    Loop loop(backend);
    Echo echo;
    const std::string address = vkp_test_fresh_address("l");
    REQUIRE(echo.open(loop, address.c_str()) == VKP_OK);
    check_echo(loop, address);
    const int before = echo.accepts;
    for (uint64_t k = 1; k <= 4; k++) {
        INFO("allocation " << k);
        Client client(address);
        vkp_test_env_fault(&loop.test, VKP_TEST_FAULT_ONCE, k);
        const uint64_t failures = vkp_test_env_failures(&loop.test);
        vkp_test_run_until(loop, "its end or its place", [&] {
            client.hear();
            return client.ended || vkp_test_env_failures(&loop.test) > failures ||
                   echo.accepts > before + static_cast<int>(k);
        });
        vkp_test_env_fault(&loop.test, VKP_TEST_FAULT_NONE, 0);
        client.shut();
        check_echo(loop, address);
    }
    vkp_test_run_until(loop, "the ends", [&] { return echo.closes == echo.opens; });
}

TEST_CASE("listener: dead processes' sockets are taken over, live ones' are not")
{
    Loop loop(&vkp_backend_poll);
    const std::string address = vkp_test_fresh_address("l");
    int fds[2];
    REQUIRE(pipe(fds) == 0);
    int pid = fork();
    if (pid == 0) {
        vkp_loop *own = nullptr;
        vkp_loop_config config = {};
        config.backend = &vkp_backend_poll;
        Echo echo;
        if (vkp_loop_open(&config, &own) != VKP_OK || echo.open(own, address.c_str()) != VKP_OK ||
            write(fds[1], "s", 1) != 1 || vkp_loop_run(own) != VKP_OK) {
            _exit(1);
        }
        _exit(0);
    }
    char word = 0;
    REQUIRE(read(fds[0], &word, 1) == 1);
    close(fds[0]);
    close(fds[1]);
    Echo echo;
    CHECK(echo.open(loop, address.c_str()) == VKP_ERR_IN_USE);
    CHECK_FALSE(Client(address).refused());
    CHECK(vkp_test_reap(pid, SIGKILL) == 128 + SIGKILL);
    REQUIRE(echo.open(loop, address.c_str()) == VKP_OK);
    check_echo(loop, address);
}
