/* The helpers that the other tests believe: counting memory, the peer's own RESP scanner, children,
   a real server killed and restarted.
   SPDX-License-Identifier: MIT */
#include "support/support.h"

#include "support/catch.hpp"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

namespace
{

void *resize(vkp_test_env &env, void *ptr, size_t old_bytes, size_t new_bytes)
{
    return env.env.alloc(env.env.user, ptr, old_bytes, new_bytes);
}

/* Whether fn ends its process by abort; its message goes nowhere. */
template <typename Fn>
bool aborts(Fn fn)
{
    pid_t pid = fork();
    if (pid == 0) {
        signal(SIGABRT, SIG_DFL);
        if (!freopen("/dev/null", "w", stderr)) {
            _exit(2);
        }
        fn();
        _exit(0);
    }
    int status = 0;
    return waitpid(pid, &status, 0) == pid && WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT;
}

} // namespace

TEST_CASE("the environment counts what is allocated")
{
    vkp_test_env env;
    vkp_test_env_init(&env);
    void *block = resize(env, nullptr, 0, 100);
    REQUIRE(block);
    std::memset(block, 1, 100);
    block = resize(env, block, 100, 300);
    REQUIRE(block);
    CHECK(vkp_test_env_live_bytes(&env) == 300);
    CHECK(vkp_test_env_live_blocks(&env) == 1);
    CHECK(vkp_test_env_calls(&env) == 2);
    CHECK(static_cast<unsigned char *>(block)[99] == 1);
    block = resize(env, block, 300, 10);
    CHECK(vkp_test_env_live_bytes(&env) == 10);
    CHECK(resize(env, block, 10, 0) == nullptr);
    CHECK(vkp_test_env_live_bytes(&env) == 0);
    CHECK(vkp_test_env_live_blocks(&env) == 0);
    CHECK(vkp_test_env_peak_bytes(&env) == 300);
    vkp_test_env_deinit(&env);
}

TEST_CASE("the environment fails the allocations it was told to")
{
    vkp_test_env env;
    vkp_test_env_init(&env);
    auto pattern = [&](vkp_test_fault fault, uint64_t k) {
        std::string result;
        vkp_test_env_fault(&env, fault, k);
        for (int i = 0; i < 6; i++) {
            void *block = resize(env, nullptr, 0, 8);
            result += block ? '+' : '-';
            if (block) {
                resize(env, block, 8, 0);
            }
        }
        return result;
    };
    CHECK(pattern(VKP_TEST_FAULT_ONCE, 2) == "+-++++");
    CHECK(pattern(VKP_TEST_FAULT_FROM, 3) == "++----");
    CHECK(pattern(VKP_TEST_FAULT_EVERY, 2) == "+-+-+-");
    CHECK(pattern(VKP_TEST_FAULT_NONE, 0) == "++++++");
    CHECK(vkp_test_env_failures(&env) == 8);
    CHECK(vkp_test_env_live_blocks(&env) == 0);
    vkp_test_env_deinit(&env);
}

TEST_CASE("the environment aborts on wrong sizes and on leaks")
{
    vkp_test_env env;
    vkp_test_env_init(&env);
    void *block = resize(env, nullptr, 0, 64);
    REQUIRE(block);
    CHECK(aborts([&] { resize(env, block, 63, 0); }));
    CHECK(aborts([&] { resize(env, block, 65, 128); }));
    CHECK(aborts([&] { vkp_test_env_deinit(&env); }));
    CHECK_FALSE(aborts([&] { resize(env, block, 64, 0); }));
    resize(env, block, 64, 0);
    vkp_test_env_deinit(&env);
}

TEST_CASE("the environment records log lines")
{
    vkp_test_env env;
    vkp_test_env_init(&env);
    for (int i = 0; i < 40; i++) {
        env.env.log(env.env.user, VKP_LOG_WARN, ("line " + std::to_string(i)).c_str());
    }
    char text[16];
    REQUIRE(vkp_test_env_log_count(&env) == 40);
    CHECK(vkp_test_env_log_line(&env, 39, text, sizeof text) == VKP_LOG_WARN);
    CHECK(std::string(text) == "line 39");
    CHECK(vkp_test_env_logged(&env, "ne 17"));
    CHECK_FALSE(vkp_test_env_logged(&env, "line 40"));
    CHECK(aborts([&] { env.env.log(env.env.user, VKP_LOG_WARN, "two\nlines"); }));
    vkp_test_env_log_clear(&env);
    CHECK(vkp_test_env_log_count(&env) == 0);
    vkp_test_env_deinit(&env);
}

TEST_CASE("paths are in one folder, which a forked child leaves alone")
{
    std::string path = vkp_test_path("a file");
    CHECK(path == vkp_test_path("a file"));
    CHECK(std::string(vkp_test_fresh_path("s")) != vkp_test_fresh_path("s"));
    CHECK(std::string(vkp_test_fresh_address("s")).rfind("unix:/", 0) == 0);
    CHECK(path.size() < 60);
    std::FILE *file = std::fopen(path.c_str(), "w");
    REQUIRE(file);
    std::fclose(file);
    pid_t pid = fork();
    if (pid == 0) {
        std::exit(0);
    }
    int status = 0;
    REQUIRE(waitpid(pid, &status, 0) == pid);
    CHECK(vkp_test_exists(path.c_str()));
}

TEST_CASE("descriptors are counted")
{
    int before = vkp_test_fd_count();
    int fds[2];
    vkp_test_socket_pair(fds);
    CHECK(vkp_test_fd_count() == before + 2);
    close(fds[0]);
    close(fds[1]);
    CHECK(vkp_test_fd_count() == before);
}

TEST_CASE("the peer cuts frames at every split")
{
    const std::vector<std::string> frames = {
        "+OK\r\n",
        "-ERR no\r\n",
        ":12\r\n",
        "$5\r\nab\r\nc\r\n",
        "$-1\r\n",
        "*-1\r\n",
        "$0\r\n\r\n",
        "*0\r\n",
        "*2\r\n$1\r\na\r\n*1\r\n:1\r\n",
        "%1\r\n+k\r\n*2\r\n_\r\n#t\r\n",
        "|1\r\n+ttl\r\n:5\r\n$1\r\nx\r\n",
        ">3\r\n$7\r\nmessage\r\n$4\r\nnews\r\n$2\r\nhi\r\n",
        "~2\r\n,1.5\r\n(123456789012345678901234567890\r\n",
        "=7\r\ntxt:abc\r\n",
        "!3\r\nERR\r\n",
    };
    std::string stream;
    for (const std::string &frame : frames) {
        stream += frame;
    }
    for (size_t split = 0; split <= stream.size(); split++) {
        int fds[2];
        vkp_test_socket_pair(fds);
        vkp_test_peer *reader = vkp_test_peer_of(fds[0]);
        vkp_test_peer *writer = vkp_test_peer_of(fds[1]);
        REQUIRE(vkp_test_peer_send(writer, stream.data(), split));
        size_t next = 0;
        size_t len = 0;
        while (const char *frame = vkp_test_peer_try_read_frame(reader, &len)) {
            REQUIRE(std::string(frame, len) == frames[next++]);
        }
        REQUIRE(vkp_test_peer_send(writer, stream.data() + split, stream.size() - split));
        vkp_test_peer_close(writer);
        while (next < frames.size()) {
            REQUIRE(vkp_test_frame(reader) == frames[next++]);
        }
        REQUIRE(vkp_test_frame(reader).empty());
        REQUIRE(vkp_test_peer_is_ended(reader));
        vkp_test_peer_close(reader);
    }
}

TEST_CASE("the peer reads counted bytes, and drops the rest")
{
    int fds[2];
    vkp_test_socket_pair(fds);
    vkp_test_peer *reader = vkp_test_peer_of(fds[0]);
    vkp_test_peer *writer = vkp_test_peer_of(fds[1]);
    REQUIRE(vkp_test_peer_send_text(writer, "abc+OK\r\nrest"));
    CHECK(std::string(vkp_test_peer_read(reader, 3)) == "abc");
    CHECK(vkp_test_frame(reader) == "+OK\r\n");
    vkp_test_peer_close(writer);
    CHECK(vkp_test_peer_drain(reader) == 4);
    CHECK(vkp_test_peer_read(reader, 1) == nullptr);
    CHECK_FALSE(vkp_test_peer_send_text(reader, "x"));
    vkp_test_peer_close(reader);
}

TEST_CASE("children give their output and their exit code")
{
    const char *argv[] = {"sh", "-c", "echo hello; exit 7", nullptr};
    int out = -1;
    int pid = vkp_test_spawn(argv, &out);
    char text[16] = "";
    size_t got = 0;
    for (ssize_t n; (n = read(out, text + got, sizeof text - 1 - got)) > 0;) {
        got += static_cast<size_t>(n);
    }
    close(out);
    CHECK(std::string(text) == "hello\n");
    CHECK(vkp_test_reap(pid, 0) == 7);
    const char *sleeper[] = {"sleep", "1000", nullptr};
    CHECK(vkp_test_reap(vkp_test_spawn(sleeper, nullptr), SIGTERM) == 128 + SIGTERM);
}

TEST_CASE("a real server is killed and comes back on its port")
{
    if (!vkp_test_server_program()) {
        WARN("not run: there is no valkey-server and no redis-server");
        return;
    }
    const char *options[] = {"--maxclients", "77", nullptr};
    vkp_test_server *server = vkp_test_server_open(options);
    int port = vkp_test_server_port(server);
    vkp_test_peer *peer = vkp_test_peer_open(vkp_test_server_tcp(server));
    CHECK(vkp_test_ask(peer, "PING") == "+PONG\r\n");
    CHECK(vkp_test_ask(peer, "CONFIG", "GET", "maxclients") ==
          "*2\r\n$10\r\nmaxclients\r\n$2\r\n77\r\n");
    CHECK(vkp_test_ask(peer, "SET", "key", "value") == "+OK\r\n");
    vkp_test_server_kill(server);
    CHECK(vkp_test_server_pid(server) == 0);
    CHECK(vkp_test_frame(peer).empty());
    vkp_test_peer_close(peer);
    CHECK(vkp_test_connect(vkp_test_server_tcp(server)) == -1);
    vkp_test_server_restart(server);
    CHECK(vkp_test_server_port(server) == port);
    peer = vkp_test_peer_open(vkp_test_server_unix(server));
    CHECK(vkp_test_ask(peer, "GET", "key") == "$-1\r\n");
    vkp_test_peer_close(peer);
    vkp_test_server_close(server);
}

TEST_CASE("every backend of this platform is listed")
{
    size_t count = 0;
    for (const vkp_backend *const *backend = vkp_test_backends(); *backend; backend++) {
        CHECK((*backend)->abi == VKP_BACKEND_ABI);
        CHECK(((*backend)->flags & VKP_BACKEND_VIRTUAL_TIME) == 0);
        count++;
    }
    size_t all = 0;
    while (vkp_test_backends_all()[all]) {
        all++;
    }
    CHECK(count == 2); // poll, and epoll or kqueue
#ifdef __linux__
    CHECK(all == count + 3); // null, and kqueue's over the emulation, with EVFILT_USER and without
#else
    CHECK(all == count + 1);
#endif
}
