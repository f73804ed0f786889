// SPDX-License-Identifier: MIT
//
// Status codes, deadlines, and the table of operating system calls: what every other part of the
// library assumes without checking.
#include "support/catch.hpp"

#include <cerrno>
#include <cstring>
#include <fstream>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>
#if defined(__linux__)
#include <sched.h>
#include <sys/epoll.h>
#else
#include <sys/event.h>
#endif

#include "support/support.h"

namespace {

struct NamedStatus {
    const char *name;
    vkp_status status;
    const char *text;
};

const NamedStatus k_statuses[] = {
#define ROW(name, value, text) {#name, name, text},
    VKP_STATUS_MAP(ROW)
#undef ROW
};

bool is_nonblocking(int fd)
{
    return (fcntl(fd, F_GETFL) & O_NONBLOCK) != 0;
}
bool is_cloexec(int fd)
{
    return (fcntl(fd, F_GETFD) & FD_CLOEXEC) != 0;
}

bool poll_readable(const vkp_sys *sys, int fd, uint64_t deadline_ns)
{
    struct pollfd entry;
    entry.fd = fd;
    entry.events = POLLIN;
    entry.revents = 0;
    return sys->poll(&entry, 1, deadline_ns) == 1 && (entry.revents & POLLIN) != 0;
}

sockaddr_un unix_address(const std::string &path)
{
    sockaddr_un address;
    std::memset(&address, 0, sizeof address);
    address.sun_family = AF_UNIX;
    REQUIRE(path.size() < sizeof address.sun_path);
    std::memcpy(address.sun_path, path.c_str(), path.size());
    return address;
}

} // namespace

TEST_CASE("base: a status has one number for ever and a text", "[base]")
{
    int expected = 0;
    std::set<std::string> texts;
    for (const NamedStatus &row : k_statuses) {
        INFO(row.name);
        CHECK(static_cast<int>(row.status) == expected);
        CHECK(std::string(vkp_status_str(row.status)) == row.text);
        CHECK(texts.insert(vkp_status_str(row.status)).second);
        expected--;
    }
    CHECK(VKP_OK == 0);
    CHECK(VKP_ERR_UNSUPPORTED == -17);
}

TEST_CASE("base: a number that is no status still has a text", "[base]")
{
    for (int number : {1, 7, -999, -1000, 2147483647}) {
        INFO(number);
        const char *text = vkp_status_str(static_cast<vkp_status>(number));
        REQUIRE(text != nullptr);
        CHECK(std::strlen(text) > 0);
    }
}

TEST_CASE("base: the version at run time is the header's", "[base]")
{
    const std::string parts = std::to_string(VKP_VERSION_MAJOR) + "." +
                              std::to_string(VKP_VERSION_MINOR) + "." +
                              std::to_string(VKP_VERSION_PATCH);
    CHECK(std::string(vkp_version_str()) == parts);
    CHECK(std::string(vkp_version_str()) == VKP_VERSION_STR);
}

TEST_CASE("base: the clock never goes back, on one thread or across a join", "[base]")
{
    uint64_t before = vkp_now_ns();
    CHECK(before > 0);
    bool ordered = true;
    for (int i = 0; i < 10000; i++) {
        const uint64_t now = vkp_now_ns();
        ordered = ordered && now >= before;
        before = now;
    }
    CHECK(ordered);
    uint64_t inside = 0;
    std::thread worker([&] { inside = vkp_now_ns(); });
    worker.join();
    CHECK(inside >= before);
    CHECK(vkp_now_ns() >= inside);
}

TEST_CASE("base: a deadline in milliseconds is added to now and saturates", "[base]")
{
    for (uint64_t ms : {uint64_t{0}, uint64_t{1}, uint64_t{250}, uint64_t{86400000}}) {
        INFO(ms);
        const uint64_t low = vkp_now_ns();
        const uint64_t deadline = vkp_after_ms(ms);
        const uint64_t high = vkp_now_ns();
        CHECK(deadline >= low + ms * 1000000u);
        CHECK(deadline <= high + ms * 1000000u);
    }
    // The product overflows; the product just fits but the sum overflows; the largest that fits.
    CHECK(vkp_after_ms(UINT64_MAX) == VKP_FOREVER);
    CHECK(vkp_after_ms(UINT64_MAX / 1000000u + 1u) == VKP_FOREVER);
    CHECK(vkp_after_ms((UINT64_MAX - vkp_now_ns()) / 1000000u + 1u) == VKP_FOREVER);
    const uint64_t far = (UINT64_MAX - vkp_now_ns()) / 1000000u - 3600000u;
    CHECK(vkp_after_ms(far) < VKP_FOREVER);
    CHECK(vkp_after_ms(far) > UINT64_MAX - uint64_t{2} * 3600u * 1000000000u);
}

TEST_CASE("base: VKP_ZERO gives all-zero structs", "[base]")
{
    vkp_env env = VKP_ZERO;
    CHECK(env.alloc == nullptr);
    CHECK(env.log == nullptr);
    CHECK(env.user == nullptr);
    CHECK(env.sys == nullptr);
    CHECK(env.log_level == VKP_LOG_DEFAULT);
    CHECK(env.spins == 0);
}

TEST_CASE("sys: the default table has every member and is one static table", "[base][sys]")
{
    const vkp_sys *sys = vkp_sys_get_default();
    REQUIRE(sys != nullptr);
    CHECK(vkp_sys_get_default() == sys);
    // All members are pointers to functions: the table is an array of words, none of them zero.
    static_assert(sizeof(vkp_sys) % sizeof(void *) == 0, "a table of pointers");
    std::vector<uintptr_t> words(sizeof(vkp_sys) / sizeof(void *));
    std::memcpy(words.data(), sys, sizeof(vkp_sys));
    for (size_t i = 0; i < words.size(); i++) {
        INFO("member " << i);
        CHECK(words[i] != 0);
    }
}

TEST_CASE("sys: processors are counted; a barrier is there or is not", "[base][sys]")
{
    const vkp_sys *sys = vkp_sys_get_default();
    CHECK(sys->processors() >= 1);
    CHECK(sys->processors() == sys->processors());
    sys->yield();
    const int prepared = sys->membarrier(true);
    CHECK((prepared >= 0) == (sys->membarrier(false) >= 0));
    CHECK(sys->membarrier(true) == prepared);
#ifndef __linux__
    CHECK(prepared == -ENOSYS);
#endif
}

TEST_CASE("sys: clock, random numbers and process id", "[base][sys]")
{
    const vkp_sys *sys = vkp_sys_get_default();
    const uint64_t a = vkp_now_ns();
    const uint64_t b = sys->clock_ns();
    const uint64_t c = vkp_now_ns();
    CHECK(a <= b);
    CHECK(b <= c);
    std::set<uint64_t> seen;
    uint64_t ones = 0;
    uint64_t zeros = 0;
    for (int i = 0; i < 1000; i++) {
        const uint64_t value = sys->random_u64();
        seen.insert(value);
        ones |= value;
        zeros |= ~value;
    }
    CHECK(seen.size() == 1000);
    CHECK(ones == UINT64_MAX);
    CHECK(zeros == UINT64_MAX);
    CHECK(sys->process_id() == static_cast<int>(getpid()));
    CHECK(sys->user_id() == static_cast<uint32_t>(geteuid()));
}

#ifdef __linux__
TEST_CASE("sys: in a user namespace one uid stands for users that are not mapped", "[base][sys]")
{
    unsigned long from = 1;
    unsigned long to = 1;
    unsigned long count = 0;
    std::ifstream("/proc/self/uid_map") >> from >> to >> count;
    unsigned long overflow = 65534;
    std::ifstream("/proc/sys/kernel/overflowuid") >> overflow;
    const bool all = from == 0 && count >= UINT32_MAX;
    CHECK(vkp_sys_get_default()->overflow_id() == (all ? UINT32_MAX : overflow));
    const pid_t pid = fork();
    if (pid == 0) { // the new namespace maps nobody yet
        const bool away = unshare(CLONE_NEWUSER) == 0;
        _exit(!away ? 77 : vkp_sys_get_default()->overflow_id() == overflow ? 0 : 1);
    }
    int status = 0;
    REQUIRE(waitpid(pid, &status, 0) == pid);
    if (WEXITSTATUS(status) == 77) {
        WARN("not run: no user namespaces here");
    } else {
        CHECK(status == 0);
    }
}
#endif

TEST_CASE("sys: failures are negated errno; write leaves errno itself alone", "[base][sys]")
{
    const vkp_sys *sys = vkp_sys_get_default();
    char byte = 0;
    vkp_range range = {&byte, 1};
    const sockaddr_un address = unix_address("/nonexistent-vkp/x");
    vkp_peer peer;
    vkp_file_id id;
    CHECK(sys->close(-1) == -EBADF);
    CHECK(sys->read(-1, &byte, 1) == -EBADF);
    errno =
        4321; // write is called in signal handlers, between a call and its caller's look at errno
    CHECK(sys->write(-1, &byte, 1) == -EBADF);
    CHECK(errno == 4321);
    CHECK(sys->send(-1, &range, 1) == -EBADF);
    CHECK(sys->accept(-1) == -EBADF);
    CHECK(sys->listen(-1, 1) == -EBADF);
    CHECK(sys->socket_error(-1) == -EBADF);
    CHECK(sys->set_nodelay(-1) == -EBADF);
    CHECK(sys->prepare(-1) == -EBADF);
    CHECK(sys->peer(-1, &peer) < 0);
    CHECK(sys->bind(-1, &address, sizeof address, 0600) == -EBADF);
    CHECK(sys->unlink("/nonexistent-vkp/x") == -ENOENT);
    CHECK(sys->chmod("/nonexistent-vkp/x", 0600) == -ENOENT);
    CHECK(sys->identify("/nonexistent-vkp/x", &id) == -ENOENT);
    CHECK(sys->lock_file("/nonexistent-vkp/x", &id) == -ENOENT);
    CHECK(sys->socket(-1, SOCK_STREAM) < 0);
}

TEST_CASE("sys: a wake pair polls readable after a write, and only then", "[base][sys]")
{
    const vkp_sys *sys = vkp_sys_get_default();
    int fds[2] = {-1, -1};
    REQUIRE(sys->wake_pair(fds) >= 0);
    for (int fd : fds) {
        CHECK(is_nonblocking(fd));
        CHECK(is_cloexec(fd));
    }
    CHECK_FALSE(poll_readable(sys, fds[0], 0));
    const uint64_t one = 1; // eight bytes: what an event descriptor wants, and a pipe takes
    CHECK(sys->write(fds[1], &one, sizeof one) == static_cast<int64_t>(sizeof one));
    CHECK(poll_readable(sys, fds[0], VKP_FOREVER));
    uint64_t got = 0;
    CHECK(sys->read(fds[0], &got, sizeof got) > 0);
    CHECK_FALSE(poll_readable(sys, fds[0], 0));
    CHECK(sys->read(fds[0], &got, sizeof got) == -EAGAIN);
    CHECK(sys->close(fds[0]) == 0);
    if (fds[1] != fds[0]) {
        CHECK(sys->close(fds[1]) == 0);
    }
}

TEST_CASE("sys: poll keeps its deadline and never returns early", "[base][sys]")
{
    const vkp_sys *sys = vkp_sys_get_default();
    int fds[2] = {-1, -1};
    REQUIRE(sys->wake_pair(fds) >= 0);
    struct pollfd entry;
    entry.fd = fds[0];
    entry.events = POLLIN;
    entry.revents = 0;
    const uint64_t deadline = vkp_after_ms(3);
    int ready = 0;
    do {
        ready = sys->poll(&entry, 1, deadline);
    } while (ready == -EINTR);
    CHECK(ready == 0);
    CHECK(vkp_now_ns() >= deadline);
    CHECK(sys->close(fds[0]) == 0);
    if (fds[1] != fds[0]) {
        CHECK(sys->close(fds[1]) == 0);
    }
}

TEST_CASE("sys: sockets are non-blocking and close-on-exec from birth", "[base][sys]")
{
    const vkp_sys *sys = vkp_sys_get_default();
    const std::string path = vkp_test_fresh_path("s");
    const sockaddr_un address = unix_address(path);
    const int listener = sys->socket(AF_UNIX, SOCK_STREAM);
    REQUIRE(listener >= 0);
    CHECK(is_nonblocking(listener));
    CHECK(is_cloexec(listener));
    REQUIRE(sys->bind(listener, &address, sizeof address, 0600) == 0);
    REQUIRE(sys->listen(listener, 4) == 0);
    CHECK(sys->accept(listener) == -EAGAIN);

    vkp_file_id id;
    REQUIRE(sys->identify(path.c_str(), &id) == 0);
    struct stat facts;
    REQUIRE(lstat(path.c_str(), &facts) == 0);
    CHECK(id.is_socket);
    CHECK(id.inode == static_cast<uint64_t>(facts.st_ino));
    CHECK(id.device == static_cast<uint64_t>(facts.st_dev));
    CHECK(id.uid == facts.st_uid);
    CHECK(sys->chmod(path.c_str(), 0640) == 0);
    REQUIRE(lstat(path.c_str(), &facts) == 0);
    CHECK((facts.st_mode & 0777) == 0640);

    const int client = sys->socket(AF_UNIX, SOCK_STREAM);
    REQUIRE(client >= 0);
    const int connected = sys->connect(client, &address, sizeof address);
    CHECK((connected == 0 || connected == -EINPROGRESS));
    CHECK(poll_readable(sys, listener, VKP_FOREVER));
    const int server = sys->accept(listener);
    REQUIRE(server >= 0);
    CHECK(is_nonblocking(server));
    CHECK(is_cloexec(server));
    CHECK(sys->socket_error(client) == 0);
    vkp_peer peer = {1, 1, -1};
    CHECK(sys->peer(server, &peer) == 0);
    CHECK(peer.uid == static_cast<uint32_t>(geteuid()));
    CHECK(peer.gid == static_cast<uint32_t>(getegid()));
#if defined(__linux__) || defined(__APPLE__)
    CHECK(peer.pid == static_cast<int>(getpid()));
#else
    CHECK((peer.pid == 0 || peer.pid == static_cast<int>(getpid())));
#endif

    // Several ranges arrive as one stream.
    const vkp_range ranges[3] = {{"ab", 2}, {"", 0}, {"cde", 3}};
    CHECK(sys->send(client, ranges, 3) == 5);
    char buffer[16];
    CHECK(poll_readable(sys, server, VKP_FOREVER));
    REQUIRE(sys->read(server, buffer, sizeof buffer) == 5);
    CHECK(std::string(buffer, 5) == "abcde");
    CHECK(sys->read(server, buffer, sizeof buffer) == -EAGAIN);

    // One range goes by another call of the system's; a full socket says so to both.
    CHECK(sys->send(client, ranges, 1) == 2);
    REQUIRE(sys->read(server, buffer, sizeof buffer) == 2);
    CHECK(std::string(buffer, 2) == "ab");
    const std::string much(4096, 'x');
    std::string in(65536, '\0');
    const vkp_range large[2] = {{much.data(), much.size()}, {much.data(), much.size()}};
    int64_t put = 0;
    while ((put = sys->send(client, large, 1)) > 0) {
    }
    CHECK(put == -EAGAIN);
    CHECK(sys->send(client, large, 2) == -EAGAIN);
    while (sys->read(server, &in[0], in.size()) > 0) { // or the close would be a reset
    }

    // The default action of SIGPIPE would end this process.
    CHECK(sys->close(server) == 0);
    CHECK(sys->send(client, ranges, 1) == -EPIPE);
    CHECK(sys->send(client, ranges, 3) == -EPIPE);
    CHECK(sys->read(client, buffer, sizeof buffer) == 0);
    CHECK(sys->close(client) == 0);
    CHECK(sys->close(listener) == 0);
    CHECK(sys->unlink(path.c_str()) == 0);
    CHECK(sys->unlink(path.c_str()) == -ENOENT);
}

TEST_CASE("sys: bind makes a file of that mode, less the umask, and changes no other",
          "[base][sys]")
{
    const vkp_sys *sys = vkp_sys_get_default();
    for (mode_t mask : {mode_t{0}, mode_t{022}, mode_t{077}}) {
        for (uint32_t mode : {0600u, 0660u, 0666u, 0777u}) {
            INFO("umask " << mask << ", mode " << mode);
            const std::string path = vkp_test_fresh_path("m");
            const sockaddr_un address = unix_address(path);
            const int fd = sys->socket(AF_UNIX, SOCK_STREAM);
            REQUIRE(fd >= 0);
            const mode_t before = umask(mask);
            const int bound = sys->bind(fd, &address, sizeof address, mode);
            const mode_t after = umask(before);
            REQUIRE(bound == 0);
            CHECK(after == mask); // not touched: it belongs to all threads
            struct stat facts;
            REQUIRE(lstat(path.c_str(), &facts) == 0);
            const uint32_t born = static_cast<uint32_t>(facts.st_mode & 07777);
#ifdef __linux__ // elsewhere it is born with what the umask leaves of all
            CHECK(born == (mode & ~static_cast<uint32_t>(mask)));
#else
            CHECK((born & static_cast<uint32_t>(mask)) == 0);
#endif
            CHECK(sys->bind(fd, &address, sizeof address, mode) < 0); // bound already
            CHECK(sys->close(fd) == 0);
            const int other = sys->socket(AF_UNIX, SOCK_STREAM);
            CHECK(sys->bind(other, &address, sizeof address, 0777) == -EADDRINUSE);
            REQUIRE(lstat(path.c_str(), &facts) == 0);
            CHECK((facts.st_mode & 07777) == born); // what was there is left alone
            CHECK(sys->close(other) == 0);
            CHECK(sys->unlink(path.c_str()) == 0);
        }
    }
}

TEST_CASE("sys: prepare makes an adopted socket as if it were born here", "[base][sys]")
{
    const vkp_sys *sys = vkp_sys_get_default();
    int fds[2];
    REQUIRE(socketpair(AF_UNIX, SOCK_STREAM, 0, fds) == 0);
    CHECK_FALSE(is_nonblocking(fds[0]));
    CHECK_FALSE(is_cloexec(fds[0]));
    for (int again = 0; again < 2; again++) {
        CHECK(sys->prepare(fds[0]) == 0);
        CHECK(is_nonblocking(fds[0]));
        CHECK(is_cloexec(fds[0]));
    }
    CHECK(sys->close(fds[1]) == 0);
    const vkp_range range = {"x", 1};
    CHECK(sys->send(fds[0], &range, 1) == -EPIPE);
    CHECK(sys->close(fds[0]) == 0);
}

TEST_CASE("sys: a refused TCP connection is told by connect or by socket_error", "[base][sys]")
{
    const vkp_sys *sys = vkp_sys_get_default();
    sockaddr_in address;
    std::memset(&address, 0, sizeof address);
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    // A port that is bound but does not listen refuses, and nobody else can take it meanwhile.
    const int holder = sys->socket(AF_INET, SOCK_STREAM);
    REQUIRE(holder >= 0);
    REQUIRE(sys->bind(holder, &address, sizeof address, 0600) == 0); // no file: no mode
    socklen_t bytes = sizeof address;
    REQUIRE(getsockname(holder, reinterpret_cast<sockaddr *>(&address), &bytes) == 0);

    const int client = sys->socket(AF_INET, SOCK_STREAM);
    REQUIRE(client >= 0);
    CHECK(is_nonblocking(client));
    CHECK(sys->set_nodelay(client) == 0);
    int result = sys->connect(client, &address, sizeof address);
    if (result == -EINPROGRESS) {
        struct pollfd entry;
        entry.fd = client;
        entry.events = POLLOUT;
        entry.revents = 0;
        REQUIRE(sys->poll(&entry, 1, VKP_FOREVER) == 1);
        result = sys->socket_error(client);
    }
    CHECK(result == -ECONNREFUSED);
    CHECK(sys->close(client) == 0);
    CHECK(sys->close(holder) == 0);
}

TEST_CASE("sys: a lock file has one holder; identify does not take it for a socket", "[base][sys]")
{
    const vkp_sys *sys = vkp_sys_get_default();
    const std::string path = vkp_test_fresh_path("l");
    vkp_file_id id;
    const int first = sys->lock_file(path.c_str(), &id);
    REQUIRE(first >= 0);
    CHECK(is_cloexec(first));
    CHECK(sys->lock_file(path.c_str(), &id) == -EWOULDBLOCK);
    REQUIRE(sys->identify(path.c_str(), &id) == 0);
    CHECK_FALSE(id.is_socket);
    CHECK(sys->close(first) == 0);
    const int second = sys->lock_file(path.c_str(), &id);
    CHECK(second >= 0);
    CHECK(sys->close(second) == 0);
}

TEST_CASE("sys: identify looks at a link itself, not at what it points to", "[base][sys]")
{
    const vkp_sys *sys = vkp_sys_get_default();
    const std::string target = vkp_test_fresh_path("t");
    const std::string link = vkp_test_fresh_path("n");
    const sockaddr_un address = unix_address(target);
    const int fd = sys->socket(AF_UNIX, SOCK_STREAM);
    REQUIRE(fd >= 0);
    REQUIRE(sys->bind(fd, &address, sizeof address, 0600) == 0);
    REQUIRE(symlink(target.c_str(), link.c_str()) == 0);
    vkp_file_id of_target;
    vkp_file_id of_link;
    REQUIRE(sys->identify(target.c_str(), &of_target) == 0);
    REQUIRE(sys->identify(link.c_str(), &of_link) == 0);
    CHECK(of_target.is_socket);
    CHECK_FALSE(of_link.is_socket);
    CHECK(of_target.inode != of_link.inode);
    CHECK(sys->close(fd) == 0);
}

TEST_CASE("sys: epoll where there is one, ENOSYS elsewhere", "[base][sys]")
{
    const vkp_sys *sys = vkp_sys_get_default();
#if defined(__linux__)
    const int epoll_fd = sys->epoll_create();
    REQUIRE(epoll_fd >= 0);
    CHECK(is_cloexec(epoll_fd));
    int fds[2] = {-1, -1};
    REQUIRE(sys->wake_pair(fds) >= 0);
    struct epoll_event event;
    std::memset(&event, 0, sizeof event);
    event.events = EPOLLIN;
    event.data.u64 = 77;
    CHECK(sys->epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fds[0], &event) == 0);
    CHECK(sys->epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fds[0], &event) == -EEXIST);
    struct epoll_event got[4];
    CHECK(sys->epoll_wait(epoll_fd, got, 4, 0) == 0);
    const uint64_t deadline = vkp_after_ms(2);
    CHECK(sys->epoll_wait(epoll_fd, got, 4, deadline) == 0);
    CHECK(vkp_now_ns() >= deadline);
    const uint64_t one = 1;
    CHECK(sys->write(fds[1], &one, sizeof one) == static_cast<int64_t>(sizeof one));
    REQUIRE(sys->epoll_wait(epoll_fd, got, 4, VKP_FOREVER) == 1);
    const uint64_t token = got[0].data.u64; // the kernel's struct is packed: no reference to it
    CHECK(token == 77);
    CHECK(sys->close(fds[0]) == 0);
    if (fds[1] != fds[0]) {
        CHECK(sys->close(fds[1]) == 0);
    }
    CHECK(sys->close(epoll_fd) == 0);
#else
    CHECK(sys->epoll_create() == -ENOSYS);
    CHECK(sys->epoll_ctl(-1, 1, -1, nullptr) == -ENOSYS);
    CHECK(sys->epoll_wait(-1, nullptr, 1, 0) == -ENOSYS);
#endif
}

TEST_CASE("sys: a kqueue where there is one, ENOSYS elsewhere", "[base][sys]")
{
    const vkp_sys *sys = vkp_sys_get_default();
    errno = 4321; // kevent is called in signal handlers, too
#if defined(__linux__)
    CHECK(sys->kqueue_create() == -ENOSYS);
    CHECK(sys->kevent(-1, nullptr, 0, nullptr, 0, 0) == -ENOSYS);
#else
    const int kq = sys->kqueue_create();
    REQUIRE(kq >= 0);
    CHECK(is_cloexec(kq));
    int fds[2] = {-1, -1};
    REQUIRE(sys->wake_pair(fds) >= 0);
    struct kevent change;
    EV_SET(&change, static_cast<uintptr_t>(fds[0]), EVFILT_READ, EV_ADD, 0, 0, nullptr);
    errno = 4321;
    CHECK(sys->kevent(kq, &change, 1, nullptr, 0, VKP_FOREVER) == 0); // no room: no wait
    struct kevent got[4];
    CHECK(sys->kevent(kq, nullptr, 0, got, 4, 0) == 0);
    const uint64_t deadline = vkp_after_ms(2);
    CHECK(sys->kevent(kq, nullptr, 0, got, 4, deadline) == 0);
    CHECK(vkp_now_ns() >= deadline);
    const uint64_t one = 1;
    CHECK(sys->write(fds[1], &one, sizeof one) == static_cast<int64_t>(sizeof one));
    CHECK(sys->kevent(kq, nullptr, 0, got, 4, VKP_FOREVER) == 1);
    CHECK(got[0].ident == static_cast<uintptr_t>(fds[0]));
    CHECK(sys->kevent(-1, &change, 1, nullptr, 0, 0) == -EBADF);
    CHECK(sys->close(fds[0]) == 0);
    CHECK(sys->close(fds[1]) == 0);
    CHECK(sys->close(kq) == 0);
#endif
    CHECK(errno == 4321);
}

TEST_CASE("sys: the kind of a descriptor", "[base][sys]")
{
    const vkp_sys *sys = vkp_sys_get_default();
    int fds[2] = {-1, -1};
    REQUIRE(pipe(fds) == 0);
    const int file = open(vkp_test_path("kind"), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    REQUIRE(file >= 0);
    const int socket = sys->socket(AF_UNIX, SOCK_STREAM);
    REQUIRE(socket >= 0);
    CHECK(sys->fd_kind(file) == VKP_FD_FILE);
    CHECK(sys->fd_kind(socket) == VKP_FD_SOCKET);
    CHECK(sys->fd_kind(fds[0]) == VKP_FD_OTHER);
    CHECK(sys->fd_kind(-1) == -EBADF);
    for (int fd : {fds[0], fds[1], file, socket}) {
        CHECK(sys->close(fd) == 0);
    }
}
