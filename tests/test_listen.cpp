// SPDX-License-Identifier: MIT
//
// Listeners and the sockets under them: those that live as long as their clients do, those started
// from other threads, those on several loops, those whose file is taken away, and their shutdown in
// good order.
#include "support/catch.hpp"

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "support/client_probe.h"
#include "support/listener_probe.h"

namespace {

using Strings = std::vector<std::string>;

using Peer = vkp_test_peer_ptr;

bool refuses(const std::string &address)
{
    const int fd = vkp_test_connect(address.c_str());
    if (fd >= 0) {
        close(fd);
    }
    return fd < 0;
}

// What it says comes back.
bool is_served(vkp_loop *loop, const Peer &peer)
{
    return vkp_test_peer_send_text(peer.get(), "+echo\r\n") &&
           vkp_test_frame_on(loop, peer.get()) == "+echo\r\n";
}

// A registry that ends with the last of its users.
class Registry {
  public:
    explicit Registry(const vkp_registry_config &config = {})
    {
        if (vkp_registry_open(&config, &registry_) != VKP_OK) {
            vkp_test_fail("no registry");
        }
    }
    ~Registry()
    {
        vkp_registry_unref(registry_);
    }
    Registry(const Registry &) = delete;
    Registry &operator=(const Registry &) = delete;
    operator vkp_registry *() const
    {
        return registry_;
    }
    vkp_socket *socket(const std::string &path) const
    {
        vkp_socket *sock = nullptr;
        if (vkp_socket_open(registry_, vkp_str_of(path.c_str()), &sock) != VKP_OK) {
            vkp_test_fail("no socket at %s", path.c_str());
        }
        return sock;
    }
    vkp_registry_stats stats() const
    {
        vkp_registry_stats stats;
        vkp_registry_get_stats(registry_, &stats);
        return stats;
    }

  private:
    vkp_registry *registry_ = nullptr;
};

// What a listener's callbacks tell; its connections send back what they hear.
struct Host {
    vkp_listener_config config = {};
    vkp_listener *listener = nullptr;
    std::vector<vkp_conn *> conns;
    std::vector<vkp_refusal> refused;
    std::vector<std::pair<int, vkp_seat *>> given;
    std::function<void(vkp_conn *)> on_open;
    std::function<void()> on_close;
    std::function<void()> on_end;
    std::atomic<int> opens{0};
    std::atomic<int> closes{0};
    std::atomic<int> ends{0};
    std::thread::id end_thread;
    void *start = nullptr; // who waits for its start

    Host()
    {
        static const vkp_conn_ops ops = [] {
            vkp_conn_ops table = {};
            table.on_open = [](vkp_conn *conn, void *user) {
                Host *self = static_cast<Host *>(user);
                self->opens++;
                self->conns.push_back(conn);
                if (self->on_open) {
                    self->on_open(conn);
                }
            };
            table.on_data = vkp_test_echo;
            table.on_close = [](vkp_conn *conn, void *user, vkp_close_reason, int) {
                Host *self = static_cast<Host *>(user);
                self->closes++;
                vkp_test_forget_conn(&self->conns, conn);
                if (self->on_close) {
                    self->on_close();
                }
            };
            return table;
        }();
        config.conn.ops = &ops;
        config.conn.user = this;
        config.on_refuse = [](void *user, int, vkp_refusal why) {
            static_cast<Host *>(user)->refused.push_back(why);
        };
        config.on_end = [](void *user) {
            Host *self = static_cast<Host *>(user);
            self->ends++;
            self->end_thread = std::this_thread::get_id();
            if (self->on_end) {
                self->on_end();
            }
        };
    }
    // Its connections must not tell it anything afterwards.
    ~Host()
    {
        vkp_test_close_conns(&conns);
        vkp_listener_unref(listener);
    }
    Host(const Host &) = delete;
    Host &operator=(const Host &) = delete;
    void hand_on()
    {
        config.on_fd = [](void *user, int fd, vkp_seat *seat) {
            static_cast<Host *>(user)->given.emplace_back(fd, seat);
        };
    }
    void open(vkp_loop *loop)
    {
        if (vkp_listener_open(loop, &config, &listener) != VKP_OK) {
            vkp_test_fail("no listener");
        }
    }
    void open(vkp_loop *loop, const std::string &address)
    {
        config.address = vkp_str_of(address.c_str());
        open(loop);
        config.address = vkp_str_of(nullptr);
    }
    void follow(vkp_loop *loop, vkp_socket *sock)
    {
        config.socket = sock;
        config.follow = true;
        open(loop);
    }
    void drop()
    {
        vkp_listener_unref(std::exchange(listener, nullptr));
    }
    vkp_listener_stats stats() const
    {
        return vkp_test_listener_stats_of(listener);
    }
};

} // namespace

// ---------------------------------------------------------------------------------------------
// Listeners that follow

TEST_CASE("listen: a listener that follows ends with the last client, and the file with it")
{
    VKP_TEST_ON_EVERY_BACKEND;
    vkp_test_loop loop(backend);
    const std::string address = vkp_test_fresh_address("f");
    const std::string path = address.substr(5);
    Registry registry;
    Host host;
    vkp_socket *sock = registry.socket(path);
    host.follow(loop, sock);
    CHECK(vkp_socket_get_ref_count(sock) == 1); // it holds none
    vkp_test_rounds(loop, 3);
    CHECK(host.ends == 0);
    Peer first = vkp_test_peer_to(address);
    CHECK(is_served(loop, first));
    CHECK(vkp_socket_get_ref_count(sock) == 2);
    SECTION("clients hold it when the program does not")
    {
        vkp_socket_unref(std::exchange(sock, nullptr));
        CHECK(registry.stats().references == 1);
        Peer second = vkp_test_peer_to(address);
        CHECK(is_served(loop, second));
        CHECK(registry.stats().references == 2);
        first.reset();
        vkp_test_run_until(loop, "the first to go", [&] { return host.closes == 1; });
        CHECK(is_served(loop, second));
        CHECK(vkp_test_exists(path.c_str()));
        second.reset();
    }
    SECTION("the program holds it when there are no clients")
    {
        first.reset();
        vkp_test_run_until(loop, "the client to go", [&] { return host.closes == 1; });
        vkp_test_rounds(loop, 3);
        CHECK(host.ends == 0);
        CHECK(vkp_socket_get_ref_count(sock) == 1);
        Peer next = vkp_test_peer_to(address);
        CHECK(is_served(loop, next));
        next.reset();
        vkp_test_run_until(loop, "the client to go", [&] { return host.closes == 2; });
        vkp_socket_unref(std::exchange(sock, nullptr));
        CHECK_FALSE(vkp_test_exists(path.c_str())); // at once
        CHECK(host.ends == 0);                      // in a round
    }
    SECTION("another thread lets it go last")
    {
        first.reset();
        vkp_test_run_until(loop, "the client to go", [&] { return host.closes == 1; });
        std::thread([&] { vkp_socket_unref(std::exchange(sock, nullptr)); }).join();
        CHECK_FALSE(vkp_test_exists(path.c_str()));
    }
    vkp_test_run_until(loop, "the end", [&] { return host.ends > 0; });
    vkp_test_rounds(loop, 3);
    CHECK(host.ends == 1);
    CHECK(host.end_thread == std::this_thread::get_id());
    CHECK_FALSE(vkp_test_exists(path.c_str()));
    CHECK_FALSE(vkp_test_exists((path + ".lock").c_str()));
    CHECK(refuses(address));
    CHECK(registry.stats().live == 0);
    CHECK(registry.stats().references == 0);
    CHECK(host.closes == host.opens);
    // The path is free; the old listener has nothing to do with who comes next.
    Host next;
    next.config.registry = registry;
    next.open(loop, address);
    Peer peer = vkp_test_peer_to(address);
    CHECK(is_served(loop, peer));
    host.drop();
    CHECK(is_served(loop, peer));
    CHECK(host.opens == host.closes);
}

TEST_CASE("listen: to follow there must be a socket, and one that lives")
{
    vkp_test_loop loop(&vkp_backend_null);
    const std::string address = vkp_test_fresh_address("f");
    Registry registry;
    Host host;
    vkp_socket *sock = registry.socket(address.substr(5));
    host.config.follow = true;
    host.config.registry = registry;
    for (const char *text : {address.c_str(), "tcp:127.0.0.1:0"}) {
        host.config.address = vkp_str_of(text);
        CHECK(vkp_listener_open(loop, &host.config, &host.listener) == VKP_ERR_INVALID);
    }
    host.config.address = vkp_str_of(nullptr);
    host.config.socket = sock;
    CHECK(vkp_registry_cleanup_all(registry) == 1);
    CHECK(vkp_listener_open(loop, &host.config, &host.listener) == VKP_ERR_CLOSED);
    host.config.follow = false;
    CHECK(vkp_listener_open(loop, &host.config, &host.listener) == VKP_ERR_CLOSED);
    CHECK(host.listener == nullptr);
    CHECK(vkp_socket_get_ref_count(sock) == 1);
    vkp_socket_unref(sock);
}

TEST_CASE("listen: a listener closed before is not told of its socket's end")
{
    vkp_test_loop loop(&vkp_backend_null);
    const std::string address = vkp_test_fresh_address("f");
    Registry registry;
    Host host;
    vkp_socket *sock = registry.socket(address.substr(5));
    host.follow(loop, sock);
    Peer peer = vkp_test_peer_to(address);
    CHECK(is_served(loop, peer));
    vkp_listener_close(host.listener);
    vkp_socket_unref(sock);
    CHECK(vkp_test_exists(address.c_str() + 5)); // its client is still there
    CHECK(is_served(loop, peer));
    peer.reset();
    vkp_test_run_until(loop, "the client to go", [&] { return host.closes == 1; });
    CHECK_FALSE(vkp_test_exists(address.c_str() + 5));
    vkp_test_rounds(loop, 3);
    CHECK(host.ends == 0);
}

TEST_CASE("listen: closed after its socket ended and before it was told")
{
    vkp_test_loop loop(&vkp_backend_null);
    const std::string address = vkp_test_fresh_address("f");
    Registry registry;
    Host host;
    vkp_socket *sock = registry.socket(address.substr(5));
    host.follow(loop, sock);
    const bool unref = GENERATE(false, true);
    vkp_socket_unref(sock);
    if (unref) {
        host.drop();
    } else {
        vkp_listener_close(host.listener);
    }
    vkp_test_rounds(loop, 3);
    CHECK(host.ends == 0);
}

TEST_CASE("listen: the loop closes before a listener was told of its socket's end")
{
    VKP_TEST_ON_EVERY_BACKEND;
    vkp_test_loop loop(backend);
    const std::string address = vkp_test_fresh_address("f");
    Registry registry;
    Host host;
    vkp_socket *sock = registry.socket(address.substr(5));
    host.follow(loop, sock);
    vkp_socket_unref(sock);
    loop.close();
    CHECK(host.ends == 1);
}

TEST_CASE("listen: with linger the socket waits for another client, so long and no longer")
{
    vkp_test_loop loop(&vkp_backend_null);
    const std::string address = vkp_test_fresh_address("f");
    vkp_registry_config config = {};
    config.loop = loop;
    config.linger_ms = 1000;
    config.env = &loop.test.env;
    {
        Registry registry(config);
        Host host;
        vkp_socket *sock = registry.socket(address.substr(5));
        host.follow(loop, sock);
        Peer first = vkp_test_peer_to(address);
        CHECK(is_served(loop, first));
        vkp_socket_unref(sock);
        for (int i = 1; i <= 3; i++) {
            first.reset();
            vkp_test_run_until(loop, "the client to go", [&] { return host.closes == i; });
            const uint64_t since = loop.now();
            while (loop.now() < since + 900 * vkp_test_ms) {
                loop.round(since + 900 * vkp_test_ms);
            }
            CHECK(vkp_test_exists(address.c_str() + 5));
            CHECK(registry.stats().live == 1);
            CHECK(registry.stats().references == 0);
            first = vkp_test_peer_to(address);
            CHECK(is_served(loop, first));
            CHECK(registry.stats().references == 1);
            CHECK(registry.stats().revived == static_cast<uint64_t>(i));
        }
        // While there is a client no time is enough.
        const uint64_t since = loop.now();
        while (loop.now() < since + 5000 * vkp_test_ms) {
            loop.round(since + 5000 * vkp_test_ms);
        }
        CHECK(host.ends == 0);
        first.reset();
        vkp_test_run_until(loop, "the client to go", [&] { return host.closes == 4; });
        const uint64_t left = loop.now();
        vkp_test_run_until(loop, "the end", [&] { return host.ends == 1; });
        CHECK(loop.now() >= left + 1000 * vkp_test_ms);
        CHECK(loop.now() <= left + 1001 * vkp_test_ms);
        CHECK_FALSE(vkp_test_exists(address.c_str() + 5));
        CHECK(registry.stats().live == 0);
        vkp_test_rounds(loop, 3);
        CHECK(host.ends == 1);
    }
}

// The last handle, given back by who judges the client that would be the next to hold it.
static vkp_socket *last_handle;

TEST_CASE("listen: a client that comes just after the last reference went is told so")
{
    VKP_TEST_ON_EVERY_BACKEND;
    vkp_test_loop loop(backend);
    const std::string address = vkp_test_fresh_address("f");
    Registry registry;
    Host host;
    last_handle = registry.socket(address.substr(5));
    vkp_gate_config config = {};
    config.allow = [](void *, const vkp_peer *) {
        vkp_socket_unref(std::exchange(last_handle, nullptr));
        return true;
    };
    config.max_clients = 1;
    vkp_gate *gate = nullptr;
    REQUIRE(vkp_gate_open(&config, &gate) == VKP_OK);
    host.config.gate = gate;
    host.follow(loop, last_handle);
    Peer late = vkp_test_peer_to(address);
    CHECK(vkp_test_frame_on(loop, late.get()).empty());
    CHECK_FALSE(vkp_test_exists(address.c_str() + 5));
    vkp_test_run_until(loop, "the end", [&] { return host.ends == 1; });
    CHECK(host.refused == std::vector<vkp_refusal>{VKP_REFUSAL_ENDED});
    CHECK(host.stats().refused[VKP_REFUSAL_ENDED] == 1);
    CHECK(host.stats().accepted == 0);
    CHECK(host.opens == 0);
    vkp_gate_stats stats;
    vkp_gate_get_stats(gate, &stats);
    CHECK(stats.clients == 0);
    CHECK(stats.refused[VKP_REFUSAL_ENDED] == 1);
    vkp_gate_unref(gate);
}

TEST_CASE("listen: a client that would be one reference too many is refused")
{
    vkp_test_loop loop(&vkp_backend_null);
    const std::string address = vkp_test_fresh_address("f");
    vkp_registry_config config = {};
    config.max_references = 2;
    Registry registry(config);
    Host host;
    vkp_socket *sock = registry.socket(address.substr(5));
    host.follow(loop, sock);
    Peer first = vkp_test_peer_to(address);
    CHECK(is_served(loop, first));
    Peer second = vkp_test_peer_to(address);
    CHECK(vkp_test_frame_on(loop, second.get()).empty());
    CHECK(host.refused == std::vector<vkp_refusal>{VKP_REFUSAL_FULL});
    CHECK(is_served(loop, first));
    first.reset();
    vkp_test_run_until(loop, "the client to go", [&] { return host.closes == 1; });
    Peer third = vkp_test_peer_to(address);
    CHECK(is_served(loop, third));
    third.reset();
    vkp_socket_unref(sock);
    vkp_test_run_until(loop, "the end", [&] { return host.ends == 1; });
}

TEST_CASE("listen: a seat handed on holds the socket as its client does")
{
    VKP_TEST_ON_EVERY_BACKEND;
    vkp_test_loop loop(backend);
    const std::string address = vkp_test_fresh_address("f");
    Registry registry;
    Host host;
    host.hand_on();
    vkp_socket *sock = registry.socket(address.substr(5));
    host.follow(loop, sock);
    Peer peers[2] = {vkp_test_peer_to(address), vkp_test_peer_to(address)};
    vkp_test_run_until(loop, "the descriptors", [&] { return host.given.size() == 2; });
    CHECK(vkp_socket_get_ref_count(sock) == 3);
    vkp_socket_unref(sock);
    close(host.given[0].first);
    close(host.given[1].first);
    vkp_seat_unref(host.given[0].second);
    CHECK(vkp_test_exists(address.c_str() + 5));
    const bool early = GENERATE(false, true);
    if (early) {
        host.drop(); // the seat outlives it
    }
    CHECK(vkp_test_exists(address.c_str() + 5));
    std::thread([&] { vkp_seat_unref(host.given[1].second); }).join();
    CHECK_FALSE(vkp_test_exists(address.c_str() + 5));
    if (!early) {
        vkp_test_run_until(loop, "the end", [&] { return host.ends == 1; });
    }
    vkp_test_rounds(loop, 3);
    CHECK(host.ends == (early ? 0 : 1));
}

// ---------------------------------------------------------------------------------------------
// Descriptors, several loops

// The descriptor of the last socket that began to listen, and how often files were looked at.
static std::atomic<int> listening_fd;
static std::atomic<int> looks;

static vkp_sys noting_sys()
{
    vkp_sys sys = *vkp_sys_get_default();
    sys.listen = [](int fd, int backlog) {
        listening_fd = fd;
        return vkp_sys_get_default()->listen(fd, backlog);
    };
    sys.identify = [](const char *path, vkp_file_id *id) {
        looks++;
        return vkp_sys_get_default()->identify(path, id);
    };
    return sys;
}

TEST_CASE("listen: a descriptor's number is not free before the loop let go of it")
{
    VKP_TEST_ON_EVERY_BACKEND;
    const vkp_sys sys = noting_sys();
    vkp_test_loop loop(backend, &sys);
    const std::string address = vkp_test_fresh_address("f");
    vkp_registry_config config = {};
    config.env = &loop.test.env;
    Registry registry(config);
    Host host;
    vkp_socket *sock = registry.socket(address.substr(5));
    const int fd = listening_fd;
    const bool follow = GENERATE(true, false);
    Peer waits; // makes the descriptor ready, so that the loop has an event for it
    if (follow) {
        host.follow(loop, sock);
        waits = vkp_test_peer_to(address);
        vkp_socket_unref(sock);
    } else {
        host.config.socket = sock;
        host.open(loop);
        waits = vkp_test_peer_to(address);
        CHECK(vkp_registry_cleanup_all(registry) == 1);
        vkp_socket_unref(sock);
    }
    CHECK_FALSE(vkp_test_exists(address.c_str() + 5));
    CHECK(fcntl(fd, F_GETFD) >= 0); // else the next one to open anything would be watched for it
    vkp_test_run_until(loop, "the end", [&] { return host.ends == 1; });
    CHECK(fcntl(fd, F_GETFD) == -1);
    if (follow) { // else it may have been accepted just before
        CHECK(host.opens == 0);
        CHECK(vkp_test_frame_on(loop, waits.get()).empty());
    }
}

TEST_CASE("listen: threads: several loops accept at one socket, until each is told of its end")
{
    constexpr size_t count = 3;
    const vkp_backend *backend = GENERATE(from_range([] {
        std::vector<const vkp_backend *> real = vkp_test_every_backend();
        real.pop_back(); // time stands still in vkp_backend_null
        return real;
    }()));
    INFO("backend " << backend->name);
    std::vector<std::unique_ptr<vkp_test_loop>> loops;
    for (size_t i = 0; i < count; i++) {
        loops.push_back(std::make_unique<vkp_test_loop>(backend));
    }
    const std::string address = vkp_test_fresh_address("f");
    {
        Registry registry;
        vkp_socket *sock = registry.socket(address.substr(5));
        Host hosts[count];
        std::vector<std::unique_ptr<vkp_test_loop_thread>> threads;
        for (size_t i = 0; i < count; i++) {
            hosts[i].follow(*loops[i], sock);
            threads.push_back(std::make_unique<vkp_test_loop_thread>(*loops[i]));
        }
        auto served = [&] { return hosts[0].opens + hosts[1].opens + hosts[2].opens; };
        std::vector<Peer> peers;
        for (int i = 0; i < 200; i++) {
            peers.push_back(vkp_test_peer_to(address));
            REQUIRE(vkp_test_peer_send_text(peers.back().get(), "+echo\r\n"));
        }
        for (const Peer &peer : peers) {
            REQUIRE(vkp_test_frame(peer.get()) == "+echo\r\n");
        }
        CHECK(served() == 200);
        CHECK(vkp_socket_get_ref_count(sock) == 201);
        const int end = GENERATE(0, 1, 2);
        INFO("end " << end);
        if (end == 0) { // the last client of all
            vkp_socket_unref(std::exchange(sock, nullptr));
            CHECK(vkp_test_exists(address.c_str() + 5));
            peers.clear();
        } else if (end == 1) { // the last handle
            peers.clear();
            vkp_test_wait_until("the clients to go",
                                [&] { return vkp_socket_get_ref_count(sock) == 1; });
            vkp_socket_unref(std::exchange(sock, nullptr));
            CHECK_FALSE(vkp_test_exists(address.c_str() + 5));
        } else { // a cleanup, under clients who go on
            CHECK(vkp_registry_cleanup_all(registry) == 1);
            CHECK(refuses(address));
        }
        vkp_test_wait_until("the ends", [&] {
            return hosts[0].ends == 1 && hosts[1].ends == 1 && hosts[2].ends == 1;
        });
        CHECK_FALSE(vkp_test_exists(address.c_str() + 5));
        for (const Peer &peer : peers) {
            REQUIRE(vkp_test_peer_send_text(peer.get(), "+on\r\n"));
            REQUIRE(vkp_test_frame(peer.get()) == "+on\r\n");
        }
        CHECK(served() == 200);
        peers.clear();
        vkp_socket_unref(sock);
        threads.clear();
        CHECK(registry.stats().live == 0);
        for (Host &host : hosts) {
            CHECK(host.ends == 1);
        }
    }
    while (!loops.empty()) {
        loops.pop_back();
    }
}

TEST_CASE("listen: clients of a socket that was cleaned up have no part in the one that follows")
{
    vkp_test_loop loop(&vkp_backend_null);
    const std::string address = vkp_test_fresh_address("f");
    Registry registry;
    Host old;
    vkp_socket *sock = registry.socket(address.substr(5));
    old.follow(loop, sock);
    Peer of_old = vkp_test_peer_to(address);
    CHECK(is_served(loop, of_old));
    CHECK(vkp_registry_cleanup_all(registry) == 1);
    vkp_socket *heir = registry.socket(address.substr(5));
    Host host;
    host.follow(loop, heir);
    Peer of_heir = vkp_test_peer_to(address);
    CHECK(is_served(loop, of_heir));
    vkp_socket_unref(heir);
    // All that held the old one goes; the new one has its own.
    vkp_socket_unref(sock);
    of_old.reset();
    vkp_test_run_until(loop, "the old client to go", [&] { return old.closes == 1; });
    vkp_test_rounds(loop, 3);
    CHECK(old.ends == 1);
    CHECK(host.ends == 0);
    CHECK(vkp_test_exists(address.c_str() + 5));
    Peer another = vkp_test_peer_to(address);
    CHECK(is_served(loop, another));
    CHECK(registry.stats().references == 2);
    another.reset();
    of_heir.reset();
    vkp_test_run_until(loop, "the end", [&] { return host.ends == 1; });
    CHECK_FALSE(vkp_test_exists(address.c_str() + 5));
}

TEST_CASE("listen: a file taken away is bound again under its listeners")
{
    VKP_TEST_ON_EVERY_BACKEND;
    const vkp_sys sys = noting_sys();
    vkp_test_loop loop(backend, &sys);
    vkp_test_loop elsewhere(backend, &sys);
    const std::string address = vkp_test_fresh_address("f");
    const char *path = address.c_str() + 5;
    struct Told {
        std::vector<std::pair<vkp_socket_event, vkp_status>> events;
    } told;
    vkp_registry_config config = {};
    config.loop = loop;
    config.check_ms = 20;
    config.rebind = true;
    config.user = &told;
    config.on_event = [](void *user, vkp_socket *, vkp_socket_event event, vkp_status status) {
        static_cast<Told *>(user)->events.emplace_back(event, status);
    };
    config.env = &loop.test.env;
    Registry registry(config);
    const int fds = vkp_test_fd_count();
    Host host;
    Host second;
    host.config.registry = registry;
    host.open(loop, address);
    second.config.registry = registry;
    second.open(elsewhere, address);
    const int old_fd = listening_fd;
    const int fds_open = vkp_test_fd_count();
    Peer steady = vkp_test_peer_to(address);
    CHECK(is_served(loop, steady));
    REQUIRE(unlink(path) == 0);
    SECTION("gone")
    {
        vkp_test_run_until(loop, "the file", [&] { return vkp_test_exists(path); });
        REQUIRE(told.events.size() == 2);
        CHECK(told.events[0].first == VKP_SOCKET_LOST);
        CHECK(told.events[1].first == VKP_SOCKET_REBOUND);
        CHECK(registry.stats().lost == 1);
    }
    SECTION("another file in its place")
    {
        std::ofstream(path) << "precious";
        vkp_test_run_until(loop, "the first try", [&] { return told.events.size() >= 2; });
        const int before = looks;
        vkp_test_run_until(loop, "more tries", [&] { return looks > before + 10; });
        REQUIRE(told.events.size() == 2); // told once, not at each try
        CHECK(told.events[0].first == VKP_SOCKET_LOST);
        CHECK(told.events[1].first == VKP_SOCKET_BLOCKED);
        CHECK(told.events[1].second == VKP_ERR_EXISTS);
        std::string word;
        std::ifstream(path) >> word;
        CHECK(word == "precious");
        CHECK(is_served(loop, steady));
        REQUIRE(unlink(path) == 0);
        vkp_test_run_until(loop, "the file", [&] { return vkp_test_exists(path); });
        REQUIRE(told.events.size() == 3);
        CHECK(told.events[2].first == VKP_SOCKET_REBOUND);
    }
    CHECK(registry.stats().rebound == 1);
    CHECK(registry.stats().live == 1);
    // The old descriptor is closed when the last listener left it: nothing piles up.
    vkp_test_rounds(elsewhere, 3);
    vkp_test_rounds(loop, 3);
    if (listening_fd != old_fd) {
        CHECK(fcntl(old_fd, F_GETFD) == -1);
    }
    // Whoever was there stays; who comes is served, by either.
    CHECK(is_served(loop, steady));
    Peer next = vkp_test_peer_to(address);
    CHECK(is_served(loop, next));
    Peer other = vkp_test_peer_to(address);
    CHECK(is_served(elsewhere, other));
    CHECK(host.ends + second.ends == 0);
    CHECK(vkp_test_fd_count() == fds_open + 2 * 3);
    steady.reset();
    next.reset();
    other.reset();
    vkp_test_run_until(loop, "the clients to go", [&] { return host.closes == 2; });
    vkp_test_run_until(elsewhere, "the client to go", [&] { return second.closes == 1; });
    host.drop();
    CHECK(vkp_test_exists(path));
    second.drop();
    CHECK_FALSE(vkp_test_exists(path));
    CHECK(vkp_test_fd_count() == fds);
}

// ---------------------------------------------------------------------------------------------
// Started from another thread

// What on_start was given.
struct Start {
    int calls = 0;
    vkp_listening result = {};
    std::string address;
    std::thread::id thread;
    std::function<void(const vkp_listening &)> hook;

    // Set by start(): the listener's user is the host.
    static void on_start(void *user, const vkp_listening *result)
    {
        Start *self = static_cast<Start *>(static_cast<Host *>(user)->start);
        self->calls++;
        self->result = *result;
        self->address = result->address != nullptr ? result->address : "";
        self->thread = std::this_thread::get_id();
        if (self->hook) {
            self->hook(*result);
        }
    }
};

// It keeps the socket of its address, follows it, or follows a socket that is there.
enum class Form { plain, reference, handle };

static std::ostream &operator<<(std::ostream &out, Form form)
{
    static const char *const names[] = {"address", "address, follow", "socket, follow"};
    return out << names[static_cast<int>(form)];
}

static vkp_listener_config config_of(Form form, const Host &host, const char *address,
                                     vkp_socket *sock)
{
    vkp_listener_config config = host.config;
    config.address = vkp_str_of(form == Form::handle ? nullptr : address);
    config.socket = form == Form::handle ? sock : nullptr;
    config.follow = form != Form::plain;
    config.on_start = Start::on_start;
    return config;
}

// The call, from a thread that is not the loop's. Nothing that it borrows outlives it.
static vkp_status start(Form form, vkp_loop *loop, Host &host, const std::string &path,
                        vkp_socket *sock, Start *told)
{
    vkp_status status = VKP_ERR_INVALID;
    host.start = told;
    std::thread([&] {
        std::string address = "unix:" + path;
        auto copy =
            std::make_unique<vkp_listener_config>(config_of(form, host, address.c_str(), sock));
        status = vkp_listener_open(loop, copy.get(), nullptr);
        address.assign(address.size(), '#');
        *copy = vkp_listener_config();
    }).join();
    return status;
}

TEST_CASE("listen: started from another thread: by path, with a reference, on a handle")
{
    VKP_TEST_ON_EVERY_BACKEND;
    const Form form = GENERATE(Form::plain, Form::reference, Form::handle);
    INFO(form);
    vkp_test_loop loop(backend);
    const std::string address = vkp_test_fresh_address("s");
    const std::string path = address.substr(5);
    Registry registry;
    Host host;
    Start told;
    vkp_socket *sock = form == Form::handle ? registry.socket(path) : nullptr;
    host.config.registry = form == Form::handle ? nullptr : static_cast<vkp_registry *>(registry);
    REQUIRE(start(form, loop, host, path, sock, &told) == VKP_OK);
    CHECK(told.calls == 0);
    vkp_test_run_until(loop, "the start", [&] { return told.calls == 1; });
    CHECK(told.thread == std::this_thread::get_id());
    CHECK(told.result.status == VKP_OK);
    CHECK(told.address == address);
    REQUIRE(told.result.listener != nullptr);
    CHECK(vkp_listener_get_address(told.result.listener) == address);
    CHECK(registry.stats().references == 1);
    if (form == Form::reference) {
        REQUIRE(told.result.socket != nullptr);
        CHECK(std::string(vkp_socket_get_path(told.result.socket)) == path);
        sock = told.result.socket;
    } else {
        CHECK(told.result.socket == nullptr);
    }
    vkp_test_rounds(loop, 3);
    Peer peer = vkp_test_peer_to(address);
    CHECK(is_served(loop, peer));
    const bool follows = form != Form::plain;
    CHECK(registry.stats().references == (follows ? 2 : 1));
    SECTION("it lives on without clients as long as somebody holds the socket")
    {
        peer.reset();
        vkp_test_run_until(loop, "the client to go", [&] { return host.closes == 1; });
        vkp_test_rounds(loop, 3);
        CHECK(host.ends == 0);
        Peer next = vkp_test_peer_to(address);
        CHECK(is_served(loop, next));
        vkp_socket_unref(std::exchange(sock, nullptr));
        CHECK(is_served(loop, next));
        next.reset();
        vkp_test_run_until(loop, "the client to go", [&] { return host.closes == 2; });
        if (follows) {
            vkp_test_run_until(loop, "the end", [&] { return host.ends == 1; });
        } else {
            vkp_test_rounds(loop, 3);
            CHECK(host.ends == 0);
            vkp_listener_close(told.result.listener);
        }
    }
    SECTION("closed: its clients stay")
    {
        vkp_listener_close(told.result.listener);
        vkp_socket_unref(std::exchange(sock, nullptr));
        vkp_test_rounds(loop, 3);
        CHECK(is_served(loop, peer));
        CHECK(host.ends == 0);
        peer.reset();
        vkp_test_run_until(loop, "the client to go", [&] { return host.closes == 1; });
        CHECK(host.ends == 0);
    }
    SECTION("the loop closes")
    {
        loop.close();
        CHECK(host.ends == 1);
        CHECK(host.closes == 1);
        CHECK(vkp_test_exists(path.c_str()) == follows);
        vkp_socket_unref(std::exchange(sock, nullptr));
    }
    CHECK_FALSE(vkp_test_exists(path.c_str()));
    CHECK(registry.stats().live == 0);
    CHECK(told.calls == 1);
}

TEST_CASE("listen: without a path the socket has a name of its own")
{
    const Form form = GENERATE(Form::plain, Form::reference);
    const bool own_registry = GENERATE(true, false);
    INFO(form << (own_registry ? ", registry of its own" : ""));
    vkp_test_loop loop(&vkp_backend_null);
    REQUIRE(setenv("XDG_RUNTIME_DIR", vkp_test_dir(), 1) == 0);
    vkp_registry_config config = {};
    config.folder = vkp_str_of(vkp_test_dir());
    Registry registry(config);
    std::set<std::string> paths;
    {
        Host hosts[3];
        Start told[3];
        for (int i = 0; i < 3; i++) {
            hosts[i].config.registry =
                own_registry ? nullptr : static_cast<vkp_registry *>(registry);
            REQUIRE(start(form, loop, hosts[i], "", nullptr, &told[i]) == VKP_OK);
        }
        for (int i = 0; i < 3; i++) {
            vkp_test_run_until(loop, "the start", [&] { return told[i].calls == 1; });
            REQUIRE(told[i].result.status == VKP_OK);
            REQUIRE(told[i].address.find("unix:") == 0);
            const std::string path = told[i].address.substr(5);
            CHECK(paths.insert(path).second);
            CHECK(path.find(vkp_test_dir()) == 0);
            CHECK(vkp_test_exists(path.c_str()));
            Peer peer = vkp_test_peer_to(told[i].address);
            CHECK(is_served(loop, peer));
            peer.reset();
            vkp_test_run_until(loop, "the client to go", [&] { return hosts[i].closes == 1; });
            if (form == Form::plain) {
                vkp_listener_close(told[i].result.listener);
            } else {
                vkp_socket_unref(told[i].result.socket);
                vkp_test_run_until(loop, "the end", [&] { return hosts[i].ends == 1; });
            }
        }
    }
    for (const std::string &path : paths) {
        CHECK_FALSE(vkp_test_exists(path.c_str()));
    }
    REQUIRE(unsetenv("XDG_RUNTIME_DIR") == 0);
}

TEST_CASE("listen: what does not begin tells why, and leaves nothing")
{
    const Form form = GENERATE(Form::plain, Form::reference);
    INFO(form);
    vkp_test_loop loop(&vkp_backend_null);
    Registry mine;
    Registry others;
    const std::string taken = vkp_test_fresh_path("s");
    vkp_socket *sock = others.socket(taken);
    const std::string file = vkp_test_fresh_path("s");
    std::ofstream(file.c_str()) << "precious";
    struct Case {
        std::string path;
        vkp_status status;
        int error;
    };
    const Case cases[] = {
        {taken, VKP_ERR_IN_USE, 0},
        {file, VKP_ERR_EXISTS, 0},
        {std::string(vkp_test_dir()) + "/nowhere/s", VKP_ERR_SYS, ENOENT},
        {"/" + std::string(200, 'p'), VKP_ERR_LIMIT, 0},
        {std::string(vkp_test_dir()) + "/../s", VKP_ERR_INVALID, 0},
    };
    for (const Case &each : cases) {
        INFO("path " << each.path);
        Host host;
        Start told;
        host.config.registry = mine;
        const int fds = vkp_test_fd_count();
        const vkp_status now = start(form, loop, host, each.path, nullptr, &told);
        if (now == VKP_OK) { // told in one way or in the other, never in both
            vkp_test_run_until(loop, "the answer", [&] { return told.calls == 1; });
            CHECK(told.result.status == each.status);
            CHECK(told.result.sys_error == each.error);
            CHECK(told.result.address == nullptr);
            CHECK(told.result.socket == nullptr);
            CHECK(told.result.listener == nullptr);
        } else {
            CHECK(now == each.status);
            vkp_test_rounds(loop, 3);
            CHECK(told.calls == 0);
        }
        CHECK(vkp_test_fd_count() == fds);
        CHECK(mine.stats().live == 0);
    }
    vkp_socket_unref(sock);
}

TEST_CASE("listen: calls that cannot be are refused at once")
{
    vkp_test_loop loop(&vkp_backend_null);
    Registry registry;
    Start told;
    const std::string path = vkp_test_fresh_path("s");
    vkp_socket *sock = registry.socket(vkp_test_fresh_path("s"));
    const std::string address = "unix:" + path;
    Host host;
    host.start = &told;
    for (Form form : {Form::plain, Form::reference, Form::handle}) {
        INFO(form);
        const vkp_listener_config good = config_of(form, host, address.c_str(), sock);
        vkp_listener_config config = good;
        vkp_listener *listener = nullptr;
        CHECK(vkp_listener_open(nullptr, &good, nullptr) == VKP_ERR_INVALID);
        CHECK(vkp_listener_open(loop, nullptr, nullptr) == VKP_ERR_INVALID);
        CHECK(vkp_listener_open(loop, &good, &listener) == VKP_ERR_INVALID);
        config.on_start = nullptr;
        CHECK(vkp_listener_open(loop, &config, nullptr) == VKP_ERR_INVALID);
        if (form == Form::reference) { // nobody is there to get the reference
            CHECK(vkp_listener_open(loop, &config, &listener) == VKP_ERR_INVALID);
        }
        config = good;
        config.address = vkp_str_of(address.c_str());
        config.socket = sock;
        CHECK(vkp_listener_open(loop, &config, nullptr) == VKP_ERR_INVALID);
        config.address = vkp_str_of(nullptr);
        config.socket = nullptr;
        CHECK(vkp_listener_open(loop, &config, nullptr) == VKP_ERR_INVALID);
        config = good;
        config.conn.ops = nullptr;
        CHECK(vkp_listener_open(loop, &config, nullptr) == VKP_ERR_INVALID);
        CHECK(listener == nullptr);
    }
    vkp_listener_config tcp = config_of(Form::reference, host, "tcp:127.0.0.1:0", nullptr);
    CHECK(vkp_listener_open(loop, &tcp, nullptr) == VKP_ERR_INVALID);
    vkp_test_rounds(loop, 3);
    CHECK(told.calls == 0);
    CHECK(vkp_socket_get_ref_count(sock) == 1);
    vkp_socket_unref(sock);
    CHECK_FALSE(vkp_test_exists(path.c_str()));
}

TEST_CASE("listen: the loop closes before it came to it, or was closed before")
{
    const Form form = GENERATE(Form::plain, Form::reference, Form::handle);
    INFO(form);
    vkp_test_loop loop(&vkp_backend_null);
    vkp_loop *kept = vkp_loop_ref(loop);
    const std::string path = vkp_test_fresh_path("s");
    Registry registry;
    Host host;
    Start told;
    vkp_socket *sock = form == Form::handle ? registry.socket(path) : nullptr;
    host.config.registry = form == Form::handle ? nullptr : static_cast<vkp_registry *>(registry);
    REQUIRE(start(form, loop, host, path, sock, &told) == VKP_OK);
    told.hook = [](const vkp_listening &result) { vkp_socket_unref(result.socket); };
    loop.close();
    CHECK(told.calls == 1);
    // The close runs what was posted: what began there ended there, and both were told.
    CHECK((told.result.status == VKP_OK || told.result.status == VKP_ERR_CLOSED));
    CHECK(host.ends == (told.result.status == VKP_OK ? 1 : 0));
    CHECK(vkp_test_exists(path.c_str()) == (form == Form::handle));
    CHECK(start(form, kept, host, path, sock, &told) == VKP_ERR_CLOSED);
    CHECK(told.calls == 1);
    CHECK(registry.stats().references == (form == Form::handle ? 1 : 0));
    vkp_socket_unref(sock);
    CHECK_FALSE(vkp_test_exists(path.c_str()));
    vkp_loop_unref(kept);
}

TEST_CASE("listen: on_start may end what just began")
{
    VKP_TEST_ON_EVERY_BACKEND;
    const Form form = GENERATE(Form::plain, Form::reference, Form::handle);
    INFO(form);
    vkp_test_loop loop(backend);
    const std::string path = vkp_test_fresh_path("s");
    Registry registry;
    Host host;
    Start told;
    vkp_socket *sock = form == Form::handle ? registry.socket(path) : nullptr;
    host.config.registry = form == Form::handle ? nullptr : static_cast<vkp_registry *>(registry);
    SECTION("by its close")
    {
        told.hook = [&](const vkp_listening &result) {
            vkp_listener_close(result.listener);
            vkp_socket_unref(result.socket);
        };
        REQUIRE(start(form, loop, host, path, sock, &told) == VKP_OK);
        vkp_test_run_until(loop, "the start", [&] { return told.calls == 1; });
        vkp_socket_unref(sock);
        CHECK_FALSE(vkp_test_exists(path.c_str()));
        vkp_test_rounds(loop, 3);
        CHECK(host.ends == 0);
    }
    SECTION("by letting go of the last reference")
    {
        told.hook = [&](const vkp_listening &result) {
            vkp_socket_unref(result.socket);
            vkp_socket_unref(sock);
            if (form == Form::plain) { // it holds one of its own
                CHECK(vkp_registry_cleanup_all(registry) == 1);
            }
        };
        REQUIRE(start(form, loop, host, path, sock, &told) == VKP_OK);
        vkp_test_run_until(loop, "the end", [&] { return host.ends == 1; });
        CHECK_FALSE(vkp_test_exists(path.c_str()));
        vkp_test_rounds(loop, 3);
        CHECK(host.ends == 1);
    }
    CHECK(told.calls == 1);
    CHECK(registry.stats().live == 0);
}

TEST_CASE("listen: what the call names may be let go of as soon as it returned")
{
    const Form form = GENERATE(Form::plain, Form::reference, Form::handle);
    INFO(form);
    vkp_test_loop loop(&vkp_backend_null);
    const std::string path = vkp_test_fresh_path("s");
    Host host;
    Start told;
    size_t admitted = 0;
    {
        auto registry = std::make_unique<Registry>();
        vkp_gate_config config = {};
        config.max_clients = 1;
        config.env = &loop.test.env;
        vkp_gate *gate = nullptr;
        REQUIRE(vkp_gate_open(&config, &gate) == VKP_OK);
        host.config.gate = gate;
        vkp_socket *sock = form == Form::handle ? registry->socket(path) : nullptr;
        vkp_weak_socket weak = vkp_weak_socket();
        if (form == Form::handle) {
            weak = vkp_socket_downgrade(sock);
        } else {
            host.config.registry = *registry;
        }
        vkp_socket *held = nullptr;
        told.hook = [&](const vkp_listening &result) {
            // Alive until here at least; who wants it longer takes a reference.
            held = result.socket;
            if (form == Form::handle && vkp_socket_upgrade(&weak, &held) != VKP_OK) {
                vkp_test_fail("it ended before on_start");
            }
        };
        REQUIRE(start(form, loop, host, path, sock, &told) == VKP_OK);
        vkp_gate_unref(gate);
        vkp_socket_unref(sock);
        if (form != Form::handle) { // a weak handle needs its registry
            registry.reset();
        }
        vkp_test_run_until(loop, "the start", [&] { return told.calls == 1; });
        REQUIRE(told.result.status == VKP_OK);
        Peer first = vkp_test_peer_to("unix:" + path);
        CHECK(is_served(loop, first));
        Peer second = vkp_test_peer_to("unix:" + path);
        CHECK(vkp_test_frame_on(loop, second.get()).empty());
        CHECK(host.refused == std::vector<vkp_refusal>{VKP_REFUSAL_FULL});
        admitted++;
        first.reset();
        vkp_test_run_until(loop, "the client to go", [&] { return host.closes == 1; });
        vkp_socket_unref(held);
        if (form == Form::plain) {
            vkp_listener_close(told.result.listener);
        } else {
            vkp_test_run_until(loop, "the end", [&] { return host.ends == 1; });
        }
    }
    CHECK(admitted == 1);
    CHECK_FALSE(vkp_test_exists(path.c_str()));
}

TEST_CASE("listen: every allocation of a start may fail: told once, and nothing is left")
{
    const Form form = GENERATE(Form::plain, Form::reference, Form::handle);
    const bool own_registry = GENERATE(false, true);
    const vkp_test_fault fault = GENERATE(VKP_TEST_FAULT_ONCE, VKP_TEST_FAULT_FROM);
    INFO(form << ", fault " << fault);
    vkp_test_loop loop(&vkp_backend_null);
    vkp_registry_config config = {};
    config.env = &loop.test.env;
    Registry registry(config);
    bool done = false;
    uint64_t k = 1;
    uint64_t at_once = 0;
    uint64_t later = 0;
    for (; !done; k++) {
        INFO("allocation " << k);
        const std::string path = vkp_test_fresh_path("s");
        Host host;
        Start told;
        vkp_socket *sock = form == Form::handle ? registry.socket(path) : nullptr;
        host.config.registry =
            own_registry || form == Form::handle ? nullptr : static_cast<vkp_registry *>(registry);
        const int fds = vkp_test_fd_count();
        vkp_test_env_fault(&loop.test, fault, k);
        const vkp_status now = start(form, loop, host, path, sock, &told);
        vkp_test_rounds(loop, 3);
        vkp_test_env_fault(&loop.test, VKP_TEST_FAULT_NONE, 0);
        if (now != VKP_OK) {
            CHECK(now == VKP_ERR_NOMEM);
            CHECK(told.calls == 0);
            at_once++;
        } else {
            REQUIRE(told.calls == 1);
            done = told.result.status == VKP_OK;
            if (!done) {
                CHECK(told.result.status == VKP_ERR_NOMEM);
                CHECK(told.result.listener == nullptr);
                later++;
            }
        }
        if (done) {
            Peer peer = vkp_test_peer_to("unix:" + path);
            CHECK(is_served(loop, peer));
            peer.reset();
            vkp_test_run_until(loop, "the client to go", [&] { return host.closes == 1; });
            vkp_socket_unref(told.result.socket);
            vkp_listener_close(told.result.listener);
        } else {
            CHECK(vkp_test_fd_count() == fds);
            CHECK(vkp_test_exists(path.c_str()) == (form == Form::handle));
        }
        vkp_socket_unref(sock);
        CHECK_FALSE(vkp_test_exists(path.c_str()));
    }
    CHECK(at_once > 0);
    CHECK(later > 0);
}

TEST_CASE("listen: threads: many start at once on a loop that runs")
{
    constexpr size_t starts = 8;
    constexpr size_t turns = 25;
    vkp_test_loop loop;
    vkp_registry_config config = {};
    config.folder = vkp_str_of(vkp_test_dir());
    {
        Registry registry(config);
        Host hosts[starts];
        std::atomic<size_t> begun{0};
        std::atomic<size_t> wrong{0};
        {
            vkp_test_loop_thread running(loop);
            std::vector<std::thread> threads;
            for (size_t i = 0; i < starts; i++) {
                hosts[i].config.registry = registry;
                threads.emplace_back([&, i] {
                    for (size_t turn = 0; turn < turns; turn++) {
                        struct Told {
                            std::atomic<vkp_socket *> sock;
                            std::atomic<bool> done;
                        } told = {{nullptr}, {false}};
                        vkp_listener_config config =
                            config_of(Form::reference, hosts[i], "unix:", nullptr);
                        hosts[i].start = &told;
                        config.on_start = [](void *user, const vkp_listening *result) {
                            Told *self = static_cast<Told *>(static_cast<Host *>(user)->start);
                            self->sock = result->socket;
                            self->done = true;
                        };
                        const vkp_status status = vkp_listener_open(loop, &config, nullptr);
                        if (status != VKP_OK) {
                            wrong++;
                            continue;
                        }
                        vkp_test_wait_until("a start", [&] { return told.done.load(); });
                        vkp_socket *sock = told.sock;
                        if (sock == nullptr) {
                            wrong++;
                            continue;
                        }
                        begun++;
                        const std::string path = vkp_socket_get_path(sock);
                        {
                            Peer peer = vkp_test_peer_to("unix:" + path);
                            wrong += vkp_test_peer_send_text(peer.get(), "+echo\r\n") &&
                                             vkp_test_frame(peer.get()) == "+echo\r\n"
                                         ? 0
                                         : 1;
                        }
                        vkp_socket_unref(sock);
                        vkp_test_wait_until(
                            "its end", [&] { return hosts[i].ends == static_cast<int>(turn) + 1; });
                        wrong += vkp_test_exists(path.c_str()) ? 1 : 0;
                    }
                });
            }
            for (std::thread &thread : threads) {
                thread.join();
            }
        }
        CHECK(wrong == 0);
        CHECK(begun == starts * turns);
        CHECK(registry.stats().created == starts * turns);
        CHECK(registry.stats().live == 0);
    }
}

// ---------------------------------------------------------------------------------------------
// Shutting down in good order

struct Ends {
    int count = 0;
    std::function<void()> hook;

    static void on_end(void *user)
    {
        Ends *self = static_cast<Ends *>(user);
        self->count++;
        if (self->hook) {
            self->hook();
        }
    }
};

static const vkp_bytes k_notice = vkp_bytes_static("+bye\r\n", 6);

// All frames until the end of the stream.
static Strings hear_out(vkp_loop *loop, const Peer &peer)
{
    Strings frames;
    for (std::string frame = vkp_test_frame_on(loop, peer.get()); !frame.empty();
         frame = vkp_test_frame_on(loop, peer.get())) {
        frames.push_back(frame);
    }
    return frames;
}

TEST_CASE("listen: a drain tells each client after what was queued, then closes")
{
    VKP_TEST_ON_EVERY_BACKEND;
    vkp_test_loop loop(backend);
    const bool tcp = GENERATE(false, true);
    const bool noticed = GENERATE(true, false);
    Host host;
    host.open(loop, tcp ? "tcp:127.0.0.1:0" : vkp_test_fresh_address("d"));
    const std::string address = vkp_listener_get_address(host.listener);
    std::vector<Peer> peers;
    for (int i = 0; i < 5; i++) {
        peers.push_back(vkp_test_peer_to(address));
        CHECK(is_served(loop, peers.back()));
    }
    REQUIRE(host.conns.size() == 5);
    const vkp_bytes one = vkp_bytes_static("+one\r\n", 6);
    const vkp_bytes two = vkp_bytes_static("+two\r\n", 6);
    for (vkp_conn *conn : host.conns) {
        REQUIRE(vkp_conn_push(conn, &one, 0) == VKP_OK);
        REQUIRE(vkp_conn_send(conn, &two) == VKP_OK);
    }
    vkp_conn *kept = vkp_conn_ref(host.conns[0]);
    Ends ends;
    REQUIRE(vkp_listener_drain(host.listener, noticed ? &k_notice : nullptr, Ends::on_end, &ends,
                               vkp_test_deadline()) == VKP_OK);
    CHECK(vkp_listener_drain(host.listener, nullptr, Ends::on_end, &ends, 0) == VKP_ERR_INVALID);
    CHECK(refuses(address));
    CHECK((tcp || !vkp_test_exists(address.c_str() + 5)));
    for (const Peer &peer : peers) {
        CHECK(hear_out(loop, peer) == (noticed ? Strings{"+one\r\n", "+two\r\n", "+bye\r\n"}
                                               : Strings{"+one\r\n", "+two\r\n"}));
    }
    vkp_test_run_until(loop, "the end", [&] { return ends.count == 1; });
    CHECK(host.closes == 5);
    CHECK_FALSE(vkp_conn_is_open(kept));
    CHECK(host.stats().clients == 0);
    vkp_test_rounds(loop, 3);
    CHECK(ends.count == 1);
    CHECK(host.ends == 0); // it was told to
    CHECK(vkp_listener_drain(host.listener, nullptr, Ends::on_end, &ends, 0) == VKP_ERR_INVALID);
    vkp_conn_unref(kept);
    host.drop();
    loop.close();
    CHECK(ends.count == 1);
}

TEST_CASE("listen: a drain closes at its deadline whoever does not read")
{
    vkp_test_loop loop(&vkp_backend_null);
    Host host;
    host.config.conn.queue_bytes = 64 << 20;
    host.open(loop, vkp_test_fresh_address("d"));
    const std::string address = vkp_listener_get_address(host.listener);
    Peer slow = vkp_test_peer_to(address);
    CHECK(is_served(loop, slow));
    vkp_conn *stuck = host.conns[0];
    const std::string text(1 << 20, 'x');
    const std::string frame = "$" + std::to_string(text.size()) + "\r\n" + text + "\r\n";
    const vkp_bytes bytes = vkp_bytes_static(frame.data(), frame.size());
    for (int i = 0; i < 8; i++) {
        REQUIRE(vkp_conn_push(stuck, &bytes, 0) == VKP_OK);
    }
    Peer quick = vkp_test_peer_to(address);
    CHECK(is_served(loop, quick));
    Ends ends;
    const uint64_t since = loop.now();
    const uint64_t deadline = GENERATE(500, 0) * vkp_test_ms;
    REQUIRE(vkp_listener_drain(host.listener, &k_notice, Ends::on_end, &ends,
                               deadline == 0 ? 0 : since + deadline) == VKP_OK);
    if (deadline != 0) {
        loop.round();
        CHECK(ends.count == 0);
        CHECK(hear_out(loop, quick) == Strings{"+bye\r\n"});
        CHECK(host.closes == 1);
        vkp_test_run_until(loop, "the deadline", [&] { return ends.count == 1; });
        CHECK(loop.now() >= since + deadline);
        CHECK(loop.now() <= since + deadline + vkp_test_ms);
    }
    vkp_test_run_until(loop, "the end", [&] { return ends.count == 1; });
    CHECK(host.closes == 2);
    CHECK(host.stats().clients == 0);
    // Cut short: no whole notice behind what did not fit.
    (void)vkp_test_peer_drain(slow.get());
    CHECK(vkp_test_peer_is_ended(slow.get()));
    vkp_test_rounds(loop, 3);
    CHECK(vkp_loop_get_deadline_ns(loop) == VKP_FOREVER);
    CHECK(ends.count == 1);
}

TEST_CASE("listen: a drain without clients ends all the same, once")
{
    VKP_TEST_ON_EVERY_BACKEND;
    vkp_test_loop loop(backend);
    Host host;
    host.open(loop, vkp_test_fresh_address("d"));
    Ends ends;
    const bool forever = GENERATE(true, false);
    if (GENERATE(true, false)) {
        ends.hook = [&] { host.drop(); };
    }
    REQUIRE(vkp_listener_drain(host.listener, &k_notice, Ends::on_end, &ends,
                               forever ? VKP_FOREVER : 0) == VKP_OK);
    vkp_test_run_until(loop, "the end", [&] { return ends.count == 1; });
    vkp_test_rounds(loop, 3);
    CHECK(ends.count == 1);
    CHECK(host.ends == 0);
}

TEST_CASE("listen: a listener let go just before its drain's end was told tells nothing")
{
    VKP_TEST_ON_EVERY_BACKEND;
    vkp_test_loop loop(backend);
    Host host;
    host.open(loop, vkp_test_fresh_address("d"));
    Ends ends;
    const bool client = GENERATE(true, false);
    Peer peer;
    if (client) {
        peer = vkp_test_peer_to(vkp_listener_get_address(host.listener));
        CHECK(is_served(loop, peer));
    }
    REQUIRE(vkp_listener_drain(host.listener, &k_notice, Ends::on_end, &ends, VKP_FOREVER) ==
            VKP_OK);
    if (client) {
        vkp_conn_close(host.conns[0]);
    }
    const int before = ends.count; // told inside the calls, or later
    host.drop();
    vkp_test_rounds(loop, 3);
    CHECK(ends.count == before);
}

TEST_CASE("listen: a listener may be let go by the first client that a drain closes")
{
    VKP_TEST_ON_EVERY_BACKEND;
    vkp_test_loop loop(backend);
    const bool late = GENERATE(false, true); // closed by the drain itself, or at its deadline
    const std::string text(4 << 20, 'x');
    const vkp_bytes bytes = vkp_bytes_static(text.data(), text.size());
    Host host;
    Ends ends;
    host.open(loop, vkp_test_fresh_address("d"));
    const std::string address = vkp_listener_get_address(host.listener);
    std::vector<Peer> peers;
    for (int i = 0; i < 5; i++) {
        peers.push_back(vkp_test_peer_to(address));
        CHECK(is_served(loop, peers.back()));
        if (late) {
            REQUIRE(vkp_conn_push(host.conns.back(), &bytes, 0) == VKP_OK);
        }
    }
    host.on_close = [&] { host.drop(); };
    REQUIRE(vkp_listener_drain(host.listener, nullptr, Ends::on_end, &ends,
                               late ? 0 : VKP_FOREVER) == VKP_OK);
    vkp_test_run_until(loop, "the first", [&] { return host.closes >= 1; });
    CHECK(host.listener == nullptr);
    while (!host.conns.empty()) { // what is left is the program's
        vkp_conn_close(host.conns.back());
    }
    vkp_test_rounds(loop, 3);
    CHECK(host.closes == 5);
    CHECK(ends.count == 0);
}

TEST_CASE("listen: clients that leave in a drain are part of it; no callback is one too many")
{
    VKP_TEST_ON_EVERY_BACKEND;
    vkp_test_loop loop(backend);
    Host host;
    host.config.conn.queue_bytes = 64 << 20;
    host.open(loop, vkp_test_fresh_address("d"));
    const std::string address = vkp_listener_get_address(host.listener);
    Peer first = vkp_test_peer_to(address);
    CHECK(is_served(loop, first));
    const std::string text(4 << 20, 'x');
    const std::string frame = "$" + std::to_string(text.size()) + "\r\n" + text + "\r\n";
    const vkp_bytes bytes = vkp_bytes_static(frame.data(), frame.size());
    REQUIRE(vkp_conn_push(host.conns[0], &bytes, 0) == VKP_OK); // keeps it until it reads
    Ends ends;
    REQUIRE(vkp_listener_drain(host.listener, &k_notice, Ends::on_end, &ends, VKP_FOREVER) ==
            VKP_OK);
    vkp_test_rounds(loop, 3);
    CHECK(ends.count == 0);
    bool told = true;
    SECTION("it leaves")
    {
        first.reset();
    }
    SECTION("the program closes it")
    {
        vkp_conn_close(host.conns[0]);
    }
    SECTION("it reads at last")
    {
        CHECK(hear_out(loop, first) == Strings{frame, "+bye\r\n"});
    }
    SECTION("the loop closes")
    {
        loop.close();
        CHECK(host.closes == 1);
        CHECK(ends.count == 1);
    }
    SECTION("the listener is closed: a drain did that itself")
    {
        vkp_listener_close(host.listener);
        vkp_conn_close(host.conns[0]);
    }
    SECTION("the listener is let go")
    {
        host.drop();
        vkp_conn_close(host.conns[0]);
        told = false;
    }
    if (loop != nullptr) {
        vkp_test_run_until(loop, "the client to go", [&] { return host.closes == 1; });
        vkp_test_rounds(loop, 3);
    }
    CHECK(ends.count == (told ? 1 : 0));
    CHECK(host.ends == 0);
}

TEST_CASE("listen: a drain begins in callbacks, too")
{
    VKP_TEST_ON_EVERY_BACKEND;
    vkp_test_loop loop(backend);
    Host host;
    Ends ends;
    host.open(loop, vkp_test_fresh_address("d"));
    const std::string address = vkp_listener_get_address(host.listener);
    host.on_open = [&](vkp_conn *) {
        if (host.opens == 2 && vkp_listener_drain(host.listener, &k_notice, Ends::on_end, &ends,
                                                  VKP_FOREVER) != VKP_OK) {
            vkp_test_fail("no drain");
        }
    };
    ends.hook = [&] { host.drop(); };
    std::vector<Peer> peers;
    for (int i = 0; i < 4; i++) {
        peers.push_back(vkp_test_peer_to(address));
    }
    int told = 0;
    for (const Peer &peer : peers) {
        const Strings heard = hear_out(loop, peer);
        CHECK((heard.empty() || heard == Strings{"+bye\r\n"}));
        told += heard.empty() ? 0 : 1;
    }
    CHECK(told == 2); // the others were not accepted any more
    CHECK(host.opens == 2);
    vkp_test_run_until(loop, "the end", [&] { return ends.count == 1; });
    CHECK(host.listener == nullptr);
}

TEST_CASE("listen: a drain of one that follows leaves the socket to its handles")
{
    vkp_test_loop loop(&vkp_backend_null);
    const std::string address = vkp_test_fresh_address("d");
    Registry registry;
    Host host;
    vkp_socket *sock = registry.socket(address.substr(5));
    host.follow(loop, sock);
    Peer peer = vkp_test_peer_to(address);
    CHECK(is_served(loop, peer));
    const bool held = GENERATE(true, false);
    if (!held) {
        vkp_socket_unref(std::exchange(sock, nullptr));
    }
    Ends ends;
    REQUIRE(vkp_listener_drain(host.listener, &k_notice, Ends::on_end, &ends, VKP_FOREVER) ==
            VKP_OK);
    CHECK(hear_out(loop, peer) == Strings{"+bye\r\n"});
    vkp_test_run_until(loop, "the end", [&] { return ends.count == 1; });
    vkp_test_rounds(loop, 3);
    CHECK(host.ends == 0);
    CHECK(vkp_test_exists(address.c_str() + 5) == held);
    vkp_socket_unref(sock);
    CHECK_FALSE(vkp_test_exists(address.c_str() + 5));
    CHECK(ends.count == 1);
}

TEST_CASE("listen: a drain that cannot be changes nothing")
{
    vkp_test_loop loop(&vkp_backend_null);
    Host host;
    Ends ends;
    SECTION("descriptors handed on are not its to close")
    {
        host.hand_on();
        host.open(loop, vkp_test_fresh_address("d"));
        CHECK(vkp_listener_drain(host.listener, &k_notice, Ends::on_end, &ends, 0) ==
              VKP_ERR_INVALID);
        Peer peer = vkp_test_peer_to(vkp_listener_get_address(host.listener));
        vkp_test_run_until(loop, "the client", [&] { return host.given.size() == 1; });
        close(host.given[0].first);
        vkp_seat_unref(host.given[0].second);
    }
    SECTION("no listener")
    {
        CHECK(vkp_listener_drain(nullptr, &k_notice, Ends::on_end, &ends, 0) == VKP_ERR_INVALID);
    }
    vkp_test_rounds(loop, 3);
    CHECK(ends.count == 0);
}

TEST_CASE("listen: a drain of a listener that was closed still tells its clients")
{
    vkp_test_loop loop(&vkp_backend_null);
    Host host;
    Ends ends;
    host.open(loop, vkp_test_fresh_address("d"));
    Peer peer = vkp_test_peer_to(vkp_listener_get_address(host.listener));
    CHECK(is_served(loop, peer));
    vkp_listener_close(host.listener);
    REQUIRE(vkp_listener_drain(host.listener, &k_notice, Ends::on_end, &ends, VKP_FOREVER) ==
            VKP_OK);
    CHECK(hear_out(loop, peer) == Strings{"+bye\r\n"});
    vkp_test_run_until(loop, "the end", [&] { return ends.count == 1; });
    CHECK(host.ends == 0);
}

TEST_CASE("listen: a drain for which memory is missing at any allocation changes nothing")
{
    vkp_test_loop loop(&vkp_backend_null);
    for (uint64_t k = 1;; k++) {
        INFO("allocation " << k);
        Host host;
        Ends ends;
        host.open(loop, vkp_test_fresh_address("d"));
        const std::string address = vkp_listener_get_address(host.listener);
        std::vector<Peer> peers;
        for (int i = 0; i < 3; i++) {
            peers.push_back(vkp_test_peer_to(address));
            CHECK(is_served(loop, peers.back()));
        }
        vkp_test_env_fault(&loop.test, VKP_TEST_FAULT_FROM, k);
        const uint64_t failures = vkp_test_env_failures(&loop.test);
        const vkp_status status =
            vkp_listener_drain(host.listener, &k_notice, Ends::on_end, &ends, VKP_FOREVER);
        const bool failed = vkp_test_env_failures(&loop.test) > failures;
        vkp_test_env_fault(&loop.test, VKP_TEST_FAULT_NONE, 0);
        if (status != VKP_OK) {
            CHECK(status == VKP_ERR_NOMEM);
            peers.push_back(vkp_test_peer_to(address));
            for (const Peer &peer : peers) {
                CHECK(is_served(loop, peer));
            }
            CHECK(ends.count == 0);
            REQUIRE(vkp_listener_drain(host.listener, &k_notice, Ends::on_end, &ends,
                                       VKP_FOREVER) == VKP_OK);
        }
        for (const Peer &peer : peers) {
            CHECK(hear_out(loop, peer) == Strings{"+bye\r\n"});
        }
        vkp_test_run_until(loop, "the end", [&] { return ends.count == 1; });
        if (!failed) {
            break;
        }
    }
}

TEST_CASE("listen: a TCP address from another thread")
{
    vkp_test_loop loop(&vkp_backend_poll);
    Host host;
    Start told;
    host.start = &told;
    vkp_listener_config config = config_of(Form::plain, host, "tcp:127.0.0.1:0", nullptr);
    vkp_status status = VKP_ERR_INVALID;
    std::thread([&] { status = vkp_listener_open(loop, &config, nullptr); }).join();
    REQUIRE(status == VKP_OK);
    vkp_test_run_until(loop, "the start", [&] { return told.calls == 1; });
    REQUIRE(told.result.status == VKP_OK);
    CHECK(told.address.find("tcp:127.0.0.1:") == 0);
    CHECK(told.address != "tcp:127.0.0.1:0");
    Peer peer = vkp_test_peer_to(told.address);
    CHECK(is_served(loop, peer));
    peer.reset();
    vkp_test_run_until(loop, "the client to go", [&] { return host.closes == 1; });
    vkp_listener_close(told.result.listener);
}
