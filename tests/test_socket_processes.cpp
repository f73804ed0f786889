// SPDX-License-Identifier: MIT
//
// Ref-counted Unix sockets among processes: many that race for one path, deaths at every step of
// making and of cleaning up, forks, users without rights, handlers of crashes and of exits.
#include "support/catch.hpp"

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "support/client_probe.h"
#include "support/socket_probe.h"

namespace {

using call = vkp_test_call;

vkp_status get(vkp_registry *registry, const std::string &path, vkp_socket **sock)
{
    return vkp_socket_open(registry, vkp_str_of(path.c_str()), sock);
}

// In a child: a registry that needs no end.
vkp_registry *open_registry(const vkp_registry_config &config = {})
{
    vkp_registry *registry = nullptr;
    if (vkp_registry_open(&config, &registry) != VKP_OK) {
        vkp_test_fail("no registry");
    }
    return registry;
}

// A new process finds paths that it can have, serves them, and leaves nothing.
void check_clean_start(const vkp_test_folder &folder, const std::vector<std::string> &paths)
{
    vkp_test_child child([&] {
        vkp_registry *registry = open_registry();
        const int fds = vkp_test_fd_count();
        for (const std::string &path : paths) {
            vkp_socket *sock = nullptr;
            VKP_TEST_EXPECT(get(registry, path, &sock) == VKP_OK);
            VKP_TEST_EXPECT(vkp_test_answers(path));
            VKP_TEST_EXPECT(vkp_test_has_lock(path));
            VKP_TEST_EXPECT(vkp_test_mode(path) == 0600);
            vkp_socket_unref(sock);
        }
        VKP_TEST_EXPECT(vkp_test_fd_count() == fds);
        vkp_registry_unref(registry);
        return 0;
    });
    CHECK(child.end() == 0);
    CHECK(folder.names() == std::vector<std::string>{});
}

} // namespace

// ---- races ----

namespace {

// What the racers share, in memory of all of them.
struct Field {
    std::atomic<int> owners;
    std::atomic<int> owned;    // how often
    std::atomic<int> together; // that two had it at once
    std::atomic<int> wrong;    // answers but OK and IN_USE, and files that were not there
};

Field *shared_field()
{
    void *memory =
        mmap(nullptr, sizeof(Field), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANON, -1, 0);
    if (memory == MAP_FAILED) {
        vkp_test_fail("mmap: %s", strerror(errno));
    }
    return new (memory) Field{};
}

// The path is this process's: nobody else may think so, and it is served.
void own(Field *field, const std::string &path)
{
    field->together += field->owners.fetch_add(1) == 0 ? 0 : 1;
    field->wrong += vkp_test_exists(path.c_str()) && vkp_test_has_lock(path) ? 0 : 1;
    field->owned++;
    field->owners--;
}

// A racer: 't' asks once and says whether it won, 'd' gives that back and then waits for the path
// until it had it once more, 'e' ends.
int race(Field *field, const std::string &path)
{
    vkp_registry *registry = open_registry();
    const int fds = vkp_test_fd_count();
    vkp_socket *sock = nullptr;
    for (;;) {
        vkp_status status = VKP_OK;
        switch (vkp_test_child::listen()) {
        case 't':
            status = get(registry, path, &sock);
            if (status == VKP_OK) {
                own(field, path);
            }
            vkp_test_child::say(status == VKP_OK ? 'w' : status == VKP_ERR_IN_USE ? 'l' : '?');
            break;
        case 'd':
            vkp_socket_unref(std::exchange(sock, nullptr));
            while ((status = get(registry, path, &sock)) == VKP_ERR_IN_USE) {
                sched_yield();
            }
            if (status == VKP_OK) {
                own(field, path);
                vkp_socket_unref(std::exchange(sock, nullptr));
            }
            vkp_test_child::say(status == VKP_OK ? 'd' : '?');
            break;
        default:
            VKP_TEST_EXPECT(vkp_test_fd_count() == fds);
            VKP_TEST_EXPECT(vkp_registry_get_count(registry) == 0);
            vkp_registry_unref(registry);
            return 0;
        }
    }
}

} // namespace

TEST_CASE("socket processes: of ten that race for a path one has it at a time, a thousand times")
{
    constexpr int racers = 10;
    constexpr int rounds = 1000;
    vkp_test_folder folder;
    const std::string path = folder.file();
    Field *field = shared_field();
    std::vector<std::unique_ptr<vkp_test_child>> children;
    for (int i = 0; i < racers; i++) {
        children.push_back(std::make_unique<vkp_test_child>([&] { return race(field, path); }));
    }
    const auto ask_all = [&](char word) {
        for (const auto &child : children) {
            child->tell(word);
        }
        std::string answers;
        for (const auto &child : children) {
            answers += child->hear();
        }
        std::sort(answers.begin(), answers.end());
        return answers;
    };
    int bad = 0;
    for (int round = 0; round < rounds && bad == 0; round++) {
        if (round % 10 == 0) { // now and then over what a dead process left
            close(vkp_test_foreign_socket(path, 1));
        }
        const bool one_won = ask_all('t') == std::string(racers - 1, 'l') + "w";
        const bool is_served = vkp_test_answers(path);
        const bool all_had_it = ask_all('d') == std::string(racers, 'd');
        const bool is_clean = folder.is_empty();
        INFO("round " << round);
        CHECK(one_won);
        CHECK(is_served);
        CHECK(all_had_it);
        CHECK(is_clean);
        bad += one_won && is_served && all_had_it && is_clean ? 0 : 1;
    }
    CHECK(field->together.load() == 0);
    CHECK(field->wrong.load() == 0);
    CHECK(field->owned.load() == rounds * (racers + 1));
    for (const auto &child : children) {
        child->tell('e');
        CHECK(child->end() == 0);
    }
    munmap(field, sizeof *field);
    CHECK(folder.is_empty());
}

TEST_CASE("socket processes: owners that are killed are followed by exactly one other, each time")
{
    constexpr int racers = 6;
    vkp_test_folder folder;
    const std::string path = folder.file();
    Field *field = shared_field();
    std::vector<std::unique_ptr<vkp_test_child>> children;
    for (int i = 0; i < racers; i++) {
        children.push_back(std::make_unique<vkp_test_child>([&] { return race(field, path); }));
    }
    while (!children.empty()) {
        for (const auto &child : children) {
            child->tell('t');
        }
        size_t winner = children.size();
        for (size_t i = 0; i < children.size(); i++) {
            const char word = children[i]->hear();
            CHECK((word == 'w' || word == 'l'));
            if (word == 'w') {
                CHECK(winner == children.size());
                winner = i;
            }
        }
        REQUIRE(winner < children.size());
        CHECK(vkp_test_answers(path));
        CHECK(children[winner]->end(SIGKILL) == 128 + SIGKILL);
        CHECK_FALSE(vkp_test_answers(path));
        children.erase(children.begin() + static_cast<std::ptrdiff_t>(winner));
    }
    CHECK(field->together.load() == 0);
    CHECK(field->wrong.load() == 0);
    munmap(field, sizeof *field);
    check_clean_start(folder, {path});
}

// ---- deaths ----

namespace {

// What dies opens what it needs with the env, and calls armed() where deaths may begin.
using Life = std::function<void(const vkp_env *env, const std::function<void()> &armed)>;

// Lives that end before their k-th system call, for each k, until one goes on to its end; after
// each another process finds the paths as if nothing had been. How many died.
int die_at_every_call(const vkp_test_folder &folder, const std::vector<std::string> &paths,
                      const Life &life)
{
    for (int k = 1;; k++) {
        INFO("killed before call " << k);
        vkp_test_child child([&] {
            vkp_test_hooks hooks;
            vkp_env env = {};
            env.sys = hooks.sys();
            int calls = 0;
            life(&env, [&] {
                hooks.before = [&](const vkp_test_step &) {
                    if (++calls == k) {
                        raise(SIGKILL);
                    }
                    return 0;
                };
            });
            return 0;
        });
        const int result = child.end();
        check_clean_start(folder, paths);
        if (result != 128 + SIGKILL || !folder.is_empty()) {
            CHECK(result == 0);
            return k - 1;
        }
    }
}

vkp_registry_config with(const vkp_env *env)
{
    vkp_registry_config config = {};
    config.env = env;
    return config;
}

vkp_socket *make_one(vkp_registry *registry, const std::string &path)
{
    vkp_socket *sock = nullptr;
    if (get(registry, path, &sock) != VKP_OK) {
        vkp_test_fail("no socket at %s", path.c_str());
    }
    return sock;
}

// With timers, on a loop whose time is virtual.
vkp_registry *open_timed(const vkp_env *env, vkp_registry_config config, vkp_loop **loop)
{
    vkp_loop_config loop_config = {};
    loop_config.backend = &vkp_backend_null;
    if (vkp_loop_open(&loop_config, loop) != VKP_OK) {
        vkp_test_fail("no loop");
    }
    config.env = env;
    config.loop = *loop;
    return open_registry(config);
}

void pass(vkp_loop *loop, uint64_t ms)
{
    const uint64_t until = vkp_loop_get_now_ns(loop) + ms * 1000000;
    while (vkp_loop_get_now_ns(loop) < until) {
        if (vkp_loop_run_once(loop, until) != VKP_OK) {
            vkp_test_fail("a round failed");
        }
    }
}

} // namespace

TEST_CASE("socket processes: killed at any step of making a socket, the path is there for the next")
{
    vkp_test_folder folder;
    const std::string path = folder.file();
    const int deaths = die_at_every_call(folder, {path}, [&](const vkp_env *env, auto armed) {
        armed();
        make_one(open_registry(with(env)), path);
    });
    CHECK(deaths > 5);
}

TEST_CASE("socket processes: killed at any step of a take-over, the path is there for the next")
{
    vkp_test_folder folder;
    const std::string path = folder.file();
    const bool has_lock = GENERATE(false, true);
    const int deaths = die_at_every_call(folder, {path}, [&](const vkp_env *env, auto armed) {
        close(vkp_test_foreign_socket(path, 1));
        if (has_lock) {
            vkp_test_write_file(vkp_test_lock_of(path));
        }
        armed();
        make_one(open_registry(with(env)), path);
    });
    CHECK(deaths > 8);
}

TEST_CASE("socket processes: killed at any step of register_new, the path is there for the next")
{
    vkp_test_folder folder;
    const std::string path = folder.file();
    const int deaths = die_at_every_call(folder, {path}, [&](const vkp_env *env, auto armed) {
        const int fd = vkp_test_foreign_socket(path, 4);
        vkp_socket *sock = nullptr;
        armed();
        if (vkp_socket_adopt(open_registry(with(env)), vkp_str_of(path.c_str()), fd, &sock) !=
            VKP_OK) {
            vkp_test_fail("not registered");
        }
    });
    CHECK(deaths > 3);
}

TEST_CASE("socket processes: killed at any step of the last unref, the path is there for the next")
{
    vkp_test_folder folder;
    const std::string path = folder.file();
    const int deaths = die_at_every_call(folder, {path}, [&](const vkp_env *env, auto armed) {
        vkp_socket *sock = make_one(open_registry(with(env)), path);
        armed();
        vkp_socket_unref(sock);
    });
    CHECK(deaths > 4);
}

TEST_CASE("socket processes: killed at any step of a sweep, the paths are there for the next")
{
    vkp_test_folder folder;
    const std::vector<std::string> paths = {folder.file("a"), folder.file("b"), folder.file("c")};
    const int deaths = die_at_every_call(folder, paths, [&](const vkp_env *env, auto armed) {
        vkp_registry *registry = open_registry(with(env));
        for (const std::string &path : paths) {
            make_one(registry, path);
        }
        armed();
        if (vkp_registry_cleanup_all(registry) != paths.size()) {
            vkp_test_fail("not all were swept");
        }
    });
    CHECK(deaths > 12);
}

TEST_CASE("socket processes: killed at any step of a linger's end, the path is there for the next")
{
    vkp_test_folder folder;
    const std::string path = folder.file();
    const int deaths = die_at_every_call(folder, {path}, [&](const vkp_env *env, auto armed) {
        vkp_loop *loop = nullptr;
        vkp_registry_config config = {};
        config.linger_ms = 10;
        vkp_socket *sock = make_one(open_timed(env, config, &loop), path);
        armed();
        vkp_socket_unref(sock);
        pass(loop, 10);
        pass(loop, 1);
        if (vkp_test_exists(path.c_str())) {
            vkp_test_fail("it did not end");
        }
    });
    CHECK(deaths > 4);
}

TEST_CASE("socket processes: killed at any step of a rebind, the path is there for the next")
{
    vkp_test_folder folder;
    const std::string path = folder.file();
    const bool lost_lock = GENERATE(false, true);
    const int deaths = die_at_every_call(folder, {path}, [&](const vkp_env *env, auto armed) {
        vkp_loop *loop = nullptr;
        vkp_registry_config config = {};
        config.check_ms = 10;
        config.rebind = true;
        make_one(open_timed(env, config, &loop), path);
        pass(loop, 1);
        unlink(path.c_str());
        if (lost_lock) {
            unlink(vkp_test_lock_of(path).c_str());
        }
        armed();
        pass(loop, 11);
        if (!vkp_test_answers(path)) {
            vkp_test_fail("it was not bound again");
        }
    });
    CHECK(deaths > 5);
}

TEST_CASE("socket processes: killed between the steps of a lock, the path is there for the next")
{
    vkp_test_folder folder;
    const std::string path = folder.file();
    const std::string lock = vkp_test_lock_of(path);
    SECTION("the file was made, not locked")
    {
        vkp_test_write_file(lock);
    }
    SECTION("a lock file that only its owner's owner could read")
    {
        vkp_test_write_file(lock);
        REQUIRE(chmod(lock.c_str(), 0400) == 0);
        if (geteuid() != 0) { // to others it stays closed: that is a plain error
            vkp_test_registry registry;
            vkp_socket *sock = nullptr;
            CHECK(get(registry, path, &sock) == VKP_ERR_SYS);
            unlink(lock.c_str());
        }
    }
    SECTION("the socket's file was made, and no lock is there")
    {
        close(vkp_test_foreign_socket(path, -1));
    }
    check_clean_start(folder, {path});
}

TEST_CASE("socket processes: a dead process's socket is counted as taken over, another's as used")
{
    vkp_test_folder folder;
    vkp_test_registry registry;
    const std::string path = folder.file();
    vkp_test_leave_corpse(path);
    CHECK(folder.names() == std::vector<std::string>{"s", "s.lock"});
    vkp_socket *sock = registry.make(path);
    CHECK(registry.stats().taken_over == 1);
    vkp_socket_unref(sock);
    vkp_test_child child([&] { return vkp_test_serve(path); });
    REQUIRE(child.hear() == 's');
    CHECK(get(registry, path, &sock) == VKP_ERR_IN_USE);
    CHECK(registry.stats().taken_over == 1);
    CHECK(registry.stats().created == 1);
    child.end(SIGKILL);
    check_clean_start(folder, {path});
}

// ---- users and rights ----

namespace {

// Whether this process may become somebody else, which takes root. Then it is somebody else.
bool becomes_nobody()
{
    return setgid(65534) == 0 && setuid(65534) == 0;
}

} // namespace

TEST_CASE("socket processes: in a folder that is read-only cleanup does not fail, and is counted")
{
    vkp_test_folder folder;
    const std::string inner = folder.file("inner");
    const std::string path = inner + "/s";
    REQUIRE(mkdir(inner.c_str(), 0700) == 0);
    const bool is_root = geteuid() == 0;
    if (is_root) {
        REQUIRE(chown(inner.c_str(), 65534, 65534) == 0);
        REQUIRE(chmod(folder.path().c_str(), 0755) == 0);
        REQUIRE(chmod(vkp_test_dir(), 0755) == 0);
    }
    vkp_test_child child([&] {
        VKP_TEST_EXPECT(!is_root || becomes_nobody());
        const int fds = vkp_test_fd_count();
        vkp_registry *registry = open_registry();
        vkp_socket *sock = nullptr;
        VKP_TEST_EXPECT(get(registry, path, &sock) == VKP_OK);
        VKP_TEST_EXPECT(chmod(inner.c_str(), 0500) == 0);
        vkp_socket_unref(sock);
        vkp_registry_stats stats;
        vkp_registry_get_stats(registry, &stats);
        VKP_TEST_EXPECT(stats.live == 0);
        VKP_TEST_EXPECT(stats.unlink_failures >= 1);
        VKP_TEST_EXPECT(stats.unlink_errno == EACCES);
        VKP_TEST_EXPECT(vkp_test_exists(path.c_str()));
        VKP_TEST_EXPECT(!vkp_test_answers(path));
        // A new one there is an error that tells why, until the folder can be written again.
        errno = 0;
        VKP_TEST_EXPECT(get(registry, inner + "/t", &sock) == VKP_ERR_SYS);
        VKP_TEST_EXPECT(errno == EACCES);
        VKP_TEST_EXPECT(chmod(inner.c_str(), 0700) == 0);
        VKP_TEST_EXPECT(get(registry, path, &sock) == VKP_OK);
        vkp_socket_unref(sock);
        VKP_TEST_EXPECT(!vkp_test_exists(path.c_str()));
        VKP_TEST_EXPECT(!vkp_test_has_lock(path));
        vkp_registry_unref(registry);
        VKP_TEST_EXPECT(vkp_test_fd_count() == fds);
        return 0;
    });
    CHECK(child.end() == 0);
    chmod(vkp_test_dir(), 0700);
    CHECK(rmdir(inner.c_str()) == 0); // it is empty
}

TEST_CASE("socket processes: what belongs to another user is left alone, with or without a lock")
{
    if (geteuid() != 0) {
        WARN("not run: only root can make files of another user");
        return;
    }
    vkp_test_folder folder;
    vkp_test_registry registry;
    const std::string path = folder.file();
    const std::string lock = vkp_test_lock_of(path);
    vkp_socket *sock = nullptr;
    close(vkp_test_foreign_socket(path, 1));
    REQUIRE(chown(path.c_str(), 12345, 12345) == 0);
    SECTION("the socket alone")
    {
    }
    SECTION("its lock file, too")
    {
        // Whose lock file stands there is nobody's proof of whose socket it is.
        vkp_test_write_file(lock);
        REQUIRE(chown(lock.c_str(), 12345, 12345) == 0);
    }
    const ino_t before = vkp_test_look(path).st_ino;
    CHECK(get(registry, path, &sock) == VKP_ERR_EXISTS);
    CHECK(vkp_test_look(path).st_ino == before);
    CHECK(vkp_test_look(path).st_uid == 12345);
    CHECK(registry.fds_more() == 0);
    unlink(path.c_str());
    unlink(lock.c_str());
    CHECK(folder.is_empty());
}

// ---- forks ----

TEST_CASE("socket processes: nothing that a forked child does with what it inherited removes files")
{
    vkp_test_folder folder;
    vkp_test_registry registry;
    const std::string path = folder.file();
    const std::string other_path = folder.file("other");
    vkp_socket *sock = registry.make(path);
    vkp_socket *other = registry.make(other_path);
    const vkp_weak_socket weak = vkp_socket_downgrade(sock);
    const std::vector<std::string> names = folder.names();
    const std::function<int()> what = [&]() -> std::function<int()> {
        switch (GENERATE(0, 1, 2, 3, 4)) {
        case 0: // the last reference, and the registry's
            return [&] {
                vkp_socket_unref(sock);
                vkp_socket_unref(other);
                vkp_registry_unref(registry);
                return 0;
            };
        case 1: // a weak handle, before and after that
            return [&] {
                vkp_socket *got = nullptr;
                VKP_TEST_EXPECT(vkp_socket_upgrade(&weak, &got) == VKP_OK);
                VKP_TEST_EXPECT(got == sock);
                vkp_socket_unref(got);
                vkp_socket_unref(sock);
                VKP_TEST_EXPECT(vkp_socket_upgrade(&weak, &got) == VKP_ERR_NOT_FOUND);
                return 0;
            };
        case 2: // a sweep
            return [&] {
                (void)vkp_registry_cleanup_all(registry);
                VKP_TEST_EXPECT(!vkp_socket_is_active(sock));
                vkp_socket_unref(sock);
                vkp_socket_unref(other);
                return 0;
            };
        case 3: // what a handler of crashes calls
            return [&] {
                vkp_registry_unlink_all(registry);
                return 0;
            };
        default: // a child of the child
            return [&] {
                vkp_test_child grandchild([&] {
                    vkp_socket_unref(sock);
                    vkp_registry_unlink_all(registry);
                    (void)vkp_registry_cleanup_all(registry);
                    return 0;
                });
                return grandchild.end();
            };
        }
    }();
    {
        vkp_test_child child(what);
        CHECK(child.end() == 0);
    }
    CHECK(folder.names() == names);
    CHECK(vkp_test_answers(path));
    CHECK(vkp_test_answers(other_path));
    CHECK(vkp_test_ask_elsewhere(path) == VKP_ERR_IN_USE);
    CHECK(vkp_test_ask_elsewhere(other_path) == VKP_ERR_IN_USE);
    CHECK(vkp_socket_get_ref_count(sock) == 1);
    vkp_socket_unref(sock);
    vkp_socket_unref(other);
    CHECK(folder.is_empty());
    CHECK(registry.fds_more() == 0);
}

TEST_CASE("socket processes: in a forked child nothing lingers")
{
    vkp_test_folder folder;
    vkp_test_loop loop(&vkp_backend_null);
    vkp_registry_config config = {};
    config.linger_ms = 1000;
    config.loop = loop;
    vkp_test_registry registry(config);
    const std::string path = folder.file();
    vkp_socket *sock = registry.make(path);
    vkp_test_child child([&] {
        vkp_socket_unref(sock);
        VKP_TEST_EXPECT(vkp_registry_get_count(registry) == 0);
        return 0;
    });
    CHECK(child.end() == 0);
    loop.round(loop.now() + 5000000000);
    CHECK(vkp_test_answers(path));
    CHECK(vkp_socket_get_ref_count(sock) == 1);
    vkp_socket_unref(sock);
    loop.round();
    loop.round(loop.now() + 1000000000);
    CHECK(folder.is_empty());
}

TEST_CASE("socket processes: a child that still has what it inherited does not hold the path")
{
    vkp_test_folder folder;
    vkp_test_registry registry;
    const std::string path = folder.file();
    vkp_socket *sock = registry.make(path);
    vkp_test_child child([&] {
        vkp_test_child::say('s');
        (void)vkp_test_child::listen();
        // The parent's socket ended, and another process serves the path: this removes nothing.
        vkp_socket_unref(sock);
        vkp_registry_unref(registry);
        return 0;
    });
    REQUIRE(child.hear() == 's');
    vkp_socket_unref(sock);
    CHECK(folder.is_empty());
    sock = registry.make(path);
    CHECK(vkp_test_answers(path));
    child.tell('g');
    CHECK(child.end() == 0);
    CHECK(vkp_test_answers(path));
    CHECK(vkp_test_ask_elsewhere(path) == VKP_ERR_IN_USE);
    vkp_socket_unref(sock);
    CHECK(folder.is_empty());
}

TEST_CASE("socket processes: a child opens a registry of its own, and has what rules everybody has")
{
    vkp_test_folder folder;
    vkp_test_registry registry;
    const std::string path = folder.file();
    vkp_socket *sock = registry.make(path);
    vkp_test_child child([&] {
        vkp_registry *own_registry = open_registry();
        vkp_socket *mine = nullptr;
        VKP_TEST_EXPECT(get(own_registry, path, &mine) == VKP_ERR_IN_USE);
        VKP_TEST_EXPECT(get(own_registry, folder.file("child"), &mine) == VKP_OK);
        VKP_TEST_EXPECT(vkp_test_answers(folder.file("child")));
        vkp_socket_unref(mine);
        VKP_TEST_EXPECT(!vkp_test_exists(folder.file("child").c_str()));
        vkp_registry_unref(own_registry);
        return 0;
    });
    CHECK(child.end() == 0);
    vkp_socket_unref(sock);
    CHECK(folder.is_empty());
}

// ---- the end of a process ----

namespace {

vkp_registry *crashing = nullptr;

void unlink_and_die(int number)
{
    vkp_registry_unlink_all(crashing);
    signal(number, SIG_DFL);
    raise(number);
}

} // namespace

TEST_CASE("socket processes: a handler of crashes removes the files, wherever the crash was")
{
    vkp_test_folder folder;
    const std::string path = folder.file();
    const bool is_locked = GENERATE(false, true);
    INFO((is_locked ? "under the lock" : "anywhere"));
    vkp_test_child child([&] {
        static bool crashes_in_bind;
        vkp_sys sys = *vkp_sys_get_default();
        sys.bind = [](int fd, const void *address, uint32_t bytes, uint32_t mode) {
            if (crashes_in_bind) { // while the registry's lock is held: the handler takes none
                raise(SIGSEGV);
            }
            return vkp_sys_get_default()->bind(fd, address, bytes, mode);
        };
        vkp_env env = {};
        env.sys = &sys;
        crashing = open_registry(with(&env));
        vkp_socket *sock = nullptr;
        for (int i = 0; i < 10; i++) {
            sock = make_one(crashing, folder.file(std::to_string(i)));
        }
        vkp_socket_unref(sock); // one that ended, and whose path somebody else has
        vkp_test_write_file(folder.file("9"));
        sock = make_one(crashing, path);
        vkp_test_child::say('s');
        struct sigaction action;
        std::memset(&action, 0, sizeof action);
        action.sa_handler = unlink_and_die;
        sigaction(SIGSEGV, &action, nullptr);
        if (is_locked) {
            crashes_in_bind = true;
            make_one(crashing, folder.file("never"));
        } else {
            raise(SIGSEGV);
        }
        return 1;
    });
    CHECK(child.hear() == 's');
    CHECK(child.end() == 128 + SIGSEGV);
    CHECK(vkp_test_look(folder.file("9")).st_size == 4);
    unlink(folder.file("9").c_str());
    // What was being made has no file yet, but a lock, which belongs to nobody now.
    CHECK(folder.names() ==
          (is_locked ? std::vector<std::string>{"never.lock"} : std::vector<std::string>{}));
    check_clean_start(folder, {path, folder.file("never")});
}

TEST_CASE("socket processes: unlink_all takes no memory, and removes nothing but our own files")
{
    vkp_test_folder folder;
    const std::string names[] = {"ours", "replaced", "swept", "ended"};
    vkp_test_child child([&] {
        vkp_test_env test;
        vkp_test_env_init(&test);
        vkp_registry *registry = open_registry(with(&test.env));
        std::vector<vkp_socket *> socks;
        for (const std::string &name : names) {
            socks.push_back(make_one(registry, folder.file(name)));
        }
        unlink(folder.file("replaced").c_str());
        const int theirs = vkp_test_foreign_socket(folder.file("replaced"), 4);
        vkp_socket_unref(socks[3]);
        const int other = vkp_test_foreign_socket(folder.file("ended"), 4);
        const uint64_t calls = vkp_test_env_calls(&test);
        const size_t lines = vkp_test_env_log_count(&test);
        errno = 77;
        vkp_registry_unlink_all(registry);
        VKP_TEST_EXPECT(errno == 77); // what a handler interrupted finds its errno again
        VKP_TEST_EXPECT(vkp_test_env_calls(&test) == calls);
        VKP_TEST_EXPECT(vkp_test_env_log_count(&test) == lines);
        VKP_TEST_EXPECT(!vkp_test_exists(folder.file("ours").c_str()));
        VKP_TEST_EXPECT(!vkp_test_exists(folder.file("swept").c_str()));
        VKP_TEST_EXPECT(vkp_test_answers(folder.file("replaced")));
        VKP_TEST_EXPECT(vkp_test_answers(folder.file("ended")));
        vkp_registry_unlink_all(registry); // twice is once
        close(theirs);
        close(other);
        return 0;
    });
    CHECK(child.end() == 0);
    for (const std::string &name : names) {
        unlink(folder.file(name).c_str());
        unlink(folder.file(name + ".lock").c_str());
    }
    CHECK(folder.is_empty());
}

TEST_CASE("socket processes: a sweep registered for the exit leaves nothing")
{
    vkp_test_folder folder;
    vkp_test_child child([&] {
        crashing = open_registry();
        for (int i = 0; i < 3; i++) {
            make_one(crashing, folder.file(std::to_string(i)));
        }
        // The handlers registered before this one are the parent's and are not to run here.
        atexit([] { _exit(vkp_registry_cleanup_all(crashing) == 3 ? 7 : 1); });
        vkp_test_child::say('s');
        exit(2);
        return 3;
    });
    CHECK(child.hear() == 's');
    CHECK(child.end() == 7);
    CHECK(folder.is_empty());
}

TEST_CASE("socket processes: a death by a signal leaves files, which the next one takes over")
{
    vkp_test_folder folder;
    const std::string path = folder.file();
    const int number = GENERATE(SIGTERM, SIGKILL);
    vkp_test_child child([&] { return vkp_test_serve(path); });
    REQUIRE(child.hear() == 's');
    CHECK(child.end(number) == 128 + number);
    CHECK(folder.names() == std::vector<std::string>{"s", "s.lock"});
    check_clean_start(folder, {path});
}

// ---- names that a process's surroundings give ----

TEST_CASE("socket processes: the folder of unique names without a config")
{
    vkp_test_folder runtime;
    vkp_test_folder temporary;
    struct Case {
        const char *runtime;
        const char *temporary;
        std::string wanted;
    };
    const Case cases[] = {
        {runtime.path().c_str(), temporary.path().c_str(), runtime.path()},
        {nullptr, temporary.path().c_str(), temporary.path()},
        {nullptr, nullptr, "/tmp"},
        {"", "", "/tmp"},
    };
    for (const Case &each : cases) {
        INFO("wanted " << each.wanted);
        vkp_test_child child([&] {
            const auto set = [](const char *name, const char *value) {
                return value != nullptr ? setenv(name, value, 1) : unsetenv(name);
            };
            VKP_TEST_EXPECT(set("XDG_RUNTIME_DIR", each.runtime) == 0);
            VKP_TEST_EXPECT(set("TMPDIR", each.temporary) == 0);
            vkp_registry *registry = open_registry();
            vkp_socket *sock = nullptr;
            VKP_TEST_EXPECT(vkp_socket_open(registry, vkp_str_of(nullptr), &sock) == VKP_OK);
            const std::string path = vkp_socket_get_path(sock);
            VKP_TEST_EXPECT(path.compare(0, each.wanted.size() + 1, each.wanted + "/") == 0);
            VKP_TEST_EXPECT(path.find('/', each.wanted.size() + 1) == std::string::npos);
            VKP_TEST_EXPECT(vkp_test_answers(path));
            vkp_socket_unref(sock);
            VKP_TEST_EXPECT(!vkp_test_exists(path.c_str()));
            vkp_registry_unref(registry);
            return 0;
        });
        CHECK(child.end() == 0);
    }
    CHECK(runtime.is_empty());
    CHECK(temporary.is_empty());
}

TEST_CASE("socket processes: unique names of processes that were forked alike are different")
{
    vkp_test_folder folder;
    vkp_registry_config config = {};
    config.folder = vkp_str_of(folder.path().c_str());
    vkp_test_registry registry(config);
    std::vector<std::unique_ptr<vkp_test_child>> children;
    for (int i = 0; i < 4; i++) {
        children.push_back(std::make_unique<vkp_test_child>([&] {
            vkp_registry *mine = open_registry(config);
            for (int n = 0; n < 5; n++) {
                vkp_socket *sock = nullptr;
                VKP_TEST_EXPECT(vkp_socket_open(mine, vkp_str_of(nullptr), &sock) == VKP_OK);
            }
            vkp_test_child::say('s');
            (void)vkp_test_child::listen();
            VKP_TEST_EXPECT(vkp_registry_cleanup_all(mine) == 5);
            return 0;
        }));
    }
    for (const auto &child : children) {
        CHECK(child->hear() == 's');
    }
    CHECK(folder.names().size() == 40);
    for (const auto &child : children) {
        child->tell('e');
        CHECK(child->end() == 0);
    }
    CHECK(folder.is_empty());
}

TEST_CASE("socket processes: without the flag a name that begins with an at sign is a file")
{
    vkp_test_folder folder;
    vkp_test_child child([&] {
        VKP_TEST_EXPECT(chdir(folder.path().c_str()) == 0);
        vkp_registry *registry = open_registry();
        vkp_socket *sock = nullptr;
        VKP_TEST_EXPECT(get(registry, "@name", &sock) == VKP_OK);
        VKP_TEST_EXPECT(std::string(vkp_socket_get_path(sock)) == "@name");
        VKP_TEST_EXPECT(vkp_test_answers("./@name"));
        VKP_TEST_EXPECT((folder.names() == std::vector<std::string>{"@name", "@name.lock"}));
        vkp_socket_unref(sock);
        VKP_TEST_EXPECT(folder.is_empty());
        // A path is used as it is written: relative, and with what looks like a special name.
        for (const char *path : {"plain", "./dotted", "unix:colon", "with space", "\xc3\xa9"}) {
            VKP_TEST_EXPECT(get(registry, path, &sock) == VKP_OK);
            VKP_TEST_EXPECT(vkp_test_exists(path));
            vkp_socket_unref(sock);
            VKP_TEST_EXPECT(folder.is_empty());
        }
        vkp_registry_unref(registry);
        return 0;
    });
    CHECK(child.end() == 0);
    CHECK(folder.is_empty());
}
