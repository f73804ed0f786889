// SPDX-License-Identifier: MIT
//
// Ref-counted Unix sockets inside of one process, edge by edge: the last reference against the
// next first one at every step of either, sweeps, files that change behind our back, names, limits,
// linger, weak handles, pools, counts, and every call that may fail in all of these.
#include "support/catch.hpp"

#include <atomic>
#include <cerrno>
#include <cstring>
#include <functional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "support/channel_probe.h"
#include "support/client_probe.h"
#include "support/socket_probe.h"

namespace {

using call = vkp_test_call;

// Steps of one thread alone are counted, not those of the others that run beside it.
thread_local bool is_counted = false;

// What the socket of a path that is served must look like, from all sides.
void check_serves(vkp_test_registry &registry, vkp_socket *sock, const std::string &path)
{
    CHECK(vkp_socket_is_active(sock));
    CHECK(vkp_socket_get_path(sock) == path);
    CHECK(vkp_registry_is_active(registry, vkp_str_of(path.c_str())));
    CHECK(vkp_test_exists(path.c_str()));
    CHECK(vkp_test_has_lock(path));
    CHECK(vkp_test_answers(path));
    CHECK(vkp_test_ask_elsewhere(path) == VKP_ERR_IN_USE);
}

vkp_status get(vkp_registry *registry, const std::string &path, vkp_socket **sock)
{
    return vkp_socket_open(registry, vkp_str_of(path.c_str()), sock);
}

} // namespace

// ---- the last reference and the next first one ----

TEST_CASE("socket edges: a path asked for while its last reference goes, at every step of that")
{
    const vkp_test_watchdog watchdog;
    int k = 1;
    for (bool stopped = true; stopped; k++) {
        INFO("before call " << k << " of the last unref");
        vkp_test_folder folder;
        vkp_test_hooks hooks;
        vkp_test_registry registry(hooks.sys());
        vkp_test_stop stop;
        std::atomic<bool> ended{false};
        std::atomic<bool> got{false};
        const std::string path = folder.file();
        vkp_socket *old = registry.make(path);
        vkp_socket *fresh = nullptr;
        int calls = 0;
        hooks.before = [&](const vkp_test_step &) {
            if (is_counted && ++calls == k) {
                stop.arrive();
            }
            return 0;
        };
        std::thread last([&] {
            is_counted = true;
            vkp_socket_unref(old);
            ended = true;
        });
        stopped = stop.await_arrival(ended);
        std::thread next([&] {
            fresh = registry.make(path);
            got = true;
        });
        vkp_test_let_run([&] { return got.load(); });
        stop.let_go();
        last.join();
        next.join();
        check_serves(registry, fresh, path);
        CHECK(vkp_socket_get_ref_count(fresh) == 1);
        CHECK(registry.count() == 1);
        CHECK(registry.stats().created == 2);
        CHECK(registry.stats().ended == 1);
        vkp_socket_unref(fresh);
        CHECK(registry.count() == 0);
        CHECK(folder.is_empty());
        CHECK(registry.fds_more() == 0);
    }
    CHECK(k > 4);
}

TEST_CASE("socket edges: the last reference goes while a thread creates, at every step of that")
{
    // Whoever is in the registry then cleans up; the path may be asked for again before that.
    const vkp_test_watchdog watchdog;
    int k = 1;
    int handed = 0;
    for (bool stopped = true; stopped; k++) {
        INFO("before call " << k << " of get_or_create");
        vkp_test_folder folder;
        vkp_test_hooks hooks;
        vkp_test_registry registry(hooks.sys());
        vkp_test_stop stop;
        std::atomic<bool> ended{false};
        std::atomic<bool> got{false};
        const std::string path = folder.file();
        const std::string other_path = folder.file("other");
        vkp_socket *old = registry.make(path);
        vkp_socket *other = nullptr;
        vkp_socket *fresh = nullptr;
        int calls = 0;
        hooks.before = [&](const vkp_test_step &) {
            if (is_counted && ++calls == k) {
                stop.arrive();
            }
            return 0;
        };
        std::thread creator([&] {
            is_counted = true;
            other = registry.make(other_path);
            ended = true;
        });
        stopped = stop.await_arrival(ended);
        vkp_socket_unref(old); // comes back, whoever is where
        const bool is_handed = vkp_test_exists(path.c_str());
        handed += is_handed ? 1 : 0;
        std::thread next([&] {
            fresh = registry.make(path);
            got = true;
        });
        vkp_test_let_run([&] { return got.load(); });
        stop.let_go();
        creator.join();
        next.join();
        check_serves(registry, other, other_path);
        check_serves(registry, fresh, path);
        CHECK(registry.count() == 2);
        CHECK(registry.stats().ended == 1);
        CHECK(registry.stats().handed_over == (is_handed ? 1 : 0));
        vkp_socket_unref(fresh);
        vkp_socket_unref(other);
        CHECK(folder.is_empty());
        CHECK(registry.fds_more() == 0);
    }
    CHECK(handed >= 4);
    CHECK(k > handed);
}

TEST_CASE("socket edges: a last reference given back inside of the registry is cleaned up there")
{
    // The hooks run under the registry's lock: an unref that waited for it would never come back.
    const vkp_test_watchdog watchdog;
    vkp_test_folder folder;
    vkp_test_hooks hooks;
    vkp_test_registry registry(hooks.sys());
    const std::string path = folder.file();
    const std::string other_path = folder.file("other");
    vkp_socket *other = registry.make(other_path);
    vkp_socket *sock = nullptr;
    bool was_there = false;
    const auto hand_over = [&] {
        vkp_socket_unref(other);
        was_there = vkp_test_exists(other_path.c_str());
    };
    SECTION("of a get_or_create")
    {
        const call each = GENERATE(call::lock_file, call::identify, call::connect, call::unlink,
                                   call::bind, call::listen);
        close(vkp_test_foreign_socket(path, 1)); // dead: it is probed and removed
        hooks.at(each, hand_over);
        sock = registry.make(path);
        CHECK(registry.stats().taken_over == 1);
    }
    SECTION("of another last unref")
    {
        const call each = GENERATE(call::identify, call::unlink);
        sock = registry.make(path);
        hooks.at(each, hand_over, path);
        vkp_socket_unref(sock);
        sock = nullptr;
    }
    SECTION("of a register_new")
    {
        const int fd = vkp_test_foreign_socket(path, 4);
        hooks.at(call::lock_file, hand_over);
        REQUIRE(vkp_socket_adopt(registry, vkp_str_of(path.c_str()), fd, &sock) == VKP_OK);
    }
    CHECK(was_there);
    CHECK(hooks.before == nullptr);
    CHECK_FALSE(vkp_test_exists(other_path.c_str()));
    CHECK_FALSE(vkp_test_has_lock(other_path));
    CHECK(registry.stats().handed_over == 1);
    CHECK(registry.count() == (sock != nullptr ? 1 : 0));
    if (sock != nullptr) {
        check_serves(registry, sock, path);
    }
    vkp_socket_unref(sock);
    CHECK(folder.is_empty());
    CHECK(registry.fds_more() == 0);
}

TEST_CASE("socket edges: as many last references as one likes are handed over at once")
{
    const vkp_test_watchdog watchdog;
    vkp_test_folder folder;
    vkp_test_hooks hooks;
    vkp_test_registry registry(hooks.sys());
    std::vector<vkp_socket *> socks;
    for (int i = 0; i < 100; i++) {
        socks.push_back(registry.make(folder.file(std::to_string(i))));
    }
    hooks.at(call::bind, [&] {
        vkp_test_run_threads(4, [&](int i) {
            for (size_t at = static_cast<size_t>(i); at < socks.size(); at += 4) {
                vkp_socket_unref(socks[at]);
            }
        });
    });
    vkp_socket *sock = registry.make(folder.file());
    CHECK(folder.names() == std::vector<std::string>{"s", "s.lock"});
    CHECK(registry.stats().handed_over == 100);
    CHECK(registry.count() == 1);
    CHECK(registry.fds_more() == 2); // the socket and its lock
    vkp_socket_unref(sock);
    CHECK(registry.fds_more() == 0);
}

TEST_CASE("socket edges: what is handed over while the holder cleans up is not left lying")
{
    // Each goes in the removal of the one before, the last ones when the first look was over.
    const vkp_test_watchdog watchdog;
    vkp_test_folder folder;
    vkp_test_hooks hooks;
    vkp_test_registry registry(hooks.sys());
    std::vector<vkp_socket *> socks;
    std::vector<std::string> paths;
    for (int i = 0; i < 5; i++) {
        paths.push_back(folder.file(std::to_string(i)));
        socks.push_back(registry.make(paths.back()));
    }
    size_t gone = 0;
    hooks.before = [&](const vkp_test_step &step) {
        const bool is_next = gone == 0 ? step.call == call::bind
                                       : gone < 5 && step.is(call::unlink, paths[gone - 1]);
        if (is_next) {
            vkp_socket_unref(socks[gone++]);
        }
        return 0;
    };
    vkp_socket *sock = registry.make(folder.file());
    CHECK(gone == 5);
    CHECK(folder.names() == std::vector<std::string>{"s", "s.lock"}); // before anybody comes again
    CHECK(registry.stats().handed_over == 5);
    vkp_socket_unref(sock);
    CHECK(folder.is_empty());
    CHECK(registry.fds_more() == 0);
}

TEST_CASE("socket edges: two last references at once: each is cleaned up when both came back")
{
    constexpr int rounds = 1000;
    vkp_test_folder folder;
    vkp_test_registry registry;
    const std::string paths[2] = {folder.file("a"), folder.file("b")};
    vkp_socket *socks[2] = {nullptr, nullptr};
    std::atomic<int> round{0};
    std::atomic<int> done{0};
    int left = 0;
    const auto await = [](const std::atomic<int> &word, int value) {
        const uint64_t deadline = vkp_test_deadline();
        while (word.load() < value) {
            if (vkp_now_ns() > deadline) {
                vkp_test_fail("a round that never came");
            }
            sched_yield();
        }
    };
    std::thread second([&] {
        for (int i = 1; i <= rounds; i++) {
            await(round, i);
            vkp_socket_unref(socks[1]);
            done.store(i);
        }
    });
    for (int i = 1; i <= rounds; i++) {
        socks[0] = registry.make(paths[0]);
        socks[1] = registry.make(paths[1]);
        round.store(i);
        vkp_socket_unref(socks[0]);
        await(done, i);
        left += vkp_test_exists(paths[0].c_str()) || vkp_test_exists(paths[1].c_str()) ? 1 : 0;
    }
    second.join();
    CHECK(left == 0);
    CHECK(registry.stats().ended == 2 * rounds);
    CHECK(registry.count() == 0);
    CHECK(registry.fds_more() == 0);
}

TEST_CASE("socket edges: references and weak handles wait for nobody in the registry")
{
    const vkp_test_watchdog watchdog;
    vkp_test_folder folder;
    vkp_test_hooks hooks;
    vkp_test_registry registry(hooks.sys());
    vkp_socket *live = registry.make(folder.file("live"));
    const vkp_weak_socket weak = vkp_socket_downgrade(live);
    hooks.at(call::bind, [&] {
        vkp_socket *sock = nullptr;
        CHECK(vkp_socket_ref(live) == live);
        CHECK(vkp_socket_upgrade(&weak, &sock) == VKP_OK);
        CHECK(sock == live);
        CHECK(vkp_socket_get_ref_count(live) == 3);
        vkp_socket_unref(live);
        vkp_socket_unref(live);
    });
    vkp_socket *sock = registry.make(folder.file());
    CHECK(hooks.before == nullptr);
    CHECK(vkp_socket_get_ref_count(live) == 1);
    vkp_socket_unref(sock);
    vkp_socket_unref(live);
    CHECK(folder.is_empty());
}

// ---- sweeps ----

TEST_CASE("socket edges: a sweep may become the last owner of what it sweeps")
{
    const vkp_test_watchdog watchdog;
    vkp_test_folder folder;
    vkp_test_hooks hooks;
    vkp_test_registry registry(hooks.sys());
    std::vector<vkp_socket *> socks;
    for (int i = 0; i < 5; i++) {
        socks.push_back(registry.make(folder.file(std::to_string(i))));
    }
    hooks.at(call::unlink, [&] {
        for (vkp_socket *sock : socks) {
            vkp_socket_unref(sock);
        }
    });
    CHECK(vkp_registry_cleanup_all(registry) == 5);
    CHECK(hooks.before == nullptr);
    CHECK(registry.count() == 0);
    CHECK(registry.stats().ended == 5);
    CHECK(registry.stats().live == 0);
    CHECK(registry.stats().references == 0);
    CHECK(folder.is_empty());
    CHECK(registry.fds_more() == 0);
    vkp_socket_unref(registry.make(folder.file("0"))); // and the registry goes on
    CHECK(folder.is_empty());
}

TEST_CASE("socket edges: sweeps of two threads among threads that get and drop")
{
    vkp_test_folder folder;
    vkp_test_registry registry;
    std::atomic<uint64_t> swept{0};
    vkp_test_run_threads(6, [&](int i) {
        for (int round = 0; round < 60; round++) {
            if (i < 2) {
                swept += vkp_registry_cleanup_all(registry);
                continue;
            }
            vkp_socket *sock = registry.make(folder.file(std::to_string(round % 3)));
            (void)vkp_socket_is_active(sock);
            vkp_socket_unref(sock);
        }
    });
    const vkp_registry_stats stats = registry.stats();
    CHECK(stats.live == 0);
    CHECK(stats.references == 0);
    CHECK(stats.created == stats.ended);
    CHECK(stats.unlink_failures == 0);
    CHECK(swept.load() <= stats.ended);
    CHECK(folder.is_empty());
    CHECK(registry.fds_more() == 0);
}

TEST_CASE("socket edges: sockets are closed and lines logged outside of the registry's lock")
{
    // Both call the registry again, which would never come back from a call under its lock.
    const vkp_test_watchdog watchdog;
    vkp_test_folder folder;
    vkp_test_hooks hooks;
    struct Again {
        vkp_test_env memory;
        vkp_registry *registry = nullptr;
        std::string path;
        int calls = 0;
        bool inside = false;

        void call()
        {
            if (!inside && registry != nullptr) {
                inside = true;
                vkp_socket *sock = nullptr;
                if (vkp_socket_open(registry, vkp_str_of(path.c_str()), &sock) != VKP_OK) {
                    vkp_test_fail("the registry cannot be used");
                }
                vkp_socket_unref(sock);
                inside = false;
                calls++;
            }
        }
    };
    Again again;
    again.path = folder.file("again");
    vkp_test_env_init(&again.memory);
    vkp_env env = {};
    env.sys = hooks.sys();
    env.user = &again;
    env.log_level = VKP_LOG_DEBUG;
    env.log = [](void *user, vkp_log_level, const char *) { static_cast<Again *>(user)->call(); };
    vkp_registry_config config = {};
    config.env = &env;
    REQUIRE(vkp_registry_open(&config, &again.registry) == VKP_OK);
    const std::string path = folder.file();
    vkp_socket *sock = nullptr;
    const auto close_again = [&](const vkp_test_step &step) {
        struct stat info;
        if (step.call == call::close && fstat(step.fd, &info) == 0 && S_ISSOCK(info.st_mode)) {
            again.call();
        }
        return 0;
    };
    SECTION("the last reference")
    {
        REQUIRE(get(again.registry, path, &sock) == VKP_OK);
        hooks.before = close_again;
        vkp_socket_unref(sock);
    }
    SECTION("a last reference that was handed over")
    {
        vkp_socket *other = nullptr;
        REQUIRE(get(again.registry, path, &sock) == VKP_OK);
        bool handed = false;
        hooks.before = [&](const vkp_test_step &step) {
            if (step.call == call::bind && !handed) {
                handed = true;
                vkp_socket_unref(sock);
            }
            return close_again(step);
        };
        REQUIRE(get(again.registry, folder.file("other"), &other) == VKP_OK);
        CHECK(handed);
        vkp_socket_unref(other);
    }
    SECTION("a sweep")
    {
        REQUIRE(get(again.registry, path, &sock) == VKP_OK);
        hooks.before = close_again;
        CHECK(vkp_registry_cleanup_all(again.registry) == 1);
        vkp_socket_unref(sock);
    }
    SECTION("a creation that is refused, and says so")
    {
        vkp_test_write_file(path);
        CHECK(get(again.registry, path, &sock) == VKP_ERR_EXISTS);
        unlink(path.c_str());
    }
    SECTION("a socket taken over, which is told")
    {
        vkp_test_leave_corpse(path);
        REQUIRE(get(again.registry, path, &sock) == VKP_OK);
        vkp_socket_unref(sock);
    }
    CHECK(again.calls > 0);
    hooks.heal();
    vkp_registry_unref(std::exchange(again.registry, nullptr));
    vkp_test_env_deinit(&again.memory);
    CHECK(folder.is_empty());
}

// ---- files that change behind our back ----

TEST_CASE("socket edges: a file is removed only if device and inode are those we bound")
{
    vkp_test_folder folder;
    static std::string path;
    static void (*change)(vkp_file_id *);
    path = folder.file();
    change = nullptr;
    vkp_sys sys = *vkp_sys_get_default();
    sys.identify = [](const char *name, vkp_file_id *id) {
        const int result = vkp_sys_get_default()->identify(name, id);
        if (result == 0 && change != nullptr && path == name) {
            change(id);
        }
        return result;
    };
    vkp_test_registry registry(&sys);
    vkp_socket *sock = registry.make(path);
    SECTION("the device")
    {
        change = [](vkp_file_id *id) { id->device++; };
    }
    SECTION("the inode")
    {
        change = [](vkp_file_id *id) { id->inode++; };
    }
    vkp_socket_unref(sock);
    CHECK(folder.names() == std::vector<std::string>{"s"});
    CHECK(registry.stats().unlink_failures == 0); // it is not ours to remove
    CHECK(registry.count() == 0);
    CHECK(registry.fds_more() == 0);
    unlink(path.c_str());
}

TEST_CASE("socket edges: a lock file that is not ours any more is left alone")
{
    vkp_test_folder folder;
    vkp_test_registry registry;
    const std::string path = folder.file();
    const std::string lock = vkp_test_lock_of(path);
    vkp_socket *sock = registry.make(path);
    REQUIRE(unlink(lock.c_str()) == 0);
    SECTION("a file of somebody else")
    {
        vkp_test_write_file(lock);
        vkp_socket_unref(sock);
        CHECK(folder.names() == std::vector<std::string>{"s.lock"});
        CHECK(vkp_test_look(lock).st_size == 4);
    }
    SECTION("the lock of another program that serves the path now")
    {
        REQUIRE(unlink(path.c_str()) == 0);
        vkp_test_registry other;
        vkp_socket *theirs = other.make(path);
        vkp_socket_unref(sock);
        check_serves(other, theirs, path);
        vkp_socket_unref(theirs);
        CHECK(folder.is_empty());
    }
    SECTION("a directory")
    {
        REQUIRE(mkdir(lock.c_str(), 0700) == 0);
        vkp_socket_unref(sock);
        CHECK(S_ISDIR(vkp_test_look(lock).st_mode));
        rmdir(lock.c_str());
    }
    CHECK(registry.stats().unlink_failures == 0);
    CHECK(registry.fds_more() == 0);
}

TEST_CASE("socket edges: cleanup goes on when the folder itself is gone, or nothing may be removed")
{
    vkp_test_folder folder;
    vkp_test_hooks hooks;
    vkp_test_registry registry(hooks.sys());
    const std::string inner = folder.file("inner");
    const std::string path = inner + "/s";
    REQUIRE(mkdir(inner.c_str(), 0700) == 0);
    vkp_socket *sock = registry.make(path);
    SECTION("gone")
    {
        REQUIRE(unlink(path.c_str()) == 0);
        REQUIRE(unlink(vkp_test_lock_of(path).c_str()) == 0);
        REQUIRE(rmdir(inner.c_str()) == 0);
        vkp_socket_unref(sock);
        CHECK(registry.stats().unlink_failures == 0);
    }
    SECTION("the socket's file")
    {
        hooks.before = [&](const vkp_test_step &step) {
            return step.is(call::unlink, path) ? -EACCES : 0;
        };
        vkp_socket_unref(sock);
        CHECK(registry.stats().unlink_failures == 1);
        CHECK(registry.stats().unlink_errno == EACCES);
        CHECK(vkp_test_exists(path.c_str()));
        CHECK_FALSE(vkp_test_has_lock(path));
        hooks.heal();
        vkp_socket_unref(registry.make(path)); // dead now: it is taken over
        CHECK(registry.stats().taken_over == 1);
    }
    SECTION("both files, in a sweep, the last reason counts")
    {
        hooks.before = [&](const vkp_test_step &step) {
            return step.is(call::unlink, path) ? -EACCES : step.call == call::unlink ? -EROFS : 0;
        };
        CHECK(vkp_registry_cleanup_all(registry) == 1);
        vkp_socket_unref(sock);
        CHECK(registry.stats().unlink_failures == 2);
        CHECK(registry.stats().unlink_errno == EROFS);
        hooks.heal();
        vkp_socket_unref(registry.make(path));
    }
    CHECK(registry.count() == 0);
    CHECK_FALSE(vkp_test_exists(path.c_str()));
    CHECK_FALSE(vkp_test_has_lock(path));
    CHECK(registry.fds_more() == 0);
}

TEST_CASE("socket edges: a dead socket that was replaced after the look at it is left alone")
{
    vkp_test_folder folder;
    vkp_test_hooks hooks;
    vkp_test_registry registry(hooks.sys());
    const std::string path = folder.file();
    close(vkp_test_foreign_socket(path, 1));
    int theirs = -1;
    hooks.before = [&](const vkp_test_step &step) {
        if (step.call == call::close && theirs < 0) { // the probe is over: nobody answered
            CHECK(rename(path.c_str(), folder.file("dead").c_str()) == 0);
            theirs = vkp_test_foreign_socket(path, 4);
        }
        return 0;
    };
    vkp_socket *sock = nullptr;
    CHECK(get(registry, path, &sock) == VKP_ERR_IN_USE);
    hooks.heal();
    CHECK(theirs >= 0);
    CHECK(vkp_test_answers(path));
    CHECK(registry.stats().taken_over == 0);
    close(theirs);
    unlink(folder.file("dead").c_str());
    vkp_socket_unref(registry.make(path));
    CHECK(registry.stats().taken_over == 1);
    CHECK(folder.is_empty());
    CHECK(registry.fds_more() == 0);
}

// ---- checks of the files, in virtual time ----

namespace {

constexpr uint32_t check_ms = 1000;

// A registry with timers on a loop whose time is virtual, and what it told.
class Timed {
  public:
    struct Event {
        std::string path;
        vkp_socket_event event;
        vkp_status status;
    };

    explicit Timed(vkp_registry_config config, const vkp_sys *sys = nullptr)
        : loop(&vkp_backend_null), registry(with(config), sys)
    {
    }
    // Rounds until that much time has passed.
    void pass(uint64_t ms)
    {
        const uint64_t until = loop.now() + ms * 1000000;
        while (loop.now() < until) {
            loop.round(until);
        }
        loop.round();
    }
    std::vector<vkp_socket_event> kinds() const
    {
        std::vector<vkp_socket_event> found;
        for (const Event &each : events) {
            found.push_back(each.event);
        }
        return found;
    }

    std::vector<Event> events;
    std::function<void(vkp_socket *)> on_event;
    vkp_test_loop loop;
    vkp_test_registry registry;

  private:
    vkp_registry_config with(vkp_registry_config config)
    {
        config.loop = loop;
        config.user = this;
        config.on_event = [](void *user, vkp_socket *sock, vkp_socket_event event,
                             vkp_status status) {
            auto *self = static_cast<Timed *>(user);
            self->events.push_back({vkp_socket_get_path(sock), event, status});
            if (self->on_event) {
                self->on_event(sock);
            }
        };
        return config;
    }
};

vkp_registry_config checked(bool rebind)
{
    vkp_registry_config config = {};
    config.check_ms = check_ms;
    config.rebind = rebind;
    return config;
}

using kinds = std::vector<vkp_socket_event>;

} // namespace

TEST_CASE("socket edges: timers need a loop")
{
    vkp_registry *registry = nullptr;
    vkp_registry_config config = {};
    SECTION("linger")
    {
        config.linger_ms = 1;
    }
    SECTION("checks")
    {
        config.check_ms = 1;
    }
    CHECK(vkp_registry_open(&config, &registry) == VKP_ERR_INVALID);
    CHECK(registry == nullptr);
}

TEST_CASE("socket edges: a check finds a file that is gone or replaced, and tells once")
{
    vkp_test_folder folder;
    Timed timed(checked(false));
    const std::string path = folder.file();
    vkp_socket *other = timed.registry.make(folder.file("other"));
    vkp_socket *sock = timed.registry.make(path);
    timed.pass(10 * check_ms);
    CHECK(timed.events.empty());
    int theirs = -1;
    REQUIRE(unlink(path.c_str()) == 0);
    SECTION("gone")
    {
    }
    SECTION("replaced by a file")
    {
        vkp_test_write_file(path);
    }
    SECTION("replaced by a socket of somebody else")
    {
        theirs = vkp_test_foreign_socket(path, 4);
    }
    timed.pass(check_ms);
    CHECK(timed.kinds() == kinds{VKP_SOCKET_LOST});
    timed.pass(5 * check_ms);
    CHECK(timed.kinds() == kinds{VKP_SOCKET_LOST});
    CHECK(timed.events.at(0).path == path);
    CHECK(timed.registry.stats().lost == 1);
    CHECK(timed.registry.stats().rebound == 0);
    const bool stands = vkp_test_exists(path.c_str());
    vkp_socket_unref(sock);
    CHECK(vkp_test_exists(path.c_str()) == stands);
    if (theirs >= 0) {
        CHECK(vkp_test_answers(path));
        close(theirs);
    }
    unlink(path.c_str());
    vkp_socket_unref(other);
    timed.pass(5 * check_ms);
    CHECK(timed.events.size() == 1);
    CHECK(folder.is_empty());
}

TEST_CASE("socket edges: a lost file is bound again, for new clients of the same listener")
{
    vkp_test_folder folder;
    int accepts = 0;
    vkp_registry_config registry_config = checked(true);
    registry_config.mode = 0640;
    Timed timed(registry_config);
    const std::string path = folder.file();
    const std::string address = "unix:" + path;
    vkp_socket *sock = timed.registry.make(path);
    static const vkp_conn_ops ops = [] {
        vkp_conn_ops table = {};
        table.on_data = [](vkp_conn *conn, void *, const vkp_bytes *in) {
            return vkp_conn_send(conn, in) == VKP_OK ? in->len : 0;
        };
        return table;
    }();
    vkp_listener_config config = {};
    config.socket = sock;
    config.conn.ops = &ops;
    config.conn.user = &accepts;
    config.on_accept = [](void *user, vkp_conn *) { ++*static_cast<int *>(user); };
    vkp_listener *listener = nullptr;
    REQUIRE(vkp_listener_open(timed.loop, &config, &listener) == VKP_OK);
    vkp_socket_unref(sock); // the listener's now
    const auto say = [&](vkp_test_peer *peer) {
        REQUIRE(vkp_test_peer_send_text(peer, "+hello\r\n"));
        return vkp_test_frame_on(timed.loop, peer);
    };
    vkp_test_peer *early = vkp_test_peer_open(address.c_str());
    CHECK(say(early) == "+hello\r\n");
    for (int i = 1; i <= 3; i++) {
        REQUIRE(unlink(path.c_str()) == 0);
        if (i == 2) { // the lock file went with it
            REQUIRE(unlink(vkp_test_lock_of(path).c_str()) == 0);
        }
        CHECK(vkp_test_connect(address.c_str()) == -1);
        timed.pass(check_ms);
        CHECK(timed.kinds() == kinds{VKP_SOCKET_LOST, VKP_SOCKET_REBOUND});
        timed.events.clear();
        CHECK(vkp_test_mode(path) == 0640);
        CHECK(vkp_test_has_lock(path));
        CHECK(vkp_test_ask_elsewhere(path) == VKP_ERR_IN_USE);
        vkp_test_peer *late = vkp_test_peer_open(address.c_str());
        CHECK(say(late) == "+hello\r\n");
        CHECK(say(early) == "+hello\r\n"); // who was connected stays
        vkp_test_peer_close(late);
        CHECK(timed.registry.stats().lost == static_cast<uint64_t>(i));
        CHECK(timed.registry.stats().rebound == static_cast<uint64_t>(i));
    }
    CHECK(accepts == 4);
    timed.pass(3 * check_ms);
    CHECK(timed.events.empty());
    vkp_test_peer_close(early);
    vkp_listener_unref(listener);
    CHECK(folder.is_empty());
    CHECK(timed.registry.count() == 0);
}

TEST_CASE("socket edges: a lost path that somebody else took is not taken back")
{
    vkp_test_folder folder;
    Timed timed(checked(true));
    const std::string path = folder.file();
    vkp_socket *sock = timed.registry.make(path);
    REQUIRE(unlink(path.c_str()) == 0);
    vkp_status wanted = VKP_OK;
    const std::function<void()> leave = [&]() -> std::function<void()> {
        const int kind = GENERATE(0, 1, 2, 3);
        if (kind == 0) {
            wanted = VKP_ERR_EXISTS;
            vkp_test_write_file(path);
            return [&] { unlink(path.c_str()); };
        }
        if (kind == 1) {
            wanted = VKP_ERR_EXISTS;
            REQUIRE(symlink("nowhere", path.c_str()) == 0);
            return [&] { unlink(path.c_str()); };
        }
        wanted = VKP_ERR_IN_USE;
        if (kind == 2) { // a server that knows no lock files
            const int fd = vkp_test_foreign_socket(path, 4);
            return [fd] { close(fd); };
        }
        // One that does, and found ours removed.
        REQUIRE(unlink(vkp_test_lock_of(path).c_str()) == 0);
        auto other = std::make_shared<vkp_test_registry>();
        vkp_socket *theirs = other->make(path);
        return [other, theirs] { vkp_socket_unref(theirs); };
    }();
    const ino_t before = vkp_test_look(path).st_ino;
    timed.pass(check_ms);
    CHECK(timed.kinds() == kinds{VKP_SOCKET_LOST, VKP_SOCKET_BLOCKED});
    CHECK(timed.events.back().status == wanted);
    timed.pass(3 * check_ms);
    CHECK(timed.registry.stats().lost == 1);
    CHECK(timed.registry.stats().rebound == 0);
    CHECK(vkp_test_look(path).st_ino == before);
    for (size_t i = 1; i < timed.events.size(); i++) {
        CHECK(timed.events[i].event == VKP_SOCKET_BLOCKED);
        CHECK(timed.events[i].status == wanted);
    }
    leave();
    timed.events.clear();
    timed.pass(check_ms);
    CHECK(timed.kinds() == kinds{VKP_SOCKET_REBOUND});
    CHECK(timed.registry.stats().rebound == 1);
    check_serves(timed.registry, sock, path);
    vkp_socket_unref(sock);
    CHECK(folder.is_empty());
}

TEST_CASE("socket edges: a file that comes back is ours again, and may be lost once more")
{
    vkp_test_folder folder;
    Timed timed(checked(false));
    const std::string path = folder.file();
    const std::string away = folder.file("away");
    vkp_socket *sock = timed.registry.make(path);
    for (uint64_t i = 1; i <= 3; i++) {
        timed.events.clear();
        REQUIRE(rename(path.c_str(), away.c_str()) == 0);
        timed.pass(check_ms);
        CHECK(timed.kinds() == kinds{VKP_SOCKET_LOST});
        CHECK(timed.registry.stats().lost == i);
        REQUIRE(rename(away.c_str(), path.c_str()) == 0);
        timed.pass(2 * check_ms);
        CHECK(timed.events.size() == 1);
        check_serves(timed.registry, sock, path);
    }
    vkp_socket_unref(sock);
    CHECK(folder.is_empty());
}

TEST_CASE("socket edges: a check that cannot look finds nothing lost")
{
    vkp_test_folder folder;
    vkp_test_hooks hooks;
    Timed timed(checked(GENERATE(false, true)), hooks.sys());
    const std::string path = folder.file();
    vkp_socket *sock = timed.registry.make(path);
    const ino_t inode = vkp_test_look(path).st_ino;
    int looked = 0;
    hooks.before = [&](const vkp_test_step &step) {
        if (step.is(call::identify, path)) {
            looked++;
            return -EACCES;
        }
        return 0;
    };
    timed.pass(3 * check_ms);
    hooks.heal();
    CHECK(looked >= 3);
    CHECK(timed.events.empty());
    CHECK(timed.registry.stats().lost == 0);
    CHECK(vkp_test_look(path).st_ino == inode);
    vkp_socket_unref(sock);
    CHECK(folder.is_empty());
}

TEST_CASE("socket edges: nothing is bound again without the lock, whatever its inode's number is")
{
    // Somebody else holds the lock file, and it got the number that ours had: numbers are used
    // again. That it is ours is known by the descriptor, not by the number.
    vkp_test_folder folder;
    static std::string lock;
    static vkp_file_id ours;
    static bool lies;
    lies = false;
    const std::string path = folder.file();
    lock = vkp_test_lock_of(path);
    vkp_sys sys = *vkp_sys_get_default();
    sys.identify = [](const char *name, vkp_file_id *id) {
        const int result = vkp_sys_get_default()->identify(name, id);
        if (result == 0 && lies && lock == name) {
            *id = ours;
        }
        return result;
    };
    Timed timed(checked(true), &sys);
    vkp_socket *sock = timed.registry.make(path);
    REQUIRE(vkp_sys_get_default()->identify(lock.c_str(), &ours) == 0);
    REQUIRE(unlink(path.c_str()) == 0);
    REQUIRE(unlink(lock.c_str()) == 0);
    vkp_file_id theirs = {};
    const int held = vkp_sys_get_default()->lock_file(lock.c_str(), &theirs);
    REQUIRE(held >= 0);
    timed.pass(check_ms);
    CHECK(timed.kinds() == kinds{VKP_SOCKET_LOST, VKP_SOCKET_BLOCKED});
    lies = true;
    timed.pass(2 * check_ms);
    CHECK(timed.kinds() == kinds{VKP_SOCKET_LOST, VKP_SOCKET_BLOCKED});
    CHECK_FALSE(vkp_test_exists(path.c_str()));
    vkp_registry_unlink_all(timed.registry);
    vkp_socket_unref(sock);
    CHECK(folder.names() == std::vector<std::string>{"s.lock"}); // theirs
    close(held);
    unlink(lock.c_str());
}

TEST_CASE("socket edges: a dead socket in the place of a lost file makes way")
{
    vkp_test_folder folder;
    Timed timed(checked(true));
    const std::string path = folder.file();
    vkp_socket *sock = timed.registry.make(path);
    REQUIRE(unlink(path.c_str()) == 0);
    close(vkp_test_foreign_socket(path, 1));
    timed.pass(check_ms);
    CHECK(timed.kinds() == kinds{VKP_SOCKET_LOST, VKP_SOCKET_REBOUND});
    CHECK(timed.registry.stats().taken_over == 0); // that counts sockets made, and this is none
    check_serves(timed.registry, sock, path);
    vkp_registry_unlink_all(timed.registry); // a crash removes the new file as it did the old one
    CHECK(folder.is_empty());
    vkp_socket_unref(sock);
    CHECK(timed.registry.stats().unlink_failures == 0);
}

TEST_CASE("socket edges: the files of sockets that linger are checked, too")
{
    vkp_test_folder folder;
    vkp_registry_config config = checked(true);
    config.linger_ms = 10 * check_ms;
    Timed timed(config);
    const std::string path = folder.file();
    vkp_socket_unref(timed.registry.make(path));
    timed.pass(1);
    REQUIRE(unlink(path.c_str()) == 0);
    timed.pass(check_ms);
    CHECK(timed.registry.stats().rebound == 1);
    CHECK(vkp_test_answers(path));
    timed.pass(9 * check_ms);
    CHECK(folder.is_empty());
    CHECK(timed.registry.count() == 0);
}

TEST_CASE("socket edges: sockets may end, begin and be swept inside of an event")
{
    vkp_test_folder folder;
    const bool rebind = GENERATE(false, true);
    Timed timed(checked(rebind));
    const std::string path = folder.file();
    vkp_socket *sock = timed.registry.make(path);
    vkp_socket *made = nullptr;
    int calls = 0;
    timed.on_event = [&](vkp_socket *) {
        if (calls++ == 0) {
            vkp_socket_unref(sock);
            made = timed.registry.make(folder.file("made"));
            CHECK(vkp_registry_cleanup_all(timed.registry) <= 2);
        }
    };
    REQUIRE(unlink(path.c_str()) == 0);
    timed.pass(5 * check_ms);
    CHECK(calls >= 1);
    CHECK(timed.registry.count() == 0);
    vkp_socket_unref(made);
    CHECK(folder.is_empty());
    CHECK(timed.registry.stats().live == 0);
}

TEST_CASE("socket edges: every call of a rebind may fail; a later check makes up for it")
{
    const int error = GENERATE(EACCES, EMFILE, ENOMEM, EIO);
    INFO(strerror(error));
    vkp_test_folder folder;
    vkp_test_hooks hooks;
    Timed timed(checked(true), hooks.sys());
    const std::string path = folder.file();
    vkp_socket *sock = timed.registry.make(path);
    const int fds = vkp_test_fd_count();
    const size_t blocks = vkp_test_env_live_blocks(&timed.registry.test);
    int k = 1;
    int blocked = 0;
    for (bool failed = true; failed; k++) {
        INFO("call " << k);
        REQUIRE(unlink(path.c_str()) == 0);
        if (k % 2 == 0) {
            REQUIRE(unlink(vkp_test_lock_of(path).c_str()) == 0);
        }
        timed.events.clear();
        hooks.fail(k, error);
        timed.pass(check_ms);
        failed = hooks.failed();
        hooks.heal();
        for (const Timed::Event &each : timed.events) {
            if (each.event == VKP_SOCKET_BLOCKED) {
                blocked++;
                CHECK((each.status == VKP_ERR_SYS || each.status == VKP_ERR_NOMEM ||
                       each.status == VKP_ERR_IN_USE || each.status == VKP_ERR_EXISTS));
            }
        }
        timed.pass(check_ms);
        timed.pass(check_ms);
        check_serves(timed.registry, sock, path);
        CHECK(vkp_test_fd_count() == fds);
        CHECK(vkp_test_env_live_blocks(&timed.registry.test) == blocks);
    }
    CHECK(k > 5);
    CHECK(blocked >= 3);
    vkp_socket_unref(sock);
    CHECK(folder.is_empty());
}

TEST_CASE("socket edges: every allocation of a rebind may fail; a later check makes up for it")
{
    vkp_test_folder folder;
    Timed timed(checked(true));
    const std::string path = folder.file();
    vkp_socket *sock = timed.registry.make(path);
    timed.pass(1); // the checks' timer is there
    const int fds = vkp_test_fd_count();
    for (uint64_t k = 1; k < 6; k++) {
        INFO("allocation " << k);
        REQUIRE(unlink(path.c_str()) == 0);
        vkp_test_env_fault(&timed.registry.test, VKP_TEST_FAULT_FROM, k);
        vkp_test_env_fault(&timed.loop.test, VKP_TEST_FAULT_FROM, k);
        timed.pass(check_ms);
        vkp_test_env_fault(&timed.registry.test, VKP_TEST_FAULT_NONE, 0);
        vkp_test_env_fault(&timed.loop.test, VKP_TEST_FAULT_NONE, 0);
        timed.pass(check_ms);
        check_serves(timed.registry, sock, path);
        CHECK(vkp_test_fd_count() == fds);
    }
    vkp_socket_unref(sock);
    CHECK(folder.is_empty());
}

TEST_CASE("socket edges: checks that found no memory for their timer begin later")
{
    vkp_test_folder folder;
    Timed timed(checked(false));
    const std::string path = folder.file();
    vkp_socket *sock = timed.registry.make(path);
    vkp_test_env_fault(&timed.loop.test, VKP_TEST_FAULT_FROM, 1);
    timed.pass(1);
    vkp_test_env_fault(&timed.loop.test, VKP_TEST_FAULT_NONE, 0);
    vkp_socket_unref(timed.registry.make(folder.file("other"))); // somebody comes by
    timed.pass(1);
    REQUIRE(unlink(path.c_str()) == 0);
    timed.pass(check_ms);
    CHECK(timed.kinds() == kinds{VKP_SOCKET_LOST});
    vkp_socket_unref(sock);
    CHECK(folder.is_empty());
}

// ---- names ----

TEST_CASE("socket edges: text that holds a NUL, or nothing, is no path")
{
    vkp_test_folder folder;
    vkp_test_registry registry;
    const std::string path = folder.file();
    vkp_socket *sock = nullptr;
    const auto ask = [&](const std::string &text) {
        return vkp_socket_open(registry, vkp_str{text.data(), text.size()}, &sock);
    };
    CHECK(ask(path + std::string("\0x", 2)) == VKP_ERR_INVALID);
    CHECK(ask(path + std::string("\0", 1)) == VKP_ERR_INVALID);
    CHECK(ask(std::string("\0", 1) + path) == VKP_ERR_INVALID);
    CHECK(ask(std::string()) == VKP_ERR_INVALID);
    CHECK(ask("..") == VKP_ERR_INVALID);
    CHECK(ask(folder.path() + "/../s") == VKP_ERR_INVALID);
    CHECK(ask(path + std::string(200, 'p')) == VKP_ERR_LIMIT);
    CHECK(vkp_socket_open(nullptr, vkp_str_of(path.c_str()), &sock) == VKP_ERR_INVALID);
    CHECK(vkp_socket_open(registry, vkp_str_of(path.c_str()), nullptr) == VKP_ERR_INVALID);
    CHECK(sock == nullptr);
    CHECK(folder.is_empty());

    // Text is used up to its length, whatever follows.
    const std::string longer = path + "longer";
    REQUIRE(vkp_socket_open(registry, vkp_str{longer.data(), path.size()}, &sock) == VKP_OK);
    CHECK(vkp_socket_get_path(sock) == path);
    CHECK(registry.make(path) == sock);
    CHECK(folder.names() == std::vector<std::string>{"s", "s.lock"});
    vkp_socket_unref(sock);
    vkp_socket_unref(sock);
    CHECK(folder.is_empty());
    CHECK(registry.fds_more() == 0);
}

TEST_CASE("socket edges: names of the registry's own are unique, in the folder it was given")
{
    vkp_test_folder folder;
    std::string text = folder.path();
    vkp_registry_config config = {};
    config.folder = vkp_str_of(text.c_str());
    vkp_test_registry one(config);
    vkp_test_registry two(config);
    text.assign(text.size(), 'x'); // it was copied
    std::set<std::string> paths;
    std::vector<vkp_socket *> socks;
    for (int i = 0; i < 20; i++) {
        socks.push_back((i % 2 == 0 ? one : two).make_unique());
        const std::string path = vkp_socket_get_path(socks.back());
        CHECK(path.compare(0, folder.path().size() + 1, folder.path() + "/") == 0);
        CHECK(vkp_test_mode(path) == 0600);
        paths.insert(path);
    }
    CHECK(paths.size() == 20);
    CHECK(folder.names().size() == 40);
    vkp_socket *again = nullptr;
    REQUIRE(get(one, vkp_socket_get_path(socks[0]), &again) == VKP_OK);
    CHECK(again == socks[0]);
    vkp_socket_unref(again);
    for (vkp_socket *sock : socks) {
        vkp_socket_unref(sock);
    }
    CHECK(folder.is_empty());
}

TEST_CASE("socket edges: a unique name that chance gave before is not given twice")
{
    vkp_test_folder folder;
    vkp_test_hooks hooks;
    vkp_registry_config config = {};
    config.folder = vkp_str_of(folder.path().c_str());
    uint64_t repeats = 0;
    uint64_t number = 100;
    hooks.random = [&] {
        if (repeats > 0) {
            repeats--;
            return uint64_t{7};
        }
        return number++;
    };
    vkp_test_registry one(config, hooks.sys());
    vkp_test_registry two(config, hooks.sys());
    std::set<std::string> paths;
    std::vector<vkp_socket *> socks;
    for (vkp_test_registry *registry : {&one, &one, &two, &two}) {
        repeats = 4; // in the same registry, and in another one
        socks.push_back(registry->make_unique());
        CHECK(vkp_socket_get_ref_count(socks.back()) == 1);
        paths.insert(vkp_socket_get_path(socks.back()));
    }
    CHECK(paths.size() == 4);
    // Chance that is broken for good is an error, not a loop.
    vkp_socket *sock = nullptr;
    repeats = UINT64_MAX;
    CHECK(vkp_socket_open(one, vkp_str_of(nullptr), &sock) == VKP_ERR_EXISTS);
    CHECK(vkp_socket_open(two, vkp_str_of(nullptr), &sock) == VKP_ERR_IN_USE);
    CHECK(sock == nullptr);
    for (vkp_socket *each : socks) {
        vkp_socket_unref(each);
    }
    CHECK(folder.is_empty());
}

TEST_CASE("socket edges: a folder in which no unique name can be")
{
    vkp_test_folder folder;
    vkp_registry_config config = {};
    vkp_socket *sock = nullptr;
    SECTION("too long for an address")
    {
        const size_t most = sizeof(sockaddr_un::sun_path) - 1;
        std::string deep = folder.path() + "/";
        deep += std::string(most - deep.size() - 3, 'd'); // room for no name worth the word
        REQUIRE(mkdir(deep.c_str(), 0700) == 0);
        config.folder = vkp_str_of(deep.c_str());
        vkp_test_registry registry(config);
        CHECK(vkp_socket_open(registry, vkp_str_of(nullptr), &sock) == VKP_ERR_LIMIT);
        CHECK(vkp_test_env_logged(&registry.test, std::to_string(most).c_str()));
        CHECK(rmdir(deep.c_str()) == 0); // empty
        CHECK(registry.fds_more() == 0);
    }
    SECTION("longer than any address")
    {
        const std::string deep = "/" + std::string(5000, 'd');
        config.folder = vkp_str_of(deep.c_str());
        vkp_test_registry registry(config);
        CHECK(vkp_socket_open(registry, vkp_str_of(nullptr), &sock) == VKP_ERR_LIMIT);
    }
    SECTION("not there")
    {
        const std::string nowhere = folder.file("nowhere");
        config.folder = vkp_str_of(nowhere.c_str());
        vkp_test_registry registry(config);
        errno = 0;
        CHECK(vkp_socket_open(registry, vkp_str_of(nullptr), &sock) == VKP_ERR_SYS);
        CHECK(errno == ENOENT);
        CHECK(registry.fds_more() == 0);
    }
    CHECK(sock == nullptr);
    CHECK(folder.is_empty());
}

TEST_CASE("socket edges: two registries of one process know nothing of each other")
{
    vkp_test_folder folder;
    vkp_test_registry one;
    vkp_test_registry two;
    const std::string path = folder.file();
    vkp_socket *sock = one.make(path);
    vkp_socket *none = nullptr;
    CHECK(vkp_socket_find(two, vkp_str_of(path.c_str()), &none) == VKP_ERR_NOT_FOUND);
    CHECK_FALSE(vkp_registry_is_active(two, vkp_str_of(path.c_str())));
    CHECK(get(two, path, &none) == VKP_ERR_IN_USE);
    CHECK(vkp_registry_cleanup_all(two) == 0);
    vkp_registry_unlink_all(two);
    check_serves(one, sock, path);
    vkp_socket_unref(sock);
    sock = two.make(path);
    CHECK(vkp_registry_cleanup_all(one) == 0);
    vkp_registry_unlink_all(one);
    check_serves(two, sock, path);
    vkp_socket_unref(sock);
    CHECK(folder.is_empty());
}

// ---- abstract names ----

namespace {

std::string abstract_name()
{
    static int number = 0;
    return "@vkp-test-" + std::to_string(getpid()) + "-" + std::to_string(++number);
}

vkp_registry_config abstract_config()
{
    vkp_registry_config config = {};
    config.abstract_names = true;
    return config;
}

} // namespace

#ifdef __linux__
namespace {

// A socket at the abstract name: bound to it, or connected to it; -1 with errno.
int abstract_socket(const std::string &name, bool binds)
{
    sockaddr_un address;
    std::memset(&address, 0, sizeof address);
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path + 1, name.data() + 1, name.size() - 1);
    const socklen_t bytes = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + name.size());
    const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const auto *at = reinterpret_cast<const sockaddr *>(&address);
    if ((binds ? bind(fd, at, bytes) : connect(fd, at, bytes)) != 0) {
        const int error = errno;
        close(fd);
        errno = error;
        return -1;
    }
    return fd;
}

bool abstract_answers(const std::string &name)
{
    const int fd = abstract_socket(name, false);
    if (fd >= 0) {
        close(fd);
    }
    return fd >= 0;
}

} // namespace

TEST_CASE("socket edges: an abstract name has no file, and is gone with its last reference")
{
    vkp_test_folder folder;
    vkp_test_hooks hooks;
    std::vector<std::string> touched;
    hooks.before = [&](const vkp_test_step &step) {
        if (step.call == call::lock_file || step.call == call::unlink ||
            step.call == call::identify || step.call == call::chmod) {
            touched.push_back(step.path);
        }
        return 0;
    };
    vkp_test_registry registry(abstract_config(), hooks.sys());
    const std::string name = abstract_name();
    vkp_socket *sock = registry.make(name);
    CHECK(vkp_socket_get_path(sock) == name);
    CHECK(vkp_socket_is_active(sock));
    CHECK(vkp_registry_is_active(registry, vkp_str_of(name.c_str())));
    CHECK(registry.make(name) == sock);
    CHECK(abstract_answers(name));
    CHECK_FALSE(vkp_test_exists(name.c_str()));
    CHECK_FALSE(vkp_test_has_lock(name));
    vkp_socket_unref(sock);
    CHECK(abstract_answers(name));
    vkp_registry_unlink_all(registry);
    vkp_socket_unref(sock);
    CHECK_FALSE(abstract_answers(name));
    CHECK(touched.empty());
    CHECK(registry.count() == 0);
    CHECK(registry.stats().unlink_failures == 0);
    CHECK(registry.fds_more() == 0);
    const int fd = abstract_socket(name, true); // the name is free
    CHECK(fd >= 0);
    close(fd);
    // The flag is for names with '@'; paths are files as ever.
    const std::string path = folder.file();
    sock = registry.make(path);
    check_serves(registry, sock, path);
    vkp_socket_unref(sock);
    CHECK(folder.is_empty());
}

TEST_CASE("socket edges: an abstract name asked for while its last reference goes, at every step")
{
    // The name is free when the descriptor is closed: nobody may look for it before.
    const vkp_test_watchdog watchdog;
    int k = 1;
    for (bool stopped = true; stopped; k++) {
        INFO("before call " << k << " of the last unref");
        vkp_test_hooks hooks;
        vkp_test_registry registry(abstract_config(), hooks.sys());
        vkp_test_stop stop;
        std::atomic<bool> ended{false};
        std::atomic<bool> got{false};
        const std::string name = abstract_name();
        vkp_socket *old = registry.make(name);
        vkp_socket *fresh = nullptr;
        int calls = 0;
        hooks.before = [&](const vkp_test_step &) {
            if (is_counted && ++calls == k) {
                stop.arrive();
            }
            return 0;
        };
        std::thread last([&] {
            is_counted = true;
            vkp_socket_unref(old);
            ended = true;
        });
        stopped = stop.await_arrival(ended);
        std::thread next([&] {
            fresh = registry.make(name);
            got = true;
        });
        vkp_test_let_run([&] { return got.load(); });
        stop.let_go();
        last.join();
        next.join();
        CHECK(vkp_socket_is_active(fresh));
        CHECK(abstract_answers(name));
        CHECK(registry.count() == 1);
        vkp_socket_unref(fresh);
        CHECK_FALSE(abstract_answers(name));
        CHECK(registry.fds_more() == 0);
    }
    CHECK(k > 3);
}

TEST_CASE("socket edges: an abstract name of somebody else is in use")
{
    vkp_test_registry registry(abstract_config());
    vkp_socket *sock = nullptr;
    const std::string name = abstract_name();
    SECTION("another program's")
    {
        const int fd = abstract_socket(name, true);
        REQUIRE(fd >= 0);
        CHECK(get(registry, name, &sock) == VKP_ERR_IN_USE);
        close(fd);
    }
    SECTION("another registry's")
    {
        vkp_test_registry other(abstract_config());
        vkp_socket *theirs = other.make(name);
        CHECK(get(registry, name, &sock) == VKP_ERR_IN_USE);
        CHECK(abstract_answers(name));
        vkp_socket_unref(theirs);
    }
    SECTION("another process's, until that dies")
    {
        vkp_test_child child([&] {
            vkp_registry *theirs = nullptr;
            vkp_socket *held = nullptr;
            const vkp_registry_config config = abstract_config();
            VKP_TEST_EXPECT(vkp_registry_open(&config, &theirs) == VKP_OK);
            VKP_TEST_EXPECT(get(theirs, name, &held) == VKP_OK);
            vkp_test_child::say('s');
            return static_cast<int>(vkp_test_child::listen());
        });
        REQUIRE(child.hear() == 's');
        CHECK(get(registry, name, &sock) == VKP_ERR_IN_USE);
        CHECK(child.end(SIGKILL) == 128 + SIGKILL);
    }
    CHECK(sock == nullptr);
    CHECK(registry.fds_more() == 0);
    vkp_socket_unref(registry.make(name));
    CHECK(registry.fds_more() == 0);
}

TEST_CASE("socket edges: abstract names that cannot be")
{
    vkp_test_registry registry(abstract_config());
    vkp_socket *sock = nullptr;
    const size_t most = sizeof(sockaddr_un::sun_path) - 1; // and the NUL, which '@' stands for
    std::string name = abstract_name();
    name += std::string(1 + most - name.size(), 'n');
    sock = registry.make(name);
    CHECK(abstract_answers(name)); // whole, not shortened
    vkp_socket_unref(std::exchange(sock, nullptr));
    name += 'n';
    CHECK(get(registry, name, &sock) == VKP_ERR_LIMIT);
    CHECK(vkp_test_env_logged(&registry.test, std::to_string(most).c_str()));
    CHECK(get(registry, "@", &sock) == VKP_ERR_INVALID);
    const int fd = abstract_socket(abstract_name(), true);
    CHECK(vkp_socket_adopt(registry, vkp_str_of(abstract_name().c_str()), fd, &sock) ==
          VKP_ERR_UNSUPPORTED);
    CHECK(fcntl(fd, F_GETFD) >= 0);
    close(fd);
    CHECK(sock == nullptr);
    CHECK(registry.fds_more() == 0);
}

TEST_CASE("socket edges: checks, sweeps and unlink_all pass over abstract names")
{
    vkp_registry_config config = checked(true);
    config.abstract_names = true;
    Timed timed(config);
    const std::string name = abstract_name();
    vkp_socket *sock = timed.registry.make(name);
    timed.pass(3 * check_ms);
    CHECK(timed.events.empty());
    vkp_registry_unlink_all(timed.registry);
    CHECK(abstract_answers(name));
    CHECK(vkp_registry_cleanup_all(timed.registry) == 1);
    CHECK_FALSE(abstract_answers(name));
    vkp_socket_unref(sock);
    CHECK(timed.registry.stats().unlink_failures == 0);
}
#else
TEST_CASE("socket edges: abstract names are Linux's alone")
{
    vkp_test_registry registry(abstract_config());
    vkp_socket *sock = nullptr;
    CHECK(get(registry, abstract_name(), &sock) == VKP_ERR_UNSUPPORTED);
    CHECK(sock == nullptr);
    CHECK(registry.fds_more() == 0);
}
#endif

// ---- limits ----

TEST_CASE("socket edges: a registry takes as many sockets as it may, those that linger included")
{
    vkp_test_folder folder;
    vkp_registry_config config = {};
    config.max_sockets = 2;
    config.linger_ms = 1000;
    Timed timed(config);
    vkp_test_registry &registry = timed.registry;
    vkp_socket *one = registry.make(folder.file("1"));
    vkp_socket *two = registry.make(folder.file("2"));
    vkp_socket *sock = nullptr;
    CHECK(get(registry, folder.file("3"), &sock) == VKP_ERR_LIMIT);
    CHECK(vkp_socket_open(registry, vkp_str_of(nullptr), &sock) == VKP_ERR_LIMIT);
    const int fd = vkp_test_foreign_socket(folder.file("3"), 1);
    CHECK(vkp_socket_adopt(registry, vkp_str_of(folder.file("3").c_str()), fd, &sock) ==
          VKP_ERR_LIMIT);
    CHECK(sock == nullptr);
    close(fd);
    unlink(folder.file("3").c_str());
    CHECK(folder.names().size() == 4);
    CHECK(registry.make(folder.file("1")) == one); // that is no new one
    vkp_socket_unref(one);
    vkp_socket_unref(one);
    CHECK(get(registry, folder.file("3"), &sock) == VKP_ERR_LIMIT); // it lingers
    timed.pass(1000);
    sock = registry.make(folder.file("3"));
    CHECK(get(registry, folder.file("1"), &one) == VKP_ERR_LIMIT);
    CHECK(vkp_registry_cleanup_all(registry) == 2);
    one = registry.make(folder.file("1")); // what was swept does not count, held or not
    vkp_socket_unref(one);
    vkp_socket_unref(two);
    vkp_socket_unref(sock);
    timed.pass(1000);
    CHECK(folder.is_empty());
}

TEST_CASE("socket edges: a creation that failed counts against no limit, and takes no memory")
{
    vkp_test_folder folder;
    vkp_registry_config config = {};
    config.max_sockets = 1;
    vkp_test_registry registry(config);
    vkp_socket *sock = nullptr;
    size_t bytes = 0;
    for (int i = 0; i < 20; i++) {
        CHECK(get(registry, folder.file("nowhere/s"), &sock) == VKP_ERR_SYS);
        if (i == 1) {
            bytes = vkp_test_env_live_bytes(&registry.test);
        }
    }
    CHECK(vkp_test_env_live_bytes(&registry.test) == bytes);
    CHECK(registry.stats().created == 0);
    vkp_socket_unref(registry.make(folder.file()));
    CHECK(folder.is_empty());
}

TEST_CASE("socket edges: a socket has as many references as it may, and says so in every way")
{
    vkp_test_folder folder;
    vkp_registry_config config = {};
    config.max_references = 3;
    vkp_test_registry registry(config);
    const std::string path = folder.file();
    vkp_socket *sock = registry.make(path);
    const vkp_weak_socket weak = vkp_socket_downgrade(sock);
    vkp_socket *more = nullptr;
    CHECK(vkp_socket_ref(sock) == sock);
    CHECK(vkp_socket_ref(sock) == sock);
    for (int i = 0; i < 3; i++) {
        CHECK(vkp_socket_ref(sock) == nullptr);
        CHECK(get(registry, path, &more) == VKP_ERR_LIMIT);
        CHECK(vkp_socket_find(registry, vkp_str_of(path.c_str()), &more) == VKP_ERR_LIMIT);
        CHECK(vkp_socket_upgrade(&weak, &more) == VKP_ERR_LIMIT);
        CHECK(more == nullptr);
        CHECK(vkp_socket_get_ref_count(sock) == 3);
    }
    check_serves(registry, sock, path);
    vkp_socket_unref(sock);
    CHECK(vkp_socket_upgrade(&weak, &more) == VKP_OK);
    CHECK(vkp_socket_ref(sock) == nullptr);
    for (int i = 0; i < 3; i++) {
        CHECK(vkp_test_exists(path.c_str()));
        vkp_socket_unref(sock);
    }
    CHECK(registry.count() == 0);
    CHECK(folder.is_empty());
}

TEST_CASE("socket edges: threads at the limit of references never get over it")
{
    constexpr int limit = 5;
    vkp_test_folder folder;
    vkp_registry_config config = {};
    config.max_references = limit;
    vkp_test_registry registry(config);
    const std::string path = folder.file();
    vkp_socket *sock = registry.make(path);
    const vkp_weak_socket weak = vkp_socket_downgrade(sock);
    std::atomic<int> held{1};
    std::atomic<int> over{0};
    std::atomic<int> wrong{0};
    vkp_test_run_threads(8, [&](int i) {
        for (int round = 0; round < 2000; round++) {
            vkp_socket *mine = nullptr;
            vkp_status status = VKP_OK;
            if (i % 3 == 0) {
                mine = vkp_socket_ref(sock);
            } else if (i % 3 == 1) {
                status = vkp_socket_upgrade(&weak, &mine);
            } else {
                status = get(registry, path, &mine);
            }
            if (mine == nullptr) {
                wrong += status == VKP_OK || status == VKP_ERR_LIMIT ? 0 : 1;
                continue;
            }
            over += held.fetch_add(1) >= limit ? 1 : 0;
            held--;
            vkp_socket_unref(mine);
        }
    });
    CHECK(over.load() == 0);
    CHECK(wrong.load() == 0);
    CHECK(vkp_socket_get_ref_count(sock) == 1);
    for (int i = 1; i < limit; i++) { // none was lost to those that were refused
        CHECK(vkp_socket_ref(sock) == sock);
    }
    CHECK(vkp_socket_ref(sock) == nullptr);
    for (int i = 0; i < limit; i++) {
        vkp_socket_unref(sock);
    }
    CHECK(folder.is_empty());
}

TEST_CASE("socket edges: a limit beyond what can be counted is what can be counted")
{
    vkp_test_folder folder;
    vkp_registry_config config = {};
    config.max_references = SIZE_MAX;
    config.max_sockets = SIZE_MAX;
    vkp_test_registry registry(config);
    vkp_socket *sock = registry.make(folder.file());
    CHECK(vkp_socket_ref(sock) == sock);
    vkp_socket_unref(sock);
    vkp_socket_unref(sock);
    CHECK(folder.is_empty());
}

// ---- linger ----

namespace {

constexpr uint32_t linger_ms = 1000;

vkp_registry_config lingering()
{
    vkp_registry_config config = {};
    config.linger_ms = linger_ms;
    return config;
}

} // namespace

TEST_CASE("socket edges: a socket lingers after its last reference, and then ends")
{
    vkp_test_folder folder;
    Timed timed(lingering());
    vkp_test_registry &registry = timed.registry;
    const std::string path = folder.file();
    vkp_socket_unref(registry.make(path));
    timed.pass(linger_ms - 1);
    CHECK(vkp_test_answers(path));
    CHECK(vkp_test_has_lock(path));
    CHECK(registry.count() == 1);
    CHECK(vkp_registry_is_active(registry, vkp_str_of(path.c_str())));
    CHECK(registry.stats().live == 1);
    CHECK(registry.stats().references == 0);
    CHECK(registry.stats().ended == 0);
    timed.pass(1);
    CHECK(folder.is_empty());
    CHECK(registry.count() == 0);
    CHECK_FALSE(vkp_registry_is_active(registry, vkp_str_of(path.c_str())));
    CHECK(registry.stats().live == 0);
    CHECK(registry.stats().ended == 1);
    CHECK(registry.stats().revived == 0);
    CHECK(registry.fds_more() == 0);
}

TEST_CASE("socket edges: a socket that lingers is revived by its name and by a weak handle")
{
    vkp_test_folder folder;
    Timed timed(lingering());
    vkp_test_registry &registry = timed.registry;
    const std::string path = folder.file();
    vkp_socket *sock = registry.make(path);
    const vkp_weak_socket weak = vkp_socket_downgrade(sock);
    const ino_t inode = vkp_test_look(path).st_ino;
    uint64_t times = 0;
    for (int i = 0; i < 3; i++) {
        for (int how = 0; how < 3; how++) {
            vkp_socket_unref(sock);
            timed.pass(linger_ms - 1);
            vkp_socket *again = nullptr;
            if (how == 0) {
                again = registry.make(path);
            } else if (how == 1) {
                REQUIRE(vkp_socket_find(registry, vkp_str_of(path.c_str()), &again) == VKP_OK);
            } else {
                REQUIRE(vkp_socket_upgrade(&weak, &again) == VKP_OK);
            }
            CHECK(again == sock);
            CHECK(vkp_socket_get_ref_count(sock) == 1);
            CHECK(registry.stats().revived == ++times);
            timed.pass(3 * linger_ms); // the time that ran before does not end it now
            check_serves(registry, sock, path);
            CHECK(vkp_test_look(path).st_ino == inode);
        }
    }
    CHECK(registry.stats().created == 1);
    vkp_socket_unref(sock);
    timed.pass(linger_ms - 1); // and the whole time runs again
    CHECK(vkp_test_exists(path.c_str()));
    timed.pass(1);
    CHECK(folder.is_empty());
    vkp_socket *none = nullptr;
    CHECK(vkp_socket_upgrade(&weak, &none) == VKP_ERR_NOT_FOUND);
    CHECK(vkp_socket_find(registry, vkp_str_of(path.c_str()), &none) == VKP_ERR_NOT_FOUND);
    CHECK(registry.fds_more() == 0);
}

TEST_CASE("socket edges: a last reference that was handed over lingers as any other")
{
    const vkp_test_watchdog watchdog;
    vkp_test_folder folder;
    vkp_test_hooks hooks;
    Timed timed(lingering(), hooks.sys());
    const std::string path = folder.file();
    vkp_socket *sock = timed.registry.make(path);
    hooks.at(call::bind, [&] { vkp_socket_unref(sock); });
    vkp_socket *other = timed.registry.make(folder.file("other"));
    CHECK(hooks.before == nullptr);
    CHECK(timed.registry.stats().ended == 0);
    CHECK(timed.registry.stats().handed_over == 0); // of those that ended
    CHECK(timed.registry.make(path) == sock);
    CHECK(timed.registry.stats().revived == 1);
    vkp_socket_unref(sock);
    vkp_socket_unref(other);
    timed.pass(linger_ms);
    CHECK(folder.is_empty());
}

TEST_CASE("socket edges: sockets that linger end each in its own time")
{
    vkp_test_folder folder;
    Timed timed(lingering());
    vkp_socket *a = timed.registry.make(folder.file("a"));
    vkp_socket *b = timed.registry.make(folder.file("b"));
    vkp_socket *c = timed.registry.make(folder.file("c"));
    vkp_socket_unref(b);
    timed.pass(300);
    vkp_socket_unref(a);
    timed.pass(300);
    vkp_socket_unref(c);
    timed.pass(399);
    CHECK(timed.registry.count() == 3);
    timed.pass(1);
    CHECK(folder.names() == std::vector<std::string>{"a", "a.lock", "c", "c.lock"});
    timed.pass(300);
    CHECK(folder.names() == std::vector<std::string>{"c", "c.lock"});
    timed.pass(300);
    CHECK(folder.is_empty());
}

TEST_CASE("socket edges: what lingers ends with a sweep, the loop, or the registry")
{
    vkp_test_folder folder;
    const std::string path = folder.file();
    vkp_test_loop loop(&vkp_backend_null);
    vkp_test_env env;
    vkp_test_env_init(&env);
    vkp_registry_config config = lingering();
    config.loop = loop;
    config.env = &env.env;
    vkp_registry *registry = nullptr;
    vkp_socket *sock = nullptr;
    REQUIRE(vkp_registry_open(&config, &registry) == VKP_OK);
    REQUIRE(get(registry, path, &sock) == VKP_OK);
    const vkp_weak_socket weak = vkp_socket_downgrade(sock);
    const bool ran = GENERATE(false, true);
    const auto drop = [&] {
        vkp_socket_unref(sock);
        if (ran) { // the loop heard of it
            loop.round();
        }
        CHECK(vkp_test_exists(path.c_str()));
    };
    vkp_socket *none = nullptr;
    SECTION("a sweep")
    {
        drop();
        CHECK(vkp_registry_cleanup_all(registry) == 1);
        CHECK(folder.is_empty());
        CHECK(vkp_socket_upgrade(&weak, &none) == VKP_ERR_NOT_FOUND);
        loop.round(loop.now() + 2000000000);
    }
    SECTION("the loop closes")
    {
        drop();
        vkp_loop_close(loop);
        CHECK(folder.is_empty());
        CHECK(vkp_registry_get_count(registry) == 0);
        CHECK(vkp_socket_upgrade(&weak, &none) == VKP_ERR_NOT_FOUND);
    }
    SECTION("the loop closed before: nothing lingers")
    {
        vkp_loop_close(loop);
        vkp_socket_unref(sock);
        CHECK(folder.is_empty());
        REQUIRE(get(registry, path, &sock) == VKP_OK); // and the registry goes on
        CHECK(vkp_test_answers(path));
        vkp_socket_unref(sock);
        CHECK(folder.is_empty());
    }
    SECTION("the program's reference to the registry goes first")
    {
        vkp_registry_unref(std::exchange(registry, nullptr));
        drop();
        loop.round(loop.now() + 2000000000);
        loop.round(loop.now() + 2000000000);
        CHECK(folder.is_empty());
    }
    vkp_registry_unref(registry);
    loop.close();
    CHECK(folder.is_empty());
    vkp_test_env_deinit(&env);
}

TEST_CASE("socket edges: last references of other threads linger, too, and are revived there")
{
    vkp_test_folder folder;
    Timed timed(lingering());
    const std::string path = folder.file();
    std::atomic<int> dead{0};
    for (int burst = 0; burst < 10; burst++) {
        vkp_test_run_threads(4, [&](int) {
            for (int i = 0; i < 50; i++) {
                vkp_socket *sock = timed.registry.make(path);
                dead += vkp_socket_is_active(sock) && vkp_test_exists(path.c_str()) ? 0 : 1;
                vkp_socket_unref(sock);
            }
        });
        timed.pass(linger_ms / 4);
    }
    CHECK(dead.load() == 0);
    CHECK(timed.registry.stats().created == 1); // it never ended in between
    CHECK(timed.registry.count() == 1);
    timed.pass(linger_ms);
    CHECK(folder.is_empty());
    CHECK(timed.registry.fds_more() == 0);
}

TEST_CASE("socket edges: a socket revived before its last unref is over has its whole time again")
{
    // Who took the count to 0 has the duty to clean up, and nobody else: however often it is
    // revived and given back meanwhile, and however long that takes.
    const vkp_test_watchdog watchdog;
    const bool is_held = GENERATE(false, true);
    INFO((is_held ? "held then" : "given back then"));
    vkp_test_folder folder;
    vkp_test_hooks hooks;
    Timed timed(lingering(), hooks.sys());
    const std::string path = folder.file();
    vkp_socket *sock = timed.registry.make(path);
    const vkp_weak_socket weak = vkp_socket_downgrade(sock);
    vkp_test_stop stop;
    std::atomic<bool> ended{false};
    int calls = 0;
    hooks.before = [&](const vkp_test_step &) {
        if (is_counted && ++calls == 1) {
            stop.arrive();
        }
        return 0;
    };
    std::thread last([&] {
        is_counted = true;
        vkp_socket_unref(sock);
        ended = true;
    });
    REQUIRE(stop.await_arrival(ended));
    for (int i = 0; i < 3; i++) {
        vkp_socket *again = nullptr;
        REQUIRE(vkp_socket_upgrade(&weak, &again) == VKP_OK);
        vkp_socket_unref(again);
        timed.pass(2 * linger_ms);
        CHECK(timed.registry.make(path) == sock);
        vkp_socket_unref(sock);
    }
    if (is_held) {
        CHECK(timed.registry.make(path) == sock);
    }
    stop.let_go();
    last.join();
    if (is_held) {
        timed.pass(2 * linger_ms);
        check_serves(timed.registry, sock, path);
        CHECK(vkp_socket_get_ref_count(sock) == 1);
        vkp_socket_unref(sock);
    }
    timed.pass(linger_ms - 1);
    CHECK(vkp_test_exists(path.c_str()));
    timed.pass(1);
    CHECK(timed.registry.stats().created == 1);
    CHECK(timed.registry.stats().ended == 1);
    CHECK(timed.registry.count() == 0);
    CHECK(folder.is_empty());
    CHECK(timed.registry.fds_more() == 0);
}

TEST_CASE("socket edges: a socket revived at the very end of its time survives")
{
    // The timer's task is at its first call; the name is asked for before it takes the lock.
    const vkp_test_watchdog watchdog;
    int k = 1;
    int survived = 0;
    for (bool stopped = true; stopped; k++) {
        INFO("before call " << k << " of the linger's end");
        vkp_test_folder folder;
        vkp_test_hooks hooks;
        Timed timed(lingering(), hooks.sys());
        const std::string path = folder.file();
        vkp_socket_unref(timed.registry.make(path));
        timed.pass(linger_ms - 1);
        vkp_test_stop stop;
        std::atomic<bool> ended{false};
        std::atomic<bool> got{false};
        vkp_socket *again = nullptr;
        int calls = 0;
        hooks.before = [&](const vkp_test_step &) {
            if (is_counted && ++calls == k) {
                stop.arrive();
            }
            return 0;
        };
        std::thread next([&] {
            if (!stop.await_arrival(ended)) {
                return;
            }
            std::thread asker([&] {
                again = timed.registry.make(path);
                got = true;
            });
            vkp_test_let_run([&] { return got.load(); });
            stop.let_go();
            asker.join();
        });
        is_counted = true;
        timed.pass(1);
        is_counted = false;
        ended = true;
        next.join();
        stopped = again != nullptr;
        if (stopped) {
            survived++;
            timed.pass(2 * linger_ms);
            check_serves(timed.registry, again, path);
            vkp_socket_unref(again);
            timed.pass(linger_ms);
        }
        CHECK(folder.is_empty());
        CHECK(timed.registry.fds_more() == 0);
    }
    CHECK(survived > 2);
}

TEST_CASE("socket edges: every allocation of a linger may fail; the socket ends all the same")
{
    vkp_test_folder folder;
    const std::string path = folder.file();
    const vkp_test_fault fault = GENERATE(VKP_TEST_FAULT_ONCE, VKP_TEST_FAULT_FROM);
    for (uint64_t k = 1; k < 8; k++) {
        INFO("allocation " << k);
        Timed timed(lingering());
        vkp_socket *sock = timed.registry.make(path);
        vkp_test_env_fault(&timed.registry.test, fault, k);
        vkp_test_env_fault(&timed.loop.test, fault, k);
        vkp_socket_unref(sock);
        timed.pass(linger_ms + 1);
        vkp_test_env_fault(&timed.registry.test, VKP_TEST_FAULT_NONE, 0);
        vkp_test_env_fault(&timed.loop.test, VKP_TEST_FAULT_NONE, 0);
        timed.pass(linger_ms + 1);
        CHECK(folder.is_empty());
        CHECK(timed.registry.count() == 0);
        CHECK(timed.registry.fds_more() == 0);
    }
}

TEST_CASE("socket edges: every call of a linger's end may fail; the socket ends all the same")
{
    vkp_test_folder folder;
    const std::string path = folder.file();
    int k = 1;
    for (bool failed = true; failed; k++) {
        INFO("call " << k);
        vkp_test_hooks hooks;
        Timed timed(lingering(), hooks.sys());
        vkp_socket_unref(timed.registry.make(path));
        hooks.fail(k, EIO);
        timed.pass(linger_ms + 1);
        failed = hooks.failed();
        CHECK(timed.registry.count() == 0);
        CHECK(timed.registry.fds_more() == 0);
        CHECK(timed.registry.stats().unlink_failures == (folder.is_empty() ? 0 : 1));
        hooks.heal();
        vkp_socket_unref(timed.registry.make(path)); // over whatever is left there
        timed.pass(linger_ms + 1);
        CHECK(folder.is_empty());
    }
    CHECK(k > 3);
}

// ---- weak handles ----

TEST_CASE("socket edges: a weak handle of no socket")
{
    vkp_test_registry registry;
    vkp_weak_socket weak;
    std::memset(&weak, 0, sizeof weak);
    vkp_socket *sock = nullptr;
    CHECK(vkp_socket_upgrade(&weak, &sock) == VKP_ERR_NOT_FOUND);
    CHECK(vkp_socket_upgrade(nullptr, &sock) == VKP_ERR_INVALID);
    CHECK(vkp_socket_upgrade(&weak, nullptr) == VKP_ERR_INVALID);
    CHECK(sock == nullptr);
}

TEST_CASE("socket edges: a weak handle gives its socket while it lives, and no other one after it")
{
    vkp_test_folder folder;
    vkp_test_registry registry;
    const std::string path = folder.file();
    vkp_socket *sock = registry.make(path);
    const vkp_weak_socket weak = vkp_socket_downgrade(sock);
    const vkp_weak_socket copy = weak;
    CHECK(vkp_socket_get_ref_count(sock) == 1);
    vkp_socket *got = nullptr;
    REQUIRE(vkp_socket_upgrade(&copy, &got) == VKP_OK);
    CHECK(got == sock);
    CHECK(vkp_socket_get_ref_count(sock) == 2);
    vkp_socket_unref(got);
    got = nullptr;
    SECTION("it ended")
    {
        vkp_socket_unref(sock);
        CHECK(vkp_socket_upgrade(&weak, &got) == VKP_ERR_NOT_FOUND);
    }
    SECTION("it was swept while a handle lived")
    {
        CHECK(vkp_registry_cleanup_all(registry) == 1);
        CHECK(vkp_socket_upgrade(&weak, &got) == VKP_ERR_NOT_FOUND);
        CHECK(vkp_socket_get_ref_count(sock) == 1);
        vkp_socket_unref(sock);
        CHECK(vkp_socket_upgrade(&weak, &got) == VKP_ERR_NOT_FOUND);
    }
    SECTION("another one has its path, and its memory, many lives later")
    {
        vkp_socket_unref(sock);
        for (int i = 0; i < 1000; i++) {
            vkp_socket *next = registry.make(path);
            CHECK(vkp_socket_upgrade(&weak, &got) == VKP_ERR_NOT_FOUND);
            CHECK(vkp_socket_get_ref_count(next) == 1);
            vkp_socket_unref(next);
        }
    }
    SECTION("a hundred others, alive at once")
    {
        vkp_socket_unref(sock);
        std::vector<vkp_socket *> others;
        for (int i = 0; i < 100; i++) {
            others.push_back(registry.make(folder.file(std::to_string(i))));
            CHECK(vkp_socket_upgrade(&weak, &got) == VKP_ERR_NOT_FOUND);
        }
        for (vkp_socket *other : others) {
            CHECK(vkp_socket_get_ref_count(other) == 1);
            vkp_socket_unref(other);
        }
    }
    CHECK(got == nullptr);
    CHECK(folder.is_empty());
    CHECK(registry.fds_more() == 0);
}

TEST_CASE("socket edges: slots are used again: many lives take no more memory than the first few")
{
    vkp_test_folder folder;
    vkp_test_registry registry;
    const std::string path = folder.file();
    for (int i = 0; i < 10; i++) {
        vkp_socket_unref(registry.make(path));
    }
    const size_t bytes = vkp_test_env_live_bytes(&registry.test);
    for (int i = 0; i < 500; i++) {
        vkp_socket_unref(registry.make(path));
    }
    CHECK(vkp_test_env_live_bytes(&registry.test) == bytes);
}

TEST_CASE("socket edges: weak handles that race the end get the live socket or nothing")
{
    vkp_test_folder folder;
    vkp_test_registry registry;
    const std::string paths[2] = {folder.file("a"), folder.file("b")};
    // A handle is two words: given to the others whole.
    struct {
        std::mutex lock;
        vkp_weak_socket weak[2] = {};
    } shared;
    std::atomic<int> wrong{0};
    std::atomic<int> found{0};
    std::atomic<int> makers{2};
    vkp_test_run_threads(6, [&](int i) {
        if (i < 2) {
            for (int round = 0; round < 300; round++) {
                vkp_socket *sock = registry.make(paths[i]);
                {
                    const std::lock_guard<std::mutex> guard(shared.lock);
                    shared.weak[i] = vkp_socket_downgrade(sock);
                }
                sched_yield();
                vkp_socket_unref(sock);
            }
            makers--;
            return;
        }
        vkp_weak_socket weak = {};
        for (int turn = 0; makers.load() > 0; turn++) {
            if (turn % 4 == 0) {
                const std::lock_guard<std::mutex> guard(shared.lock);
                weak = shared.weak[i % 2];
            }
            vkp_socket *sock = nullptr;
            const vkp_status status = vkp_socket_upgrade(&weak, &sock);
            if (status == VKP_OK) {
                found++;
                wrong += vkp_socket_is_active(sock) && vkp_socket_get_path(sock) == paths[i % 2] &&
                                 vkp_test_exists(paths[i % 2].c_str())
                             ? 0
                             : 1;
                vkp_socket_unref(sock);
            } else {
                wrong += status == VKP_ERR_NOT_FOUND ? 0 : 1;
            }
        }
    });
    CHECK(wrong.load() == 0);
    CHECK(found.load() > 0);
    CHECK(registry.count() == 0);
    CHECK(registry.stats().references == 0);
    CHECK(registry.stats().created == registry.stats().ended);
    CHECK(folder.is_empty());
    CHECK(registry.fds_more() == 0);
}

TEST_CASE("socket edges: look-ups by name while slots change hands and the registry grows")
{
    vkp_test_folder folder;
    vkp_test_registry registry;
    const std::string paths[3] = {folder.file("a"), folder.file("b"), folder.file("c")};
    std::vector<std::string> more;
    for (int i = 0; i < 150; i++) {
        more.push_back(folder.file("more" + std::to_string(i)));
    }
    std::atomic<int> wrong{0};
    std::atomic<int> makers{3};
    const auto look = [&](const std::string &path) {
        vkp_socket *sock = nullptr;
        const vkp_status status = vkp_socket_find(registry, vkp_str_of(path.c_str()), &sock);
        if (status == VKP_OK) {
            wrong += vkp_socket_get_path(sock) == path && vkp_socket_is_active(sock) ? 0 : 1;
            vkp_socket_unref(sock);
        } else {
            wrong += status == VKP_ERR_NOT_FOUND ? 0 : 1;
        }
    };
    vkp_test_run_threads(6, [&](int i) {
        if (i < 2) { // each of them a slot that goes from name to name
            for (int round = 0; round < 300; round++) {
                vkp_socket_unref(registry.make(paths[static_cast<size_t>(round + i) % 3]));
            }
            makers--;
        } else if (i == 2) {
            for (int round = 0; round < 2; round++) {
                std::vector<vkp_socket *> socks;
                for (const std::string &path : more) {
                    socks.push_back(registry.make(path));
                    look(more[socks.size() / 2]);
                }
                for (vkp_socket *sock : socks) {
                    vkp_socket_unref(sock);
                }
            }
            makers--;
        } else {
            for (size_t turn = 0; makers.load() > 0; turn++) {
                look(paths[turn % 3]);
                look(more[turn % more.size()]);
            }
        }
    });
    CHECK(wrong.load() == 0);
    CHECK(folder.is_empty());
    CHECK(registry.count() == 0);
    CHECK(registry.stats().created == registry.stats().ended);
    CHECK(registry.fds_more() == 0);
}

// ---- pools ----

namespace {

class Pool {
  public:
    Pool(vkp_registry *registry, const std::vector<std::string> &paths, vkp_balance balance)
    {
        std::vector<vkp_str> texts;
        for (const std::string &path : paths) {
            texts.push_back(vkp_str_of(path.c_str()));
        }
        vkp_socket_pool_config config = {};
        config.registry = registry;
        config.paths = texts.data();
        config.count = texts.size();
        config.balance = balance;
        status = vkp_socket_pool_open(&config, &pool_);
    }
    ~Pool()
    {
        unref();
    }
    Pool(const Pool &) = delete;
    Pool &operator=(const Pool &) = delete;
    operator vkp_socket_pool *() const
    {
        return pool_;
    }
    void unref()
    {
        vkp_socket_pool_unref(std::exchange(pool_, nullptr));
    }
    vkp_socket *at(size_t index) const
    {
        return vkp_socket_pool_get_socket(pool_, index);
    }
    // Which one, or -1 when it is refused.
    int pick() const
    {
        vkp_socket *sock = nullptr;
        if (vkp_socket_pool_pick(pool_, &sock) != VKP_OK) {
            return -1;
        }
        for (size_t i = 0; i < vkp_socket_pool_get_count(pool_); i++) {
            if (at(i) == sock) {
                return static_cast<int>(i);
            }
        }
        vkp_test_fail("a pool gave a socket that is not in it");
    }

    vkp_status status;

  private:
    vkp_socket_pool *pool_ = nullptr;
};

std::vector<std::string> three_paths(const vkp_test_folder &folder)
{
    return {folder.file("0"), folder.file("1"), folder.file("2")};
}

} // namespace

TEST_CASE("socket edges: a pool refers to its sockets")
{
    vkp_test_folder folder;
    vkp_test_registry registry;
    Pool pool(registry, three_paths(folder), VKP_BALANCE_LEAST);
    REQUIRE(pool.status == VKP_OK);
    CHECK(vkp_socket_pool_get_count(pool) == 3);
    CHECK(registry.count() == 3);
    for (size_t i = 0; i < 3; i++) {
        const std::string path = folder.file(std::to_string(i));
        check_serves(registry, pool.at(i), path);
        CHECK(vkp_socket_get_ref_count(pool.at(i)) == 1);
    }
    CHECK(vkp_socket_pool_ref(pool) == pool);
    vkp_socket_pool_unref(pool);
    CHECK(registry.count() == 3);
    vkp_socket *kept = nullptr;
    REQUIRE(vkp_socket_pool_pick(pool, &kept) == VKP_OK);
    pool.unref();
    vkp_socket_pool_unref(nullptr);
    CHECK(registry.count() == 1); // what was picked is the client's
    CHECK(vkp_test_answers(vkp_socket_get_path(kept)));
    vkp_socket_unref(kept);
    CHECK(folder.is_empty());
    CHECK(registry.fds_more() == 0);
}

TEST_CASE("socket edges: a pool shares sockets that are there, and makes names of its own")
{
    vkp_test_folder folder;
    vkp_registry_config config = {};
    config.folder = vkp_str_of(folder.path().c_str());
    vkp_test_registry registry(config);
    vkp_socket *there = registry.make(folder.file("1"));
    {
        Pool pool(registry, three_paths(folder), VKP_BALANCE_TURN);
        REQUIRE(pool.status == VKP_OK);
        CHECK(pool.at(1) == there);
        CHECK(vkp_socket_get_ref_count(there) == 2);
    }
    CHECK(registry.count() == 1);
    vkp_socket_unref(there);
    vkp_socket_pool_config unique = {};
    unique.registry = registry;
    unique.count = 4;
    vkp_socket_pool *pool = nullptr;
    REQUIRE(vkp_socket_pool_open(&unique, &pool) == VKP_OK);
    std::set<std::string> paths;
    for (size_t i = 0; i < 4; i++) {
        paths.insert(vkp_socket_get_path(vkp_socket_pool_get_socket(pool, i)));
    }
    CHECK(paths.size() == 4);
    CHECK(folder.names().size() == 8);
    vkp_socket_pool_unref(pool);
    CHECK(folder.is_empty());
}

TEST_CASE("socket edges: a pool keeps its registry")
{
    vkp_test_folder folder;
    vkp_test_env env;
    vkp_test_env_init(&env);
    vkp_registry_config config = {};
    config.env = &env.env;
    vkp_registry *registry = nullptr;
    REQUIRE(vkp_registry_open(&config, &registry) == VKP_OK);
    {
        Pool pool(registry, three_paths(folder), VKP_BALANCE_TURN);
        vkp_registry_unref(registry);
        REQUIRE(pool.status == VKP_OK);
        CHECK(vkp_registry_cleanup_all(registry) == 3); // it is there still
        CHECK(pool.pick() == -1);
    }
    CHECK(vkp_test_env_live_blocks(&env) == 0);
    vkp_test_env_deinit(&env);
    CHECK(folder.is_empty());
}

TEST_CASE("socket edges: the next client goes to the socket with the fewest references")
{
    vkp_test_folder folder;
    vkp_test_registry registry;
    Pool pool(registry, three_paths(folder), VKP_BALANCE_LEAST);
    REQUIRE(pool.status == VKP_OK);
    for (int round = 0; round < 4; round++) { // of equals the next in turn: each once
        std::set<int> picked;
        for (int i = 0; i < 3; i++) {
            picked.insert(pool.pick());
        }
        CHECK(picked == std::set<int>{0, 1, 2});
    }
    vkp_socket_unref(pool.at(1));
    vkp_socket_unref(pool.at(1));
    CHECK(pool.pick() == 1);
    CHECK(pool.pick() == 1);
    CHECK(vkp_socket_get_ref_count(pool.at(0)) == 5);
    CHECK(vkp_socket_get_ref_count(pool.at(1)) == 5);
    CHECK(vkp_socket_get_ref_count(pool.at(2)) == 5);
    // Where they are all the same no socket is preferred.
    std::set<int> firsts;
    for (int i = 0; i < 3; i++) {
        const int first = pool.pick();
        firsts.insert(first);
        vkp_socket_unref(pool.at(static_cast<size_t>(first)));
    }
    CHECK(firsts == std::set<int>{0, 1, 2});
    for (size_t i = 0; i < 3; i++) {
        for (int n = 0; n < 4; n++) {
            vkp_socket_unref(pool.at(i));
        }
    }
    pool.unref();
    CHECK(folder.is_empty());
}

TEST_CASE("socket edges: in turn means one after the other, whatever they hold")
{
    vkp_test_folder folder;
    vkp_test_registry registry;
    Pool pool(registry, three_paths(folder), VKP_BALANCE_TURN);
    REQUIRE(pool.status == VKP_OK);
    for (int i = 0; i < 10; i++) {
        CHECK(vkp_socket_ref(pool.at(1)) == pool.at(1));
    }
    const int first = pool.pick();
    for (int i = 1; i < 9; i++) {
        CHECK(pool.pick() == (first + i) % 3);
    }
    for (size_t i = 0; i < 3; i++) {
        for (int n = 0; n < (i == 1 ? 13 : 3); n++) {
            vkp_socket_unref(pool.at(i));
        }
    }
    pool.unref();
    CHECK(folder.is_empty());
}

TEST_CASE("socket edges: threads that pick in turn are spread evenly")
{
    vkp_test_folder folder;
    vkp_test_registry registry;
    const vkp_balance balance = GENERATE(VKP_BALANCE_LEAST, VKP_BALANCE_TURN);
    Pool pool(registry, three_paths(folder), balance);
    REQUIRE(pool.status == VKP_OK);
    std::atomic<int> failed{0};
    vkp_test_run_threads(6, [&](int) {
        for (int i = 0; i < 100; i++) {
            vkp_socket *sock = nullptr;
            failed += vkp_socket_pool_pick(pool, &sock) == VKP_OK ? 0 : 1;
        }
    });
    CHECK(failed.load() == 0);
    size_t total = 0;
    for (size_t i = 0; i < 3; i++) {
        total += vkp_socket_get_ref_count(pool.at(i));
        if (balance == VKP_BALANCE_TURN) {
            CHECK(vkp_socket_get_ref_count(pool.at(i)) == 201);
        }
    }
    CHECK(total == 603);
    for (size_t i = 0; i < 3; i++) {
        while (vkp_socket_get_ref_count(pool.at(i)) > 1) {
            vkp_socket_unref(pool.at(i));
        }
    }
    pool.unref();
    CHECK(folder.is_empty());
}

TEST_CASE("socket edges: sockets that were cleaned up are passed over, in the midst of a sweep too")
{
    const vkp_test_watchdog watchdog;
    vkp_test_folder folder;
    vkp_test_hooks hooks;
    vkp_test_registry registry(hooks.sys());
    const vkp_balance balance = GENERATE(VKP_BALANCE_LEAST, VKP_BALANCE_TURN);
    Pool pool(registry, three_paths(folder), balance);
    REQUIRE(pool.status == VKP_OK);
    int looked = 0;
    hooks.before = [&](const vkp_test_step &step) {
        if (step.call == call::unlink && looked >= 0) {
            looked++;
            for (int i = 0; i < 6; i++) {
                vkp_socket *sock = nullptr;
                const vkp_status status = vkp_socket_pool_pick(pool, &sock);
                if (status == VKP_OK) {
                    CHECK(vkp_socket_is_active(sock));
                    vkp_socket_unref(sock);
                } else {
                    CHECK(status == VKP_ERR_CLOSED);
                }
            }
        }
        return 0;
    };
    CHECK(vkp_registry_cleanup_all(registry) == 3);
    hooks.heal();
    CHECK(looked >= 3);
    vkp_socket *sock = nullptr;
    CHECK(vkp_socket_pool_pick(pool, &sock) == VKP_ERR_CLOSED);
    CHECK(sock == nullptr);
    CHECK(vkp_socket_pool_get_count(pool) == 3);
    CHECK_FALSE(vkp_socket_is_active(pool.at(0)));
    pool.unref();
    CHECK(folder.is_empty());
    CHECK(registry.fds_more() == 0);
}

TEST_CASE("socket edges: a pool is full when each of its sockets is")
{
    vkp_test_folder folder;
    vkp_registry_config config = {};
    config.max_references = 3;
    vkp_test_registry registry(config);
    const vkp_balance balance = GENERATE(VKP_BALANCE_LEAST, VKP_BALANCE_TURN);
    Pool pool(registry, three_paths(folder), balance);
    REQUIRE(pool.status == VKP_OK);
    CHECK(vkp_socket_ref(pool.at(0)) == pool.at(0));
    CHECK(vkp_socket_ref(pool.at(0)) == pool.at(0)); // full alone: passed over
    int counts[3] = {0, 0, 0};
    for (int i = 0; i < 4; i++) {
        const int picked = pool.pick();
        REQUIRE(picked >= 0);
        counts[picked]++;
    }
    CHECK(counts[0] == 0);
    CHECK(counts[1] == 2);
    CHECK(counts[2] == 2);
    vkp_socket *sock = nullptr;
    CHECK(vkp_socket_pool_pick(pool, &sock) == VKP_ERR_LIMIT);
    CHECK(sock == nullptr);
    vkp_socket_unref(pool.at(2));
    CHECK(pool.pick() == 2);
    for (size_t i = 0; i < 3; i++) {
        CHECK(vkp_socket_get_ref_count(pool.at(i)) == 3);
        vkp_socket_unref(pool.at(i));
        vkp_socket_unref(pool.at(i));
    }
    pool.unref();
    CHECK(folder.is_empty());
}

TEST_CASE("socket edges: a pool opens all of its sockets or none")
{
    vkp_test_folder folder;
    vkp_test_registry registry;
    SECTION("one path is taken by something else")
    {
        const std::string taken = folder.file(GENERATE("0", "1", "2"));
        vkp_test_write_file(taken);
        Pool pool(registry, three_paths(folder), VKP_BALANCE_LEAST);
        CHECK(pool.status == VKP_ERR_EXISTS);
        CHECK(pool == nullptr);
        CHECK(registry.count() == 0);
        unlink(taken.c_str());
    }
    SECTION("one path is no path")
    {
        Pool pool(registry, {folder.file("0"), ".."}, VKP_BALANCE_LEAST);
        CHECK(pool.status == VKP_ERR_INVALID);
    }
    SECTION("the registry takes no more")
    {
        vkp_registry_config config = {};
        config.max_sockets = 2;
        vkp_test_registry small(config);
        Pool pool(small, three_paths(folder), VKP_BALANCE_LEAST);
        CHECK(pool.status == VKP_ERR_LIMIT);
        CHECK(small.count() == 0);
    }
    SECTION("arguments that cannot be")
    {
        vkp_socket_pool *pool = nullptr;
        vkp_socket *sock = nullptr;
        vkp_socket_pool_config config = {};
        CHECK(vkp_socket_pool_open(nullptr, &pool) == VKP_ERR_INVALID);
        config.count = 1;
        CHECK(vkp_socket_pool_open(&config, &pool) == VKP_ERR_INVALID); // no registry
        config.registry = registry;
        CHECK(vkp_socket_pool_open(&config, nullptr) == VKP_ERR_INVALID);
        config.count = 0;
        CHECK(vkp_socket_pool_open(&config, &pool) == VKP_ERR_INVALID);
        CHECK(pool == nullptr);
        CHECK(vkp_socket_pool_pick(nullptr, &sock) == VKP_ERR_INVALID);
    }
    CHECK(registry.count() == 0);
    CHECK(folder.is_empty());
    CHECK(registry.fds_more() == 0);
}

// ---- what is counted ----

TEST_CASE("socket edges: what a registry counts")
{
    vkp_test_folder folder;
    vkp_test_hooks hooks;
    uint64_t now = 1000;
    hooks.clock = [&] { return now; };
    vkp_test_registry registry(hooks.sys());
    vkp_registry_stats stats = registry.stats();
    CHECK(stats.live == 0);
    CHECK(stats.references == 0);
    CHECK(stats.created == 0);
    CHECK(stats.taken_over == 0);
    CHECK(stats.revived == 0);
    CHECK(stats.ended == 0);
    CHECK(stats.handed_over == 0);
    CHECK(stats.unlink_failures == 0);
    CHECK(stats.unlink_errno == 0);
    CHECK(stats.lost == 0);
    CHECK(stats.rebound == 0);
    CHECK(stats.cleanup_last_ns == 0);
    CHECK(stats.cleanup_most_ns == 0);
    CHECK(stats.cleanup_total_ns == 0);

    vkp_test_leave_corpse(folder.file("a"));
    vkp_socket *a = registry.make(folder.file("a"));
    vkp_socket *b = registry.make(folder.file("b"));
    vkp_socket *c = registry.make(folder.file("c"));
    CHECK(registry.make(folder.file("a")) == a);
    CHECK(vkp_socket_ref(a) == a);
    stats = registry.stats();
    CHECK(stats.live == 3);
    CHECK(stats.references == 5);
    CHECK(stats.created == 3);
    CHECK(stats.taken_over == 1);
    CHECK(stats.ended == 0);

    // The clock moves in the removal alone.
    uint64_t step = 7000;
    hooks.before = [&](const vkp_test_step &each) {
        if (each.call == call::unlink && each.path.find(".lock") == std::string::npos) {
            now += step;
        }
        return 0;
    };
    vkp_socket_unref(b);
    stats = registry.stats();
    CHECK(stats.live == 2);
    CHECK(stats.references == 4);
    CHECK(stats.ended == 1);
    CHECK(stats.cleanup_last_ns == 7000);
    CHECK(stats.cleanup_most_ns == 7000);
    CHECK(stats.cleanup_total_ns == 7000);
    step = 3000;
    vkp_socket_unref(c);
    stats = registry.stats();
    CHECK(stats.ended == 2);
    CHECK(stats.cleanup_last_ns == 3000);
    CHECK(stats.cleanup_most_ns == 7000);
    CHECK(stats.cleanup_total_ns == 10000);
    CHECK(stats.handed_over == 0);

    hooks.heal();
    CHECK(vkp_registry_cleanup_all(registry) == 1);
    stats = registry.stats();
    CHECK(stats.live == 0);
    CHECK(stats.ended == 3);
    for (int i = 0; i < 3; i++) {
        vkp_socket_unref(a);
    }
    stats = registry.stats();
    CHECK(stats.references == 0);
    CHECK(stats.created == 3);
    CHECK(stats.ended == 3);
    CHECK(stats.revived == 0);
    CHECK(stats.unlink_failures == 0);
    CHECK(folder.is_empty());
}

TEST_CASE("socket edges: the time of a cleanup that was handed over begins at the last reference")
{
    vkp_test_folder folder;
    vkp_test_hooks hooks;
    uint64_t now = 1000;
    hooks.clock = [&] { return now; };
    vkp_test_registry registry(hooks.sys());
    vkp_socket *a = registry.make(folder.file("a"));
    hooks.at(call::bind, [&] {
        vkp_socket_unref(a);
        now += 50000;
    });
    vkp_socket *b = registry.make(folder.file("b"));
    CHECK(registry.stats().handed_over == 1);
    CHECK(registry.stats().cleanup_last_ns == 50000);
    vkp_socket_unref(b);
    CHECK(folder.is_empty());
}

TEST_CASE("socket edges: descriptors are close-on-exec and do not wait")
{
    vkp_test_folder folder;
    std::set<int> before;
    for (int fd = 0; fd < 256; fd++) {
        if (fcntl(fd, F_GETFD) >= 0) {
            before.insert(fd);
        }
    }
    vkp_test_registry registry;
    vkp_socket *sock = registry.make(folder.file("a"));
    const int mine = vkp_test_foreign_socket(folder.file("b"), 4);
    fcntl(mine, F_SETFD, 0);
    vkp_socket *other = nullptr;
    REQUIRE(vkp_socket_adopt(registry, vkp_str_of(folder.file("b").c_str()), mine, &other) ==
            VKP_OK);
    int found = 0;
    for (int fd = 0; fd < 256; fd++) {
        const int flags = fcntl(fd, F_GETFD);
        if (flags >= 0 && before.count(fd) == 0) {
            found++;
            CHECK((flags & FD_CLOEXEC) != 0);
            struct stat info;
            REQUIRE(fstat(fd, &info) == 0);
            if (S_ISSOCK(info.st_mode)) {
                CHECK((fcntl(fd, F_GETFL) & O_NONBLOCK) != 0);
            }
        }
    }
    CHECK(found == 4);
    vkp_socket_unref(sock);
    vkp_socket_unref(other);
    CHECK(folder.is_empty());
}

// ---- everything that may fail ----

namespace {

// What a call left behind that failed, or whose sockets are given back.
void check_nothing_left(const vkp_test_registry &registry)
{
    CHECK(registry.count() == 0);
    CHECK(registry.stats().live == 0);
    CHECK(registry.stats().references == 0);
    CHECK(registry.stats().created == registry.stats().ended);
    CHECK(registry.fds_more() == 0);
}

// attempt() makes sockets in the folder and gives them back, or says why not.
void sweep_calls(const vkp_test_folder &folder, int least,
                 const std::function<vkp_status(vkp_test_registry &, vkp_test_hooks &)> &attempt)
{
    const int error = GENERATE(EACCES, EMFILE, ENOMEM, EIO, EINTR, EROFS);
    vkp_test_hooks hooks;
    vkp_test_registry registry(hooks.sys());
    int k = 1;
    int refused = 0;
    for (bool failed = true; failed; k++) {
        INFO("call " << k << ": " << strerror(error));
        const uint64_t failures = registry.stats().unlink_failures;
        const uint64_t taken_over = registry.stats().taken_over;
        hooks.fail(k, error);
        const vkp_status status = attempt(registry, hooks);
        failed = hooks.failed();
        hooks.heal();
        const bool was_removal = failed && (hooks.failed_step().call == call::unlink ||
                                            hooks.failed_step().call == call::identify);
        INFO("which is " << static_cast<int>(hooks.failed_step().call) << " of "
                         << hooks.failed_step().path);
        if (status != VKP_OK) {
            refused++;
            CHECK(registry.stats().taken_over == taken_over); // of sockets that were made
            CHECK((status == VKP_ERR_SYS || status == VKP_ERR_NOMEM || status == VKP_ERR_IN_USE ||
                   status == VKP_ERR_EXISTS || status == VKP_ERR_INVALID));
        }
        if (folder.is_empty()) {
            CHECK(registry.stats().unlink_failures == failures);
        } else { // what is left is counted
            CHECK(was_removal);
            CHECK(registry.stats().unlink_failures == failures + 1);
            CHECK(registry.stats().unlink_errno == error);
        }
        check_nothing_left(registry);
        CHECK(attempt(registry, hooks) == VKP_OK); // and then it works
        CHECK(folder.is_empty());
        check_nothing_left(registry);
    }
    CHECK(refused >= least);
    CHECK(k > refused);
}

// The same for allocations, in each way that they can fail.
void sweep_allocations(const vkp_test_folder &folder,
                       const std::function<vkp_status(vkp_test_registry &)> &attempt)
{
    const vkp_test_fault fault =
        GENERATE(VKP_TEST_FAULT_ONCE, VKP_TEST_FAULT_FROM, VKP_TEST_FAULT_EVERY);
    uint64_t k = 1;
    uint64_t refused = 0;
    for (bool failed = true; failed; k++) {
        INFO("allocation " << k << ", kind " << static_cast<int>(fault));
        vkp_test_registry registry; // a new one each time: slots are kept
        const uint64_t failures = vkp_test_env_failures(&registry.test);
        vkp_test_env_fault(&registry.test, fault, k);
        const vkp_status status = attempt(registry);
        failed = vkp_test_env_failures(&registry.test) > failures;
        vkp_test_env_fault(&registry.test, VKP_TEST_FAULT_NONE, 0);
        if (status != VKP_OK) {
            refused++;
            CHECK(status == VKP_ERR_NOMEM);
            CHECK(failed);
        }
        CHECK(folder.is_empty());
        check_nothing_left(registry);
        CHECK(attempt(registry) == VKP_OK);
        CHECK(folder.is_empty());
        check_nothing_left(registry);
    }
    CHECK(refused >= 1);
}

vkp_status create_once(vkp_registry *registry, const std::string &path)
{
    vkp_socket *sock = nullptr;
    const vkp_status status = get(registry, path, &sock);
    CHECK((status == VKP_OK) == (sock != nullptr));
    vkp_socket_unref(sock);
    return status;
}

// Leaves nothing of its own, whatever comes of it.
vkp_status register_once(vkp_registry *registry, const std::string &path)
{
    unlink(path.c_str());
    const int fd = vkp_test_foreign_socket(path, 4);
    vkp_socket *sock = nullptr;
    const vkp_status status = vkp_socket_adopt(registry, vkp_str_of(path.c_str()), fd, &sock);
    if (status != VKP_OK) {
        CHECK(sock == nullptr);
        CHECK(vkp_test_answers(path)); // the descriptor and its file are the caller's
        close(fd);
        unlink(path.c_str());
    }
    vkp_socket_unref(sock);
    return status;
}

vkp_status pool_once(vkp_registry *registry, const vkp_test_folder &folder)
{
    Pool pool(registry, three_paths(folder), VKP_BALANCE_TURN);
    if (pool.status == VKP_OK) {
        const int picked = pool.pick();
        CHECK(picked >= 0);
        vkp_socket_unref(pool.at(static_cast<size_t>(picked)));
    }
    return pool.status;
}

} // namespace

TEST_CASE("socket edges: every system call of a socket's life may fail")
{
    vkp_test_folder folder;
    const std::string path = folder.file();
    sweep_calls(folder, 5, [&](vkp_test_registry &registry, vkp_test_hooks &) {
        return create_once(registry, path);
    });
}

TEST_CASE("socket edges: every system call of a take-over may fail")
{
    vkp_test_folder folder;
    const std::string path = folder.file();
    sweep_calls(folder, 7, [&](vkp_test_registry &registry, vkp_test_hooks &) {
        unlink(path.c_str());
        close(vkp_test_foreign_socket(path, 1));
        const vkp_status status = create_once(registry, path);
        if (status != VKP_OK) { // not taken over: somebody else's to remove
            unlink(path.c_str());
        }
        return status;
    });
}

TEST_CASE("socket edges: every system call of register_new may fail")
{
    vkp_test_folder folder;
    const std::string path = folder.file();
    sweep_calls(folder, 3, [&](vkp_test_registry &registry, vkp_test_hooks &) {
        return register_once(registry, path);
    });
}

TEST_CASE("socket edges: every system call of a pool's life may fail")
{
    vkp_test_folder folder;
    sweep_calls(folder, 15, [&](vkp_test_registry &registry, vkp_test_hooks &) {
        return pool_once(registry, folder);
    });
}

TEST_CASE("socket edges: every allocation of a socket's life, of register_new, of a pool may fail")
{
    vkp_test_folder folder;
    const std::string path = folder.file();
    SECTION("get_or_create")
    {
        sweep_allocations(folder,
                          [&](vkp_test_registry &registry) { return create_once(registry, path); });
    }
    SECTION("register_new")
    {
        sweep_allocations(
            folder, [&](vkp_test_registry &registry) { return register_once(registry, path); });
    }
    SECTION("a pool")
    {
        sweep_allocations(folder,
                          [&](vkp_test_registry &registry) { return pool_once(registry, folder); });
    }
    SECTION("many sockets, so that the registry grows")
    {
        sweep_allocations(folder, [&](vkp_test_registry &registry) {
            std::vector<vkp_socket *> socks;
            vkp_status status = VKP_OK;
            for (int i = 0; i < 24 && status == VKP_OK; i++) {
                vkp_socket *sock = nullptr;
                status = get(registry, folder.file(std::to_string(i)), &sock);
                socks.push_back(sock);
            }
            for (vkp_socket *sock : socks) {
                vkp_socket_unref(sock);
            }
            return status;
        });
    }
}

TEST_CASE("socket edges: every allocation of a registry may fail")
{
    vkp_test_loop loop(&vkp_backend_null);
    vkp_test_env env;
    vkp_test_env_init(&env);
    vkp_registry_config config = checked(true);
    config.linger_ms = 10;
    config.folder = vkp_str_of("/somewhere");
    config.loop = loop;
    config.env = &env.env;
    vkp_registry *registry = nullptr;
    uint64_t k = 1;
    for (; registry == nullptr; k++) {
        INFO("allocation " << k);
        vkp_test_env_fault(&env, VKP_TEST_FAULT_FROM, k);
        vkp_test_env_fault(&loop.test, VKP_TEST_FAULT_FROM, k);
        const vkp_status status = vkp_registry_open(&config, &registry);
        vkp_test_env_fault(&env, VKP_TEST_FAULT_NONE, 0);
        vkp_test_env_fault(&loop.test, VKP_TEST_FAULT_NONE, 0);
        CHECK((status == VKP_OK || status == VKP_ERR_NOMEM));
        CHECK((status == VKP_OK) == (registry != nullptr));
        if (status != VKP_OK) {
            CHECK(vkp_test_env_live_blocks(&env) == 0);
        }
    }
    CHECK(k > 2);
    vkp_registry_unref(registry);
    loop.close();
    vkp_test_env_deinit(&env);
}
