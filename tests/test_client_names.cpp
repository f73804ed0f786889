// SPDX-License-Identifier: MIT
//
// From a host name to a connection: lookups in a thread of their own, several addresses, addresses
// that swallow what is sent to them, name servers that do not answer.
#include "support/catch.hpp"
#include "support/fake_server.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include <arpa/inet.h>
#include <netinet/in.h>

namespace {

// What the name server of the test does. The table of the system has plain functions: one of it.
struct Names {
    std::mutex mutex;
    std::condition_variable changed;
    std::vector<vkp_address> addresses;
    bool silent = false; // lookups wait until it is false
    int asked = 0;
    std::thread::id thread; // of the last lookup

    void answer(std::vector<vkp_address> now)
    {
        std::lock_guard<std::mutex> lock(mutex);
        addresses = std::move(now);
        silent = false;
        changed.notify_all();
    }
    void hush()
    {
        std::lock_guard<std::mutex> lock(mutex);
        silent = true;
    }
    int lookups()
    {
        std::lock_guard<std::mutex> lock(mutex);
        return asked;
    }
};

Names *names;

int look_up(const char *host, const char *, vkp_address *out, size_t capacity)
{
    std::unique_lock<std::mutex> lock(names->mutex);
    if (std::string(host) != "valkey.example") {
        vkp_test_fail("a lookup of %s", host);
    }
    names->asked++;
    names->thread = std::this_thread::get_id();
    names->changed.notify_all();
    names->changed.wait(lock, [] { return !names->silent; });
    const size_t count = std::min(capacity, names->addresses.size());
    std::copy_n(names->addresses.begin(), count, out);
    return count > 0 ? static_cast<int>(count) : -ENOENT;
}

const vkp_sys *named_sys()
{
    static const vkp_sys table = [] {
        vkp_sys copy = *fixed_random_sys();
        copy.resolve = look_up;
        return copy;
    }();
    return &table;
}

vkp_address address_of(const sockaddr *address, size_t bytes)
{
    vkp_address result = {};
    result.family = address->sa_family;
    result.bytes = static_cast<uint32_t>(bytes);
    std::memcpy(result.storage.bytes, address, bytes);
    return result;
}

// The address of a played server, as a lookup gives it.
vkp_address address_of(const FakeServer &server)
{
    sockaddr_un name = {};
    name.sun_family = AF_UNIX;
    std::strcpy(name.sun_path, server.address() + strlen("unix:"));
    return address_of(reinterpret_cast<const sockaddr *>(&name), sizeof name);
}

// An address that swallows SYNs: the listener's backlog is full.
class BlackHole {
  public:
    BlackHole()
    {
        fds_.push_back(socket(AF_INET, SOCK_STREAM, 0));
        sockaddr_in name = {};
        socklen_t bytes = sizeof name;
        name.sin_family = AF_INET;
        name.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        if (bind(fds_[0], reinterpret_cast<sockaddr *>(&name), bytes) != 0 ||
            listen(fds_[0], 0) != 0 ||
            getsockname(fds_[0], reinterpret_cast<sockaddr *>(&name), &bytes) != 0) {
            vkp_test_fail("no listener");
        }
        address = address_of(reinterpret_cast<const sockaddr *>(&name), sizeof name);
        for (;;) { // until one is not accepted
            const int fd = socket(AF_INET, SOCK_STREAM, 0);
            fds_.push_back(fd);
            (void)fcntl(fd, F_SETFL, O_NONBLOCK);
            if (connect(fd, reinterpret_cast<sockaddr *>(&name), sizeof name) != 0) {
                fd_set writable;
                FD_ZERO(&writable);
                FD_SET(fd, &writable);
                timeval patience = {0, 200000};
                if (select(fd + 1, nullptr, &writable, nullptr, &patience) == 0) {
                    break;
                }
            }
        }
    }
    ~BlackHole()
    {
        for (int fd : fds_) {
            ::close(fd);
        }
    }
    vkp_address address;

  private:
    std::vector<int> fds_;
};

class Named : public vkp_test_loop {
  public:
    explicit Named(const vkp_backend *backend = *vkp_test_backends())
        : vkp_test_loop(backend, (fixed_random = 1, named_sys()))
    {
        names = &table;
    }
    Names table;
};

// A resolver with a thread; at its end no lookup may wait for the name server.
class Resolver {
  public:
    explicit Resolver(const vkp_env *env, int threads = 1)
    {
        REQUIRE(vkp_resolver_open(env, &resolver_) == VKP_OK);
        for (int i = 0; i < threads; i++) {
            threads_.emplace_back([this] { vkp_resolver_run(resolver_); });
        }
    }
    ~Resolver()
    {
        vkp_resolver_close(resolver_);
        vkp_resolver_close(resolver_);
        for (std::thread &thread : threads_) {
            thread.join();
        }
        vkp_resolver_unref(resolver_);
    }
    operator vkp_resolver *() const
    {
        return resolver_;
    }

  private:
    vkp_resolver *resolver_ = nullptr;
    std::vector<std::thread> threads_;
};

vkp_client_config by_name(vkp_resolver *resolver)
{
    vkp_client_config config = {};
    config.address = vkp_str_of("tcp:valkey.example:6379");
    config.retry_min_ms = 1;
    config.retry_max_ms = 1;
    config.resolver = resolver;
    return config;
}

} // namespace

TEST_CASE("names: an address that swallows SYNs has its share of the time, then the next is tried",
          "[client]")
{
    // The null backend's clock jumps to the end of the share.
    Named loop(&vkp_backend_null);
    BlackHole hole;
    FakeServer server;
    loop.table.addresses = {hole.address, address_of(server)};
    Client client(loop, by_name(nullptr));
    const uint64_t begin = loop.now();
    Peer peer = server.accept(loop);
    CHECK(loop.now() - begin == 2500 * ms); // half of the default of five seconds
    CHECK(heard(loop, peer) == wire({"HELLO", "3"}));
    say(peer, hello_reply);
    until_state(loop, client, VKP_CLIENT_READY);
    CHECK(client.history() == "connected");
}

TEST_CASE("names: of addresses that all swallow SYNs each has its share, and the try ends",
          "[client]")
{
    Named loop(&vkp_backend_null);
    BlackHole hole;
    loop.table.addresses = {hole.address, hole.address, hole.address};
    Client client(loop, by_name(nullptr));
    const uint64_t begin = loop.now();
    until_events(loop, client, 1);
    CHECK(loop.now() - begin == 5000 * ms);
    CHECK(client.history() == "connect-failed");
}

TEST_CASE("names: one that accepts and does not answer is not the first of the next try",
          "[client]")
{
    Named loop(&vkp_backend_null);
    FakeServer mute;
    FakeServer server;
    loop.table.addresses = {address_of(mute), address_of(server)};
    Client client(loop, by_name(nullptr));
    Peer first = mute.accept(loop);
    Peer second = server.accept(loop);
    CHECK(client.history() == "connect-failed");
    (void)heard(loop, second);
    say(second, hello_reply);
    until_state(loop, client, VKP_CLIENT_READY);
}

TEST_CASE("names: a resolver's lookups do not run in the loop's thread", "[client][threads]")
{
    Named loop;
    FakeServer server;
    loop.table.addresses = {address_of(server)};
    {
        Resolver resolver(&loop.test.env);
        Client client(loop, by_name(resolver));
        Peer peer = server.greet(loop, client);
        CHECK(loop.table.thread != std::this_thread::get_id());
        peer.reset();
        until_state(loop, client, VKP_CLIENT_WAITING);
        peer = server.greet(loop, client); // each try asks again
        CHECK(loop.table.lookups() == 2);
    }
}

TEST_CASE("names: a name server that does not answer delays nobody else", "[client][threads]")
{
    Named loop;
    FakeServer server;
    loop.table.silent = true;
    {
        Resolver resolver(&loop.test.env);
        vkp_client_config config = by_name(resolver);
        config.connect_timeout_ms = 50;
        Client lost(loop, config);
        vkp_test_run_until(loop, "the lookup", [&] { return loop.table.lookups() == 1; });
        Client client(loop, server.config());
        Peer peer = server.greet(loop, client);
        CHECK(client.history() == "connected");
        // The time limit of the try covers the lookup. It ends with the client still there ...
        until_events(loop, lost, 1);
        CHECK(lost.events[0].payload == "no connection within the time limit");
        // ... or gone.
        lost.unref();
        loop.table.answer({address_of(server)});
    }
    for (int i = 0; i < 3; i++) {
        loop.round();
    }
}

TEST_CASE("names: a lookup that outlasts its try serves the next one", "[client][threads]")
{
    Named loop;
    FakeServer server;
    loop.table.silent = true;
    {
        Resolver resolver(&loop.test.env);
        vkp_client_config config = by_name(resolver);
        config.connect_timeout_ms = 20;
        Client client(loop, config);
        const bool between = GENERATE(true, false);
        until_events(loop, client, 1);
        CHECK(client.events[0].payload == "no connection within the time limit");
        if (between) {
            loop.table.answer({address_of(server)});
        } else {
            vkp_test_run_until(loop, "more tries", [&] {
                vkp_client_stats stats;
                vkp_client_get_stats(client, &stats);
                return stats.failures >= 3;
            });
            CHECK(loop.table.lookups() == 1); // they wait for the same one
            loop.table.answer({address_of(server)});
        }
        Peer peer = server.greet(loop, client);
        CHECK(client.history() == "connect-failed, connected");
    }
}

TEST_CASE("names: a lookup that nobody waits for is not made", "[client][threads]")
{
    Named loop;
    FakeServer server;
    loop.table.silent = true;
    {
        Resolver resolver(&loop.test.env);
        Client first(loop, by_name(resolver));
        vkp_test_run_until(loop, "the lookup", [&] { return loop.table.lookups() == 1; });
        {
            Client second(loop, by_name(resolver)); // its lookup waits for the thread
            loop.round();
            loop.round();
        }
        Client third(loop, by_name(resolver));
        loop.round();
        loop.table.answer({address_of(server)});
        Peer one = server.greet(loop);
        Peer two = server.greet(loop);
        until_state(loop, third, VKP_CLIENT_READY);
        CHECK(loop.table.lookups() == 2);
    }
}

TEST_CASE("names: without an answer the addresses of the last lookup serve", "[client][threads]")
{
    Named loop;
    FakeServer server;
    loop.table.addresses = {address_of(server)};
    {
        Resolver resolver(&loop.test.env);
        Client client(loop, by_name(resolver));
        Peer peer = server.greet(loop, client);
        loop.table.hush();
        peer.reset();
        until_state(loop, client, VKP_CLIENT_WAITING);
        peer = server.greet(loop, client);
        CHECK(client.history() == "connected, disconnected, reconnected");
        // A name that is gone is no reason to stay away either.
        loop.table.answer({});
        peer.reset();
        until_state(loop, client, VKP_CLIENT_WAITING);
        peer = server.greet(loop, client);
    }
}

TEST_CASE("names: a name that is not found is told, and asked for again", "[client][threads]")
{
    Named loop;
    FakeServer server;
    {
        Resolver resolver(&loop.test.env, 2);
        Client client(loop, by_name(resolver));
        until_events(loop, client, 1);
        CHECK(client.events[0].payload == "the host name was not found");
        loop.table.answer({address_of(server)});
        Peer peer = server.greet(loop, client);
        CHECK(client.history() == "connect-failed, connected");
    }
}

TEST_CASE("names: several threads look up at once", "[client][threads]")
{
    Named loop;
    FakeServer server;
    loop.table.silent = true;
    {
        Resolver resolver(&loop.test.env, 2);
        Client first(loop, by_name(resolver));
        Client second(loop, by_name(resolver));
        vkp_test_run_until(loop, "both lookups", [&] { return loop.table.lookups() == 2; });
        loop.table.answer({address_of(server)});
        Peer one = server.greet(loop);
        Peer two = server.greet(loop);
        until_state(loop, first, VKP_CLIENT_READY);
        until_state(loop, second, VKP_CLIENT_READY);
    }
}

TEST_CASE("names: a resolver that is closed, or goes with lookups waiting, fails them", "[client]")
{
    Named loop;
    vkp_resolver *resolver = nullptr;
    CHECK(vkp_resolver_open(nullptr, nullptr) == VKP_ERR_INVALID);
    REQUIRE(vkp_resolver_open(&loop.test.env, &resolver) == VKP_OK);
    Client waiting(loop, by_name(resolver)); // nobody runs it
    loop.round();
    CHECK(waiting.state() == VKP_CLIENT_CONNECTING);
    vkp_resolver_close(resolver);
    Client late(loop, by_name(resolver));
    until_events(loop, late, 1);
    vkp_resolver_run(resolver); // returns: what waited is answered
    until_events(loop, waiting, 1);
    CHECK(waiting.events[0].payload == "the host name was not found");
    vkp_resolver_unref(resolver);
    vkp_resolver_unref(nullptr);
    vkp_resolver_close(nullptr);
}

TEST_CASE("names: a lookup may outlive its client, its loop and its resolver's handle",
          "[client][threads]")
{
    Names table;
    vkp_test_env test;
    vkp_test_env_init(&test);
    test.env.sys = named_sys();
    names = &table;
    table.silent = true;
    vkp_resolver *resolver = nullptr;
    REQUIRE(vkp_resolver_open(&test.env, &resolver) == VKP_OK);
    std::thread thread([own = vkp_resolver_ref(resolver)] {
        vkp_resolver_run(own);
        vkp_resolver_unref(own);
    });
    vkp_loop *loop = nullptr;
    vkp_loop_config config = {};
    config.backend = *vkp_test_backends();
    config.env = &test.env;
    REQUIRE(vkp_loop_open(&config, &loop) == VKP_OK);
    {
        Client client(loop, by_name(resolver));
        vkp_test_run_until(loop, "the lookup", [&] { return table.lookups() == 1; });
        vkp_resolver_close(resolver);
        vkp_resolver_unref(resolver);
    }
    vkp_loop_close(loop);
    vkp_loop_unref(loop);
    table.answer({});
    thread.join();
    vkp_test_env_deinit(&test);
}
