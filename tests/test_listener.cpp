// SPDX-License-Identifier: MIT
//
// Listeners over every backend: addresses and ports, sockets of their own and shared ones, accept
// that fails, connections refused or handed on, the end in every callback.
#include <catch2/catch.hpp>

#include <cerrno>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <csignal>
#include <fcntl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "support/support.h"

namespace {

std::vector<const vkp_backend *> all_backends()
{
    std::vector<const vkp_backend *> found;
    for (const vkp_backend *const *at = vkp_test_backends_all(); *at != nullptr; at++) {
        found.push_back(*at);
    }
    return found;
}

#define ON_EVERY_BACKEND                                               \
    const vkp_backend *backend = GENERATE(from_range(all_backends())); \
    INFO("backend " << backend->name)

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
    void rounds(int count)
    {
        for (int i = 0; i < count; i++) {
            if (vkp_loop_run_once(loop_, 0) != VKP_OK) {
                vkp_test_fail("a round failed");
            }
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
    std::vector<std::string> told;
    std::function<void(vkp_conn *)> on_accept;
    std::function<void(int)> on_fd;

    Echo()
    {
        static const vkp_conn_ops ops = [] {
            vkp_conn_ops table = {};
            table.on_open = [](vkp_conn *, void *user) {
                Echo *self = static_cast<Echo *>(user);
                self->opens++;
                self->told.push_back("open");
            };
            table.on_data = [](vkp_conn *conn, void *, const vkp_bytes *in) {
                return vkp_conn_send(conn, in) == VKP_OK ? in->len : 0;
            };
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
        config.on_fd = [](void *user, int fd) {
            Echo *self = static_cast<Echo *>(user);
            self->told.push_back("fd");
            self->on_fd(fd);
        };
    }
    vkp_status open(vkp_loop *loop, const char *address)
    {
        config.address = address;
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
    echo.config.address = "tcp:127.0.0.1:0";
    CHECK(vkp_listener_open(loop, &echo.config, nullptr) == VKP_ERR_INVALID);
    echo.config.conn.ops = nullptr;
    CHECK(vkp_listener_open(loop, &echo.config, &listener) == VKP_ERR_INVALID);
    Echo bad;
    for (const char *address : {"", "unix:", "unix:a/../b", "tcp:", "tcp:127.0.0.1",
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
    ON_EVERY_BACKEND;
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
    REQUIRE(vkp_conn_connect(loop, echo.address().c_str(), &config, &conn) == VKP_OK);
    vkp_test_run_until(loop, "both ends", [&] { return outcome.opens == 1 && echo.opens == 1; });
    vkp_conn_close(conn);
    vkp_conn_unref(conn);
}

TEST_CASE("listener: a Unix address has a socket of its own")
{
    ON_EVERY_BACKEND;
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
    ON_EVERY_BACKEND;
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
    REQUIRE(vkp_socket_get_existing(registry, path_of(address), &sock) == VKP_OK);
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
        REQUIRE(vkp_socket_get_existing(registry, path_of(address), &sock) == VKP_OK);
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
        REQUIRE(vkp_socket_get_existing(registry, path_of(address), &sock) == VKP_OK);
        first.drop();
        second.config.address = nullptr;
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
    ON_EVERY_BACKEND;
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
    REQUIRE(vkp_socket_register_new(registry, path_of(address), fd, &sock) == VKP_OK);
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
    ON_EVERY_BACKEND;
    Loop loop(backend);
    vkp_registry *registry = nullptr;
    REQUIRE(vkp_registry_open(nullptr, &registry) == VKP_OK);
    const std::string address = vkp_test_fresh_address("l");
    Echo echo;
    echo.config.registry = registry;
    REQUIRE(echo.open(loop, address.c_str()) == VKP_OK);
    CHECK(vkp_registry_cleanup_all(registry) == 1);
    CHECK(Client(address).refused());
    loop.rounds(3);
    Echo next;
    next.config.registry = registry;
    REQUIRE(next.open(loop, address.c_str()) == VKP_OK);
    echo.drop();
    check_echo(loop, address);
    CHECK(next.accepts == 1);
    vkp_registry_unref(registry);
}

TEST_CASE("listener: on_accept comes before on_open, sets the user, refuses by close")
{
    ON_EVERY_BACKEND;
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
    ON_EVERY_BACKEND;
    Loop loop(backend);
    Loop elsewhere(backend);
    Echo echo;
    echo.hand_on();
    echo.config.conn.ops = nullptr; // no connections of its own
    const std::string address = GENERATE(as<std::string>{}, "tcp:127.0.0.1:0", "unix:");
    REQUIRE(echo.open(loop, address == "unix:" ? vkp_test_fresh_address("l") : address.c_str()) ==
            VKP_OK);
    Echo served;
    echo.on_fd = [&](int fd) {
        CHECK((fcntl(fd, F_GETFL) & O_NONBLOCK) != 0);
        CHECK((fcntl(fd, F_GETFD) & FD_CLOEXEC) != 0);
        vkp_conn *conn = nullptr;
        REQUIRE(vkp_conn_open(elsewhere, fd, &served.config.conn, &conn) == VKP_OK);
        vkp_conn_unref(conn);
    };
    Client client(echo.address());
    client.say("hi");
    vkp_test_run_until(loop, "the descriptor", [&] { return !echo.told.empty(); });
    vkp_test_run_until(elsewhere, "the echo", [&] { return client.hear() == "hi"; });
    CHECK(echo.told == std::vector<std::string>{"fd"});
    CHECK(served.opens == 1);
    elsewhere.close();
}

TEST_CASE("listener: closing stops accepting, and connections stay")
{
    ON_EVERY_BACKEND;
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
    ON_EVERY_BACKEND;
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
        echo.on_fd = [&](int fd) {
            close(fd);
            end();
        };
        clients[0] = new Client(address);
        vkp_test_run_until(loop, "the descriptor", [&] { return echo.told.size() == 1; });
    }
    CHECK_FALSE(vkp_test_exists(path_of(address)));
    for (Client *client : clients) {
        delete client;
    }
    loop.rounds(3);
}

TEST_CASE("listener: the loop's close stops it")
{
    ON_EVERY_BACKEND;
    Loop loop(backend);
    Echo echo;
    const std::string address = vkp_test_fresh_address("l");
    REQUIRE(echo.open(loop, address.c_str()) == VKP_OK);
    Client client(address);
    vkp_test_run_until(loop, "the connection", [&] { return echo.opens == 1; });
    loop.close();
    CHECK(echo.closes == 1);
    CHECK_FALSE(vkp_test_exists(path_of(address)));
    CHECK(Client(address).refused());
    echo.drop();
}

TEST_CASE("listener: peers that leave at once are no error")
{
    ON_EVERY_BACKEND;
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
    ON_EVERY_BACKEND;
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

TEST_CASE("listener: out of descriptors it pauses without spinning, and recovers")
{
    static int fault;
    static int calls;
    static bool failing;
    vkp_sys sys = *vkp_sys_default();
    sys.accept = [](int fd) {
        calls++;
        return failing ? -fault : vkp_sys_default()->accept(fd);
    };
    fault = GENERATE(EMFILE, ENFILE, ENOMEM, ENOBUFS);
    INFO("error " << fault);
    calls = 0;
    failing = true;
    Loop loop(&vkp_backend_null, &sys); // virtual time: nothing but timers moves it
    Echo echo;
    const std::string address = vkp_test_fresh_address("l");
    REQUIRE(echo.open(loop, address.c_str()) == VKP_OK);
    Client client(address);
    client.say("hello?");
    loop.rounds(1);
    CHECK(calls == 1);
    CHECK(vkp_test_env_logged(&loop.test, "accept"));
    const uint64_t paused = vkp_loop_get_now(loop);
    loop.rounds(20);
    CHECK(calls == 1); // the connection waits, and costs no round
    CHECK(vkp_loop_get_deadline(loop) == paused + 100000000);
    REQUIRE(vkp_loop_run_once(loop, VKP_FOREVER) == VKP_OK);
    CHECK(vkp_loop_get_now(loop) == paused + 100000000);
    loop.rounds(1);
    CHECK(calls == 2); // still no room: once more
    failing = false;
    vkp_test_run_until(loop, "the echo", [&] { return client.hear() == "hello?"; });
    CHECK(echo.accepts == 1);
    SECTION("closed while it pauses")
    {
        failing = true;
        Client other(address);
        loop.rounds(2);
        echo.drop();
        CHECK(vkp_loop_get_deadline(loop) == VKP_FOREVER);
        loop.rounds(3);
    }
}

TEST_CASE("listener: an aborted or interrupted accept goes on with the next")
{
    ON_EVERY_BACKEND;
    static int fault;
    static int left;
    vkp_sys sys = *vkp_sys_default();
    sys.accept = [](int fd) { return left-- > 0 ? -fault : vkp_sys_default()->accept(fd); };
    fault = GENERATE(ECONNABORTED, EINTR);
    left = 3;
    Loop loop(backend, &sys);
    Echo echo;
    const std::string address = vkp_test_fresh_address("l");
    REQUIRE(echo.open(loop, address.c_str()) == VKP_OK);
    check_echo(loop, address);
    CHECK(left < 0);
    CHECK(echo.accepts == 1);
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
    vkp_sys sys = *vkp_sys_default();
    sys.socket = [](int family, int type) {
        return calls++ == fault_at ? -EMFILE : vkp_sys_default()->socket(family, type);
    };
    sys.bind = [](int fd, const void *address, uint32_t bytes) {
        return calls++ == fault_at ? -EACCES : vkp_sys_default()->bind(fd, address, bytes);
    };
    sys.listen = [](int fd, int backlog) {
        return calls++ == fault_at ? -EIO : vkp_sys_default()->listen(fd, backlog);
    };
    sys.local_port = [](int fd) {
        return calls++ == fault_at ? -EIO : vkp_sys_default()->local_port(fd);
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
    ON_EVERY_BACKEND;
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
