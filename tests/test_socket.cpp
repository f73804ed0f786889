// SPDX-License-Identifier: MIT
//
// Ref-counted Unix sockets: who gets a path, what happens to files that others left there, races
// of the last reference with the next first one, forks, kills, and every call that may fail.
#include "support/catch.hpp"

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include <fcntl.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "support/socket_probe.h"

// ---- one registry, one path ----

TEST_CASE("socket: a registry is an object, freed with its last reference")
{
    vkp_test_env test;
    vkp_test_env_init(&test);
    vkp_registry_config config = {};
    config.env = &test.env;
    vkp_registry *registry = nullptr;
    CHECK(vkp_registry_open(&config, nullptr) == VKP_ERR_INVALID);
    vkp_test_env_fault(&test, VKP_TEST_FAULT_ONCE, 1);
    CHECK(vkp_registry_open(&config, &registry) == VKP_ERR_NOMEM);
    CHECK(registry == nullptr);
    REQUIRE(vkp_registry_open(&config, &registry) == VKP_OK);
    CHECK(vkp_registry_ref(registry) == registry);
    vkp_registry_unref(registry);
    CHECK(vkp_registry_get_count(registry) == 0);
    vkp_registry_unref(registry);
    vkp_registry_unref(nullptr);
    CHECK(vkp_test_env_live_blocks(&test) == 0);
    vkp_test_env_deinit(&test);
}

TEST_CASE("socket: a socket outlives the program's reference to its registry")
{
    vkp_test_env test;
    vkp_test_env_init(&test);
    vkp_registry_config config = {};
    config.env = &test.env;
    vkp_registry *registry = nullptr;
    vkp_socket *sock = nullptr;
    const char *path = vkp_test_fresh_path("s");
    REQUIRE(vkp_registry_open(&config, &registry) == VKP_OK);
    REQUIRE(vkp_socket_open(registry, vkp_str_of(path), &sock) == VKP_OK);
    vkp_registry_unref(registry);
    CHECK(vkp_test_answers(path));
    vkp_socket_unref(sock);
    CHECK_FALSE(vkp_test_exists(path));
    CHECK(vkp_test_env_live_blocks(&test) == 0);
    vkp_test_env_deinit(&test);
}

TEST_CASE("socket: the first handle binds, more share it, the last one removes all")
{
    vkp_test_registry registry;
    const char *path = vkp_test_fresh_path("s");
    vkp_socket *none = nullptr;
    CHECK(vkp_socket_find(registry, vkp_str_of(path), &none) == VKP_ERR_NOT_FOUND);
    CHECK_FALSE(vkp_registry_is_active(registry, vkp_str_of(path)));
    CHECK_FALSE(vkp_test_exists(path));

    vkp_socket *first = registry.make(path);
    CHECK(std::string(vkp_socket_get_path(first)) == path);
    CHECK(vkp_socket_is_active(first));
    CHECK(vkp_socket_get_ref_count(first) == 1);
    CHECK(registry.count() == 1);
    CHECK(vkp_registry_is_active(registry, vkp_str_of(path)));
    CHECK(S_ISSOCK(vkp_test_look(path).st_mode));
    CHECK((vkp_test_look(path).st_mode & 07777) == 0600);
    CHECK(vkp_test_has_lock(path));
    CHECK((vkp_test_look(vkp_test_lock_of(path)).st_mode & 07777) == 0600);
    CHECK(vkp_test_answers(path));

    vkp_socket *second = registry.make(path);
    vkp_socket *third = nullptr;
    REQUIRE(vkp_socket_find(registry, vkp_str_of(path), &third) == VKP_OK);
    CHECK(second == first);
    CHECK(third == first);
    CHECK(vkp_socket_ref(first) == first);
    CHECK(vkp_socket_get_ref_count(first) == 4);
    CHECK(registry.count() == 1);
    for (int i = 0; i < 3; i++) {
        vkp_socket_unref(first);
        CHECK(vkp_test_answers(path));
    }
    vkp_socket_unref(first);
    vkp_socket_unref(nullptr);
    CHECK(registry.count() == 0);
    CHECK_FALSE(vkp_registry_is_active(registry, vkp_str_of(path)));
    CHECK_FALSE(vkp_test_exists(path));
    CHECK_FALSE(vkp_test_has_lock(path));
    CHECK(vkp_socket_find(registry, vkp_str_of(path), &none) == VKP_ERR_NOT_FOUND);
    CHECK(registry.stats().unlink_failures == 0);
    CHECK(registry.fds_more() == 0);
}

TEST_CASE("socket: nobody connects before the file has the mode it is to have")
{
    // The mode that others see at each step is what counts, under an open umask and a closed one.
    static std::string path;
    static mode_t at_birth;
    static mode_t at_listen;
    path = vkp_test_fresh_path("s");
    at_birth = at_listen = 0;
    vkp_sys sys = *vkp_sys_get_default();
    sys.bind = [](int fd, const void *address, uint32_t bytes, uint32_t mode) {
        const int result = vkp_sys_get_default()->bind(fd, address, bytes, mode);
        at_birth = vkp_test_mode(path);
        return result;
    };
    sys.listen = [](int fd, int backlog) {
        at_listen = vkp_test_mode(path);
        return vkp_sys_get_default()->listen(fd, backlog);
    };
    struct Case {
        uint32_t configured;
        mode_t mask;
        mode_t wanted;
    };
    const Case each = GENERATE(Case{0, 0, 0600}, Case{0, 077, 0600}, Case{0, 0777, 0600},
                               Case{0660, 0, 0660}, Case{0666, 022, 0666}, Case{0640, 077, 0640});
    INFO("mode " << std::oct << each.configured << ", umask " << each.mask);
    vkp_registry_config config = {};
    config.mode = each.configured;
    vkp_test_registry registry(config, &sys);
    const mode_t before = umask(each.mask);
    vkp_socket *sock = registry.make(path);
    umask(before);
#ifdef __linux__
    const mode_t born_with = each.wanted;
#else
    const mode_t born_with = 0777 & ~each.mask; // it listens only once it has its mode
#endif
    CHECK((at_birth & ~born_with) == 0);
    CHECK(at_listen == each.wanted);
    CHECK(vkp_test_mode(path) == each.wanted);
    // Who may write to the lock file may hold the path.
    CHECK((vkp_test_mode(vkp_test_lock_of(path)) & ~mode_t{0600}) == 0);
    vkp_socket_unref(sock);
    CHECK(registry.fds_more() == 0);
}

TEST_CASE("socket: arguments that cannot be")
{
    vkp_test_registry registry;
    vkp_socket *sock = nullptr;
    const std::string dir = vkp_test_dir();
    CHECK(vkp_socket_open(nullptr, vkp_str_of("x"), &sock) == VKP_ERR_INVALID);
    CHECK(vkp_socket_open(registry, vkp_str_of("x"), nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_socket_find(registry, vkp_str_of(nullptr), &sock) == VKP_ERR_INVALID);
    CHECK(vkp_socket_find(nullptr, vkp_str_of("x"), &sock) == VKP_ERR_INVALID);
    CHECK(vkp_socket_find(registry, vkp_str_of("x"), nullptr) == VKP_ERR_INVALID);
    CHECK(vkp_socket_adopt(registry, vkp_str_of("x"), -1, &sock) == VKP_ERR_INVALID);
    CHECK(vkp_socket_adopt(nullptr, vkp_str_of("x"), 0, &sock) == VKP_ERR_INVALID);
    CHECK(vkp_socket_adopt(registry, vkp_str_of(nullptr), 0, &sock) == VKP_ERR_INVALID);
    CHECK(vkp_socket_adopt(registry, vkp_str_of("x"), 0, nullptr) == VKP_ERR_INVALID);
    for (const std::string &path : {std::string(), std::string(".."), std::string("../x"),
                                    dir + "/../x", dir + "/a/..", dir + "//.."}) {
        INFO("path \"" << path << '"');
        CHECK(vkp_socket_open(registry, vkp_str_of(path.c_str()), &sock) == VKP_ERR_INVALID);
        CHECK(vkp_socket_adopt(registry, vkp_str_of(path.c_str()), 0, &sock) == VKP_ERR_INVALID);
    }
    for (const std::string name : {"a..b", "..a", "b..", "...", ".a"}) {
        INFO("name " << name);
        const std::string path = dir + "/" + name;
        vkp_socket_unref(registry.make(path));
    }
    CHECK(sock == nullptr);
    CHECK(registry.fds_more() == 0);
}

TEST_CASE("socket: a path is used whole, or refused with the limit named")
{
    vkp_test_registry registry;
    const size_t most = sizeof(sockaddr_un::sun_path) - 1;
    std::string path = std::string(vkp_test_dir()) + "/";
    path += std::string(most - path.size(), 'p');
    vkp_socket *sock = registry.make(path);
    CHECK(vkp_test_exists(path.c_str()));
    CHECK(vkp_test_has_lock(path));
    CHECK(vkp_test_answers(path));
    vkp_socket_unref(sock);
    CHECK_FALSE(vkp_test_exists(path.c_str()));
    CHECK_FALSE(vkp_test_has_lock(path));

    path += 'p';
    sock = nullptr;
    CHECK(vkp_socket_open(registry, vkp_str_of(path.c_str()), &sock) == VKP_ERR_LIMIT);
    CHECK(vkp_socket_adopt(registry, vkp_str_of(path.c_str()), 0, &sock) == VKP_ERR_LIMIT);
    CHECK(sock == nullptr);
    CHECK(vkp_test_env_logged(&registry.test, std::to_string(most).c_str()));
    path.pop_back();
    CHECK_FALSE(vkp_test_exists(path.c_str())); // nor a shortened one
    CHECK(registry.fds_more() == 0);
}

// ---- what others left at the path ----

TEST_CASE("socket: something that is no socket is refused and left alone")
{
    vkp_test_registry registry;
    const std::string path = vkp_test_fresh_path("s");
    vkp_socket *sock = nullptr;
    int other = -1;
    SECTION("a file")
    {
        vkp_test_write_file(path);
    }
    SECTION("a directory")
    {
        REQUIRE(mkdir(path.c_str(), 0700) == 0);
    }
    SECTION("a named pipe")
    {
        REQUIRE(mkfifo(path.c_str(), 0600) == 0);
    }
    SECTION("a symbolic link to nowhere")
    {
        REQUIRE(symlink((path + ".nowhere").c_str(), path.c_str()) == 0);
    }
    SECTION("a symbolic link to a dead socket")
    {
        close(vkp_test_foreign_socket(path + ".dead", 1));
        REQUIRE(symlink((path + ".dead").c_str(), path.c_str()) == 0);
    }
    SECTION("a symbolic link to a live socket")
    {
        other = vkp_test_foreign_socket(path + ".live", 1);
        REQUIRE(symlink((path + ".live").c_str(), path.c_str()) == 0);
    }
    const struct stat before = vkp_test_look(path);
    CHECK(vkp_socket_open(registry, vkp_str_of(path.c_str()), &sock) == VKP_ERR_EXISTS);
    CHECK(sock == nullptr);
    CHECK(vkp_test_env_logged(&registry.test, path.c_str()));
    const struct stat after = vkp_test_look(path);
    CHECK(after.st_ino == before.st_ino);
    CHECK(after.st_mode == before.st_mode);
    CHECK(after.st_size == before.st_size);
    CHECK_FALSE(vkp_test_has_lock(path));
    CHECK(registry.count() == 0);
    if (other >= 0) {
        close(other);
    }
    remove(path.c_str());
    CHECK(registry.fds_more() == 0);
}

TEST_CASE("socket: a symbolic link in place of the lock file is not followed")
{
    vkp_test_registry registry;
    const char *path = vkp_test_fresh_path("s");
    const std::string target = std::string(path) + ".target";
    vkp_test_write_file(target);
    REQUIRE(symlink(target.c_str(), vkp_test_lock_of(path).c_str()) == 0);
    vkp_socket *sock = nullptr;
    CHECK(vkp_socket_open(registry, vkp_str_of(path), &sock) == VKP_ERR_EXISTS);
    CHECK(vkp_test_look(target).st_size == 4);
    CHECK(S_ISLNK(vkp_test_look(vkp_test_lock_of(path)).st_mode));
    CHECK_FALSE(vkp_test_exists(path));
    CHECK(registry.fds_more() == 0);
}

TEST_CASE("socket: a dead socket of another user is left alone")
{
    static std::string path;
    path = vkp_test_fresh_path("s");
    vkp_sys sys = *vkp_sys_get_default();
    sys.identify = [](const char *name, vkp_file_id *id) {
        int result = vkp_sys_get_default()->identify(name, id);
        id->uid += path == name ? 1u : 0u;
        return result;
    };
    vkp_test_registry registry(&sys);
    close(vkp_test_foreign_socket(path, 1));
    const ino_t before = vkp_test_look(path).st_ino;
    vkp_socket *sock = nullptr;
    CHECK(vkp_socket_open(registry, vkp_str_of(path.c_str()), &sock) == VKP_ERR_EXISTS);
    CHECK(vkp_test_look(path).st_ino == before);
}

TEST_CASE("socket: a dead socket is taken over, with or without its lock file")
{
    vkp_test_registry registry;
    const char *path = vkp_test_fresh_path("s");
    SECTION("of a process that was killed")
    {
        vkp_test_child child([&] { return vkp_test_serve(path); });
        REQUIRE(child.hear() == 's');
        CHECK(child.end(SIGKILL) == 128 + SIGKILL);
        CHECK(vkp_test_has_lock(path));
    }
    SECTION("of a server that knows no lock files")
    {
        close(vkp_test_foreign_socket(path, 1));
    }
    SECTION("whose lock file alone is left")
    {
        vkp_test_write_file(vkp_test_lock_of(path));
    }
    CHECK_FALSE(vkp_test_answers(path));
    vkp_socket *sock = registry.make(path);
    CHECK(vkp_test_answers(path));
    CHECK((vkp_test_look(path).st_mode & 07777) == 0600);
    vkp_socket_unref(sock);
    CHECK_FALSE(vkp_test_exists(path));
    CHECK_FALSE(vkp_test_has_lock(path));
    CHECK(registry.fds_more() == 0);
}

TEST_CASE("socket: a live socket is never taken")
{
    vkp_test_registry registry;
    const char *path = vkp_test_fresh_path("s");
    vkp_socket *sock = nullptr;
    SECTION("of another process with this library")
    {
        vkp_test_child child([&] { return vkp_test_serve(path); });
        REQUIRE(child.hear() == 's');
        const ino_t before = vkp_test_look(path).st_ino;
        CHECK(vkp_socket_open(registry, vkp_str_of(path), &sock) == VKP_ERR_IN_USE);
        CHECK(vkp_test_look(path).st_ino == before);
        CHECK(vkp_test_has_lock(path));
        CHECK(vkp_test_answers(path));
        CHECK(child.end(SIGKILL) == 128 + SIGKILL);
        vkp_socket_unref(registry.make(path));
    }
    SECTION("of a server that knows no lock files")
    {
        int server = vkp_test_foreign_socket(path, 4);
        CHECK(vkp_socket_open(registry, vkp_str_of(path), &sock) == VKP_ERR_IN_USE);
        CHECK(vkp_test_answers(path));
        CHECK_FALSE(vkp_test_has_lock(path));
        close(server);
    }
    SECTION("of a server that is too busy to accept")
    {
        int server = vkp_test_foreign_socket(path, 0);
        const sockaddr_un address = vkp_test_sockaddr(path);
        std::vector<int> waiting;
        int result = 0;
        while (result == 0 && waiting.size() < 200) {
            waiting.push_back(socket(AF_UNIX, SOCK_STREAM, 0));
            fcntl(waiting.back(), F_SETFL, O_NONBLOCK);
            result = connect(waiting.back(), reinterpret_cast<const sockaddr *>(&address),
                             sizeof address);
        }
#ifdef __linux__
        REQUIRE(result != 0);
        CHECK(vkp_socket_open(registry, vkp_str_of(path), &sock) == VKP_ERR_IN_USE);
        CHECK(vkp_test_exists(path));
#endif
        for (int fd : waiting) {
            close(fd);
        }
        close(server);
    }
    SECTION("of another registry in this process")
    {
        vkp_test_registry other;
        vkp_socket *theirs = other.make(path);
        CHECK(vkp_socket_open(registry, vkp_str_of(path), &sock) == VKP_ERR_IN_USE);
        CHECK(vkp_test_answers(path));
        vkp_socket_unref(theirs);
        sock = registry.make(path);
        vkp_socket_unref(sock);
        sock = nullptr;
    }
    CHECK(sock == nullptr);
    CHECK(registry.fds_more() == 0);
}

TEST_CASE("socket: of many processes that find a dead socket exactly one gets it")
{
    const char *path = vkp_test_fresh_path("s");
    constexpr int racers = 20;
    for (int round = 0; round < 5; round++) {
        {
            vkp_test_child victim([&] { return vkp_test_serve(path); });
            REQUIRE(victim.hear() == 's');
            REQUIRE(victim.end(SIGKILL) == 128 + SIGKILL);
        }
        int gate[2];
        REQUIRE(pipe(gate) == 0);
        std::vector<std::unique_ptr<vkp_test_child>> children;
        for (int i = 0; i < racers; i++) {
            children.push_back(std::make_unique<vkp_test_child>([&] {
                char byte;
                close(gate[1]);
                vkp_registry *registry = nullptr;
                vkp_socket *sock = nullptr;
                if (vkp_registry_open(nullptr, &registry) != VKP_OK || read(gate[0], &byte, 1)) {
                    return 1;
                }
                vkp_status status = vkp_socket_open(registry, vkp_str_of(path), &sock);
                vkp_test_child::say(status == VKP_OK ? 'w' : status == VKP_ERR_IN_USE ? 'l' : '?');
                for (;;) {
                    pause();
                }
            }));
        }
        close(gate[0]);
        close(gate[1]); // the start
        int winners = 0;
        int losers = 0;
        for (const auto &child : children) {
            const char word = child->hear();
            winners += word == 'w';
            losers += word == 'l';
        }
        CHECK(winners == 1);
        CHECK(losers == racers - 1);
        CHECK(vkp_test_answers(path));
        for (const auto &child : children) {
            child->end(SIGKILL);
        }
    }
    CHECK(vkp_test_ask_elsewhere(path) == VKP_OK);
}

// ---- the end ----

TEST_CASE("socket: files that changed behind our back are not removed, and nothing fails")
{
    vkp_test_registry registry;
    const char *path = vkp_test_fresh_path("s");
    vkp_socket *sock = registry.make(path);
    REQUIRE(unlink(path) == 0);
    SECTION("removed")
    {
        vkp_socket_unref(sock);
        CHECK_FALSE(vkp_test_exists(path));
    }
    SECTION("replaced by a file")
    {
        vkp_test_write_file(path);
        vkp_socket_unref(sock);
        CHECK(vkp_test_look(path).st_size == 4);
        unlink(path);
    }
    SECTION("replaced by a socket of somebody else")
    {
        int other = vkp_test_foreign_socket(path, 4);
        vkp_socket_unref(sock);
        CHECK(vkp_test_answers(path));
        close(other);
        unlink(path);
    }
    SECTION("the lock file removed too")
    {
        REQUIRE(unlink(vkp_test_lock_of(path).c_str()) == 0);
        vkp_socket_unref(sock);
    }
    CHECK_FALSE(vkp_test_has_lock(path));
    CHECK(registry.stats().unlink_failures == 0);
    CHECK(registry.count() == 0);
    CHECK(registry.fds_more() == 0);
}

TEST_CASE("socket: a file that cannot be removed is counted, with the reason")
{
    static std::string path;
    path = vkp_test_fresh_path("s");
    vkp_sys sys = *vkp_sys_get_default();
    sys.unlink = [](const char *name) {
        return path == name ? -EROFS : vkp_sys_get_default()->unlink(name);
    };
    vkp_test_registry registry(&sys);
    CHECK(registry.stats().unlink_failures == 0);
    vkp_socket_unref(registry.make(path));
    CHECK(registry.stats().unlink_failures == 1);
    CHECK(registry.stats().unlink_errno == EROFS);
    CHECK(registry.count() == 0);
    CHECK(registry.fds_more() == 0);
    CHECK(unlink(path.c_str()) == 0);
}

TEST_CASE("socket: cleanup of all works with live handles, which end inactive")
{
    vkp_test_registry registry;
    CHECK(vkp_registry_cleanup_all(registry) == 0);
    std::vector<vkp_socket *> socks;
    std::vector<std::string> paths;
    for (int i = 0; i < 5; i++) {
        paths.push_back(vkp_test_fresh_path("s"));
        socks.push_back(registry.make(paths.back().c_str()));
    }
    CHECK(vkp_registry_cleanup_all(registry) == 5);
    CHECK(vkp_registry_cleanup_all(registry) == 0);
    CHECK(registry.count() == 0);
    for (int i = 0; i < 5; i++) {
        CHECK_FALSE(vkp_socket_is_active(socks[i]));
        CHECK(vkp_socket_get_path(socks[i]) == paths[i]);
        CHECK_FALSE(vkp_test_exists(paths[i].c_str()));
        CHECK_FALSE(vkp_test_has_lock(paths[i]));
        CHECK_FALSE(vkp_test_answers(paths[i]));
    }
    // The path is free: a new socket and its file survive the old handle's end.
    vkp_socket *next = registry.make(paths[0]);
    CHECK(next != socks[0]);
    for (vkp_socket *sock : socks) {
        vkp_socket_unref(sock);
    }
    CHECK(vkp_socket_is_active(next));
    CHECK(registry.count() == 1);
    CHECK(vkp_test_has_lock(paths[0]));
    CHECK(vkp_test_answers(paths[0]));
    vkp_socket_unref(next);
    CHECK(registry.fds_more() == 0);
}

TEST_CASE("socket: what a forked child gives back is the parent's still")
{
    vkp_test_registry registry;
    const char *path = vkp_test_fresh_path("s");
    vkp_socket *sock = registry.make(path);
    {
        vkp_test_child child([&] {
            vkp_socket_unref(sock);
            return 0;
        });
        CHECK(child.end() == 0);
    }
    CHECK(vkp_test_exists(path));
    CHECK(vkp_test_has_lock(path));
    CHECK(vkp_test_answers(path));
    {
        vkp_test_child other(
            [&] { return vkp_test_ask_elsewhere(path) == VKP_ERR_IN_USE ? 0 : 1; });
        CHECK(other.end() == 0);
    }
    vkp_socket_unref(sock);
    CHECK_FALSE(vkp_test_exists(path));
    CHECK_FALSE(vkp_test_has_lock(path));
}

// ---- sockets that the caller bound ----

TEST_CASE("socket: registering a bound socket takes its descriptor")
{
    vkp_test_registry registry;
    const char *path = vkp_test_fresh_path("s");
    int fd = vkp_test_foreign_socket(path, 8);
    vkp_socket *sock = nullptr;
    REQUIRE(vkp_socket_adopt(registry, vkp_str_of(path), fd, &sock) == VKP_OK);
    CHECK(vkp_socket_is_active(sock));
    CHECK(vkp_test_has_lock(path));
    CHECK(registry.make(path) == sock);
    vkp_socket_unref(sock);
    CHECK(vkp_test_answers(path));
    vkp_socket_unref(sock);
    CHECK_FALSE(vkp_test_exists(path));
    CHECK_FALSE(vkp_test_has_lock(path));
    CHECK(registry.fds_more() == 0);
}

TEST_CASE("socket: registering that fails leaves the descriptor with the caller")
{
    vkp_test_registry registry;
    const char *path = vkp_test_fresh_path("s");
    const char *elsewhere = vkp_test_fresh_path("s");
    int fd = vkp_test_foreign_socket(elsewhere, 8);
    vkp_socket *sock = nullptr;
    SECTION("a handle of that path lives")
    {
        vkp_socket *mine = registry.make(path);
        CHECK(vkp_socket_adopt(registry, vkp_str_of(path), fd, &sock) == VKP_ERR_EXISTS);
        CHECK(vkp_test_answers(path));
        vkp_socket_unref(mine);
    }
    SECTION("another process holds the lock")
    {
        vkp_test_child child([&] { return vkp_test_serve(path); });
        REQUIRE(child.hear() == 's');
        CHECK(vkp_socket_adopt(registry, vkp_str_of(path), fd, &sock) == VKP_ERR_IN_USE);
        CHECK(vkp_test_answers(path));
        child.end(SIGKILL);
        CHECK(vkp_test_ask_elsewhere(path) == VKP_OK);
    }
    SECTION("there is no file")
    {
        CHECK(vkp_socket_adopt(registry, vkp_str_of(path), fd, &sock) == VKP_ERR_INVALID);
    }
    SECTION("it is no socket")
    {
        vkp_test_write_file(path);
        CHECK(vkp_socket_adopt(registry, vkp_str_of(path), fd, &sock) == VKP_ERR_INVALID);
        CHECK(vkp_test_look(path).st_size == 4);
        unlink(path);
    }
    SECTION("there is no memory")
    {
        for (uint64_t k = 1; sock == nullptr; k++) {
            INFO("allocation " << k);
            vkp_test_env_fault(&registry.test, VKP_TEST_FAULT_ONCE, k);
            vkp_status status = vkp_socket_adopt(registry, vkp_str_of(elsewhere), fd, &sock);
            vkp_test_env_fault(&registry.test, VKP_TEST_FAULT_NONE, 0);
            if (status != VKP_OK) {
                CHECK(status == VKP_ERR_NOMEM);
                CHECK(vkp_test_answers(elsewhere));
                CHECK_FALSE(vkp_test_has_lock(elsewhere));
            }
        }
        vkp_socket_unref(sock);
        sock = nullptr;
        fd = -1;
    }
    CHECK(sock == nullptr);
    CHECK(registry.count() == 0);
    CHECK_FALSE(vkp_test_has_lock(path));
    if (fd >= 0) {
        CHECK(vkp_test_answers(elsewhere));
        CHECK(fcntl(fd, F_GETFD) >= 0);
        close(fd);
    }
    CHECK(registry.fds_more() == 0);
}

// ---- threads ----

TEST_CASE("socket: 50 threads that ask for one path share one socket")
{
    vkp_test_registry registry;
    const char *path = vkp_test_fresh_path("s");
    std::vector<vkp_socket *> got(50);
    vkp_test_run_threads(50, [&](int i) { got[i] = registry.make(path); });
    for (vkp_socket *sock : got) {
        CHECK(sock == got[0]);
    }
    CHECK(vkp_socket_get_ref_count(got[0]) == 50);
    CHECK(registry.count() == 1);
    vkp_test_run_threads(50, [&](int i) { vkp_socket_unref(got[i]); });
    CHECK(registry.count() == 0);
    CHECK_FALSE(vkp_test_exists(path));
    CHECK(registry.fds_more() == 0);
}

TEST_CASE("socket: 20 threads that get and drop leave nothing behind")
{
    vkp_test_registry registry;
    std::vector<std::string> paths;
    for (int i = 0; i < 10; i++) {
        paths.push_back(vkp_test_fresh_path("s"));
    }
    vkp_test_run_threads(20, [&](int) {
        for (const std::string &path : paths) {
            vkp_socket_unref(registry.make(path));
        }
    });
    CHECK(registry.count() == 0);
    for (const std::string &path : paths) {
        CHECK_FALSE(vkp_test_exists(path.c_str()));
        CHECK_FALSE(vkp_test_has_lock(path));
    }
    CHECK(registry.fds_more() == 0);
}

TEST_CASE("socket: the end of a socket that races the next one's start leaves that one alive")
{
    vkp_test_registry registry;
    const char *path = vkp_test_fresh_path("s");
    std::atomic<int> dead{0};
    vkp_test_run_threads(8, [&](int) {
        for (int i = 0; i < 150; i++) {
            vkp_socket *sock = registry.make(path);
            // While this reference lives, so does the socket, whatever the others do.
            dead += vkp_socket_is_active(sock) && vkp_test_exists(path) && vkp_test_has_lock(path)
                        ? 0
                        : 1;
            vkp_socket_unref(sock);
        }
    });
    CHECK(dead.load() == 0);
    CHECK(registry.count() == 0);
    CHECK_FALSE(vkp_test_exists(path));
    CHECK_FALSE(vkp_test_has_lock(path));
    CHECK(registry.fds_more() == 0);
}

TEST_CASE("socket: the figures hold")
{
    vkp_test_registry registry;
    const char *path = vkp_test_fresh_path("s");
    SECTION("1000 references, 500 given back")
    {
        vkp_socket *sock = registry.make(path);
        for (int i = 1; i < 1000; i++) {
            REQUIRE(vkp_socket_ref(sock) == sock);
        }
        CHECK(vkp_socket_get_ref_count(sock) == 1000);
        for (int i = 0; i < 500; i++) {
            vkp_socket_unref(sock);
        }
        CHECK(vkp_socket_get_ref_count(sock) == 500);
        CHECK(vkp_socket_is_active(sock));
        for (int i = 0; i < 500; i++) {
            vkp_socket_unref(sock);
        }
    }
    SECTION("101 references from 100 threads and this one")
    {
        vkp_socket *sock = registry.make(path);
        std::atomic<int> refused{0};
        vkp_test_run_threads(100, [&](int) { refused += vkp_socket_ref(sock) == sock ? 0 : 1; });
        CHECK(refused.load() == 0);
        CHECK(vkp_socket_get_ref_count(sock) == 101);
        vkp_test_run_threads(101, [&](int) { vkp_socket_unref(sock); });
    }
    SECTION("500 sockets at once")
    {
        std::vector<vkp_socket *> socks;
        const std::string stem = vkp_test_fresh_path("s");
        for (int i = 0; i < 500; i++) {
            socks.push_back(registry.make((stem + "." + std::to_string(i)).c_str()));
        }
        CHECK(registry.count() == 500);
        for (vkp_socket *sock : socks) {
            CHECK(vkp_registry_is_active(registry, vkp_str_of(vkp_socket_get_path(sock))));
            vkp_socket_unref(sock);
        }
    }
    SECTION("200 cycles of create and destroy")
    {
        for (int i = 0; i < 200; i++) {
            vkp_socket *sock = registry.make(path);
            CHECK(registry.count() == 1);
            vkp_socket_unref(sock);
            CHECK_FALSE(vkp_test_exists(path));
        }
    }
    SECTION("10 bursts of 50")
    {
        for (int burst = 0; burst < 10; burst++) {
            std::vector<vkp_socket *> socks;
            const std::string stem = vkp_test_fresh_path("s");
            for (int i = 0; i < 50; i++) {
                socks.push_back(registry.make((stem + "." + std::to_string(i)).c_str()));
            }
            CHECK(registry.count() == 50);
            for (vkp_socket *sock : socks) {
                vkp_socket_unref(sock);
            }
        }
    }
    CHECK(registry.count() == 0);
    CHECK_FALSE(vkp_test_exists(path));
    CHECK(registry.fds_more() == 0);
}

// ---- everything that may fail ----

TEST_CASE("socket: every allocation of get_or_create may fail")
{
    vkp_test_registry registry;
    const size_t blocks = vkp_test_env_live_blocks(&registry.test);
    uint64_t k = 1;
    for (;; k++) {
        INFO("allocation " << k);
        const char *path = vkp_test_fresh_path("s");
        vkp_socket *sock = nullptr;
        vkp_test_env_fault(&registry.test, VKP_TEST_FAULT_FROM, k);
        vkp_status status = vkp_socket_open(registry, vkp_str_of(path), &sock);
        vkp_test_env_fault(&registry.test, VKP_TEST_FAULT_NONE, 0);
        if (status == VKP_OK) {
            vkp_socket_unref(sock);
            break;
        }
        CHECK(status == VKP_ERR_NOMEM);
        CHECK(sock == nullptr);
        CHECK_FALSE(vkp_test_exists(path));
        CHECK_FALSE(vkp_test_has_lock(path));
        CHECK(registry.fds_more() == 0);
        CHECK(vkp_test_env_live_blocks(&registry.test) == blocks);
        vkp_socket_unref(registry.make(path)); // and then it works
    }
    CHECK(k > 1);
    CHECK(registry.fds_more() == 0);
}

TEST_CASE("socket: every system call of get_or_create may fail")
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
    sys.chmod = [](const char *name, uint32_t mode) {
        return calls++ == fault_at ? -EPERM : vkp_sys_get_default()->chmod(name, mode);
    };
    sys.lock_file = [](const char *name, vkp_file_id *id) {
        return calls++ == fault_at ? -ENOSPC : vkp_sys_get_default()->lock_file(name, id);
    };
    sys.identify = [](const char *name, vkp_file_id *id) {
        return calls++ == fault_at ? -EIO : vkp_sys_get_default()->identify(name, id);
    };
    vkp_test_registry registry(&sys);
    int failed = 0;
    for (fault_at = 0;; fault_at++) {
        INFO("call " << fault_at);
        const char *path = vkp_test_fresh_path("s");
        vkp_socket *sock = nullptr;
        calls = 0;
        errno = 0;
        vkp_status status = vkp_socket_open(registry, vkp_str_of(path), &sock);
        const int error = errno;
        if (status == VKP_OK) {
            vkp_socket_unref(sock);
            break;
        }
        failed++;
        CHECK(status == VKP_ERR_SYS);
        CHECK(error != 0);
        CHECK(sock == nullptr);
        CHECK_FALSE(vkp_test_exists(path));
        CHECK_FALSE(vkp_test_has_lock(path));
        CHECK(registry.fds_more() == 0);
    }
    CHECK(failed >= 6);
    CHECK(registry.count() == 0);
    CHECK(registry.fds_more() == 0);
}

TEST_CASE("socket: a bind that loses a race says who has the path")
{
    static int error;
    error = GENERATE(EADDRINUSE, EEXIST);
    vkp_sys sys = *vkp_sys_get_default();
    sys.bind = [](int, const void *, uint32_t, uint32_t) { return -error; };
    vkp_test_registry registry(&sys);
    const char *path = vkp_test_fresh_path("s");
    vkp_socket *sock = nullptr;
    CHECK(vkp_socket_open(registry, vkp_str_of(path), &sock) == VKP_ERR_IN_USE);
    CHECK_FALSE(vkp_test_has_lock(path));
    CHECK(registry.fds_more() == 0);
}

TEST_CASE("socket: a folder that does not exist is a plain error")
{
    vkp_test_registry registry;
    const std::string path = std::string(vkp_test_fresh_path("nowhere")) + "/s";
    vkp_socket *sock = nullptr;
    errno = 0;
    CHECK(vkp_socket_open(registry, vkp_str_of(path.c_str()), &sock) == VKP_ERR_SYS);
    CHECK(errno == ENOENT);
    CHECK(registry.fds_more() == 0);
}
